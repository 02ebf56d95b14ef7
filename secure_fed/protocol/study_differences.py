"""In which fields two study files differ, and in which a study differs from its template."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from secure_fed.protocol.study import StudyFile


def as_template(file: StudyFile) -> dict[str, Any]:
    """What a study has from its template, without all that ``study new`` fills in, to compare two of them."""
    content = file.model_dump(mode="json", exclude={"simulation", "coordinator", "initial"})
    del content["format"]
    content["collusion"] = file.colluders  # which a template need not say
    for key in ("activation", "digest", "id"):
        content["backbone"].pop(key)
    for site in content["sites"]:
        site.pop("keys")
    for key in ("source", "digest"):
        content["features"].pop(key)
    return content


def unlike(study: StudyFile, template: StudyFile) -> list[str]:
    """The tables and keys in which a study is not what ``study new`` makes of a template; empty if it is."""
    here, wanted = as_template(study), as_template(template)
    if template.method.one_sum and template.encoding.precision_bits is None:
        wanted["encoding"] |= {key: here["encoding"][key] for key in ("bits", "precision_bits")}
    return sorted(key for key in wanted if here[key] != wanted[key])


@dataclass(frozen=True)
class Difference:
    """One field in which two study files differ; None where one of them has none."""

    field: str
    before: Any
    after: Any


def differences(before: StudyFile, after: StudyFile) -> list[Difference]:
    """Every field in which two differ, ``[simulation]`` left out; sites and classes are compared by name."""
    first, second = (_leaves(file.model_dump(mode="json", exclude={"simulation"})) for file in (before, after))
    return [
        Difference(field, first.get(field), second.get(field))
        for field in sorted(set(first) | set(second))
        if first.get(field) != second.get(field)
    ]


def _leaves(value: Any, path: str = "") -> dict[str, Any]:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        value = {entry["name"]: entry for entry in value}
    if not isinstance(value, dict):
        return {path: value}
    found: dict[str, Any] = {}
    for name, entry in value.items():
        found.update(_leaves(entry, f"{path}.{name}" if path else name))
    return found

"""What a sweep asks for: its file, and the trials that gives."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from secure_fed import configs
from secure_fed.core.canonical import canonical_json
from secure_fed.core.errors import SecfacmicError, SiteFileError, StudyError, SweepFileError
from secure_fed.core.tomlfile import FileModel, parse_table, read_toml
from secure_fed.protocol.study import Template, read_template
from secure_fed.protocol.study_tables import Name, Text

DELTA = 1e-5
"""The budget's delta where a sweep sets none."""

Settings = dict[str, Any]
"""By dotted path, ``seed`` and ``epsilon`` included."""


class SweepFile(FileModel):
    """A sweep file; see ``docs/sweep.md``.

    Attributes:
        format: of this file; 1 is the only one so far.
        name: of the sweep.
        title: what it shows, for people.
        study: packaged name or path of a template.
        data: folder of the sites' images; without it the template's phantoms are made.
        seeds: of the study.
        grid: values by dotted path; every combination is tried.
        list: further settings, each on top of every combination.
    """

    format: Literal[1]
    name: Name
    title: Text | None = None
    study: Text
    data: Text | None = None
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**63)], ...] = (0,)
    grid: dict[Text, tuple[Any, ...]] = Field(default_factory=dict)
    list: tuple[dict[Text, Any], ...] = ()

    @field_validator("seeds")
    @classmethod
    def _some_seeds(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if not seeds or len(set(seeds)) < len(seeds):
            raise ValueError("expected at least one seed, each once")
        return seeds

    @field_validator("grid")
    @classmethod
    def _some_values(cls, grid: dict[str, tuple[Any, ...]]) -> dict[str, tuple[Any, ...]]:
        for name, values in grid.items():
            if not values or len({json.dumps(value) for value in values}) < len(values):
                raise ValueError(f"{name}: expected at least one value, each once")
        if "seed" in grid:
            raise ValueError("seed: give seeds = [...] beside the grid")
        return grid

    @field_validator("list")
    @classmethod
    def _not_both(cls, entries: tuple[dict[str, Any], ...], info: ValidationInfo) -> tuple[dict[str, Any], ...]:
        both = sorted(set(info.data.get("grid", ())) & {name for entry in entries for name in entry})
        if both or any("seed" in entry for entry in entries):
            raise ValueError(f"{', '.join(both) or 'seed'}: set twice; expected in the grid or in the list")
        return entries


@dataclass(frozen=True)
class Trial:
    """One simulation to run.

    Attributes:
        id: digest of all that makes its result, 16 hex digits.
        settings: what the sweep sets, for people.
        study: the template with these settings; None if they do not fit together.
        images: digest of the images in a data folder; empty for phantoms.
        error: why the settings do not fit together.
        ignored: settings that the study has and the trial's method makes nothing of, in words.
    """

    id: str
    settings: Settings
    study: Template | None
    images: str
    error: str | None = None
    ignored: tuple[str, ...] = ()

    @property
    def epsilon(self) -> float | None:
        """Of each site's budget; None without differential privacy."""
        value: float | None = self.settings["epsilon"]
        return value

    @property
    def delta(self) -> float:
        """The budget's other half."""
        return float(self.settings.get("delta", DELTA))


def read_sweep_file(path: Path) -> tuple[SweepFile, Template]:
    """Read a sweep file and the study it names; a path that is no file is looked up among the packaged sweeps.

    Raises:
        SweepFileError: with every error of the file.
        StudyError: the study cannot be read, or is none that may be swept.
    """
    found = path if path.is_file() else configs.find(Path("sweeps") / path)
    found = found if found.is_file() else configs.find(path)
    if not found.exists():
        raise SweepFileError(configs.unknown(path, "sweep", configs.FOLDER / "sweeps"))
    file = read_toml(found, SweepFile, SweepFileError)
    beside = found.parent / file.study
    study = read_template(beside if beside.is_file() else Path(file.study))
    plan = study.simulation
    if plan is None:
        raise StudyError(
            f"{file.study}: no [simulation] table; expected a template whose data are public or simulated: every "
            "trial on patients' data would spend budget"
        )
    if file.data is None and not plan.phantoms:
        raise StudyError(f'{file.study}: it has no phantoms; name its data folder in {found}: data = "..."')
    if file.data is not None:
        data = (found.parent / file.data).resolve()
        if not data.is_dir():
            raise SweepFileError(f"{found}: data = {file.data!r}: no folder {data}; expected the sites' images there")
        file = file.model_copy(update={"data": str(data)})
    return file, study


def plan_trials(file: SweepFile, study: Template) -> list[Trial]:
    """All trials, in the order of the file: list, then grid, then seeds.

    Settings that do not fit together make a trial that fails at once.

    Raises:
        SweepFileError: a value occurs in no trial that could run, with the reason.
    """
    images = _images_digest(file, study)
    data = Path("phantoms" if file.data is None else file.data)
    names = dict.fromkeys([*file.grid, *(name for entry in file.list for name in entry), "epsilon"])
    usual = {name: value for name in names for value in _usual(study, name)}
    trials = []
    for entry in file.list or ({},):
        for values in product(*file.grid.values()):
            for seed in file.seeds:
                chosen = {**dict(zip(file.grid, values, strict=True)), **entry, "seed": seed}
                if chosen.get("epsilon") == "none":
                    chosen["epsilon"] = None
                trials.append(_trial(study, chosen, {**usual, **chosen}, data, images))
    _refuse_hopeless(trials)
    twice = {trial.id for trial in trials}
    if len(twice) < len(trials):
        raise SweepFileError(f"{len(trials) - len(twice)} trials are asked for twice; remove what repeats them")
    return trials


def _usual(study: Template, path: str) -> Iterator[Any]:
    """The value that a study has without being told, if it has one."""
    if path in ("epsilon", "delta"):
        yield {"epsilon": None, "delta": DELTA}[path]
    elif path == "sites":
        yield sum(site.role == "train" for site in study.sites)
    else:
        at = study.model_dump(mode="json", exclude_none=True)
        for part in path.split("."):
            try:
                at = at[part] if isinstance(at, dict) else _entry(at, part, path)
            except (KeyError, StudyError):
                return
        yield at


def _trial(base: Template, chosen: Settings, settings: Settings, data: Path, images: str) -> Trial:
    """A trial with the settings that are chosen for it; ``settings`` also has what others choose otherwise."""
    from secure_fed.model.adapters import (  # loads torch, which reading does without
        check_method,
        ignored,
        refuse_idle,
        uses_basis,
    )

    try:
        epsilon, delta = _budget(settings)
        study = with_settings(base, {key: value for key, value in chosen.items() if key not in ("epsilon", "delta")})
        # What the sweep sets itself must make a difference; what the study has been given for another method need not.
        nothing = {path: value for path, value in ignored(study).items() if not _sets(chosen, path)}
        words = tuple(f"{study.method.adapter} makes nothing of {path}: trials with it run without" for path in nothing)
        study = with_settings(study, nothing) if nothing else study
        check_method(study.method)
        uses_basis(study)
        refuse_idle(study)
        study.plan.refuse_shared(data)
    except SecfacmicError as error:
        failed = digest({"settings": settings, "base": base.model_dump(mode="json")})
        return Trial(failed, settings, None, images, str(error))
    content = study.model_dump(mode="json", exclude_none=True)
    made = digest({"study": content, "epsilon": epsilon, "delta": delta, "images": images})
    return Trial(made, settings, study, images, ignored=words)


def _sets(chosen: Settings, path: str) -> bool:
    return any(key == path or key.startswith(f"{path}.") for key in chosen)


def _budget(settings: Settings) -> tuple[float | None, float | None]:
    from secure_fed.clients.sitefile import SitePrivacy

    if settings["epsilon"] is None:
        return None, None
    given = {"epsilon": settings["epsilon"], "delta": settings.get("delta", DELTA)}
    checked = parse_table(given, SitePrivacy, SiteFileError, "budget")
    return checked.epsilon, checked.delta


def with_settings(template: Template, settings: Mapping[str, Any]) -> Template:
    """A template with values changed by dotted path, checked as a whole again.

    An entry of a list is named by its ``name`` or its index. ``sites`` = n keeps the first n training sites; beyond
    those it has, a template with phantoms gets copies of them in turn, each with a scanner of its own.

    Raises:
        StudyError: with every error that the changes make.
    """
    content = template.model_dump(mode="json", exclude_none=True)
    if "sites" in settings:
        _set_sites(content, settings["sites"])
    for path, value in settings.items():
        if path != "sites":
            _set(content, path, value)
    return parse_table(content, Template, StudyError, f"study {template.name} with {in_words(settings)}")


def _set(content: Any, path: str, value: Any) -> None:
    *parents, last = path.split(".")
    at = content
    for part in parents:
        at = at.setdefault(part, {}) if isinstance(at, dict) else _entry(at, part, path)
    if isinstance(at, dict):
        at[last] = value
    elif isinstance(at, list) and last.isdecimal() and int(last) < len(at):
        at[int(last)] = value
    else:
        raise StudyError(f"{path}: no such key in the study; expected a dotted path as in study.toml")


def _entry(at: Any, part: str, path: str) -> Any:
    if isinstance(at, list):
        for index, entry in enumerate(at):
            if part == str(index) or (isinstance(entry, dict) and entry.get("name") == part):
                return entry
    raise StudyError(f"{path}: nothing is called {part} there; expected a dotted path as in study.toml")


def _set_sites(content: dict[str, Any], count: Any) -> None:
    if not isinstance(count, int) or count < 1:
        raise StudyError(f"sites = {count!r}; expected a number of training sites, at least 1")
    training = [site for site in content["sites"] if site["role"] == "train"]
    observers = [site for site in content["sites"] if site["role"] == "observer"]
    plan = content["simulation"]
    folders = {site["name"]: site["folder"] for site in plan["sites"]}
    groups = {group["name"]: group for group in plan["phantoms"]}
    if count > len(training) and not groups:
        raise StudyError(f"sites = {count}, but there are data of {len(training)} sites; expected at most that")
    scanner = max((group["scanner"] for group in groups.values()), default=0)
    chosen = training[:count]
    for index in range(len(training), count):
        source = training[index % len(training)]
        name = f"{source['name']}-{index // len(training) + 1}"
        scanner += 1
        groups[name] = groups[folders[source["name"]]] | {"name": name, "scanner": scanner}
        folders[name] = name
        chosen.append(source | {"name": name})
    content["sites"] = chosen + observers
    names = [site["name"] for site in content["sites"]]
    plan["sites"] = [{"name": name, "folder": folders[name]} for name in names]
    if groups:
        plan["phantoms"] = [groups[folder] for folder in dict.fromkeys(folders[name] for name in names)]
    if content["key_maker"] not in names:
        content["key_maker"] = chosen[0]["name"]
    content["max_sites"] = max(content["max_sites"], count)


def _refuse_hopeless(trials: Sequence[Trial]) -> None:
    """Refuse a value without any trial that could run: a slip of the pen, found before hours are spent."""
    possible = {(key, json.dumps(trial.settings[key])) for trial in trials if trial.study for key in trial.settings}
    lines: dict[str, None] = {}
    for trial in trials:
        for key, value in trial.settings.items():
            if (key, json.dumps(value)) not in possible:
                lines.setdefault(f"  {key} = {json.dumps(value)}: {trial.error}", None)
    if lines:
        raise SweepFileError("values that fit no trial:\n" + "\n".join(list(lines)[:10]))


def _images_digest(file: SweepFile, study: Template) -> str:
    """Of names and sizes of all images in a data folder; a moved folder gives the same."""
    if file.data is None:
        return ""
    root = Path(file.data)
    folders = sorted({site.folder for site in study.plan.sites})
    lines = [
        [str(path.relative_to(root)), path.stat().st_size]
        for folder in folders
        for path in sorted((root / folder).rglob("*"))
        if path.is_file()
    ]
    return digest(lines)


def digest(content: Any) -> str:
    """Of JSON content, 16 hex digits."""
    return hashlib.sha256(canonical_json(content)).hexdigest()[:16]


def in_words(settings: Mapping[str, Any]) -> str:
    """Settings for people."""
    return ", ".join(f"{name} = {'none' if value is None else value}" for name, value in settings.items())

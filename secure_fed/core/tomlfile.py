"""TOML files as pydantic models: every error of a file at once, each naming key, value and what is allowed."""

from __future__ import annotations

import inspect
import json
import re
import textwrap
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar, get_args
from urllib.parse import urlsplit

import tomli_w
from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError
from pydantic_core import to_jsonable_python

from secure_fed.core.errors import SecfacmicError
from secure_fed.core.storage import write_durable


class FileModel(BaseModel):
    """A table of a file of ours: unknown keys and wrong types are errors, values never change."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @classmethod
    def completed(cls, content: dict[str, Any]) -> dict[str, Any]:
        """The content of a file with what follows from the rest of it where it is not given."""
        return content


Model = TypeVar("Model", bound=FileModel)

_SPELLINGS: dict[str, str] = {}


def spelled(pattern: str, words: str, most: int | None = None) -> StringConstraints:
    """A text that people write in a form of its own.

    Args:
        pattern: a regular expression that all of it matches, from ``^`` to ``$``.
        words: what the form is, for whoever wrote another: ``expected WORDS``.
        most: most characters.
    """
    _SPELLINGS[pattern] = words
    return StringConstraints(pattern=pattern, max_length=most)


def reachable(url: str) -> str:
    """The URL, if it names a host and, if any, a port that there can be.

    Raises:
        ValueError: it does not.
    """
    try:
        parts = urlsplit(url)
        named = bool((parts.hostname or "").encode("idna")) and (parts.port is None or parts.port >= 0)
    except ValueError:  # brackets, a port beyond 65535, a name with an empty or too long part
        named = False
    if not named:
        raise ValueError("no host and port that there can be; expected HOST or HOST:PORT, as in fl.example.org:8443")
    return url


_DEPTH = 5
"""How often a file is read again for errors that others hide."""


def meanings(model: type[FileModel]) -> dict[str, str]:
    """What the docstrings of a model and its bases say under ``Attributes:``, by key."""
    found: dict[str, str] = {}
    for base in reversed(model.__mro__):
        _, _, section = inspect.cleandoc(base.__dict__.get("__doc__") or "").partition("Attributes:\n")
        key = ""
        for line in section.splitlines():
            entry = re.fullmatch(r"    (\w+): (.+)", line)
            if entry:
                key, found[entry[1]] = entry[1], entry[2]
            elif line.startswith("     ") and key:
                found[key] += " " + line.strip()
            elif line.strip():
                break  # another section
    return found


def explained_toml(model: FileModel) -> str:
    """The model as TOML text with every key there is: those that are not set stand as comments, each with its meaning.

    A key without a default shows its example (pydantic's ``examples``), so that each comment is a line that can be put
    into force as it is.
    """
    return "\n".join(_explained(type(model), model, "", set_=True)) + "\n"


def _explained(kind: type[FileModel], model: FileModel | None, path: str, *, set_: bool) -> Iterator[str]:
    said = meanings(kind)
    tables = []
    for key, field in kind.model_fields.items():
        inner = _table_in(field.annotation)
        value = None if model is None else getattr(model, key)
        if inner is not None:
            tables.append((key, inner, value))
            continue
        yield from _comment(said[key])
        given = value is not None and (field.is_required() or value != field.default)
        if not given:
            value = field.default if field.default is not None and not field.is_required() else _example(kind, key)
        yield ("" if given and set_ else "# ") + tomli_w.dumps({key: to_jsonable_python(value)}).strip()
        yield ""
    for key, inner, value in tables:
        yield from _comment(said[key])
        yield ("" if value is not None else "# ") + f"[{path}{key}]"
        yield from _explained(inner, value, f"{path}{key}.", set_=value is not None)


def _example(kind: type[FileModel], key: str) -> Any:
    examples = kind.model_fields[key].examples
    assert examples, f"{kind.__name__}.{key} has neither default nor example"
    return examples[0]


def _comment(text: str) -> list[str]:
    plain = re.sub(r":\w+:`~?([^`]*)`|``([^`]*)``", lambda match: match[1] or match[2], text)
    return textwrap.wrap(plain, 100, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False)


def _table_in(annotation: Any) -> type[FileModel] | None:
    """The one table in an annotation, as in ``Model | None``."""
    kinds = (annotation, *get_args(annotation))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, FileModel)), None)


def parse_toml(text: str, model: type[Model], refusal: type[SecfacmicError], where: str) -> Model:
    """Read a model from TOML text.

    Args:
        text: the file's content.
        model: what to read.
        refusal: the error class to raise.
        where: the file's name, for messages.

    Raises:
        SecfacmicError: of class ``refusal``, with one line for every error found.
    """
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise refusal(f"{where}: not TOML: {error}; mend that line") from error
    except RecursionError:
        raise refusal(f"{where}: nested too deeply to be read; expected a few levels") from None
    return parse_table(content, model, refusal, where)


def parse_table(content: dict[str, Any], model: type[Model], refusal: type[SecfacmicError], where: str) -> Model:
    """Read a model from a parsed table; as :func:`parse_toml`."""
    try:
        return _validated(content, model)
    except ValidationError as error:
        lines = [*(_line(entry, model) for entry in error.errors()), *_hidden(content, model, error)]
        count = f"{len(lines)} errors" if len(lines) > 1 else "1 error"
        raise refusal(f"{where}: {count}\n" + "\n".join(lines)) from None
    except RecursionError:
        raise refusal(f"{where}: nested too deeply to be read; expected a few levels") from None


def read_toml(path: Path, model: type[Model], refusal: type[SecfacmicError]) -> Model:
    """Read a model from a TOML file; as :func:`parse_toml`, and ``refusal`` also when it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise refusal(f"{path}: cannot be read ({reason}); expected a TOML file there") from error
    return parse_toml(text, model, refusal, str(path))


def to_toml(model: FileModel) -> str:
    """The model as TOML text; keys that are not set (None) are left out."""
    return tomli_w.dumps(model.model_dump(mode="json", exclude_none=True))


def write_toml(path: Path, model: FileModel) -> None:
    """Write the model durably as TOML.

    Raises:
        StorageError: it cannot be written.
    """
    write_durable(path, to_toml(model).encode())


def _validated(content: dict[str, Any], model: type[Model]) -> Model:
    # JSON mode is strict about types but takes an array where a tuple is asked for.
    # The context is where validators leave what others compare with, though it was refused itself.
    return model.model_validate_json(json.dumps(model.completed(content), default=str), context={})


def _hidden(content: dict[str, Any], model: type[Model], error: ValidationError) -> Iterator[str]:
    """Lines for the errors that others hide: what is compared with a value is not looked at while that is wrong itself.

    Found by reading the file again without the wrong values, names in a form that would do, and of few possible values
    the one with which most is right. What is missing then, or wrong in the same place, is no news.
    """
    content = json.loads(json.dumps(content, default=str))
    told = {entry["loc"] for entry in error.errors()}
    for _ in range(_DEPTH):
        for entry in sorted(error.errors(), key=lambda entry: entry["type"] == "literal_error"):
            _mend(content, entry, model)
        again = _refused(content, model)
        if again is None:
            return
        error = again
        news = [entry for entry in error.errors() if entry["type"] != "missing" and not _is_at(entry["loc"], told)]
        told |= {entry["loc"] for entry in news}
        yield from (_line(entry, model) for entry in news)


def _is_at(location: tuple[int | str, ...], told: set[tuple[int | str, ...]]) -> bool:
    """Whether something was told there already, or of what it is in."""
    return any(location[: len(other)] == other for other in told)


def _refused(content: Any, model: type[Model]) -> ValidationError | None:
    try:
        _validated(content, model)
    except ValidationError as error:
        return error
    return None


def _mend(content: Any, entry: Any, model: type[FileModel]) -> None:
    """Take a wrong value out, or put in what would do; a table that lacks a key goes. Nothing if it is gone already."""
    *parents, last = entry["loc"] or ("",)
    try:
        above = at = content
        for part in parents:
            above, at = at, at[part]
        if entry["type"] == "string_pattern_mismatch":
            at[last] = re.sub(r"[^a-z0-9_-]", "-", str(at[last]).lower()).strip("-_") or "x"
        elif options := _schema_at(model, entry["loc"]).get("enum", ()) if entry["type"] == "literal_error" else ():
            faults = {}
            for at[last] in options:
                refusal = _refused(content, model)
                faults[at[last]] = refusal.error_count() if refusal else 0
            at[last] = min(faults, key=lambda option: faults[option])
        elif entry["type"] == "missing" and parents and isinstance(above, dict):
            del above[parents[-1]]
        elif isinstance(at, dict):
            del at[last]
    except (KeyError, IndexError, TypeError):
        return


def number_words(
    *, whole: bool, low: float | None, high: float | None, above: bool = False, below: bool = False
) -> str:
    """What a number is to be, as in ``a number above 0 and at most 100``.

    Args:
        whole: no fractions.
        low, high: the ends, if there are such.
        above, below: the end itself is outside.
    """
    kind = "a whole number" if whole else "a number"
    if low is not None and high is not None and not (above or below):
        return f"{kind} from {low:.12g} to {high:.12g}"
    ends = [] if low is None else [f"{'above' if above else 'of at least'} {low:.12g}"]
    ends += [] if high is None else [f"{'below' if below else 'at most'} {high:.12g}"]
    return " ".join([kind, " and ".join(ends)]).strip()


_KINDS = {
    "string": "text in quotes",
    "bool": "true or false",
    "tuple": "a list in brackets",
    "list": "a list in brackets",
    "model": "a table",
    "dict": "a table",
}


def _expected(entry: Any, model: type[FileModel]) -> str | None:
    """What a value is to be, in our own words, with an example where the model has one; None where it is not known."""
    kind, facts = entry["type"], entry.get("ctx", {})
    schema = _schema_at(model, entry["loc"])
    if schema.get("type") in ("number", "integer") and not kind.endswith("_error"):
        low, high = (schema.get(name, schema.get(f"exclusive{name.capitalize()}")) for name in ("minimum", "maximum"))
        open_ends = {"above": "exclusiveMinimum" in schema, "below": "exclusiveMaximum" in schema}
        words = number_words(whole=schema["type"] == "integer", low=low, high=high, **open_ends)
    elif kind == "string_pattern_mismatch" and facts["pattern"] in _SPELLINGS:
        words = _SPELLINGS[facts["pattern"]]
    elif kind == "literal_error":
        words = str(facts["expected"])
    elif kind == "string_too_short":
        words = "text that is not empty" if facts["min_length"] == 1 else f"{facts['min_length']} characters or more"
    elif kind == "string_too_long":
        words = f"at most {facts['max_length']} characters"
    elif kind == "too_short":
        words = f"{facts['min_length']} or more of them"
    elif kind == "too_long":
        words = f"at most {facts['max_length']} of them"
    elif kind.endswith("_type") and (plain := kind.removesuffix("_type")) in _KINDS:
        words = _KINDS[plain]
    else:
        return None
    if examples := schema.get("examples"):
        return f"expected {words}, as in {json.dumps(examples[0])}"
    default = schema.get("default")
    return f"expected {words}" + ("" if default is None else f"; left out, it is {json.dumps(default)}")


def _schema_at(model: type[FileModel], location: tuple[int | str, ...]) -> dict[str, Any]:
    """The JSON schema of a place in a model; empty where none is found."""
    whole = model.model_json_schema()
    found: dict[str, Any] = whole
    for part in location:
        found = _plain(found, whole)
        inner = found.get("properties", {}).get(part) if isinstance(part, str) else found.get("items")
        if not isinstance(inner, dict):
            return {}
        found = inner
    return _plain(found, whole)


def _plain(schema: dict[str, Any], whole: dict[str, Any]) -> dict[str, Any]:
    """A schema without the detours of a reference, and of a value that may also be absent."""
    if "anyOf" in schema:
        kept = [one for one in schema["anyOf"] if one.get("type") != "null"]
        if len(kept) == 1:
            schema = {**kept[0], **{key: value for key, value in schema.items() if key != "anyOf"}}
    if "$ref" in schema:
        schema = {**whole["$defs"][schema["$ref"].rpartition("/")[2]], **schema}
    return schema


def _line(entry: Any, model: type[FileModel]) -> str:
    key = ""
    for part in entry["loc"]:
        key += f"[{part}]" if isinstance(part, int) else f".{part}" if key else part
    message = str(entry["msg"]).removeprefix("Value error, ")
    if entry["type"] == "extra_forbidden":
        return f"  {key}: unknown key; remove it or correct its spelling"
    if entry["type"] == "missing":
        return f"  {key}: missing; this key is required"
    message = _expected(entry, model) or message
    if entry["input"] is None and entry["type"] == "value_error":  # of a key that is not there
        return f"  {key}: {message}"
    found = repr(entry["input"])
    if len(found) > 80:
        found = found[:77] + "..."
    return f"  {key} = {found}: {message}"

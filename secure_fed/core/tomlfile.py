"""TOML files as pydantic models: every error of a file at once, each naming key, value and what is allowed."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any, TypeVar

import tomli_w
from pydantic import BaseModel, ConfigDict, ValidationError

from secure_fed.core.errors import SecfacmicError
from secure_fed.core.storage import write_durable


class FileModel(BaseModel):
    """A table of a file of ours: unknown keys and wrong types are errors, values never change."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


Model = TypeVar("Model", bound=FileModel)


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
        # JSON mode is strict about types but takes an array where a tuple is asked for.
        return model.model_validate_json(json.dumps(content, default=str))
    except ValidationError as error:
        lines = [_line(entry["loc"], entry) for entry in error.errors()]
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


def _line(location: tuple[int | str, ...], entry: Any) -> str:
    key = ""
    for part in location:
        key += f"[{part}]" if isinstance(part, int) else f".{part}" if key else part
    message = str(entry["msg"]).removeprefix("Value error, ")
    if entry["type"] == "extra_forbidden":
        return f"  {key}: unknown key; remove it or correct its spelling"
    if entry["type"] == "missing":
        return f"  {key}: missing; this key is required"
    found = repr(entry["input"])
    if len(found) > 80:
        found = found[:77] + "..."
    return f"  {key} = {found}: {message}"

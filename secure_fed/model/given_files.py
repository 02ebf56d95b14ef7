"""Files that somebody else wrote: read whole, recognised when they are something else, and checked key by key.

What a clone, a browser or a stick leaves in a file's place (a Git LFS pointer, a web page, half a link) is named as
such, whichever file it stands for.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from pydantic import ConfigDict

from secure_fed.core.errors import BackboneError
from secure_fed.core.tomlfile import FileModel, parse_table

AGAIN = "copy the folder again from where it came from"

_TENSORFLOWS = re.compile(r"\.ckpt(-\d+)?\.(data-\d+-of-\d+|index|meta)$|\.data-\d{5}-of-\d{5}$|^saved_model\.pb$")
"""Names of the files of a checkpoint of TensorFlow, or of a model that it saved."""

OTHER_FORMATS = {
    ".h5": "TensorFlow's weights",
    ".msgpack": "Flax's weights",
    ".onnx": "an ONNX model",
    ".gguf": "quantised weights in GGUF",
    ".npz": "a numpy archive",
    ".tflite": "a TensorFlow Lite model",
    ".keras": "Keras' weights",
    ".ot": "weights of Rust's PyTorch",
}
"""What files are that are not read, by the end of their names."""

_BEGINNINGS = (
    (re.compile(rb"\x89HDF"), OTHER_FORMATS[".h5"]),
    (re.compile(rb"GGUF"), OTHER_FORMATS[".gguf"]),
    (re.compile(rb"\x93NUMPY"), "a numpy array"),
    (re.compile(rb"\x08[\x01-\x1f]\x12"), OTHER_FORMATS[".onnx"]),  # the version, then the producer's name
    (re.compile(rb"([\x81-\x8f]|\xde..)([\xa1-\xbf]|\xd9.)[A-Za-z_]{2}", re.DOTALL), OTHER_FORMATS[".msgpack"]),
)
"""How such files begin; a map of names in MessagePack is Flax's."""


class Foreign(FileModel):
    """A table of somebody else's file: what is read of it is checked, other keys are passed over."""

    model_config = ConfigDict(extra="ignore")


Model = TypeVar("Model", bound=FileModel)


def lost_link(path: Path) -> bool:
    """Whether a file is what is left of a link: gone, or its target's name as text."""
    if path.is_symlink():
        return not path.exists()
    if not path.is_file() or path.stat().st_size > 400:
        return False
    return re.fullmatch(rb"(\.\./)+blobs/[0-9a-f]{40,64}\s*", path.read_bytes()) is not None


def refuse_others(path: Path, head: bytes, size: int, expected: str) -> None:
    """Refuse what stands in a file's place.

    Args:
        path: the file.
        head: its first bytes, some hundred.
        size: of the whole file, in bytes.
        expected: what it should be, in words.

    Raises:
        BackboneError: it is empty, a Git LFS pointer or a web page.
    """
    if size == 0:
        raise BackboneError(f"{path}: is empty; expected {expected}: copy or fetch the file again")
    if head.startswith(b"version https://git-lfs"):
        found = re.search(rb"size (\d{1,15})", head)
        of = f" of {megabytes(int(found[1]))}" if found else ""
        raise BackboneError(
            f"{path}: is a Git LFS pointer{of}, not {expected}; run git lfs pull where it was cloned, and copy it again"
        )
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")) or (start[:1] == b"<" and b"<html" in start):
        raise BackboneError(
            f"{path}: is a web page, not {expected}; fetch the file again by its download address, signed in if its "
            "publisher asks so"
        )


def other_kind(path: Path, head: bytes) -> str | None:
    """What a file is of those that are not read, by its beginning and its name; None of any other."""
    if is_tensorflows(path):
        return OTHER_FORMATS[".h5"]
    if path.name.startswith("openvino_"):
        return "an OpenVINO model"
    found = next((kind for beginning, kind in _BEGINNINGS if beginning.match(head)), None)
    return found or OTHER_FORMATS.get(path.suffix.lower())


def is_tensorflows(path: Path) -> bool:
    """Whether a file is of a checkpoint of TensorFlow, by its name."""
    return _TENSORFLOWS.search(path.name.lower()) is not None


def other_format(path: Path, kind: str) -> BackboneError:
    """What to say of weights of a kind that is not read."""
    return BackboneError(
        f"{path}: is {kind}, which is not read; expected safetensors or PyTorch weights of the same model: its "
        "publisher mostly offers them beside it"
    )


def read_bytes(path: Path, expected: str) -> bytes:
    """A small file's content.

    Raises:
        BackboneError: it cannot be read, or is something else.
    """
    if lost_link(path):
        raise BackboneError(
            f"{path}: only the link to it is here, which does not lead anywhere; expected {expected}: copy the folder "
            "with its links followed, as cp -rL does"
        )
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BackboneError(f"{path}: cannot be read ({error.strerror}); expected {expected}: {AGAIN}") from error
    refuse_others(path, content[:512], len(content), expected)
    return content


def read_text(path: Path, expected: str) -> str:
    """A small file's text; as :func:`read_bytes`, and refused also when it is not UTF-8."""
    try:
        return read_bytes(path, expected).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BackboneError(f"{path}: is not UTF-8 text; expected {expected}: {AGAIN}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The table that a JSON file holds.

    Raises:
        BackboneError: it cannot be read, is something else, no JSON, no table, or holds a number that is not finite.
    """
    text = read_text(path, "a JSON file")
    try:
        content = json.loads(text, parse_constant=_no_number, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise BackboneError(f"{path}: no whole JSON file ({reason[:120]}); {AGAIN}") from error
    if not isinstance(content, dict):
        raise BackboneError(f"{path}: holds no JSON object; {AGAIN}")
    return content


def checked(content: Any, model: type[Model], where: Path | str) -> Model:
    """What is read of a parsed table.

    Args:
        content: as JSON gives it.
        model: the keys that are read, with their types and ranges.
        where: the file, or a table in it, for messages.

    Raises:
        BackboneError: keys have another type or range, or are missing; with each.
    """
    if not isinstance(content, dict):
        raise BackboneError(f"{where}: found {str(content)[:60]!r}, expected a table; {AGAIN}")
    try:
        return parse_table(content, model, BackboneError, str(where))
    except BackboneError as error:
        raise BackboneError(f"{error}\n  {AGAIN}, or mend these keys") from None


def megabytes(size: int) -> str:
    """A file's size in words."""
    if size < 1000:
        return f"{size} bytes"
    return f"{size / 1e6:,.0f} MB" if size >= 1e7 else f"{size / 1e6:.3g} MB"


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON number")


def _finite(text: str) -> float:
    if not math.isfinite(found := float(text)):
        raise ValueError(f"{text[:20]} is too large a number")
    return found

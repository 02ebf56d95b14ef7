"""Tensors out of the files in which weights travel: safetensors, PyTorch's, OpenAI's archives, one or in shards.

Nothing of a file is ever run: pickles are read by torch's safe reader alone. Tensors are copied out of the file, so
that nobody who writes into it afterwards changes what was checked.
"""

from __future__ import annotations

import json
import os
import re
import struct
import zipfile
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from secure_fed.core.errors import BackboneError, StorageError
from secure_fed.core.storage import sync_folder

Tensors = dict[str, Tensor]

SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
"""Of files that are taken for weights in a folder."""

_WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "network", "module")
"""Where a training checkpoint keeps its weights, the likeliest first."""

_ARCHIVE_SIZES = ("input_resolution", "context_length", "vocab_size")
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_QUANTISED = re.compile(r"(\.SCB|\.qweight|\.qzeros|\.absmax|\.quant_map|quant_state\..*|\.weight_scale(_inv)?)$")
_OTHER_FORMATS = {
    ".h5": "TensorFlow's weights",
    ".msgpack": "Flax's weights",
    ".onnx": "an ONNX model",
    ".gguf": "quantised weights in GGUF",
    ".npz": "a numpy archive",
    ".tflite": "a TensorFlow Lite model",
}


def read_weights(path: Path) -> Tensors:
    """All tensors of a checkpoint, by the names that it gives them.

    Args:
        path: a file, or an index (``*.index.json``) of shards.

    Raises:
        BackboneError: it holds no weights, or not whole, or quantised ones, or code.
    """
    if path.name.endswith(".index.json"):
        return _read_shards(path)
    tensors = _read_file(path)
    for name, value in tensors.items():
        if _QUANTISED.search(name) or (value.is_floating_point() and value.dtype not in _FLOATS):
            found = str(value.dtype).removeprefix("torch.")
            raise BackboneError(
                f"{path}: quantised weights ({name}, {found}); expected float32, float16 or bfloat16, from which alone "
                "features are the model's own: get the weights before they were quantised"
            )
    return tensors


def is_archive(path: Path) -> bool:
    """Whether a file is a TorchScript archive, as OpenAI publishes CLIP."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError):
        return False


def write_weights(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as a safetensors file, one after the other, whole or not at all, and fsync it.

    Raises:
        StorageError: it cannot be written.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name in sorted(tensors):
        size = tensors[name].numel() * tensors[name].element_size()
        shape = list(tensors[name].shape)
        header[name] = {"dtype": _NAMES[tensors[name].dtype], "shape": shape, "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    temporary = path.with_name(f".{path.name}.new")
    try:
        with temporary.open("wb") as stream:
            stream.write(struct.pack("<Q", len(text)) + text)
            for name in sorted(tensors):
                value = tensors[name].detach().contiguous().reshape(-1).view(torch.uint8)
                stream.write(value.numpy().data)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise StorageError(f"{path}: not written ({error.strerror}); free space or choose another place") from error


def without_prefix(tensors: Tensors, anchors: Collection[str], where: Path | str) -> Tensors:
    """The tensors under the names that their model has, whatever a training program put before them.

    Args:
        tensors: of a checkpoint; ``_orig_mod.`` (torch.compile) may stand anywhere, and other prefixes, as ``module.``
            or Lightning's ``model.``, in front.
        anchors: names of the model that show where it begins.
        where: the file, for messages.

    Raises:
        BackboneError: the model is in it twice.
    """
    plain = {name.replace("_orig_mod.", ""): value for name, value in tensors.items()}
    wanted = set(anchors)
    tails = {anchor.rsplit(".", 2)[-1] for anchor in wanted}
    counts: Counter[str] = Counter()
    for name in plain:
        if name.rsplit(".", 1)[-1] not in tails:
            continue
        parts = name.split(".")
        for start in range(min(len(parts), 6)):
            if ".".join(parts[start:]) in wanted:
                counts[".".join(parts[:start])] += 1
                break
    if not counts:
        return plain
    ((prefix, most), *others) = counts.most_common()
    if others and others[0][1] == most:
        raise BackboneError(
            f"{where}: holds the model twice, under {prefix or '(nothing)'} and {others[0][0] or '(nothing)'}; "
            "expected one: save the one that is meant by itself"
        )
    return (
        {name[len(prefix) + 1 :]: value for name, value in plain.items() if name.startswith(f"{prefix}.")}
        if (prefix)
        else plain
    )


def lost_link(path: Path) -> bool:
    """Whether a file is what is left of a link: gone, or its target's name as text."""
    if path.is_symlink():
        return not path.exists()
    if not path.is_file() or path.stat().st_size > 400:
        return False
    return re.fullmatch(rb"(\.\./)+blobs/[0-9a-f]{40,64}\s*", path.read_bytes()) is not None


def _read_shards(path: Path) -> Tensors:
    try:
        names = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise BackboneError(f"{path}: no whole index of shards; copy the folder again from where it came from") from (
            error
        )
    if any(Path(name).name != name for name in names):
        raise BackboneError(f"{path}: names shards outside its folder; expected file names: copy the folder again")
    missing = [name for name in names if not (path.parent / name).is_file()]
    if missing:
        raise BackboneError(
            f"{path}: names {len(names)} shards, but {', '.join(missing)} is not beside it; copy the whole folder again"
        )
    found: Tensors = {}
    for name in names:
        found |= read_weights(path.parent / name)
    return found


def _read_file(path: Path) -> Tensors:
    if lost_link(path):
        raise BackboneError(
            f"{path}: only the link to the weights is here, which does not lead anywhere; expected the file itself: "
            "copy the folder with its links followed, as cp -rL does"
        )
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            head = stream.read(512)
    except OSError as error:
        raise BackboneError(f"{path}: no such file, or not readable ({error.strerror}); expected weights there") from (
            error
        )
    _refuse_others(path, head, size)
    if head[:2] == b"PK":
        return _read_zip(path, size)
    if head[:1] == b"\x80":
        return _read_pickle(path, False)
    (length,) = struct.unpack("<Q", head[:8].ljust(8, b"\0"))
    if head[8:9] == b"{" and length < 1 << 28:
        return _read_safetensors(path, size)
    raise BackboneError(
        f"{path}: {_megabytes(size)} that are neither safetensors nor PyTorch's; expected weights: copy or fetch the "
        "file again"
    )


def _refuse_others(path: Path, head: bytes, size: int) -> None:
    again = "fetch the file again"
    if size == 0:
        raise BackboneError(f"{path}: is empty; expected weights: copy or {again}")
    if head.startswith(b"version https://git-lfs"):
        found = re.search(rb"size (\d+)", head)
        of = f" of {_megabytes(int(found[1]))}" if found else ""
        raise BackboneError(
            f"{path}: is a Git LFS pointer{of}, not the weights; run git lfs pull where it was cloned, and copy "
            "it again"
        )
    start = head.lstrip().lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise BackboneError(
            f"{path}: is a web page, not weights; {again} by its download address, signed in if its publisher asks so"
        )
    if head.startswith(b"\x89HDF"):
        kind = _OTHER_FORMATS[".h5"]
    elif head.startswith(b"GGUF"):
        kind = _OTHER_FORMATS[".gguf"]
    else:
        kind = _OTHER_FORMATS.get(path.suffix.lower(), "")
    if kind:
        raise BackboneError(
            f"{path}: is {kind}, which is not read; expected safetensors or PyTorch weights of the same model: its "
            "publisher mostly offers them beside it"
        )


def _read_safetensors(path: Path, size: int) -> Tensors:
    """Tensors of a safetensors file, read one by one: a mapped file would count twice, and could change."""
    with path.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            entries = {
                name: (_DTYPES[entry["dtype"]], entry["shape"], *entry["data_offsets"])
                for name, entry in header.items()
            }
            end = 8 + length + max((entry[3] for entry in entries.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if 8 + length > size:
                raise BackboneError(f"{path}: ends within its header; copy or fetch the file again") from error
            raise BackboneError(
                f"{path}: its header is no safetensors header ({' '.join(str(error).split())[:100]}); copy or fetch "
                "the file again"
            ) from error
        if size < end:
            raise BackboneError(
                f"{path}: ends after {_megabytes(size)} of {_megabytes(end)}; copy or fetch the file again"
            )
        return {
            name: _read_tensor(stream, path, 8 + length + begin, stop - begin, dtype, shape)
            for name, (dtype, shape, begin, stop) in sorted(entries.items(), key=lambda entry: entry[1][2])
        }


def _read_tensor(stream: BinaryIO, path: Path, place: int, size: int, dtype: torch.dtype, shape: list[int]) -> Tensor:
    values = torch.empty(shape, dtype=dtype)
    if values.numel() * values.element_size() != size or size < 0:
        raise BackboneError(f"{path}: a tensor of shape {shape} takes {size} bytes; copy or fetch the file again")
    if size:
        stream.seek(place)
        stream.readinto(values.reshape(-1).view(torch.uint8).numpy().data)  # type: ignore[attr-defined]
    return values


def _read_zip(path: Path, size: int) -> Tensors:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError) as error:
        raise BackboneError(
            f"{path}: ends after {_megabytes(size)}, before its table of contents; copy or fetch the file again"
        ) from error
    if is_archive(path):
        try:
            state = torch.jit.load(path, map_location="cpu").state_dict()  # type: ignore[no-untyped-call]
        except (RuntimeError, ValueError) as error:
            raise _unreadable(path, error) from error
        return {name: value.clone() for name, value in state.items() if name not in _ARCHIVE_SIZES}
    if not any(name.endswith("data.pkl") for name in names):
        raise BackboneError(
            f"{path}: a zip archive without PyTorch weights in it; unpack it, and give the checkpoint or the folder"
        )
    return _read_pickle(path, True)


def _read_pickle(path: Path, mapped: bool) -> Tensors:
    import pickle

    scalars = [
        np._core.multiarray.scalar,  # type: ignore[attr-defined]
        np._core.multiarray._reconstruct,  # type: ignore[attr-defined]
        (np._core.multiarray.scalar, "numpy.core.multiarray.scalar"),  # type: ignore[attr-defined]
        (np._core.multiarray._reconstruct, "numpy.core.multiarray._reconstruct"),  # type: ignore[attr-defined]
        np.dtype,
        np.ndarray,
        *(type(np.dtype(code)) for code in "?bhilqBHILQefdU"),
    ]
    try:
        with torch.serialization.safe_globals(scalars):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise _holds_code(path, error) from error
    except Exception as error:  # damaged archives raise of every kind
        raise _unreadable(path, error) from error
    tables = _tables(content)
    if not tables:
        raise BackboneError(
            f"{path}: holds no tensors by name; expected a checkpoint with a state_dict: save the model's state_dict()"
        )
    found = next((tables[name] for name in ("", *_WRAPPERS) if name in tables), None)
    if found is None:
        if len(tables) > 1:
            raise BackboneError(
                f"{path}: holds several sets of weights, {', '.join(sorted(tables))}; expected one, as state_dict: "
                "save the one that is meant by itself"
            )
        (found,) = tables.values()
    # Copied out of the mapped file, one after the other.
    return {name: found[name].detach().clone(memory_format=torch.contiguous_format) for name in list(found)}


def _tables(content: Any, name: str = "", depth: int = 0) -> dict[str, Tensors]:
    """Tables of tensors in what a training program saved, by the key that they lie under."""
    if not isinstance(content, Mapping):
        return {}
    tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    if len(tensors) > 1 or (tensors and len(content) == 1):
        return {name: tensors}
    found: dict[str, Tensors] = {}
    for key, value in content.items():
        if depth < 2 and str(key) not in ("optimizer", "optimizer_states", "optimizer_state_dict", "scaler", "loops"):
            found |= _tables(value, str(key), depth + 1)
    return found


def _holds_code(path: Path, error: Exception) -> BackboneError:
    """torch's own message advises to run what the file holds, and is not repeated."""
    named = re.search(
        r"(?:GLOBAL|Unsupported global|class|type)\s*:?\s*(?:GLOBAL )?([A-Za-z_][\w.]+\.[\w]+)", str(error)
    )
    what = f"{named[1]} besides tensors" if named else "more than tensors"
    target = path.with_suffix(".safetensors").name
    return BackboneError(
        f"{path}: holds {what}, which could run code when it is read, so that it is not read; expected tensors alone. "
        "On a machine that you trust with this file, these lines make safetensors of it:\n"
        "  import pickle, torch, safetensors.torch\n"
        f"  found = torch.load({path.name!r}, map_location='cpu', pickle_module=pickle)\n"
        "  found = found.get('state_dict', found.get('model_state_dict', found.get('model', found)))\n"
        f"  safetensors.torch.save_file({{k: v.clone() for k, v in found.items() if torch.is_tensor(v)}}, {target!r})"
    )


def _unreadable(path: Path, error: Exception) -> BackboneError:
    reason = " ".join(str(error).split())
    shown = "" if "weights_only" in reason else f" ({reason[:120]})"
    return BackboneError(f"{path}: is damaged or cut off{shown}; copy or fetch the file again")


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f} MB" if size >= 1e7 else f"{size / 1e6:.3g} MB"

"""Safetensors files: written whole or not at all, read tensor by tensor, with each byte accounted for."""

from __future__ import annotations

import json
import math
import re
import struct
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from secure_fed.core.errors import BackboneError
from secure_fed.core.storage import durable
from secure_fed.model.checkpoint_parts import Tensors, quantised
from secure_fed.model.given_files import megabytes

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
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "C64": torch.complex64,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_FEW_BITS = re.compile(r"[FIU][1-8](_|$)")
"""Types of eight bits and fewer, of which the format gets more from year to year."""

_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def write_weights(path: Path, tensors: Mapping[str, Tensor], halved: bool = False) -> None:
    """Write tensors as a safetensors file, one after the other, whole or not at all, and fsync it.

    Args:
        path: the file.
        tensors: by name.
        halved: write those in float16 that it holds without a change, as the values of OpenAI's archives; each is
            turned when it is written, so that no second copy of all is held.

    Raises:
        StorageError: it cannot be written.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    dtypes = {name: torch.float16 if halved and _fits_half(value) else value.dtype for name, value in tensors.items()}
    place = 0
    for name in sorted(tensors):
        size = tensors[name].numel() * dtypes[name].itemsize
        shape = list(tensors[name].shape)
        header[name] = {"dtype": _NAMES[dtypes[name]], "shape": shape, "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with durable(path) as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for name in sorted(tensors):
            value = tensors[name].detach().to(dtypes[name]).contiguous().reshape(-1).view(torch.uint8)
            stream.write(value.numpy().data)


def _fits_half(value: Tensor) -> bool:
    return value.dtype == torch.float32 and torch.equal(value.half().float(), value)


def read_safetensors(path: Path, size: int) -> Tensors:
    """Tensors of a safetensors file, read one by one: a mapped file would count twice, and could change."""
    with path.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        try:
            header = json.loads(stream.read(length), object_pairs_hook=_once)
            header.pop("__metadata__", None)
            few = ((name, entry["dtype"]) for name, entry in header.items() if _FEW_BITS.match(entry["dtype"]))
            if found := next((one for one in few if one[1] not in _DTYPES), None):
                raise quantised(path, *found)
            entries = {name: _entry(name, entry) for name, entry in header.items()}
            end = 8 + length + max((entry[3] for entry in entries.values()), default=0)
            if size >= end:
                _refuse_gaps(entries, size - 8 - length)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            if 8 + length > size:
                raise BackboneError(f"{path}: ends within its header; copy or fetch the file again") from error
            raise BackboneError(
                f"{path}: its header is no safetensors header ({' '.join(str(error).split())[:100]}); copy or fetch "
                "the file again"
            ) from error
        if size < end:
            raise BackboneError(
                f"{path}: ends after {megabytes(size)} of {megabytes(end)} ({end - size:,} bytes are missing); copy or "
                "fetch the file again"
            )
        return {
            name: _read_tensor(stream, 8 + length + begin, dtype, shape)
            for name, (dtype, shape, begin, _) in sorted(entries.items(), key=lambda entry: entry[1][2])
        }


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of two values under one name, readers differ in which they take."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"{twice} stands in it twice")
    return found


def _refuse_gaps(entries: Mapping[str, tuple[torch.dtype, list[int], int, int]], size: int) -> None:
    """Each byte after the header is of exactly one tensor, as the format says; else it is not known what is meant."""
    place = 0
    for name, (_, _, begin, stop) in sorted(entries.items(), key=lambda entry: entry[1][2:]):
        if begin != place:
            what = f"begins within the one before, at {begin}" if begin < place else f"leaves a hole before {begin}"
            raise ValueError(f"{name} {what} where {place} was expected")
        place = stop
    if size != place:
        raise ValueError(f"{size - place:,} bytes follow its last tensor")


def _entry(name: str, entry: dict[str, Any]) -> tuple[torch.dtype, list[int], int, int]:
    dtype, shape, (begin, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype not in _DTYPES:
        raise ValueError(f"{name}: values of type {dtype}")
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, stop)):
        raise ValueError(f"{name}: sizes that are no numbers")
    if math.prod(shape) * _DTYPES[dtype].itemsize != stop - begin:
        raise ValueError(f"{name}: shape {shape} does not take {stop - begin} bytes")
    return _DTYPES[dtype], shape, begin, stop


def _read_tensor(stream: BinaryIO, place: int, dtype: torch.dtype, shape: list[int]) -> Tensor:
    values = torch.empty(shape, dtype=dtype)
    if values.numel():
        stream.seek(place)
        stream.readinto(values.reshape(-1).view(torch.uint8).numpy().data)  # type: ignore[attr-defined]
    return values

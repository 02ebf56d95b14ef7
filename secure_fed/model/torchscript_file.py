"""TorchScript archives, as OpenAI publishes CLIP, read as data: tensors by name, and none of their code is compiled.

TorchScript's own loader runs what an archive says: a ``__setstate__``, the default of an argument and the value of a
constant, each of which may write files. Here the pickle of its modules goes to torch's safe reader, with its classes
replaced by empty ones; which of a module's tensors are its parameters and buffers, the text of its class lists. Where
it has no such list, as in archives of old, all are.
"""

from __future__ import annotations

import re
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from shutil import copyfileobj
from typing import Any

import torch
from torch import Tensor

from secure_fed.core.errors import BackboneError

ARCHIVE_SIZES = ("input_resolution", "context_length", "vocab_size")
"""What OpenAI's archives hold beside weights, and files that were made of them."""

_MOST_CODE = 1 << 26
"""Bytes of an archive's code; OpenAI's have less than a hundredth of them."""

_MOST_MODULES = 1 << 16
"""Modules in an archive; one that lies in many, or in itself, is counted each time."""

_CLASS = re.compile(r"^class (\w+)\(Module\):\n((?:  __.*\n)*)", re.MULTILINE)
_LIST = re.compile(r"^  __(parameters|buffers)__ = \[(.*)\]$", re.MULTILINE)


def is_archive(path: Path) -> bool:
    """Whether a file is a TorchScript archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError):
        return False


def is_openais(path: Path) -> bool:
    """Whether a TorchScript archive is one of OpenAI's, which have QuickGELU and hold their sizes as tensors."""
    if not is_archive(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            table = next((archive.read(name) for name in archive.namelist() if name.endswith("/data.pkl")), b"")
    except (zipfile.BadZipFile, zlib.error, OSError):  # the load says how it is damaged
        return False
    return all(name.encode() in table for name in ARCHIVE_SIZES)


def read_archive(path: Path) -> dict[str, Tensor]:
    """Parameters and buffers of an archive's module, by the names that its ``state_dict()`` would have.

    Raises:
        BackboneError: it says otherwise than by its modules' attributes what it holds.
        Exception: of any kind, where it is damaged.
    """
    with tempfile.TemporaryDirectory(prefix="secfacmic-") as folder, zipfile.ZipFile(path) as archive:
        copied = Path(folder) / "tensors.pt"
        lists = _copy_tensors(path, archive, copied)
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(copied)
        classes = {name: _stub(lists.get(name)) for name in unknown if name.startswith("__torch__.")}
        others = [(_nothing, name) for name in unknown if name.startswith("torch.jit._pickle.")]
        with torch.serialization.safe_globals([*((kind, name) for name, kind in classes.items()), *others]):
            top = torch.load(copied, map_location="cpu", weights_only=True)
        return dict(_tensors_of(path, top))


def _copy_tensors(path: Path, archive: zipfile.ZipFile, to: Path) -> dict[str, frozenset[str]]:
    """Copy an archive without its code; what lists of parameters and buffers say, by class."""
    lists: dict[str, frozenset[str]] = {}
    code = 0
    with zipfile.ZipFile(to, "w", zipfile.ZIP_STORED) as copied:
        for entry in archive.infolist():
            inner = entry.filename.partition("/")[2]
            if inner.startswith("code/") and inner.endswith(".py"):
                code += entry.file_size
                if code > _MOST_CODE:
                    raise BackboneError(
                        f"{path}: a TorchScript archive with more than {_MOST_CODE >> 20} MiB of code; expected one of "
                        "tensors, as OpenAI's are: save the model's state_dict()"
                    )
                module = inner.removeprefix("code/").removesuffix(".py").replace("/", ".")
                for name, head in _CLASS.findall(archive.read(entry).decode("utf-8", "replace")):
                    listed = dict(_LIST.findall(head))
                    if "buffers" in listed:
                        lists[f"{module}.{name}"] = frozenset(re.findall(r'"([^"]+)"', ",".join(listed.values())))
            elif inner in ("data.pkl", "byteorder", "version", ".data/version") or inner.startswith("data/"):
                if entry.compress_type != zipfile.ZIP_STORED:
                    raise BackboneError(
                        f"{path}: a TorchScript archive whose tensors are packed, as torch never does; expected its "
                        "file as it was saved: get it again"
                    )
                with archive.open(entry) as source, copied.open(f"archive/{inner}", "w", force_zip64=True) as target:
                    copyfileobj(source, target, 1 << 20)
    return lists


class _Module:
    """What is left of a module: its attributes."""

    listed: frozenset[str] | None = None
    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _stub(listed: frozenset[str] | None) -> type[_Module]:
    return type("_Module", (_Module,), {"listed": listed})


def _nothing(*_: Any) -> None:
    """In the place of lists and tables of an archive, which hold no weights."""


def _tensors_of(path: Path, top: Any) -> Iterator[tuple[str, Tensor]]:
    waiting: list[tuple[str, Any]] = [("", top)]
    count = 0
    while waiting:
        prefix, module = waiting.pop(0)
        count += 1
        if not isinstance(module, _Module) or not isinstance(module.state, dict) or count > _MOST_MODULES:
            raise BackboneError(
                f"{path}: a TorchScript archive that says by code of its own what it holds, which is not run; expected "
                "one of tensors alone, as OpenAI's are: save the model's state_dict()"
            )
        for name, value in module.state.items():
            if isinstance(value, Tensor) and (module.listed is None or name in module.listed):
                yield f"{prefix}{name}", value
            elif isinstance(value, _Module):
                waiting.append((f"{prefix}{name}.", value))

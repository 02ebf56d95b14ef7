"""PyTorch's files, pickled or zipped, TorchScript's archives among them: tensors alone, and no code is run."""

from __future__ import annotations

import pickle
import re
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from secure_fed.core.errors import BackboneError
from secure_fed.model.checkpoint_parts import WRAPPERS, Tensors, quantised, tables_in, the_weights, type_of
from secure_fed.model.given_files import OTHER_FORMATS, megabytes, other_format
from secure_fed.model.torchscript_file import ARCHIVE_SIZES, is_archive, read_archive


def read_zip(path: Path, size: int, beside: list[str] | None) -> Tensors:
    """The model's tensors in a zip archive, PyTorch's or TorchScript's.

    Args:
        path: the file.
        size: of it, in bytes.
        beside: is given the names of tensors in other tables, as :func:`~secure_fed.model.weights.read_weights` does.

    Raises:
        BackboneError: it holds none, or more than tensors, or is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError) as error:
        raise BackboneError(
            f"{path}: ends after {megabytes(size)}, before its table of contents; copy or fetch the file again"
        ) from error
    _refuse_flipped(path)
    if is_archive(path):
        try:
            with _in_our_words():
                state = read_archive(path)
        except BackboneError:
            raise
        except OSError as error:
            raise BackboneError(
                f"{path}: cannot be unpacked into {tempfile.gettempdir()} ({error.strerror or error}); expected room "
                "there for a copy of it: make some, or name another folder by TMPDIR"
            ) from error
        except pickle.UnpicklingError as error:
            raise _holds_code(path, error) from error
        except Exception as error:  # damaged archives raise of every kind
            raise _unreadable(path, error) from error
        return {name: _plain(path, name, state.pop(name)) for name in list(state) if name not in ARCHIVE_SIZES}
    if names and all(name.endswith(".npy") for name in names):
        raise other_format(path, OTHER_FORMATS[".npz"])
    if not any(name.endswith("data.pkl") for name in names):
        raise BackboneError(
            f"{path}: a zip archive without PyTorch weights in it; unpack it, and give the checkpoint or the folder"
        )
    return read_pickle(path, True, beside)


def _refuse_flipped(path: Path) -> None:
    """Refuse an archive that lost bits on the way: its records have checksums, which torch does not look at.

    Where none is right, ``torch.save`` was told to leave them out.
    """
    with zipfile.ZipFile(path) as archive:
        records = [one for one in archive.infolist() if one.file_size]
        broken = [one.filename for one in records if not _is_whole(archive, one)]
    if 0 < len(broken) < len(records):
        raise BackboneError(
            f"{path}: is damaged: {len(broken)} of its {len(records)} records are not what their checksums say "
            f"({broken[0]}); copy or fetch the file again"
        )


def _is_whole(archive: zipfile.ZipFile, record: zipfile.ZipInfo) -> bool:
    try:
        with archive.open(record) as stream:
            while stream.read(1 << 20):
                pass
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError):  # of another packing, say
        return False
    return True


def read_pickle(path: Path, mapped: bool, beside: list[str] | None) -> Tensors:
    """The model's tensors in what ``torch.save`` wrote.

    Args:
        path: the file.
        mapped: whether it can be mapped into memory, as zip archives can.
        beside: as for :func:`read_zip`.

    Raises:
        BackboneError: it holds none, or more than tensors, or is damaged.
    """
    import pickletools

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
        with _in_our_words(), torch.serialization.safe_globals(scalars):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
            tables = tables_in(content)
            for place, table in tables.items():
                for name, value in table.items():
                    if value.is_quantized:
                        raise quantised(path, f"{place}.{name}" if place else name, type_of(value))
            found = the_weights(path, tables, beside)
            # Copied out of the mapped file, one after the other.
            return {name: _plain(path, name, found[name]) for name in list(found)}
    except BackboneError:
        raise
    except pickle.UnpicklingError as error:
        operand = re.search(r"Unsupported operand (\d+)", str(error))
        if operand is None:
            raise _holds_code(path, error) from error
        protocol = next((one.proto for one in pickletools.opcodes if one.code == chr(int(operand[1]))), None)
        if protocol is None:
            raise _unreadable(path, error) from error
        raise _other_pickle(path, protocol) from error
    except Exception as error:  # damaged archives raise of every kind
        raise _unreadable(path, error) from error


@contextmanager
def _in_our_words() -> Iterator[None]:
    """What torch warns of while it reads is nothing that people can act on; what matters, our messages say."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _plain(path: Path, name: str, value: Tensor) -> Tensor:
    if value.is_meta or value.layout != torch.strided:
        raise BackboneError(
            f"{path}: {name} is a tensor {'without values' if value.is_meta else 'in a sparse form'}; expected whole "
            "ones: save the model's state_dict() again"
        )
    return value.detach().clone(memory_format=torch.contiguous_format)


def _holds_code(path: Path, error: Exception) -> BackboneError:
    """torch's own message advises to run what the file holds, and is not repeated."""
    named = re.search(
        r"(?:GLOBAL|Unsupported global|class|type)\s*:?\s*(?:GLOBAL )?([A-Za-z_][\w.]+\.[\w]+)", str(error)
    )
    what = f"{named[1]} besides tensors" if named else "more than tensors"
    return BackboneError(
        f"{path}: holds {what}, which could run code when it is read, so that it is not read; expected tensors alone. "
        f"{_lines_for(path)}"
    )


def _other_pickle(path: Path, protocol: int) -> BackboneError:
    return BackboneError(
        f"{path}: is written in pickle protocol {protocol}{' or newer' if protocol > 2 else ''}, of which torch's safe "
        "reader, by which alone checkpoints are read here, knows not all; expected protocol 2 or 3, or safetensors. "
        f"{_lines_for(path)}"
    )


def _lines_for(path: Path) -> str:
    target = path.with_suffix(".safetensors").name
    return (
        "On a machine that you trust with this file, these lines make safetensors of it:\n"
        "  import pickle, torch, safetensors.torch\n"
        f"  found = torch.load({path.name!r}, map_location='cpu', pickle_module=pickle)\n"
        f"  for key in {WRAPPERS}:\n"
        "      found = found[key] if isinstance(found, dict) and key in found else found\n"
        "  found = found.state_dict() if isinstance(found, torch.nn.Module) else found\n"
        "  found = {k: v.contiguous().clone() for k, v in found.items() if torch.is_tensor(v)}\n"
        f"  safetensors.torch.save_file(found, {target!r})"
    )


def _unreadable(path: Path, error: Exception) -> BackboneError:
    reason = " ".join(str(error).split())
    shown = "" if not reason or "weights_only" in reason else f" ({reason[:120]})"
    return BackboneError(f"{path}: is damaged or cut off{shown}; copy or fetch the file again")

"""Tensors out of the files in which weights travel: safetensors, PyTorch's, OpenAI's archives, one or in shards.

Nothing of a file is ever run: pickles are read by torch's safe reader alone. Tensors are copied out of the file, so
that nobody who writes into it afterwards changes what was checked.
"""

from __future__ import annotations

import json
import math
import re
import struct
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from secure_fed.core.errors import BackboneError
from secure_fed.core.storage import durable
from secure_fed.model.given_files import Foreign, checked, lost_link, megabytes, read_json, refuse_others

Tensors = dict[str, Tensor]

SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
"""Of files that are taken for weights in a folder."""

_WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "network", "module")
"""Where a training checkpoint keeps its weights, the likeliest first."""

_MOST_CODE = 1 << 26
"""Bytes of a file of code in a TorchScript archive; OpenAI's have less than a hundredth of them."""

ARCHIVE_SIZES = ("input_resolution", "context_length", "vocab_size")
"""What OpenAI's archives hold beside weights, and files that were made of them."""

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
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
WRAPPER = re.compile(r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_fpw_module|_checkpoint_wrapped_module)\.")
"""What torch's wrappers put into names, anywhere: ``torch.compile``, FSDP (its older name too), checkpointing."""

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_QUANTISED = re.compile(r"(\.SCB|\.qweight|\.qzeros|\.absmax|\.quant_map|quant_state\..*|\.weight_scale(_inv)?)$")
_ADAPTERS = re.compile(r"(^|\.)(lora_|ia3_l|hada_w|lokr_w|b?oft_|vera_lambda|base_layer\.|prompt_embeddings$)")
_TENSORFLOWS = re.compile(r"\.ckpt(-\d+)?\.(data-\d+-of-\d+|index|meta)$|\.data-\d{5}-of-\d{5}$|^saved_model\.pb$")
"""Names of the files of a checkpoint of TensorFlow, or of a model that it saved."""

_OTHER_FORMATS = {
    ".h5": "TensorFlow's weights",
    ".msgpack": "Flax's weights",
    ".onnx": "an ONNX model",
    ".gguf": "quantised weights in GGUF",
    ".npz": "a numpy archive",
    ".tflite": "a TensorFlow Lite model",
}


def read_weights(path: Path, beside: list[str] | None = None) -> Tensors:
    """All tensors of a checkpoint, by the names that it gives them.

    Args:
        path: a file, or an index (``*.index.json``) of shards.
        beside: is given the names of tensors that lie in tables of their own beside the model's, copies of it apart.

    Raises:
        BackboneError: it holds no weights, or not whole, or quantised ones, or an adapter's, or code.
    """
    if path.name.endswith(".index.json"):
        return _read_shards(path, beside)
    tensors = _read_file(path, beside)
    if any(_ADAPTERS.search(name) for name in tensors):
        raise adapter_alone(path)
    for name, value in tensors.items():
        if _QUANTISED.search(name) or (value.is_floating_point() and value.dtype not in _FLOATS):
            raise BackboneError(
                f"{path}: quantised weights ({name}, {type_of(value)}); expected float32, float16 or bfloat16, from "
                "which alone features are the model's own: get the weights before they were quantised"
            )
    return tensors


def type_of(value: Tensor) -> str:
    """The type of a tensor's values, in a word."""
    return str(value.dtype).removeprefix("torch.")


class _Adapter(Foreign):
    """``adapter_config.json`` of PEFT."""

    base_model_name_or_path: str | None = None


def adapter_alone(path: Path) -> BackboneError:
    """What to say of weights that only change a model's: their base model, and the lines that merge the two."""
    folder = path if path.is_dir() else path.parent
    config = folder / "adapter_config.json"
    stated = checked(read_json(config), _Adapter, config) if config.is_file() else _Adapter()
    base = stated.base_model_name_or_path
    of = f" of {base}" if base else ""
    lacking = "" if base else ", and no adapter_config.json beside it names its base model (BASE)"
    base = base or "BASE"
    return BackboneError(
        f"{path}: a PEFT adapter{of}, not a whole model{lacking}; expected the two merged. Where both are, these lines "
        "do it:\n"
        "  from peft import PeftModel; from transformers import AutoModel, AutoProcessor\n"
        f"  PeftModel.from_pretrained(AutoModel.from_pretrained({base!r}), {str(folder)!r}).merge_and_unload()"
        ".save_pretrained('merged')\n"
        f"  AutoProcessor.from_pretrained({base!r}).save_pretrained('merged')"
    )


def is_archive(path: Path) -> bool:
    """Whether a file is a TorchScript archive, as OpenAI publishes CLIP."""
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


def without_prefix(
    tensors: Tensors, anchors: Mapping[str, tuple[int, ...] | None], where: Path | str
) -> tuple[Tensors, list[str]]:
    """The tensors under the names that their model has, whatever a training program put before them.

    Args:
        tensors: of a checkpoint; what is of :data:`WRAPPER` may stand anywhere, and other prefixes, as ``module.`` or
            Lightning's ``model.``, in front.
        anchors: names of the model that show where it begins, and their shapes, so that a teacher of another size
            beside it is passed over; None where any shape will do.
        where: the file, for messages.

    Returns:
        The model's tensors, and the names of what lies beside them, equal copies of them apart.

    Raises:
        BackboneError: the model is in it twice, or a part of it with other values beside the whole.
    """
    plain: Tensors = {}
    for name, value in tensors.items():
        short = WRAPPER.sub("", name)
        if short in plain and not _equal(plain[short], value):
            wrapper = next(
                found[0] for one in tensors if WRAPPER.sub("", one) == short and (found := WRAPPER.search(one))
            )
            raise BackboneError(
                f"{where}: holds {short} twice with other values, with and without {wrapper}; expected one model: "
                "save the one that is meant by itself"
            )
        plain[short] = value
    tails = {anchor.rsplit(".", 2)[-1] for anchor in anchors}
    counts: Counter[str] = Counter()
    fitting: Counter[str] = Counter()
    for name, value in plain.items():
        if name.rsplit(".", 1)[-1] not in tails:
            continue
        parts = name.split(".")
        for start in range(min(len(parts), 6)):
            anchor = ".".join(parts[start:])
            if anchor in anchors:
                prefix = ".".join(parts[:start])
                counts[prefix] += 1
                fitting[prefix] += anchors[anchor] in (None, tuple(value.shape))
                break
    counts = +fitting or counts  # where no shape fits, the load will say so
    if not counts:
        return plain, []
    ((prefix, most), *others) = counts.most_common()
    if others and 2 * others[0][1] > most and _differ(plain, prefix, others[0][0]):
        raise _twice(where, "the model", prefix, others[0][0])
    if not prefix:
        copies = tuple(f"{other}." for other, _ in others)
        return {name: value for name, value in plain.items() if not _is_copy(plain, name, copies)}, []
    model: Tensors = {name[len(prefix) + 1 :]: value for name, value in plain.items() if name.startswith(f"{prefix}.")}
    second: dict[str, list[tuple[Tensor, Tensor]]] = {}
    beside: list[str] = []
    for name, value in plain.items():
        if name.startswith(f"{prefix}."):
            continue
        words = name.split(".")
        tail = next((one for start in range(len(words)) if (one := ".".join(words[start:])) in model), None)
        if tail is not None:
            second.setdefault(name.removesuffix(tail).rstrip("."), []).append((model[tail], value))
        if tail is None or not _equal(model[tail], value):
            beside.append(name)
    for other, pairs in second.items():
        # One tensor of another shape, and it is another model, such as a teacher.
        if all(one.shape == value.shape for one, value in pairs) and any(
            value.ndim and not torch.equal(one, value) for one, value in pairs
        ):
            raise _twice(where, "a part of the model", prefix, other)
    return model, beside


def _twice(where: Path | str, what: str, prefix: str, other: str) -> BackboneError:
    return BackboneError(
        f"{where}: holds {what} twice, under {prefix or '(nothing)'} and {other or '(nothing)'}, "
        "with other values; expected one: save the one that is meant by itself"
    )


def _is_copy(tensors: Tensors, name: str, prefixes: tuple[str, ...]) -> bool:
    """Whether a tensor stands under one of the prefixes and, with the same values, without it."""
    starts = [start for start in prefixes if name.startswith(start)]
    return any(
        (own := tensors.get(name.removeprefix(start))) is not None and _equal(own, tensors[name]) for start in starts
    )


class _Index(Foreign):
    """``*.index.json``: of each tensor the shard that holds it."""

    weight_map: dict[str, str]


def shards_of(index: Path) -> list[str]:
    """Names of the files that an index of shards lists.

    Raises:
        BackboneError: it is malformed, or lists something else than weights beside it.
    """
    names = sorted(set(checked(read_json(index), _Index, index).weight_map.values()))
    strange = [name for name in names if Path(name).name != name or Path(name).suffix.lower() not in SUFFIXES]
    if strange or not names:
        found = f"names {strange[0][:60]!r}" if strange else "names no shard"
        raise BackboneError(
            f"{index}: {found}; expected names of weights beside it, {' or '.join(SUFFIXES)}: copy the folder again"
        )
    return names


def _equal(first: Tensor, second: Tensor) -> bool:
    return (first.shape, first.dtype) == (second.shape, second.dtype) and torch.equal(first, second)


def _differ(tensors: Tensors, first: str, second: str) -> bool:
    """Whether what lies under two prefixes has other values."""
    starts = [f"{prefix}." if prefix else "" for prefix in (first, second)]
    pairs = [
        (value, tensors[starts[0] + name.removeprefix(starts[1])])
        for name, value in tensors.items()
        if name.startswith(starts[1]) and starts[0] + name.removeprefix(starts[1]) in tensors
    ]
    return any(not torch.equal(one, other) for one, other in pairs)


def _read_shards(path: Path, beside: list[str] | None) -> Tensors:
    names = shards_of(path)
    missing = [name for name in names if not (path.parent / name).is_file()]
    if missing:
        raise BackboneError(
            f"{path}: names {len(names)} shards, but {', '.join(missing)} is not beside it; copy the whole folder again"
        )
    found: Tensors = {}
    for name in names:
        shard = read_weights(path.parent / name, beside)
        if twice := [key for key in shard if key in found and not torch.equal(shard[key], found[key])]:
            raise BackboneError(
                f"{path}: {len(twice)} tensors are in two shards with other values ({twice[0]}); expected shards of "
                "one model: copy the whole folder again"
            )
        found |= shard
    return found


def _read_file(path: Path, beside: list[str] | None) -> Tensors:
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
        return _read_zip(path, size, beside)
    if head[:1] == b"\x80":
        return _read_pickle(path, False, beside)
    (length,) = struct.unpack("<Q", head[:8].ljust(8, b"\0"))
    if head[8:9] == b"{" and length < 1 << 28:
        return _read_safetensors(path, size)
    raise BackboneError(
        f"{path}: {megabytes(size)} that are neither safetensors nor PyTorch's; expected weights: copy or fetch the "
        "file again"
    )


def _refuse_others(path: Path, head: bytes, size: int) -> None:
    refuse_others(path, head, size, "weights")
    if head.startswith(b"\x89HDF"):
        kind = _OTHER_FORMATS[".h5"]
    elif head.startswith(b"GGUF"):
        kind = _OTHER_FORMATS[".gguf"]
    elif head.startswith(b"\x93NUMPY"):
        kind = "a numpy array"
    elif is_tensorflows(path):
        kind = _OTHER_FORMATS[".h5"]
    else:
        kind = _OTHER_FORMATS.get(path.suffix.lower(), "")
    if kind:
        raise _other_format(path, kind)


def is_tensorflows(path: Path) -> bool:
    """Whether a file is of a checkpoint of TensorFlow, by its name."""
    return _TENSORFLOWS.search(path.name.lower()) is not None


def _other_format(path: Path, kind: str) -> BackboneError:
    return BackboneError(
        f"{path}: is {kind}, which is not read; expected safetensors or PyTorch weights of the same model: its "
        "publisher mostly offers them beside it"
    )


def _read_safetensors(path: Path, size: int) -> Tensors:
    """Tensors of a safetensors file, read one by one: a mapped file would count twice, and could change."""
    with path.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        try:
            header = json.loads(stream.read(length), object_pairs_hook=_once)
            header.pop("__metadata__", None)
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


def _read_zip(path: Path, size: int, beside: list[str] | None) -> Tensors:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError) as error:
        raise BackboneError(
            f"{path}: ends after {megabytes(size)}, before its table of contents; copy or fetch the file again"
        ) from error
    if is_archive(path):
        try:
            runs = _runs_code(path)
            if runs is not None:
                raise BackboneError(
                    f"{path}: a TorchScript archive with code that runs when it is loaded ({runs}), so that it is not "
                    "loaded; expected one of tensors alone, as OpenAI's are: save the model's state_dict()"
                )
            with _in_our_words():
                state = torch.jit.load(path, map_location="cpu").state_dict()  # type: ignore[no-untyped-call]
        except BackboneError:
            raise
        except Exception as error:  # damaged archives raise of every kind
            raise _unreadable(path, error) from error
        return {name: value.clone() for name, value in state.items() if name not in ARCHIVE_SIZES}
    if names and all(name.endswith(".npy") for name in names):
        raise _other_format(path, _OTHER_FORMATS[".npz"])
    if not any(name.endswith("data.pkl") for name in names):
        raise BackboneError(
            f"{path}: a zip archive without PyTorch weights in it; unpack it, and give the checkpoint or the folder"
        )
    return _read_pickle(path, True, beside)


def _runs_code(path: Path) -> str | None:
    """Which file of a TorchScript archive has a method that its loader would call; all others run only when asked."""
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():  # each by itself: two may bear one name
            if "/code/" not in entry.filename.lower():  # the loader finds them in either case
                continue
            if entry.file_size > _MOST_CODE or b"__setstate__" in archive.read(entry):
                return entry.filename
    return None


def _read_pickle(path: Path, mapped: bool, beside: list[str] | None) -> Tensors:
    import pickle
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
            tables = _tables(content)
            found = _the_weights(path, tables, beside)
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


def _the_weights(path: Path, tables: Mapping[str, Tensors], beside: list[str] | None) -> Tensors:
    """Of all tables of tensors in a file, the model's; the names in the others are added to ``beside``."""
    named = {name: table for name, table in tables.items() if not any(key.isdecimal() for key in table)}
    if not named:
        raise BackboneError(
            f"{path}: holds no tensors by name; expected a checkpoint with a state_dict: save the model's state_dict()"
        )
    usual = [name for name in named if not name or set(name.split(".")) <= set(_WRAPPERS)]
    if usual:
        chosen = min(usual, key=lambda name: [_WRAPPERS.index(part) for part in name.split(".") if part])
    elif len(named) == 1:
        (chosen,) = named
    else:
        raise BackboneError(
            f"{path}: holds several sets of weights, {', '.join(sorted(named))}; expected one, as state_dict: "
            "save the one that is meant by itself"
        )
    found = named[chosen]
    for name, table in tables.items():
        if name != chosen and _is_second(found, table):
            raise BackboneError(
                f"{path}: holds two sets of weights of one model that differ, {chosen or 'its own'} and {name} (as a "
                "training keeps averages beside the last ones); expected one: save the one that is meant by itself, "
                "as state_dict"
            )
    if beside is not None:
        plain = {_unwrapped(name): value for name, value in found.items()}
        beside += [
            f"{table}.{name}"
            for table in tables
            if table != chosen
            for name, value in tables[table].items()
            if (own := plain.get(_unwrapped(name))) is None or not _equal(own, value)
        ]
    return found


def _is_second(found: Tensors, other: Tensors) -> bool:
    """Whether another table is of the same model, most of its shapes among it or its very names, with other values."""
    plain, others = ({_unwrapped(name): one for name, one in table.items()} for table in (found, other))
    both = [(value, others[name]) for name, value in plain.items() if name in others and value.ndim]
    if any(first.shape == second.shape and not torch.equal(first, second) for first, second in both):
        return True  # as a part that was trained, beside the whole before
    shapes, more = (Counter(tuple(one.shape) for one in table.values()) for table in (found, other))
    if 2 * (shapes & more).total() < len(found):
        return False
    same = [name for name in plain if name in others]
    return len(same) < len(others) or any(not torch.equal(plain[name], others[name]) for name in same)


def _unwrapped(name: str) -> str:
    return WRAPPER.sub("", name).removeprefix("module.")


def _plain(path: Path, name: str, value: Tensor) -> Tensor:
    if value.is_quantized:
        raise BackboneError(
            f"{path}: quantised weights ({name}, {type_of(value)}); expected float32, float16 "
            "or bfloat16: get the weights before they were quantised"
        )
    if value.is_meta or value.layout != torch.strided:
        raise BackboneError(
            f"{path}: {name} is a tensor {'without values' if value.is_meta else 'in a sparse form'}; expected whole "
            "ones: save the model's state_dict() again"
        )
    return value.detach().clone(memory_format=torch.contiguous_format)


def _tables(content: Any, name: str = "", depth: int = 0) -> dict[str, Tensors]:
    """Tables of tensors in what a training program saved, by the keys that they lie under; of lists by number."""
    if isinstance(content, list | tuple):
        content = {str(number): value for number, value in enumerate(content)}
    if not isinstance(content, Mapping):
        return {}
    tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    if len(tensors) > 1 or (tensors and len(content) == 1):
        return {name: tensors}
    found: dict[str, Tensors] = {}
    for key, value in content.items():
        if depth < 2 and str(key) not in ("optimizer", "optimizer_states", "optimizer_state_dict", "scaler", "loops"):
            found |= _tables(value, f"{name}.{key}" if name else str(key), depth + 1)
    return found


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
        f"  for key in {_WRAPPERS}:\n"
        "      found = found[key] if isinstance(found, dict) and key in found else found\n"
        "  found = found.state_dict() if isinstance(found, torch.nn.Module) else found\n"
        "  found = {k: v.contiguous().clone() for k, v in found.items() if torch.is_tensor(v)}\n"
        f"  safetensors.torch.save_file(found, {target!r})"
    )


def _unreadable(path: Path, error: Exception) -> BackboneError:
    reason = " ".join(str(error).split())
    shown = "" if not reason or "weights_only" in reason else f" ({reason[:120]})"
    return BackboneError(f"{path}: is damaged or cut off{shown}; copy or fetch the file again")

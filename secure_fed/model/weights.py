"""Tensors out of the files in which weights travel: safetensors, PyTorch's, OpenAI's archives, one or in shards.

Nothing of a file is ever run: pickles are read by torch's safe reader alone. Tensors are copied out of the file, so
that nobody who writes into it afterwards changes what was checked.
"""

from __future__ import annotations

import re
import struct
from pathlib import Path

import torch

from secure_fed.core.errors import BackboneError
from secure_fed.model.checkpoint_parts import Tensors, quantised, type_of
from secure_fed.model.given_files import (
    Foreign,
    checked,
    lost_link,
    megabytes,
    other_format,
    other_kind,
    read_json,
    refuse_others,
)
from secure_fed.model.pytorch_file import read_pickle, read_zip
from secure_fed.model.safetensors_file import read_safetensors

SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
"""Of files that are taken for weights in a folder."""

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_QUANTISED = re.compile(
    r"(\.SCB|\.q(weight|zeros)|\.g_idx|\.(nested_)?absmax|\.quant_map|\.quant_state\..*"
    r"|\.weight_(packed|scale|zero_point|shape|global_scale)(_\w+)?|\.\w*(fc\d|proj|weight)_(blocks|scales))$"
)
"""Names that quantising libraries give to what they put in a weight's place."""

_ADAPTERS = re.compile(
    r"(^|\.)(lora_|ia3_l|hada_w|lokr_w|b?oft_|vera_lambda|base_layer\.|modules_to_save\.|prompt_embeddings$)"
)


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
            raise quantised(path, name, type_of(value))
    return tensors


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
    refuse_others(path, head, size, "weights")
    if (kind := other_kind(path, head)) is not None:
        raise other_format(path, kind)
    if head[:2] == b"PK":
        return read_zip(path, size, beside)
    if head[:1] == b"\x80":
        return read_pickle(path, False, beside)
    (length,) = struct.unpack("<Q", head[:8].ljust(8, b"\0"))
    if head[8:9] == b"{" and length < 1 << 28:
        return read_safetensors(path, size)
    raise BackboneError(
        f"{path}: {megabytes(size)} that are neither safetensors nor PyTorch's; expected weights: copy or fetch the "
        "file again"
    )

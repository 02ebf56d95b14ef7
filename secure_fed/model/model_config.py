"""open_clip's configuration of a model, as ``open_clip_config.json`` has it, each key with its type and range.

The keys are those of the open_clip that is installed, with its types; ranges are given here for those that decide about
sizes, so that nothing absurd is built.
"""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import Field, create_model

from secure_fed.core.errors import BackboneError
from secure_fed.core.tomlfile import FileModel
from secure_fed.model.given_files import checked

OURS = "secfacmic"
"""Key of a model's configuration for what open_clip's own keys cannot say: activation and epsilon of each tower, sizes
of a trunk, and how a tokenizer is used."""

Size = Annotated[int, Field(ge=1, le=1 << 16)]
Layers = Annotated[int, Field(ge=1, le=1000)]
Vocabulary = Annotated[int, Field(ge=1, le=1 << 23)]
Context = Annotated[int, Field(ge=2, le=4096)]
Epsilon = Annotated[float, Field(gt=0, lt=1)]
Ratio = Annotated[float, Field(gt=0, le=100)]
Token = Annotated[int, Field(ge=0, le=1 << 23)]
_Norm = dict[str, bool | Epsilon] | None


class Rules(FileModel):
    """How a tokenizer is used; as :class:`secure_fed.model.tokenizer.FileTokens` takes it."""

    pad: str
    clean: Literal["none", "whitespace", "lower", "canonicalize", "siglip", "siglip_cased"]
    without: str | None = None


class _Trunk(FileModel):
    img_size: Size
    patch_size: Size
    embed_dim: Size
    depth: Layers
    num_heads: Size
    mlp_ratio: Ratio


class _Tower(FileModel):
    activation: Literal["gelu", "gelu_tanh", "quickgelu"]
    eps: Epsilon | None = None
    trunk: _Trunk | None = None


class _Ours(FileModel):
    vision: _Tower | None = None
    text: _Tower | None = None
    tokenizer: Rules | None = None


def check_model_config(config: Any, where: Path | str) -> dict[str, Any]:
    """A configuration that open_clip may be asked to build.

    Args:
        config: the ``model_cfg`` of a file.
        where: the file, for messages.

    Returns:
        The same without what is null and would be without it too: libraries ask whether a key is there.

    Raises:
        BackboneError: a key is unknown, missing, or of another type or range; or it names a model of a hub.
    """
    checked(config, _models(), where)
    vision, text = config["vision_cfg"], config["text_cfg"]
    if isinstance(pool := vision.get("attentional_pool"), str):
        raise BackboneError(
            f"{where}: attentional_pool = {pool!r}, by which open_clip makes a table of features of an image, which no "
            "text can be compared with; expected true or false: choose another model"
        )
    size = vision.get("image_size")
    if isinstance(size, list) and size[0] != size[1]:
        raise BackboneError(
            f"{where}: images of {size[0]} x {size[1]} pixels; expected a square: towers of another shape are not read"
        )
    if "timm_model_name" not in vision and isinstance(vision.get("layers", 12), int):
        width, head = vision.get("width") or 768, vision.get("head_width") or 64
        _refuse_heads(where, "vision_cfg", width, head, "a head's width of")
    if not text.get("hf_model_name"):
        _refuse_heads(where, "text_cfg", text.get("width") or 512, text.get("heads") or 8, "heads,")
    return _without_nulls(config)


_NULL_MEANS = ("hf_proj_type", "patch_size", "timm_pool", "timm_proj")
"""Keys whose null is written and says something else than their absence: no projection, pooling or patches."""


def _without_nulls(table: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_nulls(value) if isinstance(value, dict) else value
        for key, value in table.items()
        if value is not None or key in _NULL_MEANS
    }


def _refuse_heads(where: Path | str, table: str, width: int, parts: int, what: str) -> None:
    if width % parts:
        raise BackboneError(
            f"{where}: {table} has {what} {parts}, which does not divide the width {width}; copy the folder again"
        )


@cache
def _models() -> Any:
    from open_clip.coca_model import MultimodalCfg
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg

    sizes: dict[str, Any] = {"width": Size, "layers": Layers, "mlp_ratio": Ratio, "norm_kwargs": _Norm}
    sizes |= {"attn_pooler_queries": Size, "attn_pooler_heads": Size, "ls_init_value": float}
    image = Annotated[int, Field(ge=1, le=8192)]
    vision: dict[str, Any] = sizes | {
        "layers": Layers | Annotated[list[Layers], Field(min_length=4, max_length=4)],
        "head_width": Size,
        "patch_size": Size,
        "attentional_pool": bool | Literal["parallel", "cascade"],
        "image_size": image | tuple[image, image],
        "patch_dropout": Annotated[float, Field(ge=0, lt=1)],
        "timm_model_name": Annotated[str, Field(pattern=r"^[\w.]+$")],
    }
    text: dict[str, Any] = sizes | {
        "context_length": Context,
        "vocab_size": Vocabulary,
        "heads": Size,
        "pad_id": Token,
        "eos_id": Token,
        "tokenizer_kwargs": dict[str, Any],
    }
    many = text | {"dim_head": Size, "n_queries": Size}
    return create_model(
        "model_cfg",
        __base__=FileModel,
        embed_dim=(Size, ...),
        vision_cfg=(_as_model(CLIPVisionCfg, vision), ...),
        text_cfg=(_as_model(CLIPTextCfg, text), ...),
        multimodal_cfg=(_as_model(MultimodalCfg, many) | None, None),
        quick_gelu=(bool, False),
        custom_text=(bool, False),
        init_logit_scale=(float | None, None),
        init_logit_bias=(float | None, None),
        nonscalar_logit_scale=(bool, False),
        pad_id=(Token, 0),
        secfacmic=(_Ours | None, None),
    )


def _as_model(table: type[Any], ranges: dict[str, Any]) -> Any:
    """A model of the keys of one of open_clip's dataclasses; null is only what is null where nothing is said."""
    hints = get_type_hints(table)
    fields: dict[str, Any] = {}
    for one in dataclasses.fields(table):
        kind = ranges.get(one.name, hints[one.name])
        fields[one.name] = (kind | None if one.default is None or one.name in _NULL_MEANS else kind, None)
    return create_model(table.__name__, __base__=FileModel, **fields)

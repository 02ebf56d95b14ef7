"""Models in transformers' form, ``clip`` and ``siglip``, as open_clip builds, names and prepares them.

A strict load proves shapes only: activation, heads, epsilon and the end of text stand in ``config.json`` alone, and how
an image is prepared in ``preprocessor_config.json``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, PlainValidator, TypeAdapter, ValidationError
from torch import Tensor

from secure_fed.core.errors import BackboneError
from secure_fed.core.tomlfile import FileModel
from secure_fed.model.given_files import AGAIN, Foreign, checked
from secure_fed.model.model_config import OURS, Context, Epsilon, Layers, Size, Token, Vocabulary

_ACTIVATIONS = {
    "quick_gelu": "quickgelu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}


class _Tower(Foreign):
    """What ``config.json`` says of both kinds of tower; what it leaves out is transformers' default, a null is not."""

    hidden_size: Size = 768
    intermediate_size: Size = 3072
    num_hidden_layers: Layers = 12
    num_attention_heads: Size = 12
    hidden_act: str = "quick_gelu"
    layer_norm_eps: Epsilon = 1e-5

    @property
    def mlp_ratio(self) -> float:
        """By which open_clip and timm, which cut off the fraction, come to the inner width."""
        ratio = self.intermediate_size / self.hidden_size
        exact = int(self.hidden_size * ratio) == self.intermediate_size
        return ratio if exact else (self.intermediate_size + 0.5) / self.hidden_size


class _ClipText(_Tower):
    model_type: Literal["clip_text_model", "clip"] | None = "clip_text_model"
    hidden_size: Size = 512
    intermediate_size: Size = 2048
    num_attention_heads: Size = 8
    max_position_embeddings: Context = 77
    vocab_size: Vocabulary = 49408
    eos_token_id: Token = 49407


class _ClipVision(_Tower):
    model_type: Literal["clip_vision_model", "clip"] | None = "clip_vision_model"
    image_size: Size = 224
    patch_size: Size = 32
    num_channels: Literal[3] = 3


class _SiglipText(_Tower):
    model_type: Literal["siglip_text_model", "siglip"] | None = "siglip_text_model"
    max_position_embeddings: Context = 64
    vocab_size: Vocabulary = 32000
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: Epsilon = 1e-6
    projection_size: Size | None = None


class _SiglipVision(_Tower):
    model_type: Literal["siglip_vision_model", "siglip"] | None = "siglip_vision_model"
    image_size: Size = 224
    patch_size: Size = 16
    num_channels: Literal[3] = 3
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: Epsilon = 1e-6
    vision_use_head: bool = True


class _Whole(Foreign):
    """Old files of CLIP have a second table of each tower, which holds with all that it leaves out at its default."""

    text_config: dict[str, Any] = Field(default_factory=dict)
    text_config_dict: dict[str, Any] | None = None
    vision_config: dict[str, Any] = Field(default_factory=dict)
    vision_config_dict: dict[str, Any] | None = None
    projection_dim: Size = 512


class _Square(FileModel):
    height: Size
    width: Size


class _Shortest(FileModel):
    shortest_edge: Size


def _edges_given(value: Any) -> Any:
    """A size as transformers writes it: one number, height and width, or the short edge."""
    kinds: list[Any] = [Size, _Square, _Shortest, Annotated[list[Size], Field(min_length=2, max_length=2)]]
    for kind in kinds:
        try:
            return TypeAdapter(kind).validate_python(value, strict=True)
        except ValidationError:
            continue
    raise ValueError("expected a number, height and width, or shortest_edge")


_Edges = Annotated[Any, PlainValidator(_edges_given)]
_Three = Annotated[list[float], Field(min_length=3, max_length=3)]


class _Preparing(FileModel):
    """``preprocessor_config.json`` of an image processor; a key that is not here may change what the model sees."""

    do_resize: bool = True
    do_rescale: bool = True
    do_normalize: bool = True
    do_center_crop: bool | None = None
    do_pad: bool = False
    rescale_factor: Annotated[float, Field(gt=0, le=1)] = 1 / 255
    resample: int = 3
    size: _Edges | None = None
    crop_size: _Edges | None = None
    image_mean: _Three | None = None
    image_std: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=3, max_length=3)] | None = None
    default_to_square: bool = False
    image_processor_type: str = ""
    feature_extractor_type: str = ""


_WITHOUT_EFFECT = (
    "_valid_processor_keys",
    "crop_pct",
    "data_format",
    "device",
    "disable_grouping",
    "do_convert_rgb",
    "image_seq_length",
    "input_data_format",
    "pad_size",
    "processor_class",
    "return_tensors",
    "transformers_version",
)
"""Keys that image processors write and that change nothing for a picture in RGB."""

_LEGACY_END = 2
"""``eos_token_id`` of configurations before May 2023: the end is then the highest token of a row."""

_LAYER = re.compile(r"(text_model|vision_model)\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")


def model_config(content: Mapping[str, Any], where: str) -> dict[str, Any]:
    """open_clip's configuration of a ``config.json`` with ``model_type`` ``clip`` or ``siglip``.

    Raises:
        BackboneError: it is none that open_clip can build.
    """
    clip = content["model_type"] == "clip"
    needed = {key: content[key] for key in ("projection_dim",) if clip and key in content}
    whole = checked(_stated(content) | needed, _Whole, where)
    second = (whole.text_config_dict, whole.vision_config_dict) if clip else (None, None)
    text: Any = _tower(whole.text_config, second[0], _ClipText if clip else _SiglipText, f"{where}, text")
    vision: Any = _tower(whole.vision_config, second[1], _ClipVision if clip else _SiglipVision, f"{where}, vision")
    for tower in (text, vision):
        if tower.hidden_act not in _ACTIVATIONS:
            raise BackboneError(
                f"{where}: hidden_act {tower.hidden_act!r}; expected one of {', '.join(_ACTIVATIONS)}: this model's "
                "features cannot be computed here"
            )
        if tower.hidden_size % tower.num_attention_heads:
            raise BackboneError(
                f"{where}: {tower.num_attention_heads} heads do not divide a width of {tower.hidden_size}; copy "
                "the folder again"
            )
    if vision.image_size < vision.patch_size:
        raise BackboneError(
            f"{where}: patches of {vision.patch_size} pixels, but images of {vision.image_size}; copy the folder again"
        )
    ours: dict[str, Any] = {
        name: {"activation": _ACTIVATIONS[tower.hidden_act], "eps": float(tower.layer_norm_eps)}
        for name, tower in (("text", text), ("vision", vision))
    }
    text_cfg = {
        "context_length": text.max_position_embeddings,
        "vocab_size": text.vocab_size,
        "width": text.hidden_size,
        "heads": text.num_attention_heads,
        "layers": text.num_hidden_layers,
        "mlp_ratio": text.mlp_ratio,
    }
    if clip:
        end = text.eos_token_id
        if end not in (_LEGACY_END, text.vocab_size - 1):
            text_cfg |= {"pool_type": "eos", "eos_id": end}
        return {
            "embed_dim": whole.projection_dim,
            "quick_gelu": ours["text"]["activation"] == ours["vision"]["activation"] == "quickgelu",
            "vision_cfg": {
                "image_size": vision.image_size,
                "layers": vision.num_hidden_layers,
                "width": vision.hidden_size,
                "head_width": vision.hidden_size // vision.num_attention_heads,
                "mlp_ratio": vision.mlp_ratio,
                "patch_size": vision.patch_size,
            },
            "text_cfg": text_cfg,
            OURS: ours,
        }
    if not vision.vision_use_head:
        raise BackboneError(f"{where}: a SigLIP without its pooling head has no image feature; expected a whole one")
    width = text.projection_size or text.hidden_size
    if width != vision.hidden_size:
        raise BackboneError(
            f"{where}: towers of different widths, images {vision.hidden_size} and texts {width}; expected one "
            "space for both: copy the folder again"
        )
    ours["vision"]["trunk"] = {
        "img_size": vision.image_size,
        "patch_size": vision.patch_size,
        "embed_dim": vision.hidden_size,
        "depth": vision.num_hidden_layers,
        "num_heads": vision.num_attention_heads,
        "mlp_ratio": vision.mlp_ratio,
    }
    return {
        "embed_dim": width,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {
            "image_size": vision.image_size,
            "timm_model_name": "vit_base_patch16_siglip_224",
            "timm_pool": "map",
            "timm_proj": "none",
        },
        "text_cfg": text_cfg | {"no_causal_mask": True, "proj_bias": True, "pool_type": "last"},
        OURS: ours,
    }


def anchors(config: Mapping[str, Any]) -> dict[str, tuple[int, ...] | None]:
    """Names by which a model in transformers' form is found in a checkpoint, and their shapes; None for any.

    Args:
        config: as :func:`model_config` gives it.
    """
    trunk = config[OURS]["vision"].get("trunk")
    width = config["vision_cfg"]["width"] if trunk is None else trunk["embed_dim"]
    return {
        "text_model.final_layer_norm.weight": (config["text_cfg"]["width"],),
        "vision_model.post_layernorm.weight": (width,),
        "logit_scale": None,
    }


def convert(kind: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under open_clip's names; those that it has none for keep theirs, so that a strict load tells of them.

    Args:
        kind: ``clip`` or ``siglip``.
        tensors: by transformers' names; is emptied, so that no tensor is held twice.
    """
    found: dict[str, Tensor] = {}
    joined: dict[str, dict[str, Tensor]] = {}
    for name in sorted(tensors):
        value = tensors.pop(name)
        if name.endswith("embeddings.position_ids"):
            continue
        layer = _LAYER.fullmatch(name)
        if layer is None:
            found |= _outer(kind, name, value)
            continue
        tower, number, part, leaf = layer.groups()
        trunk = kind == "siglip" and tower == "vision_model"
        start = _blocks(kind, tower) + f".{number}."
        if part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
            target = f"{start}attn.qkv.{leaf}" if trunk else f"{start}attn.in_proj_{leaf}"
            joined.setdefault(target, {})[part[10]] = value
            if len(joined[target]) == 3:
                parts = joined.pop(target)
                found[target] = torch.cat([parts["q"], parts["k"], parts["v"]])
        else:
            found[f"{start}{_PARTS[trunk].get(part, part)}.{leaf}"] = value
    for target, parts in joined.items():  # some are missing: the load will say so
        found |= {f"{target}.{key}": value for key, value in parts.items()}
    return found


def preprocessing(content: Mapping[str, Any], size: int, kind: str, where: str) -> dict[str, Any]:
    """What ``preprocessor_config.json`` says happens to an image, in open_clip's words.

    Args:
        content: the file's.
        size: side of the square that the model takes.
        kind: ``clip`` or ``siglip``, for what the file leaves out.
        where: the file, for messages.

    Raises:
        BackboneError: it says something else than resizing, cutting out the middle, and normalising.
    """
    if "auto_map" in content:
        raise BackboneError(
            f"{where}: comes with code of its own (auto_map), which is never run; expected a model whose images "
            "transformers' own processors prepare"
        )
    # A step that is null is left out; what a step needs has no other null than that of an older version's default.
    steps = {key: False for key, value in content.items() if value is None and key.startswith("do_")}
    for key in ("size", "image_mean", "image_std", "resample", "rescale_factor"):
        if key in content and content[key] is None:
            raise _null(where, key)
    table = {key: value for key, value in (_stated(content) | steps).items() if key not in _WITHOUT_EFFECT}
    how = checked(table, _Preparing, where)
    maker = how.image_processor_type or how.feature_extractor_type or f"{kind}imageprocessor"
    found = re.fullmatch(r"(siglip|clip)(imageprocessor(fast|pil)?|featureextractor)", maker.lower())
    family = found and found[1]
    if family is None:
        raise BackboneError(
            f"{where}: images are prepared by {maker[:60]!r}, which is not read; expected CLIP's or SigLIP's way"
        )
    clip = family == "clip"
    for key in ("do_resize", "do_rescale", "do_normalize"):
        if not getattr(how, key):
            raise BackboneError(f"{where}: {key} = false; expected images that are resized and normalised here")
    if abs(how.rescale_factor * 255 - 1) > 1e-6:
        raise BackboneError(f"{where}: rescale_factor {how.rescale_factor}; expected 1/255")
    if how.do_pad:
        raise BackboneError(f"{where}: do_pad = true; expected images that are cut or squashed, not padded")
    if how.resample not in _FILTERS:
        raise BackboneError(f"{where}: resample {how.resample!r}; expected a filter of Pillow, 0 to 5")
    cuts = clip if how.do_center_crop is None else how.do_center_crop
    usual = _Shortest(shortest_edge=_USUAL) if clip else _Square(height=_USUAL, width=_USUAL)
    short, square = _edges(how.size or usual, not how.default_to_square)
    if cuts and "crop_size" in content and how.crop_size is None:
        raise _null(where, "crop_size")
    cut = _edges(how.crop_size or _USUAL, False)[1] if cuts else None
    if cuts and cut is None:
        raise BackboneError(f"{where}: crop_size {content['crop_size']}; expected height and width")
    if square is None and cut is None:
        raise BackboneError(f"{where}: images keep their shape and are not cut; expected a square at the end")
    final = cut or square
    if final != (size, size):
        raise BackboneError(
            f"{where}: images become {final[0]} x {final[1]}, but the model takes {size} x {size}; "  # type: ignore[index]
            "copy the folder again from where it came from"
        )
    least = min(square) if square is not None else short or 0
    if least < size:
        raise BackboneError(
            f"{where}: images are made {least} pixels wide and then cut to {size}; expected at least {size}: {AGAIN}"
        )
    means, stds = _MEANS[family]
    return {
        "size": [size, size],
        "mode": "RGB",
        "mean": [float(value) for value in how.image_mean or means],
        "std": [float(value) for value in how.image_std or stds],
        "interpolation": _FILTERS[how.resample],
        "resize_mode": "squash" if square is not None else "shortest",
        "resize_to": list(square) if square is not None else short,
        "cut": "floor",
    }


def _null(where: str, key: str) -> BackboneError:
    return BackboneError(
        f"{where}: {key} is null, and versions of transformers differ in what that means; expected a value, or no "
        "such key"
    )


_USUAL = 224
"""Pixels a side that transformers takes where a file does not say."""

_FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
_MEANS = {
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "siglip": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
_PARTS = {
    False: {
        "self_attn.out_proj": "attn.out_proj",
        "layer_norm1": "ln_1",
        "layer_norm2": "ln_2",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
    },
    True: {"self_attn.out_proj": "attn.proj", "layer_norm1": "norm1", "layer_norm2": "norm2"},
}
_CLIP = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
    "text_projection.weight": "text_projection",
    "visual_projection.weight": "visual.proj",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm.weight": "visual.ln_pre.weight",
    "vision_model.pre_layrnorm.bias": "visual.ln_pre.bias",
    "vision_model.post_layernorm.weight": "visual.ln_post.weight",
    "vision_model.post_layernorm.bias": "visual.ln_post.bias",
}
_POOL = "visual.trunk.attn_pool."
_SIGLIP = {
    **{name: f"text.{to}" for name, to in _CLIP.items() if name.startswith("text_model.")},
    "text_model.head.weight": "text.text_projection.weight",
    "text_model.head.bias": "text.text_projection.bias",
    "vision_model.embeddings.patch_embedding.weight": "visual.trunk.patch_embed.proj.weight",
    "vision_model.embeddings.patch_embedding.bias": "visual.trunk.patch_embed.proj.bias",
    "vision_model.embeddings.position_embedding.weight": "visual.trunk.pos_embed",
    "vision_model.post_layernorm.weight": "visual.trunk.norm.weight",
    "vision_model.post_layernorm.bias": "visual.trunk.norm.bias",
    "vision_model.head.probe": f"{_POOL}latent",
    **{
        f"vision_model.head.{theirs}.{leaf}": f"{_POOL}{ours}.{leaf}"
        for theirs, ours in (
            ("attention.out_proj", "proj"),
            ("layernorm", "norm"),
            ("mlp.fc1", "mlp.fc1"),
            ("mlp.fc2", "mlp.fc2"),
        )
        for leaf in ("weight", "bias")
    },
}


def _outer(kind: str, name: str, value: Tensor) -> dict[str, Tensor]:
    """What lies outside the layers of the towers."""
    if kind == "clip":
        target = _CLIP.get(name, name)
        return {target: value.T.contiguous() if target in ("text_projection", "visual.proj") else value}
    if name in ("vision_model.head.attention.in_proj_weight", "vision_model.head.attention.in_proj_bias"):
        leaf, width = name.rsplit("_", 1)[1], len(value) // 3
        return {f"{_POOL}q.{leaf}": value[:width].clone(), f"{_POOL}kv.{leaf}": value[width:].clone()}
    target = _SIGLIP.get(name, name)
    return {target: value[None] if target == "visual.trunk.pos_embed" else value}


def _blocks(kind: str, tower: str) -> str:
    if tower == "text_model":
        return "transformer.resblocks" if kind == "clip" else "text.transformer.resblocks"
    return "visual.transformer.resblocks" if kind == "clip" else "visual.trunk.blocks"


def _tower(given: dict[str, Any], second: dict[str, Any] | None, table: type[_Tower], where: str) -> _Tower:
    return checked(given if second is None else second, table, where)


def _stated(content: Mapping[str, Any]) -> dict[str, Any]:
    """Without what is null, for keys of which that is the default."""
    return {key: value for key, value in content.items() if value is not None}


def _edges(given: Any, shortest: bool) -> tuple[int | None, tuple[int, int] | None]:
    """A size as transformers writes it: the short edge, or height and width."""
    if isinstance(given, int):
        return (given, None) if shortest else (None, (given, given))
    if isinstance(given, _Shortest):
        return given.shortest_edge, None
    if isinstance(given, _Square):
        return None, (given.height, given.width)
    return None, (given[0], given[1])

"""Models in transformers' form, ``clip`` and ``siglip``, as open_clip builds, names and prepares them.

A strict load proves shapes only: activation, heads, epsilon and the end of text stand in ``config.json`` alone, and how
an image is prepared in ``preprocessor_config.json``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from secure_fed.core.errors import BackboneError

OURS = "secfacmic"
"""Key of a model's configuration for what open_clip's own keys cannot say: activation and epsilon of each tower, sizes
of a trunk, and how an image is cut."""

_ACTIVATIONS = {
    "quick_gelu": "quickgelu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
}
_CLIP_TEXT = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "vocab_size": 49408,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "eos_token_id": 49407,
}
_CLIP_VISION = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "num_channels": 3,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
_SIGLIP_TEXT = _CLIP_TEXT | {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "max_position_embeddings": 64,
    "vocab_size": 32000,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
_SIGLIP_VISION = _CLIP_VISION | {"patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
_LEGACY_END = 2
"""``eos_token_id`` of configurations before May 2023: the end is then the highest token of a row."""

_LAYER = re.compile(r"(text_model|vision_model)\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")


def model_config(content: Mapping[str, Any], where: str) -> dict[str, Any]:
    """open_clip's configuration of a ``config.json`` with ``model_type`` ``clip`` or ``siglip``.

    Raises:
        BackboneError: it is none that open_clip can build.
    """
    kind = content["model_type"]
    text, vision = _tower(content, "text", kind), _tower(content, "vision", kind)
    for tower in (text, vision):
        if tower["hidden_act"] not in _ACTIVATIONS:
            raise BackboneError(
                f"{where}: hidden_act {tower['hidden_act']!r}; expected one of {', '.join(_ACTIVATIONS)}: this model's "
                "features cannot be computed here"
            )
        if tower["hidden_size"] % tower["num_attention_heads"]:
            raise BackboneError(
                f"{where}: {tower['num_attention_heads']} heads do not divide a width of {tower['hidden_size']}; copy "
                "the folder again"
            )
    ours: dict[str, Any] = {
        name: {"activation": _ACTIVATIONS[tower["hidden_act"]], "eps": float(tower["layer_norm_eps"])}
        for name, tower in (("text", text), ("vision", vision))
    }
    text_cfg = {
        "context_length": text["max_position_embeddings"],
        "vocab_size": text["vocab_size"],
        "width": text["hidden_size"],
        "heads": text["num_attention_heads"],
        "layers": text["num_hidden_layers"],
        "mlp_ratio": _ratio(text),
    }
    if kind == "clip":
        end = text["eos_token_id"]
        if end not in (_LEGACY_END, text["vocab_size"] - 1):
            text_cfg |= {"pool_type": "eos", "eos_id": end}
        return {
            "embed_dim": content.get("projection_dim", 512),
            "quick_gelu": ours["text"]["activation"] == ours["vision"]["activation"] == "quickgelu",
            "vision_cfg": {
                "image_size": vision["image_size"],
                "layers": vision["num_hidden_layers"],
                "width": vision["hidden_size"],
                "head_width": vision["hidden_size"] // vision["num_attention_heads"],
                "mlp_ratio": _ratio(vision),
                "patch_size": vision["patch_size"],
            },
            "text_cfg": text_cfg,
            OURS: ours,
        }
    if not vision.get("vision_use_head", True):
        raise BackboneError(f"{where}: a SigLIP without its pooling head has no image feature; expected a whole one")
    width = text.get("projection_size") or text["hidden_size"]
    if width != vision["hidden_size"]:
        raise BackboneError(
            f"{where}: towers of different widths, images {vision['hidden_size']} and texts {width}; expected one "
            "space for both: copy the folder again"
        )
    ours["vision"]["trunk"] = {
        "img_size": vision["image_size"],
        "patch_size": vision["patch_size"],
        "embed_dim": vision["hidden_size"],
        "depth": vision["num_hidden_layers"],
        "num_heads": vision["num_attention_heads"],
        "mlp_ratio": _ratio(vision),
    }
    return {
        "embed_dim": width,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {
            "image_size": vision["image_size"],
            "timm_model_name": "vit_base_patch16_siglip_224",
            "timm_pool": "map",
            "timm_proj": "none",
        },
        "text_cfg": text_cfg | {"no_causal_mask": True, "proj_bias": True, "pool_type": "last"},
        OURS: ours,
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
    clip = kind == "clip"
    usual: dict[str, Any] = {"do_resize": True, "do_rescale": True, "do_normalize": True, "do_center_crop": clip}
    does = {key: content.get(key, value) for key, value in usual.items()}
    for key in ("do_resize", "do_rescale", "do_normalize"):
        if not does[key]:
            raise BackboneError(f"{where}: {key} = false; expected images that are resized and normalised here")
    if abs(content.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-6:
        raise BackboneError(f"{where}: rescale_factor {content['rescale_factor']}; expected 1/255")
    if content.get("do_pad"):
        raise BackboneError(f"{where}: do_pad = true; expected images that are cut or squashed, not padded")
    interpolation = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}.get(
        content.get("resample", 3)
    )
    if interpolation is None:
        raise BackboneError(f"{where}: resample {content['resample']!r}; expected a filter of Pillow, 0 to 5")
    given = content.get("size", {"shortest_edge": size} if clip else {"height": size, "width": size})
    short, square = _edges(given, clip)
    cut = _edges(content.get("crop_size", size), False)[1] if does["do_center_crop"] else None
    if short is not None and cut is None:
        raise BackboneError(f"{where}: images keep their shape and are not cut; expected a square at the end")
    if square is None and short is None:
        raise BackboneError(f"{where}: size {given!r}; expected shortest_edge, or height and width")
    final = cut or square
    if final != (size, size):
        raise BackboneError(
            f"{where}: images become {final[0]} x {final[1]}, but the model takes {size} x {size}; "  # type: ignore[index]
            "copy the folder again from where it came from"
        )
    return {
        "size": [size, size],
        "mode": "RGB",
        "mean": [float(value) for value in content.get("image_mean", _MEANS[kind][0])],
        "std": [float(value) for value in content.get("image_std", _MEANS[kind][1])],
        "interpolation": interpolation,
        "resize_mode": "squash" if square is not None else "shortest",
        "resize_to": list(square) if square is not None else short,
        "cut": "floor",
    }


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


def _tower(content: Mapping[str, Any], name: str, kind: str) -> dict[str, Any]:
    usual: dict[tuple[str, str], dict[str, Any]] = {
        ("text", "clip"): _CLIP_TEXT,
        ("vision", "clip"): _CLIP_VISION,
        ("text", "siglip"): _SIGLIP_TEXT,
        ("vision", "siglip"): _SIGLIP_VISION,
    }
    # Old files have a second table, which transformers puts over the first.
    given = (content.get(f"{name}_config") or {}) | (content.get(f"{name}_config_dict") or {})
    return usual[name, kind] | {key: value for key, value in given.items() if value is not None}


def _ratio(tower: Mapping[str, Any]) -> float:
    """By which open_clip and timm, which cut off the fraction, come to the inner width."""
    width, inner = int(tower["hidden_size"]), int(tower["intermediate_size"])
    ratio = inner / width
    return ratio if int(width * ratio) == inner else (inner + 0.5) / width


def _edges(given: Any, shortest: bool) -> tuple[int | None, tuple[int, int] | None]:
    """A size as transformers writes it: the short edge, or height and width."""
    if isinstance(given, int):
        return (given, None) if shortest else (None, (given, given))
    if isinstance(given, Mapping) and "shortest_edge" in given:
        return int(given["shortest_edge"]), None
    if isinstance(given, Mapping) and {"height", "width"} <= set(given):
        return None, (int(given["height"]), int(given["width"]))
    if isinstance(given, list | tuple) and len(given) == 2:
        return None, (int(given[0]), int(given[1]))
    return None, None

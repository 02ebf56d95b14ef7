"""The network of a recognised backbone: built without memory, filled with its weights, and what it turned out to be."""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secure_fed.core.errors import BackboneError
from secure_fed.core.storage import scratch_folder
from secure_fed.model import transformers_form as theirs
from secure_fed.model.checkpoint_parts import Tensors, quantised, type_of, without_prefix
from secure_fed.model.library import offline, open_clip
from secure_fed.model.model_config import OURS
from secure_fed.model.tokenizer import Tokens
from secure_fed.model.torchscript_file import ARCHIVE_SIZES
from secure_fed.model.weights import read_weights


@dataclass
class Form:
    """A backbone that was recognised, not yet built.

    Attributes:
        kind: what was found, in words.
        model: name for open_clip, ``hf-hub:OWNER/NAME``, or the folder's.
        config: open_clip's, with ours under :data:`~secure_fed.model.model_config.OURS`.
        preprocess: what happens to an image, as :func:`secure_fed.model.preparing.preparer` takes it.
        weights: the checkpoint, or an index of shards.
        tokens: the tokenizer.
        text: configuration of a text model of transformers, if the model has one.
        convert: ``clip`` or ``siglip`` if the names are transformers'.
        told: what was assumed, a sentence each.
        licence: of the weights, as a README beside them names it.
    """

    kind: str
    model: str
    config: dict[str, Any]
    preprocess: dict[str, Any]
    weights: Path
    tokens: Tokens
    text: dict[str, Any] | None = None
    convert: str | None = None
    told: list[str] = field(default_factory=list)
    licence: str | None = None


def build(form: Form) -> nn.Module:
    """The network with its weights, in float32, in evaluation mode.

    Raises:
        BackboneError: they are of another model, or cannot be read.
    """
    try:
        network = make_network(form.config, form.text)
    except BackboneError as error:
        raise BackboneError(f"{form.weights}: {error}") from error
    expected = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    try:
        beside: list[str] = []
        tensors = read_weights(form.weights, beside)
    except BackboneError as error:
        reason = str(error).removeprefix(f"{form.weights}: ")
        raise BackboneError(f"{form.weights}: not loaded as {form.model}: {reason}") from error
    given = {name: tuple(value.shape) for name, value in tensors.items()}
    try:
        if form.convert is not None:
            tensors = _the_model(form, tensors, theirs.anchors(form.config), beside)
            tensors = theirs.convert(form.convert, tensors)
        else:
            tensors = _as_open_clip(form, network, tensors, expected, beside)
    except (RuntimeError, KeyError, IndexError, TypeError, ValueError) as error:  # parts that do not go together
        reason = " ".join(str(error).split())[:120]
        raise BackboneError(
            f"{form.weights}: not loaded as {form.model}: tensors of shapes that no such model has ({reason}); "
            "expected that model's weights: get the file again"
        ) from error
    if "logit_bias" in expected and "logit_bias" not in tensors:
        tensors["logit_bias"] = torch.zeros(())  # of training alone
    for name in ("logit_scale", "logit_bias"):
        if name in expected and name in tensors and tensors[name].numel() == 1:
            tensors[name] = tensors[name].reshape(expected[name])
    _refuse_misfit(form, expected, tensors, given)
    for name, value in tensors.items():
        floats = network.state_dict()[name].is_floating_point() if value.dtype != torch.float32 else True
        if floats and not value.is_floating_point():
            if value.dtype.is_complex or value.dtype in (torch.bool, torch.int64):
                raise BackboneError(
                    f"{form.weights}: values of type {type_of(value)} in {name}, which is no weight of such a model; "
                    "expected float32, float16 or bfloat16: save the model's state_dict() again"
                )
            raise quantised(form.weights, name, type_of(value))
    for name in list(tensors):  # one after the other, so that no second copy of all is held
        value = tensors.pop(name)
        value = value.float() if value.is_floating_point() else value
        owner, _, own = name.rpartition(".")
        network.get_submodule(owner).load_state_dict({own: value}, strict=False, assign=True)
    return network.float().eval().requires_grad_(False)


def make_network(config: Mapping[str, Any], text: Mapping[str, Any] | None = None, empty: bool = True) -> nn.Module:
    """A model of an open_clip configuration with ours.

    Args:
        config: as :class:`Form` has it.
        text: configuration of its text model of transformers.
        empty: leave parameters without memory, to be assigned, where the model can be built so; else they are drawn
            from torch's generator.

    Raises:
        BackboneError: open_clip cannot build it.
    """
    library = open_clip()
    settings = copy.deepcopy({key: value for key, value in config.items() if key != OURS})
    ours = config.get(OURS, {})
    hugging = "hf_model_name" in settings.get("text_cfg", {})
    try:
        settings["vision_cfg"].update(timm_model_pretrained=False)
        if hugging:
            settings["text_cfg"].update(hf_model_pretrained=False)
        network: Any = _constructed(settings, text, ours, hugging, empty)
    except BackboneError:
        raise
    except Exception as error:  # open_clip, timm and transformers each raise what they like
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        if hugging and "transformers" in reason and "install" in reason:
            raise BackboneError(
                'the text model needs one more package; expected transformers: pip install "secfacmic[biomedclip]"'
            ) from error
        raise BackboneError(
            f"open_clip {library.__version__} cannot build this model ({reason}); expected a configuration of a model "
            "that it knows: copy the folder again, or install a newer open_clip"
        ) from error
    text_part = network.text if hasattr(network, "text") else network.transformer
    for name, module in (("vision", network.visual), ("text", text_part)):
        if name in ours:
            _set(module, ours[name]["activation"], ours[name].get("eps"))
    if "eps" in ours.get("text", {}) and not hasattr(network, "text"):
        network.ln_final.eps = ours["text"]["eps"]
    made: nn.Module = network
    return made


def _constructed(
    settings: Mapping[str, Any], text: Mapping[str, Any] | None, ours: Mapping[str, Any], hugging: bool, empty: bool
) -> Any:
    """The network as open_clip makes it: in memory if some of it is computed from parameters, which have no values."""
    if not empty:
        return _construct(settings, text, ours, hugging)
    try:
        with _parameters():
            network = _construct(settings, text, ours, hugging)
        if not any(buffer.is_meta for buffer in network.buffers()):
            return network
    except RuntimeError as error:  # NotImplementedError is one
        if "meta" not in str(error):
            raise
    with torch.random.fork_rng(devices=[]):
        return _construct(settings, text, ours, hugging)


def _construct(
    settings: Mapping[str, Any], text: Mapping[str, Any] | None, ours: Mapping[str, Any], hugging: bool
) -> Any:
    library, given = open_clip(), copy.deepcopy(dict(settings))
    custom = given.pop("custom_text", False) or hugging
    kind = library.CoCa if custom and "multimodal_cfg" in given else library.CustomTextCLIP
    with scratch_folder() as scratch, offline():
        if hugging:
            if text is None:
                raise BackboneError("the text model's configuration is not here")
            # transformers takes a configuration from a folder, and open_clip only by the name of one.
            (scratch / "config.json").write_text(json.dumps(text), encoding="utf-8")
            given["text_cfg"]["hf_model_name"] = str(scratch)
        network: Any = (kind if custom else library.CLIP)(**given)
        if "trunk" in ours.get("vision", {}):
            network.visual.trunk = _trunk(ours["vision"]["trunk"])
    return network


def _shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Of a model with no text model of transformers, without memory even where it can only be built in it."""
    with torch.device("meta"):
        return {name: tuple(value.shape) for name, value in make_network(config).state_dict().items()}


_ELSEWHERE = {
    *("layers", "width", "mlp_ratio", "patch_size", "image_size", "vocab_size", "attn_pooler_queries", "ls_init_value"),
    *("heads", "head_width", "attn_pooler_heads", "act_kwargs", "norm_kwargs", "context_length", "pool_type"),
    *("eos_id", "pad_id", "tokenizer_mode", "tokenizer_kwargs", "hf_tokenizer_name", "output_tokens"),
    *("patch_dropout", "timm_drop", "timm_drop_path", "timm_model_pretrained"),
}
"""Keys of open_clip's tables that shapes, modules in their order, tokenizer or preprocessing say, or training alone
reads."""

_UNREAD = {
    *("use_cache", "return_dict", "output_attentions", "output_hidden_states", "tie_word_embeddings", "dtype"),
    *("transformers_version", "architectures", "chunk_size_feed_forward", "id2label", "label2id", "problem_type"),
    *("initializer_range", "initializer_factor", "init_std", "bos_token_id", "eos_token_id", "decoder_start_token_id"),
    *("num_decoder_layers", "decoder_layers", "decoder_ffn_dim", "decoder_attention_heads", "_name_or_path"),
    *("is_encoder_decoder", "torch_dtype"),
}
"""Keys of a text model's configuration on which features do not depend, dropout apart."""


def facts(network: Any, form: Form) -> dict[str, Any]:
    """What decides about features beside weights: of each tower activation, heads, epsilon, pooler; context.

    Of both towers also each of these in the order of modules, and what their configuration says that is not its
    default: a default that is stated is one that is left out.
    """
    text = getattr(network, "text", None)
    parts = [text] if text is not None else [network.transformer, network.ln_final]
    towers: dict[str, Any] = {"vision": _tower_facts([network.visual]), "text": _tower_facts(parts)}
    towers["vision"]["pooler"] = str(
        getattr(network.visual, "pool_type", getattr(getattr(network.visual, "trunk", None), "global_pool", ""))
    )
    holder = network if text is None else text
    pool = getattr(holder, "text_pool_type", getattr(holder, "pool_type", None))
    pool = type(holder.pooler).__name__ if hasattr(holder, "pooler") else str(pool)
    end = getattr(holder, "text_eos_id", getattr(holder, "eos_id", None)) if pool == "eos" else None
    towers["text"] |= {"pooler": pool, "end": end}
    if getattr(holder, "attn_mask", 0) is None:
        towers["text"]["causal"] = False
    if getattr(network.visual, "final_ln_after_pool", False):
        towers["vision"]["normalised"] = "after pooling"
    if getattr(holder, "cls_emb", None) is not None or getattr(holder, "use_pad_mask", False):
        towers["text"]["pad"] = holder.pad_id
    if form.text is not None:
        towers["text"]["model"] = _beyond_defaults(text)
    order = {"vision": _in_order([network.visual]), "text": _in_order(parts)}
    return towers | {"context": form.tokens.context, "order": order, "stated": _stated(form.config)}


def _stated(config: Mapping[str, Any]) -> dict[str, Any]:
    """Of open_clip's tables, what is not the default of a key that its towers read."""
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg

    found: dict[str, Any] = {}
    for key, made in (("vision_cfg", CLIPVisionCfg), ("text_cfg", CLIPTextCfg)):
        table, plain = config[key], asdict(made())
        timms = "timm_model_name" in table
        found[key] = {
            name: value
            for name, value in table.items()
            if name not in _ELSEWHERE and value != plain.get(name) and name.startswith("timm_") == timms
        }
        if "hf_model_name" in table:  # what of it is read, modules and its own configuration say
            found[key] = {}
    return found


def _beyond_defaults(text: Any) -> dict[str, Any]:
    """Of the configuration that a text model of transformers was built with, what is not its kind's default."""
    plain, config = type(text.config)().to_dict(), text.config.to_dict()
    found = {
        key: value
        for key, value in config.items()
        if key in plain and value != plain[key] and key not in _UNREAD and "drop" not in key
    }
    kept = text.state_dict()
    if any(value.is_floating_point() and name not in kept for name, value in text.named_buffers()):
        found["dtype"] = str(text.config.dtype or "float32").removeprefix("torch.")  # to which these were rounded
    return found | {"type": config["model_type"]}


def activation(towers: Mapping[str, Any]) -> str:
    """In a word, the activation of both towers; ReLU beside another is a ResNet's, and not in question."""
    found = {name for tower in ("vision", "text") for name in towers[tower]["activation"]}
    return "+".join(sorted(found - {"relu"} or found)) or "none"


def which_fit(given: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Models of open_clip that have these names and shapes.

    Args:
        given: shapes by the names of a checkpoint: open_clip's or transformers', whatever prefix they have.
    """
    readings = [given, *(_converted(kind, given) for kind in ("clip", "siglip") if under_transformers_names(given))]
    tables = [
        {name.removeprefix(prefix): shape for name, shape in reading.items()}
        for reading in readings
        for prefix in _prefixes(reading)
    ]
    shapes = {shape for table in tables for shape in table.values()}
    found = []
    for model in open_clip().list_models():
        config = open_clip().get_model_config(model)
        text, dim = config["text_cfg"], config["embed_dim"]
        if "hf_model_name" in text or not any(dim in shape for shape in shapes):
            continue
        token = (text.get("vocab_size", 49408), text.get("width", 512))
        if token not in shapes:
            continue
        try:
            wanted = _shapes(config)
        except BackboneError:
            continue
        plain = {name.removeprefix("text."): shape for name, shape in wanted.items()}
        if any(
            all(
                {name.removeprefix("text."): shape for name, shape in table.items()}.get(n) == s
                for n, s in plain.items()
            )
            for table in tables
        ):
            found.append(str(model))
    return found


_THEIRS = "text_model.encoder.layers."


def under_transformers_names(names: Iterable[str]) -> bool:
    """Whether names are those of a CLIP of transformers."""
    return any(_THEIRS in name for name in names)


def _converted(kind: str, given: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    start = next(name for name in given if _THEIRS in name).split("text_model.")[0]
    empty = {name.removeprefix(start): torch.empty(shape, device="meta") for name, shape in given.items()}
    try:
        return {name: tuple(value.shape) for name, value in theirs.convert(kind, empty).items()}
    except (RuntimeError, TypeError):  # not even parts that go together
        return {}


def _prefixes(shapes: Mapping[str, Any]) -> list[str]:
    found = {name.split("visual.")[0] for name in shapes if "visual." in name}
    return sorted(found | {""}, key=len)[:4]


def without_text(shapes: Mapping[str, Any]) -> str:
    """The end of a message about weights that are of images alone; else nothing."""
    named = any("text" in name or "token_embedding" in name or name.startswith("transformer.") for name in shapes)
    return "" if named else ", and has no text tower, which prompts need"


def _the_model(
    form: Form,
    tensors: Tensors,
    anchors: Mapping[str, tuple[int, ...] | None],
    elsewhere: list[str],
    rest: Collection[str] = (),
) -> Tensors:
    """The tensors under the model's prefix; what lies beside it is told, as it may have been trained with it."""
    found, beside, apart = without_prefix(tensors, anchors, form.weights, rest)
    beside += elsewhere
    if apart is not None:
        form.told.append(
            f"that the two towers, which lie under two prefixes ({apart or 'none'} of the text's), are one model"
        )
    if beside:
        form.told.append(
            f"that what lies beside the model, {len(beside)} tensors ({', '.join(beside[:3])}"
            f"{' and so on' if beside[3:] else ''}), is not needed; if they are an adapter or a projection, features "
            "are not those that were trained"
        )
    return found


def _as_open_clip(
    form: Form, network: nn.Module, tensors: Tensors, expected: Mapping[str, tuple[int, ...]], elsewhere: list[str]
) -> Tensors:
    """Tensors under the names of this open_clip, of which some were others before."""
    from open_clip.convert import convert_state_dict
    from open_clip.model import convert_to_custom_text_state_dict

    anchors = {name: shape for name, shape in expected.items() if name.startswith("visual.")}
    tensors = _the_model(form, tensors, anchors, elsewhere, expected.keys() - anchors.keys() - {"logit_bias"})
    tensors = convert_state_dict(network, tensors)
    if "positional_embedding" in tensors and not hasattr(network, "positional_embedding"):
        tensors = convert_to_custom_text_state_dict(tensors)
    for name in ("attn_mask", *ARCHIVE_SIZES, *({"logit_bias"} - expected.keys())):  # a bias is of training alone
        tensors.pop(name, None)
    if "text.transformer.embeddings.position_ids" not in expected:
        tensors.pop("text.transformer.embeddings.position_ids", None)
    return tensors


def _refuse_misfit(
    form: Form, expected: Mapping[str, tuple[int, ...]], tensors: Tensors, given: Mapping[str, tuple[int, ...]]
) -> None:
    """Refuse tensors that are not the network's; ``given`` are the shapes under the names that the file has."""
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    missing, strange = sorted(set(expected) - set(shapes)), sorted(set(shapes) - set(expected))
    other = [name for name in expected if name in shapes and shapes[name] != expected[name]]
    if not missing and not strange and not other:
        return
    place = next((name for name in other if name.startswith("visual.") and "pos" in name.rsplit(".", 1)[-1]), None)
    if place and other == [place] and not missing and not strange:
        patches = [max(shape[-2], 1) for shape in (shapes[place], expected[place])]
        raise BackboneError(
            f"{form.weights}: not loaded as {form.model}: its positional embedding is of {patches[0]} places, but "
            f"images of {form.preprocess['size'][0]} pixels need {patches[1]}; expected the image size that the "
            "weights were trained with: copy the configuration again, or name the model of that size"
        )
    if under_transformers_names(strange) and form.convert is None:
        raise BackboneError(
            f"{form.weights}: not loaded as {form.model}: weights under transformers' names, without their "
            "config.json; expected the whole folder: name the folder"
        )
    parts = [
        f"{len(names)} {what} ({', '.join(names[:2])}{' and so on' if len(names) > 2 else ''})"
        for names, what in ((missing, "tensors are missing"), (strange, "are not the model's"))
        if names
    ]
    if other:
        parts.append(f"{len(other)} have other shapes ({other[0]}: {shapes[other[0]]}, expected {expected[other[0]]})")
    fits = which_fit(given)
    if form.model in fits:
        parts.append("which is all that keeps it from being that model; expected its weights alone")
        raise BackboneError(
            f"{form.weights}: not loaded as {form.model}: {', '.join(parts)}: save the model's state_dict() by itself"
        )
    advice = f"its shapes fit {', '.join(fits)}" if fits else "its shapes fit no other that open_clip knows by name"
    raise BackboneError(
        f"{form.weights}: not loaded as {form.model}: {'; '.join(parts)}{without_text(given)}; expected that model's "
        f"weights: {advice}"
    )


def _trunk(sizes: Mapping[str, Any]) -> nn.Module:
    """SigLIP's image tower (Zhai et al., arXiv 2303.15343) of any size, as timm builds it."""
    from timm.models.vision_transformer import VisionTransformer

    made: nn.Module = VisionTransformer(**sizes, class_token=False, global_pool="map", num_classes=0)
    return made


def _set(tower: nn.Module, name: str, eps: float | None) -> None:
    """Give all of a tower one activation and, if it is given, one epsilon."""
    from open_clip.transformer import QuickGELU

    made = {"gelu": nn.GELU, "gelu_tanh": lambda: nn.GELU(approximate="tanh"), "quickgelu": QuickGELU}[name]
    for module in list(tower.modules()):
        if isinstance(module, nn.LayerNorm) and eps is not None:
            module.eps = eps
        for key, child in list(module.named_children()):
            if type(child).__name__ in ("GELU", "GELUTanh", "QuickGELU"):
                setattr(module, key, made())


_ACTIVATION_NAMES = {
    "geluactivation": "gelu",
    "gelutanh": "gelu_tanh",
    "newgeluactivation": "gelu_tanh",
    "quickgeluactivation": "quickgelu",
    "siluactivation": "silu",
    "swish": "silu",
}
_ACTIVATIONS = ("gelu", "gelu_tanh", "quickgelu", "relu", "silu", "relu6", "hardswish", "mish", "tanh")


def _tower_facts(parts: list[Any]) -> dict[str, Any]:
    """What a tower has of each, without their order and the activations that have no name here."""
    found = _in_order(parts)
    known = {name for name in found["activation"] if name in _ACTIVATIONS}
    return {"activation": sorted(known), "heads": sorted(set(found["heads"])), "eps": sorted(set(found["eps"]))}


def _in_order(parts: list[Any]) -> dict[str, list[Any]]:
    """Activations, heads and epsilons of a tower's modules, in their order."""
    found: dict[str, list[Any]] = {"activation": [], "heads": [], "eps": []}
    for module in (module for part in parts for module in part.modules()):
        name = type(module).__name__.lower()
        name = _ACTIVATION_NAMES.get(name, name)
        if isinstance(module, nn.GELU):
            name = "gelu_tanh" if module.approximate == "tanh" else "gelu"
        if name in _ACTIVATIONS:
            found["activation"].append(name)
        elif "activations" in type(module).__module__ or isinstance(module, nn.LeakyReLU | nn.ELU | nn.Softplus):
            found["activation"].append(repr(module))
        for key in ("num_heads", "num_attention_heads"):
            value = getattr(module, key, None)
            if isinstance(value, int):
                found["heads"].append(value)
        for key in ("eps", "variance_epsilon"):
            value = getattr(module, key, None)
            if isinstance(value, float):
                found["eps"].append(value)
    return found


@contextmanager
def _parameters() -> Iterator[None]:
    """Within, modules that this thread makes get parameters without memory; buffers are real, as some are computed."""
    mine, register = threading.get_ident(), nn.Module.register_parameter

    def register_empty(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if threading.get_ident() == mine and param is not None and param.device.type != "meta":
            param = nn.Parameter(torch.empty_like(param, device="meta"), requires_grad=param.requires_grad)
        register(self, name, param)

    with _PATCHING:
        nn.Module.register_parameter = register_empty  # type: ignore[method-assign]
        try:
            yield
        finally:
            nn.Module.register_parameter = register  # type: ignore[method-assign]


_PATCHING = threading.RLock()

"""The forms in which a frozen CLIP comes, each turned into one: open_clip's configuration, names and a tokenizer.

Read are a folder of our own store, a hub snapshot in open_clip's form, a folder in transformers' form (``clip`` and
``siglip``), and single checkpoints of a model that open_clip knows by name. A configuration beats what shapes suggest;
where neither says what a model is, nothing is guessed. No hub is asked and no code of a folder is run.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from secure_fed import configs
from secure_fed.core.errors import BackboneError
from secure_fed.model import transformers_form as theirs
from secure_fed.model.tokenizer import ClipTokens, FileTokens, Tokens, read_tokenizer
from secure_fed.model.transformers_form import OURS
from secure_fed.model.weights import SUFFIXES, Tensors, is_archive, lost_link, read_weights, without_prefix

HUB = "hf-hub:"
ENTRY = "backbone.json"
CONFIG = "open_clip_config.json"
TEXT = "text"
"""Folder with the configuration of a text model of transformers."""

_TWIN = "-quickgelu"
_SHARED_KEYS = ("mean", "std", "interpolation", "resize_mode")
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json", "open_clip_model.safetensors.index.json")
_NO_WEIGHTS = ("training_args", "optimizer", "scheduler", "rng_state", "scaler", "adapter_model")
_OTHERS = (".h5", ".msgpack", ".onnx", ".gguf", ".npz", ".tflite")
_TEXT_ALONE = ("clip_text_model", "siglip_text_model", "bert", "roberta", "xlm-roberta", "distilbert")
_IMAGES_ALONE = ("clip_vision_model", "siglip_vision_model", "vit", "dinov2", "dinov3_vit", "beit", "swin", "vit_mae")
_BERTS = {768: 12, 1024: 16}
"""Heads of BERT base and large by width (Devlin et al., arXiv 1810.04805), which no weight tells."""


@dataclass
class Form:
    """A backbone that was recognised, not yet built.

    Attributes:
        kind: what was found, in words.
        model: name for open_clip, ``hf-hub:OWNER/NAME``, or the folder's.
        config: open_clip's, with ours under :data:`~secure_fed.model.transformers_form.OURS`.
        preprocess: what happens to an image, as :func:`preparer` takes it.
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


@cache
def open_clip() -> Any:
    """open_clip, which knows our models too. Imported here: it takes seconds, and cached features need none of it."""
    import open_clip as library

    library.add_model_config(configs.MODELS)
    return library


@contextmanager
def offline() -> Iterator[None]:
    """Hub libraries neither ask nor look for updates within."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def known_model(model: str) -> dict[str, Any]:
    """open_clip's configuration of a model by name, builtin or of ours.

    Raises:
        BackboneError: there is none of that name.
    """
    found: dict[str, Any] | None = open_clip().get_model_config(model) if model in open_clip().list_models() else None
    if found is None:
        ours = ", ".join(sorted(path.stem for path in configs.MODELS.glob("*.json")))
        raise BackboneError(
            f"model {model!r}: open_clip {open_clip().__version__} has none of that name; expected one of "
            f"open_clip.list_models(), {HUB}OWNER/NAME, or of ours: {ours}"
        )
    return found


def twin(model: str) -> str | None:
    """The model with equal names and shapes and the other activation; None if there is none."""
    other = model.removesuffix(_TWIN) if model.endswith(_TWIN) else model + _TWIN
    return other if {model, other} <= set(open_clip().list_models()) else None


def with_activation(model: str, tag: str | None, activation: str | None, where: str) -> str:
    """The model of the two with equal shapes that is meant.

    Args:
        model: a name for open_clip.
        tag: of open_clip, if the weights are one's; it says which activation they were trained with.
        activation: ``gelu`` or ``quickgelu``, where somebody named it.
        where: what is loaded, for messages.

    Raises:
        BackboneError: nothing says which of the two, or two things say otherwise.
    """
    other = twin(model)
    if other is None:
        return model
    plain, quick = sorted((model, other), key=len)
    if tag is not None and open_clip().get_pretrained_cfg(model, tag):
        meant = "quickgelu" if open_clip().get_pretrained_cfg(model, tag).get("quick_gelu") else "gelu"
        if meant == "quickgelu" and model == plain:
            raise BackboneError(
                f"tag {tag}: trained with QuickGELU, but model {model} has GELU; expected model {quick}: name that one "
                "in the study"
            )
        if activation not in (None, meant):
            raise BackboneError(f"{where}: tag {tag} was trained with {meant}, not {activation}; leave activation out")
        return model
    if activation is None and model == quick:
        return model
    if activation not in ("gelu", "quickgelu") or (activation == "gelu" and model == quick):
        found = "does not say with which activation it was trained" if activation is None else f"is no {activation}"
        raise BackboneError(
            f"{where}: {model} {found}, and {plain} (gelu) and {quick} (quickgelu) have equal names and shapes; "
            "expected the one that the weights were trained with, by --activation gelu or --activation quickgelu, in a "
            "study activation = (fine-tunes of OpenAI's weights: quickgelu)"
        )
    return quick if activation == "quickgelu" else plain


def read_form(
    path: Path,
    model: str | None = None,
    tag: str | None = None,
    activation: str | None = None,
    text: Path | None = None,
    seeded: bool = False,
) -> Form:
    """Recognise a file or a folder.

    Args:
        path: the file or folder.
        model: name for open_clip; needed for a file. Of a folder, what it is to be called.
        tag: of open_clip, whose preprocessing and activation a file is given.
        activation: ``gelu`` or ``quickgelu``, for a file of a model that has a twin.
        text: folder with ``config.json`` (and tokenizer) of a text model of transformers.
        seeded: the weights are random, so that the model's name decides about their activation.

    Raises:
        BackboneError: it is none of the forms, or not whole; with what to do.
    """
    if path.is_dir():
        form = _read_folder(path, model, tag, activation, text, seeded)
        form.licence = _licence(form.weights.parent)
        return form
    if lost_link(path):
        read_weights(path)
    if not path.is_file():
        raise BackboneError(f"{path}: no such file; expected a checkpoint, or a folder with one and its configuration")
    return _read_file(path, model, tag, activation, text, seeded)


def build(form: Form) -> nn.Module:
    """The network with its weights, in float32, in evaluation mode.

    Raises:
        BackboneError: they are of another model, or cannot be read.
    """
    network = make_network(form.config, form.text)
    expected = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    try:
        tensors = read_weights(form.weights)
    except BackboneError as error:
        reason = str(error).removeprefix(f"{form.weights}: ")
        raise BackboneError(f"{form.weights}: not loaded as {form.model}: {reason}") from error
    if form.convert is not None:
        tensors = without_prefix(tensors, ("text_model.final_layer_norm.weight", "logit_scale"), form.weights)
        tensors = theirs.convert(form.convert, tensors)
    else:
        tensors = _as_open_clip(form, network, tensors, expected)
    if "logit_bias" in expected and "logit_bias" not in tensors:
        tensors["logit_bias"] = torch.zeros(())  # of training alone
    for name in ("logit_scale", "logit_bias"):
        if name in expected and name in tensors and tensors[name].numel() == 1:
            tensors[name] = tensors[name].reshape(expected[name])
    _refuse_misfit(form, expected, tensors)
    for name, value in tensors.items():
        floats = network.state_dict()[name].is_floating_point() if value.dtype != torch.float32 else True
        if floats and not value.is_floating_point():
            raise BackboneError(
                f"{form.weights}: quantised weights ({name}, {str(value.dtype).removeprefix('torch.')}); expected "
                "float32, float16 or bfloat16: get the weights before they were quantised"
            )
    for name in list(tensors):  # one after the other, so that no second copy of all is held
        value = tensors.pop(name)
        value = value.float() if value.is_floating_point() else value
        network.load_state_dict({name: value}, strict=False, assign=True)
    return network.float().eval().requires_grad_(False)


def make_network(config: Mapping[str, Any], text: Mapping[str, Any] | None = None, empty: bool = True) -> nn.Module:
    """A model of an open_clip configuration with ours.

    Args:
        config: as :class:`Form` has it.
        text: configuration of its text model of transformers.
        empty: leave parameters without memory, to be assigned; else they are drawn from torch's generator.

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
        custom = settings.pop("custom_text", False) or hugging
        kind = library.CoCa if custom and "multimodal_cfg" in settings else library.CustomTextCLIP
        with tempfile.TemporaryDirectory(prefix="secfacmic-") as name, offline(), _parameters(empty):
            if hugging:
                if text is None:
                    raise BackboneError("the text model's configuration is not here")
                # transformers takes a configuration from a folder, and open_clip only by the name of one.
                (Path(name) / "config.json").write_text(json.dumps(text), encoding="utf-8")
                settings["text_cfg"]["hf_model_name"] = name
            network: Any = (kind if custom else library.CLIP)(**settings)
            if "trunk" in ours.get("vision", {}):
                network.visual.trunk = _trunk(ours["vision"]["trunk"])
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


def preparer(preprocess: Mapping[str, Any]) -> Callable[[Image.Image], NDArray[np.float32]]:
    """The function from an image to float32 [3, height, width].

    Args:
        preprocess: ``size`` [height, width], ``mean``, ``std``, ``interpolation``, ``resize_mode``, and ``cut``:
            ``round`` cuts as open_clip does (torchvision's middle rounds half to even), ``floor`` as transformers.
    """
    if preprocess["cut"] == "round":
        from open_clip.transform import PreprocessCfg, image_transform_v2

        known = {key: value for key, value in preprocess.items() if key not in ("cut", "resize_to")}
        transform = image_transform_v2(PreprocessCfg(**known | {"size": tuple(known["size"])}), is_train=False)
        return lambda image: np.asarray(transform(image).numpy(), dtype=np.float32)
    mean, std = (np.array(preprocess[key], dtype=np.float32)[:, None, None] for key in ("mean", "std"))
    chosen = Image.Resampling[preprocess["interpolation"].upper()]
    (height, width), target = preprocess["size"], preprocess["resize_to"]

    def prepare(image: Image.Image) -> NDArray[np.float32]:
        found = image.convert("RGB")
        if preprocess["resize_mode"] == "squash":
            found = found.resize((target[1], target[0]), chosen)
        else:
            short, long = sorted(found.size)
            edges = (target, int(target * long / short))
            found = found.resize(edges if found.width <= found.height else edges[::-1], chosen)
        left, top = (found.width - width) // 2, (found.height - height) // 2
        pixels = np.asarray(found.crop((left, top, left + width, top + height)), dtype=np.float32)
        return np.asarray((pixels.transpose(2, 0, 1) / np.float32(255) - mean) / std, dtype=np.float32)

    return prepare


def facts(network: Any, form: Form) -> dict[str, Any]:
    """What decides about features beside weights: of each tower activation, heads, epsilon, pooler; context."""
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
    if form.text is not None:
        chosen = ("hidden_act", "layer_norm_eps", "num_attention_heads", "pad_token_id", "position_embedding_type")
        towers["text"]["model"] = {key: form.text.get(key) for key in chosen} | {"type": form.text.get("model_type")}
    return towers | {"context": form.tokens.context}


def activation(towers: Mapping[str, Any]) -> str:
    """In a word, the activation of both towers; ReLU beside another is a ResNet's, and not in question."""
    found = {name for tower in ("vision", "text") for name in towers[tower]["activation"]}
    return "+".join(sorted(found - {"relu"} or found)) or "none"


# --- folders ---


def _read_folder(
    path: Path, model: str | None, tag: str | None, activation: str | None, text: Path | None, seeded: bool
) -> Form:
    if path.name.startswith("models--") or (path / "snapshots").is_dir():
        owner, _, name = path.name.removeprefix("models--").partition("--")
        return _read_folder(_snapshot(path), model or f"{HUB}{owner}/{name}", tag, activation, text, seeded)
    inside = sorted(path.iterdir())
    if not inside:
        raise BackboneError(f"{path}: is empty; expected weights and their configuration: copy the folder again")
    lost = [one.name for one in inside if lost_link(one)]
    if lost:
        raise BackboneError(
            f"{path}: of {', '.join(lost)} only the link is here, which does not lead anywhere; expected the files "
            "themselves: copy the folder with its links followed, as cp -rL does"
        )
    if (path / "adapter_config.json").is_file():
        raise _peft(path)
    if (path / CONFIG).is_file():
        return _read_open_clip(path, model, text)
    if (path / "config.json").is_file():
        return _read_transformers(path, model)
    found = _weights_in(path, ())
    if model is None or model.startswith(HUB):
        raise BackboneError(
            f"{path}: has no {CONFIG} and no config.json, without which {found.name} does not say what it is; copy the "
            "whole folder, or, if it is a checkpoint of a model that open_clip knows by name, name that with --model"
        )
    return _read_file(found, model, tag, activation, text or path, seeded)


def _licence(folder: Path) -> str | None:
    """What the head of a hub's README says."""
    readme = folder / "README.md"
    if not readme.is_file():
        return None
    found = re.search(r"^license(?:_name)?:[ ]*([\w.+-]{1,60})[ ]*$", readme.read_text("utf-8", "replace")[:4000], re.M)
    return found[1] if found else None


def _snapshot(path: Path) -> Path:
    """The snapshot of a hub's cache folder that its main branch means."""
    found = sorted(one for one in (path / "snapshots").glob("*") if one.is_dir())
    ref = path / "refs" / "main"
    if ref.is_file() and (path / "snapshots" / ref.read_text().strip()) in found:
        return path / "snapshots" / ref.read_text().strip()
    if len(found) != 1:
        raise BackboneError(
            f"{path}: {len(found)} snapshots, and no refs/main that names one of them; expected one: name the folder "
            "below snapshots that is meant, or copy the whole cache folder again"
        )
    return found[0]


def _read_open_clip(path: Path, model: str | None, text: Path | None) -> Form:
    content = _read_json(path / CONFIG)
    config = content.get("model_cfg", content if "vision_cfg" in content else None)
    if not isinstance(config, dict) or not {"embed_dim", "vision_cfg", "text_cfg"} <= set(config):
        raise BackboneError(f"{path / CONFIG}: has no model_cfg with embed_dim, vision_cfg and text_cfg; copy it again")
    told: list[str] = []
    text_cfg = config["text_cfg"]
    own = (path / ENTRY).is_file()
    weights = _weights_in(path, _named_open_clip(path))
    inner = None
    if "hf_model_name" in text_cfg:
        inner = _text_model(path, text, text_cfg["hf_model_name"], weights, told)
    given = content.get("preprocess_cfg")
    if not given:
        told.append(f"{CONFIG} has no preprocess_cfg: open_clip's usual mean, std and cut are taken")
    given = given or {}
    preprocess = dict(given) if given.get("cut") == "floor" else _open_clip_preprocess(config, given)
    tokens = _tokens(path, text, config, inner, weights)
    return Form(
        "a folder of secfacmic's store" if own else "a folder in open_clip's form",
        model or _name_of(config) or path.name,
        config,
        preprocess,
        weights,
        tokens,
        inner,
        None,
        told,
    )


def _read_transformers(path: Path, model: str | None) -> Form:
    where = path / "config.json"
    content = _read_json(where)
    kind = content.get("model_type")
    if "auto_map" in content:
        raise BackboneError(
            f"{path}: comes with code of its own (auto_map in config.json), which is never run; expected a model in "
            "transformers' own form, clip or siglip, or in open_clip's"
        )
    if "quantization_config" in content:
        raise BackboneError(
            f"{path}: quantised weights (quantization_config in config.json); expected float32, float16 or bfloat16: "
            "get the model before it was quantised"
        )
    if kind == "siglip2":
        raise BackboneError(
            f"{path}: model_type siglip2, which takes images of any shape (NaFlex) and is not read; expected a SigLIP "
            "2 of fixed size, whose model_type is siglip"
        )
    if kind not in ("clip", "siglip"):
        what = (
            "an image tower alone, without the text tower that prompts need"
            if kind in _IMAGES_ALONE
            else "a text model alone, without an image tower"
            if kind in _TEXT_ALONE
            else "another kind of model"
        )
        raise BackboneError(
            f"{path}: model_type {kind!r} in config.json, {what}; expected clip or siglip, or a folder with {CONFIG}"
        )
    if not {"text_config", "vision_config", "text_config_dict", "vision_config_dict"} & set(content):
        raise BackboneError(f"{where}: says nothing of its towers (text_config, vision_config); copy it again")
    config = theirs.model_config(content, str(where))
    size = config["vision_cfg"]["image_size"]
    found = next((path / name for name in ("preprocessor_config.json",) if (path / name).is_file()), None)
    if found is not None:
        how = _read_json(found)
    elif (path / "processor_config.json").is_file():
        found = path / "processor_config.json"
        how = _read_json(found).get("image_processor") or {}
    if found is None or not how:
        raise BackboneError(
            f"{path}: has no preprocessor_config.json, where size, mean and std of its images stand; copy the whole "
            "folder"
        )
    tokens = read_tokenizer(path, config["text_cfg"]["context_length"], kind, "none", {})
    if tokens is None:
        raise _no_tokenizer(path, "its tokenizer")
    _refuse_tokens(path, tokens, config["text_cfg"]["vocab_size"])
    names = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
    return Form(
        f"a folder in transformers' form, {kind}",
        model or _name_of(config) or path.name,
        config,
        theirs.preprocessing(how, size, kind, str(found)),
        _weights_in(path, names),
        tokens,
        None,
        kind,
    )


def _weights_in(path: Path, names: tuple[str, ...]) -> Path:
    """The checkpoint in a folder: of the names if any is there, else the only one; several must be equal."""
    inside = [one for one in sorted(path.iterdir()) if one.is_file()]
    index = [one for one in inside if one.name in _INDEXES]
    found = [
        one
        for one in inside
        if one.suffix.lower() in SUFFIXES and not one.name.startswith(_NO_WEIGHTS) and "-of-" not in one.name
    ] + index
    if any(one.name in names for one in found):
        outside = set(_FOREIGN) - set(names)
        found = [one for one in found if one.name not in outside]
    if len(found) == 1:
        return found[0]
    if not found:
        shards = [one.name for one in inside if "-of-" in one.name]
        if shards:
            raise BackboneError(
                f"{path}: {len(shards)} shards ({shards[0]} and so on) without the index that belongs to them; copy "
                "the whole folder again"
            )
        others = [one for one in inside if one.suffix.lower() in _OTHERS]
        if others:
            read_weights(others[0])
        raise BackboneError(f"{path}: no weights in it; the folder is half copied: copy all of it again")
    contents = {_content(one) for one in found}
    if len(contents) > 1:
        raise BackboneError(
            f"{path}: {len(found)} checkpoints that differ ({', '.join(one.name for one in found)}); expected one: "
            "remove those that are not meant"
        )
    return min(found, key=lambda one: (one.suffix != ".safetensors", one.name))


_OPEN_CLIP_NAMES = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
    "open_clip_model.safetensors.index.json",
)
_FOREIGN = (
    *_OPEN_CLIP_NAMES,
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def _named_open_clip(path: Path) -> tuple[str, ...]:
    """Names of open_clip's checkpoints where the folder also holds the model in transformers' form."""
    content = _read_json(path / "config.json") if (path / "config.json").is_file() else {}
    return _OPEN_CLIP_NAMES if content.get("model_type") in ("clip", "siglip") else ()


def _content(path: Path) -> str:
    """A digest of a checkpoint's values, however it stores them."""
    total = hashlib.sha256()
    tensors = read_weights(path)
    for name in sorted(tensors):
        value = tensors.pop(name)
        value = value.float() if value.is_floating_point() else value
        total.update(f"{name} {tuple(value.shape)}\n".encode())
        total.update(np.ascontiguousarray(value.numpy()).tobytes())
    return total.hexdigest()


def _text_model(path: Path, text: Path | None, name: str, weights: Path, told: list[str]) -> dict[str, Any]:
    """Configuration of a text model of transformers, which open_clip's own does not hold."""
    from open_clip.hf_configs import arch_dict

    places = [path / TEXT / "config.json", path / "config.json"]
    if text is not None:
        places = [text / "config.json"]
        if not places[0].is_file():
            raise BackboneError(
                f"{places[0]}: no such file; expected the configuration of text model {name}: where there is internet, "
                f"{_fetch_text(name)}"
            )
    for place in places:
        content = _read_json(place) if place.is_file() else {}
        if content.get("model_type") in arch_dict:
            return {key: value for key, value in content.items() if key != "auto_map"}
        if content and text is not None:
            raise BackboneError(
                f"{place}: model_type {content.get('model_type')!r}; expected a text model that open_clip builds, one "
                f"of {', '.join(arch_dict)}"
            )
    shapes = {key: tuple(value.shape) for key, value in read_weights(weights).items()}
    assumed = _assume_bert(shapes)
    if assumed is None:
        raise BackboneError(
            f"{path}: the configuration of text model {name} is not here, and its shapes are not those of BERT base or "
            "large, so that nothing says its heads, activation and epsilon; give the folder with its config.json by "
            f"--text: where there is internet, {_fetch_text(name)}"
        )
    told.append(
        f"the configuration of text model {name} is not here: by its shapes it is taken for BERT "
        f"{'base' if assumed['hidden_size'] == 768 else 'large'} (heads {assumed['num_attention_heads']}, gelu, "
        "epsilon 1e-12, padding 0), which shapes cannot prove; its own config.json, given by --text, would"
    )
    return assumed


def _fetch_text(name: str) -> str:
    """The command that puts a text model's small files into a folder."""
    if name.startswith("/") or name.count("/") > 1:
        name = "OWNER/NAME"
    return f"hf download {name} --include 'config.json' 'vocab*' 'merges.txt' '*token*' '*.model' --local-dir DIR"


def _assume_bert(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any] | None:
    start = next((name for name in shapes if name.endswith("embeddings.word_embeddings.weight")), None)
    if start is None:
        return None
    root = start.removesuffix("embeddings.word_embeddings.weight")
    vocabulary, width = shapes[start]
    positions = shapes.get(f"{root}embeddings.position_embeddings.weight", (0,))[0]
    types = shapes.get(f"{root}embeddings.token_type_embeddings.weight", (0,))[0]
    inner = shapes.get(f"{root}encoder.layer.0.intermediate.dense.weight", (0,))[0]
    layers = sum(
        name.startswith(f"{root}encoder.layer.") and name.endswith("attention.self.query.weight") for name in shapes
    )
    wanted = {768: 12, 1024: 24}
    if width not in _BERTS or positions != 512 or types != 2 or layers != wanted[width] or inner != 4 * width:
        return None
    return {
        "model_type": "bert",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": _BERTS[width],
        "intermediate_size": inner,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": positions,
        "type_vocab_size": types,
        "pad_token_id": 0,
    }


def _tokens(
    path: Path | None, text: Path | None, config: Mapping[str, Any], inner: Mapping[str, Any] | None, weights: Path
) -> Tokens:
    """The tokenizer of a model in open_clip's form, of files unless it is open_clip's own."""
    text_cfg = config["text_cfg"]
    context, options = text_cfg.get("context_length", 77), dict(text_cfg.get("tokenizer_kwargs") or {})
    ours = config.get(OURS, {}).get("tokenizer")
    if not text_cfg.get("hf_tokenizer_name") and inner is None and ours is None:
        return ClipTokens(context, options)
    if text_cfg.get("tokenizer_mode") or set(options) - {"clean", "strip_sep_token"}:
        raise BackboneError(
            f"the tokenizer is used in a way that is not read here ({text_cfg.get('tokenizer_mode') or options}); "
            "expected one that open_clip uses plainly: choose another model"
        )
    kind = str((inner or {}).get("model_type") or ("siglip" if "iglip" in json.dumps(config) else "clip"))
    for place in filter(None, (path, text, None if path is None else path / TEXT)):
        if ours is not None and (place / "tokenizer.json").is_file():
            found: FileTokens | None = FileTokens(_read_json(place / "tokenizer.json"), context, ours)
        else:
            found = read_tokenizer(place, context, kind, options.get("clean", "whitespace"), options)
        if found is not None:
            _refuse_tokens(place, found, (inner or text_cfg).get("vocab_size", 49408))
            pad = None if inner is None else inner.get("pad_token_id")
            if pad is not None and pad != found.pad:
                raise BackboneError(
                    f"{place}: the tokenizer fills up with {found.pad}, but the text model takes {pad} for that; "
                    "expected files of one model: give the text model's own by --text"
                )
            return found
    name = text_cfg.get("hf_tokenizer_name") or text_cfg.get("hf_model_name") or "its own"
    raise _no_tokenizer(path or weights, f"its tokenizer, that of {name},", str(name))


def _no_tokenizer(path: Path, what: str, name: str | None = None) -> BackboneError:
    fetch = "" if name is None else f": where there is internet, {_fetch_text(name)}, and give that folder by --text"
    return BackboneError(
        f"{path}: {what} is not here, without which no prompt can be read; expected tokenizer.json, "
        f"vocab.txt, vocab.json with merges.txt, or spiece.model{fetch or ' beside the weights: copy the whole folder'}"
    )


def _refuse_tokens(path: Path, tokens: FileTokens, vocabulary: int) -> None:
    if tokens.largest >= vocabulary:
        raise BackboneError(
            f"{path}: the tokenizer has token {tokens.largest}, but the text tower {vocabulary} of them, from 0; "
            "expected files of one model: copy the folder again"
        )


def _open_clip_preprocess(config: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    from open_clip.transform import PreprocessCfg, merge_preprocess_dict

    merged: dict[str, Any] = merge_preprocess_dict(asdict(PreprocessCfg()), dict(given))
    size = config["vision_cfg"].get("image_size", 224)
    merged["size"] = list(size) if isinstance(size, list | tuple) else [size, size]
    for key in ("mean", "std"):
        value = merged[key]
        merged[key] = [float(one) for one in (value if isinstance(value, list | tuple) else [value] * 3)]
    return merged | {"cut": "round"}


def _name_of(config: Mapping[str, Any]) -> str | None:
    """The name that open_clip has for a configuration, if it has one."""
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg

    def normal(one: Mapping[str, Any]) -> Any:
        ours = one.get(OURS, {})
        quick = bool(one.get("quick_gelu"))
        towers = []
        for key, made, act in (("vision_cfg", CLIPVisionCfg, "vision"), ("text_cfg", CLIPTextCfg, "text")):
            table = asdict(made(**one[key]))
            for unread in ("hf_tokenizer_name", "tokenizer_kwargs", "timm_model_pretrained", "hf_model_pretrained"):
                table.pop(unread, None)
            table["mlp_ratio"] = round(float(table["mlp_ratio"]), 3)
            if act in ours and (
                ours[act]["activation"] != ("quickgelu" if quick else "gelu") or ours[act]["eps"] != 1e-5
            ):
                return None
            towers.append(table)
        return one["embed_dim"], quick, bool(one.get("custom_text")), towers, "multimodal_cfg" in one

    try:
        wanted = normal(config)
    except TypeError:
        return None
    if wanted is None or "trunk" in config.get(OURS, {}).get("vision", {}):
        return None
    for name in open_clip().list_models():
        one = open_clip().get_model_config(name)
        if one["embed_dim"] == config["embed_dim"] and normal(one) == wanted:
            return str(name)
    return None


def _peft(path: Path) -> BackboneError:
    base = _read_json(path / "adapter_config.json").get("base_model_name_or_path") or "BASE"
    return BackboneError(
        f"{path}: a PEFT adapter of {base}, not a whole model; expected the two merged. Where both are, these lines "
        "do it:\n"
        "  from peft import PeftModel; from transformers import AutoModel, AutoProcessor\n"
        f"  PeftModel.from_pretrained(AutoModel.from_pretrained({base!r}), {str(path)!r}).merge_and_unload()"
        ".save_pretrained('merged')\n"
        f"  AutoProcessor.from_pretrained({base!r}).save_pretrained('merged')"
    )


# --- files ---


def _read_file(
    path: Path, model: str | None, tag: str | None, activation: str | None, text: Path | None, seeded: bool
) -> Form:
    if model is None:
        raise BackboneError(_unnamed(path))
    if model.startswith(HUB):
        raise BackboneError(
            f"{path}: {model} is more than its weights (its configuration, a tokenizer); expected its whole folder, as "
            "secfacmic backbone fetch writes it or a hub's cache holds it"
        )
    config = known_model(model)
    quick = is_archive(path)
    if quick and not config.get("quick_gelu") and activation != "quickgelu":
        raise BackboneError(
            f"{path}: an OpenAI archive, trained with QuickGELU, but model {model} has none; expected a model such as "
            f"{model}{_TWIN}: name that one in the study"
        )
    if not seeded and not (quick and config.get("quick_gelu")):
        model = with_activation(model, tag, activation, str(path))
        config = known_model(model)
    told: list[str] = []
    inner = None
    if "hf_model_name" in config["text_cfg"]:
        name = config["text_cfg"]["hf_model_name"]
        if text is None:
            raise BackboneError(
                f"{path}: the text tower of {model} is {name}, whose configuration and tokenizer are not in a "
                f"checkpoint; give the folder that has them by --text: where there is internet, {_fetch_text(name)}"
            )
        inner = _text_model(path.parent, text, name, path, told)
    tokens = _tokens(None, text, config, inner, path)
    return Form(
        "an OpenAI archive" if quick else "a checkpoint",
        model,
        config,
        _open_clip_preprocess(config, _local_preprocessing(model, tag)),
        path,
        tokens,
        inner,
        None,
        told,
    )


def _unnamed(path: Path) -> str:
    tensors = {name: tuple(value.shape) for name, value in read_weights(path).items()}
    if any("text_model.encoder.layers." in name for name in tensors):
        return (
            f"{path}: weights under transformers' names, without their config.json; expected the whole folder: name "
            "the folder"
        )
    found = which_fit(tensors)
    if not found:
        return (
            f"{path}: a checkpoint does not say of which model it is, and fits none that open_clip knows"
            f"{_without_text(tensors)}; name it with --model, or give the folder with its configuration"
        )
    return (
        f"{path}: a checkpoint does not say of which model it is; its shapes fit {', '.join(found)}: name the right "
        "one with --model, as the study does"
    )


def which_fit(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Names of open_clip's models that have these names and shapes, whatever prefix the names have."""
    tables = [{name.removeprefix(prefix): shape for name, shape in shapes.items()} for prefix in _prefixes(shapes)]
    found = []
    for model in open_clip().list_models():
        config = open_clip().get_model_config(model)
        text, dim = config["text_cfg"], config["embed_dim"]
        if "hf_model_name" in text or not any(dim in shape for shape in shapes.values()):
            continue
        token = (text.get("vocab_size", 49408), text.get("width", 512))
        if not any(shape == token for shape in shapes.values()):
            continue
        try:
            wanted = {name: tuple(value.shape) for name, value in make_network(config).state_dict().items()}
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


def _prefixes(shapes: Mapping[str, Any]) -> list[str]:
    found = {name.split("visual.")[0] for name in shapes if "visual." in name}
    return sorted(found | {""}, key=len)[:4]


def _without_text(shapes: Mapping[str, Any]) -> str:
    named = any("text" in name or "token_embedding" in name or name.startswith("transformer.") for name in shapes)
    return "" if named else ", and has no text tower, which prompts need"


def _local_preprocessing(model: str, known_tag: str | None = None) -> dict[str, Any]:
    """What open_clip, which knows the preprocessing of its tags but not of a local file, is to be told.

    That of the tag whose weights the file holds, if the study names one. Else, if all the tags published for a model
    agree, then a file of that model is treated alike; otherwise, and for models of our own, open_clip's default
    (OpenAI's) holds. The image size is always the model's.
    """
    tags = open_clip().list_pretrained_tags_by_model(model)
    if known_tag in tags:
        tags = [known_tag]
    found = [open_clip().get_pretrained_cfg(model, tag) for tag in tags]
    known = [{key: tag[key] for key in _SHARED_KEYS} for tag in found]
    return dict(known[0]) if known and all(entry == known[0] for entry in known) else {}


# --- networks ---


def _as_open_clip(form: Form, network: nn.Module, tensors: Tensors, expected: Mapping[str, tuple[int, ...]]) -> Tensors:
    """Tensors under the names of this open_clip, of which some were others before."""
    from open_clip.convert import convert_state_dict
    from open_clip.model import convert_to_custom_text_state_dict

    anchors = [name for name in expected if name.startswith("visual.")]
    tensors = without_prefix(tensors, anchors, form.weights)
    tensors = convert_state_dict(network, tensors)
    if "positional_embedding" in tensors and not hasattr(network, "positional_embedding"):
        tensors = convert_to_custom_text_state_dict(tensors)
    tensors.pop("attn_mask", None)
    if "text.transformer.embeddings.position_ids" not in expected:
        tensors.pop("text.transformer.embeddings.position_ids", None)
    return tensors


def _refuse_misfit(form: Form, expected: Mapping[str, tuple[int, ...]], tensors: Tensors) -> None:
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
    if any("text_model.encoder.layers." in name for name in strange) and form.convert is None:
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
    fits = which_fit(shapes) if form.convert is None else []
    advice = f"its shapes fit {', '.join(fits)}" if fits else "get the weights of that very model"
    raise BackboneError(
        f"{form.weights}: not loaded as {form.model}: {'; '.join(parts)}{_without_text(shapes)}; expected that model's "
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
    names, heads, epsilons = set(), set(), set()
    for module in (module for part in parts for module in part.modules()):
        name = type(module).__name__.lower()
        name = _ACTIVATION_NAMES.get(name, name)
        if isinstance(module, nn.GELU):
            name = "gelu_tanh" if module.approximate == "tanh" else "gelu"
        if name in _ACTIVATIONS:
            names.add(name)
        for key in ("num_heads", "num_attention_heads"):
            value = getattr(module, key, None)
            if isinstance(value, int):
                heads.add(value)
        value = getattr(module, "eps", None)
        if isinstance(value, float):
            epsilons.add(value)
    return {"activation": sorted(names), "heads": sorted(heads), "eps": sorted(epsilons)}


@contextmanager
def _parameters(empty: bool) -> Iterator[None]:
    """Within, modules that this thread makes get parameters without memory; buffers are real, as some are computed."""
    if not empty:
        yield
        return
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


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BackboneError(f"{path}: no whole JSON file; copy the folder again from where it came from") from error
    if not isinstance(content, dict):
        raise BackboneError(f"{path}: holds no JSON object; copy the folder again from where it came from")
    return content

"""The forms in which a frozen CLIP comes, each turned into one: open_clip's configuration, names and a tokenizer.

Read are a folder of our own store, a hub snapshot in open_clip's form, a folder in transformers' form (``clip`` and
``siglip``), and single checkpoints of a model that open_clip knows by name. A configuration beats what shapes suggest;
where neither says what a model is, nothing is guessed. No hub is asked and no code of a folder is run.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from secure_fed.core.errors import BackboneError
from secure_fed.model import transformers_form as theirs
from secure_fed.model.given_files import (
    OTHER_FORMATS,
    Foreign,
    checked,
    is_tensorflows,
    lost_link,
    other_kind,
    read_json,
)
from secure_fed.model.library import HUB, known_model, name_of, offline, open_clip, same_model, with_activation
from secure_fed.model.model_config import OURS, check_model_config
from secure_fed.model.network import Form, under_transformers_names, which_fit, without_text
from secure_fed.model.preparing import read_preprocessing, usual_preprocessing
from secure_fed.model.text_model import TEXT, fetch_text, read_text_model
from secure_fed.model.tokenizer import ClipTokens, FileTokens, Tokens, read_own_tokenizer, read_tokenizer
from secure_fed.model.tokenizer_class import read_config
from secure_fed.model.torchscript_file import is_openais
from secure_fed.model.weights import SUFFIXES, adapter_alone, read_weights

ENTRY = "backbone.json"
CONFIG = "open_clip_config.json"

_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json", "open_clip_model.safetensors.index.json")
_SPARE = 255
"""Tokens, at most, by which tables of them are filled up to round numbers."""

_NO_WEIGHTS = ("openvino_", "training_args", "optimizer", "scheduler", "rng_state", "scaler", "sampler")
_TEXT_ALONE = ("clip_text_model", "siglip_text_model", "bert", "roberta", "xlm-roberta", "distilbert")
_IMAGES_ALONE = ("clip_vision_model", "siglip_vision_model", "vit", "dinov2", "dinov3_vit", "beit", "swin", "vit_mae")


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
        text: folder with ``config.json`` (and tokenizer) of a text model of transformers; a hub's cache folder too.
        seeded: the weights are random, so that the model's name decides about their activation.

    Raises:
        BackboneError: it is none of the forms, or not whole; with what to do.
    """
    if text is not None and not text.is_dir():
        raise BackboneError(f"{text}: no such folder; expected one with config.json and tokenizer of a text model")
    if text is not None and (text / "snapshots").is_dir():
        text = _snapshot(text)
    with offline():
        if path.is_dir():
            form = _read_folder(path, model, tag, activation, text, seeded)
            form.licence = _licence(form.weights.parent)
        elif path.is_file() or path.is_symlink():
            form = _read_file(path, model, tag, activation, text, seeded)
        else:
            raise BackboneError(
                f"{path}: no such file; expected a checkpoint, or a folder with one and its configuration"
            )
    vocabulary = (form.text or form.config["text_cfg"]).get("vocab_size") or 49408
    if (unused := vocabulary - 1 - form.tokens.largest) > _SPARE:
        form.told.append(
            f"that {unused} of the text tower's {vocabulary} tokens are none of its tokenizer's, whose highest is "
            f"{form.tokens.largest}, is as it should be; if its vocabulary was cut on the way, words are unknown"
        )
    if text is not None and not {"hf_model_name", "hf_tokenizer_name"} & set(form.config["text_cfg"]):
        raise BackboneError(
            f"{path}: {form.kind}, which has a text tower and a tokenizer of its own, so that nothing is taken from "
            f"{text}; leave --text out"
        )
    return form


def named(name: str | None, path: Path) -> tuple[str | None, str | None]:
    """Model and tag that somebody names for a file or folder.

    Args:
        name: ``MODEL`` or ``MODEL:TAG`` of a checkpoint; ``hf-hub:OWNER/NAME`` or what else a folder is to be called.
        path: of it.

    Raises:
        BackboneError: it is no such name, or open_clip does not know the tag.
    """
    if name is None:
        return None, None
    if not name.strip() or len(name) > 200 or not name.isprintable():
        raise BackboneError(f"model {name[:60]!r}: no name; expected one that people can read, or leave --model out")
    if name.startswith(HUB):
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", name.removeprefix(HUB)):
            raise BackboneError(f"{name}: expected {HUB}OWNER/NAME")
        return name, None
    model, _, tag = name.partition(":")
    if path.is_dir() or not tag:
        return name, None
    known = open_clip().list_pretrained_tags_by_model(model)
    if tag not in known:
        raise BackboneError(f"{name}: open_clip knows no such tag; of {model} it knows {', '.join(known) or 'none'}")
    return model, tag


# --- folders ---


def _read_folder(
    path: Path, model: str | None, tag: str | None, activation: str | None, text: Path | None, seeded: bool
) -> Form:
    if (path / "snapshots").is_dir():
        return _read_folder(_snapshot(path), model or _repository(path), tag, activation, text, seeded)
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
        raise adapter_alone(path)
    if model is None and path.resolve().parent.name == "snapshots":
        model = _repository(path.resolve().parent.parent)
    if (path / CONFIG).is_file() and not is_transformers_alone(path):
        return _read_open_clip(path, model, text)
    if (path / "config.json").is_file():
        return _read_transformers(path, model)
    below = [] if _is_a_backbones(path) else _below(path)
    if below:
        shown = ", ".join(str(one.relative_to(path)) for one in below[:5])
        raise BackboneError(
            f"{path}: no weights and no configuration in it, but in {len(below)} folders below it ({shown}"
            f"{' and so on' if len(below) > 5 else ''}); expected the folder of one backbone: name that one"
        )
    found = _weights_in(path, ())
    if model is None or model.startswith(HUB):
        fits = which_fit({name: tuple(value.shape) for name, value in read_weights(found).items()})
        named = f", or, if it is a checkpoint of {' or '.join(fits)}, whose shapes it has, name that with --model"
        raise BackboneError(
            f"{path}: has no {CONFIG} and no config.json, without which {found.name} does not say what it is; copy the "
            f"whole folder{named if fits else ''}"
        )
    return _read_file(found, model, tag, activation, text or path, seeded)


def _repository(cache: Path) -> str | None:
    """The name of the repository that a hub's cache folder is of; None of any other folder."""
    owner, _, name = cache.name.removeprefix("models--").partition("--")
    return f"{HUB}{owner}/{name}" if cache.name.startswith("models--") and name else None


def _is_a_backbones(folder: Path) -> bool:
    """Whether there is anything in a folder itself of which backbones are read, or which is named when refused."""
    return any(
        one.name == "snapshots"
        if one.is_dir()
        else one.name in (CONFIG, "config.json", "adapter_config.json")
        or one.suffix.lower() in (*SUFFIXES, *OTHER_FORMATS)
        for one in _seen(folder)
    )


def _below(folder: Path, depth: int = 2) -> list[Path]:
    """Folders below one that may be a backbone's, as those of a hub's cache, a stick or a training."""
    found = []
    for one in _seen(folder):
        if one.is_dir() and _is_a_backbones(one):
            found.append(one)
        elif one.is_dir() and depth > 1:
            found += _below(one, depth - 1)
    return found


def _seen(folder: Path) -> list[Path]:
    """What lies in a folder, hidden things apart; nothing if this user may not look, as into a stick's lost+found."""
    try:
        return sorted(one for one in folder.iterdir() if not one.name.startswith("."))
    except OSError:
        return []


def _licence(folder: Path) -> str | None:
    """What the head of a hub's README says."""
    readme = folder / "README.md"
    if not readme.is_file():
        return None
    head = readme.read_text("utf-8", "replace")[:4000]
    found = dict(re.findall(r"^(license(?:_name)?):[ ]*([\w.+-]{1,60})[ ]*$", head, re.MULTILINE))
    return found.get("license_name") or found.get("license")  # which is "other" where there is a name


def _snapshot(path: Path) -> Path:
    """The snapshot of a hub's cache folder that its main branch means."""
    found = sorted(one for one in (path / "snapshots").glob("*") if one.is_dir())
    ref = path / "refs" / "main"
    main = ref.read_text("utf-8", "replace").strip() if ref.is_file() else ""
    if path / "snapshots" / main in found:
        return path / "snapshots" / main
    if main and found:
        raise BackboneError(
            f"{path}: its main branch (refs/main) is snapshot {main[:40]}, which is not here, but "
            f"{', '.join(one.name for one in found[:3])}; expected that one: copy the whole cache folder again, or "
            "name the folder below snapshots that is meant"
        )
    if len(found) != 1:
        raise BackboneError(
            f"{path}: {len(found)} snapshots, and no refs/main that names one of them; expected one: name the folder "
            "below snapshots that is meant, or copy the whole cache folder again"
        )
    return found[0]


class _File(Foreign):
    """``open_clip_config.json``."""

    model_cfg: dict[str, Any]
    preprocess_cfg: dict[str, Any] | None = None


def _read_open_clip(path: Path, model: str | None, text: Path | None) -> Form:
    where = path / CONFIG
    content = read_json(where)
    file = checked({"model_cfg": content} if "vision_cfg" in content else content, _File, where)
    if "vision_cfg" in file.model_cfg and "text_cfg" not in file.model_cfg:
        raise BackboneError(
            f"{where}: of an image tower alone (no text_cfg), without the text tower that prompts need; expected a "
            "whole CLIP: choose another model"
        )
    config = check_model_config(file.model_cfg, f"{where}, model_cfg")
    told: list[str] = []
    own = (path / ENTRY).is_file()
    weights = _weights_in(path, _named_open_clip(path))
    inner = None
    name = config["text_cfg"].get("hf_model_name")
    if name is not None:
        inner = read_text_model(path, text, name, weights, told)
    if not file.preprocess_cfg:
        told.append(f"{CONFIG} has no preprocess_cfg: open_clip's usual mean, std and cut are taken")
    preprocess = read_preprocessing(config, file.preprocess_cfg or {}, f"{where}, preprocess_cfg")
    stated = (file.preprocess_cfg or {}).get("size")
    if stated is not None and preprocess["size"] != (stated if isinstance(stated, list) else [stated] * 2):
        told.append(
            f"preprocess_cfg says size {stated}, but the model takes {preprocess['size'][0]} x "
            f"{preprocess['size'][1]}, which holds for open_clip too"
        )
    tokens = _tokens(path, text, config, inner, weights)
    return Form(
        "a folder of secfacmic's store" if own else "a folder in open_clip's form",
        model if own and model is not None else _called(path, model, config),
        config,
        preprocess,
        weights,
        tokens,
        inner,
        None,
        told,
    )


def is_transformers_alone(path: Path) -> bool:
    """Whether a folder with both configurations has weights under transformers' names only."""
    if not _named_open_clip(path) or any((path / name).is_file() for name in OPEN_CLIP_NAMES):
        return False
    return under_transformers_names(read_weights(_weights_in(path, TRANSFORMERS_NAMES)))


def _called(path: Path, model: str | None, config: Mapping[str, Any]) -> str:
    """What a folder's model is to be called: not by a name that open_clip has for another one."""
    is_one = name_of(config)
    if model is None and is_one is None and re.fullmatch(r"[0-9a-f]{40}", path.resolve().name):
        raise BackboneError(
            f"{path}: a snapshot of a hub's cache, whose name says nothing of its model; expected the cache folder "
            f"models--OWNER--NAME with it, or the name by --model {HUB}OWNER/NAME"
        )
    if model is None:
        return is_one or path.resolve().name
    plain = model if model.startswith(HUB) else model.partition(":")[0]
    if plain != model or (plain in open_clip().list_models() and not same_model(config, known_model(plain))):
        raise BackboneError(
            f"{path}: is not {model}, but by its configuration {is_one or 'none that open_clip knows by name'}; "
            f"expected that name, {HUB}OWNER/NAME, or no --model at all"
        )
    return model


class _Processor(Foreign):
    """``processor_config.json``."""

    image_processor: dict[str, Any] = Field(default_factory=dict)


def _read_transformers(path: Path, model: str | None) -> Form:
    where = path / "config.json"
    content = read_json(where)
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
            if kind in _IMAGES_ALONE or (kind is None and "architecture" in content)  # timm's
            else "a text model alone, without an image tower"
            if kind in _TEXT_ALONE
            else "another kind of model"
        )
        named = "no model_type" if kind is None else f"model_type {kind!r}"
        raise BackboneError(
            f"{path}: {named} in config.json, {what}; expected clip or siglip, or a folder with {CONFIG}"
        )
    if not any(content.get(f"{tower}_config{more}") for tower in ("text", "vision") for more in ("", "_dict")):
        raise BackboneError(f"{where}: says nothing of its towers (text_config, vision_config); copy it again")
    config = theirs.model_config(content, str(where))
    size = config["vision_cfg"]["image_size"]
    found, how = path / "preprocessor_config.json", {}
    if found.is_file():
        how = read_json(found)
    nested = path / "processor_config.json"
    if nested.is_file() and (inner := checked(read_json(nested), _Processor, nested).image_processor):
        ways = [theirs.preprocessing(one, size, kind, str(nested)) for one in (inner, how or inner)]
        if ways[0] != ways[1]:  # transformers 5 reads this one, 4 the other
            raise BackboneError(
                f"{nested}: its image_processor prepares images otherwise than {found.name}, and versions of "
                "transformers differ in which they read; expected one: remove the file that is not meant"
            )
        found, how = nested, inner
    if not how:
        raise BackboneError(
            f"{path}: has no preprocessor_config.json, where size, mean and std of its images stand; copy the whole "
            "folder"
        )
    tokens = read_tokenizer(path, config["text_cfg"]["context_length"], kind, "none", {})
    if tokens is None:
        raise _no_tokenizer(path, "its tokenizer")
    _refuse_tokens(path, tokens, config["text_cfg"]["vocab_size"])
    if kind == "siglip" and "attention_mask" in (read_config(path).model_input_names or ["attention_mask"]):
        raise BackboneError(  # a CLIP's texts are read at their end, before all that a mask would hide
            f'{path}: tokenizer_config.json does not say model_input_names = ["input_ids"], so that transformers hides '
            "what fills short texts up from the text tower, which SigLIP's makers let it read; expected that key, as "
            "SigLIP's have it: write it in if the model was trained so; else it is not read"
        )
    return Form(
        f"a folder in transformers' form, {kind}",
        _called(path, model, config),
        config,
        theirs.preprocessing(how, size, kind, str(found)),
        _weights_in(path, TRANSFORMERS_NAMES),
        tokens,
        None,
        kind,
    )


def _weights_in(path: Path, names: tuple[str, ...]) -> Path:
    """The checkpoint in a folder: of the names if any is there, else the only one; several must be equal."""
    # Hidden ones are no weights: macOS writes ._model.safetensors beside each file on a stick.
    inside = [one for one in sorted(path.iterdir()) if one.is_file() and not one.name.startswith(".")]
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
        shards = [one.name for one in inside if "-of-" in one.name and not is_tensorflows(one)]
        if shards:
            raise BackboneError(
                f"{path}: {len(shards)} shards ({shards[0]} and so on) without the index that belongs to them; copy "
                "the whole folder again"
            )
        below = [one for folder in _seen(path) if folder.is_dir() for one in _seen(folder)]  # as onnx/model.onnx
        others = [one for one in (*inside, *below) if one.is_file() and other_kind(one, b"") is not None]
        if others:
            read_weights(others[0])
        if any(one.name.endswith("_model_states.pt") for one in below):
            raise BackboneError(
                f"{path}: a checkpoint of DeepSpeed, whose parts are not read; expected whole weights: python "
                f"zero_to_fp32.py {path} DIR, by the script that DeepSpeed puts beside them"
            )
        raise BackboneError(f"{path}: no weights in it; the folder is half copied: copy all of it again")
    contents = {_content(one) for one in found}
    if len(contents) > 1:
        raise BackboneError(
            f"{path}: {len(found)} checkpoints that differ ({', '.join(one.name for one in found)}); expected one: "
            "remove those that are not meant"
        )
    return min(found, key=lambda one: (one.suffix != ".safetensors", one.name))


OPEN_CLIP_NAMES = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
    "open_clip_model.safetensors.index.json",
)
TRANSFORMERS_NAMES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_FOREIGN = (*OPEN_CLIP_NAMES, *TRANSFORMERS_NAMES)


def _named_open_clip(path: Path) -> tuple[str, ...]:
    """Names of open_clip's checkpoints where the folder also holds the model in transformers' form."""
    content = read_json(path / "config.json") if (path / "config.json").is_file() else {}
    both = content.get("model_type") in ("clip", "siglip") or "architecture" in content  # transformers' or timm's
    return OPEN_CLIP_NAMES if both else ()


def _content(path: Path) -> str:
    """A digest of a checkpoint's values, however it stores them."""
    total = hashlib.sha256()
    tensors = read_weights(path)
    for name in sorted(tensors):
        value = tensors.pop(name)
        if name.endswith("embeddings.position_ids"):  # counts from 0, and only older files of transformers have it
            continue
        value = value.float() if value.is_floating_point() else value
        total.update(f"{name} {tuple(value.shape)}\n".encode())
        total.update(np.ascontiguousarray(value.numpy()).tobytes())
    return total.hexdigest()


_CLEANED = ("whitespace", "lower", "canonicalize")
"""Ways of open_clip to clean a text."""


def _tokens(
    path: Path | None, text: Path | None, config: Mapping[str, Any], inner: Mapping[str, Any] | None, weights: Path
) -> Tokens:
    """The tokenizer of a model in open_clip's form, of files unless it is open_clip's own."""
    text_cfg = config["text_cfg"]
    context, options = text_cfg.get("context_length") or 77, dict(text_cfg.get("tokenizer_kwargs") or {})
    clean, ours = options.get("clean", "whitespace"), (config.get(OURS) or {}).get("tokenizer")
    files = bool(text_cfg.get("hf_tokenizer_name") or inner or ours)
    known = {"clean", "strip_sep_token"} if files else {"clean"}
    if text_cfg.get("tokenizer_mode") or set(options) - known or clean not in _CLEANED:
        raise BackboneError(
            f"{path or weights}: its tokenizer is used in a way that is not read here "
            f"({text_cfg.get('tokenizer_mode') or options}); expected one that open_clip uses plainly: choose another "
            "model"
        )
    vocabulary = (inner or text_cfg).get("vocab_size") or 49408
    if not files:
        own = ClipTokens(context, options)
        _refuse_tokens(path or weights, own, vocabulary)
        return own
    kind = str((inner or {}).get("model_type") or ("siglip" if "iglip" in json.dumps(config) else "clip"))
    for place in filter(None, (path, text, None if path is None else path / TEXT)):
        if ours is not None and (place / "tokenizer.json").is_file():
            found: FileTokens | None = read_own_tokenizer(place / "tokenizer.json", context, ours)
        else:
            found = read_tokenizer(place, context, kind, clean, options)
        if found is not None:
            _refuse_tokens(place, found, vocabulary)
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
    fetch = "" if name is None else f": where there is internet, {fetch_text(name)}, and give that folder by --text"
    return BackboneError(
        f"{path}: {what} is not here, without which no prompt can be read; expected tokenizer.json, "
        f"vocab.txt, vocab.json with merges.txt, or spiece.model{fetch or ' beside the weights: copy the whole folder'}"
    )


def _refuse_tokens(path: Path, tokens: Tokens, vocabulary: int) -> None:
    if tokens.largest >= vocabulary:
        raise BackboneError(
            f"{path}: the tokenizer has token {tokens.largest}, but the text tower {vocabulary} of them, from 0; "
            "expected files of one model: copy the folder again"
        )


# --- files ---


def _read_file(
    path: Path, model: str | None, tag: str | None, activation: str | None, text: Path | None, seeded: bool
) -> Form:
    if lost_link(path):
        read_weights(path)  # which says so
    if path.suffix == ".json" and not path.name.endswith(".index.json"):
        raise BackboneError(f"{path}: is no checkpoint; expected one, or the folder of a backbone: name the folder")
    if re.search(r"-of-\d+\.", path.name) and not is_tensorflows(path):
        raise BackboneError(
            f"{path}: one of several shards; expected all of them with their index: name the folder, or the index"
        )
    if model is None:
        raise BackboneError(_unnamed(path))
    if model.startswith(HUB):
        raise BackboneError(
            f"{path}: {model} is more than its weights (its configuration, a tokenizer); expected its whole folder, as "
            "secfacmic backbone fetch writes it or a hub's cache holds it"
        )
    config = known_model(model)
    quick = is_openais(path)
    if quick and not config.get("quick_gelu") and activation != "quickgelu":
        raise BackboneError(
            f"{path}: an OpenAI archive, trained with QuickGELU, but model {model} has none; expected a model such as "
            f"{model}-quickgelu: name that one in the study"
        )
    if not seeded and not (quick and config.get("quick_gelu")):
        model = with_activation(model, tag, activation, str(path))
        config = known_model(model)
    told: list[str] = []
    inner = None
    name = config["text_cfg"].get("hf_model_name")
    if name is not None:
        if text is None:
            raise BackboneError(
                f"{path}: the text tower of {model} is {name}, whose configuration and tokenizer are not in a "
                f"checkpoint; give the folder that has them by --text: where there is internet, {fetch_text(name)}"
            )
        inner = read_text_model(path.parent, text, name, path, told)
    tokens = _tokens(None, text, config, inner, path)
    usual = usual_preprocessing(model, tag)
    if not usual and not quick and not seeded and open_clip().list_pretrained_tags_by_model(model):
        told.append(
            f"mean, std and resizing of {model}, of which its published tags have several, are open_clip's usual ones; "
            "if the weights come from a tag, name it: --model MODEL:TAG"
        )
    return Form(
        "an OpenAI archive" if quick else "a checkpoint",
        model,
        config,
        read_preprocessing(config, usual, str(path)),
        path,
        tokens,
        inner,
        None,
        told,
    )


def _unnamed(path: Path) -> str:
    shapes = {name: tuple(value.shape) for name, value in read_weights(path).items()}
    found = which_fit(shapes)
    if under_transformers_names(shapes):
        like = f" (its shapes are those of {', '.join(found)})" if found else ""
        return (
            f"{path}: weights under transformers' names{like}, without their config.json; expected the whole folder: "
            "name the folder"
        )
    if not found:
        return (
            f"{path}: a checkpoint does not say of which model it is, and fits none that open_clip knows"
            f"{without_text(shapes)}; name it with --model, or give the folder with its configuration"
        )
    return (
        f"{path}: a checkpoint does not say of which model it is; its shapes fit {', '.join(found)}: name the right "
        "one with --model, as the study does"
    )

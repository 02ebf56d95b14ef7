"""A study's frozen CLIP found and loaded: from a file, a folder, the store or a hub, and refused if it is another."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from shlex import quote

import torch

from secure_fed import configs
from secure_fed.core.errors import BackboneDigestError, BackboneError
from secure_fed.model import backbone_store
from secure_fed.model.backbone_form import named, read_form
from secure_fed.model.backbone_hub import download
from secure_fed.model.device import Device
from secure_fed.model.library import HUB, known_model, offline, open_clip, twin, with_activation
from secure_fed.model.loaded_backbone import LoadedBackbone
from secure_fed.model.network import build, make_network
from secure_fed.model.safetensors_file import write_weights
from secure_fed.protocol.study_tables import Backbone


def make_random_checkpoint(model: str, seed: int, path: Path) -> None:
    """Write an open_clip model with seeded random weights as a safetensors file, durably.

    The global random state stays as it was. Weights drawn on different kinds of CPU can differ in the last
    bits: make the file once and pass it on.

    Args:
        model: name of an open_clip model, builtin or of ours in ``configs/models``.
        seed: 0 or more, below 2**64.
        path: the file to write; its folder exists.

    Raises:
        BackboneError: there is no model of that name, or its tokenizer does not come with open_clip.
        StorageError: the file cannot be written.
    """
    config = known_model(model)
    text = config["text_cfg"]
    if needed := text.get("hf_model_name") or text.get("hf_tokenizer_name"):
        raise BackboneError(
            f"model {model}: its text tower or tokenizer is that of {needed}, which does not come with open_clip; "
            "random weights are made of models with open_clip's own, such as ViT-B-32 or random-small: name one"
        )
    with torch.random.fork_rng(devices=[]), _without_warnings():
        torch.manual_seed(seed)
        network = make_network(config, empty=False)
    write_weights(path, network.state_dict())


def load_backbone(backbone: Backbone, checkpoint: Path | None, device: Device = "cpu") -> LoadedBackbone:
    """Load the study's backbone; what is here asks no hub.

    Args:
        backbone: the study's table. A ``model`` that begins with ``hf-hub:`` names a repository of that hub.
        checkpoint: where the weights lie at this site, if not where the study says: a file or a folder of any form
            that :mod:`secure_fed.model.backbone_form` reads.
        device: where it is to compute, as :func:`secure_fed.model.device.choose_device` gives it.

    Raises:
        BackboneError: no such model or tag, or weights that are missing, unreadable, of another model or not usable.
        BackboneDigestError: the weights, or what decides about their features, are not those that the study names.
    """
    path = _path(backbone, checkpoint)
    if path is None:
        # Who names a digest has the weights somewhere already, and is not to tell a hub that this site takes part.
        with nullcontext() if backbone.digest is None else offline():
            form, source = download(backbone), backbone.tag or "hub"
    else:
        model = backbone.model
        if path.is_dir() and (path / backbone_store.ENTRY).is_file():
            entry = backbone_store.read_entry(path)
            if backbone.digest is None and not backbone_store.bears(entry, backbone):
                raise BackboneError(
                    f"{path}: holds {' and '.join(one.spoken[bool(one.tag)] for one in entry.names)}, not "
                    f"{backbone.model}{':' + backbone.tag if backbone.tag else ''}; expected the weights that are "
                    "named: name these in the template, or give those"
                )
            backbone_store.is_meant(entry, backbone)  # else refuse_others compares it
            model = model if model.startswith(HUB) else entry.model
        seeded = backbone.weights == "random"
        form = read_form(path, model, backbone.tag, backbone.activation, seeded=seeded)
        source = path.name if path.is_file() or checkpoint is not None else form.weights.name
    loaded = LoadedBackbone(build(form), form, f"{form.model} ({source})", device)
    refuse_others(backbone, loaded, str(path or backbone.model))
    if path is not None:
        refuse_damaged(path, loaded)
    return loaded


def load_given(
    path: Path, name: str | None = None, activation: str | None = None, text: Path | None = None, exact: bool = False
) -> tuple[LoadedBackbone, str | None, str]:
    """Load what somebody gives, of any form, under what they say of it.

    Args:
        path: a checkpoint or a folder, in any form that :mod:`secure_fed.model.backbone_form` reads.
        name: ``MODEL`` or ``MODEL:TAG``, needed for a checkpoint that does not come with secfacmic; of a folder,
            ``hf-hub:OWNER/NAME`` or what else it is to be called.
        activation: ``gelu`` or ``quickgelu``, for a checkpoint of a model that there is with both.
        text: folder with ``config.json`` and tokenizer of a text model of transformers.
        exact: as of :class:`LoadedBackbone`.

    Returns:
        The backbone, open_clip's tag if the weights are one, and the name of the file that they are of.

    Raises:
        BackboneError: it is no backbone, or one that cannot be used, or another one than is said.
        BackboneDigestError: the weights are not those that were fetched or added.
    """
    model, tag = named(name, path)
    source = Path(os.path.realpath(path)).name  # Path.resolve raises where links lead in a circle
    if not source.isprintable():
        raise BackboneError(f"{source!r}: a name with characters that no line can show; expected others: rename it")
    entry = backbone_store.read_entry(path) if (path / backbone_store.ENTRY).is_file() else None
    if path.parent == configs.MODELS:  # what comes along is called by its model's name
        model = model or path.stem
    if entry is not None:
        known = [one for one in entry.names if name is None or name in one.spoken]
        if not known:
            raise BackboneError(f"{path}: holds {entry.model}, not {name}; leave --model out, or name that one")
        if text is not None:
            raise BackboneError(
                f"{path}: has its text model's configuration and tokenizer, so that nothing is taken from {text}; "
                "leave --text out"
            )
        model, tag, source = known[0].model, known[0].tag, known[0].source
    form = read_form(path, model, tag, activation, text)
    form.licence = form.licence or (entry.licence if entry is not None else None)
    loaded = LoadedBackbone(build(form), form, f"{form.model} ({source})", exact=exact)
    if activation is not None and loaded.activation != activation:
        raise BackboneError(
            f"{path}: its activation is {loaded.activation}, not {activation}, which its configuration or container "
            "decides; leave --activation out"
        )
    refuse_damaged(path, loaded)
    return loaded, tag, source


def refuse_others(backbone: Backbone, loaded: LoadedBackbone, where: str) -> None:
    """Refuse a backbone that is not the one named.

    Raises:
        BackboneError: it has another activation than was named.
        BackboneDigestError: its weights, or what decides about their features, are others.
    """
    if backbone.digest is not None and loaded.digest != backbone.digest:
        raise BackboneDigestError(
            f"{where}: weights have digest {loaded.digest}, but the study names {backbone.digest}; "
            "get the checkpoint that the study was made with"
        )
    if backbone.activation is not None and loaded.activation != backbone.activation:
        raise BackboneError(
            f"{where}: its activation is {loaded.activation}, but {backbone.activation} is named; expected one: a "
            "configuration beside the weights decides, so leave activation out or take the other model"
        )
    if backbone.id is not None and loaded.id != backbone.id:
        raise BackboneDigestError(
            f"{where}: the weights are the study's, but with what decides about their features they have id "
            f"{loaded.id}, and the study names {backbone.id}: activation, heads, epsilon, pooler, context, tokenizer "
            "or preprocessing differ; get the whole folder that the study was made with"
        )


def refuse_damaged(folder: Path, loaded: LoadedBackbone) -> None:
    """Refuse what a folder of the store holds if it is no longer what was put there; other paths are passed over.

    Raises:
        BackboneDigestError: weights or configuration are others than its entry names.
    """
    if not (folder / backbone_store.ENTRY).is_file():
        return
    entry = backbone_store.read_entry(folder)
    for what, found, expected in (
        ("weights have digest", loaded.digest, entry.digest),
        ("with its configuration it has id", loaded.id, entry.id),
    ):
        if found != expected:
            raise BackboneDigestError(
                f"{folder}: {what} {found}, but {expected} was fetched or added; copy the folder again from where it "
                "was fetched, or add the backbone again: secfacmic backbone add"
            )


def image_size(backbone: Backbone) -> int | None:
    """Side in pixels of the square that a backbone sees; None for one that is not here and that no name tells."""
    if backbone.model in open_clip().list_models():
        size = known_model(backbone.model)["vision_cfg"].get("image_size", 224)
        return int(size[0] if isinstance(size, list | tuple) else size)
    path = None if backbone.file is None and backbone_store.find(backbone) is None else _path(backbone, None)
    if path is None or not path.is_dir():
        return None
    return int(read_form(path, backbone.model).preprocess["size"][0])


def is_here(backbone: Backbone) -> bool:
    """Whether the weights lie on this machine, so that :func:`load_backbone` asks nobody for them."""
    try:
        return _path(backbone, None) is not None
    except BackboneError:
        return False


def _path(backbone: Backbone, checkpoint: Path | None) -> Path | None:
    """Where the weights lie; None if they are to be fetched."""
    path = checkpoint
    if path is None and backbone.file is not None:
        given = Path(backbone.file)
        places = [given, configs.MODELS / given] if given.name == backbone.file else [given]
        path = next((one for one in places if one.exists()), None) or backbone_store.find(backbone)
        if path is None:
            which = f" --activation {backbone.activation}" if backbone.activation and twin(backbone.model) else ""
            raise BackboneError(
                f"{given}: no such file here, and none of that name or digest in {backbone_store.store_folder()}; "
                f"expected the weights of {backbone.model}: get the file that the study was made with, and add it: "
                f"secfacmic backbone add {quote(given.name)} --model {backbone.model}{which}"
            )
    if path is None:
        path = backbone_store.find(backbone)
    if path is None:
        if backbone.weights == "pretrained":
            return None
        raise BackboneError(
            f"backbone {backbone.model}: random weights, but no checkpoint was given; make it once with "
            "secfacmic backbone random, pass it to all sites and say where it lies"
        )
    if not path.exists():
        raise BackboneError(f"{path}: no such file; expected the weights of {backbone.model} there")
    return path


def refuse_other_gelu(backbone: Backbone) -> None:
    """Refuse a tag whose weights were trained with another activation than the model has; open_clip only warns.

    Raises:
        BackboneError: they were.
    """
    if backbone.tag is not None and not backbone.model.startswith(HUB):
        with_activation(backbone.model, backbone.tag, backbone.activation, backbone.model)


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Silence open_clip's warning, on the root logger, that weights are random: here they should be."""

    def errors_only(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR

    root = logging.getLogger()
    root.addFilter(errors_only)
    try:
        yield
    finally:
        root.removeFilter(errors_only)

"""Getting weights: downloaded where there is internet, carried over, and kept where studies find them."""

from __future__ import annotations

import fcntl
import filecmp
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import open_clip
from PIL import Image

from secure_fed.core.errors import BackboneDigestError, BackboneError, OutputError
from secure_fed.core.storage import make_folder, sync_folder, write_durable
from secure_fed.model.backbone import load_given, refuse_other_gelu
from secure_fed.model.backbone_form import CONFIG, ENTRY, named
from secure_fed.model.backbone_hub import download
from secure_fed.model.backbone_store import Entry, Name, read_entry, store_folder
from secure_fed.model.library import HUB
from secure_fed.model.loaded_backbone import LoadedBackbone
from secure_fed.model.model_config import OURS
from secure_fed.model.network import build
from secure_fed.model.safetensors_file import write_weights
from secure_fed.model.text_model import TEXT
from secure_fed.model.tokenizer import FileTokens
from secure_fed.protocol.study_tables import Backbone

WEIGHTS = "open_clip_model.safetensors"
"""Name of the weights in a folder of the store; open_clip looks for it first."""

_SAME = 1e-4
"""Features of one model, computed twice, differ by less."""


def fetch(name: str, to: Path) -> tuple[Path, LoadedBackbone]:
    """Download a backbone, and load it to see that it is whole.

    Args:
        name: ``MODEL:TAG`` of open_clip, or ``hf-hub:OWNER/NAME`` in open_clip's or transformers' form.
        to: gets a folder with the weights and all that else is needed to load them without internet.

    Returns:
        The folder, and the loaded backbone.

    Raises:
        BackboneError: there is no such model or tag, or it cannot be downloaded or loaded.
        OutputError: the folder is there already.
        StorageError: it cannot be written.
    """
    backbone = _named(name)
    refuse_other_gelu(backbone)
    folder = to / name.removeprefix(HUB).replace("/", "--").replace(":", ".")
    if folder.exists():
        raise OutputError(f"{folder}: exists already; expected a new folder: remove it, or choose another --to")
    make_folder(to)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=to) as cache:
        form = download(backbone, Path(cache))
        loaded = LoadedBackbone(build(form), form, f"{form.model} ({backbone.tag or form.weights.name})", exact=True)
        with _new_folder(folder) as new:
            _write(new, loaded, [Name(model=form.model, tag=backbone.tag, source=form.weights.name)])
    return folder, loaded


def add(
    path: Path, name: str | None, activation: str | None = None, text: Path | None = None
) -> tuple[Path, LoadedBackbone]:
    """Copy a backbone into this user's store, where every study that names its digest or id finds it.

    Args:
        path: a checkpoint or a folder, in any form that :mod:`secure_fed.model.backbone_form` reads.
        name: ``MODEL`` or ``MODEL:TAG``, needed for a checkpoint; of a folder, ``hf-hub:OWNER/NAME`` or what else it is
            to be called.
        activation: ``gelu`` or ``quickgelu``, for a checkpoint of a model that there is with both.
        text: folder with ``config.json`` and tokenizer of a text model of transformers.

    Returns:
        The folder in the store, and the loaded backbone.

    Raises:
        BackboneError: it is no backbone, or one that cannot be used.
        BackboneDigestError: the weights are not those that were fetched.
        StorageError: the store cannot be written.
    """
    loaded, tag, source = load_given(path, name, activation, text, exact=True)
    store = store_folder()
    make_folder(store)
    with _alone(store):
        return _keep(store, loaded, Name(model=loaded.form.model, tag=tag, source=source), _entry(path)), loaded


@contextmanager
def _alone(store: Path) -> Iterator[None]:
    """Wait until no other process writes to the store; where the file system has no such lock, without waiting."""
    descriptor = os.open(store, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _keep(store: Path, loaded: LoadedBackbone, name: Name, given: Entry | None) -> Path:
    """The folder in the store, made or mended, with this name and those of what was given beside its own."""
    kept = store / loaded.id
    there = _entry(kept)
    first = [] if there is None else there.names
    names = [*first, name, *([] if given is None else given.names)]
    names = list(dict.fromkeys(names))
    if there is not None:
        loaded.form.licence = loaded.form.licence or there.licence
    with tempfile.TemporaryDirectory(prefix=".new-", dir=store) as temporary:
        new = Path(temporary) / "backbone"
        make_folder(new)
        _write(new, loaded, names)
        if not _holds(kept, new) and not _is_whole(kept, loaded):
            if kept.exists():  # damaged since: what was given is whole, and the other goes with the temporary folder
                os.replace(kept, Path(temporary) / "damaged")
            os.replace(new, kept)
            sync_folder(store)
        elif names != first:
            os.replace(new / ENTRY, kept / ENTRY)
            sync_folder(kept)
    return kept


def _entry(folder: Path) -> Entry | None:
    """What a folder of ours says of itself; None for any other, or one whose entry is damaged."""
    try:
        return read_entry(folder)
    except BackboneError:
        return None


def _holds(kept: Path, new: Path) -> bool:
    """Whether a folder of the store has all that a new one of the same id has; its entry may have other names."""
    if _entry(kept) is None:
        return False
    names = [one.relative_to(new) for one in new.rglob("*") if one.is_file() and one.name != ENTRY]
    return all((kept / name).is_file() and filecmp.cmp(new / name, kept / name, shallow=False) for name in names)


def _is_whole(kept: Path, loaded: LoadedBackbone) -> bool:
    """Whether a folder of the store that differs from a new one of the same id is no damaged one, but the same said
    otherwise, as with a default that is left out; studies that name it stay as they are.

    Raises:
        BackboneError: it is whole, and its features are others.
    """
    try:
        there, _, _ = load_given(kept, exact=True)
    except (BackboneError, BackboneDigestError):
        return False
    texts = ["a head with a mass", "3 words", "an x-ray of the left arm, in two planes, of an adult"]
    grey = np.random.default_rng(0).integers(0, 256, (64, 48, 3)).astype(np.uint8)
    pictures = [Image.fromarray(grey), Image.fromarray(grey[:20].repeat(2, axis=1))]
    furthest = max(
        float(np.abs(there.encode_images(pictures) - loaded.encode_images(pictures)).max()),
        float(np.abs(there.encode_texts(texts) - loaded.encode_texts(texts)).max()),
    )
    if furthest > _SAME:
        raise BackboneError(
            f"{kept}: has the id of what is added, but other features (they differ by {furthest:.2g}), so that a study "
            "that names the id could mean either; expected one: to replace it, remove that folder first"
        )
    return True


def _named(name: str) -> Backbone:
    """The backbone that a name on the command line means."""
    if name.startswith(HUB):
        named(name, Path(name))
        return Backbone(model=name, weights="pretrained")
    model, tag = named(name, Path(name))
    if tag is None:
        known = ", ".join(open_clip.list_pretrained_tags_by_model(model)) or "none"
        raise BackboneError(f"{name}: expected MODEL:TAG or {HUB}OWNER/NAME; tags of {model} are {known}")
    return Backbone(model=str(model), weights="pretrained", tag=tag)


def _write(folder: Path, loaded: LoadedBackbone, names: Sequence[Name]) -> None:
    """All of a backbone in the store's form; its entry last."""
    form = loaded.form
    config = dict(form.config)
    tokens = form.tokens
    if isinstance(tokens, FileTokens):
        config[OURS] = config.get(OURS, {}) | {"tokenizer": tokens.rules}
        write_durable(folder / "tokenizer.json", json.dumps(tokens.content, ensure_ascii=False).encode())
    write_durable(folder / CONFIG, _json({"model_cfg": config, "preprocess_cfg": form.preprocess}))
    if form.text is not None:
        make_folder(folder / TEXT)
        write_durable(folder / TEXT / "config.json", _json(form.text))
    write_weights(folder / WEIGHTS, loaded.tensors(), halved=True)
    entry = Entry(
        **names[0].model_dump(),
        digest=loaded.digest,
        id=loaded.id,
        activation=loaded.activation,
        weights=WEIGHTS,
        bytes=(folder / WEIGHTS).stat().st_size,
        licence=form.licence,
        also=list(names[1:]),
    )
    write_durable(folder / ENTRY, (entry.model_dump_json(indent=2, exclude_none=True) + "\n").encode())


def _json(content: object) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A folder that is there whole or not at all."""
    make_folder(folder.parent)
    with tempfile.TemporaryDirectory(prefix=".new-", dir=folder.parent) as temporary:
        new = Path(temporary) / folder.name
        make_folder(new)
        yield new
        try:
            os.replace(new, folder)
        except OSError:
            if not folder.exists():
                raise
            raise OutputError(f"{folder}: exists by now; expected a new folder: remove it, or choose another") from None
        sync_folder(folder.parent)

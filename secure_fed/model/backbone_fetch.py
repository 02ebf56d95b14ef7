"""Getting weights: downloaded where there is internet, carried over, and kept where studies find them."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import open_clip
from open_clip.pretrained import download_pretrained, download_pretrained_from_hf

from secure_fed.core.errors import BackboneError, OutputError, StorageError
from secure_fed.core.storage import make_folder, sync_folder, write_durable
from secure_fed.model.backbone import LoadedBackbone, load_backbone, refuse_other_gelu
from secure_fed.model.backbone_store import CONFIG, ENTRY, TEXT, Entry, read_entry, store_folder
from secure_fed.protocol.study import Backbone

_HUB = "hf-hub:"


def fetch(name: str, to: Path) -> tuple[Path, LoadedBackbone]:
    """Download a backbone with open_clip's own functions, and load it to see that it is whole.

    Args:
        name: ``MODEL:TAG`` of open_clip, or ``hf-hub:OWNER/NAME``.
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
    folder = to / name.removeprefix(_HUB).replace("/", "--").replace(":", ".")
    if folder.exists():
        raise OutputError(f"{folder}: exists already; expected a new folder: remove it, or choose another --to")
    with _new_folder(folder) as new:
        try:
            source = _download_repository(backbone, new) if backbone.tag is None else _download_tag(backbone, new)
        except Exception as error:  # downloads fail in every way
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise BackboneError(
                f"{name}: cannot be downloaded ({reason}); this command needs internet: check the name, the connection "
                "and the proxy, or run it on another machine and carry the folder over"
            ) from error
        loaded = load_backbone(backbone, new if backbone.tag is None else new / source)
        _write_entry(new, backbone, loaded, source, source)
    return folder, loaded


def add(path: Path, name: str | None) -> tuple[Path, LoadedBackbone]:
    """Copy weights into this user's store, where every study that names their digest finds them.

    Args:
        path: a checkpoint, or a folder that :func:`fetch` wrote.
        name: ``MODEL``, ``MODEL:TAG`` or ``hf-hub:OWNER/NAME``; needed for a checkpoint, a folder says it itself.

    Returns:
        The folder in the store, and the loaded backbone.

    Raises:
        BackboneError: it does not load as that model.
        BackboneDigestError: the weights are not those that were fetched.
        StorageError: the store cannot be written.
    """
    store = store_folder()
    make_folder(store)
    if path.is_dir():
        entry = read_entry(path)
        backbone = Backbone(model=entry.model, weights="pretrained", tag=entry.tag, digest=entry.digest)
        if name is not None and name not in (entry.model, f"{entry.model}:{entry.tag}"):
            raise BackboneError(f"{path}: holds {entry.model}, not {name}; leave --model out, or name that one")
        files, source = [one for one in path.rglob("*") if one.is_file()], entry.source
    elif path.is_file():
        if name is None:
            raise BackboneError(
                f"{path}: a checkpoint does not say of which model it is; name it with --model, as the study does"
            )
        backbone, files, source = _named(name, tagged=False), [path], path.name
        if backbone.model.startswith(_HUB):
            raise BackboneError(
                f"{path}: {backbone.model} is more than its weights (its configuration, a tokenizer); expected the "
                "folder that secfacmic backbone fetch writes"
            )
    else:
        raise BackboneError(f"{path}: no such file; expected a checkpoint, or a folder of secfacmic backbone fetch")
    base = path if path.is_dir() else path.parent
    with tempfile.TemporaryDirectory(prefix=".new-", dir=store) as temporary:
        new = Path(temporary) / "backbone"
        for one in files:
            make_folder((new / one.relative_to(base)).parent)
            _copy(one, new / one.relative_to(base))
        weights = read_entry(new).weights if path.is_dir() else path.name
        loaded = load_backbone(backbone, new if path.is_dir() else new / weights)
        if path.is_file():
            _write_entry(new, backbone, loaded, weights, source)
        kept = store / loaded.digest
        if not (kept / ENTRY).exists():
            os.replace(new, kept)
            sync_folder(store)
    return kept, loaded


def _named(name: str, tagged: bool = True) -> Backbone:
    """The backbone that a name on the command line means."""
    if name.startswith(_HUB):
        if len(name.removeprefix(_HUB).split("/")) != 2:
            raise BackboneError(f"{name}: expected {_HUB}OWNER/NAME")
        return Backbone(model=name, weights="pretrained")
    model, _, tag = name.partition(":")
    known = open_clip.list_pretrained_tags_by_model(model)
    if tag and tag not in known:
        raise BackboneError(f"{name}: open_clip knows no such tag; of {model} it knows {', '.join(known) or 'none'}")
    if tag:
        return Backbone(model=model, weights="pretrained", tag=tag)
    if tagged:
        raise BackboneError(
            f"{name}: expected MODEL:TAG or {_HUB}OWNER/NAME; tags of {model} are {', '.join(known) or 'none'}"
        )
    return Backbone(model=model, weights="file", file="checkpoint")


def _download_tag(backbone: Backbone, folder: Path) -> str:
    """The checkpoint of a tag, under its own name; that name."""
    with tempfile.TemporaryDirectory(prefix=".download-", dir=folder.parent) as cache:
        # Through the hub's links to the file itself.
        found = Path(download_pretrained(open_clip.get_pretrained_cfg(backbone.model, backbone.tag), cache_dir=cache))
        _copy(found, folder / found.name)
    return found.name


def _download_repository(backbone: Backbone, folder: Path) -> str:
    """A hub repository in the form that open_clip reads from a folder; the name of its checkpoint."""
    repository = backbone.model.removeprefix(_HUB)
    with tempfile.TemporaryDirectory(prefix=".download-", dir=folder.parent) as cache:
        config = Path(download_pretrained_from_hf(repository, filename=CONFIG, cache_dir=cache))
        _copy(config, folder / CONFIG)
        found = Path(download_pretrained_from_hf(repository, cache_dir=cache))
        _copy(found, folder / found.name)
        text = json.loads(config.read_text(encoding="utf-8"))["model_cfg"].get("text_cfg", {})
        if "hf_model_name" in text or "hf_tokenizer_name" in text:
            from transformers import AutoConfig, AutoTokenizer

            if "hf_tokenizer_name" in text:
                AutoTokenizer.from_pretrained(text["hf_tokenizer_name"], cache_dir=cache).save_pretrained(folder)
            if "hf_model_name" in text:
                AutoConfig.from_pretrained(text["hf_model_name"], cache_dir=cache).save_pretrained(folder / TEXT)
    return found.name


def _write_entry(folder: Path, backbone: Backbone, loaded: LoadedBackbone, weights: str, source: str) -> None:
    size = (folder / weights).stat().st_size
    entry = Entry(
        model=backbone.model, tag=backbone.tag, digest=loaded.digest, weights=weights, source=source, bytes=size
    )
    write_durable(folder / ENTRY, (entry.model_dump_json(indent=2, exclude_none=True) + "\n").encode())


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A folder that is there whole or not at all."""
    make_folder(folder.parent)
    with tempfile.TemporaryDirectory(prefix=".new-", dir=folder.parent) as temporary:
        new = Path(temporary) / folder.name
        make_folder(new)
        yield new
        os.replace(new, folder)
        sync_folder(folder.parent)


def _copy(source: Path, target: Path) -> None:
    """Copy a file, content only, and fsync it."""
    try:
        shutil.copyfile(source, target)
        with target.open("rb") as stream:
            os.fsync(stream.fileno())
    except OSError as error:
        raise StorageError(f"{target}: not written ({error.strerror}); free space or choose another place") from error

"""Weights on this machine's disk: folders that ``secfacmic backbone fetch`` and ``add`` write, found by studies.

Such a folder holds ``backbone.json`` and either one checkpoint, or what open_clip's ``local-dir:`` reads: a model's own
``open_clip_config.json``, its weights, its tokenizer and, in ``text/``, the configuration of its text model.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

from pydantic import Field

from secure_fed.core.errors import BackboneError
from secure_fed.core.tomlfile import FileModel, parse_table
from secure_fed.protocol.study import Backbone, Hex64, Text

ENTRY = "backbone.json"
CONFIG = "open_clip_config.json"
TEXT = "text"
"""Folder with the configuration of a text model that open_clip takes from the Hugging Face hub."""

PLACE = "SECFACMIC_BACKBONES"
"""Environment variable that names the store's folder."""


class Entry(FileModel):
    """``backbone.json``.

    Attributes:
        model: name for open_clip, ``hf-hub:OWNER/NAME`` included.
        tag: open_clip's tag, if the weights are one.
        digest: SHA-256 of the weights' content, as in a study.
        weights: name of the checkpoint in the folder.
        source: name of the file that it was made of.
        bytes: size of the checkpoint.
    """

    model: Text
    tag: Text | None = None
    digest: Hex64
    weights: Text
    source: Text
    bytes: Annotated[int, Field(ge=1)]


def store_folder() -> Path:
    """Where this user's backbones lie: ``$SECFACMIC_BACKBONES``, or below ``$XDG_DATA_HOME`` or ``~/.local/share``."""
    given = os.environ.get(PLACE)
    if given:
        return Path(given)
    data = os.environ.get("XDG_DATA_HOME")
    return (Path(data) if data else Path.home() / ".local" / "share") / "secfacmic" / "backbones"


def entries(folder: Path) -> dict[Path, Entry]:
    """What a store holds, by folder.

    Raises:
        BackboneError: a ``backbone.json`` is malformed.
    """
    return {path.parent: read_entry(path.parent) for path in sorted(folder.glob(f"[!.]*/{ENTRY}"))}


def read_entry(folder: Path) -> Entry:
    """The folder's ``backbone.json``.

    Raises:
        BackboneError: it is missing or malformed.
    """
    path = folder / ENTRY
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BackboneError(
            f"{path}: cannot be read ({error}); expected a folder that secfacmic backbone fetch or add wrote"
        ) from error
    entry = parse_table(content, Entry, BackboneError, str(path))
    if Path(entry.weights).name != entry.weights:
        raise BackboneError(f"{path}: weights = {entry.weights!r} leads out of its folder; expected a file name")
    return entry


def find(backbone: Backbone) -> Path | None:
    """The folder in this user's store that holds a study's weights; None if it has none.

    By their digest if the study names it, else by model and tag or file name.
    """
    folder = store_folder()
    if backbone.digest is not None:
        return folder / backbone.digest if (folder / backbone.digest / ENTRY).is_file() else None
    if backbone.weights == "random":
        return None  # of what seed they are is not known
    for path, entry in entries(folder).items():
        same = entry.source == backbone.file if backbone.weights == "file" else entry.tag == backbone.tag
        if entry.model == backbone.model and (same or backbone.model.startswith("hf-hub:")):
            return path
    return None


def weights_in(folder: Path) -> Path:
    """What is to be loaded of such a folder: its checkpoint, or the folder itself if open_clip reads it whole.

    Raises:
        BackboneError: neither is there.
    """
    if (folder / CONFIG).is_file():
        return folder
    path = folder / read_entry(folder).weights
    if not path.is_file():
        raise BackboneError(f"{path}: no such file; expected the weights that {folder / ENTRY} names")
    return path


@contextmanager
def as_open_clip_folder(folder: Path) -> Iterator[str]:
    """The name by which open_clip loads a folder in its own form, without a look at any hub.

    open_clip asks the hub for the configuration of a Hugging Face text model unless it is named by its path, which no
    file that travels can hold; so the folder is shown to it through links, with the path filled in.
    """
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    text = config.get("model_cfg", {}).get("text_cfg", {})
    if "hf_model_name" not in text or not (folder / TEXT).is_dir():
        yield f"local-dir:{folder}"
        return
    text["hf_model_name"] = str((folder / TEXT).resolve())
    with tempfile.TemporaryDirectory(prefix="secfacmic-") as name:
        for path in folder.iterdir():
            if path.name != CONFIG:
                (Path(name) / path.name).symlink_to(path.resolve())
        (Path(name) / CONFIG).write_text(json.dumps(config), encoding="utf-8")
        yield f"local-dir:{name}"

"""Weights on this machine's disk: folders that ``secfacmic backbone fetch`` and ``add`` write, found by studies.

Whatever a backbone came as, such a folder is of one form: ``backbone.json``, the whole configuration in
``open_clip_config.json``, weights under open_clip's names as safetensors, its tokenizer if it does not come with
open_clip, and in ``text/`` the configuration of a text model of transformers.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

from pydantic import Field

from secure_fed.core.errors import BackboneError
from secure_fed.core.tomlfile import FileModel, parse_table
from secure_fed.model.library import activation_named, twin
from secure_fed.protocol.study_tables import Backbone, Hex64, Text

ENTRY = "backbone.json"

PLACE = "SECFACMIC_BACKBONES"
"""Environment variable that names the store's folder."""


class Name(FileModel):
    """By what templates find a backbone.

    Attributes:
        model: name for open_clip, ``hf-hub:OWNER/NAME`` included.
        tag: open_clip's tag, if the weights are one.
        source: name of the file or folder that it was made of.
    """

    model: Text
    tag: Text | None = None
    source: Text

    @property
    def spoken(self) -> tuple[str, str]:
        """As people write it: with its tag, or without."""
        return self.model, f"{self.model}:{self.tag}"


class Entry(Name):
    """``backbone.json``: the name under which a backbone was first added, and what it is.

    Attributes:
        digest: SHA-256 of the weights' content, as in a study.
        id: SHA-256 of it and all else that features depend on, as in a study.
        activation: of the towers.
        weights: name of the checkpoint in the folder.
        bytes: size of the checkpoint.
        licence: of the weights, if a README beside them named it.
        also: other names under which the same was added.
    """

    digest: Hex64
    id: Hex64
    activation: Text
    weights: Text
    bytes: Annotated[int, Field(ge=1)]
    licence: Text | None = None
    also: list[Name] = Field(default_factory=list)

    @property
    def names(self) -> list[Name]:
        """All of them, the first one first."""
        return [Name(model=self.model, tag=self.tag, source=self.source), *self.also]


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
    except (OSError, ValueError, RecursionError) as error:
        raise BackboneError(
            f"{path}: cannot be read ({error}); expected a folder that secfacmic backbone fetch or add wrote"
        ) from error
    try:
        entry = parse_table(content, Entry, BackboneError, str(path))
    except BackboneError as error:
        raise BackboneError(
            f"{error}\n  remove this folder, and fetch or add the backbone again: secfacmic backbone add"
        ) from None
    if Path(entry.weights).name != entry.weights:
        raise BackboneError(f"{path}: weights = {entry.weights!r} leads out of its folder; expected a file name")
    return entry


def find(backbone: Backbone) -> Path | None:
    """The folder in this user's store that holds a study's backbone; None if it has none.

    By its id if the study names it, else by the digest of its weights, else by model and tag or file name.

    Raises:
        BackboneError: several fit, an entry is malformed, or a file's name is all that tells which of two activations
            is meant.
    """
    folder = store_folder()
    if backbone.id is not None:
        return folder / backbone.id if (folder / backbone.id / ENTRY).is_file() else None
    if backbone.digest is None and backbone.weights == "random":
        return None  # of what seed they are is not known
    here = entries(folder)
    found = [path for path, entry in here.items() if _fits(entry, backbone)]
    found = [path for path in found if is_meant(here[path], backbone)]
    if len(found) > 1:
        raise BackboneError(
            f"{folder}: {len(found)} backbones fit {backbone.model} ({', '.join(path.name[:12] for path in found)}); "
            "expected one: name its id in the template, as secfacmic backbone list shows it"
        )
    return found[0] if found else None


def _fits(entry: Entry, backbone: Backbone) -> bool:
    if backbone.activation is not None and entry.activation != backbone.activation:
        return False
    if backbone.digest is not None:
        return entry.digest == backbone.digest
    return bears(entry, backbone) and (
        backbone.weights != "file" or any(name.source == backbone.file for name in entry.names)
    )


def is_meant(entry: Entry, backbone: Backbone) -> bool:
    """Whether an entry has the activation that is meant of a file, where its model is there with both.

    Raises:
        BackboneError: nothing but the file's name says which is meant.
    """
    if backbone.weights != "file" or backbone.id is not None or twin(backbone.model) is None:
        return True
    if not bears(entry, backbone):  # found by its digest, and called otherwise: its own configuration says
        return True
    return entry.activation == activation_named(backbone.model, backbone.activation, str(backbone.file))


def bears(entry: Entry, backbone: Backbone) -> bool:
    """Whether an entry has the name of a study's backbone: its model and, if weights of a hub are meant, its tag.

    A file's own name tells nothing: ``best.pt`` is what many trainings call theirs. Its model may be the twin, as an
    activation that was named makes it.
    """
    if backbone.weights != "pretrained":
        return any(name.model in (backbone.model, twin(backbone.model)) for name in entry.names)
    tagged = not backbone.model.startswith("hf-hub:")
    return any(name.model == backbone.model and (not tagged or name.tag == backbone.tag) for name in entry.names)

"""What a backbone is, how long it takes here, and whether images hint that something about it is off."""

from __future__ import annotations

import copy
import math
import resource
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from secure_fed import configs
from secure_fed.clients.data import UNLABELLED
from secure_fed.clients.decoding import decode
from secure_fed.clients.encoding import USUAL, expected_seconds
from secure_fed.clients.files import class_folders, image_files
from secure_fed.clients.rules import UndecodableError
from secure_fed.core.errors import BackboneError, DataError, fault_lines
from secure_fed.model.backbone import load_given
from secure_fed.model.backbone_store import entries, store_folder
from secure_fed.model.library import fetch_elsewhere, known_to_hubs
from secure_fed.model.loaded_backbone import LoadedBackbone
from secure_fed.model.model_config import OURS
from secure_fed.model.network import Form, build

PER_CLASS = 50
"""Images of a class that are looked at, the first by path."""

_BETTER = 0.05
"""Share of correct images by which another way must be better to be worth a word."""

_CHANCE = 0.01
"""Chance, at most, that a way which is no better would win as many of the images that only one of two ways gets right
(a sign test, one-sided): of a few hundred images some points differ by chance."""

NOBODY_PAID = (
    "these figures are of your images, for your own eyes: if they are patients', no privacy budget has paid for them"
)
"""Stands at what images tell of a backbone; whose they are nobody says here."""

_OPENAI = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
_HALF = [0.5, 0.5, 0.5], [0.5, 0.5, 0.5]


def check_backbone(
    name: str,
    images: Path | None = None,
    model: str | None = None,
    activation: str | None = None,
    text: Path | None = None,
) -> dict[str, Any]:
    """Load a backbone and describe it.

    Args:
        name: a file or folder; or of the store or the package the model, or the beginning of its id or digest.
        images: folder with a folder of images for each class, named as the class.
        model: as for :func:`secure_fed.model.backbone_fetch.add`, and so the next two.
        activation: likewise.
        text: likewise.

    Returns:
        A JSON document; ``zero_shot`` is None without images, else ``chance``, ``images`` (their number),
        ``unreadable`` (with reasons), ``correct`` (share by way of preparing and computing; None for what this model
        cannot do), ``hint`` and ``local`` (:data:`NOBODY_PAID`).

    Raises:
        BackboneError: there is none of that name, or it cannot be used.
        DataError: the folder has no two classes with images, or none of a class can be read.
    """
    if not name.strip():
        raise BackboneError("the name is empty; expected a path, or a model, digest or id of secfacmic backbone list")
    path = Path(name)
    if not path.exists():
        path = _of_name(name)
    loaded, _, _ = load_given(path, model, activation, text)
    form = loaded.form
    loaded.encode_images([USUAL] * loaded.batch)  # as many as are in memory at once
    seconds = expected_seconds(loaded.seconds_per_image([USUAL]), 100)
    report: dict[str, Any] = {
        "model": form.model,
        "found": form.kind,
        "weights_millions": round(sum(value.numel() for value in loaded.tensors().values()) / 1e6, 1),
        "image_size": form.preprocess["size"],
        "features": loaded.dim,
        "context": loaded.context,
        "activation": loaded.activation,
        "towers": {tower: loaded.facts[tower] for tower in ("vision", "text")},
        "preprocessing": form.preprocess,
        "precision": loaded.precision,
        "tokenizer": form.tokens.identity,
        "licence": form.licence or "not stated beside the weights: ask their publisher",
        "digest": loaded.digest,
        "id": loaded.id,
        "seconds_for_100_images": round(seconds, 2),
        "memory_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "told": list(form.told),
        "zero_shot": None,
    }
    if images is not None:
        report["zero_shot"] = _zero_shot(loaded, images)
    return report


def _of_name(name: str) -> Path:
    """The backbone of the store, or of those that come along, that a name means."""
    found = [
        folder
        for folder, entry in entries(store_folder()).items()
        if any(name in one.spoken for one in entry.names)
        or (len(name) >= 6 and (entry.id.startswith(name) or entry.digest.startswith(name)))
    ]
    packaged = configs.MODELS / f"{name.removesuffix('.safetensors')}.safetensors"
    if not found and packaged.is_file():
        return packaged
    if len(found) == 1:
        return found[0]
    if found:
        raise BackboneError(
            f"{name}: {len(found)} backbones in {store_folder()} ({', '.join(path.name[:12] for path in found)}); "
            "expected one: name its id, as secfacmic backbone list shows it"
        )
    elsewhere = f"; run {fetch_elsewhere(name)}" if known_to_hubs(name) else ""
    raise BackboneError(
        f"{name}: no such file or folder, and no backbone of that name in {store_folder()}; expected a path, or a "
        f"model, digest or id that secfacmic backbone list shows{elsewhere}"
    )


def _zero_shot(loaded: LoadedBackbone, folder: Path) -> dict[str, Any]:
    classes = [name for name in class_folders(folder) if name != UNLABELLED] if folder.is_dir() else []
    pictures: list[Image.Image] = []
    labels: list[int] = []
    unreadable: list[str] = []
    for label, name in enumerate(classes):
        for path in sorted(image_files(folder / name))[:PER_CLASS]:
            try:
                pictures.append(decode(path.read_bytes(), None))
                labels.append(label)
            except (UndecodableError, OSError) as error:
                unreadable.append(f"{path.relative_to(folder)}: {error}")
    lacking = sorted(set(range(len(classes))) - set(labels))
    if lacking or len(classes) < 2:
        found = (
            f"none of the images of {', '.join(classes[label] for label in lacking)} can be read"
            if lacking
            else f"{len(classes)} classes with images"
        )
        raise DataError(
            f"{folder}: {found}; expected two or more folders, each with images of one class that can be read"
            f"{fault_lines(unreadable)}"
        )
    prompts = [f"an image of {name.replace('_', ' ')}" for name in classes]
    form, truth = loaded.form, np.array(labels)
    usual = _right(loaded, pictures, prompts, truth)
    correct: dict[str, float | None] = {"as it is": float(usual.mean())}
    better: dict[str, float] = {}
    for way, changed in _others(form, loaded.activation).items():
        if changed is None:
            correct[way] = None
            continue
        right = _right(LoadedBackbone(build(changed), changed, way), pictures, prompts, truth)
        correct[way] = float(right.mean())
        if right.mean() > usual.mean() + _BETTER and _by_chance(right, usual) < _CHANCE:
            better[way] = float(right.mean() - usual.mean())
    chance = 1 / len(classes)
    hint = f"{len(pictures)} images of {len(classes)} classes, chance {100 * chance:.1f} %: "
    if unreadable:
        hint = f"{len(unreadable)} images cannot be read and are left out; {hint}"
    if better:
        hint += "better with " + ", ".join(f"{way} (+{100 * more:.0f} points)" for way, more in better.items())
        hint += ": see whether its configuration is its own"
    else:
        hint += "no other way is clearly better"
    if usual.mean() < chance + _BETTER:
        hint += "; and it does no better than chance: other prompts, another backbone, or not this task"
    return {
        "chance": chance,
        "images": len(pictures),
        "unreadable": unreadable,
        "correct": correct,
        "hint": hint,
        "local": NOBODY_PAID,
    }


def _others(form: Form, activation: str) -> dict[str, Form | None]:
    """The same backbone with one thing that people get wrong changed."""
    other = {"gelu": "quickgelu", "quickgelu": "gelu", "gelu_tanh": "gelu"}.get(activation)
    found: dict[str, Form | None] = {}
    if other is None or form.text is not None:
        found["the other activation"] = None
    else:
        config = copy.deepcopy(form.config)
        ours = config.setdefault(OURS, {})
        for tower in ("vision", "text"):
            ours.setdefault(tower, {}).update(activation=other)
        found[f"the other activation, {other}"] = replace(form, config=config)
    mean, std = _HALF if form.preprocess["mean"][0] != 0.5 else _OPENAI
    found["the other usual mean and std"] = replace(form, preprocess=form.preprocess | {"mean": mean, "std": std})
    size = form.preprocess["size"]
    squashed = form.preprocess["resize_mode"] == "squash"
    mode = {"resize_mode": "shortest" if squashed else "squash", "resize_to": size[0] if squashed else size}
    found["cut instead of squashed" if squashed else "squashed instead of cut"] = replace(
        form, preprocess=form.preprocess | mode
    )
    return found


def _right(
    loaded: LoadedBackbone, pictures: Sequence[Image.Image], prompts: Sequence[str], truth: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Of each picture whether its own class's prompt is the nearest."""
    cosines = loaded.encode_images(pictures) @ loaded.encode_texts(prompts).T
    return np.asarray(cosines.argmax(axis=1) == truth)


def _by_chance(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> float:
    won, lost = int((first & ~second).sum()), int((second & ~first).sum())
    total = sum(math.comb(won + lost, count) for count in range(won, won + lost + 1))
    return total / (1 << (won + lost))

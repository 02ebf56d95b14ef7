"""An adapter at work: calibrated probabilities for a folder of images."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from secure_fed.clients.data import MANIFEST, image_files
from secure_fed.clients.encoding import encode_all
from secure_fed.clients.reading import Source
from secure_fed.core.errors import AdapterFileError, DataError, UnreadableImageError
from secure_fed.model.adapter_file import AdapterFile, load_adapter
from secure_fed.model.backbone import load_backbone
from secure_fed.model.device import Device
from secure_fed.protocol.study import load_study

_LISTED = 10


@dataclass(frozen=True)
class Probabilities:
    """What an adapter says of images.

    Attributes:
        adapter: that said it.
        images: paths below the folder, in order.
        probabilities: [len(images), classes], rows sum to 1.
        unreadable: why not, by path, of images that were left out.
    """

    adapter: AdapterFile
    images: tuple[str, ...]
    probabilities: NDArray[np.float64]
    unreadable: dict[str, str]

    def document(self) -> dict[str, Any]:
        """As a JSON document."""
        classes, own = self.adapter.classes, self.adapter.calibration
        calibrated = own is not None and own.temperature is not None
        return {
            "adapter_digest": self.adapter.digest,
            "study_id": self.adapter.study,
            "backbone_digest": self.adapter.backbone.digest,
            "classes": list(classes),
            "calibrated": calibrated,
            "temperature": self.adapter.temperature,
            "validation_images": own.images if own is not None and calibrated else 0,
            "images": [
                {"image": image, "prediction": classes[int(row.argmax())], "probabilities": _by_class(classes, row)}
                for image, row in zip(self.images, self.probabilities, strict=True)
            ],
            "unreadable": self.unreadable,
        }

    def csv(self) -> str:
        """As CSV: ``image``, ``prediction`` and, for each class, ``probability of CLASS``."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        classes = self.adapter.classes
        writer.writerow(["image", "prediction", *(f"probability of {name}" for name in classes)])
        for image, row in zip(self.images, self.probabilities, strict=True):
            writer.writerow([image, classes[int(row.argmax())], *(f"{value:.6f}" for value in row)])
        return text.getvalue()


def predict_folder(
    adapter: Path,
    folder: Path,
    study: Path | None = None,
    checkpoint: Path | None = None,
    *,
    skip_unreadable: bool = False,
    device: Device = "cpu",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Probabilities:
    """Calibrated probabilities for all images of a folder.

    Args:
        adapter: an ``adapter.safetensors``; the ``calibration.safetensors`` beside it is used if it is of this adapter.
        folder: of images, searched whole, DICOM included (of a file with many frames the middle one); only
            read.
        study: a ``study.toml`` that the adapter must be of, if given.
        checkpoint: the backbone's weights, if they do not lie where the study says.
        skip_unreadable: leave out images that cannot be decoded instead of refusing.
        device: where the backbone computes.
        progress: told how many images are done, of how many.

    Raises:
        AdapterFileError: the adapter cannot be read, is of another study, or lacks batch norm's statistics.
        DataError: no such folder, or no image in it.
        UnreadableImageError: images that cannot be decoded.
        BackboneError, BackboneDigestError: the weights are missing, or others.
    """
    file = load_adapter(adapter)
    if study is not None and (expected := load_study(study).study.id) != file.study:
        raise AdapterFileError(
            f"{adapter}: of study {file.study[:16]}, but {study} is study {expected[:16]}; use the adapter of that "
            "study, or leave --study out"
        )
    file.require_statistics()
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; expected one with images in it")
    paths = sorted(path for path in image_files(folder) if path.name != MANIFEST)
    if not paths:
        raise DataError(f"{folder}: no image; expected images in it, or in folders below it")
    backbone = load_backbone(file.backbone, checkpoint, device)
    names, features, unreadable = [], [], {}
    sources = [Source(path) for path in paths]
    for batch in encode_all(sources, backbone):
        for one in batch:
            name = paths[one.index].relative_to(folder).as_posix()
            if one.value is None:
                unreadable[name] = one.reason
            else:
                names.append(name)
                features.append(one.value)
        progress(batch[-1].index + 1, len(paths))
    if unreadable and not skip_unreadable:
        shown = "".join(f"\n  {name}: {reason}" for name, reason in list(unreadable.items())[:_LISTED])
        more = f"\n  and {len(unreadable) - _LISTED} more" if len(unreadable) > _LISTED else ""
        raise UnreadableImageError(
            f"{len(unreadable)} of {len(paths)} images in {folder} cannot be decoded; expected whole 8-bit images or "
            f"DICOM: replace or remove them, or leave them out with --skip-unreadable{shown}{more}"
        )
    tokens = file.initial.prompt_tokens
    tower = None if tokens is None else backbone.text_tower(tokens)
    x = np.stack(features) if features else np.empty((0, backbone.dim), dtype=np.float32)
    return Probabilities(file, tuple(names), file.predict(x, tower), unreadable)


def _by_class(classes: tuple[str, ...], row: NDArray[np.float64]) -> dict[str, float]:
    return {name: float(value) for name, value in zip(classes, row, strict=True)}

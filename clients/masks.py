"""Masks of findings: pictures beside a site's pictures, by which heat maps are judged and nothing is trained."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from secure_fed.clients.data import SiteImage
from secure_fed.clients.decoding import decode
from secure_fed.clients.photographs import FORMATS
from secure_fed.clients.rules import Rules, UndecodableError
from secure_fed.core.errors import DataError, fault_lines
from secure_fed.protocol.study_tables import NORMAL

_LOSSY = ("JPEG", "MPO", "WEBP", "JPEG2000")


def check_masks(images: Sequence[SiteImage], rules: Rules) -> None:
    """Check all masks that a manifest names, so that none is refused after days of training.

    An image that cannot be decoded is passed over: it is told elsewhere.

    Args:
        images: of the site.
        rules: how they are seen.

    Raises:
        DataError: masks are missing, cannot be read, are of another size than their images, or of several; they mark
            every pixel, or a finding in a normal image; all are named.
    """
    faults = []
    for image in images:
        try:
            lesion = lesion_of(image, rules)
            if lesion is not None and lesion.all():
                faults.append(
                    f"{image.mask}: every pixel is marked, and what a map finds could not be told from what it does "
                    "not; expected the finding alone, in white on black"
                )
            elif lesion is not None and lesion.any() and image.label == NORMAL:
                faults.append(
                    f"{image.mask}: marks a finding, but {image.path} is labelled as normal, and would be learnt as "
                    "that; expected one or the other: mend the label, or the mask"
                )
        except DataError as error:
            faults.append(str(error))
        except (UndecodableError, OSError):
            continue
    shared = Counter(image.mask for image in images if image.mask is not None)
    faults += [
        f"{mask}: the mask of {count} pictures; expected one each" for mask, count in shared.items() if count > 1
    ]
    if faults:
        raise DataError(
            f"{len(faults)} masks do not fit; mend them, or empty their cells in column mask{fault_lines(faults)}"
        )


def lesion_of(image: SiteImage, rules: Rules) -> NDArray[np.bool_] | None:
    """Where the finding of an image is, bool [height, width]: whatever in its mask is neither black nor transparent.

    None if no mask is named for it.

    Raises:
        DataError: the mask is missing, cannot be read, or is of another size than the image.
        UndecodableError, OSError: the image itself cannot be read.
    """
    if image.mask is None:
        return None
    width, height = decode(image.path.read_bytes(), image.frame, image.axis, rules).size
    found = _read(image.mask)
    if found.shape != (height, width):
        raise DataError(
            f"{image.mask}: {found.shape[1]} x {found.shape[0]} pixels, but {image.path} has {width} x {height}; "
            "expected a mask of the image's size: make it anew"
        )
    return found


def _read(mask: Path) -> NDArray[np.bool_]:
    try:
        with Image.open(mask, formats=FORMATS) as opened:
            if opened.format in _LOSSY:
                raise ValueError(f"{opened.format} blurs where a finding ends")
            if getattr(opened, "n_frames", 1) != 1:
                raise ValueError("several pictures in one file")
            return _marked(ImageOps.exif_transpose(opened))
    except Exception as error:  # Pillow's readers raise of every kind on broken files
        told = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        reason = " ".join(told.split())[:160] or type(error).__name__
        raise DataError(
            f"{mask}: no mask that can be read ({reason}); expected a PNG, black but for the finding"
        ) from (error)


def _marked(mask: Image.Image) -> NDArray[np.bool_]:
    """Whatever is neither black nor transparent, of any mode: of labels that are numbers, all but 0."""
    colours: NDArray[Any]
    if mask.mode[0] in "IF1L" and mask.mode not in ("LA", "La", "LAB") and "transparency" not in mask.info:
        return np.asarray(np.asarray(mask) != 0)
    colours = np.asarray(mask.convert("RGBA"))
    return np.asarray((colours[..., :3] != 0).any(axis=2) & (colours[..., 3] != 0))

"""What a site's data look like before they are trained on: counts, copies, leaks, files that cannot be used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np

from secure_fed.clients.data import SiteImage, Split
from secure_fed.clients.duplicates import Fingerprint, exact_copies, near_twins
from secure_fed.clients.encoding import expected_seconds, seconds_per_image
from secure_fed.clients.features import MIRRORED, Progress
from secure_fed.clients.images import compared_images, rules_of
from secure_fed.clients.sitefile import SiteFile
from secure_fed.core.errors import BackboneDigestError, BackboneError, DataLeakError
from secure_fed.model.backbone import image_size, load_backbone
from secure_fed.protocol.study import AgreedStudy

LISTED = 10
"""Files of each kind that a report names; the others are counted."""

FAR = 2.0
"""An image is far from the backbone's size if enlarged by more than this, or if its long side is more than this many
times the short one, so that cutting out the middle square loses more than half."""

BLANK = 1.0
"""A picture whose grey values have a smaller standard deviation, of 255, shows nothing."""

TINY = 32
"""A side of fewer pixels shows little."""

COLOUR = 12.0
"""A picture whose colours lie further from grey on average, of 255, is coloured."""

UNLIKE = 8.0
"""A picture is unlike the others if its mean grey lies so many median deviations from the median one."""


def check_data(file: SiteFile, agreed: AgreedStudy, progress: Progress | None = None) -> dict[str, Any]:
    """Read, decode and compare all of a site's images; nothing is trained or encoded.

    Fingerprints are kept in the site's feature cache: interrupted, the check goes on where it was, and training
    finds them there.

    Returns:
        A JSON document. ``told``: what was sniffed or guessed; ``passed_over``: what is no image, count and list;
        ``left_out``: how many images by kind, as the site chose; ``doubts``: about who is who, each with ``kind``,
        ``ids``, ``images``, ``splits``, ``text`` and ``remedy``; ``kinds``: scouts and screenshots among the images, by
        kind; ``modalities`` and ``scanners``: images by each; ``largest_patients``: those with most images; ``odd``:
        ``blank``, ``tiny``, ``colour`` and ``unlike`` pictures, and ``noted`` ones, whose file says what cannot be
        followed; behind a path, in brackets, which picture of the file is meant.
        ``classes``: images by class and split; ``patients``: by split; ``missing_classes``;
        ``exact_copies`` and ``near_twins``: groups, those that lie in more than one split, and a list of these;
        ``unreadable`` and ``far_from_size``: count and list; ``backbone_size``: side of the square, None if unknown;
        ``encoding``: how long the first round's encoding will take here: ``images``, mirrored views
        too, ``seconds``, and ``seconds_per_image`` on one processor, both None with a ``reason`` if the backbone is not
        here;
        ``leaks``: what is wrong, in words; empty if nothing is.

    Raises:
        DataError, LabelError, ManifestError: the data cannot be read at all, or a patient is in two splits.
        StorageError: the cache cannot be used.
    """
    file.state_folder.begin()
    (images, notes, doubts), (found, unreadable) = compared_images(file, agreed, progress)
    classes, size = agreed.study.class_names, image_size(agreed.study.backbone)
    counts = Counter((image.label, image.split) for image in images)
    patients = {split: len({image.patient for image in images if image.split == split}) for split in get_args(Split)}
    exact = exact_copies(found)
    far = [index for index, one in enumerate(found) if one is not None and size is not None and _is_far(one, size)]
    seen = [(image, one) for image, one in zip(images, found, strict=True) if one is not None]
    by_patient = Counter(image.patient for image in images)
    return {
        "site": file.site,
        "told": notes.told,
        "passed_over": _files(notes.passed_over),
        "left_out": dict(sorted(notes.left_out.items())),
        "doubts": [
            {
                "kind": doubt.kind,
                "ids": list(doubt.ids),
                "images": doubt.images,
                "splits": sorted({image.split for image in images if image.patient in doubt.ids}),
                "text": doubt.text,
                "remedy": doubt.remedy,
            }
            for doubt in doubts
        ],
        "kinds": dict(Counter(one.facts.kind for _, one in seen if one.facts.kind)),
        "modalities": dict(Counter(one.facts.modality or "none" for _, one in seen).most_common()),
        "scanners": dict(Counter(one.facts.scanner or "unknown" for _, one in seen).most_common()),
        "largest_patients": [
            {"patient": patient, "images": count} for patient, count in by_patient.most_common(LISTED)
        ],
        "odd": {name: _files(_named(image) for image, _ in odd) for name, odd in _odd(seen).items()}
        | {"noted": _files(noted(seen))},
        "images": len(images),
        "classes": {
            name: {split: counts[label, split] for split in get_args(Split) if split != "unlabelled"}
            for label, name in enumerate(classes)
        },
        "unlabelled": counts[None, "unlabelled"],
        "patients": patients | {"all": len({image.patient for image in images})},
        "missing_classes": [
            name for label, name in enumerate(classes) if not any(image.label == label for image in images)
        ],
        "exact_copies": _groups(images, exact),
        "near_twins": _groups(images, _more_than_copies(near_twins(found), found)),
        "unreadable": _files(f"{images[index].path}: {reason}" for index, reason in sorted(unreadable.items())),
        "far_from_size": _files(_describe(images[index], found[index]) for index in far),
        "backbone_size": size,
        "encoding": _encoding(file, agreed, [image for index, image in enumerate(images) if index not in unreadable]),
        "leaks": [
            f"the same picture in splits {', '.join(sorted({images[index].split for index in group}))}: "
            + ", ".join(str(images[index].path) for index in group[:LISTED])
            for group in exact
            if _is_separated(images, group)
        ],
    }


def _encoding(file: SiteFile, agreed: AgreedStudy, readable: Sequence[SiteImage]) -> dict[str, Any]:
    backbone, images = agreed.study.backbone, len(readable)
    if backbone.mirrored:
        images += sum(image.split in MIRRORED for image in readable)
    try:
        loaded = load_backbone(backbone, None if file.checkpoint is None else Path(file.checkpoint))
    except (BackboneError, BackboneDigestError) as error:
        return {"images": images, "seconds_per_image": None, "seconds": None, "reason": str(error)}
    sources = [image.source for image in readable]
    each = seconds_per_image(sources, loaded, rules_of(file, agreed)) if sources else 0.0
    return {"images": images, "seconds_per_image": each, "seconds": expected_seconds(each, images)}


def noted(seen: Sequence[tuple[SiteImage, Fingerprint]]) -> list[str]:
    """What files say and cannot be followed, by file, what is rarest first."""
    counts = Counter(note for _, one in seen for note in one.facts.notes)
    notes = [(counts[note], f"{_named(image)}: {note}") for image, one in seen for note in one.facts.notes]
    return [line for _, line in sorted(notes, key=lambda entry: entry[0])]


def _odd(seen: Sequence[tuple[SiteImage, Fingerprint]]) -> dict[str, list[tuple[SiteImage, Fingerprint]]]:
    """Pictures that somebody should look at: without contrast, tiny, coloured among grey ones, unlike all others."""
    colourful = [entry for entry in seen if entry[1].colour > COLOUR]
    means = np.array([one.mean for _, one in seen] or [0.0])
    middle = float(np.median(means))
    spread = float(np.median(np.abs(means - middle)))
    return {
        "blank": [entry for entry in seen if entry[1].contrast < BLANK],
        "tiny": [entry for entry in seen if min(entry[1].width, entry[1].height) < TINY],
        "colour": colourful if len(colourful) < len(seen) / 2 else [],
        "unlike": [entry for entry in seen if abs(entry[1].mean - middle) > max(UNLIKE * spread, BLANK)],
    }


def refuse_leaks(file: SiteFile, leaks: Sequence[str]) -> None:
    """Check that no picture lies in more than one split.

    Args:
        file: the site's.
        leaks: as :func:`check_data` reports them.

    Raises:
        DataLeakError: some do; with the first of them.
    """
    if leaks:
        shown = "".join(f"\n  {leak}" for leak in leaks[:LISTED])
        raise DataLeakError(
            f"{file.data.folder}: {len(leaks)} pictures lie in more than one split, so that what is tested was trained "
            f"on; expected each in one: put all copies into one split, or remove them{shown}"
        )


def _groups(images: Sequence[SiteImage], groups: Sequence[Sequence[int]]) -> dict[str, Any]:
    """How many groups and images, how many groups lie in several splits, and the first of these."""
    separated = [group for group in groups if _is_separated(images, group)]
    return {
        "groups": len(groups),
        "images": sum(len(group) for group in groups),
        "across_splits": len(separated),
        "listed": [
            [{"path": str(images[index].path), "split": images[index].split} for index in group[:LISTED]]
            for group in separated[:LISTED]
        ],
    }


def _is_separated(images: Sequence[SiteImage], group: Sequence[int]) -> bool:
    return len({images[index].split for index in group}) > 1


def _more_than_copies(groups: Sequence[list[int]], found: Sequence[Fingerprint | None]) -> list[list[int]]:
    """Those groups that are not of one picture alone."""
    return [group for group in groups if len({one.pixels for index in group if (one := found[index])}) > 1]


def _is_far(one: Fingerprint, size: int) -> bool:
    short, long = sorted((one.width, one.height))
    return short * FAR < size or long > FAR * short


def _describe(image: SiteImage, one: Fingerprint | None) -> str:
    return f"{image.path}: {one.width} x {one.height}" if one else str(image.path)


def _named(image: SiteImage) -> str:
    """A file, and of one with many pictures which one is meant."""
    return str(image.path) if image.frame is None else f"{image.path} [{image.axis} {image.frame}]"


def _files(lines: Iterable[str]) -> dict[str, Any]:
    listed = list(lines)
    return {"count": len(listed), "listed": listed[:LISTED]}

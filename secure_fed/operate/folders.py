"""Folders of images before there is a study: which classes and patients they have, and what they have in common."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from secure_fed.clients.data import BESIDE, UNLABELLED, SiteImage, Split, Unit, read_data
from secure_fed.clients.dicom_header import patient_id
from secure_fed.clients.doubts import all_doubts, doubts_of_pictures
from secure_fed.clients.duplicates import fingerprints
from secure_fed.clients.features import FeatureCache, Progress
from secure_fed.clients.files import IN_A_FOLDER, MANIFEST, Notes, class_folders, image_files, no_folder
from secure_fed.clients.manifest import Row, read_table
from secure_fed.clients.patients import Doubt, doubts, in_one_form, some
from secure_fed.core.errors import DataError, ManifestError, OutputError
from secure_fed.core.storage import scratch_folder, write_durable
from secure_fed.operate.overlaps import Held, Overlaps, overlaps
from secure_fed.protocol.simulation_table import Shares

_UNDECIDED = Shares(train=1.0, val=0.0, test=0.0, unlabelled=0.0)
"""Splits of a folder that does not say so itself, while nobody has asked for any: no label is hidden."""


@dataclass(frozen=True)
class Folder:
    """What a folder of images has.

    Attributes:
        path: of the folder, as it was given.
        classes: its labels, sorted.
        unit: ``patient`` if all of its images say whose they are.
        has_splits: whether its manifest says what is used for what; else all of it is in ``train``.
        images: all of them, sorted by path; labels are indices into ``classes``.
        notes: what was noticed while they were found.
        deeper: of folders of classes, by class, the folders with images in it that have names of their own.
    """

    path: Path
    classes: tuple[str, ...]
    unit: Unit
    has_splits: bool
    images: list[SiteImage]
    notes: Notes
    deeper: Mapping[str, set[str]]

    @property
    def name(self) -> str:
        """Its last part, by which it is told from the others."""
        return self.path.resolve().name

    @property
    def patients(self) -> Counter[str]:
        """Labelled patients by class; one with several counts for each."""
        return Counter(name for name, _ in self.labelled)

    @property
    def labelled(self) -> set[tuple[str, str]]:
        """Class and patient of every image with a label."""
        return {(self.classes[image.label], image.patient) for image in self.images if image.label is not None}


def look_at(path: Path) -> Folder:
    """See what a folder has: a ``manifest.csv``, or one folder a class.

    Raises:
        DataError: there is no such folder, no class in it, or no image.
        ManifestError: its manifest does not fit its files.
    """
    if not path.is_dir():
        raise no_folder(path, IN_A_FOLDER)
    manifest = path / MANIFEST
    columns: tuple[str, ...] = ()
    says_whose = False
    rows: list[Row] = []
    deeper: dict[str, set[str]] = {}
    if manifest.exists():
        table = read_table(manifest, (), ("path", "label"))
        columns, rows = table.columns, table.rows
        says_whose = all(row.cells.get("patient") for row in rows)
        labels = {row.cells.get("label", "") for row in rows} - {""}
    else:
        labels = set(class_folders(path)) - {UNLABELLED}
        deeper = refuse_sites(path, labels)
    if not labels:
        loose = sum(1 for _ in image_files(path))
        raise DataError(
            f"{path}: no class in it, but {loose} images; expected one folder per class, or a {MANIFEST} with columns "
            "path and label: let secfacmic data check --propose write one, and fill in its labels"
        )
    classes = tuple(sorted(labels))
    shares = None if "split" in columns else _UNDECIDED
    unit: Unit = "patient"
    notes = Notes()
    try:
        images = read_data(path, classes, "patient", shares, 0, notes=notes)
    except (DataError, ManifestError):
        if says_whose:  # else it may be for want of ids
            raise
        unit, notes = "image", Notes()
        images = read_data(path, classes, "image", shares, 0, notes=notes)
        notes.told.append(f"{path}: not all images say whose they are, so that each counts as a patient of its own")
        cells = [row.cells.get("patient", "") for row in rows] or [patient_id(image.path) for image in images]
        named = doubts(Counter(filter(None, map(in_one_form, cells))))
        notes.told += [_told(path, doubt) for doubt in named if doubt.kind != "share"]  # which is of all images
    notes.told += _levels(path, deeper, notes)
    notes.told += [_told(path, doubt) for doubt in all_doubts(images, unit, notes)]
    return Folder(path, classes, unit, shares is None, images, notes, deeper)


def refuse_sites(path: Path, names: set[str]) -> dict[str, set[str]]:
    """Refuse a folder of sites' folders, whose names would be taken for classes.

    Returns:
        The folders with images in those of these names that have any.

    Raises:
        DataError: those have the same folders in each, or all of these names a manifest.
    """
    inner = {name: set(class_folders(path / name)) - {UNLABELLED} for name in sorted(names)}
    inner = {name: below for name, below in inner.items() if below}
    if len(names) > 1 and all((path / name / MANIFEST).exists() for name in names):
        alike, common = set(names), {MANIFEST}
    else:
        alike, common = set(inner), set.intersection(*inner.values()) if len(inner) > 1 else set()
    if common:
        raise DataError(
            f"{path}: its folders {', '.join(sorted(alike))} have {', '.join(sorted(common))} in each: they look like "
            f"sites, not like classes; expected the folders of the sites: {path}/*"
        )
    return inner


def _levels(path: Path, deeper: Mapping[str, set[str]], notes: Notes) -> list[str]:
    """How folders within those of the classes, and files beside these, were taken, in words."""
    told = []
    if deeper:
        within = "; ".join(f"in {name}: {some(sorted(below))}" for name, below in deeper.items())
        told.append(f"{path}: folders within a class' folder are of that class ({within})")
    beside = [line.removesuffix(BESIDE) for line in notes.passed_over if line.endswith(BESIDE)]
    if beside:
        told.append(
            f"{path}: {len(beside)} files beside the classes' folders are of no class, and not used: {some(beside)}"
        )
    return told


def names_of(folders: Sequence[Folder]) -> dict[Path, str]:
    """What folders are called: by the last part of their paths, or the whole path where several have one name.

    Raises:
        DataError: a folder is there twice.
    """
    places: dict[Path, Path] = {}
    for folder in folders:
        first = places.setdefault(folder.path.resolve(), folder.path)
        if first is not folder.path:
            raise DataError(f"{folder.path}: the same folder as {first}; expected each folder once")
    counts = Counter(folder.name for folder in folders)
    return {folder.path: folder.name if counts[folder.name] == 1 else str(folder.path) for folder in folders}


def compare(folders: Sequence[Folder], progress: Progress | None = None) -> tuple[Overlaps, list[str]]:
    """What the images of several folders have in common; nothing is kept. What they are of is added to their notes.

    Returns:
        That, by the folders' names in :func:`names_of`, and the files that cannot be decoded, with the reason.

    Raises:
        DataError: a folder is there twice.
    """
    names = names_of(folders)
    held, unreadable = [], []
    total = sum(len(folder.images) for folder in folders)
    before = 0
    with scratch_folder() as scratch, FeatureCache(scratch / "looks.sqlite") as cache:
        for folder in folders:

            def tell(done: int, of: int, before: int = before) -> None:
                if progress is not None:
                    progress(before + done, total)

            looks = fingerprints(folder.images, cache, tell)
            unreadable += [f"{folder.images[index].path}: {why}" for index, why in sorted(looks.unreadable.items())]
            open_ = doubts_of_pictures(folder.images, folder.unit, folder.notes, folder.classes, looks.found)
            folder.notes.told += [_told(folder.path, doubt) for doubt in open_]
            kinds = Counter(one.facts.kind for one in looks.found if one is not None)
            folder.notes.told += [
                f"{folder.path}: among its images: {count} of kind {kind}; leave_out in [data] of site.toml leaves "
                "them out"
                for kind, count in sorted(kinds.items())
                if kind
            ]
            ids = folder.unit == "patient"
            held.append(Held(names[folder.path], folder.images, looks.found, ids=ids, splits=folder.has_splits))
            before += len(folder.images)
    return overlaps(held), unreadable


def _told(path: Path, doubt: Doubt) -> str:
    return f"{path}: doubt: {doubt.text}: {doubt.remedy}"


def propose_manifest(path: Path, out: Path) -> dict[str, Any]:
    """Write a manifest for a folder that has none, to be looked through and completed.

    Labels are the folders' names, patients those that DICOM files name; what is not known is left empty.

    Args:
        path: the folder.
        out: the file; it belongs into the folder as ``manifest.csv``.

    Returns:
        How many ``rows``, and how many lack a ``patient`` or a ``label``.

    Raises:
        OutputError: there is a file already.
        DataError: the folder cannot be read, or has no image.
        StorageError: it cannot be written.
    """
    if out.exists():
        raise OutputError(f"{out}: exists; expected no file there: look through it, or remove it")
    rows = []
    for file in sorted(image_files(path)):
        relative = file.relative_to(path)
        label = relative.parts[0] if len(relative.parts) > 1 and relative.parts[0] != UNLABELLED else ""
        rows.append((relative.as_posix(), patient_id(file), label))
    if not rows:
        raise DataError(f"{path}: no image; expected some to propose a manifest of")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("path", "patient", "label"))
    writer.writerows(rows)
    write_durable(out, text.getvalue().encode(), 0o600)
    return {
        "file": str(out),
        "rows": len(rows),
        "without_patient": sum(not patient for _, patient, _ in rows),
        "without_label": sum(not label for _, _, label in rows),
    }


def facts(folder: Folder) -> dict[str, Any]:
    """What a folder has, as a JSON document."""
    counts = Counter((image.label, image.split) for image in folder.images)
    splits = get_args(Split)
    return {
        "folder": str(folder.path),
        "unit": folder.unit,
        "splits": "as its manifest says" if folder.has_splits else "to be drawn",
        "images": len(folder.images),
        "patients": len({image.patient for image in folder.images}),
        "classes": {name: sum(counts[label, split] for split in splits) for label, name in enumerate(folder.classes)},
        "without_label": sum(counts[None, split] for split in splits),
        "told": folder.notes.told,
        "passed_over": sum(not line.endswith(BESIDE) for line in folder.notes.passed_over),
    }

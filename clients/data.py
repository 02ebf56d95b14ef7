"""A site's images: read from class folders, a manifest or DICOM, checked as a whole, split by patient."""

from __future__ import annotations

import csv
import hashlib
import io
import os
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import accumulate
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from secure_fed.clients.dicom import patient_id
from secure_fed.clients.nifti import Axis
from secure_fed.clients.reading import Place, Source
from secure_fed.core.errors import DataError, LabelError, ManifestError
from secure_fed.protocol.study import Shares

Split = Literal["train", "val", "test", "unlabelled"]
Unit = Literal["patient", "image"]

MANIFEST = "manifest.csv"
UNLABELLED: Split = "unlabelled"
"""Name of the split, and of the optional folder, of images without a label."""

_COLUMNS = ("path", "label")
_SPLITS: tuple[Split, ...] = get_args(Split)
_SPLIT_OF: dict[str, Split] = {split: split for split in _SPLITS}
_NOT_IMAGES = {"thumbs.db", "desktop.ini", "dicomdir"}
_LISTED = 10


@dataclass(frozen=True, slots=True)
class SiteImage:
    """One image of a site.

    Attributes:
        path: the file.
        patient: whose it is; the file's path below the data folder where an image counts as a patient.
        label: index into the study's classes; None exactly if ``split`` is ``unlabelled``.
        split: what it is used for; all images of a patient share one.
        frame: of a multi-frame DICOM file or a NIfTI volume, which frame or slice, from 0; None takes the middle one.
        axis: of a NIfTI volume, which way it is cut.
    """

    path: Path
    patient: str
    label: int | None
    split: Split
    frame: int | None = None
    axis: Axis = "axial"

    @property
    def source(self) -> Source:
        """Where its picture is."""
        return Source(self.path, Place(self.frame, self.axis))


Groups = Callable[[Sequence[SiteImage]], Collection[Collection[str]]]
"""From images to groups of patients that must not be separated."""


@dataclass(frozen=True, slots=True)
class _Row:
    where: str
    path: str
    patient: str
    label: str
    split: str
    frame: str = ""
    base: Path = Path()

    @property
    def key(self) -> tuple[Path, str]:
        """What two rows must not share."""
        return Path(os.path.normpath(self.base / self.path)), self.frame


def read_data(
    folder: Path,
    classes: Sequence[str],
    unit: Unit,
    shares: Shares | None,
    seed: int,
    unlabelled: Path | None = None,
    together: Groups | None = lambda images: (),
) -> list[SiteImage]:
    """Read a site's data folder.

    It holds a ``manifest.csv`` or one folder per class, named exactly as the class, and perhaps ``unlabelled``, each
    searched whole. Hidden files are passed over. The manifest's columns are ``path`` (relative to the folder),
    ``label`` (empty if unknown), and, if wanted, ``patient``, ``split`` and ``frame``; others are free. Where it names
    no patient, a DICOM file's own PatientID counts.

    A ``split`` column holds; without one, ``shares`` apply. Labels of split ``unlabelled`` are hidden.

    Args:
        folder: the data folder; only read.
        classes: the study's class names, in its order; a label is an index into them.
        unit: ``image`` makes each image its own patient, whatever a manifest says. Class folders of anything but
            DICOM know no patients and need it.
        shares: shares of the patients of each class, given to splits by largest remainder. A patient counts for
            the class most of its images have; one with an image without a label goes to ``unlabelled`` whole.
        seed: which patients go where.
        unlabelled: another folder of images without labels, searched whole, or with a manifest of its own (columns
            ``path`` and, if wanted, ``patient`` and ``frame``).
        together: told all images when splits are to be drawn; of each group that it returns, all patients follow the
            first by name, or go to ``unlabelled`` if one of them has to. None draws each patient's split by itself,
            from the seed and the patient's own id: shares then hold on average only, but no other patient decides
            who trains, which is what differential privacy's adjacency asks for.

    Returns:
        The images, sorted by path; a function of the folder's content and the arguments alone.

    Raises:
        DataError: no such folder, no image in it, or class folders without ``shares`` or with patients.
        LabelError: labels or folders outside ``classes``; all are named.
        ManifestError: columns are missing, or rows name no file in the folder, a file twice, no known split, no
            patient, no label where the split needs one, or a patient in two splits; the first ten are named.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; expected {MANIFEST} or one folder per class in it")
    manifest = folder / MANIFEST
    if manifest.exists():
        rows, has_splits = _read_manifest(manifest, unit, shares is not None)
    else:
        rows, has_splits = _read_folders(folder, classes, unit), False
        if shares is None:
            raise DataError(f"{folder}: no {MANIFEST} and no shares; set train, val, test and unlabelled shares")
    if unlabelled is not None:
        rows += _read_unlabelled(unlabelled, unit)
    _refuse(manifest, _double_faults(rows, has_splits))
    if not rows:
        raise DataError(f"{folder}: no image; expected images in {MANIFEST} or in one folder per class")
    strangers = Counter(row.label for row in rows if row.label and row.label not in classes)
    if strangers:
        _refuse_labels(manifest, strangers, "rows", classes)
    ids = {name: index for index, name in enumerate(classes)}
    if has_splits:
        splits = {row.patient: _SPLIT_OF[row.split] for row in rows}
    else:
        assert shares is not None  # both readers refuse otherwise
        splits = _draw_each_split(rows, shares, seed) if together is None else _draw_splits(rows, ids, shares, seed)
        bare = _images(rows, ids, dict.fromkeys(splits, UNLABELLED))
        unknown = {row.patient for row in rows if not row.label}
        for group in () if together is None else together(bare):
            split = UNLABELLED if unknown.intersection(group) else splits[min(group)]
            splits.update((patient, split) for patient in group)
    return _images(rows, ids, splits)


def _images(rows: Sequence[_Row], ids: dict[str, int], splits: dict[str, Split]) -> list[SiteImage]:
    images = []
    for row in rows:
        split = splits[row.patient]
        label = None if split == UNLABELLED else ids[row.label]
        frame = int(row.frame) if row.frame else None
        images.append(SiteImage(row.base / row.path, row.patient, label, split, frame))
    return sorted(images, key=lambda image: (image.path.as_posix(), -1 if image.frame is None else image.frame))


def _read_folders(folder: Path, classes: Sequence[str], unit: Unit) -> list[_Row]:
    entries = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name[0] != ".")
    strangers = [name for name in entries if name not in classes and name != UNLABELLED]
    if strangers:
        counts = Counter({name: sum(1 for _ in image_files(folder / name)) for name in strangers})
        _refuse_labels(folder, counts, "images", [*classes, UNLABELLED])
    rows = []
    for name in entries:
        label = name if name in classes else ""
        rows += [_found_row(folder, path, unit, label, "") for path in image_files(folder / name)]
    return rows


def _found_row(folder: Path, path: Path, unit: Unit, label: str, split: str) -> _Row:
    """The row of a file that no manifest lists."""
    relative = path.relative_to(folder).as_posix()
    patient = relative if unit == "image" else patient_id(path)
    if not patient:
        raise DataError(
            f"{path}: class folders carry no patient ids, and this is no DICOM file with a PatientID; expected a "
            f'{MANIFEST} with a patient column, or unit = "image" if every image may count as its own patient'
        )
    return _Row(relative, relative, patient, label, split, base=folder)


def _read_unlabelled(folder: Path, unit: Unit) -> list[_Row]:
    """The rows of the folder of images without labels; an image that counts as a patient is known by its whole path."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; expected images without labels in it")
    if (folder / MANIFEST).exists():
        rows, _ = _read_manifest(folder / MANIFEST, unit, has_shares=True, needed=("path",))
        rows = [replace(row, label="", split=UNLABELLED) for row in rows]
    else:
        rows = [_found_row(folder, path, unit, "", UNLABELLED) for path in image_files(folder)]
    if unit == "image":
        rows = [replace(row, patient=(folder / row.path).as_posix() + row.frame) for row in rows]
    return rows


def image_files(folder: Path) -> Iterator[Path]:
    """All files below a folder, hidden ones and what file managers leave behind passed over."""
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name[0] != "."]
        for name in names:
            if name[0] != "." and name.lower() not in _NOT_IMAGES:
                yield Path(parent, name)


def _read_manifest(
    manifest: Path, unit: Unit, has_shares: bool, needed: Sequence[str] = _COLUMNS
) -> tuple[list[_Row], bool]:
    """The rows, checked, and whether they carry splits."""
    try:
        # Spreadsheets put a byte-order mark in front.
        reader = csv.DictReader(io.StringIO(manifest.read_text(encoding="utf-8-sig"), newline=""), strict=True)
        content = [(reader.line_num, entry) for entry in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ManifestError(f"{manifest}: cannot be read ({error}); expected a UTF-8 CSV file") from error
    columns = reader.fieldnames or ()
    has_splits = "split" in columns
    missing = [name for name in needed if name not in columns]
    if not has_splits and not has_shares:
        missing.append("split")
    if missing:
        raise ManifestError(
            f"{manifest}: no column {', '.join(missing)}; found {', '.join(columns) or 'none'}, expected "
            f"{', '.join(needed)} and split (unless shares are set); patient and frame where they are needed"
        )
    has_splits = has_splits and "label" in needed
    rows, faults = [], []
    for line, entry in content:
        cells = {name: (entry.get(name) or "").strip() for name in ("path", "patient", "label", "split", "frame")}
        patient = cells["path"] + (f"#{cells['frame']}" if cells["frame"] else "")
        if unit == "patient":
            patient = cells["patient"] or patient_id(manifest.parent / cells["path"])
        where, base = f"line {line}", manifest.parent
        row = _Row(where, cells["path"], patient, cells["label"], cells["split"], cells["frame"], base)
        fault = _fault(row, manifest.parent, has_splits)
        if fault:
            faults.append(f"{row.where}: {fault}")
        rows.append(row)
    # Two rows for one file are told together with what is wrong in each.
    _refuse(manifest, faults + (_double_faults(rows, has_splits) if faults else []))
    return rows, has_splits


def _refuse(manifest: Path, faults: Sequence[str]) -> None:
    if faults:
        count = f"{len(faults)} rows do" if len(faults) > 1 else "1 row does"
        shown = "".join(f"\n  {fault}" for fault in faults[:_LISTED])
        more = f"\n  and {len(faults) - _LISTED} more" if len(faults) > _LISTED else ""
        raise ManifestError(f"{manifest}: {count} not fit; mend or remove them{shown}{more}")


def _fault(row: _Row, folder: Path, has_splits: bool) -> str | None:
    if not row.path:
        return "no path"
    path = folder / row.path
    if not path.resolve().is_relative_to(folder.resolve()):
        return f"path {row.path!r} leads out of the data folder; expected a relative path inside it"
    if not path.is_file():
        return f"path {row.path!r}: no such file"
    if not row.patient:
        return f'{row.path!r} has no patient; expected an id, a DICOM file with a PatientID, or unit = "image"'
    if row.frame and not (row.frame.isascii() and row.frame.isdecimal()):
        return f"{row.path!r} has frame {row.frame!r}; expected a number from 0, or none for the middle one"
    if has_splits and row.split not in _SPLITS:
        return f"{row.path!r} has split {row.split!r}; expected one of {', '.join(_SPLITS)}"
    if has_splits and row.split != UNLABELLED and not row.label:
        return f"{row.path!r} has no label but split {row.split!r}; expected split {UNLABELLED!r} or a label"
    return None


def _double_faults(rows: Sequence[_Row], has_splits: bool) -> list[str]:
    """Files that are listed twice, and patients in two splits: test images must not be of trained patients."""
    faults = []
    first: dict[tuple[Path, str], _Row] = {}
    splits: dict[str, _Row] = {}
    for row in rows:
        if row.path and row.key in first:
            faults.append(f"{row.where}: path {row.path!r} is also on {first[row.key].where}; expected it once")
        first.setdefault(row.key, row)
        other = splits.setdefault(row.patient, row)
        if has_splits and row.patient and other.split != row.split:
            faults.append(
                f"{row.where}: patient {row.patient!r} is in split {row.split!r}, but on {other.where} in "
                f"{other.split!r}; expected one split a patient"
            )
    return faults


def _refuse_labels(where: Path, found: Counter[str], what: str, allowed: Sequence[str]) -> None:
    names = ", ".join(f"{name!r} ({count} {what})" for name, count in sorted(found.items()))
    expected = ", ".join(repr(name) for name in allowed)
    raise LabelError(
        f"{where}: labels outside the study's classes: {names}; expected {expected}, spelled exactly so: "
        "rename or remove them"
    )


def _draw_splits(rows: Sequence[_Row], ids: dict[str, int], shares: Shares, seed: int) -> dict[str, Split]:
    """The split of each patient."""
    labels: dict[str, Counter[int]] = defaultdict(Counter)
    splits: dict[str, Split] = {}
    for row in rows:
        if row.label:
            labels[row.patient][ids[row.label]] += 1
        else:
            splits[row.patient] = UNLABELLED
    strata: dict[int, list[str]] = defaultdict(list)
    for patient, counts in labels.items():
        if patient not in splits:
            strata[min(counts, key=lambda label: (-counts[label], label))].append(patient)
    quotas = [getattr(shares, split) for split in _SPLITS]
    for label, patients in strata.items():
        order = np.random.default_rng([seed, label]).permutation(len(patients))
        shuffled = iter(sorted(patients)[i] for i in order)
        for split, count in zip(_SPLITS, _largest_remainder(len(patients), quotas), strict=True):
            splits.update((next(shuffled), split) for _ in range(count))
    return splits


def _draw_each_split(rows: Sequence[_Row], shares: Shares, seed: int) -> dict[str, Split]:
    """The split of each patient, a function of seed, id and whether all its images have labels."""
    bounds = list(accumulate(getattr(shares, split) for split in _SPLITS[:-1]))
    unknown = {row.patient for row in rows if not row.label}
    splits = {}
    for patient in {row.patient for row in rows}:
        digest = hashlib.sha256(f"secfacmic split 1\n{seed}\n{patient}".encode()).digest()
        point = int.from_bytes(digest[:8], "big") / 2**64
        splits[patient] = UNLABELLED if patient in unknown else _SPLITS[bisect_right(bounds, point)]
    return splits


def _largest_remainder(total: int, shares: Sequence[float]) -> list[int]:
    """Whole numbers that add up to ``total``, each within one of its share; ties go to the earlier."""
    exact = [total * Fraction(str(share)) for share in shares]  # as floats, 0.29 * 100 is not 29
    counts = [int(value) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts

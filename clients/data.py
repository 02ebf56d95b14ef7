"""A site's images: read from class folders or a manifest, checked as a whole, split by patient."""

from __future__ import annotations

import csv
import io
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from secure_fed.errors import DataError, LabelError, ManifestError
from secure_fed.study import Shares

Split = Literal["train", "val", "test", "unlabelled"]
Unit = Literal["patient", "image"]

MANIFEST = "manifest.csv"
UNLABELLED: Split = "unlabelled"
"""Name of the split, and of the optional folder, of images without a label."""

_COLUMNS = ("path", "patient", "label")
_SPLITS: tuple[Split, ...] = get_args(Split)
_SPLIT_OF: dict[str, Split] = {split: split for split in _SPLITS}
_NOT_IMAGES = {"thumbs.db", "desktop.ini"}
_LISTED = 10


@dataclass(frozen=True, slots=True)
class SiteImage:
    """One image of a site.

    Attributes:
        path: the file.
        patient: whose it is; the file's path below the data folder where an image counts as a patient.
        label: index into the study's classes; None exactly if ``split`` is ``unlabelled``.
        split: what it is used for; all images of a patient share one.
    """

    path: Path
    patient: str
    label: int | None
    split: Split


@dataclass(frozen=True, slots=True)
class _Row:
    where: str
    path: str
    patient: str
    label: str
    split: str


def read_data(folder: Path, classes: Sequence[str], unit: Unit, shares: Shares | None, seed: int) -> list[SiteImage]:
    """Read a site's data folder.

    It holds a ``manifest.csv`` (columns ``path``, ``patient``, ``label``, ``split``; path relative to the folder;
    label empty if unknown), or one folder per class, named exactly as the class, and perhaps ``unlabelled``,
    each searched whole. Hidden files are passed over.

    A ``split`` column holds; without one, ``shares`` apply. Labels of split ``unlabelled`` are hidden.

    Args:
        folder: the data folder; only read.
        classes: the study's class names, in its order; a label is an index into them.
        unit: ``image`` makes each image its own patient, whatever a manifest says. Class folders know no
            patients and need it.
        shares: shares of the patients of each class, given to splits by largest remainder. A patient counts for
            the class most of its images have; one with an image without a label goes to ``unlabelled`` whole.
        seed: which patients go where.

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
        splits = _draw_splits(rows, ids, shares, seed)
    images = []
    for row in rows:
        split = splits[row.patient]
        label = None if split == UNLABELLED else ids[row.label]
        images.append(SiteImage(folder / row.path, row.patient, label, split))
    return sorted(images, key=lambda image: image.path.as_posix())


def _read_folders(folder: Path, classes: Sequence[str], unit: Unit) -> list[_Row]:
    if unit != "image":
        raise DataError(
            f"{folder}: class folders carry no patient ids; expected a {MANIFEST} with a patient column, or "
            'unit = "image" if every image may count as its own patient'
        )
    entries = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name[0] != ".")
    strangers = [name for name in entries if name not in classes and name != UNLABELLED]
    if strangers:
        counts = Counter({name: sum(1 for _ in _files(folder / name)) for name in strangers})
        _refuse_labels(folder, counts, "images", [*classes, UNLABELLED])
    rows = []
    for name in entries:
        label = name if name in classes else ""
        for path in _files(folder / name):
            relative = path.relative_to(folder).as_posix()
            rows.append(_Row(relative, relative, relative, label, ""))
    return rows


def _files(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name[0] != "."]
        for name in names:
            if name[0] != "." and name.lower() not in _NOT_IMAGES:
                yield Path(parent, name)


def _read_manifest(manifest: Path, unit: Unit, has_shares: bool) -> tuple[list[_Row], bool]:
    """The rows, checked, and whether they carry splits."""
    try:
        # Spreadsheets put a byte-order mark in front.
        reader = csv.DictReader(io.StringIO(manifest.read_text(encoding="utf-8-sig"), newline=""), strict=True)
        content = [(reader.line_num, entry) for entry in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ManifestError(f"{manifest}: cannot be read ({error}); expected a UTF-8 CSV file") from error
    columns = reader.fieldnames or ()
    has_splits = "split" in columns
    missing = [name for name in _COLUMNS if name not in columns]
    if not has_splits and not has_shares:
        missing.append("split")
    if missing:
        raise ManifestError(
            f"{manifest}: no column {', '.join(missing)}; found {', '.join(columns) or 'none'}, expected "
            f"{', '.join(_COLUMNS)} and split (unless shares are set)"
        )
    rows, faults = [], []
    for line, entry in content:
        cells = {name: (entry.get(name) or "").strip() for name in (*_COLUMNS, "split")}
        patient = cells["path"] if unit == "image" else cells["patient"]
        row = _Row(f"line {line}", cells["path"], patient, cells["label"], cells["split"])
        fault = _fault(row, manifest.parent, has_splits)
        if fault:
            faults.append(f"{row.where}: {fault}")
        rows.append(row)
    faults += _double_faults(rows, has_splits)
    if faults:
        count = f"{len(faults)} rows do" if len(faults) > 1 else "1 row does"
        shown = "".join(f"\n  {fault}" for fault in faults[:_LISTED])
        more = f"\n  and {len(faults) - _LISTED} more" if len(faults) > _LISTED else ""
        raise ManifestError(f"{manifest}: {count} not fit; mend or remove them{shown}{more}")
    return rows, has_splits


def _fault(row: _Row, folder: Path, has_splits: bool) -> str | None:
    if not row.path:
        return "no path"
    path = folder / row.path
    if not path.resolve().is_relative_to(folder.resolve()):
        return f"path {row.path!r} leads out of the data folder; expected a relative path inside it"
    if not path.is_file():
        return f"path {row.path!r}: no such file"
    if not row.patient:
        return f'{row.path!r} has no patient; expected an id, or unit = "image"'
    if has_splits and row.split not in _SPLITS:
        return f"{row.path!r} has split {row.split!r}; expected one of {', '.join(_SPLITS)}"
    if has_splits and row.split != UNLABELLED and not row.label:
        return f"{row.path!r} has no label but split {row.split!r}; expected split {UNLABELLED!r} or a label"
    return None


def _double_faults(rows: Sequence[_Row], has_splits: bool) -> list[str]:
    """Files that are listed twice, and patients in two splits: test images must not be of trained patients."""
    faults = []
    first: dict[str, _Row] = {}
    splits: dict[str, _Row] = {}
    for row in rows:
        path = os.path.normpath(row.path)
        if row.path and path in first:
            faults.append(f"{row.where}: path {row.path!r} is also on {first[path].where}; expected it once")
        first.setdefault(path, row)
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


def _largest_remainder(total: int, shares: Sequence[float]) -> list[int]:
    """Whole numbers that add up to ``total``, each within one of its share; ties go to the earlier."""
    exact = [total * Fraction(str(share)) for share in shares]  # as floats, 0.29 * 100 is not 29
    counts = [int(value) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts

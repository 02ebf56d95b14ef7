"""A site's images: found in class folders or a manifest, checked as a whole, split by patient."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import unicodedata
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import accumulate
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from secure_fed.clients.dicom_header import NOBODY, Owner, owner
from secure_fed.clients.files import (
    COPY,
    IN_A_FOLDER,
    KNOWN_COLUMNS,
    MANIFEST,
    Files,
    Notes,
    image_files,
    is_number,
    is_passed_over,
    masks_of,
    named_as_masks,
    no_folder,
    said,
)
from secure_fed.clients.manifest import Table, plain_form, read_table
from secure_fed.clients.nifti import AXES, Axis
from secure_fed.clients.patients import SETTLED, in_one_form, read_settled, says_nothing, some
from secure_fed.clients.reading import Place, Source, frames_of, kind_of, no_picture
from secure_fed.clients.rules import Kind
from secure_fed.clients.series import Position, place_in_series, slices_in_order, taken
from secure_fed.core.errors import DataError, LabelError, ManifestError, fault_lines
from secure_fed.protocol.simulation_table import Shares

Split = Literal["train", "val", "test", "unlabelled"]
Unit = Literal["patient", "image"]
UNLABELLED: Split = "unlabelled"
"""Name of the split, and of the optional folder, of images without a label."""

BESIDE = ": in no folder of a class"
"""Ends what is noted of a file that was passed over for that."""

DRAWN_ALONE = (
    "under a privacy budget the splits are drawn anew, each patient's by itself: they are not those of a run without a "
    "budget, and shares hold on average only"
)
"""Told where it is so."""

_COLUMNS = ("path", "label")
_SPLITS: tuple[Split, ...] = get_args(Split)
_SPLIT_WORDS = frozenset({*_SPLITS, "training", "valid", "validation", "testing", "dev"})
_SPLIT_CELLS = _SPLIT_WORDS | {
    *("trn", "tst", "eval", "evaluation", "holdout", "heldout", "development", "trainingsdaten", "testdaten"),
    *("validierung", "entrenamiento", "prueba", "validaci\u00f3n", "validacion", "entra\u00eenement", "entrainement"),
    *("apprentissage", "addestramento", "validazione", "treino", "treinamento", "teste", "valida\u00e7\u00e3o"),
}
"""Words of splits, as hospitals and public collections write them, beside these:"""
_SPLIT_FILLERS = frozenset(
    {"set", "sets", "data", "split", "cohort", "internal", "external", "public", "private", "usage"}
)
_SPLIT_COLUMNS = re.compile(r"(is|in|for)?((train(ing)?|val(id|idation)?|test(ing)?|holdout|heldout)(set|ing)?)+")
"""Names of columns, letters alone, that say of each row whether it is in one split, by one of these words:"""
_YES_OR_NO = frozenset(
    {
        *("0", "1", "2", "0.0", "1.0", "2.0", "true", "false", "yes", "no", "y", "n", "t", "f", "x", "-", "*"),
        *("wahr", "falsch", "vrai", "faux", "verdadero", "falso", "vero", "ja", "nein", "nee", "j", "oui", "non", "si"),
        *("s\u00ed", "s\u00ec", "s", "sim", "n\u00e3o", "nao", "tak", "nie", "\u2713", "\u2717", "\u2013"),
    }
)
_FOLDS = re.compile(r"(cv|k)?folds?(id|no|nr|number)?")
_SPLIT_OF: dict[str, Split] = {split: split for split in _SPLITS}
_TABLES = (".csv", ".tsv", ".xlsx", ".xls", ".ods")


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
        owner: whose it is by the file's own header, whatever a manifest says; not looked at where an image counts as a
            patient.
        mask: a picture of where its finding is, if a manifest names one; not looked at yet.
        line: of the manifest, where its row is; 0 if there is none. Rows in another order are no other data.
    """

    path: Path
    patient: str
    label: int | None
    split: Split
    frame: int | None = None
    axis: Axis = "axial"
    owner: Owner = NOBODY
    mask: Path | None = None
    line: int = field(default=0, compare=False)

    @property
    def source(self) -> Source:
        """Where its picture is."""
        return Source(self.path, Place(self.frame, self.axis))


@dataclass(frozen=True)
class Choice:
    """Which of the pictures that are there a site uses.

    Attributes:
        slices: of each series, be it one file or many: ``middle``, ``every:N`` or ``all``; None takes each file for one
            image, of many frames the middle one. What rows of a manifest ask for by frame or slice stays.
        leave_out: kinds of DICOM files that are left out.
        patients: ``patients.csv``, if not in the data folder.
        only: paths below the data folder; if there are any, all else that is in it is as if it were not.
    """

    slices: str | None = None
    leave_out: tuple[Kind, ...] = ()
    patients: Path | None = None
    only: frozenset[str] = frozenset()


EVERYTHING = Choice()
"""All pictures that are there."""


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
    axis: str = ""
    series: str = ""
    asked: bool = False
    owner: Owner = NOBODY
    mask: str = ""
    line: int = 0

    @property
    def key(self) -> tuple[str, str, str]:
        """What two rows must not share."""
        frame = self.frame and (self.frame.lstrip("0") or "0")
        return os.path.realpath(os.path.join(self.base, self.path)), frame, self.axis or "axial"


def read_data(
    folder: Path,
    classes: Sequence[str],
    unit: Unit,
    shares: Shares | None,
    seed: int,
    unlabelled: Path | None = None,
    together: Groups | None = lambda images: (),
    choice: Choice = EVERYTHING,
    notes: Notes | None = None,
    others: str | None = None,
) -> list[SiteImage]:
    """Read a site's data folder.

    It holds a ``manifest.csv`` or one folder per class, named exactly as the class, and perhaps ``unlabelled``, each
    searched whole, links followed. Hidden files, and what is no image by content and name, are passed over. The
    manifest's columns are ``path`` (relative to the folder), ``label`` (empty if unknown), and, if wanted, ``patient``,
    ``split``, ``frame`` or ``slice``, ``axis``, ``series`` and ``mask``; others are free. What a manifest names
    as a mask is no image of the site. A path may be of a folder: the row then
    is of all images below it, or of those of the DICOM series whose UID ``series`` names, and ``slice`` counts along
    them. Where it names no patient, a DICOM file's own PatientID counts. Ids are taken in one form; ``patients.csv``
    beside it says which ids are one patient.

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
        choice: which pictures are used.
        notes: what is noticed is added here.
        others: the class that every label outside ``classes`` is of; without one such labels are refused.

    Returns:
        The images, sorted by path; a function of the folder's content and the arguments alone.

    Raises:
        DataError: no such folder, no image in it, or class folders without ``shares`` or with patients.
        LabelError: labels or folders outside ``classes``; all are named.
        ManifestError: columns are missing, or rows name no file in the folder, a file twice, no known split, no
            patient, no label where the split needs one, or a patient in two splits; the first ten are named.
    """
    if not folder.is_dir():
        raise no_folder(folder, IN_A_FOLDER)
    manifest = folder / MANIFEST
    notes = Notes() if notes is None else notes
    if manifest.exists():
        rows, has_splits = _read_manifest(manifest, unit, shares is not None, notes)
    else:
        rows, has_splits = _read_folders(folder, classes, unit, notes, others), False
        if shares is None:
            raise DataError(f"{folder}: no {MANIFEST} and no shares; set train, val, test and unlabelled shares")
    known = {row.patient for row in rows}
    if choice.only:
        rows = _only(folder, rows, choice.only)
    if unlabelled is not None:
        rows += _read_unlabelled(unlabelled, unit, notes)
        known.update(row.patient for row in rows)
    if manifest.exists() and not choice.only:
        _tell_unlisted(manifest, rows, notes)
    rows = _chosen(rows, choice, unit, notes)
    if unit == "patient":
        rows = _settled(rows, choice.patients, folder, notes, known)
    _refuse(manifest, _double_faults(rows, has_splits))
    if not rows:
        raise DataError(f"{folder}: no image; expected images in {MANIFEST} or in one folder per class")
    strangers = Counter(row.label for row in rows if row.label and row.label not in classes)
    if meant := _meant(strangers, classes):
        rows = [replace(row, label=meant.get(row.label, row.label)) for row in rows]
        strangers = Counter({label: count for label, count in strangers.items() if label not in meant})
    if strangers and others is not None:
        where = manifest if manifest.exists() else folder
        refuse_unclear(where, strangers, classes, others)
        rows = [replace(row, label=others) if row.label in strangers else row for row in rows]
        notes.told.append(f"{where}: taken as {others!r}: {_counted(strangers, 'images')}")
    elif strangers:
        _refuse_labels(manifest, strangers, "rows", classes)
    ids = {name: index for index, name in enumerate(classes)}
    if has_splits:
        splits = {row.patient: _SPLIT_OF[row.split] for row in rows}
    else:
        assert shares is not None  # both readers refuse otherwise
        if together is None:
            notes.told.append(DRAWN_ALONE)
        # The pictures of one file are as alike as those of one patient.
        whole = [replace(row, patient=_file(row, folder)) for row in rows] if unit == "image" else rows
        splits = _draw_each_split(whole, shares, seed) if together is None else _draw_splits(whole, ids, shares, seed)
        bare = _images(whole, ids, dict.fromkeys(splits, UNLABELLED))
        unknown = {row.patient for row in whole if not row.label}
        for group in () if together is None else together(bare):
            split = UNLABELLED if unknown.intersection(group) else splits[min(group)]
            splits.update((patient, split) for patient in group)
        splits = {row.patient: splits[one.patient] for row, one in zip(rows, whole, strict=True)}
    return _images(rows, ids, splits)


def _file(row: _Row, folder: Path) -> str:
    """By which an image's file is known where images count as patients; of one outside the folder, its whole path."""
    return row.path if row.base == folder else (row.base / row.path).as_posix()


def find_pictures(folder: Path, choice: Choice, notes: Notes) -> list[SiteImage]:
    """All pictures below a folder, to be predicted; what a manifest there says of labels and splits is not looked at.

    A manifest (``path``; ``patient``, ``frame`` or ``slice``, ``axis``, ``series``) says which pictures of the files
    that it names are meant, and whose they are; the files that it does not name are there too. The id of a patient whom
    nobody names is empty. Files that hold no picture of a patient (reports, segmentations) are passed over.

    Raises:
        DataError: a folder or file cannot be read.
        ManifestError: as :func:`read_data`.
    """
    rows: list[_Row] = []
    if (folder / MANIFEST).exists():
        rows, _ = _read_manifest(folder / MANIFEST, "patient", True, notes, needed=("path",), nameless=True)
        rows = [replace(row, label="", split=UNLABELLED) for row in rows]
    named = {row.key[0] for row in rows}
    for path in image_files(folder, notes):
        row = _found_row(folder, path, "patient", "", UNLABELLED)
        rows += [] if row.key[0] in named else [row]
    pictures = []
    for row in rows:
        if what := no_picture(row.base / row.path):
            notes.passed_over.append(f"{row.base / row.path}: {what}")
        else:
            pictures.append(row)
    rows = _settled(_chosen(pictures, choice, "patient", notes), choice.patients, folder, notes)
    _refuse(folder / MANIFEST, _double_faults(rows, False))
    return _images(rows, {}, defaultdict(lambda: UNLABELLED))


def _images(rows: Sequence[_Row], ids: dict[str, int], splits: Mapping[str, Split]) -> list[SiteImage]:
    images = []
    for row in rows:
        split = splits[row.patient]
        label = None if split == UNLABELLED else ids[row.label]
        frame = int(row.frame) if row.frame else None
        mask = row.base / row.mask if row.mask else None
        place = frame, _axis(row.axis)
        images.append(SiteImage(row.base / row.path, row.patient, label, split, *place, row.owner, mask, row.line))
    return sorted(images, key=lambda one: (one.path.as_posix(), one.axis, -1 if one.frame is None else one.frame))


def _read_folders(folder: Path, classes: Sequence[str], unit: Unit, notes: Notes, others: str | None) -> list[_Row]:
    try:
        found = sorted(folder.iterdir())
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error.strerror}); give this user access to it") from error
    entries = []
    for entry in found:
        if entry.is_dir() and not is_passed_over(entry.name):
            entries.append(entry.name)
        elif entry.is_symlink() and not entry.exists():
            raise DataError(f"{entry}: a link to nothing; mount or restore what it leads to, or remove it")
        elif entry.stem.casefold() == "manifest" and entry.suffix.casefold() in _TABLES:
            raise ManifestError(
                f"{entry}: not read under this name; expected {MANIFEST}: save it as that, or remove it"
            )
        elif entry.is_dir() or not entry.name.startswith("."):
            notes.passed_over.append(f"{said(entry)}{BESIDE}")
    strangers = [name for name in entries if name not in classes and name != UNLABELLED]
    meant = _meant(strangers, classes)
    strangers = [name for name in strangers if name not in meant]
    if strangers and others is None:
        counts = Counter({name: sum(1 for _ in image_files(folder / name)) for name in strangers})
        _refuse_labels(folder, counts, "images", [*classes, UNLABELLED])
    rows = []
    for name in entries:
        label = "" if name == UNLABELLED and name not in classes else meant.get(name, name)
        rows += [_found_row(folder, path, unit, label, "") for path in image_files(folder / name, notes)]
    _refuse_split_folders(folder, rows)
    _tell_class_below(folder, rows, classes, notes)
    _refuse_two_classes(rows)
    _refuse_nameless(rows)
    return rows


def _tell_unlisted(manifest: Path, rows: Sequence[_Row], notes: Notes) -> None:
    """Tell how many images are in the folder of a manifest and in no row."""
    listed = {os.path.normpath(row.base / row.path) for row in rows} | {row.key[0] for row in rows}
    sliced = {
        os.path.normpath((row.base / row.path).parent) for row in rows if row.asked
    }  # whose others were meant too
    unlisted = []
    with contextlib.suppress(DataError):  # what no row names need not be readable
        for path in image_files(manifest.parent, Notes()):
            if os.path.normpath(path.parent) in sliced:
                continue
            if os.path.normpath(path) not in listed and os.path.realpath(path) not in listed:
                unlisted.append(str(path))
    if unlisted:
        notes.told.append(
            f"{manifest}: {len(unlisted)} images beside it are in none of its rows, and are not used: "
            f"{some(sorted(unlisted))}"
        )


def _tell_class_below(folder: Path, rows: Sequence[_Row], classes: Sequence[str], notes: Notes) -> None:
    """Tell of folders below a class that are named as another one."""
    names = {plain_form(name) for name in (*classes, UNLABELLED)}
    found: Counter[str] = Counter()
    for row in rows:
        above, *parts = Path(row.path).parts[:-1]
        if below := [part for part in parts if plain_form(part) in names - {plain_form(above)}]:
            found["/".join((above, *parts[: parts.index(below[0]) + 1]))] += 1
    if found:
        notes.told.append(
            f"{folder}: folders named as one class lie in another's, and their images are taken for the class of the "
            f"upper folder: {_counted(found, 'images')}"
        )


def _meant(labels: Iterable[str], classes: Sequence[str]) -> dict[str, str]:
    """Of labels that differ from a class in Unicode's form alone, that class."""
    forms = {unicodedata.normalize("NFC", name): name for name in classes}
    return {label: forms[form] for label in labels if (form := unicodedata.normalize("NFC", label)) in forms}


def _refuse_split_folders(folder: Path, rows: Sequence[_Row]) -> None:
    """Refuse folders below a class that are named as splits are: splits are drawn, and would not be these."""
    found = Counter(
        "/".join(parts[: depth + 1])
        for row in rows
        if row.label
        for parts in [Path(row.path).parts[:-1]]
        for depth, part in enumerate(parts)
        if depth and part.casefold() in _SPLIT_WORDS
    )
    if found:
        raise DataError(
            f"{folder}: {len(found)} folders below a class are named as splits, and folders carry no splits; "
            f"expected a {MANIFEST} with a column split, or other names if splits are to be drawn"
            f"{fault_lines([f'{name} ({count} images)' for name, count in sorted(found.items())])}"
        )


def _refuse_two_classes(rows: Sequence[_Row]) -> None:
    """Refuse files that links make members of two classes."""
    first: dict[tuple[int, int], _Row] = {}
    for row in rows:
        state = os.stat(row.base / row.path)
        other = first.setdefault((state.st_dev, state.st_ino), row)
        if other.label != row.label:
            raise LabelError(
                f"{row.base / row.path}: the same file as {other.path}, by a link; expected a file in one class: "
                "remove the link that is wrong"
            )


def _found_row(folder: Path, path: Path, unit: Unit, label: str, split: str) -> _Row:
    """The row of a file that no manifest lists."""
    relative = path.relative_to(folder).as_posix()
    whose = NOBODY if unit == "image" else owner(path)
    patient = relative if unit == "image" else in_one_form(whose.patient)
    return _Row(relative, relative, patient, label, split, base=folder, owner=whose)


def _refuse_nameless(rows: Sequence[_Row]) -> None:
    """Refuse files of which nobody says whose they are."""
    nameless = [row for row in rows if not row.patient]
    if nameless:
        lines = [str(row.base / row.path) for row in nameless]
        raise DataError(
            f"{len(nameless)} of {len(rows)} files have no patient: folders carry no patient ids, and these are no "
            f'DICOM files with a PatientID; expected a {MANIFEST} with a patient column, or unit = "image" if every '
            f"image may count as its own patient{fault_lines(lines)}"
        )


def _read_unlabelled(folder: Path, unit: Unit, notes: Notes) -> list[_Row]:
    """The rows of the folder of images without labels; an image that counts as a patient is known by its whole path."""
    if not folder.is_dir():
        raise no_folder(folder, "images without labels in it")
    if (folder / MANIFEST).exists():
        rows, _ = _read_manifest(folder / MANIFEST, unit, True, notes, needed=("path",))
        rows = [replace(row, label="", split=UNLABELLED) for row in rows]
    else:
        rows = [_found_row(folder, path, unit, "", UNLABELLED) for path in image_files(folder, notes)]
        _refuse_nameless(rows)
    if unit == "image":
        rows = [replace(row, patient=(folder / row.path).as_posix() + row.frame) for row in rows]
    return rows


def _only(folder: Path, rows: Sequence[_Row], paths: frozenset[str]) -> list[_Row]:
    """The rows of these paths.

    Raises:
        DataError: some of them are not there.
    """
    kept = [row for row in rows if row.path in paths]
    missing = sorted(paths - {row.path for row in kept})
    if missing:
        raise DataError(
            f"{folder}: {len(missing)} of {len(paths)} images that are listed for this site are not there; expected "
            f"the folder that the list was made of{fault_lines(missing)}"
        )
    return kept


def _chosen(rows: list[_Row], choice: Choice, unit: Unit, notes: Notes) -> list[_Row]:
    """The rows that the site's choice leaves, a row for each slice."""
    if choice.leave_out:
        kept = []
        for row in rows:
            kind = kind_of(row.base / row.path)
            if kind and kind in choice.leave_out:
                notes.left_out[kind] += 1
            else:
                kept.append(row)
        rows = kept
    if choice.slices is None:
        return rows
    series: defaultdict[tuple[str, ...], list[tuple[Position, _Row]]] = defaultdict(list)
    chosen = [row for row in rows if row.frame or row.asked]
    unplaced_frames: list[str] = []
    across: list[str] = []
    alone: list[str] = []
    several: list[str] = []
    instances: set[tuple[str, str, str]] = set()
    for row in sorted(rows, key=lambda one: one.path):
        if row.frame or row.asked:
            continue
        path = row.base / row.path
        frames, placed = frames_of(path, _axis(row.axis))
        if len(taken(frames, "all")) > 1:
            which = taken(frames, choice.slices)
            for frame in map(str, which):
                patient = f"{row.patient}#{frame}" if unit == "image" else row.patient
                chosen.append(replace(row, frame=frame, patient=patient))
            notes.left_out["other slice"] += len(taken(frames, "all")) - len(which)
            if not placed and choice.slices != "all":
                unplaced_frames.append(str(path))
            if max(map(len, frames)) > 1:
                several.append(str(path))
            continue
        name, position, instance = place_in_series(path)
        if instance:
            known = instance, row.patient if unit == "patient" else "", row.label
            if known in instances:
                notes.left_out[COPY] += 1
                continue
            instances.add(known)
        name = row.series or name
        if not name and position != Position():
            alone.append(str(path))
        key = (name, row.patient if unit == "patient" else "", row.label) if name else ("", row.path)
        series[key].append((position, row))
    for slices in series.values():
        places, unplaced, crossed = slices_in_order([(position, row.path) for position, row in slices])
        if choice.slices == "all":  # then nothing hangs on their order
            places, unplaced, crossed = [*places, unplaced], [], False
        first = slices[places[0][0]][1]
        if crossed:
            across.append(str(first.base / first.path))
        if max(map(len, places)) > 1:
            several.append(str(first.base / first.path))
        which = taken(places, choice.slices)
        chosen += [slices[one][1] for one in which]
        notes.left_out["other slice"] += sum(map(len, places)) - len(which)
        if unplaced:
            notes.left_out["slice without a position"] += len(unplaced)
        notes.passed_over += [
            f"{slices[one][1].base / slices[one][1].path}: a slice that does not say where in its series it lies, as "
            "others do"
            for one in unplaced
        ]
    if alone and choice.slices != "all":
        notes.told.append(
            f"{some(sorted(alone))}: slices that do not say of which series they are (SeriesInstanceUID (0020,000E)): "
            f"each is taken for a series of its own, of which slices {choice.slices!r} leaves none out"
        )
    if several and choice.slices != "all":
        notes.told.append(
            f"{some(sorted(several))}: of series, or files, with several pictures at one place, as of echoes, times or "
            f"diffusion weights: slices {choice.slices!r} are places, and of each the first picture by its instance "
            "number, or as stored, is taken"
        )
    if across:
        notes.told.append(
            f"{some(sorted(across))}: of series whose slices lie across one another (ImageOrientationPatient "
            f"(0020,0037)): slices {choice.slices!r} are of the order of their instance numbers, or names"
        )
    if unplaced_frames:
        unplaced_frames.sort()
        notes.told.append(
            f"{some(unplaced_frames)}: not every frame says where it lies (PlanePositionSequence (0020,9113)), or they "
            f"lie across one another: slices {choice.slices!r} are of the order in which frames are stored"
        )
    return chosen


def _axis(name: str) -> Axis:
    return next((axis for axis in AXES if axis == name), "axial")


def _settled(
    rows: list[_Row], named: Path | None, folder: Path, notes: Notes, known: Collection[str] | None = None
) -> list[_Row]:
    """The rows under the ids that people have settled upon, in the file that the site names or beside the images.

    Raises:
        ManifestError: it is malformed, or not where the site says; ids that are here are said to be one with an id that
            is neither ``known`` nor settled itself, if it is told which are: with a slip of the pen two writings of one
            patient would become two patients.
    """
    path = named or folder / SETTLED
    if named is None and not path.exists():
        return rows
    same, notes.settled = read_settled(path, notes.told)
    notes.same = same
    if known is not None and (
        strange := [one for one in sorted(same.keys() & known) if same[one] not in {*known, *notes.settled}]
    ):
        raise ManifestError(
            f"{path}: {len(strange)} ids are the same as an id that no image has; expected one that is here, or a row "
            f"for it with an empty same_as{fault_lines([f'{one!r}, same as {same[one]!r}' for one in strange])}"
        )
    if known is not None and (idle := {*same, *notes.settled} - {*known, *same.values()}):
        notes.told.append(
            f"{path}: {len(idle)} ids are of no image here; look whether images have them in another writing"
        )
    merged = sorted({row.patient for row in rows} & set(same))
    if merged:
        notes.told.append(f"{path}: {len(merged)} ids are taken for another one, as it says")
    return [replace(row, patient=same.get(row.patient, row.patient)) for row in rows]


def _read_manifest(
    manifest: Path,
    unit: Unit,
    has_shares: bool,
    notes: Notes,
    needed: Sequence[str] = _COLUMNS,
    nameless: bool = False,
) -> tuple[list[_Row], bool]:
    """The rows, one for each picture, checked, and whether they carry splits; ``nameless``: patients may be unknown."""
    table = read_table(manifest, KNOWN_COLUMNS, needed)
    notes.told += table.told
    has_splits = "split" in table.columns
    missing = [name for name in needed if name not in table.columns]
    if not has_splits and not has_shares:
        missing.append("split")
    if missing:
        raise ManifestError(
            f"{manifest}: no column {', '.join(missing)}; found {', '.join(table.columns)[:500] or 'none'}, expected "
            f"{', '.join(needed)} and split (unless shares are set); patient and frame where they are needed"
        )
    if "label" in needed:
        refuse_other_splits(manifest, table)
    if (
        "label" in needed
        and not has_splits
        and (folds := [one for one in table.columns if _FOLDS.fullmatch(_letters(one))])
    ):
        notes.told.append(f"{manifest}: column {folds[0]!r} looks like folds; splits are drawn without regard to it")
    if free := [name for name in table.columns if name and name not in KNOWN_COLUMNS]:
        notes.told.append(f"{manifest}: columns that no training looks at: {', '.join(free)[:500]}")
    has_splits = has_splits and "label" in needed
    if unit == "image" and "patient" in table.columns:
        known = Counter(patient for row in table.rows if (patient := in_one_form(row.cells["patient"])))
        if several := sum(count > 1 for count in known.values()):
            notes.told.append(
                f'{manifest}: column patient is passed over, as unit is "image": {several} patients have several '
                "images, which may be in several splits"
            )
    files = Files(manifest.parent, notes)
    masks = masks_of(manifest) if "mask" in table.columns else set()
    rows, faults = [], []
    for line, entry in table.rows:
        cells = {name: entry.get(name, "") for name in KNOWN_COLUMNS}
        place = cells["frame"] or cells["slice"]
        fault: str | None = None
        if place and cells["slice"] not in ("", place):
            fault = f"{cells['path']!r} has frame {cells['frame']} and slice {cells['slice']}; expected one of the two"
        path = files.find(cells["path"] or "." * bool(cells["series"]))
        pictures = [(path, place, False)]
        if not fault and not (fault := files.fault(path)):
            if files.is_folder(path):
                pictures, fault = files.series(path, cells["series"], place)
            else:
                fault = files.contradiction(path, cells["series"])
        for name, frame, asked in pictures:
            patient, whose = name + (f"#{frame}" if frame else ""), NOBODY
            if unit == "patient":
                whose = files.owner(name)
                patient = in_one_form(cells["patient"] or whose.patient)
            about = (f"line {line}", name, patient, cells["label"], cells["split"], frame, manifest.parent)
            row = _Row(*about, cells["axis"], cells["series"], asked, whose, files.find(cells["mask"]), line)
            if not fault and masks and os.path.realpath(manifest.parent / name) in masks:
                fault = f"path {name!r} is a mask, as column mask says; expected a picture: remove the row, or the mask"
            if fault := fault or _fault(row, has_splits, nameless):
                faults.append(f"{row.where}: {fault}")
            rows.append(row)
            if fault:
                break
    if files.guessed:
        notes.told.append(
            f"{manifest}: {files.guessed} paths with backslashes, or in another Unicode form than the files' names, "
            "were taken for the files that they can only mean"
        )
    # Two rows for one file are told together with what is wrong in each.
    _refuse(manifest, faults + (_double_faults(rows, has_splits) if faults else []))
    return rows, has_splits


def refuse_other_splits(manifest: Path, table: Table) -> None:
    """Refuse a manifest that says of which split a row is under another name than ``split``.

    Raises:
        ManifestError: with the column.
    """
    if "split" not in table.columns and (named := _named_otherwise(table)):
        raise ManifestError(
            f"{manifest}: column {named!r} says of which split a row is, and there is no column split; expected it to "
            "be named split, with train, val, test and unlabelled: rename it split, or remove it; if it is none, "
            "write its cells as what they are"
        )


def _named_otherwise(table: Table) -> str:
    """The free column whose cells are in large part names of splits, as people write them, or that says yes or no to
    one; empty if there is none."""
    for name in table.columns:
        if name in KNOWN_COLUMNS or not name:
            continue
        found = Counter(cell for row in table.rows if (cell := row.cells[name]))
        splits = {cell: word for cell in found if (word := _split_word(cell))}
        # With two names of splits beside one another, a tenth of the rows is enough: others say why a row is in none.
        least = 0.1 if len(set(splits.values())) > 1 else 0.5
        if splits and sum(found[cell] for cell in splits) >= least * found.total():
            return name
        cells = {cell.casefold() for cell in found}
        if cells and cells <= _YES_OR_NO and _SPLIT_COLUMNS.fullmatch(_letters(name)):
            return name
    return ""


def _split_word(cell: str) -> str:
    """The name of a split that a cell is, among words that say nothing more; else empty."""
    apart = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", cell)
    words = [word for word in re.findall(r"[^\W\d_]+", apart.casefold()) if word not in _SPLIT_FILLERS]
    whole = "".join(words)
    forms = (whole, whole.removesuffix("set"), whole.removesuffix("data"))
    return next((form for form in forms if form in _SPLIT_CELLS), "")


def _letters(name: str) -> str:
    return re.sub(r"[\W_]+", "", name).casefold()


def _refuse(manifest: Path, faults: Sequence[str]) -> None:
    if faults:
        count = f"{len(faults)} rows do" if len(faults) > 1 else "1 row does"
        raise ManifestError(f"{manifest}: {count} not fit; mend or remove them{fault_lines(faults)}")


def _fault(row: _Row, has_splits: bool, nameless: bool) -> str | None:
    if not row.patient and not nameless:
        return f'{row.path!r} has no patient; expected an id, a DICOM file with a PatientID, or unit = "image"'
    if not row.patient.isprintable():
        return f"{row.path!r} has patient {row.patient!r}, with a line break or another sign that is not seen"
    if row.frame and not is_number(row.frame):
        return f"{row.path!r} has frame {row.frame!r}; expected a number from 0, or none for the middle one"
    if row.axis and row.axis not in AXES:
        return f"{row.path!r} has axis {row.axis!r}; expected one of {', '.join(AXES)}, or none"
    if has_splits and row.split not in _SPLITS:
        return f"{row.path!r} has split {row.split!r}; expected one of {', '.join(_SPLITS)}"
    if has_splits and row.split != UNLABELLED and not row.label:
        return f"{row.path!r} has no label but split {row.split!r}; expected split {UNLABELLED!r} or a label"
    return None


def _double_faults(rows: Sequence[_Row], has_splits: bool) -> list[str]:
    """Files that are listed twice, and patients in two splits: test images must not be of trained patients."""
    faults = []
    first: dict[tuple[str, str, str], _Row] = {}
    splits: dict[str, _Row] = {}
    files: dict[str, _Row] = {}
    keys = [row.key for row in rows]
    frames: defaultdict[tuple[str, str], set[str]] = defaultdict(set)
    for path, frame, axis in keys:
        frames[path, axis].add(frame)
    for row, (path, frame, axis) in zip(rows, keys, strict=True):
        if not frame and len(frames[path, axis]) > 1:  # no frame is the middle one, which another row may name
            frame = str(taken(frames_of(Path(path), _axis(axis)).places, "middle")[0])
        key = path, frame, axis
        listed = row.where != row.path  # of links that were found, copies are told
        if row.path and key in first and listed:
            which = f" (frame {frame}, the middle one)" if bool(first[key].frame) != bool(row.frame) else ""
            faults.append(f"{row.where}: path {row.path!r}{which} is also on {first[key].where}; expected it once")
        first.setdefault(key, row)
        other = splits.setdefault(row.patient, row)
        if has_splits and row.patient and other.split != row.split:
            faults.append(
                f"{row.where}: patient {row.patient!r} is in split {row.split!r}, but on {other.where} in "
                f"{other.split!r}; expected one split a patient"
            )
        elif has_splits and listed and (other := files.setdefault(path, row)).split != row.split:
            faults.append(
                f"{row.where}: a picture of {row.path!r} is in split {row.split!r}, but on {other.where} one in "
                f"{other.split!r}; expected one split a file"
            )
    return faults


def _refuse_labels(where: Path, found: Counter[str], what: str, allowed: Sequence[str]) -> None:
    expected = ", ".join(repr(name) for name in allowed)
    raise LabelError(
        f"{where}: labels outside the study's classes: {_counted(found, what)}; expected {expected}, spelled "
        "exactly so: rename or remove them"
    )


def refuse_unclear(where: Path, found: Counter[str], classes: Sequence[str], others: str) -> None:
    """Where every other label is of one class, refuse those that may be meant for another one, say nothing, or are of
    masks and no images.

    Args:
        where: the labels are.
        found: how many images have each label outside ``classes``.
        classes: the study's.
        others: the one that all these labels are of.

    Raises:
        LabelError: there are such labels.
    """
    known = {plain_form(name) for name in (*classes, UNLABELLED, "unlabeled") if name != others}
    unclear = Counter(
        {
            label: count
            for label, count in found.items()
            if plain_form(label) in known
            or says_nothing(label)
            or label.casefold() in _SPLIT_WORDS
            or named_as_masks(label)
        }
    )
    if unclear:
        raise LabelError(
            f"{where}: labels that may be of another class than {others!r}, or of none: {_counted(unclear, 'images')}; "
            f"expected {', '.join(map(repr, classes))}, spelled exactly so, none (or a folder {UNLABELLED!r}) where it "
            f"is not known, or the name of a finding, which counts as {others!r}: rename or remove them; masks are "
            f"named in a {MANIFEST}, or lie elsewhere"
        )


def _counted(found: Counter[str], what: str) -> str:
    return ", ".join(f"{name!r} ({count} {what})" for name, count in sorted(found.items()))


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

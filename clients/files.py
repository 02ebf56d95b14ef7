"""The files of a data folder: found by a walk through it, or by the paths in its manifest."""

from __future__ import annotations

import os
import re
import stat
import unicodedata
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Never

from secure_fed.clients.dicom_header import HEADER, NOBODY, Owner, is_dicom, owner
from secure_fed.clients.manifest import read_table
from secure_fed.clients.patients import SETTLED, some
from secure_fed.clients.reading import IMAGE_ENDINGS, is_meant_as_image
from secure_fed.clients.series import Position, place_in_series, slices_in_order, taken
from secure_fed.core.errors import DataError, ManifestError

MANIFEST = "manifest.csv"
IN_A_FOLDER = f"{MANIFEST} or one folder per class in it"
"""What a folder of images is to have."""

KNOWN_COLUMNS = ("path", "label", "patient", "split", "frame", "slice", "series", "axis", "mask")
"""Of a manifest, that mean something."""

COPY = "copy of a slice"
"""A kind of what is left out: another file of the same instance would move the slices behind it."""

_NOT_IMAGES = {"thumbs.db", "desktop.ini", "dicomdir", "autorun.inf", MANIFEST, SETTLED}
_WORDS = r"(masks?|masken?|masques?|segs?|segm|segmentations?|labelmaps?|labels?|gts?|ground[ _-]?truths?|annotations?)"
_MASK = re.compile(rf"((?P<of>.+?)[ _.-]+)?{_WORDS}(?P<number>[ _-]?\d+)?")
"""A name, without its ending, as masks have it that lie beside their image."""
_MASKS = re.compile(rf"(.+[ _.-]|.*(?=ground))?{_WORDS}(tr|ts)?")
"""A folder's name, in small letters, where masks lie beside the folder of their images, or in it."""
_NO_FOLDERS = {"__macosx", "$recycle.bin", "system volume information", "@eadir"}
_UID = re.compile(r"\d+(\.\d+)+")


def no_folder(folder: Path, expected: str) -> DataError:
    """What to say where a folder of images is to be and none is: what there is instead.

    Args:
        folder: that is not there.
        expected: in it.
    """
    if folder.exists():
        return DataError(
            f"{folder}: a file, where a folder is to be; expected {expected}: name the folder that it is in"
        )
    above = next(parent for parent in folder.absolute().parents if parent.exists())
    if not above.is_dir():
        return DataError(
            f"{folder}: no such folder, {above} is a file; expected {expected}: name the folder that it is in"
        )
    try:
        names = sorted(entry.name for entry in above.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    except OSError:
        names = []
    there = f" ({above} has {some(names)})" if names else f" ({above} has no folders)"
    return DataError(f"{folder}: no such folder{there}; expected {expected}")


@dataclass
class Notes:
    """What was noticed while data were found; it names files, and is for people at the site.

    Attributes:
        told: what was sniffed or guessed, in words.
        passed_over: files and folders that are no images, with the reason.
        left_out: how many images were left out by the site's choice, by kind.
        settled: ids that people have said to be patients of their own.
        same: from ids to those that people have said to hold for them.
    """

    told: list[str] = field(default_factory=list)
    passed_over: list[str] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    settled: frozenset[str] = frozenset()
    same: Mapping[str, str] = field(default_factory=dict)


def image_files(folder: Path, notes: Notes | None = None) -> Iterator[Path]:
    """All images below a folder, links followed, each folder once.

    Hidden files, what file managers and CDs leave behind, files that are no image by content and name, and masks beside
    the image that they are named after (``a_mask.png`` beside ``a.png``, ``masks/a.png`` beside ``images/a.png``) are
    passed over, and so told.

    Raises:
        DataError: a folder or file cannot be read.
    """
    notes = Notes() if notes is None else notes
    seen: set[tuple[int, int]] = set()
    masks: set[str] = set()
    stems: dict[Path, list[tuple[str, str]]] = {}

    def stop(error: OSError) -> Never:
        raise DataError(
            f"{error.filename}: cannot be read ({error.strerror}); give this user access to it, or move it out of the "
            "data folder"
        ) from error

    for parent, folders, names in os.walk(folder, onerror=stop, followlinks=True):
        state = os.stat(parent)
        if (state.st_dev, state.st_ino) in seen:
            notes.passed_over.append(f"{said(parent)}: a link to a folder that was read already")
            folders[:] = []
            continue
        seen.add((state.st_dev, state.st_ino))
        notes.passed_over += [
            f"{said(parent)}/{said(name)}: hidden, or a system's" for name in folders if is_passed_over(name)
        ]
        folders[:] = sorted(
            (name for name in folders if not is_passed_over(name)),
            key=lambda name: (os.path.islink(os.path.join(parent, name)), name),
        )
        if MANIFEST in names:
            masks |= masks_of(Path(parent, MANIFEST))
        beside = _masks_beside(names)
        if (apart := _images_apart(folder, Path(parent), stems)) is not None:
            # A DICOM file says itself what it is, and scanners name series of images so (t1_fl2d_seg).
            named = {name: of for name in names if (of := _of_masks_folder(name, apart))}
            beside |= {name: of for name, of in named.items() if not _is_dicom(Path(parent, name))}
            if apart and (others := [name for name in names if _stem(name) and name not in beside]):
                notes.told.append(
                    f"{said(parent)}: {len(others)} images in a folder that is named as one of masks, of no image "
                    "beside it, and are taken for images of their own"
                )
        for name in sorted(names):  # disks list them in different orders
            path = Path(parent, name)
            if name[0] == ".":
                if name.lower().endswith(IMAGE_ENDINGS):
                    notes.passed_over.append(f"{said(path)}: hidden")
                continue
            if name.lower() in _NOT_IMAGES:
                notes.passed_over.append(f"{said(path)}: no image")
                continue
            try:
                if not stat.S_ISREG(path.stat().st_mode):  # to read a pipe would take for ever
                    notes.passed_over.append(f"{said(path)}: a pipe or device, no file")
                elif masks and os.path.realpath(path) in masks:
                    notes.passed_over.append(f"{said(path)}: a mask, as a {MANIFEST} says")
                elif name in beside:
                    notes.left_out["mask"] += 1
                    notes.passed_over.append(f"{said(path)}: a mask, by its name beside {said(beside[name])}")
                elif not is_meant_as_image(path):
                    notes.passed_over.append(f"{said(path)}: no image, by its content and its name")
                elif said(path) != str(path):
                    raise DataError(f"{said(path)}: a name that is no UTF-8 and cannot be written down; rename it")
                else:
                    yield path
            except FileNotFoundError as error:
                raise DataError(
                    f"{path}: a link to nothing; mount or restore what it leads to, or remove it"
                ) from error
            except OSError as error:
                error.filename = error.filename or str(path)
                stop(error)


def named_as_masks(name: str) -> bool:
    """Whether a folder is named as those of masks are."""
    return _MASKS.fullmatch(name.lower()) is not None


def masks_of(manifest: Path) -> set[str]:
    """Where the files are that a manifest names as masks; none if it cannot be read, which is told where it counts."""
    try:
        rows = read_table(manifest, KNOWN_COLUMNS, ("path",)).rows
    except ManifestError:
        return set()
    files = Files(manifest.parent, Notes())
    return {os.path.realpath(manifest.parent / files.find(mask)) for row in rows if (mask := row.cells.get("mask"))}


def _masks_beside(names: Sequence[str]) -> dict[str, str]:
    """The files of a folder that are named as masks of others, each with the one that it is of."""
    stems = {name: stem for name in names if (stem := _stem(name))}
    found = {name: match for name, stem in stems.items() if (match := _MASK.fullmatch(stem))}
    if not found:
        return {}
    images = sorted((stem, name) for name, stem in stems.items() if name not in found)
    bare = sorted(name for name in names if "." not in name)  # as DICOM files are named
    masks = {}
    for name, match in found.items():
        if match["of"]:
            image = _named_after(match["of"], images, match["number"] is not None)
        else:  # the only one of its folder
            image = (images[0][1] if images else "".join(bare[:1])) if match["number"] is None else ""
        if image:
            masks[name] = image
    return masks


def _named_after(of: str, images: Sequence[tuple[str, str]], alone: bool = False) -> str:
    """Of sorted names, each behind its stem, the one that a mask is of: the image itself, else, unless it must be
    ``alone``, the first of several series that begin alike (p1_t1, p1_flair, p1_seg); empty if there is none."""
    place = bisect_left(images, (of, ""))
    stem, image = images[place] if place < len(images) else ("", "")
    apart = stem[len(of) :]
    return image if stem.startswith(of) and (not apart or (apart[0] in " _.-" and not alone)) else ""


def _images_apart(folder: Path, parent: Path, stems: dict[Path, list[tuple[str, str]]]) -> list[tuple[str, str]] | None:
    """The images beside a folder of masks in which a folder below the data folder is, sorted by stem; None if it is in
    no such folder.

    Args:
        folder: of data.
        parent: below it.
        stems: of what was asked before; added to.
    """
    parts = parent.relative_to(folder).parts
    place = next((place for place, part in enumerate(parts) if named_as_masks(part)), None)
    if place is None:
        return None
    above = folder.joinpath(*parts[:place])
    if above not in stems:
        stems[above] = []
        seen: set[tuple[int, int]] = set()
        for at, folders, names in os.walk(above, followlinks=True):
            state = os.stat(at)
            folders[:] = [name for name in folders if not is_passed_over(name) and not named_as_masks(name)]
            if (state.st_dev, state.st_ino) in seen:
                folders[:] = []
                continue
            seen.add((state.st_dev, state.st_ino))
            images = ((_stem(name) or name.lower() * ("." not in name), name) for name in names)
            stems[above] += [(stem, os.path.join(at, name)) for stem, name in images if stem]
        stems[above].sort()
    return stems[above]


def _of_masks_folder(name: str, images: Sequence[tuple[str, str]]) -> str:
    """The image that a file in a folder of masks is of, by the name of either; empty if there is none."""
    stem = _stem(name)
    match = _MASK.fullmatch(stem)
    if match is not None and not match["of"]:
        return images[0][1] if images else ""
    return stem and (_named_after(stem, images) or (_named_after(match["of"], images) if match is not None else ""))


def _is_dicom(path: Path) -> bool:
    """Whether a file begins as DICOM does; not, if it cannot be read, which is told where it counts."""
    try:
        with path.open("rb") as stream:
            return is_dicom(stream.read(HEADER))
    except OSError:
        return False


def _stem(name: str) -> str:
    """A name without the ending that says that it is an image, in small letters; empty if it has none."""
    low = name.lower()
    endings = [ending for ending in IMAGE_ENDINGS if low.endswith(ending)]
    return low[: -len(max(endings, key=len))] if endings else ""


def said(path: Path | str) -> str:
    """A path as it can be printed: bytes that are no UTF-8 are half a pair of surrogates in it."""
    return str(path).encode(errors="backslashreplace").decode()


def is_passed_over(folder: str) -> bool:
    """Whether a folder of this name is hidden, or of a system and not of its users."""
    return folder[0] == "." or folder.lower() in _NO_FOLDERS


def class_folders(folder: Path) -> list[str]:
    """Names of the folders in a data folder that hold images: classes, and perhaps ``unlabelled``."""
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not is_passed_over(entry.name))
    return [name for name in names if next(image_files(folder / name), None) is not None]


_Picture = tuple[str, str, bool]
"""Of a row of a manifest: a file, which frame, and whether that is the slice that was asked for."""


class Files:
    """The files below a data folder, each folder listed once.

    Attributes:
        guessed: how many paths were not written as the files are named.
    """

    def __init__(self, folder: Path, notes: Notes) -> None:
        self._folder = folder
        self._notes = notes
        self._root = os.path.realpath(folder)
        self._listings: dict[str, dict[str, bool]] = {}
        self._forms: dict[str, dict[str, list[str]]] = {}
        self._inside: dict[str, bool] = {}
        self._series: dict[str, list[tuple[str, Position, str]]] = {}
        self._uids: dict[str, str] = {}
        self._owner: tuple[str, Owner] = "", NOBODY
        self.guessed = 0

    def find(self, path: str) -> str:
        """The path of the one file or folder that a manifest's path means; itself if there is none or several."""
        if not path or self._is_there(path):
            return path
        for form in (path, path.replace("\\", "/")):
            found = form if self._is_there(form) else self._in_other_form(form)
            if found:
                self.guessed += 1
                return found
        return path

    def is_folder(self, path: str) -> bool:
        """Whether a path that is there is of a folder."""
        return not self._is_file(path)

    def series(self, path: str, series: str, place: str) -> tuple[list[_Picture], str | None]:
        """The pictures of a row that names a folder, and what is wrong with it.

        Args:
            path: of the folder.
            series: UID of the one series that is meant; any other name, or none, means all that is there.
            place: number of the one slice that is meant, from 0, in the order of the slices; empty for all.
        """
        if path not in self._series:
            entries = []
            copies: set[str] = set()
            for found in sorted(image_files(self._folder / path, self._notes)):
                uid, position, instance = place_in_series(found)
                if instance and instance in copies:
                    self._notes.left_out[COPY] += 1
                    continue
                copies.add(instance)
                name = os.path.normpath(os.path.join(path, os.path.relpath(found, self._folder / path)))
                entries.append((uid, position, name))
            self._series[path] = entries
        named = _UID.fullmatch(series) is not None
        these = [entry for entry in self._series[path] if not named or entry[0] == series]
        places, unplaced, crossed = slices_in_order([(position, name) for _, position, name in these])
        there = [(these[one][0], these[one][2]) for one in [*taken(places, "all"), *unplaced]]
        if not there:
            what = f" of series {series}" if named else ""
            return [(path, place, False)], f"folder {path!r} holds no image{what}; expected at least one"
        if not place:
            return [(name, "", False) for _, name in there], None
        if len({uid for uid, _ in there}) > 1:
            fault = f"slice {place} of folder {path!r}, which holds several series ("
            fault += ", ".join(sorted({uid or "none" for uid, _ in there})[:3])
            return [(path, place, False)], fault + "); expected the UID of one in column series"
        if len(there) == 1:
            return [(there[0][1], place, True)], None
        if unplaced:
            lacking = these[unplaced[0]][2]
            fault = f"slice {place} of folder {path!r}, of which {len(unplaced)} images do not say where in the series "
            fault += f"they lie ({lacking!r}), and others do; expected ImagePositionPatient (0020,0032) with "
            fault += "ImageOrientationPatient (0020,0037), or InstanceNumber (0020,0013), in all"
            return [(path, place, False)], fault + ": name the file instead"
        if crossed:
            fault = f"slice {place} of folder {path!r}, whose {len(there)} images lie across one another, so that no "
            fault += "order of theirs is one of positions; expected parallel planes, by ImageOrientationPatient"
            return [(path, place, False)], fault + " (0020,0037): name the file instead"
        if several := next((group for group in places if len(group) > 1), None):
            fault = f"slice {place} of folder {path!r}, of which {len(several)} images lie at one place, as echoes or "
            fault += f"times do ({', '.join(repr(these[one][2]) for one in several[:2])}); expected one at each"
            return [(path, place, False)], fault + ": name the file instead"
        if not is_number(place) or int(place) >= len(there):
            fault = f"slice {place!r} of folder {path!r}, which holds {len(there)}; expected a number from 0 to"
            return [(path, place, False)], f"{fault} {len(there) - 1}"
        return [(there[int(place)][1], "", True)], None

    def owner(self, path: str) -> Owner:
        """Whose a file is by its own header; rows of one file follow one another, and it is read once for them."""
        if self._owner[0] != path:
            self._owner = path, owner(self._folder / path)
        return self._owner[1]

    def contradiction(self, path: str, series: str) -> str | None:
        """What is wrong with the UID of a series that a row says a file is of; any other name is free."""
        if _UID.fullmatch(series) is None:
            return None
        if path not in self._uids:
            self._uids[path] = place_in_series(self._folder / path)[0]
        if self._uids[path] in ("", series):
            return None
        return (
            f"{path!r} is of series {self._uids[path]} (0020,000E), and column series says {series}; expected the same "
            "in both, or a name that is no UID"
        )

    def fault(self, path: str) -> str | None:
        """What is wrong with a path."""
        if not path:
            return "no path"
        whole = os.path.join(self._folder, path)
        if "\0" in path or not (self._is_inside(whole) if self._is_file(path) else self._leads_inside(whole)):
            return f"path {path!r} leads out of the data folder; expected a relative path inside it"
        if not self._is_there(path):
            return f"path {path!r}: no such file"
        return None

    def _leads_inside(self, whole: str) -> bool:
        return self._within(os.path.realpath(whole))

    def _is_inside(self, whole: str) -> bool:
        if os.path.islink(whole):
            return self._leads_inside(whole)
        parent = os.path.dirname(whole)
        if parent not in self._inside:
            self._inside[parent] = self._leads_inside(parent)
        return self._inside[parent]

    def _within(self, real: str) -> bool:
        return real == self._root or real.startswith(self._root.rstrip("/") + "/")

    def _is_file(self, path: str) -> bool:
        parent, name = os.path.split(os.path.join(self._folder, path))
        return self._listing(parent).get(name, False)

    def _is_there(self, path: str) -> bool:
        whole = os.path.normpath(os.path.join(self._folder, path))
        parent, name = os.path.split(whole)
        if whole == os.path.normpath(self._folder):
            return True
        return name in self._listing(parent) and (self._is_file(path) or os.path.isdir(whole))

    def _listing(self, parent: str) -> dict[str, bool]:
        parent = os.path.normpath(parent)
        if parent not in self._listings:
            try:
                with os.scandir(parent) as entries:
                    self._listings[parent] = {entry.name: entry.is_file() for entry in entries}
            except (OSError, ValueError):
                self._listings[parent] = {}
        return self._listings[parent]

    def _in_other_form(self, path: str) -> str:
        """A path each of whose parts is there once, up to Unicode's forms."""
        found = ""
        for part in path.split("/"):
            parent = os.path.normpath(os.path.join(self._folder, found))
            if parent not in self._forms:
                self._forms[parent] = defaultdict(list)
                for name in self._listing(parent):
                    self._forms[parent][unicodedata.normalize("NFC", name)].append(name)
            names = self._forms[parent].get(unicodedata.normalize("NFC", part), [])
            if len(names) != 1:
                return ""
            found = os.path.join(found, names[0])
        return found if self._is_there(found) else ""


def is_number(text: str) -> bool:
    """Whether a text is a whole number without a sign."""
    return text.isascii() and text.isdecimal()

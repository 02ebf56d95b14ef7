"""In which order the pictures of a series lie, and which of them a rule takes."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from secure_fed.clients.dicom_elements import functional_group, text
from secure_fed.clients.dicom_header import read_header


class Position(NamedTuple):
    """What slices of a series are ordered by; None what a file does not say.

    Attributes:
        along: where it lies along the normal of its plane, in mm.
        number: InstanceNumber (0020,0013).
        normal: of its plane.
    """

    along: float | None = None
    number: float | None = None
    normal: tuple[float, ...] = ()


_APART = 1e-3
"""Pictures that lie no more than so many mm apart lie at one place."""


class Order(NamedTuple):
    """In which order slices lie.

    Attributes:
        places: in order, the indices of the slices at each; several where they differ in something else, such as
            echoes, times or diffusion weights, in order of their numbers.
        unplaced: indices of those that have no place in it.
        crossed: whether they lie across one another, so that no normal orders them.
    """

    places: list[list[int]]
    unplaced: list[int]
    crossed: bool = False


def place_in_series(path: Path) -> tuple[str, Position, str]:
    """Of a DICOM file, the UID of its series, where it lies in it, and by what copies of it are known; else empty.

    Copies are of one patient, series and instance (SOPInstanceUID), and lie at one place; of a file that does not say
    where it lies none are known, as some exports give one UID to all.
    """
    header = read_header(path)
    if header is None:
        return "", Position(), ""
    along = number = None
    normal: tuple[float, ...] = ()
    with contextlib.suppress(Exception):  # what is no number says nothing
        number = _finite(float(text(header, "InstanceNumber")))
    with contextlib.suppress(Exception):
        position = np.array(header.get("ImagePositionPatient"), dtype=np.float64)
        rows, columns = np.array(header.get("ImageOrientationPatient"), dtype=np.float64).reshape(2, 3)
        across = np.cross(rows, columns)
        along, normal = _finite(float(across @ position)), tuple(across.tolist())
    series, place = text(header, "SeriesInstanceUID"), Position(along, number, normal)
    instance = text(header, "SOPInstanceUID")
    known = instance and place != Position()
    return series, place, f"{text(header, 'PatientID')} {series} {instance} {along} {number}" if known else ""


def frames_in_order(dataset: Any, frames: int) -> list[list[int]] | None:
    """The numbers of a file's frames at each place along the normal of their planes, several as they are stored; None
    if not all say where they lie, or not all planes are parallel."""
    groups = dataset.get("PerFrameFunctionalGroupsSequence")
    if not groups or len(groups) != frames:
        return None
    try:
        # Each frame's own: what is said of all frames, or of the file, does not tell them apart.
        positions = [np.array(group.PlanePositionSequence[0].ImagePositionPatient, np.float64) for group in groups]
        planes = [
            functional_group(
                dataset, index, "PlaneOrientationSequence", "ImageOrientationPatient"
            ).ImageOrientationPatient
            for index in range(frames)
        ]
        rows, columns = np.array(planes, np.float64).reshape(frames, 2, 3).swapaxes(0, 1)
        normals = np.cross(rows, columns)
        along = np.array(positions).reshape(frames, 3) @ normals[0]
    except Exception:  # what is missing, or no number, says nothing
        return None
    if not np.isfinite(along).all() or not np.allclose(normals, normals[0], atol=1e-2):
        return None
    return _at_places([int(one) for one in np.argsort(along, kind="stable")], along.tolist())


def slices_in_order(slices: Sequence[tuple[Position, str]]) -> Order:
    """The order of slices of one series, each with its path.

    By where they lie; if none says that, or not all planes are parallel, by their numbers; if none has one, by their
    names, numbers in them as numbers.
    """

    def by_name(one: int) -> tuple[list[tuple[int, str]], str]:
        path = slices[one][1]
        return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path)], path

    everything = range(len(slices))
    alongs, numbers = ([getattr(position, name) for position, _ in slices] for name in ("along", "number"))
    normals = np.array([position.normal for position, _ in slices if position.along is not None])
    crossed = len(normals) > 1 and not np.allclose(normals, normals[0], atol=1e-2)
    for values in (numbers,) if crossed else (alongs, numbers):
        placed = [one for one in everything if values[one] is not None]
        if placed:
            order = sorted(placed, key=lambda one: (values[one], numbers[one] or 0, by_name(one)))
            places = [[one] for one in order]
            if values is alongs:
                places = _at_places(order, alongs, key=lambda one: (numbers[one] or 0, by_name(one)))
            return Order(places, [one for one in everything if values[one] is None], crossed)
    return Order([[one] for one in sorted(everything, key=by_name)], [], crossed)


def _at_places(order: Sequence[int], along: Sequence[Any], key: Callable[[int], Any] | None = None) -> list[list[int]]:
    """Pictures that are in order of where they lie, by place, sorted at each; each for itself if there is one place
    alone, as of pictures in time."""
    places: list[list[int]] = []
    for one in order:
        if places and along[one] - along[places[-1][0]] <= _APART:
            places[-1].append(one)
        else:
            places.append([one])
    places = [sorted(place, key=key) for place in places]
    return [[one] for one in places[0]] if len(places) == 1 else places


def taken(places: Sequence[Sequence[int]], slices: str) -> list[int]:
    """Which pictures a rule takes: ``all``, or of the ``middle`` place or ``every:N`` places the first.

    Were pictures counted instead, how many slices a series has would decide which of its echoes is seen.
    """
    if slices == "all":
        return [one for place in places for one in place]
    count = len(places)
    if slices == "middle":
        return [places[count // 2][0]]
    step = int(slices.removeprefix("every:"))
    return [place[0] for place in places[min(step // 2, count // 2) :: step]]


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None

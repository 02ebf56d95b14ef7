"""NIfTI volumes: one slice as a grey picture, read by nibabel and turned as radiologists look at it."""

from __future__ import annotations

import gzip
import io
import math
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import nibabel
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from secure_fed.clients.rules import (
    NOT_SQUARE,
    Facts,
    Picture,
    Rules,
    UndecodableError,
    are_square,
    brightness,
    refused_as_no_picture,
)

Axis = Literal["axial", "coronal", "sagittal"]
AXES: tuple[Axis, ...] = get_args(Axis)
_NORMAL: dict[Axis, int] = {"sagittal": 0, "coronal": 1, "axial": 2}
_MODALITY = "NIFTI"
_SIZES = {348: "NIfTI-1", 540: "NIfTI-2"}
_GZIP = b"\x1f\x8b"
_HEADER = 544
_INTENTS = {1002: "a segmentation", 1003: "a segmentation", 1006: "displacements", 1007: "vectors"}
_STATISTICS = range(2, 25)
_MOST_BEHIND = 2**20
_BLOCK = 2**20
"""Unpacked at once: what is read into a place of its own is there twice."""

_LEAST_HOUNSFIELD = 20
"""A volume with no value beyond it, to either side, is none in Hounsfield units: fat has -100, blood 40."""

_BYTES_A_PIXEL = 8
"""A volume may take so many bytes for each of :attr:`Rules.most_pixels`: 0.32 GB, unless the site raises it."""


def is_nifti(head: bytes) -> bool:
    """Whether a file, perhaps gzipped, begins as NIfTI files do; 132 bytes of it are enough."""
    if head.startswith(_GZIP):
        try:
            head = zlib.decompressobj(wbits=31).decompress(head, 4)
        except zlib.error:
            return False
    return len(head) >= 4 and any(int.from_bytes(head[:4], order) in _SIZES for order in ("little", "big"))


def no_picture(head: bytes) -> str:
    """What a NIfTI file, perhaps gzipped, is that is no picture of a patient, as its intent says; empty if it is one.

    Args:
        head: its first bytes, 1,000 at least or all.
    """
    if head.startswith(_GZIP):
        try:
            head = zlib.decompressobj(wbits=31).decompress(head, _HEADER)
        except zlib.error:
            return ""
    order: Literal["little", "big"] = "little" if int.from_bytes(head[:4], "little") in _SIZES else "big"
    code = head[504:508] if _size(head) == 540 else head[68:70]
    intent = int.from_bytes(code, order)
    return "a map of statistics" if intent in _STATISTICS else _INTENTS.get(intent, "")


class NiftiFile:
    """A NIfTI volume, unpacked once for all of its slices, when the first of them is asked for.

    Args:
        content: the file, ``.nii`` or ``.nii.gz``.

    Raises:
        UndecodableError: it is broken, or no volume of grey values.
    """

    def __init__(self, content: bytes) -> None:
        self._packed = content.startswith(_GZIP)
        self._content = content
        self._volume: NDArray[Any] | None = None
        self._range: tuple[float, float] | None = None
        head = content[:_HEADER]
        if self._packed:
            with _gunzip(content) as stream:
                head = stream.read(_HEADER)
        if what := no_picture(head):
            raise refused_as_no_picture(f"a NIfTI file that holds {what} (its intent_code)")
        kind = nibabel.Nifti2Header if _size(head) == 540 else nibabel.Nifti1Header
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                # Not from a file: that would also read the extensions behind the header, which are not here.
                self._header = kind(head[: kind.sizeof_hdr], check=False)
                magic = bytes(self._header["magic"].tobytes())[:3]
                if magic != (b"n+2" if kind is nibabel.Nifti2Header else b"n+1"):
                    raise UndecodableError(
                        f"a NIfTI header with magic {magic!r}; expected n+1 or n+2, header and image in one file: "
                        "write it anew"
                    )
                # As the format's reference reads it: the sign alone, and 0 is plus.
                self._header["pixdim"][0] = -1 if float(self._header["pixdim"][0]) < 0 else 1
                shape = tuple(int(side) for side in self._header.get_data_shape())
                self._dtype = self._header.get_data_dtype()
                self._refuse_shape(shape, self._dtype)
                if (bits := int(self._header["bitpix"])) not in (0, 8 * self._dtype.itemsize):
                    raise UndecodableError(
                        f"a NIfTI of datatype {self._dtype} and bitpix {bits}; expected the same size in both: write "
                        "it anew"
                    )
                self._shape = shape[:3] + (1,) * (3 - len(shape[:3]))
                self._start = int(self._header.get_data_offset())
                behind = head[kind.sizeof_hdr : kind.sizeof_hdr + 4]
                if self._start == 0 and behind == bytes(4):  # which says that no extension follows
                    self._start = kind.sizeof_hdr + 4
                self._refuse_two_orientations()
                affine = self._header.get_best_affine()
                turned = nibabel.io_orientation(affine) if np.isfinite(affine).all() else np.full((3, 2), np.nan)
                slope, inter = self._header.get_slope_inter()
        except UndecodableError:
            raise
        except Exception as error:  # nibabel raises of every kind on broken files
            raise UndecodableError(
                f"broken NIfTI ({' '.join(str(error).split())[:160] or type(error).__name__}); write it anew"
            ) from error
        if not np.isfinite(turned).all():
            raise UndecodableError("a NIfTI whose axes do not span space; expected an invertible affine: write it anew")
        self._slope, self._inter = 1.0 if slope is None else float(slope), 0.0 if inter is None else float(inter)
        # Of each axis of the patient (right, front, head), the volume's axis that runs along it, and whether backwards.
        self._along = [int(np.flatnonzero(turned[:, 0] == axis)[0]) for axis in range(3)]
        self._backwards = [turned[along, 1] < 0 for along in self._along]
        known = int(self._header["qform_code"]) > 0 or int(self._header["sform_code"]) > 0
        self._notes = () if known else ("neither sform nor qform says which side is the patient's right",)

    @staticmethod
    def _refuse_shape(shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        if len(shape) < 2 or min(shape) < 1 or any(side != 1 for side in shape[3:]):
            raise UndecodableError(
                f"a NIfTI of {' x '.join(map(str, shape)) or 'no'} values; expected a volume of three dimensions: "
                "write one time point to a file"
            )
        if dtype.kind not in "iuf":
            raise UndecodableError(f"NIfTI values of type {dtype}; expected numbers, one a voxel: convert it")

    def _refuse_two_orientations(self) -> None:
        """Refuse a file whose two ways to say where the axes lead contradict one another: one of them is mirrored."""
        if int(self._header["qform_code"]) < 1 or int(self._header["sform_code"]) < 1:
            return
        affines = [self._header.get_sform(), self._header.get_qform()]
        if not all(np.isfinite(affine).all() and abs(np.linalg.det(affine[:3, :3])) > 0 for affine in affines):
            return
        first, second = ("".join(nibabel.aff2axcodes(affine)) for affine in affines)
        if first != second:
            raise UndecodableError(
                f"a NIfTI whose axes lead to {first} by its sform and to {second} by its qform; expected the same in "
                "both, as otherwise left may be right: set the wrong one's code to 0, or write it anew"
            )

    def frames_along(self, axis: Axis) -> int:
        """How many slices it has."""
        return self._shape[self._along[_NORMAL[axis]]]

    @property
    def frames(self) -> int:
        """How many axial slices it has."""
        return self.frames_along("axial")

    def picture(self, frame: int | None, rules: Rules, axis: Axis = "axial") -> Picture:
        """One slice, as radiologists look at it: the patient's right at the left, anterior or superior up.

        The study's window for modality ``NIFTI`` holds, else the file's own ``cal_min`` and ``cal_max``; without
        either the slice's least and greatest value become black and white.

        Args:
            frame: along ``axis`` from left to right, posterior to anterior or inferior to superior, from 0; None takes
                the middle one.
            rules: of the study and the site.
            axis: what it is cut across.

        Raises:
            UndecodableError: there is no such slice, or it is too large.
        """
        count = self.frames_along(axis)
        index = count // 2 if frame is None else frame
        if not 0 <= index < count:
            raise UndecodableError(f"no slice {index}; it has {count} along {axis}, counted from 0")
        across, *kept = (_NORMAL[axis], *(place for place in range(3) if place != _NORMAL[axis]))
        width, height = (self._shape[self._along[place]] for place in kept)
        rules.refuse_size(width, height)
        cut: list[Any] = [slice(None)] * 3
        cut[self._along[across]] = count - 1 - index if self._backwards[across] else index
        values = self._whole(rules)[tuple(cut)]
        if self._along[kept[0]] > self._along[kept[1]]:
            values = values.T
        for place, along in enumerate(kept):
            if self._backwards[along]:
                values = np.flip(values, place)
        # Now the axes run to the patient's right, front or head; in the picture, from top left to the patient's left.
        seen = values.T[::-1, ::-1].astype(np.float64) * self._slope + self._inter
        finite = np.isfinite(seen)
        if not finite.any():
            raise UndecodableError(f"slice {index} of a NIfTI without one finite value; expected numbers")
        window = rules.window(_MODALITY)
        notes: tuple[str, ...] = self._notes
        if window is not None and window.unit == "HU":
            notes += self._check_hounsfield(rules)
        low, high = float(self._header["cal_min"]), float(self._header["cal_max"])
        if window is not None:
            shown = brightness(seen, window.centre, window.width)
        else:
            if not (math.isfinite(low) and math.isfinite(high) and high > low):
                low, high = seen[finite].min(), seen[finite].max()
            shown = np.asarray((seen - low) / ((high - low) or 1)).clip(0, 1)
        grey = np.rint(255 * np.where(finite, shown, 0)).astype(np.uint8)
        sides = [float(side) for side in self._header.get_zooms()]
        seen_sides = [sides[self._along[place]] for place in kept if self._along[place] < len(sides)]
        notes = notes if are_square(*seen_sides) else (*notes, NOT_SQUARE)
        return Picture(Image.fromarray(grey), Facts(_MODALITY, notes=notes))

    def _check_hounsfield(self, rules: Rules) -> tuple[str, ...]:
        """Check that a window in Hounsfield units meets a volume that may be in them: nothing in the file says it.

        Returns:
            What is to be told of it.

        Raises:
            UndecodableError: it cannot be.
        """
        if self._range is None:
            stored = self._whole(rules)
            ends = (float(end) for end in (np.fmin.reduce(stored, axis=None), np.fmax.reduce(stored, axis=None)))
            low, high = sorted(end * self._slope + self._inter for end in ends)
            self._range = low, high
        low, high = self._range
        found = ""
        if self._dtype.itemsize == 1:
            found = "are of 8 bits"
        elif -_LEAST_HOUNSFIELD <= low <= high <= _LEAST_HOUNSFIELD:
            found = f"run from {low:g} to {high:g}, as labels and normalised values do"
        if found:
            raise UndecodableError(
                f"the study's window for {_MODALITY} is in HU, but the file's values {found}; expected values in HU: "
                "export the original, or take it out of the data"
            )
        return ("no value of the volume is below 0, taken as HU, of which air has -1000",) if low >= 0 else ()

    def _whole(self, rules: Rules) -> NDArray[Any]:
        """All stored values, in the order of the file.

        Raises:
            UndecodableError: the file has fewer, or more than the site allows.
        """
        if self._volume is None:
            size = math.prod(self._shape) * self._dtype.itemsize
            end = self._start + size
            most = _BYTES_A_PIXEL * rules.most_pixels
            if end > most:
                raise UndecodableError(
                    f"a NIfTI of {end:,} bytes; expected at most {most:,} (a small file can claim any size): write a "
                    "smaller volume, or raise most_pixels in [data] of site.toml (of predict: --most-pixels)"
                )
            if self._start < self._header.sizeof_hdr:
                raise UndecodableError(
                    f"a NIfTI whose vox_offset is {self._start}, inside of its own header; expected at least "
                    f"{self._header.sizeof_hdr + 4}: write it anew"
                )
            shape = " x ".join(map(str, self._shape))
            content: bytes | bytearray = self._content
            behind = content[end : end + _MOST_BEHIND]
            if self._packed:
                content, behind = _unpacked(self._content, end)
            if len(content) < end:
                raise UndecodableError(f"a NIfTI of {shape} values in {len(content):,} bytes; copy it again")
            # A header of one slice less, along any axis, leaves at least as many; padding has one value.
            least = size // max(self._shape)
            if len(behind) >= least and behind != behind[:1] * len(behind):
                raise UndecodableError(
                    f"a NIfTI of {shape} values that goes on behind them; expected an end, as its dim may be wrong or "
                    "it may hold several volumes: write it anew"
                )
            values = np.frombuffer(content, self._dtype, math.prod(self._shape), self._start)
            self._volume = values.reshape(self._shape, order="F")
            self._content = b""
        return self._volume


def _size(content: bytes) -> int:
    little = int.from_bytes(content[:4], "little")
    return little if little in _SIZES else int.from_bytes(content[:4], "big")


def _unpacked(content: bytes, size: int) -> tuple[bytearray, bytes]:
    """All of a gzipped file, of which so many bytes are wanted, and what is behind them; checked.

    Raises:
        UndecodableError: it is broken, ends too early, or goes on for long behind them.
    """
    found = bytearray(size)
    filled = 0
    with _gunzip(content) as stream:
        while filled < size and (count := stream.readinto(memoryview(found)[filled : filled + _BLOCK])):
            filled += count
        behind = stream.read(_MOST_BEHIND)
        if len(behind) == _MOST_BEHIND:  # the checksum comes last
            raise UndecodableError(
                f"a gzipped NIfTI that goes on behind the {size:,} bytes of its values; expected an end: write it anew"
            )
    if filled < size:
        raise UndecodableError("a gzipped file that ends too early; copy it again")
    return found, behind


@contextmanager
def _gunzip(content: bytes) -> Iterator[gzip.GzipFile]:
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(content)) as stream:
            yield stream
    except EOFError as error:
        raise UndecodableError("a gzipped file that ends too early; copy it again") from error
    except (zlib.error, OSError) as error:
        raise UndecodableError(f"broken gzip ({error}); copy the file again") from error

"""NIfTI volumes: one slice as a grey picture, read by nibabel and turned as radiologists look at it."""

from __future__ import annotations

import io
import math
import warnings
import zlib
from typing import Any, Literal, get_args

import nibabel
import numpy as np
from PIL import Image

from secure_fed.clients.rules import Facts, Picture, Rules, UndecodableError, brightness

Axis = Literal["axial", "coronal", "sagittal"]
AXES: tuple[Axis, ...] = get_args(Axis)
_NORMAL: dict[Axis, int] = {"sagittal": 0, "coronal": 1, "axial": 2}
_MODALITY = "NIFTI"
_SIZES = {348: "NIfTI-1", 540: "NIfTI-2"}
_GZIP = b"\x1f\x8b"
_MOST_BYTES = 2**28


def is_nifti(head: bytes) -> bool:
    """Whether a file, perhaps gzipped, begins as NIfTI files do; 132 bytes of it are enough."""
    if head.startswith(_GZIP):
        try:
            head = zlib.decompressobj(wbits=31).decompress(head, 4)
        except zlib.error:
            return False
    return len(head) >= 4 and any(int.from_bytes(head[:4], order) in _SIZES for order in ("little", "big"))


class NiftiFile:
    """A NIfTI volume, unpacked once for all of its slices.

    Args:
        content: the file, ``.nii`` or ``.nii.gz``.

    Raises:
        UndecodableError: it is broken, or no volume of grey values.
    """

    def __init__(self, content: bytes) -> None:
        if content.startswith(_GZIP):
            content = _unpacked(content)
        try:
            kind = nibabel.Nifti2Image if _size(content) == 540 else nibabel.Nifti1Image
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                header = kind.header_class.from_fileobj(io.BytesIO(content), check=False)
                magic = bytes(header["magic"].tobytes())[:3]
                if magic != (b"n+2" if kind is nibabel.Nifti2Image else b"n+1"):
                    raise UndecodableError(
                        f"a NIfTI header with magic {magic!r}; expected n+1 or n+2, header and image in one file: "
                        "write it anew"
                    )
                shape = tuple(int(side) for side in header.get_data_shape())
                self._refuse_shape(shape, header.get_data_dtype(), len(content))
                image = nibabel.as_closest_canonical(kind.from_bytes(content))
        except UndecodableError:
            raise
        except Exception as error:  # nibabel raises of every kind on broken files
            raise UndecodableError(
                f"broken NIfTI ({' '.join(str(error).split())[:160] or type(error).__name__}); write it anew"
            ) from error
        self._image = image
        self._shape = tuple(int(side) for side in image.shape[:3]) + (1,) * (3 - len(image.shape[:3]))

    @staticmethod
    def _refuse_shape(shape: tuple[int, ...], dtype: np.dtype[Any], size: int) -> None:
        if len(shape) < 2 or min(shape) < 1 or any(side != 1 for side in shape[3:]):
            raise UndecodableError(
                f"a NIfTI of {' x '.join(map(str, shape)) or 'no'} values; expected a volume of three dimensions: "
                "write one time point to a file"
            )
        if dtype.kind not in "iuf":
            raise UndecodableError(f"NIfTI values of type {dtype}; expected numbers, one a voxel: convert it")
        if math.prod(shape) * dtype.itemsize > size:
            raise UndecodableError(f"a NIfTI of {' x '.join(map(str, shape))} values in {size:,} bytes; copy it again")

    def frames_along(self, axis: Axis) -> int:
        """How many slices it has."""
        return self._shape[_NORMAL[axis]]

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
        sides = [side for place, side in enumerate(self._shape) if place != _NORMAL[axis]]
        rules.refuse_size(*sides)
        cut: list[Any] = [slice(None)] * 3
        cut[_NORMAL[axis]] = index
        try:
            data = self._image.dataobj
            values = np.asarray(data[tuple(cut[: len(self._image.shape)]) + (0,) * (len(self._image.shape) - 3)])
            values = values.astype(np.float64).reshape(sides)
        except Exception as error:
            raise UndecodableError(f"broken NIfTI ({' '.join(str(error).split())[:160]}); write it anew") from error
        # Canonical axes run to the patient's right, front and head.
        seen = values.T[::-1, ::-1]
        finite = np.isfinite(seen)
        if not finite.any():
            raise UndecodableError(f"slice {index} of a NIfTI without one finite value; expected numbers")
        window = rules.window(_MODALITY)
        low, high = float(self._image.header["cal_min"]), float(self._image.header["cal_max"])
        if window is not None:
            shown = brightness(seen, window.centre, window.width)
        else:
            if not (math.isfinite(low) and math.isfinite(high) and high > low):
                low, high = seen[finite].min(), seen[finite].max()
            shown = np.asarray((seen - low) / max(high - low, 1e-12)).clip(0, 1)
        grey = np.rint(255 * np.where(finite, shown, 0)).astype(np.uint8)
        return Picture(Image.fromarray(grey), Facts(_MODALITY))


def _size(content: bytes) -> int:
    little = int.from_bytes(content[:4], "little")
    return little if little in _SIZES else int.from_bytes(content[:4], "big")


def _unpacked(content: bytes) -> bytes:
    """A gzipped file's content, of at most :data:`_MOST_BYTES`."""
    engine = zlib.decompressobj(wbits=31)
    try:
        found = engine.decompress(content, _MOST_BYTES)
    except zlib.error as error:
        raise UndecodableError(f"broken gzip ({error}); copy the file again") from error
    if engine.unconsumed_tail:
        raise UndecodableError(
            f"a gzipped NIfTI of more than {_MOST_BYTES:,} bytes; expected at most that (a small file can claim any "
            "size): write fewer time points, or a smaller volume"
        )
    if not engine.eof:
        raise UndecodableError("a gzipped file that ends too early; copy it again")
    return found

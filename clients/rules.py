"""How pictures are to be seen: what study and site say of it, and what every reader hands back."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from secure_fed.protocol.study import StudyFile
from secure_fed.protocol.study_tables import Background, Window

VERSION = 13
"""Of the readers: raised whenever one shows a file differently, so that no cached feature is of an older one."""

MOST_PIXELS = 40_000_000
"""Of one picture, unless the site raises it: with it a process stays below 1 GiB; a small file can claim any size."""

Kind = Literal["", "scout", "screenshot", "no picture"]


class UndecodableError(Exception):
    """Why a file is no usable image."""


NOT_SQUARE = "pixels that are not square, shown as they are stored"
"""A note, where a file says that of its pixels."""


def are_square(*sides: float) -> bool:
    """Whether the sides of a pixel are equal, up to a hundredth; also where they are not known."""
    known = [side for side in sides if 0 < side < float("inf")]
    return len(known) < 2 or max(known) <= 1.01 * min(known)


def refused_as_no_picture(found: str) -> UndecodableError:
    """Why a file is refused that holds something beside pictures, in words."""
    return UndecodableError(
        f"{found}, no picture of a patient; take it out of the data, or leave such files out by leave_out = "
        '["no picture"] in [data] of site.toml'
    )


class Facts(NamedTuple):
    """What a file says of its picture; nothing of whose it is.

    Attributes:
        modality: as DICOM names it, ``NIFTI`` for these, empty for photographs.
        scanner: maker and model.
        kind: ``scout`` (localizer), ``screenshot`` (secondary capture, or text burnt in), ``no picture``
            (segmentations, doses, reports), else empty.
        notes: what was passed over to show it.
    """

    modality: str = ""
    scanner: str = ""
    kind: Kind = ""
    notes: tuple[str, ...] = ()


class Picture(NamedTuple):
    """A decoded picture, of at most 8 bits a channel, and what its file says of it."""

    image: Image.Image
    facts: Facts = Facts()


@dataclass(frozen=True)
class Rules:
    """What a picture's look depends on besides its file.

    Attributes:
        windows: the study's, by modality; they take the place of what the file says.
        background: what shows through where a picture is transparent.
        most_pixels: of one picture; no part of :attr:`digest`, as it changes none.
    """

    windows: tuple[Window, ...] = ()
    background: Background = "black"
    most_pixels: int = MOST_PIXELS

    @classmethod
    def of(cls, study: StudyFile, most_pixels: int = MOST_PIXELS) -> Rules:
        """The rules of a study or template at a site that allows so many pixels."""
        return cls(study.windows, study.background, most_pixels)

    @cached_property
    def digest(self) -> bytes:
        """Known by: two sets of rules of one digest show every file alike."""
        content = [VERSION, self.background, [window.model_dump() for window in self.windows]]
        return hashlib.sha256(repr(content).encode()).digest()

    def window(self, modality: str) -> Window | None:
        """The study's window for a modality, if it has one."""
        return next((window for window in self.windows if window.modality == modality), None)

    def refuse_size(self, width: int, height: int, costly: bool = False) -> None:
        """Check a picture's size before it is decoded.

        Args:
            width: in pixels.
            height: in pixels.
            costly: it is coded so that decoders take up to 20 bytes for each pixel; then a third as many are allowed.

        Raises:
            UndecodableError: it is empty or too large.
        """
        if width < 1 or height < 1:
            raise UndecodableError(f"{width} x {height} pixels; expected at least one")
        most = self.most_pixels // 3 if costly else self.most_pixels
        if width * height > most:
            part = ", a third of most_pixels, of colours in JPEG 2000 or WebP" * costly
            raise UndecodableError(
                f"{width} x {height} pixels; expected at most {most:,}{part} (a small file can claim any size): "
                "make it smaller, or raise most_pixels in [data] of site.toml (of predict: --most-pixels)"
            )


def brightness(values: NDArray[Any], centre: float, width: float) -> NDArray[np.float64]:
    """Values as brightness in [0, 1]: ``centre`` - ``width`` / 2 is black, ``centre`` + ``width`` / 2 white."""
    return np.asarray(((values.astype(np.float64) - centre) / width + 0.5).clip(0, 1))

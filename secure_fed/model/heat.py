"""Heat maps where a picture's pixels are, in colours that mean the same in all pictures of a study."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from secure_fed.protocol import memory

_SIGMA = 1 / 32
"""Of the Gaussian that smooths a map, in heights of the picture."""


def upsampled(maps: NDArray[np.float64], size: tuple[int, int]) -> NDArray[np.float64]:
    """Maps [n, h, w] as [n, height, width], smoothed.

    Args:
        maps: any values.
        size: height and width.
    """
    grown = np.empty((len(maps), *size))
    for place, one in enumerate(maps):
        picture = Image.fromarray(one.astype(np.float32))
        grown[place] = np.asarray(picture.resize((size[1], size[0]), Image.Resampling.BILINEAR))
    return np.asarray(ndimage.gaussian_filter(grown, (0, _SIGMA * size[0], _SIGMA * size[0])))


Window = tuple[float, float, float, float]
"""Left, top, right and bottom edge of what a tower saw, in pixels of a picture."""


def placed(maps: NDArray[np.float64], window: Window, size: tuple[int, int]) -> NDArray[np.float64]:
    """Maps [n, h, w] of what a tower saw, as [n, height, width] of the picture that it was cut out of.

    0 where the tower saw nothing.

    Args:
        maps: at least 0.
        window: that they are of.
        size: height and width of the picture.
    """
    left, top, right, bottom = (round(edge) for edge in window)
    grown = upsampled(maps, (max(1, bottom - top), max(1, right - left)))
    found = np.zeros((len(maps), *size))
    rows, columns = slice(max(0, top), min(size[0], bottom)), slice(max(0, left), min(size[1], right))
    found[:, rows, columns] = grown[:, rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
    return found


class Scale(NamedTuple):
    """Which distances a memory's maps show, the same in all pictures of a study.

    Attributes:
        least: up to which there is no red.
        most: from which on it is full.
    """

    least: float
    most: float

    @classmethod
    def of(cls, adapter: Mapping[str, NDArray[np.float64]], false_alarms: float) -> Scale:
        """From half the threshold of scores to one and a half of it; of 0.5, if there is none."""
        limit = memory.threshold(adapter[memory.HISTOGRAM], false_alarms)
        middle = _NO_THRESHOLD if limit >= memory.NO_LIMIT else max(limit, 2 / memory.BINS)
        return cls(0.5 * middle, 1.5 * middle)

    def share(self, maps: NDArray[np.float64]) -> NDArray[np.float64]:
        """How red distances are, from 0 to 1."""
        return np.clip((maps - self.least) / (self.most - self.least), 0, 1)

    @property
    def words(self) -> str:
        """For a legend."""
        return (
            f"no red up to a distance of {self.least:.2f}, full red from {self.most:.2f} on, the same in all pictures "
            "of this study"
        )


_NO_THRESHOLD = 0.5


def overlay(picture: Image.Image, heat: NDArray[np.float64], window: Window | None = None) -> Image.Image:
    """A picture in grey with a map over it in red, RGB of the picture's size.

    Args:
        picture: of any size and mode that converts to grey.
        heat: [h, w], from 0 to 1.
        window: the part of the picture that it is of; all of it if not given.
    """
    grey = np.asarray(picture.convert("L"), dtype=np.float64)
    whole = (0.0, 0.0, float(picture.width), float(picture.height))
    warm = np.clip(placed(heat[None], window or whole, grey.shape)[0], 0, 1)
    shown = np.stack([grey + (255 - grey) * 0.6 * warm, grey * (1 - 0.6 * warm), grey * (1 - 0.6 * warm)], axis=2)
    return Image.fromarray(np.rint(shown).astype(np.uint8))

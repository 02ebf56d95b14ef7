"""Heat maps in the size of a picture."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

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


def overlay(picture: Image.Image, heat: NDArray[np.float64]) -> Image.Image:
    """A picture in grey with a map over it in red, RGB of the picture's size.

    Args:
        picture: of any size and mode that converts to grey.
        heat: [h, w], from 0 to 1.
    """
    grey = np.asarray(picture.convert("L"), dtype=np.float64)
    warm = np.clip(upsampled(heat[None], grey.shape)[0], 0, 1)
    shown = np.stack([grey + (255 - grey) * 0.6 * warm, grey * (1 - 0.6 * warm), grey * (1 - 0.6 * warm)], axis=2)
    return Image.fromarray(np.rint(shown).astype(np.uint8))

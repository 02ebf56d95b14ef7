"""Maps lie where the pixels are that a tower saw, whatever was done to a picture before, and mean the same in all."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from secure_fed.model.heat import Scale, overlay, placed
from secure_fed.model.preparing import preparer, window
from secure_fed.protocol import memory

PLAIN: dict[str, Any] = {"mean": [0.0] * 3, "std": [1.0] * 3}
WAYS: dict[str, dict[str, Any]] = {
    "open_clip, shortest": {"size": [40, 40], "interpolation": "bilinear", "resize_mode": "shortest", "cut": "round"},
    "open_clip, longest": {"size": [40, 40], "interpolation": "bilinear", "resize_mode": "longest", "cut": "round"},
    "open_clip, squash": {"size": [40, 40], "interpolation": "bilinear", "resize_mode": "squash", "cut": "round"},
    "open_clip, oblong": {"size": [40, 60], "interpolation": "bilinear", "resize_mode": "shortest", "cut": "round"},
    "transformers, shortest, cut": {
        **{"size": [40, 40], "interpolation": "bilinear", "resize_mode": "shortest", "cut": "floor"},
        "resize_to": 50,
    },
    "transformers, squash, cut": {
        **{"size": [40, 40], "interpolation": "bilinear", "resize_mode": "squash", "cut": "floor"},
        "resize_to": [50, 44],
    },
}


@pytest.mark.parametrize("size", [(120, 120), (300, 100), (90, 201)])
@pytest.mark.parametrize("way", list(WAYS))
def test_the_window_is_what_the_preparation_leaves(way: str, size: tuple[int, int]) -> None:
    """A picture whose colours say where a pixel is, is prepared; blue says whether it is of the picture at all."""
    preprocess = WAYS[way] | PLAIN
    columns, rows = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    picture = np.stack([columns * 0.8 + 5, rows * 0.8 + 5, np.full(columns.shape, 255)], axis=2)
    across, down, inside = 255 * preparer(preprocess)(Image.fromarray(picture.astype(np.uint8)))
    left, top, right, bottom = window(preprocess, size)
    height, width = across.shape
    along = left + (np.arange(width) + 0.5) * (right - left) / width - 0.5
    downwards = top + (np.arange(height) + 0.5) * (bottom - top) / height - 0.5
    there = inside > 254
    there[1:-1, 1:-1] &= there[:-2, 1:-1] & there[2:, 1:-1] & there[1:-1, :-2] & there[1:-1, 2:]
    there[[0, -1]] = False
    there[:, [0, -1]] = False
    assert there.mean() > 0.25
    pixel = max((right - left) / width, (bottom - top) / height) + 1
    assert np.abs((across - 5) / 0.8 - along[None])[there].max() < pixel
    assert np.abs((down - 5) / 0.8 - downwards[:, None])[there].max() < pixel


def test_a_map_is_put_back_where_its_pixels_were() -> None:
    heat = np.zeros((1, 4, 4))
    heat[0, 0, 0] = 1.0
    found = placed(heat, (100.0, 0.0, 200.0, 100.0), (100, 300))[0]
    row, column = np.unravel_index(found.argmax(), found.shape)
    assert row < 25
    assert 100 <= column < 125
    assert found[:, :100].max() == found[:, 200:].max() == 0
    padded = placed(np.array([[[0.0, 1.0], [0.0, 1.0]]]), (-50.0, 0.0, 150.0, 200.0), (200, 100))[0]
    assert padded[:, 0].max() < 0.2  # the middle of the map's left half
    assert padded[:, -1].min() > 0.8


@pytest.mark.parametrize(
    ("box", "size"),
    [
        pytest.param((20, 30, 60, 70), (100, 90), id="inside"),
        pytest.param((-25, 0, 75, 100), (100, 50), id="wider than the picture"),
        pytest.param((0, -25, 100, 75), (50, 100), id="higher than the picture"),
        pytest.param((10, -20, 50, 100), (80, 60), id="oblong, beyond two edges"),
    ],
)
def test_each_value_of_a_map_lands_on_its_own_pixel(box: tuple[int, int, int, int], size: tuple[int, int]) -> None:
    """Maps that rise across and down say of each pixel where in the window it lies."""
    left, top, right, bottom = box
    rising = np.broadcast_to((np.arange(20) + 0.5) / 20, (20, 20))
    across, down = placed(np.stack([rising, rising.T]), (left, top, right, bottom), size)
    rows, columns = np.arange(size[0]) + 0.5, np.arange(size[1]) + 0.5
    seen = ((rows > top) & (rows < bottom))[:, None] & ((columns > left) & (columns < right))
    assert across[~seen].max(initial=0) == down[~seen].max(initial=0) == 0
    there, below = np.broadcast_to((columns - left) / (right - left), size), ((rows - top) / (bottom - top))[:, None]
    np.testing.assert_allclose(across[seen], there[seen], atol=0.08)  # edges are smoothed
    np.testing.assert_allclose(down[seen], np.broadcast_to(below, size)[seen], atol=0.08)


def test_a_picture_is_red_only_where_it_was_seen() -> None:
    picture = Image.new("L", (300, 100), 90)
    drawn = np.asarray(overlay(picture, np.ones((3, 3)), (100.0, 0.0, 200.0, 100.0))).astype(int)
    red = (drawn[..., 0] - drawn[..., 1]).mean(axis=0)
    assert red[:100].max() == red[200:].max() == 0
    assert red[120:180].min() > 100


def test_colours_go_by_the_threshold_and_by_no_picture() -> None:
    histogram = np.zeros(memory.BINS)
    histogram[memory.score_bin(np.array([0.599]))] = 100.0
    scale = Scale.of({memory.HISTOGRAM: histogram}, 0.1)
    limit = memory.threshold(histogram, 0.1)
    assert (scale.least, scale.most) == (limit / 2, 1.5 * limit)
    np.testing.assert_allclose(scale.share(np.array([0.0, limit / 2, limit, 1.5 * limit, 2.0])), [0, 0, 0.5, 1, 1])
    assert f"{1.5 * limit:.2f}" in scale.words
    assert Scale.of({memory.HISTOGRAM: np.zeros(memory.BINS)}, 0.1) == (0.25, 0.75)

"""Where in an image a classifier's reasons lie: one map an image, of gradients, for every kind of image tower.

A convolutional tower is asked at an early block, whose places are small: how much each place's features, moved, would
move the margin of a class. One gradient is speckled, and its speckles depend on how the strides fall on the image; so
it is averaged over shifts of the image, each map moved back, and over a little noise (SmoothGrad, arXiv 1706.03825). A
transformer with a token of the whole image is asked at its last block (Grad-ECLIP, arXiv 2502.18816); another one, as
a convolutional tower is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from secure_fed.core.errors import BackboneError
from secure_fed.model.adapters import Adapter
from secure_fed.model.backbone import LoadedBackbone
from secure_fed.model.heat import upsampled

SHIFTS = 16
"""Shifted and noisy copies of an image that a map is the mean of; a square number."""

_NOISE = 0.5
"""Standard deviation of the noise, in units of prepared pixels, whose own is about 1."""

_FARTHEST = 1 / 20
"""Of the shifts up, down, left and right, in sides of the image."""

Margin = Callable[[Tensor], Tensor]
"""Of unit features [n, d], differentiable, what is to be explained, [n]."""


def margin_of(adapter: Adapter, label: int) -> Margin:
    """The logit of a class over the mean of the others', of unit features."""

    def margin(features: Tensor) -> Tensor:
        logits = adapter.logits(features)
        return logits[:, label] - (logits.sum(dim=1) - logits[:, label]) / (logits.shape[1] - 1)

    return margin


def kind_of_map(backbone: LoadedBackbone) -> str:
    """How maps are made of this tower, in words."""
    if backbone.last_attention() is not None:
        return "Grad-ECLIP at the last block"
    return f"gradients at {early_block(backbone)}, averaged over {SHIFTS} shifts"


def early_block(backbone: LoadedBackbone) -> str:
    """The block at which a tower without a token of the whole image is asked: the first at the top of its tree.

    Raises:
        BackboneError: the tower has no block of patches.
    """
    blocks = backbone.blocks()[:-1]
    if not blocks:
        raise BackboneError("the image tower has no block of patches, so no map can be made; expected another backbone")
    depth = min(name.count(".") for name in blocks)
    return next(name for name in blocks if name.count(".") == depth)


def heat_map(backbone: LoadedBackbone, prepared: NDArray[np.float32], margin: Margin) -> NDArray[np.float64]:
    """A map [side, side], from 0 to 1, over what the tower sees; large where the reasons for ``margin`` lie.

    Args:
        backbone: the tower.
        prepared: of one image, [3, side, side].
        margin: what is explained.
    """
    attention = backbone.last_attention()
    if attention is not None:
        found = _grad_eclip(backbone, attention, prepared, margin)
    else:
        found = _early_gradients(backbone, prepared, margin)
    found = upsampled(found[None], found.shape)[0]
    found = found - found.min()
    return np.asarray(found / max(float(found.max()), 1e-30))


def _early_gradients(backbone: LoadedBackbone, prepared: NDArray[np.float32], margin: Margin) -> NDArray[np.float64]:
    """relu(sum_c g_c a_c) at each place of an early block, averaged: a its features, g the gradient there."""
    block = early_block(backbone)
    height, width, _ = backbone.grid(block)
    side = prepared.shape[-1]
    steps = np.linspace(-side * _FARTHEST, side * _FARTHEST, round(SHIFTS**0.5)).round().astype(int)
    shifts = [(int(down), int(right)) for down in steps for right in steps]
    noise = np.random.default_rng(0).normal(0, _NOISE, (len(shifts), *prepared.shape))
    copies = np.stack([_moved(prepared, shift) for shift in shifts]) + noise
    seen, gradient = backbone.gradients(copies.astype(np.float32), block, margin)
    places = torch.relu(_places(gradient * seen, (height, width)).sum(dim=1))
    whole = nn.functional.interpolate(places[:, None], size=(side, side), mode="bilinear")[:, 0].double().numpy()
    back = [_moved(one[None], (-down, -right))[0] for one, (down, right) in zip(whole, shifts, strict=True)]
    return np.asarray(np.mean(back, axis=0))


def _places(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """What a block gave, as [n, depth, height, width]."""
    if tokens.ndim == 3:
        return tokens[:, -grid[0] * grid[1] :].transpose(1, 2).reshape(len(tokens), -1, *grid)
    return tokens


def _moved(image: NDArray[np.floating], shift: tuple[int, int]) -> NDArray[np.floating]:
    """An image [c, h, w] moved down and to the right; what comes in repeats the edge."""
    height, width = image.shape[1:]
    rows = np.clip(np.arange(height) - shift[0], 0, height - 1)
    columns = np.clip(np.arange(width) - shift[1], 0, width - 1)
    return np.asarray(image[:, rows][:, :, columns])


def _grad_eclip(
    backbone: LoadedBackbone, attention: nn.MultiheadAttention, prepared: NDArray[np.float32], margin: Margin
) -> NDArray[np.float64]:
    """relu(sum_c g_c w_i v_ic): g the gradient at the attention's output for the token of the whole image, v_i the
    values of patch i after the output's projection, w_i how alike its key and that token's query are, from 0 to 1.
    """
    tokens, gradient = backbone.attention_gradients(prepared, attention, margin)
    weight, bias = attention.in_proj_weight, attention.in_proj_bias
    query, key, value = nn.functional.linear(tokens, weight, bias).float().chunk(3, dim=-1)
    value = nn.functional.linear(value, attention.out_proj.weight.float())
    alike = nn.functional.cosine_similarity(query[:1], key[1:], dim=-1)
    alike = (alike - alike.min()) / (alike.max() - alike.min()).clamp_min(1e-12)
    places = torch.relu((value[1:] * gradient[0]).sum(dim=-1) * alike)
    grid = round(len(places) ** 0.5)
    side = prepared.shape[-1]
    whole = nn.functional.interpolate(places.reshape(1, 1, grid, grid), size=(side, side), mode="bilinear")
    return np.asarray(whole[0, 0].double().numpy())


def occluded(prepared: NDArray[np.float32], order: Sequence[int], grid: int) -> NDArray[np.float32]:
    """A prepared image [3, side, side] whose cells, of ``grid`` a side and by number, are the image's mean."""
    copy = prepared.copy()
    side = prepared.shape[-1]
    edges = np.linspace(0, side, grid + 1).round().astype(int)
    mean = prepared.mean(axis=(1, 2), keepdims=True)
    for cell in order:
        row, column = divmod(cell, grid)
        copy[:, edges[row] : edges[row + 1], edges[column] : edges[column + 1]] = mean
    return copy

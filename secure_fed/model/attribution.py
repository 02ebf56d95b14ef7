"""Where in an image a classifier's reasons lie: one map an image, of gradients, for every kind of image tower.

A transformer with a token of the whole image is asked at its last block (Grad-ECLIP, arXiv 2502.18816). A tower that
ends in a mean over places, and has enough of these, is asked there: by linearity each place has its own part of the
class's margin. Another one is asked at early blocks, whose places are small: how much each place's features, as far as
they differ from those of the blurred image, would move the margin. One such gradient is speckled, and its speckles
depend on how the strides fall on the image; so it is averaged over shifts of the image, each map moved back, and over
a little noise (SmoothGrad, arXiv 1706.03825). A strong blur leaves no finding, but changes what is large besides, as
grey and white matter; the first block's small places are held against a slight one too. A gradient tells of small
changes alone; so each place is taken out too, blurred, and filled in from around it, which leaves no smear at edges,
and has its part of what the margin loses. A place counts as far as two blocks and these parts agree on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor, nn

from secure_fed.core.errors import BackboneError
from secure_fed.model.adapter_file import AdapterFile
from secure_fed.model.adapters import Adapter
from secure_fed.model.heat import upsampled
from secure_fed.model.loaded_backbone import LoadedBackbone

SHIFTS = 16
"""Shifted and noisy copies of an image that a map is the mean of; a square number."""

_NOISE = 0.5
"""Standard deviation of the noise, in units of prepared pixels, whose own is about 1."""

_FARTHEST = 1 / 20
"""Of the shifts up, down, left and right, in sides of the image."""

_BLUR, _SLIGHT = 0.25, 0.06
"""Standard deviations of the blur that leaves no finding, and of the one that leaves no small one, in sides of the
image."""

_WINDOW = 1 / 12
"""Standard deviation of the Gaussian window within which a place is blurred, in sides of the image."""

_DISC = 3 / 16
"""Radius of the disc that is filled in from around it, in sides of the image."""

_PLACES = 10
"""Places a side that are taken out one by one."""

_FINE = 1 / 48
"""Standard deviation of what smooths gradients, in sides of the image."""

_EXACT = 7
"""Fewest places a side of a last block whose own map can point at something."""

_NO_CHANCE = 745.0
"""A logit so far below the largest has no probability in float64: its class was left out of the head."""

Margin = Callable[[Tensor], Tensor]
"""Of unit features [n, d], differentiable, what is to be explained, [n]."""


def margin_of(adapter: Adapter, label: int, against: int | None = None) -> Margin:
    """The logit of a class over another's, or over the mean of all others', of unit features.

    A class that is left out of the head counts for none in the mean.
    """

    def margin(features: Tensor) -> Tensor:
        logits = adapter.logits(features)
        others = logits.detach() > logits.detach().amax(dim=1, keepdim=True) - _NO_CHANCE
        others[:, label] = False
        if against is not None and bool(others[:, against].all()):
            return logits[:, label] - logits[:, against]
        rest = torch.where(others, logits, torch.zeros_like(logits)).sum(dim=1)
        return logits[:, label] - rest / others.sum(dim=1).clamp_min(1)

    return margin


def pattern_of(adapter: Adapter, margin: Margin, label: int) -> Margin | None:
    """What a margin that divides by a covariance looks for, as its weights do not show it: Sigma w times the feature.

    Such weights w are large where features spread little, whatever a class looks like; Sigma w, Sigma the covariance
    within classes, is how features move with the class (Haufe et al. 2014, doi 10.1016/j.neuroimage.2013.10.067, eq.
    6). Features have length 1, so that of w what lies along the class's own mean moves nothing and is left out.

    None of an adapter that knows no covariance.
    """
    found = adapter.within_class(label)
    if found is None:
        return None
    mean, covariance = found
    unit = torch.from_numpy(mean / np.linalg.norm(mean))[None].requires_grad_(True)
    (gradient,) = torch.autograd.grad(margin(unit).sum(), unit)
    weights, along = gradient[0].numpy(), unit[0].detach().numpy()
    pattern = torch.from_numpy(covariance @ (weights - along * (along @ weights)))
    length = float(pattern.norm())
    return (lambda features: features @ (pattern / length).to(features.dtype)) if length > 0 else None


def question(file: AdapterFile, adapter: Adapter, label: int) -> tuple[Margin, Margin | None]:
    """What is asked of a prediction: its margin, over the class that the file names for that, and its pattern.

    Args:
        file: of the adapter.
        adapter: as the file builds it.
        label: the predicted class.
    """
    against = file.held_against(file.classes[label])
    margin = margin_of(adapter, label, None if against is None else file.classes.index(against))
    return margin, pattern_of(adapter, margin, label)


class HeatMaps:
    """Maps by one tower.

    Attributes:
        kind: how they are made, in words.
    """

    def __init__(self, backbone: LoadedBackbone) -> None:
        """Choose the way by what the tower is.

        Raises:
            BackboneError: it has no block of patches.
        """
        self._backbone = backbone
        self._attention = backbone.last_attention()
        self._pooled = None if self._attention is not None else pooled_block(backbone)
        self._early = () if self._attention is not None or self._pooled is not None else early_blocks(backbone)
        if self._attention is not None:
            self.kind = "Grad-ECLIP at the last block"
        elif self._pooled is not None:
            self.kind = f"each place's part of the class's margin, at {self._pooled}"
        else:
            names = " and ".join(self._early)
            self.kind = (
                f"gradients at {names}, against the blurred image, averaged over {SHIFTS} shifts; times the place's "
                "part of what the class's margin loses when places are blurred, or filled in from around them"
            )

    def of(
        self, prepared: NDArray[np.float32], margin: Margin, pattern: Margin | None = None
    ) -> NDArray[np.float64] | None:
        """A map [side, side], from 0 to 1, over what the tower sees; large where the reasons for ``margin`` lie.

        None where no place speaks for it: a map of nothing would show an image as if it were looked at in vain.

        Args:
            prepared: of one image, [3, side, side].
            margin: what is explained.
            pattern: of :func:`pattern_of`, whose gradients count as much; those at early blocks alone are so unsure.
        """
        found = self._of(prepared, margin, pattern)
        return found if found.any() else None

    def _of(self, prepared: NDArray[np.float32], margin: Margin, pattern: Margin | None) -> NDArray[np.float64]:
        size = prepared.shape[1:]
        if self._attention is not None:
            return _scaled(_grad_eclip(self._backbone, self._attention, prepared, margin))
        if self._pooled is not None:
            return _scaled(_grown(class_map(self._backbone, self._pooled, prepared, margin)[None], size)[0])
        strong, slight = (
            ndimage.gaussian_filter(prepared, (0, sigma * size[0], sigma * size[0]), mode="nearest")
            for sigma in (_BLUR, _SLIGHT)
        )
        first, *coarser = self._early
        held = [(first, strong), (first, slight), *((block, strong) for block in coarser)]
        asked, maps = [margin] if pattern is None else [margin, pattern], []
        for one in asked:
            at_strong, at_slight, *others = _early_gradients(self._backbone, held, prepared, one)
            maps += [_smoothed(part, _FINE) for part in (_unit(at_strong) + _unit(at_slight), *others)]
        ways = blurred_away(prepared, strong), filled_in(prepared)
        parts = _grown(parts_of_places(self._backbone, prepared, ways, margin), size)
        taken = [_smoothed(one, width / 2) for one, width in zip(parts, (_WINDOW, 2 / 3 * _DISC), strict=True)]
        gradients = np.prod(maps, axis=0) ** (1 / len(asked))
        return _unit(gradients * np.sum(taken, axis=0))


def early_blocks(backbone: LoadedBackbone) -> tuple[str, ...]:
    """The blocks at which a tower is asked early: the first at the top of its tree, and there the next that has fewer
    places, if there is one.

    Raises:
        BackboneError: the tower has no block of patches.
    """
    blocks = backbone.blocks()[:-1]
    if not blocks:
        raise BackboneError("the image tower has no block of patches, so no map can be made; expected another backbone")
    depth = min(name.count(".") for name in blocks)
    first, *others = (name for name in blocks if name.count(".") == depth)
    places = backbone.grid(first)[0]
    return (first, *[name for name in others if backbone.grid(name)[0] < places][:1])


def pooled_block(backbone: LoadedBackbone) -> str | None:
    """The last block of a convolutional tower whose features are a mean over its places, if these are enough.

    With a mean the gradient is the same at all places, which is tried on an image of noise.
    """
    blocks = backbone.blocks()[:-1]
    if not blocks or min(backbone.grid(blocks[-1])[:2]) < _EXACT:
        return None
    noise = np.random.default_rng(0).normal(size=(1, 3, backbone.side, backbone.side)).astype(np.float32)
    ((seen, gradient),) = backbone.gradients(noise, blocks[-1:], lambda features: features[:, 0])
    if seen.ndim != 4:
        return None
    apart = (gradient - gradient.mean(dim=(2, 3), keepdim=True)).abs().max()
    return blocks[-1] if float(apart) <= 1e-4 * float(gradient.abs().max()) else None


def class_map(
    backbone: LoadedBackbone, block: str, prepared: NDArray[np.float32], margin: Margin
) -> NDArray[np.float64]:
    """Each place's part [height, width] of a margin at the last block, whose mean the tower's feature is linear in.

    With the feature's length as it is, the parts add up to the margin's linear part at the unit feature: to all of it
    but a constant for a head that is linear, as ``text_head`` and ``gaussian_head`` are; of a gate to first order.
    """
    unit = torch.from_numpy(backbone.encode_prepared([prepared])).requires_grad_(True)
    (slope,) = torch.autograd.grad(margin(unit).sum(), unit)
    ((seen, gradient),) = backbone.gradients(
        prepared[None], (block,), lambda raw: raw @ slope[0] / raw.detach().norm(dim=-1), unit=False
    )
    return np.asarray((gradient * seen).sum(dim=1)[0].double().numpy())


def _early_gradients(
    backbone: LoadedBackbone,
    held: Sequence[tuple[str, NDArray[np.float32]]],
    prepared: NDArray[np.float32],
    margin: Margin,
) -> list[NDArray[np.float64]]:
    """Of each block and blurred image relu(sum_c g_c (a_c - b_c)) at each place, averaged: a the block's features, b
    those of the blurred image, g the gradient at a. What the blur leaves as it is, as empty space, has no part."""
    side = prepared.shape[-1]
    steps = np.linspace(-side * _FARTHEST, side * _FARTHEST, round(SHIFTS**0.5)).round().astype(int)
    shifts = [(int(down), int(right)) for down in steps for right in steps]
    noise = np.random.default_rng(0).normal(0, _NOISE, (len(shifts), *prepared.shape))

    def copies(image: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.asarray(np.stack([_moved(image, shift) for shift in shifts]) + noise, dtype=np.float32)

    blocks = list(dict.fromkeys(block for block, _ in held))
    asked = dict(zip(blocks, backbone.gradients(copies(prepared), blocks, margin), strict=True))
    found = []
    for block, blurred in held:
        (before,), (seen, gradient) = backbone.activations(copies(blurred), [block]), asked[block]
        places = torch.relu(_places(gradient * (seen - before), backbone.grid(block)[:2]).sum(dim=1))
        whole = _grown(places.double().numpy(), (side, side))
        back = [_moved(one[None], (-down, -right))[0] for one, (down, right) in zip(whole, shifts, strict=True)]
        found.append(np.asarray(np.mean(back, axis=0)))
    return found


def parts_of_places(
    backbone: LoadedBackbone,
    prepared: NDArray[np.float32],
    ways: Sequence[Iterable[NDArray[np.float32]]],
    margin: Margin,
) -> NDArray[np.float64]:
    """How much of what a margin loses when places are taken out each place has, [ways, _PLACES, _PLACES].

    Taking place i out moves the feature by d_i and lowers the margin by m_i. A weight that is large where features
    spread little makes m_i of one place uncertain; but the places of one image move its feature alike, as far as they
    show one thing. So a place's part is d_i . u, u = sum_j relu(m_j) d_j over places and ways; 0 where it is below.

    Args:
        backbone: its tower.
        prepared: the image, [3, side, side].
        ways: of each, the image without each of its places, by :func:`blurred_away` or :func:`filled_in`.
        margin: what is explained.
    """
    found = [backbone.encode_prepared([prepared, *changed]) for changed in ways]
    features = torch.from_numpy(np.concatenate([one[1:] for one in found]))
    with torch.inference_mode():
        falls = margin(torch.from_numpy(found[0][:1])) - margin(features)
    moved = found[0][:1].astype(np.float64) - features.double().numpy()
    parts = moved @ (torch.relu(falls).double().numpy() @ moved)
    return np.asarray(np.maximum(parts.reshape(len(ways), _PLACES, _PLACES), 0))


def blurred_away(prepared: NDArray[np.float32], blurred: NDArray[np.float32]) -> Iterator[NDArray[np.float32]]:
    """An image [3, side, side], in which each place by turns gives way to the blurred image's."""
    for distance in _distances(prepared.shape[-1]):
        window = np.exp(-((distance / _WINDOW) ** 2) / 2)
        yield prepared + (window * (blurred - prepared)).astype(np.float32)


def filled_in(prepared: NDArray[np.float32]) -> Iterator[NDArray[np.float32]]:
    """An image [3, side, side], in which each place by turns is filled in from around it: by means of the pixels
    outside of the disc, weighted by a Gaussian of half its radius."""
    side = prepared.shape[-1]
    sigma = _DISC * side / 2
    for distance in _distances(side):
        disc = np.clip((_DISC - distance) * side / 2 + 0.5, 0, 1)
        known = ndimage.gaussian_filter(1 - disc, sigma)
        around = ndimage.gaussian_filter(prepared * (1 - disc), (0, sigma, sigma)) / np.maximum(known, 1e-6)
        yield (prepared + disc * (around - prepared)).astype(np.float32)


def _distances(side: int) -> Iterator[NDArray[np.float64]]:
    """Of each pixel from the middle of each place in turn, [side, side], in sides of the image."""
    pixels, middles = (np.arange(side) + 0.5) / side, (np.arange(_PLACES) + 0.5) / _PLACES
    return (np.hypot(pixels[:, None] - row, pixels - column) for row in middles for column in middles)


def _grown(places: NDArray[np.float64], size: tuple[int, ...]) -> NDArray[np.float64]:
    """Values by place [n, h, w] as [n, height, width]."""
    grown = nn.functional.interpolate(torch.from_numpy(places)[:, None], size=size[-2:], mode="bilinear")
    return np.asarray(grown[:, 0].numpy())


def _scaled(found: NDArray[np.float64]) -> NDArray[np.float64]:
    """A map, smoothed, from 0 to 1."""
    return _unit(upsampled(found[None], (found.shape[0], found.shape[1]))[0])


def _smoothed(found: NDArray[np.float64], sigma: float) -> NDArray[np.float64]:
    """A map [side, side], smoothed by a Gaussian of ``sigma`` sides of the image, from 0 to 1."""
    return _unit(ndimage.gaussian_filter(found, sigma * len(found)))


def _unit(found: NDArray[np.float64]) -> NDArray[np.float64]:
    found = found - found.min()
    return np.asarray(found / max(float(found.max()), 1e-30))


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
    whole: NDArray[np.float64] = _grown(places.reshape(1, grid, grid).double().numpy(), prepared.shape)[0]
    return whole


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

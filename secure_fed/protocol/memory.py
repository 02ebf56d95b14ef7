"""Memories of normal images, moved by sums: Lloyd's iteration over sites (after FedDyMem, arXiv 2502.21012).

A memory is a list of centroids in the space of patch features. In a round each site assigns its normal training patches
to the nearest centroid and sends, for each, the sum of features, the patients' weight and their number; every site
divides the opened sums, in elementwise float64, so that all get the same bits. In the last round sites send a
histogram of the largest scores of their normal validation patients, of which the threshold is made. A patient weighs 1:
each of its patches one over their number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from secure_fed.protocol.codec import Block, Parameters

Floats = NDArray[np.float64]

SCORE, MAP = "score", "map"
"""The memory that scores images, and the one that a heat map is made of, if it is another."""

GRIDS, HISTOGRAM = "grids", "histogram"
"""Of the adapter: height, width and depth of each memory's patches, [memories, 3]; and of the last round, [BINS]."""

BINS = 512
"""Of the histogram of scores, which are distances of unit vectors: from 0 to 2, in equal parts."""

NO_LIMIT = 2.0
"""No two unit vectors are farther from each other: nothing is flagged."""

_PART = 4096
"""Parts of a patient that a weight resolves."""


def centroids(memory: str) -> str:
    """Name of a memory's centroids, [M, d], in the adapter."""
    return f"{memory}_centroids"


def memories(adapter: Mapping[str, Floats]) -> tuple[str, ...]:
    """The memories that an adapter has."""
    return tuple(name for name in (SCORE, MAP) if centroids(name) in adapter)


def width(adapter: Mapping[str, Floats]) -> int:
    """Length of an image's patch features in one row: of each memory's grid, one after the other."""
    return sum(math.prod(int(side) for side in grid) for grid in adapter[GRIDS])


def patches(adapter: Mapping[str, Floats], x: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
    """Patch features of images by memory, [n, patches, d], of rows x [n, width]."""
    found, start = {}, 0
    for name, grid in zip(memories(adapter), adapter[GRIDS], strict=True):
        height, across, depth = (int(side) for side in grid)
        end = start + height * across * depth
        found[name] = x[:, start:end].reshape(len(x), height * across, depth)
        start = end
    return found


def sums_blocks(adapter: Mapping[str, Floats], most_patients: int, precision: int) -> tuple[Block, ...]:
    """A round's values: of each memory sums of features [M d], weights [M] and numbers of patients [M]."""
    blocks: list[Block] = []
    for name in memories(adapter):
        count, depth = adapter[centroids(name)].shape
        blocks.append(Block(f"{name}_sums", np.full(count * depth, float(most_patients)), precision))
        blocks.append(_counts(f"{name}_weights", count, most_patients, _PART))
        blocks.append(_counts(f"{name}_patients", count, most_patients, 1))
    return tuple(blocks)


def histogram_block(most_patients: int) -> Block:
    """The last round's values, [BINS]."""
    return _counts(HISTOGRAM, BINS, most_patients, _PART)


def _counts(name: str, size: int, most_patients: int, part: int) -> Block:
    precision = max(8, 1 + (part * most_patients).bit_length())
    return Block(name, np.full(size, ((1 << (precision - 1)) - 1) / part), precision)


def moved(adapter: Parameters, found: Mapping[str, Floats], min_patients: int) -> Parameters:
    """The adapter after a round.

    Args:
        adapter: before it; left as it is.
        found: what the round's sums stand for, by block.
        min_patients: fewest of whom a centroid is made; one with fewer keeps its place.
    """
    after = dict(adapter)
    if HISTOGRAM in found:
        return after | {HISTOGRAM: found[HISTOGRAM].copy()}
    for name in memories(adapter):
        before = adapter[centroids(name)]
        weights, patients = found[f"{name}_weights"], found[f"{name}_patients"]
        # A patient weighs at most 1 at a centroid, so that a weight is a number of patients at least.
        enough = (np.maximum(patients, weights) >= min_patients) & (weights > 0)
        mean = found[f"{name}_sums"].reshape(before.shape) / np.where(enough, weights, 1.0)[:, None]
        # A mean of unit vectors lies in the unit ball; noise on the sums takes it out of there.
        lengths = np.array([math.sqrt(math.fsum((row * row).tolist())) for row in mean])
        mean = mean / np.maximum(lengths, 1.0)[:, None]
        after[centroids(name)] = np.where(enough[:, None], mean, before)
    return after


def score_bin(scores: Floats) -> NDArray[np.int64]:
    """The bins of scores."""
    return np.clip(np.floor(scores * (BINS / 2)), 0, BINS - 1).astype(np.int64)


def threshold(histogram: Floats, false_alarms: float) -> float:
    """The least score from which on an image is flagged; :data:`NO_LIMIT` if there are too few patients for one.

    Split conformal: of normal patients like those of the validation, with as many images, at most a share of
    ``false_alarms`` has an image that is flagged, in expectation.

    Args:
        histogram: normal validation patients by the bin of their largest score, [BINS].
        false_alarms: in (0, 1).
    """
    counts = np.maximum(histogram, 0.0)
    allowed = false_alarms * (math.fsum(counts.tolist()) + 1) - 1
    if allowed < 0:
        return NO_LIMIT
    above = 0.0
    for place in range(BINS - 1, -1, -1):
        above += float(counts[place])
        if above > allowed + 1e-9:
            return (place + 1) * (2 / BINS)
    return 0.0


def why_no_threshold(histogram: Floats, false_alarms: float) -> str:
    """Why nothing is flagged, in words; empty if there is a threshold."""
    if threshold(histogram, false_alarms) < NO_LIMIT:
        return ""
    patients = round(float(np.maximum(histogram, 0.0).sum()))
    if patients == 0:
        return (
            "no site sent scores of normal validation patients: those with a privacy budget never do, nor those among "
            "too many of such, or there were none"
        )
    needed = math.ceil(1 / false_alarms - 1 - 1e-9)
    return (
        f"{patients} normal patients were validated on, and {needed} are needed to promise at most "
        f"{100 * false_alarms:g} % of false alarms"
    )


def distances(bank: Floats, features: NDArray[np.float32]) -> tuple[NDArray[np.int64], Floats]:
    """Nearest centroid of each feature, and how far it is.

    For a site's own use: by BLAS, whose bits may differ from those of another machine. One image after the other: among
    more of them the last bit of an image may be another one, and decide between two centroids as near.

    Args:
        bank: centroids [M, d].
        features: of images, [..., patches, d].
    """
    squares = np.square(bank).sum(axis=1)
    nearest, far = np.empty(features.shape[:-1], dtype=np.int64), np.empty(features.shape[:-1])
    for image in np.ndindex(features.shape[:-2]):
        rows = features[image].astype(np.float64)
        squared = np.square(rows).sum(axis=1)[:, None] - 2 * rows @ bank.T + squares
        nearest[image] = squared.argmin(axis=1)
        far[image] = np.sqrt(np.maximum(squared.min(axis=1), 0))
    return nearest, far


def scores(adapter: Mapping[str, Floats], x: NDArray[np.float32], top: float) -> Floats:
    """How far images are from normal, [n]: the mean distance of the share ``top`` of their farthest patches.

    Args:
        adapter: memories and grids.
        x: patch features in rows, [n, width].
        top: in (0, 1]; one patch at least.
    """
    far = distances(adapter[centroids(SCORE)], patches(adapter, x)[SCORE])[1]
    most = max(1, math.ceil(top * far.shape[1] - 1e-9))
    return np.asarray(np.sort(far, axis=1)[:, -most:].mean(axis=1))


def probabilities(adapter: Mapping[str, Floats], x: NDArray[np.float32], top: float, false_alarms: float) -> Floats:
    """[n, 2], for figures alone: of the second class 0.5 at the threshold and rising with the score."""
    far = scores(adapter, x, top) - threshold(adapter[HISTOGRAM], false_alarms)
    anomalous = 1 / (1 + np.exp(-_STEEP * far))
    return np.stack([1 - anomalous, anomalous], axis=1)


_STEEP = 16.0
"""Over scores between 0 and 2 no two become equal in float64."""


def maps(adapter: Mapping[str, Floats], x: NDArray[np.float32]) -> Floats:
    """Distances by place of the map's memory, [n, height, width] of its grid."""
    name = memories(adapter)[-1]
    height, across, _ = (int(side) for side in adapter[GRIDS][-1])
    return distances(adapter[centroids(name)], patches(adapter, x)[name])[1].reshape(-1, height, across)

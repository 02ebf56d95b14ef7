"""Sums around a memory's centroids of one site's patients; with a budget, what one patient moves them by.

The formulas are in docs/privacy.md, "Memories of normal images". A patient weighs 1 whatever the number of its images
and patches: to each memory it adds means of 1[m = nearest] z and 1[m = nearest], z of length at most 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from secure_fed.core.errors import GuardError
from secure_fed.privacy.accounting import Noise, gaussian_noise
from secure_fed.privacy.class_statistics import shares
from secure_fed.protocol import memory

Values = dict[str, NDArray[np.float64]]

WEIGHT_SCALE = 0.4
"""What weights are multiplied by before the same noise is added to all: the less, the more noise relative to them."""


def sensitivity(adapter: Mapping[str, NDArray[np.float64]]) -> float:
    """Most that a patient moves the scaled sums (L2): of each memory by means of vectors of length at most 1."""
    return math.sqrt(len(memory.memories(adapter)) * (1 + WEIGHT_SCALE**2))


def exact_sums(adapter: Mapping[str, NDArray[np.float64]], x: NDArray[np.float32], owners: Sequence[str]) -> Values:
    """Sums of features, weights and numbers of patients by nearest centroid, of each memory.

    Args:
        adapter: memories and grids.
        x: patch features of normal images in rows, [n, width]; one longer than 1 is shortened.
        owners: whose each is, length n.
    """
    found: Values = {}
    each, (people, places) = shares(owners), np.unique(np.array(owners, dtype=object).astype(str), return_inverse=True)
    for name, features in memory.patches(adapter, x).items():
        bank = adapter[memory.centroids(name)]
        nearest, _ = memory.distances(bank, features)
        weight = np.repeat(each / features.shape[1], features.shape[1])
        rows = features.reshape(-1, bank.shape[1]).astype(np.float64)
        rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1.0)
        total = np.zeros(bank.shape)
        np.add.at(total, nearest.ravel(), rows * weight[:, None])
        seen = np.zeros((len(bank), len(people)), dtype=bool)
        seen[nearest, places[:, None]] = True
        found[f"{name}_sums"] = total.ravel()
        found[f"{name}_weights"] = np.bincount(nearest.ravel(), weight, len(bank)).astype(np.float64)
        found[f"{name}_patients"] = seen.sum(axis=1).astype(np.float64)
    return found


def noisy_values(sums: Values, noise_std: float, noise: Noise = gaussian_noise) -> Values:
    """The sums by block as they leave under a budget: numbers of patients do not, noised weights stand for them.

    Args:
        sums: exact; of no patient, if there is none.
        noise_std: of the noise on scaled sums.
        noise: where noise comes from; anything but the default is for rehearsals and tests.
    """
    values: Values = {}
    for name, exact in sums.items():
        if name.endswith("_patients"):
            values[name] = np.zeros(exact.size)
        else:
            values[name] = exact + noise(exact.size, noise_std / scale_of(name))
    return values


def scale_of(block: str) -> float:
    """What a block is multiplied by before noise is added."""
    return WEIGHT_SCALE if block.endswith("_weights") else 1.0


def check_sums(adapter: Mapping[str, NDArray[np.float64]]) -> None:
    """Try, on made-up patients and before any budget is touched, that none moves the sums by more than is paid.

    Raises:
        GuardError: one does.
    """
    rng, most = np.random.default_rng(20), sensitivity(adapter)
    x = rng.standard_normal((12, memory.width(adapter))).astype(np.float32)
    x[:3] = x[0]  # one who is as the same everywhere: the worst case
    owners = [f"patient {row // 3}" for row in range(12)]
    whole = exact_sums(adapter, x, owners)
    for left_out in sorted(set(owners)):
        rows = [row for row, owner in enumerate(owners) if owner != left_out]
        fewer = exact_sums(adapter, x[rows], [owners[row] for row in rows])
        moved = math.sqrt(
            math.fsum(
                scale_of(name) ** 2 * float(np.square(whole[name] - fewer[name]).sum())
                for name in whole
                if not name.endswith("_patients")
            )
        )
        if moved > most * (1 + 1e-9):
            raise GuardError(
                f"one of some made-up patients moves the sums around the centroids by {moved:.4f}; expected at most "
                f"{most:.4f}: nothing was spent; report this with the versions of numpy and secfacmic"
            )

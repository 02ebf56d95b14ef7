"""Temperature scaling: probabilities that mean what they say, fitted on validation images."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar

LEAST, MOST = 0.02, 50.0
"""Bounds of a fitted temperature."""

_TINY = 1e-300

Floats = NDArray[np.float64]


def fit_temperature(probabilities: Floats, labels: NDArray[np.int64]) -> float:
    """The temperature T in [0.02, 50] by which softmax(logits / T) fits the labels best (Guo et al., 1706.04599, 4.2).

    It minimises the summed negative log-likelihood plus (log T)^2 / 2: a prior that weighs about as much as one image,
    so that a classifier without a fault on few images does not end at T = 0. Without images T = 1.

    Args:
        probabilities: softmax(logits), [n, K].
        labels: [n], each in 0..K-1.
    """
    if not len(labels):
        return 1.0
    logs = np.log(np.maximum(probabilities, _TINY))
    rows = np.arange(len(labels))

    def cost(log_temperature: float) -> float:
        scaled = logs / np.exp(log_temperature)
        top = scaled.max(axis=1)
        likelihood = scaled[rows, labels] - top - np.log(np.exp(scaled - top[:, None]).sum(axis=1))
        return float(-likelihood.sum() + log_temperature**2 / 2)

    # The likelihood is concave in 1/T, and the whole need not be: take the best of a coarse grid, then its bracket.
    grid = np.linspace(np.log(LEAST), np.log(MOST), 41)
    best = int(np.argmin([cost(value) for value in grid]))
    low, high = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    found = minimize_scalar(cost, bounds=(low, high), method="bounded", options={"xatol": 1e-6})
    return float(np.exp(found.x))


def tempered(probabilities: Floats, temperature: float) -> Floats:
    """softmax(logits / T) of softmax(logits), [n, K]; the prediction stays the same."""
    scaled = np.log(np.maximum(probabilities, _TINY)) / temperature
    weights = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))

"""Gaussian noise and what it costs: mu accounting, epsilon(delta) and back, planning.

A release of a sum of L2 sensitivity D with noise N(0, s^2) is mu-Gaussian-DP with mu = D / s (Dong, Roth and Su,
arXiv 1905.02383). The squares of mu add exactly over releases, also when each is chosen after seeing the ones
before (Smith and Thakurta, arXiv 2210.17520), so that a whole ledger is one sum.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import log_ndtr, ndtri

ROUNDING = 1e-10
"""Relative and absolute slack by which every figure is rounded to the safe side; brentq's own error is smaller."""

Noise = Callable[[int, float], NDArray[np.float64]]
"""Noise of a size and a standard deviation, float64 [size]."""


@dataclass(frozen=True)
class Mechanism:
    """Releases of one kind: ``steps`` noisy sums, each over all who take part.

    Attributes:
        sensitivity: most that one patient, added or removed, moves the sum (L2 norm), above 0.
        noise_std: standard deviation of the noise in every coordinate, above 0.
        steps: how many such sums, from 1.
    """

    sensitivity: float
    noise_std: float
    steps: int

    @property
    def mu_squared(self) -> float:
        """steps * (sensitivity / noise_std)^2: the whole cost."""
        return self.steps * (self.sensitivity / self.noise_std) ** 2


def delta_of(epsilon: float, mu: float) -> float:
    """The least delta at which mu-Gaussian-DP gives (epsilon, delta)-DP.

    delta = Phi(-epsilon/mu + mu/2) - exp(epsilon) Phi(-epsilon/mu - mu/2) (Balle and Wang, arXiv 1805.06530,
    theorem 8), by logarithms, so that small deltas keep their digits.

    Args:
        epsilon: 0 or more.
        mu: 0 or more.
    """
    if mu == 0:
        return 0.0
    first = log_ndtr(-epsilon / mu + mu / 2)
    second = epsilon + log_ndtr(-epsilon / mu - mu / 2)
    return float(math.exp(first) * -math.expm1(min(second - first, 0.0)))


def epsilon_of(mu_squared: float, delta: float) -> float:
    """Epsilon of releases whose squared mu add up to ``mu_squared``, rounded up by 1e-10.

    Args:
        mu_squared: 0 or more.
        delta: in (0, 1).
    """
    if mu_squared <= 0:
        return 0.0
    mu = math.sqrt(mu_squared)
    if delta_of(0.0, mu) <= delta:
        return 0.0
    highest = mu_squared / 2 + mu * math.sqrt(2 * math.log(1 / delta))  # by Phi(-t) <= exp(-t^2 / 2)
    found = brentq(lambda epsilon: delta_of(epsilon, mu) - delta, 0.0, highest, xtol=1e-13, rtol=1e-14)
    return float(found * (1 + ROUNDING) + ROUNDING)


def mu_squared_of(epsilon: float, delta: float) -> float:
    """The squared mu that a budget buys, rounded down: the inverse of :func:`epsilon_of`.

    Args:
        epsilon: above 0.
        delta: in (0, 1).
    """
    # At delta(0, mu) = 2 Phi(mu/2) - 1 = delta epsilon is still 0; every budget buys that much.
    highest = 1.0
    while delta_of(epsilon, highest) < delta:
        highest *= 2
    found = brentq(lambda mu: delta_of(epsilon, mu) - delta, 1e-12, highest, xtol=1e-14, rtol=1e-14)
    return float(found * found * (1 - 2 * ROUNDING))


def epsilon_spent(mechanisms: Sequence[Mechanism], delta: float) -> float:
    """Epsilon of all these releases together, never too low: exact, as every patient is in every sum.

    Args:
        mechanisms: in any order.
        delta: in (0, 1).
    """
    return epsilon_of(math.fsum(mechanism.mu_squared for mechanism in mechanisms), delta)


def plan_noise(epsilon: float, delta: float, steps: int) -> float:
    """The least noise multiplier (noise_std / sensitivity) at which ``steps`` sums keep within a budget, rounded up.

    Args:
        epsilon: the budget, above 0.
        delta: in (0, 1).
        steps: from 1.
    """
    return math.sqrt(steps / mu_squared_of(epsilon, delta)) * (1 + ROUNDING)


def uniforms(size: int) -> NDArray[np.float64]:
    """Independent draws from (0, 1), float64 [size] of 52 bits each, from the operating system's generator.

    Never 0 and never 1: with 53 bits the largest draw plus a half would round to 1, of which the normal quantile is
    infinite.
    """
    bits = np.frombuffer(os.urandom(8 * size), dtype="<u8") >> np.uint64(12)
    return (bits.astype(np.float64) + 0.5) * 2.0**-52


def gaussian_noise(size: int, std: float) -> NDArray[np.float64]:
    """Independent N(0, std^2) draws, float64 [size], from the operating system's generator; no seed exists.

    By the inverse of the distribution function. 52 bits reach 8.2 standard deviations, which costs delta below
    1e-15 a draw; 32-bit noise stops at 5.8 (docs/privacy.md, Noise).
    """
    draws: NDArray[np.float64] = ndtri(uniforms(size)) * std
    return draws

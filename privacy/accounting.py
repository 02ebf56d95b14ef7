"""Gaussian noise and what it costs: mu accounting, epsilon(delta) and back, planning.

A release of a sum of L2 sensitivity D with noise N(0, s^2) is mu-Gaussian-DP with mu = D / s (Dong, Roth and Su,
arXiv 1905.02383). The squares of mu add exactly over releases, also when each is chosen after seeing the ones
before (Smith and Thakurta, arXiv 2210.17520), so that a whole ledger of plain Gaussian releases is one sum. With
Poisson sampling in the mix everything is converted to Renyi DP, which is an upper bound.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import log_ndtr, ndtri

ROUNDING = 1e-10
"""Relative and absolute slack by which every figure is rounded to the safe side; brentq's own error is smaller."""

RENYI_ORDERS = tuple(1 + x / 10 for x in range(1, 100)) + tuple(range(12, 64)) + (96, 128, 192, 256, 512, 1024)
"""Orders over which Renyi DP is minimised; fixed, so that the adaptive filter over them holds."""

Noise = Callable[[int, float], NDArray[np.float64]]
"""Noise of a size and a standard deviation, float64 [size]."""


@dataclass(frozen=True)
class Mechanism:
    """Releases of one kind: ``steps`` noisy sums.

    Attributes:
        sensitivity: most that one patient, added or removed, moves the sum (L2 norm), above 0.
        noise_std: standard deviation of the noise in every coordinate, above 0.
        steps: how many such sums, from 1.
        sampling_rate: probability with which each patient is in one sum; 1 for all.
    """

    sensitivity: float
    noise_std: float
    steps: int
    sampling_rate: float = 1.0

    @property
    def mu_squared(self) -> float:
        """steps * (sensitivity / noise_std)^2: the whole cost at sampling rate 1, else an upper bound of it."""
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
    """Epsilon of all these releases together, never too low.

    Exact when every patient is in every sum. With a sampled mechanism among them, all are converted to Renyi DP by
    Opacus' analysis and added order by order.

    Args:
        mechanisms: in any order.
        delta: in (0, 1).
    """
    if all(mechanism.sampling_rate >= 1 for mechanism in mechanisms):
        return epsilon_of(math.fsum(mechanism.mu_squared for mechanism in mechanisms), delta)
    from opacus.accountants.analysis import rdp  # with torch: seconds, which a plain ledger need not wait for

    total = sum(one.steps * _renyi(min(one.sampling_rate, 1.0), one.noise_std / one.sensitivity) for one in mechanisms)
    epsilon, _ = rdp.get_privacy_spent(orders=list(RENYI_ORDERS), rdp=total, delta=delta)
    return float(epsilon * (1 + ROUNDING) + ROUNDING)


@lru_cache(maxsize=4096)
def _renyi(sampling_rate: float, noise_multiplier: float) -> NDArray[np.float64]:
    """Renyi DP of one sampled sum at each of the orders; steps only multiply it."""
    from opacus.accountants.analysis import rdp

    return np.asarray(
        rdp.compute_rdp(q=sampling_rate, noise_multiplier=noise_multiplier, steps=1, orders=list(RENYI_ORDERS))
    )


def plan_noise(
    spent: Sequence[Mechanism], epsilon: float, delta: float, steps: int, sampling_rate: float = 1.0
) -> float | None:
    """The least noise multiplier (noise_std / sensitivity) at which ``steps`` more sums keep within a budget.

    Args:
        spent: what was released before.
        epsilon: the budget, above 0.
        delta: in (0, 1).
        steps: from 1.
        sampling_rate: of the new sums, in (0, 1].

    Returns:
        The multiplier, rounded up; None if nothing is left.
    """
    if sampling_rate >= 1 and all(one.sampling_rate >= 1 for one in spent):
        left = mu_squared_of(epsilon, delta) - math.fsum(one.mu_squared for one in spent)
        return math.sqrt(steps / left) * (1 + ROUNDING) if left > 0 else None

    def excess(logarithm: float) -> float:
        new = Mechanism(1.0, math.exp(logarithm), steps, sampling_rate)
        return epsilon_spent([*spent, new], delta) - epsilon

    low, high = math.log(0.3), math.log(1e5)
    if excess(high) > 0:
        return None
    if excess(low) <= 0:
        return math.exp(low)
    return float(math.exp(brentq(excess, low, high, xtol=1e-6) + 2e-6))


def uniforms(size: int) -> NDArray[np.float64]:
    """Independent draws from (0, 1), float64 [size] of 53 bits each, from the operating system's generator."""
    bits = np.frombuffer(os.urandom(8 * size), dtype="<u8") >> np.uint64(11)
    return (bits.astype(np.float64) + 0.5) * 2.0**-53


def gaussian_noise(size: int, std: float) -> NDArray[np.float64]:
    """Independent N(0, std^2) draws, float64 [size], from the operating system's generator; no seed exists.

    By the inverse of the distribution function. 53 bits reach 8.2 standard deviations, which costs delta below
    1e-15 a draw; 32-bit noise stops at 5.8 (docs/privacy.md, Noise).
    """
    draws: NDArray[np.float64] = ndtri(uniforms(size)) * std
    return draws

"""Validation counts of a round under differential privacy: how many patients, and how many of them are right.

A validation patient contributes (1, share of its images that are classified right), whose norm is at most the root of
2: that is what one patient moves the two sums by. Patients, not images, are counted, so that nobody counts more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from secure_fed.privacy.accounting import Mechanism, Noise, gaussian_noise

SENSITIVITY = math.sqrt(2)


def mechanism(noise_multiplier: float) -> Mechanism:
    """What one release costs."""
    return Mechanism(SENSITIVITY, noise_multiplier * SENSITIVITY, 1)


def exact_counts(right: NDArray[np.bool_], patients: Sequence[str]) -> NDArray[np.float64]:
    """The two sums before noise, float64 [2]: patients, and the sum of their shares of right images.

    Args:
        right: [m], whether each image is classified right.
        patients: whose each image is; length m.
    """
    images: dict[str, list[bool]] = {}
    for patient, one in zip(patients, right, strict=True):
        images.setdefault(patient, []).append(bool(one))
    return np.array([len(images), math.fsum(float(np.mean(one)) for one in images.values())], dtype=np.float64)


def noisy_counts(
    right: NDArray[np.bool_], patients: Sequence[str], noise_multiplier: float, noise: Noise = gaussian_noise
) -> tuple[int, int]:
    """The noised sums, as integers with 0 <= right <= patients; rounding and limits are post-processing.

    Args:
        right, patients: as for :func:`exact_counts`; may be empty, which gives noise alone.
        noise_multiplier: noise over sensitivity.
        noise: where noise comes from; anything but the default is for rehearsals and tests.
    """
    noisy = exact_counts(right, patients) + noise(2, mechanism(noise_multiplier).noise_std)
    count = max(0, round(float(noisy[0])))
    return count, min(max(0, round(float(noisy[1]))), count)

"""Class statistics of one site's patients, as one sum needs them; with a budget, what one patient moves them by.

The formulas are in docs/privacy.md, "One sum". A patient counts 1 whatever the number of its images: it adds the means
over its images of 1[y = c], 1[y = c] x' and x' x'^T, x' of length at most 1 in the study's basis.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import NDArray

from secure_fed.core.errors import BudgetError, GuardError
from secure_fed.privacy.accounting import Mechanism, Noise, gaussian_noise
from secure_fed.protocol.one_sum import FIRST, MOST_NOISE, NOISE, PATIENTS, SECOND, Sums

SCALES = {SECOND: 0.4, FIRST: 1.0, PATIENTS: 0.4}
"""What the blocks are multiplied by before the same noise is added to all: the less, the more noise relative to it."""

SENSITIVITY = math.sqrt(math.fsum(scale * scale for scale in SCALES.values()))
"""Most that a patient moves the scaled statistics (L2): what it adds to a block is a mean of vectors of length <= 1."""


def shares(owners: Sequence[str]) -> NDArray[np.float64]:
    """What each image counts, float64 [n]: one over the number of its patient's images."""
    _, places, counts = np.unique(np.array(owners, dtype=object).astype(str), return_inverse=True, return_counts=True)
    return np.asarray(1.0 / counts[places])


def exact_sums(x: NDArray[np.float64], labels: NDArray[np.int64], owners: Sequence[str], classes: int) -> Sums:
    """The statistics of a site.

    Args:
        x: features in the study's basis, float64 [n, k], of length at most 1.
        labels: int64 [n].
        owners: whose each image is, length n.
        classes: K.
    """
    each = shares(owners)
    hot = np.zeros((len(labels), classes))
    hot[np.arange(len(labels)), labels] = each
    return Sums(hot.sum(axis=0), hot.T @ x, (x * each[:, None]).T @ x)


def mechanism(noise_multiplier: float) -> Mechanism:
    """What the one release costs."""
    return Mechanism(SENSITIVITY, noise_multiplier * SENSITIVITY, 1)


def capped(owners: Sequence[str], paying: Collection[str], images_per_patient: int) -> list[int]:
    """Rows of the patients who pay, of each the first so many."""
    seen: Counter[str] = Counter()
    rows = []
    for row, owner in enumerate(owners):
        seen[owner] += 1
        if owner in paying and seen[owner] <= images_per_patient:
            rows.append(row)
    return rows


def finite_rows(x: NDArray[np.float64], owners: Sequence[str]) -> list[int]:
    """Rows of patients all of whose features are finite; the others contribute nothing."""
    broken = {owner for owner, row in zip(owners, x, strict=True) if not np.isfinite(row).all()}
    return [row for row, owner in enumerate(owners) if owner not in broken]


def refuse_noise(release: Mechanism) -> None:
    """Refuse a release whose noise is larger than its variance, which travels with it, can say.

    Raises:
        BudgetError: it is.
    """
    deviation, most = release.noise_std / SCALES[PATIENTS], math.sqrt(MOST_NOISE)
    if deviation > most:
        raise BudgetError(
            f"a budget with noise of a deviation {deviation:.0f} in numbers of patients; expected at most {most:.0f}, "
            "as others' sums would be lost in it: nothing was spent, and this site takes part as an observer; to be in "
            "the sum, give this site a larger epsilon a run (privacy.epsilon, run_epsilon or fewer runs)"
        )


def noisy_values(sums: Sums, noise_multiplier: float, noise: Noise = gaussian_noise) -> dict[str, NDArray[np.float64]]:
    """The statistics by block as they leave under a budget, with the variance of the noise in B's entries.

    Args:
        sums: exact; of no patient, if there is none.
        noise_multiplier: noise over sensitivity.
        noise: where noise comes from; anything but the default is for rehearsals and tests.
    """
    std = mechanism(noise_multiplier).noise_std
    values = sums.values()
    for name, scale in SCALES.items():
        values[name] = values[name] + noise(values[name].size, std / scale)
    values[NOISE] = np.array([(std / SCALES[SECOND]) ** 2])
    return values


def check_sums(classes: int, dimensions: int) -> None:
    """Try, on made-up patients and before any budget is touched, that none moves the statistics by more than is paid.

    Raises:
        GuardError: one does.
    """
    rng = np.random.default_rng(20)
    x = rng.standard_normal((24, dimensions))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    labels, owners = rng.integers(0, classes, 24), [f"patient {row // 3}" for row in range(24)]
    whole = exact_sums(x, labels, owners, classes).values()
    for left_out in sorted(set(owners)):
        rows = [row for row, owner in enumerate(owners) if owner != left_out]
        fewer = exact_sums(x[rows], labels[rows], [owners[row] for row in rows], classes).values()
        moved = math.sqrt(
            math.fsum(scale**2 * float(np.square(whole[name] - fewer[name]).sum()) for name, scale in SCALES.items())
        )
        if moved > SENSITIVITY * (1 + 1e-9):
            raise GuardError(
                f"one of some made-up patients moves the class statistics by {moved:.4f}; expected at most "
                f"{SENSITIVITY:.4f}: nothing was spent; report this with the versions of numpy and secfacmic"
            )

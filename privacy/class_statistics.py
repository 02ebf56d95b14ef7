"""Class statistics of one site's patients, as one sum needs them; with a budget, what one patient moves them by.

The formulas are in docs/privacy.md, "One sum". A patient counts 1 whatever the number of its images: it adds the means
over its images of 1[y = c], 1[y = c] x' and x' x'^T, x' of length at most 1 in the study's basis.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from secure_fed.protocol.one_sum import Sums


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

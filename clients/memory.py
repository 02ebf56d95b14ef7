"""What a site sends in a study of anomalies, and the memory that its images alone would give."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from secure_fed.clients.features import SiteFeatures
from secure_fed.core.errors import DataError
from secure_fed.privacy import class_statistics
from secure_fed.privacy.memory_sums import exact_sums
from secure_fed.protocol import memory, one_sum
from secure_fed.protocol.codec import Parameters
from secure_fed.protocol.study import AgreedStudy
from secure_fed.protocol.study_tables import NORMAL

log = logging.getLogger(__name__)

Values = dict[str, NDArray[np.float64]]


def message(agreed: AgreedStudy, round_number: int, adapter: Parameters, features: SiteFeatures) -> Values:
    """A round's values by block: sums around the centroids, in the last round a histogram of scores.

    Args:
        agreed: the study.
        round_number: from 1.
        adapter: after the round before.
        features: the site's.

    Raises:
        DataError: no normal training image, or more patients than the study declares.
    """
    study = agreed.study
    last = round_number == study.rounds
    x, owners = normal(features, "val" if last else "train")
    most = study.method.most_patients
    if len(set(owners)) > most:
        raise DataError(
            f"{len(set(owners))} patients with normal images, but the study declares at most {most} at a site, and its "
            "bounds are made of that; expected no more: raise method.most_patients in a new study, or give fewer"
        )
    if last:
        return {memory.HISTOGRAM: histogram(adapter, x, owners, study.method.top)}
    if not owners:
        raise DataError(
            f"no normal training image; expected at least one of {study.classes[0].name!r}: add some, or join the "
            "study as an observer"
        )
    return exact_sums(adapter, x, owners)


def tell(agreed: AgreedStudy, adapter: Parameters) -> None:
    """Say so if the sum of all sites has moved nothing: nor will those after it, which are of the same images.

    Args:
        agreed: the study.
        adapter: after the round of the first sum.
    """
    method = agreed.study.method
    for name in memory.memories(adapter):
        centroids = memory.centroids(name)
        if np.array_equal(adapter[centroids], agreed.initial.adapter[centroids]):
            log.warning(
                "none of %d centroids has %d patients (method.min_patients) near it in the sum of all sites, so that "
                "all stay where they started and nothing is learnt; expected at least one: a new study with lower "
                "min_patients or fewer centroids, or more normal images",
                len(adapter[centroids]),
                method.min_patients,
            )


def histogram(adapter: Parameters, x: NDArray[np.float32], owners: list[str], top: float) -> NDArray[np.float64]:
    """Patients by the bin of the largest of their images' scores, [BINS]."""
    largest: dict[str, float] = {}
    for owner, score in zip(owners, memory.scores(adapter, x, top).tolist(), strict=True):
        largest[owner] = max(score, largest.get(owner, 0.0))
    bins = memory.score_bin(np.array(list(largest.values()), dtype=np.float64))
    return np.bincount(bins, minlength=memory.BINS).astype(np.float64)


def alone(agreed: AgreedStudy, features: SiteFeatures) -> Parameters:
    """The memory from one site's images alone, by as many iterations of the same rule.

    Raises:
        DataError: no normal training image.
    """
    adapter, method = dict(agreed.initial.adapter), agreed.study.method
    for number in range(1, agreed.study.rounds + 1):
        last = number == agreed.study.rounds
        x, owners = normal(features, "val" if last else "train")
        if last:
            found = {memory.HISTOGRAM: histogram(adapter, x, owners, method.top)}
        elif owners:
            found = exact_sums(adapter, x, owners)
        else:
            raise DataError("no normal training image; expected at least one")
        adapter = memory.moved(adapter, found, method.min_patients)
    return adapter


def nearest_neighbour(agreed: AgreedStudy, features: SiteFeatures) -> Parameters:
    """A memory of every normal training patch: what keeping all images in one place would give."""
    x, owners = normal(features, "train")
    if not owners:
        raise DataError("no normal training image; expected at least one")
    adapter = dict(agreed.initial.adapter)
    for name, found in memory.patches(adapter, x).items():
        adapter[memory.centroids(name)] = found.reshape(-1, found.shape[2]).astype(np.float64)
    x, owners = normal(features, "val")
    return adapter | {memory.HISTOGRAM: histogram(adapter, x, owners, agreed.study.method.top)}


def normal(features: SiteFeatures, split: str) -> tuple[NDArray[np.float32], list[str]]:
    """Patch features of a split's normal images, and whose they are."""
    labelled = features.val if split == "val" else features.train
    owners = features.patients["val" if split == "val" else "train"] if len(labelled.y) else ()
    kept = np.flatnonzero(labelled.y == NORMAL)
    return labelled.x[kept], [owners[row] for row in kept]


def as_probabilities(far: NDArray[np.float64]) -> NDArray[np.float64]:
    """[n, 2] of distances without a threshold, for their order alone."""
    ranks = np.unique(far, return_inverse=True)[1]
    anomalous = ranks / max(float(ranks.max(initial=1)), 1.0)
    return np.stack([1 - anomalous, anomalous], axis=1)


def gaussian(
    agreed: AgreedStudy, several: Sequence[SiteFeatures]
) -> Callable[[NDArray[np.float32]], NDArray[np.float64]]:
    """The Mahalanobis distance by mean and covariance of all sites' normal images, which one sum would give.

    Of an image's mean patch feature; the covariance is shrunk by a hundredth towards a multiple of the identity.
    """
    initial = agreed.initial.adapter

    def whole(x: NDArray[np.float32]) -> NDArray[np.float64]:
        return np.asarray(memory.patches(initial, x)[memory.SCORE].mean(axis=1, dtype=np.float64))

    rows, labels, owners = [], [], []
    for number, features in enumerate(several):
        x, whose = normal(features, "train")
        rows.append(whole(x))
        owners += [f"{number}/{owner}" for owner in whose]
        labels += [0] * len(whose)
    total = class_statistics.exact_sums(np.concatenate(rows), np.array(labels, dtype=np.int64), owners, 1)
    within = one_sum.covariance(total)
    size = len(within)
    shrunk = (1 - _SHRINKAGE) * within + _SHRINKAGE * np.trace(within) / size * np.eye(size)
    centre, inverse = total.first[0] / total.patients[0], np.linalg.inv(shrunk)

    def distance(x: NDArray[np.float32]) -> NDArray[np.float64]:
        away = whole(x) - centre
        return np.asarray(np.sqrt(np.maximum((away @ inverse * away).sum(axis=1), 0)))

    return distance


_SHRINKAGE = 0.01

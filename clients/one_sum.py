"""What a site sends in a study of one sum, and the same closed form from its own images alone."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from secure_fed.clients.features import SiteFeatures
from secure_fed.core.errors import DataError
from secure_fed.model.cases import log_odds
from secure_fed.privacy.class_statistics import exact_sums, shares
from secure_fed.protocol import aggregation, one_sum
from secure_fed.protocol.basis import Basis
from secure_fed.protocol.codec import Parameters
from secure_fed.protocol.one_sum import GRID, HISTOGRAMS, Histogram, Sums
from secure_fed.protocol.study import AgreedStudy

Values = dict[str, NDArray[np.float64]]


def message(agreed: AgreedStudy, round_number: int, state: aggregation.State, features: SiteFeatures) -> Values:
    """A round's values by block: class statistics first, then histograms under the sums that all sites hold.

    Args:
        agreed: the study.
        round_number: 1 or 2.
        state: after the round before.
        features: the site's.

    Raises:
        DataError: no labelled training image, or more patients than the study declares.
    """
    if round_number == 1:
        return sums(agreed, features).values()
    held = {name.removeprefix(aggregation.MOMENT): value for name, value in state.items()}
    return {HISTOGRAMS: histograms(agreed, Sums.of(held), features)}


def alone(agreed: AgreedStudy, features: SiteFeatures) -> Parameters:
    """The adapter from one site's images alone, or from several sites' together, by the study's own rule."""
    own = sums(agreed, features, declared=False)
    held = own.values()
    if agreed.study.rounds > 1:
        held[HISTOGRAMS] = histograms(agreed, own, features, declared=False)
    return aggregation.one_sum_adapter(agreed.study, agreed.initial, held, agreed.initial.adapter)


def sums(agreed: AgreedStudy, features: SiteFeatures, *, declared: bool = True) -> Sums:
    """Class statistics of the training patients.

    Args:
        agreed: the study.
        features: the site's.
        declared: whether the study's declared most patients holds.

    Raises:
        DataError: as :func:`message`.
    """
    if len(features.train.y) == 0:
        raise DataError("no labelled training image; expected at least one: add some, or join the study as an observer")
    x, labels, owners = views(agreed, features)
    if declared:
        _refuse_more(agreed, len(set(owners)), "training")
    return exact_sums(x, labels, owners, len(agreed.study.classes))


def histograms(
    agreed: AgreedStudy, together: Sums, features: SiteFeatures, *, declared: bool = True
) -> NDArray[np.float64]:
    """How the validation patients fare under each shrinkage of the grid, flat.

    Args:
        agreed: the study.
        together: the sums of all sites.
        features: the site's.
        declared: as for :func:`sums`.

    Raises:
        DataError: more patients than the study declares.
    """
    classes, val = len(agreed.study.classes), features.val
    owners = features.patients.get("val", ())
    if declared:
        _refuse_more(agreed, len(set(owners)), "validation")
    known = one_sum.known_classes(together, agreed.study.method.min_patients)
    kept = [row for row, label in enumerate(val.y) if known[label]]
    if not kept or known.sum() < 2:
        return np.zeros(len(GRID) * Histogram.size(classes))
    basis = _basis(agreed)
    each = shares([owners[row] for row in kept])
    found = [
        _histogram(*_scores(together, known, shrinkage, basis.linear(val.x[kept])), val.y[kept], each, classes)
        for shrinkage in GRID
    ]
    return np.concatenate([one.values() for one in found])


def nothing(agreed: AgreedStudy, round_number: int) -> Values:
    """A round's values by block of a site that has nothing to say in it."""
    return {block.name: np.zeros(block.bounds.size) for block in agreed.layout(round_number).blocks}


def _refuse_more(agreed: AgreedStudy, patients: int, split: str) -> None:
    most = agreed.study.method.most_patients
    if patients > most:
        raise DataError(
            f"{patients} {split} patients, but the study declares at most {most} at a site, and its bounds are made of "
            "that; expected no more: raise method.most_patients in a new study, or give fewer"
        )


def _basis(agreed: AgreedStudy) -> Basis:
    basis = agreed.initial.basis
    assert basis is not None, "study new makes one for each method that uses one"
    return basis


def views(agreed: AgreedStudy, features: SiteFeatures) -> tuple[NDArray[np.float64], NDArray[np.int64], list[str]]:
    """Training features in the basis, labels, and whose they are; an image and its mirrored view are one row."""
    train, owners, basis = features.train, list(features.patients["train"]), _basis(agreed)
    x = basis.project(train.x)
    if not agreed.study.backbone.mirrored:
        return x, train.y, owners
    half = len(x) // 2
    return (x[:half] + x[half:]) / 2, train.y[:half], owners[:half]


def _scores(
    sums: Sums, known: NDArray[np.bool_], shrinkage: float, x: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Logits [n, K], -inf for classes that are left out, and squared distances to the nearest class mean [n].

    By LAPACK: what a site counts is its own, and need not be the same bits anywhere else.
    """
    within = one_sum.covariance(sums)
    size = len(within)
    shrunk = (1 - shrinkage) * within + shrinkage * np.trace(within) / size * np.eye(size)
    values, vectors = np.linalg.eigh(shrunk)
    root = vectors / np.sqrt(np.maximum(values, shrinkage * np.trace(within) / size))
    white, means = x @ root, (sums.first / np.maximum(sums.patients, 1)[:, None]) @ root
    distances = np.square(white[:, None, :] - means[None]).sum(axis=2)
    logits = np.where(known, white @ means.T - np.square(means).sum(axis=1) / 2, -np.inf)
    return logits, np.where(known, distances, np.inf).min(axis=1) / size


def _histogram(
    logits: NDArray[np.float64],
    distances: NDArray[np.float64],
    labels: NDArray[np.int64],
    each: NDArray[np.float64],
    classes: int,
) -> Histogram:
    odds = log_odds(logits)
    most = logits.argmax(axis=1)
    confidence = 1 / (1 + np.exp(-odds.max(axis=1)))
    confusion, scores = np.zeros((classes, classes)), np.zeros((classes, 2, one_sum.BINS))
    gaps, far = np.zeros(one_sum.CONFIDENCE_BINS), np.zeros(one_sum.BINS)
    np.add.at(confusion, (labels, most), each)
    for label in range(classes):
        there = np.isfinite(logits[:, label])
        rows = (labels == label).astype(int)
        np.add.at(scores[label], (rows[there], one_sum.score_bin(odds[there, label])), each[there])
    bins = np.minimum((confidence * one_sum.CONFIDENCE_BINS).astype(int), one_sum.CONFIDENCE_BINS - 1)
    np.add.at(gaps, bins, each * ((most == labels) - confidence))
    np.add.at(far, one_sum.distance_bin(np.log2(np.maximum(distances, 1e-300))), each)
    return Histogram(confusion, scores, gaps, far)

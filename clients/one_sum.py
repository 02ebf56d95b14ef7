"""What a site sends in a study of one sum, and the same closed form from its own images alone."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

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

log = logging.getLogger(__name__)

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
    return {HISTOGRAMS: histograms(agreed, _held(state), features)}


def _held(state: aggregation.State) -> Sums:
    return Sums.of({name.removeprefix(aggregation.MOMENT): value for name, value in state.items()})


def tell(agreed: AgreedStudy, state: aggregation.State) -> None:
    """Say what is missing from the sum of all sites.

    Args:
        agreed: the study.
        state: after the round of the sum.
    """
    together = _held(state)
    if not together.patients.any():
        log.warning(
            "no sum of statistics is there: the round that was to carry it was abandoned; expected one: this study "
            "ends at zero-shot and nothing is claimed; start a new run with the members that are left"
        )
        return
    least = agreed.study.method.min_patients
    if together.drowned(least):
        log.warning(
            "the budgets' noise drowns the sum of all sites: classes have about %.0f patients in it; expected at least "
            "%.0f, with fewer a class that is there may seem to be none: this study stays at zero-shot; take part with "
            "a larger epsilon, or ask for more patients or sites",
            max(0.0, float(together.patients.mean())),
            math.ceil(least + 2 * together.doubtful),
        )
        return
    noise = " (two standard deviations of the budgets' noise more than the study asks for)" if together.doubtful else ""
    known = one_sum.known_classes(together, least)
    for name, there, count in zip(agreed.study.class_names, known, together.patients, strict=True):
        if not there:
            log.warning(
                "class %s has %g patients in the sum of all sites; expected at least %d%s: it is left out of the "
                "head and never predicted; ask for sites that have some, or lower method.min_patients in a new study",
                *(name, math.floor(100 * max(0.0, float(count))) / 100, math.ceil(least + together.doubtful), noise),
            )


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
    """How patients fare under each shrinkage of the grid, flat: those of the validation, and those of the training.

    Args:
        agreed: the study.
        together: the sums of all sites.
        features: the site's.
        declared: as for :func:`sums`.

    Raises:
        DataError: more patients than the study declares.
    """
    classes = len(agreed.study.classes)
    if declared:
        _refuse_more(agreed, len(set(features.patients.get("val", ()))), "validation")
    known = one_sum.known_classes(together, agreed.study.method.min_patients)
    if known.sum() < 2:
        return np.zeros(len(GRID) * Histogram.size(classes))
    found = np.zeros((len(GRID), Histogram.size(classes)))
    for part in judged(agreed, together, known, features):
        for place in range(len(GRID)):
            counted = _histogram(part.logits[place], part.distances[place], part.labels, part.each[place], classes)
            found[place] += counted.values()
    return found.ravel()


def judged(
    agreed: AgreedStudy, together: Sums, known: NDArray[np.bool_], features: SiteFeatures
) -> tuple[Judged, Judged]:
    """A site's patients of training and validation under heads that do not know them.

    A patient of the training is judged by the head of the sums without its own part (:func:`_left_out`), as one that
    the head has never seen. With them there are several times as many patients as the validation has, so that the
    shrinkage is chosen, and the limits are drawn, by more than a few.

    Args:
        agreed: the study.
        together: the sums of all sites.
        known: bool [K], the classes with enough patients in them.
        features: the site's.
    """
    basis, head, val = _basis(agreed), _Eigen.of(together, known), features.val
    added, labels, owners = views(agreed, features)
    training = _left_out(head, added, basis.linear(features.train.x[: len(labels)]), labels, owners)
    kept = [row for row, label in enumerate(val.y) if known[label]]
    x, whose = basis.linear(val.x[kept]), features.patients.get("val", ())
    scores = [head.scores(x, place) for place in range(len(GRID))]
    logits, distances = (np.stack([pair[part] for pair in scores]) for part in (0, 1))
    each = np.tile(shares([whose[row] for row in kept]), (len(GRID), 1))
    return training, Judged(logits, distances, val.y[kept], each)


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


@dataclass(frozen=True)
class _Eigen:
    """The heads of all shrinkages, in coordinates in which every one of their covariances is diagonal.

    By LAPACK: what a site counts is its own, and need not be the same bits anywhere else.

    Attributes:
        vectors: float64 [k, k], eigenvectors of the covariance in columns.
        variances: float64 [k], its eigenvalues.
        counts: float64 [K], patients by class.
        means: float64 [K, k], in these coordinates.
        known: bool [K].
    """

    vectors: NDArray[np.float64]
    variances: NDArray[np.float64]
    counts: NDArray[np.float64]
    means: NDArray[np.float64]
    known: NDArray[np.bool_]

    @classmethod
    def of(cls, sums: Sums, known: NDArray[np.bool_]) -> _Eigen:
        variances, vectors = np.linalg.eigh(one_sum.covariance(sums))
        means = (sums.first / np.maximum(sums.patients, 1)[:, None]) @ vectors
        return cls(vectors, np.maximum(variances, 0.0), sums.patients, means, known)

    def scores(self, x: NDArray[np.float64], place: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Logits [n, K], -inf for classes that are left out, and squared distances to the nearest mean over k [n].

        Args:
            x: features in the basis [n, k].
            place: of the shrinkage in the grid.
        """
        shrinkage, size = GRID[place], len(self.variances)
        root = 1 / np.sqrt((1 - shrinkage) * self.variances + shrinkage * self.variances.sum() / size)
        white, means = x @ self.vectors * root, self.means * root
        logits = white @ means.T - np.square(means).sum(axis=1) / 2
        distances = np.square(white).sum(axis=1)[:, None] - 2 * logits
        return np.where(self.known, logits, -np.inf), np.where(self.known, distances, np.inf).min(axis=1) / size


@dataclass(frozen=True)
class Judged:
    """Images under heads that do not know their patients.

    Attributes:
        logits: float64 [G, n, K], by shrinkage of the grid; -inf for classes that are left out.
        distances: float64 [G, n], squared distances to the nearest class mean over k.
        labels: int64 [n].
        each: float64 [G, n], what each counts.
    """

    logits: NDArray[np.float64]
    distances: NDArray[np.float64]
    labels: NDArray[np.int64]
    each: NDArray[np.float64]


def _left_out(
    head: _Eigen,
    x: NDArray[np.float64],
    seen: NDArray[np.float64],
    labels: NDArray[np.int64],
    owners: Sequence[str],
) -> Judged:
    """Every patient of known classes under the heads of the sums without it.

    With w_i a patient's shares, d_i = x_i - mu_c, s_c = sum_i w_i d_i and n_c = sum_i w_i over its images of class c,
    taking it out leaves

        mu_c - s_c / (N_c - n_c),  scatter - sum_i w_i d_i d_i^T - sum_c s_c s_c^T / (N_c - n_c),  N - 1 patients,

    a change of low rank, so that no head is solved anew (Woodbury). Patients without whom a class would be empty are
    not counted; nor is one under a shrinkage that is too small to mend what rounding leaves of the covariance without
    it, which has no inverse then: of fewer patients than dimensions.

    Args:
        head: of the sums with all patients.
        x: what they added to the sums, in the basis, float64 [n, k].
        seen: their features as a head sees them, in the basis, float64 [n, k].
        labels: int64 [n].
        owners: whose each is, length n.
    """
    each, size, classes = shares(owners), len(head.variances), len(head.counts)
    turned, seen = x @ head.vectors, seen @ head.vectors
    total, degrees = head.counts.sum(), max(head.counts.sum() - classes - 1, 1.0)
    scatter = head.variances * max(total - classes, 1.0)
    grid = np.array(GRID)
    rows_of: dict[str, list[int]] = {}
    for row, owner in enumerate(owners):
        rows_of.setdefault(owner, []).append(row)
    kept: list[int] = []
    logits, distances, counts = [], [], []
    for rows in rows_of.values():
        own, weights = labels[rows], each[rows]
        share = np.bincount(own, weights, classes)
        left = head.counts - share
        if not head.known[own].all() or np.any(left[own] < 1):
            continue
        apart = turned[rows] - head.means[own]
        moved = np.zeros((classes, size))
        np.add.at(moved, own, weights[:, None] * apart)
        there = np.unique(own)
        moved[there] /= left[there, None]
        means = head.means - moved
        gone = np.concatenate([apart * np.sqrt(weights)[:, None], moved[there] * np.sqrt(left[there])[:, None]])
        trace = max(scatter.sum() - np.square(gone).sum(), 0.0) / degrees
        variances = np.multiply.outer((1 - grid) / degrees, scatter) + (grid * trace / size)[:, None]
        inverse = 1 / np.maximum(variances, np.finfo(float).tiny)
        inner = np.eye(len(gone)) - ((1 - grid) / degrees)[:, None, None] * np.einsum(
            "gk,ik,jk->gij", inverse, gone, gone, optimize=True
        )
        there_is = np.linalg.eigvalsh(inner).min(axis=1) > 0
        inner[~there_is] = np.eye(len(gone))
        # (M - c U^T U)^-1 = M^-1 + c M^-1 U^T (1 - c U M^-1 U^T)^-1 U M^-1
        points = np.concatenate([seen[rows], means])
        white = inverse[:, None, :] * points
        across = white @ gone.T
        mended = np.linalg.solve(inner, across.transpose(0, 2, 1))
        products = white @ points.T + ((1 - grid) / degrees)[:, None, None] * (across @ mended)
        count = len(rows)
        norms = np.diagonal(products, axis1=1, axis2=2)
        found = products[:, :count, count:] - norms[:, None, count:] / 2
        far = norms[:, :count, None] - 2 * found
        logits.append(np.where(head.known, found, -np.inf))
        distances.append(np.where(head.known, far, np.inf).min(axis=2) / size)
        counts.append(np.multiply.outer(there_is, weights))
        kept += rows
    if not kept:
        nobody = np.zeros((len(GRID), 0))
        return Judged(np.zeros((len(GRID), 0, classes)), nobody, np.zeros(0, dtype=np.int64), nobody)
    found, far, each = (np.concatenate(parts, axis=1) for parts in (logits, distances, counts))
    return Judged(found, far, labels[kept], each)


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

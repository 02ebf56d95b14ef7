"""The head that one sum gives: class statistics of features added over sites, and the classifier that follows.

Linear discriminant analysis with a shared covariance. Sites send, in coordinates x' of the study's basis, patients by
class N_c, sums A_c and the second moment B; in a second round histograms of how patients fare under
each shrinkage of a fixed grid. What every site makes of the sums is here, in elementwise float64 numpy of a fixed order
(sums, products, quotients and square roots, which IEEE 754 rounds correctly): no BLAS, no LAPACK, no exp, so that all
sites get the same bits on any CPU.

    mu_c = A_c / N_c,  Sigma = (B - sum_c N_c mu_c mu_c^T) / (N - K),  Sigma_a = (1 - a) Sigma + a tr(Sigma) / k I,
    logit_c = mu_c^T Sigma_a^-1 x' - mu_c^T Sigma_a^-1 mu_c / 2
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from secure_fed.protocol.basis import Basis
from secure_fed.protocol.codec import Block, Parameters

Floats = NDArray[np.float64]

GRID = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
"""Shrinkages that the histograms choose from."""

BINS = 64
"""Of a histogram of scores or distances."""
DISTANCE_STEP = 0.25
"""Width of a bin of distances, which are log2 of the squared Mahalanobis distance to the nearest class mean over k; the
first begins at -6, both end bins are open."""
CONFIDENCE_BINS = 15
FAMILIAR = 0.95
"""Share of the calibration patients that the threshold of strangers takes as known."""

PATIENTS, FIRST, SECOND, NOISE, HISTOGRAMS = "patients", "first", "second", "noise", "histograms"
"""Names of blocks: N_c [K]; A [K k]; the upper triangle of B by rows, off-diagonals times sqrt 2, [k (k + 1) / 2]; the
variance of a site's noise in B's entries, and as much in N_c [1]; and the second round's."""

_SLACK = 4.0
"""Bounds of sums in expected magnitudes."""
_PART = 64
"""Parts of a patient that a count resolves: a patient's images are in several classes or bins."""
_NOISE_BITS = 25
MOST_NOISE = 2.0**17
"""Most variance of a site's noise that can travel; with more, others would take noise for patients."""
NO_LIMIT = 1e9
"""Beyond any log odds and distance: adapters hold finite numbers only."""
_LEFT_OUT = -1e4
"""Bias of a class that is left out, at most; no feature may make it the most probable one."""
_SURE = 2.0
"""Standard deviations of the noise by which a class must exceed the least patients: one without any then passes once in
a hundred times, while more would leave small classes out that are there, which costs all of their patients."""
_NEARLY_ALL = 0.98
"""Share of the patients that a shrinkage must be judged by; more than the rounding of counts takes."""
_TURNS = 60
"""Most turns for one eigenvalue; two do on average."""
_DISTANCE_START = -6.0


def _edges() -> Floats:
    """Of the bins of scores, [BINS + 1], which are log odds of a class: from 0 on each a tenth wider than the one
    before, 48 of them below, down to -240, as a head of few patients is sure of much, and 16 above, up to 9."""
    widths = [0.25]
    while len(widths) < 48:
        widths.append(1.1 * widths[-1])
    sums = np.cumsum(widths)
    return np.concatenate([-sums[::-1], [0.0], sums[: BINS - 48]])


SCORE_EDGES = _edges()
"""Both end bins are open."""


# --- what travels ---


def sums_blocks(classes: int, basis: Basis, most_patients: int, precision: int) -> tuple[Block, ...]:
    """The first round's values with their public bounds, made of the basis and the declared most patients of a site."""
    rows, columns = np.triu_indices(basis.dimensions)
    second = basis.spread[rows] * basis.spread[columns] * np.where(rows == columns, 1.0, math.sqrt(2))
    return (
        _counts(PATIENTS, classes, most_patients),
        Block(FIRST, np.tile(_SLACK * most_patients * basis.spread, classes), precision),
        Block(SECOND, _SLACK * most_patients * second, precision),
        Block(NOISE, np.array([MOST_NOISE]), _NOISE_BITS),
    )


def histograms_block(classes: int, most_patients: int) -> Block:
    """The second round's values: for each shrinkage what :class:`Histogram` holds, of training and of validation."""
    return _counts(HISTOGRAMS, len(GRID) * Histogram.size(classes), 2 * most_patients)


def _counts(name: str, size: int, most_patients: int) -> Block:
    """Numbers of patients, whole ones exact."""
    precision = 1 + (_PART * most_patients).bit_length()
    return Block(name, np.full(size, ((1 << (precision - 1)) - 1) / _PART), precision)


@dataclass(frozen=True)
class Histogram:
    """How patients fare under one shrinkage, none of them known to the head; each counts 1, in parts by its images.

    Attributes:
        confusion: float64 [K, K], by true class and most probable one.
        scores: float64 [K, 2, BINS]: log odds of class c, of patients of other classes (0) and of c (1).
        gaps: float64 [CONFIDENCE_BINS]: sum of (right - confidence) by confidence.
        distances: float64 [BINS].
    """

    confusion: Floats
    scores: Floats
    gaps: Floats
    distances: Floats

    @staticmethod
    def size(classes: int) -> int:
        """Values of one."""
        return classes * classes + classes * 2 * BINS + CONFIDENCE_BINS + BINS

    def values(self) -> Floats:
        """As one vector [size]."""
        return np.concatenate([part.ravel() for part in (self.confusion, self.scores, self.gaps, self.distances)])

    @classmethod
    def of(cls, values: Floats, classes: int) -> Histogram:
        """Inverse of :meth:`values`."""
        ends = np.cumsum([classes * classes, classes * 2 * BINS, CONFIDENCE_BINS])
        confusion, scores, gaps, distances = np.split(values, ends)
        return cls(confusion.reshape(classes, classes), scores.reshape(classes, 2, BINS), gaps, distances)

    @property
    def patients(self) -> float:
        """How many it counts."""
        return math.fsum(self.confusion.ravel().tolist())


def score_bin(log_odds: Floats) -> NDArray[np.int64]:
    """The bins of log odds."""
    return np.clip(np.searchsorted(SCORE_EDGES, log_odds, side="right") - 1, 0, BINS - 1).astype(np.int64)


def distance_bin(log_distance: Floats) -> NDArray[np.int64]:
    """The bins of log2 of squared distances over k."""
    return np.clip(np.floor((log_distance - _DISTANCE_START) / DISTANCE_STEP), 0, BINS - 1).astype(np.int64)


# --- the rule ---


@dataclass(frozen=True)
class Sums:
    """Class statistics of one or more sites.

    Attributes:
        patients: N_c, float64 [K].
        first: A, float64 [K, k].
        second: B, float64 [k, k], symmetric.
        noise: variance of the noise in B's entries, and in each N_c, summed over sites; 0 without privacy budgets.
    """

    patients: Floats
    first: Floats
    second: Floats
    noise: float = 0.0

    def values(self) -> dict[str, Floats]:
        """By block, flat."""
        rows, columns = np.triu_indices(len(self.second))
        weights = np.where(rows == columns, 1.0, math.sqrt(2))
        return {
            PATIENTS: self.patients,
            FIRST: self.first.ravel(),
            SECOND: self.second[rows, columns] * weights,
            NOISE: np.array([self.noise]),
        }

    @classmethod
    def of(cls, values: Mapping[str, Floats]) -> Sums:
        """Inverse of :meth:`values`."""
        patients = values[PATIENTS]
        first = values[FIRST].reshape(len(patients), -1)
        size = first.shape[1]
        rows, columns = np.triu_indices(size)
        second = np.zeros((size, size))
        second[rows, columns] = values[SECOND] / np.where(rows == columns, 1.0, math.sqrt(2))
        second[columns, rows] = second[rows, columns]
        return cls(patients, first, second, float(values[NOISE][0]))

    @property
    def floor(self) -> float:
        """Least eigenvalue that the noise leaves meaningful in the covariance: its spectral norm, sqrt(2 k) times its
        deviation, over the patients."""
        total = math.fsum(self.patients.tolist())
        return math.sqrt(max(self.noise, 0.0)) * math.sqrt(2.0 * len(self.second)) / max(total, 1.0)

    @property
    def doubtful(self) -> float:
        """Patients of a class below which it may be noise alone; 0 without noise."""
        return _SURE * math.sqrt(max(self.noise, 0.0))

    def drowned(self, min_patients: int) -> bool:
        """Whether noise is so large beside the classes that one of their usual size would often seem to be none.

        That is: some class does not pass, and those that do are on average no farther above what a class must have than
        that is above the least patients. Then one that does not pass may as well be there, hidden by noise.
        """
        least = min_patients + self.doubtful
        there = [count for count in self.patients.tolist() if count >= least]
        few = math.fsum(there) < len(there) * (least + self.doubtful)
        return self.noise > 0 and len(there) < len(self.patients) and (few or not there)


@dataclass(frozen=True)
class Head:
    """A classifier in the coordinates of the basis.

    Attributes:
        known: bool [K], the classes with enough patients.
        means: float64 [K, k]; 0 for the others.
        factor: float64 [k, k], lower triangle L of Sigma_a = L L^T.
        weight: float64 [K, k], Sigma_a^-1 mu_c.
        bias: float64 [K].
    """

    known: NDArray[np.bool_]
    means: Floats
    factor: Floats
    weight: Floats
    bias: Floats


def known_classes(sums: Sums, min_patients: int) -> NDArray[np.bool_]:
    """The classes with at least so many patients in the sum, noise aside, bool [K]: under budgets two standard
    deviations of it more, so that one without any patient hardly ever passes, and none if the sum is drowned in noise:
    a head without the classes that chance takes would be worse than the prompts."""
    return np.asarray((sums.patients >= min_patients + sums.doubtful) & (not sums.drowned(min_patients)))


def covariance(sums: Sums) -> Floats:
    """Sigma, floored where noise lies in it: the pooled covariance within classes [k, k].

    A class whose patients are lost in noise moves nothing: its mean would be noise over next to nothing.
    """
    scatter = sums.second.copy()
    for count, total in zip(sums.patients.tolist(), sums.first, strict=True):
        if count >= sums.doubtful:
            scatter -= np.multiply.outer(total, total) / max(count, 1.0)
    patients = math.fsum(sums.patients.tolist())
    scatter /= max(patients - len(sums.patients), 1.0)
    return floored(scatter, sums.floor) if sums.noise > 0 else scatter


def solve(sums: Sums, shrinkage: float, min_patients: int) -> Head | None:
    """The head of one shrinkage, in (0, 1]; None if fewer than two classes have enough patients, or if the sum is of no
    real features (a covariance without a positive diagonal).

    A covariance that has no real factor, by rounding or because a tiny shrinkage leaves it singular, gets its
    eigenvalues raised to 1e-12 of its largest diagonal element before it is shrunk: far enough above the rounding of a
    factorisation of some hundred dimensions.
    """
    known = known_classes(sums, min_patients)
    if known.sum() < 2:
        return None
    within = covariance(sums)
    factor = cholesky(_shrunk(within, shrinkage))
    if factor is None:
        top = float(within.diagonal().max())
        factor = cholesky(_shrunk(floored(within, 1e-12 * top), shrinkage)) if top > 0 else None
    if factor is None:
        return None
    means = np.where(known[:, None], sums.first / np.maximum(sums.patients, 1.0)[:, None], 0.0)
    white = _forward(factor, means.T)
    weight = _backward(factor, white).T.copy()
    bias = np.array([-0.5 * math.fsum((column * column).tolist()) for column in white.T])
    return Head(known, means, factor, weight, np.where(known, bias, 0.0))


def _shrunk(matrix: Floats, shrinkage: float) -> Floats:
    size = len(matrix)
    shrunk = (1.0 - shrinkage) * matrix
    places = np.arange(size)
    shrunk[places, places] += shrinkage * math.fsum(matrix.diagonal().tolist()) / size
    return shrunk


def cholesky(matrix: Floats) -> Floats | None:
    """The lower factor L [k, k] of a symmetric matrix L L^T, right-looking; None if it is not positive definite."""
    rest, size = matrix.copy(), len(matrix)
    factor = np.zeros((size, size))
    for place in range(size):
        pivot = float(rest[place, place])
        if not pivot > 0:
            return None
        root = math.sqrt(pivot)
        column = rest[place + 1 :, place] / root
        factor[place, place] = root
        factor[place + 1 :, place] = column
        rest[place + 1 :, place + 1 :] -= np.multiply.outer(column, column)
    return factor


def _forward(factor: Floats, right: Floats) -> Floats:
    """L^-1 of columns [k, m]."""
    rest = right.copy()
    for place in range(len(factor)):
        rest[place] /= factor[place, place]
        rest[place + 1 :] -= np.multiply.outer(factor[place + 1 :, place], rest[place])
    return rest


def _backward(factor: Floats, right: Floats) -> Floats:
    """L^-T of columns [k, m]."""
    rest = right.copy()
    for place in range(len(factor) - 1, -1, -1):
        rest[place] /= factor[place, place]
        rest[:place] -= np.multiply.outer(factor[place, :place], rest[place])
    return rest


def floored(matrix: Floats, least: float) -> Floats:
    """A symmetric matrix with its eigenvalues raised to a least one."""
    values, vectors = _eigen_kept(np.ascontiguousarray(matrix).tobytes())
    raised = matrix.copy()
    for value, vector in zip(values.tolist(), vectors.T, strict=True):
        if value < least:
            scaled = math.sqrt(least - value) * vector
            raised += np.multiply.outer(scaled, scaled)
    return raised


@lru_cache(maxsize=4)
def _eigen_kept(matrix: bytes) -> tuple[Floats, Floats]:
    """:func:`eigen`, once in a process that holds several sites, or asks for head and figures."""
    size = math.isqrt(len(matrix) // 8)
    return eigen(np.frombuffer(matrix).reshape(size, size))


def eigen(matrix: Floats) -> tuple[Floats, Floats]:
    """Eigenvalues [k] and vectors [k, k], in columns, of a symmetric matrix.

    Householder's reflections to three diagonals, then QL turns with implicit shifts (Bowdler, Martin, Reinsch and
    Wilkinson 1968, tql2): seconds for 512 dimensions. Values are within some roundings of the largest one.
    """
    unit = math.ldexp(1.0, math.frexp(float(np.abs(matrix).max()))[1])  # squares neither vanish nor overflow
    diagonal, beside, vectors = _tridiagonal(matrix / unit)
    rows = vectors.T.copy()
    size, tiny = len(matrix), float(np.finfo(float).eps)
    shift = largest = 0.0
    for place in range(size):
        largest = max(largest, abs(diagonal[place]) + abs(beside[place]))
        for _ in range(_TURNS):
            end = place
            while end < size - 1 and abs(beside[end]) > tiny * largest:
                end += 1
            if end == place:
                break
            shift += _turn(diagonal, beside, rows, place, end)
        diagonal[place] += shift
        beside[place] = 0.0
    return unit * np.array(diagonal), rows.T.copy()


def _turn(diagonal: list[float], beside: list[float], rows: Floats, place: int, end: int) -> float:
    """One implicit QL turn of the block from place to end, in place; the shift that it took off the diagonal."""
    first, old = diagonal[place], beside[place]
    slope = (diagonal[place + 1] - first) / (2.0 * old)
    root = math.copysign(math.sqrt(slope * slope + 1.0), slope)
    diagonal[place] = old / (slope + root)
    diagonal[place + 1] = old * (slope + root)
    second, shift = diagonal[place + 1], first - diagonal[place]
    for later in range(place + 2, len(diagonal)):
        diagonal[later] -= shift
    value = diagonal[end]
    cosine = before = further = 1.0
    sine = earlier = 0.0
    edge = beside[place + 1]
    for low in range(end - 1, place - 1, -1):
        further, before, earlier = before, cosine, sine
        inner, outer = cosine * beside[low], cosine * value
        length = math.sqrt(value * value + beside[low] * beside[low])
        beside[low + 1] = sine * length
        sine, cosine = (beside[low] / length, value / length) if length > 0 else (0.0, 1.0)
        value = cosine * diagonal[low] - sine * inner
        diagonal[low + 1] = outer + sine * (cosine * inner + sine * diagonal[low])
        upper = rows[low + 1].copy()
        rows[low + 1] = sine * rows[low] + cosine * upper
        rows[low] = cosine * rows[low] - sine * upper
    value = -sine * earlier * further * edge * beside[place] / second
    beside[place] = sine * value
    diagonal[place] = cosine * value
    return shift


def _tridiagonal(matrix: Floats) -> tuple[list[float], list[float], Floats]:
    """Diagonal [k], what is beside it [k] (the last 0), and Q [k, k], of a symmetric matrix Q T Q^T."""
    rest, size = matrix.copy(), len(matrix)
    reflections = []
    for place in range(size - 2):
        column = rest[place + 1 :, place].copy()
        scale = float(np.abs(column[1:]).max())
        if scale == 0.0:
            continue
        scale = max(scale, abs(float(column[0])))
        column /= scale
        norm = math.sqrt(_product(column, column))
        column[0] += math.copysign(norm, float(column[0]))
        strength = 2.0 / _product(column, column)
        inner = rest[place + 1 :, place + 1 :]
        moved = strength * _combined(column, inner)
        moved -= (0.5 * strength * _product(column, moved)) * column
        inner -= np.multiply.outer(column, moved) + np.multiply.outer(moved, column)
        rest[place + 1, place] = -math.copysign(norm * scale, float(column[0]))
        reflections.append((place, column, strength))
    vectors = np.eye(size)
    for place, column, strength in reversed(reflections):
        inner = vectors[place + 1 :, place + 1 :]
        inner -= np.multiply.outer(strength * column, _combined(column, inner))
    return rest.diagonal().tolist(), [*rest.diagonal(-1).tolist(), 0.0], vectors


def _product(left: Floats, right: Floats) -> float:
    return math.fsum((left * right).tolist())


def _combined(weights: Floats, matrix: Floats) -> Floats:
    """The sum of rows times weights, halves added to halves: one order on every processor."""
    rows = weights[:, None] * matrix
    while len(rows) > 1:
        half = len(rows) // 2
        found = rows[:half] + rows[half : 2 * half]
        if len(rows) % 2:
            found[0] += rows[-1]
        rows = found
    return np.asarray(rows[0])


# --- what the study holds ---


def parameters_of(head: Head, basis: Basis, logit_scale: float) -> Parameters:
    """The adapter's parameters: the head for the backbone's own features, over the logit scale.

    ``weight`` [K, d], ``bias`` [K]; for distances ``factor`` [k, k] and ``means`` [K, k]; ``limits``: see
    :class:`Limits`.
    """
    if basis.axes is None:
        weight = head.weight.copy()
    else:
        weight = np.zeros((len(head.weight), basis.axes.shape[1]))
        for column, axis in zip(head.weight.T, basis.axes, strict=True):
            weight += np.multiply.outer(column, axis)
    weight /= basis.radius
    shift = [math.fsum((row * basis.centre).tolist()) for row in weight]
    bias = (head.bias - np.array(shift)) / logit_scale
    # Of few patients and little shrunk, a head gives classes that it knows any logit: the least that a feature of
    # length 1 can get is the bias without the weight's length.
    lengths = np.array([math.sqrt(math.fsum((row * row).tolist())) for row in weight]) / logit_scale
    least = float((bias - lengths)[head.known].min())
    return {
        "bias": np.where(head.known, bias, min(_LEFT_OUT, 2.0 * least)),
        "factor": head.factor,
        "limits": NO_LIMITS.values(),
        "means": head.means,
        "weight": weight / logit_scale,
    }


@dataclass(frozen=True)
class Pooled:
    """What the histograms say of the head on all sites' patients together, and of no single site.

    Attributes:
        patients: of the validation.
        accuracy, balanced_accuracy: in [0, 1].
        auroc: mean over the classes, one against the rest, as far as bins resolve it; None if undefined.
        expected_calibration_error: in [0, 1].
    """

    patients: float
    accuracy: float
    balanced_accuracy: float
    auroc: float | None
    expected_calibration_error: float


def pooled(histogram: Histogram) -> Pooled | None:
    """Figures of a histogram; None if it counts nobody. For display: nothing that sites compare depends on them.

    Numbers below zero, which no patients give but a site can send, count as zero: shares stay within 0 and 1.
    """
    histogram = replace(
        histogram, confusion=np.maximum(histogram.confusion, 0.0), scores=np.maximum(histogram.scores, 0.0)
    )
    patients = histogram.patients
    if patients <= 0:
        return None
    areas = []
    for rest, own in histogram.scores:
        if rest.sum() > 0 and own.sum() > 0:
            below = np.cumsum(rest) - rest / 2  # those in the same bin are as often above as below
            areas.append(float(np.sum(own * below) / (rest.sum() * own.sum())))
    return Pooled(
        patients,
        float(histogram.confusion.trace()) / patients,
        balanced_accuracy(histogram.confusion),
        float(np.mean(areas)) if areas else None,
        min(1.0, float(np.abs(histogram.gaps).sum()) / patients),
    )


@dataclass(frozen=True)
class Limits:
    """What the histograms' patients say of single cases.

    Attributes:
        least: log odds from which on a class is in a case's set; -NO_LIMIT: every class is.
        farthest: log2 of squared distance over k from which on a case is a stranger; NO_LIMIT: none is.
        patients: how many both come from, the calibration's; 0: nothing is claimed.
    """

    least: float
    farthest: float
    patients: float

    def values(self) -> Floats:
        """As the parameter ``limits`` [3]."""
        return np.array([self.least, self.farthest, self.patients])

    @classmethod
    def of(cls, parameters: Parameters) -> Limits:
        """Those of an adapter."""
        least, farthest, patients = parameters["limits"].tolist()
        return cls(least, farthest, patients)


NO_LIMITS = Limits(-NO_LIMIT, NO_LIMIT, 0.0)


def never_predicted(parameters: Parameters, classes: Sequence[str]) -> tuple[str, ...]:
    """Names of classes that an adapter's head leaves out, for too few patients in the sum; none while there is no head
    and the prompts speak for all classes."""
    known = np.any(parameters["means"] != 0, axis=1)
    return tuple(name for name, there in zip(classes, known, strict=True) if not there) if known.any() else ()


def limits_of(histogram: Histogram, coverage: float) -> Limits:
    """Conformal limits: of n patients and a new one, the new one is covered with the study's chance.

    The score of a patient is the log odds of its true class. The limit is the score above which (n + 1) times the
    coverage lie (Lei et al. 2018), those of a bin spread evenly over it; without that many there is none. So it is
    exact up to how the patients of one bin lie in it; of a bin with more of them than may be missed it is the lower
    edge, as all could lie there. Distances likewise, from below, with :data:`FAMILIAR`, and up to the edge of a bin,
    which is exact.
    """
    patients = histogram.patients
    least, farthest = -NO_LIMIT, NO_LIMIT
    own = np.zeros(BINS)
    for scores in histogram.scores:
        own += scores[1]
    above = 0.0
    for place in range(BINS - 1, 0, -1):
        there, needed = float(own[place]), coverage * (patients + 1) - above
        if there >= needed:
            share = max(needed, 0.0) / there if there > 0 else 0.0
            low, high = SCORE_EDGES[place : place + 2].tolist()
            least = low if there > (1.0 - coverage) * patients else high - share * (high - low)
            break
        above += there
    below = 0.0
    for place in range(BINS - 1):
        below += float(histogram.distances[place])
        if below >= FAMILIAR * (patients + 1):
            farthest = _DISTANCE_START + (place + 1) * DISTANCE_STEP
            break
    return Limits(least, farthest, patients)


def chosen(histograms: Floats, classes: int) -> tuple[int, Histogram]:
    """Which shrinkage of the grid has the highest balanced accuracy, the larger of two alike, and its histogram.

    Of those under which nearly as many patients are counted as under any: where some have no head without them, those
    that are left would say too much good of it, and of its limits.
    """
    several = [Histogram.of(values, classes) for values in histograms.reshape(len(GRID), -1)]
    enough = _NEARLY_ALL * max(found.patients for found in several)
    best, place = -1.0, len(several) - 1
    for index, found in enumerate(several):
        score = balanced_accuracy(found.confusion)
        if found.patients >= enough and score >= best:
            best, place = score, index
    return place, several[place]


def balanced_accuracy(confusion: Floats) -> float:
    """Mean share of recognised patients over the classes that have any; -1 without any."""
    shares = []
    for label, row in enumerate(confusion.tolist()):
        total = math.fsum(row)
        if total > 0:
            shares.append(row[label] / total)
    return math.fsum(shares) / len(shares) if shares else -1.0


@lru_cache(maxsize=4)
def _solved(
    patients: bytes, first: bytes, second: bytes, noise: float, classes: int, shrinkage: float, min_patients: int
) -> Head | None:
    """:func:`solve`, once in a process that holds several sites."""
    counts, sums = np.frombuffer(patients), np.frombuffer(first).reshape(classes, -1)
    size = sums.shape[1]
    return solve(Sums(counts, sums, np.frombuffer(second).reshape(size, size), noise), shrinkage, min_patients)


def head_of(sums: Sums, shrinkage: float, min_patients: int) -> Head | None:
    """As :func:`solve`; what was solved last is not solved again."""
    parts = (np.ascontiguousarray(part).tobytes() for part in (sums.patients, sums.first, sums.second))
    return _solved(*parts, sums.noise, len(sums.patients), shrinkage, min_patients)

"""How well probabilities fit labels, and how sure that is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import (
    accuracy_score,
    confusion_matrix,
    f1_score,
    recall_score,
    roc_auc_score,
    roc_curve,
)

from secure_fed.model.scores import SCALARS

Metrics = dict[str, Any]
"""What :func:`metrics` gives: the values of :class:`secure_fed.model.scores.Scores`, by name."""

RESAMPLES = 1000
CALIBRATION_BINS = 15
_SPECIFICITY = 0.95
_CHUNK_VALUES = 2_000_000
"""Weights of resampled images in memory at once."""

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


class Predictions(NamedTuple):
    """What was predicted for images whose labels are known.

    ``probabilities`` [n, K], ``labels`` int64 [n] in 0..K-1, ``patients`` whose each image is, length n.
    """

    probabilities: Floats
    labels: Ints
    patients: Sequence[str]


def pool(several: Sequence[Predictions]) -> Predictions:
    """The predictions of several sites as one set; two sites' patients are never the same."""
    return Predictions(
        np.concatenate([each.probabilities for each in several]),
        np.concatenate([each.labels for each in several]),
        tuple(f"{index}/{patient}" for index, each in enumerate(several) for patient in each.patients),
    )


def balanced_accuracy(probabilities: Floats, labels: Ints) -> float | None:
    """Mean over the classes that are present of the share that is recognised, in [0, 1]; None without images."""
    if not len(labels):
        return None
    present = np.unique(labels)
    return float(recall_score(labels, probabilities.argmax(axis=1), labels=present, average="macro"))


def metrics(
    probabilities: Floats, labels: Ints, patients: Sequence[str] | None = None, positive: int | None = None
) -> Metrics:
    """Metrics with bootstrap intervals by patient. The highest probability is the prediction, the first of equals.

    Classes that are absent from the labels count in none of the class means: balanced accuracy and macro-F1 are means
    over the classes that are present; AUROC and sensitivity are means of one class against the rest, over those with
    both positive and negative images.

    Args:
        probabilities: [n, K].
        labels: [n], each in 0..K-1.
        patients: whose each image is, length n; without them an image counts as a patient.
        positive: the class that AUROC and sensitivity are of, if it is one alone; what is given as probabilities is
            then taken for scores, which have no calibration error.

    Returns:
        ``balanced_accuracy``, ``accuracy``, ``macro_f1``, ``auroc``;
        ``sensitivity_at_95_specificity``: highest true positive rate of a threshold whose false positive rate is at
        most 5 %; the threshold is chosen on these images, so it is a figure to compare by, not a promise;
        ``expected_calibration_error``: of the prediction's probability, over 15 bins of equal width (Guo et al.,
        arXiv 1706.04599);
        ``confusion_matrix``: images by true class (row) and prediction (column), a list of rows;
        ``intervals``: [low, high] of each of the above but the matrix, the 2.5th and 97.5th percentiles over 1,000
        samples of the patients with replacement (seeded); a class that a sample misses drops out of its means;
        ``images``, ``patients``: their numbers.
        None for what is undefined: everything without images, AUROC and sensitivity with one class only.
    """
    classes = probabilities.shape[1]
    known = [str(index) for index in range(len(labels))] if patients is None else list(patients)
    names, owners = np.unique(np.asarray(known, dtype=np.str_), return_inverse=True)
    found: Metrics = dict.fromkeys(SCALARS)
    found |= {"confusion_matrix": np.zeros((classes, classes), dtype=int).tolist(), "intervals": {}}
    found |= {"images": len(labels), "patients": len(names)}
    if not len(labels):
        return found | {"intervals": dict.fromkeys(SCALARS)}
    predicted = probabilities.argmax(axis=1)
    present = np.unique(labels)
    found["balanced_accuracy"] = balanced_accuracy(probabilities, labels)
    found["accuracy"] = float(accuracy_score(labels, predicted))
    found["macro_f1"] = float(f1_score(labels, predicted, labels=present, average="macro", zero_division=0))
    if len(present) > 1:
        asked = present if positive is None else [positive]
        one_against_rest = [(labels == label, probabilities[:, label]) for label in asked]
        found["auroc"] = float(np.mean([roc_auc_score(truth, score) for truth, score in one_against_rest]))
        curves = [roc_curve(truth, score, drop_intermediate=False) for truth, score in one_against_rest]
        reached = [tpr[fpr <= 1 - _SPECIFICITY].max() for fpr, tpr, _ in curves]
        found["sensitivity_at_95_specificity"] = float(np.mean(reached))
    found["expected_calibration_error"] = float(_calibration_error(np.ones((1, len(labels))), probabilities, labels)[0])
    found["confusion_matrix"] = confusion_matrix(labels, predicted, labels=range(classes)).tolist()
    found["intervals"] = _intervals(probabilities, labels, owners, positive)
    if positive is not None:
        found["expected_calibration_error"] = found["intervals"]["expected_calibration_error"] = None
    return found


def mean(several: Sequence[Metrics]) -> Metrics:
    """The mean over models of each metric that has a value, with the images they were all tested on.

    Intervals and confusion matrix are of single models: they are None here.
    """
    values = {name: [each[name] for each in several if each[name] is not None] for name in SCALARS}
    found: Metrics = {name: float(np.mean(entries)) if entries else None for name, entries in values.items()}
    found |= {"confusion_matrix": None, "intervals": None}
    return found | {name: max((each[name] for each in several), default=0) for name in ("images", "patients")}


def _intervals(
    probabilities: Floats, labels: Ints, owners: NDArray[np.intp], positive: int | None
) -> dict[str, list[float] | None]:
    rng = np.random.default_rng(0)
    count = int(owners.max()) + 1
    drawn = rng.multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    size = max(1, _CHUNK_VALUES // len(labels))
    chunks = [
        weighted(drawn[start : start + size, owners].astype(np.float64), probabilities, labels, positive)
        for start in range(0, RESAMPLES, size)
    ]
    intervals: dict[str, list[float] | None] = {}
    for name in SCALARS:
        values = np.concatenate([chunk[name] for chunk in chunks])
        values = values[np.isfinite(values)]
        intervals[name] = [float(value) for value in np.percentile(values, (2.5, 97.5))] if len(values) else None
    return intervals


def weighted(weights: Floats, probabilities: Floats, labels: Ints, positive: int | None = None) -> dict[str, Floats]:
    """The scalar metrics of many samples at once; those of :func:`metrics` when all weights are 1.

    Args:
        weights: how often each image is in each sample, [samples, n].
        probabilities: [n, K].
        labels: int64 [n].
        positive: as for :func:`metrics`.

    Returns:
        Each metric of each sample, [samples]; NaN where it is undefined.
    """
    classes = probabilities.shape[1]
    cells = np.zeros((len(labels), classes * classes))
    cells[np.arange(len(labels)), labels * classes + probabilities.argmax(axis=1)] = 1
    confusion = (weights @ cells).reshape(-1, classes, classes)
    hits = np.diagonal(confusion, axis1=1, axis2=2)
    truths, guesses = confusion.sum(axis=2), confusion.sum(axis=1)
    there = truths > 0
    asked = range(classes) if positive is None else [positive]
    rankings = [_ranking(weights, probabilities[:, label], labels == label) for label in asked]
    return {
        "balanced_accuracy": _mean_where(there, hits / np.maximum(truths, 1)),
        "accuracy": hits.sum(axis=1) / truths.sum(axis=1),
        "macro_f1": _mean_where(there, 2 * hits / np.maximum(truths + guesses, 1)),
        "auroc": _mean_finite([area for area, _ in rankings]),
        "sensitivity_at_95_specificity": _mean_finite([reached for _, reached in rankings]),
        "expected_calibration_error": _calibration_error(weights, probabilities, labels),
    }


def _ranking(weights: Floats, scores: Floats, truth: NDArray[np.bool_]) -> tuple[Floats, Floats]:
    """Area under the ROC curve and sensitivity at 95 % specificity of each sample, [samples]; NaN if undefined."""
    if truth.all() or not truth.any():
        undefined = np.full(len(weights), np.nan)
        return undefined, undefined
    order = np.argsort(-scores, kind="stable")
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(order) - 1)  # equal scores are one threshold
    sorted_weights, positive = weights[:, order], truth[order]
    hits = np.cumsum(sorted_weights * positive, axis=1)[:, ends]
    alarms = np.cumsum(sorted_weights * ~positive, axis=1)[:, ends]
    positives, negatives = hits[:, -1], alarms[:, -1]
    steps = np.diff(alarms, axis=1, prepend=0)
    heights = hits - np.diff(hits, axis=1, prepend=0) / 2
    allowed = alarms <= (1 - _SPECIFICITY) * negatives[:, None] * (1 + 1e-12)
    with np.errstate(invalid="ignore", divide="ignore"):
        area = (steps * heights).sum(axis=1) / (positives * negatives)
        reached = np.where(allowed, hits, 0).max(axis=1) / positives
    return area, np.where(negatives > 0, reached, np.nan)


def _calibration_error(weights: Floats, probabilities: Floats, labels: Ints) -> Floats:
    """Sum over bins of |accuracy - confidence|, weighted by the bin's share, [samples]."""
    confidence = probabilities.max(axis=1)
    gap = (probabilities.argmax(axis=1) == labels) - confidence
    bins = np.zeros((len(labels), CALIBRATION_BINS))
    places = np.minimum((confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    bins[np.arange(len(labels)), places] = gap
    return np.asarray(np.abs(weights @ bins).sum(axis=1) / weights.sum(axis=1))


def _mean_where(mask: NDArray[np.bool_], values: Floats) -> Floats:
    return np.asarray(np.where(mask, values, 0).sum(axis=1) / mask.sum(axis=1))


def _mean_finite(columns: Sequence[Floats]) -> Floats:
    values = np.stack(columns, axis=1)
    mask = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(mask, values, 0).sum(axis=1) / mask.sum(axis=1))

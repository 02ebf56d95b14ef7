import numpy as np
import pytest

from secure_fed.evaluation import metrics


def one_hot(predicted, classes):
    return np.eye(classes)[predicted] * 0.9 + 0.1 / classes


def test_by_hand():
    # Class 0: 3 of 4 right; class 1: 1 of 2; class 2 absent, but predicted once.
    labels = np.array([0, 0, 0, 0, 1, 1])
    found = metrics(one_hot([0, 0, 0, 1, 1, 2], 3), labels)
    assert found["accuracy"] == pytest.approx(4 / 6)
    assert found["balanced_accuracy"] == pytest.approx((3 / 4 + 1 / 2) / 2)
    # F1 of class 0: precision 1, recall 3/4; of class 1: precision 1/2, recall 1/2.
    assert found["macro_f1"] == pytest.approx((6 / 7 + 1 / 2) / 2)


def test_auroc_by_counting_pairs():
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.ones(3), 40).round(1)
    labels = rng.integers(0, 3, 40)
    areas = []
    for c in range(3):
        inside, outside = probabilities[labels == c, c], probabilities[labels != c, c]
        pairs = [(a > b) + 0.5 * (a == b) for a in inside for b in outside]
        areas.append(np.mean(pairs))
    assert metrics(probabilities, labels)["auroc"] == pytest.approx(np.mean(areas))


def test_absent_classes_count_in_no_mean():
    labels = np.array([0, 2, 2, 0])
    right = metrics(one_hot(labels, 6), labels)
    assert right == {"balanced_accuracy": 1.0, "accuracy": 1.0, "macro_f1": 1.0, "auroc": 1.0}


def test_one_class_alone_has_no_auroc():
    found = metrics(one_hot([1, 1, 0], 2), np.array([1, 1, 1]))
    assert found["auroc"] is None
    assert found["balanced_accuracy"] == pytest.approx(2 / 3)


def test_nothing_gives_none():
    found = metrics(np.empty((0, 3)), np.empty(0, dtype=np.int64))
    assert found == {"balanced_accuracy": None, "accuracy": None, "macro_f1": None, "auroc": None}

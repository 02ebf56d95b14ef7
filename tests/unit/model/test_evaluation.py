import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score, roc_curve

from secure_fed.model.evaluation import RESAMPLES, Predictions, mean, metrics, pool, weighted
from secure_fed.model.scores import SCALARS

NAMES = {*SCALARS, "confusion_matrix", "intervals", "images", "patients"}


def one_hot(predicted, classes):
    return np.eye(classes)[predicted] * 0.9 + 0.1 / classes


def random_case(seed, count=40, classes=3, places=1):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    probabilities = rng.dirichlet(np.ones(classes), count) + 0.5 * np.eye(classes)[labels] * rng.random((count, 1))
    probabilities = (probabilities / probabilities.sum(axis=1, keepdims=True)).round(places)
    return probabilities, labels, [f"p{index // 3}" for index in range(count)]


def test_by_hand():
    # Class 0: 3 of 4 right; class 1: 1 of 2; class 2 absent, but predicted once.
    labels = np.array([0, 0, 0, 0, 1, 1])
    found = metrics(one_hot([0, 0, 0, 1, 1, 2], 3), labels)
    assert set(found) == NAMES
    assert found["accuracy"] == pytest.approx(4 / 6)
    assert found["balanced_accuracy"] == pytest.approx((3 / 4 + 1 / 2) / 2)
    # F1 of class 0: precision 1, recall 3/4; of class 1: precision 1/2, recall 1/2.
    assert found["macro_f1"] == pytest.approx((6 / 7 + 1 / 2) / 2)
    assert found["confusion_matrix"] == [[3, 1, 0], [0, 1, 1], [0, 0, 0]]
    # All predictions claim 0.9333; 4 of 6 are right.
    assert found["expected_calibration_error"] == pytest.approx(0.9 + 0.1 / 3 - 4 / 6)
    assert (found["images"], found["patients"]) == (6, 6)


def test_calibration_error_by_bins():
    # Two bins: 0.55 claimed and 1 of 2 right; 0.95 claimed and 1 of 1 right.
    probabilities = np.array([[0.55, 0.45], [0.55, 0.45], [0.05, 0.95]])
    found = metrics(probabilities, np.array([0, 1, 1]))
    assert found["expected_calibration_error"] == pytest.approx(2 / 3 * abs(0.5 - 0.55) + 1 / 3 * abs(1 - 0.95))


def test_auroc_by_counting_pairs():
    probabilities, labels, _ = random_case(0)
    areas = []
    for c in range(3):
        inside, outside = probabilities[labels == c, c], probabilities[labels != c, c]
        areas.append(np.mean([(a > b) + 0.5 * (a == b) for a in inside for b in outside]))
    assert metrics(probabilities, labels)["auroc"] == pytest.approx(np.mean(areas))


def test_sensitivity_at_95_specificity_by_trying_every_threshold():
    probabilities, labels, _ = random_case(1, count=90, places=2)
    best = []
    for c in range(3):
        truth, score = labels == c, probabilities[:, c]
        tried = [(np.mean(score[~truth] < t), np.mean(score[truth] >= t)) for t in [*np.unique(score), 2.0]]
        best.append(max(sensitivity for specificity, sensitivity in tried if specificity >= 0.95))
    assert metrics(probabilities, labels)["sensitivity_at_95_specificity"] == pytest.approx(np.mean(best))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 60), st.integers(2, 5), st.integers(1, 3))
def test_the_fast_metrics_of_a_resample_are_those_of_the_repeated_images(seed, count, classes, places):
    probabilities, labels, _ = random_case(seed, count, classes, places)
    rng = np.random.default_rng(seed + 1)
    drawn = rng.integers(0, count, count)
    weights = np.stack([np.ones(count), np.bincount(drawn, minlength=count)]).astype(float)
    fast = weighted(weights, probabilities, labels)
    for row, chosen in enumerate((np.arange(count), drawn)):
        slow = metrics(probabilities[chosen], labels[chosen])
        for name in SCALARS:
            if slow[name] is None:
                assert np.isnan(fast[name][row])
            else:
                assert fast[name][row] == pytest.approx(slow[name], abs=1e-9), name


def test_intervals_are_bootstrap_percentiles_over_patients():
    probabilities, labels, patients = random_case(3, count=60)
    found = metrics(probabilities, labels, patients)
    assert found["patients"] == 20
    assert set(found["intervals"]) == set(SCALARS)
    # An independent bootstrap, patient by patient; other draws, so equal up to their noise.
    rng = np.random.default_rng(99)
    rows = {patient: np.flatnonzero(np.array(patients) == patient) for patient in set(patients)}
    names = sorted(rows)
    values = []
    for _ in range(RESAMPLES):
        chosen = np.concatenate([rows[names[i]] for i in rng.integers(0, len(names), len(names))])
        values.append(np.mean(probabilities[chosen].argmax(1) == labels[chosen]))
    low, high = np.percentile(values, (2.5, 97.5))
    assert found["intervals"]["accuracy"] == pytest.approx([low, high], abs=0.03)
    for name in SCALARS:
        low, high = found["intervals"][name]
        assert 0 <= low <= high <= 1
    assert metrics(probabilities, labels, patients) == found


def test_many_images_of_one_patient_widen_the_interval():
    rng = np.random.default_rng(0)
    labels = np.repeat(rng.integers(0, 2, 30), 8)
    right = np.repeat(rng.random(30) < 0.7, 8)
    probabilities = one_hot(np.where(right, labels, 1 - labels), 2)
    patients = [f"{index // 8}" for index in range(240)]
    by_patient = np.diff(metrics(probabilities, labels, patients)["intervals"]["accuracy"])
    by_image = np.diff(metrics(probabilities, labels)["intervals"]["accuracy"])
    assert by_patient > 2 * by_image  # sqrt(8) in expectation


def test_absent_classes_count_in_no_mean():
    labels = np.array([0, 2, 2, 0])
    right = metrics(one_hot(labels, 6), labels)
    for name in ("balanced_accuracy", "accuracy", "macro_f1", "auroc", "sensitivity_at_95_specificity"):
        assert right[name] == 1.0
        assert right["intervals"][name] == [1.0, 1.0]


def test_one_class_alone_has_no_auroc():
    found = metrics(one_hot([1, 1, 0], 2), np.array([1, 1, 1]))
    assert found["auroc"] is found["sensitivity_at_95_specificity"] is found["intervals"]["auroc"] is None
    assert found["balanced_accuracy"] == pytest.approx(2 / 3)


def test_nothing_gives_none():
    found = metrics(np.empty((0, 3)), np.empty(0, dtype=np.int64), ())
    assert all(found[name] is None and found["intervals"][name] is None for name in SCALARS)
    assert found["confusion_matrix"] == [[0] * 3] * 3
    assert (found["images"], found["patients"]) == (0, 0)


def test_a_mean_over_models_keeps_what_has_a_mean():
    cases = [metrics(*random_case(seed)) for seed in (0, 1)]
    found = mean(cases)
    assert set(found) == NAMES
    assert found["auroc"] == pytest.approx((cases[0]["auroc"] + cases[1]["auroc"]) / 2)
    assert found["confusion_matrix"] is found["intervals"] is None
    assert found["images"] == 40
    assert mean([])["accuracy"] is None


def test_pooled_sites_share_no_patient():
    first, second = (Predictions(*random_case(seed)) for seed in (0, 1))
    both = metrics(*pool([first, second]))
    assert both["images"] == 80
    assert both["patients"] == 28  # 14 of each, named alike
    assert both["accuracy"] == pytest.approx(np.mean([metrics(*each)["accuracy"] for each in (first, second)]))


def test_sklearn_agrees_on_one_class_against_the_rest():
    probabilities, labels, _ = random_case(7, count=200, classes=4, places=2)
    fast = weighted(np.ones((1, 200)), probabilities, labels)
    areas = [roc_auc_score(labels == c, probabilities[:, c]) for c in range(4)]
    assert fast["auroc"][0] == pytest.approx(np.mean(areas))
    curves = [roc_curve(labels == c, probabilities[:, c]) for c in range(4)]
    reached = [tpr[fpr <= 0.05].max() for fpr, tpr, _ in curves]
    assert fast["sensitivity_at_95_specificity"][0] == pytest.approx(np.mean(reached))

"""The head of one sum: the closed form, the same bits on every processor, and what its limits promise."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secure_fed.protocol import one_sum
from secure_fed.protocol.basis import Basis
from secure_fed.protocol.codec import adapter_digest, layout_of
from secure_fed.protocol.one_sum import GRID, Histogram, Limits, Sums

CLASSES = 3


def cases(seed: int, count: int, size: int, spread: float = 100.0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, count)
    x = (
        rng.standard_normal((count, size)) * np.geomspace(1, 1 / spread, size)
        + rng.standard_normal((CLASSES, size))[labels]
    )
    return x / np.linalg.norm(x, axis=1).max(), labels


def sums_of(x: np.ndarray, labels: np.ndarray, noise: float = 0.0) -> Sums:
    hot = np.eye(CLASSES)[labels]
    return Sums(hot.sum(axis=0), hot.T @ x, x.T @ x, noise)


def closed_form(sums: Sums, shrinkage: float) -> tuple[np.ndarray, np.ndarray]:
    """As in the books, by LAPACK."""
    means = sums.first / sums.patients[:, None]
    within = sums.second - np.einsum("c,ci,cj->ij", sums.patients, means, means)
    within /= sums.patients.sum() - len(means)
    shrunk = (1 - shrinkage) * within + shrinkage * np.trace(within) / len(within) * np.eye(len(within))
    weight = np.linalg.solve(shrunk, means.T).T
    return weight, -np.sum(weight * means, axis=1) / 2


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**20), st.integers(1, 40), st.sampled_from(GRID))
def test_the_head_is_the_closed_form(seed: int, size: int, shrinkage: float) -> None:
    sums = sums_of(*cases(seed, 120, size))
    head = one_sum.solve(sums, shrinkage, 5)
    assert head is not None
    weight, bias = closed_form(sums, shrinkage)
    assert np.abs(head.weight - weight).max() <= 1e-9 * np.abs(weight).max()
    assert np.abs(head.bias - bias).max() <= 1e-9 * np.abs(bias).max()
    shrunk = head.factor @ head.factor.T
    assert np.allclose(np.linalg.solve(shrunk, head.means.T).T, head.weight)


@pytest.mark.parametrize("axes", [True, False])
def test_the_adapters_weights_take_features_as_the_backbone_gives_them(axes: bool) -> None:
    rng = np.random.default_rng(1)
    size = 4 if axes else 9
    basis = Basis(rng.standard_normal(9), rng.standard_normal((4, 9)) if axes else None, 1.7, np.ones(size))
    features = rng.standard_normal((90, 9))
    labels = rng.integers(0, CLASSES, 90)
    head = one_sum.solve(sums_of(basis.linear(features), labels), 0.01, 5)
    assert head is not None
    parameters = one_sum.parameters_of(head, basis, 14.0)
    logits = 14.0 * (features @ parameters["weight"].T + parameters["bias"])
    assert np.allclose(logits, basis.linear(features) @ head.weight.T + head.bias)


def test_what_travels_comes_back_as_exactly_as_its_precision() -> None:
    x, labels = cases(2, 50, 6)
    basis = Basis(np.zeros(6), None, 1.0, np.sqrt(np.square(x).mean(axis=0)))
    exact = sums_of(x, labels)
    layout = layout_of(one_sum.sums_blocks(CLASSES, basis, 60, 24), 4, 20, None)
    integers, rounded = layout.encode(exact.values(), 1.0, np.zeros(0))
    assert all(block.saturated == 0 for block in rounded.values())
    found = Sums.of(layout.decode(3 * integers, [1.0] * 3))
    assert np.array_equal(found.patients, 3 * exact.patients)  # whole patients are exact
    assert np.allclose(found.first, 3 * exact.first, atol=1e-3)
    assert np.allclose(found.second, 3 * exact.second, atol=1e-3)
    assert np.array_equal(found.second, found.second.T)


def test_a_class_with_too_few_patients_is_left_out() -> None:
    x, labels = cases(3, 60, 5)
    few = np.concatenate([np.flatnonzero(labels != 2), np.flatnonzero(labels == 2)[:4]])
    sums = sums_of(x[few], labels[few])
    assert one_sum.known_classes(sums, 5).tolist() == [True, True, False]
    head = one_sum.solve(sums, 0.01, 5)
    assert head is not None
    basis = Basis(np.zeros(5), None, 1.0, np.ones(5))
    parameters = one_sum.parameters_of(head, basis, 10.0)
    logits = x @ parameters["weight"].T + parameters["bias"]
    assert not np.any(logits.argmax(axis=1) == 2)
    assert one_sum.solve(sums, 0.01, 1000) is None


@pytest.mark.parametrize("scale", [5.0, 14.0, 100.0])
@pytest.mark.parametrize("patients", [20, 60])
@pytest.mark.parametrize("shrinkage", [1e-6, *GRID])
def test_a_class_that_is_left_out_is_never_predicted_however_few_the_patients(
    shrinkage: float, patients: int, scale: float
) -> None:
    rng, size = np.random.default_rng(0), 128
    spread = np.geomspace(0.3, 0.003, size)
    x, labels = rng.standard_normal((patients, size)) * spread, rng.integers(0, 2, patients)
    x = (x + 0.7 * spread * rng.standard_normal((2, size))[labels]) / np.linalg.norm(x, axis=1).max()
    head = one_sum.solve(sums_of(x, labels), shrinkage, 5)
    assert head is not None
    assert list(head.known) == [True, True, False]
    parameters = one_sum.parameters_of(head, Basis(np.full(size, 0.01), None, 0.9, spread), scale)
    features = rng.standard_normal((400, size)) * np.repeat([spread, np.ones(size)], 200, axis=0)
    features = np.concatenate([features, parameters["weight"], -parameters["weight"], x])
    features /= np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    logits = scale * (features @ parameters["weight"].T + parameters["bias"])
    assert (logits[:, 2] - logits[:, :2].max(axis=1)).max() < -50 * 745  # no probability at any temperature


def test_a_covariance_that_rounding_made_indefinite_is_floored() -> None:
    x, labels = cases(4, 60, 6)
    sums = sums_of(x, labels)
    broken = sums.second - 2 * np.diag([0, 0, 0, 0, 0, sums.second[5, 5]])
    damaged = Sums(sums.patients, sums.first, broken)
    assert np.linalg.eigvalsh(one_sum.covariance(damaged)).min() < 0
    head = one_sum.solve(damaged, 1e-3, 5)
    assert head is not None
    within = one_sum.covariance(damaged)
    values, vectors = np.linalg.eigh(within)
    mended = (vectors * np.maximum(values, 0)) @ vectors.T
    shrunk = (1 - 1e-3) * mended + 1e-3 * np.trace(mended) / 6 * np.eye(6)
    assert np.allclose(head.factor @ head.factor.T, shrunk, atol=1e-12)


@pytest.mark.parametrize("shrinkage", [1e-300, 1e-16, 1e-13, 1e-6, 1.0])
def test_fewer_patients_than_dimensions_have_a_head_at_any_shrinkage(shrinkage: float) -> None:
    x, labels = cases(4, 12, 48)
    head = one_sum.solve(sums_of(x, labels), shrinkage, 2)
    assert head is not None
    assert np.isfinite(head.weight).all()


@pytest.mark.parametrize("scale", [-1e9, -1.0, 0.0])
def test_sums_that_no_features_give_have_no_head(scale: float) -> None:
    x, labels = cases(4, 60, 6)
    sums = sums_of(x, labels)
    assert one_sum.solve(Sums(sums.patients, 0 * sums.first, scale * np.eye(6)), 0.1, 5) is None
    assert Sums(sums.patients, sums.first, sums.second, noise=-1.0).floor == 0


def test_noise_raises_the_least_eigenvalue_to_its_own_norm() -> None:
    x, labels = cases(5, 200, 8, spread=1e3)
    sums = sums_of(x, labels, noise=3 * 0.2**2)
    floor = np.sqrt(3) * 0.2 * np.sqrt(2 * 8) / 200
    assert sums.floor == pytest.approx(floor)
    values = np.linalg.eigvalsh(one_sum.covariance(sums))
    assert values.min() == pytest.approx(floor)
    bare = np.linalg.eigvalsh(one_sum.covariance(sums_of(x, labels)))
    assert values.max() == pytest.approx(bare.max())


def test_a_class_without_patients_is_told_from_noise_and_moves_nothing() -> None:
    """Of 400 draws of noise at epsilon 1, with two classes of three in the data."""
    x, labels = cases(5, 360, 8)
    exact, known, errors = sums_of(x[labels < 2], labels[labels < 2]), [], []
    rng, std = np.random.default_rng(0), 18.6
    for _ in range(400):
        first = exact.first + 0.4 * std * rng.standard_normal(exact.first.shape)
        sums = Sums(exact.patients + std * rng.standard_normal(3), first, exact.second, std**2)
        known.append(one_sum.known_classes(sums, 5))
        if sums.patients[2] < sums.doubtful:
            with_noise, without = Sums(sums.patients, first.copy(), exact.second, std**2), first.copy()
            without[2] = 0
            alike = Sums(sums.patients, without, exact.second, std**2)
            errors.append(float(np.abs(one_sum.covariance(with_noise) - one_sum.covariance(alike)).max()))
    found = np.mean(known, axis=0)
    assert found[2] <= 0.025
    assert found[:2].min() >= 0.95
    assert errors
    assert max(errors) == 0
    assert one_sum.known_classes(exact, 5).tolist() == [True, True, False]
    assert exact.doubtful == 0


def test_a_sum_that_noise_drowns_has_no_head_rather_than_one_without_the_classes_that_chance_takes() -> None:
    """Of 400 draws of noise beside classes of some 30: at a deviation of 12 it is all of them or none, at 4 all."""
    exact, rng = sums_of(*cases(6, 90, 8)), np.random.default_rng(1)
    found: dict[float, Counter[int]] = {}
    for std in (12.0, 4.0):
        found[std] = Counter()
        for _ in range(400):
            sums = Sums(exact.patients + std * rng.standard_normal(CLASSES), exact.first, exact.second, std**2)
            known = one_sum.known_classes(sums, 5)
            found[std][int(known.sum())] += 1
            assert (one_sum.solve(sums, 0.03, 5) is None) == (known.sum() < 2)
    assert found[12.0][0] >= 300
    assert found[12.0][1] + found[12.0][2] <= 20
    assert found[12.0][CLASSES] >= 30  # where all pass, noise has hidden none
    assert found[4.0][CLASSES] >= 380
    assert not exact.drowned(5)
    assert not replace(exact, patients=np.zeros(CLASSES)).drowned(5)
    assert not replace(exact, patients=np.array([300.0, 300.0, 0.0]), noise=144.0).drowned(5)  # told from noise


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**20), st.integers(1, 40), st.integers(1, 40), st.sampled_from([0.0, 1e-3, 1.0, 1e150, 1e-150]))
def test_turns_find_the_eigenvalues_of_all_kinds_of_matrices(seed: int, size: int, rank: int, scale: float) -> None:
    drawn = np.random.default_rng(seed).standard_normal((rank, size))
    matrix = scale * (drawn.T @ drawn - np.eye(size))
    matrix = (matrix + matrix.T) / 2
    values, vectors = one_sum.eigen(matrix)
    exact = np.linalg.eigvalsh(matrix)
    tolerance = 1e-13 * max(1.0, size * rank) * scale
    assert np.allclose(np.sort(values), exact, rtol=0, atol=tolerance)
    assert np.allclose((vectors * values) @ vectors.T, matrix, rtol=0, atol=tolerance)
    least = 0.1 * scale
    raised = one_sum.floored(matrix, least)
    assert np.array_equal(raised, raised.T)
    assert np.allclose(np.linalg.eigvalsh(raised), np.maximum(exact, least), rtol=0, atol=2 * tolerance)


def test_as_many_turns_as_a_few_an_eigenvalue_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the matrix, so that 512 dimensions under noise take seconds."""
    turns, turn = [], one_sum._turn
    monkeypatch.setattr(one_sum, "_turn", lambda *parts: turns.append(1) or turn(*parts))
    rng, size = np.random.default_rng(0), 96
    x = rng.standard_normal((size // 2, size)) * np.geomspace(1, 1e-3, size)
    noise = rng.standard_normal((size, size))
    for matrix in (x.T @ x, x.T @ x + noise + noise.T, noise + noise.T, np.ones((size, size)), np.eye(size)):
        turns.clear()
        one_sum.eigen(matrix)
        assert len(turns) <= 3 * size


def test_a_covariance_is_taken_apart_once_in_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    x, labels = cases(9, 60, 5)
    first = one_sum.covariance(sums_of(x, labels, noise=1e-3))
    monkeypatch.setattr(one_sum, "eigen", lambda *_: pytest.fail("taken apart again"))
    assert np.array_equal(one_sum.covariance(sums_of(x, labels, noise=1e-3)), first)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**20), st.integers(1, 17))
def test_reflections_and_turns_find_all_eigenvalues(seed: int, size: int) -> None:
    drawn = np.random.default_rng(seed).standard_normal((size, size))
    matrix = drawn + drawn.T
    values, vectors = one_sum.eigen(matrix)
    assert np.allclose(np.sort(values), np.linalg.eigvalsh(matrix), atol=1e-12)
    assert np.allclose((vectors * values) @ vectors.T, matrix, atol=1e-12)


# --- the same bits ---

DIGEST = """
import numpy as np
from secure_fed.protocol import one_sum
from secure_fed.protocol.basis import Basis
from secure_fed.protocol.codec import adapter_digest
with np.load({path!r}) as saved:
    sums = one_sum.Sums(saved["patients"], saved["first"], saved["second"], float(saved["noise"]))
    basis = Basis(saved["centre"], saved["axes"], 1.3, np.ones(len(saved["axes"])))
head = one_sum.solve(sums, 0.003, 5)
print(adapter_digest(one_sum.parameters_of(head, basis, 14.0)))
"""


def test_the_head_has_the_same_bits_whatever_the_processor_offers(tmp_path: Path) -> None:
    x, labels = cases(6, 300, 33)
    sums = sums_of(x, labels, noise=1e-3)  # so that eigenvalues take part
    rng = np.random.default_rng(7)
    path = tmp_path / "sums.npz"
    arrays = {"patients": sums.patients, "first": sums.first, "second": sums.second, "noise": np.array(sums.noise)}
    np.savez(path, centre=rng.standard_normal(50), axes=rng.standard_normal((33, 50)), **arrays)
    everything = " ".join(name for name, there in np._core._multiarray_umath.__cpu_features__.items() if there)
    dispatched = [name for name in np._core._multiarray_umath.__cpu_dispatch__ if name in everything.split()]
    found = set()
    for disabled, core, threads in (
        ("", "Haswell", "1"),
        (" ".join(dispatched), "Nehalem", "1"),
        ("", "SkylakeX", "2"),
    ):
        environment = os.environ | {
            "NPY_DISABLE_CPU_FEATURES": disabled,
            "OPENBLAS_CORETYPE": core,
            "OMP_NUM_THREADS": threads,
        }
        ran = subprocess.run(
            [sys.executable, "-P", "-c", DIGEST.format(path=str(path))],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        found.add(ran.stdout.strip())
    assert len(found) == 1
    assert len(found.pop()) == hashlib.sha256().digest_size * 2


def test_a_head_is_solved_once_in_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    sums = sums_of(*cases(8, 60, 5))
    first = one_sum.head_of(sums, 0.01, 5)
    monkeypatch.setattr(one_sum, "solve", lambda *_: pytest.fail("solved again"))
    assert one_sum.head_of(sums_of(*cases(8, 60, 5)), 0.01, 5) is first


def test_a_head_says_which_classes_it_never_predicts_and_prompts_predict_all() -> None:
    names = ("dark", "light", "striped")
    head = {"means": np.array([[0.1, 0.0], [0.0, 0.0], [0.0, -0.2]])}
    assert one_sum.never_predicted(head, names) == ("light",)
    assert one_sum.never_predicted({"means": np.zeros((3, 2))}, names) == ()


# --- histograms ---


def histogram(confusion: np.ndarray, own: np.ndarray | None = None, far: np.ndarray | None = None) -> Histogram:
    scores = np.zeros((CLASSES, 2, one_sum.BINS))
    if own is not None:
        scores[0, 1] = own
    empty = np.zeros(one_sum.BINS)
    return Histogram(confusion, scores, np.zeros(one_sum.CONFIDENCE_BINS), empty if far is None else far)


def test_histograms_come_back_and_whole_patients_are_exact() -> None:
    rng = np.random.default_rng(0)
    block = one_sum.histograms_block(CLASSES, 300)
    layout = layout_of([block], 4, 12, None)
    values = rng.integers(0, 300, block.bounds.size).astype(float)
    integers, _ = layout.encode({one_sum.HISTOGRAMS: values}, 1.0, np.zeros(0))
    assert np.array_equal(layout.decode(2 * integers, [1.0] * 2)[one_sum.HISTOGRAMS], 2 * values)
    one = Histogram.of(values[: Histogram.size(CLASSES)], CLASSES)
    assert np.array_equal(one.values(), values[: Histogram.size(CLASSES)])


def test_the_shrinkage_with_the_highest_balanced_accuracy_is_chosen_the_larger_of_two_alike() -> None:
    good, bad = np.diag([12.0, 12, 12]), np.full((CLASSES, CLASSES), 4.0)
    for place in (0, 4, len(GRID) - 1):
        grid = np.concatenate([histogram(good if index == place else bad).values() for index in range(len(GRID))])
        assert one_sum.chosen(grid, CLASSES)[0] == place
    alike = np.concatenate([histogram(good).values()] * len(GRID))
    assert one_sum.chosen(alike, CLASSES)[0] == len(GRID) - 1
    assert one_sum.balanced_accuracy(np.array([[9.0, 1, 0], [0, 0, 0], [5, 0, 5]])) == pytest.approx(0.7)


def test_a_shrinkage_is_chosen_by_nearly_all_patients_not_by_those_for_whom_it_has_a_head() -> None:
    few, all_of_them = histogram(5 * np.eye(CLASSES)), histogram(20 * np.eye(CLASSES) + 1)
    rounded = histogram(0.99 * (20 * np.eye(CLASSES) + 1))
    histograms = [few.values()] * 4 + [all_of_them.values(), rounded.values()] + [few.values()] * 3
    place, found = one_sum.chosen(np.concatenate(histograms), CLASSES)
    assert place == 5
    assert found.patients == pytest.approx(rounded.patients)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**20), st.integers(12, 400), st.sampled_from([0.6, 0.8, 0.9]))
def test_the_limit_covers_what_is_promised_of_what_it_was_made_of(seed: int, patients: int, coverage: float) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.normal(0, 3, patients)
    own = np.bincount(one_sum.score_bin(scores), minlength=one_sum.BINS).astype(float)
    limits = one_sum.limits_of(histogram(np.diag([float(patients), 0, 0]), own), coverage)
    if limits.least > -one_sum.NO_LIMIT:
        place = int(np.searchsorted(one_sum.SCORE_EDGES, limits.least, side="right")) - 1
        lower, upper = (np.sum(scores >= edge) for edge in one_sum.SCORE_EDGES[place : place + 2])
        assert lower >= coverage * (patients + 1)
        assert upper <= coverage * (patients + 1) or place == one_sum.BINS - 1
    else:
        assert np.sum(scores >= one_sum.SCORE_EDGES[1]) < coverage * (patients + 1)
    assert limits.patients == patients


@pytest.mark.parametrize(("mean", "spread"), [(1, 3), (3, 12), (0, 60)])
def test_a_new_patient_is_covered_as_promised_however_sure_the_head_is_of_itself(mean: float, spread: float) -> None:
    rng = np.random.default_rng(3)
    covered = []
    for _ in range(1000):
        known, fresh = rng.normal(mean, spread, 99), rng.normal(mean, spread, 50)
        own = np.bincount(one_sum.score_bin(known), minlength=one_sum.BINS).astype(float)
        least = one_sum.limits_of(histogram(np.diag([99.0, 0, 0]), own), 0.9).least
        covered.append(np.mean(fresh >= least))
    assert 0.896 <= np.mean(covered) <= 0.91


@pytest.mark.parametrize("spread", [0.0, 0.01, 0.05])
def test_patients_of_whom_a_head_says_next_to_the_same_are_covered_wherever_their_bin_begins(spread: float) -> None:
    """As of a head that knows nothing, whose log odds are all near -log(K - 1)."""
    rng = np.random.default_rng(4)
    for mean in np.linspace(-9, 1, 400):
        known, fresh = rng.normal(mean, spread, (2, 200))
        own = np.bincount(one_sum.score_bin(known), minlength=one_sum.BINS).astype(float)
        least = one_sum.limits_of(histogram(np.diag([200.0, 0, 0]), own), 0.9).least
        assert np.mean(fresh >= least) >= 0.8


def test_limits_of_histograms_that_no_patients_give_are_finite() -> None:
    for seed in range(50):
        values = np.random.default_rng(seed).integers(-50, 50, Histogram.size(CLASSES)).astype(float)
        assert np.isfinite(one_sum.limits_of(Histogram.of(values, CLASSES), 0.9).values()).all()


def test_strangers_lie_farther_than_nineteen_in_twenty() -> None:
    far = np.zeros(one_sum.BINS)
    far[24:34] = 20.0
    limits = one_sum.limits_of(histogram(np.diag([200.0, 0, 0]), far=far), 0.9)
    assert limits.farthest == -6 + 34 * 0.25  # 191 of 200 need all ten bins
    assert one_sum.limits_of(histogram(np.diag([3.0, 0, 0])), 0.9) == Limits(-one_sum.NO_LIMIT, one_sum.NO_LIMIT, 3.0)
    assert Limits.of({"limits": limits.values()}) == limits


def test_limits_are_finite_numbers_also_without_any() -> None:
    assert np.isfinite(one_sum.NO_LIMITS.values()).all()
    assert len(adapter_digest({"limits": one_sum.NO_LIMITS.values()})) == 64


@pytest.mark.parametrize("seed", range(20))
def test_pooled_figures_of_histograms_that_no_patients_give_are_still_shares(seed: int) -> None:
    values = np.random.default_rng(seed).integers(-50, 50, Histogram.size(CLASSES)).astype(np.float64)
    found = one_sum.pooled(Histogram.of(values, CLASSES))
    assert found is not None
    assert found.patients > 0
    assert found.auroc is not None
    for share in (found.accuracy, found.balanced_accuracy, found.auroc, found.expected_calibration_error):
        assert 0 <= share <= 1
    assert one_sum.pooled(Histogram.of(-np.abs(values), CLASSES)) is None

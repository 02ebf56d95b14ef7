"""Class statistics under a budget: no patient moves them by more than is paid, and the noise is what is paid for."""

from __future__ import annotations

import math
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secure_fed.core.errors import GuardError
from secure_fed.privacy import class_statistics
from secure_fed.privacy.class_statistics import SCALES, SENSITIVITY, exact_sums
from secure_fed.protocol import one_sum
from secure_fed.protocol.one_sum import NOISE, PATIENTS, SECOND, Sums

CLASSES = 3


def distance(first: Sums, second: Sums) -> float:
    one, other = first.values(), second.values()
    return math.sqrt(sum(scale**2 * float(np.square(one[name] - other[name]).sum()) for name, scale in SCALES.items()))


def site(seed: int, images: int, size: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Images on or in the unit ball, some of one patient alike, which is the worst case."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((images, size))
    x /= np.maximum(np.linalg.norm(x, axis=1, keepdims=True), rng.choice([1e-9, 3.0], (images, 1)))
    owners = [f"p{number}" for number in rng.integers(0, max(2, images // 3), images)]
    x[:: max(2, images // 4)] = x[0]
    return x, rng.integers(0, CLASSES, images), owners


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**20), st.integers(2, 30), st.integers(1, 6))
def test_no_patient_moves_the_scaled_statistics_by_more_than_the_sensitivity(seed: int, images: int, size: int) -> None:
    x, labels, owners = site(seed, images, size)
    whole = exact_sums(x, labels, owners, CLASSES)
    assert whole.patients.sum() == pytest.approx(len(set(owners)))
    for left_out in set(owners):
        rows = [row for row, owner in enumerate(owners) if owner != left_out]
        fewer = exact_sums(x[rows], labels[rows], [owners[row] for row in rows], CLASSES)
        assert distance(whole, fewer) <= SENSITIVITY * (1 + 1e-9)


def test_the_sensitivity_is_reached_and_not_guessed() -> None:
    x, labels, owners = np.eye(1, 4), np.array([1]), ["p"]
    nobody = exact_sums(x[:0], labels[:0], [], CLASSES)
    assert distance(exact_sums(x, labels, owners, CLASSES), nobody) == pytest.approx(SENSITIVITY)
    assert not any(part.any() for part in nobody.values().values())


def test_a_patient_weighs_one_however_many_images_it_has() -> None:
    x = np.array([[1.0, 0], [0, 1], [0.5, 0.5]])
    found = exact_sums(x, np.array([0, 1, 1]), ["a", "a", "b"], 2)
    assert found.patients.tolist() == [0.5, 1.5]
    assert np.allclose(found.first, [[0.5, 0], [0.5, 1.0]])
    assert np.allclose(found.second, [[0.75, 0.25], [0.25, 0.75]])


def test_the_noise_is_what_is_paid_for_and_tells_its_own_size() -> None:
    sums = Sums(np.zeros(CLASSES), np.zeros((CLASSES, 60)), np.zeros((60, 60)))
    values = class_statistics.noisy_values(sums, 2.0)
    std = class_statistics.mechanism(2.0).noise_std
    assert std == pytest.approx(2 * SENSITIVITY)
    assert values[SECOND].std() == pytest.approx(std / SCALES[SECOND], rel=0.1)
    assert values[NOISE][0] == pytest.approx((std / SCALES[SECOND]) ** 2)
    noisy = Sums.of(values)
    # The floor is the norm of this very noise, over the patients: nothing below it means anything.
    norm = np.abs(np.linalg.eigvalsh(noisy.second)).max()
    floor = one_sum.Sums(np.array([1.0]), noisy.first[:1], noisy.second, noisy.noise).floor
    assert 0.85 < norm / floor < 1.1


def test_only_those_who_pay_are_counted_and_of_each_only_so_many_images() -> None:
    owners = ["a", "b", "a", "a", "c", "b"]
    assert class_statistics.capped(owners, {"a", "b"}, 2) == [0, 1, 2, 5]
    x = np.ones((6, 2))
    x[3, 0] = np.nan
    assert class_statistics.finite_rows(x, owners) == [1, 4, 5]


def test_the_guard_finds_statistics_that_a_patient_moves_too_far() -> None:
    class_statistics.check_sums(3, 8)
    with (
        mock.patch.object(class_statistics, "shares", side_effect=lambda owners: np.ones(len(owners))),
        pytest.raises(GuardError, match="nothing was spent"),
    ):
        class_statistics.check_sums(3, 8)


def test_numbers_of_patients_have_the_noise_that_travels_with_the_sum() -> None:
    """By it sites tell a class without patients from noise."""
    assert SCALES[PATIENTS] == SCALES[SECOND]
    nobody = exact_sums(np.zeros((0, 2)), np.zeros(0, dtype=np.int64), [], 4000)
    found = class_statistics.noisy_values(nobody, 3.0)
    assert np.var(found[PATIENTS]) == pytest.approx(float(found[NOISE][0]), rel=0.15)

"""Validation counts that are paid for: their sensitivity, their noise, and what they come to."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secure_fed.privacy.accounting import epsilon_of
from secure_fed.privacy.validation import SENSITIVITY, exact_counts, mechanism, noisy_counts

IMAGES = st.lists(st.tuples(st.integers(0, 5), st.booleans()), max_size=30)


def counts(images: list[tuple[int, bool]]) -> np.ndarray:
    return exact_counts(np.array([right for _, right in images], dtype=bool), [f"p{owner}" for owner, _ in images])


@given(images=IMAGES, leaves=st.integers(0, 5))
@settings(max_examples=200, deadline=None)
def test_no_patient_with_all_its_images_moves_the_counts_by_more_than_the_root_of_two(
    images: list[tuple[int, bool]], leaves: int
) -> None:
    without = [image for image in images if image[0] != leaves]
    moved = counts(images) - counts(without)
    assert np.linalg.norm(moved) <= SENSITIVITY * (1 + 1e-12)
    own = [right for owner, right in images if owner == leaves]
    assert moved == pytest.approx([float(len(own) > 0), np.mean(own) if own else 0])


def test_the_sensitivity_is_reached_and_is_what_the_ledger_is_told() -> None:
    assert np.linalg.norm(counts([(1, True), (1, True)])) == pytest.approx(SENSITIVITY)
    release = mechanism(14.0)
    assert release.mu_squared == pytest.approx(1 / 14**2)
    assert release.noise_std == pytest.approx(14 * 2**0.5)
    # docs/privacy.md, Validation counts: noise of 10 sqrt 2 costs mu 0.1: epsilon 0.34 once, 1.20 for ten rounds.
    assert epsilon_of(mechanism(10.0).mu_squared, 1e-5) == pytest.approx(0.34, abs=0.01)
    assert epsilon_of(10 * mechanism(10.0).mu_squared, 1e-5) == pytest.approx(1.20, abs=0.01)


def test_patients_count_not_images() -> None:
    assert counts([(1, True)] * 9 + [(1, False)] + [(2, False)]).tolist() == [2.0, 0.9]


def test_each_count_has_noise_of_its_own_and_of_the_declared_size_also_over_nobody() -> None:
    # Half of the patients right: both sums stay clear of their limits.
    right, owners = np.arange(100) % 2 == 0, [f"p{number}" for number in range(100)]
    drawn = np.array([noisy_counts(right, owners, 5.0) for _ in range(400)], dtype=float)
    assert drawn.mean(0) == pytest.approx([100, 50], abs=2.5)
    assert drawn.std(0) == pytest.approx(5 * 2**0.5, rel=0.25)
    assert abs(np.corrcoef(drawn.T)[0, 1]) < 0.35  # seven standard errors; one draw for both would cancel in the gap
    nobody = [noisy_counts(np.zeros(0, dtype=bool), [], 20.0) for _ in range(100)]
    assert len(set(nobody)) > 20
    assert all(0 <= right <= count for count, right in nobody)


@pytest.mark.parametrize(
    ("noise", "expected"), [((0.0, 0.0), (3, 2)), ((-9.0, 5.0), (0, 0)), ((2.0, 9.0), (5, 5)), ((0.0, -9.0), (3, 0))]
)
def test_integers_stay_in_their_range(noise: tuple[float, float], expected: tuple[int, int]) -> None:
    counts = noisy_counts(np.array([True, True, False]), ["a", "b", "c"], 1.0, lambda size, std: np.array(noise))
    assert counts == expected

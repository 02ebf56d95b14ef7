"""Sums around centroids under a budget: no patient moves them by more than is paid, and noise is on all that leaves."""

from __future__ import annotations

import math
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from secure_fed.core.errors import GuardError
from secure_fed.privacy import memory_sums
from secure_fed.privacy.memory_sums import exact_sums, noisy_values, scale_of, sensitivity

Adapter = dict[str, NDArray[np.float64]]


def adapter(seed: int, count: int) -> Adapter:
    rng = np.random.default_rng(seed)
    return {
        "grids": np.array([[2, 2, 3], [1, 3, 2]], dtype=np.float64),
        "score_centroids": rng.normal(size=(count, 3)),
        "map_centroids": rng.normal(size=(count, 2)),
    }


def moved(bank: Adapter, x: NDArray[np.float32], owners: list[str], left_out: str) -> float:
    rows = [row for row, owner in enumerate(owners) if owner != left_out]
    whole, fewer = exact_sums(bank, x, owners), exact_sums(bank, x[rows], [owners[row] for row in rows])
    blocks = [name for name in whole if not name.endswith("_patients")]
    return math.sqrt(sum(scale_of(name) ** 2 * float(np.square(whole[name] - fewer[name]).sum()) for name in blocks))


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**20), st.integers(1, 12), st.integers(1, 5), st.sampled_from([0.1, 1.0, 10.0]))
def test_no_patient_moves_the_scaled_sums_by_more_than_the_sensitivity(
    seed: int, images: int, count: int, length: float
) -> None:
    rng, bank = np.random.default_rng(seed), adapter(seed, count)
    x = (length * rng.normal(size=(images, 18))).astype(np.float32)
    owners = [f"p{number}" for number in rng.integers(0, max(1, images // 3), images)]
    for left_out in set(owners):
        assert moved(bank, x, owners, left_out) <= sensitivity(bank) * (1 + 1e-9)


@pytest.mark.parametrize("count", [2, 257])
def test_nobody_decides_for_others_between_two_centroids_as_near(count: int) -> None:
    """By BLAS an image among more of them may have other last bits, which are all that tells equal centroids apart."""
    rng = np.random.default_rng(2)
    bank = rng.normal(size=(count, 512))
    bank[-1] = bank[0]
    x = (bank[0] + 0.05 * rng.normal(size=(12, 4, 512))).astype(np.float32).reshape(12, -1)
    found = {"grids": np.array([[2, 2, 512]], dtype=np.float64), "score_centroids": bank}
    owners = [f"p{number}" for number in range(12)]
    for left_out in owners:
        assert moved(found, x, owners, left_out) <= sensitivity(found) * (1 + 1e-9)


def test_the_sensitivity_is_reached_and_not_guessed() -> None:
    bank = adapter(0, 4)
    x = np.tile(np.float32([1, 0, 0, 1, 0, 0, 1, 0, 0, 1, 0, 0, 0, 1, 0, 1, 0, 1]), (2, 1))  # the same everywhere
    assert moved(bank, x, ["p", "p"], "p") == pytest.approx(sensitivity(bank))
    del bank["map_centroids"]
    bank["grids"] = bank["grids"][:1]
    assert moved(bank, x[:, :12], ["p", "p"], "p") == pytest.approx(sensitivity(bank)) == pytest.approx(1.16**0.5)


def test_noise_lies_on_every_block_in_proportion_to_its_scale_and_numbers_of_patients_stay() -> None:
    bank = adapter(1, 4)
    exact = exact_sums(bank, np.ones((3, 18), dtype=np.float32), ["a", "b", "b"])
    drawn: list[tuple[int, float]] = []

    def noise(size: int, std: float) -> NDArray[np.float64]:
        drawn.append((size, std))
        return np.full(size, std)

    found = noisy_values(exact, 2.0, noise)
    assert sorted(drawn) == [(4, 5.0), (4, 5.0), (8, 2.0), (12, 2.0)]
    for name in ("score", "map"):
        assert exact[f"{name}_patients"].any()
        assert not found[f"{name}_patients"].any()
        np.testing.assert_allclose(found[f"{name}_sums"], exact[f"{name}_sums"] + 2.0)
        np.testing.assert_allclose(found[f"{name}_weights"], exact[f"{name}_weights"] + 5.0)


def test_over_nobody_the_sums_are_zeros_and_noise_comes_all_the_same() -> None:
    exact = exact_sums(adapter(2, 3), np.zeros((0, 18), dtype=np.float32), [])
    assert not any(value.any() for value in exact.values())
    assert noisy_values(exact, 1.0)["score_sums"].all()


def test_code_that_counts_a_patient_twice_is_refused_before_anything_is_spent() -> None:
    bank = adapter(3, 4)
    memory_sums.check_sums(bank)
    with (
        mock.patch.object(memory_sums, "shares", side_effect=lambda owners: np.ones(len(owners))),
        pytest.raises(GuardError, match="nothing was spent"),
    ):
        memory_sums.check_sums(bank)

"""LiRA finds members of overfitted models and not of private ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from privacy.attacks import attack_with_and_without, lira, log_odds

torch.set_num_threads(1)  # as the command does


def test_a_perfect_leak_is_found_and_noise_is_not() -> None:
    rng = np.random.default_rng(0)
    leak = lira(lambda members: members * 8.0 + rng.normal(size=200), 200)
    assert leak.true_positive_rate > 0.9
    assert leak.auc > 0.99
    blind = lira(lambda members: rng.normal(size=200), 200)
    assert blind.true_positive_rate < 0.03
    assert blind.auc == pytest.approx(0.5, abs=0.03)


def test_hard_patients_are_compared_with_themselves() -> None:
    """A patient that scores low in and out is no non-member: scores count relative to the patient's own."""
    rng = np.random.default_rng(1)
    hardness: NDArray[np.float64] = rng.normal(0, 30, 200)
    found = lira(lambda members: hardness + members * 4.0 + rng.normal(size=200), 200)
    assert found.auc > 0.97


def test_log_odds() -> None:
    odds = log_odds(np.array([[0.9, 0.1], [0.5, 0.5], [1.0, 0.0]]), np.array([0, 1, 1]))
    assert odds[:2] == pytest.approx([np.log(9), 0.0])
    assert np.isfinite(odds).all()


def test_privacy_takes_the_attack_away() -> None:
    private, plain = attack_with_and_without(3.0, 1e-5, shadows=24)
    assert plain.true_positive_rate > 0.1
    assert private.true_positive_rate < plain.true_positive_rate / 2
    assert private.auc < plain.auc - 0.1

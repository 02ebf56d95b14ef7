"""Accounting against closed forms and Opacus; noise against its distribution."""

from __future__ import annotations

import math
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants import PRVAccountant, RDPAccountant
from scipy import stats

from secure_fed.privacy.accounting import (
    Mechanism,
    epsilon_of,
    epsilon_spent,
    gaussian_noise,
    mu_squared_of,
    plan_noise,
    uniforms,
)


@pytest.mark.parametrize(
    ("epsilon", "mu_squared"), [(1, 0.0719), (3, 0.5171), (8, 2.7757)], ids=["eps 1", "eps 3", "eps 8"]
)
def test_the_budgets_of_the_specification(epsilon: float, mu_squared: float) -> None:
    assert mu_squared_of(epsilon, 1e-5) == pytest.approx(mu_squared, abs=5e-5)


def test_fifty_steps_at_noise_ten() -> None:
    # docs/privacy.md, Cost and budget: exact 2.943, PRV 2.953, Renyi 3.189.
    mechanism = Mechanism(1.0, 10.0, 50)
    assert mechanism.mu_squared == pytest.approx(0.5)
    assert epsilon_spent([mechanism], 1e-5) == pytest.approx(2.943, abs=5e-4)


@given(epsilon=st.floats(0.01, 20), logarithm=st.floats(-9, -2))
@settings(deadline=None, max_examples=100)
def test_epsilon_and_its_inverse_agree_and_err_to_the_safe_side(epsilon: float, logarithm: float) -> None:
    delta = 10**logarithm
    mu_squared = mu_squared_of(epsilon, delta)
    back = epsilon_of(mu_squared, delta)
    assert back <= epsilon + 5e-10 * max(1, epsilon)
    assert back == pytest.approx(epsilon, abs=2e-9 * max(1, epsilon))
    if back > 0:  # the closed form itself, in plain arithmetic
        mu = math.sqrt(mu_squared)
        exact = stats.norm.cdf(-back / mu + mu / 2) - math.exp(back) * stats.norm.cdf(-back / mu - mu / 2)
        assert exact <= delta * (1 + 1e-9)
        assert exact == pytest.approx(delta, rel=1e-4)


@given(st.lists(st.tuples(st.floats(0.1, 5), st.floats(1, 100), st.integers(1, 50)), min_size=1, max_size=6))
@settings(deadline=None, max_examples=50)
def test_costs_add_and_never_fall(parts: list[tuple[float, float, int]]) -> None:
    mechanisms = [Mechanism(*part) for part in parts]
    total = math.fsum(steps * (sensitivity / std) ** 2 for sensitivity, std, steps in parts)
    assert epsilon_spent(mechanisms, 1e-5) == pytest.approx(epsilon_of(total, 1e-5), rel=1e-12)
    assert epsilon_spent(mechanisms[:-1], 1e-5) <= epsilon_spent(mechanisms, 1e-5)


@pytest.mark.parametrize(("sigma", "steps"), [(10.0, 50), (4.0, 10), (30.0, 200), (2.0, 1)])
def test_never_below_prv_beyond_its_error_and_never_above_rdp(sigma: float, steps: int) -> None:
    ours = epsilon_spent([Mechanism(1.0, sigma, steps)], 1e-5)
    rdp = RDPAccountant()
    rdp.history = [(sigma, 1.0, steps)]
    assert ours <= rdp.get_epsilon(1e-5)
    prv = PRVAccountant()
    prv.history = [(sigma, 1.0, steps)]
    assert ours >= prv.get_epsilon(1e-5, eps_error=0.01) - 0.02  # the figure is an upper end: twice its error


@pytest.mark.parametrize("epsilon", [0.5, 3.0, 8.0])
def test_planned_noise_is_the_least_that_keeps_within_the_budget(epsilon: float) -> None:
    multiplier = plan_noise(epsilon, 1e-5, 40)
    assert epsilon_spent([Mechanism(1.0, multiplier, 40)], 1e-5) <= epsilon + 1e-9
    assert epsilon_spent([Mechanism(1.0, multiplier * 0.99, 40)], 1e-5) > epsilon


@pytest.mark.parametrize("byte", [b"\x00", b"\xff"])
def test_a_draw_is_never_infinite(byte: bytes) -> None:
    """With 53 bits the largest uniform draw was exactly 1, once in 2^53."""
    with mock.patch("secure_fed.privacy.accounting.os.urandom", lambda size: byte * size):
        assert np.all((uniforms(4) > 0) & (uniforms(4) < 1))
        assert np.all(np.isfinite(gaussian_noise(4, 1.0)))
        assert np.abs(gaussian_noise(1, 1.0)) > 8.1


def test_noise_has_its_distribution() -> None:
    draws = gaussian_noise(400_000, 3.0) / 3.0
    assert stats.kstest(draws, "norm").pvalue > 1e-6
    assert (draws.size - 1) * draws.var() == pytest.approx(draws.size, rel=0.015)
    assert np.abs(draws).max() > 4.0
    assert draws.dtype == np.float64
    inner = uniforms(100_000)
    assert 0 < inner.min() < 1e-3
    assert 1 - 1e-3 < inner.max() < 1
    assert np.unique(inner * 2.0**32 % 1).size > 90_000  # finer than 32 bits, which stop at 5.8 deviations


def test_the_operating_system_is_the_only_source_of_randomness() -> None:
    with mock.patch("os.urandom", side_effect=bytes):  # nothing but zeros
        assert (uniforms(100) == 2.0**-53).all()
        assert np.unique(gaussian_noise(100, 1.0)).size == 1


def test_no_seed_brings_noise_back() -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    first = gaussian_noise(1000, 1.0)
    torch.manual_seed(0)
    np.random.seed(0)
    assert not np.intersect1d(first, gaussian_noise(1000, 1.0)).size

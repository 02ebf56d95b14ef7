"""Released means: sensitivity by trying, recovery from sums, and the rule that turns them off."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import one_hot

from clients.private_round import _DomainTerm
from privacy.class_means import ClassMeans, exact_sum, means_of, mechanism, noisy_sum, why_not
from privacy.dp_training import PatientBatch
from privacy.gaussian import mu_squared_of
from secure_fed.study import AgreedStudy, InitialState, PrivateTraining
from tests.conftest import make_template
from tests.private_setup import make_adapter, make_batch


def shares(batch: PatientBatch, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.softmax(torch.randn(*batch.mask.shape, 3, generator=generator), dim=-1)


@given(seed=st.integers(0, 1000), radius=st.floats(0.1, 1.5), size=st.floats(0.01, 100), centred=st.booleans())
@settings(max_examples=40, deadline=None)
def test_no_patient_moves_the_sum_by_more_than_the_sensitivity(
    seed: int, radius: float, size: float, centred: bool
) -> None:
    centre = (0.3, *[0.0] * 11) if centred else ()
    constants = PrivateTraining(lmmd_radius=radius, lmmd_centre=centre)
    batch = make_batch(5, 3, seed=seed)
    batch.features[0] *= size
    for weights in (shares(batch, seed), one_hot(batch.labels, 3)):
        moved = exact_sum(batch, weights, constants) - exact_sum(batch.choose(slice(1, 5)), weights[1:], constants)
        assert np.linalg.norm(moved) <= mechanism(constants, 4.0).sensitivity * (1 + 1e-12)


def test_the_sensitivity_is_reached() -> None:
    constants = PrivateTraining()
    batch = make_batch(1, 1)
    moved = exact_sum(batch, one_hot(batch.labels, 3), constants)
    assert np.linalg.norm(moved) == pytest.approx(mechanism(constants, 4.0).sensitivity, rel=1e-9)
    assert mechanism(constants, 4.0).mu_squared == pytest.approx(1 / 16)


def test_a_broken_patient_and_one_without_images_count_nothing() -> None:
    batch = make_batch(4, 2)
    weights = one_hot(batch.labels, 3)
    expected = exact_sum(batch.choose(slice(2, 4)), weights[2:], PrivateTraining())
    batch.features[0, 0, 0] = torch.nan
    batch.mask[1] = False
    assert np.allclose(exact_sum(batch, weights, PrivateTraining()), expected)


def test_means_come_back_from_sums() -> None:
    batch = make_batch(60, 1)
    labels = batch.labels[:, 0].numpy()
    constants = PrivateTraining(lmmd_centre=(0.2, *[0.0] * 11), lmmd_radius=2.0)
    found = means_of(exact_sum(batch, one_hot(batch.labels, 3), constants), constants)
    for label in range(3):
        assert np.allclose(found.means[label], batch.features[labels == label, 0].numpy().mean(0))
    assert found.known.all()
    few = means_of(exact_sum(batch.choose(slice(0, 3)), one_hot(batch.labels[:3], 3), constants), constants)
    assert not few.known.any()


def test_noise_is_added_to_every_value() -> None:
    batch = make_batch(3, 1, dim=500)
    constants = PrivateTraining()
    weights = one_hot(batch.labels, 3)
    noise = noisy_sum(batch, weights, constants, 7.0) - exact_sum(batch, weights, constants)
    assert noise.std() == pytest.approx(7 * np.sqrt(2), rel=0.1)
    assert (noise != 0).all()


def test_means_are_off_where_they_only_waste_budget() -> None:
    # dp.md 2.3: 250 patients a class at noise 4 and radius 0.7: 0.36, usable; 50 a class: not.
    constants = PrivateTraining(lmmd_radius=0.7)
    assert why_not(constants, 4.0, 1000, 4, 512) is None
    assert "only waste budget" in str(why_not(constants, 4.0, 200, 4, 512))
    # dp.md 2.5: at epsilon 1 they need some 3,000 patients.
    noise = (0.12 * mu_squared_of(1.0, 1e-5)) ** -0.5
    assert why_not(constants, noise, 1500, 4, 512) is not None
    assert why_not(constants, noise, 3000, 4, 512) is None


def test_the_domain_term_pulls_towards_the_target() -> None:
    """Steps on its gradient alone bring adapted features of the source mean nearer to the target mean."""
    rng = np.random.default_rng(0)
    source, shift = rng.normal(size=(3, 12)), 0.5 * rng.normal(size=12)
    source /= np.linalg.norm(source, axis=1, keepdims=True) / 0.8
    target = source + shift
    target *= 0.8 / np.linalg.norm(target, axis=1, keepdims=True)
    adapter = make_adapter("low_rank")
    template = make_template(method={"adapter": "low_rank", "lmmd_weight": 1.0}, privacy={"clip": 1.0})
    agreed = AgreedStudy(template, InitialState({}, adapter.prompts.numpy(), 30.0))
    known = np.ones(3, dtype=bool)
    term = _DomainTerm(agreed, (ClassMeans(source, known), ClassMeans(target, known)))

    def distance() -> float:
        with torch.no_grad():
            moved = adapter.adapt(torch.from_numpy(source / 0.8))
        return float((moved - torch.from_numpy(target / 0.8)).norm())

    before = distance()
    for _ in range(150):
        gradients = term.gradient(adapter)
        assert sum(float(value.square().sum()) for value in gradients.values()) <= 1 + 1e-9
        for name, parameter in adapter.shared_parameters().items():
            parameter.data -= 0.2 * gradients[name]
    assert distance() < 0.8 * before


def test_without_common_classes_there_is_no_domain_term() -> None:
    adapter = make_adapter("low_rank")
    agreed = AgreedStudy(make_template(), InitialState({}, adapter.prompts.numpy(), 30.0))
    means = ClassMeans(np.zeros((3, 12)), np.array([True, False, False]))
    other = ClassMeans(np.zeros((3, 12)), np.array([False, True, True]))
    assert _DomainTerm(agreed, (means, other)).gradient(adapter) == {}

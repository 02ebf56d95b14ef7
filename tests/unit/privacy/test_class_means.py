"""Released means: sensitivity by trying, recovery from sums, and the rule that turns them off."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import one_hot

from secure_fed.privacy.accounting import mu_squared_of
from secure_fed.privacy.class_means import exact_sum, means_of, mechanism, noisy_sum, why_not
from secure_fed.privacy.dp_training import PatientBatch
from secure_fed.protocol.study_tables import PrivateTraining
from tests.private_setup import make_batch


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
    assert found.shares == pytest.approx(np.bincount(labels, minlength=3) / 60)
    few = means_of(exact_sum(batch.choose(slice(0, 3)), one_hot(batch.labels[:3], 3), constants), constants)
    assert not few.known.any()


def test_noise_is_added_to_every_value() -> None:
    batch = make_batch(3, 1, dim=500)
    constants = PrivateTraining()
    weights = one_hot(batch.labels, 3)
    shape = (weights.shape[-1], batch.features.shape[-1])
    noise = noisy_sum((batch,), lambda _: weights, shape, constants, 7.0) - exact_sum(batch, weights, constants)
    assert noise.std() == pytest.approx(7 * np.sqrt(2), rel=0.1)
    assert (noise != 0).all()
    assert np.unique(noise).size == noise.size  # a draw used twice would cancel in a difference


def test_means_are_off_where_they_only_waste_budget() -> None:
    # docs/privacy.md, Class means: 250 patients a class at noise 4 and radius 0.7: 0.36, usable; 50 a class: not.
    constants = PrivateTraining(lmmd_radius=0.7)
    assert why_not(constants, 4.0, 1000, 4, 512) is None
    assert "only waste budget" in str(why_not(constants, 4.0, 200, 4, 512))
    # At epsilon 1 they need some 2,400 patients (3,400 at radius 1).
    noise = (0.12 * mu_squared_of(1.0, 1e-5)) ** -0.5
    assert why_not(constants, noise, 1500, 4, 512) is not None
    assert why_not(constants, noise, 3000, 4, 512) is None

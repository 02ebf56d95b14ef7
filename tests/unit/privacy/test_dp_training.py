"""Clipped sums against a loop over patients; steps against plain arithmetic."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from secure_fed.core.errors import PrivateMethodError
from secure_fed.model.adapters import Adapter, build_adapter, class_prompt_loss
from secure_fed.model.adapters.text_head import TextHead
from secure_fed.privacy import dp_training
from secure_fed.privacy.dp_training import (
    Descent,
    PatientBatch,
    class_prompt_patient_loss,
    clipped_sum,
    clipped_sum_by_hooks,
    gather_patients,
    public_log_prior,
    refuse_method,
    to_double,
)
from secure_fed.protocol.basis import Basis
from secure_fed.protocol.study_tables import Method, PrivateTraining
from tests.private_setup import ADAPTERS, flat, make_adapter, make_batch, make_loss, patient_gradients, unit_rows


def brute_force(adapter: Adapter, batch: PatientBatch, clip: float) -> Tensor:
    gradients = patient_gradients(adapter, batch, make_loss())
    norms = gradients.norm(dim=1, keepdim=True)
    return (gradients * torch.clamp(clip / norms, max=1.0)).sum(0)


@pytest.mark.filterwarnings("ignore:Full backward hook")
@pytest.mark.parametrize("kind", ADAPTERS)
@given(patients=st.integers(1, 6), most=st.integers(1, 4), logarithm=st.floats(-2, 3), seed=st.integers(0, 10_000))
@settings(max_examples=12, deadline=None)
def test_ghost_norms_hooks_and_a_loop_over_patients_agree(
    kind: str, patients: int, most: int, logarithm: float, seed: int
) -> None:
    adapter, batch, clip = make_adapter(kind, seed=seed), make_batch(patients, most, seed=seed), 10**logarithm
    expected = brute_force(adapter, batch, clip)
    for found in (clipped_sum, clipped_sum_by_hooks):
        difference = (flat(found(adapter, batch, make_loss(), clip)) - expected).norm()
        assert difference <= 1e-9 * expected.norm()
    assert expected.norm() <= patients * clip * (1 + 1e-12)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_chunks_change_nothing(kind: str) -> None:
    adapter, batch = make_adapter(kind), make_batch(11)
    whole = flat(clipped_sum(adapter, batch, make_loss(), 1.0))
    with mock.patch.object(dp_training, "CHUNK", 4):
        assert torch.allclose(flat(clipped_sum(adapter, batch, make_loss(), 1.0)), whole, rtol=1e-12)


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_a_patient_with_a_broken_image_counts_nothing(kind: str, broken: float) -> None:
    adapter, batch = make_adapter(kind), make_batch(6)
    expected = flat(clipped_sum(adapter, batch.choose(torch.tensor([0, 1, 2, 4, 5])), make_loss(), 1.0))
    batch.features[3, 0, 2] = broken
    assert torch.allclose(flat(clipped_sum(adapter, batch, make_loss(), 1.0)), expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("size", [1e4, 1e8, 1e30])
def test_a_patient_whose_images_cancel_is_clipped_all_the_same(size: float) -> None:
    """What is left of huge images is less than the rounding of the products that its length is found by."""
    rng, dim, classes, clip = np.random.default_rng(0), 64, 3, 4.0
    prompts = unit_rows(rng, classes, dim)
    axes = np.linalg.qr(rng.normal(size=(dim, 32)))[0].T.copy()
    basis = Basis(np.zeros(dim), axes, 1.0, np.ones(32))
    start = {"offsets": np.zeros((classes, 32))}
    adapter = to_double(build_adapter(Method(adapter="text_head"), prompts, 30.0, start, basis=basis))
    differences = (prompts[1:] - prompts[0]).astype(np.float64)
    for _ in range(100):
        drawn = rng.normal(size=dim)
        drawn -= np.linalg.lstsq(differences.T, drawn, rcond=None)[0] @ differences
        towards = 3 * 10.0 ** -rng.uniform(6, 9) * prompts[1]
        whole = [sign * length * drawn + towards for length in rng.uniform(0.5, 1, 4) for sign in (1, -1)]
        images = torch.from_numpy(np.float32(size * np.array(whole))).double()[None]
        batch = PatientBatch(images, torch.zeros(1, 8, dtype=torch.int64), torch.ones(1, 8, dtype=torch.bool))
        assert float(flat(clipped_sum(adapter, batch, make_loss(classes), clip)).norm()) <= clip * (1 + 1e-9)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_patient_without_images_and_no_patients_count_nothing(kind: str) -> None:
    adapter, batch = make_adapter(kind), make_batch(4)
    expected = flat(clipped_sum(adapter, batch.choose(slice(0, 3)), make_loss(), 1.0))
    batch.mask[3] = False
    assert torch.allclose(flat(clipped_sum(adapter, batch, make_loss(), 1.0)), expected, rtol=1e-12, atol=1e-15)
    assert not flat(clipped_sum(adapter, batch.choose(slice(0, 0)), make_loss(), 1.0)).any()


def test_a_patients_images_are_gathered_capped_and_averaged() -> None:
    rng = np.random.default_rng(0)
    features, labels = unit_rows(rng, 6, 12), np.array([0, 1, 2, 0, 1, 2])
    one, two = gather_patients(features, labels, ["b", "a", "b", "b", "a", "c"], 2)
    assert (one.mask.tolist(), two.mask.tolist()) == ([[True]], [[True, True], [True, True]])
    assert two.labels[0].tolist() == [0, 2]
    assert np.array_equal(two.features[1].numpy(), features[[1, 4]].astype(np.float64))
    adapter = make_adapter("facmic")
    log_prior = public_log_prior(PrivateTraining(prior=(0.5, 0.3, 0.2)), 3)
    losses = torch.cat([class_prompt_patient_loss(log_prior)(adapter, batch) for batch in (two, one)])
    single = class_prompt_loss(adapter(torch.from_numpy(features).double()), torch.from_numpy(labels), log_prior)
    assert torch.allclose(losses, torch.stack([(single[0] + single[2]) / 2, (single[1] + single[4]) / 2, single[5]]))


def test_one_patient_with_many_images_makes_no_work_for_the_others() -> None:
    """Padded to the longest, 200 patients with one image each would cost 200 times 64 rows."""
    rng = np.random.default_rng(0)
    owners = [f"p{number}" for number in range(200)] + ["long"] * 64
    batches = gather_patients(unit_rows(rng, len(owners), 12), np.zeros(len(owners), dtype=np.int64), owners, 64)
    assert sum(batch.mask.numel() for batch in batches) == 264
    assert all(bool(batch.mask.all()) for batch in batches)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_the_private_loss_without_noise_or_clipping_is_the_plain_one(kind: str) -> None:
    adapter, batch = make_adapter(kind), make_batch(5, most=1)
    total = flat(clipped_sum(adapter, batch, make_loss(), 1e9))
    adapter.zero_grad()
    logits = adapter.logits(batch.features[:, 0])
    class_prompt_loss(logits, batch.labels[:, 0], public_log_prior(PrivateTraining(), 3)).sum().backward()  # type: ignore[no-untyped-call]
    plain = torch.cat([parameter.grad.flatten() for parameter in adapter.shared_parameters().values()])  # type: ignore[union-attr]
    assert torch.allclose(total, plain, rtol=1e-9, atol=1e-12)


class Scaled(TextHead):
    """Uses a parameter outside of linear layers, where ghost norms do not reach."""

    def adapt(self, features: Tensor) -> Tensor:
        return features * self.gain


class Twice(Adapter):
    """Uses a parameter in two layers."""

    def adapt(self, features: Tensor) -> Tensor:
        return nn.functional.linear(nn.functional.linear(features, self.weight), self.weight)


@pytest.mark.parametrize(
    ("kind", "parameters"),
    [(Scaled, {"offsets": np.zeros((3, 12)), "gain": np.ones(12)}), (Twice, {"weight": np.eye(12)})],
)
def test_an_adapter_that_cannot_be_clipped_is_refused(kind: type[Adapter], parameters: dict[str, np.ndarray]) -> None:
    adapter = dp_training.to_double(kind(Method(), unit_rows(np.random.default_rng(0), 3, 12), 30.0, parameters))
    with pytest.raises(PrivateMethodError, match="exactly once"):
        clipped_sum(adapter, make_batch(), make_loss(), 1.0)


def no_noise(size: int, std: float) -> np.ndarray:
    return np.zeros(size)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_step_divides_by_the_declared_number_and_never_by_the_true_one(kind: str) -> None:
    adapter, batch = make_adapter(kind), make_batch(7)
    before = {name: value.detach().clone() for name, value in adapter.shared_parameters().items()}
    total = clipped_sum(adapter, batch, make_loss(), 0.5)
    constants = PrivateTraining(clip=0.5, steps=1, learning_rate=0.1)
    Descent(constants, 1.0, 40, no_noise).run(adapter, (batch,), make_loss())
    for name, value in adapter.shared_parameters().items():
        assert torch.allclose(value, before[name] - 0.1 * total[name] / 40, rtol=1e-12, atol=1e-15)


def test_noise_of_the_declared_size_is_added_to_every_step() -> None:
    adapter, batch = make_adapter("facmic", dim=64), make_batch(3, dim=64)
    asked: list[tuple[int, float]] = []

    def noise(size: int, std: float) -> np.ndarray:
        asked.append((size, std))
        return np.full(size, std)

    constants = PrivateTraining(clip=1.0, steps=3, learning_rate=0.1)
    plain = flat(clipped_sum(adapter, batch, make_loss(), 1.0))
    assert torch.allclose(
        flat(Descent(constants, 2.5, 10, noise).noisy_sum(adapter, (batch,), make_loss())), plain + 2.5
    )
    asked.clear()
    Descent(constants, 2.5, 10, noise).run(adapter, (batch,), make_loss())
    assert sum(size for size, _ in asked) == 3 * plain.numel()
    assert {std for _, std in asked} == {2.5}


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_momentum_and_adam_see_noisy_gradients_only(optimizer: str) -> None:
    """With constant noise and no patients the optimiser's path is that of the noise alone."""
    constants = PrivateTraining.model_validate(
        {"steps": 4, "learning_rate": 0.1, "optimizer": optimizer, "momentum": 0.5}
    )
    adapter = make_adapter("text_head")
    before = adapter.offsets.detach().clone()
    Descent(constants, 5.0, 10, lambda size, std: np.full(size, std)).run(
        adapter, (make_batch(2).choose(slice(0, 0)),), make_loss()
    )
    expected = (
        -0.1 * 0.5 * sum(sum(0.5**k for k in range(step + 1)) for step in range(4)) if optimizer == "sgd" else -0.4
    )
    assert torch.allclose(adapter.offsets - before, torch.full_like(before, expected), rtol=1e-6)


def test_a_public_term_is_added_after_the_noise() -> None:
    adapter, batch = make_adapter("text_head"), make_batch(2).choose(slice(0, 0))
    before = adapter.offsets.detach().clone()
    constants = PrivateTraining(steps=1, learning_rate=1.0)
    Descent(constants, 1.0, 10, no_noise).run(
        adapter, (batch,), make_loss(), lambda moved: {"offsets": torch.ones_like(moved.offsets)}
    )
    assert torch.allclose(adapter.offsets, before - 1)


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ({"loss": "contrastive"}, "18 times the clipping norm.*class_prompt"),
        ({"norm": "batch"}, "4.4 times.*layer"),
        ({"adaptation": "adversarial"}, "discriminator is trained without noise.*lmmd"),
    ],
)
def test_the_papers_losses_are_refused_with_the_reason(method: dict[str, str], reason: str) -> None:
    with pytest.raises(PrivateMethodError, match=reason):
        refuse_method(Method.model_validate(method))


def test_every_other_method_is_taken() -> None:
    for kind in ADAPTERS:
        refuse_method(Method.model_validate({"adapter": kind}))


def test_flat_images_give_the_same_logits_as_before() -> None:
    """The adapters take [n, I, d]; on [n, d] they are what they were."""
    rng = np.random.default_rng(3)
    for kind in ADAPTERS:
        adapter = make_adapter(kind)
        features = torch.from_numpy(unit_rows(rng, 4, 5, 12)).double()
        assert torch.allclose(adapter(features)[2], adapter.logits(features[2]), rtol=1e-12)

"""The three uses of released class means, against closed forms and plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from secure_fed.clients.private_lmmd import PublicTerm, attraction, released_each_round, released_once, witness
from secure_fed.core.errors import GuardError
from secure_fed.model.adapters import Adapter
from secure_fed.privacy.class_means import ClassMeans, centre, exact_sum, means_of
from secure_fed.privacy.dp_training import (
    Descent,
    ImageTerm,
    PatientBatch,
    class_prompt_patient_loss,
    clipped_sum,
    clipped_sum_by_hooks,
    public_log_prior,
)
from secure_fed.privacy.guard import check_training
from secure_fed.protocol.study_tables import Method, PrivateTraining
from tests.private_setup import flat, make_adapter, make_batch, patient_gradients

CENTRED = {"lmmd_centre": (0.2, *[0.0] * 11), "lmmd_radius": 0.9}


def settings_of(use: str, **changes: object) -> PrivateTraining:
    return PrivateTraining.model_validate({"lmmd_use": use, "clip": 1e6, **changes})


def method_of(adapter: str, weight: float = 1.0) -> Method:
    return Method.model_validate({"adapter": adapter, "rank": 4, "lmmd_weight": weight})


def means_like(seed: int, known: tuple[bool, ...] = (True, True, True), shift: float = 0.0) -> ClassMeans:
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(3, 12)) + shift
    rows *= 0.7 / np.linalg.norm(rows, axis=1, keepdims=True)
    shares = np.array(known, dtype=float) * np.array([0.5, 0.3, 0.2])
    return ClassMeans(rows, np.array(known), shares / shares.sum())


def total(adapter: Adapter, batch: PatientBatch, term: ImageTerm | None) -> Tensor:
    """The unclipped sum of all patients' gradients, flat."""
    adapter.shows_adapted = term is not None
    loss = class_prompt_patient_loss(public_log_prior(PrivateTraining(), 3), term)
    return flat(clipped_sum(adapter, batch, loss, 1e6))


def of_term(adapter: Adapter, batch: PatientBatch, term: ImageTerm) -> Tensor:
    """The term's part of it."""
    return total(adapter, batch, term) - total(adapter, batch, None)


def gradient_of(adapter: Adapter, value: Tensor) -> Tensor:
    parameters = adapter.shared_parameters()
    found = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
    return torch.cat(
        [
            (torch.zeros_like(parameter) if one is None else one).flatten()
            for parameter, one in zip(parameters.values(), found, strict=True)
        ]
    )


@pytest.mark.parametrize("constants", [{}, CENTRED], ids=["at the origin", "centred and cut"])
@pytest.mark.parametrize("kind", ["facmic", "low_rank"])
def test_attraction_is_the_loop_over_images(kind: str, constants: dict[str, object]) -> None:
    adapter, batch = make_adapter(kind), make_batch(9, 3)
    settings = settings_of("attraction", **constants)
    target = means_like(1, (True, False, True))
    value = torch.zeros((), dtype=torch.float64)
    point, radius = centre(settings, 12), settings.lmmd_radius
    for row in range(9):
        images = [image for image in range(batch.mask.shape[1]) if batch.mask[row, image]]
        for image in images:
            label = int(batch.labels[row, image])
            if not target.known[label]:
                continue
            moved = adapter.adapt(batch.features[row, image]) - point
            if moved.norm() > radius:
                moved = moved * radius / moved.norm()
            value = value + 2.5 * (moved - torch.from_numpy(target.means[label]) + point).square().sum() / len(images)
    found = of_term(adapter, batch, attraction(method_of(kind, 2.5), settings, target))
    torch.testing.assert_close(found, gradient_of(adapter, value), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("constants", [{}, CENTRED], ids=["at the origin", "centred and cut"])
def test_the_witness_is_the_gradient_of_the_squared_distance_of_the_means(constants: dict[str, object]) -> None:
    """Closed form, without noise: patients of one image, source means and shares those of the adapter now."""
    adapter, batch = make_adapter("facmic"), make_batch(60, 1)
    settings = settings_of("witness", **constants)
    with torch.no_grad():
        adapted = PatientBatch(adapter.adapt(batch.features), batch.labels, batch.mask)
    source = means_of(exact_sum(adapted, one_hot(batch.labels, 3), settings), settings)
    target = means_like(1, (True, True, False))
    labels = batch.labels[:, 0]
    value = torch.zeros((), dtype=torch.float64)
    for label in (0, 1):
        moved = adapter.adapt(batch.features[labels == label, 0]) - centre(settings, 12)
        moved = moved * (settings.lmmd_radius / moved.norm(dim=1, keepdim=True).clamp_min(settings.lmmd_radius))
        mean = moved.mean(0) + centre(settings, 12)
        value = value + 1.5 / 2 * (mean - torch.from_numpy(target.means[label])).square().sum()
    found = of_term(adapter, batch, witness(method_of("facmic", 1.5), settings, source, target)) / 60
    torch.testing.assert_close(found, gradient_of(adapter, value), rtol=1e-9, atol=1e-10)


def test_the_witness_of_a_linear_residual_is_a_function_of_released_means_alone() -> None:
    adapter = make_adapter("low_rank")
    source, target = means_like(1), means_like(2, (True, False, True))
    value = torch.zeros((), dtype=torch.float64)
    residual = torch.eye(12, dtype=torch.float64) + adapter.up @ adapter.down  # type: ignore[operator]
    for label in (0, 2):
        moved = residual @ torch.from_numpy(source.means[label])
        value = value + 3.0 / 2 * (moved - torch.from_numpy(target.means[label])).square().sum()
    term = PublicTerm(method_of("low_rank", 3.0), settings_of("witness"), source, target)
    found = torch.cat([one.flatten() for _, one in sorted(term.gradient(adapter).items())])
    torch.testing.assert_close(found, gradient_of(adapter, value), rtol=1e-9, atol=1e-9)


def test_the_mean_of_adapted_features_is_where_the_linear_residual_takes_the_frozen_mean() -> None:
    """Why low_rank needs no new release: before normalising, the map is linear."""
    adapter, batch = make_adapter("low_rank"), make_batch(40, 1)
    settings = settings_of("witness")
    source = means_of(exact_sum(batch, one_hot(batch.labels, 3), settings), settings)
    for label in range(3):
        rows = batch.features[batch.labels[:, 0] == label, 0]
        expected = adapter.moved(rows).mean(0)  # type: ignore[operator]
        found = adapter.moved(torch.from_numpy(source.means[label]))  # type: ignore[operator]
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def image_terms() -> dict[str, ImageTerm]:
    return {
        "attraction": attraction(method_of("facmic", 5.0), settings_of("attraction"), means_like(1)),
        "witness": witness(method_of("facmic", 5.0), settings_of("witness"), means_like(2), means_like(1)),
    }


@pytest.mark.parametrize("use", ["attraction", "witness"])
@pytest.mark.parametrize("clip", [0.3, 1e3])
def test_a_term_inside_the_loss_is_clipped_with_it(use: str, clip: float) -> None:
    """The fast sum and Opacus' hooks against a loop over patients."""
    adapter, batch = make_adapter("facmic"), make_batch(7, 3)
    adapter.shows_adapted = True
    loss = class_prompt_patient_loss(public_log_prior(PrivateTraining(), 3), image_terms()[use])
    rows = patient_gradients(adapter, batch, loss)
    expected = (rows * (clip / rows.norm(dim=1, keepdim=True).clamp_min(clip))).sum(0)
    for one in (clipped_sum, clipped_sum_by_hooks):
        torch.testing.assert_close(flat(one(adapter, batch, loss, clip)), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("use", ["attraction", "witness"])
def test_the_guard_passes_a_term_of_released_means_and_catches_one_of_the_batchs_own(use: str) -> None:
    adapter = make_adapter("facmic")
    adapter.shows_adapted = True
    settings = PrivateTraining(clip=1.0)
    descent = Descent(settings, 5.0, 100)
    log_prior = public_log_prior(settings, 3)
    check_training(adapter, class_prompt_patient_loss(log_prior, image_terms()[use]), descent)

    def own_means(adapted: Tensor, labels: Tensor) -> Tensor:
        """The mistake: the means of those who happen to be in the sum, un-noised."""
        shares = one_hot(labels, 3).double()
        means = torch.einsum("nik,nid->kd", shares, adapted) / shares.sum((0, 1)).clamp_min(1)[:, None]
        return 5.0 * (adapted - means[labels].detach()).square().sum(-1)

    with pytest.raises(GuardError, match="other patients change"):
        check_training(adapter, class_prompt_patient_loss(log_prior, own_means), descent)


@pytest.mark.parametrize("adapter", ["facmic", "low_rank"])
def test_what_each_use_needs(adapter: str) -> None:
    method = method_of(adapter)
    both = ("labelled", "unlabelled")
    assert released_once(method, settings_of("synthesis")) == both
    assert released_once(method, settings_of("attraction")) == ("unlabelled",)
    assert released_once(method, settings_of("witness")) == (both if adapter == "low_rank" else ("unlabelled",))
    assert released_each_round(method, settings_of("witness")) == (adapter == "facmic")
    assert not released_each_round(method, settings_of("attraction"))
    assert not released_each_round(method, settings_of("synthesis"))


@pytest.mark.parametrize("use", ["synthesis", "witness"])
def test_a_public_term_pulls_towards_the_target(use: str) -> None:
    """Steps on its gradient alone bring adapted features of the source means nearer to the target means."""
    source, target = means_like(0), means_like(0, shift=0.5)
    adapter = make_adapter("low_rank")
    term = PublicTerm(method_of("low_rank"), settings_of(use, clip=1.0), source, target)

    def distance() -> float:
        with torch.no_grad():
            moved = adapter.adapt(torch.from_numpy(source.means / 0.7))
        return float((moved - torch.from_numpy(target.means / 0.7)).norm())

    before = distance()
    for _ in range(150):
        gradients = term.gradient(adapter)
        assert sum(float(value.square().sum()) for value in gradients.values()) <= 1 + 1e-9
        for name, parameter in adapter.shared_parameters().items():
            parameter.data -= 0.2 * gradients[name]
    assert distance() < 0.8 * before


def test_the_weight_of_a_public_term_counts_after_the_cut() -> None:
    """So a weight of 0.1 is a tenth of what one patient may do, however steep the term is."""
    source, target = means_like(0), means_like(0, shift=0.5)
    adapter = make_adapter("low_rank")
    for weight in (0.1, 1.0):
        term = PublicTerm(method_of("low_rank", weight), settings_of("witness", clip=1e-3), source, target)
        squares = sum(float(value.square().sum()) for value in term.gradient(adapter).values())
        assert np.sqrt(squares) == pytest.approx(weight * 1e-3)


def test_without_common_classes_no_use_does_anything() -> None:
    one, other = means_like(0, (True, False, False)), means_like(1, (False, True, True))
    adapter, batch = make_adapter("facmic"), make_batch()
    for use in ("synthesis", "witness"):
        assert PublicTerm(method_of("low_rank"), settings_of(use), one, other).gradient(adapter) == {}
    assert not of_term(adapter, batch, witness(method_of("facmic"), settings_of("witness"), one, other)).any()
    nothing = ClassMeans(np.zeros((3, 12)), np.zeros(3, dtype=bool), np.zeros(3))
    assert not of_term(adapter, batch, attraction(method_of("facmic"), settings_of("attraction"), nothing)).any()

"""One seeded bug a test: the guard must refuse each, and take the code as it is."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from secure_fed.core.errors import GuardError, PrivateMethodError
from secure_fed.model.adapters import Adapter, build_adapter, initial_parameters
from secure_fed.model.adapters.facmic import AttentionGate
from secure_fed.model.adapters.text_head import TextHead
from secure_fed.privacy.accounting import gaussian_noise
from secure_fed.privacy.dp_training import (
    Descent,
    Gradients,
    PatientBatch,
    PatientLoss,
    Patients,
    class_prompt_patient_loss,
    clipped_sum,
    to_double,
)
from secure_fed.privacy.guard import check_training
from secure_fed.protocol.study_tables import Method, PrivateTraining
from tests.private_setup import ADAPTERS, make_adapter, make_loss, unit_rows

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook")


def descent(noise: Callable[[int, float], NDArray[np.float64]] = gaussian_noise) -> Descent:
    return Descent(PrivateTraining(), 4.0, 100, noise)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_the_real_code_passes(kind: str) -> None:
    adapter = make_adapter(kind)
    before = {name: value.detach().clone() for name, value in adapter.shared_parameters().items()}
    check_training(adapter, make_loss(), descent())
    assert all(torch.equal(before[name], value) for name, value in adapter.shared_parameters().items())


def test_in_batch_contrastive_loss() -> None:
    def loss(forward: Callable[[Tensor], Tensor], batch: PatientBatch) -> Tensor:
        """The paper's: each image against the prompts of all images of the batch."""
        own = forward(batch.features).flatten(0, 1)
        similarity = own[:, batch.labels.flatten()]
        right = torch.arange(len(similarity))
        both = cross_entropy(similarity, right, reduction="none") + cross_entropy(similarity.T, right, reduction="none")
        return both.view(batch.mask.shape).mean(1) / 2

    with pytest.raises(GuardError, match="only the other patients change"):
        check_training(make_adapter("facmic"), loss, descent())


class BatchNormed(AttentionGate):
    """A norm module where the gate has its own."""

    def __init__(self, affine: bool, track: bool) -> None:
        rng = np.random.default_rng(0)
        prompts = unit_rows(rng, 3, 12)
        parameters = initial_parameters(Method(), 12, prompts, 0)
        super().__init__(Method(), prompts, 30.0, parameters)
        self.norm = nn.BatchNorm1d(12, affine=affine, track_running_stats=track)


@pytest.mark.parametrize(
    ("affine", "track", "says"),
    [
        (True, True, r"buffers norm\.running_mean"),
        (False, True, r"buffers norm\.running_mean"),
        (True, False, "module norm is a BatchNorm1d"),
        (False, False, "module norm is a BatchNorm1d"),
    ],
)
def test_batch_norm_modules(affine: bool, track: bool, says: str) -> None:
    with pytest.raises(GuardError, match=says):
        check_training(to_double(BatchNormed(affine, track)), make_loss(), descent())


class NormedByHand(TextHead):
    """Batch statistics without any module that says so."""

    def adapt(self, features: Tensor) -> Tensor:
        rows = features.flatten(0, -2)
        return (features - rows.mean(0)) / rows.std(0, correction=0).clamp_min(1e-3)


def test_batch_norm_by_hand() -> None:
    prompts = unit_rows(np.random.default_rng(0), 3, 12)
    adapter = to_double(NormedByHand(Method(), prompts, 30.0, {"offsets": np.zeros((3, 12))}))
    with pytest.raises(GuardError, match="mixes the patients"):
        check_training(adapter, make_loss(), descent())


def test_the_papers_own_batch_norm() -> None:
    prompts = unit_rows(np.random.default_rng(0), 3, 12)
    method = Method(norm="batch")
    adapter = to_double(build_adapter(method, prompts, 30.0, initial_parameters(method, 12, prompts, 0)))
    with pytest.raises(PrivateMethodError, match="cannot be clipped"):
        check_training(adapter, make_loss(), descent())


def test_a_class_prior_from_counts() -> None:
    def loss(forward: Callable[[Tensor], Tensor], batch: PatientBatch) -> Tensor:
        counts = torch.bincount(batch.labels[batch.mask], minlength=3) + 1e-3
        return class_prompt_patient_loss(torch.log(counts / counts.sum()))(forward, batch)

    with pytest.raises(GuardError, match="class counts"):
        check_training(make_adapter("text_head"), loss, descent())


def test_a_class_prior_from_the_classes_that_are_there() -> None:
    """Without the last patient of a class, all the others' gradients change."""

    def loss(forward: Callable[[Tensor], Tensor], batch: PatientBatch) -> Tensor:
        there = (torch.bincount(batch.labels[batch.mask], minlength=3) > 0) + 1e-3
        return class_prompt_patient_loss(torch.log(there / there.sum()))(forward, batch)

    with pytest.raises(GuardError, match="only the other patients change"):
        check_training(make_adapter("text_head"), loss, descent())


def test_class_weights_from_counts() -> None:
    def loss(forward: Callable[[Tensor], Tensor], batch: PatientBatch) -> Tensor:
        counts = torch.bincount(batch.labels[batch.mask], minlength=3).clamp_min(1)
        return make_loss()(forward, batch) / counts[batch.labels[:, 0]]

    # Weights scale a gradient that is clipped anyway: they show where it is below the norm.
    with pytest.raises(GuardError, match="class counts"):
        check_training(make_adapter("low_rank", scale=0.1), loss, descent())


class PrivateHead(AttentionGate):
    """Class offsets that are trained here and never shared, so never noised."""

    def __init__(self) -> None:
        prompts = unit_rows(np.random.default_rng(0), 3, 12)
        super().__init__(Method(), prompts, 30.0, initial_parameters(Method(), 12, prompts, 0))
        self.head = nn.Parameter(torch.zeros(3, 12))

    def class_vectors(self) -> Tensor:
        return nn.functional.normalize(self.prompts + self.head, dim=1)

    def shared_parameters(self) -> dict[str, nn.Parameter]:
        return {name: value for name, value in super().shared_parameters().items() if name != "head"}


def test_an_un_noised_private_head() -> None:
    with pytest.raises(GuardError, match="head are trained but not shared"):
        check_training(to_double(PrivateHead()), make_loss(), descent())


def test_an_un_noised_private_head_that_hides_in_the_loss() -> None:
    head = torch.zeros(3, dtype=torch.float64)

    def loss(forward: Callable[[Tensor], Tensor], batch: PatientBatch) -> Tensor:
        values = class_prompt_patient_loss(head.clone())(forward, batch)
        head[:] = torch.bincount(batch.labels.flatten(), minlength=3) * 0.3  # what it has learnt
        return values

    with pytest.raises(GuardError, match=r"state is kept|mixes the patients"):
        check_training(make_adapter("facmic"), loss, descent())


def unclipped(adapter: Adapter, batch: PatientBatch, loss: PatientLoss, clip: float) -> Gradients:
    return clipped_sum(adapter, batch, loss, 1e9)


def clipped_as_a_batch(adapter: Adapter, batch: PatientBatch, loss: PatientLoss, clip: float) -> Gradients:
    total = clipped_sum(adapter, batch, loss, 1e9)
    norm = torch.sqrt(sum(value.square().sum() for value in total.values()) + torch.tensor(1e-12))
    return {name: value * min(1.0, float(len(batch.mask) * clip / norm)) for name, value in total.items()}


def with_another_clip(adapter: Adapter, batch: PatientBatch, loss: PatientLoss, clip: float) -> Gradients:
    return clipped_sum(adapter, batch, loss, clip / 2)


@pytest.mark.parametrize(
    ("clipped", "says"),
    [
        (unclipped, "removing one patient moves the clipped sum"),
        (clipped_as_a_batch, "only the other patients change"),
        (with_another_clip, "differs by .* from that of Opacus"),
    ],
)
def test_a_missing_or_wrong_clip(clipped: Callable[..., Gradients], says: str) -> None:
    with pytest.raises(GuardError, match=says):
        check_training(make_adapter("facmic"), make_loss(), descent(), clipped)


def test_a_sum_that_remembers_others() -> None:
    """What it keeps is in every later sum alike, so that no difference of two shows it."""
    kept: Gradients = {}

    def remembering(adapter: Adapter, batch: PatientBatch, loss: PatientLoss, clip: float) -> Gradients:
        total = clipped_sum(adapter, batch, loss, clip)
        found = {name: value + kept.get(name, 0.0) for name, value in total.items()}
        if batch.labels[batch.mask].unique().numel() == 1:
            kept.update({name: 0.1 * value + kept.get(name, 0.0) for name, value in total.items()})
        return found

    with pytest.raises(GuardError, match="state is kept"):
        check_training(make_adapter("facmic"), make_loss(), descent(), remembering)


@pytest.mark.parametrize("factor", [0.1, 0.5, 0.98, 1.02])
def test_noise_of_the_wrong_size(factor: float) -> None:
    with pytest.raises(GuardError, match="declared standard deviation"):
        check_training(
            make_adapter("text_head"), make_loss(), descent(lambda size, std: gaussian_noise(size, std * factor))
        )


def test_noise_of_the_wrong_shape() -> None:
    def uniform(size: int, std: float) -> NDArray[np.float64]:
        return np.random.default_rng().uniform(-1, 1, size) * std * np.sqrt(3)

    with pytest.raises(GuardError, match="not Gaussian"):
        check_training(make_adapter("text_head"), make_loss(), descent(uniform))


def test_noise_that_follows_from_the_noise_before() -> None:
    """Each draw is N(0, s^2), and none comes back; a difference of two has less noise than was paid for."""
    kept: list[NDArray[np.float64]] = []

    def dependent(size: int, std: float) -> NDArray[np.float64]:
        fresh = gaussian_noise(size, 1.0)
        kept.append(0.8 * kept[-1] + 0.6 * fresh if kept else fresh)
        return kept[-1] * std

    with pytest.raises(GuardError, match="draws of noise are correlated"):
        check_training(make_adapter("text_head"), make_loss(), descent(dependent))


def torch_noise(size: int, std: float) -> NDArray[np.float64]:
    return torch.randn(size, dtype=torch.float64).numpy() * std


def numpy_noise(size: int, std: float) -> NDArray[np.float64]:
    return np.random.normal(0, std, size)


def fixed_noise(size: int, std: float) -> NDArray[np.float64]:
    return np.random.default_rng(7).normal(0, std, size)


@pytest.mark.parametrize("noise", [torch_noise, numpy_noise, fixed_noise])
def test_a_seedable_or_reused_seed(noise: Callable[[int, float], NDArray[np.float64]]) -> None:
    torch_state, numpy_state = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    with pytest.raises(GuardError, match="came back under the same seed"):
        check_training(make_adapter("text_head"), make_loss(), descent(noise))
    assert torch.equal(torch.random.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)


def test_a_shared_buffer() -> None:
    adapter = make_adapter("facmic")
    adapter.register_buffer("running_mean", torch.zeros(12))
    with pytest.raises(GuardError, match="buffers running_mean"):
        check_training(adapter, make_loss(), descent())


def test_a_broken_image_that_spoils_the_sum() -> None:
    def fragile(adapter: Adapter, batch: PatientBatch, loss: PatientLoss, clip: float) -> Gradients:
        total = clipped_sum(adapter, batch, loss, clip)
        poison = batch.features.sum() * 0  # NaN if any image is
        return {name: value + poison for name, value in total.items()}

    with pytest.raises(GuardError, match="non-finite image"):
        check_training(make_adapter("facmic"), make_loss(), descent(), fragile)


def test_noise_that_is_declared_but_not_added() -> None:
    class Silent(Descent):
        def noisy_sum(self, adapter: Adapter, patients: Patients, loss: PatientLoss) -> Gradients:
            (batch,) = patients
            return clipped_sum(adapter, batch, loss, self.settings.clip)

    with pytest.raises(GuardError, match="noise on a sum"):
        check_training(make_adapter("facmic"), make_loss(), Silent(PrivateTraining(), 4.0, 100))

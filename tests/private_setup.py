"""Small adapters and patients for the tests of private training."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from secure_fed.model.adapters import Adapter, build_adapter, initial_parameters
from secure_fed.privacy.dp_training import (
    Gradients,
    PatientBatch,
    PatientLoss,
    Patients,
    class_prompt_patient_loss,
    gather_patients,
    public_log_prior,
    to_double,
)
from secure_fed.protocol.study_tables import Method, PrivateTraining

torch.set_num_threads(1)  # as sites do; on tiny arrays two threads mostly wait for each other

ADAPTERS = ("facmic", "low_rank", "text_head")


def unit_rows(rng: np.random.Generator, *shape: int) -> NDArray[np.float32]:
    rows = rng.normal(size=shape)
    return np.asarray(rows / np.linalg.norm(rows, axis=-1, keepdims=True), dtype=np.float32)


def make_adapter(kind: str, dim: int = 12, classes: int = 3, seed: int = 0, scale: float = 30.0) -> Adapter:
    """An adapter in float64, a little off its initial parameters."""
    rng = np.random.default_rng(seed)
    method = Method.model_validate({"adapter": kind, "rank": 4})
    prompts = unit_rows(rng, classes, dim)
    parameters = initial_parameters(method, dim, prompts, 1)
    moved = {name: value + rng.normal(0, 0.05, value.shape) for name, value in parameters.items()}
    return to_double(build_adapter(method, prompts, scale, moved))


def make_batch(
    patients: int = 7, most: int = 3, dim: int = 12, classes: int = 3, seed: int = 0, cap: int = 100
) -> PatientBatch:
    """Patients with one to ``most`` images each."""
    rng = np.random.default_rng(seed)
    owners = [f"p{number}" for number in range(patients) for _ in range(rng.integers(1, most + 1))]
    labels = rng.integers(0, classes, len(owners))
    return padded(gather_patients(unit_rows(rng, len(owners), dim), labels, owners, cap), dim)


def padded(batches: Patients, dim: int) -> PatientBatch:
    """One batch of several, with empty places, as adapters and losses must bear them too."""
    most = max((batch.mask.shape[1] for batch in batches), default=1)
    empty = torch.zeros(dim, dtype=torch.float64)
    empty[0] = 1.0
    features, labels, masks = [], [], []
    for batch in batches:
        count, size = batch.mask.shape
        features.append(torch.cat((batch.features, empty.expand(count, most - size, dim)), dim=1))
        labels.append(torch.nn.functional.pad(batch.labels, (0, most - size)))
        masks.append(torch.nn.functional.pad(batch.mask, (0, most - size)))
    if not features:
        return PatientBatch(empty.expand(0, 1, dim), torch.zeros(0, 1, dtype=torch.int64), torch.zeros(0, 1).bool())
    return PatientBatch(torch.cat(features), torch.cat(labels), torch.cat(masks))


def make_loss(classes: int = 3) -> PatientLoss:
    return class_prompt_patient_loss(public_log_prior(PrivateTraining(), classes))


def flat(gradients: Gradients) -> Tensor:
    return torch.cat([gradients[name].flatten() for name in sorted(gradients)])


def patient_gradients(adapter: Adapter, batch: PatientBatch, loss: PatientLoss) -> Tensor:
    """Each patient's gradient, [n, parameters], by one backward pass a patient."""
    rows = []
    for index in range(len(batch.mask)):
        adapter.zero_grad()
        images = batch.mask[index]
        alone = PatientBatch(
            batch.features[index][images][None], batch.labels[index][images][None], images[images][None]
        )
        loss(adapter, alone).sum().backward()  # type: ignore[no-untyped-call]
        rows.append(
            torch.cat([parameter.grad.flatten() for parameter in adapter.shared_parameters().values()])  # type: ignore[union-attr]
        )
    return torch.stack(rows)

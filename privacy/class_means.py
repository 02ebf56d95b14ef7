"""Class-conditional means of features, released once with noise; all later use is post-processing.

The formulas are in docs/privacy.md, "Class means".

A patient contributes the mean over its images of concat_c p_c(u) (psi(u), kappa), where psi(u) is u relative to a
public centre, cut to radius R, p are class weights that sum to 1 (one-hot for labels) and kappa = R carries the mass.
Its norm is at most sqrt(R^2 + kappa^2) = R sqrt(2), which is what one patient moves the sum by.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from secure_fed.privacy.accounting import Mechanism, Noise, gaussian_noise
from secure_fed.privacy.dp_training import PatientBatch, Patients
from secure_fed.protocol.study_tables import PrivateTraining

LARGEST_ERROR = 0.4
"""Expected error of a class mean above which the means are noise and LMMD is turned off: 0.36 for 250 patients a
class is usable, 1.8 for 50 is not (docs/privacy.md, Class means)."""

LEAST_MASS = 5.0
"""Noisy number of patients below which a class has no mean."""


@dataclass(frozen=True)
class ClassMeans:
    """Released means: ``means`` float64 [K, d], ``known`` bool [K], which classes have one, and ``shares`` float64
    [K], the released shares of those classes, 0 for the others."""

    means: NDArray[np.float64]
    known: NDArray[np.bool_]
    shares: NDArray[np.float64]


def mechanism(settings: PrivateTraining, noise_multiplier: float) -> Mechanism:
    """What one release costs."""
    sensitivity = settings.lmmd_radius * math.sqrt(2)
    return Mechanism(sensitivity, noise_multiplier * sensitivity, 1)


def why_not(settings: PrivateTraining, noise_multiplier: float, n_ref: int, classes: int, dim: int) -> str | None:
    """Why means under this noise would only waste budget, from public figures alone; None if they would not."""
    error = noise_multiplier * settings.lmmd_radius * math.sqrt(2 * dim) / (n_ref / classes)
    if error <= LARGEST_ERROR:
        return None
    return (
        f"off: with {n_ref} patients declared the class means would be {error:.2f} off, and above {LARGEST_ERROR} "
        "they only waste budget"
    )


def noisy_sum(
    patients: Patients,
    weights: Callable[[PatientBatch], Tensor],
    shape: tuple[int, int],
    settings: PrivateTraining,
    noise_multiplier: float,
    noise: Noise = gaussian_noise,
) -> NDArray[np.float64]:
    """The noised sum of the patients' contributions, float64 [K, d + 1].

    Args:
        patients: nobody included; a patient that is not finite contributes zero.
        weights: gives a batch's [n, I, K], rows sum to 1.
        shape: (K, d).
        settings: public radius and centre.
        noise_multiplier: noise over sensitivity.
        noise: where noise comes from; anything but the default is for rehearsals and tests.
    """
    total = np.zeros((shape[0], shape[1] + 1))
    for batch in patients:
        total += exact_sum(batch, weights(batch), settings)
    std = mechanism(settings, noise_multiplier).noise_std
    return total + noise(total.size, std).reshape(total.shape)


def exact_sum(batch: PatientBatch, weights: Tensor, settings: PrivateTraining) -> NDArray[np.float64]:
    """The sum before noise."""
    radius = settings.lmmd_radius
    moved = cut(torch.nn.functional.normalize(batch.features, dim=-1), settings)
    extended = torch.cat((moved, torch.full_like(moved[..., :1], radius)), dim=-1)
    shares = torch.where(batch.mask, 1.0, 0.0).double() / batch.mask.sum(1, keepdim=True).clamp_min(1)
    each = torch.einsum("ni,nik,nid->nkd", shares, weights.double(), extended)
    finite = torch.isfinite(each).flatten(1).all(1)
    return np.asarray(torch.where(finite[:, None, None], each, 0.0).sum(0).numpy())


def cut(unit: Tensor, settings: PrivateTraining) -> Tensor:
    """psi: unit features [..., d] relative to the public centre, cut to the public radius."""
    moved = unit - centre(settings, unit.shape[-1])
    radius = settings.lmmd_radius
    norms: Tensor = torch.linalg.vector_norm(moved, dim=-1, keepdim=True)
    return moved * (radius / norms.clamp_min(radius))


def means_of(noisy: NDArray[np.float64], settings: PrivateTraining) -> ClassMeans:
    """The means that a noised sum gives."""
    mass = noisy[:, -1] / settings.lmmd_radius
    known = mass >= LEAST_MASS
    means = noisy[:, :-1] / np.maximum(mass, LEAST_MASS)[:, None] + centre(settings, noisy.shape[1] - 1).numpy()
    shares = np.where(known, mass, 0.0)
    return ClassMeans(means, known, shares / max(shares.sum(), LEAST_MASS))


def centre(settings: PrivateTraining, dim: int) -> Tensor:
    """The public centre c0, float64 [d]."""
    if not settings.lmmd_centre:
        return torch.zeros(dim, dtype=torch.float64)
    return torch.tensor(settings.lmmd_centre, dtype=torch.float64)

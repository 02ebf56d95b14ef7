"""LMMD under differential privacy: three uses of released class means (docs/privacy.md, The three domain terms).

The domain term compares adapted labelled features with the site's unlabelled ones only through class means that the
ledger has paid for, so that every use is post-processing of them or part of a patient's own, clipped gradient.

``synthesis``   LMMD itself, five kernels, on features made up around the means of both sides; a public gradient.
``attraction``  each image is drawn to the unlabelled mean of its class: lambda |psi(z_i) - m_t^y|^2.
``witness``     the gradient of the squared distance of the class means, (1/K) sum_c |m_s^c - m_t^c|^2. The source mean
                must be that of the adapter now: for the linear residual of ``low_rank`` it is the image of the frozen
                one, a public gradient at no further cost; else it is released anew in each round.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from secure_fed.clients.lmmd import lmmd
from secure_fed.model.adapters import Adapter
from secure_fed.model.adapters.low_rank import LowRank
from secure_fed.privacy.class_means import ClassMeans, centre, cut
from secure_fed.privacy.dp_training import Gradients, ImageTerm
from secure_fed.protocol.study_tables import Method, PrivateTraining

SYNTHETIC_BATCH = 128
"""Synthetic features that a step of ``synthesis`` draws on each side."""

Side = Literal["labelled", "unlabelled"]


def released_once(method: Method, settings: PrivateTraining) -> tuple[Side, ...]:
    """Whose means a use needs at the beginning of a run."""
    both = settings.lmmd_use == "synthesis" or (settings.lmmd_use == "witness" and method.adapter == "low_rank")
    return ("labelled", "unlabelled") if both else ("unlabelled",)


def released_each_round(method: Method, settings: PrivateTraining) -> bool:
    """Whether a use needs the means of the adapted labelled features anew in each round."""
    return settings.lmmd_use == "witness" and method.adapter != "low_rank"


class PublicTerm:
    """A domain term that depends on released means alone: its gradient is added to the noisy one.

    Args:
        method: with the term's weight.
        settings: public constants; before it is weighted the gradient is cut to their clipping norm, as each patient's
            is, so that the weight says how it compares with theirs.
        source: means of the frozen labelled features.
        target: means of the unlabelled features.
    """

    def __init__(self, method: Method, settings: PrivateTraining, source: ClassMeans, target: ClassMeans) -> None:
        self._weight = method.domain_weight
        self._settings = settings
        self._source, self._target = source, target
        self._classes = np.flatnonzero(source.known & target.known)
        self._generator = np.random.default_rng()

    def gradient(self, adapter: Adapter) -> Gradients:
        """Of the weighted term, by parameter; empty if no class has a mean on both sides."""
        if not self._classes.size:
            return {}
        term = self._synthesis(adapter) if self._settings.lmmd_use == "synthesis" else self._distance(adapter)
        parameters = adapter.shared_parameters()
        found = torch.autograd.grad(term, list(parameters.values()), allow_unused=True)
        gradients = {name: value for name, value in zip(parameters, found, strict=True) if value is not None}
        norm = torch.sqrt(sum((value.square().sum() for value in gradients.values()), torch.zeros(())))
        factor = self._weight * self._settings.clip / max(float(norm), self._settings.clip)
        return {name: value * factor for name, value in gradients.items()}

    def _synthesis(self, adapter: Adapter) -> Tensor:
        labels = torch.from_numpy(self._generator.choice(self._classes, SYNTHETIC_BATCH))
        source, target = (self._around(means, labels.numpy()) for means in (self._source, self._target))
        return lmmd(adapter.adapt(source), labels, target, one_hot(labels, len(self._source.known)).double())

    def _around(self, means: ClassMeans, labels: NDArray[np.int64]) -> Tensor:
        """Unit features, each its class mean and an isotropic remainder that fills it up to length 1."""
        chosen = means.means[labels]
        noise = self._generator.standard_normal(chosen.shape) / np.sqrt(chosen.shape[1])
        rest = np.sqrt(np.clip(1 - np.sum(chosen * chosen, axis=1, keepdims=True), 0, 1))
        return normalize(torch.from_numpy(chosen + rest * noise), dim=1)

    def _distance(self, adapter: Adapter) -> Tensor:
        """(1/K) sum_c |L m_s^c - m_t^c|^2 over the common classes, L the adapter before it normalises."""
        assert isinstance(adapter, LowRank)  # no other asks for it
        source = adapter.moved(torch.from_numpy(self._source.means[self._classes]))
        target = torch.from_numpy(self._target.means[self._classes])
        return (source - target).square().sum() / len(self._classes)


def attraction(method: Method, settings: PrivateTraining, target: ClassMeans) -> ImageTerm:
    """lambda |psi(z_i) - (m_t^y - c0)|^2, a bound on the distance of the means by Jensen; 0 for a class without one."""
    means = _relative(target, settings)
    weights = method.domain_weight * torch.from_numpy(target.known).double()

    def term(adapted: Tensor, labels: Tensor) -> Tensor:
        return weights[labels] * (cut(adapted, settings) - means[labels]).square().sum(-1)

    return term


def witness(method: Method, settings: PrivateTraining, source: ClassMeans, target: ClassMeans) -> ImageTerm:
    """lambda 2 / (K pi_y) <psi(z_i), m_s^y - m_t^y>: its mean over the images has the gradient of
    (lambda / K) sum_c |m_s^c - m_t^c|^2 over the K common classes, for the source means and shares pi that were
    released; 0 for the other classes."""
    common = source.known & target.known
    difference = _relative(source, settings) - _relative(target, settings)
    weights = np.zeros(len(common))
    weights[common] = 2 * method.domain_weight / (max(common.sum(), 1) * source.shares[common])
    directions = torch.from_numpy(weights)[:, None] * difference

    def term(adapted: Tensor, labels: Tensor) -> Tensor:
        return (cut(adapted, settings) * directions[labels]).sum(-1)

    return term


def _relative(means: ClassMeans, settings: PrivateTraining) -> Tensor:
    """Class means relative to the public centre, [K, d]."""
    return torch.from_numpy(means.means) - centre(settings, means.means.shape[1])

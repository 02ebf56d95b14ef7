"""LiRA, the likelihood-ratio membership attack, on cached features (Carlini et al., arXiv 2112.03570).

Shadow models of a small head on frozen features train in fractions of a second, so that an attack with tens of them
is cheap. It is an attack report, not a bound: what it does not find may still be there.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from privacy.dp_training import Descent, class_prompt_patient_loss, gather_patients, public_log_prior, to_double
from privacy.gaussian import Noise, gaussian_noise, plan_noise
from secure_fed.adapters import build_adapter
from secure_fed.study import Method, PrivateTraining

Train = Callable[[NDArray[np.bool_]], NDArray[np.float64]]
"""Trains on the patients that take part [n] and gives the log-odds of every patient's own label [n]."""


@dataclass(frozen=True)
class AttackResult:
    """How well members were told from others.

    Attributes:
        true_positive_rate: share of members found at the false positive rate, in [0, 1].
        false_positive_rate: at which the threshold was set.
        auc: area under the ROC curve; 0.5 is guessing.
        shadows: models trained.
        patients: in the attacked set.
    """

    true_positive_rate: float
    false_positive_rate: float
    auc: float
    shadows: int
    patients: int


def lira(train: Train, patients: int, *, shadows: int = 32, false_positive_rate: float = 0.01) -> AttackResult:
    """Attack each of the shadow models with the help of all others.

    Args:
        train: trains one model; is called ``shadows`` times.
        patients: n.
        shadows: models, each on a random half of the patients; 8 or more.
        false_positive_rate: at which to report the true positive rate.
    """
    generator = np.random.default_rng(secrets.randbits(64))
    members = generator.random((shadows, patients)) < 0.5
    scores = np.stack([train(one) for one in members])
    ratios = np.stack([_ratio(scores, members, target) for target in range(shadows)])
    inside, outside = ratios[members], ratios[~members]
    threshold = np.quantile(outside, 1 - false_positive_rate)
    auc = float(stats.mannwhitneyu(inside, outside).statistic / (inside.size * outside.size))
    return AttackResult(float(np.mean(inside > threshold)), false_positive_rate, auc, shadows, patients)


def _ratio(scores: NDArray[np.float64], members: NDArray[np.bool_], target: int) -> NDArray[np.float64]:
    """Log-likelihood ratio of membership in one model, patient by patient, from Gaussian fits to the others."""
    others = np.arange(len(scores)) != target
    total = np.zeros(scores.shape[1])
    for sign, chosen in ((1, members[others]), (-1, ~members[others])):
        counts = np.maximum(chosen.sum(0), 1)
        mean = np.where(chosen, scores[others], 0).sum(0) / counts
        # One spread for all patients: with tens of models a patient's own is too uncertain (LiRA's global variance).
        spread = np.sqrt(np.where(chosen, (scores[others] - mean) ** 2, 0).sum() / counts.sum())
        total += sign * stats.norm.logpdf(scores[target], mean, max(float(spread), 1e-12))
    return total


def log_odds(probabilities: NDArray[np.float64], labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """log(p / (1 - p)) of each patient's own label [n], from probabilities [n, K]."""
    own = np.clip(probabilities[np.arange(len(labels)), labels], 1e-12, 1 - 1e-12)
    return np.asarray(np.log(own) - np.log1p(-own))


def attack_with_and_without(
    epsilon: float, delta: float, *, patients: int = 200, shadows: int = 32
) -> tuple[AttackResult, AttackResult]:
    """The attack on a text head that learns synthetic patients with random labels by heart, with privacy and without.

    Args:
        epsilon: of the private one, above 0.
        delta: in (0, 1).
        patients: half of which each model trains on.
        shadows: as for :func:`lira`.

    Returns:
        With privacy, and without: same features, adapter, optimiser and steps, but no clipping and no noise.
    """
    dim, classes = 64, 4
    generator = torch.Generator().manual_seed(secrets.randbits(60))
    features = torch.nn.functional.normalize(torch.randn(patients, dim, generator=generator), dim=1).numpy()
    prompts = torch.nn.functional.normalize(torch.randn(classes, dim, generator=generator), dim=1).numpy()
    labels = torch.randint(0, classes, (patients,), generator=generator).numpy()
    loss = class_prompt_patient_loss(public_log_prior(PrivateTraining(), classes))

    def train(clip: float, noise: Noise, rate: float) -> Train:
        settings = PrivateTraining(clip=clip, steps=40, learning_rate=rate)
        multiplier = plan_noise([], epsilon, delta, settings.steps)
        assert multiplier is not None  # an untouched budget pays for any plan
        descent = Descent(settings, multiplier * clip, patients // 2, noise)

        def one(members: NDArray[np.bool_]) -> NDArray[np.float64]:
            start = {"offsets": np.zeros((classes, dim))}
            adapter = to_double(build_adapter(Method(adapter="text_head"), prompts, 20.0, start))
            names = [str(number) for number in np.flatnonzero(members)]
            descent.run(adapter, gather_patients(features[members], labels[members], names, 1), loss)
            with torch.no_grad():
                logits: Tensor = adapter(torch.from_numpy(features).double())
                return log_odds(torch.softmax(logits, dim=1).numpy(), labels)

        return one

    private = lira(train(1.0, gaussian_noise, 0.5), patients, shadows=shadows)
    plain = lira(train(1e6, _no_noise, 0.05), patients, shadows=shadows)
    return private, plain


def _no_noise(size: int, std: float) -> NDArray[np.float64]:
    return np.zeros(size)

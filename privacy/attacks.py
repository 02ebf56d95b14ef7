"""Attacks on what leaves a site: who took part in training, and what their features were.

Membership is told by LiRA, the likelihood-ratio attack (Carlini et al., arXiv 2112.03570): shadow models of a small
head on frozen features train in fractions of a second, so that an attack with tens of them is cheap. Inversion takes
features from an update: the gradient of a layer that reads them is a sum of them, row by row (Phong et al., 2017, doi
10.1109/TIFS.2017.2787987, section III). Both are attack reports, not bounds: what they do not find may still be there.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from sklearn.metrics import roc_curve
from torch import Tensor
from torch.nn.functional import normalize

from secure_fed.model.adapters import Adapter, build_adapter
from secure_fed.privacy.accounting import Noise, gaussian_noise, plan_noise
from secure_fed.privacy.dp_training import (
    Descent,
    class_prompt_patient_loss,
    gather_patients,
    public_log_prior,
    to_double,
)
from secure_fed.protocol.study_tables import Method, PrivateTraining

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
        auc_interval: 95 % confidence, by resampling patients.
        roc: up to some 50 points (false positive rate, true positive rate) from (0, 0) to (1, 1).
    """

    true_positive_rate: float
    false_positive_rate: float
    auc: float
    shadows: int
    patients: int
    auc_interval: tuple[float, float]
    roc: tuple[tuple[float, float], ...]


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
    return membership(np.stack([train(one) for one in members]), members, false_positive_rate)


def membership(
    scores: NDArray[np.float64], members: NDArray[np.bool_], false_positive_rate: float = 0.01
) -> AttackResult:
    """Attack each of the models with the help of all others.

    Args:
        scores: log-odds of each patient's own label under each model, [models, patients].
        members: whom each model trained on, likewise.
        false_positive_rate: at which to report the true positive rate.
    """
    ratios = np.stack([_ratio(scores, members, target) for target in range(len(scores))])
    inside, outside = ratios[members], ratios[~members]
    threshold = np.quantile(outside, 1 - false_positive_rate)
    rates = np.stack(roc_curve(members.ravel(), ratios.ravel())[:2], axis=1)
    grid = np.concatenate([[0.0], np.geomspace(1e-3, 1, 25), np.linspace(0, 1, 25)])  # what matters is at the left
    places = np.unique(np.searchsorted(rates[:, 0], grid).clip(0, len(rates) - 1))
    shown = rates[np.unique([0, *places, len(rates) - 1])]
    return AttackResult(
        true_positive_rate=float(np.mean(inside > threshold)),
        false_positive_rate=false_positive_rate,
        auc=_auc(ratios, members),
        shadows=len(scores),
        patients=scores.shape[1],
        auc_interval=_auc_interval(ratios, members),
        roc=tuple((round(float(x), 5), round(float(y), 5)) for x, y in shown),
    )


def _auc(ratios: NDArray[np.float64], members: NDArray[np.bool_]) -> float:
    inside, outside = ratios[members], ratios[~members]
    return float(stats.mannwhitneyu(inside, outside).statistic / (inside.size * outside.size))


def _auc_interval(ratios: NDArray[np.float64], members: NDArray[np.bool_]) -> tuple[float, float]:
    """Percentile bootstrap: a patient's ratios under all models are drawn together, as they depend on each other."""
    generator = np.random.default_rng(0)
    patients = ratios.shape[1]
    drawn = (generator.integers(0, patients, patients) for _ in range(200))
    low, high = np.quantile([_auc(ratios[:, one], members[:, one]) for one in drawn], [0.025, 0.975])
    return float(low), float(high)


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
        multiplier = plan_noise(epsilon, delta, settings.steps)
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


# --- inversion ---


class PublicFeatures:
    """What an attacker knows of features without any of the attacked site's: mean and spread of public images' ones.

    Args:
        features: unit rows [n, d] of public images of the same kind.
    """

    RIDGE = 1e-3
    """Added to each variance, as a share of the largest: directions in which public features hardly vary are noise."""

    def __init__(self, features: NDArray[np.floating]) -> None:
        x = features.astype(np.float64)
        self._mean = x.mean(axis=0)
        centred = x - self._mean
        variances, axes = np.linalg.eigh(centred.T @ centred / len(x))
        scales = 1 / np.sqrt(np.maximum(variances, 0) + self.RIDGE * variances[-1])
        self._whitening = (axes * scales) @ axes.T

    def directions(self, features: NDArray[np.floating]) -> NDArray[np.float64]:
        """Features [n, d] as unit rows that tell images apart: relative to the mean, each direction by its spread."""
        return _unit((features.astype(np.float64) - self._mean) @ self._whitening)

    def mixtures(self, rows: NDArray[np.float64]) -> NDArray[np.float64]:
        """The same of weighted sums of features [m, d] with unknown weights, whose share of the mean is taken out."""
        mean = self._mean / np.linalg.norm(self._mean)
        return _unit((rows - np.outer(rows @ mean, mean)) @ self._whitening)


def reconstruct(
    adapter: Adapter, update: Mapping[str, NDArray[np.float64]], public: PublicFeatures
) -> NDArray[np.float64]:
    """Features that an update was made of, as far as it shows them.

    An update of a weight that multiplies features is, for plain descent, a sum of the training images' features in
    each row, with unknown weights; of other optimisers it is nearly one. Each row, and its negative, is one guess.

    Args:
        adapter: after the update, float32.
        update: of its parameters, by name.
        public: by which rows are made comparable with features.

    Returns:
        Unit rows [m, d] comparable with ``public.directions``; m is 0 if no weight multiplies features.
    """
    names = [name for name in sorted(update) if _reads_features(adapter, name)]
    rows = np.concatenate([update[name] for name in names]) if names else np.empty((0, adapter.prompts.shape[1]))
    rows = rows[np.linalg.norm(rows, axis=1) > 0]
    found = public.mixtures(rows) if len(rows) else rows
    return np.concatenate([found, -found])


def _reads_features(adapter: Adapter, name: str) -> bool:
    """Whether one image's gradient of a parameter [m, d] points along that image's feature, row by row."""
    parameter = adapter.shared_parameters()[name]
    dim = adapter.prompts.shape[1]
    if parameter.ndim != 2 or parameter.shape[1] != dim:
        return False
    feature = normalize(torch.randn(1, dim, generator=torch.Generator().manual_seed(0)), dim=1)
    # Of the class that is furthest away, so that the gradient is not 0.
    logits = adapter.logits(feature)
    loss = torch.logsumexp(logits, dim=1) - logits.min(dim=1).values
    (gradient,) = torch.autograd.grad(loss.sum(), parameter, allow_unused=True)
    rows = gradient[gradient.norm(dim=1) > 0] if gradient is not None else torch.empty(0, dim)
    return len(rows) > 0 and float((normalize(rows, dim=1) @ feature[0]).abs().mean()) > 0.5


def hit_rate(guesses: NDArray[np.float64], members: NDArray[np.float64], others: NDArray[np.float64]) -> float:
    """Share of guesses [m, d] whose nearest neighbour is a member's row and not another's, all unit rows.

    Half of each is a hit by chance, for as many members' rows as others': the larger set is cut to the smaller's size.
    """
    size = min(len(members), len(others))
    generator = np.random.default_rng(0)
    near = [(guesses @ rows[generator.permutation(len(rows))[:size]].T).max(axis=1) for rows in (members, others)]
    return float(np.mean(near[0] > near[1]))


def _unit(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-300))

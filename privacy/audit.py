"""A one-run audit of private training (Steinke, Nasr and Jagielski, arXiv 2305.08846): it can falsify, not confirm.

``m`` canaries each take part by a coin flip. A canary is a patient whose gradient is exactly the clipping norm in a
direction of its own: the adapter gets one more parameter, the tap, of one value a canary, which nothing else uses.
All of it goes through the real clipped sums, noise and optimiser. From the trained tap the auditor guesses which
canaries took part; too many right guesses refute the claimed epsilon.
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
from torch.nn.functional import linear

from secure_fed.model.adapters import Adapter
from secure_fed.privacy.accounting import plan_noise
from secure_fed.privacy.dp_training import (
    Descent,
    PatientBatch,
    PatientLoss,
    Patients,
    class_prompt_patient_loss,
    public_log_prior,
)
from secure_fed.protocol.study_tables import Method, PrivateTraining

CONFIDENCE = 0.95
DIM, CLASSES = 32, 4

CAVEAT = "The bound is no estimate of epsilon: a right build may give 0, and no audit can confirm a claimed epsilon."

Run = Callable[[Descent, Adapter, Patients, PatientLoss], None]


@dataclass(frozen=True)
class AuditResult:
    """What an audit found.

    Attributes:
        claimed_epsilon: what the plan claims.
        delta: its other half, also used in the bound.
        lower_bound: epsilon is at least this, at ``confidence``.
        canaries: m.
        guesses: r, fixed beforehand; the rest are abstained from.
        correct: right guesses.
        confidence: of the bound.
    """

    claimed_epsilon: float
    delta: float
    lower_bound: float
    canaries: int
    guesses: int
    correct: int
    confidence: float

    @property
    def passed(self) -> bool:
        """Whether the claim stands; a claim that stands is not confirmed."""
        return self.lower_bound <= self.claimed_epsilon

    @property
    def report(self) -> str:
        """The result in words."""
        return (
            f"proved: epsilon <= {self.claimed_epsilon:g}; an attack with one run of the real optimiser, m = "
            f"{self.canaries} canaries and r = {self.guesses} guesses, {self.correct} of them right, finds epsilon >= "
            f"{self.lower_bound:.2f} at delta {self.delta:g}, confidence {100 * self.confidence:.0f} %. {CAVEAT}"
        )


def audit(
    epsilon: float,
    delta: float,
    settings: PrivateTraining,
    *,
    canaries: int = 1000,
    guesses: int = 100,
    patients: int = 500,
    run: Run = Descent.run,
) -> AuditResult:
    """Train once on synthetic patients and canaries at a claimed epsilon, and try to refute it.

    Args:
        epsilon: claimed, above 0.
        delta: in (0, 1).
        settings: of the training; ``steps`` in one go.
        canaries: m.
        guesses: r, at most m, even.
        patients: synthetic patients beside the canaries.
        run: trains; another than the real one is for tests with seeded bugs.
    """
    noise = plan_noise(epsilon, delta, settings.steps)
    took_part = np.array([secrets.randbits(1) for _ in range(canaries)], dtype=bool)
    generator = torch.Generator().manual_seed(secrets.randbits(60))
    adapter = _Tapped(generator, canaries)
    batch = _patients(generator, patients, took_part)
    run(Descent(settings, noise * settings.clip, patients), adapter, (batch,), _loss)
    return judge(adapter.tap.detach().numpy()[0], took_part, guesses, epsilon, delta, CONFIDENCE)


def judge(
    scores: NDArray[np.float64],
    took_part: NDArray[np.bool_],
    guesses: int,
    epsilon: float,
    delta: float,
    confidence: float,
) -> AuditResult:
    """What guesses from scores refute: the highest took part, the lowest did not.

    Args:
        scores: float64 [m], one a canary.
        took_part: [m], the coin flips.
        guesses: r, at most m, even; fixed beforehand.
        epsilon, delta: claimed.
        confidence: of the bound, in (0, 1).
    """
    order, half = np.argsort(scores), guesses // 2
    correct = int(took_part[order[-half:]].sum() + (~took_part[order[:half]]).sum())
    bound = lower_bound(len(scores), guesses, correct, delta, 1 - confidence)
    return AuditResult(epsilon, delta, bound, len(scores), guesses, correct, confidence)


def p_value(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """Chance of so many right guesses under (epsilon, delta)-DP, at most (arXiv 2305.08846, theorem 5.2, appendix D).

    Args:
        canaries: m.
        guesses: r, at most m.
        correct: v, at most r.
        epsilon: 0 or more.
        delta: in [0, 1).
    """
    q = 1 / (1 + np.exp(-epsilon))
    tail = float(stats.binom.sf(correct - 1, guesses, q))
    counts = np.arange(1, correct + 1)
    sums = np.cumsum(stats.binom.pmf(correct - counts, guesses, q))
    alpha = float(np.max(sums / counts, initial=0.0))
    return min(1.0, tail + alpha * delta * 2 * canaries)


def lower_bound(canaries: int, guesses: int, correct: int, delta: float, significance: float) -> float:
    """The largest epsilon that so many right guesses refute at a significance; 0 if they refute none."""
    low, high = 0.0, 1.0
    if p_value(canaries, guesses, correct, 0.0, delta) >= significance:
        return 0.0
    while p_value(canaries, guesses, correct, high, delta) < significance:
        high *= 2
    for _ in range(40):
        middle = (low + high) / 2
        if p_value(canaries, guesses, correct, middle, delta) < significance:
            low = middle
        else:
            high = middle
    return low


class _Tapped(Adapter):
    """A low-rank adapter with the tap beside it; features are [d values | one value a canary]."""

    down: Tensor
    up: Tensor
    tap: Tensor

    def __init__(self, generator: torch.Generator, canaries: int) -> None:
        method = Method(adapter="low_rank", rank=4)
        prompts = torch.nn.functional.normalize(torch.randn(CLASSES, DIM, generator=generator), dim=1).numpy()
        down: NDArray[np.float64] = torch.randn(method.rank, DIM, generator=generator).double().numpy() / np.sqrt(DIM)
        parameters = {"down": down, "up": np.zeros((DIM, method.rank)), "tap": np.zeros((1, canaries))}
        super().__init__(method, prompts, 20.0, parameters)
        self.double()
        self.prompts = self.prompts.double()

    def adapt(self, features: Tensor) -> Tensor:
        """As in :class:`secure_fed.model.adapters.Adapter`, of the first d values."""
        own = features[..., :DIM]
        return torch.nn.functional.normalize(own + linear(linear(own, self.down), self.up), dim=-1)

    def logits(self, features: Tensor) -> Tensor:
        """Logits [..., K + 1]: the last one is the tap's."""
        return torch.cat((super().logits(features), linear(features[..., DIM:], self.tap)), dim=-1)


def _patients(generator: torch.Generator, count: int, took_part: NDArray[np.bool_]) -> PatientBatch:
    """Synthetic patients, then the canaries that take part, labelled -1."""
    chosen = np.flatnonzero(took_part)
    features = torch.zeros(count + len(chosen), 1, DIM + len(took_part), dtype=torch.float64)
    own = torch.randn(len(features), DIM, generator=generator, dtype=torch.float64)
    features[:, 0, :DIM] = torch.nn.functional.normalize(own, dim=1)
    features[torch.arange(count, len(features)), 0, DIM + torch.from_numpy(chosen)] = 1.0
    labels = torch.full((len(features), 1), -1)
    labels[:count, 0] = torch.randint(0, CLASSES, (count,), generator=generator)
    return PatientBatch(features, labels, torch.ones(len(features), 1, dtype=torch.bool))


_REAL = class_prompt_patient_loss(public_log_prior(PrivateTraining(), CLASSES))


def _loss(forward: Callable[[Tensor], Tensor], batch: PatientBatch) -> Tensor:
    """The real loss of patients; of a canary, a slope so steep on its own tap that clipping makes it exactly C."""
    logits = forward(batch.features)
    canary = batch.labels[:, 0] < 0
    own = PatientBatch(batch.features, batch.labels.clamp_min(0), batch.mask)
    real = _REAL(lambda _: logits[..., :CLASSES], own)
    return torch.where(canary, -1e6 * logits[:, 0, CLASSES], real)

"""A one-run audit of a site's own private rounds: its study, settings and ledger's arithmetic, on nobody's images.

Canaries are synthetic patients, each of whom takes part by a coin flip. The auditor sees what would leave in a whole
run, the integers of :class:`secure_fed.clients.private_round.PrivateRounds`, and guesses from it who took part. What
the throw-away ledger says was paid is the claim to refute (:mod:`secure_fed.privacy.audit`).
"""

from __future__ import annotations

import math
import secrets
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from secure_fed.clients.features import Labelled, SiteFeatures
from secure_fed.clients.rehearsal import budget_of, initial_adapter, rehearse, run_on, synthetic_features
from secure_fed.clients.sitefile import SiteFile
from secure_fed.privacy import class_statistics, memory_sums
from secure_fed.privacy.accounting import epsilon_of
from secure_fed.privacy.audit import CONFIDENCE, AuditResult, judge
from secure_fed.privacy.dp_training import PatientBatch, class_prompt_patient_loss, clipped_sum, public_log_prior
from secure_fed.protocol import codec, memory
from secure_fed.protocol.study import AgreedStudy

BESIDE = 50
"""Synthetic patients beside the canaries."""


def audit_site(file: SiteFile, agreed: AgreedStudy, *, canaries: int = 400, guesses: int = 100) -> AuditResult:
    """Rehearse a site's private rounds, then audit a whole run of them. No image is read and no budget is spent.

    Args:
        file: the site's, with its budget, or with a ledger that remembers one.
        agreed: its study.
        canaries: m.
        guesses: r, at most m, even; fixed beforehand.

    Returns:
        Against the epsilon that the throw-away ledger says was paid.

    Raises:
        GuardError: the rehearsal found integers that are not what the ledger says was paid for.
    """
    rehearse(file, agreed)
    took_part = np.array([secrets.randbits(1) for _ in range(canaries)], dtype=bool)
    drawn = synthetic_features(agreed, canaries, 1, np.random.default_rng(secrets.randbits(60)))
    others = synthetic_features(agreed, BESIDE, 1, np.random.default_rng(secrets.randbits(60)))
    rounds = [1] if agreed.study.method.one_sum else list(range(1, agreed.study.rounds + 1))
    left = run_on(file, agreed, _together(others, drawn, took_part, mirrored=agreed.study.backbone.mirrored), rounds)
    method = agreed.study.method
    score = _sums_score if method.one_sum else _centroids_score if method.sums else _updates_score
    scores = score(agreed, drawn.train, left.messages)
    delta = budget_of(file).delta
    return judge(scores, took_part, guesses, epsilon_of(left.paid, delta), delta, CONFIDENCE)


def _together(
    others: SiteFeatures, drawn: SiteFeatures, took_part: NDArray[np.bool_], *, mirrored: bool
) -> SiteFeatures:
    x = np.concatenate((others.train.x, drawn.train.x[took_part]))
    y = np.concatenate((others.train.y, drawn.train.y[took_part]))
    owners = [f"beside {number}" for number in range(len(others.train.y))]
    owners += [f"canary {number}" for number in np.flatnonzero(took_part)]
    if mirrored:
        x, y, owners = np.concatenate((x, x)), np.concatenate((y, y)), owners * 2
    return replace(others, train=Labelled(x, y), patients={**others.patients, "train": tuple(owners)})


def _updates_score(
    agreed: AgreedStudy, drawn: Labelled, messages: list[dict[str, NDArray[np.float64]]]
) -> NDArray[np.float64]:
    """How far the run's updates lie along each canary's own clipped descent, float64 [m]."""
    settings = agreed.study.privacy
    moved = torch.from_numpy(np.sum([message[codec.UPDATE] for message in messages], axis=0))
    adapter = initial_adapter(agreed)
    loss = class_prompt_patient_loss(public_log_prior(settings, len(agreed.study.classes)))
    scores = []
    for row, label in zip(drawn.x, drawn.y, strict=True):
        features, labels = torch.from_numpy(row).double()[None, None], torch.tensor([[int(label)]])
        alone = PatientBatch(features, labels, torch.ones(1, 1, dtype=torch.bool))
        own = clipped_sum(adapter, alone, loss, settings.clip)
        scores.append(-float(torch.cat([own[name].flatten() for name in sorted(own)]).detach() @ moved))
    return np.array(scores)


def _sums_score(
    agreed: AgreedStudy, drawn: Labelled, messages: list[dict[str, NDArray[np.float64]]]
) -> NDArray[np.float64]:
    """How far the noised sums lie along each canary's own statistics, float64 [m]."""
    basis = agreed.initial.basis
    assert basis is not None, "study new makes one for each method that uses one"
    (message,) = messages
    scores = []
    for row, label in zip(basis.project(drawn.x), drawn.y, strict=True):
        own = class_statistics.exact_sums(row[None], np.array([label]), ["canary"], len(agreed.study.classes)).values()
        scores.append(
            math.fsum(scale**2 * float(own[name] @ message[name]) for name, scale in class_statistics.SCALES.items())
        )
    return np.array(scores)


def _centroids_score(
    agreed: AgreedStudy, drawn: Labelled, messages: list[dict[str, NDArray[np.float64]]]
) -> NDArray[np.float64]:
    """How far the noised sums of all rounds lie along each canary's own, at the centroids they were asked at."""
    scale_of = memory_sums.scale_of
    scores = []
    for row in drawn.x:
        own = memory_sums.exact_sums(agreed.initial.adapter, row[None], ["canary"])
        blocks = [name for name in own if not name.endswith("_patients")]
        scores.append(
            math.fsum(
                scale_of(name) ** 2 * float(own[name] @ message[name])
                for message in messages
                if memory.HISTOGRAM not in message
                for name in blocks
            )
        )
    return np.array(scores)

"""What a head of one sum says of single cases: which classes may be meant, and whether a case is like any it knows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from secure_fed.protocol.codec import Parameters
from secure_fed.protocol.initial_state import InitialState
from secure_fed.protocol.one_sum import NO_LIMIT, Limits


@dataclass(frozen=True)
class Cases:
    """Of n cases.

    Attributes:
        sets: bool [n, K]: the classes that are probable enough, the most probable one always among them. With the
            chance that the study promises, the true one is, for patients like those of the calibration.
        strangers: bool [n]: whether a case lies farther from all class means than nearly all calibration patients;
            None where these are too few to say, or lie too far for the histogram.
        patients: calibration patients that both rest on.
    """

    sets: NDArray[np.bool_]
    strangers: NDArray[np.bool_] | None
    patients: float

    def strange(self, place: int) -> bool | None:
        """Whether a case is a stranger; None if nobody can say."""
        return None if self.strangers is None else bool(self.strangers[place])


def judge(initial: InitialState, parameters: Parameters, x: NDArray[np.float32]) -> Cases | None:
    """Sets and strangers among unit features x [n, d]; None if the adapter claims nothing of cases.

    Args:
        initial: of the study: its basis and logit scale.
        parameters: of the adapter, by name.
        x: unit features.
    """
    if "limits" not in parameters or initial.basis is None:
        return None
    limits = Limits.of(parameters)
    if limits.patients == 0:
        return None
    logits = initial.logit_scale * (x.astype(np.float64) @ parameters["weight"].T + parameters["bias"])
    sets = log_odds(logits) >= limits.least
    sets[np.arange(len(x)), logits.argmax(axis=1)] = True
    told = limits.farthest < NO_LIMIT
    return Cases(sets, log_distances(initial, parameters, x) >= limits.farthest if told else None, limits.patients)


def log_distances(initial: InitialState, parameters: Parameters, x: NDArray[np.float32]) -> NDArray[np.float64]:
    """log2 of the squared Mahalanobis distance to the nearest class mean over k, [n]."""
    assert initial.basis is not None, "who has limits has a basis"
    factor, means = parameters["factor"], parameters["means"]
    known = np.any(means != 0, axis=1)
    white = np.linalg.solve(factor, initial.basis.linear(x).T)
    centres = np.linalg.solve(factor, means[known].T)
    squared = np.square(white[:, :, None] - centres[:, None, :]).sum(axis=0).min(axis=1)
    return np.asarray(np.log2(np.maximum(squared / len(factor), 1e-300)))


def log_odds(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Log odds of each class [n, K] under a softmax; -inf where a logit is."""
    found = np.empty_like(logits)
    for label in range(logits.shape[1]):
        others = np.delete(logits, label, axis=1)
        top = others.max(axis=1)
        found[:, label] = logits[:, label] - (top + np.log(np.exp(others - top[:, None]).sum(axis=1)))
    return found

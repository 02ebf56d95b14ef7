"""The audit: the published figure, a right build that passes, and seeded bugs that it catches."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from secure_fed.cli import app
from secure_fed.model.adapters import Adapter
from secure_fed.privacy import dp_training
from secure_fed.privacy.accounting import gaussian_noise
from secure_fed.privacy.audit import audit, lower_bound, p_value
from secure_fed.privacy.dp_training import Descent, Gradients, PatientBatch, clipped_sum
from secure_fed.protocol.study_tables import PrivateTraining

torch.set_num_threads(1)  # as the command does

SETTINGS = PrivateTraining(steps=20, learning_rate=0.5)


def test_the_published_figure() -> None:
    # Steinke et al., appendix D: m = 1000, r = 100, 75 right, delta = 1e-4.
    assert lower_bound(1000, 100, 75, 1e-4, 0.05) == pytest.approx(0.673, abs=1e-3)


def test_the_bound_is_where_the_p_value_crosses() -> None:
    bound = lower_bound(500, 100, 90, 1e-5, 0.05)
    assert p_value(500, 100, 90, bound - 1e-6, 1e-5) < 0.05 <= p_value(500, 100, 90, bound + 1e-6, 1e-5)
    assert lower_bound(500, 100, 50, 1e-5, 0.05) == 0.0


@pytest.mark.parametrize(("guesses", "ceiling"), [(50, 2.8), (100, 3.5), (200, 4.2), (500, 5.1), (1000, 5.8)])
def test_even_perfect_guesses_certify_little(guesses: int, ceiling: float) -> None:
    assert lower_bound(1000, guesses, guesses, 1e-5, 0.05) == pytest.approx(ceiling, abs=0.06)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("epsilon", [1.0, 3.0])
def test_the_right_build_passes(epsilon: float, optimizer: str) -> None:
    settings = PrivateTraining.model_validate({"steps": 20, "learning_rate": 0.5, "optimizer": optimizer})
    result = audit(epsilon, 1e-5, settings)
    assert result.passed, result.report
    assert "no estimate of epsilon" in result.report
    assert f"r = {result.guesses}" in result.report


def test_the_tap_sees_something() -> None:
    """Without this, a right build would pass because the audit is blind."""
    assert max(audit(8.0, 1e-5, SETTINGS).lower_bound for _ in range(3)) > 1.0


def less_noise(descent: Descent, adapter: Adapter, batch: PatientBatch, loss: Callable[..., Tensor]) -> None:
    Descent(descent.settings, descent.noise_std / 10, descent.n_ref).run(adapter, batch, loss)


def no_clip(descent: Descent, adapter: Adapter, batch: PatientBatch, loss: Callable[..., Tensor]) -> None:
    def unclipped(adapter: Adapter, batch: PatientBatch, loss: Callable[..., Tensor], clip: float) -> Gradients:
        return clipped_sum(adapter, batch, loss, 100 * clip)

    with mock.patch.object(dp_training, "clipped_sum", unclipped):
        descent.run(adapter, batch, loss)


def no_composition(descent: Descent, adapter: Adapter, batch: PatientBatch, loss: Callable[..., Tensor]) -> None:
    """Noise planned for one step, used in twenty times twenty."""
    std = descent.noise_std / np.sqrt(descent.settings.steps)
    for _ in range(5):
        Descent(descent.settings, std, descent.n_ref).run(adapter, batch, loss)


def reused_noise(descent: Descent, adapter: Adapter, batch: PatientBatch, loss: Callable[..., Tensor]) -> None:
    """The same noise with the other sign every second step: it cancels."""
    kept: dict[int, np.ndarray] = {}

    def noise(size: int, std: float) -> np.ndarray:
        if size in kept:
            return -kept.pop(size)
        kept[size] = gaussian_noise(size, std)
        return kept[size]

    Descent(descent.settings, descent.noise_std, descent.n_ref, noise).run(adapter, batch, loss)


@pytest.mark.parametrize("bug", [less_noise, no_clip, no_composition, reused_noise])
def test_seeded_bugs_are_caught(bug: Callable[..., None]) -> None:
    result = audit(1.0, 1e-5, SETTINGS, run=bug)
    assert not result.passed, result.report


def test_the_command_reports_and_fails_on_a_refuted_claim() -> None:
    shown = CliRunner().invoke(app, ["audit", "--epsilon", "2", "--json"])
    assert shown.exit_code == 0
    assert '"passed": true' in shown.stdout
    assert "no estimate of epsilon" in shown.stdout
    assert '"true_positive_rate"' in shown.stdout

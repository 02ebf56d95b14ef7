"""Attacks find what is there: members of overfitted models, features in plain updates; and nothing in ciphertexts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from secure_fed.core.errors import StudyError
from secure_fed.lab.attack import _inversion, _run_shadow, _Shadow, _Target, _view, attack
from secure_fed.model.adapters import build_adapter, initial_parameters
from secure_fed.privacy.attacks import (
    PublicFeatures,
    attack_with_and_without,
    hit_rate,
    lira,
    log_odds,
    membership,
    reconstruct,
)
from secure_fed.privacy.ckks import StudySecret
from secure_fed.protocol.initial_state import InitialState
from secure_fed.protocol.study import AgreedStudy
from tests.conftest import make_template

torch.set_num_threads(1)  # as the command does


def test_a_perfect_leak_is_found_and_noise_is_not() -> None:
    rng = np.random.default_rng(0)
    leak = lira(lambda members: members * 8.0 + rng.normal(size=200), 200)
    assert leak.true_positive_rate > 0.9
    assert leak.auc > 0.99
    blind = lira(lambda members: rng.normal(size=200), 200)
    assert blind.true_positive_rate < 0.03
    assert blind.auc == pytest.approx(0.5, abs=0.03)


def test_hard_patients_are_compared_with_themselves() -> None:
    """A patient that scores low in and out is no non-member: scores count relative to the patient's own."""
    rng = np.random.default_rng(1)
    hardness: NDArray[np.float64] = rng.normal(0, 30, 200)
    found = lira(lambda members: hardness + members * 4.0 + rng.normal(size=200), 200)
    assert found.auc > 0.97


def test_log_odds() -> None:
    odds = log_odds(np.array([[0.9, 0.1], [0.5, 0.5], [1.0, 0.0]]), np.array([0, 1, 1]))
    assert odds[:2] == pytest.approx([np.log(9), 0.0])
    assert np.isfinite(odds).all()


def test_privacy_takes_the_attack_away() -> None:
    private, plain = attack_with_and_without(3.0, 1e-5, shadows=24)
    assert plain.true_positive_rate > 0.1
    assert private.true_positive_rate < plain.true_positive_rate / 2
    assert private.auc < plain.auc - 0.1


def test_roc_and_interval_hold_the_auc() -> None:
    rng = np.random.default_rng(2)
    members = rng.random((12, 150)) < 0.5
    found = membership(members * 1.0 + rng.normal(size=members.shape), members)
    low, high = found.auc_interval
    assert 0.5 < low < found.auc < high < 1
    rates = np.array(found.roc)
    assert rates[0] == pytest.approx([0, 0])
    assert rates[-1] == pytest.approx([1, 1])
    assert (np.diff(rates, axis=0) >= 0).all()
    assert np.trapezoid(rates[:, 1], rates[:, 0]) == pytest.approx(found.auc, abs=0.01)


# --- inversion ---

DIM = 48


def features(rng: np.random.Generator, count: int) -> NDArray[np.float32]:
    """Unit rows with a common mean and unequal spread, as features of images of one kind have."""
    rows = rng.normal(size=(count, DIM)) * np.geomspace(1, 0.2, DIM) + 0.5
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), dtype=np.float32)


def test_one_image_is_taken_out_of_its_gradient() -> None:
    """Closed form: of one image, the gradient of a layer that reads it is a multiple of its feature, row by row."""
    rng = np.random.default_rng(3)
    prompts, image = features(rng, 3), features(rng, 1)
    public = PublicFeatures(features(rng, 500))
    method = make_template().method
    adapter = build_adapter(method, prompts, 20.0, initial_parameters(method, DIM, prompts, 0))
    loss = torch.nn.functional.cross_entropy(adapter.logits(torch.from_numpy(image)), torch.tensor([2]))
    gradients = torch.autograd.grad(loss, list(adapter.shared_parameters().values()))
    update = {name: -value.double().numpy() for name, value in zip(adapter.shared_parameters(), gradients, strict=True)}
    guesses = reconstruct(adapter, update, public)
    assert guesses.shape == (2 * DIM, DIM)
    # The share of the mean is unknown, so the match is close, not exact.
    likeness = np.abs(guesses @ public.directions(image).T)
    assert likeness.max() > 0.85
    assert np.median(likeness) > 0.7
    assert np.median(np.abs(guesses @ public.directions(features(rng, 1)).T)) < 0.5


def test_the_hit_rate_of_guesses_from_nowhere_is_a_half() -> None:
    rng = np.random.default_rng(4)
    rates = []
    for _ in range(40):
        rows = rng.normal(size=(3, 200, 8))
        rows /= np.linalg.norm(rows, axis=2, keepdims=True)
        rates.append(hit_rate(rows[0], rows[1], rows[2, :120]))
    assert np.mean(rates) == pytest.approx(0.5, abs=4 * np.std(rates) / np.sqrt(40))
    assert hit_rate(rows[0], rows[0], rows[1]) == 1.0


# --- views of a study ---


@pytest.fixture(scope="module")
def views() -> dict[str, dict[str, Any]]:
    """A small study of made-up features, attacked with real training, integers and ciphertexts."""
    rng = np.random.default_rng(5)
    study = make_template(
        rounds=2,
        method={"adapter": "facmic", "lmmd_weight": 0.0},
        training={"steps": 12, "learning_rate": 0.01, "batch_size": 16},
        encoding={"bits": 16, "lanes": 2, "value_bound": 0.5},
    )
    prompts = features(rng, 3)
    start = InitialState(initial_parameters(study.method, DIM, prompts, 0), prompts, 20.0)
    targets = tuple(
        _Target(
            name,
            1.0,
            features(rng, 40),
            rng.integers(0, 3, 40),
            np.arange(40) // 2,
            20,
            np.empty((0, DIM), dtype=np.float32),
        )
        for name in ("ash", "birch", "cedar")
    )
    agreed = AgreedStudy(study, start)
    shadow = _Shadow(
        0,
        agreed,
        targets,
        PublicFeatures(features(rng, 400)),
        (1.0,),
        1e-5,
        StudySecret.generate(agreed.lanes.modulus_bits),
        None,
    )
    results = [_run_shadow(shadow) for _ in range(16)]
    members = np.stack([chosen for chosen, _ in results])
    assert (members.sum(axis=1) == 30).all()
    return {name: _view(name, members, [seen[name] for _, seen in results]) for name in results[0][1]}


def test_few_updates_give_a_wide_interval() -> None:
    found = _inversion([0.45, 0.55, 0.5, 0.5], 64)
    assert found is not None
    # The standard error is 0.0408 / 2; of Student's distribution with three degrees of freedom 97.5 % lie below 3.182.
    assert found["interval"] == pytest.approx([0.5 - 3.18245 * 0.0204124, 0.5 + 3.18245 * 0.0204124], abs=1e-5)
    assert _inversion([0.5], 16) is None


def sigmas(found: dict[str, Any], name: str, interval: str) -> float:
    """How many standard errors a figure lies above a half."""
    low, high = found[interval]
    return float((found[name] - 0.5) / ((high - low) / 3.92))


def test_plain_updates_give_features_and_members_away(views: dict[str, dict[str, Any]]) -> None:
    plain = views["plain_update"]
    assert plain["inversion"]["hit_rate"] > 0.6
    assert sigmas(plain["inversion"], "hit_rate", "interval") > 6
    assert plain["inversion"]["updates"] == 48
    assert plain["membership"]["auc"] > 0.6
    assert sigmas(plain["membership"], "auc", "auc_interval") > 4


def test_what_the_server_holds_is_at_chance(views: dict[str, dict[str, Any]]) -> None:
    """The same attacks, with all coefficients of the real envelopes in the place of the update."""
    held = views["server_he"]
    assert abs(sigmas(held["inversion"], "hit_rate", "interval")) < 4
    assert abs(held["inversion"]["hit_rate"] - 0.5) < 0.1
    assert abs(sigmas(held["membership"], "auc", "auc_interval")) < 4
    assert abs(held["membership"]["auc"] - 0.5) < 0.1  # keys are drawn anew each time; a sigma is 0.022 to 0.026


def test_privacy_takes_what_the_released_adapter_tells(views: dict[str, dict[str, Any]]) -> None:
    released, private = views["released"], views["released_dp 1"]
    assert (released["epsilon"], private["epsilon"]) == (None, 1.0)
    assert (released["view"], private["view"]) == ("released", "released_dp")
    assert released["membership"]["auc"] > 0.7
    assert private["membership"]["auc"] < 0.6
    assert private["membership"]["tpr_at_1_fpr"] < released["membership"]["tpr_at_1_fpr"]


@pytest.mark.slow
def test_a_study_is_attacked_from_images_to_figures(tmp_path: Path, images: Path) -> None:
    out = tmp_path / "out"
    report = attack(make_template(), out, images, shadows=8, jobs=2, epsilons=(2.0, 8.0))
    assert json.loads((out / "attack.json").read_text()) == report
    assert [(view["view"], view["epsilon"]) for view in report["views"]] == [
        *(("plain_update", None), ("server_he", None), ("released", None), ("released_dp", 2.0), ("released_dp", 8.0))
    ]
    assert report["patients"] == 3 * 27  # labelled ones; each image is a patient
    assert report["data_kind"] == "simulated"
    assert (out / "attack.svg").read_bytes().startswith(b"<?xml")


@pytest.mark.slow
def test_a_method_without_privacy_is_attacked_without(tmp_path: Path, images: Path) -> None:
    template = make_template(method={"adapter": "facmic", "loss": "contrastive"}, rounds=1)
    report = attack(template, tmp_path / "out", images, shadows=8, jobs=2)
    assert [view["view"] for view in report["views"]] == ["plain_update", "server_he", "released"]
    assert "contrastive" in report["notes"][0]


def test_only_public_or_simulated_data_are_attacked(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"no \[simulation\] table"):
        attack(make_template(simulation=None), tmp_path)

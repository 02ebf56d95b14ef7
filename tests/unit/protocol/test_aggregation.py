"""Server-free optimisers: closed forms, and that their state is replicated, attested and rebuilt like the adapter."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from secure_fed.clients.site import Site
from secure_fed.core.errors import AdapterMismatchError
from secure_fed.lab.simulation import Listener, prepare, simulate
from secure_fed.protocol import aggregation, codec
from secure_fed.protocol.aggregation import MOMENT
from secure_fed.protocol.study_tables import Aggregation
from tests.conftest import TRAINING, Federation, close_round, corrupt, exchange, make_template, run_round

SILENT = Listener(encoding=lambda *_: None, round=lambda _: None, stage=lambda _: None)
ADAM = {"rule": "fedadam", "learning_rate": 0.01, "betas": [0.8, 0.9], "tau": 0.01}
MOMENTUM = {"rule": "fedavgm", "learning_rate": 0.5, "betas": [0.7, 0.99]}


def run(rule: Aggregation, start: list[float], updates: list[list[float]]) -> aggregation.State:
    state = aggregation.initial_state(rule, {"b": np.array(start[:1]), "w": np.array([start[1:]])})
    for update in updates:
        before = {name: value.copy() for name, value in state.items()}
        following = aggregation.apply(rule, state, np.array(update))
        assert all(np.array_equal(state[name], before[name]) for name in before)
        state = following
    return state


@pytest.mark.parametrize("rule", [Aggregation(), Aggregation.model_validate_json('{"rule": "average"}')])
def test_the_average_is_added_and_keeps_no_state(rule: Aggregation) -> None:
    state = run(rule, [1.0, 2.0, 3.0], [[0.5, 0.25, -1.0], [1.0, 0.0, 0.5]])
    assert set(state) == {"b", "w"}
    assert codec.flatten(state).tolist() == [2.5, 2.25, 2.5]
    assert state["w"].shape == (1, 2)


def test_the_mean_of_the_adapters_comes_out_and_the_last_one_goes_on() -> None:
    updates = [[0.5, 0.25, -1.0], [1.0, 0.0, 0.5], [0.5, -0.75, 1.5]]
    for rule in (
        Aggregation(iterates="mean"),
        Aggregation(rule="fedavgm", iterates="mean"),
        Aggregation(rule="fedavgm", iterates="late"),
    ):
        weights = [1, 1, 1] if rule.iterates == "mean" else [1, 4, 9]
        states = [run(rule, [1.0, 2.0, 3.0], updates[:rounds]) for rounds in range(4)]
        last = [codec.flatten(aggregation.adapter_of(state)) for state in states]
        plain = run(rule.model_copy(update={"iterates": "last"}), [1.0, 2.0, 3.0], updates)
        assert last[3].tolist() == codec.flatten(aggregation.adapter_of(plain)).tolist()
        assert aggregation.result_of(plain) == aggregation.adapter_of(plain)
        for rounds in (1, 2, 3):
            found = codec.flatten(aggregation.result_of(states[rounds]))
            expected = np.average(last[1 : rounds + 1], axis=0, weights=weights[:rounds])
            np.testing.assert_allclose(found, expected, rtol=1e-15)
        assert codec.flatten(aggregation.result_of(states[0])).tolist() == [
            1.0,
            2.0,
            3.0,
        ]  # before any round, the start
        assert {name: value.shape for name, value in aggregation.result_of(states[3]).items()} == {
            "b": (1,),
            "w": (1, 2),
        }
        moments = {name for name in states[3] if name.startswith(MOMENT)}
        assert sum(states[3][name].size == 3 for name in moments) == rule.moments


def test_all_sites_use_the_mean_and_train_on_from_the_last(tmp_path: Path, images: Path) -> None:
    template = make_template(rounds=3, mode="plain", method={"adapter": "text_head"}, aggregation={"iterates": "mean"})
    prepare(template, tmp_path / "out", images)
    federation = Federation(tmp_path / "out")
    sites = federation.sites()
    coordinator, seen = federation.open_run(), []
    for _ in range(3):
        run_round(coordinator, sites)
        for site in sites:
            exchange(coordinator, site)
        seen.append(sites[0].replica.state.iterate["offsets"])
        assert len({site.adapter_digest for site in sites}) == 1
    np.testing.assert_allclose(sites[0].parameters["offsets"], np.mean(seen, axis=0), rtol=1e-12)
    again = federation.site(sites[0].name)
    assert np.array_equal(again.parameters["offsets"], sites[0].parameters["offsets"])
    assert not np.array_equal(seen[-1], sites[0].parameters["offsets"])


def test_validation_counts_are_of_the_mean(tmp_path: Path, images: Path) -> None:
    template = make_template(rounds=3, mode="plain", method={"adapter": "text_head"}, aggregation={"iterates": "mean"})
    prepare(template, tmp_path / "out", images)
    federation = Federation(tmp_path / "out")
    sites, real, counted = federation.sites(), Site._predict, []
    coordinator = federation.open_run()

    def predict(site: Site, images: Any, parameters: Any, agreed: Any) -> Any:
        counted.append(np.array_equal(parameters["offsets"], site.replica.state.parameters["offsets"]))
        return real(site, images, parameters, agreed)

    with mock.patch.object(Site, "_predict", predict):
        for _ in range(3):
            run_round(coordinator, sites)
    assert counted == [True] * 3 * len(TRAINING)
    state = sites[0].replica.state
    assert not np.array_equal(state.parameters["offsets"], state.iterate["offsets"])


def test_momentum_and_adam_are_the_papers_formulas() -> None:
    updates = [[0.1, -0.2, 0.0], [0.3, 0.1, -0.4], [-0.2, 0.1, 0.2]]
    start = [1.0, -1.0, 0.5]
    found = run(Aggregation(rule="fedavgm", learning_rate=0.5, betas=(0.7, 0.0)), start, updates)
    for place, value in enumerate(start):
        first = 0.0
        for update in updates:
            first = 0.7 * first + update[place]
            value += 0.5 * first
        assert codec.flatten(aggregation.adapter_of(found))[place] == pytest.approx(value, rel=1e-14)
    found = run(Aggregation(rule="fedadam", learning_rate=0.01, betas=(0.8, 0.9), tau=0.01), start, updates)
    for place, value in enumerate(start):
        first, second = 0.0, 0.01**2
        for update in updates:
            first = 0.8 * first + 0.2 * update[place]
            second = 0.9 * second + 0.1 * update[place] ** 2
            value += 0.01 * first / (math.sqrt(second) + 0.01)
        assert codec.flatten(aggregation.adapter_of(found))[place] == pytest.approx(value, rel=1e-14)
    assert set(found) == {"b", "w", f"{MOMENT}first", f"{MOMENT}second"}


@pytest.fixture
def adam(tmp_path: Path, images: Path) -> Federation:
    prepare(make_template(aggregation=ADAM), tmp_path / "out", images)
    return Federation(tmp_path / "out")


def moments(site: Site) -> dict[str, Any]:
    return {name: value for name, value in site.replica.state.tensors.items() if name.startswith(MOMENT)}


def test_moments_are_replicated_attested_and_rebuilt(adam: Federation) -> None:
    sites = adam.sites()
    coordinator = adam.begin(sites)
    run_round(coordinator, sites)
    run_round(coordinator, sites)
    for site in sites:
        exchange(coordinator, site)
    first = moments(sites[0])
    assert len(first) == 2
    assert all(np.abs(value).max() > 0 for value in first.values())
    for site in sites[1:]:
        assert all(np.array_equal(moments(site)[name], first[name]) for name in first)
    # From the stored state, and by replay when that is gone: the same bits.
    state = sites[1].replica.state.digest
    assert adam.site("birch").replica.state.digest == state
    (stored,) = (adam.folder / "sites/birch/state/runs").glob("*/adapter.safetensors")
    stored.unlink()
    assert adam.site("birch").replica.state.digest == state
    # Two sites whose moments differ notice it although their adapters are the same.
    corrupt(sites[2], **{f"{MOMENT}second": first[f"{MOMENT}second"] * (1 + 2.0**-50)})
    assert sites[2].adapter_digest == sites[0].adapter_digest
    with pytest.raises(AdapterMismatchError):
        exchange(coordinator, sites[2])


def test_a_checkpoint_carries_the_moments(adam: Federation) -> None:
    sites = adam.sites()
    coordinator = adam.begin(sites)
    run_round(coordinator, sites)
    sealed = adam.seal_key(2, coordinator.journal.chain.key, members=coordinator.journal.chain.members)
    coordinator.amend(sealed)
    kinds = []
    while not coordinator.finished:
        for site in sites:
            exchange(coordinator, site)
        entry = close_round(coordinator, sites)
        kinds.append(entry.header.kind)
        for site in sites:
            exchange(coordinator, site)
    assert kinds == ["amendment", "checkpoint", "aggregate", "aggregate"]
    # The key of the first round is destroyed: only the checkpoint can give what came of it.
    next((adam.folder / "sites/ash/state/runs").glob("*/adapter.safetensors")).unlink()
    rebuilt = adam.site("ash")
    assert list(rebuilt.replica.keys.headers) == [2]
    assert rebuilt.replica.state.digest == sites[1].replica.state.digest
    assert all(np.array_equal(value, moments(sites[1])[name]) for name, value in moments(rebuilt).items())


@pytest.mark.parametrize("rule", [ADAM, MOMENTUM], ids=["fedadam", "fedavgm"])
def test_it_learns_and_encryption_changes_no_bit(rule: dict[str, Any], images: Path, tmp_path: Path) -> None:
    template = make_template(aggregation=rule)
    encrypted = simulate(template, tmp_path / "he", images, SILENT)
    plain = simulate(make_template(aggregation=rule, mode="plain"), tmp_path / "plain", images, SILENT)
    assert encrypted["adapter_digest"] == plain["adapter_digest"]
    scores = encrypted["metrics"]
    assert scores["federated"]["held_out"]["accuracy"] > scores["zero_shot"]["held_out"]["accuracy"] + 0.2

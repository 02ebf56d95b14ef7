"""``secfacmic client --epsilon`` in real processes: the plan, what is spent, and which other budgets are taken."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from secure_fed.core.errors import BudgetError
from secure_fed.privacy.accounting import epsilon_of, mu_squared_of
from tests.conftest import OBSERVER, TRAINING, make_template
from tests.network import Network

pytestmark = pytest.mark.slow

ROUNDS = 3
BUDGET = ["--epsilon", "3", "--delta", "1e-5"]


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "secure_fed.cli", *arguments], capture_output=True, text=True, timeout=240
    )


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Iterator[Network]:
    """A study of three rounds, in which ash is killed in the first and comes back with less, and with other data."""
    settings = {"rounds": ROUNDS, "round_seconds": 240, "method": {"adapter": "text_head"}}
    template = make_template(privacy={"steps": 2, "validation_rounds": 1}, **settings)
    folder = tmp_path_factory.mktemp("budget")
    shutil.copytree(images, folder / "images")
    network = Network(folder / "out", template, folder / "images")
    network.options = dict.fromkeys(TRAINING, BUDGET)
    try:
        network.start("server")
        network.wait_until(lambda: "listening" in network.log("server"), 120)
        network.start(*network.names)
        network.wait_until(lambda: "epsilon spent" in network.log("ash"), 240)  # what it says later waits for figures
        network.kill("ash")
        pictures = sorted((folder / "images" / "ash").rglob("*.png"))
        pictures[0].unlink()
        pictures[1].write_bytes(b"no picture any more")
        network.options["ash"] = ["--epsilon", "2.9"]
        network.start("ash")
        assert set(network.wait(300).values()) == {0}
        yield network
    finally:
        network.close()


def facts_of(network: Network, site: str) -> dict[str, Any]:
    shown = command("ledger", "show", str(network.site_folder(site)), "--json")
    assert shown.returncode == 0, shown.stderr
    document: dict[str, Any] = json.loads(shown.stdout)
    return document


def test_the_plan_is_shown_before_the_first_round(network: Network) -> None:
    for site in TRAINING:
        log = network.log(site)
        planned = re.findall(
            r"plan for (\d+) rounds of (\d+) steps .* noise multiplier ([\d.]+), clipping norm 4;", log
        )
        assert len(planned) == 1  # ash, too: the plan outlives the process
        rounds, steps, noise = planned[0]
        assert (rounds, steps) == ("3", "2")
        # Three rounds of two steps, and one round more in case of a crash, use up the whole budget.
        assert float(noise) == pytest.approx((8 / mu_squared_of(3.0, 1e-5)) ** 0.5, rel=5e-3)
        assert "LMMD off: the study has no domain term; validation counts on: after rounds 3 at" in log
        assert log.index("plan for") < log.index("epsilon spent", log.index("at delta 1e-05") + 1)


def test_spent_and_left_are_shown_after_each_round_and_are_what_the_ledger_says(network: Network) -> None:
    for site in TRAINING:
        shown = re.findall(
            r"round (\d) of run \w+: epsilon spent ([\d.]+) of ([\d.]+), left ([\d.]+), at delta 1e-05",
            network.log(site),
        )
        rounds = dict.fromkeys(number for number, *_ in shown)
        assert list(rounds) == ["1", "2", "3"]
        assert [spent for _, spent, *_ in shown] == sorted(spent for _, spent, *_ in shown)
        for _, spent, budget, left in shown:
            assert float(spent) + float(left) == pytest.approx(float(budget), abs=2e-4)
        facts = facts_of(network, site)
        assert float(shown[-1][1]) == pytest.approx(facts["epsilon_spent"], abs=1e-4)
        by_block: dict[int, float] = {}
        for event in facts["events"]:
            by_block[event["block"]] = by_block.get(event["block"], 0.0) + event["mu_squared"]
        assert facts["epsilon_spent"] == pytest.approx(max(epsilon_of(mu, 1e-5) for mu in by_block.values()))
        assert 0 < facts["epsilon_spent"] <= facts["epsilon_budget"]
        assert {event["state"] for event in facts["events"]} <= {"sent", "committed", "reserved"}
        (counted,) = [event for event in facts["events"] if "validation" in event["purpose"]]
        trained = {event["block"] for event in facts["events"] if event is not counted}
        assert counted["block"] not in trained  # other patients paid for it, of whom each has a history of its own
        assert facts["members"][str(counted["block"])] > 0
    assert facts_of(network, OBSERVER)["events"] == []


def test_a_lower_budget_is_taken_and_a_higher_one_refused_from_then_on(network: Network) -> None:
    assert facts_of(network, "ash")["epsilon_budget"] == 2.9
    assert "of 2.9, left" in network.log("ash")
    assert facts_of(network, "birch")["epsilon_budget"] == 3.0
    site_file = str(network.site_folder("ash") / "site.toml")
    for more in ("3", "2.95"):
        refused = command("client", "--site", site_file, "--epsilon", more, "--delta", "1e-5")
        assert refused.returncode == BudgetError.exit_code
        assert f"epsilon = {more}, but this site's budget is 2.9; it can only be lowered" in refused.stderr
    other = command("client", "--site", site_file, "--epsilon", "2.9", "--delta", "1e-6")
    assert other.returncode == BudgetError.exit_code
    assert facts_of(network, "ash")["epsilon_budget"] == 2.9


def test_data_that_change_during_a_run_are_told_to_the_site_alone(network: Network) -> None:
    told = "for its own eyes: the data are not what they were when run"
    assert told in network.log("ash")
    assert "the run goes on with what they were then" in network.log("ash")
    assert not [name for name in ("server", *network.names) if name != "ash" and told in network.log(name)]
    assert "left out" not in network.log("ash")
    assert network.summary("ash")["rounds"] == network.summary("birch")["rounds"]


def test_all_sites_end_with_one_adapter(network: Network) -> None:
    summaries = [network.summary(name) for name in network.names]
    assert len({summary["adapter_digest"] for summary in summaries}) == 1
    assert {summary["round"] for summary in summaries} == {ROUNDS}

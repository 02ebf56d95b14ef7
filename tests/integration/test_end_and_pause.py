"""A run that its coordinator ends before its last round, or lets rest for a while."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from secure_fed.core.errors import NotEnoughSitesError, RecordError, StudyError
from secure_fed.core.status import StatusFile
from secure_fed.operate.standing import is_over, standing
from secure_fed.protocol.rounds import ReplyCode
from secure_fed.server.coordinator import Coordinator, Step
from secure_fed.server.orders import end_run, extend_run, hold_run
from secure_fed.server.supervisor import ServerFolders, _begin_if_asked
from tests.conftest import Federation, Run, make_template
from tests.integration.test_flower_rounds import _begin, _identity, _loop, _steps
from tests.network import Network

__all__ = ["_identity"]  # a fixture


def _reopened(federation: Federation) -> Coordinator:
    """The run's coordinator, as a server that is started again has it."""
    return ServerFolders(federation.folder / "study.toml", federation.folder / "server").coordinator(federation.agreed)


def test_an_ended_run_leaves_every_site_with_the_adapter_that_it_has(
    federation: Federation, secfacmic: Run, caplog: pytest.LogCaptureFixture
) -> None:
    coordinator, wire, loop = _begin(federation)
    state, study = federation.folder / "server", federation.folder / "study.toml"
    _steps(loop, lambda: len(coordinator.rounds) == 1)
    ended = secfacmic("study", "end", study, "--state", state, "--yes")
    assert ended.returncode == 0, ended.stderr
    assert "1 of 3 rounds are closed" in ended.stdout
    loop.run()
    kinds = [entry.header.kind for entry in coordinator.journal.records]
    assert kinds in (["genesis", "aggregate", "end"], ["genesis", "aggregate", "aggregate", "end"])
    assert coordinator.finished
    assert all(app.finished and app.site.finished and app.failure is None for app in wire.apps.values())
    assert len({app.site.adapter_digest for app in wire.apps.values()}) == 1
    assert {app.site.round for app in wire.apps.values()} == {len(kinds) - 2}
    assert is_over(state, federation.agreed)
    assert standing(state)["round"] == len(kinds) - 2
    assert secfacmic("journal", "verify", state, "--study", study).returncode == 0
    # What is over is not ended again, and a site that opens its folder anew knows it.
    with pytest.raises(StudyError, match="the run is over after"):
        end_run(federation.agreed, state)
    assert federation.site("ash").over


def test_a_site_that_was_away_learns_of_the_end_when_the_server_is_started_again(federation: Federation) -> None:
    coordinator, wire, loop = _begin(federation)
    _steps(loop, lambda: coordinator.step is Step.READY)
    wire.away.add("cedar")
    end_run(federation.agreed, federation.folder / "server")
    _steps(loop, lambda: coordinator.finished)
    again = _reopened(federation)
    assert again.finished
    wire.away.clear()
    loop = _loop(federation, again, wire)
    loop.run()
    assert all(app.site.finished for app in wire.apps.values())


def test_a_round_whose_cohort_is_chosen_is_closed_before_the_end(federation: Federation) -> None:
    """Its sites have paid for it."""
    coordinator, wire, loop = _begin(federation)
    _steps(loop, lambda: coordinator.step is Step.ENVELOPE)
    end_run(federation.agreed, federation.folder / "server")
    loop.run()
    assert [entry.header.kind for entry in coordinator.journal.records] == ["genesis", "aggregate", "end"]
    assert {app.site.round for app in wire.apps.values()} == {1}


@pytest.mark.parametrize("kind", ["end", "void", "aggregate"])
def test_nothing_follows_an_end(federation: Federation, kind: str) -> None:
    coordinator, _, loop = _begin(federation)
    end_run(federation.agreed, federation.folder / "server")
    _steps(loop, lambda: coordinator.finished)
    with pytest.raises(RecordError, match=f"a {kind} after the end"):
        coordinator.journal._append(kind, coordinator.round)  # type: ignore[arg-type]


def test_an_end_names_the_round_that_is_due_and_is_none_after_the_last(federation: Federation) -> None:
    coordinator, _, loop = _begin(federation)
    with pytest.raises(RecordError, match="in force from round 3, expected 1"):
        coordinator.journal._append("end", 3)
    loop.run()
    with pytest.raises(RecordError, match="an end after the last round"):
        coordinator.journal._append("end", coordinator.round)


def test_after_an_end_another_run_may_begin(federation: Federation, tmp_path: Path) -> None:
    coordinator, _, loop = _begin(federation)
    end_run(federation.agreed, federation.folder / "server")
    _steps(loop, lambda: coordinator.finished)
    sealed = tmp_path / "next.key"
    sealed.write_bytes(federation.seal_key(2))
    _begin_if_asked(
        federation.agreed, ServerFolders(federation.folder / "study.toml", federation.folder / "server"), sealed
    )
    assert _reopened(federation).run != coordinator.run


def test_a_paused_run_begins_no_round_and_asks_nobody_until_it_is_resumed(
    federation: Federation, secfacmic: Run, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "secure_fed")
    coordinator, wire, loop = _begin(federation)
    state, study = federation.folder / "server", federation.folder / "study.toml"
    _steps(loop, lambda: len(coordinator.rounds) == 1)
    assert secfacmic("study", "pause", study, "--state", state).returncode == 0
    _steps(loop, lambda: coordinator.resting)
    closed = len(coordinator.rounds)
    asked = _asked(wire)
    end = time.monotonic() + 1.0
    while time.monotonic() < end:
        loop.step()
    assert len(coordinator.rounds) == closed
    assert _asked(wire) - asked <= len(wire.apps)  # what was under way when it was paused
    assert caplog.text.count("does not begin: paused") == 1
    # Neither a restart nor the round's deadline begins one.
    again = _reopened(federation)
    assert again.resting
    assert again.asked == frozenset()
    loop.agreed.study.__dict__["round_seconds"] = 0.0
    loop.step()
    assert len(coordinator.rounds) == closed
    loop.agreed.study.__dict__["round_seconds"] = 60.0
    assert secfacmic("study", "resume", study, "--state", state).returncode == 0
    loop.run()
    assert [entry.header.kind for entry in coordinator.journal.records] == ["genesis", *["aggregate"] * 3]


def test_a_server_that_does_not_run_tells_what_was_ordered_and_not_what_it_waited_for(
    federation: Federation, secfacmic: Run
) -> None:
    _begin(federation)
    state, study = federation.folder / "server", federation.folder / "study.toml"
    StatusFile(state).begin("server", study="s", study_id="0" * 64, round=1, rounds=3, waiting="round 1: cedar is away")
    shown = secfacmic("status", state).stdout
    assert "NOT running" in shown
    assert "cedar is away" not in shown
    assert "paused" not in shown
    hold_run(federation.agreed, state, paused=True)
    assert "paused: no further round begins until secfacmic study resume" in secfacmic("status", state).stdout
    StatusFile(state)._path.unlink()  # as where no process of this version began
    assert "paused: no further round begins" in secfacmic("status", state).stdout
    assert secfacmic("study", "resume", study, "--state", state).returncode == 0
    assert "paused" not in secfacmic("status", state).stdout
    end_run(federation.agreed, state)
    assert "the run is to end before its last round" in secfacmic("status", state).stdout


def _asked(wire: Any) -> int:
    return sum(map(len, wire.pages.values()))


def test_a_round_whose_cohort_is_chosen_is_closed_before_a_pause(federation: Federation) -> None:
    coordinator, _, loop = _begin(federation)
    _steps(loop, lambda: coordinator.step is Step.ENVELOPE)
    hold_run(federation.agreed, federation.folder / "server", paused=True)
    assert not coordinator.resting
    _steps(loop, lambda: coordinator.resting)
    assert len(coordinator.rounds) == 1


def test_a_run_that_has_not_begun_is_neither_ended_nor_paused(federation: Federation, tmp_path: Path) -> None:
    for call in (
        lambda: end_run(federation.agreed, tmp_path),
        lambda: hold_run(federation.agreed, tmp_path, paused=True),
    ):
        with pytest.raises(StudyError, match="no run has begun"):
            call()


def test_an_end_that_is_not_confirmed_is_none(federation: Federation, secfacmic: Run) -> None:
    coordinator: Coordinator = _begin(federation)[0]
    refused = secfacmic("study", "end", federation.folder / "study.toml", "--state", federation.folder / "server")
    assert refused.returncode != 0
    assert not coordinator.ending


def test_nobody_is_asked_about_an_end_where_nothing_can_be_ended(
    federation: Federation, secfacmic: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, study = federation.folder / "server", federation.folder / "study.toml"
    monkeypatch.setattr("typer.confirm", lambda *_, **__: pytest.fail("asked"))
    refused = secfacmic("study", "end", study, "--state", state)
    assert refused.returncode == StudyError.exit_code
    assert "no run has begun" in refused.stderr


def test_an_end_is_told_of_how_many_rounds_an_extended_run_has(federation: Federation, secfacmic: Run) -> None:
    coordinator, _, loop = _begin(federation)
    state, study = federation.folder / "server", federation.folder / "study.toml"
    extend_run(federation.agreed, state, 7)
    _steps(loop, lambda: coordinator.journal.chain.rounds == 7)
    assert "of 7 rounds are closed" in secfacmic("study", "end", study, "--state", state, "--yes").stdout


# --- for want of sites ---


def test_below_a_quorum_of_training_sites_the_study_ends_by_rule_and_everybody_keeps_the_adapter(
    federation: Federation,
) -> None:
    coordinator, wire, loop = _begin(federation)
    _steps(loop, lambda: len(coordinator.rounds) == 1 and coordinator.step is Step.READY)
    wire.apps[wire.nodes["cedar"]].site.retire()
    # Its word is there at once, or with the next round if it has said READY already; neither waits for a deadline.
    _steps(loop, lambda: coordinator.finished)
    with pytest.raises(NotEnoughSitesError, match=r"of 3 rounds: 2 sites train any more; expected at least .* 3"):
        loop.run()
    assert coordinator.journal.records[-1].header.kind == "retired"
    assert coordinator.finished
    assert not coordinator.asked
    assert all(app.finished and app.site.over for app in wire.apps.values())
    assert len({app.site.adapter_digest for app in wire.apps.values()}) == 1
    assert is_over(federation.folder / "server", federation.agreed)
    with pytest.raises(StudyError, match="was ended"):
        extend_run(federation.agreed, federation.folder / "server", 9)
    # A site's own command: its results are there, and it ends with the code.
    ash = federation.site("ash")
    assert ash.over
    with pytest.raises(NotEnoughSitesError):
        ash.replica.state.chain.refuse_short()
    again = _loop(federation, federation.reopen(), wire)
    with pytest.raises(NotEnoughSitesError):
        again.run()


def test_as_many_as_a_quorum_go_on(federation: Federation) -> None:
    coordinator, _, loop = _begin(federation)
    assert not coordinator.journal.chain.short
    loop.run()
    coordinator.journal.chain.refuse_short()


def test_a_round_that_waits_for_a_site_that_is_lost_is_given_up_by_its_coordinators_people(
    federation: Federation, secfacmic: Run
) -> None:
    coordinator, wire, loop = _begin(federation)
    state, study = federation.folder / "server", federation.folder / "study.toml"
    _steps(loop, lambda: len(coordinator.rounds) == 1 and coordinator.step is Step.REVEAL)
    wire.away.add("cedar")
    _steps(loop, lambda: set(coordinator.sites_in) == {"ash", "birch"})
    end_run(federation.agreed, state)
    loop.step()
    assert not coordinator.finished, "it waits for the round under way"
    question = coordinator.request("ash", coordinator.run, len(coordinator.journal.records) - 1)
    ended = secfacmic("study", "end", study, "--state", state, "--yes", "--lost")
    assert ended.returncode == 0, ended.stderr
    assert "without the one under way" in ended.stdout
    _steps(loop, lambda: coordinator.finished)
    wire.away.clear()
    with pytest.raises(NotEnoughSitesError, match="after 1 of 3 rounds: its coordinator ended it"):
        loop.run()
    assert all(app.site.over and app.site.round == 1 for app in wire.apps.values())
    assert len({app.site.adapter_digest for app in wire.apps.values()}) == 1
    # Nothing of the round that was given up is said any more.
    ash = wire.apps[wire.nodes["ash"]].site
    again = ash.respond(question)
    assert (again.code, again.envelope) == (ReplyCode.APPLIED, b"")
    assert secfacmic("journal", "verify", state, "--study", study).returncode == 0


def test_an_end_says_nothing_else_than_that_sites_are_lost(federation: Federation) -> None:
    coordinator, _, _ = _begin(federation)
    with pytest.raises(RecordError, match="an end with b'gone'"):
        coordinator.journal._append("end", 1, b"gone")


def test_an_amendment_that_too_few_can_acknowledge_any_more_holds_up_no_end_for_want_of_sites(
    federation: Federation,
) -> None:
    coordinator, wire, loop = _begin(federation)
    state, sites = federation.folder / "server", [app.site for app in wire.apps.values()]
    _steps(loop, lambda: len(coordinator.rounds) == 1 and coordinator.step is Step.READY)
    chain = coordinator.journal.chain
    coordinator.amend(federation.seal_key(2, chain.key, members=chain.members))
    _steps(loop, lambda: coordinator.journal.chain.awaits_checkpoint)
    before = {site.adapter_digest for site in sites if site.round == 1}
    wire.away |= {"ash", "birch"}  # the key maker among them
    with pytest.raises(RecordError, match="a checkpoint follows an amendment and nothing else"):
        coordinator.journal.append_end()
    end_run(federation.agreed, state)
    loop.step()
    assert not coordinator.ends_now, "it waits for the checkpoint"
    end_run(federation.agreed, state, lost=True)
    _steps(loop, lambda: coordinator.finished)
    assert [entry.header.kind for entry in coordinator.journal.records] == ["genesis", "aggregate", "amendment", "end"]
    wire.away.clear()
    with pytest.raises(NotEnoughSitesError, match="after 1 of 3 rounds: its coordinator ended it"):
        loop.run()
    assert all(app.site.over and app.site.round == 1 for app in wire.apps.values())
    assert {site.adapter_digest for site in sites} == before
    # Also who starts anew, sites and server, takes it for over.
    assert federation.site("cedar").over
    assert _reopened(federation).finished


@pytest.mark.slow
def test_server_and_client_commands_of_a_study_without_enough_sites_end_with_its_code(
    tmp_path: Path, images: Path, secfacmic: Run
) -> None:
    template = make_template(collusion=1, rounds=500, round_seconds=120)
    network = Network(tmp_path / "out", template, images, forked=True)
    ash, cedar = (network.site_folder(name) / "site.toml" for name in ("ash", "cedar"))
    try:
        network.start("server", *network.names)
        network.wait_until(lambda: network.records >= 3, 120)
        # What a site asks for in the middle of the rounds, of the server that runs them.
        audited = secfacmic("journal", "audit", "--site", ash, "--rounds", "1", "--json")
        assert audited.returncode == 0, audited.stderr
        assert [row["same"] for row in json.loads(audited.stdout)["aggregates"]] == [True]
        network.kill("cedar")
        done = secfacmic("site", "retire", "--site", cedar, "--by", "Dr. C")
        assert done.returncode == 0, done.stderr
        network.start("cedar")  # it tells the server
        staying = (*network.names, "server")
        assert network.wait(120, *staying) == dict.fromkeys(staying, NotEnoughSitesError.exit_code)
    finally:
        network.close()
    assert all("2 sites train any more" in network.log(name) for name in staying)
    assert all("Traceback" not in network.log(name) for name in staying)
    assert len({network.summary(name)["adapter_digest"] for name in network.names}) == 1


@pytest.mark.slow
def test_commands_of_a_study_that_its_coordinators_people_end_for_lost_sites_end_with_the_code_too(
    tmp_path: Path, images: Path, secfacmic: Run
) -> None:
    template = make_template(collusion=1, rounds=500, round_seconds=30)
    network = Network(tmp_path / "out", template, images, forked=True)
    staying = ("ash", "birch", "server")
    try:
        network.start("server", *network.names)
        network.wait_until(lambda: network.records >= 3, 120)
        network.kill("cedar")
        state, study = network.folder / "server", network.folder / "study.toml"
        done = secfacmic("study", "end", study, "--state", state, "--yes", "--lost")
        assert done.returncode == 0, done.stderr
        assert network.wait(120, *staying) == dict.fromkeys(staying, NotEnoughSitesError.exit_code)
    finally:
        network.close()
    assert "cedar lack the last rounds" in network.log("server"), "it is not waited for longer than for a round"
    assert all("its coordinator ended it" in network.log(name) for name in staying)
    assert all("Traceback" not in network.log(name) for name in staying)
    assert network.summary("ash")["adapter_digest"] == network.summary("birch")["adapter_digest"]

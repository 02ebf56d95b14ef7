"""A run that is given more rounds than its study says, at each site only by the word of its people."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from secure_fed.cli import app
from secure_fed.clients.acceptance import record_acceptance, rounds_accepted
from secure_fed.clients.keyring import membership
from secure_fed.clients.sitefile import read_site_file
from secure_fed.core.errors import KeyFileError, NotAcceptedError, RecordError, StudyError
from secure_fed.operate.standing import is_over, standing
from secure_fed.protocol.records import MOST_ROUNDS
from secure_fed.server.coordinator import Coordinator, Step
from secure_fed.server.orders import amend_run, end_run, extend_run
from secure_fed.server.supervisor import ServerFolders
from tests.conftest import OBSERVER, Federation
from tests.integration.test_flower_rounds import Wire, _begin, _federation, _identity, _loop, _steps

__all__ = ["_identity"]  # a fixture


def _accept(federation: Federation, name: str, rounds: int) -> None:
    file = read_site_file(federation.folder / "sites" / name / "site.toml")
    record_acceptance(file, federation.agreed, membership(file, federation.agreed).identity, "Dr X", rounds=rounds)


def _all_accept(federation: Federation, rounds: int, but: str = "") -> None:
    for member in federation.agreed.study.sites:
        if member.name != but:
            _accept(federation, member.name, rounds)


def _kinds(coordinator: Coordinator) -> list[str]:
    return [entry.header.kind for entry in coordinator.journal.records]


def _call(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_a_run_that_goes_on_is_extended_by_a_record_and_trains_the_further_rounds(federation: Federation) -> None:
    coordinator, wire, loop = _begin(federation)
    state, study = federation.folder / "server", federation.folder / "study.toml"
    _steps(loop, lambda: len(coordinator.rounds) == 1)
    _all_accept(federation, 4)
    extended = _call("study", "extend", study, "--state", state, "--rounds", 4)
    assert extended.exit_code == 0, extended.output
    assert "--site site.toml --rounds 4" in " ".join(extended.output.split())
    told: list[dict[str, object]] = []
    loop.report = told.append
    loop.run()
    assert _kinds(coordinator).count("aggregate") == 4
    assert _kinds(coordinator).count("extension") == 1
    assert {each.site.round for each in wire.apps.values()} == {4}
    assert all(each.finished and each.failure is None for each in wire.apps.values())
    assert len({each.site.adapter_digest for each in wire.apps.values()}) == 1
    assert (told[-1]["round"], told[-1]["rounds"]) == (4, 4)
    assert is_over(state, federation.agreed)
    assert (standing(state)["round"], standing(state)["rounds"]) == (4, 4)
    verified = _call("journal", "verify", state, "--study", study, "--json")
    assert json.loads(verified.stdout)["runs"][0]["rounds"] == 4
    site = federation.site("ash")  # opened anew
    assert site.over
    assert site.rounds == 4


def test_a_run_that_has_closed_its_last_round_goes_on_once_it_is_extended(federation: Federation) -> None:
    coordinator, wire, loop = _begin(federation)
    loop.run()
    assert coordinator.finished
    _all_accept(federation, 4)
    state = federation.folder / "server"
    with pytest.raises(StudyError, match=r"over after 3 rounds; .* more rounds first"):
        amend_run(federation.agreed, state, b"")
    assert extend_run(federation.agreed, state, 4) == 3
    with pytest.raises(KeyFileError):  # there will be rounds for one that is a key's
        amend_run(federation.agreed, state, b"")
    again = ServerFolders(federation.folder / "study.toml", federation.folder / "server").coordinator(federation.agreed)
    assert not again.finished
    wire = Wire(federation, federation.sites())  # started anew
    _loop(federation, again, wire).run()
    assert _kinds(again) == ["genesis", *["aggregate"] * 3, "extension", "aggregate"]
    assert {each.site.round for each in wire.apps.values()} == {4}


def test_sites_that_have_been_told_the_end_are_told_of_the_extension_and_of_the_next_end(
    federation: Federation,
) -> None:
    coordinator, wire, loop = _begin(federation)
    _all_accept(federation, 4)
    # One of them is away at the end, so that the server waits.
    _steps(loop, lambda: len(coordinator.rounds) == 2 and coordinator.step is Step.REVEAL)
    wire.away.add(OBSERVER)
    _steps(loop, lambda: coordinator.finished and any(site.told_the_end for site in loop._sites))
    extend_run(federation.agreed, federation.folder / "server", 4)
    wire.away.clear()
    wire.since = dict.fromkeys(wire.apps, "second")
    _steps(loop, lambda: _kinds(coordinator)[-1] == "extension")
    assert not any(site.told_the_end for site in loop._sites)
    loop.run()
    assert {each.site.round for each in wire.apps.values()} == {4}


def test_a_site_whose_people_have_not_said_yes_sends_nothing_more_until_they_have(federation: Federation) -> None:
    coordinator, wire, loop = _begin(federation)
    _all_accept(federation, 5, but="cedar")
    _accept(federation, "cedar", 4)
    _steps(loop, lambda: len(coordinator.rounds) == 1)
    extend_run(federation.agreed, federation.folder / "server", 5)
    cedar = next(each for each in wire.apps.values() if each.site.name == "cedar")
    _steps(loop, lambda: cedar.failure is not None)
    assert isinstance(cedar.failure, NotAcceptedError)
    assert "an extension to 5 rounds; this site's people accepted 4" in str(cedar.failure)
    assert cedar.site.rounds == 3
    position = cedar.site.position
    assert federation.site("cedar").position == position  # nothing of it is on its disk
    _accept(federation, "cedar", 5)
    federation.site("cedar").replica.take(coordinator.journal.read(position))
    assert federation.site("cedar").rounds == 5


def test_what_was_accepted_stays_accepted_and_less_is_refused(federation: Federation) -> None:
    site = federation.folder / "sites" / "ash" / "site.toml"
    study = federation.folder / "study.toml"
    first = _call("site", "accept", study, "--site", site, "--by", "Dr X", "--rounds", 7, "--json")
    shown = json.loads(first.stdout)
    assert (shown["rounds"], shown["leaves"]["updates"]) == (7, 7)
    anew = _call("site", "accept", study, "--site", site, "--by", "Dr Y", "--json")
    assert json.loads(anew.stdout)["rounds"] == 7
    # Whoever accepts the study's own terms again takes nothing back.
    file = read_site_file(site)
    ash = membership(file, federation.agreed).identity
    record_acceptance(file, federation.agreed, ash, "Dr Z")
    assert rounds_accepted(file, federation.agreed, ash.keys.signing) == 7
    for rounds in (2, 6):
        refused = _call("site", "accept", study, "--site", site, "--by", "Dr Y", "--rounds", rounds)
        assert isinstance(refused.exception, NotAcceptedError)
        assert f"{rounds} rounds of study" in str(refused.exception)
        assert "expected 7 or more" in str(refused.exception)


def test_an_extension_within_a_round_waits_for_its_record(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("secure_fed.server.round_loop.PATIENCE", 0.1)
    coordinator, _, loop = _begin(federation)
    _all_accept(federation, 4)
    _steps(loop, lambda: coordinator.step is Step.ENVELOPE)
    extend_run(federation.agreed, federation.folder / "server", 4)
    assert coordinator.extending
    assert not coordinator.extends_now
    coordinator.fail([])  # another attempt of a round that had a cohort
    assert not coordinator.extends_now
    loop.run()
    assert _kinds(coordinator)[:3] == ["genesis", "aggregate", "extension"]


@pytest.mark.parametrize("said", [b"3", b"2", b"0", b"", b"04", b"4.", b"-4", b"+4", b"1_0", "٤".encode(), b"100001"])
def test_an_extension_to_no_more_rounds_or_to_no_number_is_refused(federation: Federation, said: bytes) -> None:
    coordinator, *_ = _begin(federation)
    with pytest.raises(RecordError, match=r"expected 4 to 100000|expected at most 6"):
        coordinator.journal._append("extension", 1, said)


def test_nobody_extends_what_has_not_begun_was_ended_or_has_as_many(federation: Federation, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="no run has begun"):
        extend_run(federation.agreed, tmp_path, 4)
    _begin(federation)
    state = federation.folder / "server"
    for rounds in (3, MOST_ROUNDS + 1):
        with pytest.raises(StudyError, match="and the run has 3; expected more"):
            extend_run(federation.agreed, state, rounds)
    end_run(federation.agreed, state)
    with pytest.raises(StudyError, match="the run was ended"):
        extend_run(federation.agreed, state, 4)
    with pytest.raises(StudyError, match="the run was ended"):
        amend_run(federation.agreed, state, b"")


def test_a_study_of_sums_has_the_rounds_of_its_method(images: Path, tmp_path: Path) -> None:
    federation = _federation(tmp_path, images, method={"adapter": "gaussian_head"}, rounds=1)
    coordinator, *_ = _begin(federation)
    with pytest.raises(StudyError, match="are its method's"):
        extend_run(federation.agreed, federation.folder / "server", 2)
    with pytest.raises(RecordError, match="are its method's"):
        coordinator.journal.append_extension(2)

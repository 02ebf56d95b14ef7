"""Before the first round the server sees who is there and ready, and may wait until all are."""

from __future__ import annotations

import hashlib
import logging
import time
from pathlib import Path
from typing import Any

import pytest

from secure_fed.clients.site import Site
from secure_fed.core.errors import DataError, EnvelopeError, NotAcceptedError
from secure_fed.protocol.presence import PresenceQuestion, check_presence, sign_presence
from secure_fed.protocol.rounds import ReplyCode
from secure_fed.protocol.signing import ZERO_DIGEST
from secure_fed.server.coordinator import Coordinator
from secure_fed.server.orders import hold_run
from secure_fed.server.round_loop import RoundLoop
from tests.conftest import OBSERVER, TRAINING, Federation
from tests.integration.test_flower_rounds import Wire, _begin, _identity, _loop, _steps

__all__ = ["_identity"]  # a fixture


def _told(loop: RoundLoop) -> dict[str, Any]:
    told: list[dict[str, Any]] = []
    loop.report = told.append
    loop._report()
    return told[-1]


def _in_lobby(federation: Federation, without_key: str = "") -> tuple[Coordinator, Wire, RoundLoop]:
    sites = federation.sites()
    sealed = federation.seal_key(1)
    (key,) = {site.replica.keys.accept(sealed).key for site in sites if site.name != without_key}
    coordinator = federation.open_run(key)
    coordinator.hold_in_lobby(True)
    wire = Wire(federation, sites)
    return coordinator, wire, _loop(federation, coordinator, wire)


def test_before_the_first_round_the_server_sees_what_each_member_says_of_itself(federation: Federation) -> None:
    coordinator, wire, loop = _in_lobby(federation)
    wire.away.add("cedar")
    _steps(loop, lambda: sum(site.presence is not None for site in loop._sites) == 3)
    sites = _told(loop)["sites"]
    for name in ("ash", "birch", OBSERVER):
        said = sites[name]["presence"]
        assert (said["ready"], said["keyed"]) == (True, True)
        note = next((federation.folder / "sites" / name / "state" / "accepted").glob("*.signed"))
        assert said["accepted"] == hashlib.sha256(note.read_bytes()).hexdigest()
        assert abs(said["clock_seconds"]) < 5
        assert said["bytes_per_second"] > 0
        assert sites[name]["doing"].startswith(f"ready: acceptance {said['accepted'][:16]}, clock ")
    assert sites["cedar"]["presence"] is None
    assert sites["cedar"]["doing"] == "not connected"
    assert coordinator.before_the_first


def test_a_lobby_begins_when_all_that_train_are_ready(federation: Federation, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "secure_fed")
    coordinator, wire, loop = _in_lobby(federation)
    wire.away.add("cedar")
    _steps(loop, lambda: "lobby: 2 of 3 sites are ready" in caplog.text)
    assert "waiting for cedar; begin without them: secfacmic study resume" in caplog.text
    loop.agreed.study.__dict__["round_seconds"] = 0.0
    loop.step()  # no deadline begins a round
    assert coordinator.in_lobby
    assert coordinator.asked == frozenset()
    assert federation.reopen().in_lobby  # nor a restart
    loop.agreed.study.__dict__["round_seconds"] = 60.0
    wire.away.clear()
    loop.run()
    assert "all 3 sites that train are ready" in caplog.text
    assert [entry.sites for entry in coordinator.rounds] == [TRAINING] * 3


def test_people_may_begin_with_those_who_are_ready(federation: Federation) -> None:
    coordinator, wire, loop = _in_lobby(federation)
    wire.away.add(OBSERVER)
    wire.silent.add("cedar")
    _steps(loop, lambda: sum(site.presence is not None for site in loop._sites) == 2)
    hold_run(federation.agreed, federation.folder / "server", paused=False)
    assert not coordinator.in_lobby
    wire.silent.clear()
    wire.away.clear()
    loop.run()
    assert coordinator.finished


def test_a_pause_in_the_lobby_is_taken_back_alone(federation: Federation) -> None:
    """Whoever pauses and goes on has not said that those who are not ready may be left out."""
    coordinator, *_ = _in_lobby(federation)
    state = federation.folder / "server"
    for paused, held in ((True, True), (False, True), (False, False)):
        hold_run(federation.agreed, state, paused=paused)
        assert coordinator.in_lobby == held
    assert not coordinator.resting


def test_a_lobby_that_was_left_is_not_entered_again(federation: Federation) -> None:
    """A service is started again with the same words, ``--lobby`` among them, also before round 1 has its cohort."""
    coordinator, *_ = _in_lobby(federation)
    coordinator.hold_in_lobby(True)
    assert coordinator.in_lobby
    hold_run(federation.agreed, federation.folder / "server", paused=False)
    again = federation.reopen()
    again.hold_in_lobby(True)
    assert not again.in_lobby


def test_a_site_without_the_runs_key_is_told_of_and_goes_on_once_it_has_it(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("secure_fed.server.round_loop.PATIENCE", 0.1)
    coordinator, wire, loop = _in_lobby(federation, without_key="birch")
    birch = next(app for app in wire.apps.values() if app.site.name == "birch")
    _steps(loop, lambda: sum(site.presence is not None for site in loop._sites) == 4)
    told = _told(loop)["sites"]["birch"]
    assert (told["presence"]["ready"], told["presence"]["keyed"]) == (False, False)
    assert "without this run's key (secfacmic keys accept)" in told["doing"]
    assert birch.failure is None
    assert birch.site.position == 0  # the genesis, which would end it, was not sent
    assert coordinator.in_lobby
    birch.site.replica.keys.accept(
        (federation.folder / "sites" / "ash" / "state" / "keys" / "000001.sealed").read_bytes()
    )
    loop.run()
    assert [entry.sites for entry in coordinator.rounds] == [TRAINING] * 3


def test_nobody_is_asked_any_more_once_a_cohort_is_chosen(federation: Federation) -> None:
    coordinator, _, loop = _begin(federation)
    _steps(loop, lambda: len(coordinator.rounds) == 1)
    assert not coordinator.before_the_first
    loop._sites[0].position = None
    request = loop._request(loop._sites[0], set())
    assert request is not None
    assert request.question == b""
    assert all(one["presence"] is None for one in _told(loop)["sites"].values())


@pytest.mark.parametrize("lack", [DataError("12 patients of class x have no image"), NotAcceptedError("nobody")])
def test_what_a_site_lacks_is_said_by_no_word_and_no_code(
    federation: Federation, monkeypatch: pytest.MonkeyPatch, lack: Exception
) -> None:
    def lacking(*arguments: object) -> None:
        raise lack

    _, wire, loop = _in_lobby(federation)
    ash = next(app for app in wire.apps.values() if app.site.name == "ash")
    monkeypatch.setattr(ash.site, "present", lacking)
    replies = []
    taken = loop._take
    monkeypatch.setattr(loop, "_take", lambda site, reply: (replies.append((site.name, reply)), taken(site, reply)))
    _steps(loop, lambda: ash.failure is lack)
    _steps(loop, lambda: any(name == "ash" for name, _ in replies))
    said = next(reply for name, reply in replies if name == "ash")
    assert (said.code, said.run, said.position, said.envelope) == (ReplyCode.MORE, "", 0, b"")


def test_the_line_is_measured_once(federation: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secure_fed.server.round_loop.PATIENCE", 0.05)
    _, wire, loop = _in_lobby(federation, without_key="birch")
    sent: list[int] = []
    send = wire.shelf.send
    wire.shelf.send = lambda run, data: (sent.append(len(data)), send(run, data))[1]  # type: ignore[method-assign]
    end = time.monotonic() + 2
    while time.monotonic() < end:
        loop._looked = 0.0
        loop.step()
    assert sent == [32 * 1024] * 4


def _word(federation: Federation, site: Site, **facts: Any) -> bytes:
    known = {"purpose": "ready", "accepted": ZERO_DIGEST, "keyed": True, "secfacmic": "1.0", "run": "5" * 64}
    known |= {"clock_ms": 1, "rate": 1, "rehearsed": "", "rehearsed_bytes": 0}
    return sign_presence(federation.agreed, site.name, site.replica.identity.signing, **(known | facts))


def test_a_presence_is_a_members_of_the_run_that_was_asked_about(
    federation: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    ash, birch = federation.site("ash"), federation.site("birch")
    members = {site.name: site for site in federation.agreed.study.sites}
    assert check_presence(_word(federation, ash), federation.agreed, members, "5" * 64).site == "ash"
    with pytest.raises(EnvelopeError, match="for run 5555555555555555, expected 6666666666666666"):
        check_presence(_word(federation, ash), federation.agreed, members, "6" * 64)
    with pytest.raises(EnvelopeError):
        check_presence(_word(federation, ash)[:-1], federation.agreed, members, "5" * 64)
    del members["ash"]
    with pytest.raises(EnvelopeError):
        check_presence(_word(federation, ash), federation.agreed, members, "5" * 64)
    # Another member's word in this one's reply.
    _, wire, loop = _in_lobby(federation)
    app = next(app for app in wire.apps.values() if app.site.name == "ash")
    app.site.present = lambda question, rate: birch.present(question, rate)  # type: ignore[method-assign]
    _steps(loop, lambda: "a presence of birch in a reply of ash" in caplog.text)
    assert next(site for site in loop._sites if site.name == "ash").presence is None


@pytest.mark.parametrize("data", [b"", b"SFL2", b"SFL2" + bytes(63), b"SFL2" + bytes(65), b"SFH2" + bytes(64)])
def test_only_a_presence_question_is_taken_for_one(data: bytes) -> None:
    assert PresenceQuestion.from_bytes(data) is None
    question = PresenceQuestion("a1" * 32, "b2" * 32)
    assert PresenceQuestion.from_bytes(question.to_bytes()) == question


def test_a_log_line_says_who_is_ready(federation: Federation, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    caplog.set_level(logging.INFO, "secure_fed")
    _, _, loop = _in_lobby(federation)
    _steps(loop, lambda: caplog.text.count("ready: acceptance ") == 4)


def test_nobody_is_ready_for_a_run_that_its_people_have_not_accepted(federation: Federation) -> None:
    coordinator, _, loop = _begin(federation)
    loop.run()
    assert coordinator.finished
    ash = federation.site("ash")
    assert ash.present(PresenceQuestion(ash.run, ZERO_DIGEST), 1.0).code == ReplyCode.PRESENT
    with pytest.raises(NotAcceptedError, match="--again"):
        ash.present(PresenceQuestion("7" * 64, ZERO_DIGEST), 1.0)

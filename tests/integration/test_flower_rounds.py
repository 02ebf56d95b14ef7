"""The round loop with real sites and a real coordinator, and a network that does as it is told."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from flwr.app import Context, Message, RecordDict
from flwr.app.message import make_message
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

import secure_fed.server.coordinator
import secure_fed.server.round_loop
from secure_fed.clients.erasure import _withdraw
from secure_fed.clients.flower_app import SiteApp
from secure_fed.clients.site import Site
from secure_fed.clients.sitefile import read_site_file
from secure_fed.core.errors import BudgetError, NotEnoughSitesError, ProtocolError
from secure_fed.lab.simulation import prepare
from secure_fed.protocol.round_frames import sign_ready, sign_reveal
from secure_fed.protocol.rounds import ReplyCode, RoundReply
from secure_fed.server.coordinator import Coordinator, Step
from secure_fed.server.orders import hold_run
from secure_fed.server.round_loop import RoundLoop
from secure_fed.server.supervisor import ServerFolders
from secure_fed.transport.flower_messages import contract, read_request
from tests.conftest import OBSERVER, TRAINING, Federation, make_template, send_envelopes
from tests.flower_messages import Shelf

RUN = 7


class Wire(Grid):  # type: ignore[misc]
    """Sites by node id; each can be away, silent, or answer."""

    def __init__(self, federation: Federation, sites: Iterable[Site]) -> None:
        self.apps = {
            number: SiteApp(site, federation.agreed.study.id, lambda _: None) for number, site in enumerate(sites, 100)
        }
        self.nodes = {app.site.name: number for number, app in self.apps.items()}
        self.away: set[str] = set()
        self.silent: set[str] = set()
        self.since = dict.fromkeys(self.apps, "first")
        self.shelf = Shelf()
        self.bundle = contract(federation.agreed.study.id)
        self.waiting: dict[str, Message] = {}
        self.pages: dict[str, list[int]] = {}
        self.ttls: list[float] = []
        self.pushed: list[int] = []
        self._ids = itertools.count()

    @property
    def run(self) -> Any:
        return SimpleNamespace(run_id=RUN)

    def set_run(self, run: Any) -> None:
        raise NotImplementedError

    def create_message(self, *arguments: Any, **named: Any) -> Message:
        raise NotImplementedError("deprecated, and not used")

    def send_and_receive(self, *arguments: Any, **named: Any) -> Any:
        raise NotImplementedError("holds all replies in memory, and is not used")

    def get_node_ids(self) -> Iterable[int]:
        return [node.node_id for node in self.get_nodes()]

    def get_nodes(self) -> Any:
        return [
            SimpleNamespace(node_id=number, last_activated_at=self.since[number])
            for number, app in self.apps.items()
            if app.site.name not in self.away
        ]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        names: list[str] = []
        messages = list(messages)
        self.pushed.append(len(messages))
        for message in messages:
            name = f"{next(self._ids):064d}"
            message.metadata.__dict__["_message_id"] = name
            content = recorddict_from_proto(recorddict_to_proto(message.content))
            self.waiting[name] = make_message(metadata=message.metadata, content=content)
            site = self.apps[message.metadata.dst_node_id].site.name
            self.pages.setdefault(site, []).append(sum(map(len, read_request(content, self.shelf.fetch).records)))
            self.ttls.append(message.metadata.ttl)
            names.append(name)
        return names

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = []
        for name in message_ids:
            message = self.waiting[name]
            app = self.apps[message.metadata.dst_node_id]
            if app.site.name in self.away | self.silent:
                continue
            del self.waiting[name]
            context = Context(RUN, message.metadata.dst_node_id, {}, RecordDict(), {})
            replies.append(app.answer(message, context, self.bundle, self.shelf))
            app.after_reply(taken=True)
        return replies


@pytest.fixture(autouse=True)
def _identity() -> None:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, RUN, 1


def _begin(federation: Federation) -> tuple[Coordinator, Wire, RoundLoop]:
    sites = federation.sites()
    coordinator = federation.begin(sites)
    wire = Wire(federation, sites)
    return coordinator, wire, _loop(federation, coordinator, wire)


def _loop(federation: Federation, coordinator: Coordinator, wire: Wire) -> RoundLoop:
    return RoundLoop(coordinator, federation.agreed, wire, wire.nodes, wire.shelf, wire.shelf)


def _steps(loop: RoundLoop, condition: Any, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing of it came"
        loop._looked = 0.0  # do not wait for the next look at who is connected
        loop.step()


def _federation(folder: Path, images: Path, **changes: Any) -> Federation:
    prepare(make_template(**changes), folder, images)
    return Federation(folder)


def test_a_study_runs_to_its_end_and_every_site_has_the_same(federation: Federation) -> None:
    coordinator, wire, loop = _begin(federation)
    loop.run()
    assert coordinator.finished
    assert [entry.sites for entry in coordinator.rounds] == [TRAINING] * 3
    assert len({app.site.adapter_digest for app in wire.apps.values()}) == 1
    assert all(app.finished for app in wire.apps.values())
    assert min(wire.ttls) >= 60


def test_all_who_are_asked_at_one_moment_are_asked_in_one_call(federation: Federation) -> None:
    """Each call costs a way between the server's two processes."""
    _, wire, loop = _begin(federation)
    loop.step()
    loop.step()
    assert wire.pushed == [len(wire.nodes)] * 2  # where they are, then what the first step asks


def test_a_missing_site_is_waited_for_until_the_deadline_and_catches_up(
    tmp_path: Path, images: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "secure_fed")
    federation = _federation(tmp_path / "out", images, rounds=4, max_sites=4, min_sites=2, mode="plain")
    federation.agreed.study.__dict__["round_seconds"] = 4.0
    sites = federation.sites()
    for site in sites:
        site.features()  # not within the deadline
    coordinator = Coordinator.begin(federation.agreed, federation.folder / "server", federation.signing, "0" * 64)
    wire = Wire(federation, sites)
    loop = _loop(federation, coordinator, wire)
    wire.away = {"cedar"}
    began = time.monotonic()
    _steps(loop, lambda: len(coordinator.rounds) == 1)
    assert time.monotonic() - began >= 4.0
    assert "waiting for at most 4 s for cedar, not connected" in caplog.text
    assert "round 1 goes on without cedar" in caplog.text
    # Who missed one deadline and is still away is not waited for again.
    began = time.monotonic()
    _steps(loop, lambda: len(coordinator.rounds) == 2)
    assert time.monotonic() - began < 4.0
    wire.away = set()
    _steps(loop, lambda: coordinator.finished)
    assert [len(entry.sites) for entry in coordinator.rounds] == [2, 2, 3, 3]
    loop.run()
    assert len({app.site.adapter_digest for app in wire.apps.values()}) == 1


def test_below_min_sites_the_study_waits_beyond_the_deadline_and_says_so(
    federation: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "secure_fed")
    federation.agreed.study.__dict__["round_seconds"] = 0.2
    coordinator, wire, loop = _begin(federation)
    wire.away = {"birch"}
    end = time.monotonic() + 1.5
    while time.monotonic() < end:
        loop._looked = 0.0
        loop.step()
    assert not coordinator.rounds
    assert "2 sites in, quorum 3; waiting until there are enough for birch, not connected" in caplog.text
    wire.away = set()
    _steps(loop, lambda: len(coordinator.rounds) == 1)


def test_a_site_that_reconnects_is_asked_again_and_counts_once(federation: Federation) -> None:
    coordinator, wire, loop = _begin(federation)
    wire.silent = {"ash"}
    _steps(loop, lambda: coordinator.sites_in == ("birch", "cedar"))
    lost = dict(wire.waiting)
    wire.since[wire.nodes["ash"]] = "second"  # its process was killed; what it was asked is gone
    wire.silent = set()
    _steps(loop, lambda: len(coordinator.rounds) == 1)
    assert coordinator.rounds[0].sites == TRAINING
    assert set(lost) <= set(wire.waiting)  # never answered


def test_a_new_loop_goes_on_in_mid_round_and_no_envelope_counts_twice(federation: Federation) -> None:
    _, wire, loop = _begin(federation)
    _steps(loop, lambda: loop.coordinator.step is Step.ENVELOPE)
    wire.silent = {"cedar"}
    _steps(loop, lambda: loop.coordinator.sites_in == ("ash", "birch"))
    wire.silent = set()
    again = federation.reopen()
    assert again.sites_in == ("ash", "birch")
    second = _loop(federation, again, wire)
    second.run()
    assert [entry.sites for entry in again.rounds] == [TRAINING] * 3
    assert len({app.site.adapter_digest for app in wire.apps.values()}) == 1


def test_a_site_that_joins_at_round_50_takes_the_journal_in_pages(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = {"steps": 1, "learning_rate": 0.003, "batch_size": 8}
    federation = _federation(
        tmp_path / "out", images, rounds=52, min_sites=2, mode="plain", training=training, method={"adapter": "facmic"}
    )
    sites = federation.sites()
    coordinator = Coordinator.begin(federation.agreed, federation.folder / "server", federation.signing, "0" * 64)
    wire = Wire(federation, sites)
    loop = _loop(federation, coordinator, wire)
    wire.away = loop._absent = {"cedar"}
    _steps(loop, lambda: len(coordinator.rounds) == 50, 120)
    limit = 3 * coordinator.rounds[0].size
    monkeypatch.setattr(secure_fed.server.coordinator, "PAGE_BYTES", limit)
    wire.away = set()
    _steps(loop, lambda: coordinator.finished, 60)
    loop.run()
    pages = [size for size in wire.pages["cedar"] if size]
    assert len(pages) >= 50 / 3
    assert max(pages) <= limit
    assert "cedar" in coordinator.rounds[-1].sites
    assert len({app.site.adapter_digest for app in wire.apps.values()}) == 1


def test_a_site_that_fails_is_asked_later_and_the_others_go_on(
    federation: Federation, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("secure_fed.server.round_loop.PATIENCE", 0.05)
    coordinator, wire, loop = _begin(federation)
    broken = wire.apps[wire.nodes["birch"]].site
    respond = broken.respond
    broken.respond = lambda request: [][1]  # type: ignore[method-assign,assignment]
    _steps(loop, lambda: coordinator.sites_in == ("ash", "cedar"))
    assert "birch: cannot take part: failed" in caplog.text
    broken.respond = respond  # type: ignore[method-assign]
    loop.run()
    assert [entry.sites for entry in coordinator.rounds] == [TRAINING] * 3


def test_an_envelope_that_is_refused_does_not_end_the_study(
    federation: Federation, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("secure_fed.server.round_loop.PATIENCE", 0.05)
    coordinator, wire, loop = _begin(federation)
    site = wire.apps[wire.nodes["ash"]].site
    respond = site.respond

    def forged(request: Any) -> Any:
        reply = respond(request)
        return dataclasses.replace(reply, envelope=reply.envelope[:-1] + b"\x00" if reply.envelope else b"")

    site.respond = forged  # type: ignore[method-assign]
    _steps(loop, lambda: coordinator.sites_in == ("birch", "cedar"))
    _steps(loop, lambda: "ash: its reply is refused" in caplog.text)
    assert coordinator.sites_in == ("birch", "cedar")
    site.respond = respond  # type: ignore[method-assign]
    loop.run()
    assert [entry.sites for entry in coordinator.rounds] == [TRAINING] * 3


def test_a_site_that_sends_wrong_checks_without_end_is_asked_now_and_then(
    federation: Federation, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Else one site keeps the server busy, and fills its log."""
    coordinator, wire, loop = _begin(federation)
    site = wire.apps[wire.nodes["birch"]].site
    respond = site.respond

    def wrong(request: Any) -> Any:
        reply = respond(request)
        if reply.code != ReplyCode.REVEALED:
            return reply
        digest = coordinator._arrived.digest  # type: ignore[union-attr]
        key = site.replica.identity.signing
        return dataclasses.replace(reply, envelope=sign_reveal(federation.agreed, digest, "birch", (1, 2), key))

    site.respond = wrong  # type: ignore[method-assign]
    _steps(loop, lambda: "birch: its REVEAL of round 1 is wrong" in caplog.text)
    for _ in range(20):
        loop.step()
    assert caplog.text.count("birch: its REVEAL of round 1 is wrong") == 1
    site.respond = respond  # type: ignore[method-assign]
    monkeypatch.setattr("secure_fed.server.round_loop.PATIENCE", 0.05)
    for each in loop._sites:
        each.not_before = 0.0
    loop.run()
    assert [entry.sites for entry in coordinator.rounds] == [TRAINING] * 3


def test_a_rotated_key_takes_force_in_mid_study(federation: Federation, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "secure_fed")
    coordinator, wire, loop = _begin(federation)
    _steps(loop, lambda: len(coordinator.rounds) == 1)
    sealed = _rotated(federation, coordinator)
    for app in wire.apps.values():
        app.site.replica.keys.accept(sealed)
    assert loop.run()
    kinds = [entry.header.kind for entry in coordinator.journal.records]
    assert kinds == ["genesis", "aggregate", "amendment", "checkpoint", "aggregate", "aggregate"]
    assert "amendment appended before round 2" in caplog.text
    assert len({app.site.adapter_digest for app in wire.apps.values()}) == 1


@pytest.mark.parametrize("how", ["they refuse it", "they are away"])
def test_where_too_few_would_be_left_of_a_cohort_all_are_asked_anew(
    federation: Federation, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """What the people of sites that refuse a cohort say then is in their next READYs alone."""
    monkeypatch.setattr("secure_fed.server.round_loop.PATIENCE", 0.05)
    federation.agreed.study.__dict__["round_seconds"] = 1.0
    coordinator, wire, loop = _begin(federation)
    _steps(loop, lambda: coordinator.step is Step.ENVELOPE)
    others = {"birch", "cedar"}
    if how == "they refuse it":
        for app in wire.apps.values():
            if app.site.name in others:
                app.site.__dict__["_envelope"] = mock.Mock(side_effect=ProtocolError("another cohort"))
    else:
        wire.silent = set(others)
        _steps(loop, lambda: coordinator.sites_in == ("ash",))
        wire.away, wire.silent = wire.silent, set()
    _steps(loop, lambda: coordinator.attempt == 2)
    assert coordinator.left_out == frozenset()
    for app in wire.apps.values():
        app.site.__dict__.pop("_envelope", None)
    wire.away = set()
    federation.agreed.study.__dict__["round_seconds"] = 60.0
    _steps(loop, lambda: coordinator.finished, 60)
    assert [entry.sites for entry in coordinator.rounds] == [TRAINING] * 3


@pytest.mark.parametrize("restarted", [False, True])
def test_an_observer_that_has_a_record_which_a_void_replaced_comes_back(
    federation: Federation, restarted: bool
) -> None:
    """It is asked for nothing, and may hear of it only when the round has a record again: its journal is as long."""
    coordinator, wire, loop = _begin(federation)
    sites = {app.site.name: app.site for app in wire.apps.values()}
    _steps(loop, lambda: all(site.position == 2 for site in sites.values()))
    before = sites[OBSERVER].adapter_digest
    wire.away = {OBSERVER}
    for name in TRAINING:
        sites[name].void(1)
    _steps(loop, lambda: coordinator.journal.records[1].header.kind == "void" and len(coordinator.rounds) == 1)
    assert (sites[OBSERVER].position, sites[OBSERVER].adapter_digest) == (2, before)
    wire.away = set()
    if restarted:
        loop = _loop(federation, federation.reopen(), wire)
    loop.run()
    assert sites[OBSERVER].round == federation.agreed.study.rounds
    assert len({site.adapter_digest for site in sites.values()}) == 1
    assert sites[OBSERVER].replica.files.records.read(1) == coordinator.journal.read(1)


def test_when_members_change_the_loop_ends_for_them_to_be_registered(federation: Federation) -> None:
    coordinator, wire, loop = _begin(federation)
    _steps(loop, lambda: len(coordinator.rounds) == 1)
    sealed = _rotated(federation, coordinator, removed=(OBSERVER,))
    for app in wire.apps.values():
        if app.site.name != OBSERVER:
            app.site.replica.keys.accept(sealed)
    assert not loop.run()
    assert OBSERVER not in coordinator.journal.chain.members
    del wire.nodes[OBSERVER]
    again = _loop(federation, federation.reopen(), wire)
    assert again.run()
    digests = {app.site.name: app.site.adapter_digest for app in wire.apps.values()}
    assert len({digests[name] for name in TRAINING}) == 1


def test_when_too_few_can_train_the_study_ends_with_its_own_code(federation: Federation) -> None:
    coordinator, wire, loop = _begin(federation)
    _steps(loop, lambda: len(coordinator.rounds) == 1)
    for name in ("birch", "cedar"):
        _has_nothing_to_give(wire, name)
    with pytest.raises(NotEnoughSitesError, match="1 sites can still train"):
        _steps(loop, lambda: False)


def test_one_site_that_says_it_has_nothing_to_give_is_named_and_does_not_end_the_study(
    federation: Federation, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("secure_fed.server.round_loop.PATIENCE", 0.05)
    coordinator, wire, loop = _begin(federation)
    _steps(loop, lambda: len(coordinator.rounds) == 1)
    honest = _has_nothing_to_give(wire, "cedar")
    _steps(loop, lambda: caplog.text.count("cedar says that it has no update to give") == 2)
    assert not coordinator.finished
    wire.apps[wire.nodes["cedar"]].site.respond = honest
    _steps(loop, lambda: coordinator.finished, 60)


def _has_nothing_to_give(wire: Any, name: str) -> Any:
    """Let a site say so whenever it is asked for a word; how it answers in truth."""
    site = wire.apps[wire.nodes[name]].site
    respond = site.respond

    def spent(request: Any) -> Any:
        reply = respond(request)
        return dataclasses.replace(reply, code=ReplyCode.APPLIED, envelope=b"") if reply.envelope else reply

    site.respond = spent
    return respond


def test_a_server_put_back_to_before_its_attempts_asks_for_later_ones_until_it_has_caught_up(
    federation: Federation, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its sites answer no attempt that they have left behind, and three of three are needed."""
    monkeypatch.setattr("secure_fed.server.round_loop.PATIENCE", 0.05)
    federation.agreed.study.__dict__["round_seconds"] = 1.0
    coordinator, wire, _ = _begin(federation)
    sites = [app.site for app in wire.apps.values() if app.site.name in TRAINING]
    send_envelopes(coordinator, sites)
    copy = federation.folder / "copy"
    shutil.copytree(federation.folder / "server", copy)
    for _ in range(2):
        assert coordinator.fail([])
        send_envelopes(coordinator, sites)
    assert coordinator.attempt == 3
    shutil.rmtree(federation.folder / "server")
    shutil.copytree(copy, federation.folder / "server")
    coordinator = federation.reopen()
    assert coordinator.attempt == 1
    loop = _loop(federation, coordinator, wire)
    _steps(loop, lambda: coordinator.finished, 60)
    assert [entry.sites for entry in coordinator.rounds] == [TRAINING] * 3
    assert "all are asked anew, for attempt 3" in caplog.text


def test_one_site_that_refuses_every_attempt_costs_the_others_the_deadline_alone(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where three are needed of three it holds the round up, as it could by staying away; attempts do not run out."""
    monkeypatch.setattr("secure_fed.server.round_loop.PATIENCE", 0.01)
    monkeypatch.setattr("secure_fed.server.coordinator.MOST_ANEW", 3)
    coordinator, wire, loop = _begin(federation)
    cedar = next(app.site for app in wire.apps.values() if app.site.name == "cedar")
    cedar.__dict__["_ready"] = mock.Mock(side_effect=ProtocolError("no"))
    _steps(loop, lambda: coordinator.attempt == 4)
    for _ in range(20):
        loop.step()
    assert coordinator.attempt == 4
    del cedar.__dict__["_ready"]
    _steps(loop, lambda: len(coordinator.rounds) == 1)


def test_who_had_no_update_in_a_round_that_was_given_up_is_asked_when_it_begins_anew(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its attempts begin anew; without the one that was passed over, and another that is lost, there is no quorum. The
    void is taken in a pause, so that nothing but the question for an update is left to ask."""
    monkeypatch.setattr("secure_fed.server.round_loop.PATIENCE", 0.05)
    sites = [{"name": name} for name in (*TRAINING, OBSERVER)]
    federation = _federation(tmp_path / "out", images, sites=sites, rounds=1)
    coordinator, wire, loop = _begin(federation)
    by_name = {app.site.name: app.site for app in wire.apps.values()}
    by_name["ash"].__dict__["_ready"] = mock.Mock(side_effect=BudgetError("none left for this round"))
    _steps(loop, lambda: coordinator.step is Step.REVEAL)
    assert "ash" not in coordinator.asked
    wire.away = {"birch"}
    del by_name["ash"].__dict__["_ready"]
    for name in ("ash", "cedar", OBSERVER):
        by_name[name].void(1)
        wire.since[wire.nodes[name]] = "again"
    server = federation.folder / "server"
    hold_run(federation.agreed, server, paused=True)
    _steps(loop, lambda: all(by_name[name].position == 2 for name in ("ash", "cedar", OBSERVER)))
    assert coordinator.journal.records[-1].header.kind == "void"
    hold_run(federation.agreed, server, paused=False)
    federation.agreed.study.__dict__["round_seconds"] = 0.0
    _steps(loop, lambda: {*coordinator.sites_in} == {"ash", "cedar", OBSERVER} or coordinator.step is not Step.READY)


def test_status_says_whose_amendment_the_study_waits_at(federation: Federation) -> None:
    coordinator, wire, loop = _begin(federation)
    _steps(loop, lambda: len(coordinator.rounds) == 1)
    _rotated(federation, coordinator)
    ash = next(app.site for app in wire.apps.values() if app.site.name == "ash")
    ash.replica.__dict__["_checkpoint_digest"] = lambda *_: "6" * 64
    _steps(loop, lambda: loop._told.startswith("the amendment that ash sealed is not in force"))
    assert "another adapter than birch, cedar hold: it is damaged or lies" in loop._told
    assert "secfacmic study end --lost" in loop._told
    del ash.replica.__dict__["_checkpoint_digest"]


def _rotated(federation: Federation, coordinator: Coordinator, **changes: Any) -> bytes:
    """Leave an amendment for the coordinator, as the key maker makes it."""
    chain = coordinator.journal.chain
    epoch = federation.site("ash").replica.keys.newest[0] + 1
    sealed = federation.seal_key(epoch, chain.key, members=chain.members, **changes)
    coordinator.amend(sealed)
    return sealed


def test_a_site_that_has_dropped_its_update_begins_the_attempt_anew(
    federation: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    coordinator, wire, loop = _begin(federation)
    _steps(loop, lambda: coordinator.step is Step.ENVELOPE)
    wire.silent.add("cedar")
    _steps(loop, lambda: set(coordinator.sites_in) == {"ash", "birch"})
    site = wire.apps[100].site
    assert site.name == "ash"
    _withdraw(read_site_file(federation.folder / "sites" / "ash" / "site.toml").state_folder)
    wire.apps[100] = SiteApp(federation.site("ash"), federation.agreed.study.id, lambda _: None)
    wire.since[100] = "second"
    wire.silent.clear()
    _steps(loop, lambda: coordinator.round == 2)
    record = coordinator.rounds[0]
    assert record.sites == TRAINING
    assert "ash: has dropped its update; another attempt" in caplog.text
    _steps(loop, lambda: coordinator.finished, 60)


def test_a_round_that_is_given_up_begins_anew_with_all_who_are_there(federation: Federation) -> None:
    coordinator, wire, loop = _begin(federation)
    _steps(loop, lambda: coordinator.step is Step.REVEAL)
    wire.silent.add("cedar")
    _steps(loop, lambda: set(coordinator.sites_in) == {"ash", "birch"})
    for number in (100, 101, 102):  # each stopped, asked, and started again
        wire.apps[number].site.void(1)
        wire.since[number] = "second"
    wire.silent.clear()
    _steps(loop, lambda: coordinator.finished, 60)
    assert [entry.header.kind for entry in coordinator.journal.records][:3] == ["genesis", "void", "aggregate"]


def test_a_site_whose_older_disk_was_put_back_sits_the_round_out_and_trains_on(
    tmp_path: Path, images: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over messages as they travel: its own envelope, which the server hands back, tells it."""
    monkeypatch.setattr("secure_fed.server.round_loop.PATIENCE", 0.05)
    training = [{"name": name} for name in (*TRAINING, OBSERVER)]
    federation = _federation(tmp_path / "out", images, rounds=2, mode="plain", sites=training)
    state = federation.folder / "sites" / "ash" / "state"
    coordinator = Coordinator.begin(federation.agreed, federation.folder / "server", federation.signing, "0" * 64)
    sites = federation.sites()
    for site in sites:
        site.features()
    shutil.copytree(state, tmp_path / "older")
    wire = Wire(federation, sites)
    loop = _loop(federation, coordinator, wire)
    _steps(loop, lambda: coordinator.step is Step.ENVELOPE)
    wire.silent = {"birch"}
    _steps(loop, lambda: "ash" in coordinator.sites_in)
    shutil.rmtree(state)
    shutil.copytree(tmp_path / "older", state)
    wire.apps[wire.nodes["ash"]] = SiteApp(federation.site("ash"), federation.agreed.study.id, lambda _: None)
    wire.since[wire.nodes["ash"]] = "second"
    _steps(loop, lambda: "ash: was put back to an older state, and sits round 1 out" in caplog.text)
    wire.silent = set()
    assert loop.run()
    assert [entry.sites for entry in coordinator.rounds] == [("birch", "cedar", OBSERVER), (*TRAINING, OBSERVER)]
    assert len({app.site.adapter_digest for app in wire.apps.values()}) == 1


@pytest.mark.parametrize("when", ["before its envelope", "after its envelope", "while another one is away"])
def test_where_one_site_gives_the_round_up_before_the_sum_is_fixed_the_others_close_it(
    tmp_path: Path, images: Path, caplog: pytest.LogCaptureFixture, when: str
) -> None:
    """Else one site's word stops the others: they would wait for what it never sends, and say for nobody."""
    training = [{"name": name} for name in (*TRAINING, OBSERVER)]
    federation = _federation(tmp_path / "out", images, rounds=1, mode="plain", sites=training)
    coordinator = Coordinator.begin(federation.agreed, federation.folder / "server", federation.signing, "0" * 64)
    wire = Wire(federation, federation.sites())
    loop = _loop(federation, coordinator, wire)
    if when == "while another one is away":
        wire.away = {"birch"}
        federation.agreed.study.__dict__["round_seconds"] = 0.5
    _steps(loop, lambda: coordinator.step is Step.ENVELOPE)
    federation.agreed.study.__dict__["round_seconds"] = 60.0
    wire.silent = {"birch"}
    if when == "after its envelope":
        _steps(loop, lambda: "ash" in coordinator.sites_in)
        wire.since[wire.nodes["ash"]] = "second"
    wire.apps[wire.nodes["ash"]].site.void(1)
    _steps(loop, lambda: coordinator.voiding == {"ash"})
    assert (
        loop._doing(loop._sites[0], frozenset(coordinator.sites_in), coordinator.voiding)
        == "its people have given the round up"
    )
    if wire.away:
        _steps(loop, lambda: coordinator.sites_in == ("cedar", OBSERVER) and coordinator.step is Step.READY)
        key, due = wire.apps[wire.nodes["ash"]].site.replica.identity.signing, coordinator.journal.chain.due
        ready = sign_ready(federation.agreed, due, coordinator.attempt, "ash", True, key)
        coordinator.receive(RoundReply("ash", ReplyCode.READY, coordinator.run, 1, "", ready))
        assert coordinator.sites_in == ("cedar", OBSERVER), "nor can it cost one attempt after the other"
    wire.away, wire.silent = set(), set()
    _steps(loop, lambda: coordinator.finished)
    text = "too few without ash" if when == "while another one is away" else "another attempt, without ash"
    assert text in caplog.text
    assert [entry.sites for entry in coordinator.rounds] == [("birch", "cedar", OBSERVER)]


def test_with_pads_a_site_that_goes_after_the_sum_is_fixed_costs_no_update(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(secure_fed.server.round_loop, "PATIENCE", 0.0)
    sites = [{"name": name} for name in (*TRAINING, OBSERVER)]
    federation = _federation(tmp_path / "out", images, sites=sites, collusion=1, rounds=2)
    coordinator, wire, loop = _begin(federation)
    _steps(loop, lambda: coordinator.step is Step.REVEAL)
    assert coordinator.sites_in == ()
    wire.away = {"ash"}
    _steps(loop, lambda: coordinator.round == 2)
    assert "round 1: the others speak for ash" in caplog.text
    wire.away = set()
    wire.since[wire.nodes["ash"]] = "again"
    loop.run()
    assert coordinator.rounds[0].sites == (*TRAINING, OBSERVER)
    assert [one.site for one in coordinator.rounds[0].header.witnessed] == ["ash"]
    assert len({app.site.adapter_digest for app in wire.apps.values()}) == 1


@pytest.mark.parametrize("collusion", [0, 1])
def test_with_pads_just_a_quorum_begins_no_round_before_the_deadline_though_the_others_are_known_to_be_away(
    tmp_path: Path, images: Path, collusion: int
) -> None:
    sites = [{"name": name} for name in (*TRAINING, OBSERVER)]
    federation = _federation(tmp_path / "out", images, sites=sites, collusion=collusion, rounds=2)
    coordinator, wire, loop = _begin(federation)
    wire.away = loop._absent = {"ash"}
    if collusion:
        _steps(loop, lambda: len(coordinator.sites_in) == 3)
        for _ in range(5):
            loop.step()
        assert coordinator.step is Step.READY, "nobody of the three could be missed later"
        federation.agreed.study.__dict__["round_seconds"] = 0.0
    _steps(loop, lambda: coordinator.step is not Step.READY)
    assert coordinator.asked == {"birch", "cedar", OBSERVER}


def test_a_server_that_is_started_again_waits_for_nobody_who_knows_the_end(
    federation: Federation, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """But a little for those who may have lost that word, and the whole time for who never had it."""
    coordinator, wire, loop = _begin(federation)
    _steps(loop, lambda: len(coordinator.rounds) == 1 and coordinator.step is Step.REVEAL)
    wire.silent.add(OBSERVER)
    _steps(loop, lambda: coordinator.finished and sum(site.told_the_end for site in loop._sites) == len(TRAINING))
    folders = ServerFolders(federation.folder / "study.toml", federation.folder / "server")
    wire.away, wire.silent = set(TRAINING), set()
    wire.since = dict.fromkeys(wire.apps, "second")
    monkeypatch.setattr("secure_fed.server.round_loop.PATIENCE", 0.0)
    loop = _loop(federation, folders.coordinator(federation.agreed), wire)
    assert not loop._over()
    loop.run()
    assert "lack the last rounds" not in caplog.text
    assert {each.site.round for each in wire.apps.values()} == {federation.agreed.study.rounds}
    # Now all have been told. Who comes again has lost that word.
    monkeypatch.setattr("secure_fed.server.round_loop.PATIENCE", 60.0)
    wire.away = {*TRAINING, OBSERVER} - {"cedar"}
    loop = _loop(federation, folders.coordinator(federation.agreed), wire)
    assert not loop._over()
    loop._look()
    assert [site.name for site in loop._sites if not site.told_the_end] == ["cedar"]
    monkeypatch.setattr("secure_fed.server.round_loop.PATIENCE", 0.0)
    _steps(loop, lambda: all(site.told_the_end for site in loop._sites))
    loop._looked = 0.0
    loop._look()  # while it still is connected, before it leaves
    assert loop._over()
    assert "lack the last rounds" not in caplog.text

"""The round's words: one attempt after the other, one REVEAL a round, one cohort at one adapter, a check before all."""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from typer.testing import CliRunner

from secure_fed.cli import app
from secure_fed.clients.acceptance import record_acceptance
from secure_fed.clients.keyring import membership
from secure_fed.clients.replica import Replica
from secure_fed.clients.site import Site
from secure_fed.clients.sitefile import read_site_file
from secure_fed.core.errors import (
    AggregateRefused,
    EnvelopeError,
    KeyFileError,
    NotAcceptedError,
    NotEnoughSitesError,
    ProtocolError,
    RecordError,
)
from secure_fed.lab.simulation import prepare
from secure_fed.privacy.ckks import Cipher
from secure_fed.protocol import codec
from secure_fed.protocol.envelope import seal_envelope
from secure_fed.protocol.journal import find_runs, verify_run
from secure_fed.protocol.ledger_heads import NO_LEDGER
from secure_fed.protocol.packing import Binding, PlainSealer
from secure_fed.protocol.records import RecordFolder
from secure_fed.protocol.round_frames import (
    ARRIVED_MAGIC,
    VOID_MAGIC,
    SignedWord,
    arrived_header,
    check_arrived,
    check_envelopes,
    sign_cohort,
    sign_ready,
    sign_reveal,
    split_word,
    word_head,
)
from secure_fed.protocol.rounds import ReplyCode
from secure_fed.protocol.signing import sign_frame
from secure_fed.server.coordinator import Coordinator, Step
from secure_fed.server.orders import end_run, extend_run
from secure_fed.server.rebuild import rebuild
from tests.conftest import (
    TRAINING,
    Federation,
    close_round,
    copy_of,
    exchange,
    make_template,
    pass_step,
    prepare_sites,
    run_round,
    send_envelopes,
    template_table,
)

NAMES = (*TRAINING, "dogwood")


@pytest.fixture(scope="module")
def four_prepared(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    """Four training sites, of which a quorum is three."""
    sites = [{"name": name} for name in (*TRAINING, "dogwood")]
    template = make_template(mode="plain", sites=sites, min_sites=3)
    return prepare_sites(template, tmp_path_factory.mktemp("four"), images)


@pytest.fixture
def four(four_prepared: Path, tmp_path: Path) -> Federation:
    return copy_of(four_prepared, tmp_path)


def begin(federation: Federation) -> Coordinator:
    if federation.agreed.study.mode == "he":
        return federation.begin(federation.sites())
    return Coordinator.begin(federation.agreed, federation.folder / "server", federation.signing, "0" * 64)


def ask(coordinator: Coordinator, site: Site, question: bytes) -> Any:
    request = coordinator.request(site.name, site.run, site.position)
    return site.respond(replace(request, records=(), question=question, attempt=max(1, request.attempt)))


def test_an_attempt_fails_freely_before_the_sum_is_fixed_and_sends_no_bytes_twice(federation: Federation) -> None:
    sites = federation.sites()[:3]
    coordinator = begin(federation)
    first = send_envelopes(coordinator, sites)
    assert coordinator.fail([])
    assert (coordinator.step, coordinator.attempt) == (Step.READY, 2)
    second = send_envelopes(coordinator, sites)
    size = federation.agreed.lanes.payload_bytes
    assert all(len(reply.envelope) > size for reply in first)
    assert all(len(reply.envelope) < 1024 for reply in second)
    assert coordinator.advance() is None
    assert coordinator.step is Step.REVEAL
    assert not coordinator.fail([]), "the sum is fixed: whoever has revealed cannot take it back"
    close_round(coordinator, sites)
    for site in sites:
        exchange(coordinator, site)
    assert len({site.adapter_digest for site in sites}) == 1


def test_a_reveal_is_as_long_whatever_it_says(federation: Federation) -> None:
    agreed, key = federation.agreed, federation.site("ash").replica.identity.signing
    largest = agreed.lanes.modulus - 1
    assert len({len(sign_reveal(agreed, "5" * 64, "ash", (product, 1), key)) for product in (0, 255, largest)}) == 1


def test_a_second_envelope_of_an_attempt_is_refused_and_the_first_counts(federation: Federation) -> None:
    sites = federation.sites()[:3]
    coordinator = begin(federation)
    first = send_envelopes(coordinator, sites)[1]
    agreed, due, ready = federation.agreed, coordinator.journal.chain.due, coordinator._envelopes["birch"].header
    integers = np.zeros(agreed.layout(1).lanes.values, np.int64)
    sealed = sites[1].replica.sealer.seal(integers, Binding(run=due.run, head=due.head, round=1), "birch")
    second = seal_envelope(
        agreed, due, sealed, NO_LEDGER, sites[1].replica.identity.signing, attempt=ready.attempt, cohort=ready.cohort
    )
    with pytest.raises(EnvelopeError, match="a second, different envelope of birch for round 1; the first counts"):
        coordinator.receive(replace(first, envelope=second))
    coordinator.receive(first)
    entry = close_round(coordinator, sites)
    assert check_envelopes(entry.header.contributors, agreed, coordinator.journal.chain.members, due)[1] == ready


def test_a_member_that_is_gone_costs_its_own_update_only(four: Federation) -> None:
    sites = four.sites()
    coordinator = begin(four)
    pass_step(coordinator, sites)
    for site in sites[:3]:
        exchange(coordinator, site)
    assert coordinator.advance() is None
    assert coordinator.step is Step.ENVELOPE
    assert coordinator.fail(["dogwood"])
    assert "dogwood" not in coordinator.asked
    entry = None
    while entry is None:
        entry = pass_step(coordinator, sites[:3])
    assert entry.sites == TRAINING
    assert not coordinator.fail(["ash", "birch"]), "fewer than a quorum would be left"


def test_after_a_reveal_the_round_waits_and_restarts_change_nothing(federation: Federation) -> None:
    sites = federation.sites()[:3]
    coordinator = begin(federation)
    send_envelopes(coordinator, sites)
    coordinator.advance()
    first = exchange(coordinator, sites[0])
    assert first.code == ReplyCode.REVEALED
    again = federation.reopen()
    assert (again.step, again.sites_in, sorted(again.asked)) == (Step.REVEAL, ("ash",), ["birch", "cedar"])
    assert again.advance() is None
    # A site that starts anew gives the same word, and to no other question.
    request = coordinator.request("birch", sites[1].run, sites[1].position)
    assert federation.site("birch").respond(request).envelope == federation.site("birch").respond(request).envelope
    close_round(again, federation.sites()[:3])
    assert again.round == 2


def test_a_server_that_lost_the_spool_asks_for_the_same_envelopes_once_more(federation: Federation) -> None:
    sites = federation.sites()[:3]
    coordinator = begin(federation)
    send_envelopes(coordinator, sites)
    coordinator.advance()
    exchange(coordinator, sites[0])
    lost = next(federation.folder.glob("server/runs/*/spool/*/*/birch.envelope"))
    lost.write_bytes(lost.read_bytes()[:-3])
    again = federation.reopen()
    assert again.step is Step.REVEAL
    assert exchange(again, sites[1]).code == ReplyCode.UPDATE
    close_round(again, sites)


def second_arrived(federation: Federation, coordinator: Coordinator, names: tuple[str, ...] = TRAINING) -> bytes:
    """Another ARRIVED of the same attempt, signed by the coordinator: of another sum, or of some sites' envelopes."""
    chain = coordinator.journal.chain
    words = [SignedWord.of(coordinator._envelopes[name].header_text, coordinator._envelopes[name].signature)
             for name in names]  # fmt: skip
    digest = coordinator._cohort.digest  # type: ignore[union-attr]
    header = arrived_header(federation.agreed, chain.due, coordinator.attempt, digest, (7, "5" * 64), words)
    return sign_frame(ARRIVED_MAGIC, header, federation.signing, b"")


def test_a_site_reveals_for_one_arrived_of_a_round_and_never_for_part_of_a_cohort(federation: Federation) -> None:
    sites = federation.sites()[:3]
    coordinator = begin(federation)
    send_envelopes(coordinator, sites)
    with pytest.raises(ProtocolError, match="expected all of the cohort"):
        ask(coordinator, sites[0], second_arrived(federation, coordinator, TRAINING[:2]))
    coordinator.advance()
    assert exchange(coordinator, sites[0]).code == ReplyCode.REVEALED
    for site in (sites[0], federation.site("ash")):
        with pytest.raises(ProtocolError, match="a second ARRIVED of round 1"):
            ask(coordinator, site, second_arrived(federation, coordinator))
    # Nor does it answer another attempt after its REVEAL.
    chain = coordinator.journal.chain
    with pytest.raises(ProtocolError, match="a REVEAL was sent already"):
        sites[0].respond(replace(coordinator.request("ash", sites[0].run, 1), question=b"", attempt=2))
    cohort = sign_cohort(federation.agreed, chain.due, 2, (), federation.signing)
    with pytest.raises(ProtocolError):
        ask(coordinator, sites[0], cohort)


def test_an_arrived_that_is_not_the_servers_or_of_another_attempt_is_refused(federation: Federation) -> None:
    sites = federation.sites()[:3]
    coordinator = begin(federation)
    send_envelopes(coordinator, sites)
    coordinator.advance()
    arrived = coordinator._arrived.data  # type: ignore[union-attr]
    chain = coordinator.journal.chain
    header = check_arrived(arrived, federation.agreed, chain.members, chain.due)[0]
    ash = sites[0].replica.identity.signing
    for forged, says in (
        (sign_frame(ARRIVED_MAGIC, header, ash, b""), "signature"),
        (
            sign_frame(ARRIVED_MAGIC, header.model_copy(update={"attempt": 2}), federation.signing, b""),
            "another attempt",
        ),
        (sign_frame(ARRIVED_MAGIC, header.model_copy(update={"head": "1" * 64}), federation.signing, b""), "head"),
        (arrived[:-1] + b"", "truncated"),
    ):
        with pytest.raises(ProtocolError, match=says):
            ask(coordinator, sites[1], forged)
    assert sites[1].replica.files.bound.arrived == ""


def test_a_wrong_check_is_named_and_does_not_end_the_round(
    federation: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    sites = federation.sites()[:3]
    coordinator = begin(federation)
    send_envelopes(coordinator, sites)
    coordinator.advance()
    replies = [site.respond(coordinator.request(site.name, site.run, site.position)) for site in sites]
    digest = coordinator._arrived.digest  # type: ignore[union-attr]
    wrong = sign_reveal(federation.agreed, digest, "birch", (1, 2), sites[1].replica.identity.signing)
    for reply in (replies[0], replace(replies[1], envelope=wrong), replies[2]):
        coordinator.receive(reply)
    with caplog.at_level(logging.ERROR):
        assert coordinator.advance() is None
    assert "birch: its REVEAL of round 1 is wrong" in caplog.text
    assert "ash" not in caplog.text
    assert sorted(coordinator.asked) == ["birch"]
    coordinator.receive(replies[1])
    assert coordinator.advance() is not None


def test_a_site_whose_memory_is_damaged_finds_itself_before_anything_leaves(federation: Federation) -> None:
    sites = federation.sites()[:3]
    coordinator = begin(federation)
    pass_step(coordinator, sites)
    seal = Cipher.seal

    def damaged(self: Cipher, integers: Any, *rest: Any) -> Any:
        integers = integers.copy()
        integers[5] += 1
        return seal(self, integers, *rest)

    request = coordinator.request("ash", sites[0].run, sites[0].position)
    with (
        mock.patch.object(Cipher, "seal", damaged),
        pytest.raises(EnvelopeError, match="does not open to the integers"),
    ):
        sites[0].respond(request)
    assert sites[0].replica.files.bound.attempt == 0
    assert exchange(coordinator, sites[0]).code == ReplyCode.UPDATE


def test_a_sum_out_of_range_pauses_the_study_for_people_and_costs_nothing(federation: Federation) -> None:
    sites = federation.sites()
    coordinator = begin(federation)
    pass_step(coordinator, sites)
    before = sites[1].adapter_digest
    # ash sends four times the largest value, signed, with a right check.
    lanes = federation.agreed.lanes
    huge = np.full(lanes.values, 4 * lanes.max_integer, np.int64)
    with (
        mock.patch.object(sites[0], "_stored", return_value=huge),
        mock.patch("secure_fed.privacy.ckks.check_integers"),
        mock.patch.object(Cipher, "open", return_value=huge),
    ):
        exchange(coordinator, sites[0])
    for site in sites[1:]:
        exchange(coordinator, site)
    close_round(coordinator, sites)
    assert exchange(coordinator, sites[1]).code == ReplyCode.REFUSED_AGGREGATE
    assert not coordinator.paused, "one site's word alone pauses nobody"
    for site in (sites[0], sites[2], federation.site("birch")):
        assert exchange(coordinator, site).code == ReplyCode.REFUSED_AGGREGATE
    assert coordinator.paused
    assert {site.adapter_digest for site in sites} == {before}
    # An amendment, here a new key, lets the study go on.
    chain = coordinator.journal.chain
    coordinator.amend(federation.seal_key(2, chain.key, members=chain.members))
    assert not coordinator.paused
    assert coordinator.advance().header.kind == "amendment"  # type: ignore[union-attr]
    assert pass_step(coordinator, sites).header.kind == "checkpoint"
    run_round(coordinator, sites)
    for site in sites:
        exchange(coordinator, site)
    assert len({site.adapter_digest for site in sites}) == 1


def test_an_odd_acknowledgement_is_left_out_and_named(federation: Federation, caplog: pytest.LogCaptureFixture) -> None:
    """It ended the server, which refused the checkpoint that it had made of it, as its sites would."""
    sites = federation.sites()
    coordinator = begin(federation)
    run_round(coordinator, sites)
    chain = coordinator.journal.chain
    coordinator.amend(federation.seal_key(2, chain.key, members=chain.members))
    assert pass_step(coordinator, sites).header.kind == "amendment"
    with mock.patch.object(type(sites[1].replica), "_checkpoint_digest", return_value="6" * 64):
        odd = sites[1].respond(coordinator.request("birch", sites[1].run, sites[1].position))
    coordinator.receive(odd)
    for site in (sites[0], sites[2]):
        exchange(coordinator, site)
    assert coordinator.advance() is None
    assert "birch: acknowledge another adapter than the key maker" in caplog.text
    coordinator.receive(sites[1].respond(replace(coordinator.request("birch", sites[1].run, sites[1].position))))
    assert coordinator.advance().header.kind == "checkpoint"  # type: ignore[union-attr]


def test_a_key_maker_that_acknowledges_another_adapter_than_all_others_is_the_odd_one(
    tmp_path: Path, images: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing can follow such an amendment; it named those whom it contradicts."""
    federation = Federation(
        prepare_sites(make_template(sites=[{"name": name} for name in NAMES]), tmp_path / "he", images)
    )
    sites = federation.sites()
    coordinator = begin(federation)
    run_round(coordinator, sites)
    chain = coordinator.journal.chain
    coordinator.amend(federation.seal_key(2, chain.key, members=chain.members))
    assert pass_step(coordinator, sites).header.kind == "amendment"
    with mock.patch.object(type(sites[0].replica), "_checkpoint_digest", return_value="6" * 64):
        coordinator.receive(sites[0].respond(coordinator.request("ash", sites[0].run, sites[0].position)))
    exchange(coordinator, sites[1])
    assert coordinator.against_key_maker == [], "one of two, who may lie"
    for site in sites[2:]:
        exchange(coordinator, site)
    caplog.clear()
    assert coordinator.advance() is None
    assert coordinator.against_key_maker == ["birch", "cedar", "dogwood"]
    assert caplog.text == ""


@pytest.mark.parametrize("late", [False, True])
def test_who_gives_an_open_round_up_acknowledges_an_amendment_that_came_meanwhile(
    federation: Federation, late: bool
) -> None:
    """Nothing else can follow it, and its people meant the round."""
    sites = federation.sites()[:3]
    coordinator = federation.begin(federation.sites())
    run_round(coordinator, sites)
    chain = coordinator.journal.chain
    coordinator.amend(federation.seal_key(2, chain.key, members=chain.members))
    for site in sites:
        exchange(coordinator, site)
    if not late:
        sites[2].void(2)
    assert coordinator.advance().header.kind == "amendment"  # type: ignore[union-attr]
    if late:  # it says so, and is restarted
        say(federation, "cedar", "void", "--round", 2)
        sites[2] = federation.site("cedar")
    codes = [exchange(coordinator, site).code for site in sites]
    assert codes == [ReplyCode.ACKNOWLEDGED] * 3
    assert coordinator.advance().header.kind == "checkpoint"  # type: ignore[union-attr]
    assert exchange(coordinator, sites[2]).code == ReplyCode.VOID
    for site in sites[:2]:
        exchange(coordinator, site)
        site.void(2)
        exchange(coordinator, site)
    assert coordinator.advance().header.kind == "void"  # type: ignore[union-attr]
    run_round(coordinator, sites)


def refused_by_all(coordinator: Coordinator, sites: list[Site], cohort: list[Site] | None = None) -> None:
    """A round whose sum, of a cohort or of all, all find out of range."""
    pass_step(coordinator, cohort or sites)
    close_round(coordinator, cohort or sites)
    with mock.patch.object(PlainSealer, "open", side_effect=AggregateRefused("refused")):
        for site in sites:
            assert exchange(coordinator, site).code == ReplyCode.REFUSED_AGGREGATE


def test_a_second_sum_at_one_adapter_needs_the_word_of_each_sites_people(
    four: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its difference to the first is the update of the one site that is not in both, to the last bit."""
    sites = four.sites()
    coordinator = begin(four)
    refused_by_all(coordinator, sites)
    monkeypatch.setattr(Replica, "paused", False)  # as when people have let the study go on
    pass_step(coordinator, sites[:3])
    with pytest.raises(ProtocolError, match=r"revealed to ash, birch, cedar, dogwood; .*secfacmic site release"):
        exchange(coordinator, sites[0])
    with pytest.raises(ProtocolError, match="still to be heard: ash, birch, cedar"):
        exchange(coordinator, sites[0])
    for name in TRAINING:
        command = ["site", "release", "--site", str(four.folder / "sites" / name / "site.toml")]
        with pytest.raises(NotAcceptedError):
            CliRunner().invoke(app, command, catch_exceptions=False)
        done = CliRunner().invoke(app, [*command, "--by", "Dr. Ada"], catch_exceptions=False)
        assert "revealed to ash, birch, cedar, dogwood" in done.output
    again = [four.site(name) for name in TRAINING]
    with pytest.raises(ProtocolError, match="still to be heard: ash, birch, cedar"):
        exchange(coordinator, again[0])  # of its own people's word it knows; the others' is in their READYs
    assert coordinator.fail([])
    pass_step(coordinator, again)
    files = again[0].replica.files
    word = files.bound
    files.bind(word.model_copy(update={"released": ""}))  # its disk of before its people's word is put back
    with pytest.raises(ProtocolError, match="still to be heard: ash;"):
        exchange(coordinator, again[0])
    files.bind(word)
    for site in again:
        assert exchange(coordinator, site).code == ReplyCode.UPDATE
    close_round(coordinator, again)
    assert again[0].revealed_to == TRAINING
    bound = again[0].replica.files.bound
    assert bound.released == "", "for one other cohort, and no third"


def test_after_a_refused_round_the_adapter_has_not_moved_and_the_same_integers_are_sent(
    four: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others would be a second equation for the same unknowns: the two sums' difference is of updates alone."""
    sites = four.sites()
    coordinator = begin(four)
    sent = []
    quantised = PlainSealer.seal

    def spy(self: PlainSealer, integers: Any, binding: Any, site: str) -> Any:
        sent.append((binding.round, site, integers.tobytes()))
        return quantised(self, integers, binding, site)

    monkeypatch.setattr(PlainSealer, "seal", spy)
    refused_by_all(coordinator, sites)
    monkeypatch.setattr(Replica, "paused", False)  # as when people have let the study go on
    again = four.sites()
    pass_step(coordinator, again)
    close_round(coordinator, again)
    assert coordinator.round == 3
    first, second = ({site: data for number, site, data in sent if number == due} for due in (1, 2))
    assert first == second
    assert len(second) == 4
    for site in again:
        exchange(coordinator, site)
    pass_step(coordinator, again)
    for site in again:
        exchange(coordinator, site)
    third = {site: data for number, site, data in sent if number == 3}
    assert all(third[name] != second[name] for name in second), "the adapter has moved"


def test_whoever_has_revealed_and_lost_its_integers_makes_no_others_at_that_adapter(
    four: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a patient is forgotten after a refused round: the difference of the two would be that patient's."""
    sites = four.sites()
    coordinator = begin(four)
    refused_by_all(coordinator, sites)
    monkeypatch.setattr(Replica, "paused", False)
    for path in sites[0].replica.files.folder.outbox.iterdir():
        path.unlink()
    ash = four.site("ash")
    assert exchange(coordinator, ash).code == ReplyCode.APPLIED
    assert not list(ash.replica.files.folder.outbox.iterdir()), "nothing was trained"
    say(four, "ash", "release")
    assert exchange(coordinator, four.site("ash")).code == ReplyCode.READY


def put_back(federation: Federation, copy: Path) -> Site:
    """Ash's state folder as it was, and ash started anew."""
    import shutil

    state = federation.folder / "sites" / "ash" / "state"
    shutil.rmtree(state)
    shutil.copytree(copy, state)
    return federation.site("ash")


@pytest.fixture
def older(four: Federation, tmp_path: Path) -> Path:
    """Ash's state folder before the run."""
    import shutil

    copy = tmp_path / "older"
    shutil.copytree(four.folder / "sites" / "ash" / "state", copy)
    return copy


def put_back_after_its_reveal(federation: Federation, copy: Path) -> tuple[Coordinator, Site, list[Site]]:
    """Ash alone has revealed; then its older disk is put back, which sits out. With the other sites."""
    ash, *others = federation.sites()
    coordinator = begin(federation)
    send_envelopes(coordinator, [ash, *others])
    coordinator.advance()
    exchange(coordinator, ash)
    ash = put_back(federation, copy)
    assert exchange(coordinator, ash).code == ReplyCode.SITS_OUT
    return coordinator, ash, others


def test_an_older_disk_learns_from_its_own_words_at_the_server_and_sits_the_round_out(
    four: Federation, older: Path
) -> None:
    sites = four.sites()
    coordinator = begin(four)
    send_envelopes(coordinator, sites)
    ash = put_back(four, older)
    assert exchange(coordinator, ash).code == ReplyCode.SITS_OUT
    assert "ash" in coordinator.left_out
    assert coordinator.fail(["ash"])
    assert exchange(coordinator, four.site("ash")).code == ReplyCode.SITS_OUT, "also after a restart"
    entry = None
    while entry is None:
        entry = pass_step(coordinator, sites[1:])
    assert exchange(coordinator, four.site("ash")).code == ReplyCode.READY, "it goes on with the next round"


def test_an_older_disk_that_revealed_gives_no_second_reveal_and_its_people_can_give_the_round_up(
    four: Federation, older: Path
) -> None:
    coordinator, ash, others = put_back_after_its_reveal(four, older)
    assert ash.revealed_to == (), "it has, and nobody here knows to whom"
    assert ash.void(1), "nobody knows whether it had revealed"
    for site in others[:2]:
        site.void(1)
    for site in (ash, *others[:2]):
        assert exchange(coordinator, site).code == ReplyCode.VOID
    assert coordinator.advance().header.kind == "void"  # type: ignore[union-attr]
    assert exchange(coordinator, ash).code == ReplyCode.APPLIED, "the adapter has not moved"
    ash.release()
    assert exchange(coordinator, ash).code == ReplyCode.READY


def test_an_older_disk_goes_on_with_the_next_round_where_the_sum_holds_what_it_had_revealed(
    four: Federation, older: Path
) -> None:
    coordinator, ash, others = put_back_after_its_reveal(four, older)
    assert close_round(coordinator, others).sites == (*TRAINING, "dogwood")
    assert exchange(coordinator, ash).code == ReplyCode.READY


def test_an_older_disk_learns_from_the_records_where_the_server_withholds_its_words(
    four: Federation, older: Path
) -> None:
    sites = four.sites()
    coordinator = begin(four)
    run_round(coordinator, sites)
    ash = put_back(four, older)
    reply = ash.respond(replace(coordinator.request("ash", "", 0), past=b""))
    assert reply.code == ReplyCode.SITS_OUT
    assert ash.round == 1, "it has applied what it lacked"
    # One that was only away has no word in the records that it does not know.
    assert sites[1].respond(coordinator.request("birch", sites[1].run, sites[1].position)).code == ReplyCode.READY


def test_a_word_that_is_another_sites_or_no_word_is_not_taken_for_its_own(four: Federation) -> None:
    sites = four.sites()
    coordinator = begin(four)
    send_envelopes(coordinator, sites)
    request = coordinator.request("ash", sites[0].run, sites[0].position)
    foreign = coordinator.request("birch", sites[1].run, sites[1].position).past
    assert request.past
    for past in (foreign, request.past[:-1] + bytes([request.past[-1] ^ 1])):
        with pytest.raises((ProtocolError, EnvelopeError)):
            sites[0].respond(replace(request, past=past))
    assert sites[0].respond(request).code == ReplyCode.UPDATE


def test_a_server_that_shows_an_old_reveal_as_a_sites_newest_costs_it_that_round_and_is_named(
    four: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    """As if it had left the site out of the cohort; a REVEAL says of no round that it is that one's."""
    sites = four.sites()
    coordinator = begin(four)
    send_envelopes(coordinator, sites)
    coordinator.advance()
    old, *_ = [exchange(coordinator, site).envelope for site in sites]
    assert coordinator.advance() is not None
    for site in sites[1:]:
        exchange(coordinator, site)
    ash = sites[0]
    request = coordinator.request("ash", ash.run, ash.position)
    assert ash.respond(replace(request, past=old)).code == ReplyCode.SITS_OUT
    assert "a copy was put back. It sits round 2 out" in caplog.text
    assert "if nobody did, the server shows an old word" in caplog.text
    coordinator.fail([])
    assert close_round(coordinator, sites[1:]).sites == ("birch", "cedar", "dogwood")
    for site in sites:
        exchange(coordinator, site)
    assert len({site.adapter_digest for site in sites}) == 1
    assert close_round(coordinator, sites).sites == ("ash", "birch", "cedar", "dogwood"), "nothing else is lost"


def say(federation: Federation, name: str, *command: object) -> str:
    path = federation.folder / "sites" / name / "site.toml"
    arguments = ["site", *map(str, command), "--site", str(path), "--by", "Dr. Ada"]
    return CliRunner().invoke(app, arguments, catch_exceptions=False).output


def test_a_site_that_never_comes_back_does_not_hold_the_others_up_for_ever(four: Federation) -> None:
    """After three REVEALs of four: a quorum's people give the round up, and release the smaller cohort."""
    sites = four.sites()
    coordinator = begin(four)
    send_envelopes(coordinator, sites)
    coordinator.advance()
    for site in sites[:3]:
        assert exchange(coordinator, site).code == ReplyCode.REVEALED
    before = [site.replica.files.folder.integers(1).read_bytes() for site in sites[:3]]
    with pytest.raises(ProtocolError, match="the round that is open here is 1"):
        say(four, "ash", "void", "--round", 2)
    for name in TRAINING[:2]:
        assert "it had revealed" in say(four, name, "void", "--round", 1)
    again = [four.site(name) for name in TRAINING]
    codes = [exchange(coordinator, site).code for site in again]
    assert codes == [ReplyCode.VOID, ReplyCode.VOID, ReplyCode.APPLIED]
    assert coordinator.advance() is None, "two of four are no quorum"
    with pytest.raises(RecordError, match="expected at least 3 of 4"):
        coordinator.journal.append_void([word for _, word in sorted(coordinator._voids.given.items())])
    say(four, "cedar", "void", "--round", 1)
    again[2] = four.site("cedar")
    assert exchange(coordinator, again[2]).code == ReplyCode.VOID
    entry = coordinator.advance()
    assert entry is not None
    assert (entry.header.kind, coordinator.round, coordinator.step) == ("void", 1, Step.READY)
    coordinator = four.reopen()
    pass_step(coordinator, again)
    with pytest.raises(ProtocolError, match="secfacmic site release"):
        exchange(coordinator, again[0])
    for name in TRAINING:
        say(four, name, "release")
    again = [four.site(name) for name in TRAINING]
    assert coordinator.fail([])
    pass_step(coordinator, again)
    for site in again:
        exchange(coordinator, site)
    assert [site.replica.files.folder.integers(1).read_bytes() for site in again] == before, "the adapter has not moved"
    entry = close_round(coordinator, again)
    assert (entry.sites, coordinator.round) == (TRAINING, 2)
    for site in again:
        exchange(coordinator, site)
    assert len({site.adapter_digest for site in again}) == 1
    # dogwood was away: it takes the void and the record, and goes on.
    exchange(coordinator, sites[3])
    assert sites[3].adapter_digest == again[0].adapter_digest


@pytest.mark.parametrize("late", [False, True])
def test_a_newcomer_without_its_peoples_word_holds_no_round_up_that_was_given_up(four: Federation, late: bool) -> None:
    """The cohort to which the others revealed may close the round by itself, also after a restart of the server."""
    sites = four.sites()
    coordinator = begin(four)
    trio = sites[:3]
    pass_step(coordinator, trio)
    if late:  # the record and the words cross
        close_round(coordinator, trio)
    else:
        for _ in range(2):
            coordinator.advance()
            for site in trio:
                exchange(coordinator, site)
    for site in trio:
        site.void(1)
        assert exchange(coordinator, site).code == ReplyCode.VOID
    entry = coordinator.advance()
    assert entry is not None
    assert entry.header.kind == "void"
    coordinator = four.reopen()
    pass_step(coordinator, sites)
    assert close_round(coordinator, trio).sites == TRAINING


def test_after_a_refused_sum_whose_people_say_nothing_hold_the_others_up_no_more(
    four: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quorum's have released; a cohort of all who are ready would be refused for ever for want of one's word."""
    sites = four.sites()
    coordinator = begin(four)
    refused_by_all(coordinator, sites, [sites[0], sites[1], sites[3]])
    monkeypatch.setattr(Replica, "paused", False)  # as when people have let the study go on
    for name in TRAINING:
        say(four, name, "release")
    coordinator, again = four.reopen(), four.sites()
    pass_step(coordinator, again)
    assert close_round(coordinator, again[:3]).sites == TRAINING


def test_a_newcomer_to_the_cohort_needs_the_word_of_all_too(four: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has revealed to nobody; but its update would be the difference of the two sums."""
    sites = four.sites()
    # A server that lies: else it would take those alone whose people have let it.
    monkeypatch.setattr("secure_fed.server.coordinator.revealed_to", lambda *_: None)
    coordinator = begin(four)
    refused_by_all(coordinator, sites, sites[:3])
    monkeypatch.setattr(Replica, "paused", False)
    for name in TRAINING:
        say(four, name, "release")
    again = four.sites()
    pass_step(coordinator, again)
    with pytest.raises(ProtocolError, match=r"revealed to ash, birch, cedar; .* still to be heard: dogwood"):
        exchange(coordinator, again[0])
    words = say(four, "dogwood", "release")
    assert "others may have" in words
    assert "must have left before" not in words, "the server of a plain study sees each update anyway"
    assert coordinator.fail([])
    again[3] = four.site("dogwood")
    pass_step(coordinator, again)
    assert close_round(coordinator, again).sites == (*TRAINING, "dogwood")


def test_a_newcomers_word_is_for_one_cohort_too(four: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    """It had revealed to nobody, so that its people's word was left over for another sum."""
    sites = four.sites()
    coordinator = begin(four)
    refused_by_all(coordinator, sites, sites[:3])
    monkeypatch.setattr(Replica, "paused", False)
    for name in NAMES:
        say(four, name, "release")
    again = four.sites()
    pass_step(coordinator, again)
    close_round(coordinator, again)
    assert again[3].replica.files.bound.released == ""


def test_a_release_says_how_a_site_that_is_lost_must_leave_before_it(federation: Federation) -> None:
    sites = federation.sites()
    exchange(begin(federation), sites[0])
    assert "must have left before: by its own word" in say(federation, "ash", "release")


def split_over_a_record(four: Federation) -> tuple[list[Site], Coordinator]:
    """Ash and birch have applied the record of round 1, cedar and dogwood have not had it."""
    sites = four.sites()
    coordinator = begin(four)
    pass_step(coordinator, sites)
    close_round(coordinator, sites)
    for site in sites[:2]:
        assert exchange(coordinator, site).code == ReplyCode.READY
    return sites, coordinator


def test_a_record_and_a_void_of_one_round_the_void_counts_and_one_record_is_taken_back(
    four: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    sites, coordinator = split_over_a_record(four)
    first = [site.replica.files.folder.integers(1).read_bytes() for site in sites]
    start = sites[2].adapter_digest
    for name in ("ash", "cedar", "dogwood"):
        assert "it had revealed" in say(four, name, "void", "--round", 1)
    again = [four.site("ash"), sites[1], four.site("cedar"), four.site("dogwood")]
    assert again[0].adapter_digest == start, "who has applied it takes it back"
    for site in (again[0], again[2], again[3]):
        assert exchange(coordinator, site).code == ReplyCode.VOID
        assert site.adapter_digest == start
    entry = coordinator.advance()
    assert entry is not None
    assert (entry.header.kind, entry.header.seq, coordinator.round) == ("void", 1, 1)
    assert "nobody need have lied" in caplog.text
    coordinator = four.reopen()
    caplog.clear()
    pass_step(coordinator, again)
    assert "birch: round 1 has a record and a void" in caplog.text
    assert len(list(again[1].replica.files.folder.evidence.iterdir())) == 1
    assert {site.adapter_digest for site in again} == {start}
    close_round(coordinator, again)
    assert [site.replica.files.folder.integers(1).read_bytes() for site in again] == first
    for site in again:
        exchange(coordinator, site)
    assert len({site.adapter_digest for site in again}) == 1
    assert [four.site(site.name).adapter_digest for site in again] == [site.adapter_digest for site in again]
    assert again[1].round == 1
    runs = find_runs(four.folder / "sites" / "birch" / "state")
    assert [record.header.kind for record in verify_run(runs[0], four.agreed)] == ["genesis", "void", "aggregate"]


def test_no_record_is_taken_back_after_the_one_upon_it_by_who_has_revealed_upon_both(four: Federation) -> None:
    """Else the adapter of before both comes again, and whoever forgot for whom it revealed there reveals to others."""
    sites = four.sites()
    coordinator = begin(four)
    for _ in range(2):
        pass_step(coordinator, sites)
        close_round(coordinator, sites)
    send_envelopes(coordinator, sites)
    coordinator.advance()
    assert exchange(coordinator, sites[3]).code == ReplyCode.REVEALED
    for site in sites[:3]:
        site.void(2)
        assert exchange(coordinator, site).code == ReplyCode.VOID
    entry = coordinator.advance()
    assert entry is not None
    assert (entry.header.kind, entry.header.round) == ("void", 2)
    for site in sites:
        exchange(coordinator, site)
        assert site.round == 1
        with pytest.raises(ProtocolError, match="a void of round 1, but this site has revealed in round 2"):
            site.void(1)


def follow(four: Federation, kind: str, coordinator: Coordinator, sites: list[Site]) -> None:
    """A record of this kind after the last sum, which some sites take."""
    if kind == "extension":
        for member in four.agreed.study.sites:
            file = read_site_file(four.folder / "sites" / member.name / "site.toml")
            identity = membership(file, four.agreed).identity
            record_acceptance(file, four.agreed, identity, "Dr X", rounds=five(four))
        extend_run(four.agreed, four.folder / "server", five(four))
    elif kind == "retired":
        sites[1].retire()
        assert exchange(coordinator, sites[1]).code == ReplyCode.RETIRED
    elif kind == "end":
        end_run(four.agreed, four.folder / "server")
    else:  # a void of the round after
        for site in (sites[0], *sites[1:3]):
            exchange(coordinator, site)
            site.void(2)
            assert exchange(coordinator, site).code == ReplyCode.VOID
    entry = coordinator.advance()
    assert entry is not None
    assert entry.header.kind == kind
    for site in sites[:2]:
        exchange(coordinator, site)


def five(four: Federation) -> int:
    return four.agreed.study.rounds + 2


@pytest.mark.parametrize("kind", ["extension", "retired", "end", "void"])
def test_what_follows_a_sum_by_the_server_or_one_site_goes_with_it_when_a_void_counts(
    four: Federation, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a site that had it could never follow the others, who gave the round up before they knew of its record."""
    sites, coordinator = split_over_a_record(four)
    start = four.site("dogwood").adapter_digest
    follow(four, kind, coordinator, sites)
    length = sites[1].position
    assert length == 3
    for site in (sites[0], *sites[2:]):
        site.void(1)
        assert exchange(coordinator, site).code == ReplyCode.VOID
    monkeypatch.setattr(RecordFolder, "drop_from", lambda *_: None)  # a crash in between
    entry = coordinator.advance()
    assert entry is not None
    assert (entry.header.kind, entry.header.seq) == ("void", 1)
    monkeypatch.undo()
    coordinator = four.reopen()
    assert [entry.header.kind for entry in coordinator.journal.records] == ["genesis", "void"]
    late = four.site("birch")
    assert late.position == length
    assert exchange(coordinator, late).code == (ReplyCode.RETIRED if kind == "retired" else ReplyCode.READY)
    assert late.adapter_digest == start
    kinds = [record.header.kind for record in verify_run(find_runs(four.folder / "sites/birch/state")[0], four.agreed)]
    assert kinds == ["genesis", "void"]
    sites[1] = late
    if kind == "end":
        coordinator.advance()
        assert coordinator.finished
        return
    if kind in ("extension", "retired"):
        exchange(coordinator, late)
        assert coordinator.advance().header.kind == kind, "it comes again"  # type: ignore[union-attr]
    if kind == "retired":
        for site in (sites[0], *sites[2:]):
            site.release()
    pass_step(coordinator, sites)
    close_round(coordinator, sites)
    for site in sites:
        exchange(coordinator, site)
    assert len({site.adapter_digest for site in sites}) == 1
    assert coordinator.round == 2


@pytest.mark.parametrize("again", [False, True], ids=["void", "void and the round anew"])
def test_a_site_that_was_away_for_voids_takes_back_the_record_that_the_first_replaced(
    four: Federation, again: bool
) -> None:
    sites, coordinator = split_over_a_record(four)
    others = (sites[0], *sites[2:])
    for _ in range(2):
        for site in others:
            site.void(1)
            exchange(coordinator, site)
        coordinator.advance()
        for site in others:
            site.release()
            exchange(coordinator, site)
    assert [entry.header.kind for entry in coordinator.journal.records] == ["genesis", "void", "void"]
    if again:
        close_round(coordinator, list(others))
        for site in others:
            exchange(coordinator, site)
    assert sites[1].position == 2
    assert exchange(coordinator, sites[1]).code == ReplyCode.READY
    assert sites[1].adapter_digest == sites[0].adapter_digest


@pytest.mark.parametrize("kind", ["extension", "retired"])
def test_a_round_that_is_given_up_stays_so_when_a_record_that_closes_nothing_moves_the_head(
    four: Federation, kind: str
) -> None:
    """Else a site could have a part in a void at one head and in a sum at the next, which both close the round."""
    sites, coordinator = split_over_a_record(four)
    for site in sites:
        exchange(coordinator, site)
    sites[3].void(2)
    assert exchange(coordinator, sites[3]).code == ReplyCode.VOID
    follow(four, kind, coordinator, sites)
    assert coordinator.voiding == frozenset(), "it is asked again: its word was said at the head before"
    again = four.site("dogwood")
    reply = exchange(coordinator, again)
    assert reply.code == ReplyCode.VOID
    assert word_head(split_word(VOID_MAGIC, reply.envelope)) == coordinator.journal.chain.head
    for site in (sites[0], sites[2]):
        exchange(coordinator, site)
        site.void(2)
        exchange(coordinator, site)
    entry = coordinator.advance()
    assert entry is not None
    assert entry.header.kind == "void"
    assert exchange(coordinator, again).code == ReplyCode.READY


def test_a_server_that_names_a_head_that_nobody_has_takes_nothing_back(four: Federation) -> None:
    sites, coordinator = split_over_a_record(four)
    request = coordinator.request("ash", sites[0].run, sites[0].position)
    held = sites[0].adapter_digest
    reply = sites[0].respond(replace(request, after="5" * 64))
    assert (reply.code, reply.position, reply.attestation) == (ReplyCode.MORE, 1, "")
    assert (sites[0].adapter_digest, sites[0].round) == (held, 1)
    assert exchange(coordinator, sites[0]).code == ReplyCode.APPLIED  # it is ready already
    assert sites[0].position == 2


def test_whoever_stands_by_an_amendment_gives_no_word_for_a_void_of_the_sum_before(federation: Federation) -> None:
    sites = federation.sites()[:3]
    coordinator = begin(federation)
    run_round(coordinator, sites)
    coordinator.amend(federation.seal_key(2, coordinator.journal.chain.key))
    pass_step(coordinator, sites)
    for site in sites:
        assert exchange(coordinator, site).code == ReplyCode.ACKNOWLEDGED
        with pytest.raises(ProtocolError, match="the round that is open here is none"):
            site.void(1)
    coordinator.advance()
    for site in sites:
        exchange(coordinator, site)
        with pytest.raises(ProtocolError, match="the round that is open here is 2"):
            site.void(1)


def test_a_rebuild_from_a_copy_with_the_record_and_one_with_its_void_goes_on_from_the_void(four: Federation) -> None:
    sites, coordinator = split_over_a_record(four)
    server = four.folder / "server"
    shutil.copytree(server, four.folder / "older")
    for name in ("ash", "cedar", "dogwood"):
        say(four, name, "void", "--round", 1)
    given_up = [four.site(name) for name in ("ash", "cedar", "dogwood")]
    for site in given_up:
        exchange(coordinator, site)
    void = coordinator.advance()
    assert void is not None
    exchange(coordinator, given_up[0])
    with_void, with_sum = (four.folder / "sites" / name / "state" for name in ("ash", "birch"))
    assert rebuild(four.agreed, [with_sum, with_void], four.folder / "new").head == void.id
    assert rebuild(four.agreed, [with_void], four.folder / "older").head == void.id, "the server's own last sum too"
    shutil.rmtree(server)
    (four.folder / "older").rename(server)
    again = four.reopen()
    assert exchange(again, sites[1]).code == ReplyCode.READY
    assert sites[1].adapter_digest == given_up[0].adapter_digest


def test_whoever_has_revealed_in_a_later_round_gives_no_word_for_a_void_of_the_one_before(four: Federation) -> None:
    sites, coordinator = split_over_a_record(four)
    for site in sites[2:]:
        exchange(coordinator, site)
    send_envelopes(coordinator, sites)
    coordinator.advance()
    exchange(coordinator, sites[1])
    with pytest.raises(ProtocolError, match="has revealed in round 2, which builds on its record"):
        sites[1].void(1)
    # The others have not; birch takes back what a quorum of them gives up, and knows to whom it has revealed.
    at_first = sites[1].replica.files.bound.given
    assert len(at_first) == 2
    for site in (sites[0], *sites[2:]):
        site.void(1)
        assert exchange(coordinator, site).code == ReplyCode.VOID
    assert coordinator.advance().header.kind == "void"  # type: ignore[union-attr]
    assert exchange(coordinator, sites[1]).code == ReplyCode.READY
    assert sites[1].revealed_to == (*TRAINING, "dogwood")
    pass_step(coordinator, sites[:3])
    for site in sites[:3]:
        with pytest.raises(ProtocolError, match="secfacmic site release"):
            exchange(coordinator, site)


def test_whoever_has_revealed_on_a_record_stands_by_it_though_that_later_round_was_given_up(four: Federation) -> None:
    """Else two records are taken back, and who has applied the second can never follow the others."""
    sites, coordinator = split_over_a_record(four)
    for site in sites[2:]:
        exchange(coordinator, site)
    assert close_round(coordinator, sites) is not None
    exchange(coordinator, sites[3])
    assert sites[3].round == 2, "dogwood has the record of round 2, the others have not"
    for site in sites[:3]:
        assert site.void(2), "it had revealed"
        assert exchange(coordinator, site).code == ReplyCode.VOID
    assert coordinator.advance().header.kind == "void"  # type: ignore[union-attr]
    for site in sites[:3]:
        exchange(coordinator, site)
        with pytest.raises(ProtocolError, match="has revealed in round 2, which builds on its record"):
            site.void(1)
        with pytest.raises(ProtocolError, match="has revealed in round 2, which builds on its record"):
            four.site(site.name).void(1)
    assert exchange(coordinator, sites[3]).code == ReplyCode.READY
    assert sites[3].adapter_digest == sites[0].adapter_digest


def test_a_site_that_gave_a_round_up_applies_its_record_only_under_a_later_one(four: Federation) -> None:
    """Else it could reveal on the record and have given its word for the void: both could be built on."""
    sites, coordinator = split_over_a_record(four)
    start = sites[3].adapter_digest
    sites[3].void(1)
    assert exchange(coordinator, sites[3]).code == ReplyCode.VOID
    assert (sites[3].position, sites[3].round) == (2, 0)
    assert exchange(coordinator, sites[3]).code == ReplyCode.VOID
    sites[3] = four.site("dogwood")
    assert exchange(coordinator, sites[3]).code == ReplyCode.VOID, "also after a restart"
    assert sites[3].adapter_digest == start
    for site in sites[:3]:
        exchange(coordinator, site)
    assert coordinator.asked == frozenset()
    close_round(coordinator, sites[:3])
    assert exchange(coordinator, sites[3]).code == ReplyCode.READY
    assert sites[3].round == 2
    exchange(coordinator, sites[0])
    assert sites[3].adapter_digest == sites[0].adapter_digest


def test_a_site_that_retires_lowers_the_quorum_and_lets_a_paused_study_go_on(four: Federation) -> None:
    """Its own signed word, and nothing that the server says, makes it an observer; the others still need theirs."""
    sites = four.sites()
    coordinator = begin(four)
    refused_by_all(coordinator, sites)
    assert coordinator.paused
    assert "can compute the update of dogwood by difference" in say(four, "dogwood", "retire")
    sites = four.sites()
    assert exchange(coordinator, sites[3]).code == ReplyCode.RETIRED
    assert coordinator.advance().header.kind == "retired"  # type: ignore[union-attr]
    assert (coordinator.journal.chain.quorum.training, coordinator.journal.chain.quorum.needed) == (3, 3)
    assert not coordinator.paused
    pass_step(coordinator, sites)
    with pytest.raises(ProtocolError, match="still to be heard: ash, birch, cedar"):
        exchange(coordinator, sites[0])
    for name in TRAINING:
        say(four, name, "release")
    assert coordinator.fail([])
    sites = four.sites()
    pass_step(coordinator, sites)
    assert close_round(coordinator, sites).sites == TRAINING
    for site in sites:
        exchange(coordinator, site)
    assert len({site.adapter_digest for site in sites}) == 1, "it goes on as an observer"
    assert [entry.header.kind for entry in coordinator.journal.records[1:]] == ["aggregate", "retired", "aggregate"]
    with pytest.raises(ProtocolError, match="does not train"):
        sites[3].retire()
    assert four.reopen().journal.chain.quorum.training == 3


def test_a_retirement_waits_for_the_open_round_and_one_follows_another_only_after_a_sum(four: Federation) -> None:
    sites = four.sites()
    coordinator = begin(four)
    send_envelopes(coordinator, sites)
    sites[3].retire()
    sites[2].retire()
    assert exchange(coordinator, sites[3]).code == ReplyCode.UPDATE
    close_round(coordinator, sites)
    for site in sites:
        exchange(coordinator, site)
    assert coordinator.advance().header.kind == "retired"  # type: ignore[union-attr]
    with pytest.raises(RecordError, match="expected at most one training site"):
        coordinator.journal.append_retired(coordinator._retiring["dogwood"])
    assert coordinator.journal.chain.members["cedar"].role == "observer"
    coordinator.journal.chain.changed_after = -1  # as at a server that lies
    with pytest.raises(RecordError, match="signature"):
        coordinator.journal.append_retired(coordinator._retiring["dogwood"]._replace(signature="0" * 128))
    coordinator.journal.append_retired(coordinator._retiring["dogwood"])
    with pytest.raises(RecordError, match="expected at most one training site"):
        exchange(coordinator, sites[0])


def test_where_so_many_retire_at_once_that_no_sum_can_come_between_the_study_is_over_by_rule(
    four: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    """Budgets that are spent at once, say: of two that leave four, the second cannot before a sum of the other two."""
    sites = four.sites()
    coordinator = begin(four)
    send_envelopes(coordinator, sites)
    close_round(coordinator, sites)
    for site in sites:
        exchange(coordinator, site)
    for site in sites[2:]:
        site.retire()
        exchange(coordinator, site)
    kinds = []
    for _ in range(3):
        entry = coordinator.advance()
        kinds += [] if entry is None else [entry.header.kind]
        for site in sites:
            exchange(coordinator, site)
    assert kinds == ["retired", "end"]
    assert "dogwood train no more either" in caplog.text
    assert coordinator.finished
    assert coordinator.journal.chain.lost
    for site in [*sites, *four.sites()]:
        assert site.over
        with pytest.raises(NotEnoughSitesError, match="after 1 of 3 rounds: its coordinator ended it"):
            site.replica.state.chain.refuse_short()
    assert len({site.adapter_digest for site in sites}) == 1
    assert four.reopen().finished


def test_members_change_one_by_one_on_the_whole_way_from_the_key_maker_to_the_sites(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = tuple("abcdef")
    simulation = template_table()["simulation"] | {
        "sites": [{"name": name, "folder": "ash"} for name in names],
        "shared": True,
    }
    rows = [{"name": name} for name in names]
    prepare(make_template(max_sites=8, sites=rows, key_maker="a", simulation=simulation), tmp_path / "out", images)
    federation = Federation(tmp_path / "out")
    monkeypatch.setattr(Site, "_train", lambda site: site._quantise(np.full(_size(site), 0.01), np.zeros(_size(site))))
    sites = federation.sites()
    coordinator = begin(federation)
    run_round(coordinator, sites)
    chain = coordinator.journal.chain
    with pytest.raises(KeyFileError, match="e, f would join, leave or change"):
        coordinator.amend(federation.seal_key(2, chain.key, members=chain.members, removed=("e", "f")))
    sites[4].retire()
    for site in sites:
        exchange(coordinator, site)
    assert coordinator.advance().header.kind == "retired"  # type: ignore[union-attr]
    chain = coordinator.journal.chain
    coordinator.amend(federation.seal_key(2, chain.key, members=chain.members, removed=("f",)))
    kinds: list[str] = []
    while len(kinds) < 3:
        entry = pass_step(coordinator, sites)
        kinds += [] if entry is None else [entry.header.kind]
        sites = [site for site in sites if site.name in coordinator.journal.chain.members]
    assert kinds == ["aggregate", "amendment", "checkpoint"], "the second leaves after a sum, and nobody's process ends"
    run_round(coordinator, sites)
    assert coordinator.journal.records[-1].sites == ("a", "b", "c", "d")
    for site in sites:
        exchange(coordinator, site)
    assert len({site.adapter_digest for site in sites}) == 1


def test_who_retires_after_its_ready_takes_part_in_the_round_and_then_no_more(federation: Federation) -> None:
    """Else, with no more than a quorum, the round could never be closed, nor the retirement stand in the journal."""
    sites = federation.sites()[:3]
    coordinator = begin(federation)
    pass_step(coordinator, sites)
    sites[0].retire()
    assert close_round(coordinator, sites).sites == TRAINING
    assert exchange(coordinator, sites[0]).code == ReplyCode.RETIRED
    assert coordinator.advance().header.kind == "retired"  # type: ignore[union-attr]
    assert coordinator.journal.chain.short


def test_no_retirement_slips_into_an_open_round(four: Federation) -> None:
    sites = four.sites()
    coordinator = begin(four)
    send_envelopes(coordinator, sites[:3])
    exchange(coordinator, sites[3])
    sites[3].retire()
    exchange(coordinator, sites[3])
    assert coordinator.fail([])
    assert coordinator.advance() is None, "an honest server keeps it until the round is closed"
    coordinator.journal.append_retired(coordinator._retiring["dogwood"])
    with pytest.raises(RecordError, match="retired within round 1, for which this site answered attempt 1"):
        exchange(coordinator, sites[0])


def test_where_a_quorum_had_not_revealed_a_void_needs_no_release(four: Federation) -> None:
    sites = four.sites()
    coordinator = begin(four)
    send_envelopes(coordinator, sites)
    coordinator.advance()
    exchange(coordinator, sites[0])
    for site in sites:
        site.void(1)
        exchange(coordinator, site)
    assert coordinator.advance().header.kind == "void"  # type: ignore[union-attr]
    exchange(coordinator, sites[0])
    assert sites[0].revealed_to is None
    pass_step(coordinator, sites[:3])
    assert close_round(coordinator, sites[:3]).sites == TRAINING


def test_who_revealed_in_a_round_that_no_sum_came_of_stands_by_the_record_before_no_more(four: Federation) -> None:
    sites = four.sites()
    coordinator = begin(four)
    send_envelopes(coordinator, sites)
    close_round(coordinator, sites)
    for site in sites:
        exchange(coordinator, site)
    send_envelopes(coordinator, sites)
    coordinator.advance()
    ash = sites[0]
    assert exchange(coordinator, ash).code == ReplyCode.REVEALED
    with pytest.raises(ProtocolError, match="the record stands"):
        ash.void(1)
    for site in sites[1:]:
        assert not site.void(2)
        exchange(coordinator, site)
    assert coordinator.advance().header.kind == "void"  # type: ignore[union-attr]
    exchange(coordinator, ash)
    assert ash.void(1), "it had revealed in that one"


def test_no_sum_is_fixed_with_a_site_that_has_given_the_round_up(federation: Federation) -> None:
    """Nobody reveals anything then, so that all can begin anew without anybody's release."""
    sites = federation.sites()[:3]
    coordinator = begin(federation)
    send_envelopes(coordinator, sites)
    sites[0].void(1)
    assert exchange(coordinator, sites[0]).code == ReplyCode.VOID
    assert coordinator.advance() is None
    assert coordinator.step is Step.ENVELOPE
    for site in sites[1:]:
        assert not site.void(1), "it has revealed nothing"
        exchange(coordinator, site)
    assert coordinator.advance().header.kind == "void"  # type: ignore[union-attr]
    pass_step(coordinator, sites)
    assert close_round(coordinator, sites).sites == TRAINING


def test_voids_of_the_same_cohort_need_no_release_and_a_word_is_for_one_head(federation: Federation) -> None:
    sites = federation.sites()[:3]
    coordinator = begin(federation)
    for _ in range(3):
        send_envelopes(coordinator, sites)
        coordinator.advance()
        exchange(coordinator, sites[0])
        old = []
        for site in sites:
            site.void(1)
            request = coordinator.request(site.name, site.run, site.position)
            old.append(site.respond(request))
            assert site.respond(replace(request, more=True)).code == ReplyCode.VOID
            coordinator.receive(old[-1])
        assert coordinator.advance() is not None
        with pytest.raises(EnvelopeError, match="void of ash: of round 1 after"):
            coordinator.receive(replace(old[0], position=1))
    pass_step(coordinator, sites)
    close_round(coordinator, sites)
    for site in sites:
        exchange(coordinator, site)
    assert len({site.adapter_digest for site in sites}) == 1
    assert [entry.header.kind for entry in coordinator.journal.records] == ["genesis", *["void"] * 3, "aggregate"]
    assert federation.site("ash").adapter_digest == sites[0].adapter_digest


def test_two_training_sites_do_not_change_between_two_rounds(federation: Federation) -> None:
    """Two quorums of before and after would share no honest site."""
    sites = federation.sites()
    coordinator = begin(federation)
    run_round(coordinator, sites)
    chain = coordinator.journal.chain
    member = chain.members["ash"]
    changed = chain.members | {name: member.model_copy(update={"name": name}) for name in ("birch", "cedar")}
    assert chain.changed(changed) == ["birch", "cedar"]
    assert chain.changed(chain.members | {"dogwood": chain.members["dogwood"]}) == []


def test_no_amendment_slips_into_an_open_round(federation: Federation) -> None:
    sites = federation.sites()
    coordinator = begin(federation)
    send_envelopes(coordinator, sites[:3])
    chain = coordinator.journal.chain
    coordinator.amend(federation.seal_key(2, chain.key, members=chain.members, removed=("dogwood",)))
    assert coordinator.fail([])
    for site in sites:
        exchange(coordinator, site)
    coordinator.advance()
    assert coordinator.step is Step.ENVELOPE, "an honest server keeps it until the round is closed"
    coordinator.journal.append_amendment(coordinator._waiting_amendment() or b"")
    with pytest.raises(RecordError, match="within round 1, for which this site answered attempt 1"):
        sites[0].respond(coordinator.request("ash", sites[0].run, sites[0].position))


def splits(names: tuple[str, ...]) -> Iterator[tuple[set[str], set[str]]]:
    """Every way to show the sites two rounds, with one of them lying to both halves."""
    for liar in names:
        others = [name for name in names if name != liar]
        for chosen in range(2 ** len(others)):
            one = {name for place, name in enumerate(others) if chosen >> place & 1}
            yield one | {liar}, (set(others) - one) | {liar}


@pytest.mark.parametrize(
    "count", [4, 5, pytest.param(6, marks=pytest.mark.slow), pytest.param(7, marks=pytest.mark.slow)]
)
def test_no_split_of_the_sites_closes_two_rounds(
    count: int, tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that has all READYs shows each half of real sites its own COHORT: one half at least sends nothing."""
    names = tuple("abcdefg"[:count])
    simulation = template_table()["simulation"] | {
        "sites": [{"name": name, "folder": "ash"} for name in names],
        "shared": True,
    }
    rows = [{"name": name} for name in names]
    template = make_template(max_sites=8, sites=rows, key_maker="a", simulation=simulation)
    prepare(template, tmp_path / "out", images)
    federation = Federation(tmp_path / "out")
    monkeypatch.setattr(Site, "_train", lambda site: site._quantise(np.zeros(_size(site)), np.zeros(_size(site))))
    coordinator = begin(federation)
    sites = {name: federation.site(name) for name in names}
    for site in sites.values():
        assert exchange(coordinator, site).code == ReplyCode.READY
    due, agreed = coordinator.journal.chain.due, federation.agreed
    sent_by_one = 0
    for attempt, halves in enumerate(
        sorted({tuple(sorted(map(tuple, map(sorted, pair)))) for pair in splits(names)}), 2
    ):
        readies = {
            name: split_word(b"SFY2", sign_ready(agreed, due, attempt, name, True, site.replica.identity.signing))
            for name, site in sites.items()
        }
        whole = []
        for half in halves:
            words = [readies[name] for name in half]
            question = sign_cohort(agreed, due, attempt, words, federation.signing)
            sent = {name for name in half if _answers(coordinator, sites[name], attempt, question)}
            assert sent in (set(), set(half))
            whole.append(bool(sent))
        assert sum(whole) < 2, halves
        sent_by_one += sum(whole)
    assert sent_by_one, "one that is large enough goes on"


def _size(site: Site) -> int:
    return codec.flatten(site.replica.state.iterate).size


def _answers(coordinator: Coordinator, site: Site, attempt: int, question: bytes) -> bool:
    request = coordinator.request(site.name, site.run, site.position)
    with contextlib.suppress(ProtocolError):
        return bool(site.respond(replace(request, attempt=attempt, question=question)).code == ReplyCode.UPDATE)
    return False

"""Rounds between real sites and a real coordinator: sums, restarts, forgeries, refusals."""

from __future__ import annotations

import hashlib
import re
import shutil
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from secure_fed.clients.replica import Validation
from secure_fed.clients.site import Site
from secure_fed.core.errors import (
    AdapterMismatchError,
    EnvelopeError,
    ProtocolError,
    RecordError,
    StorageError,
)
from secure_fed.lab.simulation import prepare
from secure_fed.privacy.ckks import Cipher
from secure_fed.privacy.keys import load_identity
from secure_fed.protocol import codec
from secure_fed.protocol.envelope import MAGIC as ENVELOPE_MAGIC
from secure_fed.protocol.envelope import EnvelopeHeader, open_envelope
from secure_fed.protocol.packing import CipherWire
from secure_fed.protocol.records import RecordHeader, new_header, sign_record
from secure_fed.protocol.residues import pack_residues
from secure_fed.protocol.round_frames import (
    REVEAL_MAGIC,
    Revealed,
    SignedWord,
    arrived_digest,
    arrived_header,
    sign_reveal,
    split_word,
)
from secure_fed.protocol.rounds import ReplyCode, RoundReply, RoundRequest
from secure_fed.protocol.signing import parse_header, payload_fields, sign_frame, split_frame
from secure_fed.server.coordinator import Coordinator, Step
from tests.conftest import (
    TRAINING,
    Federation,
    close_round,
    corrupt,
    damage_adapter,
    exchange,
    make_template,
    pass_step,
    run_round,
    send_envelopes,
)


def test_every_site_applies_exactly_the_weighted_mean_of_the_integers(federation: Federation) -> None:
    sites = federation.sites()
    coordinator = federation.begin(sites)
    run_round(coordinator, sites)
    stored = []
    for site in sites[:3]:
        import safetensors.numpy

        path = next((Path(site._file.state) / "runs" / coordinator.run / "outbox").glob("*.integers"))
        stored.append(safetensors.numpy.load(path.read_bytes())["integers"])
    for site in sites:
        exchange(coordinator, site)
    initial = codec.flatten(federation.agreed.initial.adapter)
    size = initial.size
    # The oracle is plain rational arithmetic on the integers that the sites stored.
    total = sum(array.astype(object) for array in stored)
    lanes = federation.agreed.lanes
    expected = initial + np.array([float(int(value)) for value in total[:size]]) * 0.1 / (lanes.max_integer * 3.0)
    for site in sites:
        assert np.array_equal(codec.flatten(site.parameters), expected)
        counts = total[size:].astype(np.int64)
        images, correct = codec.Digits(16, codec.COUNT_BITS + 1).join(counts)
        assert site.replica.state.validation == Validation(images, correct)
        assert site.replica.state.validation.images == 3 * 6


def test_arrival_order_changes_no_byte_of_the_sum(federation: Federation) -> None:
    sites = federation.sites()
    coordinator = federation.begin(sites)
    pass_step(coordinator, sites[:3])
    replies = [site.respond(coordinator.request(site.name, site.run, site.position)) for site in sites[:3]]
    payloads = []
    for order in ([0, 1, 2], [2, 0, 1]):
        folder = federation.folder.parent / f"server{order[0]}"
        shutil.copytree(federation.folder / "server", folder)
        other = Coordinator(federation.agreed, folder, federation.signing)
        for index in order:
            other.receive(replies[index])
        payloads.append(other._sum())
    assert payloads[0] == payloads[1]


def test_a_restarted_coordinator_keeps_what_it_accepted(federation: Federation) -> None:
    sites = federation.sites()
    coordinator = federation.begin(sites)
    pass_step(coordinator, sites[:3])
    replies = [site.respond(coordinator.request(site.name, site.run, site.position)) for site in sites[:3]]
    coordinator.receive(replies[0])
    again = federation.reopen()
    assert again.sites_in == ("ash",)
    again.receive(replies[0])  # the same bytes once more count once
    for reply in replies[1:]:
        again.receive(reply)
    close_round(again, sites)
    for site in sites:
        exchange(again, site)
    assert len({site.adapter_digest for site in sites}) == 1
    assert sites[0].replica.state.validation.images == 18  # type: ignore[union-attr]


def test_a_damaged_spool_costs_an_attempt_and_never_a_retraining(federation: Federation) -> None:
    sites = federation.sites()
    coordinator = federation.begin(sites)
    send_envelopes(coordinator, sites)
    spooled = next(federation.folder.glob("server/runs/*/spool/*/*/birch.envelope"))
    spooled.write_bytes(spooled.read_bytes()[:-1])
    again = federation.reopen()
    assert again.attempt == 2
    assert again.sites_in == ()
    integers = {path: path.read_bytes() for path in federation.folder.glob("sites/*/state/runs/*/outbox/*.integers")}
    assert len(integers) == 3
    run_round(again, sites)
    for path, content in integers.items():
        assert path.read_bytes() == content
    for site in sites:
        exchange(again, site)
    assert len({site.adapter_digest for site in sites}) == 1


def test_an_older_attempt_is_refused_and_the_same_one_gives_the_same_bytes(federation: Federation) -> None:
    sites = federation.sites()
    coordinator = federation.begin(sites)
    pass_step(coordinator, sites[:3])
    request = coordinator.request("ash", sites[0].run, sites[0].position)
    first = sites[0].respond(request).envelope
    assert federation.site("ash").respond(request).envelope == first
    assert coordinator.fail([])
    pass_step(coordinator, sites[:3])
    second = sites[0].respond(coordinator.request("ash", sites[0].run, sites[0].position)).envelope
    assert second != first
    # Another header over the very same bytes.
    assert second[-federation.agreed.lanes.payload_bytes :] == first[-federation.agreed.lanes.payload_bytes :]
    with pytest.raises(ProtocolError, match="attempt 2 was answered already"):
        sites[0].respond(request)


def test_a_late_site_replays_the_journal_in_pages(federation: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    sites = federation.sites()
    coordinator = federation.begin(sites)
    for _ in range(3):
        run_round(coordinator, sites[:3])
    monkeypatch.setattr("secure_fed.server.coordinator.PAGE_BYTES", 200_000)
    codes = []
    while not codes or codes[-1] == ReplyCode.MORE:
        codes.append(exchange(coordinator, sites[3]).code)
    assert codes.count(ReplyCode.MORE) >= 1
    assert codes[-1] == ReplyCode.APPLIED
    exchange(coordinator, sites[0])
    assert sites[3].adapter_digest == sites[0].adapter_digest


def test_a_site_rebuilds_its_adapter_from_its_own_journal(federation: Federation) -> None:
    sites = federation.sites()
    coordinator = federation.begin(sites)
    run_round(coordinator, sites)
    exchange(coordinator, sites[3])
    stored = next((federation.folder / "sites" / "dogwood" / "state" / "runs").glob("*/adapter.safetensors"))
    whole = stored.read_bytes()
    for damage in (b"", whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1])):
        stored.write_bytes(damage)
        assert federation.site("dogwood").adapter_digest == sites[3].adapter_digest


def test_a_site_with_another_adapter_is_named_by_the_others_and_finds_itself(
    federation: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    sites = federation.sites()
    coordinator = federation.begin(sites)
    run_round(coordinator, sites)
    for site in sites[:2]:
        exchange(coordinator, site)
    name = sorted(sites[2].parameters)[0]
    request = coordinator.request(sites[2].name, sites[2].run, sites[2].position)
    applied = Site.respond(sites[2], replace(request, attestations={}))
    assert applied.code == ReplyCode.READY
    corrupt(sites[2], **{name: sites[2].parameters[name] + 2.0**-40})
    with pytest.raises(AdapterMismatchError, match="ash, birch attest another adapter"):
        sites[2].respond(replace(request, records=()))
    # One garbled word stops nobody, nor one in letters that no digest has.
    for garbled in ("0" * 64, "ä" * 64, "\ud800"):
        caplog.clear()
        coordinator.receive(replace(applied, attestation=garbled))
        assert exchange(coordinator, sites[0]).code in (ReplyCode.READY, ReplyCode.APPLIED)
        assert "cedar attest another adapter" in caplog.text


def test_what_all_sites_attest_is_told_with_the_records_and_the_cohort_and_not_again(federation: Federation) -> None:
    """With a thousand sites it is 75 kB for each of them."""
    sites = federation.sites()
    coordinator = federation.begin(sites)
    training = {site.name for site in sites if coordinator.journal.chain.members[site.name].role == "train"}

    def told(site: Site) -> set[str]:
        return set(coordinator.request(site.name, site.run, site.position).attestations)

    pass_step(coordinator, sites)
    assert coordinator.step is Step.ENVELOPE
    assert training <= told(sites[0])
    pass_step(coordinator, sites)
    assert coordinator.step is Step.REVEAL
    assert told(sites[0]) == set()
    pass_step(coordinator, sites)
    assert coordinator.step is Step.READY
    assert training <= told(sites[0])


def test_a_site_whose_adapter_was_damaged_on_its_disk_is_whole_again_by_its_journal(federation: Federation) -> None:
    sites = federation.sites()
    coordinator = federation.begin(sites)
    run_round(coordinator, sites)
    run_round(coordinator, sites)
    folder = sites[2].replica.files.folder
    damage_adapter(folder.adapter)  # of before the second sum, which is still to come
    sites[2] = federation.site("cedar")
    for site in sites[:2]:
        exchange(coordinator, site)
    with pytest.raises(AdapterMismatchError, match=r"delete .*adapter\.safetensors and before\.safetensors"):
        exchange(coordinator, sites[2])
    folder.adapter.unlink()
    folder.before.unlink()
    sites[2] = federation.site("cedar")
    exchange(coordinator, sites[2])
    assert sites[2].adapter_digest == sites[0].adapter_digest


# --- what a hostile network or site may send to the server ---


@pytest.fixture
def envelope(federation: Federation) -> tuple[Federation, Coordinator, RoundReply]:
    sites = federation.sites()
    coordinator = federation.begin(sites)
    pass_step(coordinator, sites[:3])
    site = federation.site("ash")
    return federation, coordinator, site.respond(coordinator.request("ash", site.run, site.position))


def test_a_flipped_bit_anywhere_in_an_envelope_is_refused(
    envelope: tuple[Federation, Coordinator, RoundReply],
) -> None:
    federation, coordinator, reply = envelope
    data = bytearray(reply.envelope)
    header_end = 8 + int.from_bytes(data[4:8], "big") + 64
    rng = np.random.default_rng(5)
    positions = [*range(header_end), *rng.integers(header_end, len(data), 60)]
    for position in positions:
        data[position] ^= 1 << int(rng.integers(8))
        with pytest.raises(EnvelopeError):
            coordinator.receive(replace(reply, envelope=bytes(data)))
        data[:] = reply.envelope
    assert coordinator.sites_in == ()
    assert not list(federation.folder.glob("server/runs/*/spool/*/*/*.envelope"))
    coordinator.receive(reply)
    assert coordinator.sites_in == ("ash",)


def _resigned(
    federation: Federation, data: bytes, signer: str = "ash", payload: bytes | None = None, **fields: object
) -> bytes:
    """The envelope with other header fields, signed with a site's true key."""
    frame = split_frame(ENVELOPE_MAGIC, data, 4096, EnvelopeError)
    header = parse_header(frame.header, EnvelopeHeader, EnvelopeError)
    body = bytes(frame.payload) if payload is None else payload
    changed = header.model_copy(update={**payload_fields(body), **fields})
    return sign_frame(
        ENVELOPE_MAGIC, changed, load_identity(federation.folder / "sites" / signer / "identity", signer).signing, body
    )


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"study": "1" * 64}, "for study"),
        ({"run": "1" * 64}, "run 1"),
        ({"head": "1" * 64}, "head 1"),
        ({"key": "1" * 64}, "key 1"),
        ({"amendment": 1}, "amendment 1"),
        ({"round": 2}, "round 2"),
        ({"attempt": 2}, "attempt 2"),
        ({"values": 5}, "5 values"),
        ({"site": "birch"}, "signature"),
        ({"site": "nobody"}, "no site of the study"),
        ({"site": "dogwood"}, "signature"),
        ({"version": 1}, "wrong: version"),
    ],
)
def test_an_honestly_signed_envelope_of_another_place_is_refused(
    envelope: tuple[Federation, Coordinator, RoundReply], fields: dict[str, object], match: str
) -> None:
    federation, coordinator, reply = envelope
    with pytest.raises(EnvelopeError, match=match):
        coordinator.receive(replace(reply, envelope=_resigned(federation, reply.envelope, **fields)))
    assert coordinator.sites_in == ()


def test_other_hostile_envelopes_are_refused(envelope: tuple[Federation, Coordinator, RoundReply]) -> None:
    federation, coordinator, reply = envelope
    honest = open_envelope(
        reply.envelope, federation.agreed, coordinator.journal.chain.members, coordinator._wire.payload_bytes
    )
    too_big = bytes(honest.payload[:-8]) + b"\xff" * 8  # a residue above q
    hostile = {
        "less than the modulus": _resigned(federation, reply.envelope, payload=too_big),
        "payload of": _resigned(federation, reply.envelope, payload=honest.payload[:-1]),
        "at most": reply.envelope + bytes(4096),
        "truncated": reply.envelope[:50],
        "declares a header": reply.envelope[:4] + b"\xff\xff\xff\xff" + reply.envelope[8:],
        "not this kind": b"SFE1" + reply.envelope[4:],
        "starts with": b"",
    }
    empty = coordinator._total.copy()
    for match, data in hostile.items():
        with pytest.raises(EnvelopeError, match=match):
            coordinator.receive(replace(reply, envelope=data))
        assert np.array_equal(coordinator._total, empty)
    assert coordinator.sites_in == ()
    with pytest.raises(EnvelopeError, match="in a reply of"):
        coordinator.receive(replace(reply, site="birch"))
    with pytest.raises(ProtocolError, match="expected one of"):
        coordinator.receive(replace(reply, site="nobody"))
    with pytest.raises(ProtocolError, match="run"):
        coordinator.receive(replace(reply, run="2" * 64))
    with pytest.raises(ProtocolError, match="record 7"):
        coordinator.receive(replace(reply, position=7))
    coordinator.receive(reply)
    with pytest.raises(EnvelopeError, match="the first counts"):
        coordinator.receive(replace(reply, envelope=_resigned(federation, reply.envelope, ledger_seq=1)))


def test_an_envelope_that_cannot_be_stored_is_not_in_the_sum(
    envelope: tuple[Federation, Coordinator, RoundReply], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, coordinator, reply = envelope
    before = coordinator._total.copy()

    def full(path: Path, *_: object) -> None:
        raise StorageError(f"{path}: not written (No space left on device)")

    with monkeypatch.context() as patch:
        patch.setattr("secure_fed.server.spool.write_durable", full)
        with pytest.raises(StorageError):
            coordinator.receive(reply)
    assert np.array_equal(coordinator._total, before)
    assert coordinator.sites_in == ()
    coordinator.receive(reply)
    assert coordinator.sites_in == (reply.site,)
    assert not np.array_equal(coordinator._total, before)


def test_an_observer_or_a_non_canonical_header_is_refused(
    envelope: tuple[Federation, Coordinator, RoundReply],
) -> None:
    federation, coordinator, reply = envelope
    with pytest.raises(EnvelopeError, match="was not asked for one"):
        coordinator.receive(
            replace(reply, site="dogwood", envelope=_resigned(federation, reply.envelope, "dogwood", site="dogwood"))
        )
    frame = split_frame(ENVELOPE_MAGIC, reply.envelope, 4096, EnvelopeError)
    spaced = bytes([0x98, frame.header[0] - 0x80]) + frame.header[1:]  # the array's length in a longer form
    signing = load_identity(federation.folder / "sites" / "ash" / "identity", "ash").signing
    data = b"SFE2" + len(spaced).to_bytes(4, "big") + spaced + signing.sign(b"SFE2" + spaced) + bytes(frame.payload)
    with pytest.raises(EnvelopeError, match="one encoding"):
        coordinator.receive(replace(reply, envelope=data))


# --- what a malicious server may send to a site; it holds the coordinator's true signing key ---


class Forger:
    """The server itself, after one honest round's envelopes are in."""

    def __init__(self, federation: Federation) -> None:
        self.federation = federation
        self.sites = federation.sites()
        self.coordinator = federation.begin(self.sites)
        send_envelopes(self.coordinator, self.sites)
        self.coordinator.advance()  # the sum is fixed: the sites may reveal
        self.wire = CipherWire(federation.agreed.lanes)
        self.envelopes = [self.coordinator._envelopes[name] for name in TRAINING]
        self.payloads = self.spooled()

    def record(self, payload: bytes, contributors: list[int] | None = None, **fields: object) -> bytes:
        """A record with the true signature over whatever it says.

        Args:
            payload: its sum.
            contributors: whose envelopes it names.
            fields: of the header, changed.
        """
        chosen = [0, 1, 2] if contributors is None else contributors
        chain = self.coordinator.journal.chain
        words = [SignedWord.of(self.envelopes[index].header_text, self.envelopes[index].signature) for index in chosen]
        arrived = arrived_digest(
            arrived_header(
                self.federation.agreed,
                chain.due,
                1,
                self.envelopes[0].header.cohort,
                (len(payload), hashlib.sha256(payload).hexdigest()),
                words,
            )
        )
        header = new_header(
            chain,
            "aggregate",
            run=chain.run,
            key=chain.key,
            round_number=chain.round + 1,
            contributors=tuple(words),
            reveals=tuple(self.reveal(index, arrived) for index in chosen),
            times_ms=(1, 2),
            payload=payload,
        )
        return sign_record(header.model_copy(update=fields), payload, self.federation.signing)

    def reveal(self, index: int, arrived: str) -> Revealed:
        """A site's REVEAL for an ARRIVED, whatever that says: more than any honest site would give."""
        name = TRAINING[index]
        signing = load_identity(self.federation.folder / "sites" / name / "identity", name).signing
        check = self.wire.check_words(arrived, self.payloads[index])
        word = split_word(REVEAL_MAGIC, sign_reveal(self.federation.agreed, arrived, name, check, signing))
        return Revealed(*(f"{product:016x}" for product in check), word.signature)

    def spooled(self) -> list[bytes]:
        """The payloads of the envelopes that are in."""
        files = [self.coordinator._spool.folder / f"{name}.envelope" for name in TRAINING]
        return [file.read_bytes()[-self.wire.payload_bytes :] for file in files]

    def summed(self, indices: list[int]) -> bytes:
        """The payload of a sum of these envelopes."""
        total = self.wire.zero()
        for index in indices:
            total = self.wire.add(total, self.payloads[index])
        return self.wire.record(total, len(indices))

    def give(self, record: bytes, site: int = 0) -> RoundReply:
        """Hand a record out; a site that takes it finds a REVEAL there that it did not give, and sits the next out."""
        request = RoundRequest(round=2, attempt=1, records=(record,), more=False)
        return self.sites[site].respond(request)


@pytest.fixture
def forger(federation: Federation) -> Forger:
    return Forger(federation)


@pytest.mark.parametrize(
    "indices",
    [[0], [0, 1], [0, 0, 1], [0, 0, 0], [0, 1, 2, 2]],
    ids=["one site alone", "one left out", "one twice", "one thrice", "one added again"],
)
def test_a_sum_of_other_envelopes_than_signed_is_refused_and_changes_nothing(
    forger: Forger, indices: list[int]
) -> None:
    before = forger.sites[0].adapter_digest
    with (
        mock.patch.object(Cipher, "open", side_effect=AssertionError("decrypted")),
        pytest.raises(RecordError, match="not that of the envelopes"),
    ):
        forger.give(forger.record(forger.summed(indices)))
    assert forger.sites[0].adapter_digest == before
    assert not list(forger.federation.folder.glob("sites/ash/state/runs/*/pins/*"))


def test_one_residue_more_is_refused_and_nothing_is_decrypted(forger: Forger) -> None:
    total = forger.wire.residues(forger.summed([0, 1, 2]))
    for change in (lambda sums: sums[7] + 1, lambda sums: sums[7] * 2 % forger.wire.modulus):
        bent = total.copy()
        bent[7] = change(bent)
        with (
            mock.patch.object(Cipher, "open", side_effect=AssertionError("decrypted")),
            pytest.raises(RecordError, match="linear check fails"),
        ):
            forger.give(forger.record(pack_residues(bent, forger.federation.agreed.lanes.modulus_bits)))


def test_the_honest_sum_is_accepted_by_the_same_path(forger: Forger) -> None:
    before = forger.sites[0].adapter_digest
    assert forger.give(forger.record(forger.summed([0, 1, 2]))).code == ReplyCode.SITS_OUT
    assert forger.sites[0].round == 1
    assert forger.sites[0].adapter_digest != before


@pytest.mark.parametrize(
    ("contributors", "fields", "match"),
    [
        ([0, 1], {}, "2 contributors; expected at least 3"),
        ([0, 0, 1], {}, "each site once"),
        ([1, 0, 2], {}, "each site once, sorted"),
        ([0, 1, 2], {"round": 2}, "aggregate of round 2, expected 1"),
        ([0, 1, 2], {"previous": "3" * 64}, "has 1 records"),
        ([0, 1, 2], {"seq": 3}, "has 1 records"),
        ([0, 1, 2], {"run": "3" * 64}, "another run"),
        ([0, 1, 2], {"key": "3" * 64}, "another run or key"),
        ([0, 1, 2], {"study": "3" * 64}, "a study never changes after its genesis"),
        ([0, 1, 2], {"kind": "genesis"}, "a second genesis"),
    ],
)
def test_a_record_out_of_place_is_refused_before_any_decryption(
    forger: Forger, contributors: list[int], fields: dict[str, object], match: str
) -> None:
    record = forger.record(forger.summed([0, 1, 2]), contributors, **fields)
    with pytest.raises(RecordError, match=match):
        forger.give(record)
    assert not list(forger.federation.folder.glob("sites/ash/state/runs/*/pins/*"))
    assert forger.give(forger.record(forger.summed([0, 1, 2]))).code == ReplyCode.SITS_OUT


def test_a_flipped_bit_anywhere_in_a_record_is_refused(forger: Forger) -> None:
    record = bytearray(forger.record(forger.summed([0, 1, 2])))
    whole = bytes(record)
    rng = np.random.default_rng(6)
    header_end = 8 + int.from_bytes(record[4:8], "big") + 64
    for position in [*range(0, header_end, 5), *rng.integers(header_end, len(record), 40)]:
        record[position] ^= 1 << int(rng.integers(8))
        with pytest.raises(RecordError):
            forger.give(bytes(record))
        record[:] = whole
    assert forger.give(whole).code == ReplyCode.SITS_OUT


def test_only_the_first_candidate_of_a_round_is_ever_decrypted(forger: Forger) -> None:
    forger.give(forger.record(forger.summed([0, 1, 2])))
    # Not even a site that lost its journal copy, but not its pins, decrypts a second one.
    for path in forger.federation.folder.glob("sites/ash/state/runs/*/journal/00000001.record"):
        path.unlink()
    forger.sites[0] = forger.federation.site("ash")
    with pytest.raises(RecordError, match="a second aggregate for round 1"):
        forger.give(forger.record(forger.summed([0, 1, 2]), closed_ms=9))
    assert list(forger.federation.folder.glob("sites/ash/state/runs/*/evidence/*.record"))


def test_a_second_record_for_an_applied_round_is_kept_as_evidence(forger: Forger) -> None:
    forger.give(forger.record(forger.summed([0, 1, 2])))
    other = forger.record(forger.summed([0, 1, 2]), closed_ms=9)
    digest = forger.sites[0].adapter_digest
    with pytest.raises(RecordError, match="tell the other sites"):
        forger.give(other)
    kept = list(forger.federation.folder.glob("sites/ash/state/runs/*/evidence/*.record"))
    assert [path.read_bytes() for path in kept] == [other]
    assert forger.sites[0].adapter_digest == digest


def test_a_scaled_sum_and_another_runs_envelopes_are_refused(forger: Forger) -> None:
    total = forger.wire.zero()
    for payload in forger.payloads:
        total = forger.wire.add(total, payload)
    scaled = (total.astype(object) * 1024 % forger.federation.agreed.lanes.modulus).astype(np.uint64)
    with pytest.raises(RecordError, match="linear check fails"):
        forger.give(forger.record(forger.wire.record(scaled, 3)))
    # The same sites' envelopes of this run, under a new run and key.
    federation = forger.federation
    old = list(forger.payloads)
    second = Forger(federation)
    second.payloads = old
    record = second.record(second.summed([0, 1, 2]))
    second.payloads = second.spooled()  # the sites' words are for what they sent
    bent = second.record(second.summed([0, 1, 2]))
    assert record != bent
    assert second.give(bent, site=1).code == ReplyCode.SITS_OUT


# --- runs and keys ---


def test_a_key_serves_one_run_only(federation: Federation) -> None:
    sites = federation.sites()
    first = federation.begin(sites)
    exchange(first, sites[0])
    key = first.journal.chain.key
    second = Coordinator.begin(federation.agreed, federation.folder / "server", federation.signing, key)
    with pytest.raises(RecordError, match="every run has a new key"):
        exchange(second, sites[0])
    assert sites[0].run == first.run


def test_a_site_never_goes_back_to_an_older_run_or_a_second_genesis(federation: Federation) -> None:
    sites = federation.sites()
    first = federation.begin(sites)
    run_round(first, sites)
    old = first.journal.read(0)
    other = sign_record(
        parse_header(split_frame(b"SFR2", old, 10**6, RecordError).header, RecordHeader, RecordError).model_copy(
            update={"closed_ms": 1}
        ),
        b"",
        federation.signing,
    )
    with pytest.raises(RecordError, match="a second record 0, different"):
        sites[0].respond(RoundRequest(round=1, attempt=1, records=(other,), more=False))
    second = federation.begin(sites)
    exchange(second, sites[0])
    for record in (old, other):
        with pytest.raises(RecordError, match="never goes back to an older key"):
            sites[0].respond(RoundRequest(round=1, attempt=1, records=(record,), more=False))
    assert sites[0].run == second.run


def test_a_run_under_an_unknown_key_is_refused(federation: Federation) -> None:
    sites = federation.sites()
    federation.begin(sites)
    unknown = Coordinator.begin(federation.agreed, federation.folder / "server", federation.signing, "4" * 64)
    with pytest.raises(RecordError, match="nor to one it does not hold"):
        exchange(unknown, sites[0])


def test_plain_genesis_in_he_mode_is_refused(federation: Federation) -> None:
    with pytest.raises(RecordError, match="does not fit mode he"):
        Coordinator.begin(federation.agreed, federation.folder / "server", federation.signing, "0" * 64)


def test_another_signing_key_cannot_continue_the_journal(federation: Federation) -> None:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from secure_fed.core.errors import StudyError

    federation.begin(federation.sites())
    with pytest.raises(StudyError, match="the study names"):
        Coordinator(federation.agreed, federation.folder / "server", Ed25519PrivateKey.generate())


def test_a_changed_journal_file_is_noticed_by_the_server(federation: Federation) -> None:
    sites = federation.sites()
    run_round(federation.begin(sites), sites)
    path = next(federation.folder.glob("server/runs/*/journal/00000001.record"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(RecordError, match="payload"):
        federation.reopen()
    path.unlink()
    next(federation.folder.glob("server/runs/*/journal/00000000.record")).rename(path)
    with pytest.raises(RecordError, match="expected all from 0 on"):
        federation.reopen()


def test_what_leaves_a_site_is_on_the_allow_list() -> None:
    fields = {"site", "code", "run", "position", "attestation", "envelope", "carried"}
    assert set(RoundReply.__dataclass_fields__) == fields
    assert set(EnvelopeHeader.model_fields) == {
        *(
            "version",
            "study",
            "run",
            "head",
            "key",
            "amendment",
            "round",
            "attempt",
            "cohort",
            "site",
            "values",
            "seed",
        ),
        *("ledger_seq", "ledger_head", "ledger_links", "size", "payload", "hidden"),
    }
    assert {code.value for code in ReplyCode} >= {"ready", "update", "revealed", "applied", "more", "refused-aggregate"}
    assert set(RecordHeader.model_fields) == {
        *("version", "kind", "seq", "previous", "study", "run", "key", "round", "contributors", "reveals"),
        *("opened_ms", "closed_ms", "size", "payload", "masks", "witnessed", "witnesses"),
    }


def test_a_saturating_value_bound_warns_with_the_share_and_goes_on(
    tmp_path: Path, images: Path, caplog: pytest.LogCaptureFixture
) -> None:
    encoding = {"bits": 16, "lanes": 2, "value_bound": 1e-4}
    prepare(make_template(encoding=encoding), tmp_path / "out", images)
    federation = Federation(tmp_path / "out")
    sites = federation.sites()
    coordinator = federation.begin(sites)
    with caplog.at_level("WARNING"):
        assert exchange(coordinator, sites[0]).code == ReplyCode.READY
    assert re.search(
        r"round 1, update: \d+\.\d\d % of the values exceed their bounds .* expected at most 0\.1 %: raise encoding",
        caplog.text,
    )

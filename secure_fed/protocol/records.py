"""The journal's records: their format, and the checks of chain and signatures, for server and sites alike.

A record is a signed frame. Its id, the next record's ``previous``, is the SHA-256 of its header, which binds the
payload. The journal *is* the model: genesis and the decrypted aggregates in order.
"""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from secure_fed.core.errors import EnvelopeError, KeyFileError, NotEnoughSitesError, RecordError, StorageError
from secure_fed.core.layout import record_file
from secure_fed.core.storage import make_folder, sync_folder, write_durable
from secure_fed.protocol import aggregation
from secure_fed.protocol.envelope import EnvelopeHeader, RoundPosition, Seeds, refuse_repeated_seed
from secure_fed.protocol.ledger_heads import check_continues
from secure_fed.protocol.packing import Contribution, Wire, wire
from secure_fed.protocol.pads import PadPlace, commitment, without_masks
from secure_fed.protocol.quorum import Quorum
from secure_fed.protocol.residues import pack_residues, unpack_residues
from secure_fed.protocol.round_frames import (
    Revealed,
    SignedWord,
    arrived_digest,
    arrived_header,
    check_envelopes,
    check_retired,
    check_reveal,
    check_void,
    max_header,
    refuse_cohort,
    reveal_word,
)
from secure_fed.protocol.sealed_key import MAX_SEALED, Members, SealedKeyHeader, check_amendment, verify_acknowledgement
from secure_fed.protocol.share_frames import Witness, Witnessed, check_witnesses
from secure_fed.protocol.signing import (
    ZERO_DIGEST,
    Count,
    Frame,
    SignedHeader,
    check_payload,
    parse_header,
    payload_fields,
    sign_frame,
    split_frame,
    verify_signature,
)
from secure_fed.protocol.study import AgreedStudy
from secure_fed.protocol.study_tables import Hex64

MAGIC = b"SFR2"

Kind = Literal["genesis", "aggregate", "void", "retired", "amendment", "checkpoint", "extension", "end"]

MOST_ROUNDS = 100_000
"""Of a study, extended or not."""

LOST = b"lost"
"""Payload of an end for want of sites."""


class RecordHeader(SignedHeader):
    """One record.

    Attributes:
        kind: ``genesis`` opens a run; ``aggregate`` carries one round's encrypted sum; ``void`` closes, by the words of
            a quorum's people, what was begun of a round, which begins anew; ``retired`` makes, by its own word, an
            observer of a training site; ``amendment`` brings a new sealed key and perhaps other members;
            ``checkpoint``, always next, the members' acknowledgements and the adapter sealed under the key;
            ``extension`` lets the run have more rounds than the study says, as many as its payload says in decimal
            digits; ``end`` closes the run before its last round, and nothing follows it; one with a payload does so
            for want of sites, and closes what was begun of a round with it.
        seq: 0 for genesis, then one more each.
        previous: id of the record before; zeros for genesis.
        study, run, key: ids; ``key`` is zeros in ``plain`` mode, and an amendment's is the new one.
        round: of an aggregate; the first in force for an amendment, checkpoint or extension; the one that is not
            trained any more for an end; 0 for genesis.
        contributors: by site name; signed envelope headers of an aggregate, words for a void, the one word of a site
            that has retired, acknowledgements of a checkpoint.
        reveals: of an aggregate, each contributor's REVEAL, in the same order, but for those witnessed; else none.
        opened_ms, closed_ms: the server's clock, milliseconds since 1970; for information.
        masks: of an aggregate with pads, the seed of each contributor's mask, in the same order; else none.
        witnessed: of an aggregate with pads, whose check others stand for, by name; else none.
        witnesses: their words for it, by name; else none.
    """

    version: Literal[2]
    kind: Kind
    seq: Count
    previous: Hex64
    study: Hex64
    run: Hex64
    key: Hex64
    round: Count
    contributors: tuple[SignedWord, ...]
    reveals: tuple[Revealed, ...]
    opened_ms: Count
    closed_ms: Count
    masks: tuple[Hex64, ...] = ()
    witnessed: tuple[Witnessed, ...] = ()
    witnesses: tuple[Witness, ...] = ()


@dataclass(frozen=True)
class Record:
    """A record that the chain has checked.

    Attributes:
        header: its header.
        id: the journal head once it is appended: of an aggregate, SHA-256 over the head before and the digest of its
            ARRIVED, so that other signatures or times make no other head; of others, SHA-256 of the header.
        contributors: the headers of the envelopes in an aggregate's sum, by site name.
        arrived: digest of the ARRIVED that an aggregate's sites revealed for; else empty.
        checkpoint: the keyed adapter digest that a checkpoint's members agree on; else empty.
        amendment: header of the sealed key, for an amendment.
        members: the members after the record.
        rounds: how many the run has after the record.
        data: the record's bytes.
    """

    header: RecordHeader
    id: str
    contributors: tuple[EnvelopeHeader, ...]
    arrived: str
    checkpoint: str
    amendment: SealedKeyHeader | None
    members: Members
    rounds: int
    data: bytes

    @property
    def payload(self) -> bytes:
        """An aggregate's sum, an amendment's sealed key, a checkpoint's sealed adapter; else empty.

        A copy made when asked for: the server never looks into a sum, and one more of many sites would show.
        """
        return self.data[len(self.data) - self.header.size :]

    def ciphertexts(self, agreed: AgreedStudy) -> bytes:
        """An aggregate's sum as the study's key opens it: with pads, without everybody's mask."""
        if not self.header.masks:
            return self.payload
        lanes, first = agreed.layout(self.header.round).lanes, self.contributors[0]
        place = PadPlace(agreed.study.id, first.position, first.attempt, first.cohort)
        seeds = {
            entry.site: bytes.fromhex(mask) for entry, mask in zip(self.contributors, self.header.masks, strict=True)
        }
        total = unpack_residues(self.payload, lanes.modulus_bits)
        return pack_residues(without_masks(total, place, seeds, lanes.modulus), lanes.modulus_bits)

    @property
    def cohort(self) -> tuple[Contribution, ...]:
        """Who is in the sum, with which attempt and seed."""
        return tuple(header.contribution for header in self.contributors)


def sign_record(header: RecordHeader, payload: bytes, key: Ed25519PrivateKey) -> bytes:
    """The record's bytes, signed by the coordinator."""
    return sign_frame(MAGIC, header, key, payload)


class Chain:
    """How far a journal has come; checks that a record continues it.

    Attributes:
        length: records so far; the next one's ``seq``.
        head: id of the last record; zeros before genesis.
        run, key: ids that genesis named; an amendment changes the key.
        round: of the last aggregate; 0 before the first.
        amendment: number of the last amendment in force (none yet: 0).
        members: by name; amendments change them.
        rounds: how many the run has: the study's, unless an extension gave it more.
        amended_after: the last round before the last amendment or retirement; -1 before the first.
        changed_after: the same of the last with which a training site joined or left.
        retired: public signing keys of those who have retired in the run.
        authority: SHA-256 of the certificate of the authority that the last amendment of it named; None before one.
        awaits_checkpoint: whether the last record is an amendment, which nothing but its checkpoint follows, or the end
            of a run whose sites are lost.
        sum: id of the last aggregate; zeros before the first.
        ended: whether the last record is an end, which nothing follows.
        lost: whether it is one for want of sites.
        seeds: of the envelopes in the sums so far.
        ledgers: number and id of the newest privacy-ledger head of each site in them, of those that have one.
    """

    def __init__(self, agreed: AgreedStudy) -> None:
        self.agreed = agreed
        self.length = 0
        self.head = ZERO_DIGEST
        self.run = ZERO_DIGEST
        self.key = ZERO_DIGEST
        self.round = 0
        self.amendment = 0
        self.members: Members = {site.name: site for site in agreed.study.sites}
        self._quorum: tuple[Members, Quorum] | None = None
        self.rounds = agreed.study.rounds
        self.awaits_checkpoint = False
        self.sum = ZERO_DIGEST
        self.ended = False
        self.lost = False
        self.seeds: Seeds = {}
        self.ledgers: dict[str, tuple[int, str]] = {}
        self.amended_after = -1
        self.changed_after = -1
        self.retired: frozenset[str] = frozenset()
        self.authority: str | None = None

    @property
    def due(self) -> RoundPosition:
        """Position of the envelopes that are due."""
        return RoundPosition(self.run, self.head, self.key, self.amendment, self.round + 1)

    @property
    def wire(self) -> Wire:
        """Of the round that is due."""
        return wire(self.agreed.study.mode, self.agreed.layout(self.round + 1).lanes)

    @property
    def quorum(self) -> Quorum:
        """Whose words a round needs, with the members in force."""
        if self._quorum is None or self._quorum[0] is not self.members:  # asked for at every step, of each site
            self._quorum = self.members, self.agreed.study.quorum(self.members.values())
        return self._quorum[1]

    @property
    def finished(self) -> bool:
        """Whether no round is left: every one has its record, the run was ended, or is over for want of sites."""
        return self.ended or self.round >= self.rounds or self.short

    @property
    def short(self) -> bool:
        """Whether the run is over for want of sites: so many have retired that no quorum is left, which no later record
        can mend, or its coordinator has said so."""
        return self.lost or (self.length > 0 and self.round < self.rounds and self.quorum.away < 0)

    def refuse_short(self) -> None:
        """Say that the run is over for want of sites, if it is.

        Raises:
            NotEnoughSitesError: it is.
        """
        if self.short:
            why = "its coordinator ended it" if self.lost else f"{self.quorum.training} sites train any more"
            raise NotEnoughSitesError(
                f"the study is over after {self.round} of {self.rounds} rounds: {why}; expected at least the quorum, "
                f"{self.quorum.needed}, who can agree to a round; everybody keeps the adapter of the last one"
            )

    def check(self, data: bytes) -> Record:
        """Check a record's signature, its place in the chain, and its contributors. Changes nothing.

        Raises:
            LedgerRollbackError: a contributor's privacy ledger does not continue that of its last sum.
            RecordError: with what was found and expected.
        """
        frame, header = read_header(data, self.agreed)
        if header.seq != self.length or header.previous != self.head:
            raise RecordError(
                f"record {header.seq} after {header.previous[:16]}: the journal here has {self.length} records and "
                f"head {self.head[:16]}; expected record {self.length} after it"
            )
        if self.ended:
            raise RecordError(f"record {header.seq}: a {header.kind} after the end; expected nothing more of this run")
        if header.kind == "genesis":
            if self.length:
                raise RecordError(f"record {header.seq}: a second genesis; expected one only, at 0")
            if (header.key == ZERO_DIGEST) != (self.agreed.study.mode == "plain"):
                raise RecordError(f"genesis: key {header.key[:16]} does not fit mode {self.agreed.study.mode}")
        elif not self.length:
            raise RecordError(f"record 0 is of kind {header.kind}; expected genesis")
        elif header.run != self.run or (header.key != self.key and header.kind != "amendment"):
            raise RecordError(f"record {header.seq}: of another run or key; expected run {self.run[:16]}")
        # Those who would have to acknowledge an amendment can be lost as well.
        given_up = self.awaits_checkpoint and header.kind == "end" and frame.payload == LOST
        if self.awaits_checkpoint != (header.kind == "checkpoint") and not given_up:
            raise RecordError(
                f"record {header.seq}: a {header.kind}; a checkpoint follows an amendment and nothing else, unless its "
                "sites are lost"
            )
        if header.kind in ("genesis", "amendment") and header.contributors:
            raise RecordError(f"record {header.seq}: a {header.kind} with contributors; expected none")
        if header.kind == "end" and self.finished:
            raise RecordError(f"record {header.seq}: an end after the last round")
        between = ("void", "retired", "amendment", "checkpoint", "extension", "end")
        if header.kind in between and header.round != self.round + 1:
            raise RecordError(f"record {header.seq}: in force from round {header.round}, expected {self.round + 1}")
        contributors: tuple[EnvelopeHeader, ...] = ()
        identity, arrived = frame.digest, ""
        if header.kind == "aggregate":
            contributors, arrived = self._check_contributors(header)
            for entry in contributors:
                self.check_ledger(entry)
            identity = head_after(self.head, arrived)
        elif header.kind == "void":
            self._check_voids(header)
            identity = head_after_void(self.head)
        if header.kind != "aggregate" and (header.reveals or header.masks or header.witnessed or header.witnesses):
            raise RecordError(f"record {header.seq}: a {header.kind} with reveals; expected none")
        self.check_size(header.kind, header.size)
        check_payload(frame, header, RecordError)
        amendment, members = None, self.members
        if header.kind == "amendment":
            amendment, members = self._check_amendment(header, bytes(frame.payload))
        elif header.kind == "retired":
            members = self._check_retired(header)
        rounds = self._check_extension(header, bytes(frame.payload)) if header.kind == "extension" else self.rounds
        checkpoint = self._check_acknowledgements(header) if header.kind == "checkpoint" else ""
        if header.kind == "aggregate":
            self._check_sum(header, contributors, arrived, bytes(frame.payload))
        if header.kind == "end" and frame.payload not in (b"", LOST):
            raise RecordError(
                f"record {header.seq}: an end with {bytes(frame.payload)!r}; expected nothing, or {LOST!r}"
            )
        return Record(header, identity, contributors, arrived, checkpoint, amendment, members, rounds, data)

    def check_ledger(self, header: EnvelopeHeader) -> None:
        """Check that a site's privacy ledger continues that of its last sum: the server asks this of an envelope as
        sites do of a record, so that it never closes a round that they refuse.

        Raises:
            LedgerRollbackError: it does not.
        """
        check_continues(header.site, self.ledgers.get(header.site, (0, ZERO_DIGEST)), header.ledger)

    def after(self, record: Record) -> Chain:
        """The chain with a checked record; this one stays as it is."""
        chain = copy.copy(self)
        chain.advance(record)
        return chain

    def advance(self, record: Record) -> None:
        """Take a checked record into the chain."""
        header = record.header
        self.length += 1
        self.head = record.id
        self.run = header.run
        self.key = header.key
        changed = self.changed(record.members)
        if changed:
            self.changed_after = self.round
        if header.kind == "retired":
            self.retired |= {self.members[name].keys.signing for name in changed}
        self.members = record.members
        self.rounds = record.rounds
        self.awaits_checkpoint = header.kind == "amendment"
        self.ended = header.kind == "end"
        self.lost = self.ended and record.payload == LOST
        if header.kind == "aggregate":
            self.round = header.round
            self.sum = record.id
            # A new one: chains that come of one another share it.
            self.seeds = self.seeds | {(entry.site, entry.seed): entry.payload for entry in record.contributors}
            self.ledgers = self.ledgers | {
                entry.site: (entry.ledger_seq, entry.ledger_head) for entry in record.contributors if entry.ledger_seq
            }
        elif header.kind in ("amendment", "retired"):
            self.amendment += header.kind == "amendment"
            self.amended_after = self.round
        if record.amendment is not None and record.amendment.authority is not None:
            self.authority = record.amendment.authority

    def check_size(self, kind: Kind, size: int) -> None:
        """Check that the next record of a kind can have a payload of so many bytes.

        Raises:
            RecordError: it cannot.
        """
        if kind == "aggregate":
            expected = self.wire.payload_bytes
            if size != expected:
                raise RecordError(f"record {self.length}: a payload of {size} bytes, expected {expected}")
            return
        # A checkpoint is the float64 adapter with its names, and the moments beside it, sealed.
        tensors = aggregation.start(self.agreed)
        state = 8 * sum(value.size for value in tensors.values()) + 256 * (len(tensors) + 16)
        number = len(str(MOST_ROUNDS))
        most = {"amendment": MAX_SEALED, "checkpoint": state, "extension": number, "end": len(LOST)}.get(kind, 0)
        if size > most:
            raise RecordError(f"record {self.length}: a payload of {size} bytes, expected at most {most}")

    def _check_extension(self, header: RecordHeader, payload: bytes) -> int:
        """How many rounds the run has from now on."""
        what = f"record {header.seq}"
        if self.agreed.study.method.sums:
            raise RecordError(f"{what}: an extension of a study whose rounds are its method's; expected none")
        text = payload.decode("ascii", "replace")
        if not re.fullmatch(r"[1-9][0-9]*", text) or not self.rounds < int(text) <= MOST_ROUNDS:
            raise RecordError(f"{what}: an extension to {text!r} rounds; expected {self.rounds + 1} to {MOST_ROUNDS}")
        return int(text)

    def amended(self, sealed: bytes) -> tuple[SealedKeyHeader, Members]:
        """What a sealed key file says as the amendment that comes next, and the members after it.

        Raises:
            KeyFileError: it does not follow the key in force, or the members cannot change so.
        """
        header, members = check_amendment(sealed, self.agreed, self.members, self.key)
        back = sorted(site.name for site in header.added if site.keys.signing in self.retired)
        if back:
            raise KeyFileError(
                f"{', '.join(back)} cannot join: has retired in this run, and its word, which holds for the whole run, "
                "could be used again without it; expected a site under another identity"
            )
        return header, members

    def _check_amendment(self, header: RecordHeader, payload: bytes) -> tuple[SealedKeyHeader, Members]:
        try:
            sealed, members = self.amended(payload)
        except KeyFileError as error:
            raise RecordError(f"record {header.seq}: {error}") from None
        if sealed.key != header.key:
            raise RecordError(f"record {header.seq}: names key {header.key[:16]}, but brings {sealed.key[:16]}")
        self._refuse_two_changes(header, members)
        return sealed, members

    def _check_retired(self, header: RecordHeader) -> Members:
        """The members after one of them has retired, by its own word."""
        what = f"record {header.seq}"
        if len(header.contributors) != 1:
            raise RecordError(f"{what}: {len(header.contributors)} sites retire; expected one")
        try:
            name = check_retired(header.contributors[0], self.agreed, self.members, self.run).site
        except EnvelopeError as error:
            raise RecordError(f"{what}: {error}") from None
        members = self.members | {name: self.members[name].model_copy(update={"role": "observer"})}
        self._refuse_two_changes(header, members)
        return members

    def _refuse_two_changes(self, header: RecordHeader, members: Members) -> None:
        changed = self.changed(members)
        if not self.may_change(members):
            raise RecordError(
                f"record {header.seq}: {', '.join(changed)} would join, leave or change; expected at most one training "
                "site to do so between two rounds, so that two quorums share an honest one: one after the other"
            )

    def may_change(self, members: Members) -> bool:
        """Whether these can follow the members in force now: at most one training site changes between two rounds."""
        changed = self.changed(members)
        return not changed or (len(changed) == 1 and self.changed_after != self.round)

    def changed(self, members: Members) -> list[str]:
        """Who trains under other keys, or only before or after an amendment."""
        before, after = (
            {name: site for name, site in those.items() if site.role == "train"} for those in (self.members, members)
        )
        return sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))

    def _check_acknowledgements(self, header: RecordHeader) -> str:
        """The keyed adapter digest that all who acknowledged agree on, the key maker and enough others among them."""
        signed = [
            verify_acknowledgement(*entry.signed, self.agreed, self.members, self.run, self.head)
            for entry in header.contributors
        ]
        names = [entry.site for entry in signed]
        if names != sorted(set(names)):
            raise RecordError(f"record {header.seq}: acknowledged by {names}; expected each once, sorted by name")
        study = self.agreed.study
        needed = self.quorum.needed
        if sum(self.members[name].role == "train" for name in names) < needed or study.key_maker not in names:
            raise RecordError(
                f"record {header.seq}: acknowledged by {', '.join(names) or 'nobody'}; expected at least "
                f"{needed} training members, and {study.key_maker}"
            )
        if len({entry.checkpoint for entry in signed}) > 1:
            raise RecordError(f"record {header.seq}: the members acknowledge different adapters")
        maker = signed[names.index(study.key_maker)]
        if (maker.size, maker.payload) != (header.size, header.payload):
            raise RecordError(f"record {header.seq}: its payload is not the checkpoint that {study.key_maker} signed")
        return maker.checkpoint

    def _check_contributors(self, header: RecordHeader) -> tuple[tuple[EnvelopeHeader, ...], str]:
        """Headers of the envelopes in a sum, and the digest of the ARRIVED that follows from them."""
        what = f"record {header.seq}"
        if header.round != self.round + 1 or header.round > self.rounds:
            raise RecordError(f"{what}: aggregate of round {header.round}, expected {self.round + 1} of {self.rounds}")
        try:
            contributors = check_envelopes(header.contributors, self.agreed, self.members, self.due)
            for entry in contributors:
                refuse_repeated_seed(entry, self.seeds)
        except EnvelopeError as error:
            raise RecordError(f"{what}: {error}") from None
        refuse_cohort(tuple(entry.site for entry in contributors), self.quorum, what, RecordError)
        first, payload = contributors[0], (header.size, header.payload)
        arrived = arrived_header(self.agreed, self.due, first.attempt, first.cohort, payload, header.contributors)
        return contributors, arrived_digest(arrived)

    def _check_voids(self, header: RecordHeader) -> None:
        """A quorum's words for a void; no single word closes a round."""
        what = f"record {header.seq}"
        if self.finished:
            raise RecordError(f"{what}: a void after the last round")
        try:
            names = tuple(check_void(word, self.agreed, self.members, self.due).site for word in header.contributors)
        except EnvelopeError as error:
            raise RecordError(f"{what}: {error}") from None
        refuse_cohort(names, self.quorum, what, RecordError)

    def _check_sum(
        self, header: RecordHeader, contributors: Sequence[EnvelopeHeader], arrived: str, payload: bytes
    ) -> None:
        """Check that a sum is that of its contributors' envelopes, by their own words: without any key, and before
        anybody decrypts.

        Without pads every contributor must have revealed, since nobody else can speak for its envelope. With pads a
        quorum must, and a quorum of them can speak for another.
        """
        what = f"record {header.seq}"
        names, needed = [entry.site for entry in contributors], self.quorum.needed
        witnessed = [entry.site for entry in header.witnessed]
        revealed = [name for name in names if name not in witnessed]
        try:
            if witnessed != sorted(set(witnessed) & set(names)) or len(revealed) < needed:
                raise RecordError(
                    f"{what}: witnesses for {', '.join(witnessed)}; expected each once, of its contributors, of which "
                    f"at least {needed} revealed"
                )
            if len(header.reveals) != len(revealed):
                raise RecordError(
                    f"{what}: {len(header.reveals)} reveals; expected one of each of {', '.join(revealed)}"
                )
            masks = self._check_masks(header, contributors)
            said: dict[str, Revealed | Witnessed] = {entry.site: entry for entry in header.witnessed}
            for name, kept in zip(revealed, header.reveals, strict=True):
                word = reveal_word(self.agreed, arrived, name, kept, masks.get(name))
                check_reveal(word, self.agreed, self.members, arrived)
                said[name] = kept
            checks = {name: said[name].products for name in names}
            check_witnesses(header.witnesses, self.agreed, self.members, arrived, checks, witnessed, needed)
            found = self.wire.check_words(arrived, payload)
        except EnvelopeError as error:
            raise RecordError(f"{what}: {error}") from None
        if found != summed_checks(checks.values(), self.wire.modulus):
            raise RecordError(
                f"{what}: its sum is not that of the envelopes that its contributors sent (their linear check fails); "
                "nothing was decrypted; the server bent it: show the record to the other sites"
            )

    def _check_masks(self, header: RecordHeader, contributors: Sequence[EnvelopeHeader]) -> dict[str, str]:
        """The seed of each contributor's mask, which is what it committed to; nobody's in a study without pads."""
        expected = len(contributors) if self.agreed.study.pads else 0
        if len(header.masks) != expected or (header.witnessed and not expected):
            raise RecordError(f"record {header.seq}: {len(header.masks)} masks; expected {expected}")
        masks = {}
        for entry, mask in zip(contributors, header.masks, strict=False):
            assert entry.hidden is not None  # of a study with pads
            if commitment(bytes.fromhex(mask), entry.site) != entry.hidden.mask:
                raise RecordError(f"record {header.seq}: another mask of {entry.site} than its envelope names")
            masks[entry.site] = mask
        return masks


def summed_checks(checks: Iterable[tuple[int, int]], modulus: int) -> tuple[int, int]:
    """The linear check of a sum, from those of its envelopes."""
    first, second = zip(*checks, strict=True)
    return sum(first) % modulus, sum(second) % modulus


def head_after(head: str, arrived: str) -> str:
    """The journal head after an aggregate: SHA-256 of a label, the head before and the digest of its ARRIVED."""
    return hashlib.sha256(b"secfacmic head 1" + bytes.fromhex(head) + bytes.fromhex(arrived)).hexdigest()


def head_after_void(head: str) -> str:
    """The journal head after a void: SHA-256 of a label and the head before, whoever signed it."""
    return hashlib.sha256(b"secfacmic void 1" + bytes.fromhex(head)).hexdigest()


def read_header(data: bytes, agreed: AgreedStudy) -> tuple[Frame, RecordHeader]:
    """Take a record apart and check version, signature and study, but not its place in a chain.

    Raises:
        RecordError: with what was found and expected.
    """
    frame = split_frame(MAGIC, data, max_header(agreed), RecordError)
    verify_signature(MAGIC, frame.header, frame.signature, agreed.study.coordinator, RecordError)
    header = parse_header(frame.header, RecordHeader, RecordError)
    if header.study != agreed.study.id:
        raise RecordError(
            f"record {header.seq}: of study {header.study}, but the study here is {agreed.study.id}; "
            "a study never changes after its genesis: restore study.toml, or start anew in another folder"
        )
    return frame, header


def replaceable(kinds: Sequence[Kind]) -> int | None:
    """Which record a void can still take the place of: the last sum, until a checkpoint follows it.

    What else follows a sum (an extension, an end, a site that retires, an amendment that nobody has acknowledged, a
    void of the next round) binds nobody to it: the server alone or one site may have put it there, or sites which have
    revealed nothing since. It goes with the sum. A checkpoint has the words of a quorum, which give none for that void
    any more.

    Args:
        kinds: of a run's records, in order.
    """
    for seq in reversed(range(len(kinds))):
        if kinds[seq] == "aggregate":
            return seq
        if kinds[seq] == "checkpoint":
            return None
    return None


class RecordFolder:
    """The records of one run on disk, one file each, so that a file is whole or absent.

    Args:
        path: the folder; made if missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        make_folder(path)

    def append(self, record: Record) -> None:
        """Store a checked record durably.

        Raises:
            StorageError: it cannot be written; the folder is as it was.
        """
        write_durable(self.file(record.header.seq), record.data)

    def drop_from(self, first: int) -> None:
        """Take the records from that number on away, the last one first; durable when this returns."""
        for number in reversed(self._numbers()):
            if number >= first:
                self.file(number).unlink(missing_ok=True)
        sync_folder(self.path)

    def drop_replaced(self, agreed: AgreedStudy) -> None:
        """Take away what followed a sum before a void was written over it, after a crash in between.

        Raises:
            RecordError: a record does not verify.
        """
        following = ZERO_DIGEST
        for number in reversed(self._numbers()):
            _, header = read_header(self.read(number), agreed)
            if header.kind == "void" and following not in (ZERO_DIGEST, head_after_void(header.previous)):
                self.drop_from(number + 1)
            if header.kind in ("aggregate", "checkpoint"):
                return
            following = header.previous

    def _numbers(self) -> list[int]:
        return sorted(int(path.stem) for path in self.path.iterdir() if re.fullmatch(r"\d{8}\.record", path.name))

    def file(self, seq: int) -> Path:
        """Where the record of that number lies."""
        return record_file(self.path, seq)

    def read(self, seq: int) -> bytes:
        """A record's bytes, unchecked.

        Raises:
            StorageError: it cannot be read.
        """
        try:
            return self.file(seq).read_bytes()
        except OSError as error:
            raise StorageError(
                f"{self.file(seq)}: cannot be read ({error.strerror}); restore it from another site's copy"
            ) from error

    def replay(self, chain: Chain) -> Iterator[Record]:
        """Check and yield all records in order, advancing the chain.

        Raises:
            RecordError: a record does not verify, or one in the middle is missing.
        """
        numbers = self._numbers()
        if numbers != list(range(len(numbers))):
            raise RecordError(f"{self.path}: records {numbers}; expected all from 0 on; restore the missing ones")
        for number in numbers:
            try:
                record = chain.check(self.read(number))
            except RecordError as error:
                raise RecordError(f"{self.file(number)}: {error}") from None
            chain.advance(record)
            yield record


def new_header(
    chain: Chain,
    kind: Kind,
    *,
    run: str,
    key: str,
    round_number: int,
    contributors: tuple[SignedWord, ...],
    reveals: tuple[Revealed, ...] = (),
    masks: tuple[str, ...] = (),
    witnessed: tuple[Witnessed, ...] = (),
    witnesses: tuple[Witness, ...] = (),
    times_ms: tuple[int, int],
    payload: bytes,
) -> RecordHeader:
    """The header of the record that would continue a chain."""
    return RecordHeader(
        version=2,
        kind=kind,
        seq=chain.length,
        previous=chain.head,
        study=chain.agreed.study.id,
        run=run,
        key=key,
        round=round_number,
        contributors=contributors,
        reveals=reveals,
        opened_ms=times_ms[0],
        closed_ms=times_ms[1],
        masks=masks,
        witnessed=witnessed,
        witnesses=witnesses,
        **payload_fields(payload),
    )

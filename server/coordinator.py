"""One round at the server: collect envelopes, add ciphertexts that it cannot open, append the record.

Knows nothing of Flower, and holds no key but the one it signs with. Memory does not grow with the number of sites:
envelopes are spooled to disk until their round's record is durable, and added into one running sum.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import secrets
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from secure_fed.core.errors import (
    EnvelopeError,
    KeyFileError,
    LedgerRollbackError,
    NotEnoughSitesError,
    ProtocolError,
    RecordError,
    StorageError,
    StudyError,
)
from secure_fed.core.layout import ServerState, kept_round, site_envelope
from secure_fed.core.storage import make_folder, write_durable
from secure_fed.protocol.envelope import (
    MAGIC,
    MAX_HEADER,
    Envelope,
    EnvelopeHeader,
    Seeds,
    check_position,
    open_envelope,
    refuse_repeated_seed,
    verify_contribution,
)
from secure_fed.protocol.journal import JournalEntry
from secure_fed.protocol.ledger_heads import LedgerHeads
from secure_fed.protocol.packing import Wire
from secure_fed.protocol.pads import commitment, refuse_copied_keys
from secure_fed.protocol.records import summed_checks
from secure_fed.protocol.round_frames import (
    ARRIVED_MAGIC,
    READY_MAGIC,
    RETIRED_MAGIC,
    REVEAL_MAGIC,
    ReadyHeader,
    Revealed,
    RevealHeader,
    SignedWord,
    arrived_digest,
    arrived_header,
    check_arrived,
    check_cohort,
    check_ready,
    check_retired,
    check_reveal,
    fresh_keys,
    sign_cohort,
    split_word,
)
from secure_fed.protocol.rounds import PAGE_BYTES, ReplyCode, RoundReply, RoundRequest
from secure_fed.protocol.sealed_key import Members
from secure_fed.protocol.share_frames import (
    CHECKED_MAGIC,
    WITNESS_MAGIC,
    at_places,
    check_checked,
    check_digest,
    check_witness,
    checks_digest,
    refuse_unchecked,
    sign_check,
    sign_gone,
)
from secure_fed.protocol.signing import check_payload, parse_header, public_hex, sign_frame, split_frame
from secure_fed.protocol.study import AgreedStudy
from secure_fed.server.acknowledgements import Acknowledgements
from secure_fed.server.journal import Journal, now_ms
from secure_fed.server.orders import Orders, store_amendment
from secure_fed.server.shares import Shares, StandIn
from secure_fed.server.spool import (
    ARRIVED,
    CHECKED,
    COHORT,
    REVEAL_OF,
    SHARES_OF,
    Spool,
    attempts,
    envelope_start,
    erase_other_rounds,
    erase_round,
    keep_revealed,
    keep_told,
    revealed_to,
    told,
)
from secure_fed.server.voids import Voids

log = logging.getLogger(__name__)


MOST_ANEW = 100
"""Attempts of a round that are begun because sites know of later ones."""


class Step(StrEnum):
    """What a round waits for."""

    READY = "ready"
    ENVELOPE = "envelope"
    CHECKED = "checked"
    REVEAL = "reveal"
    ACKNOWLEDGED = "acknowledged"


@dataclass(frozen=True)
class _Question:
    """A signed frame of the server's, whom it is for, its digest, the envelopes that it names, if any, and what goes
    with it."""

    data: bytes
    names: tuple[str, ...]
    digest: str
    envelopes: tuple[SignedWord, ...] = ()
    carried: bytes = b""


class Coordinator:
    """One run of a study at the server.

    Args:
        agreed: the study.
        folder: the server's state folder; holds one folder a run, and the name of the current one.
        key: the coordinator's signing key, whose public half the study names.
        keep_envelopes: where to keep the envelopes of every sum, so that anyone who holds them can recompute it
            (``RUN/ROUND/SITE.envelope``); None erases them once their sum is durable.

    Raises:
        StudyError: the signing key is not the study's, or no run was ever begun.
        RecordError: the journal does not verify.

    Attributes:
        run: the run's id, 64 hex digits.
        attempt: of the current round; a new one asks the sites for their stored integers anew.
    """

    def __init__(
        self, agreed: AgreedStudy, folder: Path, key: Ed25519PrivateKey, keep_envelopes: Path | None = None
    ) -> None:
        if public_hex(key) != agreed.study.coordinator:
            raise StudyError(
                f"the signing key's public half is {public_hex(key)}; the study names {agreed.study.coordinator}; "
                "start the server with the key that study new made"
            )
        state = ServerState(folder)
        run = state.current_run
        if run is None:
            raise StudyError(f"{folder}: no run has begun; begin one with a key's id")
        self.run = run
        self._agreed = agreed
        self._key = key
        self._folder = state.run(run)
        self._orders = Orders(self._folder)
        self._keep_envelopes = keep_envelopes
        self.journal = Journal(agreed, self._folder.journal, key)
        if not self.journal.records:
            raise RecordError(f"{self._folder.path}: no genesis; the run was not begun whole: begin a new one")
        self._attestations: dict[str, dict[str, str]] = {}
        self._anew: int
        self._begun: bool
        self._cohort: _Question | None
        self._check: _Question | None
        self._arrived: _Question | None
        self._heads = LedgerHeads(state.ledger_heads)
        self._retiring: dict[str, SignedWord] = {}
        self._stale = b""  # the amendment that people were told cannot take force
        self._open_round()
        self._take_spool()

    @classmethod
    def begin(
        cls,
        agreed: AgreedStudy,
        folder: Path,
        key: Ed25519PrivateKey,
        key_id: str,
        keep_envelopes: Path | None = None,
        run: str | None = None,
    ) -> Coordinator:
        """Begin a new run with a genesis that names it and the key.

        Args:
            agreed: as for the class.
            folder: as for the class.
            key: as for the class.
            key_id: of the study's key, zeros in ``plain`` mode.
            keep_envelopes: as for the class.
            run: its id, of a simulation only; random if not given. What sites draw follows from it.
        """
        run = run or secrets.token_hex(32)
        state = ServerState(folder)
        state.begin()
        Journal(agreed, state.run(run).journal, key).append_genesis(run, key_id)
        # Named only when its genesis is durable, so that a crash in between leaves the old run current.
        state.enter_run(run)
        return cls(agreed, folder, key, keep_envelopes)

    @property
    def round(self) -> int:
        """The round that is due, from 1; one more than the study's rounds when it is finished."""
        return self.journal.chain.round + 1

    @property
    def finished(self) -> bool:
        """Whether no round is left, nor any wanted."""
        return self.journal.chain.finished and not self.extending

    @property
    def told_the_end(self) -> frozenset[str]:
        """Who has been told that the run ends with the journal's head, before this server was started too."""
        return told(self._folder, self.journal.chain.head)

    def keep_told(self, names: Sequence[str]) -> None:
        """Keep who has been told.

        Raises:
            StorageError: it cannot be written.
        """
        if set(names) != self.told_the_end:
            keep_told(self._folder, self.journal.chain.head, names)

    @property
    def resting(self) -> bool:
        """Whether the coordinator's people let no round begin; one that has a cohort goes on."""
        if self._cohort is not None or self.journal.chain.awaits_checkpoint:
            return False
        return self._orders.paused or self.in_lobby

    @property
    def before_the_first(self) -> bool:
        """Whether nothing was asked of anybody's data yet, so that who is ready can be seen without haste."""
        return len(self.journal.records) == 1 and not self._begun

    @property
    def in_lobby(self) -> bool:
        """Whether the first round waits until all are ready."""
        return self.before_the_first and self._orders.lobby

    def hold_in_lobby(self, held: bool) -> None:
        """Let the first round wait until all are ready, or no longer.

        Raises:
            StorageError: it cannot be written.
        """
        self._orders.hold_in_lobby(held and self.before_the_first)

    @property
    def rounds(self) -> list[JournalEntry]:
        """The aggregates so far, in order."""
        return [entry for entry in self.journal.records if entry.header.kind == "aggregate"]

    def request(self, site: str, run: str, position: int) -> RoundRequest:
        """What to send to a site: the records that it lacks, and what the round asks of it now, if anything.

        Args:
            site: its name.
            run: the run the site says it is in.
            position: how many of its records the site says it has; ignored when it is in another run.
        """
        start = min(position, len(self.journal.records)) if run == self.run else 0
        records: list[bytes] = []
        total = 0
        for seq in range(start, len(self.journal.records)):
            total += self.journal.records[seq].size
            if records and total > PAGE_BYTES:
                break
            records.append(self.journal.read(seq))
        head = self._attested_head()
        # Before the sum is fixed, also one whose envelope is in: whether it still stands by it.
        asked = site in self.asked or (self.step in (Step.ENVELOPE, Step.CHECKED) and site in self.sites_in)
        held = None if self._pads else self._held.get(site)
        question, carried = self._question(site) if asked else (b"", b"")
        # Once a head: who is asked for more than an envelope was told with the cohort, when all of it had attested.
        told = self._cohort is not None and question not in (b"", self._cohort.data)
        return RoundRequest(
            round=self.round,
            attempt=self.attempt if asked else 0,
            question=question,
            held="" if held is None else held[0],
            past=self._past(site),
            carried=carried,
            records=tuple(records),
            more=start + len(records) < len(self.journal.records),
            after=self.journal.records[start - 1].id if start else "",
            attested_head=head,
            attestations={} if told else dict(self._attestations.get(head, {})),
        )

    def _question(self, site: str) -> tuple[bytes, bytes]:
        """What a site is asked now, and what goes with it; nothing before a cohort is chosen."""
        if self._cohort is None:
            return b"", b""
        if site not in self._envelopes or (self._arrived is None and self._check is None):
            return self._cohort.data, b""
        if self._arrived is None:
            assert self._check is not None
            return self._check.data, self._shares.for_site(site)
        gone = self._shares.lacking(site) if site in self._reveals else None
        if gone is None:
            return self._arrived.data, self._arrived.carried
        due, digest = self.journal.chain.due, self._arrived.digest
        question = sign_gone(self._agreed, due, self.attempt, digest, gone, self._key)
        return question, self._shares.handed(gone, site) + self._payload(gone)

    def _payload(self, site: str) -> bytes:
        """A site's residues in this attempt, from the spool.

        Raises:
            StorageError: they are not what came: whose check does not fit them may be honest.
        """
        data = self._spool.envelope(site)[-self._wire.payload_bytes :]
        if hashlib.sha256(data).hexdigest() != self._envelopes[site].header.payload:
            raise StorageError(
                f"{site_envelope(self._spool.folder, site)}: damaged since it came; expected it unchanged: look after "
                "this computer's disk, and start the server again, which asks for it again"
            )
        return data

    def _past(self, site: str) -> bytes:
        """The newest word of a site in the open round, as it signed it."""
        if site in self._reveals:
            return self._spool.frame(REVEAL_OF + site) or b""
        held = self._held.get(site)
        if held is None:
            return b""
        data = envelope_start(held[1])
        with contextlib.suppress(EnvelopeError):
            return data[: len(data) - len(split_frame(MAGIC, data, MAX_HEADER, EnvelopeError).payload)]
        return b""  # damaged: it is asked for again

    def receive(self, reply: RoundReply) -> None:
        """Take a site's reply: its attestation, and its envelope if it has one.

        Raises:
            EnvelopeError: the envelope is refused; the state is as it was.
            ProtocolError: the reply is of no member, or claims more records than there are.
        """
        members = self.journal.chain.members
        if reply.site not in members:
            raise ProtocolError(f"a reply of {reply.site!r}; expected one of {', '.join(sorted(members))}")
        if reply.run != self.run or not 0 < reply.position <= len(self.journal.records):
            raise ProtocolError(
                f"{reply.site} is at record {reply.position} of run {reply.run[:16]}; the journal has "
                f"{len(self.journal.records)} records of run {self.run[:16]}"
            )
        head = self.journal.records[reply.position - 1].id
        if reply.attestation:
            self._attestations.setdefault(head, {})[reply.site] = reply.attestation
        for old in list(self._attestations)[:-2]:
            del self._attestations[old]
        if reply.code == ReplyCode.READY:
            self._take_ready(reply.envelope, reply.site)
        elif reply.code == ReplyCode.UPDATE:
            self._accept(reply.envelope, reply.site, reply.carried)
        elif reply.code == ReplyCode.CHECKED:
            self._take_checked(reply.envelope, reply.site)
        elif reply.code == ReplyCode.WITNESSED:
            self._take_witness(reply.envelope, reply.site, reply.carried)
        elif reply.code == ReplyCode.REVEALED:
            self._take_reveal(reply.envelope, reply.site)
        elif reply.code == ReplyCode.VOID:
            self._voids.take(reply.envelope, reply.site)
            self._readies.pop(reply.site, None)
        elif reply.code == ReplyCode.RETIRED:
            self._take_retired(reply.envelope, reply.site)
        elif reply.code == ReplyCode.ACKNOWLEDGED:
            if self.journal.chain.awaits_checkpoint:
                self._acknowledged.take(reply.envelope, reply.site, self.journal.chain)
        elif reply.code == ReplyCode.SITS_OUT and head == self.journal.chain.head:
            self._readies.pop(reply.site, None)
            self._left_out.add(reply.site)
        elif reply.code == ReplyCode.REFUSED_AGGREGATE and head == self.journal.chain.head:
            self._refusing.add(reply.site)
            if self.paused:
                keep_revealed(self._folder, self.journal.chain.sum, ())

    # --- the round ---

    @property
    def step(self) -> Step:
        """What the round waits for."""
        if self.journal.chain.awaits_checkpoint:
            return Step.ACKNOWLEDGED
        if self._cohort is None:
            return Step.READY
        if self._arrived is None:
            return Step.ENVELOPE if self._check is None else Step.CHECKED
        return Step.REVEAL

    @property
    def asked(self) -> frozenset[str]:
        """Whom the step still waits for: those that are asked and have not answered."""
        if self.finished:
            return frozenset()
        if self.resting:
            return frozenset()
        if self._cohort is None or self.journal.chain.awaits_checkpoint:
            training = {name for name, member in self.journal.chain.members.items() if member.role == "train"}
            return frozenset(training - set(self.sites_in) - self._left_out - self.voiding - set(self._retiring))
        waiting = frozenset(self._cohort.names) - set(self.sites_in)
        if self._arrived is not None:
            waiting -= self._shares.stand_ins.keys()
            waiting |= {site for site in self.sites_in if self._shares.lacking(site) is not None}
        return waiting - self.voiding

    @property
    def sites_in(self) -> tuple[str, ...]:
        """Who has answered what the step asks, by name: sites that are ready, whose envelope came, or that revealed."""
        if self.journal.chain.awaits_checkpoint:
            return tuple(sorted(self._acknowledged.frames))
        if self._cohort is None:
            return tuple(sorted(self._readies))
        if self._arrived is None:
            return tuple(sorted(self._envelopes if self._check is None else self._shares.answered))
        return tuple(sorted(set(self._reveals) & set(self._envelopes)))

    @property
    def left_out(self) -> frozenset[str]:
        """Who is not asked any more in this round: gone in an attempt that failed, or put back to an older state."""
        return frozenset(self._left_out)

    @property
    def voiding(self) -> frozenset[str]:
        """Whose people have given the open round up, or that of the last sum, on which they reveal nothing then."""
        return self._voids.sites

    @property
    def leaving(self) -> frozenset[str]:
        """Whose people, in the cohort, have given the round up: they reveal nothing in it, so that its sum is not fixed
        with them."""
        return frozenset() if self._cohort is None else self.voiding & set(self._cohort.names)

    @property
    def given_up(self) -> bool:
        """Whether those of the open round, or of the last sum's, are a quorum: then it begins anew."""
        return (self._voids.complete and not self.finished) or self._voids.late_complete

    @property
    def paused(self) -> bool:
        """Whether so many say that the last sum is out of range that an honest one is among them, and no amendment
        waits that would let the study go on."""
        needed = self.journal.chain.quorum
        training = {name for name in self._refusing if self.journal.chain.members[name].role == "train"}
        return len(training) > needed.faulty and self._waiting_amendment() is None

    @property
    def against_key_maker(self) -> list[str]:
        """Who agrees on another adapter than the key maker acknowledges an amendment with, if that is the odd one."""
        chain = self.journal.chain
        return self._acknowledged.against_maker(chain) if chain.awaits_checkpoint else []

    @property
    def ending(self) -> bool:
        """Whether the coordinator's people have ended the run; a round that has a cohort is closed before."""
        return not self.finished and self._orders.end

    @property
    def ends_now(self) -> bool:
        """Whether it ends with the next step: also within a round, or before an amendment's checkpoint, if sites that
        these need are lost for ever."""
        if not self.ending:
            return False
        return self._orders.lost or (self._cohort is None and not self.journal.chain.awaits_checkpoint)

    @property
    def extending(self) -> bool:
        """Whether the coordinator's people want more rounds than the run has."""
        chain = self.journal.chain
        return not chain.ended and not chain.short and self._orders.rounds > chain.rounds

    @property
    def extends_now(self) -> bool:
        """Whether they get them with the next step: not within a round that has had a cohort."""
        return self.extending and not self._begun and not self.journal.chain.awaits_checkpoint

    @property
    def refusing(self) -> tuple[str, ...]:
        """Who says that the last sum is out of range."""
        return tuple(sorted(self._refusing))

    def advance(self) -> JournalEntry | None:
        """Take the step that is due with those who are in, if they are enough; the record, if one was appended.

        READY: a quorum becomes the cohort, or, before any cohort of the round, lets a waiting amendment in. ENVELOPE:
        once all of the cohort's are in, their sum is fixed; with pads, after all have answered for their shares
        (CHECKED). REVEAL: once all of the cohort have revealed, or others have spoken for them, the record is appended
        and the spool erased. A step that is not complete changes nothing.
        """
        if self.given_up:
            return self._give_up()
        if self.finished:
            return None
        chain, needed = self.journal.chain, self.journal.chain.quorum.needed
        if self.ends_now:
            self.journal.append_end(self._orders.lost)
            self._open_round()
            return self.journal.records[-1]
        if chain.awaits_checkpoint:
            return self._close_amendment()
        if self.extends_now:
            self.journal.append_extension(self._orders.rounds)
            self._head_moved()
            return self.journal.records[-1]
        if self.resting:
            return None
        if self._cohort is None:
            if self._retiring and not self._begun:
                if chain.changed_after < chain.round:
                    return self._retire()
                # The next may retire after a sum only, for which those who stay are too few.
                if chain.quorum.training - len(self._retiring) < needed:
                    return self._end_for_want_of_sites()
            waiting = self._waiting_amendment()
            enough = len(set(self._readies) | self._refusing) >= needed
            if waiting is not None and not self._begun and enough and self._may_amend(waiting):
                self.journal.append_amendment(waiting)
                if self.journal.chain.authority != chain.authority:
                    log.warning(
                        "authority %s is in force: sites that have the amendment speak to no server of another; unless "
                        "this one was started with it already, start it again with its files",
                        self.journal.chain.authority,
                    )
                self._acknowledged = Acknowledgements(self._agreed)
                self._head_moved()
                self._refusing.clear()
                return self.journal.records[-1]
            if len(self._readies) >= needed:
                self._choose()
            return None
        if set(self._envelopes) != set(self._cohort.names):
            return None
        if self._arrived is None and self.leaving:
            return None
        if self._arrived is None:
            if self._deals and not self._all_checked():
                return None
            self._fix_sum()
            return None
        if self._reveals.keys() | self._shares.stand_ins.keys() != set(self._cohort.names) or not self._checks_hold():
            return None
        return self._append()

    def fail(self, gone: Collection[str]) -> bool:
        """Give an attempt up and begin another without those who are gone, for the rest of the round.

        Possible, and free, until the sum is fixed: nobody has revealed anything, and who sent an envelope need not send
        its bytes again. After that the round waits.

        Returns:
            Whether it was given up; not if too few would be left, or the sum is fixed. With nobody gone all are asked
            for their READYs anew, which carry what their people have said since, and nobody is left out.
        """
        if self._cohort is None or self._arrived is not None or self._fixed:
            return False
        if len(set(self._cohort.names) - set(gone)) < self.journal.chain.quorum.needed:
            return False
        self._left_out |= set(gone)
        self._next_attempt()
        return True

    def ask_anew(self) -> bool:
        """Begin another attempt before this one has a cohort, while fewer than a quorum are ready: a server that was
        put back to an older state asks for attempts that sites have left behind, and none of them goes back.

        Returns:
            Whether it was begun; not for ever, since sites that have revealed answer no other attempt at all.
        """
        few = len(self._readies) < self.journal.chain.quorum.needed
        if self._cohort is not None or self.journal.chain.awaits_checkpoint or not few or self._anew >= MOST_ANEW:
            return False
        self._anew += 1
        self._begun = True  # as those who refuse know
        self._next_attempt()
        return True

    def recover(self, gone: Collection[str]) -> bool:
        """Let those who have revealed speak for some that are gone after the sum was fixed: with pads a dropout costs
        no update then.

        Returns:
            Whether anybody is asked that was not before; not without pads, nor while fewer than a quorum have revealed.
        """
        if self._arrived is None or self._cohort is None or not self._deals:
            return False
        new = (set(gone) & set(self._cohort.names) & self._envelopes.keys()) - set(self.sites_in)
        new -= self._shares.gone.keys()
        if not new or len(self.sites_in) < self.journal.chain.quorum.needed:
            return False
        for name in sorted(new):
            self._stand_in(name)
        return True

    def _stand_in(self, name: str, seed: str = "") -> None:
        hidden = self._envelopes[name].header.hidden
        assert hidden is not None
        self._shares.gone[name] = StandIn(name, hidden.mask, self._true_check(name), seed)

    def _all_checked(self) -> bool:
        """Whether everybody has a good share of everybody. Once all have answered, a complaint costs the attempt: the
        next one is without the site that is in more of them, at a tie without the one that dealt."""
        assert self._cohort is not None
        if self._check is None:
            self._ask_check()
            return False
        if self._shares.answered != set(self._cohort.names):
            return False
        if not self._shares.complaints:
            return True
        for site, makers in self._shares.complaints.items():
            for maker in makers:
                for name, more in ((maker, 1.5), (site, 1.0)):
                    self._complaints[name] = self._complaints.get(name, 0) + more
        odd = max(sorted(self._complaints.keys() & set(self._cohort.names)), key=lambda name: self._complaints[name])
        log.error("round %d: another attempt, without %s, for complaints over shares", self.round, odd)
        self.fail([odd])
        return False

    def _ask_check(self) -> None:
        """CHECK: everybody is handed its shares."""
        assert self._cohort is not None
        words = self._words()
        where = self._agreed, self.journal.chain.due, self.attempt, self._cohort.digest, words
        self._check = _Question(sign_check(*where, self._key), self._cohort.names, check_digest(*where), words)

    def _words(self) -> tuple[SignedWord, ...]:
        """The cohort's envelopes' headers, as they signed them."""
        assert self._cohort is not None
        return tuple(SignedWord.of(self._envelopes[name].header_text, self._envelopes[name].signature)
                     for name in self._cohort.names)  # fmt: skip

    def _choose(self) -> None:
        """COHORT: who is ready takes part.

        But where some may have revealed at this adapter already, they refuse any other cohort than they revealed to,
        unless the people of all of it let them. So the same cohort is taken again if it is there and its sum was not
        out of range, which it would be again; else those whose people have said so, where they are a quorum, so that
        whose have not hold nobody up.
        """
        names = set(self._readies)
        again = revealed_to(self._folder, self.journal.chain.sum)
        headers = [parse_header(word.signed[0], ReadyHeader, EnvelopeError) for word in self._readies.values()]
        released = {header.site for header in headers if header.released}
        if again is not None and released != names:
            if again and again <= names:
                names = set(again)
            elif len(released) >= self.journal.chain.quorum.needed:
                names = released
        chosen = [self._readies[name] for name in sorted(names)]
        data = sign_cohort(self._agreed, self.journal.chain.due, self.attempt, chosen, self._key)
        self._spool.begin()
        self._spool.keep(COHORT, data)
        self._set_cohort(self._read_cohort(data))

    def _read_cohort(self, data: bytes) -> _Question:
        chain = self.journal.chain
        _, names, digest = check_cohort(data, self._agreed, chain.members, chain.due, chain.quorum)
        return _Question(data, names, digest)

    def _set_cohort(self, cohort: _Question) -> None:
        self._cohort = cohort
        self._shares = Shares(cohort.names, self.journal.chain.quorum.needed)
        self._begun = True

    def _fix_sum(self) -> None:
        """ARRIVED: these envelopes, and this sum of them."""
        assert self._cohort is not None
        checked = b"".join(self._shares.checked[name].signed[1] for name in self._cohort.names if self._shares.checked)
        if checked:
            self._spool.keep(CHECKED, checked)
        self._arrived = replace(self._sum_that_came(), carried=checked)
        self._take_reveals()

    def _sum_that_came(self) -> _Question:
        """ARRIVED of the envelopes that are in: of the same ones, whenever it is made, the same bytes."""
        assert self._cohort is not None
        payload, words = self._sum(), self._words()
        facts = len(payload), hashlib.sha256(payload).hexdigest()
        due, cohort = self.journal.chain.due, self._cohort.digest
        header = arrived_header(self._agreed, due, self.attempt, cohort, facts, words)
        data = sign_frame(ARRIVED_MAGIC, header, self._key, b"")
        self._spool.keep(ARRIVED, data)
        return _Question(data, self._cohort.names, arrived_digest(header), words)

    def _read_arrived(self, data: bytes) -> _Question:
        chain = self.journal.chain
        header, found, digest = check_arrived(data, self._agreed, chain.members, chain.due)
        return _Question(data, tuple(entry.site for entry in found), digest, header.envelopes)

    def _sum(self) -> bytes:
        return self._wire.record(self._total, len(self._envelopes))

    def _checks_hold(self) -> bool:
        """Whether the cohort's checks add up to the sum's; if not, whose is wrong is found, named and kept.

        Each is held against the sender's own envelope: bytes and a word that it signed, so that it can be shown to
        whoever may see them.

        Raises:
            StorageError: nobody's is wrong, or what came is damaged here.
        """
        assert self._arrived is not None
        digest = self._arrived.digest
        stand_ins = {name: one.check for name, one in self._shares.stand_ins.items()}
        checks = stand_ins | {name: kept.products for name, kept in self._reveals.items()}
        if self._wire.check_words(digest, self._sum()) == summed_checks(checks.values(), self._wire.modulus):
            return True
        wrong = [name for name in sorted(self._reveals) if not self._fits(name)]
        if not wrong:
            raise StorageError(
                f"round {self.round}: each check fits its envelope, and they do not add up to the sum here; expected "
                "it: this computer's memory is damaged; start the server again, elsewhere if it comes back"
            )
        return False

    def _fits(self, name: str) -> bool:
        """Whether a site's REVEAL is its envelope's check; a wrong one is named, and others are to speak for it."""
        if self._reveals[name].products == self._true_check(name):
            return True
        log.error(
            "%s: its REVEAL of round %d is wrong: it does not fit the envelope that it signed; both are kept "
            "in %s; the round waits for its right one, or for people",
            *(name, self.round, self._spool.folder),
        )
        del self._reveals[name]
        self._shares.take_no_word_of(name)
        if self._deals:
            self._stand_in(name, self._masks[name])
        return False

    def _true_check(self, name: str) -> tuple[int, int]:
        """Of a site's envelope as it came; no REVEAL that says otherwise is taken from then on."""
        assert self._arrived is not None
        if name not in self._true_checks:
            self._true_checks[name] = self._wire.check_words(self._arrived.digest, self._payload(name))
        return self._true_checks[name]

    def _append(self) -> JournalEntry:
        assert self._cohort is not None
        envelopes = [self._envelopes[name] for name in self._cohort.names]
        self._keep(self._cohort.names)
        reveals = [self._reveals[name] for name in self._cohort.names if name in self._reveals]
        others = [name for name in self._cohort.names if name not in self._reveals]
        seeds = {name: self._shares.gone[name].seed for name in others} | self._masks
        masks = [seeds[name] for name in self._cohort.names] if self._pads else []
        witnessed = [self._shares.witnessed(name) for name in others]
        witnesses = self._shares.witnesses(others)
        self.journal.append_aggregate(envelopes, reveals, self._sum(), self._opened_ms, masks, witnessed, witnesses)
        self._open_round()
        return self.journal.records[-1]

    def _take_ready(self, data: bytes, site: str) -> None:
        if self._cohort is not None or self.journal.chain.awaits_checkpoint or self.finished:
            return  # too late for this attempt
        if site in self.voiding:
            return
        word = split_word(READY_MAGIC, data)
        chain = self.journal.chain
        header = check_ready(word, self._agreed, chain.members, chain.due, self.attempt)
        if header.site != site:
            raise EnvelopeError(f"a READY of {header.site} in a reply of {site}")
        if header.fresh is not None:
            others = fresh_keys(
                parse_header(one.signed[0], ReadyHeader, EnvelopeError)
                for name, one in self._readies.items()
                if name != site
            )
            refuse_copied_keys(others | {site: header.fresh})
        self._readies[site] = word

    def _take_reveal(self, data: bytes, site: str) -> None:
        if self._arrived is None or site not in self._arrived.names:
            return  # of a round that is over
        word = split_word(REVEAL_MAGIC, data)
        header = check_reveal(word, self._agreed, self.journal.chain.members, self._arrived.digest)
        if header.site != site:
            raise EnvelopeError(f"a REVEAL of {header.site} in a reply of {site}")
        if header.products != self._true_checks.get(site, header.products):
            raise EnvelopeError(f"REVEAL of {site}: its check does not fit its envelope; it does not count")
        if header.mask is not None:
            self._check_mask(header)
        self._spool.keep(REVEAL_OF + site, data)
        self._reveals[site] = Revealed(*header.check, word.signature)
        self._shares.gone.pop(site, None)

    def _check_mask(self, header: RevealHeader) -> None:
        """Refuse a REVEAL of another mask than its envelope names."""
        assert self._arrived is not None
        place = self._arrived.names.index(header.site)
        envelope = parse_header(self._arrived.envelopes[place].signed[0], EnvelopeHeader, EnvelopeError)
        assert header.mask is not None
        assert envelope.hidden is not None
        if commitment(bytes.fromhex(header.mask), header.site) != envelope.hidden.mask:
            raise EnvelopeError(f"REVEAL of {header.site}: another mask than its envelope names; it does not count")
        self._masks[header.site] = header.mask

    def _take_checked(self, data: bytes, site: str) -> None:
        if self._check is None or self._arrived is not None or site not in self._check.names:
            return  # of an attempt that is over
        word = split_word(CHECKED_MAGIC, data)
        header = check_checked(word, self._agreed, self.journal.chain.members, self._check.digest)
        if header.site != site or not set(header.complaints) <= set(self._check.names) - {site}:
            raise EnvelopeError(f"a CHECKED of {header.site} over {', '.join(header.complaints)} in a reply of {site}")
        if header.complaints and self._fixed:
            raise EnvelopeError(f"CHECKED of {site}: complains of shares that it has answered for; it does not count")
        self._shares.answer(header, word)

    def _take_witness(self, data: bytes, site: str, share: bytes) -> None:
        if self._arrived is None or site not in self._reveals or not self._deals:
            return  # of a round that is over
        word = split_word(WITNESS_MAGIC, data)
        header = check_witness(word, self._agreed, self.journal.chain.members, self._arrived.digest)
        names = at_places(header.gone, self._arrived.names)
        if header.site != site or site in names:
            raise EnvelopeError(f"a WITNESS of {header.site} for {', '.join(names)} in a reply of {site}")
        if not set(names) <= self._envelopes.keys():
            raise EnvelopeError(
                f"WITNESS of {site} for {', '.join(names)}: one's envelope was damaged here, and is awaited"
            )
        if checks_digest(map(self._true_check, names)) != header.checks:
            raise EnvelopeError(
                f"WITNESS of {site} for {', '.join(names)}: its checks do not fit the envelopes; it does not count"
            )
        for name in names:  # a record has no room for a wrong REVEAL of one that others have spoken for
            if name in self._reveals:
                self._fits(name)
        self._shares.witness(site, names, word.signature, share)

    def _give_up(self) -> JournalEntry:
        """The void of what was begun of the round. Its spool goes first: nothing but the void can follow then.

        Or of the last sum, where its record and these words crossed: the void counts.
        """
        self._keep_revealed()
        erase_round(self._folder, self.round)
        if self._voids.append():
            self._retiring.clear()  # asked again at the new head
        self._open_round()
        return self.journal.records[-1]

    def _keep_revealed(self) -> None:
        """Keep for whose sum sites may have revealed at the adapter at which the round begins anew."""
        if self._voids.late_complete:
            assert self.journal.before is not None
            names = next(entry.sites for entry in reversed(self.journal.records) if entry.header.kind == "aggregate")
            keep_revealed(self._folder, self.journal.before.sum, names)
        elif self._arrived is not None:
            keep_revealed(self._folder, self.journal.chain.sum, self._arrived.names)

    def _may_amend(self, sealed: bytes) -> bool:
        """Whether an amendment can take force now; else it waits for a sum to come between two changes of members."""
        chain = self.journal.chain
        return chain.may_change(chain.amended(sealed)[1])

    def _take_retired(self, data: bytes, site: str) -> None:
        word = split_word(RETIRED_MAGIC, data)
        header = check_retired(word, self._agreed, self.journal.chain.members, self.run)
        if header.site != site:
            raise EnvelopeError(f"a retirement of {header.site} in a reply of {site}")
        self._retiring[site] = word

    def _retire(self) -> JournalEntry:
        """Between two rounds: one that has asked for it trains no more. In memory; after a restart it asks again."""
        name = min(self._retiring)
        self.journal.append_retired(self._retiring.pop(name))
        log.warning("%s trains no more, by its own word; it goes on as an observer", name)
        self._head_moved()
        self._refusing.clear()
        return self.journal.records[-1]

    def _end_for_want_of_sites(self) -> JournalEntry:
        log.error(
            "%s train no more either, by their own words, and the others are too few for the sum that would have to "
            "come before: the study is over",
            ", ".join(sorted(self._retiring)),
        )
        self._retiring.clear()
        self.journal.append_end(lost=True)
        self._open_round()
        return self.journal.records[-1]

    def _head_moved(self) -> None:
        """What sites have said of the round that is due was said at another head: they are asked again."""
        self._readies.clear()
        self._voids.given.clear()

    def _next_attempt(self) -> None:
        self._clear_attempt()
        self.attempt += 1
        self._spool.begin()

    def _clear_attempt(self) -> None:
        self._cohort = None
        self._check = None
        self._arrived = None
        self._fixed = False  # whether there is or was one, which may be damaged: somebody may have revealed for it
        self._shares = Shares()
        self._masks: dict[str, str] = {}
        self._true_checks: dict[str, tuple[int, int]] = {}  # of envelopes that were held against others' words
        self._readies: dict[str, SignedWord] = {}
        self._reveals: dict[str, Revealed] = {}
        self._clear_sum()

    def amend(self, sealed: bytes) -> None:
        """Leave an amendment for the next round to take force with; it survives a restart.

        Raises:
            KeyFileError: it does not follow the key in force, or the members cannot change so.
        """
        store_amendment(self._folder.path, self.journal.chain, sealed)

    def require_enough(self, able: int) -> None:
        """Refuse to wait for ever.

        Args:
            able: how many training sites can still send updates.

        Raises:
            NotEnoughSitesError: fewer than the quorum.
        """
        needed = self.journal.chain.quorum.needed
        if able < needed:
            raise NotEnoughSitesError(
                f"round {self.round}: {able} sites can still train; expected at least the quorum, {needed}; "
                f"the study ends here with {self.journal.chain.round} rounds"
            )

    def _open_round(self) -> None:
        self.attempt = 1
        self._acknowledged = Acknowledgements(self._agreed)
        self._opened_ms = now_ms()
        self._seeds: Seeds = {}  # of this round's envelopes, in all its attempts
        self._anew = 0
        self._begun = False  # whether a cohort of the round was sent out, after which its members are frozen
        self._left_out: set[str] = set()
        self._complaints: dict[str, float] = {}  # over shares, of all its attempts
        self._voids = Voids(self._agreed, self.journal)
        self._refusing: set[str] = set()
        self._held: dict[str, tuple[str, Path]] = {}
        self._clear_attempt()
        erase_other_rounds(self._folder, self.round)
        # One more than is promised: a site may be a record behind.
        for number in self._folder.shown_rounds():
            if number < self.round - 1 - self._agreed.study.keep_rounds:
                shutil.rmtree(self._folder.shown(number))

    def _waiting_amendment(self) -> bytes | None:
        """The amendment that follows the key in force, if one was left; not one that fits the members no more, as when
        another has retired since."""
        chain = self.journal.chain
        sealed = self._orders.amendment(chain.key)
        if sealed is None:
            return None
        try:
            chain.amended(sealed)
        except KeyFileError as error:
            if self._stale != sealed:
                log.error(
                    "the amendment that waits cannot take force any more, and the study goes on without it: %s; leave "
                    "another one: secfacmic keys rotate at the key maker, then study amend",
                    error,
                )
            self._stale = sealed
            return None
        return sealed

    def _close_amendment(self) -> JournalEntry | None:
        """CHECKPOINT: a quorum holds the key maker's adapter."""
        agreed = self._acknowledged.checkpoint(self.journal.chain)
        if agreed is None:
            return None
        self.journal.append_checkpoint(*agreed)
        self._acknowledged = Acknowledgements(self._agreed)
        self._next_attempt()
        return self.journal.records[-1]

    def _clear_sum(self) -> None:
        self._envelopes: dict[str, Envelope] = {}
        self._total = self._wire.zero()

    @property
    def _pads(self) -> bool:
        return self._agreed.study.pads

    @property
    def _deals(self) -> bool:
        """Whether there are shares, by which others can speak for one who is gone."""
        return self._pads and self._shares.deals

    @property
    def _wire(self) -> Wire:
        return self.journal.chain.wire

    @property
    def _spool(self) -> Spool:
        return Spool(self._folder, self.round, self.attempt)

    def _keep(self, names: Collection[str]) -> None:
        """Keep the round's envelopes before its record, so that there is no record without them."""
        if self._pads and self._agreed.study.keep_rounds:
            folder = self._folder.shown(self.round)
            make_folder(folder, 0o700)
            for site in names:
                write_durable(folder / self._envelopes[site].header.payload, self._payload(site), 0o600)
        if self._keep_envelopes is None:
            return
        folder = kept_round(self._keep_envelopes, self.run, self.round)
        make_folder(folder, 0o700)
        for site in names:
            write_durable(site_envelope(folder, site), self._spool.envelope(site), 0o600)

    def _take_spool(self) -> None:
        """After a restart: add what was accepted before. A damaged spool costs an attempt, never a wrong sum.

        Once the sum was fixed, somebody may have revealed, so that there is no other attempt: what is damaged follows
        from what is not, or is asked for again and is the same bytes then.
        """
        spools = attempts(self._folder, self.round)
        if not spools:
            return
        # Also where only a later attempt is left to go on with: sites have answered one before, as when the journal was
        # rebuilt.
        later = spools[-1].attempt > 1
        self._begun = later or any(spool.path(name).is_file() for spool in spools for name in (COHORT, ARRIVED))
        for spool in spools:
            for path in spool.envelopes():
                self._hold(path)
        self.attempt = spools[-1].attempt
        self._fixed = self._spool.path(ARRIVED).is_file()
        if not self._fixed and not self._spool.path(COHORT).is_file():
            return
        arrived = self._spool.whole(ARRIVED, self._read_arrived)
        cohort = self._spool.whole(COHORT, self._read_cohort) or (self._cohort_summed(arrived) if self._fixed else None)
        if cohort is None:
            self._tell_loss("all of its envelopes")
            self._next_attempt()
            return
        self._set_cohort(cohort)
        damaged = False
        for path in self._spool.envelopes():
            try:
                envelope = self._checked(path.read_bytes(), path.stem)
                self._take_shares(envelope, self._spool.frame(SHARES_OF + path.stem) or b"")
                self._count(envelope, self._wire.add(self._total, envelope.payload))
            except EnvelopeError as error:
                log.warning("%s: damaged, and asked for again (%s)", path, error)
                damaged = True
        if arrived is None and self._fixed and set(self._envelopes) == set(cohort.names):
            arrived = self._sum_that_came()
        if arrived is not None:
            self._take_arrived(arrived)
        elif damaged and not self._fixed:
            self._next_attempt()
        lacking = sorted(set(cohort.names) - self._envelopes.keys())
        if lacking and not cohort.data:
            self._tell_loss(f"the envelopes of {', '.join(lacking)}")

    def _tell_loss(self, what: str) -> None:
        if self._fixed:
            log.error(
                "%s: damaged, and %s, which cannot be asked for without it; sites that have revealed answer no other "
                "attempt of round %d: end the server and give it a site's copies (secfacmic journal rebuild), or let "
                "people give the round up (secfacmic site void)",
                *(self._spool.path(COHORT), what, self.round),
            )

    def _cohort_summed(self, arrived: _Question | None) -> _Question | None:
        """Whose envelopes were summed, where the COHORT is damaged: by their own words, which name it."""
        paths = self._spool.envelopes()
        words = () if arrived is None else tuple(word.signed for word in arrived.envelopes)
        names = tuple(path.stem for path in paths) if arrived is None else arrived.names
        for header, signature in words or filter(None, map(_signed_header, paths)):
            with contextlib.suppress(EnvelopeError):
                found = verify_contribution(header, signature, self._agreed, self.journal.chain.members)
                return _Question(b"", names, found.cohort)
        return None

    def _take_arrived(self, arrived: _Question) -> None:
        """Go on with the sum that was fixed, and with who has revealed for it; once more with CHECKED before, where the
        kept ones are damaged and those who have not revealed ask for them."""
        carried = self._spool.whole(CHECKED, partial(self._read_checked, arrived=arrived)) if self._deals else b""
        self._arrived = replace(arrived, carried=carried or b"")
        self._take_reveals()
        if carried is None and len(self._reveals) < self.journal.chain.quorum.needed:
            self._arrived = None
            self._reveals.clear()

    def _read_checked(self, data: bytes, arrived: _Question) -> bytes:
        """Everybody's word for its shares."""
        assert self._cohort is not None
        chain = self.journal.chain
        where = self._agreed, chain.due, self.attempt, self._cohort.digest, arrived.envelopes
        refuse_unchecked(data, self._agreed, chain.members, check_digest(*where), arrived.names)
        return data

    def _take_reveals(self) -> None:
        """What came for this ARRIVED before a restart."""
        assert self._arrived is not None
        for name in self._arrived.names:
            self._spool.whole(REVEAL_OF + name, partial(self._take_reveal, site=name))

    def _hold(self, path: Path) -> None:
        """Remember a payload that need not be sent again; a damaged one shows when it is used."""
        data = path.read_bytes()
        with contextlib.suppress(EnvelopeError):
            frame = split_frame(MAGIC, data, MAX_HEADER, EnvelopeError)
            header = parse_header(frame.header, EnvelopeHeader, EnvelopeError)
            check_payload(frame, header, EnvelopeError)
            self._held[path.stem] = header.payload, path
            self._keep_seed(header)

    def _take_shares(self, envelope: Envelope, entries: bytes) -> None:
        if envelope.header.hidden is not None:
            self._shares.take(envelope.header.site, entries, envelope.header.hidden.shares)

    def _accept(self, data: bytes, site: str, entries: bytes = b"") -> None:
        if self._cohort is None or site not in self._cohort.names:
            raise EnvelopeError(f"an envelope of {site}, which was not asked for one in attempt {self.attempt}")
        held = self._held.get(site)
        if held is not None and len(data) < self._wire.payload_bytes:
            data += held[1].read_bytes()[-self._wire.payload_bytes :]
        envelope = self._checked(data, site)
        known = self._envelopes.get(site)
        if known is not None:
            if (known.header_text, known.signature) != (envelope.header_text, envelope.signature):
                raise EnvelopeError(f"a second, different envelope of {site} for round {self.round}; the first counts")
            return
        self._take_shares(envelope, entries)
        # Checked and added in one pass; the sum in force is the old one until the envelope is durable.
        total = self._wire.add(self._total, envelope.payload)
        self._spool.begin()
        if entries:
            self._spool.keep(SHARES_OF + site, entries)
        # Before the spool: a restart must not take an envelope that it would not have taken again.
        self._heads.keep({site: envelope.header.ledger})
        path = self._spool.keep_envelope(site, data)
        self._count(envelope, total)
        self._held[site] = envelope.header.payload, path

    def _checked(self, data: bytes, site: str) -> Envelope:
        if self.finished:
            raise EnvelopeError(f"an envelope of {site}, but the study's {self.round - 1} rounds are over")
        envelope = open_envelope(data, *self._study_now())
        if envelope.header.site != site:
            raise EnvelopeError(f"an envelope of {envelope.header.site} in a reply of {site}")
        check_position(envelope.header, self.journal.chain.due)
        if envelope.header.attempt != self.attempt:
            raise EnvelopeError(f"envelope of {site}: attempt {envelope.header.attempt}, expected {self.attempt}")
        for seen in (self.journal.chain.seeds, self._seeds):
            refuse_repeated_seed(envelope.header, seen)
        assert self._cohort is not None  # else nobody is asked for one
        if envelope.header.cohort != self._cohort.digest:
            raise EnvelopeError(f"envelope of {site}: for another cohort than the one that was sent out")
        word = SignedWord.of(envelope.header_text, envelope.signature)
        if self._arrived is not None and word not in self._arrived.envelopes:
            raise EnvelopeError(f"envelope of {site}: another one than it sent before the sum was fixed")
        try:
            self.journal.chain.check_ledger(envelope.header)
            self._heads.check(site, envelope.header.ledger)
        except LedgerRollbackError as error:
            raise EnvelopeError(f"envelope of {error}") from None
        return envelope

    def _study_now(self) -> tuple[AgreedStudy, Members, int]:
        """What an envelope is checked against."""
        return self._agreed, self.journal.chain.members, self._wire.payload_bytes

    def _keep_seed(self, header: EnvelopeHeader) -> None:
        self._seeds[header.site, header.seed] = header.payload

    def _count(self, envelope: Envelope, total: npt.NDArray[np.generic]) -> None:
        """An envelope is in, and the total with it is the round's."""
        self._total = total
        self._keep_seed(envelope.header)
        # The payload stays in the spool; keeping it here would make memory grow with the sites.
        self._envelopes[envelope.header.site] = Envelope(
            envelope.header, envelope.header_text, envelope.signature, b"", envelope.size
        )

    def _attested_head(self) -> str:
        """The newest head at which sites attested; a pair that misses each other here meets in the next round."""
        return next(reversed(self._attestations), "")


def _signed_header(path: Path) -> tuple[bytes, bytes] | None:
    """The header of an envelope's file, and its signature; not verified. None if it is damaged beyond that."""
    with contextlib.suppress(EnvelopeError):
        frame = split_frame(MAGIC, envelope_start(path), MAX_HEADER, EnvelopeError)
        return frame.header, frame.signature
    return None


def paused_text(coordinator: Coordinator) -> str:
    """What people are told when a study pauses."""
    return (
        f"the sum of round {coordinator.round - 1} is out of range, say {', '.join(coordinator.refusing)}; its sites "
        "sent it so; expected updates within the study's bounds. Adapter, keys and budgets are as before; find the "
        "site that is broken or lies by other means, then remove it: secfacmic keys rotate --remove SITE, or let it "
        "leave by its own word: secfacmic site retire. A site without a budget then needs its people's word for the "
        "smaller cohort: secfacmic site release. Who has both sums can compute what the one that left had sent"
    )

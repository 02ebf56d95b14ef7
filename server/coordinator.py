"""One round at the server: collect envelopes, add ciphertexts that it cannot open, append the record.

Knows nothing of Flower, and holds no key but the one it signs with. Memory does not grow with the number of sites:
envelopes are spooled to disk until their round's record is durable, and added into one running sum.
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
from pathlib import Path

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from secure_fed.core.errors import (
    EnvelopeError,
    LedgerRollbackError,
    NotEnoughSitesError,
    ProtocolError,
    RecordError,
    StudyError,
)
from secure_fed.core.layout import ENVELOPES, ServerRun, ServerState, kept_round, numbered, site_envelope
from secure_fed.core.storage import make_folder, write_durable
from secure_fed.protocol.envelope import (
    Envelope,
    EnvelopeHeader,
    Seeds,
    check_position,
    open_envelope,
    refuse_repeated_seed,
)
from secure_fed.protocol.journal import JournalEntry
from secure_fed.protocol.ledger_heads import LedgerHeads
from secure_fed.protocol.packing import Wire
from secure_fed.protocol.records import Chain, RecordFolder
from secure_fed.protocol.rounds import PAGE_BYTES, ReplyCode, RoundReply, RoundRequest
from secure_fed.protocol.sealed_key import (
    ACKNOWLEDGEMENT_MAGIC,
    MAX_ACKNOWLEDGEMENT_HEADER,
    Members,
    check_amendment,
    verify_acknowledgement,
)
from secure_fed.protocol.signing import Frame, check_payload, public_hex, split_frame
from secure_fed.protocol.study import AgreedStudy
from secure_fed.server.journal import Journal, now_ms


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
        self._folder = state.run(run)
        self._keep_envelopes = keep_envelopes
        self.journal = Journal(agreed, self._folder.journal, key)
        if not self.journal.records:
            raise RecordError(f"{self._folder.path}: no genesis; the run was not begun whole: begin a new one")
        self._attestations: dict[str, dict[str, str]] = {}
        self._heads = LedgerHeads(state.ledger_heads)
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
        """Whether every round has its record."""
        return self.journal.chain.finished

    @property
    def sites_in(self) -> tuple[str, ...]:
        """Sites whose envelope for the current round was accepted, by name; those that acknowledged an amendment,
        while one awaits its checkpoint."""
        return tuple(sorted(self._acknowledged if self.journal.chain.awaits_checkpoint else self._envelopes))

    @property
    def rounds(self) -> list[JournalEntry]:
        """The aggregates so far, in order."""
        return [entry for entry in self.journal.records if entry.header.kind == "aggregate"]

    def request(self, run: str, position: int) -> RoundRequest:
        """What to send to a site.

        Args:
            run: the run the site says it is in.
            position: how many of its records the site says it has; ignored when it is in another run.
        """
        start = position if run == self.run else 0
        records: list[bytes] = []
        total = 0
        for seq in range(start, len(self.journal.records)):
            total += self.journal.records[seq].size
            if records and total > PAGE_BYTES:
                break
            records.append(self.journal.read(seq))
        head = self._attested_head()
        return RoundRequest(
            round=self.round,
            attempt=self.attempt,
            records=tuple(records),
            more=start + len(records) < len(self.journal.records),
            attested_head=head,
            attestations=dict(self._attestations.get(head, {})),
        )

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
        if reply.code == ReplyCode.UPDATE:
            self._accept(reply.envelope, reply.site)
        elif reply.code == ReplyCode.ACKNOWLEDGED:
            self._acknowledge(reply.envelope, reply.site)

    def close_round(self) -> JournalEntry | None:
        """Append the record that is due if enough sites are in; else change nothing and return None.

        That is the round's aggregate, after which the spooled envelopes are erased, since their sum is durable. If an
        amendment waits, it comes first: then the amendment, next its checkpoint, and then a new attempt of the round,
        for which the sites seal their stored integers under the new key.
        """
        if self.finished or len(self.sites_in) < self._agreed.study.min_sites:
            return None
        if self.journal.chain.awaits_checkpoint:
            return self._close_amendment()
        waiting = self._waiting_amendment()
        if waiting is not None:
            # Here, not earlier: who sent an envelope has accepted the last aggregate, which nobody can void any more.
            self.journal.append_amendment(waiting)
            self._acknowledged.clear()
            return self.journal.records[-1]
        envelopes = [self._envelopes[site] for site in self.sites_in]
        self._keep()
        self.journal.append_aggregate(envelopes, self._wire.record(self._total, len(envelopes)), self._opened_ms)
        self._open_round()
        return self.journal.records[-1]

    def amend(self, sealed: bytes) -> None:
        """Leave an amendment for the next round to take force with; it survives a restart.

        Raises:
            KeyFileError: it does not follow the key in force, or the members cannot change so.
        """
        store_amendment(self._agreed, self._folder.path, self.journal.chain, sealed)

    def void_round(self) -> None:
        """Withdraw the last aggregate, which sites refused. Its updates are lost.

        Raises:
            RecordError: the last record is no aggregate.
        """
        self.journal.append_void()
        self._open_round()

    def require_enough(self, able: int) -> None:
        """Refuse to wait for ever.

        Args:
            able: how many training sites can still send updates.

        Raises:
            NotEnoughSitesError: fewer than ``min_sites``.
        """
        if able < self._agreed.study.min_sites:
            raise NotEnoughSitesError(
                f"round {self.round}: {able} sites can still train; expected at least min_sites = "
                f"{self._agreed.study.min_sites}; the study ends here with {self.journal.chain.round} rounds"
            )

    def _open_round(self) -> None:
        self.attempt = 1
        self._acknowledged: dict[str, Frame] = {}
        self._opened_ms = now_ms()
        self._clear_sum()
        self._seeds: Seeds = {}  # of this round's envelopes, in all its attempts
        for folder in self._folder.spool.glob("*"):
            if folder.name != numbered(self.round):
                shutil.rmtree(folder)

    def _waiting_amendment(self) -> bytes | None:
        """The amendment that follows the key in force, if one was left."""
        path = self._folder.amendment(self.journal.chain.key)
        return path.read_bytes() if path.exists() else None

    def _acknowledge(self, data: bytes, site: str) -> None:
        """Keep an acknowledgement for the checkpoint. In memory: after a restart sites give it again."""
        chain = self.journal.chain
        if not chain.awaits_checkpoint:
            return
        try:
            frame = split_frame(ACKNOWLEDGEMENT_MAGIC, data, MAX_ACKNOWLEDGEMENT_HEADER, RecordError)
            header = verify_acknowledgement(
                frame.header, frame.signature, self._agreed, chain.members, self.run, chain.head
            )
            check_payload(frame, header, RecordError)
        except RecordError as error:
            raise ProtocolError(f"{site}: {error}") from None
        if header.site != site:
            raise ProtocolError(f"an acknowledgement of {header.site} in a reply of {site}")
        if site != self._agreed.study.key_maker:
            # Only the key maker's checkpoint counts; the others acknowledge its digest.
            frame = Frame(frame.magic, frame.header, frame.signature, memoryview(b""))
        self._acknowledged[site] = frame

    def _close_amendment(self) -> JournalEntry | None:
        maker = self._acknowledged.get(self._agreed.study.key_maker)
        if maker is None:
            return None
        frames = [self._acknowledged[site] for site in self.sites_in]
        self.journal.append_checkpoint(frames, bytes(maker.payload))
        self._acknowledged.clear()
        # The envelopes so far name the old head and key.
        self._clear_sum()
        self.attempt += 1
        make_folder(self._spool())
        return self.journal.records[-1]

    def _clear_sum(self) -> None:
        self._envelopes: dict[str, Envelope] = {}
        self._total = self._wire.zero()

    @property
    def _wire(self) -> Wire:
        return self.journal.chain.wire

    def _spool(self) -> Path:
        return self._folder.spooled(self.round, self.attempt)

    def _keep(self) -> None:
        """Keep the round's envelopes before its record, so that there is no record without them."""
        if self._keep_envelopes is None:
            return
        folder = kept_round(self._keep_envelopes, self.run, self.round)
        make_folder(folder, 0o700)
        for site in self.sites_in:
            write_durable(site_envelope(folder, site), site_envelope(self._spool(), site).read_bytes(), 0o600)

    def _take_spool(self) -> None:
        """After a restart: add what was accepted before. A damaged spool costs an attempt, never a wrong sum."""
        folder = self._folder.spooled_round(self.round)
        attempts = sorted(int(path.name) for path in folder.glob("*")) if folder.exists() else []
        if not attempts:
            return
        self.attempt = attempts[-1]
        for path in folder.glob(f"*/{ENVELOPES}"):
            with contextlib.suppress(EnvelopeError):
                self._keep_seed(open_envelope(path.read_bytes(), *self._study_now()).header)
        try:
            for path in sorted(self._spool().glob(ENVELOPES)):
                envelope = self._check(path.read_bytes(), path.stem)
                self._count(envelope, self._wire.add(self._total, envelope.payload))
        except EnvelopeError:
            self._clear_sum()
            self.attempt += 1
            make_folder(self._spool())

    def _accept(self, data: bytes, site: str) -> None:
        envelope = self._check(data, site)
        known = self._envelopes.get(site)
        if known is not None:
            if (known.header_text, known.signature) != (envelope.header_text, envelope.signature):
                raise EnvelopeError(f"a second, different envelope of {site} for round {self.round}; the first counts")
            return
        # Checked and added in one pass; the sum in force is the old one until the envelope is durable.
        total = self._wire.add(self._total, envelope.payload)
        make_folder(self._spool())
        # Before the spool: a restart must not take an envelope that it would not have taken again.
        self._heads.keep({site: envelope.header.ledger})
        write_durable(site_envelope(self._spool(), site), data, 0o600)
        self._count(envelope, total)

    def _check(self, data: bytes, site: str) -> Envelope:
        if self.finished:
            raise EnvelopeError(f"an envelope of {site}, but the study's {self.round - 1} rounds are over")
        envelope = open_envelope(data, *self._study_now())
        if envelope.header.site != site:
            raise EnvelopeError(f"an envelope of {envelope.header.site} in a reply of {site}")
        check_position(envelope.header, self.journal.chain.due)
        if envelope.header.attempt != self.attempt:
            raise EnvelopeError(f"envelope of {site}: attempt {envelope.header.attempt}, expected {self.attempt}")
        refuse_repeated_seed(envelope.header, self.journal.chain.seeds | self._seeds)
        try:
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


def store_amendment(agreed: AgreedStudy, run_folder: Path, chain: Chain, sealed: bytes) -> None:
    """Leave an amendment in a run's folder, where its coordinator finds it, running or not.

    Raises:
        KeyFileError: it does not follow the key in force, or the members cannot change so.
    """
    check_amendment(sealed, agreed, chain.members, chain.key)
    path = ServerRun(run_folder).amendment(chain.key)
    make_folder(path.parent)
    write_durable(path, sealed)


def amend_run(agreed: AgreedStudy, state: Path, sealed: bytes) -> int:
    """Leave an amendment for the current run, whether its coordinator is running or not.

    Args:
        agreed: the study.
        state: the server's state folder.
        sealed: a sealed key file that follows the key in force.

    Returns:
        The first round in which it can be in force; the next one, if that is being closed.

    Raises:
        StudyError: no run has begun.
        RecordError: the run's journal does not verify.
        KeyFileError: it does not follow the key in force, or the members cannot change so.
    """
    folder = ServerState(state)
    run = folder.current_run
    if run is None:
        raise StudyError(f"{state}: no run has begun; a key can be rotated only in a run")
    chain = Chain(agreed)
    for _ in RecordFolder(folder.run(run).journal).replay(chain):
        pass
    store_amendment(agreed, folder.run(run).path, chain, sealed)
    return chain.round + 1

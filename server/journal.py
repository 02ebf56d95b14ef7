"""The coordinator's journal: checked records, signed and appended one by one, never changed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from secure_fed.core.errors import KeyFileError, RecordError
from secure_fed.protocol.envelope import Envelope
from secure_fed.protocol.journal import JournalEntry
from secure_fed.protocol.records import LOST, Chain, Kind, Record, RecordFolder, new_header, sign_record
from secure_fed.protocol.round_frames import Revealed, SignedWord
from secure_fed.protocol.sealed_key import check_sealed_key
from secure_fed.protocol.share_frames import Witness, Witnessed
from secure_fed.protocol.signing import Frame
from secure_fed.protocol.study import AgreedStudy


def now_ms() -> int:
    """The clock, in milliseconds since 1970."""
    return time.time_ns() // 1_000_000


class Journal:
    """One run's journal in a folder; opening it verifies every record.

    Args:
        agreed: the study.
        folder: where the records lie.
        key: the coordinator's signing key.

    Raises:
        RecordError: a record does not verify: the folder was changed, or the study was.

    Attributes:
        chain: how far it has come.
        records: headers and sizes, in order; payloads stay on disk.
        before: the chain before the last sum, while a void can still take its place; else None.
    """

    def __init__(self, agreed: AgreedStudy, folder: Path, key: Ed25519PrivateKey) -> None:
        self._key = key
        self._folder = RecordFolder(folder)
        self.chain = Chain(agreed)
        self.before: Chain | None = None
        self.records: list[JournalEntry] = []
        self._read: tuple[JournalEntry, bytes] | None = None
        self._folder.drop_replaced(agreed)
        for record in list(self._folder.replay(Chain(agreed))):
            self._take(record)

    def append_genesis(self, run: str, key_id: str) -> None:
        """Open a run."""
        self._append("genesis", 0, run=run, key_id=key_id)

    def append_aggregate(
        self,
        envelopes: Sequence[Envelope],
        reveals: Sequence[Revealed],
        payload: bytes,
        opened_ms: int,
        masks: Sequence[str] = (),
        witnessed: Sequence[Witnessed] = (),
        witnesses: Sequence[Witness] = (),
    ) -> None:
        """Append one round's encrypted sum.

        Args:
            envelopes: those in the sum, by site name.
            reveals: their sites' REVEALs, in the same order, but for those witnessed.
            payload: the sum.
            opened_ms: when the round began.
            masks: with pads, the seeds of the sites' masks, in the same order.
            witnessed: with pads, the checks of those who have not revealed.
            witnesses: the words of others for these.
        """
        signed = [(envelope.header_text, envelope.signature) for envelope in envelopes]
        self._append(
            "aggregate",
            self.chain.round + 1,
            payload,
            signed,
            reveals,
            masks=masks,
            witnessed=witnessed,
            witnesses=witnesses,
            opened_ms=opened_ms,
        )

    def append_void(self, words: Sequence[SignedWord]) -> None:
        """Append the void of what was begun of a round, by a quorum's words for it, by site name.

        Raises:
            RecordError: they are too few, or of another round or head.
        """
        self._append("void", self.chain.round + 1, signed=[word.signed for word in words])

    def append_end(self, lost: bool = False) -> None:
        """Close the run before its last round.

        Args:
            lost: for want of sites.

        Raises:
            RecordError: it is over, or an amendment waits for its checkpoint, unless sites are lost.
        """
        self._append("end", self.chain.round + 1, LOST if lost else b"")

    def append_extension(self, rounds: int) -> None:
        """Let the run have so many rounds.

        Raises:
            RecordError: it was ended, has as many already, or cannot have more; or an amendment waits for its
                checkpoint.
        """
        self._append("extension", self.chain.round + 1, str(rounds).encode())

    def replace_sum(self, words: Sequence[SignedWord]) -> None:
        """Put a void in the place of the last sum, in one write: a quorum's words for it, by site name. What followed
        the sum goes with it.

        Raises:
            RecordError: they are too few, or of another round or head.
        """
        assert self.before is not None
        self.chain, self.before = self.before, None
        del self.records[self.chain.length :]
        self.append_void(words)
        self._folder.drop_from(self.chain.length)

    def append_retired(self, word: SignedWord) -> None:
        """Append that a site trains no more, by its own word.

        Raises:
            RecordError: it does not train, or another has joined or left since the last round.
        """
        self._append("retired", self.chain.round + 1, signed=[word.signed])

    def append_amendment(self, sealed: bytes) -> None:
        """Append a new sealed key, and with it a change of members.

        Raises:
            RecordError: it does not follow the key in force, or the members cannot change so.
        """
        try:
            header = check_sealed_key(sealed, self.chain.agreed)
        except KeyFileError as error:
            raise RecordError(f"amendment: {error}") from None
        self._append("amendment", self.chain.round + 1, sealed, key_id=header.key)

    def append_checkpoint(self, acknowledgements: Sequence[Frame], checkpoint: bytes) -> None:
        """Append what the members acknowledged the amendment with, and the key maker's checkpoint.

        Raises:
            RecordError: too few, without the key maker, or they hold different adapters.
        """
        signed = [(frame.header, frame.signature) for frame in acknowledgements]
        self._append("checkpoint", self.chain.round + 1, checkpoint, signed)

    def read(self, seq: int) -> bytes:
        """A record's bytes; those read last are held, since every site is sent the newest."""
        entry = self.records[seq]
        if self._read is None or self._read[0] is not entry:
            self._read = (entry, self._folder.read(seq))
        return self._read[1]

    def _append(
        self,
        kind: Kind,
        round_number: int,
        payload: bytes = b"",
        signed: Sequence[tuple[bytes, bytes]] = (),
        reveals: Sequence[Revealed] = (),
        *,
        masks: Sequence[str] = (),
        witnessed: Sequence[Witnessed] = (),
        witnesses: Sequence[Witness] = (),
        run: str | None = None,
        key_id: str | None = None,
        opened_ms: int | None = None,
    ) -> None:
        """Sign, check and store the next record; run, key and times are the chain's and now unless given."""
        now = now_ms()
        opened = now if opened_ms is None else opened_ms
        header = new_header(
            self.chain,
            kind,
            run=self.chain.run if run is None else run,
            key=self.chain.key if key_id is None else key_id,
            round_number=round_number,
            contributors=tuple(SignedWord.of(text, signature) for text, signature in signed),
            reveals=tuple(reveals),
            masks=tuple(masks),
            witnessed=tuple(witnessed),
            witnesses=tuple(witnesses),
            times_ms=(opened, max(opened, now)),
            payload=payload,
        )
        # Checked as a site would, so that nothing is published that sites must refuse.
        record = self.chain.check(sign_record(header, payload, self._key))
        self._folder.append(record)
        self._take(record)

    def _take(self, record: Record) -> None:
        if record.header.kind in ("aggregate", "checkpoint"):
            self.before = self.chain if record.header.kind == "aggregate" else None
        self.chain = self.chain.after(record)
        self.records.append(JournalEntry(record))

"""The coordinator's journal: checked records, signed and appended one by one, never changed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from secure_fed.envelope import Envelope
from secure_fed.errors import KeyFileError, RecordError
from secure_fed.records import Chain, Kind, Record, RecordFolder, SignedContribution, new_header, sign_record
from secure_fed.sealed_key import check_sealed_key
from secure_fed.signed import Frame
from secure_fed.study import AgreedStudy


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
    """

    def __init__(self, agreed: AgreedStudy, folder: Path, key: Ed25519PrivateKey) -> None:
        self._key = key
        self._folder = RecordFolder(folder)
        self.chain = Chain(agreed)
        self.records: list[JournalEntry] = [JournalEntry(record) for record in self._folder.replay(self.chain)]

    def append_genesis(self, run: str, key_id: str) -> None:
        """Open a run."""
        now = now_ms()
        self._append("genesis", run=run, key_id=key_id, round_number=0, signed=(), opened_ms=now, payload=b"")

    def append_aggregate(self, envelopes: Sequence[Envelope], payload: bytes, opened_ms: int) -> None:
        """Append one round's encrypted sum.

        Args:
            envelopes: those in the sum, by site name.
            payload: sum and seeds.
            opened_ms: when the round began.
        """
        chain = self.chain
        self._append(
            "aggregate",
            run=chain.run,
            key_id=chain.key,
            round_number=chain.round + 1,
            signed=[(envelope.header_text, envelope.signature) for envelope in envelopes],
            opened_ms=opened_ms,
            payload=payload,
        )

    def append_amendment(self, sealed: bytes) -> None:
        """Append a new sealed key, and with it a change of members.

        Raises:
            RecordError: it does not follow the key in force, or the members cannot change so.
        """
        chain = self.chain
        try:
            header = check_sealed_key(sealed, chain.agreed)
        except KeyFileError as error:
            raise RecordError(f"amendment: {error}") from None
        self._append(
            "amendment",
            run=chain.run,
            key_id=header.key,
            round_number=chain.round + 1,
            signed=(),
            opened_ms=now_ms(),
            payload=sealed,
        )

    def append_checkpoint(self, acknowledgements: Sequence[Frame], checkpoint: bytes) -> None:
        """Append what the members acknowledged the amendment with, and the key maker's checkpoint.

        Raises:
            RecordError: too few, without the key maker, or they hold different adapters.
        """
        chain = self.chain
        self._append(
            "checkpoint",
            run=chain.run,
            key_id=chain.key,
            round_number=chain.round + 1,
            signed=[(frame.header, frame.signature) for frame in acknowledgements],
            opened_ms=now_ms(),
            payload=checkpoint,
        )

    def append_void(self) -> None:
        """Withdraw the last record, an aggregate that sites refused.

        Raises:
            RecordError: the last record is no aggregate.
        """
        chain = self.chain
        self._append(
            "void",
            run=chain.run,
            key_id=chain.key,
            round_number=chain.round,
            signed=(),
            opened_ms=now_ms(),
            payload=b"",
        )

    def read(self, seq: int) -> bytes:
        """A record's bytes."""
        return self._folder.read(seq)

    def _append(
        self,
        kind: Kind,
        *,
        run: str,
        key_id: str,
        round_number: int,
        signed: Sequence[tuple[bytes, bytes]],
        opened_ms: int,
        payload: bytes,
    ) -> None:
        header = new_header(
            self.chain,
            kind,
            run=run,
            key=key_id,
            round_number=round_number,
            contributors=tuple(
                SignedContribution(header=text.decode("ascii"), signature=signature.hex()) for text, signature in signed
            ),
            times_ms=(opened_ms, max(opened_ms, now_ms())),
            payload=payload,
        )
        # Checked as a site would, so that nothing is published that sites must refuse.
        record = self.chain.check(sign_record(header, payload, self._key))
        self._folder.append(record)
        self.chain.advance(record)
        self.records.append(JournalEntry(record))


class JournalEntry:
    """What the server keeps of a record in memory: its header, id and sizes, not its payload.

    Attributes:
        header: the record's header.
        id: the record's id, the journal head after it.
        sites: the contributors.
        bytes_up: size of their envelopes as sent, summed.
        size: size of the record.
    """

    def __init__(self, record: Record) -> None:
        self.header = record.header
        self.id = record.id
        self.sites = tuple(contributor.site for contributor in record.contributors)
        # An envelope is magic, length, header, signature and payload.
        self.bytes_up = sum(
            8 + len(entry.header) + len(entry.signature) // 2 + contributor.size
            # A checkpoint has acknowledgements in their place, which are no contributors.
            for entry, contributor in zip(record.header.contributors, record.contributors, strict=False)
        )
        self.size = len(record.data)

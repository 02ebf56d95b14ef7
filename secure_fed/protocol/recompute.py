"""Adding the envelopes of a journal's sums again.

Nothing here decrypts. A record's contributors signed the digests of their envelopes, so that whoever holds the
envelopes can add them again; the sum of a record is right exactly if the bytes come out the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from secure_fed.core.errors import EnvelopeError, RecordError
from secure_fed.core.layout import ENVELOPES
from secure_fed.protocol.envelope import MAGIC, MAX_HEADER
from secure_fed.protocol.journal import RunFolder, verify_run
from secure_fed.protocol.packing import wire
from secure_fed.protocol.round_frames import SignedWord
from secure_fed.protocol.signing import SIGNATURE_BYTES, split_frame
from secure_fed.protocol.study import AgreedStudy


@dataclass(frozen=True)
class Recomputed:
    """What became of one aggregate when it was added again.

    Attributes:
        seq, round: of its record.
        missing: contributors whose envelopes are not there; then nothing was added.
        same: whether the sum came out bit for bit, and each check; false while envelopes are missing.
        odd: contributors whose linear check in the record is not that of their envelope.
    """

    seq: int
    round: int
    missing: tuple[str, ...]
    same: bool
    odd: tuple[str, ...] = ()


class Payloads(Protocol):
    """Where the envelopes of sums come from."""

    def payload(self, contribution: SignedWord, size: int, digest: str) -> bytes | None:
        """The payload that a contributor signed, None if it is not to be had whole."""


class EnvelopeStore:
    """Envelopes in a folder tree, found by what their sites signed, whatever the files are called.

    Args:
        folder: searched with all below it for ``*.envelope``. Only headers are held in memory.

    Raises:
        RecordError: there is no such folder.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise RecordError(f"{folder}: no folder; expected the one given to server --keep-envelopes")
        self._paths: dict[bytes, Path] = {}
        for path in sorted(folder.rglob(ENVELOPES)):
            with path.open("rb") as stream:
                start = stream.read(8 + MAX_HEADER + SIGNATURE_BYTES)
            try:
                frame = split_frame(MAGIC, start, MAX_HEADER, EnvelopeError)
            except EnvelopeError:
                continue  # no envelope, so nobody's contribution
            self._paths.setdefault(_mark(frame.header, frame.signature), path)

    def payload(self, contribution: SignedWord, size: int, digest: str) -> bytes | None:
        """The payload that a contributor signed, None if no file here holds it whole."""
        text, signature = contribution.signed
        path = self._paths.get(_mark(text, signature))
        if path is None:
            return None
        start = 8 + len(text) + SIGNATURE_BYTES
        if path.stat().st_size != start + size:
            return None
        with path.open("rb") as stream:
            stream.seek(start)
            payload = stream.read(size)
        return payload if hashlib.sha256(payload).hexdigest() == digest else None


def _mark(header: bytes, signature: bytes) -> bytes:
    return hashlib.sha256(header + signature).digest()


def recompute(run: RunFolder, agreed: AgreedStudy, store: Payloads, first: int = 0) -> Iterator[Recomputed]:
    """Add every aggregate's envelopes again and compare with its record, bit for bit.

    The journal itself is verified on the way: with pads also that each mask in a record is the one that its site
    committed to. Each site's linear check, revealed by itself or witnessed, is held against its envelope, too. One
    envelope and one sum are in memory at a time.

    Args:
        run: the journal.
        agreed: the study.
        store: the envelopes.
        first: the round from which on sums are added again.

    Raises:
        RecordError: the journal does not verify.
    """
    for record in verify_run(run, agreed):
        if record.header.kind != "aggregate" or record.header.round < first:
            continue
        sums = wire(agreed.study.mode, agreed.layout(record.header.round).lanes)
        witnessed = {entry.site: entry.products for entry in record.header.witnessed}
        revealed = [entry.site for entry in record.contributors if entry.site not in witnessed]
        kept = zip(revealed, record.header.reveals, strict=True)
        checks = witnessed | {site: reveal.products for site, reveal in kept}
        total, missing, odd = sums.zero(), [], []
        for contribution, header in zip(record.header.contributors, record.contributors, strict=True):
            payload = store.payload(contribution, header.size, header.payload)
            if payload is None:
                missing.append(header.site)
                continue
            try:
                total = sums.add(total, payload)
                if sums.check_words(record.arrived, payload) != checks[header.site]:
                    odd.append(header.site)
            except EnvelopeError as error:
                raise RecordError(
                    f"record {record.header.seq}: the envelope of {header.site} is in the sum, but {error}; "
                    "the coordinator had to refuse it"
                ) from None
        same = not missing and not odd and sums.record(total, len(record.contributors)) == record.payload
        yield Recomputed(record.header.seq, record.header.round, tuple(missing), same, tuple(odd))


def refuse_forged(results: Sequence[Recomputed]) -> None:
    """Check that no aggregate came out different.

    Raises:
        RecordError: with the records that differ.
    """
    wrong = [result.seq for result in results if not result.same and not result.missing]
    odd = sorted({site for result in results for site in result.odd})
    if wrong:
        told = f" the checks of {', '.join(odd)} do not fit their envelopes: they sent them so;" if odd else ""
        raise RecordError(
            f"records {wrong}: not the sum of the envelopes that their contributors signed;{told} expected the same "
            "bytes: the coordinator garbled or forged them, or let them be; show journal and envelopes to the sites"
        )


def refuse_differences(results: Sequence[Recomputed], envelopes: Path) -> None:
    """Check that every aggregate was added again and came out the same.

    Args:
        results: of :func:`recompute`.
        envelopes: the folder in which envelopes were looked for.

    Raises:
        RecordError: with the records that differ; else with those whose envelopes are missing.
    """
    refuse_forged(results)
    absent = [result.seq for result in results if result.missing]
    if absent or not results:
        raise RecordError(
            f"records {absent}: envelopes are missing or damaged in {envelopes}; expected those of every contributor; "
            f"{len(results) - len(absent)} of {len(results)} aggregates could be added again"
        )

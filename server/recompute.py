"""What anyone can do with a journal and no key: read it, recompute its sums, and give a lost server its journal back.

Nothing here decrypts. A record's contributors signed the digests of their envelopes, so that whoever holds the
envelopes can add them again; the sum of a record is right exactly if the bytes come out the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from secure_fed.core.errors import EnvelopeError, RecordError, StorageError
from secure_fed.core.storage import exclusive, make_folder, write_durable
from secure_fed.protocol.envelope import MAGIC as ENVELOPE_MAGIC
from secure_fed.protocol.envelope import MAX_HEADER, EnvelopeHeader
from secure_fed.protocol.packing import wire
from secure_fed.protocol.records import Chain, Record, RecordFolder, SignedContribution, read_header
from secure_fed.protocol.signing import SIGNATURE_BYTES, check_payload, parse_header, split_frame
from secure_fed.protocol.study import AgreedStudy

ENVELOPES: Final = "*.envelope"
"""Names of kept and spooled envelopes."""


@dataclass(frozen=True)
class RunFolder:
    """One run's journal on a disk.

    Attributes:
        journal: folder of the records.
        folder: the run's folder; the journal's own if the records lie bare.
        current: whether the state folder it was found in names this run as its present one.
    """

    journal: Path
    folder: Path
    current: bool


@dataclass(frozen=True)
class Recomputed:
    """What became of one aggregate when it was added again.

    Attributes:
        seq, round: of its record.
        missing: contributors whose envelopes are not there; then nothing was added.
        same: whether the sum came out bit for bit; false while envelopes are missing.
    """

    seq: int
    round: int
    missing: tuple[str, ...]
    same: bool


def find_runs(folder: Path) -> list[RunFolder]:
    """The journals in a server's or a site's state folder, a run's folder, or a folder of records.

    Raises:
        RecordError: there is none.
    """
    if any(folder.glob("*.record")):
        return [RunFolder(folder, folder, True)]
    if (folder / "journal").is_dir():
        return [RunFolder(folder / "journal", folder, True)]
    name = folder / "run"
    current = name.read_text(encoding="ascii", errors="replace").strip() if name.is_file() else None
    runs = [
        RunFolder(path / "journal", path, path.name == current)
        for path in sorted((folder / "runs").glob("*"))
        if (path / "journal").is_dir()
    ]
    if current is not None and not any(run.current for run in runs):
        raise RecordError(
            f"{folder}: its current run is {current[:16]}, but runs/{current[:16]}... has no journal; "
            "expected one: restore the folder, or use secfacmic journal rebuild"
        )
    if not runs:
        raise RecordError(
            f"{folder}: no journal; expected a server's or a site's state folder, a run's folder, "
            "or a folder of records"
        )
    return runs


def verify_run(run: RunFolder, agreed: AgreedStudy) -> Iterator[Record]:
    """Check every record of a run: signatures, chain, contributors, payloads; and at a site its pins and evidence.

    Raises:
        RecordError: with the first record that does not hold, or evidence that the coordinator signed two records
            for one place.
    """
    chain = Chain(agreed)
    for record in RecordFolder(run.journal).replay(chain):
        pin = run.folder / "pins" / f"{record.header.round:08d}"
        if record.header.kind == "aggregate" and pin.is_file():
            found = hashlib.sha256(record.data).hexdigest()
            if pin.read_bytes() != found.encode():
                raise RecordError(
                    f"{pin}: pins another aggregate of round {record.header.round} than record "
                    f"{record.header.seq} ({found[:16]}); the journal here was changed: compare with the other sites"
                )
        yield record
    if not chain.length:
        raise RecordError(f"{run.journal}: no records; expected at least a genesis")
    _refuse_evidence(run, agreed, chain)


def _refuse_evidence(run: RunFolder, agreed: AgreedStudy, chain: Chain) -> None:
    """A site keeps a second record that the coordinator signed; that the journal verifies does not undo it."""
    for path in sorted((run.folder / "evidence").glob("*.record")):
        data = path.read_bytes()
        _, header = read_header(data, agreed)
        known = RecordFolder(run.journal).file(header.seq)
        if header.run == chain.run and known.exists() and known.read_bytes() != data:
            raise RecordError(
                f"{path}: the coordinator signed this and {known} as record {header.seq} of run {chain.run[:16]}; "
                "expected one record: show both files to the other sites"
            )


class EnvelopeStore:
    """Envelopes in a folder tree, found by what their sites signed, whatever the files are called.

    Args:
        folder: searched with all below it for ``*.envelope``. Only headers are held in memory.
    """

    def __init__(self, folder: Path) -> None:
        self._paths: dict[bytes, Path] = {}
        for path in sorted(folder.rglob(ENVELOPES)):
            with path.open("rb") as stream:
                start = stream.read(8 + MAX_HEADER + SIGNATURE_BYTES)
            try:
                frame = split_frame(ENVELOPE_MAGIC, start, MAX_HEADER, EnvelopeError)
            except EnvelopeError:
                continue  # no envelope, so nobody's contribution
            self._paths.setdefault(_mark(frame.header, frame.signature), path)

    def payload(self, contribution: SignedContribution, size: int, digest: str) -> bytes | None:
        """The payload that a contributor signed, None if no file here holds it whole."""
        text, signature = contribution.header.encode(), bytes.fromhex(contribution.signature)
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


def recompute(run: RunFolder, agreed: AgreedStudy, store: EnvelopeStore) -> Iterator[Recomputed]:
    """Add every aggregate's envelopes again and compare with its record, bit for bit.

    The journal itself is verified on the way. One envelope and one sum are in memory at a time.

    Raises:
        RecordError: the journal does not verify.
    """
    sums = wire(agreed.study.mode, agreed.lanes)
    for record in verify_run(run, agreed):
        if record.header.kind != "aggregate":
            continue
        total, tails, missing = sums.zero(), [], []
        for contribution, header in zip(record.header.contributors, record.contributors, strict=True):
            payload = store.payload(contribution, header.size, header.payload)
            if payload is None:
                missing.append(header.site)
                continue
            try:
                sums.add(total, payload)
                tails.append(sums.tail(payload))
            except EnvelopeError as error:
                raise RecordError(
                    f"record {record.header.seq}: the envelope of {header.site} is in the sum, but {error}; "
                    "the coordinator had to refuse it"
                ) from None
        same = not missing and sums.record(total, tails) == record.payload
        yield Recomputed(record.header.seq, record.header.round, tuple(missing), same)


@dataclass(frozen=True)
class Rebuilt:
    """A server's journal after :func:`rebuild`.

    Attributes:
        run: the run's id.
        records: how many there are now.
        added: how many of them were missing.
        head: id of the last one.
        round: of the last aggregate.
        attempt: at which the server goes on collecting the next round.
    """

    run: str
    records: int
    added: int
    head: str
    round: int
    attempt: int


@dataclass(frozen=True)
class _Copy:
    """A verified journal: where it lies, how far it goes, and the digest of each record's bytes."""

    source: Path
    journal: Path
    chain: Chain
    digests: list[bytes]


def rebuild(agreed: AgreedStudy, sources: Sequence[Path], state: Path) -> Rebuilt:
    """Write the journal of the sites' current run into a server's state folder, from the copies at sites.

    The longest copy is taken; the others must be beginnings of it. Of a journal that is there already, missing and
    damaged records are restored and whole ones stay. The envelopes of the round that was being collected are lost:
    its next attempt asks for them again, and sites seal the integers they have stored.

    Args:
        agreed: the study.
        sources: state folders of sites; the more, the surer that none is ahead of the rebuilt journal.
        state: the server's state folder; made if missing.

    Raises:
        RecordError: a copy does not verify, or two of them (or what is there) are not of one journal.
        StorageError: the folder is in use or cannot be written.
    """
    copies = [_read_copy(source, agreed) for source in sources]
    longest = max(copies, key=lambda copy: len(copy.digests))
    for copy in copies:
        for seq, (mine, theirs) in enumerate(zip(copy.digests, longest.digests, strict=False)):
            if mine != theirs:
                raise _fork(RecordFolder(copy.journal).file(seq), RecordFolder(longest.journal).file(seq))
    chain = longest.chain
    make_folder(state)
    with exclusive(state):
        named = state / "run"
        present = named.read_text(encoding="ascii", errors="replace").strip() if named.is_file() else chain.run
        if present != chain.run:
            raise StorageError(
                f"{state}: in run {present[:16]}, but {longest.source} is in run {chain.run[:16]}; "
                "expected the same run: give another --state, or sites that are in the server's run"
            )
        target = state / "runs" / chain.run
        added = _complete(RecordFolder(target / "journal"), longest, agreed)
        attempt = _next_attempt(sources, chain)
        if attempt > 1:
            # The coordinator takes up the highest attempt that it finds a folder of.
            make_folder(target / "spool" / f"{chain.round + 1:08d}" / f"{attempt:04d}")
        write_durable(named, chain.run.encode())
    return Rebuilt(chain.run, chain.length, added, chain.head, chain.round, attempt)


def _read_copy(source: Path, agreed: AgreedStudy) -> _Copy:
    """A site's copy of its current run, verified."""
    current = [run for run in find_runs(source) if run.current]
    if not current:
        raise RecordError(f"{source}: in no run; expected a site's state folder with a run")
    chain, digests = Chain(agreed), []
    for record in verify_run(current[0], agreed):
        chain.advance(record)
        digests.append(hashlib.sha256(record.data).digest())
    return _Copy(source, current[0].journal, chain, digests)


def _complete(folder: RecordFolder, copy: _Copy, agreed: AgreedStudy) -> int:
    """Restore what a journal lacks of a copy; how many records that were."""
    beyond = sorted(path for path in folder.path.glob("*.record") if path.stem > f"{len(copy.digests) - 1:08d}")
    if beyond:
        raise RecordError(
            f"{beyond[-1]}: newer than the {len(copy.digests)} records of {copy.source}; "
            "expected a copy that is at least as long: give the state folders of other sites"
        )
    chain, added = Chain(agreed), 0
    for seq, digest in enumerate(copy.digests):
        path = folder.file(seq)
        record = chain.check(RecordFolder(copy.journal).read(seq))
        if not path.exists() or hashlib.sha256(path.read_bytes()).digest() != digest:
            if path.exists() and _is_signed(path.read_bytes(), agreed):
                raise _fork(path, RecordFolder(copy.journal).file(seq))
            folder.append(record)
            added += 1
        chain.advance(record)
    return added


def _is_signed(data: bytes, agreed: AgreedStudy) -> bool:
    """Whether the coordinator signed these bytes and they are whole."""
    try:
        frame, header = read_header(data, agreed)
        check_payload(frame, header, RecordError)
    except RecordError:
        return False
    return True


def _fork(one: Path, other: Path) -> RecordError:
    return RecordError(
        f"{one} and {other}: two different records of one place, both signed by the coordinator; "
        "expected one journal: keep both files and show them to the other sites"
    )


def _next_attempt(sources: Sequence[Path], chain: Chain) -> int:
    """One above the newest attempt that any of these sites has sealed: a site never goes back to an older one."""
    newest = 0
    for source in sources:
        path = source / "runs" / chain.run / "outbox" / f"{chain.round + 1:08d}.envelope"
        if path.is_file():
            with path.open("rb") as stream:
                start = stream.read(8 + MAX_HEADER + SIGNATURE_BYTES)
            try:
                frame = split_frame(ENVELOPE_MAGIC, start, MAX_HEADER, EnvelopeError)
                newest = max(newest, parse_header(frame.header, EnvelopeHeader, EnvelopeError).attempt)
            except EnvelopeError as error:
                raise RecordError(f"{path}: {error}; leave this site out of --from") from None
    return newest + 1

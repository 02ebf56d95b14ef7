"""Giving a lost server its journal back, from the copies at sites; without any key."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from secure_fed.core.errors import EnvelopeError, ProtocolError, RecordError, StorageError
from secure_fed.core.layout import RECORDS, ServerRun, ServerState, SiteState, numbered
from secure_fed.core.storage import exclusive
from secure_fed.protocol.envelope import MAGIC, MAX_HEADER, EnvelopeHeader
from secure_fed.protocol.journal import find_runs, verify_run
from secure_fed.protocol.records import Chain, Kind, RecordFolder, read_header, replaceable
from secure_fed.protocol.round_frames import check_arrived, check_cohort
from secure_fed.protocol.signing import check_payload, parse_header, split_frame
from secure_fed.protocol.study import AgreedStudy
from secure_fed.server.spool import ARRIVED, CHECKED, COHORT, Spool, attempts, envelope_start


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
    """A verified journal: where it lies, how far it goes, and the digest of each record's bytes.

    Attributes:
        before: the chain before the last sum that a void can take the place of, if there is one.
        kinds: of each record.
    """

    source: Path
    journal: Path
    before: Chain | None
    chain: Chain
    digests: list[bytes]
    kinds: list[Kind]

    def without_sum(self, others: Iterable[_Copy]) -> _Copy:
        """This without its last sum and what follows it, if another copy has a void in its place: the void counts."""
        before = self.before
        if before is None or all(copy.kinds[before.length : before.length + 1] != ["void"] for copy in others):
            return self
        return replace(self, chain=before, digests=self.digests[: before.length], kinds=self.kinds[: before.length])


def rebuild(agreed: AgreedStudy, sources: Sequence[Path], state: Path) -> Rebuilt:
    """Write the journal of the sites' current run into a server's state folder, from the copies at sites.

    The longest copy is taken; the others must be beginnings of it, but for a last record, a sum, that a void takes
    back. Of a journal that is there already, missing and damaged records are restored and whole ones stay, but for such
    a sum. The envelopes of the round that was being collected are lost: its next attempt asks for them again, and sites
    seal the integers they have stored.

    Args:
        agreed: the study.
        sources: state folders of sites; the more, the surer that none is ahead of the rebuilt journal.
        state: the server's state folder; made if missing.

    Raises:
        RecordError: a copy does not verify, or two of them (or what is there) are not of one journal.
        StorageError: the folder is in use or cannot be written.
    """
    found = [_read_copy(source, agreed) for source in sources]
    copies = [copy.without_sum(found) for copy in found]
    longest = max(copies, key=lambda copy: len(copy.digests))
    for copy in copies:
        for seq, (mine, theirs) in enumerate(zip(copy.digests, longest.digests, strict=False)):
            if mine != theirs:
                raise _fork(RecordFolder(copy.journal).file(seq), RecordFolder(longest.journal).file(seq))
    chain = longest.chain
    folder = ServerState(state)
    folder.begin()
    with exclusive(state):
        present = folder.current_run or chain.run
        if present != chain.run:
            raise StorageError(
                f"{state}: in run {present[:16]}, but {longest.source} is in run {chain.run[:16]}; "
                "expected the same run: give another --state, or sites that are in the server's run"
            )
        target = folder.run(chain.run)
        added = _complete(RecordFolder(target.journal), longest, agreed)
        attempt = _take_over(sources, agreed, chain, target) or _next_attempt(sources, chain)
        if attempt > 1:
            # The coordinator takes up the highest attempt that it finds a folder of.
            Spool(target, chain.round + 1, attempt).begin()
        folder.enter_run(chain.run)
    return Rebuilt(chain.run, chain.length, added, chain.head, chain.round, attempt)


def _read_copy(source: Path, agreed: AgreedStudy) -> _Copy:
    """A site's copy of its current run, verified."""
    current = [run for run in find_runs(source) if run.current]
    if not current:
        raise RecordError(f"{source}: in no run; expected a site's state folder with a run")
    before, chain = None, Chain(agreed)
    digests, kinds = [], []
    for record in verify_run(current[0], agreed):
        if record.header.kind in ("aggregate", "checkpoint"):
            before = chain if record.header.kind == "aggregate" else None
        chain = chain.after(record)
        digests.append(hashlib.sha256(record.data).digest())
        kinds.append(record.header.kind)
    return _Copy(source, current[0].journal, before, chain, digests, kinds)


def _complete(folder: RecordFolder, copy: _Copy, agreed: AgreedStudy) -> int:
    """Restore what a journal lacks of a copy; how many records that were."""
    void = _replaced(folder, copy, agreed)
    if void is not None:
        folder.drop_from(void)
    beyond = sorted(path for path in folder.path.glob(RECORDS) if path.stem > numbered(len(copy.digests) - 1))
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


def _replaced(folder: RecordFolder, copy: _Copy, agreed: AgreedStudy) -> int | None:
    """The number of a void in a copy in whose place the server has its last sum: that is taken back."""
    present = (path.read_bytes() for path in sorted(folder.path.glob(RECORDS)))
    headers = [read_header(data, agreed)[1] for data in present if _is_signed(data, agreed)]
    place = replaceable([header.kind for header in headers])
    if place is None or copy.kinds[headers[place].seq : headers[place].seq + 1] != ["void"]:
        return None
    seq, previous = headers[place].seq, headers[place].previous
    void = read_header(RecordFolder(copy.journal).read(seq), agreed)[1]
    return seq if void.previous == previous else None


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


def _take_over(sources: Sequence[Path], agreed: AgreedStudy, chain: Chain, target: ServerRun) -> int:
    """The attempt whose sum is fixed, if a site has revealed for it: its COHORT and ARRIVED go back into the spool, so
    that the coordinator asks its members for the same envelopes and REVEALs, and for no others; else 0."""
    for source in sources:
        run = SiteState(source).run(chain.run)
        try:
            frames = {name: run.question(name).read_bytes() for name in (COHORT, ARRIVED)}
            if run.question(CHECKED).is_file():
                frames[CHECKED] = run.question(CHECKED).read_bytes()
            arrived, _, _ = check_arrived(frames[ARRIVED], agreed, chain.members, chain.due)
            _, _, digest = check_cohort(frames[COHORT], agreed, chain.members, chain.due, chain.quorum)
        except (FileNotFoundError, ProtocolError):
            continue  # of no round, or of another one
        if digest == arrived.cohort:
            spool = Spool(target, chain.round + 1, arrived.attempt)
            spool.begin()
            for name, data in frames.items():
                spool.keep(name, data)
            for later in attempts(target, spool.round):  # who has revealed begins none of them
                if later.attempt > spool.attempt:
                    shutil.rmtree(later.folder)
            return arrived.attempt
    return 0


def _next_attempt(sources: Sequence[Path], chain: Chain) -> int:
    """One above the newest attempt that any of these sites has sealed: a site never goes back to an older one."""
    newest = 0
    for source in sources:
        path = SiteState(source).run(chain.run).envelope(chain.round + 1)
        if path.is_file():
            try:
                frame = split_frame(MAGIC, envelope_start(path), MAX_HEADER, EnvelopeError)
                newest = max(newest, parse_header(frame.header, EnvelopeHeader, EnvelopeError).attempt)
            except EnvelopeError as error:
                raise RecordError(f"{path}: {error}; leave this site out of --from") from None
    return newest + 1

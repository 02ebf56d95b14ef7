"""Reading the journals in a state folder, a server's or a site's: who has the study can check them, without a key."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from secure_fed.core.errors import RecordError, StudyError
from secure_fed.core.layout import RECORDS, RunState, SiteRun, StateFolder
from secure_fed.protocol.records import Chain, Record, RecordFolder, read_header
from secure_fed.protocol.study import AgreedStudy


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


def find_runs(folder: Path) -> list[RunFolder]:
    """The journals in a server's or a site's state folder, a run's folder, or a folder of records.

    Raises:
        RecordError: there is none.
        StateFormatError: the state folder is of another layout.
    """
    if any(folder.glob(RECORDS)):
        return [RunFolder(folder, folder, True)]
    if RunState(folder).journal.is_dir():
        return [RunFolder(RunState(folder).journal, folder, True)]
    state = StateFolder(folder)
    current = state.current_run
    runs = [
        RunFolder(RunState(path).journal, path, path.name == current)
        for path in state.run_folders()
        if RunState(path).journal.is_dir()
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


def find_study(folder: Path) -> Path:
    """The study of a journal: the nearest ``study.toml`` in its folder or above, or in a folder ``study`` of these.

    Raises:
        RecordError: there is no such folder.
        StudyError: there is no study.
    """
    if not folder.is_dir():
        raise RecordError(f"{folder}: no folder; expected one with a journal")
    for place in (folder.resolve(), *folder.resolve().parents):
        for path in (place / "study.toml", place / "study" / "study.toml"):
            if path.is_file():
                return path
    raise StudyError(
        f"{folder}: no study.toml in it, above it, or in a folder study of these; expected the journal's study: name "
        "it with --study"
    )


@dataclass(frozen=True)
class Parting:
    """How far two journals of one run agree.

    Attributes:
        run: its id.
        same: how many records are the same, from the first on.
        first, second: how many each has.
    """

    run: str
    same: int
    first: int
    second: int

    def refuse(self, one: Path, other: Path) -> None:
        """Refuse journals of which neither is the beginning of the other.

        Raises:
            RecordError: the coordinator signed two records for one place.
        """
        if self.same < min(self.first, self.second):
            raise RecordError(
                f"record {self.same} is one in {one} and another in {other}, both signed by the coordinator and whole; "
                "expected one journal: it showed the sites different studies; keep both, and tell all sites"
            )


def part(one: Path, other: Path, agreed: AgreedStudy) -> Parting:
    """Compare the journals of the longest run that two state folders share; each is verified first.

    Raises:
        RecordError: one does not verify, or they share no run.
    """
    journals: list[dict[str, list[str]]] = []
    for folder in (one, other):
        found: dict[str, list[str]] = {}
        for place in find_runs(folder):
            records = list(verify_run(place, agreed))
            found[records[0].header.run] = [record.id for record in records]
        journals.append(found)
    shared = [run for run in journals[0] if run in journals[1]]
    if not shared:
        raise RecordError(f"{one} and {other}: in no run together; expected two copies of one run's journal")
    run = max(shared, key=lambda name: max(len(found[name]) for found in journals))
    first, second = journals[0][run], journals[1][run]
    same = next(
        (seq for seq, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1]),
        min(len(first), len(second)),
    )
    return Parting(run, same, len(first), len(second))


def verify_run(run: RunFolder, agreed: AgreedStudy) -> Iterator[Record]:
    """Check every record of a run: signatures, chain, contributors, payloads; and at a site its pins and evidence.

    Raises:
        RecordError: with the first record that does not hold, or evidence that the coordinator signed two records
            for one place.
    """
    chain, site = Chain(agreed), SiteRun(run.folder)
    for record in RecordFolder(run.journal).replay(chain):
        pin = site.pin(record.header.round)
        if record.header.kind == "aggregate" and pin.is_file():
            found = hashlib.sha256(record.data).hexdigest()
            if pin.read_text(encoding="ascii").split() != [record.header.previous, found]:
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
    for path in sorted(SiteRun(run.folder).evidence.glob(RECORDS)):
        data = path.read_bytes()
        _, header = read_header(data, agreed)
        known = RecordFolder(run.journal).file(header.seq)
        if header.kind == "aggregate" and known.exists() and read_header(known.read_bytes(), agreed)[1].kind == "void":
            continue  # taken back: a race can have made both
        if header.run == chain.run and known.exists() and known.read_bytes() != data:
            raise RecordError(
                f"{path}: the coordinator signed this and {known} as record {header.seq} of run {chain.run[:16]}; "
                "expected one record: show both files to the other sites"
            )


class JournalEntry:
    """What is kept of a record in memory: its header, id and sizes, not its payload.

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
            8 + sum(map(len, entry.signed)) + contributor.size
            # A checkpoint has acknowledgements in their place, which are no contributors.
            for entry, contributor in zip(record.header.contributors, record.contributors, strict=False)
        )
        self.size = len(record.data)

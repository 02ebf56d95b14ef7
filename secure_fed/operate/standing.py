"""Where a server or a site stands, whether its process runs or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from secure_fed.core.errors import RecordError, StudyError
from secure_fed.core.layout import RECORDS, RunState, ServerRun, ServerState, StateFolder
from secure_fed.core.status import StatusFile, is_running
from secure_fed.protocol.journal import find_runs, find_study
from secure_fed.protocol.records import MAGIC, Chain, RecordFolder, RecordHeader
from secure_fed.protocol.signing import parse_header, split_frame
from secure_fed.protocol.study import AgreedStudy, load_study
from secure_fed.server.orders import Orders


def place_of(path: Path) -> tuple[Path, Path | None]:
    """The state folder that is meant by a path: itself, or of a site named by folder or ``site.toml`` that site's.

    Returns:
        The folder, and of a site so named its study's file.

    Raises:
        SiteFileError: there is a ``site.toml``, and it does not hold together.
    """
    if path.is_file() or (path / "site.toml").is_file():
        from secure_fed.clients.sitefile import read_site_file  # loads torch, which a server does without

        file = read_site_file(path)
        return Path(file.state), Path(file.study)
    return path, None


def refuse_no_state(state: Path) -> None:
    """Check that a path given by itself is a server's or a site's state folder.

    Raises:
        RecordError: there is no folder, or another one.
    """
    if not state.is_dir():
        found = "no folder"
    elif not StateFolder(state).begun():
        found = "a folder in which neither a server nor a site has left anything"
    else:
        return
    raise RecordError(
        f"{state}: {found}; expected the state folder of a server or a site, or a site's folder: give the folder that "
        "site.toml is in, or what the server was started with as --state"
    )


def is_over(state: Path, agreed: AgreedStudy) -> bool:
    """Whether nothing is left to do in a state folder: the study is closed there, its run was ended, or every round
    has its record."""
    folder = StateFolder(state)
    if folder.closed.exists():
        return True
    run = folder.current_run
    journal = None if run is None else RunState(folder.runs / run).journal
    if journal is None or not any(journal.glob(RECORDS)):
        return False
    newest = _newest(journal)
    if newest.kind == "retired":
        chain = Chain(agreed)
        for _ in RecordFolder(journal).replay(chain):
            pass
        return chain.finished
    if newest.kind != "aggregate" or newest.round < agreed.study.rounds:
        return newest.kind == "end"
    return newest.round >= _rounds(journal, agreed)


def standing(state: Path, study: Path | None = None) -> dict[str, Any]:
    """The status file with whether a process holds the folder, and whether the study was closed there; without one of
    a process that began, as at a simulated site or where every start was refused, what the journal says. What a
    process waited for is left out once it does not run; what its people ordered is read where they left it.

    Args:
        state: the folder.
        study: its study's file; None to look for it near the journal. Without one nothing is known of the study's end.

    Returns:
        A JSON document with at least ``role``, ``running``, ``closed``, ``round``, ``last_error`` and ``ordered``, in
        words what the coordinator's people want of a run that is not over.

    Raises:
        RecordError: there is neither, or not yet.
    """
    found = StatusFile(state).read()
    now = {"running": is_running(state), "closed": StateFolder(state).closed.exists()}
    if "role" in found:
        facts = {**found, **now, "ordered": [] if found.get("finished") else _ordered(state)}
        return facts if now["running"] else {name: fact for name, fact in facts.items() if name != "waiting"}
    # A process that was refused before it began leaves why, and nothing else.
    error = found.get("last_error")
    role = "server" if ServerState(state).key.exists() else "site"
    if study is None or not state.is_dir():
        refuse_no_state(state)
    elif not any(StateFolder(state).run_folders()):
        raise RecordError(f"{state}: nothing has run here yet; start the site with: secfacmic client --site SITE")
    if error is not None and not any(StateFolder(state).begun_runs()):
        return {"role": role, **now, "round": 0, "last_error": error, "ordered": []}
    run = next((run for run in find_runs(state) if run.current), None)
    records = 0 if run is None else len(list(run.journal.glob(RECORDS)))
    if run is None or not records:
        raise RecordError(f"{state}: no run has its first record yet; expected one as soon as server or site has begun")
    return {
        "role": role,
        **now,
        "run": run.folder.name,
        "records": records,
        "round": _closed_rounds(_newest(run.journal)),
        "last_error": error,
        "ordered": _ordered(state),
        **_study_facts(state, study, run.journal),
    }


def _ordered(state: Path) -> list[str]:
    """What people ordered for the current run of a server, in words; of a site nothing."""
    folder = StateFolder(state)
    if folder.closed.exists() or folder.current_run is None:
        return []
    orders = Orders(ServerRun(folder.runs / folder.current_run))
    words = {
        "paused: no further round begins until secfacmic study resume": orders.paused,
        "the run is to end before its last round, by secfacmic study end": orders.end,
    }
    return [text for text, ordered in words.items() if ordered]


def _study_facts(state: Path, path: Path | None, journal: Path) -> dict[str, Any]:
    """Which study a journal is of, and whether it is over; nothing where no study is found."""
    try:
        agreed = load_study(find_study(journal) if path is None else path)
    except (RecordError, StudyError):
        return {}
    study = agreed.study
    return {
        "study": study.name,
        "study_id": study.id,
        "rounds": _rounds(journal, agreed),
        "finished": is_over(state, agreed),
    }


def _rounds(journal: Path, agreed: AgreedStudy) -> int:
    """How many rounds a run has: the study's, or as its newest extension says; unchecked."""
    for path in sorted(journal.glob(RECORDS), reverse=True):
        frame = split_frame(MAGIC, path.read_bytes(), 2**28, RecordError)
        if parse_header(frame.header, RecordHeader, RecordError).kind == "extension":
            return int(bytes(frame.payload))
    return agreed.study.rounds


def _newest(journal: Path) -> RecordHeader:
    """The header of the journal's newest record, unchecked: secfacmic journal verify checks."""
    frame = split_frame(MAGIC, max(journal.glob(RECORDS)).read_bytes(), 2**28, RecordError)
    return parse_header(frame.header, RecordHeader, RecordError)


def _closed_rounds(newest: RecordHeader) -> int:
    """The last round that has its record: others than aggregates name the one that is due."""
    return newest.round if newest.kind in ("genesis", "aggregate") else newest.round - 1

"""Where a server or a site stands, whether its process runs or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from secure_fed.core.errors import RecordError
from secure_fed.core.layout import RECORDS, ServerState
from secure_fed.core.status import StatusFile, is_running
from secure_fed.protocol.journal import find_runs
from secure_fed.protocol.records import MAGIC, RecordHeader
from secure_fed.protocol.signing import parse_header, split_frame


def standing(state: Path) -> dict[str, Any]:
    """The status file with whether a process holds the folder; without a file, what the journal says.

    Args:
        state: the folder.

    Returns:
        A JSON document with at least ``role``, ``running``, ``round`` and ``last_error``.

    Raises:
        RecordError: there is neither.
    """
    found = StatusFile(state).read()
    if found:
        return {**found, "running": is_running(state)}
    if not state.is_dir():
        raise RecordError(f"{state}: no folder; expected the state folder of a server or a site")
    run = next(run for run in find_runs(state) if run.current)
    records = len(list(run.journal.glob(RECORDS)))
    role = "server" if ServerState(state).key.exists() else "site"
    return {
        "role": role,
        "running": is_running(state),
        "run": run.folder.name,
        "records": records,
        "round": _last_round(run.journal),
        "last_error": None,
    }


def _last_round(journal: Path) -> int:
    """The newest round that the journal's records name, unchecked: secfacmic journal verify checks."""
    newest = max(journal.glob(RECORDS))
    frame = split_frame(MAGIC, newest.read_bytes(), 2**28, RecordError)
    return parse_header(frame.header, RecordHeader, RecordError).round

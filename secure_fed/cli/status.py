"""``secfacmic status``: where a running server or site stands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from secure_fed.cli.output import Json, out, print_json


def status(
    state: Annotated[Path, typer.Argument(metavar="STATE", help="State folder of a server or a site.")],
    json_: Json = False,
) -> None:
    """Say where a server or a site stands: round, who is in, what it reported last, whether it runs at all."""
    facts = _facts(state)
    if json_:
        print_json(facts)
        return
    _say(f"{facts['role']}: {'running' if facts['running'] else 'NOT running'}")
    if "study" in facts:
        _say(f"study {facts['study']}, id {facts['study_id']}")
    over = ", over" if facts.get("finished") else ""
    _say(f"round {facts['round']}" + (f" of {facts['rounds']}" if "rounds" in facts else "") + over)
    sites = facts.get("sites")
    if sites:
        table = Table("site", "role", "connected", "in this round")
        for name, one in sorted(sites.items()):
            table.add_row(name, one["role"], _yes(one["connected"] and facts["running"]), _yes(one["in"]))
        out.print(table)
    if facts.get("waiting"):
        _say(facts["waiting"])
    for name, words in (("last", "last word"), ("last_error", "last error")):
        entry = facts.get(name)
        if entry:
            _say(f"{words}, {entry['time']}: {entry['text']}")


def _facts(state: Path) -> dict[str, Any]:
    """The status file with whether a process holds the folder; without a file, what the journal says."""
    from secure_fed.core.errors import RecordError
    from secure_fed.core.status import StatusFile, is_running

    found = StatusFile(state).read()
    if found:
        return {**found, "running": is_running(state)}
    from secure_fed.protocol.journal import find_runs

    if not state.is_dir():
        raise RecordError(f"{state}: no folder; expected the state folder of a server or a site")
    run = next(run for run in find_runs(state) if run.current)
    records = len(list(run.journal.glob("*.record")))
    role = "server" if (state / "coordinator.key").exists() else "site"
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
    from secure_fed.core.errors import RecordError
    from secure_fed.protocol.records import MAGIC, RecordHeader
    from secure_fed.protocol.signing import parse_header, split_frame

    newest = max(journal.glob("*.record"))
    frame = split_frame(MAGIC, newest.read_bytes(), 2**28, RecordError)
    return parse_header(frame.header, RecordHeader, RecordError).round


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _say(text: str) -> None:
    out.print(text, markup=False, highlight=False, soft_wrap=True)

"""``secfacmic journal``: read, verify, compare, recompute, audit and rebuild journals; none of it opens anything."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from secure_fed.cli.output import SITE_HELP, Json, out, print_json

if TYPE_CHECKING:
    from secure_fed.protocol.journal import RunFolder
    from secure_fed.protocol.recompute import Recomputed
    from secure_fed.protocol.study import AgreedStudy

app = typer.Typer(
    help="Journals: verify, show, compare, recompute, audit, rebuild. Nothing is opened.", no_args_is_help=True
)

Folder = Annotated[
    Path,
    typer.Argument(metavar="DIR", help="A state folder, a site's folder, a run's folder, or a folder of records."),
]
StudyFile = Annotated[
    Path | None, typer.Option("--study", help="The study's study.toml; else looked for in DIR and above it.")
]


@app.command()
def verify(folder: Folder, study: StudyFile = None, json_: Json = False) -> None:
    """Check signatures, chain, contributors and payloads of every record; at a site its pins and evidence too."""
    from secure_fed.protocol.journal import find_runs, verify_run

    folder, agreed = _place(folder, study)
    results: list[dict[str, Any]] = []
    for run in find_runs(folder):
        kinds: Counter[str] = Counter()
        last = None
        for record in verify_run(run, agreed):
            kinds[record.header.kind] += 1
            last = record
        assert last is not None  # a run without records is refused
        results.append(
            {
                "run": last.header.run,
                "current": run.current,
                "records": last.header.seq + 1,
                "aggregates": kinds["aggregate"],
                "amendments": kinds["amendment"],
                "rounds": last.rounds,
                "head": last.id,
            }
        )
    if json_:
        print_json({"study_id": agreed.study.id, "runs": results})
        return
    for result in results:
        _say(
            f"run {result['run'][:16]}{' (current)' if result['current'] else ''}: {result['records']} records, "
            f"{result['aggregates']} aggregates of {result['rounds']} rounds, "
            f"{result['amendments']} amendments; all signatures, contributors and digests hold"
        )
        _say(f"head {result['head']}")


@app.command()
def show(folder: Folder, study: StudyFile = None, json_: Json = False) -> None:
    """List the records of every run, each checked first."""
    from secure_fed.protocol.journal import find_runs, verify_run

    folder, agreed = _place(folder, study)
    listed: list[tuple[RunFolder, list[dict[str, Any]]]] = []
    for run in find_runs(folder):
        rows: list[dict[str, Any]] = [
            {
                "seq": record.header.seq,
                "kind": record.header.kind,
                "round": record.header.round,
                "run": record.header.run,
                "key": record.header.key,
                "opened_ms": record.header.opened_ms,
                "closed_ms": record.header.closed_ms,
                "contributors": [
                    {"site": header.site, "attempt": header.attempt, "payload": header.payload}
                    for header in record.contributors
                ],
                "bytes": len(record.data),
                "id": record.id,
            }
            for record in verify_run(run, agreed)
        ]
        listed.append((run, rows))
    if json_:
        runs = [{"run": rows[0]["run"], "current": run.current, "records": rows} for run, rows in listed]
        print_json({"study_id": agreed.study.id, "runs": runs})
        return
    for run, rows in listed:
        genesis = rows[0]
        table = Table(
            title=f"run {genesis['run'][:16]}{' (current)' if run.current else ''}, key {genesis['key'][:16]}"
        )
        for column in ("record", "kind", "round"):
            table.add_column(column)
        for column in ("contributors", "closed (UTC)", "MB", "id"):
            table.add_column(column, justify="right" if column == "MB" else "left")
        for row in rows:
            table.add_row(
                str(row["seq"]),
                row["kind"],
                str(row["round"] or "-"),
                ", ".join(entry["site"] for entry in row["contributors"]) or "-",
                _time(row["closed_ms"]),
                f"{row['bytes'] / 1e6:.3f}",
                row["id"][:16],
            )
        out.print(table)


@app.command()
def compare(
    one: Annotated[Path, typer.Argument(metavar="A", help="A state folder, or a site's folder.")],
    other: Annotated[Path, typer.Argument(metavar="B", help="Another one, of the same study.")],
    study: StudyFile = None,
    json_: Json = False,
) -> None:
    """Show where two journals of one run part, if they do: exit code 44 then, since the coordinator signed both."""
    from secure_fed.protocol.journal import part

    first, agreed = _place(one, study)
    second, _ = _place(other, study)
    found = part(first, second, agreed)
    if json_:
        print_json({"study_id": agreed.study.id, **found.__dict__})
    else:
        _say(f"run {found.run[:16]}: {found.same} records are the same")
        _say(f"{one}: {found.first}; {other}: {found.second}")
    found.refuse(one, other)


@app.command()
def recompute(
    folder: Folder,
    envelopes: Annotated[
        Path, typer.Option(help="Folder of kept envelopes (server --keep-envelopes); searched with all below it.")
    ],
    study: StudyFile = None,
    json_: Json = False,
) -> None:
    """Add every aggregate's envelopes again and compare with the record, bit for bit."""
    from secure_fed.protocol.journal import find_runs
    from secure_fed.protocol.recompute import EnvelopeStore, refuse_differences
    from secure_fed.protocol.recompute import recompute as recompute_run

    folder, agreed = _place(folder, study)
    store = EnvelopeStore(envelopes)
    results = [(run, result) for run in find_runs(folder) for result in recompute_run(run, agreed, store)]
    if json_:
        rows = [
            {
                "run": run.journal.parent.name,
                "current": run.current,
                "seq": result.seq,
                "round": result.round,
                "same": result.same,
                "missing": list(result.missing),
            }
            for run, result in results
        ]
        print_json({"study_id": agreed.study.id, "aggregates": rows})
    else:
        for _, result in results:
            _say(_verdict(result))
    refuse_differences([result for _, result in results], envelopes)


@app.command()
def audit(
    site: Annotated[Path, typer.Option("--site", help=SITE_HELP)],
    rounds: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="How many of the last rounds; all that the study keeps.")
    ] = None,
    json_: Json = False,
) -> None:
    """Fetch the padded envelopes of past rounds from the server, add them again and compare with the records."""
    from secure_fed.clients.sitefile import read_site
    from secure_fed.operate.audit_sums import audit_sums, refuse_unshown

    file, agreed = read_site(site)
    results = audit_sums(file, agreed, rounds)
    if json_:
        rows = [
            {
                "seq": result.seq,
                "round": result.round,
                "same": result.same,
                "missing": list(result.missing),
                "odd_checks": list(result.odd),
            }
            for result in results
        ]
        print_json({"study_id": agreed.study.id, "aggregates": rows})
    else:
        for result in results:
            _say(_verdict(result))
    refuse_unshown(results)


@app.command()
def rebuild(
    sites: Annotated[list[Path], typer.Option("--from", help="A site's state folder; once for each site at hand.")],
    state: Annotated[
        Path | None, typer.Option(help="The server's state folder; else the folder server beside study.toml.")
    ] = None,
    study: StudyFile = None,
    json_: Json = False,
) -> None:
    """Give a server that lost its journal the same head again, from the sites' copies."""
    from secure_fed.core.layout import ServerState
    from secure_fed.server.rebuild import rebuild as rebuild_journal

    path = study_path(study, sites[0])
    target = state or path.parent / "server"
    rebuilt = rebuild_journal(_load(path), sites, target)
    if json_:
        print_json({"state": str(target), **rebuilt.__dict__})
        return
    _say(f"{target}: run {rebuilt.run[:16]}, {rebuilt.records} records, {rebuilt.added} of them restored")
    _say(f"head {rebuilt.head}, after round {rebuilt.round}; the next round begins at attempt {rebuilt.attempt}")
    _say("no site may have more records than these: compare with: secfacmic journal verify STATE, at every site")
    key = ServerState(target).key
    if not key.exists():
        _say(f"put the coordinator's signing key back too: {key}")


def _place(folder: Path, given: Path | None) -> tuple[Path, AgreedStudy]:
    """The folder with the journals, of a site named by its folder the state folder; and the study."""
    from secure_fed.operate.standing import place_of

    state, of_site = place_of(folder)
    return state, _load(study_path(given or of_site, state))


def _load(path: Path) -> AgreedStudy:
    from secure_fed.protocol.study import load_study

    return load_study(path)


def study_path(given: Path | None, folder: Path) -> Path:
    """The study's file: the one given, else the one that is found in or above a folder."""
    from secure_fed.protocol.journal import find_study

    return find_study(folder) if given is None else given


def _verdict(result: Recomputed) -> str:
    """What became of one sum, in a line."""
    if result.missing:
        verdict = f"missing {', '.join(result.missing)}"
    else:
        verdict = "the same, bit for bit" if result.same else "DIFFERS"
    return f"record {result.seq}, round {result.round}: {verdict}"


def _time(milliseconds: int) -> str:
    """A record's time; it is the server's word, which may be any number."""
    try:
        return datetime.fromtimestamp(milliseconds / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S")
    except (OverflowError, ValueError, OSError):
        return f"{milliseconds} ms"


def _say(text: str) -> None:
    out.print(text, highlight=False, soft_wrap=True)

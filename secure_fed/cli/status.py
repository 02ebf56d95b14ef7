"""``secfacmic status``: where a running server or site stands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from secure_fed.cli.output import Json, out, print_json


def status(
    state: Annotated[
        Path, typer.Argument(metavar="STATE", help="State folder of a server or a site; or a site's folder.")
    ],
    check: Annotated[
        bool, typer.Option("--check", help="End with 1 if no process runs there though the study is not over.")
    ] = False,
    json_: Json = False,
) -> None:
    """Say where a server or a site stands: round, who is in, what it reported last, whether it runs at all."""
    from secure_fed.operate.standing import place_of, standing

    facts = standing(*place_of(state))
    if json_:
        print_json(facts)
    else:
        _show(facts)
    if check and not facts["running"] and not facts.get("finished"):
        raise typer.Exit(1)


def _show(facts: dict[str, Any]) -> None:
    _say(f"{facts['role']}: {_process(facts)}")
    if "study" in facts:
        _say(f"study {facts['study']}, id {facts['study_id']}")
    over = ", over" if facts.get("finished") else ""
    _say(f"round {facts['round']}" + (f" of {facts['rounds']}" if "rounds" in facts else "") + over)
    sites = facts.get("sites")
    if sites:
        table = Table("site", "role", "connected", "in this round", "what it does")
        for name, one in sorted(sites.items()):
            table.add_row(
                *(name, one["role"], _yes(one["connected"] and facts["running"]), _yes(one["in"])),
                one.get("doing", "") if facts["running"] else "",
            )
        out.print(table)
    for text in (facts.get("waiting"), *facts["ordered"]):
        if text:
            _say(text)
    for name, words in (("last", "last word"), ("last_error", "last error")):
        entry = facts.get(name)
        if entry:
            _say(f"{words}, {entry['time']}: {entry['text']}")


def _process(facts: dict[str, Any]) -> str:
    """Whether it runs, and if not, whether it should."""
    if facts["running"]:
        return "running"
    if facts["closed"]:
        return "finished, and the study is closed here"
    return "finished" if facts.get("finished") else "NOT running"


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _say(text: str) -> None:
    out.print(text, highlight=False, soft_wrap=True)

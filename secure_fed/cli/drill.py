"""``secfacmic drill``: the threat model's attacks against a throw-away federation of this installation."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from secure_fed.cli.output import Json, console, out, print_json


def drill(
    site: Annotated[
        Path | None, typer.Option(help="Keep what came of it in this site's state, for its evidence.")
    ] = None,
    json_: Json = False,
) -> None:
    """Attack a throw-away federation of this installation, in process and over loopback, and say what held.

    For a security officer, after an upgrade. Ends with exit code 73 if an attack succeeds.
    """
    from secure_fed.core.errors import DrillError
    from secure_fed.core.processes import be_quiet_outside

    be_quiet_outside()
    state = None
    if site is not None:
        from secure_fed.clients.sitefile import read_site_file

        state = read_site_file(site).state_folder  # its errors before the attacks
    from secure_fed.lab.drill import drill as carry_out

    with console.status("") as status:
        found = carry_out(lambda text: status.update(f"drill: {text}"))
    if state is not None:
        from secure_fed.core.storage import write_durable

        state.begin()
        record = {**found, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        write_durable(state.drill, (json.dumps(record, indent=2) + "\n").encode(), 0o600)
    rows = found["attacks"]
    if json_:
        print_json(found)
    else:
        table = Table("id", "attacker", "tried", "seen", "held", title=f"secfacmic {found['version']}")
        for row in rows:
            table.add_row(row["id"], row["attacker"], row["tried"], row["seen"], "yes" if row["held"] else "NO")
        out.print(table)
    fallen = [row["id"] for row in rows if not row["held"]]
    if fallen:
        raise DrillError(
            f"{len(fallen)} of {len(rows)} attacks succeeded: {', '.join(fallen)}; expected none: take part in no "
            "study with this installation; install the released version anew, and report it if they succeed again"
        )

"""The process of the rounds: a Flower ServerApp around :class:`secure_fed.server.round_loop.RoundLoop`.

Run with ``-m`` by :mod:`secure_fed.server.supervisor`, and imported by nothing: so no module exists twice in it.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from secure_fed.core.errors import SecfacmicError
from secure_fed.core.processes import die_with_parent, end_on_sigterm, log_lines, settle
from secure_fed.core.status import StatusFile, keep_log
from secure_fed.protocol.study import load_study
from secure_fed.server.flower_link import open_grid
from secure_fed.server.round_loop import RoundLoop
from secure_fed.server.supervisor import MEMBERS_CHANGED, ServerFolders

log = logging.getLogger("secure_fed.server.rounds_process")  # here __name__ is __main__, which is none of our names


def main() -> None:
    """Run the rounds; the set-up comes on stdin.

    Exits with 0 when the study is over, :data:`MEMBERS_CHANGED` when the sites must be registered anew, else with the
    code of the refusal.
    """
    die_with_parent()
    end_on_sigterm()
    log_lines()
    setup = json.loads(sys.stdin.read())
    state = Path(setup["state"])
    status = StatusFile(state)
    keep_log(state, "rounds", status)
    app = ServerApp()
    ended = False

    @app.main()
    def rounds(grid: Grid, context: Context) -> None:
        nonlocal ended
        keep = setup["keep_envelopes"]
        folders = ServerFolders(Path(setup["study"]), state, None if keep is None else Path(keep))
        agreed = load_study(folders.study)
        coordinator = folders.coordinator(agreed)
        incoming, outgoing = folders.bytes_of(coordinator.run)
        tell = lambda facts: status.tell(**facts)  # noqa: E731
        loop = RoundLoop(coordinator, agreed, grid, setup["nodes"], incoming, outgoing, tell)
        settle()
        ended = loop.run()

    try:
        with open_grid(setup["runtime"], setup["token"]) as (grid, context):
            app(grid=grid, context=context)
        sys.exit(0 if ended else MEMBERS_CHANGED)
    except SecfacmicError as error:
        log.error("%s", error)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:  # in one line, and started again
        log.error("the rounds failed with %s: %s", type(error).__name__, error)
        sys.exit(1)


if __name__ == "__main__":
    main()

"""``secfacmic server``: the coordinator of one study."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from secure_fed.cli.output import Metrics, host_and_port
from secure_fed.core.errors import SecfacmicError


def server(
    study: Annotated[Path, typer.Option(help="The study's study.toml.")],
    mode: Annotated[Literal["he", "plain"], typer.Option(help="Must be the study's.")],
    state: Annotated[Path, typer.Option(help="Folder of coordinator.key, tls/ and the journal.")],
    listen: Annotated[str, typer.Option(metavar="HOST:PORT", help="Where the sites connect to.")] = "127.0.0.1:8443",
    key: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Sealed key file (keys create) to begin a run with.")
    ] = None,
    keep_envelopes: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep the envelopes of every sum, to recompute it.")
    ] = None,
    lobby: Annotated[
        bool,
        typer.Option("--lobby", help="Begin round 1 when all that train are ready, or at: secfacmic study resume."),
    ] = False,
    metrics: Metrics = None,
) -> None:
    """Serve a study to its sites until it is over; started again, it goes on.

    STATE/log keeps what it reports; secfacmic status STATE says where it stands.
    """
    from secure_fed.core.processes import be_quiet_outside, die_with_parent, end_on_sigterm, log_lines

    die_with_parent()
    end_on_sigterm()
    be_quiet_outside()
    from secure_fed.operate.metrics import serve_metrics
    from secure_fed.operate.running import running
    from secure_fed.server.supervisor import ServerFolders, serve

    log_lines()
    with running(state, "server") as status:
        try:
            address = host_and_port(listen, "--listen")
            if metrics is not None:
                serve_metrics(state, host_and_port(metrics, "--metrics", "127.0.0.1"))
            serve(ServerFolders(study, state, keep_envelopes), mode, address, key, lobby=lobby)
        except SecfacmicError as error:
            status.error(str(error))
            raise

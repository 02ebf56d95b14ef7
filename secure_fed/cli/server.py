"""``secfacmic server``: the coordinator of one study."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from secure_fed.errors import AddressError


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
) -> None:
    """Serve a study to its sites until it is over; started again, it goes on."""
    from secure_fed.processes import be_quiet_outside, die_with_parent, end_on_sigterm, log_lines

    die_with_parent()
    end_on_sigterm()
    be_quiet_outside()
    from secure_fed.storage import exclusive
    from server.app import ServerFolders, serve

    log_lines()
    with exclusive(state):
        serve(ServerFolders(study, state, keep_envelopes), mode, _address(listen), key)


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise AddressError(f"--listen {text}: expected HOST:PORT, as 0.0.0.0:8443")
    return host.removeprefix("[").removesuffix("]"), int(port)

"""``secfacmic doctor``: what is wrong here, and how to mend it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from secure_fed.cli.output import Json, host_and_port, out, print_json

if TYPE_CHECKING:
    from secure_fed.operate.doctor import Finding

MOST = 9
"""Highest exit status: 10 and above are refusals."""


def doctor(
    site: Annotated[Path | None, typer.Option(help="Look at a site: its site.toml, or its folder.")] = None,
    server: Annotated[Path | None, typer.Option(metavar="STATE", help="Look at a server: its state folder.")] = None,
    study: Annotated[
        Path | None, typer.Option(help="The server's study.toml; else the nearest in or above its state folder.")
    ] = None,
    listen: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="Where the server is to listen.")] = None,
    json_: Json = False,
) -> None:
    """Check clock, network, certificates, keys, disk, memory, backbone, data and ledger; say how to mend each fault.

    Ends with the number of failed checks, at most 9.
    """
    from secure_fed.core.processes import be_quiet_outside

    if (site is None) == (server is None):
        raise typer.BadParameter("expected --site or --server, and one of them")
    be_quiet_outside()
    from secure_fed.operate.doctor import examine_server, examine_site

    if site is not None:
        findings = _shown(examine_site(site), json_)
    else:
        from secure_fed.cli.journal import study_path

        assert server is not None
        address = None if listen is None else host_and_port(listen, "--listen")
        findings = _shown(examine_server(server, study_path(study, server), address), json_)
    failed = sum(not finding.ok for finding in findings)
    if json_:
        print_json({"failed": failed, "checks": [finding.__dict__ for finding in findings]})
    else:
        _say(f"{len(findings)} checks, {failed} failed")
    raise typer.Exit(min(failed, MOST))


def _shown(findings: Iterable[Finding], json_: bool) -> list[Any]:
    """Print each as it comes, since some take a while."""
    seen = []
    for finding in findings:
        seen.append(finding)
        if not json_:
            _say(f"{'ok  ' if finding.ok else 'FAIL'} {finding.check}: {finding.found}")
            if finding.mend:
                _say(f"       mend: {finding.mend}")
    return seen


def _say(text: str) -> None:
    out.print(text, highlight=False, soft_wrap=True)

"""``secfacmic keys``: the study's CKKS and MAC key, made at one site and sealed to all."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from secure_fed.cli.output import SITE_HELP, Json, out, print_json

if TYPE_CHECKING:
    from secure_fed.protocol.sealed_key import SealedKeyHeader

app = typer.Typer(help="The study's key: make, take, rotate, show.", no_args_is_help=True)

StudyPath = Annotated[Path, typer.Argument(metavar="STUDY", help="The study's study.toml.")]
SitePath = Annotated[Path, typer.Option("--site", help=SITE_HELP)]
OutFile = Annotated[Path, typer.Option("--out", help="The sealed key file to write; it may travel over the server.")]


@app.command()
def create(study: StudyPath, site: SitePath, into: OutFile) -> None:
    """Make a key for a new run and seal it to all sites; at the study's key maker only."""
    from secure_fed.operate.study_keys import create_key

    _tell_sealed(create_key(site, study, into), into, site)


@app.command()
def rotate(
    study: StudyPath,
    site: SitePath,
    into: OutFile,
    remove: Annotated[list[str] | None, typer.Option(help="A site that leaves.")] = None,
    add: Annotated[list[Path] | None, typer.Option(metavar="NAME.pub", help="A site that joins to train.")] = None,
    authority: Annotated[
        Path | None, typer.Option(metavar="ca.crt", help="The authority that sites trust alone from then on.")
    ] = None,
) -> None:
    """Make the key that replaces the one of the current run; at the study's key maker only.

    The coordinator brings it into force with: secfacmic study amend STUDY FILE --state DIR
    """
    from secure_fed.operate.study_keys import rotate_key
    from secure_fed.privacy.keys import read_public_identity

    joining = [read_public_identity(path) for path in add or []]
    _tell_sealed(rotate_key(site, study, into, joining, remove or (), authority), into, site)


@app.command()
def accept(
    sealed: Annotated[Path, typer.Argument(metavar="FILE", help="The sealed key file.")], site: SitePath
) -> None:
    """Take a sealed key at a site, after checking its maker, study and epoch."""
    from secure_fed.operate.study_keys import accept_key

    _tell(accept_key(site, sealed), site)


@app.command()
def show(site: SitePath, json_: Json = False) -> None:
    """Show which keys a site holds, for whom they are, and since when."""
    from secure_fed.operate.study_keys import held_keys

    held = held_keys(site)
    if json_:
        print_json(
            [
                {
                    "epoch": epoch,
                    "key": header.key,
                    "previous": header.previous,
                    "sites": list(header.recipients),
                    "authority": header.authority,
                    "made": _made(header),
                }
                for epoch, header in held.items()
            ]
        )
        return
    table = Table("epoch", "fingerprint", "sites", "made")
    for epoch, header in held.items():
        table.add_row(str(epoch), fingerprint(header.key), ", ".join(header.recipients), _made(header))
    out.print(table)


def _made(header: SealedKeyHeader) -> str:
    return datetime.fromtimestamp(header.created_ms / 1000, UTC).isoformat(timespec="seconds")


def fingerprint(key: str) -> str:
    """A key id to read out by phone: its first 32 hex digits in groups of four."""
    return " ".join(key[start : start + 4] for start in range(0, 32, 4))


def _tell_sealed(header: SealedKeyHeader, into: Path, site: Path) -> None:
    out.print(f"{into}: sealed to {', '.join(header.recipients)}", highlight=False, soft_wrap=True)
    _tell(header, site)


def _tell(header: SealedKeyHeader, site: Path) -> None:
    from secure_fed.clients.sitefile import read_site
    from secure_fed.protocol.sealed_key import exact_warning

    out.print(f"epoch {header.epoch}, fingerprint {fingerprint(header.key)}", highlight=False, soft_wrap=True)
    out.print("compare the fingerprint with the other sites by phone", highlight=False, soft_wrap=True)
    if header.authority is not None:
        out.print(
            f"from this key on the server is trusted by the certificate of one authority alone, SHA-256 "
            f"{header.authority}: compare it with the new ca.crt, and append that to the file that {site} names as "
            "authority, before the key is in force",
            highlight=False,
            soft_wrap=True,
        )
    warning = exact_warning(read_site(site, None)[1].study, header)
    if warning is not None:
        out.print(warning, highlight=False, soft_wrap=True)

"""``secfacmic keys``: the study's CKKS and tag key, made at one site and sealed to all."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from secure_fed.cli.output import Json, out, print_json

if TYPE_CHECKING:
    from secure_fed.clients.keyring import KeyRing
    from secure_fed.clients.sitefile import SiteFile
    from secure_fed.privacy.keys import Identity
    from secure_fed.protocol.study import AgreedStudy

app = typer.Typer(help="The study's key: make, take, rotate, show.", no_args_is_help=True)

StudyFile = Annotated[Path, typer.Argument(metavar="STUDY", help="The study's study.toml.")]
SitePath = Annotated[Path, typer.Option("--site", help="This site's site.toml.")]
OutFile = Annotated[Path, typer.Option("--out", help="The sealed key file to write; it may travel over the server.")]


@app.command()
def create(study: StudyFile, site: SitePath, into: OutFile) -> None:
    """Make a key for a new run and seal it to all sites; at the study's key maker only."""
    from secure_fed.privacy.keys import create_sealed_key

    agreed, _, identity, ring = _open(site, study)
    sealed = create_sealed_key(agreed, identity, ring.newest[0] + 1)
    _keep(ring, sealed, into)


@app.command()
def rotate(
    study: StudyFile,
    site: SitePath,
    into: OutFile,
    remove: Annotated[list[str] | None, typer.Option(help="A site that leaves.")] = None,
    add: Annotated[list[Path] | None, typer.Option(metavar="NAME.pub", help="A site that joins to train.")] = None,
) -> None:
    """Make the key that replaces the one of the current run; at the study's key maker only.

    The coordinator brings it into force with: secfacmic study amend STUDY FILE --state DIR
    """
    from secure_fed.clients.site import Site
    from secure_fed.privacy.keys import create_sealed_key, read_public_identity
    from secure_fed.protocol.study import StudySite

    agreed, file, identity, ring = _open(site, study)
    here = Site(file, agreed)
    public = [read_public_identity(path) for path in add or []]
    joining = tuple(StudySite(name=entry.name, keys=entry.keys) for entry in public)
    sealed = create_sealed_key(
        agreed, identity, ring.newest[0] + 1, here.key_in_force, here.members, joining, tuple(remove or ())
    )
    _keep(ring, sealed, into)


@app.command()
def accept(
    sealed: Annotated[Path, typer.Argument(metavar="FILE", help="The sealed key file.")], site: SitePath
) -> None:
    """Take a sealed key at a site, after checking its maker, study and epoch."""
    from secure_fed.core.errors import KeyFileError

    *_, ring = _open(site)
    try:
        data = sealed.read_bytes()
    except OSError as error:
        raise KeyFileError(f"{sealed}: cannot be read ({error.strerror}); expected a sealed key file") from error
    header = ring.accept(data)
    _tell(header.epoch, header.key)


@app.command()
def show(site: SitePath, json_: Json = False) -> None:
    """Show which keys a site holds, for whom they are, and since when."""
    *_, ring = _open(site)
    rows = [
        {
            "epoch": epoch,
            "key": header.key,
            "previous": header.previous,
            "sites": list(header.recipients),
            "made": datetime.fromtimestamp(header.created_ms / 1000, UTC).isoformat(timespec="seconds"),
        }
        for epoch, header in ring.headers.items()
    ]
    if json_:
        print_json(rows)
        return
    table = Table("epoch", "fingerprint", "sites", "made")
    for epoch, header in ring.headers.items():
        made = datetime.fromtimestamp(header.created_ms / 1000, UTC).isoformat(timespec="seconds")
        table.add_row(str(epoch), fingerprint(header.key), ", ".join(header.recipients), made)
    out.print(table)


def fingerprint(key: str) -> str:
    """A key id to read out by phone: its first 32 hex digits in groups of four."""
    return " ".join(key[start : start + 4] for start in range(0, 32, 4))


def _open(site: Path, study: Path | None = None) -> tuple[AgreedStudy, SiteFile, Identity, KeyRing]:
    """The site's study, file, identity and keys; the study must be the one that its file names."""
    from secure_fed.clients.keyring import KeyRing
    from secure_fed.clients.sitefile import read_site_file
    from secure_fed.core.errors import SiteFileError
    from secure_fed.privacy.keys import load_identity
    from secure_fed.protocol.study import load_study

    file = read_site_file(site)
    agreed = load_study(Path(file.study))
    if study is not None and load_study(study).study.id != agreed.study.id:
        raise SiteFileError(f"{site}: is for study {file.study}, another than {study}; name the same study in both")
    identity = load_identity(Path(file.identity), file.site)
    return agreed, file, identity, KeyRing(Path(file.state) / "keys", agreed, identity)


def _keep(ring: KeyRing, sealed: bytes, into: Path) -> None:
    """Write the file for the others first: a key that only the maker holds would be of no use."""
    from secure_fed.core.storage import write_durable

    write_durable(into, sealed)
    header = ring.accept(sealed)
    out.print(f"{into}: sealed to {', '.join(header.recipients)}", highlight=False, soft_wrap=True)
    _tell(header.epoch, header.key)


def _tell(epoch: int, key: str) -> None:
    out.print(f"epoch {epoch}, fingerprint {fingerprint(key)}", highlight=False, soft_wrap=True)
    out.print("compare the fingerprint with the other sites by phone", highlight=False, soft_wrap=True)

"""``secfacmic site``: a site's identity."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from secure_fed.cli.output import out

app = typer.Typer(help="A site's identity.", no_args_is_help=True)


@app.callback()
def _noun() -> None:
    """A site's identity."""


@app.command()
def init(
    name: Annotated[str, typer.Argument(help="The site's name in the study.")],
    folder: Annotated[Path, typer.Option("--out", help="Folder for the keys; they never leave it.")] = Path("identity"),
    passphrase: Annotated[bool, typer.Option(help="Ask for a passphrase that encrypts the private keys.")] = False,
) -> None:
    """Make the site's keys and the public file to send to the coordinator."""
    from privacy.keys import create_identity

    chosen = typer.prompt("passphrase", hide_input=True, confirmation_prompt=True, err=True) if passphrase else ""
    create_identity(folder, name, chosen)
    out.print(f"send this file to the coordinator: {folder / name}.pub", highlight=False, soft_wrap=True)

"""``secfacmic phantoms``: generated images to try everything on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from secure_fed.cli.output import out

app = typer.Typer(help="Generated images to try everything on.", no_args_is_help=True)


@app.callback()
def _noun() -> None:
    """Generated images to try everything on."""


@app.command()
def make(
    folder: Annotated[Path, typer.Argument(help="Gets one folder a site; new, or with phantoms alone.")],
    sites: Annotated[int, typer.Option(min=1, help="How many sites.")] = 4,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the images.")] = 0,
    masks: Annotated[bool, typer.Option(help="Also masks of the lesions, and a column that names them.")] = False,
) -> None:
    """Generate head-MRI-like slices of several sites, with manifests."""
    from secure_fed.lab.phantoms import default_sites, make_phantoms, refuse_others

    made = default_sites(sites)
    refuse_others(folder)
    make_phantoms(folder, made, seed, masks=masks)
    out.print(f"{folder}: phantoms of {', '.join(site.name for site in made)}", highlight=False, soft_wrap=True)

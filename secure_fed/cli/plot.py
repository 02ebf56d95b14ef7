"""``secfacmic plot``: pictures of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from secure_fed.cli.output import Json, console, out, print_json


def plot(
    folder: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="The folder of a finished simulate or demo; or a site's, or its site.toml."),
    ],
    into: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Folder for the pictures; DIR/plots if not given.")
    ] = None,
    json_: Json = False,
) -> None:
    """Draw learning curves, confusion matrices, calibration and the features before and after the adapter, as PNG."""
    from secure_fed.clients.sitefile import site_file_in
    from secure_fed.operate.plots import plot_run, plot_site

    of_a_site = site_file_in(folder).is_file()
    into = (folder if folder.is_dir() else folder.parent) / "plots" if into is None else into
    with console.status("drawing"):
        written = (plot_site if of_a_site else plot_run)(folder, into)
    local = ""
    if of_a_site:
        from secure_fed.clients.budget import LOCAL, unpaid
        from secure_fed.clients.sitefile import read_site_file

        local = LOCAL if unpaid(read_site_file(folder)) else ""
    if json_:
        print_json({"files": [str(path) for path in written], "local": local})
        return
    if local:
        out.print(local, highlight=False, soft_wrap=True)
    for path in written:
        out.print(str(path), highlight=False, soft_wrap=True)

"""``secfacmic export``: hand an adapter on, with a model card."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from secure_fed.cli.output import Json, out, print_json


def export(
    into: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder that gets the files.")],
    site: Annotated[
        Path | None, typer.Option(help="site.toml, or the folder, of the site whose adapter it is.")
    ] = None,
    run: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Instead: the folder of a finished simulate or demo.")
    ] = None,
    onnx: Annotated[bool, typer.Option("--onnx", help="Also adapter.onnx: image features to probabilities.")] = False,
    own_results: Annotated[
        bool,
        typer.Option(
            "--own-results",
            help="With patients' data: also metrics and temperature, which are made of them; not under a budget.",
        ),
    ] = False,
    json_: Json = False,
) -> None:
    """Write the adapter as safetensors with a model card: where it comes from, what it claims, what it is not for."""
    from secure_fed.operate.export import export_run, export_site

    if (site is None) == (run is None):
        raise typer.BadParameter("expected one of --site and --run")
    if site is not None:
        written = export_site(site, into, onnx=onnx, own_results=own_results)
    else:
        assert run is not None
        written = export_run(run, into, onnx=onnx)
    if json_:
        print_json({"files": [str(path) for path in written]})
        return
    for path in written:
        out.print(f"{path}: {path.stat().st_size} bytes", highlight=False, soft_wrap=True)

"""``secfacmic report``: results as a page, as Markdown, as CSV or as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from secure_fed.cli.output import console
from secure_fed.cli.output import out as stdout


def report(
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="DIR...", help="Folders of simulate, demo, sweep or attack, or a site's folder or site.toml."
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="The file; else report.html (.md, .csv, .png) in the first folder.")
    ] = None,
    form: Annotated[
        str | None, typer.Option("--format", help="html, md, csv or png; else by the file's ending, or html.")
    ] = None,
    figures: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Also figures as SVG and PDF, and tables as LaTeX and CSV, into a folder."),
    ] = None,
    local_metrics: Annotated[
        bool,
        typer.Option(
            "--local-metrics",
            help="Show a site's metrics that no privacy budget paid for; the report must then stay there.",
        ),
    ] = False,
) -> None:
    """Write one self-contained report of results: what to choose, what it costs, who pays, how to make it again."""
    from secure_fed.report import FORMATS, write_report

    wanted = form or (out.suffix.removeprefix(".") if out is not None and out.suffix else "html")
    chosen = next((one for one in FORMATS if one == wanted), None)
    if chosen is None:
        raise typer.BadParameter(f"{wanted}: expected one of {', '.join(FORMATS)}", param_hint="--format")
    # A site is named by its folder or its site.toml, as to every command.
    folders = [named.parent if named.name == "site.toml" and named.is_file() else named for named in folders]
    path = out or folders[0] / f"report.{chosen}"
    analysis = write_report(folders, path, chosen, local_metrics=local_metrics)
    if analysis.results.local_only:
        console.print("the report holds this site's own metrics: it must not leave the site", highlight=False)
    stdout.print(str(path), highlight=False, soft_wrap=True)
    if figures is not None:
        from secure_fed.report.figures import sections
        from secure_fed.report.papers import write_papers

        write_papers(sections(analysis), figures)
        stdout.print(str(figures), highlight=False, soft_wrap=True)

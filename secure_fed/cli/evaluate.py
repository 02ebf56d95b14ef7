"""``secfacmic evaluate``: an adapter against images whose labels are known."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.table import Table

from secure_fed.cli.output import AdapterPath, Checkpoint, Device, Json, SkipUnreadable, console, out, print_json
from secure_fed.cli.pictures import LeaveOut, MostPixels, Slices, choice, most, tell_pictures

if TYPE_CHECKING:
    from secure_fed.report import chart


def evaluate(
    adapter: AdapterPath,
    images: Annotated[
        Path, typer.Option(metavar="DIR", help="Labelled images: a manifest.csv with labels, or a folder a class.")
    ],
    by: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Of the manifest: metrics for each of its values too.")
    ] = None,
    split: Annotated[
        Literal["train", "val", "test", "all"] | None,
        typer.Option(help="Of a manifest with splits, which images; test if not given."),
    ] = None,
    figures: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Figures as SVG and PDF, tables as LaTeX and CSV, into a folder.")
    ] = None,
    checkpoint: Checkpoint = None,
    skip_unreadable: SkipUnreadable = False,
    most_pixels: MostPixels = None,
    slices: Slices = None,
    leave_out: LeaveOut = None,
    device: Device = None,
    json_: Json = False,
) -> None:
    """All metrics of an adapter on labelled images, with intervals by patient, by class and by a column.

    Images that the adapter was trained on make its figures too good: of a manifest with splits, those of test count.
    """
    from secure_fed.model.device import choose_device
    from secure_fed.operate.evaluate import evaluate_folder
    from secure_fed.report.evaluation import evaluation_sections

    with console.status("loading the backbone") as status:
        found = evaluate_folder(
            adapter,
            images,
            by,
            checkpoint,
            skip_unreadable=skip_unreadable,
            most_pixels=most(most_pixels),
            choice=choice(slices, leave_out),
            device=choose_device(device or "auto"),
            progress=lambda done, total: status.update(f"{done} of {total} images"),
            split=split,
        )
    sections = evaluation_sections(found)
    if json_:
        print_json(found.document() | {"local": found.said.local})
    for section in () if json_ else sections:
        for text in (section.title, section.finding):
            if text:
                out.print(text, highlight=False, soft_wrap=True)
        for table in section.tables:
            out.print(_shown(table))
        for note in section.notes:
            out.print(note, highlight=False, soft_wrap=True)
    if found.said.local and not json_:
        out.print(found.said.local, highlight=False, soft_wrap=True)
    tell_pictures(found.said)
    if found.unlabelled:
        console.print(f"{found.unlabelled} images without a label count in nothing", highlight=False, soft_wrap=True)
    if figures is not None:  # last: what was found is told though its figures have no room
        from secure_fed.report.papers import write_papers

        written = write_papers(sections, figures)
        console.print(f"{figures}: {len(written)} files", highlight=False, soft_wrap=True)


def _shown(table: chart.Table) -> Table:
    """A table for a terminal of 80 columns: where it has several intervals, each is below its figure."""
    shown = Table(title=table.caption)
    joined = table.columns.count("low") > 1
    kept = [place for place, name in enumerate(table.columns) if not (joined and name in ("low", "high"))]
    for place in kept:
        shown.add_column(table.columns[place], justify="right" if table.numeric[place] else "left", overflow="fold")
    for row in table.rows:
        texts = [one.text for one in row]
        for place in kept:
            if joined and table.columns[place + 1 : place + 2] == ("low",) and row[place].value is not None:
                texts[place] += f"\n{texts[place + 1]} to {texts[place + 2]}"
        shown.add_row(*(texts[place] for place in kept))
    return shown

"""``secfacmic data``: a site's images, before and after they are trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Task as RichTask
from rich.table import Table
from rich.text import Text

from secure_fed.cli.output import Json, console, out, print_json

app = typer.Typer(help="A site's images.", no_args_is_help=True)

SiteToml = Annotated[Path, typer.Option(help="The site's site.toml.")]


@app.command()
def check(site: SiteToml, json_: Json = False) -> None:
    """Count, decode and compare all images; ends with an error if the splits leak.

    Interrupted, the same command goes on from there.
    """
    from secure_fed.clients.data_check import check_data, refuse_leaks
    from secure_fed.clients.sitefile import read_site

    file, agreed = read_site(site)
    with progress("checking images") as tell:
        report = check_data(file, agreed, tell)
    if json_:
        print_json(report)
    else:
        _show(report)
    refuse_leaks(file, report["leaks"])


@app.command()
def forget(
    patient: Annotated[str, typer.Argument(help="The id in the manifest; the path, where an image is a patient.")],
    site: SiteToml,
    json_: Json = False,
) -> None:
    """Take back of a patient what this site can; stop its client first.

    What was aggregated, and adapters that were made of it, cannot be taken back: docs/data.md.
    """
    from secure_fed.clients.erasure import forget as forget_patient
    from secure_fed.clients.sitefile import read_site

    file, agreed = read_site(site)
    done = forget_patient(file, agreed, patient)
    if json_:
        print_json(
            {
                "images_in_data_folder": done.images,
                "images_dropped_from_cache": done.features,
                "updates_dropped": list(done.rounds),
                "private_heads_dropped": done.heads,
                "data_folder_unread": done.unread,
            }
        )
        return
    say(f"the patient has {done.images} images in the data folder; from now on they are passed over")
    if done.unread:
        say(f"the data folder cannot be read, so the whole feature cache was dropped: {done.unread}")
    say(f"dropped from the feature cache: {done.features} images (with any that the data folder no longer has)")
    for update in done.rounds:
        say(f"dropped the update of {update}, and whatever privacy budget it cost stays spent")
    say("not taken back: aggregates that other sites have applied, and adapters that were released (docs/data.md)")


def say(line: str) -> None:
    """One line on stdout."""
    out.print(line, markup=False, highlight=False, soft_wrap=True)


def _show(report: dict[str, Any]) -> None:
    table = Table("class", "train", "val", "test")
    for name, counts in report["classes"].items():
        table.add_row(escape(name), *(str(counts[split]) for split in ("train", "val", "test")))
    out.print(table)
    patients = report["patients"]
    say(f"{report['images']} images of {patients['all']} patients; {report['unlabelled']} without a label")
    say("patients: " + ", ".join(f"{split} {patients[split]}" for split in ("train", "val", "test", "unlabelled")))
    for name in report["missing_classes"]:
        say(f"no labelled image of class {name}")
    for key, text in (("exact_copies", "exact copies"), ("near_twins", "near twins")):
        found = report[key]
        say(f"{text}: {found['groups']} groups, {found['images']} images; {found['across_splits']} across splits")
        for group in found["listed"]:
            say("  " + ", ".join(f"{image['path']} ({image['split']})" for image in group))
    size = report["backbone_size"]
    far = "unknown" if size is None else f"{size} x {size}"
    for key, text in (("unreadable", "unreadable"), ("far_from_size", f"far from the backbone's size, {far}")):
        say(f"{text}: {report[key]['count']}")
        for line in report[key]["listed"]:
            say(f"  {line}")


class _Rate(ProgressColumn):
    """Images a second."""

    def render(self, task: RichTask) -> Text:
        """Empty before anything was done."""
        return Text("" if not task.speed else f"{task.speed:,.0f} images/s")


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr with rate and time left; gives the function to tell it how far things are."""
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(what, total=None)

        def tell(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield tell

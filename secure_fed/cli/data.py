"""``secfacmic data``: a site's images, before and after they are trained on."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Task as RichTask
from rich.table import Column, Table
from rich.text import Text

from secure_fed.cli.output import SITE_HELP, Json, command_line, console, out, print_json

app = typer.Typer(help="A site's images.", no_args_is_help=True)

ODD = {
    "blank": "without contrast",
    "tiny": "tiny",
    "colour": "in colour, where most are grey",
    "unlike": "much darker or brighter than the others",
    "noted": "shown, though their files say what cannot be followed",
}
"""What is odd about pictures, by its name in the report."""

SiteToml = Annotated[Path, typer.Option(help=SITE_HELP)]


@app.command()
def check(
    folders: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[DIR]...", help="Without a study: folders of images, checked against each other."),
    ] = None,
    site: Annotated[Path | None, typer.Option(help=SITE_HELP)] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Also a page with pictures, to look at.")] = None,
    propose: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write a manifest for the one DIR: to be completed, and put into it."),
    ] = None,
    json_: Json = False,
) -> None:
    """Count, decode and compare all images; ends with an error if the splits leak.

    Of a site's study (--site), or of folders before there is one. Interrupted, the first goes on from there.
    """
    if bool(folders) == (site is not None) or (propose and len(folders or ()) != 1) or (html and site is None):
        raise typer.BadParameter("expected --site (perhaps with --html), or folders (one of them, with --propose)")
    if site is None:
        _check_folders(folders or [], propose, json_)
        return
    from secure_fed.clients.budget import LOCAL, unpaid
    from secure_fed.clients.data_check import check_data, refuse_leaks
    from secure_fed.clients.sitefile import read_site

    if html is not None:
        from secure_fed.core.storage import refuse_foreign
        from secure_fed.report.page import is_page

        refuse_foreign(html, is_page)
    file, agreed = read_site(site)
    with progress("checking images") as tell:
        report = check_data(file, agreed, tell)
    report["local"] = LOCAL if unpaid(file) else ""
    if html is not None:
        from secure_fed.clients.rules import Rules
        from secure_fed.report.data_page import write_data_page

        rules = Rules.of(agreed.study, file.data.most_pixels)
        write_data_page(report, rules, Path(file.data.folder), html)
    if json_:
        print_json(report)
    else:
        _show(report)
        if report["local"]:
            out.print(report["local"], highlight=False, soft_wrap=True)
    refuse_leaks(file, report["leaks"])


def _check_folders(paths: list[Path], propose: Path | None, json_: bool) -> None:
    from secure_fed.clients.data_check import LISTED
    from secure_fed.operate.folders import compare, facts, look_at, names_of, propose_manifest

    if propose is not None:
        done = propose_manifest(paths[0], propose)
        if json_:
            print_json(done)
            return
        say(f"{propose}: {done['rows']} images, {done['without_patient']} without a patient, "
            f"{done['without_label']} without a label")  # fmt: skip
        say(f"complete it, and put it into {paths[0]} as manifest.csv; a column split (train, val, test) may be added")
        return
    found = [look_at(path) for path in paths]
    with progress("comparing images") as tell:
        common, unreadable = compare(found, tell)
    inside = [common.inside[name] for name in names_of(found).values()]
    told = [facts(folder) | one.document() for folder, one in zip(found, inside, strict=True)]
    if json_:
        print_json({"folders": told, "unreadable": unreadable, "in_common": common.document()})
    else:
        classes = sorted({name for one in told for name in one["classes"]})
        counts = [[f"{one['classes'].get(name, 'no')} {name}" for name in classes] for one in told]
        longest = max((len(line) for lines in counts for line in lines), default=0)
        # Whole in any width: what is long breaks its lines anywhere, but names of classes only if nothing else helps.
        table = Table(
            Column("folder", overflow="fold"),
            Column("images", no_wrap=True),
            Column("patients", no_wrap=True),
            Column("of each class", overflow="fold", no_wrap=longest <= 24),
            "without a label",
            Column("splits", overflow="fold"),
        )
        for one, lines in zip(told, counts, strict=True):
            patients = str(one["patients"]) if one["unit"] == "patient" else "not said"
            table.add_row(
                one["folder"], str(one["images"]), patients, "\n".join(lines), str(one["without_label"]), one["splits"]
            )
        out.print(table)
        for one in told:
            for line in one["told"]:
                say(line)
            if one["passed_over"]:
                say(f"{one['folder']}: passed over, as no images: {one['passed_over']}")
        for line in unreadable[:LISTED]:
            say(f"cannot be decoded: {line}")
        if len(unreadable) > LISTED:
            say(f"cannot be decoded: {len(unreadable) - LISTED} more; --json has all")
        for path, own in zip(paths, inside, strict=True):
            for line in own.words:
                say(f"{path}: {line}")
        for line in common.words:
            say(line)
        for path in paths:
            if not (path / "manifest.csv").exists():
                propose_one = command_line("data", "check", path, "--propose", "FILE")
                say(f"{path}: no manifest; to say whose images they are: {propose_one}")
        if not list(common.words) and len(paths) > 1:
            say("these folders have no picture in common")
    common.refuse_leaks()
    common.refuse_leaks_inside()


@app.command()
def fetch(
    dicomweb: Annotated[str, typer.Option(metavar="URL", help="Root of the archive's DICOMweb service.")],
    into: Annotated[Path, typer.Option("--out", metavar="DIR", help="Data folder: new, empty, or of the same query.")],
    query: Annotated[
        list[str] | None,
        typer.Option(metavar="KEYWORD=VALUE", help="What to fetch, as in StudyDate=20240101-20241231; once a keyword."),
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(metavar="FILE", help="CSV of label and accession or patient, joined to the images.")
    ] = None,
    token_file: Annotated[
        Path | None, typer.Option(help="File with the archive's token; else SECFACMIC_DICOMWEB_TOKEN is looked at.")
    ] = None,
    ca: Annotated[Path | None, typer.Option(help="Certificate of the archive's authority, PEM.")] = None,
    proxy: Annotated[str | None, typer.Option(metavar="URL", help="HTTP proxy on the way to the archive.")] = None,
    rate: Annotated[float, typer.Option(min=0.01, max=1000, help="Most requests a second.")] = 20.0,
    yes: Annotated[bool, typer.Option("--yes", help="Fetch without asking; a terminal is asked otherwise.")] = False,
    json_: Json = False,
) -> None:
    """Fetch images from the hospital's archive into a data folder with a manifest.

    Says how many and how large before it begins. Interrupted, the same command goes on from there. Without a keyword of
    a study in --query, the studies of the table of labels are fetched.
    """
    from secure_fed.operate.dicomweb import Pacs, parse_query
    from secure_fed.operate.fetch import fetch as fetch_images
    from secure_fed.operate.fetch import plan_fetch, read_token
    from secure_fed.operate.labels import Labels

    try:
        wanted = parse_query(query or ())
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--query") from error
    if not wanted and labels is None:
        raise typer.BadParameter("expected --query, or --labels, or both: what is to be fetched?")
    table = None if labels is None else Labels.read(labels)
    for line in () if table is None else table.told:
        _tell(line)
    pacs = Pacs(dicomweb, token=read_token(token_file), authority=ca, proxy=proxy, rate=rate)
    if pacs.url.startswith("http:"):
        console.print(f"{pacs.url}: without TLS; whoever is on the way sees names and images")
    with progress("searching", "searches") as tell:
        plan = plan_fetch(pacs, wanted, table, into, tell)
    _show_plan(plan.document())
    if plan.absent and not yes and sys.stdin.isatty():
        typer.confirm("fetch them?", abort=True, err=True)
    with progress("fetching images") as tell:
        done = fetch_images(pacs, plan, tell)
    if json_:
        print_json(done.document())
    else:
        say(f"fetched {len(plan.absent) - len(done.lost)} images; {into / 'manifest.csv'} lists all that are there")
    if done.unlisted:
        _tell(f"{done.unlisted} files of an earlier fetch are not in the archive any more, and not in the manifest")
    done.refuse_gaps()


def _tell(line: str) -> None:
    """One line on stderr."""
    console.print(line, highlight=False, soft_wrap=True)


def _show_plan(plan: dict[str, Any]) -> None:
    _tell(
        f"found: {plan['images']} images in {plan['series']} series of {plan['studies']} studies, "
        f"{plan['patients']} patients"
    )
    for modality, count in sorted(plan["series_left_out"].items()):
        _tell(f"left out: {count} series of {modality}, which are no pictures")
    for key, count in sorted(plan["query_not_heeded"].items()):
        _tell(f"the archive did not heed {key}: {count} of its answers are of others, and left out")
    if plan["unpaged"]:
        _tell("the archive answers with everything at once and has no pages; taken as complete")
    if plan["images_without_patient"]:
        _tell(f"{plan['images_without_patient']} images have no PatientID")
    if plan["labels"] is not None:
        joined = plan["labels"]
        _tell(
            f"labels: {joined['rows_joined']} of {joined['rows']} rows joined; without a label: "
            f"{joined['images_without_label']} images of {len(joined['studies_without_label'])} studies"
        )
        for lines in (joined["rows_not_joined"], joined["studies_without_label"]):
            for line in lines[:10]:
                _tell(f"  {line}")
            if len(lines) > 10:
                _tell(f"  and {len(lines) - 10} more: fetch.json, or --json, has all")
    unknown = f" ({plan['sizes_unknown']} of unknown size)" if plan["sizes_unknown"] else ""
    _tell(
        f"to fetch: {plan['to_fetch']} images, at most about {_size(plan['bytes_at_most'])}{unknown}; "
        f"{_size(plan['bytes_free'])} are free"
    )
    if plan["bytes_at_most"] > plan["bytes_free"]:
        _tell("that is more than is free, unless the archive keeps them compressed; a full disk loses nothing")


def _size(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


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
    out.print(line, highlight=False, soft_wrap=True)


def duration(seconds: float) -> str:
    """About how long, in words."""
    if seconds < 120:
        return f"about {max(1, round(seconds))} s"
    return f"about {round(seconds / 60)} min" if seconds < 7200 else f"about {seconds / 3600:.1f} h"


def _show(report: dict[str, Any]) -> None:
    table = Table("class", "train", "val", "test", "unlabelled")
    for name, counts in report["classes"].items():
        table.add_row(name, *(str(counts[split]) for split in ("train", "val", "test")), "")
    table.add_row("without a label, or with one that is not looked at", "", "", "", str(report["unlabelled"]))
    out.print(table)
    patients = report["patients"]
    say(f"{report['images']} images of {patients['all']} patients; {report['unlabelled']} without a label")
    say("patients: " + ", ".join(f"{split} {patients[split]}" for split in ("train", "val", "test", "unlabelled")))
    for line in report["told"]:
        say(line)
    for doubt in report["doubts"]:
        say(f"doubt: {doubt['text']}; in splits {', '.join(doubt['splits'])}: {doubt['remedy']}")
    for kind, count in report["left_out"].items():
        say(f"left out, as site.toml says: {count} of kind {kind}")
    for kind, count in report["kinds"].items():
        say(f"among the images: {count} of kind {kind}; leave_out in [data] of site.toml leaves them out")
    for key in ("modalities", "scanners"):
        say(f"{key}: " + ", ".join(f"{name} {count}" for name, count in report[key].items()))
    for name in report["missing_classes"]:
        say(f"no labelled image of class {name}")
    for key, text in (("exact_copies", "exact copies"), ("near_twins", "near twins")):
        found = report[key]
        say(f"{text}: {found['groups']} groups, {found['images']} images; {found['across_splits']} across splits")
        for group in found["listed"]:
            say("  " + ", ".join(f"{image['path']} ({image['split']})" for image in group))
    encoding = report["encoding"]
    if encoding["seconds"] is None:
        say(f"how long encoding will take is not known: {encoding['reason']}")
    else:
        say(f"encoding, once, before the first round: {encoding['images']} images, {duration(encoding['seconds'])}")
    size = report["backbone_size"]
    far = "unknown" if size is None else f"{size} x {size}"
    listed = {"passed over": report["passed_over"], "unreadable": report["unreadable"]}
    listed |= {f"far from the backbone's size, {far}": report["far_from_size"]}
    listed |= {ODD[name]: files for name, files in report["odd"].items() if files["count"]}
    for text, files in listed.items():
        say(f"{text}: {files['count']}")
        for line in files["listed"]:
            say(f"  {line}")


class _Rate(ProgressColumn):
    """So many a second."""

    def __init__(self, unit: str) -> None:
        self._unit = unit
        super().__init__()

    def render(self, task: RichTask) -> Text:
        """Empty before anything was done."""
        return Text("" if not task.speed else f"{task.speed:,.0f} {self._unit}/s")


@contextmanager
def progress(what: str, unit: str = "images") -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr with rate and time left; gives the function to tell it how far things are."""
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), _Rate(unit), TimeRemainingColumn())
    bar = Progress(*columns, console=console)
    task = bar.add_task(what, total=None)

    def tell(done: int, total: int) -> None:
        bar.start()  # only now, and once: what is refused before has done nothing
        bar.update(task, completed=done, total=total)

    try:
        yield tell
    finally:
        if bar.live.is_started:
            bar.stop()

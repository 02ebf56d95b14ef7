"""``secfacmic explain-case``: why an adapter says what it says of an image, or of a folder of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from secure_fed.cli.output import AdapterPath, Checkpoint, Device, Json, SkipUnreadable, console, print_json
from secure_fed.cli.pictures import LeaveOut, MostPixels, Slices, choice, most, tell_pictures


def explain_case(
    adapter: AdapterPath,
    image: Annotated[Path, typer.Option(metavar="PATH", help="An image, DICOM included, or a folder of them.")],
    into: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Gets cases.html, cases.json and a picture a case.")
    ] = Path("cases"),
    site: Annotated[
        Path | None,
        typer.Option(help="A site.toml with similar_cases: show the nearest of its own training patients too."),
    ] = None,
    checkpoint: Checkpoint = None,
    skip_unreadable: SkipUnreadable = False,
    most_pixels: MostPixels = None,
    slices: Slices = None,
    leave_out: LeaveOut = None,
    device: Device = None,
    json_: Json = False,
) -> None:
    """Show where in an image a prediction's reasons lie, and what it rests on, as a page for doctors.

    Nothing of it is a diagnosis, and nothing of it leaves the site.
    """
    from secure_fed.model.device import choose_device
    from secure_fed.operate.explain import NOT_A_DIAGNOSIS, PAGE, explain, refuse_cases, write_cases
    from secure_fed.operate.predict import predict_folder
    from secure_fed.report.case_page import case_page

    refuse_cases(into)
    chosen = choose_device(device or "auto")
    with console.status("loading the backbone") as status:
        found = predict_folder(
            adapter,
            image,
            checkpoint=checkpoint,
            skip_unreadable=skip_unreadable,
            most_pixels=most(most_pixels),
            choice=choice(slices, leave_out),
            device=chosen,
            progress=lambda done, total: status.update(f"{done} of {total} images"),
        )
        explained = explain(
            found,
            checkpoint,
            site,
            chosen,
            progress=lambda done, total: status.update(f"{done} of {total} images explained"),
        )
    written = write_cases(explained, case_page(explained), into)
    if json_:
        print_json(explained.document())
    tell_pictures(found)
    if found.local:
        console.print(f"calibrated here: {found.local}", highlight=False, soft_wrap=True)
    strangers = sum(bool(case.said.get("stranger")) for case in explained.cases)
    if strangers:
        console.print(
            f"{strangers} of {len(explained.cases)} images are strangers, like none that the study was calibrated on: "
            "no reasons are shown for them",
            soft_wrap=True,
        )
    console.print(
        f"{into / PAGE}: {len(explained.cases)} cases; {len(written)} files, made of the images: keep them as "
        f"you keep these. {NOT_A_DIAGNOSIS}",
        highlight=False,
        soft_wrap=True,
    )

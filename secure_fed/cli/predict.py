"""``secfacmic predict``: an adapter at work."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from secure_fed.cli.output import AdapterPath, Checkpoint, Device, Json, SkipUnreadable, console, print_json
from secure_fed.cli.pictures import LeaveOut, MostPixels, Slices, choice, most, tell_pictures

if TYPE_CHECKING:
    from secure_fed.clients.data import SiteImage


def predict(
    adapter: AdapterPath,
    images: Annotated[Path, typer.Option(metavar="DIR", help="Folder of images, DICOM included; searched whole.")],
    study: Annotated[Path | None, typer.Option(help="A study.toml; refuse an adapter of any other study.")] = None,
    checkpoint: Checkpoint = None,
    into: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="Write to a file, not to stdout.")] = None,
    form: Annotated[Literal["csv", "json"], typer.Option("--format", help="Of what is written.")] = "csv",
    dicom_sr: Annotated[
        Path | None,
        typer.Option("--dicom-sr", metavar="DIR", help="Also a DICOM structured report a patient, into a folder."),
    ] = None,
    maps: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Of a memory of normal images: also a heat map an image, into a folder."),
    ] = None,
    skip_unreadable: SkipUnreadable = False,
    most_pixels: MostPixels = None,
    slices: Slices = None,
    leave_out: LeaveOut = None,
    device: Device = None,
    json_: Json = False,
) -> None:
    """Calibrated probabilities of each class for every image of a folder, and for every patient."""
    import json

    from secure_fed.clients.patients import some
    from secure_fed.core.storage import make_folder, refuse_foreign, write_durable
    from secure_fed.model.adapter_file import load_adapter
    from secure_fed.model.device import choose_device
    from secure_fed.operate.predict import (
        is_prediction,
        predict_folder,
        refuse_other_maps,
        refuse_products,
        write_maps,
        write_reports,
    )

    def among(found: list[SiteImage]) -> list[SiteImage]:
        if maps is not None:
            refuse_other_maps(found, images if images.is_dir() else images.parent, maps)
        return found

    if into is not None:
        refuse_foreign(into, is_prediction)
    # What cannot be made is known before any image is encoded.
    refuse_products(load_adapter(adapter), maps=maps is not None, reports=dicom_sr is not None)
    if dicom_sr is not None:
        make_folder(dicom_sr, 0o700)
    with console.status("loading the backbone") as status:
        found = predict_folder(
            adapter,
            images,
            study,
            checkpoint,
            skip_unreadable=skip_unreadable,
            most_pixels=most(most_pixels),
            choice=choice(slices, leave_out),
            device=choose_device(device or "auto"),
            progress=lambda done, total: status.update(f"{done} of {total} images"),
            among=among,
        )
    document = found.document()
    text = found.csv() if form == "csv" else json.dumps(document, indent=2) + "\n"
    drawn = None if maps is None else write_maps(found, maps)
    reports = None if dicom_sr is None else write_reports(found, dicom_sr)
    if into is not None:
        write_durable(into, text.encode())
    if json_:
        print_json(document)
    elif into is None:
        typer.echo(text, nl=False)
    tell_pictures(found)
    unknown = sum(not image.patient for image in found.images)
    if unknown and unknown < len(found.images):
        console.print(f"{unknown} images are of nobody known, and in no patient's row", highlight=False, soft_wrap=True)
    if document.get("never_predicted"):
        names = ", ".join(document["never_predicted"])
        console.print(
            f"never predicted, for too few patients in the study's sum: {names}", highlight=False, soft_wrap=True
        )
    if reports is not None:
        console.print(f"{dicom_sr}: {reports[0]} structured reports", highlight=False, soft_wrap=True)
        if reports[1]:
            console.print(
                f"no report for {reports[1]} patients: none of their images is DICOM with identifiers and a standard "
                "class, or their id is none that DICOM can have",
                soft_wrap=True,
            )
        if reports[3]:
            console.print(
                f"no report for {reports[3]} patients: all of their images are strangers, of which nothing is claimed",
                highlight=False,
                soft_wrap=True,
            )
        if reports[2]:
            console.print(
                f"no report for {len(reports[2])} ids that may be several persons: {some(map(repr, reports[2]))}; "
                "mend the ids, or settle each in patients.csv beside the images",
                highlight=False,
                soft_wrap=True,
            )
    if drawn is not None:
        scale = "" if found.anomalies is None else f"; {found.anomalies.scale.words}"
        console.print(
            f"{maps}: {drawn} heat maps, made of the images: keep them as you keep these{scale}",
            highlight=False,
            soft_wrap=True,
        )
    if found.anomalies is not None:
        limit = (
            f"no threshold: {document['why_no_threshold']}"
            if document["threshold"] is None
            else (
                f"{sum(bool(image['flagged']) for image in document['images'])} of {len(document['images'])} images "
                f"are flagged; at most {100 * document['false_alarms']:g} % of normal patients like the "
                f"{document['calibration_patients']} of the study would be, by any of their images"
            )
        )
        console.print(limit, highlight=False, soft_wrap=True)
        if into is not None:
            console.print(f"{into}: {len(found.images)} images", highlight=False, soft_wrap=True)
        return
    if not document["calibrated"]:
        console.print(
            "not calibrated: there is no calibration.safetensors of this adapter beside it",
            highlight=False,
            soft_wrap=True,
        )
    if found.local:
        console.print(f"calibrated here: {found.local}", highlight=False, soft_wrap=True)
    if document["coverage"] is not None:
        flags = [image["stranger"] for image in document["images"]]
        strangers = (
            "no image can be told to be like none of them: they are too few, or lie too far apart"
            if None in flags
            else f"{sum(flags)} of {len(flags)} images are like none of them"
        )
        console.print(
            f"sets hold the class of {100 * document['coverage']['promised']:g} % of patients like the "
            f"{document['coverage']['calibration_patients']} calibration patients of the study; {strangers}",
            highlight=False,
            soft_wrap=True,
        )
    if into is not None:
        console.print(f"{into}: {len(found.images)} images", highlight=False, soft_wrap=True)

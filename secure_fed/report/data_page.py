"""What ``data check`` found, as one page to look at and to print: counts, odd pictures, leaks, what is left out.

The page loads nothing and holds pictures and ids of patients: it is the site's own.
"""

from __future__ import annotations

import base64
import io
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from secure_fed.clients.nifti import AXES
from secure_fed.clients.reading import Place, open_file, see
from secure_fed.clients.rules import Rules, UndecodableError
from secure_fed.core.storage import write_durable
from secure_fed.report.page import fill, source

SIDE = 144
"""Of a picture in the contact sheet, at most, in pixels."""

ODD = {
    "blank": ("Without contrast", "hardly any grey differs from the others"),
    "tiny": ("Tiny", "a side of so few pixels shows little"),
    "colour": ("Coloured among grey ones", "screenshots and photographs of a screen look so"),
    "unlike": ("Far brighter or darker than the others", "another window, an inverted picture, or a page of text"),
    "noted": ("With something in the file that cannot be followed", "shown without it"),
}

_WHICH = re.compile(r" \[(\w+) (\d+)\]$")
_SPLITS = ("train", "val", "test", "unlabelled")


def write_data_page(report: Mapping[str, Any], rules: Rules, folder: Path, out: Path) -> None:
    """Write the page, readable by its owner alone.

    Args:
        report: as :func:`secure_fed.clients.data_check.check_data` gives it.
        rules: how pictures are to be seen.
        folder: the data folder; paths in it are shown without it.
        out: the file.

    Raises:
        StorageError: it cannot be written.
    """
    write_durable(out, data_page(report, rules, folder).encode(), mode=0o600)


def data_page(report: Mapping[str, Any], rules: Rules, folder: Path) -> str:
    """The page as text; arguments as of :func:`write_data_page`."""
    return fill(
        "data.html",
        source("data.css"),
        "img-src data:; base-uri 'none'; form-action 'none'",
        report=report,
        splits=_SPLITS,
        counted=[
            (title, _shares(report[key]))
            for key, title in (("modalities", "Images by modality"), ("scanners", "Images by scanner"))
        ],
        sheets=[
            {"title": ODD[kind][0], "note": ODD[kind][1], "count": found["count"], "pictures": pictures}
            for kind, found in report["odd"].items()
            if (pictures := [_picture(line, rules, folder) for line in found["listed"]])
        ],
        left_out=_left_out(report, folder),
        copies=[
            (title, report[key], [_lines(group, folder) for group in report[key]["listed"]])
            for key, title in (("exact_copies", "Exact copies"), ("near_twins", "Near twins"))
        ],
        leaks=[line.replace(f"{folder}/", "") for line in report["leaks"]],
    )


def _shares(counts: Mapping[str, int]) -> list[tuple[str, int, float]]:
    """Names with their counts, and these as shares of the largest, most first."""
    most = max(counts.values(), default=1)
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [(name, count, round(100 * count / most, 1)) for name, count in ordered]


def _picture(line: str, rules: Rules, folder: Path) -> dict[str, str]:
    """One of the contact sheet: small, as a data URI; without one if it cannot be read any more."""
    name, note, path, place = _read(line)
    shown = {"path": name.removeprefix(f"{folder}/"), "note": note, "uri": "", "size": ""}
    try:
        image = see(open_file(path.read_bytes()), place, rules).image
    except (OSError, UndecodableError):
        return shown
    shown["size"] = f"{image.width} x {image.height}"
    small = image.convert("RGB")
    small.thumbnail((SIDE, SIDE))
    content = io.BytesIO()
    small.save(content, "PNG", optimize=True)
    return shown | {"uri": "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()}


def _read(line: str) -> tuple[str, str, Path, Place]:
    """Of a line that names a file, perhaps which of its pictures, in brackets, and perhaps with a remark behind it: the
    name, the remark, file and picture. Names may look like all of that; what is there is meant."""
    ends = [match.start() for match in re.finditer(": ", line)]
    for end in (len(line), *reversed(ends)):
        name, note = line[:end], line[end + 2 :]
        if os.path.isfile(name):
            return name, note, Path(name), Place()
        which = _WHICH.search(name)
        if which is not None and which[1] in AXES and os.path.isfile(name[: which.start()]):
            axis = next(axis for axis in AXES if axis == which[1])
            return name, note, Path(name[: which.start()]), Place(int(which[2]), axis)
    name, _, note = line.partition(": ")
    return name, note, Path(name), Place()


def _left_out(report: Mapping[str, Any], folder: Path) -> list[dict[str, Any]]:
    groups = [
        ("Cannot be read", "unreadable", "training stops at these, unless site.toml says skip_unreadable"),
        ("No images", "passed_over", "passed over"),
        ("Far from the backbone's size", "far_from_size", "used, but much enlarged or cut"),
    ]
    return [
        {
            "title": title,
            "note": note,
            "count": report[key]["count"],
            "listed": [line.replace(f"{folder}/", "") for line in report[key]["listed"]],
        }
        for title, key, note in groups
    ]


def _lines(group: Sequence[Mapping[str, str]], folder: Path) -> list[str]:
    return [f"{image['path'].removeprefix(f'{folder}/')} ({image['split']})" for image in group]

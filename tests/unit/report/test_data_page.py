"""The page of ``data check``: what it shows is what was found; it loads nothing and lets nothing in."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from secure_fed.clients.rules import Rules
from secure_fed.report.data_page import SIDE, data_page, write_data_page
from tests.unit.clients.test_dicom import as_bytes, dicom


def files(*lines: str, count: int | None = None) -> dict[str, Any]:
    return {"count": len(lines) if count is None else count, "listed": list(lines)}


def checked(folder: Path) -> dict[str, Any]:
    """What ``check_data`` tells of a folder, in its words."""
    return {
        "site": "ash",
        "told": ["manifest.csv: read as separated by semicolons"],
        "passed_over": files(f"{folder}/letter.pdf"),
        "left_out": {"scout": 3},
        "doubts": [
            {
                "kind": "zeros",
                "ids": ["7", "007"],
                "images": 2,
                "splits": ["train"],
                "text": "7 and 007",
                "remedy": "settle it",
            }
        ],
        "kinds": {"screenshot": 2},
        "modalities": {"MR": 30, "CT": 10},
        "scanners": {"Acme <X>": 40},
        "largest_patients": [{"patient": "P1", "images": 12}],
        "odd": {
            "blank": files(f"{folder}/blank.png"),
            "tiny": files(),
            "colour": files(f"{folder}/colour.png", f"{folder}/gone.png", count=31),
            "unlike": files(),
            "noted": files(f"{folder}/noted.png: a window of width 0 was passed over"),
        },
        "images": 40,
        "classes": {"dark": {"train": 20, "val": 5, "test": 5}, "<b>light": {"train": 10, "val": 0, "test": 0}},
        "unlabelled": 0,
        "patients": {"train": 9, "val": 2, "test": 2, "unlabelled": 0, "all": 13},
        "missing_classes": ["striped"],
        "exact_copies": {
            "groups": 1,
            "images": 2,
            "across_splits": 1,
            "listed": [[{"path": f"{folder}/a.png", "split": "train"}, {"path": f"{folder}/b.png", "split": "test"}]],
        },
        "near_twins": {"groups": 0, "images": 0, "across_splits": 0, "listed": []},
        "unreadable": files(f"{folder}/x.png: broken", count=12),
        "far_from_size": files(),
        "backbone_size": 224,
        "leaks": [f"the same picture in splits test, train: {folder}/a.png, {folder}/b.png"],
    }


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.new("L", (40, 40), 7).save(tmp_path / "blank.png")
    Image.fromarray(np.full((600, 300, 3), (200, 20, 20), dtype=np.uint8)).save(tmp_path / "colour.png")
    Image.new("L", (64, 64), 90).save(tmp_path / "noted.png")
    return tmp_path


def test_the_page_tells_counts_leaks_doubts_and_what_is_left_out(folder: Path) -> None:
    text = Page(data_page(checked(folder), Rules(), folder)).text
    for told in (
        *("40 images of 13 patients", "1 picture lies in more than one split", "No labelled image of class striped"),
        *("dark 20 5 5", "<b>light 10 0 0", "MR 30", "CT 10", "Acme <X> 40", "P1 12", "9 2 2 0"),
        *("the same picture in splits test, train: a.png, b.png", "a.png (train)", "b.png (test)", "7 and 007"),
        *("letter.pdf", "x.png: broken and 11 more", "3 of kind scout", "2 images of kind screenshot"),
        *("read as separated by semicolons", "For this site's eyes only"),
    ):
        assert told in re.sub(r" ?([<>])", r"\1", text) or told in text, told
    assert str(folder) not in text


def test_odd_pictures_are_shown_small_with_their_size_and_one_that_is_gone_by_name(folder: Path) -> None:
    page = Page(data_page(checked(folder), Rules(), folder))
    pictures = {attributes["alt"]: attributes["src"] or "" for tag, attributes in page.tags if tag == "img"}
    assert set(pictures) == {"blank.png", "colour.png", "noted.png"}
    image = Image.open(io.BytesIO(base64.b64decode(pictures["colour.png"].removeprefix("data:image/png;base64,"))))
    assert image.size == (SIDE // 2, SIDE)
    assert image.getpixel((5, 5)) == (200, 20, 20)
    for told in ("gone.png", "300 x 600", "a window of width 0 was passed over", "Coloured among grey ones: 31"):
        assert told in page.text
    assert "; the first 2" in page.text


def test_of_a_file_with_many_pictures_the_odd_one_is_shown(folder: Path) -> None:
    frames = np.zeros((3, 8, 8), dtype=np.uint16)
    frames[2, :, 4:] = 1
    (folder / "many.dcm").write_bytes(as_bytes(dicom(frames)))
    found = checked(folder)
    found["odd"] = {"blank": files(f"{folder}/many.dcm [axial 2]", f"{folder}/many.dcm [axial 1]: dark")}
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', data_page(found, Rules(), folder))
    seen = [np.asarray(Image.open(io.BytesIO(base64.b64decode(one)))).max() for one in pictures]
    assert seen == [255, 0]
    assert "many.dcm [axial 2]" in Page(data_page(found, Rules(), folder)).text


def test_names_that_look_like_remarks_or_places_are_names(folder: Path) -> None:
    names = ["a: b.png", "c [axial 3]", "d: e [coronal 2].png", "n\nl.png", "ü" * 120 + ".png"]
    report = checked(folder)
    for name in (*names, "a"):  # and one that a longer name begins with
        Image.new("L", (40, 40), 9).save(folder / name, "PNG")
    lines = [f"{folder}/{name}{note}" for name in names for note in ("", f": remark: {'long' * 60}")]
    report["odd"] = {kind: files() for kind in report["odd"]} | {"noted": files(*lines, f"{folder}/gone: why")}
    page = data_page(report, Rules(), folder)
    assert page.count("data:image/png") == len(lines)
    assert all(page.count(f"<span>{name}</span>") == 2 for name in names)
    assert page.count("remark: long") == len(names)


def test_the_page_loads_nothing_and_names_are_text(folder: Path) -> None:
    text = data_page(checked(folder), Rules(), folder)
    page = Page(text)
    assert "script" not in {tag for tag, _ in page.tags}
    assert "<b>light" not in text
    policy = next(a["content"] for tag, a in page.tags if tag == "meta" and a.get("http-equiv"))
    assert policy is not None
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert not [a for _, a in page.tags if "style" in a or (a.get("src") or "data:")[:5] != "data:"]
    assert all((a.get("href") or "#").startswith("#") for _, a in page.tags)


def test_nobody_else_can_read_the_page(folder: Path) -> None:
    folder.chmod(0o755)  # else the folder's own mode would hide it
    write_data_page(checked(folder), Rules(), folder, folder / "page.html")
    assert (folder / "page.html").stat().st_mode & 0o777 == 0o600


def test_a_site_without_anything_odd_has_a_page_too(folder: Path) -> None:
    report = checked(folder)
    report["odd"] = {name: files() for name in report["odd"]}
    report |= {"leaks": [], "doubts": [], "told": [], "missing_classes": [], "modalities": {}, "scanners": {}}
    text = Page(data_page(report, Rules(), folder)).text
    assert "no picture lies in two splits" in text
    assert "Odd pictures None." in text

"""Masks of findings: what counts as marked, and that none of them is ever taken for a picture."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from secure_fed.clients.data import Choice, SiteImage, find_pictures, read_data
from secure_fed.clients.files import Notes
from secure_fed.clients.masks import check_masks, lesion_of
from secure_fed.clients.photographs import as_drawn
from secure_fed.clients.reading import no_picture
from secure_fed.clients.rules import Rules
from secure_fed.core.errors import DataError, ManifestError
from secure_fed.protocol.simulation_table import Shares
from tests.unit.clients.test_dicom import RAMP, as_bytes, dicom

RULES = Rules()


def image_with(folder: Path, mask: str, size: tuple[int, int] = (8, 6)) -> SiteImage:
    Image.new("L", size, 90).save(folder / "image.png")
    return SiteImage(folder / "image.png", "p", 0, "test", mask=folder / mask)


def one_pixel(mode: str, background: object, marked: object) -> Image.Image:
    mask = Image.new(mode, (8, 6), background)  # type: ignore[arg-type]
    mask.putpixel((5, 2), marked)  # type: ignore[arg-type]
    return mask


def palette() -> Image.Image:
    mask = one_pixel("P", 0, 1)
    mask.putpalette([0, 0, 0, 0, 0, 40])
    return mask


@pytest.mark.parametrize(
    "make",
    [
        lambda: one_pixel("1", 0, 1),
        lambda: one_pixel("L", 0, 1),
        lambda: one_pixel("I;16", 0, 300),
        lambda: one_pixel("I;16", 0, 1),
        lambda: one_pixel("RGB", (0, 0, 0), (0, 0, 3)),
        lambda: one_pixel("LA", (0, 255), (9, 255)),
        lambda: one_pixel("RGBA", (0, 0, 0, 255), (255, 0, 0, 255)),
        lambda: one_pixel("RGBA", (255, 255, 255, 0), (255, 255, 255, 80)),
        palette,
    ],
    ids=["1", "L", "16-bit", "16-bit label", "RGB", "LA", "RGBA", "transparent white", "palette"],
)
def test_whatever_is_neither_black_nor_transparent_is_marked(tmp_path: Path, make: Callable[[], Image.Image]) -> None:
    make().save(tmp_path / "mask.png")
    found = lesion_of(image_with(tmp_path, "mask.png"), RULES)
    assert found is not None
    assert found.shape == (6, 8)
    np.testing.assert_array_equal(np.argwhere(found), [[2, 5]])


def test_without_a_mask_there_is_no_lesion(tmp_path: Path) -> None:
    Image.new("L", (8, 6), 90).save(tmp_path / "image.png")
    assert lesion_of(SiteImage(tmp_path / "image.png", "p", 0, "test"), RULES) is None


def test_a_mask_of_a_dicom_picture_is_held_against_its_pixels(tmp_path: Path) -> None:
    (tmp_path / "image.dcm").write_bytes(as_bytes(dicom(RAMP)))
    height, width = np.asarray(RAMP).shape
    Image.new("L", (width, height), 255).save(tmp_path / "mask.png")
    image = SiteImage(tmp_path / "image.dcm", "p", 0, "test", mask=tmp_path / "mask.png")
    found = lesion_of(image, RULES)
    assert found is not None
    assert found.all()


def test_masks_that_do_not_fit_are_named_together(tmp_path: Path) -> None:
    image = image_with(tmp_path, "small.png")
    Image.new("L", (4, 6)).save(tmp_path / "small.png")
    Image.new("L", (8, 6)).save(tmp_path / "lossy.jpg")
    Image.new("L", (8, 6)).save(tmp_path / "good.png")
    frames = [Image.new("L", (8, 6), grey) for grey in (0, 9)]
    frames[0].save(tmp_path / "two.tiff", save_all=True, append_images=frames[1:])
    names = ("small.png", "lossy.jpg", "two.tiff", "gone.png", "good.png", "good.png")
    images = [SiteImage(image.path, "p", 0, "test", mask=tmp_path / name) for name in names]
    with pytest.raises(DataError, match="5 masks do not fit") as refused:
        check_masks(images, RULES)
    said = str(refused.value)
    assert "small.png: 4 x 6 pixels, but" in said
    assert "has 8 x 6; expected a mask of the image's size" in said
    assert "JPEG blurs" in said
    assert "several pictures" in said
    assert "gone.png: no mask that can be read" in said
    assert "good.png: the mask of 2 pictures; expected one each" in said
    check_masks(images[4:5], RULES)


def test_a_mask_that_says_nothing_or_something_else_than_the_label_is_refused(tmp_path: Path) -> None:
    one_pixel("L", 0, 255).save(tmp_path / "lesion.png")
    Image.new("L", (8, 6), 255).save(tmp_path / "all.png")
    Image.new("L", (8, 6), 0).save(tmp_path / "none.png")
    image = image_with(tmp_path, "none.png")

    def check(label: int | None, mask: str) -> None:
        check_masks([SiteImage(image.path, "p", label, "train", mask=tmp_path / mask)], RULES)

    for label in (0, 1, None):
        check(label, "none.png")
        with pytest.raises(DataError, match=r"all.png: every pixel is marked"):
            check(label, "all.png")
    check(1, "lesion.png")
    check(None, "lesion.png")
    with pytest.raises(DataError, match=r"lesion.png: marks a finding, but .*image.png is labelled as normal"):
        check(0, "lesion.png")


def test_a_damaged_mask_is_refused_whatever_the_damage(tmp_path: Path) -> None:
    image = image_with(tmp_path, "bad.png")
    Image.new("L", (8, 6), 1).save(tmp_path / "good.png")
    whole = (tmp_path / "good.png").read_bytes()
    damaged = [whole[:cut] for cut in (0, 20, 40)]
    damaged += [whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :] for place in range(8, len(whole), 3)]
    for content in damaged:
        (tmp_path / "bad.png").write_bytes(content)
        try:
            lesion_of(image, RULES)
        except DataError:
            continue


def write(folder: Path, rows: Sequence[Sequence[str]], columns: Sequence[str] = ("path", "label", "patient", "mask")):
    with (folder / "manifest.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerows([columns, *rows])


def pictures(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 6), 90).save(folder / name)


def test_masks_are_no_pictures_wherever_the_manifest_lies(tmp_path: Path) -> None:
    for site in ("", "north"):
        pictures(tmp_path / site, "a.png", "b.png", "masks/a.png", "masks/b.png")
        (tmp_path / site).mkdir(exist_ok=True)
        write(tmp_path / site, [["./a.png", "x", "1", "masks\\a.png"], ["b.png", "x", "2", "masks/../masks/b.png"]])
    notes = Notes()
    found = find_pictures(tmp_path, Choice(), notes)
    assert [image.path.relative_to(tmp_path).as_posix() for image in found] == [
        *("a.png", "b.png"),
        *("north/a.png", "north/b.png"),
    ]
    assert sum("a mask, as a manifest.csv says" in line for line in notes.passed_over) == 4


def test_a_manifests_mask_stays_with_its_picture(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png", "b.png", "masks/a.png")
    write(tmp_path, [["./a.png", "x", "1", "masks\\a.png"], ["b.png", "x", "2", ""]])
    shares = Shares(train=1.0, val=0, test=0, unlabelled=0)
    one, two = read_data(tmp_path, ("x",), "patient", shares, 0)
    assert one.mask is not None
    assert one.mask.samefile(tmp_path / "masks" / "a.png")
    assert two.mask is None


def test_a_row_for_a_mask_is_refused(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png", "m.png")
    write(tmp_path, [["a.png", "x", "1", "m.png"], ["m.png", "x", "2", ""]])
    with pytest.raises(ManifestError, match=r"line 3: path 'm.png' is a mask, as column mask says"):
        read_data(tmp_path, ("x",), "patient", Shares(train=1.0, val=0, test=0, unlabelled=0), 0)


def test_what_was_drawn_here_is_no_picture(tmp_path: Path) -> None:
    pictures(tmp_path, "a.png")
    (tmp_path / "cases").mkdir()
    (tmp_path / "cases" / "case-0001.png").write_bytes(as_drawn(Image.new("RGB", (20, 20), (200, 0, 0))))
    notes = Notes()
    (only,) = find_pictures(tmp_path, Choice(), notes)
    assert only.path.name == "a.png"
    assert any("case-0001.png: a picture that secfacmic drew" in line for line in notes.passed_over)
    assert no_picture(tmp_path / "a.png") == ""

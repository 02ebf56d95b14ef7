"""What commands tell is what there is, to the letter: no bracket is a style, no word between colons a picture."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image

from secure_fed.cli.output import out
from secure_fed.core.errors import OutputError, ReportError, SiteFileError, StorageError
from tests.conftest import Run


def test_a_refusal_repeats_what_was_given_to_the_letter(tmp_path: Path, secfacmic: Run) -> None:
    odd = tmp_path / "a [bold]b[blink] :abc: :-1:"
    odd.mkdir()
    ended = secfacmic("report", odd)
    assert ended.returncode == ReportError.exit_code
    assert f"secfacmic: {odd}: nothing to report" in ended.stderr


def test_a_table_of_folders_loses_no_letter_in_eighty_columns(
    tmp_path: Path, secfacmic: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["[b]glioma_tumor", "meningioma_tumor", "no_tumor", "pituitary_tumor"]
    for number, name in enumerate(names):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("L", (32, 32), 40 * number).save(tmp_path / "data" / name / "1.png")
    shutil.copytree(tmp_path / "data", tmp_path / "images of the second scanner")
    monkeypatch.setattr(out, "width", 80)
    monkeypatch.chdir(tmp_path)
    ended = secfacmic("data", "check", "data", "images of the second scanner")
    assert ended.returncode == 0, ended.stderr
    table = [line for line in ended.stdout.splitlines() if line[:1] in "┏┃┡│└"]
    assert max(map(len, table)) <= 80
    assert "…" not in ended.stdout
    for name in names:
        assert sum(f"1 {name}" in line for line in table) == 2
    heads = [" ".join(" ".join(cells).split()) for cells in zip(*(line.strip("┃").split("┃") for line in table
             if line.startswith("┃")), strict=True)]  # fmt: skip
    assert heads == ["folder", "images", "patients", "of each class", "without a label", "splits"]


def test_what_is_refused_before_any_image_shows_no_bar(tmp_path: Path, secfacmic: Run) -> None:
    ended = secfacmic("study", "init", tmp_path / "none", "--out", tmp_path / "x.toml")
    assert "no such folder" in ended.stderr
    assert "comparing" not in ended.stderr


def test_a_name_or_an_address_in_another_form_is_told_the_form(
    tmp_path: Path, secfacmic: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = secfacmic("site", "init", "Klinik Nord", "--data", tmp_path, "--server", "fl.example.org")
    assert ended.returncode == SiteFileError.exit_code
    assert "site = 'Klinik Nord': expected up to 40 small letters" in ended.stderr
    assert "server.address = 'fl.example.org': expected HOST:PORT, as in" in ended.stderr
    assert "pattern" not in ended.stderr
    assert not list(tmp_path.iterdir())


def test_a_folder_of_images_that_is_not_there_is_told_when_a_site_is_made(
    tmp_path: Path, secfacmic: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = secfacmic("site", "init", "ash", "--data", "nowhere", "--server", "fl.example.org:8443")
    assert ended.returncode == 0, ended.stderr
    assert "nowhere: no such folder yet" in ended.stdout


def test_before_the_first_round_there_is_no_empty_table(tmp_path: Path, secfacmic: Run) -> None:
    (tmp_path / "full").write_text("a file")
    ended = secfacmic("simulate", "demo", "--out", tmp_path / "full" / "out")
    assert ended.returncode in (OutputError.exit_code, StorageError.exit_code), ended.stderr
    assert "sites in" not in ended.stderr + ended.stdout

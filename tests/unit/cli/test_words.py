"""What commands tell is what there is, to the letter: no bracket is a style, no word between colons a picture."""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from secure_fed.cli import interrupted
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
    names = ["[b]glioma_tumor", "meningioma_tumor", "no_tumor", "pituitary_tumor_seen"]
    for number, name in enumerate(names):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("L", (32, 32), 40 * number).save(tmp_path / "data" / name / "1.png")
    shutil.copytree(tmp_path / "data", tmp_path / "images of the second scanner")
    monkeypatch.setattr(out, "width", 80)
    monkeypatch.chdir(tmp_path)
    ended = secfacmic("data", "check", "data", "images of the second scanner")
    assert ended.returncode == 0, ended.stderr
    table = [line for line in ended.stdout.splitlines() if line[:1] in "┏┃┡│└"]
    assert {len(line) for line in table} == {max(map(len, table))}  # each to its right border
    assert max(map(len, table)) <= 80
    assert "…" not in ended.stdout
    for name in names:
        assert sum(f"1 {name}" in line for line in table) == 2
    heads = [" ".join(" ".join(cells).split()) for cells in zip(*(line.strip("┃").split("┃") for line in table
             if line.startswith("┃")), strict=True)]  # fmt: skip
    assert heads == ["folder", "images", "patients", "of each class", "without a label", "splits"]


def test_no_table_loses_a_letter_however_narrow_the_terminal(
    secfacmic: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SECFACMIC_BACKBONES", str(tmp_path))
    for width in (40, 80):
        monkeypatch.setattr(out, "width", width)
        for words in (("backbone", "list"), ("study", "show", "demo"), ("study", "list")):
            ended = secfacmic(*words)
            assert ended.returncode == 0, ended.stderr
            assert "…" not in ended.stdout, (words, width)


@pytest.mark.parametrize("made_of_it", ["raise", "raise RuntimeError", "pass"])
def test_ctrl_c_while_the_command_still_loads_is_one_line(made_of_it: str, tmp_path: Path) -> None:
    """Pressed by somebody who saw at once that it was the wrong command; a class in the making makes another error of
    it, and who tries an import nothing at all."""
    program = f"""
import os, runpy, signal, sys
class Press:
    def find_spec(self, name, path=None, target=None):
        if name == "typer":
            sys.meta_path.remove(self)
            try:
                os.kill(os.getpid(), signal.SIGINT)
            except KeyboardInterrupt:
                {made_of_it}
sys.meta_path.insert(0, Press())
sys.argv = ["secfacmic", "study", "new", "hospitals", "--out", "x"]
runpy.run_module("secfacmic", run_name="__main__")
"""
    command = [sys.executable, "-P", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 130, done.stderr
    assert done.stderr == "secfacmic: interrupted before it began\n"


def test_what_a_library_makes_of_ctrl_c_is_told_as_ctrl_c(secfacmic: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """tenseal tries another import when one fails in whatever way, Ctrl-C included."""

    def swallowed(*_: object, **__: object) -> None:
        with contextlib.suppress(BaseException):
            signal.raise_signal(signal.SIGINT)
        raise ModuleNotFoundError("No module named '_tenseal'")

    monkeypatch.setattr("secure_fed.operate.new_study.new_study", swallowed)
    ended = secfacmic("study", "new", "demo", "--out", "never")
    anew = "secfacmic: interrupted; nothing is half-written, and the same command begins anew\n"
    assert (ended.returncode, ended.stderr) == (130, anew)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(
    ("words", "goes_on"),
    [
        ("simulate demo --out x", True),
        ("demo", True),
        ("data fetch --out x", True),
        ("data check --site x", True),
        ("data check --site=x", True),
        ("data check simulate", False),
        ("audit --site x", False),
        ("evaluate --adapter simulate --images x", False),
        ("predict --images x --adapter y --out demo", False),
        ("phantoms make x", False),
        ("client --site x", True),
        ("client --site x --rehearse", False),
        ("", False),
    ],
)
def test_ctrl_c_says_that_a_command_goes_on_only_of_those_that_do(words: str, goes_on: bool) -> None:
    told = interrupted(words.split())
    assert ("goes on from here" in told, "begins anew" in told) == (goes_on, not goes_on)


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


@pytest.mark.parametrize(
    "words",
    [
        *("status", "evidence SITE --out TO", "evidence --out TO SITE", "site sent", "ledger show"),
        *("report SITE --out TO", "journal verify"),
    ],
)
def test_a_site_is_named_by_its_folder_or_its_file(
    words: str, finished_run: Path, tmp_path: Path, secfacmic: Run
) -> None:
    site = finished_run / "sites" / "ash"
    for number, named in enumerate((site, site / "site.toml")):
        places = {"SITE": named, "TO": tmp_path / f"{number}.html"}
        options: list[object] = [places.get(word, word) for word in words.split()]
        ended = secfacmic(*options, *([] if named in options else [named]))
        assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize(
    "words",
    [("simulate", "demo", "--data", "images\udcff", "--out", "o"), ("report", "run\udcff"), ("status", "\udcfc/ash"),
     ("site", "accept", "study.toml", "--site", "ash", "--by", "M\udcfcller"),
     ("data", "fetch", "--dicomweb", "http://127.0.0.1:1", "--out", "o", "--query", "PatientName=M\udcfcller")],
    ids=lambda words: words[0],
)  # fmt: skip
def test_a_name_that_is_no_utf_8_is_refused_before_anything_is_done(
    words: tuple[str, ...], tmp_path: Path, secfacmic: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a share of a machine with another alphabet: site.toml and journals are UTF-8."""
    monkeypatch.chdir(tmp_path)
    ended = secfacmic(*words)
    assert ended.returncode == 2
    assert "is no UTF-8 text, as our files hold names; expected such a name: rename what it stands for" in " ".join(
        ended.stderr.split()
    )
    assert not list(tmp_path.iterdir())


def test_a_working_directory_whose_name_is_no_utf_8_is_refused_too(
    tmp_path: Path, secfacmic: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "klinik\udcfc"
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert "is no UTF-8 text" in secfacmic("simulate", "demo", "--data", "images", "--out", "o").stderr


def test_a_working_directory_that_is_gone_is_told(
    tmp_path: Path, secfacmic: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    ended = secfacmic("study", "check", "mine.toml")
    assert ended.returncode == 2
    assert "is in the current folder, which is gone" in ended.stderr

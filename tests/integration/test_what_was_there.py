"""What a person has in a place that a command is to write to stays, byte for byte, unless the command left it there."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import tomli_w

from secure_fed.core import errors
from tests.conftest import Result, Run, template_table
from tests.integration.test_beginners import held, told


def refused(result: Result, *says: str) -> None:
    told(result, errors.OutputError, *says)


@pytest.fixture
def own(images: Path, tmp_path: Path) -> Path:
    """A project's folder with images of its own, by chance named as a site of the demo is."""
    shutil.copytree(images / "ash", tmp_path / "project/data/north")
    return tmp_path / "project"


@pytest.mark.parametrize("manifest", [False, True], ids=["a folder a class", "with a manifest"])
@pytest.mark.parametrize("command", ["simulate", "demo", "attack"])
def test_phantoms_are_never_put_in_the_place_of_images_of_ones_own(
    command: str, manifest: bool, own: Path, secfacmic: Run
) -> None:
    if manifest:
        rows = "".join(f"dark/{path.name},p-{path.stem},dark\n" for path in (own / "data/north/dark").iterdir())
        (own / "data/north/manifest.csv").write_text(f"path,patient,label\n{rows}")
    before = held(own)
    refused(secfacmic(command, "demo", "--out", own), "holds data and no study.toml", "--data")
    assert held(own) == before


@pytest.mark.parametrize("name", ["summary.json", "adapter.safetensors", "calibration.safetensors"])
def test_results_of_something_else_are_not_written_over(
    name: str, images: Path, tmp_path: Path, secfacmic: Run
) -> None:
    (tmp_path / "small.toml").write_text(tomli_w.dumps(template_table(rounds=1)))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine")
    refused(secfacmic("simulate", tmp_path / "small.toml", "--data", images, "--out", tmp_path / "out"), name)
    assert held(tmp_path / "out") == {name: b"mine"}


def test_a_folder_that_a_study_of_ones_own_is_beside_gets_no_phantoms_either(
    own: Path, tmp_path: Path, secfacmic: Run
) -> None:
    """A study is there already, as when its template gained phantoms later or its data were given by hand before."""
    table = template_table(rounds=1)
    group = {"patients": 9, "scanner": 1, "class_mix": [1, 1, 1, 1], "unlabelled": 0.0}
    sites = [site["folder"] for site in table["simulation"]["sites"]]
    table["simulation"]["phantoms"] = [{"name": name, **group} for name in sites]
    (tmp_path / "small.toml").write_text(tomli_w.dumps(table))
    assert secfacmic("demo", tmp_path / "small.toml", "--prepare", tmp_path / "fed").returncode == 0
    shutil.rmtree(tmp_path / "fed/data/ash")
    shutil.copytree(own / "data/north", tmp_path / "fed/data/ash")
    before = held(tmp_path / "fed/data")
    refused(secfacmic("simulate", tmp_path / "small.toml", "--out", tmp_path / "fed"), "ash is not empty")
    assert held(tmp_path / "fed/data") == before


def test_phantoms_go_into_a_folder_of_their_own(own: Path, tmp_path: Path, secfacmic: Run) -> None:
    before = held(own)
    refused(secfacmic("phantoms", "make", own / "data"), "holds north, which no phantoms are")
    refused(secfacmic("phantoms", "make", own / "data/north/dark/0.png"), "a file; expected a folder")
    assert held(own) == before
    made = tmp_path / "made"
    assert secfacmic("phantoms", "make", made, "--sites", 1).returncode == 0
    first = held(made)
    (made / "site_0").rename(made / "kept_0")
    refused(secfacmic("phantoms", "make", made, "--sites", 1), "kept_0")  # of another name: nobody can tell what it is
    (made / "kept_0").rename(made / "site_0")
    refused(secfacmic("phantoms", "make", made, "--sites", 2), "site_0 is not empty")
    assert held(made) == first


def test_what_a_kill_left_of_phantoms_is_made_anew(tmp_path: Path, secfacmic: Run) -> None:
    (tmp_path / "made/.site_0.drawing/images").mkdir(parents=True)
    (tmp_path / "made/.site_0.drawing/images/half.png").write_bytes(b"half")
    assert secfacmic("phantoms", "make", tmp_path / "made", "--sites", 1).returncode == 0
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["site_0"]
    assert not list((tmp_path / "made").rglob("half.png"))


def test_a_sweep_does_not_run_where_something_else_is_named_as_its_trials(tmp_path: Path, secfacmic: Run) -> None:
    (tmp_path / "out/running").mkdir(parents=True)
    (tmp_path / "out/running/diary.csv").write_text("5 km")
    refused(secfacmic("sweep", "smoke", "--out", tmp_path / "out"), "holds running")
    assert held(tmp_path / "out")["running/diary.csv"] == b"5 km"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/trials.jsonl").write_text("of a clinic")  # whose last line, without an end, was cut off
    refused(secfacmic("sweep", "smoke", "--out", tmp_path / "mine"), "holds trials.jsonl")
    assert held(tmp_path / "mine") == {"trials.jsonl": b"of a clinic"}


@pytest.mark.parametrize("name", ["attack.json", "attack.svg"])
def test_an_attack_takes_no_other_files_place(name: str, images: Path, tmp_path: Path, secfacmic: Run) -> None:
    (tmp_path / "small.toml").write_text(tomli_w.dumps(template_table(rounds=1)))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine")
    refused(
        secfacmic("attack", tmp_path / "small.toml", "--data", images, "--out", tmp_path / "out"), f"{name}: exists"
    )
    assert held(tmp_path / "out") == {name: b"mine"}


def test_predictions_take_the_place_of_predictions_alone(
    finished_run: Path, images: Path, tmp_path: Path, secfacmic: Run
) -> None:
    """A slip of the hand would cost a manifest, with the only word of whose the images are, or the adapter itself."""
    adapter = tmp_path / "adapter.safetensors"
    shutil.copyfile(finished_run / "adapter.safetensors", adapter)
    data = tmp_path / "data"
    shutil.copytree(images / "ash", data)
    (data / "manifest.csv").write_text("path,patient,label\ndark/0.png,p1,dark\n")
    words = ("predict", "--adapter", adapter, "--images", data, "--checkpoint", finished_run / "backbone.safetensors")
    before = held(tmp_path)
    for place in (data / "manifest.csv", adapter, data / "dark/0.png"):
        refused(secfacmic(*words, "--out", place), f"{place}: exists, and this command did not write it")
    refused(secfacmic(*words, "--out", data), "a folder; expected the name of a file")
    told(secfacmic(*words, "--out", tmp_path / "no/rows.csv"), errors.StorageError, "there is no folder")
    assert held(tmp_path) == before
    for form in ("csv", "json", "csv"):
        assert secfacmic(*words, "--out", tmp_path / "rows", "--format", form).returncode == 0
    (tmp_path / "empty").touch()
    assert secfacmic(*words, "--out", tmp_path / "empty").returncode == 0
    assert secfacmic(*words, "--out", "/dev/null").returncode == 0


def test_predictions_are_refused_their_place_before_the_images_are_read(
    finished_run: Path, images: Path, tmp_path: Path, secfacmic: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("hours of work")

    monkeypatch.setattr("secure_fed.operate.predict.predict_folder", never)
    (tmp_path / "notes.csv").write_text("mine")
    adapter = finished_run / "adapter.safetensors"
    for place in (tmp_path / "notes.csv", tmp_path / "no/rows.csv"):
        assert secfacmic("predict", "--adapter", adapter, "--images", images, "--out", place).returncode in (12, 60)


@pytest.mark.parametrize("form", ["html", "md", "csv", "png"])
def test_a_report_takes_the_place_of_a_report_alone(
    form: str, finished_run: Path, tmp_path: Path, secfacmic: Run
) -> None:
    place = tmp_path / f"notes.{form}"
    for content in (b"mine", b"<!DOCTYPE html>\n<html><head></head></html>", b"path,patient,label\n", b"\x89PNG\r\n"):
        place.write_bytes(content)
        refused(secfacmic("report", finished_run, "--out", place), "this command did not write it")
        assert place.read_bytes() == content
    place.unlink()
    for _ in range(2):
        assert secfacmic("report", finished_run, "--out", place).returncode == 0
    assert len(place.read_bytes()) > 1000


def test_pictures_of_a_run_take_the_place_of_such_pictures_alone(
    finished_run: Path, tmp_path: Path, secfacmic: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "plots"
    place.mkdir()
    for content in (b"mine", b"\x89PNG\r\n\x1a\n of a camera by secfacmic"):
        (place / "confusion.png").write_bytes(content)
        refused(secfacmic("plot", finished_run, "--out", place), "confusion.png: exists, and this command did not")
        assert held(place) == {"confusion.png": content}
    (place / "confusion.png").unlink()
    for slow in ("learning_curves", "reliability", "feature_map"):
        monkeypatch.setattr(f"secure_fed.operate.plots.{slow}", lambda _: None)
    for _ in range(2):
        assert secfacmic("plot", finished_run, "--out", place).returncode == 0


def test_a_study_takes_no_other_weights_place(finished_run: Path, images: Path, tmp_path: Path, secfacmic: Run) -> None:
    (tmp_path / "small.toml").write_text(tomli_w.dumps(template_table(rounds=1)))
    place, weights = tmp_path / "fed/study.safetensors", (finished_run / "adapter.safetensors").read_bytes()
    place.parent.mkdir()
    place.write_bytes(weights)
    words = ("study", "new", tmp_path / "small.toml", "--out", place.parent)
    refused(secfacmic(*words), "study.safetensors: exists, and this command did not write it")
    assert place.read_bytes() == weights
    shutil.copyfile(finished_run / "study.safetensors", place)  # as a call that was killed leaves it
    assert secfacmic(*words).returncode == 0


def test_explained_cases_take_no_pictures_place(
    finished_run: Path, images: Path, tmp_path: Path, secfacmic: Run
) -> None:
    (tmp_path / "case-0001.png").write_bytes(b"mine")
    words = ("explain-case", "--adapter", finished_run / "adapter.safetensors", "--image", images / "ash/dark/0.png")
    refused(secfacmic(*words, "--out", tmp_path), "holds case-0001.png")
    assert held(tmp_path) == {"case-0001.png": b"mine"}


def test_what_a_site_hands_on_takes_no_other_files_place(finished_run: Path, tmp_path: Path, secfacmic: Run) -> None:
    shutil.copytree(finished_run, tmp_path / "run", symlinks=True)
    site, other = tmp_path / "run/sites/ash", tmp_path / "run/sites/birch"
    study = tmp_path / "run/study.toml"
    before = held(tmp_path)
    for words in (
        ("evidence", site, "--out", site / "site.toml"),
        ("site", "accept", study, "--site", site, "--html", site / "site.toml"),
        ("data", "check", "--site", site, "--html", study),
        ("keys", "create", study, "--site", site, "--out", study),
    ):
        refused(secfacmic(*words), "exists, and this command did not write it")
    assert held(tmp_path) == before
    archive = tmp_path / "evidence.zip"
    for _ in range(2):
        assert secfacmic("evidence", site, "--out", archive).returncode == 0
    refused(secfacmic("evidence", other, "--out", archive), "this command did not write it")  # the only one of ash
    page = tmp_path / "page.html"
    for _ in range(2):
        assert secfacmic("site", "accept", study, "--site", site, "--html", page).returncode == 0


@pytest.mark.parametrize("name", ["calibration.csv", "overall.tex", "calibration.svg", "classes-1.pdf"])
def test_figures_take_the_place_of_figures_alone_and_what_was_found_is_told(
    name: str, finished_run: Path, images: Path, tmp_path: Path, secfacmic: Run
) -> None:
    """A paper's folder has tables and pictures of one's own, under names that are near at hand."""
    figures = tmp_path / "figures"
    figures.mkdir()
    (figures / name).write_text("mine")
    words = ("evaluate", "--adapter", finished_run / "adapter.safetensors", "--images", images / "ash",
             "--checkpoint", finished_run / "backbone.safetensors", "--figures", figures)  # fmt: skip
    ended = secfacmic(*words)
    refused(ended, f"{figures / name}: exists, and this command did not write it")
    assert "balanced accuracy" in ended.stdout
    assert held(figures) == {name: b"mine"}
    (figures / name).unlink()
    for _ in range(2):
        assert secfacmic(*words).returncode == 0

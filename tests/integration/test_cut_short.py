"""A disk that fills, or Ctrl-C, in the middle of a command: one sentence, nothing half-written; the same command goes
on from there."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import tomli_w
from PIL import Image

from secure_fed.clients.bound import read_bound
from secure_fed.core import errors
from secure_fed.lab.simulation import simulate
from tests.conftest import Result, Run, template_table
from tests.disks import PAGE, enlarge, mounted, used
from tests.integration.test_anomaly import template as memory_template
from tests.integration.test_beginners import held
from tests.unit.clients.test_dicom import as_bytes, dicom
from tests.unit.operate.test_fetch import Archive, instance, serve

pytestmark = pytest.mark.slow

ROOM = 64 << 20

Words = Callable[[Path], tuple[object, ...]]


def _template(tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(tomli_w.dumps(template_table(rounds=1)))
    return path


def _commands(done: Path, images: Path, tmp: Path) -> dict[str, Words]:
    """What each writes lies below the folder that it is given."""
    adapter, site, weights = done / "adapter.safetensors", done / "sites/ash", done / "backbone.safetensors"
    return {
        "simulate": lambda to: ("simulate", _template(tmp), "--data", images, "--out", to / "out"),
        "sweep": lambda to: ("sweep", "smoke", "--out", to / "out"),
        "report": lambda to: ("report", done, "--out", to / "report.html"),
        "report --figures": lambda to: ("report", done, "--out", to / "report.html", "--figures", to / "figures"),
        "predict": lambda to: ("predict", "--adapter", adapter, "--images", images / "ash",
                                "--checkpoint", weights, "--out", to / "rows.csv"),
        "evaluate": lambda to: ("evaluate", "--adapter", adapter, "--images", images / "ash",
                                 "--checkpoint", weights, "--figures", to / "out"),
        "export": lambda to: ("export", "--run", done, "--out", to / "out", "--onnx"),
        "plot": lambda to: ("plot", done, "--out", to / "out"),
        "explain-case": lambda to: ("explain-case", "--adapter", adapter, "--image", images / "ash/dark",
                                     "--checkpoint", weights, "--out", to / "out"),
        "evidence": lambda to: ("evidence", site, "--out", to / "evidence.zip"),
        "phantoms": lambda to: ("phantoms", "make", to / "out"),
        "backbone": lambda to: ("backbone", "random", "random-small", "--seed", 1, "--out", to / "w.safetensors"),
        "study init": lambda to: ("study", "init", images / "ash", images / "birch", images / "cedar", "--out",
                                  to / "mine.toml"),
        "attack": lambda to: ("attack", _template(tmp), "--data", images, "--out", to / "out", "--shadows", 8),
        "data check --html": lambda to: ("data", "check", "--site", site, "--html", to / "page.html"),
        "data check --propose": lambda to: ("data", "check", images / "ash", "--propose", to / "manifest.csv"),
        "predict --dicom-sr": lambda to: ("predict", "--adapter", adapter, "--images", _scans(tmp),
                                          "--checkpoint", weights, "--out", to / "rows.csv", "--dicom-sr", to / "sr"),
        "study new": lambda to: ("study", "new", _template(tmp), "--out", to / "study"),
    }  # fmt: skip


def _scans(tmp: Path) -> Path:
    """DICOM files of eight patients."""
    folder = tmp / "scans"
    folder.mkdir(exist_ok=True)
    for number in range(8):
        ids = {name: f"1.2.{number}.{name.count('e')}" for name in ("StudyInstanceUID", "SeriesInstanceUID")}
        pixels = np.arange(64, dtype=np.int16).reshape(8, 8) * (number + 1)
        scan = dicom(pixels, PatientID=f"P{number}", SOPInstanceUID=f"1.2.{number}.9", **ids)
        (folder / f"{number}.dcm").write_bytes(as_bytes(scan))
    return folder


NAMES = list(_commands(Path(), Path(), Path()))


def whole(path: Path) -> bool:
    """Whether a file is what its name says, to its end."""
    text = path.read_bytes()
    if path.suffix == ".jsonl":
        return all(json.loads(line) for line in text.splitlines())
    if path.name == "bound.json":  # which a digest follows
        return read_bound(path) is not None
    if path.suffix == ".json":
        return bool(json.loads(text))
    if path.suffix == ".png":
        Image.open(path).load()
    if path.suffix == ".safetensors":
        safetensors.numpy.load(text)
    return path.suffix not in (".html", ".svg") or text.rstrip().endswith((b"</html>", b"</svg>"))


def _cut_short(ended: Result, code: int, folder: Path) -> None:
    assert ended.returncode == code, ended.stderr
    assert "Traceback" not in ended.stderr
    assert ended.stderr.count("secfacmic: ") == 1
    left = [path for path in folder.rglob("*") if path.is_file()]
    assert not [path for path in left if path.name.startswith(".")]
    assert all(whole(path) for path in left)


@pytest.mark.parametrize("name", NAMES)
def test_a_disk_that_fills_half_way(
    name: str, finished_run: Path, images: Path, tmp_path: Path, secfacmic: Run
) -> None:
    words = _commands(finished_run, images, tmp_path)[name]
    (tmp_path / "ample").mkdir()
    assert secfacmic(*words(tmp_path / "ample")).returncode == 0
    need = used(tmp_path / "ample")
    shutil.rmtree(tmp_path / "ample")
    small = tmp_path / "small"
    with mounted(small, PAGE + need // 2):
        (small / "other").write_bytes(b"x" * PAGE)
        ended = secfacmic(*words(small))
        # Of a sweep trials fail, and it says why the first did.
        code = errors.TrialFailedError.exit_code if "trials failed" in ended.stderr else errors.StorageError.exit_code
        _cut_short(ended, code, small)
        assert "No space left on device" in ended.stderr
        enlarge(small, ROOM)
        again = secfacmic(*words(small))
        assert again.returncode == 0, again.stderr


def test_maps_whose_disk_fills_half_way(images: Path, tmp_path: Path, secfacmic: Run) -> None:
    run, small = tmp_path / "run", tmp_path / "small"
    simulate(memory_template(method={"block": "transformer.resblocks.1"}), run, images)
    words = ("predict", "--adapter", run / "adapter.safetensors", "--images", images / "ash", "--checkpoint",
             run / "backbone.safetensors", "--out", small / "rows.csv", "--maps", small / "maps")  # fmt: skip
    with mounted(small, 16 * PAGE):
        _cut_short(secfacmic(*words), errors.StorageError.exit_code, small)
        assert 0 < len(list((small / "maps").rglob("*.png"))) < 30
        enlarge(small, ROOM)
        assert secfacmic(*words).returncode == 0
        assert len(list((small / "maps").rglob("*.png"))) == 30


@pytest.fixture
def nine() -> Iterator[Archive]:
    """An archive of nine images."""
    found = Archive([instance(f"P{study}", study, 1, number) for study in (1, 2, 3) for number in (1, 2, 3)])
    server = serve(found)
    yield found
    server.shutdown()
    server.server_close()


def test_a_fetch_whose_disk_fills_half_way(nine: Archive, tmp_path: Path, secfacmic: Run) -> None:
    small = tmp_path / "small"
    words = ("data", "fetch", "--dicomweb", nine.url, "--query", "StudyDate=2024*", "--out", small / "data")
    with mounted(small, 7 * PAGE):
        _cut_short(secfacmic(*words), errors.StorageError.exit_code, small)
        assert not (small / "data/manifest.csv").exists()
        before = len(nine.asked)
        enlarge(small, ROOM)
        assert secfacmic(*words).returncode == 0
        fetched = [path for path, _ in nine.asked[before:] if "/instances/" in path]
        assert 0 < len(fetched) < 9  # the others were there
        assert len((small / "data/manifest.csv").read_text().splitlines()) == 10


@pytest.mark.parametrize("pages", [1, 8])
@pytest.mark.parametrize("name", ["audit", "data check", "study init", "evidence", "evidence verify", "drill"])
def test_a_full_disk_under_temporary_files(
    name: str, pages: int, finished_run: Path, images: Path, tmp_path: Path, secfacmic: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    site, archive, small = tmp_path / "ash/site.toml", tmp_path / "evidence.zip", tmp_path / "small"
    shutil.copytree(finished_run / "sites/ash", site.parent, symlinks=True)
    shutil.copy(finished_run / "study.toml", tmp_path)
    shutil.copy(finished_run / "study.safetensors", tmp_path)
    site.write_text(site.read_text().replace("../../study.toml", "../study.toml") + "\n[privacy]\nepsilon = 3.0\n")
    assert secfacmic("evidence", finished_run / "sites/ash", "--out", archive).returncode == 0
    words: dict[str, tuple[object, ...]] = {
        "audit": ("audit", "--site", site, "--canaries", 50, "--guesses", 20),
        "data check": ("data", "check", images / "ash", images / "birch"),
        "study init": ("study", "init", images / "ash", images / "birch", images / "cedar", "--out", tmp_path / "n"),
        "evidence": ("evidence", finished_run / "sites/ash", "--out", tmp_path / "other.zip"),
        "evidence verify": ("evidence", "verify", archive),
        "drill": ("drill",),
    }
    before = held(tmp_path)
    with mounted(small, pages * PAGE):
        (small / "other").write_bytes(b"x" * PAGE)
        monkeypatch.setattr(tempfile, "tempdir", str(small))
        ended = secfacmic(*words[name])
        _cut_short(ended, errors.StorageError.exit_code, small)
        assert "name another folder by TMPDIR" in ended.stderr
        assert [path.name for path in small.iterdir()] == ["other"]
    assert held(tmp_path) == before


@pytest.mark.parametrize("name", NAMES)
def test_ctrl_c_in_the_middle_of_a_write(
    name: str, finished_run: Path, images: Path, tmp_path: Path, secfacmic: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = _commands(finished_run, images, tmp_path)[name]
    place = tmp_path / "place"
    place.mkdir()

    def pressed(*_: object) -> None:
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", pressed)
        _cut_short(secfacmic(*words(place)), 130, place)
    again = secfacmic(*words(place))
    assert again.returncode == 0, again.stderr


@pytest.mark.parametrize("megabytes", [40, 110], ids=["while the sites encode", "in the rounds"])
def test_a_demo_whose_disk_fills_names_the_site_and_goes_on_once_there_is_room(
    megabytes: int, tmp_path: Path, secfacmic: Run
) -> None:
    small = tmp_path / "small"
    words = ("demo", "--rounds", 2, "--sites", 3, "--out", small / "out")
    with mounted(small, megabytes << 20):
        ended = secfacmic(*words)
        _cut_short(ended, errors.DemoError.exit_code, small)
        assert "No space left on device" in ended.stderr or "disk is full" in ended.stderr
        assert "the same command goes on from here" in ended.stderr
        enlarge(small, 400 << 20)
        again = secfacmic(*words)
        assert again.returncode == 0, again.stderr

"""A disk that fills, or Ctrl-C, in the middle of a command: one sentence, nothing half-written; the same command goes
on from there."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.numpy
import tomli_w
from PIL import Image

from secure_fed.core import errors
from tests.conftest import Result, Run, template_table
from tests.disks import PAGE, enlarge, mounted, used

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
        "study new": lambda to: ("study", "new", _template(tmp), "--out", to / "study"),
    }  # fmt: skip


NAMES = list(_commands(Path(), Path(), Path()))


def whole(path: Path) -> bool:
    """Whether a file is what its name says, to its end."""
    text = path.read_bytes()
    if path.suffix == ".jsonl":
        return all(json.loads(line) for line in text.splitlines())
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

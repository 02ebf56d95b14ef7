"""Mistakes of a first hour: each ends with one message that says the next step, and leaves nothing half done."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tomli_w

import secure_fed.lab.simulation
from secure_fed.core import errors
from secure_fed.lab.demo import prepare_federation
from secure_fed.server.supervisor import ServerFolders, serve
from tests.conftest import Result, Run, make_template, template_table

BEGINS_ANEW = "interrupted; nothing is half-written, and the same command begins anew"


def told(result: Result, kind: type[errors.SecfacmicError], *says: str) -> None:
    """One message, with the class' own exit code, no traceback and no rich boxes cut off."""
    assert result.returncode == kind.exit_code, result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.count("secfacmic: ") == 1
    for text in says:
        assert text in result.stderr, text


@pytest.fixture
def template(tmp_path: Path) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text(tomli_w.dumps(template_table(rounds=1)))
    return path


def by_patient(path: Path) -> Path:
    table = template_table(rounds=1)
    table["simulation"]["unit"] = "patient"
    path.write_text(tomli_w.dumps(table))
    return path


def test_no_manifest_where_patients_are_asked_for(template: Path, images: Path, tmp_path: Path, secfacmic: Run) -> None:
    ended = secfacmic("simulate", by_patient(template), "--data", images, "--out", tmp_path / "out")
    told(ended, errors.DataError, "expected a manifest.csv with a patient column", 'unit = "image"')


def test_a_budget_where_nobody_knows_the_patients(template: Path, images: Path, tmp_path: Path, secfacmic: Run) -> None:
    ended = secfacmic("simulate", by_patient(template), "--data", images, "--out", tmp_path / "out", "--epsilon", 3)
    told(ended, errors.DataError, "expected a manifest.csv with a patient column")


def test_the_wrong_folder(template: Path, images: Path, tmp_path: Path, secfacmic: Run) -> None:
    ended = secfacmic("simulate", template, "--data", images / "ash", "--out", tmp_path / "out")
    told(ended, errors.DataError, str(images / "ash" / "ash"), "no such folder")
    assert secfacmic("simulate", template, "--data", images, "--out", tmp_path / "out").returncode == 0
    (tmp_path / "file").write_text("")
    ended = secfacmic("simulate", template, "--data", tmp_path / "file", "--out", tmp_path / "new")
    told(ended, errors.DataError, f"{tmp_path / 'file'} is a file", "name the folder that it is in")
    (tmp_path / "above" / "images").mkdir(parents=True)
    ended = secfacmic("simulate", template, "--data", tmp_path / "above", "--out", tmp_path / "new")
    told(ended, errors.DataError, f"({tmp_path / 'above'} has images)")  # what is there, where the sites are not
    ended = secfacmic("study", "init", tmp_path / "file", "--out", tmp_path / "new.toml")
    told(ended, errors.DataError, "a file, where a folder is to be")
    shutil.copytree(images, tmp_path / "others")
    ended = secfacmic("simulate", template, "--data", tmp_path / "others", "--out", tmp_path / "out")
    told(ended, errors.OutputError, "expected the same data as before, or another --out")


def test_a_site_that_is_not_there(tmp_path: Path, secfacmic: Run) -> None:
    for command in (("client", "--site"), ("status",), ("evidence",)):
        ended = secfacmic(
            *command, tmp_path / "nowhere", *(["--out", tmp_path / "x"] if command[0] == "evidence" else [])
        )
        assert ended.returncode != 0
        assert str(tmp_path / "nowhere") in ended.stderr
        assert "Traceback" not in ended.stderr
    told(secfacmic("client", "--site", tmp_path / "nowhere"), errors.SiteFileError, "secfacmic site init makes")


def test_classes_in_another_language(template: Path, images: Path, tmp_path: Path, secfacmic: Run) -> None:
    shutil.copytree(images, tmp_path / "data")
    (tmp_path / "data/birch/dark").rename(tmp_path / "data/birch/dunkel")
    ended = secfacmic("simulate", template, "--data", tmp_path / "data", "--out", tmp_path / "out")
    told(ended, errors.LabelError, "'dunkel' (10 images)", "expected 'dark', 'light', 'striped'", "rename")
    sites = [tmp_path / "data" / name for name in ("ash", "birch", "cedar")]
    ended = secfacmic("study", "init", *sites, "--out", tmp_path / "new.toml")
    assert "classes that not all sites have: 'dark' (at ash, cedar); 'dunkel' (at birch)" in ended.stderr + ended.stdout
    (tmp_path / "data/birch/dunkel").rename(tmp_path / "data/birch/dark")
    ended = secfacmic("study", "init", *sites, "--out", tmp_path / "again.toml")
    assert "not all sites have" not in ended.stderr + ended.stdout


def test_two_sites_in_one_folder(template: Path, images: Path, tmp_path: Path, secfacmic: Run) -> None:
    template.write_text(template.read_text().replace('folder = "birch"', 'folder = "ash"'))
    ended = secfacmic("simulate", template, "--data", images, "--out", tmp_path / "out")
    told(ended, errors.StudyError, "are one", "a folder of its own for each site", "shared = true")
    (tmp_path / "link").symlink_to(images / "ash")
    ended = secfacmic(
        "study", "init", images / "ash", tmp_path / "link", images / "birch", "--out", tmp_path / "n.toml"
    )
    told(ended, errors.StudyError, f"{images / 'ash'} and {tmp_path / 'link'} are one folder")
    assert not (tmp_path / "out").exists()


def test_a_budget_of_nothing(template: Path, images: Path, tmp_path: Path, secfacmic: Run) -> None:
    ended = secfacmic("simulate", template, "--data", images, "--out", tmp_path / "out", "--epsilon", 0)
    told(ended, errors.SiteFileError, "epsilon = 0.0: expected a number above 0 and at most 100", "leave both out")
    assert not (tmp_path / "out").exists()


def test_a_report_of_an_empty_folder(tmp_path: Path, secfacmic: Run) -> None:
    (tmp_path / "empty").mkdir()
    told(secfacmic("report", tmp_path / "empty"), errors.ReportError, "expected")
    assert not list((tmp_path / "empty").iterdir())


def test_predicting_with_another_backbone(finished_run: Path, images: Path, tmp_path: Path, secfacmic: Run) -> None:
    other = tmp_path / "other.safetensors"
    assert secfacmic("backbone", "random", "random-small", "--seed", 9, "--out", other).returncode == 0
    ended = secfacmic("predict", "--adapter", finished_run / "adapter.safetensors", "--images", images / "ash",
                      "--checkpoint", other)  # fmt: skip
    told(ended, errors.BackboneDigestError)


def test_an_out_folder_of_another_study(finished_run: Path, images: Path, tmp_path: Path, secfacmic: Run) -> None:
    shutil.copytree(finished_run, tmp_path / "out", symlinks=True)
    (tmp_path / "other.toml").write_text(tomli_w.dumps(template_table(rounds=2)))
    ended = secfacmic("simulate", tmp_path / "other.toml", "--data", images, "--out", tmp_path / "out")
    told(ended, errors.OutputError, "with other rounds", "choose another --out")


def test_an_out_folder_of_another_command(
    finished_run: Path, template: Path, images: Path, tmp_path: Path, secfacmic: Run
) -> None:
    """A study and a sweep in one folder would be neither; weights over a template would be the end of it."""
    before = held(finished_run)
    told(
        secfacmic("sweep", "smoke", "--out", finished_run), errors.OutputError, "holds a study", "choose another --out"
    )
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "sweep.json").write_text("{}")
    for command in ("simulate", "demo", "attack"):
        ended = secfacmic(command, template, "--data", images, "--out", tmp_path / "sweep")
        told(ended, errors.OutputError, "holds a sweep", "choose another --out")
    told(secfacmic("plot", tmp_path / "sweep"), errors.StudyError, "expected the folder of a finished simulate or demo")
    assert held(tmp_path / "sweep") == {"sweep.json": b"{}"}
    content = template.read_bytes()
    told(secfacmic("backbone", "random", "random-small", "--out", template), errors.OutputError, "exists; expected no")
    assert template.read_bytes() == content
    assert held(finished_run) == before


def test_a_summary_of_a_version_that_this_one_cannot_read(finished_run: Path, tmp_path: Path, secfacmic: Run) -> None:
    shutil.copytree(finished_run, tmp_path / "out", symlinks=True)
    summary = tmp_path / "out" / "summary.json"
    summary.write_text(summary.read_text().replace('"format": 2', '"format": 99'))
    told(secfacmic("report", tmp_path / "out"), errors.SummaryError, "found format 99, expected 2")


def test_a_port_that_something_else_listens_on(images: Path, tmp_path: Path) -> None:
    prepare_federation(make_template(mode="plain"), tmp_path / "out", images)
    folders = ServerFolders(tmp_path / "out/study.toml", tmp_path / "out/server")
    with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(errors.AddressError) as ended:
        serve(folders, "plain", other.getsockname())
    assert "in use" in str(ended.value)
    assert "choose another with --listen" in str(ended.value)


def test_ctrl_c_ends_with_one_line_and_the_same_command_goes_on(
    template: Path, images: Path, tmp_path: Path, secfacmic: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pressed(*_: object) -> None:
        raise KeyboardInterrupt

    command = ("simulate", template, "--data", images, "--out", tmp_path / "out")
    with monkeypatch.context() as patched:
        patched.setattr(secure_fed.lab.simulation, "run_rounds", pressed)
        ended = secfacmic(*command)
    assert ended.returncode == 130
    assert ended.stderr.rstrip().endswith("secfacmic: interrupted; the same command goes on from here")
    assert "Traceback" not in ended.stderr
    assert secfacmic(*command).returncode == 0


@pytest.mark.parametrize(
    ("words", "within"),
    [
        (("attack", "demo", "--out", "OUT"), "secure_fed.lab.attack.prepare"),
        (("audit",), "secure_fed.privacy.audit.audit"),
        (("data", "check", "IMAGES"), "secure_fed.operate.folders.compare"),
        (("doctor", "--server", "RUN"), "secure_fed.operate.doctor.examine_server"),
        (("drill",), "secure_fed.lab.drill.prepare"),
        (("page", "RUN"), "secure_fed.operate.live_page.LivePage.serve"),
        (("study", "init", "IMAGES", "--out", "OUT"), "secure_fed.operate.study_draft.look_at"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_ctrl_c_in_a_command_that_looks_or_tries(
    words: tuple[str, ...],
    within: str,
    finished_run: Path,
    images: Path,
    tmp_path: Path,
    secfacmic: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    places = {"OUT": tmp_path / "out", "IMAGES": images / "ash", "RUN": finished_run / "server"}
    monkeypatch.setattr(os, "nice", lambda _: 0)  # which would stay
    monkeypatch.setattr(within, lambda *_, **__: signal.raise_signal(signal.SIGINT))
    ended = secfacmic(*(places.get(word, word) for word in words))
    assert ended.returncode == 130, ended.stderr
    assert ended.stderr.rstrip().endswith(
        "secfacmic: interrupted; nothing is half-written, and the same command begins anew"
    )
    assert "Traceback" not in ended.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "begun"),
    [
        (("simulate", "demo", "--out"), "sites"),
        (("demo", "--out"), "logs"),
        (("sweep", "smoke", "--out"), "*"),
        (("attack", "demo", "--out"), "sites"),
        (("phantoms", "make"), "*.png"),
    ],
)
def test_ctrl_c_in_each_long_command(words: tuple[str, ...], begun: str, tmp_path: Path) -> None:
    """As a terminal sends it: to all of the command's processes at once."""
    command = [sys.executable, "-P", "-m", "secure_fed.cli", *words, str(tmp_path / "out")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as child:
        while not any((tmp_path / "out").rglob(begun)) and child.poll() is None:
            time.sleep(0.05)
        os.killpg(child.pid, signal.SIGINT)
        _, told = child.communicate(timeout=120)
    assert child.returncode == 130, told
    goes_on = words[0] not in ("attack", "phantoms")
    assert told.rstrip().endswith(
        "goes on from here" if goes_on else "nothing is half-written, and the same command begins anew"
    )
    assert "Traceback" not in told


def bare(
    *arguments: object, cwd: Path, preexec_fn: Callable[[], object] | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """A command in a process with nearly no environment."""
    words = [sys.executable, "-P", "-m", "secure_fed.cli", *map(str, arguments)]
    root = str(Path(__file__).parents[2])
    known = {"PATH": os.environ["PATH"], "PYTHONPATH": root, **environment}
    return subprocess.run(words, capture_output=True, text=True, cwd=cwd, env=known, check=False,
                          preexec_fn=preexec_fn)  # fmt: skip


def test_no_home_no_colours_and_eighty_columns(tmp_path: Path) -> None:
    ended = bare("study", "show", "demo", cwd=tmp_path, COLUMNS="80", NO_COLOR="1", TERM="dumb")
    assert ended.returncode == 0, ended.stderr
    assert "\x1b" not in ended.stdout
    assert max(map(len, ended.stdout.splitlines())) <= 80
    assert ended.stdout.count("…") == 0


def test_a_working_directory_that_nobody_may_write_to(tmp_path: Path, template: Path) -> None:
    """Root may write anywhere, but not without the capability to."""

    def without_override() -> None:
        ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)  # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE

    locked = tmp_path / "locked"
    locked.mkdir(0o500)
    ended = bare("site", "init", "north", cwd=locked, preexec_fn=without_override)
    assert ended.returncode == errors.StorageError.exit_code
    assert "choose another place" in ended.stderr


def held(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("words", [("simulate",), ("demo",), ("attack",)], ids=lambda words: words[0])
def test_a_refused_start_leaves_the_folder_as_it_was(
    words: tuple[str, ...], template: Path, images: Path, tmp_path: Path, secfacmic: Run
) -> None:
    """Whether it was there or not, and though nothing of a wrong folder is wrong before keys and sites are made."""
    (tmp_path / "wrong").mkdir()
    out = tmp_path / "deep" / "out"
    command = (*words, template, "--data", tmp_path / "wrong", "--out", out)
    told(secfacmic(*command), errors.DataError, "no such folder")
    assert not (tmp_path / "deep").exists()
    out.mkdir(parents=True)
    (out / "mine.txt").write_text("of somebody")
    told(secfacmic(*command), errors.DataError, "no such folder")
    assert held(out) == {"mine.txt": b"of somebody"}


def test_a_refused_budget_is_not_there_at_the_next_start(
    template: Path, images: Path, tmp_path: Path, secfacmic: Run
) -> None:
    """What is refused for its images was written into each site.toml before they were looked at."""
    broken, out = tmp_path / "broken", tmp_path / "out"
    shutil.copytree(images, broken)
    command = ("simulate", template, "--data", broken, "--out", out)
    assert secfacmic(*command).returncode == 0
    before = held(out)
    next((broken / "ash").rglob("*.png")).write_bytes(b"no picture")
    told(secfacmic(*command, "--epsilon", 3), errors.UnreadableImageError, "--skip-unreadable")
    changed = {name for name, content in held(out).items() if before.get(name) != content}
    assert changed <= {name for name in before if name.endswith((".sqlite", ".sqlite-wal", ".sqlite-shm"))}
    assert held(out).keys() == before.keys()


def test_what_is_tested_on_the_neighbours_training_images_leaves_nothing(
    template: Path, images: Path, tmp_path: Path, secfacmic: Run
) -> None:
    data = tmp_path / "data"
    shutil.copytree(images, data)
    for path in (data / "dogwood").rglob("*.png"):
        shutil.copy(path, data / "ash" / path.relative_to(data / "dogwood"))
    for command in ("simulate", "demo"):
        ended = secfacmic(command, template, "--data", data, "--out", tmp_path / "out")
        told(ended, errors.DataLeakError, "shared = true")
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("simulate", "demo", "--seed", "-1"), "-1; expected a whole number of at least 0"),
        (("demo", "--rounds", "0"), "0; expected a whole number of at least 1"),
        (("demo", "--rounds", "two"), "two; expected a whole number of at least 1"),
        (("simulate", "demo", "--epsilon", "much"), "much; expected a number"),
        (("study", "init", "x", "--sites", "2"), "2; expected a whole number from 3 to 1000"),
        (("study", "init", "x", "--epsilon", "0"), "0; expected a number from 0.01 to 100"),
    ],
)
def test_a_refused_number_of_an_option_is_told_what_was_expected(
    words: tuple[str, ...], says: str, tmp_path: Path, secfacmic: Run
) -> None:
    ended = secfacmic(*words, "--out", tmp_path / "out")
    assert ended.returncode == 2
    assert says in ended.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rounds": 0}, "rounds = 0: expected a whole number from 1 to 100000"),
        ({"rounds": 2.5}, "rounds = 2.5: expected a whole number from 1 to 100000"),
        ({"max_sites": "many"}, "max_sites = 'many': expected a whole number from 1 to 4096"),
        ({"encoding": {"bits": 99, "value_bound": 0.5}}, "encoding.bits = 99: expected a whole number from 8 to 21"),
        ({"training": {"learning_rate": -1}}, "training.learning_rate = -1: expected a number above 0 and at most 10"),
        ({"mode": "plane"}, "mode = 'plane': expected 'he' or 'plain'"),
        ({"classes": 3}, "classes = 3: expected a list in brackets"),
        ({"backbone": "clip"}, "backbone = 'clip': expected a table"),
        (
            {"backbone": {"model": "mini-clip", "weights": "file", "seed": 3}},
            'backbone.seed = 3: expected file alone beside weights = "file": file is missing; seed must go',
        ),
        (
            {"backbone": {"model": "mini-clip", "weights": "file"}},
            'backbone.seed: expected file alone beside weights = "file": file is missing',
        ),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_wrong_value_of_a_file_is_told_what_was_expected(
    change: dict[str, object], says: str, tmp_path: Path, secfacmic: Run
) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(tomli_w.dumps({**template_table(rounds=1), **change}))
    told(secfacmic("study", "check", path), errors.StudyError, says)


def test_half_a_budget_asks_for_the_other_half(template: Path, tmp_path: Path, secfacmic: Run) -> None:
    ended = secfacmic("simulate", template, "--out", tmp_path / "out", "--delta", 1e-5)
    told(ended, errors.SiteFileError, "--delta 1e-05: half of a budget; expected --epsilon beside it")

"""Sweeps: what is asked for, what runs, what survives a crash, and what to choose by it."""

from __future__ import annotations

import csv
import json
import shutil
import time
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

from secure_fed import configs
from secure_fed.core.errors import DataLeakError, OutputError, StorageError, StudyError, SummaryError, SweepFileError
from secure_fed.lab.simulation import open_sites, prepare
from secure_fed.lab.sweep import (
    Finished,
    Sweep,
    SweepListener,
    _lend_features,
    _Lines,
    _prepare,
    _scratch,
    _task,
    code_digest,
    read_sweep,
    run_sweep,
)
from secure_fed.lab.sweep_file import Trial, plan_trials, read_sweep_file, with_settings
from secure_fed.lab.workers import Outcome
from secure_fed.model.scores import Scores
from secure_fed.operate.summary import Result, Round, StudySummary, parse_summary
from secure_fed.report.recommendation import Compared, Score, compare, recommend
from tests import report_folders
from tests.conftest import Run, template_table
from tests.forked import Forked


def write(folder: Path, table: dict[str, Any] | None = None, **sweep: Any) -> Path:
    """A study and a sweep of it in a folder; the sweep's file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "study.toml").write_text(tomli_w.dumps(table or template_table()))
    content = {"format": 1, "name": "small", "study": "study.toml", "data": str(folder), **sweep}
    (folder / "sweep.toml").write_text(tomli_w.dumps(content))
    return folder / "sweep.toml"


def planned(path: Path) -> list[Trial]:
    return plan_trials(*read_sweep_file(path))


# --- what is asked for ---


def test_grid_list_and_seeds_multiply(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        seeds=[0, 1],
        grid={"epsilon": [1, "none"], "method.adapter": ["facmic"]},
        list=[{"rounds": 1}, {"training.steps": 9}],
    )
    trials = planned(path)
    assert len(trials) == len({trial.id for trial in trials}) == 8
    assert trials[0].settings == {
        **{"epsilon": 1, "method.adapter": "facmic", "rounds": 1, "training.steps": 4, "seed": 0},
    }
    assert [(t.epsilon, t.settings["rounds"], t.settings["training.steps"], t.settings["seed"]) for t in trials] == [
        *((1, 1, 4, 0), (1, 1, 4, 1), (None, 1, 4, 0), (None, 1, 4, 1)),
        *((1, 3, 9, 0), (1, 3, 9, 1), (None, 3, 9, 0), (None, 3, 9, 1)),
    ]
    for trial in trials:
        assert trial.study is not None
        assert trial.study.rounds == trial.settings["rounds"]
        assert trial.study.training.steps == trial.settings["training.steps"]
        assert trial.study.seed == trial.settings["seed"]


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("demo", 12),
        ("smoke", 2),
        ("privacy_utility", 140),
        ("sites", 30),
        ("lanes_bits", 18),
        ("domain_shift", 45),
        ("two_scanners", 15),
    ],
)
def test_packaged_sweeps_hold_together(name: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path in (Path(name), Path(f"configs/sweeps/{name}.toml")):
        trials = planned(path)
        assert len(trials) == count
        assert [trial.error for trial in trials if trial.error] == []


def test_every_packaged_sweep_is_tested() -> None:
    assert {path.stem for path in (configs.FOLDER / "sweeps").iterdir()} == {
        *("demo", "smoke", "privacy_utility", "sites", "lanes_bits", "domain_shift", "two_scanners")
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": []}, "at least one seed"),
        ({"seeds": [1, 1]}, "each once"),
        ({"grid": {"rounds": []}}, "at least one value"),
        ({"grid": {"rounds": [2, 2]}}, "each once"),
        ({"grid": {"seed": [1]}}, "seeds = "),
        ({"grid": {"rounds": [2]}, "list": [{"rounds": 3}]}, "rounds: set twice"),
        ({"list": [{"seed": 3}]}, "set twice"),
        ({"colour": "red"}, "unknown key"),
        ({"data": "nowhere"}, "no folder"),
        ({"grid": {"method.lmmd_wieght": [0.0]}}, "lmmd_wieght"),
        ({"grid": {"method.adapter": ["facmic", "facmac"]}}, "facmac"),
        ({"grid": {"sites.9.weight": [0.5]}}, "nothing is called 9"),
        ({"grid": {"rounds": [2, -1]}}, "rounds = -1"),
        ({"grid": {"epsilon": [0]}}, "epsilon"),
        ({"grid": {"epsilon": ["many"]}}, "epsilon"),
        ({"grid": {"epsilon": [1], "delta": [0.5]}}, "delta"),
        ({"grid": {"sites": [9]}}, "data of 3 sites"),
        ({"grid": {"sites": [2]}}, "min_sites"),
        ({"list": [{"rounds": 2}, {"rounds": 2}]}, "twice"),
    ],
)
def test_a_file_that_does_not_hold_together(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = write(tmp_path, **changes)
    with pytest.raises(SweepFileError, match=message):
        planned(path)


def test_combinations_that_do_not_fit_are_trials_that_fail(tmp_path: Path) -> None:
    trials = planned(write(tmp_path, grid={"encoding.bits": [11, 16], "encoding.lanes": [2, 3]}))
    assert [trial.error is None for trial in trials] == [True, True, True, False]
    assert "16" in str(trials[3].error)


def test_what_a_method_makes_nothing_of_is_left_out_and_told(tmp_path: Path) -> None:
    """Of the study; what the sweep itself sets must make a difference, and fails alone where it cannot."""
    trials = planned(write(tmp_path, grid={"method.adapter": ["facmic", "text_head"]}))
    assert [trial.study.method.lmmd_weight for trial in trials if trial.study] == [1.0, 0.0]
    assert [bool(trial.ignored) for trial in trials] == [False, True]
    assert "text_head makes nothing of method.lmmd_weight" in trials[1].ignored[0]
    grid = {"method.adapter": ["facmic", "text_head"], "method.lmmd_weight": [0.0, 1.0]}
    asked = planned(write(tmp_path, grid=grid))
    assert [trial.error is None for trial in asked] == [True, True, True, False]
    assert "moves no image feature" in str(asked[3].error)


def test_counts_that_sums_do_not_carry_are_left_out_of_their_trials_and_told(tmp_path: Path) -> None:
    table = template_table(rounds=2, privacy={"validation_rounds": 1})
    adapters = {"method.adapter": ["text_head", "gaussian_head"]}
    trials = planned(write(tmp_path, table, grid=adapters))
    assert [trial.study.privacy.validation_rounds for trial in trials if trial.study] == [1, 0]
    assert any("gaussian_head makes nothing of privacy.validation_rounds" in words for words in trials[1].ignored)
    asked = planned(write(tmp_path, table, grid=adapters | {"privacy.validation_rounds": [0, 1]}))
    assert [trial.error is None for trial in asked] == [True, True, True, False]
    assert "privacy.validation_rounds = 1 makes no difference with gaussian_head" in str(asked[3].error)


def test_trials_whose_sites_share_a_folder_fail_before_anything_is_made(tmp_path: Path) -> None:
    table = template_table()
    table["simulation"]["sites"][1]["folder"] = "ash/0"
    with pytest.raises(SweepFileError, match=r"the folders of birch.*lie one inside the other"):
        planned(write(tmp_path, table))
    shared = planned(write(tmp_path, table, grid={"simulation.shared": [True]}))
    assert [trial.error for trial in shared] == [None]


@pytest.mark.usefixtures("forked_workers")
def test_a_sweep_over_sites_that_share_images_is_refused_as_a_whole(images: Path, tmp_path: Path) -> None:
    data = tmp_path / "images"
    shutil.copytree(images, data)
    shutil.rmtree(data / "dogwood")  # the observer, which is tested on all that it has
    shutil.copytree(data / "ash", data / "dogwood")
    path = write(tmp_path, data=str(data), grid={"training.steps": [1, 2]})
    with pytest.raises(DataLeakError, match="the sweep is refused as a whole"):
        run_sweep(path, tmp_path / "out", SweepListener(), jobs=1)
    assert read_sweep(tmp_path / "out").trials == []


def test_patients_are_never_swept(tmp_path: Path) -> None:
    table = template_table()
    without = {key: value for key, value in table.items() if key != "simulation"}
    with pytest.raises(StudyError, match="every trial on patients' data would spend budget"):
        planned(write(tmp_path / "a", without))
    table["simulation"] = {**table["simulation"], "kind": "patients"}
    with pytest.raises(StudyError, match="'public' or 'simulated'"):
        planned(write(tmp_path / "b", table))
    with pytest.raises(SweepFileError, match="'public' or 'simulated'"):
        planned(write(tmp_path / "c", grid={"simulation.kind": ["patients"]}))


def test_what_makes_a_trial_the_same(tmp_path: Path) -> None:
    """Its id changes with the study, budget and images, and with nothing else."""

    def ids(folder: str, table: dict[str, Any] | None = None, **sweep: Any) -> set[str]:
        path = write(tmp_path / folder, table, **sweep)
        for name in ("ash", "birch"):
            (tmp_path / folder / name).mkdir(exist_ok=True)
            (tmp_path / folder / name / "1.png").write_bytes(b"one")
        return {trial.id for trial in planned(path)}

    first = ids("a", seeds=[0, 1])
    assert ids("moved", seeds=[0, 1]) == first
    assert ids("a", seeds=[1, 2]) & first
    assert ids("a", seeds=[0, 1], grid={"rounds": [3]}) == first  # what the study says anyway
    assert ids("a", seeds=[0, 1], grid={"epsilon": ["none"]}) == first
    assert not ids("a", seeds=[0, 1], grid={"epsilon": [3]}) & first
    assert not ids("a", template_table(round_seconds=7.0), seeds=[0, 1]) & first
    (tmp_path / "a" / "ash" / "2.png").write_bytes(b"two")
    assert not ids("a", seeds=[0, 1]) & first
    assert not ids("a", seeds=[0], grid={"epsilon": [3]}) & ids("a", seeds=[0], grid={"epsilon": [3], "delta": [1e-6]})


def test_sites_beyond_the_study_have_scanners_of_their_own() -> None:
    demo = read_sweep_file(Path("sites"))[1]
    few, many = with_settings(demo, {"sites": 3}), with_settings(demo, {"sites": 10, "encoding.bits": 9})
    assert [site.name for site in few.sites] == ["north", "east", "south", "observer"]
    assert {group.name for group in few.plan.phantoms} == {"north", "east", "south", "observer"}
    assert many.max_sites == 10
    groups = {group.name: group for group in many.plan.phantoms}
    training = [site.name for site in many.sites if site.role == "train"]
    assert training[4:] == ["north-2", "east-2", "south-2", "west-2", "north-3", "east-3"]
    assert groups["east-3"].class_mix == groups["east"].class_mix
    assert len({group.scanner for group in groups.values()}) == len(groups) == 11


# --- what is kept ---


def line(trial: str, *, code: str = "c", accuracy: float | None = 0.5, **settings: Any) -> Finished:
    """A done trial of that accuracy at both its sites, or a failed one."""
    summary = None
    if accuracy is not None:
        score = Scores(balanced_accuracy=accuracy)
        found = parse_summary(report_folders.summary("facmic", None, 0), StudySummary, "line")
        federated = Result(per_site={"a": score, "b": score})
        one = Round(round=1, sites_in=2, bytes_up=settings.pop("size", 1), bytes_down=0, seconds=1.0)
        metrics = found.metrics.model_copy(update={"federated": federated})
        summary = found.model_copy(update={"metrics": metrics, "rounds": (one,)})
    seconds = settings.pop("seconds", 1.0)
    status: Any = "failed" if summary is None else "done"
    error = "no" if summary is None else None
    return Finished(trial, {"seed": 0, "epsilon": None, **settings}, status, error, summary, seconds, code, "now")


@settings(deadline=None, max_examples=30)
@given(st.lists(st.sampled_from("abc"), max_size=6), st.integers(0, 10_000))
def test_lines_survive_a_cut_anywhere(tmp_path_factory: pytest.TempPathFactory, names: list[str], cut: int) -> None:
    path = tmp_path_factory.mktemp("lines") / "trials.jsonl"
    lines = _Lines(path)
    ends = [0]
    for index, name in enumerate(names):
        lines.append(line(name, accuracy=index / 10))
        ends.append(path.stat().st_size)
    data = path.read_bytes() if names else b""
    path.write_bytes(data[: cut % (len(data) + 1)])
    kept = sum(end <= cut % (len(data) + 1) for end in ends[1:])
    again = _Lines(path)
    assert again.newest == {name: line(name, accuracy=index / 10) for index, name in enumerate(names[:kept])}
    again.append(line("d"))
    assert list(_Lines(path).newest) == list(dict.fromkeys([*names[:kept], "d"]))


def test_a_damaged_line_is_refused(tmp_path: Path) -> None:
    lines = _Lines(tmp_path / "trials.jsonl")
    lines.append(line("a"))
    lines.append(line("b"))
    data = (tmp_path / "trials.jsonl").read_bytes()
    for wrong in (data.replace(b'"trial"', b'"trail"', 1), b"\n" + data, data[1:], b"[" * 9000 + b"\n"):
        (tmp_path / "trials.jsonl").write_bytes(wrong)
        with pytest.raises(StorageError, match="line 1: no line of a sweep"):
            _Lines(tmp_path / "trials.jsonl")


def test_a_damaged_summary_is_refused_with_its_line_and_field(tmp_path: Path) -> None:
    lines = _Lines(tmp_path / "trials.jsonl")
    lines.append(line("a"))
    lines.append(line("b"))
    first, second = (tmp_path / "trials.jsonl").read_text().splitlines()
    broken = second.replace('"mode": "he"', '"mode": "clear"')
    (tmp_path / "trials.jsonl").write_text(f"{first}\n{broken}\n")
    with pytest.raises(SummaryError, match=r"trials\.jsonl, line 2, summary: 1 error\n  mode = 'clear'"):
        _Lines(tmp_path / "trials.jsonl")


def test_reading_what_is_no_sweep(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no sweep there"):
        read_sweep(tmp_path)
    (tmp_path / "sweep.json").write_text('{"format": 2}')
    with pytest.raises(OutputError, match="format 2"):
        read_sweep(tmp_path)


# --- running ---


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    """A sweep file of three trials: two that run and one that cannot."""
    table = template_table(rounds=1, training={"steps": 2, "learning_rate": 0.003, "batch_size": 8})
    grid = {"method.adapter": ["text_head"], "method.lmmd_weight": [0.0]}
    return write(
        tmp_path_factory.mktemp("sweep"),
        table,
        data=str(images),
        grid=grid,
        list=[{"rounds": 1}, {"rounds": 2}, {"epsilon": 8, "method.loss": "contrastive"}],
    )


def test_a_first_trial_that_cannot_be_prepared_fails_alone(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Features are made with the next trial of the same images."""
    asked: list[str] = []
    ran: list[str] = []

    def locally(function: Any, tasks: list[Any], jobs: int, log: Path) -> Any:
        for task in tasks:
            if function is _prepare:
                asked.append(task.trial.id)
                error = "no room" if len(asked) < 3 else None
                yield Outcome(task, None if error else ["two pictures are alike"], error, 0.1)
            else:
                ran.append(task.trial.id)
                yield Outcome(task, None, "was not asked for", 0.1)

    monkeypatch.setattr("secure_fed.lab.sweep.run_locally", locally)
    path = write(tmp_path / "sweep", data=str(images), grid={"rounds": [1, 2, 3, 4]})
    found = run_sweep(path, tmp_path / "out", SweepListener())
    order = [trial.id for trial in planned(path)]
    assert asked == order[:3]
    assert ran == order[2:]
    assert [line.error for line in found.trials] == ["no room"] * 2 + ["was not asked for"] * 2


@pytest.mark.usefixtures("forked_workers")
def test_a_sweep_is_killed_and_goes_on(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, secfacmic: Run
) -> None:
    out = tmp_path / "out"
    # Its worker is of the kind that all have but those of this process below: started by command.
    first = Forked(["sweep", str(small), "--out", str(out), "--jobs", "1"], tmp_path / "log")
    deadline = time.monotonic() + 900
    lines = out / "trials.jsonl"
    while not (lines.exists() and b"\n" in lines.read_bytes()) and time.monotonic() < deadline:
        assert first.poll() is None
        time.sleep(0.02)
    first.kill()
    first.wait()
    before = lines.read_bytes()
    assert "features" in {path.name for path in out.iterdir()}
    features = {path: path.stat().st_mtime_ns for path in (out / "features").iterdir()}

    second = secfacmic("sweep", small, "--out", out, "--jobs", 1, "--json", "--log", "tensorboard", "--log", "mlflow")
    assert second.returncode == 71, second.stderr
    assert "the same command tries the failed ones again" in second.stderr
    assert "method.loss = contrastive" in second.stderr
    assert "{'" not in second.stderr
    shown = json.loads(second.stdout)
    assert (shown["done"], len(shown["failed"]), shown["outside"]) == (2, 1, 0)
    assert "contrastive" in shown["failed"][0]["error"]
    assert lines.read_bytes().startswith(before)
    found = read_sweep(out)
    assert [trial.status for trial in found.trials] == ["done", "done", "failed"]
    assert [trial.settings["rounds"] for trial in found.trials] == [1, 2, 1]
    assert found.missing == []
    for trial in found.trials[:2]:
        assert trial.summary is not None
        assert trial.summary.mode == "he"
        assert len(trial.summary.rounds) == trial.settings["rounds"]
        assert trial.code == code_digest()
    assert [path for path in out.rglob("*") if "identity" in path.name or path.suffix == ".key"] == []
    ended = [json.loads(text) for text in lines.read_text().splitlines()]
    done = [entry["trial"] for entry in ended if entry["status"] == "done"]
    assert sorted(done.count(trial.trial) for trial in found.trials[:2]) == [1, 1]

    # What TensorBoard opens, and the CSV for MLflow, have each finished trial, and nothing of a single site.
    opened = EventMultiplexer().AddRunsFromDirectory(str(out / "tensorboard"))
    opened.Reload()
    finished = {trial.trial: trial.settings["rounds"] for trial in found.trials[:2]}
    assert opened.Runs().keys() == finished.keys()
    for trial, rounds in finished.items():
        assert [event.step for event in opened.Scalars(trial, "bytes_up")] == list(range(1, rounds + 1))
        tags = opened.Runs()[trial]["scalars"]
        assert set(tags) == {"bytes_down", "bytes_up", "seconds", "sites_in", "validation"}
    with (out / "metrics.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert {row["run"] for row in rows} == finished.keys()
    assert {row["value"] for row in rows if row["key"] == "method.adapter"} == {"text_head"}
    assert not [name for name in ("ash", "birch", "cedar", "dogwood") if name in (out / "metrics.csv").read_text()]

    # Nothing is left but what failed; another grid adds to it, and what it leaves out is kept beside.
    content = small.read_text()
    told: list[tuple[int, int, int]] = []
    grown = tmp_path / "grown.toml"
    (tmp_path / "study.toml").write_text((small.parent / "study.toml").read_text())
    table = tomllib.loads(content)
    table["list"] = table["list"][1:2]
    grown.write_text(tomli_w.dumps(table))
    after = run_sweep(grown, out, SweepListener(trials=lambda *counts: told.append(counts)))
    assert told == [(1, 0, 1)]
    assert len(after.trials) == 1
    assert {trial.trial for trial in after.outside} == {trial.trial for trial in found.trials} - {
        trial.trial for trial in after.trials
    }
    assert {path: path.stat().st_mtime_ns for path in (out / "features").iterdir()} == features

    # Results of other code are refused, and so is another sweep.
    monkeypatch.setattr("secure_fed.lab.sweep.code_digest", lambda: "0" * 64)
    with pytest.raises(OutputError, match="1 trials were run by other code"):
        run_sweep(grown, out, SweepListener())
    grown.write_text(tomli_w.dumps({**table, "name": "other"}))
    with pytest.raises(OutputError, match="holds sweep small; expected other"):
        run_sweep(grown, out, SweepListener())


def test_images_are_encoded_once(small: Path, tmp_path: Path) -> None:
    """What is prepared for one trial is lent to every other of the same images, so that none encodes."""
    file, study = read_sweep_file(small)
    one, other, _ = (_task(trial, trial.study, file, tmp_path) for trial in plan_trials(file, study))
    assert one.images == other.images
    for expected in (30, 0):
        with _scratch(other) as scratch:
            assert other.study is not None
            agreed = prepare(other.study, scratch, other.data)
            _lend_features(other, scratch)
            assert {site.features().encoded for site in open_sites(agreed, scratch)} == {expected}
        assert not scratch.exists()
        assert one.is_prepared == other.is_prepared == (expected == 0)
        _prepare(one)
    Path(one.marker).unlink()
    assert not other.is_prepared


@pytest.mark.slow
def test_a_phantom_sweep_with_privacy(tmp_path: Path) -> None:
    found = run_sweep(Path("smoke"), tmp_path / "out", SweepListener())
    assert [trial.status for trial in found.trials] == ["done", "done"]
    private, plain = (trial.summary for trial in found.trials)
    assert private is not None
    assert plain is not None
    assert private.privacy["north"].epsilon_budget == 8
    assert private.privacy["north"].simulated is True
    assert plain.privacy == {}
    assert [entry.epsilon for entry in recommend(found)] == [8, None]


@pytest.mark.slow
def test_the_same_sweep_on_ray(small: Path, tmp_path: Path) -> None:
    """The same trials with the same results, digest of the adapter included."""
    here = run_sweep(small, tmp_path / "here", SweepListener(), jobs=2)
    there = run_sweep(small, tmp_path / "there", SweepListener(), ray="local")
    assert [trial.status for trial in there.trials] == ["done", "done", "failed"]
    for one, other in zip(here.trials[:2], there.trials[:2], strict=True):
        assert one.summary is not None
        assert other.summary is not None
        assert one.trial == other.trial
        assert one.summary.adapter_digest == other.summary.adapter_digest
        assert one.summary.metrics == other.summary.metrics


# --- what to choose ---


def sweep_of(*trials: Finished) -> Sweep:
    facts = {
        "study": "demo",
        "data_kind": "simulated",
        "unit": "patient",
        "axes": {"epsilon": [], "m": []},
        "facts": {"delta": 1e-5},
    }
    return Sweep(facts, list(trials), [], [])


def test_scores_over_seeds() -> None:
    trials = [line(str(seed), accuracy=value, m="x", seed=seed) for seed, value in enumerate((0.5, 0.6, 0.7))]
    (compared,) = compare([*trials, line("failed", accuracy=None, m="x", seed=3)])
    assert compared.seeds == (0, 1, 2)
    assert compared.sites is not None
    assert compared.sites.mean == pytest.approx(0.6)
    assert compared.sites.error == pytest.approx(0.1 / np.sqrt(3))
    assert compared.held_out is None
    assert str(compared.sites) == "60.0 ± 5.8"
    assert str(Score.of([0.5])) == "50.0"


def test_the_cheapest_within_one_standard_error_is_chosen() -> None:
    def both(name: str, low: float, high: float, **settings: Any) -> list[Finished]:
        return [
            line(f"{name}{seed}", accuracy=value, m=name, seed=seed, **settings)
            for seed, value in enumerate((low, high))
        ]

    # Standard error of the best, 0.9: 0.02; so 0.88 and better will do.
    best = both("best", 0.88, 0.92, size=100)
    near = both("near", 0.88, 0.885, size=10, seconds=5.0)
    quick = both("quick", 0.88, 0.885, size=10, seconds=4.0)
    cheap = both("cheap", 0.87, 0.87, size=1)
    private = both("private", 0.6, 0.7, size=1, epsilon=3)
    found = recommend(sweep_of(*best, *near, *quick, *cheap, *private))
    assert [entry.epsilon for entry in found] == [3, None]
    assert [entry.chosen.settings["m"] for entry in found] == ["private", "quick"]
    assert found[1].best.settings["m"] == "best"
    words = found[0].words
    for expected in (
        *("epsilon = 3 and delta = 1e-05", "adding or removing any one patient", "65.0 ± 5.0 %", "over 2 seeds"),
        *(
            "One setting was tried at this privacy budget on",
            "m = private",
            "Excluded: the declared number of patients",
            "no patient's budget was spent",
        ),
    ):
        assert expected in words
    assert "Of 4 settings tried without a privacy budget on" in found[1].words
    assert "without differential privacy" in found[1].words
    assert "the cheapest within one standard error of the best, 90.0 ± 2.0 %" in found[1].words


def test_data_are_not_chosen() -> None:
    scanner = "simulation.phantoms.observer.scanner"
    trials = [
        line(f"{at}{m}", accuracy=value, m=m, size=1, **{scanner: at})
        for at, m, value in ((1, "a", 0.9), (1, "b", 0.8), (9, "a", 0.6), (9, "b", 0.7))
    ]
    chosen = [entry.chosen.settings for entry in recommend(sweep_of(*trials))]
    assert [(entry[scanner], entry["m"]) for entry in chosen] == [(1, "a"), (9, "b")]


def test_with_one_seed_the_best_is_chosen() -> None:
    (found,) = recommend(sweep_of(line("a", accuracy=0.9, m="a", size=9), line("b", accuracy=0.89, m="b")))
    assert isinstance(found.chosen, Compared)
    assert found.chosen.settings["m"] == "a"
    assert "without a standard error" in found.words

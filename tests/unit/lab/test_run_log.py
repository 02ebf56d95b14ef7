"""Runs for TensorBoard and MLflow: each round once, and nothing of a single site."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from secure_fed.core.errors import OutputError
from secure_fed.lab.run_log import EVENTS, METRICS, Log, refuse_logs, write_logs
from secure_fed.operate.summary import StudySummary, parse_summary
from tests.conftest import OBSERVER, TRAINING


@pytest.fixture
def summary(finished_run: Path) -> StudySummary:
    return parse_summary(json.loads((finished_run / "summary.json").read_text()), StudySummary, "summary")


def test_rounds_as_rows_for_mlflow(summary: StudySummary, tmp_path: Path) -> None:
    settings = {"epsilon": None, "rounds": 3}
    assert write_logs([Log.MLFLOW], tmp_path, {"one": (settings, summary), "two": ({}, summary)}) == [
        tmp_path / METRICS
    ]
    with (tmp_path / METRICS).open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert {row["run"] for row in rows} == {"one", "two"}
    params = {row["key"]: row["value"] for row in rows if (row["run"], row["kind"]) == ("one", "param")}
    assert params | {"study": ""} == {
        "study": "", "method": "facmic", "mode": "he", "seed": "3", "epsilon": "none", "rounds": "3"
    }  # fmt: skip
    metrics = [row for row in rows if (row["run"], row["kind"]) == ("one", "metric")]
    assert len(metrics) == 5 * 3
    for entry in summary.rounds:
        found = {row["key"]: float(row["value"]) for row in metrics if row["step"] == str(entry.round)}
        assert found["bytes_up"] == entry.bytes_up
        assert found["validation"] == pytest.approx(entry.validation)
    text = (tmp_path / METRICS).read_text()
    assert not [name for name in (*TRAINING, OBSERVER, "accuracy") if name in text]


def test_rounds_as_events_for_tensorboard_each_once(summary: StudySummary, tmp_path: Path) -> None:
    for _ in range(2):
        write_logs([Log.TENSORBOARD], tmp_path, {"small": ({}, summary)})
    read = EventAccumulator(str(tmp_path / EVENTS / "small"))
    read.Reload()
    assert sorted(read.Tags()["scalars"]) == ["bytes_down", "bytes_up", "seconds", "sites_in", "validation"]
    assert [event.step for event in read.Scalars("bytes_up")] == [1, 2, 3]


def test_a_table_of_something_else_stays_and_is_told_before_the_run(tmp_path: Path) -> None:
    (tmp_path / METRICS).write_text("date,weight\n")
    refuse_logs([], tmp_path)
    with pytest.raises(OutputError, match="this command did not write it"):
        refuse_logs([Log.MLFLOW], tmp_path)
    write_logs([Log.MLFLOW], tmp_path, {})
    refuse_logs([Log.MLFLOW], tmp_path)


def test_without_tensorboard_it_is_said_before_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refuse_logs([Log.MLFLOW], tmp_path)
    with pytest.raises(OutputError, match=r"pip install 'secfacmic\[tensorboard\]'"):
        refuse_logs([Log.TENSORBOARD], tmp_path)
    shutil.rmtree(tmp_path)

"""Tasks in other processes: each fails alone, and none outlives its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from secure_fed.core.errors import WorkersError
from secure_fed.lab.workers import Outcome, run_locally, run_on_ray
from tests.sweep_tasks import work

TASKS = ["echo a", "refuse", "stumble 0", "die", "echo b", "echo c"]


def check(outcomes: dict[str, Outcome], death: str) -> None:
    assert {task: outcomes[task].result for task in TASKS} == {
        **{"echo a": "a", "echo b": "b", "echo c": "c"},
        **dict.fromkeys(("refuse", "stumble 0", "die")),
    }
    assert outcomes["refuse"].error == "no images; expected some"
    stumbled = outcomes["stumble 0"].error
    assert stumbled is not None
    assert stumbled.startswith("ZeroDivisionError at sweep_tasks.py:")
    assert death in str(outcomes["die"].error)
    assert all(outcome.error is None for task, outcome in outcomes.items() if task.startswith("echo"))


@pytest.mark.parametrize("jobs", [1, 3])
def test_a_task_that_fails_or_dies_fails_alone(tmp_path: Path, jobs: int) -> None:
    outcomes = {outcome.task: outcome for outcome in run_locally(work, TASKS, jobs, tmp_path / "log")}
    check(outcomes, "was killed by signal 9 (out of memory?)")
    assert b"ZeroDivisionError" in (tmp_path / "log").read_bytes()


def test_workers_have_one_thread_and_leave_ours_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    (outcome,) = run_locally(work, ["threads"], 1, tmp_path / "log")
    assert outcome.result == "1"
    assert os.environ["OMP_NUM_THREADS"] == "7"


def test_closing_ends_what_still_runs(tmp_path: Path) -> None:
    with closing(run_locally(work, [f"sleep {tmp_path / 'pid'}", "echo a"], 2, tmp_path / "log")) as outcomes:
        assert next(outcomes).result == "a"
        child = wait_for(tmp_path / "pid")
    assert not alive(child)


def test_workers_die_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    program = (
        "from pathlib import Path\nfrom secure_fed.lab.workers import run_locally\nfrom tests.sweep_tasks import work\n"
        f"if __name__ == '__main__':\n"
        f"    list(run_locally(work, ['sleep {tmp_path}/pid'], 1, Path('{tmp_path}/log')))\n"
    )
    (tmp_path / "program.py").write_text(program)
    root = str(Path(__file__).parents[3])
    parent = subprocess.Popen(
        [sys.executable, "-P", tmp_path / "program.py"], env={**os.environ, "PYTHONPATH": root}, cwd=tmp_path
    )
    child = wait_for(tmp_path / "pid")
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 30
    while alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(child)


@pytest.mark.slow
def test_the_same_tasks_on_ray() -> None:
    outcomes = {outcome.task: outcome for outcome in run_on_ray(work, TASKS, "local")}
    check(outcomes, "its Ray worker ended")


@pytest.mark.slow
def test_no_cluster_there() -> None:
    with pytest.raises(WorkersError, match="no Ray cluster there"):
        list(run_on_ray(work, TASKS, "127.0.0.1:9"))


def wait_for(path: Path) -> int:
    deadline = time.monotonic() + 60
    while not (path.exists() and path.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return int(path.read_text())


def alive(process: int) -> bool:
    """Whether it runs; a zombie that nobody has waited for yet does not."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"

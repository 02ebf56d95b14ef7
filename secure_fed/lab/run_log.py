"""A run's rounds for the tools with which researchers compare runs: TensorBoard's event files, a CSV for MLflow.

Of each round only what all parties of a study know anyway: how many sites were in, bytes, seconds, and the share of
validation images of all sites that were right. Nothing of a single site.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import time
from collections.abc import Collection, Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

from secure_fed.core.errors import OutputError
from secure_fed.core.storage import make_folder, refuse_foreign, write_durable
from secure_fed.operate.summary import StudySummary


class Log(StrEnum):
    """A tool to write for."""

    TENSORBOARD = "tensorboard"
    MLFLOW = "mlflow"


EVENTS = "tensorboard"
METRICS = "metrics.csv"
"""Where they lie in the folder of a simulation or a sweep."""

_COLUMNS = ("run", "kind", "key", "value", "step", "timestamp")
_KEYS = ("sites_in", "bytes_up", "bytes_down", "seconds", "validation")


def refuse_logs(logs: Collection[Log], folder: Path) -> None:
    """Check before a long run that what it is to be written with is installed, and that there is a place for it.

    Raises:
        OutputError: it is not, or a file is there that is no earlier log.
    """
    if Log.MLFLOW in logs and folder.is_dir():
        refuse_foreign(folder / METRICS, lambda head: head.startswith(",".join(_COLUMNS).encode()))
    if Log.TENSORBOARD in logs and importlib.util.find_spec("tensorboard") is None:
        raise OutputError(
            "--log tensorboard: TensorBoard is not installed; expected it here: pip install 'secfacmic[tensorboard]'"
        )


def write_logs(
    logs: Collection[Log], folder: Path, runs: Mapping[str, tuple[Mapping[str, Any], StudySummary]]
) -> list[Path]:
    """Write what is asked for.

    Args:
        logs: of ``TENSORBOARD`` event files, a folder a run; of ``MLFLOW`` one CSV whose rows are what MLflow's
            ``log_batch`` takes: params without a step, metrics with the round as theirs.
        folder: of the simulation or the sweep.
        runs: by name, a run's settings and what it found.

    Returns:
        What was written.

    Raises:
        StorageError: it cannot be written.
    """
    written = []
    if Log.MLFLOW in logs:
        written.append(folder / METRICS)
        write_durable(written[-1], _as_csv(runs).encode())
    if Log.TENSORBOARD in logs:
        written.append(folder / EVENTS)
        for name, (_, summary) in runs.items():
            _write_events(folder / EVENTS / name, summary)
    return written


def _metrics(summary: StudySummary) -> Iterator[tuple[str, float, int]]:
    """Key, value and round of what all parties know."""
    for entry in summary.rounds:
        for key in _KEYS:
            value = getattr(entry, key)
            if value is not None:
                yield key, float(value), entry.round


def _as_csv(runs: Mapping[str, tuple[Mapping[str, Any], StudySummary]]) -> str:
    now = time.time_ns() // 1_000_000
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for name, (settings, summary) in runs.items():
        about = {"study": summary.study_id, "method": summary.method, "mode": summary.mode, "seed": summary.seed}
        for key, value in (about | dict(settings)).items():
            writer.writerow((name, "param", key, "none" if value is None else value, "", now))
        for key, value, step in _metrics(summary):
            writer.writerow((name, "metric", key, f"{value:.10g}", step, now))
    return text.getvalue()


def _write_events(folder: Path, summary: StudySummary) -> None:
    from torch.utils.tensorboard import SummaryWriter

    make_folder(folder)
    for old in folder.glob("events.out.tfevents.*"):  # else a second writing would show every point twice
        old.unlink()
    writer = SummaryWriter(str(folder))
    for key, value, step in _metrics(summary):
        writer.add_scalar(key, value, step)
    writer.close()

"""Functions for worker processes, which import them by name."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from secure_fed.core.errors import DataError


def work(task: str) -> str:
    """Do what the task says: ``echo X``, ``refuse``, ``stumble``, ``die``, or ``sleep FILE``."""
    what, _, argument = task.partition(" ")
    if what == "refuse":
        raise DataError("no images; expected some")
    if what == "stumble":
        return str(1 // int(argument))
    if what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "sleep":
        Path(argument).write_text(str(os.getpid()))
        time.sleep(600)
    if what == "threads":
        return os.environ["OMP_NUM_THREADS"]
    return argument

"""Tasks in other processes, of this machine or of a Ray cluster: a task that fails fails alone, its process too."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from secure_fed.core.errors import SecfacmicError, WorkersError
from secure_fed.core.processes import PARENT, die_with_parent

Function = Callable[[Any], Any]
"""A function of a module, of one argument; argument and result can be pickled."""

Outcomes = Generator["Outcome", None, None]
"""Closing it ends what still runs."""

_ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Outcome:
    """How one task ended.

    Attributes:
        task: the argument.
        result: what the function returned; None if it failed.
        error: why it failed, in words; None if it did not.
        seconds: it took.
    """

    task: Any
    result: Any
    error: str | None
    seconds: float


def run_locally(function: Function, tasks: Sequence[Any], jobs: int, log: Path) -> Outcomes:
    """Run tasks in processes of their own, one thread each; outcomes in the order in which tasks end.

    A process takes one task after the other. One that dies is replaced, and only its task fails. When the iterator is
    closed, or this process ends in whatever way, all of them are killed.

    Args:
        function: what to run.
        tasks: its arguments.
        jobs: processes at a time, at least 1.
        log: file that gets what the processes write to stdout and stderr.
    """
    waiting = deque(tasks)
    busy: dict[Connection, tuple[_Worker, Any, float]] = {}

    def give(worker: _Worker | None) -> None:
        """Hand the next task to a worker, a new one if there is none."""
        if not waiting:
            if worker is not None:
                worker.end()
            return
        worker = worker or _Worker(function, log)
        task = waiting.popleft()
        busy[worker.connection] = worker, task, time.monotonic()
        worker.connection.send(task)

    try:
        for _ in range(jobs):
            give(None)
        while busy:
            for connection in wait(list(busy)):
                assert isinstance(connection, Connection)
                worker, task, start = busy.pop(connection)
                try:
                    result, error, seconds = connection.recv()
                except (EOFError, ConnectionError):
                    result, error = None, f"its process {worker.how_it_died()}; see {log}"
                    seconds = time.monotonic() - start
                    give(None)
                else:
                    give(worker)
                yield Outcome(task, result, error, seconds)
    finally:
        for worker, _, _ in busy.values():
            worker.end()


def run_on_ray(function: Function, tasks: Sequence[Any], address: str) -> Outcomes:
    """Run the same tasks on a Ray cluster, one CPU each, without retries; outcomes in the order in which tasks end.

    Args:
        function: what to run; every node has this package installed.
        tasks: its arguments.
        address: of the cluster (``HOST:PORT``, ``auto``, ``ray://HOST:PORT``), or ``local`` to start one here.

    Raises:
        WorkersError: Ray is not installed, or the cluster does not answer.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # nothing is told to anybody
    try:
        import ray
    except ImportError as error:
        raise WorkersError(
            "Ray is not installed; install it with: pip install 'secfacmic[ray]', or leave out --ray"
        ) from error
    own: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    try:
        _require_answer(address)
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **own)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise WorkersError(
            f"--ray {address}: no Ray cluster there ({str(error).splitlines()[0]}); expected one that runs "
            "(ray start --head), auto, or local"
        ) from error
    try:
        remote = ray.remote(num_cpus=1, max_retries=0)(_attempt)
        pending = {remote.remote(function, task): task for task in tasks}
        while pending:
            (ready,), _ = ray.wait(list(pending), num_returns=1)
            task = pending.pop(ready)
            try:
                result, failure, seconds = ray.get(ready)
            except ray.exceptions.RayError as error:
                result, failure, seconds = None, f"its Ray worker ended: {str(error).splitlines()[0]}", 0.0
            yield Outcome(task, result, failure, seconds)
    finally:
        ray.shutdown()


def _require_answer(address: str) -> None:
    """Fail in seconds where nothing listens; Ray itself would try for many minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


class _Worker:
    """One process and our end of the pipe to it. Start it from the main thread, which the kernel takes for the
    parent."""

    def __init__(self, function: Function, log: Path) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would copy the threads' locks
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, function, log), daemon=True)
        with _environment({PARENT: str(os.getpid()), **_ONE_THREAD}):
            self._process.start()
        theirs.close()  # so that the pipe ends with the process

    def how_it_died(self) -> str:
        self._process.join()
        code = self._process.exitcode or 0
        if code < 0:
            hint = " (out of memory?)" if code == -signal.SIGKILL else ""
            return f"was killed by signal {-code}{hint}"
        return f"ended with {code}"

    def end(self) -> None:
        self._process.kill()
        self._process.join()
        self.connection.close()


def _serve(connection: Connection, function: Function, log: Path) -> None:
    """A worker's life: a task, its result, the next task, until the pipe ends."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends us
    with log.open("ab") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        connection.send(_attempt(function, task))


def _attempt(function: Function, task: Any) -> tuple[Any, str | None, float]:
    """Result and None, or None and why it failed; and the seconds it took."""
    start = time.monotonic()
    try:
        return function(task), None, time.monotonic() - start
    except SecfacmicError as error:
        return None, str(error), time.monotonic() - start
    except Exception as error:  # whatever it is, it is this task's alone
        traceback.print_exc(file=sys.stderr)
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(place.filename).name}:{place.lineno}"
        return None, f"{type(error).__name__} at {where}: {error}", time.monotonic() - start


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Environment variables for the children started meanwhile."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

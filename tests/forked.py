"""Site processes without the seconds and the memory that importing torch takes each of them.

One process imports everything and forks (multiprocessing's fork server). What it forks are processes like others: with
a pid, a log, an exit status, and death by signals.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_PR_SET_PDEATHSIG = 1
_CLONE_NEWNET = 0x40000000

AUDIT = """
import os, sys
file = os.open(os.environ["SOCKET_AUDIT"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
def hook(event, arguments):
    if event in ("socket.connect", "socket.bind", "socket.sendto"):
        os.write(file, f"{os.getpid()} {event} {arguments[-1]!r}\\n".encode())
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        os.write(file, f"{os.getpid()} {event} {arguments[0]!r}\\n".encode())
sys.addaudithook(hook)
"""
"""A process that has run it notes in a file whom it calls."""

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.forked_imports"])


class Forked:
    """``secfacmic ARGUMENTS`` in a forked process; the part of :class:`subprocess.Popen` that tests use.

    Args:
        arguments: of the command.
        log: where its output goes.
        fault: what is wrong in it (:mod:`tests.fault_hooks`).
        space: network namespace that it enters first.
        environment: changes of its environment; with ``SOCKET_AUDIT`` it notes in that file whom it calls.
        out: where what it prints goes, if not into the log.
    """

    def __init__(
        self,
        arguments: list[str],
        log: Path,
        fault: dict[str, Any] | None = None,
        space: str | None = None,
        environment: Mapping[str, str] | None = None,
        out: Path | None = None,
    ) -> None:
        given = (arguments, str(log), fault or {}, space, dict(environment or {}), str(out or log))
        self._process = CONTEXT.Process(target=_run, args=given, daemon=True)
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("forked", timeout or 0.0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _run(
    arguments: list[str], log: str, fault: dict[str, Any], space: str | None, environment: dict[str, str], out: str
) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    library.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # die with the fork server, which dies with the test
    if space is not None:
        entrance = os.open(f"/run/netns/{space}", os.O_RDONLY)
        if library.setns(entrance, _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns", space)
    os.environ.update(environment)
    if "SOCKET_AUDIT" in environment:
        exec(AUDIT, {})
    for place, number in ((out, 1), (log, 2)):
        os.dup2(os.open(place, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), number)
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # it may have children
    from secure_fed.cli import main
    from tests.fault_hooks import install

    install(fault)
    sys.argv = ["secfacmic", *arguments]
    main()

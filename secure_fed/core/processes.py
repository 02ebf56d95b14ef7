"""Processes of ours: logs of one line each, an environment in which nothing calls home, children that do not outlive
their parent."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import IO

PARENT = "SECFACMIC_PARENT"
"""Environment variable by which a parent tells a child its process id."""

_PR_SET_PDEATHSIG = 1

_OFFLINE = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_TRACING_ENABLED": "0",
}


_OWN = "secure_fed"


def safe_message(record: logging.LogRecord) -> str:
    """A message without a stack trace, which would carry paths and what it stopped at; of other libraries, whose
    messages may too, only that there is one."""
    if record.name.partition(".")[0] != _OWN:
        return f"{record.name} reports an error"
    text = record.getMessage()
    if record.exc_info and record.exc_info[0] is not None:
        text = f"{text} ({record.exc_info[0].__name__})"
    return text


class _OneLine(logging.Formatter):
    """One line a message."""

    def format(self, record: logging.LogRecord) -> str:
        text = safe_message(record)
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created))
        return f"{when} {record.levelname} {' | '.join(text.split(chr(10)))}"


def be_quiet_outside() -> None:
    """Turn off whatever Flower would send or fetch besides its own protocol; call before flwr is imported."""
    os.environ.update(_OFFLINE)
    # httpx would send even loopback traffic to a proxy.
    own = "127.0.0.1,localhost,::1"
    for name in ("NO_PROXY", "no_proxy"):
        known = os.environ.get(name)
        if not known:
            os.environ[name] = own
        elif own not in known:
            os.environ[name] = f"{known},{own}"


def log_lines(stream: IO[str] | None = None) -> None:
    """Send what our own modules report to stderr, one line each; of other libraries only errors.

    What they report as of no interest but to who looks for a fault (``DEBUG``) goes to log files alone.

    Call after flwr is imported, which sets up its own logging then.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(_OneLine())
    handler.setLevel(logging.INFO)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.ERROR)
    logging.captureWarnings(True)  # which are none of an operator's business, and may quote what was read
    own = logging.getLogger(_OWN)
    own.handlers.clear()
    own.setLevel(logging.DEBUG)
    # Flower writes to a handler of its own, and reports every refused message as an error; what matters of that is
    # reported by us.
    flower = logging.getLogger("flwr")
    flower.handlers.clear()
    flower.setLevel(logging.CRITICAL)
    # At every end it reports connections that wait as an error; requests that fail are reported by us.
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
    # A thread of Flower's that ends would print where, in many lines.
    threading.excepthook = lambda ended: logging.getLogger(__name__).error(
        "a thread ended with %s", ended.exc_type.__name__ if ended.exc_type else "no word"
    )


def settle() -> None:
    """Leave what is loaded by now out of all further garbage collection, once a process that runs for long is set up.

    It stays to the end, and was an eighth of what a server's processes cost: each whole collection went through it.
    """
    gc.collect()
    gc.freeze()


def end_on_sigterm() -> None:
    """Take SIGTERM as Ctrl-C, so that a service manager's stop is as clean."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)


def die_with_parent() -> None:
    """In a child started by :func:`start`: be killed when the parent ends, however it ends. Else do nothing."""
    given = os.environ.pop(PARENT, None)
    if given is not None:
        die_with(int(given))


def die_with(parent: int) -> None:
    """In a child: be killed when the parent of this process id ends, however it ends."""
    if sys.platform == "linux":
        # None loads what is already in the process.
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    if os.getppid() != parent:  # it ended before we asked
        os._exit(1)


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def start(arguments: Sequence[str], log: Path | None = None, stdin: bool = False) -> subprocess.Popen[bytes]:
    """Start a child that ends with this process. Call from the main thread, which the kernel takes for the parent.

    Args:
        arguments: after the interpreter's own: ``-m`` and a module, and its arguments.
        log: where its output goes; else to ours.
        stdin: whether a pipe to it is opened.
    """
    environment = dict(os.environ)
    environment[PARENT] = str(os.getpid())
    # -P: a folder in the working directory must not be taken for one of our packages.
    command = [sys.executable, "-P", *arguments]
    with contextlib.ExitStack() as stack:
        output = None if log is None else stack.enter_context(log.open("ab"))
        # A session of its own: Ctrl-C reaches the parent alone, which ends its children in order.
        return subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE if stdin else subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )


def stop(children: Sequence[subprocess.Popen[bytes]], seconds: float = 10.0) -> None:
    """End children: ask all, wait, then kill those that remain."""
    for child in children:
        if child.poll() is None:
            child.terminate()
    deadline = time.monotonic() + seconds
    for child in children:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(max(0.0, deadline - time.monotonic()))
        if child.poll() is None:
            child.kill()
            child.wait()

"""What a running server or site leaves on its disk for the person who runs it, and how to read it.

``STATE/status.json``       where it stands and what it reported last
``STATE/log/NAME.jsonl``    what it reported: a JSON object a line, with time, level, module and message; rotated

Both say what the process says on stderr and nothing else. At a site that is nothing about any patient: our own messages
name no image, label or patient while a study runs, and of other libraries' messages only the library's name is kept.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import logging.handlers
import os
import threading
import time
from pathlib import Path
from typing import Any

from secure_fed.core.errors import StorageError
from secure_fed.core.layout import StateFolder
from secure_fed.core.processes import safe_message
from secure_fed.core.storage import as_open_as_its_folder, make_folder, write_whole

LOG_BYTES, LOG_FILES = 5_000_000, 5
"""A log's size, and how many of them are kept."""


class StatusFile:
    """Where a process stands. Losing it costs nothing: a status that cannot be written never stops a study.

    Args:
        state: the state folder.
    """

    def __init__(self, state: Path) -> None:
        self._path = StateFolder(state).status
        self._seen: tuple[int, ...] = ()  # the file whose facts these are
        self._known: Any = {}
        self._telling = threading.Lock()

    def begin(self, role: str, **facts: Any) -> None:
        """Start anew, as a process that now runs.

        Args:
            role: ``server`` or ``site``.
            facts: that do not change while it runs.
        """
        self._write({"format": 1, "role": role, "pid": os.getpid(), "started": now(), "last_error": None, **facts})

    def tell(self, **facts: Any) -> None:
        """Add or replace facts; nothing is written if nothing changed."""
        with self._telling:
            known = self.read()
            if any(known.get(name) != value for name, value in facts.items()):
                self._write({**known, **facts})

    def error(self, text: str) -> None:
        """Replace the last error."""
        self.tell(last_error={"time": now(), "text": text})

    def read(self) -> dict[str, Any]:
        """All facts; none if there is no whole file."""
        try:
            with self._path.open("rb") as stream:
                seen = _identity(os.fstat(stream.fileno()))
                if seen != self._seen:
                    self._known, self._seen = json.loads(stream.read()), seen
        except (OSError, ValueError, RecursionError):
            return {}
        return self._known if isinstance(self._known, dict) else {}

    def _write(self, facts: dict[str, Any]) -> None:
        facts = {**facts, "updated": now()}
        data = (json.dumps(facts) + "\n").encode()
        # On a full disk, whatever else is written will say so.
        with contextlib.suppress(StorageError, OSError):
            write_whole(self._path, data)  # each line that is logged comes here
            found = self._path.stat()
            if found.st_size == len(data):  # else another process has written since
                self._known, self._seen = facts, _identity(found)


def _identity(found: os.stat_result) -> tuple[int, ...]:
    return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size


def now() -> str:
    """The clock, UTC, in whole seconds."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def is_running(state: Path) -> bool:
    """Whether a process holds a state folder."""
    try:
        with StateFolder(state).lock.open("rb") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
    except OSError:
        pass
    return False


def keep_log(state: Path, name: str, status: StatusFile) -> None:
    """From now on keep what our own modules report in ``STATE/log/NAME.jsonl``, and the last of it in the status.

    Call after :func:`secure_fed.core.processes.log_lines`.

    Raises:
        StorageError: the folder cannot be made.
    """
    folder = StateFolder(state)
    make_folder(folder.logs, 0o700)
    root = logging.getLogger()
    root.addHandler(_JsonLines(folder.log(name)))
    root.addHandler(_LastLine(status))


class _JsonLines(logging.handlers.RotatingFileHandler):
    def __init__(self, path: Path) -> None:
        super().__init__(path, maxBytes=LOG_BYTES, backupCount=LOG_FILES - 1, encoding="utf-8", delay=True)

    def _open(self) -> Any:
        return open(self.baseFilename, self.mode, encoding=self.encoding, opener=as_open_as_its_folder)

    def format(self, record: logging.LogRecord) -> str:
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created))
        line = {"time": when, "level": record.levelname, "module": record.name, "message": safe_message(record)}
        return json.dumps(line)

    def handleError(self, record: logging.LogRecord) -> None:
        """A log on a full disk loses lines; it neither stops a study nor prints a traceback."""


class _LastLine(logging.Handler):
    def __init__(self, status: StatusFile) -> None:
        super().__init__()
        self._status = status
        self.setLevel(logging.INFO)

    def emit(self, record: logging.LogRecord) -> None:
        text = safe_message(record)
        facts: dict[str, Any] = {"last": {"time": now(), "text": text}}
        if record.levelno >= logging.WARNING:
            facts["last_error"] = facts["last"]
        self._status.tell(**facts)

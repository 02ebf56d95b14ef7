"""What the processes of a server and a site do around a study: hold a state folder, and leave there what they say."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from secure_fed.core.errors import StorageError
from secure_fed.core.layout import StateFolder
from secure_fed.core.status import StatusFile, keep_log
from secure_fed.core.storage import exclusive, remove_unfinished
from secure_fed.operate.closing import refuse_closed


@contextlib.contextmanager
def running(state: Path, role: str) -> Iterator[StatusFile]:
    """Hold a state folder whose study is open, and from now on keep what this process reports in it.

    Call after :func:`secure_fed.core.processes.log_lines`.

    Args:
        state: the folder.
        role: ``server`` or ``site``; names the log.

    Returns:
        The status to tell where the process stands.

    Raises:
        StorageError: there is no such folder, another process holds it, or it cannot be written.
        StateFormatError: the folder is of another layout.
        StudyClosedError: the study is closed here.
    """
    if not state.is_dir():
        raise StorageError(
            f"{state}: no folder; expected the state folder of a {role}: secfacmic study new makes the server's beside "
            "the study, with the coordinator's key; give that one as --state"
        )
    with exclusive(StateFolder(state).path):
        refuse_closed(state)
        remove_unfinished(StateFolder(state).runs)
        status = StatusFile(state)
        keep_log(state, role, status)
        yield status

"""A site's process (:mod:`tests.site_worker`) that kills itself after so many of its words are on disk, unsaid."""

from __future__ import annotations

import os
import signal

from secure_fed.clients.bound import Bound
from secure_fed.clients.replica import RunFiles

bind, words = RunFiles.bind, [int(os.environ["WORDS"])]


def bind_and_die(files: RunFiles, bound: Bound) -> None:
    bind(files, bound)
    words[0] -= 1
    if not words[0]:
        os.kill(os.getpid(), signal.SIGKILL)


RunFiles.bind = bind_and_die  # type: ignore[method-assign]

from tests import site_worker  # noqa: E402, F401

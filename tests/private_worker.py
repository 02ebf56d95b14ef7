"""A site in a process of its own that can be made to kill itself after any step of a private round."""

from __future__ import annotations

import os
import signal
from multiprocessing.connection import Connection
from pathlib import Path

from secure_fed.clients.site import Site
from secure_fed.core.errors import SecfacmicError


def serve(pipe: Connection, site_file: str, crash_after: int | None) -> None:
    """Answer requests until the pipe closes; with ``crash_after``, die by SIGKILL after that step."""
    try:
        site = Site.open(Path(site_file))
    except SecfacmicError as error:
        pipe.send(error)
        return
    assert site._private is not None

    def at_step(step: int) -> None:
        if step == crash_after:
            os.kill(os.getpid(), signal.SIGKILL)

    site._private.at_step = at_step
    pipe.send((site.run, site.position))
    while True:
        try:
            request = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((site.respond(request), site.adapter_digest))
        except SecfacmicError as error:
            pipe.send(error)

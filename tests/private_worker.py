"""A site in a process of its own, with a fault if wanted, that answers requests."""

from __future__ import annotations

from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from secure_fed.clients import learner
from secure_fed.clients.site import Site
from secure_fed.core.errors import SecfacmicError
from tests.fault_hooks import install


def serve(pipe: Connection, site_file: str, fault: dict[str, Any]) -> None:
    """Answer requests until the pipe closes.

    Args:
        pipe: gets run and position, then for each request the reply with the adapter's digest, or the error.
        site_file: the site's.
        fault: what is wrong in this process (:mod:`tests.fault_hooks`).
    """
    learner.rehearse = lambda file, agreed: None  # its ledgers and rounds would be hit by the fault instead
    install(fault)
    try:
        site = Site.open(Path(site_file))
    except SecfacmicError as error:
        pipe.send(error)
        return
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

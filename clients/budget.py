"""Whether a site has a privacy budget, and where its ledger lies: the one place that says so."""

from __future__ import annotations

from pathlib import Path
from shlex import quote

from secure_fed.clients.sitefile import SiteFile
from secure_fed.core.errors import LedgerError
from secure_fed.privacy.ledger import Ledger, read_older

LOCAL = (
    "for this site's own eyes: of patients' images, and no privacy budget has paid for it; it must not leave the site"
)
"""Stands at every figure of :func:`unpaid` images."""


def ledger_folder(file: SiteFile) -> Path:
    """Where the ledger of the site's identity lies: all its studies and state folders spend from it."""
    return Path(file.identity) / "ledger"


def has_budget(file: SiteFile) -> bool:
    """Whether the site's ``site.toml`` sets a budget, or a ledger of its identity or in its state remembers one.

    Then nothing made of its images leaves without noise that was paid for, whatever command is asked.
    """
    older = file.state_folder.ledger
    return file.privacy is not None or Ledger.exists(ledger_folder(file)) or Ledger.exists(older)


def unpaid(file: SiteFile) -> bool:
    """Whether figures of the site's images are for its own eyes: they are patients', and a budget has not paid."""
    return file.data.kind == "patients" and has_budget(file)


def refuse_unadopted(file: SiteFile) -> None:
    """Refuse to go on beside a ledger that version 0.1 left in the site's state folder.

    Raises:
        LedgerError: it was not adopted, or it was used again since.
    """
    older = file.state_folder.ledger
    if not Ledger.exists(older):
        return
    found = read_older(older)
    folder = ledger_folder(file)
    known = Ledger(folder).adopted if Ledger.exists(folder) else {}
    if found.first not in known:
        raise LedgerError(
            f"{older}: a ledger that the ledger of this identity, {folder}, has not taken over; expected every known "
            f"one to be: secfacmic ledger adopt {quote(str(file.state))} --site site.toml"
        )
    if known[found.first] != found.head:
        raise LedgerError(
            f"{older}: ends with entry {found.head[:16]}, but was adopted with {known[found.first][:16]}: version 0.1 "
            "has spent since, which the ledger of this identity does not know; expected it unchanged: no more is spent"
        )

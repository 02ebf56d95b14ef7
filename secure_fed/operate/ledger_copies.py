"""A site's privacy ledger for the people there: what it says, and copies of it that can be put back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from secure_fed.clients.private_round import ledger_folder
from secure_fed.clients.sitefile import SiteFile
from secure_fed.core.errors import LedgerError
from secure_fed.core.storage import write_durable
from secure_fed.privacy.ledger import Ledger, opened, restore
from secure_fed.protocol.signing import PRIVATE


def ledger_facts(file: SiteFile) -> dict[str, Any]:
    """A site's ledger, verified, as a JSON document; that of a site that never spent is empty.

    Args:
        file: the site's.

    Raises:
        LedgerError: it does not verify.
    """
    folder = ledger_folder(file)
    if Ledger.exists(folder):
        return Ledger(folder).summary()
    budget = file.privacy
    return {
        "site": file.site,
        "data": file.data.kind,
        "simulated": file.data.kind != "patients",
        "epsilon_spent": 0.0,
        "epsilon_budget": None if budget is None else budget.epsilon,
        "delta": None if budget is None else budget.delta,
        "unit": file.data.unit,
        "claim": "",
        "blocks": {},
        "head": {"seq": 0, "id": "0" * 64},
        "events": [],
    }


def export_ledger(file: SiteFile, into: Path) -> int:
    """Write the ledger, its blocks and its key as one file, which is as secret as the key.

    Args:
        file: the site's.
        into: the export; only its owner can read it.

    Returns:
        Number of the last entry in it.

    Raises:
        LedgerError: there is no ledger, or it does not verify.
        StorageError: the export cannot be written.
    """
    folder = ledger_folder(file)
    if not Ledger.exists(folder):
        raise LedgerError(f"{folder}: no ledger; expected one: this site has spent nothing, or its state is elsewhere")
    with opened(folder) as ledger:
        write_durable(into, ledger.export(), PRIVATE)
        return ledger.head[0]


def restore_ledger(file: SiteFile, exported: Path) -> int:
    """Put an export in place of a lost or damaged ledger; it opens when the study's journal confirms its head.

    Args:
        file: the site's.
        exported: of :func:`export_ledger`.

    Returns:
        Number of its last entry.

    Raises:
        LedgerError: the export cannot be read or used.
    """
    try:
        data = exported.read_bytes()
    except OSError as error:
        raise LedgerError(f"{exported}: cannot be read ({error.strerror}); expected a ledger's export") from error
    return restore(ledger_folder(file), data).head[0]

"""A site's privacy ledger for the people there: what it says, and copies of it that can be put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from secure_fed.clients.budget import ledger_folder
from secure_fed.clients.patients import in_one_form
from secure_fed.clients.sitefile import SiteFile
from secure_fed.core.errors import LedgerError
from secure_fed.core.layout import SiteState
from secure_fed.core.storage import refuse_foreign, write_durable
from secure_fed.privacy.keys import load_identity, read_public_identity
from secure_fed.privacy.ledger import EXPORT_HEAD, Account, Ledger, opened, read_older, restore
from secure_fed.protocol.signing import PRIVATE


def ledger_facts(file: SiteFile) -> dict[str, Any]:
    """A site's ledger, verified, as a JSON document; that of a site that never spent is empty.

    Args:
        file: the site's.

    Raises:
        LedgerError: it does not verify, or is another identity's.
        KeyFileError: the identity's keys cannot be read.
    """
    folder = ledger_folder(file)
    if Ledger.exists(folder):
        ledger = Ledger(folder)
        ledger.refuse_other(_signing(file))
        return ledger.summary()
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
        "local": "for this site's own eyes",
        "blocks": {},
        "members": {},
        "adopted": [],
        "releases": [],
        "head": {"seq": 0, "id": "0" * 64},
        "events": [],
    }


def verify_ledger(file: SiteFile) -> dict[str, Any]:
    """As :func:`ledger_facts`, of a ledger that is there: of none nobody can say that it holds.

    Raises:
        LedgerError: also if there is none.
        KeyFileError: as :func:`ledger_facts`.
    """
    _require(ledger_folder(file))
    return ledger_facts(file)


def _require(folder: Path) -> None:
    if not Ledger.exists(folder):
        raise LedgerError(
            f"{folder}: no ledger; expected one: this site has spent nothing, or its identity is elsewhere, or the "
            "ledger was lost and is to be put back (secfacmic ledger restore)"
        )


def _signing(file: SiteFile) -> str:
    """Public signing key of a site's identity; a passphrase is asked for only if the public file is gone."""
    public = Path(file.identity) / f"{file.site}.pub"
    return (read_public_identity(public) if public.exists() else load_identity(public.parent, file.site)).keys.signing


def export_ledger(file: SiteFile, into: Path) -> int:
    """Write the ledger, its blocks and its key as one file, which is as secret as the key.

    Args:
        file: the site's.
        into: the export; only its owner can read it.

    Returns:
        Number of the last entry in it.

    Raises:
        LedgerError: there is no ledger, it does not verify, or it is another identity's.
        OutputError: ``into`` is there already, and no export.
        StorageError: the export cannot be written.
    """
    with _own(file) as ledger:
        refuse_foreign(into, lambda head: head.startswith(EXPORT_HEAD))
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
        LedgerError: the export cannot be read or used, or is another identity's.
    """
    try:
        data = exported.read_bytes()
    except OSError as error:
        raise LedgerError(f"{exported}: cannot be read ({error.strerror}); expected a ledger's export") from error
    return restore(ledger_folder(file), data, _signing(file)).head[0]


def adopt_ledger(file: SiteFile, state: Path) -> None:
    """Take over the ledger that version 0.1 left in a state folder of this site's identity.

    Args:
        file: the site's; without a ledger yet, its budget opens one.
        state: the state folder.

    Raises:
        LedgerError: there is none, it was adopted before, it or the one here is another's, or no budget is set here.
        StorageError: the ledger cannot be written, or is in use.
    """
    older = read_older(SiteState(state).ledger)
    folder = ledger_folder(file)
    if not Ledger.exists(folder):
        if file.privacy is None:
            raise LedgerError(
                f"{folder}: no ledger yet, and site.toml sets no budget; expected [privacy] epsilon there, which the "
                "ledger is opened with"
            )
        keys = load_identity(Path(file.identity), file.site).keys
        budget = file.privacy
        account = Account(file.site, keys.signing, file.data.unit, file.data.kind, budget.epsilon, budget.delta)
        account.declare(budget.run_epsilon, budget.runs)  # first, as at a start: the budget can never be raised
        Ledger.create(folder, account)
    with _own(file) as ledger:
        ledger.adopt(older)


def link_patients(file: SiteFile, first: str, second: str) -> tuple[float, float]:
    """Two ids are one patient from now on.

    Returns:
        Epsilon that the patient has spent, histories added, and the budget; above it takes part in nothing any more.

    Raises:
        LedgerError: there is no ledger, or an id is unknown.
    """
    with _own(file) as ledger:
        return ledger.link(in_one_form(first), in_one_form(second)), ledger.account.epsilon


def tell_apart(file: SiteFile, first: str, second: str) -> None:
    """Two ids with an equal picture are two patients.

    Raises:
        LedgerError: there is no ledger, or an id is unknown.
    """
    with _own(file) as ledger:
        ledger.distinct(in_one_form(first), in_one_form(second))


@contextmanager
def _own(file: SiteFile) -> Iterator[Ledger]:
    """The ledger of the site's identity, held for this process alone."""
    folder = ledger_folder(file)
    _require(folder)
    with opened(folder) as ledger:
        ledger.refuse_other(_signing(file))
        yield ledger

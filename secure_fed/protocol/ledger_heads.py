"""The newest privacy-ledger head that was seen of each site: how server and sites notice a ledger put back.

A head travels with every update, and with it links: number and id of earlier entries of the same ledger, among them
the heads that travelled before. A copy of a ledger that was put back, or that runs beside the true one, and has grown
past the newest head seen, has another entry at that head's number, or does not name it at all. The ids are salted
digests; they tell nothing of the entries.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, NamedTuple

from pydantic import StringConstraints, ValidationError

from secure_fed.core.errors import LedgerRollbackError, StorageError
from secure_fed.core.storage import write_durable
from secure_fed.core.tomlfile import FileModel
from secure_fed.protocol.signing import ZERO_DIGEST, Count
from secure_fed.protocol.study_tables import Hex64, Name

MAX_LINKS = 32
"""Links of one head: an envelope's header stays below its limit."""

SHORT = 16
"""Hex digits of an id in a link: 64 bits."""

Link = tuple[Count, Annotated[str, StringConstraints(pattern=rf"^[0-9a-f]{{{SHORT}}}$")]]
"""Number of one entry of a ledger, and how its id begins."""


class LedgerHead(NamedTuple):
    """Where a ledger stands: number and id of its newest entry that travelled, and links to earlier ones."""

    seq: int
    head: str
    links: tuple[Link, ...] = ()


NO_LEDGER = LedgerHead(0, ZERO_DIGEST)
"""Of a site without a budget."""


def check_continues(site: str, known: tuple[int, str], ledger: LedgerHead) -> None:
    """Check that a head is the one known or continues it: neither older, nor beside it, nor of a copy that has grown
    past it.

    Args:
        site: whose it is.
        known: number and id of the newest one seen; 0 and zeros if none was.
        ledger: the head.

    Raises:
        LedgerRollbackError: it does not.
    """
    known_seq, known_head = known
    seq, head, links = ledger
    if seq < known_seq or (seq == known_seq and head != known_head):
        raise LedgerRollbackError(
            f"{site}: privacy ledger at entry {seq}, head {head[:16]}; expected entry {known_seq}, head "
            f"{known_head[:16]}, or a later one: an older copy of the ledger was put back, or the site runs twice"
        )
    if seq > known_seq > 0 and (known_seq, known_head[:SHORT]) not in links:
        named = dict(links).get(known_seq)
        found = f"names {named} as its entry {known_seq}" if named else f"does not name its entry {known_seq}"
        raise LedgerRollbackError(
            f"{site}: privacy ledger at entry {seq} {found}; expected head {known_head[:16]}, seen before: an "
            "older copy of the ledger was put back and has grown, or the site runs twice. If this end has missed more "
            f"than {MAX_LINKS} of its updates, ask it by phone for the SHA-256 of that line of its ledger.jsonl; if it "
            "is this head, remove the site from this end's ledger_heads.json"
        )


class _Heads(FileModel):
    format: int
    heads: dict[Name, tuple[Count, Hex64]]


class LedgerHeads:
    """A file of one (number, id) a site; it outlives runs.

    Args:
        path: the file; absent before the first head.

    Raises:
        StorageError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._heads: dict[str, tuple[int, str]] = {}
        try:
            self._heads = dict(_Heads.model_validate_json(path.read_bytes()).heads)
        except FileNotFoundError:
            pass
        except (OSError, ValidationError) as error:
            raise StorageError(
                f"{path}: cannot be read as the ledger heads seen so far ({type(error).__name__}); put it back from a "
                "backup"
            ) from error

    def newest(self, site: str) -> tuple[int, str]:
        """The newest head of a site; 0 and zeros if none was seen."""
        return self._heads.get(site, (0, ZERO_DIGEST))

    def check(self, site: str, ledger: LedgerHead) -> None:
        """Check that a head is the newest seen or continues it (:func:`check_continues`).

        Raises:
            LedgerRollbackError: it is not.
        """
        check_continues(site, self.newest(site), ledger)

    def keep(self, heads: Mapping[str, LedgerHead]) -> None:
        """Remember heads that were checked, durably.

        Raises:
            StorageError: they cannot be written.
        """
        found = {site: (head.seq, head.head) for site, head in heads.items() if head.seq}
        if any(self._heads.get(site) != head for site, head in found.items()):
            self._heads.update(found)
            content = {"format": 1, "heads": {site: list(head) for site, head in sorted(self._heads.items())}}
            write_durable(self._path, (json.dumps(content) + "\n").encode())

"""The newest privacy-ledger head that was seen of each site: how server and sites notice a ledger put back."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import ValidationError

from secure_fed.errors import LedgerRollbackError, StorageError
from secure_fed.signed import ZERO_DIGEST, Count
from secure_fed.storage import write_durable
from secure_fed.study import Hex64, Name
from secure_fed.tomlfile import FileModel


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

    def check(self, site: str, seq: int, head: str) -> None:
        """Check that a head is not older than, nor beside, the newest seen.

        Raises:
            LedgerRollbackError: it is.
        """
        known_seq, known_head = self.newest(site)
        if seq < known_seq or (seq == known_seq and head != known_head):
            raise LedgerRollbackError(
                f"{site}: privacy ledger at entry {seq}, head {head[:16]}; expected entry {known_seq}, head "
                f"{known_head[:16]}, or a later one: an older copy of the ledger was put back, or the site runs twice"
            )

    def keep(self, heads: dict[str, tuple[int, str]]) -> None:
        """Remember heads that were checked, durably.

        Raises:
            StorageError: they cannot be written.
        """
        if any(self._heads.get(site) != head for site, head in heads.items() if head[0]):
            self._heads.update({site: head for site, head in heads.items() if head[0]})
            content = {"format": 1, "heads": {site: list(head) for site, head in sorted(self._heads.items())}}
            write_durable(self._path, (json.dumps(content) + "\n").encode())

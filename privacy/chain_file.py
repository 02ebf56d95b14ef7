"""Lines on the disk that cannot be changed, cut in the middle or put in another order without their key."""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secure_fed.core.canonical import canonical_json
from secure_fed.core.errors import LedgerError
from secure_fed.core.storage import write_durable
from secure_fed.protocol.signing import PRIVATE, ZERO_DIGEST


@dataclass(frozen=True)
class Line:
    """One line: its number from 1, the SHA-256 of its bytes, and its content."""

    seq: int
    id: str
    fields: dict[str, Any]


class ChainFile:
    """A file of JSON lines, each with the SHA-256 of the one before, a MAC, and a random salt, so that its own SHA-256
    tells nothing of the content. The file is replaced as a whole, so that it is never half written.

    Args:
        path: of the file; its name is part of what the MACs are over.
        key: of the MACs.
    """

    def __init__(self, path: Path, key: bytes) -> None:
        self.path = path
        self._key = key
        self._data = b""
        self.lines: list[Line] = []

    @property
    def head(self) -> tuple[int, str]:
        """Number and id of the last line; 0 and zeros before the first."""
        return (self.lines[-1].seq, self.lines[-1].id) if self.lines else (0, ZERO_DIGEST)

    def holds(self, seq: int, head: str) -> bool:
        """Whether a line of that number and id is there; number 0 always is."""
        return seq == 0 or (seq <= len(self.lines) and self.lines[seq - 1].id == head)

    def load(self, data: bytes) -> None:
        """Check and take all lines.

        Raises:
            LedgerError: a line does not verify.
        """
        texts = data.split(b"\n")
        if texts.pop() != b"":
            raise self._damaged(len(texts) + 1)
        for text in texts:
            self.lines.append(self._check(text))
        self._data = data

    def append(self, fields: dict[str, Any]) -> Line:
        """Add a line durably.

        Raises:
            StorageError: it was not written; the file is as it was.
        """
        seq, previous = self.head
        content = {"seq": seq + 1, "previous": previous, "salt": secrets.token_hex(32), **fields}
        text = canonical_json({**content, "mac": self._mac(content)})
        line = self._check(text)
        data = self._data + text + b"\n"
        write_durable(self.path, data, PRIVATE)
        self._data = data
        self.lines.append(line)
        return line

    def _check(self, text: bytes) -> Line:
        number, previous = self.head
        try:
            content = json.loads(text)
            mac = content.pop("mac")
            right = hmac.compare_digest(self._mac(content), mac) and canonical_json({**content, "mac": mac}) == text
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
            raise self._damaged(number + 1) from None
        if not right or content.pop("seq") != number + 1 or content.pop("previous") != previous:
            raise self._damaged(number + 1)
        del content["salt"]
        return Line(number + 1, hashlib.sha256(text).hexdigest(), content)

    def _mac(self, content: dict[str, Any]) -> str:
        message = self.path.name.encode() + b"\n" + canonical_json(content)
        return hmac.new(self._key, message, hashlib.sha256).hexdigest()

    def _damaged(self, number: int) -> LedgerError:
        return LedgerError(
            f"{self.path}: line {number} does not verify; expected an unbroken chain under this site's ledger.key. "
            "The file or the key was changed: no more is spent; put back both from the newest export (secfacmic "
            "ledger restore)"
        )

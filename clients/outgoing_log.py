"""The list of all that left a site: one line a message, written before it is sent, each naming the one before.

``STATE/sent.jsonl`` says when, in which run and round, what kind of reply, how many bytes and their digest; of an
update also the digest that the journal's record carries. Bytes that are sent again after a broken connection are no new
message. Heartbeats and the calls by which Flower fetches a message carry nothing of the site's and are not listed.
"""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from secure_fed.core.canonical import canonical_json
from secure_fed.core.errors import EnvelopeError, EvidenceError, StorageError
from secure_fed.core.layout import SiteState
from secure_fed.core.storage import as_open_as_its_folder, sync_folder
from secure_fed.core.tomlfile import FileModel
from secure_fed.protocol.envelope import MAGIC, MAX_HEADER
from secure_fed.protocol.rounds import RoundReply
from secure_fed.protocol.signing import ZERO_DIGEST, Count, split_frame
from secure_fed.protocol.study_tables import Hex64


class SentMessage(FileModel):
    """One line.

    Attributes:
        seq: from 1.
        previous: SHA-256 of the line before; zeros before the first.
        time: the site's clock, UTC.
        run: the run's id; empty before the first, and where a failure is all that is said.
        round: that the reply was asked for.
        code: the reply's.
        bytes: of all its fields as canonical JSON, the envelope beside them.
        digest: SHA-256 of that JSON, in which the envelope's own SHA-256 stands for it.
        envelope: of an update, SHA-256 of magic and header, which the journal's record of the round repeats; else
            empty.
    """

    format: Literal[1]
    seq: Count
    previous: Hex64
    time: str
    run: str
    round: Count
    code: str
    bytes: Count
    digest: Hex64
    envelope: str


class SentList:
    """A site's list of what left it.

    Args:
        state: the site's state folder.
    """

    def __init__(self, state: Path) -> None:
        self._path = SiteState(state).sent
        self._last: tuple[int, str] | None = None
        self.updates = self.bytes = 0
        """What was added through this object."""

    def add(self, reply: RoundReply, round_number: int) -> None:
        """Note a reply durably; call before it is sent.

        Raises:
            StorageError: it could not be noted, so it must not be sent.
            EvidenceError: the list was changed.
        """
        if self._last is None:
            self._last = self._open()
        seq, previous = self._last
        fields = {
            "code": reply.code.value,
            "run": reply.run,
            "position": reply.position,
            "attestation": reply.attestation,
            "envelope": hashlib.sha256(reply.envelope).hexdigest(),
        }
        if reply.carried:
            fields["carried"] = hashlib.sha256(reply.carried).hexdigest()
        text = canonical_json(fields)
        line = SentMessage(
            format=1,
            seq=seq + 1,
            previous=previous,
            time=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            run=reply.run,
            round=round_number,
            code=reply.code.value,
            bytes=len(text) + len(reply.envelope) + len(reply.carried),
            digest=hashlib.sha256(text).hexdigest(),
            envelope=_envelope_digest(reply.envelope),
        )
        data = canonical_json(line.model_dump(mode="json")) + b"\n"
        new = not self._path.exists()
        size = 0 if new else self._path.stat().st_size
        try:
            with open(self._path, "ab", opener=as_open_as_its_folder) as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            if new:
                sync_folder(self._path.parent)
        except OSError as error:
            self._cut(size)
            raise StorageError(
                f"{self._path}: not written ({error.strerror}); nothing leaves this site that is not listed there: "
                "free space"
            ) from error
        self._last = seq + 1, hashlib.sha256(data[:-1]).hexdigest()
        self.updates += bool(line.envelope)
        self.bytes += line.bytes

    def read(self) -> list[SentMessage]:
        """All messages in order.

        Raises:
            EvidenceError: a line is missing or was changed.
        """
        try:
            data = self._path.read_bytes()
        except FileNotFoundError:
            return []
        return read_sent(data[: data.rfind(b"\n") + 1], str(self._path))

    def _open(self) -> tuple[int, str]:
        """Number and digest of the last line; what a crash left half written was never sent and is cut off."""
        rows = self.read()
        if not rows:
            self._cut(0)
            return 0, ZERO_DIGEST
        lines = self._path.read_bytes()
        whole = lines.rfind(b"\n") + 1
        self._cut(whole)
        return rows[-1].seq, hashlib.sha256(lines[:whole].splitlines()[-1]).hexdigest()

    def _cut(self, size: int) -> None:
        if self._path.exists() and self._path.stat().st_size > size:
            os.truncate(self._path, size)


def read_sent(data: bytes, where: str) -> list[SentMessage]:
    """Check the chain of a list of whole lines.

    Raises:
        EvidenceError: a line is missing, was changed, or is none of ours.
    """
    rows: list[SentMessage] = []
    previous = ZERO_DIGEST
    for number, line in enumerate(data.splitlines(), 1):
        try:
            row = SentMessage.model_validate_json(line)
        except ValidationError:
            raise EvidenceError(f"{where}: line {number} is no line of this list; restore it from a backup") from None
        if (row.seq, row.previous) != (number, previous) or canonical_json(row.model_dump(mode="json")) != line:
            raise EvidenceError(
                f"{where}: line {number} does not follow the one before; expected an unbroken list: a line was "
                "changed, added or taken out; restore it from a backup"
            )
        previous = hashlib.sha256(line).hexdigest()
        rows.append(row)
    return rows


def _envelope_digest(envelope: bytes) -> str:
    try:
        return split_frame(MAGIC, envelope, MAX_HEADER, EnvelopeError).digest
    except EnvelopeError:
        return ""  # none, or an acknowledgement

"""Whose images this site has ever given to a sum of statistics without noise: they are never given to a second one.

Two exact sums with the same patients, over other sites or in another run, are a difference that tells one site's part;
with a few patients more or fewer, theirs. ``given-sums.json`` lies in the folder of the site's identity, as its ledger
does, so that all its studies and state folders share it, whatever a study calls the site. It keeps keyed hashes alone
of patients and of pixels: a picture is the same one under another name, in another format and as another frame. Whoever
holds the file, the identity's keys and an image can tell that it was used.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import Field

from secure_fed.core.errors import RepeatedSumError
from secure_fed.core.storage import exclusive, write_durable
from secure_fed.core.tomlfile import FileModel, parse_table
from secure_fed.protocol.study_tables import Hex64

GIVEN = "given-sums.json"
HASH_BYTES = 16
_PRIVATE = 0o600


class _Content(FileModel):
    """The file: a key, and by run the hashes of what its sum held, in hex."""

    format: Literal[2] = 2
    key: Hex64
    runs: dict[str, tuple[str, ...]] = Field(default_factory=dict)


class GivenSums:
    """The list of a site's identity.

    Args:
        identity: the folder of the site's private keys.
        secret: of the identity, which nobody else has; the key of a new list is made of it, so that what was prepared
            before there was a list is known in it.
    """

    def __init__(self, identity: Path, secret: bytes) -> None:
        self._path = identity / GIVEN
        self._new = hmac.new(secret, b"secfacmic given sums 2", hashlib.sha256).hexdigest()

    def marks(self, pictures: Iterable[bytes], patients: Iterable[str]) -> list[bytes]:
        """What pictures and patients are known by here, each of :data:`HASH_BYTES`, sorted.

        Args:
            pictures: digests of their pixels.
            patients: their ids; none where an image counts as a patient.

        Raises:
            RepeatedSumError: the list cannot be read.
        """
        key = bytes.fromhex(self._read().key)
        known = {*(b"patient " + patient.encode() for patient in patients), *(b"pixels " + one for one in pictures)}
        return sorted(hmac.new(key, one, hashlib.sha256).digest()[:HASH_BYTES] for one in known)

    def refuse(self, run: str, marks: Iterable[bytes], before: Iterable[str] = ()) -> None:
        """Refuse what another run's sum holds; nothing is noted.

        Args:
            run: its id.
            marks: of what it is to be given (:meth:`marks`).
            before: runs to whose sums the site has given by its own journals.

        Raises:
            RepeatedSumError: a mark is in another run's list; or the list cannot be read, or lacks a run, so that
                nobody knows what was given.
        """
        content = self._read()
        lost = sorted(set(before) - set(content.runs))
        if lost:
            raise RepeatedSumError(
                f"{self._path}: says nothing of run {lost[0][:16]}, to whose exact sum this site gave by its own "
                "journal; expected the list of all that it gave to sums: put it back from a backup; nothing is given "
                "until then"
            )
        self._refuse(content, run, marks)

    def give(self, run: str, marks: Iterable[bytes]) -> None:
        """Note durably that a run's sum holds these, before the word leaves by which it can be opened; once more
        changes nothing.

        Raises:
            RepeatedSumError: as :meth:`refuse`.
            StorageError: it cannot be written, or another process is writing it.
        """
        with exclusive(self._path.parent):
            content, marks = self._read(), list(marks)
            self._refuse(content, run, marks)
            ever = {mark.hex() for mark in marks}.union(content.runs.get(run, ()))  # also before the data changed
            runs = {**content.runs, run: tuple(sorted(ever))}
            if runs != content.runs:
                content = content.model_copy(update={"runs": runs})
                write_durable(self._path, content.model_dump_json().encode() + b"\n", _PRIVATE)

    def _refuse(self, content: _Content, run: str, marks: Iterable[bytes]) -> None:
        hashes = {mark.hex() for mark in marks}
        for other, given in content.runs.items():
            again = len(hashes & set(given))
            if other != run and again:
                raise RepeatedSumError(
                    f"{again} of {len(hashes)} training images and patients are in the exact sum that this site gave "
                    f"to run {other[:16]}; a second sum with them, in any study, run or cohort, would tell single "
                    "sites' or patients' parts by difference; expected some that were in none: give this site a "
                    "budget, whose noise covers a second sum, or take part as an observer"
                )

    def _read(self) -> _Content:
        if not self._path.exists():
            return _Content(key=self._new)
        try:
            return parse_table(json.loads(self._path.read_bytes()), _Content, RepeatedSumError, str(self._path))
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise RepeatedSumError(
                f"{self._path}: cannot be read ({type(error).__name__}); expected the list of what this site gave to "
                "sums: put it back from a backup; nothing is given until then"
            ) from error

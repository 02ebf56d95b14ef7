"""Whose images this site has ever given to a sum of statistics without noise: they are never given to a second one.

Two exact sums with the same patients, over other sites or in another run, are a difference that tells one site's part;
with a few patients more or fewer, theirs. ``given-sums.json`` lies in the folder of the site's identity, as its ledger
does, so that all its studies and state folders share it, whatever a study calls the site. It keeps keyed hashes alone
of the identities of the images. Whoever holds the file and an image can tell that it was used.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from secure_fed.core.errors import RepeatedSumError
from secure_fed.core.storage import exclusive, write_durable
from secure_fed.core.tomlfile import FileModel, parse_table

GIVEN = "given-sums.json"
_PRIVATE = 0o600


class _Content(FileModel):
    """The file: a key, and by run the hashes of what its sum held."""

    format: Literal[1]
    key: str
    runs: dict[str, tuple[str, ...]]


class GivenSums:
    """The list of a site's identity.

    Args:
        identity: the folder of the site's private keys.
    """

    def __init__(self, identity: Path) -> None:
        self._path = identity / GIVEN

    def give(self, run: str, images: Iterable[bytes]) -> None:
        """Note durably, before anything leaves, that a run's sum holds these images; once more changes nothing.

        Args:
            run: its id.
            images: identities of the images.

        Raises:
            RepeatedSumError: some of them are in the sum of another run, or the list cannot be read, so that nobody
                knows what was given.
            StorageError: it cannot be written, or another process is writing it.
        """
        with exclusive(self._path.parent):
            self._give(run, images)

    def _give(self, run: str, images: Iterable[bytes]) -> None:
        content = self._read()
        hashes = {_hash(content.key, image) for image in images}
        for other, given in content.runs.items():
            again = len(hashes & set(given))
            if other != run and again:
                raise RepeatedSumError(
                    f"{again} of {len(hashes)} training images are in the exact sum that this site gave to run "
                    f"{other[:16]}; a second sum with them, in any study, run or cohort, would tell single sites' or "
                    "patients' parts by difference; expected images that were in none: give this site a budget, whose "
                    "noise covers a second sum, or take part as an observer"
                )
        ever = hashes.union(content.runs.get(run, ()))  # also what the run was given before the data changed
        runs = {**content.runs, run: tuple(sorted(ever))}
        if runs != content.runs:
            content = content.model_copy(update={"runs": runs})
            write_durable(self._path, content.model_dump_json().encode() + b"\n", _PRIVATE)

    def _read(self) -> _Content:
        if not self._path.exists():
            return _Content(format=1, key=secrets.token_hex(32), runs={})
        try:
            return parse_table(json.loads(self._path.read_bytes()), _Content, RepeatedSumError, str(self._path))
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise RepeatedSumError(
                f"{self._path}: cannot be read ({type(error).__name__}); expected the list of what this site gave to "
                "sums: put it back from a backup; nothing is given until then"
            ) from error


def _hash(key: str, image: bytes) -> str:
    message = b"secfacmic given sum 1\n" + image
    return hmac.new(bytes.fromhex(key), message, hashlib.sha256).hexdigest()[:32]

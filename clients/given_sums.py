"""Whose images this site has ever given to a sum of statistics without noise: they are never given to a second one.

Two exact sums with the same patients, over other sites or in another run, are a difference that tells one site's part;
with a few patients more or fewer, theirs. ``STATE/given-sums.json`` keeps keyed hashes alone of the identities of the
images. Whoever holds the file and an image can tell that it was used.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
from collections.abc import Iterable
from typing import Literal

from secure_fed.core.errors import RepeatedSumError
from secure_fed.core.layout import SiteState
from secure_fed.core.storage import write_durable
from secure_fed.core.tomlfile import FileModel, parse_table

_PRIVATE = 0o600


class _Content(FileModel):
    """The file: a key, and by run the hashes of what its sum held."""

    format: Literal[1]
    key: str
    runs: dict[str, tuple[str, ...]]


class GivenSums:
    """The list of a site.

    Args:
        state: the site's state folder.

    Raises:
        RepeatedSumError: the list cannot be read, so that nobody knows what was given.
    """

    def __init__(self, state: SiteState) -> None:
        self._state = state
        path = state.given_sums
        if not path.exists():
            self._content = _Content(format=1, key=secrets.token_hex(32), runs={})
            return
        try:
            table = json.loads(path.read_bytes())
            self._content = parse_table(table, _Content, RepeatedSumError, str(path))
        except (OSError, ValueError, TypeError) as error:
            raise RepeatedSumError(
                f"{path}: cannot be read ({type(error).__name__}); expected the list of what this site gave to sums: "
                "put it back from a backup; nothing is given until then"
            ) from error

    def give(self, run: str, images: Iterable[bytes]) -> None:
        """Note durably, before anything leaves, that a run's sum holds these images; once more changes nothing.

        Args:
            run: its id.
            images: identities of the images.

        Raises:
            RepeatedSumError: some of them are in the sum of another run.
            StorageError: it cannot be written.
        """
        hashes = {self._hash(image) for image in images}
        for other, given in self._content.runs.items():
            again = len(hashes & set(given))
            if other != run and again:
                raise RepeatedSumError(
                    f"{again} of {len(hashes)} training images are in the exact sum that this site gave to run "
                    f"{other[:16]}; a second sum with them, in any study, run or cohort, would tell single sites' or "
                    "patients' parts by difference; expected images that were in none: give this site a budget, whose "
                    "noise covers a second sum, or take part as an observer"
                )
        runs = {**self._content.runs, run: tuple(sorted(hashes))}
        if runs != self._content.runs:
            self._content = self._content.model_copy(update={"runs": runs})
            write_durable(self._state.given_sums, self._content.model_dump_json().encode() + b"\n", _PRIVATE)

    def _hash(self, image: bytes) -> str:
        message = b"secfacmic given sum 1\n" + image
        return hmac.new(bytes.fromhex(self._content.key), message, hashlib.sha256).hexdigest()[:32]

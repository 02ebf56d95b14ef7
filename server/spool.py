"""What came for the round that is due: on disk until its record is durable, so that no restart loses it."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from secure_fed.core.errors import EnvelopeError, ProtocolError
from secure_fed.core.layout import ENVELOPES, ServerRun, numbered, site_envelope
from secure_fed.core.storage import make_folder, write_durable
from secure_fed.protocol.envelope import MAX_HEADER
from secure_fed.protocol.signing import SIGNATURE_BYTES

log = logging.getLogger(__name__)

T = TypeVar("T")

COHORT, ARRIVED, CHECKED = "cohort", "arrived", "checked"
REVEAL_OF, SHARES_OF = "reveal-", "shares-"
"""Names of an attempt's frames; a site's name follows the last two."""


@dataclass(frozen=True)
class Spool:
    """One attempt's.

    Attributes:
        run: the run's folder.
        round: which.
        attempt: of it.
    """

    run: ServerRun
    round: int
    attempt: int

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return self.run.spooled(self.round, self.attempt)

    def begin(self) -> None:
        """Make its folder: after a restart the newest one's attempt goes on.

        Raises:
            StorageError: it cannot be made.
        """
        make_folder(self.folder)

    def path(self, name: str) -> Path:
        """Where a frame lies."""
        return self.run.frame(self.round, self.attempt, name)

    def keep(self, name: str, data: bytes) -> None:
        """Keep a frame, durably.

        Raises:
            StorageError: it cannot be written.
        """
        write_durable(self.path(name), data, 0o600)

    def frame(self, name: str) -> bytes | None:
        """A frame, as it lies there; None if none does."""
        path = self.path(name)
        return path.read_bytes() if path.is_file() else None

    def whole(self, name: str, check: Callable[[bytes], T]) -> T | None:
        """A frame as a check reads it; None if none lies there, or a damaged one, which is told."""
        data = self.frame(name)
        try:
            return None if data is None else check(data)
        except (EnvelopeError, ProtocolError) as error:
            log.warning("%s: damaged, and asked for again where the rest does not tell it (%s)", self.path(name), error)
            return None

    def keep_envelope(self, site: str, data: bytes) -> Path:
        """Keep a site's envelope, durably.

        Returns:
            Where it lies.

        Raises:
            StorageError: it cannot be written.
        """
        path = site_envelope(self.folder, site)
        write_durable(path, data, 0o600)
        return path

    def envelope(self, site: str) -> bytes:
        """A site's envelope."""
        return site_envelope(self.folder, site).read_bytes()

    def envelopes(self) -> list[Path]:
        """All that are there, by the sites' names."""
        return sorted(self.folder.glob(ENVELOPES))


def attempts(run: ServerRun, round_number: int) -> list[Spool]:
    """A round's attempts, oldest first."""
    folder = run.spooled_round(round_number)
    numbers = sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit())
    return [Spool(run, round_number, number) for number in numbers]


def keep_revealed(run: ServerRun, after: str, names: Sequence[str]) -> None:
    """Keep for whose sum sites may have revealed at the adapter that follows a sum, in a round that is given up. No
    names: that sum was out of range, and theirs would be so again.

    Raises:
        StorageError: it cannot be written.
    """
    _keep_names(run.revealed, after, names)


def revealed_to(run: ServerRun, after: str) -> frozenset[str] | None:
    """These names, if the adapter still is the one that follows this sum; else None."""
    return _kept_names(run.revealed, after)


def keep_told(run: ServerRun, head: str, names: Sequence[str]) -> None:
    """Keep who knows that the run ends with this head, so that a server that is started again does not wait for them.

    Raises:
        StorageError: it cannot be written.
    """
    _keep_names(run.told, head, names)


def told(run: ServerRun, head: str) -> frozenset[str]:
    """Their names; none if this is another head."""
    return _kept_names(run.told, head) or frozenset()


def _keep_names(path: Path, at: str, names: Sequence[str]) -> None:
    write_durable(path, "\n".join([at, *names]).encode(), 0o600)


def _kept_names(path: Path, at: str) -> frozenset[str] | None:
    kept = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else []
    return frozenset(kept[1:]) if kept[:1] == [at] else None


def erase_round(run: ServerRun, round_number: int) -> None:
    """Erase what came for a round."""
    shutil.rmtree(run.spooled_round(round_number), ignore_errors=True)


def erase_other_rounds(run: ServerRun, round_number: int) -> None:
    """Erase what came for any other round."""
    for folder in run.spool.glob("*"):
        if folder.name != numbered(round_number):
            shutil.rmtree(folder)


def envelope_start(path: Path) -> bytes:
    """The beginning of an envelope's file, in which its header is whole, without most of its residues."""
    with path.open("rb") as stream:
        return stream.read(8 + MAX_HEADER + SIGNATURE_BYTES)

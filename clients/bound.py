"""What a site has bound itself to in a round: one file, written whole before the word that it binds is sent.

If it is not there, nothing was sent. It is the site's memory against a server that asks the same in two ways: one
attempt after the other, never back; one REVEAL a round; and, at one adapter state, one cohort.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from secure_fed.core.errors import StorageError
from secure_fed.core.storage import write_durable
from secure_fed.core.tomlfile import FileModel
from secure_fed.protocol.envelope import EnvelopeHeader, RoundPosition
from secure_fed.protocol.signing import Count
from secure_fed.protocol.study import Hex64, Name


class Bound(FileModel):
    """One round's words.

    Attributes:
        round, head: the round, and the journal head at which it began.
        attempt: the newest whose COHORT was answered; 0 before the first.
        cohort: digest of that COHORT; zeros before the first.
        names: who is in it.
        arrived: digest of the one ARRIVED that was revealed for; empty before.
        state: digest of the adapter state at which the site last revealed, in this round or before; empty if never.
        with_whom: the cohort it revealed to then.
        void: whether its people have given their word that nothing more is said for the round at this head.
        behind: whether others have words of this site that this disk does not know: an older copy was put back.
        out: whether the site sits this round out for that; it may have said anything in it, a REVEAL among it.
        released: digest of the state at which its people let it reveal once to another cohort; empty if at none.
    """

    format: Literal[1] = 1
    round: Count = 0
    head: str = ""
    attempt: Count = 0
    cohort: Hex64 = "0" * 64
    names: tuple[Name, ...] = ()
    arrived: str = ""
    state: str = ""
    with_whom: tuple[Name, ...] = ()
    released: str = ""
    void: bool = False
    behind: bool = False
    out: bool = False

    @property
    def may_have_revealed(self) -> bool:
        """Whether somebody may hold a REVEAL of this round."""
        return bool(self.arrived) or self.behind or self.out

    def knows(self, header: EnvelopeHeader) -> bool:
        """Whether an envelope that this site signed in this run is of before what stands here, or is what does."""
        if header.round != self.round:
            return header.round < self.round
        if header.head != self.head:
            return True  # of what was given up
        return header.attempt < self.attempt or (header.attempt, header.cohort) == (self.attempt, self.cohort)

    def at(self, due: RoundPosition) -> Bound:
        """Of a round at a head: this if it is the one, else a new one that remembers the adapter state."""
        if (self.round, self.head) == (due.round, due.head):
            return self
        return Bound(
            round=due.round,
            head=due.head,
            state=self.state,
            with_whom=self.with_whom,
            released=self.released,
            behind=self.behind,
        )


def read_bound(path: Path) -> Bound:
    """What was written last; of no round if nothing was.

    Raises:
        StorageError: it cannot be read, so that nobody knows what was said.
    """
    try:
        return Bound.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return Bound()
    except (OSError, ValidationError) as error:
        raise StorageError(
            f"{path}: cannot be read as what this site has bound itself to ({type(error).__name__}); put it back from "
            "a backup of this moment, or sit the round out: the next one begins a new file once it is removed"
        ) from None


def write_bound(path: Path, bound: Bound) -> None:
    """Write durably, before the word is sent.

    Raises:
        StorageError: it could not be written: nothing may be sent.
    """
    write_durable(path, bound.model_dump_json().encode(), 0o600)

"""What a site has bound itself to in a round: one file, written whole before the word that it binds is sent.

If it is not there, nothing was sent. It is the site's memory against a server that asks the same in two ways: one
attempt after the other, never back; one REVEAL a round; and, at one adapter state, one cohort.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from secure_fed.core.errors import StorageError
from secure_fed.core.storage import write_durable
from secure_fed.core.tomlfile import FileModel
from secure_fed.protocol.envelope import EnvelopeHeader, RoundPosition
from secure_fed.protocol.records import head_after_void
from secure_fed.protocol.round_frames import Product
from secure_fed.protocol.signing import Count
from secure_fed.protocol.study_tables import Hex64, Name


class Fresh(FileModel):
    """The key of the newest READY, in a study with pads.

    Attributes:
        attempt: of the READY.
        private: its private half, in hex.
    """

    attempt: Count
    private: Hex64


class Padded(FileModel):
    """What only this site knows of the envelope that it made for the attempt that it is bound to, with pads.

    Attributes:
        private: of its fresh key, in hex.
        keys: everybody's fresh public keys, in order of names.
        seed: of its own mask, in hex.
        shares: what it dealt, in hex.
        envelope: SHA-256 of the envelope's bytes, which lie beside.
        shared: for whom it has handed a share out, and the check of each one's envelope.
    """

    private: Hex64
    keys: tuple[Hex64, ...]
    seed: Hex64
    shares: str
    envelope: Hex64
    shared: dict[Name, tuple[Product, Product]] = Field(default_factory=dict)


class Bound(FileModel):
    """One round's words.

    Attributes:
        round, head: the round, and the journal head at which it began.
        attempt: the newest whose COHORT was answered; 0 before the first.
        cohort: digest of that COHORT; zeros before the first.
        names: who is in it.
        arrived: digest of the one ARRIVED that was revealed for; empty before.
        given: adapter states, by digest, at which the site has revealed, and to which cohort; the newest last. An empty
            cohort: nobody here knows which. None is forgotten in a run: records are taken back one at a time, but one
            after the other, and the state of each can come again.
        noised: adapter states, by digest, and whose updates at each are under a budget, as the sums that the site has
            revealed for say: these are harmless alone.
        upon: ids of the sums upon which the site has revealed, in whatever attempt or state of the round after each;
            none is forgotten either.
        before: what the last two had at this state and upon its sum before the REVEAL of this round, if there was one.
        void: whether its people have given their word that nothing more is said for the round at this head, nor at one
            that anything but a void has made of it since.
        behind: whether others have words of this site that this disk does not know: an older copy was put back.
        retired: whether its people have given their word that it trains no more in this run.
        out: whether the site sits this round out for that; it may have said anything in it, a REVEAL among it.
        released: digest of the state at which its people let it reveal once to another cohort; empty if at none.
        fresh: key of the newest READY, with pads; erased when the round is over.
        padded: what it knows of its envelope, with pads; erased when a later attempt is answered or the round is over.
    """

    format: Literal[1] = 1
    round: Count = 0
    head: str = ""
    attempt: Count = 0
    cohort: Hex64 = "0" * 64
    names: tuple[Name, ...] = ()
    arrived: str = ""
    given: dict[str, tuple[Name, ...]] = Field(default_factory=dict)
    noised: dict[str, tuple[Name, ...]] = Field(default_factory=dict)
    upon: tuple[Hex64, ...] = ()
    before: tuple[tuple[Name, ...] | None, bool] | None = None
    released: str = ""
    void: bool = False
    retired: bool = False
    behind: bool = False
    out: bool = False
    fresh: Fresh | None = None
    padded: Padded | None = None

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
        """Of a round at a head: this if it is the one, else a new one that remembers the adapter state and, until the
        round is closed or void, whether its people have given it up."""
        if (self.round, self.head) == (due.round, due.head):
            return self
        kept = self.model_dump(include={"given", "noised", "upon", "released", "retired", "behind"})
        void = self.void and self.round == due.round and due.head != head_after_void(self.head)
        return Bound(round=due.round, head=due.head, void=void).model_copy(update=kept)

    def giving(self, state: str, envelopes: Iterable[EnvelopeHeader], upon: str) -> Bound:
        """This once the site has revealed at a state, which follows a sum, for these envelopes: of a release, then,
        nothing is left. No envelopes: nobody here knows for which."""
        sent = {entry.site: bool(entry.ledger_seq) for entry in envelopes}
        cohort = tuple(sent)
        noised = {*self.noised.get(state, ()), *sent} - {site for site, paid in sent.items() if not paid}
        cohort_before, known = self.given.get(state), upon in self.upon
        given = {other: names for other, names in self.given.items() if other != state} | {state: cohort}
        released = self.released if cohort_before == cohort else ""  # the same sum once more needs none
        return self.model_copy(
            update={
                "given": given,
                "noised": self.noised | {state: tuple(sorted(noised))},
                "upon": self.upon if known else (*self.upon, upon),
                "before": (cohort_before, known),
                "released": released,
            }
        )

    def forgiven(self) -> Bound:
        """This as if the site had not revealed in this round: no sum of it can be opened."""
        if self.before is None:
            return self
        *others, (state, _) = self.given.items()
        cohort_before, known = self.before
        given = dict(others) | ({} if cohort_before is None else {state: cohort_before})
        return self.model_copy(update={"given": given, "upon": self.upon if known else self.upon[:-1]})


def read_bound(path: Path) -> Bound | None:
    """What was written last; of no round if nothing was. None if the file is damaged: nobody knows what was said.

    Raises:
        StorageError: it cannot be read.
    """
    try:
        text, _, digest = path.read_bytes().partition(b"\n")
        # One digit of a head or of a key that a disk turned over reads as another. Files of before have no digest.
        return Bound.model_validate_json(text) if digest in (b"", _digest(text)) else None
    except FileNotFoundError:
        return Bound()
    except ValidationError:
        return None
    except OSError as error:
        raise StorageError(
            f"{path}: what this site has bound itself to cannot be read ({error.strerror}); mend the disk or the "
            "file's rights, and start the site again"
        ) from None


def write_bound(path: Path, bound: Bound) -> None:
    """Write durably, before the word is sent.

    Raises:
        StorageError: it could not be written: nothing may be sent.
    """
    text = bound.model_dump_json().encode()
    write_durable(path, text + b"\n" + _digest(text), 0o600)


def _digest(text: bytes) -> bytes:
    """What follows a site's words in their file: SHA-256 in hex."""
    return hashlib.sha256(text).hexdigest().encode()

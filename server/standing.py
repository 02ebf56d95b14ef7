"""What is due while a round's step is open: follows from who is missing, away, leaving, refusing or late, and from
nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from enum import Enum, auto

from secure_fed.server.coordinator import Step


class Move(Enum):
    """What can be done about an open step."""

    STEP = auto()  # the next step, with those who are in
    WITHOUT = auto()  # another attempt, without those who are gone
    ANEW = auto()  # another attempt, for which all are asked anew
    SPEAK_FOR = auto()  # those who have revealed speak for those who are gone


@dataclass(frozen=True)
class Standing:
    """How the open step stands at one look.

    Attributes:
        step: which it is.
        missing: whose answer it waits for.
        late: whether nothing has moved for as long as a round may wait.
        known_away: who was not there before either: no step waits for them while nobody needs them.
        away: of those in or missing, who has not been connected for a while; before the cohort is fixed, nobody.
        leaving: whose people have given the round up after the cohort was fixed.
        refusing: who has refused this attempt, or its cohort.
        all_there: whether who is in still stands by what it sent.
    """

    step: Step
    missing: AbstractSet[str]
    late: bool
    known_away: AbstractSet[str] = field(default=frozenset())
    away: AbstractSet[str] = field(default=frozenset())
    leaving: AbstractSet[str] = field(default=frozenset())
    refusing: AbstractSet[str] = field(default=frozenset())
    all_there: bool = True

    @property
    def gone(self) -> AbstractSet[str]:
        """Who of the cohort does not come any more; at the deadline whoever is missing."""
        return self.away | self.leaving | (self.missing if self.late else frozenset())

    @property
    def lacking(self) -> AbstractSet[str]:
        """Without whom the cohort's sum cannot be fixed."""
        return self.missing | self.leaving

    def moves(self) -> Iterator[Move]:
        """What to try, in this order, until one changes where the round stands."""
        if self.step in (Step.READY, Step.ACKNOWLEDGED):
            # Any that are enough will do.
            if self.late or self.missing <= self.known_away:
                yield Move.STEP
            # Too few, and nobody else comes: sites that know of a later attempt than the server are asked for the next.
            if self.refusing and (self.late or self.missing <= self.known_away | self.refusing):
                yield Move.ANEW
        elif self.step is Step.REVEAL:
            # The sum is fixed: it waits for every one, or for those who can speak for them.
            if self.gone:
                yield Move.SPEAK_FOR
            if not self.missing:
                yield Move.STEP
        else:
            if self.gone and self.missing <= self.gone:
                yield Move.WITHOUT
            refusing = self.refusing if self.late else frozenset()
            if (self.lacking or refusing) and self.missing <= self.away | refusing:
                yield Move.ANEW
            # Fixed only while all of them are there: after that the round waits for every one.
            if not self.missing and self.all_there:
                yield Move.STEP

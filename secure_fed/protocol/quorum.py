"""How many members' signed words a round needs, so that no single one decides anything."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Quorum:
    """What a study's members can do together.

    Attributes:
        training: K, members that train; observers have no word.
        faulty: f, how many of them may lie, or come back from an older disk.
        collusion: t, how many of those may pool what they have with the server without learning another's update.
        needed: q, members whose signed words a round, a void and a change of members need.
    """

    training: int
    faulty: int
    collusion: int
    needed: int

    @property
    def away(self) -> int:
        """How many training members may be away while rounds still close; below 0, none ever closes."""
        return self.training - self.needed

    @property
    def words(self) -> tuple[str, ...]:
        """The same for people, one line each."""
        absent = {0: "all of them: one that is away stops the rounds until it is back"}
        return (
            f"{self.training} sites train; {self.needed} of them must agree to every round"
            f", {absent.get(self.away, f'so {self.away} may be away')}",
            f"up to {self.faulty} of them may lie, or come back from an older disk, and no round differs between sites"
            if self.faulty
            else "none of them may lie: the server could forge everything",
            self.claim,
        )

    @property
    def claim(self) -> str:
        """What the server and sites that pool all they have with it can learn at most, in one sentence."""
        if not self.faulty:
            return "the server reads every update: nothing is encrypted"
        if not self.collusion:
            return "a site that pools the study's key with the server can open single updates (collusion = 0)"
        others = "any one site" if self.collusion == 1 else f"any {self.collusion} sites"
        return (
            f"the server and {others} together learn, of sites without a budget, one sum for each adapter state over "
            f"at least {self.needed - self.collusion} other sites, unless operators released another"
        )


def quorum(training: int, faulty: int, least: int) -> int:
    """The smallest number above (K + f) / 2 that is at least f + 2 and at least ``min_sites``.

    Two sets of so many of K members share more than f, so an honest one; and without the f there are two left to hide
    among. With f = 1: 3, 3, 4, 4, 5, 5, 6 for K = 3 to 9.

    Args:
        training: K, members that train.
        faulty: f, members that may lie.
        least: the study's ``min_sites``.
    """
    return max((training + faulty) // 2 + 1, faulty + 2, least)


def refuse_quorum(training: int, faulty: int, least: int, refusal: type[Exception]) -> None:
    """Refuse members that could never close a round.

    Raises:
        Exception: of class ``refusal``: q is more than K; with the numbers that would do.
    """
    needed = quorum(training, faulty, least)
    if needed > training:
        enough = next(count for count in range(training, 5000) if quorum(count, faulty, least) <= count)
        raise refusal(
            f"{training} training sites, of which faulty = {faulty} may lie, can never agree: a round needs {needed}; "
            f"expected at least {enough} training sites with these faulty and min_sites"
        )

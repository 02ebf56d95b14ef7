"""An attempt's shares at the server: handed on unopened, answered for, and put together for who is gone.

The server can open none of them. It holds what it passes on against what makers signed, so that it can say whose doing
it is when something does not fit.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass, field

from secure_fed.core.errors import EnvelopeError
from secure_fed.protocol.pads import commitment
from secure_fed.protocol.round_frames import SignedWord, products
from secure_fed.protocol.share_frames import (
    ENTRY,
    CheckedHeader,
    Witness,
    Witnessed,
    hand_out,
    places,
    share_digest,
    share_points,
)
from secure_fed.protocol.shares import DIGEST_BYTES, combine

log = logging.getLogger(__name__)


@dataclass
class StandIn:
    """What others have said for one site whose REVEAL is missing or wrong.

    Attributes:
        site: whose.
        committed: to the seed of its mask, by its header.
        check: of its envelope, which the server holds.
        seed: of its mask, once known, in hex.
        points: the shares that came and fit, by their places.
        broken: whether a quorum of shares fit and do not give what the site committed to.
    """

    site: str
    committed: str
    check: tuple[int, int]
    seed: str = ""
    points: dict[int, bytes] = field(default_factory=dict)
    broken: bool = False


class Shares:
    """Of one attempt.

    Args:
        names: of the cohort, in order.
        needed: the quorum.

    Attributes:
        deals: whether there are shares: not where nobody of the cohort can be missed.
        checked: who has a good share of everybody, and its CHECKED.
        complaints: whose share does not open, by who says so.
        gone: what others have said for whom, by name.
        words: for whom each one that has spoken for others has, and its signature over that WITNESS, in hex, by name.
    """

    def __init__(self, names: tuple[str, ...] = (), needed: int = 0) -> None:
        self.deals = len(names) > needed
        self.checked: dict[str, SignedWord] = {}
        self.complaints: dict[str, tuple[str, ...]] = {}
        self.gone: dict[str, StandIn] = {}
        self.words: dict[str, tuple[tuple[str, ...], str]] = {}
        self._names = names
        self._needed = needed
        self._handed: dict[str, list[bytes]] = {}

    def take(self, maker: str, entries: bytes, root: str) -> None:
        """Take what a site dealt.

        Raises:
            EnvelopeError: it is not what its header names.
        """
        try:
            self._handed[maker] = hand_out(entries, root, len(self._names) - 1 if self.deals else 0)
        except EnvelopeError as error:
            raise EnvelopeError(f"envelope of {maker}: {error}") from None

    def handed(self, maker: str, receiver: str) -> bytes:
        """One site's share of a maker's seed, with its path."""
        return self._handed[maker][list(share_points(self._names, maker)).index(receiver)]

    def for_site(self, receiver: str) -> bytes:
        """The shares of all others that are sealed to a site, in order of their makers."""
        return b"".join(self.handed(maker, receiver) for maker in self._names if maker != receiver)

    @property
    def answered(self) -> set[str]:
        """Who has opened its shares."""
        return self.checked.keys() | self.complaints.keys()

    def answer(self, header: CheckedHeader, word: SignedWord) -> None:
        """Take a CHECKED that was checked."""
        if header.complaints:
            self.complaints[header.site] = header.complaints
            log.warning("%s: the shares of %s do not open to it", header.site, ", ".join(header.complaints))
        else:
            self.complaints.pop(header.site, None)
            self.checked[header.site] = word

    def lacking(self, site: str) -> str | None:
        """Whom this site, which has revealed, has not spoken for yet."""
        for name, stand_in in self.gone.items():
            said = site in self.speakers(name) and share_points(self._names, name).get(site) in stand_in.points
            if name != site and not said and not self.complete(stand_in) and not stand_in.broken:
                return name
        return None

    def speakers(self, gone: str) -> set[str]:
        """Who has spoken for a site."""
        return {site for site, (names, _) in self.words.items() if gone in names}

    def complete(self, stand_in: StandIn) -> bool:
        """Whether enough have spoken, and the mask is known."""
        return len(self.speakers(stand_in.site)) >= self._needed and bool(stand_in.seed)

    @property
    def stand_ins(self) -> dict[str, StandIn]:
        """Those for whom enough have spoken."""
        return {name: stand_in for name, stand_in in self.gone.items() if self.complete(stand_in)}

    def witness(self, site: str, names: tuple[str, ...], signature: str, share: bytes) -> None:
        """Take one site's word for others, whose checks in it are right, and its share of one's seed.

        An earlier word that came again, for fewer, changes nothing.

        Raises:
            EnvelopeError: the share fits nothing that one of them dealt, or the word leaves out for whom the site has
                spoken before: the sender's doing.
        """
        maker = self._maker(site, names, share)
        if maker is None:
            raise EnvelopeError(
                f"WITNESS of {site} for {', '.join(names)}: its share is another than was dealt; it does not count"
            )
        before = set(self.words[site][0]) if site in self.words else set()
        if not before <= set(names) and not before >= set(names):
            raise EnvelopeError(
                f"WITNESS of {site} for {', '.join(names)}: leaves out {', '.join(sorted(before - set(names)))}, for "
                "whom it has spoken; it does not count"
            )
        if before <= set(names):
            self.words[site] = names, signature
        if maker in self.gone:  # else it came back while the word was on its way
            self._combine(self.gone[maker], share_points(self._names, maker)[site], share)

    def _maker(self, site: str, names: tuple[str, ...], share: bytes) -> str | None:
        """Which of these has dealt a site this share."""
        for name in names:
            if share_digest(share, name, site) == self.handed(name, site)[ENTRY - DIGEST_BYTES : ENTRY]:
                return name
        return None

    def _combine(self, stand_in: StandIn, point: int, share: bytes) -> None:
        stand_in.points[point] = share
        if not stand_in.seed and len(stand_in.points) >= self._needed:
            seed = combine(dict(list(stand_in.points.items())[: self._needed]))
            if commitment(seed, stand_in.site) == stand_in.committed:
                stand_in.seed = seed.hex()
            else:
                stand_in.broken = True
                log.error(
                    "%s: the shares it dealt fit and do not give the mask it committed to; the round waits for it, or "
                    "for people",
                    stand_in.site,
                )

    def take_no_word_of(self, site: str) -> None:
        """Let a site whose own REVEAL does not count speak for nobody: a record has no room for its words, and others
        are asked in its place. Its shares fit what their makers signed."""
        self.words.pop(site, None)

    def witnessed(self, name: str) -> Witnessed:
        """What the record says of a site for which others speak."""
        return Witnessed(name, *products(self.gone[name].check))

    def witnesses(self, gone: Collection[str]) -> list[Witness]:
        """Words that the record keeps for some: by name, those that one of them has too few without."""
        kept = []
        lacking = dict.fromkeys(gone, self._needed)
        for site, (names, signature) in sorted(self.words.items()):
            if any(lacking.get(name, 0) > 0 for name in names):
                kept.append(Witness(site, places(self._names, names), signature))
                lacking = {name: count - (name in names) for name, count in lacking.items()}
        return kept

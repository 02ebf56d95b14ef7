"""An attempt's shares at the server: handed on unopened, answered for, and put together for who is gone.

The server can open none of them. It holds what it passes on against what makers signed, so that it can say whose doing
it is when something does not fit.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from secure_fed.core.errors import EnvelopeError
from secure_fed.protocol.pads import commitment
from secure_fed.protocol.round_frames import SignedWord, products
from secure_fed.protocol.share_frames import ENTRY, CheckedHeader, Witnessed, hand_out, share_digest, share_points
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
        words: signatures over each one's WITNESS, in hex, by name.
        points: the shares that came and fit, by their places.
        broken: whether a quorum of shares fit and do not give what the site committed to.
    """

    site: str
    committed: str
    check: tuple[int, int]
    seed: str = ""
    words: dict[str, str] = field(default_factory=dict)
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
    """

    def __init__(self, names: tuple[str, ...] = (), needed: int = 0) -> None:
        self.deals = len(names) > needed
        self.checked: dict[str, SignedWord] = {}
        self.complaints: dict[str, tuple[str, ...]] = {}
        self.gone: dict[str, StandIn] = {}
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
            if name != site and site not in stand_in.words and not self.complete(stand_in) and not stand_in.broken:
                return name
        return None

    def complete(self, stand_in: StandIn) -> bool:
        """Whether enough have spoken, and the mask is known."""
        return len(stand_in.words) >= self._needed and bool(stand_in.seed)

    @property
    def stand_ins(self) -> dict[str, StandIn]:
        """Those for whom enough have spoken."""
        return {name: stand_in for name, stand_in in self.gone.items() if self.complete(stand_in)}

    def witness(self, site: str, gone: str, check: tuple[int, int], signature: str, share: bytes) -> None:
        """Take one site's word for another, and its share of that one's seed.

        Raises:
            EnvelopeError: either does not fit what the gone one signed: the sender's doing.
        """
        stand_in = self.gone[gone]
        if check != stand_in.check:
            raise EnvelopeError(f"WITNESS of {site} for {gone}: its check does not fit the envelope; it does not count")
        entry = self.handed(gone, site)[:ENTRY]
        if share_digest(share, gone, site) != entry[-DIGEST_BYTES:]:
            raise EnvelopeError(f"WITNESS of {site} for {gone}: its share is another than was dealt; it does not count")
        stand_in.words[site] = signature
        stand_in.points[share_points(self._names, gone)[site]] = share
        if not stand_in.seed and len(stand_in.points) >= self._needed:
            seed = combine(dict(list(stand_in.points.items())[: self._needed]))
            if commitment(seed, gone) == stand_in.committed:
                stand_in.seed = seed.hex()
            else:
                stand_in.broken = True
                log.error(
                    "%s: the shares it dealt fit and do not give the mask it committed to; the round waits for it, or "
                    "for people",
                    gone,
                )

    def take_no_word_of(self, site: str) -> None:
        """Let a site whose own REVEAL does not count speak for nobody: a record has no room for its words, and others
        are asked in its place. Its shares fit what their makers signed."""
        for stand_in in self.gone.values():
            stand_in.words.pop(site, None)

    def witnessed(self, name: str) -> Witnessed:
        """What the record keeps of those who speak for a site: as many as it needs."""
        stand_in = self.gone[name]
        return Witnessed(name, *products(stand_in.check), tuple(sorted(stand_in.words.items())[: self._needed]))

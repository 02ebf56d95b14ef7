"""Words by which sites' people give a round up: the open one, or that of the last record, which is taken back then."""

from __future__ import annotations

import logging

from secure_fed.core.errors import EnvelopeError
from secure_fed.protocol.records import Chain
from secure_fed.protocol.round_frames import VOID_MAGIC, SignedWord, check_void, split_word, word_head
from secure_fed.protocol.study import AgreedStudy
from secure_fed.server.journal import Journal

log = logging.getLogger(__name__)


class Voids:
    """Those of one round.

    Args:
        agreed: the study.
        journal: that a void is appended to.

    Attributes:
        given: of the open round, by site name.
        late: of the round of the last record, by site name.
    """

    def __init__(self, agreed: AgreedStudy, journal: Journal) -> None:
        self._agreed = agreed
        self._journal = journal
        self.given: dict[str, SignedWord] = {}
        self.late: dict[str, SignedWord] = {}

    @property
    def sites(self) -> frozenset[str]:
        """Whose people have given one of the two up."""
        return frozenset(self.given) | frozenset(self.late)

    @property
    def complete(self) -> bool:
        """Whether those of the open round are a quorum."""
        return len(self.given) >= self._journal.chain.quorum.needed

    @property
    def late_complete(self) -> bool:
        """Whether those of the last record's are one."""
        before = self._journal.before
        return before is not None and len(self.late) >= before.quorum.needed

    def take(self, data: bytes, site: str) -> None:
        """Take a site's word.

        Raises:
            EnvelopeError: it is not that site's, or of neither round.
        """
        word = split_word(VOID_MAGIC, data)
        chain, before = self._journal.chain, self._journal.before
        place: Chain = chain if before is None or word_head(word) != before.head else before
        header = check_void(word, self._agreed, place.members, place.due)
        if header.site != site:
            raise EnvelopeError(f"a void of {header.site} in a reply of {site}")
        voids = self.given if place is chain else self.late
        if site not in voids:
            log.warning("%s: its people give round %d up; it %s revealed", site, header.round,
                        "had" if header.revealed else "had not")  # fmt: skip
        voids[site] = word

    def append(self) -> bool:
        """Append the void: of what was begun of the round, or in the place of the last sum, where its record and these
        words crossed: the void counts.

        Returns:
            Whether a record was taken back.
        """
        late = self.late_complete
        voids = self.late if late else self.given
        words = [voids[name] for name in sorted(voids)]
        if not late:
            self._journal.append_void(words)
            return False
        log.warning("round %d: a quorum gives it up, whose record was there already: the record is taken back, and "
                    "nobody need have lied", self._journal.chain.round)  # fmt: skip
        self._journal.replace_sum(words)
        return True

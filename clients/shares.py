"""Shares of others' masks that were dealt to this site in an attempt: opened, complained of, given away for one sum.

:mod:`secure_fed.server.shares` passes them on and can open none.
"""

from __future__ import annotations

import hashlib
import logging

from secure_fed.clients.bound import Bound
from secure_fed.core.errors import EnvelopeError, ProtocolError
from secure_fed.protocol.envelope import EnvelopeHeader, RoundPosition
from secure_fed.protocol.pads import PadPlace, SitePads
from secure_fed.protocol.share_frames import open_handed, take_handed
from secure_fed.protocol.study import AgreedStudy

log = logging.getLogger(__name__)


class HeldShares:
    """The shares for one site in the attempt that it is bound to, as the server hands them on.

    Args:
        agreed: the study, with pads.
        due: where the round stands.
        name: this site's.
        bound: what it is bound to.
        envelopes: headers of all of the attempt's cohort.
    """

    def __init__(
        self, agreed: AgreedStudy, due: RoundPosition, name: str, bound: Bound, envelopes: tuple[EnvelopeHeader, ...]
    ) -> None:
        assert bound.padded is not None  # of a study with pads
        keys = dict(zip(bound.names, bound.padded.keys, strict=True))
        place = PadPlace(agreed.study.id, due, bound.attempt, bound.cohort)
        self._pads = SitePads(place, keys, name, bytes.fromhex(bound.padded.private))
        self._roots = {entry.site: entry.hidden.shares for entry in envelopes if entry.hidden is not None}
        self._name = name
        self._bound = bound
        self._envelopes = envelopes

    def complaints(self, carried: bytes) -> list[str]:
        """Whose shares do not open to what their makers' headers say.

        Raises:
            EnvelopeError: they are not what the makers dealt: the carrier's doing, who is to send them again.
        """
        names, found = self._bound.names, []
        handed, _ = take_handed(carried, names, [name for name in names if name != self._name], self._name, self._roots)
        for maker, entry in handed.items():
            try:
                open_handed(self._pads, maker, entry)
            except EnvelopeError as error:
                log.warning("%s: round %d: %s; tell its people", self._name, self._bound.round, error)
                found.append(maker)
        return found

    def of_gone(self, gone: str, carried: bytes) -> tuple[bytes, bytes]:
        """The masked payload of a site that is gone, held against what it signed, and the share of its mask.

        Raises:
            EnvelopeError: the share is not what was dealt.
            ProtocolError: another envelope.
        """
        handed, payload = take_handed(carried, self._bound.names, [gone], self._name, self._roots)
        theirs = self._envelopes[self._bound.names.index(gone)]
        if (len(payload), hashlib.sha256(payload).hexdigest()) != (theirs.size, theirs.payload):
            raise ProtocolError(f"asked to witness an envelope of {gone} that is not the one it signed")
        return payload, open_handed(self._pads, gone, handed[gone])

"""Members' words for an amendment's adapter, until they make its checkpoint. In memory: after a restart sites give them
again."""

from __future__ import annotations

import logging

from secure_fed.core.errors import ProtocolError, RecordError
from secure_fed.protocol.records import Chain
from secure_fed.protocol.sealed_key import (
    ACKNOWLEDGEMENT_MAGIC,
    MAX_ACKNOWLEDGEMENT_HEADER,
    AcknowledgementHeader,
    verify_acknowledgement,
)
from secure_fed.protocol.signing import Frame, check_payload, parse_header, split_frame
from secure_fed.protocol.study import AgreedStudy

log = logging.getLogger(__name__)


class Acknowledgements:
    """Those of one amendment.

    Args:
        agreed: the study.
    """

    def __init__(self, agreed: AgreedStudy) -> None:
        self._agreed = agreed
        self.frames: dict[str, Frame] = {}
        self._told: list[str] = []

    def take(self, data: bytes, site: str, chain: Chain) -> None:
        """Take a site's.

        Raises:
            ProtocolError: it is not that site's, or does not follow the journal.
        """
        try:
            frame = split_frame(ACKNOWLEDGEMENT_MAGIC, data, MAX_ACKNOWLEDGEMENT_HEADER, RecordError)
            header = verify_acknowledgement(
                frame.header, frame.signature, self._agreed, chain.members, chain.run, chain.head
            )
            check_payload(frame, header, RecordError)
            chain.check_size("checkpoint", header.size)
        except RecordError as error:
            raise ProtocolError(f"{site}: {error}") from None
        if header.site != site:
            raise ProtocolError(f"an acknowledgement of {header.site} in a reply of {site}")
        if site != self._agreed.study.key_maker:
            # Only the key maker's checkpoint counts; the others acknowledge its digest.
            frame = Frame(frame.magic, frame.header, frame.signature, memoryview(b""))
        self.frames[site] = frame

    def checkpoint(self, chain: Chain) -> tuple[list[Frame], bytes] | None:
        """The words of those who hold the key maker's adapter, by site name, and its checkpoint; None while the key
        maker's is missing, or a quorum."""
        agreeing, odd = self._sides()
        if odd and odd != self._told and not self.against_maker(chain):
            log.warning("%s: acknowledge another adapter than the key maker, and are left out", ", ".join(odd))
            self._told = odd
        if sum(chain.members[name].role == "train" for name in agreeing) < chain.quorum.needed:
            return None
        return [self.frames[site] for site in agreeing], bytes(self.frames[self._agreed.study.key_maker].payload)

    def against_maker(self, chain: Chain) -> list[str]:
        """Training sites that agree on another adapter than the key maker's, if an honest one must be among them."""
        adapters = {
            name: _adapter(self.frames[name]) for name in self._sides()[1] if chain.members[name].role == "train"
        }
        most = max(adapters.values(), key=list(adapters.values()).count, default="")
        names = [name for name, adapter in adapters.items() if adapter == most]
        return names if len(names) > chain.quorum.faulty else []

    def _sides(self) -> tuple[list[str], list[str]]:
        """Who acknowledges the key maker's adapter, and who another, by name; nobody before it has."""
        maker = self.frames.get(self._agreed.study.key_maker)
        if maker is None:
            return [], []
        agreeing = [site for site in sorted(self.frames) if _adapter(self.frames[site]) == _adapter(maker)]
        return agreeing, sorted(set(self.frames) - set(agreeing))


def _adapter(frame: Frame) -> str:
    """The keyed digest of the adapter that an acknowledgement, checked before, is of."""
    return parse_header(frame.header, AcknowledgementHeader, RecordError).checkpoint

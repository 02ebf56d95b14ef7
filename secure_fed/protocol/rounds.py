"""What passes between server and site, whatever carries it. Both messages are allow-lists of fields."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

PAGE_BYTES = 16 * 2**20
"""Most bytes of records in one request; a site that lacks more asks again."""


class ReplyCode(StrEnum):
    """All that a reply can say in words: flwr would otherwise carry exception texts to the server."""

    PRESENT = "present"
    READY = "ready"
    UPDATE = "update"
    CHECKED = "checked"
    REVEALED = "revealed"
    WITNESSED = "witnessed"
    VOID = "void"
    RETIRED = "retired"
    SITS_OUT = "sits-out"
    APPLIED = "applied"
    MORE = "more"
    ACKNOWLEDGED = "acknowledged"
    REFUSED_AGGREGATE = "refused-aggregate"
    REFUSED_BUNDLE = "refused-bundle"
    FAILED_POLICY = "failed-policy"
    FAILED_DATA = "failed-data"
    FAILED_BACKBONE = "failed-backbone"
    FAILED_PROTOCOL = "failed-protocol"
    FAILED_STORAGE = "failed-storage"
    FAILED = "failed"


@dataclass(frozen=True)
class RoundRequest:
    """From the server to one site.

    Attributes:
        round: the round that is due; beyond the study's rounds there is nothing left to train.
        attempt: from 1, of which the site is asked whether it is ready; 0 asks for nothing but to take the records.
        records: journal records that the site lacks, in order, at most 16 MiB (or one record).
        more: whether further records follow; then nothing is trained yet.
        attested_head: the head at which the sites made the attestations; empty when there are none.
        attestations: keyed adapter digests of the sites at that head, by site name; with records, with the question
            whether a site is ready, and with a COHORT, not again with what follows it at the same head.
        question: a signed COHORT or ARRIVED, with pads also a CHECK or GONE, or whether the site is there
            (:mod:`secure_fed.protocol.presence`), to be answered instead; else empty.
        held: SHA-256 of this site's payload that the server has of an earlier attempt and need not be sent again.
        past: this site's own newest word in the open round, as it signed it: its REVEAL, else its envelope without the
            payload; empty if there is none. A site whose disk does not know it was put back to an older state.
        carried: what goes with a question, under other sites' signatures: shares with a CHECK, everybody's CHECKED
            with an ARRIVED, a share and an envelope's payload with a GONE.
        after: id of the server's record before those that it sends, by which a site sees whether a void took the place
            of its last sum; empty if the site has none yet.
    """

    round: int
    attempt: int
    records: tuple[bytes, ...]
    more: bool
    attested_head: str = ""
    attestations: dict[str, str] = field(default_factory=dict)
    question: bytes = b""
    held: str = ""
    past: bytes = b""
    carried: bytes = b""
    after: str = ""


@dataclass(frozen=True)
class RoundReply:
    """From a site to the server.

    Attributes:
        site: the sender.
        code: what happened.
        run: the run the site is in; empty before its first genesis.
        position: number of records of that run that the site has, and the server too as far as it has said.
        attestation: keyed digest of its adapter at that position; empty while it cannot open the adapter.
        envelope: the signed word that the code names: that it is there for ``present``, READY for ``ready``, the
            update's envelope for ``update``, REVEAL for ``revealed``, its people's word for ``void`` and ``retired``,
            the acknowledgement of an amendment for ``acknowledged``, CHECKED for ``checked``, WITNESS for
            ``witnessed``; else empty.
        carried: with pads, the shares that an update's site deals, or the one that goes with a WITNESS; else empty.
    """

    site: str
    code: ReplyCode
    run: str
    position: int
    attestation: str
    envelope: bytes
    carried: bytes = b""

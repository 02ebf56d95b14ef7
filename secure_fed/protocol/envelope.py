"""Envelopes: a site's signed, encrypted update for one round.

The header is all that a site tells in clear; :class:`EnvelopeHeader` is the allow-list of its fields.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import ValidationInfo, field_validator

from secure_fed.core.errors import EnvelopeError
from secure_fed.protocol.ledger_heads import MAX_LINKS, LedgerHead, Link
from secure_fed.protocol.packing import NO_SEED, Contribution, Sealed
from secure_fed.protocol.signing import (
    Count,
    MemberHeader,
    check_payload,
    payload_fields,
    sign_frame,
    split_frame,
    verify_member,
)
from secure_fed.protocol.study import AgreedStudy
from secure_fed.protocol.study_tables import Hex64, Member

MAGIC = b"SFE2"
MAX_HEADER = 2048


@dataclass(frozen=True)
class RoundPosition:
    """Where in which run an envelope belongs.

    Attributes:
        run: run id.
        head: journal head on which the site trained.
        key: key id; zeros in ``plain`` mode.
        amendment: number of the last amendment in force.
        round: from 1.
    """

    run: str
    head: str
    key: str
    amendment: int
    round: int


class Hidden(NamedTuple):
    """What a site says of the pads on its envelope, in a study that has them (:mod:`secure_fed.protocol.pads`).

    Attributes:
        mask: commitment to the seed of its own mask.
        shares: root over that seed's shares; zeros if nobody gets one, since the cohort is just a quorum.
    """

    mask: Hex64
    shares: Hex64


class EnvelopeHeader(MemberHeader):
    """Everything that an envelope says in clear.

    Attributes:
        version: of the format.
        study: study id.
        run, head, key, amendment, round: see :class:`RoundPosition`.
        attempt: from 1; a later attempt carries the same stored integers and, under the same head, the same bytes.
        cohort: digest of the COHORT that it answers: who else takes part in this attempt.
        site: the sender.
        values: integers carried, validation counts included, tags excluded.
        seed: from which the second polynomials follow; zeros in ``plain`` mode.
        ledger_seq, ledger_head: the site's privacy ledger; 0 and zeros without DP.
        ledger_links: earlier entries of it, by rising number (:mod:`secure_fed.protocol.ledger_heads`); none without
            DP.
        hidden: of the pads; None in a study without.
    """

    run: Hex64
    head: Hex64
    key: Hex64
    amendment: Count
    round: Count
    attempt: Count
    cohort: Hex64
    values: Count
    seed: Hex64
    ledger_seq: Count
    ledger_head: Hex64
    ledger_links: tuple[Link, ...]
    hidden: Hidden | None = None

    @field_validator("ledger_links")
    @classmethod
    def _rising(cls, links: tuple[Link, ...], info: ValidationInfo) -> tuple[Link, ...]:
        numbers = [0, *(seq for seq, _ in links), info.data.get("ledger_seq", 0)]
        if len(links) > MAX_LINKS or (links and any(a >= b for a, b in pairwise(numbers))):
            raise ValueError(f"links {numbers[1:-1]} before entry {numbers[-1]}; expected at most {MAX_LINKS}, rising")
        return links

    @property
    def ledger(self) -> LedgerHead:
        """Where the site's privacy ledger stands."""
        return LedgerHead(self.ledger_seq, self.ledger_head, self.ledger_links)

    @property
    def position(self) -> RoundPosition:
        """Where the envelope belongs."""
        return RoundPosition(self.run, self.head, self.key, self.amendment, self.round)

    @property
    def contribution(self) -> Contribution:
        """Site and seed, to which tags and second polynomials are bound."""
        return Contribution(self.site, self.seed)


@dataclass(frozen=True)
class Envelope:
    """A checked envelope; its payload is where it came in."""

    header: EnvelopeHeader
    header_text: bytes
    signature: bytes
    payload: bytes | memoryview
    size: int


def seal_envelope(
    agreed: AgreedStudy,
    position: RoundPosition,
    sealed: Sealed,
    ledger: LedgerHead,
    key: Ed25519PrivateKey,
    *,
    attempt: int,
    cohort: str,
    hidden: Hidden | None = None,
) -> bytes:
    """Sign a sealed update for one attempt of one round, in answer to the COHORT of that digest."""
    contribution, payload = sealed
    header = EnvelopeHeader(
        version=2,
        study=agreed.study.id,
        run=position.run,
        head=position.head,
        key=position.key,
        amendment=position.amendment,
        round=position.round,
        attempt=attempt,
        cohort=cohort,
        site=contribution.site,
        seed=contribution.seed,
        values=agreed.layout(position.round).lanes.values,
        ledger_seq=ledger.seq,
        ledger_head=ledger.head,
        ledger_links=ledger.links,
        hidden=hidden,
        **payload_fields(payload),
    )
    return sign_frame(MAGIC, header, key, payload)


def open_envelope(data: bytes, agreed: AgreedStudy, members: Mapping[str, Member], payload_bytes: int) -> Envelope:
    """Check an envelope as far as the study alone allows: caps, version, pinned key, signature, payload digest.

    Round, run and head are checked by whoever knows which are due: :func:`check_position`.

    Args:
        data: hostile bytes.
        agreed: the study.
        members: its members now, by name.
        payload_bytes: size of a payload under the study's parameters.

    Raises:
        EnvelopeError: with what was found and expected.
    """
    limit = 8 + MAX_HEADER + 64 + payload_bytes
    if len(data) > limit:
        raise EnvelopeError(f"envelope: {len(data)} bytes; expected at most {limit}")
    frame = split_frame(MAGIC, data, MAX_HEADER, EnvelopeError)
    header = verify_contribution(frame.header, frame.signature, agreed, members)
    if header.size != payload_bytes:
        raise EnvelopeError(f"envelope: a payload of {header.size} bytes; the study's parameters give {payload_bytes}")
    check_payload(frame, header, EnvelopeError)
    return Envelope(header, frame.header, frame.signature, frame.payload, len(data))


def verify_contribution(
    text: bytes, signature: bytes, agreed: AgreedStudy, members: Mapping[str, Member]
) -> EnvelopeHeader:
    """Read a signed envelope header, on its own or in a record, and check signature, study and sender.

    Raises:
        EnvelopeError: with what was found and expected.
    """
    header = verify_member(MAGIC, text, signature, EnvelopeHeader, agreed.study.id, members, MAX_HEADER, EnvelopeError)
    member = members[header.site]
    if member.role != "train":
        raise EnvelopeError(f"envelope of {header.site}, an observer; only training sites send updates")
    values = agreed.layout(header.round).lanes.values
    if header.values != values:
        raise EnvelopeError(f"envelope of {header.site}: {header.values} values, expected {values}")
    if (header.seed == NO_SEED) != (agreed.study.mode == "plain"):
        raise EnvelopeError(f"envelope of {header.site}: seed {header.seed} does not fit mode {agreed.study.mode}")
    if (header.hidden is None) == agreed.study.pads:
        raise EnvelopeError(
            f"envelope of {header.site}: {'no' if agreed.study.pads else 'a'} word of pads, in a study of collusion = "
            f"{agreed.study.colluders}"
        )
    return header


Seeds = dict[tuple[str, str], str]
"""Payload digests of envelopes by site and seed."""


def refuse_repeated_seed(header: EnvelopeHeader, seen: Seeds) -> None:
    """Refuse a seed that came from this site before with other bytes.

    Two ciphertexts of one seed in one round share their second polynomials, so that their difference needs no key. By
    site: what another site copies hits nobody.

    Raises:
        EnvelopeError: it did.
    """
    known = seen.get((header.site, header.seed), header.payload)
    if known != header.payload and header.seed != NO_SEED:
        raise EnvelopeError(
            f"envelope of {header.site}: its seed came before, with other bytes ({known[:16]}); expected one that was "
            "never used: that site's random numbers repeat, as in a copied machine, or it runs twice"
        )


def check_position(header: EnvelopeHeader, due: RoundPosition) -> None:
    """Check that a header belongs to the round that is due.

    Raises:
        EnvelopeError: naming every field that differs.
    """
    wrong = [
        f"{field} {getattr(header, field)}, expected {getattr(due, field)}"
        for field in ("run", "head", "key", "amendment", "round")
        if getattr(header, field) != getattr(due, field)
    ]
    if wrong:
        raise EnvelopeError(f"envelope of {header.site}: {'; '.join(wrong)}: not of this round")

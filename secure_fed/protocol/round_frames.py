"""The signed words of one round: READY, COHORT, ARRIVED, REVEAL. The envelope has a module of its own.

A site that has trained says READY. The server answers those that are with COHORT: who takes part in this attempt. Each
of them sends its envelope, whose header names the cohort. ARRIVED names the envelopes that came and the digest of their
sum, and fixes both; only then is it known what the linear check is drawn from. A site says REVEAL for one ARRIVED of a
round and no other: its own envelope's check. The record holds the sum and every REVEAL, so that whoever reads it can
tell a bent sum from a true one before anything is decrypted, and no second record of a round can be complete.

With pads READY brings a fresh key and REVEAL the seed of the site's own mask, and there are words besides
(:mod:`secure_fed.protocol.share_frames`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Annotated, Literal, NamedTuple, TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import Field, StringConstraints

from secure_fed.core.errors import EnvelopeError, ProtocolError, SecfacmicError
from secure_fed.protocol.envelope import EnvelopeHeader, RoundPosition, check_position, verify_contribution
from secure_fed.protocol.pads import check_fresh_key, refuse_copied_keys
from secure_fed.protocol.quorum import Quorum
from secure_fed.protocol.signing import (
    Count,
    Frame,
    MemberHeader,
    SignedHeader,
    check_payload,
    encode_header,
    parse_header,
    payload_fields,
    sign_frame,
    split_frame,
    verify_member,
    verify_signature,
)
from secure_fed.protocol.study import AgreedStudy
from secure_fed.protocol.study_tables import Hex64, Member

READY_MAGIC = b"SFY2"
COHORT_MAGIC = b"SFH2"
ARRIVED_MAGIC = b"SFA2"
REVEAL_MAGIC = b"SFV2"
VOID_MAGIC = b"SFX2"
RETIRED_MAGIC = b"SFT2"
MAX_WORD = 1024
"""Most bytes of a READY's or a REVEAL's header."""
MAX_ATTEMPT = 2**16
"""Attempts of one round; a site pins each."""

HEADER_BASE = 4096
HEADER_PER_SITE = 4096

Attempt = Annotated[int, Field(ge=1, le=MAX_ATTEMPT)]
Product = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{16}$")]
"""A residue as 64 bits in hex: a REVEAL is as long whatever it says."""


class SignedWord(NamedTuple):
    """A site's header as it signed it, inside another frame: exact bytes and signature, both in hex."""

    header: Annotated[str, StringConstraints(pattern=r"^([0-9a-f]{2}){8,2048}$")]
    signature: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{128}$")]

    @classmethod
    def of(cls, header: bytes, signature: bytes) -> SignedWord:
        """From the bytes."""
        return cls(header.hex(), signature.hex())

    @property
    def signed(self) -> tuple[bytes, bytes]:
        """Header and signature as bytes."""
        return bytes.fromhex(self.header), bytes.fromhex(self.signature)


class Revealed(NamedTuple):
    """A REVEAL as a record keeps it: all else in it follows from the record.

    Attributes:
        first, second: the two products.
        signature: the site's, over its REVEAL, in hex.
    """

    first: Product
    second: Product
    signature: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{128}$")]

    @property
    def products(self) -> tuple[int, int]:
        """The two as numbers."""
        return int(self.first, 16), int(self.second, 16)


class PlacedHeader(SignedHeader):
    """What words have that belong to an attempt of a round."""

    version: Literal[2]
    study: Hex64
    run: Hex64
    head: Hex64
    key: Hex64
    amendment: Count
    round: Count
    attempt: Attempt

    @property
    def position(self) -> RoundPosition:
        """Where the word belongs."""
        return RoundPosition(self.run, self.head, self.key, self.amendment, self.round)


Placed = TypeVar("Placed", bound=PlacedHeader)


class ReadyHeader(PlacedHeader, MemberHeader):
    """A site's word that its integers for the round are on its disk.

    Attributes:
        study: study id.
        run, head, key, amendment, round: see :class:`secure_fed.protocol.envelope.RoundPosition`.
        attempt: that it was asked for.
        site: the sender.
        released: whether at this adapter it may be in a sum with other sites than before: its people have said so, or
            its budget makes it harmless.
        fresh: its X25519 key for this attempt, of a study with pads; else None.
    """

    released: bool
    fresh: Hex64 | None = None


class CohortHeader(PlacedHeader):
    """The server's choice of who takes part in an attempt.

    Attributes:
        readies: each one's READY, by name.
    """

    readies: tuple[SignedWord, ...]


class ArrivedHeader(PlacedHeader):
    """Which envelopes came, and what their sum is: what a REVEAL binds itself to, and a record's head follows from.

    Attributes:
        cohort: digest of the attempt's COHORT.
        sum_size, sum: bytes of the sum, and their SHA-256.
        envelopes: the cohort's signed envelope headers, by name.
    """

    cohort: Hex64
    sum_size: Count
    sum: Hex64
    envelopes: tuple[SignedWord, ...]


class RevealHeader(MemberHeader):
    """A site's word for one ARRIVED, with the linear check of its own envelope.

    Attributes:
        study: study id.
        arrived: digest of the ARRIVED.
        site: the sender.
        check: the two products of the envelope's residues (:func:`secure_fed.protocol.residues.linear_check`).
        mask: the seed of its own mask, of a study with pads; else None.
    """

    arrived: Hex64
    check: tuple[Product, Product]
    mask: Hex64 | None = None

    @property
    def products(self) -> tuple[int, int]:
        """The check as numbers."""
        return int(self.check[0], 16), int(self.check[1], 16)


class VoidHeader(MemberHeader):
    """The word of a site's people that it gives nothing more for a round at a head: neither envelope nor REVEAL.

    Attributes:
        study: study id.
        run, head, round: where; the same round after another head is another matter.
        site: the sender.
        revealed: whether it had revealed, so that the round's sum may be open to somebody.
    """

    run: Hex64
    head: Hex64
    round: Count
    revealed: bool


class RetiredHeader(MemberHeader):
    """A site's word that it trains no more in a run, from the next round on; of its earlier sums, that it does not mind
    who else is in a later one at the same adapter.

    Attributes:
        study: study id.
        run: which.
        site: the sender.
    """

    run: Hex64


def max_header(agreed: AgreedStudy) -> int:
    """Most bytes of a header that has an entry for every site."""
    return HEADER_BASE + HEADER_PER_SITE * agreed.study.max_sites


def place_fields(agreed: AgreedStudy, due: RoundPosition, attempt: int) -> dict[str, object]:
    """The fields of every word that belongs to an attempt."""
    return {
        "version": 2,
        "study": agreed.study.id,
        "run": due.run,
        "head": due.head,
        "key": due.key,
        "amendment": due.amendment,
        "round": due.round,
        "attempt": attempt,
        **payload_fields(b""),
    }


def sign_ready(
    agreed: AgreedStudy, due: RoundPosition, attempt: int, site: str, released: bool, key: Ed25519PrivateKey,
    fresh: str | None = None,
) -> bytes:  # fmt: skip
    """A site's READY, with pads under a fresh key."""
    fields = {"site": site, "released": released, "fresh": fresh}
    header = ReadyHeader.model_validate(place_fields(agreed, due, attempt) | fields)
    return sign_frame(READY_MAGIC, header, key, b"")


def sign_cohort(
    agreed: AgreedStudy, due: RoundPosition, attempt: int, readies: Iterable[SignedWord], key: Ed25519PrivateKey
) -> bytes:
    """The server's COHORT of these READYs, which are in order of names."""
    header = CohortHeader.model_validate(place_fields(agreed, due, attempt) | {"readies": tuple(readies)})
    return sign_frame(COHORT_MAGIC, header, key, b"")


def arrived_header(
    agreed: AgreedStudy, due: RoundPosition, attempt: int, cohort: str, payload: tuple[int, str],
    envelopes: Iterable[SignedWord],
) -> ArrivedHeader:  # fmt: skip
    """The one ARRIVED of an attempt whose sum has this size and digest."""
    return ArrivedHeader.model_validate(
        place_fields(agreed, due, attempt)
        | {"cohort": cohort, "sum_size": payload[0], "sum": payload[1], "envelopes": tuple(envelopes)}
    )


def arrived_digest(header: ArrivedHeader) -> str:
    """What a REVEAL names: SHA-256 of the ARRIVED frame's magic and header, 64 hex digits."""
    return hashlib.sha256(ARRIVED_MAGIC + encode_header(header)).hexdigest()


def products(check: tuple[int, int]) -> tuple[Product, Product]:
    """A linear check as words carry it."""
    first, second = (f"{product:016x}" for product in check)
    return first, second


def reveal_word(agreed: AgreedStudy, arrived: str, site: str, kept: Revealed, mask: str | None = None) -> SignedWord:
    """The REVEAL of a site for an ARRIVED that a record keeps."""
    header = _reveal_header(agreed, arrived, site, kept.products, mask)
    return SignedWord.of(encode_header(header), bytes.fromhex(kept.signature))


def _reveal_header(
    agreed: AgreedStudy, arrived: str, site: str, check: tuple[int, int], mask: str | None
) -> RevealHeader:
    return RevealHeader(
        version=2,
        study=agreed.study.id,
        arrived=arrived,
        site=site,
        check=products(check),
        mask=mask,
        **payload_fields(b""),
    )


def sign_reveal(
    agreed: AgreedStudy, arrived: str, site: str, check: tuple[int, int], key: Ed25519PrivateKey,
    mask: str | None = None,
) -> bytes:  # fmt: skip
    """A site's REVEAL, with pads and the seed of its mask."""
    return sign_frame(REVEAL_MAGIC, _reveal_header(agreed, arrived, site, check, mask), key, b"")


def sign_void(agreed: AgreedStudy, due: RoundPosition, site: str, revealed: bool, key: Ed25519PrivateKey) -> bytes:
    """A site's word for a void of the round that is due."""
    header = VoidHeader(
        version=2, study=agreed.study.id, run=due.run, head=due.head, round=due.round, site=site, revealed=revealed,
        **payload_fields(b""),
    )  # fmt: skip
    return sign_frame(VOID_MAGIC, header, key, b"")


def sign_retired(agreed: AgreedStudy, run: str, site: str, key: Ed25519PrivateKey) -> bytes:
    """A site's word that it trains no more in a run."""
    header = RetiredHeader(version=2, study=agreed.study.id, run=run, site=site, **payload_fields(b""))
    return sign_frame(RETIRED_MAGIC, header, key, b"")


def split_word(magic: bytes, data: bytes) -> SignedWord:
    """A site's word that travels alone, without payload.

    Raises:
        EnvelopeError: malformed.
    """
    frame = split_frame(magic, data, MAX_WORD, EnvelopeError)
    if frame.payload:
        raise EnvelopeError(f"{len(frame.payload)} bytes behind a word that has none")
    return SignedWord.of(frame.header, frame.signature)


def check_ready(
    word: SignedWord, agreed: AgreedStudy, members: Mapping[str, Member], due: RoundPosition, attempt: int
) -> ReadyHeader:
    """Check a READY: signature, a training member's, of this attempt.

    Raises:
        EnvelopeError: with what was found and expected.
    """
    header = verify_member(READY_MAGIC, *word.signed, ReadyHeader, agreed.study.id, members, MAX_WORD, EnvelopeError)
    check_trains(header.site, members)
    check_place(header, due, attempt, f"READY of {header.site}")
    if (header.fresh is None) == agreed.study.pads:
        raise EnvelopeError(
            f"READY of {header.site}: {'no' if agreed.study.pads else 'a'} fresh key, in a study of collusion = "
            f"{agreed.study.colluders}"
        )
    if header.fresh is not None:
        check_fresh_key(header.fresh, header.site)
    return header


def check_reveal(word: SignedWord, agreed: AgreedStudy, members: Mapping[str, Member], arrived: str) -> RevealHeader:
    """Check a REVEAL's signature, and that it is for this ARRIVED; not the check that it carries.

    Raises:
        EnvelopeError: with what was found and expected.
    """
    header = verify_member(REVEAL_MAGIC, *word.signed, RevealHeader, agreed.study.id, members, MAX_WORD, EnvelopeError)
    if header.arrived != arrived:
        raise EnvelopeError(f"REVEAL of {header.site}: for {header.arrived[:16]}, expected {arrived[:16]}")
    if (header.mask is None) == agreed.study.pads:
        raise EnvelopeError(
            f"REVEAL of {header.site}: {'no' if agreed.study.pads else 'a'} mask, in a study of collusion = "
            f"{agreed.study.colluders}"
        )
    return header


def check_void(word: SignedWord, agreed: AgreedStudy, members: Mapping[str, Member], due: RoundPosition) -> VoidHeader:
    """Check a word for a void: signature, a training member's, of this round at this head.

    Raises:
        EnvelopeError: with what was found and expected.
    """
    header = verify_member(VOID_MAGIC, *word.signed, VoidHeader, agreed.study.id, members, MAX_WORD, EnvelopeError)
    check_trains(header.site, members)
    if (header.run, header.head, header.round) != (due.run, due.head, due.round):
        raise EnvelopeError(
            f"void of {header.site}: of round {header.round} after {header.head[:16]}; expected {due.round} after "
            f"{due.head[:16]}"
        )
    return header


def check_retired(word: SignedWord, agreed: AgreedStudy, members: Mapping[str, Member], run: str) -> RetiredHeader:
    """Check a word of a site that it trains no more: signature, a training member's, of this run.

    Raises:
        EnvelopeError: with what was found and expected.
    """
    header = verify_member(
        RETIRED_MAGIC, *word.signed, RetiredHeader, agreed.study.id, members, MAX_WORD, EnvelopeError
    )
    check_trains(header.site, members)
    if header.run != run:
        raise EnvelopeError(f"retirement of {header.site}: from run {header.run[:16]}; expected {run[:16]}")
    return header


def word_head(word: SignedWord) -> str:
    """The head that a word for a void names; nothing of it is checked yet.

    Raises:
        EnvelopeError: malformed.
    """
    return parse_header(word.signed[0], VoidHeader, EnvelopeError).head


def check_cohort(
    data: bytes, agreed: AgreedStudy, members: Mapping[str, Member], due: RoundPosition, quorum: Quorum
) -> tuple[CohortHeader, tuple[str, ...], str]:
    """Check a COHORT as everybody can: the server's signature, each READY, each once, enough of them.

    Returns:
        Its header, the names in it, and its digest.

    Raises:
        ProtocolError: with what was found and expected.
    """
    header, digest = server_frame(data, COHORT_MAGIC, CohortHeader, agreed)
    check_place(header, due, header.attempt, "COHORT", ProtocolError)
    try:
        readies = [check_ready(word, agreed, members, due, header.attempt) for word in header.readies]
        if agreed.study.pads:
            refuse_copied_keys(fresh_keys(readies))
    except EnvelopeError as error:
        raise ProtocolError(f"COHORT: {error}") from None
    names = tuple(ready.site for ready in readies)
    refuse_cohort(names, quorum, "COHORT", ProtocolError)
    return header, names, digest


def releasing(cohort: CohortHeader) -> frozenset[str]:
    """Whose READYs in a COHORT, checked before, carry their people's release."""
    found = (parse_header(word.signed[0], ReadyHeader, ProtocolError) for word in cohort.readies)
    return frozenset(header.site for header in found if header.released)


def fresh_keys(readies: Iterable[ReadyHeader]) -> dict[str, str]:
    """Of sites that are ready, in a study with pads, by name."""
    return {ready.site: ready.fresh for ready in readies if ready.fresh is not None}


def cohort_keys(header: CohortHeader) -> dict[str, str]:
    """The fresh keys in a COHORT that was checked."""
    return fresh_keys(parse_header(word.signed[0], ReadyHeader, ProtocolError) for word in header.readies)


def check_arrived(
    data: bytes, agreed: AgreedStudy, members: Mapping[str, Member], due: RoundPosition
) -> tuple[ArrivedHeader, tuple[EnvelopeHeader, ...], str]:
    """Check an ARRIVED: the server's signature, and that the envelopes are of one attempt of one cohort.

    Returns:
        Its header, the envelopes' headers, and its digest.

    Raises:
        ProtocolError: with what was found and expected.
    """
    header, digest = server_frame(data, ARRIVED_MAGIC, ArrivedHeader, agreed)
    found = check_which_came(header, header.cohort, header.envelopes, "ARRIVED", agreed, members, due)
    return header, found, digest


def check_which_came(
    header: PlacedHeader,
    cohort: str,
    words: Iterable[SignedWord],
    what: str,
    agreed: AgreedStudy,
    members: Mapping[str, Member],
    due: RoundPosition,
) -> tuple[EnvelopeHeader, ...]:
    """The headers of the envelopes that a frame of the server's names: of this position, one attempt, one cohort.

    Args:
        header: the frame's.
        cohort: digest of the attempt's COHORT, as it says.
        words: the envelopes, by name.
        what: the frame's kind, for errors.
        agreed: the study.
        members: by name.
        due: the position that it must be of.

    Raises:
        ProtocolError: with what was found and expected.
    """
    check_place(header, due, header.attempt, what, ProtocolError)
    try:
        found = check_envelopes(words, agreed, members, due)
    except EnvelopeError as error:
        raise ProtocolError(f"{what}: {error}") from None
    if {(entry.attempt, entry.cohort) for entry in found} != {(header.attempt, cohort)}:
        raise ProtocolError(f"{what}: names envelopes of another attempt or cohort than its own; expected one only")
    return found


def check_envelopes(
    words: Iterable[SignedWord], agreed: AgreedStudy, members: Mapping[str, Member], due: RoundPosition
) -> tuple[EnvelopeHeader, ...]:
    """The headers of a cohort's envelopes: signed, of this position, of one attempt and one cohort.

    Raises:
        EnvelopeError: with what was found and expected.
    """
    found = []
    for word in words:
        header = verify_contribution(*word.signed, agreed, members)
        check_position(header, due)
        found.append(header)
    if len({(header.attempt, header.cohort) for header in found}) > 1:
        raise EnvelopeError("the envelopes are of different attempts or cohorts; expected one")
    return tuple(found)


def refuse_cohort(names: tuple[str, ...], quorum: Quorum, what: str, refusal: type[SecfacmicError]) -> None:
    """Refuse a cohort that names a site twice or out of order, or is below the quorum.

    Raises:
        SecfacmicError: of class ``refusal``.
    """
    if list(names) != sorted(set(names)):
        raise refusal(f"{what}: contributors {list(names)}; expected each site once, sorted by name")
    if len(names) < quorum.needed:
        raise refusal(
            f"{what}: {len(names)} contributors; expected at least {quorum.needed} of {quorum.training} that train"
        )


def check_trains(site: str, members: Mapping[str, Member]) -> None:
    """Refuse a word of an observer.

    Raises:
        EnvelopeError: it is one's.
    """
    if members[site].role != "train":
        raise EnvelopeError(f"a word of {site}, an observer, for a round; only training sites take part in one")


def check_place(
    header: PlacedHeader, due: RoundPosition, attempt: int, what: str, refusal: type[SecfacmicError] = EnvelopeError
) -> None:
    """Refuse a word of another attempt, or another place, than the one that is due.

    Raises:
        SecfacmicError: of class ``refusal``: naming every field that differs.
    """
    wrong = [
        f"{field} {getattr(header.position, field)}, expected {getattr(due, field)}"
        for field in ("run", "head", "key", "amendment", "round")
        if getattr(header.position, field) != getattr(due, field)
    ]
    if header.attempt != attempt:
        wrong.append(f"attempt {header.attempt}, expected {attempt}")
    if wrong:
        raise refusal(f"{what}: {'; '.join(wrong)}: not of this round")


def server_frame(data: bytes, magic: bytes, model: type[Placed], agreed: AgreedStudy) -> tuple[Placed, str]:
    """Read a question of the server's; its header and digest.

    Raises:
        ProtocolError: malformed, not its, or of another study.
    """
    frame: Frame = split_frame(magic, data, max_header(agreed), ProtocolError)
    verify_signature(magic, frame.header, frame.signature, agreed.study.coordinator, ProtocolError)
    header = parse_header(frame.header, model, ProtocolError)
    check_payload(frame, header, ProtocolError)
    if header.study != agreed.study.id:
        raise ProtocolError(f"of study {header.study}; expected {agreed.study.id}")
    return header, frame.digest

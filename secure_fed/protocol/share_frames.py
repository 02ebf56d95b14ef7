"""The words of a round with pads besides (:mod:`secure_fed.protocol.round_frames`): so that a dropout costs no update.

Each site deals shares of its mask's seed to the others of its cohort, unless that is just a quorum, when nobody could
do without anybody. With CHECK the server hands everybody the shares that are sealed to it, beside all the envelopes'
headers; each opens them and answers CHECKED, with the names of those whose share does not open to what its maker's
header says. ARRIVED goes out only when all of the cohort have said CHECKED of the same headers without a complaint.
When a site of the cohort is gone after that, or its REVEAL's check is wrong, GONE hands its masked envelope and share
to those who have revealed; each answers WITNESS, one word for the checks of all that it has spoken for in the attempt,
which takes the place of the one before, and hands the share to the server. A quorum of them stand for each who is gone.
A record keeps one word of a site, however many are gone; of those in it who came back, their REVEAL says the same. No
share is ever published, and none is given away by a site that has not revealed.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Final, NamedTuple

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import Field, StringConstraints

from secure_fed.core.errors import EnvelopeError, ProtocolError
from secure_fed.protocol import shares
from secure_fed.protocol.envelope import EnvelopeHeader, Hidden, RoundPosition
from secure_fed.protocol.pads import SEALED_SHARE, SitePads, commitment
from secure_fed.protocol.round_frames import (
    MAX_WORD,
    PlacedHeader,
    Product,
    SignedWord,
    check_place,
    check_which_came,
    place_fields,
    server_frame,
)
from secure_fed.protocol.signing import (
    SIGNATURE_BYTES,
    MemberHeader,
    encode_header,
    payload_fields,
    sign_frame,
    verify_member,
)
from secure_fed.protocol.study import AgreedStudy
from secure_fed.protocol.study_tables import Hex64, Member, Name

CHECK_MAGIC = b"SFS2"
CHECKED_MAGIC = b"SFD2"
GONE_MAGIC = b"SFG2"
WITNESS_MAGIC = b"SFW2"
MOST_COMPLAINTS: Final = 8
"""Names in one CHECKED; one is enough for another attempt."""
ENTRY: Final = SEALED_SHARE + shares.DIGEST_BYTES
"""Bytes of a dealt share: sealed, and the digest of what is in it."""

_SHARE: Final = b"secfacmic share 1"
_CHECKS: Final = b"secfacmic checks 1"


Places = Annotated[str, StringConstraints(pattern=r"^([0-9a-f]{2}){1,512}$")]
"""Some of a cohort, in hex: a bit for each site, that of the first name the lowest, in as few bytes as hold all."""


class Witnessed(NamedTuple):
    """Whose envelope's check a record has by the words of others.

    Attributes:
        site: whose.
        first, second: the two products.
    """

    site: Name
    first: Product
    second: Product

    @property
    def products(self) -> tuple[int, int]:
        """The two as numbers."""
        return int(self.first, 16), int(self.second, 16)


class Witness(NamedTuple):
    """A WITNESS as a record keeps it: the checks in it are the record's.

    Attributes:
        site: whose word.
        gone: for whom.
        signature: over its WITNESS, in hex.
    """

    site: Name
    gone: Places
    signature: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{128}$")]


class CheckHeader(PlacedHeader):
    """Which envelopes came, before their sum is fixed.

    Attributes:
        cohort: digest of the attempt's COHORT.
        envelopes: the cohort's signed envelope headers, by name.
    """

    cohort: Hex64
    envelopes: tuple[SignedWord, ...]


class CheckedHeader(MemberHeader):
    """A site's word that it has a good share of everybody, but for those it names.

    Attributes:
        check: digest of the CHECK.
        complaints: whose share, as its maker dealt it, does not open to what its maker's header says.
    """

    check: Hex64
    complaints: Annotated[tuple[Name, ...], Field(max_length=MOST_COMPLAINTS)]


class GoneHeader(PlacedHeader):
    """Who is gone after the sum was fixed, or sent a wrong check.

    Attributes:
        arrived: digest of the ARRIVED.
        gone: its name.
    """

    arrived: Hex64
    gone: Name


class WitnessHeader(MemberHeader):
    """A site's word for the checks of other ones' envelopes: of all for whom it has spoken in the attempt.

    Attributes:
        arrived: digest of the ARRIVED.
        gone: whose envelopes.
        checks: their checks (:func:`checks_digest`).
    """

    arrived: Hex64
    gone: Places
    checks: Hex64


# Dealing


@dataclass(frozen=True)
class Dealt:
    """What one site dealt.

    Attributes:
        hidden: what its header says of it.
        entries: ENTRY bytes for each other site of the cohort, in order of names; none if nobody gets a share.
    """

    hidden: Hidden
    entries: bytes


def deal(mine: SitePads, seed: bytes, needed: int) -> Dealt:
    """Deal shares of a mask's seed to the others of a cohort.

    Args:
        mine: the site's keys in the attempt.
        seed: 32 bytes.
        needed: how many others can stand for this site: the quorum.
    """
    points = share_points(mine.keys, mine.site)
    committed = commitment(seed, mine.site)
    if len(points) < needed:
        return Dealt(Hidden(committed, bytes(shares.DIGEST_BYTES).hex()), b"")
    made = shares.share(seed, needed, list(points.values()))
    entries = [
        mine.seal_share(share, name) + share_digest(share, mine.site, name)
        for name, share in zip(points, made, strict=True)
    ]
    root, _ = shares.tree([_leaf(entry) for entry in entries])
    return Dealt(Hidden(committed, root.hex()), b"".join(entries))


def share_points(names: Iterable[str], maker: str) -> dict[str, int]:
    """Where the others' shares of a maker's seed are: their places in the cohort, from 1, by name."""
    return {name: place for place, name in enumerate(sorted(names), 1) if name != maker}


def share_digest(share: bytes, maker: str, receiver: str) -> bytes:
    """What a maker's entry says of a share: SHA-256 over a label, both names after their lengths, and it."""
    names = b"".join(len(text).to_bytes(4, "big") + text for text in (maker.encode(), receiver.encode()))
    return hashlib.sha256(_SHARE + names + share).digest()


def hand_out(entries: bytes, root: str, count: int) -> list[bytes]:
    """A maker's entries, each with its path to the root that its header names: what each other site is handed.

    Args:
        entries: of the maker, hostile bytes.
        root: of its header.
        count: how many there are to be: the others of the cohort, or none.

    Raises:
        EnvelopeError: they are not what the header names.
    """
    if len(entries) != count * ENTRY:
        raise EnvelopeError(f"{len(entries)} bytes of shares; expected {count} of {ENTRY} each")
    if not count:
        if root != bytes(shares.DIGEST_BYTES).hex():
            raise EnvelopeError(
                f"its header names shares ({root[:16]}), but the cohort is just a quorum: expected none"
            )
        return []
    dealt = [entries[at : at + ENTRY] for at in range(0, len(entries), ENTRY)]
    found, paths = shares.tree([_leaf(entry) for entry in dealt])
    if found.hex() != root:
        raise EnvelopeError(f"its shares have root {found.hex()[:16]}; its header names {root[:16]}")
    return [entry + b"".join(path) for entry, path in zip(dealt, paths, strict=True)]


def _leaf(entry: bytes) -> bytes:
    return shares.leaf(entry[:SEALED_SHARE], entry[SEALED_SHARE:])


class Handed(NamedTuple):
    """One share as it was handed to its receiver, known to be what its maker signed.

    Attributes:
        sealed: SEALED_SHARE bytes.
        digest: of the share, as its maker says.
    """

    sealed: bytes
    digest: bytes


def take_handed(
    data: bytes, names: Sequence[str], makers: Sequence[str], receiver: str, roots: Mapping[str, str]
) -> tuple[dict[str, Handed], bytes]:
    """Take the shares of some makers that are sealed to one site, one after the other, each with its path.

    Args:
        data: hostile bytes.
        names: of the cohort, in order.
        makers: whose shares, in the order of the bytes.
        receiver: this site.
        roots: of the makers' headers.

    Returns:
        The shares by maker, and the bytes behind them.

    Raises:
        ProtocolError: what was handed is not what a maker signed: the carrier's doing.
    """
    found, count = {}, len(names) - 1
    for maker in makers:
        index = list(share_points(names, maker)).index(receiver)
        length = ENTRY + shares.path_length(index, count) * shares.DIGEST_BYTES
        entry, data = data[:length], data[length:]
        path = [entry[at : at + shares.DIGEST_BYTES] for at in range(ENTRY, len(entry), shares.DIGEST_BYTES)]
        whole = len(entry) == length
        if not whole or shares.root_by_path(_leaf(entry[:ENTRY]), index, count, path).hex() != roots[maker]:
            raise ProtocolError(
                f"the share of {maker} was handed on otherwise than it signed it; expected the same bytes"
            )
        found[maker] = Handed(entry[:SEALED_SHARE], entry[SEALED_SHARE:ENTRY])
    return found, data


def open_handed(mine: SitePads, maker: str, handed: Handed) -> bytes:
    """The share that a maker dealt to this site.

    Raises:
        EnvelopeError: it does not open, or not to what its maker says: its maker's doing.
    """
    share = mine.open_share(handed.sealed, maker)
    if not hmac.compare_digest(share_digest(share, maker, mine.site), handed.digest):
        raise EnvelopeError(f"the share of {maker} is not the one that it names")
    return share


# Words


def sign_check(
    agreed: AgreedStudy, due: RoundPosition, attempt: int, cohort: str, envelopes: Iterable[SignedWord],
    key: Ed25519PrivateKey,
) -> bytes:  # fmt: skip
    """The server's CHECK of these envelopes."""
    header = CheckHeader.model_validate(
        place_fields(agreed, due, attempt) | {"cohort": cohort, "envelopes": tuple(envelopes)}
    )
    return sign_frame(CHECK_MAGIC, header, key, b"")


def check_digest(
    agreed: AgreedStudy, due: RoundPosition, attempt: int, cohort: str, envelopes: Iterable[SignedWord]
) -> str:
    """What a CHECKED of these envelopes names."""
    header = CheckHeader.model_validate(
        place_fields(agreed, due, attempt) | {"cohort": cohort, "envelopes": tuple(envelopes)}
    )
    return hashlib.sha256(CHECK_MAGIC + encode_header(header)).hexdigest()


def check_check(
    data: bytes, agreed: AgreedStudy, members: Mapping[str, Member], due: RoundPosition
) -> tuple[CheckHeader, tuple[EnvelopeHeader, ...], str]:
    """Check a CHECK: the server's signature, and that the envelopes are of one attempt of one cohort.

    Returns:
        Its header, the envelopes' headers, and its digest.

    Raises:
        ProtocolError: with what was found and expected.
    """
    header, digest = server_frame(data, CHECK_MAGIC, CheckHeader, agreed)
    found = check_which_came(header, header.cohort, header.envelopes, "CHECK", agreed, members, due)
    return header, found, digest


def _checked_header(agreed: AgreedStudy, check: str, site: str, complaints: Iterable[str]) -> CheckedHeader:
    return CheckedHeader(
        version=2, study=agreed.study.id, check=check, site=site,
        complaints=tuple(complaints)[:MOST_COMPLAINTS], **payload_fields(b""),
    )  # fmt: skip


def sign_checked(
    agreed: AgreedStudy, check: str, site: str, complaints: Iterable[str], key: Ed25519PrivateKey
) -> bytes:
    """A site's CHECKED."""
    return sign_frame(CHECKED_MAGIC, _checked_header(agreed, check, site, complaints), key, b"")


def check_checked(word: SignedWord, agreed: AgreedStudy, members: Mapping[str, Member], check: str) -> CheckedHeader:
    """Check a CHECKED's signature, and that it is of this CHECK.

    Raises:
        EnvelopeError: with what was found and expected.
    """
    header = verify_member(
        CHECKED_MAGIC, *word.signed, CheckedHeader, agreed.study.id, members, MAX_WORD, EnvelopeError
    )
    if header.check != check:
        raise EnvelopeError(f"CHECKED of {header.site}: of {header.check[:16]}, expected {check[:16]}")
    return header


def refuse_unchecked(
    signatures: bytes, agreed: AgreedStudy, members: Mapping[str, Member], check: str, names: Sequence[str]
) -> None:
    """Refuse an ARRIVED before everybody has a share of everybody.

    Args:
        signatures: of each one's CHECKED without complaints, in order of names; hostile bytes.
        agreed: the study.
        members: by name.
        check: digest of the CHECK of ARRIVED's envelopes.
        names: of the cohort.

    Raises:
        ProtocolError: one is missing.
    """
    if len(signatures) != len(names) * SIGNATURE_BYTES:
        raise ProtocolError(f"{len(signatures)} bytes of signatures with an ARRIVED; expected a CHECKED of each of "
                            f"{', '.join(names)}")  # fmt: skip
    for place, name in enumerate(names):
        text = encode_header(_checked_header(agreed, check, name, ()))
        signature = signatures[place * SIGNATURE_BYTES : (place + 1) * SIGNATURE_BYTES]
        try:
            check_checked(SignedWord.of(text, signature), agreed, members, check)
        except (EnvelopeError, InvalidSignature):
            raise ProtocolError(
                f"ARRIVED without a CHECKED of {name} over its envelopes; expected one of all"
            ) from None


def sign_gone(
    agreed: AgreedStudy, due: RoundPosition, attempt: int, arrived: str, gone: str, key: Ed25519PrivateKey
) -> bytes:
    """The server's GONE."""
    header = GoneHeader.model_validate(place_fields(agreed, due, attempt) | {"arrived": arrived, "gone": gone})
    return sign_frame(GONE_MAGIC, header, key, b"")


def check_gone(data: bytes, agreed: AgreedStudy, due: RoundPosition) -> GoneHeader:
    """Check a GONE's signature and place.

    Raises:
        ProtocolError: with what was found and expected.
    """
    header, _ = server_frame(data, GONE_MAGIC, GoneHeader, agreed)
    check_place(header, due, header.attempt, "GONE", ProtocolError)
    return header


def places(names: Sequence[str], chosen: Iterable[str]) -> str:
    """Which of a cohort these are.

    Args:
        names: of the cohort, in order.
        chosen: some of them.
    """
    bits = sum(1 << names.index(name) for name in set(chosen))
    return bits.to_bytes((len(names) + 7) // 8, "big").hex()


def at_places(text: str, names: Sequence[str]) -> tuple[str, ...]:
    """Whom of a cohort a word names, in order.

    Raises:
        EnvelopeError: nobody, or places that the cohort does not have.
    """
    bits = int(text, 16)
    found = tuple(name for place, name in enumerate(names) if bits >> place & 1)
    if not found or places(names, found) != text:
        raise EnvelopeError(f"places {text}; expected some of {len(names)}, in {(len(names) + 7) // 8} bytes")
    return found


def checks_digest(checks: Iterable[tuple[int, int]]) -> str:
    """What a WITNESS says of checks, in order of their sites' names: SHA-256 over a label and each one's two products,
    8 bytes each, big-endian."""
    said = b"".join(product.to_bytes(8, "big") for check in checks for product in check)
    return hashlib.sha256(_CHECKS + said).hexdigest()


def _witness_header(
    agreed: AgreedStudy, arrived: str, site: str, names: Sequence[str], checks: Mapping[str, tuple[int, int]]
) -> WitnessHeader:
    return WitnessHeader(
        version=2,
        study=agreed.study.id,
        arrived=arrived,
        site=site,
        gone=places(names, checks),
        checks=checks_digest(checks[name] for name in sorted(checks)),
        **payload_fields(b""),
    )


def sign_witness(
    agreed: AgreedStudy, arrived: str, site: str, names: Sequence[str], checks: Mapping[str, tuple[int, int]],
    key: Ed25519PrivateKey,
) -> bytes:  # fmt: skip
    """A site's WITNESS for the envelopes of some of a cohort.

    Args:
        agreed: the study.
        arrived: digest of the ARRIVED.
        site: whose word.
        names: of the cohort, in order.
        checks: of whom it speaks for, by name.
        key: the site's.
    """
    return sign_frame(WITNESS_MAGIC, _witness_header(agreed, arrived, site, names, checks), key, b"")


def check_witness(word: SignedWord, agreed: AgreedStudy, members: Mapping[str, Member], arrived: str) -> WitnessHeader:
    """Check a WITNESS's signature, and that it is for this ARRIVED; not the checks that it carries.

    Raises:
        EnvelopeError: with what was found and expected.
    """
    header = verify_member(
        WITNESS_MAGIC, *word.signed, WitnessHeader, agreed.study.id, members, MAX_WORD, EnvelopeError
    )
    if header.arrived != arrived:
        raise EnvelopeError(f"WITNESS of {header.site}: for {header.arrived[:16]}, expected {arrived[:16]}")
    return header


def check_witnesses(
    words: Sequence[Witness],
    agreed: AgreedStudy,
    members: Mapping[str, Member],
    arrived: str,
    checks: Mapping[str, tuple[int, int]],
    gone: Collection[str],
    needed: int,
) -> None:
    """Check that a quorum of those who revealed stand for the check of each who is gone.

    Args:
        words: as the record has them.
        agreed: the study.
        members: by name.
        arrived: digest of the ARRIVED.
        checks: the record's, of all of the cohort, in order of names.
        gone: whose checks are not by their own words.
        needed: the quorum.

    Raises:
        EnvelopeError: too few for one, a site twice or for itself, or one that has not revealed.
    """
    names = [word.site for word in words]
    if names != sorted(set(names) & checks.keys() - set(gone)):
        raise EnvelopeError(f"witnesses {', '.join(names)}; expected such as revealed, each once, sorted by name")
    speakers = dict.fromkeys(gone, 0)
    for word in words:
        spoken = at_places(word.gone, list(checks))
        if word.site in spoken or speakers.keys().isdisjoint(spoken):
            raise EnvelopeError(f"WITNESS of {word.site} for {', '.join(spoken)}; expected others, some of them gone")
        header = _witness_header(agreed, arrived, word.site, list(checks), {name: checks[name] for name in spoken})
        check_witness(SignedWord(encode_header(header).hex(), word.signature), agreed, members, arrived)
        for name in speakers.keys() & set(spoken):
            speakers[name] += 1
    few = sorted(name for name, count in speakers.items() if count < needed)
    if few:
        raise EnvelopeError(
            f"the checks of {', '.join(few)} have fewer witnesses than a quorum; expected {needed} each"
        )

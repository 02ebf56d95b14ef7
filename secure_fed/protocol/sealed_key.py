"""Sealed key files and checkpoints, as far as everybody can check them: no key opens anything here.

A sealed key file holds a study's CKKS secret and MAC key, sealed to its members and signed by the key maker. One with
a predecessor is an *amendment*: it may name sites that join or leave, or another certificate authority, and takes force
when the coordinator appends it to the journal. Members then *acknowledge* it, and the key maker adds a checkpoint for
those who come later.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from secure_fed.core.errors import KeyFileError, RecordError
from secure_fed.protocol.quorum import refuse_quorum
from secure_fed.protocol.signing import (
    ZERO_DIGEST,
    Count,
    MemberHeader,
    SignedHeader,
    check_payload,
    parse_header,
    split_frame,
    verify_member,
    verify_signature,
)
from secure_fed.protocol.study import AgreedStudy, Study
from secure_fed.protocol.study_tables import Hex64, Member, Name

KEY_MAGIC = b"SFK2"
MAX_KEY_HEADER = 512 * 1024
MAX_SEALED = 16 * 2**20
ACKNOWLEDGEMENT_MAGIC = b"SFC2"
MAX_ACKNOWLEDGEMENT_HEADER = 1024

Members = dict[str, Member]


class SealedKeyHeader(SignedHeader):
    """What a sealed key file says in clear.

    Attributes:
        study: study id; a file for another study is refused.
        epoch: from 1, one more at each new key; a site refuses one below what it holds.
        previous: id of the key before; zeros for the first key and for that of a new run.
        key: key id, a keyed digest of the secret itself.
        maker: the site that made and signed it.
        recipients: the members it is sealed to, after joining and leaving.
        added, removed: sites that join and leave with it.
        created_ms: the key maker's clock, milliseconds since 1970; for information.
        rounds: of a key that replaces another in a run, how many rounds were closed when it was made, and how many the
            run has; what whoever joins with it is told.
        authority: SHA-256 of the certificate (DER) of the authority that sites trust alone from the amendment on; the
            one so far if None.
    """

    version: Literal[2]
    study: Hex64
    epoch: Annotated[int, Field(ge=1, lt=2**53)]
    previous: Hex64
    key: Hex64
    maker: Name
    recipients: tuple[Name, ...]
    added: tuple[Member, ...]
    removed: tuple[Name, ...]
    created_ms: Count
    rounds: tuple[Count, Count] | None = None
    authority: Hex64 | None = None


class AcknowledgementHeader(MemberHeader):
    """A member's word that it has applied an amendment.

    Attributes:
        study, run: ids.
        head: the amendment's record id.
        site: the member.
        checkpoint: keyed digest of the adapter it holds there; the server lacks the key.
    """

    run: Hex64
    head: Hex64
    checkpoint: Hex64


EXACT = (
    "exact: this study's sums are statistics of patients without noise. The difference of two over other sites is, to "
    "the last digit, what those counted that are in one alone: patients by class, their means and covariance."
)
"""What people are told before statistics may be summed anew, in the words of a warning."""


def exact_warning(study: Study, header: SealedKeyHeader) -> str | None:
    """What a change of members discloses where sites without a budget send statistics; None if nothing.

    An amendment lets a round that was given up begin anew with other sites, while its sum may have been opened already.

    Args:
        study: whose sums they are.
        header: of the amendment's sealed key.
    """
    changed = [f"{member.name} joins" for member in header.added] + [f"{name} leaves" for name in header.removed]
    if not study.method.sums or not changed:
        return None
    return (
        f"{EXACT} {', '.join(changed)}: where one may have been opened before, the people of all sites must agree to a "
        "second one, each by secfacmic site release at its own site"
    )


def read_sealed_file(path: Path, agreed: AgreedStudy) -> tuple[SealedKeyHeader, bytes]:
    """A sealed key file, checked as by :func:`check_sealed_key`: what it says, and its bytes.

    Raises:
        KeyFileError: with the file, what was found and expected.
    """
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_SEALED + 1)
    except OSError as error:
        raise KeyFileError(f"{path}: cannot be read ({error.strerror}); expected a sealed key file") from error
    try:
        return check_sealed_key(data, agreed), data
    except KeyFileError as error:
        raise KeyFileError(f"{path}: {error}") from error


def check_sealed_key(data: bytes, agreed: AgreedStudy) -> SealedKeyHeader:
    """Check a sealed key file as far as everybody can: form, study and the key maker's signature.

    Raises:
        KeyFileError: with what was found and expected.
    """
    if len(data) > MAX_SEALED:
        raise KeyFileError(f"sealed key: {len(data)} bytes; expected at most {MAX_SEALED}")
    frame = split_frame(KEY_MAGIC, data, MAX_KEY_HEADER, KeyFileError)
    maker = agreed.study.site(agreed.study.key_maker)
    verify_signature(KEY_MAGIC, frame.header, frame.signature, maker.keys.signing, KeyFileError)
    header = parse_header(frame.header, SealedKeyHeader, KeyFileError)
    if header.maker != maker.name:
        raise KeyFileError(f"sealed key: made by {header.maker}; expected the study's key maker {maker.name}")
    if header.study != agreed.study.id:
        raise KeyFileError(f"sealed key: for study {header.study}; expected {agreed.study.id}")
    check_payload(frame, header, KeyFileError)
    return header


def members_after(
    members: Mapping[str, Member], added: tuple[Member, ...], removed: tuple[str, ...], agreed: AgreedStudy
) -> Members:
    """The members once some have joined and left.

    Raises:
        KeyFileError: nobody of that name, a name or key twice, a name that the study lists otherwise, the key maker
            leaves, or too few or too many train.
    """
    study = agreed.study
    listed = {site.name: site for site in study.sites}
    strangers = sorted(set(removed) - set(members))
    if strangers:
        raise KeyFileError(f"{', '.join(strangers)} cannot leave: not among the members {', '.join(sorted(members))}")
    if study.key_maker in removed:
        raise KeyFileError(f"{study.key_maker} cannot leave: it makes the keys; begin a new study without it")
    after = {name: site for name, site in members.items() if name not in removed}
    for site in added:
        if site.name in members:
            raise KeyFileError(f"{site.name} cannot join: a member has that name already")
        known = listed.get(site.name, site)
        if site != known:  # it goes by what the study says of it: an observer's budget pays for nothing, say
            raise KeyFileError(
                f"{site.name} cannot join to {_as(site)}: the study lists it to {_as(known)}; expected it as it is "
                "listed, or under another name and identity"
            )
        own = set(site.keys.model_dump().values())
        if any(own & set(other.keys.model_dump().values()) for other in after.values()):
            raise KeyFileError(f"{site.name} cannot join: it has a key that a member has already")
        after[site.name] = site
    training = sum(site.role == "train" for site in after.values())
    if not study.min_sites <= training <= study.max_sites:
        raise KeyFileError(
            f"{training} training sites would be left; expected {study.min_sites} to {study.max_sites} of this study"
        )
    if study.mode == "he":
        refuse_quorum(training, study.faulty, study.min_sites, KeyFileError)
    return after


def _as(site: Member) -> str:
    does = "train" if site.role == "train" else "observe"
    return f"{does} with weight {site.weight:g} and signing key {site.keys.signing[:16]}"


def check_amendment(
    data: bytes, agreed: AgreedStudy, members: Mapping[str, Member], key: str
) -> tuple[SealedKeyHeader, Members]:
    """Check a sealed key file as the amendment that follows a key, and the members after it.

    Raises:
        KeyFileError: with what was found and expected.
    """
    header = check_sealed_key(data, agreed)
    if header.previous != key:
        raise KeyFileError(f"sealed key: follows key {header.previous[:16]}; the key in force is {key[:16]}")
    if header.key in (key, ZERO_DIGEST):
        raise KeyFileError(f"sealed key: brings key {header.key[:16]}, which is in force or none; expected a new one")
    after = members_after(members, header.added, header.removed, agreed)
    if header.recipients != tuple(sorted(after)):
        raise KeyFileError(
            f"sealed key: sealed to {', '.join(header.recipients)}; the members would be {', '.join(sorted(after))}"
        )
    return header, after


def verify_acknowledgement(
    text: bytes, signature: bytes, agreed: AgreedStudy, members: Mapping[str, Member], run: str, head: str
) -> AcknowledgementHeader:
    """Read a signed acknowledgement header and check sender, run and head.

    Raises:
        RecordError: with what was found and expected.
    """
    header = verify_member(
        ACKNOWLEDGEMENT_MAGIC,
        text,
        signature,
        AcknowledgementHeader,
        agreed.study.id,
        members,
        MAX_ACKNOWLEDGEMENT_HEADER,
        RecordError,
    )
    if (header.run, header.head) != (run, head):
        raise RecordError(f"acknowledgement of {header.site}: of another run or amendment")
    return header

"""What a member says of itself before the first round: that it is there and ready. It has no word for not being so.

The server asks with the run and the key that it begins with. A site that has read its data, opened its ledger and
loaded its backbone answers; one that cannot does not connect, and why is its people's matter: a reason, or a no, would
be a message about its patients.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, NamedTuple

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import StringConstraints

from secure_fed.core.errors import EnvelopeError
from secure_fed.protocol.round_frames import MAX_WORD, split_word
from secure_fed.protocol.signing import Count, MemberHeader, payload_fields, sign_frame, verify_member
from secure_fed.protocol.study import AgreedStudy
from secure_fed.protocol.study_tables import Hex64, Member

QUESTION_MAGIC = b"SFL2"
PRESENCE_MAGIC = b"SFN2"


class PresenceQuestion(NamedTuple):
    """What is asked: whether a site is there for a run that begins with a key; both 64 hex digits."""

    run: str
    key: str

    def to_bytes(self) -> bytes:
        """As it travels."""
        return QUESTION_MAGIC + bytes.fromhex(self.run) + bytes.fromhex(self.key)

    @classmethod
    def from_bytes(cls, data: bytes) -> PresenceQuestion | None:
        """The question in these bytes; None if they are another one."""
        if len(data) != 68 or data[:4] != QUESTION_MAGIC:
            return None
        return cls(data[4:36].hex(), data[36:].hex())


class PresenceHeader(MemberHeader):
    """A site's word that it is there.

    Attributes:
        study: study id.
        run: that it was asked about.
        site: the sender.
        purpose: ``ready`` to take part; or a ``rehearsal``, after which it leaves.
        accepted: SHA-256 of its newest signed acceptance, which its people can compare; zeros in a rehearsal.
        keyed: whether it holds the run's key.
        secfacmic: its version.
        clock_ms: its clock when it said so, milliseconds since 1970.
        rate: bytes a second that its line took up just now, all waiting included.
        rehearsed: SHA-256 of what it sent in a rehearsal, and would like to fetch; else empty.
        rehearsed_bytes: how many these are.
    """

    run: Hex64
    purpose: Literal["ready", "rehearsal"]
    accepted: Hex64
    keyed: bool
    secfacmic: Annotated[str, StringConstraints(pattern=r"^[0-9A-Za-z.+-]{1,40}$")]
    clock_ms: Count
    rate: Count
    rehearsed: Hex64 | Literal[""]
    rehearsed_bytes: Count


def sign_presence(agreed: AgreedStudy, site: str, key: Ed25519PrivateKey, **facts: object) -> bytes:
    """A site's word.

    Args:
        agreed: the study.
        site: the sender.
        key: its signing key.
        facts: the header's other fields.
    """
    fields = {"version": 2, "study": agreed.study.id, "site": site, **facts, **payload_fields(b"")}
    return sign_frame(PRESENCE_MAGIC, PresenceHeader.model_validate(fields), key, b"")


def check_presence(data: bytes, agreed: AgreedStudy, members: Mapping[str, Member], run: str) -> PresenceHeader:
    """Check a word: a member's signature, and the run.

    Raises:
        EnvelopeError: with what was found and expected.
    """
    word = split_word(PRESENCE_MAGIC, data)
    header = verify_member(
        PRESENCE_MAGIC, *word.signed, PresenceHeader, agreed.study.id, members, MAX_WORD, EnvelopeError
    )
    if header.run != run:
        raise EnvelopeError(f"presence of {header.site}: for run {header.run[:16]}, expected {run[:16]}")
    return header

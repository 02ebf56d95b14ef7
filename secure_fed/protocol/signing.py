"""Signed frames, the one outer form of envelopes, journal records and sealed key files, and the keys that sign.

``magic (4) | header length (4, big-endian) | header | Ed25519 signature (64) | payload``. The signature covers magic
and exact header bytes, and the header carries the payload's size and SHA-256. Hostile bytes are checked cheapest
first, and nothing is parsed beyond the header before the signature holds.

A header is its fields' values in the order of its model, as one array of deterministic CBOR (RFC 8949, 4.2.1): short,
since hundreds of them travel in a record. Hex text of at least eight bytes travels as bytes; whatever reads back to
the same values but is not the one encoding of them is refused. Fields at the end that have a default and hold it are
left out: so a header of a study that has no use for them has no bytes of them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypedDict, TypeVar

import cbor2
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import Field, ValidationError

from secure_fed.core.errors import KeyFileError, SecfacmicError
from secure_fed.core.storage import write_durable
from secure_fed.core.tomlfile import FileModel
from secure_fed.protocol.study_tables import Hex64, Member, Name

PRIVATE = 0o600
"""Mode of every file that holds a private key."""

SIGNATURE_BYTES = 64
ZERO_DIGEST = "0" * 64
"""Stands where a digest is due and there is nothing to digest: no key, no ledger, no predecessor."""

Count = Annotated[int, Field(ge=0, lt=2**53)]


class SignedHeader(FileModel):
    """What every header has: the payload's size in bytes and its SHA-256."""

    size: Count
    payload: Hex64


class MemberHeader(SignedHeader):
    """What the header of every site's word has besides: the study's id, and the sender's name."""

    version: Literal[2]
    study: Hex64
    site: Name


Header = TypeVar("Header", bound=SignedHeader)
SiteHeader = TypeVar("SiteHeader", bound="MemberHeader")

_HEX: Final = re.compile(r"([0-9a-f]{2}){8,}")
_MOST_DEPTH: Final = 8

_KEPT_WORDS: Final = 1024
_KEPT_BYTES: Final = 1024
# Of a round each word of a site comes up to four times: by itself, in the questions to all, and in the record. What was
# found of so many of the last short ones is kept: it follows from their bytes alone.


@dataclass(frozen=True)
class Frame:
    """A frame taken apart, not yet verified."""

    magic: bytes
    header: bytes
    signature: bytes
    payload: memoryview

    @property
    def digest(self) -> str:
        """SHA-256 of magic and header (which binds the payload), as 64 hex digits."""
        return hashlib.sha256(self.magic + self.header).hexdigest()


class PayloadFields(TypedDict):
    """The header fields that bind a payload."""

    size: int
    payload: str


def payload_fields(payload: bytes) -> PayloadFields:
    """The header fields that bind this payload."""
    return {"size": len(payload), "payload": hashlib.sha256(payload).hexdigest()}


def sign_frame(magic: bytes, header: SignedHeader, key: Ed25519PrivateKey, payload: bytes) -> bytes:
    """Build a signed frame around a payload."""
    text = encode_header(header)
    return b"".join([magic, len(text).to_bytes(4, "big"), text, key.sign(magic + text), payload])


def split_frame(magic: bytes, data: bytes, max_header: int, refusal: type[SecfacmicError]) -> Frame:
    """Take a frame apart, reading no more than its declared and bounded sizes.

    Raises:
        SecfacmicError: of class ``refusal``: wrong magic, truncated, or a header beyond ``max_header`` bytes.
    """
    if data[:4] != magic:
        raise refusal(f"starts with {bytes(data[:4])!r}; expected {magic!r}: not this kind of file, or another version")
    length = int.from_bytes(data[4:8], "big")
    if len(data) < 8 or length > max_header:
        raise refusal(f"declares a header of {length} bytes; expected at most {max_header}")
    start = 8 + length + SIGNATURE_BYTES
    if len(data) < start:
        raise refusal(f"{len(data)} bytes, but its header needs {start}: truncated")
    return Frame(magic, bytes(data[8 : 8 + length]), bytes(data[8 + length : start]), memoryview(data)[start:])


def encode_header(header: SignedHeader) -> bytes:
    """A header's one encoding."""
    fields = header.model_dump(mode="json")
    names = list(type(header).model_fields)
    while getattr(header, names[-1]) == type(header).model_fields[names[-1]].default:
        names.pop()
    return cbor2.dumps([_hex_to_bytes(fields[name]) for name in names], canonical=True)


def parse_header(text: bytes, model: type[Header], refusal: type[SecfacmicError]) -> Header:
    """Read a header that must be in its one encoding.

    Raises:
        SecfacmicError: of class ``refusal``.
    """
    try:
        fields = _decode(text, list(model.model_fields), sum(one.is_required() for one in model.model_fields.values()))
        header = model.model_validate_json(json.dumps(fields, allow_nan=False))
        # Against the parsed header: an array may say the same in other bytes.
        if encode_header(header) != text:
            raise refusal("its header is not in its one encoding")
    except ValidationError as error:
        wrong = ", ".join(sorted({".".join(map(str, entry["loc"])) for entry in error.errors()}))
        raise refusal(f"its header does not fit this version of its format (wrong: {wrong})") from None
    except (ValueError, TypeError, RecursionError):
        raise refusal("its header is not one array of CBOR with the fields of this version") from None
    return header


_parse_once: Callable[..., Any] = lru_cache(_KEPT_WORDS)(parse_header)


def _decode(text: bytes, names: list[str], least: int) -> dict[str, Any]:
    try:
        values = cbor2.loads(
            text,
            max_depth=_MOST_DEPTH,
            allow_indefinite=False,
            allow_duplicate_keys=False,
            strict_hashable_types=True,
        )
    except Exception as error:  # hostile bytes, and decoders of tags that no header has
        raise ValueError(type(error).__name__) from None
    if not isinstance(values, list) or not least <= len(values) <= len(names):
        raise ValueError("another number of fields")
    return dict(zip(names, map(_bytes_to_hex, values), strict=False))


def _hex_to_bytes(value: Any) -> Any:
    if isinstance(value, str) and _HEX.fullmatch(value):
        return bytes.fromhex(value)
    if isinstance(value, list):
        return [_hex_to_bytes(entry) for entry in value]
    if isinstance(value, dict):
        return {key: _hex_to_bytes(entry) for key, entry in value.items()}
    return value


def _bytes_to_hex(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, list):
        return [_bytes_to_hex(entry) for entry in value]
    if isinstance(value, dict):
        return {key: _bytes_to_hex(entry) for key, entry in value.items()}
    return value


def verify_signature(magic: bytes, header: bytes, signature: bytes, key: str, refusal: type[SecfacmicError]) -> None:
    """Check the signature over the exact header bytes under a pinned public key (64 hex digits).

    Raises:
        SecfacmicError: of class ``refusal``.
    """
    verify = _verify if len(header) > _KEPT_BYTES else _verify_once
    try:
        verify(magic, header, signature, key)
    except (InvalidSignature, ValueError):
        raise refusal("its signature is not by the key that the study names") from None


def _verify(magic: bytes, header: bytes, signature: bytes, key: str) -> None:
    Ed25519PublicKey.from_public_bytes(bytes.fromhex(key)).verify(signature, magic + header)


_verify_once = lru_cache(_KEPT_WORDS)(_verify)  # only what holds is kept: what does not is raised


def verify_member(
    magic: bytes,
    text: bytes,
    signature: bytes,
    model: type[SiteHeader],
    study: str,
    members: Mapping[str, Member],
    most: int,
    refusal: type[SecfacmicError],
) -> SiteHeader:
    """Read a header that a member signed, on its own or inside another frame: the one check of every site's word.

    Args:
        magic: of its kind.
        text: hostile bytes, as signed.
        signature: 64 bytes.
        model: of the kind; has ``study`` and ``site``.
        study: the study's id.
        members: by name.
        most: bytes that the header may have.
        refusal: class of what is raised.

    Raises:
        SecfacmicError: of class ``refusal``.
    """
    what = model.__name__.removesuffix("Header").lower()
    if len(text) > most:
        raise refusal(f"{what} header: {len(text)} bytes; expected at most {most}")
    read = parse_header if len(text) > _KEPT_BYTES else _parse_once
    header: SiteHeader = read(text, model, refusal)
    member = members.get(header.site)
    if member is None:
        raise refusal(f"{what} of {header.site!r}, which is no site of the study")
    verify_signature(magic, text, signature, member.keys.signing, refusal)
    if header.study != study:
        raise refusal(f"{what} of {header.site}: for study {header.study}, expected {study}")
    return header


def check_payload(frame: Frame, header: SignedHeader, refusal: type[SecfacmicError]) -> None:
    """Check that the payload is the one that the signed header binds.

    Raises:
        SecfacmicError: of class ``refusal``.
    """
    if len(frame.payload) != header.size:
        raise refusal(f"its payload has {len(frame.payload)} bytes; its header says {header.size}")
    if hashlib.sha256(frame.payload).hexdigest() != header.payload:
        raise refusal("its payload is not the one that its header names")


def create_signing_key(path: Path) -> Ed25519PrivateKey:
    """Make an Ed25519 key in a file of mode 0600.

    Raises:
        KeyFileError: the file exists.
    """
    if os.path.lexists(path):  # a link counts though nothing is behind it now, as where a stick is not plugged in
        raise KeyFileError(f"{path}: exists; keys are never overwritten: choose another place")
    key = Ed25519PrivateKey.generate()
    text = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    write_durable(path, text, PRIVATE)
    return key


def load_signing_key(path: Path) -> Ed25519PrivateKey:
    """Read an Ed25519 key.

    Raises:
        KeyFileError: missing, malformed or readable by others.
    """
    try:
        key = serialization.load_pem_private_key(read_private(path), password=None)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise KeyFileError(f"{path}: malformed; restore it from a backup") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise KeyFileError(f"{path}: not an Ed25519 key; restore it from a backup")
    return key


def public_hex(key: Ed25519PrivateKey) -> str:
    """The public half, 32 bytes in hex."""
    return key.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw).hex()


def read_private(path: Path) -> bytes:
    """Read a private file, unless others can read it too.

    Raises:
        KeyFileError: missing, or its mode is looser than 0600.
    """
    try:
        with path.open("rb") as stream:
            mode = stat.S_IMODE(os.fstat(stream.fileno()).st_mode)
            if mode & 0o077:
                raise KeyFileError(f"{path}: mode {mode:04o}, so others can read it; expected 0600: chmod 600 {path}")
            return stream.read()
    except OSError as error:
        raise KeyFileError(f"{path}: cannot be read ({error.strerror}); expected a private key there") from error

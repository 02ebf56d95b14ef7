"""Keys: a site's identity, the coordinator's signing key, and the study's sealed key.

Private keys are made where they are used and never leave their folder. The study's CKKS secret and tag key are
made at the site that the study names as key maker and sealed (age, X25519) to every site; the sealed file is
signed, because age names no sender: an unsigned one would let the server seal a key of its own to the sites.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pyrage
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import Field, StringConstraints

from privacy.ckks import StudySecret
from secure_fed.errors import KeyFileError
from secure_fed.signed import (
    PRIVATE,
    SignedHeader,
    check_payload,
    create_signing_key,
    load_signing_key,
    parse_header,
    payload_fields,
    public_hex,
    read_private,
    sign_frame,
    split_frame,
    verify_signature,
)
from secure_fed.storage import make_folder, write_durable
from secure_fed.study import AgreedStudy, Hex64, Name, SiteKeys, canonical_json
from secure_fed.tomlfile import FileModel, parse_table

MAGIC = b"SFK1"
MAX_HEADER = 512 * 1024
MAX_SEALED = 16 * 2**20

_PEM = serialization.Encoding.PEM
_BARE = serialization.NoEncryption()


class PublicIdentity(FileModel):
    """A site's public file, ``NAME.pub``: what it mails to the coordinator. Signed by its own signing key."""

    format: Literal[1]
    name: Name
    keys: SiteKeys
    signature: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{128}$")]


@dataclass(frozen=True)
class Identity:
    """A site's private keys, in memory.

    Attributes:
        name: the site.
        signing: signs its envelopes.
        recipient: opens what is sealed to it.
        keys: the public halves.
    """

    name: str
    signing: Ed25519PrivateKey
    recipient: pyrage.x25519.Identity
    keys: SiteKeys

    def __repr__(self) -> str:
        return f"Identity({self.name!r})"

    @property
    def public(self) -> PublicIdentity:
        """The public file's content."""
        signature = self.signing.sign(_public_message(self.name, self.keys)).hex()
        return PublicIdentity(format=1, name=self.name, keys=self.keys, signature=signature)


def create_identity(folder: Path, name: str) -> Identity:
    """Make a site's keys in a folder of its own (0700; files 0600), and its public file beside them.

    Raises:
        KeyFileError: the folder already holds an identity.
    """
    if (folder / "signing.key").exists():
        raise KeyFileError(f"{folder}: holds an identity already; keys are never overwritten: choose another folder")
    make_folder(folder, 0o700)
    os.chmod(folder, 0o700)
    flower = ec.generate_private_key(ec.SECP384R1())
    openssh = serialization.PrivateFormat.OpenSSH
    write_durable(folder / "flower.key", flower.private_bytes(_PEM, openssh, _BARE), PRIVATE)
    write_durable(folder / "recipient.key", f"{pyrage.x25519.Identity.generate()}\n".encode(), PRIVATE)
    create_signing_key(folder / "signing.key")  # last: its presence marks the identity as whole
    identity = load_identity(folder, name)
    public = json.dumps(identity.public.model_dump(mode="json"), indent=2) + "\n"
    write_durable(folder / f"{name}.pub", public.encode())
    return identity


def load_identity(folder: Path, name: str) -> Identity:
    """Read a site's private keys.

    Raises:
        KeyFileError: a file is missing, malformed or readable by others.
    """
    signing = load_signing_key(folder / "signing.key")
    try:
        flower = serialization.load_ssh_private_key(read_private(folder / "flower.key"), password=None)
        recipient = pyrage.x25519.Identity.from_str(read_private(folder / "recipient.key").decode("ascii").strip())
    except (ValueError, UnsupportedAlgorithm, pyrage.IdentityError) as error:
        raise KeyFileError(f"{folder}: flower.key or recipient.key is malformed; restore the folder") from error
    openssh = flower.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    keys = SiteKeys(signing=public_hex(signing), flower=openssh.decode("ascii"), recipient=str(recipient.to_public()))
    return Identity(name, signing, recipient, keys)


def read_public_identity(path: Path) -> PublicIdentity:
    """Read a site's public file and check that its owner made it.

    Raises:
        KeyFileError: malformed, or not signed by its own key.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise KeyFileError(f"{path}: cannot be read as a site's public file ({error})") from error
    if not isinstance(content, dict):
        raise KeyFileError(f"{path}: not a site's public file; expected a JSON object")
    public = parse_table(content, PublicIdentity, KeyFileError, str(path))
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(public.keys.signing)).verify(
            bytes.fromhex(public.signature), _public_message(public.name, public.keys)
        )
    except (InvalidSignature, ValueError):
        raise KeyFileError(f"{path}: not signed by its own signing key; ask the site for its file again") from None
    return public


class SealedKeyHeader(SignedHeader):
    """What a sealed key file says in clear.

    Attributes:
        study: study id; a file for another study is refused.
        epoch: from 1, one more at each new key; a site refuses one below what it holds.
        previous: id of the key before, zeros for the first.
        key: key id, a keyed digest of the secret itself.
        maker: the site that made and signed it.
        recipients: the sites it is sealed to.
    """

    version: Literal[1]
    study: Hex64
    epoch: Annotated[int, Field(ge=1, lt=2**53)]
    previous: Hex64
    key: Hex64
    maker: Name
    recipients: tuple[Name, ...]


def create_sealed_key(agreed: AgreedStudy, maker: Identity, epoch: int, previous: str) -> bytes:
    """Make a new CKKS secret and tag key for a study and seal them to all its sites.

    Args:
        agreed: the study.
        maker: identity of the site that the study names as key maker.
        epoch: one more than the last key's.
        previous: id of the last key; zeros for none.

    Returns:
        The sealed key file, which may travel over the server.

    Raises:
        KeyFileError: ``maker`` is not the study's key maker.
    """
    study = agreed.study
    member = study.site(study.key_maker)
    if member.keys != maker.keys:
        raise KeyFileError(f"{maker.name} is not the study's key maker; make the key at {study.key_maker}")
    secret = StudySecret.generate()
    recipients = [pyrage.x25519.Recipient.from_str(site.keys.recipient) for site in study.sites if site.keys]
    sealed = pyrage.encrypt(secret.to_bytes(), recipients)
    header = SealedKeyHeader(
        version=1,
        study=study.id,
        epoch=epoch,
        previous=previous,
        key=_key_id(secret, study.id, epoch),
        maker=study.key_maker,
        recipients=tuple(site.name for site in study.sites),
        **payload_fields(sealed),
    )
    return sign_frame(MAGIC, header, maker.signing, sealed)


def check_sealed_key(data: bytes, agreed: AgreedStudy) -> SealedKeyHeader:
    """Check a sealed key file as far as everybody can: form, study and the key maker's signature.

    Raises:
        KeyFileError: with what was found and expected.
    """
    if len(data) > MAX_SEALED:
        raise KeyFileError(f"sealed key: {len(data)} bytes; expected at most {MAX_SEALED}")
    frame = split_frame(MAGIC, data, MAX_HEADER, KeyFileError)
    header = parse_header(frame.header, SealedKeyHeader, KeyFileError)
    maker = agreed.study.site(agreed.study.key_maker)
    assert maker.keys is not None  # load_study refuses sites without keys
    verify_signature(MAGIC, frame.header, frame.signature, maker.keys.signing, KeyFileError)
    if header.maker != maker.name:
        raise KeyFileError(f"sealed key: made by {header.maker}; expected the study's key maker {maker.name}")
    if header.study != agreed.study.id:
        raise KeyFileError(f"sealed key: for study {header.study}; expected {agreed.study.id}")
    check_payload(frame, header, KeyFileError)
    return header


def open_sealed_key(data: bytes, agreed: AgreedStudy, identity: Identity) -> StudySecret:
    """Check a sealed key file and open it at a site.

    Raises:
        KeyFileError: as :func:`check_sealed_key`; or the site is no recipient, or the secret is not the one named.
    """
    header = check_sealed_key(data, agreed)
    payload = bytes(split_frame(MAGIC, data, MAX_HEADER, KeyFileError).payload)
    try:
        plain = pyrage.decrypt(payload, [identity.recipient])
    except pyrage.DecryptError as error:
        raise KeyFileError(
            f"sealed key: not sealed to {identity.name}; its recipients are {', '.join(header.recipients)}"
        ) from error
    secret = StudySecret.from_bytes(plain)
    if not hmac.compare_digest(_key_id(secret, header.study, header.epoch), header.key):
        raise KeyFileError("sealed key: what it holds is not the key it names; ask the key maker for a new one")
    return secret


def attestation_key(secret: StudySecret) -> bytes:
    """Key under which sites attest their adapter to one another; the server lacks it."""
    return hmac.new(secret.tag_key, b"secfacmic attestation key 1", hashlib.sha256).digest()


def _key_id(secret: StudySecret, study: str, epoch: int) -> str:
    message = f"secfacmic key id 1\n{study}\n{epoch}\n".encode() + hashlib.sha256(secret.secret_key).digest()
    return hmac.new(secret.tag_key, message, hashlib.sha256).hexdigest()


def _public_message(name: str, keys: SiteKeys) -> bytes:
    return b"secfacmic public identity 1\n" + canonical_json({"name": name, "keys": keys.model_dump(mode="json")})

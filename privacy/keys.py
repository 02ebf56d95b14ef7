"""Keys: a site's identity, the coordinator's signing key, and the study's sealed key.

Private keys are made where they are used and never leave their folder. The study's CKKS secret and MAC key are
made at the site that the study names as key maker and sealed (age, X25519) to every site; the sealed file is
signed, because age names no sender: an unsigned one would let the server seal a key of its own to the sites.
"""

from __future__ import annotations

import getpass
import hashlib
import hmac
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeGuard

import pyrage
from cryptography.exceptions import InvalidSignature, InvalidTag, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from pydantic import StringConstraints

from secure_fed.core.canonical import canonical_json
from secure_fed.core.errors import KeyFileError
from secure_fed.core.storage import make_folder, refuse_foreign, write_durable
from secure_fed.core.tomlfile import FileModel, parse_table
from secure_fed.privacy.ckks import StudySecret
from secure_fed.protocol.sealed_key import KEY_MAGIC, MAX_KEY_HEADER, SealedKeyHeader, check_sealed_key, members_after
from secure_fed.protocol.signing import (
    PRIVATE,
    ZERO_DIGEST,
    payload_fields,
    public_hex,
    read_private,
    sign_frame,
    split_frame,
)
from secure_fed.protocol.study import AgreedStudy
from secure_fed.protocol.study_tables import Member, Name, SiteKeys

_LOCKED = b"age-encryption.org/"
_NONCE_BYTES = 12


class PublicIdentity(FileModel):
    """A site's public file, ``NAME.pub``: what it mails to the coordinator. Signed by its own signing key."""

    format: Literal[1]
    name: Name
    keys: SiteKeys
    signature: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{128}$")]


class _Named(FileModel):
    name: Name


@dataclass(frozen=True)
class Identity:
    """A site's private keys, in memory.

    Attributes:
        name: the site.
        signing: signs its envelopes.
        flower: opens its connection.
        recipient: opens what is sealed to it.
        keys: the public halves.
    """

    name: str
    signing: Ed25519PrivateKey
    flower: ec.EllipticCurvePrivateKey
    recipient: pyrage.x25519.Identity
    keys: SiteKeys

    def __repr__(self) -> str:
        return f"Identity({self.name!r})"

    @property
    def public(self) -> PublicIdentity:
        """The public file's content."""
        signature = self.signing.sign(_public_message(self.name, self.keys)).hex()
        return PublicIdentity(format=1, name=self.name, keys=self.keys, signature=signature)


_HEADS = (b"-----BEGIN OPENSSH PRIVATE KEY-----", b"AGE-SECRET-KEY-1", b"age-encryption.org/")
"""How files of connection and recipient keys begin; the last with a passphrase."""


def create_identity(folder: Path, name: str, passphrase: str = "") -> Identity:
    """Make a site's keys in a folder of its own (0700; files 0600), and its public file beside them.

    What was made once stays: keys that are there are the site's, and of them only the public file is made if it is
    missing, as after a call that was killed.

    Args:
        folder: where the private keys stay.
        name: the site's name in the study.
        passphrase: encrypts the private keys; empty for none, or to be asked for where there are keys that have one.

    Raises:
        KeyFileError: no site can have this name, or the folder holds what is left of an identity, or keys that are
            another site's or not encrypted as asked; nothing is made.
        OutputError: a file of a key's name is no such key; nothing is made.
    """
    parse_table({"name": name}, _Named, KeyFileError, "the site")  # before keys that the right name would find there
    if (folder / "signing.key").exists():  # written last of the keys
        return _kept(folder, name, passphrase)
    if (folder / f"{name}.pub").exists():  # written last, so that no call that was killed left it
        raise KeyFileError(
            f"{folder}: holds {name}.pub and no signing.key: an identity that has lost it; keys are never overwritten: "
            "restore it from a copy, or choose another folder"
        )
    for key in ("flower.key", "recipient.key"):  # what a killed call left is nobody's, and made anew
        if (folder / key).exists():
            refuse_foreign(folder / key, lambda head: head.startswith(_HEADS))
    make_folder(folder, 0o700)
    os.chmod(folder, 0o700)
    pem, openssh = serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH
    pkcs8, bare = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    texts = {
        "flower": ec.generate_private_key(ec.SECP256R1()).private_bytes(pem, openssh, bare),
        "recipient": f"{pyrage.x25519.Identity.generate()}\n".encode(),
        "signing": Ed25519PrivateKey.generate().private_bytes(pem, pkcs8, bare),
    }
    for kind, text in texts.items():
        locked = pyrage.passphrase.encrypt(text, passphrase) if passphrase else text
        write_durable(folder / f"{kind}.key", locked, PRIVATE)
    return _with_public_file(folder, load_identity(folder, name, lambda: passphrase))


def _kept(folder: Path, name: str, passphrase: str) -> Identity:
    if passphrase and not read_private(folder / "signing.key").startswith(_LOCKED):
        raise KeyFileError(
            f"{folder}: holds keys without a passphrase, and keys are never overwritten; expected none with "
            "--passphrase: choose another folder, or leave it out"
        )
    identity = load_identity(folder, name, (lambda: passphrase) if passphrase else None)
    for path in sorted(folder.glob("*.pub")):
        found = _public_in(path)
        if found is None or found.keys.signing != identity.keys.signing:
            if path.stem == name:
                raise KeyFileError(
                    f"{path}: is not of the keys beside it; expected the public file of these: choose another folder, "
                    "or remove it and give the same command again"
                )
        elif found.name != name:
            raise KeyFileError(
                f"{folder}: holds the keys of site {found.name}, and keys are never overwritten; expected those of "
                f"{name}, or none: choose another folder"
            )
    return _with_public_file(folder, identity)


def _public_in(path: Path) -> PublicIdentity | None:
    try:
        return read_public_identity(path)
    except KeyFileError:
        return None


def _with_public_file(folder: Path, identity: Identity) -> Identity:
    path = folder / f"{identity.name}.pub"
    if not path.exists():
        public = json.dumps(identity.public.model_dump(mode="json"), indent=2) + "\n"
        write_durable(path, public.encode())
    return identity


def load_identity(folder: Path, name: str, ask: Callable[[], str] | None = None) -> Identity:
    """Read a site's private keys.

    Args:
        folder: where they lie.
        name: the site's name in the study.
        ask: gives the passphrase, if the keys have one; by default the variable ``SECFACMIC_PASSPHRASE``, else a
            question at the terminal.

    Raises:
        KeyFileError: a file is missing, malformed or readable by others, or the passphrase is wrong.
    """
    texts = {kind: read_private(folder / f"{kind}.key") for kind in ("signing", "flower", "recipient")}
    passphrase = (ask or _ask_passphrase)() if texts["signing"].startswith(_LOCKED) else None
    try:
        if passphrase is not None:
            texts = {kind: pyrage.passphrase.decrypt(text, passphrase) for kind, text in texts.items()}
        signing = serialization.load_pem_private_key(texts["signing"], password=None)
        flower = serialization.load_ssh_private_key(texts["flower"], password=None)
        recipient = pyrage.x25519.Identity.from_str(texts["recipient"].decode("ascii").strip())
    except (ValueError, TypeError, UnsupportedAlgorithm, pyrage.IdentityError, pyrage.DecryptError) as error:
        reason = "malformed" if passphrase is None else "malformed, or the passphrase is wrong"
        raise KeyFileError(f"{folder}: its keys are {reason}; try again, or restore the folder") from error
    if not isinstance(signing, Ed25519PrivateKey) or not _opens_connections(flower):
        raise KeyFileError(f"{folder}: malformed: keys of another kind; restore the folder")
    openssh = flower.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    keys = SiteKeys(signing=public_hex(signing), flower=openssh.decode("ascii"), recipient=str(recipient.to_public()))
    return Identity(name, signing, flower, recipient, keys)


def _opens_connections(key: object) -> TypeGuard[ec.EllipticCurvePrivateKey]:
    # P-384, which costs a server five times as much a request, is of identities made before.
    return isinstance(key, ec.EllipticCurvePrivateKey) and isinstance(key.curve, ec.SECP256R1 | ec.SECP384R1)


def _ask_passphrase() -> str:
    found = os.environ.get("SECFACMIC_PASSPHRASE")
    if found is not None:
        return found
    if not sys.stdin.isatty():
        raise KeyFileError("the site's keys have a passphrase; set SECFACMIC_PASSPHRASE, or start at a terminal")
    return getpass.getpass("passphrase of the site's keys: ")


def read_public_identity(path: Path) -> PublicIdentity:
    """Read a site's public file and check that its owner made it.

    Raises:
        KeyFileError: malformed, or not signed by its own key.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
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


def create_sealed_key(
    agreed: AgreedStudy,
    maker: Identity,
    epoch: int,
    previous: str = ZERO_DIGEST,
    members: Mapping[str, Member] | None = None,
    added: tuple[Member, ...] = (),
    removed: tuple[str, ...] = (),
    rounds: tuple[int, int] | None = None,
    authority: str | None = None,
) -> bytes:
    """Make a new CKKS secret and MAC key for a study and seal them to all its members.

    Args:
        agreed: the study.
        maker: identity of the site that the study names as key maker.
        epoch: one more than the last key's.
        previous: id of the key that this one replaces in a run; zeros for a new run's key.
        members: the members so far, if amendments have changed the study's.
        added: sites that join with the new key.
        removed: sites that leave with it, and can open nothing later.
        rounds: rounds of the run that are closed, and all that it has, for whoever joins.
        authority: SHA-256 of the certificate of the authority that sites trust from then on, if it changes.

    Returns:
        The sealed key file, which may travel over the server.

    Raises:
        KeyFileError: ``maker`` is not the study's key maker, or the members cannot change so.
    """
    study = agreed.study
    member = study.site(study.key_maker)
    if member.keys != maker.keys:
        raise KeyFileError(f"{maker.name} is not the study's key maker; make the key at {study.key_maker}")
    before = {site.name: site for site in study.sites} if members is None else members
    after = members_after(before, added, removed, agreed)
    secret = StudySecret.generate(agreed.lanes.modulus_bits)
    recipients = [pyrage.x25519.Recipient.from_str(site.keys.recipient) for site in after.values()]
    sealed = pyrage.encrypt(secret.to_bytes(), recipients)
    header = SealedKeyHeader(
        version=2,
        study=study.id,
        epoch=epoch,
        previous=previous,
        key=_key_id(secret, study.id, epoch),
        maker=study.key_maker,
        recipients=tuple(sorted(after)),
        added=added,
        removed=removed,
        created_ms=time.time_ns() // 1_000_000,
        rounds=rounds,
        authority=authority,
        **payload_fields(sealed),
    )
    return sign_frame(KEY_MAGIC, header, maker.signing, sealed)


def open_sealed_key(data: bytes, agreed: AgreedStudy, identity: Identity) -> StudySecret:
    """Check a sealed key file and open it at a site.

    Raises:
        KeyFileError: as :func:`check_sealed_key`; or the site is no recipient, or the secret is not the one named
            or for another prime.
    """
    header = check_sealed_key(data, agreed)
    payload = bytes(split_frame(KEY_MAGIC, data, MAX_KEY_HEADER, KeyFileError).payload)
    # age takes time quadratic in the lines of its header: two a recipient, and a few of chaff.
    lines, most = payload.partition(b"\n---")[0].count(b"\n"), 4 * len(header.recipients) + 64
    if lines > most:
        raise KeyFileError(f"sealed key: a header of {lines} lines; expected at most {most}; ask the key maker again")
    try:
        plain = pyrage.decrypt(payload, [identity.recipient])
    except pyrage.DecryptError as error:
        raise KeyFileError(
            f"sealed key: not sealed to {identity.name}; its recipients are {', '.join(header.recipients)}"
        ) from error
    secret = StudySecret.from_bytes(plain)
    if not hmac.compare_digest(_key_id(secret, header.study, header.epoch), header.key):
        raise KeyFileError("sealed key: what it holds is not the key it names; ask the key maker for a new one")
    secret.require_prime(agreed.lanes)  # now, not at sealing, when a budget would be spent already
    return secret


def attestation_key(secret: StudySecret) -> bytes:
    """Key under which sites attest their adapter to one another; the server lacks it."""
    return hmac.new(secret.mac_key, b"secfacmic attestation key 1", hashlib.sha256).digest()


def seal_checkpoint(secret: StudySecret, head: str, adapter: bytes) -> bytes:
    """Encrypt an adapter for members that come later (ChaCha20-Poly1305 under a key of the study's secret).

    Args:
        secret: of the key in force.
        head: the journal head that the adapter belongs to; bound to the ciphertext.
        adapter: safetensors bytes.
    """
    nonce = os.urandom(_NONCE_BYTES)
    return nonce + ChaCha20Poly1305(_checkpoint_key(secret)).encrypt(nonce, adapter, head.encode())


def open_checkpoint(secret: StudySecret, head: str, sealed: bytes) -> bytes:
    """Undo :func:`seal_checkpoint`.

    Raises:
        KeyFileError: not sealed under this secret for this head, or damaged.
    """
    try:
        return ChaCha20Poly1305(_checkpoint_key(secret)).decrypt(
            sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], head.encode()
        )
    except (InvalidTag, ValueError):
        raise KeyFileError("the checkpoint does not open under this key; ask the key maker to rotate again") from None


def _checkpoint_key(secret: StudySecret) -> bytes:
    return hmac.new(secret.mac_key, b"secfacmic checkpoint key 1", hashlib.sha256).digest()


def _key_id(secret: StudySecret, study: str, epoch: int) -> str:
    message = f"secfacmic key id 1\n{study}\n{epoch}\n".encode() + hashlib.sha256(secret.secret_key).digest()
    return hmac.new(secret.mac_key, message, hashlib.sha256).hexdigest()


def _public_message(name: str, keys: SiteKeys) -> bytes:
    return b"secfacmic public identity 1\n" + canonical_json({"name": name, "keys": keys.model_dump(mode="json")})

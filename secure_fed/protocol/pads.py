"""Pads: what hides one site's envelope from everybody, also from who holds the study's key, and cancels in the sum.

Each two sites of a cohort share a pad, which the first in order of names adds to its residues and the other subtracts;
each adds a mask of its own besides, which it gives away with its REVEAL. So an envelope is uniform modulo Q to all who
lack one of its pads, and the sum of the whole cohort, without the masks, is that of the ciphertexts. A pad hangs on
keys that are made for one attempt of one round, and on everything that says which: another cohort, round or attempt has
others. Everything here is exact and the same on every computer (``tests/vectors``).
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Final

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from secure_fed.core.errors import EnvelopeError
from secure_fed.protocol.envelope import RoundPosition
from secure_fed.protocol.residues import DEGREE, Residues, SumOfStreams, add_into, expand
from secure_fed.protocol.shares import SHARE_BYTES

KEY_BYTES: Final = 32
"""Length of a private or public key and of a mask's seed."""
SEALED_SHARE: Final = SHARE_BYTES + 16
"""Length of a sealed share."""

_LENGTH: Final = struct.Struct(">I")
_FIELD: Final = 2**255 - 19
_PAIR: Final = b"secfacmic pair 1"
_MASK: Final = b"secfacmic mask 1"
_COMMITMENT: Final = b"secfacmic mask commitment 1"
_BLOCK: Final = 16 * DEGREE


@dataclass(frozen=True)
class PadPlace:
    """The one attempt that pads are for.

    Attributes:
        study: the study's id.
        position: run, head, key, amendment and round.
        attempt: its number.
        cohort: digest of its COHORT, which names everybody's READY and with it their fresh keys.
    """

    study: str
    position: RoundPosition
    attempt: int
    cohort: str

    @cached_property
    def fields(self) -> tuple[bytes, ...]:
        """What every key and stream of the attempt hangs on."""
        at = self.position
        numbers = (str(at.amendment), str(at.round), str(self.attempt))
        return tuple(text.encode() for text in (self.study, at.run, at.head, at.key, *numbers, self.cohort))


def new_private() -> bytes:
    """A fresh private key, 32 bytes from the operating system."""
    return X25519PrivateKey.generate().private_bytes_raw()


def public_of(private: bytes) -> str:
    """The public half of a private key, 64 hex digits."""
    key = X25519PrivateKey.from_private_bytes(private).public_key()
    return key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw).hex()


def check_fresh_key(public: str, site: str) -> None:
    """Refuse a public key that hides nothing: a point of small order, or one in other bytes than its own.

    With a point of small order everybody computes the pair's secret. A coordinate not below 2^255 - 19, or with its
    highest bit set, is another one's in disguise (RFC 7748, 5), and would pass for a key of its own.

    Args:
        public: 64 hex digits.
        site: whose it is said to be.

    Raises:
        EnvelopeError: it is one.
    """
    data = bytes.fromhex(public)
    what = f"the fresh key of {site}, {public[:16]},"
    if int.from_bytes(data, "little") >= _FIELD:
        raise EnvelopeError(f"{what} is not in its one encoding; expected a coordinate below 2^255 - 19")
    try:
        _multiple(public)
    except ValueError:
        raise EnvelopeError(f"{what} is of small order; expected a key that was drawn") from None


def refuse_copied_keys(keys: Mapping[str, str]) -> None:
    """Refuse two sites of a cohort with one fresh key, also in disguise: as its sum with a point of small order, which
    has the same secret with everybody.

    Args:
        keys: that :func:`check_fresh_key` takes, by site.

    Raises:
        EnvelopeError: naming them.
    """
    seen: dict[bytes, str] = {}
    for site, key in keys.items():
        other = seen.setdefault(_multiple(key), site)
        if other != site:
            raise EnvelopeError(f"{other} and {site} sent the same fresh key, {key[:16]}; expected one of each its own")


@lru_cache(maxsize=4096)
def _multiple(public: str) -> bytes:
    """What one clamped scalar makes of a public key: the same of keys that have the same secrets, whatever the scalar.

    Raises:
        ValueError: the key is of small order, for one clamped scalar as for all.
    """
    scalar = X25519PrivateKey.from_private_bytes(bytes(KEY_BYTES))
    return scalar.exchange(X25519PublicKey.from_public_bytes(bytes.fromhex(public)))


@dataclass(frozen=True)
class SitePads:
    """What one site can compute in one attempt: its pads, and the keys under which its shares travel.

    Args:
        place: the attempt.
        keys: the fresh public key of each member of the cohort, 64 hex digits, by name.
        site: its name, in the cohort.
        private: the private half of its fresh key.

    Raises:
        EnvelopeError: the private key is not that of the key in the cohort.
    """

    place: PadPlace
    keys: Mapping[str, str]
    site: str
    private: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if self.keys.get(self.site) != public_of(self.private):
            raise EnvelopeError(f"the cohort has another fresh key for {self.site} than this site's own")

    @cached_property
    def _secrets(self) -> dict[str, bytes]:
        own = X25519PrivateKey.from_private_bytes(self.private)
        others = {name: key for name, key in self.keys.items() if name != self.site}
        try:
            return {
                name: own.exchange(X25519PublicKey.from_public_bytes(bytes.fromhex(key)))
                for name, key in others.items()
            }
        except ValueError:
            raise EnvelopeError("a fresh key of the cohort is of small order") from None

    def pad_key(self, other: str) -> bytes:
        """The key of the pad that this site and another share, 32 bytes."""
        return pair_key(self._secrets[other], self.place, b"pad", *sorted((self.site, other)))

    def masked(self, residues: Residues, seed: bytes, modulus: int) -> Residues:
        """Residues with every pad and the site's own mask; uniform to who lacks one of them.

        Args:
            residues: of the ciphertext, uint64 of shape (n,), each below Q.
            seed: of the site's mask, 32 bytes that were drawn for this attempt.
            modulus: Q.

        Returns:
            The same shape. The sum of those of the whole cohort, less its masks, is the sum of the ciphertexts.
        """
        after, before = self._pad_keys()
        return _moved(residues, [mask_key(seed, self.place, self.site), *after], before, modulus)

    def unmasked(self, residues: Residues, seed: bytes, modulus: int) -> Residues:
        """Undo :meth:`masked`."""
        after, before = self._pad_keys()
        return _moved(residues, before, [mask_key(seed, self.place, self.site), *after], modulus)

    def _pad_keys(self) -> tuple[list[bytes], list[bytes]]:
        """Of the pads with those behind this site in order of names, and with those before it."""
        others = [name for name in self.keys if name != self.site]
        after = [self.pad_key(name) for name in others if self.site < name]
        return after, [self.pad_key(name) for name in others if name < self.site]

    def seal_share(self, share: bytes, receiver: str) -> bytes:
        """A share for another site: 48 bytes that only it and this one can open."""
        key = pair_key(self._secrets[receiver], self.place, b"share", self.site, receiver)
        return ChaCha20Poly1305(key).encrypt(bytes(12), share, None)  # the key is for this one message

    def open_share(self, sealed: bytes, maker: str) -> bytes:
        """The share that another site sealed to this one.

        Raises:
            EnvelopeError: it is not of that pair, that attempt and that direction.
        """
        key = pair_key(self._secrets[maker], self.place, b"share", maker, self.site)
        try:
            return ChaCha20Poly1305(key).decrypt(bytes(12), sealed, None)
        except InvalidTag:
            raise EnvelopeError(f"the share of {maker} does not open to {self.site}") from None


def pair_key(secret: bytes, place: PadPlace, purpose: bytes, first: str, second: str) -> bytes:
    """What two sites use for one purpose in one attempt: HKDF-SHA256 of their X25519 secret, without salt.

    Args:
        secret: 32 bytes, from X25519.
        place: the attempt.
        purpose: ``pad``, with the names in order, or ``share``, from the first to the second.
        first, second: the sites' names.

    Returns:
        32 bytes.
    """
    info = _joined(_PAIR, purpose, first.encode(), second.encode(), *place.fields)
    return HKDF(SHA256(), KEY_BYTES, None, info).derive(secret)


def mask_key(seed: bytes, place: PadPlace, site: str) -> bytes:
    """The key of a site's own mask: SHA-256 over a label, its seed, the site and the attempt; 32 bytes.

    By the site's name, so that a seed that somebody copies hits nobody.
    """
    return hashlib.sha256(_joined(_MASK, seed, site.encode(), *place.fields)).digest()


def pad(key: bytes, count: int, modulus: int) -> Residues:
    """A pad or a mask: ``count`` residues, exactly uniform modulo Q, expanded from :meth:`SitePads.pad_key` or
    :func:`mask_key`. Words of Q's bits of ChaCha20's stream, without those that are not below Q."""
    return expand(key, count, modulus)


def commitment(seed: bytes, site: str) -> str:
    """What a site's header says of its mask's seed: SHA-256 over a label, the site and it, 64 hex digits."""
    return hashlib.sha256(_joined(_COMMITMENT, site.encode(), seed)).hexdigest()


def without_masks(total: Residues, place: PadPlace, seeds: Mapping[str, bytes], modulus: int) -> Residues:
    """The sum of a cohort's envelopes without their masks: that of its ciphertexts.

    Args:
        total: uint64 of shape (n,), each below Q.
        place: the attempt.
        seeds: of everybody's mask, by name.
        modulus: Q.
    """
    return _moved(total, [], [mask_key(seed, place, site) for site, seed in seeds.items()], modulus)


def _moved(residues: Residues, added: list[bytes], taken: list[bytes], modulus: int) -> Residues:
    """Residues with the streams of some keys added, and of others subtracted."""
    moved = residues.copy()
    plus, minus = SumOfStreams(added, modulus), SumOfStreams(taken, modulus)
    for first in range(0, moved.size, _BLOCK):
        part = moved[first : first + _BLOCK]
        add_into(part, plus.take(part.size), modulus)
        _subtract(part, minus.take(part.size), modulus)
    return moved


def _subtract(total: Residues, residues: Residues, modulus: int) -> None:
    """Subtract in place, modulo Q; spoils ``residues``."""
    np.subtract(np.uint64(modulus), residues, out=residues)
    add_into(total, residues, modulus)  # also where a residue is Q now


def _joined(*fields: bytes) -> bytes:
    return b"".join(_LENGTH.pack(len(text)) + text for text in fields)

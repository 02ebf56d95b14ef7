"""SEAL's byte format, as far as secfacmic depends on it (SEAL 4.3).

A seeded ciphertext is saved by SEAL as (little-endian)::

    16  header: magic 0xA15E, header size 16, major, minor, compression, 2 reserved, total size (8)
    32  parms_id              1  NTT flag (1)          8  polynomials (2)
     8  degree                8  data primes (1)       8  scale (double)
     8  correction factor (1: CKKS does not use it)
    16  header of the word array                       8  number of words (one polynomial)
    8N  the first polynomial's coefficients
    16  header of the generator                        1  generator type (1: Blake2xb)
    64  seed of the second polynomial

The header's size counts itself. With a compressed header all behind it is one zstd frame.
SEAL saves and loads by path only: every path given to it here is that of an anonymous memory file,
so that no secret and no ciphertext is ever a file on a disk.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
import zstandard

from secure_fed.core.errors import SealFormatError
from secure_fed.protocol.packing import DEGREE, SEED_BYTES, Coefficients

SEAL_VERSION: Final = (4, 3)
"""Version (major, minor) of the SEAL whose format this module knows."""

_HEADER: Final = struct.Struct("<HBBBBHQ")
_FIELDS: Final = struct.Struct("<4QBQQQdQ")
_COUNT: Final = struct.Struct("<Q")
_MAGIC: Final = 0xA15E
_PLAIN: Final = 0
_ZSTD: Final = 2
_BLAKE2XB: Final = 1
_POLYNOMIALS: Final = 2
_DATA_PRIMES: Final = 1
_WORD_BYTES: Final = 8 * DEGREE
_POLYNOMIAL_AT: Final = _FIELDS.size + _HEADER.size + _COUNT.size
_BODY_BYTES: Final = _POLYNOMIAL_AT + _WORD_BYTES + _HEADER.size + 1 + SEED_BYTES


class Savable(Protocol):
    """A SEAL object that saves itself to a path."""

    def save(self, path: str, /) -> None:
        """Write the object to a path."""
        ...


class Loadable(Protocol):
    """A SEAL object that loads itself, checked against a context, from a path."""

    def load(self, context: Any, path: str, /) -> None:
        """Read the object from a path."""
        ...


def save(thing: Savable) -> bytes:
    """Return SEAL's serialisation of a ciphertext or key, through memory only.

    Raises:
        SealFormatError: the bytes are not of the known SEAL version.
    """
    with _memory_file() as (descriptor, path):
        thing.save(path)
        data = os.pread(descriptor, os.fstat(descriptor).st_size, 0)
    _check_header(data)
    return data


def load(thing: Loadable, context: Any, data: bytes) -> None:
    """Let SEAL read bytes into a ciphertext or key, through memory only.

    Args:
        thing: an empty SEAL object, filled in place.
        context: the SEALContext against which SEAL checks what it reads.
        data: SEAL's serialisation.

    Raises:
        SealFormatError: not of the known SEAL version, cut, prolonged, or refused by SEAL.
    """
    _check_header(data)
    with _memory_file() as (descriptor, path):
        written = os.pwrite(descriptor, data, 0)
        if written != len(data):
            raise SealFormatError(f"{written} of {len(data)} bytes held; free memory and try again")
        try:
            thing.load(context, path)
        except (RuntimeError, ValueError) as error:
            # SEAL's text says nothing of the content; it stays out because the content may be secret.
            raise SealFormatError(
                f"SEAL refused {len(data)} bytes ({type(error).__name__}); expected an object of this "
                "study's parameters; the bytes were damaged or belong to another study"
            ) from None


@dataclass(frozen=True, slots=True)
class SeededForm:
    """Seeded CKKS ciphertexts of one set of parameters, all of whose fields but two are fixed.

    Attributes:
        parms_id: SEAL's digest of the parameters, four words.
        scale: the CKKS scale.
    """

    parms_id: tuple[int, int, int, int]
    scale: float

    def build(self, seed: bytes, polynomial: Coefficients) -> bytes:
        """Return SEAL's uncompressed serialisation of (polynomial, expansion of seed).

        Args:
            seed: SEED_BYTES bytes.
            polynomial: uint64 of shape (DEGREE,), NTT form, each below the modulus.
        """
        body = self._before() + polynomial.astype("<u8").tobytes() + _generator() + seed
        return _header(_PLAIN, len(body)) + body

    def split(self, saved: bytes) -> tuple[bytes, Coefficients]:
        """Take the seed and the first polynomial out of a seeded ciphertext that SEAL saved.

        Returns:
            The seed (SEED_BYTES bytes) and uint64 of shape (DEGREE,).

        Raises:
            SealFormatError: other version, sizes or fields than the known ones.
        """
        body = _body(saved)
        if body[:_POLYNOMIAL_AT] != self._before() or body[-1 - SEED_BYTES - _HEADER.size : -SEED_BYTES] != (
            _generator()
        ):
            raise SealFormatError(
                f"a seeded ciphertext with other fields than SEAL {_version(SEAL_VERSION)} writes for this "
                "study; install the tenseal version that secfacmic names"
            )
        return body[-SEED_BYTES:], np.frombuffer(body, "<u8", DEGREE, _POLYNOMIAL_AT)

    def _before(self) -> bytes:
        fields = _FIELDS.pack(*self.parms_id, 1, _POLYNOMIALS, DEGREE, _DATA_PRIMES, self.scale, 1)
        return fields + _header(_PLAIN, _COUNT.size + _WORD_BYTES) + _COUNT.pack(DEGREE)


def _generator() -> bytes:
    return _header(_PLAIN, 1 + SEED_BYTES) + bytes([_BLAKE2XB])


def _header(compression: int, body_bytes: int) -> bytes:
    return _HEADER.pack(_MAGIC, _HEADER.size, *SEAL_VERSION, compression, 0, _HEADER.size + body_bytes)


def _version(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


def _check_header(data: bytes) -> int:
    """Check magic, version and length; return the compression."""
    if len(data) < _HEADER.size:
        raise SealFormatError(f"{len(data)} bytes; expected SEAL's header of {_HEADER.size} and more")
    magic, header_bytes, major, minor, compression, reserved, size = _HEADER.unpack_from(data)
    if magic != _MAGIC or header_bytes != _HEADER.size:
        raise SealFormatError(f"bytes that do not begin with SEAL's magic {_MAGIC:#x}; not a SEAL object")
    if (major, minor) != SEAL_VERSION:
        raise SealFormatError(
            f"written by SEAL {_version((major, minor))}; expected SEAL {_version(SEAL_VERSION)}; install "
            "the tenseal version that secfacmic names"
        )
    if size != len(data) or compression not in (_PLAIN, _ZSTD) or reserved:
        raise SealFormatError(
            f"a header of {size} bytes, compression {compression}, reserved {reserved} on {len(data)} bytes; "
            f"expected equal sizes, compression {_PLAIN} or {_ZSTD}, reserved 0; the bytes were cut or damaged"
        )
    return int(compression)


def _body(saved: bytes) -> bytes:
    """Return what lies behind the header of a saved seeded ciphertext, decompressed."""
    compressed = _check_header(saved) == _ZSTD
    body = saved[_HEADER.size :]
    if compressed:
        # The binding offers no choice: it saves zstd frames. Read as a stream, they cannot blow up.
        try:
            body = zstandard.ZstdDecompressor().stream_reader(body).read(_BODY_BYTES + 1)
        except zstandard.ZstdError:
            body = b""
    if len(body) != _BODY_BYTES:
        raise SealFormatError(
            f"a seeded ciphertext that does not unpack to the {_BODY_BYTES} bytes of SEAL "
            f"{_version(SEAL_VERSION)}; install the tenseal version that secfacmic names"
        )
    return body


@contextmanager
def _memory_file() -> Iterator[tuple[int, str]]:
    descriptor = os.memfd_create("secfacmic", os.MFD_CLOEXEC)
    try:
        yield descriptor, f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)

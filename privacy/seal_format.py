"""SEAL's byte format, as far as secfacmic depends on it (SEAL 4.3).

Everything that SEAL saves begins with a header and continues as one of (little-endian)::

    16  header: magic 0xA15E, header size 16, major, minor, compression, 2 reserved, total size (8)

    plaintext or secret key               ciphertext
    32  parms_id                          32  parms_id
     8  number of words                    1  NTT flag (1)
     8  scale (double)                     8  polynomials
                                           8  degree
                                           8  data primes (1)
                                           8  scale (double)
                                           8  correction factor (1: CKKS does not use it)
    16  header of the word array          16  header of the word array
     8  number of words                    8  number of words
    8n  the words                         8n  the words, one polynomial after the other

The header's size counts itself. With a compressed header all behind it is one zstd frame.
SEAL saves and loads by path only: every path given to it here is that of an anonymous memory file,
so that no secret and no ciphertext is ever a file on a disk.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, Protocol

import numpy as np
import zstandard

from secure_fed.core.errors import SealFormatError
from secure_fed.protocol.residues import DEGREE, Residues

SEAL_VERSION: Final = (4, 3)
"""Version (major, minor) of the SEAL whose format this module knows."""

MOST_POLYNOMIALS: Final = 16
"""Most polynomials that SEAL takes in one ciphertext."""

ParmsId = tuple[int, int, int, int]
"""SEAL's digest of the parameters, four words."""

_HEADER: Final = struct.Struct("<HBBBBHQ")
_PLAINTEXT: Final = struct.Struct("<4QQd")
_CIPHERTEXT: Final = struct.Struct("<4QBQQQdQ")
_COUNT: Final = struct.Struct("<Q")
_MAGIC: Final = 0xA15E
_PLAIN: Final = 0
_ZSTD: Final = 2
_DATA_PRIMES: Final = 1


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


def plaintext_words(saved: bytes, parms_id: ParmsId) -> Residues:
    """Take the words out of a plaintext or secret key, of scale 1, that SEAL saved.

    Args:
        saved: SEAL's serialisation.
        parms_id: that it must have.

    Returns:
        uint64 of shape (DEGREE,), in NTT form.

    Raises:
        SealFormatError: other version, sizes or fields than the known ones.
    """
    return _words(saved, _PLAINTEXT.pack(*parms_id, DEGREE, 1.0), 1).reshape(DEGREE)


def ciphertext_words(saved: bytes, parms_id: ParmsId, polynomials: int, ntt: bool) -> Residues:
    """Take the polynomials out of a ciphertext of scale 1 that SEAL saved; as :func:`plaintext_words`.

    Args:
        saved: SEAL's serialisation.
        parms_id: that it must have.
        polynomials: how many it must have.
        ntt: whether it must be in NTT form.

    Returns:
        uint64 of shape (polynomials, DEGREE).
    """
    return _words(saved, _ciphertext_fields(parms_id, polynomials, ntt), polynomials)


def ciphertext(polynomials: Residues, parms_id: ParmsId) -> bytes:
    """SEAL's uncompressed serialisation of a ciphertext of scale 1 in NTT form.

    Args:
        polynomials: uint64 of shape (n, DEGREE), n from 2 to MOST_POLYNOMIALS, each below the modulus.
        parms_id: of the parameters.
    """
    words = polynomials.astype("<u8").tobytes()
    array = _header(_PLAIN, _COUNT.size + len(words)) + _COUNT.pack(polynomials.size) + words
    body = _ciphertext_fields(parms_id, len(polynomials), True) + array
    return _header(_PLAIN, len(body)) + body


def _ciphertext_fields(parms_id: ParmsId, polynomials: int, ntt: bool) -> bytes:
    return _CIPHERTEXT.pack(*parms_id, ntt, polynomials, DEGREE, _DATA_PRIMES, 1.0, 1)


def _words(saved: bytes, fields: bytes, polynomials: int) -> Residues:
    """The words behind fields that must be these."""
    count = polynomials * DEGREE
    before = fields + _header(_PLAIN, _COUNT.size + 8 * count) + _COUNT.pack(count)
    body = _body(saved, len(before) + 8 * count)
    if not body.startswith(before):
        raise SealFormatError(
            f"a SEAL object with other fields than SEAL {_version(SEAL_VERSION)} writes for this study's parameters; "
            "it is of another study, or another tenseal is installed than secfacmic names"
        )
    words: Residues = np.frombuffer(body, np.uint64, count, len(before))
    return np.reshape(words, (polynomials, DEGREE))


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


def _body(saved: bytes, size: int) -> bytes:
    """What lies behind the header of a saved object, decompressed; it must be ``size`` bytes."""
    compressed = _check_header(saved) == _ZSTD
    body = saved[_HEADER.size :]
    if compressed:
        # The binding offers no choice: it saves zstd frames. Read as a stream, they cannot blow up.
        try:
            body = zstandard.ZstdDecompressor().stream_reader(body).read(size + 1)
        except zstandard.ZstdError:
            body = b""
    if len(body) != size:
        raise SealFormatError(
            f"a SEAL object that does not unpack to the {size} bytes that SEAL {_version(SEAL_VERSION)} writes; it is "
            "of another study, or another tenseal is installed than secfacmic names"
        )
    return body


@contextmanager
def _memory_file() -> Iterator[tuple[int, str]]:
    descriptor = os.memfd_create("secfacmic", os.MFD_CLOEXEC)
    try:
        yield descriptor, f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)

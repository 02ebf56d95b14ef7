"""Shares of a secret, so that a mask can be taken off a sum though its maker has gone.

Shamir's scheme over GF(2^16), 16 words of a 32-byte secret beside each other: any ``needed`` shares give the secret,
fewer tell nothing. No table is read at a place that hangs on a secret. Each share is sealed to one site; what all of
them are is fixed by the root of a tree that the maker signs, so that each can be held against it alone.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from secure_fed.core.errors import EnvelopeError

SHARE_BYTES: Final = 32
"""Length of a secret and of each of its shares."""
MOST_POINTS: Final = 2**16 - 1
"""Places that a share can have: from 1."""
DIGEST_BYTES: Final = 32

_POLYNOMIAL: Final = 0x1100B
"""x^16 + x^12 + x^3 + x + 1, which is primitive: 2 generates the field's units (a test shows it)."""
_WORDS: Final = SHARE_BYTES // 2

Elements = npt.NDArray[np.uint32]


def multiply(left: Elements, right: Elements) -> Elements:
    """Products in GF(2^16), elementwise; uint32 below 2^16 of shapes that fit. Time hangs on the shapes alone."""
    product: Elements = np.zeros(np.broadcast_shapes(left.shape, right.shape), np.uint32)
    for bit in range(15, -1, -1):
        product <<= 1
        product ^= (product >> 16) * np.uint32(_POLYNOMIAL)
        product ^= left * ((right >> np.uint32(bit)) & np.uint32(1))
    return product


def invert(elements: Elements) -> Elements:
    """Inverses in GF(2^16), elementwise, by a^(2^16 - 2); that of 0 is 0."""
    result = square = multiply(elements, elements)
    for _ in range(14):
        square = multiply(square, square)
        result = multiply(result, square)
    return result


def share(secret: bytes, needed: int, points: Sequence[int], draws: bytes | None = None) -> list[bytes]:
    """Shares of a secret.

    Args:
        secret: 32 bytes.
        needed: how many shares give it back.
        points: where, each once, 1 to 65,535; at least ``needed``.
        draws: 32 (needed - 1) bytes, the coefficients of x, x^2, ...; only of test vectors: else drawn.

    Returns:
        32 bytes for each point.

    Raises:
        ValueError: other points, or fewer than needed.
    """
    if not 1 <= needed <= len(points) or not _places(points):
        raise ValueError(f"{len(points)} points, {needed} needed; expected each once, 1 to {MOST_POINTS}")
    draws = secrets.token_bytes(SHARE_BYTES * (needed - 1)) if draws is None else draws
    coefficients = _elements(secret + draws).reshape(needed, 1, _WORDS)
    at: Elements = np.array(points, np.uint32)[:, None]
    values: Elements = np.zeros((len(points), _WORDS), np.uint32)
    for coefficient in coefficients[::-1]:
        values = multiply(values, at) ^ coefficient
    return [row.astype(">u2").tobytes() for row in values]


def combine(shares: Mapping[int, bytes]) -> bytes:
    """The secret of exactly as many shares as are needed, by point. Of others it is 32 bytes that mean nothing."""
    if not shares or not _places(list(shares)):
        raise ValueError(f"shares at {sorted(shares)}; expected some, each at 1 to {MOST_POINTS}")
    at: Elements = np.array(list(shares), np.uint32)
    # Lagrange at 0: the product over the others of x_j / (x_j - x_i); subtraction is exclusive or.
    apart = at[:, None] ^ at[None, :]
    np.fill_diagonal(apart, 1)
    factors = multiply(np.broadcast_to(at, apart.shape), invert(apart))
    np.fill_diagonal(factors, 1)
    weights: Elements = np.ones(at.size, np.uint32)
    for column in factors.T:
        weights = multiply(weights, column)
    values = np.stack([_elements(one) for one in shares.values()])
    total = np.bitwise_xor.reduce(multiply(weights[:, None], values), axis=0)
    return bytes(total.astype(">u2").tobytes())


def _places(points: Sequence[int]) -> bool:
    return len(set(points)) == len(points) and all(1 <= point <= MOST_POINTS for point in points)


def _elements(data: bytes) -> Elements:
    return np.frombuffer(data, ">u2").astype(np.uint32)


def leaf(sealed: bytes, digest: bytes) -> bytes:
    """What the tree has of a share: SHA-256 over 0, the sealed share and the digest of the share (RFC 6962's form)."""
    return hashlib.sha256(b"\0" + sealed + digest).digest()


def tree(leaves: Sequence[bytes]) -> tuple[bytes, list[list[bytes]]]:
    """The tree over these leaves, at least one, as in RFC 6962, 2.1: its root, and for each leaf the siblings from it
    up to the root."""
    if len(leaves) == 1:
        return leaves[0], [[]]
    split = _left(len(leaves))
    (left, lower), (right, upper) = tree(leaves[:split]), tree(leaves[split:])
    return _node(left, right), [[*path, right] for path in lower] + [[*path, left] for path in upper]


def root_by_path(first: bytes, index: int, count: int, siblings: Sequence[bytes]) -> bytes:
    """The root that a leaf, its place among ``count`` and its path give.

    Raises:
        EnvelopeError: the path has another length than a tree of so many leaves.
    """
    if not 0 <= index < count or len(siblings) != path_length(index, count):
        raise EnvelopeError(f"a path of {len(siblings)} to leaf {index} of {count}")
    if count == 1:
        return first
    split = _left(count)
    if index < split:
        return _node(root_by_path(first, index, split, siblings[:-1]), siblings[-1])
    return _node(siblings[-1], root_by_path(first, index - split, count - split, siblings[:-1]))


def path_length(index: int, count: int) -> int:
    """How many siblings a leaf's path has."""
    length = 0
    while count > 1:
        split = _left(count)
        index, count = (index, split) if index < split else (index - split, count - split)
        length += 1
    return length


def _left(count: int) -> int:
    """The largest power of two below a count."""
    return 1 << (count - 1).bit_length() - 1


def _node(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\1" + left + right).digest()

"""Arithmetic modulo the data prime Q, exact on every CPU: uniform streams, products, packing, the linear check.

A residue is a uint64 below Q. Floats only guess quotients here; what is kept is integer arithmetic. Nothing in this
module is secret by itself, and it imports numpy and a stream cipher alone, so that the server can use it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Final

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher as StreamCipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

from secure_fed.core.errors import EnvelopeError

Residues = npt.NDArray[np.uint64]

DEGREE: Final = 4096
"""Degree N of the ring: coefficients of a polynomial."""
PRIMES: Final = {
    44: 17_592_186_028_033,
    45: 35_184_371_884_033,
    46: 70_368_743_669_761,
    47: 140_737_488_273_409,
    48: 281_474_976_694_273,
    49: 562_949_953_216_513,
    50: 1_125_899_906_826_241,
    51: 2_251_799_813_554_177,
    52: 4_503_599_627_149_313,
    53: 9_007_199_254_429_697,
    54: 18_014_398_509_309_953,
    55: 36_028_797_018_652_673,
    56: 72_057_594_037_641_217,
    57: 144_115_188_075_814_913,
}
"""The data primes by their bits: the largest prime of so many bits that is 1 modulo 2 N, which is the one that SEAL's
``CoeffModulus.Create(4096, [bits])`` gives. Below 44 bits the linear check would be weaker than 2^-88 for two words;
above 57 eight packed residues do not lie in windows of 64 bits, and quotients in float64 leave their bound."""
GROUP: Final = 8
"""Residues of b bits that are packed together, into exactly b bytes."""
CHECKS: Final = 2
"""Words of the linear check."""

# Residues that are worked on at a time: half a megabyte, which caches hold.
_BLOCK: Final = 16 * DEGREE
_ZEROS: Final = memoryview(bytes(8 * _BLOCK))
# Terms of a dot product at a time; see linear_check.
_TERMS: Final = 2**13
_HALF: Final = 28


class Stream:
    """Uniform residues from a key: ChaCha20's stream from block 0 with a nonce of zeros, read as 64-bit little-endian
    words, each cut to the modulus' bits; the words below the modulus, in order.

    Args:
        key: 32 bytes.
        modulus: what the residues lie below, up to 2^63.
    """

    def __init__(self, key: bytes, modulus: int) -> None:
        self._stream = StreamCipher(ChaCha20(key, bytes(16)), mode=None).encryptor()
        self._modulus = np.uint64(modulus)
        self._mask = np.uint64((1 << modulus.bit_length()) - 1)

    def take(self, count: int) -> Residues:
        """The next residues, uint64 of shape (count,): what is taken does not depend on how many at a time."""
        drawn = np.empty(count, "<u8")
        filled = 0
        while filled < count:
            words = drawn[filled : filled + _BLOCK]
            self._stream.update_into(_ZEROS[: words.nbytes], words.data.cast("B"))
            words &= self._mask
            if words.max() >= self._modulus:  # for a prime of PRIMES once in 2^24 words or rarer
                kept = words[words < self._modulus]
                words[: kept.size] = kept
                filled += kept.size
            else:
                filled += words.size
        return drawn


def expand(key: bytes, count: int, modulus: int) -> Residues:
    """The first residues of a key's stream (:class:`Stream`), uint64 of shape (count,)."""
    return Stream(key, modulus).take(count)


class SumOfStreams:
    """Sums modulo Q of the residues that each of some keys gives (:class:`Stream`).

    Args:
        keys: 32 bytes each.
        modulus: Q.
    """

    def __init__(self, keys: Iterable[bytes], modulus: int) -> None:
        self._streams = [Stream(key, modulus) for key in keys]
        self._modulus = np.uint64(modulus)
        self._room = (1 << 64) // modulus - 1  # additions until 64 bits could overflow

    def take(self, count: int) -> Residues:
        """The next sums, uint64 of shape (count,)."""
        total = np.zeros(count, np.uint64)
        for number, stream in enumerate(self._streams, 1):
            total += stream.take(count)
            if number % self._room == 0:
                total %= self._modulus
        total %= self._modulus
        return total


def centre(residues: Residues, modulus: int) -> npt.NDArray[np.int64]:
    """The representatives in (-Q / 2, Q / 2), int64 of the same shape."""
    half = np.uint64(modulus // 2)
    shifted = residues + half
    np.minimum(shifted, shifted - np.uint64(modulus), out=shifted)  # modulo Q, as in add_into
    shifted -= half
    return shifted.view(np.int64)


def uncentre(integers: npt.NDArray[np.int64], modulus: int) -> Residues:
    """Undo :func:`centre`: uint64 of the same shape, each below Q. Magnitudes are below Q."""
    # A negative one wraps to a huge number; with Q added it is the smaller.
    wrapped: Residues = integers.view(np.uint64)
    residues: Residues = np.minimum(wrapped, wrapped + np.uint64(modulus))
    return residues


def multiply(left: Residues, right: npt.NDArray[np.int64], modulus: int) -> Residues:
    """Elementwise products modulo Q, exactly.

    The quotient is guessed in float64: five roundings, each of at most 2^-53 of it, and it is below Q / 2 < 2^56
    since one factor is centred; so it is off by at most 40 and one more for the floor, and the remainder, taken modulo
    2^64, is within 41 Q < 2^63 of 0: it is what it seems.

    Args:
        left: uint64, each below Q.
        right: int64 of a shape that fits, centred (:func:`centre`).
        modulus: Q, of :data:`PRIMES`.

    Returns:
        uint64 of the shape of ``left``, each below Q.
    """
    signed = left.view(np.int64)
    quotients = np.floor(signed.astype(np.float64) * right.astype(np.float64) * (1.0 / modulus)).astype(np.int64)
    with np.errstate(over="ignore"):
        remainders = signed * right - quotients * np.int64(modulus)
    return np.remainder(remainders, np.int64(modulus)).view(np.uint64)


def add_into(total: Residues, residues: Residues, modulus: int) -> None:
    """Add residues into a total of the same shape, modulo Q, in place; spoils ``residues``."""
    total += residues
    # Where the sum is below Q the difference wraps to a huge number: the smaller is the residue.
    np.subtract(total, np.uint64(modulus), out=residues)
    np.minimum(total, residues, out=total)


def packed_bytes(count: int, bits: int) -> int:
    """Length of ``count`` packed residues of ``bits`` bits; ``count`` is a multiple of GROUP."""
    return count // GROUP * bits


def pack_residues(residues: Residues, bits: int) -> bytes:
    """Pack residues as one little-endian bit stream: bit ``bits * i`` is the lowest bit of residue i.

    Args:
        residues: uint64 of shape (n,), n a multiple of GROUP, each below 2^bits.
        bits: 44 to 57.

    Returns:
        ``packed_bytes(n, bits)`` bytes.
    """
    groups = residues.reshape(-1, GROUP)
    packed = bytearray(packed_bytes(residues.size, bits))
    for index, (offset, shift) in enumerate(_windows(bits)):
        window: Residues = np.ndarray((len(groups),), "<u8", packed, offset, (bits,))
        window |= groups[:, index] << np.uint64(shift)
    return bytes(packed)


def unpack_residues(packed: bytes | memoryview, bits: int) -> Residues:
    """Undo :func:`pack_residues`, checking every residue.

    Args:
        packed: whole groups.
        bits: 44 to 57; Q is the prime of so many bits.

    Returns:
        uint64 of shape (n,), each below Q.

    Raises:
        EnvelopeError: a residue is not below Q.
    """
    residues = np.empty(len(packed) // bits * GROUP, np.uint64)
    for first in range(0, residues.size, _BLOCK):
        block = residues[first : first + _BLOCK].reshape(-1, GROUP)
        block[:] = _unpacked_block(packed, bits, first, len(block)).T
    return residues


def sum_with_packed(total: Residues, packed: bytes | memoryview, bits: int) -> Residues:
    """A total with packed residues added, modulo Q, unpacked, checked and added in one pass.

    Args:
        total: uint64 of shape (n,), each below Q; it stays as it is.
        packed: n residues, from ``pack_residues``.
        bits: 44 to 57; Q is the prime of so many bits.

    Returns:
        uint64 of shape (n,), each below Q.

    Raises:
        EnvelopeError: a residue is not below Q.
    """
    sums = np.empty_like(total)
    for first in range(0, total.size, _BLOCK):
        part, before = (whole[first : first + _BLOCK].reshape(-1, GROUP) for whole in (sums, total))
        columns = _unpacked_block(packed, bits, first, len(part))
        np.add(columns.T, before, out=part)
        # Where the sum is below Q the difference wraps to a huge number, as in add_into.
        spare = np.subtract(part, np.uint64(PRIMES[bits]), out=columns.reshape(part.shape))
        np.minimum(part, spare, out=part)
    return sums


def _unpacked_block(packed: bytes | memoryview, bits: int, first: int, groups: int) -> Residues:
    """The residues of so many groups from residue number ``first`` on, uint64 of shape (GROUP, groups): each row is
    written in one go, which is what takes least time. See ``unpack_residues``."""
    columns = np.empty((GROUP, groups), np.uint64)
    for (offset, shift), column in zip(_windows(bits), columns, strict=True):
        window: Residues = np.ndarray((groups,), "<u8", packed, first // GROUP * bits + offset, (bits,))
        np.right_shift(window, np.uint64(shift), out=column)
    columns &= np.uint64((1 << bits) - 1)
    if int(columns.max()) >= PRIMES[bits]:
        raise EnvelopeError(
            f"a residue is {int(columns.max())}; expected less than the modulus {PRIMES[bits]}; "
            "the bytes were damaged or forged, ask their sender to send them again"
        )
    return columns


def _windows(bits: int) -> list[tuple[int, int]]:
    """(byte offset, bit shift) of the 64-bit window over each residue of a group; the last ends with the group."""
    offsets = [min(index * bits // 8, bits - 8) for index in range(GROUP)]
    return [(offset, index * bits - 8 * offset) for index, offset in enumerate(offsets)]


def linear_check(digest: str, residues: Residues, modulus: int) -> tuple[int, int]:
    """Two products <rho_j, residues> modulo Q, j = 1, 2: what tells a bent sum from a true one without any key.

    rho_j is expanded (:func:`expand`) from SHA-256("secfacmic linear check 1", j, digest), so it is uniform and fixed
    by a digest that must itself be fixed after what is checked was: then a sum that differs passes with probability
    Q^-2, at most 2^-88. Linear: the products of a sum are the sums of the products.

    Exactly: residues are cut into halves of 28 bits; of each block's product with a half, the integer one is exact
    modulo 2^64 and the float one is off by at most (block + 2) 2^-53 sum |r| |v| < 2^13 2^-53 2^13 2^57 2^29 = 2^59,
    enough to tell which multiple of 2^64 the other lacks.

    Args:
        digest: SHA-256 as 64 hex digits.
        residues: uint64 of shape (n,), each below Q.
        modulus: Q, of :data:`PRIMES`.

    Returns:
        Two integers, each from 0 to Q - 1.
    """
    labels = [b"secfacmic linear check 1" + bytes([number]) for number in range(1, CHECKS + 1)]
    streams = [Stream(hashlib.sha256(label + bytes.fromhex(digest)).digest(), modulus) for label in labels]
    sums = [0] * CHECKS
    for first in range(0, residues.size, _TERMS):
        block = residues[first : first + _TERMS]
        halves = [half.view(np.int64) for half in (block & np.uint64((1 << _HALF) - 1), block >> np.uint64(_HALF))]
        rough_halves = [half.astype(np.float64) for half in halves]
        for number, stream in enumerate(streams):
            rho = stream.take(block.size).view(np.int64)
            rough_rho = rho.astype(np.float64)
            for place, (half, rough_half) in enumerate(zip(halves, rough_halves, strict=True)):
                wrapped, rough = int(np.dot(rho, half)), float(np.dot(rough_rho, rough_half))
                sums[number] += (wrapped + (round((rough - wrapped) * 2.0**-64) << 64)) << (_HALF * place)
    return sums[0] % modulus, sums[1] % modulus

"""Bounded integers in CKKS slots, and the sums that need no key.

Everything here is public arithmetic, so that the server can import it: which parameters add exactly,
how integers lie in slots, what an envelope and a record look like on the wire, and how first
polynomials are added modulo q. Only ``secure_fed.privacy.ckks`` holds a key; this module imports numpy alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal, Protocol, cast

import numpy as np
import numpy.typing as npt

from secure_fed.core.errors import AggregateRefused, EnvelopeError, LanesError

Integers = npt.NDArray[np.int64]
Coefficients = npt.NDArray[np.uint64]

DEGREE: Final = 4096
"""Degree N of the ring; a ciphertext holds N/2 complex slots, hence N reals."""
MODULUS: Final = 18_014_398_509_309_953
"""Data prime q, the first of SEAL's ``CoeffModulus.Create(4096, [54, 55])``."""
SEED_BYTES: Final = 64
"""Length of the seed from which SEAL expands a ciphertext's second polynomial."""
PACKED_BYTES: Final = DEGREE * 54 // 8
"""Length of one polynomial packed at 54 bits a coefficient."""
TAG_PRIME: Final = 2**61 - 1
"""Modulus of the linear tags."""
TAGS: Final = 2
"""Tags an envelope; a forgery passes both with probability about 2^-120."""
MIN_BITS: Final = 8
"""Fewest bits a value may have: below, rounding costs more than the update carries."""
REFUSAL: Final = (
    "the aggregate was refused and nothing was changed; expected the exact sum of this round's signed "
    "contributors; compare journals with the other sites and ask the coordinator to void the round"
)
"""The one text of every AggregateRefused that opening a record raises."""

# Standard deviation of a coefficient's error in one fresh ciphertext: SEAL's centred binomial noise
# (variance 21/2) and the encoder's rounding (variance 1/12), rounded up a little.
_COEFFICIENT_NOISE: Final = 3.25
# A slot is decoded wrongly when its noise passes D/2, here 9.2 standard deviations: 4e-20 a component.
_NOISE_MARGIN: Final = 9.2
# A coefficient must stay below q/2 and be exact as a double. q/2 is short of 2^53 by a part in 2^36;
# a sum is short of its bound by a part in 2^bits (max_integer is not 2^(bits-1)), which is far more.
_CAPACITY_BITS: Final = 53
_COEFFICIENT_BITS: Final = 54
_COEFFICIENT_MASK: Final = np.uint64(2**_COEFFICIENT_BITS - 1)
# Four coefficients are 27 bytes. (byte offset, bit shift) of an 8-byte window over each of them.
_GROUP_BYTES: Final = 27
_WINDOWS: Final = ((0, 0), (6, 6), (13, 4), (19, 10))
# Ciphertexts that the keyless sum handles at a time: half a megabyte, which caches hold.
_BLOCK: Final = 16


@dataclass(frozen=True, slots=True)
class LaneParameters:
    """What a study's lanes look like. Made by ``lane_parameters`` only, which checks every bound.

    Attributes:
        max_sites: most envelopes a sum may hold.
        bits: width w of one site's value, sign included.
        lanes: values packed in one real, 2 or 3.
        values: value and validation lanes of an update, tags excluded.
        guard_bits: g, the fewest bits with 2^g >= max_sites.
        lane_bits: width w + g of a value's sum.
        scale: CKKS scale D; not a power of two.
        max_integer: 2^(w-1) - 1, the largest magnitude a site may send.
        tag_digits: digits of w - 1 bits in which a tag travels.
        integers: everything packed: the values, then the digits of both tags.
        integers_per_ciphertext: ``lanes`` times DEGREE.
        ciphertexts: ciphertexts an envelope.
    """

    max_sites: int
    bits: int
    lanes: int
    values: int
    guard_bits: int
    lane_bits: int
    scale: float
    max_integer: int
    tag_digits: int
    integers: int
    integers_per_ciphertext: int
    ciphertexts: int


def lane_parameters(max_sites: int, bits: int, lanes: int, values: int) -> LaneParameters:
    """Derive all parameters of a study's lanes.

    The scale is the least D >= 2 * 9.2 * sigma, where sigma = 3.25 * sqrt(N * K / 2) is the standard
    deviation of a slot's noise in a sum of K ciphertexts; a sum fits while
    D * sqrt(2) * 2^(lanes * lane_bits - 1) < 2^53.

    Args:
        max_sites: most sites a round may sum, >= 1.
        bits: width of a value in bits, sign included, >= 8.
        lanes: values a real, 2 or 3.
        values: values an update, >= 1.

    Raises:
        LanesError: a bound is broken; the message names it and the most bits that would fit.
    """
    if max_sites < 1:
        raise LanesError(f"max_sites is {max_sites}; expected at least 1; set it in the study")
    if lanes not in (2, 3):
        raise LanesError(f"lanes is {lanes}; expected 2 or 3; set it in the study")
    if values < 1:
        raise LanesError(f"values is {values}; expected at least 1; the adapter shares no parameter")
    most = largest_bits(max_sites, lanes)
    fits = (
        f"the largest bits for {max_sites} sites in {lanes} lanes is {most}"
        if most >= MIN_BITS
        else f"no bits fit {max_sites} sites in {lanes} lanes (at most {most}); lower lanes or max_sites"
    )
    if bits < MIN_BITS:
        raise LanesError(f"bits is {bits}; expected at least {MIN_BITS}; {fits}")
    guard_bits, scale = _guard_and_scale(max_sites)
    lane_bits = bits + guard_bits
    if not _fits(scale, lanes * lane_bits):
        raise LanesError(
            f"capacity: scale * sqrt(2) * 2^(lanes * (bits + guard) - 1) = {scale:.1f} * sqrt(2) * "
            f"2^({lanes} * ({bits} + {guard_bits}) - 1) is not below 2^{_CAPACITY_BITS}; {fits}"
        )
    tag_digits = -(-TAG_PRIME.bit_length() // (bits - 1))
    integers = values + TAGS * tag_digits
    integers_per_ciphertext = DEGREE * lanes
    return LaneParameters(
        max_sites=max_sites,
        bits=bits,
        lanes=lanes,
        values=values,
        guard_bits=guard_bits,
        lane_bits=lane_bits,
        scale=scale,
        max_integer=2 ** (bits - 1) - 1,
        tag_digits=tag_digits,
        integers=integers,
        integers_per_ciphertext=integers_per_ciphertext,
        ciphertexts=-(-integers // integers_per_ciphertext),
    )


def largest_bits(max_sites: int, lanes: int) -> int:
    """Largest width w whose lanes hold the sum of ``max_sites`` sites exactly.

    Args:
        max_sites: most sites a round may sum, >= 1.
        lanes: values a real, >= 1.

    Returns:
        Bits, sign included; 0 if none fits. Below MIN_BITS ``lane_parameters`` refuses all the same.
    """
    guard_bits, scale = _guard_and_scale(max_sites)
    bits = 0
    while _fits(scale, lanes * (bits + 1 + guard_bits)):
        bits += 1
    return bits


def _guard_and_scale(max_sites: int) -> tuple[int, float]:
    guard_bits = (max_sites - 1).bit_length()
    noise = _COEFFICIENT_NOISE * math.sqrt(DEGREE * max_sites / 2)
    return guard_bits, 2 * _NOISE_MARGIN * noise


def _fits(scale: float, packed_bits: int) -> bool:
    return scale * math.sqrt(2) * 2.0 ** (packed_bits - 1) < 2.0**_CAPACITY_BITS


def pack_coefficients(coefficients: Coefficients) -> bytes:
    """Pack coefficients as one little-endian bit stream of 54 bits each.

    Args:
        coefficients: uint64 of shape (c, DEGREE), each below MODULUS.

    Returns:
        c * PACKED_BYTES bytes; bit 54 * i of the stream is the lowest bit of coefficient i.
    """
    four = np.ascontiguousarray(coefficients, dtype="<u8").reshape(-1, 4)
    words = np.empty_like(four)
    words[:, 0] = four[:, 0] | four[:, 1] << np.uint64(54)
    words[:, 1] = four[:, 1] >> np.uint64(10) | four[:, 2] << np.uint64(44)
    words[:, 2] = four[:, 2] >> np.uint64(20) | four[:, 3] << np.uint64(34)
    words[:, 3] = four[:, 3] >> np.uint64(30)
    return words.view(np.uint8)[:, :_GROUP_BYTES].tobytes()


def unpack_coefficients(packed: bytes, ciphertexts: int) -> Coefficients:
    """Undo ``pack_coefficients``, checking every coefficient.

    Args:
        packed: ciphertexts * PACKED_BYTES bytes.
        ciphertexts: number of polynomials.

    Returns:
        uint64 of shape (ciphertexts, DEGREE), each below MODULUS.

    Raises:
        EnvelopeError: wrong length, or a coefficient that is not below MODULUS.
    """
    _check_length("packed polynomials", len(packed), ciphertexts * PACKED_BYTES)
    groups = len(packed) // _GROUP_BYTES
    four = np.empty((groups, 4), np.uint64)
    for column, (offset, shift) in enumerate(_WINDOWS):
        window: Coefficients = np.ndarray((groups,), "<u8", packed, offset, (_GROUP_BYTES,))
        np.right_shift(window, np.uint64(shift), out=four[:, column])
    four &= _COEFFICIENT_MASK
    if int(four.max(initial=np.uint64(0))) >= MODULUS:
        raise EnvelopeError(
            f"a coefficient is {int(four.max())}; expected less than the modulus {MODULUS}; "
            "the envelope was damaged or forged, ask its sender to send it again"
        )
    return four.reshape(ciphertexts, DEGREE)


def pack_lanes(integers: Integers, parameters: LaneParameters) -> npt.NDArray[np.complex128]:
    """Lay integers into slots: ``lanes`` integers a real as digits of base 2^lane_bits, two reals a slot.

    Args:
        integers: int64 of shape (integers,), magnitudes at most max_integer.
        parameters: the study's lanes.

    Returns:
        Unscaled slot values, complex128 of shape (ciphertexts, DEGREE / 2); both parts are exact
        integers, and what lies behind the last integer is zero.
    """
    padded = np.zeros(parameters.ciphertexts * parameters.integers_per_ciphertext, np.int64)
    padded[: parameters.integers] = integers
    digits = padded.reshape(-1, parameters.lanes)
    reals = digits[:, -1].copy()
    for lane in range(parameters.lanes - 2, -1, -1):
        reals <<= parameters.lane_bits
        reals += digits[:, lane]
    return reals.astype(np.float64).view(np.complex128).reshape(parameters.ciphertexts, DEGREE // 2)


def unpack_lanes(reals: Integers, parameters: LaneParameters) -> Integers:
    """Undo ``pack_lanes`` on a sum of up to ``max_sites`` packings, exactly.

    Args:
        reals: int64 of shape (ciphertexts, DEGREE): real and imaginary part of each slot in turn.
        parameters: the study's lanes.

    Returns:
        int64 of shape (ciphertexts * integers_per_ciphertext,): the sums, then the padding, which is
        zero in an honest sum. All lanes but the last of a real lie in [-2^(lane_bits-1),
        2^(lane_bits-1)); the last holds whatever remains, so that an overflow shows there.
    """
    rest = reals.reshape(-1).copy()
    digits = np.empty((rest.size, parameters.lanes), np.int64)
    half = 1 << (parameters.lane_bits - 1)
    for lane in range(parameters.lanes - 1):
        # Round half down to the next multiple of the base, so that the digit is balanced.
        carry = (rest + half) >> parameters.lane_bits
        digits[:, lane] = rest - (carry << parameters.lane_bits)
        rest = carry
    digits[:, -1] = rest
    return digits.reshape(-1)


def check_integers(integers: Integers, parameters: LaneParameters) -> None:
    """Refuse an update that the lanes do not hold: a bug of the caller, never of the wire.

    Args:
        integers: what is about to be sealed; int64 of shape (values,), magnitudes at most max_integer.
        parameters: the study's lanes.

    Raises:
        LanesError: wrong type, shape or magnitude.
    """
    if integers.dtype != np.int64 or integers.shape != (parameters.values,):
        raise LanesError(
            f"integers are {integers.dtype} of shape {integers.shape}; expected int64 of shape "
            f"({parameters.values},); encode the update with this study's codec"
        )
    largest = max(int(integers.max()), -int(integers.min()))
    if largest > parameters.max_integer:
        raise LanesError(
            f"an integer of magnitude {largest}; expected at most {parameters.max_integer} "
            f"({parameters.bits} bits); clip before sealing"
        )


class Wire(Protocol):
    """What an envelope's payload and a record's payload are, and how payloads add without a key."""

    @property
    def envelope_bytes(self) -> int:
        """Exact length of an envelope's payload."""
        ...

    def record_bytes(self, cohort: int) -> int:
        """Exact length of the payload of a record with ``cohort`` contributors."""
        ...

    def check(self, payload: bytes) -> None:
        """Check an envelope's payload as far as that goes without a key.

        Raises:
            EnvelopeError: wrong length, a coefficient >= q, or in plain mode an integer beyond
                max_integer.
        """
        ...

    def zero(self) -> npt.NDArray[np.generic]:
        """Make an empty total for ``add``."""
        ...

    def add(self, total: npt.NDArray[np.generic], payload: bytes) -> None:
        """Add an envelope into a total, in place; the order of envelopes does not matter.

        Raises:
            EnvelopeError: as ``check``; the total is as it was.
        """
        ...

    def tail(self, payload: bytes) -> bytes:
        """Return what a record must carry of one envelope besides the total.

        Raises:
            EnvelopeError: wrong length.
        """
        ...

    def record(self, total: npt.NDArray[np.generic], tails: Sequence[bytes]) -> bytes:
        """Make a record's payload from a total and its envelopes' tails, in contributor order.

        Raises:
            LanesError: no contributor, more than max_sites, or a total that is not of so many: a bug
                of the caller.
        """
        ...


def wire(mode: Literal["he", "plain"], parameters: LaneParameters) -> Wire:
    """Return the wire of a study's mode."""
    return CipherWire(parameters) if mode == "he" else PlainWire(parameters)


class CipherWire:
    """The encrypted wire. Nothing travels but seeds and coefficients.

    Envelope: the 64-byte seeds of all ciphertexts, then their first polynomials packed at 54 bits.
    Record: the packed sums of first polynomials, then the seeds of each contributor in turn. A total
    is uint64 of shape (ciphertexts, DEGREE), each below MODULUS.
    """

    def __init__(self, parameters: LaneParameters) -> None:
        self._parameters = parameters
        self._seed_bytes = parameters.ciphertexts * SEED_BYTES
        self._packed_bytes = parameters.ciphertexts * PACKED_BYTES

    @property
    def envelope_bytes(self) -> int:
        """Exact length of an envelope's payload."""
        return self._seed_bytes + self._packed_bytes

    def record_bytes(self, cohort: int) -> int:
        """Exact length of the payload of a record with ``cohort`` contributors."""
        return self._packed_bytes + cohort * self._seed_bytes

    def check(self, payload: bytes) -> None:
        """Check length and coefficients; see ``Wire.check``."""
        for _ in self._blocks(payload):
            pass

    def zero(self) -> npt.NDArray[np.generic]:
        """Make an empty total."""
        return np.zeros((self._parameters.ciphertexts, DEGREE), np.uint64)

    def add(self, total: npt.NDArray[np.generic], payload: bytes) -> None:
        """Add an envelope's first polynomials modulo q; see ``Wire.add``."""
        whole = self._checked(total)
        self.check(payload)  # all of it before any of it is added
        for place, polynomials in self._blocks(payload):
            sums = whole[place]
            sums += polynomials
            # Where the sum is below q the difference wraps to a huge number: the smaller is the residue.
            np.subtract(sums, np.uint64(MODULUS), out=polynomials)
            np.minimum(sums, polynomials, out=sums)

    def tail(self, payload: bytes) -> bytes:
        """Return an envelope's seeds; see ``Wire.tail``."""
        _check_length("envelope payload", len(payload), self.envelope_bytes)
        return payload[: self._seed_bytes]

    def record(self, total: npt.NDArray[np.generic], tails: Sequence[bytes]) -> bytes:
        """Make a record's payload; see ``Wire.record``."""
        _check_cohort_size(len(tails), self._parameters)
        if any(len(tail) != self._seed_bytes for tail in tails):
            raise LanesError(f"a tail is not {self._seed_bytes} bytes; use what tail() returned")
        return b"".join((pack_coefficients(self._checked(total)), *tails))

    def split_envelope(self, payload: bytes) -> tuple[list[bytes], Coefficients]:
        """Return an envelope's seeds, one a ciphertext, and its first polynomials.

        Raises:
            EnvelopeError: as ``check``.
        """
        return self._seeds(payload[: self._seed_bytes]), self._first_polynomials(payload)

    def split_record(self, payload: bytes, cohort: int) -> tuple[list[list[bytes]], Coefficients]:
        """Return a record's seeds, by contributor and ciphertext, and its summed first polynomials.

        Raises:
            EnvelopeError: wrong length for so many contributors, or a coefficient >= q.
        """
        _check_length("record payload", len(payload), self.record_bytes(cohort))
        starts = range(self._packed_bytes, len(payload), self._seed_bytes)
        seeds = [self._seeds(payload[start : start + self._seed_bytes]) for start in starts]
        return seeds, unpack_coefficients(payload[: self._packed_bytes], self._parameters.ciphertexts)

    def _blocks(self, payload: bytes) -> Iterator[tuple[slice, Coefficients]]:
        """An envelope's first polynomials a few at a time, which is faster than all at once and takes no memory."""
        _check_length("envelope payload", len(payload), self.envelope_bytes)
        for first in range(0, self._parameters.ciphertexts, _BLOCK):
            last = min(first + _BLOCK, self._parameters.ciphertexts)
            start, end = (self._seed_bytes + index * PACKED_BYTES for index in (first, last))
            yield slice(first, last), unpack_coefficients(payload[start:end], last - first)

    def _first_polynomials(self, payload: bytes) -> Coefficients:
        _check_length("envelope payload", len(payload), self.envelope_bytes)
        return unpack_coefficients(payload[self._seed_bytes :], self._parameters.ciphertexts)

    def _checked(self, total: npt.NDArray[np.generic]) -> Coefficients:
        if total.dtype != np.uint64 or total.shape != (self._parameters.ciphertexts, DEGREE):
            raise LanesError(f"a total of {total.dtype} {total.shape}; use the one that zero() made")
        return cast(Coefficients, total)

    @staticmethod
    def _seeds(block: bytes) -> list[bytes]:
        return [block[start : start + SEED_BYTES] for start in range(0, len(block), SEED_BYTES)]


class PlainWire:
    """The wire without encryption: little-endian int32 values, no tags.

    Envelope and record have the same form; a total is int64 of shape (values,).
    """

    def __init__(self, parameters: LaneParameters) -> None:
        self._parameters = parameters

    @property
    def envelope_bytes(self) -> int:
        """Exact length of an envelope's payload."""
        return 4 * self._parameters.values

    def record_bytes(self, cohort: int) -> int:
        """Exact length of a record's payload, whatever the number of contributors."""
        return self.envelope_bytes

    def check(self, payload: bytes) -> None:
        """Check length and magnitudes; see ``Wire.check``."""
        self.integers(payload, 1)

    def zero(self) -> npt.NDArray[np.generic]:
        """Make an empty total."""
        return np.zeros(self._parameters.values, np.int64)

    def add(self, total: npt.NDArray[np.generic], payload: bytes) -> None:
        """Add an envelope's integers; see ``Wire.add``."""
        integers = self.integers(payload, 1)
        sums = self._checked(total)
        sums += integers

    def tail(self, payload: bytes) -> bytes:
        """Return nothing: a plain record needs nothing of a single envelope; see ``Wire.tail``."""
        _check_length("envelope payload", len(payload), self.envelope_bytes)
        return b""

    def record(self, total: npt.NDArray[np.generic], tails: Sequence[bytes]) -> bytes:
        """Make a record's payload; see ``Wire.record``."""
        _check_cohort_size(len(tails), self._parameters)
        sums = self._checked(total)
        bound = len(tails) * self._parameters.max_integer
        if int(sums.max()) > bound or int(sums.min()) < -bound:
            raise LanesError(f"a total beyond {bound}, the most that {len(tails)} envelopes can sum to")
        return sums.astype("<i4").tobytes()

    def integers(self, payload: bytes, contributors: int) -> Integers:
        """Read an envelope (``contributors`` = 1) or a record.

        Returns:
            int64 of shape (values,), magnitudes at most contributors * max_integer.

        Raises:
            EnvelopeError: wrong length or an integer beyond the bound.
        """
        _check_length("payload", len(payload), self.envelope_bytes)
        integers = np.frombuffer(payload, "<i4").astype(np.int64)
        bound = contributors * self._parameters.max_integer
        largest = max(int(integers.max()), -int(integers.min()))
        if largest > bound:
            raise EnvelopeError(
                f"an integer of magnitude {largest}; expected at most {bound}; "
                "the payload was damaged or forged, ask its sender to send it again"
            )
        return integers

    def _checked(self, total: npt.NDArray[np.generic]) -> Integers:
        if total.dtype != np.int64 or total.shape != (self._parameters.values,):
            raise LanesError(f"a total of {total.dtype} {total.shape}; use the one that zero() made")
        return cast(Integers, total)


@dataclass(frozen=True, slots=True)
class Contribution:
    """Whose update an envelope holds.

    Attributes:
        site: the site's name in the study.
        attempt: number of this sealing of the site's stored integers in this round, from 0.
    """

    site: str
    attempt: int


@dataclass(frozen=True, slots=True)
class Binding:
    """The one place in one journal to which an envelope belongs.

    Attributes:
        run: the run's id, lower-case hex.
        head: digest of the journal's head that the round starts from, lower-case hex.
        round: number of the round.
    """

    run: str
    head: str
    round: int


class Sealer(Protocol):
    """Seals a site's integers for one round, and opens the round's sum."""

    def seal(self, integers: Integers, binding: Binding, contribution: Contribution) -> bytes:
        """Seal one update.

        Args:
            integers: int64 of shape (values,), magnitudes at most max_integer.
            binding: the round.
            contribution: the site and its attempt.

        Returns:
            The envelope's payload.

        Raises:
            LanesError: wrong type, shape or magnitude: a bug of the caller.
        """
        ...

    def open(self, record_payload: bytes, binding: Binding, cohort: Sequence[Contribution]) -> Integers:
        """Open a record's sum.

        Args:
            record_payload: what ``Wire.record`` made.
            binding: the round.
            cohort: the contributors whose headers were signed, each site once, at most max_sites.

        Returns:
            The exact sums, int64 of shape (values,).

        Raises:
            AggregateRefused: the record is anything but the exact sum of this cohort's envelopes.
        """
        ...


class PlainSealer:
    """Implements Sealer without a key, for studies in plain mode: no secrecy and no authenticity."""

    def __init__(self, parameters: LaneParameters) -> None:
        self._parameters = parameters
        self._wire = PlainWire(parameters)

    def seal(self, integers: Integers, binding: Binding, contribution: Contribution) -> bytes:
        """Write the integers down; see ``Sealer.seal``."""
        check_integers(integers, self._parameters)
        return integers.astype("<i4").tobytes()

    def open(self, record_payload: bytes, binding: Binding, cohort: Sequence[Contribution]) -> Integers:
        """Read the sums, checking length, cohort and magnitudes only; see ``Sealer.open``."""
        if cohort_holds(cohort, self._parameters):
            try:
                return self._wire.integers(record_payload, len(cohort))
            except EnvelopeError:
                pass
        raise AggregateRefused(REFUSAL)


def cohort_holds(cohort: Sequence[Contribution], parameters: LaneParameters) -> bool:
    """Whether a cohort has 1 to max_sites contributors and no site twice."""
    sites = {contribution.site for contribution in cohort}
    return 1 <= len(cohort) <= parameters.max_sites and len(sites) == len(cohort)


def _check_length(what: str, found: int, expected: int) -> None:
    if found != expected:
        raise EnvelopeError(
            f"{what} of {found} bytes; expected {expected}; "
            "the sender and this study do not agree, or the bytes were cut"
        )


def _check_cohort_size(size: int, parameters: LaneParameters) -> None:
    if not 1 <= size <= parameters.max_sites:
        raise LanesError(f"a sum of {size} envelopes; expected 1 to max_sites = {parameters.max_sites}")

"""Bounded integers in a polynomial's coefficients, and the sums that need no key.

Everything here is public arithmetic, so that the server can import it: which parameters add exactly, how integers lie
in coefficients, what an envelope and a record look like on the wire, and how first polynomials are added modulo Q.
Only ``secure_fed.privacy.ckks`` holds a key.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple, Protocol, cast

import numpy as np
import numpy.typing as npt

from secure_fed.core.errors import AggregateRefused, EnvelopeError, LanesError
from secure_fed.protocol.residues import (
    DEGREE,
    GROUP,
    PRIMES,
    Residues,
    linear_check,
    pack_residues,
    packed_bytes,
    sum_with_packed,
    unpack_residues,
)

Integers = npt.NDArray[np.int64]

MIN_BITS: Final = 8
MAX_BITS: Final = 21
"""Bits that a value may have: below, rounding costs more than the update carries; above, no study has use for them."""
USUAL_BITS: Final = 11
"""What a study has that names none: docs/facmic.md has what fewer bits cost."""
MIN_LANES: Final = 2
MAX_LANES: Final = 6
LANES: Final = range(MIN_LANES, MAX_LANES + 1)
NOISE_MOST: Final = 21
"""Largest magnitude of a coefficient's noise in one ciphertext: SEAL draws it as the difference of the numbers of ones
in two times 21 random bits."""
NO_SEED: Final = "0" * 64
"""Stands for the seed where nothing is encrypted."""
REFUSAL: Final = (
    "the aggregate was refused and nothing was changed; expected a sum of its contributors' updates within the study's "
    "bounds; find the site that is broken or lies by other means, then let it leave: secfacmic site retire, or "
    "secfacmic keys rotate --remove SITE"
)
"""The one text of every AggregateRefused that opening a record raises."""

# Standard deviation of that noise, sqrt(21 / 2), rounded up a little.
_NOISE: Final = 3.25
# A coefficient is rounded wrongly when the noise of its sum reaches D / 2, here 9.2 standard deviations.
_NOISE_MARGIN: Final = 9.2


@dataclass(frozen=True, slots=True)
class LaneParameters:
    """What a study's lanes look like. Made by ``lane_parameters`` only, which checks every bound.

    Attributes:
        max_sites: most envelopes a sum may hold, K.
        bits: width w of one site's value, sign included.
        lanes: values packed in one coefficient, L.
        values: value and validation lanes of an update.
        guard_bits: g, the fewest bits with 2^g >= max_sites.
        lane_bits: width w + g of a value's sum.
        scale: D, the integer by which packed values are multiplied so that noise stays below them.
        max_integer: B = 2^(w-1) - 1, the largest magnitude a site may send.
        modulus_bits: bits of the data prime.
        modulus: the data prime Q.
        coefficients: that are used, up to a multiple of 8; the last polynomial is cut behind them.
        ciphertexts: ciphertexts an envelope.
    """

    max_sites: int
    bits: int
    lanes: int
    values: int
    guard_bits: int
    lane_bits: int
    scale: int
    max_integer: int
    modulus_bits: int
    modulus: int
    coefficients: int
    ciphertexts: int

    @property
    def payload_bytes(self) -> int:
        """Bytes of an encrypted payload: of an envelope's, and of a record's however many contributors it has."""
        return packed_bytes(self.coefficients, self.modulus_bits)

    def noise_in_lane(self, sites: int) -> int:
        """How far the noise of a sum of ``sites`` envelopes can move the integer in a coefficient, and with it lane 0:
        r = floor(21 n / D + 1 / 2). Honest noise does so hardly ever (see ``lane_parameters``)."""
        return (2 * NOISE_MOST * sites + self.scale) // (2 * self.scale)


def lane_parameters(max_sites: int, bits: int, lanes: int | None, values: int) -> LaneParameters:
    """Derive all parameters of a study's lanes.

    A coefficient of an envelope is e + D m: m packs L values as digits of base 2^(w + g), e is SEAL's noise, the
    difference of two binomials of 21 coins, |e| <= 21. D is the least integer >= 2 * 9.2 * 3.25 sqrt(K). The sum of K
    coefficients is rounded wrongly if the sum of their noise, which is a binomial of 42 K coins less its mean 21 K,
    reaches D / 2: that has probability 5e-22 at K = 4 and 2.7e-20 at K = 1,000, exactly by the binomial's tail
    (``tests/unit/protocol/test_packing.py`` computes it for every K up to 1,000: at most 2.9e-20; 3e-15 for a round
    of 10^5 coefficients). With M = K B (2^(L (w + g)) - 1) / (2^(w + g) - 1), the largest magnitude of a sum of m,
    everything fits while 2 (D M + 21 K) < Q; Q is the smallest of the primes for which it does.

    Args:
        max_sites: most sites a round may sum, >= 1.
        bits: width of a value in bits, sign included, 8 to 21.
        lanes: values a coefficient, 2 to 6; None for the number that takes the fewest bytes.
        values: values an update, >= 1.

    Raises:
        LanesError: a bound is broken; the message names it and what would fit.
    """
    if max_sites < 1:
        raise LanesError(f"max_sites is {max_sites}; expected at least 1; set it in the study")
    if values < 1:
        raise LanesError(f"values is {values}; expected at least 1; the adapter shares no parameter")
    if not MIN_BITS <= bits <= MAX_BITS:
        raise LanesError(f"bits is {bits}; expected {MIN_BITS} to {MAX_BITS}; {_what_fits(max_sites)}")
    if lanes is None:
        lanes = _fewest_bytes(max_sites, bits)
    if not MIN_LANES <= lanes <= MAX_LANES:
        raise LanesError(f"lanes is {lanes}; expected {MIN_LANES} to {MAX_LANES}; {_what_fits(max_sites)}")
    modulus_bits = _modulus_bits(max_sites, bits, lanes)
    if modulus_bits is None:
        raise LanesError(f"{bits} bits for {max_sites} sites do not fit into {lanes} lanes; {_what_fits(max_sites)}")
    guard_bits, scale = _guard_and_scale(max_sites)
    coefficients = GROUP * -(-values // (GROUP * lanes))
    return LaneParameters(
        max_sites=max_sites,
        bits=bits,
        lanes=lanes,
        values=values,
        guard_bits=guard_bits,
        lane_bits=bits + guard_bits,
        scale=scale,
        max_integer=2 ** (bits - 1) - 1,
        modulus_bits=modulus_bits,
        modulus=PRIMES[modulus_bits],
        coefficients=coefficients,
        ciphertexts=-(-coefficients // DEGREE),
    )


def largest_bits(max_sites: int, lanes: int) -> int:
    """Largest width w whose lanes hold the sum of ``max_sites`` sites exactly.

    Args:
        max_sites: most sites a round may sum, >= 1.
        lanes: values a coefficient, >= 1.

    Returns:
        Bits, sign included, at most MAX_BITS; 0 if not even MIN_BITS fit.
    """
    fitting = (bits for bits in range(MAX_BITS, MIN_BITS - 1, -1) if _modulus_bits(max_sites, bits, lanes))
    return next(fitting, 0)


def usual_bits(max_sites: int, lanes: int) -> int:
    """Width of the values of a study that names none: ``USUAL_BITS``, or the most that fit so many sites.

    Args:
        max_sites: most sites a round may sum, >= 1.
        lanes: that must hold them.
    """
    return min(USUAL_BITS, largest_bits(max_sites, lanes) or MIN_BITS)


def _fewest_bytes(max_sites: int, bits: int) -> int:
    """The lanes with the fewest bits of the modulus a value; of two alike, the fewer lanes."""
    costs = {
        lanes: modulus_bits / lanes
        for lanes in LANES
        if (modulus_bits := _modulus_bits(max_sites, bits, lanes)) is not None
    }
    if not costs:
        raise LanesError(f"no lanes hold {bits} bits for {max_sites} sites; {_what_fits(max_sites)}")
    return min(costs, key=lambda lanes: costs[lanes])


def _modulus_bits(max_sites: int, bits: int, lanes: int) -> int | None:
    """Bits of the smallest prime that holds a full sum and its noise; None if none does."""
    guard_bits, scale = _guard_and_scale(max_sites)
    base = 1 << (bits + guard_bits)
    most = max_sites * (2 ** (bits - 1) - 1) * ((base**lanes - 1) // (base - 1))
    needed = 2 * (scale * most + NOISE_MOST * max_sites)
    return next((size for size, prime in PRIMES.items() if needed < prime), None)


def _guard_and_scale(max_sites: int) -> tuple[int, int]:
    return (max_sites - 1).bit_length(), math.ceil(2 * _NOISE_MARGIN * _NOISE * math.sqrt(max_sites))


def _what_fits(max_sites: int) -> str:
    """What a study of so many sites can have, for messages."""
    most = {lanes: bits for lanes in LANES if (bits := largest_bits(max_sites, lanes))}
    if not most:
        return f"for {max_sites} sites nothing fits: lower max_sites"
    fitting = ", ".join(f"{bits} bits in {lanes} lanes" for lanes, bits in most.items())
    widest = max(most.values())
    return f"for {max_sites} sites at most {fitting} fit: set bits = {widest} or less, or leave bits and lanes out"


def pack_lanes(integers: Integers, parameters: LaneParameters) -> Integers:
    """Lay integers into coefficients: ``lanes`` integers each, as digits of base 2^lane_bits, the first the lowest.

    Args:
        integers: int64 of shape (values,), magnitudes at most max_integer.
        parameters: the study's lanes.

    Returns:
        int64 of shape (coefficients,), unscaled; what lies behind the last integer is zero.
    """
    padded = np.zeros(parameters.coefficients * parameters.lanes, np.int64)
    padded[: parameters.values] = integers
    digits = padded.reshape(-1, parameters.lanes)
    packed = digits[:, -1].copy()
    for lane in range(parameters.lanes - 2, -1, -1):
        packed <<= parameters.lane_bits
        packed += digits[:, lane]
    return packed


def unpack_lanes(packed: Integers, parameters: LaneParameters) -> Integers:
    """Undo ``pack_lanes`` on a sum of up to ``max_sites`` packings, exactly.

    Args:
        packed: int64 of shape (coefficients,).
        parameters: the study's lanes.

    Returns:
        int64 of shape (coefficients, lanes): the sums in turn, then the padding, which is zero in an honest sum. All
        lanes but the last of a coefficient lie in [-2^(lane_bits-1), 2^(lane_bits-1)); the last holds whatever
        remains, so that an overflow shows there.
    """
    rest = packed.copy()
    digits = np.empty((rest.size, parameters.lanes), np.int64)
    half = 1 << (parameters.lane_bits - 1)
    for lane in range(parameters.lanes - 1):
        # Round half down to the next multiple of the base, so that the digit is balanced.
        carry = (rest + half) >> parameters.lane_bits
        digits[:, lane] = rest - (carry << parameters.lane_bits)
        rest = carry
    digits[:, -1] = rest
    return digits


def in_range(lanes: Integers, parameters: LaneParameters, sites: int) -> bool:
    """Whether every lane of a sum is one that ``sites`` envelopes within the bounds can give.

    Lane 0 of a coefficient may be off by what noise can do at most (:meth:`LaneParameters.noise_in_lane`): a site that
    sends the largest lawful noise does no more than one that sends an integer more. It does not carry into lane 1.

    Args:
        lanes: int64 of shape (coefficients, lanes), from ``unpack_lanes``.
        parameters: the study's lanes.
        sites: contributors of the sum.
    """
    noise, most = parameters.noise_in_lane(sites), sites * parameters.max_integer
    padding = lanes.reshape(-1)[parameters.values :]
    in_lane_0 = np.arange(parameters.values, lanes.size) % parameters.lanes == 0
    return bool(
        _largest(lanes[:, 0]) <= most + noise
        and _largest(lanes[:, 1:]) <= most
        and (np.abs(padding) <= np.where(in_lane_0, noise, 0)).all()
    )


def _largest(integers: Integers) -> int:
    """Largest magnitude, without the copy that taking all magnitudes would be."""
    return max(int(integers.max()), -int(integers.min()))


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
    largest = _largest(integers)
    if largest > parameters.max_integer:
        raise LanesError(
            f"an integer of magnitude {largest}; expected at most {parameters.max_integer} "
            f"({parameters.bits} bits); clip before sealing"
        )


class Wire(Protocol):
    """What the payloads of envelopes and records are, and how envelopes add up to a record without a key."""

    @property
    def payload_bytes(self) -> int:
        """Exact length of a payload, of an envelope as of a record."""
        ...

    def zero(self) -> npt.NDArray[np.generic]:
        """Make an empty total for ``add``."""
        ...

    def add(self, total: npt.NDArray[np.generic], payload: bytes | memoryview) -> npt.NDArray[np.generic]:
        """Check an envelope's payload as far as that goes without a key, and add it.

        Args:
            total: of the envelopes before, in whatever order. It stays as it is, whatever the payload is.
            payload: hostile bytes.

        Returns:
            The new total.

        Raises:
            EnvelopeError: wrong length, a residue >= Q, or in plain mode an integer beyond max_integer.
        """
        ...

    def record(self, total: npt.NDArray[np.generic], sites: int) -> bytes:
        """Make a record's payload from the total of ``sites`` envelopes.

        Raises:
            LanesError: no contributor, more than max_sites, or a total that is not of so many: a bug
                of the caller.
        """
        ...

    def check_words(self, digest: str, payload: bytes) -> tuple[int, int]:
        """The linear check of an envelope's or a record's payload: a record's is the sum of its envelopes', modulo
        :attr:`modulus`.

        Args:
            digest: of the ARRIVED, from which the check is drawn.
            payload: of the right length, else EnvelopeError.
        """
        ...

    @property
    def modulus(self) -> int:
        """What the linear check is computed modulo."""
        ...


def wire(mode: Literal["he", "plain"], parameters: LaneParameters) -> Wire:
    """Return the wire of a study's mode."""
    return CipherWire(parameters) if mode == "he" else PlainWire(parameters)


class CipherWire:
    """The encrypted wire: nothing travels but the used coefficients of first polynomials, packed at the prime's bits.

    The seed from which second polynomials follow stands in an envelope's header. A total is uint64 of shape
    (coefficients,), each below Q.
    """

    def __init__(self, parameters: LaneParameters) -> None:
        self._parameters = parameters

    @property
    def payload_bytes(self) -> int:
        """Exact length of a payload; see ``Wire.payload_bytes``."""
        return self._parameters.payload_bytes

    def zero(self) -> npt.NDArray[np.generic]:
        """Make an empty total."""
        return np.zeros(self._parameters.coefficients, np.uint64)

    def add(self, total: npt.NDArray[np.generic], payload: bytes | memoryview) -> npt.NDArray[np.generic]:
        """Check an envelope's residues and add them modulo Q, in one pass; see ``Wire.add``."""
        _check_length("payload", len(payload), self.payload_bytes)
        return sum_with_packed(self._checked(total), payload, self._parameters.modulus_bits)

    def record(self, total: npt.NDArray[np.generic], sites: int) -> bytes:
        """Make a record's payload; see ``Wire.record``."""
        _check_cohort_size(sites, self._parameters)
        return pack_residues(self._checked(total), self._parameters.modulus_bits)

    def residues(self, payload: bytes) -> Residues:
        """Read a payload: uint64 of shape (coefficients,), each below Q.

        Raises:
            EnvelopeError: wrong length or a residue >= Q.
        """
        _check_length("payload", len(payload), self.payload_bytes)
        return unpack_residues(payload, self._parameters.modulus_bits)

    @property
    def modulus(self) -> int:
        """The data prime; see ``Wire.modulus``."""
        return self._parameters.modulus

    def check_words(self, digest: str, payload: bytes) -> tuple[int, int]:
        """The linear check of a payload; see ``Wire.check_words``."""
        return linear_check(digest, self.residues(payload), self.modulus)

    def _checked(self, total: npt.NDArray[np.generic]) -> Residues:
        if total.dtype != np.uint64 or total.shape != (self._parameters.coefficients,):
            raise LanesError(f"a total of {total.dtype} {total.shape}; use the one that zero() made")
        return cast(Residues, total)


class PlainWire:
    """The wire without encryption: little-endian int32 values.

    Envelope and record have the same form; a total is int64 of shape (values,).
    """

    def __init__(self, parameters: LaneParameters) -> None:
        self._parameters = parameters

    @property
    def payload_bytes(self) -> int:
        """Exact length of a payload; see ``Wire.payload_bytes``."""
        return 4 * self._parameters.values

    def zero(self) -> npt.NDArray[np.generic]:
        """Make an empty total."""
        return np.zeros(self._parameters.values, np.int64)

    def add(self, total: npt.NDArray[np.generic], payload: bytes | memoryview) -> npt.NDArray[np.generic]:
        """Check an envelope's integers and add them; see ``Wire.add``."""
        return self._checked(total) + self.integers(payload, 1)

    def record(self, total: npt.NDArray[np.generic], sites: int) -> bytes:
        """Make a record's payload; see ``Wire.record``."""
        _check_cohort_size(sites, self._parameters)
        sums = self._checked(total)
        bound = sites * self._parameters.max_integer
        if int(sums.max()) > bound or int(sums.min()) < -bound:
            raise LanesError(f"a total beyond {bound}, the most that {sites} envelopes can sum to")
        return sums.astype("<i4").tobytes()

    def integers(self, payload: bytes | memoryview, contributors: int) -> Integers:
        """Read an envelope (``contributors`` = 1) or a record.

        Returns:
            int64 of shape (values,), magnitudes at most contributors * max_integer.

        Raises:
            EnvelopeError: wrong length or an integer beyond the bound.
        """
        _check_length("payload", len(payload), self.payload_bytes)
        integers = np.frombuffer(payload, "<i4").astype(np.int64)
        bound = contributors * self._parameters.max_integer
        largest = _largest(integers)
        if largest > bound:
            raise EnvelopeError(
                f"an integer of magnitude {largest}; expected at most {bound}; "
                "the payload was damaged or forged, ask its sender to send it again"
            )
        return integers

    @property
    def modulus(self) -> int:
        """The study's data prime; see ``Wire.modulus``."""
        return self._parameters.modulus

    def check_words(self, digest: str, payload: bytes) -> tuple[int, int]:
        """The linear check of a payload's integers as residues; see ``Wire.check_words``."""
        _check_length("payload", len(payload), self.payload_bytes)
        integers = np.frombuffer(payload, "<i4").astype(np.int64)
        return linear_check(digest, np.remainder(integers, self.modulus).view(np.uint64), self.modulus)

    def _checked(self, total: npt.NDArray[np.generic]) -> Integers:
        if total.dtype != np.int64 or total.shape != (self._parameters.values,):
            raise LanesError(f"a total of {total.dtype} {total.shape}; use the one that zero() made")
        return cast(Integers, total)


@dataclass(frozen=True, slots=True)
class Contribution:
    """Whose update an envelope holds.

    Attributes:
        site: the site's name in the study.
        seed: from which its second polynomials follow, 64 hex digits; ``NO_SEED`` in plain mode.
    """

    site: str
    seed: str


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


class Sealed(NamedTuple):
    """What a site sends of one update: who and under which seed, and an envelope's payload."""

    contribution: Contribution
    payload: bytes


class Sealer(Protocol):
    """Seals a site's integers for one round, and opens the round's sum."""

    def seal(self, integers: Integers, binding: Binding, site: str) -> Sealed:
        """Seal one update, under a fresh seed and with fresh noise: a second sealing shows neither of the first.

        Args:
            integers: int64 of shape (values,), magnitudes at most max_integer.
            binding: the round.
            site: see ``Contribution``.

        Raises:
            LanesError: wrong type, shape or magnitude: a bug of the caller.
        """
        ...

    def open(self, record_payload: bytes, binding: Binding, cohort: Sequence[Contribution]) -> Integers:
        """Open a record's sum, which was held against its cohort's words before.

        Args:
            record_payload: what ``Wire.record`` made.
            binding: the round.
            cohort: the contributors whose headers were signed, each site once, at most max_sites.

        Returns:
            The exact sums, int64 of shape (values,).

        Raises:
            AggregateRefused: it is no sum of so many envelopes within the study's bounds.
        """
        ...


class PlainSealer:
    """Implements Sealer without a key, for studies in plain mode: no secrecy."""

    def __init__(self, parameters: LaneParameters) -> None:
        self._parameters = parameters
        self._wire = PlainWire(parameters)

    def seal(self, integers: Integers, binding: Binding, site: str) -> Sealed:
        """Write the integers down; see ``Sealer.seal``."""
        check_integers(integers, self._parameters)
        return Sealed(Contribution(site, NO_SEED), integers.astype("<i4").tobytes())

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

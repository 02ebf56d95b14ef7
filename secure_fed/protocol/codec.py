"""An update as bounded integers, and a sum of integers as the average update. numpy only, elementwise.

Everything here is elementwise float64 arithmetic in a fixed order, so that all sites get the same bits on any
CPU: no dot products, no torch. Parameters are laid out flat in the order of their sorted names.
"""

from __future__ import annotations

import hashlib
import hmac
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from numpy.typing import NDArray

from secure_fed.core.errors import LanesError, NonFiniteUpdateError
from secure_fed.protocol.packing import MIN_BITS, LaneParameters, lane_parameters

COUNT_BITS = 24
"""Width of a validation count."""

MOST_COUNTED = (1 << COUNT_BITS) - 1
"""Highest validation count of a site, 16.7 million images."""

COUNTS = "counts"
"""Name of the block of validation counts."""

UPDATE = "update"
"""Name of the block of an update's values."""

EXACT_BITS = 53
"""Bits of an integer that float64 holds exactly."""

Parameters = dict[str, NDArray[np.float64]]
"""The tensors of an adapter by name, or of an update of it."""


@dataclass(frozen=True)
class Quantised:
    """An update as integers.

    Attributes:
        integers: int64 [values], each in [-max_integer, max_integer].
        saturated: share of coordinates beyond the value bound, in [0, 1].
        error: root mean square difference between the integers' values and the clipped update.
    """

    integers: NDArray[np.int64]
    saturated: float
    error: float


def flatten(parameters: Parameters) -> NDArray[np.float64]:
    """All parameters as one float64 vector, sorted by name."""
    return np.concatenate([np.asarray(parameters[name], dtype=np.float64).ravel() for name in sorted(parameters)])


def unflatten(flat: NDArray[np.float64], shapes: Mapping[str, tuple[int, ...]]) -> Parameters:
    """Inverse of :func:`flatten`."""
    parameters: Parameters = {}
    start = 0
    for name in sorted(shapes):
        size = math.prod(shapes[name])
        parameters[name] = flat[start : start + size].reshape(shapes[name]).copy()
        start += size
    return parameters


def value_bounds(
    shapes: Mapping[str, tuple[int, ...]], bound: float, exceptions: Mapping[str, float]
) -> NDArray[np.float64]:
    """The public bound of each coordinate of the flat update, float64 [values]."""
    return np.concatenate(
        [np.full(math.prod(shapes[name]), exceptions.get(name, bound), dtype=np.float64) for name in sorted(shapes)]
    )


def rounding_draws(seed: int, run: str, site: str, round_number: int, count: int) -> NDArray[np.float64]:
    """Uniform draws in [0, 1) for unbiased rounding without DP, float64 [count] of 32 bits each.

    A counter PRF (ChaCha20 keystream) of study seed, run, site and round: ``he``, ``plain`` and a restart round alike,
    two runs do not. Anyone who knows the run can compute them; under DP they must come from the operating system
    instead.
    """
    context = f"secfacmic rounding 2\n{seed}\n{run}\n{site}\n{round_number}".encode()
    key = hashlib.sha256(context).digest()
    stream = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor().update(bytes(4 * count))
    draws: NDArray[np.float64] = np.frombuffer(stream, dtype="<u4") * 2.0**-32
    return draws


def quantise(
    update: NDArray[np.float64],
    bounds: NDArray[np.float64],
    weight: float,
    max_integer: int,
    draws: NDArray[np.float64],
) -> Quantised:
    """Clip each coordinate to its bound, scale by the site's weight and round without bias.

    ``integer = floor(clip(update) / bound * max_integer * weight + draw)``, whose expectation over the draw is
    the scaled value itself.

    Args:
        update: float64 [values].
        bounds: float64 [values], positive.
        weight: the site's public study weight, in (0, 1].
        max_integer: largest integer of a lane.
        draws: float64 [values] in [0, 1).

    Raises:
        NonFiniteUpdateError: the update has NaN or infinite values. Large values only saturate.
    """
    bad = int(np.count_nonzero(~np.isfinite(update)))
    if bad:
        raise NonFiniteUpdateError(
            f"{bad} of {update.size} values of the update are NaN or infinite; expected finite values; "
            "nothing was sent; lower the study's learning rate or look for a broken image"
        )
    clipped = np.clip(update, -bounds, bounds)
    scale = max_integer * weight
    scaled = clipped / bounds * scale
    # A draw of nearly 1 on an exactly saturated value must not step over the edge.
    integers = np.minimum(np.floor(scaled + draws), max_integer).astype(np.int64)
    difference = integers / scale * bounds - clipped
    return Quantised(
        integers=integers,
        saturated=float(np.count_nonzero(np.abs(update) > bounds) / update.size),
        error=float(np.sqrt(np.mean(difference * difference))),
    )


def average_update(
    sums: NDArray[np.int64], bounds: NDArray[np.float64], weights: Iterable[float], max_integer: int
) -> NDArray[np.float64]:
    """The weighted average update that a sum of integers stands for, float64 [values].

    ``sums * bound / (max_integer * sum of the cohort's weights)``, the weights added exactly (in any order).
    """
    update: NDArray[np.float64] = sums * bounds
    update /= max_integer * math.fsum(weights)
    return update


@dataclass(frozen=True)
class Digits:
    """How integers of any width travel in lanes: as digits in base 2^(bits - 1), lowest first, all of their sign.

    A digit fits its lane, sign included, and digits add up as the integers do, so that a sum over any number of sites
    that the lanes hold is exact whatever the integers' width.

    Attributes:
        bits: width of a lane's value, sign included.
        precision: width of an integer, sign included.
    """

    bits: int
    precision: int

    @property
    def count(self) -> int:
        """Lanes that one integer takes."""
        return -(-(self.precision - 1) // (self.bits - 1))

    @property
    def max_integer(self) -> int:
        """The largest magnitude of an integer."""
        return (1 << (self.precision - 1)) - 1

    def split(self, integers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Digits of integers [n] of at most ``max_integer``, int64 [n * count], an integer's side by side."""
        width = self.bits - 1
        places = width * np.arange(self.count)
        magnitudes = np.abs(integers)[:, None] >> places & ((1 << width) - 1)
        return np.asarray(np.sign(integers)[:, None] * magnitudes).ravel()

    def join(self, sums: NDArray[np.int64]) -> NDArray[np.int64]:
        """The sums of integers, int64 [n], that sums of their digits stand for."""
        places = np.int64(1) << ((self.bits - 1) * np.arange(self.count))
        return np.asarray((sums.reshape(-1, self.count) * places).sum(axis=1))


@dataclass(frozen=True)
class Block:
    """Values of one kind in a round's message.

    Attributes:
        name: of the kind.
        bounds: public bound of each value, float64 [n], positive; what lies beyond saturates.
        precision: bits of the integer that stands for a value, sign included.
        weighted: whether the values are averaged by the sites' weights and rounded by draws, as updates are; else they
            are summed as they are and rounded to the nearest.
    """

    name: str
    bounds: NDArray[np.float64]
    precision: int
    weighted: bool = False


@dataclass(frozen=True)
class Layout:
    """What the integers of one round's message are: the values of each block in turn, as digits.

    Attributes:
        blocks: of values.
        lanes: the packing that they give.
    """

    blocks: tuple[Block, ...]
    lanes: LaneParameters

    def encode(
        self, values: Mapping[str, NDArray[np.float64]], weight: float, draws: NDArray[np.float64]
    ) -> tuple[NDArray[np.int64], dict[str, Quantised]]:
        """A site's integers, int64 [lanes.values], and how each block was rounded.

        Args:
            values: of each block, float64 [n].
            weight: the site's public study weight, in (0, 1]; of weighted blocks.
            draws: uniform in [0, 1), one for each value of the weighted block, if there is one.

        Raises:
            NonFiniteUpdateError: a value is NaN or infinite.
        """
        parts, rounded = [], {}
        for block in self.blocks:
            digits = self._digits(block)
            scale, by = (weight, draws) if block.weighted else (1.0, np.full(block.bounds.size, 0.5))
            rounded[block.name] = quantise(values[block.name], block.bounds, scale, digits.max_integer, by)
            parts.append(digits.split(rounded[block.name].integers))
        return np.concatenate(parts), rounded

    def decode(self, sums: NDArray[np.int64], weights: Iterable[float]) -> dict[str, NDArray[np.float64]]:
        """What sums of integers stand for, by block, float64 [n]: weighted averages, and plain sums.

        Args:
            sums: int64 [lanes.values], over a cohort.
            weights: the cohort's, in any order.
        """
        found, start, shares = {}, 0, list(weights)
        for block in self.blocks:
            digits = self._digits(block)
            end = start + block.bounds.size * digits.count
            divisor = shares if block.weighted else [1.0]
            found[block.name] = average_update(digits.join(sums[start:end]), block.bounds, divisor, digits.max_integer)
            start = end
        return found

    def _digits(self, block: Block) -> Digits:
        return Digits(self.lanes.bits, block.precision)


def layout_of(blocks: Iterable[Block], max_sites: int, bits: int, lanes: int | None) -> Layout:
    """Lay blocks out in lanes.

    Args:
        blocks: in their order.
        max_sites, bits, lanes: as for :func:`secure_fed.protocol.packing.lane_parameters`.

    Raises:
        LanesError: the lanes do not hold them, or a sum is too wide to be exact as float64.
    """
    held = tuple(blocks)
    for block in held:
        check_precision(block.precision, max_sites)
    values = sum(block.bounds.size * Digits(bits, block.precision).count for block in held)
    return Layout(held, lane_parameters(max_sites, bits, lanes, values))


def check_precision(precision: int, max_sites: int) -> None:
    """Refuse integers whose sum over sites float64 does not hold exactly.

    Raises:
        LanesError: naming the most that would do.
    """
    most = EXACT_BITS + 1 - (max_sites - 1).bit_length()
    if precision > most:
        raise LanesError(
            f"a precision of {precision} bits; sums over {max_sites} sites hold at most {most} exactly: take that, or "
            "fewer sites"
        )


def lane_width(precision: int, max_sites: int, lanes: int | None) -> int:
    """The width of lanes in which values of a precision take the fewest bytes, whole or as digits.

    Args:
        precision: bits of a value, sign included.
        max_sites, lanes: as for :func:`secure_fed.protocol.packing.lane_parameters`.

    Raises:
        LanesError: no lanes hold them.
    """
    check_precision(precision, max_sites)
    costs: dict[int, float] = {}
    for digits in range(1, precision):
        width = max(MIN_BITS, 1 - (1 - precision) // digits)
        try:
            found = lane_parameters(max_sites, width, lanes, values=1)
        except LanesError:
            if width == MIN_BITS:
                break
            continue
        costs.setdefault(width, digits * found.modulus_bits / found.lanes)
        if width == MIN_BITS:
            break
    if not costs:
        lane_parameters(max_sites, MIN_BITS, lanes, values=1)
    return min(costs, key=lambda width: costs[width])


def counts_block() -> Block:
    """Validation images of a site, and correct ones among them: two whole numbers."""
    precision = COUNT_BITS + 1
    return Block(COUNTS, np.full(2, float(MOST_COUNTED)), precision)


def adapter_digest(parameters: Mapping[str, NDArray[np.float64]]) -> str:
    """SHA-256 over names, shapes and float64 values (little-endian), as 64 hex digits."""
    digest = hashlib.sha256(b"secfacmic adapter 1\n")
    for name in sorted(parameters):
        value = np.ascontiguousarray(parameters[name], dtype="<f8")
        digest.update(f"{name} {value.shape}\n".encode())
        digest.update(value.tobytes())
    return digest.hexdigest()


def attestation(key: bytes, site: str, head: str, digest: str) -> str:
    """Keyed digest by which a site tells the others, through the server, which adapter it holds at a head.

    HMAC-SHA256 under a key that the server lacks, so that the server can neither confirm a guess of the adapter
    nor make one up; 64 hex digits.
    """
    message = f"secfacmic attestation 1\n{site}\n{head}\n{digest}".encode()
    return hmac.new(key, message, hashlib.sha256).hexdigest()

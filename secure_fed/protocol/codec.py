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

from secure_fed.core.errors import NonFiniteUpdateError

COUNT_BITS = 24
"""Width of a validation count: up to 16.7 million images a site."""

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


def rounding_draws(seed: int, site: str, round_number: int, count: int) -> NDArray[np.float64]:
    """Uniform draws in [0, 1) for unbiased rounding without DP, float64 [count] of 32 bits each.

    A counter PRF (ChaCha20 keystream) of study seed, site and round: ``he``, ``plain`` and a rerun round alike.
    Anyone who knows the study can compute them; under DP they must come from the operating system instead.
    """
    context = f"secfacmic rounding 1\n{seed}\n{site}\n{round_number}".encode()
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
    divisor = max_integer * math.fsum(weights)
    return sums.astype(np.float64) * bounds / divisor


def count_lanes(bits: int) -> int:
    """Lanes that one validation count needs, as non-negative digits of ``bits - 1`` bits."""
    return -(-COUNT_BITS // (bits - 1))


def encode_counts(counts: tuple[int, int], bits: int) -> NDArray[np.int64]:
    """Two counts (validation images, correct ones) as digits of ``bits - 1`` bits, int64 [2 * digits]."""
    width = bits - 1
    limit = (1 << COUNT_BITS) - 1
    return np.array(
        [
            min(count, limit) >> (width * place) & ((1 << width) - 1)
            for count in counts
            for place in range(count_lanes(bits))
        ],
        dtype=np.int64,
    )


def decode_counts(sums: NDArray[np.int64], bits: int) -> tuple[int, int]:
    """Inverse of :func:`encode_counts` for a sum over sites."""
    width = bits - 1
    first, second = np.split(sums, 2)
    images, correct = (
        sum(int(digit) << (width * place) for place, digit in enumerate(part)) for part in (first, second)
    )
    return images, correct


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

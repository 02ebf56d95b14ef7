"""Arithmetic modulo the data prime against Python's integers."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher as StreamCipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from hypothesis import given, settings
from hypothesis import strategies as st

from secure_fed.core.errors import EnvelopeError
from secure_fed.protocol import residues
from secure_fed.protocol.residues import (
    PRIMES,
    Residues,
    Stream,
    SumOfStreams,
    add_into,
    centre,
    expand,
    linear_check,
    multiply,
    pack_residues,
    packed_bytes,
    sum_with_packed,
    uncentre,
    unpack_residues,
)

BITS = st.sampled_from(sorted(PRIMES))


def words_of(key: bytes, count: int, bits: int) -> list[int]:
    stream = StreamCipher(ChaCha20(key, bytes(16)), mode=None).encryptor().update(bytes(8 * count))
    return [int.from_bytes(stream[8 * at : 8 * at + 8], "little") % 2**bits for at in range(count)]


def random_residues(rng: np.random.Generator, count: int, modulus: int) -> Residues:
    """Random ones, and the edges among them."""
    drawn = rng.integers(0, modulus, count, np.uint64)
    edges = np.array([0, 1, modulus - 1, modulus // 2, modulus // 2 + 1, modulus - 2], np.uint64)
    places = rng.integers(0, count, count // 4)
    drawn[places] = rng.choice(edges, places.size)
    return drawn


def test_primes_are_the_largest_of_their_bits_that_are_1_modulo_8192() -> None:
    for bits, prime in PRIMES.items():
        assert prime.bit_length() == bits
        assert prime % 8192 == 1
        # Lucas: 3's order would not divide prime - 1 otherwise; the candidates above it are all composite.
        assert all(pow(base, prime - 1, prime) == 1 for base in (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37))
        for candidate in range(prime + 8192, 1 << bits, 8192):
            assert any(pow(base, candidate - 1, candidate) != 1 for base in (2, 3, 5, 7))


# Streams


@given(st.binary(min_size=32, max_size=32), st.integers(0, 300), BITS)
@settings(max_examples=30)
def test_a_stream_is_words_below_the_modulus_in_order(key: bytes, count: int, bits: int) -> None:
    expected = [word for word in words_of(key, count + 20, bits) if word < PRIMES[bits]][:count]
    assert expand(key, count, PRIMES[bits]).tolist() == expected


@given(st.integers(2, 200), st.integers(0, 3000), st.sampled_from([1, 7, 64, 10**4]))
@settings(max_examples=60)
def test_words_beyond_the_modulus_are_left_out(modulus: int, count: int, block: int) -> None:
    """A small modulus leaves out many, over the ends of blocks too."""
    key = hashlib.sha256(bytes([modulus])).digest()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(residues, "_BLOCK", block)
        found = expand(key, count, modulus)
    words = words_of(key, 3 * count + 500, modulus.bit_length())
    assert found.tolist() == [word for word in words if word < modulus][:count]


def test_streams_are_uniform() -> None:
    drawn = expand(bytes(32), 200_000, PRIMES[44])
    for counts in (
        np.bincount((drawn % np.uint64(64)).astype(np.int64), minlength=64),
        np.bincount((drawn // np.uint64(PRIMES[44] // 64 + 1)).astype(np.int64), minlength=64),
    ):
        expected = drawn.size / 64
        assert ((counts - expected) ** 2 / expected).sum() < 120  # chi square, 63 degrees of freedom: p = 2e-5


@given(st.binary(min_size=32, max_size=32), st.lists(st.integers(0, 60), max_size=8), st.integers(2, 200))
@settings(max_examples=40)
def test_what_a_stream_gives_does_not_depend_on_how_many_are_taken(key: bytes, counts: list[int], modulus: int) -> None:
    stream = Stream(key, modulus)
    taken = [value for count in counts for value in stream.take(count).tolist()]
    assert taken == expand(key, sum(counts), modulus).tolist()


@given(st.integers(1, 300), st.lists(st.integers(1, 20), min_size=1, max_size=3), BITS)
@settings(max_examples=25, deadline=None)
def test_sums_of_streams(count: int, sizes: list[int], bits: int) -> None:
    """Beyond as many as 64 bits hold: 128 of 57 bits."""
    keys = [index.to_bytes(32, "big") for index in range(count)]
    expected = sum(expand(key, sum(sizes), PRIMES[bits]).astype(object) for key in keys) % PRIMES[bits]
    streams = SumOfStreams(keys, PRIMES[bits])
    assert [value for size in sizes for value in streams.take(size).tolist()] == expected.tolist()


def test_sums_of_streams_of_the_largest_words(monkeypatch: pytest.MonkeyPatch) -> None:
    prime = PRIMES[57]
    monkeypatch.setattr(Stream, "take", lambda _, count: np.full(count, prime - 1, np.uint64))
    for count in (126, 127, 128, 129, 1000):
        assert SumOfStreams([bytes(32)] * count, prime).take(2).tolist() == [-count % prime] * 2


# Products and sums


@given(st.integers(0, 2**32), BITS)
@settings(max_examples=60)
def test_products_are_exact(seed: int, bits: int) -> None:
    prime, rng = PRIMES[bits], np.random.default_rng(seed)
    left, right = (random_residues(rng, 400, prime) for _ in range(2))
    expected = [int(a) * int(b) % prime for a, b in zip(left, right, strict=True)]
    assert multiply(left, centre(right, prime), prime).tolist() == expected


@given(st.data(), BITS)
@settings(max_examples=100)
def test_products_near_whole_quotients_are_exact(data: st.DataObject, bits: int) -> None:
    """Where a guess is off most: the largest factors, and products next to a multiple of the prime."""
    prime = PRIMES[bits]
    right = data.draw(st.integers(prime // 2 - 100, prime // 2))
    quotient = data.draw(st.integers(0, prime // 2))
    left = min(prime - 1, (quotient * prime + data.draw(st.integers(-2, 2))) // right % prime)
    for factor in (right, -right):
        found = multiply(np.array([left], np.uint64), np.array([factor]), prime)
        assert found.tolist() == [left * factor % prime]


@given(st.integers(0, 2**32), BITS)
def test_sums_and_centring_are_exact(seed: int, bits: int) -> None:
    prime, rng = PRIMES[bits], np.random.default_rng(seed)
    left, right = (random_residues(rng, 100, prime) for _ in range(2))
    expected = ((left.astype(object) + right.astype(object)) % prime).tolist()
    centred = centre(left, prime)
    assert ((centred.astype(object) - left.astype(object)) % prime == 0).all()
    assert 2 * int(np.abs(centred).max()) < prime
    assert np.array_equal(uncentre(centred, prime), left)
    assert uncentre(np.array([-1, 0, 1 - prime, prime - 1]), prime).tolist() == [prime - 1, 0, 1, prime - 1]
    add_into(left, right.copy(), prime)
    assert left.tolist() == expected


# Packing


@given(st.integers(0, 2**32), BITS, st.integers(1, 40), st.sampled_from([8, 64, 10**6]))
@settings(max_examples=60)
def test_packed_residues_are_one_stream_of_bits(seed: int, bits: int, groups: int, block: int) -> None:
    drawn = random_residues(np.random.default_rng(seed), 8 * groups, PRIMES[bits])
    packed = pack_residues(drawn, bits)
    assert len(packed) == packed_bytes(8 * groups, bits) == groups * bits
    assert int.from_bytes(packed, "little") == sum(int(value) << bits * at for at, value in enumerate(drawn))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(residues, "_BLOCK", block)
        assert np.array_equal(unpack_residues(packed, bits), drawn)


@given(st.integers(0, 2**32), BITS, st.integers(1, 40), st.sampled_from([8, 64, 10**6]))
@settings(max_examples=60)
def test_packed_residues_are_added_to_a_total_that_stays(seed: int, bits: int, groups: int, block: int) -> None:
    rng = np.random.default_rng(seed)
    total, drawn = (random_residues(rng, 8 * groups, PRIMES[bits]) for _ in range(2))
    before = total.copy()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(residues, "_BLOCK", block)
        sums = sum_with_packed(total, memoryview(pack_residues(drawn, bits)), bits)
    assert sums.tolist() == ((total.astype(object) + drawn.astype(object)) % PRIMES[bits]).tolist()
    assert np.array_equal(total, before)


@given(BITS, st.integers(0, 63), st.integers(0, 2), st.sampled_from([8, 64]))
def test_a_residue_that_is_none_is_refused(bits: int, place: int, beyond: int, block: int) -> None:
    drawn = np.full(64, PRIMES[bits] - 1, np.uint64)
    total = drawn.copy()
    unpack_residues(pack_residues(drawn, bits), bits)
    drawn[place] = (PRIMES[bits], PRIMES[bits] + 1, 2**bits - 1)[beyond]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(residues, "_BLOCK", block)
        with pytest.raises(EnvelopeError, match="expected less than the modulus"):
            unpack_residues(pack_residues(drawn, bits), bits)
        with pytest.raises(EnvelopeError, match="expected less than the modulus"):
            sum_with_packed(total, pack_residues(drawn, bits), bits)
    assert total.tolist() == [PRIMES[bits] - 1] * 64


# The linear check


def brute_force_check(digest: str, values: Residues, prime: int) -> tuple[int, ...]:
    found = []
    for number in (1, 2):
        key = hashlib.sha256(b"secfacmic linear check 1" + bytes([number]) + bytes.fromhex(digest)).digest()
        rho = words_of(key, values.size, prime.bit_length())
        assert max(rho) < prime  # one that is not comes once in 2^24
        found.append(sum(int(a) * b for a, b in zip(values, rho, strict=True)) % prime)
    return tuple(found)


@given(st.integers(0, 2**32), st.sampled_from([1, 8, 500]), BITS)
@settings(max_examples=40)
def test_the_check_is_two_products_with_words_of_the_digest(seed: int, count: int, bits: int) -> None:
    values = random_residues(np.random.default_rng(seed), count, PRIMES[bits])
    digest = hashlib.sha256(seed.to_bytes(8, "big")).hexdigest()
    assert linear_check(digest, values, PRIMES[bits]) == brute_force_check(digest, values, PRIMES[bits])


@pytest.mark.parametrize("bits", [44, 57])
def test_the_check_at_the_extremes_over_blocks(bits: int) -> None:
    values = np.full(3 * residues._TERMS + 17, PRIMES[bits] - 1, np.uint64)
    assert linear_check("ab" * 32, values, PRIMES[bits]) == brute_force_check("ab" * 32, values, PRIMES[bits])


@given(st.integers(2, 9), BITS)
@settings(max_examples=20)
def test_the_check_of_a_sum_is_the_sum_of_the_checks(sites: int, bits: int) -> None:
    prime, rng = PRIMES[bits], np.random.default_rng(sites)
    each = [random_residues(rng, 200, prime) for _ in range(sites)]
    total = np.zeros(200, np.uint64)
    for one in each:
        add_into(total, one.copy(), prime)
    checks = [linear_check("cd" * 32, one, prime) for one in each]
    expected = tuple(sum(check[j] for check in checks) % prime for j in (0, 1))
    assert linear_check("cd" * 32, total, prime) == expected
    # What attackers try: one more, scaled, one left out.
    for forged in (
        (total + np.eye(1, 200, 7, dtype=np.uint64)[0]) % np.uint64(prime),
        (total.astype(object) * 2 % prime).astype(np.uint64),
        (total + (np.uint64(prime) - each[0])) % np.uint64(prime),
    ):
        found = linear_check("cd" * 32, forged, prime)
        assert found[0] != expected[0]
        assert found[1] != expected[1]

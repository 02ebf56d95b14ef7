"""Lanes: parameters, packing, the wire and keyless sums."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secure_fed.core.errors import AggregateRefused, EnvelopeError, LanesError
from secure_fed.protocol import packing as lanes
from secure_fed.protocol.packing import (
    DEGREE,
    MODULUS,
    PACKED_BYTES,
    SEED_BYTES,
    Binding,
    CipherWire,
    Contribution,
    LaneParameters,
    PlainSealer,
    PlainWire,
    lane_parameters,
    largest_bits,
    pack_coefficients,
    pack_lanes,
    unpack_coefficients,
    unpack_lanes,
    wire,
)

ROOT = Path(__file__).parents[3]
BINDING = Binding("ab", "cd", 1)


@st.composite
def parameter_sets(draw: st.DrawFn, most_values: int = 30_000) -> LaneParameters:
    max_sites = draw(st.sampled_from([1, 2, 3, 4, 5, 8, 9, 16, 33, 64, 256]))
    lanes_a_real = draw(st.sampled_from([2, 3]))
    most = largest_bits(max_sites, lanes_a_real)
    if most < lanes.MIN_BITS:
        lanes_a_real, most = 2, largest_bits(max_sites, 2)
    bits = draw(st.integers(lanes.MIN_BITS, most))
    return lane_parameters(max_sites, bits, lanes_a_real, draw(st.integers(1, most_values)))


def random_coefficients(seed: int, ciphertexts: int) -> lanes.Coefficients:
    return np.random.default_rng(seed).integers(0, MODULUS, (ciphertexts, DEGREE), np.uint64)


# Parameters


@pytest.mark.parametrize(
    ("max_sites", "two", "three"),
    [(4, 18, 11), (8, 17, 10), (16, 16, 9), (32, 14, 8), (64, 13, 7), (256, 11, 4)],
)
def test_largest_bits_are_those_of_the_design(max_sites: int, two: int, three: int) -> None:
    for lanes_a_real, most in ((2, two), (3, three)):
        assert largest_bits(max_sites, lanes_a_real) == most
        if most >= 8:
            assert lane_parameters(max_sites, most, lanes_a_real, 1).bits == most
            with pytest.raises(LanesError, match=rf"capacity.*largest bits .* is {most}$"):
                lane_parameters(max_sites, most + 1, lanes_a_real, 1)
        else:
            for bits in (most, 8):
                with pytest.raises(LanesError, match="no bits fit"):
                    lane_parameters(max_sites, bits, lanes_a_real, 1)


def test_no_bits_at_all() -> None:
    assert largest_bits(2**40, 2) == 0


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((0, 8, 2, 1), "max_sites is 0"),
        ((4, 8, 1, 1), "lanes is 1"),
        ((4, 8, 4, 1), "lanes is 4"),
        ((4, 8, 2, 0), "values is 0"),
        ((4, 7, 2, 1), "bits is 7; expected at least 8"),
        ((4, 19, 2, 1), "capacity"),
    ],
)
def test_refusals_name_the_bound(arguments: tuple[int, int, int, int], named: str) -> None:
    with pytest.raises(LanesError, match=named):
        lane_parameters(*arguments)


@given(parameter_sets())
def test_derived_parameters(parameters: LaneParameters) -> None:
    p = parameters
    assert 2**p.guard_bits >= p.max_sites
    assert p.guard_bits == 0 or 2 ** (p.guard_bits - 1) < p.max_sites
    assert p.lane_bits == p.bits + p.guard_bits
    assert p.scale == pytest.approx(2 * 9.2 * 3.25 * (4096 * p.max_sites / 2) ** 0.5)
    assert p.scale * 2**0.5 * 2 ** (p.lanes * p.lane_bits - 1) < 2**53
    assert p.tag_digits * (p.bits - 1) >= 61 > (p.tag_digits - 1) * (p.bits - 1)
    assert p.integers == p.values + 2 * p.tag_digits
    assert (p.ciphertexts - 1) * p.integers_per_ciphertext < p.integers
    assert p.integers <= p.ciphertexts * p.integers_per_ciphertext
    # The sums' magnitudes stay below half a lane, and a real below what q holds.
    assert p.max_sites * p.max_integer < 2 ** (p.lane_bits - 1)
    # The exact dot products of ckks.py count on this.
    assert p.lane_bits <= 21


# Coefficients


@given(st.integers(0, 2**32), st.integers(1, 3))
@settings(max_examples=20)
def test_coefficients_round_trip(seed: int, ciphertexts: int) -> None:
    coefficients = random_coefficients(seed, ciphertexts)
    packed = pack_coefficients(coefficients)
    assert len(packed) == ciphertexts * PACKED_BYTES == ciphertexts * 27648
    assert np.array_equal(unpack_coefficients(packed, ciphertexts), coefficients)


def test_packing_is_one_little_endian_bit_stream() -> None:
    coefficients = random_coefficients(1, 1)
    coefficients[0, :3] = MODULUS - 1, 0, MODULUS - 1
    stream = sum(int(value) << (54 * index) for index, value in enumerate(coefficients[0]))
    assert pack_coefficients(coefficients) == stream.to_bytes(PACKED_BYTES, "little")


@given(st.integers(0, DEGREE - 1), st.sampled_from([MODULUS, MODULUS + 1, 2**54 - 1]), st.integers(0, 1))
def test_a_coefficient_not_below_q_is_refused(index: int, value: int, ciphertext: int) -> None:
    coefficients = np.zeros((2, DEGREE), np.uint64)
    coefficients[ciphertext, index] = MODULUS - 1
    unpack_coefficients(pack_coefficients(coefficients), 2)
    coefficients[ciphertext, index] = value
    with pytest.raises(EnvelopeError, match=f"a coefficient is {value}"):
        unpack_coefficients(pack_coefficients(coefficients), 2)


@pytest.mark.parametrize("change", [-1, 1, -PACKED_BYTES])
def test_packed_of_another_length_is_refused(change: int) -> None:
    with pytest.raises(EnvelopeError, match="expected 27648"):
        unpack_coefficients(bytes(PACKED_BYTES + change), 1)


# Lanes


@given(parameter_sets(), st.integers(0, 2**32), st.sampled_from(["random", "most", "least", "mixed", "zero"]))
@settings(max_examples=60, deadline=None)
def test_lanes_of_sums_are_exact(parameters: LaneParameters, seed: int, kind: str) -> None:
    rng = np.random.default_rng(seed)
    most, size = parameters.max_integer, parameters.integers
    one = {
        "random": lambda: rng.integers(-most, most + 1, size),
        "most": lambda: np.full(size, most),
        "least": lambda: np.full(size, -most),
        "mixed": lambda: rng.choice([-most, most], size),
        "zero": lambda: np.zeros(size, np.int64),
    }[kind]()
    slots = pack_lanes(one, parameters)
    assert slots.shape == (parameters.ciphertexts, DEGREE // 2)
    reals = slots.view(np.float64).astype(np.int64)
    assert int(np.abs(reals).max()) < 2 ** (parameters.lanes * parameters.lane_bits - 1)
    for sites in (1, parameters.max_sites):
        unpacked = unpack_lanes(sites * reals, parameters)
        assert np.array_equal(unpacked[:size], sites * one)
        assert not unpacked[size:].any()


def test_lane_order_is_fixed() -> None:
    parameters = lane_parameters(4, 8, 3, 7)
    integers = np.zeros(parameters.integers, np.int64)
    integers[:7] = 1, -2, 3, 4, 5, 6, 7
    base = 2**parameters.lane_bits
    first = complex(1 - 2 * base + 3 * base**2, 4 + 5 * base + 6 * base**2)
    slots = pack_lanes(integers, parameters)
    assert slots[0, 0] == first
    assert slots[0, 1] == 7


# The wire


def he_payload(parameters: LaneParameters, coefficients: lanes.Coefficients, seed: int = 0) -> bytes:
    seeds = np.random.default_rng(seed).bytes(parameters.ciphertexts * SEED_BYTES)
    return seeds + pack_coefficients(coefficients)


def test_cipher_wire_layout() -> None:
    parameters = lane_parameters(4, 18, 2, 10_000)
    assert parameters.ciphertexts == 2
    cipher_wire = wire("he", parameters)
    assert isinstance(cipher_wire, CipherWire)
    first, second = random_coefficients(1, 2), random_coefficients(2, 2)
    payloads = [he_payload(parameters, first, 1), he_payload(parameters, second, 2)]
    total = cipher_wire.zero()
    for payload in payloads:
        assert len(payload) == cipher_wire.envelope_bytes == 2 * (64 + 27648)
        cipher_wire.check(payload)
        cipher_wire.add(total, payload)
    expected = (first.astype(object) + second.astype(object)) % MODULUS
    assert (total.astype(object) == expected).all()
    record = cipher_wire.record(total, [cipher_wire.tail(payload) for payload in payloads])
    assert len(record) == cipher_wire.record_bytes(2)
    assert record == pack_coefficients(expected.astype(np.uint64)) + payloads[0][:128] + payloads[1][:128]
    seeds, polynomials = cipher_wire.split_record(record, 2)
    assert [b"".join(site) for site in seeds] == [payload[:128] for payload in payloads]
    assert np.array_equal(polynomials, expected.astype(np.uint64))


def test_keyless_sum_at_the_edges_of_q() -> None:
    parameters = lane_parameters(16, 16, 2, 100)
    cipher_wire = CipherWire(parameters)
    total = cipher_wire.zero()
    edges = np.zeros((1, DEGREE), np.uint64)
    edges[0, :4] = MODULUS - 1, 1, MODULUS // 2, MODULUS // 2 + 1
    for count in range(1, 40):
        cipher_wire.add(total, he_payload(parameters, edges))
        assert total[0, :4].tolist() == [count * int(edge) % MODULUS for edge in edges[0, :4]]


@pytest.mark.parametrize("mode", ["he", "plain"])
def test_a_refused_envelope_leaves_the_total_alone(mode: str) -> None:
    parameters = lane_parameters(4, 18, 2, 100)
    if mode == "he":
        coefficients = random_coefficients(3, 1)
        good = he_payload(parameters, coefficients)
        coefficients[0, -1] = MODULUS
        bad = he_payload(parameters, coefficients)
    else:
        good = np.full(100, parameters.max_integer, "<i4").tobytes()
        bad = good[:-4] + np.array([parameters.max_integer + 1], "<i4").tobytes()
    of_mode = wire("he" if mode == "he" else "plain", parameters)
    total = of_mode.zero()
    of_mode.add(total, good)
    before = total.copy()
    for payload in (bad, good[:-1], good + b"\0", b""):
        with pytest.raises(EnvelopeError):
            of_mode.check(payload)
        with pytest.raises(EnvelopeError):
            of_mode.add(total, payload)
        assert np.array_equal(total, before)
    for payload in (good[:-1], good + b"\0"):
        with pytest.raises(EnvelopeError):
            of_mode.tail(payload)


@pytest.mark.parametrize("mode", ["he", "plain"])
def test_a_record_is_of_one_to_max_sites(mode: str) -> None:
    parameters = lane_parameters(3, 18, 2, 100)
    of_mode = wire("he" if mode == "he" else "plain", parameters)
    tail = of_mode.tail(bytes(of_mode.envelope_bytes))
    of_mode.record(of_mode.zero(), [tail] * 3)
    for cohort in (0, 4):
        with pytest.raises(LanesError, match="1 to max_sites = 3"):
            of_mode.record(of_mode.zero(), [tail] * cohort)
    with pytest.raises(LanesError, match="zero"):
        of_mode.record(np.zeros(1, np.int64), [tail])


def test_a_record_refuses_tails_of_another_length() -> None:
    cipher_wire = CipherWire(lane_parameters(3, 18, 2, 100))
    with pytest.raises(LanesError, match="tail"):
        cipher_wire.record(cipher_wire.zero(), [bytes(63)])


@pytest.mark.parametrize("sign", [1, -1])
def test_plain_wire_bounds(sign: int) -> None:
    parameters = lane_parameters(4, 18, 2, 5)
    most = sign * parameters.max_integer
    plain = PlainWire(parameters)
    total = plain.zero()
    for _ in range(3):
        plain.add(total, np.full(5, most, "<i4").tobytes())
    assert np.frombuffer(plain.record(total, [b""] * 3), "<i4").tolist() == [3 * most] * 5
    with pytest.raises(LanesError, match="beyond"):
        plain.record(total, [b""] * 2)
    for value in (most + sign, sign * (2**31 - 1), -(2**31)):
        with pytest.raises(EnvelopeError, match="magnitude"):
            plain.check(np.full(5, value, "<i4").tobytes())


def test_plain_sealer_sums_and_refuses() -> None:
    parameters = lane_parameters(4, 18, 2, 1000)
    sealer, plain = PlainSealer(parameters), PlainWire(parameters)
    rng = np.random.default_rng(0)
    updates = [rng.integers(-parameters.max_integer, parameters.max_integer + 1, 1000) for _ in range(3)]
    cohort = [Contribution(f"site{index}", 0) for index in range(3)]
    total = plain.zero()
    for update, contribution in zip(updates, cohort, strict=True):
        plain.add(total, sealer.seal(update, BINDING, contribution))
    record = plain.record(total, [b""] * 3)
    assert np.array_equal(sealer.open(record, BINDING, cohort), sum(updates))
    too_much = np.full(1000, 3 * parameters.max_integer + 1, "<i4").tobytes()
    for payload, named in (
        (record[:-1], cohort),
        (too_much, cohort),
        (record, []),
        (record, [cohort[0], cohort[0]]),
        (record, [Contribution(f"{index}", 0) for index in range(5)]),
    ):
        with pytest.raises(AggregateRefused) as caught:
            sealer.open(payload, BINDING, named)
        assert str(caught.value) == lanes.REFUSAL
        assert caught.value.__context__ is None


@pytest.mark.parametrize(
    "integers",
    [
        np.zeros(9, np.int64),
        np.zeros((10, 1), np.int64),
        np.zeros(10, np.int32),
        np.zeros(10),
        np.full(10, 2**17),
        np.full(10, -(2**17)),
        np.full(10, np.iinfo(np.int64).min),
    ],
)
def test_sealing_what_does_not_fit_is_a_bug(integers: lanes.Integers) -> None:
    with pytest.raises(LanesError):
        PlainSealer(lane_parameters(4, 18, 2, 10)).seal(integers, BINDING, Contribution("a", 0))


def test_lanes_imports_neither_tenseal_nor_torch() -> None:
    code = "import sys, secure_fed.protocol.packing; print({'tenseal', 'torch', '_sealapi_cpp'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "set()"

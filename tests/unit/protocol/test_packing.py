"""Lanes: parameters, packing, the wire and keyless sums."""

from __future__ import annotations

import hashlib
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from secure_fed.core.errors import AggregateRefused, EnvelopeError, LanesError
from secure_fed.protocol import packing as lanes
from secure_fed.protocol.envelope import EnvelopeHeader
from secure_fed.protocol.packing import (
    MAX_LANES,
    MIN_LANES,
    NO_SEED,
    Binding,
    CipherWire,
    Contribution,
    LaneParameters,
    PlainSealer,
    PlainWire,
    in_range,
    lane_parameters,
    largest_bits,
    pack_lanes,
    unpack_lanes,
    wire,
)
from secure_fed.protocol.records import RecordHeader, sign_record
from secure_fed.protocol.residues import DEGREE, PRIMES, Residues, pack_residues
from secure_fed.protocol.round_frames import Revealed, SignedWord
from secure_fed.protocol.signing import encode_header, payload_fields

ROOT = Path(__file__).parents[3]
BINDING = Binding("ab", "cd", 1)


@st.composite
def parameter_sets(draw: st.DrawFn, most_values: int = 30_000) -> LaneParameters:
    max_sites = draw(st.one_of(st.sampled_from([1, 2, 3, 4, 5, 8, 9, 16, 33, 64, 256]), st.integers(1, 1000)))
    lanes_ = draw(st.sampled_from([count for count in range(2, MAX_LANES + 1) if largest_bits(max_sites, count)]))
    bits = draw(st.integers(lanes.MIN_BITS, largest_bits(max_sites, lanes_)))
    return lane_parameters(max_sites, bits, lanes_, draw(st.integers(1, most_values)))


def random_residues(seed: int, parameters: LaneParameters) -> Residues:
    return np.random.default_rng(seed).integers(0, parameters.modulus, parameters.coefficients, np.uint64)


# Parameters


@pytest.mark.parametrize(
    ("max_sites", "scale", "most"),
    [
        (4, 120, (21, 14, 10, 8, 0)),
        (16, 240, (20, 12, 8, 0, 0)),
        (64, 479, (18, 10, 0, 0, 0)),
        (256, 957, (15, 0, 0, 0, 0)),
        (1000, 1892, (13, 0, 0, 0, 0)),
    ],
)
def test_largest_bits_of_some_studies(max_sites: int, scale: int, most: tuple[int, ...]) -> None:
    for count, bits in enumerate(most, MIN_LANES):
        assert largest_bits(max_sites, count) == bits
        if bits:
            assert lane_parameters(max_sites, bits, count, 1).scale == scale
        if bits < 21:
            with pytest.raises(LanesError, match="do not fit into"):
                lane_parameters(max_sites, max(bits + 1, 8), count, 1)


@pytest.mark.parametrize(
    ("max_sites", "bits", "lanes_", "prime", "against_float32"),
    [
        (4, 9, 4, 51, 0.398),
        (4, 16, 2, 44, 0.688),
        (16, 9, 3, 47, 0.490),
        (16, 8, 4, 56, 0.438),
        (16, 16, 2, 48, 0.750),
        (64, 8, 3, 51, 0.531),
        (1000, 8, 2, 47, 0.734),
    ],
)
def test_lanes_that_are_not_given_are_those_of_the_fewest_bytes(
    max_sites: int, bits: int, lanes_: int, prime: int, against_float32: float
) -> None:
    chosen = lane_parameters(max_sites, bits, None, 526_336)
    assert (chosen.lanes, chosen.modulus_bits) == (lanes_, prime)
    assert chosen.payload_bytes / (4 * 526_336) == pytest.approx(against_float32, abs=0.0006)
    for count in range(MIN_LANES, MAX_LANES + 1):
        if bits <= largest_bits(max_sites, count):
            assert lane_parameters(max_sites, bits, count, 526_336).payload_bytes >= chosen.payload_bytes


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((0, 8, 2, 1), "max_sites is 0"),
        ((4, 8, 1, 1), "lanes is 1; expected 2 to 6; for 4 sites at most 21 bits in 2 lanes, 14 bits in 3 lanes"),
        ((4, 8, 7, 1), "lanes is 7"),
        ((4, 8, 2, 0), "values is 0"),
        ((4, 7, 2, 1), "bits is 7; expected 8 to 21"),
        ((4, 22, None, 1), "bits is 22; expected 8 to 21"),
        (
            (4, 15, 3, 1),
            "15 bits for 4 sites do not fit into 3 lanes; .*: set bits = 21 or less",
        ),
        ((16, 21, None, 1), "no lanes hold 21 bits for 16 sites; for 16 sites at most 20 bits in 2 lanes"),
        ((10**6, 8, None, 1), "nothing fits"),
    ],
)
def test_refusals_name_the_bound_and_what_would_fit(arguments: tuple[int, int, int | None, int], named: str) -> None:
    with pytest.raises(LanesError, match=named):
        lane_parameters(*arguments)


@given(parameter_sets())
def test_derived_parameters(parameters: LaneParameters) -> None:
    p = parameters
    assert 2**p.guard_bits >= p.max_sites
    assert p.guard_bits == 0 or 2 ** (p.guard_bits - 1) < p.max_sites
    assert p.lane_bits == p.bits + p.guard_bits
    assert p.scale - 1 < 2 * 9.2 * 3.25 * p.max_sites**0.5 <= p.scale
    # A full sum of the largest values, with all the noise there can be, is below half the prime; no smaller one does.
    most = sum(p.max_sites * p.max_integer << p.lane_bits * lane for lane in range(p.lanes))
    assert 2 * (p.scale * most + 21 * p.max_sites) < p.modulus == PRIMES[p.modulus_bits]
    assert p.modulus_bits == 44 or 2 * (p.scale * most + 21 * p.max_sites) > PRIMES[p.modulus_bits - 1]
    assert p.coefficients % 8 == 0
    assert 0 <= p.coefficients * p.lanes - p.values < 8 * p.lanes
    assert (p.ciphertexts - 1) * DEGREE < p.coefficients <= p.ciphertexts * DEGREE
    assert p.payload_bytes == p.coefficients * p.modulus_bits // 8
    # What noise can do to lane 0 does not carry.
    assert p.max_sites * p.max_integer + p.noise_in_lane(p.max_sites) < 2 ** (p.lane_bits - 1)


def wrong_rounding(sites: int, scale: int) -> float:
    """Probability that noise of so many coefficients sums to scale / 2 or more in magnitude: a binomial's tails."""
    return 2 * float(binom.sf(21 * sites + -(-scale // 2) - 1, 42 * sites, 0.5))


def test_a_sum_is_hardly_ever_rounded_wrongly() -> None:
    for sites in (3, 4, 16):  # the tail itself in integers
        scale, coins = lane_parameters(sites, 8, 2, 1).scale, 42 * sites
        ways = sum(math.comb(coins, ones) for ones in range(21 * sites + -(-scale // 2), coins + 1))
        assert wrong_rounding(sites, scale) == pytest.approx(2 * ways / 2**coins, rel=1e-6)
    found = {sites: wrong_rounding(sites, lane_parameters(sites, 8, 2, 1).scale) for sites in range(1, 1001)}
    assert found[4] == pytest.approx(4.7e-22, rel=0.01)
    assert found[1000] == pytest.approx(2.74e-20, rel=0.01)
    assert max(found.values()) <= 2.9e-20


def test_noise_moves_lane_0_by_what_is_said() -> None:
    for sites, moved in ((1, 0), (4, 1), (16, 1), (64, 3), (1000, 11)):
        parameters = lane_parameters(sites, 8, 2, 1)
        assert parameters.noise_in_lane(sites) == moved == math.floor(21 * sites / parameters.scale + 0.5)
        # The largest noise of all, rounded as a site does.
        assert (21 * sites + parameters.scale // 2) // parameters.scale == moved


# Lanes


@given(parameter_sets(), st.integers(0, 2**32), st.sampled_from(["random", "most", "least", "mixed", "zero"]))
@settings(max_examples=60, deadline=None)
def test_lanes_of_sums_are_exact(parameters: LaneParameters, seed: int, kind: str) -> None:
    rng = np.random.default_rng(seed)
    most, size = parameters.max_integer, parameters.values
    one = {
        "random": lambda: rng.integers(-most, most + 1, size),
        "most": lambda: np.full(size, most),
        "least": lambda: np.full(size, -most),
        "mixed": lambda: rng.choice([-most, most], size),
        "zero": lambda: np.zeros(size, np.int64),
    }[kind]()
    packed = pack_lanes(one, parameters)
    assert packed.shape == (parameters.coefficients,)
    for sites in (1, parameters.max_sites):
        assert 2 * (parameters.scale * sites * int(np.abs(packed).max()) + 21 * sites) < parameters.modulus
        unpacked = unpack_lanes(sites * packed, parameters)
        assert np.array_equal(unpacked.reshape(-1)[:size], sites * one)
        assert not unpacked.reshape(-1)[size:].any()
        assert in_range(unpacked, parameters, sites)


def test_lane_order_is_fixed() -> None:
    parameters = lane_parameters(4, 8, 3, 7)
    integers = np.array([1, -2, 3, 4, 5, 6, 7], np.int64)
    base = 2**parameters.lane_bits
    packed = pack_lanes(integers, parameters)
    assert packed[:3].tolist() == [1 - 2 * base + 3 * base**2, 4 + 5 * base + 6 * base**2, 7]


@given(parameter_sets(most_values=200), st.data())
@settings(max_examples=60)
def test_what_is_out_of_range_is_told_in_every_lane(parameters: LaneParameters, data: st.DataObject) -> None:
    sites = data.draw(st.integers(1, parameters.max_sites))
    sign = data.draw(st.sampled_from([1, -1]))
    at = data.draw(st.integers(0, parameters.coefficients * parameters.lanes - 1))
    most = sites * parameters.max_integer if at < parameters.values else 0
    if at % parameters.lanes == 0:
        most += parameters.noise_in_lane(sites)
    sums = np.zeros((parameters.coefficients, parameters.lanes), np.int64)
    sums.reshape(-1)[at] = sign * most
    assert in_range(sums, parameters, sites)
    sums.reshape(-1)[at] = sign * (most + 1)
    assert not in_range(sums, parameters, sites)


# The wire


def test_cipher_wire_layout() -> None:
    parameters = lane_parameters(4, 18, 2, 10_000)
    cipher_wire = wire("he", parameters)
    assert isinstance(cipher_wire, CipherWire)
    first, second = random_residues(1, parameters), random_residues(2, parameters)
    payloads = [pack_residues(one, parameters.modulus_bits) for one in (first, second)]
    total = cipher_wire.zero()
    for payload in payloads:
        assert len(payload) == cipher_wire.payload_bytes == parameters.coefficients * 47 // 8
        total = cipher_wire.add(total, payload)
    expected = (first.astype(object) + second.astype(object)) % parameters.modulus
    assert (total.astype(object) == expected).all()
    record = cipher_wire.record(total, 2)
    assert record == pack_residues(expected.astype(np.uint64), parameters.modulus_bits)
    assert np.array_equal(cipher_wire.residues(record), expected.astype(np.uint64))


@given(st.sampled_from([(16, 9, 3), (16, 16, 2), (4, 21, 2), (16, 20, 2)]))
def test_keyless_sum_at_the_edges_of_q(shape: tuple[int, int, int]) -> None:
    parameters = lane_parameters(*shape, 100)
    cipher_wire, modulus = CipherWire(parameters), parameters.modulus
    total = cipher_wire.zero()
    edges = np.zeros(parameters.coefficients, np.uint64)
    edges[:4] = modulus - 1, 1, modulus // 2, modulus // 2 + 1
    for count in range(1, 40):
        total = cipher_wire.add(total, pack_residues(edges, parameters.modulus_bits))
        assert total[:4].tolist() == [count * int(edge) % modulus for edge in edges[:4]]


@pytest.mark.parametrize("mode", ["he", "plain"])
def test_a_refused_envelope_leaves_the_total_alone(mode: str) -> None:
    parameters = lane_parameters(4, 18, 2, 100)
    if mode == "he":
        residues = random_residues(3, parameters)
        good = pack_residues(residues, parameters.modulus_bits)
        residues[-1] = parameters.modulus
        bad = pack_residues(residues, parameters.modulus_bits)
    else:
        good = np.full(100, parameters.max_integer, "<i4").tobytes()
        bad = good[:-4] + np.array([parameters.max_integer + 1], "<i4").tobytes()
    of_mode = wire("he" if mode == "he" else "plain", parameters)
    total = of_mode.zero()
    empty = total.copy()
    added = of_mode.add(total, good)
    assert np.array_equal(total, empty)
    total, before = added, added.copy()
    for payload in (bad, good[:-1], good + b"\0", b""):
        with pytest.raises(EnvelopeError):
            of_mode.add(total, payload)
        assert np.array_equal(total, before)


@pytest.mark.parametrize("mode", ["he", "plain"])
def test_a_record_is_of_one_to_max_sites(mode: str) -> None:
    parameters = lane_parameters(3, 18, 2, 100)
    of_mode = wire("he" if mode == "he" else "plain", parameters)
    of_mode.record(of_mode.zero(), 3)
    for sites in (0, 4):
        with pytest.raises(LanesError, match="1 to max_sites = 3"):
            of_mode.record(of_mode.zero(), sites)
    with pytest.raises(LanesError, match="zero"):
        of_mode.record(np.zeros(1, np.int64), 1)


@pytest.mark.parametrize("sign", [1, -1])
def test_plain_wire_bounds(sign: int) -> None:
    parameters = lane_parameters(4, 18, 2, 5)
    most = sign * parameters.max_integer
    plain = PlainWire(parameters)
    total = plain.zero()
    for _ in range(3):
        total = plain.add(total, np.full(5, most, "<i4").tobytes())
    assert np.frombuffer(plain.record(total, 3), "<i4").tolist() == [3 * most] * 5
    with pytest.raises(LanesError, match="beyond"):
        plain.record(total, 2)
    for value in (most + sign, sign * (2**31 - 1), -(2**31)):
        with pytest.raises(EnvelopeError, match="magnitude"):
            plain.add(total, np.full(5, value, "<i4").tobytes())


def test_plain_sealer_sums_and_refuses() -> None:
    parameters = lane_parameters(4, 18, 2, 1000)
    sealer, plain = PlainSealer(parameters), PlainWire(parameters)
    rng = np.random.default_rng(0)
    updates = [rng.integers(-parameters.max_integer, parameters.max_integer + 1, 1000) for _ in range(3)]
    cohort = [Contribution(f"site{index}", NO_SEED) for index in range(3)]
    total = plain.zero()
    for update, contribution in zip(updates, cohort, strict=True):
        sealed = sealer.seal(update, BINDING, contribution.site)
        assert sealed.contribution == contribution
        total = plain.add(total, sealed.payload)
    record = plain.record(total, 3)
    assert np.array_equal(sealer.open(record, BINDING, cohort), sum(updates))
    too_much = np.full(1000, 3 * parameters.max_integer + 1, "<i4").tobytes()
    for payload, named in (
        (record[:-1], cohort),
        (too_much, cohort),
        (record, []),
        (record, [cohort[0], cohort[0]]),
        (record, [Contribution(f"{index}", NO_SEED) for index in range(5)]),
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
        PlainSealer(lane_parameters(4, 18, 2, 10)).seal(integers, BINDING, "a")


def test_lanes_imports_neither_tenseal_nor_torch() -> None:
    code = "import sys, secure_fed.protocol.packing; print({'tenseal', 'torch', '_sealapi_cpp'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "set()"


def test_a_record_of_a_thousand_sites_takes_at_most_2_4_mb_with_all_signatures() -> None:
    parameters = lane_parameters(1000, largest_bits(1000, 2), 2, 526_336)
    key, payload = Ed25519PrivateKey.generate(), bytes(parameters.payload_bytes)

    def digest(number: int) -> str:
        return hashlib.sha256(b"%d" % number).hexdigest()

    def signed(number: int) -> SignedWord:
        header = EnvelopeHeader(
            version=2,
            study=digest(0),
            run=digest(1),
            head=digest(2),
            key=digest(3),
            amendment=100,
            round=1000,
            attempt=100,
            cohort=digest(4),
            site=f"hospital-{number:04d}",
            values=parameters.values,
            seed=digest(1000 + number),
            ledger_seq=1000,
            ledger_head=digest(5000 + number),
            ledger_links=(),
            **payload_fields(digest(number).encode()),
        )
        text = encode_header(header)
        return SignedWord(header=text.hex(), signature=key.sign(text).hex())

    def revealed(number: int) -> Revealed:
        first, second = (f"{parameters.modulus - less:016x}" for less in (1 + number, 2))
        return Revealed(first, second, key.sign(b"%d" % number).hex())

    header = RecordHeader(
        version=2,
        kind="aggregate",
        seq=1000,
        previous=digest(4),
        study=digest(0),
        run=digest(1),
        key=digest(3),
        round=1000,
        contributors=tuple(map(signed, range(1000))),
        reveals=tuple(map(revealed, range(1000))),
        opened_ms=2**41,
        closed_ms=2**41,
        **payload_fields(payload),
    )
    assert len(sign_record(header, payload, key)) <= 2_400_000

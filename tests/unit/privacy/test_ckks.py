"""Exact sums: round trips, SEAL's own decryption, and what a bent sum or another cohort opens to."""

from __future__ import annotations

import contextlib
import functools
import struct
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tenseal import sealapi

from secure_fed.core.errors import AggregateRefused, EnvelopeError, KeyFileError, LanesError, SealFormatError
from secure_fed.privacy import ckks, seal_format
from secure_fed.privacy.ckks import Cipher, StudySecret
from secure_fed.protocol.packing import (
    MAX_LANES,
    NOISE_MOST,
    REFUSAL,
    Binding,
    CipherWire,
    Contribution,
    Integers,
    LaneParameters,
    PlainSealer,
    PlainWire,
    Sealed,
    lane_parameters,
    largest_bits,
    pack_lanes,
    unpack_lanes,
)
from secure_fed.protocol.records import summed_checks
from secure_fed.protocol.residues import DEGREE, PRIMES, SumOfStreams, centre, expand, multiply, pack_residues

BINDING = Binding(run="aa" * 16, head="bb" * 32, round=7)
# Two ciphertexts an envelope, the second of them cut.
PARAMETERS = lane_parameters(max_sites=8, bits=17, lanes=2, values=8990)
SECRET = StudySecret.generate(PARAMETERS.modulus_bits)


@functools.cache
def secret_of(modulus_bits: int) -> StudySecret:
    return replace(StudySecret.generate(modulus_bits), mac_key=SECRET.mac_key)


@functools.cache
def cipher(parameters: LaneParameters = PARAMETERS) -> Cipher:
    return Cipher(parameters, SECRET if parameters == PARAMETERS else secret_of(parameters.modulus_bits))


def sites_of(size: int) -> list[str]:
    return [f"site-{index}" for index in range(size)]


def updates_of(
    size: int, parameters: LaneParameters = PARAMETERS, kind: str = "random", seed: int = 0
) -> list[Integers]:
    rng, most = np.random.default_rng(seed), parameters.max_integer
    make: dict[str, Callable[[], Integers]] = {
        "random": lambda: rng.integers(-most, most + 1, parameters.values),
        "most": lambda: np.full(parameters.values, most),
        "least": lambda: np.full(parameters.values, -most),
        "mixed": lambda: rng.choice([-most, most], parameters.values),
        "zero": lambda: np.zeros(parameters.values, np.int64),
    }
    return [make[kind]() for _ in range(size)]


def seal_all(
    updates: Sequence[Integers],
    sites: Sequence[str],
    parameters: LaneParameters = PARAMETERS,
    binding: Binding = BINDING,
) -> list[Sealed]:
    return [cipher(parameters).seal(update, binding, who) for update, who in zip(updates, sites, strict=True)]


def cohort_of(sealed: Sequence[Sealed]) -> list[Contribution]:
    return [one.contribution for one in sealed]


def record_of(sealed: Sequence[Sealed], parameters: LaneParameters = PARAMETERS) -> bytes:
    cipher_wire = CipherWire(parameters)
    total = cipher_wire.zero()
    for one in sealed:
        total = cipher_wire.add(total, one.payload)
    return cipher_wire.record(total, min(len(sealed), parameters.max_sites))


def refused(
    record: bytes,
    cohort: Sequence[Contribution],
    binding: Binding = BINDING,
    by: Cipher | None = None,
) -> None:
    with pytest.raises(AggregateRefused) as caught:
        (by or cipher()).open(record, binding, cohort)
    assert str(caught.value) == REFUSAL
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None
    assert caught.value.__suppress_context__


def bent(record: bytes, sealed: Sequence[Sealed], parameters: LaneParameters = PARAMETERS) -> bool:
    """Whether the linear check tells a record from the sum of its envelopes, as everybody can before it is opened."""
    wire, digest = CipherWire(parameters), "5" * 64
    checks = [wire.check_words(digest, one.payload) for one in sealed]
    return wire.check_words(digest, record) != summed_checks(checks, parameters.modulus)


# Exactness


@st.composite
def rounds(draw: st.DrawFn) -> tuple[LaneParameters, int, str, int]:
    max_sites = draw(st.sampled_from([1, 2, 3, 4, 7, 8, 16, 32]))
    lanes = draw(st.sampled_from([lanes for lanes in range(2, MAX_LANES + 1) if largest_bits(max_sites, lanes)]))
    bits = draw(st.integers(8, largest_bits(max_sites, lanes)))
    values = draw(st.one_of(st.integers(1, 50), st.integers(1, 26_000)))
    parameters = lane_parameters(max_sites, bits, lanes, values)
    sites = draw(st.one_of(st.just(1), st.just(max_sites), st.integers(1, max_sites)))
    return (
        parameters,
        sites,
        draw(st.sampled_from(["random", "most", "least", "mixed", "zero"])),
        draw(st.integers(0, 2**32)),
    )


@given(rounds())
@settings(max_examples=40, deadline=None)
def test_the_opened_sum_is_exact(case: tuple[LaneParameters, int, str, int]) -> None:
    parameters, sites, kind, seed = case
    updates, names = updates_of(sites, parameters, kind, seed), sites_of(sites)
    plain = PlainSealer(parameters)
    sealed = seal_all(updates, names, parameters)
    arrived = [sealed[i] for i in np.random.default_rng(seed).permutation(sites)]
    sums = cipher(parameters).open(record_of(arrived, parameters), BINDING, cohort_of(arrived))
    assert sums.dtype == np.int64
    assert np.array_equal(sums, np.sum(updates, axis=0))
    plain_wire = PlainWire(parameters)
    total = plain_wire.zero()
    for update, who in zip(updates, names, strict=True):
        total = plain_wire.add(total, plain.seal(update, BINDING, who).payload)
    assert np.array_equal(plain.open(plain_wire.record(total, sites), BINDING, cohort_of(sealed)), sums)


@given(st.integers(1, 1000), st.sampled_from(["most", "least", "mixed", "random"]), st.integers(0, 2**32))
@example(1000, "most", 0)
@settings(max_examples=8, deadline=None)
def test_every_number_of_sites_at_its_most_bits(max_sites: int, kind: str, seed: int) -> None:
    """A few envelopes are sealed, and summed again and again until so many are in the sum."""
    lanes = max(lanes for lanes in range(2, MAX_LANES + 1) if largest_bits(max_sites, lanes))
    parameters = lane_parameters(max_sites, largest_bits(max_sites, lanes), lanes, 100)
    updates = updates_of(4, parameters, kind, seed)
    study, modulus = cipher(parameters), parameters.modulus
    packed = [pack_lanes(update, parameters) for update in updates]
    total, expected = np.zeros(parameters.coefficients, object), np.zeros(100, np.int64)
    keys = [index.to_bytes(32, "big") for index in range(max_sites)]
    for index, key in enumerate(keys):
        total += study._encrypted_zeros(key).astype(object) + packed[index % 4] * parameters.scale
        expected += updates[index % 4]
    second = SumOfStreams(keys, modulus).take(parameters.ciphertexts * DEGREE)
    noisy = centre(((total + study._times_secret(second)[: total.size]) % modulus).astype(np.uint64), modulus)
    lanes_ = unpack_lanes((noisy + parameters.scale // 2) // parameters.scale, parameters)
    assert np.array_equal(lanes_.reshape(-1)[:100], expected)


@pytest.mark.parametrize(("max_sites", "lanes"), [(4, 2), (64, 2), (4, 3), (4, 4), (32, 3), (256, 2)])
@pytest.mark.parametrize("kind", ["most", "least", "mixed"])
def test_extremes_of_a_full_cohort_at_the_most_bits(max_sites: int, lanes: int, kind: str) -> None:
    parameters = lane_parameters(max_sites, largest_bits(max_sites, lanes), lanes, 4096 * lanes - 50)
    updates = updates_of(max_sites, parameters, kind)
    sealed = seal_all(updates, sites_of(max_sites), parameters)
    record = record_of(sealed, parameters)
    assert np.array_equal(cipher(parameters).open(record, BINDING, cohort_of(sealed)), np.sum(updates, axis=0))


def test_arrival_order_does_not_change_the_record() -> None:
    sealed = seal_all(updates_of(4), sites_of(4))
    assert record_of(sealed) == record_of(sealed[::-1])


def words(ciphertext: Any) -> npt.NDArray[np.uint64]:
    array = ciphertext.dyn_array()
    return np.array([array.at(index) for index in range(array.size())], np.uint64)


def in_ntt(coefficients: npt.NDArray[np.uint64], study: Cipher) -> npt.NDArray[np.uint64]:
    """SEAL's transform of one polynomial's coefficients."""
    saved = bytearray(seal_format.ciphertext(np.stack((coefficients, coefficients)), study._parms_id))
    saved[16 + 32] = 0  # not in NTT form
    carrier = sealapi.Ciphertext(study._context)
    seal_format.load(carrier, study._context, bytes(saved))
    sealapi.Evaluator(study._context).transform_to_ntt_inplace(carrier)
    return words(carrier)[:DEGREE]


def test_seals_own_decryptor_opens_envelopes_and_sums() -> None:
    """(y, sum of a) is an ordinary CKKS ciphertext: SEAL adds and decrypts it, and what comes out is noise + D m."""
    updates = updates_of(3)
    sealed = seal_all(updates, sites_of(3))
    study, count = cipher(), PARAMETERS.ciphertexts
    context, modulus = study._context, PARAMETERS.modulus
    evaluator, decryptor = sealapi.Evaluator(context), study._decryptor
    opened = np.empty((count, DEGREE), np.int64)
    for index in range(count):
        total: Any = None
        for one in sealed:
            first = np.zeros(count * DEGREE, np.uint64)
            first[: PARAMETERS.coefficients] = CipherWire(PARAMETERS).residues(one.payload)
            second = expand(ckks.stream_key(BINDING, one.contribution), count * DEGREE, modulus)
            place = slice(index * DEGREE, (index + 1) * DEGREE)
            part = sealapi.Ciphertext(context)
            polynomials = np.stack((in_ntt(first[place], study), second[place]))
            seal_format.load(part, context, seal_format.ciphertext(polynomials, study._parms_id))
            if total is None:
                total = part
            else:
                evaluator.add_inplace(total, part)
        plaintext = sealapi.Plaintext()
        decryptor.decrypt(total, plaintext)
        ntt = np.array([plaintext.data(at) for at in range(DEGREE)], np.uint64).reshape(1, DEGREE)
        opened[index] = centre(study._from_ntt(ntt), modulus)
    used = opened.reshape(-1)[: PARAMETERS.coefficients]
    lanes = unpack_lanes((used + PARAMETERS.scale // 2) // PARAMETERS.scale, PARAMETERS).reshape(-1)
    assert np.array_equal(lanes[: PARAMETERS.values], np.sum(updates, axis=0))


def noise_of(sealed: Sealed, update: Integers, parameters: LaneParameters = PARAMETERS) -> npt.NDArray[np.int64]:
    """What a holder of the key finds below the integers."""
    study, modulus = cipher(parameters), parameters.modulus
    second = expand(ckks.stream_key(BINDING, sealed.contribution), parameters.ciphertexts * DEGREE, modulus)
    sums = CipherWire(parameters).residues(sealed.payload)
    noisy = centre((sums + study._times_secret(second)[: sums.size]) % np.uint64(modulus), modulus)
    return noisy - (noisy + parameters.scale // 2) // parameters.scale * parameters.scale


def test_noise_is_seals_and_never_the_same_twice() -> None:
    update = updates_of(1)[0]
    one, other = (noise_of(cipher().seal(update, BINDING, "a"), update) for _ in range(2))
    for noise in (one, other):
        assert np.abs(noise).max() <= NOISE_MOST
        assert noise.std() == pytest.approx(np.sqrt(21 / 2), rel=0.06)
        assert abs(noise.mean()) < 0.3
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.1


@pytest.mark.parametrize("bits", [16, 20])
def test_a_real_update_of_sixteen_sites(bits: int) -> None:
    parameters = lane_parameters(16, bits, 2, 525_312 + 8)
    updates = updates_of(16, parameters)
    sealed = seal_all(updates, sites_of(16), parameters)
    assert len(sealed[0].payload) < (0.76 if bits == 16 else 0.88) * 4 * parameters.values
    record = record_of(sealed, parameters)
    assert np.array_equal(cipher(parameters).open(record, BINDING, cohort_of(sealed)), np.sum(updates, axis=0))


def test_sealing_twice_gives_other_bytes_and_the_same_sum() -> None:
    update = updates_of(1)[0]
    one, other = (seal_all([update], sites_of(1))[0] for _ in range(2))
    assert one.contribution.seed != other.contribution.seed
    assert one.payload != other.payload
    for sealed in (one, other):
        assert np.array_equal(cipher().open(record_of([sealed]), BINDING, [sealed.contribution]), update)


@pytest.mark.parametrize("value", [PARAMETERS.max_integer + 1, -PARAMETERS.max_integer - 1])
def test_sealing_what_does_not_fit_is_a_bug(value: int) -> None:
    update = np.zeros(PARAMETERS.values, np.int64)
    update[-1] = value
    with pytest.raises(LanesError, match="magnitude"):
        cipher().seal(update, BINDING, "site-0")
    with pytest.raises(LanesError, match="shape"):
        cipher().seal(update[1:], BINDING, "site-0")


def test_a_stream_key_is_of_seed_site_and_place() -> None:
    who = Contribution("ab", "11" * 32)
    keys = {
        ckks.stream_key(binding, contribution)
        for binding in (
            Binding("ab", "cd", 1),
            Binding("abc", "d", 1),
            Binding("a", "bcd", 1),
            Binding("ab", "cd1", 1),
            Binding("ab", "cd", 11),
            Binding("ab", "cd", 10),
        )
        for contribution in (who, replace(who, site="abc"), replace(who, seed="12" * 32))
    }
    assert len(keys) == 18


@pytest.mark.parametrize("what", ["product", "transform", "layout"])
def test_a_seal_that_computes_otherwise_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    if what == "product":
        monkeypatch.setattr(ckks, "multiply", lambda *arguments: multiply(*arguments)[..., ::-1])
    elif what == "transform":
        true = Cipher._from_ntt
        monkeypatch.setattr(Cipher, "_from_ntt", lambda self, polynomials: true(self, np.roll(polynomials, 1, 1)))
    else:
        true_words = seal_format.ciphertext_words
        monkeypatch.setattr(seal_format, "ciphertext_words", lambda *args, **kwargs: true_words(*args, **kwargs)[::-1])
    with pytest.raises(SealFormatError, match="install the tenseal version"):
        Cipher(PARAMETERS, SECRET)


@given(st.sampled_from([(4, 18, 2), (4, 8, 2), (4, 9, 4), (32, 8, 3), (16, 9, 3)]), st.integers(0, 2**32))
@settings(max_examples=20, deadline=None)
def test_an_envelope_holds_the_values_and_nothing_else(shape: tuple[int, int, int], seed: int) -> None:
    parameters = lane_parameters(*shape, 300)
    update, study = updates_of(1, parameters, seed=seed)[0], cipher(parameters)
    sealed = study.seal(update, BINDING, "Krankenhaus Süd")
    second = expand(ckks.stream_key(BINDING, sealed.contribution), parameters.ciphertexts * DEGREE, parameters.modulus)
    sums = CipherWire(parameters).residues(sealed.payload)
    sums += study._times_secret(second)[: sums.size]
    noisy = centre(sums % np.uint64(parameters.modulus), parameters.modulus)
    assert np.array_equal((noisy + parameters.scale // 2) // parameters.scale, pack_lanes(update, parameters))


# Attacks: what is told before anything is opened, and what comes out of range.


def with_coefficients(record: bytes, added: Integers) -> bytes:
    """Add multiples of 1 / D to a record's sum, coefficient by coefficient, knowing no key."""
    residues = CipherWire(PARAMETERS).residues(record)
    moved = (residues.astype(object) + added.astype(object)) % PARAMETERS.modulus
    return pack_residues(moved.astype(np.uint64), PARAMETERS.modulus_bits)


def with_added(record: bytes, offset: Integers) -> bytes:
    """Add integers to a record's sum, knowing no key."""
    return with_coefficients(record, pack_lanes(offset, PARAMETERS) * PARAMETERS.scale)


def test_an_honest_record_is_opened() -> None:
    updates = updates_of(3)
    sealed = seal_all(updates, sites_of(3))
    record = record_of(sealed)
    assert np.array_equal(cipher().open(record, BINDING, cohort_of(sealed)), np.sum(updates, axis=0))
    # The same addition that forges below, of nothing.
    assert with_added(record, np.zeros(PARAMETERS.values, np.int64)) == record
    assert not bent(record, sealed)


@pytest.mark.parametrize("place", [0, 4321, PARAMETERS.values - 1])
@pytest.mark.parametrize("by", [1, -1])
def test_one_integer_changed_by_one_is_told_by_the_linear_check_alone(place: int, by: int) -> None:
    updates = updates_of(3)
    sealed = seal_all(updates, sites_of(3))
    offset = np.zeros(PARAMETERS.values, np.int64)
    offset[place] = by
    forged = with_added(record_of(sealed), offset)
    assert bent(forged, sealed)
    sums = cipher().open(forged, BINDING, cohort_of(sealed))
    assert np.array_equal(sums, np.sum(updates, axis=0) + offset)


def padding_of(parameters: LaneParameters) -> range:
    """Coefficients that hold no integer at all."""
    return range(-(-parameters.values // parameters.lanes), parameters.coefficients)


@pytest.mark.parametrize("lane", [0, 1])
def test_padding_is_not_a_place_to_write(lane: int) -> None:
    """Lane 0 may be off by what noise can do, here 1; lane 1 by nothing."""
    sealed = seal_all(updates_of(3), sites_of(3))
    (place, *_) = padding_of(PARAMETERS)
    added = np.zeros(PARAMETERS.coefficients, np.int64)
    noise = PARAMETERS.noise_in_lane(3)
    assert noise == 0 if lane else noise >= 0
    added[place] = PARAMETERS.scale * (noise + 1 << lane * PARAMETERS.lane_bits)
    refused(with_coefficients(record_of(sealed), added), cohort_of(sealed))


def test_the_end_of_the_last_coefficient_is_padding_too() -> None:
    parameters = lane_parameters(8, 17, 2, 9001)
    sealed = seal_all(updates_of(2, parameters), sites_of(2), parameters)
    record = CipherWire(parameters).residues(record_of(sealed, parameters)).astype(object)
    record[parameters.values // 2] += parameters.scale << parameters.lane_bits
    forged = pack_residues((record % parameters.modulus).astype(np.uint64), parameters.modulus_bits)
    refused(forged, cohort_of(sealed), by=cipher(parameters))


@pytest.mark.parametrize(("kind", "by"), [("most", 1), ("least", -1)])
@pytest.mark.parametrize("lane", [0, 1])
def test_a_sum_beyond_what_the_cohort_can_send(kind: str, by: int, lane: int) -> None:
    sealed = seal_all(updates_of(2, kind=kind), sites_of(2))
    record, noise = record_of(sealed), PARAMETERS.noise_in_lane(2) if lane == 0 else 0
    for beyond, holds in ((noise, True), (noise + 1, False)):
        offset = np.zeros(PARAMETERS.values, np.int64)
        offset[4 + lane] = by * beyond
        forged = with_added(record, offset)
        if holds:
            cipher().open(forged, BINDING, cohort_of(sealed))
        else:
            refused(forged, cohort_of(sealed))


def test_lawful_noise_cannot_void_a_round() -> None:
    """One site that chooses the largest noise, in every coefficient, moves lane 0 by no more than one that sends as
    many integers more: the sum is in range, however near to the next integer it comes."""
    parameters = lane_parameters(4, 18, 2, 9000)
    updates = updates_of(4, parameters, "most")
    sealed = seal_all(updates, sites_of(4), parameters)
    residues = CipherWire(parameters).residues(record_of(sealed, parameters)).astype(object)
    for added in (NOISE_MOST, 4 * NOISE_MOST):  # one such site, and all of them
        forged = pack_residues(((residues + added) % parameters.modulus).astype(np.uint64), parameters.modulus_bits)
        sums = cipher(parameters).open(forged, BINDING, cohort_of(sealed))
        moved = sums - np.sum(updates, axis=0)
        assert moved.min() >= 0
        assert moved.max() <= parameters.noise_in_lane(4) == 1
        assert not moved[1::2].any()


def test_a_forged_cohort_around_one_site() -> None:
    """The victim's envelope under every name, plus integers of the server's choice: each name has other second
    polynomials, so that nothing comes out."""
    (update,), names = updates_of(1), sites_of(3)
    (victim,) = seal_all([update], names[:1])
    cohort = [replace(victim.contribution, site=site) for site in names]
    refused(with_added(record_of([victim] * 3), np.where(update > 0, -6, 6)), cohort)


def test_contributors_that_the_server_invents() -> None:
    (victim,) = seal_all(updates_of(1), sites_of(1))
    record = record_of([victim])
    for seed in ("00" * 32, "ff" * 32, victim.contribution.seed):
        invented = [Contribution(f"site-{index}", seed) for index in range(1, 4)]
        refused(record, [victim.contribution, *invented])


def test_scaling() -> None:
    """The wire cannot scale second polynomials, which follow from signed seeds."""
    parameters = lane_parameters(1000, 8, 2, 1000)
    study, (update,) = cipher(parameters), updates_of(1, parameters)
    (victim,) = seal_all([update], sites_of(1), parameters)
    for times in (2, 32, 1000):
        refused(record_of([victim] * times, parameters), [victim.contribution], by=study)
        refused(record_of([victim] * times, parameters), [victim.contribution] * times, by=study)
    residues = CipherWire(parameters).residues(victim.payload).astype(object)
    scaled = pack_residues((residues * 1024 % parameters.modulus).astype(np.uint64), parameters.modulus_bits)
    refused(scaled, [victim.contribution], by=study)


def test_one_site_in_place_of_another() -> None:
    sealed = seal_all(updates_of(3), sites_of(3))
    forged = record_of([sealed[0], sealed[0], sealed[2]])
    assert bent(forged, sealed)
    refused(forged, cohort_of(sealed))


def test_one_site_counted_twice_and_named_once() -> None:
    sealed = seal_all(updates_of(2), sites_of(2))
    first, second = cohort_of(sealed)
    twice = record_of([sealed[0], *sealed])
    refused(twice, [first, second])
    refused(twice, [first, first, second])
    refused(twice, [first, replace(first, site="site-2"), second])


def test_a_site_left_out_or_put_in() -> None:
    sealed = seal_all(updates_of(3), sites_of(3))
    cohort = cohort_of(sealed)
    left_out = record_of(sealed[:2])
    refused(left_out, cohort)
    refused(record_of(sealed), cohort[:2])
    # Right number, wrong name.
    refused(left_out, [cohort[0], cohort[2]])
    assert bent(left_out, sealed)
    assert bent(record_of(sealed), sealed[:2])


@pytest.mark.parametrize(
    "other",
    [
        replace(BINDING, run="ac" * 16),
        replace(BINDING, head="bc" * 32),
        replace(BINDING, round=8),
    ],
)
def test_another_run_head_or_round(other: Binding) -> None:
    updates, names = updates_of(2), sites_of(2)
    sealed = seal_all(updates, names, binding=other)
    record = record_of(sealed)
    assert np.array_equal(cipher().open(record, other, cohort_of(sealed)), sum(updates))
    refused(record, cohort_of(sealed))
    # One envelope of another round among envelopes of this one.
    mixed = seal_all(updates[:1], names[:1]) + seal_all(updates[1:], names[1:], binding=other)
    refused(record_of(mixed), cohort_of(mixed))


def test_another_key() -> None:
    updates = updates_of(2)
    sealed = seal_all(updates, sites_of(2))
    record, cohort = record_of(sealed), cohort_of(sealed)
    other = StudySecret.generate(PARAMETERS.modulus_bits)
    refused(record, cohort, by=Cipher(PARAMETERS, other))
    refused(record, cohort, by=Cipher(PARAMETERS, replace(other, mac_key=SECRET.mac_key)))


def test_swapped_seeds() -> None:
    sealed = seal_all(updates_of(2), sites_of(2))
    record, (first, second) = record_of(sealed), cohort_of(sealed)
    refused(record, [replace(first, seed=second.seed), replace(second, seed=first.seed)])
    refused(record, [first, replace(second, seed=first.seed)])
    # The order of contributors does not matter: addition commutes.
    cipher().open(record, BINDING, [second, first])


FLIP_SEALED = seal_all(updates_of(2), sites_of(2))
FLIP_COHORT = cohort_of(FLIP_SEALED)
FLIP_RECORD = record_of(FLIP_SEALED)


@given(st.integers(0, 8 * len(FLIP_RECORD) - 1))
@settings(max_examples=60, deadline=None)
def test_any_flipped_bit_is_told_before_anything_is_opened(bit: int) -> None:
    flipped = bytearray(FLIP_RECORD)
    flipped[bit // 8] ^= 1 << bit % 8
    with contextlib.suppress(EnvelopeError):  # a residue beyond the prime
        assert bent(bytes(flipped), FLIP_SEALED)


@given(st.integers(0, 31), st.integers(0, 7), st.integers(0, 1))
@settings(max_examples=20, deadline=None)
def test_any_flipped_bit_of_a_seed(byte: int, bit: int, site: int) -> None:
    seed = bytearray.fromhex(FLIP_COHORT[site].seed)
    seed[byte] ^= 1 << bit
    cohort = list(FLIP_COHORT)
    cohort[site] = replace(cohort[site], seed=seed.hex())
    refused(FLIP_RECORD, cohort)


@given(st.binary(max_size=2000))
@settings(max_examples=20, deadline=None)
def test_any_other_bytes(data: bytes) -> None:
    refused(data, FLIP_COHORT)
    refused((data + bytes(len(FLIP_RECORD)))[: len(FLIP_RECORD)], FLIP_COHORT)


def test_residues_beyond_the_prime() -> None:
    forged = (1 << PARAMETERS.modulus_bits) - 1 << 3 * PARAMETERS.modulus_bits
    packed = (int.from_bytes(FLIP_RECORD, "little") | forged).to_bytes(len(FLIP_RECORD), "little")
    refused(packed, FLIP_COHORT)


def test_cohorts_that_cannot_be() -> None:
    sealed = seal_all(updates_of(8), sites_of(8))
    record = record_of(sealed)
    refused(record, [])
    refused(record, [*cohort_of(sealed), Contribution("site-8", "00" * 32)])


# The secret


def test_secret_round_trip() -> None:
    data = SECRET.to_bytes()
    assert StudySecret.from_bytes(data) == SECRET
    assert data.startswith(
        b"secfacmic-ckks-2"
        + bytes([PARAMETERS.modulus_bits])
        + SECRET.mac_key
        + struct.pack(">I", len(SECRET.secret_key))
    )


def test_repr_and_errors_show_no_key() -> None:
    texts = [repr(SECRET), str(SECRET), f"{SECRET}"]
    with pytest.raises(KeyFileError) as caught:
        StudySecret.from_bytes(SECRET.to_bytes()[:-1])
    texts.append(str(caught.value))
    assert texts[0] == f"StudySecret(modulus_bits={PARAMETERS.modulus_bits})"
    for text in texts:
        assert repr(SECRET.mac_key)[2:-1] not in text
        assert SECRET.mac_key.hex() not in text
        assert repr(SECRET.secret_key)[2:20] not in text


@given(st.integers(0, 8 * len(SECRET.to_bytes()) - 1))
@settings(max_examples=50)
def test_a_flipped_bit_of_a_secret(bit: int) -> None:
    data = bytearray(SECRET.to_bytes())
    data[bit // 8] ^= 1 << bit % 8
    with pytest.raises(KeyFileError):
        StudySecret.from_bytes(bytes(data))


@given(st.binary(max_size=200))
def test_other_bytes_are_no_secret(data: bytes) -> None:
    with pytest.raises(KeyFileError):
        StudySecret.from_bytes(data)
    with pytest.raises(KeyFileError):
        StudySecret.from_bytes(SECRET.to_bytes()[: len(data)])
    with pytest.raises(KeyFileError):
        StudySecret.from_bytes(SECRET.to_bytes() + data + b"\0")


def test_a_key_that_seal_does_not_take() -> None:
    with pytest.raises(KeyFileError, match="32"):
        StudySecret(PARAMETERS.modulus_bits, SECRET.secret_key, b"short")
    foreign = bytearray(SECRET.secret_key)
    foreign[3] = 5
    for key in (b"", b"junk", SECRET.secret_key[:-1], bytes(foreign), SECRET.secret_key[:16] + bytes(9)):
        with pytest.raises(KeyFileError, match="secret key"):
            Cipher(PARAMETERS, StudySecret(PARAMETERS.modulus_bits, key, SECRET.mac_key))


def test_a_key_for_another_prime_is_told_apart() -> None:
    other = lane_parameters(4, 9, 4, 100)
    with pytest.raises(KeyFileError, match=rf"prime of {PARAMETERS.modulus_bits} bits; expected {other.modulus_bits}"):
        Cipher(other, SECRET)
    # Also when it lies about it: SEAL takes no key of other parameters.
    with pytest.raises(KeyFileError, match="secret key"):
        Cipher(other, replace(SECRET, modulus_bits=other.modulus_bits))


def test_every_prime_is_seals_and_passes_its_check_at_256_bits() -> None:
    for bits, prime in PRIMES.items():
        (modulus,) = sealapi.CoeffModulus.Create(DEGREE, [bits])
        assert modulus.value() == prime
        assert ckks._context(bits).parameters_set()
    with pytest.raises(SealFormatError, match="another prime"):
        ckks._context(58)


def test_secrets_differ() -> None:
    other = StudySecret.generate(PARAMETERS.modulus_bits)
    assert other.secret_key != SECRET.secret_key
    assert other.mac_key != SECRET.mac_key

"""Exact authenticated sums: round trips, tags, and the attacks that the tags stop."""

from __future__ import annotations

import functools
import hmac
import struct
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher as StreamCipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from hypothesis import given, settings
from hypothesis import strategies as st
from tenseal import sealapi

from secure_fed.core.errors import AggregateRefused, KeyFileError, LanesError
from secure_fed.privacy import ckks, seal_format
from secure_fed.privacy.ckks import Cipher, StudySecret
from secure_fed.protocol.packing import (
    DEGREE,
    MODULUS,
    REFUSAL,
    TAG_PRIME,
    Binding,
    CipherWire,
    Contribution,
    Integers,
    LaneParameters,
    PlainSealer,
    PlainWire,
    lane_parameters,
    largest_bits,
    pack_coefficients,
    pack_lanes,
)

SECRET = StudySecret.generate()
BINDING = Binding(run="aa" * 16, head="bb" * 32, round=7)
# Two ciphertexts an envelope, so that something can be swapped between them.
PARAMETERS = lane_parameters(max_sites=8, bits=17, lanes=2, values=9000)


@functools.cache
def cipher(parameters: LaneParameters = PARAMETERS, secret: StudySecret = SECRET) -> Cipher:
    return Cipher(parameters, secret)


def cohort_of(size: int, attempt: int = 0) -> list[Contribution]:
    return [Contribution(f"site-{index}", attempt) for index in range(size)]


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
    cohort: Sequence[Contribution],
    parameters: LaneParameters = PARAMETERS,
    binding: Binding = BINDING,
) -> list[bytes]:
    return [
        cipher(parameters).seal(update, binding, contribution)
        for update, contribution in zip(updates, cohort, strict=True)
    ]


def record_of(payloads: Sequence[bytes], parameters: LaneParameters = PARAMETERS) -> bytes:
    cipher_wire = CipherWire(parameters)
    total = cipher_wire.zero()
    for payload in payloads:
        cipher_wire.add(total, payload)
    return cipher_wire.record(total, [cipher_wire.tail(payload) for payload in payloads])


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


def opened_without_tags(
    monkeypatch: pytest.MonkeyPatch,
    record: bytes,
    cohort: Sequence[Contribution],
    binding: Binding = BINDING,
    by: Cipher | None = None,
) -> Integers:
    """What a site without the tag check would have taken."""
    with monkeypatch.context() as patch:
        patch.setattr(Cipher, "_tags_hold", lambda *_: True)
        return (by or cipher()).open(record, binding, cohort)


# Exactness


@st.composite
def rounds(draw: st.DrawFn) -> tuple[LaneParameters, int, str, int]:
    max_sites = draw(st.sampled_from([1, 2, 3, 4, 7, 8, 16, 32]))
    lanes = draw(st.sampled_from([2, 3]))
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
    updates, cohort = updates_of(sites, parameters, kind, seed), cohort_of(sites)
    of_study, plain = Cipher(parameters, SECRET), PlainSealer(parameters)
    payloads = [of_study.seal(update, BINDING, who) for update, who in zip(updates, cohort, strict=True)]
    order = np.random.default_rng(seed).permutation(sites)
    sums = of_study.open(record_of([payloads[i] for i in order], parameters), BINDING, [cohort[i] for i in order])
    assert sums.dtype == np.int64
    assert np.array_equal(sums, np.sum(updates, axis=0))
    plain_wire = PlainWire(parameters)
    total = plain_wire.zero()
    for update, who in zip(updates, cohort, strict=True):
        plain_wire.add(total, plain.seal(update, BINDING, who))
    assert np.array_equal(plain.open(plain_wire.record(total, [b""] * sites), BINDING, cohort), sums)


@pytest.mark.parametrize(("max_sites", "lanes"), [(4, 2), (64, 2), (4, 3), (32, 3), (256, 2)])
@pytest.mark.parametrize("kind", ["most", "least", "mixed"])
def test_extremes_of_a_full_cohort_at_the_most_bits(max_sites: int, lanes: int, kind: str) -> None:
    parameters = lane_parameters(max_sites, largest_bits(max_sites, lanes), lanes, 4096 * lanes - 50)
    updates, cohort = updates_of(max_sites, parameters, kind), cohort_of(max_sites)
    record = record_of(seal_all(updates, cohort, parameters), parameters)
    assert np.array_equal(cipher(parameters).open(record, BINDING, cohort), np.sum(updates, axis=0))


def test_arrival_order_does_not_change_the_polynomials() -> None:
    payloads = seal_all(updates_of(4), cohort_of(4))
    records = [record_of(order) for order in (payloads, payloads[::-1])]
    size = PARAMETERS.ciphertexts * 27648
    assert records[0][:size] == records[1][:size]
    assert records[0] != records[1]


def words(ciphertext: Any) -> npt.NDArray[np.uint64]:
    array = ciphertext.dyn_array()
    return np.array([array.at(index) for index in range(array.size())], np.uint64)


def test_the_keyless_sum_is_seals_own_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    sites = 5
    cohort = cohort_of(sites)
    payloads = seal_all(updates_of(sites), cohort)
    study = cipher()
    cipher_wire = CipherWire(PARAMETERS)
    evaluator = sealapi.Evaluator(study._context)
    expected = []
    for index in range(PARAMETERS.ciphertexts):
        parts = []
        for payload in payloads:
            seeds, polynomials = cipher_wire.split_envelope(payload)
            part = sealapi.Ciphertext(study._context)
            seal_format.load(part, study._context, study._form.build(seeds[index], polynomials[index]))
            parts.append(part)
        total = sealapi.Ciphertext(study._context)
        evaluator.add_many(parts, total)
        expected.append(words(total))
    rebuilt = []

    class Spy:
        def decrypt(self, ciphertext: Any, plaintext: Any) -> None:
            rebuilt.append(words(ciphertext))
            assert ciphertext.scale == PARAMETERS.scale
            assert ciphertext.parms_id() == study._context.first_parms_id()
            real.decrypt(ciphertext, plaintext)

    real = study._decryptor
    monkeypatch.setattr(study, "_decryptor", Spy())
    study.open(record_of(payloads), BINDING, cohort)
    assert len(rebuilt) == len(expected) == 2
    for ours, theirs in zip(rebuilt, expected, strict=True):
        assert ours.size == 2 * DEGREE
        assert np.array_equal(ours, theirs)


def test_slot_noise_is_what_the_scale_allows_for() -> None:
    parameters = lane_parameters(16, 16, 2, 8000)
    study, cohort = cipher(parameters), cohort_of(16)
    payloads = seal_all(updates_of(16, parameters), cohort, parameters)
    seeds, polynomials = CipherWire(parameters).split_record(record_of(payloads, parameters), 16)
    slots = study._decrypt([site[0] for site in seeds], polynomials[0])
    deviation = float((slots - np.rint(slots)).std()) * parameters.scale
    assert deviation == pytest.approx(3.25 * np.sqrt(4096 * 16 / 2), rel=0.06)


def test_a_real_update_of_sixteen_sites() -> None:
    parameters = lane_parameters(16, 16, 2, 525_312 + 8)
    updates, cohort = updates_of(16, parameters), cohort_of(16)
    payloads = seal_all(updates, cohort, parameters)
    assert len(payloads[0]) < 0.86 * 4 * parameters.values
    record = record_of(payloads, parameters)
    assert np.array_equal(cipher(parameters).open(record, BINDING, cohort), np.sum(updates, axis=0))


def test_sealing_twice_gives_other_bytes_and_the_same_sum() -> None:
    update, who = updates_of(1)[0], cohort_of(1)
    one, other = seal_all([update], who)[0], seal_all([update], who)[0]
    assert one != other
    seeds = PARAMETERS.ciphertexts * 64
    assert not set(CipherWire(PARAMETERS).split_envelope(one)[0]) & set(CipherWire(PARAMETERS).split_envelope(other)[0])
    assert one[seeds:] != other[seeds:]
    for payload in (one, other):
        assert np.array_equal(cipher().open(record_of([payload]), BINDING, who), update)


@pytest.mark.parametrize("value", [PARAMETERS.max_integer + 1, -PARAMETERS.max_integer - 1])
def test_sealing_what_does_not_fit_is_a_bug(value: int) -> None:
    update = np.zeros(PARAMETERS.values, np.int64)
    update[-1] = value
    with pytest.raises(LanesError, match="magnitude"):
        cipher().seal(update, BINDING, cohort_of(1)[0])
    with pytest.raises(LanesError, match="shape"):
        cipher().seal(update[1:], BINDING, cohort_of(1)[0])


# Tags


def brute_force_prf(label: str, tag: int, binding: Binding, *more: str) -> bytes:
    fields = [label, str(tag), binding.run, binding.head, str(binding.round), *more]
    message = b"".join(struct.pack(">I", len(text.encode())) + text.encode() for text in fields)
    return hmac.new(SECRET.tag_key, message, "sha256").digest()


def brute_force_dot(tag: int, binding: Binding, values: Integers) -> int:
    key = brute_force_prf("r", tag, binding)
    stream = StreamCipher(ChaCha20(key, bytes(16)), mode=None).encryptor().update(bytes(8 * values.size))
    total = 0
    for index, value in enumerate(values.tolist()):
        total += (int.from_bytes(stream[8 * index : 8 * index + 8], "little") % 2**61) * value
    return total % TAG_PRIME


@given(st.integers(1, 500), st.integers(0, 2**32), st.sampled_from(["random", "most", "least"]))
@settings(max_examples=30, deadline=None)
def test_dot_products_against_python_integers(size: int, seed: int, kind: str) -> None:
    most = 2**21 - 1
    values = {
        "random": np.random.default_rng(seed).integers(-most, most + 1, size),
        "most": np.full(size, most),
        "least": np.full(size, -most),
    }[kind]
    expected = [brute_force_dot(tag, BINDING, values) for tag in range(2)]
    assert ckks._dot_products(SECRET.tag_key, BINDING, values) == expected
    assert expected[0] != expected[1]


@pytest.mark.parametrize("sign", [1, -1])
def test_dot_products_of_more_than_a_block_at_the_extremes(sign: int) -> None:
    values = np.full(ckks._BLOCK + 1001, sign * (2**21 - 1))
    found = ckks._dot_products(SECRET.tag_key, BINDING, values)
    stream = StreamCipher(ChaCha20(brute_force_prf("r", 1, BINDING), bytes(16)), mode=None).encryptor()
    words_ = np.frombuffer(stream.update(bytes(8 * values.size)), "<u8").tolist()
    assert found[1] == sum(word % 2**61 for word in words_) * sign * (2**21 - 1) % TAG_PRIME


def test_blocks_do_not_change_the_dot_product(monkeypatch: pytest.MonkeyPatch) -> None:
    values = updates_of(1)[0]
    expected = ckks._dot_products(SECRET.tag_key, BINDING, values)
    for block in (1, 7, 8, 1000, 8999):
        monkeypatch.setattr(ckks, "_BLOCK", block)
        assert ckks._dot_products(SECRET.tag_key, BINDING, values[:9000]) == expected


@given(st.sampled_from([(4, 18, 2), (4, 8, 2), (32, 8, 3), (16, 9, 3)]), st.integers(0, 2**32))
@settings(max_examples=20, deadline=None)
def test_an_envelope_holds_values_and_the_digits_of_both_tags(shape: tuple[int, int, int], seed: int) -> None:
    parameters = lane_parameters(*shape, 300)
    update, who = updates_of(1, parameters, seed=seed)[0], Contribution("Krankenhaus Süd", 3)
    payload = cipher(parameters).seal(update, BINDING, who)
    seeds, polynomials = CipherWire(parameters).split_envelope(payload)
    slots = np.rint(cipher(parameters)._decrypt(seeds[:1], polynomials[0])).astype(np.int64)
    width = parameters.bits - 1
    digits = []
    for tag in range(2):
        mask = int.from_bytes(brute_force_prf("u", tag, BINDING, "3", "Krankenhaus Süd"), "big")
        value = (brute_force_dot(tag, BINDING, update) + mask) % TAG_PRIME
        digits += [(value >> (width * place)) % 2**width for place in range(parameters.tag_digits)]
        assert sum(d << (width * i) for i, d in enumerate(digits[-parameters.tag_digits :])) == value
    assert max(digits) <= parameters.max_integer
    expected = pack_lanes(np.concatenate((update, digits)), parameters)
    assert np.array_equal(slots, expected.view(np.float64)[0])


def test_fields_of_the_prf_are_unambiguous() -> None:
    derived = [
        ckks._derive(SECRET.tag_key, label, tag, binding, *more)
        for label, tag, binding, *more in [
            ("u", 1, Binding("ab", "cd", 1), "0", "x"),
            ("u", 1, Binding("abc", "d", 1), "0", "x"),
            ("u", 1, Binding("ab", "cd1", 1), "0", "x"),
            ("u", 1, Binding("ab", "cd", 10), "", "x"),
            ("u", 1, Binding("ab", "cd", 1), "0x", ""),
            ("u", 1, Binding("ab", "cd", 1), "0", "x", ""),
            ("u", 11, Binding("ab", "cd", 1), "0", "x"),
            ("r", 1, Binding("ab", "cd", 1), "0", "x"),
        ]
    ]
    assert len(set(derived)) == len(derived)


# Attacks. Each is refused, and is shown to work where only the tags stop it.


def encoded(slots: npt.NDArray[np.complex128]) -> npt.NDArray[np.uint64]:
    """What a server can compute without any key: a plaintext's NTT coefficients."""
    context = ckks._context()
    plaintext = sealapi.Plaintext()
    sealapi.CKKSEncoder(context).encode(slots.tolist(), PARAMETERS.scale, plaintext)
    return np.array([plaintext.data(index) for index in range(DEGREE)], np.uint64)


def with_added(record: bytes, offset: Integers, contributors: int) -> bytes:
    """Add integers (values and tag digits) to a record's sum, knowing no key."""
    seeds, polynomials = CipherWire(PARAMETERS).split_record(record, contributors)
    plain = np.stack([encoded(row) for row in pack_lanes(offset, PARAMETERS)])
    forged = (polynomials + plain) % np.uint64(MODULUS)
    return pack_coefficients(forged) + b"".join(seed for site in seeds for seed in site)


def test_an_honest_record_is_opened() -> None:
    updates, cohort = updates_of(3), cohort_of(3)
    record = record_of(seal_all(updates, cohort))
    assert np.array_equal(cipher().open(record, BINDING, cohort), np.sum(updates, axis=0))
    # The same addition that forges below, of nothing.
    same = with_added(record, np.zeros(PARAMETERS.integers, np.int64), 3)
    assert np.array_equal(cipher().open(same, BINDING, cohort), np.sum(updates, axis=0))


@pytest.mark.parametrize("place", [0, 4321, PARAMETERS.values - 1, PARAMETERS.values, PARAMETERS.integers - 1])
@pytest.mark.parametrize("by", [1, -1])
def test_one_integer_changed_by_one(monkeypatch: pytest.MonkeyPatch, place: int, by: int) -> None:
    updates, cohort = updates_of(3), cohort_of(3)
    offset = np.zeros(PARAMETERS.integers, np.int64)
    offset[place] = by
    forged = with_added(record_of(seal_all(updates, cohort)), offset, 3)
    refused(forged, cohort)
    sums = opened_without_tags(monkeypatch, forged, cohort)
    assert np.array_equal(sums, np.sum(updates, axis=0) + offset[: PARAMETERS.values])


def test_padding_is_not_a_place_to_write() -> None:
    cohort = cohort_of(2)
    record = record_of(seal_all(updates_of(2), cohort))
    seeds, polynomials = CipherWire(PARAMETERS).split_record(record, 2)
    slots = np.zeros(DEGREE // 2, np.complex128)
    slots[-1] = 1j
    polynomials[-1] = (polynomials[-1] + encoded(slots)) % np.uint64(MODULUS)
    refused(pack_coefficients(polynomials) + b"".join(seed for site in seeds for seed in site), cohort)


@pytest.mark.parametrize(("kind", "by"), [("most", 1), ("least", -1)])
def test_a_sum_beyond_what_the_cohort_can_send(monkeypatch: pytest.MonkeyPatch, kind: str, by: int) -> None:
    cohort = cohort_of(2)
    record = record_of(seal_all(updates_of(2, kind=kind), cohort))
    offset = np.zeros(PARAMETERS.integers, np.int64)
    offset[5] = by
    forged = with_added(record, offset, 2)
    monkeypatch.setattr(Cipher, "_tags_hold", lambda *_: True)
    cipher().open(record, BINDING, cohort)
    refused(forged, cohort)


def test_a_forged_cohort_around_one_site(monkeypatch: pytest.MonkeyPatch) -> None:
    """The victim's envelope under every name, plus a plaintext of the server's choice."""
    (update,), cohort = updates_of(1), cohort_of(3)
    victim = seal_all([update], cohort[:1])[0]
    offset = np.zeros(PARAMETERS.integers, np.int64)
    offset[: PARAMETERS.values] = np.where(update > 0, -6, 6)
    forged = with_added(record_of([victim] * 3), offset, 3)
    refused(forged, cohort)
    sums = opened_without_tags(monkeypatch, forged, cohort)
    assert np.array_equal((sums - offset[: PARAMETERS.values]) // 3, update)


def test_contributors_that_the_server_invents() -> None:
    """A seed always brings a second polynomial, so added names need envelopes under the key."""
    cohort = cohort_of(4)
    victim = seal_all(updates_of(1), cohort[:1])[0]
    record = record_of([victim])
    for seed in (bytes(64), b"\xff" * 64, np.random.default_rng(0).bytes(64)):
        refused(record + 3 * PARAMETERS.ciphertexts * seed, cohort)


def test_scaling(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wire cannot scale a second polynomial; naming its seed many times is the nearest thing to it."""
    parameters = lane_parameters(1024, 8, 2, 1000)
    study, cohort, (update,) = cipher(parameters), cohort_of(1024), updates_of(1, parameters)
    victim = seal_all([update], cohort[:1], parameters)[0]
    # Copies scale the noise as well, which 1024 equal ones show in the slots; 32 do not.
    refused(record_of([victim] * 1024, parameters), cohort, by=study)
    forged = record_of([victim] * 32, parameters)
    refused(forged, cohort[:32], by=study)
    assert np.array_equal(opened_without_tags(monkeypatch, forged, cohort[:32], by=study), 32 * update)
    seeds, polynomials = CipherWire(parameters).split_envelope(victim)
    scaled = (polynomials.astype(object) * 1024 % MODULUS).astype(np.uint64)
    refused(pack_coefficients(scaled) + b"".join(seeds), cohort[:1], by=study)


def test_one_site_in_place_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    updates, cohort = updates_of(3), cohort_of(3)
    payloads = seal_all(updates, cohort)
    forged = record_of([payloads[0], payloads[0], payloads[2]])
    refused(forged, cohort)
    sums = opened_without_tags(monkeypatch, forged, cohort)
    assert np.array_equal(sums, 2 * updates[0] + updates[2])


def test_one_site_counted_twice_and_named_once() -> None:
    cohort = cohort_of(2)
    payloads = seal_all(updates_of(2), cohort)
    twice = record_of([payloads[0], payloads[0], payloads[1]])
    refused(twice, cohort)
    one_tail = PARAMETERS.ciphertexts * 64
    refused(twice[:-one_tail], cohort)
    refused(twice, [cohort[0], cohort[0], cohort[1]])
    refused(twice, [cohort[0], replace(cohort[0], attempt=1), cohort[1]])


def test_a_site_left_out_or_put_in(monkeypatch: pytest.MonkeyPatch) -> None:
    updates, cohort = updates_of(3), cohort_of(3)
    payloads = seal_all(updates, cohort)
    left_out = record_of(payloads[:2])
    refused(left_out, cohort)
    refused(record_of(payloads), cohort[:2])
    # Right number, wrong name.
    refused(left_out, [cohort[0], cohort[2]])
    sums = opened_without_tags(monkeypatch, left_out, [cohort[0], cohort[2]])
    assert np.array_equal(sums, updates[0] + updates[1])


@pytest.mark.parametrize(
    "other",
    [
        replace(BINDING, run="ac" * 16),
        replace(BINDING, head="bc" * 32),
        replace(BINDING, round=8),
    ],
)
def test_another_run_head_or_round(monkeypatch: pytest.MonkeyPatch, other: Binding) -> None:
    updates, cohort = updates_of(2), cohort_of(2)
    record = record_of(seal_all(updates, cohort, binding=other))
    assert np.array_equal(cipher().open(record, other, cohort), sum(updates))
    refused(record, cohort)
    assert np.array_equal(opened_without_tags(monkeypatch, record, cohort), sum(updates))
    # One envelope of another round among envelopes of this one.
    mixed = seal_all(updates[:1], cohort[:1]) + seal_all(updates[1:], cohort[1:], binding=other)
    refused(record_of(mixed), cohort)
    assert np.array_equal(opened_without_tags(monkeypatch, record_of(mixed), cohort), sum(updates))


def test_another_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    updates, cohort = updates_of(2), cohort_of(2)
    record = record_of(seal_all(updates, [cohort[0], replace(cohort[1], attempt=1)]))
    refused(record, cohort)
    assert np.array_equal(opened_without_tags(monkeypatch, record, cohort), sum(updates))
    assert np.array_equal(cipher().open(record, BINDING, [cohort[0], replace(cohort[1], attempt=1)]), sum(updates))


def test_another_key(monkeypatch: pytest.MonkeyPatch) -> None:
    updates, cohort = updates_of(2), cohort_of(2)
    record = record_of(seal_all(updates, cohort))
    refused(record, cohort, by=Cipher(PARAMETERS, StudySecret.generate()))
    refused(record, cohort, by=Cipher(PARAMETERS, replace(StudySecret.generate(), tag_key=SECRET.tag_key)))
    other_tags = Cipher(PARAMETERS, replace(SECRET, tag_key=bytes(32)))
    refused(record, cohort, by=other_tags)
    assert np.array_equal(opened_without_tags(monkeypatch, record, cohort, by=other_tags), sum(updates))


def test_swapped_seeds() -> None:
    updates, cohort = updates_of(2), cohort_of(2)
    record = record_of(seal_all(updates, cohort))
    packed, seeds = record[:-256], [record[-256:][at : at + 64] for at in range(0, 256, 64)]
    refused(packed + seeds[1] + seeds[0] + seeds[2] + seeds[3], cohort)
    refused(packed + seeds[0] + seeds[3] + seeds[2] + seeds[1][:63] + b"\0", cohort)
    # Between contributors of one ciphertext the sum is the same sum: addition commutes.
    same = packed + seeds[2] + seeds[1] + seeds[0] + seeds[3]
    assert np.array_equal(cipher().open(same, BINDING, cohort), sum(updates))


FLIP_UPDATES, FLIP_COHORT = updates_of(2), cohort_of(2)
FLIP_RECORD = record_of(seal_all(FLIP_UPDATES, FLIP_COHORT))


@given(st.integers(0, 8 * len(FLIP_RECORD) - 1))
@settings(max_examples=60, deadline=None)
def test_any_flipped_bit(bit: int) -> None:
    flipped = bytearray(FLIP_RECORD)
    flipped[bit // 8] ^= 1 << bit % 8
    refused(bytes(flipped), FLIP_COHORT)


@given(st.integers(0, 255), st.integers(0, 7))
@settings(max_examples=20, deadline=None)
def test_any_flipped_bit_of_a_seed(byte: int, bit: int) -> None:
    flipped = bytearray(FLIP_RECORD)
    flipped[-1 - byte] ^= 1 << bit
    refused(bytes(flipped), FLIP_COHORT)


@given(st.binary(max_size=2000))
@settings(max_examples=20, deadline=None)
def test_any_other_bytes(data: bytes) -> None:
    refused(data, FLIP_COHORT)
    refused((data + bytes(len(FLIP_RECORD)))[: len(FLIP_RECORD)], FLIP_COHORT)


def test_cohorts_that_cannot_be() -> None:
    record = record_of(seal_all(updates_of(8), cohort_of(8)))
    refused(record, [])
    refused(record[: PARAMETERS.ciphertexts * 27648], [])
    refused(record + record[-PARAMETERS.ciphertexts * 64 :], cohort_of(9))


def test_a_slot_between_two_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cipher, "_tags_hold", lambda *_: True)
    cohort = cohort_of(1)
    record = record_of(seal_all(updates_of(1), cohort))
    seeds, polynomials = CipherWire(PARAMETERS).split_record(record, 1)
    for fraction, holds in ((0.2, True), (0.5, False)):
        slots = np.full(DEGREE // 2, fraction, np.complex128)
        polynomial = (polynomials[0] + encoded(slots)) % np.uint64(MODULUS)
        moved = pack_coefficients(np.stack((polynomial, polynomials[1]))) + b"".join(seeds[0])
        if holds:
            cipher().open(moved, BINDING, cohort)
        else:
            refused(moved, cohort)


# The secret


def test_secret_round_trip() -> None:
    data = SECRET.to_bytes()
    assert StudySecret.from_bytes(data) == SECRET
    assert data.startswith(b"secfacmic-ckks-1" + SECRET.tag_key + struct.pack(">I", len(SECRET.secret_key)))


def test_repr_and_errors_show_no_key() -> None:
    texts = [repr(SECRET), str(SECRET), f"{SECRET}"]
    with pytest.raises(KeyFileError) as caught:
        StudySecret.from_bytes(SECRET.to_bytes()[:-1])
    texts.append(str(caught.value))
    assert texts[0] == "StudySecret()"
    for text in texts:
        assert repr(SECRET.tag_key)[2:-1] not in text
        assert SECRET.tag_key.hex() not in text
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
        StudySecret(SECRET.secret_key, b"short")
    foreign = bytearray(SECRET.secret_key)
    foreign[3] = 5
    for key in (b"", b"junk", SECRET.secret_key[:-1], bytes(foreign), SECRET.secret_key[:16] + bytes(9)):
        with pytest.raises(KeyFileError, match="secret key"):
            Cipher(PARAMETERS, StudySecret(key, SECRET.tag_key))


def test_secrets_differ() -> None:
    other = StudySecret.generate()
    assert other.secret_key != SECRET.secret_key
    assert other.tag_key != SECRET.tag_key

"""Pads and shares: published vectors, what they hide, that they cancel, and every dropout of small cohorts."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from itertools import combinations, permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secure_fed.core.errors import AggregateRefused, EnvelopeError, ProtocolError, SecfacmicError
from secure_fed.privacy.ckks import Cipher, StudySecret
from secure_fed.protocol import pads, share_frames, shares
from secure_fed.protocol.envelope import RoundPosition
from secure_fed.protocol.packing import Binding, CipherWire, Sealed, lane_parameters
from secure_fed.protocol.quorum import quorum
from secure_fed.protocol.residues import PRIMES, Residues, expand, pack_residues
from tests import make_word_vectors
from tests.make_pad_vectors import CHANGES, keys, pads_of, place, privates
from tests.make_vectors import VECTORS

Q = PRIMES[44]


class Cohort:
    """Sites of one attempt, each with a fresh key and a mask."""

    def __init__(self, count: int, **changed: Any) -> None:
        self.names = [f"site{number:02d}" for number in range(1, count + 1)]
        self.privates = {name: hashlib.sha256(name.encode()).digest() for name in self.names}
        self.seeds = {name: hashlib.sha256(b"seed" + name.encode()).digest() for name in self.names}
        position = RoundPosition("1" * 64, "2" * 64, "3" * 64, 0, changed.get("round", 1))
        self.keys = {name: pads.public_of(key) for name, key in self.privates.items()}
        self.place = pads.PadPlace("4" * 64, position, changed.get("attempt", 1), changed.get("cohort", "5" * 64))

    def pads(self, name: str) -> pads.SitePads:
        return pads.SitePads(self.place, self.keys, name, self.privates[name])

    def masked(self, name: str, residues: Residues, modulus: int = Q) -> Residues:
        return self.pads(name).masked(residues, self.seeds[name], modulus)

    def points(self, maker: str) -> dict[str, int]:
        return {name: at for at, name in enumerate(self.names, 1) if name != maker}


def zeros(count: int) -> Residues:
    return np.zeros(count, np.uint64)


# Vectors


def cases_of(kind: str) -> list[Any]:
    document = json.loads((VECTORS / "v2" / "pads.json").read_text())
    (group,) = [group for group in document["testGroups"] if group["type"] == kind]
    assert {test["result"] for test in group["tests"]} <= {"valid", "invalid"}
    return [pytest.param(test, id=f"{test['tcId']}-{test['comment']}") for test in group["tests"]]


def place_of(test: dict[str, Any]) -> pads.PadPlace:
    position = RoundPosition(test["run"], test["head"], test["key"], test["amendment"], test["round"])
    return pads.PadPlace(test["study"], position, test["attempt"], test["cohort"])


@pytest.mark.parametrize("test", cases_of("FreshKey"))
def test_fresh_keys_of_the_vectors_are_taken_or_refused(test: dict[str, Any]) -> None:
    if test["result"] == "valid":
        pads.check_fresh_key(test["public"], "ash")
        return
    text = {"SmallOrder": "small order", "NonCanonical": "one encoding"}[test["flags"][0]]
    with pytest.raises(EnvelopeError, match=f"fresh key of ash.*{text}"):
        pads.check_fresh_key(test["public"], "ash")


@pytest.mark.parametrize("test", cases_of("PadKey"))
def test_pad_keys_are_those_of_the_vectors(test: dict[str, Any]) -> None:
    private = bytes.fromhex(test["private"])
    keys = {test["site"]: pads.public_of(private), test["other"]: test["public"]}
    assert pads.SitePads(place_of(test), keys, test["site"], private).pad_key(test["other"]).hex() == test["padKey"]


@pytest.mark.parametrize("test", cases_of("Stream"))
def test_pads_are_those_of_the_vectors(test: dict[str, Any]) -> None:
    found = pads.pad(bytes.fromhex(test["streamKey"]), test["count"], int(test["modulus"]))
    assert [str(one) for one in found[: len(test["first"])]] == test["first"]
    assert hashlib.sha256(found.astype("<u8").tobytes()).hexdigest() == test["sha256LittleEndian64"]


@pytest.mark.parametrize("test", cases_of("Mask"))
def test_masks_and_their_commitments_are_those_of_the_vectors(test: dict[str, Any]) -> None:
    seed = bytes.fromhex(test["seed"])
    assert pads.mask_key(seed, place_of(test), test["site"]).hex() == test["streamKey"]
    assert pads.commitment(seed, test["site"]) == test["commitment"]


@pytest.mark.parametrize("test", cases_of("Masked"))
def test_masked_residues_are_those_of_the_vectors(test: dict[str, Any]) -> None:
    mine = pads.SitePads(place_of(test), test["keys"], test["site"], bytes.fromhex(test["private"]))
    residues = np.array([int(one) for one in test["residues"]], np.uint64)
    found = mine.masked(residues, bytes.fromhex(test["seed"]), int(test["modulus"]))
    assert [str(one) for one in found] == test["masked"]


@pytest.mark.parametrize("test", cases_of("Share"))
def test_shares_are_those_of_the_vectors(test: dict[str, Any]) -> None:
    coefficients = bytes.fromhex(test["coefficients"])
    found = shares.share(bytes.fromhex(test["secret"]), test["needed"], test["points"], coefficients)
    assert [one.hex() for one in found] == test["shares"]
    for chosen in list(combinations(zip(test["points"], found, strict=True), test["needed"]))[:20]:
        assert shares.combine(dict(chosen)).hex() == test["secret"]


@pytest.mark.parametrize("test", cases_of("SealedShare"))
def test_sealed_shares_of_the_vectors_open_or_are_refused(test: dict[str, Any]) -> None:
    private = bytes.fromhex(test["private"])
    keys = {test["site"]: pads.public_of(private), test["maker"]: test["public"]}
    mine, sealed = pads.SitePads(place_of(test), keys, test["site"], private), bytes.fromhex(test["sealed"])
    if test["result"] == "valid":
        assert mine.open_share(sealed, test["maker"]).hex() == test["share"]
        return
    with pytest.raises(EnvelopeError, match="does not open to birch"):
        mine.open_share(sealed, test["maker"])


@pytest.mark.parametrize("test", cases_of("SharePath"))
def test_paths_of_the_vectors_lead_to_their_root_or_not(test: dict[str, Any]) -> None:
    siblings = [bytes.fromhex(one) for one in test["path"]]
    try:
        root = shares.root_by_path(bytes.fromhex(test["leaf"]), test["index"], test["count"], siblings).hex()
    except EnvelopeError:
        root = ""
    assert (root == test["root"]) == (test["result"] == "valid")


# Keys


def test_two_sites_with_one_fresh_key_are_refused_by_name() -> None:
    pads.refuse_copied_keys(keys())
    with pytest.raises(EnvelopeError, match="ash and cedar sent the same fresh key"):
        pads.refuse_copied_keys(keys() | {"cedar": keys()["ash"]})


def test_a_copied_key_in_disguise_is_refused_as_the_copy_that_it_is() -> None:
    """A point and its sum with one of order 2, whose coordinate is 1 / u, have the same secret with everybody."""
    copied = int.from_bytes(bytes.fromhex(keys()["ash"]), "little")
    twin = pow(copied, -1, 2**255 - 19).to_bytes(32, "little").hex()
    pads.check_fresh_key(twin, "cedar")
    with pytest.raises(EnvelopeError, match="ash and cedar sent the same fresh key"):
        pads.refuse_copied_keys(keys() | {"cedar": twin})


def test_a_site_whose_key_was_replaced_in_the_cohort_computes_no_pad() -> None:
    with pytest.raises(EnvelopeError, match="another fresh key for ash"):
        pads.SitePads(place(), keys(), "ash", privates()["birch"])


def test_a_small_order_key_in_a_cohort_gives_no_pad() -> None:
    small = keys() | {"cedar": "00" * 32}
    with pytest.raises(EnvelopeError, match="small order"):
        pads.SitePads(place(), small, "ash", privates()["ash"]).masked(zeros(8), bytes(32), Q)


def test_private_keys_and_secrets_stand_in_no_repr() -> None:
    mine = pads_of(place(), "ash")
    assert privates()["ash"].hex() not in repr(mine)
    assert str(privates()["ash"]) not in repr(mine)


@pytest.mark.parametrize("changed", CHANGES)
def test_pads_masks_and_share_keys_of_another_attempt_are_others(changed: str) -> None:
    here, there = (pads_of(at, "ash") for at in (place(), place(**{changed: CHANGES[changed]})))
    assert here.pad_key("birch") != there.pad_key("birch")
    assert pads.mask_key(bytes(32), here.place, "ash") != pads.mask_key(bytes(32), there.place, "ash")
    assert here.seal_share(bytes(32), "birch") != there.seal_share(bytes(32), "birch")


def test_a_seed_that_somebody_copies_gives_another_mask() -> None:
    assert pads.mask_key(bytes(32), place(), "ash") != pads.mask_key(bytes(32), place(), "birch")
    assert pads.commitment(bytes(32), "ash") != pads.commitment(bytes(32), "birch")


# Sums


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 9), st.sampled_from(sorted(PRIMES)), st.integers(1, 40), st.randoms(use_true_random=False))
def test_pads_of_a_cohort_cancel_and_masks_come_off(count: int, bits: int, length: int, draw: Any) -> None:
    cohort, modulus = Cohort(count), PRIMES[bits]
    plain = {name: expand(hashlib.sha256(f"{draw.random()}".encode()).digest(), length, modulus)
             for name in cohort.names}  # fmt: skip
    masked = [cohort.masked(name, plain[name], modulus) for name in cohort.names]
    for name, found in zip(cohort.names, masked, strict=True):
        assert np.array_equal(cohort.pads(name).unmasked(found, cohort.seeds[name], modulus), plain[name])
    total = np.array([sum(int(one[at]) for one in masked) % modulus for at in range(length)], np.uint64)
    bare = pads.without_masks(total, cohort.place, cohort.seeds, modulus)
    assert bare.tolist() == [sum(int(one[at]) for one in plain.values()) % modulus for at in range(length)]


def test_what_a_site_adds_is_the_closed_form() -> None:
    """y - c = PRG(b) + the pads with those behind it - the pads with those before it, in Python's integers."""
    cohort = Cohort(5)
    for place_in, name in enumerate(cohort.names):
        mine = cohort.pads(name)
        parts = [pads.pad(pads.mask_key(cohort.seeds[name], cohort.place, name), 40, Q).tolist()]
        signs = [1]
        for other_place, other in enumerate(cohort.names):
            if other != name:
                parts.append(pads.pad(mine.pad_key(other), 40, Q).tolist())
                signs.append(1 if place_in < other_place else -1)
        expected = [sum(sign * part[at] for sign, part in zip(signs, parts, strict=True)) % Q for at in range(40)]
        assert cohort.masked(name, zeros(40)).tolist() == expected


def test_residues_at_the_edges_stay_below_the_modulus() -> None:
    total = np.array([0, 0, Q - 1, Q - 1, 5], np.uint64)
    taken = np.array([0, Q - 1, 0, Q - 1, 7], np.uint64)
    pads._subtract(total, taken, Q)
    assert total.tolist() == [0, 1, Q - 1, 0, Q - 2]


def chi_square(values: np.ndarray[Any, Any], cells: int) -> float:
    """How many standard deviations the chi-square statistic of equal cells is from its mean."""
    counts = np.bincount(values, minlength=cells)
    expected = values.size / cells
    statistic = float(((counts - expected) ** 2 / expected).sum())
    return (statistic - (cells - 1)) / math.sqrt(2 * (cells - 1))


def test_an_envelope_is_uniform_to_all_but_one_honest_pair() -> None:
    """With the key, every pad but one and every mask but two: low bits, high bits and pairs are flat (5 sigma)."""
    cohort, count = Cohort(4), 2**16
    constant = np.full(count, 12345, np.uint64)  # the worst plaintext: one value everywhere
    honest, other = cohort.names[1], cohort.names[2]
    seen = cohort.masked(honest, constant)
    mine = cohort.pads(honest)
    for colluder in (cohort.names[0], cohort.names[3]):
        known = pads.pad(mine.pad_key(colluder), count, Q)
        seen = (seen + (known if colluder < honest else Q - known)) % np.uint64(Q)
    known = pads.pad(pads.mask_key(cohort.seeds[honest], cohort.place, honest), count, Q)
    seen = (seen + (np.uint64(Q) - known)) % np.uint64(Q)
    for values in (seen & np.uint64(255), seen * np.uint64(256) // np.uint64(Q) if Q < 2**56 else seen):
        assert abs(chi_square(values.astype(np.int64), 256)) < 5
    # And what is left is that one pad exactly.
    left = (seen + np.uint64(Q) - constant) % np.uint64(Q)
    assert np.array_equal(left, pads.pad(mine.pad_key(other), count, Q))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_subset_short_of_the_cohort_is_uniform_and_uncorrelated(size: int) -> None:
    """A server with all masks and the key: sums of some of the envelopes tell nothing of what is in them."""
    cohort, count = Cohort(4), 2**14
    rng = np.random.default_rng(5)
    values = {name: rng.integers(0, 1000, count).astype(np.uint64) for name in cohort.names}
    masked = {name: cohort.masked(name, values[name]) for name in cohort.names}
    for subset in combinations(cohort.names, size):
        total, plain = zeros(count), np.zeros(count)
        for name in subset:
            mask = pads.pad(pads.mask_key(cohort.seeds[name], cohort.place, name), count, Q)
            total = (total + masked[name] + (np.uint64(Q) - mask)) % np.uint64(Q)
            plain += values[name]
        assert abs(chi_square((total & np.uint64(63)).astype(np.int64), 64)) < 5
        assert abs(chi_square((total * np.uint64(64) // np.uint64(Q)).astype(np.int64), 64)) < 5
        assert abs(np.corrcoef(total.astype(np.float64), plain)[0, 1]) < 5 / math.sqrt(count)


@pytest.mark.parametrize("changed", [{"attempt": 2}, {"cohort": "6" * 64}, {"round": 2}])
def test_envelopes_of_two_attempts_do_not_cancel(changed: dict[str, Any]) -> None:
    first, second = Cohort(3), Cohort(3, **changed)
    names = first.names
    mixed = [first.masked(names[0], zeros(64)), second.masked(names[1], zeros(64)), second.masked(names[2], zeros(64))]
    total = sum(one.astype(object) for one in mixed) % Q
    bare = pads.without_masks(np.array(total, np.uint64), second.place, second.seeds, Q)
    assert np.count_nonzero(bare) == 64


# Shares


def test_two_generates_the_units_of_the_field() -> None:
    order = 65_535
    for prime in (3, 5, 17, 257):
        power = np.array([1], np.uint32)
        for bit in f"{order // prime:b}":
            power = shares.multiply(power, power)
            power = shares.multiply(power, np.array([2 if bit == "1" else 1], np.uint32))
        assert power[0] != 1
    everything = np.arange(1, 65_536, dtype=np.uint32)
    assert np.all(shares.multiply(everything, shares.invert(everything)) == 1)
    assert shares.invert(np.zeros(1, np.uint32))[0] == 0


FIELD = st.integers(0, 65_535)


@given(FIELD, FIELD, FIELD)
def test_products_are_those_of_a_field(left: int, right: int, third: int) -> None:
    a, b, c = (np.array([one], np.uint32) for one in (left, right, third))
    slow = 0
    for bit in range(16):  # by hand: carry-less product, then the remainder
        slow ^= (left << bit) * (right >> bit & 1)
    for bit in range(30, 15, -1):
        slow ^= (0x1100B << bit - 16) * (slow >> bit & 1)
    assert shares.multiply(a, b)[0] == slow == shares.multiply(b, a)[0]
    assert shares.multiply(a, b ^ c)[0] == (shares.multiply(a, b) ^ shares.multiply(a, c))[0]
    assert shares.multiply(shares.multiply(a, b), c)[0] == shares.multiply(a, shares.multiply(b, c))[0]


@settings(max_examples=60, deadline=None)
@given(st.binary(min_size=32, max_size=32), st.sets(st.integers(1, 65_535), min_size=1, max_size=12), st.data())
def test_any_needed_shares_give_the_secret(secret: bytes, points: set[int], data: Any) -> None:
    needed = data.draw(st.integers(1, len(points)))
    order = data.draw(st.permutations(sorted(points)))
    dealt = dict(zip(order, shares.share(secret, needed, order), strict=True))
    chosen = data.draw(st.permutations(order))[:needed]
    assert shares.combine({point: dealt[point] for point in chosen}) == secret


def test_fewer_shares_fit_every_secret() -> None:
    """For each other secret there are coefficients that give the same q - 1 shares: they tell nothing."""
    points, needed = [1, 2, 3, 4], 3
    dealt = dict(zip(points, shares.share(bytes(range(32)), needed, points), strict=True))
    known = {1: dealt[1], 4: dealt[4]}
    for secret in (bytes(32), bytes(range(1, 33)), b"\xff" * 32):
        # The polynomial through the secret at 0 and the two known shares: shares at 2 and 3 are then decided.
        line = {}
        for point in (2, 3):
            weights = _lagrange([0, 1, 4], point)
            line[point] = b"".join(
                _combined(weights, [secret[at : at + 2], known[1][at : at + 2], known[4][at : at + 2]])
                for at in range(0, 32, 2)
            )
        assert shares.combine({1: known[1], 4: known[4], 2: line[2]}) == secret
        assert shares.combine({1: known[1], 3: line[3], 4: known[4]}) == secret


def _product(*values: int) -> int:
    result = np.array([1], np.uint32)
    for value in values:
        result = shares.multiply(result, np.array([value], np.uint32))
    return int(result[0])


def _lagrange(points: list[int], at: int) -> list[int]:
    found = []
    for one in points:
        factors = [
            factor
            for other in points
            if other != one
            for factor in (at ^ other, int(shares.invert(np.array([one ^ other], np.uint32))[0]))
        ]
        found.append(_product(*factors))
    return found


def _combined(weights: list[int], words: list[bytes]) -> bytes:
    total = 0
    for weight, word in zip(weights, words, strict=True):
        total ^= _product(weight, int.from_bytes(word, "big"))
    return total.to_bytes(2, "big")


@pytest.mark.parametrize("points", [[0, 1], [1, 1], [1, 65_536], [1]])
def test_shares_at_wrong_places_are_refused(points: list[int]) -> None:
    with pytest.raises(ValueError, match="expected"):
        shares.share(bytes(32), 2, points)


@pytest.mark.parametrize("points", [[], [0, 1], [1, 65_536]])
def test_a_secret_of_shares_at_wrong_places_is_refused(points: list[int]) -> None:
    with pytest.raises(ValueError, match="expected some"):
        shares.combine(dict.fromkeys(points, bytes(32)))


@given(st.integers(1, 70), st.data())
def test_every_leaf_has_a_path_to_the_root_and_no_other_place(count: int, data: Any) -> None:
    leaves = [shares.leaf(bytes([at]), bytes(32)) for at in range(count)]
    root, paths = shares.tree(leaves)
    index = data.draw(st.integers(0, count - 1))
    assert shares.root_by_path(leaves[index], index, count, paths[index]) == root
    for wrong, path in ((index, [*paths[index], bytes(32)]), (count, paths[-1]), (-1, paths[0])):
        with pytest.raises(EnvelopeError, match="path"):
            shares.root_by_path(leaves[index], wrong, count, path)
    if count > 1:
        assert shares.root_by_path(leaves[index ^ 1] if index ^ 1 < count else b"", index, count, paths[index]) != root


# Words


@pytest.mark.parametrize("kind", list(make_word_vectors.CHECKS))
def test_words_of_padded_rounds_are_taken_and_refused_as_published(kind: str) -> None:
    document = json.loads((VECTORS / "v2" / "pad_words.json").read_text())
    (group,) = [group for group in document["testGroups"] if group["type"] == kind]
    assert {"Honest", "Wrong", "BitFlip", "Truncated", "Length", "Header"} == {
        flag for test in group["tests"] for flag in test["flags"]
    }
    check = make_word_vectors.CHECKS[kind]
    for test in group["tests"]:
        if test["result"] == "valid":
            check(bytes.fromhex(test["frame"]))
            continue
        with pytest.raises(SecfacmicError):
            check(bytes.fromhex(test["frame"]))


def test_an_arrived_needs_a_checked_without_complaints_of_each_of_the_cohort() -> None:
    study, members, digest = make_word_vectors.study(), make_word_vectors.members(), "5" * 64
    names = ("ash", "birch", "cedar")

    def word(name: str, over: Sequence[str] = (), check: str = digest) -> bytes:
        return share_frames.sign_checked(study, check, name, over, make_word_vectors.signing(name))[-64:]

    good = [word(name) for name in names]
    share_frames.refuse_unchecked(b"".join(good), study, members, digest, names)
    for wrong in ([], good[:2], [*good, good[0]], [b"".join(good)[:-1]]):
        with pytest.raises(ProtocolError, match="expected a CHECKED of each of ash, birch, cedar"):
            share_frames.refuse_unchecked(b"".join(wrong), study, members, digest, names)
    for bad in (good[0], word("birch", ["ash"]), word("birch", check="6" * 64), bytes(64)):
        with pytest.raises(ProtocolError, match="ARRIVED without a CHECKED of birch"):
            share_frames.refuse_unchecked(good[0] + bad + good[2], study, members, digest, names)


def test_places_of_a_cohort_have_one_text_and_whatever_else_is_refused() -> None:
    names = tuple(f"site{number}" for number in range(11))
    for some in ((0,), (10,), (0, 7, 8), range(11)):
        chosen = tuple(names[place] for place in some)
        text = share_frames.places(names, reversed(chosen))
        assert share_frames.at_places(text, names) == chosen
        assert len(text) == 4
    assert share_frames.places(names, ["site0", "site10"]) == "0401"
    for text in ("0000", "0800", "01", "000401"):
        with pytest.raises(EnvelopeError, match=f"places {text}; expected some of 11, in 2 bytes"):
            share_frames.at_places(text, names)


def test_words_for_others_hold_for_these_checks_of_a_quorum_that_revealed() -> None:
    """Of five, two are gone and one came back; every word must be one that its site signed for the record's checks."""
    names = ("ash", "birch", "cedar", "dogwood", "fir")
    checks = {name: (number, 2**50 + number) for number, name in enumerate(names)}
    said = {"ash": ("cedar", "dogwood"), "birch": ("ash", "dogwood", "fir"), "cedar": ("fir", "dogwood")}

    def word(site: str, gone: Sequence[str], **changed: tuple[int, int]) -> share_frames.Witness:
        of = {name: (checks | changed)[name] for name in gone}
        key = make_word_vectors.signing(site)
        frame = share_frames.sign_witness(make_word_vectors.study(), make_word_vectors.ARRIVED, site, names, of, key)
        return share_frames.Witness(site, share_frames.places(names, gone), frame[-64:].hex())

    def check(
        words: Sequence[share_frames.Witness], gone: Sequence[str] = ("dogwood",), needed: int = 3, arrived: str = ""
    ) -> None:
        share_frames.check_witnesses(
            *(words, make_word_vectors.study(), make_word_vectors.members()),
            *(arrived or make_word_vectors.ARRIVED, checks, gone, needed),
        )

    good = [word(site, gone) for site, gone in said.items()]
    check(good)
    check(good, ("dogwood", "fir"), 2)
    check([], ())
    refused: dict[str, Callable[[], None]] = {
        "the checks of dogwood have fewer witnesses than a quorum; expected 4": lambda: check(good, needed=4),
        "the checks of fir have fewer witnesses than a quorum; expected 3": lambda: check(good, ("dogwood", "fir")),
        "witnesses ash, birch, birch, cedar": lambda: check([*good[:2], *good[1:]]),
        "witnesses birch, ash, cedar": lambda: check([good[1], good[0], good[2]]),
        "witnesses ash, birch, cedar; expected such as revealed": lambda: check(good, ("cedar",), 1),
        "witnesses fir": lambda: check([word("fir", ["dogwood"])], ("dogwood", "fir"), 0),
        "WITNESS of ash for ash, dogwood": lambda: check([word("ash", ["ash", "dogwood"]), *good[1:]]),
        "WITNESS of ash for cedar; expected others, some": lambda: check([word("ash", ["cedar"])], needed=0),
        "witness of 'elm', which is no site": lambda: share_frames.check_witnesses(
            [good[0]._replace(site="elm", gone="08")], make_word_vectors.study(), make_word_vectors.members(),
            make_word_vectors.ARRIVED, checks | {"elm": (1, 2)}, ["dogwood"], 1,
        ),
        "not by the key": lambda: check([word("ash", ["cedar", "dogwood"], cedar=(7, 7)), *good[1:]]),
        "not by the key that": lambda: check([word("ash", ["cedar", "dogwood"], dogwood=(7, 7)), *good[1:]]),
        "its signature is not": lambda: check([good[0]._replace(gone="08"), *good[1:]]),
        "signature": lambda: check(good, arrived="9" * 64),
        "places e8": lambda: check([good[0]._replace(gone="e8"), *good[1:]]),
    }  # fmt: skip
    for told, call in refused.items():
        with pytest.raises(EnvelopeError, match=told):
            call()


def test_the_published_words_are_what_is_signed_today(tmp_path: Path) -> None:
    make_word_vectors.write(tmp_path)
    assert (tmp_path / "pad_words.json").read_text() == (VECTORS / "v2" / "pad_words.json").read_text()


# Recovery, with real ciphertexts

PARAMETERS = lane_parameters(max_sites=16, bits=9, lanes=2, values=24)


@pytest.fixture(scope="module")
def cipher() -> Cipher:
    return Cipher(PARAMETERS, StudySecret.generate(PARAMETERS.modulus_bits))


class Attempt:
    """One attempt's envelopes under one key, with pads, and the server's sum of them."""

    def __init__(self, cipher: Cipher, count: int, seed: int = 1) -> None:
        self.cipher, self.cohort = cipher, Cohort(count)
        self.needed = quorum(count, 1, 1)
        self.binding = Binding(run="1" * 64, head="2" * 64, round=1)
        self.wire = CipherWire(PARAMETERS)
        rng = np.random.default_rng(seed)
        most = PARAMETERS.max_integer
        self.integers = {name: rng.integers(-most, most + 1, PARAMETERS.values) for name in self.cohort.names}
        self.sealed = {name: cipher.seal(self.integers[name], self.binding, name) for name in self.cohort.names}
        self.envelopes = {name: self.envelope(name, sealed) for name, sealed in self.sealed.items()}
        self.dealt = {name: self.deal(name) for name in self.cohort.names if count > self.needed}

    def envelope(self, name: str, sealed: Sealed) -> bytes:
        residues = self.wire.residues(sealed.payload)
        return pack_residues(self.cohort.masked(name, residues, PARAMETERS.modulus), PARAMETERS.modulus_bits)

    def deal(self, name: str) -> dict[str, bytes]:
        points = self.cohort.points(name)
        made = shares.share(self.cohort.seeds[name], self.needed, list(points.values()))
        return dict(zip(points, made, strict=True))

    def total(self, order: tuple[str, ...]) -> bytes:
        total = self.wire.zero()
        for name in order:
            total = self.wire.add(total, self.envelopes[name])
        return self.wire.record(total, len(order))

    def seeds(self, gone: tuple[str, ...], helpers: tuple[str, ...]) -> dict[str, bytes]:
        """Of everybody: as revealed, or of those who are gone by the shares of some others."""
        return {
            name: self.cohort.seeds[name]
            if name not in gone
            else shares.combine({self.cohort.points(name)[one]: self.dealt[name][one] for one in helpers})
            for name in self.cohort.names
        }

    def opened(self, record: bytes, seeds: dict[str, bytes]) -> Any:
        bare = pads.without_masks(self.wire.residues(record), self.cohort.place, seeds, PARAMETERS.modulus)
        payload = pack_residues(bare, PARAMETERS.modulus_bits)
        return self.cipher.open(payload, self.binding, [sealed.contribution for sealed in self.sealed.values()])

    def expected(self) -> Any:
        return sum(self.integers.values())


@pytest.mark.parametrize("count", [3, 4, 5, 6])
def test_any_dropout_after_the_envelope_costs_nothing_while_a_quorum_stays(cipher: Cipher, count: int) -> None:
    attempt = Attempt(cipher, count)
    record, tried = attempt.total(tuple(attempt.cohort.names)), 0
    for away in range(count - attempt.needed + 1):
        for gone in combinations(attempt.cohort.names, away):
            staying = tuple(name for name in attempt.cohort.names if name not in gone)
            for helpers in combinations(staying, attempt.needed):
                seeds = attempt.seeds(gone, helpers)
                assert seeds == attempt.cohort.seeds
                tried += 1
            assert np.array_equal(attempt.opened(record, seeds), attempt.expected())
    assert tried >= 1
    if count == attempt.needed:
        assert attempt.dealt == {}  # nobody else could help: no share leaves


@pytest.mark.parametrize("count", range(3, 17))
def test_encrypted_sums_with_pads_are_the_plain_sums_for_arrival_orders(cipher: Cipher, count: int) -> None:
    attempt = Attempt(cipher, count, seed=count)
    names = tuple(attempt.cohort.names)
    draw = np.random.default_rng(count)
    orders = list(permutations(names)) if count <= 4 else [tuple(draw.permutation(names)) for _ in range(6)]
    records = {attempt.total(tuple(str(name) for name in order)) for order in orders}
    (record,) = records
    assert np.array_equal(attempt.opened(record, attempt.cohort.seeds), attempt.expected())
    if count > attempt.needed:  # as many have gone as may
        seeds = attempt.seeds(names[attempt.needed :], names[: attempt.needed])
        assert np.array_equal(attempt.opened(record, seeds), attempt.expected())


def test_q_minus_1_shares_wrong_ones_and_those_of_another_attempt_rebuild_nothing(cipher: Cipher) -> None:
    attempt = Attempt(cipher, 6)
    cohort, gone = attempt.cohort, attempt.cohort.names[5]
    points, dealt = cohort.points(gone), attempt.dealt[gone]
    again = dict(zip(points, shares.share(cohort.seeds[gone], attempt.needed, list(points.values())), strict=True))
    helpers = cohort.names[: attempt.needed]
    good = {points[name]: dealt[name] for name in helpers}
    flipped = good | {points[helpers[0]]: bytes([good[points[helpers[0]]][0] ^ 1]) + good[points[helpers[0]]][1:]}
    mixed = good | {points[helpers[0]]: again[helpers[0]]}
    committed = pads.commitment(cohort.seeds[gone], gone)
    assert pads.commitment(shares.combine(good), gone) == committed
    for wrong in (dict(list(good.items())[:-1]), flipped, mixed):
        assert pads.commitment(shares.combine(wrong), gone) != committed


def test_nothing_opens_while_one_mask_is_missing(cipher: Cipher) -> None:
    attempt = Attempt(cipher, 3)
    record = attempt.total(tuple(attempt.cohort.names))

    seeds = attempt.cohort.seeds | {attempt.cohort.names[0]: bytes(32)}
    with pytest.raises(AggregateRefused):
        attempt.opened(record, seeds)


def test_the_key_and_two_colluders_with_the_server_do_not_open_one_update(cipher: Cipher) -> None:
    attempt = Attempt(cipher, 4)
    cohort, victim = attempt.cohort, attempt.cohort.names[1]

    residues = attempt.wire.residues(attempt.envelopes[victim])
    mine = cohort.pads(victim)
    for colluder in (cohort.names[0], cohort.names[3]):
        known = pads.pad(mine.pad_key(colluder), residues.size, PARAMETERS.modulus)
        step = known if colluder < victim else PARAMETERS.modulus - known
        residues = (residues + step) % np.uint64(PARAMETERS.modulus)
    bare = pads.without_masks(residues, cohort.place, {victim: cohort.seeds[victim]}, PARAMETERS.modulus)
    with pytest.raises(AggregateRefused):
        cipher.open(
            pack_residues(bare, PARAMETERS.modulus_bits), attempt.binding, [attempt.sealed[victim].contribution]
        )

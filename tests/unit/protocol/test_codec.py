"""Updates as bounded integers: bounds, unbiased rounding, exact averages."""

from __future__ import annotations

import contextlib
import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from secure_fed.core.errors import LanesError, NonFiniteUpdateError
from secure_fed.protocol import codec

FLOATS = st.floats(-1e3, 1e3, allow_subnormal=False)


@given(
    arrays.arrays(np.float64, st.integers(1, 40), elements=FLOATS), st.integers(8, 18), st.floats(0.01, 1.0), st.data()
)
def test_integers_are_bounded_and_within_one_step(
    update: np.ndarray, bits: int, weight: float, data: st.DataObject
) -> None:
    limit = 2 ** (bits - 1) - 1
    bounds = data.draw(arrays.arrays(np.float64, update.size, elements=st.floats(1e-4, 10)))
    draws = data.draw(arrays.arrays(np.float64, update.size, elements=st.floats(0, 1, exclude_max=True)))
    quantised = codec.quantise(update, bounds, weight, limit, draws)
    assert np.abs(quantised.integers).max() <= limit
    wanted = np.clip(update, -bounds, bounds) / bounds * limit * weight
    assert np.all(np.abs(quantised.integers - wanted) <= 1 + 1e-9)
    assert quantised.saturated == np.mean(np.abs(update) > bounds)


def test_the_edges_stay_inside_whatever_the_draw() -> None:
    for value, draw in itertools.product((-0.5, 0.5, -9.0, 9.0), (0.0, 1 - 2**-32)):
        quantised = codec.quantise(np.array([value]), np.array([0.5]), 1.0, 127, np.array([draw]))
        assert abs(int(quantised.integers[0])) <= 127


def test_rounding_is_unbiased() -> None:
    draws = codec.rounding_draws(1, "ab", "ash", 1, 200_000)
    value = np.full(draws.size, 0.123456)
    integers = codec.quantise(value, np.full(draws.size, 1.0), 1.0, 127, draws).integers
    mean, expected = integers.mean(), 0.123456 * 127
    spread = np.sqrt((expected % 1) * (1 - expected % 1) / draws.size)
    assert abs(mean - expected) < 5 * spread
    assert set(np.unique(integers)) == {15, 16}


def test_draws_are_uniform_repeatable_and_differ_by_seed_run_site_and_round() -> None:
    draws = codec.rounding_draws(1, "ab", "ash", 2, 100_000)
    assert np.array_equal(draws, codec.rounding_draws(1, "ab", "ash", 2, 100_000))
    assert np.array_equal(draws[:10], codec.rounding_draws(1, "ab", "ash", 2, 10))
    assert draws.min() >= 0
    assert draws.max() < 1
    histogram = np.histogram(draws, bins=20, range=(0, 1))[0]
    assert ((histogram - 5000) ** 2 / 5000).sum() < 60  # chi-square, 19 degrees of freedom
    others = [
        codec.rounding_draws(*place, 100_000)
        for place in ((2, "ab", "ash", 2), (1, "ac", "ash", 2), (1, "ab", "asi", 2), (1, "ab", "ash", 3))
    ]
    for other in others:
        assert abs(np.corrcoef(draws, other)[0, 1]) < 0.02


@given(
    st.lists(st.lists(st.integers(-32767, 32767), min_size=3, max_size=3), min_size=1, max_size=16),
    st.lists(st.floats(0.01, 1.0), min_size=16, max_size=16),
)
def test_the_average_is_the_weighted_mean_in_any_order(rows: list[list[int]], weights: list[float]) -> None:
    weights = weights[: len(rows)]
    sums = np.array(rows, dtype=np.int64).sum(axis=0)
    bounds = np.array([0.1, 0.5, 2.0])
    average = codec.average_update(sums, bounds, weights, 32767)
    exact = [
        Fraction(int(total)) * Fraction(bound) / (32767 * sum(map(Fraction, weights)))
        for total, bound in zip(sums, bounds, strict=True)
    ]
    assert np.allclose(average, [float(value) for value in exact], rtol=1e-15, atol=0)
    assert np.array_equal(average, codec.average_update(sums, bounds, reversed(weights), 32767))


def test_flat_order_is_that_of_sorted_names() -> None:
    parameters = {"b": np.arange(6.0).reshape(2, 3), "a": np.array([9.0])}
    flat = codec.flatten(parameters)
    assert flat.tolist() == [9, 0, 1, 2, 3, 4, 5]
    again = codec.unflatten(flat, {"b": (2, 3), "a": (1,)})
    assert all(np.array_equal(again[name], parameters[name]) for name in parameters)
    assert codec.value_bounds({"b": (2, 3), "a": (1,)}, 0.1, {"a": 0.7}).tolist() == [0.7] + [0.1] * 6


@given(st.integers(8, 21), st.integers(8, 40), st.integers(1, 200), st.data())
def test_digits_of_any_width_add_up_as_the_integers_do(
    bits: int, precision: int, sites: int, data: st.DataObject
) -> None:
    digits = codec.Digits(bits, precision)
    most = digits.max_integer
    assert most == 2 ** (precision - 1) - 1
    each = st.one_of(st.sampled_from([-most, most, 0]), st.integers(-most, most))
    one = np.array(data.draw(st.lists(each, min_size=1, max_size=6)), dtype=np.int64)
    other = np.array(data.draw(st.lists(each, min_size=one.size, max_size=one.size)), dtype=np.int64)
    lanes = digits.split(one), digits.split(other)
    assert all(part.shape == (one.size * digits.count,) for part in lanes)
    assert all(np.abs(part).max() <= 2 ** (bits - 1) - 1 for part in lanes)  # what a lane holds
    assert np.array_equal(digits.join(lanes[0]), one)
    assert np.array_equal(digits.join(sites * lanes[0] + lanes[1]), sites * one + other)


def test_an_integer_takes_no_more_lanes_than_it_needs() -> None:
    assert [codec.Digits(12, precision).count for precision in (8, 12, 13, 23, 24)] == [1, 1, 2, 2, 3]


@given(
    st.lists(st.tuples(st.integers(0, 2**24 - 1), st.integers(0, 2**24 - 1)), min_size=1, max_size=16),
    st.integers(8, 18),
)
def test_counts_add_up(counts: list[tuple[int, int]], bits: int) -> None:
    layout = codec.layout_of([codec.counts_block()], 16, bits, None)
    encoded = [layout.encode({codec.COUNTS: np.array(pair, float)}, 0.3, np.zeros(0))[0] for pair in counts]
    assert all(lanes.size == layout.lanes.values for lanes in encoded)
    found = layout.decode(sum(encoded), [0.3] * len(counts))[codec.COUNTS]
    assert found.tolist() == [sum(column) for column in zip(*counts, strict=True)]


def test_a_count_beyond_the_most_saturates_and_is_told() -> None:
    layout = codec.layout_of([codec.counts_block()], 4, 12, None)
    integers, rounded = layout.encode({codec.COUNTS: np.array([2.0**25, 1.0])}, 1.0, np.zeros(0))
    assert layout.decode(integers, [1.0])[codec.COUNTS].tolist() == [2**24 - 1, 1]
    assert rounded[codec.COUNTS].saturated == 0.5


@given(st.integers(8, 12), st.integers(13, 36), st.floats(0.05, 1.0), st.data())
def test_a_wider_value_is_as_exact_as_its_precision_whatever_the_lanes(
    bits: int, precision: int, weight: float, data: st.DataObject
) -> None:
    bounds = np.array([0.5, 3.0, 1e-3])
    update = bounds * np.array(data.draw(st.lists(st.floats(-1, 1), min_size=3, max_size=3)))
    layout = codec.layout_of(
        [codec.Block(codec.UPDATE, bounds, precision, weighted=True), codec.counts_block()], 16, bits, None
    )
    draws = np.array(data.draw(st.lists(st.floats(0, 1, exclude_max=True), min_size=3, max_size=3)))
    values = {codec.UPDATE: update, codec.COUNTS: np.array([7.0, 5.0])}
    integers, _ = layout.encode(values, weight, draws)
    found = layout.decode(3 * integers, [weight] * 3)
    step = bounds / (weight * (2 ** (precision - 1) - 1))
    assert np.all(np.abs(found[codec.UPDATE] - update) <= step * (1 + 1e-6))
    assert found[codec.COUNTS].tolist() == [21, 15]


def test_lanes_are_as_wide_as_takes_the_fewest_bytes() -> None:
    for max_sites in (3, 4, 16, 64, 256, 1000):
        for precision in (8, 12, 18, 24, 32):
            width = codec.lane_width(precision, max_sites, None)
            blocks = [codec.Block("b", np.ones(40_000), precision)]
            sizes = {}
            for bits in range(8, 22):
                with contextlib.suppress(LanesError):
                    sizes[bits] = codec.layout_of(blocks, max_sites, bits, None).lanes.payload_bytes
            assert sizes[width] <= 1.001 * min(sizes.values())  # beside tags
    with pytest.raises(LanesError, match="precision of 53 bits"):
        codec.lane_width(53, 4, None)
    with pytest.raises(LanesError, match="do not fit into 6 lanes"):
        codec.lane_width(18, 1000, 6)


def test_a_precision_that_no_float_holds_is_refused_with_what_would_do() -> None:
    with pytest.raises(LanesError, match="precision of 53 bits; sums over 4 sites hold at most 52"):
        codec.layout_of([codec.Block("b", np.ones(1), 53)], 4, 18, None)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_values_are_refused_and_counted(bad: float) -> None:
    update = np.array([0.1, bad, bad])
    with pytest.raises(NonFiniteUpdateError, match="2 of 3 values"):
        codec.quantise(update, np.ones(3), 1.0, 127, np.zeros(3))


def test_digest_and_attestation_depend_on_everything() -> None:
    base = {"a": np.zeros((2, 3))}
    digests = {
        codec.adapter_digest(value)
        for value in (base, {"b": np.zeros((2, 3))}, {"a": np.zeros((3, 2))}, {"a": np.full((2, 3), 1e-300)})
    }
    assert len(digests) == 4
    told = {
        codec.attestation(*place)
        for place in (
            (b"k", "s", "h", "d"),
            (b"l", "s", "h", "d"),
            (b"k", "t", "h", "d"),
            (b"k", "s", "i", "d"),
            (b"k", "s", "h", "e"),
        )
    }
    assert len(told) == 5

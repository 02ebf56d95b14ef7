"""Memories of normal images against the formulas, by loops."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from secure_fed.clients.memory import histogram
from secure_fed.privacy.memory_sums import exact_sums
from secure_fed.protocol import memory
from secure_fed.protocol.codec import layout_of

DEPTHS = {"score": (2, 2, 3), "map": (3, 1, 2)}


def unit(rng: np.random.Generator, *shape: int) -> NDArray[np.float32]:
    values = rng.normal(size=shape)
    return (values / np.linalg.norm(values, axis=-1, keepdims=True)).astype(np.float32)


def world(seed: int = 0, count: int = 5) -> tuple[dict[str, NDArray[np.float64]], list[Any]]:
    """An adapter of two memories, and two sites' images in rows with their patients."""
    rng = np.random.default_rng(seed)
    adapter = {
        "grids": np.array(list(DEPTHS.values()), dtype=np.float64),
        "histogram": np.zeros(memory.BINS),
        "score_centroids": unit(rng, count, 3).astype(np.float64),
        "map_centroids": unit(rng, count, 2).astype(np.float64),
    }
    sites = []
    for owners in (["a", "a", "b", "c", "c", "c"], ["a", "d"]):
        rows = [np.concatenate([unit(rng, h * w, d).ravel() for h, w, d in DEPTHS.values()]) for _ in owners]
        sites.append((np.stack(rows), owners))
    return adapter, sites


def by_loops(adapter: Any, sites: Any, floor: int) -> dict[str, list[list[float]]]:
    """One iteration over all sites' patches together; each of a patient's weighs one over their number."""
    after = {}
    start = 0
    for name, (h, w, d) in DEPTHS.items():
        bank = adapter[f"{name}_centroids"].tolist()
        total = [[0.0] * d for _ in bank]
        weight = [0.0] * len(bank)
        patients: list[int] = [0] * len(bank)
        for rows, owners in sites:
            seen: list[set[str]] = [set() for _ in bank]
            for row, owner in zip(rows.tolist(), owners, strict=True):
                for patch in range(h * w):
                    z = row[start + patch * d : start + (patch + 1) * d]
                    nearest = min(range(len(bank)), key=lambda m: math.dist(bank[m], z))
                    share = 1 / (owners.count(owner) * h * w)
                    weight[nearest] += share
                    total[nearest] = [t + share * v for t, v in zip(total[nearest], z, strict=True)]
                    seen[nearest].add(owner)
            patients = [count + len(each) for count, each in zip(patients, seen, strict=True)]
        after[name] = [
            [t / weight[m] for t in total[m]] if patients[m] >= floor and weight[m] > 0 else bank[m]
            for m in range(len(bank))
        ]
        start += h * w * d
    return after


@pytest.mark.parametrize("floor", [1, 2, 3])
def test_a_round_of_sums_is_an_iteration_over_all_sites_patches(floor: int) -> None:
    for seed in range(4):
        adapter, sites = world(seed)
        sent = [exact_sums(adapter, rows, owners) for rows, owners in sites]
        found = {name: sent[0][name] + sent[1][name] for name in sent[0]}
        after = memory.moved(adapter, found, floor)
        for name, expected in by_loops(adapter, sites, floor).items():
            np.testing.assert_allclose(after[f"{name}_centroids"], expected, atol=1e-6)
        assert any(not np.array_equal(after[name], adapter[name]) for name in adapter)


def test_what_travels_as_integers_moves_centroids_alike() -> None:
    adapter, sites = world()
    layout = layout_of(memory.sums_blocks(adapter, 10, 20), 4, 15, None)
    sent = [exact_sums(adapter, rows, owners) for rows, owners in sites]
    integers = sum(layout.encode(one, 1.0, np.zeros(0))[0] for one in sent)
    exact = memory.moved(adapter, {name: sent[0][name] + sent[1][name] for name in sent[0]}, 1)
    found = memory.moved(adapter, layout.decode(np.asarray(integers), [1.0, 1.0]), 1)
    for name in ("score_centroids", "map_centroids"):
        np.testing.assert_allclose(found[name], exact[name], atol=2e-3)
    patients = layout.decode(np.asarray(integers), [1.0, 1.0])["score_patients"]
    assert np.array_equal(patients, sent[0]["score_patients"] + sent[1]["score_patients"])  # whole numbers are exact


def test_an_empty_centroid_keeps_its_place_to_the_bit() -> None:
    adapter, sites = world()
    adapter["score_centroids"][0] = 100.0
    sent = exact_sums(adapter, *sites[0])
    after = memory.moved(adapter, sent, 1)
    assert sent["score_weights"][0] == 0
    assert np.array_equal(after["score_centroids"][0], adapter["score_centroids"][0])


def test_nobody_weighs_more_than_another() -> None:
    adapter, sites = world()
    for rows, owners in sites:
        for name in DEPTHS:
            assert exact_sums(adapter, rows, owners)[f"{name}_weights"].sum() == pytest.approx(len(set(owners)))


def test_a_score_is_the_mean_distance_of_the_farthest_patches() -> None:
    adapter, sites = world()
    rows, _ = sites[0]
    for top, most in ((0.01, 1), (0.5, 2), (0.51, 3), (1.0, 4)):
        for row, score in zip(rows, memory.scores(adapter, rows, top), strict=True):
            far = sorted(
                min(math.dist(one, row[3 * patch : 3 * patch + 3]) for one in adapter["score_centroids"])
                for patch in range(4)
            )
            assert score == pytest.approx(sum(far[-most:]) / most, abs=1e-6)
    heat = memory.maps(adapter, rows)
    assert heat.shape == (6, 3, 1)
    far = min(math.dist(one, rows[2][12 + 2 : 12 + 4]) for one in adapter["map_centroids"])
    assert heat[2, 1, 0] == pytest.approx(far, abs=1e-6)


@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.25])
@pytest.mark.parametrize("patients", [1, 5, 9, 19, 20, 200])
def test_the_threshold_keeps_the_stated_share_of_false_alarms(alpha: float, patients: int) -> None:
    # Split conformal: of patients + 1 exchangeable scores, a new one is flagged with a chance of at most alpha.
    scores = np.random.default_rng(patients).uniform(0.2, 0.6, patients)
    histogram = np.bincount(memory.score_bin(scores), minlength=memory.BINS).astype(float)
    limit = memory.threshold(histogram, alpha)
    if math.floor(alpha * (patients + 1)) < 1:
        assert limit == memory.NO_LIMIT
        return
    flagged = int((scores >= limit).sum())
    assert (flagged + 1) / (patients + 1) <= alpha + 1e-9
    lower = limit - 2 / memory.BINS  # a bin lower, it would not hold
    assert (int((scores >= lower).sum()) + 1) / (patients + 1) > alpha


@pytest.mark.parametrize("images", [1, 10])
def test_the_promise_is_kept_for_patients_of_many_images(images: int) -> None:
    """A patient is flagged by any of its images, so it counts by the largest of their scores."""
    rng, bank = np.random.default_rng(5), np.array([[1.0, 0.0]])
    adapter = {"grids": np.array([[1.0, 1.0, 2.0]]), "score_centroids": bank}

    def people(count: int) -> NDArray[np.float32]:
        angles = rng.uniform(0.2, 1.0, count * images)
        return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)

    shares = []
    for _ in range(200):
        owners = [f"{number}" for number in range(100) for _ in range(images)]
        limit = memory.threshold(histogram(adapter, people(100), owners, 1.0), 0.1)
        new = memory.scores(adapter, people(300), 1.0).reshape(300, images)
        shares.append(float((new.max(axis=1) >= limit).mean()))
    assert 0.06 < np.mean(shares) <= 0.105  # with a standard error of 0.002; bins round to the safe side


def test_why_there_is_no_threshold_is_said_as_it_is() -> None:
    few = np.zeros(memory.BINS)
    few[7] = 8.0
    assert memory.why_no_threshold(few, 0.1).startswith("8 normal patients were validated on, and 9 are needed")
    assert "no site sent scores" in memory.why_no_threshold(few * 0, 0.1)
    few[7] = 9.0
    assert memory.why_no_threshold(few, 0.1) == ""


def test_without_patients_nothing_is_flagged() -> None:
    assert memory.threshold(np.zeros(memory.BINS), 0.1) == memory.NO_LIMIT

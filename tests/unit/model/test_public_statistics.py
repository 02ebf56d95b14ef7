"""The basis of a study: of public images, drawn, or the backbone's own; never of a site's data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from secure_fed import configs
from secure_fed.core.errors import StudyError
from secure_fed.model.adapters import uses_basis
from secure_fed.model.backbone import load_backbone
from secure_fed.model.public_statistics import PublicStatistics, make_basis, packaged_statistics, precision_for
from secure_fed.protocol.basis import Basis
from secure_fed.protocol.codec import layout_of
from secure_fed.protocol.initial_state import InitialState
from secure_fed.protocol.one_sum import Sums, solve, sums_blocks
from secure_fed.protocol.study_tables import Backbone, Features
from tests.conftest import make_template

DIM = 12


def images(count: int = 400, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    rows = 0.5 + rng.standard_normal((count, DIM)) * np.geomspace(1, 1e-3, DIM)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def test_sources_count_alike_however_many_images_each_has() -> None:
    few, many = images(150, 1), images(3000, 2)
    found = PublicStatistics.of([few, many])
    assert np.allclose(found.centre, (few.mean(axis=0, dtype=float) + many.mean(axis=0, dtype=float)) / 2)
    assert np.allclose(found.axes @ found.axes.T, np.eye(DIM))
    assert np.all(np.diff(found.deviations) <= 0)
    with pytest.raises(StudyError, match="99 public images that differ; expected at least 100"):
        PublicStatistics.of([few[:99], many])


def test_a_public_basis_makes_its_directions_more_alike_and_keeps_lengths_below_one() -> None:
    x = images()
    statistics = PublicStatistics.of([x])
    basis = make_basis(Features(basis="public", dimensions=5), DIM, 0, statistics)
    assert basis.dimensions == 5
    projected, straight = basis.project(x), basis.linear(x)
    assert np.linalg.norm(projected, axis=1).max() <= 1 + 1e-12
    assert 0.1 < np.mean(np.linalg.norm(straight, axis=1) <= 1) < 0.7
    assert np.allclose(straight.std(axis=0, ddof=1), basis.spread)
    assert basis.spread.max() / basis.spread.min() < statistics.deviations[0] / statistics.deviations[4]
    inside = np.linalg.norm(straight, axis=1) <= 1
    assert np.array_equal(projected[inside], straight[inside])


def test_the_backbones_own_coordinates_need_no_public_image() -> None:
    bare = make_basis(Features(), DIM, 0, None)
    assert bare.axes is None
    assert np.array_equal(bare.linear(images()), images().astype(float))
    centred = make_basis(Features(), DIM, 0, PublicStatistics.of([images()]))
    assert np.allclose(centred.linear(images()).mean(axis=0), 0, atol=1e-6)


def test_a_random_basis_is_the_seeds() -> None:
    first, again, other = (make_basis(Features(basis="random", dimensions=4), DIM, seed, None) for seed in (1, 1, 2))
    assert first.axes is not None
    assert again.axes is not None
    assert other.axes is not None
    assert np.allclose(first.axes @ first.axes.T, np.eye(4))
    assert np.array_equal(first.axes, again.axes)
    assert not np.allclose(first.axes, other.axes)


@pytest.mark.parametrize(
    ("features", "statistics", "says"),
    [
        (Features(basis="public", dimensions=4), False, "--public"),
        (Features(basis="public", dimensions=13), True, "spread in 12 directions"),
        (Features(basis="random", dimensions=13), False, "the backbone has 12"),
    ],
)
def test_what_a_basis_cannot_be_is_named_with_what_would_do(features: Features, statistics: bool, says: str) -> None:
    with pytest.raises(StudyError, match=says):
        make_basis(features, DIM, 0, PublicStatistics.of([images()]) if statistics else None)


@pytest.mark.parametrize("halved", [False, True])
def test_directions_that_only_rounding_spreads_in_are_none(halved: bool, tmp_path: Path) -> None:
    """Of 100 images there are 99; divided by what rounding leaves in others, every site's image would be noise."""
    rng = np.random.default_rng(6)
    rows = rng.standard_normal((100, 160)) + 2
    statistics = PublicStatistics.of([(rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)])
    if halved:
        statistics.save(tmp_path / "public.safetensors", "a" * 64)
        statistics = PublicStatistics.load(tmp_path / "public.safetensors", "a" * 64)
    assert make_basis(Features(basis="public", dimensions=99), 160, 0, statistics).dimensions == 99
    with pytest.raises(StudyError, match=r"dimensions = 100: .* spread in 99 directions; .* or more public images"):
        make_basis(Features(basis="public", dimensions=100), 160, 0, statistics)


def test_a_picture_that_is_there_twice_is_one_public_image() -> None:
    once = images(100)
    PublicStatistics.of([np.concatenate([once, once])])
    for copies in (np.repeat(once[:1], 100, axis=0), np.concatenate([once[:99], once[:99]])):
        with pytest.raises(StudyError, match=r"(1|99) public images that differ; expected at least 100"):
            PublicStatistics.of([images(), copies])


@pytest.mark.parametrize(
    ("name", "values"),
    [("spread", np.full(DIM, np.nan)), ("centre", np.zeros(DIM - 1)), ("deviations", np.zeros(3)), ("axes", np.eye(3))],
)
def test_statistics_that_do_not_hold_together_are_refused(name: str, values: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "public.safetensors"
    replace(PublicStatistics.of([images()]), **{name: values}).save(path, "a" * 64)
    with pytest.raises(StudyError, match="no public statistics"):
        PublicStatistics.load(path, "a" * 64)


def test_statistics_belong_to_one_backbone(tmp_path: Path) -> None:
    statistics = PublicStatistics.of([images()])
    statistics.save(tmp_path / "public.safetensors", "a" * 64)
    again = PublicStatistics.load(tmp_path / "public.safetensors", "a" * 64)
    assert np.allclose(again.axes, statistics.axes, atol=1e-3)
    assert np.allclose(again.centre, statistics.centre, atol=1e-6)
    with pytest.raises(StudyError, match=r"of backbone a{16}, the study's is b{16}"):
        PublicStatistics.load(tmp_path / "public.safetensors", "b" * 64)
    with pytest.raises(StudyError, match="expected a folder of public images"):
        PublicStatistics.load(tmp_path / "nothing", "b" * 64)


def test_statistics_belong_to_the_rules_by_which_images_were_seen(tmp_path: Path) -> None:
    PublicStatistics.of([images()]).save(tmp_path / "public.safetensors", "a" * 64, "c" * 64)
    for seen in ("c" * 64, None):
        PublicStatistics.load(tmp_path / "public.safetensors", "a" * 64, seen)
    with pytest.raises(StudyError, match="seen by other windows, another background or another release"):
        PublicStatistics.load(tmp_path / "public.safetensors", "a" * 64, "d" * 64)


def test_mini_clip_brings_its_own() -> None:
    backbone = load_backbone(Backbone(model="mini-clip", weights="file", file="mini-clip.safetensors"), None)
    statistics = packaged_statistics("mini-clip", backbone.digest)
    assert statistics is not None
    assert statistics.axes.shape == (256, backbone.dim)
    assert np.allclose(statistics.axes @ statistics.axes.T, np.eye(256), atol=2e-3)
    assert packaged_statistics("mini-clip", "0" * 64) is None
    assert packaged_statistics("random-small", backbone.digest) is None
    assert (configs.MODELS / "mini-clip.statistics.safetensors").stat().st_size < 300_000


@pytest.mark.parametrize("axes", [True, False])
def test_the_basis_travels_with_the_study_and_fits_its_backbone(axes: bool) -> None:
    features = Features(basis="random", dimensions=4) if axes else Features()
    basis = make_basis(features, DIM, 0, None)
    prompts = images(3)
    state = InitialState({"offsets": np.zeros((3, DIM))}, prompts, 10.0, None, basis)
    again = InitialState.from_bytes(state.to_bytes())
    assert again.basis is not None
    assert np.array_equal(again.basis.project(images()), basis.project(images()))
    assert InitialState.from_bytes(InitialState(state.adapter, prompts, 10.0).to_bytes()).basis is None
    other = InitialState(state.adapter, images(3)[:, :8], 10.0, None, basis)
    with pytest.raises(StudyError, match="the basis is of 12 features, the backbone gives 8"):
        InitialState.from_bytes(other.to_bytes())


def test_a_method_that_takes_features_as_they_are_has_no_basis() -> None:
    assert not uses_basis(make_template())
    with pytest.raises(
        StudyError, match=r'features\.basis = "public": facmic sees features as the backbone gives them'
    ):
        uses_basis(make_template(features={"basis": "public", "dimensions": 4}))


def test_a_basis_holds_no_more_than_numbers() -> None:
    assert set(Basis(np.zeros(2), np.eye(2), 1.0, np.ones(2)).tensors()) == {
        "basis.centre",
        "basis.axes",
        "basis.radius",
        "basis.spread",
    }


def test_a_raw_basis_turns_coordinates_so_that_rounding_costs_little_and_moves_no_head() -> None:
    mixed = np.linalg.qr(np.random.default_rng(4).standard_normal((DIM, DIM)))[0].astype(np.float32)
    x = (images(600) @ mixed).astype(np.float64)
    statistics = PublicStatistics.of([images(150, 3) @ mixed])
    labels = (x[:, 3] > np.median(x[:, 3])).astype(np.int64) + 2 * (x[:, -1] > np.median(x[:, -1]))
    turned = make_basis(Features(), DIM, 0, statistics)
    assert turned.axes is not None
    assert np.allclose(turned.axes @ turned.axes.T, np.eye(DIM), atol=1e-12)
    own = Basis(statistics.centre, None, turned.radius, statistics.spread / turned.radius)
    assert np.allclose(np.linalg.norm(turned.linear(x), axis=1), np.linalg.norm(own.linear(x), axis=1))
    hot = np.eye(4)[labels]
    logits, apart = {}, {}
    for name, basis in (("turned", turned), ("own", own)):
        projected = basis.project(x)
        exact = Sums(hot.sum(axis=0), hot.T @ projected, projected.T @ projected)
        layout = layout_of(sums_blocks(4, basis, 1000, 18), 4, 18, None)
        integers, rounded = layout.encode(exact.values(), 1.0, np.zeros(0))
        assert not any(block.saturated for block in rounded.values())
        for kind, sums in (("exact", exact), ("rounded", Sums.of(layout.decode(integers, [1.0])))):
            head = solve(sums, 3e-5, 1)
            assert head is not None
            logits[name, kind] = basis.linear(x) @ head.weight.T + head.bias
        apart[name] = np.abs(logits[name, "rounded"] - logits[name, "exact"]).max()
    assert np.allclose(logits["turned", "exact"], logits["own", "exact"], rtol=1e-6, atol=1e-6)
    assert apart["turned"] < apart["own"] / 5


def test_a_raw_basis_of_few_public_images_has_room_where_they_do_not_differ() -> None:
    width = 40
    rng = np.random.default_rng(5)
    rows = rng.standard_normal((700, width)) * np.geomspace(1, 1e-2, width)
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    few = PublicStatistics.of([rows[:100]])
    fewer = PublicStatistics(few.centre, few.axes[:20], few.deviations[:20] * (np.arange(20) < 10), few.spread)
    for statistics in (few, fewer):
        basis = make_basis(Features(), width, 0, statistics)
        assert basis.dimensions == width
        assert basis.spread.min() > 0
        assert np.allclose(basis.axes @ basis.axes.T, np.eye(width), atol=1e-9)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("features", "public", "bits"),
    [
        (Features(), True, 18),
        (Features(), False, 24),
        (Features(basis="public", dimensions=4), True, 18),
        (Features(basis="random", dimensions=4), True, 24),
    ],
)
def test_each_basis_asks_for_a_precision_of_its_own(features: Features, public: bool, bits: int) -> None:
    assert precision_for(features, PublicStatistics.of([images()]) if public else None) == bits


def test_statistics_of_another_backbone_and_what_is_none_are_refused_with_what_would_do(tmp_path: Path) -> None:
    path = tmp_path / "public.safetensors"
    PublicStatistics.of([images()]).save(path, "a" * 64)
    assert np.allclose(PublicStatistics.load(path, "a" * 64).centre, PublicStatistics.of([images()]).centre, atol=1e-6)
    with pytest.raises(
        StudyError, match=r"statistics of backbone a{16}, the study's is b{16}.*give a folder of public"
    ):
        PublicStatistics.load(path, "b" * 64)
    path.write_bytes(b"no tensors")
    with pytest.raises(StudyError, match="no public statistics"):
        PublicStatistics.load(path, "a" * 64)


def test_a_basis_of_another_backbones_width_is_refused() -> None:
    tensors = make_basis(Features(basis="random", dimensions=4), DIM, 0, None).tensors()
    assert Basis.of(tensors, DIM) is not None
    with pytest.raises(StudyError, match=r"the basis is of 12 features, the backbone gives 16.*make the study anew"):
        Basis.of(tensors, 16)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("radius", np.zeros(1)),
        ("radius", np.full(1, np.nan)),
        ("spread", np.array([1.0, 0, 1, 1])),
        ("spread", -np.ones(4)),
        ("centre", np.full(DIM, np.inf)),
        ("axes", np.full((4, DIM), np.nan)),
    ],
)
def test_a_basis_that_makes_no_coordinates_is_refused(name: str, values: np.ndarray) -> None:
    """Bounds below 0 would turn every statistic into one number, and nobody would say so."""
    tensors = make_basis(Features(basis="random", dimensions=4), DIM, 0, None).tensors()
    with pytest.raises(StudyError, match=r"the basis holds a radius or spread .*make the study anew"):
        Basis.of(tensors | {f"basis.{name}": values}, DIM)

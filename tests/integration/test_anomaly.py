"""A study of anomalies from its template to a flagged image, encrypted; and what is refused on the way."""

from __future__ import annotations

import copy
import csv
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

from secure_fed.clients import memory as at_site
from secure_fed.clients.data import SiteImage, read_data
from secure_fed.clients.masks import lesion_of
from secure_fed.clients.rules import Rules
from secure_fed.core.errors import (
    AdapterFileError,
    BackboneError,
    DataError,
    OnnxError,
    OutputError,
    StudyError,
)
from secure_fed.core.tomlfile import write_toml
from secure_fed.lab.attack import attack
from secure_fed.lab.phantoms import PhantomSite, make_phantoms
from secure_fed.lab.simulation import simulate
from secure_fed.model.adapter_file import load_adapter
from secure_fed.model.onnx_export import write_onnx
from secure_fed.operate.anomaly_figures import (
    _places as places_of,
)
from secure_fed.operate.anomaly_figures import (
    anomaly_figures,
    equal_place,
    per_region_overlap,
    resized,
)
from secure_fed.operate.evaluate import evaluate_folder
from secure_fed.operate.explain import explain
from secure_fed.operate.new_study import new_study
from secure_fed.operate.plots import plot_run, plot_site
from secure_fed.operate.predict import predict_folder, refuse_products, write_maps, write_reports
from secure_fed.privacy.memory_sums import exact_sums
from secure_fed.protocol import memory
from secure_fed.protocol.study import Template
from secure_fed.report.case_page import case_page
from secure_fed.report.evaluation import evaluation_sections
from tests.conftest import CLASSES, Federation, Run, copy_of, make_images, make_template, run_round
from tests.unit.clients.test_dicom import as_bytes, dicom

METHOD = {
    "adapter": "memory",
    "block": "image",
    "map_block": "image",
    "centroids": 12,
    "min_patients": 2,
    "most_patients": 60,
    "false_alarms": 0.2,
}


def template(**changes: Any) -> Template:
    method = METHOD | changes.pop("method", {})
    settings: dict[str, Any] = {
        "task": "anomaly",
        "rounds": 3,
        "classes": [{"name": "dark", "prompts": ["a dark image"]}],
        "method": {name: value for name, value in method.items() if value is not None},
        "encoding": {"bits": 16, "value_bound": 1.0},
    }
    return make_template(**(settings | changes))


@pytest.fixture(scope="module")
def block() -> str:
    return "transformer.resblocks.1"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    make_images(root, per_class=12)
    return root


@pytest.fixture(scope="module")
def finished(pictures: Path, tmp_path_factory: pytest.TempPathFactory, block: str) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("study") / "out"
    return out, simulate(template(method={"block": block}), out, pictures)


def test_a_study_of_anomalies_runs_encrypted_and_finds_them(finished: tuple[Path, dict[str, Any]]) -> None:
    _, summary = finished
    assert summary["method"] == "memory"
    found = summary["metrics"]
    assert set(found) == {"zero_shot", "local_only", "mahalanobis", "pooled", "federated"}
    assert found["federated"]["held_out"]["auroc"] > 0.9
    assert found["federated"]["held_out"]["expected_calibration_error"] is None
    assert found["mahalanobis"]["held_out"]["accuracy"] is None  # it has no threshold
    anomaly = summary["anomaly"]
    assert 0 < anomaly["threshold"] < 2
    assert anomaly["patients"] > 3  # normal ones, of three sites
    assert sum(anomaly["held_out"]["normal"]) >= 8  # all labelled ones
    assert anomaly["held_out"]["roc"][0] == [0, 0]
    assert anomaly["held_out"]["roc"][-1] == [1, 1]


def test_encrypted_and_plain_give_the_same_memory(
    finished: tuple[Path, dict[str, Any]], pictures: Path, tmp_path: Path, block: str
) -> None:
    plain = simulate(template(method={"block": block}, mode="plain"), tmp_path / "out", pictures)
    assert plain["adapter_digest"] == finished[1]["adapter_digest"]
    assert plain["metrics"] == finished[1]["metrics"]


def test_the_memory_is_what_one_place_with_all_patches_would_make(finished: tuple[Path, dict[str, Any]]) -> None:
    federation = Federation(finished[0])
    agreed = federation.agreed
    sites = [federation.site(name) for name in ("ash", "birch", "cedar")]
    adapter = agreed.initial.adapter
    for _ in range(2):
        sent = [exact_sums(adapter, *at_site.normal(site.features(), "train")) for site in sites]
        adapter = memory.moved(adapter, {name: sum(one[name] for one in sent) for name in sent[0]}, 2)
    for name in ("score_centroids", "map_centroids"):
        np.testing.assert_allclose(sites[0].parameters[name], adapter[name], atol=0.02)  # but for 16 bits
        moved = ~np.isclose(sites[0].parameters[name], agreed.initial.adapter[name]).all(axis=1)
        assert moved.any()


def test_a_page_of_cases_shows_scores_and_the_memorys_own_maps(
    finished: tuple[Path, dict[str, Any]], pictures: Path
) -> None:
    weights = finished[0] / "backbone.safetensors"
    image = next((pictures / "dogwood").rglob("*.png"))
    found = predict_folder(finished[0] / "adapter.safetensors", image, checkpoint=weights)
    explained = explain(found, weights)
    (case,) = explained.document()["images"]
    assert case["score"] == found.document()["images"][0]["score"]
    assert (case["has_map"], case["zero_shot"], case["concepts"]) == (True, None, [])
    assert f"Score {case['score']:.3f}" in case_page(explained)


def test_only_patients_that_a_memory_was_made_of_are_shown_beside_a_case(
    finished: tuple[Path, dict[str, Any]], pictures: Path, tmp_path: Path
) -> None:
    path = copy_of(finished[0], tmp_path).folder / "sites/ash/site.toml"
    path.write_text(path.read_text().replace("similar_cases = 0", "similar_cases = 20"))
    weights, light = finished[0] / "backbone.safetensors", next((pictures / "ash/light").iterdir())
    found = predict_folder(finished[0] / "adapter.safetensors", light, checkpoint=weights)
    (case,) = explain(found, weights, path).cases
    assert {one.label for one in case.similar} == {"dark"}  # though others of its training split are nearer


def test_predict_gives_scores_flags_and_maps(
    finished: tuple[Path, dict[str, Any]], pictures: Path, tmp_path: Path
) -> None:
    folder = pictures / "dogwood"
    found = predict_folder(finished[0] / "adapter.safetensors", folder, checkpoint=finished[0] / "backbone.safetensors")
    document = found.document()
    assert "probabilities" not in document["images"][0]
    assert document["threshold"] == finished[1]["anomaly"]["threshold"]
    scores = {kind: [one["score"] for one in document["images"] if one["image"].startswith(kind)] for kind in CLASSES}
    assert np.mean(scores["light"]) > np.mean(scores["dark"])
    for one in document["images"]:
        assert one["flagged"] == (one["score"] >= document["threshold"])
    rows = list(csv.DictReader(found.csv().splitlines()))
    assert [float(row["score"]) for row in rows] == pytest.approx(
        [one["score"] for one in document["images"]], abs=1e-6
    )
    assert write_maps(found, tmp_path / "maps") == 36
    assert write_maps(found, tmp_path / "maps") == 36  # its own
    maps = sorted((tmp_path / "maps").rglob("*.png"))
    assert len(maps) == 36
    assert Image.open(maps[0]).size == (32, 32)
    assert oct(maps[0].stat().st_mode)[-3:] == "600"
    with pytest.raises(AdapterFileError, match="no probabilities of classes"):
        write_reports(found, tmp_path / "reports")


def test_maps_take_the_place_of_maps_alone(
    finished: tuple[Path, dict[str, Any]],
    pictures: Path,
    tmp_path: Path,
    secfacmic: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Maps may lie in the folder of the images, where ``0.png.png`` may be one."""
    (tmp_path / "dark").mkdir()
    shutil.copy(pictures / "dogwood/dark/0.png", tmp_path / "dark/0.png")
    shutil.copy(pictures / "dogwood/dark/1.png", tmp_path / "dark/0.png.png")
    before = (tmp_path / "dark/0.png.png").read_bytes()
    monkeypatch.setattr("secure_fed.operate.predict.load_backbone", lambda *_: pytest.fail("hours of work"))
    ended = secfacmic(
        "predict", "--adapter", finished[0] / "adapter.safetensors", "--images", tmp_path, "--maps", tmp_path
    )
    assert ended.returncode == OutputError.exit_code
    assert "0.png.png: exists, and this command did not write it" in ended.stderr
    assert (tmp_path / "dark/0.png.png").read_bytes() == before
    assert not list(tmp_path.rglob("0.png.png.png"))


def test_maps_lie_on_the_pixels_that_were_seen_and_mean_the_same_in_every_folder(
    finished: tuple[Path, dict[str, Any]], pictures: Path, tmp_path: Path
) -> None:
    """A wide picture is cut to its middle; another picture in the folder does not change its colours."""
    middle = Image.open(pictures / "dogwood" / "light" / "0.png")
    wide = Image.new("L", (96, 32), 0)
    wide.paste(middle, (32, 0))
    for name in ("alone", "with"):
        (tmp_path / name).mkdir()
        wide.save(tmp_path / name / "wide.png")
    shutil.copy(pictures / "dogwood" / "dark" / "0.png", tmp_path / "with" / "nearer.png")
    adapter, weights = finished[0] / "adapter.safetensors", finished[0] / "backbone.safetensors"
    drawn = {}
    for name in ("alone", "with"):
        found = predict_folder(adapter, tmp_path / name, checkpoint=weights)
        write_maps(found, tmp_path / name / "maps")
        drawn[name] = (tmp_path / name / "maps" / "wide.png.png").read_bytes()
        again = predict_folder(adapter, tmp_path / name, checkpoint=weights)  # the maps lie in the folder now
        assert len(again.images) == len(found.images)
    assert drawn["alone"] == drawn["with"]
    pixels = np.asarray(Image.open(tmp_path / "alone" / "maps" / "wide.png.png")).astype(int)
    red = (pixels[..., 0] - pixels[..., 2]).sum(axis=0)
    assert red[:32].max() == red[64:].max() == 0
    assert red[32:64].max() > 0
    assert found.anomalies is not None
    assert found.anomalies.limit is not None
    (hottest,) = (heat for heat, one in zip(found.anomalies.maps, found.images, strict=True) if one.path.stem == "wide")
    redness = (hottest.max() / found.anomalies.limit - 0.5).clip(0, 1)  # none at half the threshold, all at 1.5
    strongest = (255 - pixels[..., 2] / np.maximum(np.asarray(wide), 1) * 255)[:, 32:64].max() / 255
    assert strongest == pytest.approx(0.6 * redness, abs=0.1)


def test_frames_of_one_file_have_maps_of_their_own(
    finished: tuple[Path, dict[str, Any]], pictures: Path, tmp_path: Path
) -> None:
    frames = np.stack([np.asarray(Image.open(pictures / "dogwood" / kind / "0.png").convert("L")) for kind in CLASSES])
    (tmp_path / "two.dcm").write_bytes(as_bytes(dicom(frames, WindowCenter=128, WindowWidth=256)))
    (tmp_path / "manifest.csv").write_text("path,frame\ntwo.dcm,0\ntwo.dcm,1\n")
    weights = finished[0] / "backbone.safetensors"
    found = predict_folder(finished[0] / "adapter.safetensors", tmp_path, checkpoint=weights)
    assert write_maps(found, tmp_path / "maps") == 2
    maps = [Image.open(tmp_path / "maps" / f"two.dcm.axial-{frame}.png").tobytes() for frame in (0, 1)]
    assert maps[0] != maps[1]
    assert len(list((tmp_path / "maps").iterdir())) == 2


def test_a_prediction_without_a_threshold_says_why(finished: tuple[Path, dict[str, Any]], pictures: Path) -> None:
    weights = finished[0] / "backbone.safetensors"
    image = next((pictures / "dogwood").rglob("*.png"))
    found = predict_folder(finished[0] / "adapter.safetensors", image, checkpoint=weights)
    few = np.zeros(memory.BINS)
    few[100] = 3.0
    for histogram, says in ((few * 0, "a privacy budget never do"), (few, "3 normal patients .* 4 are needed")):
        initial = replace(found.adapter.initial, adapter=found.adapter.initial.adapter | {memory.HISTOGRAM: histogram})
        assert found.anomalies is not None
        silent = replace(
            found, adapter=replace(found.adapter, initial=initial), anomalies=replace(found.anomalies, limit=None)
        )
        assert re.search(says, silent.document()["why_no_threshold"])
        assert re.search(says, case_page(explain(silent, weights)))


def test_what_an_adapter_does_not_give_is_refused_before_anything_is_encoded(
    finished: tuple[Path, dict[str, Any]], pictures: Path, tmp_path: Path, secfacmic: Run
) -> None:
    adapter, maps = finished[0] / "adapter.safetensors", tmp_path / "maps"
    with mock.patch("secure_fed.operate.predict.load_backbone", side_effect=AssertionError("hours of work")):
        asked = ("predict", "--adapter", adapter, "--images", pictures, "--dicom-sr", tmp_path / "sr", "--maps", maps)
        ended = secfacmic(*asked)
        assert ended.returncode == AdapterFileError.exit_code
        assert "reports are of those; expected a prediction without --dicom-sr" in ended.stderr
    assert not list(tmp_path.iterdir())
    with pytest.raises(AdapterFileError, match="secfacmic explain-case shows a classifier's"):
        refuse_products(mock.Mock(**{"method.adapter": "facmic"}), maps=True)


def test_an_evaluation_takes_every_other_label_for_an_anomaly(
    finished: tuple[Path, dict[str, Any]], pictures: Path
) -> None:
    adapter, weights, folder = finished[0] / "adapter.safetensors", finished[0] / "backbone.safetensors", "dogwood"
    found = evaluate_folder(adapter, pictures / folder, checkpoint=weights)
    said = found.said.document()["images"]
    wrong = np.array([not one["image"].startswith("dark/") for one in said])
    score = np.array([one["score"] for one in said])
    assert found.overall.auroc == pytest.approx(roc_auc_score(wrong, score))
    assert found.overall.expected_calibration_error is None  # a score is no probability
    assert found.document()["reliability"] == []
    normal, anomaly = found.classes
    assert (normal.images, anomaly.name, anomaly.images) == (12, "anomaly", 24)
    assert anomaly.sensitivity.value == pytest.approx(np.mean([one["flagged"] for one in said], where=wrong))
    assert [section.key for section in evaluation_sections(found)] == ["overall", "classes"]
    assert any("or more are taken for anomalies" in note for note in evaluation_sections(found)[0].notes)
    assert found.said.anomalies is not None
    silent = replace(found.said, anomalies=replace(found.said.anomalies, limit=None))
    with mock.patch("secure_fed.operate.evaluate.predict_folder", return_value=silent):
        ranked = evaluate_folder(adapter, pictures / folder, checkpoint=weights)
    assert ranked.overall == found.overall.ranking_alone()
    assert {(one.sensitivity.value, one.precision.value) for one in ranked.classes} == {(None, None)}
    (section,) = evaluation_sections(ranked)  # no matrix of flags, which would have no cell to draw
    (note,) = [note for note in section.notes if "Nothing is flagged" in note]
    assert "there is no figure of what would be" in note


def test_a_memory_is_refused_where_it_says_nothing(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    with pytest.raises(OnnxError, match="without --onnx"):
        write_onnx(tmp_path / "model.onnx", load_adapter(finished[0] / "adapter.safetensors"), None, {})


def test_only_normal_images_train(finished: tuple[Path, dict[str, Any]]) -> None:
    site = Federation(finished[0]).site("ash")
    features = site.features()
    x, owners = at_site.normal(features, "train")
    assert 0 < len(x) < len(features.train.y)
    assert all("dark" in owner for owner in owners)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"classes": [{"name": n, "prompts": [n]} for n in ("dark", "light")]}, "2 classes.*takes one.*leave those"),
        ({"method": {"adapter": "facmic"}}, 'adapter = "facmic"; expected adapter = "memory"'),
        ({"rounds": 1}, "one of the histogram|one for the histogram"),
        ({"method": {"private_head": True}}, "memory is solved, not trained"),
        ({"method": {"lmmd_weight": 1.0}}, "moves no image feature"),
        ({"method": {"start": "public"}}, "folder of them with --public"),
        ({"method": {"neighbourhood": 2}}, "neighbourhood"),
        ({"method": {"adaptation": "adversarial"}}, 'adaptation = "adversarial": memory moves no image feature'),
        ({"classes": [{"name": "Anomaly", "prompts": ["x"]}]}, "what all other labels are called.*class of normal"),
        (
            {"concepts": [{"name": "stripes", "prompts": ["stripes"]}]},
            r"no margin between classes.*leave \[\[concepts\]\] out",
        ),
    ],
)
def test_a_study_that_does_not_hold_together_is_refused(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    with pytest.raises((StudyError, ValueError), match=says):
        new_study(template(**({"method": {"block": "image", **change.pop("method", {})}} | change)), [], tmp_path)
    assert not (tmp_path / "study.toml").exists()


def test_attacks_on_labels_are_refused_for_a_memory(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match='expected task = "classify"'):
        attack(template(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_memory_is_for_anomalies_alone() -> None:
    with pytest.raises(ValueError, match='task = "classify" with adapter = "memory"'):
        make_template(method={"adapter": "memory"})


def test_a_tower_without_the_named_block_is_refused_with_those_it_has(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match=r"no block 'trunk.s9' of patches; expected image or one of .*resblocks"):
        new_study(template(method={"block": "trunk.s9"}), [], tmp_path)


def test_a_site_without_normal_images_is_told(finished: tuple[Path, dict[str, Any]]) -> None:
    federation = Federation(finished[0])
    features = federation.site("ash").features()
    kept = features.train.y != 0
    object.__setattr__(features, "train", type(features.train)(features.train.x[kept], features.train.y[kept]))
    patients = {**features.patients, "train": tuple(np.array(features.patients["train"])[kept])}
    object.__setattr__(features, "patients", patients)
    adapter = federation.agreed.initial.adapter
    with pytest.raises(DataError, match="no normal training image; expected at least one of 'dark'"):
        at_site.message(federation.agreed, 1, adapter, features)
    site = federation.site("ash")
    site._features = features
    with pytest.raises(DataError, match=r"^site ash: no normal training image"):  # of those of a simulation it is this
        site.first_integers()


def test_a_memory_that_no_sum_moves_is_told(
    finished: tuple[Path, dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    agreed = Federation(finished[0]).agreed
    start = agreed.initial.adapter
    moved = {name: value + name.endswith("centroids") for name, value in start.items()}
    at_site.tell(agreed, moved)
    assert not caplog.messages
    at_site.tell(agreed, moved | {"score_centroids": start["score_centroids"]})
    (line,) = caplog.messages
    assert "none of 12 centroids has 2 patients (method.min_patients) near it" in line
    assert "nothing is learnt" in line


def test_a_site_is_told_after_the_first_sum(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[int] = []
    monkeypatch.setattr(at_site, "tell", lambda agreed, adapter: told.append(1))
    federation = copy_of(finished[0], tmp_path)
    sites = federation.sites()
    coordinator = federation.begin(sites)
    for _ in range(2):
        run_round(coordinator, sites)
    assert len(told) == len(sites)


def test_public_images_start_the_centroids(pictures: Path, tmp_path: Path, block: str) -> None:
    public = pictures / "dogwood"
    made = template(method={"block": block, "start": "public"})
    new_study(made, [], tmp_path / "one", public=public)
    again = new_study(made, [], tmp_path / "two", public=public)
    assert again is not None
    one, two = (load_initial(tmp_path / name) for name in ("one", "two"))
    assert all(np.array_equal(one[name], two[name]) for name in one)
    lengths = np.linalg.norm(one["score_centroids"], axis=1)
    np.testing.assert_allclose(lengths, 1, atol=1e-5)


def load_initial(folder: Path) -> dict[str, Any]:
    from secure_fed.protocol.initial_state import InitialState

    return InitialState.from_bytes((folder / "study.safetensors").read_bytes()).adapter


def test_masks_lie_beside_phantoms_and_say_where_the_mass_is(tmp_path: Path) -> None:
    site = PhantomSite("north", patients=12, scanner=3, class_mix=(1, 1, 1, 1), unlabelled=0.0)
    make_phantoms(tmp_path / "with", [site], seed=7, masks=True)
    make_phantoms(tmp_path / "without", [site], seed=7)
    folder, bare = tmp_path / "with" / "north", tmp_path / "without" / "north"
    classes = ("no tumour", "glioma", "meningioma", "pituitary tumour")
    images, without = (read_data(one, classes, "patient", None, 0) for one in (folder, bare))
    assert len(images) == len(list((folder / "images").iterdir()))
    for image, other in zip(images, without, strict=True):
        assert other.mask is None
        assert image.path.read_bytes() == other.path.read_bytes()  # the pictures are the same
        mask = lesion_of(image, Rules())
        assert mask is not None
        assert mask.any() == (image.label != 0)
        assert mask.mean() < 0.2


def test_a_mask_that_does_not_fit_stops_a_study_before_its_first_round(
    pictures: Path, tmp_path: Path, secfacmic: Run
) -> None:
    data = tmp_path / "data"
    shutil.copytree(pictures, data)
    rows = [[f"{kind}/{number}.png", kind, ""] for kind in ("dark", "light") for number in range(12)]
    rows[-1][2] = "mask.png"
    Image.new("L", (16, 32)).save(data / "ash" / "mask.png")
    with (data / "ash" / "manifest.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([["path", "label", "mask"], *rows])
    write_toml(tmp_path / "mine.toml", template())
    for command in ("simulate", "demo"):
        ended = secfacmic(command, tmp_path / "mine.toml", "--data", data, "--out", tmp_path / "out")
        assert ended.returncode == DataError.exit_code
        says = r"mask.png: 16 x 32 pixels, but .*11.png has 32 x 32; expected a mask of the image's size"
        assert re.search(says, ended.stderr)
        assert not (tmp_path / "out").exists()


def test_masks_of_several_sizes_are_judged_in_one() -> None:
    mask = np.zeros((4, 6), dtype=bool)
    mask[1:3, 2:4] = True
    twice = resized(mask, (8, 12))
    assert twice.dtype == bool
    np.testing.assert_array_equal(twice, mask.repeat(2, axis=0).repeat(2, axis=1))
    np.testing.assert_array_equal(resized(twice, (4, 6)), mask)


def test_a_study_whose_training_masks_have_two_sizes_gets_its_figures(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    sites = []
    for number, side in enumerate((8, 12)):
        site = mock.Mock(**{"test_images.return_value": (np.full((1, 1), number), None, None)})
        picture, mask = tmp_path / f"{number}.png", tmp_path / f"mask-{number}.png"
        Image.fromarray(np.full((side, side), 99, dtype=np.uint8)).save(picture)
        lesion = np.zeros((side, side), dtype=np.uint8)
        lesion[: side // 2] = 255
        Image.fromarray(lesion).save(mask)
        image = SiteImage(picture, "p", 0, "test", mask=mask)
        site.test_sources.return_value = site.train_sources.return_value = [image]
        site.rules = Rules()
        site.window = lambda size: (0.0, 0.0, *size)
        sites.append(site)
    maps = np.concatenate([np.ones((1, 2, 4)), np.zeros((1, 2, 4))], axis=1)
    with mock.patch("secure_fed.operate.anomaly_figures.memory.maps", return_value=maps):
        found = places_of({}, sites, sites)
    assert found is not None
    assert found.images == 2
    assert found.constant_pixel_auroc == 1.0


def judged(tmp_path: Path, sides: Sequence[int], marked: Sequence[tuple[slice, slice]]) -> Any:
    """Maps that are hot in the middle, of square pictures with these places marked."""
    site = mock.Mock(**{"test_images.return_value": (np.zeros((len(sides), 1)), None, None)})
    found = []
    for number, (side, place) in enumerate(zip(sides, marked, strict=True)):
        picture, mask = tmp_path / f"{number}.png", tmp_path / f"mask-{number}.png"
        Image.fromarray(np.full((side, side), 99, dtype=np.uint8)).save(picture)
        lesion = np.zeros((side, side), dtype=np.uint8)
        lesion[place] = 255
        Image.fromarray(lesion).save(mask)
        found.append(SiteImage(picture, "p", 1, "test", mask=mask))
    site.test_sources.return_value = site.train_sources.return_value = found
    site.rules, site.window = Rules(), lambda size: (0.0, 0.0, *size)
    maps = np.broadcast_to(np.array([[0.0], [1.0], [0.0]]), (len(sides), 3, 1)).copy()
    with mock.patch("secure_fed.operate.anomaly_figures.memory.maps", return_value=maps):
        return places_of({}, [site], [site])


def test_a_large_picture_is_judged_as_a_smaller_one_of_it(tmp_path: Path) -> None:
    (tmp_path / "large").mkdir()
    small = judged(tmp_path, [200], [(slice(90, 150), slice(0, 50))])
    with mock.patch("secure_fed.operate.anomaly_figures.per_region_overlap", return_value=0.5) as overlap:
        large = judged(tmp_path / "large", [800], [(slice(360, 600), slice(0, 200))])
    assert overlap.call_args.args[0].shape == (1, 256, 256)
    assert large.pixel_auroc == pytest.approx(small.pixel_auroc, abs=0.01)
    assert large.equal_place_auroc is small.equal_place_auroc is None


def test_a_lesion_of_which_no_pixel_is_left_in_the_size_of_all_is_not_judged(tmp_path: Path) -> None:
    one = (slice(1, 2), slice(1, 2))
    half = (slice(0, 4), slice(0, 8))
    assert judged(tmp_path, [8, 8, 16], [half, half, one]).images == 2
    assert judged(tmp_path, [8], [(slice(0, 8), slice(0, 8))]) is None


def test_a_map_is_judged_as_defined() -> None:
    rng = np.random.default_rng(0)
    lesions = np.zeros((6, 8, 8), dtype=bool)
    for place, one in enumerate(lesions):
        one[place % 4 : place % 4 + 3, 2:5] = True
    heads = np.ones_like(lesions)
    constant = np.broadcast_to(rng.random((8, 8)), lesions.shape)
    assert equal_place(lesions, constant, heads) == 0.5
    assert equal_place(lesions, lesions.astype(float), heads) == 1.0
    assert per_region_overlap(lesions, np.ones(lesions.shape)) == 0.0  # nothing is above what healthy places have
    assert per_region_overlap(lesions, lesions + 0.1 * rng.random(lesions.shape)) == 1.0
    heat = rng.random(lesions.shape)
    wins = pairs = 0.0
    for row in range(8):
        for column in range(8):
            for one in range(6):
                for other in range(6):
                    if lesions[one, row, column] and not lesions[other, row, column]:
                        wins += (heat[one, row, column] > heat[other, row, column]) + 0.5 * (
                            heat[one, row, column] == heat[other, row, column]
                        )
                        pairs += 1
    assert equal_place(lesions, heat, heads) == pytest.approx(wins / pairs)
    assert per_region_overlap(lesions, heat) == pytest.approx(0.15, abs=0.06)  # as chance has it


def test_a_runs_and_a_sites_maps_are_drawn(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    for written in (plot_run(finished[0], tmp_path / "run"), plot_site(finished[0] / "sites/ash", tmp_path / "ash")):
        assert [path.name for path in written] == ["anomaly_maps.png"]
        with Image.open(written[0]) as picture:
            pixels = np.asarray(picture.convert("RGB")).astype(int)
        assert (pixels[..., 0] - pixels[..., 2]).max() > 30  # heat is red


@pytest.mark.slow
def test_a_demo_of_anomalies_gives_what_a_simulation_gives(
    finished: tuple[Path, dict[str, Any]], pictures: Path, tmp_path: Path, block: str
) -> None:
    path = tmp_path / "small.toml"
    write_toml(path, template(method={"block": block}))
    out = tmp_path / "out"
    command = [sys.executable, "-m", "secure_fed.cli", "demo", str(path), "--data", str(pictures), "--out", str(out)]
    result = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=180)
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout)
    for key in ("method", "sites", "adapter_digest", "metrics", "anomaly"):
        assert summary[key] == finished[1][key], key
    site = json.loads((out / "sites" / "ash" / "state" / "summary.json").read_text())
    assert set(site["anomaly"]["per_site"]) == {"ash"}


def test_the_report_shows_what_a_memory_finds(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    from secure_fed.report import write_report

    write_report([finished[0]], tmp_path / "report.md", "md")
    text = (tmp_path / "report.md").read_text()
    assert "Anomalies" in text
    assert "false alarms promised at most" in text
    assert "one sum, Mahalanobis" in text
    write_report([finished[0]], tmp_path / "report.html", "html")
    page = (tmp_path / "report.html").read_text()
    assert "Anomalies found against false alarms" in page
    for name in ("ash", "birch", "cedar", "held out"):
        assert f"Scores at {name}, % of images" in page
    summary = copy.deepcopy(finished[1])
    heat = {"normal_map": [[0.1, 0.2], [0.3, 0.4]], "anomalous_map": [[0.5, 0.6], [0.7, 0.8]]}
    summary["anomaly"]["per_site"]["ash"] |= heat
    (tmp_path / "drawn").mkdir()
    (tmp_path / "drawn" / "summary.json").write_text(json.dumps(summary))
    for name in ("study.toml", "study.safetensors"):
        shutil.copy(finished[0] / name, tmp_path / "drawn")
    write_report([tmp_path / "drawn"], tmp_path / "drawn.html", "html")
    page = (tmp_path / "drawn.html").read_text()
    assert "Mean heat map of normal test images, ash" in page
    assert "Mean heat map of anomalous test images, ash" in page
    assert "0.80" in page


def test_mean_maps_are_of_enough_patients_and_of_few_places() -> None:
    from secure_fed.operate.anomaly_figures import _mean_map

    heat = np.arange(2 * 12 * 4, dtype=np.float64).reshape(2, 12, 4)
    found = np.array(_mean_map(heat))
    assert found.shape == (8, 4)
    np.testing.assert_allclose(found[0], heat.mean(axis=0)[:2].mean(axis=0))
    assert _mean_map(np.ones((3, 1, 1))) == ()


def test_a_mean_map_of_few_patients_is_not_made(finished: tuple[Path, dict[str, Any]]) -> None:
    federation = Federation(finished[0])
    sites, held_out = [federation.site("ash")], [federation.site("dogwood")]
    shown = {}
    for floor in (2, 1000):
        method = federation.agreed.study.method.model_copy(update={"min_patients": floor})
        study = federation.agreed.study.model_copy(update={"method": method})
        with mock.patch.object(memory, "maps", lambda adapter, x: np.ones((len(x), 4, 3))):
            figures = anomaly_figures(replace(federation.agreed, study=study), sites, held_out)
        assert figures is not None
        assert figures.held_out is not None
        shown[floor] = [figures.held_out.normal_map, figures.held_out.anomalous_map]
    assert shown[2] == [((1.0,) * 3,) * 4] * 2
    assert shown[1000] == [(), ()]

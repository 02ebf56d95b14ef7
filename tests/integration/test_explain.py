"""Cases explained, from a folder of images to a page: what it shows, what it refuses, and that none of it leaves."""

from __future__ import annotations

import copy
import html
import itertools
import json
import re
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from secure_fed.clients.patients import Doubt
from secure_fed.clients.rules import UndecodableError
from secure_fed.clients.sitefile import read_site_file
from secure_fed.core.errors import (
    AdapterFileError,
    DataError,
    OutputError,
    SiteFileError,
    StorageError,
    StudyError,
    UnreadableImageError,
)
from secure_fed.model.adapter_file import Calibration, load_adapter, save_adapter
from secure_fed.model.attribution import (
    HeatMaps,
    blurred_away,
    class_map,
    early_blocks,
    filled_in,
    margin_of,
    parts_of_places,
    pattern_of,
    pooled_block,
)
from secure_fed.model.backbone import load_backbone
from secure_fed.model.cases import Cases
from secure_fed.model.loaded_backbone import LoadedBackbone
from secure_fed.model.preparing import preparer
from secure_fed.operate.evidence import pack_evidence
from secure_fed.operate.explain import CASES, NOT_A_DIAGNOSIS, PAGE, Explained, _Neighbours, explain, write_cases
from secure_fed.operate.export import export_site
from secure_fed.operate.new_study import new_study
from secure_fed.operate.predict import Probabilities, predict_folder
from secure_fed.protocol.study import with_fields
from secure_fed.protocol.study_tables import Concept
from secure_fed.report.case_page import case_page
from tests.conftest import Federation, Run, make_template
from tests.unit.clients.test_dicom import RAMP, as_bytes, dicom

CONCEPTS = (
    Concept(name="stripes", prompts=("an image with stripes", "a striped picture")),
    Concept(name="brightness", prompts=("a bright image",)),
)


@pytest.fixture(scope="module")
def few(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("few")
    for place, path in enumerate(sorted((images / "dogwood").rglob("*.png"))[::10]):
        (folder / f"{place}.png").write_bytes(path.read_bytes())
    return folder


@pytest.fixture(scope="module")
def said(finished_run: Path, few: Path) -> Probabilities:
    return predict_folder(finished_run / "adapter.safetensors", few, checkpoint=finished_run / "backbone.safetensors")


@pytest.fixture(scope="module")
def explained(finished_run: Path, said: Probabilities) -> Explained:
    with_concepts = replace(said, adapter=replace(said.adapter, concepts=CONCEPTS))
    return explain(with_concepts, finished_run / "backbone.safetensors")


def test_a_folder_becomes_one_page_a_document_and_pictures(
    secfacmic: Run, finished_run: Path, few: Path, said: Probabilities, tmp_path: Path
) -> None:
    adapter, weights = finished_run / "adapter.safetensors", finished_run / "backbone.safetensors"
    out = tmp_path / "out"
    out.mkdir()
    out.chmod(0o755)  # a folder that others may read does not open the files to them
    arguments = ("explain-case", "--adapter", adapter, "--image", few, "--checkpoint", weights, "--out", out)
    ended = secfacmic(*arguments, "--json")
    assert ended.returncode == 0, ended.stderr
    document = json.loads((tmp_path / "out" / CASES).read_text())
    assert json.loads(ended.stdout) == document
    assert document["notice"] == NOT_A_DIAGNOSIS
    expected = said.document()["images"]
    for case, own in zip(document["images"], expected, strict=True):
        assert {key: case[key] for key in own} == own
        assert sum(case["zero_shot"].values()) == pytest.approx(1)
        assert (tmp_path / "out" / case["picture"]).read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "out" / PAGE).read_text()
    assert page.count("data:image/png;base64,") == len(expected)
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)""", page)
    assert 'content="default-src &#39;none&#39;; style-src' in page
    assert page.count(NOT_A_DIAGNOSIS) == 2
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o600}
    again = secfacmic(*arguments)
    assert again.returncode == OutputError.exit_code
    assert "holds cases.json, as explained cases have it" in again.stderr


def test_a_full_disk_leaves_a_folder_as_it_was(
    explained: Explained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "notes.txt").write_text("a person's")
    left = [1, 1]

    def write(path: Path, data: bytes, mode: int) -> None:
        if not left:
            raise StorageError("no room")
        path.write_bytes(data)
        left.pop()

    monkeypatch.setattr("secure_fed.operate.explain.write_durable", write)
    for folder in (tmp_path, tmp_path / "new"):
        left[:] = [1, 1]
        with pytest.raises(StorageError, match="no room"):
            write_cases(explained, "", folder)
        assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_one_image_is_explained_alone(secfacmic: Run, finished_run: Path, few: Path, tmp_path: Path) -> None:
    adapter, weights = finished_run / "adapter.safetensors", finished_run / "backbone.safetensors"
    arguments = ("explain-case", "--adapter", adapter, "--checkpoint", weights, "--out", tmp_path / "out", "--json")
    ended = secfacmic(*arguments, "--image", few / "1.png")
    assert [case["image"] for case in json.loads(ended.stdout)["images"]] == ["1.png"]


def test_pictures_are_chosen_and_told_as_predict_does_it(
    secfacmic: Run, finished_run: Path, few: Path, tmp_path: Path
) -> None:
    ward = tmp_path / "ward"
    ward.mkdir()
    for number in range(3):
        one = dicom(RAMP, PatientID="A-1", SeriesInstanceUID="1.2.3", InstanceNumber=number + 1)
        (ward / f"{number}.dcm").write_bytes(as_bytes(one))
    scout = dicom(RAMP, PatientID="A-1", SeriesInstanceUID="1.2.4", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    (ward / "scout.dcm").write_bytes(as_bytes(scout))
    (ward / "notes.txt").write_text("of the ward")
    adapter, weights = finished_run / "adapter.safetensors", finished_run / "backbone.safetensors"
    words = ("--checkpoint", weights, "--slices", "middle", "--leave-out", "scout")
    predicted = secfacmic("predict", "--adapter", adapter, "--images", ward, *words, "--json")
    ended = secfacmic(
        "explain-case", "--adapter", adapter, "--image", ward, "--out", tmp_path / "out", *words, "--json"
    )
    assert ended.returncode == 0, ended.stderr
    own = [case["image"] for case in json.loads(ended.stdout)["images"]]
    assert own == [case["image"] for case in json.loads(predicted.stdout)["images"]] == ["1.dcm"]
    for said in ("left out: 1 of kind scout", "left out: 2 of kind other slice", "passed over: notes.txt"):
        assert said in ended.stderr
        assert said in predicted.stderr
    for words in (("--slices", "often"), ("--leave-out", "nothing")):
        assert secfacmic("explain-case", "--adapter", adapter, "--image", ward, *words).returncode == 2


def test_a_picture_larger_than_allowed_is_neither_predicted_nor_explained(
    secfacmic: Run, finished_run: Path, few: Path, tmp_path: Path
) -> None:
    with Image.open(few / "1.png") as picture:
        pixels = picture.width * picture.height
    words = ("explain-case", "--adapter", finished_run / "adapter.safetensors", "--image", few / "1.png")
    words += ("--checkpoint", finished_run / "backbone.safetensors", "--out", tmp_path / "out", "--most-pixels")
    assert secfacmic(*words, pixels - 1).returncode == UnreadableImageError.exit_code
    assert not (tmp_path / "out").exists()
    assert secfacmic(*words, pixels).returncode == 0


def test_pictures_are_explained_as_they_were_predicted(finished_run: Path, said: Probabilities) -> None:
    """By the same rules: else what was allowed to be predicted would be refused at its map."""
    fewest = replace(said, rules=replace(said.rules, most_pixels=1))
    with pytest.raises(UndecodableError):
        explain(fewest, finished_run / "backbone.safetensors")


def test_what_is_rounded_to_nothing_has_no_sign_of_a_loss(explained: Explained) -> None:
    first = explained.cases[0]
    nearly = {name: value + 1e-6 for name, value in first.said["probabilities"].items()}
    concepts = tuple(replace(one, similarity=-1e-6, contribution=-1e-6) for one in first.concepts)
    case = replace(first, zero_shot=nearly, concepts=concepts, rest=-1e-6)
    page = case_page(replace(explained, cases=(case,)))
    assert page.count("<td>+0.0</td>") == len(nearly)
    assert not re.findall(r"[-\u2212]0\.0+(?!\d)", page)


def test_concepts_and_a_rest_make_up_the_margin(explained: Explained) -> None:
    for case in explained.cases:
        assert [one.name for one in case.concepts] == ["stripes", "brightness"]
        assert case.margin is not None
        assert case.rest is not None
        assert sum(one.contribution for one in case.concepts) + case.rest == pytest.approx(case.margin)
        assert any(one.adapted != one.similarity for one in case.concepts)  # facmic moves features
    assert "stripes" in case_page(explained)


def test_the_page_says_whose_images_are_in_doubt(explained: Explained) -> None:
    doubt = Doubt("writings", ("P 1", "p1"), 3)
    doubted = replace(explained, found=replace(explained.found, doubts=(doubt,)))
    assert "in doubt" not in case_page(explained)
    assert f"<li>{html.escape(doubt.text, quote=False)}".replace("'", "&#39;") in case_page(doubted)
    assert doubted.document()["doubts"][0]["text"] == doubt.text


def test_a_place_that_can_get_no_cases_is_refused_before_anything_is_computed(
    secfacmic: Run, finished_run: Path, few: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / CASES).write_text("{}")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name, says in (
        ("file", "a file; expected a folder"),
        ("file/below", "file: a file; expected a folder"),
        ("link", "link: a link to nowhere; expected a folder"),
        ("full", "holds cases.json, as explained cases have it"),
    ):
        ended = secfacmic("explain-case", "--adapter", tmp_path / "none", "--image", few, "--out", tmp_path / name)
        assert ended.returncode == OutputError.exit_code
        assert says in ended.stderr
    ended = secfacmic("explain-case", "--adapter", finished_run / "adapter.safetensors", "--image", few / "none.png")
    assert ended.returncode == DataError.exit_code
    assert "none.png: no such folder or file; expected an image" in ended.stderr


def test_zero_shot_stands_at_the_temperature_of_what_it_is_compared_with(
    finished_run: Path, said: Probabilities, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("secure_fed.operate.explain._Classifier.map", lambda *_: None)  # maps take their time
    seen = []
    for temperature in (1.0, 4.0):
        calibration = Calibration(temperature, 10)
        found = explain(
            replace(said, adapter=replace(said.adapter, calibration=calibration)), finished_run / "backbone.safetensors"
        )
        seen.append(np.array([list(case.zero_shot.values()) for case in found.cases]))
    cooler = seen[0] ** 0.25
    np.testing.assert_allclose(seen[1], cooler / cooler.sum(axis=1, keepdims=True), rtol=1e-9)


def test_concepts_and_the_class_without_a_finding_travel_with_the_adapter(finished_run: Path, tmp_path: Path) -> None:
    federation = Federation(finished_run)
    table = [concept.model_dump(mode="json") for concept in CONCEPTS]
    classes = [entry.model_dump(mode="json") for entry in federation.agreed.study.classes]
    classes[1]["finding"] = False
    agreed = replace(federation.agreed, study=with_fields(federation.agreed.study, concepts=table, classes=classes))
    save_adapter(tmp_path / "adapter.safetensors", agreed, federation.agreed.initial.adapter)
    found = load_adapter(tmp_path / "adapter.safetensors")
    assert (found.concepts, found.without_finding) == (CONCEPTS, classes[1]["name"])
    with safe_open(tmp_path / "adapter.safetensors", "np") as file:
        metadata = file.metadata()
    tensors = load_file(tmp_path / "adapter.safetensors")
    save_file(tensors, tmp_path / "other.safetensors", metadata | {"without_finding": '"none of them"'})
    with pytest.raises(AdapterFileError, match="none of its classes"):
        load_adapter(tmp_path / "other.safetensors")


def test_reasons_are_asked_against_the_class_without_a_finding(
    finished_run: Path, said: Probabilities, explained: Explained
) -> None:
    predicted = {case.said["prediction"] for case in explained.cases}
    assert all(case.against is None for case in explained.cases)  # the study names none
    assert said.features is not None
    x = torch.from_numpy(said.features)
    logits = said.adapter.build().logits(x).detach().double()
    for number, name in enumerate(said.adapter.classes):
        asked = replace(said, adapter=replace(said.adapter, concepts=CONCEPTS, without_finding=name))
        with mock.patch.object(HeatMaps, "of", return_value=None) as mapped:
            found = explain(asked, finished_run / "backbone.safetensors")
        for case, row, call, plain in zip(found.cases, logits, mapped.call_args_list, explained.cases, strict=True):
            if case.said["prediction"] == name:
                assert (case.against, case.margin) == (None, pytest.approx(plain.margin))
                continue
            assert case.against == name
            margin = float(row.max() - row[number])
            assert case.margin == pytest.approx(margin, rel=1e-4)
            place = found.cases.index(case)
            assert call.args[1](x).detach()[place].item() == pytest.approx(margin, rel=1e-4)
        page = case_page(found)
        assert (f"margin over {name}," in page) == (predicted != {name})
        assert ("margin over the others," in page) == (name in predicted)
    study = with_fields(
        make_template(), classes=[{"name": name, "prompts": [name], "finding": name != "b"} for name in "abc"]
    )
    assert study.without_finding == "b"
    with pytest.raises(StudyError, match="finding = false for a and b; expected it for one class at most"):
        with_fields(
            make_template(), classes=[{"name": name, "prompts": [name], "finding": name == "c"} for name in "abc"]
        )


@pytest.mark.parametrize(
    ("second", "says"),
    [
        ({"name": "lines", "prompts": ["an image with stripes"]}, "concepts 'stripes' and 'lines': one name, or one"),
        ({"name": "Stripes ", "prompts": ["lines"]}, "concepts 'stripes' and 'Stripes ': one name, or one"),
        ({"name": "lines", "prompts": ["a " * 90]}, "prompts longer than .* of concept 'lines' has"),
    ],
)
def test_concepts_that_nothing_tells_apart_or_that_would_be_cut_are_refused(
    tmp_path: Path, second: dict[str, Any], says: str
) -> None:
    first = {"name": "stripes", "prompts": ["an image with stripes"]}
    with pytest.raises(StudyError, match=says):
        new_study(make_template(concepts=[first, second]), [], tmp_path)


def test_a_concept_without_prompts_is_refused() -> None:
    with pytest.raises(ValueError, match="expected at least one prompt"):
        make_template(concepts=[{"name": "stripes", "prompts": []}])
    for blank in ("", "   ", "\t"):
        with pytest.raises(ValueError, match=r"concepts\[0\]\.prompts\[1\]"):
            make_template(concepts=[{"name": "stripes", "prompts": ["stripes", blank]}])
    with pytest.raises(ValueError, match="concept"):
        make_template(concepts=[{"name": "stripes", "prompts": ["a"]}, {"name": "stripes", "prompts": ["b"]}])


def test_a_class_that_was_left_out_of_a_head_has_no_part_in_a_margin() -> None:
    class Head:
        def logits(self, features: torch.Tensor) -> torch.Tensor:
            return torch.tensor([[12.0, 11.0, -1e6], [9.0, 5.0, -1e6]]) + features.sum()

    rows = torch.zeros(2, 2, requires_grad=True)
    assert margin_of(cast(Any, Head()), 0)(rows).tolist() == [1.0, 4.0]
    assert margin_of(cast(Any, Head()), 1)(rows).tolist() == [-1.0, -4.0]


def test_a_stranger_gets_no_reasons(finished_run: Path, said: Probabilities) -> None:
    strangers = np.zeros(len(said.images), dtype=bool)
    strangers[1] = True
    cases = Cases(np.ones_like(said.probabilities, dtype=bool), strangers, 20.0)
    adapter = replace(said.adapter, concepts=CONCEPTS)
    explained = explain(replace(said, cases=cases, adapter=adapter), finished_run / "backbone.safetensors")
    assert [case.has_map for case in explained.cases] == (~strangers).tolist()
    assert [bool(case.concepts) for case in explained.cases] == (~strangers).tolist()
    page = case_page(explained)
    (section,) = [part for part in page.split("<section>") if "A stranger" in part]
    assert "is like none that the study was calibrated on" in section
    assert not any(name in section for name in said.adapter.classes)  # nothing is claimed of it, so no class is named
    assert "A set holds the class of 90 % of patients like the 20 calibration patients" in page
    case = explained.document()["images"][1]
    assert case["stranger"]
    claimed = ("prediction", "probabilities", "set", "zero_shot", "margin", "rest")
    assert {case[key] for key in claimed} == {None}
    assert not any(name in json.dumps(case) for name in said.adapter.classes)
    assert "patients" not in explained.document()  # whose classes would be made of the stranger's too


def test_own_patients_are_shown_only_where_the_site_allows_it_and_by_numbers(
    federation: Federation, finished_run: Path, said: Probabilities, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("secure_fed.operate.explain._Classifier.map", lambda *_: None)  # maps take their time
    path = federation.folder / "sites/ash/site.toml"
    weights = finished_run / "backbone.safetensors"
    with pytest.raises(SiteFileError, match="similar_cases is 0"):
        explain(said, weights, path)
    path.write_text(path.read_text().replace("similar_cases = 0", "similar_cases = 2"))
    if federation.agreed.study.id != said.adapter.study:
        with pytest.raises(AdapterFileError, match="expected both of one study"):
            explain(said, weights, path)
        said = replace(said, adapter=replace(said.adapter, study=federation.agreed.study.id))
    explained = explain(said, weights, path)
    numbers = [one.number for case in explained.cases for one in case.similar]
    assert {len(case.similar) for case in explained.cases} == {2}
    assert sorted(set(numbers)) == list(range(1, len(set(numbers)) + 1))
    for case in explained.cases:
        assert case.similar[0].cosine >= case.similar[1].cosine
    file = read_site_file(path)
    text = json.dumps(explained.document()) + case_page(explained)
    assert file.data.folder not in text
    owners = {one.patient for one in federation.site("ash").features().images if one.patient}
    assert not [owner for owner in owners if f'"{owner}"' in text or f">{owner}<" in text]


def test_an_observer_has_no_training_patients_to_show(federation: Federation, said: Probabilities) -> None:
    path = federation.folder / "sites/dogwood/site.toml"
    path.write_text(path.read_text().replace("similar_cases = 0", "similar_cases = 2"))
    adapter = replace(said.adapter, study=federation.agreed.study.id)
    with pytest.raises(SiteFileError, match="dogwood is an observer, which trains on no patient"):
        _Neighbours(path, adapter, "cpu")


def test_a_patient_is_shown_once_by_its_nearest_image() -> None:
    neighbours = object.__new__(_Neighbours)
    neighbours._x = np.array([[1, 0], [0.9, 0.1], [0, 1], [0.5, 0.5]], dtype=np.float32)
    neighbours._y = np.array([0, 0, 1, 1])
    neighbours._patients = ("one", "one", "two", "three")
    neighbours._classes, neighbours._count, neighbours._numbers = ("dark", "light"), 2, {}
    found = neighbours.of(np.array([2, 0], dtype=np.float32))
    assert [(one.number, one.label) for one in found] == [(1, "dark"), (2, "light")]
    assert [one.cosine for one in found] == pytest.approx([1, 0.5**0.5])


def test_exports_and_evidence_hold_no_explanation(finished_run: Path, explained: Explained, tmp_path: Path) -> None:
    shutil.copytree(finished_run, tmp_path, symlinks=True, dirs_exist_ok=True)
    with_cases = [path for path in (tmp_path / "sites/ash", *(tmp_path / "sites/ash").rglob("*")) if path.is_dir()]
    assert tmp_path / "sites/ash/state/accepted" in with_cases
    for folder in with_cases:
        write_cases(explained, case_page(explained), folder)
    written = [path for folder in with_cases for path in (folder / PAGE, folder / CASES, *folder.glob("case-*.png"))]
    telling = [path.read_bytes()[:200] for path in written] + [NOT_A_DIAGNOSIS.encode(), b"case-0001"]
    out = tmp_path / "export"
    export_site(tmp_path / "sites/ash/site.toml", out, onnx=False, own_results=True)
    pack_evidence(tmp_path / "sites/ash", tmp_path / "evidence.zip")
    with zipfile.ZipFile(tmp_path / "evidence.zip") as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    contents |= {path.name: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert len(contents) > 5
    for name, content in contents.items():
        assert not [sign for sign in telling if sign in content], name
        assert Path(name).suffix not in (".png", ".html")


@pytest.mark.parametrize("tower", ["convolutional", "transformer, mean", "transformer, token"])
def test_a_map_lies_over_what_the_tower_sees(finished_run: Path, tower: str) -> None:
    file = load_adapter(finished_run / "adapter.safetensors")
    if tower == "convolutional":
        backbone = load_backbone(make_template(backbone=MINI).backbone, None)
    else:
        backbone = load_backbone(file.backbone, finished_run / "backbone.safetensors")
    if tower == "transformer, token":
        backbone._model.visual.pool_type = "tok"  # the small tower takes the mean; it has the token's weights
    assert (backbone.last_attention() is not None) == (tower == "transformer, token")
    assert ("Grad-ECLIP" in HeatMaps(backbone).kind) == (tower == "transformer, token")
    rng = np.random.default_rng(0)
    prepared = rng.normal(size=(3, backbone.side, backbone.side)).astype(np.float32)
    vectors = torch.from_numpy(rng.normal(size=(backbone.dim,)).astype(np.float32))
    unasked = "gradients" if tower == "transformer, token" else "attention_gradients"
    with mock.patch.object(LoadedBackbone, unasked, side_effect=AssertionError("the map is said to be made otherwise")):
        found = HeatMaps(backbone).of(prepared, lambda features: features @ vectors)
    assert found is not None
    assert found.shape == (backbone.side, backbone.side)
    assert (found.min(), found.max()) == (0, 1)
    again = HeatMaps(backbone).of(prepared, lambda features: features @ vectors)
    assert again is not None
    np.testing.assert_array_equal(found, again)
    other = HeatMaps(backbone).of(prepared, lambda features: features @ vectors.flip(0))
    assert other is not None
    assert not np.allclose(found, other)
    assert margin_of(file.build(), 0)(torch.zeros(2, file.initial.prompt_features.shape[1]) + 0.1).shape == (2,)


MINI = {"model": "mini-clip", "weights": "file", "file": "mini-clip.safetensors"}


@pytest.fixture(scope="module")
def mini() -> LoadedBackbone:
    return load_backbone(make_template(backbone=MINI).backbone, None)


def seen_larger(backbone: LoadedBackbone, side: int) -> LoadedBackbone:
    """The same convolutional tower, which takes any size, for larger images: its last grid grows with them."""
    larger = copy.copy(backbone)
    larger.__dict__.pop("_grids", None)
    larger.form = replace(backbone.form, preprocess={**backbone.form.preprocess, "size": [side, side]})
    larger._prepare = preparer(larger.form.preprocess)
    return larger


@pytest.mark.parametrize(("side", "cells"), [(80, 3), (192, 6), (224, 7)])
def test_the_exact_map_of_a_class_is_shown_where_the_last_grid_has_seven_cells_a_side(
    mini: LoadedBackbone, side: int, cells: int
) -> None:
    backbone = seen_larger(mini, side)
    assert backbone.grid(backbone.blocks()[-2])[:2] == (cells, cells)
    assert (pooled_block(backbone) is None) == (cells < 7)
    assert HeatMaps(backbone).kind.startswith("each place's part" if cells >= 7 else "gradients at trunk.stem and")


def test_the_exact_maps_places_add_up_to_the_margin(mini: LoadedBackbone) -> None:
    backbone = seen_larger(mini, 224)
    rng = np.random.default_rng(1)
    prepared = rng.normal(size=(3, 224, 224)).astype(np.float32)
    vectors = torch.from_numpy(rng.normal(size=(backbone.dim,)).astype(np.float32))
    block = pooled_block(backbone)
    assert block is not None
    parts = class_map(backbone, block, prepared, lambda features: features @ vectors + 3)
    assert parts.shape == (7, 7)
    assert parts.sum() == pytest.approx(float(backbone.encode_prepared([prepared])[0] @ vectors.numpy()), rel=1e-3)
    whole = HeatMaps(backbone).of(prepared, lambda features: features @ vectors)
    assert whole is not None
    assert np.corrcoef(parts.ravel(), whole[16::32, 16::32].ravel())[0, 1] > 0.8


def test_a_tower_that_does_not_end_in_a_mean_has_no_exact_map(mini: LoadedBackbone) -> None:
    backbone = seen_larger(mini, 224)
    half = torch.linspace(0, 1, 7)[:, None]  # as attention would: some places count more

    def uneven(prepared: object, blocks: object, wanted: object, **rest: object) -> list[tuple[torch.Tensor, ...]]:
        found = LoadedBackbone.gradients(backbone, prepared, blocks, wanted, **rest)  # type: ignore[arg-type]
        return [(seen, gradient * half) for seen, gradient in found]

    with mock.patch.object(backbone, "gradients", side_effect=uneven):
        assert HeatMaps(backbone).kind.startswith("gradients at")


def test_the_first_block_and_the_next_with_fewer_places_are_asked(mini: LoadedBackbone) -> None:
    assert early_blocks(mini) == ("trunk.stem", "trunk.s1")
    assert [mini.grid(block)[0] for block in early_blocks(mini)] == [40, 20]


def test_what_the_blur_leaves_as_it_is_has_no_part_in_a_map(mini: LoadedBackbone) -> None:
    prepared = np.full((3, 80, 80), -1.0, dtype=np.float32)
    prepared[:, 50:58, 20:28] = 1.5  # the only thing to see; borders of the picture are as plain as its middle
    plain, seen = mini.encode_prepared([np.full_like(prepared, -1.0), prepared])
    vectors = torch.from_numpy(seen - plain)  # so that it speaks for what is asked
    found = HeatMaps(mini).of(prepared, lambda features: features @ vectors)
    assert found is not None
    row, column = np.unravel_index(found.argmax(), found.shape)
    assert 42 <= row < 66
    assert 12 <= column < 36
    assert max(found[0, 0], found[0, -1], found[-1, -1]) < 0.05


def test_a_place_has_its_part_of_what_the_margin_loses_when_it_is_blurred() -> None:
    """Of a tower whose feature is the sum of a patch for, less one against: by hand, not by another way to compute."""

    class Tower:
        def encode_prepared(self, prepared: list[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
            return np.array(
                [[one[:, 8:16, 48:56].sum() - one[:, 56:64, 8:16].sum()] for one in prepared], dtype=np.float32
            )

    prepared = np.ones((3, 80, 80), dtype=np.float32)
    changed = blurred_away(prepared, np.zeros_like(prepared))
    (parts,) = parts_of_places(cast(Any, Tower()), prepared, [changed], lambda features: 2 * features[:, 0])
    assert int(parts.argmax()) == 16  # row 1, column 6
    places = np.arange(10)[:, None, None] - np.array([[1], [6], [7]])  # how far rows and columns lie from the patches'
    shares = np.exp(-((np.arange(-3.5, 4) - 8 * places) ** 2) / 2 / (80 / 12) ** 2).mean(axis=-1)
    at_1, at_6, at_7 = shares.T  # the window's mean over a patch there
    moves = 3 * 64 * (np.outer(at_1, at_6) - np.outer(at_7, at_1))
    expected = np.maximum(moves * (2 * np.maximum(moves, 0) * moves).sum(), 0)
    np.testing.assert_allclose(parts, expected, rtol=1e-3, atol=1e-3 * expected.max())
    assert parts[7, 1] == 0  # there it rises


def test_a_place_has_a_part_by_how_the_feature_moves_not_by_the_margin_at_that_place_alone() -> None:
    """Two places move the feature alike; a third moves it elsewhere, where the margin's weight is large by chance."""
    features = np.zeros((101, 3), dtype=np.float32)
    features[0] = 1, 1, 0.3
    features[1:] = features[0]
    features[[12, 13, 14], 0] = 0  # rows of the places 11, 12 and 13
    features[78, 2] = 0
    tower = SimpleNamespace(encode_prepared=lambda prepared: features)
    (parts,) = parts_of_places(cast(Any, tower), np.zeros((3, 8, 8)), [[]], lambda x: x @ torch.tensor([1.0, 0.0, 4.0]))
    assert parts.ravel()[[11, 12, 13]] == pytest.approx(3.0)
    assert parts.ravel()[77] == pytest.approx(1.2 * 0.3 * 0.3)


def test_a_margin_is_held_against_one_class_or_the_mean_of_the_others() -> None:
    rows = torch.tensor([[5.0, 1.0, 3.0], [5.0, -1e6, 3.0]])
    head = SimpleNamespace(logits=lambda features: features)
    assert margin_of(cast(Any, head), 0)(rows).tolist() == [3.0, 2.0]
    assert margin_of(cast(Any, head), 0, 1)(rows[:1]).tolist() == [4.0]
    assert margin_of(cast(Any, head), 0, 1)(rows[1:]).tolist() == [2.0]  # it was left out of the head


def test_a_place_is_filled_in_from_around_it() -> None:
    prepared = np.full((3, 80, 80), -1.0, dtype=np.float32)
    prepared[:, 24:32, 40:48] = 2.0  # in the middle of row 3, column 5
    prepared[:, :, :10] = 0.5
    (without,) = itertools.islice(filled_in(prepared), 35, 36)
    np.testing.assert_allclose(without[:, 12:44, 28:60], -1, atol=0.01)  # the thing is gone, and no smear of it is left
    np.testing.assert_array_equal(without[:, :, :10], prepared[:, :, :10])
    assert np.abs(without - prepared).max() == pytest.approx(3, abs=0.01)
    (away,) = itertools.islice(filled_in(prepared), 99, None)
    np.testing.assert_array_equal(away[:, :60, :60], prepared[:, :60, :60])


def test_a_pattern_is_the_covariance_times_what_of_the_weights_moves_a_unit_feature() -> None:
    weights, spread = torch.tensor([3.0, 4.0, 1.0], dtype=torch.float64), np.diag([1.0, 0.5, 9.0])
    known = (np.array([2.0, 0.0, 0.0]), spread)
    for found, pattern in (
        (None, None),
        (known, np.array([0.0, 2.0, 9.0]) / np.sqrt(85)),
        ((known[0], np.zeros((3, 3))), None),  # no direction: no pattern
    ):
        head = SimpleNamespace(within_class=mock.Mock(return_value=found))
        asked = pattern_of(cast(Any, head), lambda x: x @ weights, 1)
        head.within_class.assert_called_once_with(1)
        assert (asked is None) == (pattern is None)
        if asked is not None:
            np.testing.assert_allclose(asked(torch.eye(3)).numpy(), pattern, rtol=1e-6)


def test_a_place_counts_where_the_gradients_of_margin_and_pattern_agree(mini: LoadedBackbone) -> None:
    prepared = np.random.default_rng(3).normal(size=(3, 80, 80)).astype(np.float32)
    ofs = []
    for places in ([(20, 20), (60, 60)], [(60, 60), (20, 60)]):
        one = np.zeros((80, 80))
        for place in places:
            one[place] = 1
        ofs.append([one, one, one])
    with (
        mock.patch("secure_fed.model.attribution.parts_of_places", return_value=np.ones((2, 10, 10)) - np.eye(10)[9]),
        mock.patch("secure_fed.model.attribution._early_gradients", side_effect=ofs) as asked,
    ):
        first, second = (lambda features: features[:, 0]), (lambda features: features[:, 1])
        found = HeatMaps(mini).of(prepared, first, second)
    assert found is not None
    assert found.argmax() == 60 * 80 + 60
    assert found[20, 20] == found[20, 60] == 0
    assert [call.args[3] for call in asked.call_args_list] == [first, second]


def test_a_place_counts_where_gradients_and_falls_agree(mini: LoadedBackbone) -> None:
    prepared = np.random.default_rng(3).normal(size=(3, 80, 80)).astype(np.float32)
    vectors = torch.from_numpy(np.random.default_rng(4).normal(size=(mini.dim,)).astype(np.float32))
    maps, parts = HeatMaps(mini), np.zeros((10, 10))
    parts[2, 7] = 1
    for ways in ([parts, 0 * parts], [0 * parts, parts]):  # either way of taking a place out counts
        with mock.patch("secure_fed.model.attribution.parts_of_places", return_value=np.stack(ways)):
            found = maps.of(prepared, lambda features: features @ vectors)
        assert found is not None
        row, column = np.unravel_index(found.argmax(), found.shape)
        assert abs(row - 20) < 14
        assert abs(column - 60) < 14
        assert found[45:, :25].max() == pytest.approx(0, abs=1e-6)


def test_an_image_of_which_no_place_speaks_for_the_class_gets_no_map(
    finished_run: Path, mini: LoadedBackbone, said: Probabilities
) -> None:
    prepared = np.random.default_rng(3).normal(size=(3, 80, 80)).astype(np.float32)
    vectors = torch.from_numpy(np.random.default_rng(4).normal(size=(mini.dim,)).astype(np.float32))
    with mock.patch("secure_fed.model.attribution.parts_of_places", return_value=np.zeros((2, 10, 10))):
        assert HeatMaps(mini).of(prepared, lambda features: features @ vectors) is None
    with mock.patch.object(HeatMaps, "of", return_value=None):
        explained = explain(said, finished_run / "backbone.safetensors")
    assert not any(case.has_map for case in explained.cases)
    assert not any(case["has_map"] for case in explained.document()["images"])
    page = case_page(explained)
    assert page.count("no map, for no place by itself speaks for this class") == len(explained.cases)
    assert "red:" not in page
    assert all(case.said["prediction"] for case in explained.cases)  # all else is said of it


@pytest.mark.parametrize("blur", [0, 1])
def test_the_first_blocks_places_count_at_either_blur(mini: LoadedBackbone, blur: int) -> None:
    prepared = np.random.default_rng(3).normal(size=(3, 80, 80)).astype(np.float32)
    parts = np.ones((2, 10, 10))
    gradients = [np.zeros((80, 80)), np.zeros((80, 80)), np.ones((80, 80))]
    parts[:, 9, 0] = gradients[2][79, 0] = 0  # elsewhere all places are alike to both
    gradients[blur][20, 60] = 1
    with (
        mock.patch("secure_fed.model.attribution.parts_of_places", return_value=parts),
        mock.patch("secure_fed.model.attribution._early_gradients", return_value=gradients) as asked,
    ):
        found = HeatMaps(mini).of(prepared, lambda features: features[:, 0])
    assert found is not None
    row, column = np.unravel_index(found.argmax(), found.shape)
    assert abs(row - 20) < 5
    assert abs(column - 60) < 5
    held = asked.call_args.args[1]
    assert [block for block, _ in held] == ["trunk.stem", "trunk.stem", "trunk.s1"]
    strong, slight, coarse = (np.abs(np.diff(blurred)).mean() for _, blurred in held)
    assert strong == coarse < slight / 2

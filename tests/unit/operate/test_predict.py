"""An adapter at work: the same probabilities as at its site, calibrated, for any kind of image; and its refusals."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import safetensors.numpy
import torch
from highdicom.sr import srread
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

from secure_fed.clients.data import read_data
from secure_fed.clients.sitefile import read_site_file
from secure_fed.clients.training import predict
from secure_fed.core.errors import AdapterFileError, DataError, ManifestError, StorageError, UnreadableImageError
from secure_fed.core.layout import CALIBRATION
from secure_fed.lab.simulation import simulate
from secure_fed.model.adapter_file import Calibration, load_adapter, save_adapter, save_calibration
from secure_fed.model.adapters import PRIVATE_HEAD, build_adapter
from secure_fed.model.calibration import LEAST, MOST, fit_temperature, tempered
from secure_fed.model.cases import Cases
from secure_fed.operate.explain import Explained
from secure_fed.operate.export import export_run
from secure_fed.operate.predict import of_patient, predict_folder, write_reports
from secure_fed.operate.site_results import write_results
from secure_fed.operate.structured_report import report_on
from secure_fed.protocol.study import AgreedStudy, load_study
from secure_fed.protocol.study_tables import Method
from secure_fed.report.case_page import case_page
from tests.conftest import CLASSES, TRAINING, Federation, Run, make_template, run_round
from tests.unit.clients.test_dicom import as_bytes, dicom

torch.set_num_threads(1)


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    """Adapter, calibration and weights of the finished run, to be changed."""
    for name in ("adapter.safetensors", CALIBRATION, "backbone.safetensors", "study.toml", "study.safetensors"):
        shutil.copy(finished_run / name, tmp_path / name)
    return tmp_path


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))


# --- calibration ---


def test_the_temperature_is_the_one_by_which_the_labels_were_drawn() -> None:
    rng = np.random.default_rng(0)
    for true in (0.4, 1.0, 3.0):
        logits = 4 * rng.normal(size=(20_000, 4))
        labels = (logits / true + rng.gumbel(size=logits.shape)).argmax(axis=1)  # drawn from softmax(logits / true)
        assert fit_temperature(softmax(logits), labels) == pytest.approx(true, rel=0.05)


@given(st.integers(1, 40), st.integers(2, 5), st.floats(0.1, 30), st.integers(0, 2**32 - 1))
def test_no_temperature_on_a_fine_grid_is_better(count: int, classes: int, scale: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    probabilities = softmax(scale * rng.normal(size=(count, classes)))
    labels = rng.integers(0, classes, count)

    def cost(temperature: float) -> float:
        chosen = tempered(probabilities, temperature)[np.arange(count), labels]
        return float(-np.log(np.maximum(chosen, 1e-300)).sum() + np.log(temperature) ** 2 / 2)

    found = fit_temperature(probabilities, labels)
    assert LEAST <= found <= MOST
    grid = np.exp(np.linspace(np.log(LEAST), np.log(MOST), 400))
    assert cost(found) <= min(cost(value) for value in grid) + 1e-3 * count


def test_few_faultless_images_do_not_end_at_certainty() -> None:
    probabilities = np.array([[0.7, 0.3], [0.2, 0.8], [0.6, 0.4]])
    assert 0.25 < fit_temperature(probabilities, np.array([0, 1, 0])) < 1
    assert fit_temperature(np.empty((0, 2)), np.empty(0, dtype=np.int64)) == 1


@given(st.floats(LEAST, MOST), st.integers(0, 2**32 - 1))
def test_a_temperature_changes_no_prediction(temperature: float, seed: int) -> None:
    logits = np.random.default_rng(seed).normal(size=(20, 4))
    after = tempered(softmax(logits), temperature)
    assert np.array_equal(after.argmax(axis=1), logits.argmax(axis=1))
    np.testing.assert_allclose(after, softmax(logits / temperature), atol=1e-9)


# --- the whole way ---


def test_a_folder_gets_the_probabilities_that_its_site_gives(finished_run: Path) -> None:
    federation = Federation(finished_run)
    file = read_site_file(finished_run / "sites/ash/site.toml")
    study = federation.agreed.study
    images = read_data(Path(file.data.folder), study.class_names, file.data.unit, file.data.shares, study.seed)
    paths = [image.path.relative_to(file.data.folder).as_posix() for image in images if image.split == "test"]
    site = federation.site("ash")
    expected = site.predictions(site.parameters).probabilities
    found = predict_folder(
        finished_run / "adapter.safetensors", Path(file.data.folder), checkpoint=finished_run / "backbone.safetensors"
    )
    rows = dict(zip(map(found.name, found.images), found.probabilities, strict=True))
    temperature = found.adapter.temperature
    assert len(rows) == len(images)
    assert temperature != 1
    np.testing.assert_allclose([rows[path] for path in paths], tempered(expected, temperature), atol=1e-6)


def test_the_runs_temperature_is_fitted_on_the_training_sites_validation_images(finished_run: Path) -> None:
    federation = Federation(finished_run)
    sites = [federation.site(name) for name in TRAINING]
    pairs = [site.validation_predictions(site.parameters)[:2] for site in sites]
    probabilities, labels = (np.concatenate(part) for part in zip(*pairs, strict=True))
    found = load_adapter(finished_run / "adapter.safetensors").calibration
    assert found is not None
    assert found.images == len(labels)
    assert found.temperature == pytest.approx(fit_temperature(probabilities, labels))


def test_a_client_leaves_a_calibration_of_its_own_beside_its_adapter(federation: Federation) -> None:
    sites = federation.sites()
    run_round(federation.begin(sites), sites)
    coordinator = federation.reopen()
    for site in sites:
        site.respond(coordinator.request(site.name, site.run, site.position))
    site = sites[0]
    file = read_site_file(federation.folder / "sites/ash/site.toml")
    assert site.round == 1
    write_results(Path(file.state), federation.agreed, site)
    own = load_adapter(Path(file.state) / "adapter.safetensors").calibration
    assert own is not None
    assert own.images == len(site.features().val.y) > 0
    assert (Path(file.state) / CALIBRATION).stat().st_mode & 0o777 == 0o600


def write_dicom(path: Path, pixels: np.ndarray) -> None:
    """A secondary capture of 8-bit grey pixels."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = Dataset()
    data.file_meta = meta
    data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    data.PatientID, data.PhotometricInterpretation, data.SamplesPerPixel = "p", "MONOCHROME2", 1
    data.Rows, data.Columns = pixels.shape
    data.BitsAllocated = data.BitsStored = 8
    data.HighBit, data.PixelRepresentation = 7, 0
    data.PixelData = pixels.astype(np.uint8).tobytes()
    pydicom.dcmwrite(path, data, enforce_file_format=True)


def test_dicom_and_ordinary_images_alike_wherever_they_lie(run: Path) -> None:
    folder = run / "images"
    (folder / "deep" / "er").mkdir(parents=True)
    pixels = np.random.default_rng(1).integers(0, 256, (40, 32))
    pixels[0, :2] = 0, 255  # without a window the least and the greatest value are black and white
    Image.fromarray(pixels.astype(np.uint8)).save(folder / "deep" / "b.png")
    write_dicom(folder / "deep" / "er" / "a.dcm", pixels)
    (folder / ".hidden").write_text("not looked at")
    found = predict_folder(run / "adapter.safetensors", folder, checkpoint=run / "backbone.safetensors")
    assert [found.name(image) for image in found.images] == ["deep/b.png", "deep/er/a.dcm"]
    np.testing.assert_allclose(found.probabilities[0], found.probabilities[1], atol=1e-6)


# --- as training saw them ---


def test_pictures_are_seen_by_the_studys_windows_and_background_as_training_saw_them(
    images: Path, tmp_path: Path
) -> None:
    for number, path in enumerate(sorted(images.glob("*/*/*.png"))):
        grey = np.asarray(Image.open(path))
        to = tmp_path / "images" / path.relative_to(images)
        to.parent.mkdir(parents=True, exist_ok=True)
        if number % 2:  # a file that names a window of its own, which shows next to nothing
            shown = dicom(grey.astype(np.uint16), WindowCenter=2000, WindowWidth=4000)
            to.with_suffix(".dcm").write_bytes(as_bytes(shown))
        else:
            Image.merge("LA", [Image.fromarray(grey), Image.fromarray(255 - grey // 2)]).save(to)
    windows = [{"modality": "MR", "centre": 110, "width": 60, "unit": "rescaled"}]
    template = make_template(mode="plain", rounds=1, windows=windows, background="white")
    out, folder = tmp_path / "out", tmp_path / "images/ash"
    simulate(template, out, tmp_path / "images")
    export_run(out, tmp_path / "export", onnx=False)
    federation = Federation(out)
    site = federation.site("ash")
    file, study = read_site_file(out / "sites/ash/site.toml"), federation.agreed.study
    own = read_data(folder, study.class_names, file.data.unit, file.data.shares, study.seed)
    names = [image.path.relative_to(folder).as_posix() for image in own if image.split == "test"]
    assert {Path(name).suffix for name in names} == {".dcm", ".png"}
    expected = site.predictions(site.parameters).probabilities
    for adapter in (out / "adapter.safetensors", tmp_path / "export/adapter.safetensors"):
        found = predict_folder(adapter, folder, checkpoint=out / "backbone.safetensors")
        rows = dict(zip(map(found.name, found.images), found.probabilities, strict=True))
        seen = tempered(expected, found.adapter.temperature)
        np.testing.assert_allclose([rows[name] for name in names], seen, atol=1e-6)


def test_an_adapter_without_windows_and_background_is_taken_as_one_of_a_study_without(run: Path) -> None:
    path = run / "adapter.safetensors"
    with safetensors.safe_open(str(path), "np") as file:
        metadata = dict(file.metadata())
    tensors = safetensors.numpy.load_file(path)
    older = {name: text for name, text in metadata.items() if name not in ("windows", "background")}
    assert len(older) == len(metadata) - 2
    path.write_bytes(safetensors.numpy.save(tensors, older))
    found = load_adapter(path)
    assert (found.windows, found.background) == ((), "black")
    for damage in ({"windows": "5"}, {"windows": "[{}]"}, {"background": "blue"}):
        path.write_bytes(safetensors.numpy.save(tensors, metadata | damage))
        with pytest.raises(AdapterFileError, match="no adapter file"):
            load_adapter(path)


def test_pictures_above_most_pixels_are_unreadable(run: Path, images: Path, secfacmic: Run) -> None:
    command = ["predict", "--adapter", run / "adapter.safetensors", "--images", images / "ash" / CLASSES[0]]
    command += ["--checkpoint", run / "backbone.safetensors"]
    assert secfacmic(*command, "--most-pixels", 32 * 32).returncode == 0
    code, _, errors = secfacmic(*command, "--most-pixels", 32 * 32 - 1)
    assert code == UnreadableImageError.exit_code
    assert "expected at most 1,023" in " ".join(errors.split())


# --- what the file needs ---


def _with_method(agreed: AgreedStudy, **method: Any) -> AgreedStudy:
    return replace(agreed, study=agreed.study.model_copy(update={"method": Method(**method)}))


def test_batch_norm_predicts_with_its_sites_statistics_and_not_without(finished_run: Path, tmp_path: Path) -> None:
    agreed = _with_method(load_study(finished_run / "study.toml"), adapter="facmic", norm="batch")
    rng = np.random.default_rng(0)
    dim = agreed.initial.prompt_features.shape[1]
    own, x = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in rng.normal(size=(2, 30, dim)))
    own, x = own.astype(np.float32), x.astype(np.float32)
    parameters = {name: value + 0.1 * rng.normal(size=value.shape) for name, value in agreed.initial.adapter.items()}
    save_adapter(tmp_path / "adapter.safetensors", agreed, parameters)
    with pytest.raises(AdapterFileError, match=r"statistics.*calibration\.safetensors"):
        load_adapter(tmp_path / "adapter.safetensors").predict(x)
    adapter = build_adapter(agreed.study.method, agreed.initial.prompt_features, agreed.initial.logit_scale, parameters)
    adapter.set_statistics(torch.from_numpy(own))
    save_calibration(tmp_path / CALIBRATION, parameters, Calibration(None, 0, adapter.statistics()))
    found = load_adapter(tmp_path / "adapter.safetensors").predict(x)
    np.testing.assert_allclose(found, predict(agreed, parameters, x, own), atol=1e-6)
    assert not np.allclose(found, predict(agreed, parameters, x, x), atol=1e-3)


def test_the_private_head_of_the_site_takes_part_beside_its_adapter(finished_run: Path, tmp_path: Path) -> None:
    agreed = _with_method(load_study(finished_run / "study.toml"), adapter="text_head", private_head=True)
    rng = np.random.default_rng(0)
    prompts = agreed.initial.prompt_features
    parameters = {"offsets": 0.1 * rng.normal(size=prompts.shape)}
    head = 0.1 * rng.normal(size=prompts.shape)
    x = rng.normal(size=(9, prompts.shape[1])).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    path = tmp_path / "adapter.safetensors"
    save_adapter(path, agreed, parameters)
    shared = load_adapter(path).predict(x)
    save_calibration(tmp_path / CALIBRATION, parameters, Calibration(2.0, 5, head=head))
    found = load_adapter(path).predict(x)
    np.testing.assert_allclose(shared, predict(agreed, parameters, x, None), atol=1e-6)
    expected = tempered(predict(agreed, {**parameters, PRIVATE_HEAD: head}, x, None), 2.0)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert set(safetensors.numpy.load_file(path)) == {"adapter.offsets", "prompt_features", "logit_scale"}


def test_a_calibration_of_another_adapter_is_passed_over(run: Path) -> None:
    file = load_adapter(run / "adapter.safetensors")
    other = {name: value + 1 for name, value in file.initial.adapter.items()}
    save_calibration(run / CALIBRATION, other, Calibration(7.0, 3))
    assert load_adapter(run / "adapter.safetensors").calibration is None
    save_calibration(run / CALIBRATION, file.initial.adapter, Calibration(7.0, 3))
    assert load_adapter(run / "adapter.safetensors").temperature == 7


def test_damaged_adapters_are_refused(run: Path) -> None:
    path = run / "adapter.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    with pytest.raises(AdapterFileError, match="no adapter file"):
        load_adapter(run / "absent.safetensors")
    for damaged in (bytes(data[:500]), b"", (run / "backbone.safetensors").read_bytes()):
        path.write_bytes(damaged)
        with pytest.raises(AdapterFileError, match="no adapter file"):
            load_adapter(path)
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    start = header["adapter.first_bias"]["data_offsets"][0]
    data[8 + length + start] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(AdapterFileError, match="damaged"):
        load_adapter(path)


# --- the command ---


def test_csv_and_json_say_the_same_and_unreadable_images_are_named(run: Path, images: Path, secfacmic: Run) -> None:
    folder = run / "images"
    shutil.copytree(images / "ash" / CLASSES[0], folder)
    (folder / "broken.png").write_bytes(b"\x89PNG and no more")
    (folder / "manifest.csv").write_text("path,patient,label\n")
    command = ["predict", "--adapter", run / "adapter.safetensors", "--images", folder]
    command += ["--checkpoint", run / "backbone.safetensors", "--study", run / "study.toml"]
    code, out, errors = secfacmic(*command, "--out", run / "p.csv")
    assert (code, out) == (UnreadableImageError.exit_code, "")
    assert "1 of 11 images" in errors
    assert "broken.png: " in errors
    assert not (run / "p.csv").exists()
    code, out, errors = secfacmic(*command, "--skip-unreadable")
    assert code == 0
    assert "left out: broken.png" in errors
    rows = list(csv.DictReader(io.StringIO(out)))
    code, out, _ = secfacmic(*command, "--skip-unreadable", "--json", "--out", run / "p.json", "--format", "json")
    document = json.loads(out)
    assert json.loads((run / "p.json").read_text()) == document
    assert list(document["unreadable"]) == ["broken.png"]
    assert document["calibrated"] is True
    assert document["classes"] == list(CLASSES)
    assert (
        [row["image"] for row in rows]
        == [entry["image"] for entry in document["images"]]
        == sorted(path.name for path in (images / "ash" / CLASSES[0]).iterdir())
    )
    for row, entry in zip(rows, document["images"], strict=True):
        assert sum(entry["probabilities"].values()) == pytest.approx(1)
        assert row["prediction"] == entry["prediction"] == max(CLASSES, key=entry["probabilities"].__getitem__)
        for name in CLASSES:
            assert float(row[f"probability of {name}"]) == pytest.approx(entry["probabilities"][name], abs=1e-6)


def test_without_calibration_it_is_said(run: Path, images: Path, secfacmic: Run) -> None:
    (run / CALIBRATION).unlink()
    command = ["predict", "--adapter", run / "adapter.safetensors", "--images", images / "ash" / CLASSES[1], "--json"]
    code, out, errors = secfacmic(*command, "--checkpoint", run / "backbone.safetensors")
    assert code == 0
    assert (json.loads(out)["calibrated"], json.loads(out)["temperature"]) == (False, 1)
    assert "not calibrated" in errors


def test_wrong_studies_and_folders_are_refused(run: Path, federation: Federation) -> None:
    adapter, weights = run / "adapter.safetensors", run / "backbone.safetensors"
    (run / "empty").mkdir()
    for folder in (run / "absent", run / "empty"):
        with pytest.raises(DataError):
            predict_folder(adapter, folder, checkpoint=weights)
    other = federation.folder / "study.toml"
    if load_study(other).study.id != load_adapter(adapter).study:
        with pytest.raises(AdapterFileError, match="of study"):
            predict_folder(adapter, run, other, weights)
    else:
        pytest.fail("both federations made their own keys, so that their ids differ")


# --- patients ---


def slice_of(patient: str, study: str, number: int, value: int, **fields: Any) -> Dataset:
    pixels = np.full((32, 32), value, dtype=np.uint16) + np.arange(32, dtype=np.uint16)
    ids = {"StudyInstanceUID": study, "SeriesInstanceUID": f"{study}.1", "InstanceNumber": number}
    return dicom(pixels, PatientID=patient, WindowCenter=128, WindowWidth=256, **(ids | fields))


@pytest.fixture
def ward(run: Path) -> Path:
    """Two patients as DICOM, one picture of a third by the manifest, one of nobody, and what is no image."""
    folder = run / "ward"
    folder.mkdir()
    for number, value in enumerate((20, 120, 200)):
        (folder / f"a{number}.dcm").write_bytes(as_bytes(slice_of("A-1", "1.2.3", number, value)))
    (folder / "b.dcm").write_bytes(as_bytes(slice_of("Müller", "1.2.4", 1, 210, SpecificCharacterSet="ISO_IR 192")))
    for name in ("known.png", "nobody.png"):
        Image.new("L", (32, 32), 180).save(folder / name)
    (folder / "manifest.csv").write_text("path,patient,label\nknown.png,C-7,\n")
    (folder / "letter.pdf").write_bytes(b"%PDF-1.7 dear colleague")
    (folder / "report.dcm").write_bytes(as_bytes(slice_of("A-1", "1.2.3", 9, 5, Modality="SR")))
    return folder


def test_a_patients_row_is_the_mean_of_its_images_and_names_no_others(run: Path, ward: Path, secfacmic: Run) -> None:
    command = ["predict", "--adapter", run / "adapter.safetensors", "--images", ward]
    command += ["--checkpoint", run / "backbone.safetensors"]
    code, out, errors = secfacmic(*command)
    assert code == 0, errors
    rows = list(csv.DictReader(io.StringIO(out)))
    images, patients = [row for row in rows if row["image"]], [row for row in rows if not row["image"]]
    assert {(row["image"], row["patient"]) for row in images} == {
        *(("a0.dcm", "A-1"), ("a1.dcm", "A-1"), ("a2.dcm", "A-1")),
        *(("b.dcm", "Müller"), ("known.png", "C-7"), ("nobody.png", "")),
    }
    assert [(row["patient"], row["images"]) for row in patients] == [("A-1", "3"), ("C-7", "1"), ("Müller", "1")]
    for name in CLASSES:
        own = [float(row[f"probability of {name}"]) for row in images if row["patient"] == "A-1"]
        assert float(patients[0][f"probability of {name}"]) == pytest.approx(np.mean(own), abs=1e-5)
    assert "passed over: letter.pdf: no image" in errors
    assert "passed over: report.dcm: a structured report" in errors
    assert "1 images are of nobody known" in errors
    document = json.loads(secfacmic(*command, "--json")[1])
    assert set(document["passed_over"]) == {"letter.pdf", "report.dcm"}
    assert [(entry["patient"], entry["images"]) for entry in document["patients"]] == [
        *(("A-1", 3), ("C-7", 1), ("Müller", 1))
    ]
    assert document["per_patient"] == "mean"


def test_the_studys_rule_for_patients_travels_with_the_adapter(run: Path, federation: Federation) -> None:
    agreed = federation.agreed
    study = agreed.study.model_copy(update={"per_patient": "largest"})
    changed = replace(agreed, study=study)
    save_adapter(run / "other.safetensors", changed, agreed.initial.adapter)
    assert load_adapter(run / "other.safetensors").per_patient == "largest"
    rows = np.array([[0.9, 0.1, 0.0], [0.2, 0.2, 0.6]])
    assert of_patient(rows, "mean").tolist() == pytest.approx([0.55, 0.15, 0.3])
    assert of_patient(rows, "largest").tolist() == pytest.approx([0.9 / 1.7, 0.2 / 1.7, 0.6 / 1.7])


@pytest.mark.parametrize(
    "manifest",
    [
        "path,patient,patient\nknown.png,C-7,C-8\n",
        "path,patient\nknown.png,C-7,and more\n",
        "path,patient\nknown.png,C-7\n./known.png,C-8\n",
        "path,Patient ID\nknown.png,C-7\n",
    ],
)
def test_a_manifest_that_leaves_a_patient_uncertain_is_refused(run: Path, ward: Path, manifest: str) -> None:
    (ward / "manifest.csv").write_bytes(manifest.encode("latin-1"))
    with pytest.raises(ManifestError):
        predict_folder(run / "adapter.safetensors", ward, checkpoint=run / "backbone.safetensors")


def test_a_manifests_ids_are_taken_in_the_form_in_which_training_takes_them(run: Path, ward: Path) -> None:
    marks = "path,patient\nknown.png,\ufeff A-1\nnobody.png,Mu\u0308ller \n"
    (ward / "manifest.csv").write_text(marks, encoding="utf-8")
    found = predict_folder(run / "adapter.safetensors", ward, checkpoint=run / "backbone.safetensors")
    assert {found.name(image): image.patient for image in found.images} == {
        **dict.fromkeys(("a0.dcm", "a1.dcm", "a2.dcm", "known.png"), "A-1"),
        **dict.fromkeys(("b.dcm", "nobody.png"), "M\u00fcller"),
    }


def owners(found: Any) -> dict[tuple[str, int | None], str]:
    return {(found.name(image), image.frame): image.patient for image in found.images}


def test_manifest_and_settled_ids_say_what_they_say_in_training(run: Path, ward: Path) -> None:
    (ward / "sub").mkdir()
    (ward / "known.png").rename(ward / "sub" / "kno\u0308wn.png")
    frames = np.full((4, 32, 32), 90, dtype=np.uint16)
    (ward / "many.dcm").write_bytes(as_bytes(dicom(frames, PatientID="D 1")))
    rows = ["sub\\kn\u00f6wn.png;C-7;", "./nobody.png;A-2;", "many.dcm;;1", "many.dcm;;3"]
    (ward / "manifest.csv").write_text("\n".join(["path;patient;slice", *rows]), encoding="utf-8")
    (ward / "patients.csv").write_text("id,same_as\nA-2,A-1\nC-7,\n")
    command = [run / "adapter.safetensors", ward]
    found = predict_folder(*command, checkpoint=run / "backbone.safetensors")
    told = owners(found)
    assert told["sub/kno\u0308wn.png", None] == "C-7"
    assert told["nobody.png", None] == "A-1"
    assert {key: owner for key, owner in told.items() if key[0] == "many.dcm"} == {
        ("many.dcm", 1): "D 1",
        ("many.dcm", 3): "D 1",
    }
    assert "separated by semicolons" in " ".join(found.told)
    rows = list(csv.DictReader(io.StringIO(found.csv())))
    assert [row["frame"] for row in rows if row["image"] == "many.dcm"] == ["1", "3"]
    frames_told = [entry["frame"] for entry in found.document()["images"] if entry["image"] == "many.dcm"]
    assert frames_told == [1, 3]
    (ward / "manifest.csv").write_text("path,patient\ngone.png,C-7\n")
    with pytest.raises(ManifestError, match=r"line 2: path 'gone.png': no such file"):
        predict_folder(*command, checkpoint=run / "backbone.safetensors")


def test_what_is_no_adapter_is_told_in_words(run: Path, secfacmic: Run) -> None:
    for named, says in ((run, "(a folder)"), (run / "backbone.safetensors", "(it lacks ")):
        ended = secfacmic("predict", "--adapter", named, "--images", run)
        assert ended.returncode == AdapterFileError.exit_code
        assert f"{named}: no adapter file {says}" in ended.stderr
        assert "Error" not in ended.stderr


def test_slices_and_scouts_are_chosen_as_in_training(run: Path, ward: Path, secfacmic: Run) -> None:
    scout = slice_of("A-1", "1.2.9", 1, 5, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    (ward / "scout.dcm").write_bytes(as_bytes(scout))
    command = ["predict", "--adapter", run / "adapter.safetensors", "--images", ward]
    command += ["--checkpoint", run / "backbone.safetensors", "--slices", "middle", "--leave-out", "scout"]
    code, out, errors = secfacmic(*command)
    assert code == 0, errors
    images = [row["image"] for row in csv.DictReader(io.StringIO(out)) if row["image"]]
    assert images == ["a1.dcm", "b.dcm", "known.png", "nobody.png"]
    assert "left out: 1 of kind scout" in errors
    assert "left out: 2 of kind other slice" in errors
    assert secfacmic(*command[:-3], "often")[0] == 2


def test_structured_reports_are_read_back_as_they_were_predicted(run: Path, ward: Path, secfacmic: Run) -> None:
    command = ["predict", "--adapter", run / "adapter.safetensors", "--images", ward, "--json"]
    command += ["--checkpoint", run / "backbone.safetensors"]
    code, out, errors = secfacmic(*command, "--dicom-sr", run / "reports")
    assert code == 0, errors
    assert "2 structured reports" in errors
    assert "no report for 1 patients" in errors
    reports = {str(report.PatientID): report for report in map(srread, (run / "reports").iterdir())}
    assert set(reports) == {"A-1", "Müller"}
    sent = {
        str(one.SOPInstanceUID): str(one.PatientID)
        for one in (pydicom.dcmread(path) for path in ward.glob("[ab]*.dcm"))
    }
    for entry in json.loads(out)["patients"]:
        if entry["patient"] == "C-7":
            continue
        report = reports[entry["patient"]]
        assert report.StudyInstanceUID == {"A-1": "1.2.3", "Müller": "1.2.4"}[entry["patient"]]
        assert (report.CompletionFlag, report.VerificationFlag) == ("COMPLETE", "UNVERIFIED")
        (group,) = report.content.get_image_measurement_groups()
        told = {measurement.name.meaning: measurement.value for measurement in group.get_measurements()}
        assert told == {
            f"Probability of {name}": pytest.approx(value, abs=1e-6) for name, value in entry["probabilities"].items()
        }
        (evaluation,) = group.get_qualitative_evaluations()
        assert evaluation.value.meaning == entry["prediction"]
        pointed = {image.referenced_sop_instance_uid for image in group.source_images}
        assert pointed == {uid for uid, patient in sent.items() if patient == entry["patient"]}
    assert all(path.stat().st_mode & 0o077 == 0 for path in (run / "reports").iterdir())


def test_reports_that_a_full_disk_cut_short_are_completed_and_no_patient_gets_two(
    run: Path, ward: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = predict_folder(run / "adapter.safetensors", ward, checkpoint=run / "backbone.safetensors")
    folder, true = run / "reports", os.replace

    def full(source: str, target: Path) -> None:
        if any(folder.glob("*.dcm")):
            raise OSError(errno.ENOSPC, "No space left on device")
        true(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        with pytest.raises(StorageError):
            write_reports(found, folder)
    (first,) = folder.iterdir()
    content = first.read_bytes()
    for _ in range(2):
        assert write_reports(found, folder)[0] == 2
        assert sorted(srread(path).PatientID for path in folder.iterdir()) == ["A-1", "Müller"]
    assert first.read_bytes() == content  # one UID, one content
    other = replace(found, probabilities=np.roll(found.probabilities, 1, axis=1))
    write_reports(other, folder)
    assert len(list(folder.iterdir())) == 4  # which say something else


def test_reports_that_have_no_folder_are_refused_before_any_image_is_encoded(
    run: Path, ward: Path, secfacmic: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("secure_fed.operate.predict.encode_all", lambda *_, **__: pytest.fail("encoded"))
    said = ("predict", "--adapter", run / "adapter.safetensors", "--checkpoint", run / "backbone.safetensors")
    result = secfacmic(*said, "--images", ward, "--dicom-sr", ward / "known.png", "--out", run / "found.csv")
    assert (result.returncode, (run / "found.csv").exists()) == (60, False)
    assert "known.png: the folder cannot be made" in result.stderr


def test_a_report_warns_of_strangers_and_there_is_none_of_a_patient_who_is_one(run: Path, ward: Path) -> None:
    said = predict_folder(run / "adapter.safetensors", ward, checkpoint=run / "backbone.safetensors")
    images = said.patients()["A-1"][0]
    assert len(images) > 1
    strangers = np.zeros(len(said.images), dtype=bool)
    strangers[[images[0], *said.patients()["Müller"][0]]] = True
    sets = np.ones_like(said.probabilities, dtype=bool)
    found = replace(said, cases=Cases(sets, strangers, 20.0))
    assert write_reports(found, run / "reports") == (1, 1, [], 1)
    (report,) = map(srread, (run / "reports").iterdir())
    assert report.PatientID == "A-1"
    texts = [element.value for element in report.iterall() if element.keyword == "TextValue"]
    assert f"1 of {len(images)} images are like none of the study's" in texts
    flags = {row["patient"]: row["stranger"] for row in csv.DictReader(io.StringIO(found.csv())) if not row["image"]}
    assert flags == {"A-1": "some", "Müller": "yes", "C-7": "no"}
    counted = {entry["patient"]: entry["strangers"] for entry in found.document()["patients"]}
    assert counted == {"A-1": 1, "Müller": len(said.patients()["Müller"][0]), "C-7": 0}


def test_that_nobody_can_tell_strangers_is_no_word_that_there_are_none(run: Path, ward: Path) -> None:
    said = predict_folder(run / "adapter.safetensors", ward, checkpoint=run / "backbone.safetensors")
    found = replace(said, cases=Cases(np.ones_like(said.probabilities, dtype=bool), None, 12.0))
    document = found.document()
    assert {entry["stranger"] for entry in document["images"]} == {None}
    assert {entry["strangers"] for entry in document["patients"]} == {None}
    assert {row["stranger"] for row in csv.DictReader(io.StringIO(found.csv()))} == {""}
    assert write_reports(found, run / "reports")[3] == 0
    page = case_page(Explained(found, "", ()))
    assert "No image is told to be a stranger" in page


def test_doubts_are_told_and_no_report_is_of_an_id_that_may_be_several_persons(
    run: Path, ward: Path, secfacmic: Run
) -> None:
    files = (
        ("x1", "ANONYMOUS", "1.2.5", {"PatientName": "X^Y"}),
        ("x2", "ANONYMOUS", "1.2.6", {"PatientName": "Y^X"}),
        ("i1", "12", "1.2.7", {"IssuerOfPatientID": "H1"}),
        ("i2", "12", "1.2.8", {"IssuerOfPatientID": "H2"}),
        ("h1", "X1", "1.2.9", {}),
        ("h2", "X2", "1.2.10", {}),
    )
    for value, (name, patient, study, fields) in enumerate(files, 90):
        (ward / f"{name}.dcm").write_bytes(as_bytes(slice_of(patient, study, 1, value, **fields)))
    (ward / "manifest.csv").write_text("path,patient\nknown.png,C-7\nh1.dcm,p9\nh2.dcm,p9\n")
    command = ["predict", "--adapter", run / "adapter.safetensors", "--images", ward, "--json"]
    command += ["--checkpoint", run / "backbone.safetensors", "--dicom-sr", run / "reports"]
    code, out, errors = secfacmic(*command)
    assert code == 0, errors
    doubts = [("header", ["p9"]), ("issuers", ["12"]), ("placeholder", ["ANONYMOUS"])]
    assert [(doubt["kind"], doubt["ids"]) for doubt in json.loads(out)["doubts"]] == doubts
    assert "doubt: 'ANONYMOUS' (2 images) is a placeholder and may stand for many patients: mend it" in errors
    assert "2 structured reports" in errors
    assert "no report for 3 ids that may be several persons: '12', 'ANONYMOUS', 'p9'; mend the ids" in errors
    assert {srread(path).PatientID for path in (run / "reports").iterdir()} == {"A-1", "Müller"}
    (ward / "patients.csv").write_text("id,same_as\np9,\nANONYMOUS,\n12,\n")
    code, out, errors = secfacmic(*command)
    assert (code, json.loads(out)["doubts"]) == (0, [])
    assert "5 structured reports" in errors


def test_one_picture_of_several_patients_is_told(run: Path, tmp_path: Path, secfacmic: Run) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    rows = (("a", "A-7", 90), ("b", "B-8", 90), ("c", "C-9", 91), ("nobodys", "", 91))
    for number, (name, patient, value) in enumerate(rows):
        (folder / f"{name}.dcm").write_bytes(as_bytes(slice_of(patient, f"1.2.5.{number}", 1, value)))
    command = ["predict", "--adapter", run / "adapter.safetensors", "--images", folder, "--json"]
    command += ["--checkpoint", run / "backbone.safetensors"]
    code, out, errors = secfacmic(*command)
    assert code == 0, errors
    assert [(doubt["kind"], doubt["ids"]) for doubt in json.loads(out)["doubts"]] == [("picture", ["A-7", "B-8"])]
    assert "doubt: 'A-7', 'B-8' (2 images) have one picture: " in errors
    (folder / "patients.csv").write_text("id,same_as\nB-8,\n")
    code, out, errors = secfacmic(*command)
    assert (code, json.loads(out)["doubts"]) == (0, [])


def test_a_report_leaves_out_what_a_header_says_in_no_form_of_the_standards(run: Path) -> None:
    adapter = load_adapter(run / "adapter.safetensors")
    row = np.full(len(adapter.classes), 1 / len(adapter.classes))
    path = run / "dirty.dcm"
    content = as_bytes(
        slice_of("A-1", "1.2.3", 1, 9, PatientSex="W", PatientName="A^B", StudyDate="20200101", StudyTime="101500")
    )
    for key, dirty in (
        *((b"StudyDate", b"2020-1-1"), (b"StudyTime", b"10 h 5"), (b"StudyTime", b"99 ".ljust(6))),
        *((b"PatientSex", b"W "), (b"PatientSex", b"m "), (b"PatientName", b"A\\B ")),
    ):
        clean = {b"StudyDate": b"20200101", b"StudyTime": b"101500", b"PatientSex": b"W ", b"PatientName": b"A^B "}[key]
        assert content.count(clean) == 1
        path.write_bytes(content.replace(clean, dirty))
        report = report_on("A-1", [path], row, adapter, True)
        assert report is not None
        report.save_as(io.BytesIO())
        found = str(report.get(key.decode()) or "")
        assert found == ("A B" if key == b"PatientName" else "")
    # Of a private class, with no identifier, or of an id that would be read as two: none, and no error.
    private = {"SOPClassUID": "1.3.46.670589.11.0.0.12.2"}
    for patient, fields in (
        *(("A-1", private), ("A-1", {"StudyInstanceUID": "1.2.abc"}), ("A-1", {"SOPInstanceUID": "1." + "2" * 70})),
        *(("A-1", {"StudyInstanceUID": ["1.2.3", "1.2.4"]}), ("A\\1", {}), ("A" * 65, {})),
    ):
        path.write_bytes(as_bytes(slice_of("A-1", "1.2.3", 1, 9, **fields)))
        assert report_on(patient, [path], row, adapter, True) is None
    (run / "private.dcm").write_bytes(as_bytes(slice_of("A-1", "1.2.3", 1, 9, **private)))
    path.write_bytes(as_bytes(slice_of("A-1", "1.2.3", 1, 9)))
    both = report_on("A-1", [run / "private.dcm", path], row, adapter, True)
    assert both is not None
    both.save_as(run / "report.dcm")
    (group,) = srread(run / "report.dcm").content.get_image_measurement_groups()
    assert len(group.source_images) == 2
    path.write_bytes(content.replace(b"W ", b"F "))
    kept = report_on("A-1", [path], row, adapter, True)
    assert kept is not None
    assert (kept.PatientSex, str(kept.PatientName), kept.StudyDate) == ("F", "A^B", "20200101")

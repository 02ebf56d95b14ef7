"""What leaves with an export, what stays, and ONNX that computes what torch does."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import safetensors
import safetensors.numpy
import torch
import yaml
from huggingface_hub import ModelCard

from secure_fed.clients.site import Site
from secure_fed.clients.sitefile import read_site_file
from secure_fed.core.errors import AdapterFileError, BudgetError, OnnxError, OutputError
from secure_fed.core.tomlfile import parse_table
from secure_fed.lab.simulation import Budget, simulate
from secure_fed.model import onnx_export
from secure_fed.model.adapter_file import AdapterFile, Calibration, load_adapter
from secure_fed.model.adapters import build_adapter, initial_parameters
from secure_fed.model.backbone import load_backbone
from secure_fed.model.onnx_export import write_onnx
from secure_fed.operate.export import export_run, export_site
from secure_fed.operate.predict import predict_folder
from secure_fed.privacy.ledger import Ledger
from secure_fed.protocol.initial_state import InitialState
from secure_fed.protocol.study import Template
from secure_fed.protocol.study_tables import Backbone, Method
from tests.conftest import CLASSES, OBSERVER, TRAINING, Federation, make_template, run_round, template_table

torch.set_num_threads(1)

SHARED = {"prompt_features", "logit_scale"} | {
    f"adapter.{name}"
    for name in ("first_weight", "first_bias", "norm_weight", "norm_bias", "second_weight", "second_bias")
}
METADATA = {"study", "backbone", "classes", "prompts", "method", "per_patient", "adapter_digest", "model_card"}
METADATA |= {"windows", "background", "concepts", "without_finding"}
FIGURE = re.compile(r"\| (federated|zero-shot), |Temperature \d|validation images, ?is in")


def metadata_of(path: Path) -> dict[str, str]:
    with safetensors.safe_open(str(path), "np") as file:
        return dict(file.metadata())


@pytest.fixture
def trained(federation: Federation) -> Federation:
    """A federation whose sites have applied one round."""
    sites = federation.sites()
    coordinator = federation.begin(sites)
    run_round(coordinator, sites)
    for site in sites:
        site.respond(coordinator.request(site.name, site.run, site.position))
    return federation


def site_toml(federation: Federation, name: str, **changes: str) -> Path:
    """The site's file with some text replaced."""
    path = federation.folder / "sites" / name / "site.toml"
    text = path.read_text()
    for before, after in changes.items():
        assert before in text
        text = text.replace(before, after)
    path.write_text(text)
    return path


def of_patients(federation: Federation, name: str, more: str = "") -> Path:
    path = site_toml(federation, name, simulated="patients")
    path.write_text(path.read_text() + more)
    return path


# --- a simulation ---


def test_a_run_is_exported_whole_with_its_card(finished_run: Path, images: Path, tmp_path: Path) -> None:
    summary = json.loads((finished_run / "summary.json").read_text())
    export_run(finished_run, tmp_path / "e", onnx=False)
    assert {path.name for path in (tmp_path / "e").iterdir()} == {"adapter.safetensors", "README.md"}
    metadata = metadata_of(tmp_path / "e/adapter.safetensors")
    assert set(metadata) == METADATA
    card = (tmp_path / "e/README.md").read_text()
    assert metadata["model_card"] == card
    for text in (
        *(summary["study_id"], summary["backbone"]["digest"], summary["adapter_digest"], "after round 3 of 3"),
        *("3, each the sum of 3 sites' updates", "ask its publisher", "No site trained under differential privacy"),
        *(*TRAINING, f"{OBSERVER} (observer)", *CLASSES, "a picture that is striped", "no medical", "seeded random"),
    ):
        assert text in card
    held_out = summary["metrics"]["federated"]["held_out"]
    low, high = held_out["intervals"]["balanced_accuracy"]
    assert f"| federated, held out | {held_out['balanced_accuracy']:.3f} ({low:.3f} to {high:.3f}) |" in card
    weights = finished_run / "backbone.safetensors"
    before = predict_folder(finished_run / "adapter.safetensors", images / "ash" / CLASSES[0], checkpoint=weights)
    after = predict_folder(tmp_path / "e/adapter.safetensors", images / "ash" / CLASSES[0], checkpoint=weights)
    assert np.array_equal(before.probabilities, after.probabilities)
    assert after.adapter.temperature != 1


def test_a_card_has_the_head_and_the_sections_of_the_hub(finished_run: Path, tmp_path: Path) -> None:
    export_run(finished_run, tmp_path / "e", onnx=False)
    _, head, text = (tmp_path / "e/README.md").read_text().split("---\n", 2)
    facts = yaml.safe_load(head)
    assert facts["pipeline_tag"] == "image-classification"
    assert facts["library_name"] == "secfacmic"
    assert {"federated-learning", "facmic"} <= set(facts["tags"])
    assert "license" not in facts  # nobody has chosen one
    card = ModelCard.load(tmp_path / "e/README.md", ignore_metadata_errors=False)
    assert card.data.to_dict() == facts
    assert card.text.strip() == text.strip()
    sections = re.findall(r"^## (.+)$", text, flags=re.MULTILINE)
    assert sections == [
        *("Model Details", "Uses", "Bias, Risks, and Limitations", "How to Get Started with the Model"),
        *("Training Details", "Evaluation"),
    ]


def test_nothing_is_written_over_an_export_or_from_an_unfinished_run(finished_run: Path, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(OutputError, match="README"):
        export_run(finished_run, tmp_path, onnx=False)
    assert (tmp_path / "README.md").read_text() == "mine"
    with pytest.raises(AdapterFileError, match="finished run"):
        export_run(tmp_path, tmp_path / "e", onnx=False)
    assert not (tmp_path / "e").exists()


def test_a_folder_with_patients_data_is_no_simulation(finished_run: Path, tmp_path: Path) -> None:
    shutil.copytree(finished_run, tmp_path / "out")
    of_patients(Federation(tmp_path / "out"), "birch")
    with pytest.raises(AdapterFileError, match="patients' data"):
        export_run(tmp_path / "out", tmp_path / "e", onnx=False)


# --- a site ---


def test_nothing_made_of_a_sites_patients_leaves_with_the_adapter(trained: Federation, tmp_path: Path) -> None:
    cards, files = [], []
    for name in ("ash", "birch"):
        export_site(of_patients(trained, name), tmp_path / name, onnx=False, own_results=False)
        path = tmp_path / name / "adapter.safetensors"
        tensors, metadata = safetensors.numpy.load_file(path), metadata_of(path)
        assert set(tensors) == SHARED
        assert set(metadata) == METADATA
        cards.append(metadata.pop("model_card").replace(f"Site {name}", "Site X"))
        files.append((safetensors.numpy.save(tensors), metadata))
    # Two sites hold different images. If anything of them were in it, the two would differ.
    assert cards[0] == cards[1]
    assert files[0] == files[1]
    assert not FIGURE.search(cards[0])
    assert "after round 1 of 3" in cards[0]
    assert "patients" in cards[0]
    assert "No metrics of single sites" in cards[0]
    assert "did not train under differential privacy" in cards[0]


def test_own_results_go_in_when_the_site_asks(trained: Federation, tmp_path: Path) -> None:
    path = of_patients(trained, "ash")
    export_site(path, tmp_path / "e", onnx=False, own_results=True)
    card = (tmp_path / "e/README.md").read_text()
    own = load_adapter(tmp_path / "e/adapter.safetensors").calibration
    assert own is not None
    assert own.temperature is not None
    assert f"Temperature {own.temperature:.4f}" in card
    site = Site.open(path)
    assert f"| federated, ash | {site.evaluate(site.parameters)['balanced_accuracy']:.3f}" in card


def test_public_data_need_not_be_asked_for(trained: Federation, tmp_path: Path) -> None:
    export_site(trained.folder / "sites/ash/site.toml", tmp_path / "e", onnx=False, own_results=False)
    assert FIGURE.search((tmp_path / "e/README.md").read_text())
    assert load_adapter(tmp_path / "e/adapter.safetensors").temperature != 1


def test_a_budget_pays_for_no_results_and_its_claim_is_told(trained: Federation, tmp_path: Path) -> None:
    path = of_patients(trained, "ash", "\n[privacy]\nepsilon = 2.5\ndelta = 1e-6\n")
    with pytest.raises(BudgetError, match="has not paid"):
        export_site(path, tmp_path / "e", onnx=False, own_results=True)
    assert Ledger.exists(Path(read_site_file(path).identity) / "ledger")
    assert not (tmp_path / "e").exists()
    export_site(path, tmp_path / "e", onnx=False, own_results=False)
    card = (tmp_path / "e/README.md").read_text()
    assert "site ash is (2.5, 1e-06)-differentially private" in card
    assert "Declared for the runs so far: epsilon none at delta 1e-06" in card
    assert not FIGURE.search(card)
    assert set(safetensors.numpy.load_file(tmp_path / "e/adapter.safetensors")) == SHARED
    # The adapter's budget is not needed to have been set again: the ledger remembers it.
    path.write_text(path.read_text().split("\n[privacy]")[0])
    with pytest.raises(BudgetError, match="has not paid"):
        export_site(path, tmp_path / "again", onnx=False, own_results=True)


def test_a_site_without_a_round_has_nothing_to_export(federation: Federation, tmp_path: Path) -> None:
    with pytest.raises(AdapterFileError, match="no round"):
        export_site(federation.folder / "sites/ash/site.toml", tmp_path / "e", onnx=False, own_results=False)


@pytest.mark.slow
def test_validation_counts_go_in_if_every_contributor_paid_for_them(images: Path, tmp_path: Path) -> None:
    template = make_template(rounds=1, privacy={"validation_rounds": 1, "n_ref": 15, "steps": 1})
    simulate(template, tmp_path / "out", images, budget=Budget(50.0, 1e-5))
    federation = Federation(tmp_path / "out")
    site = federation.site("ash")
    assert site.replica.state.validation is not None
    path = of_patients(federation, "ash")
    text = path.read_text()  # its ledger is one of simulated data, and stays so: take another site's eyes
    path.write_text(text.replace("patients", "simulated"))
    export_site(path, tmp_path / "e", onnx=False, own_results=False)
    card = (tmp_path / "e/README.md").read_text()
    assert ("paid for by the privacy budgets" in card) == (site.replica.state.validation.images > 0)
    assert card.count("Simulated (simulated data)") == 1
    export_run(tmp_path / "out", tmp_path / "run", onnx=False)
    assert (tmp_path / "run/README.md").read_text().count("differentially private") == len(TRAINING)


# --- ONNX ---

DIM = 48


def adapter_file(method: Method, calibration: Calibration | None = None, **more: Any) -> tuple[AdapterFile, Any]:
    """An adapter with parameters moved away from their start; with its tower, if it needs one."""
    rng = np.random.default_rng(7)
    tower, tokens, dim = None, None, DIM
    if method.adapter == "prompts":
        backbone = load_backbone(Backbone(model="random-small", weights="random", seed=1), more["checkpoint"])
        tokens = backbone.tokenize([f"a {name} image" for name in CLASSES])
        tower, dim = backbone.text_tower(tokens), backbone.dim
    prompts = rng.normal(size=(len(CLASSES), dim)).astype(np.float32)
    prompts /= np.linalg.norm(prompts, axis=1, keepdims=True)
    start = initial_parameters(method, dim, prompts, 3, tower)
    moved = {name: value + 0.3 * rng.normal(size=value.shape) for name, value in start.items()}
    initial = InitialState(moved, prompts, 97.3, tokens)
    backbone_table = Backbone(model="random-small", weights="random", seed=1)
    return AdapterFile("0" * 64, backbone_table, CLASSES, method, initial, calibration), tower


METHODS = {
    "layer norm": Method(adapter="facmic"),
    "batch norm": Method(adapter="facmic", norm="batch"),
    "low_rank": Method(adapter="low_rank", rank=3),
    "text_head": Method(adapter="text_head"),
    "fedclip": Method(adapter="fedclip"),
    "prompts": Method(adapter="prompts", context=4),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name in ("low_rank", "fedclip") else ()) for name in METHODS],
)
def test_onnx_computes_what_torch_does(name: str, tmp_path: Path, finished_run: Path) -> None:
    method = METHODS[name]
    file, tower = adapter_file(method, checkpoint=finished_run / "backbone.safetensors")
    initial, rng = file.initial, np.random.default_rng(1)
    dim = initial.prompt_features.shape[1]
    adapter = build_adapter(method, initial.prompt_features, initial.logit_scale, initial.adapter, tower).eval()
    own = rng.normal(size=(40, dim)).astype(np.float32)
    adapter.set_statistics(torch.from_numpy(own / np.linalg.norm(own, axis=1, keepdims=True)))
    file = replace(file, calibration=Calibration(1.7, 10, adapter.statistics()))
    write_onnx(tmp_path / "a.onnx", file, tower, {"study": file.study})
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx", providers=["CPUExecutionProvider"])
    for count in (1, 9):
        x = rng.normal(size=(count, dim)).astype(np.float32)
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        with torch.inference_mode():
            expected = adapter.logits(torch.from_numpy(x)).double()
        for scale in (1.0, 13.0):  # features come to unit length in the model
            logits, probabilities = session.run(["logits", "probabilities"], {"features": np.float32(scale) * x})
            assert logits.shape == probabilities.shape == (count, len(CLASSES))
            np.testing.assert_allclose(logits / 97.3, expected.numpy() / 97.3, atol=1e-5, rtol=0)
            tempered = torch.softmax(expected / 1.7, dim=1).numpy()
            np.testing.assert_allclose(probabilities, tempered, atol=1e-5, rtol=0)
            np.testing.assert_allclose(probabilities, file.predict(x, tower), atol=1e-5, rtol=0)
    properties = {entry.key: entry.value for entry in onnx.load(tmp_path / "a.onnx").metadata_props}
    assert json.loads(properties["classes"]) == list(CLASSES)


def test_an_onnx_that_computes_something_else_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    true = onnx_export.ReferenceEvaluator

    class Wrong(true):  # type: ignore[valid-type, misc]
        def run(self, *arguments: Any) -> Any:
            logits, probabilities = super().run(*arguments)
            return [logits, probabilities + 2e-5]

    monkeypatch.setattr(onnx_export, "ReferenceEvaluator", Wrong)
    file, _ = adapter_file(METHODS["text_head"])
    with pytest.raises(OnnxError, match="differ"):
        write_onnx(tmp_path / "a.onnx", file, None, {})
    assert not list(tmp_path.iterdir())


def test_onnx_beside_an_export_has_the_card_and_the_temperature(finished_run: Path, tmp_path: Path) -> None:
    written = export_run(finished_run, tmp_path / "e", onnx=True)
    assert [path.name for path in written] == ["adapter.safetensors", "README.md", "adapter.onnx"]
    file = load_adapter(tmp_path / "e/adapter.safetensors")
    model = onnx.load(tmp_path / "e/adapter.onnx")
    onnx.checker.check_model(model, full_check=True)
    properties = {entry.key: entry.value for entry in model.metadata_props}
    assert properties["model_card"] == (tmp_path / "e/README.md").read_text()
    assert (properties["study"], properties["adapter_digest"]) == (file.study, file.digest)
    x = np.random.default_rng(0).normal(size=(5, file.initial.prompt_features.shape[1])).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    session = onnxruntime.InferenceSession(tmp_path / "e/adapter.onnx", providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(["probabilities"], {"features": x})[0], file.predict(x), atol=1e-5)


def test_a_licence_in_the_study_is_in_the_card(finished_run: Path, tmp_path: Path) -> None:
    table = template_table()
    table["backbone"]["licence"] = "CC BY 4.0"
    assert parse_table(table, Template, ValueError, "template").backbone.licence == "CC BY 4.0"  # type: ignore[type-var]
    shutil.copytree(finished_run, tmp_path / "out")
    text = (tmp_path / "out/study.toml").read_text()
    (tmp_path / "out/study.toml").write_text(text.replace("[backbone]\n", '[backbone]\nlicence = "CC BY 4.0"\n'))
    export_run(tmp_path / "out", tmp_path / "e", onnx=False)
    assert "| licence of the backbone | CC BY 4.0 |" in (tmp_path / "e/README.md").read_text()

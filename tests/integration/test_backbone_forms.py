"""A CLIP of each form goes from `backbone add` to the last prediction, and nothing on the way looks for a network."""

from __future__ import annotations

import json
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import tomli_w
import torch
from huggingface_hub.errors import EntryNotFoundError

from secure_fed import configs
from secure_fed.core.errors import BackboneDigestError, BackboneError
from secure_fed.core.tomlfile import parse_table
from secure_fed.lab.simulation import simulate
from secure_fed.model import backbone_store
from secure_fed.model.backbone import load_backbone, make_random_checkpoint
from secure_fed.model.backbone_fetch import add, fetch
from secure_fed.operate.doctor.site import _backbone
from secure_fed.operate.new_study import new_study
from secure_fed.protocol.study import Template, load_study
from secure_fed.protocol.study_tables import Backbone
from tests.conftest import CLASSES, Run, template_table
from tests.network import Network
from tests.unit.model.test_backbone_cli import QUICK, write_forms
from tests.unit.model.test_backbone_forms import bert_folder, clip_folder, gelu_folder, siglip_folder

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every address that anything here, or in a process that it forks, asked for; and a store of this test's own."""
    log = tmp_path / "asked"
    log.touch()

    def spy(*arguments: Any, **_: Any) -> None:
        with log.open("a") as stream:
            stream.write(f"{arguments[-2:]!r}\n")
        raise OSError("no network here")

    monkeypatch.setattr(socket.socket, "connect", spy)
    monkeypatch.setattr(socket.socket, "connect_ex", spy)
    monkeypatch.setattr(socket, "getaddrinfo", spy)
    monkeypatch.setenv(backbone_store.PLACE, str(tmp_path / "store"))
    return [log]


def make_bert(folder: Path) -> None:
    bert_folder(folder)
    (folder / "text").mkdir()
    shutil.copy(folder.parent / "text/config.json", folder / "text/config.json")
    shutil.rmtree(folder.parent / "text")


FORMS: dict[str, Callable[[Path], Any]] = {"clip": clip_folder, "siglip": siglip_folder, "bert": make_bert}
ACTIVATIONS: dict[str, Callable[[Path], Any]] = {"clip-gelu": gelu_folder}
FILES = {"openai": QUICK, "lone": "random-small"}
"""Of forms that are one file, the model that it is of."""


def carry(form: str, place: Path) -> tuple[Path, str, dict[str, Any]]:
    """A backbone of that form as people carry it over, the name to add it under, and what a template says of it."""
    if form in FILES:
        model = FILES[form]
        place.mkdir()
        if model == QUICK:
            config = json.loads((configs.MODELS / "random-small.json").read_text()) | {"quick_gelu": True}
            (place / f"{QUICK}.json").write_text(json.dumps(config))
            open_clip.add_model_config(place / f"{QUICK}.json")
        file = write_forms(place, model, 96)["openai.pt" if form == "openai" else "form.safetensors"]
        return file, model, {"model": model, "weights": "file", "file": file.name}
    (FORMS | ACTIVATIONS)[form](place)
    return place, f"hf-hub:fake/{form}", {"model": f"hf-hub:fake/{form}", "weights": "pretrained"}


PROMPTS = {name: ["the head", "a mass"][number % 2] + " x" * number for number, name in enumerate(CLASSES)}


def table(method: dict[str, Any], backbone: dict[str, Any]) -> dict[str, Any]:
    classes = [{"name": name, "prompts": [PROMPTS[name]]} for name in CLASSES]
    return template_table(rounds=1, method=method, backbone=backbone, classes=classes)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("form", FORMS | ACTIVATIONS | FILES)
def test_from_the_folder_to_the_last_prediction_nobody_is_asked(
    form: str, images: Path, tmp_path: Path, asked: list[Any], secfacmic: Run
) -> None:
    path, name, backbone = carry(form, tmp_path / "carried")
    code, out, errors = secfacmic("backbone", "add", path, "--model", name)
    assert code == 0, errors
    facts = dict(line.split(" = ") for line in out.splitlines() if " = " in line)
    code, out, errors = secfacmic("backbone", "check", path, "--model", name, "--json")
    assert (code, json.loads(out)["id"]) == (0, facts["id"]), errors
    shutil.rmtree(tmp_path / "carried")
    code, out, errors = secfacmic("backbone", "list", "--json")
    assert (code, [one["id"] for one in json.loads(out)["added"]]) == (0, [facts["id"]]), errors
    code, out, errors = secfacmic("backbone", "check", name, "--images", images / "ash", "--json")
    assert code == 0, errors
    report = json.loads(out)
    assert (report["id"], report["digest"]) == (facts["id"], facts["digest"])
    assert 0 <= report["zero_shot"]["correct"]["as it is"] <= 1
    assert report["zero_shot"]["chance"] == pytest.approx(1 / 3)

    content = table({"adapter": "facmic"}, backbone)
    (tmp_path / "t.toml").write_text(tomli_w.dumps(content))
    code, out, errors = secfacmic("study", "new", tmp_path / "t.toml", "--out", tmp_path / "made")
    assert code == 0, errors
    assert "for 1000 images of 512 x 512 pixels, reading them apart; data check measures a site's own files" in out
    assert f'id = "{facts["id"]}"' in (tmp_path / "made/study.toml").read_text()
    template = parse_table(content, Template, ValueError, "template")  # type: ignore[type-var]
    simulate(template, tmp_path / "out", images)
    code, out, errors = secfacmic("data", "check", "--site", tmp_path / "out/sites/ash/site.toml", "--json")
    assert code == 0, errors
    assert json.loads(out)["encoding"]["seconds"] > 0
    code, _, errors = secfacmic("export", "--run", tmp_path / "out", "--out", tmp_path / "handed", "--onnx")
    assert code == 0, errors
    card = next((tmp_path / "handed").glob("*.md")).read_text()
    assert facts["id"] in card
    assert report["activation"] in card
    code, out, errors = secfacmic(
        *("predict", "--adapter", tmp_path / "handed/adapter.safetensors", "--images", images / "ash" / CLASSES[0]),
        "--json",
    )
    assert code == 0, errors
    assert len(json.loads(out)["images"]) == 10
    image = next((images / "ash" / CLASSES[0]).iterdir())
    code, out, errors = secfacmic(
        *("explain-case", "--adapter", tmp_path / "handed/adapter.safetensors", "--image", image),
        *("--out", tmp_path / "cases", "--json"),
    )
    assert code == 0, errors
    assert json.loads(out)["maps"]
    assert asked[0].read_text() == ""


def test_what_is_missing_is_said_without_asking_and_with_the_command_that_fetches_it(
    tmp_path: Path, asked: list[Any], secfacmic: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    bert_folder(tmp_path / "carried")
    code, _, errors = secfacmic("backbone", "add", tmp_path / "carried")
    assert code == 30
    assert "--text" in errors
    assert "hf download" in errors
    assert asked[0].read_text() == ""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the hub's library tries again, later each time
    with pytest.raises(BackboneError, match="secfacmic backbone fetch hf-hub:fake/gone --to DIR"):
        load_backbone(Backbone(model="hf-hub:fake/gone", weights="pretrained"), None)


def test_prompts_train_through_clips_text_tower_and_are_refused_for_the_others(tmp_path: Path) -> None:
    for form, make in (FORMS | ACTIVATIONS).items():
        make(tmp_path / form)
        add(tmp_path / form, f"hf-hub:fake/{form}")
        content = table({"adapter": "prompts", "context": 2}, {"model": f"hf-hub:fake/{form}", "weights": "pretrained"})
        template = parse_table(content, Template, ValueError, "template")  # type: ignore[type-var]
        if form.startswith("clip"):
            new_study(template, [], tmp_path / f"made-{form}")
        else:
            with pytest.raises(BackboneError, match="takes no context vectors"):
                new_study(template, [], tmp_path / f"made-{form}")


def test_a_study_and_doctor_refuse_what_cannot_be_used(tmp_path: Path, images: Path, secfacmic: Run) -> None:
    clip_folder(tmp_path / "clip")
    add(tmp_path / "clip", "hf-hub:fake/clip")
    content = table({"adapter": "facmic"}, {"model": "hf-hub:fake/clip", "weights": "pretrained"})
    template = parse_table(content, Template, ValueError, "template")  # type: ignore[type-var]
    simulate(template, tmp_path / "out", images)
    agreed = load_study(tmp_path / "out/study.toml")
    from secure_fed.clients.sitefile import read_site_file

    file = read_site_file(tmp_path / "out/sites/ash/site.toml")
    assert "id as in the study" in _backbone(file, agreed)
    config = json.loads((tmp_path / "clip/config.json").read_text())
    config["text_config"]["hidden_act"] = "gelu"
    (tmp_path / "clip/config.json").write_text(json.dumps(config))
    with pytest.raises((BackboneDigestError, BackboneError), match="activation"):
        _backbone(file.model_copy(update={"checkpoint": str(tmp_path / "clip")}), agreed)
    make_unequal(tmp_path / "unequal")
    with pytest.raises(BackboneError, match="different widths, images 128 and texts 64"):
        _backbone(file.model_copy(update={"checkpoint": str(tmp_path / "unequal")}), agreed)
    import safetensors.torch

    tensors = safetensors.torch.load_file(tmp_path / "clip/model.safetensors")
    tensors["logit_scale"].fill_(float("nan"))
    safetensors.torch.save_file(tensors, tmp_path / "clip/model.safetensors")
    for refuse in (
        lambda: _backbone(file.model_copy(update={"checkpoint": str(tmp_path / "clip")}), agreed),
        lambda: new_study(template, [], tmp_path / "made", tmp_path / "clip"),
        lambda: add(tmp_path / "clip", None),
    ):
        with pytest.raises(BackboneError, match="not finite"):
            refuse()
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("form", ["clip", "siglip"])
def test_a_repository_in_transformers_form_is_fetched_with_all_that_it_needs(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from open_clip import pretrained

    FORMS[form](tmp_path / "hub")
    (tmp_path / "hub/README.md").write_text("---\nlicense: mit\n---\n")

    def download(repo_id: str, filename: str, cache_dir: Any, **_: Any) -> str:
        assert repo_id == "fake/tiny"
        if not (tmp_path / "hub" / filename).exists():
            raise EntryNotFoundError(filename)
        return str(shutil.copy(tmp_path / "hub" / filename, cache_dir))

    monkeypatch.setattr(pretrained, "hf_hub_download", download)
    folder, fetched = fetch("hf-hub:fake/tiny", tmp_path / "usb")
    shutil.rmtree(tmp_path / "hub")
    kept, _ = add(folder, None)
    loaded = load_backbone(Backbone(model="hf-hub:fake/tiny", weights="pretrained"), None)
    assert loaded.id == fetched.id == kept.name
    assert backbone_store.read_entry(kept).licence == "mit"


def make_unequal(folder: Path) -> None:
    """In open_clip's form, of a text tower without its projection: texts 64 wide, images 128."""
    folder.mkdir()
    config = json.loads((configs.MODELS / "random-small.json").read_text())
    config["text_cfg"]["proj_type"] = "none"
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    network = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    torch.save(network.state_dict(), folder / "open_clip_pytorch_model.bin")


def test_towers_of_different_widths_are_refused_wherever_a_backbone_comes_in(tmp_path: Path) -> None:
    make_unequal(tmp_path / "unequal")
    named = Backbone(model="hf-hub:fake/unequal", weights="pretrained")
    content = table({"adapter": "facmic"}, {"model": named.model, "weights": "pretrained"})
    template = parse_table(content, Template, ValueError, "template")  # type: ignore[type-var]
    for refuse in (
        lambda: add(tmp_path / "unequal", named.model),
        lambda: new_study(template, [], tmp_path / "made", tmp_path / "unequal"),
        lambda: load_backbone(named, tmp_path / "unequal"),
    ):
        with pytest.raises(BackboneError, match="different widths, images 128 and texts 64"):
            refuse()
    assert not (tmp_path / "made").exists()
    assert not list((tmp_path / "store").glob("*"))

    siglip_folder(tmp_path / "siglip")
    config = json.loads((tmp_path / "siglip/config.json").read_text())
    config["text_config"]["projection_size"] = 48
    (tmp_path / "siglip/config.json").write_text(json.dumps(config))
    with pytest.raises(BackboneError, match="different widths, images 32 and texts 48"):
        add(tmp_path / "siglip", None)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("form", [*FORMS, *(pytest.param(one, marks=pytest.mark.slow) for one in ACTIVATIONS | FILES)])
def test_a_client_encodes_its_images_and_calls_nobody_but_its_server(form: str, images: Path, tmp_path: Path) -> None:
    path, name, backbone = carry(form, tmp_path / form)
    add(path, name)
    content = table({"adapter": "facmic"}, backbone)
    template = parse_table(content, Template, ValueError, "template")  # type: ignore[type-var]
    network = Network(tmp_path / "out", template, images)
    for cache in (tmp_path / "out/sites/ash").rglob("features.sqlite*"):
        cache.unlink()
    with socket.create_server(("127.0.0.1", network.port)) as server:
        server.settimeout(120)
        network.start("ash")
        try:
            server.accept()[0].close()
        finally:
            network.processes["ash"].kill()
            network.processes["ash"].wait()
    assert list((tmp_path / "out/sites/ash").rglob("features.sqlite"))
    called = [line for line in network.audit_file.read_text().splitlines() if "socket.bind" not in line]
    assert [line for line in called if "127.0.0.1" not in line and "localhost" not in line] == []


def test_a_lone_checkpoint_file_is_taken_without_asking(tmp_path: Path, asked: list[Any], secfacmic: Run) -> None:
    make_random_checkpoint("random-small", 5, tmp_path / "lone.safetensors")
    code, out, errors = secfacmic("backbone", "add", tmp_path / "lone.safetensors", "--model", "random-small")
    assert code == 0, errors
    facts = dict(line.split(" = ") for line in out.splitlines() if " = " in line)
    lone = {"model": "random-small", "weights": "file", "file": str(tmp_path / "lone.safetensors")}
    content = table({"adapter": "facmic"}, lone)
    (tmp_path / "t.toml").write_text(tomli_w.dumps(content))
    code, _, errors = secfacmic("study", "new", tmp_path / "t.toml", "--out", tmp_path / "made")
    assert code == 0, errors
    assert facts["digest"].strip('"') in (tmp_path / "made/study.toml").read_text()
    assert asked[0].read_text() == ""

"""Weights from the internet or a disk, kept where studies find them, and used from there to the last prediction."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import safetensors.torch
import tomli_w
import torch
from PIL import Image

from secure_fed import configs
from secure_fed.core.errors import BackboneDigestError, BackboneError, OutputError, StudyError
from secure_fed.core.tomlfile import parse_table
from secure_fed.lab.simulation import simulate
from secure_fed.model.backbone import load_backbone, make_random_checkpoint
from secure_fed.model.backbone_fetch import add, fetch
from secure_fed.operate.new_study import new_study
from secure_fed.operate.predict import predict_folder
from secure_fed.protocol.study import Template, read_template
from secure_fed.protocol.study_tables import Backbone
from tests.conftest import CLASSES, Run, make_template, models_as_found, template_table
from tests.unit.model.test_backbone import _Archive

pytestmark = pytest.mark.usefixtures("store")

torch.set_num_threads(1)

QUICK = "random-small-quickgelu"
MEDICAL = {
    "biomedclip": "microsoft/BiomedCLIP",
    "pubmedclip": "flaviagiammarino/pubmed-clip-vit-base-patch32",
    "plip": "vinid/plip",
    "monet": "suinleelab/monet",
    "medsiglip_448": "google/medsiglip-448",
}


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """The same weights as open_clip's PyTorch and safetensors files, and as OpenAI's archive."""
    folder = tmp_path_factory.mktemp("forms")
    config = json.loads((configs.MODELS / "random-small.json").read_text()) | {"quick_gelu": True}
    (folder / f"{QUICK}.json").write_text(json.dumps(config))
    with models_as_found():
        open_clip.add_model_config(folder / f"{QUICK}.json")
        yield write_forms(folder, QUICK, 96)


def write_forms(folder: Path, model: str, size: int) -> dict[str, Path]:
    make_random_checkpoint(model, 3, folder / "made.safetensors")
    half = {name: value.half() for name, value in safetensors.torch.load_file(folder / "made.safetensors").items()}
    found = {name: folder / name for name in ("form.safetensors", "open_clip.pt", "openai.pt")}
    safetensors.torch.save_file(half, found["form.safetensors"])
    torch.save({"state_dict": {name: value.float() for name, value in half.items()}}, found["open_clip.pt"])
    sizes = {"input_resolution": size, "context_length": 77, "vocab_size": 49408}
    archive = _Archive(half | {name: torch.tensor(value) for name, value in sizes.items()})
    torch.jit.save(torch.jit.script(archive), found["openai.pt"])
    return found


# --- add and list ---


@pytest.mark.filterwarnings("ignore")
def test_all_three_forms_are_one_backbone(forms: dict[str, Path], store: Path, secfacmic: Run) -> None:
    digests = set()
    for path in forms.values():
        code, out, errors = secfacmic("backbone", "add", path, "--model", QUICK)
        assert code == 0, errors
        digests.add(out.splitlines()[-1].removeprefix("digest = "))
    (digest,) = digests
    (kept,) = store.iterdir()
    code, out, _ = secfacmic("backbone", "list", "--json")
    document = json.loads(out)
    assert code == 0
    assert [(row["model"], row["digest"], row["id"]) for row in document["added"]] == [(QUICK, digest, kept.name)]
    files = [row["file"] for row in document["packaged"]]
    assert "mini-clip.safetensors" in files
    assert not any("statistics" in file for file in files)
    assert "added" in secfacmic("backbone", "list")[1]
    study = Backbone(model=QUICK, weights="random", seed=3, digest=digest)
    assert load_backbone(study, None).digest == digest


def test_what_does_not_load_is_not_kept(forms: dict[str, Path], store: Path, tmp_path: Path) -> None:
    (tmp_path / "text.pt").write_text("not weights")
    for path, model, says in (
        (forms["open_clip.pt"], None, "--model"),
        (forms["open_clip.pt"], "mini-clip", "not loaded as mini-clip"),
        (forms["open_clip.pt"], "hf-hub:a/b", "more than its weights"),
        (tmp_path / "text.pt", QUICK, "not loaded"),
        (tmp_path / "absent.pt", QUICK, "no such file"),
        (tmp_path, None, "neither safetensors nor PyTorch's"),
    ):
        with pytest.raises(BackboneError, match=says):
            add(path, model)
    assert not list(store.glob("*"))


# --- the whole way ---


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "form",
    [
        "openai.pt",
        pytest.param("form.safetensors", marks=pytest.mark.slow),
        pytest.param("open_clip.pt", marks=pytest.mark.slow),
    ],
)
def test_added_weights_go_from_template_to_prediction_without_a_path(
    form: str, forms: dict[str, Path], images: Path, tmp_path: Path, secfacmic: Run
) -> None:
    add(forms[form], QUICK)
    table = template_table(rounds=1) | {"backbone": {"model": QUICK, "weights": "file", "file": form}}
    (tmp_path / "t.toml").write_text(tomli_w.dumps(table))
    assert secfacmic("study", "check", tmp_path / "t.toml")[0] == 0
    code, _, errors = secfacmic("study", "new", tmp_path / "t.toml", "--out", tmp_path / "made")
    assert code == 0, errors
    template = parse_table(table, Template, ValueError, "template")  # type: ignore[type-var]
    summary = simulate(template, tmp_path / "out", images)
    code, out, errors = secfacmic(
        *("predict", "--adapter", tmp_path / "out/adapter.safetensors", "--images", images / "ash" / CLASSES[0]),
        "--json",
    )
    assert code == 0, errors
    assert json.loads(out)["backbone_digest"] == summary["backbone"]["digest"]
    assert len(json.loads(out)["images"]) == 10


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_vit_b_16_goes_the_same_way_in_all_three_forms(images: Path, tmp_path: Path, store: Path) -> None:
    digests, predictions = set(), []
    for form, path in write_forms(tmp_path, "ViT-B-16-quickgelu", 224).items():
        add(path, "ViT-B-16-quickgelu:openai")
        backbone = {"model": "ViT-B-16-quickgelu", "weights": "pretrained", "tag": "openai"}
        training = {"steps": 1, "learning_rate": 1e-3, "batch_size": 8}
        template = make_template(rounds=1, backbone=backbone, training=training)
        out = tmp_path / f"out-{form}"
        digests.add(simulate(template, out, images)["backbone"]["digest"])
        predictions.append(predict_folder(out / "adapter.safetensors", images / "ash" / CLASSES[0]).probabilities)
        shutil.rmtree(store)
    assert len(digests) == 1
    for other in predictions[1:]:
        np.testing.assert_array_equal(other, predictions[0])


# --- fetch ---


@pytest.fixture
def tag(forms: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> str:
    """A tag of open_clip whose address is a file here; its own downloader gets it."""
    entry = open_clip.pretrained._pcfg(url=forms["open_clip.pt"].as_uri(), quick_gelu=True)
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, QUICK, {"tiny": entry})
    return f"{QUICK}:tiny"


def test_a_tag_is_fetched_carried_over_and_found(
    tag: str, forms: dict[str, Path], tmp_path: Path, secfacmic: Run
) -> None:
    code, out, errors = secfacmic("backbone", "fetch", tag, "--to", tmp_path / "usb")
    assert code == 0, errors
    folder = tmp_path / "usb" / f"{QUICK}.tiny"
    assert sorted(path.name for path in folder.iterdir()) == [
        "backbone.json",
        "open_clip_config.json",
        "open_clip_model.safetensors",
    ]
    assert [path.name for path in (tmp_path / "usb").iterdir()] == [folder.name]
    digest = load_backbone(Backbone(model=QUICK, weights="file", file="x"), forms["form.safetensors"]).digest
    assert f"digest = {digest}" in out
    with pytest.raises(OutputError):
        fetch(tag, tmp_path / "usb")
    wanted = Backbone(model=QUICK, weights="pretrained", tag="tiny")
    assert load_backbone(wanted, folder).digest == digest  # as a site.toml may name it
    assert secfacmic("backbone", "add", folder)[0] == 0
    shutil.rmtree(folder)
    assert load_backbone(wanted, None).digest == digest
    for name in (tag, QUICK):
        assert json.loads(secfacmic("backbone", "check", name, "--json")[1])["digest"] == digest


def test_a_folder_damaged_on_the_way_is_refused(tag: str, tmp_path: Path, store: Path) -> None:
    folder, _ = fetch(tag, tmp_path)
    stored = safetensors.torch.load_file(folder / "open_clip_model.safetensors")
    stored["visual.proj"][0, 0] += 1
    safetensors.torch.save_file(stored, folder / "open_clip_model.safetensors")
    with pytest.raises(BackboneDigestError):
        add(folder, None)
    entry = json.loads((folder / "backbone.json").read_text())
    (folder / "backbone.json").write_text(json.dumps(entry | {"weights": "../../etc/passwd"}))
    with pytest.raises(BackboneError, match="leads out"):
        add(folder, None)
    assert not list(store.glob("*"))


def test_names_that_cannot_be_fetched_leave_nothing(
    forms: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = open_clip.pretrained._pcfg(url=(tmp_path / "absent.pt").as_uri(), quick_gelu=True)
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, QUICK, {"gone": absent})
    for name, says in (
        (f"{QUICK}:gone", "cannot be downloaded"),
        (f"{QUICK}:other", "it knows gone"),
        (QUICK, "expected MODEL:TAG"),
        ("no-such-model:openai", "no such tag"),
        ("hf-hub:only-one-part", "OWNER/NAME"),
        ("ViT-B-16:openai", "ViT-B-16-quickgelu"),
    ):
        with pytest.raises(BackboneError, match=says):
            fetch(name, tmp_path / "to")
    assert not list((tmp_path / "to").glob("*"))


def test_weights_trained_with_quickgelu_need_such_a_model(forms: dict[str, Path]) -> None:
    with pytest.raises(BackboneError, match="ViT-B-16-quickgelu"):
        load_backbone(Backbone(model="ViT-B-16", weights="pretrained", tag="openai"), forms["form.safetensors"])


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub with one repository like BiomedCLIP's: a BERT text tower whose configuration lies in another one."""
    from transformers import BertConfig, BertTokenizerFast

    text, repository = tmp_path / "hub" / "bert", tmp_path / "hub" / "tiny-biomed"
    text.mkdir(parents=True)
    repository.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "head", "with", "without", "mass"]
    (text / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(vocab_file=str(text / "vocab.txt")).save_pretrained(text)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertConfig(vocab_size=len(words), max_position_embeddings=24, **sizes).save_pretrained(text)
    model = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
        "text_cfg": {
            "hf_model_name": str(text),
            "hf_tokenizer_name": str(text),
            "hf_proj_type": "mlp",
            "hf_pooler_type": "cls_last_hidden_state_pooler",
            "context_length": 20,
        },
    }
    preprocess = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 0.5]}
    (repository / "open_clip_config.json").write_text(json.dumps({"model_cfg": model, "preprocess_cfg": preprocess}))
    torch.manual_seed(0)
    network = open_clip.create_model(f"local-dir:{repository}", pretrained_text=False)
    torch.save(network.state_dict(), repository / "open_clip_pytorch_model.bin")

    def download(repo_id: str, filename: str, cache_dir: str, **_: Any) -> str:
        assert repo_id == "fake/tiny-biomed"
        source = repository / filename
        if not source.exists():
            raise FileNotFoundError(filename)
        return str(shutil.copy(source, cache_dir))

    monkeypatch.setattr(open_clip.pretrained, "hf_hub_download", download)
    return tmp_path / "hub"


def test_a_model_of_the_hub_is_fetched_with_all_that_it_needs(hub: Path, tmp_path: Path) -> None:
    name = "hf-hub:fake/tiny-biomed"
    folder, fetched = fetch(name, tmp_path / "usb")
    texts = ["a head with a mass", "a head without a mass"]
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    expected = fetched.encode_texts(texts), fetched.encode_images([picture])
    assert folder.name == "fake--tiny-biomed"
    shutil.rmtree(hub)  # nothing there is needed any more
    kept, _ = add(folder, None)
    shutil.rmtree(folder)
    loaded = load_backbone(Backbone(model=name, weights="pretrained"), None)
    assert loaded.digest == fetched.digest
    assert loaded.id == fetched.id == kept.name
    assert loaded.context == 20
    assert json.loads(loaded.preprocessing)["mean"] == [0.1, 0.2, 0.3]
    assert loaded.count_tokens("a head with a mass") == 7
    np.testing.assert_array_equal(loaded.encode_texts(texts), expected[0])
    np.testing.assert_array_equal(loaded.encode_images([picture]), expected[1])


# --- templates and prompts ---


@pytest.mark.parametrize("name", [*MEDICAL, "vit_b_16_openai", "vit_b_16_laion2b"])
def test_templates_for_real_weights_hold_together(name: str, secfacmic: Run) -> None:
    assert secfacmic("study", "check", name)[0] == 0
    backbone = read_template(Path(name)).backbone
    assert backbone.licence
    if backbone.tag is None:
        assert backbone.model.startswith(f"hf-hub:{MEDICAL[name]}")
        assert backbone.weights == "pretrained"
    else:
        entry = open_clip.get_pretrained_cfg(backbone.model, backbone.tag)
        assert bool(entry.get("quick_gelu")) == bool(open_clip.get_model_config(backbone.model).get("quick_gelu"))
        tokenizer = open_clip.get_tokenizer(backbone.model)
        texts = [text for one in read_template(Path(name)).classes for text in one.prompts]
        assert all(len(tokenizer.encode(text)) + 2 <= 77 for text in texts)


def test_prompts_that_would_be_cut_are_refused_with_their_length(tmp_path: Path) -> None:
    room = 77 - 2  # start and end
    for text, tokens in (("a " * room, 77), ("a " * (room + 1), 78), ("!" + "a " * (room - 1) + "!", 78)):
        template = parse_table(_with_prompt(text.strip()), Template, ValueError, "template")  # type: ignore[type-var]
        if tokens <= 77:
            new_study(template, [], tmp_path / str(tokens))
            assert (tmp_path / str(tokens) / "study.toml").exists()
            continue
        (tmp_path / "there").mkdir(exist_ok=True)
        for out in (tmp_path / "refused/deep", tmp_path / "there"):
            with pytest.raises(StudyError, match=rf"77 tokens.*class 'light' has {tokens}"):
                new_study(template, [], out)
        assert not (tmp_path / "refused").exists()
        assert not (tmp_path / "there/study.toml").exists()


def _with_prompt(text: str) -> dict[str, Any]:
    table = template_table()
    table["classes"][1]["prompts"] = ["a light image", text]
    return table

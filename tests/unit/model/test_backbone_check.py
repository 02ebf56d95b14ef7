"""`backbone check`: what is said of a backbone on the command line holds, and images that tell nothing are named."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from secure_fed import configs
from secure_fed.core.errors import BackboneError
from secure_fed.model.backbone import load_given, make_random_checkpoint
from secure_fed.model.backbone_fetch import add
from secure_fed.model.loaded_backbone import LoadedBackbone
from secure_fed.operate import backbone_check
from tests.conftest import Run
from tests.unit.model.test_backbone_forms import WORDS, bert_folder, clip_folder, siglip_folder

pytestmark = pytest.mark.usefixtures("store")

torch.set_num_threads(1)
NAME = "hf-hub:fake/clip"


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    clip_folder(tmp_path / "clip")
    return tmp_path / "clip"


def refused(secfacmic: Run, *words: object) -> str:
    code, out, errors = secfacmic("backbone", *words)
    assert (code, out) == (30, ""), (out, errors)
    return errors


def test_an_activation_that_is_not_its_own_is_refused_of_path_and_name_as_by_add(clip: Path, secfacmic: Run) -> None:
    for words in (("add", clip), ("check", clip)):
        assert "its activation is quickgelu, not gelu" in refused(secfacmic, *words, "--activation", "gelu")
    kept, added = add(clip, NAME)
    for name in (NAME, kept, added.id[:8], added.digest[:8]):
        assert "its activation is quickgelu, not gelu" in refused(secfacmic, "check", name, "--activation", "gelu")
        assert f"holds {NAME}, not mini-clip" in refused(secfacmic, "check", name, "--model", "mini-clip")
        assert "leave --text out" in refused(secfacmic, "check", name, "--text", clip)
        code, _, errors = secfacmic("backbone", "check", name, "--activation", "quickgelu", "--model", NAME, "--json")
        assert code == 0, errors
    assert "its activation is gelu_tanh" in refused_siglip(clip.parent, secfacmic)


def refused_siglip(folder: Path, secfacmic: Run) -> str:
    siglip_folder(folder / "siglip")
    return refused(secfacmic, "check", folder / "siglip", "--activation", "gelu")


def test_a_text_model_beside_a_kept_bert_is_refused_as_nothing_is_taken_from_it(tmp_path: Path, secfacmic: Run) -> None:
    bert_folder(tmp_path / "bert")
    kept, _ = add(tmp_path / "bert", "hf-hub:fake/bert", None, tmp_path / "text")
    for words in (("check", "hf-hub:fake/bert"), ("check", kept), ("add", kept)):
        assert "nothing is taken from" in refused(secfacmic, *words, "--text", tmp_path / "text")


def test_what_comes_along_is_no_other_model_either(secfacmic: Run) -> None:
    assert "not loaded as random-small" in refused(secfacmic, "check", "mini-clip", "--model", "random-small")
    assert "its activation is gelu, not quickgelu" in refused(
        secfacmic, "check", "mini-clip", "--activation", "quickgelu"
    )
    code, out, _ = secfacmic("backbone", "check", "mini-clip", "--json")
    assert (code, json.loads(out)["activation"]) == (0, "gelu")


def test_of_a_checkpoint_with_a_twin_the_activation_counts(tmp_path: Path, secfacmic: Run) -> None:
    config = json.loads((configs.MODELS / "random-small.json").read_text())
    for name, quick in (("twin", False), ("twin-quickgelu", True)):
        (tmp_path / f"{name}.json").write_text(json.dumps(config | {"quick_gelu": quick}))
        open_clip.add_model_config(tmp_path / f"{name}.json")
    make_random_checkpoint("twin", 0, tmp_path / "tuned.safetensors")
    words = ("check", tmp_path / "tuned.safetensors", "--model", "twin")
    assert "--activation gelu or --activation quickgelu" in refused(secfacmic, *words)
    for activation in ("gelu", "quickgelu"):
        _, out, _ = secfacmic("backbone", *words, "--activation", activation, "--json")
        assert json.loads(out)["activation"] == activation


@pytest.mark.parametrize("name", ["hf-hub:vinid/plip", "ViT-B-16-quickgelu:openai", "ViT-B-32:laion2b_s34b_b79k"])
def test_what_is_not_here_is_said_with_the_command_that_fetches_it(name: str, secfacmic: Run) -> None:
    errors = refused(secfacmic, "check", name)
    assert f"secfacmic backbone fetch {name} --to DIR" in errors
    assert "secfacmic backbone add" in errors


@pytest.mark.parametrize("name", ["plip", "ViT-B-32", "ViT-B-32:mystery", "abcdef123"])
def test_a_name_that_no_hub_has_is_said_without_such_a_command(name: str, secfacmic: Run) -> None:
    errors = refused(secfacmic, "check", name)
    assert "secfacmic backbone list" in errors
    assert "fetch" not in errors


def test_two_of_one_name_are_told_apart_by_id(clip: Path, secfacmic: Run) -> None:
    add(clip, NAME)
    config = json.loads((clip / "config.json").read_text())
    config["text_config"]["hidden_act"] = config["vision_config"]["hidden_act"] = "gelu"
    (clip / "config.json").write_text(json.dumps(config))
    _, other = add(clip, NAME)
    errors = refused(secfacmic, "check", NAME)
    assert "2 backbones" in errors
    assert other.id[:12] in errors
    code, out, _ = secfacmic("backbone", "check", other.id[:12], "--json")
    assert (code, json.loads(out)["activation"]) == (0, "gelu")


def by_class(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).mkdir(parents=True)
        picture = np.random.default_rng(len(name)).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(picture).save(folder / name / "a.png")
    return folder


def sorted_by_the_right_one(right: LoadedBackbone, wrong: LoadedBackbone, folder: Path) -> Path:
    """Pictures by class as a model sorts them, so that it is right of all, by prompts on which another is not."""
    rng = np.random.default_rng(0)
    pictures = []
    for _ in range(80):
        coarse = Image.fromarray(rng.integers(0, 256, (4, 6, 3)).astype(np.uint8))
        pictures.append(coarse.resize((48, 32), Image.Resampling.BICUBIC))
    words = ["head", "mass", "ray", "the", "a", "x", "with", "without", "an"]
    names = [f"{one} {other}" for one in words for other in words]
    prompts = [f"an image of {name}" for name in names]
    found = [one.encode_images(pictures) @ one.encode_texts(prompts).T for one in (right, wrong)]
    pairs = [(first, second) for first in range(len(names)) for second in range(first)]
    sorts = [np.array([one[:, first] > one[:, second] for first, second in pairs]) for one in found]
    moved = (sorts[0] != sorts[1]).mean(axis=1)
    halved = 0.5 - np.abs(sorts[0].mean(axis=1) - 0.5)
    best = int((np.minimum(moved, 0.3) + np.minimum(halved, 0.3)).argmax())
    for number, picture in enumerate(pictures):
        name = names[pairs[best][0 if sorts[0][best, number] else 1]]
        (folder / name).mkdir(parents=True, exist_ok=True)
        picture.save(folder / name / f"{number}.png")
    return folder


def activation_gelu(folder: Path) -> None:
    content = json.loads((folder / "config.json").read_text())
    for tower in ("text_config", "vision_config"):
        content[tower]["hidden_act"] = "gelu"
    (folder / "config.json").write_text(json.dumps(content))


def prepared(**how: object) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "preprocessor_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | how))

    return apply


WRONG: dict[str, tuple[Callable[[Path], None], str]] = {
    "nothing": (lambda folder: None, "no other way is clearly better"),
    "activation": (activation_gelu, r"better with the other activation, quickgelu \(\+\d+ points\): see whether"),
    "mean and std": (
        prepared(image_mean=[0.5] * 3, image_std=[0.5] * 3),
        r"the other usual mean and std \(\+\d+ points",
    ),
    "squash": (
        prepared(size={"height": 32, "width": 32}, do_center_crop=False),
        r"better with cut instead of squashed \(\+\d+ points",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_images_hint_at_what_is_wrong_with_a_backbone(
    wrong: str, tmp_path: Path, secfacmic: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A letter that the vocabulary lacks would end the text.
    monkeypatch.setattr(f"{clip_folder.__module__}.WORDS", [*WORDS, "image", "of"])
    clip = tmp_path / "clip"
    clip_folder(clip, max_position_embeddings=30)
    right = load_given(clip)[0]
    change, says = WRONG[wrong]
    change(clip)
    images = sorted_by_the_right_one(right, load_given(clip)[0], tmp_path / "images")
    code, out, errors = secfacmic("backbone", "check", clip, "--images", images, "--json")
    assert code == 0, errors
    found = json.loads(out)["zero_shot"]
    assert re.search(says, found["hint"]), found
    assert (found["correct"]["as it is"] == 1) == (wrong == "nothing")


def test_a_few_images_more_are_no_hint() -> None:
    """Forty to 26 of those on which two ways differ is nothing that chance would not do."""
    first, second = np.zeros(166, dtype=bool), np.zeros(166, dtype=bool)
    first[:40] = second[40:66] = True
    assert first.mean() - second.mean() > backbone_check._BETTER
    assert backbone_check._by_chance(first, second) == pytest.approx(0.0544, abs=1e-4)
    second[43:66] = False
    assert backbone_check._by_chance(first, second) < 1e-4
    assert backbone_check._by_chance(second, second) == 1


def test_images_that_cannot_be_read_are_told_and_folders_without_any_are_no_classes(
    clip: Path, tmp_path: Path, secfacmic: Run
) -> None:
    images = by_class(tmp_path / "images", "head", "mass", "unlabelled")
    shutil.copytree(images / "head", images / "mass/.ipynb_checkpoints")
    for name in (".ipynb_checkpoints", "__MACOSX"):
        shutil.copytree(images / "head", images / name)
    (images / "empty").mkdir()
    (images / "notes").mkdir()
    (images / "notes/read.txt").write_text("no image")
    (images / "head/broken.png").write_bytes((images / "head/a.png").read_bytes()[:60])
    code, out, errors = secfacmic("backbone", "check", clip, "--images", images, "--json")
    assert code == 0, errors
    found = json.loads(out)["zero_shot"]
    assert (found["images"], found["chance"]) == (2, 0.5)
    assert [one.split(":")[0] for one in found["unreadable"]] == ["head/broken.png"]
    assert "1 images cannot be read and are left out" in found["hint"]
    _, out, _ = secfacmic("backbone", "check", clip, "--images", images)
    assert "1 images cannot be read and are left out" in " ".join(out.split())


def test_a_class_of_which_nothing_can_be_read_is_refused_with_the_reason(
    clip: Path, tmp_path: Path, secfacmic: Run
) -> None:
    images = by_class(tmp_path / "images", "head", "mass", "ray")
    (images / "mass/a.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    code, out, errors = secfacmic("backbone", "check", clip, "--images", images)
    assert (code, out) == (20, "")
    assert "none of the images of mass can be read" in errors
    assert "mass/a.png" in errors


@pytest.mark.parametrize("names", [(), ("head",), ("head", "unlabelled")])
def test_fewer_than_two_classes_tell_nothing(
    names: tuple[str, ...], clip: Path, tmp_path: Path, secfacmic: Run
) -> None:
    by_class(tmp_path / "images", *names)
    code, _, errors = secfacmic("backbone", "check", clip, "--images", tmp_path / "images")
    assert code == 20
    assert "expected two or more folders" in errors


def test_an_empty_name_is_refused_and_not_the_current_folder(
    clip: Path, monkeypatch: pytest.MonkeyPatch, secfacmic: Run, store: Path
) -> None:
    monkeypatch.chdir(clip)
    for words in (("add", ""), ("add", " "), ("add", ".", "--text", ""), ("check", ".", "--images", "")):
        code, _, errors = secfacmic("backbone", *words)
        assert code == 2
        assert "is empty" in errors
    assert "name is empty" in refused(secfacmic, "check", "")
    assert not store.exists()
    with pytest.raises(BackboneError, match="expected one that people can read"):
        add(clip, " ")
    assert secfacmic("backbone", "add", ".")[0] == 0

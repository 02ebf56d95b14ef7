"""What becomes of a backbone after it was added, and what sticks and older programs leave beside one."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import socket
from pathlib import Path

import open_clip
import pytest
import safetensors.torch
import tomli_w
import torch
from huggingface_hub import constants

from secure_fed.core.errors import BackboneDigestError, BackboneError
from secure_fed.model import backbone_fetch, backbone_store
from secure_fed.model.backbone import load_backbone, make_random_checkpoint
from secure_fed.model.backbone_fetch import add
from secure_fed.protocol.study_tables import Backbone
from tests.conftest import Run, template_table
from tests.unit.model.test_backbone_forms import clip_folder

pytestmark = pytest.mark.usefixtures("store")

torch.set_num_threads(1)
NAME = "hf-hub:fake/clip"


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    clip_folder(tmp_path / "clip")
    return tmp_path / "clip"


def scale(path: Path) -> None:
    tensors = safetensors.torch.load_file(path)
    tensors["visual.proj"] = tensors["visual.proj"] * 1.5
    safetensors.torch.save_file(tensors, path)


def swap(path: Path) -> None:
    content = json.loads(path.read_text())
    words = content["model"]["vocab"]
    words["a"], words["d"] = words["d"], words["a"]
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("file", "damage", "says"),
    [
        ("open_clip_model.safetensors", scale, "weights have digest"),
        ("tokenizer.json", swap, "with its configuration it has id"),
    ],
)
def test_what_changed_in_the_store_is_refused_until_it_is_added_again(
    file: str, damage: object, says: str, clip: Path, tmp_path: Path, secfacmic: Run
) -> None:
    kept, added = add(clip, NAME)
    damage(kept / file)  # type: ignore[operator]
    unpinned = Backbone(model=NAME, weights="pretrained")
    with pytest.raises(BackboneDigestError, match=says):
        load_backbone(unpinned, None)
    (tmp_path / "t.toml").write_text(
        tomli_w.dumps(template_table(backbone={"model": NAME, "weights": "pretrained"}, rounds=1))
    )
    for command in (
        ("backbone", "check", NAME),
        ("study", "new", tmp_path / "t.toml", "--out", tmp_path / "made"),
        ("backbone", "add", kept),
    ):
        code, _, errors = secfacmic(*command)
        assert code == 31
        assert says in errors
        assert "secfacmic backbone add" in errors
    assert not (tmp_path / "made").exists()
    add(clip, NAME)
    assert load_backbone(unpinned, None).id == added.id
    assert [one.name for one in kept.parent.iterdir()] == [added.id]


@pytest.mark.parametrize("left", [None, "{", "[" * 9000], ids=["none", "cut", "deep"])
def test_an_entry_that_is_lost_or_cut_comes_back_with_the_backbone(left: str | None, clip: Path) -> None:
    kept, added = add(clip, NAME)
    (kept / "backbone.json").unlink() if left is None else (kept / "backbone.json").write_text(left)
    add(clip, NAME)
    assert load_backbone(Backbone(model=NAME, weights="pretrained"), None).id == added.id


def test_what_a_mac_leaves_on_a_stick_is_passed_over(clip: Path) -> None:
    for one in list(clip.iterdir()):
        (clip / f"._{one.name}").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X        " + bytes(4000))
    add(clip, None)
    (clip / "model.safetensors").unlink()
    with pytest.raises(BackboneError, match="no weights in it"):
        add(clip, None)


def test_counted_positions_beside_weights_make_no_second_checkpoint(clip: Path) -> None:
    _, alone = add(clip, None)
    tensors = safetensors.torch.load_file(clip / "model.safetensors")
    tensors["text_model.embeddings.position_ids"] = torch.arange(20)[None]
    torch.save(tensors, clip / "pytorch_model.bin")
    assert add(clip, None)[1].id == alone.id


def test_links_in_a_circle_are_said(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "a")
    with pytest.raises(BackboneError, match="only the link"):
        add(tmp_path / "a", "random-small")


def test_shards_that_hold_a_tensor_twice_with_other_values_are_refused(clip: Path) -> None:
    tensors = safetensors.torch.load_file(clip / "model.safetensors")
    (clip / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = [{name: tensors[name] for name in part} for part in (names[:9], names[9:])]
    files = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    where = {name: file for part, file in zip(parts, files, strict=True) for name in part}
    (clip / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))

    def write(factor: float) -> None:
        parts[1][names[0]] = tensors[names[0]] * factor
        for part, file in zip(parts, files, strict=True):
            safetensors.torch.save_file(part, clip / file)

    write(1.0)
    add(clip, None)
    write(2.0)
    with pytest.raises(BackboneError, match="1 tensors are in two shards with other values"):
        add(clip, None)


@pytest.mark.parametrize(
    ("model", "tag"), [(NAME, None), ("ViT-B-32-quickgelu", "openai"), ("RN50-quickgelu", "cc12m")]
)
def test_weights_named_by_digest_are_asked_of_no_hub(
    model: str, tag: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def spy(*arguments: object, **_: object) -> None:
        asked.append(arguments)
        raise OSError("no network here")

    monkeypatch.setattr(socket.socket, "connect", spy)
    monkeypatch.setattr(socket, "getaddrinfo", spy)
    monkeypatch.setenv("HOME", str(tmp_path))
    named = f"{model}:{tag}" if tag else model
    with pytest.raises(BackboneError, match=f"secfacmic backbone fetch {named} --to DIR"):
        load_backbone(Backbone(model=model, weights="pretrained", tag=tag, digest="0" * 64), None)
    assert asked == []


def test_weights_named_by_digest_come_from_what_was_downloaded(
    clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "hub/models--fake--clip"
    (place / "refs").mkdir(parents=True)
    (place / "refs/main").write_text("0" * 40)
    clip.rename(tmp_path / "moved")
    (place / "snapshots").mkdir()
    (tmp_path / "moved").rename(place / "snapshots" / ("0" * 40))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    _, added = add(place, None)
    monkeypatch.setenv(backbone_store.PLACE, str(tmp_path / "another"))
    named = Backbone(model=NAME, weights="pretrained", digest=added.digest, id=added.id)
    assert load_backbone(named, None).id == added.id


def test_a_download_that_broke_off_is_not_begun_again_for_weights_named_by_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    entry = open_clip.pretrained._pcfg(url="https://openaipublic.invalid/0123abcd/tiny.pt")
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "random-small", {"tiny": entry})
    kept = tmp_path / ".cache/clip/tiny.pt"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"PK\3\4" + bytes(3000))
    named = Backbone(model="random-small", weights="pretrained", tag="tiny", digest="0" * 64)
    with pytest.raises(BackboneError, match=f"{kept}.*ends after 0.003 MB"):
        load_backbone(named, None)


def test_one_backbone_is_found_under_each_name_that_it_was_added_with(
    clip: Path, tmp_path: Path, secfacmic: Run
) -> None:
    other = "hf-hub:other/name"
    (clip / "README.md").write_text("---\nlicense: other\nlicense_name: mit\n---\n")
    kept, added = add(clip, NAME)
    (clip / "README.md").unlink()
    clip.rename(tmp_path / "renamed")
    for _ in range(2):
        assert add(tmp_path / "renamed", other)[0] == kept
    assert [one.model for one in backbone_store.read_entry(kept).names] == [NAME, other]
    assert [one.name for one in kept.parent.iterdir()] == [added.id]
    (kept / "tokenizer.json").unlink()  # its names outlast a damage
    add(tmp_path / "renamed", other)
    for model in (NAME, other):
        found = load_backbone(Backbone(model=model, weights="pretrained"), None)
        assert (found.id, found.form.model) == (added.id, model)
        assert backbone_store.read_entry(kept).licence == "mit"
        assert secfacmic("backbone", "check", model)[0] == 0
        assert secfacmic("backbone", "check", kept, "--model", model)[0] == 0
    for file in ("clip", "renamed"):
        for model in (NAME, other):
            assert load_backbone(Backbone(model=model, weights="file", file=file), None).id == added.id
    assert [row["model"] for row in json.loads(secfacmic("backbone", "list", "--json")[1])["added"]] == [NAME, other]
    shutil.copytree(kept, tmp_path / "usb")
    shutil.rmtree(kept)
    add(tmp_path / "usb", None)
    assert [one.model for one in backbone_store.read_entry(kept).names] == [NAME, other]


def test_a_file_of_the_same_name_is_another_models_weights(
    clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_random_checkpoint("random-small", 1, tmp_path / "best.pt")
    add(tmp_path / "best.pt", "random-small")
    add(clip, NAME)
    monkeypatch.chdir("/")
    assert load_backbone(Backbone(model="random-small", weights="file", file="best.pt"), None)
    for model, file in (("ViT-B-16-SigLIP", "best.pt"), ("ViT-B-32", "clip"), ("hf-hub:fake/other", "clip")):
        with pytest.raises(BackboneError, match="no such file here, and none of that name"):
            load_backbone(Backbone(model=model, weights="file", file=file), None)


@pytest.mark.parametrize(
    "named",
    [
        {"model": "ViT-B-32", "weights": "pretrained", "tag": "openai"},
        {"model": "ViT-B-32", "weights": "file", "file": "x"},
        {"model": "hf-hub:fake/other", "weights": "pretrained"},
    ],
)
def test_a_folder_of_the_store_is_only_what_it_was_added_as(named: dict[str, str], clip: Path) -> None:
    kept, added = add(clip, NAME)
    with pytest.raises(BackboneError, match=f"holds {NAME}, not {named['model']}"):
        load_backbone(Backbone.model_validate(named), kept)
    assert load_backbone(Backbone.model_validate(named | {"digest": added.digest}), kept).id == added.id
    assert load_backbone(Backbone(model=NAME, weights="pretrained"), kept).id == added.id


def test_a_tag_is_of_one_of_two_twins_and_a_file_of_either() -> None:
    what = {"digest": "0" * 64, "id": "0" * 64, "activation": "gelu", "weights": "x", "bytes": 1}
    entry = backbone_store.Entry.model_validate({"model": "ViT-B-32", "tag": "a", "source": "x.pt"} | what)
    for model, tag, bears in (("ViT-B-32", "a", True), ("ViT-B-32-quickgelu", "a", False), ("ViT-B-32", "b", False)):
        named = Backbone(model=model, weights="pretrained", tag=tag)
        assert backbone_store.bears(entry, named) == bears
    assert backbone_store.bears(entry, Backbone(model="ViT-B-32-quickgelu", weights="file", file="y.pt"))


def test_an_entry_that_is_none_is_said_with_what_to_do(clip: Path, store: Path) -> None:
    add(clip, NAME)
    (store / "junk").mkdir()
    (store / "junk/backbone.json").write_text("{}")
    with pytest.raises(BackboneError, match=r"(?s)junk/backbone.json: .*remove this folder") as refused:
        load_backbone(Backbone(model=NAME, weights="pretrained"), None)
    assert "secfacmic backbone add" in str(refused.value)


@pytest.mark.parametrize("change", [{"mean": [0.5, 0.5]}, {"interpolation": "random"}, {"blur": 2}])
def test_preprocessing_that_was_changed_in_the_store_is_named(change: dict[str, object], clip: Path) -> None:
    kept, _ = add(clip, NAME)
    path = kept / "open_clip_config.json"
    content = json.loads(path.read_text())
    content["preprocess_cfg"] |= change
    path.write_text(json.dumps(content))
    (key,) = change
    with pytest.raises(BackboneError, match=rf"(?s)open_clip_config.json, preprocess_cfg: .*{key}"):
        load_backbone(Backbone(model=NAME, weights="pretrained"), None)


def test_adds_of_several_processes_at_one_moment_all_count(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"hf-hub:fake/{number}" for number in range(3)]
    processes = multiprocessing.get_context("fork")
    loaded = processes.Barrier(len(names))
    load = backbone_fetch.load_given

    def together(*given: object, **options: object) -> object:
        found = load(*given, **options)  # type: ignore[arg-type]
        loaded.wait(60)
        return found

    monkeypatch.setattr(backbone_fetch, "load_given", together)
    running = [processes.Process(target=add, args=(clip, name)) for name in names]
    for one in running:
        one.start()
    for one in running:
        one.join(60)
    assert [one.exitcode for one in running] == [0, 0, 0]
    (kept,) = backbone_store.entries(backbone_store.store_folder())
    assert sorted(one.model for one in backbone_store.read_entry(kept).names) == names
    assert [one.name for one in kept.parent.iterdir()] == [kept.name]
    for name in names:
        load_backbone(Backbone(model=name, weights="pretrained"), None)


def test_what_steers_a_terminal_in_an_entry_is_shown_as_text(clip: Path, secfacmic: Run) -> None:
    kept, _ = add(clip, NAME)
    content = json.loads((kept / "backbone.json").read_text())
    evil = "x\x1b[31mred\x1b]0;title\x07\x9b2J\u202eback [bold]y"
    (kept / "backbone.json").write_text(json.dumps(content | {"model": evil}))
    code, out, _ = secfacmic("backbone", "list")
    assert code == 0
    assert "?[31" in out
    assert "[bold]" in out
    errors = secfacmic("backbone", "check", str(kept), "--model", "other")[2]
    assert "x?[31mred" in errors
    for text in (out, errors):
        assert not [letter for letter in text if not letter.isprintable() and letter not in "\n\t"]

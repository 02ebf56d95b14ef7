"""What is wrong beside weights, in them, or on the command line is said in our words, and nothing is kept of it."""

from __future__ import annotations

import contextlib
import errno
import gc
import io
import json
import logging
import pickle
import re
import shutil
import struct
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import safetensors.torch
import torch
from huggingface_hub import constants

from secure_fed.core.errors import BackboneError
from secure_fed.model import backbone_form, backbone_store, library, torchscript_file
from secure_fed.model.backbone import load_backbone, make_random_checkpoint
from secure_fed.model.backbone_fetch import add
from secure_fed.model.library import known_model
from secure_fed.model.loaded_backbone import LoadedBackbone
from secure_fed.model.network import make_network
from secure_fed.model.safetensors_file import write_weights
from secure_fed.model.weights import read_weights
from secure_fed.protocol.study_tables import Backbone
from tests.conftest import Run
from tests.unit.model.test_backbone_forms import (
    bert_folder,
    clip_config,
    clip_folder,
    edit,
    own_folder,
    siglip_folder,
    split_up,
    write,
)

pytestmark = pytest.mark.usefixtures("store")

torch.set_num_threads(1)

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 2100000\n"
PAGE = b"<!DOCTYPE html>\n<html><body>Sign in</body></html>"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole folder of each form."""
    place = tmp_path_factory.mktemp("whole")
    clip_folder(place / "clip")
    siglip_folder(place / "siglip")
    bert_folder(place / "bert")
    (place / "text").rename(place / "bert/text")
    shutil.copytree(place / "clip", place / "pieces")
    split_up(place / "pieces")
    return place


Make = Callable[[Path], Any]


def inside(name: str, *keys: str, **changes: Any) -> Make:
    """Change keys of a table inside a JSON file."""

    def apply(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        table = content
        for key in keys:
            table = table[key]
        table |= changes
        (folder / name).write_text(json.dumps(content))

    return apply


def move_onnx(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "onnx").mkdir()
    (folder / "onnx/model.onnx").write_bytes(b"\x08\x07")


def leave_out(*keys: str) -> Make:
    """Take keys out of what says how images are prepared."""

    def apply(folder: Path) -> None:
        content = json.loads((folder / PREPARE).read_text())
        (folder / PREPARE).write_text(json.dumps({key: content[key] for key in content if key not in keys}))

    return apply


def change_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads((folder / OURS).read_text())
    change(content["model_cfg"])
    (folder / OURS).write_text(json.dumps(content))


OURS, THEIRS = "open_clip_config.json", "config.json"
PREPARE = "preprocessor_config.json"
BAD: dict[str, tuple[str, Make, str]] = {
    # of transformers
    "no heads": ("clip", inside(THEIRS, "text_config", num_attention_heads=0), "num_attention_heads = 0"),
    "a width in words": ("clip", inside(THEIRS, "vision_config", hidden_size="32"), "hidden_size = '32'"),
    "a tower that is a list": ("clip", inside(THEIRS, text_config=[1]), r"text_config = \[1\]"),
    "layers below zero": ("siglip", inside(THEIRS, "text_config", num_hidden_layers=-1), "num_hidden_layers = -1"),
    "a million layers": ("siglip", inside(THEIRS, "text_config", num_hidden_layers=10**6), "num_hidden_layers"),
    "an epsilon of null and zero": ("clip", inside(THEIRS, "vision_config", layer_norm_eps=0), "layer_norm_eps = 0"),
    "nan": ("clip", write(THEIRS, b'{"model_type": "clip", "text_config": {"x": NaN}}'), "NaN is no JSON number"),
    "too large": ("clip", write(THEIRS, b'{"model_type": "clip", "x": 1e999}'), "too large a number"),
    "too deep": ("clip", write(THEIRS, b"[" * 9000), "no whole JSON file"),
    "bytes": ("clip", write(THEIRS, b"\xff\xfe{}"), "is not UTF-8 text"),
    "channels": ("clip", inside(THEIRS, "vision_config", num_channels=1), "num_channels = 1"),
    "a bert inside": ("clip", inside(THEIRS, "text_config", model_type="bert"), "model_type = 'bert'"),
    "context of one": ("clip", inside(THEIRS, "text_config", max_position_embeddings=1), "max_position_embeddings = 1"),
    "another end": ("clip", inside(THEIRS, "text_config", eos_token_id=3), "its tokenizer ends a text with token"),
    "patches": ("clip", inside(THEIRS, "vision_config", patch_size=64), "patches of 64 pixels, but images of 32"),
    "deviation of zero": ("clip", edit(PREPARE, image_std=[0, 1, 1]), "image_std"),
    "two means": ("clip", edit(PREPARE, image_mean=[0.5, 0.5]), "image_mean"),
    "unknown way": ("clip", edit(PREPARE, do_flip_channel_order=True), "do_flip_channel_order: unknown key"),
    "another processor": ("clip", edit(PREPARE, image_processor_type="BlipImageProcessor"), "'BlipImageProcessor'"),
    "code that prepares": ("clip", edit(PREPARE, auto_map={"AutoImageProcessor": "x.Y"}), "never run"),
    "a size in words": ("clip", edit(PREPARE, size="large"), "size = 'large'"),
    "enlarged by padding": (
        "clip",
        edit(PREPARE, size={"shortest_edge": 20}),
        "made 20 pixels wide and then cut to 32",
    ),
    "a size that nothing says": ("siglip", leave_out("size"), "become 224 x 224, but the model takes 36 x 36"),
    "a cut that nothing says": ("clip", leave_out("crop_size"), "become 224 x 224, but the model takes 32 x 32"),
    "a step of null": ("clip", edit(PREPARE, do_normalize=None), "do_normalize = false"),
    "a cut of null": ("clip", edit(PREPARE, do_center_crop=None), "keep their shape and are not cut"),
    "a filter of null": ("clip", edit(PREPARE, resample=None), "resample is null, and versions"),
    "a factor of null": ("siglip", edit(PREPARE, rescale_factor=None), "rescale_factor is null, and versions"),
    "a cut's size of null": ("clip", edit(PREPARE, crop_size=None), "crop_size is null, and versions"),
    **{
        f"{key} of null, {form}": (form, edit(PREPARE, **{key: None}), f"{key} is null, and versions")
        for key in ("size", "image_mean", "image_std")
        for form in ("clip", "siglip")
    },
    **{
        f"{key} of null, {form} {tower}": (form, inside(THEIRS, f"{tower}_config", **{key: None}), f"{key} = None")
        for key in ("hidden_act", "layer_norm_eps", "num_attention_heads", "intermediate_size")
        for tower in ("text", "vision")
        for form in ("clip", "siglip")
    },
    "an end of null": ("clip", inside(THEIRS, "text_config", eos_token_id=None), "eos_token_id = None"),
    "a width of both of null": ("clip", edit(THEIRS, projection_dim=None), "projection_dim = None"),
    "a table with nulls that holds": (
        "clip",
        edit(THEIRS, text_config_dict={"hidden_act": None}),
        "hidden_act = None",
    ),
    "a cut by the short edge": (
        "clip",
        edit(PREPARE, crop_size={"shortest_edge": 32}),
        r"crop_size \{'shortest_edge': 32\}; expected height and width",
    ),
    "a processor of any shape": (
        "siglip",
        edit(PREPARE, image_processor_type="Siglip2ImageProcessorFast"),
        "prepared by 'Siglip2ImageProcessorFast'",
    ),
    "a special word": ("siglip", edit("tokenizer_config.json", pad_token="a"), "'a' is named among the special"),
    "not cut": ("clip", edit(PREPARE, do_center_crop=False), "keep their shape and are not cut"),
    "a mask of what fills up": (
        "siglip",
        edit("tokenizer_config.json", model_input_names=["input_ids", "attention_mask"]),
        r'does not say model_input_names = \["input_ids"\]',
    ),
    "code that reads": ("clip", edit("tokenizer_config.json", auto_map={"AutoTokenizer": "x.Y"}), "never run"),
    "pad that is a number": ("clip", edit("tokenizer_config.json", pad_token=3), "pad_token"),
    "no vocabulary": ("clip", edit("tokenizer.json", model=None), "model"),
    "tokens that are texts": ("pieces", inside("vocab.json", h="1"), "vocab.h = '1'"),
    # shards
    "index of itself": (
        "pieces",
        inside("model.safetensors.index.json", "weight_map", x="model.safetensors.index.json"),
        "names 'model.safetensors.index.json'; expected names of weights",
    ),
    "index of a number": ("pieces", inside("model.safetensors.index.json", "weight_map", x=3), "weight_map.x = 3"),
    "index of nothing": ("pieces", edit("model.safetensors.index.json", weight_map={}), "names no shard"),
    "index outside": (
        "pieces",
        inside("model.safetensors.index.json", "weight_map", x="../a.safetensors"),
        "names '../a.safetensors'",
    ),
    # of open_clip
    "text_cfg that is a list": ("bert", inside(OURS, "model_cfg", text_cfg=[]), "text_cfg = "),
    "unknown key": ("bert", inside(OURS, "model_cfg", "vision_cfg", mystery=1), "vision_cfg.mystery: unknown key"),
    "a model of a hub inside": (
        "bert",
        inside(OURS, "model_cfg", "vision_cfg", timm_model_name="hf-hub:a/b"),
        "timm_model_name = 'hf-hub:a/b'",
    ),
    "heads that do not divide": ("bert", inside(OURS, "model_cfg", "vision_cfg", head_width=5), "does not divide"),
    "random interpolation": (
        "bert",
        inside(OURS, "preprocess_cfg", interpolation="random"),
        "interpolation = 'random'",
    ),
    "unknown preprocessing": ("bert", inside(OURS, "preprocess_cfg", blur=2), "blur: unknown key"),
    "a colour in words": ("bert", inside(OURS, "preprocess_cfg", fill_color="red"), "fill_color = 'red'"),
    "a deviation of zero": ("bert", inside(OURS, "preprocess_cfg", std=[0.0, 1, 1]), "std"),
    "a mean of the number 0": ("bert", inside(OURS, "preprocess_cfg", mean=0.0), "mean is the number 0, which"),
    "images that are no square": (
        "bert",
        inside(OURS, "model_cfg", "vision_cfg", image_size=[32, 64]),
        "images of 32 x 64 pixels; expected a square",
    ),
    "a pool in words": ("bert", inside(OURS, "model_cfg", "vision_cfg", attentional_pool="x"), "attentional_pool"),
    "two pools": (
        "bert",
        inside(OURS, "model_cfg", "vision_cfg", attentional_pool="cascade"),
        "a table of features of an image",
    ),
    "a pad of null": ("bert", inside("text/config.json", pad_token_id=None), "pad_token_id is null, so that nothing"),
    "one token of context": ("bert", inside(OURS, "model_cfg", "text_cfg", context_length=1), "context_length = 1"),
    "tokens at random": (
        "bert",
        inside(OURS, "model_cfg", "text_cfg", tokenizer_kwargs={"reduction_mask": "random"}),
        "used in a way that is not read",
    ),
    "a text model without heads": ("bert", inside("text/config.json", num_attention_heads=0), "num_attention_heads"),
    "a quantised text model": ("bert", inside("text/config.json", quantization_config={}), "a quantised text model"),
    "an unknown activation": ("bert", inside("text/config.json", hidden_act="mystery"), "cannot build this model"),
    # what is no CLIP
    "an image tower of open_clip": (
        "bert",
        lambda folder: change_config(folder, lambda config: config.pop("text_cfg")),
        "of an image tower alone",
    ),
    "an image tower of timm": ("clip", write(THEIRS, b'{"architecture": "vit_base_patch16_224"}'), "an image tower"),
    "no kind": ("clip", write(THEIRS, b'{"x": 1}'), "no model_type in config.json, another kind"),
    "onnx below": ("clip", move_onnx, "onnx/model.onnx: is an ONNX model"),
    "a page after a comment": ("clip", write("model.safetensors", b"<!-- x -->\n<HTML><body>"), "is a web page"),
    "a few bytes": ("clip", write("model.safetensors", b"Invalid username"), "16 bytes that are neither"),
    # what a clone or a browser leaves
    **{
        f"{kind} as {file}": (form, write(file, content), says)
        for form, file in (
            ("clip", THEIRS),
            ("clip", PREPARE),
            ("clip", "tokenizer.json"),
            ("clip", "tokenizer_config.json"),
            ("pieces", "vocab.json"),
            ("pieces", "merges.txt"),
            ("pieces", "model.safetensors.index.json"),
            ("siglip", "spiece.model"),
            ("bert", OURS),
            ("bert", "text/config.json"),
        )
        for kind, content, says in (
            ("a pointer", POINTER, r"is a Git LFS pointer of 2.1 MB.*git lfs pull"),
            ("a page", PAGE, "is a web page"),
        )
    },
}


@pytest.mark.parametrize("case", BAD)
def test_a_wrong_configuration_is_named_with_its_file_and_key(
    case: str, whole: Path, tmp_path: Path, store: Path
) -> None:
    form, make, says = BAD[case]
    shutil.copytree(whole / form, tmp_path / "given")
    make(tmp_path / "given")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(BackboneError) as refused:
            add(tmp_path / "given", "hf-hub:a/b")
    assert re.search(says, str(refused.value), re.DOTALL), str(refused.value)
    assert "given" in str(refused.value)
    assert not store.exists() or not list(store.iterdir())


def test_a_folder_with_weights_of_another_model_says_which_fits(tmp_path: Path) -> None:
    from transformers import CLIPConfig, CLIPModel

    from secure_fed.model.library import known_model

    clip_folder(tmp_path / "clip")
    small = known_model("random-small")
    vision, text = small["vision_cfg"], small["text_cfg"]
    config = CLIPConfig(
        projection_dim=small["embed_dim"],
        vision_config={
            "hidden_size": vision["width"],
            "intermediate_size": 4 * vision["width"],
            "num_hidden_layers": vision["layers"],
            "num_attention_heads": vision["width"] // vision.get("head_width", 64),
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
        },
        text_config={
            "hidden_size": text["width"],
            "intermediate_size": 4 * text["width"],
            "num_hidden_layers": text["layers"],
            "num_attention_heads": text["heads"],
        },
    )
    tensors = {name: value.clone() for name, value in CLIPModel(config).state_dict().items()}
    safetensors.torch.save_file(tensors, tmp_path / "clip/model.safetensors")
    with pytest.raises(BackboneError, match="its shapes fit random-small"):
        add(tmp_path / "clip", None)
    edit(THEIRS, model_type="siglip")(tmp_path / "clip")
    edit("tokenizer_config.json", model_input_names=["input_ids"])(tmp_path / "clip")
    inside(THEIRS, "text_config", model_type="siglip")(tmp_path / "clip")
    inside(THEIRS, "vision_config", model_type="siglip")(tmp_path / "clip")
    with pytest.raises(BackboneError, match="its shapes fit random-small"):
        add(tmp_path / "clip", None)
    torch.save(tensors, tmp_path / "lone.pt")
    with pytest.raises(BackboneError, match=r"its shapes are those of random-small.*name the folder"):
        add(tmp_path / "lone.pt", None)


def test_a_name_that_a_folder_does_not_bear_is_refused(whole: Path, store: Path, secfacmic: Run) -> None:
    for name, says in (
        ("ViT-B-32", "is not ViT-B-32, but by its configuration none that open_clip knows by name"),
        ("ViT-B-32:openai", "is not ViT-B-32:openai"),
        ("", "model '': no name"),
        ("a\nb", "no name"),
        ("hf-hub:", "expected hf-hub:OWNER/NAME"),
        ("hf-hub:a/b/c", "expected hf-hub:OWNER/NAME"),
    ):
        for command in ("add", "check"):
            code, _, errors = secfacmic("backbone", command, whole / "clip", "--model", name)
            assert (code, says in errors) == (30, True), errors
    assert not list(store.glob("*"))


def test_a_file_that_is_not_here_is_said_with_the_command_that_adds_it(store: Path) -> None:
    backbone = Backbone(model="ViT-B-32", weights="file", file="tuned.pt", activation="quickgelu")
    add_it = "secfacmic backbone add tuned.pt --model ViT-B-32 --activation quickgelu"
    with pytest.raises(BackboneError, match=rf"tuned.pt: no such file here, .* in {store}; .*: {add_it}$"):
        load_backbone(backbone, None)
    other = backbone.model_copy(update={"model": "random-small", "activation": "gelu", "file": "/usb/tuned.pt"})
    with pytest.raises(BackboneError, match=r"/usb/tuned.pt: no such file.* add tuned.pt --model random-small$"):
        load_backbone(other, None)


def test_what_lies_beside_the_model_in_a_checkpoint_is_named_as_all_that_is_wrong(tmp_path: Path) -> None:
    torch.save(small(tmp_path) | {"head.weight": torch.ones(2, 2)}, tmp_path / "tuned.pt")
    with pytest.raises(BackboneError, match=r"\(head.weight\), which is all that keeps it from being that model"):
        add(tmp_path / "tuned.pt", "random-small")


def test_a_folder_without_a_configuration_names_the_candidates(tmp_path: Path) -> None:
    make_random_checkpoint("random-small", 0, tmp_path / "small.safetensors")
    for model in (None, "hf-hub:a/b"):
        with pytest.raises(BackboneError, match=r"no config.json.*checkpoint of random-small, whose shapes it has"):
            add(tmp_path, model)


def test_a_folder_around_a_model_is_no_half_copied_one(
    whole: Path, tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def says(path: Path, *found: str) -> None:
        with pytest.raises(BackboneError) as refused:
            add(path, None)
        text = str(refused.value)
        assert f"in {len(found)} folders below it" in text, text
        assert all(one in text for one in found[:5]), text
        assert "name that one" in text
        assert not store.exists()

    says(whole, "bert", "clip", "pieces", "siglip")
    home = tmp_path / "huggingface"
    shutil.copytree(whole / "clip", home / "hub/models--a--b/snapshots/0123")
    (home / "hub/models--a--b/blobs").mkdir()
    (home / "hub/.locks/models--a--b").mkdir(parents=True)
    says(home, "hub/models--a--b")
    says(home / "hub", "models--a--b")
    says(home / "hub/models--a--b/snapshots", "0123")
    assert add(home / "hub/models--a--b", None)[1].form.model == "hf-hub:a/b"
    shutil.rmtree(store)
    (tmp_path / "adapters/default").mkdir(parents=True)
    (tmp_path / "adapters/default/adapter_config.json").write_text("{}")
    says(tmp_path / "adapters", "default")
    for number in range(7):
        shutil.copytree(whole / "pieces", tmp_path / f"many/{number}")
    says(tmp_path / "many", *"0123456")
    (tmp_path / "stick/lost+found").mkdir(parents=True)
    (tmp_path / "stick/readme.txt").write_text("nothing")
    look = Path.iterdir

    def allowed(path: Path) -> Any:
        if path.name == "lost+found":
            raise PermissionError(path)
        return look(path)

    monkeypatch.setattr(Path, "iterdir", allowed)
    with pytest.raises(BackboneError, match="no weights in it; the folder is half copied"):
        add(tmp_path / "stick", None)


def test_a_folder_of_its_own_beside_a_model_does_not_hide_it(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole / "clip", tmp_path / "clip")
    shutil.copytree(whole / "siglip", tmp_path / "clip/checkpoint-500")
    assert add(tmp_path / "clip", None)[1].form.kind.endswith("clip")
    make_random_checkpoint("random-small", 0, tmp_path / "small.safetensors")
    assert add(tmp_path, "random-small")[1].form.kind == "a checkpoint"


@pytest.mark.parametrize("name", ["a.lora_A.weight", "a.lora_B.default.weight", "a.base_layer.weight", "a.ia3_l"])
@pytest.mark.parametrize("stated", [True, False])
@pytest.mark.parametrize("file", ["adapter_model.safetensors", "tuned.pt", "model.safetensors"])
def test_an_adapter_of_peft_is_known_without_its_configuration(
    name: str, stated: bool, file: str, whole: Path, tmp_path: Path, store: Path
) -> None:
    tensors = {f"base_model.model.{name}": torch.ones(2, 2)}
    (tmp_path / "tuned").mkdir()
    path = tmp_path / "tuned" / file
    torch.save(tensors, path) if path.suffix == ".pt" else safetensors.torch.save_file(tensors, path)
    if stated:
        (tmp_path / "tuned/adapter_config.json").write_text('{"base_model_name_or_path": "vinid/plip"}')
    whole_folder = tmp_path / "beside"
    shutil.copytree(whole / "clip", whole_folder)
    shutil.copy(path, whole_folder / file)
    given = [(path, None), (path, "random-small"), (tmp_path / "tuned", None), (tmp_path / "tuned", "random-small")]
    if file != "tuned.pt":  # a second checkpoint that differs is refused as such
        given.append((whole_folder, None))
    for place, model in given:
        with pytest.raises(BackboneError) as refused:
            add(place, model)
        text = str(refused.value)
        expected = "of vinid/plip" if stated and place != whole_folder else "names its base model (BASE)"
        assert "a PEFT adapter" in text, text
        assert expected in text, text
        assert "merge_and_unload" in text
    assert not store.exists()


class _RunsWhenLoaded(torch.nn.Module):
    """TorchScript calls ``__setstate__`` by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2))

    @torch.jit.export
    def __getstate__(self) -> tuple[torch.Tensor, bool]:
        return self.weight, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, bool]) -> None:
        print("ran")
        self.weight = state[0]
        self.training = state[1]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.weight


def _with_code(path: Path, old: str, new: str) -> None:
    """Change the text of an archive's class."""
    with zipfile.ZipFile(path) as archive:
        entries = {entry: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for entry, content in entries.items():
            changed = content.decode().replace(old, new).encode() if entry.filename.endswith(".py") else content
            archive.writestr(entry.filename, changed)


@pytest.mark.filterwarnings("ignore")
def test_no_code_of_an_archive_runs_whatever_torch_would_run_when_it_loads_it(
    tmp_path: Path, store: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path, written = tmp_path / "made.pt", tmp_path / "written"
    torch.jit.save(torch.jit.script(_RunsWhenLoaded()), path)
    torch.jit.load(path)
    assert "ran" in capfd.readouterr().out
    for model in (None, "ViT-B-32-quickgelu"):
        with pytest.raises(BackboneError, match=r"says by code of its own what it holds, which is not run"):
            add(path, model)
    assert capfd.readouterr().out == ""
    network = make_network(known_model("random-small"), empty=False)
    writes = f'torch.from_file("{written}", True, 64)'
    for old, new in (
        (": Tensor) ->", f": Tensor={writes}) ->"),
        ("  training : bool", f"  evil : Final[Tensor] = {writes}\n  training : bool"),
    ):
        inputs = {"encode_image": torch.zeros(1, 3, 96, 96), "encode_text": torch.zeros(1, 77, dtype=torch.int64)}
        torch.jit.save(torch.jit.trace_module(network, inputs, check_trace=False), path)
        _with_code(path, old, new)
        right = torch.jit.load(path).state_dict()
        assert written.stat().st_size == 256
        written.unlink()
        found = read_weights(path)
        assert found.keys() == right.keys()
        assert all(torch.equal(found[name], right[name]) for name in right)
        assert not written.exists()
    _with_code(
        path, "  __buffers__ =", "  __annotations__ ="
    )  # as archives of old, whose buffers are all other tensors
    assert read_weights(path).keys() >= right.keys()


@pytest.mark.filterwarnings("ignore")
def test_an_archive_for_whose_copy_there_is_no_room_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.jit.save(torch.jit.script(_RunsWhenLoaded()), tmp_path / "made.pt")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torchscript_file, "copyfileobj", full)
    with pytest.raises(BackboneError, match=r"cannot be unpacked into .* \(No space left on device\).* TMPDIR"):
        add(tmp_path / "made.pt", "ViT-B-32-quickgelu")


def test_what_lies_beside_a_prefixed_model_is_told(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole / "clip", tmp_path / "clip")
    path = tmp_path / "clip/model.safetensors"
    model = {f"clip.{name}": value for name, value in safetensors.torch.load_file(path).items()}
    safetensors.torch.save_file(model, path)
    assert add(tmp_path / "clip", None)[1].form.told == []
    safetensors.torch.save_file(model | {"adapter.fc.weight": torch.ones(3, 16)}, path)
    (told,) = add(tmp_path / "clip", None)[1].form.told
    assert "beside the model, 1 tensors (adapter.fc.weight)" in told


def test_a_name_that_no_line_can_show_is_refused(whole: Path, tmp_path: Path, secfacmic: Run) -> None:
    for name in ("a\nb", "x\x1b[31m"):
        shutil.copytree(whole / "clip", tmp_path / name)
        code, _, errors = secfacmic("backbone", "add", tmp_path / name)
        assert (code, "rename it" in errors, name in errors) == (30, True, False)


def test_a_text_model_is_built_without_words_of_transformers(
    whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(whole / "bert", tmp_path / "bert")
    edit("text/config.json", bos_token_id=40961)(tmp_path / "bert")
    heard: list[str] = []
    log, listener = logging.getLogger("transformers"), logging.Handler(logging.WARNING)
    listener.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    log.addHandler(listener)
    before = log.level
    capfd.readouterr()
    try:
        log.setLevel(logging.WARNING)  # as it is when transformers was just imported
        library.open_clip.cache_clear()
        add(tmp_path / "bert", None)
        load_backbone(Backbone(model="hf-hub:a/b", weights="pretrained"), tmp_path / "bert")
        assert heard == []
        assert capfd.readouterr().err == ""
        log.setLevel(logging.WARNING)
        edit("text/config.json", bos_token_id=40962)(tmp_path / "bert")  # it says each word once in a process
        add(tmp_path / "bert", None)
        assert heard, "transformers has no word about this configuration any more"
    finally:
        log.removeHandler(listener)
        log.setLevel(before)


def test_a_teacher_of_another_size_beside_the_model_is_passed_over(whole: Path, tmp_path: Path) -> None:
    make_random_checkpoint("random-small", 0, tmp_path / "small.safetensors")
    make_random_checkpoint("mini-clip", 0, tmp_path / "mini.safetensors")
    small, mini = (safetensors.torch.load_file(tmp_path / f"{name}.safetensors") for name in ("small", "mini"))
    both = {f"student.{name}": value for name, value in small.items()}
    both |= {f"teacher.{name}": value for name, value in mini.items()}
    torch.save({"state_dict": both}, tmp_path / "distilled.ckpt")
    for model, file in (("random-small", "small.safetensors"), ("mini-clip", "mini.safetensors")):
        alone = add(tmp_path / file, model)[1]
        assert add(tmp_path / "distilled.ckpt", model)[1].digest == alone.digest
    shutil.copytree(whole / "clip", tmp_path / "clip")
    theirs = safetensors.torch.load_file(tmp_path / "clip/model.safetensors")
    larger = {f"teacher.{name}": torch.cat([value] * 2) if value.ndim else value for name, value in theirs.items()}
    (tmp_path / "clip/model.safetensors").unlink()
    torch.save({f"student.{name}": value for name, value in theirs.items()} | larger, tmp_path / "clip/model.bin")
    assert add(tmp_path / "clip", None)[1].digest == add(whole / "clip", None)[1].digest


def test_a_text_model_that_nothing_takes_is_refused(whole: Path, tmp_path: Path, store: Path) -> None:
    make_random_checkpoint("random-small", 0, tmp_path / "small.safetensors")
    for path, name in ((whole / "clip", None), (tmp_path / "small.safetensors", "random-small")):
        with pytest.raises(BackboneError, match="leave --text out"):
            add(path, name, None, whole / "bert/text")
    with pytest.raises(BackboneError, match="no such folder"):
        add(whole / "bert", None, None, tmp_path / "absent")
    assert not list(store.glob("*"))


def test_features_that_do_not_depend_on_the_text_are_refused(whole: Path, tmp_path: Path, store: Path) -> None:
    shutil.copytree(whole / "clip", tmp_path / "clip")
    tensors = safetensors.torch.load_file(tmp_path / "clip/model.safetensors")
    tensors["text_model.final_layer_norm.weight"].zero_()
    safetensors.torch.save_file(tensors, tmp_path / "clip/model.safetensors")
    for refuse in (
        lambda: add(tmp_path / "clip", None),
        lambda: load_backbone(Backbone(model="hf-hub:a/b", weights="pretrained"), tmp_path / "clip"),
    ):
        with pytest.raises(BackboneError, match="its features do not depend on the text"):
            refuse()
    assert not list(store.glob("*"))


def test_features_that_depend_on_a_texts_length_alone_are_refused(tmp_path: Path) -> None:
    state = small(tmp_path)
    state["token_embedding.weight"].zero_()
    safetensors.torch.save_file(state, tmp_path / "empty.safetensors")
    with pytest.raises(BackboneError, match="its features do not depend on the text"):
        add(tmp_path / "empty.safetensors", "random-small")


def test_a_vocabulary_that_was_cut_is_told(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole / "clip", tmp_path / "clip")
    tensors = safetensors.torch.load_file(tmp_path / "clip/model.safetensors")
    key = "text_model.embeddings.token_embedding.weight"
    for more in (255, 256):
        table = torch.cat([tensors[key], torch.ones(more, tensors[key].shape[1])])
        safetensors.torch.save_file(tensors | {key: table}, tmp_path / "clip/model.safetensors")
        clip_config(lambda content, rows=len(table): content["text_config"].update(vocab_size=rows))(tmp_path / "clip")
        told = add(tmp_path / "clip", None)[1].form.told
        assert [f"that {more} of the text tower's" in one for one in told] == ([True] if more == 256 else [])


QUANTISED = {
    "compressed tensors": {"mlp.fc1.weight_packed": torch.int32},
    "their scales": {"mlp.fc1.weight_scale": torch.float32},
    "compressed zero points": {"mlp.fc1.weight_zero_point": torch.int32},
    "MXFP4": {"mlp.fc1_blocks": torch.uint8, "mlp.fc1_scales": torch.uint8},
    "GPTQ": {"mlp.fc1.g_idx": torch.int32},
    "bitsandbytes": {"mlp.fc1.weight.nested_absmax": torch.float32},
}


@pytest.mark.parametrize("kind", QUANTISED)
def test_what_quantising_libraries_put_in_a_weights_place_is_called_so(kind: str, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole / "clip", tmp_path / "clip")
    path, layer = tmp_path / "clip/model.safetensors", "text_model.encoder.layers.0"
    tensors = safetensors.torch.load_file(path)
    tensors |= {f"{layer}.{name}": torch.ones(3, 3, dtype=dtype) for name, dtype in QUANTISED[kind].items()}
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(BackboneError, match=rf"quantised weights \({re.escape(layer)}"):
        add(tmp_path / "clip", None)


@pytest.mark.filterwarnings("ignore")
def test_a_model_that_torch_quantised_for_processors_is_called_so(tmp_path: Path) -> None:
    state: dict[str, Any] = small(tmp_path)
    for name in [one for one in state if one.endswith("c_fc.weight")]:
        packed = torch.quantize_per_tensor(state.pop(name), 0.1, 0, torch.qint8)
        state[name.replace("weight", "_packed_params._packed_params")] = (packed, None)
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(BackboneError, match=r"quantised weights \(.*c_fc\._packed_params\._packed_params.*qint8\)"):
        add(tmp_path / "x.pt", "random-small")


def test_a_file_that_lost_a_bit_on_the_way_is_refused_by_its_checksums(tmp_path: Path) -> None:
    from torch.serialization import set_crc32_options

    state, path = small(tmp_path), tmp_path / "x.pt"
    torch.save({"model": state}, path)
    right = add(path, "random-small")[1]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        BackboneError, match=r"is damaged: 1 of its \d+ records are not what their checksums say \(x/data/"
    ):
        add(path, "random-small")
    set_crc32_options(False)
    try:
        torch.save({"model": state}, path)  # without checksums it is not known
    finally:
        set_crc32_options(True)
    assert add(path, "random-small")[1].digest == right.digest


def test_an_adapters_own_copies_of_layers_are_an_adapter(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole / "clip", tmp_path / "clip")
    path = tmp_path / "clip/model.safetensors"
    tensors = {f"base_model.model.{name}": value for name, value in safetensors.torch.load_file(path).items()}
    tensors["base_model.model.text_projection.modules_to_save.default.weight"] = torch.ones(16, 32)
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(BackboneError, match="a PEFT adapter"):
        add(tmp_path / "clip", None)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("model.pt", b"\x08\x08\x12\x07pytorch\x1a\x052.6.0" + bytes(99), "is an ONNX model"),
        ("pytorch_model.bin", b"\x83\xa6params\x82\xa9text_proj" + bytes(99), "is Flax's weights"),
        ("pytorch_model.bin", b"\xde\x00\x20\xa6params\x82" + bytes(99), "is Flax's weights"),
        ("model.weights.keras", b"PK\x03\x04" + bytes(99), "is Keras' weights"),
        ("rust_model.ot", b"PK\x03\x04" + bytes(99), "is weights of Rust's PyTorch"),
        ("openvino_model.bin", bytes(range(256)), "is an OpenVINO model"),
    ],
)
def test_other_formats_are_called_so_under_any_name(
    name: str, content: bytes, says: str, whole: Path, tmp_path: Path, store: Path
) -> None:
    shutil.copytree(whole / "clip", tmp_path / "clip")
    if name.startswith("openvino"):  # beside weights it is in nobody's way
        (tmp_path / "clip" / name).write_bytes(content)
        add(tmp_path / "clip", None)
        shutil.rmtree(store)
    (tmp_path / "clip/model.safetensors").unlink()
    (tmp_path / "clip" / name).write_bytes(content)
    for given in (tmp_path / "clip", tmp_path / "clip" / name):
        with pytest.raises(BackboneError, match=says):
            add(given, None if given.is_dir() else "random-small")
    assert not store.exists()


def test_a_network_that_computes_nothing_is_refused_in_our_words(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    for tower in ("encode_image", "encode_text"):
        with monkeypatch.context() as patch:
            patch.setattr(open_clip.CLIP, tower, fail)
            with pytest.raises(BackboneError, match="cannot compute the features of"):
                load_backbone(Backbone(model="hf-hub:a/b", weights="pretrained"), whole / "clip")


def test_hub_libraries_are_offline_while_a_local_form_is_read(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, bool] = {}

    def spied(name: str) -> None:
        original = getattr(backbone_form, name)

        def spy(*arguments: Any, **options: Any) -> Any:
            seen[name] = constants.HF_HUB_OFFLINE
            return original(*arguments, **options)

        monkeypatch.setattr(backbone_form, name, spy)

    for name in ("read_tokenizer", "ClipTokens", "read_text_model", "read_own_tokenizer"):
        spied(name)
    make_random_checkpoint("random-small", 0, tmp_path / "small.safetensors")
    add(tmp_path / "small.safetensors", "random-small")
    kept, _ = add(whole / "bert", "hf-hub:a/b")
    load_backbone(Backbone(model="hf-hub:a/b", weights="pretrained"), kept)
    assert seen == dict.fromkeys(seen, True)
    assert len(seen) == 4
    assert constants.HF_HUB_OFFLINE is False


# --- checkpoints ---


def small(folder: Path) -> dict[str, torch.Tensor]:
    make_random_checkpoint("random-small", 0, folder / "small.safetensors")
    return dict(safetensors.torch.load_file(folder / "small.safetensors"))


def test_averages_beside_the_last_weights_are_not_passed_over(tmp_path: Path) -> None:
    state = small(tmp_path)
    moved = {name: value + 1 for name, value in state.items()}
    few = {"logit_scale": moved["logit_scale"]}
    for name, content, says in (
        ("model and ema", {"model": state, "ema": moved}, "differ, model and ema"),
        ("state_dict and model_ema", {"state_dict": state, "model_ema": moved}, "differ, state_dict and model_ema"),
        ("deep", {"ema": {"state_dict": moved}, "model": state}, "differ, model and ema.state_dict"),
        ("a list", {"model": state, "ema": {"shadow_params": list(moved.values())}}, "model and ema.shadow_params"),
        (
            "a part",
            {"model": {f"module.{k}": v for k, v in state.items()}, "tuned": {"ln_final.bias": moved["ln_final.bias"]}},
            "differ, model and tuned",
        ),
        (
            "its own",
            {**{f"model.{k}": v for k, v in state.items()}, **{f"ema.{k}": v for k, v in moved.items()}},
            "twi",
        ),
    ):
        torch.save(content, tmp_path / "x.pt")
        with pytest.raises(BackboneError, match=says):
            add(tmp_path / "x.pt", "random-small")
        assert name
    text = {k: v for k, v in moved.items() if not k.startswith("visual.")}
    under = {f"model.{k}": v for k, v in state.items()}
    for name, part in (
        ("the text tower", {f"best.{k}": v for k, v in text.items()}),
        ("one tensor", {"best.model.ln_final.bias": moved["ln_final.bias"]}),
        ("plain names", {"visual.proj": moved["visual.proj"]}),
        (
            "one moved among equal ones",
            {f"best.{k}": state[k] for k in text} | {"best.ln_final.bias": text["ln_final.bias"]},
        ),
    ):
        torch.save(under | part, tmp_path / "x.pt")
        with pytest.raises(BackboneError, match=r"holds a part of the model twice, under model and (best|\(nothing\))"):
            add(tmp_path / "x.pt", "random-small")
        assert name
    other = {f"best.{k}": v for k, v in text.items()} | {"best.visual.proj": torch.ones(3, 3)}
    torch.save(under | other, tmp_path / "x.pt")  # as a teacher with another image tower
    assert "best." in add(tmp_path / "x.pt", "random-small")[1].form.told[0]
    right = load_backbone(Backbone(model="random-small", weights="random", seed=0), tmp_path / "small.safetensors")
    others = {
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}},
        "head": {"weight": torch.ones(2, 3)},
        "loss": few,
    }
    torch.save({"model": state, "ema": dict(state), **others}, tmp_path / "same.pt")
    added = add(tmp_path / "same.pt", "random-small")[1]
    assert added.digest == right.digest
    assert "beside the model, 2 tensors (head.weight, loss.logit_scale)" in added.form.told[0]


def test_equal_copies_of_the_model_are_one_model(tmp_path: Path) -> None:
    state = small(tmp_path)
    right = load_backbone(Backbone(model="random-small", weights="random", seed=0), tmp_path / "small.safetensors")
    before = {f"module.{k}": v for k, v in state.items()}
    for content in (
        state | before,
        before | state,
        {f"model.{k}": v for k, v in state.items()} | {f"best.{k}": v for k, v in state.items() if "visual" not in k},
        {"model": state, "ema": {f"module.{k}": v for k, v in state.items()}},
        state | {f"_orig_mod.{k}": v for k, v in state.items()},
        {"best": state, "last": dict(state)},
        {k.replace("visual.", "visual.module."): v for k, v in state.items()},
    ):
        torch.save(content, tmp_path / "x.pt")
        added = add(tmp_path / "x.pt", "random-small")[1]
        assert (added.digest, added.form.told) == (right.digest, [])


def test_tensors_beside_the_table_of_the_model_do_not_hide_it_and_are_told(tmp_path: Path) -> None:
    state = small(tmp_path)
    right = load_backbone(Backbone(model="random-small", weights="random", seed=0), tmp_path / "small.safetensors")
    lone = torch.tensor(0.07)
    two = {"temperature": lone, "class_features": torch.ones(3, 16)}
    for content, names in (
        ({"model": state, "temperature": lone}, ["temperature"]),
        ({"logit_scale": torch.tensor(9.0), "state_dict": state, "epoch": 3}, ["logit_scale"]),
        ({"model": state} | two, ["temperature", "class_features"]),
        (two | {"net": {f"module.{name}": value for name, value in state.items()}}, ["temperature", "class_features"]),
        ({"model": {"state_dict": state, "temperature": lone}}, ["model.temperature"]),
        ({"state_dict": {"proj": torch.ones(2, 2)}, "model": state}, ["state_dict.proj"]),
        ({"clip": state} | two, ["temperature", "class_features"]),
        (state | {"head": {"proj": torch.ones(2, 2)}}, ["head.proj"]),
    ):
        torch.save(content, tmp_path / "x.pt")
        added = add(tmp_path / "x.pt", "random-small")[1]
        assert added.digest == right.digest
        (told,) = added.form.told
        assert f"beside the model, {len(names)} tensors ({', '.join(sorted(names, key=told.index))})" in told


def test_what_a_training_keeps_of_itself_is_not_told(tmp_path: Path) -> None:
    state = small(tmp_path)
    score = torch.tensor(0.9)
    lightning = {
        "state_dict": {f"model.{name}": value for name, value in state.items()},
        "callbacks": {
            "ModelCheckpoint{'monitor': 'val.loss'}": {
                "best_model_score": score,
                "current_score": score,
                "best_k_models": {"/x/epoch=1.ckpt": score},
            }
        },
        "loops": {"fit_loop": {"state": torch.ones(3)}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}}],
    }
    scaled = {"model": state, "lr_scheduler": {"rate": torch.tensor(0.1)}, "grad_scaler": {"scale": torch.tensor(2.0)}}
    generator = {"model": state, "rng_state": torch.zeros(99, dtype=torch.uint8), "epoch": torch.tensor(3)}
    averaged = {"n_averaged": torch.tensor(7)} | {f"module.{name}": value for name, value in state.items()}
    for content in (lightning, generator, averaged, scaled):
        torch.save(content, tmp_path / "x.pt")
        assert add(tmp_path / "x.pt", "random-small")[1].form.told == []
    lightning["callbacks"] = {"EMA": {"weights": {name: value + 1 for name, value in state.items()}}}
    torch.save(lightning, tmp_path / "x.pt")
    with pytest.raises(BackboneError, match=r"that differ, state_dict and callbacks\.EMA\.weights"):
        add(tmp_path / "x.pt", "random-small")


def test_of_a_model_without_prefix_an_equal_copy_of_a_part_is_passed_over(tmp_path: Path) -> None:
    state = small(tmp_path)
    right = load_backbone(Backbone(model="random-small", weights="random", seed=0), tmp_path / "small.safetensors")
    text = {name: value for name, value in state.items() if not name.startswith("visual.")}
    for prefix, part in (
        ("text_copy.", text),
        ("ema.module.", state),
        ("best.", {"visual.proj": state["visual.proj"]}),
    ):
        torch.save(state | {f"{prefix}{name}": value for name, value in part.items()}, tmp_path / "x.pt")
        assert add(tmp_path / "x.pt", "random-small")[1].digest == right.digest
    text["ln_final.bias"] = text["ln_final.bias"] + 1
    torch.save(state | {f"text_copy.{name}": value for name, value in text.items()}, tmp_path / "x.pt")
    with pytest.raises(
        BackboneError, match=r"are not the model's \(text_copy.*save the model's state_dict\(\) by itse"
    ):
        add(tmp_path / "x.pt", "random-small")


@pytest.mark.parametrize("kind", ["F4", "F6_E2M3", "F6_E3M2", "F8_E8M0", "F8_E4M3FNUZ", "I4"])
def test_types_of_few_bits_are_quantised_weights_whatever_they_are_called(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file(small(tmp_path), path)
    (length,) = struct.unpack("<Q", path.read_bytes()[:8])
    header = json.loads(path.read_bytes()[8 : 8 + length])
    header["visual.proj"]["dtype"] = kind
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + path.read_bytes()[8 + length :])
    with pytest.raises(BackboneError, match=rf"quantised weights \(visual\.proj, {kind}\); expected float32, float16"):
        add(path, "random-small")


@pytest.mark.parametrize("form", ["clip", "model"])
def test_what_lies_in_a_table_of_its_own_beside_the_model_is_told(form: str, whole: Path, tmp_path: Path) -> None:
    if form == "clip":
        shutil.copytree(whole / "clip", tmp_path / "given")
        state = safetensors.torch.load_file(tmp_path / "given/model.safetensors")
        (tmp_path / "given/model.safetensors").unlink()
        path, name = tmp_path / "given/pytorch_model.bin", None
    else:
        (tmp_path / "given").mkdir()
        state, name = small(tmp_path), "random-small"
        path = tmp_path / "given/x.pt"
    given = path.parent if form == "clip" else path
    adapter = {f"adapter.{number}.weight": torch.ones(3, 16) for number in range(5)}
    for content, says in (
        ({"state_dict": state, "adapter": adapter}, "5 tensors (adapter.adapter.0.weight, adapter.adapter.1.weight"),
        ({"adapter": {"w": torch.ones(2)}, "state_dict": state}, "1 tensors (adapter.w)"),
        (
            {"model": {f"module.{k}": v for k, v in state.items()}, "x": {"proj": {"w": torch.ones(2)}}},
            "1 tensors (x.proj.w)",
        ),
        ({"net": state, "a": [torch.ones(2)]}, "1 tensors (a.0)"),
        (
            {"model": {f"clip.{k}": v for k, v in state.items()} | {"a.w": torch.ones(2)}, "b": {"w": torch.ones(2)}},
            "2 tensors (a.w, b.w)",
        ),
    ):
        torch.save(content, path)
        (told,) = add(given, name)[1].form.told
        assert f"beside the model, {says}" in told, told
    torch.save({"state_dict": state, "optimizer": {"state": {"0": {"m": torch.ones(2)}}}, "epoch": 3}, path)
    assert add(given, name)[1].form.told == []


class Whole(torch.nn.Module):
    """A model that a program pickled as it is."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__()
        for name, value in tensors.items():
            self.register_buffer(name.replace(".", "|"), value)

    def state_dict(self, *_: Any, **__: Any) -> Any:
        return {name.replace("|", "."): value for name, value in super().state_dict().items()}


@pytest.mark.parametrize("wrap", [lambda model: model, lambda model: {"model": model, "epoch": 3}], ids=["bare", "in"])
def test_the_lines_that_are_given_make_safetensors_of_a_pickled_model(wrap: Any, tmp_path: Path) -> None:
    state = small(tmp_path)
    torch.save(wrap(Whole(state)), tmp_path / "whole.pt")
    with pytest.raises(BackboneError) as refused:
        add(tmp_path / "whole.pt", "random-small")
    assert "weights_only" not in str(refused.value)
    program = "\n".join(line[2:] for line in str(refused.value).splitlines()[1:])
    for name in ("whole.pt", "whole.safetensors"):
        program = program.replace(repr(name), repr(str(tmp_path / name)))
    exec(program, {})
    added = add(tmp_path / "whole.safetensors", "random-small")[1]
    named = Backbone(model="random-small", weights="random", seed=0)
    assert added.digest == load_backbone(named, tmp_path / "small.safetensors").digest


@pytest.mark.parametrize("protocol", [4, 5])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old"])
def test_a_newer_pickle_of_tensors_alone_is_not_said_to_hold_code(protocol: int, zipped: bool, tmp_path: Path) -> None:
    state = small(tmp_path)
    path = tmp_path / "x.pt"
    torch.save({"state_dict": state}, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    with pytest.raises(BackboneError) as refused:
        add(path, "random-small")
    text = str(refused.value)
    assert "is written in pickle protocol 4 or newer, of which torch's safe reader" in text
    assert "code" not in text.replace("pickle_module", "")
    program = "\n".join(line[2:] for line in text.splitlines()[1:])
    for name in ("x.pt", "x.safetensors"):
        program = program.replace(repr(name), repr(str(tmp_path / name)))
    exec(program, {})
    named = Backbone(model="random-small", weights="random", seed=0)
    right = load_backbone(named, tmp_path / "small.safetensors")
    assert add(tmp_path / "x.safetensors", "random-small")[1].digest == right.digest


def test_a_pickle_with_an_operand_that_no_protocol_has_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(b"\x80\x02\xff" + bytes(40))
    with pytest.raises(BackboneError, match="is damaged or cut off"):
        add(tmp_path / "x.pt", "random-small")


@pytest.mark.parametrize("kind", [torch.complex64, torch.bool, torch.int64, torch.int8, torch.int32, torch.uint16])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_values_of_another_type_are_called_by_it(kind: torch.dtype, suffix: str, tmp_path: Path) -> None:
    state = small(tmp_path)
    state["visual.proj"] = state["visual.proj"].to(kind)
    path = tmp_path / f"x{suffix}"
    torch.save(state, path) if suffix == ".pt" else safetensors.torch.save_file(state, path)
    quantised = kind in (torch.int8, torch.int32, torch.uint16)
    name = str(kind).removeprefix("torch.")
    says = rf"quantised weights \(visual.proj, {name}\)" if quantised else f"values of type {name} in visual.proj"
    with pytest.raises(BackboneError, match=says) as refused:
        add(path, "random-small")
    assert ("quantised" in str(refused.value)) == quantised


def test_files_of_tensorflow_and_numpy_are_called_so(tmp_path: Path, store: Path) -> None:
    import numpy as np

    np.savez(tmp_path / "made.npz", a=np.ones(3), b=np.ones(2))
    np.save(tmp_path / "made.npy", np.ones(3))
    archive, array = (tmp_path / "made.npz").read_bytes(), (tmp_path / "made.npy").read_bytes()
    for name, content, says in (
        ("model.ckpt.data-00000-of-00001", bytes(range(1, 200)), "is TensorFlow's weights"),
        ("model.ckpt-30.data-00001-of-00002", bytes(range(1, 200)), "is TensorFlow's weights"),
        ("variables.data-00000-of-00001", bytes(range(1, 200)), "is TensorFlow's weights"),
        ("model.ckpt.index", bytes(range(1, 200)), "is TensorFlow's weights"),
        ("saved_model.pb", b"\x08\x01" * 20, "is TensorFlow's weights"),
        ("pytorch_model.bin", archive, "is a numpy archive"),
        ("weights.pt", array, "is a numpy array"),
    ):
        folder = tmp_path / f"of {name}"
        folder.mkdir()
        (folder / name).write_bytes(content)
        for given, model in ((folder / name, None), (folder / name, "random-small"), (folder, "random-small")):
            with pytest.raises(BackboneError, match=says) as refused:
                add(given, model)
            assert "expected safetensors or PyTorch weights of the same model" in str(refused.value)
    folder = tmp_path / "all"
    folder.mkdir()
    for name in ("checkpoint", "model.ckpt.index", "model.ckpt.data-00000-of-00001"):
        (folder / name).write_bytes(bytes(range(1, 99)))
    with pytest.raises(BackboneError, match="is TensorFlow's weights"):
        add(folder, None)
    assert not store.exists()


def test_nothing_of_torchs_own_is_said_before_our_sentence(tmp_path: Path, secfacmic: Run) -> None:
    (tmp_path / "four.pt").write_bytes(pickle.dumps({"a": 1}, protocol=4))
    torch.save({"x": small(tmp_path)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False, pickle_protocol=4)
    (tmp_path / "cut.pt").write_bytes((tmp_path / "old.pt").read_bytes()[:3000])
    for name in ("four.pt", "cut.pt"):
        with warnings.catch_warnings(record=True) as shown:
            warnings.simplefilter("always")
            code, _, errors = secfacmic("backbone", "add", tmp_path / name, "--model", "random-small")
        assert code == 30
        assert errors.startswith("secfacmic: "), errors
        assert [str(one.message) for one in shown if "pickle" in str(one.message)] == []


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (lambda: torch.quantize_per_tensor(torch.ones(3, 3), 0.1, 0, torch.qint8), "quantised weights"),
        (lambda: torch.ones(3, 3).to_sparse(), "in a sparse form"),
        (lambda: torch.ones(3, 3, device="meta"), "without values"),
        (lambda: torch.ones(3, 3, dtype=torch.complex64), "have other shapes"),
    ],
    ids=["quantised", "sparse", "meta", "complex"],
)
@pytest.mark.filterwarnings("ignore")
def test_tensors_that_hold_no_plain_values_are_refused(value: Any, says: str, tmp_path: Path) -> None:
    state = small(tmp_path)
    torch.save(state | {"visual.proj": value()}, tmp_path / "x.pt")
    with pytest.raises(BackboneError, match=says):
        add(tmp_path / "x.pt", "random-small")


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [-1]},
        {"shape": ["3"]},
        {"shape": [2**40, 2**40]},
        {"dtype": "F4"},
        {"data_offsets": [0]},
        {"data_offsets": "ab"},
        {"data_offsets": [8, 4]},
        {"dtype": None},
    ],
)
def test_a_header_of_safetensors_that_lies_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | change}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(BackboneError, match="header"):
        read_weights(path)


def tensor_file(path: Path, entries: list[tuple[str, int, int]], size: int) -> Path:
    """A safetensors file with a header of these names, begins and ends, all of float32."""
    parts = [
        f'"{name}": {{"dtype": "F32", "shape": [{(end - begin) // 4}], "data_offsets": [{begin}, {end}]}}'
        for name, begin, end in entries
    ]
    header = f"{{{', '.join(parts)}}}".encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(size))
    return path


@pytest.mark.parametrize(
    ("entries", "size", "says"),
    [
        ([("a", 0, 8), ("b", 4, 12)], 12, "b begins within the one before, at 4 where 8 was expected"),
        ([("a", 0, 8), ("b", 0, 8)], 8, "b begins within the one before, at 0"),
        ([("a", 0, 8), ("b", 12, 20)], 20, "b leaves a hole before 12 where 8 was expected"),
        ([("a", 4, 8)], 8, "a leaves a hole before 4"),
        ([("a", 0, 8), ("b", 8, 12)], 1212, "1,200 bytes follow its last tensor"),
        ([], 3, "3 bytes follow its last tensor"),
        ([("a", 0, 8), ("a", 8, 16)], 16, "a stands in it twice"),
    ],
)
def test_each_byte_of_safetensors_is_of_one_tensor(
    entries: list[tuple[str, int, int]], size: int, says: str, tmp_path: Path
) -> None:
    path = tensor_file(tmp_path / "x.safetensors", entries, size)
    with pytest.raises(BackboneError, match=says):
        read_weights(path)


def test_values_that_float16_holds_are_turned_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large model whose values all fit would otherwise be held once and a half while it is added."""
    tensors = {str(number): torch.full((3, 5), float(number)) for number in range(8)}
    tensors |= {"odd": torch.tensor([1e-9]), "large": torch.tensor([1e6]), "whole": torch.arange(3)}
    held: list[int] = []

    def halves() -> int:
        return sum(type(one) is torch.Tensor and one.dtype == torch.float16 for one in gc.get_objects())

    before = halves()

    class Watched(io.BytesIO):
        def write(self, data: Any) -> int:
            held.append(halves() - before)
            return super().write(data)

    stream = Watched()
    monkeypatch.setattr("secure_fed.model.safetensors_file.durable", lambda path: contextlib.nullcontext(stream))
    write_weights(tmp_path / "x.safetensors", tensors, halved=True)
    (tmp_path / "x.safetensors").write_bytes(stream.getvalue())
    found = read_weights(tmp_path / "x.safetensors")
    assert max(held) <= 1
    assert {name for name, value in found.items() if value.dtype == torch.float16} == set("01234567")
    assert all(torch.equal(found[name].to(value.dtype), value) for name, value in tensors.items())


def test_tensors_in_any_order_and_without_a_byte_are_read(tmp_path: Path) -> None:
    path = tensor_file(tmp_path / "x.safetensors", [("b", 8, 12), ("none", 8, 8), ("a", 0, 8), ("last", 12, 12)], 12)
    assert {name: value.numel() for name, value in read_weights(path).items()} == {"a": 2, "b": 1, "none": 0, "last": 0}


@pytest.mark.parametrize(
    ("form", "name"),
    [
        ("clip", "text_model.encoder.layers.0.self_attn.q_proj.weight"),
        ("siglip", "vision_model.head.attention.in_proj_weight"),
    ],
)
def test_parts_that_do_not_go_together_are_refused(form: str, name: str, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole / form, tmp_path / "given")
    tensors = safetensors.torch.load_file(tmp_path / "given/model.safetensors")
    tensors[name] = torch.tensor(1.0)
    safetensors.torch.save_file(tensors, tmp_path / "given/model.safetensors")
    with pytest.raises(BackboneError, match="shapes that no such model has"):
        add(tmp_path / "given", None)


def test_a_folder_is_known_by_its_name_from_within(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(whole / "clip", tmp_path / "carried")
    monkeypatch.chdir(tmp_path / "carried")
    kept, added = add(Path(), None)
    assert added.form.model == backbone_store.read_entry(kept).source == "carried"


def test_sizes_of_openais_archives_beside_weights_are_passed_over(tmp_path: Path) -> None:
    sizes = {"input_resolution": 96, "context_length": 77, "vocab_size": 49408}
    state = small(tmp_path) | {name: torch.tensor(value) for name, value in sizes.items()}
    torch.save(state, tmp_path / "x.pt")
    named = Backbone(model="random-small", weights="random", seed=0)
    right = load_backbone(named, tmp_path / "small.safetensors")
    assert add(tmp_path / "x.pt", "random-small")[1].digest == right.digest


def test_a_scale_that_no_training_gives_is_refused(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole / "clip", tmp_path / "clip")
    tensors = safetensors.torch.load_file(tmp_path / "clip/model.safetensors")
    tensors["logit_scale"].fill_(900.0)
    safetensors.torch.save_file(tensors, tmp_path / "clip/model.safetensors")
    with pytest.raises(BackboneError, match="a logit_scale of 900"):
        add(tmp_path / "clip", None)


# --- how long it takes ---


def test_the_time_that_is_told_leaves_out_the_first_image_and_counts_a_batch(
    whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_backbone(Backbone(model="hf-hub:a/b", weights="pretrained"), whole / "clip")
    asked: list[int] = []

    def seconds(_: LoadedBackbone, prepared: list[Any]) -> float:
        asked.append(len(prepared))
        return 50.0 if len(asked) == 1 else 0.1 + 0.4 * len(prepared)

    from PIL import Image

    prepare, slow = loaded.prepare, [1.0, 0.0]

    def slow_at_first(image: Any) -> Any:
        time.sleep(slow[0] if len(slow) == 1 else slow.pop(0))
        return prepare(image)

    monkeypatch.setattr(LoadedBackbone, "_seconds", seconds)
    monkeypatch.setattr(loaded, "prepare", slow_at_first)
    told = loaded.seconds_per_image([Image.new("RGB", (40, 50))])
    assert asked == [1, 1, 4]
    assert told == pytest.approx(1.7 / 4, abs=0.05)


def test_models_that_open_clip_knows_pass_our_ranges() -> None:
    from secure_fed.model.library import known_model
    from secure_fed.model.model_config import check_model_config

    for name in open_clip.list_models():
        check_model_config(known_model(name), name)


NULLS: list[tuple[str, ...]] = [
    ("text_cfg", "hf_model_name"),
    ("text_cfg", "hf_tokenizer_name"),
    ("text_cfg", "act_kwargs"),
    ("vision_cfg", "timm_model_name"),
    ("vision_cfg", "ls_init_value"),
    ("multimodal_cfg",),
    ("init_logit_bias",),
]


@pytest.mark.parametrize("key", [*NULLS, None], ids=str)
def test_a_null_is_what_is_null_where_nothing_is_said(key: tuple[str, ...] | None, tmp_path: Path) -> None:
    own_folder(tmp_path / "plain")
    path = tmp_path / "plain/open_clip_config.json"
    plain = add(tmp_path / "plain", None)[1].id
    for table in NULLS if key is None else [key]:
        inside(path.name, "model_cfg", *table[:-1], **{table[-1]: None})(path.parent)
    assert add(tmp_path / "plain", None)[1].id == plain


@pytest.mark.parametrize("key", [("text_cfg", "pool_type"), ("vision_cfg", "layers"), ("text_cfg", "no_causal_mask")])
def test_a_null_that_would_say_something_else_is_refused(key: tuple[str, str], tmp_path: Path) -> None:
    own_folder(tmp_path / "plain")
    inside("open_clip_config.json", "model_cfg", key[0], **{key[1]: None})(tmp_path / "plain")
    with pytest.raises(BackboneError, match=rf"{key[0]}\.{key[1]}"):
        add(tmp_path / "plain", None)

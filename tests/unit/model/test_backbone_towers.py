"""Towers that are not open_clip's own, and OpenAI's archive, against what open_clip itself computes of them."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import tokenizers
import torch

from secure_fed.core.errors import BackboneError
from secure_fed.model import network
from secure_fed.model.backbone import load_given
from secure_fed.model.backbone_fetch import add
from secure_fed.model.backbone_form import read_form
from secure_fed.model.library import known_model, twin
from secure_fed.model.model_config import check_model_config
from secure_fed.model.network import make_network
from tests.conftest import models_as_found
from tests.unit.model.test_backbone import _Archive
from tests.unit.model.test_backbone_forms import OWN, TEXTS, furthest, of_open_clip, pictures, same, scale_up, taken
from tests.unit.model.test_tokenizers import nllb, roberta, t5, xlm

pytestmark = pytest.mark.usefixtures("store")

torch.set_num_threads(1)

HOW = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.4, 0.3], "interpolation": "bicubic", "resize_mode": "shortest"}


def written(folder: Path, config: dict[str, Any]) -> None:
    """A model of this configuration with random weights, scaled so that what is wrong shows."""
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": HOW}))
    torch.manual_seed(0)
    network = open_clip.create_model(f"local-dir:{folder}", pretrained_text=False, load_weights=False)
    scale_up(network)
    torch.save(network.state_dict(), folder / "open_clip_pytorch_model.bin")


def text_config(kind: str, vocabulary: int) -> Any:
    from transformers import M2M100Config, MT5Config, RobertaConfig, XLMRobertaConfig

    if kind == "mt5":
        return MT5Config(vocab_size=vocabulary, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    if kind == "m2m_100":
        sizes = {f"{tower}_{what}": size for tower in ("encoder", "decoder") for what, size in SIZES.items()}
        return M2M100Config(vocab_size=vocabulary, d_model=32, max_position_embeddings=40, **sizes)
    berts = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    made = {"roberta": RobertaConfig, "xlm-roberta": XLMRobertaConfig}[kind]
    return made(vocab_size=vocabulary, max_position_embeddings=40, pad_token_id=1, **berts)


SIZES = {"layers": 2, "attention_heads": 4, "ffn_dim": 48}
TEXT_MODELS: dict[str, tuple[Callable[[Path], None], str]] = {
    "roberta": (roberta, "mean_pooler"),
    "xlm-roberta": (xlm, "mean_pooler"),
    "mt5": (t5, "mean_pooler"),
    "m2m_100": (nllb, "cls_pooler"),
}


def text_folder(place: Path, kind: str) -> tuple[Path, Path]:
    """A small CLIP with a text tower of that kind in open_clip's form, and the folder of its text model."""
    make, pooler = TEXT_MODELS[kind]
    folder, text = place / "clip", place / "text"
    folder.mkdir()
    make(text)
    text_config(kind, tokenizers.Tokenizer.from_file(str(text / "tokenizer.json")).get_vocab_size()).save_pretrained(
        text
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(text / name, folder)
    names = {"hf_model_name": str(text), "hf_tokenizer_name": str(text)}
    how = {"hf_proj_type": "mlp", "hf_pooler_type": pooler, "context_length": 20}
    written(folder, OWN | {"text_cfg": names | how})
    return folder, text


@pytest.mark.parametrize("kind", TEXT_MODELS)
def test_each_text_model_that_open_clip_builds_is_open_clips_own(kind: str, tmp_path: Path) -> None:
    folder, text = text_folder(tmp_path, kind)
    expected = of_open_clip(folder)
    loaded = taken(folder, "hf-hub:fake/clip", None, text)
    same(loaded, expected)
    assert loaded.facts["text"]["model"]["type"] == kind


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("mt5", {"layer_norm_epsilon": 0.1}),
        ("mt5", {"dense_act_fn": "relu"}),
        ("mt5", {"relative_attention_max_distance": 3}),
        ("m2m_100", {"scale_embedding": False}),
        ("m2m_100", {"encoder_attention_heads": 2}),
        ("m2m_100", {"activation_function": "gelu"}),
        ("xlm-roberta", {"num_attention_heads": 2}),
    ],
)
def test_what_no_shape_tells_of_a_text_model_is_in_the_id(kind: str, change: dict[str, Any], tmp_path: Path) -> None:
    folder, text = text_folder(tmp_path, kind)
    _, right = add(folder, "hf-hub:fake/clip", None, text)
    content = json.loads((text / "config.json").read_text())
    (text / "config.json").write_text(json.dumps(content | change))
    _, wrong = add(folder, "hf-hub:fake/clip", None, text)
    assert (wrong.digest == right.digest, wrong.id == right.id) == (True, False)
    assert furthest(right, wrong)[1] > 1e-4


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("test_vit", {"timm_pool": "token", "timm_proj": "linear"}),
        ("test_vit", {"timm_pool": "avg", "timm_proj": "mlp"}),
        ("test_vit2", {"timm_pool": "", "timm_proj": "linear"}),
        ("test_convnext", {"timm_pool": "", "timm_proj": "linear"}),
        ("test_efficientnet", {"timm_pool": "abs_attn", "timm_proj": "linear"}),
    ],
)
def test_an_image_tower_of_timm_is_open_clips_own(name: str, head: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "clip"
    folder.mkdir()
    vision = {"timm_model_name": name, "timm_model_pretrained": False, "image_size": 64}
    written(folder, OWN | {"vision_cfg": vision | head})
    expected = of_open_clip(folder)
    same(taken(folder, "hf-hub:fake/clip"), expected)


@pytest.mark.filterwarnings("ignore")
def test_openais_archive_is_what_open_clip_loads_of_it(tmp_path: Path) -> None:
    name = "tiny-openai-quickgelu"
    size = {"layers": 2, "width": 64}
    towers = {
        "vision_cfg": size | {"image_size": 32, "patch_size": 8, "head_width": 64},
        "text_cfg": size | {"context_length": 77, "vocab_size": 49408, "heads": 1},
    }
    config = {"embed_dim": 32, "quick_gelu": True} | towers
    (tmp_path / f"{name}.json").write_text(json.dumps(config))
    with models_as_found():
        open_clip.add_model_config(tmp_path / f"{name}.json")
        made = make_network(config, empty=False)
        scale_up(made)
        half = {key: value.half() for key, value in made.state_dict().items()}
        sizes = {"input_resolution": 32, "context_length": 77, "vocab_size": 49408}
        path = tmp_path / "openai.pt"
        archive = _Archive(half | {key: torch.tensor(value) for key, value in sizes.items()})
        torch.jit.save(torch.jit.script(archive), path)
        theirs = open_clip.load_openai_model(str(path), precision="fp32", device="cpu").eval()
        preprocess = open_clip.image_transform(
            theirs.visual.image_size, is_train=False, mean=theirs.visual.image_mean, std=theirs.visual.image_std
        )
        pixels, tokens = torch.stack([preprocess(one) for one in pictures()]), open_clip.tokenize(TEXTS)
        with torch.inference_mode():
            images, texts = theirs.encode_image(pixels, normalize=True), theirs.encode_text(tokens, normalize=True)
        loaded = taken(path, name)
        same(loaded, (pixels.numpy(), tokens.numpy(), images.numpy(), texts.numpy()))
        assert loaded.activation == "quickgelu"


@pytest.mark.slow
def test_each_model_that_open_clip_names_is_read_from_a_checkpoint_or_named_with_what_it_lacks(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"x": torch.ones(2)}, path)
    counts: Counter[str] = Counter()
    for model in open_clip.list_models():
        config = known_model(model)
        check_model_config(config, model)
        quick = twin(model) and ("quickgelu" if model.endswith("-quickgelu") else "gelu")
        text, tokenizer = (config["text_cfg"].get(f"hf_{part}_name") for part in ("model", "tokenizer"))
        lacks = f"the text tower of {model} is {text}" if text else f"its tokenizer, that of {tokenizer}, is not here"
        if text or tokenizer:
            with pytest.raises(BackboneError, match=rf"{lacks}.*hf download {text or tokenizer} "):
                read_form(path, model, None, quick or None)
        else:
            assert read_form(path, model, None, quick or None).model == model
        counts["text tower" if text else "tokenizer" if tokenizer else "nothing"] += 1
        if not text:
            assert network._shapes(config), model
    assert counts["nothing"] > counts["tokenizer"] > counts["text tower"] > 0  # of 3.3.0: 97, 39, 10


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "model",
    [
        *("convnext_tiny", "EVA02-B-16", "MobileCLIP2-S0", "MobileCLIP2-S2", "MobileCLIP-B", "MobileCLIP-S1"),
        *("PE-Core-T-16-384", "RN50", "RN50-quickgelu", "ViT-B-32", "ViT-B-32-quickgelu", "ViT-M-32-alt", "ViT-S-16"),
    ],
)
def test_a_model_by_its_name_has_open_clips_own_features_in_its_own_size(model: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = open_clip.create_model(model).eval()
    torch.save({"state_dict": theirs.state_dict()}, tmp_path / "x.pt")
    quick = twin(model) and ("quickgelu" if model.endswith("-quickgelu") else "gelu")
    loaded = load_given(tmp_path / "x.pt", model, quick or None, exact=True)[0]
    pixels = torch.from_numpy(np.stack([loaded.prepare(one) for one in pictures()[:2]]))
    with torch.inference_mode():
        images = theirs.encode_image(pixels, normalize=True).numpy()
        texts = theirs.encode_text(open_clip.tokenize(TEXTS, theirs.context_length), normalize=True).numpy()
    np.testing.assert_allclose(loaded.encode_images(pictures()[:2]), images, atol=1e-6)
    np.testing.assert_allclose(loaded.encode_texts(TEXTS), texts, atol=1e-6)

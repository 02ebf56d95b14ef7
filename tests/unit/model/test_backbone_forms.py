"""Each form of a CLIP against the library that it is for: features, tokens, pixels; and what must be noticed."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from secure_fed.model import backbone_store
from secure_fed.model.backbone import LoadedBackbone, load_backbone
from secure_fed.model.backbone_fetch import add
from secure_fed.protocol.study import Backbone

torch.set_num_threads(1)

TOLERANCE = 1e-4
TEXTS = ["a head with a mass", "An  x-ray, without MASS!", "the head", "mass " * 40]
WORDS = ["a", "an", "head", "mass", "with", "without", "x", "ray", "the", "-", ",", "!"]
SHAPES = [(50, 70), (71, 50), (33, 32), (32, 32), (47, 32), (200, 61), (64, 101)]
"""Of images, height and width; among them odd margins, which two libraries cut differently."""


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty store of this test's own, and no network."""

    def no_network(*_: Any) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setenv(backbone_store.PLACE, str(tmp_path / "store"))
    return tmp_path / "store"


def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(1)
    return [Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8)) for shape in SHAPES]


def scale_up(model: Any, factor: float = 3.0) -> None:
    """So far that a wrong activation, head count or epsilon shows."""
    torch.manual_seed(7)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim > 1:
                value.copy_(torch.randn_like(value) * factor / value.shape[-1] ** 0.5)
            elif "logit" not in name:
                value.add_(0.3 * torch.randn_like(value))
            if "embedding" in name or "embeddings" in name:
                value.mul_(0.01)  # near epsilon, so that it counts


# --- small models of transformers ---


def clip_tokenizer(folder: Path) -> Any:
    from transformers import CLIPTokenizer

    letters = sorted({letter for word in WORDS for letter in word})
    vocabulary = {token: number for number, token in enumerate([*letters, *(f"{letter}</w>" for letter in letters)])}
    merges = [("h", "e"), ("m", "a"), ("he", "a"), ("s", "s</w>"), ("ma", "ss</w>"), ("t", "h")]
    for pair in merges:
        vocabulary["".join(pair)] = len(vocabulary)
    for token in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary[token] = len(vocabulary)
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges)
    tokenizer.save_pretrained(folder)
    return tokenizer


def clip_folder(folder: Path, act: str = "quick_gelu", **text: Any) -> tuple[Any, Any, Any]:
    """A small CLIP of transformers in a folder; model, tokenizer and image processor."""
    from transformers import CLIPConfig, CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    folder.mkdir(parents=True)
    tokenizer = clip_tokenizer(folder)
    size = len(tokenizer)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = CLIPConfig(
        text_config=sizes
        | {"vocab_size": size, "max_position_embeddings": 20, "hidden_act": act, "eos_token_id": size - 1}
        | text,
        vision_config=sizes | {"image_size": 32, "patch_size": 8, "hidden_act": act},
        projection_dim=16,
    )
    torch.manual_seed(0)
    model = CLIPModel(config).eval()
    scale_up(model)
    model.save_pretrained(folder)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor.save_pretrained(folder)
    return model, tokenizer, processor


def siglip_folder(folder: Path, act: str = "gelu_pytorch_tanh") -> tuple[Any, Any, Any]:
    """A small SigLIP of transformers in a folder, its tokenizer a SentencePiece model."""
    import sentencepiece
    from transformers import SiglipConfig, SiglipModel, SiglipTokenizer
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    folder.mkdir(parents=True)
    text = folder.parent / "corpus.txt"
    text.write_text("\n".join(" ".join(WORDS[i:] + WORDS[:i]).replace(" - ", "-") for i in range(len(WORDS))) * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "spiece"),
        vocab_size=40,
        pad_id=-1,
        bos_id=-1,
        eos_id=1,
        unk_id=2,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    tokenizer = SiglipTokenizer(str(folder / "spiece.model"), model_max_length=16)
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 50, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = SiglipConfig(
        text_config=sizes | {"vocab_size": 64, "max_position_embeddings": 16, "hidden_act": act},
        vision_config=sizes | {"image_size": 36, "patch_size": 9, "hidden_act": act},
    )
    torch.manual_seed(0)
    model = SiglipModel(config).eval()
    scale_up(model)
    model.save_pretrained(folder)
    processor = SiglipImageProcessorPil(size={"height": 36, "width": 36})
    processor.save_pretrained(folder)
    return model, tokenizer, processor


def of_transformers(model: Any, tokenizer: Any, processor: Any, length: int) -> tuple[Any, Any, Any, Any]:
    """Pixels, tokens, image and text features, as transformers itself computes them."""
    pixels = processor(pictures(), return_tensors="pt")["pixel_values"]
    tokens = tokenizer(TEXTS, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    with torch.inference_mode():
        images = model.get_image_features(pixel_values=pixels)
        texts = model.get_text_features(input_ids=tokens["input_ids"])
    images, texts = (getattr(one, "pooler_output", one) for one in (images, texts))
    unit = torch.nn.functional.normalize
    return pixels.numpy(), tokens["input_ids"].numpy(), unit(images, dim=-1).numpy(), unit(texts, dim=-1).numpy()


def same(loaded: LoadedBackbone, expected: tuple[Any, Any, Any, Any]) -> None:
    pixels, tokens, images, texts = expected
    std = np.array(loaded.form.preprocess["std"])[None, :, None, None]
    prepared = np.stack([loaded.prepare(one) for one in pictures()])
    assert np.abs((prepared - pixels) * std * 255).max() <= 1.01
    np.testing.assert_array_equal(loaded.tokenize(TEXTS), tokens)
    np.testing.assert_allclose(loaded.encode_images(pictures()), images, atol=TOLERANCE)
    np.testing.assert_allclose(loaded.encode_texts(TEXTS), texts, atol=TOLERANCE)


def taken(path: Path, *options: Any) -> LoadedBackbone:
    """A form, added and loaded again from the store."""
    _, added = add(path, *options)
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    backbone = Backbone(model=added.form.model, weights="file", file=path.name, digest=added.digest, id=added.id)
    loaded = load_backbone(backbone, None)
    assert loaded.id == added.id
    return loaded


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_a_clip_of_transformers_is_transformers_own(act: str, tmp_path: Path) -> None:
    model, tokenizer, processor = clip_folder(tmp_path / "clip", act)
    expected = of_transformers(model, tokenizer, processor, 20)
    loaded = taken(tmp_path / "clip", None)
    same(loaded, expected)
    assert loaded.activation == {"quick_gelu": "quickgelu", "gelu": "gelu"}[act]


def test_a_siglip_of_transformers_is_transformers_own(tmp_path: Path) -> None:
    model, tokenizer, processor = siglip_folder(tmp_path / "siglip")
    expected = of_transformers(model, tokenizer, processor, 16)
    loaded = taken(tmp_path / "siglip", None)
    same(loaded, expected)
    assert loaded.activation == "gelu_tanh"

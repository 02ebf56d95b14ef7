"""Each form of a CLIP against the library that it is for: features, tokens, pixels; and what must be noticed."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import safetensors.torch
import torch
from numpy.typing import NDArray
from PIL import Image

from secure_fed import configs
from secure_fed.core.errors import BackboneDigestError, BackboneError
from secure_fed.model import loaded_backbone, network, text_model, transformers_form
from secure_fed.model.backbone import load_backbone, make_random_checkpoint
from secure_fed.model.backbone_fetch import add
from secure_fed.model.backbone_form import read_form
from secure_fed.model.backbone_store import read_entry
from secure_fed.model.library import known_model, twin
from secure_fed.model.loaded_backbone import LoadedBackbone
from secure_fed.model.network import make_network
from secure_fed.protocol.study_tables import Backbone
from tests.conftest import models_as_found

pytestmark = pytest.mark.usefixtures("store")

torch.set_num_threads(1)

TOLERANCE = 1e-5
TEXTS = ["a head with a mass", "An  x-ray, without MASS!", "the head", "mass " * 40]
WORDS = ["a", "an", "head", "mass", "with", "without", "x", "ray", "the", "-", ",", "!"]
SHAPES = [(50, 70), (71, 50), (33, 32), (32, 32), (47, 32), (200, 61), (64, 101)]
"""Of images, height and width; among them odd margins, which two libraries cut differently."""


def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(1)
    return [Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8)) for shape in SHAPES]


def scale_up(model: Any) -> None:
    """So far that a wrong activation, head count, epsilon or pooler shows."""
    torch.manual_seed(7)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim > 1:
                inner = re.search(r"fc1|c_fc|intermediate", name)
                outer = re.search(r"fc2|c_proj|[0-9]\.output\.dense", name)
                factor = 1.0 if inner else 40 if outer else 3.0
                value.copy_(torch.randn_like(value) * factor / value.shape[-1] ** 0.5)
                if "embedding" in name:
                    value.mul_(0.01)  # near epsilon, so that it counts
            elif "logit" not in name:
                value.add_(0.3 * torch.randn_like(value))


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
    tokenizer = SiglipTokenizer(str(folder / "spiece.model"), model_max_length=16, model_input_names=["input_ids"])
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


def test_a_siglip_whose_tokenizer_masks_is_refused_as_transformers_makes_other_features_of_texts(
    tmp_path: Path, store: Path
) -> None:
    from transformers import AutoTokenizer

    model, _, _ = siglip_folder(tmp_path / "siglip")
    stated = json.loads((tmp_path / "siglip/tokenizer_config.json").read_text())
    del stated["model_input_names"]  # as in a folder that was put together by hand
    (tmp_path / "siglip/tokenizer_config.json").write_text(json.dumps(stated))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "siglip")
    given = tokenizer(TEXTS[:3], padding="max_length", truncation=True, return_tensors="pt")
    with torch.inference_mode():
        masked, plain = (
            model.get_text_features(**{key: given[key] for key in keys}).pooler_output
            for keys in (list(given), ["input_ids"])
        )
    assert float((masked - plain).abs().max()) > 10 * TOLERANCE
    with pytest.raises(BackboneError, match=r"expected that key.*write it in if the model was trained so"):
        add(tmp_path / "siglip", None)
    assert not list(store.glob("*"))


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_a_clip_of_transformers_is_transformers_own(act: str, tmp_path: Path) -> None:
    model, tokenizer, processor = clip_folder(tmp_path / "clip", act)
    expected = of_transformers(model, tokenizer, processor, 20)
    loaded = taken(tmp_path / "clip", None)
    same(loaded, expected)
    assert loaded.activation == {"quick_gelu": "quickgelu", "gelu": "gelu"}[act]


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_second_table_of_a_tower_is_transformers_own(kind: str, tmp_path: Path) -> None:
    """CLIP's holds alone, with its defaults in place of what the first says; SigLIP has none."""
    from transformers import AutoModel

    folder = tmp_path / kind
    make = clip_folder if kind == "clip" else siglip_folder
    _, tokenizer, processor = make(folder, "gelu")
    content = json.loads((folder / "config.json").read_text())
    content["text_config_dict"] = {key: value for key, value in content["text_config"].items() if key != "hidden_act"}
    content["vision_config_dict"] = None
    (folder / "config.json").write_text(json.dumps(content))
    model = AutoModel.from_pretrained(folder).eval()
    expected = of_transformers(model, tokenizer, processor, content["text_config"]["max_position_embeddings"])
    loaded = taken(folder, None)
    same(loaded, expected)
    assert loaded.activation == {"clip": "gelu+quickgelu", "siglip": "gelu"}[kind]


def test_a_siglip_of_transformers_is_transformers_own(tmp_path: Path) -> None:
    model, tokenizer, processor = siglip_folder(tmp_path / "siglip")
    expected = of_transformers(model, tokenizer, processor, 16)
    loaded = taken(tmp_path / "siglip", None)
    same(loaded, expected)
    assert loaded.activation == "gelu_tanh"


@pytest.mark.filterwarnings("ignore:This sequence already has")
def test_special_tokens_in_a_text_are_what_transformers_makes_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{__name__}.WORDS", ["<u", "k>", "<", ">", *WORDS])  # as real vocabularies have
    _, tokenizer, _ = siglip_folder(tmp_path / "siglip")
    loaded = taken(tmp_path / "siglip", None)
    assert tokenizer("a </s>head")["input_ids"] != tokenizer("a head")["input_ids"]
    rng = random.Random(0)
    parts = [*WORDS, "</s>", " </s> ", "<unk>", "<unk> ", "</S>", "</s></s>", "\u2581", "\u00e9", "  ", "s>", "\n", "<"]
    texts = ["", "</s>", *("".join(rng.choices(parts, k=rng.randint(1, 7))) for _ in range(400))]
    expected = tokenizer(texts, padding="max_length", max_length=16, truncation=True, return_tensors="np")["input_ids"]
    np.testing.assert_array_equal(loaded.tokenize([text or " " for text in texts]), expected)


def test_a_siglip_2_with_gemmas_tokenizer_is_transformers_own(tmp_path: Path) -> None:
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    model, _, processor = siglip_folder(tmp_path / "siglip")
    for one in ("spiece.model", "spiece.vocab", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / "siglip" / one).unlink(missing_ok=True)
    pairs = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    pairs.normalizer = tokenizers.normalizers.Replace(" ", "\u2581")
    pairs.pre_tokenizer = tokenizers.pre_tokenizers.Split(" ", "merged_with_previous")
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=60, special_tokens=special, show_progress=False)
    pairs.train_from_iterator([" ".join(WORDS[number:]) for number in range(len(WORDS))], trainer)
    pairs.post_processor = tokenizers.processors.TemplateProcessing("$A <eos>", special_tokens=[("<eos>", 1)])
    names = {f"{one[1:-1]}_token": one for one in special}
    stated = {"model_max_length": 16, "padding_side": "right", "model_input_names": ["input_ids"]}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pairs, **stated, **names)
    tokenizer.save_pretrained(tmp_path / "siglip")
    expected = of_transformers(model, tokenizer, processor, 16)
    assert len(np.unique(expected[1])) > 8
    same(taken(tmp_path / "siglip", None), expected)


def split_up_tokenizer(folder: Path) -> None:
    """A CLIP's folder with vocabulary and merges in files of their own."""
    content = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(content["model"]["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in content["model"]["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")


def split_up(folder: Path) -> None:
    """A CLIP's folder with its tokenizer in parts too, and its weights in two shards."""
    split_up_tokenizer(folder)
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    index = {name: f"model-{number % 2}-of-2.safetensors" for number, name in enumerate(sorted(tensors))}
    for file in set(index.values()):
        safetensors.torch.save_file({name: tensors[name] for name in index if index[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


# --- a BERT text tower in open_clip's form ---


def bert_folder(folder: Path, **changes: Any) -> Any:
    """A small BiomedCLIP as a hub's snapshot has it; its text model's config.json lies in ``text`` beside."""
    from transformers import BertConfig, BertTokenizerFast

    folder.mkdir(parents=True)
    text = folder.parent / "text"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    text.mkdir(exist_ok=True)
    (text / "vocab.txt").write_text("\n".join(words))
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    BertConfig(vocab_size=len(words), max_position_embeddings=24, **sizes).save_pretrained(text)
    tokenizer = BertTokenizerFast(vocab={word: number for number, word in enumerate(words)})
    tokenizer.save_pretrained(folder)
    config: dict[str, Any] = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 8, "patch_size": 8},
        "text_cfg": {
            "hf_model_name": str(text),
            "hf_tokenizer_name": str(text),
            "hf_proj_type": "mlp",
            "hf_pooler_type": "cls_last_hidden_state_pooler",
            "context_length": 20,
        },
    }
    config["text_cfg"] |= changes
    preprocess = {
        "mean": [0.1, 0.2, 0.3],
        "std": [0.5, 0.4, 0.3],
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    torch.manual_seed(0)
    network = open_clip.create_model(f"local-dir:{folder}", pretrained_text=False, load_weights=False)
    scale_up(network)
    torch.save(network.state_dict(), folder / "open_clip_pytorch_model.bin")
    return network.eval()


def of_open_clip(folder: Path) -> tuple[Any, Any, Any, Any]:
    """Pixels, tokens, image and text features, as open_clip itself computes them from a folder."""
    network, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}", pretrained_text=False)
    network.eval()
    pixels = torch.stack([preprocess(one) for one in pictures()])
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(TEXTS)
    with torch.inference_mode():
        images, texts = network.encode_image(pixels, normalize=True), network.encode_text(tokens, normalize=True)
    return pixels.numpy(), tokens.numpy(), images.numpy(), texts.numpy()


@pytest.mark.parametrize("pooler", ["cls_last_hidden_state_pooler", "mean_pooler", "cls_pooler"])
def test_an_open_clip_folder_with_a_bert_is_open_clips_own(pooler: str, tmp_path: Path) -> None:
    bert_folder(tmp_path / "biomed", hf_pooler_type=pooler)
    expected = of_open_clip(tmp_path / "biomed")
    loaded = taken(tmp_path / "biomed", "hf-hub:fake/biomed", None, tmp_path / "text")
    same(loaded, expected)
    assert loaded.facts["text"]["heads"] == [4]


def test_text_models_are_taken_from_a_hubs_cache_folder_too(tmp_path: Path) -> None:
    bert_folder(tmp_path / "biomed")
    _, plain = add(tmp_path / "biomed", None, None, tmp_path / "text")
    shutil.copytree(tmp_path / "text", tmp_path / "models--a--bert/snapshots/0123")
    _, cached = add(tmp_path / "biomed", None, None, tmp_path / "models--a--bert")
    assert cached.id == plain.id


def test_without_its_config_only_the_usual_berts_are_assumed_and_told(tmp_path: Path) -> None:
    bert_folder(tmp_path / "biomed")
    with pytest.raises(BackboneError, match="not those of BERT base or large"):
        add(tmp_path / "biomed", None)
    (tmp_path / "none").mkdir()
    with pytest.raises(BackboneError, match=r"config\.json: no such file"):
        add(tmp_path / "biomed", None, None, tmp_path / "none")
    base = {
        "x.embeddings.word_embeddings.weight": (30522, 768),
        "x.embeddings.position_embeddings.weight": (512, 768),
        "x.embeddings.token_type_embeddings.weight": (2, 768),
        "x.encoder.layer.0.intermediate.dense.weight": (3072, 768),
        **{f"x.encoder.layer.{layer}.attention.self.query.weight": (768, 768) for layer in range(12)},
    }
    assumed = text_model._assume_bert(base)
    assert assumed is not None
    assert (assumed["num_attention_heads"], assumed["layer_norm_eps"], assumed["pad_token_id"]) == (12, 1e-12, 0)
    roberta = base | {"x.embeddings.position_embeddings.weight": (514, 768)}
    assert text_model._assume_bert(roberta) is None
    assert text_model._assume_bert(base | {"x.embeddings.token_type_embeddings.weight": (1, 768)}) is None


# --- what a strict load does not see, must show ---


def clip_config(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text())
        change(content)
        (folder / "config.json").write_text(json.dumps(content))

    return apply


def both(**changes: Any) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        for tower in ("text_config", "vision_config"):
            content[tower] |= changes

    return change


def furthest(first: LoadedBackbone, second: LoadedBackbone) -> list[float]:
    """Of images and of texts."""
    differences: list[NDArray[np.float32]] = [
        first.encode_images(pictures()) - second.encode_images(pictures()),
        first.encode_texts(TEXTS) - second.encode_texts(TEXTS),
    ]
    return [float(np.abs(one).max()) for one in differences]


@pytest.mark.parametrize(
    ("make", "changes"),
    [
        (clip_folder, {"hidden_act": "gelu"}),
        (clip_folder, {"num_attention_heads": 8}),
        (clip_folder, {"layer_norm_eps": 1e-3}),
        (siglip_folder, {"hidden_act": "gelu"}),
        (siglip_folder, {"num_attention_heads": 8}),
        (siglip_folder, {"layer_norm_eps": 1e-3}),
    ],
)
def test_what_no_shape_tells_differs_by_ten_tolerances_and_has_another_id(
    make: Any, changes: dict[str, Any], tmp_path: Path
) -> None:
    make(tmp_path / "right")
    shutil.copytree(tmp_path / "right", tmp_path / "wrong")
    clip_config(both(**changes))(tmp_path / "wrong")
    (_, right), (_, wrong) = add(tmp_path / "right", None), add(tmp_path / "wrong", None)
    assert right.digest == wrong.digest
    assert right.id != wrong.id
    assert min(furthest(right, wrong)) > 10 * TOLERANCE


@pytest.mark.parametrize(
    "change",
    [
        {"hf_pooler_type": "mean_pooler"},
        {"hf_pooler_type": "max_pooler"},
        {"context_length": 12},
        {"num_attention_heads": 2},
        {"hidden_act": "relu"},
        {"layer_norm_eps": 1e-3},
        {"is_decoder": True},
    ],
)
def test_of_a_bert_too(change: dict[str, Any], tmp_path: Path) -> None:
    # A decoder's first token sees no other, so that only a mean is of the whole text.
    bert_folder(tmp_path / "right", **({"hf_pooler_type": "mean_pooler"} if "is_decoder" in change else {}))
    shutil.copytree(tmp_path / "right", tmp_path / "wrong")
    shutil.copytree(tmp_path / "text", tmp_path / "other")
    if "hf_pooler_type" in change and change["hf_pooler_type"] == "max_pooler":
        change = {"hf_pooler_type": "cls_pooler"}  # has a layer more, so the load itself refuses it
    path, text = tmp_path / "wrong" / "open_clip_config.json", tmp_path / "other" / "config.json"
    if set(change) & {"hf_pooler_type", "context_length"}:
        content = json.loads(path.read_text())
        content["model_cfg"]["text_cfg"] |= change
        path.write_text(json.dumps(content))
    else:
        text.write_text(json.dumps(json.loads(text.read_text()) | change))
    _, right = add(tmp_path / "right", "hf-hub:a/b", None, tmp_path / "text")
    if change.get("hf_pooler_type") == "cls_pooler":
        with pytest.raises(BackboneError, match="are missing"):
            add(tmp_path / "wrong", "hf-hub:a/b", None, tmp_path / "other")
        return
    _, wrong = add(tmp_path / "wrong", "hf-hub:a/b", None, tmp_path / "other")
    assert right.digest == wrong.digest
    assert right.id != wrong.id
    assert furthest(right, wrong)[1] > 10 * TOLERANCE


OWN: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {
        "image_size": 32,
        "layers": 2,
        "width": 32,
        "head_width": 8,
        "patch_size": 8,
        "pool_type": "avg",
        "final_ln_after_pool": False,
    },
    "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 2},
}


def own_folder(folder: Path, table: str = "vision_cfg", **changes: Any) -> Any:
    """A small model of open_clip's own two towers in its form."""
    folder.mkdir(parents=True)
    config = {key: dict(value) if isinstance(value, dict) else value for key, value in OWN.items()}
    torch.manual_seed(0)
    network = open_clip.CLIP(**config)
    scale_up(network)
    config[table] |= changes
    how = {"mean": [0.5] * 3, "std": [0.5] * 3}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": how}))
    torch.save(network.state_dict(), folder / "open_clip_pytorch_model.bin")
    return network.eval()


@pytest.mark.parametrize(
    ("tower", "table", "change"),
    [(0, "vision_cfg", {"final_ln_after_pool": True}), (1, "text_cfg", {"no_causal_mask": True})],
)
def test_of_open_clips_own_towers_too(tower: int, table: str, change: dict[str, Any], tmp_path: Path) -> None:
    own_folder(tmp_path / "right")
    own_folder(tmp_path / "wrong", table, **change)
    (_, right), (_, wrong) = add(tmp_path / "right", None), add(tmp_path / "wrong", None)
    assert right.digest == wrong.digest
    assert right.id != wrong.id
    assert furthest(right, wrong)[tower] > 10 * TOLERANCE


def configured(folder: Path, config: dict[str, Any], state: dict[str, Any] | None = None) -> dict[str, Any]:
    """A folder in open_clip's form with these weights, or with random ones, which are given back."""
    folder.mkdir(parents=True)
    how = {"mean": [0.5] * 3, "std": [0.5] * 3}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": how}))
    if state is None:
        torch.manual_seed(0)
        network = open_clip.create_model(f"local-dir:{folder}", pretrained_text=False, load_weights=False)
        if "timm_model_name" not in config["vision_cfg"]:  # whose convolutions it would make end in zeros
            scale_up(network)
        state = network.state_dict()
    torch.save(state, folder / "open_clip_pytorch_model.bin")
    return state


def of_timm(name: str, **vision: Any) -> dict[str, Any]:
    """open_clip's configuration of a tower of timm beside a small one for texts."""
    text = {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 1}
    tower = {"image_size": 224, "timm_model_name": name, "timm_pool": "avg", "timm_proj": "linear"}
    return {"embed_dim": 16, "vision_cfg": tower | vision, "text_cfg": text}


COCA: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {
        **{"image_size": 32, "layers": 2, "width": 32, "head_width": 8, "patch_size": 8, "output_tokens": True},
        **{"attentional_pool": True, "attn_pooler_heads": 8, "attn_pooler_queries": 4},
    },
    "text_cfg": {
        **{"context_length": 19, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 2},
        **{"embed_cls": True, "output_tokens": True},
    },
    "multimodal_cfg": {
        **{"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 1},
        **{"dim_head": 8, "n_queries": 4, "attn_pooler_heads": 4},
    },
    "custom_text": True,
}


@pytest.mark.parametrize(
    ("config", "table", "change", "tower"),
    [
        (
            COCA,
            "vision_cfg",
            {"attn_pooler_heads": 4, "head_width": 4},
            0,
        ),  # the same set of heads, the other way round
        (COCA, "text_cfg", {"pad_id": 49407}, 1),
        (of_timm("resnet18", image_size=64), "vision_cfg", {"timm_model_name": "resnetblur18"}, 0),
    ],
)
def test_one_id_is_of_one_model(
    config: dict[str, Any], table: str, change: dict[str, Any], tower: int, tmp_path: Path
) -> None:
    state = configured(tmp_path / "right", config)
    configured(tmp_path / "wrong", config | {table: config[table] | change}, state)
    (_, right), (_, wrong) = add(tmp_path / "right", None), add(tmp_path / "wrong", None)
    assert right.digest == wrong.digest
    assert right.id != wrong.id
    assert furthest(right, wrong)[tower] > 10 * TOLERANCE


def m2m_folder(folder: Path, state: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """A CLIP whose texts an M2M-100's encoder reads, of a configuration with these changes in ``FOLDER-text``."""
    from transformers import M2M100Config

    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    sizes |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 24}
    ends = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 2}
    bert_folder(folder.parent / f"{folder.name}-bert/clip")
    text = folder.parent / f"{folder.name}-text"
    M2M100Config(vocab_size=17, **sizes, **ends).save_pretrained(text)
    path = text / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder.parent / f"{folder.name}-bert/clip" / name, text)
    path = text / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    tower = {"hf_model_name": str(text), "hf_tokenizer_name": str(text), "hf_proj_type": "linear"}
    tower |= {"hf_pooler_type": "mean_pooler", "hf_model_pretrained": False}
    config = {"embed_dim": 16, "vision_cfg": OWN["vision_cfg"], "text_cfg": tower | {"context_length": 12}}
    found = configured(folder, config, state)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(text / name, folder)
    return found


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"activation_function": "gelu_10"}, {"activation_function": "leaky_relu"}),
        ({}, {"dtype": "bfloat16"}),
        ({}, {"scale_embedding": False}),
    ],
)
def test_nor_of_two_text_models_of_transformers(first: dict[str, Any], second: dict[str, Any], tmp_path: Path) -> None:
    state = m2m_folder(tmp_path / "right", **first)
    m2m_folder(tmp_path / "wrong", state, **second)
    right, wrong = (add(tmp_path / one, "hf-hub:a/b", None, tmp_path / f"{one}-text")[1] for one in ("right", "wrong"))
    assert right.digest == wrong.digest
    assert right.id != wrong.id
    assert furthest(right, wrong)[1] > TOLERANCE


@pytest.mark.parametrize(
    ("stated", "left_out"),
    [
        ({"position_embedding_type": "absolute"}, ()),
        ({"use_cache": False, "dtype": "float16", "hidden_dropout_prob": 0.2}, ()),
        ({}, ("hidden_act", "layer_norm_eps", "pad_token_id")),
    ],
)
def test_one_model_has_one_id_whether_its_configuration_states_defaults_or_not(
    stated: dict[str, Any], left_out: tuple[str, ...], tmp_path: Path
) -> None:
    bert_folder(tmp_path / "biomed")
    kept, first = add(tmp_path / "biomed", "hf-hub:a/b", None, tmp_path / "text")
    config = (kept / "text" / "config.json").read_bytes()
    shutil.copytree(tmp_path / "text", tmp_path / "other")
    path = tmp_path / "other" / "config.json"
    content = {key: value for key, value in json.loads(path.read_text()).items() if key not in left_out}
    path.write_text(json.dumps(content | stated))
    again, second = add(tmp_path / "biomed", "hf-hub:c/d", None, tmp_path / "other")
    assert (again, second.id) == (kept, first.id)
    assert (kept / "text" / "config.json").read_bytes() == config  # what studies name stays as it is
    assert [one.model for one in read_entry(kept).names] == ["hf-hub:a/b", "hf-hub:c/d"]
    assert furthest(first, second) == [0, 0]


def test_a_cache_folder_without_its_main_branchs_snapshot_is_refused(tmp_path: Path) -> None:
    cache = tmp_path / "models--a--b"
    clip_folder(cache / "snapshots" / ("1" * 40))
    (cache / "refs").mkdir()
    (cache / "refs/main").write_text("2" * 40)
    with pytest.raises(BackboneError, match=f"snapshot {'2' * 40}, which is not here, but {'1' * 40}"):
        add(cache, None)


def test_what_trainings_leave_beside_weights_is_no_checkpoint_and_deepspeeds_parts_are_named(tmp_path: Path) -> None:
    clip_folder(tmp_path / "clip")
    torch.save({"a": torch.ones(2)}, tmp_path / "clip/sampler.bin")
    add(tmp_path / "clip", None)
    (tmp_path / "clip/global_step10").mkdir()
    (tmp_path / "clip/model.safetensors").rename(tmp_path / "clip/global_step10/mp_rank_00_model_states.pt")
    with pytest.raises(BackboneError, match=r"DeepSpeed.*zero_to_fp32\.py"):
        add(tmp_path / "clip", None)


def test_a_file_of_a_model_whose_tags_are_prepared_in_several_ways_is_told(tmp_path: Path) -> None:
    torch.save({"x": torch.ones(2)}, tmp_path / "x.pt")
    assert "name it: --model MODEL:TAG" in " ".join(read_form(tmp_path / "x.pt", "ViT-L-14", None, "gelu").told)
    assert not read_form(tmp_path / "x.pt", "ViT-L-14", "laion2b_s32b_b82k", "gelu").told


def test_another_model_under_an_id_that_is_there_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaded_backbone, "facts", lambda *_: FEW)  # an id that lacks what tells the two apart
    state = configured(tmp_path / "right", COCA)
    kept, right = add(tmp_path / "right", None)
    changed = COCA["vision_cfg"] | {"attn_pooler_heads": 4, "head_width": 4}
    configured(tmp_path / "wrong", COCA | {"vision_cfg": changed}, state)
    config = (kept / "open_clip_config.json").read_bytes()
    with pytest.raises(BackboneError, match="has the id of what is added, but other features"):
        add(tmp_path / "wrong", None)
    assert (kept / "open_clip_config.json").read_bytes() == config
    assert [one.name for one in kept.parent.iterdir()] == [right.id]


FEW: dict[str, Any] = {"vision": {"activation": ["gelu"]}, "text": {"activation": ["gelu"]}}


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "vitamin_small_224"])
def test_towers_that_cannot_be_built_without_memory_are_built_in_it(name: str) -> None:
    before = torch.get_rng_state()
    made = make_network(of_timm(name))
    assert torch.equal(before, torch.get_rng_state())
    assert network._shapes(of_timm(name)) == {key: tuple(value.shape) for key, value in made.state_dict().items()}
    plain = dict(make_network(of_timm(name), empty=False).named_buffers())
    assert all(torch.equal(value, plain[key]) for key, value in made.named_buffers())


def test_tokenizer_and_preprocessing_are_in_the_id(tmp_path: Path) -> None:
    clip_folder(tmp_path / "right")
    _, right = add(tmp_path / "right", None)
    for file, change in (
        ("preprocessor_config.json", {"image_mean": [0.5, 0.5, 0.5]}),
        ("preprocessor_config.json", {"resample": 2}),
        ("preprocessor_config.json", {"do_center_crop": False, "size": {"height": 32, "width": 32}}),
        ("tokenizer_config.json", {"pad_token": "<|startoftext|>"}),
    ):
        shutil.copytree(tmp_path / "right", tmp_path / "wrong")
        content = json.loads((tmp_path / "wrong" / file).read_text())
        (tmp_path / "wrong" / file).write_text(json.dumps(content | change))
        _, wrong = add(tmp_path / "wrong", None)
        assert (wrong.digest == right.digest, wrong.id == right.id) == (True, False), change
        shutil.rmtree(tmp_path / "wrong")


# --- one model in any container ---


def test_the_same_values_have_one_digest_in_any_container(tmp_path: Path) -> None:
    model, _, _ = clip_folder(tmp_path / "clip")
    loaded = load_backbone(Backbone(model="x", weights="file", file=str(tmp_path / "clip")), None)
    state = dict(model.state_dict())
    extra: dict[str, Any] = {"epoch": 3, "loss": np.float64(0.5), "optimizer": {"state": {0: {"m": torch.zeros(3)}}}}
    forms: dict[str, Any] = {
        "plain": state,
        "state_dict": {"state_dict": state} | extra,
        "model": {"model": state} | extra,
        "model_state_dict": {"model_state_dict": {f"module.{name}": value for name, value in state.items()}} | extra,
        "lightning": {
            "state_dict": {f"model.{name}": value for name, value in state.items()} | {"loss.weight": torch.ones(2)},
            "pytorch-lightning_version": "2.5",
        },
        "compiled": {f"_orig_mod.{name}": value for name, value in state.items()},
        "compiled in parallel": {f"module._orig_mod.{name}": value for name, value in state.items()},
        "sharded": {f"_fsdp_wrapped_module.{name}": value for name, value in state.items()},
        "sharded inside": {
            name.replace("layers.0.", "layers.0._fsdp_wrapped_module._checkpoint_wrapped_module."): value
            for name, value in state.items()
        },
        "compiled inside": {name.replace("encoder.", "encoder._orig_mod."): value for name, value in state.items()},
        "wrapped": {f"module.clip.model.{name}": value for name, value in state.items()},
    }
    (tmp_path / "clip/model.safetensors").unlink()
    for name, content in forms.items():
        torch.save(content, tmp_path / "clip/pytorch_model.bin")
        kept = load_backbone(Backbone(model="x", weights="file", file=str(tmp_path / "clip")), None)
        assert (kept.digest, kept.id) == (loaded.digest, loaded.id), name


def test_a_text_tower_elsewhere_and_a_bias_of_training_are_no_other_model(tmp_path: Path) -> None:
    make_random_checkpoint("random-small", 0, tmp_path / "small.safetensors")
    state = safetensors.torch.load_file(tmp_path / "small.safetensors")
    right = add(tmp_path / "small.safetensors", "random-small")[1]
    texts = {name: value for name, value in state.items() if not name.startswith(("visual.", "logit_"))}
    images = {name: value for name, value in state.items() if name not in texts}
    forms: dict[str, dict[str, Any]] = {
        "SigLIP's loss": state | {"logit_bias": torch.tensor(-10.0)},
        "--force-custom-text": {
            f"module.{name}": value for name, value in (images | {f"text.{n}": v for n, v in texts.items()}).items()
        },
        "two prefixes": {f"image_encoder.{name}": value for name, value in images.items()}
        | {f"text_encoder.{name}": value for name, value in texts.items()},
        "one prefix": images | {f"text_encoder.{name}": value for name, value in texts.items()},
    }
    for form, content in forms.items():
        torch.save({"state_dict": content}, tmp_path / "made.ckpt")
        made = add(tmp_path / "made.ckpt", "random-small")[1]
        assert (made.digest, made.id) == (right.digest, right.id), form
        told = ["that the two towers, which lie under two prefixes (text_encoder. of the text's), are one model"]
        assert made.form.told == (told if "prefix" in form else []), form
    several = forms["two prefixes"] | {f"teacher.{name}": value + 1 for name, value in texts.items()}
    torch.save({"state_dict": several}, tmp_path / "several.ckpt")
    with pytest.raises(BackboneError, match="tensors are missing"):
        add(tmp_path / "several.ckpt", "random-small")


def tower(width: int, inner: int, layers: int, heads: int, **more: int) -> dict[str, int]:
    sizes = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers}
    return sizes | {"num_attention_heads": heads} | more


SO = (1152, 4304, 27, 16)


@pytest.mark.parametrize(
    ("name", "kind", "text", "vision"),
    [
        ("ViT-B-32", "clip", tower(512, 2048, 12, 8), {"patch_size": 32}),
        ("ViT-L-14-336", "clip", tower(768, 3072, 12, 12), tower(1024, 4096, 24, 16, patch_size=14, image_size=336)),
        ("ViT-B-16-SigLIP", "siglip", {}, {}),
        ("ViT-SO400M-14-SigLIP-384", "siglip", tower(*SO), tower(*SO, patch_size=14, image_size=384)),
    ],
)
def test_of_a_published_model_names_and_shapes_are_open_clips_so_that_digests_are(
    name: str, kind: str, text: dict[str, int], vision: dict[str, int]
) -> None:
    width = text.get("hidden_size", 768)
    content = {"model_type": kind, "projection_dim": width, "text_config": text, "vision_config": vision}
    theirs, ours = (
        {key: tuple(value.shape) for key, value in make_network(config).state_dict().items()}
        for config in (transformers_form.model_config(content, "config.json"), known_model(name))
    )
    assert theirs == ours


def test_a_folder_in_open_clips_and_in_timms_form_is_read_as_open_clips(tmp_path: Path) -> None:
    network = own_folder(tmp_path / "whole")
    alone = add(tmp_path / "whole", None)[1].digest
    tower = {k.removeprefix("visual."): v.clone() for k, v in network.state_dict().items() if k.startswith("visual.")}
    safetensors.torch.save_file(tower, tmp_path / "whole/model.safetensors")
    timms = {"architecture": "vit_base_patch32_clip_224", "num_classes": 512, "pretrained_cfg": {}}
    (tmp_path / "whole/config.json").write_text(json.dumps(timms))
    assert add(tmp_path / "whole", None)[1].digest == alone


@pytest.mark.filterwarnings("ignore")
def test_a_torchscript_archive_that_is_not_openais_has_its_models_activation(tmp_path: Path) -> None:
    network = own_folder(tmp_path / "whole")
    right = add(tmp_path / "whole", None)[1]
    with models_as_found():
        for name, quick in (("tiny-own", False), ("tiny-own-quickgelu", True)):
            (tmp_path / f"{name}.json").write_text(json.dumps(OWN | {"quick_gelu": quick}))
            open_clip.add_model_config(tmp_path / f"{name}.json")
        inputs = {"encode_image": torch.zeros(1, 3, 32, 32), "encode_text": torch.zeros(1, 20, dtype=torch.int64)}
        torch.jit.save(torch.jit.trace_module(network, inputs, check_trace=False), tmp_path / "traced.pt")
        with pytest.raises(BackboneError, match="does not say with which activation"):
            add(tmp_path / "traced.pt", "tiny-own")
        added = add(tmp_path / "traced.pt", "tiny-own", "gelu")[1]
        assert (added.activation, added.digest) == ("gelu", right.digest)


def test_shards_and_cache_folders_are_read(tmp_path: Path, store: Path) -> None:
    model, _, _ = clip_folder(tmp_path / "clip")
    _, whole = add(tmp_path / "clip", None)
    snapshot = tmp_path / "models--fake--clip/snapshots/abc"
    (tmp_path / "clip/model.safetensors").unlink()
    shutil.copytree(tmp_path / "clip", snapshot)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    names = sorted(state)
    for kind in ("safetensors", "bin"):
        index = {}
        for number, part in enumerate((names[::2], names[1::2]), 1):
            stem = "model" if kind == "safetensors" else "pytorch_model"
            file = f"{stem}-{number:05d}-of-00002.{kind}"
            tensors = {name: state[name] for name in part}
            if kind == "safetensors":
                safetensors.torch.save_file(tensors, snapshot / file)
            else:
                torch.save(tensors, snapshot / file)
            index |= dict.fromkeys(part, file)
        listed = snapshot / f"{stem}.{kind}.index.json"
        listed.write_text(json.dumps({"metadata": {}, "weight_map": index}))
        _, sharded = add(tmp_path / "models--fake--clip", None)
        assert sharded.digest == whole.digest
        assert sharded.form.model == "hf-hub:fake/clip"
        for model in (None, "random-small"):
            with pytest.raises(BackboneError, match="one of several shards"):
                add(snapshot / file, model)
        (snapshot / file).unlink()
        with pytest.raises(BackboneError, match=f"names 2 shards, but {file} is not beside it"):
            add(tmp_path / "models--fake--clip", None)
        listed.unlink()
        for one in snapshot.glob(f"*.{kind}"):
            one.unlink()


def test_a_vocabulary_without_tokenizer_json_is_the_same_tokenizer(tmp_path: Path) -> None:
    _, tokenizer, _ = clip_folder(tmp_path / "clip")
    content = json.loads((tmp_path / "clip/tokenizer.json").read_text())
    (tmp_path / "clip/tokenizer.json").unlink()
    (tmp_path / "clip/vocab.json").write_text(json.dumps(content["model"]["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in content["model"]["merges"])
    (tmp_path / "clip/merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    loaded = load_backbone(Backbone(model="x", weights="file", file=str(tmp_path / "clip")), None)
    expected = tokenizer(TEXTS, padding="max_length", max_length=20, truncation=True)["input_ids"]
    np.testing.assert_array_equal(loaded.tokenize(TEXTS), expected)
    bert_folder(tmp_path / "biomed")
    whole = load_backbone(Backbone(model="hf-hub:a/b", weights="pretrained"), taken_text(tmp_path))
    (tmp_path / "biomed/tokenizer.json").unlink()
    (tmp_path / "biomed/vocab.txt").write_bytes((tmp_path / "text/vocab.txt").read_bytes())
    words = load_backbone(Backbone(model="hf-hub:a/b", weights="pretrained"), tmp_path / "biomed")
    np.testing.assert_array_equal(words.tokenize(TEXTS), whole.tokenize(TEXTS))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda lines: lines[:-2], "nothing in it makes .* of vocab.json's tokens"),
        (lambda lines: lines[:1], "nothing in it makes .* of vocab.json's tokens"),
        (lambda lines: [*lines, "h"], "line 8: found 'h', expected two pieces"),
        (lambda lines: [*lines, "h zz"], "line 8: found 'h zz', expected two pieces"),
    ],
    ids=["cut", "empty", "half a line", "another vocabulary's"],
)
def test_merges_that_do_not_make_the_vocabulary_are_refused(
    tmp_path: Path, damage: Callable[[list[str]], list[str]], said: str
) -> None:
    clip_folder(tmp_path / "clip")
    content = json.loads((tmp_path / "clip/tokenizer.json").read_text())
    (tmp_path / "clip/tokenizer.json").unlink()
    (tmp_path / "clip/vocab.json").write_text(json.dumps(content["model"]["vocab"]))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in content["model"]["merges"])]
    (tmp_path / "clip/merges.txt").write_text("\n".join(damage(lines)))
    with pytest.raises(BackboneError, match=said):
        load_backbone(Backbone(model="x", weights="file", file=str(tmp_path / "clip")), None)


def taken_text(folder: Path) -> Path:
    """The folder, its text model's configuration put where a site without ``--text`` looks for it."""
    (folder / "biomed/text").mkdir()
    shutil.copy(folder / "text/config.json", folder / "biomed/text/config.json")
    return folder / "biomed"


# --- what is refused: one sentence, and nothing in the store ---

Make = Callable[[Path], Any]


def edit(name: str, **changes: Any) -> Make:
    def apply(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | changes))

    return apply


def without(*names: str) -> Make:
    def apply(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return apply


def write(name: str, content: bytes) -> Make:
    def apply(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return apply


def change_tensors(change: Callable[[dict[str, Any]], Any]) -> Make:
    def apply(folder: Path) -> None:
        tensors = safetensors.torch.load_file(folder / "model.safetensors")
        change(tensors)
        safetensors.torch.save_file(tensors, folder / "model.safetensors")

    return apply


def second_checkpoint(folder: Path) -> None:
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    torch.save({name: value + 1 for name, value in tensors.items()}, folder / "pytorch_model.bin")


def lose_links(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("../../blobs/gone")


def cut_short(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:20_000])


def two_ways(folder: Path) -> None:
    how = json.loads((folder / "preprocessor_config.json").read_text()) | {"image_mean": [0.1, 0.2, 0.3]}
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": how}))


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 335000000\n"
ZERO = change_tensors(lambda tensors: [value.zero_() for value in tensors.values()])
BAD: dict[str, tuple[Make, str]] = {
    "lfs": (write("model.safetensors", POINTER), r"is a Git LFS pointer of 335 MB.*git lfs pull"),
    "web page": (write("model.safetensors", b"<!DOCTYPE html><html>"), "is a web page"),
    "cut": (cut_short, r"ends after 0.02 MB of 0.\d+ MB \([\d,]+ bytes are missing\)"),
    "empty file": (write("model.safetensors", b""), "is empty"),
    "empty folder": (empty, "is empty"),
    "half copied": (without("model.safetensors"), "no weights in it; the folder is half copied"),
    "lost links": (lose_links, "only the link is here"),
    "links as text": (write("model.safetensors", b"../../blobs/" + b"a" * 64), "only the link is here"),
    "two checkpoints": (second_checkpoint, r"2 checkpoints that differ \(model.safetensors, pytorch_model.bin\)"),
    "no tokenizer": (without("tokenizer.json"), "its tokenizer is not here"),
    "no preprocessor": (without("preprocessor_config.json"), "has no preprocessor_config.json"),
    "no configuration": (without("config.json"), "has no open_clip_config.json and no config.json"),
    "broken configuration": (write("config.json", b'{"model_type": '), "no whole JSON file"),
    "image size": (clip_config(lambda c: c["vision_config"].update(image_size=48)), r"images become 32 x 32, but"),
    "width": (clip_config(lambda c: c["text_config"].update(hidden_size=48)), "have other shapes"),
    "layers": (clip_config(lambda c: c["text_config"].update(num_hidden_layers=3)), "tensors are missing"),
    "activation": (clip_config(lambda c: c["text_config"].update(hidden_act="mystery")), "hidden_act 'mystery'"),
    "siglip2": (edit("config.json", model_type="siglip2"), "NaFlex"),
    "chinese_clip": (edit("config.json", model_type="chinese_clip"), "'chinese_clip' in config.json, another kind"),
    "vision only": (edit("config.json", model_type="dinov2"), "an image tower alone, without the text tower"),
    "clip vision": (edit("config.json", model_type="clip_vision_model"), "an image tower alone"),
    "code": (edit("config.json", auto_map={"AutoModel": "evil.Model"}), "code of its own .auto_map.*never run"),
    "quantised by word": (edit("config.json", quantization_config={"bits": 4}), "quantised weights"),
    "quantised": (
        change_tensors(lambda t: t.update({"visual_projection.weight": torch.ones(16, 32, dtype=torch.int8)})),
        r"quantised weights \(visual.proj, int8\)",
    ),
    "float8": (
        change_tensors(lambda t: t.update({k: v.to(torch.float8_e4m3fn) for k, v in t.items() if "fc1.w" in k})),
        r"quantised weights \(.*float8",
    ),
    "peft": (
        write("adapter_config.json", b'{"base_model_name_or_path": "vinid/plip"}'),
        r"a PEFT adapter of vinid/plip.*merge_and_unload",
    ),
    "nan": (change_tensors(lambda t: t["visual_projection.weight"].fill_(float("nan"))), "not finite .visual.proj"),
    "one nan": (
        change_tensors(lambda t: t["text_model.final_layer_norm.bias"].view(-1)[3:4].fill_(float("nan"))),
        r"1 of \d+ tensors hold values that are not finite \(ln_final.bias\)",
    ),
    "all zero": (ZERO, "all weights of the image tower are zero"),
    "one feature": (
        change_tensors(lambda t: t["vision_model.post_layernorm.weight"].zero_()),
        "do not depend on the image",
    ),
    "padding": (edit("preprocessor_config.json", do_pad=True), "do_pad = true"),
    "two ways": (two_ways, r"processor_config.json: its image_processor prepares images otherwise than preprocessor_c"),
    "filled in front": (edit("tokenizer_config.json", padding_side="left"), "padding_side left"),
    "cut in front": (edit("tokenizer_config.json", truncation_side="left"), "truncation_side left"),
    "gemma's side": (edit("tokenizer_config.json", tokenizer_class="GemmaTokenizer"), "padding_side left .stated, or"),
    "compiled twice": (
        change_tensors(lambda t: t.update({f"_orig_mod.{k}": v + 1 for k, v in t.items() if "visual" in k})),
        r"holds visual_projection.weight twice with other values",
    ),
    "filter": (edit("preprocessor_config.json", resample=9), "resample 9"),
    "tokens": (
        clip_config(lambda c: c["text_config"].update(vocab_size=30)),
        r"the tokenizer has token \d+, but the text tower 30",
    ),
    **{
        f"only {name}": (
            lambda folder, name=name: [without("model.safetensors")(folder), write(name, b"\x08\x01")(folder)],
            says,
        )
        for name, says in (
            ("tf_model.h5", "TensorFlow's weights"),
            ("flax_model.msgpack", "Flax's weights"),
            ("model.onnx", "an ONNX model"),
            ("model.gguf", "quantised weights in GGUF"),
        )
    },
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "clip"
    clip_folder(folder)
    return folder


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_leaves_nothing(case: str, whole: Path, tmp_path: Path, store: Path) -> None:
    shutil.copytree(whole, tmp_path / "clip")
    make, says = BAD[case]
    make(tmp_path / "clip")
    with pytest.raises(BackboneError) as refused:
        add(tmp_path / "clip", None)
    text = str(refused.value)
    assert re.search(says, text, re.DOTALL), text
    assert "weights_only" not in text
    assert not store.exists() or not list(store.iterdir())


class Innocent:
    """What a training program keeps beside its weights."""


def test_files_by_themselves(whole: Path, tmp_path: Path, store: Path) -> None:
    def checked(name: str, content: Any, says: str, *options: Any) -> None:
        path = tmp_path / name
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        with pytest.raises(BackboneError) as refused:
            add(path, *options)
        assert re.search(says, str(refused.value), re.DOTALL), str(refused.value)
        assert "weights_only" not in str(refused.value)
        assert not store.exists() or not list(store.iterdir())

    theirs = safetensors.torch.load_file(whole / "model.safetensors")
    checked("config.json", b"{}", "is no checkpoint.*name the folder", "random-small")
    checked("theirs.pt", theirs, "under transformers' names, without their config.json", None)
    checked("named.pt", theirs, "under transformers' names", "random-small")
    checked("code.pt", {"model": theirs, "args": Innocent()}, r"Innocent besides tensors.*pickle_module=pickle", None)
    checked("cut.pt", b"PK\x03\x04" + bytes(3000), "ends after 0.003 MB, before its table of contents", None)
    checked(
        "tower.pt", {"blocks.0.attn.qkv.weight": torch.zeros(6, 2), "norm.bias": torch.zeros(2)}, "no text tower", None
    )
    make_random_checkpoint("random-small", 0, tmp_path / "small.safetensors")
    small = safetensors.torch.load_file(tmp_path / "small.safetensors")
    checked("unnamed.pt", {f"module.{name}": value for name, value in small.items()}, "shapes fit random-small", None)
    checked("other.pt", small, "not loaded as mini-clip.*its shapes fit random-small", "mini-clip")
    checked("text.pt", small, "the text tower of roberta-ViT-B-32 is roberta-base.*--text", "roberta-ViT-B-32")
    checked("siglip.pt", small, "its tokenizer, that of timm/ViT-B-16-SigLIP, is not here.*--text", "ViT-B-16-SigLIP")
    twice = {f"{place}.{name}": value + (place == "ema") for place in ("model", "ema") for name, value in small.items()}
    checked("twice.pt", twice, "holds the model twice, under (model and ema|ema and model)", "random-small")
    with pytest.raises(BackboneError, match="roberta-base, which does not come with open_clip"):
        make_random_checkpoint("roberta-ViT-B-32", 0, tmp_path / "x")


def test_the_lines_that_are_given_make_safetensors(tmp_path: Path) -> None:
    make_random_checkpoint("random-small", 0, tmp_path / "small.safetensors")
    small = safetensors.torch.load_file(tmp_path / "small.safetensors")
    torch.save({"state_dict": small, "args": Innocent()}, tmp_path / "code.pt")
    with pytest.raises(BackboneError) as refused:
        add(tmp_path / "code.pt", "random-small", "gelu")
    lines = [line[2:] for line in str(refused.value).splitlines()[1:]]
    program = "\n".join(lines).replace("'code.pt'", repr(str(tmp_path / "code.pt")))
    exec(program.replace("'code.safetensors'", repr(str(tmp_path / "code.safetensors"))), {})
    _, added = add(tmp_path / "code.safetensors", "random-small", "gelu")
    assert (
        added.digest
        == load_backbone(
            Backbone(model="random-small", weights="random", seed=0), tmp_path / "small.safetensors"
        ).digest
    )


def test_a_model_with_a_twin_needs_its_activation_named(tmp_path: Path, store: Path) -> None:
    config = json.loads((configs.MODELS / "random-small.json").read_text())
    for name, quick in (("twin", False), ("twin-quickgelu", True)):
        (tmp_path / f"{name}.json").write_text(json.dumps(config | {"quick_gelu": quick}))
        open_clip.add_model_config(tmp_path / f"{name}.json")
    make_random_checkpoint("twin", 0, tmp_path / "tuned.safetensors")
    path = tmp_path / "tuned.safetensors"
    with pytest.raises(BackboneError, match="--activation gelu or --activation quickgelu"):
        add(path, "twin")
    with pytest.raises(BackboneError, match="activation ="):
        load_backbone(Backbone(model="twin", weights="file", file=str(path)), None)
    (_, gelu), (_, quick) = add(path, "twin", "gelu"), add(path, "twin", "quickgelu")
    assert (gelu.activation, quick.activation) == ("gelu", "quickgelu")
    assert gelu.digest == quick.digest
    assert gelu.id != quick.id
    assert quick.form.model == "twin-quickgelu"
    named = Backbone(model="twin", weights="file", file="tuned.safetensors", activation="quickgelu")
    assert load_backbone(named, None).id == quick.id
    ambiguous = named.model_copy(update={"activation": None})
    with pytest.raises(BackboneError, match=r"tuned\.safetensors: twin does not say with which activation"):
        load_backbone(ambiguous, None)
    shutil.rmtree(store / gelu.id)  # whichever was added is not for that the one that is meant
    with pytest.raises(BackboneError, match=r"tuned\.safetensors: twin does not say with which activation"):
        load_backbone(ambiguous, None)
    with pytest.raises(BackboneError, match=r"tuned\.safetensors: twin does not say with which activation"):
        load_backbone(ambiguous.model_copy(update={"digest": quick.digest}), None)
    with pytest.raises(BackboneError, match="twin does not say with which activation"):
        load_backbone(ambiguous, store / quick.id)
    assert load_backbone(ambiguous.model_copy(update={"model": "twin-quickgelu"}), None).id == quick.id
    assert load_backbone(ambiguous.model_copy(update={"id": quick.id}), None).id == quick.id
    with pytest.raises(BackboneError, match="no such file here"):
        load_backbone(ambiguous.model_copy(update={"activation": "gelu"}), None)
    with pytest.raises(BackboneDigestError, match="the study names"):
        load_backbone(named.model_copy(update={"id": gelu.id, "file": str(path)}), None)
    assert [name for name in ("ViT-B-32", "RN50") if twin(name) == f"{name}-quickgelu"] == [
        "ViT-B-32",
        "RN50",
    ]


def gelu_folder(folder: Path) -> tuple[Any, Any, Any]:
    return clip_folder(folder, "gelu")


@pytest.mark.parametrize("make", [clip_folder, gelu_folder, siglip_folder, bert_folder])
def test_the_choice_of_precision_works_for_each_family(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path / "folder")
    if make is bert_folder:
        shutil.copytree(tmp_path / "text", tmp_path / "folder/text")
    backbone = Backbone(model="hf-hub:a/b", weights="pretrained")
    exact = load_backbone(backbone, tmp_path / "folder")
    monkeypatch.setattr("secure_fed.model.loaded_backbone._LARGE", 0)
    monkeypatch.setattr("secure_fed.model.loaded_backbone._multiplies_bfloat16", lambda device: True)
    monkeypatch.setattr("secure_fed.model.loaded_backbone._BF16_COSINE", 0.9)
    half = load_backbone(backbone, tmp_path / "folder")
    assert (exact.precision, half.precision) == ("float32", "bfloat16")
    assert half.id == exact.id
    cosines = (half.encode_images(pictures()) * exact.encode_images(pictures())).sum(axis=1)
    assert 0.9 < cosines.min() < 1 - 1e-7
    np.testing.assert_array_equal(half.encode_texts(TEXTS), exact.encode_texts(TEXTS))


def test_bad_folders_in_open_clips_form(tmp_path: Path, store: Path) -> None:
    def checked(change: Make, says: str, *options: Any) -> None:
        shutil.copytree(tmp_path / "whole", tmp_path / "wrong")
        change(tmp_path / "wrong")
        with pytest.raises(BackboneError) as refused:
            add(tmp_path / "wrong", None, None, *(options or (tmp_path / "text",)))
        assert re.search(says, str(refused.value), re.DOTALL), str(refused.value)
        assert not store.exists() or not list(store.iterdir())
        shutil.rmtree(tmp_path / "wrong")

    def configure(**changes: Any) -> Make:
        def apply(folder: Path) -> None:
            content = json.loads((folder / "open_clip_config.json").read_text())
            for table, values in changes.items():
                content["model_cfg"][table] = content["model_cfg"][table] | values
            (folder / "open_clip_config.json").write_text(json.dumps(content))

        return apply

    bert_folder(tmp_path / "whole")
    checked(configure(vision_cfg={"image_size": 48}), "embedding is of 17 places, but images of 48 pixels need 37")
    checked(configure(vision_cfg={"width": 64}), "have other shapes")
    checked(configure(vision_cfg={"timm_model_name": "mystery"}), "cannot build this model")
    (tmp_path / "bare").mkdir()
    shutil.copy(tmp_path / "text/config.json", tmp_path / "bare")
    no_words = without("tokenizer.json", "tokenizer_config.json")
    checked(no_words, "its tokenizer, that of .*, is not here", tmp_path / "bare")
    shutil.copytree(tmp_path / "text", tmp_path / "padded")
    edit("config.json", pad_token_id=1)(tmp_path / "padded")
    checked(lambda folder: None, "fills up with 0, but the text model takes 1", tmp_path / "padded")
    edit("config.json", model_type="gpt_neox")(tmp_path / "padded")
    checked(lambda folder: None, "model_type 'gpt_neox'; expected a text model", tmp_path / "padded")

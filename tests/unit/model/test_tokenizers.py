"""A folder's tokenizer against transformers' own, whatever its files say: the same tokens, or a refusal by name."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch

from secure_fed.core.errors import BackboneError
from secure_fed.model.tokenizer import _read_pieces, read_tokenizer
from tests.unit.model.test_backbone_forms import WORDS, clip_tokenizer, siglip_folder, split_up_tokenizer, without

torch.set_num_threads(1)

LENGTH = 24
ALPHABET = [
    *"aehmdswtxr ,.!?-'\"()[]_/\\:;0123456789AHM",
    *"\u00c9\u00e9\u00df\u00f1\u00fc\u0130\u0131\u0301\u200b\u00a0\t\n\u6f22\u5b57\u3072\uac00\U0001f600\u0153\ufb01\u00bd",
    *"\u2013\u201c\u2026<>|&%$#@^~`{}",
    *("mass", "head", "the", "MASS", "Head", "</s>", "[SEP]", "[MASK]", "<|endoftext|>", "<pad>", "<unk>", "'s", "  "),
]


def texts(name: str) -> list[str]:
    """Short and long ones, an empty one; of letters with and without accents, Chinese, spaces and special tokens."""
    rng = random.Random(0)
    drawn = ["".join(rng.choice(ALPHABET) for _ in range(rng.randint(1, 25))) for _ in range(300)]
    if name == "siglip":  # of zero-width spaces and lone accents SentencePiece makes other tokens than tokenizers does
        drawn = [re.sub("\u200b|\u0301|</s>", "", text) for text in drawn]
    if name in ("t5", "nllb", "xlm-roberta"):  # in open_clip's form alone, which cleans a text first
        drawn = [" ".join(text.replace("\u200b", "").split()) for text in drawn]
        # Of a space before a special token version 4 of transformers makes a token, version 5 none.
        drawn = [re.sub(" (?=<pad>|<unk>|</s>)", "", text) for text in drawn]
    return ["", "a", "\u5934mass \u5934head", "mass " * 60, "x" * 150, *drawn]


# --- folders ---


def bert(folder: Path) -> None:
    from transformers import BertConfig, BertTokenizerFast

    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *WORDS,
        *"ehdswtrnm",
        *(f"##{letter}" for letter in "aehdmswt"),
    ]
    words += ["\u6f22", "##\u5b57", "Head", "\u00e9", "E"]
    BertConfig(vocab_size=len(words)).save_pretrained(folder)
    BertTokenizerFast(vocab={word: number for number, word in enumerate(words)}).save_pretrained(folder)


def clip(folder: Path) -> None:
    from transformers import CLIPConfig

    CLIPConfig().save_pretrained(folder)
    clip_tokenizer(folder)


def roberta(folder: Path) -> None:
    from transformers import RobertaConfig

    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    pairs = byte_pairs(tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False), special, 330)
    pairs.post_processor = tokenizers.processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    save(folder, RobertaConfig(), pairs, "RobertaTokenizer", add_prefix_space=False)


def byte_pairs(split: Any, special: list[str], size: int) -> Any:
    pairs = tokenizers.Tokenizer(tokenizers.models.BPE())
    pairs.pre_tokenizer = split
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=special,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pairs.train_from_iterator([" ".join(WORDS[number:]) for number in range(len(WORDS))], trainer)
    return pairs


def gemma(folder: Path) -> None:
    from transformers import SiglipConfig

    pairs = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    pairs.normalizer = tokenizers.normalizers.Replace(" ", "\u2581")
    pairs.pre_tokenizer = tokenizers.pre_tokenizers.Split(" ", "merged_with_previous")
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=60, special_tokens=special, show_progress=False)
    pairs.train_from_iterator([" ".join(WORDS[number:]) for number in range(len(WORDS))], trainer)
    pairs.post_processor = tokenizers.processors.TemplateProcessing("$A <eos>", special_tokens=[("<eos>", 1)])
    save(folder, SiglipConfig(), pairs, "GemmaTokenizer", padding_side="right", add_bos_token=False, add_eos_token=True)


def xlm(folder: Path) -> None:
    from transformers import XLMRobertaConfig

    pieces = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(f"\u2581{word}", -2.0) for word in WORDS] + [(letter, -4.0) for letter in "aehmdswtxr\u2581"]
    made = tokenizers.Tokenizer(tokenizers.models.Unigram([*pieces, ("<mask>", 0.0)], unk_id=3))
    made.normalizer = tokenizers.normalizers.Replace(tokenizers.Regex(" {2,}"), " ")
    made.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.WhitespaceSplit(), tokenizers.pre_tokenizers.Metaspace()]
    )
    made.post_processor = tokenizers.processors.TemplateProcessing(
        "<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    made.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    save(folder, XLMRobertaConfig(), made, "XLMRobertaTokenizer")


def t5(folder: Path) -> None:
    from transformers import T5Config

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(f"\u2581{word}", -2.0) for word in WORDS] + [(letter, -4.0) for letter in "aehmdswtxr\u2581"]
    made = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=2))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.WhitespaceSplit(), tokenizers.pre_tokenizers.Metaspace()]
    )
    made.post_processor = tokenizers.processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    extra = [f"<extra_id_{number}>" for number in range(3)]
    made.add_special_tokens(["<pad>", "</s>", "<unk>", *extra])
    save(folder, T5Config(), made, "T5Tokenizer", extra_ids=3, additional_special_tokens=extra)


def of_version_4(name: str) -> Change:
    """A SentencePiece model with its map of characters, as version 4 of transformers made tokenizer.json of it."""

    def apply(folder: Path) -> None:
        siglip_folder(folder.parent / "pieces")
        pieces, _, charsmap = _read_pieces((folder.parent / "pieces/spiece.model").read_bytes())
        start = [("<s>", 0.0), ("<pad>", 0.0)] if name == "xlm-roberta" else [("<pad>", 0.0)]
        words = [one for one in pieces if one[0] not in ("<unk>", "</s>")]
        vocabulary = [*start, ("</s>", 0.0), ("<unk>", 0.0), *words]
        made = tokenizers.Tokenizer(tokenizers.models.Unigram(vocabulary, unk_id=len(start) + 1))
        made.normalizer = tokenizers.normalizers.Sequence(
            [
                tokenizers.normalizers.Precompiled(charsmap),
                tokenizers.normalizers.Replace(tokenizers.Regex(" {2,}"), " "),
            ]
        )
        made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
        ends = [("</s>", len(start)), ("<s>", 0)] if len(start) == 2 else [("</s>", 1)]
        single = "<s> $A </s>" if len(start) == 2 else "$A </s>"
        made.post_processor = tokenizers.processors.TemplateProcessing(single, special_tokens=ends)
        made.add_special_tokens([token for token, _ in vocabulary[: len(start) + 2]])
        made.save(str(folder / "tokenizer.json"))

    return apply


def nllb(folder: Path) -> None:
    from transformers import M2M100Config

    pairs = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", fuse_unk=True))
    pairs.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=60, special_tokens=special, show_progress=False)
    pairs.train_from_iterator([" ".join(WORDS[number:]) for number in range(len(WORDS))], trainer)
    languages = ["eng_Latn", "deu_Latn"]
    pairs.add_special_tokens([*languages, "<mask>"])
    ends = [("</s>", 2), ("eng_Latn", pairs.token_to_id("eng_Latn"))]
    pairs.post_processor = tokenizers.processors.TemplateProcessing("eng_Latn $A </s>", special_tokens=ends)
    save(folder, M2M100Config(), pairs, "NllbTokenizer", additional_special_tokens=languages)


def mpnet(folder: Path) -> None:
    from transformers import MPNetConfig

    words = ["<s>", "<pad>", "</s>", "[UNK]", "<mask>", *WORDS, *"ehdswtrnm", *(f"##{letter}" for letter in "aehmdswt")]
    words += ["\u6f22", "##\u5b57", "Head", "\u00e9", "E"]
    vocabulary = {word: number for number, word in enumerate(words)}
    made = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    made.normalizer = tokenizers.normalizers.BertNormalizer()
    made.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    made.post_processor = tokenizers.processors.RobertaProcessing(("</s>", 2), ("<s>", 0), True, False)
    made.add_special_tokens([*words[:4], tokenizers.AddedToken("<mask>", lstrip=True, special=True)])
    save(folder, MPNetConfig(), made, "MPNetTokenizer", unk_token="[UNK]")


def siglip(folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"{siglip_folder.__module__}.WORDS", ["<u", "k>", "<", ">", *WORDS])  # as real vocabularies have
        siglip_folder(folder)


def save(folder: Path, config: Any, made: Any, name: str, **more: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    made.save(str(folder / "tokenizer.json"))
    special = {one: one for one in made.get_vocab() if one.startswith("<") and one.endswith(">")}
    named = {"<s>": ("bos", "cls"), "</s>": ("eos", "sep"), "<bos>": ("bos",), "<eos>": ("eos",)}
    named |= {f"<{one}>": (one,) for one in ("pad", "unk", "mask")}
    stated = {f"{one}_token": token for token in special for one in named.get(token, ())}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name} | stated | more))


FOLDERS = {
    **{"bert": bert, "clip": clip, "roberta": roberta, "gemma": gemma, "xlm-roberta": xlm, "siglip": siglip},
    **{"t5": t5, "nllb": nllb, "mpnet": mpnet},
}
KINDS = {"gemma": "siglip", "t5": "mt5", "nllb": "m2m_100"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("tokenizers")
    for name, make in FOLDERS.items():
        make(place / name)
    return place


# --- changes ---

Change = Callable[[Path], Any]


def stated(**values: Any) -> Change:
    """``tokenizer_config.json`` with these; None leaves a key out, and ``"null"`` makes it null."""

    def apply(folder: Path) -> None:
        path = folder / "tokenizer_config.json"
        content = json.loads(path.read_text()) | values
        kept = {key: None if value == "null" else value for key, value in content.items() if value is not None}
        path.write_text(json.dumps(kept))

    return apply


def inside(**parts: Any) -> Change:
    """``tokenizer.json`` with these parts, or with their keys changed where the value is a table."""

    def apply(folder: Path) -> None:
        path = folder / "tokenizer.json"
        content = json.loads(path.read_text())
        for key, value in parts.items():
            merges = isinstance(value, dict) and "type" not in value and isinstance(content.get(key), dict)
            content[key] = content[key] | value if merges else value
        path.write_text(json.dumps(content))

    return apply


def each(*changes: Change) -> Change:
    return lambda folder: [change(folder) for change in changes]


def more(**tokens: Any) -> Change:
    return lambda folder: (folder / "special_tokens_map.json").write_text(json.dumps(tokens))


def decoder(change: Change | None = None, **flags: Any) -> Change:
    """``added_tokens_decoder`` as the file has it, but for these flags of its first token."""

    def apply(folder: Path) -> None:
        added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
        table = {str(one.pop("id")): one for one in added}
        first = next(iter(table))
        table[first] |= flags
        stated(added_tokens_decoder=table)(folder)

    return apply


def token(content: str, **flags: Any) -> dict[str, Any]:
    usual = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}
    return {"content": content} | usual | flags


def typed(content: str) -> dict[str, Any]:
    return token(content) | {"__type": "AddedToken"}


def vocabulary_alone(folder: Path) -> None:
    words = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    (folder / "vocab.txt").write_text("\n".join(sorted(words, key=words.__getitem__)))
    (folder / "tokenizer.json").unlink()


SPACES = {"replacement": "\u2581", "prepend_scheme": "always", "split": True}
LEFT = {"direction": "Left", "strategy": {"Fixed": 9}, "pad_id": 0, "pad_type_id": 0, "pad_token": "[PAD]"}
LEFT_CUT = {"direction": "Left", "max_length": 9, "strategy": "LongestFirst", "stride": 0}
EQUAL: dict[str, tuple[str, Change]] = {
    **{name: (name, lambda folder: None) for name in FOLDERS},
    **{f"{name} without class": (name, stated(tokenizer_class=None)) for name in ("bert", "clip", "roberta", "t5")},
    **{f"{name} without configuration": (name, without("tokenizer_config.json")) for name in ("bert", "clip")},
    **{
        f"{name} fast": (name, stated(tokenizer_class=f"{FOLDERS_CLASS}Fast"))
        for name, FOLDERS_CLASS in (
            ("bert", "BertTokenizer"),
            ("clip", "CLIPTokenizer"),
            ("roberta", "RobertaTokenizer"),
            ("t5", "T5Tokenizer"),
            ("nllb", "NllbTokenizer"),
            ("mpnet", "MPNetTokenizer"),
        )
    },
    **{
        f"{name} as it is": (name, stated(tokenizer_class="PreTrainedTokenizerFast"))
        for name in FOLDERS
        if name != "siglip"
    },
    "siglip cased": ("siglip", stated(do_lower_case=False)),
    "siglip without class": ("siglip", stated(tokenizer_class=None)),
    "siglip without configuration": ("siglip", without("tokenizer_config.json")),
    "siglip of another padding": ("siglip", stated(pad_token="<unk>")),
    "siglip beside a file": ("siglip", lambda folder: (folder / "tokenizer.json").write_text("{}")),
    "bert cased": ("bert", stated(do_lower_case=False)),
    "bert cased without class": ("bert", stated(do_lower_case=False, tokenizer_class=None)),
    "bert cased, as it is": ("bert", stated(do_lower_case=False, tokenizer_class="PreTrainedTokenizerFast")),
    "bert cased in the file alone": ("bert", each(stated(do_lower_case=None), inside(normalizer={"lowercase": False}))),
    "bert with accents": ("bert", stated(strip_accents=False)),
    "bert cased without accents": ("bert", stated(strip_accents=True, do_lower_case=False)),
    "bert, Chinese in words": ("bert", stated(tokenize_chinese_chars=False)),
    "bert, Chinese in words in the file alone": (
        "bert",
        each(stated(tokenize_chinese_chars=None), inside(normalizer={"handle_chinese_chars": False})),
    ),
    "bert of another padding": ("bert", stated(pad_token="[MASK]")),
    "bert of another padding by the map": ("bert", more(pad_token="[MASK]")),
    "bert of tables": ("bert", stated(cls_token=typed("[CLS]"), pad_token=typed("[MASK]"))),
    "bert, a word special": ("bert", stated(additional_special_tokens=["mass"])),
    "bert, a word special by the map": ("bert", more(extra_special_tokens=["mass"])),
    "bert of numbered tokens": ("bert", decoder()),
    "bert of words": ("bert", vocabulary_alone),
    "bert of words, cased": ("bert", each(vocabulary_alone, stated(do_lower_case=False))),
    "bert of words, other": (
        "bert",
        each(vocabulary_alone, stated(tokenize_chinese_chars=False, strip_accents=False, cls_token="[MASK]")),
    ),
    "distilbert": ("bert", stated(tokenizer_class="DistilBertTokenizerFast")),
    "clip of another padding": ("clip", stated(pad_token="a")),
    "clip, lower case said": ("clip", stated(do_lower_case=False)),
    "clip in pieces": ("clip", split_up_tokenizer),
    "nllb in German": ("nllb", stated(src_lang="deu_Latn")),
    "nllb, language behind": ("nllb", stated(legacy_behaviour=True)),
    "nllb, language behind in the file alone": (
        "nllb",
        inside(post_processor={"type": "BertProcessing", "sep": ["</s>", 2], "cls": ["<s>", 0]}),
    ),
    "t5 of spaces alone": ("t5", inside(pre_tokenizer={"type": "Metaspace", **SPACES})),
    "t5 of version 4": ("t5", each(stated(additional_special_tokens=None, extra_ids=0), of_version_4("t5"))),
    "xlm of version 4": ("xlm-roberta", each(stated(mask_token=None), of_version_4("xlm-roberta"))),
    "t5 of mT5's class": ("t5", stated(tokenizer_class="MT5Tokenizer")),
    "t5 of another padding": ("t5", stated(pad_token="<unk>")),
    "t5 without its own tokens": ("t5", stated(additional_special_tokens=None)),
    "mpnet cased": ("mpnet", stated(do_lower_case=False)),
    "mpnet with accents": ("mpnet", stated(strip_accents=False)),
    "mpnet of numbered tokens": ("mpnet", decoder()),
    "roberta with a space": ("roberta", stated(add_prefix_space=True)),
    "roberta with a space in the file alone": (
        "roberta",
        each(stated(add_prefix_space=None), inside(pre_tokenizer={"add_prefix_space": True})),
    ),
}
OTHERWISE: dict[str, tuple[str, Change, str]] = {
    "unknown": ("bert", stated(unk_token="[MASK]"), r"unk_token = '\[UNK\]', but BertTokenizer takes '\[MASK\]'"),
    "start": ("bert", stated(cls_token="[MASK]"), r"its post_processor, but BertTokenizer with cls_token = \[MASK\]"),
    "end": ("bert", more(sep_token="[MASK]"), r"its post_processor, but .*sep_token = \[MASK\]"),
    "no such token": ("bert", stated(pad_token="[PADDING]"), r"'\[PADDING\]' among the special tokens"),
    "no such word": ("bert", stated(additional_special_tokens=["mass-head"]), "'mass-head' among the special tokens"),
    "number": ("bert", stated(added_tokens_decoder={"5": token("head")}), "no added token 'head' of that number"),
    "spaces around": ("roberta", decoder(rstrip=True), "added_tokens_decoder uses them in another way"),
    "added": (
        "bert",
        lambda folder: (folder / "added_tokens.json").write_text('{"mass-head": 99}'),
        r"'mass-head' of that number, but added_tokens\.json has it",
    ),
    "normaliser": ("bert", inside(normalizer={"type": "Lowercase"}), "its normalizer, but BertTokenizer"),
    "cleaning": ("bert", inside(normalizer={"clean_text": False}), "its normalizer, but BertTokenizer"),
    "splitting": ("bert", inside(pre_tokenizer={"type": "WhitespaceSplit"}), "its pre_tokenizer, but BertTokenizer"),
    "word parts": ("bert", inside(model={"continuing_subword_prefix": ""}), "continuing_subword_prefix = ''"),
    "long words": ("bert", inside(model={"max_input_chars_per_word": 500}), "max_input_chars_per_word = 500"),
    "another model": ("clip", stated(tokenizer_class="BertTokenizer"), "BertTokenizer"),
    "clip's case": ("clip", inside(normalizer={"type": "NFC"}), "its normalizer, but CLIPTokenizer"),
    "clip's splitting": (
        "clip",
        inside(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}),
        "its pre_tokenizer, but CLIPTokenizer",
    ),
    "clip's ends": ("clip", inside(post_processor=None), "its post_processor, but CLIPTokenizer"),
    "clip's space": ("xlm-roberta", stated(add_prefix_space=False), "add_prefix_space = false is stated"),
    "as it is, space": (
        "roberta",
        stated(tokenizer_class="PreTrainedTokenizerFast", add_prefix_space=True),
        "add_prefix_space = true is stated",
    ),
    "chance": ("roberta", inside(model={"dropout": 0.5}), "dropout"),
    "gemma's case": ("gemma", inside(normalizer={"type": "Lowercase"}), "its normalizer, but GemmaTokenizer"),
    "gemma's start": ("gemma", stated(add_bos_token=True), "add_bos_token = true is stated"),
    "gemma's end": ("gemma", stated(add_eos_token=False), "add_eos_token = false is stated"),
    "gemma's side": ("gemma", stated(padding_side=None), "padding_side left"),
    "filled up in front": ("bert", inside(padding=LEFT), "padding_side left"),
    "cut in front": ("bert", inside(truncation=LEFT_CUT), "truncation_side left"),
    "no side": ("bert", stated(padding_side="middle"), "padding_side 'middle'"),
    "special ones split": ("bert", stated(split_special_tokens=True), "split_special_tokens = true"),
    "t5 without spaces before": (
        "t5",
        inside(pre_tokenizer={"type": "Metaspace", **SPACES, "prepend_scheme": "never"}),
        "its pre_tokenizer, but T5Tokenizer",
    ),
    "t5's end": ("t5", inside(post_processor=None), "its post_processor, but T5Tokenizer"),
    "t5's case": ("t5", inside(normalizer={"type": "Lowercase"}), "its normalizer, but T5Tokenizer"),
    "t5 of pairs": ("nllb", stated(tokenizer_class="T5Tokenizer"), "T5Tokenizer takes one of Unigram"),
    "xlm's case": ("xlm-roberta", inside(normalizer={"type": "Lowercase"}), "its normalizer, but XLMRobertaTokenizer"),
    "xlm's spaces": (
        "xlm-roberta",
        inside(pre_tokenizer={"type": "Metaspace", **SPACES, "prepend_scheme": "never"}),
        "its pre_tokenizer, but XLMRobertaTokenizer",
    ),
    "nllb's language": ("nllb", stated(src_lang="fra_Latn"), "has no fra_Latn, which NLLB's puts to each text"),
    "nllb's case": ("nllb", inside(normalizer={"type": "Lowercase"}), "its normalizer, but NllbTokenizer"),
    "mpnet, Chinese": ("mpnet", stated(tokenize_chinese_chars=False), "its normalizer, but MPNetTokenizer"),
    "a class that is not known": (
        "xlm-roberta",
        stated(tokenizer_class="AlbertTokenizer"),
        "a AlbertTokenizer, of which",
    ),
    "m2m": ("nllb", stated(tokenizer_class="M2M100Tokenizer"), "or PreTrainedTokenizerFast, which uses the file as it"),
    "siglip without pieces": ("gemma", stated(tokenizer_class="SiglipTokenizer"), "which is of a SentencePiece model"),
    "siglip by its kind": ("gemma", stated(tokenizer_class=None), "which is of a SentencePiece model"),
    "siglip's end": ("siglip", stated(eos_token="<unk>"), "eos_token '<unk>' in tokenizer_config"),
    "siglip's unknown": ("siglip", stated(unk_token="</s>"), "unk_token '</s>' in tokenizer_config"),
    "siglip's chance": ("siglip", stated(sp_model_kwargs={"enable_sampling": True}), "sp_model_kwargs"),
    "words of another class": (
        "bert",
        each(vocabulary_alone, stated(tokenizer_class="BertJapaneseTokenizer")),
        "no tokenizer.json",
    ),
}


def ours(folder: Path, name: str) -> list[list[int]]:
    kind = KINDS.get(name, name)
    clean = "none" if kind in ("clip", "siglip") else "whitespace"
    found = read_tokenizer(folder, LENGTH, kind, clean, {})
    assert found is not None
    if clean != "none":
        found._clean = str  # open_clip's, which is compared elsewhere
    return [list(map(int, row)) for row in found(texts(name))]


def theirs(folder: Path, name: str) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = tokenizer(texts(name), padding="max_length", max_length=LENGTH, truncation=True)["input_ids"]
    return [list(row) for row in found]


@pytest.mark.filterwarnings("ignore:This sequence already has")
@pytest.mark.parametrize("case", EQUAL)
def test_tokens_are_those_of_transformers_own_tokenizer(case: str, whole: Path, tmp_path: Path) -> None:
    name, change = EQUAL[case]
    shutil.copytree(whole / name, tmp_path / "folder")
    change(tmp_path / "folder")
    assert ours(tmp_path / "folder", name) == theirs(tmp_path / "folder", name)


@pytest.mark.parametrize("case", OTHERWISE)
def test_files_that_contradict_each_other_are_refused_by_name(case: str, whole: Path, tmp_path: Path) -> None:
    name, change, says = OTHERWISE[case]
    shutil.copytree(whole / name, tmp_path / "folder")
    change(tmp_path / "folder")
    with pytest.raises(BackboneError, match=says):
        ours(tmp_path / "folder", name)

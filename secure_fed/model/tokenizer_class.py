"""What transformers puts over ``tokenizer.json``: classes build parts of it anew, from ``tokenizer_config.json``.

A folder names a class, and each has its own idea of normaliser, splitting, start and end (transformers 5 builds them
anew; 4 takes the file's, and changes some). What all versions do alike is done here. Where they would make other tokens
of a text, the files contradict each other, and the part or key is named.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from secure_fed.core.errors import BackboneError
from secure_fed.model.given_files import AGAIN, Foreign, checked, read_json
from secure_fed.model.model_config import Token

CLIP_SPLIT = r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""
"""How CLIP's tokenizer splits a text into words (Radford et al., arXiv 2103.00020)."""

_PROBES = (
    "",
    "a",
    " two  words\tand\nlines ",
    "An X-ray of the CHEST, 3.5 cm; it's there, isn't it?",
    "\u00c5ngstr\u00f6m na\u00efve \u0130STANBUL stra\u00dfe e\u0301 \ufb01 \u00bd \u212b",
    "\u5934\u90e8CT\u626b\u63cf \u80bf\u5757a\u3042\u30ab\ud55c\uad6d",
    "\u0441\u043d\u0438\u043c\u043e\u043a \u2603 \U0001f600 \u200b\u00a0x\u00ad\x00\x1fy\ufffd",
    "a_b-c/d\\e (f) [g] {h} <i> #j @k $l %m &n *o +p =q ~r `s ^t |u \"v\" 'w'",
    "w" * 120 + " 0123456789 10,000",
)
"""Texts on which ways to tokenize differ: case, accents, composed letters, scripts, signs, spaces, long words."""

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class _Added(Foreign):
    content: str
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = True
    special: bool = False


_Special = str | _Added | None


class Config(Foreign):
    """``tokenizer_config.json`` and ``special_tokens_map.json``: what decides about tokens."""

    tokenizer_class: str | None = None
    do_lower_case: bool | None = None
    strip_accents: bool | None = None
    tokenize_chinese_chars: bool | None = None
    add_prefix_space: bool | None = None
    add_bos_token: bool | None = None
    add_eos_token: bool | None = None
    split_special_tokens: bool | None = None
    padding_side: str | None = None
    truncation_side: str | None = None
    model_input_names: list[str] | None = None
    sp_model_kwargs: dict[str, Any] | None = None
    src_lang: str | None = None
    legacy_behaviour: bool | None = None
    bos_token: _Special = None
    eos_token: _Special = None
    unk_token: _Special = None
    sep_token: _Special = None
    pad_token: _Special = None
    cls_token: _Special = None
    mask_token: _Special = None
    additional_special_tokens: list[str | _Added] | None = None
    extra_special_tokens: list[str | _Added] | dict[str, str | _Added] | None = None
    added_tokens_decoder: dict[Token, _Added] | None = None

    def token(self, name: str) -> str | None:
        """A special token by its key, as ``pad_token``; None where none is stated."""
        found: str | None = _text(getattr(self, name))
        return found

    @property
    def specials(self) -> list[str]:
        """All special tokens that are stated."""
        more = self.extra_special_tokens or []
        listed = list(more.values() if isinstance(more, dict) else more) + list(self.additional_special_tokens or [])
        return list(dict.fromkeys(filter(None, [*map(self.token, _NAMED), *map(_text, listed)])))


class _Counted(Foreign):
    added: dict[str, Token] = Field(default_factory=dict)


def read_config(folder: Path) -> Config:
    """What ``tokenizer_config.json`` and ``special_tokens_map.json`` say together.

    The second holds, unless the first has ``added_tokens_decoder``.

    Raises:
        BackboneError: a file is malformed, or names code.
    """
    path = folder / "tokenizer_config.json"
    content = read_json(path) if path.is_file() else {}
    if "auto_map" in content:
        raise BackboneError(
            f"{path}: its tokenizer comes with code of its own (auto_map), which is never run; expected one of "
            "transformers' own"
        )
    config = checked(content, Config, path)
    other = folder / "special_tokens_map.json"
    if not other.is_file() or config.added_tokens_decoder is not None:
        return config
    over = checked(read_json(other), Config, other)
    stated = {name: getattr(over, name) for name in (*_NAMED, "additional_special_tokens", "extra_special_tokens")}
    return config.model_copy(update={name: value for name, value in stated.items() if value is not None})


_Find = Callable[[str], tuple[str, int]]
"""Of a special token's key, the token and its number."""


@dataclass(frozen=True)
class _Class:
    """A tokenizer of transformers: its special tokens where nothing is stated, and the parts that it makes anew."""

    usual: dict[str, str]
    parts: Callable[[Config, _Find, Mapping[str, Any]], dict[str, Any]]
    model: dict[str, Any]
    left: bool = False


def _bert(config: Config, named: _Find, content: Mapping[str, Any]) -> dict[str, Any]:
    from tokenizers import normalizers, pre_tokenizers, processors

    return {
        "normalizer": normalizers.BertNormalizer(
            clean_text=True,
            handle_chinese_chars=config.tokenize_chinese_chars is not False,
            strip_accents=config.strip_accents,
            lowercase=config.do_lower_case is not False,
        ),
        "pre_tokenizer": pre_tokenizers.BertPreTokenizer(),
        "post_processor": processors.BertProcessing(named("sep_token"), named("cls_token")),
    }


def _clip(config: Config, named: _Find, content: Mapping[str, Any]) -> dict[str, Any]:
    from tokenizers import Regex, normalizers, pre_tokenizers, processors

    return {
        "normalizer": normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
        ),
        "pre_tokenizer": pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(CLIP_SPLIT), behavior="removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        ),
        "post_processor": processors.RobertaProcessing(named("eos_token"), named("bos_token"), False, False),
    }


def _roberta(config: Config, named: _Find, content: Mapping[str, Any]) -> dict[str, Any]:
    from tokenizers import pre_tokenizers, processors

    spaced = bool(config.add_prefix_space)
    return {
        "normalizer": None,
        "pre_tokenizer": pre_tokenizers.ByteLevel(add_prefix_space=spaced),
        "post_processor": processors.RobertaProcessing(named("sep_token"), named("cls_token"), True, spaced),
    }


def _mpnet(config: Config, named: _Find, content: Mapping[str, Any]) -> dict[str, Any]:
    from tokenizers import processors

    ends = processors.RobertaProcessing(named("sep_token"), named("cls_token"), True, False)
    return _bert(config, named, content) | {"post_processor": ends}


def _pieces(start: bool) -> Callable[[Config, _Find, Mapping[str, Any]], dict[str, Any]]:
    """Of a unigram SentencePiece model, whose map of characters is the file's; with a start of text or without."""

    def parts(config: Config, named: _Find, content: Mapping[str, Any]) -> dict[str, Any]:
        from tokenizers import pre_tokenizers, processors

        ends = [named("bos_token"), named("eos_token")] if start else [named("eos_token")]
        single = [*(token for token, _ in ends[:-1]), "$A", ends[-1][0]]
        return {
            "normalizer": _charsmap(content),
            "pre_tokenizer": pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]),
            "post_processor": processors.TemplateProcessing(single=single, special_tokens=ends),
        }

    return parts


def _nllb(config: Config, named: _Find, content: Mapping[str, Any]) -> dict[str, Any]:
    from tokenizers import Regex, normalizers, pre_tokenizers

    mapped = _charsmap(content)
    return {
        "normalizer": mapped and normalizers.Sequence([mapped, normalizers.Replace(Regex(" {2,}"), " ")]),
        "pre_tokenizer": pre_tokenizers.Metaspace(),
    }


def _charsmap(content: Mapping[str, Any]) -> Any:
    """The map of characters that a file's normaliser has among its steps; None without one."""
    from tokenizers import normalizers

    normalizer = content.get("normalizer") or {}
    steps = normalizer.get("normalizers", [normalizer])
    found = next((one["precompiled_charsmap"] for one in steps if one.get("precompiled_charsmap")), None)
    return None if found is None else normalizers.Precompiled(base64.b64decode(found))


def _gemma(config: Config, named: _Find, content: Mapping[str, Any]) -> dict[str, Any]:
    from tokenizers import normalizers, pre_tokenizers

    return {
        "normalizer": normalizers.Replace(" ", "\u2581"),
        "pre_tokenizer": pre_tokenizers.Split(" ", "merged_with_previous"),
    }


def _siglip2(config: Config, named: _Find, content: Mapping[str, Any]) -> dict[str, Any]:
    from tokenizers import normalizers

    parts = _gemma(config, named, content)
    return parts | {"normalizer": normalizers.Sequence([normalizers.Lowercase(), parts["normalizer"]])}


_ANGLED = {"bos_token": "<s>", "eos_token": "</s>", "sep_token": "</s>", "cls_token": "<s>", "unk_token": "<unk>"}
_ANGLED |= {"pad_token": "<pad>", "mask_token": "<mask>"}
_SQUARED = {f"{name}_token": f"[{name.upper()}]" for name in ("unk", "sep", "pad", "cls", "mask")}
_ENDS = {"bos_token": "<|startoftext|>"} | dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>")
_GEMMAS = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "unk", "pad", "mask")}
_PLAIN = {"continuing_subword_prefix": "", "fuse_unk": False, "byte_fallback": False}
_PAIRS = {"fuse_unk": True, "byte_fallback": True}
_BERT = _Class(_SQUARED, _bert, {"continuing_subword_prefix": "##", "max_input_chars_per_word": 100})
BERTS = ("BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer", "ConvBertTokenizer")
"""Classes that are one, of BERT's list of words."""

_CLASSES = {
    **dict.fromkeys(BERTS, _BERT),
    "CLIPTokenizer": _Class(_ENDS, _clip, _PLAIN | {"end_of_word_suffix": "</w>"}),
    "RobertaTokenizer": _Class(_ANGLED, _roberta, _PLAIN | {"end_of_word_suffix": ""}),
    "MPNetTokenizer": _Class(_ANGLED | {"unk_token": "[UNK]"}, _mpnet, _BERT.model),
    "NllbTokenizer": _Class(_ANGLED, _nllb, _PLAIN | {"fuse_unk": True}),
    "T5Tokenizer": _Class({key: _ANGLED[key] for key in ("eos_token", "unk_token", "pad_token")}, _pieces(False), {}),
    "XLMRobertaTokenizer": _Class(_ANGLED, _pieces(True), {}),
    "GemmaTokenizer": _Class(_GEMMAS, _gemma, _PAIRS, left=True),
    "Siglip2Tokenizer": _Class(_GEMMAS, _siglip2, _PAIRS, left=True),
}
_CLASSES["MT5Tokenizer"] = _CLASSES["T5Tokenizer"]
_PLAINLY = ("", "PreTrainedTokenizer", "TokenizersBackend")
"""Classes that use ``tokenizer.json`` as it is, and a folder that names none."""

_SIGLIP = "SiglipTokenizer"
_OF_KIND = {
    "bert": "BertTokenizer",
    "clip": "CLIPTokenizer",
    "mt5": "T5Tokenizer",
    "roberta": "RobertaTokenizer",
    "siglip": _SIGLIP,
    "xlm-roberta": "XLMRobertaTokenizer",
}
_MODELS = dict.fromkeys(("MT5Tokenizer", "T5Tokenizer", "XLMRobertaTokenizer"), "Unigram") | {
    "MPNetTokenizer": "WordPiece"
}
_OF_PIECES = ("MT5Tokenizer", "NllbTokenizer", "T5Tokenizer", "XLMRobertaTokenizer")


def class_of(config: Config, kind: str) -> str:
    """The class that reads a folder's tokenizer: the one that it names, else that of its kind of model."""
    name = config.tokenizer_class or _OF_KIND.get(kind, "")
    return name.removesuffix("Fast")


def as_its_class(
    content: dict[str, Any], config: Config, name: str, folder: Path, clean: Callable[[str], str]
) -> dict[str, Any]:
    """A tokenizer as the class that reads it uses it.

    Args:
        content: a parsed ``tokenizer.json``, or what was made of other files.
        config: of :func:`read_config`.
        name: of :func:`class_of`.
        folder: where the files lie, for messages.
        clean: what happens to a text before, so that what it takes away makes no difference.

    Raises:
        BackboneError: the files contradict each other, so that versions of transformers make other tokens of them, or
            the class is one of which it is not known what it makes anew.
    """
    from tokenizers import Tokenizer

    known = _CLASSES.get(name)
    if known is None and name not in (*_PLAINLY, _SIGLIP):
        raise BackboneError(
            f"{folder}: a {name}, of which it is not known here how it uses tokenizer.json; expected one of "
            f"{', '.join((*_CLASSES, _SIGLIP))}, or PreTrainedTokenizerFast, which uses the file as it is: if that is "
            "what the model was trained with, write it as tokenizer_class into tokenizer_config.json"
        )
    _follow(content, config, name)
    made = Tokenizer.from_str(json.dumps(content))
    vocabulary = made.get_vocab(with_added_tokens=True)
    lacking = [token for token in config.specials if token not in vocabulary]
    if lacking:
        raise BackboneError(
            f"{folder}: tokenizer_config.json names {lacking[0]!r} among the special tokens, which is not in the "
            f"vocabulary; expected files of one tokenizer: {AGAIN}"
        )
    usual = {} if known is None else known.usual
    _refuse_added(content, config, name, folder)
    there = {one["content"] for one in content.get("added_tokens") or ()}
    more = [one for one in dict.fromkeys([*config.specials, *usual.values()]) if one in vocabulary and one not in there]
    if more:
        made.add_special_tokens(more)
    _refuse_sides(content, config, name, folder)
    if config.split_special_tokens:
        raise _contradiction(folder, "split_special_tokens = true", "special tokens in a text are known as such")
    if (content.get("model") or {}).get("dropout"):
        raise _contradiction(folder, "dropout", "a text always gets the same tokens")

    def named(key: str) -> tuple[str, int]:
        token = config.token(key) or usual[key]
        if token not in vocabulary:
            raise BackboneError(
                f"{folder}: the vocabulary has no {token}, {name}'s {key}; expected files of one tokenizer: {AGAIN}"
            )
        return token, vocabulary[token]

    _refuse_spaces(content, config, name, folder)
    _refuse_ends(made, config, vocabulary, folder)
    if known is not None:
        _refuse_parts(made, content, config, name, named, folder, [clean(_seen_by(name, text)) for text in _PROBES])
    found: dict[str, Any] = json.loads(made.to_str()) if more else content
    return found


def _seen_by(name: str, text: str) -> str:
    """A text without signs that a SentencePiece model's map of characters drops or makes a space: versions differ in
    spaces at a text's end, which nobody writes so."""
    return re.sub("[\u200b\ufffd\u00ad\\x00-\\x1f]", "", text) if name in _OF_PIECES else text


def _follow(content: dict[str, Any], config: Config, name: str) -> None:
    """What all versions put over the file."""
    normalizer = content.get("normalizer") or {}
    if _CLASSES.get(name) is _BERT and normalizer.get("type") == "BertNormalizer":
        content["normalizer"] = normalizer | {
            "lowercase": config.do_lower_case is not False,
            "strip_accents": config.strip_accents,
            "handle_chinese_chars": config.tokenize_chinese_chars is not False,
        }
    if name == "MPNetTokenizer" and normalizer.get("type") == "BertNormalizer":
        stated = {"lowercase": config.do_lower_case is not False, "strip_accents": config.strip_accents}
        content["normalizer"] = normalizer | stated
    if name == "NllbTokenizer":
        content["post_processor"] = _language(content, config)
    before = content.get("pre_tokenizer") or {}
    if name == "RobertaTokenizer" and before.get("type") == "ByteLevel":
        content["pre_tokenizer"] = before | {"add_prefix_space": bool(config.add_prefix_space)}
    if name == "Siglip2Tokenizer" and "Lowercase" not in json.dumps(normalizer):
        parts = [{"type": "Lowercase"}, *([normalizer] if normalizer else [])]
        content["normalizer"] = {"type": "Sequence", "normalizers": parts}


def _language(content: Mapping[str, Any], config: Config) -> Any:
    """The language before a text and its end, or both behind it, as NLLB has them (arXiv 2207.04672)."""
    end, language = config.token("eos_token") or "</s>", config.src_lang or "eng_Latn"
    numbers = dict((content.get("model") or {}).get("vocab") or {})
    numbers |= {one["content"]: one["id"] for one in content.get("added_tokens") or ()}
    if lacking := [one for one in (end, language) if one not in numbers]:
        raise BackboneError(
            f"the tokenizer's vocabulary has no {lacking[0]}, which NLLB's puts to each text (src_lang, eos_token); "
            f"expected files of one tokenizer: {AGAIN}"
        )
    order = ["$A", end, language] if config.legacy_behaviour else [language, "$A", end]
    return {
        "type": "TemplateProcessing",
        "single": [
            {"Sequence": {"id": "A", "type_id": 0}} if one == "$A" else {"SpecialToken": {"id": one, "type_id": 0}}
            for one in order
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {one: {"id": one, "ids": [numbers[one]], "tokens": [one]} for one in (end, language)},
    }


def _refuse_parts(
    made: Any,
    content: Mapping[str, Any],
    config: Config,
    name: str,
    named: _Find,
    folder: Path,
    probes: list[str],
) -> None:
    """Refuse a file whose parts make other tokens than those of the class that reads it."""
    known = _CLASSES[name]
    kind = _MODELS.get(name, "WordPiece" if known is _BERT else "BPE")
    if type(made.model).__name__ != kind:
        raise _contradiction(folder, f"a vocabulary of {type(made.model).__name__}", f"{name} takes one of {kind}")
    right = _tokens(made, probes)
    for part, theirs in known.parts(config, named, content).items():
        ours = getattr(made, part)
        setattr(made, part, theirs)
        if _tokens(made, probes) != right:
            raise _contradiction(folder, f"its {part}", f"{name}{_stated(config, part)} makes other tokens of a text")
        setattr(made, part, ours)
    model = known.model | ({"unk_token": named("unk_token")[0]} if hasattr(made.model, "unk_token") else {})
    if name == "RobertaTokenizer":  # bytes leave nothing unknown, and it names none
        del model["unk_token"]
    for key, value in model.items():
        before = getattr(made.model, key)
        setattr(made.model, key, value)
        if _tokens(made, probes) != right:
            raise _contradiction(folder, f"{key} = {before!r}", f"{name} takes {value!r}")
        setattr(made.model, key, before)


_DECIDES = {
    "normalizer": ("do_lower_case", "strip_accents", "tokenize_chinese_chars"),
    "pre_tokenizer": ("add_prefix_space",),
    "post_processor": ("bos_token", "cls_token", "sep_token", "eos_token"),
}


def _stated(config: Config, part: str) -> str:
    keys = {key: _text(getattr(config, key)) for key in _DECIDES[part] if getattr(config, key) is not None}
    found = ", ".join(f"{key} = {value}" for key, value in keys.items())
    return f" with {found}" if found else ""


def _tokens(made: Any, texts: list[str]) -> list[list[int]]:
    return [one.ids for one in made.encode_batch(texts)]


def _refuse_added(content: Mapping[str, Any], config: Config, name: str, folder: Path) -> None:
    """Refuse added tokens that stand in one file only, or are used in another way there."""
    from tokenizers import Tokenizer

    there = {one["id"]: one for one in content.get("added_tokens") or ()}
    path = folder / "added_tokens.json"
    counted = checked({"added": read_json(path)}, _Counted, path).added if path.is_file() else {}
    stated = {one.content: number for number, one in (config.added_tokens_decoder or {}).items()}
    for file, table in ((path.name, counted), ("added_tokens_decoder", stated)):
        other = [token for token, number in table.items() if there.get(number, {}).get("content") != token]
        if other:
            raise _contradiction(folder, f"no added token {other[0]!r} of that number", f"{file} has it")
    changed = {number: there[number] | one.model_dump() for number, one in (config.added_tokens_decoder or {}).items()}
    if all(there[number] == one for number, one in changed.items()):
        return
    # Used in another way, as with spaces around it: only where a text shows it.
    probes = [
        text
        for one in changed.values()
        for text in (
            f"a{one['content']}b",
            f"a {one['content']} b",
            f"{one['content'].upper()} {one['content'].lower()}",
        )
    ]
    both = [
        Tokenizer.from_str(json.dumps({**content, "added_tokens": list(table.values())}))
        for table in (there, there | changed)
    ]
    if [one.ids for one in both[0].encode_batch(probes)] != [one.ids for one in both[1].encode_batch(probes)]:
        raise _contradiction(folder, "its added_tokens", "added_tokens_decoder uses them in another way")


def _refuse_sides(content: Mapping[str, Any], config: Config, name: str, folder: Path) -> None:
    known = _CLASSES.get(name)
    usual = {"padding": "left" if known is not None and known.left else "right", "truncation": "right"}
    for what in ("padding", "truncation"):
        given = (content.get(what) or {}).get("direction", usual[what])
        side = getattr(config, f"{what}_side") or str(given).lower()
        if side not in ("left", "right"):
            raise BackboneError(
                f"{folder / 'tokenizer_config.json'}: {what}_side {side[:60]!r}; expected right: {AGAIN}"
            )
        if side == "left":
            raise BackboneError(
                f"{folder / 'tokenizer_config.json'}: {what}_side left (stated, or what {name or 'its class'} does "
                'where nothing is); expected "right", texts that are filled up and cut at their end: models trained so '
                "state it, others are not read"
            )


def _refuse_spaces(content: Mapping[str, Any], config: Config, name: str, folder: Path) -> None:
    """Refuse a stated space before a text that the file's splitting says otherwise of."""
    if config.add_prefix_space is None or _CLASSES.get(name) is _BERT:
        return
    for part in _nested(content.get("pre_tokenizer")):
        spaced = part.get("add_prefix_space")
        if part.get("type") == "Metaspace" and "prepend_scheme" in part:
            spaced = part["prepend_scheme"] != "never"
        if spaced is not None and spaced is not config.add_prefix_space:
            stated = str(config.add_prefix_space).lower()
            raise _contradiction(folder, "another space before a text", f"add_prefix_space = {stated} is stated")


def _nested(part: Any) -> Iterable[dict[str, Any]]:
    if isinstance(part, dict):
        yield part
        for inner in part.get("pretokenizers") or ():
            yield from _nested(inner)


def _refuse_ends(made: Any, config: Config, vocabulary: Mapping[str, int], folder: Path) -> None:
    """Refuse a stated start or end of a text that the file does not put there."""
    ids = made.encode("a").ids
    for key, token, place in (("add_bos_token", "bos_token", 0), ("add_eos_token", "eos_token", -1)):
        stated, named = getattr(config, key), config.token(token)
        if stated is None or named is None:
            continue
        if stated != (ids[place] == vocabulary[named]):
            does = "does not put it there" if stated else "puts it there"
            raise _contradiction(folder, f"a post_processor that {does}", f"{key} = {str(stated).lower()} is stated")


def _contradiction(folder: Path, file: str, other: str) -> BackboneError:
    return BackboneError(
        f"{folder}: tokenizer.json has {file}, but {other}, and versions of transformers differ in which holds; "
        "expected tokenizer.json and tokenizer_config.json of one tokenizer: save it again with the version that the "
        "model was trained with"
    )


def _text(value: Any) -> Any:
    """A special token, which is a text or a table with its content."""
    return value.content if isinstance(value, _Added) else value

"""A text's tokens: by open_clip's own vocabulary, or by the tokenizer files that lie beside a backbone's weights.

Files are read by the ``tokenizers`` library and by a small reader of SentencePiece models; no hub is asked, and
transformers is not needed.
"""

from __future__ import annotations

import hashlib
import json
import re
import string
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, cached_property
from pathlib import Path
from typing import Annotated, Any, Protocol

import torch
from pydantic import Field
from torch import Tensor

from secure_fed.core.canonical import canonical_json
from secure_fed.core.errors import BackboneError
from secure_fed.model.given_files import AGAIN, Foreign, checked, read_bytes, read_json, read_text
from secure_fed.model.model_config import Rules, Token
from secure_fed.model.tokenizer_class import BERTS, CLIP_SPLIT, Config, as_its_class, class_of, read_config

FILES = ("tokenizer.json", "spiece.model", "tokenizer.model", "vocab.txt", "vocab.json")
"""Any of these makes a tokenizer; ``vocab.json`` with ``merges.txt``."""

_PADS = {"siglip": ("</s>", "<pad>"), "clip": ("<|endoftext|>",)}


class Tokens(Protocol):
    """What a backbone asks of a tokenizer.

    Attributes:
        context: tokens that a row has.
        identity: SHA-256 (64 hex digits) of all that decides about a text's tokens but the context.
    """

    context: int

    @property
    def largest(self) -> int:
        """The highest token there is."""
        ...

    @property
    def identity(self) -> str:
        """SHA-256 of vocabulary and rules."""
        ...

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Tokens, int64 [n, context]; what is longer is cut off, with its end kept."""
        ...

    def count(self, text: str) -> int:
        """Tokens that a text takes, start and end included, if nothing is cut off."""
        ...


class ClipTokens:
    """open_clip's own byte pairs of English, which come with it."""

    def __init__(self, context: int, options: dict[str, Any] | None = None) -> None:
        from open_clip.tokenizer import default_bpe

        self.context = context
        self._options = options or {}
        self._tokenizer = _clip_byte_pairs(**self._options)
        self._vocabulary = Path(default_bpe())

    @property
    def largest(self) -> int:
        """The highest token there is, the end of a text."""
        return int(self._tokenizer.eot_token_id)

    @cached_property
    def identity(self) -> str:
        """SHA-256 of vocabulary and options."""
        return hashlib.sha256(self._vocabulary.read_bytes() + canonical_json(self._options)).hexdigest()

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Tokens, int64 [n, context]."""
        tokens: Tensor = self._tokenizer(list(texts), self.context)
        return tokens

    def count(self, text: str) -> int:
        """Tokens that a text takes, start and end included."""
        return len(self._tokenizer.encode(text)) + 2


@cache
def _clip_byte_pairs(**options: Any) -> Any:
    """open_clip's tokenizer with these options; to read its vocabulary takes as long as to build a small network."""
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer(**options)


class FileTokens:
    """A tokenizer of the ``tokenizers`` library, with the padding and the cleaning that its model was trained with."""

    def __init__(self, content: dict[str, Any], context: int, rules: dict[str, Any]) -> None:
        """Make it.

        Args:
            content: a parsed ``tokenizer.json``; its own truncation and padding do not count.
            context: tokens that a row has.
            rules: ``pad``, the token that fills rows up; ``clean``, what happens to a text first (``none``, open_clip's
                ``whitespace``, ``lower`` or ``canonicalize``, or ``siglip``); ``without``, a token that is set to 0.

        Raises:
            BackboneError: it is malformed, or lacks a token of the rules.
        """
        from tokenizers import Tokenizer

        self.context, self.rules = context, rules
        self.content = {key: value for key, value in content.items() if key not in ("truncation", "padding")}
        with _in_our_words("cannot be used"):
            self._tokenizer = Tokenizer.from_str(json.dumps(self.content))
            self._whole = Tokenizer.from_str(json.dumps(self.content))
        self.pad = self._id(rules["pad"])
        self._without = None if rules.get("without") is None else self._id(rules["without"])
        special = [
            one["content"] for one in self.content.get("added_tokens") or () if one.get("special") and one["content"]
        ]
        self._clean = _cleaner(rules["clean"], special)
        with _in_our_words(f"has no room for a text in {context} tokens"):
            self._tokenizer.enable_truncation(context)
            self._tokenizer.enable_padding(length=context, pad_id=self.pad, pad_token=rules["pad"])

    @cached_property
    def identity(self) -> str:
        """SHA-256 of the parsed file and the rules."""
        return hashlib.sha256(canonical_json([self.content, self.rules])).hexdigest()

    @property
    def largest(self) -> int:
        """The highest token there is."""
        return max(self._whole.get_vocab(with_added_tokens=True).values())

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Tokens, int64 [n, context]."""
        with _in_our_words("cannot read a text"):
            rows = self._tokenizer.encode_batch([self._clean(text) for text in texts])
        tokens = torch.tensor([row.ids for row in rows], dtype=torch.int64)
        return tokens if self._without is None else torch.where(tokens == self._without, 0, tokens)

    def count(self, text: str) -> int:
        """Tokens that a text takes, start and end included."""
        with _in_our_words("cannot read a text"):
            return len(self._whole.encode(self._clean(text)).ids)

    def _id(self, token: str) -> int:
        found = self._whole.token_to_id(token)
        if found is None:
            raise BackboneError(
                f"the tokenizer has no token {token!r}, which its model needs; expected the tokenizer files that came "
                "with the weights: copy the folder again"
            )
        return int(found)


@contextmanager
def _in_our_words(what: str, where: Path | str = "tokenizer.json") -> Iterator[None]:
    """The library raises of every kind, panics that are no exceptions of Python's included."""
    try:
        yield
    except (BackboneError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        reason = " ".join(str(error).split())[:200]
        raise BackboneError(f"{where}: malformed, so that the tokenizer {what} ({reason}); {AGAIN}") from error


class _Added(Foreign):
    id: Token
    content: str


class _Model(Foreign):
    type: str | None = None
    vocab: dict[str, Token] | list[tuple[str, float]] = Field(default_factory=dict)


class _Whole(Foreign):
    """``tokenizer.json``; what it does with texts, the library checks."""

    added_tokens: list[_Added] = Field(default_factory=list)
    normalizer: dict[str, Any] | None = None
    model: _Model

    @property
    def vocabulary(self) -> set[str]:
        """All tokens there are."""
        vocab = self.model.vocab
        return {one.content for one in self.added_tokens} | (
            set(vocab) if isinstance(vocab, dict) else {piece for piece, _ in vocab}
        )


def read_own_tokenizer(path: Path, context: int, rules: dict[str, Any]) -> FileTokens:
    """The tokenizer of a folder of ours.

    Raises:
        BackboneError: the file is malformed, or lacks a token of the rules.
    """
    content = read_json(path)
    checked(content, _Whole, path)
    return FileTokens(content, context, checked(rules, Rules, f"{path.parent}, tokenizer").model_dump())


def read_tokenizer(folder: Path, context: int, kind: str, clean: str, options: dict[str, Any]) -> FileTokens | None:
    """The tokenizer whose files lie in a folder; None if there is none.

    Args:
        folder: with one of :data:`FILES`, and ``tokenizer_config.json`` or ``special_tokens_map.json``.
        context: tokens that a row has.
        kind: whose it is where the files do not say: ``clip``, ``siglip`` or a text model's type, as ``bert``.
        clean: as :class:`FileTokens` takes it.
        options: open_clip's ``tokenizer_kwargs``.

    Raises:
        BackboneError: the files are malformed, or of a form that is not read.
    """
    if not any((folder / name).is_file() for name in FILES):
        return None
    config = read_config(folder)
    whole = (folder / "tokenizer.json").is_file()
    # Of a folder in open_clip's form, kind is a guess where it is none of a text model.
    name = class_of(config, kind if clean == "none" or kind not in _PADS or not whole else "")
    pieces = next((folder / one for one in ("spiece.model", "tokenizer.model") if (folder / one).is_file()), None)
    if name == "SiglipTokenizer" and pieces is None:
        raise BackboneError(
            f"{folder}: its tokenizer is not here: a SiglipTokenizer, which is of a SentencePiece model; expected "
            "spiece.model beside the other files: copy the whole folder"
        )
    if whole and name != "SiglipTokenizer":
        content = read_json(folder / "tokenizer.json")
        checked(content, _Whole, folder / "tokenizer.json")
    elif pieces is not None:
        with _in_our_words("cannot be used", pieces):
            content = _sentencepiece(pieces, config if name == "SiglipTokenizer" else None)
        if name == "SiglipTokenizer":
            clean = "siglip_cased" if config.do_lower_case is False else "siglip"
    elif (folder / "vocab.txt").is_file() and (name in BERTS or not config.tokenizer_class):
        name = name if name in BERTS else BERTS[0]
        with _in_our_words("cannot be used", folder / "vocab.txt"):
            content = _wordpiece(folder / "vocab.txt", config)
    elif (folder / "merges.txt").is_file() and name == "CLIPTokenizer":
        with _in_our_words("cannot be used", folder / "vocab.json"):
            content = _byte_pairs(folder)
    else:
        raise BackboneError(
            f"{folder}: a vocabulary, but no tokenizer.json, which says how it is used; expected one: on a machine "
            "with transformers, AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) writes it"
        )
    with _in_our_words("cannot be used", folder):
        content = as_its_class(content, config, name, folder, _cleaner(clean, ()))
    vocabulary = checked(content, _Whole, folder).vocabulary
    known = [*filter(None, [config.token("pad_token")]), *_PADS.get(kind, ()), "[PAD]", "<pad>"]
    pad = next((one for one in known if one in vocabulary), None)
    if pad is None:
        raise BackboneError(
            f"{folder}: the tokenizer's files name no token that fills short texts up; expected pad_token in "
            f"tokenizer_config.json: {AGAIN}"
        )
    without = (config.token("sep_token") or "[SEP]") if options.get("strip_sep_token") else None
    return FileTokens(content, context, {"pad": pad, "clean": clean, "without": without})


def _wordpiece(path: Path, config: Config) -> dict[str, Any]:
    """BERT's tokenizer of a list of words (Devlin et al., arXiv 1810.04805), as transformers makes it."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    words = read_text(path, "a vocabulary, a token a line").split("\n")
    vocabulary = {word.rstrip("\r"): number for number, word in enumerate(words) if word}
    unknown, start, end = (
        config.token(key) or usual
        for key, usual in (("unk_token", "[UNK]"), ("cls_token", "[CLS]"), ("sep_token", "[SEP]"))
    )
    for token in (unknown, start, end):
        if token not in vocabulary:
            raise BackboneError(f"{path}: has no token {token}; expected a BERT vocabulary: copy the folder again")
    made = Tokenizer(models.WordPiece(vocabulary, unk_token=unknown))
    made.normalizer = normalizers.BertNormalizer(
        lowercase=config.do_lower_case is not False,
        strip_accents=config.strip_accents,
        handle_chinese_chars=config.tokenize_chinese_chars is not False,
    )
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.BertProcessing((end, vocabulary[end]), (start, vocabulary[start]))
    made.add_special_tokens([one for one in (unknown, start, end, "[PAD]", "[MASK]") if one in vocabulary])
    return dict(json.loads(made.to_str()))


class _Vocabulary(Foreign):
    """``vocab.json``."""

    vocab: Annotated[dict[str, Token], Field(min_length=2)]


def _byte_pairs(folder: Path) -> dict[str, Any]:
    """CLIP's tokenizer of ``vocab.json`` and ``merges.txt``, as transformers makes it."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

    found = read_json(folder / "vocab.json")
    vocabulary = checked({"vocab": found}, _Vocabulary, folder / "vocab.json").vocab
    lines = read_text(folder / "merges.txt", "pairs of pieces, a line each").split("\n")
    merges = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#version"):
            continue
        pair = line.split()
        if len(pair) != 2 or "".join(pair) not in vocabulary:
            raise BackboneError(
                f"{folder / 'merges.txt'}, line {number}: found {line[:40]!r}, expected two pieces that make a token "
                "of vocab.json: copy both files again from where they came from"
            )
        merges.append((pair[0], pair[1]))
    start, end = "<|startoftext|>", "<|endoftext|>"
    if start not in vocabulary or end not in vocabulary:
        raise BackboneError(f"{folder / 'vocab.json'}: has no {start} or {end}; expected CLIP's vocabulary")
    # A file that was cut would make other tokens, and nothing else would tell.
    joined = {first + second for first, second in merges}
    special = re.compile(r"<.*>")
    words = {word: word.removesuffix("</w>") for word in vocabulary if word not in joined}
    lost = [word for word, bare in words.items() if len(bare) > 1 and not special.fullmatch(bare)]
    if lost:
        raise BackboneError(
            f"{folder / 'merges.txt'}: nothing in it makes {len(lost)} of vocab.json's tokens, {lost[0]!r} among them; "
            "expected a merge for each: the file was cut, copy it again"
        )
    model = models.BPE(
        vocab=vocabulary,
        merges=merges,
        continuing_subword_prefix="",
        end_of_word_suffix="</w>",
        fuse_unk=False,
        unk_token=end,
    )
    made = Tokenizer(model)
    made.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CLIP_SPLIT), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    made.post_processor = processors.RobertaProcessing((end, vocabulary[end]), (start, vocabulary[start]), False, False)
    made.add_special_tokens([start, end])
    return dict(json.loads(made.to_str()))


def _sentencepiece(path: Path, siglip: Config | None = None) -> dict[str, Any]:
    """A unigram SentencePiece model (Kudo, arXiv 1804.10959) with an end of text, as T5 and SigLIP use it.

    Args:
        path: the model.
        siglip: of a SigLIP, whose tokenizer knows its end, unknown and padding token in a text too, and what follows
            one of them begins no word. None for others.

    Raises:
        BackboneError: it is no such model, or a SigLIP's is used in another way than usual.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

    data = read_bytes(path, "a SentencePiece model")
    try:
        pieces, trainer, charsmap = _read_pieces(data)
    except (IndexError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BackboneError(
            f"{path}: no whole SentencePiece model; copy the folder again from where it came from"
        ) from error
    if trainer["model_type"] != 1:
        raise BackboneError(
            f"{path}: a SentencePiece model of byte pairs, which is read from tokenizer.json only; expected that file "
            "beside it: on a machine with transformers, AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER) "
            "writes it"
        )
    end = "</s>"
    names = {piece: number for number, (piece, _) in enumerate(pieces)}
    if end not in names:
        raise BackboneError(f"{path}: has no {end}; expected the SentencePiece model of a T5 or SigLIP text tower")
    made = Tokenizer(models.Unigram(pieces, unk_id=trainer["unk_id"], byte_fallback=bool(trainer["byte_fallback"])))
    steps: list[Any] = [normalizers.Precompiled(charsmap)] if charsmap else []
    made.normalizer = normalizers.Sequence(
        [
            *steps,
            normalizers.Replace(Regex(r"\A +| +\z"), ""),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    )
    made.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement="▁", prepend_scheme="always" if siglip is None else "first", split=False
    )
    made.post_processor = processors.TemplateProcessing(single=f"$A {end}", special_tokens=[(end, names[end])])
    if siglip is not None:
        for key, usual in (("eos_token", end), ("unk_token", "<unk>"), ("sp_model_kwargs", {})):
            stated = getattr(siglip, key) if key == "sp_model_kwargs" else siglip.token(key)
            if stated not in (None, usual):
                raise BackboneError(
                    f"{path.parent}: {key} {str(stated)[:60]!r} in tokenizer_config.json; expected {usual!r}, as "
                    "SigLIP's have it: another way is not read"
                )
        special = [one for one in dict.fromkeys([end, "<unk>", *siglip.specials]) if one in names]
        if words := [one for one in special if not re.fullmatch("<.+>", one)]:
            raise BackboneError(
                f"{path.parent}: {words[0]!r} is named among the special tokens, but is a piece of words too; expected "
                "special tokens in angle brackets, as SigLIP's have them: another way is not read"
            )
        made.add_special_tokens(
            [AddedToken(one, lstrip=True, rstrip=True, normalized=False, special=True) for one in special]
        )
    return dict(json.loads(made.to_str()))


def _read_pieces(data: bytes) -> tuple[list[tuple[str, float]], dict[str, int], bytes]:
    """Pieces with scores, the trainer's model type (1: unigram), unknown piece and byte fallback, the character map.

    The fields of sentencepiece_model.proto: ModelProto 1 pieces, 2 trainer_spec, 3 normalizer_spec; SentencePiece 1
    piece, 2 score; TrainerSpec 3 model_type, 35 byte_fallback, 40 unk_id; NormalizerSpec 2 precompiled_charsmap.
    """
    pieces: list[tuple[str, float]] = []
    trainer = {"model_type": 1, "byte_fallback": 0, "unk_id": 0}
    charsmap = b""
    for field, value in _fields(data):
        if field == 1:
            parts = dict(_fields(value))
            score = torch.frombuffer(bytearray(parts.get(2, bytes(4))), dtype=torch.float32)
            pieces.append((parts[1].decode("utf-8"), float(score)))
        elif field == 2:
            numbers = dict(_fields(value))
            trainer |= {
                name: numbers[number]
                for name, number in (("model_type", 3), ("byte_fallback", 35), ("unk_id", 40))
                if number in numbers
            }
        elif field == 3:
            charsmap = dict(_fields(value)).get(2, b"")
    if not pieces:
        raise KeyError("pieces")
    return pieces, trainer, charsmap


def _fields(data: bytes) -> list[tuple[int, Any]]:
    """The fields of a protocol buffer: bytes for lengths and fixed sizes, int for numbers."""
    found: list[tuple[int, Any]] = []
    place = 0

    def number() -> int:
        nonlocal place
        value = shift = 0
        while True:
            byte = data[place]
            place += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while place < len(data):
        key = number()
        kind = key & 7
        if kind == 0:
            found.append((key >> 3, number()))
            continue
        size = {1: 8, 5: 4}[kind] if kind != 2 else number()
        if place + size > len(data):
            raise IndexError("a field ends after the file")
        found.append((key >> 3, data[place : place + size]))
        place += size
    return found


def _cleaner(name: str, special: Sequence[str]) -> Callable[[str], str]:
    """What happens to a text first; SigLIP's tokenizer cleans what lies between special tokens.

    Where its vocabulary has no ``>``, transformers' loses an unknown letter behind such a token; ours does not.
    """
    if name == "none":
        return str
    if name in ("siglip", "siglip_cased"):
        drop = str.maketrans("", "", string.punctuation)
        between = re.compile(f"({'|'.join(map(re.escape, special))})") if special else None

        def canonical(text: str) -> str:
            lowered = text.lower() if name == "siglip" else text
            return re.sub(r"\s+", " ", lowered.translate(drop)).strip()

        def cleaned(text: str) -> str:
            parts = between.split(text.replace("▁", " ")) if between else [text.replace("▁", " ")]
            return "".join(part if number % 2 else canonical(part) for number, part in enumerate(parts))

        return cleaned
    from open_clip.tokenizer import get_clean_fn

    clean: Callable[[str], str] = get_clean_fn(name)
    return clean

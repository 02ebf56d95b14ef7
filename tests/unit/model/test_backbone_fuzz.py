"""Every configuration beside weights, damaged or edited by hand: a typed error or a usable backbone, nothing else.

A short run by default; ``FUZZ_EXAMPLES=N`` sets how many (``make fuzz``).
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from secure_fed.core.errors import BackboneDigestError, BackboneError
from secure_fed.model import backbone_store
from secure_fed.model.backbone import load_backbone
from secure_fed.model.backbone_fetch import add
from secure_fed.protocol.study_tables import Backbone
from tests.unit.model.test_backbone_forms import TEXTS, bert_folder, clip_folder, pictures, siglip_folder, split_up

torch.set_num_threads(1)

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "60"))
FILES = {
    "clip": ("config.json", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"),
    "pieces": ("tokenizer_config.json", "vocab.json", "model.safetensors.index.json", "merges.txt"),
    "siglip": ("config.json", "preprocessor_config.json", "tokenizer_config.json", "spiece.model"),
    "bert": ("open_clip_config.json", "text/config.json", "tokenizer.json", "tokenizer_config.json"),
    "store": ("backbone.json", "open_clip_config.json", "tokenizer.json"),
}
VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3, 7, 32, 2**31, 2**70, 0.0, 0.5, 1e-30, 1e30, "", "x", "random", "0", [], {}),
    *([0, 0, 0], [1], ["a", "b", "c"], [1.0, 2.0, 3.0], {"x": 1}, {"content": 3}, [[1, 2], [3]], [None]),
    {"height": 8, "width": 9},
]
RAW = [b"", b"{", b"[]", b"null", b"NaN", b'{"a": NaN}', b'{"a": 1e999}', b"\xff\xfe{", b"[" * 5000, b"\x80\x04."]
RAW += [b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12\n", b"<!DOCTYPE html>", b"7" * 6000]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A whole folder of each form, and one to damage."""
    place = tmp_path_factory.mktemp("fuzz")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(backbone_store.PLACE, str(place / "kept"))
        clip_folder(place / "clip")
        siglip_folder(place / "siglip")
        bert_folder(place / "bert")
        (place / "text").rename(place / "bert/text")
        shutil.copytree(place / "clip", place / "pieces")
        split_up(place / "pieces")
        kept, _ = add(place / "siglip", "hf-hub:a/b")
        kept.rename(place / "store")
        yield place


def places(content: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Keys that lead to each value of a document; of a long table or list to the first few."""
    inner = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    found = [path]
    for number, (key, value) in enumerate(inner):
        if number < 40:
            found += places(value, (*path, key))
    return found


def change(content: Any, path: tuple[Any, ...], how: str, value: Any) -> Any:
    """The document with one value of it replaced, left out, or another beside it."""
    if not path:
        return value
    *parents, last = path
    inner = content
    for key in parents:
        inner = inner[key]
    if how == "drop":
        del inner[last]
    elif how == "beside" and isinstance(inner, dict):
        inner["another"] = value
    else:
        inner[last] = value
    return content


@st.composite
def damage(draw: st.DrawFn) -> tuple[str, str, bytes | list[tuple[float, str, Any]]]:
    form = draw(st.sampled_from(sorted(FILES)))
    file = draw(st.sampled_from(FILES[form]))
    if draw(st.integers(0, 5)) == 0:
        return form, file, draw(st.sampled_from(RAW) | st.binary(max_size=40))
    one = st.tuples(st.floats(0, 0.999), st.sampled_from(["replace"] * 6 + ["drop", "beside"]), st.sampled_from(VALUES))
    return form, file, draw(st.lists(one, min_size=1, max_size=2))


def damaged(text: bytes, changes: bytes | list[tuple[float, str, Any]]) -> bytes:
    if isinstance(changes, bytes):
        return changes
    try:
        content = json.loads(text)
    except ValueError:
        return text[: int(changes[0][0] * len(text))]
    for share, how, value in changes:
        found = places(content)
        content = change(content, found[int(share * len(found))], how, json.loads(json.dumps(value)))
    return json.dumps(content).encode()


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None)
@given(damage())
def test_a_damaged_configuration_is_refused_or_does_no_harm(
    whole: Path, case: tuple[str, str, bytes | list[tuple[float, str, Any]]]
) -> None:
    form, file, changes = case
    folder = whole / form
    text = (folder / file).read_bytes()
    (folder / file).write_bytes(damaged(text, changes))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loaded = load_backbone(Backbone(model="hf-hub:a/b", weights="pretrained"), folder)
            assert np.isfinite(loaded.encode_images(pictures()[:1])).all()
            assert np.isfinite(loaded.encode_texts(TEXTS[:1])).all()
    except (BackboneError, BackboneDigestError):
        pass
    finally:
        (folder / file).write_bytes(text)

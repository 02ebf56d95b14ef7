"""Repositories of a hub and what is left of them: with two configurations, without a file, snapshots by their hash."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import safetensors.torch
import torch

from secure_fed.core.errors import BackboneError
from secure_fed.model.backbone_fetch import add, fetch
from tests.unit.model.test_backbone_forms import clip_folder, own_folder, pictures, siglip_folder, without

pytestmark = pytest.mark.usefixtures("store")

torch.set_num_threads(1)

NAME = "hf-hub:fake/clip"
HASH = "0123456789" * 4


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What ``hf-hub:fake/clip`` has; made by the test."""
    place = tmp_path / "hub/clip"

    def download(repo_id: str, filename: str, cache_dir: Path, **_: Any) -> str:
        assert repo_id == "fake/clip"
        if not (place / filename).is_file():
            raise FileNotFoundError(filename)
        folder = Path(cache_dir) / "snapshot"
        folder.mkdir(exist_ok=True)
        return str(shutil.copy(place / filename, folder))

    monkeypatch.setattr(open_clip.pretrained, "hf_hub_download", download)
    return place


# --- both configurations ---


def with_both(folder: Path) -> tuple[str, str]:
    """A folder with two different models, each with its configuration; their digests, transformers' first."""
    clip_folder(folder.parent / "theirs")
    own_folder(folder.parent / "ours")
    digests = add(folder.parent / "theirs", None)[1].digest, add(folder.parent / "ours", None)[1].digest
    shutil.copytree(folder.parent / "theirs", folder)
    shutil.copytree(folder.parent / "ours", folder, dirs_exist_ok=True)
    return digests


LEFT: dict[str, tuple[Callable[[Path], Any], int]] = {
    "transformers'": (without("open_clip_pytorch_model.bin"), 0),
    "open_clip's": (without("model.safetensors"), 1),
    "both": (lambda folder: None, 1),
}


@pytest.mark.parametrize("left", LEFT)
def test_of_two_configurations_that_of_the_weights_holds(left: str, tmp_path: Path, repository: Path) -> None:
    digests = with_both(repository)
    change, which = LEFT[left]
    change(repository)
    assert add(repository, NAME)[1].digest == digests[which]
    folder, fetched = fetch(NAME, tmp_path / "usb")
    assert fetched.digest == digests[which]
    assert add(folder, None)[1].id == fetched.id


def test_open_clips_weights_under_transformers_file_name_are_open_clips(tmp_path: Path) -> None:
    digests = with_both(tmp_path / "both")
    network = torch.load(tmp_path / "both/open_clip_pytorch_model.bin", weights_only=True)
    (tmp_path / "both/open_clip_pytorch_model.bin").unlink()
    safetensors.torch.save_file(network, tmp_path / "both/model.safetensors")
    assert add(tmp_path / "both", None)[1].digest == digests[1]


# --- what a repository has ---


def test_a_siglip_is_fetched_with_each_file_that_its_tokenizer_may_be_of(tmp_path: Path, repository: Path) -> None:
    siglip_folder(repository)
    alone = add(repository, NAME)[1]
    fetched = fetch(NAME, tmp_path / "spiece")[1]
    assert fetched.id == alone.id
    (repository / "spiece.model").rename(repository / "tokenizer.model")
    assert fetch(NAME, tmp_path / "tokenizer")[1].id == alone.id
    (repository / "added_tokens.json").write_text(json.dumps({"<more>": 63}))
    with pytest.raises(BackboneError, match=r"added_tokens\.json"):  # it is fetched too, and so refused as by add
        fetch(NAME, tmp_path / "added")


@pytest.mark.parametrize(
    ("lost", "says"),
    [
        ("spiece.model", "its tokenizer is not here"),
        ("preprocessor_config.json", "has no preprocessor_config.json"),
        ("model.safetensors", "no weights of the names that are read .model.safetensors, "),
        ("config.json", "has no open_clip_config.json and no config.json"),
    ],
)
def test_what_a_repository_lacks_is_said_of_it(lost: str, says: str, tmp_path: Path, repository: Path) -> None:
    siglip_folder(repository)
    (repository / lost).unlink()
    with pytest.raises(BackboneError, match=f"(?s)^hf-hub:fake/clip: .*{says}") as refused:
        fetch(NAME, tmp_path / "usb")
    assert str(tmp_path) not in str(refused.value)
    assert not list((tmp_path / "usb").iterdir())


def test_a_shard_that_a_repository_lacks_is_said(tmp_path: Path, repository: Path) -> None:
    clip_folder(repository)
    (repository / "model.safetensors").rename(repository / "model-1-of-2.safetensors")
    index = {"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}
    (repository / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BackboneError, match=r"not all shards .*: model-2-of-2\.safetensors missing"):
        fetch(NAME, tmp_path / "usb")


# --- snapshots ---


def test_a_snapshot_is_called_by_the_cache_folder_above_it_or_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "models--fake--clip/snapshots" / HASH
    clip_folder(snapshot)
    assert add(snapshot, None)[1].form.model == NAME
    (tmp_path / "link").symlink_to(snapshot)
    assert add(tmp_path / "link", None)[1].form.model == NAME
    monkeypatch.chdir(snapshot)
    assert add(Path(), None)[1].form.model == NAME
    monkeypatch.chdir(tmp_path)
    shutil.copytree(snapshot, tmp_path / HASH)
    with pytest.raises(BackboneError, match=r"a snapshot of a hub's cache.*--model hf-hub:OWNER/NAME"):
        add(tmp_path / HASH, None)
    told = add(tmp_path / HASH, "hf-hub:fake/other")[1]
    assert told.form.model == "hf-hub:fake/other"
    np.testing.assert_array_equal(told.encode_images(pictures()), add(snapshot, None)[1].encode_images(pictures()))

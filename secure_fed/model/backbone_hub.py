"""Backbones from a hub, where there is internet: their files, downloaded into the hub's own cache, and their form."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from secure_fed.core.errors import BackboneError
from secure_fed.model.backbone_form import CONFIG, OPEN_CLIP_NAMES, TRANSFORMERS_NAMES, is_transformers_alone, read_form
from secure_fed.model.given_files import read_json
from secure_fed.model.library import HUB, fetch_elsewhere, known_model, open_clip
from secure_fed.model.network import Form
from secure_fed.model.weights import shards_of
from secure_fed.protocol.study_tables import Backbone

_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "spiece.model",
    "tokenizer.model",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
)


def download(backbone: Backbone, cache: Path | None = None) -> Form:
    """Download a backbone and recognise it.

    Args:
        backbone: a model and tag of open_clip, or ``hf-hub:OWNER/NAME`` in open_clip's or transformers' form.
        cache: where downloaded files go; the hub's usual cache without.

    Raises:
        BackboneError: it cannot be downloaded, or is none of the forms that are read.
    """
    name = backbone.model if backbone.tag is None else f"{backbone.model}:{backbone.tag}"
    if constants.HF_HUB_OFFLINE and not _cached(backbone, cache):
        raise BackboneError(f"{name}: is not here, and no hub is asked for it; run {fetch_elsewhere(name)}")
    try:
        if backbone.model.startswith(HUB):
            return _repository(backbone.model.removeprefix(HUB), cache)
        return _tag(backbone, cache)
    except BackboneError:
        raise
    except Exception as error:  # downloads fail in every way
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise BackboneError(
            f"{name}: cannot be downloaded ({reason}), and is not here; check name, connection and proxy, or run "
            f"{fetch_elsewhere(name)}"
        ) from error


def _cached(backbone: Backbone, cache: Path | None) -> bool:
    """Whether an earlier download left a backbone on this machine, so that it is had without asking."""
    if backbone.model.startswith(HUB):
        name = backbone.model.removeprefix(HUB)
        return any(_file(name, one, cache) is not None for one in (CONFIG, "config.json"))
    entry = open_clip().get_pretrained_cfg(backbone.model, backbone.tag) or {}
    if "file" in entry or entry.get("hf_hub") or not entry.get("url"):
        return True  # open_clip looks in the hub's cache, and the hub's library is offline
    return _from_address(entry, cache).is_file()


def _from_address(entry: dict[str, Any], cache: Path | None) -> Path:
    """Where open_clip keeps what it downloads from an address that is no hub's."""
    return (cache or Path.home() / ".cache" / "clip") / str(entry["url"]).rsplit("/", 1)[-1]


def _tag(backbone: Backbone, cache: Path | None) -> Form:
    config = known_model(backbone.model)
    entry = open_clip().get_pretrained_cfg(backbone.model, backbone.tag)
    if not entry:
        known = ", ".join(open_clip().list_pretrained_tags_by_model(backbone.model)) or "none"
        raise BackboneError(f"tag {backbone.tag!r}: not a known tag of {backbone.model}; open_clip knows {known}")
    from open_clip.pretrained import download_pretrained

    if constants.HF_HUB_OFFLINE and entry.get("url") and not entry.get("hf_hub"):
        path = _from_address(entry, cache)  # which open_clip would ask for again if it was damaged
    else:
        path = Path(download_pretrained(entry, cache_dir=None if cache is None else str(cache)))
    text_cfg = config["text_cfg"]
    with _text(text_cfg, cache) as text:
        return read_form(path, backbone.model, backbone.tag, backbone.activation, text)


def _repository(name: str, cache: Path | None) -> Form:
    ours, config = _file(name, CONFIG, cache), _file(name, "config.json", cache)
    folder = next((found.parent for found in (ours, config) if found is not None), None)
    if folder is None:
        raise BackboneError(
            f"{HUB}{name}: has no {CONFIG} and no config.json; expected a model in open_clip's or transformers' form"
        )
    for one in ("preprocessor_config.json", "processor_config.json", "README.md", *_TOKENIZER):
        _file(name, one, cache)
    # Of a repository with both configurations, the weights that it has say which holds: see read_form.
    wanted = (*(OPEN_CLIP_NAMES if ours is not None else ()), *TRANSFORMERS_NAMES)
    weights = next((found for one in wanted if (found := _file(name, one, cache)) is not None), None)
    if weights is None:
        raise _lacks(name, f"no weights of the names that are read ({', '.join(wanted)})")
    if weights.name.endswith(".index.json"):
        lost = [shard for shard in shards_of(weights) if _file(name, shard, cache) is None]
        if lost:
            raise _lacks(name, f"not all shards that {weights.name} names: {', '.join(lost)} missing")
    try:
        text_cfg = {} if ours is None or is_transformers_alone(folder) else _text_config(ours)
        with _text(text_cfg, cache) as text:
            return read_form(folder, HUB + name, text=text)
    except BackboneError as error:  # the folder is a cache's, and mostly gone when this is read
        reason = str(error).replace(f"{folder}/", "").removeprefix(f"{folder}: ")
        if "copy" in reason:  # advice for a folder that lost something on its way
            raise _lacks(name, f"not what adding it needs: {reason}") from error
        raise BackboneError(f"{HUB}{name}: {reason}") from error


def _lacks(name: str, what: str) -> BackboneError:
    if constants.HF_HUB_OFFLINE:
        return BackboneError(
            f"{HUB}{name}: of an earlier download there is {what}, and no hub is asked; run "
            f"{fetch_elsewhere(HUB + name)}"
        )
    return BackboneError(
        f"{HUB}{name}: the repository has {what}\n  all that is read of it was downloaded, so choose another one, or "
        "put what is missing beside what it has and add that folder"
    )


def _text_config(config: Path) -> dict[str, Any]:
    content = read_json(config)
    model = content.get("model_cfg", content)
    found = model.get("text_cfg") if isinstance(model, dict) else None
    return found if isinstance(found, dict) else {}


@contextmanager
def _text(text_cfg: dict[str, Any], cache: Path | None) -> Iterator[Path | None]:
    """A folder with a text model's configuration and tokenizer, which other repositories than the weights' hold."""
    model, tokenizer = text_cfg.get("hf_model_name"), text_cfg.get("hf_tokenizer_name")
    name = str(model or tokenizer)
    if model is None and tokenizer is None:
        yield None
        return
    if Path(name).is_absolute() and Path(name).is_dir():
        yield Path(name)
        return
    with tempfile.TemporaryDirectory(prefix="secfacmic-") as folder:
        wanted = [(tokenizer or name, one) for one in _TOKENIZER]
        for repository, one in [*wanted, *([(model, "config.json")] if model is not None else [])]:
            if (found := _file(repository, one, cache)) is not None:
                (Path(folder) / one).write_bytes(found.read_bytes())
        yield Path(folder)


def _file(name: str, file: str, cache: Path | None) -> Path | None:
    """A file of a repository; None if it has none of that name."""
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    from open_clip import pretrained

    try:
        return Path(pretrained.hf_hub_download(repo_id=name, filename=file, cache_dir=cache))
    except LocalEntryNotFoundError:
        if constants.HF_HUB_OFFLINE:
            return None  # what was downloaded is all that there is
        raise
    except (EntryNotFoundError, FileNotFoundError):
        return None

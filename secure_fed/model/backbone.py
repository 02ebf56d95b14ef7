"""The frozen CLIP: loaded through open_clip, known by the digest of its weights, asked for features only."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from secure_fed import configs
from secure_fed.core.errors import BackboneDigestError, BackboneError
from secure_fed.core.storage import write_durable
from secure_fed.model import backbone_store
from secure_fed.model.device import Device
from secure_fed.model.text_tower import TextTower
from secure_fed.protocol.study import Backbone

BATCH = 32
"""Images or texts encoded at once; smaller batches are padded to it."""

_LARGE = 30e6
"""Weights of an image tower from which on bfloat16 is faster, where the processor multiplies it, and on a CPU small
batches are no slower."""

_LARGE_BATCH = 8
"""Encoded at once by a large tower on a CPU: what is padded would take seconds each time that a backbone is loaded."""

_BF16_COSINE = 0.999
"""Least cosine between a bfloat16 and a float32 feature for bfloat16 to be used."""

_LONGEST = 4096
"""More tokens than a study's text can have."""

_HUB = "hf-hub:"
_SHARED_KEYS = ("mean", "std", "interpolation", "resize_mode")


class LoadedBackbone:
    """A frozen CLIP, always in evaluation mode.

    Texts are in float32. The image tower's weights are turned into bfloat16 where that is faster (a large tower, a
    processor that multiplies it) and accurate (features of a few test images, compared when it is loaded); the rule
    measures no time, so that one machine always decides alike.

    Attributes:
        digest: SHA-256 (64 hex digits) of the weights' content: names, shapes and float32 values. How they are
            stored (PyTorch, TorchScript, safetensors; float16 counts by its value) makes no difference.
        dim: width of the features.
        logit_scale: exp of CLIP's learned log temperature, about 100 for a trained CLIP.
        precision: ``float32`` or ``bfloat16``, of the image tower's arithmetic.
        preprocessing: canonical JSON of what happens to an image: size, mean, std, interpolation, resizing, precision.
        description: model, source of the weights and size, for reports.
        device: where it computes.
        context: tokens that the text tower takes at most.
        batch: images that are encoded at once.
    """

    def __init__(
        self,
        model: Any,
        preprocess: Callable[[Image.Image], Tensor],
        tokenizer: Callable[..., Tensor],
        name: str,
        device: Device = "cpu",
    ) -> None:
        self._model = model.float().eval().requires_grad_(False)
        self._preprocess = preprocess
        self._tokenizer = tokenizer
        self.context = int(tokenizer([""]).shape[1])
        self.digest = _digest(model)
        self.logit_scale = float(np.exp(np.float64(self._model.logit_scale.item())))
        config = _open_clip().get_model_preprocess_cfg(model)
        self.precision = "float32"
        self.device = device
        self._model.to(device)
        self._model.visual.to(memory_format=torch.channels_last)  # convolutions take half the time on a CPU
        large = sum(one.numel() for one in model.visual.parameters()) >= _LARGE
        self.batch = _LARGE_BATCH if large and device == "cpu" else BATCH
        if large and _multiplies_bfloat16(device):
            self._choose_precision()
        self.preprocessing = json.dumps(config | {"precision": self.precision}, sort_keys=True)
        self.dim = int(self.encode_texts([""]).shape[1])
        weights = sum(parameter.numel() for parameter in model.parameters())
        self.description = f"{name}, {weights / 1e6:.1f} M weights, {self.dim} features, digest {self.digest[:12]}"

    def prepare(self, image: Image.Image) -> NDArray[np.float32]:
        """What the image tower takes, [3, size, size], of any Pillow mode that converts to RGB and any size."""
        return np.asarray(self._preprocess(image).numpy(), dtype=np.float32)

    def encode_prepared(self, prepared: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
        """Unit image features, [n, dim], of prepared images, each [3, size, size]."""
        if not prepared:
            return np.empty((0, self.dim), dtype=np.float32)
        dtype = next(self._model.visual.parameters()).dtype
        return self._encode(torch.from_numpy(np.stack(prepared)).to(dtype), self._model.encode_image)

    def encode_images(self, images: Sequence[Image.Image]) -> NDArray[np.float32]:
        """Unit image features, [n, dim]; any Pillow mode that converts to RGB, any size."""
        batches = [images[start : start + BATCH] for start in range(0, len(images), BATCH)]
        rows = [self.encode_prepared([self.prepare(image) for image in batch]) for batch in batches]
        return np.concatenate(rows) if rows else np.empty((0, self.dim), dtype=np.float32)

    def encode_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Unit text features, [n, dim]. A text longer than the model's context is cut off there."""
        if not texts:
            return np.empty((0, self.dim), dtype=np.float32)
        return self._encode(self._tokenizer(list(texts)), self._model.encode_text)

    def tokenize(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """Tokens of the texts, [n, context length]."""
        return np.asarray(self._tokenizer(list(texts)).numpy(), dtype=np.int64)

    def count_tokens(self, text: str) -> int:
        """Tokens that a text takes, start and end included; above :attr:`context` it is cut off."""
        tokens = self._tokenizer([text], context_length=_LONGEST)[0]
        return int((tokens != tokens[-1]).nonzero().max()) + 1

    def text_tower(self, tokens: NDArray[np.int64]) -> TextTower:
        """The text tower, bound to the tokens of one text a class.

        Raises:
            BackboneError: it takes no context vectors.
        """
        return TextTower(self._model, tokens)

    def _choose_precision(self) -> None:
        """Compare both on test images: two even ones and some of seeded noise; keep the tower that is chosen.

        Autocast would turn the frozen weights into bfloat16 again at every batch, which takes longer than it saves.
        """
        rng = np.random.default_rng(0)
        pixels = [np.zeros((64, 64, 3)), np.full((64, 64, 3), 255), *rng.integers(0, 256, (6, 64, 64, 3))]
        images = [Image.fromarray(picture.astype(np.uint8)) for picture in pixels]
        exact, tower = self.encode_images(images), self._model.visual
        self._model.visual = copy.deepcopy(tower).bfloat16()
        cosines = (exact * self.encode_images(images)).sum(axis=1)
        if float(cosines.min()) > _BF16_COSINE:
            self.precision = "bfloat16"
        else:
            self._model.visual = tower

    @torch.inference_mode()
    def _encode(self, inputs: Tensor, encode: Callable[[Tensor], Tensor]) -> NDArray[np.float32]:
        rows = []
        for start in range(0, len(inputs), self.batch):
            batch = inputs[start : start + self.batch]
            # Matrix kernels are chosen by size and may round differently, so the size is always the same.
            padded = batch.new_zeros((self.batch, *batch.shape[1:]))
            padded[: len(batch)] = batch
            features = encode(padded.to(self.device))[: len(batch)]
            rows.append(nn.functional.normalize(features.float(), dim=-1).cpu().numpy())
        return np.concatenate(rows)


def make_random_checkpoint(model: str, seed: int, path: Path) -> None:
    """Write an open_clip model with seeded random weights as a safetensors file, durably.

    The global random state stays as it was. Weights drawn on different kinds of CPU can differ in the last
    bits: make the file once and pass it on.

    Args:
        model: name of an open_clip model, builtin or of ours in ``configs/models``.
        seed: 0 or more, below 2**64.
        path: the file to write; its folder exists.

    Raises:
        BackboneError: there is no model of that name.
        StorageError: the file cannot be written.
    """
    _known_model(model)
    with torch.random.fork_rng(devices=[]), _without_warnings():
        torch.manual_seed(seed)
        network = _open_clip().create_model(model, pretrained_text=False)
    tensors = {name: value.contiguous() for name, value in network.state_dict().items()}
    write_durable(path, safetensors.torch.save(tensors))


def load_backbone(backbone: Backbone, checkpoint: Path | None, device: Device = "cpu") -> LoadedBackbone:
    """Load the study's backbone through open_clip's own loader.

        Args:
            backbone: the study's table. A ``model`` that begins with ``hf-hub:`` names a repository of that hub; its
                ``tag`` is then ignored, as open_clip does.
            checkpoint: where the weights lie at this site, if not where the study says. open_clip's PyTorch and
    safetensors forms and OpenAI's TorchScript archives are read.
            device: where it is to compute, as :func:`secure_fed.model.device.choose_device` gives it.
        Raises:
            BackboneError: no such model or tag, or weights that are missing, unreadable or of another model.
            BackboneDigestError: the weights are not those that the study names.
    """
    if not backbone.model.startswith(_HUB):
        _known_model(backbone.model)
    refuse_other_gelu(backbone)
    path = _checkpoint_path(backbone, checkpoint)
    options: dict[str, Any] = {}
    source: AbstractContextManager[str] = nullcontext(backbone.model)
    pretrained = None
    if path is None:
        name = f"{backbone.model} ({backbone.tag})"
        pretrained = None if backbone.model.startswith(_HUB) else backbone.tag
    elif path.is_dir():
        name = f"{backbone.model} ({path.name})"
        source = backbone_store.as_open_clip_folder(path)
    else:
        name = f"{backbone.model} ({path.name})"
        pretrained = str(path)
        options = _local_preprocessing(backbone.model, backbone.tag)
        if _is_torchscript(path):
            if not _open_clip().get_model_config(backbone.model).get("quick_gelu", False):
                raise BackboneError(
                    f"{path}: an OpenAI archive, trained with QuickGELU, but model {backbone.model} has none; "
                    f"expected a model such as {backbone.model}-quickgelu: name that one in the study"
                )
            options["weights_only"] = False  # torch.load reads a TorchScript archive no other way.
    try:
        with source as model, warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*TorchScript")
            network, preprocess = _open_clip().create_model_from_pretrained(model, pretrained, **options)
            tokenizer = _open_clip().get_tokenizer(model)
    except Exception as error:  # the readers of four file formats and a download raise of every kind
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise BackboneError(
            f"{path or name}: not loaded as {backbone.model} ({reason}); expected that model's weights: "
            "check the study's backbone table, or fetch the file again"
        ) from error
    loaded = LoadedBackbone(network, preprocess, tokenizer, name, device)
    if backbone.digest is not None and loaded.digest != backbone.digest:
        raise BackboneDigestError(
            f"{path or name}: weights have digest {loaded.digest}, but the study names {backbone.digest}; "
            "get the checkpoint that the study was made with"
        )
    return loaded


def image_size(backbone: Backbone) -> int | None:
    """Side in pixels of the square that a backbone sees; None for a model of a hub, which is known once it is here."""
    if backbone.model.startswith(_HUB):
        return None
    _known_model(backbone.model)
    size = _open_clip().get_model_config(backbone.model)["vision_cfg"].get("image_size", 224)
    return int(size[0] if isinstance(size, list | tuple) else size)


def _multiplies_bfloat16(device: Device) -> bool:
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    found = torch.cpu.get_capabilities()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


@cache
def _open_clip() -> Any:
    """open_clip, which knows our models too. Imported here: it takes seconds, and cached features need none of it."""
    import open_clip

    open_clip.add_model_config(configs.MODELS)
    return open_clip


def _known_model(model: str) -> None:
    if model not in _open_clip().list_models():
        ours = ", ".join(sorted(path.stem for path in configs.MODELS.glob("*.json")))
        raise BackboneError(
            f"model {model!r}: open_clip {_open_clip().__version__} has none of that name; expected one of "
            f"open_clip.list_models(), {_HUB}OWNER/NAME, or of ours: {ours}"
        )


def _checkpoint_path(backbone: Backbone, checkpoint: Path | None) -> Path | None:
    """Where the weights lie; None if open_clip fetches them."""
    path = checkpoint
    if path is None and backbone.file is not None:
        path = Path(backbone.file)
        if not path.exists() and path.name == backbone.file:
            path = configs.MODELS / path
        if not path.exists():
            path = backbone_store.find(backbone) or path
    if path is None:
        path = backbone_store.find(backbone)
    if path is None:
        if backbone.weights == "pretrained":
            return None
        raise BackboneError(
            f"backbone {backbone.model}: random weights, but no checkpoint was given; make it once with "
            "secfacmic backbone random, pass it to all sites and say where it lies"
        )
    if path.is_dir():
        path = backbone_store.weights_in(path)
    elif not path.is_file():
        raise BackboneError(f"{path}: no such file; expected the weights of {backbone.model} there")
    return path.resolve()


def refuse_other_gelu(backbone: Backbone) -> None:
    """Refuse a tag whose weights were trained with another activation than the model has; open_clip only warns.

    Raises:
        BackboneError: they were.
    """
    if backbone.tag is None or backbone.model.startswith(_HUB):
        return
    tag = _open_clip().get_pretrained_cfg(backbone.model, backbone.tag)
    if tag.get("quick_gelu") and not _open_clip().get_model_config(backbone.model).get("quick_gelu"):
        raise BackboneError(
            f"tag {backbone.tag}: trained with QuickGELU, but model {backbone.model} has GELU; expected model "
            f"{backbone.model}-quickgelu: name that one in the study"
        )


def _local_preprocessing(model: str, known_tag: str | None = None) -> dict[str, Any]:
    """Options for open_clip, which knows the preprocessing of its tags but not of a local file.

    That of the tag whose weights the file holds, if the study names one. Else, if all the tags published for a model
    agree, then a file of that model is treated alike; otherwise, and for models of our own, open_clip's default
    (OpenAI's) holds. The image size is always the model's.
    """
    tags = _open_clip().list_pretrained_tags_by_model(model)
    if known_tag in tags:
        tags = [known_tag]
    found = [_open_clip().get_pretrained_cfg(model, tag) for tag in tags]
    known = [{f"image_{key}": tag[key] for key in _SHARED_KEYS} for tag in found]
    return dict(known[0]) if known and all(entry == known[0] for entry in known) else {}


def _is_torchscript(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError):
        return False


def _digest(model: nn.Module) -> str:
    state = model.state_dict()
    total = hashlib.sha256(b"secfacmic backbone 1\n")
    for name in sorted(state):
        values = state[name].cpu().contiguous().numpy()
        if values.dtype.kind == "f":
            values = values.astype("<f4", copy=False)
        total.update(f"{name} {values.dtype.str} {values.shape}\n".encode())
        total.update(np.ascontiguousarray(values).tobytes())
    return total.hexdigest()


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Silence open_clip's warning, on the root logger, that weights are random: here they should be."""

    def errors_only(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR

    root = logging.getLogger()
    root.addFilter(errors_only)
    try:
        yield
    finally:
        root.removeFilter(errors_only)

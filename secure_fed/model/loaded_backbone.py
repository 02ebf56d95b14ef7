"""A frozen CLIP in memory: known by the digest of its weights and by an id of all else, asked for features only."""

from __future__ import annotations

import copy
import ctypes
import hashlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from secure_fed.core.canonical import canonical_json
from secure_fed.core.errors import BackboneError
from secure_fed.model.device import Device, kind_of
from secure_fed.model.network import Form, activation, facts
from secure_fed.model.preparing import preparer, window
from secure_fed.model.text_tower import TextTower, reads_at

BATCH = 32
"""Images or texts encoded at once; smaller batches are padded to it."""

_LARGE = 30e6
"""Weights of an image tower from which on bfloat16 is faster, where the processor multiplies it, and on a CPU small
batches are no slower."""

_LARGE_BATCH = 8
"""Encoded at once by a large tower on a CPU: what is padded would take seconds each time that a backbone is loaded."""

_WIDE, _WIDE_BATCH = 300, 2
"""Pixels a side from which on a large tower on a CPU encodes fewer still: eight of 448 take half a gigabyte."""

_BF16_COSINE = 0.999
"""Least cosine between a bfloat16 and a float32 feature for bfloat16 to be used."""

_MEASURED = 2.0
"""Seconds for which encoding is measured, to say how long it will take."""

_SAME = 1e-6
"""Features of quite different images that are nearer than this do not depend on the image; of texts likewise."""

_TEXTS = ("a head with a mass", "3 quite different words, the x-ray of an arm")

WHOLE = "image"
"""Name, among blocks, of the feature of the whole image."""

_SHOWN = 12


class LoadedBackbone:
    """A frozen CLIP, always in evaluation mode.

    Texts are in float32. The image tower's weights are turned into bfloat16 where that is faster (a large tower, a
    processor that multiplies it) and accurate (features of a few test images, compared when it is loaded); the rule
    measures no time, so that one machine always decides alike.

    Attributes:
        digest: SHA-256 (64 hex digits) of the weights' content: names, shapes and float32 values. How they are
            stored (PyTorch, TorchScript, safetensors; float16 counts by its value) makes no difference.
        id: SHA-256 of the digest and all else that features depend on, the precision apart: activation, heads and
            epsilon by module, pooler, context, tokenizer, preprocessing, what its configuration says beyond defaults.
        activation: of both towers, as ``gelu``, ``quickgelu`` or ``gelu_tanh``.
        facts: what the id is of, by tower.
        dim: width of the features.
        logit_scale: exp of CLIP's learned log temperature, about 100 for a trained CLIP.
        precision: ``float32`` or ``bfloat16``, of the image tower's arithmetic.
        preprocessing: canonical JSON of what happens to an image: size, mean, std, interpolation, resizing, precision.
        description: model, source of the weights and size, for reports.
        device: where it computes.
        context: tokens that the text tower takes at most.
        batch: images that are encoded at once.
        form: what it was loaded from.
    """

    def __init__(self, model: Any, form: Form, name: str, device: Device = "cpu", exact: bool = False) -> None:
        """Take a network in float32, and see that it can be used.

        Args:
            model: the network.
            form: what it was built of.
            name: of model and source, for messages.
            device: where it computes.
            exact: keep float32 whatever is faster.

        Raises:
            BackboneError: weights or features are not finite, features do not depend on the image or on the text, the
                text tower reads the end of a text elsewhere than its tokenizer puts it, or the towers have different
                widths.
        """
        self._model = model
        self._name = name
        self._prepare = preparer(form.preprocess)
        self.form = form
        self._tokens = form.tokens
        self.context = form.tokens.context
        _refuse_not_finite(model, name)
        self.digest = _digest(model)
        self.facts = facts(model, form)
        self.activation = activation(self.facts)
        whole = [self.digest, self.facts, self._tokens.identity, form.preprocess]
        self.id = hashlib.sha256(b"secfacmic backbone id 2\n" + canonical_json(whole)).hexdigest()
        scale = float(self._model.logit_scale.item())
        if not -20 < scale < 20:
            raise BackboneError(
                f"{name}: a logit_scale of {scale:.3g}, whose exponential multiplies cosines; expected about 4.6, as "
                "trained CLIPs have: get the file again"
            )
        self.logit_scale = float(np.exp(np.float64(scale)))
        self.precision = "float32"
        self.device = device
        self._model.to(device)
        self._model.visual.to(memory_format=torch.channels_last)  # convolutions take half the time on a CPU
        large = sum(one.numel() for one in model.visual.parameters()) >= _LARGE
        self.batch = BATCH
        if large and device == "cpu":
            self.batch = _LARGE_BATCH if self.side < _WIDE else _WIDE_BATCH
        self._try_images()
        if large and not exact and _multiplies_bfloat16(device):
            self._choose_precision()
            _return_freed()
        self.preprocessing = json.dumps(form.preprocess | {"precision": self.precision}, sort_keys=True)
        self._try_texts()
        weights = sum(parameter.numel() for parameter in model.parameters())
        self.description = f"{name}, {weights / 1e6:.1f} M weights, {self.dim} features, digest {self.digest[:12]}"

    def prepare(self, image: Image.Image) -> NDArray[np.float32]:
        """What the image tower takes, [3, size, size], of any Pillow mode that converts to RGB and any size."""
        return self._prepare(image)

    def window(self, size: tuple[int, int]) -> tuple[float, float, float, float]:
        """The part of a picture of this width and height that the image tower sees: left, top, right, bottom."""
        return window(self.form.preprocess, size)

    def encode_prepared(self, prepared: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
        """Unit image features, [n, dim], of prepared images, each [3, size, size].

        Raises:
            BackboneError: a feature is not finite.
        """
        if not prepared:
            return np.empty((0, self.dim), dtype=np.float32)
        dtype = next(self._model.visual.parameters()).dtype
        return self._encode(torch.from_numpy(np.stack(prepared)).to(dtype), self._model.encode_image)

    def blocks(self) -> tuple[str, ...]:
        """Names of the blocks of the image tower that give a feature for each patch, in order, and ``image``."""
        return (*self._grids, WHOLE)

    def grid(self, block: str) -> tuple[int, int, int]:
        """Height, width and depth of a block's patch features.

        Raises:
            BackboneError: the tower has no such block.
        """
        if block == WHOLE:
            return 1, 1, self.dim
        if block not in self._grids:
            known = list(self._grids)
            shown = ", ".join(known if len(known) <= _SHOWN else [*known[: _SHOWN // 2], "...", *known[-_SHOWN // 2 :]])
            raise BackboneError(
                f"{self._name}: its image tower has no block {block!r} of patches; expected {WHOLE} or one of {shown}"
            )
        return self._grids[block]

    def encode_patches(
        self, prepared: Sequence[NDArray[np.float32]], blocks: Sequence[str], neighbourhood: int
    ) -> NDArray[np.float32]:
        """Unit patch features of prepared images in rows, [n, sum over blocks of height * width * depth].

        Args:
            prepared: as for :meth:`encode_prepared`.
            blocks: names; ``image`` for the feature of the whole image.
            neighbourhood: patches a side, odd, that each feature is the mean of before it is scaled to length 1.

        Raises:
            BackboneError: the tower has no such block, or a feature is not finite.
        """
        grids = [self.grid(block) for block in blocks]
        if not prepared:
            return np.empty((0, sum(height * width * depth for height, width, depth in grids)), dtype=np.float32)
        inputs = torch.from_numpy(np.stack(prepared)).to(next(self._model.visual.parameters()).dtype)

        def encode(batch: Tensor) -> Tensor:
            with self._seen(tuple(block for block in blocks if block != WHOLE)) as seen:
                image = self._model.encode_image(batch)
            return torch.cat(
                [
                    nn.functional.normalize(image.float(), dim=-1)
                    if block == WHOLE
                    else _patch_rows(seen[block], grid, neighbourhood)
                    for block, grid in zip(blocks, grids, strict=True)
                ],
                dim=1,
            )

        # Padded as in _encode; each patch has length 1, the row has not.
        return self._batched(inputs, lambda batch: self._finite(encode(batch), "patches"))

    @property
    def side(self) -> int:
        """Pixels a side of what the image tower takes."""
        return int(self.form.preprocess["size"][0])

    def seen(self, prepared: NDArray[np.float32]) -> Image.Image:
        """The picture that the image tower sees, of a prepared image [3, side, side]: cut and scaled."""
        mean, std = (np.array(self.form.preprocess[key])[:, None, None] for key in ("mean", "std"))
        pixels = np.clip((prepared * std + mean) * 255, 0, 255)
        return Image.fromarray(np.rint(pixels).astype(np.uint8).transpose(1, 2, 0))

    def gradients(
        self,
        prepared: NDArray[np.float32],
        blocks: Sequence[str],
        wanted: Callable[[Tensor], Tensor],
        *,
        unit: bool = True,
    ) -> list[tuple[Tensor, Tensor]]:
        """What blocks give for prepared images [n, 3, side, side], and the gradient of ``wanted`` with respect to it.

        Both float32 on the CPU, [n, depth, height, width] or [n, tokens, depth].

        Args:
            prepared: the images.
            blocks: names of :meth:`blocks`.
            wanted: of features [n, d] on the CPU, differentiable, a value each, [n].
            unit: whether features are scaled to length 1 before.

        Raises:
            BackboneError: the tower has no such block.
        """
        kept: dict[str, Tensor] = {}

        def keep(name: str) -> Callable[[nn.Module, Any, Tensor], Tensor]:
            def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
                kept[name] = output if output.requires_grad else output.detach().requires_grad_(True)
                return kept[name].clone()  # what follows may work in place

            return hook

        tower = dict(self._model.visual.named_modules())
        hooks = [(tower[block], keep(block)) for block in blocks if self.grid(block)]
        found = self._gradient_at(hooks, lambda: [kept[block] for block in blocks], prepared, wanted, unit=unit)
        return [(kept[block].detach().float().cpu(), one) for block, one in zip(blocks, found, strict=True)]

    def activations(self, prepared: NDArray[np.float32], blocks: Sequence[str]) -> list[Tensor]:
        """What blocks give, without gradients; arguments as for :meth:`gradients`."""
        inputs = torch.from_numpy(prepared).to(next(self._model.visual.parameters()).dtype)
        with torch.inference_mode(), self._seen(blocks) as seen:
            self._model.encode_image(inputs.to(self.device))
        return [seen[block].float().cpu().clone() for block in blocks]

    def last_attention(self) -> nn.MultiheadAttention | None:
        """The last attention of an image tower that reads a token of the whole image there; None of other towers."""
        visual = self._model.visual
        blocks = getattr(getattr(visual, "transformer", None), "resblocks", None)
        pools = getattr(visual, "pool_type", None) == "tok" and getattr(visual, "attn_pool", None) is None
        found = None if blocks is None or not pools else getattr(blocks[-1], "attn", None)
        return found if isinstance(found, nn.MultiheadAttention) and found.in_proj_weight is not None else None

    def attention_gradients(
        self, prepared: NDArray[np.float32], attention: nn.MultiheadAttention, wanted: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Of one prepared image [3, side, side], the tokens that go into an attention, and the gradient at its output.

        Both float32 on the CPU, [tokens, depth], that of the whole image first.

        Args:
            prepared: the image.
            attention: of :meth:`last_attention`.
            wanted: as for :meth:`gradients`.
        """
        kept: list[Tensor] = []
        given: list[Tensor] = []

        def keep(module: nn.Module, inputs: Any, arguments: Any, output: Any) -> Any:
            given.append(inputs[0] if inputs else arguments["query"])
            kept.append(output[0].detach().requires_grad_(True))
            return (kept[-1], *output[1:])

        (gradient,) = self._gradient_at([(attention, keep)], lambda: kept, prepared[None], wanted, arguments=True)
        first = 0 if attention.batch_first else 1
        return given[0].detach().float().cpu().select(first, 0), gradient.select(first, 0)

    def _gradient_at(
        self,
        hooks: Sequence[tuple[nn.Module, Callable[..., Any]]],
        kept: Callable[[], list[Tensor]],
        prepared: NDArray[np.float32],
        wanted: Callable[[Tensor], Tensor],
        *,
        arguments: bool = False,
        unit: bool = True,
    ) -> list[Tensor]:
        inputs = torch.from_numpy(prepared).to(next(self._model.visual.parameters()).dtype)
        handles = [module.register_forward_hook(hook, with_kwargs=arguments) for module, hook in hooks]
        try:
            with torch.enable_grad():
                features = self._model.encode_image(inputs.to(self.device)).float()
                features = nn.functional.normalize(features, dim=-1) if unit else features
                gradients = torch.autograd.grad(wanted(features.cpu()).sum(), kept())
        finally:
            for handle in handles:
                handle.remove()
        return [gradient.float().cpu() for gradient in gradients]

    @cached_property
    def _grids(self) -> dict[str, tuple[int, int, int]]:
        """Grids of patch features by block, found by looking at one image."""
        found: dict[str, tuple[int, int, int]] = {}
        names = [name for name, _ in self._model.visual.named_modules() if name]
        black = self.prepare(Image.fromarray(np.zeros((64, 64, 3), dtype=np.uint8)))
        with torch.inference_mode(), self._seen(names) as seen:
            inputs = torch.from_numpy(black)[None].to(next(self._model.visual.parameters()).dtype)
            self._model.encode_image(inputs.to(self.device))
        for name in names:
            if name in seen and (grid := _grid_of(seen[name])) is not None:
                found[name] = grid
        return found

    @contextmanager
    def _seen(self, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
        """What the named modules of the image tower give, while this is open."""
        seen: dict[str, Tensor] = {}

        def keep(name: str) -> Callable[[nn.Module, Any, Any], None]:
            def hook(module: nn.Module, inputs: Any, output: Any) -> None:
                if isinstance(output, Tensor):
                    seen[name] = output.detach()

            return hook

        tower = dict(self._model.visual.named_modules())
        handles = [tower[name].register_forward_hook(keep(name)) for name in names]
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()

    def encode_images(self, images: Sequence[Image.Image]) -> NDArray[np.float32]:
        """Unit image features, [n, dim]; any Pillow mode that converts to RGB, any size."""
        batches = [images[start : start + BATCH] for start in range(0, len(images), BATCH)]
        rows = [self.encode_prepared([self.prepare(image) for image in batch]) for batch in batches]
        return np.concatenate(rows) if rows else np.empty((0, self.dim), dtype=np.float32)

    def encode_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Unit text features, [n, dim]. A text longer than the model's context is cut off there."""
        if not texts:
            return np.empty((0, self.dim), dtype=np.float32)
        return self._encode(self._tokens(texts), self._model.encode_text)

    def tokenize(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """Tokens of the texts, [n, context length]."""
        return np.asarray(self._tokens(texts).numpy(), dtype=np.int64)

    def count_tokens(self, text: str) -> int:
        """Tokens that a text takes, start and end included; above :attr:`context` it is cut off."""
        return self._tokens.count(text)

    def text_tower(self, tokens: NDArray[np.int64]) -> TextTower:
        """The text tower, bound to the tokens of one text a class.

        Raises:
            BackboneError: it takes no context vectors.
        """
        return TextTower(self._model, tokens)

    def tensors(self) -> dict[str, Tensor]:
        """The weights by name; in bfloat16 where that was chosen."""
        return dict(self._model.state_dict())

    def seconds_per_image(self, pictures: Sequence[Image.Image]) -> float:
        """How long one picture takes one processor here, prepared and encoded, measured now.

        Args:
            pictures: a few, of the shape that is to be encoded.
        """
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            self.prepare(pictures[0])
            start = time.perf_counter()
            prepared = [self.prepare(picture) for picture in pictures]
            preparing = (time.perf_counter() - start) / len(pictures)
            self._seconds(prepared[:1])  # the first time, memory is laid out and kernels are chosen
            count = max(1, min(self.batch, int(_MEASURED / self._seconds(prepared[:1]))))
            return preparing + self._seconds([prepared[place % len(prepared)] for place in range(count)]) / count
        finally:
            torch.set_num_threads(threads)

    @torch.inference_mode()
    def _seconds(self, prepared: Sequence[NDArray[np.float32]]) -> float:
        dtype = next(self._model.visual.parameters()).dtype
        images = torch.from_numpy(np.stack(prepared)).to(dtype)
        start = time.perf_counter()
        self._model.encode_image(images.to(self.device)).float().sum().item()
        return time.perf_counter() - start

    @torch.inference_mode()
    def _try_images(self) -> None:
        """Two quite different images must give two finite features; sets the width. No padding: this takes seconds."""
        pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
        images = [Image.fromarray(np.zeros_like(pixels)), Image.fromarray(pixels)]
        with self._in_our_words("an image"):
            prepared = torch.from_numpy(np.stack([self.prepare(one) for one in images]))
            found = self._unit(self._model.encode_image(prepared.to(self.device)), "an image")
        self.dim = found.shape[1]
        if float(np.abs(found[0] - found[1]).max()) < _SAME:
            raise BackboneError(
                f"{self._name}: its features do not depend on the image: a black one and noise give the same; expected "
                "trained weights: get the file again"
            )

    def _try_texts(self) -> None:
        """Two texts must give two features, as wide as an image's; and each is read where its tokenizer ends it."""
        tokens = self._tokens(_TEXTS)
        if torch.equal(tokens[0], tokens[1]):
            raise BackboneError(
                f"{self._name}: its tokenizer makes the same tokens of quite different texts; expected the tokenizer "
                "files that came with the weights: copy the folder again"
            )
        reads = reads_at(self._model, tokens)
        for row, text in enumerate(_TEXTS):
            end = self._tokens.count(text) - 1
            if reads is not None and end < self.context and int(reads[row]) != end:
                raise BackboneError(
                    f"{self._name}: its text tower reads a text's features at token {int(tokens[row, reads[row]])}, "
                    f"but its tokenizer ends a text with token {int(tokens[row, end])}; expected a configuration and a "
                    "tokenizer of one model: copy the folder again"
                )
        other = tokens[0].clone()  # as long as the first, so that its length alone makes no difference
        place = int((tokens[0] != tokens[1]).int().argmax())
        other[place] = tokens[1, place]
        with self._in_our_words("a text"):
            found = self._encode(torch.cat([tokens, other[None]]), self._model.encode_text)
        if found.shape[1] != self.dim:
            raise BackboneError(
                f"{self._name}: towers of different widths, images {self.dim} and texts {found.shape[1]}; expected one "
                "space for both: these are not the weights of one CLIP"
            )
        if float(np.abs(found[0] - found[1:]).max(axis=1).min()) < _SAME:
            raise BackboneError(
                f"{self._name}: its features do not depend on the text: two quite different ones give the same; "
                "expected trained weights, and a context with room for a text: get the folder again"
            )

    @contextmanager
    def _in_our_words(self, what: str) -> Iterator[None]:
        """A configuration may name a network that can be built and filled, and computes nothing."""
        try:
            yield
        except BackboneError:
            raise
        except Exception as error:  # torch raises what it likes
            reason = " ".join(str(error).split())[:160] or type(error).__name__
            raise BackboneError(
                f"{self._name}: cannot compute the features of {what} ({reason}); expected a configuration and weights "
                "of one model: copy the folder again"
            ) from error

    def _choose_precision(self) -> None:
        """Compare both on test images: two even ones and some of seeded noise; keep the tower that is chosen.

        Autocast would turn the frozen weights into bfloat16 again at every batch, which takes longer than it saves.
        """
        rng = np.random.default_rng(0)
        pixels = [np.zeros((64, 64, 3)), np.full((64, 64, 3), 255), *rng.integers(0, 256, (6, 64, 64, 3))]
        images = [Image.fromarray(picture.astype(np.uint8)) for picture in pixels]
        exact, tower = self.encode_images(images), self._model.visual
        # Parameters go into the copy in half their bytes, without a whole one in between.
        halves: dict[int, Any] = {
            id(one): nn.Parameter(one.detach().bfloat16(), requires_grad=False) for one in tower.parameters()
        }
        self._model.visual = copy.deepcopy(tower, halves).bfloat16()
        del halves
        try:
            cosine = float((exact * self.encode_images(images)).sum(axis=1).min())
        except BackboneError:
            cosine = 0.0  # bfloat16 is too coarse for it
        if cosine > _BF16_COSINE:
            self.precision = "bfloat16"
        else:
            self._model.visual = tower

    @torch.inference_mode()
    def _encode(self, inputs: Tensor, encode: Callable[[Tensor], Tensor]) -> NDArray[np.float32]:
        what = "a text" if inputs.dtype == torch.int64 else "an image"
        return self._batched(inputs, lambda batch: self._unit(encode(batch), what))

    @torch.inference_mode()
    def _batched(self, inputs: Tensor, encode: Callable[[Tensor], NDArray[np.float32]]) -> NDArray[np.float32]:
        rows = []
        for start in range(0, len(inputs), self.batch):
            batch = inputs[start : start + self.batch]
            # Matrix kernels are chosen by size and may round differently, so the size is always the same.
            padded = batch.new_zeros((self.batch, *batch.shape[1:]))
            padded[: len(batch)] = batch
            padded[len(batch) :] = batch[:1]  # rows are checked too, and a text without a token has no mean
            rows.append(encode(padded.to(self.device))[: len(batch)])
        return np.concatenate(rows)

    def _unit(self, features: Tensor, what: str) -> NDArray[np.float32]:
        """Unit rows on the CPU; a row that is not finite, or zero, must not reach anything that is trained."""
        return self._finite(nn.functional.normalize(features.float(), dim=-1), what)

    def _finite(self, features: Tensor, what: str) -> NDArray[np.float32]:
        found = np.asarray(features.float().cpu().numpy(), dtype=np.float32)
        if not np.isfinite(found).all() or not np.abs(found).max(axis=-1).all():
            raise BackboneError(
                f"{self._name}: features of {what} that are not finite, or all zero; expected finite ones: the weights "
                "are damaged or those of a diverged training: get the file again"
            )
        return found


def _grid_of(output: Tensor) -> tuple[int, int, int] | None:
    """Height, width and depth of what a block gives for one image, if that is a feature for each of several patches."""
    if output.ndim == 4 and min(output.shape[2:]) > 1:
        return int(output.shape[2]), int(output.shape[3]), int(output.shape[1])
    if output.ndim == 3 and output.shape[0] == 1:
        for tokens in (output.shape[1], output.shape[1] - 1):  # with a token of the whole image before them, or not
            side = math.isqrt(max(tokens, 0))
            if side > 1 and side * side == tokens:
                return side, side, int(output.shape[2])
    return None


def _patch_rows(output: Tensor, grid: tuple[int, int, int], neighbourhood: int) -> Tensor:
    """Unit patch features in rows [n, height * width * depth] of what a block gave."""
    height, width, depth = grid
    output = output.float()
    if output.ndim == 3:
        output = output[:, -height * width :].transpose(1, 2).reshape(-1, depth, height, width)
    if neighbourhood > 1:
        output = nn.functional.avg_pool2d(
            output, neighbourhood, stride=1, padding=neighbourhood // 2, count_include_pad=False
        )
    return nn.functional.normalize(output.flatten(2).transpose(1, 2), dim=-1).flatten(1)


def _multiplies_bfloat16(device: Device) -> bool:
    if kind_of(device) == "cuda":
        with torch.cuda.device(device):
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    found = torch.cpu.get_capabilities()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


def _return_freed() -> None:
    """Give freed memory back, which Linux's C library else keeps: all that a tower took in float32."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


def _refuse_not_finite(model: nn.Module, name: str) -> None:
    state = model.state_dict()
    broken = [key for key, value in state.items() if value.is_floating_point() and not torch.isfinite(value).all()]
    if broken:
        shown = ", ".join(broken[:2]) + (" and so on" if len(broken) > 2 else "")
        raise BackboneError(
            f"{name}: {len(broken)} of {len(state)} tensors hold values that are not finite ({shown}); expected finite "
            "ones: the file is damaged or of a training that diverged: get it again"
        )
    if not any(bool(value.any()) for key, value in state.items() if key.startswith("visual.")):
        raise BackboneError(
            f"{name}: all weights of the image tower are zero; expected trained ones: get the file again"
        )


def _digest(model: nn.Module) -> str:
    state = model.state_dict()
    total = hashlib.sha256(b"secfacmic backbone 1\n")
    for name in sorted(state):
        values = state[name].cpu().contiguous().numpy()
        if values.dtype.kind == "f":
            values = values.astype("<f4", copy=False)
        total.update(f"{name} {values.dtype.str} {values.shape}\n".encode())
        total.update(np.ascontiguousarray(values).data)
    return total.hexdigest()

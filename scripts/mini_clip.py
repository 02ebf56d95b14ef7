"""Train and measure mini-CLIP, the small CLIP that comes with secfacmic.

    python scripts/mini_clip.py --out configs/models --data DIR               train: phantoms and scans of DIR
    python scripts/mini_clip.py --out configs/models                          train: phantoms alone
    python scripts/mini_clip.py --out configs/models --evaluate --scans DIR   measure, on federated scans too
    python scripts/mini_clip.py --out configs/models --statistics --data DIR  where features of its training images lie

A caption states some facts of its image. Whether it is true of another image is computed, not assumed: pairs
of which that is unknown (the side of a tumour in a real scan, say) take no part in the contrastive loss.
Captions of real scans name modality, plane and tumour or not, never the kind of tumour; captions of phantoms
name places, shapes, margins and textures, never a kind either.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save as to_bytes
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import GridSearchCV, GroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from secure_fed.core.storage import write_durable
from secure_fed.lab.phantoms import CLASSES, SliceFacts, draw_facts, render_slice, scanner_of
from secure_fed.model.backbone import load_backbone
from secure_fed.model.public_statistics import PublicStatistics
from secure_fed.protocol.study_tables import Backbone

NAME = "mini-clip"
SEED = 20
FIRST_SCANNER = 1000
"""Pre-training uses scanners from here up; studies use those below."""
STATISTICS_PHANTOMS = 3000
"""About as many as there are scans."""
PROMPTS: tuple[str, ...] = (
    "an axial MRI slice of a head without any mass",
    "an axial MRI slice of a head with an irregular mass with blurred edges and swelling around it",
    "an axial MRI slice of a head with a round, sharply bordered, evenly bright mass",
    "an axial MRI slice at the skull base with a small round mass in the midline",
)
"""One prompt a class, in the order of ``CLASSES``."""
PARAPHRASES: tuple[tuple[str, ...], ...] = (
    (
        "there is no mass to be seen in this MRI of a head in the axial plane",
        "a healthy brain, MR image",
        "the scan of this person shows no tumour at all",
    ),
    (
        "irregular growth, poorly defined, with oedema, on an axial MRI",
        "the MR image of a head shows a tumour of irregular shape with an indistinct border and oedema",
        "a lesion with a ragged outline and with swelling in the brain",
    ),
    (
        "well defined round growth, uniformly bright, on an axial MRI",
        "the MR image of a head shows a rounded tumour that is evenly bright and has a clear border",
        "a sharply bordered lesion of round shape with uniform enhancement",
    ),
    (
        "little rounded growth on the midline of the skull base, on an axial MRI",
        "the MR image of the base of the skull shows a small tumour in the middle",
        "a small round lesion in the midline, low slice",
    ),
)
"""Sentences that no caption contains, by class."""

# Facts and captions -----------------------------------------------------------------------------------------

_VALUES: dict[str, tuple[str, ...]] = {
    "plane": ("axial", "coronal", "sagittal"),
    "tumour": ("no", "yes"),
    "level": ("base", "ventricles", "top"),
    "side": ("left", "right", "midline"),
    "region": ("frontal lobe", "temporal lobe", "parietal lobe", "occipital lobe", "cerebellum"),
    "size": ("small", "medium", "large"),
    "shape": ("round", "lobed", "irregular"),
    "margin": ("sharp", "blurred"),
    "texture": ("uniform", "ring", "patchy", "dark"),
    "oedema": ("no", "yes"),
}
_KEYS = tuple(_VALUES)
_UNKNOWN, _NONE, _SILENT = -1, -2, -1
_LEVEL_WORDS = {
    "base": ("at the skull base", "at the base of the skull", "low in the head"),
    "ventricles": ("at the level of the ventricles", "through the ventricles", "halfway up the head"),
    "top": ("near the top of the head", "above the ventricles", "high in the head"),
}
_BEFORE: dict[str, dict[str, tuple[str, ...]]] = {
    "size": {
        "small": ("small", "little"),
        "medium": ("medium sized", "middling"),
        "large": ("large", "big"),
    },
    "shape": {
        "round": ("round", "rounded", "ball shaped"),
        "lobed": ("lobed", "lobulated", "bumpy"),
        "irregular": ("irregular", "ragged", "irregularly shaped"),
    },
    "margin": {
        "sharp": ("sharply bordered", "well defined", "clear cut"),
        "blurred": ("blurred", "poorly defined", "indistinct"),
    },
}
_AFTER: dict[str, dict[str, tuple[str, ...]]] = {
    "shape": {
        "round": ("of round shape", "with a round outline"),
        "lobed": ("of lobed shape", "with a lobed outline"),
        "irregular": ("of irregular shape", "with an irregular outline"),
    },
    "margin": {
        "sharp": ("with a sharp border", "with clear edges"),
        "blurred": ("with blurred edges", "with an indistinct border"),
    },
    "texture": {
        "uniform": ("that is evenly bright", "with uniform enhancement", "uniformly bright"),
        "ring": ("with a bright ring around a dark centre", "with ring enhancement", "with a dark core"),
        "patchy": ("with patchy enhancement", "that is bright in patches", "unevenly bright"),
        "dark": ("without enhancement", "that stays dark", "darker than the brain"),
    },
    "oedema": {
        "no": ("without swelling", "with no oedema around it"),
        "yes": ("with swelling around it", "surrounded by oedema", "with oedema"),
    },
    "side": {
        "left": ("on the left", "in the left half"),
        "right": ("on the right", "in the right half"),
        "midline": ("in the midline", "in the middle", "on the midline"),
    },
    "region": {name: (f"in the {name}", f"of the {name}") for name in _VALUES["region"]},
}
_MASS = ("mass", "tumour", "lesion", "growth")
_HEALTHY = (
    "without any mass",
    "without a tumour",
    "with no mass",
    "showing no tumour",
    "with no lesion",
    "without a growth",
    "of a healthy brain",
    "with healthy brain",
    "with nothing abnormal",
)
_OPENINGS = (
    "{article} {plane}MRI slice of a head",
    "{article} {plane}MRI of a brain",
    "{article} {plane}MR image of the head",
    "{article} {plane}magnetic resonance image of a head",
    "{article} {plane}scan of the brain",
    "{article} {plane}slice",
)


def facts_of(facts: SliceFacts) -> dict[str, str]:
    """What captions may say of a phantom. Where its mass is attached they never say."""
    known = {"plane": "axial", "tumour": "yes" if facts.radius else "no", "level": facts.level}
    if facts.radius:
        known |= {
            "side": facts.side,
            "size": "small" if facts.radius < 0.11 else "medium" if facts.radius < 0.18 else "large",
            "shape": facts.shape,
            "margin": facts.margin,
            "texture": facts.texture,
            "oedema": "yes" if facts.oedema else "no",
        }
        if facts.region in _VALUES["region"]:
            known["region"] = facts.region
    return known


def encode(known: dict[str, str]) -> npt.NDArray[np.int64]:
    """Facts as numbers: the value's index, ``_UNKNOWN``, or ``_NONE`` for facts of a mass that is not there."""
    absent = _NONE if known.get("tumour") == "no" else _UNKNOWN
    row = [
        _VALUES[k].index(known[k]) if k in known else (absent if k in _AFTER or k in _BEFORE else _UNKNOWN)
        for k in _KEYS
    ]
    return np.array(row, dtype=np.int64)


def caption(known: dict[str, str], rng: np.random.Generator) -> tuple[str, npt.NDArray[np.int64]]:
    """A sentence about some of the facts, and those facts as numbers (``_SILENT`` where it says nothing)."""

    def pick(options: Sequence[str]) -> str:
        return options[int(rng.integers(len(options)))]

    said: dict[str, str] = {}
    plane = ""
    if "plane" in known and rng.random() < 0.7:
        said["plane"] = known["plane"]
        plane = known["plane"] + " "
    article = "an" if plane.startswith("a") or not plane else "a"
    opening = pick(_OPENINGS if plane else _OPENINGS[:3]).format(article=article, plane=plane)
    if "level" in known and rng.random() < 0.35:
        said["level"] = known["level"]
        opening += " " + pick(_LEVEL_WORDS[known["level"]])
    said["tumour"] = known["tumour"]
    if known["tumour"] == "no":
        return f"{opening} {pick(_HEALTHY)}", _mentioned(said)
    before: list[str] = []
    after: list[str] = []
    for key in ("size", "shape", "margin", "texture", "oedema", "side", "region"):
        if key in known and rng.random() < 0.45:
            said[key] = known[key]
            places = [(part, words[key]) for part, words in ((before, _BEFORE), (after, _AFTER)) if key in words]
            part, words_of = places[int(rng.integers(2)) % len(places)]
            part.append(pick(words_of[known[key]]))
    rng.shuffle(after)
    phrase = " ".join(filter(None, [", ".join(before), pick(_MASS), " and ".join(after)]))
    article = "an" if phrase[0] in "aeiou" else "a"
    if rng.random() < 0.25:
        return f"{article} {phrase}, {opening}", _mentioned(said)
    return f"{opening} with {article} {phrase}", _mentioned(said)


def _mentioned(said: dict[str, str]) -> npt.NDArray[np.int64]:
    return np.array([_VALUES[k].index(said[k]) if k in said else _SILENT for k in _KEYS], dtype=np.int64)


def truth(facts: Tensor, said: Tensor) -> tuple[Tensor, Tensor]:
    """Which captions are true of which images.

    Args:
        facts: encoded facts of images, ``(images, facts)``.
        said: encoded facts that captions state, ``(captions, facts)``.

    Returns:
        ``(true, known)``, both ``(images, captions)`` bool: the caption is true of the image; it is known
        whether it is.
    """
    a, b = facts[:, None, :], said[None, :, :]
    silent = b == _SILENT
    agree = (silent | (a == b)).all(-1)
    disagree = (~silent & (a != b) & (a != _UNKNOWN)).any(-1)
    return agree, agree | disagree


# Images -----------------------------------------------------------------------------------------------------

_STORED = 88
"""Side of stored training images: just above the input, so that crops need no antialiasing."""


@dataclass(frozen=True)
class Images:
    """Training images with their facts: ``pixels`` (n, side, side) uint8, ``facts`` one dict an image."""

    pixels: Tensor
    facts: list[dict[str, str]]


def phantom_images(count: int, rng: np.random.Generator) -> Images:
    """``count`` phantoms, each of a patient and nearly always a scanner of its own."""
    pixels, facts = [], []
    for _ in range(count):
        drawn = draw_facts(CLASSES[int(rng.integers(len(CLASSES)))], rng)
        scanner = scanner_of(FIRST_SCANNER + int(rng.integers(100_000)))
        pixels.append(_shrink(Image.fromarray(render_slice(drawn, scanner, int(rng.integers(2**40))))))
        facts.append(facts_of(drawn))
    return Images(torch.from_numpy(np.stack(pixels)), facts)


def real_images(folder: Path) -> Images:
    """The scans under ``folder`` (a folder per class; only tumour or not is read off their names)."""
    pixels, facts = [], []
    for path in sorted(folder.glob("*/*.jpg")):
        with Image.open(path) as opened:
            picture = opened.convert("L")
        tumour = not path.parent.name.startswith("no_")
        known = {"tumour": "yes" if tumour else "no"}
        # The scans without a tumour are all axial; of the others the plane is told where it is plain to see.
        plane = plane_of(picture) if tumour else "axial"
        if plane:
            known["plane"] = plane
        pixels.append(_shrink(picture))
        facts.append(known)
    if not pixels:
        raise SystemExit(f"{folder}: no CLASS/*.jpg found; expected a folder of public brain MRI, one folder a class")
    return Images(torch.from_numpy(np.stack(pixels)), facts)


def _shrink(picture: Image.Image) -> npt.NDArray[np.uint8]:
    return np.asarray(picture.resize((_STORED, _STORED), Image.Resampling.BICUBIC))


def plane_of(picture: Image.Image) -> str | None:
    """The plane of a scan on black ground, or None where this simple test cannot tell.

    Axial and coronal slices are symmetric, coronal and sagittal ones run out of the picture at the neck.
    Checked by eye on 96 scans: about 5 % wrong among those it names.
    """
    image = np.asarray(picture.resize((64, 64), Image.Resampling.BOX), dtype=np.float32) / 255
    column = np.arange(64)
    symmetry = -1.0
    for axis in range(52, 76):
        mirrored = axis - column
        inside = (mirrored >= 0) & (mirrored < 64)
        pair = np.corrcoef(image[:, inside].ravel(), image[:, mirrored[inside]].ravel())
        symmetry = max(symmetry, float(pair[0, 1]))
    foot = float((image[-4:] > 0.12 * np.quantile(image, 0.99) + 0.02).mean())
    if foot > 0.3:
        return "sagittal" if symmetry < 0.72 else "coronal" if symmetry > 0.82 else None
    return "axial" if foot < 0.02 and symmetry > 0.74 else None


def augment(pixels: Tensor, side: int, least: float, flip: bool, generator: torch.Generator) -> Tensor:
    """Random views: crop of at least ``least`` of the side, turn, mirror, gamma, contrast, noise.

    Args:
        pixels: ``(n, s, s)`` uint8.
        side: side of the views.
        least: smallest side of a crop as a share of the picture's.
        flip: whether views may be mirrored.
        generator: source of all randomness.

    Returns:
        Normalised ``(n, 3, side, side)`` float32.
    """
    n = len(pixels)

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(n, 1, generator=generator) * (high - low) + low

    levels = torch.linspace(0, 1, 256)[None, :] ** uniform(-0.45, 0.45).exp()
    levels = levels * uniform(0.7, 1.25) + uniform(-0.04, 0.10)
    views = levels.gather(1, pixels.reshape(n, -1).long()).reshape(n, 1, *pixels.shape[1:])
    scale, angle = uniform(least, 1.08), uniform(-0.3, 0.3)
    across = scale * uniform(0.9, 1.1) * (torch.where(uniform(0, 1) < 0.5, -1.0, 1.0) if flip else 1.0)
    room = (1 - scale).clamp(min=0.06)
    shift_x, shift_y = room * uniform(-1, 1), room * uniform(-1, 1)
    rows = [across * angle.cos(), -scale * angle.sin(), shift_x, across * angle.sin(), scale * angle.cos(), shift_y]
    grid = F.affine_grid(torch.cat(rows, 1).reshape(n, 2, 3), [n, 1, side, side], align_corners=False)
    views = F.grid_sample(views, grid, align_corners=False)
    soft = F.avg_pool2d(views, 3, stride=1, padding=1, count_include_pad=False)
    views = torch.lerp(views, soft, uniform(-0.6, 1.0)[:, :, None, None])
    views = views + uniform(0, 0.05)[:, :, None, None] * torch.randn(views.shape, generator=generator)
    return normalise(views.clamp(0, 1))


def normalise(grey: Tensor) -> Tensor:
    """Grey images ``(n, 1, s, s)`` in [0, 1] as open_clip's default preprocessing gives them."""
    mean = torch.tensor(open_clip.OPENAI_DATASET_MEAN)[:, None, None]
    std = torch.tensor(open_clip.OPENAI_DATASET_STD)[:, None, None]
    return ((grey - mean) / std).contiguous(memory_format=torch.channels_last)


# Training ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """What makes one training.

    Attributes:
        phantoms: number of generated images.
        steps: optimiser steps.
        phantom_batch: phantoms a step, one view each.
        real_batch: real scans a step, two views each.
        peak: learning rate after warming up, falling to zero as a half cosine.
        self_weight: weight of the loss that tells real scans apart by two views of each.
        fact_weight: weight of the loss that names the facts themselves.
        seed: of everything random.
    """

    phantoms: int = 12_000
    steps: int = 2000
    phantom_batch: int = 128
    real_batch: int = 64
    peak: float = 2e-3
    self_weight: float = 1.0
    fact_weight: float = 3.0
    seed: int = SEED


def contrastive(image: Tensor, text: Tensor, scale: Tensor, true: Tensor, known: Tensor) -> Tensor:
    """CLIP's loss with any number of true captions an image, pairs of unknown truth left out."""
    logits = (scale * image @ text.T).masked_fill(~known, -1e4)
    share = true.float()
    rows = share / share.sum(1, keepdim=True).clamp(min=1)
    columns = share / share.sum(0, keepdim=True).clamp(min=1)
    by_image = -(rows * logits.log_softmax(1)).sum(1).mean()
    by_text = -(columns * logits.log_softmax(0)).sum(0).mean()
    return (by_image + by_text) / 2


class FactTeller(nn.Module):
    """Names each known fact from the image feature: a plain teacher beside the captions, dropped afterwards."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.sizes = [len(_VALUES[key]) for key in _KEYS]
        self.linear = nn.Linear(width, sum(self.sizes))

    def forward(self, features: Tensor, facts: Tensor) -> Tensor:
        """Mean cross-entropy over the facts; unknown and absent ones do not count."""
        losses = [
            F.cross_entropy(logits, wanted, ignore_index=_UNKNOWN)
            for logits, wanted in zip(
                self.linear(features).split(self.sizes, dim=1), facts.clamp(min=_UNKNOWN).unbind(1), strict=True
            )
        ]
        return torch.stack(losses).mean()


def same_image(first: Tensor, second: Tensor, temperature: float = 0.15) -> Tensor:
    """Two views of an image are alike and unlike those of all others (NT-Xent)."""
    views = F.normalize(torch.cat([first, second]).float(), dim=-1)
    logits = (views @ views.T / temperature).fill_diagonal_(-1e4)
    n = len(first)
    target = torch.cat([torch.arange(n) + n, torch.arange(n)])
    return F.cross_entropy(logits, target)


def train(out: Path, data: Path | None, recipe: Recipe) -> None:
    """Train from scratch and write ``out/mini-clip.safetensors``, also every 400 steps on the way."""
    torch.manual_seed(recipe.seed)
    rng = np.random.default_rng(recipe.seed)
    generator = torch.Generator().manual_seed(recipe.seed)
    phantoms = phantom_images(recipe.phantoms, rng)
    real = real_images(data) if data else None
    model = open_clip.create_model(NAME).to(memory_format=torch.channels_last)
    tokenize = open_clip.get_tokenizer(NAME)
    side = model.visual.image_size[0]
    head = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 128))
    teller = FactTeller(512)
    params = [*model.parameters(), *head.parameters(), *teller.parameters()]
    decay = [p for p in params if p.ndim > 1]
    plain = [p for p in params if p.ndim <= 1]
    optimiser = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}], lr=recipe.peak
    )
    seen = torch.zeros(model.vocab_size, dtype=torch.bool)
    model.train()
    start = time.monotonic()
    for step in range(recipe.steps):
        warm = min(1.0, (step + 1) / 60)
        rate = recipe.peak * warm * 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
        for group in optimiser.param_groups:
            group["lr"] = rate
        pick = rng.integers(len(phantoms.facts), size=recipe.phantom_batch)
        known = [phantoms.facts[i] for i in pick]
        views = [augment(phantoms.pixels[pick], side, 0.8, False, generator)]
        if real:
            chosen = rng.choice(len(real.facts), size=recipe.real_batch, replace=False)
            known += [real.facts[i] for i in chosen]
            views += [augment(real.pixels[chosen], side, 0.5, True, generator) for _ in range(2)]
        # A few captions of real scans will do: they say little.
        told_of = known[: recipe.phantom_batch + recipe.real_batch // 3]
        said = [caption(k, rng) for k in told_of]
        facts = torch.from_numpy(np.stack([encode(k) for k in known]))
        true, sure = truth(facts[: len(said)], torch.from_numpy(np.stack([s for _, s in said])))
        with torch.autocast("cpu", torch.bfloat16):
            features = model.encode_image(torch.cat(views))
        features = features.float()
        words = tokenize([t for t, _ in said])
        seen[words] = True
        texts = model.encode_text(words, normalize=True)
        first = len(known)
        loss = contrastive(
            F.normalize(features[: len(said)], dim=-1), texts, model.logit_scale.exp().clamp(max=50), true, sure
        )
        own = torch.zeros(())
        if real:
            own = same_image(head(features[recipe.phantom_batch : first]), head(features[first:]))
        optimiser.zero_grad(set_to_none=True)
        told = teller(features[:first], facts)
        (loss + recipe.self_weight * own + recipe.fact_weight * told).backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        optimiser.step()
        if step % 50 == 0 or step + 1 == recipe.steps:
            print(
                f"step {step} caption {loss.item():.3f} self {own.item():.3f} facts {told.item():.3f} scale "
                f"{model.logit_scale.exp().item():.1f} {time.monotonic() - start:.0f} s",
                flush=True,
            )
        if step % 400 == 399 or step + 1 == recipe.steps:
            save(model, seen, out / f"{NAME}.safetensors")


def save(model: nn.Module, seen: Tensor, path: Path) -> None:
    """Write half-precision weights; words that no caption had get zero vectors instead of noise."""
    state = {k: (v.half() if v.is_floating_point() else v).contiguous() for k, v in model.state_dict().items()}
    state["token_embedding.weight"] = state["token_embedding.weight"] * seen[:, None]
    write_durable(path, to_bytes(state))


# Measurement ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cases:
    """Pictures with their classes (index into ``CLASSES``) and where they come from (scanner or site)."""

    pictures: list[Image.Image]
    y: npt.NDArray[np.int64]
    origin: npt.NDArray[np.int64]


def phantom_cases(scanners: int, each: int) -> Cases:
    """Phantoms as studies see them: the first ``scanners`` scanners, ``each`` pictures of each, classes equal."""
    pictures, y, origin = [], [], []
    for scanner in range(scanners):
        rng = np.random.default_rng([77, scanner])
        for number in range(each):
            kind = number % len(CLASSES)
            drawn = draw_facts(CLASSES[kind], rng)
            picture = render_slice(drawn, scanner_of(scanner), int(rng.integers(2**40)))
            pictures.append(Image.fromarray(picture))
            y.append(kind)
            origin.append(scanner)
    return Cases(pictures, np.array(y), np.array(origin))


def scan_cases(folder: Path) -> Cases:
    """The federated scans ``folder/client_N/CLASS/*.jpg``; these are never trained on here."""
    kinds = ("no_tumor", "glioma_tumor", "meningioma_tumor", "pituitary_tumor")
    pictures, y, origin = [], [], []
    for path in sorted(folder.glob("client_*/*/*.jpg")):
        with Image.open(path) as opened:
            pictures.append(opened.convert("L"))
        y.append(kinds.index(path.parent.name))
        origin.append(int(path.parts[-3].removeprefix("client_")))
    if not pictures:
        raise SystemExit(
            f"{folder}: no client_N/CLASS/*.jpg found; expected the folder that make brain-mri takes as DATA"
        )
    return Cases(pictures, np.array(y), np.array(origin))


def measure(out: Path, scans: Path | None) -> dict[str, Any]:
    """Figures of the weights in ``out``, balanced accuracies unless their name says otherwise."""
    weights = out / f"{NAME}.safetensors"
    model, preprocess = open_clip.create_model_from_pretrained(NAME, pretrained=str(weights))
    model.eval()
    tokenize = open_clip.get_tokenizer(NAME)
    sentences = [PROMPTS, *zip(*PARAPHRASES, strict=True)]
    with torch.no_grad():
        texts = [model.encode_text(tokenize(list(four)), normalize=True).numpy() for four in sentences]
    figures: dict[str, Any] = {
        "weights_mib": weights.stat().st_size / 2**20,
        "parameters": sum(p.numel() for p in model.parameters()),
        "logit_scale": model.logit_scale.exp().item(),
    }
    cases = {"phantoms": (phantom_cases(20, 120), 10)}
    if scans:
        cases["brain_mri"] = (scan_cases(scans), 3)
    for name, (found, first_test) in cases.items():
        start = time.process_time()
        x = _encode(model, preprocess, found.pictures)
        figures[f"{name}_images_per_core_second"] = len(x) / (time.process_time() - start)
        test = found.origin >= first_test
        raw = np.stack([np.asarray(p.resize((24, 24), Image.Resampling.BOX)) / 255 for p in found.pictures])
        zero_shot = [float(balanced_accuracy_score(found.y[test], (x[test] @ t.T).argmax(1))) for t in texts]
        figures |= {
            f"{name}_zero_shot": zero_shot[0],
            f"{name}_zero_shot_paraphrases": zero_shot[1:],
            f"{name}_probe": _probe(x, found.y, found.origin, test),
            f"{name}_probe_raw_24_pixels": _probe(raw.reshape(len(x), -1), found.y, found.origin, test),
        }
    return figures


def statistics(out: Path, data: Path | None) -> None:
    """Write where features of images like those of the training lie: phantoms, and the scans if they are there."""
    backbone = load_backbone(Backbone(model=NAME, weights="file", file=str(out / f"{NAME}.safetensors")), None)
    rng, phantoms = np.random.default_rng(SEED), []
    for _ in range(STATISTICS_PHANTOMS):
        drawn = draw_facts(CLASSES[int(rng.integers(len(CLASSES)))], rng)
        scanner = scanner_of(FIRST_SCANNER + int(rng.integers(100_000)))
        phantoms.append(Image.fromarray(render_slice(drawn, scanner, int(rng.integers(2**40)))))
    sources = [backbone.encode_images(phantoms)]
    if data:
        scans = []
        for path in sorted(data.glob("*/*.jpg")):
            with Image.open(path) as opened:
                scans.append(opened.convert("RGB"))
        sources.append(backbone.encode_images(scans))
    PublicStatistics.of(sources).save(out / f"{NAME}.statistics.safetensors", backbone.digest)


@torch.no_grad()
def _encode(model: Any, preprocess: Any, pictures: Sequence[Image.Image]) -> npt.NDArray[np.float32]:
    rows = [
        model.encode_image(torch.stack([preprocess(p) for p in pictures[i : i + 128]]), normalize=True)
        for i in range(0, len(pictures), 128)
    ]
    return np.asarray(torch.cat(rows).numpy())


def _probe(
    x: npt.NDArray[Any], y: npt.NDArray[np.int64], origin: npt.NDArray[np.int64], test: npt.NDArray[np.bool_]
) -> float:
    """A logistic regression on standardised features; its strength is chosen across the training origins."""
    search = GridSearchCV(
        make_pipeline(StandardScaler(), LogisticRegression(max_iter=3000)),
        {"logisticregression__C": [0.003, 0.03, 0.3, 3.0]},
        scoring="balanced_accuracy",
        cv=GroupKFold(3),
    ).fit(x[~test], y[~test], groups=origin[~test])
    return float(balanced_accuracy_score(y[test], search.predict(x[test])))


def main() -> None:
    """Command line of this script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of mini-clip.json and the weights")
    parser.add_argument("--data", type=Path, help="folder of the public scans; without it phantoms alone")
    parser.add_argument("--evaluate", action="store_true", help="measure the weights instead of training")
    parser.add_argument("--statistics", action="store_true", help="write the features' statistics instead of training")
    parser.add_argument("--scans", type=Path, help="with --evaluate: folder of the federated scans")
    args = parser.parse_args()
    open_clip.add_model_config(args.out)
    # One thread: the number of threads changes the result, and steps this small gain little from a second.
    torch.set_num_threads(1)
    if args.evaluate:
        print(json.dumps(measure(args.out, args.scans), indent=2))
    elif args.statistics:
        statistics(args.out, args.data)
    else:
        train(args.out, args.data, Recipe())


if __name__ == "__main__":
    main()

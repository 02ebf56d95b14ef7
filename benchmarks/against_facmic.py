"""One training round of FACMIC as its paper's code does it, against ours: ViT-B-16, random weights, its settings.

    python benchmarks/against_facmic.py [--json FILE] [--threads 2] [--steps 2] [--images 200]

Both sides: 1,000 source and 1,000 target images at one site, 4 classes, 199 steps of batch 32 + 32, contrastive loss
and LMMD, batch norm, Adam, 50 rounds, float32. Theirs and our encoding have ``--threads``.

Theirs, written from the description of the paper's code and not copied: each step decodes its images, encodes the
source batch once, the target batch twice and the text of each sample, then trains the adapter. ``--steps`` steps are
timed and the fastest taken for all 199 of a round, which is in their favour.

Ours: each image is encoded once, then rounds train on cached features. ``--images`` images are encoded and timed, and
the time taken for all 2,000; a round is timed whole, and the median of several taken, with one thread as a site
trains unless its file says otherwise, and beside it with ``--threads``. bfloat16 is a row of its own.

Left out on both sides, as it is the same: sending and adding updates. Encoding of the 4 prompts is left out in ours: it
is done once, when the study is made.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from secure_fed.clients.data import SiteImage
from secure_fed.clients.features import FeatureCache, Labelled, SiteFeatures
from secure_fed.clients.lmmd import lmmd
from secure_fed.clients.training import train_round
from secure_fed.model import loaded_backbone as backbones
from secure_fed.model.adapters import initial_parameters
from secure_fed.model.backbone import load_backbone, make_random_checkpoint
from secure_fed.model.loaded_backbone import LoadedBackbone
from secure_fed.protocol.initial_state import InitialState
from secure_fed.protocol.study import AgreedStudy, Study
from secure_fed.protocol.study_tables import Backbone, Method, Training

MODEL, DIM, CLASSES = "ViT-B-16", 512, 4
SOURCE, TARGET, BATCH, STEPS, ROUNDS = 1000, 1000, 32, 199, 50
SETTINGS = Training(
    steps=STEPS, learning_rate=5e-5, batch_size=BATCH, weight_decay=0.02, betas=(0.9, 0.98), epsilon=1e-6
)


def make_images(folder: Path, count: int) -> list[Path]:
    """Grey JPEG files of 256 pixels, as large as brain MRI slices are passed around."""
    rng = np.random.default_rng(0)
    paths = []
    for number in range(count):
        small = Image.fromarray(rng.integers(0, 256, (32, 32), dtype=np.uint8))
        paths.append(folder / f"{number:04}.jpg")
        small.resize((256, 256), Image.Resampling.BICUBIC).save(paths[-1], quality=90)
    return paths


class TheirAdapter(nn.Sequential):
    """The paper's feature attention: Linear, BatchNorm, LeakyReLU, Linear, Softmax."""

    def __init__(self) -> None:
        super().__init__(
            nn.Linear(DIM, DIM), nn.BatchNorm1d(DIM), nn.LeakyReLU(), nn.Linear(DIM, DIM), nn.Softmax(dim=1)
        )


class Theirs:
    """The paper's local training, a step at a time."""

    def __init__(self, checkpoint: Path, paths: list[Path]) -> None:
        self._model, _, self._preprocess = open_clip.create_model_and_transforms(MODEL, pretrained=str(checkpoint))
        self._model.eval().requires_grad_(False)
        self._tokenizer = open_clip.get_tokenizer(MODEL)
        self._adapter = TheirAdapter()
        self._optimizer = torch.optim.Adam(
            self._adapter.parameters(), lr=5e-5, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.02
        )
        self._paths = paths
        self._rng = np.random.default_rng(0)

    def step(self) -> None:
        source, target = self._batch(), self._batch()
        labels = torch.from_numpy(self._rng.integers(0, CLASSES, BATCH))
        texts = self._tokenizer([f"a picture of a class_{label}" for label in labels.tolist()])
        features = self._model.encode_image(source)
        text_features = nn.functional.normalize(self._model.encode_text(texts), dim=1)
        scale = self._model.logit_scale.exp()
        adapted = nn.functional.normalize(self._adapter(features) * features, dim=1)
        similarity = scale * adapted @ text_features.T
        own = torch.arange(BATCH)
        contrastive = (
            nn.functional.cross_entropy(similarity, own) + nn.functional.cross_entropy(similarity.T, own)
        ) / 2
        raw = self._model.encode_image(target)  # for the distance
        again = self._model.encode_image(target)  # for the pseudo-labels
        with torch.no_grad():
            guessed = nn.functional.normalize(self._adapter(again) * again, dim=1)
            classes = self._tokenizer([f"a picture of a class_{label}" for label in range(CLASSES)])
            prompts = nn.functional.normalize(self._model.encode_text(classes), dim=1)
            guesses = torch.softmax(100 * guessed @ prompts.T, dim=1)
        loss = contrastive + lmmd(adapted, labels, nn.functional.normalize(raw, dim=1), guesses)
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()

    def _batch(self) -> Tensor:
        chosen = self._rng.choice(len(self._paths), BATCH)
        return torch.stack([self._preprocess(Image.open(self._paths[i])) for i in chosen])


def seconds_of(run: Callable[[], object]) -> float:
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def encode(loaded: LoadedBackbone, study: Backbone, paths: list[Path], folder: Path) -> tuple[float, NDArray[Any]]:
    """Seconds to encode the images into an empty cache, weights loaded; and the features."""
    images = [SiteImage(path, path.name, 0, "train") for path in paths]
    with FeatureCache(folder / f"{loaded.precision}.sqlite") as cache:
        begun = time.perf_counter()
        found = cache.encode(images, study, lambda: loaded, "plain", False)
        rows = cache.read([(digest, found.space) for digest in found.digests], loaded.dim)
        seconds = time.perf_counter() - begun
    assert found.encoded == len(paths)
    return seconds, rows


def our_round(features: NDArray[Any], repeats: int) -> list[float]:
    """Seconds of whole rounds on 1,000 + 1,000 features (those that were encoded, repeated)."""
    rng = np.random.default_rng(1)
    prompts = nn.functional.normalize(torch.from_numpy(rng.normal(size=(CLASSES, DIM))).float(), dim=1).numpy()
    method = Method(norm="batch", loss="contrastive", lmmd_weight=1.0)
    parameters = initial_parameters(method, DIM, prompts, 0)
    agreed = AgreedStudy(
        Study.model_construct(method=method, training=SETTINGS), InitialState(parameters, prompts, 100.0)
    )
    rows = np.resize(np.arange(len(features)), SOURCE + TARGET)
    labels, none = rng.integers(0, CLASSES, SOURCE), np.empty((0, DIM), dtype=np.float32)
    nobody = Labelled(none, np.empty(0, dtype=np.int64))
    train = Labelled(features[rows[:SOURCE]], labels)
    site = SiteFeatures(train, nobody, nobody, features[rows[SOURCE:]], unreadable=0, encoded=0)
    train_round(agreed, parameters, site, 0)
    return [seconds_of(lambda: train_round(agreed, parameters, site, 1)) for _ in range(repeats)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the figures")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2, help="steps of theirs that are timed")
    parser.add_argument("--images", type=int, default=200, help="images that ours encodes")
    parser.add_argument("--repeats", type=int, default=5, help="rounds of ours that are timed")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = folder / "random.safetensors"
        make_random_checkpoint(MODEL, 0, checkpoint)
        paths = make_images(folder, arguments.images)
        study = Backbone(model=MODEL, weights="random", seed=0)
        rule, backbones._multiplies_bfloat16 = backbones._multiplies_bfloat16, lambda device: False
        exact = load_backbone(study, checkpoint)
        exact.encode_images([Image.open(paths[0])])  # the first call is slower
        float32_s, features = encode(exact, study, paths, folder)
        more_threads = our_round(features, arguments.repeats)
        torch.set_num_threads(1)
        rounds = our_round(features, arguments.repeats)
        torch.set_num_threads(arguments.threads)
        del exact
        backbones._multiplies_bfloat16 = rule
        half = load_backbone(study, checkpoint)
        half.encode_images([Image.open(paths[0])])
        half_s, cosine = None, None
        if half.precision == "bfloat16":
            half_s, halves = encode(half, study, paths, folder)
            cosine = float((features * halves).sum(axis=1).min())
        del half
        theirs = Theirs(checkpoint, paths)
        steps = [seconds_of(theirs.step) for _ in range(arguments.steps)]
    total = SOURCE + TARGET
    report: dict[str, Any] = {
        "ours_s_per_round": statistics.median(rounds),
        "theirs_s_per_round": STEPS * min(steps),
        "ours_s_study": total * float32_s / len(paths) + ROUNDS * statistics.median(rounds),
        "theirs_s_study": ROUNDS * STEPS * min(steps),
        "threads": arguments.threads,
        "ours_rounds_s": rounds,
        "ours_rounds_more_threads_s": more_threads,
        "theirs_steps_s": steps,
        "images_encoded": len(paths),
        "float32_images_per_s": len(paths) / float32_s,
        "bfloat16_images_per_s": None if half_s is None else len(paths) / half_s,
        "bfloat16_least_cosine": cosine,
        "ours_s_study_bfloat16": None
        if half_s is None
        else total * half_s / len(paths) + ROUNDS * statistics.median(rounds),
    }
    report["per_round_ratio"] = report["theirs_s_per_round"] / report["ours_s_per_round"]
    report["study_ratio"] = report["theirs_s_study"] / report["ours_s_study"]
    print(
        f"a round after the first: theirs {report['theirs_s_per_round']:.0f} s ({STEPS} x {min(steps):.1f} s),", end=" "
    )
    print(f"ours {report['ours_s_per_round']:.2f} s (fastest {min(rounds):.2f}); {report['per_round_ratio']:.0f} times")
    print(f"ours with {arguments.threads} threads: {statistics.median(more_threads):.2f} s", end=" ")
    print(f"(fastest {min(more_threads):.2f})")
    print(f"a study of {ROUNDS} rounds: theirs {report['theirs_s_study'] / 3600:.1f} h,", end=" ")
    print(f"ours {report['ours_s_study'] / 60:.1f} min, encoding included; {report['study_ratio']:.0f} times")
    print(f"ours encodes {report['float32_images_per_s']:.2f} images/s in float32", end="")
    if half_s is None:
        print("; bfloat16 is not used on this processor")
    else:
        print(
            f", {report['bfloat16_images_per_s']:.2f} in bfloat16 ({float32_s / half_s:.2f} times, cosine {cosine:.5f})"
        )
    print(f"extrapolated: theirs from {len(steps)} steps, ours' encoding from {len(paths)} of {total} images")
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Encoding images: how many a second against a plain open_clip loop, and how much memory many of them take.

    python benchmarks/features.py [--json FILE] [--threads 2] [--count 192] [--models mini-clip ViT-B-16]
    python benchmarks/features.py --images 100000 [--json FILE]

The first compares, for mini-CLIP and ViT-B-16 (random weights will do for timing), the loop that everybody writes (open
a JPEG file, preprocess, a batch of 32 through ``encode_image`` in float32) with ours into an empty cache, in float32
and, where the processor multiplies it and the tower is large, in bfloat16.

The second makes that many images of 48 pixels, then checks (fingerprints, comparison of all pairs) and encodes them
with mini-CLIP (and gathers the features), each in a process of its own, and reports images a second and the greatest
memory of the process and of those that work for it, added up (proportional set size, sampled twice a second): all
of it, and what is left without the pages of libraries' files, which the system drops when memory is short.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

BATCH = 32


def make_images(folder: Path, count: int, side: int, suffix: str) -> list[Path]:
    """Pictures with some structure, a function of their number."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    paths = []
    for number in range(count):
        small = Image.fromarray(rng.integers(0, 256, (16, 16), dtype=np.uint8))
        paths.append(folder / f"{number:06}.{suffix}")
        small.resize((side, side), Image.Resampling.BILINEAR).save(paths[-1])
    return paths


def compare(model: str, count: int, threads: int) -> list[dict[str, Any]]:
    """Rows of one model: the plain loop, ours in float32, ours as it chooses if that is another."""
    import open_clip
    import torch

    from secure_fed.clients.data import SiteImage
    from secure_fed.clients.features import FeatureCache
    from secure_fed.model import backbone as backbones
    from secure_fed.model.backbone import load_backbone, make_random_checkpoint
    from secure_fed.protocol.study import Backbone

    torch.set_num_threads(threads)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint = folder / "random.safetensors"
        make_random_checkpoint(model, 0, checkpoint)
        paths = make_images(folder / "images", count, 256, "jpg")
        network, _, preprocess = open_clip.create_model_and_transforms(model, pretrained=str(checkpoint))
        network.eval()
        plain = []
        with torch.inference_mode():
            network.encode_image(torch.stack([preprocess(Image.open(paths[0]))] * BATCH))  # the first call is slower
            begun = time.perf_counter()
            for start in range(0, count, BATCH):
                batch = torch.stack([preprocess(Image.open(path)) for path in paths[start : start + BATCH]])
                plain.append(network.encode_image(batch, normalize=True).numpy())
            seconds = time.perf_counter() - begun
        expected = np.concatenate(plain)
        rows.append({"model": model, "name": "plain open_clip loop", "precision": "float32", "seconds": seconds})
        del network
        images = [SiteImage(path, path.name, 0, "train") for path in paths]
        study = Backbone(model=model, weights="random", seed=0)
        rule = backbones._multiplies_bfloat16
        for multiplies in (lambda device: False, rule):
            backbones._multiplies_bfloat16 = multiplies
            loaded = load_backbone(study, checkpoint)
            if multiplies is rule and loaded.precision == "float32":
                break
            loaded.encode_images([Image.open(paths[0])])
            with FeatureCache(folder / f"{loaded.precision}.sqlite") as cache:
                begun = time.perf_counter()
                found = cache.encode(images, study, lambda loaded=loaded: loaded, "plain", False)  # type: ignore[misc]
                seconds = time.perf_counter() - begun
                rows_found = cache.read([(digest, found.space) for digest in found.digests], loaded.dim)
            cosine = float((rows_found * expected).sum(axis=1).min())
            row = {"model": model, "name": "ours", "precision": loaded.precision, "seconds": seconds}
            rows.append(row | {"least_cosine": cosine})
        backbones._multiplies_bfloat16 = rule
    for row in rows:
        row |= {"images": count, "images_per_s": count / row["seconds"]}
        row["times_the_loop"] = rows[0]["seconds"] / row["seconds"]
    return rows


def _memory(process: int) -> tuple[int, int]:
    """Proportional set size of a process and its descendants in bytes: all of it, and without pages of files."""
    found = {"Pss": 0, "Pss_File": 0}
    waiting = [process]
    while waiting:
        one = waiting.pop()
        try:
            for line in Path(f"/proc/{one}/smaps_rollup").read_text().splitlines()[1:]:
                kind, size = line.split(":")
                if kind in found:
                    found[kind] += 1024 * int(size.split()[0])
            for task in Path(f"/proc/{one}/task").iterdir():
                waiting += [int(child) for child in (task / "children").read_text().split()]
        except (OSError, ValueError):
            continue
    return found["Pss"], found["Pss"] - found["Pss_File"]


def many(count: int) -> list[dict[str, Any]]:
    """Rows of the two stages over many small images."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        make_images(Path(name) / "images", count, 48, "png")
        for stage in ("check", "encode"):
            command = [sys.executable, "-P", __file__, "--stage", stage, "--folder", name]
            begun, peak, kept = time.perf_counter(), 0, 0
            process = subprocess.Popen(command, stdout=subprocess.PIPE)
            while process.poll() is None:
                found = _memory(process.pid)
                peak, kept = max(peak, found[0]), max(kept, found[1])
                time.sleep(0.5)
            if process.returncode:
                raise SystemExit(f"stage {stage} ended with {process.returncode}")
            seconds = time.perf_counter() - begun
            rows.append(
                {
                    "stage": stage,
                    "images": count,
                    "seconds": seconds,
                    "images_per_s": count / seconds,
                    "peak_bytes": peak,
                    "peak_bytes_without_files": kept,
                }
            )
    return rows


def run_stage(stage: str, folder: Path) -> None:
    """One stage over the folder's images, as ``data check`` and a client's start do it."""
    from secure_fed.clients.data import SiteImage
    from secure_fed.clients.duplicates import exact_copies, fingerprints, inseparable
    from secure_fed.clients.features import FeatureCache
    from secure_fed.model.backbone import load_backbone
    from secure_fed.protocol.study import Backbone

    images = [SiteImage(path, path.name, 0, "train") for path in sorted((folder / "images").iterdir())]
    with FeatureCache(folder / "features.sqlite") as cache:
        if stage == "check":
            found = fingerprints(images, cache).found
            inseparable(images, found)
            exact_copies(found)
            return
        study = Backbone(model="mini-clip", weights="file", file="mini-clip.safetensors")
        encoded = cache.encode(images, study, lambda: load_backbone(study, None), "plain", False)
        assert encoded.encoded == len(images)
        cache.read([(digest, encoded.space) for digest in encoded.digests], 512)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the figures")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--count", type=int, default=192, help="images of the comparison")
    parser.add_argument("--models", nargs="+", default=["mini-clip", "ViT-B-16"])
    parser.add_argument("--images", type=int, help="so many small images instead, for memory")
    parser.add_argument("--stage", choices=["check", "encode"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stage:
        run_stage(arguments.stage, arguments.folder)
        return
    if arguments.images:
        rows = many(arguments.images)
        for row in rows:
            print(
                f"{row['stage']:7} {row['images']:,} images in {row['seconds']:.0f} s, "
                f"{row['images_per_s']:.0f} a second, greatest memory {row['peak_bytes'] / 2**30:.2f} GiB, "
                f"{row['peak_bytes_without_files'] / 2**30:.2f} without libraries' files"
            )
    else:
        rows = [row for model in arguments.models for row in compare(model, arguments.count, arguments.threads)]
        for row in rows:
            cosine = f", least cosine {row['least_cosine']:.5f}" if "least_cosine" in row else ""
            print(
                f"{row['model']:10} {row['name']:21} {row['precision']:9} {row['images_per_s']:8.2f} images/s, "
                f"{row['times_the_loop']:.2f} times the loop{cosine}"
            )
    if arguments.json:
        arguments.json.write_text(json.dumps({"rows": rows}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Heat maps of a classifier, judged by numbers on phantoms, whose lesions are known.

    python benchmarks/explain.py [--adapters facmic text_head gaussian_head] [--images 60] [--seed 0] [--work DIR]

Each adapter is the study ``demo``, simulated in ``plain`` mode, which changes no bit, on phantoms with masks. Of test
images with a lesion that are classified correctly:

- pointing: the share whose map is largest inside the lesion, by class, beside the best constant place of the predicted
  class, fitted on the masks of training images;
- deletion and insertion: the area under the probability of the predicted class while cells are taken out, or put back,
  in the map's order, beside the same in random order. A good map's deletion is low, its insertion high.
"""

from __future__ import annotations

import argparse
import csv
import json
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console

from secure_fed.clients.decoding import decode
from secure_fed.lab.simulation import simulate
from secure_fed.model.adapter_file import AdapterFile, load_adapter
from secure_fed.model.attribution import HeatMaps, Margin, occluded, question
from secure_fed.model.backbone import load_backbone
from secure_fed.model.loaded_backbone import LoadedBackbone
from secure_fed.protocol.study import read_template, with_fields

CHANGES: dict[str, dict[str, Any]] = {
    "facmic": {},
    "text_head": {"method": {"adapter": "text_head"}},
    "gaussian_head": {"method": {"adapter": "gaussian_head", "shrinkage": 0.1}, "rounds": 1},
}
GRID = 10
"""Cells a side that deletion and insertion go by."""


def study(adapter: str, work: Path, seed: int) -> Path:
    """The folder of the study, simulated unless it is there."""
    out = work / f"{adapter}-{seed}"
    if not (out / "adapter.safetensors").exists():
        template = read_template(Path("demo"))
        plan = template.plan.model_dump(mode="json", exclude_none=True) | {"masks": True, "phantom_seed": seed}
        simulate(with_fields(template, mode="plain", seed=seed, simulation=plan, **CHANGES[adapter]), out, None)
    return out


def rows(data: Path, split: str) -> list[tuple[Path, Path, str]]:
    """Image, mask and label of all sites' images with a lesion in a split."""
    found = []
    for manifest in sorted(data.glob("*/manifest.csv")):
        with manifest.open(newline="") as file:
            found += [
                (manifest.parent / row["path"], manifest.parent / row["mask"], row["label"])
                for row in csv.DictReader(file)
                if row["split"] == split and row["label"]
            ]
    return found


def mask_of(path: Path, side: int) -> NDArray[np.bool_]:
    """A lesion as the tower sees it: phantoms are square."""
    with Image.open(path) as mask:
        return np.asarray(mask.convert("L").resize((side, side), Image.Resampling.BILINEAR)) > 127


def constant_places(data: Path, side: int) -> dict[str, int]:
    """By class, the place that lies in most lesions of training images."""
    sums: dict[str, NDArray[np.float64]] = defaultdict(lambda: np.zeros((side, side)))
    for _, mask, label in rows(data, "train"):
        sums[label] += mask_of(mask, side)
    return {label: int(total.argmax()) for label, total in sums.items()}


def curves(
    file: AdapterFile, backbone: LoadedBackbone, prepared: NDArray[np.float32], label: int, order: NDArray[np.int64]
) -> tuple[float, float]:
    """Areas under the deletion and the insertion curve."""
    steps = range(0, GRID * GRID + 1, 5)
    pictures = [occluded(prepared, order[:step].tolist(), GRID) for step in steps]
    pictures += [occluded(prepared, order[step:].tolist(), GRID) for step in steps]
    p = file.predict(backbone.encode_prepared(pictures))[:, label].reshape(2, -1)
    return float(p[0].mean()), float(p[1].mean())


def judged(adapter: str, work: Path, seed: int, most: int) -> dict[str, Any]:
    """All figures of an adapter."""
    out = study(adapter, work, seed)
    file = load_adapter(out / "adapter.safetensors")
    backbone = load_backbone(file.backbone, None)
    maps, data, side = HeatMaps(backbone), out / "data", backbone.side
    places = constant_places(data, side)
    rng = np.random.default_rng(0)
    test = rows(data, "test")
    hits: dict[str, list[tuple[bool, bool]]] = defaultdict(list)
    areas: list[tuple[float, float, float, float]] = []
    asked: dict[int, tuple[Margin, Margin | None]] = {}
    for place in rng.permutation(len(test)):
        path, mask_path, label = test[place]
        mask = mask_of(mask_path, side)
        if not mask.any() or len(hits[label]) >= most:
            continue
        prepared = backbone.prepare(decode(path.read_bytes(), None, "axial"))
        k = int(file.predict(backbone.encode_prepared([prepared])).argmax())
        if file.classes[k] != label:
            continue
        if k not in asked:
            asked[k] = question(file, file.build(), k)
        heat = maps.of(prepared, *asked[k])
        heat = np.zeros(mask.shape) if heat is None else heat
        hits[label].append((bool(heat.any() and mask.flat[heat.argmax()]), bool(mask.flat[places[label]])))
        if len(areas) < most:
            cells = np.add.reduceat(heat, np.arange(0, side, side // GRID), axis=0)
            cells = np.add.reduceat(cells, np.arange(0, side, side // GRID), axis=1)
            order = np.argsort(-cells[:GRID, :GRID].ravel(), kind="stable")
            random = curves(file, backbone, prepared, k, rng.permutation(GRID * GRID))
            areas.append((*curves(file, backbone, prepared, k, order), *random))
    everything = np.array([hit for found in hits.values() for hit in found], dtype=np.float64)
    means = np.mean(areas, axis=0)
    return {
        "adapter": adapter,
        "maps": maps.kind,
        "images": len(everything),
        "pointing": 100 * float(everything[:, 0].mean()),
        "constant": 100 * float(everything[:, 1].mean()),
        "classes": {
            label: {"images": len(found), "pointing": 100 * float(np.mean([hit for hit, _ in found]))}
            | {"constant": 100 * float(np.mean([hit for _, hit in found]))}
            for label, found in sorted(hits.items())
            if found
        },
        "deletion": float(means[0]),
        "insertion": float(means[1]),
        "random_deletion": float(means[2]),
        "random_insertion": float(means[3]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", nargs="+", choices=sorted(CHANGES), default=list(CHANGES))
    parser.add_argument("--images", type=int, default=60, help="of each class, at most")
    parser.add_argument("--seed", type=int, default=0, help="of phantoms, splits and training")
    parser.add_argument("--work", type=Path, help="keeps the studies")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = [
            judged(name, arguments.work or Path(folder), arguments.seed, arguments.images)
            for name in arguments.adapters
        ]
    console = Console()
    console.print("| adapter | class | images | pointing, % | best constant place, % |\n|---|---|---|---|---|")
    for one in found:
        for label, row in [("all", one), *one["classes"].items()]:
            figures = f"{row['images']} | {row['pointing']:.1f} | {row['constant']:.1f}"
            console.print(f"| {one['adapter']} | {label} | {figures} |", soft_wrap=True)
    console.print("\n| adapter | deletion | at random | insertion | at random |\n|---|---|---|---|---|")
    for one in found:
        areas = " | ".join(
            f"{one[key]:.3f}" for key in ("deletion", "random_deletion", "insertion", "random_insertion")
        )
        console.print(f"| {one['adapter']} | {areas} |", soft_wrap=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Large towers on a small machine: ViT-L-14 at 336 and SO400M at 448 pixels, random weights, 8 images.

    python benchmarks/large_towers.py [--size 336|448]

Each is loaded from a file and encodes in a process of its own, whose peak of memory is measured. Needs 4 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from secure_fed.clients.encoding import expected_seconds
from secure_fed.model.library import known_model
from secure_fed.model.loaded_backbone import LoadedBackbone
from secure_fed.model.network import Form, build, make_network
from secure_fed.model.safetensors_file import write_weights
from secure_fed.model.tokenizer import ClipTokens
from secure_fed.model.transformers_form import model_config

IMAGES = 8
TOWERS = {"336": "ViT-L-14-336-quickgelu", "448": "a SigLIP SO400M"}
WIDE = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}


def form(size: str, weights: Path) -> Form:
    if size == "336":
        config = known_model(TOWERS[size])
    else:
        text = WIDE | {"vocab_size": 49408}
        vision = WIDE | {"image_size": 448, "patch_size": 14}
        config = model_config({"model_type": "siglip", "text_config": text, "vision_config": vision}, "SO400M")
    side = int(size)
    preprocess = {
        "size": [side, side],
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "interpolation": "bicubic",
        "resize_mode": "squash",
        "resize_to": [side, side],
        "cut": "floor",
    }
    context = config["text_cfg"].get("context_length", 77)
    return Form("random weights", TOWERS[size], config, preprocess, weights, ClipTokens(context))


def make(size: str, path: Path) -> None:
    network = make_network(form(size, path).config)
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Any] = {}
    for name, value in network.state_dict().items():
        drawn = torch.randn(value.shape, generator=generator).mul_((value.shape[-1] if value.ndim else 1) ** -0.5)
        tensors[name] = torch.ones(value.shape) if value.ndim < 2 and name.endswith("weight") else drawn
    write_weights(path, tensors)


def encode(size: str, path: Path) -> dict[str, Any]:
    start = time.perf_counter()
    found = form(size, path)
    loaded = LoadedBackbone(build(found), found, TOWERS[size])
    ready = time.perf_counter()
    noise = np.random.default_rng(0).integers(0, 256, (IMAGES, 500, 500, 3)).astype(np.uint8)
    pictures = [Image.fromarray(one) for one in noise]
    features = loaded.encode_images(pictures)
    done = time.perf_counter()
    assert features.shape == (IMAGES, loaded.dim)
    return {
        "description": loaded.description,
        "precision": loaded.precision,
        "seconds_to_load_and_check": round(ready - start, 1),
        "seconds_per_image": round((done - ready) / IMAGES, 2),
        "seconds_per_image_told": round(expected_seconds(loaded.seconds_per_image(pictures[:1]), 1), 2),
        "peak_gib": round(peak() / 2**20, 2),
        "threads": torch.get_num_threads(),
    }


def peak() -> int:
    """KiB that this process had in memory at most; ru_maxrss counts what its parent had before it was started, too."""
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=TOWERS, action="append")
    parser.add_argument("--weights", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.weights is not None:
        print(json.dumps(encode(given.size[0], given.weights)))
        return
    for size in given.size or TOWERS:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "random.safetensors"
            make(size, path)
            command = [sys.executable, "-P", __file__, "--size", size, "--weights", str(path)]
            print(subprocess.run(command, check=True, capture_output=True, text=True).stdout, end="", flush=True)


if __name__ == "__main__":
    main()

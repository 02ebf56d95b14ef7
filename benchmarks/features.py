"""Encoding images: how many a second against a plain open_clip loop, and how much memory many of them take.

    python benchmarks/features.py [--json FILE] [--threads 2] [--count 192] [--models mini-clip ViT-B-16]
    python benchmarks/features.py --images 100000 [--json FILE]
    python benchmarks/features.py --mixed 20000 [--json FILE]
    python benchmarks/features.py --digests 400 [--json FILE]

The first compares, for mini-CLIP and ViT-B-16 (random weights will do for timing), the loop that everybody writes (open
a JPEG file, preprocess, a batch of 32 through ``encode_image`` in float32) with ours into an empty cache, in float32
and, where the processor multiplies it and the tower is large, in bfloat16.

The second makes that many images of 48 pixels, then checks (fingerprints, comparison of all pairs) and encodes them
with mini-CLIP (and gathers the features), each in a process of its own, and reports images a second and the greatest
memory of the process and of those that work for it, added up (proportional set size, sampled twice a second): all
of it, and what is left without the pages of libraries' files, which the system drops when memory is short.

The third makes a hospital's data: images of 256 pixels, half of them DICOM of 16 bits, the others PNG and JPEG, and a
manifest that names each ten times (of the DICOM files another frame); it reads the manifest, then does twice what
``secfacmic data check`` does with the images, the second time out of the cache.

The fourth encodes such images with mini-CLIP as ``secfacmic predict`` does, with the digest of each one's pixels, by
which one picture of several patients is told, and without: processor time for each image, the least of five times.
"""

from __future__ import annotations

import argparse
import json
import resource
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
    from secure_fed.model import loaded_backbone as backbones
    from secure_fed.model.backbone import load_backbone, make_random_checkpoint
    from secure_fed.protocol.study_tables import Backbone

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


def make_mixed(folder: Path, count: int) -> None:
    """A hospital's data, a function of their number."""
    import pydicom
    from pydicom.dataset import FileMetaDataset

    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    lines = ["path,label,patient,age,scanner,frame"]
    for number in range(count):
        small = Image.fromarray(rng.integers(0, 256, (16, 16), dtype=np.uint8))
        image = small.resize((256, 256), Image.Resampling.BILINEAR)
        suffix = ("dcm", "png", "dcm", "jpg")[number % 4]
        path = folder / "images" / f"{number:06}.{suffix}"
        if suffix == "dcm":
            dataset = pydicom.Dataset()
            dataset.file_meta = FileMetaDataset()
            dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
            dataset.SOPClassUID, dataset.SOPInstanceUID = pydicom.uid.MRImageStorage, pydicom.uid.generate_uid()
            dataset.Modality, dataset.PatientID, dataset.PhotometricInterpretation = "MR", f"P{number}", "MONOCHROME2"
            dataset.Rows = dataset.Columns = 256
            dataset.SamplesPerPixel, dataset.PixelRepresentation = 1, 0
            dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 12, 11
            dataset.WindowCenter, dataset.WindowWidth = 2048, 4096
            dataset.PixelData = (np.asarray(image).astype("<u2") << 4).tobytes()
            dataset.save_as(path, enforce_file_format=True)
        else:
            image.save(path)
        for frame in range(10):
            lines.append(f"images/{path.name},dark,P{number:06},{number % 90},ACME Seer,{frame}")
    (folder / "manifest.csv").write_text("\n".join(lines) + "\n")


def _cpu_seconds() -> float:
    """Of all processes that have ended and were waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def many(count: int, stages: tuple[str, ...] = ("check", "encode")) -> list[dict[str, Any]]:
    """Rows of stages over many images."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        if "manifest" in stages:
            make_mixed(Path(name), count)
        else:
            make_images(Path(name) / "images", count, 48, "png")
        for stage in stages:
            command = [sys.executable, "-P", __file__, "--stage", stage, "--folder", name]
            begun, peak, kept, used = time.perf_counter(), 0, 0, _cpu_seconds()
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
                    "cpu_seconds": _cpu_seconds() - used,
                    "peak_bytes": peak,
                    "peak_bytes_without_files": kept,
                }
            )
    return rows


def digests(count: int) -> list[dict[str, Any]]:
    """Rows of encoding without digests of pixels, and with them."""
    from secure_fed.clients.encoding import encode_all
    from secure_fed.clients.reading import Source
    from secure_fed.model.backbone import load_backbone
    from secure_fed.protocol.study_tables import Backbone

    backbone = load_backbone(Backbone(model="mini-clip", weights="file", file="mini-clip.safetensors"), None)
    least = {False: float("inf"), True: float("inf")}
    with tempfile.TemporaryDirectory() as name:
        make_mixed(Path(name), count)
        sources = [Source(path) for path in sorted((Path(name) / "images").iterdir())]
        for _ in range(5):
            for asked in least:
                begun = time.process_time() + _cpu_seconds()
                assert sum(len(batch) for batch in encode_all(sources, backbone, digests=asked)) == count
                least[asked] = min(least[asked], (time.process_time() + _cpu_seconds() - begun) / count)
    return [{"digests": asked, "images": count, "cpu_seconds_per_image": each} for asked, each in least.items()]


def run_stage(stage: str, folder: Path) -> None:
    """One stage over the folder's images, as ``data check`` and a client's start do it."""
    from secure_fed.clients.data import SiteImage
    from secure_fed.clients.duplicates import exact_copies, fingerprints, inseparable
    from secure_fed.clients.features import FeatureCache
    from secure_fed.model.backbone import load_backbone
    from secure_fed.protocol.study_tables import Backbone

    if stage == "manifest":
        from secure_fed.clients.data import read_data
        from secure_fed.protocol.simulation_table import Shares

        shares = Shares(train=0.6, val=0.2, test=0.2, unlabelled=0)
        found = read_data(folder, ("dark",), "patient", shares, 0, together=None)
        assert len(found) == 10 * len(list((folder / "images").iterdir()))
        return
    images = [SiteImage(path, path.name, 0, "train") for path in sorted((folder / "images").iterdir())]
    with FeatureCache(folder / "features.sqlite") as cache:
        if stage.startswith("check"):
            looks = fingerprints(images, cache).found
            inseparable(images, looks)
            exact_copies(looks)
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
    parser.add_argument("--mixed", type=int, help="so many images as hospitals have them, with ten rows for each")
    parser.add_argument("--digests", type=int, help="so many such images, encoded with digests of pixels and without")
    parser.add_argument("--stage", choices=["manifest", "check", "check again", "encode"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stage:
        run_stage(arguments.stage, arguments.folder)
        return
    if arguments.digests:
        rows = digests(arguments.digests)
        for row in rows:
            what = "with digests" if row["digests"] else "without"
            print(f"{what:12} {1e3 * row['cpu_seconds_per_image']:.2f} ms of a processor for each image")
    elif arguments.images or arguments.mixed:
        mixed = ("manifest", "check", "check again")
        rows = many(arguments.mixed, mixed) if arguments.mixed else many(arguments.images)
        for row in rows:
            print(
                f"{row['stage']:11} {row['images']:,} images in {row['seconds']:.0f} s, "
                f"{row['images_per_s']:.0f} a second, {row['cpu_seconds']:.0f} s of processors, greatest memory "
                f"{row['peak_bytes'] / 2**30:.2f} GiB, {row['peak_bytes_without_files'] / 2**30:.2f} without "
                "libraries' files"
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

"""Head-MRI-like slices from a seeded generator: a small world in which learning is visible.

A phantom is an axial slice of a head (image left is drawn left; x runs to the right, y to the back of the
head, both from -1 to 1 over the outline of the head) at one of three levels, with no tumour or with one of
three kinds of mass that differ in place, shape, margin and texture as gliomas, meningiomas and pituitary
tumours do. They overlap on purpose: some gliomas are solid, some meningiomas cause oedema, small masses
hide. Patients own an anatomy, sites own a scanner. Nothing here comes from a patient.
"""

from __future__ import annotations

import csv
import hashlib
import io
import multiprocessing
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import ndimage

from secure_fed.core.errors import DataError, OutputError, StorageError
from secure_fed.core.processes import die_with
from secure_fed.core.storage import made_folder, make_folder, sync_folder, write_durable

Level = Literal["base", "ventricles", "top"]
Shape = Literal["none", "round", "lobed", "irregular"]
Margin = Literal["none", "sharp", "blurred"]
Texture = Literal["none", "uniform", "ring", "patchy", "dark"]
Contact = Literal["none", "inside", "dura", "falx", "sella"]

CLASSES: tuple[str, ...] = ("no tumour", "glioma", "meningioma", "pituitary tumour")
SIZE = 128
"""Height and width of a phantom in pixels."""
SPLIT_SHARES: Mapping[str, float] = MappingProxyType({"train": 0.60, "val": 0.15, "test": 0.25})
"""Shares of a site's labelled patients, class by class."""

_Array = npt.NDArray[np.floating[Any]]
_Option = TypeVar("_Option")
MANIFEST = "manifest.csv"
_COLUMNS = ("path", "patient", "label", "split")
_LEVELS: tuple[Level, ...] = ("base", "ventricles", "top")


@dataclass(frozen=True)
class PhantomSite:
    """One site to make.

    Attributes:
        name: folder name; also part of the seed.
        patients: number of patients (at least 1), each with one to four slices.
        scanner: which scanner took the pictures, see :func:`scanner_of`.
        class_mix: shares of the patients by class, in the order of ``CLASSES``; any positive scale.
        unlabelled: share of the patients, in [0, 1), whose images carry no label.
        unlabelled_scanner: which scanner took these patients' pictures, if it is another one.
    """

    name: str
    patients: int
    scanner: int
    class_mix: tuple[float, float, float, float]
    unlabelled: float
    unlabelled_scanner: int | None = field(default=None, repr=False)  # the site's seed is made of the others


@dataclass(frozen=True)
class SliceFacts:
    """What is true of one slice before a scanner sees it.

    Attributes:
        label: one of ``CLASSES``.
        level: height of the slice: skull base (orbits, sella, cerebellum), ventricles, or top.
        x: centre of the mass, -1 (left in the picture) to 1; 0 without a mass.
        y: centre of the mass, -1 (front) to 1 (back); 0 without a mass.
        radius: mean radius of the mass, as a share of the head's half length; 0 without a mass.
        shape: outline of the mass.
        margin: how sharply the mass ends.
        texture: how the mass takes up contrast: evenly, as a ring around a dark core, in patches, or not.
        contact: what the mass sits in or on: within the brain, on the dura, on the falx, in the sella.
        oedema: swelling around the mass, 0 (none) to 1.
    """

    label: str
    level: Level
    x: float = 0.0
    y: float = 0.0
    radius: float = 0.0
    shape: Shape = "none"
    margin: Margin = "none"
    texture: Texture = "none"
    contact: Contact = "none"
    oedema: float = 0.0

    @property
    def side(self) -> Literal["left", "right", "midline"]:
        """Side of the picture on which the mass lies."""
        return "midline" if abs(self.x) < 0.12 else ("left" if self.x < 0 else "right")

    @property
    def region(self) -> str:
        """Part of the brain nearest to the mass, in one or two words."""
        if self.contact == "sella":
            return "sella"
        if self.level == "base":
            if self.y > 0.22:
                return "cerebellum"
            return "frontal lobe" if self.y < -0.35 else "temporal lobe"
        if self.y < -0.22:
            return "frontal lobe"
        if self.y > 0.38:
            return "occipital lobe" if self.level == "ventricles" else "parietal lobe"
        return "temporal lobe" if self.level == "ventricles" and abs(self.x) > 0.3 else "parietal lobe"


@dataclass(frozen=True)
class Scanner:
    """How one scanner turns tissue into grey values.

    Attributes:
        kind: contrast: T1 with contrast agent, FLAIR, or T2.
        tissue: signal by tissue name, about 0 to 1.
        gamma: exponent applied to the signal.
        bias: strength of the smooth shading across the picture, as a share of the signal.
        bias_angle: direction of the shading in radians.
        noise: standard deviation of the noise before the magnitude is taken.
        blur: standard deviation of the point spread in pixels.
        tilt: usual rotation of heads in degrees.
        zoom: size of heads in the picture; 1 leaves a small border, 1.15 crops.
        shift: usual offset of heads (x, y) in half pictures.
        floor: grey value of the background, 0 to 1.
    """

    kind: Literal["T1", "FLAIR", "T2"]
    tissue: Mapping[str, float]
    gamma: float
    bias: float
    bias_angle: float
    noise: float
    blur: float
    tilt: float
    zoom: float
    shift: tuple[float, float]
    floor: float


_TISSUES = ("fat", "muscle", "bone", "csf", "grey", "white", "agent", "oedema", "necrosis")
_SIGNAL: dict[str, tuple[float, ...]] = {
    "T1": (0.80, 0.42, 0.07, 0.10, 0.36, 0.46, 0.86, 0.27, 0.15),
    "FLAIR": (0.62, 0.40, 0.08, 0.09, 0.52, 0.44, 0.84, 0.74, 0.24),
    "T2": (0.66, 0.33, 0.06, 0.92, 0.54, 0.38, 0.62, 0.80, 0.88),
}


def scanner_of(seed: int) -> Scanner:
    """The scanner with this seed (0 or more): always the same one."""
    rng = np.random.default_rng([0x5CA7, seed])
    kind: Literal["T1", "FLAIR", "T2"] = ("T1", "T1", "T1", "T1", "T1", "FLAIR", "FLAIR", "T2")[rng.integers(8)]
    jitter = np.exp(rng.normal(0.0, 0.10, len(_TISSUES)))
    tissue = {name: float(s * j) for name, s, j in zip(_TISSUES, _SIGNAL[kind], jitter, strict=True)}
    # The contrast between grey and white matter is what scanners differ in most visibly.
    middle = (tissue["grey"] + tissue["white"]) / 2
    spread = rng.uniform(0.5, 1.6)
    for name in ("grey", "white"):
        tissue[name] = middle + spread * (tissue[name] - middle)
    # Agent uptake between faint and glaring, so that brightness alone does not tell a mass at every site.
    tissue["agent"] = middle + rng.uniform(0.45, 1.1) * (tissue["agent"] - middle)
    return Scanner(
        kind=kind,
        tissue=MappingProxyType(tissue),
        gamma=float(np.exp(rng.normal(0.0, 0.22))),
        bias=float(rng.uniform(0.05, 0.45)),
        bias_angle=float(rng.uniform(0, 2 * np.pi)),
        noise=float(rng.uniform(0.006, 0.04)),
        blur=float(rng.uniform(0.3, 1.2)),
        tilt=float(rng.normal(0.0, 7.0)),
        zoom=float(rng.uniform(0.82, 1.12)),
        shift=(float(rng.normal(0.0, 0.04)), float(rng.normal(0.0, 0.05))),
        floor=float(rng.choice([0.0, 0.0, 0.0, 0.03, 0.08])),
    )


def draw_facts(label: str, rng: np.random.Generator) -> SliceFacts:
    """Draw what a slice through a typical head of class ``label`` shows.

    Raises:
        DataError: ``label`` is not one of ``CLASSES``.
    """
    if label == "no tumour":
        return SliceFacts(label, _pick(rng, _LEVELS, (0.4, 0.4, 0.2)))
    if label == "glioma":
        return _draw_glioma(rng)
    if label == "meningioma":
        return _draw_meningioma(rng)
    if label == "pituitary tumour":
        return SliceFacts(
            label,
            "base",
            x=float(rng.normal(0.0, 0.03)),
            y=float(rng.normal(-0.20, 0.03)),
            radius=float(rng.uniform(0.055, 0.17)),
            shape=_pick(rng, ("round", "lobed"), (0.6, 0.4)),
            margin="sharp",
            texture=_pick(rng, ("uniform", "patchy", "ring"), (0.7, 0.2, 0.1)),
            contact="sella",
        )
    raise DataError(f"{label!r} is no class of the phantoms; expected one of {', '.join(CLASSES)}")


def _draw_glioma(rng: np.random.Generator) -> SliceFacts:
    level = _pick(rng, _LEVELS, (0.25, 0.5, 0.25))
    side = 1 if rng.random() < 0.5 else -1
    if level == "base":
        x, y = _pick(rng, ((0.44, -0.08), (0.26, 0.50)), (0.7, 0.3))
        x, y = x + rng.normal(0, 0.05), y + rng.normal(0, 0.06)
    else:
        distance, angle = rng.uniform(0.22, 0.52), rng.uniform(-1.25, 1.25)
        x, y = 0.85 * distance * np.cos(angle), distance * np.sin(angle) * 1.15
    return SliceFacts(
        "glioma",
        level,
        x=float(side * x),
        y=float(y),
        radius=float(rng.uniform(0.10, 0.17 if level == "base" else 0.26)),
        shape=_pick(rng, ("irregular", "lobed"), (0.8, 0.2)),
        margin=_pick(rng, ("blurred", "sharp"), (0.75, 0.25)),
        texture=_pick(rng, ("ring", "patchy", "dark", "uniform"), (0.5, 0.2, 0.2, 0.1)),
        contact="inside",
        oedema=float(rng.uniform(0.3, 1.0)) if rng.random() < 0.8 else 0.0,
    )


def _draw_meningioma(rng: np.random.Generator) -> SliceFacts:
    level = _pick(rng, _LEVELS, (0.3, 0.4, 0.3))
    radius = float(rng.uniform(0.09, 0.24))
    if level != "base" and rng.random() < 0.2:
        contact: Contact = "falx"
        x = (0.6 * radius) * (1 if rng.random() < 0.5 else -1)
        y = _pick(rng, (-0.5, 0.5), (0.6, 0.4)) + rng.normal(0, 0.08)
    elif level == "base" and rng.random() < 0.2:
        # In front of the sella: the one that is taken for a pituitary tumour.
        contact, radius = "dura", 0.7 * radius
        x, y = rng.normal(0.0, 0.06), rng.normal(-0.42, 0.04)
    else:
        contact = "dura"
        angle = rng.uniform(-0.25, 0.35) if level == "base" else rng.uniform(-1.35, 1.35)
        inset = 0.83 - 0.62 * radius
        x = 0.80 * inset * np.cos(angle) * (1 if rng.random() < 0.5 else -1)
        y = inset * np.sin(angle)
    return SliceFacts(
        "meningioma",
        level,
        x=float(x),
        y=float(y),
        radius=radius,
        shape=_pick(rng, ("round", "lobed"), (0.75, 0.25)),
        margin=_pick(rng, ("sharp", "blurred"), (0.9, 0.1)),
        texture=_pick(rng, ("uniform", "patchy", "ring"), (0.8, 0.15, 0.05)),
        contact=contact,
        oedema=float(rng.uniform(0.2, 0.7)) if rng.random() < 0.3 else 0.0,
    )


def render_slice(facts: SliceFacts, scanner: Scanner, patient: int, position: int = 0) -> npt.NDArray[np.uint8]:
    """Draw one slice as a scanner shows it.

    Args:
        facts: what the slice shows.
        scanner: who looks.
        patient: seed of the anatomy (0 or more): shape of the head, ventricles, outline of the mass.
        position: number of the slice in the patient (0 or more): its own folds, pose and noise.

    Returns:
        Grey values, ``(SIZE, SIZE)`` uint8. A function of the arguments alone.
    """
    person = np.random.default_rng([0xB0D1, patient])
    here = np.random.default_rng([0x511C, patient, position])
    x, y = _pose(scanner, person, here)
    fold = _folds(x, y, person, here)
    signal = _head(x, y, facts, scanner, person, fold)
    return _acquire(signal, scanner, here)


def lesion_mask(facts: SliceFacts, scanner: Scanner, patient: int, position: int = 0) -> npt.NDArray[np.bool_]:
    """Where the mass of a slice is, swelling around it apart, bool ``(SIZE, SIZE)``; arguments as for
    :func:`render_slice`."""
    if not facts.radius:
        return np.zeros((SIZE, SIZE), dtype=bool)
    person = np.random.default_rng([0xB0D1, patient])
    here = np.random.default_rng([0x511C, patient, position])
    x, y = _pose(scanner, person, here)
    _folds(x, y, person, here)  # draws before the outline does
    within = np.hypot(x / _HALF_WIDTH, y) < _BRAIN_EDGE + 0.01
    inside = _mass_outline(x, y, facts, person) < 0
    return np.asarray(inside & (within | (facts.contact == "sella")))


def make_phantoms(root: Path, sites: Sequence[PhantomSite], seed: int, *, masks: bool = False) -> None:
    """Write ``root/SITE/images/*.png`` and ``root/SITE/manifest.csv`` for every site.

    The manifest has the header ``path,patient,label,split``: path relative to the site's folder; label empty and split
    ``unlabelled`` for patients without a label, else ``train``, ``val`` or ``test``. Patients, never images, are
    assigned to splits, class by class. The same (seed, site) gives the same files, whatever the other sites are. With
    ``masks`` also ``root/SITE/masks/*.png``, white where the mass is, and their paths in a column ``mask``.

    A site's folder gets its name once all of it is there. Until then it is ``root/.SITE.drawing``; what a kill left
    under that name is the only thing that is ever removed.

    Raises:
        DataError: a site's parameters make no sense, or two sites share a name.
        OutputError: a site's folder already exists and is not empty.
        StorageError: the files cannot be written, or a process that draws was killed.
    """
    for site in sites:
        _check(site)
    names = [site.name for site in sites]
    if len(set(names)) != len(names):
        raise DataError(f"sites {', '.join(names)}: expected every name once; rename the repeated ones")
    for site in sites:
        folder = root / site.name
        if folder.exists() and any(folder.iterdir()):
            raise OutputError(
                f"{folder} is not empty, and may be somebody's; expected no such folder, or an empty one: it is left "
                "as it is, choose another place for the phantoms"
            )
    with ExitStack() as stack:
        stack.enter_context(made_folder(root))
        for site in sites:
            shutil.rmtree(_drawing(root, site.name), ignore_errors=True)
        for site in sites:
            stack.enter_context(made_folder(_drawing(root, site.name)))  # of a study that cannot be whole nothing stays
        _make_sites(root, sites, seed, masks)
        for site in sites:
            os.replace(_drawing(root, site.name), root / site.name)
        sync_folder(root)


_DRAWN = re.compile(r"\..+\.drawing")


def _drawing(root: Path, name: str) -> Path:
    return root / f".{name}.drawing"


def _patient(site: str, number: int) -> str:
    return f"{site}-{number:04d}"


def _image(number: int, position: int) -> str:
    return f"images/{number:04d}_{position}.png"


def are_phantoms(folder: Path) -> bool:
    """Whether a folder holds what :func:`make_phantoms` made of a site of its name; by its manifest's first row."""
    try:
        with (folder / MANIFEST).open(encoding="utf-8") as stream:
            head, first = stream.readline(), stream.readline()
    except (OSError, UnicodeDecodeError):
        return False
    return head.startswith(",".join(_COLUMNS)) and first.startswith(f"{_image(0, 0)},{_patient(folder.name, 0)},")


def refuse_others(root: Path) -> None:
    """Check that nothing lies in a folder but phantoms: among other images they would be taken for such.

    Raises:
        OutputError: something does, or it is a file.
    """
    if root.exists() and not root.is_dir():
        raise OutputError(f"{root}: a file; expected a folder for the phantoms, which is made if it is not there")
    found = root.iterdir() if root.exists() else ()
    others = sorted(path.name for path in found if not (are_phantoms(path) or _DRAWN.fullmatch(path.name)))
    if others:
        raise OutputError(
            f"{root}: holds {others[0]}{f' and {len(others) - 1} more' if len(others) > 1 else ''}, which no phantoms "
            "are; expected a new folder or an empty one, so that nobody takes phantoms for others' images: choose "
            "another"
        )


def _make_sites(root: Path, sites: Sequence[PhantomSite], seed: int, masks: bool) -> None:
    longest_first = sorted(sites, key=lambda site: -site.patients)
    work = partial(_make_site, root, seed, masks)
    workers = min(len(sites), len(os.sched_getaffinity(0)))
    if workers < 2 or multiprocessing.current_process().daemon:  # a daemon may have no children
        for site in longest_first:
            work(site)
        return
    context = multiprocessing.get_context("fork")  # which has loaded all it needs
    try:
        with ProcessPoolExecutor(workers, context, initializer=die_with, initargs=(os.getpid(),)) as pool:
            for _ in pool.map(work, longest_first):
                pass
    except BrokenProcessPool as error:
        raise StorageError(
            f"{root}: a process that draws phantoms was ended, most likely for want of memory; expected enough for "
            f"{workers} at once: free some, remove the folder and run again"
        ) from error


def default_sites(count: int) -> list[PhantomSite]:
    """``count`` (at least 1) sites of unequal size, each with its own scanner and a class it rarely sees.

    Raises:
        DataError: ``count`` is below 1.
    """
    if count < 1:
        raise DataError(f"{count} phantom sites asked for; expected at least 1")
    sites = []
    for index in range(count):
        mix = [0.30, 0.30, 0.30, 0.30]
        mix[(index + 1) % len(CLASSES)] = 0.06
        sites.append(
            PhantomSite(
                name=f"site_{index}",
                patients=(120, 80, 100, 60)[index % 4],
                scanner=index,
                class_mix=(mix[0], mix[1], mix[2], mix[3]),
                unlabelled=0.25,
            )
        )
    return sites


# Sites ------------------------------------------------------------------------------------------------------


def _check(site: PhantomSite) -> None:
    if not site.name or Path(site.name).name != site.name or site.name in {".", ".."}:
        raise DataError(f"site name {site.name!r}: expected a plain folder name")
    scanners = [site.scanner] if site.unlabelled_scanner is None else [site.scanner, site.unlabelled_scanner]
    if site.patients < 1 or min(scanners) < 0 or not 0 <= site.unlabelled < 1:
        raise DataError(
            f"site {site.name}: {site.patients} patients, scanner {min(scanners)}, share without label "
            f"{site.unlabelled}; expected at least 1, at least 0 and a share in [0, 1)"
        )
    if len(site.class_mix) != len(CLASSES) or min(site.class_mix) < 0 or not 0 < sum(site.class_mix) < np.inf:
        raise DataError(
            f"site {site.name}: class mix {site.class_mix}; expected {len(CLASSES)} shares, none negative, not all zero"
        )


def _make_site(root: Path, seed: int, masks: bool, site: PhantomSite) -> None:
    folder = _drawing(root, site.name)
    digest = hashlib.sha256(repr((seed, site)).encode()).digest()
    rng = np.random.default_rng(np.frombuffer(digest, dtype=np.uint32))
    labels = np.repeat(CLASSES, _apportion(site.patients, site.class_mix))
    rng.shuffle(labels)
    splits = _split(labels, site.unlabelled, rng)
    scanner = scanner_of(site.scanner)
    other = scanner if site.unlabelled_scanner is None else scanner_of(site.unlabelled_scanner)
    make_folder(folder / "images")
    if masks:
        make_folder(folder / "masks")
    rows = []
    for number, (label, split) in enumerate(zip(labels.tolist(), splits, strict=True)):
        patient = _patient(site.name, number)
        anatomy = int(rng.integers(2**62))
        centre = draw_facts(label, rng)
        for position in range(int(rng.integers(1, 5))):
            facts = _neighbour(centre, position, rng)
            name = _image(number, position)
            taken_by = other if split == "unlabelled" else scanner
            _save(render_slice(facts, taken_by, anatomy, position), folder / name)
            row = [name, patient, "" if split == "unlabelled" else label, split]
            if masks:
                row.append(name.replace("images/", "masks/"))
                _save(lesion_mask(facts, taken_by, anatomy, position).astype(np.uint8) * 255, folder / row[-1])
            rows.append(row)
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow([*_COLUMNS, *["mask"] * masks])
    writer.writerows(rows)
    write_durable(folder / MANIFEST, table.getvalue().encode())


def _save(picture: npt.NDArray[np.uint8], path: Path) -> None:
    """Write a picture; a disk that is full leaves none rather than half of it.

    Not durable, which would take long for so many.
    """
    content = io.BytesIO()
    Image.fromarray(picture).save(content, "PNG", compress_level=1)
    try:
        path.write_bytes(content.getbuffer())
    except OSError as error:
        path.unlink(missing_ok=True)
        raise StorageError(
            f"{path}: not written ({error.strerror}); expected room for all phantoms: free some space, or choose "
            "another place, and run the same command again"
        ) from error


def _neighbour(centre: SliceFacts, position: int, rng: np.random.Generator) -> SliceFacts:
    """Facts of a patient's slice ``position``: the mass shrinks away from its centre."""
    if position == 0:
        return centre
    if centre.label == "no tumour":
        return draw_facts(centre.label, rng)
    shrink = float(rng.uniform(0.7, 1.0))
    # A smaller mass on the dura has its centre nearer to the dura.
    outward = 1 + 0.5 * (1 - shrink) * centre.radius if centre.contact == "dura" else 1.0
    return replace(centre, radius=centre.radius * shrink, x=centre.x * outward, y=centre.y * outward)


def _apportion(total: int, shares: Sequence[float]) -> npt.NDArray[np.intp]:
    """Whole numbers with the sum ``total``, as near to the shares as they get (largest remainders)."""
    exact = total * np.asarray(shares, dtype=np.float64) / sum(shares)
    counts = np.floor(exact + 1e-9).astype(np.intp)
    order = np.argsort(counts - exact, kind="stable")
    counts[order[: total - int(counts.sum())]] += 1
    return counts


def _split(labels: npt.NDArray[np.str_], unlabelled: float, rng: np.random.Generator) -> list[str]:
    splits = np.full(len(labels), "unlabelled", dtype=object)
    for label in CLASSES:
        members = rng.permutation(np.flatnonzero(labels == label))
        known = members[: len(members) - round(unlabelled * len(members))]
        counts = _apportion(len(known), list(SPLIT_SHARES.values()))
        splits[known] = np.repeat(list(SPLIT_SHARES), counts)
    return [str(split) for split in splits]


# Anatomy ----------------------------------------------------------------------------------------------------


def _pick(rng: np.random.Generator, options: Sequence[_Option], shares: Sequence[float]) -> _Option:
    return options[int(rng.choice(len(options), p=shares))]


_AXIS = (np.arange(SIZE, dtype=np.float32) + 0.5) * np.float32(2 / SIZE) - 1
_FREQUENCY = np.hypot(np.fft.fftfreq(SIZE)[:, None], np.fft.rfftfreq(SIZE)[None, :]) * SIZE
_HALF_WIDTH = 0.80
_BRAIN_EDGE = 0.84
_PIXEL = 0.03
"""Width of a soft edge in head units: about two pixels."""


def _band(rng: np.random.Generator, cycles: float, width: float) -> _Array:
    """Noise of unit variance with ``cycles`` waves across the picture, give or take ``width``."""
    window = np.exp(-0.5 * ((_FREQUENCY - cycles) / width) ** 2)
    noise = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((SIZE, SIZE), dtype=np.float32)) * window)
    return np.asarray(noise / noise.std(), dtype=np.float32)


def _inside(distance: _Array, edge: float = _PIXEL) -> _Array:
    """1 where ``distance`` is negative, 0 where positive, a ramp of width ``edge`` between."""
    mask: _Array = np.clip(0.5 - distance / np.float32(edge), 0, 1)
    return mask


def _blend(signal: _Array, mask: _Array, value: float | _Array) -> None:
    signal += mask * (value - signal)


def _ellipse(x: _Array, y: _Array, cx: float, cy: float, rx: float, ry: float) -> _Array:
    """Signed distance to an ellipse, good enough near its edge."""
    distance: _Array = (np.hypot((x - cx) / rx, (y - cy) / ry) - 1) * min(rx, ry)
    return distance


def _stroke(x: _Array, y: _Array, start: tuple[float, float], end: tuple[float, float], width: float) -> _Array:
    """Signed distance to a thick line from ``start`` to ``end``."""
    dx, dy = end[0] - start[0], end[1] - start[1]
    along = np.clip(((x - start[0]) * dx + (y - start[1]) * dy) / (dx * dx + dy * dy), 0, 1)
    distance: _Array = np.hypot(x - start[0] - along * dx, y - start[1] - along * dy) - width
    return distance


def _pose(scanner: Scanner, person: np.random.Generator, here: np.random.Generator) -> tuple[_Array, _Array]:
    """Head coordinates of every pixel: pose, proportions and a gentle warp that is the person's own."""
    turn = np.deg2rad(scanner.tilt + person.normal(0, 3) + here.normal(0, 1.5))
    zoom = 0.88 * scanner.zoom * person.uniform(0.95, 1.04)
    left = scanner.shift[0] + here.normal(0, 0.01)
    down = scanner.shift[1] + here.normal(0, 0.01)
    px, py = (_AXIS[None, :] - np.float32(left)), (_AXIS[:, None] - np.float32(down))
    cosine, sine = np.cos(turn) / zoom, np.sin(turn) / zoom
    x = np.asarray(px * cosine + py * sine, dtype=np.float32) * np.float32(person.uniform(0.93, 1.07))
    y = np.asarray(py * cosine - px * sine, dtype=np.float32)
    phase = person.uniform(0, 2 * np.pi, 4).astype(np.float32)
    size = (person.uniform(0.004, 0.018, 4) * (1.0, 0.6, 1.0, 0.6)).astype(np.float32)
    wx = x + size[0] * np.sin(4 * y + phase[0]) + size[1] * np.sin(7 * y + 3 * x + phase[1])
    wy = y + size[2] * np.sin(4 * x + phase[2]) + size[3] * np.sin(7 * x - 3 * y + phase[3])
    return np.asarray(wx, dtype=np.float32), np.asarray(wy, dtype=np.float32)


def _folds(x: _Array, y: _Array, person: np.random.Generator, here: np.random.Generator) -> _Array:
    """Labyrinth whose zero lines are the sulci: shared by a patient's slices in part."""
    flat = (_band(person, 14.0, 3.0) + 0.6 * _band(here, 14.0, 3.0)) / np.float32(np.hypot(1, 0.6))
    # Wound around the head, so that sulci mostly run inwards from the surface.
    turn = np.arctan2(y, x) * np.float32(SIZE / (2 * np.pi))
    inward = np.hypot(x / _HALF_WIDTH, y) * np.float32(0.24 * SIZE)
    wound = ndimage.map_coordinates(flat, np.stack([turn, inward]), order=1, mode="grid-wrap")
    return np.asarray(wound, dtype=np.float32)


def _head(
    x: _Array, y: _Array, facts: SliceFacts, scanner: Scanner, person: np.random.Generator, fold: _Array
) -> _Array:
    """Signal of the head before the scanner's own faults."""
    t = scanner.tissue
    outline = _mass_outline(x, y, facts, person) if facts.radius else None
    if outline is not None:
        # Mass effect: tissue beside the mass is tissue pushed out from where the mass now is.
        push = 0.45 * np.exp(-np.square(np.maximum(outline, 0) / (0.8 * facts.radius)))
        push = push if facts.contact != "sella" else 0.3 * push
        bx, by = x - push * (x - facts.x), y - push * (y - facts.y)
    else:
        bx, by = x, y
    r = np.hypot(x / _HALF_WIDTH, y)
    thickness = person.uniform(0.8, 1.25)
    skull = 1 - 0.055 * thickness
    signal: _Array = np.zeros_like(r)
    _blend(signal, _inside(r - 1), t["fat"])
    _blend(signal, _inside(r - skull), t["bone"])
    marrow = 0.5 * (skull + _BRAIN_EDGE) + 0.01
    _blend(signal, 0.35 * _inside(np.abs(r - marrow) - 0.012), t["fat"])
    _blend(signal, _inside(r - _BRAIN_EDGE - 0.02), t["csf"])
    depth = _BRAIN_EDGE - r
    brain = _inside(-depth)
    tissue = _tissue(bx, by, depth, facts.level, scanner, person, fold)
    _blend(signal, brain, tissue)
    if facts.level == "base":
        _skull_base(signal, x, y, t, person)
    if outline is not None:
        _mass(signal, x, y, outline, r, facts, t, person)
    return signal


def _tissue(
    x: _Array,
    y: _Array,
    depth: _Array,
    level: Level,
    scanner: Scanner,
    person: np.random.Generator,
    fold: _Array,
) -> _Array:
    """Brain without a mass: cortex, white matter, cisterns, ventricles, deep nuclei."""
    t = scanner.tissue
    ax = np.abs(x)
    atrophy = person.uniform(0.6, 1.5)
    reach = {"base": 0.24, "ventricles": 0.30, "top": 0.42}[level]
    fade = np.clip(1.15 - depth / np.float32(reach), 0, 1)
    signal = np.full_like(x, t["white"])
    cortex = np.maximum(_inside(depth - 0.055, 0.04), _inside(np.abs(fold) - 0.75, 0.4) * fade)
    if level == "base":
        # Cerebellum: leaves that run along with its outline.
        back = _ellipse(ax, y, 0.24, 0.52, 0.30, 0.26)
        leaves = 0.5 + 0.5 * np.sin(back * 70 + 2 * fold)
        cortex = np.where(back < 0, 0.35 + 0.55 * leaves, cortex)
    _blend(signal, cortex, t["grey"])
    gap = _inside(np.abs(fold) - 0.22 * atrophy, 0.25) * fade * np.float32(0.85)
    _blend(signal, gap * (y < 0.26) if level == "base" else gap, t["csf"])
    if level == "top":
        _blend(signal, _inside(ax - 0.012 * atrophy, 0.025), t["csf"])
    elif level == "ventricles":
        fissure = np.maximum(_inside(y + 0.36), _inside(0.46 - y))
        _blend(signal, fissure * _inside(ax - 0.012 * atrophy, 0.025), t["csf"])
        _blend(signal, _inside(_stroke(ax, y, (0.42, -0.14), (0.62, -0.02), 0.014 * atrophy)), t["csf"])
        for cx, cy, rx, ry in (
            (0.12, 0.06, 0.09, 0.12),
            (0.26, -0.06, 0.06, 0.15),
            (0.11, -0.19, 0.05, 0.08),
        ):
            _blend(signal, 0.85 * _inside(_ellipse(ax, y, cx, cy, rx, ry), 0.05), t["grey"])
        wide = person.uniform(0.016, 0.055)
        horns = np.minimum(
            _stroke(ax, y, (0.045, -0.08), (0.11, -0.27), wide),
            _stroke(ax, y, (0.17, 0.19), (0.23, 0.36), 1.2 * wide),
        )
        _blend(signal, _inside(horns), t["csf"])
        _blend(signal, _inside(_stroke(x, y, (0.0, 0.0), (0.0, 0.13), 0.35 * wide), 0.025), t["csf"])
        if scanner.kind == "T1":
            # Plexus and straight sinus take up agent in healthy heads too.
            _blend(signal, 0.5 * _inside(_ellipse(ax, y, 0.19, 0.25, 0.022, 0.04)), t["agent"])
    else:
        _cisterns(signal, x, y, t, person)
    if scanner.kind == "T1":
        sinus = _ellipse(x, y, 0.0, _BRAIN_EDGE - 0.02, 0.035, 0.03)
        _blend(signal, np.float32(person.uniform(0.2, 0.9)) * _inside(sinus), t["agent"])
    return signal


def _cisterns(signal: _Array, x: _Array, y: _Array, t: Mapping[str, float], person: np.random.Generator) -> None:
    """Brainstem in its cisterns, Sylvian fissures, fourth ventricle and vessels at the base."""
    ax = np.abs(x)
    _blend(signal, _inside(_stroke(ax, y, (0.05, -0.20), (0.42, -0.30), 0.020)), t["csf"])
    _blend(signal, _inside(_ellipse(x, y, 0.0, -0.17, 0.14, 0.11), 0.05), t["csf"])
    _blend(signal, _inside(_ellipse(x, y, 0.0, 0.10, 0.21, 0.17)), t["csf"])
    stem = _ellipse(x, y, 0.0, 0.09, 0.165, 0.125)
    _blend(signal, _inside(stem), 0.8 * t["white"] + 0.2 * t["grey"])
    _blend(signal, _inside(_ellipse(x, y, 0.0, 0.275, 0.06, 0.035)), t["csf"])
    _blend(signal, _inside(np.abs(x) - 0.01, 0.025) * _inside(y + 0.36), t["csf"])
    flow = t["agent"] if person.random() < 0.6 else t["bone"]
    _blend(signal, 0.8 * _inside(_ellipse(ax, y, 0.115, -0.19, 0.022, 0.022)), flow)
    _blend(signal, 0.6 * _inside(_ellipse(x, y, 0.0, -0.05, 0.018, 0.018)), flow)
    stalk = person.uniform(0.012, 0.028)
    _blend(signal, 0.7 * _inside(_ellipse(x, y, 0.0, -0.18, stalk, stalk)), t["agent"])


def _skull_base(signal: _Array, x: _Array, y: _Array, t: Mapping[str, float], person: np.random.Generator) -> None:
    """Orbits with eyes, sinuses between them, petrous bones."""
    ax = np.abs(x)
    low = person.uniform(-0.03, 0.05)
    _blend(signal, _inside(_stroke(ax, y, (0.30, -0.72 + low), (0.16, -0.46 + low), 0.11)), t["fat"])
    _blend(signal, _inside(_ellipse(ax, y, 0.31, -0.76 + low, 0.12, 0.12)), 0.7 * t["csf"] + 0.3 * t["muscle"])
    _blend(signal, _inside(_stroke(ax, y, (0.30, -0.64 + low), (0.17, -0.45 + low), 0.022)), t["muscle"])
    _blend(signal, _inside(_stroke(x, y, (0.0, -0.85), (0.0, -0.56 + low), 0.085), 0.05), t["bone"])
    cells = _inside(np.abs(ax - 0.04) - 0.012) * _inside(np.abs(y + 0.73) - 0.15 - low)
    _blend(signal, cells, t["muscle"])
    petrous = _stroke(ax, y, (0.66, 0.24), (0.26, 0.12), 0.055)
    _blend(signal, 0.85 * _inside(petrous, 0.05), t["bone"])


# The mass ---------------------------------------------------------------------------------------------------


def _mass_outline(x: _Array, y: _Array, facts: SliceFacts, person: np.random.Generator) -> _Array:
    """Signed distance to the outline of the mass: smooth, lobed or irregular."""
    dx, dy = x - np.float32(facts.x), y - np.float32(facts.y)
    theta = np.arctan2(dy, dx)
    stretch, lean = person.uniform(0.0, 0.14), person.uniform(0, np.pi)
    swell = stretch * np.cos(2 * (theta - lean))
    phase = person.uniform(0, 2 * np.pi, 5).tolist()
    size = {"round": 0.015, "lobed": 0.13, "irregular": 0.15}.get(facts.shape, 0.0)
    for order, angle in zip((3, 4, 5, 7, 9), phase, strict=True):
        scale = size * person.uniform(0.4, 1.0) * min(1.0, 4.0 / order) ** 2
        swell = swell + scale * np.sin(order * theta + angle)
    distance = np.hypot(dx, dy) - np.float32(facts.radius) * (1 + swell)
    if facts.shape == "irregular":
        distance = distance + 0.18 * facts.radius * _band(person, 9.0, 3.0)
    return np.asarray(distance, dtype=np.float32)


def _mass(
    signal: _Array,
    x: _Array,
    y: _Array,
    outline: _Array,
    r: _Array,
    facts: SliceFacts,
    t: Mapping[str, float],
    person: np.random.Generator,
) -> None:
    """Swelling, body and, on the dura, cleft and tail of the mass."""
    within = _inside(r - _BRAIN_EDGE - 0.01)
    radius = facts.radius
    patches = _band(person, 9.0, 3.0)
    if facts.oedema:
        # Fingers: swelling follows white matter, hence the uneven edge.
        reach = outline + 0.10 * patches * facts.oedema - 0.22 * facts.oedema
        _blend(signal, 0.8 * _inside(reach, 0.12) * within, t["oedema"])
    if facts.contact in ("dura", "falx"):
        cleft = _inside(np.abs(outline - 0.015) - 0.012) * within
        _blend(signal, 0.7 * cleft, t["csf"])
    edge = _PIXEL if facts.margin == "sharp" else 0.6 * radius
    body = _inside(outline, edge) * (within if facts.contact != "sella" else 1.0)
    uptake = t["agent"] * person.uniform(0.80, 1.0)
    plain = 0.5 * (t["grey"] + t["white"])
    if facts.texture == "uniform":
        value: float | _Array = uptake * (1 + 0.04 * patches)
    elif facts.texture == "patchy":
        value = plain + (uptake - plain) * np.clip(0.45 + 0.5 * patches, 0, 1)
    elif facts.texture == "ring":
        rim = person.uniform(0.22, 0.42) * radius
        core = _inside(outline + rim + 0.15 * radius * patches)
        value = np.asarray(uptake * (1 + 0.08 * patches) * (1 - core) + t["necrosis"] * core, dtype=np.float32)
    else:
        value = t["oedema"] * (0.85 + 0.1 * patches)
    _blend(signal, body, value)
    if facts.contact == "dura" and facts.label == "meningioma":
        near = _inside(np.hypot(x - facts.x, y - facts.y) - 1.55 * radius, 0.1)
        tail = _inside(np.abs(r - _BRAIN_EDGE) - 0.014)
        _blend(signal, 0.8 * near * tail, uptake)


# The scanner ------------------------------------------------------------------------------------------------


def _acquire(signal: _Array, scanner: Scanner, here: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Point spread, shading, noise of a magnitude picture, window."""
    px, py = _AXIS[None, :], _AXIS[:, None]
    ramp = px * np.cos(scanner.bias_angle) + py * np.sin(scanner.bias_angle)
    shade = np.exp(scanner.bias * (ramp - 0.35 * (px**2 + py**2)))
    picture = ndimage.gaussian_filter(signal, scanner.blur, mode="constant", truncate=3.0)
    picture = np.maximum(picture, 0) ** np.float32(scanner.gamma) * shade.astype(np.float32)
    noise = here.standard_normal((2, SIZE, SIZE), dtype=np.float32) * np.float32(scanner.noise)
    picture = np.hypot(picture + noise[0], noise[1])
    top = np.float32(np.quantile(picture, 0.995))
    picture = scanner.floor + (1 - scanner.floor) * np.clip(picture / top, 0, 1)
    levels: npt.NDArray[np.uint8] = np.rint(255 * picture).astype(np.uint8)
    return levels

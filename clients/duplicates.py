"""Which images are copies of one another: exactly, by their pixels, or nearly, by a perceptual hash."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import imagehash
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from secure_fed.clients.data import SiteImage
from secure_fed.clients.decoding import Decoded, decode_all, digest_of_pixels, identities
from secure_fed.clients.features import FeatureCache, Progress
from secure_fed.clients.rules import Facts, Picture, Rules

HASH_BITS = 256
NEAR_BITS = 16
"""Two images whose perceptual hashes differ in at most so many of ``HASH_BITS`` bits are near twins."""

FEW_LEVELS = 8
"""A picture of so few grey levels, but not of one, is told: segmentations are seldom stored as such."""

MOST_TOGETHER = 0.1
ALWAYS_TOGETHER = 10

_SIDE = 16  # of the hash, squared its bits
_LOOKED_AT = 4 * _SIDE  # a picture's side, of which the hash is taken
_BATCH = 256
_PLAIN = Rules()
_NO_FACTS = Facts()
_LEVELS = np.arange(256)
_BLOCK = 2048


class Fingerprint(NamedTuple):
    """What is kept of an image's content, to find its copies and what is odd about it.

    Attributes:
        pixels: SHA-256 of size and pixels as RGB: equal exactly for equal pictures, whatever the file format.
        look: 256-bit perceptual hash (the low frequencies of the picture in grey, each above or below their median).
        width: in pixels.
        height: in pixels.
        mean: of the grey values, 0 to 255.
        contrast: standard deviation of the grey values.
        colour: mean distance of the colours from grey, 0 to 255.
        facts: what the file says of it.
    """

    pixels: bytes
    look: bytes
    width: int
    height: int
    mean: float = 0.0
    contrast: float = 0.0
    colour: float = 0.0
    facts: Facts = Facts()

    def to_bytes(self) -> bytes:
        """As the cache keeps it."""
        numbers = _FORM.pack(self.pixels, self.look, self.width, self.height, self.mean, self.contrast, self.colour)
        return numbers + json.dumps(self.facts).encode()

    @classmethod
    def from_bytes(cls, content: bytes) -> Fingerprint:
        """Inverse of :meth:`to_bytes`."""
        modality, scanner, kind, notes = json.loads(content[_FORM.size :])
        facts = Facts(modality, scanner, kind, tuple(notes))
        pixels, look, width, height, mean, contrast, colour = _FORM.unpack(content[: _FORM.size])
        return cls(pixels, look, width, height, mean, contrast, colour, facts)


_FORM = struct.Struct(f"<32s{HASH_BITS // 8}sIIfff")


def fingerprint(image: Image.Image, facts: Facts = _NO_FACTS) -> Fingerprint:
    """The fingerprint of a decoded image."""
    colours = image if image.mode in ("L", "RGB") else image.convert("RGB")
    grey = colours.convert("L")
    digest = digest_of_pixels(colours)
    # In two steps, which takes a third of the time: the hash is of lower frequencies than either step changes.
    small = grey.resize((_LOOKED_AT, _LOOKED_AT), Image.Resampling.LANCZOS, reducing_gap=2.0)
    look = np.packbits(imagehash.phash(small, hash_size=_SIDE).hash.flatten()).tobytes()
    counts = np.array(grey.histogram()) / (image.width * image.height)
    if 1 < np.count_nonzero(counts) <= FEW_LEVELS:
        note = f"at most {FEW_LEVELS} grey levels, as masks, labels and drawings have"
        facts = facts._replace(notes=(*facts.notes, note))
    mean = float(counts @ _LEVELS)
    contrast = math.sqrt(float(counts @ (_LEVELS - mean) ** 2))
    spread = 0.0
    if colours.mode == "RGB":
        coarse = np.asarray(colours.reduce(max(1, min(image.size) // 64)), dtype=np.int16)
        spread = float((coarse.max(axis=2) - coarse.min(axis=2)).mean())
    return Fingerprint(digest, look, *image.size, mean, contrast, spread, facts)


class Fingerprints(NamedTuple):
    """Fingerprints of a list of images, in its order; None for what cannot be decoded, and why by index."""

    found: list[Fingerprint | None]
    unreadable: dict[int, str]


def fingerprints(
    images: Sequence[SiteImage], cache: FeatureCache, progress: Progress | None = None, rules: Rules = _PLAIN
) -> Fingerprints:
    """The fingerprints of images, from the cache or, decoded in other processes, computed and cached.

    Args:
        images: of the site.
        cache: keeps them by the image's identity; interrupted, all but the last batch is there the next time.
        progress: told the number of images done and of all.
        rules: how pictures are to be seen.

    Raises:
        StorageError: the cache cannot be used.
    """
    found: list[Fingerprint | None] = [None] * len(images)
    unreadable: dict[int, str] = {}
    missing: list[int] = []
    if not cache.has_looks(rules):  # then there is no need to read every file here first
        missing = list(range(len(images)))
    for index, known_as in enumerate([] if missing else identities(image.source for image in images)):
        if isinstance(known_as, OSError):
            unreadable[index] = str(known_as.strerror)
        elif (known := cache.get_look(known_as, rules)) is None:
            missing.append(index)
        else:
            found[index] = Fingerprint.from_bytes(known)
    done = len(images) - len(missing)
    if progress is not None:
        progress(done, len(images))
    sources = [images[index].source for index in missing]
    for batch in decode_all(sources, _fingerprinted, _BATCH, rules):
        cache.put_looks(rules, [(one.identity, one.value.to_bytes()) for one in batch if one.value is not None])
        for one in batch:
            _note(one, missing[one.index], found, unreadable)
        done += len(batch)
        if progress is not None:
            progress(done, len(images))
    return Fingerprints(found, unreadable)


def _fingerprinted(pictures: Iterator[Picture]) -> list[Fingerprint]:
    return [fingerprint(one.image, one.facts) for one in pictures]


def _note(one: Decoded[Fingerprint], index: int, found: list[Fingerprint | None], unreadable: dict[int, str]) -> None:
    if one.value is None:
        unreadable[index] = one.reason
    found[index] = one.value


def exact_copies(found: Sequence[Fingerprint | None]) -> list[list[int]]:
    """Groups of at least two images with equal pixels, each in order, sorted."""
    groups: dict[bytes, list[int]] = {}
    for index, one in enumerate(found):
        if one is not None:
            groups.setdefault(one.pixels, []).append(index)
    return sorted(group for group in groups.values() if len(group) > 1)


def near_twins(found: Sequence[Fingerprint | None], near_bits: int = NEAR_BITS) -> list[list[int]]:
    """Groups of at least two images that hang together by perceptual hashes at most ``near_bits`` apart.

    All pairs are compared, as products of matrices: 100,000 images take about a minute and 0.2 GiB.

    Returns:
        Groups of indices, each in order, sorted.
    """
    present = [index for index, one in enumerate(found) if one is not None]
    if not present:
        return []
    looks = np.array([list(one.look) for one in found if one is not None], dtype=np.uint8)
    distinct, place = np.unique(looks, axis=0, return_inverse=True)
    component = _components(distinct, near_bits)[place.reshape(-1)]
    groups: dict[int, list[int]] = {}
    for index, number in zip(present, component.tolist(), strict=True):
        groups.setdefault(number, []).append(index)
    return sorted(group for group in groups.values() if len(group) > 1)


def _components(looks: NDArray[np.uint8], near_bits: int) -> NDArray[np.int64]:
    """The number of the connected component of each of n distinct hashes [n, bytes]."""
    # With bits as +1 and -1, the product of two hashes is bits - 2 * distance.
    signs = torch.from_numpy(np.unpackbits(looks, axis=1).astype(np.float32) * 2 - 1)
    least = signs.shape[1] - 2 * near_bits
    rows, columns = [], []
    for start in range(0, len(signs), _BLOCK):
        for other in range(start, len(signs), _BLOCK):
            near = signs[start : start + _BLOCK] @ signs[other : other + _BLOCK].T >= least
            first, second = torch.nonzero(near, as_tuple=True)
            rows.append(first.numpy() + start)
            columns.append(second.numpy() + other)
    row, column = np.concatenate(rows), np.concatenate(columns)
    graph = coo_array((np.ones(len(row), dtype=bool), (row, column)), shape=(len(signs), len(signs)))
    return np.asarray(connected_components(graph, directed=False)[1], dtype=np.int64)


def inseparable(images: Sequence[SiteImage], found: Sequence[Fingerprint | None]) -> list[frozenset[str]]:
    """Groups of at least two patients that have copies or near twins of one another's images, sorted.

    A group of more than ``MOST_TOGETHER`` of the patients (and more than ``ALWAYS_TOGETHER``) says that the hash does
    not tell these images apart; of such a group only patients with exact copies stay together.
    """
    most = max(ALWAYS_TOGETHER, MOST_TOGETHER * len({image.patient for image in images}))
    groups = _of_patients(images, near_twins(found))  # equal pictures have equal hashes
    copies = _of_patients(images, exact_copies(found))
    large = frozenset(patient for group in groups if len(group) > most for patient in group)
    kept = [group for group in groups if len(group) <= most] + [group for group in copies if group <= large]
    return sorted(kept, key=min)


def merged(groups: Sequence[frozenset[str]]) -> list[frozenset[str]]:
    """Groups that have a member in common as one, sorted."""
    kept: list[frozenset[str]] = []
    for group in groups:
        apart = [other for other in kept if not other & group]
        kept = [*apart, group.union(*(other for other in kept if other & group))]
    return sorted(kept, key=min)


def _of_patients(images: Sequence[SiteImage], groups: Sequence[Sequence[int]]) -> list[frozenset[str]]:
    """The patients whom groups of images connect."""
    names = sorted({image.patient for image in images})
    numbers = {patient: number for number, patient in enumerate(names)}
    pairs = [(numbers[images[group[0]].patient], numbers[images[index].patient]) for group in groups for index in group]
    row, column = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    graph = coo_array((np.ones(len(row), dtype=bool), (row, column)), shape=(len(names), len(names)))
    component = connected_components(graph, directed=False)[1].tolist()
    together: dict[int, set[str]] = {}
    for patient, number in zip(names, component, strict=True):
        together.setdefault(number, set()).add(patient)
    return [frozenset(group) for group in together.values() if len(group) > 1]

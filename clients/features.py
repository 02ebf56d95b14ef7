"""Image features: computed once, kept in a cache on the site's disk, gathered by split for training."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sqlite3
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from secure_fed import configs
from secure_fed.clients.data import SiteImage, Split
from secure_fed.clients.decoding import identities
from secure_fed.clients.encoding import WHOLE_IMAGES, Patches, View, encode_all
from secure_fed.clients.rules import Rules
from secure_fed.core.errors import BackboneError, StorageError, UnreadableImageError, fault_lines
from secure_fed.model.backbone import load_backbone
from secure_fed.model.device import Device, kind_of
from secure_fed.model.loaded_backbone import LoadedBackbone
from secure_fed.protocol import memory
from secure_fed.protocol.study import AgreedStudy
from secure_fed.protocol.study_tables import Backbone

Progress = Callable[[int, int], None]
"""Called with the number of images done and the number of all."""

MIRRORED: tuple[Split, ...] = ("train", "unlabelled")
"""Splits whose images are encoded mirrored too, if the study says so."""

_LIBRARIES = ("torch", "torchvision", "open_clip_torch", "pillow", "pydicom")
_PLAIN = Rules()
_TABLES = """
CREATE TABLE IF NOT EXISTS recipes (recipe TEXT PRIMARY KEY, preprocessing TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS features (image BLOB, space BLOB, feature BLOB NOT NULL, PRIMARY KEY (image, space))
    WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS looks (image BLOB, rules BLOB, content BLOB NOT NULL, PRIMARY KEY (image, rules))
    WITHOUT ROWID;
DROP TABLE IF EXISTS fingerprints;
"""


class Labelled(NamedTuple):
    """Features and labels of one split: ``x`` unit rows [n, d] float32, ``y`` class indices [n] int64."""

    x: NDArray[np.float32]
    y: NDArray[np.int64]


@dataclass(frozen=True)
class SiteFeatures:
    """A site's features by split. Never leaves the site.

    Attributes:
        train: labelled, for training; with mirrored images, the plain ones first, then the mirrored.
        val: labelled, for choosing.
        test: labelled, for the report.
        unlabelled: unit rows [n, d] for domain adaptation, mirrored ones likewise.
        unreadable: images that were left out because they cannot be decoded.
        encoded: features that were computed in this call; the others came from the cache.
        patients: whose each row is, by split.
        digests: identities of all images (:func:`secure_fed.clients.reading.identity`), by patient.
        images: all that were encoded, in order; rows of a split are in theirs.
    """

    train: Labelled
    val: Labelled
    test: Labelled
    unlabelled: NDArray[np.float32]
    unreadable: int
    encoded: int
    patients: Mapping[Split, tuple[str, ...]] = field(default_factory=dict)
    digests: Mapping[str, frozenset[bytes]] = field(default_factory=dict)
    images: Sequence[SiteImage] = ()


@dataclass(frozen=True)
class Encoded:
    """What :meth:`FeatureCache.encode` found or computed.

    Attributes:
        images: those that can be decoded, in the order given; the cache has their features now.
        digests: their identities, in the same order.
        space: of their features, for :meth:`FeatureCache.read`.
        unreadable: number of images left out.
        encoded: number of features computed in this call.
    """

    images: list[SiteImage]
    digests: list[bytes]
    space: bytes
    unreadable: int
    encoded: int


class FeatureCache:
    """An SQLite file of features and fingerprints, by the image's identity.

    A feature also depends on the space it lives in: a digest of all else that it depends on: weights, model,
    preprocessing, precision, device, view and the versions of the libraries. Several processes and several studies may
    use one file. A process that is killed loses at most the batch that it was at.
    """

    def __init__(self, path: Path) -> None:
        """Open or make the file.

        Raises:
            StorageError: it cannot be opened, or is no feature cache.
        """
        self._path = path
        with self._typed_errors():
            # Features are as sensitive as images; what SQLite lays beside the file has the file's mode.
            with contextlib.suppress(OSError):
                os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
                path.chmod(0o600)
            self._database = sqlite3.connect(path, timeout=60)
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute("PRAGMA synchronous = NORMAL")
            self._database.execute("PRAGMA secure_delete = ON")  # what is forgotten is overwritten
            self._database.executescript(_TABLES)

    def __enter__(self) -> FeatureCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; what was not committed is dropped."""
        self._database.close()

    def encode(
        self,
        images: Sequence[SiteImage],
        backbone: Backbone,
        load: Callable[[], LoadedBackbone],
        view: View,
        skip_unreadable: bool,
        progress: Progress | None = None,
        device: Device = "cpu",
        rules: Rules = _PLAIN,
        patches: Patches = WHOLE_IMAGES,
    ) -> Encoded:
        """Have the features of all images in the cache; only those that it lacks are computed.

        Nothing is held in memory but the images' names and identities.

        Args:
            images: what to encode.
            backbone: the study's, with its digest.
            load: loads the weights; called at most once, and not at all when nothing is to be computed.
            view: the image as it is, or mirrored left to right.
            skip_unreadable: leave out images that cannot be decoded instead of refusing.
            progress: told after each batch, and once at the end.
            device: where the backbone computes.
            rules: how pictures are to be seen.
            patches: whether features are of patches instead.

        Raises:
            UnreadableImageError: some images cannot be decoded; the features of all others are kept.
            StorageError: the cache cannot be read or written.
            BackboneError: as ``load``; or the backbone's preprocessing is not what the cached features had.
        """
        return _Encoding(self, images, backbone, load, view, progress, device, rules, patches).run(skip_unreadable)

    def preprocessing(self, recipe: str) -> str | None:
        """What the backbone of a recipe does to an image first, if it has ever been loaded for this cache."""
        with self._typed_errors():
            row = self._database.execute("SELECT preprocessing FROM recipes WHERE recipe = ?", (recipe,)).fetchone()
        return None if row is None else str(row[0])

    def note_preprocessing(self, recipe: str, preprocessing: str) -> None:
        """Remember a recipe's preprocessing."""
        with self._typed_errors(), self._database:
            self._database.execute("INSERT OR IGNORE INTO recipes VALUES (?, ?)", (recipe, preprocessing))

    def has(self, image: bytes, space: bytes) -> bool:
        """Whether the feature of an image in a space is there."""
        query = "SELECT 1 FROM features WHERE image = ? AND space = ?"
        with self._typed_errors():
            return self._database.execute(query, (image, space)).fetchone() is not None

    def read(self, keys: Sequence[tuple[bytes, bytes]], dim: int) -> NDArray[np.float32]:
        """Features, [len(keys), dim], each by its image and space.

        Raises:
            StorageError: one is not there, or of another width.
            BackboneError: one is not finite: nothing may be trained, or paid for, with it.
        """
        rows = np.empty((len(keys), dim), dtype=np.float32)
        query = "SELECT feature FROM features WHERE image = ? AND space = ?"
        for index, key in enumerate(keys):
            with self._typed_errors():
                found = self._database.execute(query, key).fetchone()
            if found is None or len(found[0]) != 4 * dim:
                what = "not there any more" if found is None else f"{len(found[0]) // 4} values wide"
                raise StorageError(
                    f"{self._path}: the feature of an image is {what}; expected {dim} values, as the backbone made "
                    "them: run again, and if that does not help remove the file (features are then computed anew)"
                )
            rows[index] = np.frombuffer(found[0], dtype="<f4")
        broken = int((~np.isfinite(rows).all(axis=1)).sum())
        if broken:
            raise BackboneError(
                f"{self._path}: {broken} of {len(rows)} features are not finite; expected finite ones: see what "
                "secfacmic backbone check says of the weights, then remove the file (features are computed anew)"
            )
        return rows

    def put(self, space: bytes, rows: Sequence[tuple[bytes, NDArray[np.float32]]]) -> None:
        """Keep features of a space, by image, in one transaction."""
        content = [(image, space, feature.astype("<f4").tobytes()) for image, feature in rows]
        with self._typed_errors(), self._database:
            self._database.executemany("INSERT OR REPLACE INTO features VALUES (?, ?, ?)", content)

    def get_look(self, image: bytes, rules: Rules) -> bytes | None:
        """What an image looks like by rules (:mod:`secure_fed.clients.duplicates`), if that is known."""
        query = "SELECT content FROM looks WHERE image = ? AND rules = ?"
        with self._typed_errors():
            row = self._database.execute(query, (image, rules.digest)).fetchone()
        return None if row is None else bytes(row[0])

    def has_looks(self, rules: Rules) -> bool:
        """Whether there is any image of which it is known what it looks like by these rules."""
        with self._typed_errors():
            row = self._database.execute("SELECT 1 FROM looks WHERE rules = ? LIMIT 1", (rules.digest,)).fetchone()
        return row is not None

    def put_looks(self, rules: Rules, rows: Sequence[tuple[bytes, bytes]]) -> None:
        """Keep looks, by image, in one transaction."""
        content = [(image, rules.digest, look) for image, look in rows]
        with self._typed_errors(), self._database:
            self._database.executemany("INSERT OR REPLACE INTO looks VALUES (?, ?, ?)", content)

    def keep_only(self, images: Collection[bytes]) -> int:
        """Drop all that is of other images, and overwrite it on the disk; how many images were dropped."""
        with self._typed_errors():
            known = {row[0] for table in _BY_IMAGE for row in self._database.execute(f"SELECT image FROM {table}")}
            gone = [(image,) for image in sorted(known - set(images))]
            with self._database:
                for table in _BY_IMAGE:
                    self._database.executemany(f"DELETE FROM {table} WHERE image = ?", gone)
            self._database.execute("VACUUM")
            # The log beside the file would still hold the old pages.
            self._database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return len(gone)

    @contextmanager
    def _typed_errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise StorageError(
                f"{self._path}: the feature cache cannot be used ({error}); expected a writable place with space "
                "left: free some, or remove the file, and run again (features are then computed anew)"
            ) from error


_BY_IMAGE = ("features", "looks")


def refuse_unreadable(reasons: Sequence[str], among: int) -> None:
    """Refuse to go on without images that nobody has agreed to leave out.

    Args:
        reasons: why not, a line for each image that cannot be decoded.
        among: images in all.

    Raises:
        UnreadableImageError: there are some.
    """
    if reasons:
        raise UnreadableImageError(
            f"{len(reasons)} of {among} images cannot be decoded; expected whole 8-bit images, DICOM or NIfTI: replace "
            "or remove them, or leave them out with --skip-unreadable (in site.toml: skip_unreadable = true)"
            f"{fault_lines(reasons)}"
        )


class _Encoding:
    """One run over a list of images: looks up, has the rest decoded, computes and commits batch by batch."""

    def __init__(
        self,
        cache: FeatureCache,
        images: Sequence[SiteImage],
        backbone: Backbone,
        load: Callable[[], LoadedBackbone],
        view: View,
        progress: Progress | None,
        device: Device,
        rules: Rules,
        patches: Patches,
    ) -> None:
        self._patches = patches
        self._cache = cache
        self._rules = rules
        self._images = images
        self._load = load
        self._view = view
        self._progress = progress
        self._loaded: LoadedBackbone | None = None
        self._recipe = _recipe(backbone, device)
        self._digests: list[bytes | None] = [None] * len(images)
        self._unreadable: list[str] = []
        self._encoded = 0
        self._told = -1

    def run(self, skip_unreadable: bool) -> Encoded:
        if not self._images:
            return Encoded([], [], b"", 0, 0)
        self._space = self._find_space()
        missing = self._look_up()
        if missing:
            self._compute(missing, len(self._images) - len(missing))
        self._tell(len(self._images))
        unreadable = self._unreadable
        if not skip_unreadable:
            refuse_unreadable(unreadable, len(self._images))
        found = [(image, digest) for image, digest in zip(self._images, self._digests, strict=True) if digest]
        return Encoded(
            [image for image, _ in found],
            [digest for _, digest in found],
            self._space,
            len(unreadable),
            self._encoded,
        )

    def _look_up(self) -> list[int]:
        """Find what the cache has; the places of what it lacks."""
        missing = []
        known = identities(image.source for image in self._images)
        for index, (image, digest) in enumerate(zip(self._images, known, strict=True)):
            if isinstance(digest, OSError):
                self._unreadable.append(f"{image.path}: {digest.strerror}")
                continue
            if self._cache.has(digest, self._space):
                self._digests[index] = digest
            else:
                missing.append(index)
        return missing

    def _find_space(self) -> bytes:
        preprocessing = self._cache.preprocessing(self._recipe)
        if preprocessing is None:
            preprocessing = self._backbone().preprocessing
            self._cache.note_preprocessing(self._recipe, preprocessing)
        self._preprocessing = preprocessing
        space: list[object] = [self._recipe, preprocessing, self._view, self._rules.digest.hex()]
        if self._patches.blocks:
            space += [self._patches.blocks, self._patches.neighbourhood]
        return hashlib.sha256(json.dumps(space).encode()).digest()

    def _backbone(self) -> LoadedBackbone:
        if self._loaded is None:
            self._loaded = self._load()
        return self._loaded

    def _compute(self, missing: list[int], done: int) -> None:
        backbone = self._backbone()
        if backbone.preprocessing != self._preprocessing:
            raise BackboneError(
                f"the backbone now prepares images by {backbone.preprocessing}, but the cached features were made "
                f"by {self._preprocessing}; restore its configuration, or remove the feature cache"
            )

        sources = [self._images[index].source for index in missing]
        for batch in encode_all(sources, backbone, self._view, self._rules, self._patches):
            rows = []
            for one in batch:
                place = missing[one.index]
                if one.value is None:
                    self._unreadable.append(f"{self._images[place].path}: {one.reason}")
                else:
                    rows.append((one.identity, one.value))
                    self._digests[place] = one.identity
            self._cache.put(self._space, rows)
            self._encoded += len(rows)
            done += len(batch)
            self._tell(done)

    def _tell(self, done: int) -> None:
        if self._progress is not None and done != self._told:
            self._progress(done, len(self._images))
        self._told = done


def load_features(
    images: Sequence[SiteImage],
    agreed: AgreedStudy,
    cache: FeatureCache,
    checkpoint: Path | None,
    skip_unreadable: bool,
    progress: Progress | None = None,
    device: Device = "cpu",
    rules: Rules = _PLAIN,
) -> SiteFeatures:
    """A site's features, from the cache or computed.

    Args:
        images: as :func:`secure_fed.clients.images.site_images` gives them.
        agreed: whose backbone encodes, whose classes label.
        cache: of this site.
        checkpoint: where the weights lie at this site, if not where the study says.
        skip_unreadable: leave out images that cannot be decoded instead of refusing.
        progress: for mirrored images, called for a second pass.
        device: where the backbone computes.
        rules: how pictures are to be seen.

    Raises:
        UnreadableImageError, StorageError, BackboneError: as :meth:`FeatureCache.encode`.
        BackboneDigestError: the weights are not those that the study names.
    """
    backbone = agreed.study.backbone
    patches = Patches.of(agreed.study.method)
    dim = memory.width(agreed.initial.adapter) if patches.blocks else agreed.initial.prompt_features.shape[1]
    loaded: list[LoadedBackbone] = []

    def load() -> LoadedBackbone:
        if not loaded:
            loaded.append(load_backbone(backbone, checkpoint, device))
        return loaded[0]

    plain = cache.encode(images, backbone, load, "plain", skip_unreadable, progress, device, rules, patches)
    passes = [plain]
    if backbone.mirrored:
        trained = [image for image in plain.images if image.split in MIRRORED]
        passes.append(
            cache.encode(trained, backbone, load, "mirrored", skip_unreadable, progress, device, rules, patches)
        )

    loaded.clear()  # before the features take its place in memory

    def gather(split: Split) -> Labelled:
        keys, labels = [], []
        for one in passes:
            for image, digest in zip(one.images, one.digests, strict=True):
                if image.split == split:
                    keys.append((digest, one.space))
                    labels.append(-1 if image.label is None else image.label)
        return Labelled(cache.read(keys, dim), np.array(labels, dtype=np.int64))

    owners: dict[Split, tuple[str, ...]] = {
        split: tuple(image.patient for one in passes for image in one.images if image.split == split)
        for split in get_args(Split)
    }
    digests: defaultdict[str, set[bytes]] = defaultdict(set)
    for image, digest in zip(plain.images, plain.digests, strict=True):
        digests[image.patient].add(digest)
    return SiteFeatures(
        train=gather("train"),
        val=gather("val"),
        test=gather("test"),
        unlabelled=gather("unlabelled").x,
        unreadable=plain.unreadable,
        encoded=sum(one.encoded for one in passes),
        patients=owners,
        digests={patient: frozenset(found) for patient, found in digests.items()},
        images=tuple(plain.images),
    )


def pool_features(several: Sequence[SiteFeatures]) -> SiteFeatures:
    """Several sites' features as if of one, to train on; only on public or simulated data can anyone have them."""
    owners: dict[Split, tuple[str, ...]] = {
        split: tuple(
            f"{index}/{patient}" for index, each in enumerate(several) for patient in each.patients.get(split, ())
        )
        for split in get_args(Split)
    }
    train, val, test = (
        Labelled(*(np.concatenate(parts) for parts in zip(*splits, strict=True)))
        for splits in zip(*((each.train, each.val, each.test) for each in several), strict=True)
    )
    return SiteFeatures(
        train=train,
        val=val,
        test=test,
        unlabelled=np.concatenate([each.unlabelled for each in several]),
        unreadable=sum(each.unreadable for each in several),
        encoded=sum(each.encoded for each in several),
        patients=owners,
    )


def _recipe(backbone: Backbone, device: Device) -> str:
    """All that a feature depends on and that is known before the weights are loaded."""
    ours = configs.MODELS / f"{backbone.model}.json"
    return json.dumps(
        {
            "digest": backbone.digest,
            "id": backbone.id,
            "model": backbone.model,
            "tag": backbone.tag,
            "config": hashlib.sha256(ours.read_bytes()).hexdigest() if ours.is_file() else None,
            "device": kind_of(device),
            "versions": {name: version(name) for name in _LIBRARIES},
        },
        sort_keys=True,
    )

"""Image features: computed once, kept in a cache on the site's disk, gathered by split for training."""

from __future__ import annotations

import hashlib
import io
import json
import sqlite3
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

import configs
from clients.data import SiteImage, Split
from secure_fed.backbone import BATCH, LoadedBackbone, load_backbone
from secure_fed.errors import BackboneError, StorageError, UnreadableImageError
from secure_fed.study import AgreedStudy, Backbone

View = Literal["plain", "mirrored"]
Progress = Callable[[int, int], None]
"""Called with the number of images done and the number of all."""

_COMMIT_EVERY = 8 * BATCH
_LISTED = 10
_TABLES = """
CREATE TABLE IF NOT EXISTS recipes (recipe TEXT PRIMARY KEY, preprocessing TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS features (image BLOB, space BLOB, feature BLOB NOT NULL, PRIMARY KEY (image, space))
    WITHOUT ROWID;
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
        digests: SHA-256 of all images' files, by patient.
    """

    train: Labelled
    val: Labelled
    test: Labelled
    unlabelled: NDArray[np.float32]
    unreadable: int
    encoded: int
    patients: Mapping[Split, tuple[str, ...]] = field(default_factory=dict)
    digests: Mapping[str, frozenset[bytes]] = field(default_factory=dict)


@dataclass(frozen=True)
class Encoded:
    """What :meth:`FeatureCache.encode` found or computed.

    Attributes:
        images: those that can be decoded, in the order given.
        features: their unit features, [len(images), d] float32; [0, 0] without any.
        unreadable: number of images left out.
        encoded: number of features computed in this call.
        digests: SHA-256 of the images' files, in the same order.
    """

    images: list[SiteImage]
    features: NDArray[np.float32]
    unreadable: int
    encoded: int
    digests: list[bytes]


class FeatureCache:
    """An SQLite file of features, by the image file's SHA-256 and the space the feature lives in.

    A space is a digest of everything a feature depends on besides the image: weights, model, preprocessing,
    precision, view and the versions of the libraries. Several processes may use one file. A process that is
    killed loses at most the last few hundred images.
    """

    def __init__(self, path: Path) -> None:
        """Open or make the file.

        Raises:
            StorageError: it cannot be opened, or is no feature cache.
        """
        self._path = path
        with self._typed_errors():
            self._database = sqlite3.connect(path, timeout=60)
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute("PRAGMA synchronous = NORMAL")
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
    ) -> Encoded:
        """The features of all images; only those that the cache lacks are computed.

        Args:
            images: what to encode.
            backbone: the study's, with its digest.
            load: loads the weights; called at most once, and not at all when nothing is to be computed.
            view: the image as it is, or mirrored left to right.
            skip_unreadable: leave out images that cannot be decoded instead of refusing.
            progress: told after each batch, and once at the end.

        Raises:
            UnreadableImageError: some images cannot be decoded; the features of all others are kept.
            StorageError: the cache cannot be read or written.
            BackboneError: as ``load``; or the backbone's preprocessing is not what the cached features had.
        """
        return _Encoding(self, images, backbone, load, view, progress).run(skip_unreadable)

    def preprocessing(self, recipe: str) -> str | None:
        """What the backbone of a recipe does to an image first, if it has ever been loaded for this cache."""
        with self._typed_errors():
            row = self._database.execute("SELECT preprocessing FROM recipes WHERE recipe = ?", (recipe,)).fetchone()
        return None if row is None else str(row[0])

    def note_preprocessing(self, recipe: str, preprocessing: str) -> None:
        """Remember a recipe's preprocessing."""
        with self._typed_errors(), self._database:
            self._database.execute("INSERT OR IGNORE INTO recipes VALUES (?, ?)", (recipe, preprocessing))

    def get(self, image: bytes, space: bytes) -> NDArray[np.float32] | None:
        """The feature [d] of an image in a space, if it is there."""
        with self._typed_errors():
            row = self._database.execute(
                "SELECT feature FROM features WHERE image = ? AND space = ?", (image, space)
            ).fetchone()
        return None if row is None else np.frombuffer(row[0], dtype="<f4")

    def put(self, space: bytes, rows: Sequence[tuple[bytes, NDArray[np.float32]]]) -> None:
        """Keep features of a space, by image digest, in one transaction."""
        content = [(image, space, feature.astype("<f4").tobytes()) for image, feature in rows]
        with self._typed_errors(), self._database:
            self._database.executemany("INSERT OR REPLACE INTO features VALUES (?, ?, ?)", content)

    @contextmanager
    def _typed_errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise StorageError(
                f"{self._path}: the feature cache cannot be used ({error}); expected a writable place with space "
                "left: free some, or remove the file, and run again (features are then computed anew)"
            ) from error


class _Encoding:
    """One run over a list of images: looks up, decodes, computes in batches, commits now and then."""

    def __init__(
        self,
        cache: FeatureCache,
        images: Sequence[SiteImage],
        backbone: Backbone,
        load: Callable[[], LoadedBackbone],
        view: View,
        progress: Progress | None,
    ) -> None:
        self._cache = cache
        self._images = images
        self._load = load
        self._view = view
        self._progress = progress
        self._loaded: LoadedBackbone | None = None
        self._recipe = _recipe(backbone)
        self._found: dict[int, NDArray[np.float32]] = {}
        self._digests: dict[int, bytes] = {}
        self._batch: list[tuple[int, bytes, Image.Image]] = []
        self._pending: list[tuple[bytes, NDArray[np.float32]]] = []
        self._encoded = 0

    def run(self, skip_unreadable: bool) -> Encoded:
        if not self._images:
            return Encoded([], np.empty((0, 0), dtype=np.float32), 0, 0, [])
        self._space = self._find_space()
        unreadable = []
        for index, image in enumerate(self._images):
            try:
                content = image.path.read_bytes()
                digest = self._digests[index] = hashlib.sha256(content).digest()
                feature = self._cache.get(digest, self._space)
                if feature is not None:
                    self._found[index] = feature
                else:
                    self._batch.append((index, digest, _decode(content)))
            except (_UndecodableError, OSError) as error:
                reason = error.strerror if isinstance(error, OSError) else error
                unreadable.append(f"{image.path}: {reason}")
            if len(self._batch) == BATCH:
                self._compute()
                self._tell(index + 1)
        self._compute()
        self._commit()
        self._tell(len(self._images))
        if unreadable and not skip_unreadable:
            shown = "".join(f"\n  {line}" for line in unreadable[:_LISTED])
            more = f"\n  and {len(unreadable) - _LISTED} more" if len(unreadable) > _LISTED else ""
            raise UnreadableImageError(
                f"{len(unreadable)} of {len(self._images)} images cannot be decoded; expected whole 8-bit images: "
                f"replace or remove them, or leave them out with --skip-unreadable{shown}{more}"
            )
        kept = sorted(self._found)
        rows = [self._found[index] for index in kept]
        features = np.stack(rows) if rows else np.empty((0, 0), dtype=np.float32)
        return Encoded(
            [self._images[index] for index in kept],
            features,
            len(unreadable),
            self._encoded,
            [self._digests[index] for index in kept],
        )

    def _find_space(self) -> bytes:
        preprocessing = self._cache.preprocessing(self._recipe)
        if preprocessing is None:
            preprocessing = self._backbone().preprocessing
            self._cache.note_preprocessing(self._recipe, preprocessing)
        self._preprocessing = preprocessing
        return hashlib.sha256(json.dumps([self._recipe, preprocessing, self._view]).encode()).digest()

    def _backbone(self) -> LoadedBackbone:
        if self._loaded is None:
            self._loaded = self._load()
        return self._loaded

    def _compute(self) -> None:
        if not self._batch:
            return
        backbone = self._backbone()
        if backbone.preprocessing != self._preprocessing:
            raise BackboneError(
                f"the backbone now prepares images by {backbone.preprocessing}, but the cached features were made "
                f"by {self._preprocessing}; restore its configuration, or remove the feature cache"
            )
        images = [image if self._view == "plain" else ImageOps.mirror(image) for _, _, image in self._batch]
        for (index, digest, _), feature in zip(self._batch, backbone.encode_images(images), strict=True):
            self._found[index] = feature
            self._pending.append((digest, feature))
        self._encoded += len(self._batch)
        self._batch.clear()
        if len(self._pending) >= _COMMIT_EVERY:
            self._commit()

    def _commit(self) -> None:
        self._cache.put(self._space, self._pending)
        self._pending.clear()

    def _tell(self, done: int) -> None:
        if self._progress is not None:
            self._progress(done, len(self._images))


class _UndecodableError(Exception):
    """Why an image is no usable image."""


def load_features(
    images: Sequence[SiteImage],
    study: AgreedStudy,
    cache: FeatureCache,
    checkpoint: Path | None,
    skip_unreadable: bool,
    progress: Progress | None = None,
) -> SiteFeatures:
    """A site's features, from the cache or computed.

    Args:
        images: as :func:`clients.data.read_data` gives them.
        study: whose backbone encodes, whose classes label.
        cache: of this site.
        checkpoint: where the weights lie at this site, if not where the study says.
        skip_unreadable: leave out images that cannot be decoded instead of refusing.
        progress: for mirrored images, called for a second pass.

    Raises:
        UnreadableImageError, StorageError, BackboneError: as :meth:`FeatureCache.encode`.
        BackboneDigestError: the weights are not those that the study names.
    """
    backbone = study.study.backbone
    dim = study.initial.prompt_features.shape[1]
    loaded: list[LoadedBackbone] = []

    def load() -> LoadedBackbone:
        if not loaded:
            loaded.append(load_backbone(backbone, checkpoint))
        return loaded[0]

    plain = cache.encode(images, backbone, load, "plain", skip_unreadable, progress)
    passes = [plain]
    if backbone.mirrored:
        trained = [image for image in plain.images if image.split in ("train", "unlabelled")]
        passes.append(cache.encode(trained, backbone, load, "mirrored", skip_unreadable, progress))

    def gather(split: Split) -> Labelled:
        rows, labels = [np.empty((0, dim), dtype=np.float32)], []
        for one in passes:
            chosen = [i for i, image in enumerate(one.images) if image.split == split]
            if chosen:
                rows.append(one.features[chosen])
                labels += [one.images[i].label for i in chosen]
        known = [-1 if label is None else label for label in labels]
        return Labelled(np.concatenate(rows), np.array(known, dtype=np.int64))

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
    )


def _recipe(backbone: Backbone) -> str:
    """All that a feature depends on and that is known before the weights are loaded."""
    ours = configs.MODELS / f"{backbone.model}.json"
    return json.dumps(
        {
            "digest": backbone.digest,
            "model": backbone.model,
            "tag": backbone.tag,
            "config": hashlib.sha256(ours.read_bytes()).hexdigest() if ours.is_file() else None,
            "versions": {name: version(name) for name in ("torch", "torchvision", "open_clip_torch", "pillow")},
        },
        sort_keys=True,
    )


def _decode(content: bytes) -> Image.Image:
    """The whole image, decoded.

    Raises:
        _UndecodableError: it is broken, or Pillow would turn it into something else without a word.
    """
    try:
        image = Image.open(io.BytesIO(content))
        image.load()
    except UnidentifiedImageError as error:
        raise _UndecodableError("no image in a format that Pillow knows") from error
    except Exception as error:  # Pillow's readers raise of every kind on broken files
        raise _UndecodableError(str(error) or type(error).__name__) from error
    if image.mode[0] in "IF":
        # Pillow cuts these off at 255; which grey values matter is for the site to say.
        raise _UndecodableError(f"pixels of mode {image.mode}, more than 8 bits; choose a window and convert it")
    frames = getattr(image, "n_frames", 1)
    if frames != 1 and image.format != "MPO":  # a camera's MPO is one picture and its previews
        raise _UndecodableError(f"{frames} frames; expected one image a file")
    return image

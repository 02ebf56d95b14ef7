"""Where features of public images lie: centre and directions, from which a study's basis is made.

The packaged backbone has its own beside its weights (``configs/models/NAME.statistics.safetensors``), of the images it
was trained on; of other backbones ``study new --public`` computes them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from secure_fed import configs
from secure_fed.core.errors import StudyError
from secure_fed.core.storage import write_durable
from secure_fed.protocol.basis import Basis
from secure_fed.protocol.study_tables import Features

LEAST_IMAGES = 100
"""Fewest public images, no two alike, that statistics are taken of."""

AXES = 256
"""Directions that are kept, those of the most spread."""

WHITENING = 0.7
"""Power of a direction's standard deviation by which a public basis divides: 0 leaves it, 1 makes all alike. Between
them noise of a release is spread best over what tells classes apart (docs/facmic.md)."""

RADIUS = 0.85
"""Radius of a basis in root mean square lengths of what it is made of; about a third of the images lie within."""

RESOLVED = 1e-6
"""Least deviation along a direction, over the largest one, that is not what rounding leaves of none."""

LEAST_SPREAD = 0.1
"""Least that a coordinate of a raw basis is expected to spread, in root mean square spreads of all: in directions in
which public images hardly differ, those of a site may."""


@dataclass(frozen=True)
class PublicStatistics:
    """Of unit features of public images.

    Attributes:
        centre: float64 [d], the mean of the sources' means.
        axes: float64 [m, d], orthonormal, those of the most spread within the sources first.
        deviations: float64 [m], standard deviation along each.
        spread: float64 [d], root mean square distance from the centre in each of the backbone's own coordinates.
        digest: SHA-256 of the file that they were read from, 64 hex digits; empty if from none.
    """

    centre: NDArray[np.float64]
    axes: NDArray[np.float64]
    deviations: NDArray[np.float64]
    spread: NDArray[np.float64]
    digest: str = ""

    @property
    def directions(self) -> int:
        """In how many directions the images spread: of n images in fewer than n, the rest is rounding."""
        return int(np.count_nonzero(self.deviations > RESOLVED * self.deviations.max()))

    @classmethod
    def of(cls, sources: Sequence[NDArray[np.float32]]) -> PublicStatistics:
        """Of the unit features [n, d] of one or more kinds of images, which count alike however many each has.

        Raises:
            StudyError: too few images that differ.
        """
        images = min((len(np.unique(rows, axis=0)) for rows in sources), default=0)
        if images < LEAST_IMAGES:
            raise StudyError(
                f"{images} public images that differ; expected at least {LEAST_IMAGES}, more than dimensions at best"
            )
        rows = [source.astype(np.float64) for source in sources]
        centre = np.mean([source.mean(axis=0) for source in rows], axis=0)
        within = np.mean([np.cov(source.T) for source in rows], axis=0)
        variances, directions = np.linalg.eigh(within)
        kept = np.argsort(-variances)[:AXES]
        spread = np.sqrt(np.mean([np.square(source - centre).mean(axis=0) for source in rows], axis=0))
        return cls(centre, directions[:, kept].T, np.sqrt(np.maximum(variances[kept], 0)), spread)

    def save(self, path: Path, backbone: str, seen: str = "") -> None:
        """Write them, in half precision, which moves an axis by a thousandth.

        Args:
            path: the file.
            backbone: digest of the one that encoded the images.
            seen: digest of the rules by which the images were seen, if these matter.
        """
        tensors: dict[str, NDArray[Any]] = {
            "centre": self.centre.astype(np.float32),
            "axes": self.axes.astype(np.float16),
            "deviations": self.deviations.astype(np.float32),
            "spread": self.spread.astype(np.float32),
        }
        write_durable(path, bytes(safetensors.numpy.save(tensors, {"backbone": backbone, "seen": seen})))

    @classmethod
    def load(cls, path: Path, backbone: str, seen: str | None = None) -> PublicStatistics:
        """Read statistics of a backbone, of images that were seen by rules of a digest, if one is given.

        Raises:
            StudyError: they cannot be read, or are of another backbone, or of images that were seen otherwise.
        """
        try:
            own = hashlib.sha256(path.read_bytes()).hexdigest()
            with safetensors.safe_open(str(path), "np") as file:
                metadata = file.metadata() or {}
                digest, found = metadata.get("backbone", "none"), metadata.get("seen", "")
                parts = [
                    file.get_tensor(name).astype(np.float64) for name in ("centre", "axes", "deviations", "spread")
                ]
            centre, axes, deviations, spread = parts
            shapes = (axes.shape, spread.shape) == ((len(deviations), len(centre)), centre.shape)
            if not shapes or not all(np.isfinite(part).all() for part in parts):
                raise ValueError("shapes that do not fit, or numbers that are none")
        except (OSError, safetensors.SafetensorError, ValueError, TypeError) as error:
            raise StudyError(
                f"{path}: no public statistics ({type(error).__name__}); expected a folder of public images, or "
                "statistics of such"
            ) from error
        if digest != backbone:
            raise StudyError(
                f"{path}: statistics of backbone {digest[:16]}, the study's is {backbone[:16]}; expected those of the "
                "same backbone: give a folder of public images instead"
            )
        if seen is not None and found != seen:
            raise StudyError(
                f"{path}: statistics of images that were seen by other windows, another background or another release "
                "than the study's sites will see theirs by; expected the same: give a folder of public images instead"
            )
        return cls(centre, axes, deviations, spread, own)


def _packaged(model: str) -> Path:
    return configs.MODELS / f"{model}.statistics.safetensors"


def has_packaged_statistics(model: str) -> bool:
    """Whether statistics come with a backbone of this name."""
    return _packaged(model).is_file()


def packaged_statistics(model: str, backbone: str) -> PublicStatistics | None:
    """Those that come with a packaged backbone; None if there are none for weights of this digest."""
    path = _packaged(model)
    if not path.is_file():
        return None
    try:
        return PublicStatistics.load(path, backbone)
    except StudyError:
        return None


def precision_for(features: Features, statistics: PublicStatistics | None) -> int:
    """Bits of a value, sign included, at which rounding costs a head nothing that shows (docs/results/brain_mri.md).

    Coordinates along public directions have bounds of their own size: 18 bits, also where sites have a thirtieth of the
    patients that bounds are made for; 12 do for whitened ones at large sites, but save next to no bytes. Without public
    statistics all coordinates have one bound, and what tells classes apart is small beside it.
    """
    return 24 if features.basis == "random" or statistics is None else 18


def make_basis(features: Features, width: int, seed: int, statistics: PublicStatistics | None) -> Basis:
    """The study's basis.

    - ``raw``: all of the backbone's dimensions; with public statistics relative to their centre and along their
      directions, most spread first, then any that complete them. Turning changes no head, but each coordinate then has
      bounds of its own size: 18 bits lose nothing where they lose a point of accuracy in the backbone's coordinates.
    - ``public``: the ``dimensions`` directions in which public images differ most, each divided by its standard
      deviation to the power of :data:`WHITENING`.
    - ``random``: ``dimensions`` orthonormal directions drawn from the study's seed; nothing public is needed.

    Args:
        features: the study's table.
        width: d, of the backbone's features.
        seed: the study's.
        statistics: of public images, if there are any.

    Raises:
        StudyError: there are none but the basis needs them, or more dimensions than there are.
    """
    wanted = features.dimensions or width
    if features.basis == "raw":
        if statistics is None:
            return Basis(np.zeros(width), None, 1.0, np.full(width, 2 / math.sqrt(width)))
        radius = RADIUS * math.sqrt(float(np.square(statistics.spread).sum()))
        deviations = np.full(width, statistics.deviations[-1])  # of all others at most that
        deviations[: len(statistics.deviations)] = statistics.deviations
        least = LEAST_SPREAD * math.sqrt(float(np.square(deviations).mean()))
        return Basis(statistics.centre, _completed(statistics.axes), radius, np.maximum(deviations, least) / radius)
    if features.basis == "random":
        if wanted > width:
            raise StudyError(
                f'features.dimensions = {wanted}: the backbone has {width}; expected at most that, or basis = "raw"'
            )
        drawn = np.random.default_rng(seed).standard_normal((width, wanted))
        radius = RADIUS * math.sqrt(wanted / width)
        return Basis(np.zeros(width), np.linalg.qr(drawn)[0].T.copy(), radius, np.full(wanted, 2 / math.sqrt(wanted)))
    if statistics is None:
        raise StudyError(
            'features.basis = "public": there are no statistics of public images for this backbone; expected a folder '
            'of such images: give it with --public, or take basis = "random", which needs none'
        )
    if wanted > statistics.directions:
        raise StudyError(
            f"features.dimensions = {wanted}: the public images spread in {statistics.directions} directions; expected "
            "at most that, or more public images"
        )
    deviations = statistics.deviations[:wanted]
    axes = statistics.axes[:wanted] / deviations[:, None] ** WHITENING
    scaled = deviations ** (1 - WHITENING)
    radius = RADIUS * math.sqrt(float(np.square(scaled).sum()))
    return Basis(statistics.centre, axes, radius, scaled / radius)


def _completed(axes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Orthonormal directions [d, d] that begin with, but for their rounding, those given [m, d]."""
    missing = np.eye(axes.shape[1])
    return np.linalg.qr(np.concatenate([axes, missing]).T)[0].T.copy()

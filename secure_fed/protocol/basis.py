"""The coordinates in which statistics of features are taken: public constants, made once with the study."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from secure_fed.core.errors import StudyError


@dataclass(frozen=True)
class Basis:
    """Where a feature x of the backbone lies for the study: x' = clip_1((x - centre) axes^T / radius).

    None of it comes from a site's data: axes and centre are of public images, or drawn, or those of the backbone.

    Attributes:
        centre: float64 [d].
        axes: float64 [k, d]; None for the backbone's own coordinates, k = d.
        radius: positive; what lies farther than it from the centre is drawn to it, so that no image counts for more.
        spread: float64 [k], positive: how far a coordinate of x' is expected to lie from 0, root mean square. Bounds
            of sums are made of it.
    """

    centre: NDArray[np.float64]
    axes: NDArray[np.float64] | None
    radius: float
    spread: NDArray[np.float64]

    @property
    def dimensions(self) -> int:
        """k, of x'."""
        return len(self.spread)

    def linear(self, x: NDArray[np.float32] | NDArray[np.float64]) -> NDArray[np.float64]:
        """The coordinates [n, k] of features [n, d] before they are cut to length 1."""
        moved = x.astype(np.float64) - self.centre
        return np.asarray((moved if self.axes is None else moved @ self.axes.T) / self.radius)

    def project(self, x: NDArray[np.float32] | NDArray[np.float64]) -> NDArray[np.float64]:
        """x' [n, k], of length at most 1, of features x [n, d]."""
        moved = self.linear(x)
        return np.asarray(moved / np.maximum(np.linalg.norm(moved, axis=1, keepdims=True), 1))

    def tensors(self) -> dict[str, NDArray[Any]]:
        """As tensors of ``study.safetensors``, names beginning with ``basis.``."""
        found: dict[str, NDArray[Any]] = {
            "basis.centre": self.centre,
            "basis.radius": np.array([self.radius]),
            "basis.spread": self.spread,
        }
        return found if self.axes is None else found | {"basis.axes": self.axes}

    @classmethod
    def of(cls, tensors: dict[str, NDArray[Any]], width: int) -> Basis | None:
        """Inverse of :meth:`tensors`, other names passed over; None if there is no basis among them.

        Args:
            tensors: by name.
            width: d, of the backbone's features.

        Raises:
            StudyError: the basis is of features of another width, or its numbers are none that make coordinates.
            KeyError: a part is missing.
        """
        if "basis.centre" not in tensors:
            return None
        centre, axes = tensors["basis.centre"], tensors.get("basis.axes")
        basis = cls(centre, axes, float(tensors["basis.radius"][0]), tensors["basis.spread"])
        if centre.shape != (width,) or (basis.dimensions, width) != ((width, width) if axes is None else axes.shape):
            raise StudyError(
                f"the basis is of {centre.size} features, the backbone gives {width}; expected the basis that study "
                "new made for this backbone: make the study anew"
            )
        numbers = (centre, basis.spread, np.array([basis.radius]), *(() if axes is None else (axes,)))
        if not all(np.isfinite(part).all() for part in numbers) or min(basis.radius, basis.spread.min()) <= 0:
            raise StudyError(
                "the basis holds a radius or spread that is not above 0, or numbers that are not finite; expected what "
                "study new makes: make the study anew, of public images that differ"
            )
        return basis

"""An adapter against images whose labels are known: how good it is, how sure that is, for whom it is worse."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from secure_fed.clients.data import EVERYTHING, UNLABELLED, Choice, SiteImage
from secure_fed.clients.files import MANIFEST
from secure_fed.clients.manifest import read_table
from secure_fed.clients.rules import MOST_PIXELS
from secure_fed.core.errors import DataError, LabelError, ManifestError
from secure_fed.model.device import Device
from secure_fed.model.evaluation import CALIBRATION_BINS, RESAMPLES, metrics
from secure_fed.model.scores import Scores
from secure_fed.operate.folders import refuse_sites
from secure_fed.operate.predict import Probabilities, predict_folder

NO_VALUE = "(none)"
"""Group of the images for which a manifest's column is empty."""

_Cell = Callable[[SiteImage], str]
"""What a column says of an image."""


@dataclass(frozen=True)
class Share:
    """A share of images in [0, 1], with a 95 % interval by patient; None where there is nothing to share."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class OfClass:
    """One class against the rest.

    Attributes:
        name: of the class.
        images, patients: that have this label.
        sensitivity: share of its images that are recognised.
        precision: share of the images taken for it that are of it.
        covered: share of its images whose set holds it; None where the adapter gives no sets.
    """

    name: str
    images: int
    patients: int
    sensitivity: Share
    precision: Share
    covered: Share | None


@dataclass(frozen=True)
class Bin:
    """Test images whose prediction has about the same probability: the mean of it, the share right, how many."""

    confidence: float
    right: float
    images: int


@dataclass(frozen=True)
class Coverage:
    """What sets hold, of a head of one sum.

    Attributes:
        promised: chance that a set holds the class, for patients like those of the study's calibration.
        found: share of these images whose set does.
        size: mean number of classes in a set.
        strangers: share of these images that are like none of the calibration; None if nobody can say.
    """

    promised: float
    found: Share
    size: float
    strangers: float | None


@dataclass(frozen=True)
class Evaluation:
    """What was found.

    Attributes:
        said: what the adapter says of all images.
        by_patient: whether intervals are over patients; else nobody says whose the images are, and each is one.
        unlabelled: images without a label, which count in nothing.
        overall: all metrics, over all labelled images.
        classes: each class by itself, in the study's order.
        column: of the manifest, by which groups are made; empty without.
        groups: the metrics of each of its values.
        bins: the reliability diagram.
        coverage: None where the adapter gives no sets.
    """

    said: Probabilities
    by_patient: bool
    unlabelled: int
    overall: Scores
    classes: tuple[OfClass, ...]
    column: str
    groups: Mapping[str, Scores]
    bins: tuple[Bin, ...]
    coverage: Coverage | None

    def document(self) -> dict[str, Any]:
        """As a JSON document."""
        adapter = self.said.adapter
        return {
            "adapter_digest": adapter.digest,
            "study_id": adapter.study,
            "method": adapter.method.adapter,
            "calibrated": self.said.calibrated,
            "unit": "patient" if self.by_patient else "image",
            "unlabelled": self.unlabelled,
            "unreadable": self.said.unreadable,
            "passed_over": self.said.passed_over,
            "overall": self.overall.model_dump(mode="json"),
            "classes": [asdict(each) for each in self.classes],
            "column": self.column or None,
            "groups": {value: scores.model_dump(mode="json") for value, scores in self.groups.items()},
            "reliability": [asdict(each) for each in self.bins],
            "coverage": None if self.coverage is None else asdict(self.coverage),
        }


def evaluate_folder(
    adapter: Path,
    folder: Path,
    column: str | None = None,
    checkpoint: Path | None = None,
    *,
    skip_unreadable: bool = False,
    most_pixels: int = MOST_PIXELS,
    choice: Choice = EVERYTHING,
    device: Device = "cpu",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Compare what an adapter says of a folder of images with their labels.

    Args:
        adapter: as for :func:`secure_fed.operate.predict.predict_folder`, as all that is not named here.
        folder: with a ``manifest.csv`` that has columns ``path`` and ``label``, or one folder a class.
        column: of the manifest, for whose values metrics are given too.

    Raises:
        DataError: no image has a label.
        LabelError: labels that the adapter does not know.
        ManifestError: there is no such column.
        SecfacmicError: others, as ``predict_folder``.
    """
    labels, values = _said_of(folder, column)
    said = predict_folder(
        adapter,
        folder,
        None,
        checkpoint,
        skip_unreadable=skip_unreadable,
        most_pixels=most_pixels,
        choice=choice,
        device=device,
        progress=progress,
    )
    classes = said.adapter.classes
    named = [labels(image) for image in said.images]
    strangers = sorted(set(named) - {"", *classes})
    if strangers:
        if not (folder / MANIFEST).exists():
            refuse_sites(folder, set(strangers))
        raise LabelError(
            f"{folder}: labels that the adapter does not know: {', '.join(map(repr, strangers))}; expected "
            f"{', '.join(map(repr, classes))}, spelled exactly so"
        )
    known = np.array([bool(name) for name in named], dtype=bool)
    if not known.any():
        raise DataError(
            f"{folder}: none of {len(named)} images has a label; expected a {MANIFEST} with columns path and label, or "
            "one folder a class: without labels, secfacmic predict says what the adapter makes of them"
        )
    y = np.array([classes.index(name) for name in named if name], dtype=np.int64)
    p = said.probabilities[known]
    owners = [image.patient for image, is_known in zip(said.images, known, strict=True) if is_known]
    images = [image for image, is_known in zip(said.images, known, strict=True) if is_known]
    by_patient = all(owners)
    patients = owners if by_patient else [said.name(image) for image in images]
    draws = _draws(patients)
    right = p.argmax(axis=1) == y
    sets = None if said.cases is None else said.cases.sets[known]
    held = None if sets is None else sets[np.arange(len(y)), y]
    groups: dict[str, Scores] = {}
    if column is not None:
        of = np.array([values(image) or NO_VALUE for image in images])
        for value in sorted(set(of.tolist())):
            chosen = of == value
            own = [patient for patient, inside in zip(patients, chosen, strict=True) if inside]
            groups[value] = Scores(**metrics(p[chosen], y[chosen], own))
    coverage = None
    if said.cases is not None and sets is not None and held is not None:
        strange = None if said.cases.strangers is None else float(said.cases.strangers[known].mean())
        whole = _share(draws, held, np.ones(len(y), dtype=bool))
        promised = said.adapter.method.coverage
        coverage = Coverage(promised, whole, float(sets.sum(axis=1).mean()), strange)
    return Evaluation(
        said=said,
        by_patient=by_patient,
        unlabelled=int((~known).sum()),
        overall=Scores(**metrics(p, y, patients)),
        classes=tuple(
            OfClass(
                name=name,
                images=int((y == label).sum()),
                patients=len({patients[place] for place in np.flatnonzero(y == label)}),
                sensitivity=_share(draws, right, y == label),
                precision=_share(draws, right, p.argmax(axis=1) == label),
                covered=None if held is None else _share(draws, held, y == label),
            )
            for label, name in enumerate(classes)
        ),
        column=column or "",
        groups=groups,
        bins=_bins(p, right),
        coverage=coverage,
    )


def _said_of(folder: Path, column: str | None) -> tuple[_Cell, _Cell]:
    """Label and group of an image, by the row of the manifest that it is of; empty where nobody says.

    A file may have several rows, one for each of its pictures, and a row may be of all files of a folder.
    """
    manifest = folder / MANIFEST
    if not manifest.exists():
        if column is not None:
            raise ManifestError(f"{folder}: no {MANIFEST}, so no column {column}; expected one with path, label and it")

        def of_folder(image: SiteImage) -> str:
            parts = image.path.relative_to(folder).parts
            return parts[0] if len(parts) > 1 and parts[0] != UNLABELLED else ""

        return of_folder, lambda image: ""
    table = read_table(manifest, ("path", "label"), ("path", "label"))
    missing = [name for name in ("path", "label", column) if name is not None and name not in table.columns]
    if missing:
        raise ManifestError(
            f"{manifest}: no column {', '.join(missing)}; found {', '.join(table.columns) or 'none'}: name one of these"
        )
    rows = {row.line: row.cells for row in table.rows}

    def cell(name: str) -> _Cell:
        return lambda image: rows.get(image.line, {}).get(name, "")

    return cell("label"), cell(column or "")


def _draws(patients: list[str]) -> NDArray[np.float64]:
    """How often each image is in each resample of the patients, [RESAMPLES, n]; as the metrics' intervals have it."""
    _, owners = np.unique(np.asarray(patients, dtype=np.str_), return_inverse=True)
    count = int(owners.max()) + 1
    drawn = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    return np.asarray(drawn[:, owners], dtype=np.float64)


def _share(draws: NDArray[np.float64], hit: NDArray[np.bool_], among: NDArray[np.bool_]) -> Share:
    """The share of ``among`` that is ``hit``."""
    if not among.any():
        return Share(None, None, None)
    whole = draws[:, among].sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        values = draws[:, among & hit].sum(axis=1) / whole
    low, high = np.percentile(values[np.isfinite(values)], (2.5, 97.5))
    return Share(float(hit[among].mean()), float(low), float(high))


def _bins(p: NDArray[np.float64], right: NDArray[np.bool_]) -> tuple[Bin, ...]:
    confidence = p.max(axis=1)
    places = np.minimum((confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    return tuple(
        Bin(float(confidence[inside].mean()), float(right[inside].mean()), int(inside.sum()))
        for inside in (places == place for place in np.unique(places))
    )

"""An adapter against images whose labels are known: how good it is, how sure that is, for whom it is worse."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from secure_fed.clients.data import (
    EVERYTHING,
    UNLABELLED,
    Choice,
    SiteImage,
    Split,
    refuse_other_splits,
    refuse_unclear,
)
from secure_fed.clients.files import MANIFEST
from secure_fed.clients.manifest import read_table
from secure_fed.clients.rules import MOST_PIXELS
from secure_fed.core.errors import DataError, LabelError, ManifestError, fault_lines
from secure_fed.model.device import Device
from secure_fed.model.evaluation import CALIBRATION_BINS, RESAMPLES, metrics
from secure_fed.model.scores import Scores
from secure_fed.operate.folders import refuse_sites
from secure_fed.operate.predict import Probabilities, predict_folder
from secure_fed.protocol.study_tables import ANOMALY

NO_VALUE = "(none)"
"""Group of the images for which a manifest's column is empty."""

Among = Literal["train", "val", "test", "all"]
"""Images of which split are tested on."""

_Cell = Callable[[SiteImage], str]
"""What a column says of an image."""


@dataclass(frozen=True)
class _Rows:
    """What a manifest says of images, or a folder's name: label, group and, where there are splits, split."""

    label: _Cell
    group: _Cell
    split: _Cell | None


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
        split: of which all of these images are; ``all`` if of any, None where nothing says which were trained on.
        left_out: images of other splits, or in no row, which count in nothing.
        by_patient: whether intervals are over patients; else nobody says whose the images are, and each is one.
        unlabelled: images without a label, which count in nothing.
        overall: all metrics, over all labelled images.
        classes: each class by itself, in the study's order.
        column: of the manifest, by which groups are made; empty without.
        groups: the metrics of each of its values.
        bins: the reliability diagram; empty of a memory, whose scores are no probabilities.
        coverage: None where the adapter gives no sets.
    """

    said: Probabilities
    split: Among | None
    left_out: int
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
            "split": self.split,
            "left_out": self.left_out,
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
    split: Among | None = None,
) -> Evaluation:
    """Compare what an adapter says of a folder of images with their labels.

    Args:
        adapter: as for :func:`secure_fed.operate.predict.predict_folder`, as all that is not named here.
        folder: with a ``manifest.csv`` that has columns ``path`` and ``label``, or one folder a class. Of a memory of
            normal images, as at a site, every other label is an anomaly's.
        column: of the manifest, for whose values metrics are given too.
        split: tested on; None for ``test`` where the manifest has splits, and for all images where it has none: what
            the adapter was trained on would make its figures too good.

    Raises:
        DataError: no image has a label, or is of that split.
        LabelError: labels that the adapter does not know.
        ManifestError: there is no such column; or splits are none, of another name, or a patient is in two.
        SecfacmicError: others, as ``predict_folder``.
    """
    rows = _said_of(folder, column)
    if rows.split is None and split not in (None, "all"):
        raise ManifestError(f"{folder}: no {MANIFEST} with a column split, so no split {split}; expected one, or all")
    wanted = split if rows.split is None else split or "test"
    left_out = 0

    def among(images: list[SiteImage]) -> list[SiteImage]:
        nonlocal left_out
        chosen = images if rows.split is None or wanted is None else _of_split(folder, images, rows.split, wanted)
        left_out = len(images) - len(chosen)
        return chosen

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
        among=among,
    )
    classes = said.adapter.classes
    named = [rows.label(image) for image in said.images]
    strangers = Counter(name for name in named if name and name not in classes)
    if strangers and not (folder / MANIFEST).exists():
        refuse_sites(folder, set(strangers))
    if strangers and said.anomalies is not None:
        refuse_unclear(folder, strangers, classes, ANOMALY)
        named = [ANOMALY if name in strangers else name for name in named]
    elif strangers:
        raise LabelError(
            f"{folder}: labels that the adapter does not know: {', '.join(map(repr, sorted(strangers)))}; expected "
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
    flags = said.anomalies is None or said.anomalies.limit is not None
    positive = None if said.anomalies is None else classes.index(ANOMALY)

    def scores(chosen: NDArray[np.bool_]) -> Scores:
        own = [patient for patient, inside in zip(patients, chosen, strict=True) if inside]
        found = Scores(**metrics(p[chosen], y[chosen], own, positive))
        return found if flags else found.ranking_alone()

    sets = None if said.cases is None else said.cases.sets[known]
    held = None if sets is None else sets[np.arange(len(y)), y]
    groups: dict[str, Scores] = {}
    if column is not None:
        of = np.array([rows.group(image) or NO_VALUE for image in images])
        for value in sorted(set(of.tolist())):
            groups[value] = scores(of == value)
    coverage = None
    if said.cases is not None and sets is not None and held is not None:
        strange = None if said.cases.strangers is None else float(said.cases.strangers[known].mean())
        whole = _share(draws, held, np.ones(len(y), dtype=bool))
        promised = said.adapter.method.coverage
        coverage = Coverage(promised, whole, float(sets.sum(axis=1).mean()), strange)
    return Evaluation(
        said=said,
        split=None if rows.split is None else wanted,
        left_out=left_out,
        by_patient=by_patient,
        unlabelled=int((~known).sum()),
        overall=scores(np.ones(len(y), dtype=bool)),
        classes=tuple(
            OfClass(
                name=name,
                images=int((y == label).sum()),
                patients=len({patients[place] for place in np.flatnonzero(y == label)}),
                sensitivity=_share(draws, right, (y == label) & flags),
                precision=_share(draws, right, (p.argmax(axis=1) == label) & flags),
                covered=None if held is None else _share(draws, held, y == label),
            )
            for label, name in enumerate(classes)
        ),
        column=column or "",
        groups=groups,
        bins=_bins(p, right) if said.anomalies is None else (),
        coverage=coverage,
    )


def _said_of(folder: Path, column: str | None) -> _Rows:
    """Label, group and split of an image, by the row of the manifest that it is of; empty where nobody says.

    A file may have several rows, one for each of its pictures, and a row may be of all files of a folder.
    """
    manifest = folder / MANIFEST
    if not manifest.exists():
        if column is not None:
            raise ManifestError(f"{folder}: no {MANIFEST}, so no column {column}; expected one with path, label and it")

        def of_folder(image: SiteImage) -> str:
            parts = image.path.relative_to(folder).parts
            return parts[0] if len(parts) > 1 and parts[0] != UNLABELLED else ""

        return _Rows(of_folder, lambda image: "", None)
    table = read_table(manifest, ("path", "label"), ("path", "label"))
    missing = [name for name in ("path", "label", column) if name is not None and name not in table.columns]
    if missing:
        raise ManifestError(
            f"{manifest}: no column {', '.join(missing)}; found {', '.join(table.columns) or 'none'}: name one of these"
        )
    refuse_other_splits(manifest, table)
    rows = {row.line: row.cells for row in table.rows}

    def cell(name: str) -> _Cell:
        return lambda image: rows.get(image.line, {}).get(name, "")

    has_splits = "split" in table.columns
    faults = [
        f"line {row.line}: split {row.cells['split']!r}; expected one of {', '.join(get_args(Split))}"
        for row in table.rows
        if has_splits and row.cells["split"] not in get_args(Split)
    ]
    if faults:
        raise ManifestError(f"{manifest}: {len(faults)} rows are of no split{fault_lines(faults)}")
    return _Rows(cell("label"), cell(column or ""), cell("split") if has_splits else None)


def _of_split(folder: Path, images: list[SiteImage], split: _Cell, wanted: Among) -> list[SiteImage]:
    """The images of a split.

    Raises:
        DataError: there is none.
        ManifestError: a patient is in two, so that nobody can say who was trained on.
    """
    found: dict[str, str] = {}
    for image in images:
        if image.patient and (own := split(image)) and found.setdefault(image.patient, own) != own:
            raise ManifestError(
                f"{folder / MANIFEST}: patient {image.patient!r} is in splits {found[image.patient]} and {own}; "
                "expected one split a patient"
            )
    chosen = [image for image in images if wanted == "all" or split(image) == wanted]
    if not chosen:
        counts = Counter(split(image) for image in images)
        held = ", ".join(f"{counts[name]} of {name}" for name in get_args(Split) if counts[name]) or "none"
        raise DataError(
            f"{folder}: no image of split {wanted}, by its {MANIFEST}; found {held}: expected some, or another --split "
            "(all takes every one)"
        )
    return chosen


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

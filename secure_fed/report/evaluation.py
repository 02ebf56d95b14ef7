"""An evaluation as figures and tables."""

from __future__ import annotations

from collections.abc import Iterable

from secure_fed.model.scores import SCALARS, Scores
from secure_fed.operate.evaluate import Evaluation, Share
from secure_fed.report.chart import (
    UNKNOWN,
    Cell,
    Chart,
    Mark,
    Matrix,
    Section,
    Series,
    Table,
    cell,
    nice_axis,
    rows_axis,
)


def evaluation_sections(found: Evaluation) -> list[Section]:
    """What was found: overall, by class, calibration, and sets and groups where there are any."""
    sections = [_overall(found)]
    if found.overall.confusion_matrix is not None:  # else nothing is told from anything: a memory without a threshold
        sections.append(_classes(found))
    if found.said.anomalies is None:
        sections.append(_calibration(found))
    if found.coverage is not None:
        sections.append(_coverage(found))
    if found.groups:
        sections.append(_groups(found))
    return sections


def _overall(found: Evaluation) -> Section:
    scores = found.overall
    unit = "patients" if found.by_patient else "images, each as a patient of its own"
    rows = tuple((Cell(title), *_metric(scores, name)) for name, title in SCALARS.items())
    return Section(
        "overall",
        "Overall",
        f"{scores.images} labelled images of {scores.patients} {unit}{_of_which(found)}.",
        tables=(Table("All metrics, %", ("metric", "value", "low", "high"), rows),),
        notes=(
            "Low and high: 95 % intervals, by resampling patients.",
            *_flagged(found),
            *_trained_on(found),
            *_outside([scores]),
        ),
    )


def _flagged(found: Evaluation) -> tuple[str, ...]:
    """What a memory of normal images takes for an anomaly."""
    if found.said.anomalies is None:
        return ()
    said = found.said.document()
    if said["threshold"] is None:
        return (f"Nothing is flagged, so there is no figure of what would be: {said['why_no_threshold']}.",)
    return (f"Images that score {said['threshold']:.3f} or more are taken for anomalies, the others for normal.",)


def _of_which(found: Evaluation) -> str:
    if found.split in (None, "all"):
        return ""
    return f", of split {found.split} by the manifest; {found.left_out} images of others or of no row count in nothing"


def _trained_on(found: Evaluation) -> tuple[str, ...]:
    """What is to be said where images may be among these that the adapter was trained on."""
    if found.split is None:
        return ("Nothing here says which images the adapter was trained on: of those, figures are too good.",)
    if found.split in ("train", "all"):
        return ("Images of split train are among these: if the adapter was trained on them, figures are too good.",)
    return ()


def _metric(scores: Scores, name: str) -> tuple[Cell, Cell, Cell]:
    value = getattr(scores, name)
    ends = (scores.intervals or {}).get(name) or (None, None)
    return _percent(value), _percent(ends[0]), _percent(ends[1])


def _outside(several: Iterable[Scores]) -> tuple[str, ...]:
    """What is to be said where a calibration error is not in its interval."""
    for scores in several:
        value = scores.expected_calibration_error
        ends = (scores.intervals or {}).get("expected_calibration_error")
        if value is not None and ends is not None and not ends[0] <= value <= ends[1]:
            return (
                "A calibration error may lie below its interval: of few images it is estimated too high, of each "
                "resample, which has fewer different ones, even more; do not compare by it.",
            )
    return ()


def _percent(value: float | None) -> Cell:
    return cell(None if value is None else 100 * value)


def _shared(share: Share | None) -> tuple[Cell, Cell, Cell]:
    if share is None:
        return (Cell(UNKNOWN),) * 3
    return _percent(share.value), _percent(share.low), _percent(share.high)


def _classes(found: Evaluation) -> Section:
    names = tuple(each.name for each in found.classes)
    counts = found.overall.confusion_matrix or ()
    shares = tuple(tuple(count / sum(row) if sum(row) else None for count in row) for row in counts)
    matrix = Matrix(
        "Images by true class (row) and prediction", "true", names, names, shares,
        tuple(tuple(str(count) for count in row) for row in counts),
    )  # fmt: skip
    rows = tuple(
        (Cell(each.name), cell(each.images, "{:.0f}"), cell(each.patients, "{:.0f}"), *_shared(each.sensitivity),
         *_shared(each.precision))
        for each in found.classes
    )  # fmt: skip
    columns = ("class", "images", "patients", "sensitivity", "low", "high", "precision", "low", "high")
    chart = Chart(
        "Sensitivity by class, %",
        nice_axis("%", [0.0, 100.0], most=100),
        rows_axis(names),
        (
            Series(
                "sensitivity",
                tuple(
                    Mark(100 * one.value, float(place), each.name, 100 * (one.low or 0), 100 * (one.high or 0))
                    for place, each in enumerate(found.classes)
                    if (one := each.sensitivity).value is not None
                ),
                0,
                line=False,
                across=True,
            ),
        ),
        rows=True,
    )
    return Section("classes", "By class", "", (chart,), (matrix,), (Table("By class, %", columns, rows),))


def _calibration(found: Evaluation) -> Section:
    said = "after temperature scaling" if found.said.calibrated else "not calibrated"
    marks = tuple(Mark(100 * each.confidence, 100 * each.right, f"{each.images} images") for each in found.bins)
    axis = nice_axis("probability of the prediction, %", [0.0, 100.0], most=100)
    share = nice_axis("share that is right, %", [0.0, 100.0], most=100)
    chart = Chart("Reliability", axis, share, (Series(said, marks, 0),), diagonal=True)
    rows = tuple((_percent(each.confidence), _percent(each.right), cell(each.images, "{:.0f}")) for each in found.bins)
    table = Table("Reliability", ("probability, %", "right, %", "images"), rows)
    return Section("calibration", "Calibration", "", (chart,), (), (table,), notes=(f"Probabilities are {said}.",))


def _coverage(found: Evaluation) -> Section:
    coverage = found.coverage
    assert coverage is not None, "asked for where there are sets alone"
    rows = [(Cell("all"), *_shared(coverage.found))]
    rows += [(Cell(each.name), *_shared(each.covered)) for each in found.classes]
    strangers = (
        "no image can be told to be a stranger"
        if coverage.strangers is None
        else f"{100 * coverage.strangers:.1f} % of the images are like none of these patients"
    )
    return Section(
        "coverage",
        "Sets of classes",
        f"Sets promise the class of {100 * coverage.promised:g} % of patients like the study's calibration patients, "
        f"and have {coverage.size:.2f} classes on average here; {strangers}.",
        tables=(Table("Images whose set holds their class, %", ("class", "share", "low", "high"), tuple(rows)),),
    )


def _groups(found: Evaluation) -> Section:
    shown = ("balanced_accuracy", "auroc", "expected_calibration_error")
    rows = tuple(
        (Cell(value), cell(scores.images, "{:.0f}"), cell(scores.patients, "{:.0f}"),
         *(each for name in shown for each in _metric(scores, name)))
        for value, scores in found.groups.items()
    )  # fmt: skip
    columns = tuple(name for each in shown for name in (SCALARS[each], "low", "high"))
    return Section(
        "groups",
        f"By {found.column}",
        tables=(Table(f"By {found.column}, %", (found.column, "images", "patients", *columns), rows),),
        notes=("A class that a group lacks counts in none of its means.", *_outside(found.groups.values())),
    )

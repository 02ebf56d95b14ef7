"""All figures as one picture, drawn by Matplotlib."""

from __future__ import annotations

import io
import math
from typing import Any

from matplotlib.figure import Figure

from secure_fed.core.storage import DRAWN
from secure_fed.report.chart import Chart, Matrix
from secure_fed.report.figures import sections
from secure_fed.report.groups import Analysis
from secure_fed.report.page import LOCAL_WARNING, headline

COLOURS = ("#0b5cad", "#b8420b", "#00735c", "#8b3f96", "#7a5c00", "#4f5964", "#b3245c", "#1f6f8b")
MARKERS = "os^DvP<>"
COLUMNS = 2
_GREY = "#59616b"


def as_png(analysis: Analysis) -> bytes:
    """The charts and shaded tables of all figures, two in a row, under the page's first sentence."""
    panels: list[tuple[str, Chart | Matrix]] = []
    for section in sections(analysis):
        panels += [(section.title, chart) for chart in section.charts]
        panels += [(section.title, matrix) for matrix in section.matrices]
    rows = max(1, math.ceil(len(panels) / COLUMNS))
    figure = Figure(figsize=(13, 1.6 + 4.4 * rows), dpi=110, layout="constrained")
    lead = headline(analysis)
    text = f"{analysis.results.title}\n{lead}" + (f"\n{LOCAL_WARNING}" if analysis.results.local_only else "")
    figure.suptitle(_plain(text), fontsize=12, wrap=True)
    axes = figure.subplots(rows, COLUMNS, squeeze=False).ravel()
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    for axis, (title, panel) in zip(axes, panels, strict=False):
        axis.set_title(
            _plain(f"{title}{'' if title.endswith('?') else ':'} {panel.title}"), fontsize=10, loc="left", wrap=True
        )
        draw(axis, panel)
    data = io.BytesIO()
    figure.savefig(data, format="png", metadata=DRAWN)
    return data.getvalue()


def draw(axis: Any, panel: Chart | Matrix) -> None:
    """Draw a chart or a shaded table into Matplotlib's axes."""
    if isinstance(panel, Chart):
        _chart(axis, panel)
    else:
        _matrix(axis, panel)


def _chart(axis: Any, chart: Chart) -> None:
    for series in chart.series:
        colour, marker = COLOURS[series.style % len(COLOURS)], MARKERS[series.style % len(MARKERS)]
        x, y = [mark.x for mark in series.marks], [mark.y for mark in series.marks]
        if series.bars:
            axis.barh(y, x, color=colour, height=0.5)
            continue
        ends = [(mark.low, mark.high) for mark in series.marks]
        centre = x if series.across else y
        error = [
            [0.0 if low is None else max(0.0, at - low) for at, (low, _) in zip(centre, ends, strict=True)],
            [0.0 if high is None else max(0.0, high - at) for at, (_, high) in zip(centre, ends, strict=True)],
        ]
        axis.errorbar(
            x,
            y,
            **{"xerr" if series.across else "yerr": error},
            color=colour,
            marker=marker if series.shown else "",
            linestyle="-" if series.line else "",
            capsize=2,
            markersize=5,
            label=_plain(series.name, 40),
        )
    for reference in chart.references:
        colour = _GREY if reference.style is None else COLOURS[reference.style % len(COLOURS)]
        draw = axis.axvline if reference.upright else axis.axhline
        draw(reference.value, color=colour, linestyle="--", linewidth=1)
    if chart.diagonal:
        axis.plot([chart.x.low, chart.x.high], [chart.y.low, chart.y.high], color=_GREY, linestyle="--", linewidth=1)
    for side, spec in (("x", chart.x), ("y", chart.y)):
        if spec.log:
            getattr(axis, f"set_{side}scale")("log")
        ticks, names = [value for value, _ in spec.ticks], [_plain(name, 40) for _, name in spec.ticks]
        getattr(axis, f"set_{side}ticks")(ticks, names, fontsize=8)
        getattr(axis, f"set_{side}ticks")([], minor=True)
        getattr(axis, f"set_{side}lim")(spec.low, spec.high)
        getattr(axis, f"set_{side}label")(_plain(spec.label), fontsize=8)
    axis.grid(color="#dddfe3", linewidth=0.6)
    if any(not series.bars for series in chart.series) and (len(chart.series) > 1 or chart.rows):
        axis.legend(fontsize=8, frameon=False)


def _matrix(axis: Any, matrix: Matrix) -> None:
    shares = [[math.nan if share is None else share for share in row] for row in matrix.shares]
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=2, aspect="auto")
    axis.set_xticks(range(len(matrix.columns)), [_plain(name, 40) for name in matrix.columns], fontsize=8)
    axis.set_yticks(range(len(matrix.rows)), [_plain(name, 40) for name in matrix.rows], fontsize=8)
    for row, texts in enumerate(matrix.texts):
        for column, text in enumerate(texts):
            axis.text(column, row, _plain(text), ha="center", va="center", fontsize=8)


def _plain(text: str, most: int = 300) -> str:
    """Text without Matplotlib's mathematics, cut where it would fill the picture."""
    cut = text if len(text) <= most else text[: most - 1] + "…"
    return cut.replace("$", r"\$")

"""Charts, shaded tables and tables as values, whatever draws them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

MAX_SERIES = 8
"""Lines that a reader can still tell apart in one chart."""


@dataclass(frozen=True)
class Mark:
    """One value in a chart: its place, what it says, and the ends of its error bar, if any."""

    x: float
    y: float
    tip: str
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Series:
    """Marks that belong together.

    Attributes:
        name: for the legend.
        marks: in the order of x.
        style: number of its colour, marker and dash.
        line: whether the marks are joined.
        bars: whether each is a bar from the left edge.
        across: whether error bars lie along x.
        shown: whether each mark is drawn; a curve of many points is a line alone.
    """

    name: str
    marks: tuple[Mark, ...]
    style: int
    line: bool = True
    bars: bool = False
    across: bool = False
    shown: bool = True


@dataclass(frozen=True)
class Reference:
    """A dashed line through the chart at a value of y, or of x if ``upright``."""

    value: float
    label: str
    style: int | None = None
    upright: bool = False


@dataclass(frozen=True)
class Axis:
    """An axis: its range, its labelled ticks, and whether it is logarithmic."""

    label: str
    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    log: bool = False

    def place(self, value: float) -> float:
        """Where a value lies, from 0 at the low end to 1."""
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return (value - low) / (high - low)


@dataclass(frozen=True)
class Chart:
    """A chart.

    Attributes:
        rows: whether y has one named row a tick; the chart is then as high as they need.
        diagonal: whether the line y = x is drawn, where guessing lies.
    """

    title: str
    x: Axis
    y: Axis
    series: tuple[Series, ...]
    references: tuple[Reference, ...] = ()
    rows: bool = False
    diagonal: bool = False


@dataclass(frozen=True)
class Matrix:
    """A shaded table: ``shares`` in [0, 1] give the shade, ``texts`` what a cell says."""

    title: str
    corner: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    shares: tuple[tuple[float | None, ...], ...]
    texts: tuple[tuple[str, ...], ...]


class Cell(NamedTuple):
    """A table's cell: its text, and what it is sorted by if it is a number."""

    text: str
    value: float | None = None


@dataclass(frozen=True)
class Table:
    """A table; columns whose cells have values are numbers."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    @property
    def numeric(self) -> tuple[bool, ...]:
        """Whether each column holds numbers."""
        return tuple(any(row[index].value is not None for row in self.rows) for index in range(len(self.columns)))

    def without_empty(self) -> Table:
        """The table without columns in which nothing is known."""
        keep = [index for index in range(len(self.columns)) if any(row[index].text != UNKNOWN for row in self.rows)]
        columns = tuple(self.columns[index] for index in keep)
        return Table(self.caption, columns, tuple(tuple(row[index] for index in keep) for row in self.rows))


UNKNOWN = "–"


def size_text(size: float) -> str:
    """Bytes as a reader says them: ``1.19 MB``, ``6.6 kB``."""
    return f"{size / 1e6:.2f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"


def cell(value: float | None, form: str = "{:z.1f}") -> Cell:
    """A number's cell; a dash for None."""
    return Cell(UNKNOWN) if value is None else Cell(form.format(value), value)


@dataclass(frozen=True)
class Section:
    """One figure of the report with all that belongs to it.

    Attributes:
        key: its anchor.
        finding: what it shows, in a sentence.
        columns: those of the CSV that hold its numbers.
        missing: why there is nothing to show; empty if there is.
        notes: what a reader must know.
    """

    key: str
    title: str
    finding: str = ""
    charts: tuple[Chart, ...] = ()
    matrices: tuple[Matrix, ...] = ()
    tables: tuple[Table, ...] = ()
    columns: tuple[str, ...] = ()
    missing: str = ""
    notes: tuple[str, ...] = ()


def nice_axis(
    label: str,
    values: Iterable[float | None],
    *,
    least: float | None = None,
    most: float | None = None,
    span: float = 0.0,
) -> Axis:
    """A linear axis with some four to seven round ticks around values.

    Args:
        label: of the axis.
        values: to be shown; None is passed over.
        least: a value that is shown too.
        most: no tick lies above it, unless a value does.
        span: the axis is at least so long, so that small differences look small.

    >>> [text for _, text in nice_axis("y", [61.0, 88.5]).ticks]
    ['60', '65', '70', '75', '80', '85', '90']
    """
    known = [value for value in (*values, least) if value is not None]
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    spread = (max(span, 0.1 * max(abs(low), 1) if high - low < 1e-9 else 0.0) - (high - low)) / 2
    if spread > 0:
        low, high = low - spread, high + spread
    rough = (high - low) / 6
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(size * power for size in (1, 2, 2.5, 5, 10) if size * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    if most is not None and most >= high:
        last = min(last, math.ceil(most / step - 1e-9))
    ticks = tuple((index * step, f"{index * step:.10g}") for index in range(first, last + 1))
    return Axis(label, ticks[0][0], ticks[-1][0], ticks)


def whole_axis(label: str, values: Sequence[float]) -> Axis:
    """An axis of whole numbers, at most some ten of them named."""
    low, high = min(values), max(values)
    step = max(1, math.ceil((high - low) / 10))
    ticks = tuple((float(value), str(value)) for value in range(math.ceil(low), math.floor(high) + 1, step))
    return Axis(label, low - 0.3, high + 0.3, ticks)


def rows_axis(names: Sequence[str]) -> Axis:
    """Named rows from top to bottom, at 0, 1, 2..."""
    return Axis("", len(names) - 0.5, -0.5, tuple((float(index), name) for index, name in enumerate(names)))


def epsilon_axis(levels: Sequence[float | None], label: str) -> tuple[Axis, Callable[[float | None], float]]:
    """A logarithmic axis of epsilons with a place for "none" at its right; and the place of each epsilon."""
    known = sorted({level for level in levels if level is not None})
    low, high = (known[0], known[-1]) if known else (1.0, 1.0)
    step = max(1.6, (high / low) ** 0.18)
    end = high * step if None in levels else high
    ticks = [(value, f"{value:g}") for value in known]
    if None in levels:
        ticks.append((end, "none"))
    axis = Axis(f"{label} (logarithmic)", low / step**0.35, end * step**0.35, tuple(ticks), log=True)
    return axis, lambda epsilon: end if epsilon is None else epsilon


def extent(series: Iterable[Series], *, across: bool = False) -> list[float | None]:
    """All values that series reach along y, or along x, error bars included."""
    found: list[float | None] = []
    for one in series:
        for mark in one.marks:
            found.append(mark.x if across else mark.y)
            found += [mark.low, mark.high] if one.across == across else []
    return found

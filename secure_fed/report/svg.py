"""Charts as inline SVG: sized for a 390-pixel screen, coloured by the page's style sheet, readable without it."""

from __future__ import annotations

import math
from xml.etree.ElementTree import Element, SubElement, tostring

from secure_fed.report.chart import Chart, Mark, Reference, Series

STYLES = 8
"""Styles before they repeat: colour ``s0`` to ``s7`` in the style sheet, and a marker each."""
NARROW, WIDE = 370, 880
"""Widths that charts are drawn for; the page scales them to its columns."""

DASHED, DOTTED = "6 3", "1 4"
"""References: a series' own, and those of nobody."""
_DASHES = ("", "7 3", "2 3", "9 3 2 3", "5 5", "12 4", "2 6", "7 3 2 3 2 3")
_TOP, _RIGHT, _BOTTOM, _LEFT = 14.0, 14.0, 44.0, 44.0
_LABEL = 15.0


def draw(chart: Chart, name: str, width: int = NARROW) -> str:
    """A chart as an ``<svg>`` element.

    Each mark is an image with a name for screen readers and a ``<title>``; the first can be reached with Tab, the
    others by the page's script with arrow keys.

    Args:
        chart: the chart.
        name: id of the element that names it.
        width: in its own units, about one pixel each.
    """
    crowd = max(
        (sum(abs(mark.y - row) < 0.5 for one in chart.series for mark in one.marks) for row, _ in chart.y.ticks),
        default=1,
    )
    row_height = 32.0 + 8.0 * min(crowd, 6) if chart.rows else 0.0
    plot_height = row_height * len(chart.y.ticks) if chart.rows else width * (0.36 if width > 600 else 0.62)
    if chart.diagonal:
        plot_height = width - _LEFT - _RIGHT
    area = _Area(chart, 6.0 if chart.rows else _LEFT, _TOP, width - _RIGHT, _TOP + plot_height, row_height)
    height = area.bottom + _BOTTOM
    root = Element(
        "svg", {"viewBox": f"0 0 {width} {height:.0f}", "role": "group", "aria-labelledby": name, "class": "chart"}
    )
    _axes(root, area)
    for reference in chart.references:
        _reference(root, area, reference)
    if chart.rows:
        for row, text in chart.y.ticks:
            _text(root, area.left, area.top + row * area.row_height + 12, text, "name")
    for series in chart.series:
        _series(root, area, series)
    first = next((node for node in root.iter("g") if node.get("class", "").startswith("mark")), None)
    if first is not None:
        first.set("tabindex", "0")
    return tostring(root, encoding="unicode")


def sample(series: Series) -> str:
    """A legend's sample of a series."""
    root = Element("svg", {"viewBox": "0 0 26 14", "class": "glyph", "aria-hidden": "true"})
    if series.line:
        line = _line(root, 1, 7, 25, 7, f"line s{series.style % STYLES}")
        if not series.shown:
            line.set("stroke-dasharray", _DASHES[series.style % STYLES])
    if series.shown:
        root.append(_marker(series.style, 13, 7))
    return tostring(root, encoding="unicode")


def reference_sample(*, dotted: bool) -> str:
    """A legend's sample of references: dashed, in the colour of a series, or dotted."""
    root = Element("svg", {"viewBox": "0 0 26 14", "class": "glyph", "aria-hidden": "true"})
    _line(root, 1, 7, 25, 7, "line ref").set("stroke-dasharray", DOTTED if dotted else DASHED)
    return tostring(root, encoding="unicode")


class _Area:
    """Where values lie on the drawing."""

    def __init__(self, chart: Chart, left: float, top: float, right: float, bottom: float, row_height: float) -> None:
        self.chart, self.left, self.top, self.right, self.bottom = chart, left, top, right, bottom
        self.row_height = row_height

    def x(self, value: float) -> float:
        return self.left + self.chart.x.place(value) * (self.right - self.left)

    def y(self, value: float) -> float:
        if not self.chart.rows:
            return self.bottom - self.chart.y.place(value) * (self.bottom - self.top)
        row = math.floor(value + 0.5)
        lane = self.row_height - _LABEL
        return self.top + row * self.row_height + _LABEL + (0.5 + (value - row)) * lane


def _axes(root: Element, area: _Area) -> None:
    chart = area.chart
    for value, text in chart.y.ticks:
        if chart.rows:
            y = area.top + value * area.row_height
            if value:
                _line(root, area.left, y, area.right, y, "grid")
        else:
            _line(root, area.left, area.y(value), area.right, area.y(value), "grid")
            _text(root, area.left - 7, area.y(value) + 4, text, "tick", "end")
    last = -math.inf
    for value, text in chart.x.ticks:
        x = area.x(value)
        _line(root, x, area.bottom, x, area.bottom + 4, "axis")
        if chart.rows or chart.diagonal:
            _line(root, x, area.top, x, area.bottom, "grid")
        if x - last >= 12 + 3.5 * len(text):
            _text(root, min(x, area.right - 2.5 * len(text) + 6), area.bottom + 17, text, "tick", "middle")
            last = x
    _line(root, area.left, area.bottom, area.right, area.bottom, "axis")
    _text(root, (area.left + area.right) / 2, area.bottom + 37, chart.x.label, "label", "middle")
    if chart.diagonal:
        guessing = _line(root, area.left, area.bottom, area.right, area.top, "line ref")
        guessing.set("stroke-dasharray", DOTTED)


def _reference(root: Element, area: _Area, reference: Reference) -> None:
    kind = "ref" if reference.style is None else f"s{reference.style % STYLES}"
    if reference.upright:
        x = area.x(reference.value)
        line = _line(root, x, area.top, x, area.bottom, f"line {kind}")
    else:
        y = area.y(reference.value)
        line = _line(root, area.left, y, area.right, y, f"line {kind}")
    line.set("stroke-dasharray", DASHED if reference.style is not None else DOTTED)


def _series(root: Element, area: _Area, series: Series) -> None:
    style = f"s{series.style % STYLES}"
    group = SubElement(root, "g", {"class": "series", "role": "group", "aria-label": series.name})
    if series.line and len(series.marks) > 1:
        points = " ".join(f"{area.x(mark.x):.1f},{area.y(mark.y):.1f}" for mark in series.marks)
        path = SubElement(group, "polyline", {"points": points, "class": f"line {style}"})
        if not series.shown:
            path.set("stroke-dasharray", _DASHES[series.style % STYLES])
    for mark in series.marks:
        _mark(group, area, series, mark, style)


def _mark(group: Element, area: _Area, series: Series, mark: Mark, style: str) -> None:
    kind = "mark" if series.shown else "mark quiet"
    node = SubElement(group, "g", {"class": kind, "role": "img", "tabindex": "-1", "aria-label": mark.tip})
    SubElement(node, "title").text = mark.tip
    x, y = area.x(mark.x), area.y(mark.y)
    if series.bars:
        start = area.x(area.chart.x.low)
        bar = {"x": f"{start:.1f}", "y": f"{y - 7:.1f}", "width": f"{max(x - start, 1):.1f}", "height": "14"}
        SubElement(node, "rect", bar | {"class": f"bar {style}"})
        text = f"{mark.x:.1f}" if abs(mark.x) >= 10 else f"{mark.x:.2f}"
        inside = x + 40 > area.right
        _text(
            node,
            x - 5 if inside else x + 5,
            y + 4,
            text,
            "value inside" if inside else "value",
            "end" if inside else "start",
        )
        SubElement(node, "rect", bar | {"class": "hit"})
        return
    if mark.low is not None and mark.high is not None:
        ends = (area.x(mark.low), area.x(mark.high)) if series.across else (area.y(mark.low), area.y(mark.high))
        if series.across:
            _line(node, ends[0], y, ends[1], y, f"error {style}")
            for end in ends:
                _line(node, end, y - 3, end, y + 3, f"error {style}")
        else:
            _line(node, x, ends[0], x, ends[1], f"error {style}")
            for end in ends:
                _line(node, x - 3, end, x + 3, end, f"error {style}")
    node.append(_marker(series.style, x, y))
    SubElement(node, "circle", {"cx": f"{x:.1f}", "cy": f"{y:.1f}", "r": "11" if series.shown else "5", "class": "hit"})


def _marker(style: int, x: float, y: float) -> Element:
    """A shape of its own for each style, so that colour is not all that tells series apart."""
    kind, size = style % STYLES, 4.6
    classes = f"marker s{kind}"
    if kind == 0:
        return Element("circle", {"cx": f"{x:.1f}", "cy": f"{y:.1f}", "r": f"{size:.1f}", "class": classes})
    corners = {
        1: ((-1, -1), (1, -1), (1, 1), (-1, 1)),
        2: ((0, -1.25), (1.15, 0.95), (-1.15, 0.95)),
        3: ((0, -1.35), (1.35, 0), (0, 1.35), (-1.35, 0)),
        4: ((0, 1.25), (1.15, -0.95), (-1.15, -0.95)),
        5: ((-0.4, -1.2), (0.4, -1.2), (0.4, -0.4), (1.2, -0.4), (1.2, 0.4), (0.4, 0.4), (0.4, 1.2), (-0.4, 1.2),
            (-0.4, 0.4), (-1.2, 0.4), (-1.2, -0.4), (-0.4, -0.4)),
        6: ((-1.25, 0), (0.95, -1.15), (0.95, 1.15)),
        7: ((1.25, 0), (-0.95, -1.15), (-0.95, 1.15)),
    }[kind]  # fmt: skip
    points = " ".join(f"{x + size * dx:.1f},{y + size * dy:.1f}" for dx, dy in corners)
    return Element("polygon", {"points": points, "class": classes})


def _line(parent: Element, x1: float, y1: float, x2: float, y2: float, kind: str) -> Element:
    ends = {"x1": f"{x1:.1f}", "y1": f"{y1:.1f}", "x2": f"{x2:.1f}", "y2": f"{y2:.1f}"}
    return SubElement(parent, "line", ends | {"class": kind})


def _text(parent: Element, x: float, y: float, text: str, kind: str, anchor: str = "start") -> None:
    node = SubElement(parent, "text", {"x": f"{x:.1f}", "y": f"{y:.1f}", "class": kind, "text-anchor": anchor})
    node.set("aria-hidden", "true")
    node.text = text

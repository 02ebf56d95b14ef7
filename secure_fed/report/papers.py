"""Figures and tables as files for a paper: SVG and PDF, LaTeX and CSV."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

from secure_fed.core.storage import make_folder, refuse_foreign, write_durable
from secure_fed.report.chart import Chart, Matrix, Section, Table
from secure_fed.report.png import draw

_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--", "±": r"$\pm$", "×": r"$\times$",
}  # fmt: skip


_MADE_BY = "% by secfacmic\n"


def _is_ours(head: bytes) -> bool:
    return head.startswith(_MADE_BY.encode()) or (b"<svg" in head and b"<dc:title>secfacmic</dc:title>" in head)


def write_papers(sections: Iterable[Section], folder: Path) -> list[Path]:
    """Write every chart and shaded table as SVG and PDF, and every table as LaTeX (booktabs) and CSV.

    Args:
        sections: what is shown.
        folder: made if it is not there; files are named by section and number. Those of an earlier time are written
            over, and no others.

    Returns:
        What was written.

    Raises:
        OutputError: a file of one of these names is none of ours; nothing was written.
        StorageError: a file cannot be written.
    """
    make_folder(folder)
    products: list[tuple[Path, Callable[[], bytes]]] = []
    for section in sections:
        panels: tuple[Chart | Matrix, ...] = (*section.charts, *section.matrices)
        for number, panel in enumerate(panels, 1):
            stem = folder / (section.key if len(panels) == 1 else f"{section.key}-{number}")
            _refuse_others(stem, "svg", "pdf")
            products += [(stem.with_suffix(f".{form}"), partial(_picture, panel, form)) for form in ("svg", "pdf")]
        for number, table in enumerate(section.tables, 1):
            stem = folder / (section.key if len(section.tables) == 1 else f"{section.key}-{number}")
            _refuse_others(stem, "tex", "csv")
            products += [
                (stem.with_suffix(".tex"), (_MADE_BY + as_latex(table)).encode),
                (stem.with_suffix(".csv"), as_csv(table).encode),
            ]
    for path, content in products:
        write_durable(path, content())
    return [path for path, _ in products]


def _refuse_others(stem: Path, marked: str, beside: str) -> None:
    """The first file says itself that it is ours; the second is ours if it lies beside such a one."""
    first, second = (stem.with_suffix(f".{form}") for form in (marked, beside))
    refuse_foreign(first, _is_ours)
    refuse_foreign(second, lambda _: first.is_file())


def _picture(panel: Chart | Matrix, form: str) -> bytes:
    height = 0.7 + 0.45 * len(panel.y.ticks) if isinstance(panel, Chart) and panel.rows else 3.6
    figure = Figure(figsize=(5.2, height), layout="constrained")
    data = io.BytesIO()
    # Text stays text, ids and dates are left out: the same results give the same bytes.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "secfacmic", "pdf.fonttype": 42}):
        axis = figure.subplots()
        axis.set_title(panel.title, fontsize=10, loc="left", wrap=True)
        draw(axis, panel)
        ours = {"Creator": "secfacmic"}
        bare = ours | ({"Date": None} if form == "svg" else {"CreationDate": None, "Producer": None})
        figure.savefig(data, format=form, metadata=bare)
    return data.getvalue()


def as_csv(table: Table) -> str:
    """A table as CSV: numbers as they are, not as they are shown."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table.columns)
    writer.writerows([one.text if one.value is None else f"{one.value:.10g}" for one in row] for row in table.rows)
    return text.getvalue()


def as_latex(table: Table) -> str:
    """A table as LaTeX, with the rules of the package booktabs."""
    columns = "".join("r" if numeric else "l" for numeric in table.numeric)
    lines = [
        "% needs \\usepackage{booktabs}",
        f"\\begin{{tabular}}{{{columns}}}",
        "\\toprule",
        " & ".join(map(_escaped, table.columns)) + r" \\",
        "\\midrule",
        *(" & ".join(_escaped(one.text) for one in row) + r" \\" for row in table.rows),
        "\\bottomrule",
        "\\end{tabular}",
    ]
    return f"% {' '.join(table.caption.split())}\n" + "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return re.sub(r"[\\&%$#_{}~^–±×]", lambda match: _LATEX[match[0]], " ".join(text.split()))

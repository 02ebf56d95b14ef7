"""One self-contained page of results: what they are, what they cost, what to choose, and how to make them again.

``results`` reads folders, ``groups`` compares trials, ``recommendation`` says what to choose of a sweep,
``figures`` what is shown, ``chart`` is what a figure is made of, ``svg`` and ``png`` draw it, ``page`` lays it out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

from secure_fed.core.storage import is_drawn, refuse_foreign, write_durable
from secure_fed.report.groups import Analysis
from secure_fed.report.page import CSV_COLUMNS, MARKDOWN, as_csv, as_html, as_markdown, is_page
from secure_fed.report.results import read_results

Format = Literal["html", "md", "csv", "png"]
FORMATS: tuple[Format, ...] = get_args(Format)


def _is_report(head: bytes) -> bool:
    columns = f"{','.join(CSV_COLUMNS)},".encode()
    return is_page(head) or head.startswith((MARKDOWN.encode(), columns)) or is_drawn(head)


def write_report(folders: Sequence[Path], out: Path, form: Format, *, local_metrics: bool = False) -> Analysis:
    """Read folders and write their report. The same folders give the same bytes; png apart from its fonts.

    Args:
        folders: of ``simulate``, ``demo``, ``sweep``, ``attack`` or a site.
        out: the file.
        form: what to write.
        local_metrics: show a site's own metrics even where it has a privacy budget that did not pay for them.

    Returns:
        What was written about.

    Raises:
        OutputError: ``out`` is a folder, or a file that is no report.
        ReportError: a folder holds nothing to report, or something malformed.
        SecfacmicError: others, for files of a study, a site, a sweep or a ledger that do not hold.
    """
    analysis = Analysis(read_results(folders, local_metrics=local_metrics))
    refuse_foreign(out, _is_report)
    if form == "png":
        from secure_fed.report.png import as_png

        data = as_png(analysis)
    else:
        data = {"html": as_html, "md": as_markdown, "csv": as_csv}[form](analysis).encode()
    write_durable(out, data)
    return analysis

"""Where commands write: people's text to stderr, one JSON document to stdout when ``--json`` asks for it."""

from __future__ import annotations

import json
import logging
import time
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

console = Console(stderr=True)
out = Console()

Epsilon = Annotated[
    float | None, typer.Option(help="Privacy budget of each patient; once set, it can only be lowered.")
]
Delta = Annotated[float | None, typer.Option(help="The budget's delta; 1e-5 unless site.toml says otherwise.")]
Device = Annotated[
    Literal["auto", "cpu", "cuda"] | None,
    typer.Option(help="Where images are encoded and adapters trained, if not as site.toml says; auto is the default."),
]
SITE_HELP = "The site's site.toml, or its folder."
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, everything else on stderr.")]


class ConsoleHandler(logging.Handler):
    """Log records through the console, so that a live table and a warning do not overwrite each other."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one line."""
        console.print(f"{record.levelname} {record.getMessage()}", markup=False, highlight=False, soft_wrap=True)


class Pace:
    """How far a long job is, at what rate, and how long it will take yet."""

    def __init__(self) -> None:
        self._total, self._first, self._begun = -1, 0, 0.0

    def text(self, done: int, total: int) -> str:
        """As in ``3,200 of 100,000, 410/s, 4 min left``; a new job begins where the total changes or done falls."""
        now = time.monotonic()
        if total != self._total or done < self._first:
            self._total, self._first, self._begun = total, done, now
        rate = (done - self._first) / max(now - self._begun, 1e-9)
        if done == self._first or done == total:
            return f"{done:,} of {total:,}"
        left = (total - done) / rate
        remaining = f"{left:.0f} s" if left < 100 else f"{left / 60:.0f} min" if left < 6000 else f"{left / 3600:.1f} h"
        return f"{done:,} of {total:,}, {rate:.3g}/s, {remaining} left"


def print_json(document: Any) -> None:
    """Write one JSON document to stdout."""
    typer.echo(json.dumps(document, indent=2))

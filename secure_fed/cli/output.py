"""Where commands write: people's text to stderr, one JSON document to stdout when ``--json`` asks for it."""

from __future__ import annotations

import json
import logging
from typing import Annotated, Any

import typer
from rich.console import Console

console = Console(stderr=True)
out = Console()

Epsilon = Annotated[
    float | None, typer.Option(help="Privacy budget of each patient; once set, it can only be lowered.")
]
Delta = Annotated[float | None, typer.Option(help="The budget's delta; 1e-5 unless site.toml says otherwise.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, everything else on stderr.")]


class ConsoleHandler(logging.Handler):
    """Log records through the console, so that a live table and a warning do not overwrite each other."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one line."""
        console.print(f"{record.levelname} {record.getMessage()}", markup=False, highlight=False, soft_wrap=True)


def print_json(document: Any) -> None:
    """Write one JSON document to stdout."""
    typer.echo(json.dumps(document, indent=2))

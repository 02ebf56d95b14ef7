"""Where commands write: people's text to stderr, one JSON document to stdout when ``--json`` asks for it."""

from __future__ import annotations

import json
import logging
import re
import shlex
import shutil
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from secure_fed.core.errors import AddressError

_STEERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters that steer a terminal, or turn the order of what it shows; line feed and tab are text."""


class _Terminal(Console):
    """A console for text alone: names out of other people's files steer no terminal, and tables lose no letter."""

    def render_str(self, text: str, **how: Any) -> Text:
        """As rich does it, with a question mark for each character that is no text."""
        return super().render_str(_STEERS.sub("?", text), **how)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """As rich does it; what a table's column has no room for goes on in the next line instead of being cut."""
        if isinstance(renderable, Table):
            for column in renderable.columns:
                column.overflow = "fold"
        return super().render(renderable, options)


# No bracket in a name is a style, and no :word: a picture.
console = _Terminal(stderr=True, markup=False, emoji=False)
out = _Terminal(markup=False, emoji=False)

_DEVICES = re.compile(r"auto|cpu|cuda(:[0-9]{1,2})?")


def _device(value: str | None) -> str | None:
    if value is not None and not _DEVICES.fullmatch(value):
        raise typer.BadParameter(f"{value!r} is none; expected auto, cpu, cuda or a card by its number, as cuda:1")
    return value


Epsilon = Annotated[
    float | None, typer.Option(help="Privacy budget of each patient; once set, it can only be lowered.")
]
Delta = Annotated[float | None, typer.Option(help="The budget's delta; 1e-5 unless site.toml says otherwise.")]
AdapterPath = Annotated[Path, typer.Option(help="An adapter.safetensors: of a site, a simulation or an export.")]
Checkpoint = Annotated[
    Path | None, typer.Option(help="The backbone's weights, if they do not lie where the study says.")
]
SkipUnreadable = Annotated[bool, typer.Option(help="Go on without images that cannot be decoded.")]
Device = Annotated[
    str | None,
    typer.Option(
        metavar="auto|cpu|cuda|cuda:N",
        help="Where images are encoded and adapters trained; auto, unless site.toml says otherwise.",
        callback=_device,
    ),
]
Metrics = Annotated[
    str | None,
    typer.Option(
        metavar="[HOST:]PORT",
        help="Serve figures for Prometheus there, on 127.0.0.1 without a host, to who has STATE/metrics.token.",
    ),
]
SITE_HELP = "The site's site.toml, or its folder."
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, everything else on stderr.")]


class ConsoleHandler(logging.Handler):
    """Log records through the console, so that a live table and a warning do not overwrite each other."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one line."""
        console.print(f"{record.levelname} {record.getMessage()}", highlight=False, soft_wrap=True)


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


def host_and_port(text: str, option: str, host: str | None = None) -> tuple[str, int]:
    """Host and port of ``HOST:PORT``, an IPv6 address in brackets.

    Args:
        text: what was given.
        option: with which it was given.
        host: where a port alone is meant; None refuses it.

    Raises:
        AddressError: it is none.
    """
    before, colon, port = text.rpartition(":")
    if not colon and host is not None:
        before = host
    inside = before.removeprefix("[").removesuffix("]")
    bracketed = before == f"[{inside}]"
    if not inside or not (port.isascii() and port.isdigit()) or not 0 <= int(port) <= 65535:
        raise AddressError(f"{option} {text}: expected HOST:PORT with a port up to 65535, as 0.0.0.0:8443")
    if (":" in inside) != bracketed:
        raise AddressError(f"{option} {text}: expected an IPv6 address in brackets, and nothing else, as [::1]:8443")
    return inside, int(port)


def command_line(*words: str | Path) -> str:
    """A command line of secfacmic that a shell takes as it is: places quoted, the program as it was called here."""
    program, called = "secfacmic", Path(sys.argv[0])
    found = shutil.which(program)
    if called.name == program and called.exists() and (found is None or not called.samefile(found)):
        program = str(called)  # of an environment that is not on the path, as make demo's
    return shlex.join([program, *map(str, words)])


def print_json(document: Any) -> None:
    """Write one JSON document to stdout."""
    typer.echo(json.dumps(document, indent=2))

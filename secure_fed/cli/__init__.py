"""The command line: a thin file per noun; every refusal ends in one message and its own exit code."""

from __future__ import annotations

import logging
import sys

import typer

from secure_fed.cli import backbone, client, demo, phantoms, server, simulate, site, study
from secure_fed.cli.output import ConsoleHandler, console
from secure_fed.errors import SecfacmicError, StorageError

app = typer.Typer(
    name="secfacmic",
    help="Hospitals train one image classifier together and show each other nothing.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    add_completion=False,
)
app.add_typer(study.app, name="study")
app.add_typer(site.app, name="site")
app.add_typer(backbone.app, name="backbone")
app.add_typer(phantoms.app, name="phantoms")
app.command()(simulate.simulate)
app.command()(demo.demo)
app.command()(server.server)
app.command()(client.client)


def main() -> None:
    """Entry point of ``secfacmic``."""
    for package in ("secure_fed", "privacy", "clients", "server"):
        logging.getLogger(package).handlers = [ConsoleHandler()]
    try:
        app()
    except SecfacmicError as error:
        _end(str(error), error.exit_code)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _end(
            f"{where}{error.strerror or error}; check that the place exists, is yours and has room",
            StorageError.exit_code,
        )
    except KeyboardInterrupt:
        _end("interrupted; the same command goes on from here", 130)


def _end(message: str, code: int) -> None:
    console.print(f"secfacmic: {message}", markup=False, highlight=False, soft_wrap=True)
    sys.exit(code)

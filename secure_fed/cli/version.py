"""``secfacmic --version``: what is installed here, and which formats it reads and writes."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import typer

LIBRARIES = ("flwr", "torch", "tenseal")
"""Those whose version matters to the other parties of a study, or to its figures."""


def show(asked: bool) -> None:
    """Say it and end, if it was asked for."""
    if not asked:
        return
    from secure_fed.core.layout import FORMAT as STATE
    from secure_fed.operate.summary import FORMAT as SUMMARY
    from secure_fed.protocol.envelope import MAGIC as ENVELOPE
    from secure_fed.protocol.records import MAGIC as RECORD
    from secure_fed.protocol.study import STUDY_FORMAT, TEMPLATE_FORMAT

    typer.echo(f"secfacmic {version('secfacmic')}")
    typer.echo(f"Python {platform.python_version()}, {', '.join(f'{name} {_version(name)}' for name in LIBRARIES)}")
    typer.echo(
        f"formats: study {STUDY_FORMAT}, template {TEMPLATE_FORMAT}, state folder {STATE}, summary {SUMMARY}, envelope "
        f"{ENVELOPE.decode()}, journal record {RECORD.decode()}"
    )
    raise typer.Exit


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"  # as on a coordinator's machine

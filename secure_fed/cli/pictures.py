"""Which pictures of a folder a command takes, in the words of ``site.toml``, and what it tells of the others."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from secure_fed.cli.output import console

if TYPE_CHECKING:
    from secure_fed.clients.data import Choice
    from secure_fed.operate.predict import Probabilities

_KINDS: dict[str, Literal["scout", "screenshot"]] = {"scout": "scout", "screenshot": "screenshot"}


def _slices(value: str | None) -> str | None:
    from secure_fed.clients.sitefile import SLICES

    if value is not None and re.fullmatch(SLICES, value) is None:
        raise typer.BadParameter(f"{value!r}; expected middle, every:N or all")
    return value


def _leave_out(value: list[str] | None) -> list[str] | None:
    if strangers := set(value or ()) - set(_KINDS):
        raise typer.BadParameter(f"{min(strangers)!r}; expected scout or screenshot")
    return value


MostPixels = Annotated[
    int | None, typer.Option(min=1, help="Of one picture, as in site.toml; 40 million if not given.")
]
Slices = Annotated[
    str | None,
    typer.Option(metavar="RULE", help="Of each series, as in site.toml: middle, every:N or all.", callback=_slices),
]
LeaveOut = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KIND",
        help="DICOM files that are left out, as in site.toml: scout, screenshot.",
        callback=_leave_out,
    ),
]


def choice(slices: str | None, leave_out: list[str] | None) -> Choice:
    """The choice that the options make."""
    from secure_fed.clients.data import Choice

    return Choice(slices, tuple(_KINDS[kind] for kind in leave_out or ()))


def most(most_pixels: int | None) -> int:
    """Most pixels of one picture."""
    from secure_fed.clients.rules import MOST_PIXELS

    return most_pixels or MOST_PIXELS


def tell_pictures(found: Probabilities) -> None:
    """What was left out, passed over, chosen and doubted, a line each, on stderr."""
    for name, reason in found.unreadable.items():
        console.print(f"left out: {name}: {reason}", highlight=False, soft_wrap=True)
    for name, what in found.passed_over.items():
        console.print(f"passed over: {name}: {what}", highlight=False, soft_wrap=True)
    for line in found.told:
        console.print(line, highlight=False, soft_wrap=True)
    for doubt in found.doubts:
        console.print(f"doubt: {doubt.text}: {doubt.remedy}", highlight=False, soft_wrap=True)

"""The help pages of exit codes: the sections of ``docs/exit-codes.md``, which is part of the package."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_PACKAGED = Path(__file__).parent / "exit-codes.md"
_SOURCE = Path(__file__).parents[2] / "docs" / "exit-codes.md"
"""Where the page lies in a wheel, and in a checkout."""


@dataclass(frozen=True)
class Page:
    """What one exit code means.

    Attributes:
        name: of the error class, or a word for a code that is none.
        text: meaning, usual causes and what to do.
    """

    name: str
    text: str


def pages() -> dict[int, Page]:
    """All pages by exit code."""
    path = _PACKAGED if _PACKAGED.exists() else _SOURCE
    sections = re.findall(r"^### (\d+) (.+?)\n(.*?)(?=^### |\Z)", path.read_text(encoding="utf-8"), re.M | re.S)
    return {int(code): Page(name, text.strip()) for code, name, text in sections}

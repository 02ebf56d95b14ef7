"""What a check finds, and how to mend it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from secure_fed.core.errors import SecfacmicError

T = TypeVar("T")

END = "the study is over here, or closed: no process needs to run, and nothing that one would need was looked at"
"""What is found where nothing is left to do."""


@dataclass(frozen=True)
class Finding:
    """One check.

    Attributes:
        check: its name.
        ok: whether all is well.
        found: what was found.
        mend: what to do; empty if all is well.
    """

    check: str
    ok: bool
    found: str
    mend: str = ""


class Fault(Exception):
    """What is wrong, and how to mend it."""

    def __init__(self, found: str, mend: str) -> None:
        super().__init__(found)
        self.found = found
        self.mend = mend


def check(name: str, look: Callable[[], str]) -> Finding:
    """Look at one thing.

    Args:
        name: the check's.
        look: says what is well; raises what is not.
    """
    return attempt(name, lambda: (None, look()))[0]


def attempt(name: str, look: Callable[[], tuple[T, str]]) -> tuple[Finding, T | None]:
    """Look at one thing that later checks need.

    Args:
        name: the check's.
        look: gives it, and says what is well; raises what is not.

    Returns:
        What was found, and the thing; None if it failed.
    """
    try:
        thing, text = look()
        return Finding(name, True, text), thing
    except Fault as fault:
        return Finding(name, False, fault.found, fault.mend), None
    except SecfacmicError as error:
        return Finding(name, False, str(error), f"as it says; more: secfacmic explain {error.exit_code}"), None
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        reason = error.strerror or type(error).__name__
        return Finding(name, False, f"{where}{reason}", "check that the place exists and is yours"), None

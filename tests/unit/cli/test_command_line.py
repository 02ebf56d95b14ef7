"""What commands tell at their end: command lines to be typed, and which method beats which."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from secure_fed.cli.output import command_line
from secure_fed.cli.simulate import ranked


def test_a_command_line_is_one_that_a_shell_takes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Places are quoted, and the program is called as it was, if its name alone would be another or none."""
    installed, other = tmp_path / "venv" / "secfacmic", tmp_path / "bin" / "secfacmic"
    for program in (installed, other):
        program.parent.mkdir()
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
    words = ("report", Path("my images/it's one"), "DIR...")
    for on_the_path, called, expected in (
        (tmp_path, installed, str(installed)),
        (other.parent, installed, str(installed)),
        (installed.parent, installed, "secfacmic"),
        (tmp_path, Path("pytest"), "secfacmic"),
    ):
        monkeypatch.setenv("PATH", str(on_the_path))
        monkeypatch.setattr("sys.argv", [str(called)])
        assert shlex.split(line := command_line(*words)) == [expected, *map(str, words)]
        assert line.endswith(" DIR...")


def test_no_method_beats_one_of_the_same_figure() -> None:
    assert ranked([(0.3333, "b"), (0.75, "a"), (0.33331, "c"), (0.3, "d")]) == "a 75.0 > c 33.3 = b 33.3 > d 30.0"
    assert ranked([(0.5, "first"), (0.5, "second")]) == "first 50.0 = second 50.0"

"""Command lines that are told, to be typed."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from secure_fed.cli.output import command_line


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

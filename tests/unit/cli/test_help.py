"""``--help`` is there at once: it takes no more than half a second, most of it for Python, typer and pydantic."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version

import click
import pytest

from secure_fed.cli import command

HEAVY = {
    *("torch", "torchvision", "open_clip", "opacus", "tenseal", "flwr", "grpc", "ray", "onnx", "transformers", "timm"),
    *("scipy", "sklearn", "matplotlib", "PIL", "imagehash", "pydicom", "prometheus_client", "fastapi", "uvicorn"),
}
"""What takes long to import, or what no help needs."""


def test_help_imports_nothing_that_takes_long() -> None:
    program = f"""
import sys
from secure_fed.cli import main
sys.argv = ["secfacmic", "--help"]
try:
    main()
except SystemExit as end:
    assert not end.code
print(sorted({HEAVY!r} & set(sys.modules)), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True)
    assert "simulate" in done.stdout
    assert done.stderr.strip() == "[]"


def test_lists_of_commands_are_whole_in_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is cut off with dots, and no line is longer; dots in the usage line mean repetition."""
    monkeypatch.setenv("COLUMNS", "80")
    pages = 0
    for name, group in groups("secfacmic", command()):
        text = group.get_help(click.Context(group, info_name=name, terminal_width=80))
        lines = [line for line in text.splitlines() if not line.startswith("Usage: ")]
        pages += 1
        assert not [line for line in lines if "..." in line or len(line) > 80], name
    assert pages > 8


def groups(name: str, found: click.Command) -> Iterator[tuple[str, click.Group]]:
    if isinstance(found, click.Group):
        yield name, found
        for inner, each in found.commands.items():
            yield from groups(f"{name} {inner}", each)


@pytest.mark.parametrize("asked", [("--version",), ("study", "list"), ("study", "show", "demo", "--toml")])
def test_what_is_asked_for_first_is_said_at_once(asked: tuple[str, ...]) -> None:
    done = ended(*asked)
    assert (done.returncode, done.stderr) == (0, "[]\n")
    assert done.stdout


def test_an_unknown_study_or_sweep_lists_the_packaged_ones_at_once() -> None:
    for arguments, close in (
        (("simulate", "brain-mri", "--out", "x"), "did you mean brain_mri?"),
        (("demo", "hospital"), "did you mean hospitals?"),
        (("study", "new", "zzz", "--out", "x"), "of that name; packaged are"),
        (("study", "check", "brain_mrii"), "did you mean brain_mri?"),
        (("sweep", "smok", "--out", "x"), "did you mean smoke?"),
    ):
        done = ended(*arguments)
        assert done.returncode in (10, 16), done.stderr
        assert close in done.stderr
        assert done.stderr.endswith("[]\n"), done.stderr
        assert "┃" not in done.stderr  # no empty table


def test_versions_of_the_parties_libraries_and_of_formats() -> None:
    first, second, third = ended("--version").stdout.splitlines()
    assert first == f"secfacmic {version('secfacmic')}"
    assert all(f"{name} {version(name)}" in second for name in ("flwr", "torch", "tenseal"))
    assert third == ("formats: study 2, template 1, state folder 1, summary 2, envelope SFE2, journal record SFR2")


def test_the_shell_is_told_how_to_complete() -> None:
    asked = {"_SECFACMIC_COMPLETE": "complete_bash", "COMP_WORDS": "secfacmic stu", "COMP_CWORD": "1"}
    program = "import sys; sys.argv = ['secfacmic']; from secure_fed.cli import main; main()"
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, env=os.environ | asked)
    assert done.stdout.split() == ["study"]


def ended(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own; the last line of stderr is what heavy things it has loaded."""
    program = f"""
import sys
from secure_fed.cli import main
sys.argv = {["secfacmic", *arguments]!r}
try:
    main()
finally:
    print(sorted({HEAVY!r} & set(sys.modules)), file=sys.stderr)
"""
    return subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=False)

"""Every exit code has a help page, and the command that prints it works for each."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from secure_fed.cli import app
from secure_fed.core import errors
from secure_fed.core.exit_codes import pages

ROOT = Path(__file__).parents[3]


def kinds() -> dict[int, type[errors.SecfacmicError]]:
    found = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    return {kind.exit_code: kind for kind in found if issubclass(kind, errors.SecfacmicError)}


def test_every_error_class_has_a_page() -> None:
    known = pages()
    missing = [
        f"### {code} {kind.__name__}"
        for code, kind in sorted(kinds().items())
        if code not in known or known[code].name != kind.__name__
    ]
    assert not missing, f"docs/exit-codes.md lacks {missing}: say what it means, what it mostly comes from, what to do"


def test_every_page_is_of_a_code_that_exists_and_says_something() -> None:
    others = {0, 1, 2, 130}
    for code, page in pages().items():
        assert code in others or code in kinds(), f"docs/exit-codes.md explains {code}, which nothing ends with"
        assert len(page.text) > 80, f"### {code} {page.name}: too short to help"


def test_codes_lie_in_the_range_of_their_kind() -> None:
    """The ranges of the page's table are those of the classes: a code outside all of them has no kind."""
    text = (ROOT / "docs" / "exit-codes.md").read_text()
    ranges = [(int(a), int(b)) for a, b in re.findall(r"^\| (\d+) to (\d+) \|", text, re.MULTILINE)]
    for code in kinds():
        assert any(low <= code <= high for low, high in ranges), code


@pytest.mark.parametrize("code", [*sorted(kinds()), 0, 1, 2, 130])
def test_explain_prints_the_page(code: int) -> None:
    page = pages()[code]
    printed = CliRunner().invoke(app, ["explain", str(code)])
    assert printed.exit_code == 0
    assert printed.output.splitlines()[0] == f"{code} {page.name}"
    assert " ".join(page.text.split()) in " ".join(printed.output.split())
    shown = json.loads(CliRunner().invoke(app, ["explain", str(code), "--json"]).output)
    assert shown == {"code": code, "name": page.name, "text": page.text}


def test_a_code_that_nothing_ends_with() -> None:
    refused = CliRunner().invoke(app, ["explain", "99"])
    assert refused.exit_code == 2
    assert "expected one of" in refused.output


@pytest.mark.slow
def test_the_pages_are_in_the_wheel(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read("secure_fed/exit-codes.md") == (ROOT / "docs" / "exit-codes.md").read_bytes()

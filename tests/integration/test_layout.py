"""Who may import what, and under which name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FORBIDDEN = (
    *("torch", "open_clip", "opacus", "tenseal", "pyrage", "sklearn"),
    *("secure_fed.privacy", "secure_fed.model", "secure_fed.clients"),
)
LINKED = ("clients", "configs", "privacy", "server")


def run(program: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True)


@pytest.mark.parametrize(
    "module",
    [
        "secure_fed.server.coordinator",
        "secure_fed.server.journal",
        "secure_fed.protocol.records",
        "secure_fed.protocol.study",
    ],
)
def test_the_server_loads_nothing_that_trains_or_decrypts(module: str) -> None:
    program = f"import sys, {module}; print(sorted(set(sys.modules) & {set(FORBIDDEN)!r}))"
    result = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("name", LINKED)
def test_a_folder_has_no_second_name(name: str, tmp_path: Path) -> None:
    """Neither in a checkout, where the folder lies on the path, nor elsewhere."""
    for folder in (ROOT, tmp_path):
        result = run(f"import {name}", folder)
        assert result.returncode == 1
        assert f"import it as secure_fed.{name}" in result.stderr or f"No module named '{name}'" in result.stderr
        assert run(f"import secure_fed.{name}", folder).returncode == 0


def test_no_loaded_file_stands_under_two_names() -> None:
    program = """
import collections, os, sys
import secure_fed.cli, secure_fed.clients.site, secure_fed.server.coordinator, tests.conftest
files = collections.defaultdict(set)
for name, module in list(sys.modules.items()):
    file = getattr(module, "__file__", None)
    if file and os.path.realpath(file).startswith(os.getcwd() + os.sep) and ".venv" not in file and name != "__main__":
        files[os.path.realpath(file)].add(name)
print(len(files) > 60, {file: names for file, names in files.items() if len(names) > 1})
"""
    assert run(program, ROOT).stdout.strip() == "True {}"


def test_the_process_of_the_rounds_holds_no_module_twice() -> None:
    """What ``-m`` runs has the name ``__main__``; imported beside that, it would be there again under its own."""
    program = """
import runpy, sys
try:
    runpy.run_module("secure_fed.server.rounds_process", run_name="__main__")
except ValueError:  # it was given no set-up
    print("secure_fed.server.round_loop" in sys.modules, "secure_fed.server.rounds_process" in sys.modules)
"""
    result = subprocess.run(
        [sys.executable, "-P", "-c", program], stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert result.stdout.strip() == "True False", result.stderr


def test_this_very_session_has_one_name_a_file() -> None:
    """Also with what pytest loads by itself."""
    names = [
        name for name, module in sys.modules.items() if str(getattr(module, "__file__", "")).endswith("conftest.py")
    ]
    assert names == ["tests.conftest"]


def test_a_checkout_without_symbolic_links_says_so(tmp_path: Path) -> None:
    package = tmp_path / "secure_fed"
    package.mkdir()
    (package / "__init__.py").write_bytes((ROOT / "secure_fed" / "__init__.py").read_bytes())
    (package / "clients").write_text("../clients")
    result = run("import secure_fed", tmp_path)
    assert result.returncode == 1
    assert "no symbolic links" in result.stderr

"""State folders: their names stand in one file, and a folder of another layout is refused."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest

from secure_fed.core import layout
from secure_fed.core.errors import StateFormatError
from secure_fed.core.layout import FORMAT, RunState, ServerRun, ServerState, SiteRun, SiteState, StateFolder

ROOT = Path(__file__).parents[3]
ROOMS = ("cli", "core", "lab", "model", "operate", "protocol", "report", "transport")
FOLDERS = [*(ROOT / name for name in ("clients", "privacy", "server")), *(ROOT / "secure_fed" / name for name in ROOMS)]

OTHERS = {
    # An example for whoever writes site.toml.
    ("clients/sitefile.py", "features.sqlite"),
    # An evidence archive has names of its own; some are the same.
    ("secure_fed/operate/evidence.py", "journal"),
    ("secure_fed/operate/evidence.py", "sent.jsonl"),
}
"""File and name of what looks like a state folder's and is none."""


def _named() -> set[str]:
    """Every part of every path that the layout gives."""
    base = Path("base")
    found = set()
    for kind in (SiteState, ServerState, SiteRun, ServerRun):
        for name, member in inspect.getmembers(kind):
            if isinstance(member, property) and name != "current_run":
                found |= set(getattr(kind(base), name).relative_to(base).parts)
    run = ServerRun(base)
    for path in (run.amendment("k"), SiteRun(base).pin(1)):
        found.add(path.relative_to(base).parts[0])
    return found


def _strings(tree: ast.AST) -> Iterator[tuple[str, bool]]:
    """All text of a module, docstrings but not f-strings' plain parts included; and whether it is part of a path."""
    path_parts = set()
    for node in ast.walk(tree):
        parts: list[ast.expr] = []
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
            parts = [node.left, node.right]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
            if called in ("glob", "rglob", "joinpath", "with_name", "Path"):
                parts = node.args
        path_parts |= {id(inner) for part in parts for inner in ast.walk(part)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value, id(node) in path_parts


def _offences(source: str, names: set[str]) -> set[str]:
    """Names of state folders in a module: as part of a path, or anywhere if only a file has such a name."""
    found = set()
    for text, in_path in _strings(ast.parse(source)):
        parts = {text} if not in_path else set(text.split("/"))
        found |= {part for part in parts & names if in_path or "." in part}
        found |= {text for suffix in (".record", ".sealed", ".envelope", ".integers") if text.endswith("*" + suffix)}
        found |= {text} & {"08d", "06d"}
    return found


def test_names_of_state_folders_stand_nowhere_but_in_the_layout() -> None:
    names = _named()
    assert {"runs", "outbox", "heads", "pins", "journal", "coordinator.key", "tls", "status.json", "log"} <= names
    found = {
        (path.relative_to(ROOT).as_posix(), name)
        for folder in FOLDERS
        for path in folder.rglob("*.py")
        if path != Path(layout.__file__)
        for name in _offences(path.read_text(encoding="utf-8"), names)
    }
    assert found == OTHERS


@pytest.mark.parametrize(
    "line",
    [
        'path = state / "runs" / run',
        'path = state / "server/tls"',
        'KEY = "coordinator.key"',
        'paths = state.glob("runs/*/outbox/*")',
        'paths = journal.glob("*.record")',
        'path = folder / f"{number:08d}"',
        'path = Path(state, "heads")',
    ],
)
def test_the_search_finds(line: str) -> None:
    assert _offences(line, _named())


def test_what_is_no_path_is_not_found() -> None:
    assert not _offences('facts = {"run": run, "log": [], "keys": f"{left / right}"}; app(name="journal")', _named())


@pytest.mark.parametrize("kind", [SiteState, ServerState, StateFolder])
def test_a_folder_of_version_0_1_names_no_layout_and_is_read(kind: type[StateFolder], tmp_path: Path) -> None:
    (tmp_path / "run").write_text("ab" * 32)
    assert kind(tmp_path).current_run == "ab" * 32
    assert kind(tmp_path / "absent").current_run is None
    assert not (tmp_path / "format").exists()  # looking changes nothing


@pytest.mark.parametrize("kind", [SiteState, ServerState, StateFolder])
@pytest.mark.parametrize("found", [str(FORMAT + 1), "0", "", "one"])
def test_a_folder_of_another_layout_is_refused_with_both_versions(
    kind: type[StateFolder], found: str, tmp_path: Path
) -> None:
    (tmp_path / "format").write_text(f"{found}\n")
    with pytest.raises(StateFormatError, match=rf"layout '{found}'.*reads layout {FORMAT}"):
        kind(tmp_path)


def test_a_folder_that_is_begun_names_its_layout(tmp_path: Path) -> None:
    state = SiteState(tmp_path / "new" / "state")
    state.begin()
    state.begin()
    assert (state.path / "format").read_text() == f"{FORMAT}\n"
    assert SiteState(state.path) == state


def test_names_sort_as_numbers_do() -> None:
    run = SiteRun(Path("run"))
    assert run.head(9) < run.head(10) < run.head(1000)
    assert layout.record_file(RunState(Path("run")).journal, 3) == Path("run/journal/00000003.record")
    assert ServerRun(Path("run")).spooled(3, 2) == Path("run/spool/00000003/0002")


def test_only_rounds_with_an_update_are_in_the_outbox(tmp_path: Path) -> None:
    run = SiteRun(tmp_path)
    run.outbox.mkdir()
    for path in (run.integers(2), run.envelope(2), run.envelope(11), run.withdrawn(4)):
        path.touch()
    assert run.updates() == [2, 11]

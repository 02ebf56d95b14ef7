"""What code and pages refer to is there: pages, anchors, files, names; nothing outside the repository is needed."""

from __future__ import annotations

import configparser
import re
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = (
    *("benchmarks", "clients", "configs", "deploy", "docs", "examples"),
    *("privacy", "scripts", "secure_fed", "server", "tests"),
)
TEXT = {
    *("", ".cfg", ".css", ".html", ".ipynb", ".js", ".json", ".md", ".py", ".service"),
    *(".svg", ".toml", ".txt", ".yaml", ".yml"),
}
WRITTEN = {"report.md", "r.md"}
"""Pages that programs and tests write."""
SITE = {Path("mkdocs.yml"), Path("scripts/docs_site.py")}
"""They name pages that are made when the site is built, which fails if one is missing."""

PAGE = re.compile(r"(?<![\w/.*{}-])(?:[\w.-]+/)*[\w.-]+\.md\b")
LINK = re.compile(r"(?<!\\)\]\(([^()\s]+)\)")
CODE_FILE = re.compile(r"(?<![\w/.-])((?:[\w.-]+/)+[\w.-]+\.(?:py|toml|json|svg|yaml|ipynb))\b")
MODULE = re.compile(r"\bsecure_fed(?:\.\w+)+")
ABROAD = re.compile(r"""\.\./shared/|(?<![\w.}<>"'~/-])/(?:home|root|mnt|work|Users)/|\bPath\("\.\./""")


@cache
def texts() -> dict[Path, str]:
    """All text files of the repository, by path from its root."""
    found = [path for path in ROOT.iterdir() if path.is_file() and path.name != ".git"]  # a worktree's is a file
    found += [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()]
    known = {path.resolve().relative_to(ROOT) for path in found if path.suffix in TEXT or path.name == "Makefile"}
    return {
        path: (ROOT / path).read_text(encoding="utf-8") for path in sorted(known) if "__pycache__" not in path.parts
    }


def pages() -> list[Path]:
    return [path for path in texts() if path.suffix == ".md"]


def prose(path: Path) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^( *)```.*?^\1```$", "", texts()[path], flags=re.DOTALL | re.MULTILINE)


def slugs(title: str) -> set[str]:
    """The anchor of a heading on GitHub, and on a site made by Python-Markdown."""
    plain = re.sub(r"[^\w\s-]", "", re.sub(r"[`*]|\]\([^)]*\)", "", title)).strip().lower()
    return {plain.replace(" ", "-"), re.sub(r"[-\s]+", "-", plain)}


def anchors(path: Path) -> Iterator[str]:
    """Those that hold in both places."""
    for title in re.findall(r"^#+ (.+)$", prose(path), flags=re.MULTILINE):
        both = slugs(title)
        if len(both) == 1:
            yield from both


def test_every_page_that_is_named_is_there() -> None:
    known = {page.name for page in pages()}
    lost = []
    for path, text in ((path, text) for path, text in texts().items() if path not in SITE):
        for name in PAGE.findall(text):
            page = Path(name)
            places = (ROOT / page, ROOT / path.parent / page, ROOT / "docs" / page)
            exact = any(place.resolve().is_file() for place in places)
            if page.name not in WRITTEN and not (exact if "docs" in page.parts else page.name in known):
                lost.append(f"{path}: {name}")
    assert lost == []


@pytest.mark.parametrize("path", pages(), ids=str)
def test_links_lead_somewhere_in_the_repository(path: Path) -> None:
    lost = []
    for target in LINK.findall(prose(path)):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        aim = (ROOT / path.parent / file).resolve() if file else ROOT / path
        inside = aim.is_relative_to(ROOT) and aim.exists()
        if not inside or (anchor and anchor not in anchors(aim.relative_to(ROOT))):
            lost.append(target)
    assert lost == []


@pytest.mark.parametrize("path", pages(), ids=str)
def test_files_and_modules_that_a_page_names_are_there(path: Path) -> None:
    text = prose(path)
    lost = [
        name
        for name in CODE_FILE.findall(text)
        if (ROOT / name).parts[len(ROOT.parts)] in FOLDERS and not (ROOT / name).exists()
    ]
    lost += [name for name in MODULE.findall(text) if not is_in_the_code(name)]
    assert lost == []


def is_in_the_code(name: str) -> bool:
    """Whether a dotted name is a module, or a module and what is in it."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        stem = ROOT.joinpath(*parts[:length])
        for path in (stem.with_suffix(".py"), stem / "__init__.py"):
            if path.exists():
                return set(parts[length:]) <= set(re.findall(r"\w+", path.read_text(encoding="utf-8")))
    return False


@pytest.mark.parametrize("path", sorted(path for path in pages() if path.parent == Path("docs")), ids=str)
def test_a_page_says_first_what_it_needs_and_how_long_it_takes(path: Path) -> None:
    """Two hundred words a minute; a page that has grown or shrunk by a fifth must say so."""
    said = re.match(r"# .+\n\n\*\*Needs\*\* .+\. \*\*Reading\*\* (\d+) min\.\n\n", texts()[path])
    assert said is not None
    minutes = len(prose(path).split()) / 200
    assert abs(int(said[1]) - minutes) <= max(1.0, minutes / 5)


def test_the_page_for_the_officer_is_short_and_has_no_formula() -> None:
    page = (ROOT / "docs/data-protection.md").read_text(encoding="utf-8")
    assert len(page.split()) <= 600
    assert not set("=^\u03b5\u03b4\u03c3\u00b5") & set(page)


def test_the_first_page_leads_each_of_the_four_to_pages_and_every_command_of_it_is_one() -> None:
    from secure_fed.cli import command

    page = Path("docs/start.md")
    parts = re.split(r"^## ", texts()[page], flags=re.MULTILINE)[1:]
    assert [part.split()[-1] for part in (one.partition("\n")[0] for one in parts)] == [
        *("hospital", "coordinator", "researcher", "officer"),
    ]
    assert all(len(LINK.findall(part)) >= 3 for part in parts)
    named = set(re.findall(r"`secfacmic (\w+)", texts()[page]))
    assert named
    assert named <= set(command().commands)  # type: ignore[attr-defined]


def test_the_glossary_has_each_word_once_in_order() -> None:
    words = re.findall(r"^\| ([^|]+) \| ", texts()[Path("docs/glossary.md")], flags=re.MULTILINE)[1:]
    assert words == sorted(set(words), key=str.lower)
    assert {"adapter", "epsilon", "journal", "ledger", "site", "study", "update"} <= set(words)
    # The words of a round, which README draws.
    drawn = set(re.findall(r"\b[A-Z]{5,}\b", texts()[Path("README.md")].partition("## A round")[2].partition("## ")[0]))
    assert drawn
    assert drawn <= {part for word in words for part in word.split(", ")}


def test_nothing_refers_to_a_file_outside_the_repository() -> None:
    own = Path(__file__).relative_to(ROOT)
    found = [
        f"{path}:{number}: {line.strip()}"
        for path, text in texts().items()
        for number, line in enumerate(text.splitlines(), 1)
        if path != own and ABROAD.search(line)
    ]
    assert found == []


def test_brain_mri_asks_for_its_folder() -> None:
    result = subprocess.run(["make", "--dry-run", "brain-mri"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode != 0
    assert "DATA is not set; expected a folder of brain MRI" in result.stderr
    named = subprocess.run(["make", "--dry-run", "brain-mri", "DATA=scans"], cwd=ROOT, capture_output=True, text=True)
    assert named.returncode == 0
    assert "--data scans" in named.stdout


# --- the architecture's page ---


def test_every_room_is_on_the_architectures_page() -> None:
    contracts = configparser.ConfigParser()
    contracts.read(ROOT / ".importlinter")
    layers = contracts["importlinter:contract:layers"]["layers"]
    page = texts()[Path("docs/architecture.md")]
    assert [room for room in re.findall(r"\w+", layers) if f"`{room}`" not in page] == []


def test_names_on_the_architectures_page_are_in_the_code() -> None:
    """So that whoever renames a function finds the page."""
    code = "\n".join(text for path, text in texts().items() if path.suffix == ".py")
    words = set(re.findall(r"\w+", code))
    names = re.findall(r"`([A-Za-z_]\w*(?:\.\w+)*)(?:\(\))?`", prose(Path("docs/architecture.md")))
    assert len(names) > 30
    assert [name for name in names if not set(name.split(".")) <= words] == []


# --- decisions ---

DECISIONS = ROOT / "docs" / "decisions"
PARTS = ("Context", "Decision", "Evidence", "Consequences", "What would change it")


@pytest.mark.parametrize("path", sorted(DECISIONS.glob("0*.md")), ids=lambda path: path.stem)
def test_a_decision_has_its_parts(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert re.match(rf"# {path.stem[:4]}\. \S", text), "a title with its number"
    status = re.search(
        r"^Status: (accepted|superseded by|accepted, superseded in part by)(.*)\. (\d{4}-\d\d-\d\d)\.$", text, re.M
    )
    assert status is not None, "Status: ... and a date"
    if "superseded" in status[1]:
        assert re.search(r"\]\(\d{4}-[\w-]+\.md\)", status[2]), "a link to what supersedes it"
    assert [part for part in PARTS if f"\n## {part}\n" not in text] == []
    assert len(text.splitlines()) <= 70


def test_the_index_names_every_decision_once() -> None:
    index = (DECISIONS / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"\]\((\d{4}-[\w-]+\.md)\)", index)
    assert sorted(listed) == sorted({path.name for path in DECISIONS.glob("0*.md")})
    numbers = [name[:4] for name in listed]
    assert numbers == sorted(set(numbers))

"""The reference that ``make docs`` makes: it says something of every key, command and option, or is an error."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, get_args

import click
import pytest
import typer
from pydantic import Field

from secure_fed.cli import app
from secure_fed.core.tomlfile import FileModel

sys.path.insert(0, str(Path(__file__).parents[3] / "scripts"))
import reference

GUIDE = Path(__file__).parents[3] / "docs" / "api.md"


class Inner(FileModel):
    """A table within.

    Attributes:
        size: of the thing,
            in metres | feet.
    """

    size: Annotated[int, Field(ge=1, le=4096)] = 7


class Outer(FileModel):
    """A file.

    Attributes:
        inner: the tables.
    """

    inner: tuple[Inner, ...]


class Silent(FileModel):
    """A file with a key that nobody has described.

    Attributes:
        inner: said.
    """

    inner: Inner
    size: int


def keys(model: type[FileModel]) -> Iterator[str]:
    """Every key of a model and the models in it, found by another way than the generator's."""
    waiting: list[object] = [model]
    while waiting:
        found = waiting.pop()
        waiting += get_args(found)
        if isinstance(found, type) and issubclass(found, FileModel):
            yield from found.model_fields
            waiting += [field.annotation for field in found.model_fields.values()]


@pytest.mark.parametrize("page", list(reference.FILES))
def test_every_key_of_a_file_has_type_default_and_meaning(page: str) -> None:
    name, model, introduction = reference.FILES[page]
    rows = [line for line in reference.file_page(name, model, introduction).splitlines() if line.startswith("| `")]
    assert sorted(row.split("`")[1] for row in rows) == sorted(keys(model))
    for row in rows:
        cells = row.strip("| ").split(" | ")
        assert len(cells) == 4, row
        assert all(cells), row


def test_a_row_says_what_the_model_says() -> None:
    page = reference.file_page("x.toml", Outer, "What it is.")
    assert "## `[[inner]]`\n\nA table within.\n" in page
    assert "| `size` | integer, 1 to 4,096 | `7` | of the thing, in metres &#124; feet. |" in page
    assert "| `inner` | array, each table | required | the tables. |" in page


def test_a_key_without_a_description_is_an_error() -> None:
    with pytest.raises(reference.Undescribed, match=r"key size of the top has no description.*Silent"):
        reference.file_page("x.toml", Silent, "What it is.")


def test_every_command_and_option_stands_in_the_reference() -> None:
    page = reference.commands_page()
    commands = list(reference.walk(typer.main.get_command(app), "secfacmic"))
    assert len(commands) > 40
    for path, command in commands:
        section = page.partition(f"## `{path}`\n")[2].partition("\n## ")[0]
        assert section, path
        for parameter in command.params if not isinstance(command, click.Group) else ():
            if isinstance(parameter, click.Option):
                assert f"<code>{', '.join(parameter.opts)}" in section, (path, parameter.opts)


def test_an_option_or_a_command_without_a_description_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    silent = typer.Typer()

    @silent.command()
    def do(thing: str = "") -> None:
        """Do it."""

    monkeypatch.setattr(reference, "app", silent)
    with pytest.raises(reference.Undescribed, match="--thing has no description"):
        reference.commands_page()
    silent = typer.Typer()

    @silent.command()
    def do_not() -> None:
        pass

    monkeypatch.setattr(reference, "app", silent)
    with pytest.raises(reference.Undescribed, match="secfacmic has no description"):
        reference.commands_page()


def test_names_for_programs_are_those_that_the_guide_names() -> None:
    page = reference.names_page(GUIDE.read_text())
    for name in ("Coordinator", "Site", "Study", "simulate", "with_settings", "load_study"):
        assert f".{name}\n" in page

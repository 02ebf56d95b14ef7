"""The reference of the site that ``make docs`` builds: every key of our files, every command, every name for programs.

It is made of the models, the command line and the names of docs/api.md, so that it cannot age. A key, a command or an
option without a description is an error.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator
from html import escape
from typing import Any, get_args

import click
import typer

import secure_fed
from secure_fed.cli import app
from secure_fed.clients.sitefile import SiteFile
from secure_fed.core.tomlfile import FileModel, meanings
from secure_fed.lab.sweep_file import SweepFile
from secure_fed.protocol.study import Study

FILES: dict[str, tuple[str, type[FileModel], str]] = {
    "study": (
        "study.toml",
        Study,
        "What the sites agreed on. `secfacmic study check` names every error of a file at once.",
    ),
    "site": ("site.toml", SiteFile, "What one site decides for itself. Relative paths start at the file's folder."),
    "sweep": ("a sweep file", SweepFile, "A study many times with other settings; [Sweeps](../sweep.md) has examples."),
}
"""Pages of the reference: the file's name, its model, and what it is."""


class Undescribed(ValueError):
    """Something for users has no description; the message says what, and where to give it one."""


def pages(guide: str) -> dict[str, str]:
    """Markdown by name of the page; ``guide`` is docs/api.md.

    Raises:
        Undescribed: a key, a command or an option says nothing of itself.
    """
    found = {page: file_page(*what) for page, what in FILES.items()}
    return found | {"commands": commands_page(), "names": names_page(guide)}


# The keys of a file


def file_page(name: str, model: type[FileModel], introduction: str) -> str:
    """The reference of one file: a table of keys for each of its tables, as Markdown."""
    schema = model.model_json_schema()
    lines = [f"# Every key of {name}", "", introduction]
    for path, title, table in _tables(name, model, schema):
        lines += [
            "",
            f"## {title}",
            "",
            _summary(table),
            "",
            "| key | value | default | meaning |",
            "|---|---|---|---|",
        ]
        definition = schema if table is model else schema["$defs"][table.__name__]
        said = meanings(table)
        for key, value in definition["properties"].items():
            if key not in said:
                raise Undescribed(
                    f"{name}: key {key} of {path or 'the top'} has no description; expected a line under Attributes: "
                    f"in the docstring of {table.__module__}.{table.__qualname__}"
                )
            default = "required" if key in definition.get("required", ()) else _default(value)
            lines.append(f"| `{key}` | {_value(value, schema)} | {default} | {_cell(said[key])} |")
    return "\n".join(lines) + "\n"


def _tables(name: str, model: type[FileModel], schema: dict[str, Any]) -> Iterator[tuple[str, str, type[FileModel]]]:
    """Path, heading and model of each table, each before those within it."""

    def within(prefix: str, table: type[FileModel]) -> Iterator[tuple[str, str, type[FileModel]]]:
        definition = schema if table is model else schema["$defs"][table.__name__]
        for key, field in table.model_fields.items():
            for inner in _models(field.annotation):
                path = f"{prefix}{key}"
                array = definition["properties"][key].get("type") == "array"
                yield path, f"`[[{path}]]`" if array else f"`[{path}]`", inner
                yield from within(f"{path}.", inner)

    yield "", f"At the top of {name}", model
    yield from within("", model)


def _models(annotation: Any) -> Iterator[type[FileModel]]:
    """The file models in an annotation, as in ``tuple[Model, ...]`` and ``Model | None``."""
    if isinstance(annotation, type) and issubclass(annotation, FileModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models(argument)


def _summary(model: type[FileModel]) -> str:
    text = inspect.cleandoc(model.__doc__ or "").partition("Attributes:")[0].strip()
    if not text:
        raise Undescribed(f"{model.__module__}.{model.__qualname__} has no docstring; expected what the table is")
    return _prose(text)


def _value(value: dict[str, Any], schema: dict[str, Any]) -> str:
    """Type and range of a value, of its JSON schema."""
    if "$ref" in value:
        return "table"
    if "anyOf" in value:  # a default of None: not set
        return " or ".join(_value(choice, schema) for choice in value["anyOf"] if choice.get("type") != "null")
    if "const" in value or "enum" in value:
        return ", ".join(f"`{json.dumps(choice)}`" for choice in value.get("enum", [value.get("const")]))
    kind = value.get("type")
    if kind == "array" and "prefixItems" in value:
        items = [_value(item, schema) for item in value["prefixItems"]]
        assert len(set(items)) == 1, "no file has a tuple of different types so far"
        return f"array of {len(items)}, each {items[0]}"
    if kind == "array":
        return f"array, each {_value(value['items'], schema)}" if value["items"] else "array of any values"
    if kind == "object":
        inner = value.get("additionalProperties")
        return f"table, each value: {_value(inner, schema)}" if inner and inner is not True else "table of any values"
    if kind == "string":
        return f"string like {_code(value['pattern'])}" if "pattern" in value else "string" + _range(value, "Length")
    if kind == "boolean":
        return "`true` or `false`"
    return kind + _range(value, "imum") if kind else "any value"


def _range(value: dict[str, Any], ending: str) -> str:
    """A number's bounds, or the bounds of a string's length."""
    unit = " characters" if ending == "Length" else ""
    low, high = value.get(f"min{ending}"), value.get(f"max{ending}")
    if low is not None and high is not None:
        return f", {_number(low)} to {_number(high)}{unit}"
    bounds = {"at least": low, "above": value.get("exclusiveMinimum")}
    bounds |= {"at most": high, "below": value.get("exclusiveMaximum")}
    return "".join(f", {word} {_number(bound)}{unit}" for word, bound in bounds.items() if bound is not None)


def _number(bound: float) -> str:
    power = int(bound).bit_length() - 1
    return f"2^{power}" if power > 30 and bound == 2**power else f"{bound:,.10g}"


def _default(value: dict[str, Any]) -> str:
    default = value.get("default")
    if "default" not in value and value.get("type") == "object":
        default = {}
    if default is None:
        return "not set"
    if isinstance(default, dict):
        return "as below" if default else "empty"
    return f"`{json.dumps(default)}`" if default != [] else "empty"


# Commands


def commands_page() -> str:
    """Every command with its arguments and options, as Markdown."""
    lines = [
        "# Every command",
        "",
        "`--help` shows the same. A refusal is one message, with an [exit code](../exit-codes.md) of its own.",
    ]
    for path, command in walk(typer.main.get_command(app), "secfacmic"):
        if not command.help:
            raise Undescribed(f"{path} has no description; expected a docstring at its function")
        context = click.Context(command, info_name=path)
        lines += ["", f"## `{path}`", "", _prose(inspect.cleandoc(command.help))]
        if isinstance(command, click.Group):
            continue
        lines += ["", "```", f"{path} {' '.join(command.collect_usage_pieces(context))}", "```"]
        rows = [_parameter(path, parameter, context) for parameter in command.params]
        if rows:
            lines += ["", "| | value | default | meaning |", "|---|---|---|---|", *rows]
    return "\n".join(lines) + "\n"


def walk(command: click.Command, path: str) -> Iterator[tuple[str, click.Command]]:
    """The command and all below it, with the words that call them; hidden ones are left out."""
    yield path, command
    if isinstance(command, click.Group):
        for name, inner in command.commands.items():
            if not inner.hidden:
                yield from walk(inner, f"{path} {name}")


def _parameter(path: str, parameter: click.Parameter, context: click.Context) -> str:
    text = getattr(parameter, "help", None)
    names = [*parameter.opts, *parameter.secondary_opts]
    if not text:
        raise Undescribed(f"{path}: {' '.join(names)} has no description; expected help= at the parameter")
    shown = parameter.make_metavar(context).strip("[]") if isinstance(parameter, click.Argument) else ", ".join(names)
    kind = parameter.type
    if isinstance(kind, click.Choice):
        value = ", ".join(_code(str(choice)) for choice in kind.choices)
    elif getattr(parameter, "is_flag", False):
        value = ""
    else:
        value = kind.name.removesuffix(" range") + (", several" if parameter.multiple or parameter.nargs < 0 else "")
        low, high = getattr(kind, "min", None), getattr(kind, "max", None)
        value += "" if low is None else f", at least {low:,}"
        value += "" if high is None else f", at most {high:,}"
    default = "required" if parameter.required else ""
    if not parameter.required and parameter.default not in (None, False) and not callable(parameter.default):
        default = _code(str(parameter.default))
    return f"| {_code(shown)} | {value} | {default} | {_cell(text)} |"


# Names for programs


def names_page(guide: str) -> str:
    """What ``secure_fed`` exports and what else the guide (docs/api.md) names, for mkdocstrings to fill in."""
    names = [f"{home}.{name}" for name, home in secure_fed._HOMES.items()]
    names += re.findall(r"`(secure_fed(?:\.\w+){2,})", guide)
    directives = [f"::: {name}" for name in dict.fromkeys(names)]
    return (
        "# Names for programs\n\n[From Python](../api.md) says what they are for.\n\n" + "\n\n".join(directives) + "\n"
    )


# Markdown


def _code(text: str) -> str:
    """Text as code in which nothing is Markdown."""
    return f"<code>{_plain(escape(text))}</code>"


def _plain(text: str) -> str:
    return re.sub(r"[|*_\[\]]", lambda found: f"&#{ord(found[0])};", text)


def _prose(text: str) -> str:
    """Docstrings name things by Sphinx's roles."""
    return re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text)


def _cell(text: str) -> str:
    """Text as a cell of a table: code stays, all else means itself."""
    parts = re.split(r"(``.+?``|`[^`]+`)", _prose(" ".join(text.split())))
    return "".join(
        _code(part.strip("`")) if index % 2 else _plain(escape(part, quote=False)) for index, part in enumerate(parts)
    )

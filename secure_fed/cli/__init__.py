"""The command line: a thin file per noun; every refusal ends in one message and its own exit code."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Annotated, Any

import click
import typer
import typer.core
import typer.models

from secure_fed.cli import (
    attack,
    audit,
    backbone,
    client,
    data,
    demo,
    doctor,
    drill,
    evaluate,
    evidence,
    explain,
    explain_case,
    export,
    journal,
    keys,
    ledger,
    page,
    phantoms,
    plot,
    predict,
    report,
    server,
    simulate,
    site,
    status,
    study,
    sweep,
)
from secure_fed.cli.output import ConsoleHandler, console
from secure_fed.cli.version import show as show_version
from secure_fed.core.errors import SecfacmicError, StorageError
from secure_fed.core.tomlfile import number_words

typer.core.HAS_RICH = False  # else brackets are escaped for a markup that is off, and shown as \[required]

app = typer.Typer(
    name="secfacmic",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=show_version, is_eager=True, help="Versions and formats, and end."),
    ] = False,
) -> None:
    """Hospitals train one image classifier together and show each other nothing."""


app.add_typer(study.app, name="study")
app.add_typer(site.app, name="site")
app.add_typer(data.app, name="data")
app.add_typer(backbone.app, name="backbone")
app.add_typer(keys.app, name="keys")
app.add_typer(journal.app, name="journal")
app.add_typer(ledger.app, name="ledger")
app.add_typer(evidence.app, name="evidence")
app.add_typer(phantoms.app, name="phantoms")
app.command()(simulate.simulate)
app.command()(demo.demo)
app.command()(sweep.sweep)
app.command()(attack.attack)
app.command()(predict.predict)
app.command()(evaluate.evaluate)
app.command()(export.export)
app.command()(plot.plot)
app.command()(report.report)
app.command()(server.server)
app.command()(client.client)
app.command()(status.status)
app.command()(page.page)
app.command()(doctor.doctor)
app.command()(drill.drill)
app.command()(explain.explain)
app.command()(explain_case.explain_case)
app.command()(audit.audit)


INTERRUPTED = 130
"""Exit status after Ctrl-C, which typer turns into it."""


def command() -> click.Command:
    """All of it, as click has it; where commands are listed, each with its whole first sentence."""
    whole = typer.main.get_command(app)
    _spell_out(whole)
    _name_values(whole)
    return whole


NOT_UTF_8 = "is no UTF-8 text, as our files hold names; expected such a name: rename what it stands for"


def _is_text(value: str) -> bool:
    """Whether it is UTF-8; what else a shell gives comes as lone surrogates."""
    return not any("\ud800" <= letter <= "\udfff" for letter in value)


class _Place(typer.models.TyperPath):
    """A path that is not empty, as a shell's variable is that nobody set: it would mean the current folder; and that
    can be written down, with the folders it is in."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not str(value).strip():
            self.fail("is empty; expected the name of a file or folder, or . for the current one", param, ctx)
        try:
            whole = os.path.abspath(value)
        except FileNotFoundError:
            self.fail("is in the current folder, which is gone; expected one that is there: cd to it", param, ctx)
        if not _is_text(whole):
            self.fail(NOT_UTF_8, param, ctx)
        return super().convert(value, param, ctx)


class _Text(click.types.StringParamType):
    """Text that can be written down."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not _is_text(str(value)):
            self.fail(NOT_UTF_8, param, ctx)
        return super().convert(value, param, ctx)


class _Number:
    """What a refused number is told: what was given, and what was expected, in our words."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return super().convert(value, param, ctx)  # type: ignore[misc]
        except click.BadParameter:
            ends = {name: getattr(self, name, None) for name in ("min", "max")}
            words = number_words(whole=isinstance(self, click.types.IntParamType), low=ends["min"], high=ends["max"])
            raise click.BadParameter(f"{value}; expected {words}", ctx, param) from None


class _Whole(_Number, click.types.IntParamType):
    pass


class _Real(_Number, click.types.FloatParamType):
    pass


class _WholeRange(_Number, click.IntRange):
    pass


class _RealRange(_Number, click.FloatRange):
    pass


def _named(kind: click.ParamType[Any]) -> click.ParamType[Any]:
    """The same type of values, with refusals of our own."""
    match kind:
        case click.Path():
            return _Place()
        case click.IntRange():
            return _WholeRange(kind.min, kind.max)
        case click.FloatRange():
            return _RealRange(kind.min, kind.max)
        case click.types.IntParamType():
            return _Whole()
        case click.types.FloatParamType():
            return _Real()
        case click.types.StringParamType():
            return _Text()
    return kind


def _name_values(command: click.Command) -> None:
    for parameter in command.params:
        parameter.type = _named(parameter.type)
    if isinstance(command, click.Group):
        for each in command.commands.values():
            _name_values(each)


def _spell_out(command: click.Command) -> None:
    """click would cut a first sentence that does not fit beside the name; told itself, it breaks the line."""
    if command.help:
        command.short_help = " ".join(command.help.partition("\n\n")[0].split())
    if isinstance(command, click.Group):
        for each in command.commands.values():
            _spell_out(each)


def main() -> None:
    """The command line, from ``sys.argv``; ends the process' work with an exit code in any case."""
    logging.getLogger().addHandler(logging.NullHandler())  # Opacus sets up a root handler where there is none
    logging.getLogger("secure_fed").handlers = [ConsoleHandler()]
    with _CtrlC() as ctrl_c:
        try:
            command()()
        except SecfacmicError as error:
            _end(str(error), error.exit_code)
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            _end(
                f"{where}{error.strerror or error}; check that the place exists, is yours and has room",
                StorageError.exit_code,
            )
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            if ctrl_c.pressed:
                _end(interrupted(sys.argv[1:]), INTERRUPTED)
            if package in ("", "secure_fed"):
                raise
            _end(
                f"this command needs {package}, which is not installed here; expected all of secfacmic, not only what "
                "a coordinator's machine needs to serve: use a machine where it is, or install it (pip install "
                "secfacmic)",
                SecfacmicError.exit_code,
            )
        except SystemExit as end:
            if end.code != INTERRUPTED:
                raise
            _end(interrupted(sys.argv[1:]), INTERRUPTED)
        except Exception:
            if not ctrl_c.pressed:
                raise
            _end(interrupted(sys.argv[1:]), INTERRUPTED)


_GO_ON = ("simulate", "demo", "sweep", "server", "client", "data fetch", "data check --site")
"""Commands that keep what they have done, and with which option if only with one."""


def interrupted(words: Sequence[str]) -> str:
    """What is told after Ctrl-C: whether the command that was given goes on when it is given again."""
    given = [*words[:2], *(word.partition("=")[0] for word in words[2:])]
    for command in () if "--rehearse" in given else _GO_ON:
        name, dashes, option = command.partition(" --")
        if given[: name.count(" ") + 1] == name.split() and (not dashes or f"--{option}" in given):
            return "interrupted; the same command goes on from here"
    return "interrupted; nothing is half-written, and the same command begins anew"


class _CtrlC:
    """Remembers that Ctrl-C was pressed: libraries that catch everything while they load make another error of it."""

    def __init__(self) -> None:
        self.pressed = False

    def __enter__(self) -> _CtrlC:
        self._before = signal.getsignal(signal.SIGINT)
        if self._before is signal.default_int_handler:  # who ignores it, as what a script starts beside itself, goes on
            signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(self, *_: object) -> None:
        if signal.getsignal(signal.SIGINT) == self._press:
            signal.signal(signal.SIGINT, self._before)

    def _press(self, number: int, frame: FrameType | None) -> None:
        self.pressed = True
        signal.default_int_handler(number, frame)


def _end(message: str, code: int) -> None:
    console.print(f"secfacmic: {message}", highlight=False, soft_wrap=True)
    sys.exit(code)

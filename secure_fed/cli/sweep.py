"""``secfacmic sweep``: one study many times, with other settings each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from secure_fed.cli.output import Json, command_line, console, out, print_json
from secure_fed.cli.simulate import Logs
from secure_fed.lab.run_log import refuse_logs, write_logs


def sweep(
    file: Annotated[Path, typer.Argument(metavar="SWEEP", help="A sweep file, or the name of a packaged one.")],
    into: Annotated[Path, typer.Option("--out", help="Folder for the trials; the same again runs what is missing.")],
    jobs: Annotated[int | None, typer.Option(min=1, help="Trials at a time; else one for each CPU.")] = None,
    ray: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Run on a Ray cluster: HOST:PORT, auto, or local.")
    ] = None,
    logs: Logs = None,
    json_: Json = False,
) -> None:
    """Run a study many times, on public or simulated data, and compare settings."""
    from secure_fed.lab.sweep_file import read_sweep_file

    read_sweep_file(file)  # its errors before anything that takes long to load
    from secure_fed.core.errors import TrialFailedError
    from secure_fed.lab.sweep import SweepListener, run_sweep
    from secure_fed.report.recommendation import compare

    refuse_logs(logs or (), into)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[failed]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
    ) as progress:
        bar = progress.add_task("reading", total=None, failed="")

        def count(done: int, failed: int, total: int) -> None:
            progress.update(bar, completed=done + failed, total=total, failed=f"{failed} failed" if failed else "")

        def tell(text: str) -> None:
            # Time left is reckoned from trials alone, of which those that were there took none.
            progress.reset(bar, completed=int(progress.tasks[0].completed), total=progress.tasks[0].total)
            progress.update(bar, description=text)

        found = run_sweep(file, into, SweepListener(tell, count), jobs=jobs, ray=ray)
    done = {line.trial: (line.settings, line.summary) for line in found.trials if line.summary is not None}
    for path in write_logs(logs or (), into, done):
        console.print(f"log: {path}", highlight=False, soft_wrap=True)
    compared = compare(found.trials)
    if json_:
        print_json(
            {
                "sweep": found.facts,
                "done": len(found.trials) - len(found.failed),
                "failed": [{"settings": trial.settings, "error": trial.error} for trial in found.failed],
                "outside": len(found.outside),
                "settings": [entry.as_json() for entry in compared],
            }
        )
    else:
        out.print(_table(found.facts, compared))
        if found.outside:
            out.print(f"{len(found.outside)} trials of an earlier version of the sweep file are kept, and not shown")
        out.print(found.facts["caveat"], highlight=False, soft_wrap=True)
        figures = command_line("report", into)
        out.print(f"trials: {into / 'trials.jsonl'}; figures: {figures}", highlight=False, soft_wrap=True)
    if found.failed:
        first = found.failed[0]
        raise TrialFailedError(
            f"{len(found.failed)} of {len(found.trials)} trials failed, the first of them with "
            f"{_in_words(first.settings)}: {first.error}; what the others found is in {into}; the same command tries "
            "the failed ones again"
        )


def _in_words(settings: dict[str, Any]) -> str:
    """As a sweep file has them."""
    return ", ".join(f"{name} = {'none' if value is None else value}" for name, value in settings.items())


def _table(facts: dict[str, Any], compared: list[Any]) -> Table:
    """A row a setting: balanced accuracy over seeds, bytes, seconds."""
    table = Table(title=f"{facts['title']}: balanced accuracy, %", caption="mean ± standard error over seeds")
    for axis in facts["axes"]:
        table.add_column(axis, overflow="fold")
    for column in ("at sites", "held out", "seeds", "MB", "seconds"):
        table.add_column(column, justify="right")
    for entry in compared:
        values = [entry.settings.get(axis) for axis in facts["axes"]]
        table.add_row(
            *("none" if value is None else str(value) for value in values),
            *("-" if score is None else str(score) for score in (entry.sites, entry.held_out)),
            str(len(entry.seeds)),
            f"{entry.bytes / 1e6:.1f}",
            f"{entry.seconds:.1f}",
        )
    return table

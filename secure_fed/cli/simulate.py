"""``secfacmic simulate``: a whole study on one machine."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from secure_fed.cli.output import Delta, Device, Epsilon, Json, Pace, console, out, print_json
from secure_fed.cli.study import Mode, Seed, StudyPath, template

METHODS = {
    "zero_shot": "zero-shot",
    "local_only": "local only",
    "text_head": "text head",
    "pooled": "pooled",
    "federated": "federated",
}


def simulate(
    study: StudyPath,
    into: Annotated[Path, typer.Option("--out", help="Folder for study, sites, server and results.")],
    data: Annotated[
        Path | None, typer.Option(help="Folder of the sites' images; else the template's phantoms.")
    ] = None,
    seed: Seed = None,
    mode: Mode = None,
    skip_unreadable: Annotated[bool, typer.Option(help="Go on without images that cannot be decoded.")] = False,
    epsilon: Epsilon = None,
    delta: Delta = None,
    device: Device = None,
    json_: Json = False,
) -> None:
    """Run a study with all its sites on this machine, encryption included."""
    from secure_fed.lab.simulation import simulate as run

    with live() as listener:
        chosen, budget = template(study, seed, mode), budget_of(epsilon, delta)
        summary = run(chosen, into, data, listener, skip_unreadable=skip_unreadable, budget=budget, device=device)
    if json_:
        print_json(summary)
    else:
        out.print(results_table(summary))
        for line in privacy_lines(summary):
            out.print(line, highlight=False, soft_wrap=True)
        out.print(f"adapter: {into / 'adapter.safetensors'}", highlight=False, soft_wrap=True)


def budget_of(epsilon: float | None, delta: float | None) -> Any:
    """The budget that the command line gives each site, if it gives one; from now on plans and spending are told.

    Raises:
        SiteFileError: a figure out of range, or a delta without epsilon.
    """
    if epsilon is None and delta is None:
        return None
    from secure_fed.clients.sitefile import SitePrivacy
    from secure_fed.core.errors import SiteFileError
    from secure_fed.core.tomlfile import parse_table
    from secure_fed.lab.simulation import Budget

    content = {name: value for name, value in (("epsilon", epsilon), ("delta", delta)) if value is not None}
    checked = parse_table(content, SitePrivacy, SiteFileError, "--epsilon, --delta")
    logging.getLogger("secure_fed.clients.private_round").setLevel(logging.INFO)
    return Budget(checked.epsilon, checked.delta)


def privacy_lines(summary: dict[str, Any]) -> list[str]:
    """What each site spent, one line each; none without differential privacy."""
    return [
        f"{site}: simulated epsilon {spent['epsilon_spent']:.3f} of {spent['epsilon_budget']:g} spent at delta "
        f"{spent['delta']:g}, unit {spent['unit']}"
        for site, spent in summary.get("privacy", {}).items()
    ]


def results_table(summary: dict[str, Any]) -> Table:
    """Balanced accuracy of each method, per site and held out, in percent."""
    table = Table(title="balanced accuracy, %")
    table.add_column("")
    for site in summary["sites"]:
        table.add_column(site, justify="right")
    table.add_column("held out", justify="right")
    for key, label in METHODS.items():
        result = summary["metrics"][key]
        row = [result["per_site"][site] for site in summary["sites"]] + [result["held_out"]]
        values = [metrics["balanced_accuracy"] for metrics in row]
        table.add_row(label, *("-" if value is None else f"{100 * value:.1f}" for value in values))
    return table


@contextmanager
def live() -> Iterator[Any]:
    """A listener that keeps a table of the rounds up to date on stderr."""
    from secure_fed.lab.simulation import Listener, RoundFacts

    table = Table("round", "sites in", "up", "down", "seconds", "validation")
    status, pace = Text("starting"), Pace()
    with Live(Group(table, status), console=console, refresh_per_second=4) as live:

        def tell(text: str) -> None:
            status.plain = text
            live.refresh()

        def add(facts: RoundFacts) -> None:
            validation = "-" if facts.validation is None else f"{100 * facts.validation:.1f} %"
            table.add_row(
                str(facts.round),
                str(len(facts.sites_in)),
                f"{facts.bytes_up / 1e6:.2f} MB",
                f"{facts.bytes_down / 1e6:.2f} MB",
                f"{facts.seconds:.1f}",
                validation,
            )
            live.refresh()

        try:
            yield Listener(
                encoding=lambda site, done, total: tell(f"encoding {site}: {pace.text(done, total)}"),
                round=add,
                stage=tell,
            )
        finally:
            status.plain = ""

"""``secfacmic simulate``: a whole study on one machine."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from secure_fed.cli.output import Delta, Device, Epsilon, Json, Pace, SkipUnreadable, console, out, print_json
from secure_fed.cli.study import Mode, Seed, StudyPath, template
from secure_fed.core.layout import ADAPTER, SUMMARY
from secure_fed.lab.run_log import Log, refuse_logs, write_logs
from secure_fed.model.scores import SCALARS
from secure_fed.operate.summary import METHODS, Result, StudySummary, parse_summary
from secure_fed.protocol.study import Template

Logs = Annotated[
    list[Log] | None,
    typer.Option("--log", help="Rounds as TensorBoard's event files, or as a CSV for MLflow; once for each."),
]


def simulate(
    study: StudyPath,
    into: Annotated[Path, typer.Option("--out", help="Folder for study, sites, server and results.")],
    data: Annotated[
        Path | None, typer.Option(help="Folder of the sites' images; else the template's phantoms.")
    ] = None,
    seed: Seed = None,
    mode: Mode = None,
    skip_unreadable: SkipUnreadable = False,
    epsilon: Epsilon = None,
    delta: Delta = None,
    device: Device = None,
    logs: Logs = None,
    json_: Json = False,
) -> None:
    """Run a study with all its sites on this machine, encryption included."""
    chosen = template(study, seed, mode)  # before anything that takes long to load
    from secure_fed.lab.simulation import simulate as run

    refuse_logs(logs or (), into)
    budget = budget_of(epsilon, delta)
    chosen = as_played(chosen, budget, data)
    with live() as listener:
        summary = run(chosen, into, data, listener, skip_unreadable=skip_unreadable, budget=budget, device=device)
    found = parse_summary(summary, StudySummary, str(into / SUMMARY))
    for path in write_logs(logs or (), into, {chosen.name: ({}, found)}):
        console.print(f"log: {path}", highlight=False, soft_wrap=True)
    if json_:
        print_json(summary)
    else:
        print_results(found)
        out.print(f"adapter: {into / ADAPTER}", highlight=False, soft_wrap=True)


def budget_of(epsilon: float | None, delta: float | None) -> Any:
    """The budget that the command line gives each site, if it gives one; from now on plans and spending are told.

    Raises:
        SiteFileError: a figure out of range, or a delta without epsilon.
    """
    if epsilon is None and delta is None:
        return None
    from secure_fed.clients.sitefile import given_budget
    from secure_fed.lab.simulation import Budget

    checked = given_budget(epsilon, delta)
    logging.getLogger("secure_fed.clients.private_round").setLevel(logging.INFO)
    return Budget(checked.epsilon, checked.delta)


def as_played(chosen: Template, budget: Any, data: Path | None) -> Template:
    """What is played under the budget, if there is one; an advice that it follows is told on stderr."""
    if chosen.simulation is None:
        return chosen
    from secure_fed.lab.simulation import under_budget

    played, advice = under_budget(chosen, budget, data)
    if advice is not None:
        console.print(f"method: {advice.words}", highlight=False, soft_wrap=True)
    return played


def print_results(summary: StudySummary) -> None:
    """Balanced accuracy of each method, per site and held out, in percent; then what each site with a budget spent."""
    measure = "balanced_accuracy" if summary.anomaly is None else "auroc"
    table = Table(
        "",
        title=f"{SCALARS[measure]}, %",
        caption="a column a site: on its own test images; held out: on those of sites that train nothing",
    )
    for name in (*summary.sites, "held out"):
        table.add_column(name, justify="right")
    for method, label in METHODS.items():
        result: Result | None = getattr(summary.metrics, method)
        if result is None:
            continue
        row = [*(result.per_site[site] for site in summary.sites), result.held_out]
        shares = [getattr(scores, measure) for scores in row]
        if method == "federated" and summary.metrics.one_sum is not None:
            label = f"{label}, {summary.method}"
        table.add_row(label, *("-" if share is None else f"{100 * share:.1f}" for share in shares))
    out.print(table)
    if summary.metrics.one_sum is not None:
        for line in _order(summary, measure):
            out.print(line, highlight=False, soft_wrap=True)
    for site, spent in summary.privacy.items():
        out.print(
            f"{site}: simulated epsilon {spent.epsilon_spent:.3f} of {spent.epsilon_budget:g} spent at delta "
            f"{spent.delta:g}, unit {spent.unit}",
            highlight=False,
            soft_wrap=True,
        )


def _order(summary: StudySummary, measure: str) -> list[str]:
    """Which row beats which, as measured, from best to worst."""
    places: dict[str, list[tuple[float, str]]] = {"own test images, mean of the sites": [], "held out": []}
    for name, label in METHODS.items():
        result: Result | None = getattr(summary.metrics, name)
        if result is None:
            continue
        own = [getattr(result.per_site[site], measure) for site in summary.sites]
        for found, shares in zip(places.values(), (own, [getattr(result.held_out, measure)]), strict=True):
            known = [share for share in shares if share is not None]
            if len(known) == len(shares):
                found.append((sum(known) / len(known), label))
    lines = [f"{place}: {ranked(found)}" for place, found in places.items() if found]
    return [*lines, "as measured here, once, with one seed: a few points are chance (summary.json has the intervals)"]


@contextmanager
def live() -> Iterator[Any]:
    """A listener that keeps a table of the rounds up to date on stderr; there is none before the first."""
    from secure_fed.lab.simulation import Listener, RoundFacts

    table = Table(
        "round",
        "sites in",
        "up",
        "down",
        "seconds",
        "validation",
        caption="up, down: bytes of all sites together; seconds: of the whole round; validation: correct images at all "
        "sites, before the round's training",
    )
    status, pace = Text("starting"), Pace()
    with Live(status, console=console, refresh_per_second=4) as live:

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
            live.update(Group(table, status), refresh=True)

        try:
            yield Listener(
                encoding=lambda site, done, total: tell(f"encoding {site}: {pace.text(done, total)}"),
                round=add,
                stage=tell,
            )
        finally:
            status.plain = ""


def ranked(found: Iterable[tuple[float, str]]) -> str:
    """Shares with their labels from best to worst, in percent; none beats one that is shown with the same figure."""
    words, above = "", ""
    for share, label in sorted(found, key=lambda entry: -entry[0]):
        figure = f"{100 * share:.1f}"
        words += ("" if not words else " = " if figure == above else " > ") + f"{label} {figure}"
        above = figure
    return words

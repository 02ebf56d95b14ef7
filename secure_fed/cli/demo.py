"""``secfacmic demo``: a whole federation on this machine, as real processes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from secure_fed.cli.output import Delta, Device, Epsilon, Json, command_line, out, print_json
from secure_fed.cli.simulate import as_played, budget_of, live, print_results
from secure_fed.cli.study import Mode, Seed, template
from secure_fed.core.layout import ADAPTER, SUMMARY
from secure_fed.operate.summary import StudySummary, parse_summary
from secure_fed.protocol.study import with_fields


def demo(
    study: Annotated[Path, typer.Argument(metavar="[STUDY]", help="A template or a packaged config.")] = Path("demo"),
    into: Annotated[Path, typer.Option("--out", help="Folder for study, sites, server, logs and results.")] = Path(
        "secfacmic-demo"
    ),
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds, if not the study's.")] = None,
    sites: Annotated[int | None, typer.Option(min=1, help="Training sites, the study's first ones.")] = None,
    mode: Mode = None,
    seed: Seed = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder of the sites' images; else the template's phantoms.")
    ] = None,
    prepare: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Only write the folders, to start each process by hand.")
    ] = None,
    epsilon: Epsilon = None,
    delta: Delta = None,
    device: Device = None,
    json_: Json = False,
) -> None:
    """Run a server and its sites as processes on this machine, over TLS, and show what federation brings."""
    from secure_fed.core.processes import be_quiet_outside, die_with_parent, end_on_sigterm

    die_with_parent()
    end_on_sigterm()
    be_quiet_outside()
    chosen = template(study, seed, mode)
    if rounds is not None:
        chosen = with_fields(chosen, rounds=rounds)
    from secure_fed.lab.demo import prepare_federation, run_demo, with_sites

    if sites is not None:
        chosen = with_sites(chosen, sites)
    budget = budget_of(epsilon, delta)
    chosen = as_played(chosen, budget, data)
    if prepare is not None:
        agreed = prepare_federation(chosen, prepare, data, budget=budget)
        commands = [
            command_line(
                *("server", "--study", prepare / "study.toml", "--mode", agreed.study.mode),
                *("--state", prepare / "server"),
            ),
            *(
                command_line("client", "--site", prepare / "sites" / site.name / "site.toml")
                for site in agreed.study.sites
            ),
        ]
        if json_:
            print_json({"study_id": agreed.study.id, "commands": commands})
            return
        out.print("each in a terminal of its own:", highlight=False)
        for line in commands:
            out.print(f"  {line}", highlight=False, soft_wrap=True)
        return
    with live() as listener:
        summary = run_demo(chosen, into, data, listener, budget, device)
    if json_:
        print_json(summary)
        return
    found = parse_summary(summary, StudySummary, str(into / SUMMARY))
    print_results(found)
    out.print(
        f"{found.seconds_total:.0f} s in all; adapter {into / ADAPTER}, figures {into / SUMMARY}, logs {into / 'logs'}",
        highlight=False,
        soft_wrap=True,
    )
    out.print("try next:", highlight=False)
    for what, words in (
        ("a page of what was found", command_line("report", into)),
        ("where a site stands, in a browser", command_line("page", into / "sites" / found.sites[0])),
        ("the adapter on images of yours", command_line("evaluate", "--adapter", into / ADAPTER, "--images", "DIR")),
        ("attacks on this installation", command_line("drill")),
        ("a study of your own images", command_line("study", "init", "DIR...", "--out", "FILE")),
    ):
        out.print(f"  {what:<35}{words}", highlight=False, soft_wrap=True)

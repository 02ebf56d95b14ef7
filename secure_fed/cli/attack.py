"""``secfacmic attack``: what a study's updates, ciphertexts and adapter tell about training images."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress
from rich.table import Table

from secure_fed.cli.output import Json, console, out, print_json
from secure_fed.cli.study import StudyPath


def attack(
    study: StudyPath,
    into: Annotated[Path, typer.Option("--out", help="Folder for attack.json, attack.svg and the study.")],
    data: Annotated[
        Path | None, typer.Option(help="Folder of the sites' images; else the template's phantoms.")
    ] = None,
    epsilon: Annotated[
        list[float] | None, typer.Option(min=0.01, max=100, help="Budget of a private adapter; once for each; 3.")
    ] = None,
    delta: Annotated[float, typer.Option(min=1e-12, max=1e-3, help="The budgets' delta.")] = 1e-5,
    shadows: Annotated[int, typer.Option(min=8, max=1000, help="Repetitions; more give narrower intervals.")] = 16,
    json_: Json = False,
) -> None:
    """Attack a study on public or simulated data: membership inference and inversion, of each view of it."""
    from secure_fed.protocol.study import read_template

    template = read_template(study)  # before anything that takes long to load
    from secure_fed.lab.attack import attack as run
    from secure_fed.lab.attack import describe

    with Progress(console=console) as progress:
        bar = progress.add_task("training and attacking", total=shadows)
        report = run(
            template,
            into,
            data,
            epsilons=epsilon or [3.0],
            delta=delta,
            shadows=shadows,
            jobs=len(os.sched_getaffinity(0)),
            progress=lambda done, total: progress.update(bar, completed=done),
        )
    if json_:
        print_json(report)
        return
    table = Table(title=f"study {report['study']}: what each view tells", caption="95 % intervals; guessing is 0.50")
    for column in ("view", "membership AUC", "TPR at 1 % FPR", "inversion hit rate"):
        table.add_column(column, justify="left" if column == "view" else "right")
    for view in report["views"]:
        found, inverted = view["membership"], view["inversion"]
        low, high = found["auc_interval"]
        hit = "-"
        if inverted is not None:
            hit = f"{inverted['hit_rate']:.2f} ({inverted['interval'][0]:.2f} to {inverted['interval'][1]:.2f})"
        table.add_row(
            describe(view), f"{found['auc']:.2f} ({low:.2f} to {high:.2f})", f"{100 * found['tpr_at_1_fpr']:.1f} %", hit
        )
    out.print(table)
    for note in report["notes"]:
        out.print(note, highlight=False, soft_wrap=True)
    out.print(report["caveat"], highlight=False, soft_wrap=True)
    out.print(f"figures: {into / 'attack.json'}, {into / 'attack.svg'}", highlight=False, soft_wrap=True)

"""Anomaly detection by summed memories: AUROC beside its baselines, and heat maps against masks; over seeds.

    python benchmarks/anomaly.py [brain_mri_anomaly] --data DATA [--seeds 5] [--work DIR] [--json FILE]
    python benchmarks/anomaly.py phantoms_anomaly [--seeds 5] [--epsilon 8 --rounds 3 --set centroids=8]

Each seed is a simulated study of the template with its own splits, start and order, in ``plain`` mode, which changes no
bit. Features are computed once, phantoms drawn once.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from secure_fed.core.layout import SUMMARY
from secure_fed.lab.simulation import Budget, prepare, simulate
from secure_fed.operate.summary import METHODS, Result, StudySummary, read_summary
from secure_fed.protocol.study import Template, read_template, with_fields


def run(template: Template, seed: int, data: Path | None, work: Path, budget: Budget | None) -> StudySummary:
    """One seed's study, with the features that an earlier one has computed."""
    out = work / f"{template.name}-seed-{seed}"
    if not (out / SUMMARY).exists():
        study = with_fields(template, seed=seed, mode="plain")
        earlier = sorted(work.glob(f"{template.name}-seed-*/{SUMMARY}"))
        drawn = out / "data"
        if data is None and earlier and not drawn.exists():
            out.mkdir(parents=True, exist_ok=True)
            drawn.symlink_to((earlier[0].parent / "data").resolve())
        agreed = prepare(study, out, data)
        for site in agreed.study.sites:
            cache = Path("sites") / site.name / "state" / "features.sqlite"
            if earlier and not (out / cache).exists():
                (out / cache).parent.mkdir(parents=True, exist_ok=True)
                (out / cache).write_bytes((earlier[0].parent / cache).read_bytes())
        simulate(study, out, data, budget=budget)
    return read_summary(out / SUMMARY, StudySummary)


def figures(summary: StudySummary) -> dict[str, float]:
    """Everything that is shown of one seed, in percent."""
    found: dict[str, float] = {}
    for name, title in METHODS.items():
        result: Result | None = getattr(summary.metrics, name)
        if result is None:
            continue
        for key, short in (("auroc", "AUROC"), ("sensitivity_at_95_specificity", "sensitivity")):
            own = [getattr(scores, key) for scores in result.per_site.values()]
            known = [value for value in own if value is not None]
            held_out = getattr(result.held_out, key)
            found[f"{title}|{short}, own"] = 100 * float(np.mean(known)) if known else float("nan")
            found[f"{title}|{short}, held out"] = float("nan") if held_out is None else 100 * held_out
    assert summary.anomaly is not None
    alarms = [one.flagged_normal for one in summary.anomaly.per_site.values() if one.flagged_normal is not None]
    found["federated|false alarms, own"] = 100 * float(np.mean(alarms))
    if summary.anomaly.held_out is not None and summary.anomaly.held_out.flagged_normal is not None:
        found["federated|false alarms, held out"] = 100 * summary.anomaly.held_out.flagged_normal
    for place, maps in summary.anomaly.places.items():
        for key in ("pixel_auroc", "pro", "constant_pixel_auroc", "equal_place_auroc"):
            value = getattr(maps, key)
            found[f"maps, {place}|{key}"] = float("nan") if value is None else 100 * value
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", nargs="?", type=Path, default=Path("brain_mri_anomaly"))
    parser.add_argument("--data", type=Path, help="client_0 .. client_3/CLASS/*.jpg; phantoms need none")
    parser.add_argument("--work", type=Path, help="keeps finished seeds, so that a run goes on")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epsilon", type=float, help="of every site, at delta 1e-5")
    parser.add_argument("--rounds", type=int, help="sums, and the round of the histogram")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=JSON", help="changes of [method]")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    template = read_template(arguments.study)
    changes: dict[str, Any] = {
        key: json.loads(value) for key, _, value in (one.partition("=") for one in arguments.set)
    }
    template = with_fields(
        template,
        method=template.method.model_dump(mode="json", exclude_none=True) | changes,
        rounds=arguments.rounds or template.rounds,
    )
    budget = None if arguments.epsilon is None else Budget(arguments.epsilon, 1e-5)
    data = None if arguments.data is None else arguments.data.resolve()
    with tempfile.TemporaryDirectory() as folder:
        work = arguments.work or Path(folder)
        rows = [figures(run(template, seed, data, work, budget)) for seed in range(arguments.seeds)]
    console = Console()
    console.print(f"{template.name}, {len(rows)} seeds, %\n\n| | | mean ± standard error |\n|---|---|---|")
    for key in rows[0]:
        values = np.array([row[key] for row in rows if key in row])
        error = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else 0.0
        name, _, what = key.partition("|")
        console.print(f"| {name} | {what} | {values.mean():.1f} ± {error:.1f} |", soft_wrap=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""What the embedded study shows: balanced accuracy over seeds, with and without the domain term.

``make demo-figures`` runs ``simulate demo`` for each seed, LMMD off and on, and prints every figure. Feature caches are
not shared between the runs: a seed draws its own splits.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from secure_fed.core.layout import SUMMARY
from secure_fed.lab.simulation import Listener, simulate
from secure_fed.operate.summary import METHODS, Result, StudySummary, read_summary
from secure_fed.protocol.study import read_template, with_fields

SEEDS = (0, 1, 2)
LMMD_WEIGHTS = (0.0, 1.0)
SHOWN = ("zero_shot", "text_head", "local_only", "federated")


def held_out(summary: StudySummary, method: str) -> float:
    """Balanced accuracy on the held-out site, in percent."""
    result: Result = getattr(summary.metrics, method)
    return 100 * (result.held_out.balanced_accuracy or 0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", nargs="?", type=Path, default=Path("demo"))
    parser.add_argument("--data", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    silent = Listener(encoding=lambda *_: None, round=lambda _: None, stage=lambda _: None)
    template = read_template(arguments.study)
    console = Console()
    rows = []
    for weight in LMMD_WEIGHTS:
        table = Table(title=f"{template.name}, held out, balanced accuracy in %, LMMD weight {weight:g}")
        for column in ("seed", *(METHODS[name] for name in SHOWN), "over zero-shot", "over local only"):
            table.add_column(column, justify="right")
        gains: list[tuple[float, float]] = []
        for seed in SEEDS:
            method = template.method.model_dump() | {"lmmd_weight": weight}
            study = with_fields(template, seed=seed, method=method)
            with tempfile.TemporaryDirectory() as folder:
                simulate(study, Path(folder) / "out", arguments.data, silent)
                summary = read_summary(Path(folder) / "out" / SUMMARY, StudySummary)
            zero, head, local, federated = (held_out(summary, name) for name in SHOWN)
            gains.append((federated - zero, federated - local))
            rows.append(
                {
                    "seed": seed,
                    "lmmd_weight": weight,
                    "seconds": summary.seconds_total,
                    "metrics": summary.metrics.model_dump(mode="json"),
                }
            )
            values = (zero, head, local, federated, *gains[-1])
            table.add_row(str(seed), *(f"{value:.1f}" for value in values))
        means = [statistics.mean(column) for column in zip(*gains, strict=True)]
        table.add_row("mean", "", "", "", "", *(f"{value:.1f}" for value in means))
        console.print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()

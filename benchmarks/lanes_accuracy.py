"""Whether fewer bits cost accuracy: held-out balanced accuracy at several numbers of bits, paired over seeds.

    python benchmarks/lanes_accuracy.py [--bits 18,11,9] [--brain-mri DIR] [--json F]

Lanes and prime follow from the bits. All train alike (same splits, same batches); only the rounding of updates differs.
Differences are against the first number of bits.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from secure_fed.lab.simulation import Listener, open_run, open_sites, prepare, run_rounds
from secure_fed.protocol.packing import lane_parameters
from secure_fed.protocol.study import Template, read_template, with_fields

SILENT = Listener(encoding=lambda *_: None, round=lambda _: None, stage=lambda _: None)


def held_out(study: Template, data: Path | None) -> float:
    """Federated balanced accuracy on the observer's images, in percent."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        agreed = prepare(study, out, data)
        sites = open_sites(agreed, out)
        run_rounds(agreed, open_run(agreed, out, sites), sites, SILENT)
        observer = next(site for site in sites if agreed.study.site(site.name).role == "observer")
        return 100 * float(observer.evaluate(observer.parameters)["balanced_accuracy"] or 0)


def measure(template: Template, data: Path | None, all_bits: list[int], seeds: int) -> list[dict[str, Any]]:
    """One row a number of bits, the first without a difference."""
    results: dict[int, list[float]] = {bits: [] for bits in all_bits}
    for seed in range(seeds):
        for bits, found in results.items():
            encoding = template.encoding.model_dump(exclude={"lanes"}) | {"bits": bits}
            found.append(held_out(with_fields(template, seed=seed, encoding=encoding), data))
    rows: list[dict[str, Any]] = []
    for bits, found in results.items():
        lanes = lane_parameters(template.max_sites, bits, None, 1)
        differences = [one - other for one, other in zip(found, results[all_bits[0]], strict=True)]
        rows.append(
            {
                "study": template.name,
                "bits": bits,
                "lanes": lanes.lanes,
                "against_float32": lanes.modulus_bits / lanes.lanes / 32,
                "balanced_accuracy": found,
                "difference": statistics.mean(differences),
                "standard_error": statistics.stdev(differences) / len(differences) ** 0.5,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bits", type=lambda text: [int(part) for part in text.split(",")], default=[18, 11, 9])
    parser.add_argument("--seeds", type=int, default=5, help="how many, two or more")
    parser.add_argument("--brain-mri", type=Path, metavar="DIR", help="holds client_0..3/CLASS/*.jpg")
    parser.add_argument("--json", type=Path, metavar="F")
    arguments = parser.parse_args()
    studies = [(Path("demo"), None)] + ([(Path("brain_mri"), arguments.brain_mri)] if arguments.brain_mri else [])
    table = Table("study", "bits", "lanes", "x float32", "accuracy, %", "difference", "its standard error")
    rows = []
    for name, data in studies:
        for row in measure(read_template(name), data, arguments.bits, arguments.seeds):
            rows.append(row)
            table.add_row(
                str(row["study"]),
                str(row["bits"]),
                str(row["lanes"]),
                f"{row['against_float32']:.2f}",
                f"{statistics.mean(row['balanced_accuracy']):.2f}",
                f"{row['difference']:+.2f}",
                f"{row['standard_error']:.2f}",
            )
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()

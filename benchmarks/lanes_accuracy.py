"""Whether three lanes cost accuracy: held-out balanced accuracy with two and with three, paired over seeds.

Each lane count takes the most bits that the study's ``max_sites`` allows. Both train alike (same splits, same batches);
only the rounding of updates differs. ``python benchmarks/lanes_accuracy.py --brain-mri DIR [--json F]``
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from secure_fed.lab.simulation import Listener, open_run, open_sites, prepare, run_rounds
from secure_fed.protocol.packing import largest_bits
from secure_fed.protocol.study import Template, read_template, with_fields

SEEDS = range(5)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--brain-mri", type=Path)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    studies = [(Path("demo"), None)] + ([(Path("brain_mri"), arguments.brain_mri)] if arguments.brain_mri else [])
    table = Table("study", "two lanes", "three lanes", "difference", "its standard error")
    rows = []
    for name, data in studies:
        template = read_template(name)
        results: dict[int, list[float]] = {2: [], 3: []}
        for seed in SEEDS:
            for lanes, values in results.items():
                bits = min(largest_bits(template.max_sites, lanes), 18)
                encoding = template.encoding.model_dump() | {"lanes": lanes, "bits": bits}
                values.append(held_out(with_fields(template, seed=seed, encoding=encoding), data))
        differences = [three - two for two, three in zip(results[2], results[3], strict=True)]
        error = statistics.stdev(differences) / len(differences) ** 0.5
        rows.append({"study": str(name), "two": results[2], "three": results[3]})
        table.add_row(
            str(name),
            f"{statistics.mean(results[2]):.2f}",
            f"{statistics.mean(results[3]):.2f}",
            f"{statistics.mean(differences):+.2f}",
            f"{error:.2f}",
        )
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()

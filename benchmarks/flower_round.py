"""What Flower adds to a round: four sites with updates of 2 MB over TLS, as real processes on loopback.

Prints one JSON document: per round its seconds from opening to record, those of the slowest site's own work
(applying, training, encrypting), and what is left, which is transport and waiting; and the peak memory of the
server's two processes and of a site. With several values of ``--collusion``, a study for each, one after the other
and as often as ``--turns`` says, and how many times the first one's overhead the last one's is.

    python benchmarks/flower_round.py [--rounds 10] [--collusion 0 1] [--turns 3]
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from secure_fed.core.layout import ServerState, SiteState
from secure_fed.core.tomlfile import parse_table
from secure_fed.lab.simulation import open_sites
from secure_fed.protocol.journal import JournalEntry
from secure_fed.protocol.records import Chain, RecordFolder
from secure_fed.protocol.study import Template
from tests.conftest import make_images, template_table
from tests.network import Network, busy, peak

SITES = ("ash", "birch", "cedar", "dogwood")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--collusion", type=int, nargs="+", default=[0], help="of the study; pads above 0")
    parser.add_argument("--turns", type=int, default=1)
    arguments = parser.parse_args()
    runs = [run(arguments.rounds, collusion) for _ in range(arguments.turns) for collusion in arguments.collusion]
    print(json.dumps(runs[0] if len(runs) == 1 else compared(runs), indent=2))


def run(rounds: int, collusion: int) -> dict[str, Any]:
    """One study, in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        return measure(Path(folder), rounds, collusion)


def compared(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The runs, and medians over the rounds of all that have one collusion."""
    rows: dict[int, list[dict[str, float]]] = {}
    for one in runs:
        rows.setdefault(one["collusion"], []).extend(one["rounds"])
    median = {
        collusion: {key: statistics.median(row[key] for row in table) for key in table[0]}
        for collusion, table in rows.items()
    }
    first, last = (median[one["collusion"]]["overhead"] for one in (runs[0], runs[-1]))
    return {"median": median, "overhead_ratio": last / first, "runs": runs}


def template(rounds: int, collusion: int) -> Template:
    """Four training sites; a CLIP of width 512 makes 0.53 million values."""
    table = template_table(rounds=rounds, round_seconds=600, collusion=collusion)
    table["sites"] = [{"name": name} for name in SITES]
    table["encoding"] = {"bits": 16, "lanes": 2, "value_bound": 0.1}
    table["backbone"] = {"model": "mini-clip", "weights": "random", "seed": 1}
    table["training"] = {"steps": 1, "learning_rate": 0.003, "batch_size": 8}
    return parse_table(table, Template, ValueError, "template")  # type: ignore[type-var]


def measure(folder: Path, rounds: int, collusion: int) -> dict[str, Any]:
    """Run the study and take the figures from journal, logs and /proc."""
    make_images(folder / "images", per_class=4)
    network = Network(folder / "out", template(rounds, collusion), folder / "images")
    for site in open_sites(network.agreed, network.folder):
        site.features()  # so that no process needs the backbone
    memory: dict[str, int] = {}
    processor: dict[str, float] = {}
    try:
        network.start("server", *network.names)
        network.wait_until(lambda: network.records >= 2, 300)
        pids = {name: network.processes[name].pid for name in ("server", "ash")} | {"rounds": network.rounds_process()}
        while network.processes["server"].poll() is None:
            for name, pid in pids.items():
                memory[name] = max(memory.get(name, 0), peak(pid))
                processor[name] = max(processor.get(name, 0.0), busy(pid))
            time.sleep(0.2)
        network.wait(60)
    finally:
        network.close()
    chain = Chain(network.agreed)
    run = ServerState(network.folder / "server").current_run
    records = RecordFolder(network.folder / "server" / "runs" / str(run) / "journal")
    entries = [JournalEntry(record) for record in records.replay(chain) if record.header.kind == "aggregate"]
    logs = {name: SiteState(network.site_folder(name) / "state").log("site") for name in network.names}
    work = {name: answers(path.read_text()) for name, path in logs.items()}
    table = []
    for entry in entries[1:]:  # the first contains the sites' start
        seconds = (entry.header.closed_ms - entry.header.opened_ms) / 1000
        slowest = max(work[name][entry.header.round] for name in network.names)
        table.append({"seconds": seconds, "slowest_site": slowest, "overhead": seconds - slowest})
    return {
        "sites": len(SITES),
        "collusion": collusion,
        "envelope_mb": entries[0].bytes_up / len(SITES) / 1e6,
        "record_mb": entries[0].size / 1e6,
        "median": {key: statistics.median(row[key] for row in table) for key in table[0]},
        "rounds": table,
        "processor_seconds": processor,
        "peak_memory_mb": {name: kilobytes / 1000 for name, kilobytes in memory.items()},
    }


def answers(log: str) -> dict[int, float]:
    """Seconds of a site's last answer in each round."""
    return {int(number): float(seconds) for number, seconds in re.findall(r"round (\d+): answered in ([0-9.]+) s", log)}


if __name__ == "__main__":
    main()

"""A long study under faults: 8 sites and a server as processes on loopback, killed, stopped, frozen and cut off at
random from a seed; afterwards every invariant of the federation is checked, and memory and journal are measured.

Server and the process of its rounds are killed in the first half of the study only, and two sites never, so that the
growth of a process's memory can be told from its lifetime. Sites are forked from one process that has imported
everything; what they share with it is not counted as theirs.

    python benchmarks/soak.py [--rounds 200] [--sites 8] [--seed 0] [--json FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from secure_fed.core.layout import ServerState
from secure_fed.lab.simulation import open_sites
from secure_fed.protocol.journal import find_runs
from secure_fed.protocol.recompute import EnvelopeStore, recompute
from secure_fed.protocol.records import Chain, Record, RecordFolder
from secure_fed.protocol.study import Template
from tests.conftest import OBSERVER, TRAINING, make_images, make_template
from tests.network import Network

TREES = ("ash", "birch", "cedar", "dogwood", "elder", "fir", "gorse", "hazel", "ivy", "juniper", "larch", "maple")
STEADY = 2
"""So many sites are never killed."""

TWICE = "birch"
"""One of those, which sends each of its replies three times."""

ROUND_SECONDS = 20.0
FAULTS = ("kill site", "leave and return", "freeze", "kill rounds", "kill server")
QUIET = 5
"""Rounds at the end in which nothing happens, so that all are there."""

SHARE = 0.35
"""Share of the rounds in which something happens."""


def template(rounds: int, sites: int) -> Template:
    """A small study; two sites share a folder of images where there are more sites than folders."""
    names = TREES[:sites]
    folders = (*TRAINING, OBSERVER)
    plan = {
        "kind": "simulated",
        "unit": "image",
        "shares": {"train": 0.5, "val": 0.2, "test": 0.2, "unlabelled": 0.1},
        "sites": [{"name": name, "folder": folders[index % 4]} for index, name in enumerate(names)],
        "shared": True,
    }
    return make_template(
        sites=[{"name": name} for name in names],
        simulation=plan,
        rounds=rounds,
        max_sites=sites,
        round_seconds=ROUND_SECONDS,
        training={"steps": 1, "learning_rate": 0.003, "batch_size": 8},
        method={"adapter": "facmic"},
    )


@dataclass
class Soak:
    """The run: what was done to it and what was seen."""

    network: Network
    rounds: int
    random: random.Random
    done: Counter[str] = field(default_factory=Counter)
    samples: list[dict[str, Any]] = field(default_factory=list)
    waiting: dict[str, float] = field(default_factory=dict)
    """Sites that are to start again, or to go on, and when."""
    frozen: set[str] = field(default_factory=set)
    unexpected: list[str] = field(default_factory=list)

    def run(self) -> None:
        """Until every process has ended by itself."""
        network = self.network
        known = -1
        while True:
            self._mend()
            alive = [name for name, process in network.processes.items() if process.poll() is None]
            if not alive and not self.waiting:
                return
            if alive and "server" not in alive:
                # It has not waited for who came too late for the last rounds.
                network.start("server")
            number = max(0, network.records - 1)
            if number != known:
                known = number
                self._sample(number)
                print(f"round {number} of {self.rounds}: {dict(self.done)}", file=sys.stderr, flush=True)
                if 0 < number < self.rounds - QUIET and self.random.random() < SHARE:
                    self._hurt(number)
            time.sleep(0.25)

    def _hurt(self, number: int) -> None:
        faults = FAULTS if number < self.rounds / 2 else FAULTS[:3]
        fault = self.random.choice(faults)
        network = self.network
        if fault == "kill server":
            network.kill("server")
            network.start("server")
        elif fault == "kill rounds":
            try:
                os.kill(network.rounds_process(), signal.SIGKILL)
            except (ValueError, ProcessLookupError):
                return  # it is between two already
        else:
            free = [name for name in network.names[STEADY:] if name not in self.waiting]
            # Enough of them must be left for the study to go on.
            if len(network.names) - len(self.waiting) <= network.agreed.study.min_sites + 1 or not free:
                return
            site = self.random.choice(free)
            pause = self.random.uniform(1, 30)
            if fault == "kill site":
                network.kill(site)
            elif fault == "leave and return":
                network.processes[site].terminate()
                network.processes[site].wait(60)
            else:
                network.processes[site].send_signal(signal.SIGSTOP)
                self.frozen.add(site)
            self.waiting[site] = time.monotonic() + pause
        self.done[fault] += 1

    def _mend(self) -> None:
        network = self.network
        for site, due in list(self.waiting.items()):
            if time.monotonic() < due and network.records - 1 < self.rounds - QUIET:
                continue
            del self.waiting[site]
            if site in self.frozen:
                self.frozen.discard(site)
                network.processes[site].send_signal(signal.SIGCONT)
            else:
                network.start(site)
        for name, process in network.processes.items():
            # Of the ends that nobody caused, 0 is the study's; all else is a broken invariant.
            if name not in self.waiting and process.poll() not in (None, 0):
                self.unexpected.append(f"{name} ended with {process.poll()}: {network.log(name).splitlines()[-1]}")
                network.start(name)

    def _sample(self, number: int) -> None:
        network = self.network
        pids: dict[str, int] = {}
        for name, process in network.processes.items():
            if process.poll() is None:
                pids[name] = process.pid
        with contextlib.suppress(ValueError, OSError):  # between two
            pids["rounds"] = network.rounds_process()
        row: dict[str, Any] = {"round": number, "time": time.time(), "processes": {}}
        for name, pid in pids.items():
            memory = memory_of(pid)
            if memory:
                row["processes"][name] = {"pid": pid, **memory}
        self.samples.append(row)


def memory_of(pid: int) -> dict[str, float]:
    """Resident, own (private) and proportional memory of a process in MB; empty once it has ended."""
    fields: dict[str, float] = {}
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
            name, value = line.split(":")
            fields[name] = int(value.split()[0]) * 1024 / 1e6
    except (OSError, ValueError):
        return {}
    if not fields:
        return {}
    own = fields["Private_Clean"] + fields["Private_Dirty"]
    return {"rss_mb": fields["Rss"], "own_mb": own, "pss_mb": fields["Pss"]}


def growth(samples: list[dict[str, Any]], name: str, measure: str) -> dict[str, Any] | None:
    """Slope of a process's memory over its longest life, without its first ten rounds; None if it was short."""
    lives: dict[int, list[tuple[int, float]]] = {}
    for row in samples:
        facts = row["processes"].get(name)
        if facts:
            lives.setdefault(facts["pid"], []).append((row["round"], facts[measure]))
    life = max(lives.values(), key=len, default=[])[10:]
    if len(life) < 10:
        return None
    rounds, values = np.array([point[0] for point in life]), np.array([point[1] for point in life])
    slope, _ = np.polyfit(rounds, values, 1)
    return {
        "rounds": [int(rounds[0]), int(rounds[-1])],
        "first_mb": float(values[0]),
        "last_mb": float(values[-1]),
        "mb_per_100_rounds": float(slope * 100),
        "measure": measure,
    }


def invariants(network: Network, rounds: int) -> dict[str, Any]:
    """Each of the federation's promises, and whether it was kept."""
    chain = Chain(network.agreed)
    run = str(ServerState(network.folder / "server").current_run)
    folder = network.folder / "server" / "runs" / run / "journal"
    records = list(RecordFolder(folder).replay(chain))
    aggregates = [record for record in records if record.header.kind == "aggregate"]
    cohorts = [[entry.site for entry in record.contributors] for record in aggregates]
    digests = {name: network.summary(name)["adapter_digest"] for name in network.names}
    copies = {
        name: all(
            (network.site_folder(name) / "state" / "runs" / run / "journal" / path.name).read_bytes()
            == path.read_bytes()
            for path in folder.glob("*.record")
        )
        for name in network.names
    }
    (found,) = find_runs(network.folder / "server")
    sums = list(recompute(found, network.agreed, EnvelopeStore(network.folder / "kept")))
    minimum = network.agreed.study.min_sites
    return {
        "every round has its record, the chain verifies": chain.finished and len(aggregates) == rounds,
        "each sum has enough sites, each once": all(len(cohort) == len(set(cohort)) >= minimum for cohort in cohorts),
        "each sum, added again from the envelopes, is the same bit for bit": len(sums) == rounds
        and all(entry.same for entry in sums),
        "every site has the server's journal": all(copies.values()),
        "every site holds the same adapter": len(set(digests.values())) == 1,
        "contributions": sum(map(len, cohorts)),
        "smallest_cohort": min(map(len, cohorts)),
        "adapter_digest": next(iter(digests.values())),
        "journal": journal_size(network, records),
    }


def journal_size(network: Network, records: list[Record]) -> dict[str, Any]:
    """The journal's size, and what the first aggregate predicts: bytes of its sum, of a record's frame, and of one
    contributor's signed header."""
    chain = Chain(network.agreed)
    aggregates = [record for record in records if record.header.kind == "aggregate"]
    first = aggregates[0]
    frame = len(records[0].data)
    count = len(first.contributors)
    each = (len(first.data) - chain.wire.payload_bytes - frame) / count
    predicted = frame + sum(frame + len(record.contributors) * each + chain.wire.payload_bytes for record in aggregates)
    actual = sum(len(record.data) for record in records)
    return {"bytes": actual, "predicted_bytes": round(predicted), "ratio": actual / predicted}


def soak(folder: Path, rounds: int, sites: int, seed: int) -> dict[str, Any]:
    """Run, hurt, check and measure."""
    make_images(folder / "images", per_class=10)
    network = Network(folder / "out", template(rounds, sites), folder / "images", forked=True)
    for site in open_sites(network.agreed, network.folder):
        site.features()
    network.options["server"] = ["--keep-envelopes", str(network.folder / "kept")]
    run = Soak(network, rounds, random.Random(seed))  # noqa: S311
    began = time.monotonic()
    try:
        network.start("server")
        network.start(*(name for name in network.names if name != TWICE))
        network.start(TWICE, fault={"duplicate": True})
        run.run()
        seconds = time.monotonic() - began
        kept = invariants(network, rounds)
    finally:
        network.close()
    steady = network.names[:STEADY]
    totals = [sum(facts["pss_mb"] for facts in row["processes"].values()) for row in run.samples]
    return {
        "rounds": rounds,
        "sites": sites,
        "seed": seed,
        "seconds": seconds,
        "processors": os.cpu_count(),
        "machine": platform.machine(),
        "faults": dict(run.done),
        "unexpected_ends": run.unexpected,
        "invariants": kept,
        "memory": {
            "total_mb": {"median": float(np.median(totals)), "most": max(totals)},
            "growth": {
                **{name: growth(run.samples, name, "rss_mb") for name in ("server", "rounds")},
                **{name: growth(run.samples, name, "own_mb") for name in steady},
            },
        },
    }


def main() -> None:
    """Run, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--sites", type=int, default=8, choices=range(4, len(TREES) + 1))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the result here too")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = soak(Path(folder), arguments.rounds, arguments.sites, arguments.seed)
    text = json.dumps(result, indent=2) + "\n"
    print(text, end="")
    if arguments.json is not None:
        arguments.json.write_text(text)
    kept = all(value for value in result["invariants"].values() if isinstance(value, bool))
    sys.exit(0 if kept and not result["unexpected_ends"] else 1)


if __name__ == "__main__":
    main()

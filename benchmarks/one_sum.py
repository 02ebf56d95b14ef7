"""The head of one sum on brain MRI: accuracy, bytes, coverage and what a budget costs; five seeds.

    python benchmarks/one_sum.py --data DATA [--work DIR] [--seeds 5] [--json FILE]
    python benchmarks/one_sum.py --sites 64

DATA holds ``client_0 .. client_3/CLASS/*.jpg``; ``client_3`` is held out. What sites would send goes through the same
integers, in the same layout, as in ``configs/brain_mri_one_sum.toml``; encryption changes no bit of it
(``tests/integration/test_one_sum.py``). With ``--sites``, a study of so many sites with made-up statistics instead:
every sum sealed, added, opened and solved, and how long that took.
"""

from __future__ import annotations

import argparse
import json
import secrets
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from brain_mri import World
from rich.console import Console

from secure_fed.clients import one_sum as at_site
from secure_fed.clients.features import SiteFeatures
from secure_fed.clients.training import predict
from secure_fed.model.adapters import initial_parameters
from secure_fed.model.cases import judge
from secure_fed.model.evaluation import balanced_accuracy
from secure_fed.model.public_statistics import make_basis, packaged_statistics
from secure_fed.privacy.accounting import mu_squared_of
from secure_fed.privacy.ckks import Cipher, StudySecret
from secure_fed.privacy.class_statistics import noisy_values
from secure_fed.protocol import aggregation, one_sum
from secure_fed.protocol.basis import Basis
from secure_fed.protocol.codec import Parameters, layout_of
from secure_fed.protocol.packing import Binding, CipherWire
from secure_fed.protocol.study import AgreedStudy, read_template, with_fields

DELTA = 1e-5
BASES: dict[str, dict[str, Any]] = {
    "raw, 512 dimensions, 20 bits": {},
    "raw, 18 bits": {"encoding": {"bits": 18, "value_bound": 1.0}},
    "public, 256 dimensions, 20 bits": {"features": {"basis": "public", "dimensions": 256}},
    "public, 128 dimensions, 12 bits": {
        "features": {"basis": "public", "dimensions": 128},
        "encoding": {"bits": 12, "value_bound": 1.0},
    },
    "random, 128 dimensions, 20 bits": {"features": {"basis": "random", "dimensions": 128}},
}
PRIVATE: dict[str, dict[str, Any]] = {
    name: {
        "rounds": 1,
        "features": {"basis": name.split()[0], "dimensions": 64},
        "method": {"adapter": "gaussian_head", "shrinkage": 0.03, "most_patients": 1000},
    }
    for name in ("public 64", "random 64")
}


def study_of(world: World, changes: dict[str, Any]) -> AgreedStudy:
    """The world's study with another basis, encoding or method."""
    agreed = world.template
    study = with_fields(agreed.study, **changes)
    prompts = agreed.initial.prompt_features
    width = prompts.shape[1]
    statistics = packaged_statistics(study.backbone.model, study.backbone.digest)
    basis = make_basis(study.features, width, study.seed, statistics)
    adapter = initial_parameters(study.method, width, prompts, study.seed, None, basis.dimensions)
    return AgreedStudy(study, replace(agreed.initial, adapter=adapter, basis=basis))


def federate(agreed: AgreedStudy, features: list[SiteFeatures], epsilon: float | None, exact: bool) -> Parameters:
    """The adapter after the study's rounds; ``exact`` leaves the rounding to integers out."""
    state = aggregation.start(agreed)
    for number in range(1, agreed.study.rounds + 1):
        if epsilon is None:
            sent = [at_site.message(agreed, number, state, own) for own in features]
        else:
            noise = mu_squared_of(epsilon, DELTA) ** -0.5  # one release with the whole budget
            sent = [noisy_values(at_site.sums(agreed, own), noise) for own in features]
        layout = agreed.layout(number)
        if exact:
            found = {name: np.sum([one[name] for one in sent], axis=0) for name in sent[0]}
        else:
            total = sum(layout.encode(one, 1.0, np.zeros(0))[0] for one in sent)
            found = layout.decode(np.asarray(total), [1.0] * len(sent))
        state = aggregation.after_round(agreed, state, found)
    return aggregation.adapter_of(state)


def figures(world: World, agreed: AgreedStudy, parameters: Parameters) -> dict[str, float | None]:
    """Balanced accuracies, and coverage where sets are claimed, on own test images and held out, in percent."""
    own = [world.features[name].test for name in world.training]
    seen = world.features[world.held_out]
    parts = [seen.train, seen.val, seen.test]
    x, y = (np.concatenate([getattr(part, name) for part in parts]) for name in ("x", "y"))
    scores = [balanced_accuracy(predict(agreed, parameters, one.x, None), one.y) for one in own]
    found: dict[str, float | None] = {
        "own": 100 * float(np.mean([score for score in scores if score is not None])),
        "held_out": 100 * (balanced_accuracy(predict(agreed, parameters, x, None), y) or 0.0),
        "bytes": float(sum(agreed.layout(number + 1).lanes.payload_bytes for number in range(agreed.study.rounds))),
    }
    for name, images, labels in (
        ("own", np.concatenate([one.x for one in own]), np.concatenate([one.y for one in own])),
        ("held_out", x, y),
    ):
        cases = judge(agreed.initial, parameters, images)
        sets = None if cases is None else cases.sets[np.arange(len(labels)), labels].mean()
        found[f"coverage_{name}"] = None if sets is None else 100 * float(sets)
    return found


def sites_study(count: int) -> dict[str, float]:
    """Seconds of a whole study of so many sites: statistics of 512 dimensions and 4 classes, made up."""
    rng = np.random.default_rng(0)
    size, classes, most = 512, 4, 1000
    x = rng.standard_normal((2000, size)) * np.geomspace(1, 1e-2, size)
    x /= np.linalg.norm(x, axis=1).max()
    labels = rng.integers(0, classes, len(x))
    basis = Basis(np.zeros(size), None, 1.0, np.sqrt(np.square(x).mean(axis=0)))
    hot = np.eye(classes)[labels]
    values = one_sum.Sums(hot.sum(axis=0) / 4, hot.T @ x / 4, x.T @ x / 4).values()
    layout = layout_of(one_sum.sums_blocks(classes, basis, most, 24), count, 15, None)
    start = time.perf_counter()
    cipher, wire = Cipher(layout.lanes, StudySecret.generate(layout.lanes.modulus_bits)), CipherWire(layout.lanes)
    binding = Binding(run=secrets.token_hex(32), head=secrets.token_hex(32), round=1)
    total, cohort = wire.zero(), []
    integers = layout.encode(values, 1.0, np.zeros(0))[0]
    for number in range(count):
        sealed = cipher.seal(integers, binding, f"site-{number}", 1)
        total = wire.add(total, sealed.payload)
        cohort.append(sealed.contribution)
    sums = cipher.open(wire.record(total, count), binding, cohort)
    if not np.array_equal(sums, count * integers):
        raise SystemExit("the sum is not exact")
    head = one_sum.solve(one_sum.Sums.of(layout.decode(sums, [1.0] * count)), 0.01, 5)
    if head is None:
        raise SystemExit("no head")
    seconds = time.perf_counter() - start
    return {"sites": count, "seconds": seconds, "bytes_up_a_site": layout.lanes.payload_bytes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="client_0 .. client_3/CLASS/*.jpg")
    parser.add_argument("--work", type=Path, help="keeps features, so that a run goes on")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--sites", type=int, help="instead: time a study of so many sites")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    console = Console()
    if arguments.sites:
        console.print(sites_study(arguments.sites))
        return
    template = read_template(Path("brain_mri_one_sum"))
    rows: dict[str, list[dict[str, float | None]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(arguments.seeds):
            world = World(template, seed, arguments.data.resolve(), arguments.work or Path(folder))
            own = [world.features[name] for name in world.training]
            for name, changes in BASES.items():
                agreed = study_of(world, changes)
                rows.setdefault(name, []).append(figures(world, agreed, federate(agreed, own, None, exact=False)))
            agreed = study_of(world, {})
            exact = figures(world, agreed, federate(agreed, own, None, exact=True))
            rows.setdefault("raw, without rounding", []).append(exact)
            for name, changes in PRIVATE.items():
                for epsilon in (0.5, 1.0, 3.0, 8.0):
                    agreed = study_of(world, changes)
                    found = figures(world, agreed, federate(agreed, own, epsilon, exact=False))
                    rows.setdefault(f"{name}, epsilon {epsilon:g}", []).append(found)
    console.print(
        "| basis | own test | held out | covered, own | covered, held out | kB up |\n|---|---|---|---|---|---|"
    )
    for name, seeds in rows.items():
        cells = []
        for key in ("own", "held_out", "coverage_own", "coverage_held_out"):
            values = [one[key] for one in seeds if one[key] is not None]
            error = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else 0.0  # type: ignore[arg-type]
            cells.append(f"{np.mean(values):.1f} ± {error:.1f}" if values else "")  # type: ignore[arg-type]
        console.print(f"| {name} | {' | '.join(cells)} | {(seeds[0]['bytes'] or 0) / 1e3:.0f} |", soft_wrap=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()

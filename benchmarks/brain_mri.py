"""Methods compared on brain MRI: five seeds, with and without the domain term, beside the baselines.

    python benchmarks/brain_mri.py --data DATA [--out docs/results] [--seeds 5] [--long-seeds 1] [--json FILE]

DATA holds ``client_0 .. client_3/CLASS/*.jpg``; ``client_3`` is held out and seen by nobody before the end. Sites train
as in ``configs/brain_mri.toml``; what they would send is rounded to the same integers and averaged, without the
encryption, which changes no bit (``tests/integration/test_methods.py`` shows both). Each seed has its own splits,
initial adapter and order of images, and chooses each method's learning rate by its own validation images; test images,
held-out ones included, are looked at once, for the chosen one. The domain term and the variants take the rate that was
chosen for their method without it; the domain term's weight is chosen likewise. Features are computed once.
``gaussian_head`` takes two rounds and has no rate: its sums' histograms choose its shrinkage. For the first
``--long-seeds`` seeds the methods of rounds go on to round 200, at the chosen rate, and are looked at on the way.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from secure_fed.clients import one_sum
from secure_fed.clients.features import SiteFeatures, pool_features
from secure_fed.clients.training import predict, train_alone, train_round, training_seed, zero_shot
from secure_fed.lab.simulation import open_sites, prepare, run_id
from secure_fed.model.adapters import PRIVATE_HEAD, initial_parameters, needs_tower
from secure_fed.model.backbone import load_backbone
from secure_fed.model.evaluation import Metrics, balanced_accuracy, metrics
from secure_fed.model.public_statistics import (
    PublicStatistics,
    make_basis,
    packaged_statistics,
    precision_for,
)
from secure_fed.model.scores import SCALARS
from secure_fed.model.text_tower import TextTower
from secure_fed.protocol import aggregation, codec
from secure_fed.protocol.codec import Parameters, lane_width
from secure_fed.protocol.initial_state import InitialState
from secure_fed.protocol.study import AgreedStudy, Template, read_template, with_fields

RATES = (3e-4, 1e-3, 3e-3)
"""Learning rates that validation chooses from."""

BOUND_STEPS = 60
"""Value bound in steps' lengths: Adam moves a coordinate by about one learning rate a step, and a round has 50."""

WEIGHTS = (0.1, 1.0)
"""Weights of LMMD that validation chooses from; the paper's is 1."""

ADVERSARIAL = (0.1, 0.5)
"""Weights of the adversarial term that validation chooses from; the paper's is 0.5."""

PAPER = {"adapter": "facmic", "norm": "batch", "loss": "contrastive"}
ONE_SUM = {"adapter": "gaussian_head", "most_patients": 1000}

LONG, EVERY = 200, 10
"""Rounds of the long curves, and how many lie between two looks at the test images."""


@dataclass(frozen=True)
class Row:
    """One line of the comparison.

    Attributes:
        name: as shown.
        method: the study's ``[method]``.
        like: name of the row whose learning rate it takes; empty to choose its own.
        training: changes of ``[training]``.
        aggregation: the study's ``[aggregation]``.
        rates: learning rates to choose from.
        weights: weights of the domain term to choose from; 0 for none.
        term: the domain term.
        features: the study's ``[features]``, of a row of one sum.
        long: whether the row is one of the long curves.
    """

    name: str
    method: dict[str, Any]
    like: str = ""
    training: dict[str, Any] | None = None
    aggregation: dict[str, Any] | None = None
    rates: tuple[float, ...] = RATES
    weights: tuple[float, ...] = (0.0,)
    term: str = "lmmd"
    features: dict[str, Any] | None = None
    long: bool = False

    @property
    def one_sum(self) -> bool:
        """Whether it sends sums and not updates."""
        return self.method["adapter"] == ONE_SUM["adapter"]


SUMS = (
    Row("gaussian_head, raw", ONE_SUM, rates=(0.001,), features={"basis": "raw"}),
    Row("gaussian_head, public, 256", ONE_SUM, rates=(0.001,), features={"basis": "public", "dimensions": 256}),
    Row("gaussian_head, public, 128", ONE_SUM, rates=(0.001,), features={"basis": "public", "dimensions": 128}),
    Row("gaussian_head, random, 128", ONE_SUM, rates=(0.001,), features={"basis": "random", "dimensions": 128}),
)
ROWS = (
    *SUMS,
    Row("text_head", {"adapter": "text_head"}, long=True),
    Row("prompts", {"adapter": "prompts"}, long=True),
    Row("low_rank", {"adapter": "low_rank"}, long=True),
    Row("low_rank + LMMD", {"adapter": "low_rank"}, "low_rank", weights=WEIGHTS),
    Row("fedclip", {"adapter": "fedclip"}, long=True),
    Row("fedclip + LMMD", {"adapter": "fedclip"}, "fedclip", weights=WEIGHTS),
    Row("facmic", {"adapter": "facmic"}, long=True),
    Row("facmic + LMMD", {"adapter": "facmic"}, "facmic", weights=WEIGHTS, long=True),
    Row("facmic + adversarial", {"adapter": "facmic"}, "facmic", weights=ADVERSARIAL, term="adversarial"),
    Row("facmic, paper's norm and loss", PAPER, long=True),
    Row("facmic, paper's norm and loss + LMMD", PAPER, "facmic, paper's norm and loss", weights=WEIGHTS),
    Row(
        "facmic, paper's norm and loss + adversarial",
        PAPER,
        "facmic, paper's norm and loss",
        weights=ADVERSARIAL,
        term="adversarial",
    ),
    Row("facmic, paper's learning rate", {"adapter": "facmic"}, rates=(5e-5,)),
    Row("facmic, private head", {"adapter": "facmic", "private_head": True}, "facmic"),
    Row("facmic, prox 0.1", {"adapter": "facmic"}, "facmic", training={"prox": 0.1}),
    Row("facmic, FedAvgM", {"adapter": "facmic"}, "facmic", aggregation={"rule": "fedavgm", "betas": [0.5, 0.99]}),
    Row("facmic, FedAdam", {"adapter": "facmic"}, "facmic", aggregation={"rule": "fedadam", "learning_rate": 0.01}),
)


def sum_study(
    like: AgreedStudy, statistics: PublicStatistics | None = None, bits: int | None = None, **changes: Any
) -> AgreedStudy:
    """A study of one sum, like another study and as ``study new`` would make it; of two rounds if nothing else is said.

    Args:
        like: whose sites, classes and backbone it has.
        statistics: of public images; by default those of the backbone.
        bits: of a value, if not those that the basis asks for.
        changes: tables of the study.
    """
    study = with_fields(like.study, **{"rounds": 2, "aggregation": {"rule": "average"}} | changes)
    prompts, width = like.initial.prompt_features, like.initial.prompt_features.shape[1]
    statistics = statistics or packaged_statistics(study.backbone.model, study.backbone.digest)
    precision = bits or precision_for(study.features, statistics)
    fields = {"bits": lane_width(precision, study.max_sites, None), "lanes": None, "precision_bits": precision}
    kept = study.encoding.model_dump(mode="json") | fields
    study = with_fields(study, encoding={name: value for name, value in kept.items() if value is not None})
    basis = make_basis(study.features, width, study.seed, statistics)
    adapter = initial_parameters(study.method, width, prompts, study.seed, None, basis.dimensions)
    return AgreedStudy(study, replace(like.initial, adapter=adapter, basis=basis))


class World:
    """One seed's study, features and backbone: everything that the rows share."""

    def __init__(self, template: Template, seed: int, data: Path, work: Path) -> None:
        out = work / f"seed-{seed}"
        agreed = prepare(with_fields(template, seed=seed, mode="plain"), out, data)
        earlier = sorted(work.glob("seed-*/sites"))
        self.template = agreed
        self.features: dict[str, SiteFeatures] = {}
        for site in open_sites(agreed, out):
            cache = out / "sites" / site.name / "state" / "features.sqlite"
            known = [path / site.name / "state" / "features.sqlite" for path in earlier]
            first = next((path for path in known if path.exists()), None)
            if first is not None and not cache.exists():
                cache.write_bytes(first.read_bytes())
            self.features[site.name] = site.features()
        roles = {member.name: member.role for member in agreed.study.sites}
        self.training = [name for name, role in roles.items() if role == "train"]
        (self.held_out,) = (name for name, role in roles.items() if role == "observer")
        backbone = load_backbone(agreed.study.backbone, None)
        self.tokens = backbone.tokenize([entry.prompts[0] for entry in agreed.study.classes])
        self.tower = backbone.text_tower(self.tokens)

    def study(self, row: Row, rate: float, weight: float = 0.0) -> tuple[AgreedStudy, TextTower | None]:
        """The study with a row's method at a learning rate and a weight of the domain term."""
        if row.one_sum:
            return sum_study(self.template, method=row.method, features=row.features), None
        before = self.template.study
        study = with_fields(
            before,
            method=row.method | {f"{row.term}_weight": weight, "adaptation": row.term if weight else "none"},
            training=before.training.model_dump(mode="json") | {"learning_rate": rate} | (row.training or {}),
            aggregation=row.aggregation or {"rule": "average"},
            encoding=before.encoding.model_dump(mode="json") | {"value_bound": BOUND_STEPS * rate},
        )
        initial, tower = self.template.initial, self.tower if needs_tower(study.method) else None
        prompts = initial.prompt_features
        adapter = initial_parameters(study.method, prompts.shape[1], prompts, study.seed, tower)
        tokens = None if tower is None else self.tokens
        return AgreedStudy(study, InitialState(adapter, prompts, initial.logit_scale, tokens)), tower

    def probabilities(
        self, agreed: AgreedStudy, parameters: Parameters | None, name: str, x: NDArray[np.float32], tower: Any
    ) -> NDArray[np.float64]:
        if parameters is None:
            return zero_shot(agreed, x)
        own = np.concatenate([self.features[name].train.x, self.features[name].unlabelled])
        return predict(agreed, parameters, x, own, tower)


@dataclass(frozen=True)
class Trained:
    """A federation's result: the adapter, and each site's private head if there is one."""

    agreed: AgreedStudy
    tower: TextTower | None
    adapter: Parameters
    heads: dict[str, Parameters]
    curve: tuple[float, ...]

    def at(self, name: str) -> Parameters:
        return self.adapter | self.heads.get(name, {})


def federate(
    agreed: AgreedStudy,
    features: dict[str, SiteFeatures],
    tower: TextTower | None = None,
    after: Callable[[Parameters, dict[str, Parameters]], float] = lambda adapter, heads: 0.0,
) -> Trained:
    """The study's rounds in memory: the same training, integers and aggregation as at the sites, bit for bit.

    Args:
        agreed: the study.
        features: of its training sites, by name.
        tower: the text tower, for methods that need it.
        after: is called after each round; its values are the curve.
    """
    study = agreed.study
    run = run_id(study, 1)
    state = aggregation.start(agreed)
    heads: dict[str, Parameters] = {}
    curve = []
    for number in range(1, study.rounds + 1):
        adapter, layout = aggregation.adapter_of(state), agreed.layout(number)
        sums = np.zeros(layout.lanes.values, dtype=np.int64)
        for name, own in features.items():
            if study.method.one_sum:
                sent = one_sum.message(agreed, number, state, own)
                sums += layout.encode(sent, 1.0, np.zeros(0))[0]
                continue
            seed = training_seed(study.seed, run, name, number)
            trained = train_round(agreed, adapter | heads.get(name, {}), own, seed, tower)
            if PRIVATE_HEAD in trained:
                heads[name] = {PRIVATE_HEAD: trained.pop(PRIVATE_HEAD)}
            update = codec.flatten(trained) - codec.flatten(adapter)
            draws = codec.rounding_draws(study.seed, run, name, number, update.size)
            values = {codec.UPDATE: update, codec.COUNTS: np.zeros(2)}
            sums += layout.encode(values, study.site(name).weight, draws)[0]
        weights = [study.site(name).weight for name in features]
        state = aggregation.after_round(agreed, state, layout.decode(sums, weights))
        curve.append(after(aggregation.adapter_of(state), heads))
    return Trained(agreed, tower, aggregation.adapter_of(state), heads, tuple(curve))


def validation(world: World, agreed: AgreedStudy, tower: Any, at: Callable[[str], Parameters]) -> float:
    """Mean over the training sites of the balanced accuracy on their validation images."""
    values = []
    for name in world.training:
        val = world.features[name].val
        values.append(balanced_accuracy(world.probabilities(agreed, at(name), name, val.x, tower), val.y))
    return statistics.mean(value for value in values if value is not None)


def test(world: World, agreed: AgreedStudy, tower: Any, at: Callable[[str], Parameters | None]) -> dict[str, Metrics]:
    """Metrics on each site's test images, and on all labelled ones of the held-out site."""
    found = {}
    for name in (*world.training, world.held_out):
        own = world.features[name]
        parts = (own.train, own.val, own.test) if name == world.held_out else (own.test,)
        x, y = np.concatenate([part.x for part in parts]), np.concatenate([part.y for part in parts])
        found[name] = metrics(world.probabilities(agreed, at(name), name, x, tower), y)
    return found


def bytes_up(agreed: AgreedStudy) -> int:
    """What a site sends in all of a study's rounds, encrypted."""
    return sum(agreed.layout(number + 1).lanes.payload_bytes for number in range(agreed.study.rounds))


def run_long(template: Template, seed: int, row: Row, data: Path, work: Path) -> dict[str, Any]:
    """A row of one seed that goes on to round LONG, at the rate and weight that validation chose for ten rounds.

    Returns:
        Every EVERY rounds the mean of the training sites' balanced accuracies on validation and test images, the
        held-out site's, and the bytes that a site has sent.
    """
    torch.set_num_threads(1)
    kept = work / f"seed-{seed}" / f"long-{row.name.replace(' ', '_')}.json"
    if kept.exists():
        return dict(json.loads(kept.read_text()))
    world = World(template, seed, data, work)
    chosen = json.loads((work / f"seed-{seed}" / "results.json").read_text())[row.name]
    short, tower = world.study(row, chosen["rate"], chosen["weight"])
    agreed = AgreedStudy(with_fields(short.study, rounds=LONG), short.initial)
    found: dict[str, Any] = {"rounds": [], "validation": [], "own": [], "held_out": [], "bytes_up": []}
    rounds = 0

    def after(adapter: Parameters, heads: Any) -> float:
        nonlocal rounds
        rounds += 1
        if rounds % EVERY == 0:
            tests = test(world, agreed, tower, lambda name: adapter)
            scores = {name: tests[name]["balanced_accuracy"] for name in tests}
            found["rounds"].append(rounds)
            found["validation"].append(validation(world, agreed, tower, lambda name: adapter))
            found["own"].append(statistics.mean(scores[name] for name in world.training))
            found["held_out"].append(scores[world.held_out])
            found["bytes_up"].append(rounds * agreed.layout(1).lanes.payload_bytes)
        return 0.0

    federate(agreed, {name: world.features[name] for name in world.training}, tower, after)
    kept.write_text(json.dumps(found))
    return found


def run_seed(template: Template, seed: int, data: Path, work: Path) -> dict[str, Any]:
    """All rows and baselines of one seed: chosen rate and weight, validation, curve and test metrics."""
    torch.set_num_threads(1)
    world = World(template, seed, data, work)
    kept = work / f"seed-{seed}" / "results.json"
    results: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    training = {name: world.features[name] for name in world.training}
    for row in ROWS:
        if row.name in results:
            continue
        candidates = []
        for rate, weight in product((results[row.like]["rate"],) if row.like else row.rates, row.weights):
            agreed, tower = world.study(row, rate, weight)

            def after(adapter: Parameters, heads: Any, agreed: AgreedStudy = agreed, tower: Any = tower) -> float:
                return validation(world, agreed, tower, lambda name: adapter | heads.get(name, {}))

            trained = federate(agreed, training, tower, after)
            candidates.append((trained.curve[-1], -rate, -weight, trained))
        score, rate, weight, trained = max(candidates, key=lambda candidate: candidate[:3])
        chosen = {
            "rate": -rate,
            "weight": -weight,
            "candidates": [[-rate, -weight, value] for value, rate, weight, _ in candidates],
        }
        results[row.name] = ({} if row.one_sum else chosen) | {
            "validation": score,
            "curve": trained.curve,
            "test": test(world, trained.agreed, trained.tower, trained.at),
            "bytes_up": bytes_up(trained.agreed),
        }
        kept.write_text(json.dumps(results))
    zero = world.template
    results["zero-shot"] = {"test": test(world, zero, None, lambda name: None)}
    for name in ("facmic", "text_head"):
        row = next(row for row in ROWS if row.name == name)
        agreed, tower = world.study(row, results[name]["rate"])
        alone = {site: train_alone(agreed, training[site], site, tower) for site in world.training}
        tests = {site: test(world, agreed, tower, lambda _, own=alone[site]: own) for site in alone}  # type: ignore[misc]
        found = {site: tests[site][site] for site in alone}
        held_out = [tests[site][world.held_out] for site in alone]
        found[world.held_out] = {key: statistics.mean(each[key] for each in held_out) for key in SCALARS}
        results[f"{name}, each site alone"] = {"test": found}
    agreed, tower = world.study(next(row for row in ROWS if row.name == "facmic"), results["facmic"]["rate"])
    pooled = train_alone(agreed, pool_features(list(training.values())), "pooled", tower)
    results["facmic, pooled data"] = {"test": test(world, agreed, tower, lambda name: pooled)}
    return results


def summarise(results: Sequence[dict[str, Any]], held_out: str) -> dict[str, Any]:
    """Mean and standard error over seeds of each metric, at the sites' own tests (mean of sites) and held out."""
    summary: dict[str, Any] = {}
    for name in results[0]:
        entry: dict[str, Any] = {}
        for key in SCALARS:
            own = [
                statistics.mean(value[key] for site, value in one[name]["test"].items() if site != held_out)
                for one in results
            ]
            entry[key] = {
                "own": _spread(own),
                "held_out": _spread([one[name]["test"][held_out][key] for one in results]),
            }
        if "bytes_up" in results[0][name]:
            entry["bytes_up"] = statistics.mean(one[name]["bytes_up"] for one in results)
        if "rate" in results[0][name]:
            entry["rates"] = [one[name]["rate"] for one in results]
            entry["weights"] = [one[name]["weight"] for one in results]
        if "validation" in results[0][name]:
            entry["validation"] = _spread([one[name]["validation"] for one in results])
        summary[name] = entry
    return summary


def _spread(values: Sequence[float]) -> tuple[float, float]:
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return statistics.mean(values), error


ORDER = (
    "zero-shot",
    "text_head, each site alone",
    "facmic, each site alone",
    *(row.name for row in ROWS),
    "facmic, pooled data",
)


def tables(summary: dict[str, Any]) -> str:
    """The Markdown tables."""

    def percent(pair: tuple[float, float]) -> str:
        return f"{100 * pair[0]:.1f} ± {100 * pair[1]:.1f}"

    columns = ("balanced_accuracy", "macro_f1", "auroc", "sensitivity_at_95_specificity", "expected_calibration_error")
    heads = ("method", "MB up", "validation", "own test", "held out", *(SCALARS[key] for key in columns[1:]))
    lines = [f"| {' | '.join((*heads, 'learning rates', 'domain term'))} |", "|---" * (len(heads) + 2) + "|"]
    for name in ORDER:
        entry = summary[name]
        cells = [
            name,
            f"{entry['bytes_up'] / 1e6:.3g}" if "bytes_up" in entry else "",
            percent(entry["validation"]) if "validation" in entry else "",
            percent(entry["balanced_accuracy"]["own"]),
            *(percent(entry[key]["held_out"]) for key in columns),
            ", ".join(f"{rate:g}" for rate in entry.get("rates", ())),
            ", ".join(f"{weight:g}" for weight in entry.get("weights", ()) if weight),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(summary: dict[str, Any], results: Sequence[dict[str, Any]], out: Path) -> None:
    """Figures: balanced accuracy by method, and validation by round."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "secfacmic"
    figure, axes = plt.subplots(figsize=(8, 6.5), layout="constrained")
    places = np.arange(len(ORDER))[::-1]
    for offset, (where, label) in enumerate((("own", "sites' own test images"), ("held_out", "held-out site"))):
        pairs = [summary[name]["balanced_accuracy"][where] for name in ORDER]
        axes.barh(
            places + 0.2 - 0.4 * offset,
            [100 * mean for mean, _ in pairs],
            xerr=[100 * error for _, error in pairs],
            height=0.38,
            label=label,
        )
    axes.set_yticks(places, ORDER)
    axes.set_xlabel("balanced accuracy, % (mean and standard error over seeds)")
    figure.legend(loc="outside upper center", ncols=2)
    figure.savefig(out / "brain_mri.svg", metadata={"Date": None})
    figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
    for row in ROWS:
        if row.one_sum:
            continue
        curve = np.mean([one[row.name]["curve"] for one in results], axis=0)
        axes.plot(np.arange(1, len(curve) + 1), 100 * curve, "--" if any(row.weights) else "-", label=row.name)
    axes.set_xlabel("round")
    axes.set_ylabel("balanced accuracy on validation, %")
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(out / "brain_mri_rounds.svg", metadata={"Date": None})


def long_table(long: dict[str, list[dict[str, Any]]]) -> str:
    """The long curves at some rounds, as a Markdown table: own test / held out."""
    shown = [EVERY, 50, 100, LONG]
    lines = [f"| method | {' | '.join(f'round {number}' for number in shown)} | MB up |", "|---" * 6 + "|"]
    for name, seeds in long.items():
        cells = []
        for number in shown:
            place = number // EVERY - 1
            own, held = (100 * statistics.mean(one[key][place] for one in seeds) for key in ("own", "held_out"))
            cells.append(f"{own:.1f} / {held:.1f}")
        lines.append(f"| {name} | {' | '.join(cells)} | {seeds[0]['bytes_up'][-1] / 1e6:.3g} |")
    return "\n".join(lines) + "\n"


def plot_long(long: dict[str, list[dict[str, Any]]], summary: dict[str, Any], out: Path) -> None:
    """The held-out site and the own tests by round, beside one sum, as lines that need no round."""
    import matplotlib.pyplot as plt

    figure, parts = plt.subplots(1, 2, figsize=(10, 4.5), layout="constrained", sharex=True)
    for axes, key, title in zip(parts, ("own", "held_out"), ("sites' own test images", "held-out site"), strict=True):
        for name, seeds in long.items():
            axes.plot(seeds[0]["rounds"], 100 * np.mean([one[key] for one in seeds], axis=0), label=name)
        level = summary[SUMS[0].name]["balanced_accuracy"][key][0]
        axes.axhline(100 * level, color="black", linestyle="--", label=f"{SUMS[0].name}: one sum")
        axes.set(xlabel="round", ylabel="balanced accuracy, %", title=title)
    parts[1].legend(fontsize="small")
    figure.savefig(out / "brain_mri_long.svg", metadata={"Date": None})


MARK = "<!-- everything below is written by benchmarks/brain_mri.py -->\n"
LEGEND = """Means and standard errors over {count} seeds, in %. *Validation* and *own test* are balanced accuracies,
means over the three training sites; *held out* is the fourth site's balanced accuracy, and the columns right of it are
its too. *Sensitivity* is at 95 % specificity, one class against the rest. *Learning rates* and *domain term*, its
weight, are what each seed's validation chose. A local row's held-out figures are means over the three sites' adapters.
*MB up* is what a site sends in all rounds, encrypted; `gaussian_head` has two rounds and no learning rate.
"""


LONG_LEGEND = """Up to round {rounds}, over {count} of the seeds, each method at the learning rate (and weight of the
domain term) that its validation chose for ten rounds; own test / held out. *MB up*: of a site, by the last round.

"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="client_0 .. client_3/CLASS/*.jpg")
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="gets brain_mri.md and its figures")
    parser.add_argument("--work", type=Path, help="keeps features and finished rows, so that a run goes on")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--long-seeds", type=int, default=1, help="seeds that go on to round 200")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="seeds trained at once")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    start = time.monotonic()
    template, data = read_template(Path("brain_mri")), arguments.data.resolve()
    with tempfile.TemporaryDirectory() as folder:
        work = arguments.work or Path(folder)
        World(template, 0, data, work)  # encodes all images, once
        with ProcessPoolExecutor(arguments.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
            futures = [pool.submit(run_seed, template, seed, data, work) for seed in range(arguments.seeds)]
            results = [future.result() for future in futures]
            rows = [row for row in ROWS if row.long]
            tasks = {
                row.name: [
                    pool.submit(run_long, template, seed, row, data, work) for seed in range(arguments.long_seeds)
                ]
                for row in rows
            }
            long = {name: [future.result() for future in each] for name, each in tasks.items()}
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    (held_out,) = (member.name for member in template.sites if member.role == "observer")
    summary = summarise(results, held_out)
    arguments.out.mkdir(parents=True, exist_ok=True)
    plot(summary, results, arguments.out)
    plot_long(long, summarise(results[: arguments.long_seeds], held_out), arguments.out)
    page = arguments.out / "brain_mri.md"
    before = page.read_text(encoding="utf-8").partition(MARK)[0] if page.exists() else "# Brain MRI\n\n"
    took = f"\nThe run took {(time.monotonic() - start) / 60:.0f} minutes, features included, one thread a seed.\n\n"
    figures = (
        "\n![balanced accuracy by method](brain_mri.svg)\n\n![validation by round](brain_mri_rounds.svg)\n\n"
        + LONG_LEGEND.format(rounds=LONG, count=arguments.long_seeds)
        + long_table(long)
        + "\n![own test and held out by round](brain_mri_long.svg)\n"
    )
    legend = LEGEND.format(count=arguments.seeds)
    page.write_text(before + MARK + "\n" + legend + took + tables(summary) + figures, encoding="utf-8")
    Console().print(tables(summary))


if __name__ == "__main__":
    main()

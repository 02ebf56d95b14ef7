"""Balanced accuracy under differential privacy: methods by budget, on phantoms and on brain MRI.

    python benchmarks/dp_utility.py WORK [--brain-mri DIR] [--no-phantoms] [--phantom-seed 11] [--patients 600]
        [--methods text_head:64 ...] [--clip 4] [--learning-rate 0.5] [--seeds 5] [--epsilons 1 3 8] [--lmmd]
        [--json FILE]

Features come from the committed mini-CLIP, cached in WORK. Three sites train together by federated averaging of what
Site sends, without encryption (which changes no bit) and without the rounding to integers. Noise is planned by the
ledger's own plan, one round kept for a crash. Prints a table of means and standard errors over seeds of initial
adapter and noise, and one JSON line a cell: of the mean of the adapters after each round, and of the last one.
``gaussian_head:32`` is one sum instead: class statistics in 32 public dimensions, which each site releases once.
``text_head:64`` sees features in 64 public dimensions, of the statistics that come with mini-CLIP; ``advised`` is what
docs/privacy.md advises for each budget and the smallest site, dimensions and constants, which is where the demo and
``study new --epsilon`` have it from. The constants were chosen on the phantoms of seed 11.

``--lmmd`` compares the uses of released class means instead (``privacy.lmmd_use``): each hospital has labelled images
of one scanner, and unlabelled and test images of another; balanced accuracy is that on the other scanner.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import one_hot

from secure_fed.clients import one_sum
from secure_fed.clients.features import SiteFeatures
from secure_fed.clients.lmmd import lmmd
from secure_fed.clients.private_lmmd import PublicTerm, attraction, released_each_round, released_once, witness
from secure_fed.clients.training import predict, train_round, training_seed, zero_shot
from secure_fed.core.tomlfile import parse_table
from secure_fed.lab.phantoms import CLASSES
from secure_fed.lab.simulation import open_sites, prepare
from secure_fed.model.adapters import Adapter, build_adapter, initial_parameters
from secure_fed.model.evaluation import metrics
from secure_fed.model.public_statistics import make_basis, packaged_statistics
from secure_fed.operate.advice import CLIP, MOMENTUM, advise
from secure_fed.privacy import class_means
from secure_fed.privacy.accounting import gaussian_noise, mu_squared_of
from secure_fed.privacy.class_statistics import capped, exact_sums, noisy_values
from secure_fed.privacy.dp_training import (
    Descent,
    PatientBatch,
    Patients,
    class_prompt_patient_loss,
    gather_patients,
    public_log_prior,
    to_double,
)
from secure_fed.privacy.ledger import LMMD_SHARE, Account, Ledger, MeanReleases, Plan
from secure_fed.protocol import aggregation
from secure_fed.protocol.codec import flatten
from secure_fed.protocol.study import AgreedStudy, Template, read_template
from secure_fed.protocol.study_tables import Aggregation, Features, Method

DELTA = 1e-5
METHODS = ("advised", "text_head", "text_head:32", "text_head:64", "low_rank", "facmic")
USES = ("synthesis", "attraction", "witness")
PATIENTS = 1000
"""A phantom site's patients; 600 of them train."""

PROMPTS = {
    "no tumour": ["an MRI scan of a healthy brain", "brain MRI without a tumour"],
    "glioma": ["an MRI scan of a brain with a glioma", "brain MRI showing an irregular glioma"],
    "meningioma": ["an MRI scan of a brain with a meningioma", "brain MRI showing a smooth meningioma"],
    "pituitary tumour": ["an MRI scan of a brain with a pituitary tumour", "brain MRI showing a pituitary tumour"],
}


NAMES = ("north", "east", "south")


def phantom_template(seed: int, second_scanner: bool, patients: int = PATIENTS) -> Template:
    """Three hospitals; with ``second_scanner``, for each one group of patients more, seen by another scanner."""
    names = [*NAMES, *(f"{name}-new" for name in NAMES)] if second_scanner else list(NAMES)
    table = {
        "format": 1,
        "name": "dp-utility",
        "mode": "plain",
        "seed": 0,
        "rounds": 10,
        "max_sites": 8 if second_scanner else 4,
        "min_sites": 3,
        "key_maker": "north",
        "classes": [{"name": name, "prompts": PROMPTS[name]} for name in CLASSES],
        "backbone": {"model": "mini-clip", "weights": "file", "file": "mini-clip.safetensors"},
        "method": {"adapter": "facmic"},
        "training": {"steps": 50, "learning_rate": 1e-3},
        "encoding": {"bits": 14, "lanes": 2, "value_bound": 0.1},
        "sites": [{"name": name} for name in names],
        "simulation": {
            "kind": "simulated",
            "unit": "patient",
            "sites": [{"name": name, "folder": name} for name in names],
            "phantoms": [
                {"name": name, "patients": patients, "scanner": index, "class_mix": [0.25] * 4, "unlabelled": 0.0}
                for index, name in enumerate(names)
            ],
            "phantom_seed": seed,
        },
    }
    return parse_table(table, Template, SystemExit, "template")  # type: ignore[type-var]


def brain_template() -> Template:
    table = read_template(Path("brain_mri")).model_dump(mode="json", exclude_none=True)
    table["mode"] = "plain"
    table["backbone"] = {"model": "mini-clip", "weights": "file", "file": "mini-clip.safetensors"}
    return parse_table(table, Template, SystemExit, "template")  # type: ignore[type-var]


def load(template: Template, out: Path, data: Path | None) -> tuple[AgreedStudy, list[SiteFeatures]]:
    agreed = prepare(template, out, data)
    sites = open_sites(agreed, out)
    return agreed, [site.features() for site in sites if agreed.study.site(site.name).role == "train"]


def with_basis(agreed: AgreedStudy, dimensions: int) -> AgreedStudy:
    """The study in so many public dimensions."""
    backbone, width = agreed.study.backbone, agreed.initial.prompt_features.shape[1]
    statistics = packaged_statistics(backbone.model, backbone.digest)
    basis = make_basis(Features(basis="public", dimensions=dimensions), width, 0, statistics)
    return AgreedStudy(agreed.study, replace(agreed.initial, basis=basis))


def fewer(one: SiteFeatures, patients: int | None) -> SiteFeatures:
    """The features with the first so many training patients."""
    kept = set(list(dict.fromkeys(one.patients["train"]))[:patients])
    rows = [row for row, owner in enumerate(one.patients["train"]) if owner in kept]
    train = one.train._replace(x=one.train.x[rows], y=one.train.y[rows])
    return replace(
        one, train=train, patients={**one.patients, "train": tuple(one.patients["train"][row] for row in rows)}
    )


def federate(
    agreed: AgreedStudy, features: list[SiteFeatures], method: Method, epsilon: float | None, seed: int
) -> tuple[float, float]:
    """Mean balanced accuracy over the sites' test images, of a mean of the adapters after each round and the last.

    Averages go through the study's rule; the mean is the one that the study asks for, else that of all alike.
    """
    initial = agreed.initial
    study = agreed.study.model_copy(update={"method": method})
    dimensions = None if initial.basis is None else initial.basis.dimensions
    width = initial.prompt_features.shape[1]
    start = initial_parameters(method, width, initial.prompt_features, seed, dimensions=dimensions)
    own = AgreedStudy(study, replace(initial, adapter=start))
    iterates = []
    private = [] if epsilon is None else [PrivateSite(own, one, epsilon) for one in features]
    parameters: dict[str, Any] = dict(start)
    rule = study.aggregation.model_copy(update={"iterates": "last"})
    state = aggregation.initial_state(rule, parameters)
    for round_number in range(1, study.rounds + 1):
        if private:
            local = [site.round(parameters) for site in private]
        else:
            seeds = [training_seed(seed, "", str(index), round_number) for index in range(len(features))]
            local = [train_round(own, parameters, *pair) for pair in zip(features, seeds, strict=True)]
        step = {name: np.mean([result[name] for result in local], axis=0) - parameters[name] for name in parameters}
        state = aggregation.apply(rule, state, flatten(step))
        parameters = dict(aggregation.adapter_of(state))
        iterates.append(parameters)
    weights = np.arange(1, study.rounds + 1) ** (2.0 if study.aggregation.iterates == "late" else 0.0)
    mean = {name: np.average([one[name] for one in iterates], axis=0, weights=weights) for name in parameters}
    return test(own, mean, features), test(own, parameters, features)


def sum_once(agreed: AgreedStudy, features: list[SiteFeatures], epsilon: float | None) -> tuple[float, float]:
    """The same of class statistics that each site releases once with its whole budget; the shrinkage is declared."""
    method = Method(adapter="gaussian_head", shrinkage=0.03)
    initial, basis = agreed.initial, agreed.initial.basis
    assert basis is not None, "its kind names dimensions"
    prompts = initial.prompt_features
    start = initial_parameters(method, prompts.shape[1], prompts, 0, dimensions=basis.dimensions)
    study = agreed.study.model_copy(update={"method": method, "rounds": 1})
    own = AgreedStudy(study, replace(initial, adapter=start))
    sent = []
    for one in features:
        x, labels, owners = one_sum.views(own, one)
        rows = capped(owners, set(owners), own.study.privacy.images_per_patient)
        sums = exact_sums(x[rows], labels[rows], [owners[row] for row in rows], len(own.study.classes))
        sent.append(sums.values() if epsilon is None else noisy_values(sums, mu_squared_of(epsilon, DELTA) ** -0.5))
    total = {name: np.sum([values[name] for values in sent], axis=0) for name in sent[0]}
    found = test(own, aggregation.one_sum_adapter(own.study, own.initial, total, own.initial.adapter), features)
    return found, found


def test(agreed: AgreedStudy, parameters: dict[str, Any] | None, features: list[SiteFeatures]) -> float:
    scores = []
    for one in features:
        probabilities = (
            zero_shot(agreed, one.test.x) if parameters is None else predict(agreed, parameters, one.test.x, None)
        )
        scores.append(metrics(probabilities, one.test.y)["balanced_accuracy"])
    return float(np.mean([score for score in scores if score is not None]))


class PrivateSite:
    """A site's private rounds with the figures of a ledger's plan, without the ledger's entries."""

    def __init__(self, agreed: AgreedStudy, features: SiteFeatures, epsilon: float) -> None:
        self._agreed = agreed
        self._settings, self._method = agreed.study.privacy, agreed.study.method
        self._batches = self._gather(features, "train")
        self._n_ref = round(len(set(features.patients["train"])), -1)
        self.epsilon = epsilon
        self.plan = self._plan(epsilon)
        self._means = {}
        if self.plan.lmmd_noise_multiplier is not None:
            for side in released_once(self._method, self._settings):
                batches = self._gather(features, "train" if side == "labelled" else side)
                shares = self._labels if side == "labelled" else self._guesses
                noisy = self._noisy(batches, shares, self.plan.lmmd_noise_multiplier)
                self._means[side] = class_means.means_of(noisy, self._settings)

    def _labels(self, batch: PatientBatch) -> torch.Tensor:
        return one_hot(batch.labels, len(self._agreed.study.classes)).double()

    def _guesses(self, batch: PatientBatch) -> torch.Tensor:
        initial = self._agreed.initial
        prompts = torch.from_numpy(initial.prompt_features).double()
        return torch.softmax(initial.logit_scale * batch.features @ prompts.T, dim=-1)

    def _noisy(self, batches: Patients, shares: Any, noise_multiplier: float) -> Any:
        shape = self._agreed.initial.prompt_features.shape
        return class_means.noisy_sum(batches, shares, shape, self._settings, noise_multiplier, gaussian_noise)

    def _adapted(self, adapter: Adapter) -> Patients:
        with torch.no_grad():
            return [one._replace(features=adapter.adapt(one.features)) for one in self._batches]

    def _gather(self, features: SiteFeatures, split: Any) -> Patients:
        x = features.train.x if split == "train" else features.unlabelled
        y = features.train.y if split == "train" else np.zeros(len(x), dtype=np.int64)
        return gather_patients(x, y, features.patients[split], self._settings.images_per_patient)

    def _plan(self, epsilon: float) -> Plan:
        method, settings = self._method, self._settings
        classes, dim = self._agreed.initial.prompt_features.shape

        def why_not(noise_multiplier: float) -> str | None:
            if not method.lmmd_weight:
                return "off"
            return class_means.why_not(settings, noise_multiplier, self._n_ref, classes, dim)

        once, each = len(released_once(method, settings)), released_each_round(method, settings)
        with tempfile.TemporaryDirectory() as folder:
            Ledger.create(Path(folder) / "ledger", Account("site", "", "patient", "simulated", epsilon, DELTA))
            ledger = Ledger(Path(folder) / "ledger")
            means = MeanReleases(settings.lmmd_use, once, each, why_not)
            declared = ledger.account.declare(None, 1)
            rounds = self._agreed.study.rounds
            return ledger.make_plan("0" * 64, "1" * 64, declared, rounds, settings.steps, settings.clip, means)

    def round(self, parameters: dict[str, Any]) -> dict[str, Any]:
        """The parameters after a round."""
        initial, settings, method = self._agreed.initial, self._settings, self._method
        built = build_adapter(method, initial.prompt_features, initial.logit_scale, parameters, basis=initial.basis)
        adapter = to_double(built)
        term, public = None, None
        if self._means and settings.lmmd_use == "attraction":
            term = attraction(method, settings, self._means["unlabelled"])
        elif self._means and released_each_round(method, settings):
            assert self.plan.lmmd_round_noise_multiplier is not None
            noisy = self._noisy(self._adapted(adapter), self._labels, self.plan.lmmd_round_noise_multiplier)
            term = witness(method, settings, class_means.means_of(noisy, settings), self._means["unlabelled"])
        elif self._means:
            public = PublicTerm(method, settings, self._means["labelled"], self._means["unlabelled"]).gradient
        adapter.shows_adapted = term is not None
        loss = class_prompt_patient_loss(public_log_prior(settings, len(self._agreed.study.classes)), term)
        descent = Descent(settings, self.plan.noise_multiplier * settings.clip, self._n_ref)
        descent.run(adapter, self._batches, loss, public)
        return {name: value.detach().numpy().copy() for name, value in adapter.shared_parameters().items()}

    def exact_direction(self, adapter: Adapter, features: SiteFeatures) -> torch.Tensor:
        """The flat gradient of LMMD on all labelled and unlabelled images, classes guessed by zero-shot."""
        source, labels = torch.from_numpy(features.train.x).double(), torch.from_numpy(features.train.y)
        guesses = torch.from_numpy(zero_shot(self._agreed, features.unlabelled))
        target = torch.from_numpy(features.unlabelled).double()
        return flat_gradient(adapter, lmmd(adapter.adapt(source), labels, target, guesses))

    def term_direction(self, adapter: Adapter, features: SiteFeatures, exact_means: bool) -> torch.Tensor:
        """The flat gradient of the study's use of means that are released now (or exact, to tell noise from bias)."""
        settings, method = self._settings, self._method
        left = mu_squared_of(self.epsilon, DELTA)
        once = 0.0 if exact_means else (LMMD_SHARE * left) ** -0.5
        each = once * (self._agreed.study.rounds + 1) ** 0.5 if released_each_round(method, settings) else once

        def means(batches: Patients, shares: Any, multiplier: float) -> class_means.ClassMeans:
            return class_means.means_of(self._noisy(batches, shares, multiplier), settings)

        target = means(self._gather(features, "unlabelled"), self._guesses, once)
        if settings.lmmd_use == "synthesis" or (settings.lmmd_use == "witness" and method.adapter == "low_rank"):
            public = PublicTerm(method, settings, means(self._batches, self._labels, once), target)
            draws = [public.gradient(adapter) for _ in range(8 if settings.lmmd_use == "synthesis" else 1)]
            zero = {name: torch.zeros_like(value) for name, value in adapter.shared_parameters().items()}
            parts = [torch.cat([(zero | one)[name].flatten() for name in sorted(zero)]) for one in draws]
            return torch.stack(parts).mean(0).detach()
        if settings.lmmd_use == "attraction":
            term = attraction(method, settings, target)
        else:
            term = witness(method, settings, means(self._adapted(adapter), self._labels, each), target)
        shown = [term(adapter.adapt(one.features), one.labels).mean(dim=1) for one in self._batches]
        return flat_gradient(adapter, torch.cat(shown).mean())


def flat_gradient(adapter: Adapter, value: torch.Tensor) -> torch.Tensor:
    """The gradient of a value in all shared parameters, flat."""
    parameters = list(adapter.shared_parameters().values())
    found = torch.autograd.grad(value, parameters, allow_unused=True)
    pairs = zip(parameters, found, strict=True)
    return torch.cat([(torch.zeros_like(own) if one is None else one).flatten().detach() for own, one in pairs])


def with_constants(agreed: AgreedStudy, clip: float, learning_rate: float, momentum: float = 0.0) -> AgreedStudy:
    constants = {"clip": clip, "learning_rate": learning_rate, "momentum": momentum}
    settings = agreed.study.privacy.model_copy(update=constants)
    return AgreedStudy(agreed.study.model_copy(update={"privacy": settings}), agreed.initial)


def with_rule(agreed: AgreedStudy, rule: Aggregation) -> AgreedStudy:
    return AgreedStudy(agreed.study.model_copy(update={"aggregation": rule}), agreed.initial)


def with_use(agreed: AgreedStudy, use: str) -> AgreedStudy:
    settings = agreed.study.privacy.model_copy(update={"lmmd_use": use})
    return AgreedStudy(agreed.study.model_copy(update={"privacy": settings}), agreed.initial)


def second_scanner(features: list[SiteFeatures]) -> list[SiteFeatures]:
    """Labelled images of the first three sites, unlabelled and test images of the other three."""
    return [
        replace(
            one,
            test=other.test,
            unlabelled=other.train.x,
            patients={**one.patients, "unlabelled": other.patients["train"], "test": other.patients["test"]},
        )
        for one, other in zip(features[:3], features[3:], strict=True)
    ]


def show(cells: list[dict[str, Any]], cell: dict[str, Any], scores: list[float]) -> str:
    """Note a cell and print it as a JSON line; its text in the table."""
    cell["scores"] = [round(score, 2) for score in scores]
    cells.append(cell)
    print(json.dumps(cell), flush=True)
    error = f" ± {np.std(scores, ddof=1) / np.sqrt(len(scores)):.1f}" if len(scores) > 1 else ""
    return f"{np.mean(scores):.1f}{error}"


def compare_methods(agreed: AgreedStudy, features: list[SiteFeatures], name: str, arguments: Any) -> list[Any]:
    """Balanced accuracy by method and budget."""
    cells: list[dict[str, Any]] = []
    counts = [len(set(one.patients["train"])) for one in features]
    print(f"\n{name}: training patients {counts}, zero-shot {100 * test(agreed, None, features):.1f}")
    print(f"{'method':12}" + "".join(f"{'eps ' + format(e, 'g'):>14}" for e in arguments.epsilons) + f"{'none':>14}")
    for kind in arguments.methods:
        adapter, _, dimensions = kind.replace("advised", "text_head").partition(":")
        method = Method.model_validate({"adapter": adapter})
        own = with_basis(agreed, int(dimensions)) if dimensions else agreed
        row = f"{kind:12}"
        for epsilon in (*arguments.epsilons, None):
            if kind == "advised":
                advice = advise(epsilon or max(arguments.epsilons), min(counts), public=True)
                own = with_constants(with_basis(agreed, advice.dimensions), CLIP, advice.learning_rate, MOMENTUM)
                own = with_rule(own, Aggregation.model_validate(advice.tables["aggregation"]))
            pairs = [
                sum_once(own, features, epsilon) if method.one_sum else federate(own, features, method, epsilon, seed)
                for seed in range(arguments.seeds)
            ]
            cell = {"data": name, "patients": counts, "method": kind, "epsilon": epsilon}
            cell |= {"last": [round(100 * last, 2) for _, last in pairs]}
            row += f"{show(cells, cell, [100 * (mean if epsilon else last) for mean, last in pairs]):>14}"
        print(row, flush=True)
    return cells


def compare_uses(agreed: AgreedStudy, features: list[SiteFeatures], arguments: Any) -> list[Any]:
    """Balanced accuracy on the other scanner by use of the released means."""
    cells: list[dict[str, Any]] = []
    print(f"\nLMMD, test images of another scanner: zero-shot {100 * test(agreed, None, features):.1f}")
    for kind in [kind for kind in arguments.methods if not kind.startswith("text_head")]:
        for epsilon in arguments.epsilons:
            for use in ("off", *USES):
                method = Method.model_validate({"adapter": kind, "lmmd_weight": float(use != "off")})
                own = agreed if use == "off" else with_use(agreed, use)
                planned = AgreedStudy(own.study.model_copy(update={"method": method}), own.initial)
                note = PrivateSite(planned, features[0], epsilon).plan.lmmd_note
                cell = {"data": "scanners", "method": kind, "epsilon": epsilon, "use": use, "plan": note}
                scores = []
                if use == "off" or note.startswith("on"):
                    scores = [
                        100 * federate(own, features, method, epsilon, seed)[0] for seed in range(arguments.seeds)
                    ]
                text = show(cells, cell, scores) if scores else note
                print(f"{kind:10} epsilon {epsilon:<4g} {use:12} {text}", flush=True)
    return cells


def compare_directions(agreed: AgreedStudy, features: list[SiteFeatures], arguments: Any) -> list[Any]:
    """Cosine between each use's gradient and that of the exact LMMD on all images of a site, at the first step.

    Mean and standard error over sites and draws of the noise, at the noise that a budget's plan gives ("none": no
    noise). Each use as if its rule had not turned it off; the plan's word is beside it.
    """
    cells: list[dict[str, Any]] = []
    initial = agreed.initial
    print("\nCosine of each use's gradient with that of the exact LMMD:")
    for kind in [kind for kind in arguments.methods if not kind.startswith("text_head")]:
        method = Method.model_validate({"adapter": kind, "lmmd_weight": 1.0})
        start = initial_parameters(method, initial.prompt_features.shape[1], initial.prompt_features, 0)
        adapter = to_double(build_adapter(method, initial.prompt_features, initial.logit_scale, start))
        for epsilon in (*arguments.epsilons, None):
            for use in USES:
                own = with_use(AgreedStudy(agreed.study.model_copy(update={"method": method}), initial), use)
                found = []
                for one in features:
                    site = PrivateSite(own, one, epsilon or 100.0)
                    exact = site.exact_direction(adapter, one)
                    for _ in range(arguments.seeds):
                        drawn = site.term_direction(adapter, one, exact_means=epsilon is None)
                        found.append(float(torch.nn.functional.cosine_similarity(drawn, exact, dim=0)))
                cell = {"data": "directions", "method": kind, "epsilon": epsilon, "use": use}
                cell["plan"] = site.plan.lmmd_note if epsilon else "no noise"
                cell["scores"] = [round(value, 4) for value in found]
                cells.append(cell)
                print(json.dumps(cell), flush=True)
                error = np.std(found, ddof=1) / np.sqrt(len(found)) if len(found) > 1 else 0.0
                budget = f"epsilon {epsilon:g}" if epsilon else "no noise"
                print(
                    f"{kind:10} {budget:10} {use:12} {np.mean(found):.3f} ± {error:.3f}  ({cell['plan']})", flush=True
                )
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--brain-mri", type=Path)
    parser.add_argument("--no-phantoms", action="store_true")
    parser.add_argument("--phantom-seed", type=int, default=11)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--methods", nargs="*", default=METHODS)
    parser.add_argument("--patients", type=int, help="training patients of a site; all if not given")
    parser.add_argument("--clip", type=float, default=4.0)
    parser.add_argument("--learning-rate", type=float, default=0.5)
    parser.add_argument("--epsilons", type=float, nargs="*", default=[1.0, 3.0, 8.0])
    parser.add_argument("--lmmd", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cells: list[Any] = []
    seed = arguments.phantom_seed
    if arguments.lmmd:
        template = phantom_template(seed, second_scanner=True)
        agreed, features = load(template, arguments.work / f"scanners-{seed}", None)
        cells += compare_directions(agreed, second_scanner(features), arguments)
        cells += compare_uses(agreed, second_scanner(features), arguments)
    else:
        if not arguments.no_phantoms:
            template = phantom_template(seed, second_scanner=False)
            agreed, features = load(template, arguments.work / f"phantoms-{seed}", None)
            agreed = with_constants(agreed, arguments.clip, arguments.learning_rate)
            features = [fewer(one, arguments.patients) for one in features]
            cells += compare_methods(agreed, features, f"phantoms of seed {seed}", arguments)
        if arguments.brain_mri:
            agreed, features = load(brain_template(), arguments.work / "brain_mri", arguments.brain_mri)
            agreed = with_constants(agreed, arguments.clip, arguments.learning_rate)
            cells += compare_methods(agreed, features, "brain_mri", arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps({"cells": cells}, indent=1) + "\n")


if __name__ == "__main__":
    main()

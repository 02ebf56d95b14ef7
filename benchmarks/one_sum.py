"""The head of one sum: what bits, a basis, a budget and refinements buy; on brain MRI and on phantoms.

    python benchmarks/one_sum.py --data DATA [--work DIR] [--seeds 5] [--json FILE]
    python benchmarks/one_sum.py --phantoms WORK [--seeds 5] [--json FILE]
    python benchmarks/one_sum.py --sites 64

DATA holds ``client_0 .. client_3/CLASS/*.jpg``; ``client_3`` is held out. What sites would send goes through the same
integers, in the same layout, as ``study new`` writes it; encryption changes no bit of it
(``tests/integration/test_one_sum.py``). Under a budget each site releases its statistics once, with noise of its own
for the whole budget; noise is drawn ``DRAWS`` times a seed. ``--phantoms`` takes those of seed 4242, 200 training
patients a site, on which nothing was chosen. With ``--sites``, a study of so many sites with made-up statistics: every
sum sealed, added, opened and solved, and how long that took.
"""

from __future__ import annotations

import argparse
import json
import secrets
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from brain_mri import ROWS, SUMS, World, bytes_up, federate, sum_study
from dp_utility import load, phantom_template
from numpy.typing import NDArray
from rich.console import Console

from secure_fed.clients import one_sum as at_site
from secure_fed.clients.features import Labelled, SiteFeatures
from secure_fed.clients.training import predict
from secure_fed.model.adapters import build_adapter
from secure_fed.model.cases import judge, log_odds
from secure_fed.model.evaluation import balanced_accuracy
from secure_fed.model.public_statistics import packaged_statistics
from secure_fed.privacy.accounting import mu_squared_of
from secure_fed.privacy.ckks import Cipher, StudySecret
from secure_fed.privacy.class_statistics import capped, exact_sums, noisy_values
from secure_fed.protocol import aggregation, one_sum
from secure_fed.protocol.basis import Basis
from secure_fed.protocol.codec import Parameters, layout_of
from secure_fed.protocol.packing import Binding, CipherWire
from secure_fed.protocol.study import AgreedStudy, read_template, with_fields

DELTA = 1e-5
EPSILONS = (0.5, 1.0, 3.0, 8.0)
DRAWS = 4
METHOD = SUMS[0].method
WEIGHTS = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0)
"""Of the prompts' logits beside the head's, in the head's own scale; validation chooses."""
RATES = (1e-4, 1e-3, 1e-2)
"""Learning rates of gradient rounds that start at the head, relative to the size of its weights; validation chooses."""

Figures = dict[str, float]
Rows = dict[str, list[Figures]]
Features = NDArray[np.float32]


class Data:
    """Sites' features: those who train, and a held-out site's if there is one."""

    def __init__(self, agreed: AgreedStudy, training: Sequence[SiteFeatures], held_out: SiteFeatures | None) -> None:
        self.agreed = agreed
        names = [member.name for member in agreed.study.sites if member.role == "train"]
        self.training = dict(zip(names, training, strict=True))
        self.tests = [(own.test.x, own.test.y) for own in training]
        self.validation = [(own.val.x, own.val.y) for own in training]
        self.held_out: tuple[Features, NDArray[np.int64]] | None = None
        if held_out is not None:
            parts = [held_out.train, held_out.val, held_out.test]
            self.held_out = np.concatenate([one.x for one in parts]), np.concatenate([one.y for one in parts])

    def figures(self, chosen: Callable[[Features], NDArray[Any]]) -> Figures:
        """Balanced accuracies of a classifier that gives scores [n, K], in percent."""
        found = {"own": _percent(chosen, self.tests)}
        if self.held_out is not None:
            found["held_out"] = _percent(chosen, [self.held_out])
        return found

    def coverage(self, agreed: AgreedStudy, parameters: Parameters) -> Figures:
        """How often the sets hold the class, in percent; nothing where none are claimed."""
        found = {}
        own = tuple(np.concatenate(parts) for parts in zip(*self.tests, strict=True))
        for name, pair in (("covered_own", own), ("covered_held_out", self.held_out)):
            cases = None if pair is None else judge(agreed.initial, parameters, pair[0])
            if pair is not None and cases is not None:
                found[name] = 100 * float(cases.sets[np.arange(len(pair[1])), pair[1]].mean())
        return found


def _percent(chosen: Callable[[Features], NDArray[Any]], tests: Sequence[tuple[Features, NDArray[np.int64]]]) -> float:
    scores = [balanced_accuracy(chosen(x), y) for x, y in tests]
    return 100 * float(np.mean([score for score in scores if score is not None]))


def head_figures(data: Data, agreed: AgreedStudy, parameters: Parameters) -> Figures:
    """Of an adapter: balanced accuracies, coverage, and kilobytes that a site sends in all."""
    found = data.figures(lambda x: predict(agreed, parameters, x, None))
    return found | data.coverage(agreed, parameters) | {"kB": bytes_up(agreed) / 1e3}


# --- bits ---


def unrounded(data: Data, agreed: AgreedStudy) -> Parameters:
    """The adapter that a study's sums give without the rounding to integers."""
    state = aggregation.start(agreed)
    for number in (1, 2):
        sent = [at_site.message(agreed, number, state, own) for own in data.training.values()]
        found = {name: np.sum([one[name] for one in sent], axis=0) for name in sent[0]}
        state = aggregation.after_round(agreed, state, found)
    return aggregation.adapter_of(state)


def in_own_coordinates(agreed: AgreedStudy) -> AgreedStudy:
    """A raw study whose coordinates are the backbone's, which is what turning them to public directions saves."""
    statistics = packaged_statistics(agreed.study.backbone.model, agreed.study.backbone.digest)
    before = agreed.initial.basis
    assert statistics is not None
    assert before is not None
    basis = Basis(before.centre, None, before.radius, statistics.spread / before.radius)
    return AgreedStudy(agreed.study, replace(agreed.initial, basis=basis))


def precision_rows(data: Data, rows: Rows) -> None:
    """What rounding costs, by basis and bits."""
    bases: tuple[tuple[dict[str, Any], tuple[int, ...]], ...] = (
        ({"basis": "raw"}, (20, 18, 16, 14, 12)),
        ({"basis": "public", "dimensions": 128}, (14, 12, 10)),
        ({"basis": "random", "dimensions": 128}, (28, 24, 20, 16)),
    )
    for features, precisions in bases:
        name = " ".join(str(value) for value in features.values())
        agreed = sum_study(data.agreed, method=METHOD, features=features)
        rows.setdefault(f"{name}: not rounded", []).append(
            head_figures(data, agreed, unrounded(data, agreed)) | {"kB": 0.0}
        )
        for bits in precisions:
            agreed = sum_study(data.agreed, bits=bits, method=METHOD, features=features)
            rows.setdefault(f"{name}: {bits} bits", []).append(
                head_figures(data, agreed, federate(agreed, data.training).adapter)
            )
    # Rounding makes these covariances indefinite. LAPACK finds the same eigenvalues in a fiftieth of the time.
    with mock.patch.object(one_sum, "eigen", lambda matrix: tuple(np.linalg.eigh(matrix))):
        for bits in (20, 18, 16):
            agreed = in_own_coordinates(sum_study(data.agreed, bits=bits, method=METHOD, features={"basis": "raw"}))
            name = f"raw, not turned: {bits} bits"
            rows.setdefault(name, []).append(head_figures(data, agreed, federate(agreed, data.training).adapter))


# --- budgets ---


def small_rows(data: Data, rows: Rows) -> None:
    """What rounding costs at small sites, whose sums are small beside bounds that the usual most patients make."""
    rng = np.random.default_rng(data.agreed.study.seed)
    for count in (30, 60):
        few = Data(data.agreed, [_some(own, count, rng) for own in data.training.values()], None)
        few.held_out = data.held_out
        for size in (64, 128):
            agreed = sum_study(
                data.agreed,
                method=METHOD | {"min_patients": 2},
                features={"basis": "public", "dimensions": size},
            )
            name = f"public {size}, {count} images a site"
            rows.setdefault(f"{name}: not rounded", []).append(
                head_figures(few, agreed, unrounded(few, agreed)) | {"kB": 0.0}
            )
            for bits in (18, 16, 14, 12):
                agreed = sum_study(agreed, bits=bits)
                rows.setdefault(f"{name}: {bits} bits", []).append(
                    head_figures(few, agreed, federate(agreed, few.training).adapter)
                )


def _some(own: SiteFeatures, count: int, rng: np.random.Generator) -> SiteFeatures:
    """A site with so many training images, and a sixth as many for validation, drawn from all that it has."""
    found, owners = {}, dict(own.patients)
    for split, kept in (("train", count), ("val", count // 6)):
        part: Labelled = getattr(own, split)
        rows = rng.permutation(len(part.y))[:kept]
        found[split] = Labelled(part.x[rows], part.y[rows])
        owners[split] = tuple(own.patients[split][row] for row in rows)  # type: ignore[index]
    return replace(own, **found, patients=owners)


def private_rows(data: Data, rows: Rows, epsilons: Sequence[float], raw: bool) -> None:
    """Sites that release their statistics once under a budget; the shrinkage is declared."""
    method = METHOD | {"shrinkage": 0.03}
    bases: list[dict[str, Any]] = [{"basis": "public", "dimensions": size} for size in (16, 32, 64)]
    bases += [{"basis": "random", "dimensions": size} for size in (32, 64)]
    for features in (*bases, *([{"basis": "raw"}] if raw else ())):
        agreed = sum_study(data.agreed, rounds=1, method=method, features=features)
        most = agreed.study.privacy.images_per_patient
        sums = []
        for own in data.training.values():
            x, labels, owners = at_site.views(agreed, own)
            kept = capped(owners, set(owners), most)
            sums.append(exact_sums(x[kept], labels[kept], [owners[row] for row in kept], len(agreed.study.classes)))
        for epsilon in epsilons:
            noise = mu_squared_of(epsilon, DELTA) ** -0.5  # one release with the whole budget
            drawn = []
            for _ in range(DRAWS):
                layout = agreed.layout(1)
                total = sum(layout.encode(noisy_values(one, noise), 1.0, np.zeros(0))[0] for one in sums)
                found = layout.decode(np.asarray(total), [1.0] * len(sums))
                state = aggregation.after_round(agreed, aggregation.start(agreed), found)
                drawn.append(head_figures(data, agreed, aggregation.adapter_of(state)))
            name = f"{' '.join(map(str, features.values()))}, epsilon {epsilon:g}"
            rows.setdefault(name, []).append({key: float(np.mean([one[key] for one in drawn])) for key in drawn[0]})


# --- refinements, tried and not built in ---


def tried_rows(data: Data, world: World, rows: Rows) -> None:
    """What might be put on top of the head: each beside the head itself."""
    agreed = sum_study(data.agreed, method=METHOD, features={"basis": "raw"})
    head = federate(agreed, data.training).adapter
    prompts, scale = agreed.initial.prompt_features.astype(np.float64), agreed.initial.logit_scale
    weight, bias = scale * head["weight"], scale * head["bias"]
    rows.setdefault("the head", []).append(data.figures(lambda x: x @ weight.T + bias))

    def with_prompts(g: float) -> Callable[[Features], NDArray[Any]]:
        return lambda x: x @ (weight + g * scale * prompts).T + bias

    best = max(WEIGHTS, key=lambda g: (_percent(with_prompts(g), data.validation), -g))
    rows.setdefault("+ prompts' logits", []).append(data.figures(with_prompts(best)))
    tuned = [fine_tuned(data, weight, bias, rate) for rate in RATES]
    better = max(tuned, key=lambda pair: _percent(lambda x: x @ pair[0].T + pair[1], data.validation))
    rows.setdefault("+ ten gradient rounds from it", []).append(data.figures(lambda x: x @ better[0].T + better[1]))
    rows.setdefault("of features that FACMIC's gate moves", []).append(gated(data, world))
    for name, strength in (("means", 0.0), ("means and covariances", 1.0)):
        found = recoloured(data, agreed, strength)
        rows.setdefault(f"+ CORAL, {name}", []).append(found)


def fine_tuned(
    data: Data, weight: NDArray[np.float64], bias: NDArray[np.float64], rate: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Ten federated rounds of 50 full steps of Adam on the cross-entropy, from a head on (Fed3R + FT)."""
    size = float(np.abs(weight).mean())
    counts = np.array([len(own.train.y) for own in data.training.values()])
    for _ in range(10):
        found = []
        for own in data.training.values():
            x, y = torch.from_numpy(own.train.x).double(), torch.from_numpy(own.train.y)
            parts = [torch.tensor(value, requires_grad=True) for value in (weight, bias)]
            groups = [{"params": parts[:1], "lr": rate * size}, {"params": parts[1:], "lr": rate}]
            optimiser = torch.optim.Adam(groups)
            for _ in range(50):
                optimiser.zero_grad()
                torch.nn.functional.cross_entropy(x @ parts[0].T + parts[1], y).backward()  # type: ignore[no-untyped-call]
                optimiser.step()
            found.append([value.detach().numpy() for value in parts])
        weight, bias = (np.average([one[place] for one in found], axis=0, weights=counts) for place in (0, 1))
    return weight, bias


def gated(data: Data, world: World) -> Figures:
    """One sum of the features that the trained gate of ten rounds gives, in a basis without public statistics."""
    facmic, _ = world.study(next(row for row in ROWS if row.name == "facmic"), 1e-3)
    trained = federate(facmic, data.training)
    initial = facmic.initial
    gate = build_adapter(facmic.study.method, initial.prompt_features, initial.logit_scale, trained.adapter)

    def moved(x: Features) -> Features:
        with torch.no_grad():
            return np.asarray(gate.adapt(torch.from_numpy(x)).numpy())

    def of(own: SiteFeatures) -> SiteFeatures:
        parts = {name: getattr(own, name) for name in ("train", "val", "test")}
        return replace(own, **{name: Labelled(moved(part.x), part.y) for name, part in parts.items()})

    agreed = sum_study(data.agreed, bits=32, method=METHOD, features={"basis": "raw"})
    mean = np.mean([moved(own.unlabelled).mean(axis=0) for own in data.training.values()], axis=0).astype(np.float64)
    basis = Basis(mean, None, 1.0, np.full(len(mean), 2 / len(mean) ** 0.5))
    agreed = AgreedStudy(agreed.study, replace(agreed.initial, basis=basis))
    head = federate(agreed, {name: of(own) for name, own in data.training.items()}).adapter
    return data.figures(lambda x: predict(agreed, head, moved(x), None))


def recoloured(data: Data, agreed: AgreedStudy, strength: float) -> Figures:
    """Each site's features, the held-out one's too, moved to the mean (and covariance) of all that train (CORAL)."""
    basis = agreed.initial.basis
    assert basis is not None
    own = [basis.linear(site.unlabelled) for site in data.training.values()]
    centre, cover = _moments(np.concatenate(own))

    def moved(unlabelled: Features, x: Features) -> Features:
        mean, colour = _moments(basis.linear(unlabelled))
        shifted = basis.linear(x) - mean
        if strength:
            shifted = shifted @ _power(colour, -0.5) @ _power(cover, 0.5)
        features = (shifted + centre) * basis.radius
        return np.asarray((features if basis.axes is None else features @ basis.axes) + basis.centre, np.float32)

    def of(site: SiteFeatures) -> SiteFeatures:
        parts = {name: getattr(site, name) for name in ("train", "val", "test")}
        return replace(site, **{name: Labelled(moved(site.unlabelled, part.x), part.y) for name, part in parts.items()})

    sites = {name: of(site) for name, site in data.training.items()}
    assert data.held_out is not None
    other = Data(data.agreed, list(sites.values()), None)
    other.held_out = moved(data.held_out[0], data.held_out[0]), data.held_out[1]
    head = federate(agreed, sites).adapter
    return other.figures(lambda x: predict(agreed, head, x, None))


def _moments(x: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and covariance, the latter with a tenth of a multiple of the identity, as few images ask for."""
    found = np.cov(x.T)
    return x.mean(axis=0), 0.9 * found + 0.1 * np.trace(found) / len(found) * np.eye(len(found))


def _power(matrix: NDArray[np.float64], power: float) -> NDArray[np.float64]:
    values, vectors = np.linalg.eigh(matrix)
    return np.asarray((vectors * values**power) @ vectors.T)


# --- sets by other scores ---


def set_rows(data: Data, rows: Rows) -> None:
    """Sets of 90 % by several scores, their limits from the same calibration patients, without bins."""
    agreed = sum_study(data.agreed, method=METHOD, features={"basis": "raw"})
    trained = federate(agreed, data.training)
    sites = list(data.training.values())
    sums = at_site.sums(agreed, sites[0])
    for own in sites[1:]:
        more = at_site.sums(agreed, own)
        sums = one_sum.Sums(sums.patients + more.patients, sums.first + more.first, sums.second + more.second)
    known = one_sum.known_classes(sums, 1)
    parts = [at_site.judged(agreed, sums, known, own) for own in sites]
    histograms = np.sum([at_site.histograms(agreed, sums, own) for own in sites], axis=0)
    place, _ = one_sum.chosen(histograms, len(agreed.study.classes))
    validated = [validation for _, validation in parts]
    everybody = [training for training, _ in parts] + validated
    logits = np.concatenate([one.logits[place] for one in everybody])
    labels = np.concatenate([one.labels for one in everybody])
    scale, parameters = agreed.initial.logit_scale, trained.adapter

    def of(x: Features) -> NDArray[np.float64]:
        return np.asarray(scale * (x @ parameters["weight"].T + parameters["bias"]))

    assert data.held_out is not None
    own_x, own_y = (np.concatenate(part) for part in zip(*data.tests, strict=True))
    tests = {"own": (of(own_x), own_y), "held_out": (of(data.held_out[0]), data.held_out[1])}
    sharp = min(np.geomspace(0.05, 2, 60), key=lambda factor: _surprise(factor * logits, labels))
    found = {f"right_{name}": 100 * float(np.mean(z.argmax(axis=1) == y)) for name, (z, y) in tests.items()}
    sure = {f"sure_{name}": 100 * float(_softmax(sharp * z).max(axis=1).mean()) for name, (z, _) in tests.items()}
    rows.setdefault("the head, and how sure it is", []).append(found | sure)
    several: dict[str, tuple[Callable[[NDArray[np.float64]], NDArray[np.float64]], bool]] = {
        "log odds": (log_odds, True),
        "margin": (lambda z: z - z.max(axis=1, keepdims=True), True),
        "what is more probable (APS)": (lambda z: _cumulated(z, 0.0), True),
        "the same, after temperature": (lambda z: _cumulated(sharp * z, 0.0), True),
        "by lot, after temperature": (lambda z: _cumulated(sharp * z, None), False),
    }
    for name, (score, always) in several.items():
        rows.setdefault(name, []).append(_sets(score, logits, labels, tests, always, by_class=False))
    rows.setdefault("log odds, a limit a class", []).append(_sets(log_odds, logits, labels, tests, True, by_class=True))
    few = np.concatenate([one.logits[place] for one in validated]), np.concatenate([one.labels for one in validated])
    rows.setdefault("log odds, validation alone", []).append(_sets(log_odds, *few, tests, True, by_class=False))


def _sets(
    score: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    logits: NDArray[np.float64],
    labels: NDArray[np.int64],
    tests: dict[str, tuple[NDArray[np.float64], NDArray[np.int64]]],
    always: bool,
    by_class: bool,
) -> Figures:
    """Coverage in percent, and classes in a set; ``always``: the most probable class is in it."""
    own = score(logits)[np.arange(len(labels)), labels]
    groups = [own[labels == label] for label in range(logits.shape[1])] if by_class else [own]
    ranks = [int(np.ceil(0.9 * (len(group) + 1))) for group in groups]
    limit = np.array([np.sort(group)[::-1][rank - 1] for group, rank in zip(groups, ranks, strict=True)])
    found = {}
    for name, (z, y) in tests.items():
        sets = score(z) >= limit
        if always:
            sets[np.arange(len(y)), z.argmax(axis=1)] = True
        found[f"covered_{name}"] = 100 * float(sets[np.arange(len(y)), y].mean())
        found[f"size_{name}"] = float(sets.sum(axis=1).mean())
    return found


def _softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    raised = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(raised / raised.sum(axis=1, keepdims=True))


def _surprise(logits: NDArray[np.float64], labels: NDArray[np.int64]) -> float:
    return -float(np.log(_softmax(logits)[np.arange(len(labels)), labels] + 1e-12).mean())


def _cumulated(logits: NDArray[np.float64], share: float | None) -> NDArray[np.float64]:
    """Minus the probability of all classes above each, and a share of its own; a drawn one if None."""
    p = _softmax(logits)
    order = np.argsort(-p, axis=1)
    sorted_p = np.take_along_axis(p, order, axis=1)
    drawn = np.random.default_rng(0).random((len(p), 1)) if share is None else share
    found = np.empty_like(p)
    np.put_along_axis(found, order, np.cumsum(sorted_p, axis=1) - (1 - drawn) * sorted_p, axis=1)
    return -found


def rotated_rows(world: World, seed: int, rows: Rows) -> None:
    """Each of the four sites held out in its turn: the others' labelled images are split anew, 64, 16 and 20 %."""
    whole = {}
    for name, own in world.features.items():
        parts = (own.train, own.val, own.test)
        whole[name] = Labelled(np.concatenate([one.x for one in parts]), np.concatenate([one.y for one in parts]))
    for held_out in whole:
        rng = np.random.default_rng(seed)
        training = [_split(world.features[name], whole[name], rng) for name in whole if name != held_out]
        data = Data(world.template, training, None)
        data.held_out = whole[held_out].x, whole[held_out].y
        for row in SUMS[:3]:
            agreed, _ = world.study(row, 0.001)
            trained = federate(agreed, data.training).adapter
            rows.setdefault(f"{row.name}: {held_out}", []).append(data.coverage(agreed, trained))


def _split(own: SiteFeatures, whole: Labelled, rng: np.random.Generator) -> SiteFeatures:
    order, count = rng.permutation(len(whole.y)), len(whole.y)
    places = dict(zip(("train", "val", "test"), np.split(order, [int(0.64 * count), int(0.8 * count)]), strict=True))
    found = {split: Labelled(whole.x[kept], whole.y[kept]) for split, kept in places.items()}
    owners = {split: tuple(str(row) for row in kept) for split, kept in places.items()}  # an image counts as a patient
    return replace(own, **found, patients=dict(own.patients) | owners)


# --- many sites ---


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
        sealed = cipher.seal(integers, binding, f"site-{number}")
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


def show(console: Console, title: str, rows: Rows) -> None:
    """A Markdown table: means and standard errors over seeds."""
    keys = list(dict.fromkeys(key for seeds in rows.values() for key in seeds[0]))
    console.print(f"\n{title}\n\n| | {' | '.join(keys)} |\n|---{'|---' * len(keys)}|", soft_wrap=True)
    for name, seeds in rows.items():
        cells = []
        for key in keys:
            values = [one[key] for one in seeds if key in one]
            error = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else 0.0
            digits = 0 if key == "kB" else 2 if key.startswith("size") else 1
            cells.append(f"{np.mean(values):.{digits}f} ± {error:.{digits}f}" if values else "")
        console.print(f"| {name} | {' | '.join(cells)} |", soft_wrap=True)


def on_brain_mri(folder: Path, work: Path, seeds: int, console: Console) -> dict[str, Rows]:
    """All tables of the brain MRI."""
    tables: dict[str, Rows] = {
        "Bases": {},
        "Precision": {},
        "Small sites": {},
        "Budgets": {},
        "Tried": {},
        "Sets of 90 %": {},
        "Sets of 90 %, each site held out": {},
    }
    template = read_template(Path("brain_mri"))
    for seed in range(seeds):
        start = time.perf_counter()
        world = World(template, seed, folder, work)
        training = [world.features[name] for name in world.training]
        data = Data(world.template, training, world.features[world.held_out])
        for row in SUMS:
            agreed, _ = world.study(row, 0.001)
            found = head_figures(data, agreed, federate(agreed, data.training).adapter)
            tables["Bases"].setdefault(row.name, []).append(found)
        precision_rows(data, tables["Precision"])
        small_rows(data, tables["Small sites"])
        private_rows(data, tables["Budgets"], EPSILONS, raw=True)
        tried_rows(data, world, tables["Tried"])
        set_rows(data, tables["Sets of 90 %"])
        rotated_rows(world, seed, tables["Sets of 90 %, each site held out"])
        console.print(f"seed {seed}: {time.perf_counter() - start:.0f} s")
    return tables


def on_phantoms(work: Path, seeds: int) -> dict[str, Rows]:
    """Three sites of 200 training patients each; a seed draws a random basis, and noise."""
    tables: dict[str, Rows] = {"Phantoms of seed 4242, 200 training patients a site": {}}
    agreed, features = load(phantom_template(4242, second_scanner=False, patients=334), work, None)
    for seed in range(seeds):
        study = AgreedStudy(with_fields(agreed.study, seed=seed), agreed.initial)
        data = Data(study, features, None)
        (rows,) = tables.values()
        for row in SUMS[1:3]:
            own = sum_study(study, method=row.method, features=row.features)
            rows.setdefault(f"{row.name}, no budget", []).append(
                head_figures(data, own, federate(own, data.training).adapter)
            )
        private_rows(data, rows, (1.0, 3.0, 8.0), raw=False)
    return tables


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="client_0 .. client_3/CLASS/*.jpg")
    parser.add_argument("--work", type=Path, help="keeps features, so that a run goes on")
    parser.add_argument("--phantoms", type=Path, metavar="WORK", help="instead: phantoms, made and kept there")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--sites", type=int, help="instead: time a study of so many sites")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    console = Console()
    if arguments.sites:
        console.print(sites_study(arguments.sites))
        return
    with tempfile.TemporaryDirectory() as folder:
        if arguments.phantoms:
            tables = on_phantoms(arguments.phantoms, arguments.seeds)
        elif arguments.data:
            work = arguments.work or Path(folder)
            tables = on_brain_mri(arguments.data.resolve(), work, arguments.seeds, console)
        else:
            parser.error("expected --data, --phantoms or --sites")
    for title, rows in tables.items():
        show(console, title, rows)
    if arguments.json:
        arguments.json.write_text(json.dumps(tables, indent=1) + "\n")


if __name__ == "__main__":
    main()

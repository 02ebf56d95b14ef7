"""What each view of a study gives away: its updates, what the server holds of them, the finished adapter.

Many times over, each site trains on a random half of its labelled patients. An attacker who sees one view tells who
took part (LiRA), and takes features of training images out of it; the other half is the control. Membership and
inversion are those of :mod:`secure_fed.privacy.attacks`; the training, the integers and the encryption those of the
study.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats

from secure_fed.clients.data import Split
from secure_fed.clients.features import Labelled, SiteFeatures
from secure_fed.clients.training import predict, train_round, training_seed
from secure_fed.core.errors import DataError, PrivateMethodError, SecfacmicError, StudyError
from secure_fed.core.storage import refuse_foreign, write_durable
from secure_fed.lab.simulation import open_sites, plan_of, prepare, starting
from secure_fed.lab.workers import run_locally
from secure_fed.model.adapters import PRIVATE_HEAD, build_adapter
from secure_fed.model.text_tower import TextTower
from secure_fed.privacy.accounting import plan_noise
from secure_fed.privacy.attacks import PublicFeatures, hit_rate, log_odds, membership, reconstruct
from secure_fed.privacy.ckks import Cipher, StudySecret
from secure_fed.privacy.class_statistics import exact_sums, noisy_values
from secure_fed.privacy.dp_training import (
    Descent,
    class_prompt_patient_loss,
    gather_patients,
    public_log_prior,
    refuse_method,
    to_double,
)
from secure_fed.protocol import aggregation, codec
from secure_fed.protocol.codec import Parameters
from secure_fed.protocol.one_sum import Sums
from secure_fed.protocol.packing import Binding, CipherWire
from secure_fed.protocol.study import AgreedStudy, Template

SPLITS: tuple[Split, ...] = ("train", "val", "test")
REPORT, PICTURE = "attack.json", "attack.svg"
CAVEAT = (
    "Attacks on public or simulated data, by the attacker described; what they do not find may still be there, and "
    "patients' data may give other figures."
)


@dataclass(frozen=True)
class _Target:
    """A training site as it is attacked: images x [m, d], y [m], whose each is (index into patients), unlabelled."""

    name: str
    weight: float
    x: NDArray[np.float32]
    y: NDArray[np.int64]
    owner: NDArray[np.int64]
    patients: int
    unlabelled: NDArray[np.float32]

    def features(self, chosen: NDArray[np.bool_]) -> SiteFeatures:
        """As the site has them for training, of the chosen patients."""
        rows = chosen[self.owner]
        none = Labelled(self.x[:0], self.y[:0])
        return SiteFeatures(Labelled(self.x[rows], self.y[rows]), none, none, self.unlabelled, 0, 0)


@dataclass(frozen=True)
class _Shadow:
    """One repetition: its number, and what all have in common."""

    number: int
    agreed: AgreedStudy
    targets: tuple[_Target, ...]
    public: PublicFeatures | None
    epsilons: tuple[float, ...]
    delta: float
    secret: StudySecret
    tower: TextTower | None


@dataclass(frozen=True)
class _Seen:
    """What one repetition gives of one view: log-odds of all patients, and hit rates with their numbers of guesses."""

    scores: NDArray[np.float64]
    hits: list[float]
    guesses: int


def _is_report(head: bytes) -> bool:
    return head.startswith(b'{\n  "format": 1,\n  "study": ') and b'"data_kind": ' in head


def attack(
    template: Template,
    out: Path,
    data: Path | None = None,
    *,
    epsilons: Sequence[float] = (3.0,),
    delta: float = 1e-5,
    shadows: int = 16,
    jobs: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Attack a study's views and write ``attack.json`` and ``attack.svg``.

    Args:
        template: with a ``[simulation]`` table, so that its data are public or simulated.
        out: a folder of its own; also gets the study, its sites and, without ``data``, phantoms.
        data: folder of the sites' data; without it the template's phantoms are made.
        epsilons: budgets of the released adapters under differential privacy.
        delta: of all of them.
        shadows: repetitions; 8 or more.
        jobs: processes at a time.
        progress: told repetitions done and all.

    Returns:
        The content of ``attack.json``.

    Raises:
        StudyError: the template cannot be simulated, or is of anomalies.
        DataError: a site has fewer than four labelled patients.
        OutputError: the folder is another study's, or holds files of these names that are no attack's.
        SecfacmicError: whatever a site refuses, or a repetition fails with.
    """
    if template.task == "anomaly":
        raise StudyError(
            f"study {template.name}: of anomalies; the attacks guess by what an adapter says of labelled images, which "
            'a memory does not: expected task = "classify". Its sums under a budget: secfacmic audit'
        )
    plan = plan_of(template, out, data)
    if out.is_dir():
        refuse_foreign(out / REPORT, _is_report)
        refuse_foreign(out / PICTURE, lambda _: (out / REPORT).is_file())
    with starting(out) as start:
        agreed = prepare(template, out, data)
        sites = open_sites(agreed, out)
        roles = {site.name: site for site in agreed.study.sites}
        targets = tuple(
            _target(site.name, roles[site.name].weight, site.features(), agreed.study.backbone.mirrored)
            for site in sites
            if roles[site.name].role == "train"
        )
        start.done = True
        observed = [site.features() for site in sites if roles[site.name].role == "observer"]
        notes = []
        try:
            refuse_method(agreed.study.method)
        except PrivateMethodError as error:
            epsilons, notes = (), [f"no adapter under differential privacy: {error}"]
        public = _public(observed, targets)
        if public is None:
            notes.append("no inversion: neither an observer's images nor unlabelled ones to know features by")
        secret = StudySecret.generate(agreed.lanes.modulus_bits)
        common = _Shadow(0, agreed, targets, public, tuple(epsilons), delta, secret, sites[0].tower)
        tasks = [replace(common, number=number) for number in range(shadows)]
        results: dict[int, tuple[NDArray[np.bool_], dict[str, _Seen]]] = {}
        with closing(run_locally(_run_shadow, tasks, jobs, out / "workers.log")) as outcomes:
            for outcome in outcomes:
                if outcome.error is not None:
                    raise SecfacmicError(f"repetition {outcome.task.number} failed: {outcome.error}")
                results[outcome.task.number] = outcome.result
                progress(len(results), shadows)
        members = np.stack([results[number][0] for number in range(shadows)])
        names = list(results[0][1])
        views = [_view(name, members, [results[number][1][name] for number in range(shadows)]) for name in names]
        report = {
            "format": 1,
            "study": agreed.study.name,
            "study_id": template.id,
            "data_kind": plan.kind,
            "unit": plan.unit,
            "method": agreed.study.method.adapter,
            "delta": delta,
            "shadows": shadows,
            "patients": members.shape[1],
            "views": views,
            "notes": notes,
            "caveat": CAVEAT,
        }
        write_durable(out / REPORT, (json.dumps(report, indent=2) + "\n").encode())
        write_durable(out / PICTURE, _plot(report))
        return report


def _target(name: str, weight: float, features: SiteFeatures, mirrored: bool) -> _Target:
    x, y = [], []
    owners: list[str] = []
    for split in SPLITS:
        part: Labelled = getattr(features, split)
        # Mirrored images come after the plain ones; the attack is on the plain ones alone.
        count = len(part.y) // 2 if mirrored and split == "train" else len(part.y)
        x.append(part.x[:count])
        y.append(part.y[:count])
        owners += features.patients[split][:count]
    patients, owner = np.unique(np.array(owners), return_inverse=True)
    if len(patients) < 4:
        raise DataError(f"site {name}: {len(patients)} labelled patients; expected at least 4 to split into two halves")
    unlabelled = features.unlabelled[: len(features.unlabelled) // 2] if mirrored else features.unlabelled
    return _Target(name, weight, np.concatenate(x), np.concatenate(y), owner, len(patients), unlabelled)


def _public(observed: Sequence[SiteFeatures], targets: Sequence[_Target]) -> PublicFeatures | None:
    """What the attacker knows features by: the observers' images, else unlabelled ones, of other patients."""
    known = [getattr(one, split).x for one in observed for split in SPLITS] or [one.unlabelled for one in targets]
    rows = np.concatenate(known)
    return PublicFeatures(rows) if len(rows) > 1 else None


# One repetition ----------------------------------------------------------------------------------------------


def _run_shadow(shadow: _Shadow) -> tuple[NDArray[np.bool_], dict[str, _Seen]]:
    """Members of all sites' patients [n], one site after the other, and what each view shows."""
    torch.set_num_threads(1)
    generator = np.random.default_rng(secrets.randbits(64))
    chosen = [_half(generator, target.patients) for target in shadow.targets]
    if shadow.agreed.study.method.one_sum:
        return np.concatenate(chosen), dict(_sum_views(shadow, chosen))
    seen: dict[str, _Seen] = dict(_update_views(shadow, chosen))
    start = shadow.agreed.initial.adapter
    for name, epsilon in [("released", None), *((f"released_dp {one:g}", one) for one in shadow.epsilons)]:
        final = _federate(shadow, chosen, epsilon)
        scores = np.concatenate([_log_odds(shadow, target, final) for target in shadow.targets])
        update = {key: final[key] - start[key] for key in final}
        hits, guesses = _invert(shadow, update, shadow.targets, chosen)
        seen[name] = _Seen(scores, hits, guesses)
    return np.concatenate(chosen), seen


def _half(generator: np.random.Generator, patients: int) -> NDArray[np.bool_]:
    chosen = np.zeros(patients, dtype=bool)
    chosen[generator.permutation(patients)[: patients // 2]] = True
    return chosen


def _update_views(shadow: _Shadow, chosen: Sequence[NDArray[np.bool_]]) -> Iterator[tuple[str, _Seen]]:
    """The first round's updates: as integers, which the server has in plain mode, and as ciphertext coefficients."""
    agreed, start = shadow.agreed, shadow.agreed.initial.adapter
    shapes, lanes = agreed.initial.shapes, agreed.lanes
    cipher, wire = Cipher(lanes, shadow.secret), CipherWire(lanes)
    binding = Binding(run=secrets.token_hex(32), head=secrets.token_hex(32), round=1)
    views: dict[str, list[tuple[NDArray[np.float64], list[float], int]]] = {"plain_update": [], "server_he": []}
    for target, members in zip(shadow.targets, chosen, strict=True):
        trained = _train(shadow, target, members, start, 1)
        update = codec.flatten(trained) - codec.flatten(start)
        draws = codec.rounding_draws(agreed.study.seed, "", target.name, 1, update.size)
        values = {codec.UPDATE: update, codec.COUNTS: np.zeros(2)}
        integers = agreed.layout(1).encode(values, target.weight, draws)[0]
        plain = agreed.layout(1).decode(integers, [target.weight])[codec.UPDATE]
        coefficients = wire.residues(cipher.seal(integers, binding, target.name).payload)
        # All that is there, read as numbers of the size that updates have.
        centred = np.resize(coefficients.astype(np.float64) / lanes.modulus - 0.5, update.size) * np.sqrt(12)
        for name, flat in (("plain_update", plain), ("server_he", centred * np.sqrt(np.mean(plain**2)))):
            guess = codec.unflatten(flat, shapes)
            model = {key: start[key] + guess[key] for key in guess}
            views[name].append((_log_odds(shadow, target, model), *_invert(shadow, guess, [target], [members])))
    for name, parts in views.items():
        yield (
            name,
            _Seen(
                np.concatenate([scores for scores, _, _ in parts]),
                [hit for _, hits, _ in parts for hit in hits],
                sum(guesses for _, _, guesses in parts),
            ),
        )


def _sum_views(shadow: _Shadow, chosen: Sequence[NDArray[np.bool_]]) -> Iterator[tuple[str, _Seen]]:
    """One sum's views: what each site sends, in plain and as ciphertext coefficients, and the released head.

    Whoever sees statistics solves the head that they give, and takes each class mean for a patient: of few patients it
    nearly is one.
    """
    agreed, layout = shadow.agreed, shadow.agreed.layout(1)
    cipher, wire = Cipher(layout.lanes, shadow.secret), CipherWire(layout.lanes)
    binding = Binding(run=secrets.token_hex(32), head=secrets.token_hex(32), round=1)
    parts: dict[str, list[tuple[NDArray[np.float64], list[float], int]]] = {"plain_update": [], "server_he": []}
    sums = [_sums_of(shadow, target, members) for target, members in zip(shadow.targets, chosen, strict=True)]
    for target, members, own in zip(shadow.targets, chosen, sums, strict=True):
        integers = layout.encode(own.values(), 1.0, np.zeros(0))[0]
        coefficients = wire.residues(cipher.seal(integers, binding, target.name).payload)
        # All that is there, read as integers of the size that lanes hold.
        centred = np.resize(coefficients.astype(np.float64) / layout.lanes.modulus - 0.5, layout.lanes.values)
        guessed = np.round(2 * centred * layout.lanes.max_integer).astype(np.int64)
        for name, seen in (("plain_update", integers), ("server_he", guessed)):
            held = layout.decode(seen, [1.0])
            model = aggregation.one_sum_adapter(agreed.study, agreed.initial, held, agreed.initial.adapter)
            parts[name].append((_log_odds(shadow, target, model), *_invert_means(shadow, held, [target], [members])))
    for name, views in parts.items():
        hits = [hit for _, found, _ in views for hit in found]
        yield name, _Seen(np.concatenate([scores for scores, _, _ in views]), hits, sum(count for *_, count in views))
    for name, epsilon in [("released", None), *((f"released_dp {one:g}", one) for one in shadow.epsilons)]:
        sent = [own.values() for own in sums]
        if epsilon is not None:
            noise = plan_noise(epsilon, shadow.delta, 1)
            assert noise is not None  # an untouched budget pays for any plan
            sent = [noisy_values(own, noise) for own in sums]
        held = {block: np.sum([one[block] for one in sent], axis=0) for block in sent[0]}
        model = aggregation.one_sum_adapter(agreed.study, agreed.initial, held, agreed.initial.adapter)
        scores = np.concatenate([_log_odds(shadow, target, model) for target in shadow.targets])
        yield name, _Seen(scores, *_invert_means(shadow, held, shadow.targets, chosen))


def _sums_of(shadow: _Shadow, target: _Target, members: NDArray[np.bool_]) -> Sums:
    rows, basis = members[target.owner], shadow.agreed.initial.basis
    assert basis is not None, "study new makes one for each method that uses one"
    owners = [str(owner) for owner in target.owner[rows]]
    return exact_sums(basis.project(target.x[rows]), target.y[rows], owners, len(shadow.agreed.study.classes))


def _invert_means(
    shadow: _Shadow,
    held: Mapping[str, NDArray[np.float64]],
    targets: Sequence[_Target],
    chosen: Sequence[NDArray[np.bool_]],
) -> tuple[list[float], int]:
    """As :func:`_invert`, by the class means that sums hold."""
    sums, basis = Sums.of(held), shadow.agreed.initial.basis
    if shadow.public is None or basis is None:
        return [], 0
    known = sums.patients >= 1
    means = basis.radius * sums.first[known] / sums.patients[known, None]
    features = basis.centre + (means if basis.axes is None else means @ np.linalg.pinv(basis.axes).T)
    guesses = shadow.public.directions(features.astype(np.float32)) if known.any() else np.empty((0, 1))
    return _hits(shadow.public, guesses, targets, chosen)


def _train(
    shadow: _Shadow, target: _Target, members: NDArray[np.bool_], parameters: Parameters, round_number: int
) -> Parameters:
    """One site's round without differential privacy; what it shares of it."""
    seed = training_seed(shadow.agreed.study.seed, "", target.name, round_number)
    trained = train_round(shadow.agreed, parameters, target.features(members), seed, shadow.tower)
    return {name: value for name, value in trained.items() if name != PRIVATE_HEAD}


def _federate(shadow: _Shadow, chosen: Sequence[NDArray[np.bool_]], epsilon: float | None) -> Parameters:
    """The adapter after all rounds; under DP without the domain term, noise planned as a site plans it."""
    study = shadow.agreed.study
    weights = np.array([target.weight for target in shadow.targets])
    state = aggregation.initial_state(study.aggregation, shadow.agreed.initial.adapter)
    for round_number in range(1, study.rounds + 1):
        adapter = aggregation.adapter_of(state)
        flat = codec.flatten(adapter)
        updates = []
        for target, members in zip(shadow.targets, chosen, strict=True):
            if epsilon is None:
                trained = _train(shadow, target, members, adapter, round_number)
            else:
                trained = _train_privately(shadow, target, members, adapter, epsilon)
            updates.append(codec.flatten(trained) - flat)
        state = aggregation.apply(study.aggregation, state, np.average(updates, axis=0, weights=weights))
    return aggregation.result_of(state)


def _train_privately(
    shadow: _Shadow, target: _Target, members: NDArray[np.bool_], parameters: Parameters, epsilon: float
) -> Parameters:
    study, initial = shadow.agreed.study, shadow.agreed.initial
    constants = study.privacy
    rows = members[target.owner]
    owners = [str(owner) for owner in target.owner[rows]]
    batch = gather_patients(target.x[rows], target.y[rows], owners, constants.images_per_patient)
    # One round more than there are, which a site keeps for a crash.
    steps = constants.steps * (study.rounds + 1)
    noise = plan_noise(epsilon, shadow.delta, steps)
    adapter = to_double(
        build_adapter(study.method, initial.prompt_features, initial.logit_scale, parameters, basis=initial.basis)
    )
    loss = class_prompt_patient_loss(public_log_prior(constants, len(study.classes)))
    n_ref = max(10, round(target.patients // 2, -1))
    Descent(constants, noise * constants.clip, n_ref).run(adapter, batch, loss)
    return {name: value.detach().numpy().copy() for name, value in adapter.shared_parameters().items()}


def _log_odds(shadow: _Shadow, target: _Target, parameters: Parameters) -> NDArray[np.float64]:
    """Each patient's mean over its images [patients]."""
    agreed = shadow.agreed
    odds = log_odds(predict(agreed, parameters, target.x, target.x, shadow.tower), target.y)
    sums = np.bincount(target.owner, odds, minlength=target.patients)
    return np.asarray(sums / np.bincount(target.owner, minlength=target.patients))


def _invert(
    shadow: _Shadow,
    update: Parameters,
    targets: Sequence[_Target],
    chosen: Sequence[NDArray[np.bool_]],
) -> tuple[list[float], int]:
    """The hit rate of guesses against these sites' images, and how many guesses; none where nothing can be guessed."""
    if shadow.public is None:
        return [], 0
    initial = shadow.agreed.initial
    after = {name: initial.adapter[name] + update[name] for name in update}
    adapter = build_adapter(
        shadow.agreed.study.method, initial.prompt_features, initial.logit_scale, after, shadow.tower, initial.basis
    )
    return _hits(shadow.public, reconstruct(adapter, update, shadow.public), targets, chosen)


def _hits(
    public: PublicFeatures,
    guesses: NDArray[np.float64],
    targets: Sequence[_Target],
    chosen: Sequence[NDArray[np.bool_]],
) -> tuple[list[float], int]:
    if not len(guesses):
        return [], 0
    inside = np.concatenate([target.x[members[target.owner]] for target, members in zip(targets, chosen, strict=True)])
    outside = np.concatenate(
        [target.x[~members[target.owner]] for target, members in zip(targets, chosen, strict=True)]
    )
    return [hit_rate(guesses, public.directions(inside), public.directions(outside))], len(guesses)


# All of them -------------------------------------------------------------------------------------------------


def _view(name: str, members: NDArray[np.bool_], seen: Sequence[_Seen]) -> dict[str, Any]:
    view, _, epsilon = name.partition(" ")
    result = membership(np.stack([one.scores for one in seen]), members)
    return {
        "view": view,
        "epsilon": float(epsilon) if epsilon else None,
        "inversion": _inversion([hit for one in seen for hit in one.hits], sum(one.guesses for one in seen)),
        "membership": {
            "auc": result.auc,
            "auc_interval": list(result.auc_interval),
            "tpr_at_1_fpr": result.true_positive_rate,
            "roc": [list(point) for point in result.roc],
            "n": result.patients,
        },
    }


def _inversion(hits: Sequence[float], guesses: int) -> dict[str, Any] | None:
    """Mean hit rate and its 95 % interval (Student's): guesses of one update are not independent, repetitions are."""
    if len(hits) < 2:
        return None
    mean, error = float(np.mean(hits)), float(np.std(hits, ddof=1) / np.sqrt(len(hits)))
    half = float(stats.t.ppf(0.975, len(hits) - 1)) * error
    interval = [max(0.0, mean - half), min(1.0, mean + half)]
    return {"hit_rate": mean, "interval": interval, "chance": 0.5, "n": guesses, "updates": len(hits)}


def describe(view: dict[str, Any]) -> str:
    """A view in words."""
    names = {
        "plain_update": "plain update",
        "server_he": "server, encrypted",
        "released": "released adapter",
        "released_dp": "released adapter, DP",
    }
    return names[view["view"]] + ("" if view["epsilon"] is None else f", epsilon {view['epsilon']:g}")


def _plot(report: dict[str, Any]) -> bytes:
    """ROC curves and hit rates, as SVG."""
    import io

    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    roc, hits = figure.subplots(1, 2, width_ratios=[3, 2])
    floor = 1e-3
    roc.plot([floor, 1], [floor, 1], color="grey", linestyle=":", label="guessing")
    for view in report["views"]:
        found = view["membership"]
        points = np.maximum(np.array(found["roc"]), floor)
        roc.plot(points[:, 0], points[:, 1], label=f"{describe(view)}: AUC {found['auc']:.2f}")
    roc.set(xscale="log", yscale="log", xlim=(floor, 1), ylim=(floor, 1))
    roc.set(xlabel="false positive rate", ylabel="true positive rate", title="Who took part")
    roc.legend(fontsize="small", loc="lower right")
    shown = [view for view in report["views"] if view["inversion"] is not None]
    for place, view in enumerate(shown):
        found = view["inversion"]
        error = [[found["hit_rate"] - found["interval"][0]], [found["interval"][1] - found["hit_rate"]]]
        hits.errorbar([found["hit_rate"]], [place], xerr=error, fmt="o", capsize=4)
    hits.axvline(0.5, color="grey", linestyle=":")
    hits.set(xlim=(0, 1), ylim=(len(shown) - 0.5, -0.5), xlabel="share of guesses that hit")
    hits.set(title="Features taken from it")
    hits.set_yticks(range(len(shown)), [describe(view) for view in shown])
    figure.suptitle(f"Study {report['study']}: {report['data_kind']} data, {report['shadows']} repetitions")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()

"""The real private round, tried on synthetic patients before any budget is touched.

:class:`PrivateRounds` runs whole, plan, ledger and stored integers included, in a throw-away folder, with noise that is
the real one and is written down. From what the ledger says was paid, and from the noise alone, the round is done a
second time by other code, patient by patient. Both must give the same update, and every
draw must have the size that was paid for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from secure_fed.clients.budget import ledger_folder
from secure_fed.clients.data import Split
from secure_fed.clients.features import Labelled, SiteFeatures
from secure_fed.clients.private_lmmd import released_once
from secure_fed.clients.private_round import PrivateRounds
from secure_fed.clients.sitefile import SiteFile, SitePrivacy
from secure_fed.core.errors import GuardError
from secure_fed.core.layout import SiteRun
from secure_fed.core.storage import scratch_folder
from secure_fed.model.adapters import Adapter, build_adapter
from secure_fed.privacy import class_means, class_statistics, memory_sums, validation
from secure_fed.privacy.accounting import Mechanism, Noise, gaussian_noise, mu_squared_of
from secure_fed.privacy.dp_training import (
    PatientBatch,
    class_prompt_patient_loss,
    public_log_prior,
    to_double,
)
from secure_fed.privacy.ledger import Event, Ledger, Plan, opened
from secure_fed.protocol import codec, memory
from secure_fed.protocol.codec import Layout, Parameters
from secure_fed.protocol.envelope import RoundPosition
from secure_fed.protocol.ledger_heads import LedgerHeads
from secure_fed.protocol.one_sum import FIRST, NOISE, PATIENTS, SECOND
from secure_fed.protocol.study import AgreedStudy
from secure_fed.protocol.study_tables import NORMAL

TOLERANCE = 1e-6
"""Relative to the update; both ways compute in float64."""

TRAINING, VALIDATING, UNLABELLED = 8, 4, 3
"""Synthetic patients by split, with one to three images each."""
SPENT = ("train 0", "val 0")
"""Synthetic patients who have nothing left."""
TWICE = "train 1"
"""A synthetic patient who trains and is among those who validate too, in place of the second of these."""

IMAGES = 2
"""At most so many images of each are taken."""

RUN = "5" * 64

_NO_DRAWS = np.zeros(0)


class Recorder:
    """The real noise, written down.

    Attributes:
        draws: standard deviation and values of each.
    """

    def __init__(self, noise: Noise = gaussian_noise) -> None:
        self._noise = noise
        self.draws: list[tuple[float, NDArray[np.float64]]] = []

    def __call__(self, size: int, std: float) -> NDArray[np.float64]:
        """Noise."""
        values = self._noise(size, std)
        self.draws.append((std, values.copy()))
        return values


def rehearse(file: SiteFile, agreed: AgreedStudy) -> None:
    """Try the private round with a site's own settings; returns only if all of it holds.

    The study's domain term, which is made of released means, is tried as it is for the noise on every release; the
    update itself is done a second time without it.

    Args:
        file: the site's.
        agreed: its study.

    Raises:
        GuardError: with what was found and what the ledger was told.
    """
    method, private = agreed.study.method, agreed.study.privacy
    # A cap below the images of some synthetic patients, so that it is seen at work.
    capped = private.model_copy(update={"images_per_patient": min(private.images_per_patient, IMAGES)})
    own = agreed.study.model_copy(update={"privacy": capped})
    if method.sums:
        kind = _ClassStatistics if method.one_sum else _AroundCentroids
        kind(file, AgreedStudy(own, agreed.initial)).check()
        return
    bare = own.model_copy(update={"method": method.model_copy(update={"lmmd_weight": 0.0})})
    _Rehearsal(file, AgreedStudy(bare, agreed.initial)).check(exactly=True)
    if method.domain_weight:
        _Rehearsal(file, agreed).check(exactly=False)


class ThrownAway(NamedTuple):
    """What a run on synthetic patients left.

    Attributes:
        messages: of each round, the values that its integers stand for, by block of the study's layout.
        paid: what its ledger says that each patient has paid, squared mu.
    """

    messages: list[dict[str, NDArray[np.float64]]]
    paid: float


def run_on(file: SiteFile, agreed: AgreedStudy, features: SiteFeatures, rounds: Sequence[int]) -> ThrownAway:
    """Some of a run's real private rounds on features that are nobody's, each at the initial adapter, with a ledger
    that is thrown away.

    Args:
        file: the site's, with its budget.
        agreed: the study.
        features: synthetic ones; all patients can pay.
        rounds: their numbers.
    """
    messages = []
    with scratch_folder() as folder:
        apart, private = _apart(file, agreed, folder, gaussian_noise)
        place, run = ledger_folder(apart), SiteRun(folder / "throw-away")
        with opened(place) as ledger:
            ledger.register({owner: (owner.encode(),) for found in features.patients.values() for owner in found})
        for number in rounds:
            layout = agreed.layout(number)

            def encode(
                values: Mapping[str, NDArray[np.float64]],
                draws: NDArray[np.float64] = _NO_DRAWS,
                layout: Layout = layout,
            ) -> NDArray[np.int64]:
                return layout.encode(values, 1.0, draws)[0]

            def quantise(
                update: NDArray[np.float64],
                draws: NDArray[np.float64],
                counts: tuple[int, int],
                encode: Callable[..., NDArray[np.int64]] = encode,
            ) -> NDArray[np.int64]:
                return encode({codec.UPDATE: update, codec.COUNTS: np.array(counts, dtype=np.float64)}, draws)

            position = RoundPosition(RUN, "0" * 64, "0" * 64, 0, number)
            state, initial = f"state {number}", agreed.initial.adapter
            if agreed.study.method.sums:
                integers = private.sums(position, state, initial, run, lambda: features, encode)
            else:
                integers = private.integers(position, state, initial, initial, run, lambda: features, quantise)
            messages.append(layout.decode(integers, [1.0]))
        paid = max(Ledger(place).costs().values(), default=0.0)
    return ThrownAway(messages, paid)


def budget_of(file: SiteFile) -> SitePrivacy:
    """The budget of the site's file, else the one that its ledger remembers.

    Raises:
        LedgerError: there is neither.
    """
    if file.privacy is not None:
        return file.privacy
    account = Ledger(ledger_folder(file)).account  # it remembers
    return SitePrivacy(epsilon=account.epsilon, delta=account.delta)


def _apart(file: SiteFile, agreed: AgreedStudy, folder: Path, noise: Noise) -> tuple[SiteFile, PrivateRounds]:
    """The site's private rounds with a ledger of their own."""
    identity = folder / "identity"
    identity.mkdir()
    places = {"state": str(folder / "state"), "identity": str(identity), "privacy": budget_of(file)}
    apart = file.model_copy(update=places)
    return apart, PrivateRounds(apart, agreed, LedgerHeads(folder / "seen"), "0" * 64, None, noise)


def _open_account(place: Path, budget: SitePrivacy, features: SiteFeatures) -> None:
    """Register the synthetic patients, of whom :data:`SPENT` have spent all they had."""
    names = sorted({owner for owners in features.patients.values() for owner in owners})
    with opened(place) as ledger:
        ledger.register({name: (name.encode(),) for name in names})
        everything = mu_squared_of(budget.epsilon, budget.delta) * (1 - 1e-6)
        spent = Mechanism(1.0, 1.0 / math.sqrt(everything), 1)
        ledger.reserve(spent, "all that these have", "", {ledger.person(name) for name in SPENT})


def _unchanged(
    place: Path, events: list[Event], before: tuple[NDArray[np.int64], int], after: tuple[NDArray[np.int64], int]
) -> None:
    """Asked again at one adapter state: the same integers, no draw of noise and no event more."""
    if not np.array_equal(before[0], after[0]) or before[1] != after[1]:
        raise GuardError("asked again at one adapter state, the round drew anew; expected the stored integers")
    if [event.seq for event in Ledger(place).of_run(RUN)] != [event.seq for event in events]:
        raise GuardError("asked again at one adapter state, the round was paid again; expected nothing to be spent")


def _check_payers(place: Path, features: SiteFeatures, paid_by: Mapping[int, set[str]]) -> None:
    """Who is in a release has paid for it, once, and nobody else has.

    Args:
        place: of the ledger.
        features: of all synthetic patients.
        paid_by: whom each event is to be charged to, by its number.
    """
    ledger = Ledger(place)
    for name in sorted({owner for owners in features.patients.values() for owner in owners}):
        charged = {seq: times for seq, times in ledger.taken_part(name).items() if seq in paid_by}
        expected = {seq: 1 for seq, names in paid_by.items() if name in names}
        if charged != expected:
            raise GuardError(
                f"a synthetic patient was charged for events {charged} (number, times), and is in {expected}; expected "
                "whoever is in a release to pay for it, and nobody else"
            )


class _SumRehearsal:
    """The first release of a study of sums, held against sums that are added up patient by patient.

    Attributes:
        scales: what each noised block is multiplied by before noise is added.
        free: blocks that tell nothing of patients, with what they must hold; None if that is public.
        sensitivity: by the formulas of docs/privacy.md.
        after: the first round without a release.
    """

    scales: Mapping[str, float]
    free: Mapping[str, float | None]
    sensitivity: float
    after: int

    def _exact(self) -> dict[str, NDArray[np.float64]]:
        """The noised blocks without noise, added up image by image, as the page on privacy has them."""
        raise NotImplementedError

    def __init__(self, file: SiteFile, agreed: AgreedStudy) -> None:
        self._budget = budget_of(file)
        self._file = file
        self._agreed = agreed
        self._features = _synthetic(agreed)

    def check(self) -> None:
        with scratch_folder() as folder:
            self._check(folder)

    def _check(self, folder: Path) -> None:
        recorder = Recorder()
        file, rounds = _apart(self._file, self._agreed, folder, recorder)
        place, run = ledger_folder(file), SiteRun(folder / "throw-away")
        _open_account(place, self._budget, self._features)
        seen: list[dict[str, NDArray[np.float64]]] = []

        def encode(values: Mapping[str, NDArray[np.float64]]) -> NDArray[np.int64]:
            seen.append(dict(values))
            return np.concatenate([np.rint(values[name] * 2.0**30) for name in sorted(values)]).astype(np.int64)

        def ask(number: int) -> NDArray[np.int64]:
            position, initial = RoundPosition(RUN, "0" * 64, "0" * 64, 0, number), self._agreed.initial.adapter
            rounds.given = None  # as a process that was started again
            return rounds.sums(position, f"state {number}", initial, run, lambda: self._features, encode)

        first = ask(1)
        drawn = len(recorder.draws)
        events = Ledger(place).of_run(RUN)
        if [event.state for event in events] != ["committed"]:
            raise GuardError(f"one sum was paid by {len(events)} events; expected one, committed after it was stored")
        mechanism, plan = events[0].mechanism, Ledger(place).plan(RUN)
        if plan is None:
            raise GuardError("a sum was noised without a plan in the ledger; expected one before any noise")
        declared = Ledger(place).account.declare(self._budget.run_epsilon, self._budget.runs).mu_squared
        cost = (plan.rounds + 1) * mechanism.mu_squared
        if (
            mechanism.sensitivity != self.sensitivity
            or plan.rounds + 1 < self.after - 1
            or cost > declared * (1 + 1e-6)
        ):
            raise GuardError(
                f"{plan.rounds + 1} releases cost a squared mu of {cost:.6g} at sensitivity "
                f"{mechanism.sensitivity:.6g}; declared are {declared:.6g} at {self.sensitivity:.6g}, for "
                f"{self.after - 1} at least"
            )
        self._check_values(seen[0], mechanism, recorder.draws)
        _check_payers(place, self._features, {events[0].seq: self._payers()})
        sent = np.concatenate([np.rint(seen[0][name] * 2.0**30) for name in sorted(seen[0])]).astype(np.int64)
        if not np.array_equal(first, sent):
            raise GuardError("the stored integers are not those of the noised sums; expected them so")
        _unchanged(place, events, (first, drawn), (ask(1), len(recorder.draws)))
        if ask(self.after).any() or len(recorder.draws) != drawn:
            raise GuardError(
                f"something of the patients is in round {self.after}, which nobody paid for; expected zeros"
            )

    def _check_values(
        self,
        values: Mapping[str, NDArray[np.float64]],
        mechanism: Mechanism,
        draws: list[tuple[float, NDArray[np.float64]]],
    ) -> None:
        exact = self._exact()
        left = list(draws)
        for name, scale in self.scales.items():
            std = mechanism.noise_std / scale
            size = exact[name].size
            place = next((n for n, (at, one) in enumerate(left) if math.isclose(at, std) and one.size == size), None)
            if place is None:
                raise GuardError(
                    f"noise of (standard deviation, values) {_totals([(at, one.size) for at, one in draws])} was "
                    f"drawn; the ledger paid for {std:.9g} on {size} {name}"
                )
            noise = left.pop(place)[1]
            if not np.allclose(values[name], exact[name] + noise, rtol=1e-9, atol=1e-9 * std):
                raise GuardError(
                    f"{name}: not the sum of the patients who can pay, each at most once, and the noise that was paid"
                )
        others = set(values) - {*self.scales, *self.free}
        others |= {name for name, held in self.free.items() if held is not None and np.any(values[name] != held)}
        if left or others:
            raise GuardError(f"{len(left)} draws and blocks {sorted(others)} too many; expected what was paid alone")

    def _payers(self) -> set[str]:
        """Whom the release is of."""
        return {name for name, _ in self._paying()}

    def _paying(self) -> list[tuple[str, NDArray[np.int64]]]:
        """The synthetic patients who train and can pay, each with the rows of its images, mirrored views included."""
        owners = np.array(self._features.patients["train"])
        return [(name, np.flatnonzero(owners == name)) for name in sorted(set(owners).difference(SPENT))]


class _ClassStatistics(_SumRehearsal):
    scales = class_statistics.SCALES
    free: Mapping[str, float | None] = {NOISE: None}
    sensitivity = class_statistics.SENSITIVITY
    after = 2

    def _exact(self) -> dict[str, NDArray[np.float64]]:
        study, basis = self._agreed.study, self._agreed.initial.basis
        assert basis is not None, "study new makes one for each method that uses one"
        classes, size = len(study.classes), basis.dimensions
        x, y = self._features.train
        projected, half = basis.project(x), len(y)
        if study.backbone.mirrored:
            half //= 2
            projected = (projected[:half] + projected[half:]) / 2
        patients, first, second = np.zeros(classes), np.zeros((classes, size)), np.zeros((size, size))
        for _, all_rows in self._paying():
            rows = all_rows[all_rows < half][: study.privacy.images_per_patient]
            for row in rows:
                patients[y[row]] += 1 / len(rows)
                first[y[row]] += projected[row] / len(rows)
                second += np.outer(projected[row], projected[row]) / len(rows)
        above = np.triu_indices(size)
        triangle = second[above] * np.where(above[0] == above[1], 1.0, math.sqrt(2))
        return {PATIENTS: patients, FIRST: first.ravel(), SECOND: triangle}


class _AroundCentroids(_SumRehearsal):
    def __init__(self, file: SiteFile, agreed: AgreedStudy) -> None:
        super().__init__(file, agreed)
        names = memory.memories(agreed.initial.adapter)
        scales = {"sums": 1.0, "weights": memory_sums.WEIGHT_SCALE}
        self.scales = {f"{name}_{what}": scale for name in names for what, scale in scales.items()}
        self.free = {f"{name}_patients": 0.0 for name in names}
        self.sensitivity = math.sqrt(len(names) * (1 + memory_sums.WEIGHT_SCALE**2))
        self.after = agreed.study.rounds

    def _payers(self) -> set[str]:
        return {name for name, rows in self._paying() if (self._features.train.y[rows] == NORMAL).any()}

    def _exact(self) -> dict[str, NDArray[np.float64]]:
        adapter = self._agreed.initial.adapter
        x, y = self._features.train
        found: dict[str, NDArray[np.float64]] = {}
        for name, features in memory.patches(adapter, x).items():
            bank = adapter[memory.centroids(name)]
            sums, weights = np.zeros(bank.shape), np.zeros(len(bank))
            for _, all_rows in self._paying():
                rows = all_rows[y[all_rows] == NORMAL][: self._agreed.study.privacy.images_per_patient]
                for patch in features[rows].reshape(-1, bank.shape[1]).astype(np.float64):
                    nearest = int(np.square(bank - patch).sum(axis=1).argmin())
                    share = 1 / (len(rows) * features.shape[1])
                    weights[nearest] += share
                    sums[nearest] += share * patch / max(1.0, float(np.linalg.norm(patch)))
            found |= {f"{name}_sums": sums.ravel(), f"{name}_weights": weights}
        return found


class _Rehearsal:
    def __init__(self, file: SiteFile, agreed: AgreedStudy) -> None:
        self._budget = budget_of(file)
        self._file = file
        self._agreed = agreed
        self._features = _synthetic(agreed)

    def check(self, *, exactly: bool) -> None:
        with scratch_folder() as folder:
            self._check(folder, exactly)

    def _check(self, folder: Path, exactly: bool) -> None:
        recorder = Recorder()
        file, rounds = _apart(self._file, self._agreed, folder, recorder)
        seen: list[tuple[NDArray[np.float64], tuple[int, int]]] = []

        def quantise(
            update: NDArray[np.float64], draws: NDArray[np.float64], counts: tuple[int, int]
        ) -> NDArray[np.int64]:
            seen.append((update, counts))
            return np.concatenate([np.floor(update * 2.0**30 + draws), counts]).astype(np.int64)

        place = ledger_folder(file)
        _open_account(place, self._budget, self._features)
        number = self._agreed.study.rounds  # the last one: it has the validation counts, if any has
        position = RoundPosition(RUN, "0" * 64, "0" * 64, 0, number)
        run = SiteRun(folder / "throw-away")
        initial = self._agreed.initial.adapter

        def ask() -> NDArray[np.int64]:
            rounds.given = None  # as a process that was started again
            return rounds.integers(position, "state", initial, initial, run, lambda: self._features, quantise)

        first = ask()
        found = Ledger(place)
        plan, events = found.plan(RUN), found.of_run(RUN)
        draws = list(recorder.draws)
        if plan is None:
            raise GuardError("the round was trained without a plan in the ledger; expected one before any noise")
        self._check_plan(plan, found.account.declare(self._budget.run_epsilon, self._budget.runs).mu_squared)
        self._check_noise(events, draws)
        _check_payers(place, self._features, {event.seq: self._payers(event) for event in events})
        ((update, counts),) = seen
        if exactly:
            self._check_update(update, events, draws)
        self._check_counts(counts, events, draws)
        held = np.floor(update * 2.0**30)
        if np.any((first[: update.size] - held < 0) | (first[: update.size] - held > 1)):
            raise GuardError("the stored integers are not those of the noised update; expected them so")
        _unchanged(place, events, (first, len(draws)), (ask(), len(recorder.draws)))

    def _check_plan(self, plan: Plan, declared: float) -> None:
        """What the run can cost at most, by the formulas of docs/privacy.md, is what was declared."""
        rounds = plan.rounds + 1
        cost = rounds * plan.steps / plan.noise_multiplier**2
        if plan.lmmd_noise_multiplier is not None:
            cost += len(released_once(self._agreed.study.method, self._agreed.study.privacy)) / (
                plan.lmmd_noise_multiplier**2
            )
        if plan.lmmd_round_noise_multiplier is not None:
            cost += rounds / plan.lmmd_round_noise_multiplier**2
        if (
            plan.rounds != self._agreed.study.rounds
            or plan.steps != self._agreed.study.privacy.steps
            or (cost > declared * (1 + 1e-6))
        ):
            raise GuardError(
                f"the run's plan costs a squared mu of {cost:.6g} over {rounds} rounds of {plan.steps} steps; declared "
                f"are {declared:.6g}, {self._agreed.study.rounds} rounds and one, and the study's steps"
            )

    def _check_noise(self, events: list[Event], draws: list[tuple[float, NDArray[np.float64]]]) -> None:
        """Every sum that the ledger was told of got noise of the size that it was told, and nothing else was drawn."""
        classes, dim = self._agreed.initial.prompt_features.shape
        values = sum(value.size for value in self._agreed.initial.adapter.values())
        constants = self._agreed.study.privacy
        expected: list[tuple[float, int]] = []
        for event in events:
            if event.state != "committed":
                raise GuardError(f"{event.purpose}: {event.state} after its output was stored; expected it committed")
            if event.purpose.startswith("class means"):
                size, sensitivity = classes * (dim + 1), class_means.mechanism(constants, 1.0).sensitivity
            elif event.purpose.startswith("validation"):
                size, sensitivity = 2, validation.SENSITIVITY
            else:
                size, sensitivity = values, constants.clip
            if event.mechanism.sensitivity != sensitivity:
                raise GuardError(
                    f"{event.purpose}: the ledger was told a sensitivity of {event.mechanism.sensitivity:g}; expected "
                    f"{sensitivity:g}"
                )
            expected += [(event.mechanism.noise_std, size)] * event.mechanism.steps
        found: list[tuple[float, int]] = []
        for std, noise in draws:
            found.append((std, noise.size))
        if _totals(found) != _totals(expected):
            raise GuardError(
                f"noise of (standard deviation, values) {_totals(found)} was drawn; the ledger paid for "
                f"{_totals(expected)}"
            )

    def _check_update(
        self, update: NDArray[np.float64], events: list[Event], draws: list[tuple[float, NDArray[np.float64]]]
    ) -> None:
        """The update is what the noise that was written down and the patients who can pay give, and nothing else."""
        event = next(event for event in events if event.purpose.startswith("round "))
        study = self._agreed.study
        noises = [noise for std, noise in draws if std == event.mechanism.noise_std]
        adapter = initial_adapter(self._agreed)
        before = codec.flatten(_values(adapter))
        constants = study.privacy
        parameters = adapter.shared_parameters()
        optimizer: torch.optim.Optimizer
        if constants.optimizer == "adam":
            optimizer = torch.optim.Adam(parameters.values(), lr=constants.learning_rate)
        else:
            optimizer = torch.optim.SGD(parameters.values(), lr=constants.learning_rate, momentum=constants.momentum)
        loss = class_prompt_patient_loss(public_log_prior(constants, len(study.classes)))
        n_ref = self._budget.n_ref or constants.n_ref
        for _ in range(event.mechanism.steps):
            gradients = {name: torch.zeros_like(value) for name, value in parameters.items()}
            for one in self._paying():
                alone = torch.autograd.grad(loss(adapter, one).sum(), list(parameters.values()))
                length = math.sqrt(sum(float(part.square().sum()) for part in alone))
                for name, part in zip(parameters, alone, strict=True):
                    gradients[name] += part * min(1.0, event.mechanism.sensitivity / max(length, 1e-300))
            for name, value in parameters.items():
                noise = torch.from_numpy(noises.pop(0)).view(value.shape)
                value.grad = (gradients[name].detach() + noise) / n_ref
            optimizer.step()
        expected = codec.flatten(_values(adapter)) - before
        away = float(np.linalg.norm(update - expected)) / max(float(np.linalg.norm(expected)), 1e-300)
        if not away <= TOLERANCE:
            raise GuardError(
                f"the update is {away:.3g} of its length away from what {event.mechanism.steps} steps of patients "
                f"clipped to {event.mechanism.sensitivity:g}, with the noise that the ledger paid for, give; expected "
                f"at most {TOLERANCE:g}: something else of the patients is in it"
            )

    def _payers(self, event: Event) -> set[str]:
        """Whom a release is of."""
        patients = {split: set(owners).difference(SPENT) for split, owners in self._features.patients.items()}
        if event.purpose.startswith("validation"):
            return patients["val"] - patients["train"]
        return patients["unlabelled" if event.purpose.startswith("class means of the unlabelled") else "train"]

    def _paying(self) -> list[PatientBatch]:
        """The synthetic patients who train and can pay, each alone."""
        x, y = self._features.train
        owners = np.array(self._features.patients["train"])
        cap = self._agreed.study.privacy.images_per_patient
        found = []
        for name in sorted(set(owners).difference(SPENT)):
            rows = np.flatnonzero(owners == name)[:cap]
            features, labels = torch.from_numpy(x[rows]).double(), torch.from_numpy(y[rows])
            found.append(PatientBatch(features[None], labels[None], torch.ones(1, len(rows), dtype=torch.bool)))
        return found

    def _check_counts(
        self, counts: tuple[int, int], events: list[Event], draws: list[tuple[float, NDArray[np.float64]]]
    ) -> None:
        event = next((event for event in events if event.purpose.startswith("validation")), None)
        if event is None:
            if counts != (0, 0):
                raise GuardError(f"validation counts {counts} were sent, and nobody paid for them; expected zeros")
            return
        noise = next(noise for std, noise in draws if std == event.mechanism.noise_std and noise.size == 2)
        adapter = initial_adapter(self._agreed)
        x, y = self._features.val
        classes = len(self._agreed.study.classes)
        with torch.no_grad():  # one by one, as the round does: in a batch the last bit may differ, and decide a tie
            guesses = [int(adapter(row[None])[0, :classes].argmax()) for row in torch.from_numpy(x).double()]
        owners = self._features.patients["val"]
        # Neither who trains, which the counts would cost more than was declared for the run, nor who cannot pay.
        counted = np.array([owner not in (*self._features.patients["train"], *SPENT) for owner in owners])
        right = (np.array(guesses) == y)[counted]
        exact = validation.exact_counts(right, [owners[row] for row in np.flatnonzero(counted)]) + noise
        count = max(0, round(float(exact[0])))
        expected = (count, min(max(0, round(float(exact[1]))), count))
        if counts != expected:
            raise GuardError(
                f"validation counts {counts} were sent; counts of who can pay and does not train, with the noise that "
                f"was paid, give {expected}"
            )


def _totals(draws: list[tuple[float, int]]) -> dict[str, int]:
    """How many values were drawn, by standard deviation to nine digits."""
    totals: dict[str, int] = {}
    for std, size in draws:
        totals[f"{std:.9g}"] = totals.get(f"{std:.9g}", 0) + size
    return dict(sorted(totals.items()))


def initial_adapter(agreed: AgreedStudy) -> Adapter:
    """The adapter that the study begins with, in float64."""
    initial = agreed.initial
    return to_double(
        build_adapter(
            agreed.study.method, initial.prompt_features, initial.logit_scale, initial.adapter, basis=initial.basis
        )
    )


def _values(adapter: Adapter) -> Parameters:
    return {name: value.detach().numpy().copy() for name, value in adapter.shared_parameters().items()}


def _random_rows(agreed: AgreedStudy, count: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Random features of images, unit vectors: of a memory's study of each patch."""
    if not agreed.study.method.blocks:
        rows = rng.standard_normal((count, agreed.initial.prompt_features.shape[1]), dtype=np.float32)
        return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True))
    adapter = agreed.initial.adapter
    rows = rng.standard_normal((count, memory.width(adapter)), dtype=np.float32)
    parts = [
        (one / np.linalg.norm(one, axis=2, keepdims=True)).reshape(count, one.shape[1] * one.shape[2])
        for one in memory.patches(adapter, rows).values()
    ]
    return np.concatenate(parts, axis=1)


def _synthetic(agreed: AgreedStudy) -> SiteFeatures:
    """Patients with one to three random images each; a seed, so that a refusal can be repeated."""
    rng = np.random.default_rng(21)
    classes = len(agreed.study.classes)
    patients: dict[Split, tuple[str, ...]] = {}
    parts: dict[Split, Labelled] = {}
    sizes: dict[Split, int] = {"train": TRAINING, "val": VALIDATING, "unlabelled": UNLABELLED, "test": 0}
    for split, count in sizes.items():
        owners = [f"{split} {number}" for number in range(count) for _ in range(1 + number % 3)]
        owners = [TWICE if owner == "val 1" else owner for owner in owners]
        rows = _random_rows(agreed, len(owners), rng)
        labels = rng.integers(0, classes, len(owners))
        if agreed.study.backbone.mirrored and split == "train":  # each image, then each mirrored view
            rows, labels, owners = np.concatenate((rows, rows[::-1])), np.tile(labels, 2), owners * 2
        parts[split] = Labelled(rows, labels)
        patients[split] = tuple(owners)
    return SiteFeatures(
        parts["train"],
        parts["val"],
        parts["test"],
        parts["unlabelled"].x,
        0,
        0,
        patients,
    )


def synthetic_features(agreed: AgreedStudy, patients: int, images: int, rng: np.random.Generator) -> SiteFeatures:
    """Training patients with equally many random images each, and nothing else."""
    rows = _random_rows(agreed, patients * images, rng)
    nobody = Labelled(rows[:0], np.zeros(0, dtype=np.int64))
    owners = tuple(f"patient {number}" for number in range(patients) for _ in range(images))
    labelled = Labelled(rows, rng.integers(0, len(agreed.study.classes), len(rows)))
    splits: dict[Split, tuple[str, ...]] = {"train": owners, "val": (), "test": (), "unlabelled": ()}
    return SiteFeatures(labelled, nobody, nobody, nobody.x, 0, 0, splits)

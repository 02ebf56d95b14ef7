"""A site's rounds under differential privacy: reserve, train, store, commit; in this order and no other.

Whether a site sends, when, how much and under which noise follows from the study and from what the site declared. Who
takes part is each patient's own matter: its id and its history decide, nobody else's. Whoever cannot pay is left out in
silence, and over nobody noise alone is sent.

The steps have the numbers of docs/privacy.md, "Ten steps of a round": 1 plan (under the lock, as the plan is an entry
of the ledger), 2 lock, 3 verify the ledger, 4 check that the budget pays, 5 reserve, 6 compute with fresh noise, 7
store the noised integers, 8 commit, 9 hand the envelope over, 10 note it as sent.
Whatever happens between two of them, a restart spends again or sends the same bytes; it never draws twice for one
event. An event belongs to the state of the adapter that it was drawn at: asked again at that state, after a void, a
site sends the same integers and spends nothing.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import numpy as np
import safetensors
import safetensors.numpy
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import one_hot, softmax

from secure_fed.clients.budget import has_budget, ledger_folder, refuse_unadopted
from secure_fed.clients.data import Split
from secure_fed.clients.features import SiteFeatures
from secure_fed.clients.outbox import drawn_in
from secure_fed.clients.patients import SETTLED
from secure_fed.clients.private_lmmd import PublicTerm, Side, attraction, released_each_round, released_once, witness
from secure_fed.clients.private_sums import PrivateSums, nothing, private_sums
from secure_fed.clients.sitefile import SiteFile
from secure_fed.core.canonical import canonical_json
from secure_fed.core.errors import BudgetError, BudgetSpentError, LedgerError, LedgerRollbackError, TwinsError
from secure_fed.core.layout import SiteRun
from secure_fed.core.storage import make_folder, write_durable
from secure_fed.model.adapters import Adapter, build_adapter
from secure_fed.privacy import class_means, validation
from secure_fed.privacy.accounting import Noise, gaussian_noise, uniforms
from secure_fed.privacy.class_means import ClassMeans
from secure_fed.privacy.dp_training import (
    Descent,
    Gradients,
    ImageTerm,
    PatientBatch,
    PatientLoss,
    Patients,
    class_prompt_patient_loss,
    gather_patients,
    public_log_prior,
    refuse_method,
    to_double,
)
from secure_fed.privacy.guard import check_training
from secure_fed.privacy.histories import Twins
from secure_fed.privacy.ledger import CLOSED, NO_MEANS, Account, Event, Ledger, MeanReleases, Plan, opened
from secure_fed.protocol import codec
from secure_fed.protocol.codec import Parameters
from secure_fed.protocol.envelope import RoundPosition
from secure_fed.protocol.ledger_heads import NO_LEDGER, LedgerHead, LedgerHeads
from secure_fed.protocol.study import AgreedStudy

log = logging.getLogger(__name__)

_unheard = log.getChild("rehearsal")
_unheard.setLevel(logging.CRITICAL)

People = Mapping[Split, Sequence[str]]
"""Whose each row is, by split: persons of the ledger."""

NOBODY_ELSE: Mapping[str, str] = MappingProxyType({})

_LISTED = 20


class Quantise(Protocol):
    """Makes the round's integers of a flat update, uniform draws and validation counts."""

    def __call__(
        self, update: NDArray[np.float64], draws: NDArray[np.float64], counts: tuple[int, int]
    ) -> NDArray[np.int64]:
        """The integers, those of the counts last."""


def private_rounds(
    file: SiteFile, agreed: AgreedStudy, heads: LedgerHeads, identity: str, rehearse: Callable[[], None]
) -> PrivateRounds | None:
    """The site's private rounds, if it has a budget.

    Args:
        file: the site's.
        agreed: the study.
        heads: the newest ledger heads that others hold.
        identity: public signing key of the site's identity.
        rehearse: checks the rounds on synthetic patients; called before the first reservation.

    Raises:
        BudgetError: the budget is higher than the ledger's, or of another kind.
        PrivateMethodError: the study's method cannot be made private.
        LedgerError: the ledger does not verify, or an older one was not adopted.
    """
    if not has_budget(file):
        return None
    refuse_method(agreed.study.method)
    refuse_unadopted(file)
    return PrivateRounds(file, agreed, heads, identity, rehearse)


class PrivateRounds:
    """What :class:`secure_fed.clients.site.Site` asks for when a round is due and the site has a budget.

    Args:
        file, agreed, heads, identity, rehearse: as for :func:`private_rounds`.
        noise: where noise comes from; anything but the default is for rehearsals and tests.

    Attributes:
        head: the ledger's entry that committed the last integers, with links to earlier ones; travels with them.
        worked: whether the last answer took work on ledger or data, which takes the longer the more patients there are.
        given: file, round and newest known head of the integers that this process gave last, these, and their head;
            None before any.
    """

    def __init__(
        self,
        file: SiteFile,
        agreed: AgreedStudy,
        heads: LedgerHeads,
        identity: str,
        rehearse: Callable[[], None] | None,
        noise: Noise = gaussian_noise,
    ) -> None:
        self.head: LedgerHead = NO_LEDGER
        self.worked = False
        self._unfinished = True
        self.given: tuple[tuple[Path, int, int], NDArray[np.int64], LedgerHead] | None = None
        self._file = file
        self._agreed = agreed
        self._heads = heads
        self._folder = ledger_folder(file)
        self._rehearse = rehearse
        # Of a throw-away ledger nothing is told: people would take it for the site's own.
        self._log = _unheard if rehearse is None else log
        self._noise = noise
        self._run_epsilon = None if file.privacy is None else file.privacy.run_epsilon
        self._runs = 1 if file.privacy is None else file.privacy.runs
        declared = file.privacy.n_ref if file.privacy is not None else None
        self._n_ref = declared or agreed.study.privacy.n_ref
        if file.privacy is None:
            return
        account = Account(file.site, identity, file.data.unit, file.data.kind, file.privacy.epsilon, file.privacy.delta)
        # First: what is refused must not lower the budget for ever.
        account.declare(self._run_epsilon, self._runs)
        if not Ledger.exists(self._folder):
            self._refuse_loss()
            Ledger.create(self._folder, account)
        with opened(self._folder) as ledger:
            ledger.agree(account)

    @property
    def n_ref(self) -> int:
        """Declared number of training patients."""
        return self._n_ref

    def integers(
        self,
        position: RoundPosition,
        state: str,
        parameters: Parameters,
        used: Parameters,
        folder: SiteRun,
        features: Callable[[], SiteFeatures],
        quantise: Quantise,
    ) -> NDArray[np.int64]:
        """The integers at an adapter state: those stored, else trained, noised and stored after the ledger has paid.

        Args:
            position: the round that is due.
            state: digest of what the round builds on, adapter and moments.
            parameters: the global adapter, at which the round begins.
            used: the one that is evaluated and used then, perhaps a mean; validation counts are of it.
            folder: of the run; the integers lie there, once drawn.
            features: gives the features of the run's snapshot; called only when the plan has rounds left.
            quantise: makes integers of an update.

        Raises:
            BudgetError: the site's plan has no round left; no data were read.
            GuardError: the training code fails its check; nothing was spent.
            LedgerError, LedgerRollbackError, StorageError: the ledger cannot be used; nothing was drawn.
        """
        path = folder.noised(state)
        known = self._heads.newest(self._file.site)[0]
        if (given := self._given_before((path, position.round, known))) is not None:
            return given
        self.worked = self._unfinished = True
        with opened(self._folder) as ledger:
            self._confirm(ledger)
            again = path.exists()
            ledger.mark_sent(still_open=self._read(path)[0] if again else ())
            if again:
                integers = self._stored(ledger, position, path)
            else:
                plan = self._plan(ledger, position)
                self._refuse_more(ledger, plan)
                integers = self._draw(ledger, plan, position, parameters, used, path, features(), quantise)
            self.head = ledger.travelling(self._agreed.study.id, known)
        self.given = (path, position.round, known), integers, self.head
        return integers

    def sums(
        self,
        position: RoundPosition,
        state: str,
        parameters: Parameters,
        folder: SiteRun,
        features: Callable[[], SiteFeatures],
        encode: Callable[[Mapping[str, NDArray[np.float64]]], NDArray[np.int64]],
    ) -> NDArray[np.int64]:
        """The integers of a study of sums: of a round that has a release those of it, made once, else of nothing.

        Args:
            position, state, folder, features: as for :meth:`integers`.
            parameters: the adapter that the round builds on.
            encode: makes integers of a round's values.

        Raises:
            as :meth:`integers`.
        """
        study = self._agreed.study
        sums = private_sums(self._agreed, state, parameters)
        path, releases = folder.noised(sums.state), position.round <= sums.rounds
        known = self._heads.newest(self._file.site)[0]
        if (given := self._given_before((path, position.round, known))) is not None:
            return given
        self.worked = self._unfinished = True
        with opened(self._folder) as ledger:
            self._confirm(ledger)
            again = path.exists()
            ledger.mark_sent(still_open=self._read(path)[0] if again and releases else ())
            if not releases:
                integers = encode(nothing(self._agreed, position.round))
            elif again:
                integers = self._stored(ledger, position, path)
            else:
                plan = ledger.plan(position.run)
                if plan is None:
                    declared = ledger.account.declare(self._run_epsilon, self._runs)
                    plan = ledger.make_plan(study.id, position.run, declared, sums.planned, 1, sums.sensitivity)
                sums.refuse(plan.round_mechanism)
                self._refuse_more(ledger, plan)
                integers = self._release(ledger, plan, position, path, sums, features(), encode)
            self.head = ledger.travelling(study.id, known)
        self.given = (path, position.round, known), integers, self.head
        return integers

    def _given_before(self, at: tuple[Path, int, int]) -> NDArray[np.int64] | None:
        """What this process gave last, if that is asked for again: the ledger need not be read, whose length is of who
        is in it and of how many pictures, and the answer leaves at once."""
        if self.given is None or self.given[0] != at:
            return None
        _, integers, self.head = self.given
        return integers

    def _release(
        self,
        ledger: Ledger,
        plan: Plan,
        position: RoundPosition,
        path: Path,
        sums: PrivateSums,
        features: SiteFeatures,
        encode: Callable[[Mapping[str, NDArray[np.float64]]], NDArray[np.int64]],
    ) -> NDArray[np.int64]:
        release, study = plan.round_mechanism, self._agreed.study
        purpose = f"round {position.round} of run {position.run[:16]}: {sums.what}"
        if self._rehearse is not None:
            sums.check()
            self._rehearse()
            self._rehearse = None
        paying = ledger.able({ledger.person(name) for name in sums.patients(features)}, release.mu_squared)
        make_folder(path.parent, 0o700)
        event = ledger.reserve(release, purpose, plan.run, paying)
        integers = encode(sums.noised(features, ledger.person, paying, release, self._noise))
        data = _store(path, integers, [event.seq], position.round)
        ledger.commit([event.seq], data, study.id, plan.run)
        self._log.info(
            "%s: the sum of %s: epsilon spent %.4f of %g at delta %g",
            *(self._file.site, purpose, ledger.epsilon_spent, ledger.account.epsilon, ledger.account.delta),
        )
        return integers

    def settle(
        self,
        pictures: Mapping[str, Collection[bytes]],
        files: Mapping[str, Collection[bytes]],
        same: Mapping[str, str] = NOBODY_ELSE,
    ) -> None:
        """Register who is in the data, and refuse to start while one patient may have two histories.

        Args:
            pictures: digests of each patient's pictures, by id.
            files: digests of each patient's files, by which they are known again whatever is shown of a file.
            same: ids that people have said to be another one, by whose name their pictures go.

        Raises:
            TwinsError: nobody has said whether two ids are one patient, or that two histories are one.
            LedgerError, StorageError: the ledger cannot be used.
        """
        both = {patient: {*found, *files.get(patient, ())} for patient, found in pictures.items()}
        here = {patient: other for patient, other in same.items() if other in pictures}
        with opened(self._folder) as ledger:
            ledger.register(both, files)
            twins, halves = ledger.unsettled(both), ledger.halves(here)
        if halves:
            raise TwinsError(
                f"{len(halves)} patient ids are taken for another one ({SETTLED}), and the ledger knows what was spent "
                "on each alone; expected their histories to be added: secfacmic ledger link A B; until then this site "
                f"does not start:{_pairs(halves)}"
            )
        if twins:
            raise TwinsError(
                f"{len(twins)} pairs of patient ids have an equal picture; expected to know of each whether it is one "
                "patient: secfacmic ledger link A B (their histories add), or secfacmic ledger distinct A B; until "
                f"then this site does not start:{_pairs(twins)}"
            )

    def finish(self) -> None:
        """Note after the last round that everything was handed over, once a process and run."""
        if not self._unfinished:
            return
        self._unfinished, self.given, self.worked = False, None, True
        with opened(self._folder) as ledger:
            ledger.mark_sent(still_open=())

    # --- before the data ---

    def _plan(self, ledger: Ledger, position: RoundPosition) -> Plan:
        plan = ledger.plan(position.run)
        if plan is None:
            study = self._agreed.study
            constants = study.privacy
            plan = ledger.make_plan(
                study.id,
                position.run,
                ledger.account.declare(self._run_epsilon, self._runs),
                study.rounds,
                constants.steps,
                constants.clip,
                self._mean_releases(),
                self._validation_rounds(),
            )
            self._log.info(
                "%s: plan for %d rounds of %d steps (and one round in case of a crash), epsilon %.4f declared for the "
                "run: noise multiplier %.3g, clipping norm %g; LMMD %s; validation counts %s; epsilon spent %.4f of "
                "%g at delta %g",
                *(self._file.site, plan.rounds, plan.steps, plan.epsilon, plan.noise_multiplier, plan.clip),
                *(plan.lmmd_note, plan.validation_note),
                *(ledger.epsilon_spent, ledger.account.epsilon, ledger.account.delta),
            )
        return plan

    def _mean_releases(self) -> MeanReleases:
        """Which class means the study's use of them asks for, and when they are not worth it."""
        study = self._agreed.study
        if study.method.domain_weight == 0:
            return NO_MEANS
        each_round = released_each_round(study.method, study.privacy)
        before = self._released() is not None
        if before and not each_round:
            text = f"on ({study.privacy.lmmd_use}): with the means released before, at no further cost"
            return MeanReleases(study.privacy.lmmd_use, 0, False, lambda noise_multiplier: text)
        classes, dim = self._agreed.initial.prompt_features.shape
        once = 0 if before else len(released_once(study.method, study.privacy))
        return MeanReleases(
            study.privacy.lmmd_use,
            once,
            each_round,
            lambda noise_multiplier: class_means.why_not(study.privacy, noise_multiplier, self._n_ref, classes, dim),
        )

    def _refuse_more(self, ledger: Ledger, plan: Plan) -> None:
        """A run has as many draws as were declared, the one for a crash included."""
        drawn = sum(event.purpose.startswith("round ") for event in ledger.of_run(plan.run))
        if drawn > plan.rounds:
            raise BudgetSpentError(
                f"the plan of run {plan.run[:16]} had {plan.rounds} rounds and one in case of a crash; all "
                f"{drawn} are paid for: this site retires, and takes part as an observer until the run is over"
            )

    def _validation_rounds(self) -> tuple[int, ...]:
        """The rounds in which the study asks for validation counts."""
        study = self._agreed.study
        asked = min(study.privacy.validation_rounds, study.rounds)
        if not study.encoding.share_validation:
            return ()
        every = {study.rounds - place * study.rounds // asked for place in range(asked)}
        return tuple(sorted(every))

    def _confirm(self, ledger: Ledger) -> None:
        """The ledger must hold the newest head that server and peers know; a restored one opens only then."""
        seq, head = self._heads.newest(self._file.site)
        study = self._agreed.study.id
        if not ledger.holds(study, seq, head):
            raise LedgerRollbackError(
                f"{self._folder}: the ledger has paid for {ledger.sent(study)} updates in this study; the other sites "
                f"hold its update {seq}, head {head[:16]}: an older copy was put back; restore the newest (secfacmic "
                "ledger restore), nothing is spent until then"
            )
        closed = self._folder / CLOSED
        if closed.exists() and not seq:
            raise BudgetError(
                f"{self._folder}: restored, but the journal shows no round of this site yet to compare its head with; "
                "nothing is spent until one does: this site takes part as an observer"
            )
        closed.unlink(missing_ok=True)

    def _refuse_loss(self) -> None:
        """A ledger that is gone although others have seen it."""
        seq, head = self._heads.newest(self._file.site)
        if seq:
            raise LedgerRollbackError(
                f"{self._folder}: no ledger, but the other sites hold its update {seq}, head {head[:16]}; put it back "
                "from the newest export (secfacmic ledger restore)"
            )

    def _read(self, path: Path) -> tuple[list[int], NDArray[np.int64]]:
        """Integers drawn before, and the events that they are the output of."""
        try:
            tensors = safetensors.numpy.load(path.read_bytes())
            return [int(seq) for seq in tensors["events"]], np.asarray(tensors["integers"])
        except (safetensors.SafetensorError, KeyError, ValueError):
            raise LedgerError(
                f"{path}: not the noised integers of a ledger's event; expected them unchanged; remove the file, which "
                "costs the round's budget again"
            ) from None

    def _stored(self, ledger: Ledger, position: RoundPosition, path: Path) -> NDArray[np.int64]:
        """Integers drawn before; their event is committed if a crash came in between."""
        events, integers = self._read(path)
        if "reserved" in {ledger.state(event) for event in events}:
            ledger.commit(events, path.read_bytes(), self._agreed.study.id, position.run)
        return integers

    # --- with the data ---

    def _draw(
        self,
        ledger: Ledger,
        plan: Plan,
        position: RoundPosition,
        parameters: Parameters,
        used: Parameters,
        path: Path,
        features: SiteFeatures,
        quantise: Quantise,
    ) -> NDArray[np.int64]:
        release = plan.round_mechanism
        study, adapter = self._agreed.study, self._adapter(parameters)
        purposes = _purposes(f"round {position.round} of run {plan.run[:16]}")
        descent = Descent(study.privacy, release.noise_std, self._n_ref, self._noise)
        if self._rehearse is not None:
            self._guard(descent, parameters)
            self._rehearse()
            self._rehearse = None
        people = _people(ledger, features)
        means = self._means(ledger, plan, features, people)
        each_round = None
        if means is not None and plan.lmmd_round_noise_multiplier is not None:
            each_round = class_means.mechanism(study.privacy, plan.lmmd_round_noise_multiplier)
        # Who trains must be able to pay for all that the round releases of it.
        cost = release.mu_squared + (0.0 if each_round is None else each_round.mu_squared)
        trains = set(people["train"])
        paying = ledger.able(trains, cost)
        if len(paying) < len(trains) or not trains:
            self._log.warning(
                "%s: for its own eyes: %d of %d training patients can pay for the round; the others are left out",
                *(self._file.site, len(paying), len(trains)),
            )
        make_folder(path.parent, 0o700)
        events = [ledger.reserve(release, purposes[0], plan.run, paying)]
        if each_round is not None:
            events.append(ledger.reserve(each_round, purposes[2], plan.run, paying))
        counted = self._reserve_validation(ledger, plan, position.round, purposes[1], people, events)
        patients = _gather(features, people, "train", paying, study.privacy.images_per_patient)
        before = codec.flatten(_numpy(adapter))
        term, public = self._domain_term(adapter, means, None if each_round is None else patients, plan)
        adapter.shows_adapted = term is not None
        descent.run(adapter, patients, self._loss(term), public)
        update = codec.flatten(_numpy(adapter)) - before
        counts = (0, 0) if counted is None else self._noisy_counts(plan, used, features, people, counted)
        integers = quantise(update, uniforms(update.size), counts)
        numbers = [event.seq for event in events]
        data = _store(path, integers, numbers, position.round)
        ledger.commit(numbers, data, study.id, plan.run)
        self._log.info(
            "%s: %s: epsilon spent %.4f of %g, left %.4f, at delta %g",
            *(self._file.site, purposes[0], ledger.epsilon_spent, ledger.account.epsilon),
            *(ledger.account.epsilon - ledger.epsilon_spent, ledger.account.delta),
        )
        return integers

    def _guard(self, descent: Descent, parameters: Parameters) -> None:
        """Check the code that is about to train, with a domain term of synthetic means if the study has one."""
        study, initial = self._agreed.study, self._agreed.initial
        adapter = self._adapter(parameters)
        classes, dim = initial.prompt_features.shape
        term = None
        if study.method.domain_weight:
            rows = np.random.default_rng(20).standard_normal((2, classes, dim)) / np.sqrt(dim)
            shares = np.full(classes, 1 / classes)
            source, target = (ClassMeans(means, np.ones(classes, dtype=bool), shares) for means in rows)
            term = _image_term(self._agreed, source, target)
        adapter.shows_adapted = term is not None
        check_training(adapter, self._loss(term), descent)

    def _loss(self, term: ImageTerm | None) -> PatientLoss:
        study = self._agreed.study
        return class_prompt_patient_loss(public_log_prior(study.privacy, len(study.classes)), term)

    # --- validation ---

    def _reserve_validation(
        self,
        ledger: Ledger,
        plan: Plan,
        round_number: int,
        purpose: str,
        people: People,
        events: list[Event],
    ) -> set[str] | None:
        """Pay for the round's validation counts; the patients to count, or None if the plan has none in this round.

        Only who neither trains nor is in means that the run releases is counted, as counts cost all that was declared.
        The noise comes also over nobody: that there is none would else be seen.
        """
        if plan.validation_noise_multiplier is None or round_number not in plan.validation_rounds:
            return None
        release = validation.mechanism(plan.validation_noise_multiplier)
        pays = set(people["train"])
        if plan.lmmd_noise_multiplier is not None:
            pays.update(people["unlabelled"])
        counted = ledger.able(set(people["val"]) - pays, release.mu_squared)
        events.append(ledger.reserve(release, purpose, plan.run, counted))
        return counted

    def _noisy_counts(
        self, plan: Plan, used: Parameters, features: SiteFeatures, people: People, counted: set[str]
    ) -> tuple[int, int]:
        """Validation counts of the adapter that was used when the round began."""
        assert plan.validation_noise_multiplier is not None  # or nobody would be counted
        adapter, classes = self._adapter(used), len(self._agreed.study.classes)
        owners = people["val"]
        rows = [row for row, owner in enumerate(owners) if owner in counted]
        right = np.zeros(len(rows), dtype=bool)
        with torch.no_grad():
            for place, row in enumerate(rows):
                # One by one: in a batch, one image more may move the last bit of another's.
                logits = adapter(torch.from_numpy(features.val.x[row : row + 1]).double())[0, :classes]
                right[place] = bool(logits.isfinite().all()) and int(logits.argmax()) == int(features.val.y[row])
        return validation.noisy_counts(
            right, [owners[row] for row in rows], plan.validation_noise_multiplier, self._noise
        )

    def _adapter(self, parameters: Parameters) -> Adapter:
        initial = self._agreed.initial
        adapter = build_adapter(
            self._agreed.study.method, initial.prompt_features, initial.logit_scale, parameters, basis=initial.basis
        )
        return to_double(adapter)

    # --- released means ---

    def _means(
        self, ledger: Ledger, plan: Plan, features: SiteFeatures, people: People
    ) -> Mapping[Side, ClassMeans] | None:
        """The means that the study's use needs from the start: those released before, else released now, once a run."""
        study = self._agreed.study
        if study.method.domain_weight == 0:
            return None
        path, constants = self._means_path(), study.privacy
        sides = released_once(study.method, constants)
        purposes = {side: f"class means of the {side} images for run {plan.run[:16]}" for side in sides}
        mine = [event for event in ledger.of_run(plan.run) if event.purpose in purposes.values()]
        released = self._released()
        if released is not None:
            open_ones = [event.seq for event in mine if event.state == "reserved"]
            if open_ones:
                ledger.commit(open_ones, path.read_bytes())
            return released
        if plan.lmmd_noise_multiplier is None or mine:
            return None  # off, or a crash came between paying and storing: they are not paid for twice
        release = class_means.mechanism(constants, plan.lmmd_noise_multiplier)
        paying, events = {}, []
        for side in sides:  # one after the other: whose images are on both may be able to pay for one alone
            paying[side] = ledger.able(set(people[_split(side)]), release.mu_squared)
            events.append(ledger.reserve(release, purposes[side], plan.run, paying[side]))
        sums: dict[str, NDArray[np.float64]] = {
            side: self._noisy_sum(features, people, side, paying[side], plan.lmmd_noise_multiplier) for side in sides
        }
        data = bytes(safetensors.numpy.save(sums))
        write_durable(path, data, 0o600)
        ledger.commit([event.seq for event in events], data)
        return self._released()

    def _noisy_sum(
        self, features: SiteFeatures, people: People, side: Side, paying: set[str], noise_multiplier: float
    ) -> NDArray[np.float64]:
        constants, shape = self._agreed.study.privacy, self._agreed.initial.prompt_features.shape
        patients = _gather(features, people, _split(side), paying, constants.images_per_patient)
        shares = self._labels if side == "labelled" else self._guesses
        return class_means.noisy_sum(patients, shares, shape, constants, noise_multiplier, self._noise)

    def _domain_term(
        self, adapter: Adapter, means: Mapping[Side, ClassMeans] | None, paid: Patients | None, plan: Plan
    ) -> tuple[ImageTerm | None, Callable[[Adapter], Gradients] | None]:
        """The domain term, inside the patients' losses or as a public gradient; neither if it is off.

        Args:
            paid: the patients who have paid for the means of their adapted features, if the use needs them.
        """
        study = self._agreed.study
        if means is None:
            return None, None
        if released_each_round(study.method, study.privacy):
            if paid is None or plan.lmmd_round_noise_multiplier is None:
                return None, None
            with torch.no_grad():
                adapted = [PatientBatch(adapter.adapt(one.features), one.labels, one.mask) for one in paid]
            shape = self._agreed.initial.prompt_features.shape
            noisy = class_means.noisy_sum(
                adapted, self._labels, shape, study.privacy, plan.lmmd_round_noise_multiplier, self._noise
            )
            return _image_term(self._agreed, class_means.means_of(noisy, study.privacy), means["unlabelled"]), None
        if study.privacy.lmmd_use == "attraction":
            return _image_term(self._agreed, means["unlabelled"], means["unlabelled"]), None
        return None, PublicTerm(study.method, study.privacy, means["labelled"], means["unlabelled"]).gradient

    def _labels(self, batch: PatientBatch) -> Tensor:
        """Class shares [n, I, K] of labelled images: all on the label."""
        return one_hot(batch.labels, len(self._agreed.study.classes)).double()

    def _guesses(self, batch: PatientBatch) -> Tensor:
        """Zero-shot class shares [n, I, K] of unlabelled images: from the frozen CLIP alone."""
        initial = self._agreed.initial
        prompts = torch.from_numpy(initial.prompt_features).double()
        return softmax(initial.logit_scale * batch.features @ prompts.T, dim=-1)

    def _released(self) -> Mapping[Side, ClassMeans] | None:
        path, study = self._means_path(), self._agreed.study
        if not path.exists():
            return None
        tensors = safetensors.numpy.load(path.read_bytes())
        sides = released_once(study.method, study.privacy)
        return {side: class_means.means_of(tensors[side], study.privacy) for side in sides}

    def _means_path(self) -> Path:
        """Named by all that the means depend on besides the patients."""
        study, prompts = self._agreed.study, self._agreed.initial.prompt_features
        content = {
            "backbone": study.backbone.digest,
            "prompts": codec.adapter_digest({"prompts": prompts.astype(np.float64)}),
            "radius": study.privacy.lmmd_radius,
            "centre": list(study.privacy.lmmd_centre),
            "sides": list(released_once(study.method, study.privacy)),
        }
        return self._folder / f"means-{hashlib.sha256(canonical_json(content)).hexdigest()[:16]}.safetensors"


def _pairs(twins: Sequence[Twins]) -> str:
    """The first pairs of ids, a line each."""
    more = f"\n  and {len(twins) - _LISTED} more" if len(twins) > _LISTED else ""
    return "".join(f"\n  {one.patient}  {one.other}" for one in twins[:_LISTED]) + more


def _image_term(agreed: AgreedStudy, source: ClassMeans, target: ClassMeans) -> ImageTerm | None:
    """The part of the domain term inside each image's loss, for the uses that have one."""
    method, settings = agreed.study.method, agreed.study.privacy
    if settings.lmmd_use == "attraction":
        return attraction(method, settings, target)
    return witness(method, settings, source, target) if released_each_round(method, settings) else None


def _store(path: Path, integers: NDArray[np.int64], events: Sequence[int], round_number: int) -> bytes:
    """Store a round's integers with the events that paid for them, durably, and drop those of long ago.

    Those of the round before stay: a void may take its record back, and they are asked for again.

    Returns:
        What was stored.
    """
    for old in path.parent.glob(f"*{path.suffix}"):
        if drawn_in(old, damaged=0) < round_number - 1:  # one that was cut short, or is of a release that kept one, too
            old.unlink()
    tensors = {"integers": integers, "events": np.array(events, np.int64), "round": np.array([round_number], np.int64)}
    data = bytes(safetensors.numpy.save(tensors))
    write_durable(path, data, 0o600)
    return data


def _purposes(purpose: str) -> tuple[str, str, str]:
    """Of the events that a round can have: training, validation counts, means of the adapted images."""
    return purpose, f"validation counts of {purpose}", f"class means of the adapted images of {purpose}"


def _split(side: Side) -> Split:
    return "train" if side == "labelled" else "unlabelled"


def _people(ledger: Ledger, features: SiteFeatures) -> People:
    """The person whom each row of each split is of."""
    return {split: [ledger.person(owner) for owner in owners] for split, owners in features.patients.items()}


def _gather(
    features: SiteFeatures, people: People, split: Split, paying: set[str], images_per_patient: int
) -> Patients:
    """The paying patients of a split."""
    if split == "train":
        x, y = features.train.x, features.train.y
    else:
        x, y = features.unlabelled, np.zeros(len(features.unlabelled), dtype=np.int64)
    owners = people[split]
    chosen = [row for row, owner in enumerate(owners) if owner in paying]
    return gather_patients(x[chosen], y[chosen], [owners[row] for row in chosen], images_per_patient)


def _numpy(adapter: Adapter) -> Parameters:
    return {name: value.detach().numpy().copy() for name, value in adapter.shared_parameters().items()}

"""A site's rounds under differential privacy: reserve, train, store, commit; in this order and no other.

The steps have the numbers of docs/privacy.md, "Ten steps of a round": 1 plan (under the lock, as the plan is an entry
of the ledger), 2 lock, 3 verify the ledger, 4 check that the budget pays, 5 reserve, 6 compute with fresh noise, 7
store the noised integers, 8 commit, 9 hand the envelope over, 10 note it as sent.
Whatever happens between two of them, a restart spends again or sends the same bytes; it never draws twice for one
event.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np
import safetensors
import safetensors.numpy
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import one_hot, softmax

from secure_fed.clients import one_sum
from secure_fed.clients.features import SiteFeatures
from secure_fed.clients.private_lmmd import PublicTerm, Side, attraction, released_each_round, released_once, witness
from secure_fed.clients.sitefile import SiteFile
from secure_fed.clients.training import predict
from secure_fed.core.errors import BudgetError, DataError, LedgerError, LedgerRollbackError
from secure_fed.core.storage import make_folder, write_durable
from secure_fed.model.adapters import Adapter, build_adapter
from secure_fed.privacy import class_means, class_statistics, validation
from secure_fed.privacy.accounting import Mechanism, uniforms
from secure_fed.privacy.class_means import ClassMeans
from secure_fed.privacy.dp_training import (
    Descent,
    Gradients,
    ImageTerm,
    PatientBatch,
    PatientLoss,
    class_prompt_patient_loss,
    gather_patients,
    public_log_prior,
    refuse_method,
    to_double,
)
from secure_fed.privacy.guard import check_training
from secure_fed.privacy.ledger import CLOSED, NO_MEANS, Account, Event, Ledger, MeanReleases, Plan, opened
from secure_fed.protocol import codec
from secure_fed.protocol.codec import Parameters
from secure_fed.protocol.envelope import RoundPosition
from secure_fed.protocol.ledger_heads import NO_LEDGER, LedgerHead, LedgerHeads
from secure_fed.protocol.study import AgreedStudy, canonical_json

log = logging.getLogger(__name__)


class Quantise(Protocol):
    """Makes the round's integers of a flat update, uniform draws and validation counts."""

    def __call__(
        self, update: NDArray[np.float64], draws: NDArray[np.float64], counts: tuple[int, int]
    ) -> NDArray[np.int64]:
        """The integers, those of the counts last."""


def ledger_folder(file: SiteFile) -> Path:
    """Where a site's ledger lies."""
    return file.state_folder.ledger


def has_budget(file: SiteFile) -> bool:
    """Whether the site's ``site.toml`` sets a budget or its ledger remembers one."""
    return file.privacy is not None or Ledger.exists(ledger_folder(file))


def private_rounds(file: SiteFile, agreed: AgreedStudy, heads: LedgerHeads) -> PrivateRounds | None:
    """The site's private rounds, if it has a budget.

    Raises:
        BudgetError: the budget is higher than the ledger's, or of another kind.
        PrivateMethodError: the study's method cannot be made private.
        LedgerError: the ledger does not verify.
    """
    if not has_budget(file):
        return None
    refuse_method(agreed.study.method)
    return PrivateRounds(file, agreed, heads)


class PrivateRounds:
    """What :class:`secure_fed.clients.site.Site` asks for when a round is due and the site has a budget.

    Attributes:
        head: the ledger's entry that committed the last integers, with links to earlier ones; travels with them.
    """

    def __init__(self, file: SiteFile, agreed: AgreedStudy, heads: LedgerHeads) -> None:
        self.head: LedgerHead = NO_LEDGER
        self._file = file
        self._agreed = agreed
        self._heads = heads
        self._folder = ledger_folder(file)
        self._guarded = False
        self._ledger: Ledger | None = None  # while this object holds it
        declared = file.privacy.n_ref if file.privacy is not None else None
        self._n_ref = declared or agreed.study.privacy.n_ref
        if file.privacy is None:
            return
        account = Account(file.site, file.data.unit, file.data.kind, file.privacy.epsilon, file.privacy.delta)
        if not Ledger.exists(self._folder):
            self._refuse_loss()
            Ledger.create(self._folder, account)
        with opened(self._folder) as ledger:
            ledger.agree(account)

    def integers(
        self,
        position: RoundPosition,
        parameters: Parameters,
        path: Path,
        features: Callable[[], SiteFeatures],
        quantise: Quantise,
    ) -> NDArray[np.int64]:
        """The round's integers: those stored, else trained, noised and stored after the ledger has paid.

        Args:
            position: the round that is due.
            parameters: the global adapter.
            path: where the integers lie, once drawn.
            features: gives the site's features; called only when the ledger can pay.
            quantise: makes integers of an update.

        Raises:
            BudgetError: the budget does not pay for the round; no data were read.
            GuardError: the training code fails its check; nothing was spent.
            LedgerError, LedgerRollbackError, StorageError: the ledger cannot be used; nothing was drawn.
        """
        purpose = f"round {position.round} of run {position.run[:16]}"
        with self._opened() as ledger:
            self._confirm(ledger)
            ledger.mark_sent(still_open=_purposes(purpose))
            if path.exists():
                integers = self._stored(ledger, path)
            else:
                plan = self._plan(ledger, position)
                ledger.require(plan.round_mechanism)
                integers = self._draw(ledger, plan, position.round, purpose, parameters, path, features(), quantise)
            self.head = ledger.travelling(self._heads.newest(self._file.site)[0])
        return integers

    def sums(
        self,
        position: RoundPosition,
        path: Path,
        features: Callable[[], SiteFeatures],
        encode: Callable[[Mapping[str, NDArray[np.float64]]], NDArray[np.int64]],
    ) -> NDArray[np.int64]:
        """The integers of a study of one sum: the one release, made once, and of later rounds nothing.

        The noise is that of the whole budget, with nothing in reserve: after a crash between the reservation and the
        stored integers, a fraction of a second, the site goes on as an observer. Histograms of validation patients
        would cost more than they tell, so that none leave: zeros do, the same whatever the patients.

        Args:
            position, path, features: as for :meth:`integers`.
            encode: makes integers of a round's values.

        Raises:
            as :meth:`integers`.
        """
        purpose = f"round {position.round} of run {position.run[:16]}"
        with self._opened() as ledger:
            self._confirm(ledger)
            ledger.mark_sent(still_open=_purposes(purpose))
            if position.round > 1:
                integers = encode(one_sum.nothing(self._agreed, position.round))
            elif path.exists():
                integers = self._stored(ledger, path)
            else:
                plan = ledger.plan(position.run)
                if plan is None:
                    plan = ledger.make_plan(position.run, 0, 1, class_statistics.SENSITIVITY, 1.0)
                ledger.require(plan.round_mechanism)
                integers = self._release(ledger, plan, purpose, path, features(), encode)
            self.head = ledger.travelling(self._heads.newest(self._file.site)[0])
        return integers

    def _release(
        self,
        ledger: Ledger,
        plan: Plan,
        purpose: str,
        path: Path,
        features: SiteFeatures,
        encode: Callable[[Mapping[str, NDArray[np.float64]]], NDArray[np.int64]],
    ) -> NDArray[np.int64]:
        release, study, basis = plan.round_mechanism, self._agreed.study, self._agreed.initial.basis
        assert basis is not None, "study new makes one for each method that uses one"
        if not features.patients.get("train"):
            raise DataError("no labelled training patient; expected at least one: join the study as an observer")
        class_statistics.check_sums(len(study.classes), basis.dimensions)
        block_of = _register(ledger, features)
        learning = {block for patient, block in block_of.items() if patient not in _only_validated(features)}
        blocks = sorted(learning & set(ledger.able(release)))
        if not blocks:
            raise BudgetError("no block of patients in this folder can pay for the sum; expected one at least")
        x, labels, owners = one_sum.views(self._agreed, features)
        make_folder(path.parent, 0o700)
        for old in path.parent.iterdir():
            old.unlink()
        event = ledger.reserve(release, purpose, blocks)
        paying = {patient for patient, block in block_of.items() if block in blocks}
        rows = class_statistics.capped(owners, paying, study.privacy.images_per_patient)
        whole = class_statistics.finite_rows(x[rows], [owners[row] for row in rows])
        rows = [rows[row] for row in whole]
        exact = class_statistics.exact_sums(x[rows], labels[rows], [owners[row] for row in rows], len(study.classes))
        integers = encode(class_statistics.noisy_values(exact, plan.noise_multiplier))
        data = bytes(safetensors.numpy.save({"integers": integers, "events": np.array([event.seq], dtype=np.int64)}))
        write_durable(path, data, 0o600)
        ledger.commit([event.seq], data)
        log.info(
            "%s: the sum of %s: epsilon spent %.4f of %g at delta %g, all of it meant for this one release",
            *(self._file.site, purpose, ledger.epsilon_spent, ledger.account.epsilon, ledger.account.delta),
        )
        return integers

    def register(self, features: SiteFeatures) -> None:
        """Give every patient its block; new ones open a new one, with a budget of its own.

        Raises:
            LedgerError, StorageError: the ledger cannot be used.
        """
        if self._ledger is not None:
            _register(self._ledger, features)
            return
        with self._opened() as ledger:
            _register(ledger, features)

    def finish(self) -> None:
        """Note after the last round that everything was handed over."""
        with self._opened() as ledger:
            ledger.mark_sent(still_open=())

    @contextmanager
    def _opened(self) -> Iterator[Ledger]:
        with opened(self._folder) as ledger:
            self._ledger = ledger
            try:
                yield ledger
            finally:
                self._ledger = None

    # --- before the data ---

    def _plan(self, ledger: Ledger, position: RoundPosition) -> Plan:
        plan = ledger.plan(position.run)
        if plan is None:
            study = self._agreed.study
            constants = study.privacy
            plan = ledger.make_plan(
                position.run,
                study.rounds - position.round + 1,
                constants.steps,
                constants.clip,
                constants.sampling_rate,
                self._mean_releases(),
                self._validation_rounds(position.round),
            )
            log.info(
                "%s: plan for %d rounds of %d steps (and one round in case of a crash): noise multiplier %.3g, "
                "clipping norm %g; LMMD %s; validation counts %s; epsilon spent %.4f of %g at delta %g",
                *(self._file.site, plan.rounds, plan.steps, plan.noise_multiplier, plan.clip, plan.lmmd_note),
                *(plan.validation_note, ledger.epsilon_spent, ledger.account.epsilon, ledger.account.delta),
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

    def _validation_rounds(self, first: int) -> tuple[int, ...]:
        """The rounds, from the one that is due, in which the study asks for validation counts."""
        study = self._agreed.study
        asked = min(study.privacy.validation_rounds, study.rounds)
        if not study.encoding.share_validation:
            return ()
        every = {study.rounds - place * study.rounds // asked for place in range(asked)}
        return tuple(sorted(number for number in every if number >= first))

    def _confirm(self, ledger: Ledger) -> None:
        """The ledger must hold the newest head that server and peers know; a restored one opens only then."""
        seq, head = self._heads.newest(self._file.site)
        if not ledger.holds(seq, head):
            raise LedgerRollbackError(
                f"{self._folder}: the ledger ends at entry {ledger.head[0]}; the other sites hold entry {seq}, head "
                f"{head[:16]}, of it: an older copy was put back; restore the newest (secfacmic ledger restore), "
                "nothing is spent until then"
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
                f"{self._folder}: no ledger, but the other sites hold its entry {seq}, head {head[:16]}; put it back "
                "from the newest export (secfacmic ledger restore)"
            )

    def _stored(self, ledger: Ledger, path: Path) -> NDArray[np.int64]:
        """Integers drawn before; their event is committed if a crash came in between."""
        data = path.read_bytes()
        try:
            tensors = safetensors.numpy.load(data)
            events, integers = [int(seq) for seq in tensors["events"]], tensors["integers"]
        except (safetensors.SafetensorError, KeyError, ValueError):
            raise LedgerError(
                f"{path}: not the noised integers of a ledger's event; expected them unchanged; remove the file, which "
                "costs the round's budget again"
            ) from None
        states = {ledger.state(event) for event in events}
        if "reserved" in states:
            ledger.commit(events, data)
        return np.asarray(integers)

    # --- with the data ---

    def _draw(
        self,
        ledger: Ledger,
        plan: Plan,
        round_number: int,
        purpose: str,
        parameters: Parameters,
        path: Path,
        features: SiteFeatures,
        quantise: Quantise,
    ) -> NDArray[np.int64]:
        release = plan.round_mechanism
        study, adapter = self._agreed.study, self._adapter(parameters)
        descent = Descent(study.privacy, release.noise_std, self._n_ref)
        if not features.patients.get("train"):
            raise DataError("no labelled training patient; expected at least one: join the study as an observer")
        if not self._guarded:
            self._guard(descent, parameters)
            self._guarded = True
        block_of = _register(ledger, features)
        learning = {block for patient, block in block_of.items() if patient not in _only_validated(features)}
        means = self._means(ledger, plan, features, block_of, learning)
        blocks = sorted(learning & set(ledger.able(release)))
        if not blocks:
            ledger.require(release)
            raise BudgetError("no block of patients in this folder can pay for the round; expected one at least")
        for old in path.parent.iterdir():
            old.unlink()
        events = [ledger.reserve(release, purpose, blocks)]
        paying = {patient for patient, block in block_of.items() if block in blocks}
        batch = _gather(features, "train", paying, study.privacy.images_per_patient)
        current = means is not None and self._reserve_current_means(ledger, plan, purpose, blocks, events)
        counted = self._reserve_validation(ledger, plan, round_number, purpose, features, block_of, events)
        before = codec.flatten(_numpy(adapter))
        term, public = self._domain_term(adapter, means, batch if current else None, plan)
        adapter.shows_adapted = term is not None
        descent.run(adapter, batch, self._loss(term), public)
        update = codec.flatten(_numpy(adapter)) - before
        counts = (0, 0) if counted is None else self._noisy_counts(plan, parameters, features, counted)
        integers = quantise(update, uniforms(update.size), counts)
        numbers = [event.seq for event in events]
        tensors = {"integers": integers, "events": np.array(numbers, dtype=np.int64)}
        data = bytes(safetensors.numpy.save(tensors))
        write_durable(path, data, 0o600)
        ledger.commit(numbers, data)
        log.info(
            "%s: %s: epsilon spent %.4f of %g, left %.4f, at delta %g",
            *(self._file.site, purpose, ledger.epsilon_spent, ledger.account.epsilon),
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
        features: SiteFeatures,
        block_of: Mapping[str, int],
        events: list[Event],
    ) -> set[str] | None:
        """Pay for the round's validation counts; the patients to count, or None if it has none.

        Only patients of blocks that never train are counted. The noise comes also without any: that there are none
        would else be seen.
        """
        if plan.validation_noise_multiplier is None or round_number not in plan.validation_rounds:
            return None
        release = validation.mechanism(plan.validation_noise_multiplier)
        validated = {patient: block_of[patient] for patient in _only_validated(features)}
        blocks = sorted(set(validated.values()) & set(ledger.validation_blocks) & set(ledger.able(release)))
        if blocks:
            events.append(ledger.reserve(release, _purposes(purpose)[1], blocks))
        return {patient for patient, block in validated.items() if block in blocks}

    def _noisy_counts(
        self, plan: Plan, parameters: Parameters, features: SiteFeatures, counted: set[str]
    ) -> tuple[int, int]:
        """Validation counts of the adapter that the round began with."""
        assert plan.validation_noise_multiplier is not None  # or nobody would be counted
        owners = features.patients.get("val", ())
        rows = [row for row, owner in enumerate(owners) if owner in counted]
        right = np.zeros(0, dtype=bool)
        if rows:
            chosen = predict(self._agreed, parameters, features.val.x[rows], None).argmax(axis=1)
            right = chosen == features.val.y[rows]
        return validation.noisy_counts(right, [owners[row] for row in rows], plan.validation_noise_multiplier)

    def _adapter(self, parameters: Parameters) -> Adapter:
        initial = self._agreed.initial
        adapter = build_adapter(self._agreed.study.method, initial.prompt_features, initial.logit_scale, parameters)
        return to_double(adapter)

    # --- released means ---

    def _means(
        self, ledger: Ledger, plan: Plan, features: SiteFeatures, block_of: Mapping[str, int], learning: set[int]
    ) -> Mapping[Side, ClassMeans] | None:
        """The means that the study's use needs from the start: those released before, else released now, once a run."""
        study = self._agreed.study
        if study.method.domain_weight == 0:
            return None
        path, constants = self._means_path(), study.privacy
        sides = released_once(study.method, constants)
        purposes = [f"class means of the {side} images for run {plan.run[:16]}" for side in sides]
        mine = [event for event in ledger.events if event.purpose in purposes]
        released = self._released()
        if released is not None:
            open_ones = [event.seq for event in mine if event.state == "reserved"]
            if open_ones:
                ledger.commit(open_ones, path.read_bytes())
            return released
        if plan.lmmd_noise_multiplier is None or mine:
            return None  # off, or a crash came between paying and storing: they are not paid for twice
        release = class_means.mechanism(constants, plan.lmmd_noise_multiplier)
        together = Mechanism(release.sensitivity, release.noise_std, len(sides))
        blocks = sorted(learning & set(ledger.able(together)))
        if not blocks:
            return None
        events = [ledger.reserve(release, purpose, blocks) for purpose in purposes]
        paying = {patient for patient, block in block_of.items() if block in blocks}
        sums: dict[str, NDArray[np.float64]] = {
            side: self._noisy_sum(features, side, paying, plan.lmmd_noise_multiplier) for side in sides
        }
        data = bytes(safetensors.numpy.save(sums))
        write_durable(path, data, 0o600)
        ledger.commit([event.seq for event in events], data)
        return self._released()

    def _noisy_sum(
        self, features: SiteFeatures, side: Side, paying: set[str], noise_multiplier: float
    ) -> NDArray[np.float64]:
        constants, classes = self._agreed.study.privacy, len(self._agreed.study.classes)
        split = "train" if side == "labelled" else side
        batch = _gather(features, split, paying, constants.images_per_patient)
        shares = one_hot(batch.labels, classes).double() if side == "labelled" else self._guesses(batch)
        return class_means.noisy_sum(batch, shares, constants, noise_multiplier)

    def _reserve_current_means(
        self, ledger: Ledger, plan: Plan, purpose: str, blocks: list[int], events: list[Event]
    ) -> bool:
        """Pay for the means of the adapted labelled features, if the use needs them and all who train can pay."""
        if plan.lmmd_round_noise_multiplier is None:
            return False
        release = class_means.mechanism(self._agreed.study.privacy, plan.lmmd_round_noise_multiplier)
        if not set(blocks) <= set(ledger.able(release)):
            return False  # the reserve for a crash is used up: the round goes without the term
        events.append(ledger.reserve(release, _purposes(purpose)[2], blocks))
        return True

    def _domain_term(
        self, adapter: Adapter, means: Mapping[Side, ClassMeans] | None, paid: PatientBatch | None, plan: Plan
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
                adapted = PatientBatch(adapter.adapt(paid.features), paid.labels, paid.mask)
            shares = one_hot(paid.labels, len(study.classes)).double()
            noisy = class_means.noisy_sum(adapted, shares, study.privacy, plan.lmmd_round_noise_multiplier)
            return _image_term(self._agreed, class_means.means_of(noisy, study.privacy), means["unlabelled"]), None
        if study.privacy.lmmd_use == "attraction":
            return _image_term(self._agreed, means["unlabelled"], means["unlabelled"]), None
        return None, PublicTerm(study.method, study.privacy, means["labelled"], means["unlabelled"]).gradient

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


def _image_term(agreed: AgreedStudy, source: ClassMeans, target: ClassMeans) -> ImageTerm | None:
    """The part of the domain term inside each image's loss, for the uses that have one."""
    method, settings = agreed.study.method, agreed.study.privacy
    if settings.lmmd_use == "attraction":
        return attraction(method, settings, target)
    return witness(method, settings, source, target) if released_each_round(method, settings) else None


def _purposes(purpose: str) -> tuple[str, str, str]:
    """Of the events that a round can have: training, validation counts, means of the adapted images."""
    return purpose, f"validation counts of {purpose}", f"class means of the adapted images of {purpose}"


def _only_validated(features: SiteFeatures) -> set[str]:
    """The patients of the validation split; a patient is in one split."""
    return set(features.patients.get("val", ()))


def _register(ledger: Ledger, features: SiteFeatures) -> dict[str, int]:
    """The block of each patient; validation patients have their own."""
    return ledger.register(features.digests, _only_validated(features))


def _gather(features: SiteFeatures, split: str, paying: set[str], images_per_patient: int) -> PatientBatch:
    """The paying patients of a split."""
    if split == "train":
        x, y, owners = features.train.x, features.train.y, features.patients["train"]
    else:
        x, owners = features.unlabelled, features.patients["unlabelled"]
        y = np.zeros(len(x), dtype=np.int64)
    chosen = [row for row, owner in enumerate(owners) if owner in paying]
    return gather_patients(x[chosen], y[chosen], [owners[row] for row in chosen], images_per_patient)


def _numpy(adapter: Adapter) -> Parameters:
    return {name: value.detach().numpy().copy() for name, value in adapter.shared_parameters().items()}

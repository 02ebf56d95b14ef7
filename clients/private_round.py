"""A site's rounds under differential privacy: reserve, train, store, commit; in this order and no other.

The steps have the numbers of dp.md section 4: 1 plan (under the lock, as the plan is an entry of the ledger), 2 lock,
3 verify the ledger, 4 check that the budget pays, 5 reserve, 6 compute with fresh noise, 7 store the noised integers,
8 commit, 9 hand the envelope over, 10 note it as sent.
Whatever happens between two of them, a restart spends again or sends the same bytes; it never draws twice for one
event.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import one_hot, softmax

from clients.adaptation import lmmd
from clients.features import SiteFeatures
from clients.sitefile import SiteFile
from privacy import class_means
from privacy.class_means import ClassMeans
from privacy.dp_training import (
    Descent,
    Gradients,
    PatientBatch,
    class_prompt_patient_loss,
    gather_patients,
    public_log_prior,
    refuse_method,
    to_double,
)
from privacy.gaussian import Mechanism, uniforms
from privacy.guard import check_training
from privacy.ledger import CLOSED, Account, Ledger, Plan, opened
from secure_fed import codec
from secure_fed.adapters import Adapter, build_adapter
from secure_fed.codec import Parameters
from secure_fed.envelope import RoundPosition
from secure_fed.errors import BudgetError, DataError, LedgerError, LedgerRollbackError
from secure_fed.ledger_heads import LedgerHeads
from secure_fed.storage import write_durable
from secure_fed.study import AgreedStudy, canonical_json

log = logging.getLogger(__name__)

MEANS_BATCH = 128
"""Synthetic features that a step of the domain term draws on each side."""

Quantise = Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.int64]]
"""From a flat update and uniform draws to the round's integers."""


def ledger_folder(file: SiteFile) -> Path:
    """Where a site's ledger lies."""
    return Path(file.state) / "privacy"


def private_rounds(file: SiteFile, agreed: AgreedStudy, heads: LedgerHeads) -> PrivateRounds | None:
    """The site's private rounds, if its ``site.toml`` sets a budget or its ledger remembers one.

    Raises:
        BudgetError: the budget is higher than the ledger's, or of another kind.
        PrivateMethodError: the study's method cannot be made private.
        LedgerError: the ledger does not verify.
    """
    folder = ledger_folder(file)
    if file.privacy is None and not Ledger.exists(folder):
        return None
    refuse_method(agreed.study.method)
    return PrivateRounds(file, agreed, heads)


class PrivateRounds:
    """What :class:`clients.site.Site` asks for when a round is due and the site has a budget.

    Attributes:
        head: number and id of the ledger's last entry when the last integers were stored; travels with them.
        at_step: is called after each of the ten steps with its number; tests alone set it, to crash there.
    """

    def __init__(self, file: SiteFile, agreed: AgreedStudy, heads: LedgerHeads) -> None:
        self.head: tuple[int, str] = (0, "")
        self.at_step: Callable[[int], None] = _go_on
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
            self.at_step(2)
            self._confirm(ledger)
            self.at_step(3)
            ledger.mark_sent(still_open=purpose)
            if path.exists():
                integers = self._stored(ledger, path)
            else:
                plan = self._plan(ledger, position)
                ledger.require(plan.round_mechanism)
                self.at_step(4)
                integers = self._draw(ledger, plan, purpose, parameters, path, features(), quantise)
            self.head = ledger.head
        return integers

    def register(self, features: SiteFeatures) -> None:
        """Give every patient its block; new ones open a new one, with a budget of its own.

        Raises:
            LedgerError, StorageError: the ledger cannot be used.
        """
        if self._ledger is not None:
            self._ledger.register(features.digests)
            return
        with self._opened() as ledger:
            ledger.register(features.digests)

    def finish(self) -> None:
        """Note after the last round that everything was handed over."""
        with self._opened() as ledger:
            ledger.mark_sent(still_open=None)
        self.at_step(10)

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
                self._why_no_means,
            )
            log.info(
                "%s: plan for %d rounds of %d steps (and one round in case of a crash): noise multiplier %.3g, "
                "clipping norm %g; LMMD %s; epsilon spent %.4f of %g at delta %g",
                *(self._file.site, plan.rounds, plan.steps, plan.noise_multiplier, plan.clip, plan.lmmd_note),
                *(ledger.epsilon_spent, ledger.account.epsilon, ledger.account.delta),
            )
        self.at_step(1)
        return plan

    def _why_no_means(self, noise_multiplier: float) -> str | None:
        study = self._agreed.study
        if study.method.lmmd_weight == 0:
            return "off: the study has no domain term"
        if self._released() is not None:
            return "on: with the means released before, at no further cost"
        classes, dim = self._agreed.initial.prompt_features.shape
        return class_means.why_not(study.privacy, noise_multiplier, self._n_ref, classes, dim)

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
            event, integers = int(tensors["event"][0]), tensors["integers"]
        except (safetensors.SafetensorError, KeyError, ValueError):
            raise LedgerError(
                f"{path}: not the noised integers of a ledger's event; expected them unchanged; remove the file, which "
                "costs the round's budget again"
            ) from None
        if ledger.state(event) == "reserved":
            ledger.commit(event, data)
            self.at_step(8)
        return np.asarray(integers)

    # --- with the data ---

    def _draw(
        self,
        ledger: Ledger,
        plan: Plan,
        purpose: str,
        parameters: Parameters,
        path: Path,
        features: SiteFeatures,
        quantise: Quantise,
    ) -> NDArray[np.int64]:
        release = plan.round_mechanism
        adapter = self._adapter(parameters)
        descent = Descent(self._agreed.study.privacy, release.noise_std, self._n_ref)
        classes = len(self._agreed.study.classes)
        loss = class_prompt_patient_loss(public_log_prior(self._agreed.study.privacy, classes))
        if not self._guarded:
            check_training(adapter, loss, descent)
            self._guarded = True
        if not features.patients.get("train"):
            raise DataError("no labelled training patient; expected at least one: join the study as an observer")
        block_of = ledger.register(features.digests)
        means = self._means(ledger, plan, features, block_of)
        able = ledger.able(release)
        blocks = sorted(set(block_of.values()) & set(able))
        if not blocks:
            ledger.require(release)
            raise BudgetError("no block of patients in this folder can pay for the round; expected one at least")
        for old in path.parent.iterdir():
            old.unlink()
        event = ledger.reserve(release, purpose, blocks)
        self.at_step(5)
        paying = {patient for patient, block in block_of.items() if block in blocks}
        batch = _gather(features, "train", paying, self._agreed.study.privacy.images_per_patient)
        before = codec.flatten(_numpy(adapter))
        public = None if means is None else _DomainTerm(self._agreed, means).gradient
        descent.run(adapter, batch, loss, public)
        update = codec.flatten(_numpy(adapter)) - before
        integers = quantise(update, uniforms(update.size))
        self.at_step(6)
        tensors = {"integers": integers, "event": np.array([event.seq], dtype=np.int64)}
        data = bytes(safetensors.numpy.save(tensors))
        write_durable(path, data, 0o600)
        self.at_step(7)
        ledger.commit(event.seq, data)
        self.at_step(8)
        log.info(
            "%s: %s: epsilon spent %.4f of %g, left %.4f, at delta %g",
            *(self._file.site, purpose, ledger.epsilon_spent, ledger.account.epsilon),
            *(ledger.account.epsilon - ledger.epsilon_spent, ledger.account.delta),
        )
        return integers

    def _adapter(self, parameters: Parameters) -> Adapter:
        initial = self._agreed.initial
        adapter = build_adapter(self._agreed.study.method, initial.prompt_features, initial.logit_scale, parameters)
        return to_double(adapter)

    # --- released means ---

    def _means(
        self, ledger: Ledger, plan: Plan, features: SiteFeatures, block_of: dict[str, int]
    ) -> tuple[ClassMeans, ClassMeans] | None:
        """The means of labelled and unlabelled images: those released before, else released now, once a run."""
        if self._agreed.study.method.lmmd_weight == 0:
            return None
        path, constants = self._means_path(), self._agreed.study.privacy
        purposes = [f"class means of the {name} images for run {plan.run[:16]}" for name in ("labelled", "unlabelled")]
        mine = [event for event in ledger.events if event.purpose in purposes]
        released = self._released()
        if released is not None:
            for event in mine:
                if event.state == "reserved":
                    ledger.commit(event.seq, path.read_bytes())
            return released
        if plan.lmmd_noise_multiplier is None or mine:
            return None  # off, or a crash came between paying and storing: they are not paid for twice
        release = class_means.mechanism(constants, plan.lmmd_noise_multiplier)
        blocks = sorted(set(block_of.values()) & set(ledger.able(_twice(release))))
        if not blocks:
            return None
        events = [ledger.reserve(release, purpose, blocks) for purpose in purposes]
        paying = {patient for patient, block in block_of.items() if block in blocks}
        labelled = _gather(features, "train", paying, constants.images_per_patient)
        unlabelled = _gather(features, "unlabelled", paying, constants.images_per_patient)
        classes = len(self._agreed.study.classes)
        weights = one_hot(labelled.labels, classes).double(), self._guesses(unlabelled)
        sums = [
            class_means.noisy_sum(batch, share, constants, plan.lmmd_noise_multiplier)
            for batch, share in zip((labelled, unlabelled), weights, strict=True)
        ]
        data = bytes(safetensors.numpy.save({"labelled": sums[0], "unlabelled": sums[1]}))
        write_durable(path, data, 0o600)
        for event in events:
            ledger.commit(event.seq, data)
        return self._released()

    def _guesses(self, batch: PatientBatch) -> Tensor:
        """Zero-shot class shares [n, I, K] of unlabelled images: from the frozen CLIP alone."""
        initial = self._agreed.initial
        prompts = torch.from_numpy(initial.prompt_features).double()
        return softmax(initial.logit_scale * batch.features @ prompts.T, dim=-1)

    def _released(self) -> tuple[ClassMeans, ClassMeans] | None:
        path, constants = self._means_path(), self._agreed.study.privacy
        if not path.exists():
            return None
        tensors = safetensors.numpy.load(path.read_bytes())
        labelled, unlabelled = (class_means.means_of(tensors[name], constants) for name in ("labelled", "unlabelled"))
        return labelled, unlabelled

    def _means_path(self) -> Path:
        """Named by all that the means depend on besides the patients."""
        study, prompts = self._agreed.study, self._agreed.initial.prompt_features
        content = {
            "backbone": study.backbone.digest,
            "prompts": codec.adapter_digest({"prompts": prompts.astype(np.float64)}),
            "radius": study.privacy.lmmd_radius,
            "centre": list(study.privacy.lmmd_centre),
        }
        return self._folder / f"means-{hashlib.sha256(canonical_json(content)).hexdigest()[:16]}.safetensors"


class _DomainTerm:
    """LMMD between features made up around released means (dp.md 2.3, use C): no patient is looked at again."""

    def __init__(self, agreed: AgreedStudy, means: tuple[ClassMeans, ClassMeans]) -> None:
        self._weight = agreed.study.method.lmmd_weight
        self._clip = agreed.study.privacy.clip
        self._source, self._target = means
        self._classes = np.flatnonzero(self._source.known & self._target.known)
        self._generator = np.random.default_rng()

    def gradient(self, adapter: Adapter) -> Gradients:
        """Of the weighted term, cut to the clipping norm, so that it does not drown the clipped gradients."""
        if not self._classes.size:
            return {}
        labels = torch.from_numpy(self._generator.choice(self._classes, MEANS_BATCH))
        source, target = (self._around(means, labels.numpy()) for means in (self._source, self._target))
        classes = one_hot(labels, len(self._source.known)).double()
        term = self._weight * lmmd(adapter.adapt(source), labels, target, classes)
        parameters = adapter.shared_parameters()
        found = torch.autograd.grad(term, list(parameters.values()), allow_unused=True)
        gradients = {name: value for name, value in zip(parameters, found, strict=True) if value is not None}
        norm = torch.sqrt(sum((value.square().sum() for value in gradients.values()), torch.zeros(())))
        factor = self._clip / max(float(norm), self._clip)
        return {name: value * factor for name, value in gradients.items()}

    def _around(self, means: ClassMeans, labels: NDArray[np.int64]) -> Tensor:
        """Unit features, each its class mean and an isotropic remainder that fills it up to length 1."""
        chosen = means.means[labels]
        noise = self._generator.standard_normal(chosen.shape) / np.sqrt(chosen.shape[1])
        rest = np.sqrt(np.clip(1 - np.sum(chosen * chosen, axis=1, keepdims=True), 0, 1))
        return torch.nn.functional.normalize(torch.from_numpy(chosen + rest * noise), dim=1)


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


def _twice(release: Mechanism) -> Mechanism:
    return Mechanism(release.sensitivity, release.noise_std, 2)


def _go_on(step: int) -> None:
    """No test is watching."""

"""What a site makes of its images: features, figures, and the integers that a round asks for, made once."""

from __future__ import annotations

import copy
import hashlib
import logging
from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import safetensors.numpy
import torch
from numpy.typing import NDArray

from secure_fed.clients import memory, one_sum
from secure_fed.clients.bound import read_bound
from secure_fed.clients.budget import ledger_folder, unpaid
from secure_fed.clients.data import SiteImage, Split
from secure_fed.clients.features import FeatureCache, Progress, SiteFeatures, load_features
from secure_fed.clients.given_sums import HASH_BYTES, GivenSums
from secure_fed.clients.images import (
    by_patient,
    compared_images,
    data_changed,
    pixels_of,
    refuse_doubts,
    rules_of,
)
from secure_fed.clients.private_round import private_rounds
from secure_fed.clients.private_sums import nothing
from secure_fed.clients.rehearsal import rehearse
from secure_fed.clients.replica import Replica
from secure_fed.clients.rules import Rules
from secure_fed.clients.sitefile import SiteFile
from secure_fed.clients.snapshot import read_snapshot
from secure_fed.clients.training import predict, train_alone, train_round, training_seed, zero_shot
from secure_fed.core.errors import DataError, EnvelopeError
from secure_fed.core.layout import RECORDS, SiteRun
from secure_fed.core.storage import make_folder, write_durable
from secure_fed.model.adapters import PRIVATE_HEAD, check_method
from secure_fed.model.backbone import load_backbone
from secure_fed.model.device import choose_device
from secure_fed.model.evaluation import Metrics, Predictions, balanced_accuracy, metrics
from secure_fed.model.preparing import window
from secure_fed.model.text_tower import TextTower
from secure_fed.privacy.ledger import snapshot_key
from secure_fed.protocol import codec
from secure_fed.protocol.codec import Parameters
from secure_fed.protocol.envelope import EnvelopeHeader
from secure_fed.protocol.ledger_heads import NO_LEDGER, LedgerHead
from secure_fed.protocol.records import read_header
from secure_fed.protocol.signing import parse_header
from secure_fed.protocol.study import AgreedStudy

log = logging.getLogger(__name__)

NO_DRAWS = np.zeros(0)
SATURATION_WARNING = 0.001
"""Share of an update's saturated coordinates above which the site warns: the value bound is then too small. Of exact
sums each is told."""


class Learner:
    """A hospital's images, and what is computed on them here: for its own eyes, or as the integers of a round.

    Says nothing to anybody: :class:`secure_fed.clients.site.Site` does.

    Args:
        file: its ``site.toml``, paths absolute (:func:`secure_fed.clients.sitefile.read_site_file`).
        agreed: the study; must be the one that ``file`` names.

    Raises:
        DeviceError: its ``site.toml`` asks for a device that is not there.
        SiteFileError: its identity is not the one that the study names, or its policy refuses the study.
        StudyError: the site is not in the study, or the study's method does not hold together.
        RecordError: the state folder does not verify.

    Attributes:
        replica: its copy of the journal, its keys, and the adapter that follows.
        device: where its images are encoded and, without a budget, its adapter is trained.
    """

    def __init__(self, file: SiteFile, agreed: AgreedStudy) -> None:
        file.refuse_study(agreed.study)
        self.device = choose_device(file.device)
        check_method(agreed.study.method)
        self.replica = Replica(file, agreed)
        self._file = file
        self._agreed = agreed
        self._features: SiteFeatures | None = None
        self._preprocess: dict[str, Any] | None = None
        trains = self.replica.member.role == "train"
        self._private = (
            private_rounds(
                file, agreed, self.replica.heads, self.replica.identity.keys.signing, lambda: rehearse(file, agreed)
            )
            if trains
            else None
        )

    @property
    def name(self) -> str:
        """The site's name in the study."""
        return self.replica.name

    @property
    def run(self) -> str:
        """Id of the current run, empty before the first genesis."""
        return self.replica.state.run

    @property
    def finished(self) -> bool:
        """Whether every round of the study is applied here."""
        return self.replica.state.chain.finished

    @property
    def parameters(self) -> Parameters:
        """The global adapter, float64, after the last applied record."""
        return self.replica.state.parameters

    def features(self, progress: Progress | None = None) -> SiteFeatures:
        """The site's image features, encoded once and cached.

        Raises:
            DataError, ManifestError, LabelError, UnreadableImageError, BackboneError: what the data lack.
            ForgottenError: the list of the forgotten cannot be read.
        """
        if self._features is None:
            torch.set_num_threads(self._file.threads)
            frozen = self._snapshot
            if frozen is not None and frozen.exists():
                self._features = read_snapshot(frozen, snapshot_key(ledger_folder(self._file)))
            else:
                self._features = self._read_data(progress)
            left_out = self._features.unreadable
            if left_out:
                log.warning("%s: left out %d unreadable image%s", self.name, left_out, "s" * (left_out > 1))
        return self._features

    def tell_changes(self) -> None:
        """Say whether the data are not what they were when the run that goes on began; nothing else depends on it."""
        frozen = self._snapshot
        if frozen is not None and frozen.exists() and data_changed(self._file, self._agreed, self.features()):
            log.warning(
                "%s: for its own eyes: the data are not what they were when run %s began; the run goes on with what "
                "they were then",
                *(self.name, self.run[:16]),
            )

    def as_it_is(self) -> Self:
        """Itself as of now, for what is made of its images while it goes on."""
        still = copy.copy(self)
        still.replica = copy.copy(self.replica)
        return still

    def _read_data(self, progress: Progress | None) -> SiteFeatures:
        checkpoint = None if self._file.checkpoint is None else Path(self._file.checkpoint)
        pictures: dict[str, frozenset[bytes]] = {}
        found, looks = compared_images(self._file, self._agreed, progress)
        for line in found.notes.told:
            log.info("%s: %s", self.name, line)
        refuse_doubts(self._file, found)
        if found.doubts:
            kinds = Counter(doubt.kind for doubt in found.doubts)
            log.warning(
                "%s: %d doubts about who is who (%s); see them: secfacmic data check",
                *(self.name, len(found.doubts), ", ".join(f"{kind} {count}" for kind, count in kinds.items())),
            )
        images = found.images
        if self._private is not None:
            images, pictures = by_patient(self._file, self._agreed, images, looks)
        with FeatureCache(self._file.feature_cache) as cache:
            features = load_features(
                images,
                self._agreed,
                cache,
                checkpoint,
                self._file.skip_unreadable,
                progress,
                self.device,
                rules_of(self._file, self._agreed),
            )
        if self._private is not None:
            self._private.settle(pictures, features.digests, found.notes.same)
        aligns = self._agreed.study.method.aligns
        if aligns != "none" and self.replica.member.role == "train" and not len(features.unlabelled):
            log.warning(
                '%s: no unlabelled images for adaptation = "%s", so this site trains without it; give it '
                "some: a share, or data.unlabelled in site.toml",
                *(self.name, aligns),
            )
        return features

    @property
    def _snapshot(self) -> Path | None:
        """Where the data of the run that goes on are kept; None without a budget or a run."""
        if self._private is None or not self.run or self.finished:
            return None
        return self.replica.files.folder.snapshot

    @property
    def budgeted(self) -> bool:
        """Whether it trains under a privacy budget."""
        return self._private is not None

    @property
    def unpaid(self) -> bool:
        """Whether figures of its images are for its own eyes: they are patients', and a budget has not paid."""
        return unpaid(self._file)

    def evaluate(self, parameters: Parameters | None, agreed: AgreedStudy | None = None) -> Metrics:
        """Metrics of :meth:`predictions`."""
        return metrics(*self.predictions(parameters, agreed), positive=(agreed or self._agreed).study.positive)

    def predictions(self, parameters: Parameters | None, agreed: AgreedStudy | None = None) -> Predictions:
        """Probabilities for the site's test images; an observer, which trains on nothing, tests on all labelled ones.

        Args:
            parameters: an adapter, perhaps with a private head; None for zero-shot.
            agreed: the study whose method the adapter is of, if not the site's own.
        """
        images, labels, patients = self.test_images()
        return Predictions(self._predict(images, parameters, agreed or self._agreed), labels, patients)

    def test_images(self) -> tuple[NDArray[np.float32], NDArray[np.int64], tuple[str, ...]]:
        """Features [n, d] of the images that figures are made of, their labels [n], and whose they are."""
        features = self.features()
        splits: tuple[Split, ...] = ("train", "val", "test") if self.replica.member.role == "observer" else ("test",)
        tests = [getattr(features, split) for split in splits]
        images = np.concatenate([test.x for test in tests])
        labels = np.concatenate([test.y for test in tests])
        return images, labels, tuple(patient for split in splits for patient in features.patients[split])

    def test_sources(self) -> list[SiteImage]:
        """The images of :meth:`test_images`, in its order."""
        splits = ("train", "val", "test") if self.replica.member.role == "observer" else ("test",)
        return [image for split in splits for image in self.features().images if image.split == split]

    def train_sources(self) -> list[SiteImage]:
        """The training images."""
        return [image for image in self.features().images if image.split == "train"]

    @property
    def rules(self) -> Rules:
        """How its pictures are seen."""
        return rules_of(self._file, self._agreed)

    def window(self, size: tuple[int, int]) -> tuple[float, float, float, float]:
        """The part of a picture of this width and height that the study's image tower sees."""
        if self._preprocess is None:
            checkpoint = None if self._file.checkpoint is None else Path(self._file.checkpoint)
            self._preprocess = load_backbone(self._agreed.study.backbone, checkpoint).form.preprocess
        return window(self._preprocess, size)

    def validate(self, parameters: Parameters) -> float | None:
        """Balanced accuracy on the site's validation images, by which choices are made; None without any."""
        probabilities, labels, _ = self.validation_predictions(parameters)
        return balanced_accuracy(probabilities, labels)

    def validation_predictions(self, parameters: Parameters) -> Predictions:
        """Probabilities for the site's validation images."""
        val = self.features().val
        return Predictions(self._predict(val.x, parameters, self._agreed), val.y, self.features().patients["val"])

    def train_alone(self, agreed: AgreedStudy) -> Parameters:
        """An adapter (and private head) trained here alone, as :func:`secure_fed.clients.training.train_alone` does.

        Args:
            agreed: the study, or one like it with another method.
        """
        torch.set_num_threads(self._file.threads)
        return train_alone(agreed, self.features(), self.name, self.tower, self.device)

    def personal(self, parameters: Parameters, round_number: int | None = None) -> Parameters:
        """An adapter with the private head that this site trained for it; the adapter itself if there is none.

        Args:
            parameters: the global adapter.
            round_number: the last round to take the head of; by default the last one there is.
        """
        if not self._agreed.study.method.private_head or not self.run:
            return parameters
        stored = sorted(self.replica.files.folder.heads.glob("*"))
        chosen = [path for path in stored if round_number is None or int(path.name) <= round_number]
        return parameters | safetensors.numpy.load(chosen[-1].read_bytes()) if chosen else parameters

    @cached_property
    def tower(self) -> TextTower | None:
        """The backbone's frozen text tower, for a study whose method trains through it."""
        tokens = self._agreed.initial.prompt_tokens
        if tokens is None:
            return None
        checkpoint = None if self._file.checkpoint is None else Path(self._file.checkpoint)
        return load_backbone(self._agreed.study.backbone, checkpoint).text_tower(tokens)

    def _predict(
        self, images: NDArray[np.float32], parameters: Parameters | None, agreed: AgreedStudy
    ) -> NDArray[np.float64]:
        if parameters is None:
            return zero_shot(agreed, images)
        features = self.features()
        # Batch norm's statistics: of all images that the site may learn from, labelled or not.
        own = np.concatenate([features.train.x, features.unlabelled])
        return predict(agreed, parameters, images, own, self.tower)

    # --- what a round asks for ---

    @property
    def _outbox(self) -> SiteRun:
        folder = self.replica.files.folder
        make_folder(folder.outbox, 0o700)
        return folder

    def _integers(self) -> tuple[NDArray[np.int64], LedgerHead]:
        """The integers of this adapter state: those stored, else trained, rounded once and stored before they are used.

        A round that was given up, or whose sum was refused, does not move the adapter: the next one gets the same. With
        them the head of the privacy ledger that paid for them; zeros without a budget.
        """
        if self._private is not None and self._agreed.study.method.sums:
            folder, state = self._outbox, self.replica.state
            integers = self._private.sums(
                self.replica.due, state.digest, state.parameters, folder, self.features, self._encode
            )
            return integers, self._private.head
        if self._private is not None:
            folder, state = self._outbox, self.replica.state
            integers = self._private.integers(
                *(self.replica.due, state.digest, state.iterate, state.parameters),
                *(folder, self.features, self._quantise),
            )
            return integers, self._private.head
        stored = self._stored()
        if stored is not None:
            return stored, NO_LEDGER
        path = self._outbox.integers(self.replica.due.round)
        last = list(self.replica.files.bound.given)[-1:]  # a void may bring that state back
        kept = {old for old in self._outbox.all_integers() if _made_at(old)[0] in last}
        for old in set(path.parent.iterdir()) - kept:
            old.unlink()
        integers = self._train()
        made_at = np.frombuffer(bytes.fromhex(self.replica.asked_for), np.uint8)
        tensors: dict[str, NDArray[Any]] = {"integers": integers, "state": made_at, "marks": self._marks()}
        whole = np.frombuffer(_digest(tensors), np.uint8)
        write_durable(path, bytes(safetensors.numpy.save({**tensors, "digest": whole})), 0o600)
        return integers, NO_LEDGER

    def _stored(self) -> NDArray[np.int64] | None:
        """The integers that were made at this adapter, in this round or, if it moved none, in one before."""
        kept = self._kept()
        return None if kept is None else kept.integers

    def _kept(self) -> _Kept | None:
        made = (_made_at(path) for path in self._outbox.all_integers())
        return next((kept for kept in made if kept.state == self.replica.asked_for), None)

    # --- exact sums are given once ---

    @property
    def _given_sums(self) -> GivenSums:
        return GivenSums(Path(self._file.identity), self.replica.identity.signing.private_bytes_raw())

    def _marks(self) -> NDArray[np.uint8]:
        """What the patients and pictures that train here are known by, uint8 [n, HASH_BYTES]; of none where no
        patient's go into sums without noise."""
        exact = self._agreed.study.method.sums and self._file.data.kind == "patients"
        images = self.train_sources() if exact else []
        with_ids = {image.patient for image in images} if self._file.data.unit == "patient" else set()
        marks = self._given_sums.marks(pixels_of(self._file, images), with_ids) if images else []
        return np.frombuffer(b"".join(marks), np.uint8).reshape(-1, HASH_BYTES)

    def _refuse_given(self) -> None:
        """Give no statistics of those whom another run's sum holds, nor count in a later round how they fare, for which
        a site is asked that was not there in the first. Before anything leaves."""
        kept = None if self._private is not None else self._kept()
        if kept is not None and kept.marks:
            before = [folder.name for folder in self._file.state_folder.begun_runs() if self._gave(SiteRun(folder))]
            self._given_sums.refuse(self.run, kept.marks, before)

    def _note_given(self) -> None:
        """Note whom this round's statistics hold, before the word that lets others open their sum."""
        kept = None if self._private is not None else self._kept()
        if kept is not None and kept.marks and self._agreed.study.sums_patients(self.replica.due.round):
            self._given_sums.give(self.run, kept.marks)

    def _gave(self, run: SiteRun) -> bool:
        """Whether, by its own journal, this site has given patients' statistics to a run of this study."""
        study = self._agreed.study
        bound = read_bound(run.bound)
        if bound is None or (bound.arrived and study.sums_patients(bound.round)):
            return True
        for path in sorted(run.journal.glob(RECORDS)):
            _, header = read_header(path.read_bytes(), self._agreed)
            if header.kind == "aggregate" and study.sums_patients(header.round):
                words = (parse_header(word.signed[0], EnvelopeHeader, EnvelopeError) for word in header.contributors)
                if self.name in [word.site for word in words]:
                    return True
        return False

    @property
    def _counted_among_others(self) -> bool:
        """Whether any cohort that may form has enough sites that count their patients: those with a budget send zeros,
        behind which nothing hides, so that histograms beside theirs alone would be this site's own figures."""
        chain, least = self.replica.state.chain, self._agreed.study.min_sites
        paying = sum(member.role == "train" and name in chain.ledgers for name, member in chain.members.items())
        counted = chain.quorum.needed - paying
        if not paying or counted >= least:
            return True
        log.warning(
            "%s: round %d: %d of %d training sites have a budget and count no patients; a cohort may then count those "
            "of %d sites, of which each could tell another's figures; expected at least min_sites = %d: nothing is "
            "counted here either, the declared settings hold and nothing is claimed of single cases; ask for more "
            "sites without a budget, or let all have one",
            *(self.name, self.replica.due.round, paying, chain.quorum.training, max(counted, 0), least),
        )
        return False

    def first_integers(self) -> NDArray[np.int64]:
        """The integers of a first round that nobody asks for, and that are not kept: for a rehearsal."""
        return self._train()

    def _train(self) -> NDArray[np.int64]:
        study = self._agreed.study
        round_number = self.replica.due.round
        features = self.features()
        if study.method.sums and not study.sums_patients(round_number) and not self._counted_among_others:
            return self._encode(nothing(self._agreed, round_number))
        try:
            if study.task == "anomaly":
                return self._encode(memory.message(self._agreed, round_number, self.parameters, features))
            if study.method.one_sum:
                return self._encode(one_sum.message(self._agreed, round_number, self.replica.state.tensors, features))
            seed = training_seed(study.seed, self.run, self.name, round_number)
            iterate = self.replica.state.iterate
            start = self.personal(iterate, round_number - 1)
            trained = train_round(self._agreed, start, features, seed, self.tower, self.device)
        except DataError as error:
            raise DataError(f"site {self.name}: {error}") from error  # of many that are simulated it is this one
        if PRIVATE_HEAD in trained:
            head = {PRIVATE_HEAD: trained.pop(PRIVATE_HEAD)}
            if self.run:
                folder = self.replica.files.folder
                make_folder(folder.heads, 0o700)
                write_durable(folder.head(round_number), bytes(safetensors.numpy.save(head)))
        update = codec.flatten(trained) - codec.flatten(iterate)
        counts = (0, 0)
        if study.encoding.share_validation and len(features.val.y):
            used = self.personal(self.parameters, round_number - 1)
            predicted = self._predict(features.val.x, used, self._agreed).argmax(axis=1)
            counts = len(features.val.y), int(np.count_nonzero(predicted == features.val.y))
        draws = codec.rounding_draws(study.seed, self.run, self.name, round_number, update.size)
        return self._quantise(update, draws, counts)

    def _quantise(
        self, update: NDArray[np.float64], draws: NDArray[np.float64], counts: tuple[int, int] = (0, 0)
    ) -> NDArray[np.int64]:
        """The integers of an update and, if the study shares them, of validation counts (zeros unless given)."""
        return self._encode({codec.UPDATE: update, codec.COUNTS: np.array(counts, dtype=np.float64)}, draws)

    def _encode(
        self, values: Mapping[str, NDArray[np.float64]], draws: NDArray[np.float64] = NO_DRAWS
    ) -> NDArray[np.int64]:
        """The integers of the round's values, by block; what saturates is told, here and nowhere else."""
        round_number = self.replica.due.round
        integers, rounded = self._agreed.layout(round_number).encode(values, self.replica.member.weight, draws)
        for name, quantised in rounded.items():
            log.debug(
                "round %d, %s: saturated share %.2g, quantisation error %.3g rms",
                round_number,
                name,
                quantised.saturated,
                quantised.error,
            )
            sums, cut = self._agreed.study.method.sums, quantised.saturated
            exact = sums and self._private is None
            if cut <= (0 if exact else SATURATION_WARNING):
                continue
            if exact:
                log.warning(
                    "round %d, %s: %d of %d values exceed their bounds and are cut; expected none, as one variance "
                    "that is cut bends the head: raise method.most_patients in the next study",
                    *(round_number, name, round(cut * quantised.integers.size), quantised.integers.size),
                )
            elif sums:
                log.info(
                    "round %d, %s: %.2f %% of the values lie beyond their bounds by the noise that the budget asks for "
                    "and are cut, which moves no head by anything that shows: nothing is to be done",
                    *(round_number, name, 100 * cut),
                )
            else:
                log.warning(
                    "round %d, %s: %.2f %% of the values exceed their bounds and are cut; expected at most %.1f %%: "
                    "raise encoding.value_bound or lower the learning rate in the next study",
                    *(round_number, name, 100 * cut, 100 * SATURATION_WARNING),
                )
        return integers


class _Kept(NamedTuple):
    """Stored integers: the adapter state at which they were made, and whom they hold where these are given once."""

    state: str
    integers: NDArray[np.int64]
    marks: list[bytes]


def _digest(tensors: Mapping[str, NDArray[Any]]) -> bytes:
    """SHA-256 over names, types, shapes and bytes: a bit that a disk turns over changes an update, or whom it holds."""
    digest = hashlib.sha256()
    for name, values in sorted(tensors.items()):
        digest.update(f"{name} {values.dtype} {values.shape}\n".encode() + values.tobytes())
    return digest.digest()


def _made_at(path: Path) -> _Kept:
    try:
        kept = safetensors.numpy.load(path.read_bytes())
        whole = kept.pop("digest", np.zeros(0, np.uint8)).tobytes()
        if "integers" not in kept or whole != _digest(kept):
            raise safetensors.SafetensorError("other values than were stored")
    except (safetensors.SafetensorError, ValueError) as error:
        log.error("%s: damaged, and of no more use (%s); look after this computer's disk", path, error)
        return _Kept("", np.zeros(0, np.int64), [])
    state = kept["state"].tobytes().hex() if "state" in kept else ""
    return _Kept(state, kept["integers"], [mark.tobytes() for mark in kept.get("marks", ())])

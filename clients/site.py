"""One round at a site: take the journal's new records, apply them, train, and seal the update.

Knows nothing of Flower. Everything that must survive a crash lies in the site's state folder
(:mod:`secure_fed.core.layout`).
"""

from __future__ import annotations

import hashlib
import logging
import secrets
import time
from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy
import torch
from cryptography.hazmat.primitives.asymmetric import ec
from numpy.typing import NDArray

from secure_fed.clients import memory, one_sum
from secure_fed.clients.acceptance import acceptance_digest
from secure_fed.clients.bound import Bound, Fresh, Padded, read_bound
from secure_fed.clients.budget import ledger_folder, unpaid
from secure_fed.clients.data import SiteImage, Split
from secure_fed.clients.erasure import withdrawn
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
from secure_fed.clients.rehearsal import rehearse
from secure_fed.clients.replica import LastSum, Replica
from secure_fed.clients.rules import Rules
from secure_fed.clients.sitefile import SiteFile, read_site_file
from secure_fed.clients.snapshot import read_snapshot, write_snapshot
from secure_fed.clients.training import predict, train_alone, train_round, training_seed, zero_shot
from secure_fed.core.errors import (
    AggregateRefused,
    BudgetError,
    BudgetSpentError,
    EnvelopeError,
    KeyFileError,
    ProtocolError,
    SiteFileError,
)
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
from secure_fed.protocol.envelope import MAGIC as ENVELOPE_MAGIC
from secure_fed.protocol.envelope import (
    MAX_HEADER,
    EnvelopeHeader,
    check_position,
    seal_envelope,
    verify_contribution,
)
from secure_fed.protocol.ledger_heads import NO_LEDGER, LedgerHead
from secure_fed.protocol.packing import Binding, Contribution, Sealed
from secure_fed.protocol.pads import KEY_BYTES, PadPlace, SitePads, new_private, public_of
from secure_fed.protocol.presence import PresenceQuestion, sign_presence
from secure_fed.protocol.records import Record, read_header
from secure_fed.protocol.residues import pack_residues, unpack_residues
from secure_fed.protocol.round_frames import (
    ARRIVED_MAGIC,
    COHORT_MAGIC,
    MAX_WORD,
    REVEAL_MAGIC,
    ArrivedHeader,
    CohortHeader,
    RevealHeader,
    SignedWord,
    check_arrived,
    check_cohort,
    cohort_keys,
    releasing,
    sign_ready,
    sign_retired,
    sign_reveal,
    sign_void,
    split_word,
)
from secure_fed.protocol.rounds import ReplyCode, RoundReply, RoundRequest
from secure_fed.protocol.share_frames import (
    CHECK_MAGIC,
    GONE_MAGIC,
    GoneHeader,
    Handed,
    check_check,
    check_digest,
    check_gone,
    deal,
    open_handed,
    refuse_unchecked,
    sign_checked,
    sign_witness,
    take_handed,
)
from secure_fed.protocol.signing import ZERO_DIGEST, check_payload, parse_header, split_frame, verify_member
from secure_fed.protocol.study import AgreedStudy, load_study

log = logging.getLogger(__name__)

NO_DRAWS = np.zeros(0)
SATURATION_WARNING = 0.001
"""Share of saturated coordinates above which the site warns: the value bound is then too small."""


class Site:
    """One hospital in a study: learns from its images, for and from the adapter of its replica of the journal.

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
        self._froze = False
        self._preprocess: dict[str, Any] | None = None
        trains = self.replica.member.role == "train"
        self._private = (
            private_rounds(
                file, agreed, self.replica.heads, self.replica.identity.keys.signing, lambda: rehearse(file, agreed)
            )
            if trains
            else None
        )

    @classmethod
    def open(cls, path: Path) -> Site:
        """A site from its ``site.toml``."""
        file = read_site_file(path)
        return cls(file, load_study(Path(file.study)))

    @property
    def name(self) -> str:
        """The site's name in the study."""
        return self.replica.name

    @property
    def run(self) -> str:
        """Id of the current run, empty before the first genesis."""
        return self.replica.state.run

    @property
    def position(self) -> int:
        """How many records of the run the site has, as far as the server's journal is the same."""
        return self.replica.position

    @property
    def round(self) -> int:
        """The last round that is applied here (or was refused here); 0 before the first."""
        return self.replica.state.round

    @property
    def rounds(self) -> int:
        """How many the run has: the study's, or more by an extension."""
        return self.replica.state.chain.rounds

    @property
    def finished(self) -> bool:
        """Whether every round of the study is applied here."""
        return self.replica.state.chain.finished

    @property
    def over(self) -> bool:
        """Whether nothing is left to do here: every round is applied, and no further run was accepted."""
        return self.finished and not self.replica.awaits_run

    @property
    def parameters(self) -> Parameters:
        """The global adapter, float64, after the last applied record."""
        return self.replica.state.parameters

    @property
    def adapter_digest(self) -> str:
        """SHA-256 of the adapter it holds; for the site's own eyes."""
        return codec.adapter_digest(self.parameters)

    @property
    def connection_key(self) -> ec.EllipticCurvePrivateKey:
        """The private key that opens its connection."""
        return self.replica.identity.flower

    @property
    def signing_key(self) -> str:
        """The public half of the key that signs its envelopes, 64 hex digits."""
        return self.replica.identity.keys.signing

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
                if data_changed(self._file, self._agreed, self._features):
                    log.warning(
                        "%s: for its own eyes: the data are not what they were when run %s began; the run goes on with "
                        "what they were then",
                        *(self.name, self.run[:16]),
                    )
            else:
                self._features = self._read_data(progress)
            left_out = self._features.unreadable
            if left_out:
                log.warning("%s: left out %d unreadable image%s", self.name, left_out, "s" * (left_out > 1))
        return self._features

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
            images, pictures = by_patient(images, looks, self._file.data.unit)
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
            self._private.settle(pictures, features.digests)
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
    def _can_seal(self) -> bool:
        """Whether it holds the key in force; who does not reads no data and spends no budget."""
        return self._agreed.study.mode == "plain" or self.replica.keys.holds(self.replica.state.chain.key)

    @property
    def budgeted(self) -> bool:
        """Whether it trains under a privacy budget."""
        return self._private is not None

    @property
    def unpaid(self) -> bool:
        """Whether figures of its images are for its own eyes: they are patients', and a budget has not paid."""
        return unpaid(self._file)

    @property
    def read_data(self) -> bool:
        """Whether the last reply took work on the site's data, under a budget: then it leaves at a fixed time."""
        return self._private is not None and (self._private.drew or self._froze)

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

    def respond(self, request: RoundRequest) -> RoundReply:
        """Take a request: apply its records, compare adapters, and train if a round is due.

        Raises:
            RecordError: a record is refused; the adapter is as it was.
            AdapterMismatchError: another site holds another adapter.
            NonFiniteUpdateError: training diverged; nothing is sent.
            SecfacmicError: others, for the site's own data and disk.
        """
        torch.set_num_threads(self._file.threads)
        if self.run and self.replica.goes_back(request.after):
            return self._reply(ReplyCode.MORE)
        for data in request.records:
            self.replica.take(data)
        if self.run and self._agreed.study.pads:
            self.replica.files.erase_pads(self.replica.due)  # whatever stops this site next
        if self._private is not None:
            self._private.drew = False
        frozen = self._snapshot
        self._froze = frozen is not None and not frozen.exists() and self._can_seal
        if frozen is not None and self._froze:
            # Before the run's first message.
            write_snapshot(frozen, self.features(), snapshot_key(ledger_folder(self._file)))
        self.replica.compare(request.attested_head, request.attestations)
        if self._voided:
            return self._reply(ReplyCode.VOID, self._void())
        if request.more:
            return self._reply(ReplyCode.MORE)
        chain = self.replica.state.chain
        if chain.length and self.name not in chain.members:
            raise SiteFileError(f"site {self.name} left the study with amendment {chain.amendment}; it is over here")
        if chain.awaits_checkpoint and not self.replica.state.blind:
            return self._reply(ReplyCode.ACKNOWLEDGED, self.replica.acknowledgement())
        if chain.awaits_checkpoint:
            return self._reply(ReplyCode.APPLIED)
        if self.replica.state.blind:
            raise KeyFileError(
                f"the adapter of round {chain.round} cannot be opened: its key is not here and no checkpoint "
                "follows; take the key of this run, or wait for the next rotation"
            )
        if not chain.length or request.round != chain.due.round:
            raise ProtocolError(f"asked for round {request.round}; the journal here ends after round {chain.round}")
        if chain.finished and self._private is not None:
            self._private.finish()
        if chain.finished or not self._trains(self.name):
            return self._reply(ReplyCode.APPLIED)
        bound = self.replica.files.bound.at(self.replica.due)
        # Members of an open round stay to its end, also those whose READY is in a COHORT already.
        if bound.retired and not bound.attempt and request.question[:4] != COHORT_MAGIC:
            return self._retired()
        if self.replica.paused:
            return self._reply(ReplyCode.REFUSED_AGGREGATE)
        self._notice_past(request.past)
        if self._sits_out:
            return self._reply(ReplyCode.SITS_OUT)
        if not request.attempt:
            return self._reply(ReplyCode.APPLIED)
        kind = request.question[:4]
        if kind == ARRIVED_MAGIC:
            return self._reply(ReplyCode.REVEALED, self._reveal(request.question, request.carried))
        if kind == CHECK_MAGIC:
            return self._reply(ReplyCode.CHECKED, self._answer_for_shares(request.question, request.carried))
        if kind == GONE_MAGIC:
            return self._reply(ReplyCode.WITNESSED, *self._stand_for(request.question, request.carried))
        if self._private is None and withdrawn(self.replica.files.folder, request.round, request.attempt):
            log.warning("%s: round %d: its update was dropped, so it sends none", self.name, request.round)
            return self._reply(ReplyCode.APPLIED)
        if self._gave_others:
            log.warning(
                "%s: round %d: the update that it revealed at this adapter was dropped or lost, so it sends none until "
                "the adapter has moved; if its people mean it to send another: secfacmic site release",
                *(self.name, request.round),
            )
            return self._reply(ReplyCode.APPLIED)
        try:
            if kind == COHORT_MAGIC:
                return self._reply(ReplyCode.UPDATE, *self._envelope(request.question, request.held))
            return self._reply(ReplyCode.READY, self._ready(request.attempt))
        except BudgetSpentError as error:
            log.warning("%s: %s", self.name, error)
            self.retire()
            return self._reply(ReplyCode.APPLIED) if bound.attempt else self._retired()
        except BudgetError as error:
            log.warning("%s: %s", self.name, error)
            return self._reply(ReplyCode.APPLIED)

    def _retired(self) -> RoundReply:
        key = self.replica.identity.signing
        return self._reply(ReplyCode.RETIRED, sign_retired(self._agreed, self.run, self.name, key))

    def present(self, question: PresenceQuestion, rate: float, rehearsed: tuple[str, int] = ("", 0)) -> RoundReply:
        """Its word, before the first round, that it is there and ready; or that it rehearses.

        Args:
            question: the server's.
            rate: bytes a second that its line takes.
            rehearsed: SHA-256 and length of what it has sent in a rehearsal, to fetch it again.

        Raises:
            SecfacmicError: what its data, ledger, backbone or acceptance lack; nothing of it is said.
        """
        if not rehearsed[0]:
            self.replica.require_word(question.run)
            self.features()
        word = sign_presence(
            self._agreed,
            self.name,
            self.replica.identity.signing,
            run=question.run,
            purpose="rehearsal" if rehearsed[0] else "ready",
            accepted=(ZERO_DIGEST if rehearsed[0] else acceptance_digest(self._file, self._agreed, self.signing_key)),
            keyed=self._agreed.study.mode == "plain" or self.replica.keys.holds(question.key),
            secfacmic=version("secfacmic"),
            clock_ms=time.time_ns() // 1_000_000,
            rate=int(rate),
            rehearsed=rehearsed[0],
            rehearsed_bytes=rehearsed[1],
        )
        position = self.position if self.run == question.run else 0
        return RoundReply(self.name, ReplyCode.PRESENT, question.run, position, "", word)

    def _reply(self, code: ReplyCode, envelope: bytes = b"", carried: bytes = b"") -> RoundReply:
        return RoundReply(self.name, code, self.run, self.position, self.replica.attestation(), envelope, carried)

    # --- a disk that is older than this site's words ---

    def _notice_past(self, past: bytes) -> None:
        """Hold the newest word that the server has of this site in the open round against what its disk knows."""
        if not past:
            return
        due, members = self.replica.due, self.replica.state.chain.members
        bound = self.replica.files.bound.at(due)
        header: RevealHeader | EnvelopeHeader
        if past[:4] == REVEAL_MAGIC:
            word = split_word(REVEAL_MAGIC, past)
            study = self._agreed.study.id
            header = verify_member(REVEAL_MAGIC, *word.signed, RevealHeader, study, members, MAX_WORD, EnvelopeError)
            known = header.arrived == bound.arrived
        else:
            frame = split_frame(ENVELOPE_MAGIC, past, MAX_HEADER, EnvelopeError)
            header = verify_contribution(frame.header, frame.signature, self._agreed, members)
            known = header.run != due.run or bound.knows(header)
        if header.site != self.name:
            raise ProtocolError(f"as this site's own last word, one of {header.site}; expected one of {self.name}")
        if not known:
            self.replica.files.fall_behind()

    @property
    def _sits_out(self) -> bool:
        """Whether this site is behind its own past, and the open round the one in which it may have said anything.

        Nobody knows to whom it revealed at this adapter, so that without a budget it gives nothing there without its
        people's word; with the next adapter it goes on.
        """
        files = self.replica.files
        bound = files.bound.at(self.replica.due)
        if bound.behind:
            bound = bound.giving(self._asked_for, (), self.replica.state.chain.sum)
            bound = bound.model_copy(update={"behind": False, "out": True, "released": ""})
            files.bind(bound)
            log.warning(
                "%s: this state folder is older than what this site has said since: a copy was put back. It sits round "
                "%d out and goes on with the next; if a sum of that round is lost, people give it up: secfacmic site "
                "void",
                *(self.name, bound.round),
            )
        return bound.out

    # --- the round: READY, then an envelope for one COHORT after the other, then one REVEAL ---

    def _ready(self, attempt: int) -> bytes:
        """Train, unless the round's integers are there, and say so."""
        due = self.replica.due
        bound = self.replica.files.bound.at(due)
        self._refuse_past("asked for", attempt, bound, bound.attempt)
        self.replica.sealer  # noqa: B018 -- who cannot seal reads no data and spends no budget
        self._integers(self._outbox.integers(due.round))
        self._refuse_given()
        released = self._private is not None or bound.released == self._asked_for
        fresh = public_of(self._fresh_key(attempt)) if self._agreed.study.pads else None
        return sign_ready(self._agreed, due, attempt, self.name, released, self.replica.identity.signing, fresh)

    def _refuse_past(self, what: str, attempt: int, bound: Bound, least: int) -> None:
        """Begin no attempt after a REVEAL, and none before the newest."""
        if bound.arrived or attempt < least:
            raise ProtocolError(
                f"{what} attempt {attempt} of round {bound.round}, but "
                + ("a REVEAL was sent" if bound.arrived else f"attempt {bound.attempt} was answered")
                + " already; expected a later one, and none after a REVEAL"
            )

    def _fresh_key(self, attempt: int) -> bytes:
        """The private key for an attempt; on disk before its public half leaves."""
        bound = self.replica.files.bound.at(self.replica.due)
        if bound.padded is not None and bound.attempt == attempt:
            return bytes.fromhex(bound.padded.private)
        if bound.fresh is None or bound.fresh.attempt != attempt:
            bound = bound.model_copy(update={"fresh": Fresh(attempt=attempt, private=new_private().hex())})
            self.replica.files.bind(bound)
        assert bound.fresh is not None
        return bytes.fromhex(bound.fresh.private)

    def _envelope(self, question: bytes, held: str) -> tuple[bytes, bytes]:
        """The envelope for a COHORT, without its payload if the server has that already, and the shares with it.

        The ciphertext is made once a round, head and key: another attempt signs another header over the same bytes.
        With pads it is made anew for each attempt, since its pads are others.
        """
        due, files = self.replica.due, self.replica.files
        chain = self.replica.state.chain
        header, names, cohort = check_cohort(question, self._agreed, chain.members, due, chain.quorum)
        if self.name not in names:
            raise ProtocolError(f"COHORT of {', '.join(names)}; expected this site in it")
        bound = files.bound.at(due)
        again = (header.attempt, cohort) == (bound.attempt, bound.cohort)
        if not again:
            self._refuse_past("COHORT of", header.attempt, bound, bound.attempt + 1)
        self._refuse_another_cohort(bound, names, releasing(header))
        words = {"attempt": header.attempt, "cohort": cohort, "names": names}
        if self._agreed.study.pads:
            if again:
                return self._sent_before(bound)
            data, padded = self._padded(bound, header, cohort)
            write_durable(files.folder.question("cohort"), question, 0o600)
            files.bind(bound.model_copy(update=words | {"padded": padded, "fresh": None}))
            return data, bytes.fromhex(padded.shares)
        data = self._sealed(header.attempt, cohort)
        if not again:
            write_durable(files.folder.question("cohort"), question, 0o600)
            files.bind(bound.model_copy(update=words))
        frame = split_frame(ENVELOPE_MAGIC, data, MAX_HEADER, EnvelopeError)
        known = parse_header(frame.header, EnvelopeHeader, EnvelopeError).payload
        return data[: len(data) - len(frame.payload)] if held == known else data, b""

    def _padded(self, bound: Bound, header: CohortHeader, cohort: str) -> tuple[bytes, Padded]:
        """An envelope under pads, on disk; taken apart again and compared with the stored integers before it leaves."""
        due, lanes = self.replica.due, self._agreed.layout(self.replica.due.round).lanes
        if bound.fresh is None or bound.fresh.attempt != header.attempt:
            raise ProtocolError(f"COHORT of attempt {header.attempt}, for which this site has no fresh key any more")
        private, keys = bytes.fromhex(bound.fresh.private), cohort_keys(header)
        place = PadPlace(self._agreed.study.id, due, header.attempt, cohort)
        mine, seed = SitePads(place, keys, self.name, private), secrets.token_bytes(KEY_BYTES)
        dealt = deal(mine, seed, self.replica.state.chain.quorum.needed)
        integers, ledger = self._integers(self._outbox.integers(due.round))
        binding = Binding(run=due.run, head=due.head, round=due.round)
        contribution, payload = self.replica.sealer.seal(integers, binding, self.name)
        residues = mine.masked(unpack_residues(payload, lanes.modulus_bits), seed, lanes.modulus)
        sealed = Sealed(contribution, pack_residues(residues, lanes.modulus_bits))
        data = seal_envelope(
            self._agreed, due, sealed, ledger, self.replica.identity.signing,
            attempt=header.attempt, cohort=cohort, hidden=dealt.hidden,
        )  # fmt: skip
        final = unpack_residues(data[len(data) - len(sealed.payload) :], lanes.modulus_bits)
        bare = pack_residues(mine.unmasked(final, seed, lanes.modulus), lanes.modulus_bits)
        self._refuse_damage(bare, contribution, binding, integers)
        write_durable(self._outbox.envelope(due.round), data, 0o600)
        return data, Padded(
            private=private.hex(),
            keys=tuple(keys.values()),
            seed=seed.hex(),
            shares=dealt.entries.hex(),
            envelope=hashlib.sha256(data).hexdigest(),
        )

    def _sent_before(self, bound: Bound) -> tuple[bytes, bytes]:
        """The envelope and shares of the attempt that this site is bound to, byte for byte: none other has its pads."""
        path = self._outbox.envelope(bound.round)
        data = path.read_bytes() if path.is_file() else b""
        if bound.padded is None or hashlib.sha256(data).hexdigest() != bound.padded.envelope:
            raise ProtocolError(
                f"round {bound.round}: the envelope of attempt {bound.attempt} is not here whole any more, and is "
                "never made twice; this attempt goes on without it, the next one has other pads"
            )
        return data, bytes.fromhex(bound.padded.shares)

    def _refuse_another_cohort(self, bound: Bound, names: tuple[str, ...], releasing: frozenset[str]) -> None:
        """At one adapter state a site without a budget gives its integers to one cohort: of two sums, who is in one
        and not in the other could be computed. For another it needs the word of the people of all that are in either:
        this cohort's, in its READYs; who is only in the one before has retired, or was removed by a quorum."""
        before = self.revealed_to
        if before is None or before == names:
            return
        unheard = sorted(set(names) - releasing)
        if self._agreed.study.mode == "he":  # in plain the server sees each update, and nobody can be removed
            unheard += sorted(name for name in before if name not in names and self._trains(name))
        if unheard or bound.released != self._asked_for:
            raise ProtocolError(
                f"a cohort of {', '.join(names)} at an adapter for which this site has revealed to "
                f"{', '.join(before) or 'sites that its disk does not know'}; expected the same one: the difference of "
                "the two sums is somebody's update. If the people of all mean it, each says so at its own site: "
                f"secfacmic site release; still to be heard: {', '.join(unheard) or self.name}; who is in neither any "
                "more must have left the study"
            )

    def _trains(self, name: str) -> bool:
        member = self.replica.state.chain.members.get(name)
        return member is not None and member.role == "train"

    @property
    def _voided(self) -> bool:
        """Whether its people have given the round that is open up."""
        return bool(self.run) and self._trains(self.name) and self.replica.files.bound.at(self.replica.due).void

    def _void(self) -> bytes:
        due = self.replica.due
        revealed = self.replica.files.bound.at(due).may_have_revealed
        return sign_void(self._agreed, due, self.name, revealed, self.replica.identity.signing)

    def void(self, round_number: int) -> bool:
        """Its people's word that it says nothing more for the open round; sent when the server asks next.

        Or for the round of its last record: it takes that back.

        Returns:
            Whether it had revealed: then somebody may hold the round's sum.

        Raises:
            ProtocolError: another round is open here, or none; or it has revealed in a later one.
        """
        last = self.replica.last_sum() if self.run else None
        # Who stands by an amendment has acknowledged, or will, what it has of the round.
        if last is not None and last.record.header.round == round_number and "amendment" not in last.after:
            return self._give_back(last)
        chain = self.replica.state.chain
        due = self.replica.due
        open_here = bool(self.run) and not chain.finished and not chain.awaits_checkpoint
        if not open_here or due.round != round_number or not self._trains(self.name):
            raise ProtocolError(
                f"a void of round {round_number}; the round that is open here is {due.round if open_here else 'none'}, "
                f"of {self.rounds}, and only training sites give one up"
            )
        bound = self.replica.files.bound.at(due)
        self.replica.files.bind(bound.model_copy(update={"void": True}))
        return bound.may_have_revealed

    def _give_back(self, last: LastSum) -> bool:
        """The same for a round whose record it has applied, and on which it has revealed nothing yet."""
        record = last.record
        if last.before.members[self.name].role != "train":
            raise ProtocolError(f"a void of round {record.header.round}; only training sites give one up")
        self._refuse_taking_back(record)
        self.replica.take_back(record)
        bound = self.replica.files.bound.at(last.before.due)
        contributed = self.name in [entry.site for entry in record.contributors]
        if contributed or self._asked_for in bound.given:
            bound = bound.model_copy(update={"arrived": record.arrived})
        self.replica.files.bind(bound.model_copy(update={"void": True}))
        return bound.may_have_revealed

    def _refuse_taking_back(self, record: Record) -> None:
        """Stand by a sum upon which it has revealed: the sum of the later round may be complete, and others have it.

        Also where what it revealed in was given up since.
        """
        now = self.replica.files.bound.at(self.replica.due)
        if now.may_have_revealed or now.upon == record.id:
            raise ProtocolError(
                f"a void of round {record.header.round}, but this site has revealed in round {now.round}, which builds "
                "on its record; expected none: the record stands"
            )

    @property
    def exact(self) -> bool:
        """Whether what it sends are statistics without noise, whose sums differ by a site's own to the last digit."""
        return self._agreed.study.method.sums and self._private is None

    @property
    def abandoned_words(self) -> tuple[str, ...]:
        """What this study is without the statistics of the round that is open, for people; nothing for updates."""
        study = self._agreed.study
        if not study.method.one_sum:
            return ()
        if self.replica.due.round == 1:
            stays = "the study has no head, predicts as without any training, and claims nothing"
        else:
            stays = f"the declared shrinkage, {study.method.shrinkage:g}, holds, and nothing is claimed of single cases"
        return (
            f"Until it is closed anew its statistics are abandoned: {stays}. With a site that is lost for ever the "
            f"others let it close without that site ({self._leave_word}secfacmic site release at each), or end the "
            "study as it is (secfacmic study close --abandon).",
        )

    @property
    def _leave_word(self) -> str:
        """What comes before a release without a site that was in the cohort: in plain mode nothing, see below."""
        return (
            "" if self._agreed.study.mode == "plain" else "secfacmic keys rotate --remove SITE at the key maker, then "
        )

    @property
    def revealed_to(self) -> tuple[str, ...] | None:
        """The cohort to which it has revealed at the adapter it holds, empty if nobody here knows which; None if it has
        not, or has a budget."""
        if self._private is not None or not self.run:
            return None
        return self.replica.files.bound.given.get(self._asked_for)

    def release(self) -> None:
        """Its people's word: at this adapter it may reveal once more, to another cohort."""
        files = self.replica.files
        files.bind(files.bound.model_copy(update={"released": self._asked_for}))

    def retire(self) -> None:
        """The word that it trains no more in this run, once the open round is closed: its people's, or its own where
        all that its budget was planned for is spent. Told to the server when it asks next.

        Raises:
            ProtocolError: it does not train in a run.
        """
        if not self.run or self.finished or not self._trains(self.name):
            raise ProtocolError(f"{self.name} does not train in a run that is open; expected one that does, to retire")
        files = self.replica.files
        files.bind(files.bound.model_copy(update={"retired": True}))

    def _sealed(self, attempt: int, cohort: str) -> bytes:
        """The envelope of an attempt, on disk; opened and compared with the stored integers before anybody gets it."""
        due = self.replica.due
        path = self._outbox.envelope(due.round)
        integers, ledger = self._integers(self._outbox.integers(due.round))
        binding = Binding(run=due.run, head=due.head, round=due.round)
        sealed = self._sealed_before(path)
        if sealed is None:
            sealed = self.replica.sealer.seal(integers, binding, self.name)
        data = seal_envelope(
            self._agreed, due, sealed, ledger, self.replica.identity.signing, attempt=attempt, cohort=cohort
        )
        self._refuse_damage(data[len(data) - len(sealed.payload) :], sealed.contribution, binding, integers)
        write_durable(path, data, 0o600)
        return data

    def _refuse_damage(
        self, payload: bytes, contribution: Contribution, binding: Binding, integers: NDArray[np.int64]
    ) -> None:
        """Open what would be sent, as others will: a faulty site finds itself."""
        try:
            opened = self.replica.sealer.open(payload, binding, [contribution])
        except AggregateRefused:
            opened = None
        if opened is None or not np.array_equal(opened, integers):
            self._outbox.envelope(binding.round).unlink(missing_ok=True)
            raise EnvelopeError(
                f"round {binding.round}: the envelope does not open to the integers that were stored; nothing was "
                "sent: this computer's memory or disk is damaged; start the site again, elsewhere if it comes back"
            )

    def _sealed_before(self, path: Path) -> Sealed | None:
        """What was sealed for this very position, if it is whole; a damaged one was not sent, or is made anew."""
        try:
            frame = split_frame(ENVELOPE_MAGIC, path.read_bytes(), MAX_HEADER, EnvelopeError)
            header = parse_header(frame.header, EnvelopeHeader, EnvelopeError)
            check_payload(frame, header, EnvelopeError)
            check_position(header, self.replica.due)
        except (FileNotFoundError, EnvelopeError):
            return None
        return Sealed(header.contribution, bytes(frame.payload))

    def _bound_to(
        self, what: str, attempt: int, cohort: str, envelopes: tuple[EnvelopeHeader, ...], words: tuple[SignedWord, ...]
    ) -> Bound:
        """What this site is bound to, which is the attempt that a question names, with all of its cohort and its own
        envelope as it sent it."""
        bound = self.replica.files.bound.at(self.replica.due)
        if (attempt, cohort) != (bound.attempt, bound.cohort):
            raise ProtocolError(
                f"{what} of attempt {attempt}; the newest here is attempt {bound.attempt}, of another COHORT"
            )
        if tuple(entry.site for entry in envelopes) != bound.names:
            raise ProtocolError(
                f"{what}: envelopes of {', '.join(entry.site for entry in envelopes)}; expected all of the cohort, "
                f"{', '.join(bound.names)}"
            )
        path = self._outbox.envelope(bound.round)
        if not path.exists():
            raise ProtocolError(f"{what} of attempt {attempt}, whose envelope is not here any more")
        frame = split_frame(ENVELOPE_MAGIC, path.read_bytes(), MAX_HEADER, EnvelopeError)
        if words[bound.names.index(self.name)] != SignedWord.of(frame.header, frame.signature):
            raise ProtocolError(f"{what}: names another envelope of this site than it sent")
        return bound

    def _pads(self, bound: Bound) -> SitePads:
        """This site's keys in the attempt that it is bound to."""
        assert bound.padded is not None  # of a study with pads
        place = PadPlace(self._agreed.study.id, self.replica.due, bound.attempt, bound.cohort)
        keys = dict(zip(bound.names, bound.padded.keys, strict=True))
        return SitePads(place, keys, self.name, bytes.fromhex(bound.padded.private))

    def _answer_for_shares(self, question: bytes, carried: bytes) -> bytes:
        """CHECKED: whether each share that was dealt to this site opens to what its maker's header says."""
        members = self.replica.state.chain.members
        header, envelopes, digest = check_check(question, self._agreed, members, self.replica.due)
        bound = self._bound_to("CHECK", header.attempt, header.cohort, envelopes, header.envelopes)
        handed = self._handed(bound, envelopes, [name for name in bound.names if name != self.name], carried)[0]
        mine, complaints = self._pads(bound), []
        for maker, entry in handed.items():
            try:
                open_handed(mine, maker, entry)
            except EnvelopeError as error:
                log.warning("%s: round %d: %s; tell its people", self.name, bound.round, error)
                complaints.append(maker)
        self._note_given()  # from here on others' shares open what this site sent, also if it reveals nothing
        return sign_checked(self._agreed, digest, self.name, complaints, self.replica.identity.signing)

    def _handed(
        self, bound: Bound, envelopes: tuple[EnvelopeHeader, ...], makers: list[str], carried: bytes
    ) -> tuple[dict[str, Handed], bytes]:
        roots = {entry.site: entry.hidden.shares for entry in envelopes if entry.hidden is not None}
        return take_handed(carried, bound.names, makers, self.name, roots)

    def _stand_for(self, question: bytes, carried: bytes) -> tuple[bytes, bytes]:
        """WITNESS for a site that is gone after this one has revealed, and the share of its mask that was dealt here.

        It binds as the REVEAL does, which was given before: what the two open is that one sum.
        """
        due, files = self.replica.due, self.replica.files
        bound = files.bound.at(due)
        asked = check_gone(question, self._agreed, due)
        self._refuse_share(bound, asked)
        assert bound.padded is not None  # of a study with pads
        path = files.folder.question("arrived")
        kept = path.read_bytes() if path.is_file() else b""
        _, envelopes, digest = check_arrived(kept, self._agreed, self.replica.state.chain.members, due)
        if digest != bound.arrived:
            raise ProtocolError("the ARRIVED that this site keeps is not the one it has revealed for")
        handed, payload = self._handed(bound, envelopes, [asked.gone], carried)
        theirs = envelopes[bound.names.index(asked.gone)]
        if (len(payload), hashlib.sha256(payload).hexdigest()) != (theirs.size, theirs.payload):
            raise ProtocolError(f"asked to witness an envelope of {asked.gone} that is not the one it signed")
        share = open_handed(self._pads(bound), asked.gone, handed[asked.gone])
        check = self.replica.state.chain.wire.check_words(digest, payload)
        if asked.gone not in bound.padded.shared:
            shared = (*bound.padded.shared, asked.gone)
            files.bind(bound.model_copy(update={"padded": bound.padded.model_copy(update={"shared": shared})}))
        word = sign_witness(self._agreed, digest, self.name, asked.gone, check, self.replica.identity.signing)
        return word, share

    def _refuse_share(self, bound: Bound, asked: GoneHeader) -> None:
        """Give a share away only after the REVEAL, for what was revealed: what it opens is that one sum then."""
        if not bound.arrived or asked.arrived != bound.arrived:
            raise ProtocolError(
                f"asked for a share of {asked.gone} in attempt {asked.attempt}; this site has "
                + ("revealed for another ARRIVED" if bound.arrived else "not revealed, and gives none before it has")
            )
        if asked.gone not in bound.names or asked.gone == self.name:
            raise ProtocolError(f"asked for a share of {asked.gone}; expected another site of the cohort")

    def _reveal(self, question: bytes, carried: bytes) -> bytes:
        """The REVEAL for an ARRIVED: the point from which the round waits for its members, or for who stands for them.

        At most one a round, whatever the server asks; the answer to the same question is the same.
        """
        due, files = self.replica.due, self.replica.files
        arrived, envelopes, digest = check_arrived(question, self._agreed, self.replica.state.chain.members, due)
        bound = self._bound_to("ARRIVED", arrived.attempt, arrived.cohort, envelopes, arrived.envelopes)
        self._refuse_second_sum(bound, digest)
        if self._agreed.study.pads and not bound.arrived:
            self._refuse_unchecked(bound, arrived, carried)
        path = self._outbox.envelope(due.round)
        payload = bytes(split_frame(ENVELOPE_MAGIC, path.read_bytes(), MAX_HEADER, EnvelopeError).payload)
        check = self.replica.state.chain.wire.check_words(digest, payload)
        write_durable(files.folder.question("arrived"), question, 0o600)
        self._note_given()
        if not bound.arrived:
            given = bound.giving(self._asked_for, bound.names, self.replica.state.chain.sum)
            files.bind(given.model_copy(update={"arrived": digest}))
        mask = None if bound.padded is None else bound.padded.seed
        return sign_reveal(self._agreed, digest, self.name, check, self.replica.identity.signing, mask)

    def _refuse_second_sum(self, bound: Bound, arrived: str) -> None:
        """Reveal for one ARRIVED a round."""
        if bound.arrived not in ("", arrived):
            raise ProtocolError(f"a second ARRIVED of round {bound.round}; this site has revealed for another")

    def _refuse_unchecked(self, bound: Bound, arrived: ArrivedHeader, carried: bytes) -> None:
        """Reveal only when everybody has a good share of everybody, if there are shares; kept for a server that lost
        them."""
        chain, due = self.replica.state.chain, self.replica.due
        if len(bound.names) > chain.quorum.needed:
            digest = check_digest(self._agreed, due, arrived.attempt, arrived.cohort, arrived.envelopes)
            refuse_unchecked(carried, self._agreed, chain.members, digest, bound.names)
            write_durable(self.replica.files.folder.question("checked"), carried, 0o600)

    @property
    def _asked_for(self) -> str:
        """Digest of what a site without a budget gives once, in whatever round it is asked: the adapter state and,
        where sites send statistics, which of them: another one is no second sum of the first."""
        state = self.replica.state.digest
        if not self._agreed.study.method.sums:
            return state
        blocks = ",".join(block.name for block in self._agreed.layout(self.replica.due.round).blocks)
        return hashlib.sha256(f"{state}:{blocks}".encode()).hexdigest()

    @property
    def _outbox(self) -> SiteRun:
        folder = self.replica.files.folder
        make_folder(folder.outbox, 0o700)
        return folder

    def _integers(self, path: Path) -> tuple[NDArray[np.int64], LedgerHead]:
        """The integers of this adapter state: those stored, else trained, rounded once and stored before they are used.

        A round that was given up, or whose sum was refused, does not move the adapter: the next one gets the same. With
        them the head of the privacy ledger that paid for them; zeros without a budget.
        """
        if self._private is not None and self._agreed.study.method.sums:
            folder, state = self.replica.files.folder, self.replica.state
            integers = self._private.sums(
                self.replica.due, state.digest, state.parameters, folder, self.features, self._encode
            )
            return integers, self._private.head
        if self._private is not None:
            folder, state = self.replica.files.folder, self.replica.state
            integers = self._private.integers(
                *(self.replica.due, state.digest, state.iterate, state.parameters),
                *(folder, self.features, self._quantise),
            )
            return integers, self._private.head
        stored = self._stored()
        if stored is not None:
            return stored, NO_LEDGER
        last = list(self.replica.files.bound.given)[-1:]  # a void may bring that state back
        kept = {old for old in self._outbox.all_integers() if _made_at(old)[0] in last}
        for old in set(path.parent.iterdir()) - kept:
            old.unlink()
        integers = self._train()
        made_at = np.frombuffer(bytes.fromhex(self._asked_for), np.uint8)
        tensors: dict[str, NDArray[Any]] = {"integers": integers, "state": made_at, "marks": self._marks()}
        write_durable(path, bytes(safetensors.numpy.save(tensors)), 0o600)
        return integers, NO_LEDGER

    def _stored(self) -> NDArray[np.int64] | None:
        """The integers that were made at this adapter, in this round or, if it moved none, in one before."""
        kept = self._kept()
        return None if kept is None else kept.integers

    def _kept(self) -> _Kept | None:
        made = (_made_at(path) for path in self._outbox.all_integers())
        return next((kept for kept in made if kept.state == self._asked_for), None)

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
    def _gave_others(self) -> bool:
        """Whether it has revealed integers at this adapter that are not here any more: others would, by difference,
        show what is new in them (a patient that was to be forgotten, say)."""
        released = self.run and self.replica.files.bound.released == self._asked_for
        return self.revealed_to is not None and not released and self._stored() is None

    def first_integers(self) -> NDArray[np.int64]:
        """The integers of a first round that nobody asks for, and that are not kept: for a rehearsal."""
        return self._train()

    def _train(self) -> NDArray[np.int64]:
        study = self._agreed.study
        round_number = self.replica.due.round
        features = self.features()
        if study.task == "anomaly":
            return self._encode(memory.message(self._agreed, round_number, self.parameters, features))
        if study.method.one_sum:
            return self._encode(one_sum.message(self._agreed, round_number, self.replica.state.tensors, features))
        seed = training_seed(study.seed, self.run, self.name, round_number)
        iterate = self.replica.state.iterate
        start = self.personal(iterate, round_number - 1)
        trained = train_round(self._agreed, start, features, seed, self.tower, self.device)
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
            if quantised.saturated <= SATURATION_WARNING:
                continue
            cut, sums = 100 * quantised.saturated, self._agreed.study.method.sums
            if sums and self._private is not None:
                log.info(
                    "round %d, %s: %.2f %% of the values lie beyond their bounds by the noise that the budget asks for "
                    "and are cut, which moves no head by anything that shows: nothing is to be done",
                    *(round_number, name, cut),
                )
                continue
            log.warning(
                "round %d, %s: %.2f %% of the values exceed their bounds and are cut; expected at most %.1f %%: %s in "
                "the next study",
                *(round_number, name, cut, 100 * SATURATION_WARNING),
                "raise method.most_patients" if sums else "raise encoding.value_bound or lower the learning rate",
            )
        return integers


class _Kept(NamedTuple):
    """Stored integers: the adapter state at which they were made, and whom they hold where these are given once."""

    state: str
    integers: NDArray[np.int64]
    marks: list[bytes]


def _made_at(path: Path) -> _Kept:
    kept = safetensors.numpy.load(path.read_bytes())
    state = kept["state"].tobytes().hex() if "state" in kept else ""
    return _Kept(state, kept["integers"], [mark.tobytes() for mark in kept.get("marks", ())])

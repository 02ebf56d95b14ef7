"""A site's own copy of the journal, and the adapter that follows from it and from nothing else.

Every record is checked as if server and network lied: one candidate a round is decrypted, what was refused is never
applied, and no site goes back to an older key.

Three parts, from pure to durable: :class:`ReplicaState` and :func:`fold` say what a record makes of an adapter;
:class:`RunFiles` keeps on disk what a crash must not undo; :class:`Replica` checks, opens and does things in order.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from secure_fed.clients.acceptance import rounds_accepted, runs_accepted
from secure_fed.clients.bound import Bound, read_bound, write_bound
from secure_fed.clients.keyring import membership
from secure_fed.clients.outbox import erase_updates
from secure_fed.clients.sitefile import SiteFile
from secure_fed.core.errors import (
    AdapterMismatchError,
    AggregateRefused,
    KeyFileError,
    NotAcceptedError,
    RecordError,
    SiteFileError,
)
from secure_fed.core.layout import RECORDS, RunState, SiteRun
from secure_fed.core.storage import make_folder, write_durable
from secure_fed.privacy.ckks import Cipher
from secure_fed.privacy.keys import attestation_key, open_checkpoint, seal_checkpoint
from secure_fed.protocol import aggregation, codec
from secure_fed.protocol.codec import Parameters
from secure_fed.protocol.envelope import RoundPosition
from secure_fed.protocol.ledger_heads import LedgerHeads
from secure_fed.protocol.packing import Binding, PlainSealer, Sealer
from secure_fed.protocol.records import Chain, Kind, Record, RecordFolder, RecordHeader, read_header, replaceable
from secure_fed.protocol.round_frames import VoidHeader
from secure_fed.protocol.sealed_key import ACKNOWLEDGEMENT_MAGIC, AcknowledgementHeader, SealedKeyHeader, exact_warning
from secure_fed.protocol.signing import Frame, check_payload, parse_header, payload_fields, sign_frame
from secure_fed.protocol.study import AgreedStudy
from secure_fed.transport.certificates import read_authority

log = logging.getLogger(__name__)

MAX_EVIDENCE = 8
"""Second records of a run that are kept; a server that signs more fills no disk."""


# --- what a record makes of an adapter ---


@dataclass(frozen=True)
class Validation:
    """Validation counts of a round's cohort, summed under encryption: of the adapter it trained on."""

    images: int
    correct: int

    def clamped(self, most: int) -> Validation:
        """The nearest that can be: ``0 <= correct <= images <= most``."""
        images = min(max(0, self.images), most)
        return Validation(images, min(max(0, self.correct), images))


@dataclass(frozen=True)
class ReplicaState:
    """Where a site stands in a run: what follows from the records alone. Never changed, only followed by another.

    Attributes:
        chain: how far the journal has come.
        tensors: the adapter's parameters and the aggregation rule's moments, float64, by name.
        validation: counts that came with the last opened aggregate; None before the first or if not shared.
        blind: whether an aggregate could not be opened, so that ``tensors`` are not the study's, until a checkpoint.
        digests: digest of the tensors and key in force, by journal head, after the last two records.
    """

    chain: Chain
    tensors: aggregation.State
    validation: Validation | None = None
    blind: bool = False
    digests: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    @classmethod
    def initial(cls, agreed: AgreedStudy) -> ReplicaState:
        """Before a run's genesis."""
        return cls(Chain(agreed), aggregation.start(agreed))

    @property
    def run(self) -> str:
        """Id of the run, empty before its genesis."""
        return self.chain.run if self.chain.length else ""

    @property
    def round(self) -> int:
        """The last round that was applied, or refused; 0 before the first."""
        return self.chain.round

    @property
    def parameters(self) -> Parameters:
        """The adapter that is evaluated and used."""
        return aggregation.result_of(self.tensors)

    @property
    def iterate(self) -> Parameters:
        """The adapter at which the next round begins; that in use too, unless the study takes the mean."""
        return aggregation.adapter_of(self.tensors)

    @property
    def digest(self) -> str:
        """SHA-256 of adapter and moments: what sites compare. Without moments, the adapter's."""
        return codec.adapter_digest(self.tensors)


@dataclass(frozen=True)
class Sums:
    """What an aggregate opened to: the cohort's integers, summed, int64 [values]."""

    values: NDArray[np.int64]


@dataclass(frozen=True)
class Confirmed:
    """What a checkpoint stands for: adapter and moments that the members have acknowledged."""

    tensors: aggregation.State


@dataclass(frozen=True)
class Unreadable:
    """An aggregate or checkpoint whose key is not here: it came before this site did, or was destroyed since."""


Reading = Sums | Confirmed | Unreadable | None
"""What a site reads in a record; None leaves the adapter alone, as most records do, and a refused aggregate."""


def fold(state: ReplicaState, record: Record, reading: Reading) -> ReplicaState:
    """The state after a record: the same, bit for bit, at all sites that read the same.

    Args:
        state: before the record; left as it is.
        record: the next one, checked by the state's chain.
        reading: what the site reads in it.
    """
    agreed = state.chain.agreed
    after = replace(state, chain=state.chain.after(record))
    match reading:
        case Sums(values):
            weights = [state.chain.members[entry.site].weight for entry in record.cohort]
            found = agreed.layout(record.header.round).decode(values, weights)
            after = replace(after, tensors=aggregation.after_round(agreed, state.tensors, found))
            counts = aggregation.validation_counts(agreed, found)
            if counts is not None:
                most = aggregation.most_validated(agreed, len(record.cohort))
                after = replace(after, validation=_possible(Validation(*counts), most, record.header.round))
        case Confirmed(tensors):
            after = replace(after, tensors=tensors, blind=False)
        case Unreadable():
            after = replace(after, blind=True)
    if after.blind:
        return after
    digests = [*state.digests.items(), (after.chain.head, (after.digest, after.chain.key))]
    return replace(after, digests=dict(digests[-2:]))


def _possible(counts: Validation, most: int, round_number: int) -> Validation:
    """A round's counts as they may be shown: any member can send what no images give, and nobody sees who."""
    possible = counts.clamped(most)
    if possible != counts:
        log.warning(
            "round %d: the sites' validation counts sum to %d correct of %d; expected 0 <= correct <= all <= %d. Taken "
            "as %d of %d. A site has sent counts that no images give: do not choose an adapter by this round's share, "
            "and ask the operators",
            *(round_number, counts.correct, counts.images, most, possible.correct, possible.images),
        )
    return possible


# --- what lies on disk ---


class RunFiles:
    """What a site keeps of one run, written before anything follows from it.

    Its copy of the records; the digest of the one aggregate of a round that may be decrypted; the key of an aggregate
    that was refused after decryption; records that contradict those applied here, as evidence; the state after the
    journal's last record, which is rebuilt if lost.

    Args:
        folder: the run's; made if missing.
    """

    def __init__(self, folder: SiteRun) -> None:
        self.folder = folder
        self.records = RecordFolder(folder.journal)

    def refuse_another(self, frame: Frame, header: RecordHeader, data: bytes) -> None:
        """Check that a record is the one of its number here.

        Raises:
            RecordError: it is another, and is kept as evidence; or its payload is not the one that it names.
        """
        if data != self.records.read(header.seq):
            check_payload(frame, header, RecordError)
            self._keep_evidence(data)
            raise RecordError(
                f"a second record {header.seq}, different from the one applied here; both are signed by the "
                f"coordinator and kept in {self.folder.evidence}: tell the other sites"
            )

    def pin(self, record: Record) -> None:
        """Fix the one candidate of a round before anything is decrypted.

        Raises:
            RecordError: another one was fixed before; this one is kept as evidence.
        """
        path = self.folder.pin(record.header.round)
        make_folder(path.parent)
        place, digest = record.header.previous, hashlib.sha256(record.data).hexdigest()
        fixed = path.read_text(encoding="ascii").split() if path.exists() else []
        if fixed[:1] != [place]:  # none was, or what was stood after a head that a void has replaced
            write_durable(path, f"{place} {digest}".encode())
        elif fixed != [place, digest]:
            self._keep_evidence(record.data)
            raise RecordError(
                f"a second aggregate for round {record.header.round}; one candidate a round is decrypted, never another"
            )

    @property
    def bound(self) -> Bound:
        """What this site has bound itself to; where its file is damaged, from now on, that it is behind its words."""
        bound = read_bound(self.folder.bound)
        if bound is None:
            log.error(
                "%s: damaged, so that nobody knows what this site has said in the open round; it begins a new file and "
                "sits that round out; if its people have just given a void, a release or a retirement, they say it "
                "again; look after this computer's disk",
                self.folder.bound,
            )
            bound = Bound(behind=True)
            self.bind(bound)
        return bound

    def bind(self, bound: Bound) -> None:
        """Bind this site, durably, before it speaks.

        Raises:
            StorageError: it could not be written: nothing may be sent.
        """
        write_bound(self.folder.bound, bound)

    def erase_pads(self, due: RoundPosition | None) -> None:
        """Forget, durably, the keys and masks of a round that is over: what was sent in it stays closed to who takes
        this disk later.

        Args:
            due: where the open round stands; None in a run that another has followed, whose last round never closes.
        """
        bound = read_bound(self.folder.bound)
        if bound is None or (bound.fresh is None and bound.padded is None):
            return
        if due is None or (bound.round, bound.head) != (due.round, due.head):
            self.bind(bound.model_copy(update={"fresh": None, "padded": None}))

    def erase_updates(self, round_number: int) -> None:
        """Erase the updates at adapters that no void brings back, now that a record has come which builds on them.

        Args:
            round_number: of the record; of a checkpoint, the round that is due.
        """
        moved = (number for number in reversed(range(1, round_number)) if not self.refused(number))
        erase_updates(self.folder, next(moved, 0))

    def fall_behind(self) -> None:
        """Mark, durably, that this site has said what this disk does not know."""
        self.bind(self.bound.model_copy(update={"behind": True}))

    def refuse(self, round_number: int, key: str) -> None:
        """Mark a round's aggregate as refused under a key."""
        make_folder(self.folder.refused)
        write_durable(self.folder.refusal(round_number), key.encode())

    def take_back(self, record: Record) -> None:
        """Take the last sum, and what follows it, out of the journal again; the sum is kept as evidence."""
        self._keep_evidence(record.data)
        self.folder.refusal(record.header.round).unlink(missing_ok=True)
        self.records.drop_from(record.header.seq)

    def keep_before(self) -> None:
        """Keep the state as it is stored, of before a sum that may be taken back."""
        if self.folder.adapter.exists():
            self.folder.adapter.replace(self.folder.before)

    def refused(self, round_number: int) -> bool:
        """Whether a round's aggregate was refused."""
        return self.folder.refusal(round_number).exists()

    def store(self, state: ReplicaState) -> None:
        """Keep a state, so that a restart need not decrypt all rounds again; a blind one has no adapter yet."""
        if state.blind:
            return
        counts = [state.validation.images, state.validation.correct] if state.validation else []
        metadata = {
            "head": state.chain.head,
            "digest": state.digest,
            "digests": json.dumps(dict(state.digests)),
            "validation": json.dumps(counts),
        }
        data = safetensors.numpy.save(state.tensors, metadata)
        write_durable(self.folder.adapter, bytes(data))

    def load(self, agreed: AgreedStudy, records: Sequence[Record]) -> ReplicaState:
        """The newest state that was kept, is whole and stands at one of these records; else the initial one."""
        kept = (self._load(path, agreed, records) for path in (self.folder.adapter, self.folder.before))
        return next((state for state in kept if state is not None), ReplicaState.initial(agreed))

    def _load(self, path: Path, agreed: AgreedStudy, records: Sequence[Record]) -> ReplicaState | None:
        try:
            data = path.read_bytes()
            metadata = _metadata(data)
            applied = [record.id for record in records].index(metadata["head"]) + 1
            tensors = safetensors.numpy.load(data)
            digests = {head: (digest, key) for head, (digest, key) in json.loads(metadata["digests"]).items()}
            counts = json.loads(metadata["validation"])
            whole = codec.adapter_digest(tensors) == metadata["digest"]
        except (OSError, KeyError, ValueError, RecursionError, safetensors.SafetensorError):
            return None
        if not whole:
            return None
        chain = Chain(agreed)
        for record in records[:applied]:
            chain = chain.after(record)
        return ReplicaState(chain, tensors, Validation(*counts) if counts else None, digests=digests)

    def _keep_evidence(self, data: bytes) -> None:
        make_folder(self.folder.evidence)
        if len(list(self.folder.evidence.glob(RECORDS))) < MAX_EVIDENCE:  # one proves as much as a thousand
            write_durable(self.folder.second_record(hashlib.sha256(data).hexdigest()), data)


def _metadata(data: bytes) -> dict[str, str]:
    """The metadata of a safetensors file (its numpy interface reads only tensors)."""
    length = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + length])["__metadata__"]
    return {str(key): str(value) for key, value in metadata.items()}


def _keys_of(folder: Path, agreed: AgreedStudy) -> set[str]:
    """The keys that a run's records name."""
    paths = RunState(folder).journal.glob(RECORDS)
    return {read_header(path.read_bytes(), agreed)[1].key for path in paths}


# --- the site's part ---


@dataclass(frozen=True)
class LastSum:
    """A sum that a void can still take the place of.

    Attributes:
        before: the chain before it.
        record: it.
        after: the kinds of the records that follow it.
    """

    before: Chain
    record: Record
    after: tuple[Kind, ...]


class Replica:
    """A site's copy of a study's current run: takes records, and speaks for the adapter that they make.

    In its state folder (:mod:`secure_fed.core.layout`) it keeps which run it is in, each run's :class:`RunFiles`, the
    study's sealed keys and the newest privacy-ledger head of every site.

    Args:
        file: the site's ``site.toml``, paths absolute.
        agreed: the study; must be the one that ``file`` names.

    Raises:
        StudyError, SiteFileError: the site is not in the study, or its identity is another.
        RecordError: the state folder does not verify.

    Attributes:
        name: the site's.
        identity: its private keys.
        keys: the study's sealed keys at this site.
        member: the site as the study knows it.
        heads: the newest ledger heads that were seen.
        state: where it stands.
        waiting: a record of the round that its people have given up, and what follows it: not applied until a later
            round's record shows that no void can be complete.
        files: what lies on disk of the current run; not there before the first genesis.
    """

    files: RunFiles
    _back: int | None = None

    def __init__(self, file: SiteFile, agreed: AgreedStudy) -> None:
        self.name = file.site
        self.identity, self.keys, self.member = membership(file, agreed)
        self._file = file
        self._agreed = agreed
        self._folder = file.state_folder
        self._folder.begin()
        self.heads = LedgerHeads(self._folder.ledger_heads)
        self.state = ReplicaState.initial(agreed)
        self.waiting: list[Record] = []
        current = self._folder.current_run
        if current is not None:
            self._enter_run(current)

    # --- records ---

    @property
    def position(self) -> int:
        """How many records of the run it has, those that it does not apply yet among them; where the server's journal
        is another from the last sum on, those before that."""
        return self.state.chain.length + len(self.waiting) if self._back is None else self._back

    def goes_back(self, after: str) -> bool:
        """Whether the server's journal is another than the one here from the last sum on, in whose place it has a void.

        Nothing is taken back at its word: it is asked for what comes from there.

        Args:
            after: id of the server's record before those that it sends.
        """
        self._back = None
        if after in ("", self.state.chain.head, *(record.id for record in self.waiting)):
            return False
        if any(record.id == after for record in self.files.records.replay(Chain(self._agreed))):
            return False
        last = self.last_sum()
        if self.waiting:
            self.waiting = []  # they are sent again, if they are still there
        elif last is not None:
            self._back = last.record.header.seq
        else:
            return False
        return True

    def take(self, data: bytes) -> None:
        """Take a record as the server sent it; one that is here already changes nothing.

        A crash between two of the writes is made good when the replica is opened again. Their order is what makes
        that safe: the pin, before anything is decrypted; the ledger heads; the record; what follows from it, a new key
        or a refusal; last the adapter.

        Raises:
            RecordError, LedgerRollbackError: it is refused; all is as it was, but for evidence.
            SiteFileError: an amendment that this site's policy leaves to its people.
            CertificateError: an amendment's authority, whose certificate is not here yet.
            NotAcceptedError: a further run of the study, which nobody here has accepted.
            AdapterMismatchError: the members hold another adapter.
            KeyFileError: an amendment's key is refused, or a genesis names one that is not here.
            StorageError: something cannot be written.
        """
        frame, header = read_header(data, self._agreed)
        if header.kind == "genesis" and header.run != self.state.run:
            self._begin_run(header, data)
            return
        if header.run == self.state.run and header.seq < self.state.chain.length:
            known = data == self.files.records.read(header.seq)
            if known or header.kind != "void" or not self._void_wins(header, data):
                self.files.refuse_another(frame, header, data)
                return
        for record in self._ripe(header, data):
            self._take(record)

    def _void_wins(self, header: RecordHeader, data: bytes) -> bool:
        """Take the last sum back if this is a void of its round: a quorum's people have signed that.

        A race or a lie made both. No later record exists, since two quorums share an honest site, which gives no word
        for a void once it has revealed in a later round.
        """
        last = self.last_sum()
        if last is None or header.seq != last.record.header.seq:
            return False
        record = last.record
        last.before.check(data)
        log.warning(
            "%s: round %d has a record and a void, both complete; the void counts, the record is taken back and kept "
            "in %s; nobody need have lied",
            *(self.name, record.header.round, self.files.folder.evidence),
        )
        self.take_back(record)
        return True

    def last_sum(self) -> LastSum | None:
        """The last sum, if a void can still take its place: only that one can be taken back."""
        records = list(self.files.records.replay(Chain(self._agreed)))
        place = replaceable([record.header.kind for record in records])
        if place is None:
            return None
        chain = Chain(self._agreed)
        for record in records[:place]:
            chain.advance(record)
        return LastSum(chain, records[place], tuple(record.header.kind for record in records[place + 1 :]))

    def take_back(self, record: Record) -> None:
        """Stand again where it stood before its last sum; a crash on the way leaves that, or some of what followed."""
        self.files.take_back(record)
        self._enter_run(self.state.run)

    def _ripe(self, header: RecordHeader, data: bytes) -> list[Record]:
        """The records that can be taken now, this one the last: none while one of a round that was given up waits."""
        if header.kind == "void" and header.seq == self.state.chain.length:
            self.waiting = []
        if self.waiting and header.seq <= self.waiting[-1].header.seq:
            return []
        chain = self.state.chain
        for record in self.waiting:
            chain = chain.after(record)
        record = chain.check(data)
        if not self.waiting and not (record.header.kind == "aggregate" and self.files.bound.at(chain.due).void):
            return [record]
        self.waiting.append(record)
        if sum(each.header.kind == "aggregate" for each in self.waiting) < 2:
            return []
        ripe, self.waiting = self.waiting, []
        return ripe

    def _take(self, record: Record) -> None:
        heads = {entry.site: entry.ledger for entry in record.contributors}
        for name, head in heads.items():
            self.heads.check(name, head)
        if record.amendment is not None:
            self._check_policy(record.amendment)
        if record.header.kind == "extension":
            self._require_rounds(record.rounds)
        if record.header.kind in ("amendment", "retired", "extension"):
            self._refuse_within_round(record)
        if record.header.kind == "aggregate":
            self.files.pin(record)
            self._remember(record)
            self.files.keep_before()
        elif self.files.bound.void:
            self.files.bind(self.files.bound.at(self.state.chain.due))  # by this head, before it moves
        if record.header.kind == "void":
            self._free(record)
        self.heads.keep(heads)
        self.files.records.append(record)
        self._apply(record)
        self.files.erase_pads(self.due)  # whatever stops this site next
        self.files.store(self.state)
        if record.header.kind in ("aggregate", "checkpoint"):
            self.files.erase_updates(record.header.round)

    def _remember(self, record: Record) -> None:
        """Hold a sum's REVEAL of this site, or that others stood for it, against what its own disk knows of it."""
        due = self.state.chain.due
        own = next((entry for entry in record.contributors if entry.site == self.name), None)
        if own is None or self.files.bound.round > due.round:
            return
        bound = self.files.bound.at(due)
        if bound.out:
            return  # that round is sat out for it already
        stood_for = self.name in [entry.site for entry in record.header.witnessed]
        if stood_for and (bound.attempt, bound.cohort) == (own.attempt, own.cohort):
            # It sent that envelope and was gone; what others opened counts as if it had revealed.
            given = bound.giving(self.asked_for, record.contributors, self.state.chain.sum)
            self.files.bind(given.model_copy(update={"arrived": record.arrived}))
        elif bound.arrived != record.arrived:
            self.files.fall_behind()

    def _free(self, record: Record) -> None:
        """Where a quorum had not revealed, no sum of the round can be opened: it is as if nobody had."""
        words = [parse_header(word.signed[0], VoidHeader, RecordError) for word in record.header.contributors]
        if sum(not word.revealed for word in words) < self.state.chain.quorum.needed:
            return
        bound = self.files.bound.at(self.state.chain.due)
        if bound.arrived:
            self.files.bind(bound.forgiven())

    def _apply(self, record: Record) -> None:
        """Go on by a record of the site's own journal.

        An amendment's key is taken before anything is read with it, unless a newer one is here already: then this is
        the past, whose keys are never taken again. One that cannot be opened is its maker's deed: this site has no part
        in what is sealed under it, and can still be opened, and be told of the next one or of the run's end. Once a
        checkpoint is confirmed, the keys before its own are of no more use to anybody, and are destroyed.
        """
        amendment = record.amendment
        if amendment is not None and self.name in record.members and amendment.epoch >= self.keys.newest[0]:
            try:
                self.keys.accept(record.payload)
            except KeyFileError as error:
                log.error(
                    "%s; %s made it, with an amendment that this site cannot acknowledge therefore: ask it by phone; "
                    "if it never comes right, the coordinator ends the run (secfacmic study end --lost)",
                    *(error, amendment.maker),
                )
            warning = exact_warning(self.state.chain.agreed.study, amendment)
            if warning is not None:
                log.warning("%s: %s", self.name, warning)
        reading = self._read(self.state, record)
        if isinstance(reading, Confirmed):
            self.keys.destroy_before(record.header.key)
        self.state = fold(self.state, record, reading)

    def _read(self, state: ReplicaState, record: Record) -> Reading:
        """What this site reads in a record that follows a state; a refusal is marked and the aggregate never opened
        again."""
        header, key = record.header, state.chain.key
        if header.kind != "aggregate" and not (header.kind == "checkpoint" and self.name in record.members):
            return None
        if not self._holds(key):
            return Unreadable()
        if header.kind == "checkpoint":
            return self._confirm(state, record)
        if self.files.refused(header.round):
            return None
        due = state.chain.due
        try:
            sums = self._sealer(key, header.round).open(
                record.ciphertexts(self._agreed), Binding(run=due.run, head=due.head, round=due.round), record.cohort
            )
        except AggregateRefused:
            self.files.refuse(header.round, key)
            log.error("round %d: the sum is out of range; the study pauses for people", header.round)
            return None
        return Sums(sums)

    def _confirm(self, state: ReplicaState, record: Record) -> Confirmed:
        """The adapter that the members acknowledged: the one here or, for a site without, the checkpoint's."""
        chain, tensors = state.chain, state.tensors
        if state.blind:
            sealed = open_checkpoint(self.keys.secret(chain.key), chain.head, record.payload)
            try:
                tensors = safetensors.numpy.load(sealed)
            except (safetensors.SafetensorError, KeyError, TypeError, ValueError):
                raise AdapterMismatchError(
                    f"the key maker's checkpoint after round {chain.round} opens and holds no adapter: the key maker "
                    "is damaged or lies; compare by phone, and let it rotate again"
                ) from None
        if not hmac.compare_digest(self._checkpoint_digest(chain, codec.adapter_digest(tensors)), record.checkpoint):
            raise AdapterMismatchError(
                f"the members acknowledged another adapter than the one here after round {chain.round}; "
                "this site is damaged or they are: compare by phone"
            )
        return Confirmed(tensors)

    def _refuse_within_round(self, record: Record) -> None:
        """A member that is removed in an open round would have its envelopes, and no part in what becomes of them;
        and what was said in it was said at another head."""
        bound = self.files.bound.at(self.state.chain.due)
        if bound.attempt:
            raise RecordError(
                f"{record.header.kind} within round {bound.round}, for which this site answered attempt "
                f"{bound.attempt} already; expected members, keys and rounds to change between rounds only"
            )

    def _check_policy(self, amendment: SealedKeyHeader) -> None:
        """Apply unasked only those amendments that this site's own file allows, and none after which it could not
        reach its server."""
        allowed, authority = self._file.amendments, amendment.authority
        unasked = allowed == "all" or (allowed == "removals" and not amendment.added and authority is None)
        if not unasked and not self.keys.holds(amendment.key):
            joining = ", ".join(site.name for site in amendment.added) or "nobody"
            leaving = ", ".join(amendment.removed) or "nobody"
            trusting = "" if authority is None else f", and the server be trusted by authority {authority} alone"
            raise SiteFileError(
                f"an amendment with key {amendment.key[:16]}: {joining} would join, {leaving} leave{trusting}; "
                f'site.toml says amendments = "{allowed}"; accept this one by hand (secfacmic keys accept) or change '
                "site.toml"
            )
        if authority is not None and self._file.server is not None:
            read_authority(Path(self._file.server.authority), authority)

    # --- what a site asks ---

    @property
    def paused(self) -> bool:
        """Whether the last sum was out of range, so that people must find out whose envelope was.

        Its check held: some member sent what no training gives. All honest sites see the same; the round is closed, the
        adapter stays as it was, and an amendment lets the study go on.
        """
        chain = self.state.chain
        return self.files.refused(chain.round) and chain.amended_after < chain.round

    @property
    def due(self) -> RoundPosition:
        """Where the envelopes that are due stand."""
        return self.state.chain.due

    @property
    def asked_for(self) -> str:
        """Digest of what a site without a budget gives once, in whatever round it is asked: the adapter state and,
        where sites send statistics, which of them: another one is no second sum of the first."""
        state = self.state.digest
        if not self._agreed.study.method.sums:
            return state
        blocks = ",".join(block.name for block in self._agreed.layout(self.due.round).blocks)
        return hashlib.sha256(f"{state}:{blocks}".encode()).hexdigest()

    @property
    def sealer(self) -> Sealer:
        """What seals the site's updates under the key in force.

        Raises:
            KeyFileError: the key is not here.
        """
        return self._sealer(self.state.chain.key, self.due.round)

    def history(self) -> Iterator[ReplicaState]:
        """The state after each applied round of the run, replayed from the site's own journal.

        Rounds whose key is destroyed here are left out.
        """
        if not self.state.run:
            return
        state = ReplicaState.initial(self._agreed)
        for record in self.files.records.replay(Chain(self._agreed)):
            state = fold(state, record, self._read(state, record))
            if record.header.kind == "aggregate" and not state.blind and not self.files.refused(state.round):
                yield state

    def attestation(self) -> str:
        """The site's word, for the others, that it holds this adapter at this head; empty if it cannot tell."""
        chain = self.state.chain
        # Before the first genesis there is neither key nor head.
        if not chain.length or self.state.blind or self.waiting or not self._holds(chain.key) or self._back is not None:
            return ""
        return codec.attestation(self._attestation_key(chain.key), self.name, chain.head, self.state.digest)

    def compare(self, head: str, attestations: Mapping[str, str]) -> None:
        """Compare the adapter with the other sites' at a head that this site has had too.

        One that differs is named and left alone: its word stops nobody. Only where more training sites differ than
        agree (this one among them) is it this site that is odd.

        Args:
            head: at which they made the attestations.
            attestations: by site name.

        Raises:
            AdapterMismatchError: most of the others hold another adapter.
        """
        digest, key = self.state.digests.get(head, ("", ""))
        if not digest or not self._holds(key):
            return
        members = self.state.chain.members
        odd = []
        for site, attested in sorted(attestations.items()):
            expected = codec.attestation(self._attestation_key(key), site, head, digest)
            same = hmac.compare_digest(expected.encode(), attested.encode("utf-8", "replace"))  # it may say anything
            if site in members and site != self.name and not same:
                odd.append(site)
        if not odd:
            return
        training = [site for site in attestations if site in members and members[site].role == "train"]
        against = sum(site in odd for site in training)
        if against > sum(site not in odd and site != self.name for site in training) + 1:
            kept = self.files.folder
            raise AdapterMismatchError(
                f"{', '.join(odd)} attest another adapter than the one here after record {head[:16]}, more sites than "
                "agree; either the server garbles attestations or this site is damaged: compare by phone; if it is, "
                f"delete {kept.adapter} and {kept.before.name}: they are made anew from the journal"
            )
        log.warning(
            "%s attest another adapter than the one here after record %s: damaged, or the server garbles their words; "
            "compare by phone; the study goes on",
            ", ".join(odd),
            head[:16],
        )

    def acknowledgement(self) -> bytes:
        """The signed word that the amendment is applied; the key maker's carries the checkpoint."""
        chain = self.state.chain
        payload = b""
        if self.name == self._agreed.study.key_maker:
            tensors = bytes(safetensors.numpy.save(self.state.tensors))
            payload = seal_checkpoint(self.keys.secret(chain.key), chain.head, tensors)
        header = AcknowledgementHeader(
            version=2,
            study=self._agreed.study.id,
            run=chain.run,
            head=chain.head,
            site=self.name,
            checkpoint=self._checkpoint_digest(chain, self.state.digest),
            **payload_fields(payload),
        )
        return sign_frame(ACKNOWLEDGEMENT_MAGIC, header, self.identity.signing, payload)

    # --- runs ---

    def _begin_run(self, header: RecordHeader, data: bytes) -> None:
        """Enter the run of a genesis, unless its key belongs to another run."""
        run, key = header.run, header.key
        record = Chain(self._agreed).check(data)
        if self._agreed.study.mode == "he":
            epoch, newest = self.keys.newest
            if not self.keys.headers:
                raise KeyFileError(
                    f"genesis of run {run[:16]} names key {key[:16]}, which this site does not hold; "
                    "take the sealed key file first"
                )
            if not self.keys.may_begin(key):
                raise RecordError(
                    f"genesis of run {run[:16]} names key {key[:16]}; the newest here is key {newest[:16]} of epoch "
                    f"{epoch}; a site never goes back to an older key, nor to one it does not hold"
                )
            if not self.keys.holds(key) and self._run_of(newest, but=run) is not None:
                raise RecordError(
                    f"genesis of run {run[:16]} names key {key[:16]}, which is not here; the newest here, key "
                    f"{newest[:16]}, is another run's; take this run's sealed key file first: secfacmic keys accept"
                )
            other = self._run_of(key, but=run)
            if other is not None:
                raise RecordError(
                    f"genesis of run {run[:16]} names key {key[:16]}, already used in run {other[:16]}; every run has "
                    "a new key"
                )
        self.require_word(run)
        records = RecordFolder(self._folder.run(run).journal)
        if records.file(0).exists() and records.read(0) != data:
            raise RecordError(f"a second genesis of run {run[:16]}, different from the one known here")
        records.append(record)
        self._folder.enter_run(run)
        self._enter_run(run)

    @property
    def awaits_run(self) -> bool:
        """Whether this site's people have accepted a run more than it has taken part in."""
        begun = sum(1 for _ in self._folder.begun_runs())
        return begun < runs_accepted(self._file, self._agreed, self.identity.keys.signing)

    def require_word(self, run: str) -> None:
        """Enter another run only at the word of this site's people: its sums and those before are of the same data."""
        before = [folder.name for folder in self._folder.begun_runs()]
        if run in before or not before:
            return
        accepted = runs_accepted(self._file, self._agreed, self.identity.keys.signing)
        if len(before) >= accepted:
            raise NotAcceptedError(
                f"a genesis of run {run[:16]}: this site has taken part in {len(before)} of study "
                f"{self._agreed.study.name}, and {max(accepted, 1)} accepted; expected its people's word before "
                "a further one, whose sums are of the same data: whoever has two sums of different sites has their "
                "difference. If it is meant: secfacmic site accept STUDY --site site.toml --again"
            )

    def _require_rounds(self, rounds: int) -> None:
        """Take part in more rounds than were accepted only at the word of this site's people."""
        accepted = rounds_accepted(self._file, self._agreed, self.identity.keys.signing)
        if rounds > accepted:
            raise NotAcceptedError(
                f"an extension to {rounds} rounds; this site's people accepted {accepted} of study "
                f"{self._agreed.study.name}; expected their word before a further one. If it is meant: secfacmic site "
                f"accept STUDY --site site.toml --rounds {rounds}"
            )

    def _run_of(self, key: str, but: str) -> str | None:
        """Another run of which a record here, genesis or amendment, names a key."""
        for folder in self._folder.begun_runs():
            if folder.name != but and key in _keys_of(folder, self._agreed):
                return folder.name
        return None

    def _enter_run(self, run: str) -> None:
        """Rebuild the state from the run's journal, from the stored one on if it is there."""
        self.files = RunFiles(self._folder.run(run))
        records = list(self.files.records.replay(Chain(self._agreed)))
        self.state = self.files.load(self._agreed, records)
        for record in records[self.state.chain.length :]:
            self._apply(record)
        self.files.erase_pads(self.due)
        for folder in self._folder.begun_runs():
            if folder.name != run:
                RunFiles(SiteRun(folder)).erase_pads(None)
        self.files.store(self.state)

    # --- keys ---

    def _holds(self, key: str) -> bool:
        return self._agreed.study.mode == "plain" or self.keys.holds(key)

    def _sealer(self, key: str, round_number: int) -> Sealer:
        lanes = self._agreed.layout(round_number).lanes
        if self._agreed.study.mode == "plain":
            return PlainSealer(lanes)
        return Cipher(lanes, self.keys.secret(key))

    def _attestation_key(self, key: str) -> bytes:
        if self._agreed.study.mode == "plain":
            return self._agreed.study.id.encode()  # the server sees the adapter anyway
        return attestation_key(self.keys.secret(key))

    def _checkpoint_digest(self, chain: Chain, digest: str) -> str:
        return codec.attestation(self._attestation_key(chain.key), "checkpoint", chain.head, digest)

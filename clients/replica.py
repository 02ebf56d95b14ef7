"""A site's own copy of the journal, and the adapter that follows from it and from nothing else.

Every record is checked as if server and network lied: one candidate a round is decrypted, what was refused is never
applied, and no site goes back to an older key. See :class:`Replica` for the files.
"""

from __future__ import annotations

import copy
import hashlib
import hmac
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from secure_fed.clients.keyring import membership
from secure_fed.clients.sitefile import SiteFile
from secure_fed.core.errors import (
    AdapterMismatchError,
    AggregateRefused,
    KeyDeadError,
    KeyFileError,
    RecordError,
    SiteFileError,
)
from secure_fed.core.storage import make_folder, write_durable
from secure_fed.privacy.ckks import Cipher
from secure_fed.privacy.keys import attestation_key, open_checkpoint, seal_checkpoint
from secure_fed.protocol import aggregation, codec
from secure_fed.protocol.codec import Parameters
from secure_fed.protocol.ledger_heads import LedgerHeads
from secure_fed.protocol.packing import Binding, PlainSealer, Sealer
from secure_fed.protocol.records import Chain, Record, RecordFolder, read_header
from secure_fed.protocol.rounds import RoundRequest
from secure_fed.protocol.sealed_key import ACKNOWLEDGEMENT_MAGIC, AcknowledgementHeader, Members, SealedKeyHeader
from secure_fed.protocol.signing import payload_fields, sign_frame
from secure_fed.protocol.study import AgreedStudy

log = logging.getLogger(__name__)

MAX_REFUSALS = 8
"""Refused aggregates after which a key decrypts nothing more: each is one answer to a forger."""


@dataclass(frozen=True)
class Validation:
    """Validation counts of a round's cohort, summed under encryption: of the adapter it trained on."""

    images: int
    correct: int


@dataclass(frozen=True)
class RoundState:
    """What a site held after a round: the adapter, and the validation counts that came with its aggregate."""

    round: int
    parameters: Parameters
    validation: Validation | None


class Replica:
    """What a site holds of a study's current run.

    In its state folder:

    ``keys/EPOCH.sealed``           the study's sealed keys
    ``run``                         id of the current run
    ``runs/RUN/journal/``           the site's own copy of the records
    ``runs/RUN/pins/ROUND``         digest of the one aggregate of a round that may be decrypted
    ``runs/RUN/refused/ROUND``      marks an aggregate that was refused after decryption
    ``runs/RUN/evidence/``          records that contradict those applied here
    ``runs/RUN/adapter.safetensors`` adapter and moments after the journal's last record (rebuilt if lost)
    ``ledger_heads.json``           the newest privacy-ledger head of every site

    Args:
        file: the site's ``site.toml``, paths absolute.
        agreed: the study; must be the one that ``file`` names.

    Raises:
        SiteFileError: the site is not in the study, or its identity is another.
        RecordError: the state folder does not verify.

    Attributes:
        name: the site's.
        keys: the study's sealed keys at this site.
        parameters: the global adapter, float64, after the last applied record.
        validation: counts that came with the last aggregate, None before the first or if not shared.
    """

    def __init__(self, file: SiteFile, agreed: AgreedStudy) -> None:
        self.name = file.site
        self._file = file
        self._agreed = agreed
        self._identity, self.keys, self._member = membership(file, agreed)
        self._state = Path(file.state)
        make_folder(self._state / "runs")
        encoding = agreed.study.encoding
        self._bounds = codec.value_bounds(agreed.initial.shapes, encoding.value_bound, encoding.value_bounds)
        self._heads = LedgerHeads(self._state / "ledger_heads.json")
        self._blind = False
        self._chain = Chain(agreed)
        self._digests: dict[str, tuple[str, str]] = {}
        self.validation: Validation | None = None
        self._set_state(self._initial_state())
        run = self._current_run()
        if run is not None:
            self._enter_run(run)

    @property
    def run(self) -> str:
        """Id of the current run, empty before the first genesis."""
        return self._chain.run if self._chain.length else ""

    @property
    def position(self) -> int:
        """How many records of the run the site has."""
        return self._chain.length

    @property
    def round(self) -> int:
        """The last round that is applied here (or was refused here); 0 before the first."""
        return self._chain.round

    @property
    def finished(self) -> bool:
        """Whether every round of the study is applied here."""
        return self._chain.finished

    @property
    def members(self) -> Members:
        """The study's members now, by name; amendments change them."""
        return self._chain.members

    @property
    def key_in_force(self) -> str:
        """Id of the run's key; zeros before the first genesis and in ``plain`` mode."""
        return self._chain.key

    @property
    def adapter_digest(self) -> str:
        """SHA-256 of the adapter it holds; for the site's own eyes."""
        return codec.adapter_digest(self.parameters)

    def history(self) -> Iterator[RoundState]:
        """The state after each applied round of the run, replayed from the site's own journal.

        Rounds whose key is destroyed here are left out.
        """
        if not self.run:
            return
        replay = copy.copy(self)
        replay._chain = Chain(self._agreed)
        replay._set_state(self._initial_state())
        replay.validation, replay._blind = None, False
        for record in list(self._records.replay(Chain(self._agreed))):
            replay._apply(record)
            if record.header.kind == "aggregate" and not replay._blind and not self._refused(record.header.round):
                yield RoundState(record.header.round, replay.parameters, replay.validation)

    def _attestation(self) -> str:
        """The site's word, for the others, that it holds this adapter at this head; empty if it cannot tell."""
        # Before the first genesis there is neither key nor head.
        if not self._chain.length or self._blind or not self._can_attest(self._chain.key):
            return ""
        key = self._attestation_key(self._chain.key)
        return codec.attestation(key, self.name, self._chain.head, self._state_digest)

    def _compare(self, request: RoundRequest) -> None:
        """Compare the adapter with the other sites' at a head that this site has had too."""
        digest, key = self._digests.get(request.attested_head, ("", ""))
        if not digest or not self._can_attest(key):
            return
        for site, attested in sorted(request.attestations.items()):
            expected = codec.attestation(self._attestation_key(key), site, request.attested_head, digest)
            if site != self.name and not hmac.compare_digest(expected, attested):
                raise AdapterMismatchError(
                    f"site {site} attests another adapter than the one here after record {request.attested_head[:16]}; "
                    "either the server garbles attestations or one of the two is damaged: compare by phone"
                )

    # --- records ---

    def _take(self, data: bytes) -> None:
        _, header = read_header(data, self._agreed)
        if header.kind == "genesis" and header.run != self.run:
            self._begin_run(header.run, header.key, data)
            return
        if header.run == self.run and header.seq < self._chain.length:
            if data != self._records.read(header.seq):
                self._keep_evidence(data)
                raise RecordError(
                    f"a second record {header.seq}, different from the one applied here; both are signed by the "
                    f"coordinator and kept in {self._run_folder / 'evidence'}: tell the other sites"
                )
            return
        record = self._chain.check(data)
        self._check_void(record)
        heads = {entry.site: entry.ledger for entry in record.contributors}
        for name, head in heads.items():
            self._heads.check(name, head)
        if record.amendment is not None:
            self._check_policy(record.amendment)
        if record.header.kind == "aggregate":
            self._pin(record)
        self._heads.keep(heads)
        self._records.append(record)
        self._apply(record)
        self._store_adapter()

    def _apply(self, record: Record) -> None:
        """Advance by a record of the site's own journal; the adapter changes only if the aggregate holds."""
        due = self._chain.due
        round_number = record.header.round
        if record.amendment is not None and self.name in record.members:
            self.keys.accept(record.payload)
        elif record.header.kind == "checkpoint" and self.name in record.members:
            self._check_point(record)
        elif record.header.kind == "aggregate" and self._agreed.study.mode == "he" and not self.keys.holds(due.key):
            self._blind = True  # until a checkpoint
        elif record.header.kind == "aggregate" and not self._refused(round_number):
            if self._refusals() >= MAX_REFUSALS:
                raise KeyDeadError(
                    f"key {due.key[:16]} has refused {MAX_REFUSALS} aggregates and decrypts nothing more; "
                    "the coordinator or the network forges: make a new key"
                )
            try:
                sums = self._sealer().open(
                    record.payload, Binding(run=due.run, head=due.head, round=due.round), record.cohort
                )
            except AggregateRefused:
                make_folder(self._run_folder / "refused")
                write_durable(self._run_folder / "refused" / f"{round_number:08d}", due.key.encode())
                log.warning("round %d: the aggregate was refused", round_number)
            else:
                self._add(sums, [self._chain.members[entry.site].weight for entry in record.cohort])
        self._chain.advance(record)

    def _add(self, sums: NDArray[np.int64], weights: list[float]) -> None:
        lanes = self._agreed.lanes
        size = self._bounds.size
        update = codec.average_update(sums[:size], self._bounds, weights, lanes.max_integer)
        self._set_state(aggregation.apply(self._agreed.study.aggregation, self._whole_state, update))
        if self._agreed.study.encoding.share_validation:
            self.validation = Validation(*codec.decode_counts(sums[size:], lanes.bits))

    def _check_policy(self, amendment: SealedKeyHeader) -> None:
        """Apply unasked only those amendments that this site's own file allows."""
        allowed = self._file.amendments
        unasked = allowed == "all" or (allowed == "removals" and not amendment.added)
        if not unasked and not self.keys.holds(amendment.key):
            joining = ", ".join(site.name for site in amendment.added) or "nobody"
            leaving = ", ".join(amendment.removed) or "nobody"
            raise SiteFileError(
                f"an amendment with key {amendment.key[:16]}: {joining} would join, {leaving} leave; site.toml says "
                f'amendments = "{allowed}"; accept this one by hand (secfacmic keys accept) or change site.toml'
            )

    def _acknowledgement(self) -> bytes:
        """The signed word that the amendment is applied; the key maker's carries the checkpoint."""
        chain = self._chain
        payload = b""
        if self.name == self._agreed.study.key_maker:
            state = bytes(safetensors.numpy.save(self._whole_state))
            payload = seal_checkpoint(self.keys.secret(chain.key), chain.head, state)
        header = AcknowledgementHeader(
            version=1,
            study=self._agreed.study.id,
            run=chain.run,
            head=chain.head,
            site=self.name,
            checkpoint=self._checkpoint_digest(self._state_digest),
            **payload_fields(payload),
        )
        return sign_frame(ACKNOWLEDGEMENT_MAGIC, header, self._identity.signing, payload)

    def _checkpoint_digest(self, digest: str) -> str:
        return codec.attestation(self._attestation_key(self._chain.key), "checkpoint", self._chain.head, digest)

    def _check_point(self, record: Record) -> None:
        """Compare the adapter with what the members acknowledged, or take it from the checkpoint; then the keys
        before this one are of no more use to anybody, and are destroyed."""
        if self._blind:
            state = open_checkpoint(self.keys.secret(self._chain.key), self._chain.head, record.payload)
            self._set_state(safetensors.numpy.load(state))
        if not hmac.compare_digest(self._checkpoint_digest(self._state_digest), record.checkpoint):
            raise AdapterMismatchError(
                f"the members acknowledged another adapter than the one here after round {self._chain.round}; "
                "this site is damaged or they are: compare by phone"
            )
        self._blind = False
        self.keys.destroy_before(self._chain.key)

    def _check_void(self, record: Record) -> None:
        """A void may only withdraw what was refused here; and what was refused here must be withdrawn."""
        open_round = self._chain.open_round
        if record.header.kind == "void" and not self._refused(open_round):
            raise RecordError(f"void of round {open_round}, which was applied here; only a refused round can be voided")
        if record.header.kind != "void" and self._refused(open_round):
            raise RecordError(f"record {record.header.seq}: round {open_round} was refused here; expected its void")

    def _pin(self, record: Record) -> None:
        """Fix the one candidate of a round before anything is decrypted."""
        folder = self._run_folder / "pins"
        make_folder(folder)
        path = folder / f"{record.header.round:08d}"
        digest = hashlib.sha256(record.data).hexdigest()
        if not path.exists():
            write_durable(path, digest.encode())
        elif path.read_text() != digest:
            self._keep_evidence(record.data)
            raise RecordError(
                f"a second aggregate for round {record.header.round}; one candidate a round is decrypted, never another"
            )

    def _keep_evidence(self, data: bytes) -> None:
        folder = self._run_folder / "evidence"
        make_folder(folder)
        write_durable(folder / f"{hashlib.sha256(data).hexdigest()}.record", data)

    def _refused(self, round_number: int | None) -> bool:
        return round_number is not None and (self._run_folder / "refused" / f"{round_number:08d}").exists()

    def _refusals(self) -> int:
        """Refusals under the key in force."""
        return sum(path.read_text() == self._chain.key for path in (self._run_folder / "refused").glob("*"))

    # --- runs ---

    def _current_run(self) -> str | None:
        path = self._state / "run"
        return path.read_text(encoding="ascii").strip() if path.exists() else None

    def _begin_run(self, run: str, key: str, data: bytes) -> None:
        """Enter the run of a genesis, unless its key belongs to another run."""
        record = Chain(self._agreed).check(data)
        folder = self._state / "runs" / run
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
            for other in (self._state / "runs").iterdir():
                if other.name != run and self._key_of_run(other) == key:
                    raise RecordError(
                        f"genesis of run {run[:16]} names key {key[:16]}, already used in run {other.name[:16]}; "
                        "every run has a new key"
                    )
        records = RecordFolder(folder / "journal")
        if records.file(0).exists() and records.read(0) != data:
            raise RecordError(f"a second genesis of run {run[:16]}, different from the one known here")
        records.append(record)
        write_durable(self._state / "run", run.encode())
        self._enter_run(run)

    def _key_of_run(self, folder: Path) -> str | None:
        first = RecordFolder(folder / "journal").file(0)
        return read_header(first.read_bytes(), self._agreed)[1].key if first.exists() else None

    def _enter_run(self, run: str) -> None:
        """Rebuild the state from the run's journal, from the stored adapter on if it is there."""
        self._run_folder = self._state / "runs" / run
        self._records = RecordFolder(self._run_folder / "journal")
        self._chain = Chain(self._agreed)
        self._set_state(self._initial_state())
        self.validation = None
        self._digests = {}
        self._blind = False
        checking = Chain(self._agreed)
        records = list(self._records.replay(checking))
        start = self._load_adapter([record.id for record in records])
        for record in records[:start]:
            self._chain.advance(record)
        for record in records[start:]:
            self._apply(record)
        self._store_adapter()

    # --- the adapter ---

    def _initial_state(self) -> aggregation.State:
        return aggregation.initial_state(self._agreed.study.aggregation, self._agreed.initial.adapter)

    def _set_state(self, state: aggregation.State) -> None:
        self.parameters: Parameters = aggregation.adapter_of(state)
        self._moments = {name: value for name, value in state.items() if name not in self.parameters}

    @property
    def _whole_state(self) -> aggregation.State:
        return self.parameters | self._moments

    @property
    def _state_digest(self) -> str:
        """SHA-256 of adapter and moments: what sites compare. Without moments, the adapter's."""
        return codec.adapter_digest(self._whole_state)

    def _load_adapter(self, ids: list[str]) -> int:
        """Take the stored adapter if it stands at one of these records; how many records it has applied."""
        try:
            data = (self._run_folder / "adapter.safetensors").read_bytes()
            metadata = _metadata(data)
            start = ids.index(metadata["head"]) + 1
            tensors = safetensors.numpy.load(data)
        except (OSError, KeyError, ValueError, safetensors.SafetensorError):
            return 0
        if codec.adapter_digest(tensors) != metadata["digest"]:
            return 0
        self._set_state(tensors)
        self._digests = {head: (digest, key) for head, (digest, key) in json.loads(metadata["digests"]).items()}
        counts = json.loads(metadata["validation"])
        self.validation = Validation(*counts) if counts else None
        return start

    def _store_adapter(self) -> None:
        if self._blind:
            return  # there is no adapter yet
        digest = self._state_digest
        self._digests[self._chain.head] = (digest, self._chain.key)
        for old in list(self._digests)[:-2]:
            del self._digests[old]
        counts = [self.validation.images, self.validation.correct] if self.validation else []
        metadata = {
            "head": self._chain.head,
            "digest": digest,
            "digests": json.dumps(self._digests),
            "validation": json.dumps(counts),
        }
        data = safetensors.numpy.save(self._whole_state, metadata)
        write_durable(self._run_folder / "adapter.safetensors", bytes(data))

    # --- keys ---

    def _sealer(self) -> Sealer:
        if self._agreed.study.mode == "plain":
            return PlainSealer(self._agreed.lanes)
        return Cipher(self._agreed.lanes, self.keys.secret(self._chain.key))

    def _attestation_key(self, key: str) -> bytes:
        if self._agreed.study.mode == "plain":
            return self._agreed.study.id.encode()  # the server sees the adapter anyway
        return attestation_key(self.keys.secret(key))

    def _can_attest(self, key: str) -> bool:
        return self._agreed.study.mode == "plain" or self.keys.holds(key)


def _metadata(data: bytes) -> dict[str, str]:
    """The metadata of a safetensors file (its numpy interface reads only tensors)."""
    length = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + length])["__metadata__"]
    return {str(key): str(value) for key, value in metadata.items()}

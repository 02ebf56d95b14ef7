"""Makes test vectors in Wycheproof's form: ``python tests/make_vectors.py VERSION``.

A version's folder is made once and then stays: what it holds must stay readable for ever. It has the study, golden
files (sealed keys, envelopes, a journal) and three lists of cases, ``envelope.json, sealed_key.json, record.json``.
A case is ``id, comment, input, result (valid or invalid), flags``. An input is a list of pieces to be joined:
``{"hex": ...}``, or ``{"file": NAME, "from": A, "to": B}`` of a golden file, so that a flipped bit does not cost a
whole ciphertext. ``before`` lists what the receiver took earlier. The private keys in ``keys.json`` are for nothing
but these vectors: other implementations need them to make or open the same things.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cbor2
import numpy as np
import pyrage
import safetensors.numpy
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from secure_fed.core.errors import SecfacmicError
from secure_fed.core.tomlfile import parse_table, to_toml
from secure_fed.privacy import ckks, keys
from secure_fed.protocol import codec, envelope, records, sealed_key
from secure_fed.protocol.initial_state import InitialState
from secure_fed.protocol.ledger_heads import MAX_LINKS, NO_LEDGER, LedgerHead
from secure_fed.protocol.packing import Binding, CipherWire, Contribution, pack_lanes
from secure_fed.protocol.records import new_header
from secure_fed.protocol.residues import PRIMES, expand, linear_check, pack_residues
from secure_fed.protocol.round_frames import (
    ARRIVED_MAGIC,
    COHORT_MAGIC,
    REVEAL_MAGIC,
    Revealed,
    SignedWord,
    arrived_digest,
    arrived_header,
    sign_ready,
    sign_reveal,
    split_word,
)
from secure_fed.protocol.rounds import ReplyCode, RoundReply
from secure_fed.protocol.signing import (
    SignedHeader,
    _decode,
    _hex_to_bytes,
    create_signing_key,
    payload_fields,
    public_hex,
    split_frame,
)
from secure_fed.protocol.study import AgreedStudy, Study, load_study
from secure_fed.server.coordinator import Coordinator
from tests import make_pad_vectors, make_word_vectors

VECTORS = Path(__file__).parent / "vectors"
TRAINING = ("ash", "birch", "cedar")
OBSERVER = "dogwood"
ROUNDS = 12
VALUES = 40

Piece = dict[str, Any]
Case = dict[str, Any]


MODELS: dict[bytes, type[SignedHeader]] = {
    envelope.MAGIC: envelope.EnvelopeHeader,
    records.MAGIC: records.RecordHeader,
    sealed_key.KEY_MAGIC: sealed_key.SealedKeyHeader,
    sealed_key.ACKNOWLEDGEMENT_MAGIC: sealed_key.AcknowledgementHeader,
}


def literal(data: bytes) -> Piece:
    return {"hex": data.hex()}


def fields_of(magic: bytes, header: bytes) -> dict[str, Any]:
    """A header's fields in their order, digests in hex."""
    return _decode(header, list(MODELS[magic].model_fields), 0)


def encoded(magic: bytes, fields: dict[str, Any]) -> bytes:
    """The header of these fields, whatever they are."""
    model = MODELS[magic].model_fields
    names = [name for name in model if name in fields]
    while names and not model[names[-1]].is_required() and fields[names[-1]] in (None, []):  # as encode_header does
        names.pop()
    return cbor2.dumps([_hex_to_bytes(fields[name]) for name in names], canonical=True)


def _outside(piece: Piece, folder: Path) -> Piece:
    """Long literals become files of their own: half the size, and JSON that can be read."""
    data = bytes.fromhex(piece.get("hex", ""))
    if len(data) < 4096:
        return piece
    name = f"data/{hashlib.sha256(data).hexdigest()[:16]}.bin"
    (folder / "data").mkdir(exist_ok=True)
    (folder / name).write_bytes(data)
    return {"file": name, "from": 0, "to": len(data)}


@dataclass
class Golden:
    """A golden file, and pieces of it."""

    name: str
    data: bytes
    magic: bytes
    frame: Any = field(init=False)

    def __post_init__(self) -> None:
        self.frame = split_frame(self.magic, self.data, 10**6, SecfacmicError)

    @property
    def payload_at(self) -> int:
        return len(self.data) - len(self.frame.payload)

    def cut(self, start: int = 0, end: int | None = None) -> Piece:
        return {"file": self.name, "from": start, "to": len(self.data) if end is None else end}

    def whole(self) -> list[Piece]:
        return [self.cut()]

    def payload(self) -> list[Piece]:
        return [self.cut(self.payload_at)]

    def replaced(self, at: int, data: bytes) -> list[Piece]:
        return [self.cut(0, at), literal(data), self.cut(at + len(data))]

    def flipped(self, at: int, bit: int = 0) -> list[Piece]:
        return self.replaced(at, bytes([self.data[at] ^ 1 << bit]))

    @property
    def fields(self) -> dict[str, Any]:
        return fields_of(self.magic, self.frame.header)

    def field_end(self, name: str) -> int:
        """Where the last byte of a header field lies in the file."""
        end = 8  # behind it the array's one byte
        for other, value in self.fields.items():
            end += len(cbor2.dumps(_hex_to_bytes(value), canonical=True))
            if other == name:
                return end
        raise KeyError(name)

    def reframed(self, header: bytes, key: Ed25519PrivateKey, payload: list[Piece] | None = None) -> list[Piece]:
        """Other header bytes under a true signature, around the same payload."""
        start = self.magic + len(header).to_bytes(4, "big") + header + key.sign(self.magic + header)
        return [literal(start), *(self.payload() if payload is None else payload)]

    def with_fields(
        self, signer: Ed25519PrivateKey, pieces: list[Piece] | None = None, /, **fields: Any
    ) -> list[Piece]:
        return self.reframed(encoded(self.magic, self.fields | fields), signer, pieces)


class Cases:
    """A list of cases, numbered in order."""

    def __init__(self, what: str, **flags: str) -> None:
        self.what = what
        self.flags = flags
        self.groups: list[dict[str, Any]] = []
        self.count = 0

    def group(self, comment: str, **context: Any) -> None:
        self.groups.append({"comment": comment, **context, "tests": []})

    def add(self, comment: str, data: list[Piece], result: str, *flags: str, **more: Any) -> None:
        assert set(flags) <= set(self.flags), flags
        self.count += 1
        case = {"id": self.count, "comment": comment, "input": data, "result": result, "flags": list(flags)}
        self.groups[-1]["tests"].append(case | more)

    def write(self, folder: Path) -> None:
        for group in self.groups:
            for case in group["tests"]:
                case["input"] = [_outside(piece, folder) for piece in case["input"]]
        document = {
            "format": 1,
            "algorithm": f"secfacmic {self.what}",
            "notes": self.flags,
            "numberOfTests": self.count,
            "testGroups": self.groups,
        }
        (folder / f"{self.what}.json").write_text(json.dumps(document, indent=1) + "\n")

    def flips(self, golden: Golden, fields: Sequence[str], payload: dict[str, int], **more: Any) -> None:
        """One flipped bit in each part of a frame and each field of its header."""
        parts = {
            "magic": 1,
            "header length": 7,
            **{f"field {name}": golden.field_end(name) for name in fields},
            "signature": golden.payload_at - 20,
            **{name: golden.payload_at + at for name, at in payload.items()},
        }
        for name, at in parts.items():
            self.add(f"a bit flipped in {name}", golden.flipped(at), "invalid", "BitFlip", **more)

    def truncations(self, golden: Golden, **more: Any) -> None:
        sizes = {0: "nothing", 3: "inside the magic", 6: "inside the header's length", 60: "inside the header"}
        sizes |= {golden.payload_at - 1: "inside the signature", golden.payload_at: "before the payload"}
        sizes |= {len(golden.data) - 1: "one byte short"}
        for size, comment in sizes.items():
            self.add(f"truncated: {comment}", [golden.cut(0, size)], "invalid", "Truncated", **more)

    def headers(self, golden: Golden, key: Ed25519PrivateKey, **more: Any) -> None:
        """Headers that their true owner signed but that are not this version in its one encoding."""
        header, content = golden.frame.header, golden.fields
        values = [_hex_to_bytes(value) for value in content.values()]
        version = golden.field_end("version") - 8
        other = {
            "its length in a longer form": bytes([0x98, len(values)]) + header[1:],
            "an array without length": b"\x9f" + header[1:] + b"\xff",
            "a number in a longer form": header[:version] + b"\x18\x02" + header[version + 1 :],
            "a number with a fraction": header[:version] + cbor2.dumps(2.0) + header[version + 1 :],
            "a number of 400 digits": header[:version] + cbor2.dumps(10**400) + header[version + 1 :],
            "a tag around a number": header[:version] + b"\xc1\x02" + header[version + 1 :],
            "fields in another order": cbor2.dumps(values[::-1], canonical=True),
            "a field more": cbor2.dumps([*values, 1], canonical=True),
            "a field less": cbor2.dumps(values[:-1], canonical=True),
            "a map of names": cbor2.dumps(dict(zip(content, values, strict=True)), canonical=True),
            "version 1": encoded(golden.magic, content | {"version": 1}),
            "version 3": encoded(golden.magic, content | {"version": 3}),
            "a number as text": encoded(golden.magic, content | {"size": str(content["size"])}),
            "a negative number": encoded(golden.magic, content | {"size": -1}),
            "a digest in capitals": encoded(golden.magic, content | {"payload": content["payload"].upper()}),
            "a digest as text": cbor2.dumps(
                [content["payload"] if name == "payload" else _hex_to_bytes(content[name]) for name in content],
                canonical=True,
            ),
            "bytes behind it": header + b"\x00",
            "JSON, as in version 1": json.dumps(content, sort_keys=True, separators=(",", ":")).encode(),
            "nested beyond measure": b"\x81" * 200 + b"\x00",
            "no array": b"\xa0",
            "no CBOR": b"\xff" * 64,
            "empty": b"",
        }
        unused = [model.default for model in MODELS[golden.magic].model_fields.values()][len(values) :]
        if unused:
            text = cbor2.dumps([*values, *unused], canonical=True)
            other["fields that its study does not use, written out"] = text
        for comment, text in other.items():
            self.add(f"signed header: {comment}", golden.reframed(text, key), "invalid", "Header", **more)

    def lengths(self, golden: Golden, **more: Any) -> None:
        length = len(golden.frame.header)
        for comment, value in {
            "4 GiB": 2**32 - 1,
            "one more than it is": length + 1,
            "one less than it is": length - 1,
            "zero": 0,
        }.items():
            data = golden.replaced(4, value.to_bytes(4, "big"))
            self.add(f"the header's length says {comment}", data, "invalid", "Length", **more)
        self.add("bytes behind the payload", [golden.cut(), literal(bytes(7))], "invalid", "Length", **more)


class World:
    """The study, its keys, and one honest run: two rounds, a new key, a third round."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        names = (*TRAINING, OBSERVER, "stranger")
        self._folders = {name: Path(tempfile.mkdtemp()) / name for name in names}
        self.identities = {name: keys.create_identity(path, name) for name, path in self._folders.items()}
        self.coordinator_key = create_signing_key(Path(tempfile.mkdtemp()) / "coordinator.key")
        self.agreed = self._study()
        self.sealed = {epoch: keys.create_sealed_key(self.agreed, self.identities["ash"], epoch) for epoch in (1, 2)}
        self.secret = keys.open_sealed_key(self.sealed[1], self.agreed, self.identities["ash"])
        self.cipher = ckks.Cipher(self.agreed.lanes, self.secret)
        self.wire = CipherWire(self.agreed.lanes)
        self.key_id = sealed_key.check_sealed_key(self.sealed[1], self.agreed).key
        self.ciphers = {self.key_id: self.cipher}
        rng = np.random.default_rng(20)
        most = self.agreed.lanes.max_integer
        size = (3, len(TRAINING), self.agreed.lanes.values)
        self.integers = rng.integers(-most, most + 1, size)
        self.coordinator = self._begin()
        self.cohorts: dict[int, Golden] = {}
        self.arrived: dict[int, Golden] = {}
        self.envelopes: dict[tuple[int, str], Golden] = {}
        self.records = {0: self._golden_record(self.coordinator, 0)}
        for number in (1, 2):
            self._round(number)
        self._rotate()
        self._round(3)
        self._write()

    def _study(self) -> AgreedStudy:
        initial = InitialState({"bias": np.zeros(VALUES)}, np.eye(2, 4, dtype=np.float32), 100.0).to_bytes()
        members = (*TRAINING, OBSERVER)
        table = {
            "format": 2,
            "name": "vectors",
            "mode": "he",
            "seed": 1,
            "rounds": ROUNDS,
            "max_sites": 4,
            "min_sites": 3,
            "key_maker": "ash",
            "classes": [{"name": name, "prompts": [f"a {name} image"]} for name in ("dark", "light")],
            "backbone": {"model": "none", "weights": "file", "file": "none.safetensors", "digest": "0" * 64},
            "method": {"adapter": "facmic"},
            "training": {"steps": 1, "learning_rate": 0.1},
            "encoding": {"bits": 16, "lanes": 2, "value_bound": 0.1},
            "sites": [
                {
                    "name": name,
                    "role": "observer" if name == OBSERVER else "train",
                    "keys": self.identities[name].keys.model_dump(mode="json"),
                }
                for name in members
            ],
            "coordinator": public_hex(self.coordinator_key),
            "initial": hashlib.sha256(initial).hexdigest(),
        }
        study = parse_table(table, Study, ValueError, "vectors")  # type: ignore[type-var]
        (self.folder / "study.toml").write_text(to_toml(study))
        (self.folder / "study.safetensors").write_bytes(initial)
        return load_study(self.folder / "study.toml")

    def _begin(self) -> Coordinator:
        return Coordinator.begin(self.agreed, Path(tempfile.mkdtemp()), self.coordinator_key, self.key_id)

    def keep(self, name: str, data: bytes) -> Golden:
        """A golden record of another run than the honest one."""
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        return Golden(name, data, records.MAGIC)

    def seal(
        self,
        coordinator: Coordinator,
        number: int,
        site: str,
        attempt: int = 1,
        ledger: LedgerHead = NO_LEDGER,
        cohort: str | None = None,
    ) -> bytes:
        """A site's envelope, for the true run's COHORT of the round unless another is named."""
        due = coordinator.journal.chain.due
        binding = Binding(run=due.run, head=due.head, round=due.round)
        integers = self.integers[number - 1, TRAINING.index(site)]
        sealed = self.ciphers[due.key].seal(integers, binding, site)
        return envelope.seal_envelope(
            self.agreed,
            due,
            sealed,
            ledger,
            self.identities[site].signing,
            attempt=attempt,
            cohort=self.cohorts[number].frame.digest if cohort is None else cohort,
        )

    def reveals(
        self, due: envelope.RoundPosition, words: Sequence[SignedWord], payload: bytes, own: Mapping[str, bytes]
    ) -> tuple[Revealed, ...]:
        """What the sites would have to say for a record to hold: each its own check, for whatever ARRIVED follows.

        Args:
            due: the record's position.
            words: the contributors' envelope headers, as the record has them.
            payload: its sum.
            own: each site's own payload.
        """
        headers = [fields_of(envelope.MAGIC, word.signed[0]) for word in words]
        if not headers:
            return ()
        facts = len(payload), hashlib.sha256(payload).hexdigest()
        attempt, cohort = headers[0]["attempt"], headers[0]["cohort"]
        digest = arrived_digest(arrived_header(self.agreed, due, attempt, cohort, facts, words))
        found = []
        for header in headers:
            check = self.wire.check_words(digest, own[header["site"] if header["site"] in own else "ash"])
            signing = self.identities[header["site"]].signing
            word = split_word(REVEAL_MAGIC, sign_reveal(self.agreed, digest, header["site"], check, signing))
            found.append(Revealed(*(f"{product:016x}" for product in check), word.signature))
        return tuple(found)

    def _golden_record(self, coordinator: Coordinator, seq: int) -> Golden:
        return Golden(f"journal/{seq:08d}.record", coordinator.journal.read(seq), records.MAGIC)

    def _round(self, number: int) -> None:
        cohort, envelopes, arrived = self.play(self.coordinator, number)
        self.cohorts[number] = Golden(f"cohorts/{number}.cohort", cohort, COHORT_MAGIC)
        self.arrived[number] = Golden(f"arrived/{number}.arrived", arrived, ARRIVED_MAGIC)
        for site, data in envelopes.items():
            self.envelopes[number, site] = Golden(f"envelopes/{number}/{site}.envelope", data, envelope.MAGIC)
        self._keep_record()

    def play(
        self, coordinator: Coordinator, number: int, ledgers: Mapping[str, LedgerHead] | None = None
    ) -> tuple[bytes, dict[str, bytes], bytes]:
        """One round with its four words: its COHORT, the envelopes by site, its ARRIVED."""
        position = len(coordinator.journal.records)

        def send(site: str, code: ReplyCode, data: bytes) -> None:
            coordinator.receive(RoundReply(site, code, coordinator.run, position, "", data))

        due = coordinator.journal.chain.due
        for site in TRAINING:
            send(site, ReplyCode.READY, sign_ready(self.agreed, due, 1, site, False, self.identities[site].signing))
        assert coordinator.advance() is None
        cohort = coordinator._cohort
        assert cohort is not None
        envelopes = {}
        for site in TRAINING:
            ledger = (ledgers or {}).get(site, NO_LEDGER)
            envelopes[site] = self.seal(coordinator, number, site, ledger=ledger, cohort=cohort.digest)
            send(site, ReplyCode.UPDATE, envelopes[site])
        assert coordinator.advance() is None
        arrived = coordinator._arrived
        assert arrived is not None
        for site in TRAINING:
            check = self.wire.check_words(arrived.digest, envelopes[site][-self.wire.payload_bytes :])
            signing = self.identities[site].signing
            send(site, ReplyCode.REVEALED, sign_reveal(self.agreed, arrived.digest, site, check, signing))
        assert coordinator.advance() is not None
        return cohort.data, envelopes, arrived.data

    def _keep_record(self) -> None:
        seq = len(self.records)
        self.records[seq] = self._golden_record(self.coordinator, seq)

    def _rotate(self) -> None:
        """A new key for the same members: the amendment, and its checkpoint."""
        journal = self.coordinator.journal
        sealed = keys.create_sealed_key(self.agreed, self.identities["ash"], 2, self.key_id)
        journal.append_amendment(sealed)
        self._keep_record()
        self.secret = keys.open_sealed_key(sealed, self.agreed, self.identities["ash"])
        self.ciphers[journal.chain.key] = ckks.Cipher(self.agreed.lanes, self.secret)
        adapter = bytes(safetensors.numpy.save({"bias": self.values(2)}))
        self.checkpoint = keys.seal_checkpoint(self.secret, journal.chain.head, adapter)
        journal.append_checkpoint([self.acknowledge(site) for site in TRAINING], self.checkpoint)
        self._keep_record()

    def acknowledge(self, site: str, adapter: str | None = None, **fields: Any) -> Any:
        """A member's signed word that it has applied the amendment, record 3."""
        chain = self.chain(4)
        digest = codec.adapter_digest({"bias": self.values(2)}) if adapter is None else adapter
        attested = codec.attestation(keys.attestation_key(self.secret), "checkpoint", chain.head, digest)
        payload = self.checkpoint if site == "ash" else b""
        content = {
            "version": 2,
            "study": self.agreed.study.id,
            "run": chain.run,
            "head": chain.head,
            "site": site,
            "checkpoint": attested,
            **payload_fields(payload),
        }
        magic = sealed_key.ACKNOWLEDGEMENT_MAGIC
        text = encoded(magic, content | fields)
        data = magic + len(text).to_bytes(4, "big") + text + self.identities[site].signing.sign(magic + text)
        return split_frame(magic, data, 10**6, SecfacmicError)

    def chain(self, length: int) -> records.Chain:
        """The honest chain after so many records."""
        chain = records.Chain(self.agreed)
        for seq in range(length):
            chain.advance(chain.check(self.records[seq].data))
        return chain

    def values(self, rounds: int) -> Any:
        """The adapter after so many rounds."""
        values = np.zeros(VALUES)
        for number in range(rounds):
            sums = self.integers[number].sum(axis=0)[:VALUES]
            bounds = np.full(VALUES, 0.1)
            values = values + codec.average_update(sums, bounds, [1.0] * 3, self.agreed.lanes.max_integer)
        return values

    def _write(self) -> None:
        words = (*self.cohorts.values(), *self.arrived.values())
        for golden in (*words, *self.envelopes.values(), *self.records.values()):
            path = self.folder / golden.name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(golden.data)
        for epoch, data in self.sealed.items():
            (self.folder / f"epoch-{epoch}.sealed").write_bytes(data)
        private = {
            "coordinator": self.coordinator_key.private_bytes_raw().hex(),
            "sites": {
                name: {file: (folder / file).read_text() for file in ("signing.key", "recipient.key", "flower.key")}
                for name, folder in self._folders.items()
            },
        }
        expected = {
            "study": self.agreed.study.id,
            "run": self.coordinator.run,
            "key": self.key_id,
            "heads": [self.chain(length + 1).head for length in self.records],
            "rounds": [0, 1, 2, 2, 2, 3],
            "adapters": [codec.adapter_digest({"bias": self.values(rounds)}) for rounds in range(4)],
            "sums": [self.integers[number].sum(axis=0).tolist() for number in range(3)],
        }
        (self.folder / "keys.json").write_text(json.dumps(private, indent=1) + "\n")
        (self.folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


def envelope_cases(world: World) -> Cases:
    cases = Cases(
        "envelope",
        Honest="As it was sent.",
        BitFlip="One bit of a valid envelope is another.",
        Truncated="Cut short.",
        Length="A length field that lies, or bytes too many.",
        Header="Signed by its true sender, but not this version in its one encoding.",
        WrongPlace="Signed by its true sender for another study, run, journal head, key, amendment, round or attempt.",
        Sender="Not by the site that it names, or by one that sends no updates.",
        Residue="A residue at the edge of, or not below, the modulus q.",
        Replay="Sent before, or a second one of the same site for the same round.",
    )
    first = {site: world.envelopes[1, site] for site in TRAINING}
    now = {site: world.envelopes[2, site] for site in TRAINING}
    ash, key = now["ash"], world.identities["ash"].signing
    cases.group(
        "The coordinator collects round 2, attempt 1.",
        journal=["journal/00000000.record", "journal/00000001.record"],
        sender="ash",
    )
    cases.add("an honest envelope", ash.whole(), "valid", "Honest")
    cases.add("of another site", now["cedar"].whole(), "valid", "Honest", sender="cedar")
    cases.add(
        "after those of others",
        now["birch"].whole(),
        "valid",
        "Honest",
        sender="birch",
        before=[["ash", ash.whole()], ["cedar", now["cedar"].whole()]],
    )
    fields = [name for name in ash.fields if name != "version"]
    size = len(ash.frame.payload)
    cases.flips(ash, ["version", *fields], {"the first residue": 0, "the last residue": size - 1})
    cases.truncations(ash)
    cases.lengths(ash)
    cases.headers(ash, key)
    zero = "0" * 64
    for comment, changed in {
        "wrong study": {"study": "1" * 64},
        "another run": {"run": "1" * 64},
        "another journal head": {"head": "1" * 64},
        "the head of the round before": {"head": first["ash"].fields["head"]},
        "wrong key": {"key": "1" * 64},
        "no key, as in plain mode": {"key": zero},
        "no seed, as in plain mode": {"seed": zero},
        "another amendment": {"amendment": 1},
        "swapped round: the next": {"round": 3},
        "swapped round: the one before": {"round": 1},
        "round 0": {"round": 0},
        "attempt 2": {"attempt": 2},
        "attempt 0": {"attempt": 0},
        "more values than the study has": {"values": 10**9},
        "no values": {"values": 0},
        "a size that is not the payload's": {"size": size - 1},
        "a size of 8 PiB": {"size": 2**53 - 1},
        "a size beyond 2^53": {"size": 2**53},
        "the digest of other bytes": {"payload": "1" * 64},
    }.items():
        cases.add(comment, ash.with_fields(key, **changed), "invalid", "WrongPlace")
    later = ash.with_fields(key, ledger_seq=7, ledger_head="5" * 64)
    cases.add("with a ledger position: the server takes any first one", later, "valid", "Honest")
    for comment, links in {
        "out of order": [[5, "5" * 16], [3, "3" * 16]],
        "one number twice": [[5, "5" * 16], [5, "4" * 16]],
        "to the entry itself": [[7, "5" * 16]],
        "to a later entry": [[8, "5" * 16]],
        "to entry 0": [[0, "0" * 16]],
        "more than there may be": [[number, "5" * 16] for number in range(1, MAX_LINKS + 2)],
        "with an id cut short": [[5, "5" * 15]],
        "with three parts": [[5, "5" * 16, 1]],
    }.items():
        changed = {"ledger_seq": 99 if "more" in comment else 7, "ledger_head": "7" * 64, "ledger_links": links}
        cases.add(f"ledger links {comment}", ash.with_fields(key, **changed), "invalid", "Header")
    for comment, pieces, sender in [
        ("birch's, in ash's reply", now["birch"].whole(), "ash"),
        ("names birch, signed by ash", ash.with_fields(key, site="birch"), "birch"),
        ("names a stranger", ash.with_fields(key, site="stranger"), "ash"),
        ("names nobody", ash.with_fields(key, site=""), "ash"),
        ("names a path", ash.with_fields(key, site="../ash"), "ash"),
        ("of an observer", ash.with_fields(world.identities[OBSERVER].signing, site=OBSERVER), OBSERVER),
        ("signed by the coordinator", ash.with_fields(world.coordinator_key), "ash"),
        ("signed by a stranger", ash.with_fields(world.identities["stranger"].signing), "ash"),
        ("birch's payload under ash's header", [ash.cut(0, ash.payload_at), *now["birch"].payload()], "ash"),
        (
            "ash's signature over birch's header",
            [now["birch"].cut(0, now["birch"].payload_at - 64), ash.cut(ash.payload_at - 64)],
            "birch",
        ),
    ]:
        cases.add(comment, pieces, "invalid", "Sender", sender=sender)
    lanes = world.agreed.lanes
    residues = world.wire.residues(bytes(ash.frame.payload))
    for value, result in (
        (lanes.modulus - 1, "valid"),
        (lanes.modulus, "invalid"),
        (2**lanes.modulus_bits - 1, "invalid"),
    ):
        for place in (0, lanes.coefficients - 1):
            edge = residues.copy()
            edge[place] = value
            payload = pack_residues(edge, lanes.modulus_bits)
            cases.add(
                f"residue {place} is q {value - lanes.modulus:+d}, signed",
                ash.with_fields(key, [literal(payload)], **payload_fields(payload)),
                result,
                "Residue",
            )
    cases.add("replayed from round 1", first["ash"].whole(), "invalid", "Replay")
    cases.add("the same bytes again: counted once", ash.whole(), "valid", "Replay", before=[["ash", ash.whole()]])
    cases.add(
        "a second envelope of the site, with a ledger position",
        later,
        "invalid",
        "Replay",
        before=[["ash", ash.whole()]],
    )
    again = world.seal(_at_round_two(world), 2, "ash")
    cases.add(
        "a second envelope of the site, sealed anew",
        [literal(again)],
        "invalid",
        "Replay",
        before=[["ash", ash.whole()]],
    )
    other = world._begin()
    cases.add("another run's, same keys", [literal(world.seal(other, 2, "ash"))], "invalid", "WrongPlace")
    cases.add("for another cohort", ash.with_fields(key, cohort="1" * 64), "invalid", "WrongPlace")
    cases.group(
        "The coordinator collects round 3 after an amendment.",
        journal=[world.records[seq].name for seq in range(5)],
        sender="ash",
    )
    third = world.envelopes[3, "ash"]
    cases.add("an honest envelope under the new key", third.whole(), "valid", "Honest")
    cases.add("before the amendment", third.with_fields(key, amendment=0), "invalid", "WrongPlace")
    cases.add("under the old key's id", third.with_fields(key, key=world.key_id), "invalid", "WrongPlace")
    return cases


def _at_round_two(world: World) -> Any:
    """What World.seal needs of a coordinator, at the journal after round 1."""

    class At:
        journal = type("Journal", (), {"chain": world.chain(2)})()

    return At()


def sealed_key_cases(world: World) -> Cases:
    cases = Cases(
        "sealed_key",
        Honest="As the key maker made it.",
        BitFlip="One bit of a valid file is another.",
        Truncated="Cut short.",
        Length="A length field that lies, or bytes too many.",
        Header="Signed by the key maker, but not this version in its one encoding.",
        Forged="Not signed by the key maker that the study names.",
        WrongPlace="Signed by the key maker for another study, or with an id that its secret does not have.",
        Recipient="Opened with an identity that it is not sealed to.",
        Content="Signed and sealed by the key maker, but it holds no study secret.",
        Epoch="Older than, or a second one beside, what the site holds.",
    )
    golden = {
        epoch: Golden(f"epoch-{epoch}.sealed", data, sealed_key.KEY_MAGIC) for epoch, data in world.sealed.items()
    }
    one, key = golden[1], world.identities["ash"].signing
    cases.group("A site that holds no key yet.", site="birch")
    for site in (*TRAINING, OBSERVER):
        cases.add(f"opened by {site}", one.whole(), "valid", "Honest", site=site)
    fields = [
        name
        for name in sealed_key.SealedKeyHeader.model_fields
        if name not in ("added", "removed", "rounds", "authority")
    ]
    size = len(one.frame.payload)
    cases.flips(
        one, fields, {"age's header": 3, "a recipient's stanza": 60, "the middle": size // 2, "the end": size - 1}
    )
    cases.truncations(one)
    cases.lengths(one)
    cases.headers(one, key)
    cases.add("opened by a stranger", one.whole(), "invalid", "Recipient", site="stranger")
    for comment, changed in {
        "wrong study": {"study": "1" * 64},
        "wrong key id": {"key": "1" * 64},
        "another epoch than the id is of": {"epoch": 5},
        "epoch 0": {"epoch": 0},
        "made by birch": {"maker": "birch"},
        "made by nobody of the study": {"maker": "stranger"},
    }.items():
        cases.add(comment, one.with_fields(key, **changed), "invalid", "WrongPlace")
    for comment, signer in {
        "signed by another site": world.identities["birch"].signing,
        "signed by the coordinator": world.coordinator_key,
        "signed by a stranger": world.identities["stranger"].signing,
    }.items():
        cases.add(comment, one.with_fields(signer), "invalid", "Forged")
    recipients = [
        pyrage.x25519.Recipient.from_str(world.identities[site].keys.recipient) for site in (*TRAINING, OBSERVER)
    ]
    own = pyrage.encrypt(ckks.StudySecret.generate(world.agreed.lanes.modulus_bits).to_bytes(), recipients)
    cases.add(
        "a key of the server's own, sealed to the sites under the maker's old header",
        [one.cut(0, one.payload_at), literal(own)],
        "invalid",
        "Forged",
    )
    whole = keys.open_sealed_key(world.sealed[1], world.agreed, world.identities["ash"]).to_bytes()
    for comment, content in {
        "an empty payload": b"",
        "no age file": b"not age at all",
        "nothing, sealed": pyrage.encrypt(b"", recipients),
        "text, sealed": pyrage.encrypt(b"secfacmic-ckks-2", recipients),
        "a secret cut short, sealed": pyrage.encrypt(whole[:-1], recipients),
        "a secret with a flipped bit, sealed": pyrage.encrypt(
            whole[:99] + bytes([whole[99] ^ 1]) + whole[100:], recipients
        ),
        "another secret under this id, sealed": own,
    }.items():
        data = one.with_fields(key, [literal(content)], **payload_fields(content))
        cases.add(comment, data, "invalid", "Content")
    cases.add("payload of another epoch", [one.cut(0, one.payload_at), *golden[2].payload()], "invalid", "Content")
    cases.group("A site that holds epoch 2.", site="birch", before=[golden[2].whole()])
    cases.add("the same file again", golden[2].whole(), "valid", "Epoch")
    cases.add("an older epoch", one.whole(), "invalid", "Epoch")
    second = keys.create_sealed_key(world.agreed, world.identities["ash"], 2)
    cases.add("a second key of the epoch", [literal(second)], "invalid", "Epoch")
    return cases


class Forger:
    """A server with the coordinator's true key, continuing a chain with whatever it likes."""

    def __init__(self, world: World, length: int) -> None:
        self.world = world
        self.chain = world.chain(length)
        self.sent: list[list[Piece]] = [world.records[seq].whole() for seq in range(length)]

    def headers(self, number: int, sites: Sequence[str]) -> tuple[SignedWord, ...]:
        """The sites' signed envelope headers of a round."""
        return tuple(
            SignedWord.of(golden.frame.header, golden.frame.signature)
            for golden in (self.world.envelopes[number, site] for site in sites)
        )

    def record(
        self,
        payload: bytes,
        pieces: list[Piece] | None = None,
        *,
        kind: str = "aggregate",
        number: int | None = None,
        contributors: tuple[SignedWord, ...] | None = None,
        own: Mapping[str, bytes] | None = None,
        signer: Ed25519PrivateKey | None = None,
        **fields: Any,
    ) -> list[Piece]:
        chain = self.chain
        default = self.headers(chain.round + 1, TRAINING) if kind == "aggregate" and contributors is None else ()
        words = default if contributors is None else contributors
        if own is None:
            number_ = min(3, chain.round + 1)
            own = {site: bytes(self.world.envelopes[number_, site].frame.payload) for site in TRAINING}
        reveals = self.world.reveals(chain.due, words, payload, own) if kind == "aggregate" else ()
        header = new_header(
            chain,
            kind,  # type: ignore[arg-type]
            run=fields.pop("run", chain.run),
            key=fields.pop("key", chain.key),
            round_number=chain.round + (kind == "aggregate") if number is None else number,
            contributors=words,
            reveals=reveals,
            times_ms=(1, 2),
            payload=payload,
        )
        content = header.model_dump(mode="json") | fields
        text = encoded(records.MAGIC, content)
        key = signer or self.world.coordinator_key
        start = records.MAGIC + len(text).to_bytes(4, "big") + text + key.sign(records.MAGIC + text)
        return [literal(start), *(pieces if pieces is not None else [literal(payload)] if payload else [])]

    def take(self, pieces: list[Piece]) -> None:
        """Go on behind this record."""
        self.chain.advance(self.chain.check(join(pieces, self.world.folder)))
        self.sent.append(pieces)


def join(pieces: list[Piece], folder: Path) -> bytes:
    """An input's bytes."""
    parts = []
    for piece in pieces:
        if "hex" in piece:
            parts.append(bytes.fromhex(piece["hex"]))
        else:
            parts.append((folder / piece["file"]).read_bytes()[piece["from"] : piece["to"]])
    return b"".join(parts)


def record_cases(world: World) -> Cases:
    cases = Cases(
        "record",
        Honest="As the coordinator made it.",
        BitFlip="One bit of a valid record is another.",
        Truncated="Cut short.",
        Length="A length field that lies, or bytes too many.",
        Header="Signed by the coordinator, but not this version in its one encoding.",
        WrongPlace="Signed by the coordinator for another study, run, key, round or place in the chain.",
        Signer="Not signed by the coordinator that the study names.",
        Cohort="Contributors below the quorum, twice, unsorted, unknown, or not of this round.",
        Reveal="A REVEAL that is missing, another's, for another ARRIVED or with a wrong check.",
        Forgery="A sum that is not of its contributors' envelopes, though they revealed for it; nothing is decrypted.",
        SecondRecord="Two records for one round.",
        Amendment="A new key or its checkpoint, honest or not what the members signed.",
        Ledger="A contributor whose privacy ledger does, or does not, continue the one seen before.",
    )
    key = world.coordinator_key
    golden = world.records
    cases.group("A site with the genesis only.", site=OBSERVER, before=[golden[0].whole()])
    cases.add("the honest aggregate of round 1", golden[1].whole(), "valid", "Honest", adapter=1)
    cases.add("the genesis again: known already", golden[0].whole(), "valid", "Honest", adapter=0)
    cases.add(
        "the aggregate of round 2, one too early", golden[2].whole(), "invalid", "WrongPlace", error="RecordError"
    )
    refused = {"error": "RecordError"}
    one = golden[1]
    size = len(one.frame.payload)
    fields = list(one.fields)
    places = {"the first residue": 0, "the middle": size // 2, "the last residue": size - 1}
    cases.flips(one, fields, places, **refused)
    cases.truncations(one, **refused)
    cases.lengths(one, **refused)
    cases.headers(one, key, **refused)
    first, *others = one.fields["contributors"]
    moved = encoded(envelope.MAGIC, fields_of(envelope.MAGIC, bytes.fromhex(first[0])) | {"round": 2})
    cases.add(
        "a contributor's header changed by the coordinator",
        one.with_fields(key, contributors=[[moved.hex(), first[1]], *others]),
        "invalid",
        "Cohort",
        **refused,
    )
    for comment, changed in {
        "wrong study": {"study": "1" * 64},
        "another run": {"run": "1" * 64},
        "wrong key": {"key": "1" * 64},
        "no key": {"key": "0" * 64},
        "after another record": {"previous": "1" * 64},
        "number 0": {"seq": 0, "previous": "0" * 64},
        "number 2": {"seq": 2},
        "round 2": {"round": 2},
        "round 0": {"round": 0},
        "a genesis": {"kind": "genesis"},
        "a void, which there is none of": {"kind": "void"},
        "an unknown kind": {"kind": "retract"},
        "a payload of another size": {"size": size + 1},
        "a payload of 8 PiB": {"size": 2**53 - 1},
        "the digest of other bytes": {"payload": "1" * 64},
    }.items():
        cases.add(comment, one.with_fields(key, **changed), "invalid", "WrongPlace", **refused)
    for comment, signer in {
        "signed by a site": world.identities["ash"].signing,
        "signed by a stranger": world.identities["stranger"].signing,
    }.items():
        cases.add(comment, one.with_fields(signer), "invalid", "Signer", **refused)
    forger = Forger(world, 1)
    payloads = {site: bytes(world.envelopes[1, site].frame.payload) for site in TRAINING}

    def summed(sites: Sequence[str]) -> bytes:
        total = world.wire.zero()
        for site in sites:
            total = world.wire.add(total, payloads[site])
        return world.wire.record(total, len(sites))

    honest = summed(TRAINING)
    assert honest == bytes(one.frame.payload)
    ash, birch, cedar = forger.headers(1, TRAINING)
    other_run = world._begin()
    strange = {site: Golden("", world.seal(other_run, 1, site), envelope.MAGIC) for site in TRAINING}
    foreign = tuple(SignedWord.of(golden.frame.header, golden.frame.signature) for golden in strange.values())
    text = encoded(envelope.MAGIC, fields_of(envelope.MAGIC, ash.signed[0]) | {"site": OBSERVER})
    observer = SignedWord.of(text, world.identities[OBSERVER].signing.sign(envelope.MAGIC + text))
    unsigned = SignedWord(header=birch.header, signature=ash.signature)
    lists: dict[str, tuple[tuple[SignedWord, ...], bytes]] = {
        "nobody": ((), honest),
        "one site": ((ash,), summed(["ash"])),
        "two sites, below min_sites": ((ash, birch), summed(["ash", "birch"])),
        "a site twice": ((ash, ash, birch), summed(["ash", "ash", "birch"])),
        "a site twice beside all others": ((ash, ash, birch, cedar), summed(["ash", *TRAINING])),
        "sites in another order": ((birch, ash, cedar), honest),
        "an observer among them": ((ash, birch, cedar, observer), summed([*TRAINING, "ash"])),
        "a signature of another site": ((ash, unsigned, cedar), honest),
        "envelopes of round 2": (forger.headers(2, TRAINING), honest),
        "envelopes of another run": (foreign, honest),
        "more than max_sites": ((ash,) * 5, honest),
    }
    for comment, (contributors, payload) in lists.items():
        pieces = one.payload() if payload == honest else None
        cases.add(
            f"contributors: {comment}",
            forger.record(payload, pieces, contributors=contributors),
            "invalid",
            "Cohort",
            **refused,
        )
    abroad = {name: bytes(item.frame.payload) for name, item in strange.items()}
    forgeries = _forgeries(world, payloads, honest, abroad, summed)
    for comment, payload in forgeries.items():
        cases.add(comment, forger.record(payload), "invalid", "Forgery", **refused)

    reveals = one.fields["reveals"]
    foreign_word = golden[2].fields["reveals"][0]
    wrong = world.reveals(forger.chain.due, forger.headers(1, TRAINING), honest, dict.fromkeys(TRAINING, honest))
    swapped = [[*reveals[0][:2], reveals[1][2]], *reveals[1:]]
    for comment, words in {
        "of nobody": [],
        "of two only": reveals[:2],
        "of one twice": [reveals[0], reveals[0], reveals[2]],
        "in another order": [reveals[1], reveals[0], reveals[2]],
        "of another round": [foreign_word, *reveals[1:]],
        "with another site's signature": swapped,
        "with wrong checks, signed": [list(word) for word in wrong],
    }.items():
        cases.add(f"reveals {comment}", one.with_fields(key, reveals=words), "invalid", "Reveal", **refused)
    bad = forgeries["one site twice, one left out"]
    bad_record = forger.record(bad)
    cases.group("A site that applied round 1.", site=OBSERVER, before=[golden[0].whole(), one.whole()])
    cases.add("the honest aggregate of round 2", golden[2].whole(), "valid", "Honest", adapter=2)
    cases.add("the record of round 1 again", one.whole(), "valid", "Honest", adapter=1)
    cases.add(
        "a second record for round 1, same sum", one.with_fields(key, closed_ms=5), "invalid", "SecondRecord", **refused
    )
    cases.add("a second record for round 1, other sum", bad_record, "invalid", "SecondRecord", **refused)
    cases.add(
        "round 1 once more as record 2",
        Forger(world, 2).record(honest, one.payload(), contributors=forger.headers(1, TRAINING), number=1),
        "invalid",
        "SecondRecord",
        **refused,
    )
    cases.add(
        "round 1's envelopes as round 2",
        Forger(world, 2).record(honest, one.payload(), contributors=forger.headers(1, TRAINING)),
        "invalid",
        "Cohort",
        **refused,
    )
    cases.add(
        "round 1's sum under round 2's headers",
        Forger(world, 2).record(honest, one.payload()),
        "invalid",
        "Forgery",
        **refused,
    )
    cases.add(
        "a second genesis", Forger(world, 2).record(b"", kind="genesis", number=0), "invalid", "WrongPlace", **refused
    )
    cases.add(
        "another run's genesis, same key", [literal(other_run.journal.read(0))], "invalid", "WrongPlace", **refused
    )
    unknown = Forger(world, 0).record(b"", kind="genesis", number=0, run="8" * 64, key="9" * 64)
    cases.add("another run's genesis, unknown key", unknown, "invalid", "WrongPlace", **refused)
    plain = Forger(world, 0).record(b"", kind="genesis", number=0, run="8" * 64, key="0" * 64)
    cases.add("another run's genesis, in plain mode", plain, "invalid", "WrongPlace", **refused)

    _amendment_cases(world, cases)
    return cases


def _amendment_cases(world: World, cases: Cases) -> None:
    """A new key in the journal, its checkpoint, and the first aggregate under it."""
    golden, signing = world.records, world.identities["ash"].signing
    refused = {"error": "RecordError"}

    def before(length: int) -> list[list[Piece]]:
        return [golden[seq].whole() for seq in range(length)]

    amendment, checkpoint = golden[3], golden[4]
    payload = bytes(amendment.frame.payload)
    sealed = Golden("", payload, sealed_key.KEY_MAGIC)
    content = sealed.fields
    others = {
        "that follows no key": world.sealed[2],
        "whose header the coordinator signed": _joined(sealed, sealed.frame.header, world.coordinator_key),
        "that names a recipient too many": _edited(sealed, signing, recipients=[*content["recipients"], "stranger"]),
        "that leaves a recipient out in silence": _edited(sealed, signing, recipients=content["recipients"][:-1]),
        "by which the key maker leaves": _edited(
            sealed, signing, removed=["ash"], recipients=["birch", "cedar", OBSERVER]
        ),
        "that leaves fewer than min_sites": _edited(
            sealed, signing, removed=["birch"], recipients=["ash", "cedar", OBSERVER]
        ),
        "by which a stranger leaves": _edited(sealed, signing, removed=["stranger"]),
        "that follows another key": _edited(sealed, signing, previous="1" * 64),
        "of another study": _edited(sealed, signing, study="1" * 64),
    }
    cases.group("A site that applied round 2, under key 1.", site=OBSERVER, before=before(3))
    cases.add("a new key for the same members", amendment.whole(), "valid", "Amendment", adapter=2)
    for name, at in {"the sealed key's header": 80, "age's file": len(payload) // 2}.items():
        cases.add(
            f"a bit flipped in {name}", amendment.flipped(amendment.payload_at + at), "invalid", "BitFlip", **refused
        )
    forger = Forger(world, 3)
    for comment, data in others.items():
        key = Golden("", data, sealed_key.KEY_MAGIC).fields["key"]
        record = forger.record(data, kind="amendment", number=3, key=key)
        cases.add(f"a sealed key {comment}", record, "invalid", "Amendment", **refused)
    for comment, fields in {
        "under another key's id": {"key": "1" * 64},
        "under the old key's id": {"key": world.key_id},
        "in force from round 4": {"round": 4},
        "in force from a round that is over": {"round": 2},
    }.items():
        pieces = amendment.with_fields(world.coordinator_key, **fields)
        cases.add(f"a new key {comment}", pieces, "invalid", "Amendment", **refused)
    cases.add(
        "a checkpoint without an amendment",
        forger.record(b"", kind="checkpoint", number=3),
        "invalid",
        "Amendment",
        **refused,
    )
    cases.add("an aggregate under the key to come", golden[5].whole(), "invalid", "WrongPlace", **refused)

    cases.group("A site that applied the amendment.", site=OBSERVER, before=before(4))
    cases.add("its checkpoint", checkpoint.whole(), "valid", "Amendment", adapter=2)
    forger = Forger(world, 4)
    one = {site: world.acknowledge(site) for site in TRAINING}
    other = {site: world.acknowledge(site, adapter="2" * 64) for site in TRAINING}
    lists: dict[str, tuple[list[Any], bytes]] = {
        "by nobody": ([], world.checkpoint),
        "by fewer than min_sites": ([one["ash"], one["birch"]], world.checkpoint),
        "without the key maker": ([one["birch"], one["cedar"], world.acknowledge(OBSERVER)], world.checkpoint),
        "by one twice": ([one["ash"], one["birch"], one["birch"]], world.checkpoint),
        "by a stranger": ([*one.values(), world.acknowledge("stranger")], world.checkpoint),
        "of different adapters": ([one["ash"], one["birch"], other["cedar"]], world.checkpoint),
        "of another amendment": (
            [one["ash"], one["birch"], world.acknowledge("cedar", head="3" * 64)],
            world.checkpoint,
        ),
        "of another run": ([one["ash"], one["birch"], world.acknowledge("cedar", run="3" * 64)], world.checkpoint),
        "with another payload than the key maker's": (list(one.values()), world.checkpoint[:-1] + b"?"),
        "without the key maker's payload": (list(one.values()), b""),
    }
    for comment, (frames, data) in lists.items():
        record = forger.record(data, kind="checkpoint", number=3, contributors=_signed(frames))
        cases.add(f"acknowledged {comment}", record, "invalid", "Amendment", **refused)
    record = forger.record(world.checkpoint, kind="checkpoint", number=3, contributors=_signed(list(other.values())))
    cases.add(
        "acknowledged with an adapter that is not here", record, "invalid", "Amendment", error="AdapterMismatchError"
    )
    cases.add("an aggregate in its place", golden[5].whole(), "invalid", "WrongPlace", **refused)
    again = forger.record(payload, amendment.payload(), kind="amendment", number=3)
    cases.add("a second amendment in its place", again, "invalid", "Amendment", **refused)

    cases.group("A site that holds key 2 with its checkpoint.", site=OBSERVER, before=before(5))
    cases.add("the honest aggregate of round 3", golden[5].whole(), "valid", "Honest", adapter=3)
    old = golden[5].with_fields(world.coordinator_key, key=world.key_id)
    cases.add("an aggregate under the old key's id", old, "invalid", "WrongPlace", **refused)
    cases.add("the amendment again: known already", amendment.whole(), "valid", "Amendment", adapter=2)


def _signed(frames: Sequence[Any]) -> tuple[SignedWord, ...]:
    return tuple(SignedWord.of(frame.header, frame.signature) for frame in frames)


def _joined(sealed: Golden, text: bytes, key: Ed25519PrivateKey) -> bytes:
    """A sealed key file with another header under a signature."""
    start = sealed.magic + len(text).to_bytes(4, "big") + text + key.sign(sealed.magic + text)
    return start + bytes(sealed.frame.payload)


def _edited(sealed: Golden, key: Ed25519PrivateKey, **fields: Any) -> bytes:
    return _joined(sealed, encoded(sealed.magic, sealed.fields | fields), key)


def _ledger_cases(world: World, cases: Cases) -> None:
    """Two rounds of a run in which ash has a privacy ledger, and copies of that ledger that went their own way."""
    run = world._begin()
    ledgers = {1: LedgerHead(7, "a" * 64), 2: LedgerHead(12, "b" * 64, ((4, "9" * 16), (7, "a" * 16)))}
    played = {number: world.play(run, number, {"ash": ledger}) for number, ledger in ledgers.items()}
    own = {site: data[-world.wire.payload_bytes :] for site, data in played[2][1].items()}
    golden = [world.keep(f"ledger/{seq:08d}.record", run.journal.read(seq)) for seq in range(3)]
    cases.group(
        "A site that applied round 1, in which ash's ledger stood at entry 7.",
        site=OBSERVER,
        before=[golden[0].whole(), golden[1].whole()],
    )
    cases.add("the ledger continues the one seen", golden[2].whole(), "valid", "Ledger", adapter=2)
    others = golden[2].fields["contributors"]
    first = fields_of(envelope.MAGIC, bytes.fromhex(others[0][0]))
    due = envelope.RoundPosition(*(first[name] for name in ("run", "head", "key", "amendment", "round")))
    header = fields_of(envelope.MAGIC, bytes.fromhex(others[0][0]))
    signing = world.identities["ash"].signing
    for comment, fields, result in [
        ("the same entry as before", {"ledger_seq": 7, "ledger_head": "a" * 64, "ledger_links": []}, "valid"),
        ("an older entry", {"ledger_seq": 6, "ledger_links": []}, "invalid"),
        ("no ledger any more", {"ledger_seq": 0, "ledger_head": "0" * 64, "ledger_links": []}, "invalid"),
        ("another entry of the same number", {"ledger_seq": 7, "ledger_links": []}, "invalid"),
        ("a copy that has grown and names nothing", {"ledger_links": []}, "invalid"),
        ("a copy that has grown and names its own entry 7", {"ledger_links": [[7, "c" * 16]]}, "invalid"),
        ("a copy that has grown and names others", {"ledger_links": [[4, "9" * 16], [9, "c" * 16]]}, "invalid"),
        ("a copy that has grown far", {"ledger_seq": 2**53 - 1, "ledger_links": [[900, "c" * 16]]}, "invalid"),
    ]:
        text = encoded(envelope.MAGIC, header | fields)
        contributors = [[text.hex(), signing.sign(envelope.MAGIC + text).hex()], *others[1:]]
        words = [SignedWord(*word) for word in contributors]
        reveals = world.reveals(due, words, bytes(golden[2].frame.payload), own)
        pieces = golden[2].with_fields(
            world.coordinator_key, contributors=contributors, reveals=[list(word) for word in reveals]
        )
        more = {"adapter": 2} if result == "valid" else {"error": "LedgerRollbackError"}
        cases.add(f"ash's ledger: {comment}", pieces, result, "Ledger", **more)


def _forgeries(
    world: World,
    payloads: dict[str, bytes],
    honest: bytes,
    foreign: dict[str, bytes],
    summed: Callable[..., bytes],
) -> dict[str, bytes]:
    """Sums that a server can compute without any key."""
    wire, lanes = world.wire, world.agreed.lanes
    residues = wire.residues(honest).astype(object)

    def packed(values: Any) -> bytes:
        return pack_residues((values % lanes.modulus).astype(np.uint64), lanes.modulus_bits)

    def shifted(place: int, by: int) -> bytes:
        integers = np.zeros(lanes.values, np.int64)
        integers[place] = by
        return packed(residues + pack_lanes(integers, lanes) * lanes.scale)

    def added(parts: Sequence[bytes]) -> bytes:
        total = wire.zero()
        for payload in parts:
            total = wire.add(total, payload)
        return wire.record(total, 3)

    padding = residues.copy()
    padding[-1] += lanes.scale << lanes.lane_bits
    forged_q = bytearray(honest)
    forged_q[:7] = b"\xff" * 7
    return {
        "one site's ciphertext alone, as if three took part": added([payloads["ash"]]),
        "one site thrice": summed(["ash", "ash", "ash"]),
        "one site twice, one left out": summed(["ash", "birch", "birch"]),
        "one site left out": summed(["ash", "birch"]),
        "one site added once more": summed(["ash", *TRAINING]),
        "scaled by two": packed(residues * 2),
        "scaled by 1024, which once gave the key away": packed(residues * 1024),
        "negated": packed(-residues),
        "one value more by one": shifted(0, 1),
        "one value less by one": shifted(VALUES - 1, -1),
        "the padding written to": packed(padding),
        "half a step added to each coefficient": packed(residues + lanes.scale // 2),
        "a residue not below q": bytes(forged_q),
        "nothing at all": wire.record(wire.zero(), 3),
        "another run's sum": added(list(foreign.values())),
        "one envelope of another run": added([payloads["ash"], payloads["birch"], foreign["cedar"]]),
    }


def arithmetic(folder: Path) -> None:
    """What other implementations must compute alike: streams (words left out included), packing, the linear check."""
    key = hashlib.sha256(b"a key").hexdigest()
    moduli = {"a prime of 44 bits": PRIMES[44], "a prime of 57 bits": PRIMES[57], "a small one, which leaves out": 37}
    streams = [
        {
            "comment": comment,
            "key": key,
            "modulus": modulus,
            "residues": expand(bytes.fromhex(key), 24, modulus).tolist(),
        }
        for comment, modulus in moduli.items()
    ]
    binding, who = Binding("1" * 64, "2" * 64, 3), Contribution("ash", "4" * 64)
    keys_of_streams = [
        {
            "run": binding.run,
            "head": binding.head,
            "round": binding.round,
            "site": who.site,
            "seed": who.seed,
            "key": ckks.stream_key(binding, who).hex(),
        }
    ]
    packings, checks = [], []
    for bits in sorted(PRIMES):
        residues = expand(bytes([bits]) * 32, 16, PRIMES[bits])
        residues[:2] = 0, PRIMES[bits] - 1
        packings.append(
            {"bits": bits, "modulus": PRIMES[bits], "residues": residues.tolist()}
            | {"packed": pack_residues(residues, bits).hex()}
        )
        checks.append(
            {"digest": key, "modulus": PRIMES[bits], "residues": residues.tolist()}
            | {"check": list(linear_check(key, residues, PRIMES[bits]))}
        )
    document = {"streams": streams, "stream_keys": keys_of_streams, "packings": packings, "linear_checks": checks}
    (folder / "arithmetic.json").write_text(json.dumps(document, indent=1) + "\n")


def main(version: str) -> None:
    folder = VECTORS / version
    if folder.exists():
        raise SystemExit(f"{folder}: exists; a version's vectors are made once: choose another, or remove it first")
    folder.mkdir(parents=True)
    arithmetic(folder)
    make_pad_vectors.write(folder)
    make_word_vectors.write(folder)
    world = World(folder)
    for cases in (envelope_cases(world), sealed_key_cases(world), record_cases(world)):
        if cases.what == "record":
            _ledger_cases(world, cases)
        cases.write(folder)
        print(f"{cases.what}: {cases.count} cases")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "v2")

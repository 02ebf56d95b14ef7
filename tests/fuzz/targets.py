"""What the fuzzer feeds: every decoder of bytes that others made, with a corpus of true ones.

A target takes bytes and either returns or raises a typed error. ``genuine`` are the only inputs of it that may be
accepted where a signature or digest covers every byte; a target without such cover has None.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, RecordDict

from secure_fed.core.errors import EnvelopeError, KeyFileError, ProtocolError, RecordError, SecfacmicError
from secure_fed.privacy import ckks, keys, seal_format
from secure_fed.privacy.ckks import StudySecret
from secure_fed.protocol.envelope import MAGIC as ENVELOPE_MAGIC
from secure_fed.protocol.envelope import RoundPosition, check_position, open_envelope
from secure_fed.protocol.initial_state import InitialState
from secure_fed.protocol.journal import find_runs, verify_run
from secure_fed.protocol.packing import CipherWire, PlainWire
from secure_fed.protocol.recompute import EnvelopeStore
from secure_fed.protocol.records import MAGIC as RECORD_MAGIC
from secure_fed.protocol.records import Chain
from secure_fed.protocol.residues import unpack_residues
from secure_fed.protocol.sealed_key import (
    KEY_MAGIC,
    SealedKeyHeader,
    check_amendment,
    check_sealed_key,
    verify_acknowledgement,
)
from secure_fed.protocol.share_frames import deal, hand_out, open_handed, take_handed
from secure_fed.protocol.signing import encode_header, parse_header, payload_fields, split_frame
from secure_fed.protocol.study import load_study, read_study_file
from secure_fed.transport import flower_messages as messages
from tests.make_pad_vectors import NAMES, drawn, pads_of, place
from tests.make_word_vectors import CHECKS
from tests.unit.protocol.test_vectors import VECTORS, Version

VERSION = "v2"


@dataclass(frozen=True)
class Target:
    """A decoder.

    Attributes:
        feed: gives it bytes; raises what it raises.
        corpus: true inputs, to be mutated.
        genuine: whether only the corpus may be accepted.
        errors: the errors it may raise.
    """

    feed: Callable[[bytes], Any]
    corpus: tuple[bytes, ...]
    genuine: bool
    errors: type[SecfacmicError]


@cache
def world() -> Any:
    """The golden study and what its receivers hold."""

    class World:
        version = Version(VERSION)
        agreed = version.agreed
        temporary = tempfile.TemporaryDirectory()
        folder = Path(temporary.name)
        ash = version.identity("ash", folder / "ash")
        sealed = (VECTORS / VERSION / "epoch-1.sealed").read_bytes()
        secret = keys.open_sealed_key(sealed, agreed, ash)
        members = {site.name: site for site in agreed.study.sites}  # noqa: RUF012
        wire = CipherWire(agreed.lanes)

    return World


@cache
def golden(pattern: str) -> tuple[bytes, ...]:
    """Golden files."""
    return tuple(path.read_bytes() for path in sorted((VECTORS / VERSION).glob(pattern)))


@cache
def _chain(length: int) -> Chain:
    """The golden chain so far; checking changes nothing, so that one serves all."""
    chain = Chain(world().agreed)
    for data in golden("journal/*.record")[:length]:
        chain.advance(chain.check(data))
    return chain


def _position() -> RoundPosition:
    return _chain(1).due


def envelope(data: bytes) -> None:
    opened = open_envelope(data, world().agreed, world().members, world().wire.payload_bytes)
    check_position(opened.header, _position())
    world().wire.add(world().wire.zero(), opened.payload)


def record(data: bytes, length: int = 1) -> None:
    _chain(length).check(data)


def amendment_record(data: bytes) -> None:
    record(data, 3)


def checkpoint_record(data: bytes) -> None:
    record(data, 4)


def sealed(data: bytes) -> None:
    check_sealed_key(data, world().agreed)
    keys.open_sealed_key(data, world().agreed, world().ash)


def _resigned(magic: bytes, header: bytes, payload: bytes, key: Any) -> bytes:
    return magic + len(header).to_bytes(4, "big") + header + key.sign(magic + header) + payload


def signed_envelope(header: bytes) -> None:
    """A header that its sender truly signed."""
    frame = split_frame(ENVELOPE_MAGIC, golden("envelopes/1/ash.envelope")[0], 10**6, EnvelopeError)
    envelope(_resigned(ENVELOPE_MAGIC, header, bytes(frame.payload), world().ash.signing))


def signed_record(header: bytes) -> None:
    """A header that the coordinator truly signed."""
    frame = split_frame(RECORD_MAGIC, golden("journal/00000001.record")[0], 10**6, RecordError)
    record(_resigned(RECORD_MAGIC, header, bytes(frame.payload), world().version.coordinator_key))


def signed_amendment(header: bytes) -> None:
    """A header that the key maker truly signed, as an amendment."""
    frame = split_frame(KEY_MAGIC, world().sealed, 10**6, KeyFileError)
    data = _resigned(KEY_MAGIC, header, bytes(frame.payload), world().ash.signing)
    check_amendment(data, world().agreed, world().members, "0" * 64)


def sealed_content(payload: bytes) -> None:
    """An age file that the key maker truly signed."""
    frame = split_frame(KEY_MAGIC, world().sealed, 10**6, KeyFileError)
    read = parse_header(frame.header, SealedKeyHeader, KeyFileError)
    header = encode_header(read.model_copy(update=dict(payload_fields(payload))))
    keys.open_sealed_key(_resigned(KEY_MAGIC, header, payload, world().ash.signing), world().agreed, world().ash)


def acknowledgement(header: bytes) -> None:
    verify_acknowledgement(header, bytes(64), world().agreed, world().members, "0" * 64, "0" * 64)


def secret(data: bytes) -> None:
    StudySecret.from_bytes(data)


def seal_key(data: bytes) -> None:
    """SEAL's own parser, behind our checks."""
    ckks.Cipher(world().agreed.lanes, StudySecret(world().secret.modulus_bits, data, bytes(32)))


def seal_ciphertext(data: bytes) -> None:
    seal_format.ciphertext_words(data, _cipher()._parms_id, 2, ntt=True)


@cache
def _cipher() -> ckks.Cipher:
    return ckks.Cipher(world().agreed.lanes, world().secret)


@cache
def saved_ciphertexts() -> tuple[bytes, ...]:
    zero = ckks.sealapi.Ciphertext(_cipher()._context)
    _cipher()._encryptor.encrypt_zero_symmetric(zero)
    compressed = seal_format.save(zero)
    words = seal_format.ciphertext_words(compressed, _cipher()._parms_id, 2, ntt=True)
    return compressed, seal_format.ciphertext(words, _cipher()._parms_id)


def residues(data: bytes) -> None:
    bits = world().agreed.lanes.modulus_bits
    unpack_residues(data[: len(data) // bits * bits], bits)


def payload(data: bytes) -> None:
    world().wire.add(world().wire.zero(), data)


def plain_payload(data: bytes) -> None:
    plain = PlainWire(world().agreed.lanes)
    plain.add(plain.zero(), data)


def checkpoint(data: bytes) -> None:
    keys.open_checkpoint(world().secret, "0" * 64, data)


def _file(data: bytes, name: str) -> Path:
    path = world().folder / name
    path.write_bytes(data)
    return path


def public_identity(data: bytes) -> None:
    keys.read_public_identity(_file(data, "site.pub"))


def private_key(data: bytes) -> None:
    path = _file(data, "ash/recipient.key")
    path.chmod(0o600)
    keys.load_identity(world().folder / "ash", "ash")


def study_file(data: bytes) -> None:
    read_study_file(_file(data, "study.toml"))


def whole_study(data: bytes) -> None:
    """A study and what it names, the digest of ``study.safetensors`` checked."""
    _file((VECTORS / VERSION / "study.toml").read_bytes(), "whole.toml")
    _file(data, "whole.safetensors")
    load_study(world().folder / "whole.toml")


def initial_state(data: bytes) -> None:
    InitialState.from_bytes(data)


def journal_folder(data: bytes) -> None:
    """What ``secfacmic journal`` reads: a record of a folder, and a kept envelope."""
    folder = world().folder / "journal"
    folder.mkdir(exist_ok=True)
    (folder / "00000000.record").write_bytes(data)
    (folder / "x.envelope").write_bytes(data)
    EnvelopeStore(folder)
    for run in find_runs(folder):
        list(verify_run(run, world().agreed))


def reply(data: bytes) -> None:
    """A reply's fields as JSON text, in a message."""
    try:
        fields = json.loads(data)
        config = ConfigRecord(fields)
    except (ValueError, TypeError, RecursionError, AttributeError):
        return  # Flower itself carries nothing else
    messages.read_reply(RecordDict({"reply": config}), "ash", lambda digest, length: b"abc")


def request(data: bytes) -> None:
    """A request's fields as JSON text, in a message."""
    try:
        fields = json.loads(data)
        config = ConfigRecord(fields)
    except (ValueError, TypeError, RecursionError, AttributeError):
        return
    messages.read_request(RecordDict({"request": config}), lambda digest, length: b"abc")


@cache
def _dealt() -> tuple[bytes, dict[str, str]]:
    """What is handed to ash of the others' shares, and the roots that those have signed."""
    handed, roots = [], {}
    for maker in NAMES[1:]:
        dealt = deal(pads_of(place(), maker), drawn(f"seed {maker}"), 3)
        roots[maker] = dealt.hidden.shares
        handed.append(hand_out(dealt.entries, dealt.hidden.shares, len(NAMES) - 1)[0])
    return b"".join(handed), roots


def handed_shares(data: bytes) -> None:
    found, behind = take_handed(data, NAMES, NAMES[1:], "ash", _dealt()[1])
    if behind:
        raise ProtocolError("bytes behind")
    for maker, handed in found.items():
        open_handed(pads_of(place(), "ash"), maker, handed)


def _words(kind: str) -> tuple[bytes, ...]:
    """The valid words of a kind in a round with pads."""
    document = json.loads((VECTORS / VERSION / "pad_words.json").read_text())
    (group,) = (group for group in document["testGroups"] if group["type"] == kind)
    return tuple(bytes.fromhex(test["frame"]) for test in group["tests"] if test["result"] == "valid")


def _headers(pattern: str, magic: bytes) -> tuple[bytes, ...]:
    return tuple(split_frame(magic, data, 10**6, SecfacmicError).header for data in golden(pattern))


def targets() -> dict[str, Target]:
    """All of them, by name."""
    envelopes = golden("envelopes/1/*.envelope")
    journal = golden("journal/*.record")
    keys_sealed = golden("epoch-1.sealed")
    packed = bytes(split_frame(RECORD_MAGIC, journal[1], 10**6, RecordError).payload)
    age = bytes(split_frame(KEY_MAGIC, keys_sealed[0], 10**6, KeyFileError).payload)
    public = json.dumps(world().ash.public.model_dump(mode="json")).encode()
    private = (world().folder / "ash/recipient.key").read_bytes()
    reply_text = b'{"code":"update","run":"' + b"0" * 64 + b'","position":1,"attestation":"' + b"0" * 64
    word_text = reply_text.replace(b"update", b"void") + b'","word":"YWJj","digest":"","length":0,"carried":0}'
    reply_text += b'","word":"","digest":"' + b"0" * 64 + b'","length":3,"carried":2}'
    request_text = (
        b'{"round":1,"attempt":1,"more":false,"after":"","attested_head":"","sites":["ash"],"attestations":["'
        + b"0" * 64
        + b'"],"digests":["'
        + b"0" * 64
        + b'"],"lengths":[3],"held":"","question":"'
        + b"0" * 64
        + b'","question_length":3,"past":"YWJj","carried":"","carried_length":0}'
    )
    return {
        "envelope": Target(envelope, envelopes, True, EnvelopeError),
        "record": Target(record, journal[1:2], True, RecordError),
        "amendment record": Target(amendment_record, journal[3:4], True, RecordError),
        "checkpoint record": Target(checkpoint_record, journal[4:5], True, RecordError),
        "sealed key": Target(sealed, keys_sealed, True, KeyFileError),
        "signed envelope header": Target(
            signed_envelope, _headers("envelopes/1/*.envelope", ENVELOPE_MAGIC), False, EnvelopeError
        ),
        "signed record header": Target(signed_record, _headers("journal/*.record", RECORD_MAGIC), False, RecordError),
        "signed amendment header": Target(signed_amendment, _headers("epoch-*.sealed", KEY_MAGIC), False, KeyFileError),
        "signed age file": Target(sealed_content, (age,), True, KeyFileError),
        "acknowledgement": Target(acknowledgement, _headers("journal/*.record", RECORD_MAGIC), False, RecordError),
        "study secret": Target(secret, (world().secret.to_bytes(),), True, KeyFileError),
        "SEAL secret key": Target(seal_key, (world().secret.secret_key,), False, SecfacmicError),
        "SEAL ciphertext": Target(seal_ciphertext, saved_ciphertexts(), False, SecfacmicError),
        "residues": Target(residues, (packed,), False, EnvelopeError),
        "payload": Target(payload, (packed,), False, EnvelopeError),
        "plain payload": Target(plain_payload, (bytes(4 * world().agreed.lanes.values),), False, EnvelopeError),
        "checkpoint": Target(
            checkpoint, (keys.seal_checkpoint(world().secret, "0" * 64, b"adapter" * 9),), True, KeyFileError
        ),
        "public identity": Target(public_identity, (public,), False, KeyFileError),
        "private key": Target(private_key, (private,), False, KeyFileError),
        "study.toml": Target(study_file, golden("study.toml"), False, SecfacmicError),
        "study.safetensors with its digest": Target(whole_study, golden("study.safetensors"), True, SecfacmicError),
        "study.safetensors": Target(initial_state, golden("study.safetensors"), False, SecfacmicError),
        "journal folder": Target(journal_folder, (journal[0], envelopes[0]), False, RecordError),
        "reply": Target(reply, (reply_text, word_text), False, SecfacmicError),
        "request": Target(request, (request_text,), False, SecfacmicError),
        "handed shares": Target(handed_shares, _dealt()[:1], True, SecfacmicError),
        **{f"{kind} with pads": Target(check, _words(kind), True, SecfacmicError) for kind, check in CHECKS.items()},
    }

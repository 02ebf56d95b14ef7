"""Test vectors: every case of every version, and the golden files that must stay readable for ever."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from secure_fed.clients.keyring import KeyRing
from secure_fed.clients.site import Site
from secure_fed.clients.sitefile import SiteData, SiteFile
from secure_fed.core.errors import (
    AdapterMismatchError,
    EnvelopeError,
    KeyFileError,
    LedgerRollbackError,
    RecordError,
)
from secure_fed.core.layout import ServerState
from secure_fed.privacy.ckks import Cipher, stream_key
from secure_fed.privacy.keys import Identity, load_identity, open_sealed_key
from secure_fed.protocol import codec
from secure_fed.protocol.envelope import open_envelope
from secure_fed.protocol.packing import Binding, Contribution
from secure_fed.protocol.records import Chain, RecordFolder
from secure_fed.protocol.residues import expand, linear_check, pack_residues, unpack_residues
from secure_fed.protocol.rounds import ReplyCode, RoundReply, RoundRequest
from secure_fed.protocol.study import AgreedStudy, load_study
from secure_fed.server.coordinator import Coordinator
from tests.make_vectors import VECTORS, join

VERSIONS = sorted(path.name for path in VECTORS.iterdir() if path.is_dir())
NEEDED = {
    "envelope": {"BitFlip", "Truncated", "Length", "Header", "WrongPlace", "Sender", "Residue", "Replay"},
    "sealed_key": {"BitFlip", "Truncated", "Length", "Header", "Forged", "WrongPlace", "Recipient", "Content", "Epoch"},
    "record": {
        *("BitFlip", "Truncated", "Length", "Header", "WrongPlace", "Signer", "Cohort", "Forgery", "SecondRecord"),
        *("Reveal", "Amendment", "Ledger"),
    },
}


ERRORS = {error.__name__: error for error in (RecordError, AdapterMismatchError, LedgerRollbackError)}


class Version:
    """One version's folder, and the receivers that its cases are given to."""

    def __init__(self, name: str) -> None:
        self.folder = VECTORS / name
        self.agreed: AgreedStudy = load_study(self.folder / "study.toml")
        self.private = json.loads((self.folder / "keys.json").read_text())
        self.expected = json.loads((self.folder / "expected.json").read_text())
        self.coordinator_key = Ed25519PrivateKey.from_private_bytes(bytes.fromhex(self.private["coordinator"]))

    def join(self, pieces: list[dict[str, Any]]) -> bytes:
        return join(pieces, self.folder)

    def identity(self, site: str, folder: Path) -> Identity:
        """A site's private keys, as files in a folder."""
        if not folder.exists():
            folder.mkdir(mode=0o700)
            for name, content in self.private["sites"][site].items():
                descriptor = os.open(folder / name, os.O_WRONLY | os.O_CREAT, 0o600)
                os.write(descriptor, content.encode())
                os.close(descriptor)
        return load_identity(folder, site)

    def coordinator(self, state: Path, journal: list[str]) -> Coordinator:
        folder = state / "runs" / self.expected["run"] / "journal"
        folder.mkdir(parents=True)
        for name in journal:
            shutil.copy(self.folder / name, folder)
        (state / "run").write_text(self.expected["run"])
        # The round's COHORT has gone out: without it nobody is asked for an envelope.
        number = {1: 1, 2: 2, 5: 3}[len(journal)]
        frame = ServerState(state).run(self.expected["run"]).frame(number, 1, "cohort")
        frame.parent.mkdir(parents=True)
        shutil.copy(self.folder / f"cohorts/{number}.cohort", frame)
        return Coordinator(self.agreed, state, self.coordinator_key)

    def site(self, name: str, folder: Path) -> Site:
        """A site in a new process, as far as it goes without data: observers train on nothing."""
        self.identity(name, folder / "identity")
        file = SiteFile(
            format=1,
            site=name,
            study=str(self.folder / "study.toml"),
            state=str(folder / "state"),
            identity=str(folder / "identity"),
            data=SiteData(folder="none", kind="simulated"),
        )
        return Site(file, self.agreed)


def _cases(what: str) -> Iterator[Any]:
    for version in VERSIONS:
        document = json.loads((VECTORS / version / f"{what}.json").read_text())
        for group in document["testGroups"]:
            for case in group["tests"]:
                context = {key: value for key, value in group.items() if key not in ("tests", "comment")}
                yield pytest.param(version, context | case, id=f"{version}-{case['id']}-{case['comment'][:40]}")


@pytest.fixture(scope="session")
def versions() -> dict[str, Version]:
    return {name: Version(name) for name in VERSIONS}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("what", sorted(NEEDED))
def test_the_lists_are_whole(version: str, what: str) -> None:
    document = json.loads((VECTORS / version / f"{what}.json").read_text())
    tests = [case for group in document["testGroups"] for case in group["tests"]]
    assert [case["id"] for case in tests] == list(range(1, document["numberOfTests"] + 1))
    flags = {flag for case in tests for flag in case["flags"]}
    assert flags >= NEEDED[what]
    assert flags <= set(document["notes"])
    assert {case["result"] for case in tests} == {"valid", "invalid"}


@pytest.mark.parametrize(("version", "case"), _cases("envelope"))
def test_envelope(versions: dict[str, Version], tmp_path: Path, version: str, case: dict[str, Any]) -> None:
    vectors = versions[version]
    coordinator = vectors.coordinator(tmp_path / "server", case["journal"])
    position = len(case["journal"])

    def send(sender: str, data: bytes) -> None:
        coordinator.receive(RoundReply(sender, ReplyCode.UPDATE, coordinator.run, position, "", data))

    for sender, pieces in case.get("before", []):
        send(sender, vectors.join(pieces))
    inside, total = coordinator.sites_in, coordinator._total.copy()
    data = vectors.join(case["input"])
    if case["result"] == "valid":
        send(case["sender"], data)
        assert coordinator.sites_in == tuple(sorted({*inside, case["sender"]}))
        assert np.array_equal(total, coordinator._total) == (case["sender"] in inside)
    else:
        with pytest.raises(EnvelopeError):
            send(case["sender"], data)
        assert coordinator.sites_in == inside
        assert np.array_equal(total, coordinator._total)
        assert len(list(tmp_path.rglob("*.envelope"))) == len(inside)


@pytest.mark.parametrize(("version", "case"), _cases("sealed_key"))
def test_sealed_key(versions: dict[str, Version], tmp_path: Path, version: str, case: dict[str, Any]) -> None:
    vectors = versions[version]
    ring = KeyRing(tmp_path / "keys", vectors.agreed, vectors.identity(case["site"], tmp_path / "identity"))
    for pieces in case.get("before", []):
        ring.accept(vectors.join(pieces))
    before = ring.newest
    data = vectors.join(case["input"])
    if case["result"] == "valid":
        header = ring.accept(data)
        assert ring.newest == (header.epoch, header.key)
        Cipher(vectors.agreed.lanes, ring.secret(header.key))
    else:
        with pytest.raises(KeyFileError):
            ring.accept(data)
        assert ring.newest == before
        assert len(list((tmp_path / "keys").glob("*"))) == bool(before[0])


@pytest.fixture
def opened(versions: dict[str, Version], tmp_path: Path) -> Any:
    """Opens a site of a version, which holds the key of epoch 1."""

    def open_site(version: str, name: str) -> Site:
        vectors = versions[version]
        site = vectors.site(name, tmp_path)
        site.replica.keys.accept((vectors.folder / "epoch-1.sealed").read_bytes())
        return site

    return open_site


def _give(site: Site, data: bytes) -> ReplyCode:
    return site.respond(RoundRequest(round=site.round + 1, attempt=1, records=(data,), more=True)).code


@pytest.mark.parametrize(("version", "case"), _cases("record"))
def test_record(versions: dict[str, Version], opened: Any, version: str, case: dict[str, Any]) -> None:
    vectors = versions[version]
    site = opened(version, case["site"])
    for pieces in case["before"]:
        _give(site, vectors.join(pieces))
    position, adapter = site.position, site.adapter_digest
    data = vectors.join(case["input"])
    if case["result"] == "valid":
        assert _give(site, data) in (ReplyCode.MORE, ReplyCode.APPLIED)
        assert site.adapter_digest == vectors.expected["adapters"][case["adapter"]]
    else:
        with pytest.raises(ERRORS[case["error"]]):
            _give(site, data)
        assert (site.position, site.adapter_digest) == (position, adapter)


# --- golden files: what an old version wrote is read for ever ---


@pytest.mark.parametrize("version", VERSIONS)
def test_golden_journal_and_keys_are_still_read(versions: dict[str, Version], tmp_path: Path, version: str) -> None:
    vectors = versions[version]
    agreed, expected = vectors.agreed, vectors.expected
    assert agreed.study.id == expected["study"]
    folder = tmp_path / "journal"
    shutil.copytree(vectors.folder / "journal", folder)
    cedar = vectors.identity("cedar", tmp_path / "cedar")
    secret = open_sealed_key((vectors.folder / "epoch-1.sealed").read_bytes(), agreed, cedar)
    chain = Chain(agreed)
    heads, sums = [], []
    for record in RecordFolder(folder).replay(chain):
        heads.append(record.id)
        if record.amendment is not None:
            secret = open_sealed_key(record.payload, agreed, cedar)
        if record.contributors:
            cipher = Cipher(agreed.lanes, secret)
            first = record.contributors[0]
            binding = Binding(run=first.run, head=first.head, round=first.round)
            sums.append(cipher.open(record.payload, binding, record.cohort).tolist())
    assert heads == expected["heads"]
    assert chain.run == expected["run"]
    assert sums == expected["sums"]


@pytest.mark.parametrize("version", VERSIONS)
def test_golden_envelopes_still_add_up_to_the_golden_records(
    versions: dict[str, Version], tmp_path: Path, version: str
) -> None:
    vectors = versions[version]
    for round_number, length in ((1, 1), (2, 2), (3, 5)):
        journal = [f"journal/{seq:08d}.record" for seq in range(length)]
        coordinator = vectors.coordinator(tmp_path / str(round_number), journal)
        for path in sorted((vectors.folder / "envelopes" / str(round_number)).iterdir()):
            reply = RoundReply(path.stem, ReplyCode.UPDATE, coordinator.run, length, "", path.read_bytes())
            coordinator.receive(reply)
        assert coordinator.advance() is None
        size = coordinator._wire.payload_bytes
        golden = (vectors.folder / f"journal/{length:08d}.record").read_bytes()
        assert coordinator._sum() == golden[-size:]
        # ARRIVED names the same, and with it all REVEALs in the record are of this very sum.
        assert coordinator._arrived.data == (vectors.folder / f"arrived/{round_number}.arrived").read_bytes()  # type: ignore[union-attr]


@pytest.mark.parametrize("version", VERSIONS)
def test_golden_adapter_comes_out_of_the_journal(versions: dict[str, Version], opened: Any, version: str) -> None:
    vectors = versions[version]
    site = opened(version, "dogwood")
    for seq, rounds in enumerate(vectors.expected["rounds"]):
        _give(site, (vectors.folder / f"journal/{seq:08d}.record").read_bytes())
        assert site.adapter_digest == vectors.expected["adapters"][rounds]
    assert codec.adapter_digest(site.parameters) == vectors.expected["adapters"][-1]


@pytest.mark.parametrize("version", VERSIONS)
def test_golden_arithmetic(version: str) -> None:
    golden = json.loads((VECTORS / version / "arithmetic.json").read_text())
    for case in golden["streams"]:
        found = expand(bytes.fromhex(case["key"]), len(case["residues"]), case["modulus"])
        assert found.tolist() == case["residues"]
    for case in golden["stream_keys"]:
        binding = Binding(case["run"], case["head"], case["round"])
        assert stream_key(binding, Contribution(case["site"], case["seed"])).hex() == case["key"]
    for case in golden["packings"]:
        residues = np.array(case["residues"], np.uint64)
        assert pack_residues(residues, case["bits"]).hex() == case["packed"]
        assert unpack_residues(bytes.fromhex(case["packed"]), case["bits"]).tolist() == case["residues"]
    for case in golden["linear_checks"]:
        residues = np.array(case["residues"], np.uint64)
        assert list(linear_check(case["digest"], residues, case["modulus"])) == case["check"]


# --- TenSEAL's loader takes most flipped bits; ours takes none ---


@pytest.mark.parametrize("version", VERSIONS)
def test_a_flipped_bit_all_over_an_envelope_is_refused(versions: dict[str, Version], version: str) -> None:
    vectors = versions[version]
    agreed = vectors.agreed
    members = {site.name: site for site in agreed.study.sites}
    size = Chain(agreed).wire.payload_bytes
    data = bytearray((vectors.folder / "envelopes/1/birch.envelope").read_bytes())
    open_envelope(bytes(data), agreed, members, size)
    for position in [*range(len(data) - size), *range(len(data) - size, len(data), 7)]:
        bit = 1 << position % 8
        data[position] ^= bit
        with pytest.raises(EnvelopeError):
            open_envelope(bytes(data), agreed, members, size)
        data[position] ^= bit


@pytest.mark.parametrize("version", VERSIONS)
def test_a_flipped_bit_all_over_a_record_is_refused(versions: dict[str, Version], version: str) -> None:
    vectors = versions[version]
    chain = Chain(vectors.agreed)
    chain.advance(chain.check((vectors.folder / "journal/00000000.record").read_bytes()))
    data = bytearray((vectors.folder / "journal/00000001.record").read_bytes())
    chain.check(bytes(data))
    header = len(data) - chain.wire.payload_bytes
    for position in [*range(header), *range(header, len(data), 7)]:
        bit = 1 << position % 8
        data[position] ^= bit
        with pytest.raises(RecordError):
            chain.check(bytes(data))
        data[position] ^= bit

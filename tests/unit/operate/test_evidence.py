"""A site's archive: it holds what a reviewer needs and no secret, and any change of it is found offline."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
from typer.testing import CliRunner

from secure_fed.cli import app
from secure_fed.clients.outgoing_log import SentList, read_sent
from secure_fed.clients.sitefile import SitePrivacy, read_site_file
from secure_fed.core.canonical import canonical_json
from secure_fed.core.errors import EvidenceError, SecfacmicError, StorageError
from secure_fed.core.storage import exclusive
from secure_fed.core.tomlfile import read_toml, write_toml
from secure_fed.operate.evidence import MAGIC, MANIFEST, MAX_HEADER, pack_evidence, verify_evidence
from secure_fed.privacy.keys import load_identity, open_sealed_key
from secure_fed.protocol.rounds import ReplyCode, RoundReply
from secure_fed.protocol.signing import parse_header, payload_fields, sign_frame, split_frame
from tests.conftest import Federation, Run, close_round, exchange

SENT = "sent.jsonl"


def run_study(federation: Federation, epsilon: float | None = None) -> None:
    """Two rounds of the study over messages, listed as a site that talks to a server lists them; then a rotation."""
    path = federation.folder / "sites" / "ash" / "site.toml"
    if epsilon is not None:
        file = read_toml(path, type(read_site_file(path)), ValueError)  # type: ignore[type-var]
        write_toml(path, file.model_copy(update={"privacy": SitePrivacy(epsilon=epsilon, n_ref=20)}))
    sites = federation.sites()
    coordinator = federation.begin(sites)
    sent = SentList(path.parent / "state")
    for _ in range(2 * 3):
        for site in sites:
            request = coordinator.request(site.name, site.run, site.position)
            reply = site.respond(request)
            if site.name == "ash":
                sent.add(reply, request.round)
            coordinator.receive(reply)
        coordinator.advance()
    assert coordinator.round == 3
    coordinator.amend(federation.seal_key(2, coordinator.journal.chain.key, removed=("dogwood",)))
    for site in sites:
        request = coordinator.request(site.name, site.run, site.position)
        reply = site.respond(request)
        if site.name == "ash":
            sent.add(reply, request.round)
        coordinator.receive(reply)
    assert coordinator.advance().header.kind == "amendment"  # type: ignore[union-attr]
    for site in sites[:3]:
        exchange(coordinator, site)


@pytest.fixture(scope="module")
def run(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evidence") / "out"
    shutil.copytree(prepared, folder, symlinks=True)
    run_study(Federation(folder), epsilon=8.0)
    return folder


@pytest.fixture
def folder(run: Path, tmp_path: Path) -> Path:
    shutil.copytree(run, tmp_path / "out", symlinks=True)
    return tmp_path / "out"


@pytest.fixture
def site(folder: Path) -> Path:
    return folder / "sites" / "ash"


@pytest.fixture(scope="module")
def archive(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("archive") / "evidence.zip"
    pack_evidence(run / "sites" / "ash", path)
    return path


def test_a_reviewer_without_room_is_told_nothing_against_the_archive(
    archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(shutil, "copyfileobj", mock.Mock(side_effect=full))
    with pytest.raises(StorageError, match=r"has no room for temporary files .*name another folder by TMPDIR"):
        verify_evidence(archive)


def test_a_reviewer_without_anything_else_checks_it(archive: Path, tmp_path: Path) -> None:
    found = verify_evidence(archive)
    assert (found["site"], found["accepted_by"]) == ("ash", "simulation")
    assert (found["runs"], found["rounds"], found["updates_in_sums"]) == (1, 2, 2)
    assert found["records"] == 4  # genesis, two aggregates, an amendment
    assert found["messages_sent"] == 7
    assert "can open single updates" in found["together"]
    assert "epsilon at most 6.7316 of 8" in found["ledger"]
    with zipfile.ZipFile(archive) as content:
        names = set(content.namelist())
        assert {"study/study.toml", "study/study.safetensors", "policy.json", "bom.json", "versions.json"} <= names
        bom = json.loads(content.read("bom.json"))
        policy = json.loads(content.read("policy.json"))
    assert (bom["bomFormat"], bom["specVersion"]) == ("CycloneDX", "1.5")
    purls = {one["purl"] for one in bom["components"]}
    assert "pkg:pypi/flwr@1.42.0" in purls
    assert len(purls) == len(bom["components"]) > 50
    assert policy["min_sites"] == 3
    assert not any(isinstance(value, str) and "/" in value for value in policy.values())  # no place on its disk


def test_the_same_state_gives_the_same_bytes(site: Path, tmp_path: Path) -> None:
    pack_evidence(site, tmp_path / "one.zip")
    pack_evidence(site, tmp_path / "two.zip")
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()
    # Anybody's unzip reads it.
    if shutil.which("unzip"):
        subprocess.run(["unzip", "-tq", tmp_path / "one.zip"], check=True, capture_output=True)


def test_no_secret_is_in_it(site: Path, folder: Path, tmp_path: Path) -> None:
    pack_evidence(site, tmp_path / "evidence.zip")
    data = (tmp_path / "evidence.zip").read_bytes()
    secrets = {path.name: path.read_bytes().strip() for path in (site / "identity").glob("*.key")}
    secrets["ledger key"] = (site / "identity" / "ledger" / "ledger.key").read_bytes().strip()
    secrets["blocks"] = (site / "identity" / "ledger" / "blocks.jsonl").read_bytes().strip().splitlines()[0][-80:]
    federation = Federation(folder)
    identity = load_identity(site / "identity", "ash")
    for sealed in (site / "state" / "keys").glob("*.sealed"):
        opened = open_sealed_key(sealed.read_bytes(), federation.agreed, identity)
        secrets[f"{sealed.name} MAC key"] = opened.mac_key
        secrets[f"{sealed.name} secret"] = opened.secret_key[1000:1064]
    for path in (site / "state").glob("runs/*/outbox/*.integers"):
        secrets[path.name] = path.read_bytes()[-64:]
    assert len(secrets) >= 9
    for name, secret in secrets.items():
        assert len(secret) >= 32, name
        assert secret not in data, name
    assert b"PRIVATE KEY" not in data
    assert b"AGE-SECRET-KEY" not in data
    with zipfile.ZipFile(io.BytesIO(data)) as content:
        assert not [name for name in content.namelist() if name.endswith((".key", ".sealed", ".integers", ".sqlite"))]
    # As a control: the search finds what is there.
    assert Federation(folder).agreed.study.id.encode() in data


Change = Callable[[dict[str, bytes]], None]


def rebuilt(archive: Path, into: Path, change: Change, sign: Path | None = None) -> Path:
    """The archive with changed content; its manifest is made anew and signed if a site's identity is given."""
    with zipfile.ZipFile(archive) as old:
        parts = {name: old.read(name) for name in old.namelist()}
    change(parts)
    if sign is not None:
        frame = split_frame(MAGIC, parts.pop(MANIFEST), MAX_HEADER, EvidenceError)
        manifest = json.loads(bytes(frame.payload))
        manifest["files"] = {
            name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in parts.items()
        }
        payload = canonical_json(manifest)
        from secure_fed.operate.evidence import _ManifestHeader

        header = parse_header(frame.header, _ManifestHeader, EvidenceError).model_dump() | payload_fields(payload)
        identity = load_identity(sign / "identity", sign.name)
        parts[MANIFEST] = sign_frame(MAGIC, _ManifestHeader(**header), identity.signing, payload)
    with zipfile.ZipFile(into, "w", zipfile.ZIP_STORED) as new:
        for name, data in parts.items():
            new.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), data)
    return into


def test_every_byte_counts(archive: Path, tmp_path: Path) -> None:
    """One bit of any file's content, and each file taken out or added: all refused."""
    with zipfile.ZipFile(archive) as content:
        names = content.namelist()
    for name in names:

        def flip(parts: dict[str, bytes], name: str = name) -> None:
            data = bytearray(parts[name])
            data[len(data) // 2] ^= 1
            parts[name] = bytes(data)

        def drop(parts: dict[str, bytes], name: str = name) -> None:
            del parts[name]

        for change in (flip, drop):
            with pytest.raises(EvidenceError):
                verify_evidence(rebuilt(archive, tmp_path / "changed.zip", change))
    with pytest.raises(EvidenceError, match=r"extra\.txt: in the archive or its manifest"):
        verify_evidence(rebuilt(archive, tmp_path / "changed.zip", lambda parts: parts.update({"extra.txt": b""})))
    cut = archive.read_bytes()
    for size in (0, 10, len(cut) // 2, len(cut) - 1):
        (tmp_path / "cut.zip").write_bytes(cut[:size])
        with pytest.raises(EvidenceError, match="cannot be read"):
            verify_evidence(tmp_path / "cut.zip")


def test_signing_it_anew_does_not_help_a_site_that_lies(archive: Path, run: Path, tmp_path: Path) -> None:
    """The site itself has the key of the manifest; journal, acceptance, ledger and list hold one another."""
    own = run / "sites" / "ash"

    def verify(change: Change, sign: Path = own) -> None:
        verify_evidence(rebuilt(archive, tmp_path / "lie.zip", change, sign))

    verify(lambda parts: None)  # the control

    def drop_sent(parts: dict[str, bytes]) -> None:
        parts[SENT] = b"".join(parts[SENT].splitlines(keepends=True)[:3])

    with pytest.raises(EvidenceError, match="lacks the update of round 2"):
        verify(drop_sent)

    def change_sent(parts: dict[str, bytes]) -> None:
        lines = parts[SENT].splitlines(keepends=True)
        parts[SENT] = lines[0] + lines[2]

    with pytest.raises(EvidenceError, match="line 2 does not follow"):
        verify(change_sent)

    def drop_ledger(parts: dict[str, bytes]) -> None:
        del parts["ledger/public.json"]

    with pytest.raises(EvidenceError, match="updates that a ledger paid for"):
        verify(drop_ledger)

    def changed(**fields: object) -> Callable[[dict[str, bytes]], None]:
        def change(parts: dict[str, bytes]) -> None:
            facts = json.loads(parts["ledger/public.json"])
            parts["ledger/public.json"] = json.dumps(facts | fields).encode()

        return change

    with pytest.raises(EvidenceError, match=r"its summary says 0\.1"):
        verify(changed(epsilon_at_most=0.1))
    with pytest.raises(EvidenceError, match="paid for no update"):
        verify(changed(anchors=["0" * 64]))
    with pytest.raises(EvidenceError, match="no public part of a ledger"):
        verify(changed(releases=None))

    def other_acceptance(parts: dict[str, bytes]) -> None:
        (name,) = (name for name in parts if name.startswith("accepted/") and name.endswith(".signed"))
        (other,) = (run / "sites" / "birch" / "state" / "accepted").glob("*.signed")
        parts[name] = other.read_bytes()

    with pytest.raises(SecfacmicError, match="signature"):
        verify(other_acceptance)

    def forged_record(parts: dict[str, bytes]) -> None:
        name = max(name for name in parts if name.startswith("journal/"))
        parts[name] = parts[name][:-1] + bytes([parts[name][-1] ^ 1])

    with pytest.raises(SecfacmicError, match="payload"):
        verify(forged_record)
    with pytest.raises(EvidenceError, match="not signed by the key that the study names for site ash"):
        verify(lambda parts: None, run / "sites" / "birch")


@pytest.mark.parametrize("name", ["versions.json", "bom.json", "attacks.json"])
@pytest.mark.parametrize(
    "content",
    [b"", b"\xff", b"[]", b"3", b"null", b'"text"', b"{}", b'{"components": 3, "secfacmic": 3}', b"[" * 100_000],
    ids=lambda content: content[:12].decode("latin-1"),
)
def test_what_a_site_ran_is_read_as_what_it_is(
    name: str, content: bytes, archive: Path, run: Path, tmp_path: Path, secfacmic: Run
) -> None:
    """Though it signs it: one sentence, and no page of such figures."""
    lie = rebuilt(archive, tmp_path / "lie.zip", lambda parts: parts.update({name: content}), run / "sites" / "ash")
    ended = secfacmic("evidence", "verify", lie)
    assert ended.returncode == EvidenceError.exit_code
    assert f"{name}: malformed; expected " in ended.stderr
    assert "Traceback" not in ended.stderr


def test_strange_names_and_compressed_files_are_not_unpacked(archive: Path, tmp_path: Path) -> None:
    evil = {"../outside.txt": b"x"}
    with pytest.raises(EvidenceError, match="strange names"):
        verify_evidence(rebuilt(archive, tmp_path / "evil.zip", lambda parts: parts.update(evil)))
    assert not (tmp_path.parent / "outside.txt").exists()
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr(MANIFEST, b"0" * 10_000_000)
    with pytest.raises(EvidenceError, match="compressed"):
        verify_evidence(tmp_path / "bomb.zip")
    (tmp_path / "no.zip").write_bytes(b"no zip at all")
    with pytest.raises(EvidenceError, match="cannot be read"):
        verify_evidence(tmp_path / "no.zip")


def test_a_running_site_is_not_packed(site: Path, tmp_path: Path) -> None:
    with exclusive(site / "state"), pytest.raises(StorageError, match="another process"):
        pack_evidence(site, tmp_path / "evidence.zip")
    assert not list(tmp_path.glob("*.zip"))


def test_a_simulations_archive_says_that_nothing_was_sent(federation: Federation, tmp_path: Path) -> None:
    sites = federation.sites()
    coordinator = federation.begin(sites)
    for site in sites:
        exchange(coordinator, site)
    close_round(coordinator, sites)
    for site in sites:
        exchange(coordinator, site)
    pack_evidence(federation.folder / "sites" / "birch", tmp_path / "evidence.zip")
    found = verify_evidence(tmp_path / "evidence.zip")
    assert (found["messages_sent"], found["updates_in_sums"], found["ledger"]) == (0, 1, "none")


def test_the_commands(site: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    packed = runner.invoke(app, ["evidence", str(site), "--out", str(tmp_path / "evidence.zip"), "--json"])
    assert packed.exit_code == 0, packed.output
    assert SENT in json.loads(packed.stdout)["files"]
    checked = runner.invoke(app, ["evidence", "verify", str(tmp_path / "evidence.zip"), "--json"])
    assert json.loads(checked.stdout)["verified"] is True
    assert "all of it verifies" in runner.invoke(app, ["evidence", "verify", str(tmp_path / "evidence.zip")]).output


# --- the list of what was sent ---


def reply(code: ReplyCode = ReplyCode.APPLIED, envelope: bytes = b"") -> RoundReply:
    return RoundReply("ash", code, "a" * 64, 3, "b" * 64, envelope)


def test_the_list_says_what_left(site: Path, folder: Path) -> None:
    rows = SentList(site / "state").read()
    assert [row.code for row in rows] == ["ready", "update", "revealed"] * 2 + ["ready"]
    assert [row.round for row in rows] == [1, 1, 1, 2, 2, 2, 3]
    run = (site / "state" / "run").read_text()
    assert rows[-1].run == run
    assert [row.seq for row in rows if row.envelope] == [2, 5]
    assert rows[4].bytes > 100 * rows[3].bytes
    shown = json.loads(CliRunner().invoke(app, ["site", "sent", str(site), "--json"]).stdout)
    assert shown["messages"] == 7
    assert shown["bytes"] == sum(row.bytes for row in rows)
    assert "7 messages" in CliRunner().invoke(app, ["site", "sent", str(site)]).output


def test_a_line_cut_by_a_crash_was_never_sent(tmp_path: Path) -> None:
    first = SentList(tmp_path)
    first.add(reply(), 1)
    first.add(reply(), 2)
    path = tmp_path / SENT
    whole = path.read_bytes()
    for cut in range(whole.index(b"\n") + 1, len(whole)):
        path.write_bytes(whole[:cut])
        assert len(SentList(tmp_path).read()) == 1
    again = SentList(tmp_path)
    again.add(reply(ReplyCode.MORE), 2)
    assert [row.code for row in SentList(tmp_path).read()] == ["applied", "more"]


def test_a_full_disk_leaves_the_list_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = SentList(tmp_path)
    sent.add(reply(), 1)
    before = (tmp_path / SENT).read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", full)
        with pytest.raises(StorageError, match="nothing leaves this site that is not listed"):
            sent.add(reply(), 2)
    assert (tmp_path / SENT).read_bytes() == before
    sent.add(reply(), 2)
    assert [row.seq for row in read_sent((tmp_path / SENT).read_bytes(), "list")] == [1, 2]


def test_a_changed_list_is_refused(tmp_path: Path) -> None:
    sent = SentList(tmp_path)
    for number in range(4):
        sent.add(reply(), number)
    lines = (tmp_path / SENT).read_bytes().splitlines(keepends=True)
    for bad in (lines[1:], lines[:1] + lines[2:], [lines[1], lines[0]], [lines[0].replace(b'"round":0', b'"round":9')]):
        (tmp_path / SENT).write_bytes(b"".join([*bad, *lines[3:]]))
        with pytest.raises(EvidenceError, match="does not follow"):
            SentList(tmp_path).read()
        with pytest.raises(EvidenceError):
            SentList(tmp_path).add(reply(), 5)

"""Key rotation: nothing is lost, nobody who left reads on, and nobody but the members decides."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import cbor2
import pytest
import safetensors.numpy

from secure_fed.clients.site import Site
from secure_fed.clients.sitefile import read_site_file
from secure_fed.core.errors import AdapterMismatchError, KeyFileError, ProtocolError, RecordError, SiteFileError
from secure_fed.privacy.keys import create_identity, load_identity, open_sealed_key, seal_checkpoint
from secure_fed.protocol.records import Chain, RecordHeader, sign_record
from secure_fed.protocol.rounds import ReplyCode, RoundRequest
from secure_fed.protocol.sealed_key import KEY_MAGIC, SealedKeyHeader, check_sealed_key
from secure_fed.protocol.signing import ZERO_DIGEST, parse_header, payload_fields, sign_frame, split_frame
from secure_fed.protocol.study_tables import Member
from secure_fed.server.coordinator import Coordinator
from secure_fed.server.orders import end_run
from tests.conftest import OBSERVER, Federation, close_round, corrupt, exchange, run_round, send_envelopes


def rotate(federation: Federation, coordinator: Coordinator, **changes: Any) -> bytes:
    """Leave an amendment for the coordinator, as the key maker makes it."""
    chain = coordinator.journal.chain
    epoch = federation.site("ash").replica.keys.newest[0] + 1
    sealed = federation.seal_key(epoch, chain.key, members=chain.members, **changes)
    coordinator.amend(sealed)
    return sealed


def drive(coordinator: Coordinator, sites: list[Site]) -> list[str]:
    """Exchange and close until the study is over; the kinds of the records that were appended."""
    kinds = []
    for _ in range(20):
        for site in sites:
            while exchange(coordinator, site).code == ReplyCode.MORE:
                pass
        if coordinator.finished:
            return kinds
        entry = close_round(coordinator, sites)
        kinds.append(entry.header.kind)
    raise AssertionError(kinds)


def test_a_rotation_loses_no_round_retrains_nothing_and_changes_no_bit(federation: Federation, tmp_path: Path) -> None:
    shutil.copytree(federation.folder, tmp_path / "unrotated")
    other = Federation(tmp_path / "unrotated")
    plain_sites = other.sites()
    assert drive(other.begin(plain_sites), plain_sites) == ["aggregate"] * 3

    sites = federation.sites()
    coordinator = federation.begin(sites)
    run_round(coordinator, sites)
    old = coordinator.journal.chain.key
    rotate(federation, coordinator)
    for site in sites:
        exchange(coordinator, site)
    stored = {path: path.read_bytes() for path in federation.folder.glob("sites/*/state/runs/*/outbox/*.integers")}
    assert coordinator.advance().header.kind == "amendment"  # type: ignore[union-attr]
    assert drive(coordinator, sites) == ["checkpoint", "aggregate", "aggregate"]
    assert [entry.header.round for entry in coordinator.rounds] == [1, 2, 3]
    assert {site.adapter_digest for site in sites} == {plain_sites[0].adapter_digest}
    assert coordinator.journal.chain.key != old
    for path, content in stored.items():
        assert not path.exists() or path.read_bytes() == content
    for site in sites:
        assert not site.replica.keys.holds(old)
        assert site.replica.keys.newest == (2, coordinator.journal.chain.key)
    assert [path.name for path in sorted(federation.folder.glob("sites/ash/state/keys/*"))] == ["000002.sealed"]


def test_the_second_attempt_carries_the_stored_integers(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    sites = federation.sites()
    coordinator = federation.begin(sites)
    for site in sites:
        exchange(coordinator, site)
    path = next(federation.folder.glob("sites/ash/state/runs/*/outbox/*.integers"))
    before = path.read_bytes()
    monkeypatch.delattr("secure_fed.clients.learner.train_round")  # whoever trains again fails
    rotate(federation, coordinator)
    coordinator.advance()
    for site in sites:
        assert exchange(coordinator, site).code == ReplyCode.ACKNOWLEDGED
    coordinator.advance()
    assert coordinator.attempt == 2
    for reply in send_envelopes(coordinator, sites[:3]):
        assert reply.code == ReplyCode.UPDATE
    assert path.read_bytes() == before


def test_what_was_given_before_a_checkpoint_goes_with_it_and_what_is_due_stays(federation: Federation) -> None:
    """Until then a void may take the last record back, and asks for it again."""
    sites = federation.sites()
    coordinator = federation.begin(sites)
    run_round(coordinator, sites)
    rotate(federation, coordinator)
    for site in sites:
        exchange(coordinator, site)
    assert coordinator.advance().header.kind == "amendment"  # type: ignore[union-attr]
    for site in sites:
        assert exchange(coordinator, site).code == ReplyCode.ACKNOWLEDGED
    kept = sites[0].replica.files.folder
    assert kept.updates() == [1, 2]
    assert coordinator.advance().header.kind == "checkpoint"  # type: ignore[union-attr]
    sites[0].respond(RoundRequest(2, 0, (coordinator.journal.read(coordinator.journal.chain.length - 1),), more=True))
    assert kept.updates() == [2]


def test_restarts_in_the_middle_of_a_rotation(federation: Federation) -> None:
    sites = federation.sites()
    coordinator = federation.begin(sites)
    rotate(federation, coordinator)
    for site in sites:
        exchange(coordinator, site)
    coordinator = federation.reopen()  # the amendment waits on disk
    for site in sites:
        exchange(coordinator, site)
    assert coordinator.advance().header.kind == "amendment"  # type: ignore[union-attr]
    for site in sites[:2]:
        exchange(coordinator, site)
    coordinator, sites = federation.reopen(), federation.sites()  # acknowledgements are given again
    assert coordinator.sites_in == ()
    assert coordinator.advance() is None
    assert drive(coordinator, sites) == ["checkpoint", "aggregate", "aggregate", "aggregate"]
    assert len({site.adapter_digest for site in sites}) == 1
    assert {site.adapter_digest for site in federation.sites()} == {sites[0].adapter_digest}


def test_a_removed_site_reads_nothing_later(federation: Federation) -> None:
    sites = federation.sites()
    coordinator = federation.begin(sites)
    run_round(coordinator, sites)
    sealed = rotate(federation, coordinator, removed=(OBSERVER,))
    for site in sites:
        exchange(coordinator, site)
    gone, staying = sites[3], sites[:3]
    coordinator.advance()
    with pytest.raises(SiteFileError, match="left the study with amendment 1"):
        exchange(coordinator, gone)
    assert drive(coordinator, staying) == ["checkpoint", "aggregate", "aggregate"]
    with pytest.raises(KeyFileError, match="not sealed to dogwood"):
        open_sealed_key(
            sealed, federation.agreed, load_identity(federation.folder / "sites/dogwood/identity", OBSERVER)
        )
    # Nor with all that the server has, records and their key files included.
    digest = gone.adapter_digest
    records = tuple(coordinator.journal.read(seq) for seq in range(gone.position, len(coordinator.journal.records)))
    with pytest.raises(SiteFileError, match="left the study"):
        gone.respond(RoundRequest(round=4, attempt=1, records=records, more=False))
    assert gone.adapter_digest == digest != staying[0].adapter_digest
    with pytest.raises(ProtocolError, match="expected one of"):
        coordinator.receive(
            replace(
                staying[0].respond(coordinator.request(staying[0].name, staying[0].run, staying[0].position)),
                site=OBSERVER,
            )
        )


def _join(federation: Federation, name: str) -> Member:
    """A new hospital with a site folder of its own."""
    folder = federation.folder / "sites" / name
    shutil.copytree(federation.folder / "sites" / OBSERVER, folder)
    shutil.rmtree(folder / "identity")
    shutil.rmtree(folder / "state" / "runs", ignore_errors=True)
    shutil.rmtree(folder / "state" / "keys", ignore_errors=True)
    (folder / "site.toml").write_text((folder / "site.toml").read_text().replace(f'"{OBSERVER}"', f'"{name}"'))
    return Member(name=name, keys=create_identity(folder / "identity", name).keys)


def come(federation: Federation, name: str, sealed: bytes) -> Site:
    """A site that joins, once it has taken the key that lets it."""
    keys = federation.folder / "sites" / name / "state/keys"
    keys.mkdir(parents=True, exist_ok=True)
    (keys / "000002.sealed").write_bytes(sealed)
    return federation.site(name)


def _allow_all(federation: Federation) -> None:
    for path in federation.folder.glob("sites/*/site.toml"):
        path.write_text(path.read_text().replace('amendments = "removals"', 'amendments = "all"'))


def test_a_site_that_joins_starts_at_the_checkpoint_and_opens_nothing_earlier(federation: Federation) -> None:
    elm = _join(federation, "elm")
    _allow_all(federation)
    with pytest.raises(Exception, match="'elm' is not in study"):
        federation.site("elm")
    sites = federation.sites()
    coordinator = federation.begin(sites)
    run_round(coordinator, sites)
    old = coordinator.journal.chain.key
    sealed = rotate(federation, coordinator, added=(elm,))
    for site in sites:
        exchange(coordinator, site)
    coordinator.advance()
    joined = come(federation, "elm", sealed)
    assert not joined.replica.keys.holds(old)
    # It knows no adapter yet, so that it acknowledges nothing.
    assert exchange(coordinator, joined).code == ReplyCode.APPLIED
    for site in sites:
        assert exchange(coordinator, site).code == ReplyCode.ACKNOWLEDGED
    coordinator.advance()
    everyone = [*sites, joined]
    assert drive(coordinator, everyone) == ["aggregate", "aggregate"]
    assert len({site.adapter_digest for site in everyone}) == 1
    assert coordinator.rounds[-1].sites == ("ash", "birch", "cedar", "elm")
    # Rebuilding from its journal starts at the checkpoint again.
    next((federation.folder / "sites/elm/state/runs").glob("*/adapter.safetensors")).unlink()
    assert federation.site("elm").adapter_digest == joined.adapter_digest


def test_a_checkpoint_that_holds_no_adapter_is_the_key_makers_doing_and_no_traceback(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    elm = _join(federation, "elm")
    _allow_all(federation)
    sites = federation.sites()
    coordinator = federation.begin(sites)
    run_round(coordinator, sites)
    sealed = rotate(federation, coordinator, added=(elm,))
    for site in sites:
        exchange(coordinator, site)
    coordinator.advance()
    monkeypatch.setattr(
        "secure_fed.clients.replica.seal_checkpoint",
        lambda secret, head, _: seal_checkpoint(secret, head, b"no adapter"),
    )
    for site in sites:
        exchange(coordinator, site)
    assert coordinator.advance().header.kind == "checkpoint"  # type: ignore[union-attr]
    with pytest.raises(
        AdapterMismatchError, match="the key maker's checkpoint after round 1 opens and holds no adapter"
    ):
        exchange(coordinator, come(federation, "elm", sealed))


def test_a_sites_identity_opens_the_keys_of_rotations_in_its_journal(federation: Federation) -> None:
    """W22 of the threat model: to destroy a key file closes nothing that was sealed to an identity and kept."""
    sites = federation.sites()
    coordinator = federation.begin(sites)
    rotate(federation, coordinator)
    for _ in range(2):
        for site in sites:
            exchange(coordinator, site)
        coordinator.advance()
    newest = sites[0].replica.keys.newest
    shutil.rmtree(federation.folder / "sites/ash/state/keys")
    kept = sites[0].replica.files.records.replay(Chain(federation.agreed))
    (sealed,) = (record.payload for record in kept if record.header.kind == "amendment")
    open_sealed_key(sealed, federation.agreed, load_identity(federation.folder / "sites/ash/identity", "ash"))
    assert check_sealed_key(sealed, federation.agreed).key == newest[1]


def test_a_site_that_was_away_replays_through_the_rotation(federation: Federation) -> None:
    sites = federation.sites()
    coordinator = federation.begin(sites)
    run_round(coordinator, sites)
    rotate(federation, coordinator)
    assert drive(coordinator, sites[:3]) == ["amendment", "checkpoint", "aggregate", "aggregate"]
    assert sites[3].replica.keys.newest[0] == 1
    exchange(coordinator, sites[3])
    assert sites[3].adapter_digest == sites[0].adapter_digest
    assert list(sites[3].replica.keys.headers) == [2]


def test_a_site_rebuilds_after_its_old_keys_are_gone(federation: Federation) -> None:
    sites = federation.sites()
    coordinator = federation.begin(sites)
    run_round(coordinator, sites)
    rotate(federation, coordinator)
    drive(coordinator, sites)
    for path in federation.folder.glob("sites/*/state/runs/*/adapter.safetensors"):
        path.unlink()
    assert {site.adapter_digest for site in federation.sites()} == {sites[0].adapter_digest}


def test_amendments_are_applied_unasked_only_as_the_site_says(federation: Federation) -> None:
    elm = _join(federation, "elm")
    sites = federation.sites()
    coordinator = federation.begin(sites)
    sealed = rotate(federation, coordinator, added=(elm,))
    for site in sites:
        exchange(coordinator, site)
    coordinator.advance()
    with pytest.raises(SiteFileError, match=r'elm would join, nobody leave.*amendments = "removals"'):
        exchange(coordinator, sites[1])
    assert sites[1].position == 1
    sites[1].replica.keys.accept(sealed)  # by hand
    assert exchange(coordinator, sites[1]).code == ReplyCode.ACKNOWLEDGED


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"removed": ("zelkova",)}, "cannot leave: not among the members"),
        ({"removed": ("ash",)}, "ash cannot leave: it makes the keys"),
        ({"removed": ("birch",)}, "2 training sites would be left; expected 3 to 4"),
    ],
)
def test_members_change_only_as_the_study_allows(federation: Federation, changes: dict[str, Any], says: str) -> None:
    coordinator = federation.begin(federation.sites())
    with pytest.raises(KeyFileError, match=says):
        rotate(federation, coordinator, **changes)
    twin = Member(name="elm", keys=federation.agreed.study.site("birch").keys)
    with pytest.raises(KeyFileError, match="it has a key that a member has already"):
        rotate(federation, coordinator, added=(twin,))
    with pytest.raises(KeyFileError, match="a member has that name"):
        rotate(federation, coordinator, added=(twin.model_copy(update={"name": "cedar"}),))


def test_a_key_that_nobody_can_open_stops_the_run_and_no_site(
    federation: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    """Sites can be opened, say what is wrong, and take the end of the run with the adapter that they have."""
    sites = federation.sites()
    coordinator = federation.begin(sites)
    frame = split_frame(KEY_MAGIC, federation.seal_key(2, coordinator.journal.chain.key), 10**6, KeyFileError)
    header = parse_header(frame.header, SealedKeyHeader, KeyFileError)
    maker = load_identity(federation.folder / "sites/ash/identity", "ash").signing
    rubbish = bytes(frame.payload)[:-1] + b"?"
    coordinator.amend(sign_frame(KEY_MAGIC, header.model_copy(update=payload_fields(rubbish)), maker, rubbish))
    for site in sites:
        exchange(coordinator, site)
    coordinator.advance()
    before = sites[1].adapter_digest
    for birch in (sites[1], federation.site("birch")):
        with pytest.raises(KeyFileError, match="is not here"):
            exchange(coordinator, birch)
        assert birch.position == 2
    assert "ash made it, with an amendment that this site cannot acknowledge" in caplog.text
    end_run(federation.agreed, federation.folder / "server", lost=True)
    assert coordinator.advance().header.kind == "end"  # type: ignore[union-attr]
    birch = federation.site("birch")
    assert exchange(coordinator, birch).code == ReplyCode.APPLIED
    assert birch.over
    assert federation.site("birch").adapter_digest == before


def test_an_amendment_brings_a_new_key(federation: Federation) -> None:
    """One that brings the key in force would follow itself for ever."""
    coordinator = federation.begin(federation.sites())
    key = coordinator.journal.chain.key
    frame = split_frame(KEY_MAGIC, federation.seal_key(2, key), 10**6, KeyFileError)
    header = parse_header(frame.header, SealedKeyHeader, KeyFileError)
    maker = load_identity(federation.folder / "sites/ash/identity", "ash").signing
    for same in (key, ZERO_DIGEST):
        forged = sign_frame(KEY_MAGIC, header.model_copy(update={"key": same}), maker, bytes(frame.payload))
        with pytest.raises(KeyFileError, match="expected a new one"):
            coordinator.amend(forged)


def test_nobody_joins_without_keys(federation: Federation) -> None:
    sealed = federation.seal_key(2, added=(_join(federation, "elm"),), removed=("cedar",))
    values = cbor2.loads(split_frame(KEY_MAGIC, sealed, 10**6, KeyFileError).header)
    values[list(SealedKeyHeader.model_fields).index("added")][0]["keys"] = None
    text = cbor2.dumps(values, canonical=True)
    maker = load_identity(federation.folder / "sites/ash/identity", "ash").signing
    forged = b"".join([KEY_MAGIC, len(text).to_bytes(4, "big"), text, maker.sign(KEY_MAGIC + text)])
    with pytest.raises(KeyFileError, match=r"wrong: added\.0\.keys"):
        check_sealed_key(forged, federation.agreed)


# --- forgeries ---


class Rotation:
    """A rotation up to its amendment, with a server that signs whatever it likes."""

    def __init__(self, federation: Federation) -> None:
        self.federation = federation
        self.sites = federation.sites()
        self.coordinator = federation.begin(self.sites)
        self.sealed = rotate(federation, self.coordinator)
        for site in self.sites:
            exchange(self.coordinator, site)

    def amendment(self, sealed: bytes, **fields: object) -> bytes:
        chain = self.coordinator.journal.chain
        header = RecordHeader(
            version=2,
            kind="amendment",
            seq=chain.length,
            previous=chain.head,
            study=self.federation.agreed.study.id,
            run=chain.run,
            key=check_sealed_key(self.sealed, self.federation.agreed).key,
            round=chain.round + 1,
            contributors=(),
            reveals=(),
            opened_ms=1,
            closed_ms=1,
            **payload_fields(sealed),
        )
        return sign_record(header.model_copy(update=fields), sealed, self.federation.signing)

    def give(self, record: bytes) -> Any:
        return self.sites[1].respond(RoundRequest(round=1, attempt=1, records=(record,), more=False))


def test_the_server_cannot_bring_a_key_of_its_own_or_of_another_place(federation: Federation) -> None:
    rotation = Rotation(federation)
    frame = split_frame(KEY_MAGIC, rotation.sealed, 10**6, KeyFileError)
    own = sign_frame(
        KEY_MAGIC, check_sealed_key(rotation.sealed, federation.agreed), federation.signing, bytes(frame.payload)
    )
    key = rotation.coordinator.journal.chain.key
    epoch = 2
    cases = {
        "signature": rotation.amendment(own),
        "follows key 0000": rotation.amendment(federation.seal_key(epoch)),
        "follows key 7777": rotation.amendment(federation.seal_key(epoch, "7" * 64)),
        "names key": rotation.amendment(federation.seal_key(epoch, key)),
        "in force from round 2": rotation.amendment(rotation.sealed, round=2),
        "expected at most": rotation.amendment(rotation.sealed + bytes(16 * 2**20)),
        "starts with": rotation.amendment(b"garbage"),
        "a checkpoint follows an amendment": rotation.amendment(rotation.sealed, kind="checkpoint", key=key),
    }
    for says, record in cases.items():
        with pytest.raises(RecordError, match=says):
            rotation.give(record)
    assert rotation.sites[1].position == 1
    assert rotation.give(rotation.amendment(rotation.sealed)).code == ReplyCode.ACKNOWLEDGED


def test_a_sealed_key_for_fewer_than_the_members_is_no_amendment(federation: Federation) -> None:
    rotation = Rotation(federation)
    header = check_sealed_key(rotation.sealed, federation.agreed).model_copy(update={"recipients": ("ash", "birch")})
    payload = bytes(split_frame(KEY_MAGIC, rotation.sealed, 10**6, KeyFileError).payload)
    maker = load_identity(federation.folder / "sites/ash/identity", "ash").signing
    with pytest.raises(RecordError, match="the members would be"):
        rotation.give(rotation.amendment(sign_frame(KEY_MAGIC, header, maker, payload)))


def test_nothing_but_an_honest_checkpoint_follows_an_amendment(federation: Federation) -> None:
    rotation = Rotation(federation)
    coordinator, sites = rotation.coordinator, rotation.sites
    coordinator.advance()
    replies = [exchange(coordinator, site) for site in sites]
    frames = dict(coordinator._acknowledged.frames)
    payload = bytes(frames["ash"].payload)
    journal = coordinator.journal
    by_name = [frames[name] for name in sorted(frames)]
    for chosen, says in (
        ([frames["ash"], frames["birch"]], "expected at least 3 training members, and ash"),
        ([frames["birch"], frames["cedar"], frames[OBSERVER]], "and ash"),
        ([frames["ash"], frames["ash"], frames["birch"]], "expected each once"),
    ):
        with pytest.raises(RecordError, match=says):
            journal.append_checkpoint(chosen, payload)
    with pytest.raises(RecordError, match="is not the checkpoint that ash signed"):
        journal.append_checkpoint(by_name, payload[:-1] + bytes([payload[-1] ^ 1]))
    with pytest.raises(RecordError, match="a checkpoint follows an amendment and nothing else"):
        journal.append_aggregate([], [], b"", 0)
    for damaged in (replies[1].envelope[:-70], b"", replies[1].envelope[:40] + b"?" + replies[1].envelope[41:]):
        with pytest.raises(ProtocolError):
            coordinator.receive(replace(replies[1], envelope=damaged))
    with pytest.raises(ProtocolError, match="in a reply of"):
        coordinator.receive(replace(replies[1], site="cedar"))
    assert coordinator.advance().header.kind == "checkpoint"  # type: ignore[union-attr]


def test_a_checkpoint_that_no_record_has_room_for_is_refused_when_it_comes_and_ends_no_server(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    sites = federation.sites()
    coordinator = federation.begin(sites)
    rotate(federation, coordinator)
    for site in sites:
        exchange(coordinator, site)
    coordinator.advance()
    with monkeypatch.context() as patch:
        patch.setattr("secure_fed.clients.replica.seal_checkpoint", lambda *_: bytes(2**20))
        with pytest.raises(ProtocolError, match="a payload of 1048576 bytes"):
            exchange(coordinator, sites[0])
    for site in sites[1:]:
        exchange(coordinator, site)
    assert coordinator.advance() is None
    exchange(coordinator, sites[0])
    assert coordinator.advance().header.kind == "checkpoint"  # type: ignore[union-attr]


def test_members_with_another_adapter_stop_the_rotation(federation: Federation) -> None:
    rotation = Rotation(federation)
    coordinator, sites = rotation.coordinator, rotation.sites
    coordinator.advance()
    name = sorted(sites[2].parameters)[0]
    exchange(coordinator, sites[0])
    exchange(coordinator, sites[1])
    request = replace(coordinator.request(sites[2].name, sites[2].run, sites[2].position), attestations={})
    sites[2].respond(request)
    corrupt(sites[2], **{name: sites[2].parameters[name] + 2.0**-30})
    coordinator.receive(sites[2].respond(replace(request, records=())))
    assert coordinator.advance() is None  # named, left out, and waited for
    sites[2] = federation.site("cedar")
    exchange(coordinator, sites[2])
    coordinator.advance()
    corrupt(sites[3], **{name: sites[3].parameters[name] + 2.0**-30})
    with pytest.raises(AdapterMismatchError, match="another adapter than the one here"):
        sites[3].respond(replace(coordinator.request(sites[3].name, sites[3].run, sites[3].position), attestations={}))


def test_the_checkpoint_tells_the_server_nothing(federation: Federation) -> None:
    rotation = Rotation(federation)
    coordinator, sites = rotation.coordinator, rotation.sites
    run_round_records = coordinator.advance()
    assert run_round_records is not None
    for site in sites:
        exchange(coordinator, site)
    coordinator.advance()
    record = coordinator.journal.read(2)
    plain = bytes(safetensors.numpy.save(sites[0].parameters))
    assert not any(plain[start : start + 24] in record for start in range(200, len(plain), 997))
    assert sites[0].adapter_digest.encode() not in record


def test_site_files_of_the_fixture_are_read(federation: Federation) -> None:
    assert read_site_file(federation.folder / "sites/ash/site.toml").amendments == "removals"

"""A site against its server: bundles, failures as codes, certificates, clocks, keys, ports."""

from __future__ import annotations

import gc
import hashlib
import io
import math
import os
import queue
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_private_key
from flwr.app import Context, Message, RecordDict
from flwr.common.serde import run_from_proto
from flwr.proto.error_pb2 import Error as ProtoError
from flwr.proto.fleet_pb2 import PullMessagesResponse, PushMessagesRequest
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.recorddict_pb2 import BytesList
from flwr.proto.runtime_pb2 import PullTaskInputRequest
from flwr.supercore.task_identity import TaskIdentity

from secure_fed.clients import flower_node
from secure_fed.clients.flower_app import SiteApp
from secure_fed.clients.flower_node import Way, _Connection, _Over
from secure_fed.clients.site import Site
from secure_fed.clients.sitefile import SiteFile, SiteServer, read_site_file
from secure_fed.core.errors import (
    AddressError,
    BundleError,
    CertificateError,
    ClockError,
    DataError,
    KeyFileError,
    ProtocolError,
    RoundFailedError,
    SecfacmicError,
    SiteFileError,
    StorageError,
    StudyError,
)
from secure_fed.core.layout import ServerState
from secure_fed.core.status import StatusFile
from secure_fed.core.tomlfile import read_toml, write_toml
from secure_fed.lab.simulation import accept_another_run
from secure_fed.operate.taking_part import take_part
from secure_fed.protocol.rounds import ReplyCode, RoundReply, RoundRequest
from secure_fed.protocol.signing import ZERO_DIGEST
from secure_fed.server.byte_store import ByteStore, Incoming, Outgoing
from secure_fed.server.flower_link import SuperLink, _Grid
from secure_fed.server.supervisor import ServerFolders, _begin_if_asked, serve
from secure_fed.transport.certificates import create_authority, renew_certificate, root_fingerprint, server_context
from secure_fed.transport.flower_messages import ROUND_MESSAGE, contract, read_reply, reply_content, request_content
from secure_fed.transport.flower_parcels import parcel, taken_apart, unpacked
from tests.conftest import Federation, Run, stop_at_once
from tests.flower_messages import Shelf, as_message

Change = Callable[[PushMessagesRequest, list[bytes]], Any]

HELLO, LAST = RoundRequest(1, 1, (), more=True), RoundRequest(2, 0, (), more=False)
STUDY = "a" * 64
BYTES_RUN = "e" * 64


class OneSite:
    """As much of a site as the app sees, and a failure to come."""

    name = "ash"
    position = 0
    finished = False
    round = 0
    authority = None

    def __init__(self, failure: Exception | None = None) -> None:
        self.failure = failure
        self.asked = 0

    def respond(self, request: RoundRequest) -> RoundReply:
        self.asked += 1
        if self.failure is not None:
            raise self.failure
        return RoundReply(self.name, ReplyCode.MORE, "", 0, "", b"")


def _answer(site: OneSite, bundle: bytes, kind: str = ROUND_MESSAGE) -> tuple[SiteApp, RoundReply]:
    app = SiteApp(site, STUDY, lambda _: None)  # type: ignore[arg-type]
    shelf = Shelf()
    reply = app.answer(as_message(HELLO, shelf, kind), Context(7, 2, {}, RecordDict(), {}), bundle, shelf)
    assert not reply.has_error()  # flwr's own errors carry texts
    return app, read_reply(reply.content, "ash", shelf.fetch)


def _with_file(bundle: bytes, name: str, text: str) -> bytes:
    stream = io.BytesIO(bundle)
    with zipfile.ZipFile(stream, "a") as files:
        files.writestr(name, text)
    return stream.getvalue()


def test_the_studys_contract_is_answered() -> None:
    site = OneSite()
    app, reply = _answer(site, contract(STUDY))
    assert (reply.code, site.asked, app.failure) == (ReplyCode.MORE, 1, None)


@pytest.mark.parametrize(
    "bundle",
    [
        contract(STUDY)[:-1] + b"x",
        _with_file(contract(STUDY), "stub.py", "import os; os.system('true')"),
        contract("b" * 64),
        b"",
    ],
    ids=["modified", "with an extra file", "of another study, as of one in plain mode", "empty"],
)
def test_any_other_bundle_is_refused_unread(bundle: bytes) -> None:
    site = OneSite()
    app, reply = _answer(site, bundle)
    assert reply.code == ReplyCode.REFUSED_BUNDLE
    assert site.asked == 0
    assert isinstance(app.failure, BundleError)


def test_a_message_of_another_kind_is_refused() -> None:
    site = OneSite()
    _, reply = _answer(site, contract(STUDY), kind="query")
    assert (reply.code, site.asked) == (ReplyCode.FAILED, 0)


@pytest.mark.parametrize(
    ("failure", "code", "kept"),
    [
        (DataError("/data/patients/mueller: gone"), ReplyCode.FAILED_DATA, DataError),
        (StorageError("/disk: full"), ReplyCode.FAILED_STORAGE, StorageError),
        (SiteFileError("policy"), ReplyCode.FAILED_POLICY, SiteFileError),
        (ValueError("patient mueller"), ReplyCode.FAILED, RoundFailedError),
        (MemoryError(), ReplyCode.FAILED, RoundFailedError),
    ],
)
def test_of_a_failure_only_a_code_leaves(failure: Exception, code: ReplyCode, kept: type[SecfacmicError]) -> None:
    app, reply = _answer(OneSite(failure), contract(STUDY))
    assert reply == RoundReply("ash", code, "", 0, "", b"")
    assert isinstance(app.failure, kept)
    assert "mueller" not in str(app.failure) or app.failure is failure


# --- a real SuperLink in this process ---


class Link:
    """A SuperLink with one registered key."""

    def __init__(self, folder: Path, hosts: list[str]) -> None:
        create_authority(folder / "tls", hosts)
        self.key = ec.generate_private_key(ec.SECP256R1())
        public = self.key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
        self.sites = {"ash": public}
        self.folder = folder
        self.incoming, self.outgoing = Incoming(folder / "in"), Outgoing(folder / "out")
        self.store = ByteStore(self.incoming, self.outgoing, BYTES_RUN, lambda site: 10_000_000)
        self.link = SuperLink(folder / "tls", ("127.0.0.1", 0), self.sites, self.store)
        (self.server, bound), _ = self.link._servers
        self.port = bound.getsockname()[1]
        self.authority = folder / "tls" / "ca.crt"

    def way(self, **changes: Any) -> Way:
        return Way(f"127.0.0.1:{self.port}", **{"authority": self.authority, "sites": 1, "wait": 0} | changes)

    def connect(self, **changes: Any) -> _Connection:
        connection = _Connection(self.way(**changes), "ash", self.key)
        connection.join()
        return connection


@pytest.fixture
def link(tmp_path: Path) -> Iterator[Link]:
    made = Link(tmp_path, ["127.0.0.1"])
    yield made
    stop_at_once(made.link)


def test_bytes_that_move_are_signs_of_life_of_who_is_there(link: Link) -> None:
    ash, node = link.connect(), link.link._state.nodes[link.link.nodes["ash"]]
    digest = link.outgoing.publish(bytes(200_000))
    for moves in (lambda: ash.line.send(BYTES_RUN, bytes(100_000)), lambda: ash.line.fetch(digest, 200_000)):
        node.online_until = time.time() + 5
        moves()
        assert node.online_until > time.time() + 10
    ash.leave()
    ash.line.fetch(digest, 200_000)
    assert node.online_until <= time.time()


def test_a_site_waits_for_a_server_whose_disk_is_full(link: Link, monkeypatch: pytest.MonkeyPatch) -> None:
    """It hears so, though it has sent more than what lies between them."""
    ash, pwrite, full = link.connect(), os.pwrite, iter(range(2))

    def write(*arguments: Any) -> int:
        if next(full, None) is not None:
            raise OSError(28, "No space left on device")
        return pwrite(*arguments)

    ash.line._part = 3_000_000
    monkeypatch.setattr(os, "pwrite", write)
    monkeypatch.setattr(ash.line, "_held", lambda *arguments: 0)  # asked once, and not as after a broken line
    ash.line.send(BYTES_RUN, bytes(3_000_000))
    assert ash.line._part > 1_500_000
    ash.leave()


def test_a_registered_site_joins_leaves_and_joins_again(link: Link) -> None:
    connection = link.connect()
    assert connection.node.node_id == link.link.nodes["ash"]
    assert connection.pull() is None
    connection.leave()
    link.connect().leave()


@pytest.mark.slow
def test_a_node_that_crashed_waits_to_rejoin(link: Link, caplog: pytest.LogCaptureFixture) -> None:
    crashed = link.connect()
    crashed._left.set()  # no more heartbeats, no farewell
    caplog.set_level("INFO", "secure_fed")
    began = time.monotonic()
    link.connect().leave()
    assert "waiting to rejoin" in caplog.text
    assert 5 < time.monotonic() - began < 25


def test_a_clock_too_far_ahead_is_named(link: Link, monkeypatch: pytest.MonkeyPatch) -> None:
    # The clock by which the site signs and compares, and not the one by which the server judges.
    true_time = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: true_time() + 8_000_000_000)
    from secure_fed.transport import connection

    class Ahead(connection.datetime):  # type: ignore[misc,name-defined]
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return super().now(tz) + timedelta(seconds=8)

    monkeypatch.setattr(connection, "datetime", Ahead)
    with pytest.raises(ClockError, match=r"[789] s ahead of the server's.*NTP"):
        link.connect()


def test_a_name_that_the_certificate_lacks_is_refused(tmp_path: Path) -> None:
    link = Link(tmp_path, ["fl.example.org"])
    try:
        with pytest.raises(CertificateError, match="another name"):
            link.connect()
    finally:
        stop_at_once(link.link)


def test_a_port_in_use_is_named(link: Link) -> None:
    with pytest.raises(AddressError, match=rf"127.0.0.1:{link.port}.*in use"):
        SuperLink(link.folder / "tls", ("127.0.0.1", link.port), link.sites, link.store)


def test_a_server_without_a_certificate_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(CertificateError, match="secfacmic study ca"):
        SuperLink(tmp_path / "tls", ("127.0.0.1", 0), {}, ByteStore(Incoming(tmp_path), Outgoing(tmp_path), "", len))


def test_a_renewed_certificate_is_taken_while_the_server_runs(link: Link, caplog: pytest.LogCaptureFixture) -> None:
    """Connections of before go on; new ones get the new one, which an old authority's copy at a site trusts."""
    caplog.set_level("INFO", "secure_fed")
    before = link.connect()
    old = ssl.get_server_certificate(("127.0.0.1", link.port))
    renew_certificate(link.folder / "tls", ["localhost"])
    link.link._looked_at_certificate = -math.inf
    link.link.look_after_certificate()
    assert "a new certificate is in use" in caplog.text
    assert ssl.get_server_certificate(("127.0.0.1", link.port)) != old
    assert before.pull() is None
    before.leave()
    link.connect().leave()


def test_a_site_that_has_an_amendment_waits_for_the_server_under_the_authority_it_names(
    link: Link, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It gives no message to one under the authority before, which may be stolen, and need not be started again."""
    caplog.set_level("INFO", "secure_fed")
    new, file = tmp_path / "new", tmp_path / "both.crt"
    create_authority(new, ["127.0.0.1"])
    file.write_bytes(link.authority.read_bytes() + (new / "ca.crt").read_bytes())
    monkeypatch.setattr(flower_node, "OVER_SECONDS", 0.3)
    monkeypatch.setattr(flower_node, "RETRY_FIRST", 0.01)

    def site(authority: Path) -> _Connection:
        return _Connection(
            link.way(authority=authority), "ash", link.key, lambda: True, root_fingerprint(new / "ca.crt")
        )

    link.connect(authority=file).leave()  # one that was away has not got it yet
    waiting = site(file)
    with pytest.raises(_Over):
        waiting.join()
    assert "which alone an amendment lets in" in caplog.text
    with pytest.raises(CertificateError, match="not issued by the study's authority"):
        site(new / "ca.crt").join()
    link.link._certificate.context = server_context(new / "server.crt", new / "server.key")
    waiting.join()
    waiting.leave()
    link.connect(authority=file).leave()


def test_a_server_warns_before_its_certificate_ends(link: Link, caplog: pytest.LogCaptureFixture) -> None:
    link.link._certificate.until = datetime.now(UTC) + timedelta(days=29)
    for _ in range(2):
        link.link._looked_at_certificate = -math.inf
        link.link.look_after_certificate()
    assert caplog.text.count("--renew") == 1
    (link.folder / "tls" / "server.crt").write_text("no certificate")
    link.link._looked_at_certificate = -math.inf
    link.link.look_after_certificate()
    assert "the one before stays in use" in caplog.text
    link.connect().leave()


def test_a_modified_bundle_is_refused_over_the_wire(link: Link) -> None:
    """The bundle that a site checks is the one that came with the run, not one that it was promised."""
    bundle = _with_file(contract(STUDY), "stub.py", "raise SystemExit")
    link.link.start_run(bundle)
    state = link.link._state
    (run,) = state.get_run_info(statuses=["starting"])
    state.activate_task(run.primary_task_id)
    connection = link.connect()
    assert connection._bundle(run.run_id) == bundle
    connection.leave()


def _asked(link: Link) -> tuple[_Grid, str]:
    """Begin a run and ask the first site; where its reply will come, and the message's id."""
    grid = _begun(link)
    return grid, _ask(link, grid, HELLO)


def _begun(link: Link) -> _Grid:
    token = link.link.start_run(contract(STUDY))
    grid = _Grid(runtime_api_address=link.link.runtime, insecure=True, token=token)
    task = grid._runtime_client.PullTaskInput(PullTaskInputRequest())
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = task.task_id, task.run.run_id, 1
    grid.set_run(run_from_proto(task.run))
    return grid


def _ask(link: Link, grid: _Grid, request: RoundRequest) -> str:
    message = Message(request_content(request, Shelf().publish), link.link.nodes["ash"], "train.round", ttl=60.0)
    (identifier,) = grid.push_messages([message])
    return identifier


def _taken_at(port: int) -> list[socket.socket]:
    """The server's ends of the connections to a port."""
    # By type: isinstance would wake what is loaded lazily.
    open_ones = [each for each in gc.get_objects() if type(each) is socket.socket and each.fileno() >= 0]
    inet = [each for each in open_ones if each.family == socket.AF_INET and each.getsockname()[1] == port]
    return [each for each in inet if not each.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)]


def test_no_answer_waits_for_an_acknowledgement(link: Link) -> None:
    """Nagle's algorithm and delayed acknowledgements, met in one connection, make each answer 40 ms late."""
    site = link.connect()
    grid, _ = _asked(link)
    for port in (link.port, int(link.link.runtime.rpartition(":")[2])):
        taken = _taken_at(port)
        assert taken
        assert all(each.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) for each in taken)
    grid.close()
    site.leave()


def _reply(message: Message, code: ReplyCode = ReplyCode.MORE) -> Message:
    return Message(reply_content(RoundReply("ash", code, "", 0, "", b""), Shelf().send), reply_to=message)


def test_a_reply_in_the_name_of_another_site_is_refused(link: Link) -> None:
    thief = ec.generate_private_key(ec.SECP256R1())
    public = thief.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    link.link.register({**link.sites, "birch": public})
    ash = link.connect()
    grid, identifier = _asked(link)
    received = ash.pull()
    assert received is not None
    stolen = _Connection(link.way(), "birch", thief)
    stolen.join()
    try:
        # It even knows the question; its own node id and key are in order.
        with pytest.raises(httpx.HTTPStatusError, match="409"):
            stolen._client.push(_push(stolen, _reply(received[0], ReplyCode.FAILED)))
        assert list(grid.pull_messages([identifier])) == []
        with mock.patch.object(ash._client, "push", wraps=ash._client.push) as given:
            ash.push(_reply(received[0]))
        call, _ = unpacked(given.call_args.args[0], PushMessagesRequest)
        assert list(call.clientapp_runtime_list) == []  # how long it worked would tell of its images
        (message,) = grid.pull_messages([identifier])
        assert read_reply(message.content, "ash", Shelf().fetch).code == ReplyCode.MORE
    finally:
        stolen.leave()
        ash.leave()
        grid.close()


def _push(connection: _Connection, message: Message, change: Change = lambda request, parts: None) -> BytesList:
    """The call that gives a reply, changed."""
    heads, trees, parts = taken_apart([message])
    request = PushMessagesRequest(node=connection.node, messages_list=heads, message_object_trees=trees)
    change(request, parts)
    return parcel(request, parts)


@pytest.mark.parametrize(
    "change",
    [
        lambda request, parts: parts.pop(),
        lambda request, parts: parts.append(b"one more"),
        lambda request, parts: parts.__setitem__(0, parts[0] + b"x"),
        lambda request, parts: parts.extend([b""] * 100),
        lambda request, parts: request.messages_list.append(request.messages_list[0]),
        lambda request, parts: request.ClearField("messages_list"),
        lambda request, parts: request.ClearField("message_object_trees"),
        lambda request, parts: request.messages_list[0].error.CopyFrom(ProtoError(code=1, reason="a text")),
        lambda request, parts: setattr(request.messages_list[0].metadata, "src_node_id", 7),
    ],
    ids=["less", "more", "another", "many", "two", "none", "no tree", "an error", "of another"],
)
def test_a_reply_that_is_not_whole_is_refused_and_nothing_of_it_is_kept(link: Link, change: Change) -> None:
    ash = link.connect()
    grid, identifier = _asked(link)
    received = ash.pull()
    assert received is not None
    kept = len(link.link._state.object_store)
    with pytest.raises(httpx.HTTPStatusError, match="409"):
        ash._client.push(_push(ash, _reply(received[0]), change))
    assert list(grid.pull_messages([identifier])) == []
    assert len(link.link._state.object_store) == kept
    ash.push(_reply(received[0]))
    (message,) = grid.pull_messages([identifier])
    assert read_reply(message.content, "ash", Shelf().fetch).code == ReplyCode.MORE
    assert len(link.link._state.object_store) == 0
    ash.leave()
    grid.close()


def test_a_parcel_that_is_none_is_refused(link: Link) -> None:
    ash = link.connect()
    for packed in (BytesList(), BytesList(vals=[b"\xff"])):
        with pytest.raises(httpx.HTTPStatusError, match="400"):
            ash._client.push(packed)
    ash.leave()


def test_an_answer_that_is_none_ends_a_site_with_a_typed_error(link: Link) -> None:
    ash = link.connect()
    for said in (b"\xff\xff", parcel(PullMessagesResponse()).SerializeToString()):
        answer = httpx.Response(200, content=said, headers={"content-type": "application/protobuf"})
        lies = httpx.Client(transport=httpx.MockTransport(lambda request, answer=answer: answer))  # type: ignore[misc]
        with mock.patch.object(ash._client, "_client", lies), pytest.raises(ProtocolError, match="answer"):
            ash.pull()
    ash.leave()


def test_what_a_reply_answers_is_what_its_checked_head_says(link: Link) -> None:
    """A reply's own bytes name a question too, and nobody checks that it is the sender's."""
    ash = link.connect()
    grid, identifier = _asked(link)
    received = ash.pull()
    assert received is not None
    other = _reply(received[0])
    other.metadata.__dict__["_reply_to_message_id"] = "0" * 64

    def answers(request: PushMessagesRequest, parts: list[bytes]) -> None:
        request.messages_list[0].metadata.reply_to_message_id = identifier

    ash._client.push(_push(ash, other, answers))
    (message,) = grid.pull_messages([identifier])
    assert message.metadata.reply_to_message_id == identifier
    ash.leave()
    grid.close()


def test_a_reply_whose_parts_are_no_message_is_taken_for_an_empty_one(link: Link) -> None:
    """It has the form that flwr asks for, and cannot be put together: no reader takes it, and the rounds go on."""
    ash = link.connect()
    grid, identifier = _asked(link)
    received = ash.pull()
    assert received is not None
    broken = b"Message  3\x00\xff\xff\xff"
    name = hashlib.sha256(broken).hexdigest()

    def breaks(request: PushMessagesRequest, parts: list[bytes]) -> None:
        parts[:] = [broken]
        request.message_object_trees[0].CopyFrom(ObjectTree(object_id=name))
        request.messages_list[0].metadata.message_id = name

    ash._client.push(_push(ash, _reply(received[0]), breaks))
    (message,) = grid.pull_messages([identifier])
    with pytest.raises(ProtocolError):
        read_reply(message.content, "ash", Shelf().fetch)
    ash.leave()
    grid.close()


def test_a_whole_reply_is_taken_though_its_site_has_left(link: Link) -> None:
    """flwr alone would drop it, and the server would wait for a site that has ended."""
    ash = link.connect()
    grid, identifier = _asked(link)
    received = ash.pull()
    assert received is not None
    ash.push(_reply(received[0]))
    ash.leave()
    (message,) = grid.pull_messages([identifier])
    assert not message.has_error()
    assert read_reply(message.content, "ash", Shelf().fetch).code == ReplyCode.MORE
    assert not list(grid.get_nodes())
    grid.close()


def test_replies_that_the_rounds_did_not_get_are_given_again(link: Link) -> None:
    """Their call is repeated after 30 s; what it had taken was lost, and a site that has ended was waited for."""
    ash = link.connect()
    grid, first = _asked(link)
    received = ash.pull()
    assert received is not None
    ash.push(_reply(received[0]))
    for _ in range(2):
        (message,) = grid.pull_messages([first])
        assert (message.metadata.reply_to_message_id, message.has_error()) == (first, False)
    second = _ask(link, grid, HELLO)
    received = ash.pull()
    assert received is not None
    ash.push(_reply(received[0]))
    (message,) = grid.pull_messages([first, second])
    assert message.metadata.reply_to_message_id == first  # which nobody has confirmed
    (message,) = grid.pull_messages([second])
    assert (message.metadata.reply_to_message_id, message.has_error()) == (second, False)
    ash.leave()
    grid.close()


def test_a_site_outside_the_study_cannot_open_it(federation: Federation) -> None:
    path = federation.folder / "sites" / "ash" / "site.toml"
    path.write_text(path.read_text().replace('"ash"', '"elm"', 1))
    with pytest.raises((StudyError, SiteFileError), match="elm"):
        federation.site("ash")


def test_an_authority_is_never_overwritten(tmp_path: Path) -> None:
    create_authority(tmp_path / "tls", ["127.0.0.1", "fl.example.org", "::1"])
    assert (tmp_path / "tls" / "ca.key").stat().st_mode & 0o077 == 0
    with pytest.raises(CertificateError, match="never overwritten"):
        create_authority(tmp_path / "tls", ["127.0.0.1"])
    with pytest.raises(CertificateError, match="neither a name nor an address"):
        create_authority(tmp_path / "other", ["not a host"])


def test_the_flower_key_of_an_identity_is_read(federation: Federation) -> None:
    folder = federation.folder / "sites" / "ash" / "identity"
    key = load_ssh_private_key((folder / "flower.key").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    member = federation.agreed.study.site("ash")
    assert member.keys.flower == public
    assert federation.agreed.study.id != ZERO_DIGEST


# --- how a server begins ---


def test_a_server_of_another_mode_is_refused(federation: Federation) -> None:
    folders = ServerFolders(federation.folder / "study.toml", federation.folder / "server")
    with pytest.raises(StudyError, match="--mode plain"):
        serve(folders, "plain", ("127.0.0.1", 0))


def test_a_server_begins_a_run_with_a_sealed_key_only(federation: Federation, tmp_path: Path) -> None:
    folders = ServerFolders(federation.folder / "study.toml", federation.folder / "server")
    with pytest.raises(StudyError, match="secfacmic keys create"):
        _begin_if_asked(federation.agreed, folders, None)
    sealed = tmp_path / "study.key"
    sealed.write_bytes(federation.seal_key(1))
    _begin_if_asked(federation.agreed, folders, sealed)
    run = ServerState(folders.state).current_run
    assert run is not None
    _begin_if_asked(federation.agreed, folders, sealed)  # a restart with the same command
    _begin_if_asked(federation.agreed, folders, None)
    assert ServerState(folders.state).current_run == run
    sealed.write_bytes(federation.seal_key(2))
    with pytest.raises(StudyError, match="keys rotate"):
        _begin_if_asked(federation.agreed, folders, sealed)
    sealed.write_bytes(sealed.read_bytes()[:-1])
    with pytest.raises(KeyFileError):
        _begin_if_asked(federation.agreed, folders, sealed)


def test_a_thread_that_fails_says_so_in_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    code = (
        "import threading; from secure_fed.core.processes import log_lines; log_lines()\n"
        "one = threading.Thread(target=lambda: [][1]); one.start(); one.join()"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True)
    (line,) = capfd.readouterr().err.splitlines()
    assert line.endswith("ERROR a thread ended with IndexError")


@pytest.fixture
def over(finished_run: Path, tmp_path: Path) -> Path:
    """A site that has applied the last round, and whose server is gone."""
    shutil.copytree(finished_run, tmp_path / "out", symlinks=True)
    create_authority(tmp_path / "tls", ["localhost"])
    folder = tmp_path / "out" / "sites" / "ash"
    file = read_toml(folder / "site.toml", SiteFile, ValueError)  # type: ignore[type-var]
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    server = SiteServer(address=address, authority=str(tmp_path / "tls" / "ca.crt"))
    write_toml(folder / "site.toml", file.model_copy(update={"server": server}))
    return folder


def test_a_site_whose_study_is_over_says_so_and_ends(
    over: Path, secfacmic: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flower_node, "OVER_SECONDS", 0.3)
    monkeypatch.setattr(Site, "features", None)  # no image is looked at
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    ended = secfacmic("client", "--site", over)
    assert ended.returncode == 0
    assert "ash: the study is over here, with all 3 rounds applied" in ended.stderr
    for told in (f"the adapter is {over / 'state' / 'adapter.safetensors'}", "secfacmic predict", f"evidence {over} "):
        assert told in ended.stderr
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False, raising=False)
    again = secfacmic("client", "--site", over)  # into a log, which names no place
    assert "the adapter is in the state folder that site.toml names; next: secfacmic report" in again.stderr
    assert str(over) not in again.stderr
    assert (StatusFile(over / "state").read()["finished"], StatusFile(over / "state").read()["round"]) == (True, 3)
    assert "site: finished\n" in secfacmic("status", over).stdout


def test_a_site_that_expects_another_run_waits_for_it(over: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Waits(Exception):
        pass

    def wait(site: Site, progress: object) -> None:
        raise Waits

    monkeypatch.setattr(flower_node, "OVER_SECONDS", 0.3)
    monkeypatch.setattr(Site, "features", wait)  # which are needed only to train
    agreed = Federation(over.parents[1]).agreed
    accept_another_run(agreed, over.parents[1])
    site = Site(read_site_file(over), agreed)
    assert site.finished
    assert not site.over
    with pytest.raises(RoundFailedError, match="Waits"):
        take_part(read_site_file(over))


def test_a_site_whose_last_reply_nobody_takes_answers_when_it_is_asked_again(
    link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was silent for so long, on a busy machine, that flwr has told the server that it will not answer. If it left
    now, the server would wait for it for as long as a round may take. It asks again in its own time."""
    monkeypatch.setattr(flower_node, "OVER_SECONDS", 0.2)
    grid, asked = _begun(link), queue.Queue[str]()

    class Silent(OneSite):
        finished = over = True
        connection_key = link.key

        def respond(self, request: RoundRequest) -> RoundReply:
            if not self.asked:
                node = link.link._state.nodes[link.link.nodes["ash"]]
                until, node.online_until = node.online_until, 0.0
                assert _replied(grid, asked.get()).has_error()
                node.online_until = until
            return super().respond(request)

    site = Silent()
    app = SiteApp(site, STUDY, lambda _: None)  # type: ignore[arg-type]
    taking_part = threading.Thread(target=flower_node.run_site, args=(app, link.way()))
    taking_part.start()
    while not list(grid.get_nodes()):
        time.sleep(0.02)
    asked.put(_ask(link, grid, LAST))
    while not site.asked:
        time.sleep(0.02)
    time.sleep(0.8)
    asked.put(_ask(link, grid, LAST))
    assert not _replied(grid, asked.get()).has_error()
    assert site.asked == 2
    grid.close()
    link.link.stop()  # until then it stays
    taking_part.join(10)
    assert not taking_part.is_alive()


def test_a_server_that_was_slow_once_is_called_again_also_after_the_last_round(
    link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flower_node, "OVER_SECONDS", 0.1)
    ash = _Connection(link.way(), "ash", link.key, lambda: True)
    answers: list[Any] = [httpx.ReadTimeout("slow"), "there"]

    def call() -> str:
        time.sleep(0.15)
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return str(answer)

    assert ash._repeat(call) == "there"
    ash.leave()


def test_who_was_silent_and_is_heard_again_is_the_same_and_who_starts_again_is_not(link: Link) -> None:
    """What a site was asked is lost with its process, and not with its silence: of a reply that nobody waits for any
    more the site would hear that it was taken."""
    grid, ash = _begun(link), link.connect()
    (first,) = grid.get_nodes()
    link.link._state.nodes[first.node_id].online_until = 0.0
    assert list(grid.get_nodes()) == []
    ash._client.SendNodeHeartbeat(ash._beat_request())
    assert [node.last_activated_at for node in grid.get_nodes()] == [first.last_activated_at]
    ash.leave()
    ash = link.connect()
    assert [node.last_activated_at for node in grid.get_nodes()] > [first.last_activated_at]
    ash.leave()
    grid.close()


def _replied(grid: _Grid, asked: str) -> Message:
    end = time.monotonic() + 5
    while not (found := list(grid.pull_messages([asked]))):
        assert time.monotonic() < end
    return found[0]

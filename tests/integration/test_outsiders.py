"""Who has no key can neither lock the members out nor fill the server's memory, disk or log."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from secure_fed.clients.flower_app import SiteApp
from secure_fed.clients.flower_node import Way, run_site
from secure_fed.protocol.rounds import ReplyCode
from secure_fed.server import flower_api, gate, listener
from secure_fed.server.byte_store import CHUNK, ByteStore, Incoming, Outgoing
from secure_fed.server.flower_link import SuperLink, open_grid
from secure_fed.server.listener import MEMBER_CONNECTIONS, STRANGERS, STRANGERS_AT_ADDRESS, Callers
from secure_fed.server.round_loop import RoundLoop
from secure_fed.server.supervisor import most_bytes
from secure_fed.transport.certificates import create_authority
from secure_fed.transport.connection import (
    DIGEST,
    KEY_HEADER,
    OFFSET,
    RUN,
    TIME,
    TOTAL,
    SignedRequest,
)
from secure_fed.transport.flower_messages import contract, read_reply
from tests.conftest import TRAINING, Federation, stop_at_once
from tests.flower_messages import Shelf
from tests.integration.test_flower_site import Link, _asked, _push, _reply

NOTHING = hashlib.sha256(b"").hexdigest()

OUTSIDER = """
import socket, ssl, sys, threading, time
port, authority, key, slow, bodies = int(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
trust = ssl.create_default_context(cafile=authority)
held = []
def connect(secure):
    plain = socket.create_connection(("127.0.0.1", port), timeout=10)
    return trust.wrap_socket(plain, server_hostname="127.0.0.1") if secure else plain
def hold(number):
    while True:  # drip, and come back
        try:
            link = connect(number % 4 == 0)
            link.sendall(b"POST /v1/fleet/pull HTTP/1.1\\r\\nX-Slow: ")
            while True:
                time.sleep(2)
                link.sendall(b"x")
        except OSError:
            time.sleep(10)
def send(number):
    try:
        link = connect(True)
        held.append(link)
        link.sendall((f"POST /v1/fleet/push HTTP/1.1\\r\\nHost: x\\r\\nContent-Length: 8000000\\r\\n"
                      f"flwr-public-key: {key}\\r\\n\\r\\n").encode())
        for _ in range(80):
            link.sendall(bytes(100_000))
    except OSError:
        pass
threads = [threading.Thread(target=hold, args=(n,), daemon=True) for n in range(slow)]
threads += [threading.Thread(target=send, args=(n,), daemon=True) for n in range(bodies)]
for thread in threads:
    thread.start()
time.sleep(1.0)
print("ready", flush=True)
for thread in threads:
    thread.join()
"""


@pytest.fixture
def link(tmp_path: Path) -> Iterator[Link]:
    made = Link(tmp_path, ["127.0.0.1"])
    yield made
    stop_at_once(made.link)


def public_key(link: Link) -> str:
    pem = link.key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return base64.b64encode(pem).decode()


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def exchange(link: Link) -> None:
    """What a site does of a round: it joins, is asked, and its reply is taken."""
    ash = link.connect()
    grid, identifier = _asked(link)
    received = ash.pull()
    assert received is not None
    ash.push(_reply(received[0]))
    (message,) = grid.pull_messages([identifier])
    assert read_reply(message.content, "ash", Shelf().fetch).code == ReplyCode.MORE
    ash.leave()
    grid.close()


def test_members_are_served_while_outsiders_hold_connections_and_send_bodies(
    link: Link, caplog: pytest.LogCaptureFixture
) -> None:
    exchange(link)
    before = resident()
    authority = str(link.folder / "tls" / "ca.crt")
    command = [sys.executable, "-c", OUTSIDER, str(link.port), authority, public_key(link), "500", "50"]
    outsider = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert outsider.stdout is not None
        assert outsider.stdout.readline() == "ready\n"
        began = time.monotonic()
        for _ in range(3):
            exchange(link)
        took = time.monotonic() - began
        grown = resident() - before
        assert len(link.link.callers) <= STRANGERS + MEMBER_CONNECTIONS
    finally:
        outsider.kill()
        outsider.wait()
        outsider.stdout.close()  # type: ignore[union-attr]
    assert grown < 50e6
    assert sum(len(record.getMessage()) for record in caplog.records) < 1e6
    assert took < 30


def test_members_finish_encrypted_rounds_meanwhile(
    federation: Federation, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Sites, round loop and SuperLink in this process, over real connections; the outsiders are another process."""
    agreed, coordinator = federation.agreed, federation.begin(federation.sites())
    incoming, outgoing = Incoming(tmp_path / "in"), Outgoing(tmp_path / "out")
    store = ByteStore(incoming, outgoing, coordinator.run, lambda site: most_bytes(agreed, site))
    create_authority(tmp_path / "tls", ["127.0.0.1"])
    sites = federation.sites()
    keys = {site.name: site.connection_key.public_key() for site in sites}
    openssh = {name: key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode() for name, key in keys.items()}
    member = base64.b64encode(keys["ash"].public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)).decode()
    link = SuperLink(tmp_path / "tls", ("127.0.0.1", 0), openssh, store)
    authority = tmp_path / "tls" / "ca.crt"
    way = Way(f"127.0.0.1:{link.address[1]}", authority, len(sites), wait=0)
    apps = [SiteApp(site, agreed.study.id, lambda _: None) for site in sites]
    threads = [threading.Thread(target=run_site, args=(app, way), daemon=True) for app in apps]
    outsider = None
    try:
        with open_grid(link.runtime, link.start_run(contract(agreed.study.id))) as (grid, _):
            loop = RoundLoop(coordinator, agreed, grid, link.nodes, incoming, outgoing)
            for thread in threads:
                thread.start()
            play(loop, 1, link)
            before = resident()
            command = [sys.executable, "-c", OUTSIDER, str(link.address[1]), str(authority), member, "500", "50"]
            outsider = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            assert outsider.stdout is not None
            assert outsider.stdout.readline() == "ready\n"
            held = play(loop, agreed.study.rounds, link)
            grown = resident() - before
            loop.run()  # every site has the last record
    finally:
        if outsider is not None:
            outsider.kill()
            outsider.communicate()
        stop_at_once(link)
    assert held <= 64 + 8 * len(sites), "members have theirs beside those of all others"
    assert [app.failure for app in apps] == [None] * len(apps)
    assert [entry.sites for entry in coordinator.rounds] == [TRAINING] * agreed.study.rounds
    assert grown < 50e6
    assert sum(len(record.getMessage()) for record in caplog.records) < 1e6


def play(loop: RoundLoop, rounds: int, link: SuperLink) -> int:
    """Close so many rounds; how many connections there were at most."""
    ended, held = time.monotonic() + 120, 0
    while len(loop.coordinator.rounds) < rounds:
        assert time.monotonic() < ended, "no round was closed"
        loop.step()
        held = max(held, len(link.callers))
        time.sleep(0.02)
    return held


def raw(link: Link) -> ssl.SSLSocket:
    trust = ssl.create_default_context(cafile=str(link.folder / "tls" / "ca.crt"))
    return trust.wrap_socket(socket.create_connection(("127.0.0.1", link.port)), server_hostname="127.0.0.1")


def head(link: Link, length: int, /, **other: Any) -> bytes:
    """The head of a member's request, signed for another time, method, path... if one is given; unsigned for None."""
    facts = {"method": "POST", "path": "/v1/fleet/pull", "length": length, "digest": NOTHING}
    facts |= {"site": "ash", "time": time.time_ns() // 1_000_000}
    lines = [f"POST {facts['path']} HTTP/1.1", "Host: x", f"Content-Length: {length}"]
    signed = SignedRequest(**(facts | other))  # type: ignore[arg-type]
    true = {TIME: str(facts["time"]), DIGEST: NOTHING} | ({RUN: "", OFFSET: "0", TOTAL: "0"} if other else {})
    headers = signed.headers(link.key) | (true if other else {})
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode()


def unsigned(link: Link, length: int) -> bytes:
    lines = ["POST /v1/fleet/pull HTTP/1.1", "Host: x", f"Content-Length: {length}"]
    return "\r\n".join([*lines, f"{KEY_HEADER}: {public_key(link)}", "", ""]).encode()


def answer(link: Link, request: bytes) -> bytes:
    with raw(link) as connection:
        connection.settimeout(10)
        connection.sendall(request)
        return connection.recv(100)


def test_a_body_is_not_read_before_its_signature_is_checked(link: Link) -> None:
    assert answer(link, unsigned(link, 100)).startswith(b"HTTP/1.1 401")  # no byte of the body was sent


@pytest.mark.parametrize(
    "other",
    [
        {"path": "/v1/fleet/get-run"},
        {"method": "PUT"},
        {"time": 1_700_000_000_000},
        {"site": "birch"},
        {"length": 1},
        {"digest": "0" * 64},
        {"run": "1" * 64},
        {"offset": 1},
        {"total": 1},
    ],
)
def test_a_signature_counts_for_its_own_request(link: Link, other: dict[str, Any]) -> None:
    assert answer(link, head(link, 0, **other)).startswith(b"HTTP/1.1 401")
    # Signed right it is let through, and told that the node in its body is another: and only then is there a text.
    assert b"content-length: 0" not in answer(link, head(link, 0)).lower()


def drip(connection: socket.socket, seconds: float) -> bool:
    """Whether the other end hung up."""
    ended = time.monotonic() + seconds
    try:
        while time.monotonic() < ended:
            connection.sendall(b"x")
            time.sleep(0.05)
    except OSError:
        return True
    return False


def test_headers_and_handshakes_have_a_time_limit(link: Link, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "STRANGER_SECONDS", 0.5)
    silent = socket.create_connection(("127.0.0.1", link.port))
    with raw(link) as dripping:
        dripping.sendall(b"POST / HTTP/1.1\r\nX: ")
        assert drip(dripping, 5)
    silent.settimeout(5)
    with contextlib.suppress(ConnectionError, ssl.SSLError):
        assert silent.recv(1) == b""
    silent.close()
    assert len(link.link.callers) == 0


@pytest.mark.parametrize("before", [b"", b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"], ids=["first", "second"])
@pytest.mark.parametrize("start", [b"POST / HTTP/1.1\r\nX: ", b"POST /", b"\r\n\r\n", b"POST / HTTP/1.1\r\n"])
def test_headers_have_a_size(link: Link, before: bytes, start: bytes) -> None:
    more = b"x: y\r\n" if start.endswith(b"1.1\r\n") else b"\r\n" if start == b"\r\n\r\n" else b"x"
    with raw(link) as connection:
        connection.settimeout(5)
        if before:
            connection.sendall(before)
            while not connection.recv(1000).endswith(b"}"):
                pass
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            connection.sendall(start)
            for _ in range(100):
                connection.sendall(more * (1000 // len(more)))
            assert connection.recv(100)[:12] in (b"HTTP/1.1 400", b"")


def test_who_does_not_read_what_it_asked_for_holds_little(link: Link) -> None:
    digest = link.outgoing.publish(os.urandom(8_000_000))
    path = f"/records/{digest}"
    signed = SignedRequest("ash", "GET", path, 0, NOTHING, time.time_ns() // 1_000_000)
    lines = [
        f"GET {path} HTTP/1.1",
        "Host: x",
        *(f"{name}: {value}" for name, value in signed.headers(link.key).items()),
    ]
    with raw(link) as connection:
        connection.sendall("\r\n".join([*lines, "", ""]).encode())
        assert connection.recv(12) == b"HTTP/1.1 200"
        time.sleep(1.0)
        (protocol,) = link.server.server_state.connections
        assert protocol.transport.get_write_buffer_size() <= listener.WRITE_BUFFER + CHUNK + 32_000  # TLS's own, too
        assert protocol.flow.write_paused


def test_a_body_that_does_not_come_is_given_up(link: Link, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "BODY_SECONDS", 0.3)
    with raw(link) as connection:
        connection.settimeout(5)
        connection.sendall(head(link, 1000) + b"x")  # and nothing more
        assert connection.recv(100).startswith(b"HTTP/1.1 408")
        assert drip(connection, 5)


def test_a_member_leaves_no_more_in_memory_than_one_reply_to_what_it_was_asked(
    link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    ash = link.connect()
    grid, _ = _asked(link)
    received = ash.pull()
    assert received is not None
    store = link.link._state.object_store
    ash._client.push(_push(ash, _reply(received[0])))
    held = len(store)
    for code in (ReplyCode.FAILED, ReplyCode.FAILED_DATA):
        with pytest.raises(httpx.HTTPStatusError, match="409"):
            ash._client.push(_push(ash, _reply(received[0], code)))
    assert len(store) == held
    monkeypatch.setattr(flower_api, "MAX_PARTS", 2)
    request = _push(ash, _reply(received[0]))
    with pytest.raises(httpx.HTTPStatusError, match="409"):
        ash._client.push(request)
    ash.leave()
    grid.close()


# --- who makes room ---


def test_strangers_make_room_and_members_do_not() -> None:
    callers, gone = Callers(), []

    def come(address: str, port: int):  # type: ignore[no-untyped-def]
        caller = callers.come((address, port))
        caller.hang_up = lambda: gone.append((address, port))
        return caller

    come("10.0.0.1", 1)
    callers.prove(("10.0.0.1", 1), b"ash")
    for port in range(100):
        come("10.0.0.9", port)
    assert len(gone) == 100 - STRANGERS_AT_ADDRESS
    come("10.0.0.2", 1)
    for port in range(100):
        come("10.0.0.8", port)
    assert ("10.0.0.1", 1) not in gone
    assert ("10.0.0.2", 1) not in gone
    assert len(callers) == 1 + STRANGERS
    for port in range(2, 20):
        come("10.0.0.1", port)
        callers.prove(("10.0.0.1", port), b"ash")
    assert sum(address == "10.0.0.1" for address, _ in gone) == 19 - MEMBER_CONNECTIONS


def test_of_more_than_can_be_served_at_once_some_are() -> None:
    """All sites of one address come again at once, each as soon as it was dropped, and a proof takes as long as more
    than there is room for take to come."""
    callers, dropped, proven = Callers(), set[int](), 0
    for port in range(3000):
        callers.come(("10.0.0.1", port)).hang_up = partial(dropped.add, port)
        served = port - STRANGERS_AT_ADDRESS - 8
        if served >= 0 and served not in dropped:
            callers.prove(("10.0.0.1", served), str(served).encode())
            proven += 1
    assert proven > 3000 / 10


def test_a_connection_that_makes_room_before_it_is_served_is_closed(
    link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep = link.server._keep  # type: ignore[attr-defined]

    def dropped(task: object) -> None:  # before its first step
        link.link.callers.drop_strangers()
        keep(task)

    monkeypatch.setattr(link.server, "_keep", dropped)
    with socket.create_connection(("127.0.0.1", link.port)) as connection:
        connection.settimeout(3)
        with contextlib.suppress(ConnectionError):
            assert connection.recv(1) == b""


def test_all_connections_of_a_loop_read_into_one_buffer() -> None:
    """asyncio's own, one for each, made 500 connections cost 130 MB."""
    loop, context = asyncio.new_event_loop(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        buffer = bytearray(listener.READ_BYTES)
        both = [listener._Tls(loop, buffer, asyncio.Protocol(), context, loop.create_future()) for _ in range(2)]
        assert all(one.get_buffer(-1).obj is buffer and len(one.get_buffer(-1)) == len(buffer) for one in both)
        given: list[bytes] = []
        both[0]._incoming = SimpleNamespace(write=lambda data: given.append(bytes(data)))
        buffer[:40_000] = came = os.urandom(40_000)
        both[0].buffer_updated(40_000)
        assert b"".join(given) == came
        assert max(map(len, given)) == listener.TLS_RECORD  # OpenSSL's own buffer never shrinks
        assert len(both[0].get_buffer(-1)) == len(buffer)
    finally:
        loop.close()


def test_failed_accepts_are_told_once_a_minute(
    link: Link, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server = link.server
    for _ in range(10_000):
        server._tell(OSError(24, "Too many open files"))  # type: ignore[attr-defined]
    lines = [record for record in caplog.records if "could not be taken" in record.message]
    assert len(lines) == 1
    monkeypatch.setattr(listener, "TELL_SECONDS", 0.0)
    server._tell(OSError(24, "Too many open files"))  # type: ignore[attr-defined]
    assert "10000 connections could not be taken (Too many open files)" in caplog.text


def test_an_unknown_key_is_refused_without_more(link: Link) -> None:
    link.key = ec.generate_private_key(ec.SECP256R1())
    assert answer(link, head(link, 0)).startswith(b"HTTP/1.1 403")

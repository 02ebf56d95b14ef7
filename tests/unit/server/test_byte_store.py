"""Large bytes beside Flower's calls: what is refused, what is resumed, and that what is held is never sent again."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import hashlib
import http.server
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from secure_fed.clients import byte_line
from secure_fed.clients.byte_line import FAULTS, LEAST_PART, MOST_PART, ByteLine, Stuck
from secure_fed.core.errors import ProtocolError
from secure_fed.server.byte_store import ByteStore, Incoming, Outgoing
from secure_fed.server.gate import Gate, Member, Members
from secure_fed.server.listener import Callers
from secure_fed.transport.connection import DIGEST, OFFSET, SignedRequest, public_key_header

RUN, MOST = "e" * 64, 300_000
KEYS = {name: ec.generate_private_key(ec.SECP256R1()) for name in ("ash", "birch")}
DATA = random.Random(0).randbytes(200_000)
WHOLE = hashlib.sha256(DATA).hexdigest()


class Line(httpx.BaseTransport):
    """A store behind its gate, reached without a network; counts what arrives, and breaks as it is told."""

    def __init__(self, folder: Path) -> None:
        self.incoming, self.outgoing = Incoming(folder / "in"), Outgoing(folder / "out")
        self.open()
        self.sent = 0
        self.breaks: Callable[[httpx.Request], bytes | None] = lambda request: None
        self.asked: list[str] = []

    def open(self) -> None:
        """Begin as a server that was started again."""
        import base64

        members = Members(Callers())
        for name, key in KEYS.items():
            members.keys[base64.b64decode(public_key_header(key))] = Member(name, key.public_key())
        store = ByteStore(self.incoming, self.outgoing, RUN, lambda site: MOST)

        async def none(*arguments: object) -> Any:
            raise AssertionError("no call of Flower's")

        self.gate = Gate(members, (), none, store)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        body = request.read()
        self.asked.append(request.method)
        cut = self.breaks(request)
        self.sent += len(body if cut is None else cut)
        events = [{"type": "http.request", "body": body[at : at + 10_000], "more_body": True}
                  for at in range(0, len(body if cut is None else cut), 10_000)]  # fmt: skip
        events += [{"type": "http.request", "body": b""}] if cut is None else [{"type": "http.disconnect"}]
        status, headers, parts = 0, [], []

        async def receive() -> Any:
            return events.pop(0)

        async def send(event: Any) -> None:
            nonlocal status, headers
            if event["type"] == "http.response.start":
                status, headers = event["status"], event["headers"]
            else:
                parts.append(event["body"])

        found = [(name.lower(), value) for name, value in request.headers.raw]
        scope = {"type": "http", "method": request.method, "path": request.url.path, "headers": found}
        asyncio.run(self.gate(scope, receive, send))
        if cut is not None:
            raise httpx.ReadTimeout("cut")
        return httpx.Response(status, headers=headers, stream=Pieces(parts))


class Pieces(httpx.SyncByteStream):
    def __init__(self, parts: list[bytes]) -> None:
        self.parts = parts

    def __iter__(self) -> Iterator[bytes]:
        yield from self.parts


@pytest.fixture
def line(tmp_path: Path) -> Line:
    return Line(tmp_path)


def client(line: Line, site: str = "ash", **more: Any) -> ByteLine:
    return ByteLine(httpx.Client(transport=line), "https://server", site, KEYS[site], lambda call: call(), **more)


def put(line: Line, part: bytes, offset: int, site: str = "ash", **other: Any) -> httpx.Response:
    """One part, signed as it is unless something else is said of it."""
    facts = {"method": "PUT", "path": f"/bytes/{WHOLE}", "length": len(part), "run": RUN, "total": len(DATA)}
    facts |= {"digest": hashlib.sha256(part).hexdigest(), "time": int(1000 * time.time())} | other
    request = SignedRequest(site=site, offset=offset, **facts)  # type: ignore[arg-type]
    headers = request.headers(KEYS[site])
    with httpx.Client(transport=line) as http:
        return http.request(request.method, f"https://server{request.path}", content=part, headers=headers)


def held(line: Line, site: str = "ash") -> int:
    answer = put(line, b"", 0, site, method="POST")
    assert answer.status_code == 200
    return int(answer.headers[OFFSET])


# --- parts ---


def test_parts_in_order_are_acknowledged_each_and_make_the_whole(line: Line) -> None:
    for offset in range(0, len(DATA), 50_000):
        part = DATA[offset : offset + 50_000]
        answer = put(line, part, offset)
        assert (answer.status_code, int(answer.headers[OFFSET])) == (200, offset + 50_000)
        assert answer.headers[DIGEST] == hashlib.sha256(part).hexdigest()
    assert line.incoming.take("ash", WHOLE, len(DATA)) == DATA
    line.incoming.drop("ash")
    assert list(line.incoming.folder.iterdir()) == []


def test_a_part_out_of_order_or_twice_is_answered_with_what_is_held(line: Line) -> None:
    assert put(line, DATA[:1000], 0).status_code == 200
    for offset in (0, 500, 2000):
        answer = put(line, DATA[offset : offset + 1000], offset)
        assert (answer.status_code, answer.headers[OFFSET]) == (409, "1000")
    assert held(line) == 1000


def test_a_part_of_another_digest_does_not_count(line: Line) -> None:
    assert put(line, DATA[:1000], 0).status_code == 200
    answer = put(line, DATA[1000:2000], 1000, digest="0" * 64)
    assert (answer.status_code, answer.headers[OFFSET]) == (422, "1000")
    assert held(line) == 1000
    assert next(line.incoming.folder.iterdir()).stat().st_size == 1000
    assert put(line, DATA[1000:2000], 1000).status_code == 200


def test_bytes_beyond_the_length_or_the_studys_envelope_are_refused(line: Line) -> None:
    assert put(line, DATA[:10], 0, total=MOST + 1).status_code == 413
    assert put(line, DATA[:10], 0, total=9).status_code == 413
    assert put(line, DATA[:10], len(DATA) - 9).status_code == 413
    assert put(line, bytes(MOST_PART + 1), 0).status_code == 413
    assert put(line, b"", 0).status_code == 413
    assert put(line, DATA[:10], 0, length=9).status_code == 401  # signed for fewer than it sends
    assert not line.incoming.folder.exists() or held(line) == 0


def test_a_whole_of_another_digest_begins_anew(line: Line) -> None:
    other = f"/bytes/{'1' * 64}"
    answer = put(line, DATA[:100], 0, path=other, total=100)
    assert (answer.status_code, answer.headers[OFFSET]) == (422, "0")
    with pytest.raises(ProtocolError, match="not here"):
        line.incoming.take("ash", "1" * 64, 100)


def test_a_site_has_one_upload_and_cannot_touch_anothers(line: Line) -> None:
    assert put(line, DATA[:1000], 0).status_code == 200
    assert held(line, "birch") == 0  # the same digest, of another site
    assert put(line, DATA[:10], 0, "birch").status_code == 200
    assert held(line) == 1000
    second = {"path": f"/bytes/{'1' * 64}", "total": 100}
    assert put(line, DATA[:10], 0, **second).status_code == 200
    assert sorted(path.name.split(".")[0] for path in line.incoming.folder.iterdir()) == ["ash", "birch"]
    assert held(line) == 0  # the first was given up for the second
    with pytest.raises(ProtocolError):
        line.incoming.take("birch", WHOLE, len(DATA))


def test_another_run_and_other_paths_are_refused(line: Line) -> None:
    assert put(line, DATA[:10], 0, run="1" * 64).status_code == 410
    for path in ("/bytes/x", "/bytes/" + "A" * 64, "/records/../in", f"/records/{WHOLE}", "/records/"):
        assert put(line, DATA[:10], 0, path=path).status_code == 404


def test_what_is_held_outlives_the_server(line: Line) -> None:
    assert put(line, DATA[:70_000], 0).status_code == 200
    line.open()
    assert held(line) == 70_000
    client(line).send(RUN, DATA)
    assert line.sent == len(DATA)
    line.open()
    assert held(line) == len(DATA)  # whole, and not taken yet
    assert client(line).send(RUN, DATA) == WHOLE
    assert line.sent == len(DATA)


def test_what_lies_whole_from_before_a_start_is_checked_before_it_counts(line: Line) -> None:
    """A machine that lost its power may have kept the name, and not the bytes."""
    client(line).send(RUN, DATA)
    (whole,) = line.incoming.folder.iterdir()
    whole.write_bytes(bytes(len(DATA)))
    line.open()
    assert held(line) == 0
    assert client(line).send(RUN, DATA) == WHOLE
    assert line.incoming.take("ash", WHOLE, len(DATA)) == DATA


@pytest.mark.parametrize("content", [DATA, bytes(len(DATA)), DATA + b"x"])
def test_what_had_all_come_when_the_server_was_killed_becomes_whole_or_begins_anew(line: Line, content: bytes) -> None:
    """Between the last byte and the check of the whole: a site that is told that all is here sends nothing more."""
    line.incoming.folder.mkdir()
    (line.incoming.folder / f"ash.{WHOLE}.{len(DATA)}.part").write_bytes(content)
    right = content == DATA
    assert held(line) == (len(DATA) if right else 0)
    assert client(line).send(RUN, DATA) == WHOLE
    assert line.incoming.take("ash", WHOLE, len(DATA)) == DATA
    assert line.sent == (0 if right else len(DATA))


def test_who_asks_while_the_whole_is_being_checked_does_not_disturb_it(
    line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def meanwhile(check: Callable[..., bool], *arguments: Any) -> bool:
        assert line.gate._store._of("ash", WHOLE, len(DATA)).held == len(DATA)
        return check(*arguments)

    monkeypatch.setattr(asyncio, "to_thread", meanwhile)
    assert [put(line, DATA[at : at + 100_000], at).status_code for at in (0, 100_000)] == [200, 200]
    assert line.incoming.take("ash", WHOLE, len(DATA)) == DATA


# --- the site's end ---


def test_what_is_held_is_asked_only_where_something_can_be(line: Line) -> None:
    """First, after a send that was broken off, and of the same bytes: not before each one."""
    sender, other = client(line), DATA[:5000]
    sender.send(RUN, DATA)
    line.asked.clear()
    sender.send(RUN, other)
    assert line.asked == ["PUT"]
    line.asked.clear()
    sender.send(RUN, other)
    assert line.asked == ["POST"]

    def broken(call: Callable[[], httpx.Response]) -> httpx.Response:
        raise RuntimeError

    sender._call, line.breaks = broken, lambda request: b""  # the line is gone for good
    with pytest.raises(RuntimeError):
        sender.send(RUN, DATA)
    sender._call, line.breaks = (lambda call: call()), (lambda request: None)
    line.asked.clear()
    sender.send(RUN, DATA)
    assert line.asked[0] == "POST"


def test_parts_grow_on_a_fast_line_and_each_byte_is_sent_once(line: Line) -> None:
    assert client(line).send(RUN, DATA) == WHOLE
    assert line.sent == len(DATA)
    assert line.asked.count("PUT") == 2  # 64 kB, then the rest
    assert line.incoming.take("ash", WHOLE, len(DATA)) == DATA


def test_parts_fit_a_slow_line(monkeypatch: pytest.MonkeyPatch, line: Line) -> None:
    clock = [0.0]
    monkeypatch.setattr(byte_line.time, "monotonic", lambda: clock[0])
    sizes: list[int] = []

    def at_8_kilobytes_a_second(request: httpx.Request) -> None:
        if request.method == "PUT":
            sizes.append(len(request.content))
            clock[0] += len(request.content) / 8000
            # A patience of the part's own time, many times over.
            assert request.extensions["timeout"]["read"] > len(request.content) / 8000 * 5

    line.breaks = at_8_kilobytes_a_second  # type: ignore[assignment]
    client(line).send(RUN, DATA)
    assert sizes[0] == 64 * 1024
    assert set(sizes[1:-1]) == {LEAST_PART}
    assert sum(sizes) == len(DATA)


@pytest.mark.parametrize("arrives", [True, False], ids=["the answer is lost", "half of it is lost"])
def test_a_broken_line_costs_a_part_at_most(line: Line, arrives: bool) -> None:
    broken = []

    def once(request: httpx.Request) -> bytes | None:
        if request.method == "PUT" and len(broken) < 1:
            broken.append(len(request.content))
            return b"" if arrives else request.content[: len(request.content) // 2]
        return None

    line.breaks = once
    assert client(line).send(RUN, DATA) == WHOLE
    assert line.incoming.take("ash", WHOLE, len(DATA)) == DATA
    assert line.sent <= 1.2 * len(DATA)


def test_a_server_that_takes_nothing_was_not_asking_for_what_does_not_fit(
    line: Line, caplog: pytest.LogCaptureFixture
) -> None:
    """That would be said as failed-protocol, which the server takes for a refusal of the round."""
    line.breaks = lambda request: b"" if request.method == "PUT" else None
    with pytest.raises(Stuck):
        client(line).send(RUN, DATA)
    assert line.asked.count("PUT") == FAULTS
    assert f"holds 0 of {len(DATA)} bytes" in caplog.text


def test_a_server_whose_disk_is_full_is_waited_for(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    """The site has done nothing wrong, and must not say that it was asked for what does not fit."""
    full, pwrite = iter(range(3 * FAULTS)), os.pwrite

    def write(*arguments: Any) -> int:
        if next(full, None) is not None:
            raise OSError(28, "No space left on device")
        return pwrite(*arguments)

    def call(ask: Callable[[], httpx.Response]) -> httpx.Response:
        for _ in range(4 * FAULTS):
            with contextlib.suppress(httpx.HTTPStatusError):
                return ask()
        raise AssertionError("it asks for what does not change")

    monkeypatch.setattr(os, "pwrite", write)
    site = ByteLine(httpx.Client(transport=line), "https://server", "ash", KEYS["ash"], call)
    assert site.send(RUN, DATA) == WHOLE
    assert line.incoming.take("ash", WHOLE, len(DATA)) == DATA


# --- down ---


def test_records_come_by_their_digest_in_ranges(line: Line) -> None:
    digest = line.outgoing.publish(DATA)
    assert client(line).fetch(digest, len(DATA)) == DATA
    with httpx.Client(transport=line) as http:

        def get(asked: str) -> httpx.Response:
            request = SignedRequest("ash", "GET", f"/records/{digest}", 0, hashlib.sha256(b"").hexdigest(), now())
            headers = request.headers(KEYS["ash"]) | ({"range": asked} if asked else {})
            return http.get(f"https://server/records/{digest}", headers=headers)

        part = get("bytes=10-19")
        assert (part.status_code, part.content) == (206, DATA[10:20])
        assert part.headers["content-range"] == f"bytes 10-19/{len(DATA)}"
        assert "immutable" in part.headers["cache-control"]
        assert get("").content == DATA
        assert get(f"bytes={len(DATA) - 5}-{2 * len(DATA)}").content == DATA[-5:]
        for beyond in (f"bytes={len(DATA)}-", "bytes=20-10", "bytes=-5", "lines=1-2", "bytes=0-1,3-4"):
            refused = get(beyond)
            assert (refused.status_code, refused.headers["content-range"]) == (416, f"bytes */{len(DATA)}")


def now() -> int:
    return int(1000 * time.time())


def test_a_download_goes_on_where_it_was_cut(line: Line) -> None:
    digest = line.outgoing.publish(DATA)
    came: list[int] = []
    handle = line.handle_request

    def cut(request: httpx.Request) -> httpx.Response:
        answer = handle(request)
        first = b"".join(answer.stream.parts)[:60_000]  # type: ignore[union-attr]
        came.append(len(first))

        def some() -> Iterator[bytes]:
            yield first
            raise httpx.ReadError("cut")

        return httpx.Response(answer.status_code, headers=answer.headers, stream=Cut(some()))

    def again(call: Callable[[], Any]) -> Any:
        while True:
            try:
                return call()
            except httpx.ReadError:
                continue

    line.handle_request = cut  # type: ignore[method-assign]
    ash = ByteLine(httpx.Client(transport=line), "https://server", "ash", KEYS["ash"], again)
    assert ash.fetch(digest, len(DATA)) == DATA
    assert sum(came) == len(DATA)
    assert len(came) == 4


class Cut(httpx.SyncByteStream):
    def __init__(self, parts: Iterator[bytes]) -> None:
        self.parts = parts

    def __iter__(self) -> Iterator[bytes]:
        return self.parts


def test_a_server_that_gives_other_bytes_is_refused(line: Line) -> None:
    digest = line.outgoing.publish(DATA)
    (line.outgoing.folder / digest).write_bytes(DATA[:-1] + b"x")
    with pytest.raises(ProtocolError, match="other bytes"):
        client(line).fetch(digest, len(DATA))
    with pytest.raises(ProtocolError, match="and no more"):
        client(line).fetch(line.outgoing.publish(b""), 5)
    with pytest.raises(ProtocolError, match="more than"):
        client(line).fetch(digest, len(DATA) - 1)


def test_a_record_is_never_in_memory_whole(line: Line) -> None:
    """So that memory stays bounded while hundreds take one over slow lines."""
    store = ByteStore(line.incoming, line.outgoing, RUN, lambda site: MOST)
    request = SignedRequest("ash", "GET", f"/records/{line.outgoing.publish(DATA)}", 0, "", 0)
    sizes: list[int] = []

    async def send(event: Any) -> None:
        if "status" not in event:
            sizes.append(len(event["body"]))

    async def none() -> Any:
        raise AssertionError("no body")

    asyncio.run(store.answer(request, {}, none, send))
    assert sum(sizes) == len(DATA)
    assert max(sizes) <= 32 * 1024


# --- copies elsewhere ---


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A plain web server with a folder."""
    folder = tmp_path / "web"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments, directory=str(folder))

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_records_come_from_any_web_server(line: Line, elsewhere: tuple[Path, str]) -> None:
    folder, url = elsewhere
    (folder / WHOLE).write_bytes(DATA)
    assert client(line, elsewhere=url).fetch(WHOLE, len(DATA)) == DATA
    assert line.asked == []


@pytest.mark.parametrize("content", [None, b"", DATA[:-1], DATA[:-1] + b"x", DATA + b"x"])
def test_a_place_that_gives_anything_else_is_told_and_passed_over(
    line: Line, elsewhere: tuple[Path, str], content: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "secure_fed")
    folder, url = elsewhere
    if content is not None:
        (folder / WHOLE).write_bytes(content)
    line.outgoing.publish(DATA)
    assert client(line, elsewhere=url + "/").fetch(WHOLE, len(DATA)) == DATA
    assert line.asked == ["GET"]
    assert "fetched from the server" in caplog.text


def test_a_place_that_says_nothing_is_waited_for_once_in_a_while(
    line: Line, elsewhere: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not by each question and record of a round."""
    monkeypatch.setattr(byte_line, "ELSEWHERE_SECONDS", 0.2)
    line.outgoing.publish(DATA)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.setblocking(False)
        site = client(line, elsewhere=f"http://127.0.0.1:{silent.getsockname()[1]}")

        def called() -> int:
            assert site.fetch(WHOLE, len(DATA)) == DATA
            calls = 0
            with contextlib.suppress(BlockingIOError):
                while silent.accept():
                    calls += 1
            return calls

        assert [called(), called(), called()] == [1, 0, 0]
        monkeypatch.setattr(byte_line, "ELSEWHERE_PAUSE", 0.0)
        site._elsewhere_from = 0.0  # later
        assert [called(), called()] == [1, 1]


def test_a_copy_that_is_not_there_yet_is_looked_for_again_and_a_wrong_one_is_not(
    line: Line, elsewhere: tuple[Path, str]
) -> None:
    folder, url = elsewhere
    site = client(line, elsewhere=url)
    line.outgoing.publish(DATA)
    for content, asked in ((None, 1), (DATA, 0), (DATA[1:], 1), (DATA, 1)):
        if content is not None:
            (folder / WHOLE).write_bytes(content)
        line.asked.clear()
        assert site.fetch(WHOLE, len(DATA)) == DATA
        assert len(line.asked) == asked


def test_a_place_that_takes_its_time_to_say_that_it_has_no_copy_is_not_asked_again(
    line: Line, elsewhere: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each question and record of a round would wait for it."""
    monkeypatch.setattr(byte_line, "ELSEWHERE_PROMPT", 0.0)
    folder, url = elsewhere
    site = client(line, elsewhere=url)
    line.outgoing.publish(DATA)
    assert site.fetch(WHOLE, len(DATA)) == DATA
    (folder / WHOLE).write_bytes(DATA)
    line.asked.clear()
    assert site.fetch(WHOLE, len(DATA)) == DATA
    assert line.asked == ["GET"]


def test_a_place_that_is_slow_or_not_there_is_passed_over(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    line.outgoing.publish(DATA)
    for url in ("http://127.0.0.1:1", "http://a..b/x", "http://h:abc", "http://[::1/x", "http://h:99999", "http:///x"):
        assert client(line, elsewhere=url).fetch(WHOLE, len(DATA)) == DATA


@pytest.mark.parametrize(
    "start",
    [
        b"HTTP/1.1 200 OK\r\nx: ",
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1;",
    ],
)
def test_a_place_that_gives_a_byte_now_and_then_is_passed_over(
    line: Line, monkeypatch: pytest.MonkeyPatch, start: bytes
) -> None:
    """In its headers too, or between them and its bytes: each byte would begin a new time limit."""
    monkeypatch.setattr(byte_line, "ELSEWHERE_SECONDS", 0.3)
    line.outgoing.publish(DATA)
    with socket.create_server(("127.0.0.1", 0)) as place:

        def trickle() -> None:
            connection, _ = place.accept()
            with connection, contextlib.suppress(OSError):
                connection.sendall(start)
                for _ in range(40):
                    connection.sendall(b"x")
                    time.sleep(0.1)

        thread = threading.Thread(target=trickle)
        thread.start()
        began = time.monotonic()
        assert client(line, elsewhere=f"http://127.0.0.1:{place.getsockname()[1]}").fetch(WHOLE, len(DATA)) == DATA
        assert time.monotonic() - began < 3
        thread.join()


def test_a_place_that_gives_enough_is_waited_for(
    line: Line, elsewhere: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long that is: what has come counts."""
    monkeypatch.setattr(byte_line, "ELSEWHERE_SECONDS", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as place:

        def give() -> None:
            connection, _ = place.accept()
            with connection:
                connection.recv(10_000)
                connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(DATA))
                for at in range(0, len(DATA), 20_000):
                    connection.sendall(DATA[at : at + 20_000])
                    time.sleep(0.13)

        thread = threading.Thread(target=give)
        thread.start()
        site = client(line, elsewhere=f"http://127.0.0.1:{place.getsockname()[1]}")
        assert site.fetch(WHOLE, len(DATA)) == DATA
        assert line.asked == []
        thread.join()


def test_a_place_that_packs_what_it_gives_is_asked_for_the_bytes_as_they_are(line: Line) -> None:
    class Packs(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            packs = "gzip" in self.headers.get("accept-encoding", "")
            body = gzip.compress(DATA) if packs else DATA
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.send_header("content-encoding", "gzip" if packs else "identity")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Packs) as place:
        threading.Thread(target=place.handle_request, daemon=True).start()
        assert client(line, elsewhere=f"http://127.0.0.1:{place.server_port}").fetch(WHOLE, len(DATA)) == DATA
    assert line.asked == []

"""Large bytes between a site and its server, beside Flower's calls: in parts that fit the line, each sent once.

However slow the line: what the server has is not sent again, what has come is not fetched again, and what is waited for
is the next part, not the whole.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import ssl
import time
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import httpx
from cryptography.hazmat.primitives.asymmetric import ec

from secure_fed.clients.flower_app import Interrupted
from secure_fed.core.errors import ProtocolError
from secure_fed.transport.connection import OFFSET, SignedRequest

log = logging.getLogger(__name__)

LEAST_PART, MOST_PART = 16 * 1024, 4 * 2**20
FIRST_PART = 64 * 1024
PART_SECONDS = 2.0
"""How long a part shall take: parts grow and shrink to it."""

GROWTH = 4
"""Most times by which a part may be longer than the one before."""

PATIENCE_SECONDS, PATIENCE_PARTS = 60.0, 20.0
"""A part's answer is waited for so long, and so many times the time that it should take at the rate so far."""

FAULTS = 5
"""After so many parts in a row that do not get any further the site looks what it is asked for now."""

TOLD_SECONDS = 10.0
"""What took longer to go up is told."""

ELSEWHERE_SECONDS = 10.0
ELSEWHERE_RATE = 20_000.0
"""A place of copies that gives nothing for so many seconds, or fewer bytes a second than that, is not waited for."""

ELSEWHERE_PROMPT = 2.0
"""A place that says within so many seconds that a copy is not there is asked for the next one."""

ELSEWHERE_PAUSE = 600.0
"""For so many seconds a place that was silent, slow or wrong is not asked again: each question and record of a round
would wait for it."""

T = TypeVar("T")
Call = Callable[[Callable[[], httpx.Response]], httpx.Response]


class Stuck(Interrupted):
    """The server is there and takes none of the bytes; nothing is wrong with what it asks for."""


class ByteLine:
    """The large bytes of one site.

    Args:
        client: of HTTP, which trusts the server.
        base: the server's URL.
        site: the site's name.
        key: its connection key.
        call: makes a request that may be repeated, until the server is there and answers well.
        elsewhere: URL below which copies of records lie, by digest; what comes from there is checked like all else.
    """

    def __init__(
        self,
        client: httpx.Client,
        base: str,
        site: str,
        key: ec.EllipticCurvePrivateKey,
        call: Call,
        elsewhere: str | None = None,
    ) -> None:
        self._client = client
        self._base = base
        self._site = site
        self._key = key
        self._call = call
        self._elsewhere = elsewhere
        self._elsewhere_from = -math.inf
        self._part = FIRST_PART
        self._rate = 0.0
        self._sent: str | None = None  # what was sent last, if it was sent to its end

    def send(self, run: str, data: bytes) -> str:
        """Give bytes to the server; returns when it has them all.

        Args:
            run: the run that they are for.
            data: what is sent.

        Returns:
            Their SHA-256, hex, by which a message names them.

        Raises:
            Stuck: the server does not take them, however often they are sent.
            ProtocolError: it says that it holds what it cannot.
        """
        digest = hashlib.sha256(data).hexdigest()
        path = f"/bytes/{digest}"
        # Other bytes than the last ones, which it took to their end, it has none of.
        held = self._held(run, path, len(data)) if self._sent in (None, digest) else 0
        faults, self._sent = 0, None
        sent, parts, first = -(len(data) - held), 0, time.monotonic()
        while held < len(data):
            if faults == FAULTS:
                log.warning(
                    "the server holds %d of %d bytes and has taken none of the last %d parts; expected each to be "
                    "taken: look at what lies on the line (proxy, firewall), and at the server's disk and log; it is "
                    "tried again and again",
                    *(held, len(data), FAULTS),
                )
                raise Stuck
            part, began = data[held : held + self._part], time.monotonic()
            sent, parts = sent + len(part), parts + 1
            try:
                answer = self._put(run, path, part, held, len(data))
                if answer.status_code == 503:  # as when its disk is full, which is mended there
                    put = partial(self._put, run, path, part, held, len(data))
                    answer = self._call(lambda put=put: _unless_503(put()))  # type: ignore[misc]
            except httpx.TransportError:
                # It may have arrived all the same.
                self._part = max(LEAST_PART, self._part // 2)
                before, held = held, self._held(run, path, len(data))
                faults = 0 if held > before else faults + 1
                continue
            if answer.status_code not in (200, 409, 422):
                self._call(lambda answer=answer: answer.raise_for_status())  # type: ignore[misc]
            before, held = held, _held_of(answer, len(data))
            faults = 0 if held > before else faults + 1
            if answer.status_code == 200:
                self._fit(len(part), time.monotonic() - began)
        self._sent = digest
        seconds = time.monotonic() - first
        log.log(
            logging.INFO if seconds > TOLD_SECONDS else logging.DEBUG,
            "%d bytes went up in %d parts and %.0f s; %d of them again",
            len(data),
            parts,
            seconds,
            sent,
        )
        return digest

    def fetch(self, digest: str, length: int) -> bytes:
        """Get bytes by their digest.

        Args:
            digest: SHA-256, hex.
            length: how many there are.

        Raises:
            ProtocolError: the server gives others.
        """
        if self._elsewhere is not None and time.monotonic() >= self._elsewhere_from:
            found = self._fetch_elsewhere(f"{self._elsewhere.rstrip('/')}/{digest}", digest, length)
            if found is not None:
                return found
        data = bytearray()
        while len(data) < length:
            before = len(data)
            self._call(lambda: self._get(f"/records/{digest}", data, length))
            if len(data) == before:
                raise ProtocolError(f"the server has {before} of the {length} bytes that it named, and no more")
        if hashlib.sha256(data).hexdigest() != digest:
            raise ProtocolError("the server gives other bytes than it named; expected those of that digest")
        return bytes(data)

    def _signed(self, method: str, path: str, body: bytes, run: str, offset: int, total: int) -> httpx.Request:
        digest, now = hashlib.sha256(body).hexdigest(), time.time_ns() // 1_000_000
        request = SignedRequest(self._site, method, path, len(body), digest, now, run, offset, total)
        return self._client.build_request(
            method, f"{self._base}{path}", content=body, headers=request.headers(self._key)
        )

    def _held(self, run: str, path: str, total: int) -> int:
        def ask() -> httpx.Response:
            return self._client.send(self._signed("POST", path, b"", run, 0, total)).raise_for_status()

        return _held_of(self._call(ask), total)

    def _put(self, run: str, path: str, part: bytes, offset: int, total: int) -> httpx.Response:
        expected = len(part) / self._rate if self._rate else 0.0
        request = self._signed("PUT", path, part, run, offset, total)
        patience = PATIENCE_SECONDS + PATIENCE_PARTS * expected
        request.extensions["timeout"] = httpx.Timeout(patience, connect=PATIENCE_SECONDS).as_dict()
        answer = self._client.send(request)
        if answer.status_code in (502, 504):
            raise httpx.ReadError(f"a proxy answers {answer.status_code}")
        return answer

    def _fit(self, sent: int, seconds: float) -> None:
        self._rate = sent / max(seconds, 1e-3)
        self._part = int(min(max(self._rate * PART_SECONDS, LEAST_PART), MOST_PART, self._part * GROWTH))

    def _get(self, path: str, data: bytearray, length: int) -> httpx.Response:
        """Go on where ``data`` ends; what comes stays, also when the line breaks, even at the very end."""
        if len(data) == length:
            return httpx.Response(206)
        request = self._signed("GET", path, b"", "", 0, 0)
        request.headers["range"] = f"bytes={len(data)}-"
        answer = self._client.send(request, stream=True)
        try:
            if answer.status_code == 416:
                return answer  # it ends here
            if answer.status_code != 206:
                answer.read()
                answer.raise_for_status()
                raise ProtocolError(f"the server answers a range with {answer.status_code}; expected 206")
            for chunk in answer.iter_raw():
                data += chunk
                if len(data) > length:
                    raise ProtocolError(f"the server gives more than the {length} bytes that it named")
        finally:
            answer.close()
        return answer

    def _fetch_elsewhere(self, url: str, digest: str, length: int) -> bytes | None:
        began = time.monotonic()
        try:
            data = asyncio.run(_read_elsewhere(url, length))
        except (httpx.HTTPError, httpx.InvalidURL, TimeoutError, ValueError) as error:  # the last of names of hosts
            log.info("%s: %s; the record is fetched from the server", url, type(error).__name__)
            prompt = time.monotonic() - began < ELSEWHERE_PROMPT
            if not (prompt and isinstance(error, httpx.HTTPStatusError)):  # which says that the copy is not there yet
                self._elsewhere_from = time.monotonic() + ELSEWHERE_PAUSE
            return None
        if hashlib.sha256(data).hexdigest() != digest:
            log.warning("%s: %d bytes of another digest; the record is fetched from the server", url, len(data))
            self._elsewhere_from = time.monotonic() + ELSEWHERE_PAUSE
            return None
        return data


def _unless_503(answer: httpx.Response) -> httpx.Response:
    return answer.raise_for_status() if answer.status_code == 503 else answer


def _held_of(answer: httpx.Response, total: int) -> int:
    """How many of ``total`` bytes a server says that it holds."""
    text = answer.headers.get(OFFSET, "0")
    if not (text.isascii() and text.isdigit() and len(text) <= len(str(total)) and int(text) <= total):
        raise ProtocolError(f"the server says that it holds {text[:40]!r} bytes; expected a number from 0 to {total}")
    return int(text)


async def _read_elsewhere(url: str, length: int) -> bytes:
    """What a place gives, as it is, and no more than one chunk beyond so many bytes.

    Its time limit moves with the bytes that come: one for each read of the socket would begin anew with each byte, of a
    header too.
    """
    loop, data = asyncio.get_running_loop(), bytearray()
    began = loop.time()
    # No encoding: some web servers pack whatever they give.
    http = httpx.AsyncClient(
        verify=ssl.create_default_context(),
        timeout=ELSEWHERE_SECONDS,
        trust_env=False,
        headers={"accept-encoding": "identity"},
    )
    async with asyncio.timeout(ELSEWHERE_SECONDS) as limit, http as client, client.stream("GET", url) as answer:
        answer.raise_for_status()
        async for chunk in answer.aiter_raw():
            data += chunk
            if len(data) > length:
                break
            limit.reschedule(began + ELSEWHERE_SECONDS + len(data) / ELSEWHERE_RATE)
    return bytes(data)

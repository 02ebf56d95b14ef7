"""Who may call: a member whose key has signed the very request, which is checked before a byte of its body is read.

Behind it are Flower's calls (:mod:`secure_fed.server.flower_api`) and the large bytes beside them
(:mod:`secure_fed.server.byte_store`); everything else does not exist.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import hashlib
import logging
from collections.abc import Awaitable, Callable, Collection, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from cryptography.hazmat.primitives.asymmetric import ec

from secure_fed.core.errors import StorageError
from secure_fed.server.byte_store import ByteStore
from secure_fed.server.http import Receive, Scope, Send, answer, read_body
from secure_fed.server.listener import Callers
from secure_fed.transport.connection import KEY_HEADER, MOST_WAIT, WAIT, SignedRequest, read_signed_request

log = logging.getLogger(__name__)

MAX_BODY = 512 * 1024
"""Most bytes of one of Flower's calls from outside; what is large goes beside them."""

BODY_SECONDS = 60.0
"""How long a body's next bytes may take, up to half as long again."""


ALIVE_SECONDS = 4.0
"""How often bytes that move count as a sign of life."""

T = TypeVar("T")


@dataclass(frozen=True)
class Member:
    """Who may call.

    Attributes:
        name: the site's.
        key: its connection key.
    """

    name: str
    key: ec.EllipticCurvePublicKey


@dataclass(frozen=True)
class Members:
    """All who may call.

    Attributes:
        callers: their connections and all others.
        keys: by public key, as it comes with a request; may change.
    """

    callers: Callers
    keys: dict[bytes, Member] = field(default_factory=dict)


class Answer(Protocol):
    """What a call gives: status, type of the content, content."""

    @property
    def status(self) -> int:
        """Of HTTP."""

    @property
    def kind(self) -> bytes:
        """Of the content."""

    @property
    def body(self) -> bytes:
        """The content."""


Fleet = Callable[[str, bytes, bytes, float, Callable[[], bool]], Awaitable[Answer]]


class Gate:
    """The ASGI app that answers outside.

    Args:
        members: who may call.
        paths: of Flower's calls.
        fleet: answers one: path, public key, body, seconds that it may wait, whether who asked is
            gone.
        store: the large bytes.
        alive: is told the public key of a member whose bytes move, every few seconds.
    """

    def __init__(
        self,
        members: Members,
        paths: Collection[str],
        fleet: Fleet,
        store: ByteStore,
        alive: Callable[[bytes], None] = lambda key: None,
    ) -> None:
        self._alive = alive
        self._members = members
        self._paths = paths
        self._fleet = fleet
        self._store = store

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return
        path, method = scope["path"], scope["method"]
        if path == "/health" and method == "GET":
            await answer(send, 200, b'{"status":"ok"}', b"application/json")
            return
        flower = path in self._paths and method == "POST"
        if not flower and not self._store.serves(method, path):
            await answer(send, 404)
            return
        headers = dict(scope["headers"])
        key = _claimed_key(headers)
        member = self._members.keys.get(key)
        if member is None:
            await answer(send, 403)
            return
        request = read_signed_request(headers, method, path, member.name, member.key)
        if request is None:
            await answer(send, 401)
            return
        peer = scope.get("client")
        self._members.callers.prove(None if peer is None else (peer[0], peer[1]), key)
        try:
            async with asyncio.timeout(None) as limit:
                paced = _paced(receive, limit)
                if flower:
                    await self._answer_flower(request, key, _seconds(headers), paced, receive, send)
                else:
                    moved = self._moved(key)
                    await self._store.answer(request, headers, _after(paced, moved), _after(send, moved))
        except TimeoutError:
            await answer(send, 408)
        except StorageError as error:
            log.error("%s: %s", member.name, error)
            await answer(send, 503)  # the site tries again
        except OSError as error:
            log.error("%s: its bytes cannot be kept (%s)", member.name, error.strerror)
            await answer(send, 503)

    def _moved(self, key: bytes) -> Callable[[], None]:
        """To be called as bytes of a member move, which are signs of life: on a line that they fill, and in a process
        that has hundreds of them to hand over, heartbeats come late."""
        loop, due = asyncio.get_running_loop(), 0.0

        def moved() -> None:
            nonlocal due
            if (now := loop.time()) >= due:
                due = now + ALIVE_SECONDS
                self._alive(key)

        return moved

    async def _answer_flower(
        self, request: SignedRequest, key: bytes, wait: float, paced: Receive, receive: Receive, send: Send
    ) -> None:
        if request.length > MAX_BODY:
            await answer(send, 413)
            return
        body = await read_body(paced, request.length)
        if body is None:
            await answer(send, 413)  # or nobody is there any more to read it
            return
        if hashlib.sha256(body).hexdigest() != request.digest:
            await answer(send, 401)
            return
        with _Watch(receive if wait else None) as watch:
            found = await self._fleet(request.path, key, body, wait, lambda: watch.gone)
        await answer(send, found.status, found.body, found.kind)


class _Watch:
    """Whether whoever waits for an answer has hung up."""

    def __init__(self, receive: Receive | None) -> None:
        self._receive = receive
        self.gone = False

    def __enter__(self) -> _Watch:
        self._task = None if self._receive is None else asyncio.ensure_future(self._watch(self._receive))
        return self

    def __exit__(self, *exception: object) -> None:
        if self._task is not None:
            self._task.cancel()

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.gone = True


def _claimed_key(headers: Mapping[bytes, bytes]) -> bytes:
    with contextlib.suppress(KeyError, binascii.Error):
        return base64.b64decode(headers[KEY_HEADER.encode()], validate=True)
    return b""


def _seconds(headers: Mapping[bytes, bytes]) -> float:
    text = headers.get(WAIT.encode(), b"0")
    return min(float(text), MOST_WAIT) if text.isdigit() and len(text) < 4 else 0.0


def _after(channel: Callable[..., Awaitable[T]], then: Callable[[], None]) -> Callable[..., Awaitable[T]]:
    async def both(*event: MutableMapping[str, Any]) -> T:
        found = await channel(*event)
        then()
        return found

    return both


def _paced(receive: Receive, limit: asyncio.Timeout) -> Receive:
    """A body whose next bytes must come in their time; however long all of it takes."""
    loop = asyncio.get_running_loop()

    async def channel():  # type: ignore[no-untyped-def]
        at, now = limit.when(), loop.time()
        if at is None or at - now < BODY_SECONDS:
            limit.reschedule(now + 1.5 * BODY_SECONDS)  # not for each of many parts of a body
        event = await receive()
        if not event.get("more_body"):
            limit.reschedule(None)
        return event

    return channel

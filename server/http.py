"""As much of HTTP under ASGI as the server's own apps need."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


async def answer(
    send: Send, status: int, body: bytes = b"", kind: bytes = b"", headers: Mapping[str, str] | None = None
) -> None:
    """Answer a request.

    Args:
        send: ASGI's.
        status: of HTTP; above 399 the connection is closed, since a body may not have been read.
        body: the content.
        kind: its type, if it has one.
        headers: others.
    """
    found = [(b"content-length", str(len(body)).encode())]
    if kind:
        found.append((b"content-type", kind))
    if status >= 400:
        found.append((b"connection", b"close"))
    found += [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
    await send({"type": "http.response.start", "status": status, "headers": found})
    await send({"type": "http.response.body", "body": body})


async def read_body(receive: Receive, most: int | None = None) -> bytes | None:
    """A request's whole body; None if whoever sends it hung up, or sends more than so many bytes."""
    parts: list[bytes] = []
    length = 0
    while True:
        event = await receive()
        if event["type"] != "http.request":
            return None
        parts.append(event.get("body", b""))
        length += len(parts[-1])
        if most is not None and length > most:
            return None
        if not event.get("more_body", False):
            return b"".join(parts)

"""A listener that outsiders cannot fill: who has not proven to be a member holds little, and not for long.

uvicorn speaks HTTP; which connections there are is decided here, since neither it nor asyncio has a limit for
handshakes and headers, or one for each address, and asyncio reports every accept that fails.
"""

from __future__ import annotations

import asyncio
import asyncio.sslproto
import contextlib
import logging
import secrets
import socket
import ssl
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from secure_fed.transport.certificates import ServerCertificate

log = logging.getLogger(__name__)

STRANGER_SECONDS = 10
"""From a connection's first byte to its first signed request: handshake and headers."""

SHUTDOWN_SECONDS = 2
"""How long whoever hangs up may take to say so."""

STRANGERS, STRANGERS_AT_ADDRESS = 64, 32
"""Most connections that have not signed anything yet, in all and of one address."""

MEMBER_CONNECTIONS = 8
"""Most connections of one member; a site needs three at a time."""

HEADER_BYTES = 16 * 1024
"""Headers that are not whole after so many bytes never will be."""

WRITE_BUFFER = 64 * 1024
"""What a line has not taken yet lies in memory beyond this only as far as one chunk goes. asyncio's own for TLS is 512
KiB of each connection, in a buffer of OpenSSL's that never shrinks."""

TLS_RECORD = 16 * 1024
"""Most bytes of one TLS record, which is what OpenSSL gives at a time."""

READ_BYTES = 64 * 1024
"""Most bytes that are read of a connection at a time: as much as uvicorn takes before it lets a connection wait."""

TELL_SECONDS = 60.0
"""At most one line in so many seconds about connections that cannot be taken."""


@dataclass(eq=False)
class Caller:
    """One connection.

    Attributes:
        peer: address and port at the other end.
        key: the member that it has proven to be; empty before.
        hang_up: ends it.
    """

    peer: tuple[str, int]
    key: bytes = b""
    hang_up: Callable[[], object] = lambda: None
    since: float = field(default_factory=time.monotonic)


class Callers:
    """The connections that there are. Used by the listener's event loop only."""

    def __init__(self) -> None:
        self._all: dict[tuple[str, int], Caller] = {}
        self._strangers: dict[Caller, None] = {}
        self._members: dict[bytes, dict[Caller, None]] = {}

    def __len__(self) -> int:
        return len(self._all)

    def come(self, peer: tuple[str, int]) -> Caller:
        """Take a connection; strangers that are too many make room, first those of the address that has most.

        Any of them, not the oldest, which of many that come at once is the one that has nearly proven itself: where
        more come than can be served, as all sites after a fault of the line, none would ever be.
        """
        held = Counter(caller.peer[0] for caller in self._strangers)
        full = held[peer[0]] >= STRANGERS_AT_ADDRESS
        if full or held.total() >= STRANGERS:
            address = peer[0] if full else held.most_common(1)[0][0]
            self._drop(secrets.choice([caller for caller in self._strangers if caller.peer[0] == address]))
        caller = self._all[peer] = Caller(peer)
        self._strangers[caller] = None
        return caller

    def go(self, caller: Caller) -> None:
        """Forget a connection that has ended."""
        if self._all.get(caller.peer) is caller:
            del self._all[caller.peer]
        self._strangers.pop(caller, None)
        if caller.key in self._members:
            self._members[caller.key].pop(caller, None)
            if not self._members[caller.key]:
                del self._members[caller.key]

    def prove(self, peer: tuple[str, int] | None, key: bytes) -> None:
        """Note that a connection is a member's; its oldest makes room for more than it may have."""
        caller = self._all.get(peer) if peer is not None else None
        if caller is None or caller.key:
            return
        caller.key = key
        self._strangers.pop(caller, None)
        own = self._members.setdefault(key, {})
        own[caller] = None
        for other in list(own)[:-MEMBER_CONNECTIONS]:
            self._drop(other)

    def expire(self, caller: Caller) -> None:
        """End a connection that has not signed anything in its time."""
        if not caller.key:
            self._drop(caller)

    def drop_strangers(self) -> None:
        """Make room."""
        for caller in list(self._strangers):
            self._drop(caller)

    def _drop(self, caller: Caller) -> None:
        self.go(caller)
        caller.hang_up()


class _Tls(asyncio.sslproto.SSLProtocol):
    """asyncio's TLS at a server, which reads into a buffer that all connections of one event loop have together.

    It gives OpenSSL at once what it has read. asyncio's own buffers are of 256 KiB each, held from before the handshake
    until the garbage collector comes: 500 connections cost 130 MB.

    Args:
        loop: the connections'.
        buffer: theirs.
        protocol: what is spoken over it.
        context: the server's.
        waiter: is told once the handshake is over.
    """

    max_size = TLS_RECORD

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        buffer: bytearray,
        protocol: asyncio.Protocol,
        context: ssl.SSLContext,
        waiter: asyncio.Future[None],
    ) -> None:
        super().__init__(
            *(loop, protocol, context, waiter),
            server_side=True,
            ssl_handshake_timeout=STRANGER_SECONDS,
            ssl_shutdown_timeout=SHUTDOWN_SECONDS,
        )
        self._ssl_buffer, self._ssl_buffer_view = buffer, memoryview(buffer)

    def buffer_updated(self, nbytes: int) -> None:
        """Take what was read; OpenSSL's own buffer stays as large as what it is once given."""
        whole = self._ssl_buffer_view
        for first in range(0, nbytes, TLS_RECORD):
            self._ssl_buffer_view = whole[first:]
            super().buffer_updated(min(TLS_RECORD, nbytes - first))
        self._ssl_buffer_view = whole


class _Protocol(HttpToolsProtocol):
    """uvicorn's, with a limit for headers and for what waits to be written; says when it ends."""

    ended: Callable[[], None]
    _head = 0
    _in_head = True

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        transport.set_write_buffer_limits(high=WRITE_BUFFER)
        super().connection_made(transport)

    def data_received(self, data: bytes) -> None:
        """Read on; who sends headers without end is hung up on."""
        self._head += len(data)
        super().data_received(data)
        if not self._in_head:
            self._head = 0
        elif self._head > HEADER_BYTES and not self.transport.is_closing():
            self.send_400_response("Headers too large.")

    def on_headers_complete(self) -> None:
        self._in_head = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._in_head, self._head = True, 0

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.ended()


class Listener(uvicorn.Server):
    """uvicorn's server, whose connections are taken here.

    Args:
        config: uvicorn's, without TLS.
        bound: where to listen.
        certificate: of the server; each connection begins with the one that is in use then.
        callers: the connections.
    """

    def __init__(
        self, config: uvicorn.Config, bound: socket.socket, certificate: ServerCertificate, callers: Callers
    ) -> None:
        super().__init__(config)
        self._bound = bound
        self._certificate = certificate
        self._callers = callers
        self._tasks: set[asyncio.Task[None]] = set()
        self._told = -TELL_SECONDS
        self._failed = 0
        self._buffer = bytearray(READ_BYTES)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to take connections."""
        await self.lifespan.startup()
        self.servers = []
        self._keep(asyncio.get_running_loop().create_task(self._accept()))
        self.started = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take none any more, and end those that there are."""
        for task in list(self._tasks):
            task.cancel()
        self._bound.close()
        await super().shutdown(sockets)

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        self._bound.setblocking(False)
        while True:
            try:
                connection, address = await loop.sock_accept(self._bound)
            except OSError as error:
                # Out of descriptors, or whoever called has gone.
                self._tell(error)
                self._callers.drop_strangers()
                await asyncio.sleep(0.1)
                continue
            caller = self._callers.come((str(address[0]), int(address[1])))
            caller.hang_up = connection.close  # until its task runs, which others may come before
            self._keep(loop.create_task(self._serve_one(connection, caller)))

    async def _serve_one(self, connection: socket.socket, caller: Caller) -> None:
        loop = asyncio.get_running_loop()
        this = asyncio.current_task()
        assert this is not None  # it runs
        caller.hang_up = this.cancel

        protocol = _Protocol(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)
        protocol.ended = lambda: self._callers.go(caller)
        shaken = loop.create_future()
        tls = _Tls(loop, self._buffer, protocol, self._certificate.context, shaken)
        expiry = loop.call_later(STRANGER_SECONDS, self._callers.expire, caller)
        transport: asyncio.Transport | None = None
        try:
            transport, _ = await loop.connect_accepted_socket(lambda: tls, connection)
            await shaken
        except (OSError, asyncio.CancelledError):
            expiry.cancel()
            if transport is not None:
                transport.abort()
            connection.close()
            self._callers.go(caller)
            return
        caller.hang_up = transport.abort

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _tell(self, error: OSError) -> None:
        self._failed += 1
        if time.monotonic() - self._told >= TELL_SECONDS:
            with contextlib.suppress(OSError):
                log.warning(
                    "%d connections could not be taken (%s); members that are connected go on, and this is told at "
                    "most once in %g s",
                    self._failed,
                    error.strerror,
                    TELL_SECONDS,
                )
            self._told, self._failed = time.monotonic(), 0

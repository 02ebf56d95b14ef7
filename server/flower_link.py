"""Flower's SuperLink in our process, and all that we use of flwr beyond its public API at the server.

From outside only the paths of the Fleet API that a site needs and ``/health`` answer, over TLS, and to registered
keys only. The runtime API, by which the round loop's own process talks to the SuperLink, answers on loopback and to
that process's token. The control API, which in this flwr version anybody could use to push code, is not served.

Flower's own state is in memory only. What must survive lies in the coordinator's journal and spool and in the sites'
outboxes; a database file would hold every envelope again, without erasing what it deletes, and make a round with four
sites a second slower.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import hashlib
import itertools
import logging
import math
import secrets
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import uvicorn
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_public_key
from flwr.app import Context, Message
from flwr.common.constant import (
    ISOLATION_MODE_PROCESS,
    NOOP_ACCOUNT_NAME,
    NOOP_FLWR_AID,
    SYSTEM_TIME_TOLERANCE,
    TIMESTAMP_HEADER,
    TIMESTAMP_TOLERANCE,
    TRANSPORT_TYPE_GRPC_RERE,
)
from flwr.common.serde import context_from_proto, run_from_proto
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import Metadata
from flwr.proto.runtime_pb2 import PullTaskInputRequest
from flwr.server.superlink.linkstate import InMemoryLinkState
from flwr.supercore.constant import (
    FLEET_HTTP_PUBLIC_KEY_HEADER,
    FLWR_IN_MEMORY_DB_NAME,
    NOOP_FEDERATION_ID,
    TaskType,
)
from flwr.supercore.date import now
from flwr.supercore.fab import Fab
from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.object_store import NoObjectInStoreError
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, public_key_to_bytes, verify_signature
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.auth_plugin import NoOpControlAuthnPlugin
from flwr.superlink.cli.flower_superlink import SuperLinkLifespan
from flwr.superlink.config_loader import SuperLinkLifespanConfig
from flwr.superlink.grid import HttpGrid
from flwr.superlink.main import create_app
from google.protobuf.message import DecodeError

from secure_fed.core.errors import AddressError, CertificateError
from secure_fed.server.listener import Callers, Listener
from secure_fed.transport.certificates import SOON_DAYS, ServerCertificate
from secure_fed.transport.connection import REQUEST_SIGNATURE, request_message

log = logging.getLogger(__name__)

FLEET_PATHS = frozenset(
    f"/v1/fleet/{name}"
    for name in (
        "activate-node",
        "deactivate-node",
        "send-node-heartbeat",
        "pull-messages",
        "push-messages",
        "get-run",
        "get-fab",
        "push-object",
        "pull-object",
        "confirm-message-received",
    )
)
"""What a site calls. Registering is not among them: the study says who is in it."""

PUSH_MESSAGES = "/v1/fleet/push-messages"

MAX_PARTS = 64
"""Most parts of one reply, of at most MAX_BODY each."""

BODY_SECONDS, SLOWEST_BODY = 30.0, 50_000.0
"""A body's time: so many seconds, and one for so many bytes more."""

MAX_BODY = 8 * 2**20
"""Most bytes of one request from outside; Flower cuts arrays into chunks of 5 MiB."""

CERTIFICATE_SECONDS, WARN_SECONDS = 5.0, 86_400.0
"""How often the certificate is looked at, and how often it is told that its time will soon be over."""

HEARTBEAT_SECONDS = 10
"""Flower's shortest interval; it takes a site for gone after two."""

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class Gate:
    """Lets through what one listener serves; everything else does not exist (404).

    Args:
        app: Flower's.
        paths: whether a path is served.
        members: who may call the Fleet API; None for a listener on loopback.
    """

    def __init__(self, app: App, paths: Callable[[str], bool], members: Members | None) -> None:
        self._app = app
        self._paths = paths
        self._members = members

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer or pass on one request."""
        path = scope.get("path", "")
        if scope["type"] != "http" or not self._paths(path):
            await _refuse(send, 404)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        if self._members is not None and path != "/health":
            length = headers.get(b"content-length", b"")
            if not length.isdigit() or int(length) > MAX_BODY:
                await _refuse(send, 413)
                return
            try:
                key = base64.b64decode(headers[FLEET_HTTP_PUBLIC_KEY_HEADER.lower().encode()], validate=True)
            except (KeyError, binascii.Error):
                key = b""
            if key not in self._members.keys:
                await _refuse(send, 403)
                return
            # Before the body, which Flower would read first.
            if not _signed(key, headers, scope["method"], path):
                await _refuse(send, 401)
                return
            peer = scope.get("client")
            self._members.callers.prove(None if peer is None else (peer[0], peer[1]), key)
            try:
                async with asyncio.timeout(BODY_SECONDS + int(length) / SLOWEST_BODY):
                    body = await _body(receive, int(length))
            except TimeoutError:
                await _refuse(send, 408)
                return
            if len(body) != int(length):
                await _refuse(send, 403)
                return
            if path == PUSH_MESSAGES and not self._members.may_push(body):
                await _refuse(send, 409)  # not 403, which ends a site: a reply can come twice
                return
            receive = _again(body, receive)
        await self._app(scope, receive, send)


@dataclass(frozen=True)
class Members:
    """Who may call the Fleet API.

    Attributes:
        keys: their public keys, which may change.
        callers: their connections and all others.
        may_push: whether the head of a reply may be taken.
    """

    keys: set[bytes]
    callers: Callers
    may_push: Callable[[bytes], bool]


def _signed(key: bytes, headers: Mapping[bytes, bytes], method: str, path: str) -> bool:
    """Whether a member's key has signed this request's time, method and path just now."""
    try:
        timestamp = headers[TIMESTAMP_HEADER.lower().encode()].decode("ascii")
        signature = base64.b64decode(headers[REQUEST_SIGNATURE.encode()], validate=True)
        age = (now() - datetime.fromisoformat(timestamp)).total_seconds()
    except (KeyError, ValueError, TypeError):
        return False
    if not -SYSTEM_TIME_TOLERANCE < age < TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE:
        return False
    return bool(verify_signature(bytes_to_public_key(key), request_message(timestamp, method, path), signature))


async def _body(receive: Receive, length: int) -> bytes:
    parts = []
    more = True
    while more and length >= 0:
        event = await receive()
        if event["type"] != "http.request":
            return b""  # hung up
        parts.append(event.get("body", b""))
        length -= len(parts[-1])
        more = event.get("more_body", False)
    return b"".join(parts)


def _again(body: bytes, receive: Receive) -> Receive:
    """A channel on which a body that was read already comes first."""
    first = [{"type": "http.request", "body": body, "more_body": False}]

    async def channel() -> MutableMapping[str, Any]:
        return first.pop() if first else await receive()

    return channel


async def _refuse(send: Send, status: int) -> None:
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [(b"content-length", b"0"), (b"connection", b"close")],
        }
    )
    await send({"type": "http.response.body", "body": b""})


class _State(InMemoryLinkState):
    """Flower's state, which hands out a reply only when all of it has arrived, and one at a time.

    flwr would hand out its head at once, after which whoever pulls it waits for the rest: up to three minutes for a
    site that was killed in mid-upload, while the other sites' replies wait too. And it would drop a whole reply of a
    site that has left since: the last one of each, when many wait to be taken.
    """

    def get_message_res(self, message_ids: set[str], run_id: int) -> list[Message]:
        """Replies that are whole, or errors in their place."""
        with self.lock:
            answered = {identifier for identifier in message_ids if identifier in self.message_ins_id_to_message_res_id}
            whole = [identifier for identifier in answered if not self._arriving(identifier)][:1]
            with self._taken_for_present(whole):
                replies: list[Message] = super().get_message_res((message_ids - answered) | set(whole), run_id)
            return replies

    @contextlib.contextmanager
    def _taken_for_present(self, identifiers: list[str]) -> Iterator[None]:
        asked = [self.message_ins_store[one] for one in identifiers if one in self.message_ins_store]
        nodes = [self.nodes[one.metadata.dst_node_id] for one in asked if one.metadata.dst_node_id in self.nodes]
        before = [node.online_until for node in nodes]
        for node in nodes:
            node.online_until = math.inf
        try:
            yield
        finally:
            for node, until in zip(nodes, before, strict=True):
                node.online_until = until

    def _check_stored_messages(self, message_ids: set[str], run_id: int | None = None) -> None:
        """Forget messages beyond their time, and the objects that they brought, which flwr would keep."""
        known = {identifier for identifier in message_ids if identifier in self.message_ins_store}
        replies = {identifier: self.message_ins_id_to_message_res_id.get(identifier) for identifier in known}
        super()._check_stored_messages(message_ids, run_id)
        for identifier in known - self.message_ins_store.keys():
            self.object_store.delete(identifier)
            reply = replies[identifier]
            if reply is not None:
                self.object_store.delete(reply)

    def may_push(self, body: bytes) -> bool:
        """Whether the head of a reply may be taken: of the node that sends it, flwr checks only that the node is the
        caller; the one reply to what that node was asked; and of few parts, since flwr keeps them all in memory."""
        request = PushMessagesRequest()
        try:
            request.ParseFromString(body)
        except DecodeError:
            return False
        trees = request.message_object_trees
        parts = itertools.islice((part for tree in trees for part in iterate_object_tree(tree)), MAX_PARTS + 1)
        if len(request.messages_list) > 1 or len(trees) > 1 or len(list(parts)) > MAX_PARTS:
            return False
        return all(self._answers(message.metadata, request.node.node_id) for message in request.messages_list)

    def _answers(self, reply: Metadata, node: int) -> bool:
        if reply.src_node_id != node:
            return False
        with self.lock:
            asked = self.message_ins_store.get(reply.reply_to_message_id)
            known = self.message_ins_id_to_message_res_id.get(reply.reply_to_message_id)
        # What is not asked any more flwr refuses itself.
        return asked is None or (asked.metadata.dst_node_id == node and known in (None, reply.message_id))

    def _arriving(self, identifier: str) -> bool:
        reply = self.message_ins_id_to_message_res_id.get(identifier)
        asked = self.message_ins_store.get(identifier)
        if reply is None or asked is None or asked.metadata.created_at + asked.metadata.ttl <= time.time():
            return False
        try:
            parts = iterate_object_tree(self.object_store.get_object_tree(reply))
            return any(not self.object_store.get(part.object_id) for part in parts)
        except NoObjectInStoreError:
            return False


class SuperLink:
    """The SuperLink with its two listeners.

    Args:
        certificates: folder of ``server.crt`` and ``server.key``.
        listen: host and port for the sites.
        sites: Flower public keys of the sites, OpenSSH form, by name.

    Raises:
        CertificateError: no usable certificate there.
        AddressError: the address cannot be listened on.

    Attributes:
        nodes: Flower's node ids, by site.
        callers: the connections from outside.
        address: where it listens for the sites.
        runtime: address of the runtime API on loopback.
    """

    def __init__(self, certificates: Path, listen: tuple[str, int], sites: Mapping[str, str]) -> None:
        self._certificate = ServerCertificate(certificates)
        self._looked_at_certificate = self._warned = -math.inf
        self.look_after_certificate()
        outside = _bind(listen)
        inside = _bind(("127.0.0.1", 0))
        self.runtime = f"127.0.0.1:{inside.getsockname()[1]}"
        config = SuperLinkLifespanConfig(
            control_address="",
            health_server_address=None,
            host="127.0.0.1",
            port=inside.getsockname()[1],
            insecure=True,
            certificates=None,
            # Nobody knows it: tasks are claimed in this process only.
            superexec_auth_secret=secrets.token_bytes(32),
            authn_plugin=NoOpControlAuthnPlugin(),
            event_log_plugin=None,
            fleet_event_log_plugin=None,
            enable_event_log=False,
            artifact_provider=None,
            enable_supernode_auth=True,
            fleet_api_type=TRANSPORT_TYPE_GRPC_RERE,
            fleet_api_address=None,
            simulation=False,
            ssl_ca_certfile=None,
            ssl_certfile=None,
            ssl_keyfile=None,
            database=FLWR_IN_MEMORY_DB_NAME,
            isolation=ISOLATION_MODE_PROCESS,
            runtime_dependency_install=False,
        )
        app = create_app(config, SuperLinkLifespan)
        factory = app.state.linkstate_factory
        factory.state_instance = _State(factory.federation_manager, factory.objectstore_factory.store())
        self._state = factory.state()
        self._allowed: set[bytes] = set()
        self.callers = Callers()
        self.nodes: dict[str, int] = {}
        self.register(sites)
        # Flower's own lifespan would start legacy servers; nothing else depends on it.
        common: dict[str, Any] = {"lifespan": "off", "log_config": None, "access_log": False, "ws": "none"}
        # Idle connections of sites must not hold up the end.
        common["timeout_graceful_shutdown"] = 1
        members = Members(self._allowed, self.callers, self._state.may_push)
        fleet = Gate(app, lambda path: path in FLEET_PATHS or path == "/health", members)
        runtime = Gate(app, lambda path: path.startswith("/v1/runtime/"), None)
        public = uvicorn.Config(fleet, http="h11", server_header=False, proxy_headers=False, **common)
        private = uvicorn.Config(runtime, **common)
        listener = Listener(public, outside, self._certificate, self.callers)
        self._servers = [(listener, outside), (uvicorn.Server(private), inside)]
        self.address: tuple[str, int] = outside.getsockname()[:2]
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="superlink", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the listeners still answer."""
        return self._thread.is_alive()

    @property
    def certificate_until(self) -> str:
        """When the certificate in use ends, UTC."""
        return f"{self._certificate.until:%Y-%m-%dT%H:%M:%SZ}"

    def look_after_certificate(self) -> bool:
        """Take a certificate that was renewed, for the connections from now on; warn before the one in use ends.

        Returns:
            Whether a new one was taken.
        """
        now = time.monotonic()
        if now - self._looked_at_certificate < CERTIFICATE_SECONDS:
            return False
        self._looked_at_certificate = now
        held, taken = self._certificate, False
        try:
            taken = held.look()
            if taken:
                self._warned = -math.inf
                log.info("a new certificate is in use, valid until %s", f"{held.until:%Y-%m-%d}")
        except CertificateError as error:
            log.warning("the certificate was changed and is not taken, the one before stays in use: %s", error)
        if held.days < SOON_DAYS and now - self._warned >= WARN_SECONDS:
            self._warned = now
            log.warning(
                "the server's certificate, or its authority's, ends on %s; then no site connects any more: renew it "
                "with secfacmic study ca --renew, while the server is running",
                f"{held.until:%Y-%m-%d}",
            )
        return taken

    def register(self, sites: Mapping[str, str]) -> None:
        """Let in these sites, and no others.

        Args:
            sites: Flower public keys, OpenSSH form, by name.
        """
        keys = {name: _key_bytes(key) for name, key in sites.items()}
        self.nodes = {name: self._node(name, key) for name, key in keys.items()}
        self._allowed.intersection_update(keys.values())
        self._allowed.update(keys.values())

    def start_run(self, bundle: bytes) -> str:
        """Begin a new Flower run with this bundle, ending the one before, whose messages nobody waits for.

        Returns:
            The token by which the round loop's process may act for the run.
        """
        digest = hashlib.sha256(bundle).hexdigest()
        for known in self._state.get_run_info(statuses=["pending", "starting", "running"]):
            self._state.stop_run(known.run_id)
        self._state.store_fab(Fab(digest, bundle, {}))
        run = self._state.create_run(
            "secfacmic/secfacmic", "1", digest, {}, NOOP_FEDERATION_ID, None, NOOP_FLWR_AID, TaskType.SERVER_APP
        )
        task = self._state.get_run_info(run_ids=[run])[0].primary_task_id
        token = self._state.claim_task(task)
        assert token is not None  # the task is new, and nobody else claims
        return str(token)

    def stop(self) -> None:
        """Stop listening."""
        for server, _ in self._servers:
            server.should_exit = True
        self._thread.join(5)

    async def _serve(self) -> None:
        await asyncio.gather(*(server.serve(sockets=[bound]) for server, bound in self._servers))

    def _node(self, name: str, key: bytes) -> int:
        known = self._state.get_node_id_by_public_key(key)
        if known is not None:
            return int(known)
        return int(self._state.create_node(NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, key, float(HEARTBEAT_SECONDS), name=name))


@contextlib.contextmanager
def open_grid(runtime: str, token: str) -> Iterator[tuple[HttpGrid, Context]]:
    """In the round loop's own process: the way to the sites, for as long as the run lives.

    flwr raises SIGINT in this process when the SuperLink has ended the run.
    """
    grid = HttpGrid(runtime_api_address=runtime, insecure=True, token=token)
    client = grid._runtime_client
    heartbeat = HeartbeatSender(make_task_heartbeat_fn_http(client))
    heartbeat.start()
    try:
        task = client.PullTaskInput(PullTaskInputRequest())
        TaskIdentity.task_id = task.task_id
        TaskIdentity.run_id = task.run.run_id
        TaskIdentity.node_id = task.context.node_id
        grid.set_run(run_from_proto(task.run))
        yield grid, context_from_proto(task.context)
    finally:
        if heartbeat.is_running:
            heartbeat.stop()
        grid.close()


def _bind(address: tuple[str, int]) -> socket.socket:
    host, port = address
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen()  # now, so that a port in use shows here
    except (OSError, OverflowError) as error:
        bound.close()
        reason = getattr(error, "strerror", None) or error
        raise AddressError(
            f"{host}:{port}: cannot be listened on ({reason}); expected a free address of this machine: end what "
            "listens there, or choose another with --listen (and in each site.toml)"
        ) from error
    return bound


def _key_bytes(openssh: str) -> bytes:
    key = load_ssh_public_key(openssh.encode("ascii"))
    assert isinstance(key, ec.EllipticCurvePublicKey)  # the study's pattern says so
    return public_key_to_bytes(key)

"""Flower's SuperLink in our process: its state, its run, and the two listeners before them.

From outside only the calls that a site needs, the large bytes beside them and ``/health`` answer, over TLS, and to
registered keys only. The runtime API, by which the round loop's own process talks to the SuperLink, answers on loopback
and to that process's token. The control API, which in this flwr version anybody could use to push code, is not served.

Flower's own state is in memory only. What must survive lies in the coordinator's journal and spool and in the sites'
outboxes.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import math
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import uvicorn
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_public_key
from flwr.app import Context, Message, RecordDict
from flwr.app.message import make_message
from flwr.common.constant import NOOP_ACCOUNT_NAME, NOOP_FLWR_AID
from flwr.common.serde import context_from_proto, message_from_proto, run_from_proto
from flwr.proto.recorddict_pb2 import BytesList
from flwr.proto.runtime_pb2 import (
    PullAppMessagesRequest,
    PullAppMessagesResponse,
    PullTaskInputRequest,
    PushAppMessagesRequest,
    PushAppMessagesResponse,
)
from flwr.serverapp import Grid
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME, NOOP_FEDERATION_ID, TaskType
from flwr.supercore.fab import Fab
from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.config_loader import get_federation_manager
from flwr.superlink.grid import HttpGrid

from secure_fed.core.errors import AddressError, CertificateError, ProtocolError
from secure_fed.server.byte_store import ByteStore
from secure_fed.server.flower_api import FLEET_PATHS, HEARTBEAT_SECONDS, FlowerApi, State
from secure_fed.server.gate import Gate, Member, Members
from secure_fed.server.listener import Callers, Listener
from secure_fed.transport.certificates import SOON_DAYS, ServerCertificate
from secure_fed.transport.flower_parcels import (
    PULL,
    PUSH,
    RUNTIME,
    by_name,
    parcel,
    put_together,
    taken_apart,
    unpacked,
)

log = logging.getLogger(__name__)

CERTIFICATE_SECONDS, WARN_SECONDS = 5.0, 86_400.0
"""How often the certificate is looked at, and how often it is told that its time will soon be over."""


KEPT_SECONDS = 60
"""A connection over which nothing goes is kept so long: longer than by a site, lest it is closed while it is used."""


class SuperLink:
    """The SuperLink with its two listeners.

    Args:
        certificates: folder of ``server.crt`` and ``server.key``.
        listen: host and port for the sites.
        sites: Flower public keys of the sites, OpenSSH form, by name.
        store: the large bytes beside Flower's calls.

    Raises:
        CertificateError: no usable certificate there.
        AddressError: the address cannot be listened on.

    Attributes:
        nodes: Flower's node ids, by site.
        callers: the connections from outside.
        address: where it listens for the sites.
        runtime: address of the runtime API on loopback.
    """

    def __init__(self, certificates: Path, listen: tuple[str, int], sites: Mapping[str, str], store: ByteStore) -> None:
        self._certificate = ServerCertificate(certificates)
        self._looked_at_certificate = self._warned = -math.inf
        self.look_after_certificate()
        outside = _bind(listen)
        inside = _bind(("127.0.0.1", 0))
        self.runtime = f"127.0.0.1:{inside.getsockname()[1]}"
        self._state = State(
            get_federation_manager(is_simulation=False), ObjectStoreFactory(FLWR_IN_MEMORY_DB_NAME).store()
        )
        self._members = Members(Callers())
        self.callers = self._members.callers
        self.nodes: dict[str, int] = {}
        self.register(sites)
        api = FlowerApi(self._state)
        common: dict[str, Any] = {"lifespan": "off", "log_config": None, "access_log": False, "ws": "none"}
        # Idle connections of sites must not hold up the end.
        common |= {"timeout_graceful_shutdown": 1, "interface": "asgi3", "proxy_headers": False, "server_header": False}
        gate = Gate(self._members, FLEET_PATHS, api.fleet, store, self._state.bytes_moved)
        common |= {"timeout_keep_alive": KEPT_SECONDS}
        public, private = (uvicorn.Config(app, **common) for app in (gate, api.runtime))
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
        members = {name: Member(name, _public_key(key)) for name, key in sites.items()}
        keys = {name: public_key_to_bytes(member.key) for name, member in members.items()}
        self.nodes = {name: self._node(name, key) for name, key in keys.items()}
        allowed = {keys[name]: member for name, member in members.items()}
        for gone in self._members.keys.keys() - allowed.keys():
            del self._members.keys[gone]
        self._members.keys.update(allowed)

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
        assert task is not None
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


class _Grid(HttpGrid):
    """Flower's grid, which sends and takes messages with all their parts in one call."""

    def _try_push_messages(self, run_id: int, messages: Iterable[Message]) -> list[str]:
        heads, trees, parts = taken_apart(list(messages))
        request = PushAppMessagesRequest(messages_list=heads, message_object_trees=trees)
        response = self._runtime_client._unary_unary(
            path=RUNTIME + PUSH,
            rpc_method=PUSH,
            request=parcel(request, parts),
            response_type=PushAppMessagesResponse,
        )
        return list(response.message_ids)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Take the replies that are there; of one that does not hold together nothing."""
        packed = self._runtime_client._unary_unary(
            path=RUNTIME + PULL,
            rpc_method=PULL,
            request=PullAppMessagesRequest(message_ids=message_ids),
            response_type=BytesList,
        )
        response, parts = unpacked(packed, PullAppMessagesResponse)
        held, found = by_name(parts), []
        for head, tree in zip(response.messages_list, response.message_object_trees, strict=True):
            try:
                found.append(put_together(head, tree, held))
            except ProtocolError as error:
                metadata = message_from_proto(head).metadata
                log.warning("a reply is malformed: %s", error)
                found.append(make_message(metadata, RecordDict()))  # which no reader takes
        return found


@contextlib.contextmanager
def open_grid(runtime: str, token: str) -> Iterator[tuple[Grid, Context]]:
    """In the round loop's own process: the way to the sites, for as long as the run lives.

    flwr raises SIGINT in this process when the SuperLink has ended the run.
    """
    grid = _Grid(runtime_api_address=runtime, insecure=True, token=token)
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
    # TCP by its number, not by default: else asyncio lets what it writes wait for acknowledgements, 40 ms an answer.
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
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


def _public_key(openssh: str) -> ec.EllipticCurvePublicKey:
    key = load_ssh_public_key(openssh.encode("ascii"))
    assert isinstance(key, ec.EllipticCurvePublicKey)  # the study's pattern says so
    return key

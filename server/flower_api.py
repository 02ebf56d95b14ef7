"""Flower's own state and handlers behind the few paths that a study needs, without Flower's web server.

That one, a stack of middlewares with a task group for each and a hop for every 64 kB of a body, took nine tenths of the
server's time. Here a request is read, its handler is called, and its answer is written. Who may call is decided
before: outside by :mod:`secure_fed.server.gate`, on loopback by the token of the rounds' task.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from flwr.app import Message
from flwr.proto.fab_pb2 import GetFabRequest
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
    PushMessagesResponse,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import Metadata, ObjectTree
from flwr.proto.recorddict_pb2 import BytesList
from flwr.proto.run_pb2 import GetRunRequest
from flwr.proto.runtime_pb2 import (
    GetNodesRequest,
    PullAppMessagesRequest,
    PullAppMessagesResponse,
    PullTaskInputRequest,
    PushAppMessagesRequest,
    PushAppMessagesResponse,
    PushTaskOutputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.server.superlink.linkstate import InMemoryLinkState
from flwr.supercore.constant import TASK_TOKEN_HEADER
from flwr.supercore.error import FlowerError
from flwr.supercore.error.catalog import API_ERROR_MAP
from flwr.supercore.inflatable.inflatable_object import (
    UnexpectedObjectContentError,
    get_object_id,
    iterate_object_tree,
)
from flwr.supercore.inflatable.inflatable_utils import validate_object_content
from flwr.supercore.servicer.runtime import runtime_handlers as task_handlers
from flwr.superlink.servicer.fleet import fleet_handlers
from flwr.superlink.servicer.runtime import runtime_handlers
from google.protobuf.message import DecodeError
from google.protobuf.message import Message as Proto

from secure_fed.server.http import Receive, Scope, Send, answer, read_body
from secure_fed.transport.flower_parcels import FLEET, PULL, PUSH, RUNTIME, parcel, unpacked

HEARTBEAT_SECONDS = 10
"""Flower's shortest interval; it takes a site for gone after two."""

BEAT_SECONDS = 8.0
"""How often a look that waits counts as a sign of life."""

REPLY_SECONDS = 0.25
"""How long the rounds' look for replies waits for one."""

MAX_PARTS = 64
"""Most parts of one reply."""

Gone = Callable[[], bool]


@dataclass(frozen=True)
class Answered:
    """What a handler gave.

    Attributes:
        status: of HTTP.
        kind: of the content.
        body: the content.
    """

    status: int
    kind: bytes
    body: bytes


class State(InMemoryLinkState):
    """Flower's state, which hands out again what did not arrive, and keeps what has.

    flwr would hand out a message once, and lose it with the connection; and it would drop a whole reply of a site that
    has left since.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._for_node: dict[int, list[str]] = {}
        self._looked_for_errors = -REPLY_SECONDS

    def store_message_ins(self, message: Message) -> str | None:
        """Take a message for a node."""
        stored: str | None = super().store_message_ins(message)
        if stored is not None:
            with self.lock:
                waiting = self._for_node.setdefault(message.metadata.dst_node_id, [])
                if stored not in waiting:
                    waiting.append(stored)
        return stored

    def get_message_ins(self, node_id: int, limit: int | None, *, run_id: int | None = None) -> list[Message]:
        """Messages for a node that it has not answered: whoever asks again has not got them."""
        with self.lock:
            self._check_stored_messages(set(self._for_node.get(node_id, ())))
            known = [one for one in self._for_node.get(node_id, ()) if one in self.message_ins_store]
            if known:
                self._for_node[node_id] = known
            else:
                self._for_node.pop(node_id, None)
            found = [self.message_ins_store[one] for one in known if one not in self.message_ins_id_to_message_res_id]
            found = [one for one in found if run_id is None or one.metadata.run_id == run_id]
            return found[:limit]

    def asks(self, node_id: int) -> bool:
        """Whether there is anything that a node has not answered: without what a look for it costs."""
        with self.lock:
            known = self._for_node.get(node_id, ())
            return any(one not in self.message_ins_id_to_message_res_id for one in known)

    def activate_node(self, node_id: int, heartbeat_interval: float) -> bool:
        """A node is there, and knows nothing of what it was asked before: it is asked anew."""
        with self.lock:
            activated = bool(super().activate_node(node_id, heartbeat_interval))
            if activated:
                old = set(self._for_node.pop(node_id, ())) - self.message_ins_id_to_message_res_id.keys()
                self.delete_messages(old)
                for identifier in old:
                    self.object_store.delete(identifier)
            return activated

    def acknowledge_node_heartbeat(self, node_id: int, heartbeat_interval: float) -> bool:
        """A node gives a sign of life. If it was taken for gone, it is there again as it was, and what it was asked
        holds; flwr would say that it was activated anew, as one that was started again."""
        with self.lock:
            node = self.nodes.get(node_id)
            activated = None if node is None else node.last_activated_at
            known = bool(super().acknowledge_node_heartbeat(node_id, heartbeat_interval))
            if node is not None and activated is not None:
                node.last_activated_at = activated
            return known

    def bytes_moved(self, key: bytes) -> None:
        """The large bytes of a node move: it stays where it is, if it is there."""
        with self.lock:
            node = self.get_node_id_by_public_key(key)
            if node is not None and (self.nodes[node].online_until or 0.0) > time.time():
                self.acknowledge_node_heartbeat(node, HEARTBEAT_SECONDS)

    def get_message_res(self, message_ids: set[str], run_id: int) -> list[Message]:
        """Replies, or errors in place of those that will not come; a reply counts though its sender has left since."""
        with self.lock:
            answered = message_ids & self.message_ins_id_to_message_res_id.keys()
            if not answered:
                # Each look at all that is asked costs as much as there are sites: not one for each reply.
                if time.monotonic() - self._looked_for_errors < REPLY_SECONDS:
                    return []
                self._looked_for_errors = time.monotonic()
            with self._taken_for_present(answered):
                replies: list[Message] = super().get_message_res(answered or message_ids, run_id)
            return replies

    @contextlib.contextmanager
    def _taken_for_present(self, identifiers: Iterable[str]) -> Iterator[None]:
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

    def may_push(self, request: PushMessagesRequest, parts: list[bytes]) -> bool:
        """Whether a reply may be taken: one, whose head is of the node that sends it (flwr checks only that the node
        is the caller) and answers what that node is asked (flwr drops what answers nothing, and says that it was
        taken), with the parts that it names, few of them."""
        if len(request.messages_list) != 1 or len(request.message_object_trees) != 1 or len(parts) > MAX_PARTS:
            return False
        named = itertools.islice(iterate_object_tree(request.message_object_trees[0]), MAX_PARTS + 1)
        if {part.object_id for part in named} != {get_object_id(part) for part in parts}:
            return False
        try:
            for part in parts:
                validate_object_content(part)
        except UnexpectedObjectContentError:
            return False
        head = request.messages_list[0]
        return not head.HasField("error") and self._answers(head.metadata, request.node.node_id)

    def keep(self, run: int, response: PushMessagesResponse | PushAppMessagesResponse, parts: Iterable[bytes]) -> None:
        """Take the parts of what was just pushed that are not here yet."""
        wanted = set(response.objects_to_push)
        for part in parts:
            if (name := get_object_id(part)) in wanted:
                self.store_object(run, response.session_id, name, part)

    def _answers(self, reply: Metadata, node: int) -> bool:
        if reply.src_node_id != node:
            return False
        with self.lock:
            asked = self.message_ins_store.get(reply.reply_to_message_id)
            known = self.message_ins_id_to_message_res_id.get(reply.reply_to_message_id)
        return asked is not None and asked.metadata.dst_node_id == node and known in (None, reply.message_id)


@dataclass(frozen=True)
class _Reply:
    """A site's reply: its head, how its parts hang together, and these."""

    head: Proto
    tree: ObjectTree
    parts: list[bytes]


class FlowerApi:
    """Flower's calls, of sites and of the rounds. Used by one event loop.

    Args:
        state: Flower's.
    """

    def __init__(self, state: State) -> None:
        self._state = state
        self._news: dict[int, asyncio.Event] = {}  # by node; in the loop only
        self._looks: dict[int, object] = {}  # the newest look of each node
        self._replies = asyncio.Event()
        self._given: dict[str, _Reply] = {}  # what the rounds took, by what it answers, until they ask for it no more

    # --- sites ---

    async def fleet(self, path: str, key: bytes, body: bytes, wait: float, gone: Gone) -> Answered:
        """Answer a site's call.

        Args:
            path: one of :data:`FLEET_PATHS`.
            key: the public key that has signed it.
            body: of the request.
            wait: for how many seconds a look may wait for something to come.
            gone: whether whoever asked is not there any more.
        """
        name, parts = path.removeprefix(FLEET), list[bytes]()
        kind, handler = _FLEET[name]
        request = kind()
        try:
            if kind is PushMessagesRequest:
                request, parts = unpacked(BytesList.FromString(body), PushMessagesRequest)
            else:
                request.ParseFromString(body)
        except DecodeError:
            return Answered(400, b"", b"")
        if isinstance(request, ActivateNodeRequest):
            own = request.public_key == key
        else:
            node = request.node.node_id if hasattr(request, "node") else request.node_id
            own = self._state.get_node_id_by_public_key(key) == node
        if not own:
            return Answered(401, b"text/plain", b"another node")
        if isinstance(request, PullMessagesRequest):
            return await self._look(request, wait, gone)
        if isinstance(request, PushMessagesRequest) and not self._state.may_push(request, parts):
            return Answered(409, b"", b"")  # not 403, which ends a site: a reply can come twice
        answered, response = _call(lambda: handler(request, self._state))
        if response is not None and isinstance(request, PushMessagesRequest):
            self._state.keep(request.messages_list[0].metadata.run_id, response, parts)
            self._replies.set()
        return answered

    async def _look(self, request: PullMessagesRequest, wait: float, gone: Gone) -> Answered:
        """What there is for a node; waits for it. Of two looks of one node, the older is not waited for any more."""
        node, this = request.node.node_id, object()
        self._looks[node] = this
        loop = asyncio.get_running_loop()
        end = loop.time() + wait
        news = self._news.setdefault(node, asyncio.Event())
        news.set()  # what came before nobody looked; an older look ends
        while True:
            if gone() or self._looks.get(node) is not this:
                return Answered(200, PROTOBUF, b"")
            self._state.acknowledge_node_heartbeat(node, HEARTBEAT_SECONDS)
            left = end - loop.time()
            if news.is_set():  # else it is a sign of life and nothing more: hundreds of sites wait
                news.clear()
                if self._state.asks(node):
                    answered, response = _call(
                        lambda: fleet_handlers.pull_messages(request, self._state, self._state.object_store)
                    )
                    if response is None:
                        return answered
                    if response.messages_list:
                        return self._with_parts(response, response.message_object_trees)
            if left <= 0:
                return Answered(200, PROTOBUF, b"")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(left, BEAT_SECONDS)):
                    await news.wait()

    # --- the rounds ---

    async def runtime(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a call of the rounds' process: an ASGI app."""
        if scope["type"] != "http":
            return
        known = _RUNTIME.get(scope["path"])
        headers = [value for name, value in scope["headers"] if name.lower() == TASK_TOKEN_HEADER.encode()]
        task = self._state.get_task_by_token(headers[0].decode("latin-1")) if len(headers) == 1 else None
        if known is None or task is None:
            await answer(send, 404 if known is None else 401)
            return
        kind, handler = known
        body = await read_body(receive)
        if body is None:
            return
        parts = list[bytes]()
        request = kind()
        if isinstance(request, PushAppMessagesRequest):
            request, parts = unpacked(BytesList.FromString(body), PushAppMessagesRequest)
        else:
            request.ParseFromString(body)
        if isinstance(request, PullAppMessagesRequest):
            answered = await self._replies_to(request, lambda: handler(request, self._state, task))
            await answer(send, answered.status, answered.body, answered.kind)
            return
        answered, response = _call(lambda: handler(request, self._state, task))
        if isinstance(response, PushAppMessagesResponse):
            self._state.keep(task.run_id, response, parts)
            self._wake([message.metadata.dst_node_id for message in request.messages_list])
        await answer(send, answered.status, answered.body, answered.kind)

    async def _replies_to(self, request: PullAppMessagesRequest, take: Callable[[], Proto]) -> Answered:
        """What has come of the replies that the rounds wait for; waits a moment for one.

        Who asks for them once more has not got them, as where this process was too busy to hand them over in time: a
        call that nobody waits for any more takes them too.
        """
        asked = frozenset(request.message_ids)
        for got in self._given.keys() - asked:
            del self._given[got]
        while not self._given:
            answered, response = _call(take)
            if response is None:
                return answered
            for head, tree in zip(response.messages_list, response.message_object_trees, strict=True):
                parts = [self._state.object_store.get(part.object_id) or b"" for part in iterate_object_tree(tree)]
                self._given[head.metadata.reply_to_message_id] = _Reply(head, tree, parts)
                for done in (head.metadata.message_id, head.metadata.reply_to_message_id):
                    self._state.object_store.delete(done)
            if self._given or not asked:
                break
            self._replies.clear()
            try:
                async with asyncio.timeout(REPLY_SECONDS):
                    await self._replies.wait()
            except TimeoutError:
                break
        given = list(self._given.values())
        heads, trees = [one.head for one in given], [one.tree for one in given]
        response = PullAppMessagesResponse(messages_list=heads, message_object_trees=trees)
        packed = parcel(response, [part for one in given for part in one.parts])
        return Answered(200, PROTOBUF, packed.SerializeToString())

    def _with_parts(self, response: Proto, trees: Iterable[ObjectTree]) -> Answered:
        parts = {part.object_id for tree in trees for part in iterate_object_tree(tree)}
        held = [self._state.object_store.get(part) or b"" for part in sorted(parts)]
        return Answered(200, PROTOBUF, parcel(response, held).SerializeToString())

    def _wake(self, nodes: list[int]) -> None:
        for node in nodes:
            if node in self._news:
                self._news[node].set()


PROTOBUF = b"application/protobuf"

_FLEET: dict[str, tuple[Callable[[], Any], Callable[..., Any]]] = {
    "activate-node": (ActivateNodeRequest, fleet_handlers.activate_node),
    "deactivate-node": (DeactivateNodeRequest, fleet_handlers.deactivate_node),
    "send-node-heartbeat": (SendNodeHeartbeatRequest, fleet_handlers.send_node_heartbeat),
    PULL: (PullMessagesRequest, fleet_handlers.pull_messages),
    PUSH: (PushMessagesRequest, fleet_handlers.push_messages),
    "get-run": (GetRunRequest, fleet_handlers.get_run),
    "get-fab": (GetFabRequest, fleet_handlers.get_fab),
}
"""What a site calls; ``pull`` and ``push`` take and give messages with their parts. Registering is not among them: the
study says who is in it."""

FLEET_PATHS = frozenset(FLEET + name for name in _FLEET)

_RUNTIME: dict[str, tuple[Callable[[], Any], Callable[..., Any]]] = {
    RUNTIME + "send-task-heartbeat": (SendTaskHeartbeatRequest, task_handlers.send_task_heartbeat),
    RUNTIME + "pull-task-input": (PullTaskInputRequest, runtime_handlers.pull_task_input),
    RUNTIME + "push-task-output": (PushTaskOutputRequest, runtime_handlers.push_task_output),
    RUNTIME + PUSH: (PushAppMessagesRequest, runtime_handlers.push_messages),
    RUNTIME + PULL: (PullAppMessagesRequest, runtime_handlers.pull_messages),
    RUNTIME + "get-nodes": (GetNodesRequest, runtime_handlers.get_nodes),
}
"""What the rounds call."""


def _call(handler: Callable[[], Proto]) -> tuple[Answered, Any]:
    """A handler's answer as HTTP, and as it is; None if it refuses."""
    try:
        response = handler()
    except FlowerError as error:
        spec = API_ERROR_MAP[error.code]
        text = json.dumps(error.to_json(spec.public_message)).encode()
        return Answered(spec.http_status_code, b"application/json", text), None
    except ValueError:  # what flwr makes of what does not fit
        return Answered(500, b"application/json", b'{"detail": "Internal server error."}'), None
    return Answered(200, PROTOBUF, response.SerializeToString()), response

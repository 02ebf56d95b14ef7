"""Looks for messages that wait: what they cost while nothing comes, and that nothing is missed."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from flwr.proto.fleet_pb2 import PullMessagesRequest, PullMessagesResponse
from flwr.proto.message_pb2 import Message, Metadata, ObjectTree
from flwr.proto.node_pb2 import Node
from flwr.proto.recorddict_pb2 import BytesList
from flwr.proto.runtime_pb2 import PullAppMessagesRequest, PullAppMessagesResponse
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME
from flwr.supercore.object_store import ObjectStoreFactory

from secure_fed.server import flower_api
from secure_fed.server.flower_api import FlowerApi
from secure_fed.transport.flower_parcels import unpacked

ASKED = PullMessagesRequest(node=Node(node_id=1))


class _State:
    """Counts signs of life."""

    object_store = None
    beats = 0
    waiting = True

    def asks(self, node: int) -> bool:
        return self.waiting

    def acknowledge_node_heartbeat(self, node: int, seconds: float) -> bool:
        self.beats += 1
        return True


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """When it was looked up what there is for a node: never anything."""
    found: list[float] = []

    def pull(*arguments: Any) -> PullMessagesResponse:
        found.append(asyncio.get_running_loop().time())
        return PullMessagesResponse()

    monkeypatch.setattr(flower_api.fleet_handlers, "pull_messages", pull)
    monkeypatch.setattr(flower_api, "BEAT_SECONDS", 0.02)
    return found


def test_a_look_that_waits_is_a_sign_of_life_and_is_looked_up_once(looks: list[float]) -> None:
    state = _State()
    api = FlowerApi(state)  # type: ignore[arg-type]
    assert asyncio.run(api._look(ASKED, 0.5, lambda: False)).body == b""
    assert state.beats >= 5
    assert len(looks) == 1


def test_a_look_for_nothing_costs_no_call_of_flowers(looks: list[float]) -> None:
    state = _State()
    state.waiting = False
    assert asyncio.run(FlowerApi(state)._look(ASKED, 0.05, lambda: False)).body == b""  # type: ignore[arg-type]
    assert not looks


def test_a_look_is_looked_up_again_when_something_comes_and_ends_when_a_newer_one_is_there(looks: list[float]) -> None:
    async def play() -> None:
        api = FlowerApi(_State())  # type: ignore[arg-type]
        older = asyncio.ensure_future(api._look(ASKED, 60, lambda: False))
        await asyncio.sleep(0.05)
        api._wake([1])
        await asyncio.sleep(0.05)
        assert len(looks) == 2
        newer = asyncio.ensure_future(api._look(ASKED, 60, lambda: False))
        assert (await asyncio.wait_for(older, 5)).body == b""
        assert not newer.done()
        assert len(looks) == 3  # the newer one's own
        newer.cancel()

    asyncio.run(play())


def test_what_a_call_that_nobody_waits_for_any_more_took_is_given_to_the_next() -> None:
    """The rounds give a call up after 30 s; in a busy process it goes on, and takes what they ask for again."""

    class Bare:
        object_store = ObjectStoreFactory(FLWR_IN_MEMORY_DB_NAME).store()

    api, come = FlowerApi(Bare()), list[str]()  # type: ignore[arg-type]

    def take() -> PullAppMessagesResponse:
        heads = [Message(metadata=Metadata(message_id=f"reply {one}", reply_to_message_id=one)) for one in come]
        come.clear()
        trees = [ObjectTree(object_id=head.metadata.message_id) for head in heads]
        return PullAppMessagesResponse(messages_list=heads, message_object_trees=trees)

    async def asked(*ids: str) -> list[str]:
        answered = await api._replies_to(PullAppMessagesRequest(message_ids=ids), take)
        found, _ = unpacked(BytesList.FromString(answered.body), PullAppMessagesResponse)
        return [head.metadata.reply_to_message_id for head in found.messages_list]

    async def play() -> list[list[str]]:
        given_up = asyncio.create_task(asked("a", "b"))
        again = asyncio.create_task(asked("a", "b"))
        await asyncio.sleep(0.01)
        come.append("a")
        api._replies.set()
        await given_up  # goes nowhere
        come.append("b")
        api._replies.set()
        return [await again, await asked("a", "b"), await asked("b"), await asked("b")]

    assert asyncio.run(play()) == [["a"], ["a"], ["b"], ["b"]]

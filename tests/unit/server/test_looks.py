"""Looks for messages that wait: what they cost while nothing comes, and that nothing is missed."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from flwr.proto.fleet_pb2 import PullMessagesRequest, PullMessagesResponse
from flwr.proto.node_pb2 import Node

from secure_fed.server import flower_api
from secure_fed.server.flower_api import FlowerApi

ASKED = PullMessagesRequest(node=Node(node_id=1))


class _State:
    """Counts signs of life."""

    object_store = None
    beats = 0

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

"""A server that lies about the large bytes that a site sends: one typed error, and no end without a word."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from secure_fed.clients import flower_node
from secure_fed.clients.byte_line import ByteLine, Stuck
from secure_fed.core.errors import ProtocolError
from secure_fed.transport.connection import OFFSET

DATA = bytes(range(100))


def line(*held: str) -> ByteLine:
    """To a server that says of each request, one after the other and the last for ever, that it holds so much."""
    said = list(held)

    def answer(request: httpx.Request) -> httpx.Response:
        number = said.pop(0) if len(said) > 1 else said[0]
        return httpx.Response(200, headers=[(OFFSET.encode(), number.encode("latin-1"))])

    client = httpx.Client(transport=httpx.MockTransport(answer))
    return ByteLine(client, "https://server", "ash", ec.generate_private_key(ec.SECP256R1()), lambda call: call())


def test_what_the_server_holds_already_is_not_sent() -> None:
    line("0", "100").send("ab" * 32, DATA)
    line("100").send("ab" * 32, DATA)


@pytest.mark.parametrize("held", ["", "many", "-5", "101", "1" * 5000, "\xb2"])
@pytest.mark.parametrize("before", [(), ("0",)])
def test_a_server_that_holds_what_was_not_sent_or_no_number_is_refused(held: str, before: tuple[str, ...]) -> None:
    with pytest.raises(ProtocolError, match="from 0 to 100"):
        line(*before, held).send("ab" * 32, DATA)


@pytest.mark.parametrize(("why", "waits"), [(Stuck, flower_node.STUCK_SECONDS), (flower_node._Stale, 0.05)])
def test_a_site_whose_answer_is_not_taken_says_nothing_waits_and_looks_what_it_is_asked_now(
    monkeypatch: pytest.MonkeyPatch, why: type[Exception], waits: float
) -> None:
    """Said as a failure, the server takes it for a refusal of the round; and the message that it still waits for an
    answer to comes again at once."""
    slept, pushed, was_taken = list[float](), list[str](), list[bool]()

    class App:
        failure = authority = None
        finished = False
        tries = 0

        def answer(self, *arguments: Any) -> str:
            self.tries += 1
            if self.tries <= 2:
                raise why
            return "answer"

        def after_reply(self, *, taken: bool) -> None:
            was_taken.append(taken)
            self.finished = taken

    message = SimpleNamespace(metadata=SimpleNamespace(run_id=1, group_id="1"))
    connection = SimpleNamespace(
        pull=lambda: (message, b""),
        push=pushed.append,
        node=SimpleNamespace(node_id=1),
        line=None,
        authority=None,
        stay=lambda *arguments: None,
    )
    monkeypatch.setattr(flower_node.time, "sleep", slept.append)
    flower_node._answer_messages(App(), connection, flower_node.Way("server:1", Path(), 4))  # type: ignore[arg-type]
    assert was_taken == [False, False, True]
    assert pushed == ["answer"]
    assert slept == [waits, pytest.approx(waits if why is Stuck else waits * flower_node.SLOWING)]

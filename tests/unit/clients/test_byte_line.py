"""A server that lies about the large bytes that a site sends: one typed error, and no end without a word."""

from __future__ import annotations

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from secure_fed.clients.byte_line import ByteLine
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

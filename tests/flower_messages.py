"""What Flower hands to a site's app, and what travels beside it, in memory."""

from __future__ import annotations

import hashlib
import time

from flwr.app import Message, Metadata
from flwr.app.message import make_message

from secure_fed.core.errors import ProtocolError
from secure_fed.protocol.rounds import RoundRequest
from secure_fed.server.byte_store import Upload
from secure_fed.transport.flower_messages import ROUND_MESSAGE, request_content


class Shelf:
    """The large bytes of both directions, by digest: a server's and a site's ends of the line."""

    def __init__(self) -> None:
        self.held: dict[str, bytes] = {}
        self.under_way: list[Upload] = []

    def publish(self, data: bytes) -> str:
        digest = hashlib.sha256(data).hexdigest()
        self.held[digest] = data
        return digest

    def lend(self, data: bytes) -> str:
        return self.publish(data)

    def take_back(self, digest: str) -> None:
        del self.held[digest]

    def send(self, run: str, data: bytes) -> str:
        return self.publish(data)

    def fetch(self, digest: str, length: int) -> bytes:
        if len(self.held.get(digest, b"")) != length:
            raise ProtocolError("bytes that are not here")
        return self.held[digest]

    def take(self, site: str, digest: str, length: int) -> bytes:
        return self.fetch(digest, length)

    def drop(self, site: str) -> None:
        """What was taken stays: tests look at it."""

    def uploads(self) -> list[Upload]:
        """What tests say is under way."""
        return self.under_way


def as_message(request: RoundRequest, shelf: Shelf, kind: str = ROUND_MESSAGE) -> Message:
    """A request as it arrives from the server, its records on the shelf."""
    metadata = Metadata(
        run_id=7,
        message_id="1" * 64,
        src_node_id=1,
        dst_node_id=2,
        reply_to_message_id="",
        group_id="1",
        created_at=time.time(),
        ttl=600.0,
        message_type=kind,
    )
    return make_message(metadata=metadata, content=request_content(request, shelf.publish))

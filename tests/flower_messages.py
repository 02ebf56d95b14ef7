"""What Flower hands to a site's app."""

from __future__ import annotations

import time

from flwr.app import Message, Metadata
from flwr.app.message import make_message

from secure_fed.protocol.rounds import RoundRequest
from secure_fed.transport.flower_messages import ROUND_MESSAGE, request_content


def as_message(request: RoundRequest, kind: str = ROUND_MESSAGE) -> Message:
    """A request as it arrives from the server."""
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
    return make_message(metadata=metadata, content=request_content(request))

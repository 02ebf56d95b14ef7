"""What a server answers to a site's look: one message with its parts, or one typed error."""

from __future__ import annotations

from contextlib import suppress

import pytest
from flwr.app import ConfigRecord, Message, Metadata, RecordDict
from flwr.app.message import make_message
from flwr.proto.fleet_pb2 import PullMessagesResponse
from flwr.proto.recorddict_pb2 import BytesList
from hypothesis import given
from hypothesis import strategies as st

from secure_fed.core.errors import ProtocolError
from secure_fed.transport.flower_parcels import delivered, parcel, taken_apart


def packed(heads: int = 1, trees: int = 1) -> BytesList:
    metadata = Metadata(1, "", 1, 2, "", "", 1.0, 60.0, "query")
    message = make_message(metadata=metadata, content=RecordDict({"a": ConfigRecord({"b": 1})}))
    head, tree, parts = taken_apart([message])
    return parcel(PullMessagesResponse(messages_list=head * heads, message_object_trees=tree * trees), parts)


def test_a_message_arrives_as_sent() -> None:
    assert delivered(packed()).content["a"]["b"] == 1


@pytest.mark.parametrize(("heads", "trees"), [(0, 0), (0, 1), (1, 0), (2, 2)])
def test_any_number_of_messages_but_one_is_refused(heads: int, trees: int) -> None:
    with pytest.raises(ProtocolError, match=f"{heads} messages and {trees} trees"):
        delivered(packed(heads, trees))


def test_a_message_without_its_parts_and_what_is_none_are_refused() -> None:
    whole = packed().vals[0]
    for found in ([b"\xff\xff"], [whole], [whole, b"another part"]):
        with pytest.raises(ProtocolError):
            delivered(BytesList(vals=found))


@given(st.lists(st.binary(max_size=200), min_size=1, max_size=3), st.integers(0, 200), st.integers(0, 255))
def test_bytes_of_any_kind_are_refused_or_a_message(vals: list[bytes], place: int, byte: int) -> None:
    true = packed()
    head = bytearray(true.vals[0])
    head[place % len(head)] = byte
    for found in (BytesList(vals=vals), BytesList(vals=[bytes(head), *true.vals[1:]])):
        with suppress(ProtocolError):
            assert isinstance(delivered(found), Message)

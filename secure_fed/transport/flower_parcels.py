"""Flower's messages with all their parts, as one body of a call; flwr would make a call for each part.

A message is a tree of objects, each named by its SHA-256; its head, which a server checks, says who sent it to whom and
in answer to what.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from flwr.app import Error, Message
from flwr.app.message import make_message, remove_content_from_message
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import PullMessagesResponse
from flwr.proto.message_pb2 import Message as Head
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.recorddict_pb2 import BytesList
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_id,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from google.protobuf.message import DecodeError
from google.protobuf.message import Message as Proto

from secure_fed.core.errors import ProtocolError

FLEET, RUNTIME = "/v1/fleet/", "/v1/runtime/"
PULL, PUSH = "pull", "push"
"""The calls, of sites and of the rounds, that take and give messages so."""

Call = TypeVar("Call", bound=Proto)


def taken_apart(messages: Sequence[Message]) -> tuple[list[Head], list[ObjectTree], list[bytes]]:
    """Messages as heads, trees and parts; each message gets its id."""
    parts: dict[str, bytes] = {}
    with no_object_id_recompute():  # else flwr makes each part anew whenever a name is asked for
        for message in messages:
            message.metadata.__dict__["_message_id"] = message.object_id
            nested = get_all_nested_objects(message)
            parts |= {name: part.deflate() for name, part in nested.items() if name not in parts}
        trees = [get_object_tree(message) for message in messages]
    return [message_to_proto(remove_content_from_message(message)) for message in messages], trees, [*parts.values()]


def by_name(parts: Iterable[bytes]) -> dict[str, bytes]:
    """Parts of messages by their SHA-256, as trees name them."""
    return {get_object_id(part): part for part in parts}


def put_together(head: Head, tree: ObjectTree, held: Mapping[str, bytes]) -> Message:
    """A message of its head and its parts; what its parts say of sender, receiver and question does not count.

    Args:
        head, tree: the message's.
        held: parts by name, its own among them.

    Raises:
        ProtocolError: the head is none, the parts are not those of the tree, or they are no message.
    """
    try:
        metadata = message_from_proto(head).metadata
        if head.HasField("error"):
            return make_message(metadata, error=Error(head.error.code, head.error.reason))
        needed = {each.object_id: held[each.object_id] for each in iterate_object_tree(tree)}
        found = inflate_object_from_contents(tree.object_id, needed)
        assert isinstance(found, Message)
        return make_message(metadata, found.content)
    except Exception as error:  # flwr raises anything at what does not fit
        raise ProtocolError(f"a message that does not hold together ({type(error).__name__})") from None


def delivered(packed: BytesList) -> Message:
    """The message, with its parts, that a server answers a look with.

    Raises:
        ProtocolError: it is none, or not one.
    """
    try:
        response, parts = unpacked(packed, PullMessagesResponse)
    except DecodeError:
        raise ProtocolError("the server answers a look with something else than a message") from None
    heads, trees = response.messages_list, response.message_object_trees
    if len(heads) != 1 or len(trees) != 1:
        raise ProtocolError(f"the server answers a look with {len(heads)} messages and {len(trees)} trees; expected 1")
    return put_together(heads[0], trees[0], by_name(parts))


def parcel(call: Proto, parts: Iterable[bytes] = ()) -> BytesList:
    """A call, or its answer, and the parts that go with it."""
    return BytesList(vals=[call.SerializeToString(), *parts])


def unpacked(packed: BytesList, kind: type[Call]) -> tuple[Call, list[bytes]]:
    """What :func:`parcel` packed.

    Raises:
        DecodeError: it is nothing of the kind.
    """
    if not packed.vals:
        raise DecodeError("an empty parcel")
    call = kind()
    call.ParseFromString(packed.vals[0])
    return call, list(packed.vals[1:])

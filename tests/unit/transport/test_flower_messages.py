"""What a message may carry: nothing but the listed fields, in either direction; and the bundle without code."""

from __future__ import annotations

import dataclasses
import io
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from secure_fed.core.errors import ProtocolError
from secure_fed.protocol.rounds import ReplyCode, RoundReply, RoundRequest
from secure_fed.transport.flower_messages import contract, read_reply, read_request, reply_content, request_content

REQUEST = RoundRequest(3, 2, (b"first", b"second"), True, "ab" * 32, {"ash": "00" * 32, "birch": "11" * 32})
UPDATE = RoundReply("ash", ReplyCode.UPDATE, "cd" * 32, 4, "22" * 32, b"an envelope")
APPLIED = RoundReply("ash", ReplyCode.APPLIED, "cd" * 32, 4, "22" * 32, b"")

Change = Callable[[RecordDict], Any]


def test_requests_and_replies_arrive_as_sent() -> None:
    assert read_request(request_content(REQUEST)) == REQUEST
    bare = RoundRequest(1, 1, (), more=False)
    assert read_request(request_content(bare)) == bare
    for reply in (UPDATE, APPLIED):
        assert read_reply(reply_content(reply), "ash") == reply


def test_what_leaves_a_site_is_on_a_short_list() -> None:
    """A field more in a reply, or in its message, fails here: that is the point."""
    assert {field.name for field in dataclasses.fields(RoundReply)} == {
        "site",
        "code",
        "run",
        "position",
        "attestation",
        "envelope",
    }
    content = reply_content(UPDATE)
    assert set(content) == {"reply", "envelope"}
    assert set(content.config_records["reply"]) == {"code", "run", "position", "attestation"}
    assert set(content.array_records["envelope"]) == {"envelope"}


def test_the_sender_is_who_the_connection_says() -> None:
    assert read_reply(reply_content(UPDATE), "birch").site == "birch"


def _array(data: bytes = b"x", stype: str = "secfacmic.record", dtype: str = "bytes", size: int | None = None) -> Array:
    return Array(dtype=dtype, shape=(len(data) if size is None else size,), stype=stype, data=data)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content["request"].update(extra=1),
        lambda content: content["request"].pop("more"),
        lambda content: content["request"].update(round=-1),
        lambda content: content["request"].update(round=1.0),
        lambda content: content["request"].update(more=1),
        lambda content: content["request"].update(attested_head="x" * 1000),
        lambda content: content["request"].update(attested_head=b"bytes"),
        lambda content: content["request"].update(sites=["ash", "ash"]),
        lambda content: content["request"].update(sites=["ash"]),
        lambda content: content.update(more=ConfigRecord({"epochs": 100})),
        lambda content: content.update(records=ArrayRecord({"0": _array(stype="numpy.ndarray")})),
        lambda content: content.update(records=ArrayRecord({"0": _array(dtype="float32")})),
        lambda content: content.update(records=ArrayRecord({"0": _array(size=2)})),
        lambda content: content.update(records=ArrayRecord({"0": Array(np.zeros(2))})),
        lambda content: content.pop("records"),
    ],
)
def test_a_request_with_anything_else_is_refused(change: Change) -> None:
    content = request_content(REQUEST)
    change(content)
    with pytest.raises(ProtocolError):
        read_request(content)


def test_a_page_beyond_its_size_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secure_fed.transport.flower_messages.PAGE_BYTES", 10)
    with pytest.raises(ProtocolError, match="page"):
        read_request(request_content(REQUEST))


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content["reply"].update(loss=0.1),
        lambda content: content["reply"].update(code="ValueError: /data/patient"),
        lambda content: content["reply"].update(position="4"),
        lambda content: content["envelope"].pop("envelope"),
        lambda content: content["envelope"].update(second=_array(stype="secfacmic.envelope")),
        lambda content: content["envelope"].update(envelope=_array()),
        lambda content: content["reply"].update(code="applied"),
        lambda content: content.update(metrics=ConfigRecord({"accuracy": 1.0})),
    ],
)
def test_a_reply_with_anything_else_is_refused(change: Change) -> None:
    content = reply_content(UPDATE)
    change(content)
    with pytest.raises(ProtocolError) as refusal:
        read_reply(content, "ash")
    assert "patient" not in str(refusal.value)


def test_the_contract_is_the_same_everywhere_and_has_no_code() -> None:
    bundle = contract("a" * 64)
    assert bundle == contract("a" * 64)
    assert bundle != contract("b" * 64)
    with zipfile.ZipFile(io.BytesIO(bundle)) as files:
        assert sorted(files.namelist()) == ["LICENSE", "pyproject.toml"]

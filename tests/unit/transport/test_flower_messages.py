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
from secure_fed.transport.flower_messages import (
    LARGE,
    WORDS,
    contract,
    read_reply,
    read_request,
    reply_content,
    request_content,
)
from tests.flower_messages import Shelf

REQUEST = RoundRequest(3, 2, (b"first", b"second"), True, "ab" * 32, {"ash": "00" * 32, "birch": "11" * 32})
ASKING = dataclasses.replace(
    REQUEST,
    records=(),
    more=False,
    question=b"a signed question",
    held="ef" * 32,
    past=b"its own word",
    after="98" * 32,
)
READY = RoundReply("ash", ReplyCode.READY, "cd" * 32, 4, "22" * 32, b"a signed word")
VOID = RoundReply("ash", ReplyCode.VOID, "cd" * 32, 4, "22" * 32, b"a signed void")
UPDATE = RoundReply("ash", ReplyCode.UPDATE, "cd" * 32, 4, "22" * 32, b"an envelope")
APPLIED = RoundReply("ash", ReplyCode.APPLIED, "cd" * 32, 4, "22" * 32, b"")

Change = Callable[[RecordDict], Any]


def test_requests_and_replies_arrive_as_sent() -> None:
    shelf = Shelf()
    assert read_request(request_content(REQUEST, shelf.publish), shelf.fetch) == REQUEST
    for request in (RoundRequest(1, 1, (), more=False), ASKING, dataclasses.replace(ASKING, question=b"")):
        assert read_request(request_content(request, shelf.publish), shelf.fetch) == request
    for reply in (READY, VOID, UPDATE, APPLIED):
        assert read_reply(reply_content(reply, shelf.send), "ash", shelf.fetch) == reply


def test_what_leaves_a_site_is_on_a_short_list() -> None:
    """A field more in a reply, or in its message, fails here: that is the point."""
    assert {field.name for field in dataclasses.fields(RoundReply)} == {
        "site",
        "code",
        "run",
        "position",
        "attestation",
        "envelope",
        "carried",
    }
    shelf = Shelf()
    content = reply_content(UPDATE, shelf.send)
    assert set(content) == {"reply"}
    assert set(content.config_records["reply"]) == {
        *("code", "run", "position", "attestation"),
        *("word", "digest", "length", "carried"),
    }
    assert list(shelf.held.values()) == [UPDATE.envelope]


def test_shares_go_with_an_update_or_a_witness_and_with_nothing_else() -> None:
    for code in (*WORDS, *LARGE):
        shelf = Shelf()
        reply = RoundReply("ash", code, "cd" * 32, 4, "22" * 32, b"a word", b"shares")
        content = reply_content(reply, shelf.send)
        assert len(shelf.held) == (code in LARGE), "one thing is under way"
        if code in (ReplyCode.UPDATE, ReplyCode.WITNESSED):
            assert read_reply(content, "ash", shelf.fetch) == reply
        else:
            with pytest.raises(ProtocolError, match="6 bytes of shares"):
                read_reply(content, "ash", shelf.fetch)
        content["reply"]["carried"] = 13
        with pytest.raises(ProtocolError, match="13 bytes of shares"):
            read_reply(content, "ash", shelf.fetch)
    shelf = Shelf()
    asked = dataclasses.replace(REQUEST, question=b"a question", carried=b"shares")
    assert read_request(request_content(asked, shelf.publish), shelf.fetch) == asked


def test_the_sender_is_who_the_connection_says() -> None:
    shelf = Shelf()
    assert read_reply(reply_content(UPDATE, shelf.send), "birch", shelf.fetch).site == "birch"


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
        lambda content: content["request"].update(attested_head="ä" * 64),
        lambda content: content["request"].update(sites=["ash"], attestations=["ä" * 64]),
        lambda content: content["request"].update(sites=["ash", "ash"]),
        lambda content: content["request"].update(sites=["ash"]),
        lambda content: content["request"].update(digests=["0" * 64]),
        lambda content: content["request"].update(digests=["0" * 64, "../../etc/passwd"]),
        lambda content: content["request"].update(lengths=[5, -1]),
        lambda content: content["request"].update(lengths=[5, 2**40]),
        lambda content: content["request"].update(lengths=[5, 7]),
        lambda content: content["request"].update(question="1" * 64, question_length=3),
        lambda content: content["request"].update(question="1" * 64, question_length=2**40),
        lambda content: content["request"].update(past="no base64"),
        lambda content: content["request"].update(past="nördlich"),
        lambda content: content["request"].update(past="A" * 8196),
        lambda content: content.update(more=ConfigRecord({"epochs": 100})),
        lambda content: content.update(records=ArrayRecord({"0": Array(np.zeros(2))})),
        lambda content: content.pop("request"),
    ],
)
def test_a_request_with_anything_else_is_refused(change: Change) -> None:
    shelf = Shelf()
    content = request_content(REQUEST, shelf.publish)
    change(content)
    with pytest.raises(ProtocolError):
        read_request(content, shelf.fetch)


def test_only_a_digest_is_asked_for() -> None:
    """What is asked for becomes a path, at the server's disk or at another web server."""
    asked: list[str] = []

    def note(digest: str, length: int) -> bytes:
        asked.append(digest)
        return b"abc"

    shelf = Shelf()
    request = request_content(ASKING, shelf.publish)
    request["request"].update(question="../../elsewhere", question_length=3)  # type: ignore[union-attr]
    reply = reply_content(UPDATE, shelf.send)
    reply["reply"].update(digest="../../elsewhere", length=3)  # type: ignore[union-attr]
    for read in (lambda: read_request(request, note), lambda: read_reply(reply, "ash", note)):
        with pytest.raises(ProtocolError):
            read()
    assert asked == []


def test_a_page_beyond_its_size_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secure_fed.transport.flower_messages.PAGE_BYTES", 10)
    shelf = Shelf()
    with pytest.raises(ProtocolError, match="page"):
        read_request(request_content(REQUEST, shelf.publish), shelf.fetch)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content["reply"].update(loss=0.1),
        lambda content: content["reply"].update(code="ValueError: /data/patient"),
        lambda content: content["reply"].update(position="4"),
        lambda content: content["reply"].update(attestation="ä" * 64),
        lambda content: content["reply"].update(run="elsewhere"),
        lambda content: content["reply"].update(digest=""),
        lambda content: content["reply"].update(digest="0" * 64),
        lambda content: content["reply"].update(length=0),
        lambda content: content["reply"].update(length=2**40),
        lambda content: content["reply"].update(word="YQ=="),
        lambda content: content["reply"].update(code="ready"),
        lambda content: content["reply"].update(code="ready", digest="", length=0, word="?"),
        lambda content: content["reply"].update(code="ready", digest="", length=0, word="nördlich"),
        lambda content: content["reply"].update(code="ready", digest="", length=0, word="YQ==" * 3000),
        lambda content: content["reply"].update(code="void", digest="", length=0, word=""),
        lambda content: content["reply"].update(code="applied"),
        lambda content: content.update(metrics=ConfigRecord({"accuracy": 1.0})),
    ],
)
def test_a_reply_with_anything_else_is_refused(change: Change) -> None:
    shelf = Shelf()
    content = reply_content(UPDATE, shelf.send)
    change(content)
    with pytest.raises(ProtocolError) as refusal:
        read_reply(content, "ash", shelf.fetch)
    assert "patient" not in str(refusal.value)


def test_the_contract_is_the_same_everywhere_and_has_no_code() -> None:
    bundle = contract("a" * 64)
    assert bundle == contract("a" * 64)
    assert bundle != contract("b" * 64)
    with zipfile.ZipFile(io.BytesIO(bundle)) as files:
        assert sorted(files.namelist()) == ["LICENSE", "pyproject.toml"]

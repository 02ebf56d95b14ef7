"""Requests and replies as the content of Flower messages, and the bundle that stands for a study.

Both directions are allow-lists: content with a field, record or type that is not listed here is refused. Large bytes
are not in a message: it names them by SHA-256 and length, and they travel beside it. Only Flower's public API is used.
"""

from __future__ import annotations

import base64
import io
import json
import zipfile
from collections.abc import Callable
from typing import Annotated, Literal, TypeVar

from flwr.app import ConfigRecord, RecordDict
from pydantic import StringConstraints, ValidationError

from secure_fed.core.errors import ProtocolError
from secure_fed.core.tomlfile import FileModel
from secure_fed.protocol.rounds import PAGE_BYTES, ReplyCode, RoundReply, RoundRequest
from secure_fed.protocol.signing import Count
from secure_fed.protocol.study_tables import Hex64

ROUND_MESSAGE = "train.round"
"""The one message type of the protocol."""

MAX_ENVELOPE_BYTES = 512 * 2**20
MAX_TEXT = 128
MAX_WORD = 8192
WORDS = frozenset(
    {
        ReplyCode.PRESENT,
        ReplyCode.READY,
        ReplyCode.CHECKED,
        ReplyCode.REVEALED,
        ReplyCode.WITNESSED,
        ReplyCode.VOID,
        ReplyCode.RETIRED,
    }
)
"""Replies with a signed word of some hundred bytes, which is in the message itself."""

LARGE = frozenset({ReplyCode.UPDATE, ReplyCode.ACKNOWLEDGED})
"""Replies with bytes that travel beside the message."""

WITH_SHARES = frozenset({ReplyCode.UPDATE, ReplyCode.WITNESSED})
"""Replies of which the last bytes may be shares."""

Word = Annotated[str, StringConstraints(max_length=MAX_WORD)]
"""A signed word, base64."""

Fields = TypeVar("Fields", bound=FileModel)


class _RequestFields(FileModel):
    round: Count
    attempt: Count
    more: bool
    after: Hex64 | Literal[""]
    attested_head: Hex64 | Literal[""]
    sites: tuple[str, ...]
    attestations: tuple[Hex64, ...]
    held: Hex64 | Literal[""]
    digests: tuple[Hex64, ...]
    lengths: tuple[Count, ...]
    question: Hex64 | Literal[""]
    question_length: Count
    past: Word
    carried: Hex64 | Literal[""]
    carried_length: Count


class _ReplyFields(FileModel):
    code: ReplyCode
    run: Hex64 | Literal[""]
    position: Count
    attestation: Hex64 | Literal[""]
    word: Word
    digest: Hex64 | Literal[""]
    length: Count
    carried: Count


def request_content(request: RoundRequest, publish: Callable[[bytes], str]) -> RecordDict:
    """A request as message content.

    Args:
        request: to a site.
        publish: lets sites fetch bytes, and gives their digest.
    """
    sites = sorted(request.attestations)
    fields = ConfigRecord(
        {
            "round": request.round,
            "attempt": request.attempt,
            "more": request.more,
            "after": request.after,
            "attested_head": request.attested_head,
            "sites": sites,
            "attestations": [request.attestations[site] for site in sites],
            "held": request.held,
            "digests": [publish(data) for data in request.records],
            "lengths": [len(data) for data in request.records],
            "question": publish(request.question) if request.question else "",
            "question_length": len(request.question),
            "past": base64.b64encode(request.past).decode("ascii"),
            "carried": publish(request.carried) if request.carried else "",
            "carried_length": len(request.carried),
        }
    )
    return RecordDict({"request": fields})


def read_request(content: RecordDict, fetch: Callable[[str, int], bytes]) -> RoundRequest:
    """The request in a message, with the bytes that it names.

    Args:
        content: of the message.
        fetch: gets bytes by their digest and length.

    Raises:
        ProtocolError: it has anything that a request does not have.
    """
    parsed = _parse(content, "request", _RequestFields)
    if len(parsed.sites) != len(parsed.attestations) or len(set(parsed.sites)) != len(parsed.sites):
        raise ProtocolError(f"{len(parsed.attestations)} attestations of {len(parsed.sites)} sites; expected one each")
    if len(parsed.digests) != len(parsed.lengths):
        raise ProtocolError(f"{len(parsed.lengths)} lengths of {len(parsed.digests)} records; expected one each")
    if len(parsed.lengths) > 1 and sum(parsed.lengths) > PAGE_BYTES:
        raise ProtocolError(f"a page of {sum(parsed.lengths)} bytes; expected at most {PAGE_BYTES}")
    for length in (*parsed.lengths, parsed.question_length, parsed.carried_length):
        _refuse_length(length)
    records = tuple(fetch(digest, length) for digest, length in zip(parsed.digests, parsed.lengths, strict=True))
    question = fetch(parsed.question, parsed.question_length) if parsed.question else b""
    carried = fetch(parsed.carried, parsed.carried_length) if parsed.carried else b""
    return RoundRequest(
        round=parsed.round,
        attempt=parsed.attempt,
        records=records,
        more=parsed.more,
        after=parsed.after,
        attested_head=parsed.attested_head,
        attestations=dict(zip(parsed.sites, parsed.attestations, strict=True)),
        question=question,
        held=parsed.held,
        past=_word(parsed.past),
        carried=carried,
    )


def reply_content(reply: RoundReply, send: Callable[[str, bytes], str]) -> RecordDict:
    """A reply as message content; the sender's name is not in it, its connection says who it is.

    Args:
        reply: of the site.
        send: brings bytes of a run to the server, and gives their digest.
    """
    data = reply.envelope + reply.carried
    fields = ConfigRecord(
        {
            "code": reply.code.value,
            "run": reply.run,
            "position": reply.position,
            "attestation": reply.attestation,
            "word": base64.b64encode(data).decode("ascii") if reply.code in WORDS else "",
            "digest": send(reply.run, data) if reply.code in LARGE else "",
            "length": len(data) if reply.code in LARGE else 0,
            "carried": len(reply.carried),
        }
    )
    return RecordDict({"reply": fields})


def read_reply(content: RecordDict, site: str, take: Callable[[str, int], bytes]) -> RoundReply:
    """The reply in a message, with the bytes that it names.

    Args:
        content: of the message.
        site: whose connection it came over.
        take: gives bytes that this site has sent, by their digest and length.

    Raises:
        ProtocolError: it has anything that a reply does not have, or names bytes that the site has not sent.
    """
    parsed = _parse(content, "reply", _ReplyFields)
    large = bool(parsed.digest)
    if (parsed.code in LARGE) != large or large != bool(parsed.length) or (parsed.code in WORDS) != bool(parsed.word):
        raise ProtocolError(
            f"{parsed.length} bytes and a word of {len(parsed.word)} characters with code {parsed.code}; expected a "
            "word with present, ready, checked, revealed, witnessed, void and retired, bytes with an update or an "
            "acknowledgement, else nothing"
        )
    _refuse_length(parsed.length)
    data = take(parsed.digest, parsed.length) if large else _word(parsed.word)
    if parsed.carried > (len(data) if parsed.code in WITH_SHARES else 0):
        raise ProtocolError(f"{parsed.carried} bytes of shares in {len(data)} with code {parsed.code}")
    cut = len(data) - parsed.carried
    return RoundReply(site, parsed.code, parsed.run, parsed.position, parsed.attestation, data[:cut], data[cut:])


def contract(study_id: str) -> bytes:
    """The bundle of a study: a Flower app without any code, the same bytes at the server and at every site.

    Flower hands a bundle to the sites before it hands them messages. Sites run their own code and take this bundle
    only, so that a server that means another study, or would like to bring code, is refused at once.
    """
    project = (
        f'[project]\nname = "secfacmic"\nversion = "1"\ndescription = "study {study_id}"\n'
        'license = { file = "LICENSE" }\ndependencies = []\n\n'
        '[tool.flwr.app]\npublisher = "secfacmic"\nfab-format-version = 1\n\n'
        '[tool.flwr.app.components]\nserverapp = "none:app"\nclientapp = "none:app"\n'
    )
    files = {"LICENSE": "No code is in this bundle and none is taken from it.\n", "pyproject.toml": project}
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as bundle:
        for name, text in files.items():
            # A fixed date: the bytes must be the same wherever they are made.
            bundle.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), text)
    return stream.getvalue()


def _word(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:  # not base64, or not even ASCII
        raise ProtocolError("a word that is not base64; expected a signed word in it") from None


def _refuse_length(length: int) -> None:
    if length > MAX_ENVELOPE_BYTES:
        raise ProtocolError(f"{length} bytes in one piece; expected at most {MAX_ENVELOPE_BYTES}")


def _parse(content: RecordDict, name: str, model: type[Fields]) -> Fields:
    """The one record of a message, and nothing else."""
    if set(content) != {name} or set(content.config_records) != {name}:
        raise ProtocolError(f"a message with {len(content)} records; expected {name} only")
    fields = content.config_records[name]
    for key, value in fields.items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and len(text) > (MAX_WORD if key in ("word", "past") else MAX_TEXT):
                raise ProtocolError(f"a field of {len(text)} characters; expected at most {MAX_TEXT}")
    try:
        # JSON mode is strict about types but takes a list where a tuple is asked for.
        return model.model_validate_json(json.dumps(dict(fields)))
    except (ValidationError, TypeError, ValueError):
        # What was found is not repeated: it may be anything.
        raise ProtocolError(f"a message whose fields are not {', '.join(model.model_fields)}") from None

"""Requests and replies as the content of Flower messages, and the bundle that stands for a study.

Both directions are allow-lists: content with a field, record, array or type that is not listed here is refused.
Only Flower's public API is used.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from typing import Any, TypeVar

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from pydantic import ValidationError

from secure_fed.core.errors import ProtocolError
from secure_fed.core.tomlfile import FileModel
from secure_fed.protocol.rounds import PAGE_BYTES, ReplyCode, RoundReply, RoundRequest
from secure_fed.protocol.signing import Count

ROUND_MESSAGE = "train.round"
"""The one message type of the protocol."""

RECORD_TYPE = "secfacmic.record"
QUESTION_TYPE = "secfacmic.question"
ENVELOPE_TYPE = "secfacmic.envelope"
MAX_ENVELOPE_BYTES = 512 * 2**20
MAX_TEXT = 128
QUESTION = "question"
WITH_ENVELOPE = frozenset(
    {ReplyCode.READY, ReplyCode.UPDATE, ReplyCode.REVEALED, ReplyCode.VOID, ReplyCode.ACKNOWLEDGED}
)

Fields = TypeVar("Fields", bound=FileModel)


class _RequestFields(FileModel):
    round: Count
    attempt: Count
    more: bool
    attested_head: str
    sites: tuple[str, ...]
    attestations: tuple[str, ...]
    held: str


class _ReplyFields(FileModel):
    code: ReplyCode
    run: str
    position: Count
    attestation: str


def request_content(request: RoundRequest) -> RecordDict:
    """A request as message content."""
    sites = sorted(request.attestations)
    fields = ConfigRecord(
        {
            "round": request.round,
            "attempt": request.attempt,
            "more": request.more,
            "attested_head": request.attested_head,
            "sites": sites,
            "attestations": [request.attestations[site] for site in sites],
            "held": request.held,
        }
    )
    records = {f"{index:06d}": _array(data, RECORD_TYPE) for index, data in enumerate(request.records)}
    if request.question:
        records[QUESTION] = _array(request.question, QUESTION_TYPE)
    return RecordDict({"request": fields, "records": ArrayRecord(records)})


def read_request(content: RecordDict) -> RoundRequest:
    """The request in a message.

    Raises:
        ProtocolError: it has anything that a request does not have.
    """
    fields, arrays = _parts(content, "request", "records")
    parsed = _parse(fields, _RequestFields)
    if len(parsed.sites) != len(parsed.attestations) or len(set(parsed.sites)) != len(parsed.sites):
        raise ProtocolError(f"{len(parsed.attestations)} attestations of {len(parsed.sites)} sites; expected one each")
    records = tuple(_bytes(arrays[name], RECORD_TYPE) for name in sorted(set(arrays) - {QUESTION}))
    question = _bytes(arrays[QUESTION], QUESTION_TYPE) if QUESTION in arrays else b""
    if len(records) > 1 and sum(map(len, records)) > PAGE_BYTES:
        raise ProtocolError(f"a page of {sum(map(len, records))} bytes; expected at most {PAGE_BYTES}")
    return RoundRequest(
        round=parsed.round,
        attempt=parsed.attempt,
        records=records,
        more=parsed.more,
        attested_head=parsed.attested_head,
        attestations=dict(zip(parsed.sites, parsed.attestations, strict=True)),
        question=question,
        held=parsed.held,
    )


def reply_content(reply: RoundReply) -> RecordDict:
    """A reply as message content; the sender's name is not in it, its connection says who it is."""
    fields = ConfigRecord(
        {
            "code": reply.code.value,
            "run": reply.run,
            "position": reply.position,
            "attestation": reply.attestation,
        }
    )
    envelope = {"envelope": _array(reply.envelope, ENVELOPE_TYPE)} if reply.envelope else {}
    return RecordDict({"reply": fields, "envelope": ArrayRecord(envelope)})


def read_reply(content: RecordDict, site: str) -> RoundReply:
    """The reply in a message.

    Args:
        content: of the message.
        site: whose connection it came over.

    Raises:
        ProtocolError: it has anything that a reply does not have.
    """
    fields, arrays = _parts(content, "reply", "envelope")
    parsed = _parse(fields, _ReplyFields)
    if set(arrays) - {"envelope"} or (parsed.code in WITH_ENVELOPE) != bool(arrays):
        raise ProtocolError(f"{len(arrays)} envelopes with code {parsed.code}; expected one with an update, else none")
    envelope = _bytes(arrays["envelope"], ENVELOPE_TYPE) if arrays else b""
    return RoundReply(site, parsed.code, parsed.run, parsed.position, parsed.attestation, envelope)


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


def _array(data: bytes, kind: str) -> Array:
    return Array(dtype="bytes", shape=(len(data),), stype=kind, data=data)


def _bytes(array: Array, kind: str) -> bytes:
    if array.stype != kind or array.dtype != "bytes" or tuple(array.shape) != (len(array.data),):
        raise ProtocolError(f"an array of another kind than {kind}; expected bytes of that kind")
    if len(array.data) > MAX_ENVELOPE_BYTES:
        raise ProtocolError(f"an array of {len(array.data)} bytes; expected at most {MAX_ENVELOPE_BYTES}")
    return bytes(array.data)


def _parts(content: RecordDict, fields: str, arrays: str) -> tuple[Mapping[str, Any], Mapping[str, Array]]:
    """The two records of a message, and nothing else."""
    if set(content) != {fields, arrays} or set(content.config_records) != {fields}:
        raise ProtocolError(f"a message with {len(content)} records; expected {fields} and {arrays} only")
    if set(content.array_records) != {arrays}:
        raise ProtocolError(f"a message without arrays in {arrays}; expected {fields} and {arrays} only")
    return content.config_records[fields], content.array_records[arrays]


def _parse(fields: Mapping[str, Any], model: type[Fields]) -> Fields:
    for value in fields.values():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and len(text) > MAX_TEXT:
                raise ProtocolError(f"a field of {len(text)} characters; expected at most {MAX_TEXT}")
    try:
        # JSON mode is strict about types but takes a list where a tuple is asked for.
        return model.model_validate_json(json.dumps(dict(fields)))
    except (ValidationError, TypeError, ValueError):
        # What was found is not repeated: it may be anything.
        raise ProtocolError(f"a message whose fields are not {', '.join(model.model_fields)}") from None

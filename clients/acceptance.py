"""What a site agrees to before it takes part, in words, and the signed note of who agreed and when.

``STATE/accepted/STUDY_ID.signed``  the note: a signed frame whose payload is what was shown
``STATE/accepted/STUDY_ID.toml``    the study's file as it was accepted, to compare a later one with
"""

from __future__ import annotations

import dataclasses
import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import StringConstraints

from secure_fed.clients.sitefile import SiteFile
from secure_fed.core.errors import NotAcceptedError
from secure_fed.core.storage import make_folder, write_durable
from secure_fed.core.tomlfile import to_toml
from secure_fed.privacy.keys import Identity
from secure_fed.protocol.envelope import MAX_HEADER, EnvelopeHeader
from secure_fed.protocol.packing import wire
from secure_fed.protocol.rounds import RoundReply
from secure_fed.protocol.signing import (
    SIGNATURE_BYTES,
    Count,
    SignedHeader,
    check_payload,
    parse_header,
    payload_fields,
    sign_frame,
    split_frame,
    verify_signature,
)
from secure_fed.protocol.study import AgreedStudy, Hex64, Name, canonical_json

MAGIC = b"SFP2"
MAX_ACCEPTANCE_HEADER = 2048

Person = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f]{1,120}$")]

REPLY_WORDS = {
    "site": "its name, by the key that opens the connection",
    "code": "one word of a fixed list: update, applied, more, acknowledged, refused-..., failed-...",
    "run": "the run it is in, 64 hex digits",
    "position": "how many journal records it has, a number",
    "attestation": "a keyed digest of the adapter that all sites hold, 64 hex digits; the server lacks the key",
    "envelope": "the update, as above; or the signed word that a key rotation was applied",
}
"""Every field of a reply, and what it says."""

HEADER_WORDS = {
    "version": "of the format",
    "study": "the study's digest",
    "run": "the run's id",
    "head": "digest of the journal record on which it trained",
    "key": "id of the key in force",
    "amendment": "how many key rotations were applied",
    "round": "which round",
    "attempt": "which attempt of it",
    "site": "its name",
    "values": "how many numbers the update has: the same for every site",
    "seed": "random digits from which half of the ciphertext follows; zeros without encryption",
    "ledger_seq": "how many entries its privacy ledger has; 0 without a budget",
    "ledger_head": "salted digest of the ledger's last entry; zeros without a budget",
    "ledger_links": "numbers and salted digests of earlier entries, so that a copied ledger is noticed",
    "size": "bytes of the update",
    "payload": "digest of the update as it is sent",
}
"""Every field that an update says in clear, and what it says."""

NEVER = (
    "images, features, file names, patient ids, labels, class counts, numbers of images or patients, losses, metrics "
    "of this site, error texts, the contents of site.toml"
)


class AcceptanceHeader(SignedHeader):
    """One acceptance.

    Attributes:
        study: the study's id.
        site: who takes part.
        by: who accepted, as they call themselves.
        accepted_ms: the site's clock, milliseconds since 1970.
    """

    version: Literal[1]
    study: Hex64
    site: Name
    by: Person
    accepted_ms: Count


def terms(file: SiteFile, agreed: AgreedStudy) -> dict[str, Any]:
    """What taking part means for this site, as a JSON document.

    Args:
        file: its ``site.toml``, with the budget it will run under.
        agreed: the study.
    """
    study = agreed.study
    payload = wire(study.mode, agreed.lanes).payload_bytes
    observes = file.observes(study)
    budget = None
    if file.privacy is not None and not observes:
        budget = {"epsilon": file.privacy.epsilon, "delta": file.privacy.delta, "unit": file.data.unit}
    return {
        "study": study.name,
        "study_id": study.id,
        "site": file.site,
        "role": "observer" if observes else "train",
        "mode": study.mode,
        "rounds": study.rounds,
        "leaves": {
            "updates": 0 if observes else study.rounds,
            "update_bytes": payload,
            "update_header_bytes": 8 + MAX_HEADER + SIGNATURE_BYTES,
            "update_values": agreed.lanes.values,
            "update_bits": study.encoding.bits,
            "validation_counts": study.encoding.share_validation and not observes,
            "reply_fields": {
                field.name: REPLY_WORDS[field.name]
                for field in dataclasses.fields(RoundReply)
                if field.name != "envelope" or not observes
            },
            "update_fields": {} if observes else {name: HEADER_WORDS[name] for name in EnvelopeHeader.model_fields},
            "never": NEVER,
        },
        "budget": budget,
        "policy": policy(file),
        "members": [
            {
                "name": member.name,
                "role": member.role,
                "weight": member.weight,
                "key_maker": member.name == study.key_maker,
            }
            for member in study.sites
        ],
        "min_sites": study.min_sites,
        "quorum": dataclasses.asdict(study.quorum(study.sites)),
    }


def policy(file: SiteFile) -> dict[str, Any]:
    """What this site demands of any study: the part of ``site.toml`` that names no place on its disk."""
    fields = ("allow_plain", "min_sites", "max_epsilon", "studies", "amendments")
    content = file.model_dump(mode="json", include=set(fields))
    return {**content, "data": {"kind": file.data.kind, "unit": file.data.unit}}


def record_acceptance(file: SiteFile, agreed: AgreedStudy, identity: Identity, by: str) -> Path:
    """Note durably who accepted a study here; one note a study, the newest.

    Returns:
        Where it lies.

    Raises:
        NotAcceptedError: nobody is named.
        StorageError: it cannot be written.
    """
    if not by:
        raise NotAcceptedError(
            f"study {agreed.study.name}: not accepted, and nothing was recorded; to accept what is shown above, give "
            "the name of who does: --by NAME"
        )
    payload = canonical_json(terms(file, agreed))
    header = AcceptanceHeader(
        version=1,
        study=agreed.study.id,
        site=file.site,
        by=by,
        accepted_ms=time.time_ns() // 1_000_000,
        **payload_fields(payload),
    )
    file.state_folder.begin()
    folder = _folder(file)
    make_folder(folder, 0o700)
    path = folder / f"{agreed.study.id}.signed"
    write_durable(folder / f"{agreed.study.id}.toml", to_toml(agreed.study).encode())
    write_durable(path, sign_frame(MAGIC, header, identity.signing, payload))
    return path


def check_acceptance(data: bytes, key: str) -> tuple[AcceptanceHeader, dict[str, Any]]:
    """Check a note.

    Args:
        data: the note.
        key: the site's public signing key, 64 hex digits.

    Returns:
        Who accepted what and when, and the terms that were shown.

    Raises:
        NotAcceptedError: it is damaged, or not signed by that key.
    """
    frame = split_frame(MAGIC, data, MAX_ACCEPTANCE_HEADER, NotAcceptedError)
    verify_signature(MAGIC, frame.header, frame.signature, key, NotAcceptedError)
    header = parse_header(frame.header, AcceptanceHeader, NotAcceptedError)
    check_payload(frame, header, NotAcceptedError)
    shown: dict[str, Any] = json.loads(bytes(frame.payload))
    return header, shown


def require_acceptance(file: SiteFile, agreed: AgreedStudy, key: str) -> AcceptanceHeader:
    """The note of this very study at this site.

    Args:
        file: its ``site.toml``.
        agreed: the study.
        key: the site's public signing key.

    Raises:
        NotAcceptedError: there is none, or it is not by this site's key.
    """
    study = agreed.study
    path = _folder(file) / f"{study.id}.signed"
    accept = "secfacmic site accept STUDY --site site.toml"
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        others = sorted(_folder(file).glob("*.toml"), key=lambda other: other.stat().st_mtime)
        if others:
            raise NotAcceptedError(
                f"study {study.name}, id {study.id}: not accepted at site {file.site}; accepted was {others[-1].stem}: "
                f"the study was changed. See what changed with: secfacmic study diff {others[-1]} {file.study}; then "
                f"accept it by hand: {accept}"
            ) from None
        raise NotAcceptedError(
            f"study {study.name}, id {study.id}: not accepted at site {file.site}; expected somebody's word that what "
            f"leaves is known: {accept}"
        ) from None
    try:
        header, _ = check_acceptance(data, key)
    except NotAcceptedError as error:
        raise NotAcceptedError(f"{path}: {error}; accept the study again: {accept}") from None
    if (header.study, header.site) != (study.id, file.site):
        raise NotAcceptedError(f"{path}: of another study or site; accept this one: {accept}")
    return header


def when(milliseconds: int) -> str:
    """A note's time, UTC."""
    return datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat(timespec="seconds")


def _folder(file: SiteFile) -> Path:
    return file.state_folder.accepted

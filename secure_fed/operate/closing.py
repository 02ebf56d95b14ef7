"""Closing a study at a site or at its server: what could still open or sign anything is destroyed; the rest is named.

What is erased is overwritten first. A disk that writes elsewhere (flash, snapshots), and backups, may keep it all the
same: keep state folders on an encrypted disk, and out of backups that outlive the study.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from secure_fed.core.errors import StudyClosedError, StudyError
from secure_fed.core.storage import exclusive, sync_folder, write_durable
from secure_fed.core.tomlfile import FileModel
from secure_fed.protocol.records import Chain, RecordFolder
from secure_fed.protocol.signing import Count
from secure_fed.protocol.study import AgreedStudy, Hex64
from secure_fed.transport.certificates import CA_KEY, SERVER_KEY

MARK = "closed"
"""Name of the file, in a state folder, that says that the study is closed here."""


class _Mark(FileModel):
    study: Hex64
    closed_ms: Count
    rounds: Count


@dataclass(frozen=True)
class Closed:
    """What closing did.

    Attributes:
        rounds: how many the study had.
        destroyed: what was erased, with the number of files.
        remains: each thing that is still here, and what it is for.
    """

    rounds: int
    destroyed: dict[str, int]
    remains: dict[str, str]


def refuse_closed(state: Path) -> None:
    """Check that a state folder's study is not closed.

    Raises:
        StudyClosedError: it is.
    """
    try:
        mark = _Mark.model_validate_json((state / MARK).read_bytes())
    except FileNotFoundError:
        return
    except (ValidationError, OSError):
        mark = None
    since = time.strftime("%Y-%m-%d", time.gmtime(mark.closed_ms / 1000)) if mark is not None else "an unknown day"
    raise StudyClosedError(
        f"{state}: its study was closed here on {since}, its keys and outbox are destroyed; expected an open study: a "
        "new study has a state folder of its own"
    )


def close_site(state: Path, identity: Path, agreed: AgreedStudy, *, abandon: bool, destroy_identity: bool) -> Closed:
    """Close a study at a site. Can be repeated after a crash.

    Args:
        state: the site's state folder.
        identity: folder of its private keys.
        agreed: the study.
        abandon: close it though rounds are missing.
        destroy_identity: erase the private keys too. While they exist, copies of sealed key files that others kept can
            be opened with them.

    Raises:
        StudyError: rounds are missing.
        StorageError: another process is using the folder.
    """
    with exclusive(state):
        rounds = _mark(state, agreed, abandon)
        erased = {
            "sealed keys": _erase(state / "keys", "*.sealed"),
            "integers and envelopes in the outbox": _erase(state, "runs/*/outbox/*"),
        }
        if destroy_identity:
            erased["private keys of the site"] = _erase(identity, "*.key")
        remains = {
            "adapter.safetensors": "the adapter, which is the result",
            "calibration.safetensors": "its temperature, fitted to this site's validation images; for use here only",
            "summary.json": "its figures on this site's test images",
            "runs": "the journal: encrypted sums, which nothing here opens any more",
            "features.sqlite": "features of the images, as sensitive as the images; delete it when you need it no more",
            "privacy": "the privacy ledger. Keep it: what was spent on a patient stays spent in every later study",
            "accepted": "who accepted the study, and when",
            "sent.jsonl": "what left this site",
            "status.json": "where the site's process stood last",
            "log": "what the site's process reported",
        }
        if not destroy_identity:
            remains[str(identity)] = (
                "the site's private keys. They open sealed key files that others may have kept: erase them with "
                "--identity unless they serve another study"
            )
        return Closed(rounds, erased, _present(state, remains))


def close_server(state: Path, agreed: AgreedStudy, *, abandon: bool) -> Closed:
    """Close a study at its server. Can be repeated after a crash.

    Raises:
        StudyError: rounds are missing.
        StorageError: another process is using the folder.
    """
    with exclusive(state):
        rounds = _mark(state, agreed, abandon)
        erased = {
            "spooled envelopes": _erase(state, "runs/*/spool/*/*/*"),
            "the coordinator's signing key": _erase(state, "coordinator.key"),
            "keys of the server's certificate and of the authority": _erase(state / "tls", SERVER_KEY)
            + _erase(state / "tls", CA_KEY),
        }
        remains = {
            "runs": "the journal: signed records with encrypted sums, and sealed keys of rotations in it",
            "ledger_heads.json": "how far each site's privacy ledger has come",
            "tls": "certificates, which are public",
            "status.json": "where the server stood last",
            "log": "what the server reported",
        }
        return Closed(rounds, erased, _present(state, remains))


def _mark(state: Path, agreed: AgreedStudy, abandon: bool) -> int:
    """Mark the folder as closed, so that nothing starts there again, before anything is destroyed."""
    chain = Chain(agreed)
    with contextlib.suppress(OSError):
        run = (state / "run").read_text(encoding="ascii").strip()
        for _ in RecordFolder(state / "runs" / run / "journal").replay(chain):
            pass
    if not chain.finished and not abandon:
        raise StudyError(
            f"{state}: the study stands at round {chain.round} of {agreed.study.rounds}; expected it to be over: let "
            "it end, or give it up for ever with --abandon"
        )
    if not (state / MARK).exists():
        mark = _Mark(study=agreed.study.id, closed_ms=time.time_ns() // 1_000_000, rounds=chain.round)
        write_durable(state / MARK, (json.dumps(mark.model_dump(mode="json")) + "\n").encode())
    return chain.round


def _erase(folder: Path, pattern: str) -> int:
    """Overwrite and remove files; how many."""
    paths = [path for path in folder.glob(pattern) if path.is_file()]
    for path in paths:
        with path.open("r+b") as stream:
            stream.write(bytes(path.stat().st_size))
            stream.flush()
            os.fsync(stream.fileno())
        path.unlink()
    for parent in {path.parent for path in paths}:
        sync_folder(parent)
    return len(paths)


def _present(state: Path, remains: dict[str, str]) -> dict[str, str]:
    found = {str(state / name) if not Path(name).is_absolute() else name: words for name, words in remains.items()}
    return {name: words for name, words in found.items() if Path(name).exists()}

"""Closing a study at a site or at its server: what could still open or sign anything is destroyed; the rest is named.

What is erased is overwritten first. A disk that writes elsewhere (flash, snapshots), and backups, may keep it all the
same: keep state folders on an encrypted disk, and out of backups that outlive the study.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from secure_fed.clients.given_sums import GIVEN
from secure_fed.core.errors import StudyClosedError, StudyError
from secure_fed.core.layout import SEALED, RunState, ServerRun, ServerState, SiteRun, SiteState, StateFolder
from secure_fed.core.storage import exclusive, sync_folder, unfinished, write_durable
from secure_fed.core.tomlfile import FileModel
from secure_fed.protocol.records import Chain, RecordFolder
from secure_fed.protocol.signing import Count
from secure_fed.protocol.study import AgreedStudy
from secure_fed.protocol.study_tables import Hex64
from secure_fed.transport.certificates import CA_KEY, SERVER_KEY


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
        mark = _Mark.model_validate_json(StateFolder(state).closed.read_bytes())
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
        destroy_identity: erase the private keys too. While they exist, sealed keys of rotations, which stand in the
            journal, and copies of sealed key files that others kept can be opened with them.

    Raises:
        StudyError: rounds are missing.
        StorageError: another process is using the folder.
    """
    folder = SiteState(state)
    with exclusive(state):
        rounds = _mark(state, agreed, abandon)
        erased = {
            "sealed keys": _erase(folder.keys.glob(SEALED)),
            "integers and envelopes in the outbox": _erase(
                path for run in folder.run_folders() for path in SiteRun(run).outbox.glob("*")
            ),
            "keys and masks of rounds, and words in them": _erase(
                [*(SiteRun(run).bound for run in folder.run_folders()), *unfinished(folder.runs)]
            ),
            "snapshots of the data of its runs": _erase(
                path for run in folder.run_folders() if (path := SiteRun(run).snapshot).exists()
            ),
        }
        if destroy_identity:
            erased["private keys of the site"] = _erase(identity.glob("*.key"))
        remains = {
            folder.adapter: "the adapter, which is the result",
            folder.calibration: "its temperature, fitted to this site's validation images; for use here only",
            folder.summary: "its figures on this site's test images",
            folder.runs: "the journal: encrypted sums, and sealed keys of rotations, "
            + ("which nothing here opens any more" if destroy_identity else "which the site's private keys open"),
            folder.features: "features of the images, as sensitive as the images; delete it when you need it no more",
            folder.ledger: "a privacy ledger of version 0.1; once adopted, its copy in the identity's ledger counts",
            identity / "ledger": "the privacy ledger. Keep it: what was spent on a patient stays spent in every later "
            "study",
            identity
            / GIVEN: "which images were in an exact sum, as keyed hashes. Keep it: they are given to no second one",
            folder.accepted: "who accepted the study, and when",
            folder.sent: "what left this site",
            folder.status: "where the site's process stood last",
            folder.metrics_token: "the token for its figures, to which nothing answers any more",
            folder.logs: "what the site's process reported",
        }
        if not destroy_identity:
            remains[identity] = (
                "the site's private keys. They open sealed keys, those in the journal and those that others may have "
                "kept: erase them with --identity unless they serve another study"
            )
        return Closed(rounds, erased, _present(remains))


def close_server(state: Path, agreed: AgreedStudy, *, abandon: bool) -> Closed:
    """Close a study at its server. Can be repeated after a crash.

    Raises:
        StudyError: rounds are missing.
        StorageError: another process is using the folder.
    """
    folder = ServerState(state)
    with exclusive(state):
        rounds = _mark(state, agreed, abandon)
        erased = {
            "spooled envelopes": _erase(
                path for run in folder.run_folders() for path in ServerRun(run).spool.glob("*/*/*")
            ),
            "the coordinator's signing key": _erase([folder.key]),
            "keys of the server's certificate and of the authority": _erase(
                [folder.certificates / SERVER_KEY, folder.certificates / CA_KEY]
            ),
        }
        remains = {
            folder.runs: "the journal: signed records with encrypted sums, and sealed keys of rotations in it",
            folder.ledger_heads: "how far each site's privacy ledger has come",
            folder.certificates: "certificates, which are public",
            folder.status: "where the server stood last",
            folder.metrics_token: "the token for its figures, to which nothing answers any more",
            folder.logs: "what the server reported",
        }
        return Closed(rounds, erased, _present(remains))


def _mark(state: Path, agreed: AgreedStudy, abandon: bool) -> int:
    """Mark the folder as closed, so that nothing starts there again, before anything is destroyed."""
    chain, folder = Chain(agreed), StateFolder(state)
    with contextlib.suppress(OSError):
        run = folder.current_run
        for _ in RecordFolder(RunState(folder.runs / run).journal).replay(chain) if run is not None else ():
            pass
    if not chain.finished and not abandon:
        raise StudyError(
            f"{state}: the study stands at round {chain.round} of {chain.rounds}; expected it to be over: let "
            "it end, or give it up for ever with --abandon"
        )
    if not folder.closed.exists():
        mark = _Mark(study=agreed.study.id, closed_ms=time.time_ns() // 1_000_000, rounds=chain.round)
        write_durable(folder.closed, (json.dumps(mark.model_dump(mode="json")) + "\n").encode())
    return chain.round


def _erase(candidates: Iterable[Path]) -> int:
    """Overwrite and remove those that are files; how many."""
    paths = [path for path in candidates if path.is_file()]
    for path in paths:
        with path.open("r+b") as stream:
            stream.write(bytes(path.stat().st_size))
            stream.flush()
            os.fsync(stream.fileno())
        path.unlink()
    for parent in {path.parent for path in paths}:
        sync_folder(parent)
    return len(paths)


def _present(remains: dict[Path, str]) -> dict[str, str]:
    return {str(path): words for path, words in remains.items() if path.exists()}

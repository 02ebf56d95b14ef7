"""A site's own look at the sums: it fetches the envelopes of past rounds, which are padded, and adds them again."""

from __future__ import annotations

import logging
from pathlib import Path

import httpx

from secure_fed.clients.byte_line import ByteLine
from secure_fed.clients.flower_node import Way, open_line
from secure_fed.clients.sitefile import SiteFile
from secure_fed.core.errors import NotShownError, ProtocolError, RecordError, StudyError
from secure_fed.privacy.keys import load_identity
from secure_fed.protocol.journal import find_runs
from secure_fed.protocol.recompute import Recomputed, recompute, refuse_forged
from secure_fed.protocol.records import Chain, RecordFolder
from secure_fed.protocol.round_frames import SignedWord
from secure_fed.protocol.study import AgreedStudy

log = logging.getLogger(__name__)


class _Asked:
    """Envelopes that a server shows, by the digests that their sites signed."""

    def __init__(self, line: ByteLine) -> None:
        self._line = line

    def payload(self, contribution: SignedWord, size: int, digest: str) -> bytes | None:
        try:
            return self._line.fetch(digest, size)
        except httpx.HTTPStatusError as error:
            if error.response.status_code == 404:
                return None
            raise ProtocolError(
                f"the server answers {error.response.status_code} to a request for an envelope; expected it, or 404"
            ) from None
        except ProtocolError as error:
            log.warning("%s", error)  # other bytes than those that its site signed
            return None


def audit_sums(file: SiteFile, agreed: AgreedStudy, rounds: int | None = None) -> list[Recomputed]:
    """Add the envelopes of this site's last records again, as the server shows them.

    Args:
        file: the site's ``site.toml``.
        agreed: the study.
        rounds: of how many of the last rounds; as many as the study keeps unless given.

    Returns:
        What became of each, oldest first.

    Raises:
        StudyError: envelopes of this study are not padded, so that nobody hands them out, or not so many are kept.
        RecordError: the journal does not verify, or has no sum.
        SiteFileError: the file does not say how the server is reached.
        ProtocolError: the server is not there, or answers something else.
    """
    study = agreed.study
    if not study.pads:
        raise StudyError(
            f"{study.name}: collusion = 0: whoever has the study's key reads an envelope, so that no server hands one "
            "out; expected a study with pads; with the server's own copies: secfacmic journal recompute"
        )
    if not 0 < (rounds or study.keep_rounds) <= study.keep_rounds:
        raise StudyError(
            f"{study.name}: envelopes of {study.keep_rounds if rounds is None else rounds} rounds; the study says "
            f"keep_rounds = {study.keep_rounds}; expected {'none' if not study.keep_rounds else 'at most so many'}"
        )
    run = next((one for one in find_runs(file.state_folder.path) if one.current), None)
    if run is None:
        raise RecordError(f"{file.state_folder.path}: no run is open here; expected the one that is to be looked at")
    chain = Chain(agreed)
    for _ in RecordFolder(run.journal).replay(chain):
        pass
    if not chain.round:
        raise RecordError(f"{run.journal}: no round has its record yet; expected one at least")
    server = file.known_server
    key = load_identity(Path(file.identity), file.site).flower
    way = Way(server.address, Path(server.authority), len(study.sites), server.proxy)
    with open_line(way, file.site, key, chain.authority) as line:
        return list(recompute(run, agreed, _Asked(line), chain.round + 1 - (rounds or study.keep_rounds)))


def refuse_unshown(results: list[Recomputed]) -> None:
    """Check that every sum was shown whole and came out the same.

    Raises:
        RecordError: one differs.
        NotShownError: an envelope was not shown.
    """
    refuse_forged(results)
    absent = [f"{', '.join(result.missing)} in round {result.round}" for result in results if result.missing]
    if absent:
        raise NotShownError(
            f"the server cannot show the envelopes of {'; '.join(absent)}; expected all that it has added, of the "
            "rounds that the study keeps; if this site's journal is behind the server's, start the client and ask "
            "again; else tell the other sites"
        )

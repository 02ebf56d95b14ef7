"""What the coordinator's people order for a run: left in its folder, where the coordinator finds it, running or not."""

from __future__ import annotations

import contextlib
from pathlib import Path

from secure_fed.core.errors import CertificateError, KeyFileError, StudyError
from secure_fed.core.layout import ServerRun, ServerState
from secure_fed.core.storage import make_folder, write_durable
from secure_fed.protocol.records import LOST, MOST_ROUNDS, Chain, RecordFolder
from secure_fed.protocol.study import AgreedStudy
from secure_fed.transport.certificates import CA, SERVER, SERVER_KEY, certificates, fingerprint_of, read_authority

_LEFT = b"left"


class Orders:
    """Those that lie in a run's folder.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: ServerRun) -> None:
        self._folder = folder

    @property
    def paused(self) -> bool:
        """Whether no round is to begin."""
        return self._folder.pause.exists()

    @property
    def lobby(self) -> bool:
        """Whether the first round waits until all are ready."""
        return self._folder.lobby.exists() and not self._folder.lobby.stat().st_size

    def hold_in_lobby(self, held: bool) -> None:
        """Let the first round wait until all are ready, or no longer. What was left is not entered again: a server
        that is started again with the same words would take back what people have said since.

        Raises:
            StorageError: it cannot be written.
        """
        if held and not self._folder.lobby.exists():
            write_durable(self._folder.lobby, b"")
        elif not held and self.lobby:
            write_durable(self._folder.lobby, _LEFT)

    @property
    def end(self) -> bool:
        """Whether the run is to end before its last round."""
        return self._folder.end.exists()

    @property
    def lost(self) -> bool:
        """Whether it is to end for want of sites, which never come back; once it is to end."""
        return self._folder.end.read_bytes() == LOST

    @property
    def rounds(self) -> int:
        """How many rounds the run is to have, if more than it has; else 0.

        Raises:
            StudyError: the file is damaged.
        """
        path = self._folder.rounds
        wanted = path.read_bytes() if path.exists() else b"0"
        if not wanted.isdigit():
            raise StudyError(f"{path}: damaged; expected a number of rounds: remove it, and say it again: study extend")
        return int(wanted)

    def amendment(self, key: str) -> bytes | None:
        """The amendment that follows the key of that id, if one was left."""
        path = self._folder.amendment(key)
        return path.read_bytes() if path.exists() else None


def store_amendment(run_folder: Path, chain: Chain, sealed: bytes) -> None:
    """Leave an amendment in a run's folder, where its coordinator finds it, running or not.

    Raises:
        KeyFileError: it does not follow the key in force, or the members cannot change so.
    """
    _, members = chain.amended(sealed)
    changed = chain.changed(members)
    if len(changed) > 1:
        raise KeyFileError(
            f"an amendment by which {', '.join(changed)} would join, leave or change; expected one training site "
            "at most between two rounds: make one amendment for each, and let a round pass between them"
        )
    path = ServerRun(run_folder).amendment(chain.key)
    make_folder(path.parent)
    write_durable(path, sealed)


def amend_run(agreed: AgreedStudy, state: Path, sealed: bytes) -> tuple[int, int]:
    """Leave an amendment for the current run, whether its coordinator is running or not.

    Args:
        agreed: the study.
        state: the server's state folder.
        sealed: a sealed key file that follows the key in force.

    Returns:
        The first round in which it can be in force, or the next one, if that is being closed; and the run's last.

    Raises:
        StudyError: no run has begun, it was ended, or no round is left in which it could be in force.
        RecordError: the run's journal does not verify.
        KeyFileError: it does not follow the key in force, or the members cannot change so.
    """
    folder, chain = _current_run(agreed, state)
    _refuse_ended(folder, chain, state)
    if chain.finished and Orders(folder).rounds <= chain.rounds:
        raise StudyError(
            f"{state}: the run is over after {chain.round} rounds; expected one that goes on: let it have more rounds "
            "first (secfacmic study extend)"
        )
    store_amendment(folder.path, chain, sealed)
    return chain.round + 1, chain.rounds


def refuse_other_authority(run_folder: Path, chain: Chain, folder: Path) -> None:
    """Check that the server's authority is the one that a run's sites trust, before it listens.

    That is the one that an amendment in force names, else the one with which the run was first served, which is noted
    here then; or already the one of an amendment that waits: the sites' files hold both then, and where the one before
    has ended nobody could get the amendment otherwise.

    Args:
        run_folder: of the run.
        chain: its journal's.
        folder: of the server's certificates.

    Raises:
        CertificateError: it is another, or missing.
        StorageError: it cannot be noted.
    """
    run = ServerRun(run_folder)
    held = "\n".join(map(fingerprint_of, certificates(read_authority(folder / CA))))
    if chain.authority is None and not run.authority.exists():
        write_durable(run.authority, held.encode())
        return
    expected = chain.authority or run.authority.read_text(encoding="ascii", errors="replace")
    if held == expected:
        return
    waiting = Orders(run).amendment(chain.key)
    with contextlib.suppress(KeyFileError):  # one that cannot take force any more is told of later
        if waiting is not None and chain.amended(waiting)[0].authority == held:
            return
    named = "an amendment in force names" if chain.authority else "the run began with"
    raise CertificateError(
        f"{folder / CA}: authority {held}; expected {expected}, which {named}, and which sites trust alone: put its "
        f"{CA}, {SERVER} and {SERVER_KEY} into {folder}; a change of authority is an amendment: secfacmic keys rotate "
        "--authority at the key maker, then study amend"
    )


def hold_run(agreed: AgreedStudy, state: Path, *, paused: bool) -> int:
    """Let no round of the current run begin, or begin again, whether its coordinator is running or not.

    Args:
        agreed: the study.
        state: the server's state folder.
        paused: whether no round is to begin. If not, a pause is over; without one, the lobby is.

    Returns:
        The round that is due.

    Raises:
        StudyError: no run has begun, or it is over.
        RecordError: the run's journal does not verify.
        StorageError: it cannot be written.
    """
    folder, chain = open_run(agreed, state)
    if paused:
        write_durable(folder.pause, b"")
    elif folder.pause.exists():
        folder.pause.unlink()
    else:
        Orders(folder).hold_in_lobby(False)
    return chain.round + 1


def extend_run(agreed: AgreedStudy, state: Path, rounds: int) -> int:
    """Let the current run have more rounds, whether its coordinator is running or not, and though it is over.

    Args:
        agreed: the study.
        state: the server's state folder.
        rounds: how many in all.

    Returns:
        The last round that has its record now.

    Raises:
        StudyError: no run has begun, or it was ended; it has as many rounds already; or its method has a fixed number.
        RecordError: the run's journal does not verify.
        StorageError: it cannot be written.
    """
    folder, chain = _current_run(agreed, state)
    if agreed.study.method.sums:
        raise StudyError(
            f"{state}: the rounds of {agreed.study.method.adapter} are its method's, {agreed.study.rounds}; expected a "
            "study that trains: begin another study"
        )
    _refuse_ended(folder, chain, state)
    if not chain.rounds < rounds <= MOST_ROUNDS:
        raise StudyError(
            f"{state}: {rounds} rounds, and the run has {chain.rounds}; expected more, {MOST_ROUNDS} at most"
        )
    write_durable(folder.rounds, str(rounds).encode())
    return chain.round


def end_run(agreed: AgreedStudy, state: Path, lost: bool = False) -> int:
    """End the current run before its last round, whether its coordinator is running or not; not to be taken back.

    Args:
        agreed: the study.
        state: the server's state folder.
        lost: for want of sites, which never come back: a round that has a cohort is given up.

    Returns:
        The last round that has its record now; one that has a cohort is closed before the end, unless sites are lost.

    Raises:
        StudyError: no run has begun, or it is over.
        RecordError: the run's journal does not verify.
        StorageError: it cannot be written.
    """
    folder, chain = open_run(agreed, state)
    write_durable(folder.end, LOST if lost else b"")
    return chain.round


def open_run(agreed: AgreedStudy, state: Path) -> tuple[ServerRun, Chain]:
    """The current run, which is not over, and where it stands.

    Raises:
        StudyError: no run has begun, or it is over.
        RecordError: its journal does not verify.
    """
    folder, chain = _current_run(agreed, state)
    if chain.finished:
        raise StudyError(f"{state}: the run is over after {chain.round} rounds; expected one that goes on")
    return folder, chain


def _refuse_ended(folder: ServerRun, chain: Chain, state: Path) -> None:
    if chain.ended or chain.short or folder.end.exists():
        raise StudyError(f"{state}: the run was ended after {chain.round} rounds; expected one that goes on")


def _current_run(agreed: AgreedStudy, state: Path) -> tuple[ServerRun, Chain]:
    folder = ServerState(state)
    run = folder.current_run
    if run is None:
        raise StudyError(f"{state}: no run has begun; expected one")
    chain = Chain(agreed)
    for _ in RecordFolder(folder.run(run).journal).replay(chain):
        pass
    return folder.run(run), chain

"""The server's own process: keeps the SuperLink, and the process of the rounds, running until the study is over.

The rounds run in a process of their own, :mod:`secure_fed.server.rounds_process`, because flwr interrupts a whole
process when its run ends.
"""

from __future__ import annotations

import json
import logging
import resource
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from secure_fed.core.errors import ServerAppError, StudyError
from secure_fed.core.layout import ServerState
from secure_fed.core.processes import settle, start, stop
from secure_fed.core.status import StatusFile
from secure_fed.protocol.packing import wire
from secure_fed.protocol.sealed_key import read_sealed_file
from secure_fed.protocol.share_frames import ENTRY
from secure_fed.protocol.signing import ZERO_DIGEST, load_signing_key
from secure_fed.protocol.study import AgreedStudy, load_study
from secure_fed.protocol.study_tables import Member
from secure_fed.server.byte_store import ByteStore, Incoming, Outgoing
from secure_fed.server.coordinator import Coordinator
from secure_fed.server.flower_link import SuperLink
from secure_fed.server.orders import refuse_other_authority
from secure_fed.transport.flower_messages import contract

log = logging.getLogger(__name__)

MEMBERS_CHANGED = 100
"""Exit status of the rounds' process when sites have joined or left."""

HEADER_BYTES = 64 * 1024
"""Room for the signed header before what a site sends."""

CHECKPOINT_VALUE_BYTES = 32
"""Of a checkpoint, for each value: the adapter's and two moments', in double precision, and room for names."""

FILES, FILES_OF_SITE = 256, 3
"""Open files and connections that the server needs beside the sites' own, and for each site."""

LIMIT = resource.RLIMIT_NOFILE

CRASHES = 5
CRASH_SECONDS = 10.0
"""So many rounds' processes in a row that lived no longer than this: something is wrong that time will not mend."""


@dataclass(frozen=True)
class ServerFolders:
    """What a server works with.

    Attributes:
        study: its ``study.toml``.
        state: folder of the coordinator's key, certificate and journal.
        keep_envelopes: where to keep the envelopes of every sum, if they are to be kept.
    """

    study: Path
    state: Path
    keep_envelopes: Path | None = None

    def coordinator(self, agreed: AgreedStudy) -> Coordinator:
        """The run's coordinator."""
        return Coordinator(agreed, self.state, load_signing_key(ServerState(self.state).key), self.keep_envelopes)

    def bytes_of(self, run: str) -> tuple[Incoming, Outgoing]:
        """The large bytes of a run, from sites and for them."""
        folder = ServerState(self.state).run(run)
        return Incoming(folder.incoming), Outgoing(folder.outgoing)


def serve(
    folders: ServerFolders, mode: str, listen: tuple[str, int], key: Path | None = None, *, lobby: bool = False
) -> None:
    """Serve a study until it is over.

    Args:
        folders: study and state.
        mode: must be the study's, so that nobody serves in plain by oversight.
        listen: host and port for the sites.
        key: a sealed key file with which a run is to begin, if it has not yet.
        lobby: whether the first round waits until every site that trains is ready.

    Raises:
        StudyError: the study has another mode, or no run was begun.
        CertificateError, AddressError: the listener cannot be set up; or the authority is another than the run's.
        ServerAppError: the rounds' process ends again and again.
        SecfacmicError: others, of the rounds.
    """
    agreed = load_study(folders.study)
    if agreed.study.mode != mode:
        raise StudyError(
            f"{folders.study}: mode = {agreed.study.mode!r}, but --mode {mode} was given; the two must agree: a mode "
            "is agreed on by all sites and never changes"
        )
    _begin_if_asked(agreed, folders, key)
    run, keys = _hold(folders, agreed, lobby)
    store = ByteStore(*folders.bytes_of(run), run, lambda site: most_bytes(agreed, site))
    _room_for(agreed.study.max_sites)
    link = SuperLink(ServerState(folders.state).certificates, listen, keys, store)
    study = agreed.study
    facts = {"study": study.name, "study_id": study.id, "rounds": study.rounds, "min_sites": study.min_sites}
    facts |= {"listen": f"[{listen[0]}]:{listen[1]}" if ":" in listen[0] else f"{listen[0]}:{listen[1]}"}
    StatusFile(folders.state).begin("server", **facts, certificate_until=link.certificate_until, restarts=0)
    log.info("study %s, %d rounds, mode %s; listening on %s", study.name, study.rounds, mode, facts["listen"])
    settle()
    try:
        _supervise(link, agreed, folders)
    finally:
        link.stop()


def _room_for(sites: int) -> None:
    """Let this process open as many files as the connections of all sites are: most systems begin with 1,024."""
    wanted = FILES + FILES_OF_SITE * sites
    held, most = (wanted if limit == resource.RLIM_INFINITY else limit for limit in resource.getrlimit(LIMIT))
    if held < wanted:
        resource.setrlimit(LIMIT, (min(wanted, most), resource.getrlimit(LIMIT)[1]))
    if most < wanted:
        log.warning(
            "this machine lets the server open %d files; expected %d for %d sites, or some wait for others: raise its "
            "limit (ulimit -Hn; LimitNOFILE of a service)",
            *(most, wanted, sites),
        )


def most_bytes(agreed: AgreedStudy, site: str) -> int:
    """Most bytes that a site may send at once: an envelope, with pads and its shares; the key maker also the sealed
    adapter and its moments."""
    shares = ENTRY * agreed.study.max_sites if agreed.study.pads else 0
    envelope = wire(agreed.study.mode, agreed.lanes).payload_bytes + HEADER_BYTES + shares
    checkpoint = CHECKPOINT_VALUE_BYTES * agreed.lanes.values + HEADER_BYTES
    return max(envelope, checkpoint) if site == agreed.study.key_maker else envelope


def _begin_if_asked(agreed: AgreedStudy, folders: ServerFolders, key: Path | None) -> None:
    """Begin the study's run, or the next one once a run is over."""
    state = ServerState(folders.state)
    signing = load_signing_key(state.key)
    begun = state.current_run is not None
    key_id = ZERO_DIGEST
    if agreed.study.mode == "he":
        if key is None:
            if not begun:
                raise StudyError(
                    f"{folders.state}: no run has begun; begin one with --key FILE, the sealed key file that the key "
                    f"maker, {agreed.study.key_maker}, makes with: secfacmic keys create"
                )
            return
        header, _ = read_sealed_file(key, agreed)
        if header.previous != ZERO_DIGEST:
            raise StudyError(
                f"{key}: replaces key {header.previous[:16]} in its run, and begins none; expected a key of its own, "
                "made with: secfacmic keys create"
            )
        key_id = header.key
    elif begun:
        return
    if begun:
        coordinator = folders.coordinator(agreed)
        if coordinator.journal.records[0].header.key == key_id:
            return
        if not coordinator.finished:
            raise StudyError(
                f"{key}: not the key of the run that goes on here, which is in round {coordinator.round}; let it end, "
                "or replace its key with: secfacmic keys rotate"
            )
    Coordinator.begin(agreed, folders.state, signing, key_id)


def _hold(folders: ServerFolders, agreed: AgreedStudy, lobby: bool) -> tuple[str, dict[str, str]]:
    """Run and sites' keys. The coordinator is not kept here: it has a sum's memory, and another process has its own."""
    coordinator, state = folders.coordinator(agreed), ServerState(folders.state)
    refuse_other_authority(state.run(coordinator.run).path, coordinator.journal.chain, state.certificates)
    coordinator.hold_in_lobby(lobby)
    return coordinator.run, _flower_keys(coordinator.journal.chain.members)


def _flower_keys(members: Mapping[str, Member]) -> dict[str, str]:
    return {site.name: site.keys.flower for site in members.values()}


def _supervise(link: SuperLink, agreed: AgreedStudy, folders: ServerFolders) -> None:
    """Keep the rounds' process running until it ends by itself."""
    bundle = contract(agreed.study.id)
    crashes = restarts = 0
    while True:
        began = time.monotonic()
        child = start(["-m", "secure_fed.server.rounds_process"], stdin=True)
        try:
            keep = folders.keep_envelopes
            setup = {
                "study": str(folders.study.resolve()),
                "state": str(folders.state.resolve()),
                "keep_envelopes": None if keep is None else str(keep.resolve()),
                "runtime": link.runtime,
                "token": link.start_run(bundle),
                "nodes": link.nodes,
            }
            _hand_over(child, setup)
            while child.poll() is None and link.alive:
                if link.look_after_certificate():
                    StatusFile(folders.state).tell(certificate_until=link.certificate_until)
                time.sleep(0.1)
        finally:
            stop([child])
        if child.returncode == 0:
            return
        if child.returncode == MEMBERS_CHANGED:
            members = folders.coordinator(agreed).journal.chain.members
            link.register(_flower_keys(members))
            log.info("the members are now %s", ", ".join(sorted(members)))
            continue
        if 10 <= child.returncode < 90:
            raise SystemExit(child.returncode)  # a refusal, which it has explained
        crashes = crashes + 1 if time.monotonic() - began < CRASH_SECONDS else 1
        if crashes == CRASHES or not link.alive:
            raise ServerAppError(
                f"the rounds' process ended {crashes} times within {CRASH_SECONDS:g} s, last with {child.returncode}; "
                "expected it to run: free memory, or report it with the log; nothing is lost"
            )
        log.warning("the rounds' process ended with %d; it is started again", child.returncode)
        restarts += 1
        StatusFile(folders.state).tell(restarts=restarts)


def _hand_over(child: subprocess.Popen[bytes], setup: Mapping[str, object]) -> None:
    """By a pipe: command lines and environments can be read by others."""
    assert child.stdin is not None
    try:
        child.stdin.write(json.dumps(setup).encode())
        child.stdin.close()
    except BrokenPipeError:
        pass  # it has ended already; its exit status says why

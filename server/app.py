"""The server: a Flower ServerApp that runs the rounds over a :class:`secure_fed.server.coordinator.Coordinator`, and
the process that keeps it and the SuperLink running.

The rounds run in a process of their own, because flwr interrupts a whole process when its run ends. Whatever is
needed to go on lies in the coordinator's folder: rounds that were killed begin again in a new Flower run and ask the
sites again, which send the bytes that they sent before.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from flwr.app import Context, Message
from flwr.serverapp import Grid, ServerApp

from secure_fed.core.errors import (
    EnvelopeError,
    KeyFileError,
    ProtocolError,
    RecordError,
    SecfacmicError,
    ServerAppError,
    StudyError,
)
from secure_fed.core.processes import die_with_parent, end_on_sigterm, log_lines, start, stop
from secure_fed.core.status import StatusFile, keep_log
from secure_fed.protocol.rounds import ReplyCode, RoundReply, RoundRequest
from secure_fed.protocol.sealed_key import check_sealed_key
from secure_fed.protocol.signing import ZERO_DIGEST, load_signing_key
from secure_fed.protocol.study import AgreedStudy, StudySite, load_study
from secure_fed.server.coordinator import Coordinator, current_run
from secure_fed.server.flower_link import SuperLink, open_grid
from secure_fed.server.journal import JournalEntry
from secure_fed.server.metrics import serve_metrics
from secure_fed.transport.flower_messages import ROUND_MESSAGE, contract, read_reply, request_content

log = logging.getLogger("secure_fed.server.app")  # also in the process where this module is the main one

KEY = "coordinator.key"
CERTIFICATES = "tls"
"""Below the state folder: the coordinator's signing key, and the folder of the server's certificate."""

MIN_TTL = 60.0
LOOK_SECONDS = 1.0
"""How often the list of connected sites is fetched."""

FASTEST, SLOWEST = 0.05, 0.5
"""Pause between two looks for replies: short while they come, longer while nothing happens."""

PATIENCE = 10.0
"""Seconds until a site whose reply could not be used is asked again."""

MEMBERS_CHANGED = 100
"""Exit status of the rounds' process when sites have joined or left."""

CRASHES = 5
CRASH_SECONDS = 10.0
"""So many rounds' processes in a row that lived no longer than this: something is wrong that time will not mend."""


@dataclass
class _Site:
    """What the loop knows of one site."""

    name: str
    node: int
    trains: bool
    since: str = ""  # when it connected; empty while it is not
    asked: str = ""  # id of the message it has not answered yet
    asked_since: str = ""
    run: str = ""
    position: int | None = None  # records it has; None until it says so
    not_before: float = 0.0
    told_the_end: bool = False
    passed: tuple[int, int] = (0, 0)  # round and attempt for which it has no update


@dataclass
class RoundLoop:
    """Asks sites, takes their replies and closes rounds until the study is over.

    Args:
        coordinator: decides what is accepted.
        agreed: the study.
        grid: Flower's.
        nodes: Flower's node ids, by site; the members of the study.
        report: is called with where the study stands, when that has changed.
    """

    coordinator: Coordinator
    agreed: AgreedStudy
    grid: Grid
    nodes: dict[str, int]
    report: Callable[[dict[str, Any]], None] = lambda facts: None
    _sites: list[_Site] = field(init=False)
    _opened: float = field(init=False)
    _absent: set[str] = field(init=False, default_factory=set)
    _told: str = field(init=False, default="")
    _malformed: bool = field(init=False, default=False)
    _looked: float = field(init=False, default=0.0)
    _reported: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        members = self.coordinator.journal.chain.members
        self._sites = [
            _Site(site.name, self.nodes[site.name], site.role == "train")
            for site in members.values()
            if site.name in self.nodes
        ]
        self._opened = time.monotonic()

    def run(self) -> bool:
        """Run the study to its end; every site that is connected then has the last record.

        Returns:
            Whether it has ended; else the members have changed, and the sites must be registered anew.
        """
        pause = FASTEST
        while not self._over():
            if set(self.coordinator.journal.chain.members) != set(self.nodes):
                return False
            moved = self.step()
            pause = FASTEST if moved else min(SLOWEST, pause * 1.1)
            time.sleep(pause)
        self._report()
        return True

    def step(self) -> bool:
        """Look once at sites and replies; whether anything came."""
        self._look()
        moved = self._collect()
        self._close_if_due()
        for site in self._sites:
            self._ask(site)
        if time.monotonic() - self._reported >= LOOK_SECONDS:
            self._report()
        return moved

    def _report(self) -> None:
        self._reported = time.monotonic()
        coordinator = self.coordinator
        rounds = coordinator.rounds
        self.report(
            {
                "run": coordinator.run,
                "round": min(coordinator.round, self.agreed.study.rounds),
                "finished": coordinator.finished,
                "attempt": coordinator.attempt,
                "sites": {
                    site.name: {
                        "role": "train" if site.trains else "observer",
                        "connected": bool(site.since),
                        "in": site.name in coordinator.sites_in,
                    }
                    for site in self._sites
                },
                "waiting": self._told,
                "rounds_closed": len(rounds),
                "bytes_up": sum(entry.bytes_up for entry in rounds),
                "last_round_seconds": (
                    (rounds[-1].header.closed_ms - rounds[-1].header.opened_ms) / 1000 if rounds else None
                ),
            }
        )

    def _look(self) -> None:
        now = time.monotonic()
        if now - self._looked < LOOK_SECONDS:
            return
        self._looked = now
        # A new time means that what the site was asked before is lost.
        online = {node.node_id: node.last_activated_at for node in self.grid.get_nodes()}
        for site in self._sites:
            since = online.get(site.node, "")
            if since != site.since:
                log.info("%s %s", site.name, "connected" if since else "is not connected any more")
                site.not_before = 0.0
            site.since = since
            if since:
                self._absent.discard(site.name)
            if since and site.asked and site.asked_since != since:
                site.asked = ""  # what it was asked went with its connection, if it has not answered before

    # --- asking ---

    def _ask(self, site: _Site) -> None:
        if not site.since or site.asked or time.monotonic() < site.not_before:
            return
        request = self._request(site)
        if request is None:
            return
        left = self.agreed.study.round_seconds - (time.monotonic() - self._opened)
        # Beyond its round a message would only cost the site the training of a round that is over.
        message = Message(
            request_content(request),
            site.node,
            ROUND_MESSAGE,
            ttl=max(MIN_TTL, left),
            group_id=str(request.round),
        )
        (identifier,) = self.grid.push_messages([message])
        site.asked, site.asked_since = identifier, site.since

    def _request(self, site: _Site) -> RoundRequest | None:
        """What the site lacks; None if nothing."""
        coordinator = self.coordinator
        if site.position is None:
            # Where is it? Without an answer it would be sent the whole journal again.
            return RoundRequest(coordinator.round, coordinator.attempt, (), more=True)
        behind = site.run != coordinator.run or site.position < len(coordinator.journal.records)
        if coordinator.finished:
            due = behind or not site.told_the_end
        else:
            due = behind or (site.trains and site.name not in coordinator.sites_in and not self._passes(site))
        return coordinator.request(site.run, site.position) if due else None

    def _passes(self, site: _Site) -> bool:
        return site.passed == (self.coordinator.round, self.coordinator.attempt)

    # --- replies ---

    def _collect(self) -> bool:
        asked = {site.asked: site for site in self._sites if site.asked}
        if not asked:
            return False
        # One call for all sites; the SuperLink hands out one whole reply at a time, since an envelope is large.
        try:
            messages = list(self.grid.pull_messages(list(asked)))
        except httpx.HTTPError:
            raise
        except Exception as error:  # flwr could not put it together; no site may end the study with that
            log.warning("a reply is malformed (%s)", type(error).__name__)
            self._malformed = True
            return False
        moved = False
        for message in messages:
            site = asked[message.metadata.reply_to_message_id]
            site.asked = ""
            if message.has_error() and self._malformed:
                log.warning("%s: its reply was malformed", site.name)
                self._malformed = False
                self._ask_later(site)
                continue
            if message.has_error():
                # Gone, or too late; it is asked again as soon as it is connected.
                site.position = None
                self._looked = 0.0
                continue
            try:
                self._take(site, read_reply(message.content, site.name))
            except (EnvelopeError, ProtocolError, RecordError) as error:
                log.warning("%s: its reply is refused: %s", site.name, error)
                self._ask_later(site)
            moved = True
        return moved

    def _ask_later(self, site: _Site) -> None:
        site.asked = ""
        site.position = None
        site.not_before = time.monotonic() + PATIENCE

    def _take(self, site: _Site, reply: RoundReply) -> None:
        coordinator = self.coordinator
        if reply.code.value.startswith(("failed", "refused-bundle")):
            log.warning("%s: cannot take part: %s; it is asked again", site.name, reply.code)
            self._ask_later(site)
            return
        known = len(coordinator.journal.records)
        if reply.run == coordinator.run and reply.position > known:
            raise ProtocolError(
                f"it has {reply.position} records, the journal here {known}: this state folder is older than the "
                "study; end the server and put the newest one back, or use: secfacmic journal rebuild"
            )
        if reply.run == coordinator.run and reply.position:
            coordinator.receive(reply)
        site.run, site.position = reply.run, reply.position
        if reply.code == ReplyCode.REFUSED_AGGREGATE and reply.position == known:
            if coordinator.journal.records[-1].header.kind == "aggregate":
                log.warning("%s: refuses the aggregate of round %d; it is void", site.name, coordinator.round - 1)
                coordinator.void_round()
                self._open()
        elif reply.code != ReplyCode.MORE and reply.position == known:
            site.told_the_end = coordinator.finished
            if reply.code == ReplyCode.APPLIED and site.trains and not coordinator.journal.chain.awaits_checkpoint:
                # It has the head, was asked for an update and has none to give, now or later.
                site.passed = (coordinator.round, coordinator.attempt)
                if not coordinator.finished:
                    log.warning("%s sends no update any more: it only takes the rounds from now on", site.name)
                    coordinator.require_enough(sum(site.trains and not self._passes(site) for site in self._sites))

    # --- rounds ---

    def _close_if_due(self) -> None:
        coordinator, study = self.coordinator, self.agreed.study
        if coordinator.finished:
            return
        inside = set(coordinator.sites_in)
        missing = {site.name for site in self._sites if site.trains and not self._passes(site)} - inside
        late = time.monotonic() - self._opened >= study.round_seconds
        enough = len(inside) >= study.min_sites
        if enough and (late or not missing - self._absent):
            entry = coordinator.close_round()
            if entry is not None:
                self._closed(entry, missing)
                return
        away = sorted(site.name for site in self._sites if site.name in missing and not site.since)
        if away and (late or not self._busy(missing)):
            until = "until there are min_sites" if late else f"for at most {study.round_seconds:g} s"
            self._tell(
                f"round {coordinator.round}: {len(inside)} sites in, min_sites {study.min_sites}; waiting {until} for "
                f"{', '.join(away)}, not connected"
            )

    def _closed(self, entry: JournalEntry, missing: set[str]) -> None:
        header = entry.header
        if header.kind != "aggregate":
            log.info("%s appended before round %d", header.kind, self.coordinator.round)
            return
        if missing:
            log.warning("round %d goes on without %s", header.round, ", ".join(sorted(missing)))
        # Who is away is not waited for in every round; who is slow is.
        self._absent |= {site.name for site in self._sites if site.name in missing and not site.since}
        log.info(
            "round %d of %d: %d sites in, %.2f MB, %.1f s",
            header.round,
            self.agreed.study.rounds,
            len(entry.sites),
            entry.bytes_up / 1e6,
            (header.closed_ms - header.opened_ms) / 1000,
        )
        self._open()

    def _busy(self, missing: set[str]) -> bool:
        return any(site.since for site in self._sites if site.name in missing)

    def _open(self) -> None:
        self._opened = time.monotonic()
        self._told = ""

    def _tell(self, text: str) -> None:
        if text != self._told:
            log.info("%s", text)
            self._told = text

    def _over(self) -> bool:
        if not self.coordinator.finished:
            return False
        behind = sorted(site.name for site in self._sites if not site.told_the_end)
        if not behind:
            return True
        if time.monotonic() - self._opened >= self.agreed.study.round_seconds:
            log.warning("%s lack the last rounds; start the server again when they can come", ", ".join(behind))
            return True
        away = [site.name for site in self._sites if site.name in behind and not site.since]
        if away:
            self._tell(f"the study is over; waiting for {', '.join(away)}, not connected, to take its last rounds")
        return False


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
        return Coordinator(agreed, self.state, load_signing_key(self.state / KEY), self.keep_envelopes)


def serve(
    folders: ServerFolders, mode: str, listen: tuple[str, int], key: Path | None = None, metrics: int | None = None
) -> None:
    """Serve a study until it is over.

    Args:
        folders: study and state.
        mode: must be the study's, so that nobody serves in plain by oversight.
        listen: host and port for the sites.
        key: a sealed key file with which a run is to begin, if it has not yet.
        metrics: port on loopback for Prometheus, if it is to be served.

    Raises:
        StudyError: the study has another mode, or no run was begun.
        CertificateError, AddressError: the listener cannot be set up.
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
    members = folders.coordinator(agreed).journal.chain.members
    link = SuperLink(folders.state / CERTIFICATES, listen, _flower_keys(members))
    study = agreed.study
    facts = {"study": study.name, "study_id": study.id, "rounds": study.rounds, "min_sites": study.min_sites}
    StatusFile(folders.state).begin("server", **facts, listen=f"{listen[0]}:{listen[1]}", restarts=0)
    if metrics is not None:
        serve_metrics(folders.state, metrics)
    log.info("study %s, %d rounds, mode %s; listening on %s:%d", agreed.study.name, agreed.study.rounds, mode, *listen)
    try:
        _supervise(link, agreed, folders)
    finally:
        link.stop()


def _begin_if_asked(agreed: AgreedStudy, folders: ServerFolders, key: Path | None) -> None:
    """Begin the study's run, or the next one once a run is over."""
    signing = load_signing_key(folders.state / KEY)
    begun = current_run(folders.state) is not None
    key_id = ZERO_DIGEST
    if agreed.study.mode == "he":
        if key is None:
            if not begun:
                raise StudyError(
                    f"{folders.state}: no run has begun; begin one with --key FILE, the sealed key file that the key "
                    f"maker, {agreed.study.key_maker}, makes with: secfacmic keys create"
                )
            return
        try:
            key_id = check_sealed_key(key.read_bytes(), agreed).key
        except OSError as error:
            raise KeyFileError(f"{key}: cannot be read ({error.strerror}); expected a sealed key file") from error
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


def _flower_keys(members: Mapping[str, StudySite]) -> dict[str, str]:
    return {site.name: site.keys.flower for site in members.values() if site.keys is not None}


def _supervise(link: SuperLink, agreed: AgreedStudy, folders: ServerFolders) -> None:
    """Keep the rounds' process running until it ends by itself."""
    bundle = contract(agreed.study.id)
    crashes = restarts = 0
    while True:
        began = time.monotonic()
        child = start(["-m", "secure_fed.server.app"], stdin=True)
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


def main() -> None:
    """The rounds' process: its set-up comes on stdin."""
    die_with_parent()
    end_on_sigterm()
    log_lines()
    setup = json.loads(sys.stdin.read())
    state = Path(setup["state"])
    status = StatusFile(state)
    keep_log(state, "rounds", status)
    app = ServerApp()

    ended = False

    @app.main()
    def rounds(grid: Grid, context: Context) -> None:
        nonlocal ended
        keep = setup["keep_envelopes"]
        folders = ServerFolders(Path(setup["study"]), state, None if keep is None else Path(keep))
        agreed = load_study(folders.study)
        loop = RoundLoop(folders.coordinator(agreed), agreed, grid, setup["nodes"], lambda facts: status.tell(**facts))
        ended = loop.run()

    try:
        with open_grid(setup["runtime"], setup["token"]) as (grid, context):
            app(grid=grid, context=context)
        sys.exit(0 if ended else MEMBERS_CHANGED)
    except SecfacmicError as error:
        log.error("%s", error)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:  # in one line, and started again
        log.error("the rounds failed with %s: %s", type(error).__name__, error)
        sys.exit(1)


if __name__ == "__main__":
    main()

"""The rounds of a study over Flower: sites are asked, their replies go to the
:class:`secure_fed.server.coordinator.Coordinator`, rounds are closed.

Keeps nothing that must survive. Whatever is needed to go on lies in the coordinator's folder: rounds that were killed
begin again in a new Flower run and ask the sites again, which send the bytes that they sent before.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.metadata import version
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid

from secure_fed.core.errors import EnvelopeError, ProtocolError, RecordError, StudyPausedError
from secure_fed.core.status import now
from secure_fed.protocol.journal import JournalEntry
from secure_fed.protocol.presence import PresenceHeader, PresenceQuestion, check_presence
from secure_fed.protocol.rounds import ReplyCode, RoundReply, RoundRequest
from secure_fed.protocol.study import AgreedStudy
from secure_fed.server.byte_store import Incoming, Outgoing
from secure_fed.server.coordinator import Coordinator, Step, paused_text
from secure_fed.server.journal import now_ms
from secure_fed.server.standing import Move, Standing
from secure_fed.transport.flower_messages import ROUND_MESSAGE, read_reply, request_content

log = logging.getLogger(__name__)

MESSAGE_SECONDS = 7 * 86_400.0
"""How long a message counts. The round's deadline is not its business: a site on a slow line that moves on is waited
for, and who is away is asked anew when it is back."""

DOWN_RATE = 2000.0
"""Bytes a second at which a connected site at least takes what it was asked with; it is waited for so long."""

LEAST_RATE = 512.0
"""Bytes a second below which an upload is not taken for one that moves on."""

LOOK_SECONDS = 1.0
"""How often the list of connected sites is fetched."""

FASTEST, SLOWEST = 0.01, 0.1
"""Pause between two looks for replies, each of which waits a moment for one: longer while nothing happens."""

PATIENCE = 10.0
"""Seconds until a site whose reply could not be used is asked again."""


@cache
def _own_version() -> str:
    return version("secfacmic")  # reads the package's files, and each site's state names it every second


@dataclass
class _Site:
    """What the loop knows of one site."""

    name: str
    node: int
    trains: bool
    since: str = ""  # when it connected; empty while it is not
    asked: str = ""  # id of the message it has not answered yet
    asked_since: str = ""
    asked_step: Step | None = None  # what it was asked then, beside the records
    heard: str = ""  # since when it was connected when its envelope came
    dropped: int = 0  # the last round for which it had dropped its update
    run: str = ""
    position: int | None = None  # records it has; None until it says so
    left: float = 0.0  # when its connection was last lost or made
    not_before: float = 0.0
    told_the_end: bool = False
    blind_at: str = ""  # the head at which it says that it has no adapter to acknowledge
    gives_none: tuple[str, int] = ("", 0)  # head and attempt for which it says that it has no update
    refused: tuple[str, int] = ("", 0)  # head and attempt that it has refused, or whose cohort
    passed: tuple[str, int] = ("", 0)  # head and attempt that go on without its update
    asked_at: str = ""  # UTC
    taking_until: float = 0.0  # what it was asked with may be on its way until then
    trouble: str = ""  # why its last reply could not be used
    sent: tuple[int, int] = (0, 0)  # of what it is sending, bytes that are here and in all
    rate: float = 0.0  # bytes a second, lately
    most: int = 0  # bytes that were here in this step, at most
    presence: PresenceHeader | None = None  # its newest word before the first round
    lent: str = ""  # digest of what it sent in a rehearsal and may fetch until it is gone
    clock: float = 0.0  # by how many seconds its clock was ahead then, its way here taken for nothing


@dataclass
class RoundLoop:
    """Asks sites, takes their replies and closes rounds until the study is over.

    Args:
        coordinator: decides what is accepted.
        agreed: the study.
        grid: Flower's.
        nodes: Flower's node ids, by site; the members of the study.
        incoming, outgoing: the large bytes, which travel beside the messages.
        report: is called with where the study stands, about once a second.
    """

    coordinator: Coordinator
    agreed: AgreedStudy
    grid: Grid
    nodes: dict[str, int]
    incoming: Incoming
    outgoing: Outgoing
    report: Callable[[dict[str, Any]], None] = lambda facts: None
    _sites: list[_Site] = field(init=False)
    _opened: float = field(init=False)
    _stepped: float = field(init=False)
    _moved: float = field(init=False, default=0.0)
    _absent: set[str] = field(init=False, default_factory=set)
    _told: str = field(init=False, default="")
    _looked: float = field(init=False, default=0.0)
    _reported: float = field(init=False, default=0.0)
    _told_before: set[str] = field(init=False)  # by the server that was here before, and have not come since

    def __post_init__(self) -> None:
        members = self.coordinator.journal.chain.members
        self._told_before = set(self.coordinator.told_the_end)
        self._sites = [
            _Site(
                site.name,
                self.nodes[site.name],
                site.role == "train",
                told_the_end=site.name in self._told_before,
            )
            for site in members.values()
            if site.name in self.nodes
        ]
        self._opened = self._stepped = time.monotonic()

    def run(self) -> bool:
        """Run the study to its end; every site that is connected then has the last record.

        Returns:
            Whether it has ended; else the members have changed, and the sites must be registered anew.

        Raises:
            NotEnoughSitesError: it has ended for want of sites.
        """
        pause = FASTEST
        while not self._over():
            if set(self.coordinator.journal.chain.members) != set(self.nodes):
                return False
            moved = self.step()
            pause = FASTEST if moved else min(SLOWEST, pause * 1.1)
            time.sleep(pause)
        self._report()
        self.coordinator.journal.chain.refuse_short()
        return True

    def step(self) -> bool:
        """Look once at sites and replies; whether anything came."""
        self._look()
        moved = self._collect()
        self._advance_if_due()
        self._ask_all()
        if time.monotonic() - self._reported >= LOOK_SECONDS:
            self._report()
        return moved

    def _report(self) -> None:
        self._reported = time.monotonic()
        coordinator = self.coordinator
        rounds = coordinator.rounds
        inside, voiding = frozenset(coordinator.sites_in), coordinator.voiding
        facts = {
            "run": coordinator.run,
            "round": min(coordinator.round, coordinator.journal.chain.rounds),
            "rounds": coordinator.journal.chain.rounds,
            "finished": coordinator.finished,
            "attempt": coordinator.attempt,
            "step": coordinator.step.value,
            "sites": {
                site.name: {
                    "role": "train" if site.trains else "observer",
                    "connected": bool(site.since),
                    "in": site.name in inside,
                    "doing": self._doing(site, inside, voiding),
                    "presence": self._presence(site),
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
        self.report(facts)

    def _presence(self, site: _Site) -> dict[str, Any] | None:
        """What a site has said of itself before the first round."""
        said = site.presence
        if said is None or not self.coordinator.before_the_first:
            return None
        return {
            "ready": self._is_ready(site),
            "accepted": said.accepted,
            "keyed": said.keyed,
            "version": said.secfacmic,
            "clock_seconds": round(site.clock, 1),
            "bytes_per_second": said.rate,
        }

    def _is_ready(self, site: _Site) -> bool:
        return bool(site.since) and site.presence is not None and site.presence.keyed

    def _presence_words(self, site: _Site) -> str:
        said = site.presence
        assert said is not None  # asked for those that have said something
        state = "ready" if said.keyed else "there, but without this run's key (secfacmic keys accept)"
        other = "" if said.secfacmic == _own_version() else f", unlike here, {_own_version()}"
        return (
            f"{state}: acceptance {said.accepted[:16]}, clock {site.clock:+.1f} s, version {said.secfacmic}{other}, "
            f"line {said.rate / 1e3:.0f} kB/s"
        )

    def _doing(self, site: _Site, inside: AbstractSet[str], voiding: AbstractSet[str]) -> str:
        """What is known of why a site is in, or is not in yet."""
        held, total = site.sent
        if site.name in voiding:
            return "its people have given the round up"
        if site.name in inside:
            return "in"
        if not site.since:
            return "not connected"
        if site.presence is not None and self.coordinator.before_the_first:
            return self._presence_words(site)
        if total:
            left = f", {(total - held) / site.rate:.0f} s left" if site.rate else ""
            return f"uploading: {held / 1e6:.2f} of {total / 1e6:.2f} MB, {site.rate / 1e3:.1f} kB/s{left}"
        if site.trouble and not site.asked:
            return f"asked again in a moment: {site.trouble}"
        if site.asked:
            asked = self.coordinator.step.value if site.asked_step is not None else "the records"
            return f"asked for {asked} since {site.asked_at}"
        return "has no update for this round" if self._passes(site) else "nothing is asked of it"

    def _look_at_uploads(self, seconds: float) -> None:
        """How far what the sites send has come; while it moves on, the round's deadline moves with it.

        Only what is more than was here before counts, at no less than the least rate: whoever begins again and again,
        or sends a byte now and then, holds nobody up.
        """
        under_way = {upload.site: upload for upload in self.incoming.uploads()}
        asked = self.coordinator.asked
        for site in self._sites:
            upload = under_way.get(site.name)
            if upload is None:
                site.sent, site.rate = (0, 0), 0.0
                continue
            more = upload.held - site.sent[0] if site.sent[1] == upload.total else upload.held
            site.rate = 0.7 * site.rate + 0.3 * max(0, more) / seconds if site.rate else max(0, more) / seconds
            site.sent = upload.held, upload.total
            if upload.held > site.most and site.rate >= LEAST_RATE and site.name in asked:
                self._moved = time.monotonic()
            site.most = max(site.most, upload.held)

    def _late(self) -> bool:
        """Whether nothing has moved in this step for as long as a round may wait, and nobody still takes records."""
        moment = time.monotonic()
        taking = any(site.since and site.asked and moment < site.taking_until for site in self._sites)
        return not taking and moment - max(self._stepped, self._moved) >= self.agreed.study.round_seconds

    def _look(self) -> None:
        moment = time.monotonic()
        if moment - self._looked < LOOK_SECONDS:
            return
        self._look_at_uploads(max(moment - self._looked, LOOK_SECONDS) if self._looked else LOOK_SECONDS)
        self._looked = moment
        # A new time means that what the site was asked before is lost.
        online = {node.node_id: node.last_activated_at for node in self.grid.get_nodes()}
        for site in self._sites:
            since = online.get(site.node, "")
            if since != site.since:
                log.info("%s %s", site.name, "connected" if since else "is not connected any more")
                site.not_before = 0.0
                site.left = moment
                site.position = None  # its people may have said something meanwhile
                self._take_back(site)
            site.since = since
            if since:
                self._absent.discard(site.name)
                if site.name in self._told_before:  # who comes again may have lost that word
                    self._told_before.discard(site.name)
                    site.told_the_end = False
            if since and site.asked and site.asked_since != since:
                site.asked = ""  # what it was asked went with its connection, if it has not answered before

    # --- asking ---

    def _ask_all(self) -> None:
        """Ask each site what it lacks, all in one call: each costs a way to the other process and back."""
        asked = list(self._due_requests())
        if not asked:
            return
        messages, content, before = [], None, None
        for site, request in asked:
            if content is None or request != before:  # most are asked the same
                content, before = request_content(request, self.outgoing.publish), request
            messages.append(
                Message(content, site.node, ROUND_MESSAGE, ttl=MESSAGE_SECONDS, group_id=str(request.round))
            )
        identifiers = self.grid.push_messages(messages)
        for (site, request), identifier in zip(asked, identifiers, strict=True):
            site.asked, site.asked_since, site.asked_at = identifier, site.since, now()
            down = sum(map(len, request.records)) + len(request.question) + len(request.carried)
            site.taking_until = time.monotonic() + down / DOWN_RATE
            site.asked_step = self.coordinator.step if request.attempt and not request.more else None

    def _due_requests(self) -> Iterator[tuple[_Site, RoundRequest]]:
        """Whom to ask now, and what: nobody who is away, has not answered yet, or lacks nothing."""
        moment = time.monotonic()
        due = [site for site in self._sites if site.since and not site.asked and moment >= site.not_before]
        if not due:
            return
        wanted = self._wanted()
        for site in due:
            request = self._request(site, wanted)
            if request is not None:
                yield site, request

    def _request(self, site: _Site, wanted: AbstractSet[str]) -> RoundRequest | None:
        """What the site lacks, or is asked for if it is among those wanted; None if nothing."""
        coordinator = self.coordinator
        if site.position is None:
            # Where is it? Without an answer it would be sent the whole journal again.
            chain, question = coordinator.journal.chain, b""
            if coordinator.before_the_first:
                question = PresenceQuestion(chain.run, chain.key).to_bytes()
            return RoundRequest(coordinator.round, coordinator.attempt, (), more=True, question=question)
        behind = site.run != coordinator.run or site.position != len(coordinator.journal.records)
        due = behind or site.name in wanted
        return coordinator.request(site.name, site.run, site.position) if due else None

    def _wanted(self) -> set[str]:
        """Of whom something is wanted now. What it hangs on is of all sites, and is found once for all of them."""
        coordinator = self.coordinator
        if coordinator.finished:
            return {site.name for site in self._sites if not site.told_the_end}
        step, inside, asked = coordinator.step, frozenset(coordinator.sites_in), coordinator.asked
        if step is Step.ACKNOWLEDGED:
            return {
                site.name for site in self._sites if site.trains and site.name not in inside and not self._blind(site)
            }
        wanted = {site.name for site in self._sites if site.name in asked and not self._passes(site)}
        if step in (Step.ENVELOPE, Step.CHECKED):
            wanted -= inside
            # Who was away: does it still stand by its envelope?
            wanted |= {site.name for site in self._sites if site.name in inside and site.heard != site.since}
        return wanted

    def _blind(self, site: _Site) -> bool:
        """Whether it has just joined, and cannot acknowledge an adapter that it gets with the checkpoint."""
        return site.blind_at == self.coordinator.journal.chain.head

    def _passes(self, site: _Site) -> bool:
        return site.passed == self._attempt

    @property
    def _attempt(self) -> tuple[str, int]:
        """Which it is: a round that was given up begins its attempts anew, after another head."""
        return self.coordinator.journal.chain.head, self.coordinator.attempt

    # --- replies ---

    def _collect(self) -> bool:
        asked = {site.asked: site for site in self._sites if site.asked}
        if not asked:
            return False
        # One call for all sites, which waits a moment for a reply.
        messages = list(self.grid.pull_messages(list(asked)))
        moved = False
        for message in messages:
            site = asked[message.metadata.reply_to_message_id]
            site.asked = ""
            if message.has_error():
                # Gone, or too late; it is asked again as soon as it is connected.
                site.position = None
                self._looked = 0.0
                continue
            try:
                self._take(site, read_reply(message.content, site.name, partial(self.incoming.take, site.name)))
            except (EnvelopeError, ProtocolError, RecordError) as error:
                log.warning("%s: its reply is refused: %s", site.name, error)
                site.trouble = f"its reply was refused ({type(error).__name__})"
                self._ask_later(site)
            self.incoming.drop(site.name)
            moved = True
        if moved and self.coordinator.finished:
            self.coordinator.keep_told([site.name for site in self._sites if site.told_the_end])
        return moved

    def _ask_later(self, site: _Site) -> None:
        site.asked = ""
        site.position = None
        site.not_before = time.monotonic() + PATIENCE

    def _take(self, site: _Site, reply: RoundReply) -> None:
        coordinator = self.coordinator
        known = len(coordinator.journal.records)
        if reply.code == ReplyCode.FAILED_PROTOCOL and site.run == coordinator.run:
            self._refuse_more(site.position or 0, known)  # it knows the head at which the journal here ends
        if reply.code.value.startswith(("failed", "refused-bundle")):
            log.warning("%s: cannot take part: %s; it is asked again", site.name, reply.code)
            site.trouble = f"it says {reply.code}"
            if reply.code == ReplyCode.FAILED_PROTOCOL and site.asked_step in (Step.READY, Step.ENVELOPE, Step.CHECKED):
                site.refused = self._attempt
            self._ask_later(site)
            return
        if reply.code == ReplyCode.PRESENT:
            self._take_presence(site, reply)
            return
        if reply.run == coordinator.run and reply.position > known:
            if site.position is None:
                site.run, site.position = reply.run, reply.position
                return  # a void may have taken the place of some: it is told at which head the journal here is
            self._refuse_more(reply.position, known)
        if reply.run == coordinator.run and reply.position:
            coordinator.receive(reply)
        site.run, site.position, site.trouble = reply.run, reply.position, ""
        if reply.code == ReplyCode.REFUSED_AGGREGATE and reply.position == known:
            log.error("%s: finds the sum of round %d out of range", site.name, coordinator.round - 1)
            self._ask_later(site)
            site.position = reply.position
            if coordinator.paused:
                raise StudyPausedError(paused_text(coordinator))
        elif reply.code == ReplyCode.VOID:
            pass
        elif reply.code == ReplyCode.SITS_OUT or (
            reply.code == ReplyCode.RETIRED and site.asked_step in (Step.ENVELOPE, Step.CHECKED, Step.REVEAL)
        ):
            if reply.code == ReplyCode.SITS_OUT:
                log.warning("%s: was put back to an older state, and sits round %d out", site.name, coordinator.round)
            if site.asked_step in (Step.ENVELOPE, Step.CHECKED) and coordinator.fail([site.name]):
                self._step_taken()
            else:
                self._ask_later(site)
                site.position = reply.position
        elif reply.code in (ReplyCode.UPDATE, ReplyCode.CHECKED):
            site.heard, site.refused = site.asked_since, ("", 0)
        elif reply.code == ReplyCode.APPLIED and site.asked_step in (Step.ENVELOPE, Step.CHECKED):
            self._begin_again(site)
        elif reply.code == ReplyCode.APPLIED and site.asked_step is Step.ACKNOWLEDGED:
            if reply.position == known:
                site.blind_at = coordinator.journal.chain.head
        elif (reply.code == ReplyCode.APPLIED and site.asked_step is Step.REVEAL) or (
            reply.code == ReplyCode.READY and site.asked_step in (Step.ENVELOPE, Step.CHECKED, Step.REVEAL)
        ):
            self._ask_later(site)
            site.position = reply.position
        elif reply.code != ReplyCode.MORE and reply.position == known:
            site.told_the_end = coordinator.finished
            if reply.code == ReplyCode.APPLIED and site.trains and site.asked_step is Step.READY:
                # It has the head, was asked for an update and says that it has none to give.
                site.gives_none = self._attempt
                if not coordinator.finished:
                    self._pass(site)
            elif reply.code == ReplyCode.READY:
                site.gives_none = ("", 0)

    def _refuse_more(self, held: int, known: int) -> None:
        """Refuse to go on with a journal that is older than a site's."""
        if held > known:
            raise ProtocolError(
                f"it has {held} records, the journal here {known}: this state folder is older than the study; end the "
                "server and put the newest one back, or use: secfacmic journal rebuild"
            )

    def _take_presence(self, site: _Site, reply: RoundReply) -> None:
        chain = self.coordinator.journal.chain
        said = check_presence(reply.envelope, self.agreed, chain.members, chain.run)
        if said.site != site.name:
            raise EnvelopeError(f"a presence of {said.site} in a reply of {site.name}")
        if said.purpose == "rehearsal":
            self._take_back(site)
            site.lent = self.outgoing.lend(self.incoming.take(site.name, said.rehearsed, said.rehearsed_bytes))
            log.info("%s: rehearses, and leaves then: %.0f kB/s", site.name, said.rate / 1e3)
            self._ask_later(site)
            return
        site.presence, site.clock = said, (said.clock_ms - now_ms()) / 1000
        site.run, site.position, site.trouble = (
            chain.run,
            min(reply.position, len(self.coordinator.journal.records)),
            "",
        )
        log.info("%s: %s", site.name, self._presence_words(site))
        if not said.keyed:
            self._ask_later(site)  # a genesis that it cannot follow would end it

    def _take_back(self, site: _Site) -> None:
        if site.lent:
            self.outgoing.take_back(site.lent)
            site.lent = ""

    def _wait_in_lobby(self) -> None:
        """Begin when every site that trains is ready."""
        training = [site for site in self._sites if site.trains]
        missing = [site.name for site in training if not self._is_ready(site)]
        if not missing:
            log.info("all %d sites that train are ready", len(training))
            self.coordinator.hold_in_lobby(False)
            return
        needed = self.coordinator.journal.chain.quorum.needed
        self._tell(
            f"lobby: {len(training) - len(missing)} of {len(training)} sites are ready, quorum {needed}; waiting for "
            f"{', '.join(missing)}; begin without them: secfacmic study resume"
        )

    def _pass(self, site: _Site) -> None:
        """Go on without a site that gives no update.

        The study ends if too few are left, but not at the words of so few that all of them may lie.
        """
        without = sorted(each.name for each in self._sites if each.trains and each.gives_none == self._attempt)
        able = sum(each.trains for each in self._sites) - len(without)
        quorum = self.coordinator.journal.chain.quorum
        if able < quorum.needed and len(without) <= quorum.faulty:
            log.error(
                "round %d: %s says that it has no update to give, and without it there are %d sites, quorum %d; a "
                "single site's word ends no study: it is asked again; if it is true, end the server",
                *(self.coordinator.round, ", ".join(without), able, quorum.needed),
            )
            self._ask_later(site)
            return
        site.passed = self._attempt
        log.warning("%s sends no update any more: it only takes the rounds from now on", site.name)
        self.coordinator.require_enough(able)

    def _begin_again(self, site: _Site) -> None:
        """A site has dropped its update, as its people must be able to: another attempt; the second time without it."""
        again = site.dropped == self.coordinator.round
        site.dropped = self.coordinator.round
        log.warning("%s: has dropped its update; another attempt%s", site.name, " without it" if again else "")
        if self.coordinator.fail([site.name] if again else []):
            self._step_taken()
        else:
            self._ask_later(site)

    # --- rounds ---

    def _advance_if_due(self) -> None:
        """Take the round's next step when all whom it needs have answered, or at the deadline when enough have."""
        coordinator = self.coordinator
        if coordinator.given_up:
            self._close()
            self._open()
        elif coordinator.finished:
            return
        elif coordinator.ends_now or (coordinator.step is Step.READY and coordinator.extends_now):
            self._close()
        elif coordinator.resting:
            self._stepped = time.monotonic()  # a pause is no site's fault
            if coordinator.in_lobby:
                self._wait_in_lobby()
                return
            self._tell(f"round {coordinator.round} does not begin: paused (secfacmic study pause, study resume)")
        else:
            standing = self._standing()
            if not any(self._make(move, standing) for move in standing.moves()):
                self._tell_waiting(standing)

    def _close(self) -> None:
        entry = self.coordinator.advance()
        assert entry is not None
        self._closed(entry)

    def _standing(self) -> Standing:
        """How the open step stands now."""
        coordinator, late = self.coordinator, self._late()
        asked = coordinator.asked  # nobody whose people have given the round up, or let it retire
        if coordinator.step in (Step.READY, Step.ACKNOWLEDGED):
            missing = {
                site.name
                for site in self._sites
                if site.name in asked and not self._passes(site) and not self._blind(site)
            }
            all_count = coordinator.step is Step.READY and self._just_a_quorum
            refusing = self._refusing & missing if coordinator.step is Step.READY else set()
            known_away = set() if all_count else self._absent
            return Standing(coordinator.step, missing, late, known_away=known_away, refusing=refusing)
        inside = set(coordinator.sites_in)
        return Standing(
            coordinator.step,
            asked,
            late,
            away=self._gone(inside | asked),
            leaving=coordinator.leaving,
            refusing=self._refusing,
            all_there=self._all_there(inside),
        )

    @property
    def _refusing(self) -> set[str]:
        """Who has refused this attempt, or its cohort."""
        return {site.name for site in self._sites if site.refused == self._attempt}

    def _make(self, move: Move, standing: Standing) -> bool:
        """Try a move; whether the round stands elsewhere now."""
        coordinator = self.coordinator
        gone = ", ".join(sorted(standing.gone))
        if move is Move.STEP:
            return self._take_step(standing)
        if move is Move.SPEAK_FOR:
            if coordinator.recover(standing.gone):
                log.warning("round %d: the others speak for %s", coordinator.round, gone)
            return False
        if standing.step in (Step.READY, Step.ACKNOWLEDGED):
            return self._ask_anew(standing)
        if not coordinator.fail(standing.gone if move is Move.WITHOUT else []):
            return False
        if move is Move.WITHOUT:
            log.warning("round %d: another attempt, without %s", coordinator.round, gone)
        else:
            # What the people of those that refuse the cohort say now is in their next READYs.
            lacking = ", ".join(sorted(standing.lacking))
            log.warning("round %d: too few without %s: all are asked anew", coordinator.round, lacking)
        self._step_taken()
        return True

    def _ask_anew(self, standing: Standing) -> bool:
        """Ask for another attempt, which those who refuse this one may not have left behind; whether it was begun."""
        if not self.coordinator.ask_anew():
            return False
        log.warning(
            "round %d: %s have answered what the state here does not know, as if it was older than the study: all are "
            "asked anew, for attempt %d; if that goes on, end the server and put the newest state back, or use: "
            "secfacmic journal rebuild",
            *(self.coordinator.round, ", ".join(sorted(standing.refusing)), self.coordinator.attempt),
        )
        self._step_taken()
        return True

    def _take_step(self, standing: Standing) -> bool:
        """Take the next step with those who are in, if they are enough; whether they were."""
        entry = self.coordinator.advance()
        if entry is not None:
            self._closed(entry)
            return True
        if self.coordinator.step is standing.step:
            return False
        if standing.missing:
            missing = ", ".join(sorted(standing.missing))
            log.warning("round %d goes on without %s", self.coordinator.round, missing)
        # Who is away is not waited for in every round; who is slow is.
        self._absent |= {site.name for site in self._sites if site.name in standing.missing and not site.since}
        self._step_taken()
        return True

    @property
    def _just_a_quorum(self) -> bool:
        """Whether with pads no more are ready than must stay to the end: such a round can miss nobody once its sum is
        fixed, and is begun only when the deadline is over, also without those who are known to be away."""
        ready, needed = len(self.coordinator.sites_in), self.coordinator.journal.chain.quorum.needed
        return self.agreed.study.pads and ready <= needed

    def _gone(self, names: AbstractSet[str]) -> set[str]:
        """Which of these have not been connected for a while; who only starts anew keeps its place."""
        moment = time.monotonic()
        return {
            site.name for site in self._sites if site.name in names and not site.since and moment > site.left + PATIENCE
        }

    def _all_there(self, names: AbstractSet[str]) -> bool:
        return all(site.since and site.heard == site.since for site in self._sites if site.name in names)

    def _tell_waiting(self, standing: Standing) -> None:
        missing, late = standing.missing, standing.late
        if standing.step is Step.ACKNOWLEDGED and self._tell_amendment(missing):
            return
        if self.coordinator.voiding and not missing:
            self._tell(
                f"round {self.coordinator.round}: people gave it up at {', '.join(sorted(self.coordinator.voiding))}, "
                "and it cannot be closed without them; it begins anew once a quorum's people have: secfacmic site void"
            )
            return
        away = sorted(site.name for site in self._sites if site.name in missing and not site.since)
        if not away or not (late or not self._busy(missing)):
            return
        needed, seconds = self.coordinator.journal.chain.quorum.needed, self.agreed.study.round_seconds
        if standing.step is Step.REVEAL:
            until = "until they are back: the sum is fixed, and only they can reveal it;"
        else:
            until = "until there are enough" if late else f"for at most {seconds:g} s"
        self._tell(
            f"round {self.coordinator.round}: {len(self.coordinator.sites_in)} sites in, quorum {needed}; "
            f"waiting {until} for {', '.join(away)}, not connected"
        )

    def _tell_amendment(self, missing: AbstractSet[str]) -> bool:
        """Say whose amendment the study waits at, where not only for who is away; whether that was said."""
        against, maker = self.coordinator.against_key_maker, self.agreed.study.key_maker
        refusing = sorted(
            f"{site.name} ({site.trouble})" for site in self._sites if site.name in missing and site.trouble
        )
        if against:
            why = f"it acknowledges another adapter than {', '.join(against)} hold: it is damaged or lies"
        elif refusing:
            why = f"it waits for {', '.join(refusing)}"
        else:
            return False
        self._tell(
            f"the amendment that {maker} sealed is not in force: {why}; nothing follows before; compare by phone, "
            "or, if it never comes right, end the run: secfacmic study end --lost"
        )
        return True

    def _closed(self, entry: JournalEntry) -> None:
        header = entry.header
        self._step_taken()
        members = self.coordinator.journal.chain.members
        for site in self._sites:
            site.trains = site.name in members and members[site.name].role == "train"
        if header.kind != "aggregate":
            log.info("%s appended before round %d", header.kind, self.coordinator.round)
            for site in self._sites:
                site.told_the_end = False  # an extension can come after the last round
            return
        log.info(
            "round %d of %d: %d sites in, %.2f MB, %.1f s",
            header.round,
            self.coordinator.journal.chain.rounds,
            len(entry.sites),
            entry.bytes_up / 1e6,
            (header.closed_ms - header.opened_ms) / 1000,
        )
        self._open()

    def _busy(self, missing: AbstractSet[str]) -> bool:
        return any(site.since for site in self._sites if site.name in missing)

    def _open(self) -> None:
        self._opened = self._stepped = time.monotonic()
        self._told = ""

    def _step_taken(self) -> None:
        self._stepped = time.monotonic()
        self._told = ""
        for site in self._sites:
            site.most = 0

    def _tell(self, text: str) -> None:
        if text != self._told:
            log.info("%s", text)
            self._told = text

    def _over(self) -> bool:
        if not self.coordinator.finished:
            return False
        behind = sorted(site.name for site in self._sites if not site.told_the_end)
        if not behind:
            # Those who were told before this server was started may have lost that word with their connection.
            return not self._told_before or time.monotonic() - self._opened >= PATIENCE
        if self._late():
            log.warning("%s lack the last rounds; start the server again when they can come", ", ".join(behind))
            return True
        away = [site.name for site in self._sites if site.name in behind and not site.since]
        if away:
            self._tell(f"the study is over; waiting for {', '.join(away)}, not connected, to take its last rounds")
        return False

"""Random schedules of what a lying server and one lying or restored site can do, and of crashes: the rules hold.

The server here is no coordinator: it keeps every word that any site ever signed, and puts together and shows to whom it
likes whatever these words allow. Sites are the real ones; only their training is drawn at random, anew each time.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from secure_fed.clients.budget import ledger_folder
from secure_fed.clients.replica import Replica
from secure_fed.clients.site import Site
from secure_fed.clients.sitefile import SiteFile, SitePrivacy, read_site_file
from secure_fed.core.errors import (
    AggregateRefused,
    EnvelopeError,
    KeyFileError,
    ProtocolError,
    RecordError,
    SecfacmicError,
)
from secure_fed.core.tomlfile import read_toml, write_toml
from secure_fed.lab.simulation import prepare
from secure_fed.privacy.ckks import Cipher
from secure_fed.privacy.keys import create_identity, create_sealed_key, load_identity, open_sealed_key
from secure_fed.privacy.ledger import Ledger
from secure_fed.protocol import codec
from secure_fed.protocol.envelope import MAGIC, MAX_HEADER, EnvelopeHeader, seal_envelope
from secure_fed.protocol.ledger_heads import NO_LEDGER
from secure_fed.protocol.packing import Binding, PlainSealer, Sealed
from secure_fed.protocol.pads import PadPlace, SitePads, new_private, pad, public_of, without_masks
from secure_fed.protocol.records import Chain, Record, new_header, sign_record
from secure_fed.protocol.residues import pack_residues, unpack_residues
from secure_fed.protocol.round_frames import (
    ARRIVED_MAGIC,
    REVEAL_MAGIC,
    VOID_MAGIC,
    ReadyHeader,
    Revealed,
    SignedWord,
    arrived_digest,
    arrived_header,
    check_reveal,
    fresh_keys,
    products,
    sign_cohort,
    sign_ready,
    sign_retired,
    sign_reveal,
    sign_void,
    split_word,
)
from secure_fed.protocol.rounds import ReplyCode, RoundReply, RoundRequest
from secure_fed.protocol.sealed_key import ACKNOWLEDGEMENT_MAGIC, check_sealed_key
from secure_fed.protocol.share_frames import (
    CHECKED_MAGIC,
    WITNESS_MAGIC,
    Witness,
    Witnessed,
    at_places,
    check_digest,
    check_witness,
    deal,
    hand_out,
    open_handed,
    places,
    share_points,
    sign_check,
    sign_checked,
    sign_gone,
    sign_witness,
    take_handed,
)
from secure_fed.protocol.shares import combine
from secure_fed.protocol.signing import parse_header, sign_frame, split_frame
from secure_fed.protocol.study import load_study
from secure_fed.protocol.study_tables import Member
from secure_fed.server.coordinator import Coordinator, Step
from tests.conftest import TRAINING, Federation, make_template

NAMES = (*TRAINING, "dogwood")
FAULTY = "dogwood"
SUBSETS = [{name for place, name in enumerate(NAMES) if chosen >> place & 1} for chosen in range(1, 16)]
LARGE = [names for names in SUBSETS if len(names) >= 3]


@dataclass
class Shown:
    """A COHORT or ARRIVED that was made, and what came for it."""

    head: str
    attempt: int
    names: tuple[str, ...]
    data: bytes
    digest: str
    cohort: str
    readies: tuple[SignedWord, ...]
    payload: bytes = b""
    words: dict[str, SignedWord] = field(default_factory=dict)
    payloads: dict[str, bytes] = field(default_factory=dict)
    reveals: dict[str, Revealed] = field(default_factory=dict)
    shares: dict[str, bytes] = field(default_factory=dict)
    checked: bytes = b""
    masks: dict[str, str] = field(default_factory=dict)
    points: dict[str, dict[int, bytes]] = field(default_factory=dict)
    witnesses: dict[str, dict[tuple[str, ...], str]] = field(default_factory=dict)
    """Signatures of each one's words, by whom they are for."""


class LyingServer(RuleBasedStateMachine):
    """One study of four sites, of which three are honest; a quorum is three."""

    prepared: Path

    @initialize(faulty=st.sampled_from(["lies", "is restored"]))
    def begin(self, faulty: str) -> None:
        self.start(faulty == "lies")

    def start(self, lies: bool, key: str = "0" * 64) -> None:
        self.folder = Path(tempfile.mkdtemp(dir=self.prepared.parent))
        shutil.copytree(self.prepared, self.folder / "out", symlinks=True)
        self.federation = Federation(self.folder / "out")
        self.agreed, self.lies = self.federation.agreed, lies
        self.sites = {name: self.federation.site(name) for name in NAMES}
        self.key = self.federation.signing
        coordinator = Coordinator.begin(self.agreed, self.folder / "out/server", self.key, key)
        genesis = coordinator.journal.read(0)
        chain = Chain(self.agreed)
        chain.advance(chain.check(genesis))
        self.genesis = chain.head
        self.chains: dict[str, Chain] = {chain.head: chain}
        self.way: dict[str, tuple[bytes, ...]] = {chain.head: (genesis,)}
        self.made: dict[str, list[Record]] = {}  # complete records, by the head that they follow
        self.state = {chain.head: chain.head}  # of which sum the adapter at a head is the result
        self.begun = {chain.head: chain.head}  # with which record the round that is due at a head began
        self.readies: dict[tuple[str, int], dict[str, SignedWord]] = {}
        self.cohorts: list[Shown] = []
        self.sums: list[Shown] = []
        self.voids: dict[str, dict[str, SignedWord]] = {}
        self.revealed: dict[tuple[str, str], set[str]] = {}
        self.releases: dict[tuple[str, str], int] = {}  # how often a site's people have said so at an adapter
        self.stored: Path | None = None

    def teardown(self) -> None:
        shutil.rmtree(getattr(self, "folder", ""), ignore_errors=True)

    # --- what the server does ---

    @property
    def heads(self) -> list[str]:
        return list(self.chains)

    def signing(self, name: str) -> Any:
        return load_identity(self.federation.folder / "sites" / name / "identity", name).signing

    def ask(self, name: str, head: str, attempt: int = 0, question: bytes = b"", carried: bytes = b"") -> Any:
        """A request at a head, with all that leads there; None if the site refuses."""
        due = self.chains[head].due
        request = RoundRequest(due.round, attempt, self.way[head], more=False, question=question, carried=carried)
        try:
            reply = self.sites[name].respond(request)
        except SecfacmicError:
            return None
        if reply.code == ReplyCode.VOID:
            word = split_word(VOID_MAGIC, reply.envelope)
            at = self.sites[name].replica.due.head
            self.voids.setdefault(at, {})[name] = word
        return reply

    def ready(self, name: str, head: str, attempt: int) -> None:
        due = self.chains[head].due
        if name == FAULTY and self.lies:
            data = sign_ready(self.agreed, due, attempt, name, True, self.signing(name))
        else:
            reply = self.ask(name, head, attempt)
            if reply is None or reply.code != ReplyCode.READY:
                return
            data = reply.envelope
        self.readies.setdefault((head, attempt), {})[name] = split_word(data[:4], data)

    def choose(self, names: set[str], head: str, attempt: int) -> Shown | None:
        words = self.readies.get((head, attempt), {})
        chosen = tuple(sorted(names & set(words)))
        if not chosen:
            return None
        readies = tuple(words[name] for name in chosen)
        data = sign_cohort(self.agreed, self.chains[head].due, attempt, readies, self.key)
        digest = split_frame(data[:4], data, 1 << 20, EnvelopeError).digest
        shown = Shown(head, attempt, chosen, data, digest, digest, readies)
        self.cohorts.append(shown)
        return shown

    def envelope(self, name: str, shown: Shown) -> None:
        chain = self.chains[shown.head]
        if name == FAULTY and self.lies:
            due = chain.due
            binding = Binding(run=due.run, head=due.head, round=due.round)
            integers = np.random.default_rng().integers(-9, 9, self.agreed.layout(due.round).lanes.values)
            sealed = PlainSealer(self.agreed.layout(due.round).lanes).seal(integers, binding, name)
            data = seal_envelope(
                self.agreed, due, sealed, NO_LEDGER, self.signing(name), attempt=shown.attempt, cohort=shown.digest
            )
            dealt = b""
        else:
            reply = self.ask(name, shown.head, shown.attempt, shown.data)
            if reply is None or reply.code != ReplyCode.UPDATE:
                return
            data, dealt = reply.envelope, reply.carried
        self.take_envelope(name, shown, data, dealt)

    def take_envelope(self, name: str, shown: Shown, data: bytes, dealt: bytes) -> None:
        frame = split_frame(MAGIC, data, MAX_HEADER, EnvelopeError)
        shown.shares[name] = dealt
        shown.words[name] = SignedWord.of(frame.header, frame.signature)
        shown.payloads[name] = bytes(frame.payload)

    def fix(self, shown: Shown, bent: bool) -> Shown | None:
        if set(shown.words) != set(shown.names):
            return None
        wire = self.chains[shown.head].wire
        total = wire.zero()
        for name in shown.names[bent:]:
            total = wire.add(total, shown.payloads[name])
        payload = wire.record(total, len(shown.names))
        words = tuple(shown.words[name] for name in shown.names)
        facts = len(payload), hashlib.sha256(payload).hexdigest()
        due = self.chains[shown.head].due
        header = arrived_header(self.agreed, due, shown.attempt, shown.digest, facts, words)
        data = sign_frame(ARRIVED_MAGIC, header, self.key, b"")
        found = replace(shown, data=data, digest=arrived_digest(header), payload=payload, reveals={}, witnesses={})
        found.words, found.payloads = dict(shown.words), dict(shown.payloads)
        self.sums.append(found)
        return found

    def reveal(self, name: str, shown: Shown) -> None:
        if name == FAULTY and self.lies:
            check = self.chains[shown.head].wire.check_words(shown.digest, shown.payloads[name])
            data = sign_reveal(self.agreed, shown.digest, name, check, self.signing(name))
        else:
            reply = self.ask(name, shown.head, shown.attempt, shown.data, shown.checked)
            if reply is None or reply.code != ReplyCode.REVEALED:
                return
            data = reply.envelope
            self.revealed.setdefault((name, self.begun[shown.head]), set()).add(shown.digest)
        self.take_reveal(name, shown, data)

    def take_reveal(self, name: str, shown: Shown, data: bytes) -> None:
        word = split_word(REVEAL_MAGIC, data)
        header = check_reveal(word, self.agreed, self.chains[shown.head].members, shown.digest)
        shown.reveals[name] = Revealed(*header.check, word.signature)
        if header.mask is not None:
            shown.masks[name] = header.mask

    def append(
        self, head: str, kind: Any, words: tuple[SignedWord, ...], shown: Shown | None = None, payload: bytes = b"",
        **more: Any,
    ) -> str | None:  # fmt: skip
        chain = self.chains[head]
        if shown is not None:
            more["reveals"] = tuple(shown.reveals[name] for name in shown.names if name in shown.reveals)
            payload = shown.payload
        fields: dict[str, Any] = {"run": chain.run, "key": chain.key, "round_number": chain.round + 1} | more
        header = new_header(chain, kind, contributors=words, times_ms=(1, 2), payload=payload, **fields)
        data = sign_record(header, payload, self.key)
        try:
            record = chain.check(data)
        except RecordError:
            return None
        if record.id not in self.chains:
            self.made.setdefault(head, []).append(record)
            self.chains[record.id] = chain.after(record)
            self.way[record.id] = (*self.way[head], data)
            self.state[record.id] = record.id if kind == "aggregate" else self.state[head]
            goes_on = kind in ("retired", "amendment", "checkpoint")
            self.begun[record.id] = self.begun[head] if goes_on else record.id
        return record.id

    def play(self, head: str, attempt: int, names: set[str], steps: int, bent: bool = False) -> str | None:
        """A round with these sites as far as so many steps go."""
        if self.chains[head].finished:
            return None
        for name in sorted(names):
            self.ready(name, head, attempt)
        shown = self.choose(names, head, attempt) if steps > 0 else None
        for name in shown.names if shown and steps > 1 else ():
            self.envelope(name, shown)  # type: ignore[arg-type]
        total = self.fix(shown, bent) if shown and steps > 2 else None
        for name in total.names[: steps - 3] if total else ():
            self.reveal(name, total)  # type: ignore[arg-type]
        return self.close(total) if total else None

    def close(self, total: Shown) -> str | None:
        if set(total.reveals) != set(total.names):
            return None
        return self.append(total.head, "aggregate", tuple(total.words[name] for name in total.names), total)

    # --- the schedule ---

    @rule(place=st.integers(0, 9), attempt=st.integers(1, 3), names=st.sampled_from(LARGE), steps=st.integers(2, 7))
    def rounds(self, place: int, attempt: int, names: set[str], steps: int) -> None:
        self.play(self.heads[-1 - place % len(self.heads)], attempt, names, steps)

    @rule(attempt=st.integers(1, 3), names=st.sampled_from(LARGE))
    def whole_round(self, attempt: int, names: set[str]) -> None:
        self.play(self.heads[-1], attempt, names, 9)

    @rule(place=st.integers(0, 3), attempt=st.integers(1, 3), names=st.sampled_from(SUBSETS))
    def bent_round(self, place: int, attempt: int, names: set[str]) -> None:
        assert self.play(self.heads[-1 - place % len(self.heads)], attempt, names, 9, bent=True) is None

    @rule(place=st.integers(0, 5), name=st.sampled_from(NAMES))
    def another_reveal(self, place: int, name: str) -> None:
        if self.sums:
            total = self.sums[-1 - place % len(self.sums)]
            if name in total.names:
                self.reveal(name, total)
                self.close(total)

    @rule(place=st.integers(0, 9), name=st.sampled_from(NAMES))
    def show(self, place: int, name: str) -> None:
        self.ask(name, self.heads[-1 - place % len(self.heads)])

    @rule(names=st.sampled_from(SUBSETS), back=st.integers(0, 1), shown=st.booleans())
    def give_up(self, names: set[str], back: int, shown: bool) -> None:
        """People of these sites give the open round up, or that of the last record; all may be shown what follows."""
        for name in sorted(names - ({FAULTY} if self.lies else set())):
            site = self.sites[name]
            if site.run:
                try:
                    site.void(max(1, site.round + 1 - back))
                except SecfacmicError:
                    continue
                self.ask(name, self.genesis)
        for head in self.heads:
            if self.lies and not self.chains[head].finished:
                data = sign_void(self.agreed, self.chains[head].due, FAULTY, False, self.signing(FAULTY))
                self.voids.setdefault(head, {})[FAULTY] = split_word(VOID_MAGIC, data)
            words = self.voids.get(head, {})
            self.append(head, "void", tuple(words[name] for name in sorted(words)))
        for name in NAMES if shown else ():
            self.ask(name, self.heads[-1])

    @rule(first=st.sampled_from(LARGE), second=st.sampled_from(LARGE), back=st.integers(0, 1))
    def another_round_after_a_void(self, first: set[str], second: set[str], back: int) -> None:
        """A sum, whose record is kept back, is given up by everybody's people, and another asked for."""
        self.play(self.heads[-1], 1, first, 9)
        self.give_up(set(NAMES), back, True)
        self.play(self.heads[-1], 1, second, 9)

    @rule(names=st.sampled_from(SUBSETS))
    def release(self, names: set[str]) -> None:
        """People of these sites let them reveal to others at the adapter that they hold."""
        for name in sorted(names - ({FAULTY} if self.lies else set())):
            site = self.sites[name]
            if site.run:
                site.release()
                at = name, self.state[site.replica.state.chain.head]
                self.releases[at] = self.releases.get(at, 0) + 1

    @rule(first=st.sampled_from(LARGE), second=st.sampled_from(LARGE), names=st.sampled_from(SUBSETS))
    def another_cohort_by_release(self, first: set[str], second: set[str], names: set[str]) -> None:
        """The same, where people of some let it be: their words are for one other cohort, and not for a third."""
        self.another_round_after_a_void(first, second, 0)
        self.release(names)
        self.play(self.heads[-1], 2, second, 9)
        self.give_up(set(NAMES), 0, True)
        self.play(self.heads[-1], 1, first, 9)

    @rule(name=st.sampled_from(NAMES), place=st.integers(0, 2))
    def retire(self, name: str, place: int) -> None:
        """People of a site let it train no more; the server puts that where it likes, and shows it to whom it likes."""
        head = self.heads[-1 - place % len(self.heads)]
        if name == FAULTY and self.lies:
            data = sign_retired(self.agreed, self.chains[head].run, name, self.signing(name))
        else:
            with contextlib.suppress(SecfacmicError):
                self.sites[name].retire()
            reply = self.ask(name, head)
            if reply is None or reply.code != ReplyCode.RETIRED:
                return
            data = reply.envelope
        self.append(head, "retired", (split_word(data[:4], data),))

    @rule(name=st.sampled_from(NAMES))
    def crash(self, name: str) -> None:
        self.sites[name] = self.federation.site(name)

    @rule()
    def restore(self) -> None:
        """The disk of the one faulty site is kept, or put back."""
        if self.lies:
            return
        disk = self.federation.folder / "sites" / FAULTY / "state"
        if self.stored is None:
            self.stored = self.folder / "older"
            shutil.copytree(disk, self.stored)
        else:
            shutil.rmtree(disk)
            shutil.copytree(self.stored, disk)
            self.sites[FAULTY] = self.federation.site(FAULTY)

    # --- what holds ---

    @invariant()
    def an_honest_site_reveals_once_a_round(self) -> None:
        assert all(len(found) == 1 for (name, _), found in self.revealed.items() if name != FAULTY)

    @invariant()
    def one_sum_a_round_and_none_upon_one_that_a_void_can_take_back(self) -> None:
        rounds: dict[str, list[Record]] = {}
        for head, made in self.made.items():
            rounds.setdefault(self.begun[head], []).extend(made)
        for made in rounds.values():
            sums = [record for record in made if record.header.kind == "aggregate"]
            assert len(sums) <= 1
            if any(record.header.kind == "void" for record in made):
                assert not any(record.header.kind == "aggregate" for one in sums for record in rounds.get(one.id, []))

    @invariant()
    def sums_at_one_adapter_are_of_the_same_sites(self) -> None:
        self.refuse_differences(
            (head, frozenset(entry.site for entry in record.contributors) - {FAULTY})
            for head, made in self.made.items()
            for record in made
            if record.header.kind == "aggregate"
        )

    def refuse_differences(self, sums: Iterable[tuple[str, frozenset[str]]]) -> None:
        """Of these sums, after a head and over these honest sites, two at one adapter are of the same, or the people of
        all that are in either have let it be, or had let it leave; and as often as there are more than one."""
        found: dict[str, dict[frozenset[str], str]] = {}
        for head, honest in sums:
            assert len(honest) >= 2
            found.setdefault(self.state[head], {})[honest] = head
        for state, cohorts in found.items():
            for one, other in itertools.combinations(cohorts, 2):
                spoke = {name for name in one | other if (name, state) in self.releases}
                members = [self.chains[cohorts[which]].members for which in (one, other)]
                left = {name for name in one | other if not all(_trains(each, name) for each in members)}
                if self.agreed.study.mode == "plain":  # whose server sees each update
                    assert one <= spoke or other <= spoke
                else:
                    assert one | other <= spoke | left
            for name in NAMES:
                assert sum(name in names for names in cohorts) <= 1 + self.releases.get((name, state), 0)

    @invariant()
    def honest_sites_at_one_head_hold_one_adapter(self) -> None:
        held: dict[str, set[str]] = {}
        for name, site in self.sites.items():
            state = site.replica.state
            if name != FAULTY and name in state.chain.members and not state.blind:  # else it knows that it holds none
                held.setdefault(state.chain.head, set()).add(site.adapter_digest)
        assert all(len(found) == 1 for found in held.values())

    @invariant()
    def an_honest_site_opens_one_sum_a_head(self) -> None:
        assert all(len(found) == 1 for (folder, _), found in OPENED.items() if f"/{FAULTY}/" not in folder)


class OneLiar(RuleBasedStateMachine):
    """An honest coordinator, three honest sites and one that answers as it likes, or whose disk is put back."""

    prepared: Path

    @initialize()
    def begin(self) -> None:
        self.start("0" * 64)

    def start(self, key_id: str) -> None:
        self.folder = Path(tempfile.mkdtemp(dir=self.prepared.parent))
        shutil.copytree(self.prepared, self.folder / "out", symlinks=True)
        self.federation = Federation(self.folder / "out")
        self.sites = {name: self.federation.site(name) for name in NAMES}
        folder, key = self.folder / "out/server", self.federation.signing
        self.coordinator = Coordinator.begin(self.federation.agreed, folder, key, key_id)
        self.said: list[RoundReply] = []

    def ask(self, name: str) -> None:
        site = self.sites[name]
        try:
            reply = site.respond(self.coordinator.request(name, site.run, site.position))
        except SecfacmicError:
            return
        if name == FAULTY:
            self.said.append(reply)
        self.take(reply)

    def take(self, reply: RoundReply) -> None:
        """As the rounds do: any other error would end the server."""
        with contextlib.suppress(EnvelopeError, ProtocolError, RecordError):
            self.coordinator.receive(reply)

    @rule(name=st.sampled_from(NAMES))
    def exchange(self, name: str) -> None:
        self.ask(name)

    @rule()
    def all_exchange(self) -> None:
        for name in NAMES:
            self.ask(name)
        self.coordinator.advance()

    @rule()
    def advance(self) -> None:
        self.coordinator.advance()

    @rule()
    def fail(self) -> None:
        self.coordinator.fail([FAULTY])

    @rule(place=st.integers(0, 5), code=st.sampled_from(list(ReplyCode)), flip=st.integers(0, 40))
    def lie(self, place: int, code: ReplyCode, flip: int) -> None:
        """It says again what it said, as something else, or with a bit changed."""
        if self.said:
            reply = self.said[-1 - place % len(self.said)]
            data = bytearray(reply.envelope)
            if data and flip < 8:
                data[flip * len(data) // 8] ^= 1 << flip
            self.take(replace(reply, code=code, envelope=bytes(data), attestation="7" * 64))

    @rule(first=st.integers(0, 9))
    def reveal_wrong(self, first: int) -> None:
        arrived, site = self.coordinator._arrived, self.sites[FAULTY]
        if arrived is not None and site.run:
            key = site.replica.identity.signing
            data = sign_reveal(self.federation.agreed, arrived.digest, FAULTY, (first, 1), key)
            self.take(RoundReply(FAULTY, ReplyCode.REVEALED, site.run, site.position, "", data))

    @rule(word=st.sampled_from(["void", "retire"]))
    def leave(self, word: str) -> None:
        site = self.sites[FAULTY]
        with contextlib.suppress(SecfacmicError):
            site.retire() if word == "retire" else site.void(site.round + 1)
            self.ask(FAULTY)

    @rule(name=st.sampled_from(NAMES))
    def crash(self, name: str) -> None:
        self.sites[name] = self.federation.site(name)

    @rule()
    def server_crashes(self) -> None:
        self.coordinator = self.federation.reopen()

    @invariant()
    def honest_sites_have_the_servers_records(self) -> None:
        ids = [entry.id for entry in self.coordinator.journal.records] if hasattr(self, "coordinator") else []
        for name in TRAINING if ids else ():
            chain = self.sites[name].replica.state.chain
            assert not chain.length or chain.head == ids[chain.length - 1]

    def teardown(self) -> None:
        """With all honest sites up and the other one gone, the round closes, or waits for that one alone."""
        try:
            if hasattr(self, "coordinator"):
                self.closes()
        finally:
            shutil.rmtree(getattr(self, "folder", ""), ignore_errors=True)

    def closes(self) -> None:
        coordinator = self.coordinator
        sums = len(coordinator.rounds)
        for _ in range(12):
            for name in TRAINING:
                self.ask(name)
            if coordinator.finished or len(coordinator.rounds) > sums:
                return
            waiting = set() if coordinator._cohort is None else set(coordinator._cohort.names) - {*coordinator.sites_in}
            if coordinator.step is Step.REVEAL and self.stuck_but_for_the_liar(waiting):
                return
            if coordinator.step in (Step.ENVELOPE, Step.CHECKED) and waiting | coordinator.leaving == {FAULTY}:
                # As the loop does: without it, or, where a quorum had been ready alone, with whoever is ready now.
                assert coordinator.fail([FAULTY]) or coordinator.fail([])
            coordinator.advance()
        raise AssertionError(f"step {coordinator.step}, in {coordinator.sites_in}, asked {coordinator.asked}")

    def stuck_but_for_the_liar(self, waiting: set[str]) -> bool:
        return waiting == {FAULTY}


def _trains(members: Mapping[str, Member], name: str) -> bool:
    return name in members and members[name].role == "train"


OPENED: dict[tuple[str, str], set[bytes]] = {}
"""Which sums were opened, by the site's folder and the head before."""


def _drawn(self: Site) -> Any:
    """Training in no time, and never the same twice: a site that trained again where it must not would show."""
    rng = np.random.default_rng()
    size = codec.flatten(self.replica.state.iterate).size
    return self._quantise(rng.normal(0, 0.01, size), rng.random(size))


# --- budgets ---


class WithABudget(LyingServer):
    """The same, where ash has a budget: it may be summed with whom the server likes, and pays for each adapter once."""

    PAYS = "ash"

    @initialize(faulty=st.sampled_from(["lies", "is restored"]))
    def begin(self, faulty: str) -> None:
        self.start(faulty == "lies")
        self.asked_at: set[str] = set()
        self.spent = 0.0

    def ready(self, name: str, head: str, attempt: int) -> None:
        super().ready(name, head, attempt)
        if name == self.PAYS and name in self.readies.get((head, attempt), {}):
            self.asked_at.add(self.sites[name].replica.state.digest)

    @invariant()
    def sums_at_one_adapter_are_of_the_same_sites(self) -> None:
        """Each site without a budget gives what it made at an adapter to one cohort, and to one more at its people's
        word."""
        cohorts: dict[tuple[str, str], set[tuple[str, ...]]] = {}
        for head, made in self.made.items():
            for record in made:
                names = tuple(entry.site for entry in record.contributors)
                assert not names or len({*names} - {FAULTY}) >= 2
                for name in {*names} - {FAULTY, self.PAYS}:
                    cohorts.setdefault((self.state[head], name), set()).add(names)
        for (state, name), found in cohorts.items():
            assert len(found) <= 1 + self.releases.get((name, state), 0)

    @invariant()
    def an_adapter_is_paid_for_once_and_what_was_drawn_is_sent_again(self) -> None:
        file = read_site_file(self.federation.folder / "sites" / self.PAYS / "site.toml")
        ledger = Ledger(ledger_folder(file)) if Ledger.exists(ledger_folder(file)) else None
        if ledger is not None:
            assert len([event for event in ledger.events if event.purpose.startswith("round")]) <= len(self.asked_at)
            assert self.spent <= ledger.epsilon_spent <= ledger.account.epsilon
            self.spent = ledger.epsilon_spent
        sent: dict[str, set[bytes]] = {}
        for shown in self.cohorts:
            if self.PAYS in shown.payloads:
                sent.setdefault(self.state[shown.head], set()).add(shown.payloads[self.PAYS])
        assert all(len(found) == 1 for found in sent.values())


# --- pads: the server and one site together; members come and go ---

NEWCOMER = "elm"


class ServerAndSite(LyingServer):
    """The server and dogwood lie together, with the study's key, all that either ever heard, and dogwood's own pads.

    Who else trains changes by amendments, which the server puts where it likes.
    """

    @initialize()
    def begin(self) -> None:
        sealed = (self.prepared / "first.sealed").read_bytes()
        self.start(True, check_sealed_key(sealed, load_study(self.prepared / "study.toml")).key)
        self.secrets: dict[str, Any] = {}
        self.keep(sealed)
        self.amendments: dict[str, bytes] = {}
        self.private: dict[tuple[str, int], bytes] = {}
        self.answers: dict[str, set[str]] = {}

    def keep(self, sealed: bytes) -> None:
        identity = load_identity(self.federation.folder / "sites" / FAULTY / "identity", FAULTY)
        with contextlib.suppress(KeyFileError):  # it has left
            self.secrets[check_sealed_key(sealed, self.agreed).key] = open_sealed_key(sealed, self.agreed, identity)

    def ready(self, name: str, head: str, attempt: int) -> None:
        if name != FAULTY:
            super().ready(name, head, attempt)
            return
        private = self.private.setdefault((head, attempt), new_private())
        due = self.chains[head].due
        data = sign_ready(self.agreed, due, attempt, name, True, self.signing(name), public_of(private))
        self.readies.setdefault((head, attempt), {})[name] = split_word(data[:4], data)

    def pads(self, shown: Shown) -> tuple[PadPlace, SitePads]:
        """What dogwood computes in a cohort."""
        place = PadPlace(self.agreed.study.id, self.chains[shown.head].due, shown.attempt, shown.cohort)
        keys = fresh_keys(parse_header(word.signed[0], ReadyHeader, EnvelopeError) for word in shown.readies)
        return place, SitePads(place, keys, FAULTY, self.private[shown.head, shown.attempt])

    def cipher(self, head: str) -> Cipher:
        chain = self.chains[head]
        return Cipher(self.agreed.layout(chain.due.round).lanes, self.secrets[chain.key])

    def envelope(self, name: str, shown: Shown) -> None:
        if name != FAULTY:
            super().envelope(name, shown)
            return
        due = self.chains[shown.head].due
        lanes = self.agreed.layout(due.round).lanes
        mine, mask = self.pads(shown)[1], secrets.token_bytes(32)
        dealt = deal(mine, mask, self.chains[shown.head].quorum.needed)
        binding = Binding(run=due.run, head=due.head, round=due.round)
        integers = np.random.default_rng().integers(-9, 9, lanes.values)
        sealed = self.cipher(shown.head).seal(integers, binding, name)
        residues = mine.masked(unpack_residues(sealed.payload, lanes.modulus_bits), mask, lanes.modulus)
        data = seal_envelope(
            self.agreed, due, Sealed(sealed.contribution, pack_residues(residues, lanes.modulus_bits)), NO_LEDGER,
            self.signing(name), attempt=shown.attempt, cohort=shown.digest, hidden=dealt.hidden,
        )  # fmt: skip
        self.take_envelope(name, shown, data, dealt.entries)
        shown.masks[name] = mask.hex()

    def handed(self, shown: Shown, maker: str, receiver: str) -> bytes:
        header = parse_header(shown.words[maker].signed[0], EnvelopeHeader, EnvelopeError)
        points = share_points(shown.names, maker)
        root = header.hidden.shares if header.hidden else ""
        return hand_out(shown.shares[maker], root, len(points))[list(points).index(receiver)]

    def check(self, shown: Shown) -> None:
        """Everybody's CHECKED of these envelopes."""
        chain = self.chains[shown.head]
        if len(shown.names) <= chain.quorum.needed or set(shown.words) != set(shown.names):
            return
        words = [shown.words[name] for name in shown.names]
        data = sign_check(self.agreed, chain.due, shown.attempt, shown.digest, words, self.key)
        digest, signatures = check_digest(self.agreed, chain.due, shown.attempt, shown.digest, words), []
        for name in shown.names:
            if name == FAULTY:
                word = sign_checked(self.agreed, digest, name, [], self.signing(name))
            else:
                carried = b"".join(self.handed(shown, maker, name) for maker in shown.names if maker != name)
                reply = self.ask(name, shown.head, shown.attempt, data, carried)
                if reply is None or reply.code != ReplyCode.CHECKED:
                    return
                word = reply.envelope
            signatures.append(bytes.fromhex(split_word(CHECKED_MAGIC, word).signature))
        shown.checked = b"".join(signatures)

    def reveal(self, name: str, shown: Shown) -> None:
        if name != FAULTY:
            super().reveal(name, shown)
            return
        check = self.chains[shown.head].wire.check_words(shown.digest, shown.payloads[name])
        self.take_reveal(
            name, shown, sign_reveal(self.agreed, shown.digest, name, check, self.signing(name), shown.masks[name])
        )

    def play(self, head: str, attempt: int, names: set[str], steps: int, bent: bool = False) -> str | None:
        here = self.chains[head].members
        names = {name for name in names | {NEWCOMER} if name in here and here[name].role == "train"}
        return super().play(head, attempt, names, steps, bent)

    def fix(self, shown: Shown, bent: bool) -> Shown | None:
        self.check(shown)
        return super().fix(shown, bent)

    def close(self, total: Shown) -> str | None:
        chain, missing = self.chains[total.head], [name for name in total.names if name not in total.reveals]
        if any(name not in total.masks for name in missing):
            return None
        witnessed = []
        for name in missing:
            check = chain.wire.check_words(total.digest, total.payloads[name])
            witnessed.append(Witnessed(name, *products(check)))
        witnesses = []
        for name, words in sorted(total.witnesses.items()):
            gone = max(words, key=lambda names: len({*names} & {*missing}))
            if name in total.reveals and {*gone} & {*missing}:
                witnesses.append(Witness(name, places(total.names, gone), words[gone]))
        return self.append(
            total.head, "aggregate", tuple(total.words[name] for name in total.names), total,
            masks=tuple(total.masks[name] for name in total.names), witnessed=tuple(witnessed),
            witnesses=tuple(witnesses),
        )  # fmt: skip

    @rule(attempt=st.integers(1, 3), gone=st.sampled_from(NAMES))
    def round_with_one_gone(self, attempt: int, gone: str) -> None:
        """All but one reveal, and speak for that one."""
        self.play(self.heads[-1], attempt, set(NAMES), 3)
        if self.sums and gone in self.sums[-1].names:
            total = self.sums[-1]
            for name in total.names:
                if name != gone:
                    self.reveal(name, total)
            self.speak_for(total, gone, {*total.names})

    @rule(place=st.integers(0, 5), askers=st.sampled_from(SUBSETS))
    def shares_of_all(self, place: int, askers: set[str]) -> None:
        """Shares of all of a sum's sites are asked of some, who need not have revealed; dogwood gives its own."""
        if self.sums:
            total = self.sums[-1 - place % len(self.sums)]
            for gone in total.names:
                self.speak_for(total, gone, askers | {FAULTY})

    def speak_for(self, total: Shown, gone: str, askers: set[str]) -> None:
        if not total.shares.get(gone):
            return
        chain = self.chains[total.head]
        question = sign_gone(self.agreed, chain.due, total.attempt, total.digest, gone, self.key)
        for name in sorted({*total.names} & askers - {gone}):
            if name == FAULTY:
                handed = take_handed(self.handed(total, gone, name), total.names, [gone], name, self.roots(total))[0]
                share = open_handed(self.pads(total)[1], gone, handed[gone])
                before = {gone}.union(*total.witnesses.get(name, {()}))
                checks = {one: chain.wire.check_words(total.digest, total.payloads[one]) for one in before}
                word = sign_witness(self.agreed, total.digest, name, total.names, checks, self.signing(name))
            else:
                carried = self.handed(total, gone, name) + total.payloads[gone]
                reply = self.ask(name, total.head, total.attempt, question, carried)
                if reply is None or reply.code != ReplyCode.WITNESSED:
                    continue
                word, share = reply.envelope, reply.carried
            said = split_word(WITNESS_MAGIC, word)
            header = check_witness(said, self.agreed, chain.members, total.digest)
            spoken = at_places(header.gone, total.names)
            assert gone in spoken
            total.witnesses.setdefault(name, {})[spoken] = said.signature
            total.points.setdefault(gone, {})[share_points(total.names, gone)[name]] = share
        points = total.points.get(gone, {})
        if len(points) >= chain.quorum.needed:
            total.masks[gone] = combine(dict(list(points.items())[: chain.quorum.needed])).hex()
        self.close(total)

    def roots(self, shown: Shown) -> dict[str, str]:
        headers = (parse_header(word.signed[0], EnvelopeHeader, EnvelopeError) for word in shown.words.values())
        return {header.site: header.hidden.shares for header in headers if header.hidden is not None}

    @rule(askers=st.sampled_from(SUBSETS), names=st.sampled_from(LARGE))
    def another_attempt_after_shares(self, askers: set[str], names: set[str]) -> None:
        """Shares of all are asked for before anybody has revealed, and then another attempt made."""
        head = self.heads[-1]
        self.play(head, 1, set(NAMES), 3)
        self.shares_of_all(0, askers)
        self.play(head, 2, names, 9)

    @rule(names=st.sampled_from(LARGE), what=st.sampled_from(["join", "leave birch", "stay"]))
    def amend_within_a_round(self, names: set[str], what: str) -> None:
        """A sum is asked for before and after an amendment."""
        head = self.heads[-1]
        self.play(head, 1, names, 9)
        amended = self.amend_at(head, what)
        if amended is not None:
            self.play(amended, 1, names, 9)

    @rule(place=st.integers(0, 3), what=st.sampled_from(["join", "leave birch", "leave dogwood", "leave elm", "stay"]))
    def amend(self, place: int, what: str) -> None:
        """The key maker's people make one key to follow each; the server says where, and to whom it shows it."""
        self.amend_at(self.heads[-1 - place % len(self.heads)], what)

    def amend_at(self, head: str, what: str) -> str | None:
        chain = self.chains[head]
        if chain.awaits_checkpoint or chain.finished:
            return None
        if chain.key not in self.amendments:
            folder, maker = self.federation.folder / "sites", self.agreed.study.key_maker
            changes: dict[str, Any] = {}
            if what == "join" and NEWCOMER not in chain.members:
                keys = load_identity(folder / NEWCOMER / "identity", NEWCOMER).keys
                changes = {"added": (Member(name=NEWCOMER, keys=keys),)}
            elif what.startswith("leave") and what.split()[1] in chain.members:
                changes = {"removed": (what.split()[1],)}
            epoch = len(self.amendments) + 2
            with contextlib.suppress(KeyFileError):
                identity = load_identity(folder / maker / "identity", maker)
                sealed = create_sealed_key(self.agreed, identity, epoch, chain.key, chain.members, **changes)
                self.amendments[chain.key] = sealed
                self.keep(sealed)
                if "added" in changes:
                    (folder / NEWCOMER / "state/keys").mkdir(parents=True, exist_ok=True)
                    (folder / NEWCOMER / f"state/keys/{epoch:06}.sealed").write_bytes(sealed)
                    self.sites[NEWCOMER] = self.federation.site(NEWCOMER)
        sealed = self.amendments.get(chain.key, b"")
        if sealed:
            key = check_sealed_key(sealed, self.agreed).key
            amended = self.append(head, "amendment", (), payload=sealed, key=key)
            if amended is not None:
                return self.acknowledge(amended)
        return None

    def acknowledge(self, head: str) -> str | None:
        words, payload = [], b""
        for name in sorted(self.chains[head].members):
            reply = self.ask(name, head)
            if reply is not None and reply.code == ReplyCode.ACKNOWLEDGED:
                frame = split_frame(ACKNOWLEDGEMENT_MAGIC, reply.envelope, MAX_HEADER, RecordError)
                words.append(SignedWord.of(frame.header, frame.signature))
                payload = payload or bytes(frame.payload)
        return self.append(head, "checkpoint", tuple(words), payload=payload)

    def opened(self) -> Iterator[tuple[str, str, frozenset[str]]]:
        """Head before, cohort and honest sites of each sum that the two can open: they have all its masks."""
        for total in self.sums:
            honest = frozenset(total.names) - {FAULTY}
            if honest and honest <= set(total.masks):
                yield total.head, total.cohort, honest

    @invariant()
    def the_two_hold_one_sum_of_at_least_two_other_sites_at_an_adapter(self) -> None:
        self.refuse_differences((head, honest) for head, _, honest in self.opened())
        cohorts: dict[str, set[str]] = {}
        for head, cohort, _ in self.opened():
            cohorts.setdefault(self.begun[head], set()).add(cohort)
        assert all(len(found) == 1 for found in cohorts.values())

    def teardown(self) -> None:
        try:
            for total in getattr(self, "sums", [])[-3:]:
                self.try_to_open(total)
        finally:
            super().teardown()

    def try_to_open(self, total: Shown) -> None:
        """With all they have the two open each set of a sum's other sites, or do not, as the rules say."""
        due, honest = self.chains[total.head].due, sorted({*total.names} - {FAULTY})
        if self.chains[total.head].key not in self.secrets or FAULTY not in total.names:
            return
        lanes, (place, mine) = self.agreed.layout(due.round).lanes, self.pads(total)
        binding = Binding(run=due.run, head=due.head, round=due.round)
        for chosen in range(1, 2 ** len(honest)):
            names = [name for at, name in enumerate(honest) if chosen >> at & 1]
            left = np.zeros(lanes.coefficients, np.uint64)
            for name in names:
                left = (left + unpack_residues(total.payloads[name], lanes.modulus_bits)) % np.uint64(lanes.modulus)
                known = pad(mine.pad_key(name), left.size, lanes.modulus)
                left = (left + (np.uint64(lanes.modulus) - known if name < FAULTY else known)) % np.uint64(
                    lanes.modulus
                )
            seeds = {name: bytes.fromhex(total.masks[name]) for name in names if name in total.masks}
            bare = pack_residues(without_masks(left, place, seeds, lanes.modulus), lanes.modulus_bits)
            headers = [parse_header(total.words[name].signed[0], EnvelopeHeader, EnvelopeError) for name in names]
            try:
                self.cipher(total.head).open(bare, binding, [header.contribution for header in headers])
                found = True
            except AggregateRefused:
                found = False
            assert found == (names == honest and set(honest) <= set(total.masks)), names


class PaddedLiar(OneLiar):
    """An honest coordinator and one liar, with pads, whose people rotate the key or remove the liar."""

    @initialize()
    def begin(self) -> None:
        sealed = (self.prepared / "first.sealed").read_bytes()
        self.start(check_sealed_key(sealed, load_study(self.prepared / "study.toml")).key)

    @rule(removed=st.sampled_from([(), (FAULTY,)]))
    def amend(self, removed: tuple[str, ...]) -> None:
        maker = self.sites[self.federation.agreed.study.key_maker].replica
        chain = maker.state.chain
        with contextlib.suppress(SecfacmicError):
            epoch = maker.keys.newest[0] + 1
            self.coordinator.amend(self.federation.seal_key(epoch, chain.key, members=chain.members, removed=removed))

    def stuck_but_for_the_liar(self, waiting: set[str]) -> bool:
        """Others speak for it, unless the cohort is just a quorum."""
        coordinator = self.coordinator
        assert coordinator._cohort is not None
        if waiting == {FAULTY} and len(coordinator._cohort.names) > coordinator.journal.chain.quorum.needed:
            coordinator.recover([FAULTY])
            return False
        return waiting == {FAULTY}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Training in no time; and what is opened is noted."""
    monkeypatch.setattr(Site, "_train", _drawn)
    read = Replica._read

    def opens(self: Replica, state: Any, record: Record) -> Any:
        found = read(self, state, record)
        if record.header.kind == "aggregate" and found is not None:
            OPENED.setdefault((str(self.files.folder.path), state.chain.head), set()).add(record.payload)
        return found

    monkeypatch.setattr(Replica, "_read", opens)
    yield
    OPENED.clear()


def prepared_study(folder: Path, images: Path, **changes: Any) -> Path:
    settings = {"sites": [{"name": name} for name in NAMES], "min_sites": 3, "rounds": 4} | changes
    prepare(make_template(**settings), folder, images)
    return folder


@pytest.fixture
def study(tmp_path: Path, images: Path, drawn: None) -> Path:
    return prepared_study(tmp_path / "out", images, mode="plain")


@pytest.fixture
def study_with_a_budget(tmp_path: Path, images: Path, drawn: None, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Its code is tried elsewhere."""
    changes = {"method": {"adapter": "text_head"}, "privacy": {"steps": 2}}
    folder = prepared_study(tmp_path / "out", images, mode="plain", **changes)
    path = folder / "sites" / WithABudget.PAYS / "site.toml"
    Federation(folder).site(WithABudget.PAYS).features()
    file = read_toml(path, SiteFile, SecfacmicError)
    budget = SitePrivacy(epsilon=8.0, delta=1e-5, n_ref=20, run_epsilon=8.0)
    write_toml(path, file.model_copy(update={"privacy": budget}))
    monkeypatch.setattr("secure_fed.clients.learner.rehearse", lambda *_: None)
    monkeypatch.setattr("secure_fed.clients.private_round.check_training", lambda *_, **__: None)
    return folder


@pytest.fixture
def padded_study(tmp_path: Path, images: Path, drawn: None) -> Path:
    """With pads, the first key, and the folder of a hospital that may join."""
    folder = prepared_study(tmp_path / "out", images, collusion=1, max_sites=8)
    for path in folder.glob("sites/*/site.toml"):
        path.write_text(path.read_text().replace('amendments = "removals"', 'amendments = "all"'))
    shutil.copytree(folder / "sites/birch", folder / "sites" / NEWCOMER)
    shutil.rmtree(folder / "sites" / NEWCOMER / "identity")
    create_identity(folder / "sites" / NEWCOMER / "identity", NEWCOMER)
    path = folder / "sites" / NEWCOMER / "site.toml"
    path.write_text(path.read_text().replace('"birch"', f'"{NEWCOMER}"'))
    federation = Federation(folder)
    sealed = federation.seal_key(1)
    for name in NAMES:
        federation.site(name).replica.keys.accept(sealed)
    (folder / "first.sealed").write_bytes(sealed)
    return folder


def run_schedules(
    machine: type[RuleBasedStateMachine], study: Path, count: int, steps: int, number: int | None = None
) -> None:
    machine = type("Schedule", (machine,), {"prepared": study})
    checks = list(HealthCheck)
    run_state_machine_as_test(
        machine if number is None else seed(number)(machine),
        settings=settings(
            max_examples=count, stateful_step_count=steps, deadline=None, suppress_health_check=checks, database=None
        ),
    )


def test_no_schedule_of_a_lying_server_and_a_faulty_site_breaks_a_rule(study: Path) -> None:
    run_schedules(LyingServer, study, 50, 8)


def test_no_schedule_makes_a_budget_pay_twice_for_an_adapter(study_with_a_budget: Path) -> None:
    run_schedules(WithABudget, study_with_a_budget, 8, 8)


def test_no_schedule_opens_more_to_a_server_and_a_site_together_than_one_sum(padded_study: Path) -> None:
    run_schedules(ServerAndSite, padded_study, 12, 8)


def test_a_round_closes_whatever_one_site_says_or_waits_for_that_one(study: Path) -> None:
    run_schedules(OneLiar, study, 26, 12)


def test_a_round_with_pads_closes_whatever_one_site_says(padded_study: Path) -> None:
    run_schedules(PaddedLiar, padded_study, 4, 12)


@pytest.mark.slow
@pytest.mark.parametrize("piece", range(10))
def test_no_long_schedule_breaks_a_rule(study: Path, piece: int) -> None:
    """By hand, with the next two: 2,000 of the longest in all, each piece from another seed."""
    run_schedules(LyingServer, study, 70, 16, piece)
    run_schedules(OneLiar, study, 50, 25, piece)


@pytest.mark.slow
@pytest.mark.parametrize("piece", range(10))
def test_no_long_schedule_with_pads_breaks_a_rule(padded_study: Path, piece: int) -> None:
    run_schedules(ServerAndSite, padded_study, 40, 16, piece)
    run_schedules(PaddedLiar, padded_study, 20, 25, piece)


@pytest.mark.slow
@pytest.mark.parametrize("piece", range(10))
def test_no_long_schedule_with_a_budget_breaks_a_rule(study_with_a_budget: Path, piece: int) -> None:
    run_schedules(WithABudget, study_with_a_budget, 20, 16, piece)

"""Random schedules of what a lying server and one lying or restored site can do, and of crashes: the rules hold.

The server here is no coordinator: it keeps every word that any site ever signed, and puts together and shows to whom it
likes whatever these words allow. Sites are the real ones; only their training is drawn at random, anew each time.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from secure_fed.clients.replica import Replica
from secure_fed.clients.site import Site
from secure_fed.core.errors import EnvelopeError, RecordError, SecfacmicError
from secure_fed.lab.simulation import prepare
from secure_fed.privacy.keys import load_identity
from secure_fed.protocol import codec
from secure_fed.protocol.envelope import MAGIC, MAX_HEADER, seal_envelope
from secure_fed.protocol.ledger_heads import NO_LEDGER
from secure_fed.protocol.packing import Binding, PlainSealer
from secure_fed.protocol.records import Chain, Record, new_header, sign_record
from secure_fed.protocol.round_frames import (
    ARRIVED_MAGIC,
    REVEAL_MAGIC,
    VOID_MAGIC,
    Revealed,
    SignedWord,
    arrived_digest,
    arrived_header,
    check_reveal,
    sign_cohort,
    sign_ready,
    sign_retired,
    sign_reveal,
    sign_void,
    split_word,
)
from secure_fed.protocol.rounds import ReplyCode, RoundReply, RoundRequest
from secure_fed.protocol.signing import sign_frame, split_frame
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
    payload: bytes = b""
    words: dict[str, SignedWord] = field(default_factory=dict)
    payloads: dict[str, bytes] = field(default_factory=dict)
    reveals: dict[str, Revealed] = field(default_factory=dict)


class LyingServer(RuleBasedStateMachine):
    """One study of four sites, of which three are honest; a quorum is three."""

    prepared: Path

    @initialize(faulty=st.sampled_from(["lies", "is restored"]))
    def begin(self, faulty: str) -> None:
        self.folder = Path(tempfile.mkdtemp(dir=self.prepared.parent))
        shutil.copytree(self.prepared, self.folder / "out", symlinks=True)
        self.federation = Federation(self.folder / "out")
        self.agreed, self.lies = self.federation.agreed, faulty == "lies"
        self.sites = {name: self.federation.site(name) for name in NAMES}
        self.key = self.federation.signing
        coordinator = Coordinator.begin(self.agreed, self.folder / "out/server", self.key, "0" * 64)
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
        self.stored: Path | None = None

    def teardown(self) -> None:
        shutil.rmtree(getattr(self, "folder", ""), ignore_errors=True)

    # --- what the server does ---

    @property
    def heads(self) -> list[str]:
        return list(self.chains)

    def signing(self, name: str) -> Any:
        return load_identity(self.federation.folder / "sites" / name / "identity", name).signing

    def ask(self, name: str, head: str, attempt: int = 0, question: bytes = b"") -> Any:
        """A request at a head, with all that leads there; None if the site refuses."""
        due = self.chains[head].due
        request = RoundRequest(due.round, attempt, self.way[head], more=False, question=question)
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
        data = sign_cohort(self.agreed, self.chains[head].due, attempt, [words[name] for name in chosen], self.key)
        digest = split_frame(data[:4], data, 1 << 20, EnvelopeError).digest
        shown = Shown(head, attempt, chosen, data, digest)
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
        else:
            reply = self.ask(name, shown.head, shown.attempt, shown.data)
            if reply is None or reply.code != ReplyCode.UPDATE:
                return
            data = reply.envelope
        frame = split_frame(MAGIC, data, MAX_HEADER, EnvelopeError)
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
        found = Shown(shown.head, shown.attempt, shown.names, data, arrived_digest(header), payload)
        found.words, found.payloads = dict(shown.words), dict(shown.payloads)
        self.sums.append(found)
        return found

    def reveal(self, name: str, shown: Shown) -> None:
        if name == FAULTY and self.lies:
            check = self.chains[shown.head].wire.check_words(shown.digest, shown.payloads[name])
            data = sign_reveal(self.agreed, shown.digest, name, check, self.signing(name))
        else:
            reply = self.ask(name, shown.head, shown.attempt, shown.data)
            if reply is None or reply.code != ReplyCode.REVEALED:
                return
            data = reply.envelope
            self.revealed.setdefault((name, shown.head), set()).add(shown.digest)
        word = split_word(REVEAL_MAGIC, data)
        header = check_reveal(word, self.agreed, self.chains[shown.head].members, shown.digest)
        shown.reveals[name] = Revealed(*header.check, word.signature)

    def append(self, head: str, kind: Any, words: tuple[SignedWord, ...], shown: Shown | None = None) -> str | None:
        chain = self.chains[head]
        reveals = () if shown is None else tuple(shown.reveals[name] for name in shown.names)
        payload = b"" if shown is None else shown.payload
        header = new_header(
            chain, kind, run=chain.run, key=chain.key, round_number=chain.round + 1, contributors=words,
            reveals=reveals, times_ms=(1, 2), payload=payload,
        )  # fmt: skip
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
            self.begun[record.id] = self.begun[head] if kind == "retired" else record.id
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

    @rule(attempt=st.integers(1, 3), names=st.sampled_from(SUBSETS))
    def bent_round(self, attempt: int, names: set[str]) -> None:
        assert self.play(self.heads[-1], attempt, names, 9, bent=True) is None

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
        cohorts: dict[str, set[tuple[str, ...]]] = {}
        for head, made in self.made.items():
            for record in made:
                if record.header.kind == "aggregate":
                    names = tuple(entry.site for entry in record.contributors if entry.site != FAULTY)
                    cohorts.setdefault(self.state[head], set()).add(names)
        assert all(len(found) == 1 and len(next(iter(found))) >= 2 for found in cohorts.values())

    @invariant()
    def honest_sites_at_one_head_hold_one_adapter(self) -> None:
        held: dict[str, set[str]] = {}
        for name, site in self.sites.items():
            if name != FAULTY:
                held.setdefault(site.replica.state.chain.head, set()).add(site.adapter_digest)
        assert all(len(found) == 1 for found in held.values())

    @invariant()
    def an_honest_site_opens_one_sum_a_head(self) -> None:
        assert all(len(found) == 1 for (folder, _), found in OPENED.items() if f"/{FAULTY}/" not in folder)


class OneLiar(RuleBasedStateMachine):
    """An honest coordinator, three honest sites and one that answers as it likes, or whose disk is put back."""

    prepared: Path

    @initialize()
    def begin(self) -> None:
        self.folder = Path(tempfile.mkdtemp(dir=self.prepared.parent))
        shutil.copytree(self.prepared, self.folder / "out", symlinks=True)
        self.federation = Federation(self.folder / "out")
        self.sites = {name: self.federation.site(name) for name in NAMES}
        folder, key = self.folder / "out/server", self.federation.signing
        self.coordinator = Coordinator.begin(self.federation.agreed, folder, key, "0" * 64)
        self.said: list[RoundReply] = []

    def ask(self, name: str) -> None:
        site = self.sites[name]
        with contextlib.suppress(SecfacmicError):
            reply = site.respond(self.coordinator.request(name, site.run, site.position))
            if name == FAULTY:
                self.said.append(reply)
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
            with contextlib.suppress(SecfacmicError):
                self.coordinator.receive(replace(reply, code=code, envelope=bytes(data), attestation="7" * 64))

    @rule(first=st.integers(0, 9))
    def reveal_wrong(self, first: int) -> None:
        arrived, site = self.coordinator._arrived, self.sites[FAULTY]
        if arrived is not None and site.run:
            key = site.replica.identity.signing
            data = sign_reveal(self.federation.agreed, arrived.digest, FAULTY, (first, 1), key)
            with contextlib.suppress(SecfacmicError):
                self.coordinator.receive(RoundReply(FAULTY, ReplyCode.REVEALED, site.run, site.position, "", data))

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
        for _ in range(8):
            for name in TRAINING:
                self.ask(name)
            if coordinator.finished or len(coordinator.rounds) > sums:
                return
            waiting = set() if coordinator._cohort is None else set(coordinator._cohort.names) - {*coordinator.sites_in}
            if coordinator.step is Step.REVEAL and waiting == {FAULTY}:
                return
            if coordinator.step is Step.ENVELOPE and waiting | coordinator.leaving == {FAULTY}:
                assert coordinator.fail([FAULTY])
            coordinator.advance()
        raise AssertionError(f"step {coordinator.step}, in {coordinator.sites_in}, asked {coordinator.asked}")


OPENED: dict[tuple[str, str], set[bytes]] = {}
"""Which sums were opened, by the site's folder and the head before."""


def _drawn(self: Site) -> Any:
    """Training in no time, and never the same twice: a site that trained again where it must not would show."""
    rng = np.random.default_rng()
    size = codec.flatten(self.replica.state.iterate).size
    return self._quantise(rng.normal(0, 0.01, size), rng.random(size))


@pytest.fixture
def study(tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    sites = [{"name": name} for name in NAMES]
    prepare(make_template(mode="plain", sites=sites, min_sites=3, rounds=4), tmp_path / "out", images)
    monkeypatch.setattr(Site, "_train", _drawn)
    read = Replica._read

    def opens(self: Replica, state: Any, record: Record) -> Any:
        found = read(self, state, record)
        if record.header.kind == "aggregate" and found is not None:
            OPENED.setdefault((str(self.files.folder.path), state.chain.head), set()).add(record.payload)
        return found

    monkeypatch.setattr(Replica, "_read", opens)
    yield tmp_path / "out"
    OPENED.clear()


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
    run_schedules(LyingServer, study, 60, 8)


def test_a_round_closes_whatever_one_site_says_or_waits_for_that_one(study: Path) -> None:
    run_schedules(OneLiar, study, 40, 12)


@pytest.mark.slow
@pytest.mark.parametrize("piece", range(10))
def test_no_long_schedule_breaks_a_rule(study: Path, piece: int) -> None:
    """By hand: 2,000 of the longest in all, each piece from another seed."""
    run_schedules(LyingServer, study, 120, 16, piece)
    run_schedules(OneLiar, study, 80, 25, piece)

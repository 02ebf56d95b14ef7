"""A site's privacy ledger: what was spent on whom, written before it is spent.

Three files in the folder of the site's identity, and nothing in the data folder; all studies and state folders of the
identity spend from it:

``ledger.key``    secret of 32 bytes: keys the MACs and the hashes of patients
``ledger.jsonl``  entries: ``open``, ``budget``, ``plan``, ``reserve``, ``commit``, ``sent``
``blocks.jsonl``  who was in which release, as keyed hashes (:mod:`secure_fed.privacy.histories`)

How many entries there are, and of what kinds, follows from the study and from what the site declared, never from its
patients: whatever does depend on them stands in ``blocks.jsonl``. Order is by number; no clock is read.

Every patient has a history of its own. What is reserved is spent, whatever becomes of it.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import secrets
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from pydantic import ValidationError

from secure_fed.core.canonical import canonical_json
from secure_fed.core.errors import BudgetError, BudgetSpentError, KeyFileError, LedgerError, StorageError
from secure_fed.core.storage import exclusive, make_folder, sync_folder, write_durable
from secure_fed.core.tomlfile import FileModel
from secure_fed.privacy.accounting import ROUNDING, Mechanism, epsilon_of, epsilon_spent, mu_squared_of
from secure_fed.privacy.chain_file import ChainFile
from secure_fed.privacy.histories import Histories, Twins
from secure_fed.protocol.ledger_heads import MAX_LINKS, SHORT, LedgerHead, Link
from secure_fed.protocol.signing import PRIVATE, ZERO_DIGEST, read_private

ADJACENCY = "add or remove one"

Unit = Literal["patient", "image"]
Kind = Literal["patients", "public", "simulated"]
State = Literal["reserved", "committed", "sent"]


@dataclass(frozen=True)
class Account:
    """What a ledger is opened for; none of it but the budget can change later.

    Attributes:
        site: its name.
        identity: public signing key of the site's identity, 64 hex digits.
        unit: what counts as one patient.
        data: kind of the data; of all but ``patients``, every figure is labelled simulated.
        epsilon: the budget of each patient, above 0; it can only fall.
        delta: in (0, 1).
    """

    site: str
    identity: str
    unit: Unit
    data: Kind
    epsilon: float
    delta: float

    def declare(self, run_epsilon: float | None, runs: int) -> Declaration:
        """What a run may cost each patient.

        Args:
            run_epsilon: as the site gives it; else the account's squared mu in equal parts.
            runs: how many parts, from 1.

        Raises:
            BudgetError: it is more than the budget of a patient's life here.
        """
        if run_epsilon is None:
            share = mu_squared_of(self.epsilon, self.delta) / runs
            return Declaration(epsilon_of(share, self.delta), share, runs)
        if run_epsilon > self.epsilon:
            raise BudgetError(
                f"privacy.run_epsilon = {run_epsilon:g}, but each patient's budget is epsilon {self.epsilon:g}; "
                "expected at most that"
            )
        return Declaration(run_epsilon, mu_squared_of(run_epsilon, self.delta), None)


@dataclass(frozen=True)
class Event:
    """One reservation.

    Attributes:
        seq: number of its entry.
        blocks: whose budget it is charged to; none if nobody could pay, and noise alone was released.
        purpose: what for, in words.
        mechanism: what is released.
        run: id of the run that it is part of.
        state: how far it came; of no matter for what is spent.
    """

    seq: int
    blocks: tuple[int, ...]
    purpose: str
    mechanism: Mechanism
    run: str
    state: State


@dataclass(frozen=True)
class Declaration:
    """What a site says, once and in public, that a run may cost each of its patients.

    Attributes:
        epsilon: of the run, at the ledger's delta.
        mu_squared: that it buys.
        runs: how many runs share the ledger's life in equal parts; None if the run's epsilon was given.
    """

    epsilon: float
    mu_squared: float
    runs: int | None


class Plan(FileModel):
    """The noise of one run, fixed before its first round; it follows from the declaration and the study alone.

    Attributes:
        run: the run's id.
        study: the study's.
        epsilon: that was declared for the run.
        rounds: of the study; noise is planned for one more, in case of a crash.
        steps: noisy sums of one round.
        clip: sensitivity of each.
        noise_multiplier: noise over clip.
        lmmd_noise_multiplier: noise over sensitivity of each release of class means that is made once; None if none
            is to be made.
        lmmd_round_noise_multiplier: likewise of the one that each round makes; None if none does.
        lmmd_note: why LMMD is on or off, in words.
        validation_rounds: the rounds in which validation counts are released, paid for by the validation patients,
            who train in no round, with one release more in case of a crash.
        validation_noise_multiplier: noise over sensitivity of each; None if none is to be made.
        validation_note: whether they are released, in words.
    """

    run: str
    study: str
    epsilon: float
    rounds: int
    steps: int
    clip: float
    noise_multiplier: float
    lmmd_noise_multiplier: float | None
    lmmd_round_noise_multiplier: float | None
    lmmd_note: str
    validation_rounds: tuple[int, ...]
    validation_noise_multiplier: float | None
    validation_note: str

    @property
    def round_mechanism(self) -> Mechanism:
        """What the training of one round releases."""
        return Mechanism(self.clip, self.noise_multiplier * self.clip, self.steps)


@dataclass(frozen=True)
class MeanReleases:
    """The releases of class means that a run asks for.

    Attributes:
        use: what for, in a word.
        once: how many are made at its beginning, 0 to 2.
        each_round: whether every round makes another.
        why_not: says of the largest noise multiplier among them why they are not worth their cost, None if they are.
            Without any release, what is to be said of LMMD anyway.
    """

    use: str
    once: int
    each_round: bool
    why_not: Callable[[float], str | None]


NO_MEANS = MeanReleases("", 0, False, lambda noise_multiplier: "off: the study has no domain term")


class Ledger:
    """The ledger of one site's identity, read whole and checked whole at each opening, by :func:`opened`.

    Args:
        folder: of the three files; must hold a ledger.

    Raises:
        LedgerError: it does not verify, or a file of it is missing.
        KeyFileError: the key is missing or readable by others.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        secret = _secret(read_private(folder / "ledger.key"), folder)
        self._entries = ChainFile(folder / "ledger.jsonl", _derive(secret, "mac"))
        registry = ChainFile(folder / "blocks.jsonl", _derive(secret, "mac"))
        for chain in (self._entries, registry):
            try:
                data = chain.path.read_bytes()
            except OSError as error:
                raise LedgerError(
                    f"{chain.path}: cannot be read ({error.strerror}), though this site has spent before; expected "
                    "it there: put it back from the newest export (secfacmic ledger restore)"
                ) from error
            chain.load(data)
        self._histories = Histories(registry, _derive(secret, "hash"))
        self._read()

    # --- opening ---

    @staticmethod
    def exists(folder: Path) -> bool:
        """Whether this folder holds a ledger, or what is left of one."""
        return folder.exists()

    @classmethod
    def create(cls, folder: Path, account: Account) -> None:
        """Begin a ledger, whole or not at all.

        Raises:
            LedgerError: there is one, or what is left of one.
            StorageError: it cannot be written.
        """
        if cls.exists(folder):
            raise LedgerError(f"{folder}: holds a ledger, which is never replaced")
        make_folder(folder.parent)
        secret = secrets.token_bytes(32)
        opening = {
            "kind": "open",
            "site": account.site,
            "identity": account.identity,
            "unit": account.unit,
            "adjacency": ADJACENCY,
            "data": account.data,
            "delta": account.delta,
            "epsilon": account.epsilon,
        }
        try:
            with TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as name:
                new = Path(name) / "new"
                make_folder(new, 0o700)
                ChainFile(new / "ledger.jsonl", _derive(secret, "mac")).append(opening)
                write_durable(new / "blocks.jsonl", b"", PRIVATE)
                write_durable(new / "ledger.key", f"{secret.hex()}\n".encode(), PRIVATE)
                new.rename(folder)
            sync_folder(folder.parent)
        except OSError as error:
            raise StorageError(
                f"{folder}: cannot be made ({error.strerror}); expected a writable folder that no other process makes: "
                "the ledger lies with the identity's keys"
            ) from error

    def agree(self, account: Account) -> None:
        """Check that the site asks for what the ledger was opened for, and lower the budget if it asks for less.

        Raises:
            LedgerError: the ledger is another identity's.
            BudgetError: it asks for more, or for something else.
        """
        own = self.account
        self.refuse_other(account.identity)
        for name, found, expected in (
            ("site", account.site, own.site),
            ("unit", account.unit, own.unit),
            ("delta", account.delta, own.delta),
            ("data.kind", account.data, own.data),
        ):
            if found != expected:
                raise BudgetError(
                    f"{name} = {found}, but this site's ledger was opened with {expected}; expected the same for ever: "
                    "figures of different kinds do not add"
                )
        if account.epsilon > own.epsilon:
            raise BudgetError(
                f"epsilon = {account.epsilon:g}, but this site's budget is {own.epsilon:g}; it can only be lowered: "
                f"set {own.epsilon:g} or less"
            )
        if account.epsilon < own.epsilon:
            self._entries.append({"kind": "budget", "epsilon": account.epsilon})
            self._read()

    def refuse_other(self, identity: str) -> None:
        """Check whose ledger it is.

        Args:
            identity: public signing key, 64 hex digits.

        Raises:
            LedgerError: it is another identity's.
        """
        own = self.account.identity
        if identity != own:
            raise LedgerError(
                f"{self._folder}: the ledger of identity {own[:16]}; expected that of this site's identity "
                f"{identity[:16]}: a ledger belongs to one identity, put each back with its own keys"
            )

    # --- reading ---

    @property
    def head(self) -> tuple[int, str]:
        """Number and id of the last entry."""
        return self._entries.head

    def travelling(self, study: str, known: int) -> LedgerHead:
        """What travels with an update: how many updates this ledger has paid for in that study, the salted digest of
        the entry that committed the last of them, and links to earlier ones that others may hold.

        These are the newest that the journal shows, and of each run the last that travelled, the last but one and so
        on: whoever followed a run to its end, or missed some of its updates, finds the one it holds.

        Args:
            study: its id.
            known: number of the newest head of this site that the journal shows; 0 without any.
        """
        ids = self._anchors[study]
        if not ids:
            return LedgerHead(0, ZERO_DIGEST)
        newest = len(ids)
        runs: defaultdict[str, list[int]] = defaultdict(list)
        for number, (run, _) in enumerate(ids, 1):
            if number < newest:
                runs[run].append(number)
        earlier = list(reversed(runs.values()))
        longest = max(map(len, earlier), default=0)
        named = [known, *(run[-back] for back in range(1, longest + 1) for run in earlier if len(run) >= back)]
        chosen = [number for number in dict.fromkeys(named) if 0 < number < newest][:MAX_LINKS]
        links: tuple[Link, ...] = tuple((number, ids[number - 1][1][:SHORT]) for number in sorted(chosen))
        return LedgerHead(newest, ids[-1][1], links)

    def holds(self, study: str, seq: int, head: str) -> bool:
        """Whether the update of that number in a study was committed by the entry of that id; number 0 always was."""
        ids = self._anchors[study]
        return seq == 0 or (seq <= len(ids) and ids[seq - 1][1] == head)

    def sent(self, study: str) -> int:
        """How many updates this ledger has paid for in a study."""
        return len(self._anchors[study])

    @property
    def _own(self) -> dict[int, list[int]]:
        """Numbers of the events that name a block, by block."""
        found: defaultdict[int, list[int]] = defaultdict(list)
        for event in self.events:
            for block in event.blocks:
                found[block].append(event.seq)
        return found

    def _cost(self, block: int, own: Mapping[int, Sequence[int]]) -> float:
        """Squared mu of a block. Who was in one release under two ids moved its sum by twice as much."""
        carried, events = self._histories.history(block, own)
        return carried + math.fsum(
            times * times * self._event(seq).mechanism.mu_squared for seq, times in events.items()
        )

    def costs(self) -> dict[int, float]:
        """Squared mu spent, by block that has persons."""
        own = self._own
        return {block: self._cost(block, own) for block in self._histories.members}

    def spent(self, block: int) -> float:
        """Epsilon spent by each person of a block."""
        return epsilon_of(self._cost(block, self._own), self.account.delta)

    @property
    def epsilon_spent(self) -> float:
        """Of the person who has spent most; 0 without any."""
        return epsilon_of(max(self.costs().values(), default=0.0), self.account.delta)

    @property
    def blocks(self) -> list[int]:
        """The blocks that have persons."""
        return list(self._histories.members)

    @property
    def adopted(self) -> dict[str, str]:
        """Of the adopted ledgers, the head that each had, by the id of its first entry."""
        return self._histories.adopted

    def plan(self, run: str) -> Plan | None:
        """The plan of a run, if it has one."""
        return self._plans.get(run)

    @property
    def plans(self) -> list[Plan]:
        """The plans of all runs, in order."""
        return list(self._plans.values())

    def of_run(self, run: str) -> list[Event]:
        """What was reserved for a run, in order."""
        return [event for event in self.events if event.run == run]

    def _read(self) -> None:
        """Rebuild everything from the lines."""
        events: dict[int, Event] = {}
        self._plans: dict[str, Plan] = {}
        self._anchors: defaultdict[str, list[tuple[str, str]]] = defaultdict(list)
        account: Account | None = None
        for line in self._entries.lines:
            fields = dict(line.fields)
            kind = fields.pop("kind")
            try:
                if kind == "open" and account is None and fields.pop("adjacency") == ADJACENCY:
                    account = Account(**fields)
                elif kind == "budget" and account is not None and fields["epsilon"] < account.epsilon:
                    account = replace(account, **fields)
                elif kind == "plan":
                    plan = Plan.model_validate_json(canonical_json(fields))  # JSON has no tuples
                    self._plans[plan.run] = plan
                elif kind == "reserve":
                    self._check_registry(fields)
                    mechanism = Mechanism(fields["sensitivity"], fields["noise_std"], fields["steps"])
                    events[line.seq] = Event(
                        line.seq, tuple(fields["blocks"]), fields["purpose"], mechanism, fields["run"], "reserved"
                    )
                elif kind in ("commit", "sent"):
                    state: State = "committed" if kind == "commit" else "sent"
                    events.update({seq: replace(events[seq], state=state) for seq in fields["events"]})
                    if kind == "commit" and fields["study"]:
                        self._anchors[fields["study"]].append((fields["run"], line.id))
                else:
                    raise KeyError(kind)
            except (KeyError, TypeError, ValidationError):
                raise LedgerError(
                    f"{self._entries.path}: line {line.seq} is of a kind or form that this version does not know; "
                    "expected what it wrote itself: use the newest version of secfacmic that ran here"
                ) from None
        if account is None:
            raise LedgerError(f"{self._entries.path}: empty; expected the entry that opened it")
        self.account = account
        self._by_number = events
        self.events = [events[seq] for seq in sorted(events)]

    def _check_registry(self, fields: Mapping[str, Any]) -> None:
        """An older register under a newer ledger would give known patients a fresh history."""
        seq, head = fields["registry"]
        if not self._histories.holds(seq, head):
            raise LedgerError(
                f"{self._folder / 'blocks.jsonl'}: {self._histories.head[0]} lines; the ledger has seen line {seq} of "
                "another or longer one: put back both from the newest export (secfacmic ledger restore)"
            )

    # --- patients ---

    def person(self, patient: str) -> str:
        """The person whose id this is; two ids that were linked are one."""
        return self._histories.person(patient)

    def taken_part(self, patient: str) -> dict[int, int]:
        """How often a patient was in each event, by the event's number."""
        block = self._histories.block_of(self.person(patient))
        return {} if block is None else self._histories.history(block, self._own)[1]

    def unsettled(self, pictures: Mapping[str, Collection[bytes]]) -> list[Twins]:
        """Pairs of ids with an equal picture of which nobody has said whether they are one patient."""
        return self._histories.unsettled(pictures)

    def halves(self, same: Mapping[str, str]) -> list[Twins]:
        """Ids that are taken for another one, each with that one, of whom something was spent that it has not paid.

        Args:
            same: by id, the one that it is taken for.
        """
        spent = {block for block, cost in self.costs().items() if cost}
        return [
            Twins(patient, other)
            for patient, other in sorted(same.items())
            if self._histories.block_of(self.person(patient)) in spent and self.person(patient) != self.person(other)
        ]

    def register(
        self, pictures: Mapping[str, Collection[bytes]], files: Mapping[str, Collection[bytes]] | None = None
    ) -> None:
        """Note who is in the site's data; those who are new begin with what adopted ledgers tell of them.

        Args:
            pictures: digests of each patient's pictures, by id.
            files: digests of each patient's files, by which ledgers of version 0.1 knew them.

        Raises:
            StorageError: it cannot be written.
        """
        self._histories.register(pictures, files or {}, self.head[0])

    def link(self, first: str, second: str) -> float:
        """Two ids are one patient from now on, whose histories add.

        Returns:
            Epsilon that it has spent; above the budget it takes part in nothing any more.

        Raises:
            LedgerError: one is unknown, or they are linked.
        """
        self._histories.link(first, second, self.head[0])
        block = self._histories.block_of(self._histories.person(first)) if not first.startswith("#") else None
        block = max(self._histories.blocks) if block is None else block
        return self.spent(block)

    def distinct(self, first: str, second: str) -> None:
        """Two ids with an equal picture are two patients.

        Raises:
            LedgerError: one is unknown, or they are linked.
        """
        self._histories.distinct(first, second)

    def adopt(self, older: OlderLedger) -> None:
        """Take over a ledger of version 0.1; what it spent on a patient adds to what is spent here.

        Raises:
            LedgerError: it was adopted before, or its site, delta or unit is another.
        """
        own = self.account
        pairs = (("site", older.site, own.site), ("delta", older.delta, own.delta), ("unit", older.unit, own.unit))
        for name, found, expected in pairs:
            if found != expected:
                raise LedgerError(
                    f"the ledger to adopt has {name} = {found}, this one {expected}; expected the same: another "
                    "site's patients, or figures of different kinds, do not add"
                )
        self._histories.adopt(older.first, older.head, older.hash_key, older.spent)

    # --- planning ---

    def make_plan(
        self,
        study: str,
        run: str,
        declared: Declaration,
        rounds: int,
        steps: int,
        clip: float,
        means: MeanReleases = NO_MEANS,
        validation: Sequence[int] = (),
    ) -> Plan:
        """Plan and note the noise of a run, for its rounds and one more. No patient is looked at.

        Args:
            study: the study's id.
            run: the run's.
            declared: what it may cost.
            rounds: of the study, from 1.
            steps: noisy sums a round.
            clip: sensitivity of each.
            means: which class means are to be released.
            validation: rounds in which validation counts are to be released.

        Raises:
            BudgetSpentError: all runs that share the budget have been made.
            StorageError: the plan cannot be written.
        """
        if declared.runs is not None and len(self._plans) >= declared.runs:
            raise BudgetSpentError(
                f"this ledger has planned {len(self._plans)} runs, as many as privacy.runs = {declared.runs} says; "
                "expected fewer: this site retires from this run, and takes part as an observer. To train in another "
                "run, raise privacy.runs or set privacy.run_epsilon: patients who can pay for it take part"
            )
        left = declared.mu_squared
        once = (LMMD_SHARE * left) ** -0.5
        each_round = once * (rounds + 1) ** 0.5
        note = means.why_not(each_round if means.each_round else once)
        on = note is None
        training = left * (1 - LMMD_SHARE * (means.once + means.each_round) * on)
        said = [f"{means.once} release{'s' * (means.once > 1)} at noise multiplier {once:.2f}"] * (means.once > 0)
        said += [f"one release a round at noise multiplier {each_round:.2f}"] * means.each_round
        counts, counts_note = None, "off: the study asks for none"
        if validation:
            counts = _noise(left, len(validation) + 1)
            times = ", ".join(map(str, validation))
            counts_note = (
                f"on: after rounds {times} at noise multiplier {counts:.2f}, from the validation patients' budget"
            )
        plan = Plan(
            run=run,
            study=study,
            epsilon=declared.epsilon,
            rounds=rounds,
            steps=steps,
            clip=clip,
            noise_multiplier=_noise(training, (rounds + 1) * steps),
            lmmd_noise_multiplier=once * (1 + 100 * ROUNDING) if on and means.once else None,
            lmmd_round_noise_multiplier=each_round * (1 + 100 * ROUNDING) if on and means.each_round else None,
            lmmd_note=note or f"on ({means.use}): {' and '.join(said)}",
            validation_rounds=tuple(validation),
            validation_noise_multiplier=counts,
            validation_note=counts_note,
        )
        self._entries.append({"kind": "plan", **plan.model_dump(mode="json")})
        self._read()
        return plan

    # --- spending ---

    def able(self, persons: Collection[str], mu_squared: float) -> set[str]:
        """Those of some persons who can pay, each by its own history.

        Args:
            persons: registered ones.
            mu_squared: what is to be paid.
        """
        limit = mu_squared_of(self.account.epsilon, self.account.delta)
        costs = self.costs()
        rich = {block for block, spent in costs.items() if spent + mu_squared <= limit}
        return {person for person in persons if self._histories.block_of(person) in rich}

    def reserve(self, mechanism: Mechanism, purpose: str, run: str, persons: Collection[str]) -> Event:
        """Spend, durably, before the data are touched. Nothing gives it back. Over nobody, noise alone is released.

        Raises:
            BudgetError: somebody cannot pay; nothing was spent.
            StorageError: it was not written; nothing was spent, and nothing may be computed.
        """
        poor = len(set(persons)) - len(self.able(persons, mechanism.mu_squared))
        if poor:
            raise BudgetError(f"{poor} patients cannot pay for {purpose}; expected only those who can")
        blocks = self._histories.take_out(persons, self.head[0])
        line = self._entries.append(
            {
                "kind": "reserve",
                "blocks": blocks,
                "purpose": purpose,
                "run": run,
                "sensitivity": mechanism.sensitivity,
                "noise_std": mechanism.noise_std,
                "steps": mechanism.steps,
                "registry": list(self._histories.head),
            }
        )
        self._read()
        return self._event(line.seq)

    def commit(self, events: Sequence[int], output: bytes, study: str = "", run: str = "") -> None:
        """Note that the noised output of some events is stored. Once only: an event has one output.

        Args:
            events: their numbers.
            output: what was stored.
            study, run: of the update that it is; empty for what does not travel by itself.

        Raises:
            LedgerError: no such event, or it has an output already.
        """
        for seq in events:
            if self._event(seq).state != "reserved":
                raise LedgerError(f"event {seq} has an output already; expected one draw an event")
        digest = hashlib.sha256(output).hexdigest()
        self._entries.append({"kind": "commit", "events": list(events), "output": digest, "study": study, "run": run})
        self._read()

    def mark_sent(self, still_open: Collection[int]) -> None:
        """Note that committed outputs were handed over, or their time is over.

        Args:
            still_open: numbers of the events that may have to be sent yet.
        """
        sent = [event.seq for event in self.events if event.state == "committed" and event.seq not in still_open]
        if sent:
            self._entries.append({"kind": "sent", "events": sent})
            self._read()

    def _event(self, seq: int) -> Event:
        try:
            return self._by_number[seq]
        except KeyError:
            raise LedgerError(
                f"event {seq} is not in this ledger; expected one of {[event.seq for event in self.events]}"
            ) from None

    def state(self, seq: int) -> State:
        """How far an event came.

        Raises:
            LedgerError: no such event.
        """
        return self._event(seq).state

    # --- for people ---

    def summary(self) -> dict[str, Any]:
        """The ledger as a JSON document for the site's own eyes; anyone can recompute epsilon from its events."""
        account, own, costs = self.account, self._own, self.costs()
        rows = []
        for block in costs:
            carried, events = self._histories.history(block, own)
            if carried:
                rows.append({"block": block, "purpose": "adopted ledgers", "mu_squared": carried, "state": "sent"})
            for seq, times in sorted(events.items()):
                event = self._event(seq)
                cost = times * times * event.mechanism.mu_squared
                rows.append({"block": block, **_row(event), "times": times, "mu_squared": cost})
        members = self._histories.members
        return {
            "site": account.site,
            "data": account.data,
            "simulated": account.data != "patients",
            "local": "blocks, events by block and epsilon_spent depend on single patients: for this site's own eyes",
            "epsilon_spent": self.epsilon_spent,
            "epsilon_budget": account.epsilon,
            "delta": account.delta,
            "unit": account.unit,
            "adjacency": f"{ADJACENCY} {account.unit}",
            "claim": claim(account),
            "blocks": {str(block): epsilon_of(cost, account.delta) for block, cost in costs.items()},
            "members": {str(block): number for block, number in members.items()},
            "adopted": list(self.adopted),
            "head": {"seq": self.head[0], "id": self.head[1]},
            "releases": [_row(event) for event in self.events],
            "events": rows,
        }

    def public_summary(self, study: str) -> dict[str, Any]:
        """What of the ledger may leave the site: the claim, the plans, and every release, whoever was in it.

        Args:
            study: id of the one for whose updates the anchors are listed.
        """
        account = self.account
        # Of a patient who was in all of it, whether there is one or not.
        at_most = epsilon_spent([event.mechanism for event in self.events], account.delta)
        return {
            "site": account.site,
            "identity": account.identity,
            "data": account.data,
            "simulated": account.data != "patients",
            "epsilon_at_most": min(account.epsilon, at_most),
            "epsilon_budget": account.epsilon,
            "delta": account.delta,
            "unit": account.unit,
            "adjacency": f"{ADJACENCY} {account.unit}",
            "claim": claim(account),
            "plans": [plan.model_dump(mode="json") for plan in self._plans.values()],
            "releases": [_row(event) for event in self.events],
            "anchors": [head for _, head in self._anchors[study]],
        }

    def export(self) -> bytes:
        """All three files as one, key included: to be kept as safe as the key."""
        files = {name: (self._folder / name).read_text(encoding="ascii") for name in _FILES}
        return canonical_json({"format": 2, "files": files}) + b"\n"


def _row(event: Event) -> dict[str, Any]:
    return {
        "seq": event.seq,
        "mechanism": "gaussian",
        "purpose": event.purpose,
        "sensitivity": event.mechanism.sensitivity,
        "noise_std": event.mechanism.noise_std,
        "steps": event.mechanism.steps,
        "mu_squared": event.mechanism.mu_squared,
        "state": event.state,
    }


def _noise(mu_squared: float, steps: int) -> float:
    """The noise multiplier at which so many sums cost that much, rounded up so that the last one fits."""
    return math.sqrt(steps / mu_squared) * (1 + 100 * ROUNDING)


LMMD_SHARE = 0.12
"""Share of what a run may cost (in squared mu) for each set of class means, be it released once or anew in every round
(docs/privacy.md, Cost and budget)."""

EXPORT_HEAD = b'{"files":{'
"""With which an export begins."""
_FILES = ("ledger.jsonl", "blocks.jsonl", "ledger.key")


def claim(account: Account) -> str:
    """What the ledger claims, in the words of docs/privacy.md, "The claim"."""
    unit = f"one {account.unit}"
    text = (
        f"Everything that leaves site {account.site} is ({account.epsilon:g}, {account.delta:g})-differentially "
        f"private with respect to adding or removing any {unit} of that site, over the lifetime of this ledger, "
        "from the first message of each run on, for the data as they were then, assuming correct code and the "
        "operating system's randomness, whatever the server, the other sites or outsiders do. Encryption additionally "
        "hides single updates from the server. Excluded: the declared number of patients N_ref, participation, "
        "configuration, and what is in a study's public statistics (centre, directions and spread of features), which "
        "are of images that its makers call public and of no site's data."
    )
    return text if account.data == "patients" else f"Simulated ({account.data} data): {text}"


@contextmanager
def opened(folder: Path) -> Iterator[Ledger]:
    """The ledger, held for this process alone and checked anew.

    Raises:
        StorageError: another process holds it, or it cannot be written.
        LedgerError, KeyFileError: as :class:`Ledger`.
    """
    with ExitStack() as held:
        try:
            held.enter_context(exclusive(folder))
        except OSError as error:
            raise StorageError(
                f"{folder}: cannot be held ({error.strerror}); expected a folder that this user can write, as what is "
                "spent is noted there first: nothing was spent"
            ) from error
        yield Ledger(folder)


def restore(folder: Path, export: bytes, identity: str) -> Ledger:
    """Put an export in place of a lost or damaged ledger. It stays closed until server and peers confirm its head.

    Args:
        folder: where the ledger lies.
        export: of :meth:`Ledger.export`.
        identity: public signing key of the site's identity, 64 hex digits.

    Raises:
        LedgerError: the export does not verify or is another identity's, or a ledger that verifies is there and has
            gone further.
        StorageError: it cannot be written, or the ledger is in use.
    """
    try:
        content = json.loads(export)
        files = {name: content["files"][name].encode("ascii") for name in _FILES}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise LedgerError("the export cannot be read; expected a file made by secfacmic ledger export") from None
    make_folder(folder.parent)
    with TemporaryDirectory(dir=folder.parent, prefix=".restoring.") as trial:
        for name, data in files.items():
            write_durable(Path(trial) / name, data, PRIVATE)
        restored = Ledger(Path(trial))
    if restored.account.identity != identity:
        raise LedgerError(
            f"the export is of the ledger of identity {restored.account.identity[:16]}; expected that of this "
            f"site's identity {identity[:16]}: nothing was changed"
        )
    make_folder(folder, 0o700)
    with exclusive(folder):
        try:
            present = Ledger(folder)
        except (LedgerError, KeyFileError):
            pass  # lost or damaged, which is why it is being replaced
        else:
            if not restored._entries.holds(*present.head):
                raise LedgerError(
                    f"{folder}: holds a whole ledger with head {present.head[0]}, which the export (head "
                    f"{restored.head[0]}) does not continue; a ledger never goes back: nothing was changed"
                )
        write_durable(folder / CLOSED, b"restored; waits for its head to be confirmed\n", PRIVATE)
        for name, data in files.items():
            write_durable(folder / name, data, PRIVATE)
    return Ledger(folder)


CLOSED = "closed"
"""Marks a restored ledger whose head nobody has confirmed; nothing is reserved while it is there."""


def snapshot_key(folder: Path) -> bytes:
    """The key, 32 bytes, under which the ids of patients lie in the snapshots of the runs that a ledger pays for.

    Raises:
        KeyFileError: the ledger's secret is missing or readable by others.
        LedgerError: it is malformed.
    """
    return _derive(_secret(read_private(folder / "ledger.key"), folder), "snapshot")


def _derive(secret: bytes, purpose: str) -> bytes:
    return hmac.new(secret, f"secfacmic ledger 1 {purpose}".encode(), hashlib.sha256).digest()


def _secret(text: bytes, folder: Path) -> bytes:
    try:
        secret = bytes.fromhex(text.decode("ascii").strip())
    except ValueError:
        secret = b""
    if len(secret) != 32:
        raise LedgerError(f"{folder / 'ledger.key'}: malformed; put it back from an export (secfacmic ledger restore)")
    return secret


# --- ledgers of version 0.1 ---


@dataclass(frozen=True)
class OlderLedger:
    """What is taken over of a ledger of version 0.1, which lay in a study's state folder.

    Attributes:
        first, head: ids of its first and its last entry.
        site, unit, delta: that it was opened with.
        hash_key: of its hashes.
        spent: ``units`` and ``images``, by hash the block, ``blocks``, by block (as text) the squared mu, and
            ``events``, of each its squared mu and its blocks (as text).
    """

    first: str
    head: str
    site: str
    unit: str
    delta: float
    hash_key: bytes
    spent: dict[str, Any]


def read_older(folder: Path) -> OlderLedger:
    """Read and check a ledger of version 0.1.

    Raises:
        LedgerError: there is none, or it does not verify.
        KeyFileError: its key is missing or readable by others.
    """
    secret = _secret(read_private(folder / "ledger.key"), folder)
    chains = []
    for name in ("ledger.jsonl", "blocks.jsonl"):
        chain = ChainFile(folder / name, _derive(secret, "mac"))
        try:
            chain.load(chain.path.read_bytes())
        except OSError as error:
            raise LedgerError(f"{chain.path}: cannot be read ({error.strerror}); expected a whole ledger") from error
        chains.append(chain)
    entries, registry = chains
    try:
        opening = entries.lines[0].fields
        blocks: defaultdict[str, float] = defaultdict(float)
        units: dict[str, int] = {}
        images: dict[str, int] = {}
        for line in registry.lines:
            block = line.fields["block"]
            blocks[str(block)] += 0.0
            units.update(dict.fromkeys(line.fields["units"], block))
            images.update(dict.fromkeys(line.fields["images"], block))
        events: list[tuple[float, list[str]]] = []
        for line in entries.lines:
            if line.fields["kind"] == "reserve":
                # Of a sampled mechanism this is an upper bound.
                cost = Mechanism(line.fields["sensitivity"], line.fields["noise_std"], line.fields["steps"]).mu_squared
                events.append((cost, [str(block) for block in line.fields["blocks"]]))
                for block in events[-1][1]:
                    blocks[block] += cost
        return OlderLedger(
            entries.lines[0].id,
            entries.head[1],
            str(opening["site"]),
            str(opening["unit"]),
            float(opening["delta"]),
            _derive(secret, "hash"),
            {"units": units, "images": images, "blocks": dict(blocks), "events": events},
        )
    except (LookupError, TypeError, ValueError):
        raise LedgerError(f"{folder}: no ledger of version 0.1; expected one: nothing was adopted") from None

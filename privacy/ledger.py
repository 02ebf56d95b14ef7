"""A site's privacy ledger: what was spent on whom, written before it is spent.

Three files in ``STATE/privacy``, and nothing in the data folder:

``ledger.key``    secret of 32 bytes: keys the MACs and the hashes of patients
``ledger.jsonl``  entries: ``open``, ``budget``, ``plan``, ``reserve``, ``commit``, ``sent``
``blocks.jsonl``  which patient is in which cohort block, as keyed hashes of ids and of image digests

Each line names the one before by its SHA-256, carries a MAC, and a random salt, so that the ledger's head, which
travels with every update, tells nothing of the content. A file is replaced as a whole, so that it is never half
written. Order is by number; no clock is read.

A block is a set of patients with one budget. A patient stays in its block under any run, study or export; new
patients open a new block, validation patients one of their own. What is reserved is spent, whatever becomes of it.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from pydantic import ValidationError

from secure_fed.core.errors import BudgetError, KeyFileError, LedgerError, StorageError
from secure_fed.core.storage import exclusive, make_folder, sync_folder, write_durable
from secure_fed.core.tomlfile import FileModel
from secure_fed.privacy.accounting import ROUNDING, Mechanism, epsilon_spent, mu_squared_of, plan_noise
from secure_fed.protocol.ledger_heads import MAX_LINKS, SHORT, LedgerHead, Link
from secure_fed.protocol.signing import PRIVATE, ZERO_DIGEST, read_private
from secure_fed.protocol.study import canonical_json

ADJACENCY = "add or remove one"
LEAST_SHARE = 0.3
"""Share of its budget that a block must have left to enter a new plan: with less, noise drowns what is learnt, and
what the last plan kept for a crash is not worth a run."""

Unit = Literal["patient", "image"]
Kind = Literal["patients", "public", "simulated"]
State = Literal["reserved", "committed", "sent"]


@dataclass(frozen=True)
class Account:
    """What a ledger is opened for; none of it but the budget can change later.

    Attributes:
        site: its name.
        unit: what counts as one patient.
        data: kind of the data; of all but ``patients``, every figure is labelled simulated.
        epsilon: the budget of each block, above 0; it can only fall.
        delta: in (0, 1).
    """

    site: str
    unit: Unit
    data: Kind
    epsilon: float
    delta: float


@dataclass(frozen=True)
class Event:
    """One reservation.

    Attributes:
        seq: number of its entry.
        blocks: whose budget it is charged to.
        purpose: what for, in words.
        mechanism: what is released.
        state: how far it came; of no matter for what is spent.
    """

    seq: int
    blocks: tuple[int, ...]
    purpose: str
    mechanism: Mechanism
    state: State


class Plan(FileModel):
    """The noise of one run, fixed before its first round.

    Attributes:
        run: the run's id.
        rounds: rounds still to come when it was made; noise is planned for one more, in case of a crash.
        steps: noisy sums of one round.
        clip: sensitivity of each.
        noise_multiplier: noise over clip.
        sampling_rate: share of the patients in each sum.
        lmmd_noise_multiplier: noise over sensitivity of each release of class means that is made once; None if none
            is to be made.
        lmmd_round_noise_multiplier: likewise of the one that each round makes; None if none does.
        lmmd_note: why LMMD is on or off, in words.
        validation_rounds: the rounds in which validation counts are released; the budget is that of the validation
            patients' own block, with one release more in case of a crash.
        validation_noise_multiplier: noise over sensitivity of each; None if none is to be made.
        validation_note: why they are released or not, in words.
    """

    run: str
    rounds: int
    steps: int
    clip: float
    noise_multiplier: float
    sampling_rate: float
    lmmd_noise_multiplier: float | None
    lmmd_round_noise_multiplier: float | None
    lmmd_note: str
    validation_rounds: tuple[int, ...]
    validation_noise_multiplier: float | None
    validation_note: str

    @property
    def round_mechanism(self) -> Mechanism:
        """What the training of one round releases."""
        return Mechanism(self.clip, self.noise_multiplier * self.clip, self.steps, self.sampling_rate)


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


@dataclass(frozen=True)
class _Line:
    seq: int
    id: str
    fields: dict[str, Any]


class _ChainFile:
    """Lines that cannot be changed, cut in the middle or put in another order without the key."""

    def __init__(self, path: Path, key: bytes) -> None:
        self._path = path
        self._key = key
        self._data = b""
        self.lines: list[_Line] = []

    @property
    def head(self) -> tuple[int, str]:
        """Number and id of the last line; 0 and zeros before the first."""
        return (self.lines[-1].seq, self.lines[-1].id) if self.lines else (0, ZERO_DIGEST)

    def load(self, data: bytes) -> None:
        """Check and take all lines.

        Raises:
            LedgerError: a line does not verify.
        """
        texts = data.split(b"\n")
        if texts.pop() != b"":
            raise self._damaged(len(texts) + 1)
        for text in texts:
            self.lines.append(self._check(text))
        self._data = data

    def append(self, fields: dict[str, Any]) -> _Line:
        """Add a line durably.

        Raises:
            StorageError: it was not written; the file is as it was.
        """
        seq, previous = self.head
        content = {"seq": seq + 1, "previous": previous, "salt": secrets.token_hex(32), **fields}
        text = canonical_json({**content, "mac": self._mac(content)})
        line = self._check(text)
        data = self._data + text + b"\n"
        write_durable(self._path, data, PRIVATE)
        self._data = data
        self.lines.append(line)
        return line

    def _check(self, text: bytes) -> _Line:
        number, previous = self.head
        try:
            content = json.loads(text)
            mac = content.pop("mac")
            right = hmac.compare_digest(self._mac(content), mac) and canonical_json({**content, "mac": mac}) == text
        except (ValueError, KeyError, AttributeError, TypeError):
            raise self._damaged(number + 1) from None
        if not right or content.pop("seq") != number + 1 or content.pop("previous") != previous:
            raise self._damaged(number + 1)
        del content["salt"]
        return _Line(number + 1, hashlib.sha256(text).hexdigest(), content)

    def _mac(self, content: dict[str, Any]) -> str:
        message = self._path.name.encode() + b"\n" + canonical_json(content)
        return hmac.new(self._key, message, hashlib.sha256).hexdigest()

    def _damaged(self, number: int) -> LedgerError:
        return LedgerError(
            f"{self._path}: line {number} does not verify; expected an unbroken chain under this site's ledger.key. "
            "The file or the key was changed: no more is spent; put back both from the newest export (secfacmic "
            "ledger restore)"
        )


class Ledger:
    """The ledger of one site, read whole and checked whole at each opening. Open it through :func:`opened`.

    Args:
        folder: ``STATE/privacy``; must hold a ledger.

    Raises:
        LedgerError: it does not verify, or a file of it is missing.
        KeyFileError: the key is missing or readable by others.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        secret = _secret(read_private(folder / "ledger.key"), folder)
        self._hash_key = _derive(secret, "hash")
        self._entries = _ChainFile(folder / "ledger.jsonl", _derive(secret, "mac"))
        self._registry = _ChainFile(folder / "blocks.jsonl", _derive(secret, "mac"))
        for chain in (self._entries, self._registry):
            try:
                data = chain._path.read_bytes()
            except OSError as error:
                raise LedgerError(
                    f"{chain._path}: cannot be read ({error.strerror}), though this site has spent before; expected "
                    "it there: put it back from the newest export (secfacmic ledger restore)"
                ) from error
            chain.load(data)
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
                _ChainFile(new / "ledger.jsonl", _derive(secret, "mac")).append(opening)
                write_durable(new / "blocks.jsonl", b"", PRIVATE)
                write_durable(new / "ledger.key", f"{secret.hex()}\n".encode(), PRIVATE)
                new.rename(folder)
            sync_folder(folder.parent)
        except OSError as error:
            raise StorageError(f"{folder}: cannot be made ({error.strerror}); is another process making it?") from error

    def agree(self, account: Account) -> None:
        """Check that the site asks for what the ledger was opened for, and lower the budget if it asks for less.

        Raises:
            BudgetError: it asks for more, or for something else.
        """
        own = self.account
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

    # --- reading ---

    @property
    def head(self) -> tuple[int, str]:
        """Number and id of the last entry."""
        return self._entries.head

    def travelling(self, known: int) -> LedgerHead:
        """What travels with an update: the entry that committed it, with links to entries that others may hold.

        These are the newest that the journal shows, and of each run the last that travelled, the last but one and so
        on: whoever followed a run to its end, or missed some of its updates, finds the one it holds.

        Args:
            known: number of the newest head of this site that the journal shows; 0 without any.
        """
        lines = self._entries.lines
        runs: list[list[int]] = [[]]
        for line in lines:
            if line.fields["kind"] == "plan":
                runs.append([])
            elif line.fields["kind"] == "commit":
                runs[-1].append(line.seq)
        newest = max((seq for run in runs for seq in run), default=len(lines))
        earlier = [[seq for seq in run if seq < newest] for run in reversed(runs)]
        longest = max(map(len, earlier))
        named = [known, *(run[-back] for back in range(1, longest + 1) for run in earlier if len(run) >= back)]
        chosen = [seq for seq in dict.fromkeys(named) if 0 < seq < newest][:MAX_LINKS]
        links: tuple[Link, ...] = tuple((seq, lines[seq - 1].id[:SHORT]) for seq in sorted(chosen))
        return LedgerHead(newest, lines[newest - 1].id, links)

    def holds(self, seq: int, head: str) -> bool:
        """Whether an entry of that number and id is in this ledger; number 0 always is."""
        return seq == 0 or (seq <= len(self._entries.lines) and self._entries.lines[seq - 1].id == head)

    def mechanisms(self, block: int) -> list[Mechanism]:
        """All that was reserved on a block."""
        return [event.mechanism for event in self.events if block in event.blocks]

    def spent(self, block: int) -> float:
        """Epsilon spent on a block."""
        return epsilon_spent(self.mechanisms(block), self.account.delta)

    @property
    def epsilon_spent(self) -> float:
        """Of the fullest block; 0 without any."""
        return max((self.spent(block) for block in self.blocks), default=0.0)

    def plan(self, run: str) -> Plan | None:
        """The plan of a run, if it has one."""
        return self._plans.get(run)

    def _read(self) -> None:
        """Rebuild everything from the lines."""
        events: dict[int, Event] = {}
        self._plans: dict[str, Plan] = {}
        account: Account | None = None
        for line in self._entries.lines:
            fields = dict(line.fields)
            kind = fields.pop("kind")
            try:
                if kind == "open" and account is None and fields.pop("adjacency") == ADJACENCY:
                    account = Account(**fields)
                elif kind == "budget" and account is not None and fields["epsilon"] < account.epsilon:
                    account = Account(**{**account.__dict__, **fields})
                elif kind == "plan":
                    plan = Plan.model_validate_json(canonical_json(fields))  # JSON has no tuples
                    self._plans[plan.run] = plan
                elif kind == "reserve":
                    self._check_registry(fields)
                    blocks, purpose = tuple(fields["blocks"]), fields["purpose"]
                    events[line.seq] = Event(line.seq, blocks, purpose, _mechanism(fields), "reserved")
                elif kind in ("commit", "sent"):
                    state: State = "committed" if kind == "commit" else "sent"
                    events.update({seq: _with_state(events[seq], state) for seq in fields["events"]})
                else:
                    raise KeyError(kind)
            except (KeyError, TypeError, ValidationError):
                raise LedgerError(
                    f"{self._entries._path}: line {line.seq} is of a kind or form that this version does not know; "
                    "expected what it wrote itself: use the newest version of secfacmic that ran here"
                ) from None
        if account is None:
            raise LedgerError(f"{self._entries._path}: empty; expected the entry that opened it")
        self.account = account
        self.events = [events[seq] for seq in sorted(events)]
        self._units: dict[str, int] = {}
        self._images: dict[str, int] = {}
        for line in self._registry.lines:
            block = line.fields["block"]
            self._units.update((digest, block) for digest in line.fields["units"])
            self._images.update((digest, block) for digest in line.fields["images"])
        known = {line.fields["block"] for line in self._registry.lines}
        self.blocks = sorted(known | {block for event in self.events for block in event.blocks})
        training = {line.fields["block"] for line in self._registry.lines if line.fields["trains"]}
        self.training_blocks = sorted(training)

    def _check_registry(self, fields: Mapping[str, Any]) -> None:
        """An older registry under a newer ledger would open fresh blocks for known patients."""
        seq, head = fields["registry"]
        lines = self._registry.lines
        if seq > len(lines) or (seq and lines[seq - 1].id != head):
            raise LedgerError(
                f"{self._registry._path}: {len(lines)} lines; the ledger has seen line {seq} of another or longer "
                "one: put back both from the newest export (secfacmic ledger restore)"
            )

    # --- spending ---

    @property
    def validation_blocks(self) -> list[int]:
        """Blocks none of whose patients was ever registered for anything but validation."""
        return [block for block in self.blocks if block not in self.training_blocks]

    def register(
        self, patients: Mapping[str, Collection[bytes]], validation: Collection[str] = frozenset()
    ) -> dict[str, int]:
        """The block of each patient; patients that are new here open a new block together, those for validation
        another one.

        A patient is known by its id, or by the bytes of any of its images under another id. Who turns up in several
        blocks is counted in the fullest, so that nobody's spending is ever forgotten.

        Args:
            patients: SHA-256 digests of each patient's images, by id.
            validation: those that are only validated on. The block of any other is one that trains, from now on.

        Raises:
            StorageError: the blocks cannot be written.
        """
        fullness = {block: self.spent(block) for block in self.blocks}
        fresh: dict[bool, int] = {}
        blocks: dict[str, int] = {}
        changes: dict[int, tuple[list[str], list[str]]] = {}
        training: set[int] = set()
        for patient in sorted(patients):
            unit = self._hash("unit", patient.encode())
            images = [self._hash("image", digest) for digest in sorted(patients[patient])]
            known = [self._images[image] for image in images if image in self._images]
            if unit in self._units:
                known.append(self._units[unit])
            trains = patient not in validation
            if not known:
                known.append(fresh.setdefault(trains, max([0, *self.blocks, *fresh.values()]) + 1))
            block = max(known, key=lambda one: (fullness.get(one, 0.0), -one))
            if trains:
                training.add(block)
            blocks[patient] = block
            new_units = [unit] if self._units.get(unit) != block else []
            new_images = [image for image in images if self._images.get(image) != block]
            if new_units or new_images:
                units, digests = changes.setdefault(block, ([], []))
                units += new_units
                digests += new_images
                # Two new ids with one image are one patient's: they must meet in one block already here.
                self._units.update(dict.fromkeys(new_units, block))
                self._images.update(dict.fromkeys(new_images, block))
        for block in training.difference(self.training_blocks):
            changes.setdefault(block, ([], []))
        for block, (units, digests) in sorted(changes.items()):
            trains = block in training or block in self.training_blocks
            self._registry.append({"block": block, "units": units, "images": digests, "trains": trains})
        self._read()
        return blocks

    def make_plan(
        self,
        run: str,
        rounds: int,
        steps: int,
        clip: float,
        sampling_rate: float,
        means: MeanReleases = NO_MEANS,
        validation: Sequence[int] = (),
    ) -> Plan:
        """Plan and note the noise of a run, for its rounds and one more.

        The noise suits the fullest of the training blocks that have ``LEAST_SHARE`` of their budget left; blocks with
        less enter no plan. A site without any block plans with the whole budget.

        Args:
            run: its id.
            rounds: still to come, from 1.
            steps: noisy sums a round.
            clip: sensitivity of each.
            sampling_rate: share of the patients in each.
            means: which class means are to be released.
            validation: rounds in which validation counts are to be released.

        Raises:
            BudgetError: no block has enough left.
            StorageError: the plan cannot be written.
        """
        account = self.account
        total = (rounds + 1) * steps
        found = self._fullest(self.training_blocks, total, sampling_rate)
        if found is None:
            raise BudgetError(
                f"epsilon spent {self.epsilon_spent:.4f} of {account.epsilon:g}; expected at least "
                f"{100 * LEAST_SHARE:.0f} % of the budget (in squared mu) for a new run: this site takes part as an "
                "observer"
            )
        noise, share, mechanisms = found
        left = mu_squared_of(account.epsilon, account.delta) * share
        once = (LMMD_SHARE * left) ** -0.5
        each_round = once * (rounds + 1) ** 0.5
        note = means.why_not(each_round if means.each_round else once)
        if note is None:
            costs = [Mechanism(1.0, once, means.once)] if means.once else []
            costs += [Mechanism(1.0, each_round, rounds + 1)] if means.each_round else []
            planned = plan_noise([*mechanisms, *costs], account.epsilon, account.delta, total, sampling_rate)
            if planned is None:
                note = "off: with sampled steps nothing would be left for them"
            else:
                noise = planned
        on = note is None
        said = [f"{means.once} release{'s' * (means.once > 1)} at noise multiplier {once:.2f}"] * (means.once > 0)
        said += [f"one release a round at noise multiplier {each_round:.2f}"] * means.each_round
        counts, counts_note = self._plan_validation(validation)
        plan = Plan(
            run=run,
            rounds=rounds,
            steps=steps,
            clip=clip,
            noise_multiplier=noise * (1 + 100 * ROUNDING),  # so that the last round fits whatever the rounding
            sampling_rate=sampling_rate,
            lmmd_noise_multiplier=once if on and means.once else None,
            lmmd_round_noise_multiplier=each_round if on and means.each_round else None,
            lmmd_note=note or f"on ({means.use}): {' and '.join(said)}",
            validation_rounds=tuple(validation) if counts is not None else (),
            validation_noise_multiplier=counts,
            validation_note=counts_note,
        )
        self._entries.append({"kind": "plan", **plan.model_dump(mode="json")})
        self._read()
        return plan

    def _plan_validation(self, rounds: Sequence[int]) -> tuple[float | None, str]:
        """The noise multiplier of validation counts in these rounds and once more, and what is to be said of it."""
        if not rounds:
            return None, "off: the study asks for none"
        blocks = self.validation_blocks
        found = self._fullest(blocks, len(rounds) + 1, 1.0) if blocks or not self.blocks else None
        if found is None:
            return None, "off: no block of validation patients has enough of its budget left"
        noise = found[0] * (1 + 100 * ROUNDING)
        times = ", ".join(map(str, rounds))
        return noise, f"on: after rounds {times} at noise multiplier {noise:.2f}, from the validation patients' budget"

    def _fullest(
        self, blocks: Sequence[int], steps: int, sampling_rate: float
    ) -> tuple[float, float, list[Mechanism]] | None:
        """Of the blocks that have enough left, the fullest: the noise multiplier at which so many steps use up what
        it has left, the share of its budget (in squared mu) that this is, and what it has spent. Without any block, an
        empty one; None if none has enough."""
        epsilon, delta = self.account.epsilon, self.account.delta
        best = plan_noise([], epsilon, delta, steps, sampling_rate)
        assert best is not None  # an empty ledger pays for any plan
        spent = [self.mechanisms(block) for block in blocks] or [[]]
        noises = [(plan_noise(one, epsilon, delta, steps, sampling_rate), one) for one in spent]
        able = [(noise, one) for noise, one in noises if noise is not None and noise <= best * LEAST_SHARE**-0.5]
        if not able:
            return None
        noise, mechanisms = max(able, key=lambda pair: pair[0])
        return noise, (best / noise) ** 2, mechanisms

    def able(self, mechanism: Mechanism) -> list[int]:
        """The blocks that can pay for a release."""
        limit, delta = self.account.epsilon, self.account.delta
        return [block for block in self.blocks if epsilon_spent([*self.mechanisms(block), mechanism], delta) <= limit]

    def require(self, mechanism: Mechanism) -> None:
        """Refuse training that no block can pay for, before any data are read; known training blocks decide.

        Raises:
            BudgetError: none can, though there are some.
        """
        blocks = self.training_blocks
        if blocks and not set(self.able(mechanism)) & set(blocks):
            cost = epsilon_spent([*self.mechanisms(max(blocks, key=self.spent)), mechanism], self.account.delta)
            raise BudgetError(
                f"epsilon spent {self.epsilon_spent:.4f} of {self.account.epsilon:g}; this round would make it "
                f"{cost:.4f}; expected at most {self.account.epsilon:g}: this site takes part as an observer"
            )

    def reserve(self, mechanism: Mechanism, purpose: str, blocks: Sequence[int]) -> Event:
        """Spend, durably, before the data are touched. Nothing gives it back.

        Raises:
            BudgetError: a block cannot pay; nothing was spent.
            StorageError: it was not written; nothing was spent, and nothing may be computed.
        """
        able = self.able(mechanism)
        poor = [block for block in blocks if block not in able]
        if poor or not blocks:
            raise BudgetError(f"blocks {poor} cannot pay for {purpose}; expected some that can: {able}")
        line = self._entries.append(
            {
                "kind": "reserve",
                "blocks": list(blocks),
                "mechanism": "gaussian" if mechanism.sampling_rate >= 1 else "poisson-gaussian",
                "purpose": purpose,
                "sensitivity": mechanism.sensitivity,
                "noise_std": mechanism.noise_std,
                "steps": mechanism.steps,
                "sampling_rate": mechanism.sampling_rate,
                "registry": list(self._registry.head),
            }
        )
        self._read()
        return next(event for event in self.events if event.seq == line.seq)

    def commit(self, events: Sequence[int], output: bytes) -> None:
        """Note that the noised output of some events is stored. Once only: an event has one output.

        Raises:
            LedgerError: no such event, or it has an output already.
        """
        for seq in events:
            if self._event(seq).state != "reserved":
                raise LedgerError(f"event {seq} has an output already; expected one draw an event")
        self._entries.append({"kind": "commit", "events": list(events), "output": hashlib.sha256(output).hexdigest()})
        self._read()

    def mark_sent(self, still_open: Collection[str]) -> None:
        """Note that committed outputs were handed over, or their time is over.

        Args:
            still_open: purposes of the events that may not have been sent yet.
        """
        sent = [event.seq for event in self.events if event.state == "committed" and event.purpose not in still_open]
        if sent:
            self._entries.append({"kind": "sent", "events": sent})
            self._read()

    def _event(self, seq: int) -> Event:
        for event in self.events:
            if event.seq == seq:
                return event
        raise LedgerError(f"event {seq} is not in this ledger; expected one of {[event.seq for event in self.events]}")

    def state(self, seq: int) -> State:
        """How far an event came.

        Raises:
            LedgerError: no such event.
        """
        return self._event(seq).state

    def _hash(self, what: str, content: bytes) -> str:
        return hmac.new(self._hash_key, what.encode() + b"\n" + content, hashlib.sha256).hexdigest()[:32]

    # --- for people ---

    def summary(self) -> dict[str, Any]:
        """The ledger as a JSON document; anyone can recompute epsilon from its events."""
        account = self.account
        rows = [
            {
                "seq": event.seq,
                "block": block,
                "mechanism": "gaussian" if event.mechanism.sampling_rate >= 1 else "poisson-gaussian",
                "purpose": event.purpose,
                "sensitivity": event.mechanism.sensitivity,
                "noise_std": event.mechanism.noise_std,
                "steps": event.mechanism.steps,
                "sampling_rate": event.mechanism.sampling_rate,
                "mu_squared": event.mechanism.mu_squared,
                "state": event.state,
            }
            for event in self.events
            for block in event.blocks
        ]
        return {
            "site": account.site,
            "data": account.data,
            "simulated": account.data != "patients",
            "epsilon_spent": self.epsilon_spent,
            "epsilon_budget": account.epsilon,
            "delta": account.delta,
            "unit": account.unit,
            "adjacency": f"{ADJACENCY} {account.unit}",
            "claim": claim(account),
            "blocks": {str(block): self.spent(block) for block in self.blocks},
            "head": {"seq": self.head[0], "id": self.head[1]},
            "events": rows,
        }

    def export(self) -> bytes:
        """All three files as one, key included: to be kept as safe as the key."""
        files = {name: (self._folder / name).read_text(encoding="ascii") for name in _FILES}
        return canonical_json({"format": 1, "files": files}) + b"\n"


LMMD_SHARE = 0.12
"""Share of what is left (in squared mu) for each set of class means, be it released once or anew in every round
(docs/privacy.md, Cost and budget)."""

_FILES = ("ledger.jsonl", "blocks.jsonl", "ledger.key")


def claim(account: Account) -> str:
    """What the ledger claims, in the words of docs/privacy.md, "The claim"."""
    unit = f"one {account.unit}"
    text = (
        f"Everything that leaves site {account.site} is ({account.epsilon:g}, {account.delta:g})-differentially "
        f"private with respect to adding or removing any {unit} of that site, over the lifetime of this ledger, "
        "assuming correct code and the operating system's randomness, whatever the server, the other sites or "
        "outsiders do. Encryption additionally hides single updates from the server. Excluded: the declared number of "
        "patients N_ref, participation, configuration."
    )
    return text if account.data == "patients" else f"Simulated ({account.data} data): {text}"


@contextmanager
def opened(folder: Path) -> Iterator[Ledger]:
    """The ledger, held for this process alone and checked anew.

    Raises:
        StorageError: another process holds it.
        LedgerError, KeyFileError: as :class:`Ledger`.
    """
    with exclusive(folder):
        yield Ledger(folder)


def restore(folder: Path, export: bytes) -> Ledger:
    """Put an export in place of a lost or damaged ledger. It stays closed until server and peers confirm its head.

    Raises:
        LedgerError: the export does not verify, or a ledger that verifies is there and has gone further.
        StorageError: it cannot be written, or the ledger is in use.
    """
    try:
        content = json.loads(export)
        files = {name: content["files"][name].encode("ascii") for name in _FILES}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise LedgerError("the export cannot be read; expected a file made by secfacmic ledger export") from None
    make_folder(folder, 0o700)
    with exclusive(folder):
        with TemporaryDirectory(dir=folder, prefix=".restoring.") as trial:
            for name, data in files.items():
                write_durable(Path(trial) / name, data, PRIVATE)
            restored = Ledger(Path(trial))
        try:
            present = Ledger(folder)
        except (LedgerError, KeyFileError):
            pass  # lost or damaged, which is why it is being replaced
        else:
            if not restored.holds(*present.head):
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


def _mechanism(fields: Mapping[str, Any]) -> Mechanism:
    return Mechanism(fields["sensitivity"], fields["noise_std"], fields["steps"], fields["sampling_rate"])


def _with_state(event: Event, state: State) -> Event:
    return Event(event.seq, event.blocks, event.purpose, event.mechanism, state)

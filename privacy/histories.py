"""Who was in which release: every patient has a history of its own, and blocks are how equal ones are written down.

A patient is known by a keyed hash of its id; two ids that an operator links are one person from then on. What a person
may still take part in depends on its own history alone. A block is a set of persons with the same history: when a
release takes some of them, they leave the block for a new one, which keeps what the old one had spent by then.

``blocks.jsonl`` holds lines of five kinds:

``cohort``    persons that form a new block, which blocks they come from, how far the ledger had come, and what adopted
              ledgers told of their ids by then: in which of their blocks these were, and what was spent
``images``    digests of pictures that a person was seen with, so that it is known again under another id
``link``      two ids are one person; their histories add
``distinct``  two ids with equal pictures are two persons all the same
``adopt``     what a ledger of version 0.1 says of its patients, under that ledger's own hashes
"""

from __future__ import annotations

import hashlib
import hmac
import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from secure_fed.core.errors import LedgerError
from secure_fed.privacy.chain_file import ChainFile, Line

REGISTERED = "#"
"""Begins the name of a person whose id nobody has told in this process: the first digits of its hash follow."""

_SHOWN = 12


class Twins(NamedTuple):
    """Two ids with an equal picture, of which nobody has said whether they are one patient.

    Attributes:
        patient: an id in the site's data.
        other: another id there, or ``#`` and the beginning of the hash of one that was there before.
    """

    patient: str
    other: str


@dataclass(frozen=True)
class Block:
    """Persons with one history.

    Attributes:
        parents: the blocks whose histories it begins with, added; a block twice where two of its persons were linked.
        seen: number of the ledger's last entry when it began; later releases to its parents are not its own.
        carried: squared mu that was spent in adopted ledgers.
    """

    parents: tuple[int, ...]
    seen: int
    carried: float


class Histories:
    """The register of persons and blocks.

    Args:
        chain: ``blocks.jsonl``, loaded.
        hash_key: of the hashes.
    """

    def __init__(self, chain: ChainFile, hash_key: bytes) -> None:
        self._chain = chain
        self._hash_key = hash_key
        self._roots: dict[str, str] = {}  # of linked ids
        self._ids: dict[str, set[str]] = {}  # the other way round, itself among them
        self._block: dict[str, int] = {}  # by person
        self._owners: defaultdict[str, set[str]] = defaultdict(set)  # ids, by picture
        self._pictures: defaultdict[str, set[str]] = defaultdict(set)  # the other way round
        self._apart: set[frozenset[str]] = set()
        self._adopted: list[dict[str, Any]] = []
        self._taken_over: dict[str, float] = {}  # squared mu of adopted ledgers, by id
        self._old: defaultdict[str, set[tuple[int, str]]] = defaultdict(set)  # in which of their blocks it was, by id
        self._together: dict[str, float] = {}  # squared mu more, as ids of one person were in one release, by person
        self.blocks: dict[int, Block] = {}
        for line in chain.lines:
            try:
                self._take(line)
            except (KeyError, TypeError, ValueError):
                raise LedgerError(
                    f"{chain.path}: line {line.seq} is of a kind or form that this version does not know; expected "
                    "what it wrote itself: use the newest version of secfacmic that ran here"
                ) from None

    # --- reading ---

    @property
    def head(self) -> tuple[int, str]:
        """Number and id of the last line."""
        return self._chain.head

    def holds(self, seq: int, head: str) -> bool:
        """Whether the register has a line of that number and id."""
        return self._chain.holds(seq, head)

    def person(self, patient: str) -> str:
        """The person whose id this is."""
        return self._root(self._unit(patient))

    def block_of(self, person: str) -> int | None:
        """The person's block; None of one that was never registered."""
        return self._block.get(person)

    @property
    def members(self) -> dict[int, int]:
        """How many persons are in each block that has any."""
        return dict(sorted(Counter(self._block.values()).items()))

    def history(self, block: int, own: Mapping[int, Iterable[int]]) -> tuple[float, dict[int, int]]:
        """What a block's persons have spent: squared mu of adopted ledgers, and how often each was in which event.

        Args:
            block: its number.
            own: numbers of the events that name a block, by block.
        """
        facts = self.blocks[block]
        carried, found = facts.carried, Counter(own.get(block, ()))
        for parent in facts.parents:
            before, events = self.history(parent, own)
            carried += before
            found.update({event: times for event, times in events.items() if event <= facts.seen})
        return carried, dict(found)

    @property
    def adopted(self) -> dict[str, str]:
        """Of the adopted ledgers, the head that each had, by the id of its first entry."""
        return {one["ledger"]: one["head"] for one in self._adopted}

    def unsettled(self, pictures: Mapping[str, Collection[bytes]]) -> list[Twins]:
        """Pairs of ids with an equal picture that are neither linked nor told apart, sorted.

        Args:
            pictures: digests of each patient's pictures, by id; others that were registered before count as well.
        """
        names = {self._unit(patient): patient for patient in pictures}
        owners: defaultdict[str, set[str]] = defaultdict(set)
        for patient, digests in pictures.items():
            for digest in digests:
                picture = self._hash("picture", digest)
                owners[picture] |= self._owners.get(picture, set()) | {self._unit(patient)}
        found: set[Twins] = set()
        for units in owners.values():
            for unit in units & names.keys():
                for other in units - {unit}:
                    if self._root(unit) == self._root(other) or frozenset((unit, other)) in self._apart:
                        continue
                    pair = (names[unit], names.get(other, f"{REGISTERED}{other[:_SHOWN]}"))
                    found.add(Twins(*(sorted(pair) if other in names else pair)))
        return sorted(found)

    # --- writing ---

    def register(
        self, pictures: Mapping[str, Collection[bytes]], files: Mapping[str, Collection[bytes]], seen: int
    ) -> None:
        """Note who is in the site's data and by which pictures each is known again. Decides nothing.

        Args:
            pictures: digests of each patient's pictures, by id.
            files: digests of each patient's files, by which version 0.1 knew them; may lack patients.
            seen: number of the ledger's last entry.

        Raises:
            StorageError: it cannot be written.
        """
        news: dict[str, list[str]] = {}
        for patient in sorted(pictures):
            unit = self._unit(patient)
            fresh = sorted({self._hash("picture", one) for one in pictures[patient]} - self._pictures[unit])
            if fresh:
                news[unit] = fresh
        if news:
            self._append({"kind": "images", "images": news})
        missing: defaultdict[tuple[int | None, float], list[str]] = defaultdict(list)
        more: defaultdict[str, dict[str, float]] = defaultdict(dict)
        for patient in sorted(pictures):
            unit = self._unit(patient)
            self._old[unit] |= self._blocks_of_old(patient, files.get(patient, ()))
            carried = sum(self._adopted[place]["blocks"][block] for place, block in self._old[unit])
            of_person = more[self._root(unit)]
            if carried > self._taken_over.get(unit, 0.0):
                of_person[unit] = carried
        for person, units in more.items():
            block = self._block.get(person)
            if block is None or units:
                added = sum(carried - self._taken_over.get(unit, 0.0) for unit, carried in units.items())
                missing[block, added + self._more_together(person)].append(person)
        for (block, carried), persons in missing.items():
            told = {unit: total for person in persons for unit, total in more[person].items()}
            self._cohort(persons, () if block is None else (block,), seen, carried, told)

    def take_out(self, persons: Collection[str], seen: int) -> list[int]:
        """The blocks that hold exactly these persons; those that share theirs with others leave it for a new one.

        Args:
            persons: registered before.
            seen: number of the ledger's last entry.

        Raises:
            StorageError: the new blocks cannot be written.
        """
        wanted = set(persons)
        sizes = self.members
        by_block: defaultdict[int, list[str]] = defaultdict(list)
        for person in sorted(wanted):
            by_block[self._block[person]].append(person)
        found = []
        for block, inside in sorted(by_block.items()):
            whole = len(inside) == sizes[block]
            found.append(block if whole else self._cohort(inside, (block,), seen, 0.0, {}))
        return found

    def link(self, first: str, second: str, seen: int) -> None:
        """Two ids are one person from now on, whose history is that of both together.

        Args:
            first, second: ids, or ``#`` and the beginning of a registered one's hash.
            seen: number of the ledger's last entry.

        Raises:
            LedgerError: one names nobody, or both are one already.
            StorageError: it cannot be written.
        """
        one, other = self._find(first), self._find(second)
        if self._root(one) == self._root(other):
            raise LedgerError(f"{first} and {second} are one patient here already; nothing was changed")
        parents = [self._block[root] for root in (self._root(one), self._root(other)) if root in self._block]
        # The line is the link and the new block in one: a crash between two would forget a history.
        number = self._next
        carried = self._more_together(self._root(one), self._root(other))
        line = {"kind": "link", "units": [one, other], "block": number, "parents": parents, "seen": seen}
        self._append({**line, "carried": carried})

    def distinct(self, first: str, second: str) -> None:
        """Two ids with equal pictures are two patients all the same.

        Raises:
            LedgerError: one names nobody, or both are linked.
            StorageError: it cannot be written.
        """
        one, other = self._find(first), self._find(second)
        if self._root(one) == self._root(other):
            raise LedgerError(f"{first} and {second} are one patient here; a link is never taken back")
        self._append({"kind": "distinct", "units": [one, other]})

    def adopt(self, ledger: str, head: str, hash_key: bytes, spent: Mapping[str, Any]) -> None:
        """Take over what a ledger of version 0.1 says of its patients.

        Args:
            ledger: id of its first entry.
            head: id of its last entry.
            hash_key: of its hashes.
            spent: ``units`` and ``images``, by hash the block, ``blocks``, by block (as text) the squared mu, and
                ``events``, of each its squared mu and its blocks (as text).

        Raises:
            LedgerError: it was adopted before.
            StorageError: it cannot be written.
        """
        if ledger in self.adopted:
            raise LedgerError(
                f"this ledger (first entry {ledger[:16]}) was adopted before; expected each once: twice would count "
                "its patients twice"
            )
        self._append({"kind": "adopt", "ledger": ledger, "head": head, "key": hash_key.hex(), **spent})

    # --- lines ---

    def _append(self, fields: dict[str, Any]) -> None:
        self._take(self._chain.append(fields))

    def _take(self, line: Line) -> None:
        fields = line.fields
        kind = fields["kind"]
        if kind == "cohort":
            self.blocks[fields["block"]] = Block(tuple(fields["parents"]), fields["seen"], fields["carried"])
            self._block.update((person, fields["block"]) for person in fields["persons"])
            before = {person: self._taken_over.get(person, 0.0) + fields["carried"] for person in fields["persons"]}
            self._taken_over.update(fields.get("units", before))  # the line of an older release names no ids
            for unit, places in fields.get("old", {}).items():
                self._old[unit].update((place, block) for place, block in places)
            self._together.update(fields.get("together", {}))
        elif kind == "images":
            for unit, pictures in fields["images"].items():
                self._pictures[unit].update(pictures)
                for picture in pictures:
                    self._owners[picture].add(unit)
        elif kind == "link":
            one, other = (self._root(unit) for unit in fields["units"])
            self._roots[other] = one
            self._ids[one] = self._ids.pop(one, {one}) | self._ids.pop(other, {other})
            self._block.pop(other, None)
            carried = fields.get("carried", 0.0)  # an older release knew of none
            self._together[one] = self._together.get(one, 0.0) + self._together.pop(other, 0.0) + carried
            self.blocks[fields["block"]] = Block(tuple(fields["parents"]), fields["seen"], carried)
            self._block[one] = fields["block"]
        elif kind == "distinct":
            self._apart.add(frozenset(fields["units"]))
        elif kind == "adopt":
            self._adopted.append(fields)
        else:
            raise KeyError(kind)

    def _cohort(
        self, persons: Collection[str], parents: tuple[int, ...], seen: int, carried: float, units: Mapping[str, float]
    ) -> int:
        number = self._next
        self._append(
            {
                "kind": "cohort",
                "block": number,
                "parents": list(parents),
                "seen": seen,
                "carried": carried,
                "persons": sorted(persons),
                "units": dict(sorted(units.items())),
                "old": {unit: sorted(self._old[unit]) for unit in sorted(units)},
                "together": {
                    person: self._together.get(person, 0.0) + more
                    for person in sorted(persons)
                    if units and (more := self._more_together(person))
                },
            }
        )
        return number

    @property
    def _next(self) -> int:
        return max(self.blocks, default=0) + 1

    def _blocks_of_old(self, patient: str, files: Collection[bytes]) -> set[tuple[int, str]]:
        """The blocks of adopted ledgers, by their place and the block, that a patient's id or any file is in."""
        found: set[tuple[int, str]] = set()
        for place, old in enumerate(self._adopted):
            key = bytes.fromhex(old["key"])
            known = [old["units"].get(keyed_hash(key, "unit", patient.encode()))]
            known += [old["images"].get(keyed_hash(key, "image", digest)) for digest in files]
            found.update((place, str(block)) for block in known if block is not None)
        return found

    def _more_together(self, *persons: str) -> float:
        """Squared mu that some persons, if they are one, owe beside what was spent on each block that they were in.

        Who was n times in one release moved it by n times as much. Of an older adoption nobody knows which blocks were
        in one: of all, then, as that is the most.
        """
        units = [unit for person in persons for unit in self._ids.get(person, {person})]
        times = Counter(at for unit in units for at in self._old.get(unit, ()))
        owed = 0.0
        if times.total() < 2:
            return owed
        for place, old in enumerate(self._adopted):
            mine = {block: count for (at, block), count in times.items() if at == place}
            if "events" in old:
                for cost, blocks in old["events"]:
                    count = sum(mine.get(block, 0) for block in blocks)
                    owed += cost * (count * count - count)
            else:
                roots = sum(count * math.sqrt(old["blocks"][block]) for block, count in mine.items())
                owed += roots * roots - sum(count * old["blocks"][block] for block, count in mine.items())
        return max(0.0, owed - sum(self._together.get(person, 0.0) for person in persons))

    def _root(self, unit: str) -> str:
        while unit in self._roots:
            unit = self._roots[unit]
        return unit

    def _unit(self, patient: str) -> str:
        return self._hash("unit", patient.encode())

    def _find(self, name: str) -> str:
        known = self._pictures.keys() | self._block.keys()
        if not name.startswith(REGISTERED):
            unit = self._unit(name)
            if unit in known or unit in self._roots:
                return unit
            raise LedgerError(f"{name}: no patient of that id was ever registered here; expected one that was")
        found = [unit for unit in known if unit.startswith(name[1:])] if len(name) >= 1 + _SHOWN else []
        if len(found) != 1:
            raise LedgerError(f"{name}: {len(found)} registered patients begin so; expected one: copy it as told")
        return found[0]

    def _hash(self, what: str, content: bytes) -> str:
        return keyed_hash(self._hash_key, what, content)


def keyed_hash(key: bytes, what: str, content: bytes) -> str:
    """Hash by which an id or a picture is known, 32 hex digits; without the key nobody can try ids."""
    return hmac.new(key, what.encode() + b"\n" + content, hashlib.sha256).hexdigest()[:32]

"""The threat model's attacks, carried out against a throw-away federation of this installation.

Each attack is the attacker's own code against the real sites, coordinator and listener. It reports what it saw and
whether the defence held; it succeeds where its defence is taken out (``tests/integration/test_drill.py`` does so).
"""

from __future__ import annotations

import base64
import secrets
import shutil
import socket
import ssl
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from numpy.typing import NDArray

from secure_fed.clients.acceptance import record_acceptance, require_acceptance
from secure_fed.clients.budget import ledger_folder
from secure_fed.clients.site import Site
from secure_fed.clients.sitefile import SiteFile, SitePrivacy, read_site_file
from secure_fed.core.errors import (
    AggregateRefused,
    EnvelopeError,
    NotAcceptedError,
    ProtocolError,
    RecordError,
    SecfacmicError,
    SiteFileError,
    StorageError,
    StudyError,
)
from secure_fed.core.layout import ServerState
from secure_fed.core.storage import scratch_folder
from secure_fed.core.tomlfile import parse_table, read_toml, write_toml
from secure_fed.lab.simulation import Budget, accept_another_run, open_run, open_sites, prepare
from secure_fed.operate.new_study import SERVER
from secure_fed.privacy.ckks import Cipher
from secure_fed.privacy.keys import create_sealed_key, load_identity
from secure_fed.privacy.ledger import Ledger
from secure_fed.protocol.envelope import MAGIC as ENVELOPE_MAGIC
from secure_fed.protocol.envelope import MAX_HEADER, EnvelopeHeader
from secure_fed.protocol.ledger_heads import LedgerHead
from secure_fed.protocol.packing import Binding
from secure_fed.protocol.pads import PadPlace, SitePads, pad, without_masks
from secure_fed.protocol.records import new_header, read_header, sign_record
from secure_fed.protocol.residues import Residues, pack_residues, unpack_residues
from secure_fed.protocol.round_frames import (
    ARRIVED_MAGIC,
    COHORT_MAGIC,
    REVEAL_MAGIC,
    CohortHeader,
    RevealHeader,
    SignedWord,
    arrived_header,
    sign_cohort,
    sign_reveal,
    split_word,
)
from secure_fed.protocol.rounds import ReplyCode, RoundReply, RoundRequest
from secure_fed.protocol.share_frames import share_points, sign_checked, sign_gone
from secure_fed.protocol.shares import combine
from secure_fed.protocol.signing import ZERO_DIGEST, load_signing_key, parse_header, sign_frame, split_frame
from secure_fed.protocol.study import AgreedStudy, Template, read_template
from secure_fed.server.byte_store import ByteStore, Incoming, Outgoing
from secure_fed.server.coordinator import Coordinator, Step
from secure_fed.server.flower_link import SuperLink
from secure_fed.server.listener import STRANGERS
from secure_fed.transport.certificates import CA, create_authority

PATIENTS = 16
SLOW_CONNECTIONS = 100


@dataclass(frozen=True)
class Outcome:
    """How an attack ended: what the attacker saw, and whether the defence held."""

    seen: str
    held: bool


@dataclass(frozen=True)
class Attack:
    """One attack.

    Attributes:
        id: of the break, as in docs/threat-model.md.
        attacker: who does it.
        tried: what is done, in a sentence.
        carry_out: does it, in a copy of the ground that is its own.
        pads: whether the ground's study has pads.
    """

    id: str
    attacker: str
    tried: str
    carry_out: Callable[[Ground], Outcome]
    pads: bool = False


class Ground:
    """A throw-away federation: a small study of phantoms with keys, sites with budgets and a coordinator's folder."""

    def __init__(self, folder: Path, agreed: AgreedStudy) -> None:
        self.folder = folder
        self.agreed = agreed

    @classmethod
    def prepare(cls, folder: Path, pads: bool = False) -> Ground:
        """Make it, of a study with pads or without."""
        agreed = prepare(_template(pads), folder, None, budget=Budget(8.0, 1e-5, runs=2))
        for site in open_sites(agreed, folder):
            if agreed.study.site(site.name).role == "train":
                site.features()
        return cls(folder, agreed)

    def copy(self, folder: Path) -> Ground:
        """The same in another folder."""
        shutil.copytree(self.folder, folder, symlinks=True)
        return Ground(folder, self.agreed)

    def file(self, site: str) -> SiteFile:
        """A site's ``site.toml``."""
        return read_site_file(self.folder / "sites" / site / "site.toml")

    def sites(self) -> list[Site]:
        """The sites that train."""
        sites = open_sites(self.agreed, self.folder)
        return [site for site in sites if self.agreed.study.site(site.name).role == "train"]

    def without_budgets(self) -> Ground:
        """The same sites without their budgets."""
        for site in self.agreed.study.sites:
            self.without_budget(site.name)
        return self

    def without_budget(self, site: str) -> None:
        """Take one site's budget away."""
        path = self.folder / "sites" / site / "site.toml"
        file = read_toml(path, SiteFile, SiteFileError)
        write_toml(path, file.model_copy(update={"privacy": None}))
        shutil.rmtree(ledger_folder(self.file(site)), ignore_errors=True)

    def seal_key(self, epoch: int, previous: str = ZERO_DIGEST, **changes: Any) -> bytes:
        """A new key, as the key maker makes it."""
        maker = self.agreed.study.key_maker
        identity = load_identity(self.folder / "sites" / maker / "identity", maker)
        return create_sealed_key(self.agreed, identity, epoch, previous, **changes)

    @property
    def server_key(self) -> Ed25519PrivateKey:
        """What the server signs with."""
        return load_signing_key(ServerState(self.folder / SERVER).key)

    def begun(self) -> tuple[list[Site], Coordinator]:
        """Sites in a new run, none of whose rounds has begun."""
        sites = self.sites()
        return sites, open_run(self.agreed, self.folder, open_sites(self.agreed, self.folder))

    def another_run(self, key: str) -> Coordinator:
        """A run that the server opens alone."""
        folder = self.folder / SERVER
        return Coordinator.begin(self.agreed, folder, self.server_key, key)

    def rotated(self) -> tuple[list[Site], Coordinator]:
        """Sites in a run whose key was replaced after its first round."""
        sites, coordinator = self.begun()
        play_round(coordinator, sites)
        coordinator.amend(self.seal_key(2, coordinator.journal.chain.key))
        for _ in range(2):  # the amendment, then its checkpoint
            step(coordinator, sites)
        play_round(coordinator, sites)
        return sites, coordinator


def step(coordinator: Coordinator, sites: list[Site]) -> None:
    """Ask every site what the round asks now, and take the step."""
    for site in sites:
        while ask(coordinator, site).code == ReplyCode.MORE:
            pass
    coordinator.advance()


def up_to(due: Step, coordinator: Coordinator, sites: list[Site]) -> None:
    """All steps before one, of which nobody is asked yet."""
    while coordinator.step is not due:
        step(coordinator, sites)


def play_round(coordinator: Coordinator, sites: list[Site]) -> None:
    """All steps of the round that is due, to its record."""
    due = coordinator.round
    while coordinator.round == due:
        step(coordinator, sites)


def ask(coordinator: Coordinator, site: Site) -> RoundReply:
    """One request and reply."""
    reply = answer(coordinator, site)
    coordinator.receive(reply)
    return reply


def answer(coordinator: Coordinator, site: Site) -> RoundReply:
    """A reply that the server has not taken yet."""
    return site.respond(coordinator.request(site.name, site.run, site.position))


def drill(tell: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Carry out all attacks.

    Args:
        tell: is told of each before it begins.

    Returns:
        ``{"version", "attacks": [{"id", "attacker", "tried", "seen", "held"}]}``.

    Raises:
        StorageError: this machine lacks room; no attack is taken for one that was held off for it.
        SecfacmicError: the federation itself cannot be made.
    """
    rows = []
    with scratch_folder() as folder:
        tell("preparing")
        grounds = {pads: Ground.prepare(folder / f"ground-{int(pads)}", pads)
                   for pads in {attack.pads for attack in ATTACKS}}  # fmt: skip
        for attack in ATTACKS:
            tell(attack.id)
            outcome = attack.carry_out(grounds[attack.pads].copy(folder / attack.id))
            shutil.rmtree(folder / attack.id)
            facts = {"id": attack.id, "attacker": attack.attacker, "tried": attack.tried}
            rows.append({**facts, "seen": outcome.seen, "held": outcome.held})
    return {"version": version("secfacmic"), "attacks": rows}


def _template(pads: bool) -> Template:
    content = read_template(Path("demo")).model_dump(mode="json", exclude_none=True)
    for group in content["simulation"]["phantoms"]:
        group |= {"patients": PATIENTS, "class_mix": [0.25] * 4}
    content |= {
        "name": "drill",
        "rounds": 3,
        "backbone": {"model": "random-small", "weights": "random", "seed": 1},
        "method": {"adapter": "text_head"},
        "privacy": {"steps": 2},
        "collusion": int(pads),
    }
    return parse_table(content, Template, StudyError, "the drill's study")


def _told(error: SecfacmicError) -> str:
    """A refusal in words.

    Raises:
        StorageError: it is none: the attack ended for want of room, as it would have without any defence.
    """
    if isinstance(error, StorageError):
        raise error
    return f"refused ({type(error).__name__})"


def _refused(tries: dict[str, Callable[[], object]]) -> Outcome:
    """Carry out several tries, each of which has to be refused."""
    seen = {}
    for what, carry_out in tries.items():
        try:
            carry_out()
        except SecfacmicError as error:
            seen[what] = _told(error)
        else:
            seen[what] = "went through"
    held = all(text.startswith("refused") for text in seen.values())
    return Outcome("; ".join(f"{what}: {text}" for what, text in seen.items()), held)


# --- the server alone ---


def _second_run(ground: Ground) -> Outcome:
    sites, coordinator = ground.rotated()
    site, rotated = sites[0], coordinator.journal.chain.key

    def under_a_new_key() -> None:
        key = site.replica.keys.accept(ground.seal_key(3)).key
        site.respond(ground.another_run(key).request(site.name, "", 0))

    def under_the_rotated_key() -> None:
        accept_another_run(ground.agreed, ground.folder)
        sites[1].respond(ground.another_run(rotated).request(sites[1].name, "", 0))

    return _refused(
        {"a new key, no word of the site's people": under_a_new_key, "the rotated key": under_the_rotated_key}
    )


def _bogus_key(ground: Ground) -> Outcome:
    sites, _ = ground.rotated()
    ledger = ledger_folder(ground.file(sites[0].name))
    before = Ledger(ledger).summary()["epsilon_spent"]
    accept_another_run(ground.agreed, ground.folder)
    told = "it answered"
    try:
        sites[0].respond(ground.another_run(secrets.token_hex(32)).request(sites[0].name, "", 0))
    except SecfacmicError as error:
        told = _told(error)
    after = Ledger(ledger).summary()["epsilon_spent"]
    return Outcome(f"{told}; epsilon spent {before:.3f} before, {after:.3f} after", after == before)


def _bent_sum(ground: Ground) -> Outcome:
    sites, coordinator = ground.begun()
    step(coordinator, sites)
    for site in sites:
        ask(coordinator, site)
    chain = coordinator.journal.chain
    total = np.array(coordinator._total)
    total.flat[0] = (int(total.flat[0]) + 1) % chain.wire.modulus
    coordinator._total = total
    coordinator.advance()
    for site in sites:
        ask(coordinator, site)  # no site can tell: it knows its own envelope only
    assert coordinator._arrived is not None
    header = new_header(
        chain,
        "aggregate",
        run=chain.run,
        key=chain.key,
        round_number=coordinator.round,
        contributors=coordinator._arrived.envelopes,
        reveals=tuple(coordinator._reveals[name] for name in coordinator._arrived.names),
        times_ms=(1, 2),
        payload=coordinator._sum(),
    )
    data = sign_record(header, coordinator._sum(), ground.server_key)
    with mock.patch.object(Cipher, "open", side_effect=AggregateRefused("opened")) as opened:
        try:
            sites[0].respond(RoundRequest(coordinator.round + 1, 0, (data,), more=False))
            told = "taken"
        except RecordError:
            told = "refused"
    seen = f"one residue of the sum more by 1: {told}; decrypted {opened.call_count} times"
    return Outcome(seen, told == "refused" and not opened.called)


def _older_disk(ground: Ground) -> Outcome:
    """Two copies of a site's disk, each put back after its REVEAL of round 2: of before round 1, and of before round 2.

    Under the first a server that withholds what it has of the site asks for a second REVEAL.
    """
    sites, coordinator = ground.without_budgets().begun()
    site = sites[0]
    state = ground.file(site.name).state_folder.path
    copies = [ground.folder / f"copy{number}" for number in (1, 2)]
    shutil.copytree(state, copies[0])
    play_round(coordinator, sites)
    for _ in range(3):  # to its REVEAL
        if coordinator.step is Step.READY and not copies[1].exists():
            shutil.copytree(state, copies[1])
        for each in sites:
            ask(coordinator, each)
        if coordinator.step is not Step.REVEAL:
            coordinator.advance()

    def put_back(copy: Path) -> Site:
        shutil.rmtree(state)
        shutil.copytree(copy, state)
        return Site.open(ground.folder / "sites" / site.name / "site.toml")

    seen = []
    for what, copy, honest in (("a copy of round 1", copies[0], False), ("a copy of round 2", copies[1], True)):
        older = put_back(copy)
        request = coordinator.request(older.name, older.run, older.position)
        older.respond(request if honest else replace(request, past=b""))
        try:
            code = _second_reveal(ground, coordinator, older)
        except SecfacmicError as error:
            code = _told(error)
        seen.append((what, code))
    coordinator.advance()
    goes_on = ask(coordinator, older).code == ReplyCode.READY
    held = goes_on and all(code == ReplyCode.SITS_OUT for _, code in seen)
    told = "; ".join(f"{what}, asked for a second REVEAL: {code}" for what, code in seen)
    return Outcome(f"{told}; goes on with round {coordinator.round}: {goes_on}", held)


def _second_reveal(ground: Ground, coordinator: Coordinator, site: Site) -> str:
    """Ask a site for the envelope of the attempt that is there, then for its REVEAL of another sum."""
    chain, cohort, arrived = coordinator.journal.chain, coordinator._cohort, coordinator._arrived
    assert cohort is not None
    assert arrived is not None
    asked = RoundRequest(coordinator.round, coordinator.attempt, (), more=False, question=cohort.data)
    reply = site.respond(asked)
    if reply.code != ReplyCode.UPDATE:
        return reply.code
    frame = split_frame(ENVELOPE_MAGIC, reply.envelope, MAX_HEADER, EnvelopeError)
    words = dict(zip(cohort.names, arrived.envelopes, strict=True))
    words[site.name] = SignedWord.of(frame.header, frame.signature)
    facts = (7, "5" * 64)
    attempt = coordinator.attempt
    header = arrived_header(ground.agreed, chain.due, attempt, cohort.digest, facts, tuple(words.values()))
    question = sign_frame(ARRIVED_MAGIC, header, ground.server_key, b"")
    return site.respond(replace(asked, question=question)).code


def _slipped_amendment(ground: Ground) -> Outcome:
    sites, coordinator = ground.begun()
    step(coordinator, sites)
    for site in sites:
        ask(coordinator, site)
    chain = coordinator.journal.chain
    leaving = next(site.name for site in sites if site.name != ground.agreed.study.key_maker)
    sealed = ground.seal_key(2, chain.key, members=chain.members, removed=(leaving,))
    coordinator.journal.append_amendment(sealed)
    stays = next(site for site in sites if site.name != leaving)
    return _refused({f"{leaving} removed while its envelope is out": lambda: answer(coordinator, stays)})


def _split_cohort(ground: Ground) -> Outcome:
    sites, coordinator = ground.begun()
    for site in sites:
        ask(coordinator, site)
    halves = [sorted(coordinator._readies)[half::2] for half in (0, 1)]

    def show(half: list[str]) -> Callable[[], object]:
        words = [coordinator._readies[name] for name in half]
        due = coordinator.journal.chain.due
        question = sign_cohort(ground.agreed, due, coordinator.attempt, words, ground.server_key)
        site = next(site for site in sites if site.name == half[0])
        request = RoundRequest(coordinator.round, coordinator.attempt, (), more=False, question=question)
        return lambda: site.respond(request)

    return _refused({f"a round of {' and '.join(half)} alone": show(half) for half in halves})


def _two_records(ground: Ground) -> Outcome:
    """Have one site reveal upon the record of round 2, the others give that one up, and then the round before."""
    sites, coordinator = ground.begun()
    for _ in range(2):
        play_round(coordinator, sites)
    up_to(Step.REVEAL, coordinator, sites)
    shown, others = sites[-1], sites[:-1]
    ask(coordinator, shown)
    for site in others:
        site.void(2)
        ask(coordinator, site)
    coordinator.advance()
    for site in sites:
        ask(coordinator, site)  # takes the void
    return _refused(
        {f"{site.name} gives up a round on whose record it has revealed": partial(site.void, 1)
         for site in sites}
    )  # fmt: skip


# --- one site ---


def _liar(ground: Ground, sites: list[Site]) -> Site:
    return next(site for site in sites if site.name != ground.agreed.study.key_maker)


def _close_with_garbage(coordinator: Coordinator, sites: list[Site], liar: Site) -> None:
    """A round in which one site's signed envelope pushes the sum out of range, under a right check."""
    step(coordinator, sites)
    true = liar._integers

    def garbage() -> tuple[NDArray[np.int64], LedgerHead]:
        integers, head = true()
        return np.full_like(integers, 4 * liar._agreed.lanes.max_integer), head

    liar._integers = garbage  # type: ignore[method-assign]
    values = garbage()[0]
    with (
        mock.patch("secure_fed.privacy.ckks.check_integers"),
        mock.patch.object(Cipher, "open", return_value=values),  # it does not look at what it sends
    ):
        ask(coordinator, liar)
    for site in sites:
        if site is not liar:
            ask(coordinator, site)
    coordinator.advance()
    liar._integers = true  # type: ignore[method-assign]
    play_round(coordinator, sites)


def _remove(ground: Ground, coordinator: Coordinator, sites: list[Site], liar: Site) -> list[Site]:
    """What people do about it; who stays."""
    chain = coordinator.journal.chain
    coordinator.amend(ground.seal_key(2, chain.key, members=chain.members, removed=(liar.name,)))
    staying = [site for site in sites if site is not liar]
    for _ in range(2):  # the amendment, then its checkpoint
        step(coordinator, staying)
    return staying


def _false_refusal(ground: Ground) -> Outcome:
    sites, coordinator = ground.begun()
    play_round(coordinator, sites)
    liar = _liar(ground, sites)
    position = len(coordinator.journal.records)
    coordinator.receive(RoundReply(liar.name, ReplyCode.REFUSED_AGGREGATE, coordinator.run, position, "", b""))
    if coordinator.paused:
        return Outcome(f"{liar.name} alone says that the sum is out of range: the study stops", False)
    play_round(coordinator, sites)
    return Outcome(f"{liar.name} alone says that the sum is out of range: round 2 was closed", True)


def _garbage(ground: Ground) -> Outcome:
    sites, coordinator = ground.begun()
    liar = _liar(ground, sites)
    before = sites[0].adapter_digest
    _close_with_garbage(coordinator, sites, liar)
    codes = {ask(coordinator, site).code for site in sites if site is not liar}
    same = {site.adapter_digest for site in sites} == {before}
    if codes != {ReplyCode.REFUSED_AGGREGATE} or not coordinator.paused or not same:
        return Outcome(f"the others said {', '.join(sorted(codes))}; adapter as before: {same}", False)
    staying = _remove(ground, coordinator, sites, liar)
    play_round(coordinator, staying)
    return Outcome(f"paused, adapter as before; went on to round {coordinator.round} without {liar.name}", True)


def _second_sum(ground: Ground) -> Outcome:
    """Take two sums at one adapter, and with the people's word show whose update their difference is.

    A second run is refused as in B1, whose row counts that.
    """
    without, more, run = (ground.copy(ground.folder.with_name(f"{ground.folder.name}-{number}")) for number in range(3))
    found = [_after_a_void(without, newcomer=False), _after_a_void(more, newcomer=True)]
    seen = [outcome.seen for outcome in found] + [_in_another_run(run)]
    return Outcome("; ".join(seen), all(outcome.held for outcome in found))


def _after_a_void(ground: Ground, newcomer: bool) -> Outcome:
    """The second sum once the first one's record was taken back: without a site that was in it, or with one more."""
    sites, coordinator = ground.without_budgets().begun()
    victim = _liar(ground, sites)
    others = [site for site in sites if site is not victim]
    play_round(coordinator, others if newcomer else sites)
    first = coordinator.journal.read(len(coordinator.journal.records) - 1)
    for word in (lambda site: None, lambda site: site.void(1)):
        for site in sites:
            word(site)
            ask(coordinator, site)
    coordinator.advance()
    for site in sites:
        ask(coordinator, site)  # takes the void
    coordinator._folder.revealed.unlink()  # an honest server would take the cohort that had revealed, and no other
    if not newcomer:
        victim.retire()
        step(coordinator, sites)
    step(coordinator, sites)
    refused = _refused({"": lambda: answer(coordinator, others[0])})
    for site in sites if newcomer else others:
        site.release()
    coordinator.fail([])
    play_round(coordinator, sites)
    second = coordinator.journal.read(len(coordinator.journal.records) - 1)
    difference = _sum_in(ground, first, others[0]) - _sum_in(ground, second, others[0])
    own, _ = victim._integers()
    exact = np.array_equal(abs(difference), abs(own)) and bool(own.any())
    what = f"a newcomer to it, {victim.name}" if newcomer else f"it was taken back, and {victim.name} left"
    return Outcome(f"a second sum at the adapter of the first after {what}{refused.seen}; by all people's word the "
                   f"difference is the update of {victim.name}: {exact}", refused.held)  # fmt: skip


def _in_another_run(ground: Ground) -> str:
    sites, coordinator = ground.without_budgets().begun()
    victim = _liar(ground, sites)
    others = [site for site in sites if site is not victim]
    play_round(coordinator, sites)
    first = coordinator.journal.read(len(coordinator.journal.records) - 1)
    own, _ = victim._integers()
    total, sealed = _sum_in(ground, first, others[0]), ground.seal_key(coordinator.journal.chain.amendment + 2)
    (key,) = {site.replica.keys.accept(sealed).key for site in sites}
    coordinator = ground.another_run(key)
    refused = _refused({"in a second run": lambda: ask(coordinator, others[0])})
    accept_another_run(ground.agreed, ground.folder)
    play_round(coordinator, others)
    second = coordinator.journal.read(len(coordinator.journal.records) - 1)
    difference = (total - _sum_in(ground, second, others[0])).astype(float)
    cosine = difference @ own / (np.linalg.norm(difference) * np.linalg.norm(own))
    return f"{refused.seen}; by that word the difference has cosine {cosine:.3f} with the update of {victim.name}"


def _sum_in(ground: Ground, data: bytes, site: Site) -> NDArray[np.int64]:
    """What a member reads in a record of the first round."""
    _, header = read_header(data, ground.agreed)
    entries = [parse_header(word.signed[0], EnvelopeHeader, EnvelopeError) for word in header.contributors]
    place = Binding(run=header.run, head=entries[0].head, round=header.round)
    sealer = site.replica._sealer(header.key, header.round)
    return sealer.open(data[len(data) - header.size :], place, [entry.contribution for entry in entries])


def _mixed_budgets(ground: Ground) -> Outcome:
    """Take a sum over all sites, of which one has no budget, and after a void one over the others alone."""
    victim = next(site.name for site in ground.agreed.study.sites if site.role == "train")
    ground.without_budget(victim)
    sites, coordinator = ground.begun()
    (bare,) = [site for site in sites if site.name == victim]
    others = [site for site in sites if site is not bare]
    play_round(coordinator, sites)
    first = coordinator.journal.read(len(coordinator.journal.records) - 1)
    for site in others:
        ask(coordinator, site)  # takes the record
        site.void(1)
        ask(coordinator, site)
    coordinator.advance()
    coordinator._folder.revealed.unlink()  # an honest server would take the cohort that had revealed, and no other
    try:
        play_round(coordinator, others)
    except SecfacmicError as error:
        return Outcome(f"a second sum, over the {len(others)} that have a budget: {_told(error)}",
                       True)  # fmt: skip
    second = coordinator.journal.read(len(coordinator.journal.records) - 1)
    difference = _sum_in(ground, first, others[0]) - _sum_in(ground, second, others[0])
    own, _ = bare._integers()
    return Outcome(f"a second sum, over the {len(others)} that have a budget: went through; the difference is the "
                   f"update of {victim}: {np.array_equal(difference, own)}", False)  # fmt: skip


def _wrong_check(ground: Ground) -> Outcome:
    sites, coordinator = ground.begun()
    for _ in range(2):
        step(coordinator, sites)
    liar = _liar(ground, sites)
    replies = {site.name: answer(coordinator, site) for site in sites}
    assert coordinator._arrived is not None
    wrong = sign_reveal(ground.agreed, coordinator._arrived.digest, liar.name, (1, 2), liar.replica.identity.signing)
    for name, reply in replies.items():
        coordinator.receive(replace(reply, envelope=wrong) if name == liar.name else reply)
    try:
        coordinator.advance()
    except SecfacmicError as error:
        return Outcome(f"the server ends ({type(error).__name__})", False)
    named = sorted(coordinator.asked)
    coordinator.receive(replies[liar.name])
    closed = coordinator.advance() is not None
    return Outcome(f"{', '.join(named) or 'nobody'} is asked again; with its true check the round closes: {closed}",
                   named == [liar.name] and closed)  # fmt: skip


def _odd_words(ground: Ground) -> Outcome:
    sites, coordinator = ground.begun()
    play_round(coordinator, sites)
    liar = _liar(ground, sites)
    coordinator.amend(ground.seal_key(2, coordinator.journal.chain.key))
    step(coordinator, sites)
    try:
        for site in sites:
            garbled = mock.patch.object(type(site.replica), "_checkpoint_digest", return_value="6" * 64)
            with garbled if site is liar else nullcontext():
                reply = answer(coordinator, site)
            coordinator.receive(replace(reply, attestation="ä" * 64) if site is liar else reply)
        coordinator.advance()
        play_round(coordinator, sites)
    except SecfacmicError as error:
        return Outcome(f"the study ends ({type(error).__name__})", False)
    return Outcome(f"left out; the others went on to round {coordinator.round}", coordinator.round == 3)


def _impossible_counts(ground: Ground) -> Outcome:
    sites, coordinator = ground.without_budgets().begun()
    liar = _liar(ground, sites)
    true = liar._quantise
    liar._quantise = lambda update, draws, counts=(0, 0): true(update, draws, (-988, 988))  # type: ignore[method-assign]
    play_round(coordinator, sites)
    ask(coordinator, sites[0])
    counts = sites[0].replica.state.validation
    assert counts is not None
    seen = f"-988 images, 988 of them right: taken as {counts.correct} of {counts.images}"
    return Outcome(seen, 0 <= counts.correct <= counts.images)


# --- sites and the server together ---


def _one_update(ground: Ground) -> Outcome:
    sites, coordinator = ground.begun()
    up_to(Step.REVEAL, coordinator, sites)
    victim, colluder = sites[1], sites[0]
    header = coordinator._envelopes[victim.name].header
    lanes = ground.agreed.layout(header.round).lanes
    place = PadPlace(ground.agreed.study.id, header.position, header.attempt, header.cohort)
    reply = answer(coordinator, victim)  # with the seed of its mask
    seed = parse_header(split_word(REVEAL_MAGIC, reply.envelope).signed[0], RevealHeader, EnvelopeError).mask
    assert seed is not None
    left = unpack_residues(coordinator._payload(victim.name), lanes.modulus_bits)
    left = without_masks(left, place, {victim.name: bytes.fromhex(seed)}, lanes.modulus)
    own = colluder.replica.files.bound
    assert own.padded is not None
    theirs = SitePads(
        place, dict(zip(own.names, own.padded.keys, strict=True)), colluder.name, bytes.fromhex(own.padded.private)
    )
    known = pad(theirs.pad_key(victim.name), left.size, lanes.modulus)
    for sign in (known, np.uint64(lanes.modulus) - known, np.zeros_like(known)):
        if _opens(ground, colluder, (left + sign) % np.uint64(lanes.modulus), [header]):
            return Outcome(f"the update of {victim.name} opened, with the key and the pads of {colluder.name}", False)
    return Outcome(f"with the key, its mask and {colluder.name}'s pads, the envelope of {victim.name} stays closed",
                   True)  # fmt: skip


def _opens(ground: Ground, site: Site, residues: Residues, headers: list[EnvelopeHeader]) -> bool:
    """Whether a site's key opens residues as the sum of these envelopes."""
    first = headers[0]
    lanes = ground.agreed.layout(first.round).lanes
    binding = Binding(run=first.run, head=first.head, round=first.round)
    try:
        site.replica._sealer(first.key, first.round).open(
            pack_residues(residues, lanes.modulus_bits), binding, [header.contribution for header in headers]
        )
    except AggregateRefused:
        return False
    return True


def _nested_cohorts(ground: Ground) -> Outcome:
    """Close a round without one site, after an attempt with it that failed before its sum was fixed, or that was given
    up after: were both sums open, their difference would be its update."""
    outcomes = [
        _nested(ground.copy(ground.folder / "attempts"), Step.CHECKED),
        _nested(ground.copy(ground.folder / "voids"), Step.REVEAL),
    ]
    return Outcome("; ".join(outcome.seen for outcome in outcomes), all(outcome.held for outcome in outcomes))


def _nested(ground: Ground, step: Step) -> Outcome:
    sites, coordinator = ground.begun()
    up_to(step, coordinator, sites)
    headers = [coordinator._envelopes[name].header for name in sorted(coordinator._envelopes)]
    lanes, first = ground.agreed.layout(1).lanes, headers[0]
    total = unpack_residues(coordinator._sum(), lanes.modulus_bits)
    place = PadPlace(ground.agreed.study.id, first.position, first.attempt, first.cohort)
    last, staying, known = sites[-1], sites[:-1], {}
    if step is Step.CHECKED:
        coordinator.fail([last.name])
    else:
        known = _given_up(ground, coordinator, staying, last)
    play_round(coordinator, staying)
    if not known:
        _, record = read_header(coordinator.journal.read(len(coordinator.journal.records) - 1), ground.agreed)
        known = dict(zip(sorted(site.name for site in staying), record.masks, strict=True))
    seeds = {header.site: bytes.fromhex(known.get(header.site, "00" * 32)) for header in headers}
    opened = _opens(ground, sites[0], without_masks(total, place, seeds, lanes.modulus), headers)
    what = "an attempt" if step is Step.CHECKED else "a round that was given up,"
    seen = f"{what} of {len(headers)} sites, beside the closed one of {len(staying)}: "
    return Outcome(seen + ("opened: one site's update is the difference" if opened else "stays closed"), not opened)


def _given_up(ground: Ground, coordinator: Coordinator, staying: list[Site], last: Site) -> dict[str, str]:
    """All but one reveal, and give the round up then; their masks, and the last one's too if they hand out its shares
    after that."""
    arrived, needed = coordinator._arrived, coordinator.journal.chain.quorum.needed
    assert arrived is not None
    known, points = {}, {}
    due, names = coordinator.journal.chain.due, arrived.names
    question = sign_gone(ground.agreed, due, coordinator.attempt, arrived.digest, last.name, ground.server_key)
    for site in staying:
        word = ask(coordinator, site).envelope
        mask = parse_header(split_word(REVEAL_MAGIC, word).signed[0], RevealHeader, EnvelopeError).mask
        assert mask is not None
        known[site.name] = mask
        site.void(coordinator.round)
        carried = coordinator._shares.handed(last.name, site.name) + coordinator._payload(last.name)
        reply = site.respond(RoundRequest(1, coordinator.attempt, (), more=False, question=question, carried=carried))
        if reply.code == ReplyCode.WITNESSED:
            points[share_points(names, last.name)[site.name]] = reply.carried
    if len(points) >= needed:
        known[last.name] = combine(points).hex()
    step(coordinator, staying)  # the void
    return known


def _two_attempts(ground: Ground) -> Outcome:
    """Ask for a REVEAL of an attempt that was left, and for another attempt after a REVEAL."""
    sites, coordinator = ground.begun()
    up_to(Step.REVEAL, coordinator, sites)
    old, attempt = coordinator._arrived, coordinator.attempt
    assert old is not None
    coordinator._next_attempt()
    up_to(Step.REVEAL, coordinator, sites)
    site = sites[0]
    left = RoundRequest(1, attempt, (), more=False, question=old.data, carried=old.carried)
    before = _refused({"a REVEAL for the attempt before": lambda: site.respond(left)})
    for each in sites:
        answer(coordinator, each)  # they reveal; the server keeps that for itself
    coordinator._left_out.add(sites[-1].name)
    coordinator._next_attempt()

    def another() -> None:
        while coordinator.step in (Step.READY, Step.ENVELOPE):
            step(coordinator, sites[:-1])

    after = _refused({"an envelope for another attempt after the REVEAL": another})
    return Outcome(f"{before.seen}; {after.seen}", before.held and after.held)


def _two_sums(ground: Ground) -> Outcome:
    """Show sites of one attempt different cohorts, and ask a site that has revealed for another sum of it."""
    sites, coordinator = ground.begun()
    up_to(Step.ENVELOPE, coordinator, sites)
    chain, cohort = coordinator.journal.chain, coordinator._cohort
    assert cohort is not None
    words = parse_header(split_frame(COHORT_MAGIC, cohort.data, 10**6, ProtocolError).header, CohortHeader,
                         ProtocolError).readies  # fmt: skip
    other = sign_cohort(ground.agreed, chain.due, 1, words[1:], ground.server_key)
    last = next(site for site in sites if site.name == cohort.names[-1])
    split = last.respond(RoundRequest(1, 1, (), more=False, question=other)).envelope
    for site in sites:
        if site is not last:
            ask(coordinator, site)
    frame = split_frame(ENVELOPE_MAGIC, split, MAX_HEADER, EnvelopeError)
    theirs = [SignedWord.of(coordinator._envelopes[name].header_text, coordinator._envelopes[name].signature)
              for name in cohort.names[:-1]]  # fmt: skip
    mixed = (*theirs, SignedWord.of(frame.header, frame.signature))

    def arrived(digest: str, names: tuple[SignedWord, ...], total: str) -> bytes:
        facts = coordinator._wire.payload_bytes, total
        header = arrived_header(ground.agreed, chain.due, coordinator.attempt, digest, facts, names)
        return sign_frame(ARRIVED_MAGIC, header, ground.server_key, b"")

    first = sites[0]
    question = RoundRequest(1, 1, (), more=False, question=arrived(cohort.digest, mixed, "5" * 64))
    before = _refused({"an ARRIVED over two cohorts": lambda: first.respond(question)})
    coordinator._next_attempt()
    up_to(Step.REVEAL, coordinator, sites)
    fixed, cohort = coordinator._arrived, coordinator._cohort
    assert fixed is not None
    assert cohort is not None
    ask(coordinator, first)
    second = arrived(cohort.digest, fixed.envelopes, "5" * 64)
    asked = RoundRequest(1, coordinator.attempt, (), more=False, question=second, carried=fixed.carried)
    after = _refused({"another sum of the same envelopes": lambda: first.respond(asked)})
    return Outcome(f"{before.seen}; {after.seen}", before.held and after.held)


def _stolen_disk(ground: Ground) -> Outcome:
    """Take a site's disk once its round is closed, beside all that the server has recorded of it."""
    sites, coordinator = ground.begun()
    up_to(Step.REVEAL, coordinator, sites)
    victim, thief = sites[1], sites[0]
    header, names = coordinator._envelopes[victim.name].header, sorted(coordinator._envelopes)
    lanes = ground.agreed.layout(1).lanes
    recorded = unpack_residues(coordinator._payload(victim.name), lanes.modulus_bits)
    play_round(coordinator, sites)
    _, record = read_header(coordinator.journal.read(len(coordinator.journal.records) - 1), ground.agreed)
    for site in sites:
        request = coordinator.request(site.name, site.run, site.position)
        site.respond(replace(request, attempt=0, question=b""))  # takes the record; the next round has not begun here
    kept = victim.replica.files.bound
    opened = False
    if kept.padded is not None:
        place = PadPlace(ground.agreed.study.id, header.position, header.attempt, header.cohort)
        own = SitePads(place, dict(zip(names, kept.padded.keys, strict=True)), victim.name,
                       bytes.fromhex(kept.padded.private))  # fmt: skip
        seed = bytes.fromhex(record.masks[names.index(victim.name)])
        opened = _opens(ground, thief, own.unmasked(recorded, seed, lanes.modulus), [header])
    return Outcome(f"the recorded envelope of {victim.name}, with its disk after the round: "
                   + ("opened" if opened else "stays closed; no key of the round is on it"), not opened)  # fmt: skip


def _shares_out_of_turn(ground: Ground) -> Outcome:
    outcomes = [
        _early_share(ground.copy(ground.folder / "early")),
        _false_complaint(ground.copy(ground.folder / "complaint")),
    ]
    return Outcome("; ".join(outcome.seen for outcome in outcomes), all(outcome.held for outcome in outcomes))


def _false_complaint(ground: Ground) -> Outcome:
    """One site says of another's share that it does not open: it costs an attempt, and no round."""
    sites, coordinator = ground.begun()
    up_to(Step.CHECKED, coordinator, sites)
    liar, victim, check = sites[-1], sites[0], coordinator._check
    assert check is not None
    for site in sites:
        reply = answer(coordinator, site)
        word = sign_checked(ground.agreed, check.digest, site.name, [victim.name], site.replica.identity.signing)
        coordinator.receive(replace(reply, envelope=word) if site is liar else reply)
    coordinator.advance()
    staying = [site for site in sites if site.name not in coordinator.left_out]
    for _ in range(4):  # READY, envelopes, and with shares CHECKED; REVEAL
        step(coordinator, staying)
    closed = coordinator.round == 2
    without = ", ".join(sorted(coordinator.left_out)) or victim.name
    return Outcome(f"a false complaint over {victim.name}: round 1 closed, without {without}: {closed}", closed)


def _early_share(ground: Ground) -> Outcome:
    sites, coordinator = ground.begun()
    up_to(Step.REVEAL, coordinator, sites)
    site, victim = sites[0], sites[1]
    older = coordinator._shares.handed(victim.name, site.name)
    coordinator._next_attempt()
    up_to(Step.REVEAL, coordinator, sites)
    arrived = coordinator._arrived
    assert arrived is not None
    due = coordinator.journal.chain.due
    carried = coordinator._shares.handed(victim.name, site.name) + coordinator._payload(victim.name)

    def asked(digest: str, carried: bytes) -> Callable[[], object]:
        question = sign_gone(ground.agreed, due, coordinator.attempt, digest, victim.name, ground.server_key)
        return lambda: site.respond(
            RoundRequest(coordinator.round, coordinator.attempt, (), more=False, question=question, carried=carried)
        )

    before = _refused({"before its REVEAL": asked(arrived.digest, carried)})
    ask(coordinator, site)
    garbled = bytes([carried[0] ^ 1]) + carried[1:]
    mixed, garbage = older + carried[len(older) :], bytes(len(older)) + carried[len(older) :]
    after = _refused(
        {
            "for another sum": asked("5" * 64, carried),
            "garbled": asked(arrived.digest, garbled),
            "of another attempt": asked(arrived.digest, mixed),
            "garbage": asked(arrived.digest, garbage),
        }
    )
    site.void(coordinator.round)
    reply = asked(arrived.digest, carried)()
    assert isinstance(reply, RoundReply)
    voided = reply.code == ReplyCode.VOID and not reply.carried
    seen = f"{before.seen}; {after.seen}; after a void: {'refused' if voided else 'went through'}"
    return Outcome(seen, before.held and after.held and voided)


# --- outsiders ---


def _outsider(ground: Ground) -> Outcome:
    folder = ground.folder / "outside"
    create_authority(folder, ["127.0.0.1"])
    member = ec.generate_private_key(ec.SECP256R1()).public_key()
    openssh = member.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    key = base64.b64encode(member.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)).decode()
    store = ByteStore(Incoming(folder / "in"), Outgoing(folder / "out"), "", lambda site: 0)
    link = SuperLink(folder, ("127.0.0.1", 0), {"member": openssh}, store)
    held: list[socket.socket] = []
    try:
        address = link.address
        trust = ssl.create_default_context(cafile=str(folder / CA))

        def call(request: str) -> str:
            with trust.wrap_socket(socket.create_connection(address, timeout=10), server_hostname="127.0.0.1") as tls:
                tls.settimeout(10)
                tls.sendall(request.encode())
                return tls.recv(100).decode("latin-1").split("\r\n")[0].removeprefix("HTTP/1.1 ")

        for _ in range(SLOW_CONNECTIONS):
            held.append(socket.create_connection(address, timeout=10))
        # No byte of the body follows: an answer shows that none was waited for.
        head = f"POST /v1/fleet/push HTTP/1.1\r\nHost: x\r\nContent-Length: 8000000\r\nflwr-public-key: {key}"
        try:
            unsigned = call(f"{head}\r\n\r\n")
            health = call("GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        except OSError as error:
            unsigned = health = f"no answer ({type(error).__name__})"
        kept = len(link.callers)
    finally:
        for connection in held:
            connection.close()
        link.stop()
    seen = f"unsigned body of 8 MB: {unsigned}; {kept} of {SLOW_CONNECTIONS} silent connections kept; others: {health}"
    return Outcome(seen, unsigned.startswith("401") and health.startswith("200") and kept <= STRANGERS)


# --- the site's own machine ---


def _weaker_terms(ground: Ground) -> Outcome:
    name = ground.agreed.study.key_maker
    file = ground.file(name).model_copy(update={"privacy": SitePrivacy(epsilon=1.0), "amendments": "none"})
    identity = load_identity(Path(file.identity), name)
    record_acceptance(file, ground.agreed, identity, "the drill")

    def start(**changes: Any) -> Callable[[], object]:
        changed = file.model_copy(update=changes)
        return lambda: require_acceptance(changed, ground.agreed, identity.keys.signing)

    weaker = {
        "epsilon 8 for 1": start(privacy=SitePrivacy(epsilon=8.0)),
        "plain allowed": start(allow_plain=True),
        'amendments "all" for "none"': start(amendments="all"),
    }
    try:
        start()()
    except NotAcceptedError as error:
        return Outcome(f"not even what was accepted starts: {error}", False)
    return _refused(weaker)


def _seed_and_disk(ground: Ground) -> Outcome:
    sites, coordinator = ground.begun()
    site, seed = sites[0], secrets.token_hex(32)
    step(coordinator, sites)
    with mock.patch("secure_fed.privacy.ckks.secrets.token_hex", return_value=seed):  # a generator that repeats
        ask(coordinator, site)
        site.replica.files.folder.envelope(1).unlink()
        coordinator.fail(())
        step(coordinator, sites)
        reply = answer(coordinator, site)
    try:
        coordinator.receive(reply)
        repeated = "taken"
    except EnvelopeError:
        repeated = "refused"
    state = ground.file(site.name).state_folder.path
    opened = [path for path in [state, *state.rglob("*")] if path.stat().st_mode & 0o077]
    seen = f"the same seed under other bytes: {repeated}; files of the state that others may read: {len(opened)}"
    return Outcome(seen, repeated == "refused" and not opened)


ATTACKS = (
    Attack("B1", "server", "opens a second run, under a new key and under one that came by rotation", _second_run),
    Attack("B2", "server", "begins a run under a key that nobody holds, so that a site spends its budget", _bogus_key),
    Attack("B3", "server", "bends a sum, to learn from what sites say of it", _bent_sum),
    Attack("B4", "an older disk", "is put back after its site's REVEAL, and asked for a second one", _older_disk),
    Attack("B5", "server", "removes a site, which has their envelopes, in an open round", _slipped_amendment),
    Attack("B6", "one site", "says that a sum is out of range which the others have applied", _false_refusal),
    Attack("B7", "one site", "sends values out of range, so that no sum can be applied", _garbage),
    Attack("B7.1", "server", "has two records taken back, of which one site has both", _two_records),
    Attack("B7.2", "server", "takes a second sum at one adapter, with one site less or more", _second_sum),
    Attack("B7.3", "one site", "reveals a wrong check of its envelope, so that the sum looks bent", _wrong_check),
    Attack("B7.4", "server", "takes a sum with a site without a budget, then one without it", _mixed_budgets),
    Attack("B8", "one site", "attests and acknowledges another adapter than it holds", _odd_words),
    Attack("B9", "one site", "sends validation counts that no images give", _impossible_counts),
    Attack("B10", "server", "shows each half of the sites a round of its own", _split_cohort),
    Attack("B11", "outsider", "holds connections open and announces bodies under a member's public key", _outsider),
    Attack("B12", "a site's own machine", "starts under weaker terms than those accepted", _weaker_terms),
    Attack("B13", "a copied or shared machine", "repeats an encryption's seed; reads a site's files", _seed_and_disk),
    Attack("B14", "a site and the server", "open one update with the study's key and all they know", _one_update, True),
    Attack(
        "B15", "a site and the server", "open two cohorts of one round, one within the other", _nested_cohorts, True
    ),
    Attack("B16", "server", "asks one site to reveal in two attempts of a round", _two_attempts, True),
    Attack("B17", "server", "shows sites of one attempt two cohorts, and two sums of one", _two_sums, True),
    Attack("B18", "server", "asks for shares of a mask out of turn, and garbles them", _shares_out_of_turn, True),
    Attack(
        "B19", "a thief and the server", "opens old traffic with a site's disk of after the round", _stolen_disk, True
    ),
)
"""Attacks of the threat model."""

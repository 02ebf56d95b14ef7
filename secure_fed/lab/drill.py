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
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from secure_fed.clients.acceptance import record_acceptance, require_acceptance
from secure_fed.clients.budget import ledger_folder
from secure_fed.clients.site import Site
from secure_fed.clients.sitefile import SiteFile, SitePrivacy, read_site_file
from secure_fed.core.errors import EnvelopeError, NotAcceptedError, SecfacmicError, StudyError
from secure_fed.core.layout import ServerState
from secure_fed.core.tomlfile import parse_table
from secure_fed.lab.simulation import Budget, accept_another_run, open_run, open_sites, prepare
from secure_fed.operate.new_study import SERVER
from secure_fed.privacy.keys import create_sealed_key, load_identity
from secure_fed.privacy.ledger import Ledger
from secure_fed.protocol.rounds import ReplyCode, RoundReply
from secure_fed.protocol.signing import ZERO_DIGEST, load_signing_key
from secure_fed.protocol.study import AgreedStudy, Template, read_template
from secure_fed.server.coordinator import Coordinator
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
    """

    id: str
    attacker: str
    tried: str
    carry_out: Callable[[Ground], Outcome]


class Ground:
    """A throw-away federation: a small study of phantoms with keys, sites with budgets and a coordinator's folder."""

    def __init__(self, folder: Path, agreed: AgreedStudy) -> None:
        self.folder = folder
        self.agreed = agreed

    @classmethod
    def prepare(cls, folder: Path) -> Ground:
        """Make it."""
        agreed = prepare(_template(), folder, None, budget=Budget(8.0, 1e-5, runs=2))
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

    def seal_key(self, epoch: int, previous: str = ZERO_DIGEST) -> bytes:
        """A new key, as the key maker makes it."""
        maker = self.agreed.study.key_maker
        identity = load_identity(self.folder / "sites" / maker / "identity", maker)
        return create_sealed_key(self.agreed, identity, epoch, previous)

    def another_run(self, key: str) -> Coordinator:
        """A run that the server opens alone."""
        folder = self.folder / SERVER
        return Coordinator.begin(self.agreed, folder, load_signing_key(ServerState(folder).key), key)

    def rotated(self) -> tuple[list[Site], Coordinator]:
        """Sites in a run whose key was replaced after its first round."""
        sites = self.sites()
        coordinator = open_run(self.agreed, self.folder, open_sites(self.agreed, self.folder))
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
        SecfacmicError: the federation itself cannot be made.
    """
    rows = []
    with tempfile.TemporaryDirectory(prefix="secfacmic-drill-") as name:
        tell("preparing")
        ground = Ground.prepare(Path(name) / "ground")
        for attack in ATTACKS:
            tell(attack.id)
            outcome = attack.carry_out(ground.copy(Path(name) / attack.id))
            facts = {"id": attack.id, "attacker": attack.attacker, "tried": attack.tried}
            rows.append({**facts, "seen": outcome.seen, "held": outcome.held})
    return {"version": version("secfacmic"), "attacks": rows}


def _template() -> Template:
    content = read_template(Path("demo")).model_dump(mode="json", exclude_none=True)
    for group in content["simulation"]["phantoms"]:
        group |= {"patients": PATIENTS, "class_mix": [0.25] * 4}
    content |= {
        "name": "drill",
        "rounds": 3,
        "backbone": {"model": "random-small", "weights": "random", "seed": 1},
        "method": {"adapter": "text_head"},
        "privacy": {"steps": 2},
    }
    return parse_table(content, Template, StudyError, "the drill's study")


def _refused(tries: dict[str, Callable[[], object]]) -> Outcome:
    """Carry out several tries, each of which has to be refused."""
    seen = {}
    for what, carry_out in tries.items():
        try:
            carry_out()
        except SecfacmicError as error:
            seen[what] = f"refused ({type(error).__name__})"
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
        told = f"refused ({type(error).__name__})"
    after = Ledger(ledger).summary()["epsilon_spent"]
    return Outcome(f"{told}; epsilon spent {before:.3f} before, {after:.3f} after", after == before)


# --- outsiders ---


def _outsider(ground: Ground) -> Outcome:
    folder = ground.folder / "outside"
    create_authority(folder, ["127.0.0.1"])
    member = ec.generate_private_key(ec.SECP384R1()).public_key()
    openssh = member.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    key = base64.b64encode(member.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)).decode()
    link = SuperLink(folder, ("127.0.0.1", 0), {"member": openssh})
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
        head = f"POST /v1/fleet/push-object HTTP/1.1\r\nHost: x\r\nContent-Length: 8000000\r\nflwr-public-key: {key}"
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
    sites = ground.sites()
    coordinator = open_run(ground.agreed, ground.folder, open_sites(ground.agreed, ground.folder))
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
    Attack("B11", "outsider", "holds connections open and announces bodies under a member's public key", _outsider),
    Attack("B12", "a site's own machine", "starts under weaker terms than those accepted", _weaker_terms),
    Attack("B13", "a copied or shared machine", "repeats an encryption's seed; reads a site's files", _seed_and_disk),
)
"""Attacks of the threat model whose defence is there. The others of docs/threat-model.md have no row yet."""

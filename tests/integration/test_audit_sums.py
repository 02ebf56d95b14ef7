"""A site fetches the padded envelopes of past rounds from a real listener, and adds them again."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from typer.testing import CliRunner

from secure_fed.cli import app
from secure_fed.clients import flower_node
from secure_fed.clients.flower_node import Way, open_line
from secure_fed.clients.sitefile import SiteFile
from secure_fed.core.errors import (
    NotAdmittedError,
    NotShownError,
    ProtocolError,
    RecordError,
    SecfacmicError,
    StudyError,
)
from secure_fed.core.layout import ServerRun, ServerState
from secure_fed.core.tomlfile import read_toml, write_toml
from secure_fed.lab.simulation import prepare
from secure_fed.operate.audit_sums import audit_sums, refuse_unshown
from secure_fed.protocol.journal import find_runs
from secure_fed.protocol.recompute import recompute
from secure_fed.protocol.residues import unpack_residues
from secure_fed.protocol.round_frames import SignedWord, sign_reveal
from secure_fed.server.byte_store import ByteStore, Incoming, Outgoing
from secure_fed.server.coordinator import Step
from secure_fed.server.flower_link import SuperLink
from secure_fed.transport.certificates import create_authority
from tests.conftest import OBSERVER, TRAINING, Federation, close_round, exchange, make_template, pass_step, stop_at_once

RUNNER = CliRunner()


class Played:
    """Four rounds with pads, of which the study keeps two, and the server's listener."""

    def __init__(self, folder: Path) -> None:
        self.federation = Federation(folder)
        self.folder = folder
        state = ServerState(folder / "server")
        run = state.current_run
        assert run is not None
        self.server = state.run(run)
        create_authority(folder / "tls", ["127.0.0.1"])
        sites = {site.name: site.keys.flower for site in self.federation.agreed.study.sites}
        store = ByteStore(Incoming(self.server.incoming), Outgoing(self.server.outgoing), run, lambda site: 10**7)
        self.link = SuperLink(folder / "tls", ("127.0.0.1", 0), sites, store)
        self.address = f"127.0.0.1:{self.link.address[1]}"
        for name in sites:
            path = folder / "sites" / name / "site.toml"
            file = read_toml(path, SiteFile, ValueError)  # type: ignore[type-var]
            server = {"address": self.address, "authority": str(folder / "tls" / "ca.crt")}
            write_toml(path, SiteFile.model_validate(file.model_dump(exclude_none=True) | {"server": server}))

    def audit(self, name: str, *options: object) -> list[dict[str, object]]:
        """What the command prints as one document; its refusal is raised."""
        where = self.folder / "sites" / name / "site.toml"
        result = RUNNER.invoke(app, ["journal", "audit", "--site", str(where), "--json", *map(str, options)])
        self.printed = json.loads(result.stdout)["aggregates"] if result.stdout else []
        if isinstance(result.exception, SecfacmicError):
            raise result.exception
        assert result.exit_code == 0, (result.output, result.exception)
        return list(self.printed)

    def way(self) -> Way:
        return Way(self.address, self.folder / "tls" / "ca.crt", 3)


@pytest.fixture(scope="module")
def four_rounds(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    folder = tmp_path_factory.mktemp("audited") / "out"
    prepare(make_template(collusion=1, rounds=5), folder, images)
    federation = Federation(folder)
    sites = federation.sites()
    coordinator = federation.begin(sites)
    for _ in range(4):
        for site in sites:
            exchange(coordinator, site)
        close_round(coordinator, sites, 6)
    for site in sites:
        exchange(coordinator, site)
    return folder


@pytest.fixture
def played(four_rounds: Path, tmp_path: Path) -> Iterator[Played]:
    shutil.copytree(four_rounds, tmp_path / "out", symlinks=True)
    made = Played(tmp_path / "out")
    yield made
    stop_at_once(made.link)


def test_every_site_adds_the_last_rounds_again_and_finds_them_the_same(played: Played) -> None:
    for name in (*TRAINING, OBSERVER):
        rows = played.audit(name)
        assert [(row["round"], row["same"], row["missing"]) for row in rows] == [(3, True, []), (4, True, [])]
    assert [row["round"] for row in played.audit("ash", "--rounds", 1)] == [4]
    assert played.server.shown_rounds() == [2, 3, 4], "one more than is promised, for a site that is a record behind"


def test_what_is_handed_out_is_uniform_residues_and_no_more(played: Played) -> None:
    shown = sorted(played.server.shown(4).glob("*"))
    assert len(shown) == 3
    lanes = played.federation.agreed.layout(4).lanes
    for path in shown:
        residues = unpack_residues(path.read_bytes(), lanes.modulus_bits)
        assert abs(float((residues / lanes.modulus).mean()) - 0.5) < 5 * (12 * residues.size) ** -0.5


def test_a_server_that_cannot_show_an_envelope_is_reported(played: Played) -> None:
    gone = next(played.server.shown(3).glob("*"))
    gone.unlink()
    with pytest.raises(NotShownError, match=r"cannot show the envelopes of (ash|birch|cedar) in round 3;"):
        played.audit("birch")
    (missing,) = [row["missing"] for row in played.printed if row["round"] == 3]
    assert len(missing) == 1  # type: ignore[arg-type]
    assert [row["round"] for row in played.audit("birch", "--rounds", 1)] == [4]


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data + b"x", lambda data: b"x" + data[1:]])
def test_a_server_that_shows_other_bytes_than_were_signed_is_reported(played: Played, damage: object) -> None:
    path = next(played.server.shown(4).glob("*"))
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    with pytest.raises(NotShownError, match="in round 4"):
        played.audit("cedar")


def test_an_envelope_in_a_sum_that_no_server_may_take_is_told_as_the_servers_doing(four_rounds: Path) -> None:
    class Beyond:
        """Envelopes whose sites signed residues that are not below Q."""

        def payload(self, contribution: SignedWord, size: int, digest: str) -> bytes | None:
            return b"\xff" * size

    (run,) = find_runs(four_rounds / "server")
    with pytest.raises(RecordError, match=r"envelope of ash is in the sum, but .* the coordinator had to refuse it"):
        list(recompute(run, Federation(four_rounds).agreed, Beyond()))


def test_wrong_checks_that_cancel_are_found_by_whoever_has_the_envelopes(four_rounds: Path, tmp_path: Path) -> None:
    """Two sites agree on wrong checks whose sum is right: the record holds, and says of both what they are not."""
    folder = tmp_path / "out"
    shutil.copytree(four_rounds, folder, symlinks=True)
    federation = Federation(folder)
    sites, coordinator = federation.sites()[:3], federation.reopen()
    for step in (Step.READY, Step.ENVELOPE):
        assert coordinator.step is step
        pass_step(coordinator, sites)
    arrived = coordinator._arrived
    assert arrived is not None
    modulus = coordinator._wire.modulus
    for site, more in zip(sites, (0, 1, modulus - 1), strict=True):
        reply = site.respond(coordinator.request(site.name, site.run, site.position))
        first, second = coordinator._wire.check_words(arrived.digest, coordinator._payload(site.name))
        padded, key = site.replica.files.bound.padded, site.replica.identity.signing
        assert padded is not None
        wrong = (first + more) % modulus, second
        word = sign_reveal(federation.agreed, arrived.digest, site.name, wrong, key, padded.seed)
        coordinator.receive(replace(reply, envelope=word))
    assert coordinator.advance() is not None
    for site in sites:
        exchange(coordinator, site)
    assert [site.round for site in sites] == [5] * 3, "within what an update could have done as well"
    run = next(run for run in find_runs(folder / "sites" / "ash" / "state") if run.current)
    *_, last = recompute(run, federation.agreed, Shown(ServerState(folder / "server").run(coordinator.run)), 5)
    assert (last.round, last.same, last.odd) == (5, False, ("birch", "cedar"))
    with pytest.raises(RecordError, match=r"records \[5\].*the checks of birch, cedar do not fit"):
        refuse_unshown([last])


class Shown:
    """What a server would show, from its disk."""

    def __init__(self, server: ServerRun) -> None:
        self._outgoing = Outgoing(server.outgoing)

    def payload(self, contribution: object, size: int, digest: str) -> bytes | None:
        path = self._outgoing.find(digest)
        return None if path is None else path.read_bytes()


def test_outsiders_and_unsigned_requests_get_nothing(played: Played) -> None:
    path = next(played.server.shown(4).glob("*"))
    stranger = ec.generate_private_key(ec.SECP256R1())
    with pytest.raises(NotAdmittedError), open_line(played.way(), "ash", stranger) as line:
        line.fetch(path.name, path.stat().st_size)
    url = f"https://{played.address}/records/{path.name}"
    key = played.federation.site("ash").connection_key.public_key()
    claimed = {"flwr-public-key": base64.b64encode(flower_node.public_key_to_bytes(key)).decode()}
    for headers, status in (({}, 403), (claimed, 401)):
        assert httpx.get(url, headers=headers, verify=False).status_code == status


def test_a_server_that_is_not_there_is_no_accusation(played: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flower_node, "OVER_SECONDS", 0.3)
    stop_at_once(played.link)
    with pytest.raises(ProtocolError, match="nobody answers"):
        played.audit("ash")


def test_more_rounds_than_the_study_keeps_are_refused(played: Played) -> None:
    with pytest.raises(StudyError, match="envelopes of 3 rounds; the study says keep_rounds = 2"):
        played.audit("ash", "--rounds", 3)


def test_without_pads_none_is_kept_and_none_is_asked_for(tmp_path: Path, images: Path) -> None:
    folder = tmp_path / "out"
    prepare(make_template(collusion=0), folder, images)
    federation = Federation(folder)
    sites = federation.sites()
    coordinator = federation.begin(sites)
    pass_step(coordinator, sites)
    close_round(coordinator, sites, 6)
    state = ServerState(folder / "server")
    assert not state.run(coordinator.run).shown_rounds()
    with pytest.raises(StudyError, match="collusion = 0: whoever has the study's key reads an envelope"):
        audit_sums(sites[0]._file, federation.agreed)

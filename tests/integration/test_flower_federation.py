"""One federation of real processes over TLS on loopback, looked at from every side while it runs."""

from __future__ import annotations

import json
import os
import signal
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key

from secure_fed.clients.flower_node import Way, _Connection
from secure_fed.core.errors import CertificateError, NotAdmittedError
from secure_fed.lab.simulation import Listener, simulate
from secure_fed.privacy.ckks import StudySecret
from secure_fed.privacy.keys import load_identity, open_sealed_key
from secure_fed.transport.certificates import create_authority
from tests.borrowed import call_as
from tests.conftest import make_template
from tests.forked import Forked
from tests.network import Network, loaded_files, memory_holds

ROUNDS = 4


@dataclass
class Seen:
    """What one run showed."""

    network: Network
    statuses: dict[str, int] = field(default_factory=dict)
    refused: dict[str, Exception | int] = field(default_factory=dict)
    held: dict[str, set[str]] = field(default_factory=dict)
    loaded: dict[str, str] = field(default_factory=dict)
    pids: dict[str, int] = field(default_factory=dict)
    exits: dict[str, int] = field(default_factory=dict)
    rehearsal: tuple[int, str] = (-1, "")
    begun_after_rehearsal: list[Path] = field(default_factory=list)


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Iterator[Seen]:
    folder = tmp_path_factory.mktemp("federation")
    network = Network(folder / "out", make_template(rounds=ROUNDS, round_seconds=120), images)
    facts = Seen(network)
    network.options["server"] = ["--lobby"]
    try:
        network.start("server")
        network.wait_until(lambda: "listening" in network.log("server"), 60)
        knock(facts, folder)
        rehearse(facts)
        network.start("ash")  # as hospitals start it; the others take a tenth of the time
        network.forked = True
        network.start(*(name for name in network.names if name != "ash"))
        network.wait_until(lambda: network.records >= 2, 240)
        look(facts)
        facts.exits = network.wait(240)
        yield facts
    finally:
        network.close()


def knock(facts: Seen, folder: Path) -> None:
    """What an outsider gets from the open port."""
    network = facts.network
    base = f"https://127.0.0.1:{network.port}"
    authority = network.folder / "server" / "tls" / "ca.crt"
    context = ssl.create_default_context(cafile=str(authority))
    paths = [
        "/v1/control/start-run",
        "/v1/control/register-node",
        "/v1/runtime/acquire-task",
        "/v1/runtime/pull-task-input",
        "/v1/fleet/register-node",
        "/v1/fleet/unregister-node",
        "/openapi.json",
        "/docs",
        "/",
    ]
    with httpx.Client(verify=context) as client:
        # The port answers before Flower has set up its database.
        deadline = time.monotonic() + 30
        while client.get(f"{base}/health").status_code != 200 and time.monotonic() < deadline:
            time.sleep(0.2)
        for path in [*paths, "/health"]:
            facts.statuses[f"GET {path}"] = client.get(base + path).status_code
            facts.statuses[f"POST {path}"] = client.post(base + path, content=b"x").status_code
        for path in ("activate-node", "pull"):
            facts.statuses[f"no key {path}"] = client.post(f"{base}/v1/fleet/{path}", content=b"").status_code
    stranger = ec.generate_private_key(ec.SECP256R1())
    address = f"127.0.0.1:{network.port}"
    facts.refused["stranger"] = attempt(lambda: _Connection(Way(address, authority, 4), "stranger", stranger).join())
    create_authority(folder / "foreign", ["127.0.0.1"])
    foreign = folder / "foreign" / "ca.crt"
    member = load_ssh_private_key((network.site_folder("ash") / "identity" / "flower.key").read_bytes(), None)
    assert isinstance(member, ec.EllipticCurvePrivateKey)
    facts.refused["foreign authority"] = attempt(lambda: _Connection(Way(address, foreign, 4), "ash", member).join())
    # A member's key in the header, without the key itself: nothing but the signature proves who calls.
    facts.refused["borrowed key"] = call_as(address, authority, "ash", member.public_key())


def rehearse(facts: Seen) -> None:
    """One site comes before the others, tries its line and leaves."""
    site, log = facts.network.site_folder("ash"), facts.network.log_file("rehearsal")
    code = Forked(["client", "--site", str(site / "site.toml"), "--rehearse"], log).wait(180)
    facts.rehearsal = code, log.read_text()
    facts.begun_after_rehearsal = list((site / "state" / "runs").glob("*"))


def attempt(call: object) -> Exception | int:
    try:
        call()  # type: ignore[operator]
    except httpx.HTTPStatusError as error:
        return error.response.status_code
    except Exception as error:
        return error
    return 0


def look(facts: Seen) -> None:
    """Into the processes, after the server has taken envelopes and the sites have opened an aggregate."""
    network = facts.network
    rounds = network.rounds_process()
    pids = {"server": network.processes["server"].pid, "rounds": rounds, "ash": network.processes["ash"].pid}
    for pid in pids.values():
        os.kill(pid, signal.SIGSTOP)  # else a fast machine has ended the study meanwhile
    secret = study_secret(network)
    # Any 24 bytes of the middle tell the whole.
    wanted = {"MAC key": secret.mac_key[:24], "secret key": secret.secret_key[1000:1064]}
    wanted["control"] = network.agreed.study.id.encode()
    for name, pid in pids.items():
        facts.loaded[name] = loaded_files(pid)
        facts.held[name] = memory_holds(pid, wanted)
    for pid in pids.values():
        os.kill(pid, signal.SIGCONT)
    facts.pids = {name: network.processes[name].pid for name in network.processes} | {"rounds": rounds}


def study_secret(network: Network) -> StudySecret:
    folder = network.site_folder("birch")
    (sealed,) = (folder / "state" / "keys").glob("*.sealed")
    return open_sealed_key(sealed.read_bytes(), network.agreed, load_identity(folder / "identity", "birch"))


def test_a_round_can_be_rehearsed_over_the_true_line_before_the_first(seen: Seen) -> None:
    code, said = seen.rehearsal
    assert code == 0, said
    words = " ".join(said.split())
    assert "opened to what was sent. No image of this site was read" in words
    assert "ash: rehearses, and leaves then" in seen.network.log("server")
    assert seen.begun_after_rehearsal == []


def test_a_server_with_a_lobby_begins_once_all_that_train_are_ready(seen: Seen) -> None:
    log = seen.network.log("server")
    waiting = log.index("lobby: 0 of 3 sites are ready, quorum 3; waiting for ash, birch, cedar; begin without them")
    ready = log.index("all 3 sites that train are ready")
    said = [log.index(f"{name}: ready: acceptance ") for name in ("ash", "birch", "cedar")]
    assert waiting < min(said) < max(said) < ready < log.index(f"round 1 of {ROUNDS}: 3 sites in")
    (lobby,) = (seen.network.folder / "server").rglob("lobby")
    assert lobby.read_bytes() == b"left"


def test_it_ends_with_the_adapter_of_a_simulation(seen: Seen, images: Path, tmp_path: Path) -> None:
    assert seen.exits == dict.fromkeys([*seen.network.names, "server"], 0)
    quiet = Listener(encoding=lambda *_: None, round=lambda _: None, stage=lambda _: None)
    template = make_template(rounds=ROUNDS, round_seconds=120)
    expected = simulate(template, tmp_path / "simulated", images, quiet)["adapter_digest"]
    for name in seen.network.names:
        summary = seen.network.summary(name)
        assert summary["adapter_digest"] == expected
        assert (summary["round"], summary["site"]) == (ROUNDS, name)
        assert set(summary["metrics"]) == {"zero_shot", "federated"}
        assert (seen.network.site_folder(name) / "state" / "adapter.safetensors").exists()


def test_every_accepted_envelope_is_in_its_record_once(seen: Seen) -> None:
    assert seen.network.records == 1 + ROUNDS
    log = seen.network.log("server")
    assert log.count("3 sites in") == ROUNDS


@pytest.mark.parametrize("path", ["/v1/control/start-run", "/v1/control/register-node", "/v1/runtime/acquire-task"])
def test_from_outside_control_and_runtime_do_not_exist(seen: Seen, path: str) -> None:
    assert seen.statuses[f"GET {path}"] == seen.statuses[f"POST {path}"] == 404


def test_from_outside_nothing_else_exists_but_health(seen: Seen) -> None:
    others = {path: status for path, status in seen.statuses.items() if path.startswith(("GET", "POST"))}
    assert others.pop("GET /health") == 200
    others.pop("POST /health")
    assert set(others.values()) == {404}, others


def test_callers_without_a_registered_key_are_refused(seen: Seen) -> None:
    assert seen.statuses["no key activate-node"] == seen.statuses["no key pull"] == 403
    assert isinstance(seen.refused["stranger"], NotAdmittedError)
    assert seen.refused["borrowed key"] == 401
    assert seen.statuses["POST /v1/fleet/register-node"] == 404


def test_a_server_of_a_foreign_authority_is_refused(seen: Seen) -> None:
    error = seen.refused["foreign authority"]
    assert isinstance(error, CertificateError)
    assert "authority" in str(error)


def test_the_servers_processes_hold_no_key(seen: Seen) -> None:
    assert seen.held["ash"] == {"MAC key", "secret key", "control"}  # the scan finds what is there
    assert seen.held["server"] == seen.held["rounds"] == {"control"}


def test_the_servers_processes_load_nothing_that_trains_or_decrypts(seen: Seen) -> None:
    assert "torch" in seen.loaded["ash"]
    assert "tenseal" in seen.loaded["ash"]
    for name in ("server", "rounds"):
        for module in ("torch", "tenseal", "open_clip", "opacus", "pyrage"):
            assert module not in seen.loaded[name], (name, module)


def test_nobody_talks_to_anything_but_loopback(seen: Seen) -> None:
    called = seen.network.called()
    assert set(seen.pids.values()) <= set(called)  # each process was heard
    # ::1 is bound once to see whether the machine has IPv6.
    assert {"127.0.0.1"} <= set().union(*called.values()) <= {"127.0.0.1", "::1"}


def test_logs_are_lines_without_paths_or_labels(seen: Seen) -> None:
    for name in (*seen.network.names, "server"):
        for line in seen.network.log(name).splitlines():
            assert line.startswith("20"), (name, line)
            assert str(seen.network.folder) not in line
            assert not {"dark", "light", "striped"} & set(line.split()), line
            assert "Traceback" not in line


def test_a_normal_end_is_no_error_in_any_log(seen: Seen) -> None:
    """Not of uvicorn's either, which tells of connections that it ends as of errors."""
    for name in (*seen.network.names, "server"):
        lines = seen.network.log(name).splitlines()
        assert lines
        assert not [line for line in lines if " ERROR " in line or "CRITICAL" in line]


def test_no_process_is_left_and_the_servers_folder_holds_no_key(seen: Seen) -> None:
    secret = study_secret(seen.network)
    for path in (seen.network.folder / "server").rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert secret.mac_key not in content
            assert secret.secret_key[1000:1064] not in content
    assert not any(os.path.exists(f"/proc/{process.pid}") for process in seen.network.processes.values())


def test_the_results_say_nothing_that_json_cannot(seen: Seen) -> None:
    for name in seen.network.names:
        json.dumps(seen.network.summary(name), allow_nan=False)

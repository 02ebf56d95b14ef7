"""Faults of docs/faults.md: real processes, a real journal, and after each the result of a run without the fault."""

from __future__ import annotations

import ast
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from secure_fed.core.layout import ServerState
from secure_fed.lab.simulation import open_sites, prepare
from secure_fed.protocol.records import Chain, RecordFolder
from secure_fed.protocol.study import Template
from secure_fed.server.orders import store_amendment
from tests.conftest import Federation, close_round, damage_adapter, exchange, make_template
from tests.network import Network

SITES = ("ash", "birch", "cedar", "dogwood")
Cohorts = tuple[tuple[str, ...], ...]


def four_sites(**changes: Any) -> Template:
    """Four training sites of which three are enough."""
    sites = [{"name": name} for name in SITES]
    plan = {
        "kind": "simulated",
        "unit": "image",
        "shares": {"train": 0.5, "val": 0.2, "test": 0.2, "unlabelled": 0.1},
        "sites": [{"name": name, "folder": name} for name in SITES],
    }
    return make_template(**({"sites": sites, "simulation": plan, "round_seconds": 120, "rounds": 4} | changes))


def begin(folder: Path, images: Path, **changes: Any) -> Network:
    """A prepared federation whose sites have their features."""
    network = Network(folder / "out", four_sites(**changes), images, forked=True)
    for site in open_sites(network.agreed, network.folder):
        site.features()
    return network


@pytest.fixture
def start(tmp_path: Path, images: Path) -> Iterator[Callable[..., Network]]:
    made: list[Network] = []

    def build(**changes: Any) -> Network:
        made.append(begin(tmp_path, images, **changes))
        return made[0]

    yield build
    for network in made:
        network.close()


def cohorts_of(network: Network) -> Cohorts:
    """Who took part in each round, from the server's journal, which is verified on the way."""
    chain = Chain(network.agreed)
    run = ServerState(network.folder / "server").current_run
    folder = RecordFolder(network.folder / "server" / "runs" / str(run) / "journal")
    return tuple(
        tuple(entry.site for entry in record.contributors)
        for record in folder.replay(chain)
        if record.header.kind == "aggregate"
    )


def digest_without_fault(folder: Path, images: Path, template: Template, cohorts: Cohorts, run: str) -> str:
    """The adapter that the same updates of a run give in one process, where nothing fails."""
    prepare(template, folder, images)
    federation = Federation(folder)
    sites = {site.name: site for site in federation.sites()}
    coordinator = federation.begin(list(sites.values()), run)
    for cohort in cohorts:
        for name in cohort:
            exchange(coordinator, sites[name])
        close_round(coordinator, sites.values())
    (site,) = [sites[cohorts[-1][0]]]
    site.respond(coordinator.request(site.name, site.run, site.position))
    return site.adapter_digest


def check(network: Network, images: Path, tmp_path: Path) -> Cohorts:
    """The study is over, every round's sum has each of its sites once, and all sites hold what a run without the
    fault gives for these cohorts."""
    cohorts = cohorts_of(network)
    study = network.agreed.study
    assert len(cohorts) == study.rounds
    assert all(len(set(cohort)) == len(cohort) >= study.min_sites for cohort in cohorts)
    digests = {name: network.summary(name) for name in network.names}
    assert {summary["round"] for summary in digests.values()} == {study.rounds}
    template = four_sites(rounds=study.rounds, round_seconds=study.round_seconds)
    run = str(ServerState(network.folder / "server").current_run)  # a server that begins one draws it
    expected = digest_without_fault(tmp_path / "without", images, template, cohorts, run)
    assert {summary["adapter_digest"] for summary in digests.values()} == {expected}
    return cohorts


def ended(network: Network, seconds: float = 600) -> None:
    """Until all processes have ended with 0. A server that did not wait for who was too late for the last rounds is
    started again, as its last word says."""
    end = time.monotonic() + seconds
    while any(process.poll() is None for process in network.processes.values()):
        if network.processes["server"].poll() == 0 and "start the server again" in network.log("server")[-300:]:
            network.start("server")
        if time.monotonic() > end:
            break
        time.sleep(0.2)
    assert set(network.wait(10).values()) == {0}


def test_a_reply_that_comes_three_times_counts_once(
    start: Callable[..., Network], images: Path, tmp_path: Path
) -> None:
    network = start()
    network.start("server", "ash", "cedar", "dogwood")
    network.start("birch", fault={"duplicate": True})
    ended(network)
    assert set(check(network, images, tmp_path)) == {SITES}


def test_a_reply_that_arrives_after_a_newer_one_counts_once(
    start: Callable[..., Network], images: Path, tmp_path: Path
) -> None:
    network = start()
    network.start("server", "ash", "cedar", "dogwood")
    network.start("birch", fault={"reorder": True})
    ended(network)
    assert set(check(network, images, tmp_path)) == {SITES}
    assert network.log("birch").count("connected to") == 2


def test_a_server_killed_while_it_appends_a_round_goes_on(
    start: Callable[..., Network], images: Path, tmp_path: Path
) -> None:
    network = start()
    network.start("server", fault={"kill": {"write": "aggregate", "number": 2, "phase": "during"}})
    network.start(*SITES)
    assert network.wait(240, "server") == {"server": -signal.SIGKILL}
    assert network.records == 2
    network.start("server")
    ended(network)
    assert set(check(network, images, tmp_path)) == {SITES}


# --- the server ---

SERVER_WRITES = {
    "genesis": r"00000000\.record genesis$",
    "run": r"server/run$",
    "question": r"/outgoing/[0-9a-f]{64}",
    "cohort": r"/cohort\.frame",
    "envelope": r"\.envelope",
    "arrived": r"/arrived\.frame",
    "reveal": r"/reveal-[a-z]+\.frame",
    "aggregate": r"\.record aggregate$",
    "amendment": r"\.record amendment$",
    "checkpoint": r"\.record checkpoint$",
    "status": r"/status\.json$",
}
"""The server's durable writes, by what is written; a test below finds any that is not here."""

PHASES = ("before", "during", "after")


def rotation(network: Network) -> bytes:
    """A new sealed key that follows the one in force."""
    federation = Federation(network.folder)
    run = network.folder / "server" / "runs" / str(ServerState(network.folder / "server").current_run)
    chain = Chain(network.agreed)
    list(RecordFolder(run / "journal").replay(chain))
    sealed = federation.seal_key(federation.site("ash").replica.keys.newest[0] + 1, chain.key, members=chain.members)
    store_amendment(run, chain, sealed)
    return sealed


def without_run(network: Network) -> None:
    """Take the prepared run away; the server begins one."""
    federation = Federation(network.folder)
    shutil.rmtree(network.folder / "server" / "runs")
    (network.folder / "server" / "run").unlink()
    sealed = network.folder / "study.key"
    sealed.write_bytes(federation.seal_key(2))
    for site in federation.sites():
        site.replica.keys.accept(sealed.read_bytes())
    network.options["server"] = ["--key", str(sealed)]


@pytest.mark.faults
def test_every_durable_write_of_the_server_is_known(start: Callable[..., Network], tmp_path: Path) -> None:
    """What the kills below cover is all that there is."""
    network = start(rounds=2)
    without_run(network)
    writes = tmp_path / "writes"
    network.start("server", fault={"record": str(writes)})
    network.wait_until(lambda: ServerState(network.folder / "server").current_run is not None, 120)
    rotation(network)
    network.start(*SITES)
    ended(network)
    lines = writes.read_text().splitlines()
    unknown = [line for line in lines if not any(re.search(pattern, line) for pattern in SERVER_WRITES.values())]
    assert not unknown, {re.sub(r"[0-9a-f]{64}", "DIGEST", line) for line in unknown}
    for name, pattern in SERVER_WRITES.items():
        assert any(re.search(pattern, line) for line in lines), name


@pytest.mark.faults
def test_a_server_killed_at_each_of_its_durable_writes_goes_on(
    start: Callable[..., Network], images: Path, tmp_path: Path
) -> None:
    network = start(rounds=8)
    without_run(network)
    network.start(*SITES)
    for name, pattern in SERVER_WRITES.items():
        for phase in PHASES:
            if name == "amendment" and phase == "before":
                rotation(network)
            network.start("server", fault={"kill": {"write": pattern, "phase": phase}})
            network.wait_until(lambda: network.processes["server"].poll() is not None, 240)
            assert network.processes["server"].poll() == -signal.SIGKILL, (name, phase, network.log("server")[-500:])
    network.start("server")
    ended(network)
    assert set(check(network, images, tmp_path)) == {SITES}
    run = network.folder / "server" / "runs" / str(ServerState(network.folder / "server").current_run) / "journal"
    kinds = [record.header.kind for record in RecordFolder(run).replay(Chain(network.agreed))]
    assert [kinds.count(kind) for kind in ("genesis", "aggregate", "amendment", "checkpoint")] == [1, 8, 1, 1]


@pytest.mark.faults
def test_the_process_of_the_rounds_killed_again_and_again_is_started_again(
    start: Callable[..., Network], images: Path, tmp_path: Path
) -> None:
    network = start(rounds=6)
    network.start("server", *SITES)
    for number in (2, 3, 5):
        network.wait_until(lambda: network.records >= number, 240)  # noqa: B023
        os.kill(network.rounds_process(), signal.SIGKILL)
    ended(network)
    assert network.log("server").count("it is started again") == 3
    assert set(check(network, images, tmp_path)) == {SITES}


# --- the sites ---


def keep_starting(network: Network, faults: dict[str, list[dict[str, Any]]]) -> None:
    """Start sites with one fault after the other, each until it has killed the site, then without."""
    left = {name: list(plan) for name, plan in faults.items()}
    for name, plan in left.items():
        network.start(name, fault=plan.pop(0))
    end = time.monotonic() + 900
    while left:
        assert time.monotonic() < end, {name: network.log(name)[-1000:] for name in left}
        for name in list(left):
            status = network.processes[name].poll()
            if status is None:
                continue
            assert status == -signal.SIGKILL, (name, status, network.log(name)[-1000:])
            if left[name]:
                network.start(name, fault=left[name].pop(0))
            else:
                network.start(name)
                del left[name]
        time.sleep(0.05)


def kills(pattern: str) -> list[dict[str, Any]]:
    return [{"kill": {"write": pattern, "phase": phase}} for phase in PHASES]


@pytest.mark.faults
def test_a_site_killed_before_it_sends_sends_the_same_bytes_later(
    start: Callable[..., Network], images: Path, tmp_path: Path
) -> None:
    network = start()
    network.start("server")
    keep_starting(
        network,
        {
            "ash": kills(r"\.integers"),
            "birch": kills(r"\.envelope"),
            "cedar": [{"upload": "before"}],
            "dogwood": [{"kill": {"write": r"\.integers", "phase": "before"}}],
        },
    )
    ended(network)
    assert set(check(network, images, tmp_path)) == {SITES}
    for name in SITES:
        assert "waiting to rejoin" in network.log(name)


@pytest.mark.faults
def test_a_site_killed_in_mid_upload_holds_nobody_up(
    start: Callable[..., Network], images: Path, tmp_path: Path
) -> None:
    network = start(round_seconds=10)
    network.start("server", "ash", "cedar", "dogwood")
    network.start("birch", fault={"upload": "middle"})
    assert network.wait(240, "birch") == {"birch": -signal.SIGKILL}
    began = time.monotonic()
    # The other three go on at the round's deadline, not when Flower gives the upload up, after 180 s.
    network.wait_until(lambda: network.records >= 3, 120)
    assert time.monotonic() - began < 120
    network.start("birch")
    ended(network)
    check(network, images, tmp_path)


@pytest.mark.faults
def test_a_site_killed_after_it_sent_counts_once(start: Callable[..., Network], images: Path, tmp_path: Path) -> None:
    network = start()
    network.start("server")
    keep_starting(
        network,
        {
            "ash": [{"upload": "after"}],
            "birch": kills(r"/pins/"),
            "cedar": kills(r"\.record aggregate$"),
            "dogwood": kills(r"adapter\.safetensors$"),
        },
    )
    ended(network)
    assert set(check(network, images, tmp_path)) == {SITES}


@pytest.mark.faults
def test_a_site_ten_times_slower_than_the_deadline_is_left_behind_and_holds_the_same_adapter(
    start: Callable[..., Network], images: Path, tmp_path: Path
) -> None:
    network = start(round_seconds=5)
    network.start("server", "ash", "cedar", "dogwood")
    network.start("birch", fault={"slow": 50})
    ended(network)
    cohorts = check(network, images, tmp_path)
    assert "birch" not in {name for cohort in cohorts for name in cohort}
    assert "goes on without birch" in network.log("server")


@pytest.mark.faults
def test_a_site_that_leaves_for_two_rounds_and_returns_takes_part_again(
    start: Callable[..., Network], images: Path, tmp_path: Path
) -> None:
    network = start(rounds=12, round_seconds=8)
    network.start("server", "ash", "cedar", "birch")
    network.start("dogwood", fault={"slow": 1.5})  # so that the others do not run away
    network.wait_until(lambda: network.records >= 2, 240)
    network.processes["birch"].terminate()
    assert network.processes["birch"].wait(60) == 130
    there = network.records
    network.wait_until(lambda: network.records >= there + 3, 240)
    network.start("birch")
    ended(network)
    cohorts = check(network, images, tmp_path)
    without = [number for number, cohort in enumerate(cohorts, 1) if "birch" not in cohort]
    assert len(without) >= 2
    assert "birch" in cohorts[0]
    assert "birch" in cohorts[-1]


@pytest.mark.faults
def test_a_late_reply_is_dropped_and_costs_nobody_anything(
    start: Callable[..., Network], images: Path, tmp_path: Path
) -> None:
    """Late for its round, and later than Flower keeps the question."""
    network = start(rounds=6, round_seconds=5)
    network.start("server", "ash", "cedar")
    network.start("dogwood", fault={"slow": 13, "only": [3, 4, 5, 6]})
    network.start("birch", fault={"hold": 65})
    ended(network)
    cohorts = check(network, images, tmp_path)
    assert "birch" not in cohorts[0]


# --- disks, folders, adapters ---


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[Path], Path]]:
    """Put a folder on a disk of 16 MB of its own; returns a file that fills it."""
    mounted: list[Path] = []

    def mount(folder: Path) -> Path:
        aside = folder.with_name(folder.name + ".aside")
        if folder.exists():
            folder.rename(aside)
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            pytest.fail(f"a disk of its own cannot be mounted: {result.stderr.strip()}; run this test as root")
        mounted.append(folder)
        if aside.exists():
            shutil.copytree(aside, folder, dirs_exist_ok=True, symlinks=True)
            shutil.rmtree(aside)
        return folder / "ballast"

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def fill(ballast: Path) -> None:
    with ballast.open("wb", buffering=0) as stream:
        try:
            while True:
                stream.write(bytes(2**12))
        except OSError:
            pass


@pytest.mark.faults
def test_a_full_disk_at_the_server_ends_it_with_60_and_it_goes_on_when_there_is_room(
    start: Callable[..., Network], images: Path, tmp_path: Path, small_disk: Callable[[Path], Path]
) -> None:
    network = start()
    ballast = small_disk(network.folder / "server")
    network.start("server", *SITES[:3])
    network.wait_until(lambda: "3 sites in" in network.log("server") or network.records >= 1, 240)
    network.wait_until(lambda: network.processes["ash"].poll() is None and "connected" in network.log("ash"), 240)
    fill(ballast)
    network.start("dogwood")
    assert network.wait(240, "server") == {"server": 60}
    assert "No space left on device" in network.log("server")
    assert "Traceback" not in network.log("server")
    ballast.unlink()
    network.start("server")
    ended(network)
    assert set(check(network, images, tmp_path)) == {SITES}


@pytest.mark.faults
def test_a_full_disk_at_a_site_ends_it_with_60_and_it_goes_on_when_there_is_room(
    start: Callable[..., Network], images: Path, tmp_path: Path, small_disk: Callable[[Path], Path]
) -> None:
    network = start(rounds=8, round_seconds=240)
    ballast = small_disk(network.site_folder("birch") / "state")
    fill(ballast)
    network.start("birch")
    assert network.wait(240, "birch") == {"birch": 60}  # for want of room for its features
    ballast.unlink()
    network.start("server", *SITES)
    network.wait_until(lambda: network.records >= 1 and "connected" in network.log("birch"), 240)
    fill(ballast)
    assert network.wait(240, "birch") == {"birch": 60}  # in mid-round
    assert "No space left on device" in network.log("birch")
    assert "Traceback" not in network.log("birch")
    ballast.unlink()
    network.start("birch")
    ended(network)
    cohorts = check(network, images, tmp_path)
    assert "birch" in cohorts[-1]


@pytest.mark.faults
def test_a_server_with_an_older_state_folder_is_refused_until_its_journal_is_rebuilt(
    start: Callable[..., Network], images: Path, tmp_path: Path
) -> None:
    network = start(rounds=5)
    network.start("server", "ash", "birch", "cedar")
    network.start("dogwood", fault={"slow": 2})
    network.wait_until(lambda: network.records >= 2, 240)
    network.kill("server")
    server, old = network.folder / "server", tmp_path / "old"
    shutil.copytree(server, old)
    network.start("server")
    network.wait_until(lambda: network.records >= 4, 240)
    network.kill("server")
    before = {name: network.summary(name) for name in ("ash", "birch", "cedar")}
    shutil.rmtree(server)
    shutil.copytree(old, server)
    network.start("server")
    network.wait_until(lambda: network.log("server").count("its reply is refused") >= 3, 240)
    assert "older than the study" in network.log("server")
    assert network.records <= 3  # it came no further than the sites had been
    after = {name: network.summary(name) for name in before}
    assert all(after[name]["round"] >= before[name]["round"] for name in before)  # nobody went back
    network.kill("server")
    sites = [value for name in SITES for value in ("--from", str(network.site_folder(name) / "state"))]
    command = [sys.executable, "-m", "secure_fed.cli", "journal", "rebuild", *sites, "--state", str(server)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    network.start("server")
    ended(network)
    check(network, images, tmp_path)


@pytest.mark.faults
def test_a_site_whose_adapter_differs_stops_itself_and_the_others_go_on(
    start: Callable[..., Network], images: Path, tmp_path: Path
) -> None:
    network = start(rounds=6)
    network.start("server", "ash", "birch", "cedar")
    network.start("dogwood", fault={"slow": 2})
    network.wait_until(lambda: network.records >= 3, 240)
    network.processes["ash"].terminate()
    network.processes["ash"].wait(60)
    run = (network.site_folder("ash") / "state" / "run").read_text()
    adapter = network.site_folder("ash") / "state" / "runs" / run / "adapter.safetensors"
    damage_adapter(adapter)
    network.start("ash")
    network.wait_until(lambda: network.processes["ash"].poll() is not None, 240)
    assert network.processes["ash"].poll() == 48
    assert "attest another adapter than the one here" in network.log("ash")
    others = ("birch", "cedar", "dogwood")
    network.wait_until(lambda: network.records >= 5, 240)  # they go on without it
    assert all(network.processes[name].poll() is None for name in others)
    adapter.unlink()  # they are made anew from the journal
    adapter.with_name("before.safetensors").unlink()
    network.start("ash")
    ended(network)
    check(network, images, tmp_path)


# --- the page ---


def test_every_fault_of_the_page_has_its_test() -> None:
    root = Path(__file__).parents[2]
    page = (root / "docs" / "faults.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("|") and "::" in line]
    assert len(rows) >= 13
    named = set(re.findall(r"`(tests/[\w/]+\.py::\w+)`", page))
    assert len(named) >= len(rows)
    collected = {
        f"{file}::{node.name}"
        for file in {name.split("::")[0] for name in named}
        for node in ast.parse((root / file).read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }
    assert named <= collected, named - collected
    # And no fault's test is missing from the page.
    ours = {name for name in collected if name.startswith("tests/integration/test_faults.py")}
    assert ours - named == {f"tests/integration/test_faults.py::{test_every_fault_of_the_page_has_its_test.__name__}"}

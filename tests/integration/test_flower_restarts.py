"""Processes that are killed in mid-round, and processes that must not outlive their parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from secure_fed.core.layout import ServerState
from secure_fed.protocol.records import Chain, RecordFolder
from tests.conftest import TRAINING, make_template
from tests.network import Network

pytestmark = pytest.mark.slow

ROUNDS = 5


@pytest.fixture
def network(tmp_path: Path, images: Path) -> Iterator[Network]:
    made = Network(tmp_path / "out", make_template(rounds=ROUNDS, round_seconds=120), images)
    yield made
    made.close()


def kill_server(network: Network) -> None:
    rounds = network.rounds_process()
    network.kill("server")
    network.wait_until(lambda: not runs(rounds), 5)  # its child does not outlive it
    network.start("server")


def kill_rounds(network: Network) -> None:
    os.kill(network.rounds_process(), signal.SIGKILL)


def kill_site(network: Network) -> None:
    network.kill("birch")
    network.start("birch")


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("kill", [kill_server, kill_rounds, kill_site])
def test_killed_in_mid_round_the_study_finishes_and_counts_everything_once(
    network: Network, kill: Callable[[Network], None]
) -> None:
    network.start("server", *network.names)
    # In mid-round: an envelope of the third is in, its record is not.
    spool = (
        network.folder
        / "server"
        / "runs"
        / str(ServerState(network.folder / "server").current_run)
        / "spool"
        / "00000003"
    )
    network.wait_until(lambda: any(spool.glob("*/*.envelope")), 90)
    kill(network)
    assert set(network.wait(120).values()) == {0}
    chain = Chain(network.agreed)
    folder = RecordFolder(spool.parents[1] / "journal")
    cohorts = [
        tuple(entry.site for entry in record.contributors)
        for record in folder.replay(chain)
        if record.header.kind == "aggregate"
    ]
    assert cohorts == [TRAINING] * ROUNDS
    assert len({network.summary(name)["adapter_digest"] for name in network.names}) == 1


def test_ctrl_c_ends_cleanly_and_a_restart_goes_on(network: Network) -> None:
    network.start("server", *network.names)
    network.wait_until(lambda: network.records >= 2, 90)
    for name in ("birch", "server"):
        network.processes[name].send_signal(signal.SIGINT)
        assert network.processes[name].wait(15) == 130
        assert "goes on from here" in network.log(name)
    network.start("server", "birch")
    assert set(network.wait(120).values()) == {0}
    assert "rejoin" not in network.log("birch")  # it had said goodbye
    assert len({network.summary(name)["adapter_digest"] for name in network.names}) == 1


def test_a_site_waits_for_a_server_that_is_not_there(network: Network) -> None:
    network.start("ash")
    network.wait_until(lambda: "waiting for the server at 127.0.0.1" in network.log("ash"), 60)
    assert network.log("ash").count("waiting for the server") == 1
    network.processes["ash"].send_signal(signal.SIGTERM)
    assert network.processes["ash"].wait(15) == 130


def test_a_demos_processes_die_with_it(tmp_path: Path, images: Path) -> None:
    program = (
        "import sys; from pathlib import Path\n"
        "from tests.conftest import make_template\n"
        "from secure_fed.lab.demo import run_demo\n"
        "from secure_fed.lab.simulation import Listener\n"
        "quiet = Listener(encoding=lambda *_: None, round=lambda _: None, stage=lambda _: None)\n"
        "run_demo(make_template(rounds=500), Path(sys.argv[1]), Path(sys.argv[2]), quiet)\n"
    )
    out = tmp_path / "out"
    demo = subprocess.Popen([sys.executable, "-c", program, str(out), str(images)])
    try:
        end = time.monotonic() + 90
        while not list((out / "server").glob("runs/*/journal/00000002.record")):
            assert time.monotonic() < end
            assert demo.poll() is None
            time.sleep(0.1)
        children = descendants(demo.pid)
        assert len(children) == 6  # server, its rounds, four sites
    finally:
        demo.kill()
        demo.wait()
    end = time.monotonic() + 5
    while any(runs(child) for child in children):
        assert time.monotonic() < end, [child for child in children if runs(child)]
        time.sleep(0.1)


def descendants(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += [int(child), *descendants(int(child))]
    return found

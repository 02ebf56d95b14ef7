"""``secfacmic demo``: what it prepares, what it refuses, and (slow) a whole one."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tomli_w

from secure_fed import configs
from secure_fed.clients.sitefile import read_site_file
from secure_fed.core.errors import DataError, StudyError
from secure_fed.core.layout import ServerState
from secure_fed.lab.demo import PORT, as_one_sum, prepare_federation, with_sites
from secure_fed.lab.simulation import Listener, simulate
from secure_fed.protocol.study import read_template
from tests.conftest import TRAINING, make_template, template_table


def test_prepare_writes_everything_and_starts_nothing(tmp_path: Path, images: Path) -> None:
    out = tmp_path / "out"
    agreed = prepare_federation(make_template(), out, images)
    assert ServerState(out / "server").current_run is not None
    for name in ("ca.crt", "ca.key", "server.crt", "server.key"):
        assert (out / "server" / "tls" / name).exists()
    for member in agreed.study.sites:
        file = read_site_file(out / "sites" / member.name / "site.toml")
        assert file.server is not None
        assert file.server.address == f"127.0.0.1:{PORT}"
        assert Path(file.server.authority).exists()
        assert list((out / "sites" / member.name / "state" / "keys").glob("*.sealed"))
    # Again, for another port: the same study, keys and run.
    run = ServerState(out / "server").current_run
    prepare_federation(make_template(), out, images, 9000)
    assert ServerState(out / "server").current_run == run
    file = read_site_file(out / "sites" / "ash" / "site.toml")
    assert file.server is not None
    assert file.server.address == "127.0.0.1:9000"


def test_fewer_sites_are_the_first_ones() -> None:
    template = make_template(mode="plain", min_sites=2, key_maker="cedar")
    fewer = with_sites(template, 2)
    assert [site.name for site in fewer.sites] == ["ash", "birch", "dogwood"]
    assert fewer.key_maker == "ash"
    assert [site.name for site in fewer.plan.sites] == ["ash", "birch", "dogwood"]
    with pytest.raises(StudyError, match=r"expected 2 \(min_sites of study small\) to 3"):
        with_sites(template, 4)
    with pytest.raises(StudyError, match="min_sites"):
        with_sites(make_template(), 2)


def test_one_sum_is_of_the_same_sites_and_images() -> None:
    other = as_one_sum(make_template())
    assert other is not None
    assert (other.plan, other.sites, other.seed) == (make_template().plan, make_template().sites, make_template().seed)
    assert as_one_sum(other) is None  # there is nothing to compare it with
    for name in configs.packaged():  # also of sites with weights, and of as many as there may be
        template = read_template(Path(name))
        assert (as_one_sum(template) is None) == template.method.sums
    assert as_one_sum(make_template(max_sites=1000, encoding={"value_bound": 0.1})) is not None


@pytest.mark.slow
def test_a_demo_gives_what_a_simulation_gives(tmp_path: Path, images: Path) -> None:
    template = tmp_path / "small.toml"
    template.write_text(tomli_w.dumps(template_table()))
    out = tmp_path / "out"
    command = [sys.executable, "-m", "secure_fed.cli", "demo", str(template), "--data", str(images), "--out", str(out)]
    result = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=180)
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout)
    assert summary == json.loads((out / "summary.json").read_text())
    quiet = Listener(encoding=lambda *_: None, round=lambda _: None, stage=lambda _: None)
    expected = simulate(make_template(), tmp_path / "simulated", images, quiet)
    assert set(summary) == set(expected)
    for key in ("backbone", "method", "mode", "seed", "sites", "adapter_digest"):
        assert summary[key] == expected[key], key
    row = summary["metrics"].pop("one_sum")
    assert summary["metrics"] == expected["metrics"]
    assert set(row["per_site"]) == set(TRAINING)
    assert row["held_out"]["images"] == expected["metrics"]["federated"]["held_out"]["images"]
    assert [row["sites_in"] for row in summary["rounds"]] == [len(TRAINING)] * 3
    assert [row["bytes_up"] for row in summary["rounds"]] == [row["bytes_up"] for row in expected["rounds"]]
    # Again: the study is finished, so that a new run with a new key follows, which draws anew.
    again = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=180)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["adapter_digest"] != expected["adapter_digest"]
    assert len(list((out / "server" / "runs").iterdir())) == 2


def _family(ancestor: int) -> dict[int, list[str]]:
    """Words of the command of a process and of all that it started."""
    parents, words = {}, {}
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parents[int(place.name)] = int((place / "stat").read_text().rpartition(")")[2].split()[1])
            words[int(place.name)] = (place / "cmdline").read_text().split("\0")
    found = {ancestor}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return {process: words.get(process, []) for process in found}


def _listened_on(process: int) -> set[tuple[str, str, int]]:
    """Protocol, address and port of each socket of a process that takes what comes, as the kernel has them."""
    own = set()
    for file in Path(f"/proc/{process}/fd").glob("*"):
        with contextlib.suppress(OSError):
            own.add(file.readlink().name)
    found = set()
    for protocol, waits in (("tcp", "0A"), ("tcp6", "0A"), ("udp", "07"), ("udp6", "07")):
        for line in Path(f"/proc/{process}/net/{protocol}").read_text().splitlines()[1:]:
            columns = line.split()
            if columns[3] == waits and f"socket:[{columns[9]}]" in own:
                address, _, port = columns[1].partition(":")
                words = [bytes.fromhex(address[at : at + 8])[::-1] for at in range(0, len(address), 8)]
                found.add((protocol[:3], str(ipaddress.ip_address(b"".join(words))), int(port, 16)))
    return found


@pytest.mark.slow
def test_a_demo_opens_no_port_but_its_own(tmp_path: Path, images: Path) -> None:
    """Of all its processes the server alone listens, on loopback: for the sites, and for its own rounds."""
    template, out = tmp_path / "small.toml", tmp_path / "out"
    template.write_text(tomli_w.dumps(template_table()))
    command = [sys.executable, "-P", "-m", "secure_fed.cli", "demo", str(template), "--data", str(images)]
    seen: dict[str, set[tuple[str, str, int]]] = {}
    with subprocess.Popen([*command, "--out", str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as demo:
        while demo.poll() is None:
            for process, words in _family(demo.pid).items():
                with contextlib.suppress(OSError):  # it has ended
                    what = words[words.index("secure_fed.cli") + 1] if "secure_fed.cli" in words else words[-1]
                    seen.setdefault(what, set()).update(_listened_on(process))
            time.sleep(0.02)
    assert demo.returncode == 0
    assert {"demo", "server", "client"} <= set(seen)
    server = read_site_file(out / "sites" / "ash" / "site.toml").server
    assert server is not None
    (for_sites, inside) = sorted(seen.pop("server"), key=lambda one: f"{one[1]}:{one[2]}" != server.address)
    assert f"{for_sites[1]}:{for_sites[2]}" == server.address
    assert inside[1] == "127.0.0.1"
    assert for_sites[0] == inside[0] == "tcp"
    assert set().union(*seen.values()) == set()


@pytest.mark.slow
def test_a_demo_whose_site_cannot_work_says_why_before_any_process_starts(tmp_path: Path, images: Path) -> None:
    template = tmp_path / "small.toml"
    table = template_table()
    table["simulation"]["sites"][1]["folder"] = "nowhere"
    template.write_text(tomli_w.dumps(table))
    command = [sys.executable, "-m", "secure_fed.cli", "demo", str(template), "--data", str(images)]
    result = subprocess.run([*command, "--out", str(tmp_path / "out")], capture_output=True, text=True, timeout=120)
    assert result.returncode == DataError.exit_code
    assert "nowhere: no such folder" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out" / "logs").exists()

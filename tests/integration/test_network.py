"""Hosts with addresses of their own: the deployment page followed to the letter, what outsiders get, a cut cable, an
installation and a site without internet. Run with ``make test-network``, as root."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from secure_fed import configs
from secure_fed.clients.flower_app import PROBE_BYTES
from secure_fed.clients.sitefile import SiteFile, SiteServer
from secure_fed.core.errors import SiteFileError
from secure_fed.core.tomlfile import read_toml, write_toml
from secure_fed.lab.phantoms import PhantomSite, make_phantoms
from secure_fed.lab.simulation import open_run, open_sites, prepare
from secure_fed.protocol.study import AgreedStudy, Template
from secure_fed.transport.certificates import create_authority
from tests.conftest import OBSERVER, TRAINING, make_template
from tests.forked import Forked
from tests.namespaces import Host, Hosts, Lan

pytestmark = pytest.mark.network

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "deploy.md"
HOSPITALS = ("north", "east", "south")
PORT = 8443


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    made = Hosts(tmp_path_factory.mktemp("hosts"))
    yield made
    made.close()


# --- the page ---


@dataclass
class Page:
    """The page's blocks, played at their hosts, and what was seen meanwhile."""

    hosts: Hosts
    environment: dict[str, dict[str, str]]
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    exits: dict[str, int] = field(default_factory=dict)
    said: dict[str, str] = field(default_factory=dict)
    seen: dict[str, Any] = field(default_factory=dict)

    def play(self) -> None:
        """All sections, one after the other."""
        for section in re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
            for language, tag, body in re.findall(r"^```(\w+) ?(.*)\n((?:.*\n)*?)^```$", section, re.MULTILINE):
                if language == "send":
                    self._send(body)
                elif tag.startswith("host="):
                    names = HOSPITALS if tag == "host=site" else (tag.removeprefix("host="),)
                    for name in names:
                        self._type(name, body)
            for name, process in self.running.items():
                self.exits[name] = process.wait(900)
            self.running.clear()

    def log(self, name: str) -> str:
        path = self.hosts[name].folder.parent / f"{name}.log"
        return path.read_text() if path.exists() else ""

    def _type(self, name: str, body: str) -> None:
        host = self.hosts[name]
        environment = self.environment[name]
        shell = ["bash", "-euc", body]
        if re.match(r"secfacmic (server|client) ", body):
            self.running[name] = host.start(shell, host.folder.parent / f"{name}.log", environment)
            if name == "coordinator":
                self._until("listening", name)
                self.seen["outside"] = probe(self.hosts, environment["SERVER"])
            elif len(self.running) == 1 + len(HOSPITALS):
                for hospital in HOSPITALS:
                    self._until("connected to", hospital)
                self.seen["sockets"] = {site: sockets_of(self.hosts[site]) for site in HOSPITALS}
            return
        result = host.run(shell, 600, environment)
        self.said[name] = self.said.get(name, "") + result.stdout + result.stderr
        assert result.returncode == 0, f"at {name}: {body}\n{result.stdout}\n{result.stderr}"

    def _send(self, body: str) -> None:
        for line in body.strip().splitlines():
            for site in HOSPITALS if re.search(r"\bsite:", line) else ("",):
                source, target = re.sub(r"\bsite:", f"{site}:", line).replace("$SITE", site).split(" -> ")
                (sender, file), (receiver, folder) = source.split(":"), target.split(":")
                place = self.hosts[receiver].folder / folder
                place.mkdir(parents=True, exist_ok=True)
                shutil.copy(self.hosts[sender].folder / file, place)

    def _until(self, text: str, name: str, seconds: float = 240) -> None:
        end = time.monotonic() + seconds
        while text not in self.log(name):
            assert self.running[name].poll() is None, self.log(name)
            assert time.monotonic() < end, self.log(name)
            time.sleep(0.1)


def probe(hosts: Hosts, server: str) -> dict[str, Any]:
    """What an outsider gets, from a host of its own, with public files and its own keys only."""
    outsider = hosts["outsider"]
    result = outsider.run(["secfacmic", "site", "init", "elsewhere", "--data", "images", "--server", "192.0.2.1:1"])
    assert result.returncode == 0, result.stderr
    shutil.copy(hosts["coordinator"].folder / "fed" / "server" / "tls" / "ca.crt", outsider.folder)
    # The member's key is read only for its public half, which stands in study.toml.
    member = hosts["north"].folder / "identity" / "flower.key"
    program = str(ROOT / "tests" / "probe.py")
    result = outsider.run(
        [sys.executable, program, server, str(PORT), "ca.crt", "identity/flower.key", "scratch", str(member)],
        environment={"PYTHONPATH": str(ROOT)},
    )
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def sockets_of(host: Host) -> str:
    """All sockets on which a process of this host listens, of the network and local ones."""
    processes = subprocess.run(["ip", "netns", "pids", host.space], capture_output=True, text=True).stdout.split()
    listening = host.run(["ss", "--listening", "--numeric", "--no-header", "--tcp", "--udp", "--raw"]).stdout
    # Local sockets belong to a network namespace too.
    listening += host.run(["ss", "--listening", "--numeric", "--no-header", "--unix"]).stdout
    assert processes
    return listening.strip()


@pytest.fixture(scope="module")
def page(hosts: Hosts) -> Page:
    lan = hosts.lan("10.91.7", "coordinator", *HOSPITALS, "outsider")
    assert lan.space
    server = hosts["coordinator"].address
    template = (Path(str(configs.find(Path("hospitals.toml"))))).read_text()
    edited = re.sub(r"(?m)^rounds = \d+", "rounds = 2", template)
    edited = re.sub(r"(?m)^steps = \d+", "steps = 2", edited)
    (hosts["coordinator"].folder / "edited.toml").write_text(edited)
    groups = [PhantomSite(name, 24, scanner, (1, 1, 1, 1), 0.2) for scanner, name in enumerate(HOSPITALS, 1)]
    environment: dict[str, dict[str, str]] = {"coordinator": {"TEMPLATE": "edited.toml", "SERVER": server}}
    for name, group in zip(HOSPITALS, groups, strict=True):
        make_phantoms(hosts[name].folder, [group], 1)
        environment[name] = {"SERVER": server, "SITE": name, "DATA": name, "WHO": f"Dr {name}"}
    played = Page(hosts, environment)
    played.play()
    return played


def test_the_deployment_page_leads_to_a_finished_study(page: Page) -> None:
    assert page.exits == dict.fromkeys(("coordinator", *HOSPITALS), 0)
    results = [json.loads((page.hosts[name].folder / "state" / "summary.json").read_text()) for name in HOSPITALS]
    assert len({result["adapter_digest"] for result in results}) == 1
    assert [result["round"] for result in results] == [2] * 3


def test_no_private_file_was_sent(page: Page) -> None:
    """What the page does not say to send is not where it does not belong."""
    private = {
        path.read_bytes(): f"{name}/{path.name}"
        for name in HOSPITALS
        for path in (page.hosts[name].folder / "identity").glob("*.key")
    }
    assert len(private) >= 3 * len(HOSPITALS)
    for name in ("coordinator", *HOSPITALS):
        for path in page.hosts[name].folder.rglob("*"):
            if path.is_file() and path.stat().st_size < 10_000 and "identity" not in path.parts:
                assert path.read_bytes() not in private, (name, path, private[path.read_bytes()])


def test_from_another_host_one_port_answers(page: Page) -> None:
    assert page.seen["outside"]["open ports"] == [PORT]


def test_from_another_host_only_fleet_and_health_exist(page: Page) -> None:
    outside = page.seen["outside"]
    assert outside["health"] == 200
    assert set(outside["paths"].values()) == {404}, outside["paths"]
    assert len(outside["paths"]) > 60


@pytest.mark.parametrize(
    ("who", "gets"),
    [
        ("no key", 403),
        ("unregistered key", "NotAdmittedError"),
        ("key of another study", "NotAdmittedError"),
        ("borrowed key", "401"),
        ("foreign authority", "CertificateError"),
        ("without TLS", "RemoteProtocolError"),
        ("oversized", 403),
        ("unbounded", 403),
    ],
)
def test_an_outsider_is_refused(page: Page, who: str, gets: object) -> None:
    assert page.seen["outside"][who] == gets


def test_a_site_listens_on_nothing(page: Page) -> None:
    """No runtime endpoint that another user of the site's computer could use, neither a port nor a local socket."""
    assert page.seen["sockets"] == dict.fromkeys(HOSPITALS, "")


def test_a_listening_socket_would_be_seen(hosts: Hosts, tmp_path: Path) -> None:
    host = hosts.host("listener")
    program = "import socket, time; a = socket.socket(); a.listen(); b = socket.socket(socket.AF_UNIX); "
    program += "b.bind('there'); b.listen(); print('ready', flush=True); time.sleep(60)"
    process = host.start([sys.executable, "-c", program], tmp_path / "log")
    try:
        end = time.monotonic() + 60
        while "ready" not in (tmp_path / "log").read_text():
            assert time.monotonic() < end
            time.sleep(0.1)
        assert len(sockets_of(host).splitlines()) == 2
    finally:
        process.kill()
        process.wait()


# --- a federation that is already prepared, its processes on their hosts ---


class Spread:
    """A prepared study whose server and sites run on hosts of their own."""

    def __init__(self, hosts: Hosts, folder: Path, template: Template, images: Path, port: int = PORT) -> None:
        self.hosts = hosts
        self.folder = folder
        address = hosts["server"].address
        self.address = f"{address}:{port}"
        server = SiteServer(address=self.address, authority="../../server/tls/ca.crt")
        self.agreed: AgreedStudy = prepare(template, folder, images, server)
        create_authority(folder / "server" / "tls", [address])
        sites = open_sites(self.agreed, folder)
        for site in sites:
            site.features()
        open_run(self.agreed, folder, sites)
        self.names = [site.name for site in self.agreed.study.sites]
        self.processes: dict[str, subprocess.Popen[bytes] | Forked] = {}

    def start(self, *names: str, environment: Mapping[str, str] | None = None) -> None:
        for name in names:
            log = self.folder / f"{name}.log"
            if name == "server":
                arguments = ["server", "--study", str(self.folder / "study.toml"), "--mode", self.agreed.study.mode]
                port = self.address.rpartition(":")[2]
                arguments += ["--state", str(self.folder / "server"), "--listen", f"0.0.0.0:{port}"]
                command = [sys.executable, "-P", "-m", "secure_fed.cli", *arguments]
                self.processes[name] = self.hosts[name].start(command, log, environment)
            else:
                arguments = ["client", "--site", str(self.folder / "sites" / name / "site.toml")]
                space = self.hosts[name].space
                self.processes[name] = Forked(arguments, log, space=space, environment=environment)

    def log(self, name: str) -> str:
        path = self.folder / f"{name}.log"
        return path.read_text() if path.exists() else ""

    def until(self, text: str, name: str, seconds: float = 300) -> None:
        end = time.monotonic() + seconds
        while text not in self.log(name):
            assert time.monotonic() < end, {each: self.log(each)[-1500:] for each in self.processes}
            time.sleep(0.1)

    def wait(self, seconds: float = 600) -> dict[str, int]:
        end = time.monotonic() + seconds
        try:
            return {name: process.wait(max(0.1, end - time.monotonic())) for name, process in self.processes.items()}
        except subprocess.TimeoutExpired:
            raise AssertionError({each: self.log(each)[-1500:] for each in self.processes}) from None

    def digests(self) -> set[str]:
        return {
            json.loads((self.folder / "sites" / name / "state" / "summary.json").read_text())["adapter_digest"]
            for name in self.names
        }


@pytest.fixture
def own_hosts(tmp_path: Path) -> Iterator[Hosts]:
    made = Hosts(tmp_path / "hosts")
    yield made
    made.close()


def expected(folder: Path, template: Template, images: Path) -> str:
    """The adapter of the same study in one process."""
    from secure_fed.lab.simulation import Listener, simulate

    quiet = Listener(encoding=lambda *_: None, round=lambda _: None, stage=lambda _: None)
    return str(simulate(template, folder, images, quiet)["adapter_digest"])


def test_a_network_cut_of_60_s_in_the_middle_of_an_upload_costs_time_only(
    own_hosts: Hosts, tmp_path: Path, images: Path
) -> None:
    lan: Lan = own_hosts.lan("10.91.8", "server", *TRAINING, OBSERVER)
    template = make_template(
        rounds=2,
        round_seconds=600,
        backbone={"model": "mini-clip", "weights": "random", "seed": 1},
        training={"steps": 1, "learning_rate": 0.003, "batch_size": 8},
    )
    spread = Spread(own_hosts, tmp_path / "out", template, images)
    lan.limit(own_hosts["birch"], "1500kbit")
    spread.start("server", *spread.names)
    spread.until("connected to", "birch")
    start = lan.received(own_hosts["birch"])  # before its upload, which is most of what it sends
    end = time.monotonic() + 120
    while lan.received(own_hosts["birch"]) < start + 400_000:
        assert time.monotonic() < end
        time.sleep(0.05)
    lan.cut(own_hosts["birch"])
    sent = lan.received(own_hosts["birch"]) - start
    time.sleep(60)
    lan.mend(own_hosts["birch"])
    assert set(spread.wait().values()) == {0}
    (size,) = {path.stat().st_size for path in (tmp_path / "out/sites/birch/state").rglob("00000002.envelope")}
    assert 400_000 <= sent < size  # it was in the middle
    assert "birch is not connected any more" in spread.log("server")
    assert spread.digests() == {expected(tmp_path / "simulated", template, images)}
    assert "goes on without" not in spread.log("server")


PROXY = """
import json, socket, sys, threading
log = open(sys.argv[1], "a")
def pump(a, b):
    try:
        while data := a.recv(65536):
            b.sendall(data)
    except OSError:
        pass
    for one in (a, b):
        try: one.shutdown(socket.SHUT_RDWR)
        except OSError: pass
def serve(client):
    head = b""
    while b"\\r\\n\\r\\n" not in head:
        part = client.recv(4096)
        if not part: return
        head += part
    method, target, _ = head.split(b"\\r\\n")[0].decode().split()
    print(json.dumps([method, target]), file=log, flush=True)
    host, _, port = target.rpartition(":")
    if method != "CONNECT" or port != "443":
        client.sendall(b"HTTP/1.1 403 Forbidden\\r\\nContent-Length: 0\\r\\n\\r\\n")
        client.close()
        return
    upstream = socket.create_connection((host, 443))
    client.sendall(b"HTTP/1.1 200 Connection established\\r\\n\\r\\n")
    threading.Thread(target=pump, args=(upstream, client), daemon=True).start()
    pump(client, upstream)
listener = socket.create_server(("0.0.0.0", 3128))
print("ready", file=log, flush=True)
while True:
    threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
"""
"""A proxy that lets through CONNECT to port 443 and nothing else."""


def start_proxy(hosts: Hosts, program: str, tmp_path: Path) -> Path:
    """A proxy that listens; its log."""
    log = tmp_path / "proxy.log"
    log.touch()
    hosts["proxy"].start([sys.executable, "-c", program, str(log)], tmp_path / "proxy.err")
    end = time.monotonic() + 60
    while "ready" not in log.read_text():
        assert time.monotonic() < end, (tmp_path / "proxy.err").read_text()
        time.sleep(0.1)
    return log


def behind_proxy(own_hosts: Hosts, tmp_path: Path) -> Path:
    """Server and two sites on one network; birch on another, with nothing but a proxy on both. Returns its log."""
    own_hosts.lan("10.91.9", "server", "ash", "cedar", OBSERVER, "proxy")
    own_hosts.lan("10.91.10", "birch", "proxy")
    return start_proxy(own_hosts, PROXY, tmp_path)


@pytest.mark.parametrize("by", ["site.toml", "environment"])
def test_a_site_behind_a_proxy_with_nothing_but_outbound_443_takes_part(
    own_hosts: Hosts, tmp_path: Path, images: Path, by: str
) -> None:
    log = behind_proxy(own_hosts, tmp_path)
    template = make_template(rounds=2, round_seconds=600)
    spread = Spread(own_hosts, tmp_path / "out", template, images, 443)
    proxy = "http://10.91.10.2:3128"
    environment = {}
    if by == "site.toml":
        path = tmp_path / "out" / "sites" / "birch" / "site.toml"
        file = read_toml(path, SiteFile, SiteFileError)
        assert file.server is not None
        write_toml(path, file.model_copy(update={"server": file.server.model_copy(update={"proxy": proxy})}))
    else:
        environment = {"HTTPS_PROXY": proxy}
    spread.start("server", "ash", "cedar", OBSERVER)
    spread.start("birch", environment=environment)
    assert set(spread.wait().values()) == {0}
    assert spread.digests() == {expected(tmp_path / "simulated", template, images)}
    calls = [json.loads(line) for line in log.read_text().splitlines()[1:]]
    assert calls
    assert {tuple(call) for call in calls} == {("CONNECT", spread.address)}


def test_without_the_proxy_the_site_cannot_get_out_and_with_a_refusing_one_it_names_it(
    own_hosts: Hosts, tmp_path: Path, images: Path
) -> None:
    behind_proxy(own_hosts, tmp_path)
    spread = Spread(own_hosts, tmp_path / "out", make_template(rounds=1, round_seconds=600), images, 8443)
    spread.start("server")
    spread.start("birch")
    spread.until("waiting for the server at 10.91.9.1:8443 (network is unreachable)", "birch")
    spread.processes["birch"].terminate()
    assert spread.processes["birch"].wait(60) == 130
    spread.start("birch", environment={"HTTPS_PROXY": "http://user:geheim@10.91.10.2:3128"})
    spread.until("through the proxy http://10.91.10.2:3128 (the proxy refuses: 403 Forbidden)", "birch")
    assert "geheim" not in spread.log("birch")


# --- slow lines ---


SLOW = {
    "rounds": 1,
    "round_seconds": 60,  # far less than an upload takes: the deadline counts from when nothing moves any more
    "backbone": {"model": "mini-clip", "weights": "random", "seed": 1},
    "training": {"steps": 1, "learning_rate": 0.003, "batch_size": 8},
}


def size_of(spread: Spread, name: str) -> int:
    """Bytes of a site's envelope of the round."""
    (size,) = {path.stat().st_size for path in (spread.folder / "sites" / name / "state").rglob("00000001.envelope")}
    return size


OVERHEAD = 250_000
"""Bytes of handshakes, heads, heartbeats and acknowledgements of minutes."""

LOSSY = 1.35
"""Most bytes that cross a line with losses, of one that is sent: heads of parts and packets, acknowledgements of the
record that comes down, and what TCP sends twice; 1.28 measured."""


def test_a_line_of_64_kbit_with_losses_finishes_its_round_and_sends_each_byte_once(
    own_hosts: Hosts, tmp_path: Path, images: Path
) -> None:
    lan = own_hosts.lan("10.91.11", "server", *TRAINING, OBSERVER)
    spread = Spread(own_hosts, tmp_path / "out", make_template(**SLOW), images)
    lan.slow(own_hosts["birch"], "64kbit")
    spread.start("server", *spread.names)
    spread.until("listening on", "server")  # which has said its status by then
    seen = set()
    end = time.monotonic() + 900
    while spread.processes["server"].poll() is None:
        assert time.monotonic() < end, {name: spread.log(name)[-1500:] for name in spread.processes}
        status = json.loads((tmp_path / "out" / "server" / "status.json").read_text())
        seen.add(status.get("sites", {}).get("birch", {}).get("doing", "").partition(":")[0])
        time.sleep(0.5)
    assert set(spread.wait().values()) == {0}
    assert "uploading" in seen  # status said so
    assert "goes on without" not in spread.log("server")
    assert "another attempt" not in spread.log("server")
    assert lan.lost(own_hosts["birch"]) >= 0.05
    up = size_of(spread, "birch")
    told = re.findall(r"(\d+) bytes went up in \d+ parts and \d+ s; (\d+) of them again", spread.log("birch"))
    (again,) = [int(again) for size, again in told if int(size) == up]  # the line was measured before
    assert again <= 0.1 * up
    assert lan.received(own_hosts["birch"]) <= LOSSY * (up + PROBE_BYTES)


BUFFERING = """
import json, socket, sys, threading, time
log, rate, room = open(sys.argv[1], "a"), 32_000, 4 * 2**20
passed = 0
def pump(a, b, slowly):
    held, wake, over = bytearray(), threading.Condition(), []
    def take():
        try:
            while data := a.recv(65536):
                with wake:
                    wake.wait_for(lambda: len(held) < room)
                    held.extend(data)
                    wake.notify_all()
        except OSError:
            pass
        with wake:
            over.append(1)
            wake.notify_all()
    threading.Thread(target=take, daemon=True).start()
    global passed
    try:
        while True:
            with wake:
                wake.wait_for(lambda: held or over)
                if not held:
                    break
                data = bytes(held[:3200])
                del held[:3200]
                wake.notify_all()
            b.sendall(data)
            if slowly:
                passed += len(data)
                time.sleep(len(data) / rate)
    except OSError:
        pass
    for one in (a, b):
        try: one.shutdown(socket.SHUT_RDWR)
        except OSError: pass
def serve(client):
    head = b""
    while b"\\r\\n\\r\\n" not in head:
        part = client.recv(1)
        if not part: return
        head += part
    host, _, port = head.split()[1].decode().rpartition(":")
    upstream = socket.create_connection((host, int(port)))
    client.sendall(b"HTTP/1.1 200 Connection established\\r\\n\\r\\n")
    threading.Thread(target=pump, args=(upstream, client, False), daemon=True).start()
    pump(client, upstream, True)
    print(json.dumps(passed), file=log, flush=True)
listener = socket.create_server(("0.0.0.0", 3128))
print("ready", file=log, flush=True)
while True:
    threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
"""
"""A proxy that takes all that comes at once, up to 4 MiB, and passes it on at 256 kbit/s; it logs what it passed."""


def test_a_store_and_forward_proxy_of_256_kbit_passes_each_byte_once(
    own_hosts: Hosts, tmp_path: Path, images: Path
) -> None:
    own_hosts.lan("10.91.12", "server", "ash", "cedar", OBSERVER, "proxy")
    own_hosts.lan("10.91.13", "birch", "proxy")
    log = start_proxy(own_hosts, BUFFERING, tmp_path)
    spread = Spread(own_hosts, tmp_path / "out", make_template(**SLOW), images)
    spread.start("server", "ash", "cedar", OBSERVER)
    spread.start("birch", environment={"HTTPS_PROXY": "http://10.91.13.2:3128"})
    assert set(spread.wait(900).values()) == {0}
    assert "goes on without" not in spread.log("server")
    assert "another attempt" not in spread.log("server")
    up = size_of(spread, "birch")
    passed = max(int(line) for line in log.read_text().splitlines()[1:])
    assert up <= passed <= 1.1 * up + OVERHEAD


# --- no internet at all ---


def test_an_installation_from_the_wheelhouse_needs_no_network(own_hosts: Hosts, tmp_path: Path) -> None:
    wheels = ROOT / "wheelhouse"
    if not list(wheels.glob("secfacmic-*.whl")):
        pytest.fail(f"{wheels}: no wheels; make them with: make wheelhouse")
    island = own_hosts.host("island")
    assert island.run(["ip", "route"]).stdout == ""
    assert island.run([sys.executable, "-m", "venv", "venv"]).returncode == 0
    python = str(island.folder / "venv" / "bin" / "python")
    # Nothing of this machine's pip settings or caches.
    alone = {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_CACHE_DIR": "1", "PYTHONPATH": ""}
    command = [python, "-m", "pip", "install", "--quiet", "--no-compile", "--no-index", "--find-links", str(wheels)]
    result = island.run([*command, "secfacmic"], 1800, alone)
    assert result.returncode == 0, result.stderr
    demo = [str(island.folder / "venv" / "bin" / "secfacmic"), "demo", "--rounds", "1", "--out", "demo", "--json"]
    result = island.run(demo, 900, alone)
    assert result.returncode == 0, result.stderr
    assert len(json.loads(result.stdout)["rounds"]) == 1

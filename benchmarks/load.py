"""What many sites cost one server: canned sites, which neither train nor decrypt, over TLS on loopback.

Each canned site is a thread that speaks the same protocol through the same client code as a site does
(``secure_fed.clients.flower_node``, ``secure_fed.clients.flower_app``): it takes the records, says that it is ready,
signs an envelope of the true size for the cohort, and reveals its check. The encrypted payload is made once and is
every site's; headers and signatures are each site's own.
The server is ``secfacmic server``, unchanged. What it spends counts from its start to its end, imports included, but
for the time in which it rests before the first round, where what connected sites cost is measured. Three floors are
measured in the same run: a bare ASGI app under the same uvicorn and TLS, which takes and gives the same bytes and does
nothing else; the same one, which digests what it takes, checks and adds its residues and writes it down durably, once
each; and the bare one, called as often as the server is: a round has three questions to each site.

    python benchmarks/load.py [--sites 64] [--rounds 5] [--json FILE]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import resource
import secrets
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key

from secure_fed.core.errors import EnvelopeError, ProtocolError
from secure_fed.core.processes import be_quiet_outside
from secure_fed.protocol.envelope import EnvelopeHeader, RoundPosition, seal_envelope
from secure_fed.protocol.ledger_heads import NO_LEDGER
from secure_fed.protocol.packing import Contribution, Sealed, wire
from secure_fed.protocol.presence import PresenceQuestion, sign_presence
from secure_fed.protocol.records import RecordHeader, head_after, read_header
from secure_fed.protocol.round_frames import (
    ARRIVED_MAGIC,
    COHORT_MAGIC,
    arrived_digest,
    arrived_header,
    max_header,
    sign_ready,
    sign_reveal,
)
from secure_fed.protocol.rounds import ReplyCode, RoundReply, RoundRequest
from secure_fed.protocol.signing import ZERO_DIGEST, load_signing_key, parse_header, split_frame
from secure_fed.protocol.study import AgreedStudy, load_study

T = TypeVar("T")

NODE_PROCESSES = 2
PAYLOAD = "payload"
CONNECT_SECONDS = 0.02
"""Between two sites' first calls: all are of one address, of which the server takes 32 strangers at a time."""

CALLS, QUESTIONS, QUESTION_BYTES = 6, 2, 330
"""What a site asks the server for in a round, beside its envelope and the record: READY, COHORT and ARRIVED are a look
and a reply each, with words of about a kilobyte, and two of them name a question with a signed word of each site."""

SETTLE_SECONDS, IDLE_SECONDS = 5.0, 30.0
"""After all sites have said that they are there: how long until their idle time is measured, and how long it is."""


class Shared:
    """What all canned sites of a process find alike, found once: hundreds that each read a record of as many headers
    would leave no processor to their signs of life, as hospitals' own computers do."""

    def __init__(self) -> None:
        self._found: dict[object, Any] = {}
        self._lock = threading.Lock()

    def get(self, key: object, find: Callable[[], T]) -> T:
        """What is found for a key."""
        with self._lock:
            if key not in self._found:
                self._found[key] = find()
            found: T = self._found[key]
            return found


class CannedSite:
    """As much of a site as its app needs."""

    def __init__(self, agreed: AgreedStudy, folder: Path, name: str, payload: bytes, shared: Shared) -> None:
        self.name = name
        self._shared = shared
        self.position = 0
        self._agreed = agreed
        self._payload = payload
        self._signing = load_signing_key(folder / "identity" / "signing.key")
        key = load_ssh_private_key((folder / "identity" / "flower.key").read_bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        self.connection_key = key
        self._due = RoundPosition("", ZERO_DIGEST, ZERO_DIGEST, 0, 1)
        self._wire = wire(agreed.study.mode, agreed.layout(1).lanes)

    @property
    def finished(self) -> bool:
        """Whether it has the last round's record."""
        return self._due.round > self._agreed.study.rounds

    over = finished
    authority = None

    def respond(self, request: RoundRequest) -> RoundReply:
        """Take the records unchecked, and answer the round's questions with the canned update."""
        for data in request.records:
            key = hashlib.sha256(data).digest()
            self.position, self._due = self._shared.get(key, partial(self._after, data))
        if request.more or self.finished or not request.attempt:
            return self._reply(ReplyCode.MORE if request.more else ReplyCode.APPLIED)
        asked = request.question[:4]
        if asked == COHORT_MAGIC:
            cohort = split_frame(COHORT_MAGIC, request.question, max_header(self._agreed), ProtocolError).digest
            sealed = Sealed(Contribution(self.name, secrets.token_hex(32)), self._payload)
            envelope = seal_envelope(
                *(self._agreed, self._due, sealed, NO_LEDGER, self._signing), attempt=request.attempt, cohort=cohort
            )
            return self._reply(ReplyCode.UPDATE, envelope)
        if asked == ARRIVED_MAGIC:
            arrived = split_frame(ARRIVED_MAGIC, request.question, max_header(self._agreed), ProtocolError).digest
            check = self._shared.get(arrived, partial(self._wire.check_words, arrived, self._payload))
            return self._reply(ReplyCode.REVEALED, sign_reveal(self._agreed, arrived, self.name, check, self._signing))
        ready = sign_ready(self._agreed, self._due, request.attempt, self.name, False, self._signing)
        return self._reply(ReplyCode.READY, ready)

    def present(self, question: PresenceQuestion, rate: float) -> RoundReply:
        """Say that it is there."""
        facts = {"purpose": "ready", "accepted": ZERO_DIGEST, "keyed": True, "secfacmic": version("secfacmic")}
        facts |= {"clock_ms": time.time_ns() // 1_000_000, "rate": int(rate), "rehearsed": "", "rehearsed_bytes": 0}
        word = sign_presence(self._agreed, self.name, self._signing, run=question.run, **facts)
        return RoundReply(self.name, ReplyCode.PRESENT, question.run, self.position, "", word)

    def _after(self, data: bytes) -> tuple[int, RoundPosition]:
        """How many records there are with this one, and which round is due then."""
        frame, header = read_header(data, self._agreed)
        head = frame.digest if header.kind == "genesis" else self._head_after(header)
        return header.seq + 1, RoundPosition(header.run, head, header.key, 0, header.round + 1)

    def _head_after(self, header: RecordHeader) -> str:
        """The head after an aggregate, as :class:`secure_fed.protocol.records.Chain` finds it."""
        words = header.contributors
        first = parse_header(words[0].signed[0], EnvelopeHeader, EnvelopeError)
        arrived = arrived_header(
            self._agreed, self._due, first.attempt, first.cohort, (header.size, header.payload), words
        )
        return head_after(self._due.head, arrived_digest(arrived))

    def _reply(self, code: ReplyCode, envelope: bytes = b"") -> RoundReply:
        # Keyed digests of an adapter are a site's business; random ones cost the server the same.
        attested = secrets.token_hex(32) if self.position else ""
        return RoundReply(self.name, code, self._due.run, self.position, attested, envelope)


def nodes(folder: Path, port: int, names: list[str]) -> None:
    """Play these sites in this process until the study is over."""
    be_quiet_outside()  # before flwr is imported
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a site has two connections, and its process hundreds
    from secure_fed.clients.flower_app import SiteApp
    from secure_fed.clients.flower_node import Way, run_site

    agreed = load_study(folder / "study.toml")
    payload = (folder / PAYLOAD).read_bytes()
    threads, shared = [], Shared()
    for name in names:
        site = CannedSite(agreed, folder / "sites" / name, name, payload, shared)
        app = SiteApp(site, agreed.study.id, lambda _: None)  # type: ignore[arg-type]
        way = Way(f"127.0.0.1:{port}", folder / "server" / "tls" / "ca.crt", len(agreed.study.sites))
        threads.append(threading.Thread(target=run_site, args=(app, way), name=name))
    for thread in threads:
        thread.start()
        time.sleep(CONNECT_SECONDS)
    for thread in threads:
        thread.join()
    if "torch" in sys.modules:
        raise SystemExit("torch was loaded; expected canned sites without it")


def prepare(folder: Path, sites: int, rounds: int) -> int:
    """A study of so many sites with keys, in a process of its own since it loads torch; its number of values."""
    command = [sys.executable, "-P", __file__, "--folder", str(folder), "--sites", str(sites), "--rounds", str(rounds)]
    subprocess.run([*command, "--prepare"], check=True)
    return load_study(folder / "study.toml").lanes.values


def make_study(folder: Path, sites: int, rounds: int) -> None:
    """Study, authority, run, each site's identity and the canned payload: no data, and only one site opens the key."""
    import numpy as np

    from secure_fed.core.layout import ServerState
    from secure_fed.operate.new_study import new_study
    from secure_fed.privacy.ckks import Cipher
    from secure_fed.privacy.keys import create_identity, create_sealed_key, open_sealed_key
    from secure_fed.protocol.packing import Binding
    from secure_fed.protocol.sealed_key import check_sealed_key
    from secure_fed.server.coordinator import Coordinator
    from secure_fed.transport.certificates import create_authority
    from tests.conftest import make_template

    names = [f"site-{number:04d}" for number in range(sites)]
    template = make_template(
        sites=[{"name": name} for name in names],
        key_maker=names[0],
        max_sites=sites,
        rounds=rounds,
        round_seconds=3600,
        backbone={"model": "mini-clip", "weights": "random", "seed": 1},
        encoding={"bits": 8 if sites > 256 else 11 if sites > 64 else 13, "lanes": 2, "value_bound": 0.1},
        simulation=None,
    )
    identities = [create_identity(folder / "sites" / name / "identity", name) for name in names]
    new_study(template, [identity.public for identity in identities], folder)
    agreed = load_study(folder / "study.toml")
    server = ServerState(folder / "server")
    create_authority(server.certificates, ["127.0.0.1", "localhost"])
    key = create_sealed_key(agreed, identities[0], 1)
    coordinator = Coordinator.begin(
        agreed, server.path, load_signing_key(server.key), check_sealed_key(key, agreed).key
    )
    integers = np.zeros(agreed.lanes.values, dtype=np.int64)
    sealed = Cipher(agreed.lanes, open_sealed_key(key, agreed, identities[0])).seal(
        integers, Binding(coordinator.run, coordinator.journal.chain.head, 1), names[0]
    )
    (folder / PAYLOAD).write_bytes(sealed.payload)


def measure(folder: Path, sites: int, rounds: int) -> dict[str, Any]:
    """Serve the study to its canned sites and take figures from journal and /proc."""
    from secure_fed.core.layout import ServerState
    from secure_fed.lab.demo import _free_port
    from secure_fed.protocol.journal import JournalEntry
    from secure_fed.protocol.records import Chain, RecordFolder
    from secure_fed.server.orders import hold_run
    from tests.network import busy, peak

    values = prepare(folder, sites, rounds)
    agreed = load_study(folder / "study.toml")
    hold_run(agreed, folder / "server", paused=True)  # until all are there, and their idle time was measured
    port = _free_port()
    names = sorted(path.name for path in (folder / "sites").iterdir())
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    server = ["-m", "secure_fed.cli", "server", "--study", str(folder / "study.toml"), "--mode", "he"]
    server += ["--state", str(folder / "server"), "--listen", f"127.0.0.1:{port}"]
    own = [sys.executable, "-P", __file__, "--folder", str(folder), "--port", str(port), "--nodes"]
    shares = [",".join(names[index::NODE_PROCESSES]) for index in range(NODE_PROCESSES)]
    commands = [[sys.executable, "-P", *server], *([*own, share] for share in shares)]
    processor: dict[str, float] = {}
    started = rested = begun_ms = 0.0
    memory: dict[str, int] = {}
    with (folder / "server.log").open("wb") as log:
        processes = [subprocess.Popen(command, stdout=log, stderr=log, env=environment) for command in commands]
        try:
            while processes[0].poll() is None:
                pids = {"superlink": processes[0].pid}
                pids |= {f"nodes {index}": process.pid for index, process in enumerate(processes[1:])}
                children = Path(f"/proc/{processes[0].pid}/task/{processes[0].pid}/children")
                if children.exists() and (text := children.read_text().split()):
                    pids["rounds"] = int(text[0])
                for name, pid in pids.items():
                    processor[name] = max(processor.get(name, 0.0), busy(pid))
                    memory[name] = max(memory.get(name, 0), peak(pid))
                if not begun_ms and _present(folder / "server" / "status.json") == sites:
                    time.sleep(SETTLE_SECONDS)
                    before = sum(busy(pids[name]) for name in ("superlink", "rounds"))
                    time.sleep(IDLE_SECONDS)
                    rested = sum(busy(pids[name]) for name in ("superlink", "rounds")) - before
                    hold_run(agreed, folder / "server", paused=False)
                    begun_ms = time.time() * 1000
                # The genesis alone: in the first round.
                if len(list((folder / "server" / "runs").glob("*/journal/*.record"))) == 1:
                    started = sum(processor[name] for name in ("superlink", "rounds") if name in processor)
                failed = [process for process in processes[1:] if process.poll()]
                if failed:
                    raise SystemExit((folder / "server.log").read_text()[-3000:])
                time.sleep(0.2)
            status = [process.wait(120) for process in processes]
        finally:
            for process in processes:
                if process.poll() is None:
                    process.kill()
                    process.wait()
    if any(status):
        raise SystemExit((folder / "server.log").read_text()[-3000:])
    records = RecordFolder(folder / "server" / "runs" / str(ServerState(folder / "server").current_run) / "journal")
    chain = Chain(agreed)
    entries = [JournalEntry(record) for record in records.replay(chain) if record.header.kind == "aggregate"]
    if any(len(entry.sites) != sites for entry in entries):
        raise SystemExit(f"rounds with {[len(entry.sites) for entry in entries]} sites; expected {sites} in each")
    # The first one counts if it is the only one, from when all were there.
    begun = [begun_ms, *(entry.header.opened_ms for entry in entries[1:])]
    seconds = [(entry.header.closed_ms - at) / 1000 for at, entry in zip(begun, entries, strict=True)]
    seconds = seconds[1:] or seconds
    served = sum(processor[name] for name in ("superlink", "rounds"))
    each = int(entries[-1].bytes_up / sites), entries[-1].size
    floor = measure_floor(folder, names, rounds, *each)
    floor_with_work = measure_floor(folder, names, rounds, *each, work=True)
    floor_with_calls = measure_floor(folder, names, rounds, *each, calls=True)
    late = served - started
    return {
        "sites": sites,
        "values": values,
        "rounds": rounds,
        "round_seconds": {"median": statistics.median(seconds), "each": seconds},
        "rounds_per_minute": 60 / statistics.median(seconds),
        "bytes_up_per_site": entries[-1].bytes_up / sites,
        "record_bytes": entries[-1].size,
        "bytes_per_round": entries[-1].bytes_up + entries[-1].size * sites,
        "processor_seconds": processor,
        "server_processor_seconds_per_site_and_round": (served - rested) / sites / rounds,
        "server_processor_seconds_per_site_and_later_round": late / sites / (rounds - 1) if rounds > 1 else None,
        "idle_processors": rested / IDLE_SECONDS,
        "floor": floor,
        "floor_with_work": floor_with_work,
        "floor_with_calls": floor_with_calls,
        "peak_memory_mb": {name: kilobytes * 1024 / 1e6 for name, kilobytes in memory.items()},
    }


FLOOR = """
import hashlib, itertools, sys
from pathlib import Path
import uvicorn
record, question, work = bytes(int(sys.argv[4])), bytes(int(sys.argv[5])), None
if len(sys.argv) > 6:
    from secure_fed.core.storage import write_durable
    from secure_fed.protocol.packing import wire
    from secure_fed.protocol.study import load_study
    agreed = load_study(Path(sys.argv[6]))
    added, spool, number = wire("he", agreed.lanes), Path(sys.argv[6]).parent, itertools.count()
    total = added.zero()
    def work(taken):
        global total
        hashlib.sha256(taken).digest()
        total = added.add(total, taken[-added.payload_bytes:])
        path = spool / f"floor.{next(number)}"
        write_durable(path, taken)
        path.unlink()
async def app(scope, receive, send):
    if scope["type"] != "http":
        return
    more, parts = True, []
    while more:
        event = await receive()
        more = event.get("more_body", False)
        if work:
            parts.append(event.get("body", b""))
    if parts and scope["method"] == "PUT":
        work(b"".join(parts))
    body = b"" if scope["method"] != "GET" else question if scope["path"] == "/question" else record
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    for start in range(0, len(body) or 1, 262144):
        part = body[start:start + 262144]
        await send({"type": "http.response.body", "body": part, "more_body": start + 262144 < len(body)})
uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), ssl_certfile=sys.argv[2], ssl_keyfile=sys.argv[3],
            http="httptools", loop="asyncio", lifespan="off", log_config=None, access_log=False, ws="none")
"""
"""A server that does nothing but take and give bytes, or, given a study, what must be done with them once. The parser
of HTTP and the event loop are those of ``secfacmic server``."""

FLOOR_SITES = """
import sys, threading, httpx, ssl
base, authority, sites, rounds, up, calls, questions = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
trust = ssl.create_default_context(cafile=authority)
data, word = bytes(up), bytes(1024)
def site():
    with httpx.Client(verify=trust, timeout=600, trust_env=False) as client:
        for _ in range(rounds):
            client.put(base, content=data).raise_for_status()
            client.get(base).raise_for_status()
            for _ in range(calls):
                client.post(base, content=word).raise_for_status()
            for _ in range(questions):
                client.get(base + "question").raise_for_status()
print("ready", flush=True)
sys.stdin.readline()
threads = [threading.Thread(target=site) for _ in range(sites)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""


def measure_floor(
    folder: Path, names: list[str], rounds: int, up: int, down: int, *, work: bool = False, calls: bool = False
) -> dict[str, float]:
    """What the same bytes cost a server that does nothing with them, or what must be done with them once, or is called
    as often as ours is."""
    from secure_fed.lab.demo import _free_port
    from tests.network import busy

    port, tls = _free_port(), folder / "server" / "tls"
    command = [
        sys.executable,
        "-P",
        "-c",
        FLOOR,
        str(port),
        str(tls / "server.crt"),
        str(tls / "server.key"),
        str(down),
        str(QUESTION_BYTES * len(names)),
        *([str(folder / "study.toml")] if work else []),
    ]
    with subprocess.Popen(command) as server:
        try:
            while _refused(port):
                time.sleep(0.1)
            shares = [len(names[index::NODE_PROCESSES]) for index in range(NODE_PROCESSES)]
            base, authority = f"https://127.0.0.1:{port}/", str(tls / "ca.crt")
            own = [sys.executable, "-P", "-c", FLOOR_SITES, base, authority]
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            each = [str(count) for count in (rounds, up, *([CALLS, QUESTIONS] if calls else [0, 0]))]
            sites = [subprocess.Popen([*own, str(share), *each], **pipes) for share in shares if share]
            for process in sites:
                process.stdout.readline()
            before, began = busy(server.pid), time.monotonic()
            for process in sites:
                process.stdin.write("go\n")
                process.stdin.flush()
            codes = [process.wait() for process in sites]
            if any(codes):
                raise SystemExit("the floor's sites failed")
            seconds, used = time.monotonic() - began, busy(server.pid) - before
        finally:
            server.kill()
    return {"processor_seconds_per_site_and_round": used / len(names) / rounds, "seconds_a_round": seconds / rounds}


def _present(status: Path) -> int:
    """How many sites have said that they are there, after which they are asked nothing before the first round."""
    try:
        return sum(site["presence"] is not None for site in json.loads(status.read_text())["sites"].values())
    except (OSError, ValueError, KeyError):
        return 0


def _refused(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sites", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the result here too")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--nodes", help=argparse.SUPPRESS)
    parser.add_argument("--prepare", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.nodes:
        nodes(arguments.folder, arguments.port, arguments.nodes.split(","))
        return
    if arguments.prepare:
        make_study(arguments.folder, arguments.sites[0], arguments.rounds)
        return
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # an installation's modules are compiled
    rows = []
    for sites in arguments.sites:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(Path(folder), sites, arguments.rounds))
        print(json.dumps(rows[-1], indent=2), file=sys.stderr, flush=True)
    text = json.dumps({"processors": os.cpu_count(), "machine": platform.machine(), "rows": rows}, indent=2) + "\n"
    print(text, end="")
    if arguments.json is not None:
        arguments.json.write_text(text)


if __name__ == "__main__":
    main()

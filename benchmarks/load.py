"""What many sites cost one server: canned sites, which neither train nor decrypt, over TLS on loopback.

Each canned site is a thread that speaks the same protocol through the same client code as a site does
(``secure_fed.clients.flower_node``, ``secure_fed.clients.flower_app``): it takes the records, says that it is ready,
signs an envelope of the true size for the cohort, and reveals its check. The encrypted payload is made once and is
every site's; headers and signatures are each site's own.
The server is ``secfacmic server``, unchanged.

    python benchmarks/load.py [--sites 64] [--rounds 5] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import secrets
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key

from secure_fed.core.errors import EnvelopeError, ProtocolError
from secure_fed.core.processes import be_quiet_outside
from secure_fed.protocol.envelope import EnvelopeHeader, RoundPosition, seal_envelope
from secure_fed.protocol.ledger_heads import NO_LEDGER
from secure_fed.protocol.packing import Contribution, Sealed, wire
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

NODE_PROCESSES = 2
PAYLOAD = "payload"


class CannedSite:
    """As much of a site as its app needs."""

    def __init__(self, agreed: AgreedStudy, folder: Path, name: str, payload: bytes) -> None:
        self.name = name
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

    over = False

    def respond(self, request: RoundRequest) -> RoundReply:
        """Take the records unchecked, and answer the round's questions with the canned update."""
        for data in request.records:
            frame, header = read_header(data, self._agreed)
            head = frame.digest if header.kind == "genesis" else self._head_after(header)
            self._due = RoundPosition(header.run, head, header.key, 0, header.round + 1)
            self.position = header.seq + 1
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
            check = self._wire.check_words(arrived, self._payload)
            return self._reply(ReplyCode.REVEALED, sign_reveal(self._agreed, arrived, self.name, check, self._signing))
        ready = sign_ready(self._agreed, self._due, request.attempt, self.name, self._signing)
        return self._reply(ReplyCode.READY, ready)

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
    from secure_fed.clients.flower_app import SiteApp
    from secure_fed.clients.flower_node import Way, run_site

    agreed = load_study(folder / "study.toml")
    payload = (folder / PAYLOAD).read_bytes()
    threads = []
    for name in names:
        site = CannedSite(agreed, folder / "sites" / name, name, payload)
        app = SiteApp(site, agreed.study.id, lambda _: None)  # type: ignore[arg-type]
        way = Way(f"127.0.0.1:{port}", folder / "server" / "tls" / "ca.crt", len(agreed.study.sites))
        threads.append(threading.Thread(target=run_site, args=(app, way), name=name))
    for thread in threads:
        thread.start()
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
    """Keys, authority, run and the canned payload."""
    import numpy as np

    from secure_fed.lab.demo import prepare_federation
    from secure_fed.lab.simulation import open_sites
    from secure_fed.privacy.ckks import Cipher
    from secure_fed.protocol.packing import Binding
    from tests.conftest import make_images, make_template

    names = [f"site-{number:04d}" for number in range(sites)]
    make_images(folder / "images", per_class=4)
    template = make_template(
        sites=[{"name": name} for name in names],
        key_maker=names[0],
        max_sites=sites,
        rounds=rounds,
        round_seconds=3600,
        backbone={"model": "mini-clip", "weights": "random", "seed": 1},
        encoding={"bits": 8 if sites > 256 else 11 if sites > 64 else 13, "lanes": 2, "value_bound": 0.1},
        simulation={
            "kind": "simulated",
            "unit": "image",
            "shares": {"train": 0.5, "val": 0.2, "test": 0.2, "unlabelled": 0.1},
            "sites": [{"name": name, "folder": "ash"} for name in names],
            "shared": True,
        },
    )
    agreed = prepare_federation(template, folder, folder / "images")
    site = open_sites(agreed, folder)[0]
    integers = np.zeros(agreed.lanes.values, dtype=np.int64)
    binding = Binding(run="0" * 64, head="0" * 64, round=1)
    sealed = Cipher(agreed.lanes, site.replica.keys.secret(site.replica.keys.newest[1])).seal(
        integers, binding, names[0]
    )
    (folder / PAYLOAD).write_bytes(sealed.payload)


def measure(folder: Path, sites: int, rounds: int) -> dict[str, Any]:
    """Serve the study to its canned sites and take figures from journal and /proc."""
    from secure_fed.core.layout import ServerState
    from secure_fed.lab.demo import _free_port
    from secure_fed.protocol.journal import JournalEntry
    from secure_fed.protocol.records import Chain, RecordFolder
    from tests.network import busy, peak

    values = prepare(folder, sites, rounds)
    port = _free_port()
    names = sorted(path.name for path in (folder / "sites").iterdir())
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    server = ["-m", "secure_fed.cli", "server", "--study", str(folder / "study.toml"), "--mode", "he"]
    server += ["--state", str(folder / "server"), "--listen", f"127.0.0.1:{port}"]
    own = [sys.executable, "-P", __file__, "--folder", str(folder), "--port", str(port), "--nodes"]
    shares = [",".join(names[index::NODE_PROCESSES]) for index in range(NODE_PROCESSES)]
    commands = [[sys.executable, "-P", *server], *([*own, share] for share in shares)]
    processor: dict[str, float] = {}
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
    agreed = load_study(folder / "study.toml")
    records = RecordFolder(folder / "server" / "runs" / str(ServerState(folder / "server").current_run) / "journal")
    chain = Chain(agreed)
    entries = [JournalEntry(record) for record in records.replay(chain) if record.header.kind == "aggregate"]
    if any(len(entry.sites) != sites for entry in entries):
        raise SystemExit(f"rounds with {[len(entry.sites) for entry in entries]} sites; expected {sites} in each")
    seconds = [(entry.header.closed_ms - entry.header.opened_ms) / 1000 for entry in entries[1:]]
    served = sum(processor[name] for name in ("superlink", "rounds"))
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
        "server_processor_seconds_per_site_and_round": served / sites / rounds,
        "peak_memory_mb": {name: kilobytes * 1024 / 1e6 for name, kilobytes in memory.items()},
    }


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

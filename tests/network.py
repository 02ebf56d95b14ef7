"""A federation of real processes on loopback, to be started, killed and looked into."""

from __future__ import annotations

import ast
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from secure_fed.core.layout import ServerState
from secure_fed.core.processes import PARENT
from secure_fed.lab.demo import prepare_federation
from secure_fed.protocol.study import Template, load_study
from tests import fault_hooks
from tests.forked import AUDIT, Forked


class Network:
    """Study, sites and server in a folder, and the processes started there.

    Args:
        folder: where.
        template: the study's.
        images: its data folder.
        forked: whether sites are forked from one process that has imported everything, which takes a tenth of time
            and memory, or started by command.
    """

    def __init__(self, folder: Path, template: Template, images: Path, *, forked: bool = False) -> None:
        self.folder = folder
        self.forked = forked
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.agreed = prepare_federation(template, folder, images, self.port)
        self.names = [site.name for site in load_study(folder / "study.toml").study.sites]
        self.processes: dict[str, subprocess.Popen[bytes] | Forked] = {}
        self.options: dict[str, list[str]] = {}  # further words of a process's command line, by name
        self.audit_file = folder / "sockets.log"
        (folder / "audit").mkdir()
        (folder / "audit" / "sitecustomize.py").write_text(AUDIT + fault_hooks.SITECUSTOMIZE)

    def start(self, *names: str, fault: dict[str, Any] | None = None) -> None:
        """Start the server ("server") or sites, each with a log of its own.

        Args:
            names: whom.
            fault: what is wrong in these processes (:mod:`tests.fault_hooks`).
        """
        for name in names:
            if name == "server":
                arguments = ["server", "--study", str(self.folder / "study.toml"), "--mode", self.agreed.study.mode]
                arguments += ["--state", str(self.folder / "server"), "--listen", f"127.0.0.1:{self.port}"]
            else:
                arguments = ["client", "--site", str(self.site_folder(name) / "site.toml")]
            arguments += self.options.get(name, [])
            if self.forked and name != "server":
                environment = os.environ | {"SOCKET_AUDIT": str(self.audit_file)}
                self.processes[name] = Forked(arguments, self.log_file(name), fault, environment=environment)
                continue
            with self.log_file(name).open("ab") as log:
                self.processes[name] = subprocess.Popen(
                    [sys.executable, "-P", "-m", "secure_fed.cli", *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=os.environ
                    | {
                        "PYTHONPATH": os.pathsep.join([str(self.folder / "audit"), os.environ.get("PYTHONPATH", "")]),
                        "SOCKET_AUDIT": str(self.audit_file),
                        PARENT: str(os.getpid()),  # a test that is killed leaves nothing behind
                    }
                    | ({fault_hooks.ENVIRONMENT: json.dumps(fault)} if fault else {}),
                )

    def site_folder(self, name: str) -> Path:
        return self.folder / "sites" / name

    def log_file(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def log(self, name: str) -> str:
        return self.log_file(name).read_text()

    def called(self) -> dict[int, set[str]]:
        """Hosts that each process has looked up, connected to or listened on."""
        found: dict[int, set[str]] = {}
        for line in self.audit_file.read_text().splitlines():
            pid, _, argument = line.split(" ", 2)
            value = ast.literal_eval(argument)
            host = value[0] if isinstance(value, tuple) else value
            found.setdefault(int(pid), set()).add(host.decode() if isinstance(host, bytes) else str(host))
        return found

    def summary(self, name: str) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.site_folder(name) / "state" / "summary.json").read_text())
        return content

    @property
    def records(self) -> int:
        """How many records the server's journal has."""
        run = ServerState(self.folder / "server").current_run
        return len(list((self.folder / "server" / "runs" / str(run) / "journal").glob("*.record")))

    def rounds_process(self) -> int:
        """The server's child, which runs the rounds."""
        children = Path(f"/proc/{self.processes['server'].pid}/task/{self.processes['server'].pid}/children")
        (child,) = children.read_text().split()
        return int(child)

    def kill(self, name: str) -> None:
        self.processes[name].send_signal(signal.SIGKILL)
        self.processes[name].wait()

    def wait(self, seconds: float, *names: str) -> dict[str, int]:
        """Exit codes of these processes, or of all, once they end by themselves."""
        end = time.monotonic() + seconds
        chosen = {name: self.processes[name] for name in names or self.processes}
        try:
            return {name: process.wait(max(0.1, end - time.monotonic())) for name, process in chosen.items()}
        except subprocess.TimeoutExpired:
            logs = "\n".join(f"--- {name}\n{self.log(name)[-2000:]}" for name in self.processes)
            raise AssertionError(f"still running after {seconds} s\n{logs}") from None

    def wait_until(self, condition: Callable[[], bool], seconds: float) -> None:
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                logs = "\n".join(f"--- {name}\n{self.log(name)[-2000:]}" for name in self.processes)
                raise AssertionError(f"nothing of it within {seconds} s\n{logs}")
            time.sleep(0.02)

    def close(self) -> None:
        for process in self.processes.values():
            if process.poll() is None:
                process.kill()
                process.wait()


def memory_holds(pid: int, secrets: dict[str, bytes]) -> set[str]:
    """Which of the secrets lie anywhere in a process's readable memory."""
    found: set[str] = set()
    overlap = max(map(len, secrets.values()))
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for line in maps:
            match = re.match(r"([0-9a-f]+)-([0-9a-f]+) r", line)
            if match is None or line.rstrip().endswith(("[vvar]", "[vsyscall]")):
                continue
            position, end = (int(value, 16) for value in match.groups())
            tail = b""
            while position < end:
                try:
                    memory.seek(position)
                    block = memory.read(min(2**24, end - position))
                except OSError:
                    break
                if not block:
                    break
                window = tail + block
                found |= {name for name, secret in secrets.items() if secret in window}
                tail = window[-overlap:]
                position += len(block)
    return found


def loaded_files(pid: int) -> str:
    """Paths of everything that a process has mapped."""
    return Path(f"/proc/{pid}/maps").read_text()


def busy(pid: int) -> float:
    """Seconds of processor time so far, 0 once the process has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def peak(pid: int) -> int:
    """Peak resident memory in kB, 0 once the process has ended."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1])
    except OSError:
        pass
    return 0

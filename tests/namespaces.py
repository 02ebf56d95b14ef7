"""Hosts with addresses of their own on one machine: network namespaces on a switch that is a namespace too.

Nothing of the machine's own network is touched, so that these tests can neither disturb nor be disturbed by it.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

_numbers = itertools.count()


class Host:
    """One host: a namespace with loopback, an address on each of its networks, and a folder.

    Attributes:
        name: of the host.
        space: of its namespace.
        folder: where its commands run.
        address: on its first network.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.folder = folder
        self.address = ""
        folder.mkdir(parents=True, exist_ok=True)
        self.space = f"sf{os.getpid()}-{next(_numbers)}"
        _ip("netns", "add", self.space)
        _ip("-n", self.space, "link", "set", "lo", "up")

    def command(self, arguments: Sequence[str]) -> list[str]:
        """The command that runs these arguments at this host."""
        return ["ip", "netns", "exec", self.space, *arguments]

    def run(
        self, arguments: Sequence[str], timeout: float = 240, environment: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end, in the host's folder."""
        return subprocess.run(
            self.command(arguments),
            cwd=self.folder,
            env=_environment(environment),
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def start(
        self, arguments: Sequence[str], log: Path, environment: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a command in the host's folder; ``ip netns exec`` becomes that command, and keeps its process id."""
        with log.open("ab") as stream:
            return subprocess.Popen(
                self.command(arguments),
                cwd=self.folder,
                env=_environment(environment),
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
            )

    def close(self) -> None:
        """End what runs here and take the host away."""
        found = subprocess.run(["ip", "netns", "pids", self.space], capture_output=True, text=True)
        for pid in found.stdout.split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        time.sleep(0.1 if found.stdout.split() else 0)
        subprocess.run(["ip", "netns", "delete", self.space], capture_output=True)


class Lan:
    """A switch and the hosts on it, with addresses PREFIX.1, PREFIX.2, ..."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._ports: dict[str, str] = {}
        self.space = f"sf{os.getpid()}-{next(_numbers)}"
        _ip("netns", "add", self.space)
        _ip("-n", self.space, "link", "add", "switch", "type", "bridge")
        _ip("-n", self.space, "link", "set", "switch", "up")

    def join(self, host: Host) -> str:
        """Give a host a link to this network; returns its address there."""
        number = len(self._ports) + 1
        port, device = f"port{number}", f"net{self._prefix.replace('.', '')}"
        _ip("-n", self.space, "link", "add", port, "type", "veth", "peer", "name", device, "netns", host.space)
        _ip("-n", self.space, "link", "set", port, "master", "switch", "up")
        address = f"{self._prefix}.{number}"
        _ip("-n", host.space, "address", "add", f"{address}/24", "dev", device)
        _ip("-n", host.space, "link", "set", device, "up")
        self._ports[host.name] = port
        host.address = host.address or address
        return address

    def cut(self, host: Host) -> None:
        """Pull a host's cable."""
        _ip("-n", self.space, "link", "set", self._ports[host.name], "down")

    def mend(self, host: Host) -> None:
        """Put it in again."""
        _ip("-n", self.space, "link", "set", self._ports[host.name], "up")

    def limit(self, host: Host, rate: str) -> None:
        """Limit what a host sends, as ``1mbit``."""
        device = f"net{self._prefix.replace('.', '')}"
        command = ["tc", "-n", host.space, "qdisc", "add", "dev", device, "root", "tbf"]
        _checked([*command, "rate", rate, "burst", "16kb", "latency", "400ms"])

    def slow(self, host: Host, rate: str) -> None:
        """Make a host's line slow in both directions, with so little room before it that packets are lost all the time.

        Args:
            host: whose line.
            rate: as ``64kbit``.
        """
        for space, end in ((host.space, self._device), (self.space, self._ports[host.name])):
            command = ["tc", "-n", space, "qdisc", "add", "dev", end, "root", "tbf", "rate", rate]
            _checked([*command, "burst", "3kb", "limit", "6kb"])

    def lost(self, host: Host) -> float:
        """The share of packets from a host that were lost so far."""
        text = _checked(["tc", "-n", host.space, "-s", "qdisc", "show", "dev", self._device])
        found = re.search(r"Sent \d+ bytes (\d+) pkt \(dropped (\d+)", text)
        assert found is not None, text
        sent, dropped = map(int, found.groups())
        return dropped / max(sent + dropped, 1)

    @property
    def _device(self) -> str:
        return f"net{self._prefix.replace('.', '')}"

    def received(self, host: Host) -> int:
        """Bytes that came from a host so far."""
        port = self._ports[host.name]
        text = _ip("-n", self.space, "-s", "link", "show", port)
        found = re.search(r"RX:.*\n\s*(\d+)", text)
        assert found is not None, text
        return int(found.group(1))

    def close(self) -> None:
        """Take the switch away."""
        subprocess.run(["ip", "netns", "delete", self.space], capture_output=True)


class Hosts:
    """Hosts and networks that are taken away again."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.hosts: dict[str, Host] = {}
        self._lans: list[Lan] = []

    def lan(self, prefix: str, *names: str) -> Lan:
        """A network of these hosts; those that are new are made.

        Args:
            prefix: the first three numbers of its addresses.
            names: of the hosts.
        """
        lan = Lan(prefix)
        self._lans.append(lan)
        for name in names:
            lan.join(self.hosts.get(name) or self.host(name))
        return lan

    def host(self, name: str) -> Host:
        """A host without network."""
        self.hosts[name] = Host(name, self._folder / name)
        return self.hosts[name]

    def __getitem__(self, name: str) -> Host:
        return self.hosts[name]

    def close(self) -> None:
        """Take all away."""
        for host in self.hosts.values():
            host.close()
        for lan in self._lans:
            lan.close()


def _environment(changes: Mapping[str, str] | None) -> dict[str, str]:
    """Ours, with this interpreter's commands in front; one thread, since a test's hosts share a machine."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"} | dict(changes or {})


def _ip(*arguments: str) -> str:
    if shutil.which("ip") is None:
        pytest.fail("the command ip is missing; network tests need iproute2 and root")
    return _checked(["ip", *arguments])


def _checked(command: list[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        pytest.fail(
            f"{' '.join(command)}: {result.stderr.strip()}; network tests need root and a kernel with network "
            "namespaces, veth and bridges"
        )
    return result.stdout

"""Faults inside a process: installed by tests in a site or server process before it starts, known to no product code.

A fault is a dictionary with one key:

``kill``       ``{"write": PATTERN, "phase": "before" | "during" | "after", "number": N}``: SIGKILL at the Nth durable
               write whose path and kind match: of a record, or of the line that is added to a file of lines; or
               ``{"call": "MODULE:NAME", "phase": "before" | "after"}``: at the first call of a function
``record``     path of a file that gets one line a durable write
``upload``     ``"before" | "middle" | "after"``: SIGKILL when the first update is sent
``hold``       seconds that the first update is kept back
``duplicate``  every reply is sent three times, twice as it is and once as another message
``reorder``    the first update is sent after the next one, over a new connection
``slow``       seconds that training takes longer
``only``       with ``slow``: in these rounds only
``most``       bytes that a file may grow to
"""

from __future__ import annotations

import importlib
import json
import os
import re
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

ENVIRONMENT = "SECFACMIC_TEST_FAULT"

SITECUSTOMIZE = f"""
import os
if "{ENVIRONMENT}" in os.environ:
    from tests.fault_hooks import install_from_environment
    install_from_environment()
"""


def install_from_environment() -> None:
    """In a process that was started with a fault; its children get it too."""
    install(json.loads(os.environ[ENVIRONMENT]))


def install(fault: dict[str, Any]) -> None:
    """Put a fault into this process."""
    if "call" in fault.get("kill", ()):
        _install_call(fault["kill"])
    elif "kill" in fault or "record" in fault:
        _install_writes(fault)
    if {"upload", "hold", "duplicate", "reorder"} & set(fault):
        _install_push(fault)
    if "most" in fault:
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault["most"], fault["most"]))
    if "slow" in fault:
        _install_slow(fault)


def die() -> None:
    """SIGKILL for this process, and for the server if this is the process of its rounds."""
    parent = os.getppid()
    command = Path(f"/proc/{parent}/cmdline").read_bytes().split(b"\0")
    if b"secure_fed.cli" in command and b"server" in command:
        os.kill(parent, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def _install_writes(fault: dict[str, Any]) -> None:
    from secure_fed.core import storage

    true_write = storage.write_durable
    seen = 0

    def write(path: Path, data: bytes, mode: int = 0o644) -> None:
        nonlocal seen
        added = data.splitlines()[-1:] if path.suffix == ".jsonl" else [data[:4096]]
        # Of a line of JSON, or in a record's header, whose words are text in CBOR too.
        pattern = rb"(genesis|aggregate|void|amendment|checkpoint)" if data[:3] == b"SFR" else rb'"kind":"([a-z]+)"'
        kind = re.search(pattern, b"".join(added))
        name = f"{path} {kind.group(1).decode() if kind else ''}".strip()
        if "record" in fault:
            with open(fault["record"], "a") as stream:
                stream.write(name + "\n")
        kill = fault.get("kill")
        if kill is None or not re.search(kill["write"], name):
            true_write(path, data, mode)
            return
        seen += 1
        if seen < kill.get("number", 1):
            true_write(path, data, mode)
            return
        if kill["phase"] == "during":
            # What a kill inside leaves: half of a temporary file.
            (path.parent / f".{path.name}.torn").write_bytes(data[: len(data) // 2])
        elif kill["phase"] == "after":
            true_write(path, data, mode)
        die()

    storage.write_durable = write
    for module in list(sys.modules.values()):
        if getattr(module, "write_durable", None) is true_write:
            module.write_durable = write  # type: ignore[attr-defined]


def _install_call(kill: dict[str, Any]) -> None:
    module, _, name = kill["call"].partition(":")
    *owners, last = name.split(".")
    owner: Any = importlib.import_module(module)
    for each in owners:
        owner = getattr(owner, each)
    true_call = getattr(owner, last)

    def call(*arguments: Any, **named: Any) -> None:
        if kill["phase"] == "after":
            true_call(*arguments, **named)
        die()

    setattr(owner, last, call)


def _install_push(fault: dict[str, Any]) -> None:
    from flwr.proto.fleet_pb2 import DeactivateNodeRequest

    from secure_fed.clients import flower_node
    from secure_fed.clients.byte_line import ByteLine
    from secure_fed.clients.flower_node import _Connection

    if "duplicate" in fault:
        flower_node.OVER_SECONDS = 2.0  # copies of the last reply, upon which the server ends, find nobody

    true_push, true_send = _Connection.push, ByteLine.send
    done: list[Any] = []

    def is_update(message: Any) -> bool:
        return bool(message.content.config_records["reply"]["code"] == "update")

    def send(self: Any, run: str, data: bytes) -> str:
        if fault.get("upload") == "before":
            die()
        digest = true_send(self, run, data)
        if fault.get("upload") == "middle":
            die()  # the bytes are there, and nothing names them
        return digest

    def push(self: Any, message: Any) -> None:
        if fault.get("duplicate"):
            true_push(self, message)
            true_push(self, message)
            message.metadata.__dict__["_created_at"] += 0.001
            true_push(self, message)
            return
        if not is_update(message):
            true_push(self, message)
            return
        first = not done
        done.append(message)
        if first and "hold" in fault:
            time.sleep(fault["hold"])
        if first and fault.get("reorder"):
            # A new connection: the server asks again.
            self._client.DeactivateNode(DeactivateNodeRequest(node_id=self.node.node_id))
            self.join()
            return
        true_push(self, message)
        if first and fault.get("upload") == "after":
            die()
        if fault.get("reorder") and len(done) == 2:
            true_push(self, done[0])

    _Connection.push = push  # type: ignore[method-assign]
    ByteLine.send = send  # type: ignore[method-assign]


def _install_slow(fault: dict[str, Any]) -> None:
    from secure_fed.clients.site import Site

    train = Site._train

    def slow(self: Site) -> Any:
        if not fault.get("only") or self.replica.due.round in fault["only"]:
            time.sleep(fault["slow"])
        return train(self)

    Site._train = slow  # type: ignore[method-assign]

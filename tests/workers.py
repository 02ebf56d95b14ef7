"""A whole study whose sites run in processes of their own, each with an environment of its own."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from secure_fed.protocol.rounds import ReplyCode, RoundReply
from tests.conftest import Federation

STEPS = 3
"""Exchanges of a round."""

BYTES = ("question", "past", "carried")
"""Fields of a request that are bytes."""


@dataclass
class Workers:
    """What the sites' processes said.

    Attributes:
        kinds: torch's name of the CPU's kind, by site.
        threads: torch's, by site, at the end.
        digests: of the adapter that each site held, by site, after each exchange.
    """

    kinds: dict[str, str]
    threads: dict[str, int] = field(default_factory=dict)
    digests: list[dict[str, str]] = field(default_factory=list)


def run_on_workers(federation: Federation, environments: Mapping[str, Mapping[str, str]]) -> Workers:
    """Run a study, all its rounds, with each site in a process of its own.

    Args:
        federation: a prepared study.
        environments: what each site's process has in its environment besides this one's.
    """
    coordinator = federation.begin(federation.sites())
    workers = {
        name: subprocess.Popen(
            [sys.executable, "-P", "-m", "tests.site_worker", str(federation.folder / "sites" / name / "site.toml")],
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])} | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name, environment in environments.items()
    }
    try:
        found = Workers({name: json.loads(worker.stdout.readline())["cpu"] for name, worker in workers.items()})  # type: ignore[union-attr]
        positions = dict.fromkeys(workers, ("", 0))
        for number in range(STEPS * federation.agreed.study.rounds + 1):
            digests: dict[str, str] = {}
            for name, worker in workers.items():
                request = coordinator.request(name, *positions[name])
                fields = request.__dict__ | {
                    **{name: base64.b64encode(getattr(request, name)).decode() for name in BYTES},
                    "records": [base64.b64encode(data).decode() for data in request.records],
                }
                worker.stdin.write(json.dumps(fields) + "\n")  # type: ignore[union-attr]
                worker.stdin.flush()  # type: ignore[union-attr]
                answer = json.loads(worker.stdout.readline())  # type: ignore[union-attr]
                fields = answer["reply"]
                data = {name: base64.b64decode(fields[name]) for name in ("envelope", "carried")}
                reply = RoundReply(**fields | data | {"code": ReplyCode(fields["code"])})
                coordinator.receive(reply)
                positions[name] = (reply.run, reply.position)
                digests[name], found.threads[name] = answer["digest"], answer["threads"]
            found.digests.append(digests)
            assert (coordinator.advance() is not None) == (number % STEPS == STEPS - 1)
        return found
    finally:
        for worker in workers.values():
            worker.kill()
            worker.wait()
            worker.stdin.close()  # type: ignore[union-attr]
            worker.stdout.close()  # type: ignore[union-attr]

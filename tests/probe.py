"""What an outsider does to a server: run by tests on another host, prints what it got as JSON."""

from __future__ import annotations

import json
import socket
import ssl
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key

from secure_fed.clients.flower_node import Way, _Connection
from secure_fed.transport.certificates import create_authority
from tests.borrowed import call_as

CONTROL = ("start-run", "stop-run", "list-runs", "register-node", "unregister-node", "list-nodes", "pull-artifacts")
RUNTIME = ("acquire-task", "pull-task-input", "push-messages", "get-nodes", "pull-object")
OTHERS = ("/", "/docs", "/redoc", "/openapi.json", "/docs/oauth2-redirect", "/v1/fleet/register-node")


def main(host: str, port: int, authority: Path, foreign_key: Path, scratch: Path) -> dict[str, Any]:
    """Try everything.

    Args:
        host: the server's address.
        port: its port.
        authority: the study's ``ca.crt``, which is no secret.
        foreign_key: key of a site that is registered elsewhere.
        scratch: a folder.
    """
    found: dict[str, Any] = {"open ports": scan(host)}
    base = f"https://{host}:{port}"
    context = ssl.create_default_context(cafile=str(authority))
    paths = [*(f"/v1/control/{name}" for name in CONTROL), *(f"/v1/runtime/{name}" for name in RUNTIME), *OTHERS]
    with httpx.Client(verify=context, timeout=30) as client:
        found["paths"] = {
            f"{method} {path}": client.request(method, base + path, content=b"x").status_code
            for path in paths
            for method in ("GET", "POST", "PUT", "DELETE")
        }
        found["health"] = client.get(f"{base}/health").status_code
        found["no key"] = client.post(f"{base}/v1/fleet/pull", content=b"").status_code
        found["oversized"] = client.post(f"{base}/v1/fleet/push", content=bytes(9 * 2**20)).status_code
        found["unbounded"] = client.post(f"{base}/v1/fleet/push", content=iter([b"x"] * 3)).status_code
    address = f"{host}:{port}"
    stranger = ec.generate_private_key(ec.SECP256R1())
    found["unregistered key"] = refusal(lambda: _Connection(Way(address, authority, 3), "stranger", stranger).join())
    other = load_ssh_private_key(foreign_key.read_bytes(), None)
    assert isinstance(other, ec.EllipticCurvePrivateKey)
    found["key of another study"] = refusal(lambda: _Connection(Way(address, authority, 3), "north", other).join())
    create_authority(scratch / "foreign", [host])
    foreign = scratch / "foreign" / "ca.crt"
    found["foreign authority"] = refusal(lambda: _Connection(Way(address, foreign, 3), "stranger", stranger).join())
    for name, scheme in (("without TLS", "http"),):
        found[name] = refusal(lambda: httpx.get(f"{scheme}://{host}:{port}/health", timeout=10))  # noqa: B023
    return found


def refusal(call: Callable[[], object]) -> str:
    """The exception's name, or the status, or "answered"."""
    try:
        call()
    except httpx.HTTPStatusError as error:
        return str(error.response.status_code)
    except Exception as error:
        return type(error).__name__
    return "answered"


def scan(host: str) -> list[int]:
    """All TCP ports that take a connection."""

    def is_open(port: int) -> bool:
        with socket.socket() as knock:
            knock.settimeout(5)
            return knock.connect_ex((host, port)) == 0

    with ThreadPoolExecutor(64) as pool:
        return [port for port, opened in enumerate(pool.map(is_open, range(1, 65536)), 1) if opened]


if __name__ == "__main__":
    host, port, authority, foreign_key, scratch, member = sys.argv[1:]
    result = main(host, int(port), Path(authority), Path(foreign_key), Path(scratch))
    public = load_ssh_private_key(Path(member).read_bytes(), None)
    assert isinstance(public, ec.EllipticCurvePrivateKey)
    result["borrowed key"] = str(call_as(f"{host}:{port}", Path(authority), "north", public.public_key()))
    print(json.dumps(result))

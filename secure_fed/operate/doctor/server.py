"""Checks at a server."""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Iterator
from pathlib import Path
from shlex import quote

from secure_fed.core.layout import ServerState
from secure_fed.core.status import StatusFile, is_running
from secure_fed.operate.doctor.finding import END, Fault, Finding, attempt, check
from secure_fed.operate.doctor.machine import days_left, disk, flwr, keeps, memory, modes
from secure_fed.operate.doctor.network import dial
from secure_fed.operate.standing import is_over
from secure_fed.protocol.journal import find_runs, verify_run
from secure_fed.protocol.ledger_heads import LedgerHeads
from secure_fed.protocol.signing import load_signing_key, public_hex
from secure_fed.protocol.study import AgreedStudy, load_study
from secure_fed.transport.certificates import (
    CA,
    CA_KEY,
    SERVER,
    SERVER_KEY,
    ServerCertificate,
    certificates,
    names_of,
    server_context,
)

MEMORY = 0.4e9
"""Bytes that a server needs free."""


def examine_server(state: Path, study: Path, listen: tuple[str, int] | None) -> Iterator[Finding]:
    """Look at a server.

    Args:
        state: its state folder.
        study: its ``study.toml``.
        listen: host and port that it is to listen on; else where it listened last, or on 127.0.0.1:8443.
    """
    found, agreed = attempt("study", lambda: _study(study))
    yield found
    yield check("flwr version", flwr)
    yield check("key modes", lambda: modes(_secrets(ServerState(state))))
    if agreed is not None and is_over(state, agreed) and not is_running(state):
        yield Finding("end", True, END)
        yield check("journal and clock", lambda: _journal(state, agreed))
        return
    yield check("certificate", lambda: _certificate(ServerState(state).certificates))
    yield check("state folder", lambda: keeps(state))
    yield check("memory", lambda: memory(MEMORY))
    yield check("port", lambda: _port(state, listen))
    if agreed is None:
        return
    yield check("coordinator key", lambda: _coordinator(state, agreed))
    yield check("journal and clock", lambda: _journal(state, agreed))
    yield check("disk", lambda: disk(state, agreed, agreed.study.max_sites, _shown(agreed)))


def _shown(agreed: AgreedStudy) -> int:
    """How many envelopes are kept at most for sites that add past rounds again."""
    study = agreed.study
    return (study.keep_rounds + 1) * study.max_sites if study.pads and study.keep_rounds else 0


def _secrets(state: ServerState) -> list[Path]:
    paths = (state.key, state.certificates / SERVER_KEY, state.certificates / CA_KEY)
    return [path for path in paths if path.exists()]


def _study(path: Path) -> tuple[AgreedStudy, str]:
    agreed = load_study(path)
    return agreed, f"{agreed.study.name}, id {agreed.study.id}"


def _certificate(folder: Path) -> str:
    mend = f"make one: secfacmic study ca --host NAME --out {quote(str(folder))}"
    try:
        server_context(folder / SERVER, folder / SERVER_KEY)
        own = certificates((folder / SERVER).read_bytes())[0]
        authority = certificates((folder / CA).read_bytes())
    except FileNotFoundError as error:
        raise Fault(f"{error.filename or folder}: not there", mend) from None
    except (ValueError, ssl.SSLError):
        raise Fault(f"{folder}: {SERVER} and {SERVER_KEY} are not a certificate and its key", mend) from None
    renew = f"renew it, with the server running or not: secfacmic study ca --renew --out {quote(str(folder))}"
    replace = "make another authority in another folder (secfacmic study ca), and give its ca.crt to every site"
    days = min(
        days_left(one, str(folder / name), mend)
        for name, one, mend in [(SERVER, own, renew), *((CA, one, replace) for one in authority)]
    )
    ServerCertificate(folder)
    still = f"; {CA_KEY} is still on this machine: take it offline" if (folder / CA_KEY).exists() else ""
    return f"for {', '.join(names_of(own))}, valid for {days} days{still}"


def _port(state: Path, listen: tuple[str, int] | None) -> str:
    told = str(StatusFile(state).read().get("listen", ""))
    if listen is None:
        host, _, port = (told or "127.0.0.1:8443").rpartition(":")
        listen = host.strip("[]"), int(port)
    host, number = listen
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    if is_running(state):
        target = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        dial(target, number, "this server").close()
        return f"this server listens on {host}:{number}"
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(listen)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise Fault(
                f"{host}:{number}: cannot be listened on ({reason})",
                "end what listens there, or choose another port (--listen, and address in each site.toml)",
            ) from None
    loopback = host in ("127.0.0.1", "::1", "localhost")
    return f"{host}:{number} is free" + ("; sites on other hosts need --listen 0.0.0.0:PORT" if loopback else "")


def _coordinator(state: Path, agreed: AgreedStudy) -> str:
    if public_hex(load_signing_key(ServerState(state).key)) != agreed.study.coordinator:
        raise Fault(
            f"{ServerState(state).key}: not the key that the study names", "put back the key that study new made"
        )
    return "the one that the study names"


def _journal(state: Path, agreed: AgreedStudy) -> str:
    folder = ServerState(state)
    LedgerHeads(folder.ledger_heads)
    if folder.current_run is None:
        return "no run has begun: start the server with --key"
    run = next(run for run in find_runs(state) if run.current)
    newest = 0
    count = 0
    for record in verify_run(run, agreed):
        newest = max(newest, record.header.closed_ms)
        count += 1
    behind = newest / 1000 - time.time()
    if behind > 1:
        raise Fault(
            f"this computer's clock is {behind:.0f} s behind the journal's newest record",
            "set the clock by NTP: it was right, or further ahead, when that record was made",
        )
    return f"{count} records verify"

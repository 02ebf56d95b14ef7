"""What goes wrong in practice at a site or a server: looked for one by one, each with how to mend it.

Nothing is changed and nothing is sent but a greeting to the study's server: ``/health``, and one call that says whether
it knows the site's key. What is found may name files and labels of the site: it is for the terminal, not for a log.
"""

from __future__ import annotations

import base64
import email.utils
import http.client
import importlib.metadata
import os
import shutil
import socket
import ssl
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from cryptography import x509

from secure_fed.core.errors import SecfacmicError
from secure_fed.core.status import StatusFile, is_running
from secure_fed.protocol.packing import wire
from secure_fed.protocol.study import AgreedStudy, load_study
from secure_fed.transport.certificates import CA, CA_KEY, SERVER, SERVER_KEY, certificates, server_context

if TYPE_CHECKING:
    from secure_fed.clients.sitefile import SiteFile, SiteServer

SITE_MEMORY, SERVER_MEMORY = 1.5e9, 0.4e9
"""Bytes that a site and a server need free; a site's libraries alone take 0.8 GB."""

SPARE_DISK = 200e6
SOON_DAYS = 30
"""A certificate that ends sooner is a fault: it would end in the middle of a study."""

SECONDS = 10.0
AHEAD_SECONDS, BEHIND_SECONDS = 4.0, 304.0
"""Flower's limits for a site's clock, less the second that the header may be off."""


@dataclass(frozen=True)
class Finding:
    """One check.

    Attributes:
        check: its name.
        ok: whether all is well.
        found: what was found.
        mend: what to do; empty if all is well.
    """

    check: str
    ok: bool
    found: str
    mend: str = ""


class _Fault(Exception):
    """What is wrong, and how to mend it."""

    def __init__(self, found: str, mend: str) -> None:
        super().__init__(found)
        self.found = found
        self.mend = mend


def examine_site(path: Path) -> Iterator[Finding]:
    """Look at a site.

    Args:
        path: its ``site.toml``.
    """
    from secure_fed.clients.sitefile import read_site_file

    files: list[SiteFile] = []
    studies: list[AgreedStudy] = []

    def site_file() -> str:
        files.append(read_site_file(path))
        return f"{path}: site {files[0].site}"

    def study() -> str:
        agreed = load_study(Path(files[0].study))
        files[0].refuse_study(agreed.study)
        studies.append(agreed)
        return f"{agreed.study.name}, id {agreed.study.id}"

    yield _try("site file", site_file)
    yield _try("flwr version", _flwr)
    if not files:
        return
    file = files[0]
    yield _try("study", study)
    yield _try("identity", lambda: _identity(file))
    state = Path(file.state)
    yield _try("key modes", lambda: _modes([*Path(file.identity).glob("*.key"), *(state / "keys").glob("*.sealed")]))
    yield _try("memory", lambda: _memory(SITE_MEMORY))
    yield _try("ledger", lambda: _ledger(file))
    if file.server is None:
        yield Finding(
            "server",
            False,
            "no [server] table in site.toml",
            'add address = "HOST:8443" and authority = "study/ca.crt"',
        )
    else:
        yield from _server_from_site(file, file.server)
    if not studies:
        return
    agreed = studies[0]
    yield _try("membership", lambda: _membership(file, agreed))
    yield _try("disk", lambda: _disk(state, agreed, updates=2))
    yield _try("backbone", lambda: _backbone(file, agreed))
    yield _try("data folder", lambda: _data(file, agreed))


def examine_server(state: Path, study: Path, listen: tuple[str, int] | None) -> Iterator[Finding]:
    """Look at a server.

    Args:
        state: its state folder.
        study: its ``study.toml``.
        listen: host and port that it is to listen on; else where it listened last, or on 127.0.0.1:8443.
    """
    studies: list[AgreedStudy] = []

    def read() -> str:
        studies.append(load_study(study))
        return f"{studies[0].study.name}, id {studies[0].study.id}"

    yield _try("study", read)
    yield _try("flwr version", _flwr)
    secrets = [state / "coordinator.key", state / "tls" / SERVER_KEY, state / "tls" / CA_KEY]
    yield _try("key modes", lambda: _modes([path for path in secrets if path.exists()]))
    yield _try("certificate", lambda: _own_certificate(state / "tls"))
    yield _try("memory", lambda: _memory(SERVER_MEMORY))
    yield _try("port", lambda: _port(state, listen))
    if not studies:
        return
    agreed = studies[0]
    yield _try("coordinator key", lambda: _coordinator(state, agreed))
    yield _try("journal and clock", lambda: _journal(state, agreed))
    yield _try("disk", lambda: _disk(state, agreed, updates=agreed.study.max_sites))


def _try(check: str, look: Callable[[], str]) -> Finding:
    try:
        return Finding(check, True, look())
    except _Fault as fault:
        return Finding(check, False, fault.found, fault.mend)
    except SecfacmicError as error:
        text = str(error)
        return Finding(check, False, text, f"as it says; more: secfacmic explain {error.exit_code}")
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        reason = error.strerror or type(error).__name__
        return Finding(check, False, f"{where}{reason}", "check that the place exists and is yours")


# --- both ---


def _flwr() -> str:
    wanted = next(
        (line for line in importlib.metadata.requires("secfacmic") or () if line.startswith("flwr==")), "flwr==?"
    ).partition("==")[2]
    found = importlib.metadata.version("flwr")
    if found != wanted:
        raise _Fault(f"flwr {found}; expected {wanted} exactly", f"pip install flwr=={wanted}")
    return f"flwr {found}"


def _modes(paths: list[Path]) -> str:
    loose = [path for path in paths if stat.S_IMODE(path.stat().st_mode) & 0o077]
    if loose:
        names = " ".join(map(str, loose))
        raise _Fault(f"others can read {names}", f"chmod 600 {names}; if others were on this machine, make new keys")
    return f"{len(paths)} key files, for their owner only"


def _memory(needed: float) -> str:
    with open("/proc/meminfo", encoding="ascii") as stream:
        facts = dict(line.split(":", 1) for line in stream)
    free = int(facts["MemAvailable"].split()[0]) * 1024
    if free < needed:
        raise _Fault(
            f"{free / 1e9:.1f} GB of memory are free; expected at least {needed / 1e9:.1f} GB",
            "end other programs, or give the machine more memory",
        )
    return f"{free / 1e9:.1f} GB of memory free"


def _disk(state: Path, agreed: AgreedStudy, updates: int) -> str:
    study = agreed.study
    sizes = wire(study.mode, agreed.lanes)
    record = sizes.record_bytes(study.max_sites)
    needed = study.rounds * record + 2 * updates * sizes.envelope_bytes + SPARE_DISK
    place = next(parent for parent in (state, *state.resolve().parents) if parent.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise _Fault(
            f"{place}: {free / 1e9:.2f} GB are free; expected at least {needed / 1e9:.2f} GB for {study.rounds} rounds",
            "free space, or put the state folder on another disk",
        )
    if not os.access(place, os.W_OK):
        raise _Fault(f"{place}: cannot be written", "give this account the folder")
    return f"{free / 1e9:.1f} GB free of {needed / 1e9:.2f} GB needed for the whole study"


def _days_left(certificate: x509.Certificate, name: str, mend: str) -> int:
    now = datetime.now(UTC)
    days = (certificate.not_valid_after_utc - now).days
    if certificate.not_valid_before_utc > now:
        raise _Fault(
            f"{name}: valid from {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC on; it is {now:%Y-%m-%d %H:%M}",
            "set this computer's clock by NTP; if it is right, make a new certificate",
        )
    if days < SOON_DAYS:
        over = "is over since" if days < 0 else f"ends in {days} days, on"
        raise _Fault(f"{name}: its time {over} {certificate.not_valid_after_utc:%Y-%m-%d}", mend)
    return days


# --- a site ---


def _identity(file: SiteFile) -> str:
    from secure_fed.privacy.keys import load_identity

    load_identity(Path(file.identity), file.site)
    return f"{file.identity}: readable"


def _membership(file: SiteFile, agreed: AgreedStudy) -> str:
    from secure_fed.clients.acceptance import require_acceptance, when
    from secure_fed.clients.keyring import membership
    from secure_fed.operate.closing import refuse_closed

    refuse_closed(Path(file.state))
    identity, ring, _ = membership(file, agreed)
    accepted = require_acceptance(file, agreed, identity.keys.signing)
    if agreed.study.mode == "he":
        epoch, key = ring.newest
        if not epoch:
            raise _Fault("the study's key is not here", "take it: secfacmic keys accept study.key --site site.toml")
        ring.secret(key)
    return f"accepted by {accepted.by} on {when(accepted.accepted_ms)}; the study's key opens"


def _ledger(file: SiteFile) -> str:
    from secure_fed.clients.private_round import ledger_folder
    from secure_fed.privacy.ledger import CLOSED, Ledger

    folder = ledger_folder(file)
    if not Ledger.exists(folder):
        return "none: nothing was spent here" + ("" if file.privacy else ", and no budget is set")
    facts = Ledger(folder).summary()
    if (folder / CLOSED).exists():
        raise _Fault(
            f"{folder}: restored, and closed until the journal confirms its head",
            "start the site: it opens by itself when server and sites hold no later head",
        )
    spent, budget = facts["epsilon_spent"], facts["epsilon_budget"]
    if file.privacy is not None and file.privacy.epsilon > budget:
        raise _Fault(
            f"site.toml asks for epsilon {file.privacy.epsilon:g}; the ledger's budget is {budget:g}",
            f"set epsilon = {budget:g} or less: a budget can only be lowered",
        )
    return f"verifies; epsilon {spent:.3f} of {budget:g} spent"


def _backbone(file: SiteFile, agreed: AgreedStudy) -> str:
    from secure_fed.model.backbone import load_backbone

    loaded = load_backbone(agreed.study.backbone, None if file.checkpoint is None else Path(file.checkpoint))
    return f"{loaded.description}, digest as in the study"


def _data(file: SiteFile, agreed: AgreedStudy) -> str:
    from secure_fed.clients.decoding import UndecodableError, decode
    from secure_fed.clients.images import present_images

    images = present_images(file, agreed)
    broken = []
    for image in images:
        try:
            decode(image.path.read_bytes(), image.frame)
        except (UndecodableError, OSError) as error:
            broken.append(f"{image.path}: {error.strerror if isinstance(error, OSError) else error}")
    if broken and not file.skip_unreadable:
        shown = "\n".join(broken[:10]) + (f"\nand {len(broken) - 10} more" if len(broken) > 10 else "")
        raise _Fault(
            f"{len(broken)} of {len(images)} images cannot be decoded:\n{shown}",
            "replace or remove them, or set skip_unreadable = true in site.toml",
        )
    patients = len({image.patient for image in images})
    return f"{len(images)} images of {patients} {file.data.unit}s" + (f", {len(broken)} left out" if broken else "")


# --- the way from a site to its server ---


def _server_from_site(file: SiteFile, server: SiteServer) -> Iterator[Finding]:
    from secure_fed.clients.flower_node import proxy_to

    address, authority = server.address, Path(server.authority)
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    try:
        proxy = proxy_to(address, server.proxy)
        trusted = certificates(authority.read_bytes())
        days = min(
            _days_left(one, str(authority), "ask the coordinator for a new authority and certificate")
            for one in trusted
        )
        yield Finding("authority", True, f"{authority}: valid for {days} days")
    except _Fault as fault:
        yield Finding("authority", False, fault.found, fault.mend)
        return
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a certificate"
        yield Finding("authority", False, f"{authority}: {reason}", f"ask the coordinator for the study's {CA}")
        return
    found = _try("reachability", lambda: _reach(host, int(port), proxy))
    yield found
    if not found.ok:
        return
    found = _try("certificate", lambda: _presented(host, int(port), proxy, authority, trusted))
    yield found
    if not found.ok:
        return
    connection = _connect(host, int(port), proxy)
    secure = _trusting(authority).wrap_socket(connection, server_hostname=host)
    with secure:
        dates: list[str] = []
        yield _try("server", lambda: _health(secure, host, dates))
        yield _try("clock", lambda: _clock(dates))
        yield _try("admission", lambda: _admitted(secure, file, host))


def _reach(host: str, port: int, proxy: str | None) -> str:
    _connect(host, port, proxy).close()
    return f"{host}:{port} answers" + (f", through the proxy {_shown(proxy)}" if proxy else "")


def _shown(proxy: str) -> str:
    """A proxy's URL without user and password."""
    parts = urlsplit(proxy)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"


def _connect(host: str, port: int, proxy: str | None) -> socket.socket:
    """A connection to the server, through the proxy if there is one.

    Raises:
        _Fault: with the end that does not answer.
    """
    if proxy is None:
        return _dial(host, port, "the server")
    parts = urlsplit(proxy)
    connection = _dial(parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80), "the proxy")
    if parts.scheme == "https":
        connection = ssl.create_default_context().wrap_socket(connection, server_hostname=parts.hostname)
    target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    login = ""
    if parts.username is not None:
        text = f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode()
        login = f"Proxy-Authorization: Basic {base64.b64encode(text).decode()}\r\n"
    connection.sendall(f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n{login}\r\n".encode())
    answer = http.client.HTTPResponse(connection, method="CONNECT")
    try:
        answer.begin()
    except (OSError, http.client.HTTPException) as error:
        raise _Fault(
            f"{_shown(proxy)}: no answer of a proxy ({type(error).__name__})",
            "check the proxy's address, in site.toml's [server] proxy or in HTTPS_PROXY",
        ) from None
    if answer.status == 407:
        raise _Fault(
            f"{_shown(proxy)}: the proxy asks for a user and password",
            "give them: http://USER:PASSWORD@HOST:PORT in [server] proxy or HTTPS_PROXY",
        )
    if answer.status in (502, 503, 504):
        raise _Fault(
            f"{_shown(proxy)}: the proxy cannot reach {target} ({answer.status} {answer.reason})",
            "check [server] address; ask whoever runs the proxy whether it may reach that host and port",
        )
    if answer.status != 200:
        raise _Fault(
            f"{_shown(proxy)}: the proxy refuses CONNECT to {target} ({answer.status} {answer.reason})",
            "ask whoever runs the proxy to allow that host and port; many allow port 443 only: let the server use it",
        )
    return connection


def _dial(host: str, port: int, whom: str) -> socket.socket:
    try:
        return socket.create_connection((host, port), SECONDS)
    except socket.gaierror:
        raise _Fault(
            f"{host}: {whom}'s name is not known here",
            "check the spelling in site.toml; else ask for the name in this network's DNS, or use the address",
        ) from None
    except ConnectionRefusedError:
        raise _Fault(
            f"{host}:{port}: nobody listens at {whom}'s port",
            f"check the port and that {whom} is running"
            + (" (a study's is started by the coordinator)" * (whom == "the server")),
        ) from None
    except TimeoutError:
        raise _Fault(
            f"{host}:{port}: no answer of {whom} within {SECONDS:g} s",
            "a firewall on the way drops it: ask for outgoing TCP to that host and port, or set a proxy",
        ) from None
    except OSError as error:
        raise _Fault(f"{host}:{port}: {whom}: {error.strerror}", "check this computer's network") from None


def _trusting(authority: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cafile=authority)
    return context


def _presented(host: str, port: int, proxy: str | None, authority: Path, trusted: list[x509.Certificate]) -> str:
    """The certificate that arrives here, which need not be the one that the server sent."""
    blind = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    blind.check_hostname = False
    blind.verify_mode = ssl.CERT_NONE
    try:
        with blind.wrap_socket(_connect(host, port, proxy), server_hostname=host) as probe:
            der = probe.getpeercert(binary_form=True)
    except ssl.SSLError as error:
        raise _Fault(
            f"{host}:{port}: no TLS there ({error.reason or type(error).__name__})",
            "another program answers on that port: check host and port in site.toml",
        ) from None
    assert der is not None
    found = x509.load_der_x509_certificate(der)
    try:
        with _trusting(authority).wrap_socket(_connect(host, port, proxy), server_hostname=host):
            pass
    except ssl.SSLCertVerificationError as error:
        issuer = found.issuer.rfc4514_string()
        if error.verify_code in (62, 64):
            names = ", ".join(_names(found))
            raise _Fault(
                f"{host}: the server's certificate is for {names}",
                f"connect by one of these names, or have one made: secfacmic study ca --host {host}",
            ) from None
        if error.verify_code not in (9, 10):
            raise _Fault(
                f"{host}:{port}: its certificate was issued by {issuer}, not by the study's authority "
                f"({trusted[0].subject.rfc4514_string()}): something on the way opens TLS, or it is another server",
                f"ask whoever runs firewall and proxy for an exception from TLS inspection for {host}:{port}; if there "
                f"is no inspection, compare {authority.name} with the coordinator's",
            ) from None
    days = _days_left(found, f"the certificate of {host}", "ask the coordinator for a new one: secfacmic study ca")
    return f"for {', '.join(_names(found))}, valid for {days} days, by the study's authority"


def _names(certificate: x509.Certificate) -> list[str]:
    try:
        extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return ["no name"]
    return [*extension.get_values_for_type(x509.DNSName), *map(str, extension.get_values_for_type(x509.IPAddress))]


def _call(secure: ssl.SSLSocket, request: str) -> tuple[int, http.client.HTTPMessage, bytes]:
    try:
        secure.sendall(request.encode())
        answer = http.client.HTTPResponse(secure)
        answer.begin()
        return answer.status, answer.headers, answer.read()
    except (OSError, http.client.HTTPException) as error:
        raise _Fault(
            f"the server hangs up ({type(error).__name__})", "look at the server's log, or start it again"
        ) from None


def _health(secure: ssl.SSLSocket, host: str, dates: list[str]) -> str:
    status, headers, _ = _call(secure, f"GET /health HTTP/1.1\r\nHost: {host}\r\n\r\n")
    if headers.get("date"):
        dates.append(str(headers["date"]))
    if status != 200:
        raise _Fault(
            f"/health answers {status}; expected 200", "the server is starting or stopping: try again in a minute"
        )
    return "/health answers"


def _clock(dates: list[str]) -> str:
    if not dates:
        raise _Fault("the server does not say what time it is", "compare this computer's clock by hand")
    ahead = time.time() - email.utils.parsedate_to_datetime(dates[0]).timestamp()
    if ahead > AHEAD_SECONDS or ahead < -BEHIND_SECONDS:
        side = "ahead of" if ahead > 0 else "behind"
        raise _Fault(
            f"this computer's clock is {abs(ahead):.0f} s {side} the server's; allowed are 5 s ahead and 305 s behind",
            "set both clocks by NTP",
        )
    return f"{ahead:+.0f} s from the server's"


def _admitted(secure: ssl.SSLSocket, file: SiteFile, host: str) -> str:
    from secure_fed.clients.flower_node import unsigned_pull
    from secure_fed.privacy.keys import load_identity

    identity = load_identity(Path(file.identity), file.site)
    status, _, body = _call(secure, unsigned_pull(host, identity.flower))
    if status == 403 and not body:
        raise _Fault(
            "the server does not know this site's key",
            "compare study ids with the coordinator (secfacmic study show); it must serve the same study",
        )
    return "the server knows this site's key"


# --- a server ---


def _own_certificate(folder: Path) -> str:
    mend = f"make one: secfacmic study ca --host NAME --out {folder}"
    try:
        server_context(folder / SERVER, folder / SERVER_KEY)
        own = certificates((folder / SERVER).read_bytes())[0]
        authority = certificates((folder / CA).read_bytes())
    except FileNotFoundError as error:
        raise _Fault(f"{error.filename or folder}: not there", mend) from None
    except (ValueError, ssl.SSLError):
        raise _Fault(f"{folder}: {SERVER} and {SERVER_KEY} are not a certificate and its key", mend) from None
    new = f"make a new one in another folder and move it here: secfacmic study ca --host {_names(own)[0]} --out NEW"
    days = min(
        _days_left(one, str(folder / name), new) for name, one in [(SERVER, own), *((CA, one) for one in authority)]
    )
    still = f"; {CA_KEY} is still on this machine: take it offline" if (folder / CA_KEY).exists() else ""
    return f"for {', '.join(_names(own))}, valid for {days} days{still}"


def _port(state: Path, listen: tuple[str, int] | None) -> str:
    told = str(StatusFile(state).read().get("listen", ""))
    if listen is None:
        host, _, port = (told or "127.0.0.1:8443").rpartition(":")
        listen = host, int(port)
    host, number = listen
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    if is_running(state):
        target = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        _dial(target, number, "this server").close()
        return f"this server listens on {host}:{number}"
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(listen)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise _Fault(
                f"{host}:{number}: cannot be listened on ({reason})",
                "end what listens there, or choose another port (--listen, and address in each site.toml)",
            ) from None
    loopback = host in ("127.0.0.1", "::1", "localhost")
    return f"{host}:{number} is free" + ("; sites on other hosts need --listen 0.0.0.0:PORT" if loopback else "")


def _coordinator(state: Path, agreed: AgreedStudy) -> str:
    from secure_fed.operate.closing import refuse_closed
    from secure_fed.protocol.signing import load_signing_key, public_hex

    refuse_closed(state)
    if public_hex(load_signing_key(state / "coordinator.key")) != agreed.study.coordinator:
        raise _Fault(
            f"{state / 'coordinator.key'}: not the key that the study names", "put back the key that study new made"
        )
    return "the one that the study names"


def _journal(state: Path, agreed: AgreedStudy) -> str:
    from secure_fed.protocol.journal import find_runs, verify_run
    from secure_fed.protocol.ledger_heads import LedgerHeads

    LedgerHeads(state / "ledger_heads.json")
    if not (state / "run").exists():
        return "no run has begun: start the server with --key"
    run = next(run for run in find_runs(state) if run.current)
    newest = 0
    count = 0
    for record in verify_run(run, agreed):
        newest = max(newest, record.header.closed_ms)
        count += 1
    behind = newest / 1000 - time.time()
    if behind > 1:
        raise _Fault(
            f"this computer's clock is {behind:.0f} s behind the journal's newest record",
            "set the clock by NTP: it was right, or further ahead, when that record was made",
        )
    return f"{count} records verify"

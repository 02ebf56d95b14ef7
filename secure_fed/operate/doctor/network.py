"""Checks of the way from a site to its server: names, ports, proxies, certificates, clocks, admission."""

from __future__ import annotations

import base64
import http.client
import socket
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import unquote, urlsplit

from cryptography import x509

from secure_fed.operate.doctor.finding import Fault, Finding, attempt, check
from secure_fed.operate.doctor.machine import days_left
from secure_fed.protocol.records import Chain, RecordFolder
from secure_fed.transport.certificates import CA, certificates, names_of, read_authority
from secure_fed.transport.connection import (
    AHEAD_SECONDS,
    BEHIND_SECONDS,
    Mistrust,
    clock_fault,
    mistrust,
    proxy_to,
    seconds_ahead,
    trusting,
    unsigned_pull,
    without_password,
)

if TYPE_CHECKING:
    from secure_fed.clients.sitefile import SiteFile
    from secure_fed.protocol.study import AgreedStudy

SECONDS = 10.0


def examine_way(file: SiteFile, agreed: AgreedStudy | None = None) -> Iterator[Finding]:
    """Look at a site's way to its server, as far as it goes.

    Args:
        file: the site's.
        agreed: the study, if it can be read: its journal here may name the authority.
    """
    server = file.server
    if server is None:
        mend = 'add address = "HOST:8443" and authority = "study/ca.crt"'
        yield Finding("server", False, "no [server] table in site.toml", mend)
        return
    found, authority = attempt("authority", lambda: _authority(Path(server.authority), _named(file, agreed)))
    yield found
    if authority is None:
        return
    host, _, port = server.address.rpartition(":")

    def reached() -> tuple[_Way, str]:
        way = _Way(host.strip("[]"), int(port), proxy_to(server.address, server.proxy))
        return way, _reach(way)

    found, way = attempt("reachability", reached)
    yield found
    if way is None:
        return
    found, connection = attempt("certificate", lambda: _secure(way, authority))
    yield found
    if connection is None:
        return
    with connection:
        found, date = _greet(connection, way.host)
        yield found
        yield check("clock", lambda: _clock(date))
        yield check("admission", lambda: _admitted(connection, file, way.host))


class _Authority(NamedTuple):
    """What the site trusts.

    Attributes:
        path: where it lies.
        pem: its content.
        subject: whose certificate it is.
    """

    path: Path
    pem: bytes
    subject: str


def _named(file: SiteFile, agreed: AgreedStudy | None) -> str | None:
    """Fingerprint of the authority that an amendment here names; None without one."""
    run = file.state_folder.current_run
    if agreed is None or run is None:
        return None
    chain = Chain(agreed)
    for _ in RecordFolder(file.state_folder.run(run).journal).replay(chain):
        pass
    return chain.authority


def _authority(path: Path, named: str | None) -> tuple[_Authority, str]:
    try:
        pem = path.read_bytes()
        held = certificates(pem)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a certificate"
        raise Fault(f"{path}: {reason}", f"ask the coordinator for the study's {CA}") from None
    if named is not None:
        pem = read_authority(path, named)
    trusted = certificates(pem)
    mend = "ask the coordinator for a new authority and certificate"
    days = min(days_left(one, str(path), mend) for one in trusted)
    more = "; take the one before out of the file" if len(held) > len(trusted) else ""
    return _Authority(path, pem, trusted[0].subject.rfc4514_string()), f"{path}: valid for {days} days{more}"


@dataclass(frozen=True)
class _Way:
    """How the site's bytes get to the server."""

    host: str
    port: int
    proxy: str | None

    @property
    def address(self) -> str:
        """Host and port, as in a URL."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def connect(self) -> socket.socket:
        """A connection to the server, through the proxy if there is one.

        Raises:
            Fault: with the end that does not answer.
        """
        if self.proxy is None:
            return dial(self.host, self.port, "the server")
        parts, shown, target = urlsplit(self.proxy), without_password(self.proxy), self.address
        connection = dial(parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80), "the proxy")
        if parts.scheme == "https":
            connection = ssl.create_default_context().wrap_socket(connection, server_hostname=parts.hostname)
        login = ""
        if parts.username is not None:
            text = f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode()
            login = f"Proxy-Authorization: Basic {base64.b64encode(text).decode()}\r\n"
        connection.sendall(f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n{login}\r\n".encode())
        answer = http.client.HTTPResponse(connection, method="CONNECT")
        try:
            answer.begin()
        except (OSError, http.client.HTTPException) as error:
            raise Fault(
                f"{shown}: no answer of a proxy ({type(error).__name__})",
                "check the proxy's address, in site.toml's [server] proxy or in HTTPS_PROXY",
            ) from None
        if answer.status == 407:
            raise Fault(
                f"{shown}: the proxy asks for a user and password",
                "give them: http://USER:PASSWORD@HOST:PORT in [server] proxy or HTTPS_PROXY",
            )
        if answer.status in (502, 503, 504):
            raise Fault(
                f"{shown}: the proxy cannot reach {target} ({answer.status} {answer.reason})",
                "check [server] address; ask whoever runs the proxy whether it may reach that host and port",
            )
        if answer.status != 200:
            raise Fault(
                f"{shown}: the proxy refuses CONNECT to {target} ({answer.status} {answer.reason})",
                "ask whoever runs the proxy to allow that host and port; many allow port 443 only: let the server use "
                "it",
            )
        return connection


def dial(host: str, port: int, whom: str) -> socket.socket:
    """A TCP connection.

    Args:
        host, port: where to.
        whom: who is expected there, for messages.

    Raises:
        Fault: nobody answers.
    """
    try:
        return socket.create_connection((host, port), SECONDS)
    except socket.gaierror:
        raise Fault(
            f"{host}: {whom}'s name is not known here",
            "check the spelling in site.toml; else ask for the name in this network's DNS, or use the address",
        ) from None
    except ConnectionRefusedError:
        raise Fault(
            f"{host}:{port}: nobody listens at {whom}'s port",
            f"check the port and that {whom} is running"
            + (" (a study's is started by the coordinator)" * (whom == "the server")),
        ) from None
    except TimeoutError:
        raise Fault(
            f"{host}:{port}: no answer of {whom} within {SECONDS:g} s",
            "a firewall on the way drops it: ask for outgoing TCP to that host and port, or set a proxy",
        ) from None
    except OSError as error:
        raise Fault(f"{host}:{port}: {whom}: {error.strerror}", "check this computer's network") from None


def _reach(way: _Way) -> str:
    way.connect().close()
    through = f", through the proxy {without_password(way.proxy)}" if way.proxy else ""
    return f"{way.host}:{way.port} answers{through}"


def _secure(way: _Way, authority: _Authority) -> tuple[ssl.SSLSocket, str]:
    """Connect as the site does, after a look at the certificate that arrives here, which need not be the server's."""
    host, port = way.host, way.port
    certificate = _presented(way)
    trust = trusting(authority.pem)
    try:
        connection = trust.wrap_socket(way.connect(), server_hostname=host)
    except ssl.SSLCertVerificationError as error:
        why = mistrust(error)
        if why is Mistrust.NAME:
            raise Fault(
                f"{host}: the server's certificate is for {', '.join(names_of(certificate))}",
                "connect by one of these names, or have this one added: "
                f"secfacmic study ca --renew --host {host} --out STATE/tls",
            ) from None
        if why is Mistrust.ISSUER:
            raise Fault(
                f"{host}:{port}: its certificate was issued by {certificate.issuer.rfc4514_string()}, not by the "
                f"study's authority ({authority.subject}): something on the way opens TLS, or it is another server",
                f"ask whoever runs firewall and proxy for an exception from TLS inspection for {host}:{port}; if there "
                f"is no inspection, compare {authority.path.name} with the coordinator's; where an amendment has "
                "changed the authority, the server is started again with its files",
            ) from None
        _days_left(certificate, host)
        raise Fault(
            f"{host}: a certificate between the server's and the study's authority is not valid now",
            "ask the coordinator for a new one: secfacmic study ca --renew --out STATE/tls",
        ) from None
    days = _days_left(certificate, host)
    return connection, f"for {', '.join(names_of(certificate))}, valid for {days} days, by the study's authority"


def _presented(way: _Way) -> x509.Certificate:
    blind = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    blind.check_hostname = False
    blind.verify_mode = ssl.CERT_NONE
    try:
        with blind.wrap_socket(way.connect(), server_hostname=way.host) as probe:
            der = probe.getpeercert(binary_form=True)
    except ssl.SSLError as error:
        raise Fault(
            f"{way.host}:{way.port}: no TLS there ({error.reason or type(error).__name__})",
            "another program answers on that port: check host and port in site.toml",
        ) from None
    assert der is not None
    return x509.load_der_x509_certificate(der)


def _days_left(certificate: x509.Certificate, host: str) -> int:
    mend = "ask the coordinator for a new one: secfacmic study ca --renew --out STATE/tls"
    return days_left(certificate, f"the certificate of {host}", mend)


class _Answer(NamedTuple):
    status: int
    date: str | None
    body: bytes


def _call(connection: ssl.SSLSocket, request: str) -> _Answer:
    try:
        connection.sendall(request.encode())
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        return _Answer(answer.status, answer.headers["date"], answer.read())
    except (OSError, http.client.HTTPException) as error:
        raise Fault(
            f"the server hangs up ({type(error).__name__})", "look at the server's log, or start it again"
        ) from None


def _greet(connection: ssl.SSLSocket, host: str) -> tuple[Finding, str | None]:
    """Ask for the server's health; with what it said of the time, however it is."""
    request = f"GET /health HTTP/1.1\r\nHost: {host}\r\n\r\n"
    found, answer = attempt("server", lambda: (_call(connection, request), "/health answers"))
    if answer is None:
        return found, None
    if answer.status != 200:
        mend = "the server is starting or stopping: try again in a minute"
        found = Finding("server", False, f"/health answers {answer.status}; expected 200", mend)
    return found, answer.date


def _clock(date: str | None) -> str:
    ahead = seconds_ahead(date)
    if ahead is None:
        raise Fault("the server does not say what time it is", "compare this computer's clock by hand")
    fault = clock_fault(ahead)
    if fault is not None:
        allowed = f"allowed are {AHEAD_SECONDS:g} s ahead and {BEHIND_SECONDS:g} s behind"
        raise Fault(f"{fault}; {allowed}", "set both clocks by NTP")
    return f"{ahead:+.0f} s from the server's"


def _admitted(connection: ssl.SSLSocket, file: SiteFile, host: str) -> str:
    from secure_fed.privacy.keys import load_identity

    identity = load_identity(Path(file.identity), file.site)
    answer = _call(connection, unsigned_pull(host, identity.flower.public_key()))
    if answer.status == 403 and not answer.body:
        raise Fault(
            "the server does not know this site's key",
            "compare study ids with the coordinator (secfacmic study show); it must serve the same study",
        )
    return "the server knows this site's key"

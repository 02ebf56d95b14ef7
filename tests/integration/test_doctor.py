"""``secfacmic doctor``: each fault that it looks for is planted once, and it names that one and how to mend it."""

from __future__ import annotations

import datetime
import errno
import json
import os
import shutil
import socket
import ssl
import threading
from collections import namedtuple
from collections.abc import Callable, Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from typer.testing import CliRunner

from secure_fed.cli import app
from secure_fed.clients.forgotten import Forgotten
from secure_fed.clients.sitefile import SitePrivacy, SiteServer, read_site_file
from secure_fed.core.errors import StorageError
from secure_fed.core.storage import exclusive
from secure_fed.core.tomlfile import read_toml, write_toml
from secure_fed.lab.demo import prepare_federation
from secure_fed.operate import doctor
from secure_fed.operate.closing import close_server, close_site
from secure_fed.operate.doctor import Finding, examine_server, examine_site, machine, network
from secure_fed.operate.doctor import server as server_checks
from secure_fed.operate.doctor import site as site_checks
from secure_fed.operate.doctor.finding import check
from secure_fed.privacy.keys import create_identity
from secure_fed.privacy.ledger import CLOSED
from secure_fed.protocol.study import load_study
from secure_fed.transport import certificates
from secure_fed.transport.certificates import create_authority
from tests.conftest import make_template
from tests.network import Network

SERVER_CHECKS = ["study", "flwr version", "key modes", "certificate", "state folder", "memory"]
SERVER_CHECKS += ["port", "coordinator key"]
SITE_CHECKS = ["site file", "flwr version", "study", "key modes", "identity", "state folder", "memory"]
SITE_CHECKS += ["image formats", "ledger"]
REACHED = ["authority", "reachability", "certificate", "server", "clock", "admission"]


class _Handler(BaseHTTPRequestHandler):
    """What the study's server answers to a greeting."""

    ahead = 0.0
    admits = True
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._say(200, b"ok")

    def do_POST(self) -> None:
        self._say(401 if self.admits else 403, b"no signature" if self.admits else b"")

    def _say(self, status: int, body: bytes) -> None:
        self.send_response_only(status)
        self.send_header("Date", formatdate(datetime.datetime.now().timestamp() - self.ahead, usegmt=True))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


class _Proxy(threading.Thread):
    """An HTTP proxy that passes CONNECT on, or answers as told."""

    def __init__(self, answer: bytes | None = None) -> None:
        super().__init__(daemon=True)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.answer = answer
        self.asked: list[str] = []
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.listener.getsockname()[1]}"

    def run(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            request = b""
            while not request.endswith(b"\r\n\r\n"):
                request += connection.recv(4096)
            self.asked.append(request.decode())
            if self.answer is not None:
                connection.sendall(self.answer)
                connection.close()
                continue
            host, _, port = request.split()[1].decode().rpartition(":")
            there = socket.create_connection((host, int(port)))
            connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            for one, other in ((connection, there), (there, connection)):
                threading.Thread(target=_pump, args=(one, other), daemon=True).start()


def _pump(source: socket.socket, target: socket.socket) -> None:
    try:
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        pass


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    """A prepared federation, of which each test takes a copy."""
    folder = tmp_path_factory.mktemp("doctor") / "out"
    prepare_federation(make_template(), folder, images)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "out", symlinks=True)
    return tmp_path / "out"


@pytest.fixture
def site(folder: Path) -> Path:
    return folder / "sites" / "ash" / "site.toml"


Serve = Callable[..., int]


@pytest.fixture
def serve(folder: Path, site: Path) -> Iterator[Serve]:
    """Start what the site takes for the study's server; returns the port."""
    running: list[HTTPServer] = []

    def start(tls: Path | None = None, ahead: float = 0.0, admits: bool = True, plain: bool = False) -> int:
        handler = type("Handler", (_Handler,), {"ahead": ahead, "admits": admits})
        server = HTTPServer(("127.0.0.1", 0), handler)
        if not plain:
            place = tls or folder / "server" / "tls"
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(place / "server.crt", place / "server.key")
            server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        # One connection after the other is served in a thread each: a probe that stays open must not block the next.
        server.process_request = lambda request, address: threading.Thread(  # type: ignore[method-assign]
            target=_process, args=(server, request, address), daemon=True
        ).start()
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        running.append(server)
        address(site, f"127.0.0.1:{server.server_port}")
        return server.server_port

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


def _process(server: HTTPServer, request: socket.socket, client: object) -> None:
    try:
        server.finish_request(request, client)  # type: ignore[arg-type]
    except OSError:
        pass
    finally:
        request.close()


def address(site: Path, text: str, **changes: str) -> None:
    file = read_toml(site, type(read_site_file(site)), ValueError)  # type: ignore[type-var]
    assert file.server is not None
    server = SiteServer.model_validate({**file.server.model_dump(exclude_none=True), "address": text, **changes})
    write_toml(site, file.model_copy(update={"server": server}))


def look(site: Path) -> dict[str, Finding]:
    return {finding.check: finding for finding in examine_site(site)}


def only(found: dict[str, Finding], check: str) -> Finding:
    """The one check that failed."""
    assert [finding.check for finding in found.values() if not finding.ok] == [check]
    assert found[check].mend
    return found[check]


# --- the site ---


def test_a_sound_site(site: Path, serve: Serve) -> None:
    serve()
    found = look(site)
    assert list(found) == [*SITE_CHECKS, *REACHED, "membership", "disk", "backbone", "data folder"]
    assert [finding for finding in found.values() if not finding.ok] == []
    assert not any(finding.mend for finding in found.values())
    assert found["clock"].found in ("+0 s from the server's", "+1 s from the server's", "-0 s from the server's")
    assert "30 images" in found["data folder"].found
    assert "JPEG-LS Lossless Image Compression (pyjpegls)" in found["image formats"].found


def test_a_site_file_with_errors(site: Path) -> None:
    site.write_text(site.read_text().replace("threads = 1", "threads = 0"))
    found = look(site)
    assert "threads" in only(found, "site file").found


def test_another_flwr(site: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    serve()
    monkeypatch.setattr(machine.importlib.metadata, "version", lambda name: "1.43.0")
    assert check("flwr version", machine.flwr).found == "flwr 1.43.0; expected 1.42.0 exactly"
    assert "pip install flwr==1.42.0" in check("flwr version", machine.flwr).mend


def test_a_study_that_was_edited_or_refused_by_policy(site: Path, serve: Serve) -> None:
    serve()
    site.write_text(site.read_text().replace("studies = []", 'studies = ["another"]'))
    assert "takes part in another only" in only(look(site), "study").found


def test_keys_that_others_can_read(site: Path, serve: Serve) -> None:
    serve()
    key = site.parent / "identity" / "flower.key"
    key.chmod(0o640)
    found = look(site)
    failed = {finding.check for finding in found.values() if not finding.ok}
    assert failed == {"identity", "key modes", "membership", "admission"}  # nothing that needs the key goes on
    assert found["key modes"].mend.startswith(f"chmod 600 {key}")


def test_too_little_memory_and_disk(site: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    serve()
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patched:
        patched.setattr(machine.shutil, "disk_usage", lambda place: usage(10**9, 10**9 - 10**6, 10**6))
        assert "0.00 GB are free; expected at least 0.2" in only(look(site), "disk").found
    monkeypatch.setattr(site_checks, "MEMORY", 1e15)
    assert "expected at least 1000000.0 GB" in only(look(site), "memory").found


def test_nobody_accepted(site: Path, serve: Serve) -> None:
    serve()
    shutil.rmtree(site.parent / "state" / "accepted")
    assert "secfacmic site accept" in only(look(site), "membership").found


def test_no_key_of_the_study(site: Path, serve: Serve) -> None:
    serve()
    shutil.rmtree(site.parent / "state" / "keys")
    finding = only(look(site), "membership")
    assert "the study's key is not here" in finding.found
    assert "keys accept" in finding.mend
    assert not (site.parent / "state" / "keys").exists()  # looking changes nothing


def test_the_identity_of_somebody_else(site: Path, tmp_path: Path) -> None:
    create_identity(tmp_path / "new", "ash")
    site.write_text(site.read_text().replace('identity = "identity"', f'identity = "{tmp_path / "new"}"'))
    finding = look(site)["membership"]
    assert not finding.ok
    assert "not the keys that the study names for site ash; use the identity folder" in finding.found


def test_another_backbone(site: Path, folder: Path, serve: Serve) -> None:
    serve()
    other = str(folder / "other.safetensors")
    CliRunner().invoke(app, ["backbone", "random", "random-small", "--seed", "9", "--out", other])
    site.write_text(site.read_text().replace("../../backbone.safetensors", "../../other.safetensors"))
    assert "weights have digest" in only(look(site), "backbone").found


def test_images_that_are_broken_missing_or_of_no_class(site: Path, folder: Path, serve: Serve, images: Path) -> None:
    serve()
    shutil.copytree(images / "ash", folder / "images")
    site.write_text(site.read_text().replace(str(images / "ash"), str(folder / "images")))
    assert look(site)["data folder"].ok
    broken = folder / "images" / "dark" / "0.png"
    broken.write_bytes(broken.read_bytes()[:50])
    finding = only(look(site), "data folder")
    assert f"1 of 30 images cannot be decoded:\n{broken}" in finding.found
    assert "skip_unreadable" in finding.mend
    extra = folder / "more"
    extra.mkdir()
    shutil.move(broken, extra / "0.png")
    assert look(site)["data folder"].ok
    file = read_toml(site, type(read_site_file(site)), ValueError)  # type: ignore[type-var]
    target = file.data.model_copy(update={"unlabelled": str(extra)})
    write_toml(site, file.model_copy(update={"data": target}))
    assert f"1 of 30 images cannot be decoded:\n{extra / '0.png'}" in only(look(site), "data folder").found
    write_toml(site, file)
    shutil.move(folder / "images" / "dark", folder / "images" / "dim")
    assert "dim" in only(look(site), "data folder").found
    shutil.rmtree(folder / "images")
    assert "no such folder" in only(look(site), "data folder").found


def test_a_forgotten_patients_broken_image_is_no_fault(site: Path, folder: Path, serve: Serve, images: Path) -> None:
    serve()
    shutil.copytree(images / "ash", folder / "images")
    site.write_text(site.read_text().replace(str(images / "ash"), str(folder / "images")))
    (folder / "images" / "dark" / "0.png").write_bytes(b"broken")
    Forgotten(Path(read_site_file(site).state)).add("dark/0.png", [])
    found = look(site)["data folder"]
    assert found.ok
    assert "29 images" in found.found


def test_the_ledger(site: Path, serve: Serve) -> None:
    serve()
    file = read_toml(site, type(read_site_file(site)), ValueError)  # type: ignore[type-var]
    write_toml(site, file.model_copy(update={"privacy": SitePrivacy(epsilon=3.0)}))
    from secure_fed.clients.site import Site

    Site.open(site)  # begins the ledger
    ledger = site.parent / "identity" / "ledger"
    assert look(site)["ledger"].found == "verifies; epsilon 0.000 of 3 spent"
    write_toml(site, file.model_copy(update={"privacy": SitePrivacy(epsilon=5.0)}))
    assert "can only be lowered" in only(look(site), "ledger").mend
    write_toml(site, file)
    (ledger / CLOSED).write_text("")
    assert "closed until the journal confirms" in only(look(site), "ledger").found
    (ledger / CLOSED).unlink()
    entries = ledger / "ledger.jsonl"
    entries.write_bytes(entries.read_bytes().replace(b'"epsilon":3.0', b'"epsilon":9.0'))
    assert "does not verify" in only(look(site), "ledger").found


# --- the way to the server ---


def test_nobody_there_no_such_name_and_no_answer(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    address(site, f"127.0.0.1:{port}")
    finding = only(look(site), "reachability")
    assert "nobody listens at the server's port" in finding.found
    address(site, "no-such-host.invalid:8443")
    finding = only(look(site), "reachability")
    assert "name is not known here" in finding.found
    assert "DNS" in finding.mend

    def silent(*arguments: object) -> socket.socket:
        raise TimeoutError

    monkeypatch.setattr(network.socket, "create_connection", silent)
    finding = only(look(site), "reachability")
    assert "no answer of the server within 10 s" in finding.found
    assert "firewall" in finding.mend


def test_no_authority_or_no_certificate_in_it(site: Path, folder: Path, serve: Serve) -> None:
    serve()
    (folder / "server" / "tls" / "ca.crt").write_text("nothing")
    assert "not a certificate" in only(look(site), "authority").found
    (folder / "server" / "tls" / "ca.crt").unlink()
    assert "No such file" in only(look(site), "authority").found


def test_tls_that_is_opened_on_the_way(site: Path, folder: Path, serve: Serve) -> None:
    create_authority(folder / "inspection", ["127.0.0.1"])
    rename(folder / "inspection", "Hospital Web Gateway")
    serve(tls=folder / "inspection")
    finding = only(look(site), "certificate")
    assert "issued by CN=Hospital Web Gateway, not by the study's authority" in finding.found
    assert "something on the way opens TLS" in finding.found
    assert "exception from TLS inspection" in finding.mend


def test_a_certificate_for_another_name(site: Path, folder: Path, serve: Serve) -> None:
    port = serve()
    address(site, f"127.0.0.2:{port}")
    # 127.0.0.2 is this machine too, but no name of the certificate.
    finding = doctor_on(site, "127.0.0.2", port)
    assert "certificate is for localhost, 127.0.0.1" in finding.found
    assert "--host 127.0.0.2" in finding.mend


def doctor_on(site: Path, host: str, port: int) -> Finding:
    """The listener is bound to 127.0.0.1 alone; reach it under the other name."""
    true = socket.create_connection

    def redirected(target: tuple[str, int], *arguments: object) -> socket.socket:
        return true(("127.0.0.1", port) if target[0] == host else target, 10)

    network.socket.create_connection = redirected  # type: ignore[assignment]
    try:
        return only(look(site), "certificate")
    finally:
        network.socket.create_connection = true


@pytest.mark.parametrize(
    ("start", "days", "says"),
    [(-100, -1, "its time is over since"), (-100, 5, "its time ends in"), (+10, 100, "valid from")],
)
def test_a_certificate_outside_its_dates(
    site: Path, folder: Path, serve: Serve, start: int, days: int, says: str
) -> None:
    redate(folder / "server" / "tls", start, days)
    serve()
    finding = only(look(site), "certificate")
    assert says in finding.found
    found = {one.check: one for one in examine_server(folder / "server", folder / "study.toml", ("127.0.0.1", 0))}
    assert says in only(found, "certificate").found


def test_a_certificate_above_the_servers_that_is_over(site: Path, folder: Path, serve: Serve) -> None:
    tls = folder / "server" / "tls"
    now = datetime.datetime.now(datetime.UTC)
    authority = x509.load_pem_x509_certificate((tls / "ca.crt").read_bytes())
    key = load_pem_private_key((tls / "ca.key").read_bytes(), None)
    middle = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "between")])
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(authority.subject).serial_number(2)
    builder = builder.not_valid_before(now - datetime.timedelta(10)).not_valid_after(now - datetime.timedelta(1))
    builder = builder.public_key(middle.public_key()).add_extension(x509.BasicConstraints(True, None), True)
    between = builder.sign(key, hashes.SHA256())  # type: ignore[arg-type]
    # The study's own authority lets nobody stand between; a hospital's may.
    root = x509.CertificateBuilder().subject_name(authority.subject).issuer_name(authority.subject).serial_number(3)
    root = root.not_valid_before(authority.not_valid_before_utc).not_valid_after(authority.not_valid_after_utc)
    root = root.public_key(authority.public_key()).add_extension(x509.BasicConstraints(True, None), True)
    (tls / "ca.crt").write_bytes(root.sign(key, hashes.SHA256()).public_bytes(certificates._PEM))  # type: ignore[arg-type]
    old = x509.load_pem_x509_certificate((tls / "server.crt").read_bytes())
    _issue(tls, old, middle, name, None)
    (tls / "server.crt").write_bytes((tls / "server.crt").read_bytes() + between.public_bytes(certificates._PEM))
    serve()
    finding = only(look(site), "certificate")
    assert "between the server's and the study's authority is not valid now" in finding.found


def rename(tls: Path, issuer: str) -> None:
    """Issue the server's certificate anew, in another issuer's name."""
    key = load_pem_private_key((tls / "ca.key").read_bytes(), None)
    old = x509.load_pem_x509_certificate((tls / "server.crt").read_bytes())
    _issue(tls, old, key, x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, issuer)]), None)


def redate(tls: Path, start: int, days: int) -> None:
    """Issue the server's certificate anew, for other days, counted from today."""
    key = load_pem_private_key((tls / "ca.key").read_bytes(), None)
    old = x509.load_pem_x509_certificate((tls / "server.crt").read_bytes())
    _issue(tls, old, key, old.issuer, (start, days))


def _issue(tls: Path, old: x509.Certificate, key: object, issuer: x509.Name, dates: tuple[int, int] | None) -> None:
    now = datetime.datetime.now(datetime.UTC)
    begin, end = old.not_valid_before_utc, old.not_valid_after_utc
    if dates is not None:
        begin, end = (now + datetime.timedelta(days=one) for one in dates)
    builder = x509.CertificateBuilder().subject_name(old.subject).issuer_name(issuer)
    builder = builder.public_key(old.public_key()).serial_number(1).not_valid_before(begin).not_valid_after(end)
    for extension in old.extensions:
        builder = builder.add_extension(extension.value, extension.critical)
    made = builder.sign(key, hashes.SHA256())  # type: ignore[arg-type]
    (tls / "server.crt").write_bytes(made.public_bytes(certificates._PEM))


@pytest.mark.parametrize(("ahead", "side"), [(30.0, "ahead of"), (-400.0, "behind")])
def test_clocks_apart(site: Path, serve: Serve, ahead: float, side: str) -> None:
    serve(ahead=ahead)
    finding = only(look(site), "clock")
    assert f"s {side} the server's" in finding.found
    assert "NTP" in finding.mend


def test_another_studys_server(site: Path, serve: Serve) -> None:
    serve(admits=False)
    finding = only(look(site), "admission")
    assert "does not know this site's key" in finding.found


def test_something_else_on_that_port(site: Path, serve: Serve) -> None:
    serve(plain=True)
    assert "no TLS there" in only(look(site), "certificate").found


# --- proxies ---


def test_a_proxy_of_the_environment_that_cannot_be_is_a_finding(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_PROXY", "no_proxy", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTPS_PROXY", "socks5://proxy.example.org:1080")
    address(site, "fl.example.org:8443")
    found = look(site)["reachability"]
    assert not found.ok
    assert "expected an HTTP proxy" in found.found


def test_through_a_proxy(site: Path, serve: Serve) -> None:
    port = serve()
    proxy = _Proxy()
    address(site, f"127.0.0.1:{port}", proxy=proxy.url)
    found = look(site)
    assert [finding for finding in found.values() if not finding.ok] == []
    assert f"through the proxy {proxy.url}" in found["reachability"].found
    assert proxy.asked[0].startswith(f"CONNECT 127.0.0.1:{port} HTTP/1.1\r\n")


@pytest.mark.parametrize(
    ("answer", "found", "mend"),
    [
        ("407 Proxy Authentication Required", "asks for a user and password", "USER:PASSWORD"),
        ("403 Forbidden", "refuses CONNECT to", "port 443 only"),
        ("502 Bad Gateway", "cannot reach", "whoever runs the proxy"),
    ],
)
def test_a_proxy_that_refuses(site: Path, serve: Serve, answer: str, found: str, mend: str) -> None:
    port = serve()
    proxy = _Proxy(f"HTTP/1.1 {answer}\r\nContent-Length: 0\r\n\r\n".encode())
    address(site, f"127.0.0.1:{port}", proxy=proxy.url.replace("//", "//ada:secret@"))
    finding = only(look(site), "reachability")
    assert found in finding.found
    assert mend in finding.mend
    assert "secret" not in finding.found + finding.mend
    assert "Proxy-Authorization: Basic YWRhOnNlY3JldA==" in proxy.asked[0]


def test_a_proxy_that_is_not_there_or_none(site: Path, serve: Serve) -> None:
    port = serve()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        gone = taken.getsockname()[1]
    address(site, f"127.0.0.1:{port}", proxy=f"http://127.0.0.1:{gone}")
    assert "nobody listens at the proxy's port" in only(look(site), "reachability").found
    talker = _Proxy(b"220 mail.example.org ESMTP\r\n")
    address(site, f"127.0.0.1:{port}", proxy=talker.url)
    assert "no answer of a proxy" in only(look(site), "reachability").found


# --- the server ---


def server(folder: Path, listen: tuple[str, int] | None = ("127.0.0.1", 0)) -> dict[str, Finding]:
    return {finding.check: finding for finding in examine_server(folder / "server", folder / "study.toml", listen)}


def test_a_sound_server(folder: Path) -> None:
    found = server(folder)
    assert list(found) == [*SERVER_CHECKS, "journal and clock", "disk"]
    assert [finding for finding in found.values() if not finding.ok] == []
    assert found["journal and clock"].found == "1 records verify"
    assert "take it offline" in found["certificate"].found


def test_a_port_in_use_and_an_address_of_another_machine(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        finding = only(server(folder, taken.getsockname()[:2]), "port")
        assert "Address already in use" in finding.found
        assert "--listen" in finding.mend
    assert "cannot be listened on" in only(server(folder, ("192.0.2.1", 8443)), "port").found


def test_a_server_that_holds_its_folder_but_does_not_answer(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with exclusive(folder / "server"):
            assert "this server listens" in server(folder, ("127.0.0.1", port))["port"].found
    with exclusive(folder / "server"):
        assert "nobody listens" in only(server(folder, ("127.0.0.1", port)), "port").found


def test_a_file_system_without_locks_or_durable_files(
    folder: Path, site: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a network file system whose lock service is not running."""
    import fcntl

    def none(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    serve()
    monkeypatch.setattr(fcntl, "flock", none)
    finding = only(look(site), "state folder")
    assert "No locks available" in finding.found
    assert str(folder / "sites" / "ash" / "state") in finding.found
    assert "lock service" in only(server(folder), "state folder").mend
    with (
        pytest.raises(StorageError, match=rf"{folder / 'server'}: cannot be locked \(No locks available\)"),
        exclusive(folder / "server"),
    ):
        pass
    monkeypatch.undo()
    monkeypatch.setattr(os, "fsync", none)
    assert not server(folder)["state folder"].ok
    assert [path.name for path in (folder / "server").iterdir() if path.name.startswith(".try")] == []


def test_keys_and_certificates_of_the_server(folder: Path) -> None:
    tls = folder / "server" / "tls"
    (tls / "server.key").chmod(0o644)
    assert str(tls / "server.key") in only(server(folder), "key modes").mend
    (tls / "server.key").chmod(0o600)
    (tls / "server.key").write_bytes((tls / "ca.key").read_bytes())
    assert "not a certificate and its key" in only(server(folder), "certificate").found
    (tls / "server.crt").unlink()
    assert "study ca" in only(server(folder), "certificate").mend


def test_another_coordinators_key(folder: Path) -> None:
    from secure_fed.protocol.signing import create_signing_key

    key = folder / "server" / "coordinator.key"
    key.unlink()
    create_signing_key(key)
    assert "not the key that the study names" in only(server(folder), "coordinator key").found


def test_who_has_done_its_work_needs_nothing_more(finished_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished_run, out, symlinks=True)
    ash, state = out / "sites" / "ash", out / "server"
    for closed in (False, True):
        if closed:
            agreed = load_study(out / "study.toml")
            close_server(state, agreed, abandon=False)
            close_site(ash / "state", ash / "identity", agreed, abandon=False, destroy_identity=True)
        for found in (server(out, None), {finding.check: finding for finding in examine_site(ash)}):
            assert [finding for finding in found.values() if not finding.ok] == []
            assert "the study is over" in found["end"].found
    with exclusive(state):  # it runs, so that it is looked at whole
        assert "end" not in server(out, None)


def test_a_study_that_goes_on_is_not_over(folder: Path) -> None:
    assert "end" not in server(folder)


def test_a_journal_that_was_changed_or_lies_in_the_future(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (record,) = folder.glob("server/runs/*/journal/*.record")
    with monkeypatch.context() as patched:
        real = server_checks.time.time
        patched.setattr(server_checks.time, "time", lambda: real() - 1000)
        finding = only(server(folder), "journal and clock")
        assert "s behind the journal's newest record" in finding.found
        assert "NTP" in finding.mend
    data = bytearray(record.read_bytes())
    data[40] ^= 1
    record.write_bytes(data)
    assert "journal" in only(server(folder), "journal and clock").found


# --- the command ---


def test_the_exit_code_counts(site: Path, folder: Path) -> None:
    address(site, "no-such-host.invalid:8443")
    shutil.rmtree(site.parent / "state" / "accepted")
    os.chmod(site.parent / "state" / "keys" / "000001.sealed", 0o644)
    ended = CliRunner().invoke(app, ["doctor", "--site", str(site), "--json"])
    told = json.loads(ended.stdout)
    failed = [row["check"] for row in told["checks"] if not row["ok"]]
    assert failed == ["key modes", "reachability", "membership"]
    assert told["failed"] == ended.exit_code == 3
    text = CliRunner().invoke(app, ["doctor", "--site", str(site)])
    assert text.exit_code == 3
    assert text.output.count("FAIL ") == text.output.count("mend: ") == 3


def test_the_exit_code_stays_below_the_refusals(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    many = [Finding(f"check {number}", False, "bad", "mend") for number in range(30)]
    monkeypatch.setattr(doctor, "examine_site", lambda path: iter(many))
    assert CliRunner().invoke(app, ["doctor", "--site", str(tmp_path)]).exit_code == 9


def test_nothing_is_written(site: Path, folder: Path) -> None:
    def content() -> dict[str, tuple[int, float]]:
        return {str(path): (path.stat().st_size, path.stat().st_mtime) for path in folder.rglob("*") if path.is_file()}

    before = content()
    list(examine_site(site))
    server(folder)
    assert content() == before


@pytest.mark.slow
def test_against_a_real_server(tmp_path: Path, images: Path) -> None:
    network = Network(tmp_path / "out", make_template(), images)
    try:
        network.start("server")
        network.wait_until(lambda: "listening" in network.log("server"), 60)
        site = network.site_folder("ash") / "site.toml"
        end = [finding for finding in examine_site(site) if not finding.ok]
        assert end == [] or [finding.check for finding in end] == ["server"]  # Flower may still be setting up
        assert look(site)["admission"].found == "the server knows this site's key"
        found = server(network.folder, None)
        assert [finding for finding in found.values() if not finding.ok] == []
        assert found["port"].found == f"this server listens on 127.0.0.1:{network.port}"
        # A stranger's identity is told apart.
        other = tmp_path / "stranger"
        CliRunner().invoke(app, ["site", "init", "ash", "--out", str(other)])
        shutil.rmtree(site.parent / "identity")
        shutil.copytree(other, site.parent / "identity")
        assert "does not know" in look(site)["admission"].found
    finally:
        network.close()

"""Figures of a running server or site for Prometheus, to who has the token.

They are what the status file says and nothing else; at a site that is nothing about any patient but when the process
last said something, which under a privacy budget is for the site's own eyes.
"""

from __future__ import annotations

import contextlib
import hmac
import re
import secrets
import socket
import socketserver
import threading
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from secure_fed.core.errors import AddressError, StorageError
from secure_fed.core.layout import StateFolder
from secure_fed.core.status import StatusFile
from secure_fed.core.storage import write_durable
from secure_fed.protocol.signing import PRIVATE

MOST_CALLERS = 16
"""Most connections at a time."""

_TOKEN = re.compile(rb"[ -~]+")

Wsgi = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


def serve_metrics(state: Path, listen: tuple[str, int]) -> None:
    """Answer ``http://HOST:PORT/metrics`` for as long as this process lives.

    Whoever asks must send ``Authorization: Bearer TOKEN``; the token is made at the first start and lies in
    ``STATE/metrics.token``.

    Args:
        state: the state folder of a server or a site, whose status the figures are.
        listen: host and port.

    Raises:
        AddressError: the address cannot be listened on.
        StorageError: the token cannot be written, or what lies there is none.
    """
    registry = CollectorRegistry()
    registry.register(_StatusCollector(StatusFile(state)))
    host, port = listen
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    server_class: type[_Server] = type("_Server", (_Server,), {"address_family": family})
    answer = _for_bearers(make_wsgi_app(registry), _token(state))
    try:
        server = make_server(host, port, answer, server_class, _Handler)
    except (OSError, OverflowError) as error:
        raise AddressError(
            f"{host}:{port}: cannot be listened on for metrics ({getattr(error, 'strerror', None) or error}); expected "
            "a free address of this machine: choose another with --metrics"
        ) from error
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()


def _token(state: Path) -> str:
    path = StateFolder(state).metrics_token
    if not path.exists():
        write_durable(path, (secrets.token_urlsafe(32) + "\n").encode(), PRIVATE)
    try:
        token = path.read_bytes().strip()
    except OSError as error:
        raise StorageError(f"{path}: cannot be read ({error.strerror}); expected the token of --metrics") from error
    if not _TOKEN.fullmatch(token):
        raise StorageError(
            f"{path}: {len(token)} bytes that are no token; expected one line of ASCII: remove the file, and the "
            "next start makes another"
        )
    return token.decode()


def _for_bearers(app: Wsgi, token: str) -> Wsgi:
    expected = f"Bearer {token}".encode()

    def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        given = str(environ.get("HTTP_AUTHORIZATION", "")).encode("utf-8", "replace")
        if not hmac.compare_digest(given, expected):
            start_response("401 Unauthorized", [("WWW-Authenticate", "Bearer"), ("Content-Length", "0")])
            return [b""]
        return app(environ, start_response)

    return answer


class _Server(socketserver.ThreadingMixIn, WSGIServer):
    """Each caller has a thread; of more than a few the oldest makes room, as whoever only holds connections open would
    else use up threads and files, which the rounds need."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, *arguments: Any) -> None:
        self._open: dict[Any, None] = {}
        self._changing = threading.Lock()
        super().__init__(*arguments)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer a caller, in place of the oldest if they are too many."""
        with self._changing:
            while len(self._open) >= MOST_CALLERS:
                oldest = next(iter(self._open))
                del self._open[oldest]
                with contextlib.suppress(OSError):  # who has gone by itself
                    oldest.shutdown(socket.SHUT_RDWR)
            self._open[request] = None
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """End a connection."""
        with self._changing:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def server_bind(self) -> None:
        """Bind, without asking the network for a name of the address."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[0], self.server_address[1]  # type: ignore[assignment]
        self.setup_environ()

    def handle_error(self, request: object, client_address: object) -> None:
        """Who hangs up is no matter for a log."""


class _Handler(WSGIRequestHandler):
    timeout = 10.0

    def log_message(self, format: str, *arguments: Any) -> None:
        """Each look of Prometheus would be a line."""


class _StatusCollector(Collector):
    """The status file as figures, read when they are asked for."""

    def __init__(self, status: StatusFile) -> None:
        self._status = status

    def collect(self) -> Iterator[Metric]:
        facts = self._status.read()
        yield from _common(facts)
        if facts.get("role") == "server":
            yield from _server(facts)


def _common(facts: dict[str, Any]) -> Iterator[Metric]:
    for name, words, value in (
        (
            "secfacmic_round",
            "At a server the round that is due, at a site the last one applied.",
            facts.get("round", 0),
        ),
        ("secfacmic_rounds", "Rounds of the study.", facts.get("rounds", 0)),
        ("secfacmic_finished", "Whether the study is over.", float(facts.get("finished", False))),
        ("secfacmic_updated_seconds", "When this process last said something, Unix time.", _unix(facts.get("updated"))),
        (
            "secfacmic_last_error_seconds",
            "When this process last met an error, Unix time; 0 if it did not.",
            _unix((facts.get("last_error") or {}).get("time")),
        ),
    ):
        yield GaugeMetricFamily(name, words, value=value)


def _server(facts: dict[str, Any]) -> Iterator[Metric]:
    sites = facts.get("sites", {})
    for name, words, value in (
        ("secfacmic_min_sites", "Fewest sites of a sum.", facts.get("min_sites", 0)),
        ("secfacmic_sites_in", "Sites whose update of this round is in.", sum(one["in"] for one in sites.values())),
        ("secfacmic_round_seconds", "Time of the last closed round.", facts.get("last_round_seconds") or 0.0),
        (
            "secfacmic_certificate_until_seconds",
            "When the server's certificate ends, Unix time.",
            _unix(facts.get("certificate_until")),
        ),
    ):
        yield GaugeMetricFamily(name, words, value=value)
    connected = GaugeMetricFamily("secfacmic_site_connected", "Whether a site is connected.", labels=["site"])
    for name, one in sorted(sites.items()):
        connected.add_metric([name], float(one["connected"]))
    yield connected
    for name, words, value in (
        ("secfacmic_rounds_closed", "Rounds that have their record.", facts.get("rounds_closed", 0)),
        ("secfacmic_bytes_up", "Bytes of all updates in sums.", facts.get("bytes_up", 0)),
        ("secfacmic_restarts", "Times the rounds' process was started again.", facts.get("restarts", 0)),
    ):
        yield CounterMetricFamily(name, words, value=value)


def _unix(time: str | None) -> float:
    try:
        return datetime.fromisoformat(time or "").timestamp()
    except ValueError:
        return 0.0

"""Serving the live page: on loopback, to who has the link, with nothing from elsewhere.

A web page of a stranger that the same browser has open must neither read nor press anything here: the link holds a
token; another Host is refused, so that no name of an attacker can be made to point here; another origin is refused
even with the token.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import json
import re
import secrets
import threading
import time
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from typing import Any

from secure_fed.core.errors import AddressError, SecfacmicError
from secure_fed.operate.live_facts import Place

HOST = "127.0.0.1"
LOOK_SECONDS = 1.0
"""Between two looks at the files, however many browsers are open."""
STREAMS = 8
"""Browsers that are told of changes at a time."""
BODY = 4096
"""Bytes of a request's body."""
_ACTIONS = ("accept", "stop", "doctor")


class LivePage:
    """The page of one state folder. The address is held from the start on; :meth:`serve` answers.

    Args:
        path: a server's or site's state folder, or a site's folder or ``site.toml``.
        port: to listen on, on 127.0.0.1; 0 takes a free one.

    Raises:
        AddressError: the port cannot be listened on.
        RecordError, SiteFileError: as :class:`secure_fed.operate.live_facts.Place`.
    """

    def __init__(self, path: Path, port: int = 0) -> None:
        self._place = Place(path)
        self._token = secrets.token_urlsafe(32)
        self._looking, self._acting = threading.Lock(), threading.Lock()
        self._streams = threading.BoundedSemaphore(STREAMS)
        self._seen: tuple[float, bytes] = (float("-inf"), b"")
        self._page, self._policy = _page()
        self._ended = threading.Event()
        try:
            self._server = _Server((HOST, port), type("_Bound", (_Handler,), {"page": self}))
        except (OSError, OverflowError) as error:
            raise AddressError(
                f"{HOST}:{port}: cannot be listened on for the page ({getattr(error, 'strerror', None) or error}); "
                "expected a free port: choose another with --port, or leave it out"
            ) from error
        self.port = int(self._server.server_address[1])

    @property
    def url(self) -> str:
        """The link, which is as secret as what it shows."""
        return f"http://{HOST}:{self.port}/{self._token}/"

    @property
    def nothing_yet(self) -> str:
        """Why there is nothing to show yet; empty if there is."""
        return str(self._place.facts().get("nothing_yet", ""))

    def serve(self) -> None:
        """Answer until :meth:`close`."""
        self._server.serve_forever(poll_interval=0.2)

    def close(self) -> None:
        """Answer nobody any more."""
        self._ended.set()
        self._server.shutdown()
        self._server.server_close()

    # --- what a request may be ---

    def refusal(self, path: str, headers: Any, *, pressing: bool) -> HTTPStatus | None:
        """Why a request is not answered; None if it may be."""
        own = {f"{HOST}:{self.port}", f"localhost:{self.port}"}
        host = headers.get_all("Host") or []
        if len(host) != 1 or host[0] not in own:
            return HTTPStatus.MISDIRECTED_REQUEST
        origins, own_origin = headers.get_all("Origin") or [], [f"http://{host[0]}"]
        if origins != own_origin and (origins or pressing):
            return HTTPStatus.FORBIDDEN
        if not {"none", "same-origin"}.issuperset(headers.get_all("Sec-Fetch-Site") or ()):
            return HTTPStatus.FORBIDDEN
        token = path.split("/")[1] if path.startswith("/") else ""
        if not hmac.compare_digest(token.encode("utf-8", "replace"), self._token.encode()):
            return HTTPStatus.NOT_FOUND
        return None

    def rest(self, path: str) -> str:
        """A path without the token."""
        return path.removeprefix(f"/{self._token}")

    # --- what is answered ---

    def facts(self) -> bytes:
        """The facts as JSON, at most one look a second for all who ask."""
        with self._looking:
            when, text = self._seen
            if time.monotonic() - when >= LOOK_SECONDS:
                try:
                    text = json.dumps(self._place.facts()).encode()
                except (SecfacmicError, OSError) as error:
                    text = json.dumps({"error": str(error)}).encode()
                self._seen = time.monotonic(), text
            return text

    def press(self, name: str, body: bytes) -> tuple[HTTPStatus, str]:
        """Do what a button says, one at a time."""
        try:
            given = json.loads(body or b"{}")
        except (ValueError, RecursionError):
            given = None
        if not isinstance(given, dict):
            return HTTPStatus.BAD_REQUEST, "expected a JSON object"
        if not self._acting.acquire(blocking=False):
            return HTTPStatus.CONFLICT, "the button before is not done yet; wait for it"
        try:
            return HTTPStatus.OK, self._place.act(name, given)
        except SecfacmicError as error:
            return HTTPStatus.CONFLICT, str(error)
        except OSError as error:
            return HTTPStatus.CONFLICT, f"not done ({error.strerror})"
        finally:
            self._acting.release()

    def stream(self, handler: BaseHTTPRequestHandler) -> None:
        """Tell a browser of each change until it goes."""
        if not self._streams.acquire(blocking=False):
            handler.send_error(HTTPStatus.SERVICE_UNAVAILABLE, "too many pages are open")
            return
        try:
            self.head(handler, HTTPStatus.OK, "text/event-stream")
            told, idle = b"", 0
            while not self._ended.is_set():
                text = self.facts()
                if text != told:
                    told, idle = text, 0
                    handler.wfile.write(b"data: " + text + b"\n\n")
                elif (idle := idle + 1) % 15 == 0:
                    handler.wfile.write(b": still here\n\n")  # finds out who has gone
                handler.wfile.flush()
                self._ended.wait(LOOK_SECONDS)
        finally:
            self._streams.release()

    def whole(self, handler: BaseHTTPRequestHandler) -> None:
        """Send the page itself."""
        self.head(handler, HTTPStatus.OK, "text/html; charset=utf-8", len(self._page))
        handler.wfile.write(self._page)

    def head(self, handler: BaseHTTPRequestHandler, status: HTTPStatus, kind: str, length: int | None = None) -> None:
        """Send a head that lets the browser fetch nothing, keep nothing and tell nobody the link."""
        handler.send_response(status)
        for name, value in {
            "Content-Type": kind,
            "Content-Security-Policy": self._policy,
            "Cache-Control": "no-store",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Cross-Origin-Opener-Policy": "same-origin",
        }.items():
            handler.send_header(name, value)
        if length is not None:
            handler.send_header("Content-Length", str(length))
        handler.end_headers()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: object, client_address: object) -> None:
        """Who hangs up is no matter for a log."""


class _Handler(BaseHTTPRequestHandler):
    page: LivePage
    timeout = 10.0
    server_version, sys_version = "secfacmic", ""

    def do_GET(self) -> None:
        """The page, or its stream of facts."""
        refused = self.page.refusal(self.path, self.headers, pressing=False)
        rest = "" if refused else self.page.rest(self.path)
        if refused or rest not in ("/", "/events"):
            self._say(refused or HTTPStatus.NOT_FOUND, "")
        elif rest == "/":
            self.page.whole(self)
        else:
            with contextlib.suppress(OSError):
                self.page.stream(self)

    def do_POST(self) -> None:
        """A button."""
        refused = self.page.refusal(self.path, self.headers, pressing=True)
        name = "" if refused else self.page.rest(self.path).removeprefix("/do/")
        length = self.headers.get("Content-Length", "")
        if refused or name not in _ACTIONS:
            self._say(refused or HTTPStatus.NOT_FOUND, "")
        elif not re.fullmatch("[0-9]{1,4}", length) or int(length) > BODY:
            self._say(HTTPStatus.BAD_REQUEST, "expected a short body of a stated length")
        else:
            self._say(*self.page.press(name, self.rfile.read(int(length))))

    def _say(self, status: HTTPStatus, text: str) -> None:
        data = text.encode()
        self.page.head(self, status, "text/plain; charset=utf-8", len(data))
        self.wfile.write(data)

    def log_message(self, format: str, *arguments: Any) -> None:
        """A line would hold the token."""


def _page() -> tuple[bytes, str]:
    """The page, and the policy that allows its own style and script alone."""
    text = (files("secure_fed.operate") / "live_page.html").read_text(encoding="utf-8")
    digests = {}
    for tag in ("style", "script"):
        found = re.search(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        assert found is not None
        digests[tag] = base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'sha256-{digests['style']}'; script-src 'sha256-{digests['script']}'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text.encode(), policy

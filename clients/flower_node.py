"""The site's connection to the server, and all that we use of flwr beyond its public API at a site.

Flower's own SuperNode would install and run what the server sends, open a local port, exit when the server is away,
and look for messages every three seconds. This one speaks the same Fleet protocol, from one process without a port:
it pulls a message, checks the bundle that its run came with, hands it to the site's own app and sends the answer.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import secrets
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TypeVar

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Context, Message, RecordDict
from flwr.proto.fab_pb2 import GetFabRequest
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
    PushMessagesResponse,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.recorddict_pb2 import BytesList
from flwr.proto.run_pb2 import GetRunRequest
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext
from flwr.supernode.fleet_http_client import FleetHttpClient

from secure_fed.clients.byte_line import ByteLine, Stuck
from secure_fed.clients.flower_app import Interrupted
from secure_fed.core.errors import CertificateError, ClockError, NotAdmittedError, ProtocolError
from secure_fed.transport.certificates import certificates, read_authority
from secure_fed.transport.connection import (
    AHEAD_SECONDS,
    BEHIND_SECONDS,
    MOST_WAIT,
    WAIT,
    Mistrust,
    SignedRequest,
    clock_fault,
    mistrust,
    proxy_to,
    seconds_ahead,
    trusting,
    without_password,
)
from secure_fed.transport.flower_parcels import FLEET, PULL, PUSH, delivered, parcel, taken_apart

if TYPE_CHECKING:
    from secure_fed.clients.flower_app import SiteApp

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 10.0
"""Flower's shortest; a site that crashed may come back after two of them."""

FASTEST, SLOWEST = 0.05, 1.0
"""Pause between two looks for messages that do not wait: short after one came, longer while nothing happens."""

FAST_CALLS, SLOW_CALLS = 100.0, 20.0
"""Looks a second of all sites together in the two cases: each costs the server some milliseconds."""

SLOWING = 1.2
"""How much longer each pause is than the one before."""

STUCK_SECONDS = 10.0
"""How long a site whose bytes the server does not take waits before it looks what it is asked for now."""

RETRY_FIRST, RETRY_MOST = 0.2, 5.0
REJOIN_SECONDS = 60.0
"""How long Flower's refusal of a node that it takes for online can last; beyond that it means something else."""

CALL_SECONDS = 60.0
"""How long the next bytes of one of Flower's calls may take; all of them are small."""

KEPT_SECONDS = 5.0
"""A connection over which nothing goes is kept for so much longer than a look may wait: else another handshake is made
for each heartbeat of a busy computer, and for whatever is done beside a look."""

OVER_SECONDS = 15.0
"""How long a site whose study is over here waits for a server that may still ask for its last word."""

FAREWELL_SECONDS, FAREWELL_PAUSE = 5.0, 0.25
FAREWELL_OF_EACH = 0.1
"""How long a site stays after its last reply, if the server is there so long, and between two signs of life; longer the
more sites there are, whose last replies the server takes too: Flower drops replies of nodes that have left."""

T = TypeVar("T")


class _Stale(Interrupted):
    """The server no longer waits for this message: its run has ended."""


class _Over(Interrupted):
    """The study is over here, and no server asks for anything any more."""


class _Forgotten(Interrupted):
    """The server does not know this node any more: its state is another one."""


@dataclass(frozen=True)
class Way:
    """How a site reaches its server.

    Attributes:
        address: host and port of the server.
        authority: file of the certificate of the study's authority; of two, while an amendment changes it.
        sites: how many there are in the study; the more, the less often each looks, if its looks do not wait.
        proxy: URL of an HTTP proxy through which the server is reached (by CONNECT, so that TLS ends at the server);
            without one, the one that ``HTTPS_PROXY`` names, unless ``NO_PROXY`` excepts the server.
        wait: for how many seconds a look for messages waits at the server; 0 for lines on which nothing may be silent.
        records: URL below which copies of records lie, if there is one.
    """

    address: str
    authority: Path
    sites: int
    proxy: str | None = None
    wait: int = int(MOST_WAIT)
    records: str | None = None


def run_site(app: SiteApp, way: Way) -> None:
    """Take part until the study is over.

    Args:
        app: the site.
        way: to its server.

    Raises:
        CertificateError: the server does not prove to be the one that the study means.
        ClockError: the clocks differ too much.
        NotAdmittedError: the server does not know this site.
        SecfacmicError: why the site itself cannot go on.
    """

    def connect() -> _Connection:
        return _Connection(way, app.site.name, app.site.connection_key, lambda: app.site.over, app.authority)

    connection = connect()
    try:
        with contextlib.suppress(_Over):
            while not app.finished and app.failure is None:
                if connection.authority != app.authority:  # by an amendment: the one before convinces nobody here
                    connection.leave()
                    connection = connect()
                connection.join()
                with contextlib.suppress(_Forgotten):
                    _answer_messages(app, connection, way)
    finally:
        connection.leave()
    if app.failure is not None:
        raise app.failure


@contextlib.contextmanager
def open_line(way: Way, site: str, key: ec.EllipticCurvePrivateKey, authority: str | None = None) -> Iterator[ByteLine]:
    """The large bytes alone, beside a client that may be running; nothing is joined.

    Args:
        way: to the server.
        site: the site's name.
        key: its connection key.
        authority: as for a :class:`_Connection`.

    Raises:
        CertificateError: the server does not prove to be the one that the study means.
        ClockError: the clocks differ too much.
        NotAdmittedError: the server does not know this site.
        ProtocolError: nobody is there, or it answers something else.
    """
    connection = _Connection(way, site, key, lambda: True, authority)
    try:
        yield connection.bare_line
    except _Over:
        raise ProtocolError(
            f"{way.address}: nobody answers; expected the study's server, while it runs: ask again when it is there"
        ) from None
    finally:
        connection.leave()


def _answer_messages(app: SiteApp, connection: _Connection, way: Way) -> None:
    fastest, slowest = max(FASTEST, way.sites / FAST_CALLS), max(SLOWEST, way.sites / SLOW_CALLS)
    pause = fastest
    asked, taken = time.monotonic(), True
    while app.failure is None and not app.finished and app.authority == connection.authority:
        received, looked = None, time.monotonic()
        with contextlib.suppress(_Stale):
            received = connection.pull()
        if received is None:
            if taken:  # else a server that is there asks again, however busy it is
                connection.end_if_over(asked)
            if not way.wait or time.monotonic() - looked < FASTEST:
                time.sleep(pause)
                pause = min(slowest, pause * SLOWING)
            continue
        message, bundle = received
        context = Context(message.metadata.run_id, connection.node.node_id, {}, RecordDict(), {})
        began, taken = time.monotonic(), False
        try:
            answer = app.answer(message, context, bundle, connection.line)
            log.debug("round %s: answered in %.2f s", message.metadata.group_id, time.monotonic() - began)
            connection.push(answer)
            taken, pause = True, fastest
        except _Stale:  # the server gives the same message at once, if it still waits for its answer
            time.sleep(pause)
            pause = min(slowest, pause * SLOWING)
        except Stuck:
            time.sleep(STUCK_SECONDS)
        app.after_reply(taken=taken)
        asked = time.monotonic()
    connection.stay(max(FAREWELL_SECONDS, FAREWELL_OF_EACH * way.sites), max(FAREWELL_PAUSE, way.sites / SLOW_CALLS))


class _RequestSignature:
    """Signs each request; says of a look how long it may wait."""

    def __init__(self, site: str, key: ec.EllipticCurvePrivateKey, wait: int) -> None:
        self._site = site
        self._key = key
        self._wait = wait

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        """Add the headers."""
        request = context.request
        digest, now = hashlib.sha256(request.content).hexdigest(), time.time_ns() // 1_000_000
        length, path = len(request.content), request.url.path
        signed = SignedRequest(self._site, request.method, path, length, digest, now)
        request.headers.update(signed.headers(self._key))
        if self._wait and isinstance(context.message, PullMessagesRequest):
            request.headers[WAIT] = str(self._wait)
        return call_next(context)


class _FleetClient(FleetHttpClient):
    """Flower's calls, but messages with all their parts."""

    def pull(self, request: PullMessagesRequest) -> BytesList:
        """Look for a message; empty if there is none."""
        return self._unary_unary(path=FLEET + PULL, rpc_method=PULL, request=request, response_type=BytesList)

    def push(self, request: BytesList) -> PushMessagesResponse:
        """Give a reply."""
        return self._unary_unary(
            path=FLEET + PUSH, rpc_method=PUSH, request=request, response_type=PushMessagesResponse
        )


class _Connection:
    """The Fleet API as one node: every call repeats until the server is there.

    Args:
        way: to the server.
        site: the site's name.
        key: its connection key.
        over: whether the study is over here, so that the server is not needed any more.
        authority: fingerprint of the authority that an amendment named, which alone is trusted then; else None.

    Raises:
        CertificateError: the way's file lacks the certificate that is trusted.

    Attributes:
        authority: as given.
        line: the large bytes beside it.
        bare_line: the same, where a refusal means that something is not there.
    """

    def __init__(
        self,
        way: Way,
        site: str,
        key: ec.EllipticCurvePrivateKey,
        over: Callable[[], bool] = lambda: False,
        authority: str | None = None,
    ) -> None:
        self.authority = authority
        self.node = Node()
        self._over = over
        self._address = way.address
        trusted, proxy = read_authority(way.authority, authority), proxy_to(way.address, way.proxy)
        self._superseded = authority is not None and len(certificates(read_authority(way.authority))) > 1
        # For messages: without user and password.
        self._through = "" if proxy is None else f" through the proxy {without_password(proxy)}"
        self._public = public_key_to_bytes(key.public_key())
        self._client = _FleetClient.from_server_address(
            way.address,
            insecure=False,
            root_certificates=trusted,
            interceptors=[_RequestSignature(site, key, way.wait)],
        )
        # flwr's own would follow redirects, and takes no proxy but the environment's.
        self._client._client.close()
        limits = httpx.Limits(keepalive_expiry=way.wait + KEPT_SECONDS)
        http = httpx.Client(verify=trusting(trusted), timeout=CALL_SECONDS, limits=limits, proxy=proxy, trust_env=False)
        self._client._client = http
        self.line = ByteLine(http, f"https://{way.address}", site, key, self._call, way.records)
        self.bare_line = ByteLine(http, f"https://{way.address}", site, key, self._repeat)
        self._waits = bool(way.wait)
        self._looking = False
        self._bundles: dict[int, bytes] = {}
        self._joined = threading.Event()
        self._left = threading.Event()
        self._heartbeat = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._heartbeat.start()

    def join(self) -> None:
        """Connect, however long it takes until the server is there and takes this node."""
        self._joined.clear()
        refused_since: float | None = None
        request = ActivateNodeRequest(public_key=self._public, heartbeat_interval=HEARTBEAT_SECONDS)
        while True:
            try:
                response = self._repeat(lambda: self._client.ActivateNode(request))
            except httpx.HTTPStatusError as error:
                code = FlowerError.from_json(error.response.text)
                if code is None or code.code != ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED:
                    raise
                if refused_since is None:
                    refused_since = time.monotonic()
                    log.info("waiting to rejoin: the server takes this site for connected until 20 s after a crash")
                elif time.monotonic() - refused_since > REJOIN_SECONDS:
                    raise NotAdmittedError(
                        f"{self._address}: the server refuses this site for {REJOIN_SECONDS:g} s; expected at most "
                        "20 s after a crash: does the site run on another computer too?"
                    ) from None
                time.sleep(1.0)
                continue
            self.node = Node(node_id=response.node_id)
            self._joined.set()
            log.info("connected to %s", self._address)
            return

    def leave(self) -> None:
        """Tell the server, if it is there, so that a new start need not wait."""
        self._left.set()
        if self._joined.is_set():
            with contextlib.suppress(httpx.HTTPError):
                self._client.DeactivateNode(DeactivateNodeRequest(node_id=self.node.node_id))

    def stay(self, seconds: float, pause: float) -> None:
        """Remain connected for a while, or as long as the server is there, which is seen each time after a pause."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                self._client.SendNodeHeartbeat(self._beat_request())
            except httpx.HTTPError:
                return
            time.sleep(pause)

    def pull(self) -> tuple[Message, bytes] | None:
        """The next message and the bundle of its run, None if there is none."""
        self._looking = True
        try:
            packed = self._call(lambda: self._client.pull(PullMessagesRequest(node=self.node)))
        finally:
            self._looking = False
        if not packed.vals:
            return None
        message = delivered(packed)
        return message, self._bundle(message.metadata.run_id)

    def push(self, message: Message) -> None:
        """Send an answer; the same again until the server has it. Not how long it took, as Flower's own nodes do.

        Raises:
            _Stale: nobody waits for it any more.
        """
        heads, trees, parts = taken_apart([message])
        request = PushMessagesRequest(node=self.node, messages_list=heads, message_object_trees=trees)
        packed = parcel(request, parts)
        self._call(lambda: self._client.push(packed))

    def _bundle(self, run: int) -> bytes:
        if run not in self._bundles:
            info = self._call(lambda: self._client.GetRun(GetRunRequest(node=self.node, run_id=run))).run
            request = GetFabRequest(node=self.node, hash_str=info.fab_hash, run_id=run)
            self._bundles = {run: self._call(lambda: self._client.GetFab(request)).fab.content}
        return self._bundles[run]

    # --- calls ---

    def _call(self, call: Callable[[], T]) -> T:
        try:
            return self._repeat(call)
        except httpx.HTTPStatusError as error:
            if error.response.status_code == 401:
                raise _Forgotten from None
            log.info("the server no longer waits for this message; it will ask again")
            raise _Stale from None

    def _repeat(self, call: Callable[[], T]) -> T:
        """Call until the server is there.

        Raises:
            HTTPStatusError: it is there and refuses.
            ProtocolError: it is there and answers something else.
            CertificateError, ClockError, NotAdmittedError: it never will, as things are.
            _Over: it is away, and not needed any more.
        """
        pause = RETRY_FIRST
        told = False
        failing: float | None = None
        while True:
            try:
                result = call()
            except httpx.HTTPStatusError as error:
                status = error.response.status_code
                if status == 403 and not error.response.content:
                    raise NotAdmittedError(
                        f"{self._address}: the server does not know this site's key; expected a server of the same "
                        "study: compare study ids (secfacmic study show)"
                    ) from None
                if status == 401:
                    _check_clock(error.response)
                if status not in (502, 503, 504):
                    raise
                reason = f"it answers {status}"
            except httpx.TransportError as error:
                reason = self._reason(error)
            except ValueError:  # flwr's, of an answer that it cannot parse
                raise ProtocolError(f"{self._address}: the server's answer is none to what was asked") from None
            else:
                if told:
                    log.info("the server is there again")
                return result
            if not told and pause > RETRY_FIRST * 3:
                place = f"{self._address}{self._through}"
                log.info("waiting for the server at %s (%s); it is tried again and again", place, reason)
                told = True
            failing = failing or time.monotonic()  # not from its begin: who is slow is there
            self.end_if_over(failing)
            # Not all sites at once, after a fault that all of them have seen.
            if self._left.wait(pause * (0.5 + secrets.randbelow(512) / 1024)):
                raise _Stale  # a worker of flwr's, still trying while we end
            pause = min(RETRY_MOST, pause * 1.5)

    def _reason(self, error: httpx.TransportError) -> str:
        """Why the server is not there.

        Raises:
            CertificateError: it is, and does not prove to be the one that the study means; unless people here still
                keep the certificate that an amendment has replaced: then it may be a server that was not yet started
                again, which they need not come back for.
        """
        cause = _mistrusted(error)
        if cause is None:
            return _reason(error)
        if not self._superseded or mistrust(cause) is not Mistrust.ISSUER:
            _refuse_certificate(cause, f"{self._address}{self._through}")
        return (
            f"its certificate is not by authority {self.authority}, which alone an amendment lets in: the coordinator "
            "starts it again with the new one"
        )

    def end_if_over(self, since: float) -> None:
        """Once the study is over here, do not wait for a server for longer than it could take to ask.

        Args:
            since: when the server was last heard of, by the monotonic clock.

        Raises:
            _Over: it is, and nothing was heard for too long.
        """
        if time.monotonic() - since > OVER_SECONDS and self._over():
            raise _Over

    def _beat(self) -> None:
        """Heartbeats, also while the site trains."""
        while not self._left.wait(HEARTBEAT_SECONDS / 2.5):
            # A look that waits is a sign of life in itself.
            if self._joined.is_set() and not (self._waits and self._looking):
                # Failures show in the next real call.
                with contextlib.suppress(httpx.HTTPError, ValueError):
                    self._client.SendNodeHeartbeat(self._beat_request())

    def _beat_request(self) -> SendNodeHeartbeatRequest:
        return SendNodeHeartbeatRequest(node=self.node, heartbeat_interval=HEARTBEAT_SECONDS)


def _check_clock(response: httpx.Response) -> None:
    ahead = seconds_ahead(response.headers.get("date"))
    fault = None if ahead is None else clock_fault(ahead)
    if fault is not None:
        raise ClockError(
            f"{fault}; Flower refuses more than {AHEAD_SECONDS:g} s ahead and {BEHIND_SECONDS:g} s behind: set both "
            "clocks by NTP"
        ) from None


def _mistrusted(error: BaseException) -> ssl.SSLCertVerificationError | None:
    """The failed verification behind an error, if that is what it is."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ssl.SSLCertVerificationError):
        cause = cause.__cause__ or cause.__context__
    return cause


def _refuse_certificate(cause: ssl.SSLCertVerificationError, address: str) -> NoReturn:
    why = mistrust(cause)
    if why is Mistrust.NAME:
        help_text = (
            "its certificate is for another name; connect by a name that it has, or make one with: "
            "secfacmic study ca --renew --host NAME"
        )
    elif why is Mistrust.TIME:
        help_text = "its certificate is not valid at this time; check this computer's clock, or make a new one"
    else:
        help_text = (
            "it was not issued by the study's authority; expected the server whose ca.crt is in site.toml, and no "
            "firewall or proxy on the way that opens TLS"
        )
    raise CertificateError(f"{address}: the server cannot be trusted ({cause.verify_message}): {help_text}") from None


def _reason(error: httpx.TransportError) -> str:
    if isinstance(error, httpx.ProxyError):
        return f"the proxy refuses: {error}"
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    text = cause.strerror if isinstance(cause, OSError) else None
    return (text or type(error).__name__).lower()

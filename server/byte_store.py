"""The large bytes of a study beside Flower's calls: a site's envelope up, records and questions down.

``PUT /bytes/DIGEST`` takes the next part of what a site sends: its offset, its own digest and the whole's length are
signed. Each part is answered with what is held now, and is checked before it counts, so that what the server has is
never sent again. ``POST /bytes/DIGEST`` says how much is held. ``GET /records/DIGEST`` gives bytes that do not change,
in ranges; their address is their SHA-256, which a site is told, and nothing lists them.

Parts go to the disk as they come. A site has one thing under way; another one replaces it. What has arrived is made
durable by whoever takes it: until then the site has it, and is asked again. So what lies here from before a start is
checked before it counts.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from secure_fed.core.errors import ProtocolError
from secure_fed.core.storage import make_folder, write_durable
from secure_fed.server.http import Receive, Send, answer
from secure_fed.transport.connection import DIGEST, OFFSET, TOTAL, SignedRequest

UPLOADS, RECORDS = "/bytes/", "/records/"

MAX_PART = 4 * 2**20
"""Most bytes of one part."""

CHUNK = 32 * 1024
"""Bytes that are read of a record at a time, for each who takes it: what a line does not take yet lies in memory, and
OpenSSL's buffer of each connection stays as large as what was once written at a time. Larger ones cost as much time."""

_DIGEST = re.compile(r"[0-9a-f]{64}")
_RANGE = re.compile(r"bytes=([0-9]{1,15})-([0-9]{1,15})?")
_NAME = re.compile(r"(?P<site>[^.]+)\.(?P<digest>[0-9a-f]{64})\.(?P<total>[0-9]+)\.(?P<state>part|whole)")


@dataclass(frozen=True)
class Upload:
    """Something under way from a site.

    Attributes:
        site: whose it is.
        digest: SHA-256 of the whole.
        held: bytes that are here.
        total: bytes of the whole.
    """

    site: str
    digest: str
    held: int
    total: int


@dataclass
class _Open:
    """The one upload of a site."""

    path: Path
    digest: str
    total: int
    held: int
    turn: object = field(default_factory=object)  # of the part that is being taken

    @property
    def whole(self) -> Path:
        return self.path.with_suffix(".whole")

    @property
    def there(self) -> bool:
        """Whether it was not taken yet, or is being checked."""
        return self.whole.exists() or self.path.exists()


class Incoming:
    """What arrived of sites, on the disk: read by the process of the rounds, written by that of the connections.

    Args:
        folder: for it alone.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def uploads(self) -> Iterator[Upload]:
        """What is under way, whole or not."""
        for path in self.folder.glob("*"):
            found = _NAME.fullmatch(path.name)
            if found is not None:
                with contextlib.suppress(FileNotFoundError):
                    total = int(found["total"])
                    yield Upload(found["site"], found["digest"], min(path.stat().st_size, total), total)

    def take(self, site: str, digest: str, length: int) -> bytes:
        """What a site has sent; it stays until :meth:`drop`. Its digest was checked when it became whole.

        Args:
            site: its name.
            digest, length: of the bytes, as its message says.

        Raises:
            ProtocolError: it is not here.
        """
        try:
            data = (self.folder / _name(site, digest, length, "whole")).read_bytes()
        except OSError:
            data = b""
        if len(data) != length:
            raise ProtocolError(f"{site}: names {length} bytes that are not here; it is asked again")
        return data

    def of(self, site: str) -> list[Path]:
        """The files of a site."""
        with contextlib.suppress(FileNotFoundError):
            # Not a pattern, which would be matched with those of all other sites; no site's name has a dot.
            return [self.folder / name for name in os.listdir(self.folder) if name.startswith(f"{site}.")]
        return []

    def drop(self, site: str) -> None:
        """Erase what a site has sent."""
        for path in self.of(site):
            path.unlink(missing_ok=True)


class Outgoing:
    """What sites may fetch, by its digest, on the disk: any web server may hand out the same folder.

    Args:
        folder: for it alone.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._known: deque[tuple[bytes, str]] = deque(maxlen=4)  # what many sites are sent, and its digest

    def publish(self, data: bytes) -> str:
        """Make bytes fetchable; their digest.

        Raises:
            StorageError: they cannot be written.
        """
        digest = next((digest for known, digest in self._known if known is data), "")
        if not digest:
            digest = hashlib.sha256(data).hexdigest()
            self._known.append((data, digest))
        path = self.folder / digest
        if not path.exists():
            make_folder(self.folder)
            write_durable(path, data)
        return digest

    def find(self, digest: str) -> Path | None:
        """Where bytes lie that were published, or that the coordinator keeps of a round, in a folder a round."""
        path = self.folder / digest
        return path if path.is_file() else next(self.folder.glob(f"*/{digest}"), None)

    def lend(self, data: bytes) -> str:
        """Make bytes fetchable until :meth:`take_back`; their digest, or nothing if they are so for good.

        Raises:
            StorageError: they cannot be written.
        """
        known = (self.folder / hashlib.sha256(data).hexdigest()).exists()
        digest = self.publish(data)
        return "" if known else digest

    def take_back(self, digest: str) -> None:
        """Let nobody fetch any more what was lent."""
        (self.folder / digest).unlink(missing_ok=True)


class ByteStore:
    """The resources, under ASGI; used by one event loop, behind :class:`secure_fed.server.gate.Gate`.

    Args:
        incoming, outgoing: their folders.
        run: id of the run; requests of another are refused.
        most: most bytes of one upload, by site.
    """

    def __init__(self, incoming: Incoming, outgoing: Outgoing, run: str, most: Callable[[str], int]) -> None:
        self._incoming = incoming
        self._outgoing = outgoing
        self._run = run
        self._most = most
        self._open: dict[str, _Open] = {}

    def serves(self, method: str, path: str) -> bool:
        """Whether there may be something at a path."""
        if path.startswith(UPLOADS):
            return method in ("PUT", "POST") and _DIGEST.fullmatch(path.removeprefix(UPLOADS)) is not None
        return method == "GET" and path.startswith(RECORDS) and _DIGEST.fullmatch(path[len(RECORDS) :]) is not None

    async def answer(
        self, request: SignedRequest, headers: Mapping[bytes, bytes], receive: Receive, send: Send
    ) -> None:
        """Answer a member's signed request.

        Args:
            request: what it signed.
            headers: by name in lower case.
            receive, send: ASGI's.
        """
        if request.method == "GET":
            await self._give(request.path.removeprefix(RECORDS), headers.get(b"range", b""), send)
            return
        if request.run != self._run:
            await answer(send, 410)  # of a run that is over
            return
        if not 0 < request.total <= self._most(request.site):
            await answer(send, 413)
            return
        upload = self._of(request.site, request.path.removeprefix(UPLOADS), request.total)
        if request.method == "POST":
            await _say(send, 200, upload)
        else:
            await self._take(request, upload, receive, send)

    def _of(self, site: str, digest: str, total: int) -> _Open:
        """The site's upload of that digest: as it stands, else begun, in place of any other."""
        known = self._open.get(site)
        same = known is not None and (known.digest, known.total) == (digest, total)
        if known is not None and same and (known.held < total or known.there):  # else it was taken
            return known
        folder = self._incoming.folder
        part = folder / _name(site, digest, total, "part")
        for path in self._incoming.of(site) if known is None else (known.path, known.whole):
            if path.stem != part.stem:
                path.unlink(missing_ok=True)
        upload = _Open(part, digest, total, 0)
        if part.exists() and part.stat().st_size >= total:
            os.replace(part, upload.whole)  # all had come, and was not checked yet
        if upload.whole.exists() and not _is(upload.whole, digest):
            upload.whole.unlink()  # from before this process began, and lost with the machine's power
        if upload.whole.exists():
            upload.held = total
        else:
            try:
                part.touch(0o600)
            except FileNotFoundError:
                make_folder(folder, 0o700)
                part.touch(0o600)
            upload.held = min(part.stat().st_size, total)
        self._open[site] = upload
        return upload

    async def _take(self, request: SignedRequest, upload: _Open, receive: Receive, send: Send) -> None:
        length = request.length
        if length > MAX_PART or length == 0 or request.offset + length > upload.total:
            await answer(send, 413)
            return
        if request.offset != upload.held:
            await _say(send, 409, upload)  # sent already, or before what comes first
            return
        turn = upload.turn = object()
        digest, received = hashlib.sha256(), 0
        descriptor = os.open(upload.path, os.O_WRONLY)
        try:
            more = True
            while more:
                event = await receive()
                if event["type"] != "http.request":
                    return  # hung up; what came of this part does not count
                if upload.turn is not turn:
                    await _say(send, 409, upload)  # the site sends it on another connection
                    return
                chunk = event.get("body", b"")
                digest.update(chunk)
                received += len(chunk)
                if received > length:
                    break
                os.pwrite(descriptor, chunk, request.offset + received - len(chunk))
                more = event.get("more_body", False)
            if received != length or digest.hexdigest() != request.digest:
                await _say(send, 422, upload)
                return
            upload.held += length
            if upload.held == upload.total and not await self._complete(upload, request):
                await _say(send, 422, upload)
                return
        finally:
            if upload.turn is turn and upload.path.exists() and upload.held < upload.total:
                os.ftruncate(descriptor, upload.held)
            os.close(descriptor)
        await _say(send, 200, upload, request.digest)

    async def _complete(self, upload: _Open, last: SignedRequest) -> bool:
        """Whether the whole is what it was said to be; then it may be taken."""
        if last.length == upload.total:  # the whole in one part, whose digest was just checked
            right = last.digest == upload.digest
        else:
            right = await asyncio.to_thread(_is, upload.path, upload.digest)
        if not right:
            upload.held = 0
            return False
        os.replace(upload.path, upload.whole)
        return True

    async def _give(self, digest: str, asked: bytes, send: Send) -> None:
        path = self._outgoing.find(digest)
        try:
            stream = None if path is None else path.open("rb")
        except OSError:
            stream = None  # a round that is not kept any more
        if stream is None:
            await answer(send, 404)
            return
        with stream:
            size = os.fstat(stream.fileno()).st_size
            first, last, status = 0, size - 1, 200
            if asked:
                found = _RANGE.fullmatch(asked.decode("latin-1"))
                if found is not None:
                    first, last, status = int(found[1]), min(int(found[2] or size - 1), size - 1), 206
                if found is None or first > last:
                    await answer(send, 416, headers={"content-range": f"bytes */{size}"})
                    return
            headers = [
                (b"content-length", str(last - first + 1).encode()),
                (b"content-type", b"application/octet-stream"),
                (b"cache-control", b"public, max-age=31536000, immutable"),
                (b"accept-ranges", b"bytes"),
            ]
            if status == 206:
                headers.append((b"content-range", f"bytes {first}-{last}/{size}".encode()))
            await send({"type": "http.response.start", "status": status, "headers": headers})
            stream.seek(first)
            left = last - first + 1
            while left:
                chunk = stream.read(min(CHUNK, left))
                left -= len(chunk)
                if not chunk:
                    return
                await send({"type": "http.response.body", "body": chunk, "more_body": left > 0})


async def _say(send: Send, status: int, upload: _Open, digest: str = "") -> None:
    """How much is held, and the digest of the part that was taken."""
    headers = {OFFSET: str(upload.held), TOTAL: str(upload.total)} | ({DIGEST: digest} if digest else {})
    await answer(send, status, headers=headers)


def _is(path: Path, digest: str) -> bool:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() == digest


def _name(site: str, digest: str, total: int, state: str) -> str:
    return f"{site}.{digest}.{total}.{state}"

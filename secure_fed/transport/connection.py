"""What lies between a site and its server: proxies, mistrusted certificates, clocks that differ.

A site that is connecting and a doctor that looks why it cannot judge by the same rules.
"""

from __future__ import annotations

import base64
import email.utils
import re
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum, auto
from urllib.request import getproxies, proxy_bypass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from secure_fed.core.errors import AddressError
from secure_fed.core.tomlfile import reachable

KEY_HEADER = "flwr-public-key"
"""Header of the public half of a site's connection key: PEM, base64."""

TIME, RUN, OFFSET, TOTAL, DIGEST, SIGNATURE = (
    f"secfacmic-{name}" for name in ("time", "run", "offset", "total", "digest", "signature")
)
"""Headers of a site's signed request (:class:`SignedRequest`)."""

WAIT = "secfacmic-wait"
"""Header of a look: for how many seconds the server may wait for something to come before it answers."""

MOST_WAIT = 25.0
"""Most seconds that a look waits: shorter than what firewalls and proxies allow a connection to be silent."""

AHEAD_SECONDS, BEHIND_SECONDS = 5.0, 305.0
"""Limits for a site's clock: what it signs counts from then to then."""

_HEX = re.compile(r"[0-9a-f]{64}|")


class Mistrust(Enum):
    """Why a server's certificate does not convince."""

    NAME = auto()
    """It is for another name."""

    TIME = auto()
    """It, or one above it, is not valid now."""

    ISSUER = auto()
    """The study's authority has not issued it; any other reason too."""


def mistrust(error: ssl.SSLCertVerificationError) -> Mistrust:
    """What a failed verification comes down to."""
    if error.verify_code in (62, 64):  # host name, address
        return Mistrust.NAME
    if error.verify_code in (9, 10):  # not yet, not any more
        return Mistrust.TIME
    return Mistrust.ISSUER


def trusting(authority: bytes) -> ssl.SSLContext:
    """The TLS settings of a site, which trusts one authority and no other.

    Args:
        authority: its certificate, PEM.

    Raises:
        ssl.SSLError: it is none.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_verify_locations(cadata=authority.decode("ascii", "ignore"))  # comments may be in any language
    return context


def proxy_to(address: str, given: str | None) -> str | None:
    """The proxy on the way to a server: the one given, else the environment's, unless that excepts the server.

    Raises:
        AddressError: the environment's is no address of an HTTP proxy.
    """
    if given is not None or proxy_bypass(address):
        return given
    named = getproxies().get("https")
    if named is None:
        return None
    url = named if "://" in named else f"http://{named}"  # as most programs read it
    try:
        if not url.lower().startswith(("http://", "https://")):
            raise ValueError("not of HTTP")
        return reachable(url)
    except ValueError:
        raise AddressError(
            f"HTTPS_PROXY is {without_password(url)!r}; expected an HTTP proxy, as http://proxy.example.org:3128: "
            'correct the variable, or set proxy = "http://HOST:PORT" in site.toml'
        ) from None


def without_password(url: str) -> str:
    """A proxy's URL, for messages: without user and password, and without a slash at its end."""
    scheme, separator, rest = url.rstrip("/").rpartition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}"


def seconds_ahead(date: str | None) -> float | None:
    """How far this computer's clock is ahead of the server's; None where the server does not tell.

    Args:
        date: the ``Date`` header of an answer that has just come, in whole seconds.
    """
    try:
        return (datetime.now(UTC) - email.utils.parsedate_to_datetime(date or "")).total_seconds()
    except (TypeError, ValueError):
        return None


def clock_fault(ahead: float) -> str | None:
    """What is wrong with this computer's clock, None while Flower tolerates it.

    Args:
        ahead: of the server's, in seconds.
    """
    # The header has whole seconds.
    if -BEHIND_SECONDS + 1 <= ahead <= AHEAD_SECONDS - 1:
        return None
    side = "ahead of" if ahead > 0 else "behind"
    return f"this computer's clock is {abs(ahead):.0f} s {side} the server's"


@dataclass(frozen=True)
class SignedRequest:
    """What a site signs of each request; checked before a byte of its body is read.

    Attributes:
        site: the sender's name, which its key has at the server too; not sent.
        method, path: of the request.
        length: bytes of its body.
        digest: SHA-256 of its body, hex.
        time: when it was signed, Unix time in milliseconds.
        run: the run that it belongs to; empty for Flower's calls.
        offset: where its body belongs in the whole that it is a part of.
        total: bytes of that whole; 0 if there is none.
    """

    site: str
    method: str
    path: str
    length: int
    digest: str
    time: int
    run: str = ""
    offset: int = 0
    total: int = 0

    def signed_bytes(self) -> bytes:
        """What the signature is over."""
        fields = (self.time, self.site, self.run, self.method, self.path, self.offset, self.length, self.total)
        return "\n".join(["secfacmic request 2", *map(str, fields), self.digest]).encode()

    def headers(self, key: ec.EllipticCurvePrivateKey) -> dict[str, str]:
        """The headers that carry it, signed.

        Args:
            key: the site's connection key.
        """
        signature = base64.b64encode(key.sign(self.signed_bytes(), ec.ECDSA(hashes.SHA256()))).decode("ascii")
        found = {TIME: str(self.time), DIGEST: self.digest, SIGNATURE: signature, KEY_HEADER: public_key_header(key)}
        if self.total or self.run:
            found |= {RUN: self.run, OFFSET: str(self.offset), TOTAL: str(self.total)}
        return found


def public_key_header(key: ec.EllipticCurvePrivateKey | ec.EllipticCurvePublicKey) -> str:
    """The public half of a connection key as :data:`KEY_HEADER` has it."""
    public = key.public_key() if isinstance(key, ec.EllipticCurvePrivateKey) else key
    return base64.b64encode(public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)).decode("ascii")


def read_signed_request(
    headers: Mapping[bytes, bytes], method: str, path: str, site: str, key: ec.EllipticCurvePublicKey
) -> SignedRequest | None:
    """The request that a member's key has signed just now, as its headers say; None if it has not.

    Args:
        headers: by name in lower case.
        method, path: of the request.
        site: the name of the member whose key it is.
        key: the member's connection key.
    """
    try:
        run, digest = (headers.get(name.encode(), b"").decode("ascii") for name in (RUN, DIGEST))
        offset, total = (_count(headers.get(name.encode(), b"0")) for name in (OFFSET, TOTAL))
        signed_at = _count(headers[TIME.encode()])
        length = _count(headers.get(b"content-length", b"0"))
        signature = base64.b64decode(headers[SIGNATURE.encode()], validate=True)
        if not digest or not (_HEX.fullmatch(digest) and _HEX.fullmatch(run)):
            return None
        request = SignedRequest(site, method, path, length, digest, signed_at, run, offset, total)
        if not -AHEAD_SECONDS < time.time() - signed_at / 1000 < BEHIND_SECONDS:
            return None
        key.verify(signature, request.signed_bytes(), ec.ECDSA(hashes.SHA256()))
    except (KeyError, ValueError, InvalidSignature):
        return None
    return request


def _count(text: bytes) -> int:
    if not text.isdigit() or len(text) > 16:
        raise ValueError
    return int(text)


def unsigned_pull(host: str, key: ec.EllipticCurvePublicKey) -> str:
    """A request of the Fleet API over HTTP/1.1 that names a site's key and is not signed.

    The server refuses it in any case: with 403 and nothing more if it does not know the key.

    Args:
        host: the server's name.
        key: the public half of the site's connection key.
    """
    return (
        f"POST /v1/fleet/pull HTTP/1.1\r\nHost: {host}\r\nContent-Length: 0\r\n"
        f"{KEY_HEADER}: {public_key_header(key)}\r\n\r\n"
    )

"""What lies between a site and its server: proxies, mistrusted certificates, clocks that differ.

A site that is connecting and a doctor that looks why it cannot judge by the same rules.
"""

from __future__ import annotations

import base64
import email.utils
import ssl
from datetime import UTC, datetime
from enum import Enum, auto
from urllib.request import getproxies, proxy_bypass

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

REQUEST_SIGNATURE = "secfacmic-signature"
"""Header of a site's signature over :func:`request_message`, base64."""

AHEAD_SECONDS, BEHIND_SECONDS = 5.0, 305.0
"""Flower's limits for a site's clock."""


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
    """The proxy on the way to a server: the one given, else the environment's, unless that excepts the server."""
    if given is not None or proxy_bypass(address):
        return given
    return getproxies().get("https")


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


def request_message(timestamp: str, method: str, path: str) -> bytes:
    """What a site signs of a request besides Flower's bare timestamp, to be checked before its body is read.

    Args:
        timestamp: as in Flower's header.
        method, path: of the request.
    """
    return f"secfacmic request 1\n{timestamp}\n{method}\n{path}".encode()


def unsigned_pull(host: str, key: ec.EllipticCurvePublicKey) -> str:
    """A request of the Fleet API over HTTP/1.1 that names a site's key and is not signed.

    The server refuses it in any case: with 403 and nothing more if it does not know the key.

    Args:
        host: the server's name.
        key: the public half of the site's connection key.
    """
    public = base64.b64encode(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)).decode()
    return (
        f"POST /v1/fleet/pull-messages HTTP/1.1\r\nHost: {host}\r\nContent-Length: 0\r\nflwr-public-key: {public}\r\n"
        "\r\n"
    )

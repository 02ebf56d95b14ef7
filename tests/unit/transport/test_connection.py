"""What a connecting site and a doctor judge alike."""

from __future__ import annotations

import base64
import ssl
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from secure_fed.core.errors import AddressError
from secure_fed.transport.certificates import CA, create_authority
from secure_fed.transport.connection import (
    Mistrust,
    clock_fault,
    mistrust,
    proxy_to,
    seconds_ahead,
    trusting,
    unsigned_pull,
    without_password,
)


def test_the_unsigned_pull_names_the_key_as_flower_reads_it() -> None:
    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    lines = unsigned_pull("fl.example.org", key).split("\r\n")
    assert lines[0] == "POST /v1/fleet/pull HTTP/1.1"
    headers = dict(line.split(": ") for line in lines[1:-2])
    assert headers["Host"] == "fl.example.org"
    assert base64.b64decode(headers[FLEET_HTTP_PUBLIC_KEY_HEADER]) == public_key_to_bytes(key)
    assert lines[-2:] == ["", ""]


def test_a_clock_is_compared_with_the_servers_word() -> None:
    there = datetime.now(UTC) - timedelta(seconds=100)
    ahead = seconds_ahead(format_datetime(there, usegmt=True))
    assert ahead is not None
    assert 100 <= ahead < 102


@pytest.mark.parametrize("date", [None, "", "noon", "Sun, 06 Nov 1994 08:49:37 -0000"])
def test_a_server_that_does_not_tell_the_time(date: str | None) -> None:
    assert seconds_ahead(date) is None


@pytest.mark.parametrize(
    ("ahead", "fault"),
    [(4.0, None), (-304.0, None), (4.1, "4 s ahead of the server's"), (-304.6, "305 s behind the server's")],
)
def test_a_clock_is_refused_where_flower_refuses_it(ahead: float, fault: str | None) -> None:
    assert clock_fault(ahead) == (fault and f"this computer's clock is {fault}")


def test_a_given_proxy_comes_before_the_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_PROXY", "no_proxy", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.example.org:3128")
    assert proxy_to("fl.example.org:8443", None) == "http://proxy.example.org:3128"
    assert proxy_to("fl.example.org:8443", "http://own.example.org:80") == "http://own.example.org:80"
    monkeypatch.setenv("NO_PROXY", "fl.example.org")
    assert proxy_to("fl.example.org:8443", None) is None
    assert proxy_to("fl.example.org:8443", "http://own.example.org:80") == "http://own.example.org:80"


def test_a_proxy_of_the_environment_that_is_none_is_refused_without_its_password(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("NO_PROXY", "no_proxy", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTPS_PROXY", "proxy.example.org:3128")
    assert proxy_to("fl.example.org:8443", None) == "http://proxy.example.org:3128"
    for wrong in ("http://ada:secret@h:abc", "socks5://h:1080", "http://a..b:80", "http://[::1:80", "http://h:99999"):
        monkeypatch.setenv("HTTPS_PROXY", wrong)
        with pytest.raises(AddressError, match="expected an HTTP proxy") as refused:
            proxy_to("fl.example.org:8443", None)
        assert "secret" not in str(refused.value)


@pytest.mark.parametrize("url", ["http://ada:s@cret@proxy.example.org:3128/", "http://proxy.example.org:3128"])
def test_a_proxys_password_is_in_no_message(url: str) -> None:
    assert without_password(url) == "http://proxy.example.org:3128"


@pytest.mark.parametrize(
    ("code", "why"),
    [
        *((62, Mistrust.NAME), (64, Mistrust.NAME), (9, Mistrust.TIME), (10, Mistrust.TIME)),
        *((18, Mistrust.ISSUER), (20, Mistrust.ISSUER)),
    ],
)
def test_what_a_failed_verification_comes_down_to(code: int, why: Mistrust) -> None:
    error = ssl.SSLCertVerificationError()
    error.verify_code = code
    assert mistrust(error) is why


def test_one_authority_is_trusted_whatever_is_written_around_it(tmp_path: Path) -> None:
    create_authority(tmp_path, ["127.0.0.1"])
    context = trusting("Universität, Köln\n".encode() + (tmp_path / CA).read_bytes())
    (trusted,) = context.get_ca_certs()
    assert trusted["subject"] == ((("commonName", "secfacmic study authority"),),)
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.check_hostname
    with pytest.raises(ssl.SSLError):
        trusting(b"nothing")

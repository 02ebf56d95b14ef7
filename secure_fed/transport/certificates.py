"""The study's own certificate authority: sites trust exactly this one, and it certifies exactly the server."""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import os
import ssl
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from secure_fed.core.errors import CertificateError
from secure_fed.core.storage import make_folder, write_durable
from secure_fed.protocol.signing import PRIVATE

CA = "ca.crt"
CA_KEY = "ca.key"
SERVER = "server.crt"
SERVER_KEY = "server.key"

DAYS = 825
"""Validity; longer than a study, shorter than the memory of who holds the key."""

_PEM = serialization.Encoding.PEM


def create_authority(folder: Path, hosts: Sequence[str]) -> None:
    """Make a certificate authority and, under it, the server's certificate.

    Writes ``ca.crt`` (for every site), ``ca.key`` (to be kept offline), ``server.crt`` and ``server.key``.

    Args:
        folder: must not hold an authority yet.
        hosts: names and addresses by which sites reach the server.

    Raises:
        CertificateError: the folder holds one already, or a host is neither a name nor an address.
    """
    if (folder / CA_KEY).exists():
        raise CertificateError(f"{folder}: holds an authority already; keys are never overwritten: choose another")
    if not hosts:
        raise CertificateError("no host; expected the names or addresses by which sites reach the server")
    names = [_alternative(host) for host in hosts]
    make_folder(folder, 0o700)
    os.chmod(folder, 0o700)
    authority = ec.generate_private_key(ec.SECP256R1())
    server = ec.generate_private_key(ec.SECP256R1())
    subject = _name("secfacmic study authority")
    own = x509.SubjectKeyIdentifier.from_public_key(authority.public_key())
    issuer = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(own)
    ca = (
        _builder(subject, subject, authority.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(own, critical=False)
        .sign(authority, hashes.SHA256())
    )
    certificate = (
        _builder(_name("secfacmic server"), subject, server.public_key())
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(server.public_key()), critical=False)
        .add_extension(issuer, critical=False)
        .sign(authority, hashes.SHA256())
    )
    write_durable(folder / CA, ca.public_bytes(_PEM))
    write_durable(folder / SERVER, certificate.public_bytes(_PEM))
    write_durable(folder / SERVER_KEY, _private(server), PRIVATE)
    write_durable(folder / CA_KEY, _private(authority), PRIVATE)  # last: its presence marks the folder as whole


def adopt_certificate(
    folder: Path, hosts: Sequence[str], certificate: Path, key: Path, authority: Path
) -> datetime.datetime:
    """Take a certificate that somebody else has issued, after trying it out as a site would.

    Writes ``ca.crt``, ``server.crt`` and ``server.key``.

    Args:
        folder: must not hold a certificate yet.
        hosts: names and addresses by which sites reach the server; it must be valid for each.
        certificate: PEM, the server's first, then intermediates.
        key: PEM, its private key, without a passphrase.
        authority: PEM, the root that sites will trust alone.

    Returns:
        Until when all of it is valid.

    Raises:
        CertificateError: with everything that is wrong.
    """
    if (folder / SERVER_KEY).exists():
        raise CertificateError(f"{folder}: holds a certificate already; keys are never overwritten: choose another")
    read_authority(authority)
    try:
        context = server_context(certificate, key)
        own = certificates(certificate.read_bytes())
    except (OSError, ssl.SSLError, ValueError) as error:
        reason = error.strerror if isinstance(error, FileNotFoundError) else "not a certificate and its key"
        raise CertificateError(
            f"{certificate}, {key}: cannot be used ({reason}); expected PEM files of one pair, the key without a "
            "passphrase"
        ) from error
    faults = [f"{host}: {fault}" for host in hosts if (fault := _fault(context, authority, host)) is not None]
    if not hosts:
        faults.append("no host; expected the names or addresses by which sites reach the server")
    if faults:
        raise CertificateError(
            f"{certificate}: sites would refuse it; expected one that {authority} has issued for these hosts:\n  "
            + "\n  ".join(faults)
        )
    make_folder(folder, 0o700)
    os.chmod(folder, 0o700)
    write_durable(folder / CA, authority.read_bytes())
    write_durable(folder / SERVER, certificate.read_bytes())
    write_durable(folder / SERVER_KEY, key.read_bytes(), PRIVATE)
    return min(entry.not_valid_after_utc for entry in [*own, *certificates(authority.read_bytes())])


def certificates(pem: bytes) -> list[x509.Certificate]:
    """The certificates in a PEM file, in order.

    Raises:
        ValueError: there is none.
    """
    return x509.load_pem_x509_certificates(pem)


def names_of(certificate: x509.Certificate) -> list[str]:
    """The names and addresses that a certificate is for; for messages, so one is always there."""
    try:
        extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return ["no name"]
    return [*extension.get_values_for_type(x509.DNSName), *map(str, extension.get_values_for_type(x509.IPAddress))]


def server_context(certificate: Path, key: Path) -> ssl.SSLContext:
    """The TLS settings of the server.

    Raises:
        OSError, ssl.SSLError: the files cannot be used.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(certificate, key, password=_no_passphrase)
    return context


def _no_passphrase() -> str:
    return ""  # the key cannot be used then; OpenSSL would ask at the terminal


def _fault(context: ssl.SSLContext, authority: Path, host: str) -> str | None:
    """Why a site that trusts only this authority would refuse the certificate: by a handshake, in memory."""
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    trust = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    trust.load_verify_locations(cafile=authority)
    try:
        ends = (
            trust.wrap_bio(back, there, server_hostname=host),
            context.wrap_bio(there, back, server_side=True),
        )
        for _ in range(4):
            for end in ends:
                with contextlib.suppress(ssl.SSLWantReadError):
                    end.do_handshake()
    except ssl.SSLCertVerificationError as error:
        return error.verify_message
    except (ssl.SSLError, ValueError) as error:
        return str(error)
    return None


def read_authority(path: Path) -> bytes:
    """The authority's certificate, which a site trusts alone.

    Raises:
        CertificateError: missing or not a certificate.
    """
    try:
        data = path.read_bytes()
        x509.load_pem_x509_certificate(data)
    except OSError as error:
        raise CertificateError(
            f"{path}: cannot be read ({error.strerror}); expected the study's {CA}: ask the coordinator for it"
        ) from error
    except ValueError as error:
        raise CertificateError(f"{path}: not a certificate; expected the study's {CA}") from error
    return data


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    if not host.isascii() or not host.replace("-", "").replace(".", "").isalnum():
        raise CertificateError(f"host {host!r}: neither a name nor an address; expected fl.example.org or 192.0.2.7")
    return x509.DNSName(host)


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _builder(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
    # From an hour ago: the sites' clocks may be behind.
    start = datetime.datetime.now(datetime.UTC) - datetime.timedelta(hours=1)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(start + datetime.timedelta(days=DAYS))
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _private(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(_PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())

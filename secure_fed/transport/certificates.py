"""The study's own certificate authority: sites trust exactly this one, and it certifies exactly the server."""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import os
import re
import ssl
from collections.abc import Sequence
from pathlib import Path
from shlex import quote

from cryptography import x509
from cryptography.exceptions import InvalidSignature
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
"""Validity of the server's certificate, which is renewed (:func:`renew_certificate`)."""

AUTHORITY_DAYS = 3650
"""Validity of the authority: sites trust it for as long as a study may last, since replacing it is an amendment."""

SOON_DAYS = 30
"""A certificate that ends sooner is told of: it would end in the middle of a study."""

_FILES = (CA, CA_KEY, SERVER, SERVER_KEY)
_PEM = serialization.Encoding.PEM

_LABEL = "[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_HOST = re.compile(rf"(?=.{{1,253}}\Z)(?:{_LABEL}\.)*(?![0-9]+\Z){_LABEL}")
"""A name that sites can look up; what ends in a number is a wrong address. A renewal keeps every name there is, so that
none may come in by which nobody can connect."""


def create_authority(folder: Path, hosts: Sequence[str]) -> None:
    """Make a certificate authority and, under it, the server's certificate.

    Writes ``ca.crt`` (for every site), ``ca.key`` (to be kept offline), ``server.crt`` and ``server.key``.

    Args:
        folder: must not hold any of these yet.
        hosts: names and addresses by which sites reach the server.

    Raises:
        CertificateError: the folder holds one already, or a host is neither a name nor an address.
    """
    _refuse_held(folder)
    names = _alternatives(hosts)
    make_folder(folder, 0o700)
    os.chmod(folder, 0o700)
    authority = ec.generate_private_key(ec.SECP256R1())
    subject = _name("secfacmic study authority")
    ca = (
        _builder(subject, subject, authority.public_key(), _from_now(AUTHORITY_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(authority.public_key()), critical=False)
        .sign(authority, hashes.SHA256())
    )
    write_durable(folder / CA, ca.public_bytes(_PEM))
    _replace(folder, *_issue(ca, authority, names))
    write_durable(folder / CA_KEY, _private(authority), PRIVATE)


def adopt_certificate(
    folder: Path, hosts: Sequence[str], certificate: Path, key: Path, authority: Path
) -> datetime.datetime:
    """Take a certificate that somebody else has issued, after trying it out as a site would.

    Writes ``ca.crt``, ``server.crt`` and ``server.key``.

    Args:
        folder: must not hold a certificate or an authority yet.
        hosts: names and addresses by which sites reach the server; it must be valid for each.
        certificate: PEM, the server's first, then intermediates.
        key: PEM, its private key, without a passphrase.
        authority: PEM, the root that sites will trust alone.

    Returns:
        Until when all of it is valid.

    Raises:
        CertificateError: with everything that is wrong.
    """
    _refuse_held(folder)
    trusted = read_authority(authority)
    if not hosts:
        raise CertificateError("no host; expected the names or addresses by which sites reach the server")
    _try_out(certificate, key, authority, hosts)
    make_folder(folder, 0o700)
    os.chmod(folder, 0o700)
    write_durable(folder / CA, trusted)
    _replace(folder, certificate.read_bytes(), key.read_bytes())
    return valid_until(folder)


def renew_certificate(folder: Path, hosts: Sequence[str], authority_key: Path | None = None) -> datetime.datetime:
    """Issue the server's certificate anew, with a new key, under the study's own authority, which stays as it is.

    Args:
        folder: holds ``ca.crt`` and ``server.crt``.
        hosts: more names and addresses; those of the certificate so far are kept, if it can be read.
        authority_key: the authority's key, if it is not in the folder any more.

    Returns:
        Until when certificate and authority are valid.

    Raises:
        CertificateError: nothing is there to renew, the key is not the authority's, or the authority's time is over.
    """
    ca = _own_authority(folder)
    path = authority_key or folder / CA_KEY
    try:
        authority = serialization.load_pem_private_key(path.read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a private key without a passphrase"
        raise CertificateError(
            f"{path}: {reason}; expected the authority's key, which was taken offline after study ca: bring it for "
            f"the moment and name it with --ca-key. A hospital's own authority issues the certificate itself: give "
            "that with --cert and --key"
        ) from None
    if not isinstance(authority, ec.EllipticCurvePrivateKey) or authority.public_key() != ca.public_key():
        raise CertificateError(
            f"{path}: not the key of {folder / CA}; expected the one that study ca made with it: sites trust no other"
        )
    _replace(folder, *_issue(ca, authority, _alternatives(_names(folder, hosts))))
    return valid_until(folder)


def renew_adopted(folder: Path, hosts: Sequence[str], certificate: Path, key: Path) -> datetime.datetime:
    """Take a new certificate of the authority that sites trust already, after trying it out as a site would.

    Args:
        folder: holds ``ca.crt`` and ``server.crt``.
        hosts: names and addresses that it must be valid for besides those of the certificate so far.
        certificate: PEM, the server's first, then intermediates.
        key: PEM, its private key, without a passphrase.

    Returns:
        Until when certificate and authority are valid.

    Raises:
        CertificateError: nothing is there to renew, or sites would refuse it.
    """
    _own_authority(folder)
    _try_out(certificate, key, folder / CA, _names(folder, hosts))
    _replace(folder, certificate.read_bytes(), key.read_bytes())
    return valid_until(folder)


def _names(folder: Path, hosts: Sequence[str]) -> list[str]:
    """Those of the certificate so far, and more; these alone where that one was lost or damaged."""
    try:
        known = names_held(folder)
    except CertificateError:
        if not hosts:
            raise
        known = []
    return [*known, *(host for host in hosts if host not in known)]


def names_held(folder: Path) -> list[str]:
    """The names and addresses of the server's certificate.

    Raises:
        CertificateError: there is none.
    """
    try:
        return names_of(certificates((folder / SERVER).read_bytes())[0])
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a certificate"
        raise CertificateError(
            f"{folder / SERVER}: {reason}; expected the certificate that is to be renewed: for a first one leave out "
            "--renew; where it was lost, give the names with --host"
        ) from None


def valid_until(folder: Path) -> datetime.datetime:
    """Until when the server's certificate and what is above it are valid.

    Raises:
        OSError, ValueError: a file is missing or holds none.
    """
    chain = [*certificates((folder / SERVER).read_bytes()), *certificates((folder / CA).read_bytes())]
    return min(one.not_valid_after_utc for one in chain)


class ServerCertificate:
    """The server's certificate as it lies in a folder: used from there on the next connection when it was renewed.

    Args:
        folder: of ``ca.crt``, ``server.crt`` and ``server.key``.

    Attributes:
        context: TLS for the next connection.
        until: when its time is over.

    Raises:
        CertificateError: it cannot be used, or its time is over.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._seen = self._stamp()
        self.context, self.until = self._load()
        self._authority = certificates(read_authority(folder / CA))

    def look(self) -> bool:
        """Take what lies in the folder now, if it changed.

        Returns:
            Whether a new one was taken.

        Raises:
            CertificateError: it changed, and cannot be used, or the authority did, whom sites trust alone; the one so
                far stays.
        """
        stamp = self._stamp()
        if stamp == self._seen:
            return False
        self._seen = stamp
        if certificates(read_authority(self._folder / CA)) != self._authority:
            raise CertificateError(
                f"{self._folder / CA}: another authority than this server was started with, which sites trust alone; "
                "expected a certificate that it has issued: put its ca.crt back and use study ca --renew; another "
                "authority is an amendment (secfacmic keys rotate --authority, then study amend), after which the "
                "server is started again"
            )
        self.context, self.until = self._load()
        return True

    @property
    def days(self) -> int:
        """For how many whole days it is valid yet; negative when its time is over."""
        return (self.until - datetime.datetime.now(datetime.UTC)).days

    def _stamp(self) -> list[tuple[int, int]]:
        found = []
        for name in (SERVER, SERVER_KEY, CA):
            with contextlib.suppress(OSError):
                status = (self._folder / name).stat()
                found.append((status.st_mtime_ns, status.st_ino))
        return found

    def _load(self) -> tuple[ssl.SSLContext, datetime.datetime]:
        folder = self._folder
        try:
            context = server_context(folder / SERVER, folder / SERVER_KEY)
            until = valid_until(folder)
        except (OSError, ssl.SSLError, ValueError) as error:
            reason = error.strerror if isinstance(error, FileNotFoundError) else "not a certificate and its key"
            raise CertificateError(
                f"{folder}: {SERVER} and {SERVER_KEY} cannot be used ({reason}); make them with: "
                f"secfacmic study ca{' --renew' if (folder / CA).exists() else ''} --host NAME "
                f"--out {quote(str(folder))}"
            ) from error
        for host in names_held(folder):
            fault = None if host.startswith("*") else _fault(context, folder / CA, host)
            if fault is not None:
                raise CertificateError(
                    f"{folder / SERVER}: sites would refuse it for {host} ({fault}), valid until {until:%Y-%m-%d}; "
                    f"renew it with: secfacmic study ca --renew --out {quote(str(folder))}"
                )
        return context, until


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


def read_authority(path: Path, fingerprint: str | None = None) -> bytes:
    """The certificate of the study's authority, which a site trusts alone; PEM.

    A file may hold more: the authority so far and the one that an amendment brings.

    Args:
        path: of the file.
        fingerprint: of the one that an amendment in force names: that one alone. Without one, all of the file.

    Raises:
        CertificateError: missing or not a certificate, or none with that fingerprint.
    """
    try:
        data = path.read_bytes()
        held = certificates(data)
    except OSError as error:
        raise CertificateError(
            f"{path}: cannot be read ({error.strerror}); expected the study's {CA}: ask the coordinator for it"
        ) from error
    except ValueError as error:
        raise CertificateError(f"{path}: not a certificate; expected the study's {CA}") from error
    if fingerprint is None:
        return data
    for one in held:
        if fingerprint_of(one) == fingerprint:
            return one.public_bytes(_PEM)
    raise CertificateError(
        f"{path}: the certificate of authority {', '.join(map(fingerprint_of, held))}; expected that of {fingerprint}, "
        f"which an amendment of the study names: ask the coordinator for the new {CA}, compare this fingerprint by "
        "phone, and append it to the file"
    )


def fingerprint_of(certificate: x509.Certificate) -> str:
    """SHA-256 of a certificate (DER), 64 hex digits: what ``openssl x509 -fingerprint -sha256`` shows."""
    return certificate.fingerprint(hashes.SHA256()).hex()


def root_fingerprint(path: Path) -> str:
    """Fingerprint of the authority that an amendment is to name.

    Raises:
        CertificateError: the file holds another than one certificate, or one that is no root, or not valid now. Sites
            would trust it alone, and nobody could connect.
    """
    held = certificates(read_authority(path))
    if len(held) != 1:
        raise CertificateError(f"{path}: {len(held)} certificates; expected the new authority's alone")
    (found,) = held
    try:
        root = found.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        found.verify_directly_issued_by(found)
    except (x509.ExtensionNotFound, ValueError, TypeError, InvalidSignature):
        root = False
    if not root:
        raise CertificateError(
            f"{path}: not the certificate of a root authority, signed by itself; expected the {CA} of study ca, or the "
            "root of the hospital's own authority"
        )
    begins, ends = found.not_valid_before_utc, found.not_valid_after_utc
    if not begins <= datetime.datetime.now(datetime.UTC) < ends:
        raise CertificateError(
            f"{path}: valid from {begins:%Y-%m-%d} to {ends:%Y-%m-%d}; expected one that is valid now: make another "
            "authority (secfacmic study ca), or look at this computer's clock"
        )
    return fingerprint_of(found)


def _refuse_held(folder: Path) -> None:
    # A link counts though nothing is behind it now: to a stick with keys, say, that is not plugged in.
    held = [name for name in _FILES if os.path.lexists(folder / name)]
    if held:
        raise CertificateError(
            f"{folder}: holds {', '.join(held)} already; keys and certificates are never overwritten: issue the "
            "server's certificate anew with --renew, or choose another folder"
        )


def _own_authority(folder: Path) -> x509.Certificate:
    """The authority that sites trust, for whose certificates there is time yet."""
    found = certificates(read_authority(folder / CA))[0]
    if found.not_valid_after_utc <= datetime.datetime.now(datetime.UTC):
        raise CertificateError(
            f"{folder / CA}: the authority's time was over on {found.not_valid_after_utc:%Y-%m-%d}; nothing under it "
            "convinces a site: make another authority in another folder; it is an amendment once a run has begun "
            "(secfacmic keys rotate --authority)"
        )
    return found


def _try_out(certificate: Path, key: Path, authority: Path, hosts: Sequence[str]) -> None:
    try:
        context = server_context(certificate, key)
        certificates(certificate.read_bytes())
    except (OSError, ssl.SSLError, ValueError) as error:
        reason = error.strerror if isinstance(error, FileNotFoundError) else "not a certificate and its key"
        raise CertificateError(
            f"{certificate}, {key}: cannot be used ({reason}); expected PEM files of one pair, the key without a "
            "passphrase"
        ) from error
    faults = [f"{host}: {fault}" for host in hosts if (fault := _fault(context, authority, host)) is not None]
    if faults:
        raise CertificateError(
            f"{certificate}: sites would refuse it; expected one that {authority} has issued for these hosts:\n  "
            + "\n  ".join(faults)
        )


def _issue(
    ca: x509.Certificate, authority: ec.EllipticCurvePrivateKey, names: list[x509.GeneralName]
) -> tuple[bytes, bytes]:
    """A new certificate of the server and its key, PEM."""
    server = ec.generate_private_key(ec.SECP256R1())
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key())
    # Nothing under an authority is valid for longer than it.
    until = min(_from_now(DAYS), ca.not_valid_after_utc)
    certificate = (
        _builder(_name("secfacmic server"), ca.subject, server.public_key(), until)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(server.public_key()), critical=False)
        .add_extension(issuer, critical=False)
        .sign(authority, hashes.SHA256())
    )
    return certificate.public_bytes(_PEM), _private(server)


def _replace(folder: Path, certificate: bytes, key: bytes) -> None:
    """Put a pair in place of another. Cut off between the two, a running server keeps the old pair, and the same
    renewal, which needs none of the old key, ends it."""
    write_durable(folder / SERVER_KEY, key, PRIVATE)
    write_durable(folder / SERVER, certificate)


def _alternatives(hosts: Sequence[str]) -> list[x509.GeneralName]:
    if not hosts:
        raise CertificateError("no host; expected the names or addresses by which sites reach the server")
    return [_alternative(host) for host in hosts]


def _alternative(host: str) -> x509.GeneralName:
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(host)
        if not address.is_unspecified:  # where a server listens, and nobody connects to
            return x509.IPAddress(address)
    if not _HOST.fullmatch(host):
        raise CertificateError(f"host {host!r}: neither a name nor an address; expected fl.example.org or 192.0.2.7")
    return x509.DNSName(host)


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _from_now(days: int) -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC).replace(microsecond=0) + datetime.timedelta(days=days)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, until: datetime.datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        # From an hour ago: the sites' clocks may be behind.
        .not_valid_before(_from_now(0) - datetime.timedelta(hours=1))
        .not_valid_after(until)
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

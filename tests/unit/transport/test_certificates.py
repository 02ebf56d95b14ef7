"""Certificates: never overwritten, renewed under the same authority, taken by a server that runs."""

from __future__ import annotations

import datetime
import hashlib
import ssl
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from typer.testing import CliRunner

from secure_fed.cli import app
from secure_fed.core.errors import CertificateError, KeyFileError
from secure_fed.protocol.signing import create_signing_key
from secure_fed.transport.certificates import (
    CA,
    CA_KEY,
    SERVER,
    SERVER_KEY,
    ServerCertificate,
    _fault,
    adopt_certificate,
    create_authority,
    names_held,
    read_authority,
    renew_adopted,
    renew_certificate,
    root_fingerprint,
    server_context,
)

FILES = (CA, CA_KEY, SERVER, SERVER_KEY)


@pytest.fixture
def tls(tmp_path: Path) -> Path:
    create_authority(tmp_path / "tls", ["127.0.0.1", "fl.example.org"])
    return tmp_path / "tls"


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def issue(authority: Path, into: Path, hosts: list[str], days: int = 100) -> tuple[Path, Path]:
    """What an authority of a hospital issues: a certificate and its key."""
    ca = x509.load_pem_x509_certificate((authority / CA).read_bytes())
    signer = load_pem_private_key((authority / CA_KEY).read_bytes(), None)
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([]))
        .issuer_name(ca.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=400))
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(host) for host in hosts]), critical=True)
        .sign(signer, hashes.SHA256())  # type: ignore[arg-type]
    )
    into.mkdir(exist_ok=True)
    (into / "new.crt").write_bytes(made.public_bytes(Encoding.PEM))
    (into / "new.key").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return into / "new.crt", into / "new.key"


@pytest.mark.parametrize("held", FILES)
def test_no_certificate_is_made_where_one_of_the_four_files_lies(tls: Path, held: str, tmp_path: Path) -> None:
    for name in FILES:
        if name != held:
            (tls / name).unlink()
    before = content(tls)
    with pytest.raises(CertificateError, match=f"holds {held} already.*never overwritten"):
        create_authority(tls, ["127.0.0.1"])
    create_authority(tmp_path / "hospital", ["fl.example.org"])
    certificate, key = issue(tmp_path / "hospital", tmp_path / "issued", ["fl.example.org"])
    with pytest.raises(CertificateError, match="never overwritten"):
        adopt_certificate(tls, ["fl.example.org"], certificate, key, tmp_path / "hospital" / CA)
    assert content(tls) == before


@pytest.mark.parametrize("held", FILES)
def test_a_link_to_where_nothing_is_now_is_not_overwritten(held: str, tmp_path: Path) -> None:
    (tmp_path / held).symlink_to(tmp_path / "stick" / held)  # not plugged in
    with pytest.raises(CertificateError, match=f"holds {held} already"):
        create_authority(tmp_path, ["127.0.0.1"])
    assert [path.name for path in tmp_path.iterdir()] == [held]
    with pytest.raises(KeyFileError, match="never overwritten"):
        create_signing_key(tmp_path / held)


def test_a_running_server_takes_no_other_authority(tls: Path, tmp_path: Path) -> None:
    """Each file goes with the others, and no site would connect any more."""
    server = ServerCertificate(tls)
    before, own = server.context, content(tls)
    create_authority(tmp_path / "new", ["127.0.0.1", "fl.example.org"])
    for name in FILES:
        (tls / name).write_bytes((tmp_path / "new" / name).read_bytes())
    with pytest.raises(CertificateError, match=r"another authority.*sites trust alone"):
        server.look()
    assert server.context is before
    ServerCertificate(tls)  # as it begins
    (tls / CA).write_bytes(b"# in words\n" + own[CA])
    for name in (SERVER, SERVER_KEY):
        (tls / name).write_bytes(own[name])
    assert server.look()


def test_a_renewal_keeps_authority_and_names_and_adds_some(tls: Path, tmp_path: Path) -> None:
    before = content(tls)
    (tls / CA_KEY).rename(tmp_path / "stick.key")  # as the page says
    until = renew_certificate(tls, ["::1", "127.0.0.1"], tmp_path / "stick.key")
    after = content(tls)
    assert after[CA] == before[CA]
    assert after[SERVER] != before[SERVER]
    assert after[SERVER_KEY] != before[SERVER_KEY]
    assert (tls / SERVER_KEY).stat().st_mode & 0o077 == 0
    assert sorted(names_held(tls)) == ["127.0.0.1", "::1", "fl.example.org"]
    assert ServerCertificate(tls).until == until  # sites that trust the authority take it, for each name


def test_a_renewal_needs_the_authoritys_own_key(tls: Path, tmp_path: Path) -> None:
    create_authority(tmp_path / "other", ["127.0.0.1"])
    before = content(tls)
    with pytest.raises(CertificateError, match="not the key of"):
        renew_certificate(tls, [], tmp_path / "other" / CA_KEY)
    with pytest.raises(CertificateError, match="neither a name nor an address"):
        renew_certificate(tls, ["a b"])
    assert content(tls) == before
    (tls / CA_KEY).unlink()
    with pytest.raises(CertificateError, match="--ca-key"):
        renew_certificate(tls, [])
    with pytest.raises(CertificateError, match="leave out --renew"):
        names_held(tmp_path)


@pytest.mark.parametrize(
    "host", ["fl..example.org", "fl.example.org.", "fl-", "192.0.2.300", "0.0.0.0", "::", "x" * 64, "x." * 130 + "y"]
)
def test_a_name_that_no_site_can_connect_by_is_not_taken(tls: Path, host: str) -> None:
    """It would stay: a renewal keeps all names, and a server that sites would refuse by one of them does not start."""
    before = content(tls)
    with pytest.raises(CertificateError, match="neither a name nor an address"):
        renew_certificate(tls, [host])
    assert content(tls) == before


def test_a_hospitals_new_certificate_is_taken_if_sites_would_take_it(tls: Path, tmp_path: Path) -> None:
    create_authority(tmp_path / "hospital", ["fl.example.org"])
    hospital, mine = tmp_path / "hospital", tmp_path / "mine"
    first = issue(hospital, tmp_path / "first", ["fl.example.org"])
    adopt_certificate(mine, ["fl.example.org"], *first, hospital / CA)
    before = content(mine)
    with pytest.raises(CertificateError, match=r"fl2\.example\.org"):
        renew_adopted(mine, ["fl2.example.org"], *issue(hospital, tmp_path / "one", ["fl.example.org"]))
    with pytest.raises(CertificateError, match=r"fl\.example\.org"):
        renew_adopted(mine, [], *issue(hospital, tmp_path / "name", ["another.example.org"]))
    with pytest.raises(CertificateError, match="sites would refuse it"):
        renew_adopted(mine, [], *issue(tls, tmp_path / "authority", ["fl.example.org"]))
    with pytest.raises(CertificateError, match="expired"):
        renew_adopted(mine, [], *issue(hospital, tmp_path / "old", ["fl.example.org"], days=-1))
    assert content(mine) == before
    renew_adopted(mine, [], *issue(hospital, tmp_path / "two", ["fl.example.org", "fl2.example.org"], days=50))
    assert ServerCertificate(mine).days == 49
    assert content(mine)[CA] == before[CA]


def test_a_renewal_that_was_cut_off_is_ended_by_the_same_command(tls: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from secure_fed.transport import certificates

    held = ServerCertificate(tls)
    write = certificates.write_durable

    def cut(path: Path, *arguments: object) -> None:
        if path.name == SERVER:
            raise KeyboardInterrupt
        write(path, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(certificates, "write_durable", cut)
    with pytest.raises(KeyboardInterrupt):
        renew_certificate(tls, [])
    monkeypatch.setattr(certificates, "write_durable", write)
    context = held.context
    with pytest.raises(CertificateError, match="not a certificate and its key"):
        held.look()
    assert held.context is context  # a running server goes on
    renew_certificate(tls, [])
    assert held.look()
    assert held.context is not context
    assert not held.look()


def test_an_expired_certificate_and_one_that_sites_would_refuse_serve_nobody(tls: Path, tmp_path: Path) -> None:
    held = ServerCertificate(tls)
    certificate, key = issue(tls, tmp_path / "new", ["fl.example.org"], days=-3)
    (tls / SERVER).write_bytes(certificate.read_bytes())
    (tls / SERVER_KEY).write_bytes(key.read_bytes())
    with pytest.raises(CertificateError, match=r"expired.*--renew"):
        ServerCertificate(tls)
    with pytest.raises(CertificateError, match="expired"):
        held.look()
    renew_certificate(tls, [])
    create_authority(tmp_path / "other", ["fl.example.org"])
    (tls / CA).write_bytes((tmp_path / "other" / CA).read_bytes())
    with pytest.raises(CertificateError, match="sites would refuse it"):
        ServerCertificate(tls)


@pytest.mark.parametrize("left", [None, b"", b"no certificate"])
def test_a_certificate_that_was_lost_or_damaged_is_issued_anew_for_the_names_that_are_given(
    tls: Path, tmp_path: Path, left: bytes | None
) -> None:
    """By nothing else: where an authority is, no other is made, and without a name nobody could connect."""
    (tls / SERVER).unlink() if left is None else (tls / SERVER).write_bytes(left)
    with pytest.raises(CertificateError, match="ca --renew --host NAME"):
        ServerCertificate(tls)
    with pytest.raises(CertificateError, match="give the names with --host"):
        renew_certificate(tls, [])
    authority = (tls / CA).read_bytes()
    new = issue(tls, tmp_path / "new", ["fl.example.org"])
    renew_adopted(tls, ["fl.example.org"], *new)
    assert names_held(tls) == ["fl.example.org"]
    (tls / SERVER).write_bytes(b"")
    renew_certificate(tls, ["192.0.2.7"])
    assert names_held(tls) == ["192.0.2.7"]
    assert ServerCertificate(tls).days > 800
    assert (tls / CA).read_bytes() == authority


def test_nothing_outlives_its_authority(tls: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from secure_fed.transport import certificates

    monkeypatch.setattr(certificates, "DAYS", 10_000)
    until = renew_certificate(tls, [])
    assert until == x509.load_pem_x509_certificate((tls / CA).read_bytes()).not_valid_after_utc


def test_the_command_renews_and_refuses_what_does_not_go_together(tls: Path) -> None:
    run = CliRunner()
    done = run.invoke(app, ["study", "ca", "--renew", "--host", "fl3.example.org", "--out", str(tls)])
    assert done.exit_code == 0, done.output
    assert "fl3.example.org" in done.output
    for wrong in (["--renew", "--cert", "x"], ["--renew", "--authority", "x"], ["--ca-key", "x", "--host", "h"]):
        assert run.invoke(app, ["study", "ca", "--out", str(tls), *wrong]).exit_code == 2
    again = run.invoke(app, ["study", "ca", "--host", "fl.example.org", "--out", str(tls)])
    assert isinstance(again.exception, CertificateError)


# --- another authority, by an amendment ---


@pytest.fixture
def new(tmp_path: Path) -> Path:
    create_authority(tmp_path / "new", ["127.0.0.1", "fl.example.org"])
    return tmp_path / "new"


def both(tls: Path, new: Path, into: Path) -> Path:
    """What a site has while an amendment changes the authority."""
    into.write_bytes((tls / CA).read_bytes() + (new / CA).read_bytes())
    return into


def convinces(server: Path, trusted: bytes, into: Path) -> bool:
    """Whether a server's certificate convinces who trusts this."""
    into.write_bytes(trusted)
    return _fault(server_context(server / SERVER, server / SERVER_KEY), into, "fl.example.org") is None


def test_a_stolen_key_of_the_authority_before_convinces_no_site_that_has_the_amendment(
    tls: Path, new: Path, tmp_path: Path
) -> None:
    file, fingerprint = both(tls, new, tmp_path / "both.crt"), root_fingerprint(new / CA)
    before, after = read_authority(file), read_authority(file, fingerprint)
    forged = tmp_path / "forged"
    forged.mkdir()
    for name in (CA, CA_KEY):
        (forged / name).write_bytes((tls / name).read_bytes())
    certificate, key = issue(forged, tmp_path / "issued", ["fl.example.org"])
    certificate.rename(forged / SERVER)
    key.rename(forged / SERVER_KEY)
    for server, then in ((tls, False), (forged, False), (new, True)):
        assert convinces(server, before, tmp_path / "trusted")  # a site that was away meanwhile comes back to both
        assert convinces(server, after, tmp_path / "trusted") == then


def test_a_file_without_the_amendments_authority_is_told_with_both_fingerprints(tls: Path, new: Path) -> None:
    held, wanted = root_fingerprint(tls / CA), root_fingerprint(new / CA)
    with pytest.raises(CertificateError, match=rf"{held}; expected that of {wanted}.*append it"):
        read_authority(tls / CA, wanted)


def test_an_amendment_names_one_root_that_is_valid_now(tls: Path, new: Path, tmp_path: Path) -> None:
    """Else nobody could connect once it is in force."""
    assert root_fingerprint(new / CA) == hashlib.sha256(ssl.PEM_cert_to_DER_cert((new / CA).read_text())).hexdigest()
    with pytest.raises(CertificateError, match=r"2 certificates; expected .* alone"):
        root_fingerprint(both(tls, new, tmp_path / "both.crt"))
    with pytest.raises(CertificateError, match="not the certificate of a root authority"):
        root_fingerprint(new / SERVER)
    certificate, _ = issue(new, tmp_path / "issued", ["fl.example.org"])  # without a word on what it is for
    with pytest.raises(CertificateError, match="not the certificate of a root authority"):
        root_fingerprint(certificate)
    now = datetime.datetime.now(datetime.UTC)
    signer = load_pem_private_key((new / CA_KEY).read_bytes(), None)
    for begins, ends, above, fault in (
        (-9, -1, None, "expected one that is valid now"),
        (1, 9, None, "expected one that is valid now"),
        (-1, 9, signer, "not the certificate of a root authority"),  # an intermediate one
    ):
        key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([])
        made = (
            x509.CertificateBuilder(name, name, key.public_key(), 1)
            .not_valid_before(now + datetime.timedelta(days=begins))
            .not_valid_after(now + datetime.timedelta(days=ends))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .sign(above or key, hashes.SHA256())  # type: ignore[arg-type]
        )
        (tmp_path / "root.crt").write_bytes(made.public_bytes(Encoding.PEM))
        with pytest.raises(CertificateError, match=fault):
            root_fingerprint(tmp_path / "root.crt")

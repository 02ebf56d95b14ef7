"""Identities and the sealed key: who can open it, and what is refused."""

from __future__ import annotations

import base64
import os
import shutil
import stat
from pathlib import Path

import pyrage
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from secure_fed.core.errors import KeyFileError, OutputError
from secure_fed.privacy import keys
from secure_fed.privacy.ckks import StudySecret
from secure_fed.protocol.sealed_key import KEY_MAGIC, MAX_KEY_HEADER, SealedKeyHeader, check_sealed_key
from secure_fed.protocol.signing import load_signing_key, parse_header, payload_fields, sign_frame, split_frame
from tests.conftest import Federation


def _identity(federation: Federation, name: str) -> keys.Identity:
    return keys.load_identity(federation.folder / "sites" / name / "identity", name)


@pytest.mark.parametrize("name", ["North Hospital", "North", "klinikum-süd", "../north", "", "-n", "n" * 41, "a\n"])
def test_a_name_that_no_site_can_have_is_refused_before_anything_is_made(name: str, tmp_path: Path) -> None:
    """Keys that lay there would stand in the way of the right name."""
    with pytest.raises(KeyFileError, match=r"expected up to 40 small letters a to z, digits, - and _, as in north-2"):
        keys.create_identity(tmp_path / "id", name)
    assert not (tmp_path / "id").exists()
    keys.create_identity(tmp_path / "id", "north-2")


def test_private_files_are_0600_in_a_0700_folder_and_loose_ones_are_refused(tmp_path: Path) -> None:
    keys.create_identity(tmp_path / "id", "ash")
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "id").iterdir()}
    assert modes == {"signing.key": 0o600, "flower.key": 0o600, "recipient.key": 0o600, "ash.pub": 0o600}
    assert stat.S_IMODE((tmp_path / "id").stat().st_mode) == 0o700
    for name in ("signing.key", "flower.key", "recipient.key"):
        path = tmp_path / "id" / name
        os.chmod(path, 0o640)
        with pytest.raises(KeyFileError, match=r"mode 0640.*chmod 600"):
            keys.load_identity(tmp_path / "id", "ash")
        os.chmod(path, 0o600)


SLOWLY_LOCKED = pytest.param("correct horse", marks=pytest.mark.slow)
"""A passphrase costs a second a key, which is meant."""


@pytest.mark.parametrize("passphrase", ["", SLOWLY_LOCKED])
def test_what_is_left_of_an_identity_is_not_made_anew(passphrase: str, tmp_path: Path) -> None:
    """With its recipient key what was sealed to it can still be opened."""
    folder = tmp_path / "id"
    keys.create_identity(folder, "ash", passphrase)
    (folder / "signing.key").unlink()
    left = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(KeyFileError, match=r"holds ash\.pub and no signing\.key"):
        keys.create_identity(folder, "ash", passphrase)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == left
    (folder / "ash.pub").unlink()  # as a call leaves it that was killed before the last key
    keys.create_identity(folder, "ash", passphrase)


@pytest.mark.parametrize("passphrase", ["", SLOWLY_LOCKED])
def test_keys_are_kept_and_their_public_file_is_made_if_it_is_missing(passphrase: str, tmp_path: Path) -> None:
    """As after a call that was killed before it, which told nobody what to send to the coordinator."""
    folder = tmp_path / "id"
    made = keys.create_identity(folder, "ash", passphrase)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for missing in (False, True):
        if missing:
            (folder / "ash.pub").unlink()
        assert keys.create_identity(folder, "ash", passphrase).keys == made.keys
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_keys_of_another_site_or_with_another_lock_are_no_ones_to_go_on_with(tmp_path: Path) -> None:
    folder = tmp_path / "id"
    keys.create_identity(folder, "ash")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(KeyFileError, match=r"holds the keys of site ash.*never overwritten.*expected those of birch"):
        keys.create_identity(folder, "birch")
    with pytest.raises(KeyFileError, match=r"holds keys without a passphrase.*never overwritten"):
        keys.create_identity(folder, "ash", "correct horse")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    keys.create_identity(tmp_path / "other", "ash")
    shutil.copyfile(tmp_path / "other/ash.pub", folder / "ash.pub")
    with pytest.raises(KeyFileError, match=r"ash\.pub: is not of the keys beside it"):
        keys.create_identity(folder, "ash")
    keys.create_identity(tmp_path / "locked", "ash", "correct horse")
    with pytest.raises(KeyFileError, match="the passphrase is wrong"):
        keys.create_identity(tmp_path / "locked", "ash", "wrong")


@pytest.mark.parametrize("name", ["flower.key", "recipient.key"])
def test_a_file_of_a_keys_name_that_is_none_stays(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(OutputError, match="this command did not write it"):
        keys.create_identity(tmp_path, "ash")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_the_public_file_holds_no_private_key_and_is_its_owners(tmp_path: Path) -> None:
    identity = keys.create_identity(tmp_path / "id", "ash")
    path = tmp_path / "id" / "ash.pub"
    text = path.read_text()
    for name in ("signing.key", "recipient.key"):
        body = [line for line in (tmp_path / "id" / name).read_text().splitlines() if not line.startswith("-")]
        assert not any(line in text for line in body)
    secret = identity.flower.private_numbers().private_value.to_bytes(32)  # its file has the public half too
    assert secret.hex() not in text
    assert not any(base64.b64encode(bytes(lead) + secret).decode()[4:-4] in text for lead in range(3))
    assert keys.read_public_identity(path).keys == identity.keys
    path.write_text(text.replace('"ash"', '"birch"'))
    with pytest.raises(KeyFileError, match="not signed by its own"):
        keys.read_public_identity(path)
    for damaged in ("[]", "{", '{"format": 1}'):
        path.write_text(damaged)
        with pytest.raises(KeyFileError):
            keys.read_public_identity(path)


def test_connection_keys_are_of_p256_and_older_ones_of_p384_go_on(tmp_path: Path) -> None:
    path = tmp_path / "id" / "flower.key"
    assert keys.create_identity(tmp_path / "id", "ash").keys.flower.startswith("ecdsa-sha2-nistp256 ")
    pem, openssh, bare = Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()
    path.write_bytes(ec.generate_private_key(ec.SECP384R1()).private_bytes(pem, openssh, bare))
    identity = keys.load_identity(tmp_path / "id", "ash")
    assert identity.keys.flower.startswith("ecdsa-sha2-nistp384 ")
    assert identity.public.keys == identity.keys
    path.write_bytes(ec.generate_private_key(ec.SECP521R1()).private_bytes(pem, openssh, bare))
    with pytest.raises(KeyFileError, match="keys of another kind"):
        keys.load_identity(tmp_path / "id", "ash")


@pytest.mark.parametrize(
    "content", [b"", b"garbage", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"]
)
def test_malformed_private_files_are_refused(tmp_path: Path, content: bytes) -> None:
    keys.create_identity(tmp_path / "id", "ash")
    for name in ("signing.key", "flower.key", "recipient.key"):
        whole = (tmp_path / "id" / name).read_bytes()
        (tmp_path / "id" / name).write_bytes(content)
        with pytest.raises(KeyFileError, match="malformed"):
            keys.load_identity(tmp_path / "id", "ash")
        (tmp_path / "id" / name).write_bytes(whole)


def test_every_site_opens_the_same_secret_and_nobody_else_does(federation: Federation, tmp_path: Path) -> None:
    sealed = federation.seal_key(1)
    secrets = {
        keys.open_sealed_key(sealed, federation.agreed, _identity(federation, member.name)).to_bytes()
        for member in federation.agreed.study.sites
    }
    assert len(secrets) == 1
    secret = secrets.pop()
    assert secret not in sealed
    assert not any(secret[start : start + 16] in sealed for start in range(0, len(secret) - 16, 16))
    stranger = keys.create_identity(tmp_path / "stranger", "stranger")
    with pytest.raises(KeyFileError, match="not sealed to stranger"):
        keys.open_sealed_key(sealed, federation.agreed, stranger)
    # Nor does the coordinator's signing key, the server's only one, open it.
    coordinator = load_signing_key(federation.folder / "server/coordinator.key")
    assert not hasattr(coordinator, "exchange")


def test_every_key_is_new(federation: Federation) -> None:
    first, second = (check_sealed_key(federation.seal_key(1), federation.agreed) for _ in range(2))
    assert first.key != second.key


def test_only_the_key_maker_seals(federation: Federation) -> None:
    with pytest.raises(KeyFileError, match="not the study's key maker"):
        keys.create_sealed_key(federation.agreed, _identity(federation, "birch"), 1, "0" * 64)
    # The server seals a key of its own to the sites and signs it with the key it has.
    sealed = federation.seal_key(1)
    frame = split_frame(KEY_MAGIC, sealed, MAX_KEY_HEADER, KeyFileError)
    header = parse_header(frame.header, SealedKeyHeader, KeyFileError)
    recipients = [pyrage.x25519.Recipient.from_str(site.keys.recipient) for site in federation.agreed.study.sites]
    own = pyrage.encrypt(StudySecret.generate(federation.agreed.lanes.modulus_bits).to_bytes(), recipients)
    forged_header = header.model_copy(update=payload_fields(own))
    for signer in (federation.signing, _identity(federation, "birch").signing):
        forged = sign_frame(KEY_MAGIC, forged_header, signer, own)
        with pytest.raises(KeyFileError, match="signature"):
            keys.open_sealed_key(forged, federation.agreed, _identity(federation, "ash"))
    # Even the maker cannot pass one key off under another's id.
    mixed = sign_frame(KEY_MAGIC, forged_header, _identity(federation, "ash").signing, own)
    with pytest.raises(KeyFileError, match="not the key it names"):
        keys.open_sealed_key(mixed, federation.agreed, _identity(federation, "birch"))


def test_a_key_for_another_prime_is_refused_before_anybody_trains_for_it(federation: Federation) -> None:
    """Named and signed rightly by the maker. Taken, it would fail at sealing, when a budget is spent already."""
    sealed = federation.seal_key(1)
    frame = split_frame(KEY_MAGIC, sealed, MAX_KEY_HEADER, KeyFileError)
    header = parse_header(frame.header, SealedKeyHeader, KeyFileError)
    bits = federation.agreed.lanes.modulus_bits
    other = StudySecret.generate(bits + 1)
    recipients = [pyrage.x25519.Recipient.from_str(site.keys.recipient) for site in federation.agreed.study.sites]
    own = pyrage.encrypt(other.to_bytes(), recipients)
    named = header.model_copy(update={"key": keys._key_id(other, header.study, header.epoch), **payload_fields(own)})
    data = sign_frame(KEY_MAGIC, named, _identity(federation, "ash").signing, own)
    with pytest.raises(KeyFileError, match=rf"prime of {bits + 1} bits; expected {bits}"):
        keys.open_sealed_key(data, federation.agreed, _identity(federation, "birch"))


def test_a_flipped_bit_anywhere_in_a_sealed_key_is_refused(federation: Federation) -> None:
    sealed = bytearray(federation.seal_key(1))
    whole = bytes(sealed)
    step = max(1, len(sealed) // 300)
    for position in range(0, len(sealed), step):
        sealed[position] ^= 1 << (position % 8)
        with pytest.raises(KeyFileError):
            check_sealed_key(bytes(sealed), federation.agreed)
        sealed[:] = whole
    for cut in (0, 3, 7, 100, len(whole) - 1):
        with pytest.raises(KeyFileError):
            check_sealed_key(whole[:cut], federation.agreed)
    check_sealed_key(whole, federation.agreed)


def test_a_key_of_another_study_or_an_older_epoch_is_refused(federation: Federation) -> None:
    site = federation.site("birch")
    second = federation.seal_key(2)
    site.replica.keys.accept(second)
    assert site.replica.keys.accept(second).key == site.replica.keys.newest[1]
    for other in (federation.seal_key(1), federation.seal_key(2)):
        with pytest.raises(KeyFileError, match="an older or a second key of an epoch"):
            site.replica.keys.accept(other)
    frame = split_frame(KEY_MAGIC, second, MAX_KEY_HEADER, KeyFileError)
    header = parse_header(frame.header, SealedKeyHeader, KeyFileError).model_copy(update={"study": "6" * 64})
    moved = sign_frame(KEY_MAGIC, header, _identity(federation, "ash").signing, bytes(frame.payload))
    with pytest.raises(KeyFileError, match="for study 6666"):
        site.replica.keys.accept(moved)
    assert site.replica.keys.newest[0] == 2


def test_representations_show_no_secret(federation: Federation) -> None:
    identity = _identity(federation, "ash")
    secret = keys.open_sealed_key(federation.seal_key(1), federation.agreed, identity)
    assert repr(secret.mac_key)[2:12] not in repr(secret)
    assert "AGE-SECRET" not in repr(identity)


def test_a_passphrase_locks_every_private_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = keys.create_identity(tmp_path / "id", "ash", "correct horse")
    for name in ("signing.key", "flower.key", "recipient.key"):
        text = (tmp_path / "id" / name).read_bytes()
        assert b"AGE-SECRET-KEY" not in text
        assert b"BEGIN PRIVATE KEY" not in text
    monkeypatch.delenv("SECFACMIC_PASSPHRASE", raising=False)
    with pytest.raises(KeyFileError, match="set SECFACMIC_PASSPHRASE"):
        keys.load_identity(tmp_path / "id", "ash")
    with pytest.raises(KeyFileError, match="or the passphrase is wrong"):
        keys.load_identity(tmp_path / "id", "ash", lambda: "wrong")
    monkeypatch.setenv("SECFACMIC_PASSPHRASE", "correct horse")
    assert keys.load_identity(tmp_path / "id", "ash").keys == made.keys

"""Signatures of short words, of which what holds is kept: it holds for these bytes and this key, and no others."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from secure_fed.core.errors import EnvelopeError, ProtocolError
from secure_fed.protocol import signing
from secure_fed.protocol.envelope import EnvelopeHeader
from secure_fed.protocol.signing import parse_header, public_hex, verify_signature

ONE, OTHER = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()


def test_what_was_found_of_a_word_counts_for_no_other() -> None:
    magic, header = b"SFTS", b"a word"
    signature = ONE.sign(magic + header)
    for _ in range(2):
        verify_signature(magic, header, signature, public_hex(ONE), EnvelopeError)
    assert len(signature) == 64
    others = [
        (b"SFTT", header, signature, public_hex(ONE)),
        (magic, header + b".", signature, public_hex(ONE)),
        (magic, header, bytes([signature[0] ^ 1]) + signature[1:], public_hex(ONE)),
        (magic, header, signature, public_hex(OTHER)),
        (magic + header[:1], header[1:] + b"", signature[::-1], public_hex(ONE)),
    ]
    for wrong in others:
        for _ in range(2):  # nothing of a refusal is kept either
            with pytest.raises(EnvelopeError, match="signature"):
                verify_signature(*wrong, EnvelopeError)
    with pytest.raises(ProtocolError):  # refused as whoever asks wants it
        verify_signature(*others[0], ProtocolError)


def test_long_words_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Anybody in the study can send as many of them as it likes."""

    def never(*arguments: object) -> None:
        raise AssertionError("kept")

    monkeypatch.setattr(signing, "_verify_once", never)
    long = bytes(signing._KEPT_BYTES + 1)
    verify_signature(b"SFTS", long, ONE.sign(b"SFTS" + long), public_hex(ONE), EnvelopeError)
    monkeypatch.setattr(signing, "_parse_once", never)
    with pytest.raises(EnvelopeError, match="bytes; expected at most"):
        signing.verify_member(b"SFTS", long, b"", EnvelopeHeader, "", {}, 10, EnvelopeError)
    with pytest.raises(EnvelopeError, match="one array"):
        signing.verify_member(b"SFTS", long, b"", EnvelopeHeader, "", {}, len(long), EnvelopeError)


def test_a_word_that_cannot_be_read_is_refused_each_time() -> None:
    for _ in range(2):
        with pytest.raises(EnvelopeError, match="one array"):
            signing.verify_member(b"SFTS", b"\xff", b"", EnvelopeHeader, "", {}, 10, EnvelopeError)
    with pytest.raises(ProtocolError, match="one array"):
        parse_header(b"\xff", EnvelopeHeader, ProtocolError)

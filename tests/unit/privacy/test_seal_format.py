"""SEAL's byte format, against SEAL's own saver and loader."""

from __future__ import annotations

import ast
import contextlib
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tenseal import sealapi

from secure_fed.core.errors import SealFormatError
from secure_fed.privacy import ckks, seal_format
from secure_fed.protocol.residues import DEGREE, PRIMES, Residues

ROOT = Path(__file__).parents[3]
BITS = 51
CONTEXT = ckks._context(BITS)
KEY = sealapi.KeyGenerator(CONTEXT).secret_key()
ENCRYPTOR = sealapi.Encryptor(CONTEXT, KEY)
DECRYPTOR = sealapi.Decryptor(CONTEXT, KEY)
PARMS: seal_format.ParmsId = tuple(CONTEXT.first_parms_id())


def zero() -> Any:
    ciphertext = sealapi.Ciphertext(CONTEXT)
    ENCRYPTOR.encrypt_zero_symmetric(ciphertext)
    return ciphertext


def saved_ciphertext() -> bytes:
    return seal_format.save(zero())


def saved_plaintext() -> bytes:
    plaintext = sealapi.Plaintext()
    DECRYPTOR.decrypt(zero(), plaintext)
    return seal_format.save(plaintext)


def split(saved: bytes) -> Residues:
    return seal_format.ciphertext_words(saved, PARMS, 2, ntt=True)


def loaded(data: bytes) -> Any:
    ciphertext = sealapi.Ciphertext(CONTEXT)
    seal_format.load(ciphertext, CONTEXT, data)
    return ciphertext


def words(ciphertext: Any) -> Residues:
    array = ciphertext.dyn_array()
    return np.array([array.at(index) for index in range(array.size())], np.uint64).reshape(-1, DEGREE)


def test_the_context_has_one_prime_and_256_bits_of_security() -> None:
    assert CONTEXT.parameters_set()
    assert CONTEXT.first_context_data().total_coeff_modulus_bit_count() == BITS
    assert CONTEXT.key_context_data().total_coeff_modulus_bit_count() == BITS
    assert CONTEXT.key_context_data().qualifiers().sec_level == sealapi.SEC_LEVEL_TYPE.TC256


def test_a_ciphertexts_words_are_what_seal_holds() -> None:
    ciphertext = zero()
    assert np.array_equal(split(seal_format.save(ciphertext)), words(ciphertext))


def test_a_plaintexts_words_are_what_seal_holds() -> None:
    plaintext = sealapi.Plaintext()
    DECRYPTOR.decrypt(zero(), plaintext)
    found = seal_format.plaintext_words(seal_format.save(plaintext), PARMS)
    assert found.tolist() == [plaintext.data(index) for index in range(DEGREE)]
    assert seal_format.plaintext_words(seal_format.save(KEY), PARMS).max() < PRIMES[BITS]


@pytest.mark.parametrize("polynomials", [2, 3, seal_format.MOST_POLYNOMIALS])
def test_a_built_ciphertext_is_what_seal_loads(polynomials: int) -> None:
    drawn = np.random.default_rng(0).integers(0, PRIMES[BITS], (polynomials, DEGREE), np.uint64)
    built = seal_format.ciphertext(drawn, PARMS)
    ciphertext = loaded(built)
    assert np.array_equal(words(ciphertext), drawn)
    assert ciphertext.scale == 1
    assert ciphertext.parms_id() == CONTEXT.first_parms_id()
    assert ciphertext.is_ntt_form()
    assert np.array_equal(seal_format.ciphertext_words(built, PARMS, polynomials, ntt=True), drawn)
    saved = seal_format.save(ciphertext)
    assert np.array_equal(seal_format.ciphertext_words(saved, PARMS, polynomials, ntt=True), drawn)


def test_more_polynomials_than_seal_takes_are_refused() -> None:
    with pytest.raises(SealFormatError, match="SEAL refused"):
        loaded(seal_format.ciphertext(np.zeros((seal_format.MOST_POLYNOMIALS + 1, DEGREE), np.uint64), PARMS))


@pytest.mark.parametrize(("at", "value", "text"), [(3, 5, "SEAL 5.3; expected SEAL 4.3"), (4, 1, "SEAL 4.1")])
def test_another_version_is_named(at: int, value: int, text: str) -> None:
    data = bytearray(saved_ciphertext())
    data[at] = value
    with pytest.raises(SealFormatError, match=text):
        split(bytes(data))
    with pytest.raises(SealFormatError, match=text):
        loaded(bytes(data))


def test_other_fields_are_refused() -> None:
    for read in (
        lambda: seal_format.ciphertext_words(saved_ciphertext(), (1, 2, 3, 4), 2, ntt=True),
        lambda: seal_format.ciphertext_words(saved_ciphertext(), PARMS, 2, ntt=False),
        lambda: seal_format.plaintext_words(saved_plaintext(), (1, 2, 3, 4)),
    ):
        with pytest.raises(SealFormatError, match="other fields"):
            read()
    with pytest.raises(SealFormatError, match="does not unpack"):
        seal_format.ciphertext_words(saved_ciphertext(), PARMS, 3, ntt=True)


def test_every_fixed_byte_is_checked() -> None:
    built = seal_format.ciphertext(np.zeros((2, DEGREE), np.uint64), PARMS)
    for at in range(len(built) - 2 * 8 * DEGREE):
        changed = bytearray(built)
        changed[at] ^= 1
        with pytest.raises(SealFormatError):
            split(bytes(changed))


@given(st.floats(0, 1, exclude_max=True), st.integers(0, 7), st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_damage_gives_one_typed_error_or_other_words(where: float, bit: int, more: int) -> None:
    saved = saved_ciphertext()
    at = int(where * len(saved))
    damaged = bytearray(saved)
    damaged[at] ^= 1 << bit
    for cut in (saved[:at], saved + bytes(more)):
        with pytest.raises(SealFormatError):
            split(cut)
    with contextlib.suppress(SealFormatError):
        assert split(bytes(damaged)).shape == (2, DEGREE)


@pytest.mark.parametrize("size", [0, 15, 16, 17, 200])
def test_cut_bytes_are_refused(size: int) -> None:
    with pytest.raises(SealFormatError):
        loaded(saved_ciphertext()[:size])
    with pytest.raises(SealFormatError):
        split(saved_ciphertext()[:size])
    with pytest.raises(SealFormatError):
        seal_format.plaintext_words(saved_plaintext()[:size], PARMS)


def test_a_frame_that_claims_much_more_is_refused() -> None:
    # A valid zstd frame of 1 GiB of zeros in few bytes: 8192 RLE blocks of 128 KiB.
    block = struct.pack("<I", (131072 << 3) | 2)[:3] + b"\0"
    last = struct.pack("<I", (131072 << 3) | 3)[:3] + b"\0"
    frame = bytes.fromhex("28b52ffd0038") + block * 8191 + last
    data = struct.pack("<HBBBBHQ", 0xA15E, 16, 4, 3, 2, 0, 16 + len(frame)) + frame
    with pytest.raises(SealFormatError, match="does not unpack"):
        split(data)


def test_what_seal_refuses_is_a_typed_error() -> None:
    polynomials = np.zeros((2, DEGREE), np.uint64)
    polynomials[0, 7] = PRIMES[BITS]
    with pytest.raises(SealFormatError, match="SEAL refused") as caught:
        loaded(seal_format.ciphertext(polynomials, PARMS))
    assert caught.value.__cause__ is None


# Memory files


class Probe:
    """Stands for a SEAL object and looks at the path it is given."""

    def __init__(self) -> None:
        self.links: list[str] = []
        self.seen = b""

    def save(self, path: str) -> None:
        self.links.append(os.readlink(path))
        Path(path).write_bytes(saved_ciphertext())

    def load(self, context: Any, path: str) -> None:
        self.links.append(os.readlink(path))
        self.seen = Path(path).read_bytes()
        raise RuntimeError("refused")


def test_seal_is_given_memory_files_only_and_they_are_closed() -> None:
    before = os.listdir("/proc/self/fd")
    probe = Probe()
    data = seal_format.save(probe)
    with pytest.raises(SealFormatError, match="SEAL refused"):
        seal_format.load(probe, CONTEXT, data)
    assert probe.seen == data
    assert len(probe.links) == 2
    assert all(link.startswith("/memfd:") for link in probe.links)
    assert os.listdir("/proc/self/fd") == before


def test_nothing_else_saves_or_loads_seal_objects() -> None:
    for path in sorted((ROOT / "privacy").glob("*.py")):
        source = path.read_text()
        if path.name == "seal_format.py" or "sealapi" not in source:
            continue
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Attribute) and node.attr in ("save", "load"):
                assert isinstance(node.value, ast.Name), f"{path.name}:{node.lineno}"
                assert node.value.id == "seal_format", f"{path.name}:{node.lineno}"


def test_a_whole_round_leaves_no_file(tmp_path: Path) -> None:
    code = """
import numpy as np
from secure_fed.privacy.ckks import Cipher, StudySecret
from secure_fed.protocol.packing import Binding, lane_parameters, wire
parameters = lane_parameters(4, 18, 2, 10)
secret = StudySecret.from_bytes(StudySecret.generate(parameters.modulus_bits).to_bytes())
cipher, w = Cipher(parameters, secret), wire("he", parameters)
sealed = cipher.seal(np.arange(10), Binding("ab", "cd", 1), "a")
total = w.zero()
total = w.add(total, sealed.payload)
print(cipher.open(w.record(total, 1), Binding("ab", "cd", 1), [sealed.contribution]).tolist())
"""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
        "TMPDIR": str(temporary),
        "HOME": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout.strip() == str(list(range(10)))
    assert list(tmp_path.rglob("*")) == [temporary]

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
from secure_fed.privacy.seal_format import SeededForm
from secure_fed.protocol.packing import DEGREE, MODULUS, Coefficients

ROOT = Path(__file__).parents[3]
SCALE = 12345.678
CONTEXT = ckks._context()
KEY = sealapi.KeyGenerator(CONTEXT).secret_key()
ENCRYPTOR = sealapi.Encryptor(CONTEXT, KEY)
FORM = SeededForm(tuple(CONTEXT.first_parms_id()), SCALE)


def saved_seeded(scale: float = SCALE) -> bytes:
    plaintext = sealapi.Plaintext()
    sealapi.CKKSEncoder(CONTEXT).encode([1 + 2j, -3j], scale, plaintext)
    return seal_format.save(ENCRYPTOR.encrypt_symmetric(plaintext))


def loaded(data: bytes) -> Any:
    ciphertext = sealapi.Ciphertext(CONTEXT)
    seal_format.load(ciphertext, CONTEXT, data)
    return ciphertext


def words(ciphertext: Any) -> Coefficients:
    array = ciphertext.dyn_array()
    return np.array([array.at(index) for index in range(array.size())], np.uint64).reshape(-1, DEGREE)


def test_modulus_is_seals() -> None:
    primes = [prime.value() for prime in sealapi.CoeffModulus.Create(DEGREE, [54, 55])]
    assert primes[0] == MODULUS
    assert CONTEXT.parameters_set()
    assert CONTEXT.first_context_data().total_coeff_modulus_bit_count() == 54
    assert CONTEXT.key_context_data().total_coeff_modulus_bit_count() == 109
    assert CONTEXT.key_context_data().qualifiers().sec_level == sealapi.SEC_LEVEL_TYPE.TC128


def test_split_takes_what_seal_put_in() -> None:
    saved = saved_seeded()
    seed, polynomial = FORM.split(saved)
    assert len(seed) == 64
    assert np.array_equal(words(loaded(saved))[0], polynomial)


def test_build_is_what_seal_loads() -> None:
    saved = saved_seeded()
    seed, polynomial = FORM.split(saved)
    built = FORM.build(seed, polynomial)
    assert FORM.split(built)[0] == seed
    theirs, ours = loaded(saved), loaded(built)
    assert np.array_equal(words(ours), words(theirs))
    assert ours.scale == theirs.scale == SCALE
    assert ours.parms_id() == theirs.parms_id() == CONTEXT.first_parms_id()
    assert ours.is_ntt_form()


@pytest.mark.parametrize("seed", [bytes(64), b"\xff" * 64, bytes(63) + b"\1", bytes(range(64))])
def test_no_seed_gives_a_zero_second_polynomial(seed: bytes) -> None:
    ciphertext = loaded(FORM.build(seed, np.zeros(DEGREE, np.uint64)))
    first, second = words(ciphertext)
    assert not first.any()
    assert np.count_nonzero(second) == DEGREE
    assert len(np.unique(second)) == DEGREE
    assert second.max() < MODULUS
    assert not ciphertext.is_transparent()


def test_two_encryptions_differ() -> None:
    one, other = FORM.split(saved_seeded()), FORM.split(saved_seeded())
    assert one[0] != other[0]
    assert not np.array_equal(one[1], other[1])


@pytest.mark.parametrize(("at", "value", "text"), [(3, 5, "SEAL 5.3; expected SEAL 4.3"), (4, 1, "SEAL 4.1")])
def test_another_version_is_named(at: int, value: int, text: str) -> None:
    data = bytearray(saved_seeded())
    data[at] = value
    with pytest.raises(SealFormatError, match=text):
        FORM.split(bytes(data))
    with pytest.raises(SealFormatError, match=text):
        loaded(bytes(data))


@pytest.mark.parametrize("other", ["scale", "parms_id"])
def test_other_fields_are_refused(other: str) -> None:
    form = SeededForm(FORM.parms_id, SCALE * 2) if other == "scale" else SeededForm((1, 2, 3, 4), SCALE)
    with pytest.raises(SealFormatError, match="other fields"):
        form.split(saved_seeded())


def test_every_fixed_byte_is_checked() -> None:
    built = FORM.build(bytes(64), np.zeros(DEGREE, np.uint64))
    fixed = [*range(113), *range(len(built) - 81, len(built) - 64)]
    for at in fixed:
        changed = bytearray(built)
        changed[at] ^= 1
        with pytest.raises(SealFormatError):
            FORM.split(bytes(changed))


@given(st.floats(0, 1, exclude_max=True), st.integers(0, 7), st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_damage_gives_one_typed_error_or_another_ciphertext(where: float, bit: int, more: int) -> None:
    saved = saved_seeded()
    at = int(where * len(saved))
    damaged = bytearray(saved)
    damaged[at] ^= 1 << bit
    for cut in (saved[:at], saved + bytes(more)):
        with pytest.raises(SealFormatError):
            FORM.split(cut)
    with contextlib.suppress(SealFormatError):
        seed, polynomial = FORM.split(bytes(damaged))
        assert len(seed) == 64
        assert polynomial.shape == (DEGREE,)


@pytest.mark.parametrize("size", [0, 15, 16, 17, 200])
def test_cut_bytes_are_refused(size: int) -> None:
    with pytest.raises(SealFormatError):
        loaded(saved_seeded()[:size])
    with pytest.raises(SealFormatError):
        FORM.split(saved_seeded()[:size])


def test_a_frame_that_claims_much_more_is_refused() -> None:
    # A valid zstd frame of 1 GiB of zeros in few bytes: 8192 RLE blocks of 128 KiB.
    block = struct.pack("<I", (131072 << 3) | 2)[:3] + b"\0"
    last = struct.pack("<I", (131072 << 3) | 3)[:3] + b"\0"
    frame = bytes.fromhex("28b52ffd0038") + block * 8191 + last
    data = struct.pack("<HBBBBHQ", 0xA15E, 16, 4, 3, 2, 0, 16 + len(frame)) + frame
    with pytest.raises(SealFormatError, match="does not unpack"):
        FORM.split(data)


def test_what_seal_refuses_is_a_typed_error() -> None:
    polynomial = np.zeros(DEGREE, np.uint64)
    polynomial[7] = MODULUS
    with pytest.raises(SealFormatError, match="SEAL refused") as caught:
        loaded(FORM.build(bytes(64), polynomial))
    assert caught.value.__cause__ is None


# Memory files


class Probe:
    """Stands for a SEAL object and looks at the path it is given."""

    def __init__(self) -> None:
        self.links: list[str] = []
        self.seen = b""

    def save(self, path: str) -> None:
        self.links.append(os.readlink(path))
        Path(path).write_bytes(saved_seeded())

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
from secure_fed.protocol.packing import Binding, Contribution, lane_parameters, wire
parameters = lane_parameters(4, 18, 2, 10)
secret = StudySecret.from_bytes(StudySecret.generate().to_bytes())
cipher, w, who = Cipher(parameters, secret), wire("he", parameters), Contribution("a", 0)
payload = cipher.seal(np.arange(10), Binding("ab", "cd", 1), who)
total = w.zero()
w.add(total, payload)
print(cipher.open(w.record(total, [w.tail(payload)]), Binding("ab", "cd", 1), [who]).tolist())
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

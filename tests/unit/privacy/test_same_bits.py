"""Invariant 9 for the wire: one study's keys, seeds and noise give the same bytes and integers on every CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tenseal import sealapi

from secure_fed.privacy import seal_format
from secure_fed.privacy.ckks import Cipher, StudySecret
from secure_fed.protocol.packing import lane_parameters

SITES = 5
SHAPES = ((5, 20, 2), (5, 8, 4), (1000, 11, 2))
"""max_sites, bits and lanes: primes of 50, 50 and 57 bits."""
VALUES = 20_000  # more than one block of the dot products, two ciphertexts or more

ROUND = """
import hashlib, json, sys
import numpy as np
from secure_fed.privacy import ckks
from secure_fed.protocol import codec
from secure_fed.protocol.packing import Binding, CipherWire, lane_parameters
from secure_fed.protocol.residues import linear_check

def sha256(data): return hashlib.sha256(data).hexdigest()

given = np.load(sys.argv[1])
found = []
for index in range(int(given["shapes"])):
    parameters = lane_parameters(*given[f"shape-{index}"].tolist())
    cipher = ckks.Cipher(parameters, ckks.StudySecret.from_bytes(given[f"secret-{index}"].tobytes()))
    noise = iter(given[f"noise-{index}"])
    cipher._plaintext_words = lambda saved: next(noise)
    seeds = iter(range(10))
    ckks.secrets.token_hex = lambda count: f"{next(seeds):064x}"
    binding, wire = Binding("ab", "cd", 1), CipherWire(parameters)
    total, cohort, payloads = wire.zero(), [], []
    for site, integers in enumerate(given[f"integers-{index}"]):
        contribution, payload = cipher.seal(integers, binding, f"site-{site}")
        payloads.append(sha256(payload))
        total = wire.add(total, payload)
        cohort.append(contribution)
    record = wire.record(total, len(cohort))
    sums = cipher.open(record, binding, cohort)
    assert (sums == given[f"integers-{index}"].sum(axis=0)).all()
    weights = [0.1 * (1 + site) for site in range(len(cohort))]
    update = codec.average_update(sums, np.linspace(0.1, 0.7, sums.size), weights, parameters.max_integer)
    check = linear_check("ef" * 32, wire.residues(record), parameters.modulus)
    found.append([payloads, sha256(record), sha256(sums.tobytes()), sha256(update.tobytes()), check])
print(json.dumps(found))
"""


def dispatches() -> dict[str, dict[str, str]]:
    """Environments that choose other code in numpy, OpenBLAS, OpenSSL and torch, as far as this CPU goes."""
    found = np.show_config(mode="dicts")["SIMD Extensions"].get("found", [])
    wide = [name for name in found if "512" in name or name == "X86_V4"]
    one = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    two = {"OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2"}
    return {
        "as this CPU is, two threads": two,
        "nothing beyond the baseline": one
        | {"NPY_DISABLE_CPU_FEATURES": " ".join(found), "ATEN_CPU_CAPABILITY": "default"}
        | {"OPENBLAS_CORETYPE": "Nehalem", "OPENSSL_ia32cap": "0x0:0x0"},
        "no vectors of 512 bits, two threads": two
        | {"NPY_DISABLE_CPU_FEATURES": " ".join(wide), "ATEN_CPU_CAPABILITY": "avx2", "OPENBLAS_CORETYPE": "Haswell"},
    }


@pytest.fixture
def given(tmp_path: Path) -> Path:
    """Keys, integers and noise (SEAL's own, drawn once) of a round of each shape."""
    rng, arrays = np.random.default_rng(0), {"shapes": np.array(len(SHAPES))}
    for index, (max_sites, bits, lanes) in enumerate(SHAPES):
        parameters = lane_parameters(max_sites, bits, lanes, VALUES)
        secret = StudySecret.generate(parameters.modulus_bits)
        cipher = Cipher(parameters, secret)
        zero, plaintext, noise = sealapi.Ciphertext(cipher._context), sealapi.Plaintext(), []
        for _ in range(SITES * parameters.ciphertexts):
            cipher._encryptor.encrypt_zero_symmetric(zero)
            cipher._decryptor.decrypt(zero, plaintext)
            noise.append(seal_format.plaintext_words(seal_format.save(plaintext), cipher._parms_id))
        most = parameters.max_integer
        integers = rng.integers(-most, most + 1, (SITES, VALUES))
        integers[:, : VALUES // 4] = rng.choice([-most, most], VALUES // 4)
        arrays |= {
            f"shape-{index}": np.array([max_sites, bits, lanes, VALUES]),
            f"secret-{index}": np.frombuffer(secret.to_bytes(), np.uint8),
            f"noise-{index}": np.stack(noise),
            f"integers-{index}": integers,
        }
    np.savez(tmp_path / "given.npz", **arrays)  # type: ignore[arg-type]  # its stub takes allow_pickle for an array
    return tmp_path / "given.npz"


def test_the_same_noise_and_seeds_give_the_same_bytes_and_integers_on_every_cpu(given: Path) -> None:
    running = {
        name: subprocess.Popen(
            # numpy warns if it cannot leave out what it was told to.
            [sys.executable, "-P", "-W", "error::ImportWarning", "-c", ROUND, str(given)],
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])} | environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name, environment in dispatches().items()
    }
    found = {name: json.loads(process.communicate(timeout=60)[0]) for name, process in running.items()}
    first, *others = found.values()
    assert [len(payloads) for payloads, *_ in first] == [SITES] * len(SHAPES)
    assert all(other == first for other in others), [name for name in found if found[name] != first]

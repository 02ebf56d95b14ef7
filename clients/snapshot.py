"""The data of a run as they were when it began: what a site with a budget trains on until the run is over.

Whatever happens to the data folder after a run's first message, faults and changes included, then shows in nothing that
leaves. The file holds features, labels, splits and, sealed under a key of the ledger's folder, patients' ids and the
digests of their images: whoever has a copy of the state folder alone learns no name from it. It stays in that folder.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import safetensors
import safetensors.numpy
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from secure_fed.clients.data import Split
from secure_fed.clients.features import Labelled, SiteFeatures
from secure_fed.core.errors import StorageError
from secure_fed.core.storage import make_folder, write_durable

_LABELLED = ("train", "val", "test")
_NONCE_BYTES = 12
_PURPOSE = b"secfacmic snapshot 2"


def write_snapshot(path: Path, features: SiteFeatures, key: bytes) -> None:
    """Write a run's snapshot, whole or not at all.

    Args:
        path: where.
        features: the run's data.
        key: of the ledger that pays for the run.

    Raises:
        StorageError: it cannot be written.
    """
    tensors = {f"{split}.{part}": getattr(getattr(features, split), part) for split in _LABELLED for part in "xy"}
    owners = {split: list(features.patients.get(split, ())) for split in get_args(Split)}
    digests = {patient: sorted(one.hex() for one in found) for patient, found in features.digests.items()}
    text = json.dumps({"patients": owners, "digests": digests, "unreadable": features.unreadable})
    nonce = os.urandom(_NONCE_BYTES)
    sealed = nonce + ChaCha20Poly1305(key).encrypt(nonce, text.encode(), _PURPOSE)
    tensors["unlabelled.x"] = features.unlabelled
    tensors["sealed"] = np.frombuffer(sealed, dtype=np.uint8)
    make_folder(path.parent)
    content = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    write_durable(path, bytes(safetensors.numpy.save(content)), 0o600)


def read_snapshot(path: Path, key: bytes) -> SiteFeatures:
    """Read a run's snapshot.

    Args:
        path: where it lies.
        key: of the ledger that pays for the run.

    Raises:
        StorageError: it cannot be read, or was sealed under another key.
    """
    try:
        with safetensors.safe_open(path, "numpy") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        sealed = tensors["sealed"].tobytes()
        facts = json.loads(ChaCha20Poly1305(key).decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], _PURPOSE))
        labelled = {split: Labelled(tensors[f"{split}.x"], tensors[f"{split}.y"]) for split in _LABELLED}
        return SiteFeatures(
            train=labelled["train"],
            val=labelled["val"],
            test=labelled["test"],
            unlabelled=tensors["unlabelled.x"],
            unreadable=int(facts["unreadable"]),
            encoded=0,
            patients={split: tuple(owners) for split, owners in facts["patients"].items()},
            digests={
                patient: frozenset(bytes.fromhex(one) for one in found) for patient, found in facts["digests"].items()
            },
        )
    except (OSError, safetensors.SafetensorError, InvalidTag, KeyError, TypeError, ValueError, RecursionError) as error:
        raise StorageError(
            f"{path}: cannot be read as the snapshot of a run's data ({type(error).__name__}); expected it and the "
            "ledger's key as the run began with them: put both back from a backup; without them this site cannot go on "
            "in the run"
        ) from None


def without(features: SiteFeatures, patients: Collection[str]) -> SiteFeatures:
    """The features of all others."""
    kept = {
        split: np.array([owner not in patients for owner in features.patients.get(split, ())], dtype=bool)
        for split in get_args(Split)
    }

    def part(split: Split) -> Labelled:
        labelled: Labelled = getattr(features, split)
        return Labelled(labelled.x[kept[split]], labelled.y[kept[split]])

    return replace(
        features,
        train=part("train"),
        val=part("val"),
        test=part("test"),
        unlabelled=features.unlabelled[kept["unlabelled"]],
        patients={
            split: tuple(owner for owner in features.patients.get(split, ()) if owner not in patients)
            for split in get_args(Split)
        },
        digests={patient: found for patient, found in features.digests.items() if patient not in patients},
    )

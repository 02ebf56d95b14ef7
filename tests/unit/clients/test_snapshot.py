"""The data of a run as they were when it began."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from secure_fed.clients.features import Labelled, SiteFeatures
from secure_fed.clients.snapshot import read_snapshot, without, write_snapshot
from secure_fed.core.errors import StorageError

KEY, OTHER = bytes(range(32)), bytes(32)


@pytest.fixture
def features() -> SiteFeatures:
    x = np.arange(12, dtype=np.float32).reshape(6, 2)
    y = np.arange(6) % 2
    return SiteFeatures(
        *(Labelled(x[rows], y[rows]) for rows in (slice(0, 3), slice(3, 4), slice(4, 5))),
        unlabelled=x[5:],
        unreadable=2,
        encoded=0,
        patients={
            "train": ("Mayer", "Mayer", "Huber"),
            "val": ("Gruber",),
            "test": ("Bauer",),
            "unlabelled": ("Egger",),
        },
        digests={"Mayer": frozenset({b"\1\2", b"\3"}), "Huber": frozenset()},
    )


def test_a_snapshot_is_read_as_it_was_written_and_shows_no_patient_without_the_ledgers_key(
    tmp_path: Path, features: SiteFeatures
) -> None:
    path = tmp_path / "run" / "snapshot.safetensors"
    write_snapshot(path, features, KEY)
    found = read_snapshot(path, KEY)
    assert (found.patients, found.digests, found.unreadable) == (features.patients, features.digests, 2)
    for split in ("train", "val", "test"):
        np.testing.assert_array_equal(getattr(found, split).x, getattr(features, split).x)
        np.testing.assert_array_equal(getattr(found, split).y, getattr(features, split).y)
    np.testing.assert_array_equal(found.unlabelled, features.unlabelled)
    content = path.read_bytes()
    assert [name for owners in features.patients.values() for name in owners if name.encode() in content] == []
    assert b"0102" not in content
    assert path.stat().st_mode & 0o777 == 0o600
    write_snapshot(path, features, KEY)
    assert path.read_bytes() != content, "a nonce of its own for each writing"
    with pytest.raises(StorageError, match="ledger's key"):
        read_snapshot(path, OTHER)


def test_a_changed_list_of_patients_is_refused(tmp_path: Path, features: SiteFeatures) -> None:
    path = tmp_path / "snapshot.safetensors"
    write_snapshot(path, features, KEY)
    content = bytearray(path.read_bytes())
    for place in (-1, len(content) // 2):
        content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(StorageError):
        read_snapshot(path, KEY)


def test_a_patient_who_left_has_no_row_in_any_split(features: SiteFeatures) -> None:
    left = without(features, ["Mayer", "Egger"])
    assert left.patients == {"train": ("Huber",), "val": ("Gruber",), "test": ("Bauer",), "unlabelled": ()}
    np.testing.assert_array_equal(left.train.x, features.train.x[2:])
    assert len(left.unlabelled) == 0
    assert set(left.digests) == {"Huber"}

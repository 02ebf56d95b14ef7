"""The replica's state is folded over records: nothing of it changes in place, and looking back writes nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from secure_fed.clients.replica import Confirmed, ReplicaState, Sums, Unreadable, Validation, fold
from secure_fed.clients.site import Site
from secure_fed.protocol import codec
from secure_fed.protocol.records import Record
from secure_fed.server.coordinator import Coordinator
from tests.conftest import Federation, exchange, run_round


def rotate(federation: Federation, coordinator: Coordinator, sites: list[Site]) -> None:
    """An amendment with the next key, and its checkpoint."""
    chain = coordinator.journal.chain
    epoch = sites[0].replica.keys.newest[0] + 1
    coordinator.amend(federation.seal_key(epoch, chain.key, members=chain.members))
    for kind in ("amendment", "checkpoint"):
        for site in sites:
            exchange(coordinator, site)
        entry = coordinator.advance()
        assert entry is not None
        assert entry.header.kind == kind
    for site in sites:
        exchange(coordinator, site)


def rotated_twice(federation: Federation) -> list[Site]:
    """Sites after three rounds, each under a key of its own."""
    sites = federation.sites()
    coordinator = federation.begin(sites)
    run_round(coordinator, sites)
    for _ in range(2):
        rotate(federation, coordinator, sites)
        run_round(coordinator, sites)
    for site in sites:
        exchange(coordinator, site)
    return sites


def written(folder: Path) -> dict[Path, tuple[int, int]]:
    """What a write of any file would change, though the bytes be the same."""
    return {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in folder.rglob("*")}


def test_a_fold_leaves_the_state_before_it_as_it_was(federation: Federation) -> None:
    sites = federation.sites()
    coordinator = federation.begin(sites)
    run_round(coordinator, sites)
    state = ReplicaState.initial(federation.agreed)

    def following(seq: int) -> Record:
        return state.chain.check(coordinator.journal.read(seq))

    state = fold(state, following(0), None)
    record, before, head = following(1), state.digest, state.chain.head
    sums = np.full(federation.agreed.lanes.values, 7, dtype=np.int64)
    added = fold(state, record, Sums(sums))
    assert (state.round, state.digest, state.chain.head, list(state.digests)) == (0, before, head, [head])
    assert added.round == 1
    assert added.digest != before
    assert added.digests == {head: (before, record.header.key), record.id: (added.digest, record.header.key)}
    # Of the same record, what could not be read or was refused: the journal goes on, the adapter does not.
    blind, refused = fold(state, record, Unreadable()), fold(state, record, None)
    assert (blind.round, blind.blind, list(blind.digests)) == (1, True, [head])
    assert (refused.round, refused.blind, refused.digest) == (1, False, before)
    restored = fold(blind, record, Confirmed(added.tensors))
    assert (restored.blind, restored.digest) == (False, added.digest)


MOST = 3 * (2**24 - 1)
"""Validation images that three sites can count: 24 bits each."""


def test_validation_counts_that_no_images_give_are_clamped_and_told(
    federation: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    sites = federation.sites()
    coordinator = federation.begin(sites)
    run_round(coordinator, sites)
    state = ReplicaState.initial(federation.agreed)
    state = fold(state, state.chain.check(coordinator.journal.read(0)), None)
    record = state.chain.check(coordinator.journal.read(1))
    size = codec.flatten(federation.agreed.initial.adapter).size

    def folded(images: int, correct: int) -> Validation | None:
        """What follows from sums of these counts, whatever the members sent to make them."""
        values = np.zeros(federation.agreed.lanes.values, dtype=np.int64)
        digits = codec.Digits(16, codec.COUNT_BITS + 1)
        values[size:] = digits.split(np.array([images, correct]))
        assert digits.join(values[size:]).tolist() == [images, correct]
        return fold(state, record, Sums(values)).validation

    for images, correct in [(0, 0), (9, 0), (9, 9), (MOST, MOST)]:
        assert folded(images, correct) == Validation(images, correct)
    assert not caplog.records
    impossible = {
        (9, 10): (9, 9),
        (9, -1): (9, 0),
        (-3, 2): (0, 0),
        (-3, -5): (0, 0),
        (MOST + 1, 5): (MOST, 5),
        (MOST + 2, MOST + 1): (MOST, MOST),
    }
    for (images, correct), clamped in impossible.items():
        caplog.clear()
        assert folded(images, correct) == Validation(*clamped)
        (told,) = [entry.getMessage() for entry in caplog.records]
        assert f"round 1: the sites' validation counts sum to {correct} correct of {images}; expected" in told
        assert f"Taken as {clamped[1]} of {clamped[0]}" in told


def test_looking_back_writes_nothing_and_leaves_out_rounds_whose_key_is_gone(federation: Federation) -> None:
    ash = rotated_twice(federation)[0]
    assert list(ash.replica.keys.headers) == [3]
    folder = federation.folder / "sites" / "ash" / "state"
    before = written(folder)
    assert [(state.round, state.digest) for state in ash.replica.history()] == [(3, ash.replica.state.digest)]
    assert written(folder) == before


def test_a_lost_adapter_is_rebuilt_though_two_keys_are_gone(federation: Federation) -> None:
    sites = rotated_twice(federation)
    for path in federation.folder.glob("sites/*/state/runs/*/adapter.safetensors"):
        path.unlink()
    rebuilt = federation.sites()
    assert {site.adapter_digest for site in rebuilt} == {sites[0].adapter_digest}
    assert not any(site.replica.state.blind for site in rebuilt)
    assert [list(site.replica.keys.headers) for site in rebuilt] == [[3]] * 4

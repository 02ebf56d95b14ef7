"""The drill holds here, and each of its attacks succeeds where its defence is taken out: that row, and no other."""

from __future__ import annotations

import errno
import itertools
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from secure_fed.clients import acceptance
from secure_fed.clients.keyring import KeyRing
from secure_fed.clients.replica import Replica, RunFiles, Validation
from secure_fed.clients.site import Site
from secure_fed.core.errors import DrillError, KeyFileError, StorageError
from secure_fed.lab import drill
from secure_fed.lab.drill import ATTACKS, Ground
from secure_fed.protocol import pads, round_frames
from secure_fed.protocol.records import Chain
from secure_fed.server import acknowledgements, coordinator, gate
from secure_fed.server.coordinator import Coordinator
from secure_fed.transport.connection import SignedRequest
from tests.conftest import Run

Mutate = Callable[[pytest.MonkeyPatch], None]


class _SealsLate:
    """What a site had before it asked for its key first: it finds out when it seals."""

    def seal(self, *_: object) -> None:
        raise KeyFileError("no key")


def _as_if_signed(headers: Mapping[bytes, bytes], method: str, path: str, site: str, key: object) -> SignedRequest:
    return SignedRequest(site, method, path, int(headers[b"content-length"]), "0" * 64, 0)


def _seals_last(patch: pytest.MonkeyPatch) -> None:
    true, sealer = KeyRing.may_begin, Replica.sealer
    patch.setattr(KeyRing, "may_begin", lambda ring, key: not ring.holds(key) or true(ring, key))
    run_of = Replica._run_of
    patch.setattr(
        Replica, "_run_of", lambda self, key, but: None if self.keys.newest[1] == key else run_of(self, key, but)
    )
    held = sealer.fget
    assert held is not None
    patch.setattr(
        Replica, "sealer", property(lambda self: held(self) if self._holds(self.state.chain.key) else _SealsLate())
    )


def _any_cohort(patch: pytest.MonkeyPatch, with_budget: bool) -> None:
    """Sites with a budget, or those without one, reveal to any cohort."""
    refuse = Site._refuse_another_cohort

    def refuses(site: Site, *asked: Any) -> None:
        if (site._private is not None) != with_budget:
            refuse(site, *asked)

    patch.setattr(Site, "_refuse_another_cohort", refuses)


MUTATIONS: dict[str, Mutate] = {
    "B1": lambda patch: patch.setattr(Replica, "require_word", lambda *_: None),
    "B2": _seals_last,
    "B3": lambda patch: patch.setattr(Chain, "_check_sum", lambda *_: None),
    "B4": lambda patch: patch.setattr(Site, "_sits_out", False),
    "B5": lambda patch: patch.setattr(Replica, "_refuse_within_round", lambda *_: None),
    "B6": lambda patch: patch.setattr(
        Coordinator, "paused", property(lambda self: bool(self._refusing) and self._waiting_amendment() is None)
    ),
    "B7": lambda patch: patch.setattr(Replica, "paused", False),
    "B7.1": lambda patch: patch.setattr(Site, "_refuse_taking_back", lambda *_: None),
    "B7.2": lambda patch: _any_cohort(patch, with_budget=False),
    "B7.3": lambda patch: patch.setattr(Coordinator, "_checks_hold", lambda _: True),
    "B7.4": lambda patch: _any_cohort(patch, with_budget=True),
    "B8": lambda patch: patch.setattr(acknowledgements, "_adapter", lambda _: ""),
    "B9": lambda patch: patch.setattr(Validation, "clamped", lambda counts, _: counts),
    "B10": lambda patch: patch.setattr(round_frames, "refuse_cohort", lambda *_: None),
    "B11": lambda patch: patch.setattr(gate, "read_signed_request", _as_if_signed),
    "B12": lambda patch: patch.setattr(acceptance, "weaker", lambda *_: []),
    "B13": lambda patch: patch.setattr(coordinator, "refuse_repeated_seed", lambda *_: None),
    "B14": lambda patch: patch.setattr(pads.SitePads, "_pad_keys", lambda _: ([], [])),
    "B15": lambda patch: patch.setattr(pads, "mask_key", lambda *_: bytes(32)),
    "B16": lambda patch: patch.setattr(Site, "_refuse_past", lambda *_: None),
    "B17": lambda patch: patch.setattr(Site, "_refuse_second_sum", lambda *_: None),
    "B18": lambda patch: patch.setattr(Site, "_refuse_share", lambda *_: None),
    "B19": lambda patch: patch.setattr(RunFiles, "erase_pads", lambda *_: None),
}


@pytest.fixture(scope="module")
def grounds(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Ground]:
    folder = tmp_path_factory.mktemp("drill")
    return {pads: Ground.prepare(folder / f"ground-{int(pads)}", pads) for pads in (False, True)}


def test_every_attack_has_a_mutation() -> None:
    assert set(MUTATIONS) == {attack.id for attack in ATTACKS}


def test_all_defences_hold(secfacmic: Run, grounds: dict[bool, Ground], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drill.Ground, "prepare", lambda folder, pads: grounds[pads])
    done = secfacmic("drill", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [row["id"] for row in found["attacks"]] == [attack.id for attack in ATTACKS]
    assert all(set(row) == {"id", "attacker", "tried", "seen", "held"} for row in found["attacks"])
    assert [row["id"] for row in found["attacks"] if not row["held"]] == []


def test_a_full_disk_has_held_nothing_off() -> None:
    """The attack would have been refused by no defence; taken for one, it would have been seen to hold."""
    full = mock.Mock(side_effect=StorageError("no room"))
    with pytest.raises(StorageError, match="no room"):
        drill._refused({"an attack": full})
    assert drill._refused({"an attack": mock.Mock(side_effect=KeyFileError("no key"))}).held


@pytest.mark.slow
@pytest.mark.parametrize("writes", [0, 4, 12])
@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.id)
def test_an_attack_that_a_full_disk_ends_is_not_held_off(
    attack: drill.Attack, writes: int, grounds: dict[bool, Ground], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true, done = os.replace, itertools.count()

    def full(*names: Any) -> None:
        if next(done) >= writes:
            raise OSError(errno.ENOSPC, "No space left on device")
        true(*names)

    ground = grounds[attack.pads].copy(tmp_path / attack.id)
    monkeypatch.setattr(os, "replace", full)
    try:
        attack.carry_out(ground)
    except StorageError:
        return
    assert next(done) <= writes  # it had all that it needed


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.id)
def test_an_attack_succeeds_without_its_defence(
    attack: drill.Attack, grounds: dict[bool, Ground], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    MUTATIONS[attack.id](monkeypatch)
    outcome = attack.carry_out(grounds[attack.pads].copy(tmp_path / attack.id))
    assert not outcome.held, outcome.seen


@pytest.mark.slow
@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.id)
def test_no_other_attack_succeeds_without_it(
    attack: drill.Attack, grounds: dict[bool, Ground], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    MUTATIONS[attack.id](monkeypatch)
    fallen = []
    for each in ATTACKS:
        outcome = each.carry_out(grounds[each.pads].copy(tmp_path / each.id))
        if not outcome.held:
            fallen.append((each.id, outcome.seen))
    assert [name for name, _ in fallen] == [attack.id], fallen


def test_a_fallen_defence_is_an_exit_code(
    secfacmic: Run, grounds: dict[bool, Ground], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drill.Ground, "prepare", lambda folder, pads: grounds[pads])
    MUTATIONS["B12"](monkeypatch)
    monkeypatch.setattr(drill, "ATTACKS", tuple(attack for attack in ATTACKS if attack.id == "B12"))
    done = secfacmic("drill")
    assert done.returncode == DrillError.exit_code
    assert "1 of 1 attacks succeeded: B12" in done.stderr

"""The ledger: what it refuses, what it survives, and that its figures can be recomputed by anyone."""

from __future__ import annotations

import errno
import json
import math
import multiprocessing
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secure_fed.core.errors import (
    BudgetError,
    KeyFileError,
    LedgerError,
    LedgerRollbackError,
    SecfacmicError,
    StorageError,
)
from secure_fed.privacy import ledger as module
from secure_fed.privacy.accounting import Mechanism, epsilon_of
from secure_fed.privacy.ledger import (
    CLOSED,
    NO_MEANS,
    Account,
    Ledger,
    MeanReleases,
    Plan,
    opened,
    read_older,
    restore,
)
from secure_fed.protocol.ledger_heads import MAX_LINKS, NO_LEDGER, LedgerHeads

ACCOUNT = Account(site="ash", identity="1" * 64, unit="patient", data="patients", epsilon=3.0, delta=1e-5)
ROUND = Mechanism(1.0, 10.0, 4)
RUN, STUDY = "r" * 64, "5" * 64


def patients(*names: str) -> dict[str, frozenset[bytes]]:
    return {name: frozenset({name.encode() * 8}) for name in names}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Ledger.create(tmp_path / "privacy", ACCOUNT)
    return tmp_path / "privacy"


def spend(folder: Path, times: int = 1, mechanism: Mechanism = ROUND) -> Ledger:
    ledger = Ledger(folder)
    ledger.register(patients("a", "b"))
    for number in range(times):
        event = ledger.reserve(mechanism, f"round {len(ledger.events)}", RUN, people(ledger, "a", "b"))
        ledger.commit([event.seq], b"output %d" % number, STUDY, RUN)
    return ledger


def people(ledger: Ledger, *names: str) -> set[str]:
    return {ledger.person(name) for name in names}


def spent_by(ledger: Ledger, name: str) -> float:
    """Squared mu that a patient has spent."""
    block = ledger._histories.block_of(ledger.person(name))
    assert block is not None
    return ledger.costs()[block]


def test_what_is_reserved_is_spent_and_anyone_can_recompute_it(folder: Path) -> None:
    spend(folder, 3)
    ledger = Ledger(folder)
    ledger.reserve(Mechanism(1.5, 30.0, 2), "never finished", RUN, people(ledger, "a", "b"))
    document = json.loads(json.dumps(Ledger(folder).summary()))
    assert {"epsilon_spent", "epsilon_budget", "delta", "unit", "events", "claim"} <= set(document)
    for event in document["events"]:
        names = {"seq", "block", "mechanism", "purpose", "sensitivity", "noise_std", "steps", "mu_squared", "state"}
        assert names <= set(event)
        assert event["mu_squared"] == event["steps"] * (event["sensitivity"] / event["noise_std"]) ** 2
    total = math.fsum(event["mu_squared"] for event in document["events"])
    assert document["epsilon_spent"] == epsilon_of(total, document["delta"]) > 0
    assert [event["state"] for event in document["events"]] == ["committed"] * 3 + ["reserved"]
    assert document["epsilon_budget"] == 3.0
    assert "(3, 1e-05)-differentially private" in document["claim"]
    assert "any one patient" in document["claim"]
    assert "imulated" not in document["claim"]


def test_figures_on_other_data_than_patients_are_labelled_simulated(tmp_path: Path) -> None:
    Ledger.create(tmp_path / "privacy", Account("ash", "1" * 64, "image", "public", 1.0, 1e-5))
    document = Ledger(tmp_path / "privacy").summary()
    assert document["simulated"]
    assert document["claim"].startswith("Simulated (public data)")
    assert "any one image" in document["claim"]


@given(parts=st.lists(st.tuples(st.floats(0.3, 3), st.floats(3, 60), st.integers(1, 9)), max_size=12))
@settings(max_examples=25, deadline=None)
def test_the_budget_is_never_exceeded_and_never_falls(
    parts: list[tuple[float, float, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("ledger") / "privacy"
    Ledger.create(folder, ACCOUNT)
    before = 0.0
    for part in parts:
        ledger = Ledger(folder)
        ledger.register(patients("a"))
        try:
            ledger.reserve(Mechanism(*part), "a release", RUN, people(ledger, "a"))
        except BudgetError:
            assert (
                epsilon_of(sum(e.mechanism.mu_squared for e in ledger.events) + Mechanism(*part).mu_squared, 1e-5) > 3
            )
        spent = Ledger(folder).epsilon_spent
        assert before <= spent <= 3.0
        before = spent


def test_a_budget_can_only_be_lowered(folder: Path) -> None:
    with opened(folder) as ledger, pytest.raises(BudgetError, match="can only be lowered"):
        ledger.agree(Account("ash", "1" * 64, "patient", "patients", 3.1, 1e-5))
    with opened(folder) as ledger:
        ledger.agree(Account("ash", "1" * 64, "patient", "patients", 2.0, 1e-5))
    assert Ledger(folder).account.epsilon == 2.0
    with opened(folder) as ledger, pytest.raises(BudgetError, match="this site's budget is 2"):
        ledger.agree(ACCOUNT)
    # Not even by an entry that verifies.
    Ledger(folder)._entries.append({"kind": "budget", "epsilon": 2.5})
    with pytest.raises(LedgerError, match="line 3 is of a kind or form"):
        Ledger(folder)


@pytest.mark.parametrize(
    ("field", "value"), [("delta", 1e-6), ("unit", "image"), ("data", "public"), ("site", "birch")]
)
def test_an_account_of_another_kind_is_refused(folder: Path, field: str, value: object) -> None:
    with opened(folder) as ledger, pytest.raises(BudgetError, match="the same for ever"):
        ledger.agree(Account(**{**ACCOUNT.__dict__, field: value}))


# --- blocks ---


def test_a_patients_history_is_its_own(folder: Path) -> None:
    ledger = Ledger(folder)
    ledger.register(patients("a", "b", "c"))
    ledger.reserve(ROUND, "all", RUN, people(ledger, "a", "b", "c"))
    ledger.reserve(ROUND, "two of them", RUN, people(ledger, "a", "b"))
    ledger = Ledger(folder)
    ledger.register(patients("a", "d"))
    ledger.reserve(ROUND, "one of them and a new one", RUN, people(ledger, "a", "d"))
    ledger = Ledger(folder)
    ledger.reserve(ROUND, "who was left behind", RUN, people(ledger, "c"))
    times = {name: round(spent_by(ledger, name) / ROUND.mu_squared, 9) for name in "abcd"}
    assert times == {"a": 3, "b": 2, "c": 2, "d": 1}
    assert [len(ledger.taken_part(name)) for name in "abcd"] == [3, 2, 2, 1]
    limit = 0.5171 - 2.5 * ROUND.mu_squared
    assert ledger.able(people(ledger, *"abcd"), limit) == people(ledger, *"bcd")
    with pytest.raises(BudgetError, match="1 patients cannot pay"):
        ledger.reserve(Mechanism(1.0, 10.0, 41), "too much", RUN, people(ledger, *"abcd"))


def test_the_same_patients_again_write_nothing(folder: Path) -> None:
    Ledger(folder).register(patients("a", "b"))
    length = len((folder / "blocks.jsonl").read_bytes().splitlines())
    Ledger(folder).register(patients("a", "b"))
    assert len((folder / "blocks.jsonl").read_bytes().splitlines()) == length


def test_no_registration_changes_what_others_can_pay(folder: Path) -> None:
    """A spent patient with copies of everybody's pictures takes nobody along."""
    ledger = Ledger(folder)
    ledger.register({"p": {b"a", b"b", b"c"}})
    ledger.reserve(Mechanism(1.0, 1.5, 1), "all it had", RUN, people(ledger, "p"))
    ledger.register({"p": {b"a", b"b", b"c"}, "a": {b"a"}, "b": {b"b"}, "c": {b"c"}})
    assert ledger.able(people(ledger, "p", "a", "b", "c"), 0.5) == people(ledger, "a", "b", "c")


def test_equal_pictures_under_two_ids_are_told_until_they_are_settled(folder: Path) -> None:
    ledger = Ledger(folder)
    first = {"a": {b"same"}, "b": {b"same", b"other"}, "c": {b"third"}}
    ledger.register(first)
    assert ledger.unsettled(first) == [("a", "b")]
    ledger.distinct("b", "a")
    assert Ledger(folder).unsettled(first) == []
    # A new export under new pseudonyms, of whom nobody knows the old ones any more.
    renamed = {"x": {b"third"}}
    ((patient, other),) = Ledger(folder).unsettled(renamed)
    assert (patient, other[0], len(other)) == ("x", "#", 13)
    ledger = Ledger(folder)
    ledger.register(renamed)
    ledger.reserve(ROUND, "under the old name", RUN, people(ledger, "c"))
    ledger.reserve(Mechanism(1.0, 20.0, 4), "under the new one", RUN, people(ledger, "x"))
    ledger.link("x", other)
    ledger = Ledger(folder)
    assert ledger.unsettled(renamed) == []
    assert ledger.person("x") == ledger.person("c")
    assert spent_by(ledger, "x") == pytest.approx(ROUND.mu_squared + 0.01)
    with pytest.raises(LedgerError, match="one patient here already"):
        ledger.link("c", "x")
    with pytest.raises(LedgerError, match="never taken back"):
        ledger.distinct("c", "x")
    with pytest.raises(LedgerError, match="nobody: no patient of that id"):
        ledger.link("c", "nobody")


def test_ids_that_are_taken_for_another_one_are_told_while_what_was_spent_on_them_is_not_added(folder: Path) -> None:
    """Their new pictures go by another's name, who has not paid what they have."""
    ledger = Ledger(folder)
    ledger.register(patients("a", "b", "c"))
    ledger.reserve(ROUND, "under its own name", RUN, people(ledger, "b"))
    ledger.distinct("a", "b")  # that was said before it was known better
    ledger = Ledger(folder)
    assert ledger.halves({"b": "a", "c": "a", "never seen": "a"}) == [("b", "a")]
    ledger.link("b", "a")
    assert Ledger(folder).halves({"b": "a", "c": "a", "never seen": "a"}) == []


def test_who_was_in_one_release_under_two_ids_has_spent_four_times_its_cost(folder: Path) -> None:
    """It moved the sum by twice as much as anybody else."""
    ledger = spend(folder)
    ledger.link("a", "b")
    assert spent_by(ledger, "a") == pytest.approx(4 * ROUND.mu_squared)
    assert spent_by(Ledger(folder), "b") == pytest.approx(4 * ROUND.mu_squared)


def test_a_link_that_exceeds_the_budget_puts_the_patient_out(folder: Path) -> None:
    ledger = Ledger(folder)
    ledger.register(patients("a", "b"))
    for name in "ab":
        ledger.reserve(Mechanism(1.0, 1.6, 1), f"nearly all of {name}", RUN, people(ledger, name))
    assert ledger.link("a", "b") > 3.0
    assert ledger.able(people(ledger, "a", "b"), 0.0) == set()


def older_ledger(folder: Path, spent: dict[str, float], together: float = 0.0, **changes: Any) -> None:
    """A ledger as version 0.1 left it: blocks of patients, one event for each, and perhaps one of all."""
    from secure_fed.privacy.chain_file import ChainFile
    from secure_fed.privacy.histories import keyed_hash
    from secure_fed.privacy.ledger import _derive

    folder.mkdir(parents=True)
    secret = os.urandom(32)
    (folder / "ledger.key").write_text(secret.hex() + "\n")
    (folder / "ledger.key").chmod(0o600)
    entries = ChainFile(folder / "ledger.jsonl", _derive(secret, "mac"))
    registry = ChainFile(folder / "blocks.jsonl", _derive(secret, "mac"))
    key = _derive(secret, "hash")
    opening = {"site": "ash", "unit": "patient", "adjacency": "add or remove one", "data": "patients"} | changes
    entries.append({"kind": "open", "delta": 1e-5, "epsilon": 3.0} | opening)
    for block, (name, mu_squared) in enumerate(spent.items(), 1):
        units, images = [keyed_hash(key, "unit", name.encode())], [keyed_hash(key, "image", f"file {name}".encode())]
        registry.append({"block": block, "units": units, "images": images, "trains": True})
        event = {"blocks": [block], "mechanism": "gaussian", "purpose": "round", "sensitivity": 1.0}
        event |= {"noise_std": mu_squared**-0.5, "steps": 1, "sampling_rate": 1.0}
        entries.append({"kind": "reserve", **event, "registry": list(registry.head)})
    if together:
        event |= {"blocks": list(range(1, len(spent) + 1)), "noise_std": together**-0.5}
        entries.append({"kind": "reserve", **event, "registry": list(registry.head)})


def test_adopted_ledgers_add_to_each_patients_history(folder: Path, tmp_path: Path) -> None:
    older_ledger(tmp_path / "one", {"a": 0.1, "b": 0.2})
    older_ledger(tmp_path / "two", {"a": 0.05})
    ledger = Ledger(folder)
    for name in ("one", "two"):
        ledger.adopt(read_older(tmp_path / name))
    ledger.register({"a": {b"pa"}, "b2": {b"pb"}, "c": {b"pc"}}, {"b2": {b"file b"}})
    spent = {name: round(spent_by(Ledger(folder), name), 9) for name in ("a", "b2", "c")}
    assert spent == {"a": 0.15, "b2": 0.2, "c": 0.0}  # b is known by its file under another id
    with pytest.raises(LedgerError, match="was adopted before"):
        Ledger(folder).adopt(read_older(tmp_path / "one"))
    with pytest.raises(LedgerError, match=r"no ledger of version 0.1|cannot be read"):
        read_older(folder)
    facts = Ledger(folder).summary()
    assert sum(event["mu_squared"] for event in facts["events"]) == pytest.approx(0.35)


def test_a_ledger_that_is_adopted_late_adds_to_linked_ids_of_whom_one_is_gone(folder: Path, tmp_path: Path) -> None:
    older_ledger(tmp_path / "one", {"a": 0.1, "b": 0.2})
    older_ledger(tmp_path / "two", {"a": 0.05, "b": 0.01})
    ledger = Ledger(folder)
    ledger.adopt(read_older(tmp_path / "one"))
    ledger.register({"a": {b"pa"}, "b": {b"pb"}})
    ledger.link("a", "b")
    ledger.adopt(read_older(tmp_path / "two"))
    for present, total in (("a", 0.35), ("a", 0.35), ("b", 0.36), ("a", 0.36)):
        ledger = Ledger(folder)
        ledger.register({present: {b"pictures " + present.encode()}})
        assert spent_by(ledger, "a") == spent_by(Ledger(folder), "b") == pytest.approx(total)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("events", [True, False])
def test_who_was_in_one_release_of_an_adopted_ledger_under_two_ids_has_spent_four_times_its_cost(
    folder: Path, tmp_path: Path, late: bool, events: bool
) -> None:
    """As in the ledger's own releases; of an adoption by an older release at most, as it noted blocks alone."""
    older_ledger(tmp_path / "one", {"a": 0.1, "b": 0.2}, together=0.3)
    older = read_older(tmp_path / "one")
    if not events:
        del older.spent["events"]
    ledger = Ledger(folder)
    if not late:
        ledger.adopt(older)
    ledger.register({"a": {b"pa"}, "b": {b"pb"}})
    ledger.link("a", "b")
    if late:
        ledger.adopt(older)
    ledger.register({"a": {b"pa"}, "b": {b"pb"}})
    ledger = Ledger(folder)
    ledger.register({"b": {b"pb"}})
    total = 0.1 + 0.2 + 4 * 0.3 if events else (0.4**0.5 + 0.5**0.5) ** 2
    assert spent_by(ledger, "a") == spent_by(Ledger(folder), "b") == pytest.approx(total)
    # Once only, whatever comes later.
    older_ledger(tmp_path / "two", {"a": 0.05})
    ledger.adopt(read_older(tmp_path / "two"))
    ledger.register({"a": {b"pa"}})
    assert spent_by(Ledger(folder), "a") == pytest.approx(total + 0.05)


def test_what_files_of_several_old_blocks_tell_of_one_patient_is_not_forgotten_with_the_files(
    folder: Path, tmp_path: Path
) -> None:
    older_ledger(tmp_path / "one", {"a": 0.1, "b": 0.2})
    ledger = Ledger(folder)
    ledger.adopt(read_older(tmp_path / "one"))
    for file, total in ((b"file a", 0.1), (b"file b", 0.3), (b"file a", 0.3)):
        Ledger(folder).register({"x": {b"picture"}}, {"x": {file}})
        assert spent_by(Ledger(folder), "x") == pytest.approx(total)


@pytest.mark.parametrize(("field", "value"), [("site", "birch"), ("unit", "image"), ("delta", 1e-6)])
def test_what_is_not_this_sites_to_add_up_is_not_adopted(
    folder: Path, tmp_path: Path, field: str, value: str | float
) -> None:
    older_ledger(tmp_path / "one", {"a": 0.1}, **{field: value})
    before = (folder / "blocks.jsonl").read_bytes()
    with pytest.raises(LedgerError, match=f"has {field} = {value}, this one .* expected the same"):
        Ledger(folder).adopt(read_older(tmp_path / "one"))
    assert (folder / "blocks.jsonl").read_bytes() == before


def test_an_export_of_another_identity_is_not_restored(folder: Path, tmp_path: Path) -> None:
    export = spend(folder).export()
    with pytest.raises(LedgerError, match=r"of identity 1{16}; expected that of this site's identity 2{16}"):
        restore(tmp_path / "other", export, "2" * 64)
    assert not (tmp_path / "other" / "ledger.jsonl").exists()


def test_a_ledger_of_another_identity_is_refused(folder: Path) -> None:
    with opened(folder) as ledger, pytest.raises(LedgerError, match="identity 1111111111111111; expected that of this"):
        ledger.agree(Account(**{**ACCOUNT.__dict__, "identity": "2" * 64}))


def test_no_patient_id_and_no_digest_stands_in_the_files(folder: Path, tmp_path: Path) -> None:
    digest = bytes(range(32))
    Ledger(folder).register({"Jane Doe 1970-01-01": frozenset({digest})})
    content = b"".join(path.read_bytes() for path in folder.iterdir() if path.is_file())
    assert b"Jane" not in content
    assert digest.hex().encode() not in content
    # Whoever has no key cannot try ids either: another ledger writes the same patient otherwise.
    Ledger.create(tmp_path / "other", ACCOUNT)
    Ledger(tmp_path / "other").register({"Jane Doe 1970-01-01": frozenset({digest})})
    lines = [json.loads((one / "blocks.jsonl").read_bytes().splitlines()[0]) for one in (folder, tmp_path / "other")]
    assert len({unit for line in lines for unit in line["images"]}) == 2
    assert all(path.stat().st_mode & 0o077 == 0 for path in folder.glob("*.jsonl"))


# --- plans ---


def make_plan(ledger: Ledger, run: str, rounds: int, steps: int, *rest: object, epsilon: float | None = None) -> Plan:
    return ledger.make_plan(STUDY, run, ledger.account.declare(epsilon, 1), rounds, steps, 1.0, *rest)  # type: ignore[arg-type]


def test_a_plan_leaves_room_for_one_crash_and_no_more(folder: Path) -> None:
    ledger = Ledger(folder)
    plan = make_plan(ledger, RUN, 10, 4)
    assert plan.noise_multiplier == pytest.approx(math.sqrt(44 / 0.5171), rel=1e-3)
    ledger.register(patients("a"))
    for number in range(11):
        ledger.reserve(plan.round_mechanism, f"round {number}", RUN, people(ledger, "a"))
    assert 2.999 < ledger.epsilon_spent <= 3.0
    assert not ledger.able(people(ledger, "a"), plan.round_mechanism.mu_squared)
    assert Ledger(folder).plan(RUN) == plan


def test_a_plan_follows_from_the_declaration_alone(folder: Path, tmp_path: Path) -> None:
    """Whoever is registered, and whatever they have spent."""
    untouched = make_plan(Ledger(folder), RUN, 10, 4)
    Ledger.create(tmp_path / "used", ACCOUNT)
    used = spend(tmp_path / "used", 12)
    assert make_plan(used, RUN, 10, 4) == untouched


def test_a_run_costs_what_was_declared(folder: Path) -> None:
    ledger = Ledger(folder)
    assert ledger.account.declare(None, 1).epsilon == pytest.approx(3.0)
    half = ledger.account.declare(None, 2)
    assert half.mu_squared == pytest.approx(0.5171 / 2, rel=1e-3)
    plan = make_plan(ledger, RUN, 10, 4, epsilon=1.0)
    assert plan.noise_multiplier == pytest.approx(math.sqrt(44 / 0.0719), rel=1e-3)
    with pytest.raises(BudgetError, match=r"run_epsilon = 4.*epsilon 3"):
        ledger.account.declare(4.0, 1)


def test_as_many_runs_are_planned_as_share_the_budget(folder: Path) -> None:
    ledger = Ledger(folder)
    for run in "ab":
        ledger.make_plan(STUDY, run * 64, ledger.account.declare(None, 2), 10, 4, 1.0)
    with pytest.raises(BudgetError, match=r"has planned 2 runs, as many as privacy.runs = 2"):
        ledger.make_plan(STUDY, "c" * 64, ledger.account.declare(None, 2), 10, 4, 1.0)
    ledger.make_plan(STUDY, "c" * 64, ledger.account.declare(3.0, 2), 10, 4, 1.0)  # for whoever can pay


@pytest.mark.parametrize(("once", "each_round"), [(2, False), (1, False), (1, True), (0, True)])
def test_released_means_are_planned_for_or_left_out(folder: Path, once: int, each_round: bool) -> None:
    ledger = Ledger(folder)
    asked: list[float] = []
    plan = make_plan(ledger, RUN, 10, 4, MeanReleases("any", once, each_round, lambda noise: asked.append(noise)))
    # 12 % of a budget of epsilon 3: 4, made once; as much for eleven releases, one a round and one more.
    assert asked[0] == pytest.approx(4.01 * (11**0.5 if each_round else 1), rel=0.005)
    assert plan.lmmd_noise_multiplier == (pytest.approx(4.01, abs=0.02) if once else None)
    assert plan.lmmd_round_noise_multiplier == (pytest.approx(asked[0]) if each_round else None)
    assert plan.lmmd_note.startswith("on (any): ")
    assert plan.noise_multiplier**-2 * 44 == pytest.approx((1 - 0.12 * (once + each_round)) * 0.5171, rel=1e-3)
    # All of it, and one round more, is paid for; nothing is left.
    ledger.register(patients("a"))
    everybody = people(ledger, "a")
    for _ in range(once):
        ledger.reserve(Mechanism(1.0, plan.lmmd_noise_multiplier or 0, 1), "once", RUN, everybody)
    for _ in range(11):
        ledger.reserve(plan.round_mechanism, "round", RUN, everybody)
        if plan.lmmd_round_noise_multiplier is not None:
            ledger.reserve(Mechanism(1.0, plan.lmmd_round_noise_multiplier, 1), "each round", RUN, everybody)
    assert 2.999 < ledger.epsilon_spent <= 3.0


def test_means_that_are_not_worth_it_are_left_out(folder: Path) -> None:
    plan = make_plan(Ledger(folder), RUN, 10, 4, MeanReleases("any", 2, False, lambda noise: "off: too few"))
    assert (plan.lmmd_noise_multiplier, plan.lmmd_round_noise_multiplier) == (None, None)
    assert plan.lmmd_note == "off: too few"
    assert plan.noise_multiplier**-2 * 44 == pytest.approx(0.5171, rel=1e-3)


def test_validation_is_planned_on_the_validation_patients_own_budget(folder: Path) -> None:
    ledger = Ledger(folder)
    plan = make_plan(ledger, RUN, 10, 4, NO_MEANS, (5, 10))
    assert plan.noise_multiplier**-2 * 44 == pytest.approx(0.5171, rel=1e-3)  # training pays nothing for it
    assert plan.validation_noise_multiplier == pytest.approx(math.sqrt(3 / 0.5171), rel=1e-3)
    assert plan.validation_note.startswith("on: after rounds 5, 10 at noise multiplier 2.41")
    ledger.register(patients("a", "v"))
    for _ in range(3):
        release = Mechanism(1.0, plan.validation_noise_multiplier or 0, 1)
        ledger.reserve(release, "counts", RUN, people(ledger, "v"))
    assert (spent_by(ledger, "a"), 2.999 < ledger.epsilon_spent <= 3.0) == (0.0, True)


# --- tampering ---


def test_an_event_has_one_output(folder: Path) -> None:
    ledger = spend(folder)
    with pytest.raises(LedgerError, match="one draw an event"):
        ledger.commit([ledger.events[0].seq], b"another")
    with pytest.raises(LedgerError, match="not in this ledger"):
        ledger.commit([99], b"another")


@pytest.mark.parametrize("name", ["ledger.jsonl", "blocks.jsonl", "ledger.key"])
def test_a_flipped_bit_anywhere_is_refused(folder: Path, name: str) -> None:
    spend(folder, 2)
    path = folder / name
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for position in {0, len(whole) - 1, *rng.integers(0, len(whole), 120).tolist()}:
        for bit in (0, 5) if name == "ledger.jsonl" else (int(rng.integers(8)),):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << bit
            path.write_bytes(damaged)
            if name == "ledger.key" and bytes(damaged).lower().strip() == whole.strip():
                continue  # the same key in capitals, or with other white space at its end
            with pytest.raises((LedgerError, KeyFileError)):
                Ledger(folder)
    path.write_bytes(whole)
    Ledger(folder)


@pytest.mark.parametrize("name", ["ledger.jsonl", "blocks.jsonl", "ledger.key"])
def test_a_missing_file_is_refused_and_never_begun_anew(folder: Path, name: str) -> None:
    spend(folder)
    (folder / name).unlink()
    with pytest.raises((LedgerError, KeyFileError), match="cannot be read"):
        Ledger(folder)
    with pytest.raises(LedgerError, match="never replaced"):
        Ledger.create(folder, ACCOUNT)


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: lines[:2] + lines[3:],
        lambda lines: [lines[0], lines[2], lines[1], *lines[3:]],
        lambda lines: [*lines, lines[-1]],
        lambda lines: lines[1:],
        lambda lines: [],
    ],
    ids=["one taken out", "two exchanged", "one twice", "the first gone", "emptied"],
)
def test_lines_in_another_order_are_refused(folder: Path, change: Callable[[list[bytes]], list[bytes]]) -> None:
    spend(folder, 2)
    path = folder / "ledger.jsonl"
    path.write_bytes(b"".join(change(path.read_bytes().splitlines(keepends=True))))
    with pytest.raises(LedgerError):
        Ledger(folder)


def test_a_line_of_a_copy_that_ran_beside_does_not_fit(folder: Path, tmp_path: Path) -> None:
    """Its MAC and its number are right; the line that it names as the one before is another."""
    spend(folder)
    shutil.copytree(folder, tmp_path / "copy")
    spend(folder)
    spend(tmp_path / "copy")
    own, other = ((one / "ledger.jsonl").read_bytes().splitlines(keepends=True) for one in (folder, tmp_path / "copy"))
    (folder / "ledger.jsonl").write_bytes(b"".join([*own[:-1], other[-1]]))
    with pytest.raises(LedgerError, match=f"line {len(own)} does not verify"):
        Ledger(folder)


def test_an_older_registry_under_a_newer_ledger_is_refused(folder: Path) -> None:
    ledger = spend(folder)
    old = (folder / "blocks.jsonl").read_bytes()
    ledger.register(patients("c"))
    ledger.reserve(ROUND, "with c", RUN, people(ledger, "a", "b", "c"))
    (folder / "blocks.jsonl").write_bytes(old)
    with pytest.raises(LedgerError, match="the ledger has seen line 4"):
        Ledger(folder)


def test_the_files_of_another_ledger_are_refused(folder: Path, tmp_path: Path) -> None:
    spend(folder)
    Ledger.create(tmp_path / "other", ACCOUNT)
    for name in ("ledger.jsonl", "ledger.key"):
        shutil.copy(tmp_path / "other" / name, tmp_path / name)
    whole = (folder / "ledger.jsonl").read_bytes()
    shutil.copy(tmp_path / "ledger.jsonl", folder / "ledger.jsonl")
    with pytest.raises(LedgerError, match="does not verify"):
        Ledger(folder)
    (folder / "ledger.jsonl").write_bytes(whole)
    shutil.copy(tmp_path / "ledger.key", folder / "ledger.key")  # a changed key: of MACs and of patients' hashes
    with pytest.raises(LedgerError, match="does not verify"):
        Ledger(folder)


def test_a_key_that_others_can_read_is_refused(folder: Path) -> None:
    os.chmod(folder / "ledger.key", 0o644)
    with pytest.raises(KeyFileError, match="0600"):
        Ledger(folder)


def travel(folder: Path, heads: LedgerHeads, times: int = 1) -> None:
    """Rounds whose heads a server takes."""
    for _ in range(times):
        ledger = spend(folder)
        sent = ledger.travelling(STUDY, heads.newest("ash")[0])
        heads.check("ash", sent)
        heads.keep({"ash": sent})


def test_an_older_copy_is_noticed_by_whoever_keeps_heads(folder: Path, tmp_path: Path) -> None:
    heads = LedgerHeads(tmp_path / "heads.json")
    first = spend(folder).travelling(STUDY, 0)
    shutil.copytree(folder, tmp_path / "copy")
    heads.keep({"ash": first})
    second = spend(folder).travelling(STUDY, first.seq)
    assert second.links == ((first.seq, first.head[:16]),)
    heads.check("ash", second)
    heads.keep({"ash": second})
    reopened = LedgerHeads(tmp_path / "heads.json")
    reopened.check("ash", second)
    with pytest.raises(LedgerRollbackError, match="older copy"):
        reopened.check("ash", first)
    # A copied folder that runs on its own reaches the same number under another head.
    twin = spend(tmp_path / "copy").travelling(STUDY, first.seq)
    assert twin.seq == second.seq
    with pytest.raises(LedgerRollbackError, match="runs twice"):
        reopened.check("ash", twin)
    assert not Ledger(tmp_path / "copy").holds(STUDY, second.seq, second.head)
    assert Ledger(folder).holds(STUDY, second.seq, second.head)
    with pytest.raises(LedgerRollbackError):
        reopened.check("ash", NO_LEDGER)  # differential privacy turned off
    reopened.check("birch", NO_LEDGER)


@given(
    shared=st.integers(1, 3), true=st.integers(1, 4), forked=st.integers(1, 6), known=st.booleans(), plans=st.booleans()
)
@settings(max_examples=40, deadline=None)
def test_a_copy_that_has_grown_is_noticed_however_both_have_grown(
    tmp_path_factory: pytest.TempPathFactory, shared: int, true: int, forked: int, known: bool, plans: bool
) -> None:
    """A fork is never taken, whether it is shorter, as long or longer, and whatever its journal shows it."""
    tmp_path = tmp_path_factory.mktemp("fork")
    folder, copy = tmp_path / "privacy", tmp_path / "copy"
    Ledger.create(folder, ACCOUNT)
    heads = LedgerHeads(tmp_path / "heads.json")
    small = Mechanism(1.0, 100.0, 1)
    for _ in range(shared):
        ledger = spend(folder, 1, small)
        heads.keep({"ash": ledger.travelling(STUDY, 0)})
    shutil.copytree(folder, copy)
    for _ in range(true):
        ledger = spend(folder, 1, small)
        sent = ledger.travelling(STUDY, heads.newest("ash")[0])
        heads.check("ash", sent)
        heads.keep({"ash": sent})
    for number in range(forked):
        if plans and number == 0:
            make_plan(Ledger(copy), "f" * 64, 3, 1)
        ledger = spend(copy, 1, small)
    with pytest.raises(LedgerRollbackError):
        heads.check("ash", ledger.travelling(STUDY, heads.newest("ash")[0] if known else 0))


def test_a_restored_export_that_has_grown_is_noticed(folder: Path, tmp_path: Path) -> None:
    heads = LedgerHeads(tmp_path / "heads.json")
    travel(folder, heads)
    export = Ledger(folder).export()
    travel(folder, heads, 2)
    shutil.rmtree(folder)
    restore(folder, export, ACCOUNT.identity)
    (folder / CLOSED).unlink()  # by hand, against what it is for
    grown = spend(folder, 6)
    assert grown.sent(STUDY) > heads.newest("ash")[0]
    with pytest.raises(LedgerRollbackError, match=r"does not name|names [0-9a-f]{16} as its entry"):
        heads.check("ash", grown.travelling(STUDY, heads.newest("ash")[0]))


def test_the_true_ledger_is_never_taken_for_a_copy(folder: Path, tmp_path: Path) -> None:
    """Several servers, each following some of the runs to their end, updates that never arrived, budgets lowered."""
    servers = [LedgerHeads(tmp_path / f"heads{number}.json") for number in range(3)]
    small = Mechanism(1.0, 1000.0, 1)
    own = LedgerHeads(tmp_path / "own.json")
    for run, server in enumerate([0, 1, 0, 2, 1, 0, 0, 2]):
        ledger = Ledger(folder)
        ledger.register(patients("a", "b"))
        make_plan(ledger, f"{run:064d}", 4, 1, epsilon=0.1)
        for number in range(4):
            ledger = spend(folder, 1, small)
            if run == 3 and number == 1:
                ledger.agree(Account(**{**ACCOUNT.__dict__, "epsilon": 2.9}))
            sent = ledger.travelling(STUDY, own.newest("ash")[0])
            assert sent.links == tuple(sorted(sent.links))
            assert len(sent.links) <= MAX_LINKS
            servers[server].check("ash", sent)
            if number == 3 and run in (2, 5):
                continue  # too late: no server ever took it
            servers[server].keep({"ash": sent})
            own.keep({"ash": sent})


def test_heads_tell_nothing_of_the_content(tmp_path: Path) -> None:
    """Two ledgers that did the same have other heads: a salt hides what was written."""
    found = set()
    for name in ("one", "two"):
        Ledger.create(tmp_path / name, ACCOUNT)
        ledger = Ledger(tmp_path / name)
        assert ledger.head[0] == 1
        found.add(ledger.head[1])
    assert len(found) == 2
    # New patients change no number that leaves the site.
    ledger.register(patients("a"))
    before = ledger.head
    ledger.register(patients("b", "c"))
    assert ledger.head == before


# --- processes and disks ---


def _hold(folder: str, ready: object, done: object) -> None:
    with opened(Path(folder)):
        ready.set()  # type: ignore[attr-defined]
        done.wait(20)  # type: ignore[attr-defined]


def test_two_processes_cannot_hold_a_ledger(folder: Path) -> None:
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(str(folder), ready, done))
    process.start()
    assert ready.wait(20)
    try:
        with pytest.raises(StorageError, match="another process"), opened(folder):
            pass
    finally:
        done.set()
        process.join()
    with opened(folder):
        pass


def test_a_folder_that_cannot_be_written_is_told_as_that(folder: Path) -> None:
    read_only = OSError(errno.EROFS, os.strerror(errno.EROFS))
    with (
        mock.patch("secure_fed.core.storage.open", side_effect=read_only, create=True),
        pytest.raises(StorageError, match=r"cannot be held \(Read-only file system\)"),
        opened(folder),
    ):
        pass


def test_a_full_disk_spends_nothing_and_changes_nothing(folder: Path) -> None:
    ledger = spend(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with (
        mock.patch("secure_fed.core.storage.os.fsync", side_effect=OSError(errno.ENOSPC, "No space left on device")),
        pytest.raises(StorageError, match="No space left"),
    ):
        ledger.reserve(ROUND, "round", RUN, people(ledger, "a", "b"))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert len(ledger.events) == 1
    ledger.reserve(ROUND, "round", RUN, people(ledger, "a", "b"))
    assert len(Ledger(folder).events) == 2


def test_no_clock_is_read() -> None:
    assert "time" not in vars(module)
    assert "datetime" not in vars(module)


# --- export and restore ---


def test_an_export_restores_a_lost_ledger_closed(folder: Path) -> None:
    ledger = spend(folder, 2)
    export, head, spent = ledger.export(), ledger.head, ledger.epsilon_spent
    shutil.rmtree(folder)
    restored = restore(folder, export, ACCOUNT.identity)
    assert (restored.head, restored.epsilon_spent) == (head, spent)
    assert (folder / CLOSED).exists()
    assert spent_by(Ledger(folder), "a") == pytest.approx(2 * ROUND.mu_squared)
    assert not list(folder.glob(".*"))


def test_an_interrupted_restore_leaves_the_ledger_closed(folder: Path) -> None:
    export = spend(folder).export()
    shutil.rmtree(folder)
    real = module.write_durable

    def full(path: Path, data: bytes, mode: int) -> None:
        if path == folder / "ledger.key":
            raise StorageError("No space left on device")
        real(path, data, mode)

    with mock.patch.object(module, "write_durable", full), pytest.raises(StorageError):
        restore(folder, export, ACCOUNT.identity)
    assert (folder / CLOSED).exists()


def test_a_damaged_ledger_is_replaced_and_a_whole_newer_one_is_not(folder: Path) -> None:
    export = spend(folder).export()
    spend(folder)
    with pytest.raises(LedgerError, match="never goes back"):
        restore(folder, export, ACCOUNT.identity)
    assert len(Ledger(folder).events) == 2
    for broken in (b"broken\n", b"[" * 9000 + b"\n"):
        (folder / "ledger.jsonl").write_bytes(broken)
        restore(folder, export, ACCOUNT.identity)
    assert len(Ledger(folder).events) == 1


@pytest.mark.parametrize("export", [b"", b"{}", b"[1]", b'{"files": {"ledger.jsonl": 3}}', b"\xff", b"[" * 9000])
def test_what_is_no_export_is_refused(folder: Path, export: bytes) -> None:
    with pytest.raises(LedgerError, match="cannot be read"):
        restore(folder, export, ACCOUNT.identity)
    Ledger(folder)


def test_a_changed_export_is_refused_and_changes_nothing(folder: Path) -> None:
    export = spend(folder).export()
    (folder / "ledger.jsonl").write_bytes(b"broken\n")
    changed = export.replace(b"committed", b"x").replace(b'\\"noise_std\\":10', b'\\"noise_std\\":90')
    with pytest.raises(SecfacmicError):
        restore(folder, changed, ACCOUNT.identity)
    assert (folder / "ledger.jsonl").read_bytes() == b"broken\n"
    assert not (folder / CLOSED).exists()
    assert not list(folder.glob(".*"))

"""One sum under a budget: one release, paid once, whatever happens in between."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import safetensors.numpy

from secure_fed.clients import acceptance
from secure_fed.clients.acceptance import terms
from secure_fed.clients.learner import Learner
from secure_fed.clients.sitefile import read_site_file
from secure_fed.core.errors import EnvelopeError, GuardError, LedgerRollbackError, StorageError
from secure_fed.privacy import class_statistics
from secure_fed.privacy.accounting import plan_noise
from secure_fed.protocol import aggregation, codec, one_sum
from secure_fed.protocol.envelope import MAGIC, MAX_HEADER
from secure_fed.protocol.quorum import Quorum, quorum
from secure_fed.protocol.rounds import ReplyCode
from secure_fed.protocol.signing import split_frame
from tests.conftest import TRAINING, Federation, copy_of, exchange, pass_step, prepare_sites, run_round
from tests.integration.test_dp_site import begin, ledger_of, set_budget
from tests.integration.test_one_sum import one_sum_template

EPSILON = 8.0
"""At which fifteen patients of a class stand out of the noise."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    folder = prepare_sites(one_sum_template(mode="plain"), tmp_path_factory.mktemp("private-sum"), images)
    set_budget(folder, "ash", EPSILON)
    return folder


@pytest.fixture
def study(made: Path, tmp_path: Path) -> Federation:
    return copy_of(made, tmp_path)


def stored(site: Any) -> np.ndarray:
    path = next(site.replica.files.folder.outbox.glob("*.noised"))
    return np.asarray(safetensors.numpy.load(path.read_bytes())["integers"])


def test_one_release_spends_the_budget_once_and_the_second_round_nothing(
    study: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    sites = [study.site(name) for name in TRAINING]
    coordinator = begin(study)
    run_round(coordinator, sites)
    facts = ledger_of(study).summary()
    assert [event["state"] for event in facts["events"]] == ["committed"]
    std = plan_noise(EPSILON, 1e-5, 1) * class_statistics.SENSITIVITY
    assert facts["events"][0]["noise_std"] == pytest.approx(std, rel=1e-6)
    assert EPSILON - 0.01 < facts["epsilon_spent"] <= EPSILON
    pass_step(coordinator, sites)
    reply = sites[0].respond(coordinator.request(sites[0].name, sites[0].run, sites[0].position))
    second = split_frame(MAGIC, reply.envelope, MAX_HEADER, EnvelopeError).payload
    assert len(second) == 4 * study.agreed.layout(2).lanes.values
    assert not any(second)
    coordinator.receive(reply)
    run_round(coordinator, sites)
    for site in sites:
        exchange(coordinator, site)
    assert len({site.adapter_digest for site in sites}) == 1
    facts = ledger_of(study).summary()
    assert [event["state"] for event in facts["events"]] == ["sent"]
    assert [event["purpose"].partition(": ")[2] for event in facts["events"]] == ["class statistics, in one sum"]
    held = sites[1].replica.state.tensors
    assert held[f"{aggregation.MOMENT}noise"][0] == pytest.approx((std / 0.4) ** 2, abs=2**17 / 2**24)
    # Behind zeros nothing hides: of the other two, each would read the other's figures.
    assert not held[f"{aggregation.MOMENT}{one_sum.HISTOGRAMS}"].any()
    assert one_sum.Limits.of(sites[1].parameters) == one_sum.NO_LIMITS
    told = [one.getMessage() for one in caplog.records if "count no patients" in one.getMessage()]
    assert len(told) == 2
    assert "birch: round 2: 1 of 3 training sites have a budget" in told[0]
    assert "a cohort may then count those of 2 sites" in told[0]


@pytest.mark.parametrize(
    ("training", "paying", "least", "counts"),
    [(3, 0, 3, True), (3, 1, 3, False), (5, 1, 3, True), (5, 2, 3, False), (7, 2, 3, True), (7, 6, 3, False)],
)
def test_sites_count_patients_only_among_enough_that_do(training: int, paying: int, least: int, counts: bool) -> None:
    """Whichever cohort is chosen; an observer's name and a member that left make no difference."""
    names = [f"site-{number}" for number in range(training)]
    members = {name: SimpleNamespace(role="train") for name in names} | {"eye": SimpleNamespace(role="observer")}
    chain = SimpleNamespace(
        members=members,
        ledgers=dict.fromkeys([*names[:paying], "gone"], (1, "0" * 64)),
        quorum=Quorum(training, 1, 0, quorum(training, 1, least)),
    )
    site = SimpleNamespace(
        name=names[-1],
        replica=SimpleNamespace(state=SimpleNamespace(chain=chain), due=SimpleNamespace(round=2)),
        _agreed=SimpleNamespace(study=SimpleNamespace(min_sites=least)),
    )
    assert Learner._counted_among_others.fget(site) is counts  # type: ignore[attr-defined]


def test_a_sum_that_budgets_drown_is_told_to_all_and_the_study_stays_at_zero_shot(
    study: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    for name in TRAINING:
        set_budget(study.folder, name, 0.5)
    sites = [study.site(name) for name in TRAINING]
    coordinator = begin(study)
    for _ in range(2):
        run_round(coordinator, sites)
    for site in sites:
        exchange(coordinator, site)
    told = [one.getMessage() for one in caplog.records if "noise drowns the sum" in one.getMessage()]
    assert len(told) == len(TRAINING)
    assert "this study stays at zero-shot; take part with a larger epsilon" in told[0]
    digests = {codec.adapter_digest(site.parameters) for site in sites}
    assert digests == {codec.adapter_digest(study.agreed.initial.adapter)}


def test_what_leaves_is_the_noised_sum_and_is_drawn_once(study: Federation) -> None:
    site = study.site("ash")
    coordinator = begin(study)
    assert site.respond(coordinator.request(site.name, site.run, site.position)).code == ReplyCode.READY
    first = stored(site)
    again = study.site("ash")
    assert again.respond(study.reopen().request(again.name, again.run, again.position)).code == ReplyCode.READY
    assert np.array_equal(stored(again), first)
    assert len(ledger_of(study).events) == 1
    found = study.agreed.layout(1).decode(first, [1.0])
    assert np.abs(found[one_sum.FIRST]).max() > 1  # of 15 patients within the unit ball: noise


def test_a_crash_after_the_reservation_pays_and_the_site_retires(study: Federation) -> None:
    site = study.site("ash")
    coordinator = begin(study)
    with (
        mock.patch("secure_fed.clients.learner.rehearse"),
        mock.patch("secure_fed.clients.private_round.write_durable", side_effect=StorageError("disk full")),
        pytest.raises(StorageError),
    ):
        site.respond(coordinator.request(site.name, site.run, site.position))
    assert [event.state for event in ledger_of(study).events] == ["reserved"]
    again = study.site("ash")
    reply = again.respond(study.reopen().request(again.name, again.run, again.position))
    assert reply.code == ReplyCode.RETIRED
    assert ledger_of(study).epsilon_spent <= EPSILON


def test_an_older_ledger_that_was_put_back_is_refused_also_where_nothing_is_released(study: Federation) -> None:
    sites = [study.site(name) for name in TRAINING]
    folder = study.folder / "sites/ash/identity/ledger"
    shutil.copytree(folder, study.folder / "old")
    coordinator = begin(study)
    run_round(coordinator, sites)
    shutil.rmtree(folder)
    shutil.copytree(study.folder / "old", folder)
    site = study.site("ash")
    with pytest.raises(LedgerRollbackError, match="an older copy was put back"):
        exchange(coordinator, site)


def test_sums_that_fail_their_check_spend_nothing(study: Federation) -> None:
    site, coordinator = study.site("ash"), begin(study)
    with (
        mock.patch.object(class_statistics, "check_sums", side_effect=GuardError("as if a patient weighed twice")),
        mock.patch("secure_fed.clients.learner.rehearse"),
        pytest.raises(GuardError, match="weighed twice"),
    ):
        site.respond(coordinator.request(site.name, site.run, site.position))
    assert not ledger_of(study).events


def test_a_second_run_finds_nothing_left_and_reads_no_data(study: Federation) -> None:
    sites = [study.site(name) for name in TRAINING]
    run_round(begin(study), sites)
    site = study.site("ash")
    set_budget(study.folder, "ash", EPSILON, runs=1)
    site.features()
    site = study.site("ash")
    site.features()
    shutil.rmtree(study.folder / "data", ignore_errors=True)
    coordinator = begin(study)
    with mock.patch("secure_fed.clients.private_sums.one_sum.views", side_effect=AssertionError("data were read")):
        assert site.respond(coordinator.request(site.name, site.run, site.position)).code == ReplyCode.RETIRED


def test_no_noise_comes_from_a_seedable_generator(study: Federation) -> None:
    drawn = []
    for _ in range(2):
        folder = study.folder.parent / f"copy-{len(drawn)}"
        shutil.copytree(study.folder, folder, symlinks=True)
        copy = Federation(folder)
        np.random.seed(1)
        site = copy.site("ash")
        coordinator = begin(copy)
        site.respond(coordinator.request(site.name, site.run, site.position))
        drawn.append(stored(site))
    assert np.mean(drawn[0] != drawn[1]) > 0.5


def test_noise_beyond_the_bounds_is_no_reason_to_change_the_study(
    study: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    private, site = study.site("ash"), study.site("birch")
    coordinator = begin(study)
    values = one_sum.Sums(np.zeros(3), np.full((3, 16), 1e4), np.zeros((16, 16))).values()
    for each in (private, site):
        for data in coordinator.request(each.name, each.run, each.position).records:
            each.replica.take(data)
    with caplog.at_level("INFO"):
        private._encode(values)
        assert "by the noise that the budget asks for" in caplog.text
        assert "raise method.most_patients" not in caplog.text
        site._encode(values)
    assert "raise method.most_patients in the next study" in caplog.text


def test_noise_that_its_own_variance_cannot_tell_of_is_not_sent(
    study: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    """Others would hold a class of noise against too small a deviation, and take it for patients."""
    set_budget(study.folder, "ash", 0.02)
    site = study.site("ash")
    coordinator = begin(study)
    reply = site.respond(coordinator.request(site.name, site.run, site.position))
    assert reply.code == ReplyCode.APPLIED
    assert not ledger_of(study).events
    assert "deviation 379 in numbers of patients; expected at most 362" in caplog.text
    assert "give this site a larger epsilon a run" in caplog.text


def test_a_site_with_a_budget_is_warned_of_a_sum_in_many_dimensions(
    study: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lines(name: str) -> str:
        file = read_site_file(study.folder / "sites" / name / "site.toml")
        return " ".join(terms(file, study.agreed)["leaves"]["statistics"])

    assert "warning" not in lines("ash")
    monkeypatch.setattr(acceptance, "_MOST_NOISED", 15)
    assert "in 16 dimensions and drowns what tells classes apart; expected at most 15: ask for a study with" in lines(
        "ash"
    )
    assert "warning" not in lines("birch")  # it has no budget

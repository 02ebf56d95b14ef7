"""Sites with a budget and one without at one adapter: noise that is sent again hides nobody in a difference but its own
site."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from secure_fed.clients.replica import Replica
from secure_fed.clients.site import Site
from secure_fed.clients.sitefile import SiteFile, SitePrivacy
from secure_fed.core.errors import ProtocolError, SecfacmicError
from secure_fed.core.tomlfile import read_toml, write_toml
from secure_fed.protocol.rounds import ReplyCode
from secure_fed.server.coordinator import Coordinator
from tests.conftest import (
    TRAINING,
    Federation,
    close_round,
    copy_of,
    exchange,
    make_template,
    pass_step,
    prepare_sites,
)

BARE = "dogwood"


@pytest.fixture(scope="module")
def prepared_mixed(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    rows = [{"name": name} for name in (*TRAINING, BARE)]
    template = make_template(sites=rows, max_sites=8, method={"adapter": "text_head"}, privacy={"steps": 2})
    return prepare_sites(template, tmp_path_factory.mktemp("mixed"), images)


@pytest.fixture
def mixed(prepared_mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Federation:
    """All have a budget but dogwood; the training code is tried elsewhere."""
    federation = copy_of(prepared_mixed, tmp_path)
    for name in TRAINING:
        give_budget(federation, name)
    monkeypatch.setattr("secure_fed.clients.learner.rehearse", lambda *_: None)
    monkeypatch.setattr("secure_fed.clients.private_round.check_training", lambda *_, **__: None)
    return federation


def give_budget(federation: Federation, name: str) -> None:
    path = federation.folder / "sites" / name / "site.toml"
    file = read_toml(path, SiteFile, SecfacmicError)
    budget = SitePrivacy(epsilon=8.0, delta=1e-5, n_ref=20, run_epsilon=8.0)
    write_toml(path, file.model_copy(update={"privacy": budget}))


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The sums that ash reads, as every member does."""
    found: list[Any] = []
    read = Replica._read

    def reads(self: Replica, state: Any, record: Any) -> Any:
        sums = read(self, state, record)
        if self.name == "ash" and record.header.kind == "aggregate":
            found.append(sums.values)
        return sums

    monkeypatch.setattr(Replica, "_read", reads)
    return found


def give_up(coordinator: Coordinator, sites: list[Site]) -> None:
    for site in sites:
        site.void(1)
        exchange(coordinator, site)
    entry = coordinator.advance()
    assert entry is not None
    assert entry.header.kind == "void"


@pytest.mark.parametrize("first", ["with it", "without it"])
def test_the_update_of_a_site_without_a_budget_is_no_difference_of_sums_of_those_that_have_one(
    mixed: Federation, opened: list[Any], monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    """A round's record and its void cross; the server lets the round begin anew with another cohort."""
    monkeypatch.setattr("secure_fed.server.coordinator.revealed_to", lambda *_: None)  # it lies
    sites = mixed.sites()
    coordinator = mixed.begin(sites)
    cohorts = [sites, sites[:3]] if first == "with it" else [sites[:3], sites]
    pass_step(coordinator, cohorts[0])
    close_round(coordinator, cohorts[0])
    for site in sites[:3]:
        exchange(coordinator, site)
    give_up(coordinator, sites[:3])
    pass_step(coordinator, cohorts[1])
    with pytest.raises(ProtocolError, match="still to be heard: dogwood"):
        close_round(coordinator, cohorts[1])
    assert len(opened) == 1, "the difference of two is the single update of dogwood, to the last bit"


def test_with_the_word_of_its_people_or_once_it_has_left_the_others_go_on(mixed: Federation) -> None:
    sites = mixed.sites()
    coordinator = mixed.begin(sites)
    pass_step(coordinator, sites)
    close_round(coordinator, sites)
    give_up(coordinator, sites[:3])
    exchange(coordinator, sites[3])
    sites[3].retire()
    entry = None
    for _ in range(2):
        entry = entry or pass_step(coordinator, sites)
    assert entry is not None
    assert entry.header.kind == "retired"
    pass_step(coordinator, sites[:3])
    assert close_round(coordinator, sites[:3]).sites == TRAINING


def test_where_all_have_a_budget_any_cohort_will_do(mixed: Federation) -> None:
    give_budget(mixed, BARE)
    sites = mixed.sites()
    coordinator = mixed.begin(sites)
    pass_step(coordinator, sites)
    close_round(coordinator, sites)
    give_up(coordinator, sites[:3])
    coordinator = mixed.reopen()
    pass_step(coordinator, [mixed.site(name) for name in TRAINING])
    again = [mixed.site(name) for name in TRAINING]
    for site in again:
        assert exchange(coordinator, site).code == ReplyCode.UPDATE
    assert close_round(coordinator, again).sites == TRAINING

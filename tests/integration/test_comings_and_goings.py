"""Members that come, leave and come back, and what waits for them: nobody is taken for another, and nothing stops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from secure_fed.clients.site import Site
from secure_fed.core.errors import KeyFileError, ProtocolError, SiteFileError
from secure_fed.operate.study_keys import rotate_key
from secure_fed.privacy.keys import load_identity
from secure_fed.protocol.rounds import ReplyCode
from secure_fed.protocol.study_tables import Member
from secure_fed.server.coordinator import Coordinator
from tests.conftest import (
    OBSERVER,
    TRAINING,
    Federation,
    copy_of,
    exchange,
    make_template,
    pass_step,
    prepare_sites,
    run_round,
)
from tests.integration.test_rotation import _allow_all, _join, come, rotate


@pytest.fixture(scope="module")
def prepared_five(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    """Four that train, of which a quorum is three, one with another weight, and room for more."""
    rows: list[dict[str, Any]] = [{"name": name} for name in (*TRAINING, "dogwood")]
    rows[3]["weight"] = 0.5
    template = make_template(sites=rows, max_sites=8, rounds=6)
    return prepare_sites(template, tmp_path_factory.mktemp("five"), images)


@pytest.fixture
def five(prepared_five: Path, tmp_path: Path) -> Federation:
    return copy_of(prepared_five, tmp_path)


def amend(federation: Federation, coordinator: Coordinator, sites: list[Site], **changes: Any) -> bytes:
    """An amendment, with its checkpoint."""
    sealed = rotate(federation, coordinator, **changes)
    for site in sites:
        exchange(coordinator, site)
    entry = coordinator.advance()
    assert entry is not None
    assert entry.header.kind == "amendment"
    for site in sites:
        if site.name in coordinator.journal.chain.members:
            exchange(coordinator, site)
    entry = coordinator.advance()
    assert entry is not None
    assert entry.header.kind == "checkpoint"
    return sealed


def test_a_hospital_that_joined_starts_anew_after_the_key_that_let_it_in_is_gone(five: Federation) -> None:
    elm = _join(five, "elm")
    _allow_all(five)
    sites = five.sites()
    coordinator = five.begin(sites)
    run_round(coordinator, sites)
    sealed = rotate(five, coordinator, added=(elm,))
    joined = come(five, "elm", sealed)
    for site in sites:
        exchange(coordinator, site)
    coordinator.advance()
    for site in (*sites, joined):
        exchange(coordinator, site)
    coordinator.advance()
    everyone = [*sites, joined]
    run_round(coordinator, everyone)
    amend(five, coordinator, everyone)
    run_round(coordinator, everyone)
    assert list(joined.replica.keys.headers) == [3]
    again = five.site("elm")
    assert again.replica.member == elm
    assert exchange(coordinator, again).code == ReplyCode.READY
    exchange(coordinator, sites[0])
    assert again.adapter_digest == sites[0].adapter_digest


def test_an_observer_of_the_study_is_never_made_to_train_under_its_own_name(federation: Federation) -> None:
    """Its people accepted that it sends nothing, and its budget pays for nothing: its images would leave without."""
    _allow_all(federation)
    sites = federation.sites()
    coordinator = federation.begin(sites)
    run_round(coordinator, sites)
    amend(federation, coordinator, sites, removed=(OBSERVER,))
    keys = load_identity(federation.folder / "sites" / OBSERVER / "identity", OBSERVER).keys
    trains = Member(name=OBSERVER, keys=keys)
    with pytest.raises(KeyFileError, match=r"dogwood cannot join to train .*: the study lists it to observe"):
        rotate(federation, coordinator, added=(trains,))


def test_who_comes_back_counts_as_the_study_says(five: Federation, tmp_path: Path) -> None:
    """A site goes by the weight in its study file: with another one in the journal every average would be wrong."""
    _allow_all(five)
    sites = five.sites()
    coordinator = five.begin(sites)
    run_round(coordinator, sites)
    amend(five, coordinator, sites, removed=("dogwood",))
    run_round(coordinator, sites[:3])
    heavier = sites[3].replica.member.model_copy(update={"weight": 1.0})
    with pytest.raises(KeyFileError, match=r"train with weight 1 .*: the study lists it to train with weight 0.5"):
        rotate(five, coordinator, added=(heavier,))
    for site in sites[:3]:
        exchange(coordinator, site)
    public = load_identity(five.folder / "sites/dogwood/identity", "dogwood").public
    maker = five.folder / "sites/ash/site.toml"
    header = rotate_key(maker, five.folder / "study.toml", tmp_path / "key", [public])
    assert header.added == (sites[3].replica.member,)
    back = five.site("dogwood")
    back.replica.keys.accept((tmp_path / "key").read_bytes())
    coordinator.amend((tmp_path / "key").read_bytes())
    everyone = [*(five.site(name) for name in TRAINING), back]
    for kind in ("amendment", "checkpoint"):
        for site in everyone if kind == "checkpoint" else everyone[:3]:
            exchange(coordinator, site)
        entry = coordinator.advance()
        assert entry is not None
        assert entry.header.kind == kind
    run_round(coordinator, everyone)
    assert coordinator.rounds[-1].sites == (*TRAINING, "dogwood")
    for site in everyone:
        exchange(coordinator, site)
    assert len({site.adapter_digest for site in everyone}) == 1


def test_who_has_retired_comes_back_under_another_identity_only(five: Federation) -> None:
    """The server could show its word again, and lower the quorum without it."""
    _allow_all(five)
    sites = five.sites()
    coordinator = five.begin(sites)
    run_round(coordinator, sites)
    sites[3].retire()
    pass_step(coordinator, sites)
    run_round(coordinator, sites[:3])
    exchange(coordinator, sites[3])
    amend(five, coordinator, sites, removed=("dogwood",))
    run_round(coordinator, sites[:3])
    with pytest.raises(KeyFileError, match="dogwood cannot join: has retired in this run"):
        rotate(five, coordinator, added=(sites[3].replica.member,))


def test_an_amendment_that_fits_no_more_is_told_and_stops_nothing(
    five: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    """Left while four trained; one retires before it takes force, and without another there are too few."""
    sites = five.sites()
    coordinator = five.begin(sites)
    run_round(coordinator, sites)
    rotate(five, coordinator, removed=("cedar",))
    sites[3].retire()
    entry = None
    for _ in range(2):
        entry = entry or pass_step(coordinator, sites)
    assert entry is not None
    assert entry.header.kind == "retired"
    coordinator = five.reopen()
    run_round(coordinator, sites[:3])
    assert coordinator.rounds[-1].sites == TRAINING
    assert caplog.text.count("the amendment that waits cannot take force any more") == 1
    assert "2 training sites would be left" in caplog.text
    run_round(coordinator, sites[:3])


def test_a_removed_site_gives_no_word_for_a_round_that_was_closed_without_it(five: Federation) -> None:
    """It has the record, as whoever is shown the journal; it ended in a traceback."""
    sites = five.sites()
    coordinator = five.begin(sites)
    run_round(coordinator, sites)
    amend(five, coordinator, sites[:3], removed=("dogwood",))
    run_round(coordinator, sites[:3])
    with pytest.raises(SiteFileError, match="left the study with amendment 1"):
        exchange(coordinator, sites[3])
    removed = five.site("dogwood")
    assert removed.round == 2
    before = removed.position
    with pytest.raises(ProtocolError, match="a void of round 2; only training sites give one up"):
        removed.void(2)
    assert five.site("dogwood").position == before

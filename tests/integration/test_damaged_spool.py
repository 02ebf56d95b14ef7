"""What the server keeps of an open round, damaged: the round goes on, or people are told in one sentence what to do."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from secure_fed.clients.site import Site
from secure_fed.core.errors import EnvelopeError, ProtocolError, StorageError
from secure_fed.lab.simulation import SERVER
from secure_fed.protocol.packing import Binding
from secure_fed.protocol.round_frames import sign_reveal
from secure_fed.protocol.rounds import ReplyCode, RoundReply
from secure_fed.protocol.share_frames import sign_checked
from secure_fed.server.coordinator import Coordinator, Step
from secure_fed.server.orders import extend_run
from secure_fed.server.rebuild import rebuild
from secure_fed.server.spool import ARRIVED, CHECKED, COHORT
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


def cut(data: bytes, keep: float) -> bytes:
    return data[: int(len(data) * keep)]


def flip(data: bytes, at: float) -> bytes:
    place = min(int(len(data) * at), len(data) - 1)
    return data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    **{f"cut to {keep}": partial(cut, keep=keep) for keep in (0, 0.01, 0.5, 0.999)},
    **{f"a bit at {at}": partial(flip, at=at) for at in (0, 0.05, 0.4, 0.9, 1)},
}


@pytest.fixture(scope="module", params=[1, 0], ids=["pads", "no pads"])
def four_prepared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    """Four training sites, of which a quorum is three."""
    sites = [{"name": name} for name in (*TRAINING, "dogwood")]
    template = make_template(sites=sites, min_sites=3, collusion=request.param)
    return prepare_sites(template, tmp_path_factory.mktemp("four"), images)


@pytest.fixture
def four(four_prepared: Path, tmp_path: Path) -> Federation:
    return copy_of(four_prepared, tmp_path)


def up_to(coordinator: Coordinator, sites: list[Site], step: Step) -> None:
    while coordinator.step is not step:
        pass_step(coordinator, sites)


def bring_up(coordinator: Coordinator, sites: list[Site]) -> None:
    """Everybody takes the record, and holds the same adapter."""
    for site in sites:
        exchange(coordinator, site)
    assert len({site.adapter_digest for site in sites}) == 1
    assert {site.round for site in sites} == {1}


def check_sum(federation: Federation, coordinator: Coordinator, sites: list[Site], arrived: str) -> None:
    """Its record is for that ARRIVED, and opens to the sum of what its sites have stored; nobody takes it here."""
    chain = sites[0].replica.state.chain
    record, due = chain.check(coordinator.journal.read(1)), chain.due
    assert record.arrived == arrived
    paths = [site.replica.files.folder.integers(1) for site in sites]
    stored = [safetensors.numpy.load(path.read_bytes())["integers"] for path in paths]
    binding = Binding(run=due.run, head=due.head, round=due.round)
    found = sites[0].replica.sealer.open(record.ciphertexts(federation.agreed), binding, record.cohort)
    assert np.array_equal(found, sum(stored))


def kinds(federation: Federation) -> list[tuple[str, ...]]:
    """Which frames of a fixed sum to damage together."""
    if not federation.agreed.study.pads:
        return [(COHORT,), (ARRIVED,), (COHORT, ARRIVED)]
    return [(COHORT,), (ARRIVED,), (CHECKED,), (COHORT, ARRIVED), (ARRIVED, CHECKED), (COHORT, ARRIVED, CHECKED)]


@pytest.mark.parametrize("revealed", [0, 1, 3])
def test_a_round_whose_sum_was_fixed_goes_on_to_the_same_sum_whatever_frame_is_damaged(
    four: Federation, revealed: int
) -> None:
    """None, one or a quorum have revealed; each frame and each set of them, damaged in each way in turn."""
    sites = four.sites()
    coordinator = four.begin(sites)
    up_to(coordinator, sites, Step.REVEAL)
    for site in sites[:revealed]:
        exchange(coordinator, site)
    assert coordinator._arrived is not None
    digest = coordinator._arrived.digest
    server, kept = four.folder / SERVER, four.folder / "kept"
    shutil.copytree(server, kept)
    ways = list(DAMAGES.values())
    for turn, names in enumerate(kinds(four)):
        for way in (ways[turn % len(ways)], ways[(turn + 4) % len(ways)]):
            shutil.rmtree(server)
            shutil.copytree(kept, server)
            for name in names:
                path = coordinator._spool.path(name)
                path.write_bytes(way(path.read_bytes()))
            again = four.reopen()
            assert not again.fail(["dogwood"]), "somebody may have revealed"
            there = sites
            if revealed == 3 and four.agreed.study.pads:
                assert again.recover(["dogwood"]), "who has revealed needs no CHECKED"
                there = sites[:3]
            close_round(again, there, 5)
            check_sum(four, again, sites, digest)
    bring_up(again, sites)


def test_each_way_of_damaging_each_frame_is_noticed(four: Federation, caplog: pytest.LogCaptureFixture) -> None:
    sites = four.sites()
    coordinator = four.begin(sites)
    up_to(coordinator, sites, Step.REVEAL)
    for (name,) in (names for names in kinds(four) if len(names) == 1):
        path = coordinator._spool.path(name)
        whole = path.read_bytes()
        for way in DAMAGES.values():
            caplog.clear()
            path.write_bytes(way(whole))
            four.reopen()
            assert f"{path}: damaged" in caplog.text
            path.write_bytes(whole)
    caplog.clear()
    assert four.reopen().step is Step.REVEAL
    assert not caplog.text


def test_nobody_is_called_a_liar_over_what_is_damaged_at_the_server(
    four: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    """One site lies, and the envelope of another one is damaged here while the server runs; or its memory is."""
    sites = four.sites()
    coordinator = four.begin(sites)
    up_to(coordinator, sites, Step.REVEAL)
    replies = [site.respond(coordinator.request(site.name, site.run, site.position)) for site in sites]
    assert coordinator._arrived is not None
    key, bound = sites[3].replica.identity.signing, sites[3].replica.files.bound.padded
    seed = None if bound is None else bound.seed
    wrong = sign_reveal(four.agreed, coordinator._arrived.digest, "dogwood", (1, 2), key, seed)
    for reply in (*replies[:3], replace(replies[3], envelope=wrong)):
        coordinator.receive(reply)
    path = coordinator._spool.envelopes()[0]
    path.write_bytes(flip(path.read_bytes(), 0.9))
    with pytest.raises(StorageError, match=r"ash\.envelope: damaged since it came"):
        coordinator.advance()
    assert "ash: its REVEAL" not in caplog.text
    again = four.reopen()
    assert again.asked == {"ash"}
    exchange(again, sites[0])
    again.advance()
    assert "dogwood: its REVEAL of round 1 is wrong" in caplog.text
    again.receive(replies[3])
    again._total = again._total.copy()
    again._total[0] ^= 1
    with pytest.raises(StorageError, match="do not add up to the sum here"):
        again.advance()
    mended = four.reopen()
    mended.receive(replies[3])
    close_round(mended, sites, 5)
    bring_up(mended, sites)


@pytest.mark.parametrize("four_prepared", [1], indirect=True, ids=["pads"])
def test_who_complains_of_shares_once_their_sum_was_fixed_holds_the_round_up_by_name_alone(four: Federation) -> None:
    sites = four.sites()
    coordinator = four.begin(sites)
    up_to(coordinator, sites, Step.REVEAL)
    path = coordinator._spool.path(CHECKED)
    path.write_bytes(b"")
    again = four.reopen()
    again.advance()
    assert again.step is Step.CHECKED
    assert again._check is not None
    liar = sites[3]
    word = sign_checked(four.agreed, again._check.digest, liar.name, ["ash"], liar.replica.identity.signing)
    for site in sites[:3]:
        exchange(again, site)
    with pytest.raises(EnvelopeError, match="CHECKED of dogwood: complains of shares that it has answered for"):
        again.receive(RoundReply(liar.name, ReplyCode.CHECKED, liar.run, liar.position, "", word))
    assert again.advance() is None
    assert again.asked == {"dogwood"}
    close_round(again, sites, 5)
    bring_up(again, sites)


@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=() if way in ("cut to 0", "a bit at 0.4") else pytest.mark.slow) for way in DAMAGES]
)
def test_before_the_sum_is_fixed_a_damaged_cohort_costs_an_attempt(four: Federation, way: str) -> None:
    sites = four.sites()
    coordinator = four.begin(sites)
    up_to(coordinator, sites, Step.ENVELOPE)
    for site in sites[:2]:
        exchange(coordinator, site)
    path = coordinator._spool.path(COHORT)
    path.write_bytes(DAMAGES[way](path.read_bytes()))
    again = four.reopen()
    assert (again.step, again.attempt) == (Step.READY, 2)
    up_to(again, sites, Step.REVEAL)
    close_round(again, sites)
    bring_up(again, sites)


def test_with_the_cohort_and_an_envelope_damaged_people_are_told_what_to_do_and_can(
    four: Federation, caplog: pytest.LogCaptureFixture
) -> None:
    sites = four.sites()
    coordinator = four.begin(sites)
    up_to(coordinator, sites, Step.REVEAL)
    for site in sites:
        exchange(coordinator, site)
    assert coordinator._arrived is not None
    spool, digest = coordinator._spool, coordinator._arrived.digest
    for path in (spool.path(COHORT), spool.envelopes()[1]):
        path.write_bytes(flip(path.read_bytes(), 0.5))
    again = four.reopen()
    assert f"{spool.path(COHORT)}: damaged, and the envelopes of birch, which cannot be asked for" in caplog.text
    assert "secfacmic journal rebuild" in caplog.text
    for site in (*sites[:1], *sites[2:]):
        exchange(again, site)
    with pytest.raises(ProtocolError, match="a REVEAL was sent already"):
        exchange(again, sites[1])
    assert again.advance() is None
    rebuild(four.agreed, [four.folder / "sites" / "cedar" / "state"], four.folder / SERVER)
    mended = four.reopen()
    close_round(mended, sites, 5)
    check_sum(four, mended, sites, digest)
    bring_up(mended, sites)


def test_where_nothing_of_the_spool_is_left_the_journal_is_rebuilt_and_the_round_goes_on_as_it_was(
    four: Federation,
) -> None:
    """A restart has begun another attempt meanwhile, in which nobody who has revealed answers."""
    sites = four.sites()
    coordinator = four.begin(sites)
    up_to(coordinator, sites, Step.REVEAL)
    for site in sites[:3]:
        exchange(coordinator, site)
    assert coordinator._arrived is not None
    digest = coordinator._arrived.digest
    for path in coordinator._spool.folder.iterdir():
        path.write_bytes(bytes(path.stat().st_size))
    assert four.reopen().attempt == 2
    rebuild(four.agreed, [four.folder / "sites" / site.name / "state" for site in sites], four.folder / SERVER)
    mended = four.reopen()
    assert mended.attempt == 1
    close_round(mended, sites, 5)
    check_sum(four, mended, sites, digest)
    bring_up(mended, sites)


def test_a_rebuilt_server_lets_nothing_into_a_round_that_sites_have_begun(four: Federation) -> None:
    """What its people ordered before lies in the backup; sites that have answered a COHORT refuse it for ever."""
    sites = four.sites()
    coordinator = four.begin(sites)
    up_to(coordinator, sites, Step.ENVELOPE)
    for site in sites:
        exchange(coordinator, site)
    state = four.folder / SERVER
    shutil.rmtree(coordinator._folder.spool)
    extend_run(four.agreed, state, 5)
    rebuild(four.agreed, [four.folder / "sites" / site.name / "state" for site in sites], state)
    coordinator = four.reopen()
    assert coordinator.attempt == 2
    pass_step(coordinator, sites)
    entry = close_round(coordinator, sites, 5)
    assert (entry.header.kind, entry.header.round) == ("aggregate", 1)
    assert coordinator.extends_now

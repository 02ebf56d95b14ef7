"""What a site and a server keep: for the site's own user only, bounded, and no seed twice."""

from __future__ import annotations

import logging
import stat
from pathlib import Path
from unittest import mock

import pytest

from secure_fed.clients.replica import MAX_EVIDENCE
from secure_fed.clients.sitefile import read_site_file
from secure_fed.core.errors import EnvelopeError, RecordError
from secure_fed.core.status import StatusFile, keep_log
from secure_fed.core.storage import exclusive, make_folder, write_durable
from secure_fed.lab.simulation import prepare
from secure_fed.protocol.records import Chain, RecordHeader, sign_record
from secure_fed.protocol.rounds import RoundRequest
from secure_fed.protocol.signing import parse_header, split_frame
from secure_fed.server.coordinator import Coordinator, Step
from tests.conftest import OBSERVER, Federation, close_round, exchange, make_template, pass_step, run_round


def modes(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): stat.S_IMODE(path.stat().st_mode) for path in [folder, *folder.rglob("*")]}


def test_all_of_a_sites_state_is_its_own_users_only(tmp_path: Path, images: Path) -> None:
    prepare(make_template(rounds=1, method={"adapter": "text_head", "private_head": True}), tmp_path / "out", images)
    federation = Federation(tmp_path / "out")
    sites = federation.sites()
    coordinator = federation.begin(sites)
    run_round(coordinator, sites)
    for site in sites:
        exchange(coordinator, site)
        state = federation.folder / "sites" / site.name / "state"
        root = logging.getLogger()
        with exclusive(state):
            keep_log(state, "site", StatusFile(state))
            root.warning("a line")
        found = modes(state)
        assert {"lock", "log/site.jsonl", "status.json", "keys/000001.sealed"} <= set(found)
        assert ("features.sqlite" in found) == (site.name != OBSERVER)
        assert {name: oct(mode) for name, mode in found.items() if mode & 0o077} == {}


def test_a_state_folder_that_was_open_is_closed_at_the_next_start(federation: Federation) -> None:
    state = federation.folder / "sites" / "ash" / "state"
    state.chmod(0o755)
    federation.site("ash")
    assert modes(state)["."] == 0o700


def test_a_feature_cache_elsewhere_is_its_users_only(federation: Federation, tmp_path: Path) -> None:
    elsewhere = tmp_path / "shared.sqlite"
    elsewhere.touch(0o644)
    path = federation.folder / "sites" / "ash" / "site.toml"
    path.write_text(f'features = "{elsewhere}"\n' + path.read_text())
    federation.site("ash").features()
    assert stat.S_IMODE(elsewhere.stat().st_mode) == 0o600
    assert read_site_file(path).feature_cache == elsewhere


def test_nothing_is_more_open_than_the_folder_it_is_in(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir(0o700)
    make_folder(tmp_path / "own" / "a" / "b")
    write_durable(tmp_path / "own" / "a" / "b" / "file", b"x")
    assert set(modes(tmp_path / "own").values()) == {0o700, 0o600}
    (tmp_path / "open").mkdir(0o755)
    write_durable(tmp_path / "open" / "file", b"x")
    assert modes(tmp_path / "open")["file"] == 0o644


# --- evidence ---


def other_record(coordinator: Coordinator, seq: int, closed_ms: int, payload: bytes | None = None) -> bytes:
    """Another record for the same place, signed by the coordinator."""
    data = coordinator.journal.read(seq)
    frame = split_frame(b"SFR2", data, 10**6, RecordError)
    header = parse_header(frame.header, RecordHeader, RecordError).model_copy(update={"closed_ms": closed_ms})
    return sign_record(header, bytes(frame.payload) if payload is None else payload, coordinator.journal._key)


def test_evidence_is_bounded_and_checked_before_it_is_kept(federation: Federation) -> None:
    sites = federation.sites()
    coordinator = federation.begin(sites)
    run_round(coordinator, sites)
    exchange(coordinator, sites[0])
    folder = sites[0].replica.files.folder.evidence

    def give(data: bytes) -> None:
        sites[0].respond(RoundRequest(round=1, attempt=1, records=(data,), more=False))

    with pytest.raises(RecordError, match="payload"):  # whatever the server puts there fills the disk
        give(other_record(coordinator, 1, 1, bytes(3_000_000)))
    assert not folder.exists()
    for number in range(2, 3 * MAX_EVIDENCE):
        with pytest.raises(RecordError, match="a second record 1"):
            give(other_record(coordinator, 1, number))
    assert len(list(folder.glob("*.record"))) == MAX_EVIDENCE


# --- seeds ---


def test_a_seed_comes_back_under_the_same_bytes_only(federation: Federation) -> None:
    """Two envelopes of one seed in one round differ by what they hide, without any key."""
    sites = federation.sites()
    coordinator = federation.begin(sites)
    pass_step(coordinator, sites)
    with mock.patch("secure_fed.privacy.ckks.secrets.token_hex", return_value="5e" * 32):
        first = exchange(coordinator, sites[0]).envelope
        exchange(coordinator, sites[0])  # the same bytes again
        sites[0].replica.files.folder.envelope(1).unlink()
        assert coordinator.fail(())
        pass_step(coordinator, sites)
        reply = sites[0].respond(coordinator.request(sites[0].name, sites[0].run, sites[0].position))
        assert reply.envelope[-1000:] != first[-1000:]
        with pytest.raises(EnvelopeError, match="its seed came before, with other bytes"):
            coordinator.receive(reply)
        again = federation.reopen()  # nor after a restart
        assert (again.attempt, again.step) == (2, Step.ENVELOPE)
        with pytest.raises(EnvelopeError, match="its seed came before"):
            again.receive(reply)
        exchange(again, sites[1])  # what another site has copied hits nobody


def test_sites_refuse_a_record_with_a_seed_of_an_earlier_round(federation: Federation) -> None:
    sites = federation.sites()
    coordinator = federation.begin(sites)
    run_round(coordinator, sites)
    seen = next(iter(coordinator.journal.chain.seeds))
    pass_step(coordinator, sites)
    with mock.patch("secure_fed.privacy.ckks.secrets.token_hex", return_value=seen[1]):
        reply = sites[0].respond(coordinator.request(sites[0].name, sites[0].run, sites[0].position))
    assert seen[0] == "ash"
    with pytest.raises(EnvelopeError, match="its seed came before"):
        coordinator.receive(reply)
    with mock.patch("secure_fed.server.coordinator.refuse_repeated_seed"):
        coordinator.receive(reply)
    for site in sites[1:]:
        exchange(coordinator, site)
    with mock.patch("secure_fed.protocol.records.refuse_repeated_seed"):  # a server that lets it pass
        close_round(coordinator, sites)
        data = coordinator.journal.read(2)
    with pytest.raises(RecordError, match="its seed came before"):
        sites[1].respond(RoundRequest(round=2, attempt=1, records=(data,), more=False))
    assert isinstance(sites[1].replica.state.chain, Chain)
    assert sites[1].round == 1

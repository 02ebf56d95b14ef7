"""``secfacmic journal``: verify, show, recompute and rebuild, on the folders that servers and sites really leave."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from secure_fed.cli import app
from secure_fed.clients.site import Site
from secure_fed.core.errors import RecordError, SecfacmicError, StorageError, StudyError
from secure_fed.protocol.records import RecordHeader, sign_record
from secure_fed.protocol.signing import parse_header, split_frame
from secure_fed.server.coordinator import Coordinator
from tests.conftest import Federation, exchange, run_round, send_envelopes

RUNNER = CliRunner()


def _cli(*arguments: object) -> str:
    """What the command prints; its refusal is raised."""
    result = RUNNER.invoke(app, ["journal", *map(str, arguments)])
    if isinstance(result.exception, SecfacmicError):
        raise result.exception
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


class Played:
    """Two rounds, with their envelopes kept."""

    def __init__(self, folder: Path) -> None:
        self.federation = Federation(folder)
        self.folder = folder
        self.server = folder / "server"
        self.kept = folder / "kept"
        (self.run,) = [path.name for path in (self.server / "runs").iterdir()]
        self.journal = self.server / "runs" / self.run / "journal"

    def state(self, site: str) -> Path:
        return self.folder / "sites" / site / "state"

    def record(self, seq: int, place: Path | None = None) -> Path:
        return (place or self.journal) / f"{seq:08d}.record"

    def coordinator(self) -> Coordinator:
        return Coordinator(self.federation.agreed, self.server, self.federation.signing, self.kept)


@pytest.fixture(scope="session")
def played_once(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("played") / "out"
    shutil.copytree(prepared, folder, symlinks=True)
    federation = Federation(folder)
    sites = federation.sites()
    federation.begin(sites)
    coordinator = Coordinator(federation.agreed, folder / "server", federation.signing, folder / "kept")
    for _ in range(2):
        run_round(coordinator, sites)
    # ash and the observer have applied round 2, birch and cedar lack its record.
    for site in (sites[0], sites[3]):
        exchange(coordinator, site)
    return folder


@pytest.fixture
def played(played_once: Path, tmp_path: Path) -> Played:
    shutil.copytree(played_once, tmp_path / "out", symlinks=True)
    return Played(tmp_path / "out")


# --- verify and show ---


def test_verify_takes_state_folders_run_folders_and_bare_records(played: Played, tmp_path: Path) -> None:
    head = played.coordinator().journal.chain.head
    shutil.copytree(played.journal, tmp_path / "out" / "bare")
    for folder in (played.server, played.state("ash"), played.journal.parent, played.journal, tmp_path / "out/bare"):
        document = json.loads(_cli("verify", folder, "--json"))
        assert document["study_id"] == played.federation.agreed.study.id
        (run,) = document["runs"]
        assert (run["run"], run["head"], run["records"], run["aggregates"]) == (played.run, head, 3, 2)
        assert run["current"]
    (behind,) = json.loads(_cli("verify", played.state("birch"), "--json"))["runs"]
    assert behind["records"] == 2
    assert f"head {head}" in _cli("verify", played.server)


def test_verify_changes_nothing_and_needs_no_key(played: Played) -> None:
    for key in played.folder.rglob("*.key"):
        key.unlink()
    before = {path: path.stat().st_mtime_ns for path in played.folder.rglob("*")}
    _cli("verify", played.server)
    _cli("show", played.state("cedar"))
    _cli("recompute", played.server, "--envelopes", played.kept)
    assert {path: path.stat().st_mtime_ns for path in played.folder.rglob("*")} == before


@pytest.mark.parametrize("seq", [0, 1, 2])
def test_verify_names_the_damaged_record(played: Played, seq: int) -> None:
    path = played.record(seq)
    whole = path.read_bytes()
    for position in (0, 5, 40, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
        with pytest.raises(RecordError, match=path.name):
            _cli("verify", played.server)
    path.write_bytes(whole[:-1])
    with pytest.raises(RecordError, match=path.name):
        _cli("verify", played.server)
    path.unlink()
    if seq < 2:
        with pytest.raises(RecordError, match="expected all from 0 on"):
            _cli("verify", played.server)
    else:  # a journal that ends earlier is whole: only other copies can tell
        assert json.loads(_cli("verify", played.server, "--json"))["runs"][0]["records"] == 2


def _second(played: Played, seq: int) -> bytes:
    """Another record of the same place with the coordinator's true signature."""
    frame = split_frame(b"SFR2", played.record(seq).read_bytes(), 10**6, RecordError)
    header = parse_header(frame.header, RecordHeader, RecordError)
    changed = header.model_copy(update={"closed_ms": header.closed_ms + 1})
    return sign_record(changed, bytes(frame.payload), played.federation.signing)


def test_verify_refuses_a_sites_journal_that_is_not_what_it_pinned(played: Played) -> None:
    journal = played.state("ash") / "runs" / played.run / "journal"
    played.record(2, journal).write_bytes(_second(played, 2))
    with pytest.raises(RecordError, match="pins another aggregate of round 2"):
        _cli("verify", played.state("ash"))


def test_verify_tells_of_evidence_that_the_coordinator_signed_two_records(played: Played) -> None:
    site = played.federation.site("ash")
    coordinator = played.coordinator()
    request = replace(coordinator.request(site.name, site.run, site.position), records=(_second(played, 2),))
    with pytest.raises(RecordError, match="a second record 2"):
        site.respond(request)
    with pytest.raises(RecordError, match=r"signed this and .* as record 2"):
        _cli("verify", played.state("ash"))
    _cli("verify", played.server)


def test_verify_of_no_journal_says_what_was_expected(played: Played, tmp_path: Path) -> None:
    empty = played.folder / "empty"
    empty.mkdir()
    with pytest.raises(RecordError, match="no journal; expected"):
        _cli("verify", empty)
    with pytest.raises(RecordError, match="no folder"):
        _cli("verify", played.folder / "absent")
    (empty / "journal").mkdir()
    with pytest.raises(RecordError, match="at least a genesis"):
        _cli("verify", empty)
    shutil.rmtree(played.journal)
    with pytest.raises(RecordError, match="has no journal"):
        _cli("verify", played.server)
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(StudyError, match="name it with --study"):
        _cli("verify", tmp_path / "elsewhere")
    shutil.copytree(played.state("ash"), tmp_path / "elsewhere" / "state")
    _cli("verify", tmp_path / "elsewhere/state", "--study", played.folder / "study.toml")


def test_verify_of_another_study_is_refused(played: Played, tmp_path: Path) -> None:
    from secure_fed.lab.simulation import prepare
    from tests.conftest import make_template

    shutil.rmtree(tmp_path / "out" / "kept")
    prepare(make_template(name="other"), tmp_path / "other", played.folder / "data")
    with pytest.raises(RecordError, match="signature"):
        _cli("verify", played.server, "--study", tmp_path / "other/study.toml")


def test_show_lists_every_record(played: Played) -> None:
    document = json.loads(_cli("show", played.server, "--json"))
    records = document["runs"][0]["records"]
    assert [record["kind"] for record in records] == ["genesis", "aggregate", "aggregate"]
    assert [entry["site"] for entry in records[2]["contributors"]] == ["ash", "birch", "cedar"]
    assert records[2]["bytes"] == played.record(2).stat().st_size
    text = _cli("show", played.state("ash"))
    assert text.count("aggregate") == 2
    assert {"ash,", "birch,", "cedar"} <= set(text.split())


# --- recompute ---


def test_every_sum_comes_out_the_same_from_its_envelopes(played: Played) -> None:
    document = json.loads(_cli("recompute", played.server, "--envelopes", played.kept, "--json"))
    assert [(row["seq"], row["same"]) for row in document["aggregates"]] == [(1, True), (2, True)]
    # A site's own copy of the journal gives the same.
    assert "bit for bit" in _cli("recompute", played.state("ash"), "--envelopes", played.kept)
    kept = sorted(path.relative_to(played.kept).as_posix() for path in played.kept.rglob("*.envelope"))
    assert kept == [
        f"{played.run}/{number:08d}/{site}.envelope" for number in (1, 2) for site in ("ash", "birch", "cedar")
    ]
    assert all(path.stat().st_mode & 0o077 == 0 for path in played.kept.rglob("*.envelope"))


def test_without_keep_envelopes_none_is_left(federation: Federation) -> None:
    sites = federation.sites()
    run_round(federation.begin(sites), sites)
    assert not list(federation.folder.glob("server/**/*.envelope"))


def test_a_sum_that_is_not_of_its_envelopes_is_named(played: Played) -> None:
    """The coordinator signs another sum than that of the envelopes it names: its sites revealed for another one."""
    path = played.record(2)
    frame = split_frame(b"SFR2", path.read_bytes(), 10**6, RecordError)
    header = parse_header(frame.header, RecordHeader, RecordError)
    forged = bytearray(frame.payload)
    forged[100] ^= 1
    from secure_fed.protocol.signing import payload_fields

    changed = header.model_copy(update=dict(payload_fields(bytes(forged))))
    path.write_bytes(sign_record(changed, bytes(forged), played.federation.signing))
    for command in (("verify", played.server), ("recompute", played.server, "--envelopes", played.kept)):
        with pytest.raises(RecordError, match=r"record 2: its signature is not"):
            _cli(*command)


def test_missing_and_damaged_envelopes_are_named(played: Played) -> None:
    birch = next(played.kept.rglob("00000002/birch.envelope"))
    whole = birch.read_bytes()
    for damage in (whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1]), b"", whole + b"x"):
        birch.write_bytes(damage)
        with pytest.raises(RecordError, match=r"records \[2\]: envelopes are missing.*1 of 2"):
            _cli("recompute", played.server, "--envelopes", played.kept)
    with pytest.raises(RecordError, match="no folder"):
        _cli("recompute", played.server, "--envelopes", played.folder / "absent")
    # Names and places do not matter, contents do.
    birch.unlink()
    (played.kept / "anything.envelope").write_bytes(whole)
    _cli("recompute", played.server, "--envelopes", played.kept)


# --- rebuild ---


def _lose_server(played: Played) -> None:
    for path in ("run", "runs"):
        target = played.server / path
        shutil.rmtree(target) if target.is_dir() else target.unlink()


def test_a_lost_server_gets_the_same_head_and_goes_on(played: Played) -> None:
    head = played.coordinator().journal.chain.head
    _lose_server(played)
    arguments = [argument for site in ("birch", "ash") for argument in ("--from", played.state(site))]
    text = _cli("rebuild", *arguments)
    assert f"head {head}" in text
    coordinator = played.coordinator()
    assert coordinator.journal.chain.head == head
    sites = played.federation.sites()
    run_round(coordinator, sites)
    for site in sites:
        exchange(coordinator, site)
    assert len({site.adapter_digest for site in sites}) == 1
    assert coordinator.finished
    _cli("verify", played.server)


def test_after_a_rebuild_sites_seal_their_stored_integers_anew(played: Played) -> None:
    sites = played.federation.sites()
    coordinator = played.coordinator()
    for _ in range(2):
        send_envelopes(coordinator, sites)
        assert coordinator.fail([])
    send_envelopes(coordinator, sites)
    before = next(played.state("ash").rglob("*.integers")).read_bytes()
    _lose_server(played)
    rebuilt = json.loads(_cli("rebuild", "--from", played.state("ash"), "--json"))
    assert rebuilt["attempt"] == 4
    coordinator = played.coordinator()
    assert coordinator.attempt == 4
    again = played.federation.sites()
    run_round(coordinator, again)
    assert next(played.state("ash").rglob("*.integers")).read_bytes() == before


def test_a_rebuild_restores_missing_and_damaged_records_only(played: Played) -> None:
    stamps = played.record(0).stat().st_mtime_ns
    whole = played.record(1).read_bytes()
    played.record(1).write_bytes(whole[:-7])
    played.record(2).unlink()
    rebuilt = json.loads(_cli("rebuild", "--from", played.state("ash"), "--json"))
    assert rebuilt["added"] == 2
    assert played.record(1).read_bytes() == whole
    assert played.record(0).stat().st_mtime_ns == stamps
    assert json.loads(_cli("rebuild", "--from", played.state("ash"), "--json"))["added"] == 0


def test_a_rebuild_never_forks_and_never_shortens(played: Played) -> None:
    with pytest.raises(RecordError, match="newer than the 2 records"):
        _cli("rebuild", "--from", played.state("birch"))
    played.record(2).write_bytes(_second(played, 2))
    with pytest.raises(RecordError, match="two different records"):
        _cli("rebuild", "--from", played.state("ash"))
    ash, dogwood = (played.state(site) / "runs" / played.run for site in ("ash", "dogwood"))
    played.record(2, ash / "journal").write_bytes(_second(played, 2))
    shutil.rmtree(ash / "pins")
    _lose_server(played)
    with pytest.raises(RecordError, match="two different records"):
        _cli("rebuild", "--from", ash.parents[1], "--from", dogwood.parents[1])
    assert not (played.server / "run").exists()


def test_a_rebuild_into_another_run_or_a_folder_in_use_is_refused(played: Played) -> None:
    from secure_fed.core.storage import exclusive

    with exclusive(played.server), pytest.raises(StorageError, match="another process"):
        _cli("rebuild", "--from", played.state("ash"))
    (played.server / "run").write_text("7" * 64)
    with pytest.raises(StorageError, match="in run 7777"):
        _cli("rebuild", "--from", played.state("ash"))
    other = played.folder / "new-server"
    assert "put the coordinator's signing key back" in _cli("rebuild", "--from", played.state("ash"), "--state", other)
    shutil.copy(played.server / "coordinator.key", other)
    assert Coordinator(played.federation.agreed, other, played.federation.signing).round == 3


def test_a_site_without_a_run_gives_no_journal(played: Played) -> None:
    shutil.rmtree(played.state("ash") / "runs")
    (played.state("ash") / "run").unlink()
    with pytest.raises(RecordError, match="no journal"):
        _cli("rebuild", "--from", played.state("ash"))
    assert isinstance(played.federation.site("ash"), Site)


def test_a_journal_is_verified_where_the_deployment_page_puts_it(played: Played, tmp_path: Path) -> None:
    """``study/`` and ``state/`` beside ``site.toml``; by state folder, by the site's folder and by its file."""
    home = tmp_path / "north"
    (home / "study").mkdir(parents=True)
    shutil.copytree(played.state("ash"), home / "state")
    for name in ("study.toml", "study.safetensors"):
        shutil.copy(played.folder / name, home / "study" / name)
    text = (played.folder / "sites" / "ash" / "site.toml").read_text()
    (home / "site.toml").write_text(text.replace("../../study.toml", "study/study.toml"))
    expected = _cli("verify", played.state("ash"))
    assert _cli("verify", home / "state") == _cli("verify", home) == _cli("verify", home / "site.toml") == expected
    (home / "study").rename(home / "agreed")
    with pytest.raises(StudyError, match="in a folder study of these"):
        _cli("verify", home / "state")
    (home / "site.toml").write_text(text.replace("../../study.toml", "agreed/study.toml"))
    assert _cli("verify", home) == expected


def test_two_sites_see_where_their_journals_part(played: Played) -> None:
    ash, birch = played.state("ash"), played.state("birch")
    told = json.loads(_cli("compare", ash, birch, "--json"))
    assert (told["same"], told["first"], told["second"]) == (2, 3, 2)  # birch is only behind
    (birch / "runs" / played.run / "journal" / "00000001.record").unlink()
    path = birch / "runs" / played.run / "journal" / "00000000.record"
    frame = split_frame(b"SFR2", path.read_bytes(), 2**20, RecordError)
    header = parse_header(frame.header, RecordHeader, RecordError)
    other = header.model_copy(update={"closed_ms": header.closed_ms + 1})
    path.write_bytes(sign_record(other, b"", played.federation.signing))
    with pytest.raises(RecordError, match=r"record 0 is one in .* and another in"):
        _cli("compare", ash, birch)

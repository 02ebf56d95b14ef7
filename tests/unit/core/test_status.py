"""What a process leaves on its disk for its operator, without any process."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import socket
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from typer.testing import CliRunner

from secure_fed.cli import app
from secure_fed.cli.output import host_and_port
from secure_fed.core import status as module
from secure_fed.core.errors import AddressError, RecordError, StorageError
from secure_fed.core.layout import StateFolder
from secure_fed.core.status import StatusFile, is_running, keep_log
from secure_fed.core.storage import exclusive
from secure_fed.operate.live_facts import Place
from secure_fed.operate.metrics import MOST_CALLERS, serve_metrics
from tests.conftest import Federation, exchange, run_round


@pytest.fixture
def own_root() -> logging.Logger:
    logging.getLogger("secure_fed").setLevel(logging.INFO)
    return logging.getLogger()


def test_a_status_grows_and_is_written_only_when_it_changes(tmp_path: Path) -> None:
    status = StatusFile(tmp_path)
    status.begin("server", study="small", rounds=3)
    status.tell(round=1)
    first = (tmp_path / "status.json").stat().st_ino
    status.tell(round=1)
    assert (tmp_path / "status.json").stat().st_ino == first
    status.tell(round=2)
    status.error("disk full")
    facts = status.read()
    assert (facts["role"], facts["study"], facts["round"]) == ("server", "small", 2)
    assert facts["last_error"]["text"] == "disk full"
    status.begin("server", study="small")
    assert status.read()["last_error"] is None
    assert "round" not in status.read()


def test_the_same_told_again_writes_nothing_and_what_another_process_wrote_stays(tmp_path: Path) -> None:
    """The rounds tell where they stand every second; the file of a thousand sites is not written each time."""
    path = StateFolder(tmp_path).status
    status = StatusFile(tmp_path)
    status.begin("server")
    facts = {"round": 1, "sites": {"ash": {"in": False}}}
    status.tell(**facts)
    before = path.stat().st_ino, path.stat().st_mtime_ns
    status.tell(**facts)
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == before
    StatusFile(tmp_path).tell(restarts=1)
    status.tell(**facts | {"round": 2})
    known = StatusFile(tmp_path).read()
    assert (known["restarts"], known["round"], known["sites"]) == (1, 2, facts["sites"])


def test_what_two_processes_tell_is_both_there(tmp_path: Path) -> None:
    server, rounds = StatusFile(tmp_path), StatusFile(tmp_path)
    server.begin("server")
    for number in range(3):
        rounds.tell(round=number)
        server.tell(restarts=number)
    facts = StatusFile(tmp_path).read()
    assert (facts["round"], facts["restarts"]) == (2, 2)
    assert server.read() == rounds.read() == facts


def test_a_status_waits_for_no_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each line that is logged is in it; with hundreds of sites that connect the rounds would wait for nothing else."""
    synced: list[object] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    status = StatusFile(tmp_path)
    status.begin("server")
    status.tell(round=1)
    assert synced == []


def test_a_full_disk_does_not_stop_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_root: logging.Logger, capfd: pytest.CaptureFixture[str]
) -> None:
    status = StatusFile(tmp_path)
    status.begin("server")
    keep_log(tmp_path, "server", status)

    def full(*arguments: object) -> None:
        raise StorageError("full")

    monkeypatch.setattr(module, "write_whole", full)
    stream = tmp_path / "log" / "server.jsonl"
    stream.symlink_to("/dev/full")
    logging.getLogger("secure_fed.server.round_loop").warning("a line")
    assert "Traceback" not in capfd.readouterr().err
    assert status.read()["role"] == "server"


def test_a_damaged_status_is_as_none(tmp_path: Path) -> None:
    for text in ("", "{", "[1]", "nothing", "[" * 9000):
        (tmp_path / "status.json").write_text(text)
        assert StatusFile(tmp_path).read() == {}


def test_whether_a_process_holds_the_folder(tmp_path: Path) -> None:
    assert is_running(tmp_path) is False
    with exclusive(tmp_path):
        assert is_running(tmp_path) is True
    assert is_running(tmp_path) is False
    with exclusive(tmp_path):  # asking does not take it
        pass


def test_logs_keep_our_lines_and_of_others_only_that_there_was_one(tmp_path: Path, own_root: logging.Logger) -> None:
    own_root.setLevel(logging.WARNING)
    status = StatusFile(tmp_path)
    status.begin("server")
    keep_log(tmp_path, "server", status)
    logging.getLogger("secure_fed.server.round_loop").info("round 1 of 3")
    logging.getLogger("secure_fed.server.round_loop").warning("ash: its reply is refused")
    logging.getLogger("pydicom").error("patient Jane Doe")
    lines = [json.loads(line) for line in (tmp_path / "log" / "server.jsonl").read_text().splitlines()]
    assert [(line["level"], line["message"]) for line in lines] == [
        ("INFO", "round 1 of 3"),
        ("WARNING", "ash: its reply is refused"),
        ("ERROR", "pydicom reports an error"),
    ]
    facts = status.read()
    assert facts["last"]["text"] == facts["last_error"]["text"] == "pydicom reports an error"
    assert (tmp_path / "log").stat().st_mode & 0o777 == 0o700


def test_logs_rotate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_root: logging.Logger) -> None:
    monkeypatch.setattr(module, "LOG_BYTES", 2000)
    keep_log(tmp_path, "server", StatusFile(tmp_path))
    for number in range(300):
        logging.getLogger("secure_fed.server.round_loop").info("line %d", number)
    files = sorted(path.name for path in (tmp_path / "log").iterdir())
    assert files == ["server.jsonl", *(f"server.jsonl.{number}" for number in (1, 2, 3, 4))]
    assert all(path.stat().st_size <= 2000 for path in (tmp_path / "log").iterdir())


def test_without_a_status_file_the_journal_tells(federation: Federation) -> None:
    sites = federation.sites()
    coordinator = federation.begin(sites)
    run_round(coordinator, sites)
    for site in sites:
        exchange(coordinator, site)
    for folder, role in ((federation.folder / "server", "server"), (federation.folder / "sites/ash/state", "site")):
        shown = json.loads(CliRunner().invoke(app, ["status", str(folder), "--json"]).stdout)
        assert (shown["role"], shown["round"], shown["records"], shown["running"]) == (role, 1, 2, False)
        with exclusive(folder):
            text = CliRunner().invoke(app, ["status", str(folder)]).output
        assert f"{role}: running" in text
        assert "NOT running" in CliRunner().invoke(app, ["status", str(folder)]).output  # rounds are left
    missing = CliRunner().invoke(app, ["status", str(federation.folder / "nowhere")])
    assert isinstance(missing.exception, RecordError)


def test_the_command_says_who_is_in_and_what_went_wrong(tmp_path: Path) -> None:
    status = StatusFile(tmp_path)
    status.begin("server", study="small", study_id="ab" * 32, rounds=3)
    sites = {
        "ash": {"role": "train", "connected": True, "in": True},
        "elm": {"role": "train", "connected": True, "in": False},
    }
    status.tell(round=2, sites=sites, waiting="round 2: 1 sites in, min_sites 3; waiting")
    status.error("elm: its reply is refused")
    shown = CliRunner().invoke(app, ["status", str(tmp_path)]).output
    assert "NOT running" in shown
    assert "round 2 of 3" in shown
    assert "elm: its reply is refused" in shown
    assert "waiting" not in shown  # nobody does
    rows = {line.split("│")[1].strip(): line for line in shown.splitlines() if "│" in line}
    assert [cell.strip() for cell in rows["ash"].split("│")[2:5]] == ["train", "no", "yes"]  # nobody is connected to it
    with exclusive(tmp_path):
        shown = CliRunner().invoke(app, ["status", str(tmp_path)]).output
    assert "min_sites 3; waiting" in shown
    rows = {line.split("│")[1].strip(): line for line in shown.splitlines() if "│" in line}
    assert [cell.strip() for cell in rows["ash"].split("│")[2:5]] == ["train", "yes", "yes"]
    assert [cell.strip() for cell in rows["elm"].split("│")[2:5]] == ["train", "yes", "no"]


def test_who_has_done_its_work_is_not_said_to_be_down(finished_run: Path, tmp_path: Path) -> None:
    status = StatusFile(tmp_path)
    status.begin("server", study="small", rounds=3)
    status.tell(round=3, finished=True)
    assert "server: finished\n" in CliRunner().invoke(app, ["status", str(tmp_path)]).output
    with exclusive(tmp_path):
        assert "server: running\n" in CliRunner().invoke(app, ["status", str(tmp_path)]).output
    (tmp_path / "closed").write_text("{}")
    assert (
        "server: finished, and the study is closed here\n" in CliRunner().invoke(app, ["status", str(tmp_path)]).output
    )
    site = finished_run / "sites" / "ash"
    shown = {
        CliRunner().invoke(app, ["status", str(path)]).output for path in (site, site / "site.toml", site / "state")
    }
    assert len(shown) == 1
    assert "site: finished\n" in shown.pop()  # no process has ever said so: the journal and the study do
    assert CliRunner().invoke(app, ["status", str(site), "--check"]).exit_code == 0


def test_a_check_for_a_health_probe_fails_only_where_a_process_is_missing(tmp_path: Path) -> None:
    status = StatusFile(tmp_path)
    status.begin("site", study="small", study_id="a" * 64, rounds=3, round=1)

    def code(*more: str) -> int:
        return CliRunner().invoke(app, ["status", str(tmp_path), *more]).exit_code

    assert (code(), code("--check"), code("--check", "--json")) == (0, 1, 1)
    with exclusive(tmp_path):
        assert code("--check") == 0
    status.tell(finished=True)
    assert code("--check") == 0


def test_who_holds_connections_open_uses_up_neither_threads_nor_the_place_of_who_has_the_token(tmp_path: Path) -> None:
    StatusFile(tmp_path).begin("site", study="small", rounds=3)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    before = threading.active_count()
    serve_metrics(tmp_path, ("127.0.0.1", port))
    with contextlib.ExitStack() as held:
        for _ in range(4 * MOST_CALLERS):
            one = held.enter_context(socket.create_connection(("127.0.0.1", port)))
            one.sendall(b"GET /metrics HTTP/1.1\r\nx: ")
        assert "\nsecfacmic_rounds 3.0\n" in fetch(port, (tmp_path / "metrics.token").read_text().strip())
        assert threading.active_count() <= before + MOST_CALLERS + 2


def test_metrics_for_who_has_the_token(tmp_path: Path) -> None:
    status = StatusFile(tmp_path)
    status.begin("server", study="small", rounds=3, min_sites=3, restarts=1)
    sites = {
        "ash": {"role": "train", "connected": True, "in": True},
        "elm": {"role": "train", "connected": False, "in": False},
    }
    status.tell(round=2, sites=sites, rounds_closed=1, bytes_up=4200, last_round_seconds=1.5, finished=False)
    status.tell(certificate_until="2026-01-01T00:00:00Z", updated="2026-01-01T00:00:01Z")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    serve_metrics(tmp_path, ("127.0.0.1", port))
    path = tmp_path / "metrics.token"
    assert path.stat().st_mode & 0o077 == 0
    token = path.read_text().strip()
    text = fetch(port, token)
    for line in (
        "secfacmic_round 2.0",
        "secfacmic_rounds 3.0",
        "secfacmic_sites_in 1.0",
        'secfacmic_site_connected{site="ash"} 1.0',
        'secfacmic_site_connected{site="elm"} 0.0',
        "secfacmic_rounds_closed_total 1.0",
        "secfacmic_bytes_up_total 4200.0",
        "secfacmic_restarts_total 1.0",
        "secfacmic_round_seconds 1.5",
        "secfacmic_certificate_until_seconds 1.7672256e+09",
        "secfacmic_last_error_seconds 0.0",
    ):
        assert f"\n{line}\n" in text, line
    status.tell(round=3)
    assert "\nsecfacmic_round 3.0\n" in fetch(port, token)  # read anew each time
    # On no other address of this machine.
    with pytest.raises(OSError):
        socket.create_connection((own_address(), port), 5)
    with pytest.raises(AddressError, match="choose another with --metrics"):
        serve_metrics(tmp_path, ("127.0.0.1", port))
    for wrong in ("", "x", token[:-1], token + "x", "ü"):
        with pytest.raises(urllib.error.HTTPError, match="401"):
            fetch(port, wrong)
    assert threading.active_count() < 50


def test_metrics_of_a_site_say_nothing_but_where_it_stands(tmp_path: Path) -> None:
    """The allow-list: whatever else a status may hold one day is not shown."""
    status = StatusFile(tmp_path)
    status.begin("site", site="ash", study="small", rounds=3, images=4711)
    status.tell(round=2, finished=False)
    (tmp_path / "metrics.token").write_text("kept over restarts\n")
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as probe:
        port = probe.getsockname()[1]
    serve_metrics(tmp_path, ("::1", port))
    text = fetch(port, "kept over restarts", "[::1]")
    names = {line.split()[0] for line in text.splitlines() if not line.startswith("#")}
    assert names == {
        *("secfacmic_round", "secfacmic_rounds", "secfacmic_finished"),
        *("secfacmic_updated_seconds", "secfacmic_last_error_seconds"),
    }
    assert "4711" not in text


@pytest.mark.parametrize("found", [b"", b" \n", "geheïm\n".encode(), b"\xff\xfe", b"one\ntwo\n"])
def test_what_is_no_token_is_not_served_with(tmp_path: Path, found: bytes) -> None:
    """With an empty one nobody would ever be let in, without a word."""
    (tmp_path / "metrics.token").write_bytes(found)
    with pytest.raises(StorageError, match=r"metrics\.token: .* no token; .* remove the file"):
        serve_metrics(tmp_path, ("127.0.0.1", 0))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("0.0.0.0:8443", ("0.0.0.0", 8443)),
        ("[::1]:8443", ("::1", 8443)),
        ("fl.example.org:1", ("fl.example.org", 1)),
        ("::1:8443", None),
        ("[::1:8443", None),
        ("[fl]:1", None),
        ("8443", None),
        (":8443", None),
        ("h:65536", None),
        ("h:1\u00b2", None),
        ("h:", None),
    ],
)
def test_an_address_to_listen_on_is_unmistakable(text: str, found: tuple[str, int] | None) -> None:
    if found is not None:
        assert host_and_port(text, "--listen") == found
        return
    with pytest.raises(AddressError, match=rf"--listen {re.escape(text)}: expected"):
        host_and_port(text, "--listen")
    assert host_and_port("9464", "--metrics", "127.0.0.1") == ("127.0.0.1", 9464)


def fetch(port: int, token: str, host: str = "127.0.0.1") -> str:
    headers = {"Authorization": f"Bearer {token}".encode().decode("latin-1")}
    request = urllib.request.Request(f"http://{host}:{port}/metrics", headers=headers)
    with urllib.request.urlopen(request, timeout=10) as answer:
        return str(answer.read().decode())


def own_address() -> str:
    """Another address of this machine; on Linux all of 127/8 is."""
    return "127.0.0.2"


def test_a_server_that_was_refused_before_it_began_says_why_and_where_it_stands(federation: Federation) -> None:
    """A taken port is when somebody asks for the status."""
    sites = federation.sites()
    state = federation.folder / "server"
    StatusFile(state).error("127.0.0.1:8443: cannot be listened on")
    for began in (False, True):
        if began:
            federation.begin(sites)
        shown = json.loads(CliRunner().invoke(app, ["status", str(state), "--json"]).stdout)
        assert (shown["role"], shown["round"], shown["running"]) == ("server", 0, False)
        assert "study" in shown or not began
        ended = CliRunner().invoke(app, ["status", str(state)])
        assert ended.exit_code == 0
        assert "server: NOT running" in ended.output
        assert "8443: cannot be listened on" in ended.output
        assert Place(state).facts()["last_error"]["text"] == "127.0.0.1:8443: cannot be listened on"

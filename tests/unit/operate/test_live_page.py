"""The live page: who may look and press, what it shows, and that looking holds nothing up."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from email.message import Message
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from secure_fed.cli import app
from secure_fed.clients.acceptance import runs_accepted
from secure_fed.clients.sitefile import read_site
from secure_fed.core.errors import AddressError, RecordError
from secure_fed.core.layout import ServerState
from secure_fed.core.status import StatusFile, is_running
from secure_fed.core.storage import exclusive
from secure_fed.operate import live_page
from secure_fed.operate.live_facts import Place
from secure_fed.operate.live_page import STREAMS, LivePage
from tests.conftest import Federation, run_round

Open = Callable[[Path], LivePage]


@pytest.fixture
def opened() -> Iterator[Open]:
    pages: list[tuple[LivePage, threading.Thread]] = []

    def one(path: Path) -> LivePage:
        page = LivePage(path)
        thread = threading.Thread(target=page.serve, daemon=True)
        thread.start()
        pages.append((page, thread))
        return page

    yield one
    for page, thread in pages:
        page.close()
        thread.join(10)


@pytest.fixture
def folder(finished_run: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished_run, tmp_path / "out", symlinks=True)
    return tmp_path / "out"


def ask(
    page: LivePage, path: str = "", *, token: bool = True, body: dict[str, Any] | None = None, **headers: str
) -> tuple[int, str, Any]:
    """One request as a browser sends it; headers by name, with _ for -."""
    given = {"Host": f"127.0.0.1:{page.port}"} | {name.replace("_", "-"): value for name, value in headers.items()}
    connection = http.client.HTTPConnection("127.0.0.1", page.port, timeout=20)
    start = page.url.partition(f":{page.port}")[2] if token else "/"
    data = None if body is None else json.dumps(body)
    connection.request("GET" if body is None else "POST", start + path, data, given)
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, text, answer.headers


def events(page: LivePage) -> tuple[http.client.HTTPConnection, Iterator[dict[str, Any]]]:
    connection = http.client.HTTPConnection("127.0.0.1", page.port, timeout=20)
    connection.request("GET", page.url.partition(f":{page.port}")[2] + "events")
    answer = connection.getresponse()
    assert answer.status == 200

    def told() -> Iterator[dict[str, Any]]:
        while line := answer.readline():
            if line.startswith(b"data: "):
                yield json.loads(line.removeprefix(b"data: "))

    return connection, told()


def own(page: LivePage) -> dict[str, str]:
    return {"Origin": f"http://127.0.0.1:{page.port}"}


def test_the_link_opens_a_page_that_loads_nothing_from_elsewhere(folder: Path, opened: Open) -> None:
    page = opened(folder / "sites/ash")
    status, text, headers = ask(page, Sec_Fetch_Site="none")
    assert status == 200
    assert not re.search(r"https?://|<link|<img|src=|@import|url\(", text)
    policy = headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy
    assert headers["Referrer-Policy"] == "no-referrer"
    assert headers["Cache-Control"] == "no-store"


@pytest.mark.parametrize("path", ["", "events", "do/stop", "do/accept"])
def test_a_stranger_is_refused(folder: Path, opened: Open, path: str) -> None:
    page = opened(folder / "sites/ash")
    body = {"by": "Mallory"} if path.startswith("do/") else None
    good = own(page) if body else {}
    assert ask(page, path, token=False, body=body, **good)[0] == 404
    assert ask(page, path, body=body, **{**good, "Host": f"evil.example:{page.port}"})[0] == 421
    assert ask(page, path, body=body, **{**good, "Host": "127.0.0.1"})[0] == 421
    for origin in ("http://evil.example", "null", f"http://127.0.0.1:{page.port + 1}", f"http://localhost:{page.port}"):
        assert ask(page, path, body=body, Origin=origin)[0] == 403
    assert ask(page, path, body=body, **good, Sec_Fetch_Site="cross-site")[0] == 403
    assert ask(page, path, body=body, **good, Sec_Fetch_Site="same-site")[0] == 403
    if body:
        assert ask(page, path, body=body)[0] == 403  # a form of another page may send no origin
    for name, (first, second) in {
        "Origin": (own(page)["Origin"], "http://evil.example"),
        "Sec-Fetch-Site": ("none", "cross-site"),
    }.items():
        twice = Message()
        for header, value in (("Host", f"127.0.0.1:{page.port}"), (name, first), (name, second)):
            twice[header] = value
        assert page.refusal(page.url.partition(f":{page.port}")[2] + path, twice, pressing=False) == 403
    assert "Mallory" not in str(Place(folder / "sites/ash").facts())


def test_each_page_has_a_token_of_its_own_that_cannot_be_guessed(folder: Path) -> None:
    tokens = {LivePage(folder / "sites/ash").url.split("/")[3] for _ in range(3)}
    assert len(tokens) == 3
    assert min(map(len, tokens)) >= 43


def test_it_listens_on_loopback_alone(folder: Path, opened: Open) -> None:
    page = opened(folder / "sites/ash")
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.2", page.port), 5)
    with pytest.raises(AddressError, match="choose another with --port"):
        LivePage(folder / "sites/ash", page.port)


def test_a_sites_page_says_what_left_what_was_agreed_and_how_it_goes(folder: Path) -> None:
    for named in (folder / "sites/ash", folder / "sites/ash/site.toml", folder / "sites/ash/state"):
        facts = Place(named).facts()
        assert (facts["role"], facts["site"], facts["finished"], facts["running"]) == ("site", "ash", True, False)
        assert facts["terms"]["members"]
        assert facts["records"]["records"] > 1
        assert not any("error" in facts[name] for name in ("sent", "budget", "terms", "records"))
    server = Place(folder / "server").facts()
    assert server["role"] == "server"
    assert not {"sent", "budget", "terms", "validation"} & set(server)
    with pytest.raises(RecordError, match="no folder"):
        Place(folder / "nowhere")


def test_a_part_that_is_damaged_says_so_and_the_rest_is_shown(folder: Path) -> None:
    state = folder / "sites/ash/state"
    (state / "sent.jsonl").write_text("{}\n")
    facts = Place(folder / "sites/ash").facts()
    assert "line 1 is no line of this list" in facts["sent"]["error"]
    assert facts["terms"]["study_id"]


def test_a_browser_is_told_of_changes_and_holds_nothing_up(
    tmp_path: Path, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_page, "LOOK_SECONDS", 0.05)
    status = StatusFile(tmp_path)
    status.begin("server", study="small", rounds=3, round=1)
    before = sorted(path.name for path in tmp_path.iterdir())
    connection, told = events(opened(tmp_path))
    assert next(told)["round"] == 1
    status.tell(round=2)
    assert next(told)["round"] == 2
    with exclusive(tmp_path):  # a study can start while the page is open
        assert next(told)["running"]
    assert not next(told)["running"]
    connection.close()
    assert {path.name for path in tmp_path.iterdir()} - set(before) <= {"lock"}


def test_however_many_look_the_files_are_read_once_a_second(
    tmp_path: Path, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    StatusFile(tmp_path).begin("server", study="small")
    page, looks, now = opened(tmp_path), [], [0.0]
    monkeypatch.setattr(Place, "facts", lambda _: looks.append(now[0]) or {"looks": len(looks)})
    monkeypatch.setattr(live_page, "time", SimpleNamespace(monotonic=lambda: now[0]))
    with ThreadPoolExecutor(20) as pool:
        for now[0] in (0.0, 0.9, 1.0):
            assert len({future.result() for future in [pool.submit(page.facts) for _ in range(100)]}) == 1
    assert looks == [0.0, 1.0]


def test_browsers_that_do_not_read_neither_slow_nor_stop_a_study(
    federation: Federation, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Round after round is closed while pages of all parties are open, and the journal is as it is without."""
    monkeypatch.setattr(live_page, "LOOK_SECONDS", 0.01)
    stop, kept, wrong = threading.Event(), [], []
    monkeypatch.setattr(threading, "excepthook", wrong.append)
    places = [federation.folder / "server", *sorted((federation.folder / "sites").iterdir())]
    for page in map(opened, places):
        kept += [events(page)[0] for _ in range(STREAMS)]  # of which nothing is read any more
        threading.Thread(target=_look, args=(page, stop), daemon=True).start()
    sites = federation.sites()
    coordinator = federation.begin(sites)  # a page may look when the run's folder is there and its first record is not
    while not coordinator.finished:
        run_round(coordinator, sites)
    stop.set()
    assert not wrong
    assert len(coordinator.rounds) == federation.agreed.study.rounds
    assert len({site.adapter_digest for site in sites}) == 1
    for connection in kept:
        connection.close()


def _look(page: LivePage, stop: threading.Event) -> None:
    while not stop.is_set():
        assert ask(page)[0] == 200
        assert json.loads(page.facts())


def test_a_site_that_was_never_started_says_how_to(federation: Federation) -> None:
    facts = Place(federation.folder / "sites/ash").facts()
    assert "nothing has run here yet; start the site with: secfacmic client" in facts["nothing_yet"]
    assert facts["terms"]["study_id"] == federation.agreed.study.id


def test_a_folder_whose_run_is_being_begun_says_so(federation: Federation) -> None:
    state = federation.folder / "server"
    federation.begin(federation.sites())
    (journal,) = state.glob("runs/*/journal")
    (record,) = journal.iterdir()
    current = ServerState(state).current_run
    record.rename(state / "aside")
    assert "no run has its first record yet" in Place(state).facts()["nothing_yet"]
    (state / "aside").rename(record)
    assert Place(state).facts()["run"] == current
    (state / "run").unlink()
    assert ServerState(state).current_run is None
    assert "no run has its first record yet" in Place(state).facts()["nothing_yet"]


def test_only_so_many_browsers_are_told(tmp_path: Path, opened: Open) -> None:
    StatusFile(tmp_path).begin("server", study="small")
    page = opened(tmp_path)
    kept = [events(page) for _ in range(STREAMS)]
    assert ask(page, "events")[0] == 503
    assert ask(page)[0] == 200
    for connection, _ in kept:
        connection.close()


def test_who_accepts_on_the_page_accepts_as_on_the_command_line(folder: Path, opened: Open) -> None:
    site = folder / "sites/ash"
    file, agreed = read_site(site)
    shutil.rmtree(file.state_folder.accepted)
    page = opened(site)
    key = next(one for one in agreed.study.sites if one.name == "ash").keys.signing
    for body, why in (
        ({"by": "", "study_id": agreed.study.id}, "nothing was recorded"),
        ({"by": "Dr. Beech", "study_id": "0" * 64}, "read the terms again"),
        ({"by": "Dr. Beech"}, "read the terms again"),
        *(
            ({"by": by, "study_id": agreed.study.id}, "nothing was recorded")
            for by in (7, ["Beech"], "\ud800", "Dr.\x1b[31m", "Dr.\nBeech", "Dr.\u202eBeech", "B" * 121)
        ),
    ):
        status, text, _ = ask(page, "do/accept", body=body, **own(page))
        assert status == 409
        assert why in text
    assert not runs_accepted(file, agreed, key)
    status, text, _ = ask(page, "do/accept", body={"by": "Dr. Beech", "study_id": agreed.study.id}, **own(page))
    assert (status, "accepted by Dr. Beech at" in text) == (200, True)
    assert runs_accepted(file, agreed, key)
    assert [one["by"] for one in Place(site).facts()["terms"]["accepted"]] == ["Dr. Beech"]


def test_the_sites_own_policy_holds_on_the_page_too(folder: Path, opened: Open) -> None:
    site = folder / "sites/ash"
    text = (site / "site.toml").read_text()
    (site / "site.toml").write_text(re.sub(r"^min_sites = .*$", "min_sites = 60", text, flags=re.M))
    assert "min_sites = 60" in (site / "site.toml").read_text()
    file, agreed = read_site(site)
    shutil.rmtree(file.state_folder.accepted)
    page = opened(site)
    body = {"by": "Dr. Beech", "study_id": agreed.study.id}
    assert ask(page, "do/accept", body=body, **own(page))[0] == 409
    assert not file.state_folder.accepted.exists()


def test_stop_ends_the_process_that_runs_there_and_no_other(folder: Path, opened: Open) -> None:
    site = folder / "sites/ash"
    state = site / "state"
    page = opened(site)
    status, text, _ = ask(page, "do/stop", body={}, **own(page))
    assert (status, "no process runs here" in text) == (409, True)
    program = (
        "import sys, pathlib, time\n"
        "from secure_fed.core.storage import exclusive\n"
        "from secure_fed.core.status import StatusFile\n"
        "state = pathlib.Path(sys.argv[1])\n"
        "with exclusive(state):\n"
        "    StatusFile(state).begin('site', site='ash')\n"
        "    print('in', flush=True)\n"
        "    time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-P", "-c", program, str(state)], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"in\n"
        assert is_running(state)
        assert ask(page, "do/stop", body={}, **own(page))[0] == 200
        assert child.wait(20) != 0
    server = opened(folder / "server")
    assert ask(server, "do/stop", body={}, **own(server))[0] == 409


def test_the_command_prints_the_link_and_refuses_what_is_no_state(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(LivePage, "serve", lambda self: None)
    behind: list[int] = []
    monkeypatch.setattr(os, "nice", behind.append)
    StatusFile(tmp_path).begin("server", study="small")
    shown = CliRunner().invoke(app, ["page", str(tmp_path)]).output
    assert behind == [19]  # a study on the same machine goes first
    assert re.match(r"http://127\.0\.0\.1:[0-9]+/[\w-]{43}/\n", shown)
    assert isinstance(CliRunner().invoke(app, ["page", str(tmp_path / "none")]).exception, RecordError)
    (tmp_path / "images/dark").mkdir(parents=True)
    (tmp_path / "images/dark/1.png").touch()
    for command in ("page", "status"):
        refused = CliRunner().invoke(app, [command, str(tmp_path / "images")])
        assert "give the folder that site.toml is in" in str(refused.exception)
        assert not refused.output

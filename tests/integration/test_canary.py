"""Nothing about a patient is in a log or on the wire.

Canaries in paths, file names, ids, labels and image headers, and a search of every byte that a site reports, keeps for
its operator, or sends.
"""

from __future__ import annotations

import contextlib
import csv
import json
import logging
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message, RecordDict
from flwr.common.serde import message_to_proto
from PIL import Image, PngImagePlugin

import secure_fed.operate.taking_part
from secure_fed.cli import main
from secure_fed.clients.flower_app import SiteApp
from secure_fed.clients.outgoing_log import SentList
from secure_fed.clients.sitefile import SitePrivacy, read_site_file
from secure_fed.core.errors import (
    BundleError,
    DataError,
    LabelError,
    ManifestError,
    RoundFailedError,
    StorageError,
    UnreadableImageError,
)
from secure_fed.core.tomlfile import read_toml, write_toml
from secure_fed.protocol.rounds import RoundRequest
from secure_fed.transport.flower_messages import contract, read_reply
from tests.conftest import CLASSES, Federation, make_template, pass_step
from tests.flower_messages import Shelf, as_message
from tests.network import AUDIT, Network

CANARY = "cAnArY"
"""Part of every planted name; its own spelling, so that nothing else has it."""

TAP = """
import os, ssl
sent = os.open(os.environ["SENT_BYTES"] + f".{os.getpid()}", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
for name in ("send", "sendall", "write"):
    def tapped(self, data, *rest, true=getattr(ssl.SSLSocket, name)):
        os.write(sent, bytes(data))
        return true(self, data, *rest)
    setattr(ssl.SSLSocket, name, tapped)
"""
"""In ``sitecustomize.py``: every process keeps what it writes into TLS, before it is encrypted."""


def plant(images: Path, folder: Path) -> None:
    """A copy of a site's images in which every name that a hospital could have chosen is a canary."""
    folder.mkdir(parents=True)
    rows = []
    for number, source in enumerate(sorted(images.rglob("*.png"))):
        name = f"{CANARY}-name-{number}.png"
        header = PngImagePlugin.PngInfo()
        header.add_text("Comment", f"{CANARY}-header-{number}")
        Image.open(source).save(folder / name, pnginfo=header)
        split = ("train", "train", "train", "val", "test")[number % 5]
        rows.append([name, f"{CANARY}-patient-{number}", source.parent.name, split])
    (folder / f"{CANARY}-broken.png").write_bytes(b"\x89PNG\r\n\x1a\n cut off")
    rows.append([f"{CANARY}-broken.png", f"{CANARY}-patient-x", CLASSES[0], "train"])
    with (folder / "manifest.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([["path", "patient", "label", "split"], *rows])


def point_at(site: Path, folder: Path, **changes: Any) -> None:
    """Make a site's data patients' data in a folder."""
    file = read_toml(site, type(read_site_file(site)), ValueError)  # type: ignore[type-var]
    data = file.data.model_copy(update={"folder": str(folder), "kind": "patients", "unit": "patient", "shares": None})
    write_toml(site, file.model_copy(update={"data": data, **changes}))


def with_canary(folder: Path) -> list[str]:
    """Files below a folder that have the canary in name or content."""
    found = []
    for path in sorted(folder.rglob("*")):
        if CANARY in path.name or (path.is_file() and CANARY.encode() in path.read_bytes()):
            found.append(str(path.relative_to(folder)))
    return found


# --- a whole study of real processes ---


@dataclass
class Seen:
    network: Network
    status: dict[str, dict[str, Any]] = field(default_factory=dict)
    stopped: dict[str, int] = field(default_factory=dict)
    exits: dict[str, int] = field(default_factory=dict)


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Iterator[Seen]:
    folder = tmp_path_factory.mktemp("canary")
    network = Network(folder / "out", make_template(rounds=3, round_seconds=240), images)
    plant(images / "ash", folder / f"{CANARY}-folder")
    privacy = SitePrivacy(epsilon=8.0, n_ref=20)
    ash = network.site_folder("ash")
    point_at(ash / "site.toml", folder / f"{CANARY}-folder", skip_unreadable=True, privacy=privacy)
    (network.folder / "audit" / "sitecustomize.py").write_text(AUDIT + TAP)
    facts = Seen(network)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("SENT_BYTES", str(folder / "sent"))
        try:
            network.start("server", *network.names)
            network.wait_until(lambda: network.records >= 2, 240)
            look(facts)
            for name in ("birch", "server"):  # as a service manager stops them
                network.processes[name].send_signal(signal.SIGTERM)
                facts.stopped[name] = network.processes[name].wait(60)
            facts.status["stopped"] = status(network.folder / "server")
            network.start("birch", "server")
            facts.exits = network.wait(300)
            facts.status["over"] = status(network.folder / "server")
            yield facts
        finally:
            network.close()


def look(facts: Seen) -> None:
    network = facts.network
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        facts.status["server"] = status(network.folder / "server")
        facts.status["ash"] = status(network.site_folder("ash") / "state")
        if facts.status["server"].get("rounds_closed", 0) >= 1 and facts.status["ash"].get("round", 0) >= 1:
            return
        time.sleep(0.2)


def status(state: Path) -> dict[str, Any]:
    from secure_fed.operate.standing import standing

    return standing(state)


def sent_by(seen: Seen, name: str) -> bytes:
    pid = seen.network.processes[name].pid
    return (seen.network.folder.parent / f"sent.{pid}").read_bytes()


@pytest.mark.slow
def test_the_study_went_through(seen: Seen) -> None:
    assert set(seen.exits.values()) == {0}, {name: seen.network.log(name)[-500:] for name in seen.exits}
    digests = {seen.network.summary(name)["adapter_digest"] for name in seen.network.names}
    assert len(digests) == 1


@pytest.mark.slow
def test_no_byte_that_the_site_sent_has_a_canary(seen: Seen) -> None:
    sent = sent_by(seen, "ash")
    assert b"SFE2" in sent  # the control: the tap sees envelopes in clear
    assert b"/v1/fleet/push" in sent
    assert CANARY.encode() not in sent


@pytest.mark.slow
def test_no_log_status_or_state_of_the_site_has_a_canary(seen: Seen) -> None:
    ash = seen.network.site_folder("ash")
    log = seen.network.log("ash")
    assert "left out 1 unreadable image" in log
    assert CANARY not in log
    assert (ash / "state" / "log" / "site.jsonl").stat().st_size > 0
    assert with_canary(ash / "state") == []
    assert with_canary(ash) == ["site.toml"]  # the control: the search finds the folder's name


@pytest.mark.slow
def test_nobody_else_has_a_canary(seen: Seen) -> None:
    folder = seen.network.folder
    assert with_canary(folder / "server") == []
    for name in ("birch", "cedar", "dogwood"):
        assert with_canary(seen.network.site_folder(name)) == []
    for name in (*seen.network.names, "server"):
        assert CANARY not in seen.network.log(name)


@pytest.mark.slow
def test_every_update_that_the_site_sent_is_in_its_list(seen: Seen) -> None:
    rows = SentList(seen.network.site_folder("ash") / "state").read()
    updates = [row for row in rows if row.code == "update"]
    assert {row.round for row in updates} == {1, 2, 3}
    assert all(len(row.envelope) == 64 for row in updates)
    assert sum(row.bytes for row in rows) < len(sent_by(seen, "ash"))


@pytest.mark.slow
def test_status_of_running_processes(seen: Seen) -> None:
    server, ash = seen.status["server"], seen.status["ash"]
    assert server["running"] is True
    assert server["role"] == "server"
    assert (server["rounds"], server["min_sites"]) == (3, 3)
    assert server["rounds_closed"] >= 1
    assert server["bytes_up"] > 0
    assert set(server["sites"]) == set(seen.network.names)
    assert server["sites"]["dogwood"]["role"] == "observer"
    assert sum(one["connected"] for one in server["sites"].values()) == 4
    assert ash["running"] is True
    assert (ash["role"], ash["site"], ash["rounds"]) == ("site", "ash", 3)
    assert ash["round"] >= 1
    over = seen.status["over"]
    assert over["running"] is False
    assert over["finished"] is True
    assert over["rounds_closed"] == 3


@pytest.mark.slow
def test_a_service_managers_stop_is_clean(seen: Seen) -> None:
    assert seen.stopped == {"birch": 130, "server": 130}
    assert seen.status["stopped"]["running"] is False
    for name in ("birch", "server"):
        assert "Traceback" not in seen.network.log(name)


@pytest.mark.slow
def test_logs_are_lines_of_json(seen: Seen) -> None:
    state = seen.network.folder / "server"
    for path in (state / "log" / "server.jsonl", state / "log" / "rounds.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert lines
        assert all(set(line) == {"time", "level", "module", "message"} for line in lines)
    assert any("round 1 of 3" in line["message"] for line in lines)
    # They say what stderr says, and nothing else.
    for line in lines:
        assert line["message"].splitlines()[0] in seen.network.log("server")


# --- in this process ---


def test_no_message_of_a_site_has_a_canary(federation: Federation, images: Path, tmp_path: Path) -> None:
    """Updates, acknowledgements of nothing, refusals and failures, as the bytes that Flower would send."""
    data = tmp_path / f"{CANARY}-folder"
    plant(images / "ash", data)
    path = federation.folder / "sites" / "ash"
    point_at(path / "site.toml", data, skip_unreadable=True, privacy=SitePrivacy(epsilon=8.0, n_ref=20))
    sites = federation.sites()
    coordinator = federation.begin(sites)
    sent = SentList(path / "state")
    app = SiteApp(sites[0], federation.agreed.study.id, lambda site: None, sent.add)
    messages: list[bytes] = []
    shelf = Shelf()

    def ask(request: RoundRequest, bundle: bytes | None = None) -> Message:
        context = Context(1, 1, {}, RecordDict(), {})
        answer = app.answer(as_message(request, shelf), context, bundle or contract(federation.agreed.study.id), shelf)
        messages.append(message_to_proto(answer).SerializeToString())
        return answer

    def question() -> RoundRequest:
        return coordinator.request("ash", sites[0].run, sites[0].position)

    coordinator.receive(read_reply(ask(question()).content, "ash", shelf.fetch))
    pass_step(coordinator, sites[1:])
    update = read_reply(ask(question()).content, "ash", shelf.fetch)
    assert update.envelope
    coordinator.receive(update)
    pass_step(coordinator, sites[1:])
    ask(question())
    ask(RoundRequest(9, 1, (), more=False))  # does not fit: refused
    ask(question(), b"code")  # another bundle
    assert isinstance(app.failure, BundleError)
    assert with_canary(path / "state") == []  # the snapshot of the run's data among it
    shutil.rmtree(path / "state" / "runs")  # nothing of the site works any more
    app.failure = None
    sites[0]._features = None
    (data / "manifest.csv").unlink()
    ask(coordinator.request("ash", "", 0))
    codes = [row.code for row in sent.read()]
    assert codes[:-1] == ["ready", "update", "revealed", "failed-protocol", "refused-bundle"]
    assert codes[-1].startswith("failed")
    left = [*messages, *shelf.held.values()]
    assert [message for message in left if CANARY.encode() in message] == []
    assert update.envelope in left  # the control: these are the bytes
    assert with_canary(path / "state") == []


# --- refusals that quote names ---


@pytest.fixture
def own_logging() -> Iterator[None]:
    """The client sets up logging for its process; this one goes on."""
    names = ["", "secure_fed", "flwr", "py.warnings"]
    kept = {name: (logging.getLogger(name).handlers[:], logging.getLogger(name).level) for name in names}
    yield
    logging.captureWarnings(False)
    for name, (handlers, level) in kept.items():
        logging.getLogger(name).handlers[:] = handlers
        logging.getLogger(name).setLevel(level)


FAULTS = {
    "folder": DataError,
    "image": UnreadableImageError,
    "label": LabelError,
    "row": ManifestError,
    "unforeseen": RoundFailedError,
    "disk": StorageError,
}


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_refusal_names_names_at_a_terminal_only(
    fault: str,
    terminal: bool,
    federation: Federation,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    own_logging: None,
) -> None:
    data = tmp_path / f"{CANARY}-folder"
    plant(images / "ash", data)
    site = federation.folder / "sites" / "ash"
    point_at(site / "site.toml", data, skip_unreadable=fault != "image")
    (site / "site.toml").write_text(
        (site / "site.toml").read_text() + '\n[server]\naddress = "127.0.0.1:1"\nauthority = "ca.crt"\n'
    )
    manifest = data / "manifest.csv"
    if fault == "folder":
        shutil.rmtree(data)
    elif fault == "label":
        manifest.write_text(manifest.read_text().replace(",dark,", f",{CANARY}-label,"))
    elif fault == "row":
        (data / f"{CANARY}-name-3.png").unlink()
    elif fault in ("unforeseen", "disk"):
        error = KeyError(f"{CANARY}-key") if fault == "unforeseen" else OSError(28, "No space", f"{data}/{CANARY}")

        def broken(*arguments: object, **options: object) -> None:
            logging.getLogger("pydicom").error("%s in a header", CANARY)
            raise error

        monkeypatch.setattr("secure_fed.clients.site.Site.features", broken)
    monkeypatch.setattr(secure_fed.operate.taking_part, "run_site", lambda *arguments: None)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr(sys, "argv", ["secfacmic", "client", "--site", str(site / "site.toml")])
    capfd.readouterr()
    with pytest.raises(SystemExit) as end:
        main()
    said = capfd.readouterr().err
    assert end.value.code == FAULTS[fault].exit_code
    assert "Traceback" not in said
    quotes = terminal and fault in ("folder", "image", "label", "row")
    assert (CANARY in said) == quotes
    assert with_canary(site / "state") == []
    told = status(site / "state")
    assert told["running"] is False
    assert told["last_error"]["text"]
    with contextlib.suppress(FileNotFoundError):
        assert CANARY not in (site / "state" / "log" / "site.jsonl").read_text()

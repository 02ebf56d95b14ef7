"""A round on phantoms over the line, before the study's first: nothing is at stake in it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import secure_fed.lab.line_rehearsal
from secure_fed.clients.flower_app import RehearsalApp
from secure_fed.clients.sitefile import SiteData, SiteFile, SitePrivacy, SiteServer, read_site_file
from secure_fed.core.errors import EnvelopeError, SiteFileError, StorageError, StudyError
from secure_fed.core.storage import exclusive
from secure_fed.lab.line_rehearsal import rehearse_round
from secure_fed.server.byte_store import Outgoing
from secure_fed.server.round_loop import RoundLoop
from tests.conftest import TRAINING, Federation
from tests.integration.test_flower_rounds import Wire, _begin, _federation, _identity, _steps

__all__ = ["_identity"]  # a fixture

Play = Callable[[RehearsalApp, object], None]


def _file(federation: Federation, **changes: Any) -> SiteFile:
    """Ash's, with images that are not there and a budget."""
    file = read_site_file(federation.folder / "sites" / "ash" / "site.toml")
    data = SiteData(folder="/nowhere/at/all", kind="patients")
    known = {"server": SiteServer(address="127.0.0.1:1", authority="ca.crt"), "data": data}
    return file.model_copy(update=known | {"privacy": SitePrivacy(epsilon=3.0), "max_epsilon": 3.0} | changes)


def _played(wire: Wire, loop: RoundLoop, caplog: pytest.LogCaptureFixture) -> Play:
    """What stands for the connection: the loop's own messages, as long as the site takes part."""

    def play(app: RehearsalApp, way: object) -> None:
        number = wire.nodes["ash"]
        before, wire.apps[number] = wire.apps[number], app
        _steps(loop, lambda: "rehearses, and leaves then" in caplog.text or app.failure is not None)
        if app.failure is not None:
            raise app.failure
        app.after_reply(taken=True)
        assert app.finished
        wire.apps[number] = before

    return play


def test_what_a_round_takes_goes_up_and_comes_back_and_nothing_of_the_site_is_touched(
    federation: Federation, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "secure_fed")
    coordinator, wire, loop = _begin(federation)
    state = federation.folder / "sites" / "ash" / "state"
    before = sorted(state.rglob("*"))
    wire.away.update({"birch", "cedar", "dogwood"})
    monkeypatch.setattr(secure_fed.lab.line_rehearsal, "run_site", _played(wire, loop, caplog))
    done = rehearse_round(_file(federation))
    assert done.size == coordinator.journal.chain.wire.payload_bytes
    assert sorted(path for path in state.rglob("*") if path.name not in ("lock", "format")) == [
        path for path in before if path.name not in ("lock", "format")
    ]
    ash = next(site for site in loop._sites if site.name == "ash")
    assert ash.presence is None  # it is not ready, it rehearses
    assert ash.lent in wire.shelf.held
    # It leaves; what was lent is taken back, and the study begins as if nothing had been.
    lent = ash.lent
    wire.away = {"ash"}
    _steps(loop, lambda: not ash.since)
    assert lent not in wire.shelf.held
    wire.away.clear()
    loop.run()
    assert [entry.sites for entry in coordinator.rounds] == [TRAINING] * 3


@pytest.mark.parametrize("method", [{"private_head": True}, {"adapter": "gaussian_head", "min_patients": 2}])
def test_every_method_can_be_rehearsed(
    method: dict[str, Any], images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    caplog.set_level("INFO", "secure_fed")
    rounds = 1 if "adapter" in method else 2
    federation = _federation(tmp_path, images, method=method, rounds=rounds)
    coordinator, wire, loop = _begin(federation)
    monkeypatch.setattr(secure_fed.lab.line_rehearsal, "run_site", _played(wire, loop, caplog))
    done = rehearse_round(_file(federation, privacy=None, max_epsilon=None))
    assert done.size == coordinator.journal.chain.wire.payload_bytes


def test_other_bytes_that_come_back_are_told(
    federation: Federation, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "secure_fed")
    _, wire, loop = _begin(federation)
    play = _played(wire, loop, caplog)

    def garbled(app: RehearsalApp, way: object) -> None:
        play(app, way)
        app.returned = app.returned[:-8] + bytes(8)

    monkeypatch.setattr(secure_fed.lab.line_rehearsal, "run_site", garbled)
    with pytest.raises(EnvelopeError, match="does not open to what was sent"):
        rehearse_round(_file(federation))


def test_a_study_whose_rounds_have_begun_is_not_disturbed(
    federation: Federation, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    coordinator, wire, loop = _begin(federation)
    _steps(loop, lambda: len(coordinator.rounds) == 1)
    loop._sites[0].position, loop._sites[0].asked = None, ""
    monkeypatch.setattr(secure_fed.lab.line_rehearsal, "run_site", _played(wire, loop, caplog))
    with pytest.raises(StudyError, match="asks for a round already"):
        rehearse_round(_file(federation))


def test_who_runs_or_has_no_server_rehearses_nothing(federation: Federation) -> None:
    with pytest.raises(SiteFileError, match=r"no \[server\] table"):
        rehearse_round(_file(federation, server=None))
    with exclusive(federation.folder / "sites" / "ash" / "state"), pytest.raises(StorageError):
        rehearse_round(_file(federation))
    with pytest.raises(SiteFileError, match="min_sites"):
        rehearse_round(_file(federation, min_sites=9))


def test_what_is_lent_is_taken_back_but_not_what_is_there_for_good(tmp_path: Path) -> None:
    outgoing = Outgoing(tmp_path)
    digest = outgoing.lend(b"a rehearsal")
    assert (tmp_path / digest).read_bytes() == b"a rehearsal"
    outgoing.take_back(digest)
    assert not (tmp_path / digest).exists()
    record = outgoing.publish(b"a record")
    assert outgoing.lend(b"a record") == ""
    assert (tmp_path / record).exists()
    shutil.rmtree(tmp_path)

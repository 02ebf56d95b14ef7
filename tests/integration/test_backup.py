"""The page on a server's backup, played word for word: the server's folder is lost, and the study goes on."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from secure_fed.core.layout import SiteState
from secure_fed.server.coordinator import Coordinator, Step
from secure_fed.server.supervisor import ServerFolders
from tests.conftest import TRAINING, Federation
from tests.integration.test_flower_rounds import _begin, _identity, _loop, _steps

__all__ = ["_identity"]  # a fixture

PAGE = Path(__file__).parents[2] / "docs" / "backup.md"
NAMES = {"ash": "north", "birch": "east"}


def _blocks() -> list[tuple[str, str]]:
    """Whose each block is, and what is typed there."""
    return re.findall(r"^```sh host=(\w+)\n((?:.*\n)*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)


def _type(block: str, folder: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(PAGE.parents[1])}
    typed = ["bash", "-euo", "pipefail", "-c", block]
    return subprocess.run(typed, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("step", [Step.READY, Step.ENVELOPE, Step.REVEAL])
def test_a_lost_server_goes_on_from_its_backup_and_the_sites_copies(
    federation: Federation, tmp_path: Path, step: Step
) -> None:
    (_, backup), (_, hand_over), (_, restore) = _blocks()
    coordinator, wire, loop = _begin(federation)
    _steps(loop, lambda: len(coordinator.rounds) == 1)
    assert _type(backup, federation.folder).returncode == 0
    _steps(loop, lambda: len(coordinator.rounds) == 2 and coordinator.step is step)
    lost = coordinator.journal.chain.head
    new = tmp_path / "new"
    new.mkdir()
    shutil.copy(federation.folder / "backup.tar.gz", new)
    shutil.rmtree(federation.folder / "server")
    for name, called in NAMES.items():
        folder = federation.folder / "sites" / name
        done = _type(hand_over, folder)
        assert done.returncode == 0, done.stderr
        shutil.move(folder / "journal.tar.gz", new / f"{called}.tar.gz")
    done = _type(restore, new)
    assert done.returncode == 0, done.stderr
    # Nothing that a site stores for itself has left it.
    handed = {path.relative_to(new / "copies") for path in (new / "copies").rglob("*") if path.is_file()}
    assert {path.suffix or path.name for path in handed} <= {".record", ".envelope", ".frame", "run"}
    again = ServerFolders(new / "study.toml", new / "server").coordinator(federation.agreed)
    loop = _loop(federation, again, wire)
    _steps(loop, lambda: again.finished, 60)
    loop.run()
    assert [entry.sites for entry in again.rounds] == [TRAINING] * 3
    assert again.rounds[1].id == lost  # also where no site had the record yet: the same sum was revealed again
    assert {app.site.round for app in wire.apps.values()} == {3}
    assert len({app.site.adapter_digest for app in wire.apps.values()}) == 1


def test_the_archive_alone_is_older_than_the_study_and_refused(
    federation: Federation, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (_, backup), _, (_, restore) = _blocks()
    coordinator, wire, loop = _begin(federation)
    _steps(loop, lambda: len(coordinator.rounds) == 1)
    assert _type(backup, federation.folder).returncode == 0
    _steps(loop, lambda: len(coordinator.rounds) == 2 and coordinator.step is Step.ENVELOPE)
    (tmp_path / "new").mkdir()
    shutil.copy(federation.folder / "backup.tar.gz", tmp_path / "new")
    assert _type(restore.splitlines()[0], tmp_path / "new").returncode == 0
    server = tmp_path / "new" / "server"
    older: Coordinator = ServerFolders(tmp_path / "new" / "study.toml", server).coordinator(federation.agreed)
    before = SiteState(federation.folder / "sites" / "ash" / "state").run(older.run).journal
    records = sorted(path.name for path in before.iterdir())
    _steps(_loop(federation, older, wire), lambda: "older than the study" in caplog.text)
    assert sorted(path.name for path in before.iterdir()) == records

"""A server's or a site's process: one a state folder, and only while the study is open."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from secure_fed.clients.sitefile import SiteServer, read_site_file
from secure_fed.core.errors import DataError, SiteFileError, StorageError, StudyClosedError
from secure_fed.core.status import StatusFile, is_running
from secure_fed.operate.running import running
from secure_fed.operate.taking_part import take_part
from tests.conftest import Federation


def test_a_state_folder_has_one_process_and_keeps_what_it_says(tmp_path: Path) -> None:
    with running(tmp_path, "server"):
        assert is_running(tmp_path)
        logging.getLogger("secure_fed.server").error("the disk is old")
        with pytest.raises(StorageError, match="another process"), running(tmp_path, "server"):
            pass
    assert not is_running(tmp_path)
    assert "the disk is old" in (tmp_path / "log" / "server.jsonl").read_text()
    assert StatusFile(tmp_path).read()["last_error"]["text"] == "the disk is old"


KILLED = """
import os, sys
from pathlib import Path
from secure_fed.core.storage import durable
with durable(Path(sys.argv[1])) as stream:
    stream.write(b"a key that is to be erased later")
    stream.flush()
    os.kill(os.getpid(), 9)
"""


def test_what_a_killed_process_had_begun_to_write_is_gone_when_the_next_one_starts(tmp_path: Path) -> None:
    run = tmp_path / "runs/abc"
    run.mkdir(parents=True)
    written = run / "bound.json"
    written.write_bytes(b"before")
    (run / ".nfs-of-somebody").write_bytes(b"else")
    assert subprocess.run([sys.executable, "-P", "-c", KILLED, str(written)], check=False).returncode == -9
    assert any(b"to be erased" in path.read_bytes() for path in run.iterdir())
    with running(tmp_path, "site"):
        pass
    assert {path.name: path.read_bytes() for path in run.iterdir()} == {
        "bound.json": b"before",
        ".nfs-of-somebody": b"else",
    }


def test_a_server_whose_folder_is_not_there_says_what_makes_it(tmp_path: Path) -> None:
    for state in (tmp_path / "none", tmp_path / "none/below"):
        with (
            pytest.raises(StorageError, match=rf"{state}: no folder; .* secfacmic study new makes"),
            running(state, "server"),
        ):
            pass
    assert not (tmp_path / "none").exists()


def test_nothing_runs_where_the_study_is_closed(tmp_path: Path) -> None:
    (tmp_path / "closed").write_text("{}")
    with pytest.raises(StudyClosedError), running(tmp_path, "site"):
        pass
    assert not (tmp_path / "log").exists()


def test_a_site_without_a_server_is_refused_before_anything_is_made(federation: Federation, tmp_path: Path) -> None:
    file = read_site_file(federation.folder / "sites/ash/site.toml")
    state = tmp_path / "state"
    with pytest.raises(SiteFileError, match=r"no \[server\] table"):
        take_part(file.model_copy(update={"state": str(state)}))
    assert not state.exists()


@pytest.mark.parametrize(("kind", "in_full"), [("patients", True), ("patients", False), ("public", False)])
def test_what_a_refusal_quotes_of_patients_reaches_no_status(federation: Federation, kind: str, in_full: bool) -> None:
    file = read_site_file(federation.folder / "sites/ash/site.toml")
    folder = federation.folder / "ward-of-mueller"
    data = file.data.model_copy(update={"folder": str(folder), "kind": kind})
    server = SiteServer(address="127.0.0.1:1", authority="ca.crt")
    with pytest.raises(DataError) as refusal:
        take_part(file.model_copy(update={"data": data, "server": server}), in_full=in_full)
    told = StatusFile(Path(file.state)).read()["last_error"]["text"]
    assert ("mueller" in str(refusal.value)) == (in_full or kind == "public")
    assert ("mueller" in told) == (kind == "public")

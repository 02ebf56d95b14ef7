"""Commands on state folders of other layouts: those of version 0.1, which name none, and newer ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from secure_fed.core.errors import StateFormatError
from secure_fed.core.layout import FORMAT
from tests.conftest import Federation, Run, run_round


@pytest.mark.parametrize(
    "command",
    [
        ("client", "--site", "sites/ash/site.toml"),
        ("site", "sent", "sites/ash"),
        ("keys", "show", "--site", "sites/ash/site.toml"),
        ("data", "forget", "somebody", "--site", "sites/ash/site.toml"),
        ("journal", "verify", "sites/ash/state"),
        ("status", "sites/ash/state"),
        ("study", "close", "study.toml", "--site", "sites/ash/site.toml", "--abandon"),
        ("evidence", "pack", "sites/ash", "--out", "evidence.zip"),
        ("server", "--study", "study.toml", "--mode", "plain", "--state", "server"),
        ("status", "server"),
        ("study", "close", "study.toml", "--state", "server", "--abandon"),
        ("journal", "verify", "server"),
    ],
    ids=" ".join,
)
def test_commands_refuse_a_newer_folder_and_leave_it_as_it_is(
    command: tuple[str, ...], secfacmic: Run, federation: Federation
) -> None:
    site_file = federation.folder / "sites" / "ash" / "site.toml"
    with site_file.open("a") as stream:
        stream.write('\n[server]\naddress = "localhost:1"\nauthority = "ca.crt"\n')
    states = [federation.folder / "sites" / "ash" / "state", federation.folder / "server"]
    for state in states:
        (state / "format").write_text(f"{FORMAT + 1}\n")
    before = [_content(state) for state in states]
    result = secfacmic(*command, cwd=federation.folder)
    assert result.returncode == StateFormatError.exit_code, result.stderr
    assert f"layout '{FORMAT + 1}'; this program reads layout {FORMAT}" in " ".join(result.stderr.split())
    assert [_content(state) for state in states] == before


def test_a_study_goes_on_in_folders_of_version_0_1(federation: Federation) -> None:
    sites = federation.sites()
    run_round(federation.begin(sites), sites)
    for state in (*federation.folder.glob("sites/*/state"), federation.folder / "server"):
        (state / "format").unlink()
    again = federation.sites()
    coordinator = federation.reopen()
    run_round(coordinator, again)
    assert coordinator.round == 3
    assert not (federation.folder / "server" / "format").exists()  # which is as good as 1


def _content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

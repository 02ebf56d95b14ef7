"""What a process leaves of where it stands."""

from __future__ import annotations

from pathlib import Path

from secure_fed.core.layout import StateFolder
from secure_fed.core.status import StatusFile


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

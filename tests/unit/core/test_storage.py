"""Durable writes leave the old content or the new one, and names of devices alone."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest

from secure_fed.core.storage import write_durable


def test_a_pipe_or_device_is_written_into_and_stays_what_it_is(tmp_path: Path) -> None:
    pipe, link = tmp_path / "pipe", tmp_path / "stdout"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    for path in (pipe, link):
        read: list[bytes] = []
        reader = threading.Thread(target=lambda read=read: read.append(pipe.read_bytes()), daemon=True)
        reader.start()
        write_durable(path, b"content")
        reader.join(10)
        assert read == [b"content"]
        assert stat.S_ISFIFO(pipe.stat().st_mode)
        assert link.is_symlink()


@pytest.mark.parametrize("there", [False, True])
def test_a_file_is_replaced_whole(tmp_path: Path, there: bool) -> None:
    path = tmp_path / "file"
    if there:
        path.write_bytes(b"old")
    write_durable(path, b"new", 0o600)
    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]

"""Durable writes leave the old content or the new one, and names of devices alone; scratch folders leave nothing."""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
import stat
import tempfile
import threading
from pathlib import Path
from unittest import mock

import pytest

from secure_fed.core.errors import StorageError
from secure_fed.core.storage import scratch_folder, write_durable


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


def test_a_scratch_folder_without_room_names_the_way_out_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    full = OSError(errno.ENOSPC, "No space left on device")

    def durable_write(folder: Path) -> None:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(os, "fsync", mock.Mock(side_effect=full))
            write_durable(folder / "file", b"content")

    def database(folder: Path) -> None:
        raise StorageError(f"{folder / 'looks.sqlite'}: remove the file") from sqlite3.OperationalError("disk is full")

    def stream(_: Path) -> None:
        raise full  # as a stream's write has no name of a file

    def copy(folder: Path) -> None:
        raise shutil.Error([(str(folder / f"{number}"), "to", "No space left") for number in range(99)])

    for within in (durable_write, database, stream, copy):
        with pytest.raises(StorageError) as ended, scratch_folder() as folder:
            within(folder)
        assert str(ended.value).startswith(f"{tmp_path}: has no room for temporary files (")
        assert "name another folder by TMPDIR" in str(ended.value)
        assert len(str(ended.value)) < 300 + len(str(tmp_path))
        assert not list(tmp_path.iterdir())


def test_what_is_beyond_a_scratch_folder_is_told_as_it_is(tmp_path: Path) -> None:
    for error in (StorageError("/data: no room"), OSError(errno.ENOSPC, "full", "/data/file"), OSError(errno.EIO, "")):
        with pytest.raises(type(error)) as ended, scratch_folder():
            raise error
        assert ended.value is error

"""Disks of a test's own, of a size that it chooses, which therefore really fill up."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

PAGE = 4096


@contextmanager
def mounted(folder: Path, size: int) -> Iterator[None]:
    """A disk of so many bytes, of which whole pages count, at an empty folder; as root, else the test fails."""
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size // PAGE * PAGE}", "tmpfs", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        pytest.fail(f"a disk of its own cannot be mounted: {result.stderr.strip()}; run this test as root")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def enlarge(folder: Path, size: int) -> None:
    """Give a disk more room."""
    subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True)


def used(folder: Path) -> int:
    """Bytes that the files of a folder take, in whole pages."""
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return sum(-(-size // PAGE) * PAGE for size in sizes)

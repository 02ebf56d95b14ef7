"""Durable files: whole or absent, never half-written; and nobody may do more with one than with the folder it is in."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from secure_fed.core.errors import OutputError, StorageError

LOCK = "lock"
"""Name of the file by which a process holds a folder."""

NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
"""Of an :class:`OSError`: a disk, or somebody's share of it, is full."""

_UNFINISHED = ".part"
"""How the names end of files that are being written; they begin with a dot."""


def make_folder(path: Path, mode: int = 0o755) -> None:
    """Make a folder and its parents, none open to more people than the folder it is in.

    Raises:
        StorageError: the folder cannot be made.
    """
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        for folder in reversed(missing):
            folder.mkdir(_within(folder.parent, mode), exist_ok=True)
        if not missing:
            path.mkdir(exist_ok=True)  # refuses a file
    except OSError as error:
        raise StorageError(
            f"{path}: the folder cannot be made ({error.strerror}); free space or choose another place"
        ) from error


@contextlib.contextmanager
def made_folder(path: Path, mode: int = 0o755) -> Iterator[None]:
    """A folder to write into, made as :func:`make_folder` does it; if what is done within fails, one that was not there
    before is gone again, with the parents that were made for it.

    Raises:
        StorageError: the folder cannot be made.
    """
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    make_folder(path, mode)
    try:
        yield
    except BaseException:
        if missing:
            shutil.rmtree(path, ignore_errors=True)
        for parent in missing[1:]:
            with contextlib.suppress(OSError):
                parent.rmdir()  # unless somebody else writes there by now
        raise


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder for what nobody needs afterwards, where this machine keeps temporary files; in the end it is gone.

    Raises:
        StorageError: something within cannot be written; what is beyond it is raised as it is.
    """
    with tempfile.TemporaryDirectory(prefix="secfacmic-") as name:
        try:
            yield Path(name)
        except (OSError, StorageError) as error:
            nameless = isinstance(error, OSError) and error.errno in NO_ROOM and error.filename is None
            if name not in str(error) and not nameless:
                raise
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            why = "an incomplete copy" if isinstance(cause, shutil.Error) else getattr(cause, "strerror", None) or cause
            raise StorageError(
                f"{Path(name).parent}: has no room for temporary files ({why}); expected some: free space there, or "
                "name another folder by TMPDIR; nothing that is kept was changed"
            ) from error


def write_durable(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Write a file so that a crash leaves either the old content or the new one; as :func:`durable`.

    Raises:
        StorageError: the disk is full or the place not writable; ``path`` is as it was.
    """
    with durable(path, mode) as stream:
        stream.write(data)


HEAD = 4096
"""Bytes of a file by which it is known whose it is."""


def refuse_foreign(path: Path, own: Callable[[bytes], bool]) -> None:
    """Check, before the work and not after it, that a product can be written to a place that a person named.

    A file that an earlier call of the same command left there may be written over. Any other stays: it may be a
    manifest, an adapter or a key that is nowhere else.

    Args:
        path: the place; a device or pipe is let through.
        own: whether what begins with these :data:`HEAD` bytes is such a product.

    Raises:
        OutputError: a file of another kind or a folder is there.
        StorageError: there is no such folder, it is not writable, or the file cannot be read.
    """
    if path.is_dir():
        raise OutputError(f"{path}: a folder; expected the name of a file, in it or elsewhere")
    if not path.absolute().parent.is_dir():
        raise StorageError(f"{path}: there is no folder {path.parent}; make it, or choose another place")
    if path.exists() and not path.is_file():
        return
    if not os.access(path.absolute().parent, os.W_OK | os.X_OK):
        raise StorageError(f"{path}: nothing can be written into the folder {path.parent}; choose another place")
    if not path.exists():
        return
    try:
        with path.open("rb") as stream:
            head = stream.read(HEAD)
    except OSError as error:
        raise StorageError(f"{path}: exists and cannot be read ({error.strerror}); choose another name") from error
    if head.strip() and not own(head):
        raise OutputError(
            f"{path}: exists, and this command did not write it; expected no file there, or an earlier one of its own: "
            "it is left as it is, choose another name"
        )


DRAWN = {"Software": "secfacmic"}
"""Metadata of a PNG of ours: by it the next call of the same command knows that it may write over it."""


def is_drawn(head: bytes) -> bool:
    """Whether a file that begins so is a PNG with :data:`DRAWN` in it."""
    return head.startswith(b"\x89PNG") and b"Software\0" + DRAWN["Software"].encode() in head


@contextlib.contextmanager
def durable(path: Path, mode: int = 0o644) -> Iterator[IO[bytes]]:
    """A stream whose content becomes the file's once all of it is written.

    It goes into a temporary file beside ``path``, which is fsynced and renamed; then the folder is fsynced. Whatever
    ends this before, Ctrl-C too, leaves ``path`` as it was, and nothing beside it. The file's mode is ``mode`` as far
    as the folder's goes. A device or pipe, such as /dev/null or /dev/stdout, is written into: its name is never given
    to a file.

    Raises:
        StorageError: the disk is full or the place not writable; ``path`` is as it was.
    """
    with _whole(path, mode, synced=True) as stream:
        yield stream


def write_whole(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Write a file that nobody ever sees half written, and whose loss costs nothing: as :func:`write_durable`, but
    without waiting for the disk. When the machine's power is cut it may be gone or empty.

    Raises:
        StorageError: the disk is full or the place not writable; ``path`` is as it was.
    """
    with _whole(path, mode, synced=False) as stream:
        stream.write(data)


@contextlib.contextmanager
def _whole(path: Path, mode: int, *, synced: bool) -> Iterator[IO[bytes]]:
    temporary: str | None = None
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):
            with path.open("wb") as stream:
                yield stream
            return
        descriptor, temporary = tempfile.mkstemp(_UNFINISHED, f".{path.name}.", path.absolute().parent)
        with os.fdopen(descriptor, "wb") as stream:
            os.fchmod(stream.fileno(), _within(path.absolute().parent, mode))
            yield stream
            stream.flush()
            if synced:
                os.fsync(stream.fileno())
        os.replace(temporary, path)
        if synced:
            sync_folder(path.absolute().parent)
    except BaseException as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        if not isinstance(error, OSError):
            raise
        raise StorageError(
            f"{path}: not written ({error.strerror}); expected a writable place with room for it: free space or choose "
            "another place; what was there before is unchanged"
        ) from error


def unfinished(folder: Path) -> list[Path]:
    """What processes that were killed while they wrote have left in a folder and all folders in it: it may hold what
    was to be erased later under its name. To who does not hold the folder, also what is being written."""
    return sorted(folder.rglob(f".*{_UNFINISHED}"))


def remove_unfinished(folder: Path) -> None:
    """Remove it; only for who holds the folder.

    Raises:
        StorageError: it cannot be removed.
    """
    for path in unfinished(folder):
        try:
            path.unlink()
            sync_folder(path.parent)
        except OSError as error:
            raise StorageError(
                f"{path}: left by a write that was cut short, and cannot be removed ({error.strerror}); remove it"
            ) from error


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold a folder for this process alone; the kernel lets go of it however the process ends.

    Raises:
        StorageError: another process holds it, or it cannot be locked.
    """
    with open(folder / LOCK, "w", opener=as_open_as_its_folder) as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StorageError(f"{folder}: another process is using it; wait for it, or stop it") from error
        except OSError as error:
            raise StorageError(
                f"{folder}: cannot be locked ({error.strerror}); expected a file system with locks, as a local disk: a "
                "network file system needs its lock service"
            ) from error
        yield


def try_out(folder: Path) -> None:
    """Do in a folder what keeping state asks of it: lock, write, make durable, rename; leaves nothing.

    Raises:
        OSError: it cannot be done there.
    """
    descriptor, name = tempfile.mkstemp(dir=folder, prefix=".try.")
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.write(descriptor, b"x")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(name, f"{name}.")
        name = f"{name}."
        sync_folder(folder)
    finally:
        os.unlink(name)


def as_open_as_its_folder(path: str, flags: int) -> int:
    """Opener for :func:`open`: a file that is made by it is open to nobody to whom its folder is not."""
    return os.open(path, flags, _within(Path(path).parent, 0o644))


def _within(folder: Path, mode: int) -> int:
    return mode & folder.stat().st_mode


def sync_folder(folder: Path) -> None:
    """Fsync a folder, so that its names survive a crash."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

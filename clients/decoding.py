"""From files to what is made of their pictures, in worker processes."""

from __future__ import annotations

import gc
import hashlib
import multiprocessing
import os
import signal
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from secure_fed.clients.nifti import Axis
from secure_fed.clients.reading import ImageFile, Place, Source, identity_of, open_file, see
from secure_fed.clients.rules import Picture, Rules, UndecodableError
from secure_fed.core.errors import StorageError
from secure_fed.core.processes import die_with

T = TypeVar("T")

MOST_WORKERS = 16
_PLAIN = Rules()
_ROWS = 2**14  # pixels in some rows

_INLINE = 64
"""Fewer images than this are decoded in this process: starting others takes longer."""


@dataclass(frozen=True, slots=True)
class Decoded(Generic[T]):
    """What became of one source.

    Attributes:
        index: its place in the list.
        identity: :func:`secure_fed.clients.reading.identity` of what was decoded; empty if it could not be read.
        value: what was made of the image; None if it cannot be decoded.
        reason: why not; else empty.
        pixels: :func:`digest_of_pixels`, where it was asked for.
    """

    index: int
    identity: bytes
    value: T | None
    reason: str
    pixels: bytes = b""


def decode(content: bytes, frame: int | None = None, axis: Axis = "axial", rules: Rules = _PLAIN) -> Image.Image:
    """One picture of a file, of at most 8 bits a channel.

    Raises:
        UndecodableError: it is broken, or would be turned into something else without a word.
    """
    return see(open_file(content), Place(frame, axis), rules).image


def digest_of_pixels(image: Image.Image) -> bytes:
    """SHA-256 of size and pixels as RGB; of grey ones a few rows after others, which stay in the processor's caches."""
    if image.mode not in ("L", "RGB"):
        image = image.convert("RGB")
    found = hashlib.sha256(struct.pack("<II", *image.size))
    if image.mode == "RGB":
        found.update(image.tobytes())
        return found.digest()
    pixels = np.asarray(image)
    step = max(1, _ROWS // image.width)
    for top in range(0, image.height, step):
        rows = pixels[top : top + step]
        wide = np.empty((*rows.shape, 3), dtype=np.uint8)
        for channel in range(3):
            wide[..., channel] = rows
        found.update(wide.data)
    return found.digest()


class _Files:
    """Opens files and keeps the last one: frames of one file follow one another, and it is read and hashed once."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._content = b""
        self._digest = b""
        self._opened: ImageFile | UndecodableError | None = None

    def identity(self, source: Source) -> bytes:
        """By which the image is known.

        Raises:
            OSError: the file cannot be read.
        """
        if source.path != self._path:
            self._path = None
            self._content = source.path.read_bytes()
            self._path, self._opened = source.path, None
            self._digest = hashlib.sha256(self._content).digest()
        return identity_of(self._digest, source.place)

    def picture(self, source: Source, rules: Rules) -> Picture:
        """The picture of the source whose identity was just asked for.

        Raises:
            UndecodableError: there is none.
        """
        if self._opened is None:
            try:
                self._opened = open_file(self._content)
            except UndecodableError as error:
                self._opened = error
            self._content = b""  # what is opened holds what it needs of it
        if isinstance(self._opened, UndecodableError):
            raise self._opened
        return see(self._opened, source.place, rules)


def identities(sources: Iterable[Source]) -> Iterator[bytes | OSError]:
    """By which images are known, in order; the reason for a file that cannot be read. Each file is read once if its
    frames follow one another."""
    files = _Files()
    for source in sources:
        try:
            yield files.identity(source)
        except OSError as error:
            yield error


def decode_all(
    sources: Sequence[Source],
    work: Callable[[Iterator[Picture]], Sequence[T]],
    batch: int,
    rules: Rules = _PLAIN,
    digests: bool = False,
) -> Iterator[list[Decoded[T]]]:
    """Decode images and do some work on them, batch by batch, in processes of their own: one a processor.

    Processes are forked: they cost no memory for what is loaded already, and end with this one, however it ends. What
    is in flight is bounded by a few batches.

    Args:
        sources: what to decode.
        work: from those pictures of a batch that can be decoded, one at a time, to what is wanted of each; runs in
            the other process on one thread.
        batch: results come in lists of this many, in order; the last one may be shorter.
        rules: how pictures are to be seen.
        digests: whether equal pictures are to be known by their pixels too.

    Raises:
        StorageError: a process was killed, most likely for want of memory.
    """
    inline = len(sources) < _INLINE or multiprocessing.current_process().daemon  # a daemon may have no children
    workers = 0 if inline else min(MOST_WORKERS, len(os.sched_getaffinity(0)))
    loader: DataLoader[Decoded[T]] = DataLoader(
        _Decoding(sources, work, rules, digests),
        batch_size=batch,
        collate_fn=_as_they_are,
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,
        worker_init_fn=partial(_begin, os.getpid()),
        generator=torch.Generator(),  # else it draws a seed from torch's global state
    )
    try:
        with _held_back(signal.SIGINT):  # which is for this process, as Ctrl-C sends it to all of a terminal's
            batches = iter(loader)
        yield from batches
    except RuntimeError as error:
        if "DataLoader worker (pid" not in str(error):
            raise
        raise StorageError(
            f"a process that decodes images was ended ({' '.join(str(error).split())[:160]}); expected memory for "
            f"{workers} images at once: free some and run again, what is done is kept"
        ) from error


class _Decoding(Dataset[Decoded[T]], Generic[T]):
    def __init__(
        self, sources: Sequence[Source], work: Callable[[Iterator[Picture]], Sequence[T]], rules: Rules, digests: bool
    ) -> None:
        self._sources = sources
        self._work = work
        self._rules = rules
        self._digests = digests

    def __len__(self) -> int:
        return len(self._sources)

    def __getitems__(self, indices: list[int]) -> list[Decoded[T]]:
        """One batch; by this name the loader asks for it."""
        identities: dict[int, bytes] = {}
        reasons: dict[int, str] = {}
        decoded: list[int] = []
        pixels: dict[int, bytes] = {}
        files = _Files()

        def pictures() -> Iterator[Picture]:
            for index in indices:
                source = self._sources[index]
                try:
                    identities[index] = files.identity(source)
                    picture = files.picture(source, self._rules)
                except (UndecodableError, OSError) as error:
                    reasons[index] = str(error.strerror if isinstance(error, OSError) else error)
                    continue
                decoded.append(index)
                if self._digests:
                    pixels[index] = digest_of_pixels(picture.image)
                yield picture

        values = dict(zip(decoded, self._work(pictures()), strict=True))
        return [
            Decoded(
                index, identities.get(index, b""), values.get(index), reasons.get(index, ""), pixels.get(index, b"")
            )
            for index in indices
        ]


@contextmanager
def _held_back(number: signal.Signals) -> Iterator[None]:
    """A signal waits until the end, also in processes that are forked within."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin(parent: int, worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with(parent)  # torch's workers look for their parent only when idle, and a full pipe keeps them for ever
    gc.freeze()  # what was there before the fork is not searched again and again, nor copied for that


def _as_they_are(results: list[Decoded[T]]) -> list[Decoded[T]]:
    return results

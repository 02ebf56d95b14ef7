"""From a file to pixels, image by image in worker processes: Pillow's formats and DICOM."""

from __future__ import annotations

import hashlib
import io
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Generic, TypeVar

import torch
from PIL import Image, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset

from secure_fed.clients.dicom import is_dicom, read_slice
from secure_fed.core.errors import StorageError
from secure_fed.core.processes import die_with

T = TypeVar("T")

MOST_WORKERS = 16
_INLINE = 64
"""Fewer images than this are decoded in this process: starting others takes longer."""


class UndecodableError(Exception):
    """Why a file is no usable image."""


@dataclass(frozen=True, slots=True)
class Source:
    """One image: a file, and of a multi-frame file which frame (from 0; None takes the middle one)."""

    path: Path
    frame: int | None = None


@dataclass(frozen=True, slots=True)
class Decoded(Generic[T]):
    """What became of one source.

    Attributes:
        index: its place in the list.
        identity: :func:`identity` of the bytes that were decoded; empty if they could not be read.
        value: what was made of the image; None if it cannot be decoded.
        reason: why not; else empty.
    """

    index: int
    identity: bytes
    value: T | None
    reason: str


def identity(content: bytes, frame: int | None) -> bytes:
    """By which an image is known for ever: SHA-256 of its file, and of a chosen frame its number too."""
    digest = hashlib.sha256(content).digest()
    return digest if frame is None else hashlib.sha256(digest + b"frame %d" % frame).digest()


def decode(content: bytes, frame: int | None = None) -> Image.Image:
    """The whole image, decoded; any Pillow mode of at most 8 bits a channel.

    Raises:
        UndecodableError: it is broken, or would be turned into something else without a word.
    """
    if is_dicom(content):
        try:
            return read_slice(content, frame)
        except ValueError as error:
            raise UndecodableError(str(error)) from error
    try:
        image = Image.open(io.BytesIO(content))
        image.load()
    except UnidentifiedImageError as error:
        raise UndecodableError("no image in a format that Pillow or pydicom knows") from error
    except Exception as error:  # Pillow's readers raise of every kind on broken files
        raise UndecodableError(str(error) or type(error).__name__) from error
    if image.mode[0] in "IF":
        # Pillow cuts these off at 255; which grey values matter is for the site to say.
        raise UndecodableError(f"pixels of mode {image.mode}, more than 8 bits; choose a window and convert it")
    frames = getattr(image, "n_frames", 1)
    if frames != 1 and image.format != "MPO":  # a camera's MPO is one picture and its previews
        raise UndecodableError(f"{frames} frames; expected one image a file, or DICOM")
    if frame is not None:
        raise UndecodableError(f"frame {frame} of a file with one image; expected no frame, or multi-frame DICOM")
    return image


def decode_all(
    sources: Sequence[Source], work: Callable[[Iterator[Image.Image]], Sequence[T]], batch: int
) -> Iterator[list[Decoded[T]]]:
    """Decode images and do some work on them, batch by batch, in processes of their own: one a processor.

    Processes are forked: they cost no memory for what is loaded already, and end with this one, however it ends. What
    is in flight is bounded by a few batches.

    Args:
        sources: what to decode.
        work: from those pictures of a batch that can be decoded, one at a time, to what is wanted of each; runs in
            the other process on one thread.
        batch: results come in lists of this many, in order; the last one may be shorter.

    Raises:
        StorageError: a process was killed, most likely for want of memory.
    """
    inline = len(sources) < _INLINE or multiprocessing.current_process().daemon  # a daemon may have no children
    workers = 0 if inline else min(MOST_WORKERS, len(os.sched_getaffinity(0)))
    loader: DataLoader[Decoded[T]] = DataLoader(
        _Decoding(sources, work),
        batch_size=batch,
        collate_fn=_as_they_are,
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,
        # torch's workers look for their parent only when idle, and a full pipe keeps them for ever.
        worker_init_fn=partial(_die_with, os.getpid()),
        generator=torch.Generator(),  # else it draws a seed from torch's global state
    )
    try:
        yield from loader
    except RuntimeError as error:
        if "DataLoader worker (pid" not in str(error):
            raise
        raise StorageError(
            f"a process that decodes images was ended ({' '.join(str(error).split())[:160]}); expected memory for "
            f"{workers} images at once: free some and run again, what is done is kept"
        ) from error


class _Decoding(Dataset[Decoded[T]], Generic[T]):
    def __init__(self, sources: Sequence[Source], work: Callable[[Iterator[Image.Image]], Sequence[T]]) -> None:
        self._sources = sources
        self._work = work

    def __len__(self) -> int:
        return len(self._sources)

    def __getitems__(self, indices: list[int]) -> list[Decoded[T]]:
        """One batch; by this name the loader asks for it."""
        identities: dict[int, bytes] = {}
        reasons: dict[int, str] = {}
        decoded: list[int] = []

        def pictures() -> Iterator[Image.Image]:
            for index in indices:
                source = self._sources[index]
                try:
                    content = source.path.read_bytes()
                    identities[index] = identity(content, source.frame)
                    picture = decode(content, source.frame)
                except (UndecodableError, OSError) as error:
                    reasons[index] = str(error.strerror if isinstance(error, OSError) else error)
                    continue
                decoded.append(index)
                yield picture

        values = dict(zip(decoded, self._work(pictures()), strict=True))
        return [
            Decoded(index, identities.get(index, b""), values.get(index), reasons.get(index, "")) for index in indices
        ]


def _die_with(parent: int, worker: int) -> None:
    die_with(parent)


def _as_they_are(results: list[Decoded[T]]) -> list[Decoded[T]]:
    return results

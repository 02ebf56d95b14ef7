"""From image files to features, in as many processes as there are processors, or on the GPU."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from secure_fed.clients.decoding import MOST_WORKERS, Decoded, decode_all
from secure_fed.clients.reading import Source
from secure_fed.clients.rules import Picture, Rules
from secure_fed.model.loaded_backbone import LoadedBackbone
from secure_fed.protocol.study_tables import Method

View = Literal["plain", "mirrored"]
_PLAIN = Rules()
_FEW = 8
"""Images on which encoding is measured."""

USUAL = Image.linear_gradient("L").resize((512, 512))
"""A picture of a usual size, where there is none of a site's own to measure with."""


@dataclass(frozen=True)
class Patches:
    """Which features a method sees: of the whole image, without blocks, or of its patches in rows.

    Attributes:
        blocks: of the image tower, by name.
        neighbourhood: patches a side that a feature is the mean of.
    """

    blocks: tuple[str, ...] = ()
    neighbourhood: int = 1

    @classmethod
    def of(cls, method: Method) -> Patches:
        """What a study's method sees."""
        return cls(method.blocks, method.neighbourhood) if method.blocks else WHOLE_IMAGES


WHOLE_IMAGES = Patches()


def encode_all(
    sources: Sequence[Source],
    backbone: LoadedBackbone,
    view: View = "plain",
    rules: Rules = _PLAIN,
    patches: Patches = WHOLE_IMAGES,
    digests: bool = False,
) -> Iterator[list[Decoded[NDArray[np.float32]]]]:
    """Unit features [dim] of images, in order and in short lists, to be kept as they come.

    On a CPU each process decodes and encodes its own batches on one thread: threads that share a batch wait for each
    other at every layer, the more so beside others that decode. A GPU belongs to one process, so the others prepare
    the next batches for this one.

    Args:
        sources: what to encode.
        backbone: by what.
        view: the image as it is, or mirrored left to right.
        rules: how pictures are to be seen.
        patches: whether features are of patches instead.
        digests: as :func:`secure_fed.clients.decoding.decode_all` takes it.

    Raises:
        BackboneError: the tower lacks a named block.
        StorageError: a process was killed, most likely for want of memory.
    """

    def prepared(pictures: Iterator[Picture]) -> list[NDArray[np.float32]]:
        return [backbone.prepare(one.image if view == "plain" else ImageOps.mirror(one.image)) for one in pictures]

    def features(ready: list[NDArray[np.float32]]) -> NDArray[np.float32]:
        if patches.blocks:
            return backbone.encode_patches(ready, patches.blocks, patches.neighbourhood)
        return backbone.encode_prepared(ready)

    def encoded(pictures: Iterator[Picture]) -> list[NDArray[np.float32]]:
        return list(features(prepared(pictures)))

    for block in patches.blocks:
        backbone.grid(block)  # once, before processes begin

    if backbone.device == "cpu":
        yield from decode_all(sources, encoded, backbone.batch, rules, digests)
        return
    for batch in decode_all(sources, prepared, backbone.batch, rules, digests):
        rows = iter(features([one.value for one in batch if one.value is not None]))
        yield [one if one.value is None else replace(one, value=next(rows)) for one in batch]


def seconds_per_image(sources: Sequence[Source], backbone: LoadedBackbone, rules: Rules = _PLAIN) -> float:
    """How long an image takes one processor here from file to feature, measured now on a few of them.

    Args:
        sources: what is to be encoded, one at least that can be decoded.
        backbone: by what.
        rules: how pictures are to be seen.
    """
    few = sources[:: -(-len(sources) // _FEW)]
    start = time.perf_counter()
    batches = decode_all(few, lambda pictures: [one.image for one in pictures], _FEW, rules)
    pictures = [one.value for batch in batches for one in batch if one.value is not None]
    decoding = (time.perf_counter() - start) / len(few)
    return decoding + backbone.seconds_per_image(pictures or [USUAL])


def expected_seconds(each: float, images: int) -> float:
    """How long encoding will take on all processors of this machine.

    Args:
        each: seconds that an image takes on one, as the backbone measures it.
        images: how many there are.
    """
    return each * images / min(MOST_WORKERS, len(os.sched_getaffinity(0)))

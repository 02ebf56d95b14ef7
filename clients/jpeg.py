"""JPEG: what its markers say, whether data are missing in it, and, for pydicom, its pixels by libjpeg-turbo."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import imagecodecs
import numpy as np
from numpy.typing import NDArray
from pydicom.pixels.decoders import base
from pydicom.uid import (
    JPEG2000,
    UID,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
)

DECODER_DEPENDENCIES = dict.fromkeys(
    (JPEGBaseline8Bit, JPEGExtended12Bit, JPEGLossless, JPEGLosslessSV1), ("imagecodecs",)
)
"""By this name pydicom asks a plugin for what it needs."""

_LOSSLESS = (JPEGLossless, JPEGLosslessSV1)
MISSING = "data are missing in it, or others are in their place"
_NEVER = {
    "gdcm": (*DECODER_DEPENDENCIES, JPEGLSLossless, JPEGLSNearLossless, JPEG2000Lossless, JPEG2000),
    "pillow": tuple(DECODER_DEPENDENCIES),
}
"""Of pydicom's plugins those that decode nothing here. On a broken frame gdcm ends the process itself.
Where Adobe's marker says so, Pillow turns luminance and differences into colours, and pydicom then does it again."""

_JFIF, _ADOBE = 0xE0, 0xEE
_EOI, _DRI, _PROGRESSIVE, _LOSSLESS_FRAME, _ARITHMETIC = 0xD9, 0xDD, 0xC2, 0xC3, 0xC9
SCAN, LS_FRAME = 0xDA, 0xF7
_MARKER = re.compile(rb"\xff+[^\x00\xff]")
"""In coded data; 255 itself is written as 255 and 0 there."""

_MORE = hashlib.shake_128(b"JPEG").digest(64).replace(b"\xff", b"\xfe")
"""Data that are no picture's."""

_LAST = 8
"""Bytes of a scan's data of which decoders must come to one: some devices write a few more."""
_ADOBES = {0: "RGB", 1: "YBR_FULL"}
"""The transform in Adobe's marker, as DICOM names colours."""


def is_available(uid: UID) -> bool:
    """Whether a transfer syntax is decoded here; pydicom asks by this name."""
    return uid in DECODER_DEPENDENCIES


def segments(frame: bytes, at: int = 2) -> Iterator[tuple[int, int, bytes]]:
    """A JPEG or JPEG-LS codestream's markers from a place up to the next scan, where the content of each begins, and
    that; none of what is neither."""
    at = at if frame.startswith(b"\xff\xd8") else len(frame)
    while at + 4 <= len(frame) and frame[at] == 0xFF:
        marker = frame[at + 1]
        if marker == 0xFF or 0xD0 <= marker <= 0xD8:  # fill, and markers without a segment
            at += 1 if marker == 0xFF else 2
            continue
        size = int.from_bytes(frame[at + 2 : at + 4], "big")
        yield marker, at + 4, frame[at + 4 : at + 2 + size]
        if marker == SCAN:
            return
        at += 2 + size


def is_ended(frame: bytes) -> bool:
    """Whether an EOI marker follows a JPEG-LS codestream's first scan, in whose data none occurs."""
    start = max((place for _, place, _ in segments(frame)), default=0)
    return frame.find(bytes((0xFF, _EOI)), start) >= 0


def is_frame(marker: int) -> bool:
    """Whether a marker's content is of size, bits and components."""
    return marker == LS_FRAME or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC))


def _is_thinned(content: bytes) -> bool:
    """Whether a frame's first component has more samples than others, as luminance has, and no red."""
    factors = [(one >> 4) * (one & 15) for one in content[7::3]]
    return bool(factors) and factors[0] > min(factors)


class Altered(NamedTuple):
    """A JPEG file written otherwise, by whose pictures it is known whether it is whole: libjpeg says it to nobody.

    Attributes:
        longer: with more behind the data of each scan and restart interval. Decoders pass over what follows whole data;
            where some are missing, of which they would make up grey, they go on with these, to another picture.
        otherwise: with the last data changed, which makes another picture unless decoders never come to them, as where
            data were replaced by shorter codes; empty where nothing can be said of that.
    """

    longer: bytes
    otherwise: bytes


def altered(content: bytes) -> Altered:
    """A JPEG file written in two other ways.

    Raises:
        ValueError: it ends without an EOI marker, or restart markers are missing.
    """
    parts: list[bytes] = []
    frame, coding, every, at, done = b"", 0, 0, 2, 0
    while True:
        scan, start = b"", 0
        for marker, place, segment in segments(content, at):
            if is_frame(marker):
                frame, coding = segment, marker
            elif marker == _DRI:
                every = int.from_bytes(segment[:2], "big")
            elif marker == SCAN:
                scan, start = segment, place + len(segment)
        restarts = 0
        for found in _MARKER.finditer(content, start) if scan else ():
            data, at, kind = (start, found.start()), found.start(), content[found.end() - 1]
            parts += [content[done:at], _MORE]
            start, done = found.end(), at
            if not 0xD0 <= kind <= 0xD7:
                break
            restarts += 1
        else:
            raise ValueError("it ends too early, without an EOI marker")
        if every and restarts < math.ceil(_units(frame, coding, scan) / every) - 1:
            raise ValueError(MISSING)
        if kind != _EOI:
            continue
        if coding >= _ARITHMETIC:  # whose decoders read zeros behind the data, which are not written
            return Altered(content, b"")
        last = b"" if coding == _PROGRESSIVE else _otherwise(content, *data)  # whose last data may be of no weight
        return Altered(b"".join([*parts, content[done:]]), last)


def _otherwise(content: bytes, start: int, end: int) -> bytes:
    """A file whose last data, which lie there, are others; empty if they are few, or some device's padding."""
    last = end - _LAST + (content[end - _LAST - 1] == 0xFF)
    if last - start < _LAST or len(set(content[last:end])) == 1:
        return b""
    return content[:last] + _MORE[: end - last] + content[end:]


def _units(frame: bytes, coding: int, scan: bytes) -> int:
    """How many units a scan codes, which restart intervals are counted in (ISO/IEC 10918-1, A.2)."""
    height, width = int.from_bytes(frame[1:3], "big"), int.from_bytes(frame[3:5], "big")
    factors = {name: (both >> 4, both & 15) for name, both in zip(frame[6::3], frame[7::3], strict=False)}
    side = 1 if coding == _LOSSLESS_FRAME else 8
    across, down = (side * max(factor[place] for factor in factors.values()) for place in (0, 1))
    components = scan[1 : 1 + 2 * scan[0] : 2]
    own = factors[components[0]] if len(components) == 1 else (1, 1)
    return math.ceil(width * own[0] / across) * math.ceil(height * own[1] / down)


def decode_frame(src: bytes, runner: Any) -> bytes:
    """One frame's values as they were coded, 8 or 16 bits each, little-endian, as pydicom's plugins give them.

    Raises:
        ValueError: data of the frame are missing, or others are in their place.
    """
    found, frame = {}, b""
    for marker, _, content in segments(src):
        found[marker] = content
        frame = content if is_frame(marker) else frame
    # Named alike on both sides, nothing converts three samples: that is for the header, or the codestream, to say.
    colour = "RGB" if runner.samples_per_pixel == 3 else None

    def decoded(coded: bytes) -> NDArray[Any]:
        return np.asarray(imagecodecs.jpeg8_decode(coded, colorspace=colour, outcolorspace=colour))

    other, pixels = altered(src), decoded(src)
    for coded, alike in ((other.longer, True), (other.otherwise, False)):  # one by one: a frame may take 100 MB
        if coded and np.array_equal(pixels, decoded(coded)) != alike:
            raise ValueError(MISSING)
    bits = 8 * pixels.dtype.itemsize
    runner.set_option("bits_allocated", bits)
    if colour and runner.transfer_syntax not in _LOSSLESS and not found.get(_JFIF, b"").startswith(b"JFIF"):
        adobe = found.get(_ADOBE, b"")
        if adobe.startswith(b"Adobe") and len(adobe) >= 12 and adobe[11] in _ADOBES:
            runner.set_option("photometric_interpretation", _ADOBES[adobe[11]])
        elif _is_thinned(frame):
            runner.set_option("photometric_interpretation", "YBR_FULL")
    return pixels.astype(f"<u{bits // 8}", copy=False).tobytes()


def register() -> None:
    """Have pydicom use it for JPEG, and nothing use gdcm."""
    for plugin, syntaxes in _NEVER.items():
        for uid in syntaxes:
            decoder = base.get_decoder(uid)
            if plugin in decoder.available_plugins:
                decoder.remove_plugin(plugin)
    for uid in DECODER_DEPENDENCIES:
        decoder = base.get_decoder(uid)
        if "imagecodecs" not in decoder.available_plugins:
            decoder.add_plugin("imagecodecs", (__name__, decode_frame.__name__))

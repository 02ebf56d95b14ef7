"""JPEG for pydicom, whatever its bits, lossy and lossless, by libjpeg-turbo, through imagecodecs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import imagecodecs
import numpy as np
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
_NEVER = {
    "gdcm": (*DECODER_DEPENDENCIES, JPEGLSLossless, JPEGLSNearLossless, JPEG2000Lossless, JPEG2000),
    "pillow": tuple(DECODER_DEPENDENCIES),
}
"""Of pydicom's plugins those that decode nothing here. On a broken frame gdcm ends the process itself.
Where Adobe's marker says so, Pillow turns luminance and differences into colours, and pydicom then does it again."""

_JFIF, _ADOBE = 0xE0, 0xEE
SCAN, LS_FRAME = 0xDA, 0xF7
_ADOBES = {0: "RGB", 1: "YBR_FULL"}
"""The transform in Adobe's marker, as DICOM names colours."""


def is_available(uid: UID) -> bool:
    """Whether a transfer syntax is decoded here; pydicom asks by this name."""
    return uid in DECODER_DEPENDENCIES


def segments(frame: bytes) -> Iterator[tuple[int, int, bytes]]:
    """A JPEG or JPEG-LS codestream's markers up to the first scan, where the content of each begins, and that; none of
    what is neither."""
    at = 2 if frame.startswith(b"\xff\xd8") else len(frame)
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


def is_frame(marker: int) -> bool:
    """Whether a marker's content is of size, bits and components."""
    return marker == LS_FRAME or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC))


def _is_thinned(content: bytes) -> bool:
    """Whether a frame's first component has more samples than others, as luminance has, and no red."""
    factors = [(one >> 4) * (one & 15) for one in content[7::3]]
    return bool(factors) and factors[0] > min(factors)


def decode_frame(src: bytes, runner: Any) -> bytes:
    """One frame's values as they were coded, 8 or 16 bits each, little-endian, as pydicom's plugins give them.

    Raises:
        ValueError: the frame ends before its end is said: libjpeg would make up the rest.
    """
    found, scan, frame = {}, 0, b""
    for marker, start, content in segments(src):
        found[marker], scan = content, start
        frame = content if is_frame(marker) else frame
    if src.rfind(b"\xff\xd9") < scan:
        raise ValueError("it ends too early, without an EOI marker")
    # Named alike on both sides, nothing converts three samples: that is for the header, or the codestream, to say.
    colour = "RGB" if runner.samples_per_pixel == 3 else None
    pixels = np.asarray(imagecodecs.jpeg8_decode(src, colorspace=colour, outcolorspace=colour))
    bits = 8 * pixels.dtype.itemsize
    runner.set_option("bits_allocated", bits)
    if colour and runner.transfer_syntax not in _LOSSLESS and not found.get(_JFIF, b"").startswith(b"JFIF"):
        adobe = found.get(_ADOBE, b"")
        if adobe.startswith(b"Adobe") and len(adobe) >= 12 and adobe[11] in _ADOBES:
            runner.set_option("photometric_interpretation", _ADOBES[adobe[11]])
        elif _is_thinned(frame):
            runner.set_option("photometric_interpretation", "YBR_FULL")
    return pixels.astype(f"<u{bits // 8}").tobytes()


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

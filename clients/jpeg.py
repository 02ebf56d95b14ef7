"""JPEG of 12 bits and lossless JPEG for pydicom, by libjpeg-turbo, through imagecodecs."""

from __future__ import annotations

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

DECODER_DEPENDENCIES = dict.fromkeys((JPEGExtended12Bit, JPEGLossless, JPEGLosslessSV1), ("imagecodecs",))
"""By this name pydicom asks a plugin for what it needs."""

_NEVER = "gdcm"
"""Of pydicom's plugins: on a broken frame it ends the process, and nothing can catch that."""

_ITS_OTHERS = (JPEGBaseline8Bit, JPEGLSLossless, JPEGLSNearLossless, JPEG2000Lossless, JPEG2000)


def is_available(uid: UID) -> bool:
    """Whether a transfer syntax is decoded here; pydicom asks by this name."""
    return uid in DECODER_DEPENDENCIES


def decode_frame(src: bytes, runner: Any) -> bytes:
    """One frame's values as they were coded, 8 or 16 bits each, little-endian, as pydicom's plugins give them."""
    lossless = runner.transfer_syntax != JPEGExtended12Bit
    # Three samples of a lossless frame are what the header says; named alike on both sides, nothing converts them.
    colour = "RGB" if lossless and runner.samples_per_pixel == 3 else None
    pixels = np.asarray(imagecodecs.jpeg8_decode(src, colorspace=colour, outcolorspace=colour))
    bits = 8 * pixels.dtype.itemsize
    if not lossless and (bits != 16 or pixels.ndim != 2):
        raise ValueError(f"{pixels.ndim - 1} colour axes of {bits} bits; expected 12-bit grey")
    runner.set_option("bits_allocated", bits)
    return pixels.astype(f"<u{bits // 8}").tobytes()


def register() -> None:
    """Have pydicom use it, after its own plugins, all but one."""
    for uid in (*DECODER_DEPENDENCIES, *_ITS_OTHERS):
        decoder = base.get_decoder(uid)
        if _NEVER in decoder.available_plugins:
            decoder.remove_plugin(_NEVER)
    for uid in DECODER_DEPENDENCIES:
        decoder = base.get_decoder(uid)
        if "imagecodecs" not in decoder.available_plugins:
            decoder.add_plugin("imagecodecs", (__name__, decode_frame.__name__))

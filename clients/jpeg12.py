"""JPEG of 12 bits for pydicom, whose own plugins decode it not at all: by libjpeg-turbo, through imagecodecs."""

from __future__ import annotations

from typing import Any

import imagecodecs
import numpy as np
from pydicom.pixels.decoders.base import JPEGExtended12BitDecoder
from pydicom.uid import UID, JPEGExtended12Bit

DECODER_DEPENDENCIES = {JPEGExtended12Bit: ("imagecodecs",)}
"""By this name pydicom asks a plugin for what it needs."""


def is_available(uid: UID) -> bool:
    """Whether a transfer syntax is decoded here; pydicom asks by this name."""
    return uid == JPEGExtended12Bit


def decode_frame(src: bytes, runner: Any) -> bytes:
    """One frame's pixels, 16 bits each, little-endian, as pydicom's plugins give them."""
    pixels = np.asarray(imagecodecs.jpeg8_decode(src))
    if pixels.dtype != np.uint16 or pixels.ndim != 2:
        raise ValueError(f"{pixels.ndim - 1} colour axes of {8 * pixels.dtype.itemsize} bits; expected 12-bit grey")
    runner.set_option("bits_allocated", 16)
    return pixels.astype("<u2").tobytes()


def register() -> None:
    """Have pydicom use it, after its own plugins."""
    if "imagecodecs" not in JPEGExtended12BitDecoder.available_plugins:
        JPEGExtended12BitDecoder.add_plugin("imagecodecs", (__name__, decode_frame.__name__))

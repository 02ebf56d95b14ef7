"""DICOM files: one slice as a grey or colour picture, as its own header says it is to be looked at."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from PIL import Image
from pydicom.pixels.processing import apply_color_lut, apply_modality_lut, apply_voi
from pydicom.pixels.utils import pixel_array

_PREAMBLE = 128
_MAGIC = b"DICM"
_GREY = ("MONOCHROME1", "MONOCHROME2")
_COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")


def is_dicom(content: bytes) -> bool:
    """Whether a file begins as DICOM part 10 files do; 132 bytes of it are enough."""
    return content[_PREAMBLE : _PREAMBLE + len(_MAGIC)] == _MAGIC


def patient_id(path: Path) -> str:
    """PatientID (0010,0020) of a DICOM file; empty if it has none, or is no DICOM file."""
    try:
        with path.open("rb") as stream:
            if not is_dicom(stream.read(_PREAMBLE + len(_MAGIC))):
                return ""
        header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=["PatientID"])
        return str(header.get("PatientID") or "").strip()
    except Exception:  # a broken file has no patient; why it is broken comes out when it is decoded
        return ""


def read_slice(content: bytes, frame: int | None) -> Image.Image:
    """One frame of a DICOM file as an 8-bit picture, mode ``L`` or ``RGB``.

    Stored values go through the modality rescale or table, then the VOI table or else the first VOI window that the
    file has for the frame (DICOM PS3.3, C.11.1 and C.11.2; in enhanced multi-frame files they stand in functional
    groups); without either, the frame's least and greatest value become black and white. MONOCHROME1 is inverted.

    Args:
        content: the file.
        frame: from 0; None takes the middle one, count // 2.

    Raises:
        ValueError: it cannot be decoded, for want of a decoder or because it is broken; the message says why.
    """
    try:
        dataset = pydicom.dcmread(io.BytesIO(content))
    except Exception as error:  # pydicom raises of every kind on broken files
        raise ValueError(f"broken DICOM ({_short(error)})") from error
    if "PixelData" not in dataset:
        raise ValueError(f"DICOM without pixels ({dataset.get('Modality') or 'no modality'})")
    try:
        count = int(dataset.get("NumberOfFrames") or 1)
        colour = str(dataset.PhotometricInterpretation)
    except Exception as error:
        raise ValueError(f"broken DICOM ({_short(error)})") from error
    index = count // 2 if frame is None else frame
    if not 0 <= index < count:
        raise ValueError(f"no frame {index}; it has {count}, counted from 0")
    try:
        stored = pixel_array(dataset, index=index)
    except Exception as error:
        syntax = dataset.file_meta.get("TransferSyntaxUID")
        name = "no transfer syntax" if syntax is None else f"{syntax.name}, {syntax}"
        raise ValueError(f"DICOM pixels cannot be decoded ({name}: {_short(error)})") from error
    try:
        return _picture(dataset, stored, colour, index)
    except Exception as error:
        raise ValueError(f"DICOM pixels cannot be shown ({_short(error)})") from error


def _picture(dataset: Any, stored: NDArray[Any], colour: str, index: int) -> Image.Image:
    if colour == "PALETTE COLOR":
        colours = apply_color_lut(stored, dataset)
        return Image.fromarray((colours >> 8 * (colours.dtype.itemsize - 1)).astype(np.uint8))
    if colour in _COLOUR:
        if stored.dtype != np.uint8:
            raise ValueError(f"colours of {8 * stored.dtype.itemsize} bits; expected 8")
        return Image.fromarray(stored)
    if colour not in _GREY:
        raise ValueError(f"photometric interpretation {colour}; expected {', '.join((*_GREY, *_COLOUR))}")
    values = apply_modality_lut(stored, _group(dataset, index, "PixelValueTransformationSequence"))
    shown = _window(values, _group(dataset, index, "FrameVOILUTSequence"))
    grey = np.rint(255 * shown).astype(np.uint8)
    return Image.fromarray(255 - grey if colour == "MONOCHROME1" else grey)


def _window(values: NDArray[Any], voi: Any) -> NDArray[np.float64]:
    """Brightness in [0, 1] of values after the modality transform."""
    if voi.get("VOILUTSequence"):
        table = voi.VOILUTSequence[0]
        depth = int(table.LUTDescriptor[2])
        return np.asarray(apply_voi(values, voi) / (2.0**depth - 1)).clip(0, 1)
    x = values.astype(np.float64)
    if voi.get("WindowWidth") is None or voi.get("WindowCenter") is None:
        low, high = x.min(), x.max()
        return np.asarray((x - low) / max(high - low, 1e-12))
    centre, width = _first(voi.WindowCenter), _first(voi.WindowWidth)
    function = str(voi.get("VOILUTFunction") or "LINEAR")
    if function == "SIGMOID":
        return np.asarray(1 / (1 + np.exp(-4 * (x - centre) / width)))
    if function == "LINEAR":
        centre, width = centre - 0.5, max(width - 1, 1e-12)
    elif function != "LINEAR_EXACT":
        raise ValueError(f"VOI function {function}; expected LINEAR, LINEAR_EXACT or SIGMOID")
    return np.asarray(((x - centre) / width + 0.5).clip(0, 1))


def _group(dataset: Any, index: int, name: str) -> Any:
    """The frame's own functional group of that name, else the one shared by all frames, else the whole file."""
    for sequence, place in (("PerFrameFunctionalGroupsSequence", index), ("SharedFunctionalGroupsSequence", 0)):
        groups = dataset.get(sequence)
        if groups and place < len(groups) and groups[place].get(name):
            return groups[place].get(name)[0]
    return dataset


def _first(value: Any) -> float:
    """A window's number; of several windows, that of the first."""
    return float(value[0] if hasattr(value, "__getitem__") and not isinstance(value, str) else value)


def _short(error: Exception) -> str:
    """What went wrong, in one line."""
    return " ".join(str(error).split())[:160] or type(error).__name__

"""DICOM files: one frame as a grey or colour picture, as its header (or the study's window) says it is to be seen."""

from __future__ import annotations

import io
import math
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from PIL import Image
from pydicom.pixels.processing import apply_color_lut, apply_modality_lut, apply_voi
from pydicom.pixels.utils import pixel_array
from pydicom.uid import UID, ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from secure_fed.clients import jpeg12
from secure_fed.clients.rules import Facts, Kind, Picture, Rules, UndecodableError, brightness
from secure_fed.protocol.study import Window

jpeg12.register()

_PREAMBLE = 128
_MAGIC = b"DICM"
_GREY = ("MONOCHROME1", "MONOCHROME2")
_COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
_VRS = frozenset(
    b"AE AS AT CS DA DS DT FL FD IS LO LT OB OD OF OL OV OW PN SH SL SQ SS ST SV TM UC UI UL UN UR US UT UV".split()
)
_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
_NO_PICTURE = {"SEG": "a segmentation", "RTDOSE": "a dose", "SR": "a structured report", "PR": "a presentation state"}
_NO_PICTURE |= {"KO": "a selection of key objects", "REG": "a registration", "RTSTRUCT": "contours", "RTPLAN": "a plan"}
_NO_PICTURE |= {"DOC": "a document", "ECG": "a waveform", "M3D": "a model", "SMR": "stereometry"}
_NO_PICTURE_CLASSES = {
    "Segmentation": "a segmentation",
    "Label Map": "a segmentation",
    "RT Dose": "a dose",
    "RT Structure Set": "contours",
    "RT Plan": "a plan",
    " SR ": "a structured report",
    "Comprehensive": "a structured report",
    "Report": "a structured report",
    "Key Object": "a selection of key objects",
    "Presentation State": "a presentation state",
    "Encapsulated": "a document",
    "Waveform": "a waveform",
    "Registration": "a registration",
    "Fiducials": "marks",
    "Real World Value": "a mapping of values",
    "Parametric Map": "a map of computed values",
    "Tractography": "fibre tracks",
    "Raw Data": "raw data",
    "Media Storage Directory": "a directory of other files",
}
_SCOUTS = frozenset({"LOCALIZER", "SCOUT", "TOPOGRAM", "SURVIEW", "SCANOGRAM"})
_SCREENS = frozenset({"SCREEN SAVE", "SCREENSHOT", "SCREEN_SAVE", "SCREEN CAPTURE"})
_HEADER = (
    *("SOPClassUID", "SOPInstanceUID", "Modality", "Manufacturer", "ManufacturerModelName", "ImageType", "PatientID"),
    *("BurnedInAnnotation", "SeriesInstanceUID", "SeriesNumber", "InstanceNumber", "NumberOfFrames"),
    *("ImagePositionPatient", "ImageOrientationPatient"),
)
HEADER = 132
"""Bytes of a file by which :func:`is_dicom` knows it."""


def is_dicom(content: bytes) -> bool:
    """Whether a file begins as DICOM files do, with the preamble or, as some archives write them, without.

    Without it, the first element must be of group 0002 or 0008, and short, as all that may stand there are.
    """
    if content[_PREAMBLE : _PREAMBLE + len(_MAGIC)] == _MAGIC:
        return True
    if len(content) < 8 or content[:2] not in (b"\x02\0", b"\x08\0") or content[3] or content[2] > 0x60:
        return False
    return content[4:6] in _VRS or 0 < struct.unpack("<I", content[4:8])[0] <= 256


def read_header(path: Path) -> Any | None:
    """The header without pixels, of the elements that this package uses; None if it is no DICOM file or is broken."""
    try:
        with path.open("rb") as stream:
            if not is_dicom(stream.read(HEADER)):
                return None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(_HEADER), force=True)
    except Exception:  # why it is broken comes out when it is decoded
        return None


def patient_id(path: Path) -> str:
    """PatientID (0010,0020) of a DICOM file; empty if it has none, or is no DICOM file."""
    header = read_header(path)
    return "" if header is None else text(header, "PatientID")


def text(dataset: Any, keyword: str) -> str:
    """An element as text without blanks around; empty if there is none, or none that can be read."""
    try:
        value = dataset.get(keyword)
        return "" if value is None else str(value).replace("\0", "").strip()
    except Exception:
        return ""


def facts(dataset: Any) -> Facts:
    """What a header says of the picture beside it."""
    words = {word.strip().upper() for word in _texts(dataset, "ImageType")}
    sop = text(dataset, "SOPClassUID")
    kind: Kind = ""
    if no_picture(dataset):
        kind = "no picture"
    elif words & _SCOUTS:
        kind = "scout"
    elif (
        sop == _SECONDARY_CAPTURE
        or sop.startswith(_SECONDARY_CAPTURE + ".")
        or words & _SCREENS
        or text(dataset, "BurnedInAnnotation").upper() == "YES"
    ):
        kind = "screenshot"
    scanner = " ".join(filter(None, (text(dataset, "Manufacturer"), text(dataset, "ManufacturerModelName"))))
    return Facts(text(dataset, "Modality").upper(), scanner, kind)


def no_picture(dataset: Any) -> str:
    """What a file is that is no picture of a patient, by SOP class and modality; empty if it is one."""
    name = UID(text(dataset, "SOPClassUID")).name  # of an unknown class, the UID itself
    for words, what in _NO_PICTURE_CLASSES.items():
        if words in name:
            return what
    return _NO_PICTURE.get(text(dataset, "Modality").upper(), "")


class DicomFile:
    """A DICOM file, parsed once for all of its frames.

    Args:
        content: the file.

    Raises:
        UndecodableError: it is broken, or holds no picture of a patient.

    Attributes:
        frames: how many pictures are in it.
    """

    def __init__(self, content: bytes) -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                dataset = pydicom.dcmread(io.BytesIO(content), force=True)
                dataset.get("SOPClassUID")
        except Exception as error:  # pydicom raises of every kind on broken files
            raise UndecodableError(f"broken DICOM ({_short(error)}); export it again") from error
        if what := no_picture(dataset):
            raise UndecodableError(
                f"DICOM that holds {what} ({text(dataset, 'Modality') or 'no modality'}), no picture of a patient; "
                'take it out of the data, or leave such files out by leave_out = ["no picture"] in [data] of site.toml'
            )
        if "PixelData" not in dataset:
            raise UndecodableError(
                f"DICOM without pixels ({text(dataset, 'Modality') or 'no modality'}); expected PixelData (7FE0,0010)"
            )
        self._dataset = dataset
        self._colour = text(dataset, "PhotometricInterpretation").upper()
        try:
            self.frames = int(text(dataset, "NumberOfFrames") or 1)
        except ValueError:
            found = text(dataset, "NumberOfFrames")
            raise UndecodableError(f"NumberOfFrames (0028,0008) is {found!r}; expected a whole number") from None
        self._give_syntax()
        self._facts = facts(dataset)

    def _give_syntax(self) -> None:
        """Files without a meta header: pydicom has found out how they are written."""
        dataset = self._dataset
        if not hasattr(dataset, "file_meta"):
            dataset.file_meta = pydicom.dataset.FileMetaDataset()
        if dataset.file_meta.get("TransferSyntaxUID") is None:
            implicit, little = dataset.original_encoding
            native = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
            dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else native

    def picture(self, frame: int | None, rules: Rules) -> Picture:
        """One frame as an 8-bit picture, mode ``L`` or ``RGB``.

        Stored values go through the modality rescale or table, then the study's window for this modality if it has one,
        else the VOI table or else the first valid VOI window that the file has for the frame (DICOM PS3.3, C.11.1 and
        C.11.2; in enhanced multi-frame files they stand in functional groups); without any, the frame's least and
        greatest value, padding apart, become black and white. MONOCHROME1 is inverted, and so is whatever has a
        PresentationLUTShape of INVERSE.

        Args:
            frame: from 0; None takes the middle one, count // 2.
            rules: of the study and the site.

        Raises:
            UndecodableError: it cannot be decoded, for want of a decoder or because it is broken; the message says why.
        """
        dataset = self._dataset
        index = self.frames // 2 if frame is None else frame
        if not 0 <= index < self.frames:
            raise UndecodableError(f"no frame {index}; it has {self.frames}, counted from 0")
        rules.refuse_size(_whole(dataset, "Columns"), _whole(dataset, "Rows"))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._believe_codestream(index)
                stored = pixel_array(dataset, index=index)
        except Exception as error:
            syntax = dataset.file_meta.TransferSyntaxUID
            raise UndecodableError(
                f"DICOM pixels cannot be decoded ({syntax.name}, {syntax}: {_short(error)}); export the file again, or "
                "see which transfer syntaxes can be read: secfacmic doctor"
            ) from error
        try:
            return self._shown(stored, index, rules)
        except UndecodableError:
            raise
        except Exception as error:
            raise UndecodableError(f"DICOM pixels cannot be shown ({_short(error)}); export the file again") from error

    def _believe_codestream(self, index: int) -> None:
        """JPEG 2000 says itself whether samples have a sign; a header that contradicts is wrong."""
        dataset = self._dataset
        if not dataset.file_meta.TransferSyntaxUID.startswith("1.2.840.10008.1.2.4.") or not hasattr(
            dataset, "PixelRepresentation"
        ):
            return
        data = dataset.PixelData
        start = data.find(b"\xff\x4f\xff\x51", 0, 1 << 16)
        if start >= 0 and len(data) > start + 42:
            # SIZ: marker, length, capabilities, eight sizes, number of components, then the first one's depth.
            dataset.PixelRepresentation = data[start + 42] >> 7

    def _shown(self, stored: NDArray[Any], index: int, rules: Rules) -> Picture:
        dataset, colour = self._dataset, self._colour
        if colour == "PALETTE COLOR":
            return Picture(Image.fromarray(self._palette(stored)), self._facts)
        if colour in _COLOUR:
            if stored.dtype != np.uint8:
                raise UndecodableError(f"colours of {8 * stored.dtype.itemsize} bits; expected 8: convert it")
            return Picture(Image.fromarray(stored), self._facts)
        if colour not in _GREY:
            expected = ", ".join((*_GREY, "PALETTE COLOR", *_COLOUR))
            raise UndecodableError(f"photometric interpretation {colour or 'missing'}; expected {expected}")
        if stored.ndim != 2:
            raise UndecodableError(f"{stored.shape[-1]} samples a pixel of {colour}; expected 1")
        notes: list[str] = []
        values = self._rescaled(stored, _group(dataset, index, "PixelValueTransformationSequence"))
        shown, windowed = self._windowed(stored, values, index, rules.window(self._facts.modality), notes)
        grey = np.rint(255 * shown).astype(np.uint8)
        shape = text(dataset, "PresentationLUTShape").upper()
        if shape == "INVERSE" or (colour == "MONOCHROME1" and shape != "IDENTITY"):
            grey = 255 - grey
        if not windowed:
            padding = self._padding(stored)
            if padding is not None:
                grey[padding] = 0
        return Picture(Image.fromarray(grey), self._facts._replace(notes=tuple(notes)))

    def _rescaled(self, stored: NDArray[Any], group: Any) -> NDArray[Any]:
        """Values after the modality transform; an empty slope is 1, an empty intercept 0, an empty table none."""
        if _table(group.get("ModalityLUTSequence")):
            return np.asarray(apply_modality_lut(stored, group))
        slopes = _numbers(group, "RescaleSlope", "(0028,1053)") or [1.0]
        intercepts = _numbers(group, "RescaleIntercept", "(0028,1052)") or [0.0]
        slope, intercept = slopes[0], intercepts[0]
        if slope == 0 or not math.isfinite(slope) or not math.isfinite(intercept):
            raise UndecodableError(
                f"RescaleSlope (0028,1053) is {slope:g} and RescaleIntercept (0028,1052) {intercept:g}, which leave "
                "nothing to be seen; expected finite numbers and a slope other than 0: export the file again"
            )
        if slope == 1 and intercept == 0:
            return stored
        return np.asarray(stored.astype(np.float64) * slope + intercept)

    def _windowed(
        self, stored: NDArray[Any], values: NDArray[Any], index: int, window: Window | None, notes: list[str]
    ) -> tuple[NDArray[np.float64], bool]:
        """Brightness in [0, 1], and whether a window or table made it."""
        if window is not None:
            self._refuse_unit(window, index)
            return brightness(values, window.centre, window.width), True
        voi = _group(self._dataset, index, "FrameVOILUTSequence")
        if _table(voi.get("VOILUTSequence")):
            depth = int(voi.VOILUTSequence[0].LUTDescriptor[2])
            return np.asarray(apply_voi(values, voi) / (2.0**depth - 1)).clip(0, 1), True
        x = values.astype(np.float64)
        centres = _numbers(voi, "WindowCenter", "(0028,1050)")
        widths = _numbers(voi, "WindowWidth", "(0028,1051)")
        for centre, width in zip(centres, widths, strict=False):
            if width > 0 and math.isfinite(width) and math.isfinite(centre):
                return _function(x, centre, width, text(voi, "VOILUTFunction").upper() or "LINEAR"), True
            notes.append(f"window of width {width:g} (0028,1051) passed over; expected a width above 0")
        padding = self._padding(stored)
        seen = x if padding is None or padding.all() else x[~padding]
        low, high = seen.min(), seen.max()
        return np.asarray((x - low) / max(high - low, 1e-12)).clip(0, 1), False

    def _refuse_unit(self, window: Window, index: int) -> None:
        """Check that a window in Hounsfield units meets values in Hounsfield units."""
        group = _group(self._dataset, index, "PixelValueTransformationSequence")
        unit = text(group, "RescaleType").upper()
        scaled = bool(_numbers(group, "RescaleSlope", "(0028,1053)")) or _table(group.get("ModalityLUTSequence"))
        if window.unit == "HU" and (unit not in ("", "HU", "US") or not scaled):
            found = f"RescaleType (0028,1054) {unit!r}" if scaled else "no RescaleSlope (0028,1053)"
            raise UndecodableError(
                f"the study's window for {window.modality} is in HU, but the file has {found}; expected values in HU: "
                "export it with its rescale, or take it out of the data"
            )

    def _padding(self, stored: NDArray[Any]) -> NDArray[np.bool_] | None:
        """Where pixels are padding; None if the file has none."""
        first = _stored_value(self._dataset, "PixelPaddingValue", stored.dtype)
        if first is None:
            return None
        last = _stored_value(self._dataset, "PixelPaddingRangeLimit", stored.dtype)
        low, high = sorted((first, first if last is None else last))
        found = (stored >= low) & (stored <= high)
        return found if found.any() else None

    def _palette(self, stored: NDArray[Any]) -> NDArray[np.uint8]:
        dataset = self._dataset
        if dataset.file_meta.TransferSyntaxUID == ExplicitVRBigEndian:
            dataset = _swapped(dataset)
        colours = apply_color_lut(stored, dataset)
        if colours.dtype.itemsize > 1 and colours.max() > 255:
            colours = colours >> 8
        return np.asarray(colours.astype(np.uint8))


def _swapped(dataset: Any) -> Any:
    """A big-endian file's palettes with their words turned: pydicom takes them as they lie in the file."""
    turned = pydicom.Dataset()
    for element in dataset.iterall():
        name = element.keyword
        if "PaletteColorLookupTable" not in name:
            continue
        value = element.value
        if isinstance(value, bytes) and len(value) % 2 == 0:
            value = np.frombuffer(value, dtype=">u2").astype("<u2").tobytes()
        turned.add_new(element.tag, element.VR, value)
    return turned


def _function(x: NDArray[np.float64], centre: float, width: float, function: str) -> NDArray[np.float64]:
    if function == "SIGMOID":
        with np.errstate(over="ignore"):
            return np.asarray(1 / (1 + np.exp(-4 * (x - centre) / width)))
    if function not in ("LINEAR", "LINEAR_EXACT"):
        raise UndecodableError(
            f"VOI function {function} (0028,1056); expected LINEAR, LINEAR_EXACT or SIGMOID: export it again"
        )
    if function == "LINEAR" and width >= 1:
        # The standard's LINEAR is for whole numbers; below a width of 1 viewers take it as LINEAR_EXACT.
        centre, width = centre - 0.5, max(width - 1, 1e-12)
    return brightness(x, centre, width)


def _group(dataset: Any, index: int, name: str) -> Any:
    """The frame's own functional group of that name, else the one shared by all frames, else the whole file."""
    for sequence, place in (("PerFrameFunctionalGroupsSequence", index), ("SharedFunctionalGroupsSequence", 0)):
        groups = dataset.get(sequence)
        if groups and place < len(groups) and groups[place].get(name):
            return groups[place].get(name)[0]
    return dataset


def _table(sequence: Any) -> bool:
    """Whether a sequence of tables has one; some devices write items without content."""
    return bool(sequence) and sequence[0].get("LUTData") is not None and sequence[0].get("LUTDescriptor") is not None


def _numbers(dataset: Any, keyword: str, tag: str) -> list[float]:
    """An element's decimal numbers, as their writers meant them: empty ones passed over, a comma for the point."""
    if keyword not in dataset:
        return []
    element = dataset.get_item(keyword)
    value = element.value
    if isinstance(value, bytes) and (getattr(element, "VR", None) in (None, "DS", "UN", "LO", "SH", "")):
        value = value.decode("ascii", "replace")
    parts = value.split("\\") if isinstance(value, str) else value
    if parts is None or isinstance(parts, bytes | float | int):
        parts = [] if parts is None else [parts]
    found = []
    for part in parts if hasattr(parts, "__iter__") else [parts]:
        number = str(part).replace("\0", "").strip()
        if not number:
            continue
        try:
            found.append(float(number.replace(",", ".") if number.count(",") == 1 else number))
        except ValueError:
            raise UndecodableError(
                f"{keyword} {tag} is {number[:40]!r}; expected a decimal number: export the file again"
            ) from None
    return found


def _texts(dataset: Any, keyword: str) -> list[str]:
    """The parts of an element of several values."""
    try:
        value = dataset.get(keyword)
        return [value] if isinstance(value, str) else [str(part) for part in value or ()]
    except Exception:
        return []


def _whole(dataset: Any, keyword: str) -> int:
    try:
        return int(dataset.get(keyword))
    except Exception:
        raise UndecodableError(f"{keyword} is missing or no number; expected a whole number above 0") from None


def _stored_value(dataset: Any, keyword: str, dtype: np.dtype[Any]) -> int | None:
    """An element that is written as pixels are, whatever sign its writer gave it."""
    try:
        value = dataset.get(keyword)
        if isinstance(value, bytes):
            value = struct.unpack("<H", value[:2])[0]
        if value is None:
            return None
        bits = 8 * dtype.itemsize
        wrapped = int(int(value) % 2**bits)
        return wrapped - 2**bits if dtype.kind == "i" and wrapped >= 2 ** (bits - 1) else wrapped
    except Exception:  # a value of another kind pads nothing
        return None


def _short(error: Exception) -> str:
    """What went wrong, in one line."""
    return " ".join(str(error).split())[:160] or type(error).__name__

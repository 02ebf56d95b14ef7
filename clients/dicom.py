"""DICOM files: one frame as a grey or colour picture, as its header (or the study's window) says it is to be seen."""

from __future__ import annotations

import contextlib
import io
import math
import re
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pydicom
from numpy.typing import NDArray
from PIL import Image
from pydicom.encaps import get_frame, parse_basic_offsets, parse_fragments
from pydicom.filereader import read_partial
from pydicom.multival import MultiValue
from pydicom.pixels.decoders import base
from pydicom.pixels.processing import apply_color_lut, convert_color_space
from pydicom.tag import Tag
from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

from secure_fed.clients import jpeg
from secure_fed.clients.rules import (
    NOT_SQUARE,
    Facts,
    Kind,
    Picture,
    Rules,
    UndecodableError,
    are_square,
    brightness,
    refused_as_no_picture,
)
from secure_fed.protocol.study_tables import Window

jpeg.register()

_PREAMBLE = 128
_MAGIC = b"DICM"
_GREY = ("MONOCHROME1", "MONOCHROME2")
_COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
_PALETTE = "PALETTE COLOR"
_VRS = frozenset(
    b"AE AS AT CS DA DS DT FL FD IS LO LT OB OD OF OL OV OW PN SH SL SQ SS ST SV TM UC UI UL UN UR US UT UV".split()
)
_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
_RAW_DATA = "1.2.840.10008.5.1.4.1.1.66"
NO_PICTURES = {
    **{"SEG": "a segmentation", "RTDOSE": "a dose", "SR": "a structured report", "PR": "a presentation state"},
    **{"KO": "a selection of key objects", "REG": "a registration", "RTSTRUCT": "contours", "RTPLAN": "a plan"},
    **{"PLAN": "a plan", "RTRECORD": "a record of treatment", "RTINTENT": "an intent", "DOC": "a document"},
    **{"ECG": "a waveform", "EPS": "a waveform", "HD": "a waveform", "RESP": "a waveform", "AU": "sound"},
    **{"M3D": "a model", "SMR": "stereometry", "FID": "marks", "ANN": "annotations", "ASMT": "an assessment"},
    **{"RWV": "a mapping of values"},
}
"""By modality, what is stored beside pictures of patients and is none."""

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
_PICTURE_CLASSES = ("Image", "US Volume")
"""What the name of every standard class of pictures has in it, and no other's that is stored."""
_SCOUTS = frozenset({"LOCALIZER", "SCOUT", "TOPOGRAM", "SURVIEW", "SCANOGRAM"})
_SCOUT_SERIES = ("localizer", "localiser", "scout", "topogram", "surview", "scanogram")
"""Scanners of some makers say it in the series' name alone."""

_SHORT_SCOUTS = re.compile(r"\b(loc|survey|uebersicht|\u00fcbersicht)\b")
"""Of magnetic resonance and computed tomography; of X-rays a survey is an examination."""
_SLIDE_PARTS = frozenset({"LABEL", "OVERVIEW", "THUMBNAIL"})
"""Of whole slides: beside the slide itself; a label has the patient's name on it."""

_SCREENS = frozenset({"SCREEN SAVE", "SCREENSHOT", "SCREEN_SAVE", "SCREEN CAPTURE", "DOSE_INFO"})
_HEADER = (
    *("SOPClassUID", "SOPInstanceUID", "Modality", "Manufacturer", "ManufacturerModelName", "ImageType"),
    *("PatientID", "IssuerOfPatientID"),
    *("BurnedInAnnotation", "SeriesInstanceUID", "SeriesNumber", "InstanceNumber", "NumberOfFrames"),
    *("ConversionType", "SeriesDescription", "ProtocolName"),
    *("ImagePositionPatient", "ImageOrientationPatient"),
)
_GROUPS = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
_HEADER_TAGS = [Tag(keyword) for keyword in _HEADER]
_PIXELS = 0x7FE00008
_BEHIND_OWNER = 0x00100022
_UNNAMED = {
    "1.2.840.10008.1.2.4.110": "JPEG XL Lossless",
    "1.2.840.10008.1.2.4.111": "JPEG XL JPEG Recompression",
    "1.2.840.10008.1.2.4.112": "JPEG XL",
    "1.2.840.10008.1.2.8.1": "Deflated Image Frame Compression",
}
"""Transfer syntaxes that are younger than pydicom's names."""

_UNFOLLOWED = {
    "PresentationLUTSequence": "a presentation table (2050,0010)",
    "RedPaletteColorLookupTableDescriptor": "colours beside the grey values (0028,1101)",
}
"""Of grey pictures."""

_FRACTIONS = {"FloatPixelData": "(7FE0,0008)", "DoubleFloatPixelData": "(7FE0,0009)"}
"""Elements that stand in the place of PixelData."""

_BEGINNINGS = (b"\xff\xd8\xff", b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP")
"""Of a frame as JPEG or JPEG-LS, JPEG 2000, and that in its own file format; inside of one none of them occurs."""

HEADER = 132
"""Bytes of a file by which :func:`is_dicom` knows it."""

_WITHOUT_SIGN = (JPEGLSLossless, JPEGLSNearLossless)
"""Whose codestreams may be of more bits than are stored, with the stored sign left where it is."""

_COSTLY = (JPEG2000, JPEG2000Lossless, HTJ2K, HTJ2KLossless, HTJ2KLosslessRPCL)
"""Whose decoders take 32 bits for each sample."""

_MOST_BYTES = 2**27
"""Of a deflated file, unpacked."""

_BLOCK = 2**20
"""So many pixels are computed with at once: as 64-bit numbers they take eight times what the file has for them."""


_SMALL = 2**14
"""So many pixels where little is done with each: the processor's caches then hold all of it."""


def is_dicom(content: bytes) -> bool:
    """Whether a file begins as DICOM files do, with the preamble or, as some archives write them, without.

    Without it, the first element must be of group 0002, 0008 or 0010, and short, as all that may stand there are.
    """
    if content[_PREAMBLE : _PREAMBLE + len(_MAGIC)] == _MAGIC:
        return True
    if len(content) < 8:
        return False
    if content[:2] in (b"\0\x08", b"\0\x10"):  # big-endian, which is always explicit
        return content[2] == 0 and content[4:6] in _VRS
    if content[:2] not in (b"\x02\0", b"\x08\0", b"\x10\0") or content[3] or content[2] > 0x60:
        return False
    size = struct.unpack("<I", content[4:8])[0]
    implicit = size == 4 if content[2] == 0 else size <= 256 and size % 2 == 0  # element 0000 holds four bytes
    return content[4:6] in _VRS or implicit


def read_header(path: Path, until: int = _PIXELS, groups: bool = False) -> Any | None:
    """The header before a tag, of the elements that this package uses; None if it is no DICOM file or is broken.

    Args:
        path: of the file.
        until: the tag.
        groups: with what is said of each frame, which may be long.
    """
    tags = [*_HEADER_TAGS, *(Tag(keyword) for keyword in _GROUPS * groups)]
    try:
        with path.open("rb") as stream:
            head = stream.read(HEADER + 1024)
            if not is_dicom(head):
                return None
            source: Any = io.BytesIO(_inflated(head + stream.read())) if _is_deflated(head) else stream
            source.seek(0)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return read_partial(source, lambda tag, *_: tag >= until, specific_tags=list(tags), force=True)
    except Exception:  # why it is broken comes out when it is decoded
        return None


def _give_syntax(dataset: Any) -> None:
    """Files without a meta header: pydicom has found out how they are written."""
    if not hasattr(dataset, "file_meta"):
        dataset.file_meta = pydicom.dataset.FileMetaDataset()
    if dataset.file_meta.get("TransferSyntaxUID") is None:
        implicit, little = dataset.original_encoding
        native = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else native


def _is_deflated(head: bytes) -> bool:
    return DeflatedExplicitVRLittleEndian.encode() in head[: HEADER + 1024]


def _inflated(content: bytes) -> bytes:
    """A deflated file as the one that it was made of, of at most :data:`_MOST_BYTES`.

    Raises:
        UndecodableError: it is larger, or broken.
    """
    # The meta header begins with its own length, (0002,0000) UL.
    start = HEADER + 12 + struct.unpack("<I", content[HEADER + 8 : HEADER + 12])[0]
    engine = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        found = engine.decompress(content[start:], _MOST_BYTES)
    except zlib.error as error:
        raise UndecodableError(f"broken DICOM ({error}); export it again") from error
    if engine.unconsumed_tail:
        raise UndecodableError(
            f"a deflated DICOM file of more than {_MOST_BYTES:,} bytes; expected at most that (a small file can claim "
            "any size): export it uncompressed"
        )
    native = ExplicitVRLittleEndian.encode().ljust(len(DeflatedExplicitVRLittleEndian), b"\0")
    return content[:start].replace(DeflatedExplicitVRLittleEndian.encode(), native) + found


class Owner(NamedTuple):
    """Whose a DICOM file is by its own header; empty what it does not say.

    Attributes:
        patient: PatientID (0010,0020).
        issuer: IssuerOfPatientID (0010,0021), who gave it: ids of two hospitals may be equal.
    """

    patient: str = ""
    issuer: str = ""


NOBODY = Owner()


def owner(path: Path) -> Owner:
    """Whose a file is; nobody's, if it is no DICOM file."""
    # Elements are in order, and most of a header lies behind these; what is not in order is looked for in all of it.
    for until in (_BEHIND_OWNER, _PIXELS):
        header = read_header(path, until)
        if header is None:
            return NOBODY
        found = Owner(text(header, "PatientID"), text(header, "IssuerOfPatientID"))
        if found.patient:
            break
    return found


def patient_id(path: Path) -> str:
    """PatientID (0010,0020) of a DICOM file; empty if it has none, or is no DICOM file."""
    return owner(path).patient


def text(dataset: Any, keyword: str) -> str:
    """An element as text without blanks around; empty if there is none, or none that can be read."""
    try:
        value = dataset.get(keyword) if keyword in dataset else None  # else pydicom raises, and catches, an error
        if isinstance(value, MultiValue):  # an id with a backslash, which separates values
            value = "\\".join(map(str, value))
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
    elif (
        words & _SCOUTS or _names_scout(dataset) or (words & _SLIDE_PARTS and text(dataset, "Modality").upper() == "SM")
    ):
        kind = "scout"
    elif (
        sop == _SECONDARY_CAPTURE
        or sop.startswith(_SECONDARY_CAPTURE + ".")
        or words & _SCREENS
        or text(dataset, "ConversionType").upper() == "WSD"  # a workstation made it
        or text(dataset, "BurnedInAnnotation").upper() == "YES"
    ):
        kind = "screenshot"
    scanner = " ".join(filter(None, (text(dataset, "Manufacturer"), text(dataset, "ManufacturerModelName"))))
    return Facts(text(dataset, "Modality").upper(), scanner, kind)


def _names_scout(dataset: Any) -> bool:
    names = (text(dataset, "SeriesDescription") + " " + text(dataset, "ProtocolName")).casefold()
    sectional = text(dataset, "Modality").upper() in ("MR", "CT")
    return any(word in names for word in _SCOUT_SERIES) or (sectional and _SHORT_SCOUTS.search(names) is not None)


def in_order(dataset: Any, frames: int) -> list[int] | None:
    """The numbers of a file's frames by where they lie along the normal of their planes; None if not all say that, or
    not all planes are parallel."""
    groups = dataset.get("PerFrameFunctionalGroupsSequence")
    if not groups or len(groups) != frames:
        return None
    try:
        # Each frame's own: what is said of all frames, or of the file, does not tell them apart.
        positions = [np.array(group.PlanePositionSequence[0].ImagePositionPatient, np.float64) for group in groups]
        planes = [_group(dataset, index, "PlaneOrientationSequence").ImageOrientationPatient for index in range(frames)]
        rows, columns = np.array(planes, np.float64).reshape(frames, 2, 3).swapaxes(0, 1)
        normals = np.cross(rows, columns)
        along = np.array(positions).reshape(frames, 3) @ normals[0]
    except Exception:  # what is missing, or no number, says nothing
        return None
    if not np.isfinite(along).all() or not np.allclose(normals, normals[0], atol=1e-2):
        return None
    return [int(one) for one in np.argsort(along, kind="stable")]


def no_picture(dataset: Any) -> str:
    """What a file is that is no picture of a patient, by SOP class and modality; empty if it is one."""
    found = text(dataset, "SOPClassUID")
    if not found:  # directories of CDs have it in the meta header alone
        found = text(getattr(dataset, "file_meta", {}), "MediaStorageSOPClassUID")
    return _no_picture_class(found) or NO_PICTURES.get(text(dataset, "Modality").upper(), "")


@lru_cache(256)
def _no_picture_class(sop: str) -> str:
    name = UID(sop).name  # of an unknown class, the UID itself
    for words, what in _NO_PICTURE_CLASSES.items():
        if words in name:
            return what
    if sop.startswith(_RAW_DATA + "."):  # also those that came after this release of pydicom
        return "a segmentation or other computed object"
    if name != sop and "Storage" in name and not any(words in name for words in _PICTURE_CLASSES):
        return f"a {name.removesuffix(' Storage')} object"
    return ""


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
        if _is_deflated(content):
            content = _inflated(content)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                dataset = pydicom.dcmread(io.BytesIO(content), force=True)
                dataset.get("SOPClassUID")
                pixels = bool(dataset.get("PixelData"))
                fractions = [name for name in _FRACTIONS if name in dataset]
                _give_syntax(dataset)
        except Exception as error:  # pydicom raises of every kind on broken files
            raise UndecodableError(f"broken DICOM ({_short(error)}); export it again") from error
        self._facts = facts(dataset)
        if self._facts.kind == "no picture":
            raise refused_as_no_picture(
                f"DICOM that holds {no_picture(dataset)} ({self._facts.modality or 'no modality'})"
            )
        if fractions and not pixels:
            raise UndecodableError(
                f"DICOM whose pixels are floating point numbers ({fractions[0]} {_FRACTIONS[fractions[0]]}); expected "
                "whole numbers in PixelData (7FE0,0010): export the original image, or take it out of the data"
            )
        if not pixels:
            raise UndecodableError(
                f"DICOM without pixels ({self._facts.modality or 'no modality'}); expected PixelData (7FE0,0010)"
            )
        self._dataset = dataset
        self._colour = text(dataset, "PhotometricInterpretation").upper()
        try:
            self.frames = max(1, int(text(dataset, "NumberOfFrames") or 1))  # some devices write 0 of one picture
        except ValueError:
            found = text(dataset, "NumberOfFrames")
            raise UndecodableError(f"NumberOfFrames (0028,0008) is {found!r}; expected a whole number") from None

    def picture(self, frame: int | None, rules: Rules) -> Picture:
        """One frame as an 8-bit picture, mode ``L`` or ``RGB``.

        Stored values go through the modality rescale or table, then the study's window for this modality if it has one,
        else the VOI table or else the first valid VOI window that the file has for the frame (DICOM PS3.3, C.11.1 and
        C.11.2; in enhanced multi-frame files they stand in functional groups); without any, the frame's least and
        greatest value, padding apart, become black and white. MONOCHROME1 is inverted, and so is whatever has a
        PresentationLUTShape of INVERSE.

        Args:
            frame: from 0, as they are stored; None takes the middle one, count // 2, by :func:`in_order` if they say
                where they lie.
            rules: of the study and the site.

        Raises:
            UndecodableError: it cannot be decoded, for want of a decoder or because it is broken; the message says why.
        """
        dataset = self._dataset
        index = self._middle if frame is None else frame
        if not 0 <= index < self.frames:
            raise UndecodableError(f"no frame {index}; it has {self.frames}, counted from 0")
        coloured = self._colour in _COLOUR and dataset.file_meta.TransferSyntaxUID in _COSTLY
        rules.refuse_size(_whole(dataset, "Columns"), _whole(dataset, "Rows"), coloured)
        self._refuse_unread(index)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._refuse_more_codestreams()
                self._compare_codestream(index)
                stored = self._stored(index)
        except UndecodableError:
            raise
        except Exception as error:
            syntax = dataset.file_meta.TransferSyntaxUID
            raise UndecodableError(
                f"DICOM pixels cannot be decoded ({syntax.name}, {syntax}: {_short(error)}); export the file again"
            ) from error
        try:
            return self._shown(stored, index, rules)
        except UndecodableError:
            raise
        except Exception as error:
            raise UndecodableError(f"DICOM pixels cannot be shown ({_short(error)}); export the file again") from error

    @cached_property
    def _middle(self) -> int:
        return (in_order(self._dataset, self.frames) or range(self.frames))[self.frames // 2]

    def _refuse_unread(self, index: int) -> None:
        """What can be known to be unreadable before pixels are decoded; colours in small letters are mended."""
        dataset, syntax = self._dataset, self._dataset.file_meta.TransferSyntaxUID
        try:
            base.get_decoder(syntax)
        except NotImplementedError:
            name = _UNNAMED.get(syntax, "unknown" if syntax.name == syntax else syntax.name)
            raise UndecodableError(
                f"transfer syntax (0002,0010) {syntax} ({name}) is not read; expected one that secfacmic "
                "doctor lists: export the file uncompressed"
            ) from None
        known = (*_GREY, _PALETTE, *_COLOUR)
        if self._colour not in known:
            raise UndecodableError(
                f"PhotometricInterpretation (0028,0004) is {self._colour or 'missing'}; expected one of "
                f"{', '.join(known)}: export the file again"
            )
        if dataset.PhotometricInterpretation != self._colour:
            dataset.PhotometricInterpretation = self._colour
        samples = 3 if self._colour in _COLOUR else 1
        if (found := _whole(dataset, "SamplesPerPixel")) != samples:
            raise UndecodableError(
                f"SamplesPerPixel (0028,0002) is {found}, of {self._colour}; expected {samples}: export the file again"
            )
        self._refuse_more_pixels()
        frames = dataset.get("PerFrameFunctionalGroupsSequence")
        if frames and index >= len(frames):
            raise UndecodableError(
                f"PerFrameFunctionalGroupsSequence (5200,9230) has {len(frames)} items, of {self.frames} frames; "
                "expected one for each: export the file again"
            )

    def _refuse_more_pixels(self) -> None:
        """Refuse uncompressed pixels of more frames than the header counts: of which they are, nothing says.

        A header of too few rows, samples or bits has them too, and would show something that nobody has seen.
        """
        dataset = self._dataset
        if dataset.file_meta.TransferSyntaxUID.is_encapsulated or self._colour == "YBR_FULL_422":
            return
        if not isinstance(dataset.PixelData, bytes):
            raise UndecodableError(
                f"PixelData (7FE0,0010) is written as {dataset['PixelData'].VR}; expected OB or OW: export it again"
            )
        bits = math.prod(_whole(dataset, name) for name in ("Rows", "Columns", "SamplesPerPixel", "BitsAllocated"))
        found = len(dataset.PixelData)
        if 8 * found >= max((self.frames + 1) * bits, self.frames * bits + 16):
            raise UndecodableError(
                f"PixelData (7FE0,0010) has {found:,} bytes, and its header accounts for {self.frames * bits // 8:,} "
                f"(NumberOfFrames {self.frames}, each of {bits // 8:,}); expected as many as that: export it again"
            )

    def _refuse_more_codestreams(self) -> None:
        """As :meth:`_refuse_more_pixels`, of compressed pixels."""
        if self._codestreams > self.frames:
            raise UndecodableError(
                f"PixelData (7FE0,0010) holds {self._codestreams} frames, and NumberOfFrames (0028,0008) counts "
                f"{self.frames}; expected the same in both: export it again"
            )

    @cached_property
    def _codestreams(self) -> int:
        """How many compressed frames begin in the pixels; 0 where that is not known."""
        syntax, pixels = self._dataset.file_meta.TransferSyntaxUID, self._dataset.PixelData
        if not syntax.is_encapsulated:
            return 0
        with io.BytesIO(pixels) as stream:
            parse_basic_offsets(stream)
            places = parse_fragments(stream)[1]
        if syntax == RLELossless:  # of which a frame is one fragment
            return len(places)
        return sum(pixels.startswith(_BEGINNINGS, place + 8) for place in places)  # behind an item's tag and length

    def _compare_codestream(self, index: int) -> None:
        """What a frame's own codestream says of size and sign is compared with the header before it is unpacked.

        Of JPEG 2000 the sign in the codestream holds; a header that contradicts is wrong.

        Raises:
            UndecodableError: the codestream is of another size, which would be unpacked, however large, first.
        """
        dataset = self._dataset
        syntax = dataset.file_meta.TransferSyntaxUID
        if not syntax.startswith("1.2.840.10008.1.2.4."):
            return
        frame = get_frame(dataset.PixelData, index, number_of_frames=self.frames)
        found = _codestream(frame)
        if found is None:
            return
        width, height, samples, bits, signed = found
        expected = _whole(dataset, "Columns"), _whole(dataset, "Rows"), _whole(dataset, "SamplesPerPixel")
        if (width, height, samples) != expected:
            raise UndecodableError(
                f"DICOM whose codestream is of {width} x {height} pixels with {samples} samples each, and whose header "
                f"says {expected[0]} x {expected[1]} with {expected[2]}; expected the same in both: export it again"
            )
        allocated = _whole(dataset, "BitsAllocated")
        if syntax in (JPEGBaseline8Bit, JPEGExtended12Bit) and (bits > 8) != (allocated > 8):
            raise UndecodableError(
                f"DICOM whose codestream has {bits} bits a sample, and whose header allocates {allocated} "
                "(BitsAllocated (0028,0100)), so that a window may be of either; expected the same in both: export it "
                "again"
            )
        if signed is not None:
            dataset.PixelRepresentation = signed
        if self._colour == "YBR_FULL" and _is_transformed(frame):
            # Decoders undo that, and hand out red, green and blue (PS3.5, 8.2.4).
            dataset.PhotometricInterpretation = "YBR_ICT"

    def _stored(self, index: int) -> NDArray[Any]:
        """A frame's stored values; those that do not end with the lowest bit are moved there."""
        dataset = self._dataset
        bits, high = dataset.get("BitsStored"), dataset.get("HighBit")
        if not isinstance(bits, int) or not isinstance(high, int) or high == bits - 1:
            return _decoded(dataset, index)
        syntax = dataset.file_meta.TransferSyntaxUID
        if not 1 <= bits <= high + 1 <= _whole(dataset, "BitsAllocated") or (
            syntax.is_encapsulated and syntax != RLELossless
        ):
            raise UndecodableError(
                f"HighBit (0028,0102) is {high} and BitsStored (0028,0101) {bits}; expected "
                f"{bits - 1 if bits > 0 else 'at least one bit'}: export it again"
            )
        dataset.BitsStored = high + 1
        try:
            return np.asarray(_decoded(dataset, index) >> (high + 1 - bits))
        finally:
            dataset.BitsStored = bits

    def _shown(self, stored: NDArray[Any], index: int, rules: Rules) -> Picture:
        dataset, colour = self._dataset, self._colour
        notes = [] if self._has_square_pixels(index) else [NOT_SQUARE]
        facts = self._facts._replace(notes=tuple(notes))
        if colour == _PALETTE:
            return Picture(self._palette(stored), facts)
        if colour in _COLOUR:
            if stored.dtype != np.uint8:
                raise UndecodableError(
                    f"colours of {8 * stored.dtype.itemsize} bits (BitsAllocated (0028,0100)); expected 8: convert it"
                )
            bits = _whole(dataset, "BitsStored")
            if 1 <= bits < 8:
                stored = np.rint(stored * (255 / (2**bits - 1))).clip(0, 255).astype(np.uint8)
            return Picture(Image.fromarray(stored), facts)
        notes += [f"{what} passed over" for keyword, what in _UNFOLLOWED.items() if keyword in dataset]
        rescaled = self._rescaling(_group(dataset, index, "PixelValueTransformationSequence"))
        padding = self._padding(stored)
        below = bool(rescaled(_extremes(dataset, stored.dtype)).min() < 0)
        look = self._look(index, rules.window(self._facts.modality), below, notes)
        windowed = look is not None
        if rules.windows and rules.window(self._facts.modality) is None and self._facts.modality in ("", "OT"):
            found = f"Modality (0008,0060) {self._facts.modality or 'missing'}"
            notes.append(f"{found}, so that none of the study's windows holds for it")
        if look is None:
            look = _stretched(stored, padding, rescaled)
        grey = _in_grey(stored, lambda values: look(rescaled(values)))
        shape = text(dataset, "PresentationLUTShape").upper()
        if shape == "INVERSE" or (colour == "MONOCHROME1" and shape != "IDENTITY"):
            grey = 255 - grey
        if not windowed and padding is not None:
            grey[padding] = 0
        return Picture(Image.fromarray(grey), self._facts._replace(notes=tuple(notes)))

    def _has_square_pixels(self, index: int) -> bool:
        """Whether a frame's pixels are as wide as high, by their spacing or, where there is none, their ratio."""
        group = _group(self._dataset, index, "PixelMeasuresSequence")
        for name in ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing", "PixelAspectRatio"):
            with contextlib.suppress(ValueError):
                if len(sides := [float(side) for side in text(group, name).split("\\")]) == 2:
                    return are_square(*sides)
        return True

    def _rescaling(self, group: Any) -> Values:
        """The modality transform; an empty slope is 1, an empty intercept 0, an empty table none."""
        if (item := _table(group.get("ModalityLUTSequence"))) is not None:
            through = self._through(item, "Modality", self._dataset.get("PixelRepresentation") == 1)
            return lambda stored: through(stored)[0]
        slope = _number(group, "RescaleSlope", "(0028,1053)", 1.0)
        intercept = _number(group, "RescaleIntercept", "(0028,1052)", 0.0)
        if slope == 0 or not math.isfinite(slope) or not math.isfinite(intercept):
            raise UndecodableError(
                f"RescaleSlope (0028,1053) is {slope:g} and RescaleIntercept (0028,1052) {intercept:g}, which leave "
                "nothing to be seen; expected finite numbers and a slope other than 0: export the file again"
            )
        if slope == 1 and intercept == 0:
            return lambda stored: stored
        return lambda stored: stored.astype(np.float64) * slope + intercept

    def _look(self, index: int, window: Window | None, below: bool, notes: list[str]) -> Values | None:
        """From values, which may be ``below`` zero, to brightness in [0, 1], as the study or the file says; None if
        neither does."""
        if window is not None:
            self._refuse_unit(window, index, below, notes)
            return lambda values: brightness(values, window.centre, window.width)
        voi = _group(self._dataset, index, "FrameVOILUTSequence")
        if (item := _table(voi.get("VOILUTSequence"))) is not None:
            through = self._through(item, "VOI", below)

            def table(values: NDArray[Any]) -> NDArray[np.float64]:
                found, depth = through(values)
                return np.asarray(found / (2.0**depth - 1)).clip(0, 1)

            return table
        centres = _places(voi, "WindowCenter", "(0028,1050)")
        for centre, width in _pairs(centres, _places(voi, "WindowWidth", "(0028,1051)")):
            if width > 0 and math.isfinite(width) and math.isfinite(centre):
                return _function(centre, width, text(voi, "VOILUTFunction").upper() or "LINEAR")
            odd = f"width {width:g} (0028,1051)" if math.isfinite(centre) else f"centre {centre:g} (0028,1050)"
            notes.append(f"window of {odd} passed over; expected a number and a width above 0")
        return None

    def _through(self, item: Any, name: str, signed: bool) -> Callable[[NDArray[Any]], tuple[NDArray[Any], int]]:
        """A look-up table (PS3.3, C.11.1.1 and C.11.2.1.1): from values to its entries, with how many bits these have.

        Values before the first one mapped get the first entry, those behind the last one the last.
        """
        entries, first, depth = _descriptor(item.LUTDescriptor, f"the {name} LUT's descriptor (0028,3002)")
        entries = entries % 2**16 or 2**16
        data = item.LUTData
        if isinstance(data, bytes):
            order = ">" if self._dataset.file_meta.TransferSyntaxUID == ExplicitVRBigEndian else "<"
            small = len(data) == entries + entries % 2
            table = np.frombuffer(data, dtype=np.uint8 if small else f"{order}u2")
        else:
            table = np.atleast_1d(np.asarray(data)).astype(np.int64) % 2**16
        if not 1 <= depth <= 16 or len(table) < entries:
            raise UndecodableError(
                f"{name} LUT of {len(table)} entries of {depth} bits, and its descriptor (0028,3002) says {entries}; "
                "expected as many as that, of 1 to 16 bits: export it again"
            )
        table = table[:entries]
        depth = max(depth, int(table.max()).bit_length())  # some devices write less than there is
        # The first value mapped is written in 16 bits, with a sign where the values may have one.
        start = (first + 2**15) % 2**16 - 2**15 if signed else first % 2**16

        def through(values: NDArray[Any]) -> tuple[NDArray[Any], int]:
            return table[(np.rint(values).astype(np.int64) - start).clip(0, entries - 1)], depth

        return through

    def _refuse_unit(self, window: Window, index: int, below: bool, notes: list[str]) -> None:
        """Check that a window in Hounsfield units meets values in Hounsfield units."""
        group = _group(self._dataset, index, "PixelValueTransformationSequence")
        unit = text(group, "RescaleType").upper()
        table = _table(group.get("ModalityLUTSequence")) is not None
        tags = (("RescaleSlope", "(0028,1053)"), ("RescaleIntercept", "(0028,1052)"))
        missing = [] if table else [f"{name} {tag}" for name, tag in tags if not _numbers(group, name, tag)]
        if window.unit == "HU" and (unit not in ("", "HU", "US") or missing):
            found = f"no {' and no '.join(missing)}" if missing else f"RescaleType (0028,1054) {unit!r}"
            raise UndecodableError(
                f"the study's window for {window.modality} is in HU, but the file has {found}; expected values in HU: "
                "export it with its rescale, or take it out of the data"
            )
        bits = _whole(self._dataset, "BitsStored")
        if window.unit == "HU" and not table and (bits <= 8 or self._facts.kind == "screenshot"):
            found = f"{bits} bits a pixel" if bits <= 8 else "a screenshot's"
            raise UndecodableError(
                f"the study's window for {window.modality} is in HU, but the file's values are {found} (BitsStored "
                "(0028,0101), SOP class or ImageType), which were windowed before; expected values in HU: export the "
                "original, or take it out of the data"
            )
        if window.unit == "HU" and not below and unit != "HU":
            notes.append("values that cannot be below 0, taken as HU, of which air has -1000")

    def _padding(self, stored: NDArray[Any]) -> NDArray[np.bool_] | None:
        """Where pixels are padding; None if the file has none."""
        first = _stored_value(self._dataset, "PixelPaddingValue", stored.dtype)
        if first is None:
            return None
        last = _stored_value(self._dataset, "PixelPaddingRangeLimit", stored.dtype)
        low, high = sorted((first, first if last is None else last))
        found = (stored >= low) & (stored <= high)
        return found if found.any() else None

    def _palette(self, stored: NDArray[Any]) -> Image.Image:
        dataset = self._dataset
        for number, colour in enumerate(("Red", "Green", "Blue"), start=1):
            name = f"{colour}PaletteColorLookupTable"
            entries, _, depth = _descriptor(dataset.get(f"{name}Descriptor"), f"{name}Descriptor (0028,110{number})")
            entries = entries % 2**16 or 2**16
            size = len(dataset.get(f"{name}Data") or b"")
            segmented = not size and dataset.get(f"Segmented{name}Data")
            if depth not in (8, 16) or not (segmented or size in (entries, entries + entries % 2, 2 * entries)):
                raise UndecodableError(
                    f"{name}Data (0028,120{number}) has {size} bytes, for {entries} entries of {depth} bits; expected "
                    "one or two bytes for each, of 8 or 16 bits: export it again"
                )
        if dataset.file_meta.TransferSyntaxUID == ExplicitVRBigEndian:
            dataset = _swapped(dataset)
        parts = [apply_color_lut(stored[rows], dataset) for rows in _blocks(stored)]
        if any(part.dtype.itemsize > 1 and part.max() > 255 for part in parts):
            parts = [part >> 8 for part in parts]
        return Image.fromarray(np.concatenate([part.astype(np.uint8) for part in parts]))


def _decoded(dataset: Any, index: int) -> NDArray[Any]:
    """A frame's stored values; by pydicom's ``pixel_array`` the header would be read for it twice."""
    decoder = base.get_decoder(dataset.file_meta.TransferSyntaxUID)
    found, about = decoder.as_array(dataset, index=index, as_rgb=False)  # type: ignore[arg-type]  # one of the options
    if found.ndim == 3 and (colours := str(about["photometric_interpretation"])).startswith("YBR_FULL"):
        # Here and not in pydicom, which takes the whole picture as floating point numbers.
        for rows in _blocks(found, _SMALL):
            found[rows] = convert_color_space(found[rows], colours, "RGB")
    bits, allocated = dataset.get("BitsStored"), 8 * found.dtype.itemsize
    if dataset.file_meta.TransferSyntaxUID in _WITHOUT_SIGN and isinstance(bits, int) and 1 <= bits < allocated:
        found = (found << (allocated - bits)) >> (allocated - bits)
    return found


def _descriptor(value: Any, name: str) -> tuple[int, int, int]:
    """Number of entries, first value mapped and bits of a look-up table, as they are written.

    Raises:
        UndecodableError: there are not three numbers.
    """
    try:
        entries, first, depth = (int(number) for number in value)
    except (TypeError, ValueError):
        raise UndecodableError(
            f"{name} is {value}; expected three numbers (entries, first value mapped, bits): export it again"
        ) from None
    return entries, first, depth


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


def _codestream(frame: bytes) -> tuple[int, int, int, int, int | None] | None:
    """Width, height, samples and bits of each that a frame's JPEG or JPEG 2000 codestream says it has, and its sign if
    it says that; None if it is neither."""
    start = frame.find(b"\xff\x4f\xff\x51", 0, 1 << 16)
    if start >= 0 and len(frame) > start + 42:
        # SIZ: marker, length, capabilities, sizes and offsets of 32 bits, number of components, the first one's depth.
        right, bottom, left, top = struct.unpack(">4I", frame[start + 8 : start + 24])
        samples = int.from_bytes(frame[start + 40 : start + 42], "big")
        return right - left, bottom - top, samples, (frame[start + 42] & 0x7F) + 1, frame[start + 42] >> 7
    for marker, _, content in jpeg.segments(frame):
        if (marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC))) and len(content) > 5:
            height, width = struct.unpack(">2H", content[1:5])
            return width, height, content[5], content[0], None
    return None


def _is_transformed(frame: bytes) -> bool:
    """Whether a JPEG 2000 codestream says that its components are a transform of red, green and blue (ISO/IEC 15444-1,
    A.6.1)."""
    at = frame.find(b"\xff\x4f\xff\x51", 0, 1 << 16) + 2
    while at >= 2 and at + 9 <= len(frame) and frame[at] == 0xFF and frame[at + 1] != 0x90:  # tiles
        if frame[at + 1] == 0x52:
            return frame[at + 8] == 1
        at += 2 + int.from_bytes(frame[at + 2 : at + 4], "big")
    return False


Values = Callable[[NDArray[Any]], NDArray[Any]]
"""From some rows of a picture to others of the same shape."""


def _blocks(stored: NDArray[Any], pixels: int = _BLOCK) -> Iterator[slice]:
    """Some rows after others, of about so many pixels."""
    step = max(1, pixels // max(1, stored.shape[1]))
    for start in range(0, len(stored), step):
        yield slice(start, start + step)


def _in_grey(stored: NDArray[Any], look: Values) -> NDArray[np.uint8]:
    """From stored values by way of brightness in [0, 1] to grey; of many pixels each value that there is only once."""
    grey = np.empty(stored.shape, dtype=np.uint8)
    low, high = int(stored.min()), int(stored.max())
    if high - low < stored.size:
        values = np.arange(low, high + 1).astype(stored.dtype)
        table = np.rint(255 * look(values)).astype(np.uint8)
        for rows in _blocks(stored, _SMALL):
            grey[rows] = table[stored[rows].astype(np.intp) - low]
        return grey
    for rows in _blocks(stored):
        grey[rows] = np.rint(255 * look(stored[rows]))
    return grey


def _extremes(dataset: Any, dtype: np.dtype[Any]) -> NDArray[Any]:
    """The least and the greatest value that a file's pixels may have."""
    bits = _whole(dataset, "BitsStored")
    ends = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if dtype.kind == "i" else (0, 2**bits - 1)
    return np.array(ends, dtype=dtype)


def _stretched(stored: NDArray[Any], padding: NDArray[np.bool_] | None, rescaled: Values) -> Values:
    """Least and greatest value, padding apart, become black and white."""
    if padding is not None and padding.all():
        padding = None
    low, high = math.inf, -math.inf
    for rows in _blocks(stored):
        seen = rescaled(stored[rows] if padding is None else stored[rows][~padding[rows]])
        if seen.size:
            low, high = min(low, float(seen.min())), max(high, float(seen.max()))
    return lambda values: ((values.astype(np.float64) - low) / max(high - low, 1e-12)).clip(0, 1)


def _function(centre: float, width: float, function: str) -> Values:
    if function == "SIGMOID":

        def sigmoid(values: NDArray[Any]) -> NDArray[Any]:
            with np.errstate(over="ignore"):
                return np.asarray(1 / (1 + np.exp(-4 * (values.astype(np.float64) - centre) / width)))

        return sigmoid
    if function not in ("LINEAR", "LINEAR_EXACT"):
        raise UndecodableError(
            f"VOI function {function} (0028,1056); expected LINEAR, LINEAR_EXACT or SIGMOID: export it again"
        )
    if function == "LINEAR" and width >= 1:
        # The standard's LINEAR is for whole numbers; below a width of 1 viewers take it as LINEAR_EXACT.
        centre, width = centre - 0.5, max(width - 1, 1e-12)
    return lambda values: brightness(values, centre, width)


def _group(dataset: Any, index: int, name: str) -> Any:
    """The frame's own functional group of that name, else the one shared by all frames, else the whole file."""
    for sequence, place in (("PerFrameFunctionalGroupsSequence", index), ("SharedFunctionalGroupsSequence", 0)):
        groups = dataset.get(sequence)
        if groups and place < len(groups) and groups[place].get(name):
            return groups[place].get(name)[0]
    return dataset


def _table(sequence: Any) -> Any | None:
    """The first table of a sequence; some devices write items without content."""
    return next((item for item in sequence or () if item.get("LUTData") and item.get("LUTDescriptor")), None)


def _pairs(centres: list[float | None], widths: list[float | None]) -> Iterator[tuple[float, float]]:
    """Centres with their widths: by place, where there are as many of both, else in order without the empty ones."""
    if len(centres) != len(widths):
        centres = [one for one in centres if one is not None]
        widths = [one for one in widths if one is not None]
    for centre, width in zip(centres, widths, strict=False):
        if centre is not None and width is not None:
            yield centre, width


def _numbers(dataset: Any, keyword: str, tag: str) -> list[float]:
    """:func:`_places` without the empty ones."""
    return [number for number in _places(dataset, keyword, tag) if number is not None]


def _number(dataset: Any, keyword: str, tag: str, default: float) -> float:
    """An element's one number.

    Raises:
        UndecodableError: it has several.
    """
    found = set(_numbers(dataset, keyword, tag)) or {default}
    if len(found) > 1:
        raise UndecodableError(f"{keyword} {tag} has {len(found)} values; expected one: export the file again")
    return found.pop()


def _places(dataset: Any, keyword: str, tag: str) -> list[float | None]:
    """An element's decimal numbers, as their writers meant them: blanks around, a comma for the point; None if empty.

    Raises:
        UndecodableError: one is no number, or might be two.
    """
    if keyword not in dataset:
        return []
    element = dataset.get_item(keyword)
    value = element.value
    if isinstance(value, bytes) and (getattr(element, "VR", None) in (None, "DS", "UN", "LO", "SH", "")):
        value = value.decode("ascii", "replace")
    parts = value.split("\\") if isinstance(value, str) else value
    if parts is None or isinstance(parts, bytes | float | int):
        parts = [] if parts is None else [parts]
    found: list[float | None] = []
    for part in parts if hasattr(parts, "__iter__") else [parts]:
        number = "" if part is None else str(part).replace("\0", "").strip()
        if not number:
            found.append(None)
            continue
        if re.fullmatch(r"[+-]?[1-9]\d{0,2},\d{3}", number):
            raise UndecodableError(
                f"{keyword} {tag} is {number!r}, which may be {number.replace(',', '.')} or {number.replace(',', '')}; "
                "expected a decimal number with a point: export the file again"
            )
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


_ALL_PLUGINS = "Unable to decode as exceptions were raised by all available plugins:"


def _short(error: Exception) -> str:
    """What went wrong, in one line, without a library's guesses at it."""
    words = " ".join(str(error).split(" - ")[0].split())
    return words.removeprefix(_ALL_PLUGINS).strip()[:160] or type(error).__name__

"""What DICOM headers say beside the pixels: whose a file is, from which scanner, and whether it is a picture at all."""

from __future__ import annotations

import hashlib
import io
import re
import struct
import unicodedata
import warnings
import zlib
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from pydicom.filereader import read_partial
from pydicom.tag import Tag
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian

from secure_fed.clients.dicom_elements import text, texts
from secure_fed.clients.patients import name_free
from secure_fed.clients.rules import Facts, Kind, UndecodableError

_PREAMBLE = 128
_MAGIC = b"DICM"
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
_SCOUT_SERIES = (
    *("localizer", "localiser", "scout", "topogram", "surview", "scanogram", "lokalizer", "lokaliser", "lokalisator"),
    *("localizador", "localizzatore", "localisateur", "rep\u00e9rage", "reperage"),
)
"""Scanners of some makers say it in the series' name alone."""

_SHORT_SCOUTS = re.compile(
    r"(?<![^\W\d_])((plane|plan|pl)?loc|survey|scano|topo|uebersicht|\u00fcbersicht)(?![^\W\d_])"
)
"""Of magnetic resonance and computed tomography; of X-rays a survey is an examination."""
_SLIDE_PARTS = frozenset({"LABEL", "OVERVIEW", "THUMBNAIL"})
"""Of whole slides: beside the slide itself; a label has the patient's name on it."""

_SCREENS = frozenset({"SCREEN SAVE", "SCREENSHOT", "SCREEN_SAVE", "SCREEN CAPTURE", "DOSE_INFO"})
_HEADER = (
    *("SOPClassUID", "SOPInstanceUID", "Modality", "Manufacturer", "ManufacturerModelName", "ImageType"),
    *("PatientID", "IssuerOfPatientID", "PatientName", "PatientBirthDate", "PatientSex"),
    *("BurnedInAnnotation", "SeriesInstanceUID", "SeriesNumber", "InstanceNumber", "NumberOfFrames"),
    *("ConversionType", "SeriesDescription", "ProtocolName"),
    *("ImagePositionPatient", "ImageOrientationPatient"),
)
_GROUPS = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
_HEADER_TAGS = [Tag(keyword) for keyword in _HEADER]
_PIXELS = 0x7FE00008
_BEHIND_OWNER = 0x0020000F

HEADER = 132
"""Bytes of a file by which :func:`is_dicom` knows it."""

_MOST_BYTES = 2**27
"""Of a deflated file, unpacked."""


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
            source: Any = io.BytesIO(inflated(head + stream.read())) if is_deflated(head) else stream
            source.seek(0)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return read_partial(source, lambda tag, *_: tag >= until, specific_tags=list(tags), force=True)
    except Exception:  # why it is broken comes out when it is decoded
        return None


def is_deflated(head: bytes) -> bool:
    """Whether a file is deflated as a whole, behind its meta header."""
    return DeflatedExplicitVRLittleEndian.encode() in head[: HEADER + 1024]


def inflated(content: bytes) -> bytes:
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
    if not engine.eof:
        raise UndecodableError("a deflated DICOM file that ends too early; copy it again")
    native = ExplicitVRLittleEndian.encode().ljust(len(DeflatedExplicitVRLittleEndian), b"\0")
    return content[:start].replace(DeflatedExplicitVRLittleEndian.encode(), native) + found


class Owner(NamedTuple):
    """Whose a DICOM file is by its own header; empty or 0 what it does not say.

    Attributes:
        patient: PatientID (0010,0020).
        issuer: IssuerOfPatientID (0010,0021), who gave it: ids of two hospitals may be equal.
        name: number of 64 bits by which PatientName (0010,0010) is known, whatever its writing; 0 also of a name that
            is a placeholder or the id itself.
        birth: PatientBirthDate (0010,0030); of a first of January the year alone, as whoever hides the day writes that.
        sex: PatientSex (0010,0040), M or F.
        series: number of 64 bits by which SeriesInstanceUID (0020,000E) is known.
    """

    patient: str = ""
    issuer: str = ""
    name: int = 0
    birth: str = ""
    sex: str = ""
    series: int = 0


NOBODY = Owner()


def owner(path: Path) -> Owner:
    """Whose a file is; nobody's, if it is no DICOM file."""
    # Elements are in order, and most of a header lies behind these; what is not in order is looked for in all of it.
    for until in (_BEHIND_OWNER, _PIXELS):
        header = read_header(path, until)
        if header is None:
            return NOBODY
        patient, sex = text(header, "PatientID"), text(header, "PatientSex").upper()
        found = Owner(
            patient,
            text(header, "IssuerOfPatientID"),
            _number(name_free(text(header, "PatientName"), patient)),
            _birth(text(header, "PatientBirthDate")),
            sex if sex in ("M", "F") else "",
            _number(text(header, "SeriesInstanceUID")),
        )
        if found.patient:
            break
    return _shared(found)


@lru_cache(4096)
def _shared(one: Owner) -> Owner:
    """One object for the many files of a series."""
    return one


def _number(words: str) -> int:
    return int.from_bytes(hashlib.sha256(words.encode(errors="replace")).digest()[:8], "big") if words else 0


def _birth(date: str) -> str:
    digits = re.sub(r"[.-]", "", date)
    if not re.fullmatch(r"(19|20)\d{6}", digits) or digits in ("19000101", "19000000", "19700101", "20000101"):
        return ""  # none, or what stands for none
    return digits[:4] if digits[4:] in ("0101", "0000") else digits


def patient_id(path: Path) -> str:
    """PatientID (0010,0020) of a DICOM file; empty if it has none, or is no DICOM file."""
    return owner(path).patient


def facts(dataset: Any) -> Facts:
    """What a header says of the picture beside it."""
    words = {word.strip().upper() for word in texts(dataset, "ImageType")}
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
    names = unicodedata.normalize("NFC", text(dataset, "SeriesDescription") + " " + text(dataset, "ProtocolName"))
    names = names.casefold()
    sectional = text(dataset, "Modality").upper() in ("MR", "CT")
    return any(word in names for word in _SCOUT_SERIES) or (sectional and _SHORT_SCOUTS.search(names) is not None)


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

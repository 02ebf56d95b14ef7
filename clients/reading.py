"""The one place where a file becomes pictures: which formats there are, how each is known, read and refused.

Every picture that this package looks at comes from :func:`open_file`. :data:`FORMATS` is the table of what is read;
``docs/data.md`` shows it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from pydicom import uid
from pydicom.pixels.decoders import base

from secure_fed.clients import dicom_header, nifti, photographs
from secure_fed.clients.dicom import DicomFile
from secure_fed.clients.dicom_elements import text
from secure_fed.clients.dicom_header import HEADER, is_dicom, read_header
from secure_fed.clients.nifti import Axis, NiftiFile, is_nifti
from secure_fed.clients.photographs import PhotographFile, looks_like_one
from secure_fed.clients.rules import Kind, Picture, Rules, UndecodableError
from secure_fed.clients.series import frames_in_order


class Place(NamedTuple):
    """Which picture of a file: a frame or slice, from 0 (None takes the middle one), and across which axis it lies."""

    frame: int | None = None
    axis: Axis = "axial"


_MIDDLE = Place()


@dataclass(frozen=True, slots=True)
class Source:
    """One image: a file, and of a file with many pictures which one."""

    path: Path
    place: Place = _MIDDLE


ImageFile = DicomFile | NiftiFile | PhotographFile
"""A file that holds pictures, parsed once for all of them."""


class Format(NamedTuple):
    """One row of the table of formats.

    Attributes:
        name: of the format.
        known_by: what a file of it begins with; names and endings count for nothing.
        read: how it becomes a picture.
        refused: what of it is not read, with a sentence that says why.
        begins: whether a file's first 132 bytes are of this format.
        open: parses one.
    """

    name: str
    known_by: str
    read: str
    refused: str
    begins: Callable[[bytes], bool]
    open: Callable[[bytes], ImageFile]


FORMATS = (
    Format(
        "DICOM",
        "`DICM` at byte 128, or a first element of group 0002, 0008 or 0010",
        "the study's window for the modality, else the file's own table or window, else least to greatest value",
        "segmentations, doses, reports and other objects that are no picture; colours of more than 8 bits; slope 0; "
        "pixels or a codestream of another size than the header's; more than `most_pixels`",
        is_dicom,
        DicomFile,
    ),
    Format(
        "NIfTI (`.nii`, `.nii.gz`)",
        "a header of 348 or 540 bytes",
        "the middle axial slice or the one asked for, in canonical orientation, patient's right at the left; the "
        "study's window for `NIFTI`, else `cal_min` and `cal_max`, else least to greatest value",
        "more than three dimensions; colours; segmentations, statistics and vectors, by `intent_code`; header and "
        "image in two files; a sform and a qform that contradict one another; more values than the header counts; "
        "more than eight bytes for each of `most_pixels`",
        is_nifti,
        NiftiFile,
    ),
    Format(
        "PNG, JPEG, TIFF, BMP, GIF, WebP, JPEG 2000, PPM",
        "what each begins with",
        "as every viewer shows it: EXIF orientation obeyed, transparency filled with the study's background",
        "more than 8 bits a channel; values with a sign or fractions; several pictures in a file; a PNG or deflated "
        "TIFF whose checksums do not fit; a PNG, JPEG or TIFF in which data are missing; a BMP, PPM or TIFF with more "
        "of them than its header says; more than `most_pixels`",
        looks_like_one,
        PhotographFile,
    ),
)

IMAGE_ENDINGS = (
    *(".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".gif", ".webp", ".jp2", ".j2k", ".ppm", ".pgm", ".pbm"),
    *(".dcm", ".dicom", ".ima", ".nii", ".nii.gz"),
    *(".dcm.gz", ".heic", ".avif", ".mha", ".nrrd", ".mgz"),  # which are not read, and must not be missed in silence
)
"""A file whose name ends so is meant to be an image, and is told if it is none; others may be passed over."""

_SYNTAXES = (
    *(uid.ImplicitVRLittleEndian, uid.ExplicitVRLittleEndian, uid.ExplicitVRBigEndian),
    *(uid.DeflatedExplicitVRLittleEndian, uid.RLELossless, uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit),
    *(uid.JPEGLossless, uid.JPEGLosslessSV1, uid.JPEGLSLossless, uid.JPEGLSNearLossless),
    *(uid.JPEG2000Lossless, uid.JPEG2000, uid.HTJ2KLossless, uid.HTJ2KLosslessRPCL, uid.HTJ2K),
)


def open_file(content: bytes) -> ImageFile:
    """Parse a file that holds pictures.

    Raises:
        UndecodableError: it is empty, broken, or of no format that is read.
    """
    if not content:
        raise UndecodableError("an empty file; copy it again")
    head = content[: 4 * HEADER]
    for one in FORMATS[:-1]:
        if one.begins(head):
            return one.open(content)
    return FORMATS[-1].open(content)


def see(opened: ImageFile, place: Place, rules: Rules) -> Picture:
    """One picture of an opened file.

    Raises:
        UndecodableError: it cannot be decoded, or there is none at that place.
    """
    if isinstance(opened, NiftiFile):
        return opened.picture(place.frame, rules, place.axis)
    if place.axis != "axial":
        raise UndecodableError(f"axis {place.axis} of a file that is no NIfTI volume; expected none")
    return opened.picture(place.frame, rules)


def is_meant_as_image(path: Path) -> bool:
    """Whether a file is an image by its content, or by its name.

    Raises:
        OSError: it cannot be read.
    """
    if path.name.lower().endswith(IMAGE_ENDINGS):
        return True
    with path.open("rb") as stream:
        head = stream.read(4 * HEADER)
    return any(one.begins(head) for one in FORMATS)


def kind_of(path: Path) -> Kind:
    """What kind of file it is, as its header says; empty for an ordinary picture, and for what cannot be read."""
    header = read_header(path)
    return dicom_header.facts(header).kind if header is not None else "no picture" if no_picture(path) else ""


def no_picture(path: Path) -> str:
    """What a file is that is no picture of a patient, in words; empty if it is one, or cannot be read."""
    header = read_header(path)
    if header is not None:
        return dicom_header.no_picture(header)
    try:
        with path.open("rb") as stream:
            head = stream.read(1000)
    except OSError:
        return ""
    return nifti.no_picture(head) if is_nifti(head) else photographs.no_picture(head)


class Frames(NamedTuple):
    """The pictures of a file.

    Attributes:
        places: their numbers at each place, in the order of these, else each for itself as they are stored.
        placed: whether all of them say where they lie.
    """

    places: Sequence[Sequence[int]]
    placed: bool


def frames_of(path: Path, axis: Axis) -> Frames:
    """The pictures of a file; one also of a file that cannot be read: why it cannot comes out when it is decoded."""
    alone = Frames([[0]], True)
    try:
        with path.open("rb") as stream:
            head = stream.read(4 * HEADER)
        if is_nifti(head):
            return Frames([[one] for one in range(NiftiFile(path.read_bytes()).frames_along(axis))], True)
        size = path.stat().st_size
    except (OSError, UndecodableError):
        return alone
    header = read_header(path, groups=True)
    found = "" if header is None else text(header, "NumberOfFrames")
    if not found.isdecimal() or not 1 < int(found) <= size:  # no file has more frames than bytes
        return alone
    places = frames_in_order(header, int(found))
    return Frames([[one] for one in range(int(found))] if places is None else places, places is not None)


def identity(content: bytes, frame: int | None, axis: Axis = "axial") -> bytes:
    """By which an image is known for ever: SHA-256 of its file, and of a chosen frame its number and axis too."""
    return identity_of(hashlib.sha256(content).digest(), Place(frame, axis))


def identity_of(digest: bytes, place: Place) -> bytes:
    """As :func:`identity`, from the file's SHA-256."""
    if place.axis != "axial":
        digest = hashlib.sha256(digest + b"axis " + place.axis.encode()).digest()
    return digest if place.frame is None else hashlib.sha256(digest + b"frame %d" % place.frame).digest()


def transfer_syntaxes() -> dict[str, tuple[str, ...]]:
    """DICOM's transfer syntaxes that hold pictures, by name, with the plugins here that decode each; none if empty."""
    found: dict[str, tuple[str, ...]] = {}
    for syntax in _SYNTAXES:
        if syntax.is_encapsulated:
            decoder = base.get_decoder(syntax)
            found[syntax.name] = tuple(decoder.available_plugins) if decoder.is_available else ()
        else:
            found[syntax.name] = ("numpy",)
    return found


def table() -> str:
    """:data:`FORMATS` as a markdown table."""
    rows = [f"| {one.name} | {one.known_by} | {one.read} | {one.refused} |" for one in FORMATS]
    return "\n".join(["| format | known by | read | refused |", "|---|---|---|---|", *rows])

"""DICOM files: one frame as a grey or colour picture, as its header (or the study's window) says it is to be seen."""

from __future__ import annotations

import io
import math
import re
import struct
import warnings
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.encaps import get_frame, parse_basic_offsets, parse_fragments
from pydicom.pixels.decoders import base
from pydicom.pixels.processing import convert_color_space
from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    UID,
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
from secure_fed.clients.dicom_display import COLOUR, GREY, PALETTE, SMALL, Display, blocks
from secure_fed.clients.dicom_elements import text, whole
from secure_fed.clients.dicom_header import facts, inflated, is_deflated, no_picture
from secure_fed.clients.rules import Picture, Rules, UndecodableError, refused_as_no_picture
from secure_fed.clients.series import frames_in_order

jpeg.register()

_UNNAMED = {
    "1.2.840.10008.1.2.4.110": "JPEG XL Lossless",
    "1.2.840.10008.1.2.4.111": "JPEG XL JPEG Recompression",
    "1.2.840.10008.1.2.4.112": "JPEG XL",
    "1.2.840.10008.1.2.8.1": "Deflated Image Frame Compression",
}
"""Transfer syntaxes that are younger than pydicom's names."""

_FRACTIONS = {"FloatPixelData": "(7FE0,0008)", "DoubleFloatPixelData": "(7FE0,0009)"}
"""Elements that stand in the place of PixelData."""

_LONGER_RUNS = re.compile(r"RLE segment contains non-conformant padding - (\d+) vs\. (\d+) bytes")
"""Of pydicom's warnings the one of a picture in which something has moved, as data were lost before."""

_BEGINNINGS = (b"\xff\xd8\xff", b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP")
"""Of a frame as JPEG or JPEG-LS, JPEG 2000, and that in its own file format; inside of one none of them occurs."""

_WITHOUT_SIGN = (JPEGLSLossless, JPEGLSNearLossless)
"""Whose codestreams may be of more bits than are stored, with the stored sign left where it is."""

_LOSSLESS_WAVELETS = (JPEG2000Lossless, HTJ2KLossless, HTJ2KLosslessRPCL)
"""Whose codestreams may hold, above the bits that are stored, what else the header keeps there, such as overlays."""

_LOSSY_WAVELETS = (JPEG2000, HTJ2K)
"""Of which those bits cannot be taken off: what is white may have become a little more than the stored bits hold."""

_COSTLY = (JPEG2000, JPEG2000Lossless, HTJ2K, HTJ2KLossless, HTJ2KLosslessRPCL)
"""Whose decoders take 32 bits for each sample."""


class _Codestream(NamedTuple):
    """What a frame's JPEG, JPEG-LS or JPEG 2000 codestream says of itself.

    Attributes:
        width: in pixels.
        height: in pixels.
        samples: of each pixel.
        bits: of each sample.
        signed: 1 if samples have a sign, 0 if not; None where that is not said.
        near: by how much JPEG-LS may have changed a sample.
    """

    width: int
    height: int
    samples: int
    bits: int
    signed: int | None = None
    near: int = 0


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
        if is_deflated(content):
            content = inflated(content)
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
            frame: from 0, as they are stored; None takes the middle one, count // 2, by where they lie if
                they say that, and of several at one place the first that is stored (:func:`frames_in_order`).
            rules: of the study and the site.

        Raises:
            UndecodableError: it cannot be decoded, for want of a decoder or because it is broken; the message says why.
        """
        dataset = self._dataset
        place = self._middle if frame is None else [frame]
        index = place[0]
        if not 0 <= index < self.frames:
            raise UndecodableError(f"no frame {index}; it has {self.frames}, counted from 0")
        coloured = self._colour in COLOUR and dataset.file_meta.TransferSyntaxUID in _COSTLY
        rules.refuse_size(whole(dataset, "Columns"), whole(dataset, "Rows"), coloured)
        self._refuse_unread(index)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self._refuse_more_codestreams()
                stored = self._stored(index, self._compare_codestream(index))
        except UndecodableError:
            raise
        except Exception as error:
            syntax = dataset.file_meta.TransferSyntaxUID
            raise UndecodableError(
                f"DICOM pixels cannot be decoded ({syntax.name}, {syntax}: {_short(error)}); export the file again"
            ) from error
        try:
            picture = Display(dataset, self._facts).picture(stored, index, rules)
        except UndecodableError:
            raise
        except Exception as error:
            raise UndecodableError(f"DICOM pixels cannot be shown ({_short(error)}); export the file again") from error
        if len(place) > 1:
            note = f"{len(place)} frames at the middle place, of which the first that is stored is taken"
            picture = picture._replace(facts=picture.facts._replace(notes=(*picture.facts.notes, note)))
        return picture

    @cached_property
    def _middle(self) -> list[int]:
        """The frames at the middle place."""
        places = frames_in_order(self._dataset, self.frames)
        return [self.frames // 2] if places is None else places[len(places) // 2]

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
        known = (*GREY, PALETTE, *COLOUR)
        if self._colour not in known:
            raise UndecodableError(
                f"PhotometricInterpretation (0028,0004) is {self._colour or 'missing'}; expected one of "
                f"{', '.join(known)}: export the file again"
            )
        if dataset.PhotometricInterpretation != self._colour:
            dataset.PhotometricInterpretation = self._colour
        samples = 3 if self._colour in COLOUR else 1
        if (found := whole(dataset, "SamplesPerPixel")) != samples:
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
        """Refuse more uncompressed pixels than the header accounts for: one of too few frames, rows, columns, samples
        or bits has them, and would show something that nobody has seen.
        """
        dataset = self._dataset
        if dataset.file_meta.TransferSyntaxUID.is_encapsulated or self._colour == "YBR_FULL_422":
            return
        if not isinstance(dataset.PixelData, bytes):
            raise UndecodableError(
                f"PixelData (7FE0,0010) is written as {dataset['PixelData'].VR}; expected OB or OW: export it again"
            )
        bits = math.prod(whole(dataset, name) for name in ("Rows", "Columns", "SamplesPerPixel", "BitsAllocated"))
        found = len(dataset.PixelData)
        behind = dataset.PixelData[math.ceil(self.frames * bits / 8) :]
        # A row or a column less of each frame would leave as many bytes as one has; padding has one value.
        least = bits // max(1, whole(dataset, "Rows"), whole(dataset, "Columns"))
        odd = 8 * len(behind) >= max(16, least) and behind != behind[:1] * len(behind)
        if odd or 8 * found >= max((self.frames + 1) * bits, self.frames * bits + 16):
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
            offsets = parse_basic_offsets(stream)
            places = parse_fragments(stream)[1]
        if places and places[-1] + 8 + int.from_bytes(pixels[places[-1] + 4 : places[-1] + 8], "little") > len(pixels):
            raise ValueError("its last item says more bytes than are there, so that some are missing in it: copy it")
        count = len(places)  # of run lengths, of which a frame is one fragment
        if syntax != RLELossless:
            count = sum(pixels.startswith(_BEGINNINGS, place + 8) for place in places)  # behind an item's tag, length
        # Tables that do not lead to the frames in their order are passed over where each of these is one fragment.
        expected = [place - places[0] for place in places]
        if offsets and count == self.frames == len(places) and offsets != expected:
            self._dataset.PixelData = pixels[:4] + bytes(4) + pixels[places[0] :]
        extended = bytes(self._dataset.get("ExtendedOffsetTable") or b"")
        if extended != struct.pack(f"<{len(expected)}Q", *expected):
            for name in ("ExtendedOffsetTable", "ExtendedOffsetTableLengths"):
                self._dataset.pop(name, None)
        return count

    def _compare_codestream(self, index: int) -> _Codestream | None:
        """What a frame's own codestream says of size and sign is compared with the header before it is unpacked.

        Of JPEG 2000 a sign in the codestream holds, whatever the header says.

        Returns:
            What it says; None where there is none.

        Raises:
            UndecodableError: the codestream is of another size, which would be unpacked, however large, first.
        """
        dataset = self._dataset
        syntax = dataset.file_meta.TransferSyntaxUID
        if not syntax.startswith("1.2.840.10008.1.2.4."):
            return None
        frame = get_frame(dataset.PixelData, index, number_of_frames=self.frames)
        found = _codestream(frame)
        if found is None:
            return None
        if syntax in _WITHOUT_SIGN and not jpeg.is_ended(frame):  # CharLS would look for it for ever
            raise UndecodableError(
                "DICOM whose JPEG-LS codestream ends too early, without an EOI marker; expected it whole: copy or "
                "export the file again"
            )
        width, height, samples, bits, signed, _ = found
        expected = whole(dataset, "Columns"), whole(dataset, "Rows"), whole(dataset, "SamplesPerPixel")
        if (width, height, samples) != expected:
            raise UndecodableError(
                f"DICOM whose codestream is of {width} x {height} pixels with {samples} samples each, and whose header "
                f"says {expected[0]} x {expected[1]} with {expected[2]}; expected the same in both: export it again"
            )
        allocated = whole(dataset, "BitsAllocated")
        if syntax in (JPEGBaseline8Bit, JPEGExtended12Bit) and (bits > 8) != (allocated > 8):
            raise UndecodableError(
                f"DICOM whose codestream has {bits} bits a sample, and whose header allocates {allocated} "
                "(BitsAllocated (0028,0100)), so that a window may be of either; expected the same in both: export it "
                "again"
            )
        if signed:  # without one it may be that the encoder knew none: then it stands in the highest bit, if anywhere
            dataset.PixelRepresentation = signed
        if self._colour in ("YBR_FULL", "YBR_FULL_422") and _is_transformed(frame):
            # Decoders undo that, and hand out red, green and blue (PS3.5, 8.2.4).
            dataset.PhotometricInterpretation = "YBR_ICT"
        return found

    def _stored(self, index: int, coded: _Codestream | None) -> NDArray[Any]:
        """A frame's stored values; those that do not end with the lowest bit are moved there.

        Args:
            index: of the frame, from 0.
            coded: what the frame's codestream says of itself, if there is one.
        """
        dataset = self._dataset
        bits, high = dataset.get("BitsStored"), dataset.get("HighBit")
        if not isinstance(bits, int) or not isinstance(high, int) or high == bits - 1:
            return _decoded(dataset, index, coded)
        syntax = dataset.file_meta.TransferSyntaxUID
        if not 1 <= bits <= high + 1 <= whole(dataset, "BitsAllocated") or (
            syntax.is_encapsulated and syntax != RLELossless
        ):
            raise UndecodableError(
                f"HighBit (0028,0102) is {high} and BitsStored (0028,0101) {bits}; expected "
                f"{bits - 1 if bits > 0 else 'at least one bit'}: export it again"
            )
        dataset.BitsStored = high + 1
        try:
            return np.asarray(_decoded(dataset, index, coded) >> (high + 1 - bits))
        finally:
            dataset.BitsStored = bits


def _give_syntax(dataset: Any) -> None:
    """Files without a meta header: pydicom has found out how they are written."""
    if not hasattr(dataset, "file_meta"):
        dataset.file_meta = pydicom.dataset.FileMetaDataset()
    found = dataset.file_meta.get("TransferSyntaxUID")
    if found is not None and not isinstance(found, UID):  # several values, or numbers
        raise ValueError(f"its transfer syntax (0002,0010) is {str(found)[:60]}; expected one identifier")
    if found is None:
        implicit, little = dataset.original_encoding
        native = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
        dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else native


def _decoded(dataset: Any, index: int, coded: _Codestream | None) -> NDArray[Any]:
    """A frame's stored values; by pydicom's ``pixel_array`` the header would be read for it twice."""
    syntax = dataset.file_meta.TransferSyntaxUID
    samples = whole(dataset, "SamplesPerPixel")
    native = not syntax.is_encapsulated and syntax != ExplicitVRBigEndian
    if native and samples == whole(dataset, "BitsAllocated") == 1:
        return _single_bits(dataset, index)
    decoder = base.get_decoder(syntax)
    if syntax.is_encapsulated and samples > 1:
        dataset.PlanarConfiguration = 0  # of what was compressed: decoders hand out pixels, or say what else
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found, about = decoder.as_array(dataset, index=index, as_rgb=False)  # type: ignore[arg-type]  # an option
    for longer in filter(None, (_LONGER_RUNS.search(str(one.message)) for one in told)):
        if int(longer[1]) > int(longer[2]) + 1:  # one byte makes a segment even
            raise ValueError(f"a segment of {longer[1]} bytes, unpacked, of {longer[2]}: what it says of some is lost")
    if found.ndim == 3 and (colours := str(about["photometric_interpretation"])).startswith("YBR_FULL"):
        # Here and not in pydicom, which takes the whole picture as floating point numbers.
        for rows in blocks(found, SMALL):
            found[rows] = convert_color_space(found[rows], colours, "RGB")
    return found if coded is None else _of_stored_bits(dataset, found, coded)


def _of_stored_bits(dataset: Any, found: NDArray[Any], coded: _Codestream) -> NDArray[Any]:
    """A frame's values without what stands above the bits that are stored, and with the sign that stands in these.

    Raises:
        UndecodableError: it cannot be taken off, or may be a part of the values.
    """
    syntax, bits, allocated = dataset.file_meta.TransferSyntaxUID, dataset.get("BitsStored"), 8 * found.dtype.itemsize
    if not isinstance(bits, int) or not 1 <= bits <= allocated:
        return found
    if coded.near:
        return _unwrapped(found, bits, coded)
    unsigned = found.dtype.kind == "i" and coded.signed == 0
    if unsigned and syntax in _LOSSY_WAVELETS and not 0 <= int(found.min()) <= int(found.max()) < 2 ** (bits - 1):
        raise UndecodableError(
            "DICOM whose lossy JPEG 2000 codestream has no sign and values in the upper half, and whose header says "
            "that there is one (PixelRepresentation (0028,0103)): 0 and -1, far apart in it, became something between; "
            "expected the same in both: export it again"
        )
    if bits == allocated:
        return found
    if syntax not in _WITHOUT_SIGN and (syntax not in _LOSSLESS_WAVELETS + _LOSSY_WAVELETS or coded.bits <= bits):
        return found
    most = 2**bits >> (found.dtype.kind == "i")
    if syntax in _LOSSY_WAVELETS:
        if not -most * 9 // 8 <= int(found.min()) <= int(found.max()) <= most * 9 // 8:
            raise UndecodableError(
                f"DICOM whose codestream has values from {found.min()} to {found.max()}, of lossy compression and "
                f"{bits} bits (BitsStored (0028,0101)); expected as many as these hold: export it again"
            )
        return found
    masked = _lowest(found, bits)
    if syntax in _WITHOUT_SIGN or coded.bits == whole(dataset, "BitsAllocated") == allocated:
        return masked
    # A codestream of fewer bits than are allocated says how many there are: the header may be wrong.
    if np.array_equal(masked, found):
        return found
    if unsigned and 0 <= int(found.min()) <= int(found.max()) < 2**bits:
        return masked
    overlays = sum(1 << place for place in _overlay_planes(dataset) if bits <= place < coded.bits)
    if overlays and np.array_equal(masked & (2**bits - 1), found & (2**coded.bits - 1 - overlays)):
        return masked
    raise UndecodableError(
        f"DICOM whose codestream has values from {found.min()} to {found.max()}, of {coded.bits} bits, and whose "
        f"header says {bits} (BitsStored (0028,0101)) and no overlay in the others (60xx,0102); expected the same in "
        "both: export it again"
    )


def _lowest(values: NDArray[Any], bits: int) -> NDArray[Any]:
    """The lowest bits of values, the highest of them as a sign where values have one."""
    above = 8 * values.dtype.itemsize - bits
    return np.asarray((values << above) >> above)


def _overlay_planes(dataset: Any) -> set[int]:
    """Places of the bits, from 0, in which a header says that overlays lie beside the values (60xx,0102)."""
    found = (dataset.get((group, 0x0102)) for group in range(0x6000, 0x6020, 2))
    return {element.value for element in found if element is not None and isinstance(element.value, int)}


def _unwrapped(found: NDArray[Any], bits: int, coded: _Codestream) -> NDArray[Any]:
    """Values that JPEG-LS may have changed by ``near``, cut where that led beyond what the stored bits hold.

    Raises:
        UndecodableError: they lie further beyond, or black and white may have become one another.
    """
    near, edge = coded.near, 2 ** (bits - 1)
    if found.dtype.kind == "u":
        low, high, least, most = int(found.min()), int(found.max()), 0, 2**bits - 1
    else:
        # The encoder knows no sign: where it stands in the codestream's highest bit, or in the stored ones' alone.
        values = _lowest(found, coded.bits)
        low, high, least, most = int(values.min()), int(values.max()), -edge, edge - 1
        if coded.bits > bits and low < 0:
            found = values
        else:
            patterns = values.view(f"u{values.dtype.itemsize}") & (2**coded.bits - 1)
            if ((patterns >= edge - near) & (patterns < edge + near)).any():
                raise UndecodableError(
                    f"DICOM of JPEG-LS that may have changed each value by {near}, with values within that of {most} "
                    f"or {least}, which are neighbours as they are coded, so that white may have become black; "
                    "expected lossless compression of values with a sign: export it again"
                )
            low = high = 0
            if patterns.max() < 2**bits + near:
                return _lowest(found, bits)
            high = int(patterns.max())
    if not least - near <= low <= high <= most + near:
        raise UndecodableError(
            f"DICOM whose codestream has values from {low} to {high}, of lossy compression and {bits} bits "
            "(BitsStored (0028,0101)); expected as many as these hold: export it again"
        )
    return found if least <= low <= high <= most else found.clip(least, most)


def _single_bits(dataset: Any, index: int) -> NDArray[np.uint8]:
    """A frame of pixels of one bit, which follows the last one's within a byte: pydicom loses those at its end."""
    shape = whole(dataset, "Rows"), whole(dataset, "Columns")
    start, rest = divmod(index * math.prod(shape), 8)
    end = rest + math.prod(shape)
    content = np.frombuffer(dataset.PixelData[start : start + math.ceil(end / 8)], dtype=np.uint8)
    return np.unpackbits(content, bitorder="little")[rest:end].reshape(shape)


def _codestream(frame: bytes) -> _Codestream | None:
    """What a frame's JPEG, JPEG-LS or JPEG 2000 codestream says of itself; None if it is neither."""
    start = frame.find(b"\xff\x4f\xff\x51", 0, 1 << 16)
    if start >= 0 and len(frame) > start + 42:
        # SIZ: marker, length, capabilities, sizes and offsets of 32 bits, number of components, the first one's depth.
        right, bottom, left, top = struct.unpack(">4I", frame[start + 8 : start + 24])
        samples, depth = int.from_bytes(frame[start + 40 : start + 42], "big"), frame[start + 42]
        return _Codestream(right - left, bottom - top, samples, (depth & 0x7F) + 1, depth >> 7)
    found = None
    for marker, _, content in jpeg.segments(frame):
        if jpeg.is_frame(marker) and len(content) > 5:
            height, width = struct.unpack(">2H", content[1:5])
            found = _Codestream(width, height, content[5], content[0])
            if marker != jpeg.LS_FRAME:
                return found
        elif marker == jpeg.SCAN and found is not None and len(content) > 1 + 2 * content[0]:
            return found._replace(near=content[1 + 2 * content[0]])
    return found


def _is_transformed(frame: bytes) -> bool:
    """Whether a JPEG 2000 codestream says that its components are a transform of red, green and blue (ISO/IEC 15444-1,
    A.6.1)."""
    at = frame.find(b"\xff\x4f\xff\x51", 0, 1 << 16) + 2
    while at >= 2 and at + 9 <= len(frame) and frame[at] == 0xFF and frame[at + 1] != 0x90:  # tiles
        if frame[at + 1] == 0x52:
            return frame[at + 8] == 1
        at += 2 + int.from_bytes(frame[at + 2 : at + 4], "big")
    return False


_ALL_PLUGINS = "Unable to decode as exceptions were raised by all available plugins:"


def _short(error: Exception) -> str:
    """What went wrong, in one line, without a library's guesses at it."""
    words = " ".join(str(error).split(" - ")[0].split())
    return words.removeprefix(_ALL_PLUGINS).strip()[:160] or type(error).__name__

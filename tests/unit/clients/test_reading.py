"""Each format becomes the picture that its writers meant, or one sentence says why not; others decode to compare."""

import gzip
import io
import itertools
import re
import struct
import time
import zlib
from pathlib import Path

import imagecodecs
import nibabel
import numpy as np
import pydicom
import pytest
from openjpeg.utils import encode_buffer
from PIL import Image, TiffImagePlugin
from pydicom import uid
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, get_frame
from pydicom.pixels.processing import apply_modality_lut
from pydicom.sequence import Sequence

from secure_fed.clients import dicom as dicom_module
from secure_fed.clients.decoding import decode, decode_all, identities
from secure_fed.clients.dicom_header import is_dicom
from secure_fed.clients.jpeg import segments
from secure_fed.clients.nifti import AXES
from secure_fed.clients.reading import (
    Place,
    Source,
    identity,
    is_meant_as_image,
    kind_of,
    open_file,
    see,
    table,
    transfer_syntaxes,
)
from secure_fed.clients.rules import Rules, UndecodableError
from secure_fed.protocol.study_tables import Window
from tests.unit.clients.test_dicom import RAMP, as_bytes, dicom, grey

SMOOTH = np.add.outer(np.arange(64), 2 * np.arange(64)).astype(np.uint16) * 16  # 12 bits


def encapsulated(pixels, syntax, codestream, colour="MONOCHROME2", **fields):
    dataset = dicom(pixels, colour, **fields)
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.PixelData = encapsulate([codestream])
    dataset["PixelData"].is_undefined_length = True
    return dataset


TWELVE = {"BitsStored": 12, "HighBit": 11, "WindowCenter": 1536, "WindowWidth": 3072, "VOILUTFunction": "LINEAR_EXACT"}


@pytest.mark.parametrize(
    ("syntax", "encode", "decode_otherwise"),
    [
        (uid.JPEGLossless, lambda x: imagecodecs.ljpeg_encode(x, bitspersample=12), imagecodecs.ljpeg_decode),
        (uid.JPEGLosslessSV1, lambda x: imagecodecs.ljpeg_encode(x, bitspersample=12), imagecodecs.ljpeg_decode),
        (uid.JPEGLSLossless, imagecodecs.jpegls_encode, imagecodecs.jpegls_decode),
        (uid.JPEGLSNearLossless, lambda x: imagecodecs.jpegls_encode(x, level=3), imagecodecs.jpegls_decode),
        (uid.JPEG2000Lossless, lambda x: j2k(x), imagecodecs.jpeg2k_decode),
        (uid.JPEG2000, lambda x: j2k(x, level=60), imagecodecs.jpeg2k_decode),
        (uid.HTJ2KLossless, imagecodecs.htj2k_encode, imagecodecs.htj2k_decode),
        (uid.HTJ2KLosslessRPCL, imagecodecs.htj2k_encode, imagecodecs.htj2k_decode),
        (uid.HTJ2K, imagecodecs.htj2k_encode, imagecodecs.htj2k_decode),
    ],
    ids=lambda value: value.name if isinstance(value, uid.UID) else "",
)
def test_what_another_library_encoded_is_shown_as_that_decodes_it(syntax, encode, decode_otherwise):
    stream = encode(SMOOTH)
    expected = grey(dicom(decode_otherwise(stream).astype(np.uint16), **TWELVE))
    assert len(np.unique(expected)) > 100
    found = grey(encapsulated(SMOOTH, syntax, stream, **TWELVE))
    assert np.abs(found - expected).max() <= 1
    if "Lossless" in syntax.name and "Near" not in syntax.name:
        assert np.array_equal(found, grey(dicom(SMOOTH, **TWELVE)))


def j2k(pixels, **options):
    return imagecodecs.jpeg2k_encode(pixels, codecformat="j2k", bitspersample=12, **options)


def test_extended_jpeg_of_twelve_bits_is_shown_as_dcmtk_decodes_it():
    # Encoded by dcmtk's dcmcjpeg +ee, and decoded by its dcmdjpeg.
    folder = Path(__file__).parent
    content = (folder / "extended_12bit.dcm").read_bytes()
    dataset = pydicom.dcmread(io.BytesIO(content))
    assert (dataset.file_meta.TransferSyntaxUID, dataset.BitsStored) == (uid.JPEGExtended12Bit, 12)
    decoded = np.frombuffer(gzip.decompress((folder / "extended_12bit.raw.gz").read_bytes()), "<u2").reshape(64, 64)
    found = np.asarray(decode(content)).astype(int)
    assert np.abs(found - grey(dicom(decoded, **TWELVE))).max() <= 1
    assert np.abs(found - grey(dicom(SMOOTH, **TWELVE))).max() <= 2


def test_baseline_jpeg_and_run_lengths_are_shown_as_other_decoders_show_them():
    eight = (SMOOTH >> 4).astype(np.uint8)
    window = {"WindowCenter": 128, "WindowWidth": 256, "VOILUTFunction": "LINEAR_EXACT"}
    stream = imagecodecs.jpeg8_encode(eight, level=95)
    found = grey(encapsulated(eight, uid.JPEGBaseline8Bit, stream, **window))
    expected = np.rint(np.asarray(Image.open(io.BytesIO(stream))).astype(float) / 256 * 255)
    assert np.abs(found - expected).max() <= 1
    packed = dicom(SMOOTH, **TWELVE)
    packed.compress(uid.RLELossless)
    assert np.array_equal(grey(packed), grey(dicom(SMOOTH, **TWELVE)))


@pytest.mark.parametrize("bits", [8, 12, 16])
@pytest.mark.parametrize("predictor", range(1, 8))
def test_lossless_jpeg_keeps_every_value_whatever_its_bits_and_predictor(bits, predictor):
    values = np.random.default_rng(predictor).integers(0, 2**bits, (9, 14))
    kind = np.uint8 if bits == 8 else np.uint16
    stream = imagecodecs.jpeg8_encode(values.astype(kind), lossless=True, predictor=predictor, bitspersample=bits)
    fields = {"BitsStored": bits, "HighBit": bits - 1, "WindowCenter": 2 ** (bits - 1), "WindowWidth": 2**bits}
    found = grey(encapsulated(values.astype(kind), uid.JPEGLossless, stream, **fields))
    assert np.array_equal(found, grey(dicom(values.astype(kind), **fields)))
    signed = (values - 2 ** (bits - 1)).astype(np.int8 if bits == 8 else np.int16)
    fields["WindowCenter"] = 0
    low = (signed.astype(np.int64) % 2**bits).astype(kind)
    stream = imagecodecs.jpeg8_encode(low, lossless=True, predictor=predictor, bitspersample=bits)
    found = grey(encapsulated(signed, uid.JPEGLossless, stream, **fields))
    assert np.array_equal(found, grey(dicom(signed, **fields)))


@pytest.mark.parametrize("colour", ["RGB", "YBR_FULL"])
def test_lossless_jpeg_keeps_colours_as_the_header_names_them(colour):
    pixels = np.random.default_rng(3).integers(0, 256, (10, 12, 3), dtype=np.uint8)
    stream = imagecodecs.jpeg8_encode(pixels, lossless=True, colorspace="RGB", outcolorspace="RGB")
    streams = [stream]
    if colour == "YBR_FULL":  # names of the components as others write them, with JFIF for the word on RGB, or not
        start = stream.index(b"\xff\xee")
        streams = [stream, stream[:start] + JFIF + stream[start + 16 :]]
        for between in (b"\x11\0", b"\0"):  # in the frame's header and in the scan's
            streams = [one.replace(b"R%bG%bB" % ((between,) * 2), b"\1%b\2%b\3" % ((between,) * 2)) for one in streams]
    plain = decode(as_bytes(dicom(pixels, colour)))
    for one in streams:
        found = encapsulated(pixels, uid.JPEGLosslessSV1, one, colour=colour)
        assert np.array_equal(np.asarray(decode(as_bytes(found))), np.asarray(plain))


ADOBE = b"\xff\xee\0\x0eAdobe\0d\0\0\0\0"
JFIF = b"\xff\xe0\0\x10JFIF\0\1\1\0\0\1\0\1\0\0"


@pytest.mark.parametrize("header", ["RGB", "YBR_FULL", "YBR_FULL_422"])
@pytest.mark.parametrize("syntax", [uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit])
def test_of_jpeg_the_codestream_says_whether_colours_were_transformed(syntax, header):
    pixels = np.zeros((16, 24, 3), dtype=np.uint8)
    pixels[:] = (200, 60, 20)
    stream = imagecodecs.jpeg8_encode(pixels, level=98, subsampling="420" if header == "YBR_FULL_422" else "444")
    assert JFIF in stream
    plain = stream.replace(JFIF, b"")
    for marked in (stream, plain[:2] + ADOBE + b"\1" + plain[2:], plain[:2] + JFIF + ADOBE + b"\0" + plain[2:]):
        found = np.asarray(
            decode(as_bytes(encapsulated(pixels, syntax, marked, "RGB", PhotometricInterpretation=header)))
        ).astype(int)
        assert np.abs(found - pixels).max() <= 3
    raw = imagecodecs.jpeg8_encode(pixels, level=98, colorspace="RGB", outcolorspace="RGB")
    raw = raw.replace(ADOBE + b"\0", b"")
    for between in (b"\x11\0", b"\0"):  # in the frame's header and in the scan's
        raw = raw.replace(b"R%bG%bB" % (between, between), b"\1%b\2%b\3" % (between, between))
    for marked in (raw[:2] + ADOBE + b"\0" + raw[2:], *[raw] * (header == "RGB")):
        found = np.asarray(
            decode(as_bytes(encapsulated(pixels, syntax, marked, "RGB", PhotometricInterpretation=header)))
        ).astype(int)
        assert np.abs(found - pixels).max() <= 3


def without_markers(stream):
    """A JPEG without JFIF's and Adobe's, by which programs know its colours."""
    kept, at = stream[:2], 2
    for marker, start, content in segments(stream):
        if marker not in (0xE0, 0xEE):
            kept += stream[at : start + len(content)]
        at = start + len(content)
    return kept + stream[at:]


@pytest.mark.parametrize("syntax", [uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit])
@pytest.mark.parametrize("thinned", [1, 2])
def test_colours_of_which_a_jpeg_has_fewer_are_differences_whatever_the_header_calls_them(syntax, thinned):
    """As of ultrasound scanners that call them RGB: of red, green and blue none is thinned out."""
    small = np.random.default_rng(5).integers(0, 256, (4, 4, 3), np.uint8)
    colours = np.asarray(Image.fromarray(small).resize((64, 64)))
    stream = saved(Image.fromarray(colours), "JPEG", quality=95, subsampling=thinned)
    expected = np.asarray(Image.open(io.BytesIO(stream))).astype(int)
    for found in (stream, without_markers(stream)):
        for header in ("RGB", "YBR_FULL", "YBR_FULL_422"):
            dataset = encapsulated(colours, syntax, found, "RGB")
            dataset.PhotometricInterpretation = header
            assert np.abs(np.asarray(decode(as_bytes(dataset))) - expected).max() <= 3, (header, len(found))
    whole = without_markers(bytes(imagecodecs.jpeg8_encode(colours, level=98, colorspace="RGB", outcolorspace="RGB")))
    assert np.abs(np.asarray(decode(as_bytes(encapsulated(colours, syntax, whole, "RGB")))) - expected).mean() < 10


@pytest.mark.parametrize(
    ("syntax", "options"),
    [
        (uid.JPEGBaseline8Bit, {}),
        (uid.JPEGExtended12Bit, {"bitspersample": 12}),
        (uid.JPEGLosslessSV1, {"bitspersample": 12, "lossless": True}),
    ],
)
def test_a_jpeg_frame_that_ends_too_early_is_refused_and_never_filled(syntax, options):
    noise = SMOOTH + np.random.default_rng(0).integers(0, 64, SMOOTH.shape).astype(np.uint16)
    pixels, fields = (noise, TWELVE) if options else ((noise >> 4).astype(np.uint8), {})
    stream = imagecodecs.jpeg8_encode(pixels, **options)
    thumbnail = b"\xff\xe1\0\x06\xff\xd9\xff\xd9"  # which has ends of its own
    stream = stream[:2] + thumbnail + stream[2:]
    for padding in (b"", b"\0", b"\0\0\0"):
        assert len(np.unique(grey(encapsulated(pixels, syntax, stream + padding, **fields)))) > 100
    for part in (len(stream) // 2, len(stream) - 2):
        with pytest.raises(UndecodableError, match="imagecodecs: it ends too early, without an EOI marker"):
            grey(encapsulated(pixels, syntax, stream[:part], **fields))


@pytest.mark.parametrize(
    ("syntax", "options"),
    [
        (uid.JPEGBaseline8Bit, {}),
        (uid.JPEGExtended12Bit, {"bitspersample": 12}),
        (uid.JPEGLosslessSV1, {"bitspersample": 12, "lossless": True}),
        (uid.JPEGLossless, {"bitspersample": 12, "lossless": True, "predictor": 4}),
    ],
)
def test_a_jpeg_frame_of_which_a_part_is_missing_or_zeros_is_refused_and_never_filled(syntax, options):
    noise = SMOOTH + np.random.default_rng(0).integers(0, 64, SMOOTH.shape).astype(np.uint16)
    pixels, fields = (noise, TWELVE) if options else ((noise >> 4).astype(np.uint8), {})
    stream = bytes(imagecodecs.jpeg8_encode(pixels, **options))
    start = max(place + len(content) for _, place, content in segments(stream))
    for at in range(start + 20, len(stream) - 300, (len(stream) - start) // 10):
        for instead in (b"", bytes(200)):
            with pytest.raises(UndecodableError, match=r"data are missing in it, or others|without an EOI marker"):
                grey(encapsulated(pixels, syntax, stream[:at] + instead + stream[at + 200 :], **fields))


@pytest.mark.parametrize(
    ("syntax", "encode"),
    [
        (uid.JPEGBaseline8Bit, lambda x: imagecodecs.jpeg8_encode((x >> 4).astype(np.uint8))),
        (uid.JPEGLosslessSV1, lambda x: imagecodecs.ljpeg_encode(x, bitspersample=12)),
        (uid.JPEG2000Lossless, lambda x: j2k(x)),
        (uid.RLELossless, None),
    ],
)
@pytest.mark.parametrize("lost", [2, 40])
def test_a_file_in_which_bytes_of_a_frame_are_lost_is_refused(lost, syntax, encode):
    """The frame's own data may go on as if nothing were: what its item says of their number does not fit."""
    noise = SMOOTH + np.random.default_rng(0).integers(0, 64, SMOOTH.shape).astype(np.uint16)
    fields = {} if syntax == uid.JPEGBaseline8Bit else TWELVE
    if encode is None:
        dataset = dicom(noise, **fields)
        dataset.compress(syntax)
    else:
        pixels = noise if fields else (noise >> 4).astype(np.uint8)
        dataset = encapsulated(pixels, syntax, bytes(encode(noise)), **fields)
    content = as_bytes(dataset)
    decode(content)
    for at in range(len(content) // 2, len(content) - 200, len(content) // 10):
        with pytest.raises(UndecodableError, match="its last item says more bytes than are there"):
            decode(content[:at] + content[at + lost :])


def test_run_lengths_that_go_on_behind_the_picture_are_refused():
    noise = np.random.default_rng(0).integers(0, 256, (16, 16), dtype=np.uint8)
    packed = dicom(noise)
    packed.compress(uid.RLELossless)
    frame = get_frame(packed.PixelData, 0)
    for more, refused in ((b"\0\1", False), (b"\0\1\0\1", True), (b"\xf0\1", True)):
        longer = encapsulated(noise, uid.RLELossless, frame + more)
        if refused:
            with pytest.raises(UndecodableError, match=r"a segment of \d+ bytes, unpacked, of 256"):
                decode(as_bytes(longer))
        else:
            assert np.array_equal(grey(longer), grey(dicom(noise)))


def test_a_deflated_file_that_ends_too_early_is_refused_though_its_pixels_are_there():
    dataset = dicom(RAMP)
    dataset.file_meta.TransferSyntaxUID = uid.DeflatedExplicitVRLittleEndian
    content = as_bytes(dataset)
    engine = zlib.compressobj(wbits=-15)
    start = 144 + struct.unpack("<I", content[140:144])[0]
    open_ended = (
        content[:start] + engine.compress(zlib.decompress(content[start:], -15)) + engine.flush(zlib.Z_FULL_FLUSH)
    )
    decode(content)
    with pytest.raises(UndecodableError, match="a deflated DICOM file that ends too early"):
        decode(open_ended)


def test_a_transfer_syntax_of_two_values_is_none():
    dataset = dicom(RAMP)
    content = as_bytes(dataset)
    known = b"1.2.840.10008.1.2.1\0"
    for other in (b"1.2.840\\10008.1.2.1\0", b"\\" * 20):
        with pytest.raises(UndecodableError, match=r"broken DICOM \(its transfer syntax \(0002,0010\) is \["):
            decode(content.replace(known, other))


@pytest.mark.parametrize("near", [0, 3])
def test_jpeg_ls_that_ends_too_early_never_reaches_the_decoder_which_does_not_end(near, monkeypatch):
    stream = bytes(imagecodecs.jpegls_encode(SMOOTH, level=near))
    syntax = uid.JPEGLSNearLossless if near else uid.JPEGLSLossless
    for padding in (b"", b"\0"):
        assert len(np.unique(grey(encapsulated(SMOOTH, syntax, stream + padding, **TWELVE)))) > 100
    monkeypatch.setattr(dicom_module, "_decoded", lambda *_: pytest.fail("it would run for ever"))
    thumbnail = b"\xff\xe1\0\x06\xff\xd9\xff\xd9"  # which has ends of its own
    for cut in (stream[: len(stream) // 2], stream[:2] + thumbnail + stream[2:-2]):
        with pytest.raises(UndecodableError, match="JPEG-LS codestream ends too early, without an EOI marker"):
            grey(encapsulated(SMOOTH, syntax, cut, **TWELVE))


def test_a_codestream_of_fewer_bits_than_the_header_is_shown_or_refused():
    eight = (SMOOTH >> 4).astype(np.uint8)
    window = {"WindowCenter": 96, "WindowWidth": 192, "VOILUTFunction": "LINEAR_EXACT"}
    stream = imagecodecs.jpeg2k_encode(eight, codecformat="j2k")
    for says in ({"BitsStored": 12, "HighBit": 11}, {"BitsStored": 16, "HighBit": 15}):
        found = encapsulated(SMOOTH, uid.JPEG2000Lossless, stream, **says, **window)
        assert np.array_equal(grey(found), grey(dicom(eight, **window)))
    for syntax in (uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit):
        with pytest.raises(UndecodableError, match=r"has 8 bits a sample, and whose header allocates 16 \(BitsAlloc"):
            grey(encapsulated(SMOOTH, syntax, imagecodecs.jpeg8_encode(eight), **TWELVE))
        assert len(np.unique(grey(encapsulated(eight, syntax, imagecodecs.jpeg8_encode(eight))))) > 100


def test_every_transfer_syntax_has_a_decoder_here_and_none_ends_the_process_on_a_broken_frame():
    assert all(transfer_syntaxes().values())
    assert len(transfer_syntaxes()) == 16
    assert not any("gdcm" in plugins for plugins in transfer_syntaxes().values())  # even where it is installed
    stream = imagecodecs.ljpeg_encode(SMOOTH, bitspersample=12)
    for broken in (stream[:2] + b"\0" + stream[3:], stream.replace(b"\xff\xc3\0\x0b\x0c", b"\xff\xc3\0\x0b\xff")):
        assert broken != stream  # gdcm ends the process, with SIGABRT and SIGSEGV
        with pytest.raises(UndecodableError, match="cannot be decoded"):
            decode(as_bytes(encapsulated(SMOOTH, uid.JPEGLosslessSV1, broken, **TWELVE)))


def test_a_windows_width_below_one_is_exact_and_one_of_nothing_is_passed_over_and_told():
    small = {"RescaleSlope": 0.0002, "RescaleIntercept": 0, "WindowCenter": 0.1, "WindowWidth": 0.2}
    values = np.array([[0, 250], [500, 1000]], dtype=np.uint16)
    assert grey(dicom(values, **small)).tolist() == [[0, 64], [128, 255]]
    for width in (0, -5):
        dataset = dicom(RAMP, WindowCenter=10, WindowWidth=width)
        assert np.array_equal(grey(dataset), grey(dicom(RAMP)))
        (batch,) = decode_all_of([as_bytes(dataset)])
        assert f"window of width {width} (0028,1051) passed over" in batch.notes[0]
    second = dicom(RAMP, WindowCenter=[10, 150], WindowWidth=[0, 400])
    assert np.array_equal(grey(second), grey(dicom(RAMP, WindowCenter=150, WindowWidth=400)))


def decode_all_of(contents, rules=Rules()):
    return [see(open_file(content), Place(), rules).facts for content in contents]


def raw(dataset, keyword, value):
    """A file with an element as no library would write it."""
    setattr(dataset, keyword, "1" * len(value))
    content = as_bytes(dataset)
    tag = pydicom.datadict.tag_for_keyword(keyword)
    head = struct.pack("<HH", tag >> 16, tag & 0xFFFF) + b"DS"
    place = content.index(head) + len(head) + 2
    return content[:place] + value.ljust(len(value) + len(value) % 2) + content[place + len(value) + len(value) % 2 :]


def test_numbers_are_read_as_their_writers_meant_them():
    plain = grey(dicom(RAMP, WindowCenter="150.5", WindowWidth="400"))
    commas = np.asarray(decode(raw(dicom(RAMP, WindowWidth="400"), "WindowCenter", b"150,5 "))).astype(int)
    assert np.array_equal(commas, plain)
    both = dicom(RAMP, WindowWidth="400")
    assert np.array_equal(np.asarray(decode(raw(both, "WindowCenter", b"\\150.5"))).astype(int), plain)
    assert np.array_equal(grey(dicom(RAMP, RescaleSlope=None, RescaleIntercept=None)), grey(dicom(RAMP)))
    lower = dicom(RAMP, WindowCenter=150, WindowWidth=400, VOILUTFunction="linear_exact")
    upper = dicom(RAMP, WindowCenter=150, WindowWidth=400, VOILUTFunction="LINEAR_EXACT")
    assert np.array_equal(grey(lower), grey(upper))
    with pytest.raises(UndecodableError, match=r"WindowCenter \(0028,1050\) is 'abc'; expected a decimal number"):
        decode(raw(dicom(RAMP, WindowWidth="400"), "WindowCenter", b"abc"))
    with pytest.raises(UndecodableError, match=r"RescaleSlope \(0028,1053\) is 0"):
        grey(dicom(RAMP, RescaleSlope=0, RescaleIntercept=1))


def test_windows_are_paired_by_place_and_a_number_that_may_be_two_is_refused():
    plain = grey(dicom(RAMP, WindowCenter=150, WindowWidth=400))
    second = raw(dicom(RAMP, WindowCenter=[1, 150]), "WindowWidth", b"\\400")
    assert np.array_equal(np.asarray(decode(second)).astype(int), plain)
    with pytest.raises(UndecodableError, match=r"WindowWidth .* is '1,234', which may be 1.234 or 1234"):
        decode(raw(dicom(RAMP, WindowCenter=150), "WindowWidth", b"1,234 "))
    for text, number in ((b"0,4 ", "0.4"), (b"400,5 ", "400.5"), (b"1234,5", "1234.5")):
        found = np.asarray(decode(raw(dicom(RAMP, WindowCenter=150), "WindowWidth", text))).astype(int)
        assert np.array_equal(found, grey(dicom(RAMP, WindowCenter=150, WindowWidth=number)))


def test_empty_tables_are_none():
    empty = Sequence([Dataset()])
    assert np.array_equal(grey(dicom(RAMP, VOILUTSequence=empty, ModalityLUTSequence=empty)), grey(dicom(RAMP)))


def lut(first, entries, depth):
    item = Dataset()
    item.LUTDescriptor = [len(entries), first, depth]
    item["LUTDescriptor"].VR = "US" if first >= 0 else "SS"
    item.LUTData = np.asarray(entries, np.uint8 if depth == 8 else np.uint16).tobytes()
    item["LUTData"].VR = "OW"
    return item


def test_a_table_maps_each_value_whatever_its_bits_and_sign():
    values = np.arange(-300, 340, 10, dtype=np.int16).reshape(8, 8)
    entries = np.arange(0, 256, dtype=np.uint16).repeat(3)[:640]
    place = (values.astype(int) + 300).clip(0, 639)
    expected = np.rint(255 * (entries[place] / 255)).astype(int)
    # 640 entries of 8 bits: more than 8 bits can count. The first value has a sign though it is written without.
    for first in (-300, 2**16 - 300):
        for sequence in ([lut(first, entries, 8)], [Dataset(), lut(first, entries, 8)]):
            assert np.array_equal(grey(dicom(values, VOILUTSequence=Sequence(sequence))), expected)
    unsigned = (values.astype(int) + 1024).astype(np.uint16)
    rescaled = {
        "RescaleSlope": 1,
        "RescaleIntercept": -1024,
        "VOILUTSequence": Sequence([lut(2**16 - 300, entries, 8)]),
    }
    assert np.array_equal(grey(dicom(unsigned, **rescaled)), expected)
    # Nor does it depend on whether this picture, of a file whose values may lie below zero, has such.
    bright = dicom(unsigned[4:], **rescaled)
    assert np.array_equal(grey(bright), expected[4:])
    # A modality table of 12 bits, then a window.
    table = Sequence([lut(0, np.arange(4095, -1, -1), 12)])
    found = grey(dicom(SMOOTH, ModalityLUTSequence=table, **TWELVE))
    assert np.array_equal(found, grey(dicom((4095 - SMOOTH).astype(np.uint16), **TWELVE)))
    short = lut(0, range(10), 12)
    short.LUTDescriptor = [11, 0, 12]
    with pytest.raises(UndecodableError, match="VOI LUT of 10 entries of 12 bits, and its descriptor"):
        grey(dicom(SMOOTH, VOILUTSequence=Sequence([short])))


@pytest.mark.parametrize("kind", [np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32])
def test_every_value_that_pixels_can_have_is_shown(kind):
    ends = np.iinfo(kind)
    for many in (False, True):  # few values are computed each, of many each but once
        values = np.array([[ends.min, ends.max], [0, 1]], dtype=kind)
        values = np.tile(values, (200, 200)) if many else values
        width = float(ends.max) - float(ends.min)
        fields = {"WindowCenter": (float(ends.max) + float(ends.min)) / 2, "WindowWidth": width}
        expected = np.rint(255 * ((values.astype(float) - ends.min) / width)).astype(int)
        found = grey(dicom(values, VOILUTFunction="LINEAR_EXACT", **fields))
        assert np.array_equal(found, expected)
        assert np.array_equal(grey(dicom(values)), expected)


def test_values_in_the_upper_bits_are_moved_down():
    window = TWELVE | {"HighBit": 15}
    assert np.array_equal(grey(dicom((SMOOTH << 4).astype(np.uint16), **window)), grey(dicom(SMOOTH, **TWELVE)))
    packed = dicom((SMOOTH << 4).astype(np.uint16), **window)
    packed.compress(uid.RLELossless)
    assert np.array_equal(grey(packed), grey(dicom(SMOOTH, **TWELVE)))
    for wrong in (3, 16):
        with pytest.raises(
            UndecodableError, match=rf"HighBit \(0028,0102\) is {wrong} and BitsStored .* 12; expected 11"
        ):
            grey(dicom(SMOOTH, **(TWELVE | {"HighBit": wrong})))


def coloured(entries=256, bits=16, **fields):
    """Grey values from 0 to 255, of which each colour is a multiple."""
    dataset = dicom(np.arange(256, dtype=np.uint8).reshape(16, 16), "PALETTE COLOR")
    for factor, colour in enumerate(("Red", "Green", "Blue"), start=1):
        name = f"{colour}PaletteColorLookupTable"
        setattr(dataset, f"{name}Descriptor", [entries % 2**16, 0, bits])
        dataset[f"{name}Descriptor"].VR = "US"
        values = (np.arange(256) * factor % 256).astype(np.uint8 if bits == 8 else "<u2")
        setattr(dataset, f"{name}Data", (values if bits == 8 else values * 257).tobytes())
        dataset[f"{name}Data"].VR = "OW"
    for name, value in fields.items():
        setattr(dataset, name, value)
    return dataset


def test_palettes_show_their_colours():
    expected = np.stack([np.arange(256).reshape(16, 16) * factor % 256 for factor in (1, 2, 3)], axis=-1)
    for bits in (8, 16):
        assert np.array_equal(np.asarray(decode(as_bytes(coloured(bits=bits)))), expected)
    # Colours for single values beside grey ones, as devices that overlay flow write them, are not followed; it is told.
    beside = coloured()
    beside.PhotometricInterpretation = "MONOCHROME2"
    assert decode_all_of([as_bytes(beside)])[0].notes == ("colours beside the grey values (0028,1101) passed over",)


@pytest.mark.parametrize("vr", ["US", "SS"])
def test_a_palette_of_values_with_a_sign_begins_where_it_says_however_that_is_written(vr):
    values = np.arange(-128, 128, dtype=np.int16).reshape(16, 16)
    dataset = coloured(PixelRepresentation=1, BitsAllocated=16, BitsStored=16, HighBit=15, PixelData=values.tobytes())
    for colour in ("Red", "Green", "Blue"):
        name = f"{colour}PaletteColorLookupTableDescriptor"
        dataset[name].VR = vr
        setattr(dataset, name, [256, 65408 if vr == "US" else -128, 16])
    assert np.array_equal(np.asarray(decode(as_bytes(dataset))), np.asarray(decode(as_bytes(coloured()))))


@pytest.mark.parametrize("entries", [255, 5, 1])
def test_a_palette_of_an_odd_number_of_bytes_is_padded(entries):
    dataset = coloured(entries=entries, bits=8)
    for factor, colour in enumerate(("Red", "Green", "Blue"), start=1):
        table = bytes(40 + index * factor % 200 for index in range(entries)) + b"\0"
        setattr(dataset, f"{colour}PaletteColorLookupTableData", table)
    index = np.arange(256).reshape(16, 16).clip(0, entries - 1)
    expected = np.stack([40 + index * factor % 200 for factor in (1, 2, 3)], axis=-1)
    assert np.array_equal(np.asarray(decode(as_bytes(dataset))), expected)


def test_each_colour_of_a_palette_begins_where_it_says():
    dataset = coloured(BluePaletteColorLookupTableDescriptor=[256, 100, 16])
    found = np.asarray(decode(as_bytes(dataset)))
    index = np.arange(256).reshape(16, 16)
    assert np.array_equal(found[..., 0], index)
    assert np.array_equal(found[..., 2], (index - 100).clip(0) * 3 % 256)


@pytest.mark.parametrize(
    ("dataset", "says"),
    [
        (
            dicom(RAMP, BitsStored=0),
            r"HighBit \(0028,0102\) is 15 and BitsStored \(0028,0101\) 0; expected at least one",
        ),
        (dicom(RAMP, RescaleSlope=[2, 3]), r"RescaleSlope \(0028,1053\) has 2 values; expected one"),
        (dicom(RAMP, "HSV"), r"PhotometricInterpretation \(0028,0004\) is HSV; expected one of MONOCHROME1, "),
        (
            dicom(np.zeros((4, 4, 3), np.uint16), "RGB"),
            r"colours of 16 bits \(BitsAllocated \(0028,0100\)\); expected 8",
        ),
        (
            coloured(entries=300),
            r"RedPaletteColorLookupTableData \(0028,1201\) has 512 bytes, for 300 entries of 16 bits",
        ),
        (coloured(GreenPaletteColorLookupTableData=None), r"GreenPaletteColor\w+ \(0028,1202\) has 0 bytes, for 256"),
        (
            coloured(BluePaletteColorLookupTableDescriptor=[256, 0]),
            r"\(0028,1103\) is \[256, 0\]; expected three numbers",
        ),
        (
            dicom(np.stack([RAMP] * 3), PerFrameFunctionalGroupsSequence=Sequence([Dataset()])),
            r"PerFrameFunctionalGroupsSequence \(5200,9230\) has 1 items, of 3 frames; expected one for each",
        ),
    ],
    ids=lambda value: value.split("(")[0] if isinstance(value, str) else "",
)
def test_a_header_that_leaves_open_what_is_shown_is_refused_with_the_tag(dataset, says):
    with pytest.raises(UndecodableError, match=says):
        decode(as_bytes(dataset))


def with_pixels(dataset, pixels, **fields):
    dataset.PixelData = pixels
    for name, value in fields.items():
        setattr(dataset, name, value)
    return dataset


@pytest.mark.parametrize(
    "dataset",
    [
        with_pixels(dicom(RAMP), 2 * RAMP.tobytes()),
        with_pixels(dicom(np.stack([RAMP] * 3)), 3 * RAMP.tobytes(), NumberOfFrames=2),
        with_pixels(dicom(RAMP), RAMP.tobytes(), BitsAllocated=8, BitsStored=8, HighBit=7, PixelRepresentation=0),
        with_pixels(dicom(RAMP), RAMP.tobytes(), Rows=4),
        with_pixels(dicom(RAMP), RAMP.tobytes(), Rows=RAMP.shape[0] - 1),
        with_pixels(dicom(RAMP), RAMP.tobytes(), Columns=RAMP.shape[1] - 1),
        with_pixels(dicom(np.zeros((4, 4), np.uint8)), bytes(48)),
    ],
    ids=["frames not counted", "a frame too few", "half the bits", "half the rows", "a row", "a column", "colours"],
)
def test_more_pixels_than_the_header_counts_are_refused_as_nothing_says_whose_they_are(dataset):
    with pytest.raises(UndecodableError, match=r"PixelData \(7FE0,0010\) has \d+ bytes, and its header accounts for"):
        decode(as_bytes(dataset))


def test_pixels_that_are_written_as_numbers_are_refused():
    content = as_bytes(dicom(np.zeros((1, 2), np.uint8)))
    place = content.index(b"\xe0\x7f\x10\0O")
    numbers = content[: place + 4] + b"US\2\0\7\0"
    with pytest.raises(UndecodableError, match=r"PixelData \(7FE0,0010\) is written as US; expected OB or OW"):
        decode(numbers)


def test_a_few_bytes_behind_the_pixels_do_no_harm():
    odd = np.zeros((3, 3), np.uint8)
    for extra in (b"", b"\0", b"\0" * 6, b"\1"):
        assert grey(with_pixels(dicom(odd), odd.tobytes() + extra)).shape == (3, 3)
    one = dicom(np.zeros((1, 1), np.uint8))
    assert grey(with_pixels(one, b"\7\0")).shape == (1, 1)  # the padding of one byte is as long as the picture
    bits = with_pixels(dicom(np.zeros((4, 8), np.uint8)), bytes([1, 2, 4, 8]), BitsAllocated=1, BitsStored=1, HighBit=0)
    assert np.array_equal(grey(bits), 255 * np.eye(4, 8, dtype=int))


def test_samples_that_do_not_fit_the_colours_are_refused():
    for dataset, says in (
        (dicom(np.zeros((4, 4), np.uint8), "RGB", SamplesPerPixel=1), "is 1, of RGB; expected 3"),
        (dicom(np.zeros((4, 4, 3), np.uint8), "RGB", PhotometricInterpretation="MONOCHROME2"), "is 3, of MONOCHROME2"),
    ):
        with pytest.raises(UndecodableError, match=rf"SamplesPerPixel \(0028,0002\) {says}"):
            decode(as_bytes(dataset))


def test_colours_of_fewer_bits_than_eight_go_from_black_to_white():
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3) % 32
    shown = np.asarray(decode(as_bytes(dicom(pixels, "RGB", BitsStored=5, HighBit=4)))).astype(float)
    assert np.abs(shown - pixels * (255 / 31)).max() <= 0.5


def test_pixels_that_are_not_square_are_shown_as_stored_and_told():
    def notes(**fields):
        return decode_all_of([as_bytes(dicom(RAMP, WindowCenter=1, WindowWidth=9, **fields))])[0].notes

    measures = Dataset()
    measures.PixelSpacing = [1, 2]
    shared = Dataset()
    shared.PixelMeasuresSequence = Sequence([measures])
    for fields in ({"PixelSpacing": [0.5, 1]}, {"PixelAspectRatio": [2, 1]}, {"ImagerPixelSpacing": [0.1, 0.2]}):
        assert notes(**fields) == ("pixels that are not square, shown as they are stored",)
    assert len(notes(SharedFunctionalGroupsSequence=Sequence([shared]))) == 1
    for fields in ({}, {"PixelSpacing": [0.5, 0.5]}, {"PixelSpacing": [0.5, 0.501], "PixelAspectRatio": [2, 1]}):
        assert notes(**fields) == ()
    flat = nifti(affine=np.diag([1.0, 1.0, 5.0, 1.0]), qform_code=1)
    assert see(open_file(flat), Place(None, "axial"), Rules()).facts.notes == ()
    assert len(see(open_file(flat), Place(None, "coronal"), Rules()).facts.notes) == 1


def test_a_table_whose_descriptor_is_none_is_refused_with_the_tag():
    item = lut(0, range(256), 16)
    item.LUTDescriptor = [256, 0]
    with pytest.raises(UndecodableError, match=r"VOI LUT's descriptor \(0028,3002\) is \[256, 0\]; expected three"):
        grey(dicom(RAMP, VOILUTSequence=Sequence([item])))


@pytest.mark.parametrize(
    ("syntax", "encode"),
    [
        (uid.JPEGBaseline8Bit, imagecodecs.jpeg8_encode),
        (uid.JPEGLSLossless, imagecodecs.jpegls_encode),
        (uid.JPEG2000Lossless, lambda pixels: imagecodecs.jpeg2k_encode(pixels, codecformat="j2k", reversible=True)),
        (uid.RLELossless, None),
    ],
)
@pytest.mark.parametrize("offsets", [True, False])
def test_more_compressed_frames_than_the_header_counts_are_refused(syntax, encode, offsets):
    frames = np.stack([np.full((32, 32), value, np.uint8) for value in (30, 120, 220)])
    several = dicom(frames, WindowCenter=128, WindowWidth=256)
    if encode is None:
        several.compress(syntax)
    else:
        several.file_meta.TransferSyntaxUID = syntax
        several.PixelData = encapsulate([encode(frame) for frame in frames], has_bot=offsets)
        several["PixelData"].is_undefined_length = True
    assert abs(int(grey(several)[0, 0]) - 120) <= 2
    for count in (None, 0, 2):
        several.NumberOfFrames = count
        with pytest.raises(UndecodableError, match=r"holds 3 frames, and NumberOfFrames \(0028,0008\) counts [12];"):
            grey(several)


def test_one_compressed_frame_may_be_in_several_fragments():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)
    whole = encapsulated(noise, uid.JPEGBaseline8Bit, imagecodecs.jpeg8_encode(noise))
    parts = encapsulated(noise, uid.JPEGBaseline8Bit, imagecodecs.jpeg8_encode(noise))
    parts.PixelData = encapsulate([imagecodecs.jpeg8_encode(noise)], fragments_per_frame=3)
    assert np.array_equal(grey(whole), grey(parts))


@pytest.mark.parametrize("wrong", ["zeros", "without headers", "from the table", "too few", "in another order"])
@pytest.mark.parametrize("syntax", [uid.JPEGBaseline8Bit, uid.RLELossless])
def test_a_table_of_offsets_that_leads_to_no_frame_is_passed_over_where_each_is_one_fragment(wrong, syntax):
    frames = np.stack([np.random.default_rng(seed).integers(0, 256, (16, 16), np.uint8) for seed in range(3)])
    dataset = dicom(frames)
    if syntax == uid.RLELossless:
        dataset.compress(syntax)
    else:
        dataset.file_meta.TransferSyntaxUID = syntax
        dataset.PixelData = encapsulate([imagecodecs.jpeg8_encode(frame, level=97) for frame in frames])
        dataset["PixelData"].is_undefined_length = True
    right = struct.unpack("<3I", dataset.PixelData[8:20])
    expected = [grey(dataset, frame) for frame in range(3)]
    table = {
        "zeros": [0] * 3,
        "without headers": [offset - 8 * place for place, offset in enumerate(right)],
        "from the table": [offset + 20 for offset in right],
        "too few": right[:1],
        "in another order": [right[1], right[0], right[2]],
    }[wrong]
    rest = dataset.PixelData[20:]
    dataset.PixelData = b"\xfe\xff\0\xe0" + struct.pack(f"<{1 + len(table)}I", 4 * len(table), *table) + rest
    basic = as_bytes(dataset)
    dataset.ExtendedOffsetTable = struct.pack(f"<{len(table)}Q", *table)
    dataset.ExtendedOffsetTableLengths = struct.pack("<3Q", *[len(rest) // 4] * 3)
    for content in (basic, as_bytes(dataset)):
        assert all(np.array_equal(np.asarray(decode(content, frame)), expected[frame]) for frame in range(3))


def test_frames_of_single_bits_begin_within_a_byte():
    bits = np.random.default_rng(1).integers(0, 2, (3, 5, 7), dtype=np.uint8)
    bits[:, 0, :2] = (0, 1)
    packed = np.packbits(bits, axis=None, bitorder="little").tobytes()
    dataset = dicom(bits, BitsAllocated=1, BitsStored=1, HighBit=0, PixelData=packed)
    for frame in range(3):
        assert np.array_equal(grey(dataset, frame), 255 * bits[frame].astype(int))
    dataset.PixelData = packed[:-2]
    with pytest.raises(UndecodableError, match="pixels cannot be decoded"):
        grey(dataset, 2)


@pytest.mark.parametrize("extended", [True, False])
def test_stored_signs_of_jpeg_ls_are_extended_where_the_codestream_has_more_bits(extended):
    values = np.linspace(-1000, 1500, 64 * 64).astype(np.int16).reshape(64, 64)
    says = {"BitsStored": 12, "HighBit": 11, "WindowCenter": 200, "WindowWidth": 2600}
    stored = values.view(np.uint16) if extended else values.view(np.uint16) & 0xFFF
    stored[0, 0] |= 0xF000  # by which the encoder takes sixteen bits
    stream = imagecodecs.jpegls_encode(stored)
    assert stream[stream.find(b"\xff\xf7") + 4] == 16
    assert np.array_equal(grey(encapsulated(values, uid.JPEGLSLossless, stream, **says)), grey(dicom(values, **says)))


def test_jpeg_2000_pictures_of_few_bits_are_refused():
    few = imagecodecs.jpeg2k_encode(np.full((8, 8), 15, np.uint8), codecformat="jp2", bitspersample=4)
    with pytest.raises(UndecodableError, match="a JPEG 2000 file of 4 bits a channel; expected 8"):
        decode(few)


def test_a_kind_of_colours_in_small_letters_is_meant_as_in_capitals():
    assert np.array_equal(grey(dicom(RAMP, "monochrome1")), grey(dicom(RAMP, "MONOCHROME1")))


def test_a_transfer_syntax_that_is_not_read_is_told_with_its_name():
    native = as_bytes(dicom(RAMP)).replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.113619.5.2\0\0")
    with pytest.raises(UndecodableError, match=r"\(0002,0010\) 1.2.840.113619.5.2 .* not read; .* secfacmic doctor"):
        decode(native)
    young = as_bytes(dicom(RAMP)).replace(b"UI\x14\x001.2.840.10008.1.2.1\0", b"UI\x18\x001.2.840.10008.1.2.4.110\0")
    with pytest.raises(UndecodableError, match=r"\(JPEG XL Lossless\) is not read"):
        decode(young)
    several = encapsulated(SMOOTH, uid.UID("1.2.840.10008.1.2.4.92"), j2k(SMOOTH), **TWELVE)
    with pytest.raises(UndecodableError, match=r"\(JPEG 2000 Part 2 .*\) is not read; .* export the file uncompressed"):
        decode(as_bytes(several))


def test_what_a_header_says_and_cannot_be_followed_is_told():
    tables = dicom(RAMP, PresentationLUTSequence=Sequence([Dataset()]))
    nowhere = raw(dicom(RAMP, WindowWidth="400"), "WindowCenter", b"nan ")
    assert [found.notes for found in decode_all_of([as_bytes(tables), nowhere])] == [
        ("a presentation table (2050,0010) passed over",),
        ("window of centre nan (0028,1050) passed over; expected a number and a width above 0",),
    ]


def test_what_the_maker_has_not_yet_processed_for_the_eye_is_told():
    raw = dicom(RAMP, PresentationIntentType="FOR PROCESSING")
    assert see(open_file(as_bytes(raw)), Place(), Rules()).facts.notes == (
        "values as they were measured, not yet processed for the eye (PresentationIntentType (0008,0068))",
    )
    shown = dicom(RAMP, PresentationIntentType="FOR PRESENTATION")
    assert see(open_file(as_bytes(shown)), Place(), Rules()).facts.notes == ()


def test_a_mosaic_of_slices_is_told():
    mosaic = dicom(RAMP, ImageType=["ORIGINAL", "PRIMARY", "M", "ND", "MOSAIC"])
    (notes,) = (see(open_file(as_bytes(mosaic)), Place(), Rules()).facts.notes,)
    assert notes == ("a mosaic of many slices (ImageType (0008,0008)), shown as it is stored",)


def test_an_element_of_no_known_kind_is_told_in_one_sentence():
    content = as_bytes(dicom(RAMP))
    place = content.index(b"\xe0\x7f\x10\0OW")
    broken = content[: place + 4] + b"OS" + content[place + 6 :]
    with pytest.raises(UndecodableError, match=r"broken DICOM .*7FE0,0010.*; export it again"):
        decode(broken)


def test_a_device_that_counts_no_frames_means_one():
    assert np.array_equal(grey(dicom(RAMP, NumberOfFrames=0)), grey(dicom(RAMP)))


def test_large_pictures_are_computed_in_parts_that_show_no_seam(monkeypatch):
    from secure_fed.clients import dicom_display as reader
    from secure_fed.clients import photographs

    padded = SMOOTH.copy()
    padded[:9] = 7
    clear = Image.merge("LA", [Image.fromarray((SMOOTH >> 4).astype(np.uint8)).convert("L")] * 2)
    contents = [as_bytes(dicom(padded, PixelPaddingValue=7)), as_bytes(dicom(SMOOTH, **TWELVE)), palette("<")]
    contents.append(saved(clear, "PNG"))
    whole = [np.asarray(decode(content)) for content in contents]
    monkeypatch.setattr(reader, "_BLOCK", 130)
    monkeypatch.setattr(photographs, "_BLOCK", 130)
    for content, expected in zip(contents, whole, strict=True):
        assert np.array_equal(np.asarray(decode(content)), expected)


def test_a_codestream_of_another_size_is_refused_before_it_is_unpacked():
    for syntax, stream in (
        (uid.JPEGBaseline8Bit, imagecodecs.jpeg8_encode(np.zeros((64, 64), np.uint8))),
        (uid.JPEGLosslessSV1, imagecodecs.ljpeg_encode(np.zeros((64, 64), np.uint8))),
        (uid.JPEGLSLossless, imagecodecs.jpegls_encode(np.zeros((64, 64), np.uint8))),
        (uid.JPEG2000Lossless, imagecodecs.jpeg2k_encode(np.zeros((64, 64), np.uint8), codecformat="j2k")),
        (uid.HTJ2KLossless, imagecodecs.htj2k_encode(np.zeros((64, 64), np.uint8))),
    ):
        with pytest.raises(
            UndecodableError, match="codestream is of 64 x 64 pixels with 1 samples each, and whose header"
        ):
            decode(as_bytes(encapsulated(np.zeros((8, 8), np.uint8), syntax, stream)))


def deflated(extra=b""):
    dataset = dicom(RAMP, WindowCenter=150, WindowWidth=400, PatientID="D-1")
    dataset.file_meta.TransferSyntaxUID = uid.DeflatedExplicitVRLittleEndian
    content = as_bytes(dataset)
    start = 144 + struct.unpack("<I", content[140:144])[0]
    engine = zlib.compressobj(wbits=-15)
    data = zlib.decompress(content[start:], wbits=-15) + extra
    return content[:start] + engine.compress(data) + engine.flush()


def test_a_deflated_file_is_read_unless_it_becomes_too_large(tmp_path, monkeypatch):
    from secure_fed.clients import dicom_header as reader

    expected = grey(dicom(RAMP, WindowCenter=150, WindowWidth=400))
    assert np.array_equal(np.asarray(decode(deflated())).astype(int), expected)
    (tmp_path / "a.dcm").write_bytes(deflated())
    assert reader.patient_id(tmp_path / "a.dcm") == "D-1"
    monkeypatch.setattr(reader, "_MOST_BYTES", 2**16)
    (tmp_path / "a.dcm").write_bytes(deflated(bytes(2**17)))
    assert reader.patient_id(tmp_path / "a.dcm") == ""
    with pytest.raises(UndecodableError, match="deflated DICOM file of more than 65,536 bytes"):
        decode(deflated(bytes(2**17)))


def test_padding_has_no_part_in_the_least_and_greatest_value():
    padded = RAMP.copy()
    padded[0] = -2000
    found = grey(dicom(padded, PixelPaddingValue=-2000))
    assert not found[0].any()
    assert np.array_equal(found[1:], grey(dicom(RAMP[1:])))
    high = RAMP.copy()
    high[0, :4], high[0, 4:] = 30000, 30005
    found = grey(dicom(high, PixelPaddingValue=30000, PixelPaddingRangeLimit=30005))
    assert not found[0].any()
    assert np.array_equal(found[1:], grey(dicom(RAMP[1:])))


def test_the_presentation_shape_says_whether_grey_is_inverted():
    window = {"WindowCenter": 150, "WindowWidth": 400}
    plain = grey(dicom(RAMP, **window))
    for colour, shape, inverted in (
        ("MONOCHROME2", "INVERSE", True),
        ("MONOCHROME1", "INVERSE", True),  # once, not twice
        ("MONOCHROME2", "IDENTITY", False),
        ("MONOCHROME1", "IDENTITY", False),
    ):
        found = grey(dicom(RAMP, colour, PresentationLUTShape=shape, **window))
        assert np.array_equal(found, 255 - plain if inverted else plain), (colour, shape)


def test_of_jpeg_2000_the_codestream_says_whether_there_is_a_sign():
    signed = (RAMP // 4).astype(np.int16)
    stream = imagecodecs.jpeg2k_encode(signed, codecformat="j2k", bitspersample=16)
    window = {"WindowCenter": 40, "WindowWidth": 500}
    expected = grey(dicom(signed, **window))
    contradicted = encapsulated(signed, uid.JPEG2000Lossless, stream, PixelRepresentation=0, **window)
    assert np.array_equal(grey(contradicted), expected)


def wavelets(values, bits, signed=False, **options):
    """JPEG 2000 of one sample, of so many bits each."""
    height, width = values.shape
    kind = "<i2" if signed else "<u2"
    return encode_buffer(values.astype(kind).tobytes(), width, height, 1, bits, signed, use_mct=False, **options)


@pytest.mark.parametrize(
    "name",
    [
        *("J2K_pixelrep_mismatch", "693_J2KI", "JPEG2000", "MR_small_jp2klossless", "MR_small_jpeg_ls_lossless"),
        *("JPEGLSNearLossless_08", "JPEGLSNearLossless_16"),
    ],
)
def test_files_that_pydicom_brings_are_shown_by_the_values_that_it_computes(name):
    """The first, of a computed tomograph, has a sign that its codestream does not know."""
    path = Path(pydicom.__file__).parent / "data" / "test_files" / f"{name}.dcm"
    dataset = pydicom.dcmread(path)
    values = apply_modality_lut(dataset.pixel_array, dataset).astype(float)
    least, width = values.min(), np.ptp(values)
    if "WindowWidth" in dataset:
        width, centre = (np.ravel(dataset[name].value)[0] - 1 for name in ("WindowWidth", "WindowCenter"))
        least = centre + 0.5 - width / 2
    expected = 255 * ((values - least) / width).clip(0, 1)
    assert np.abs(np.asarray(decode(path.read_bytes())).astype(int) - expected).max() <= 1


@pytest.mark.parametrize(("bits", "coded"), [(13, 13), (12, 13), (12, 16), (16, 16)])
@pytest.mark.parametrize("extended", [True, False])
def test_a_sign_that_an_encoder_of_jpeg_2000_did_not_know_stands_in_the_highest_bit(bits, coded, extended):
    """As archives wrote it that encoded whatever has a sign as if it had none, and as viewers show it."""
    values = np.linspace(-2000, 1732, 64 * 64).astype(np.int16).reshape(64, 64)
    says = {"BitsStored": bits, "HighBit": bits - 1, "WindowCenter": 0, "WindowWidth": 4096}
    stream = wavelets(values.view(np.uint16) & (2 ** (coded if extended else bits) - 1), coded)
    assert stream[stream.find(b"\xff\x4f\xff\x51") + 42] == coded - 1  # no sign
    found = grey(encapsulated(values, uid.JPEG2000Lossless, stream, **says))
    assert np.array_equal(found, grey(dicom(values, **says)))
    if coded == bits:  # what was near 0 or -1, which are far apart for such an encoder, became something between
        lossy = wavelets(values.view(np.uint16) & (2**bits - 1), coded, compression_ratios=[4])
        with pytest.raises(UndecodableError, match=r"header says that there is one \(PixelRepresentation \(0028,0103"):
            grey(encapsulated(values, uid.JPEG2000, lossy, **says))
        plain = abs(values // 2)
        lossy = wavelets(plain, coded, compression_ratios=[4])
        found = grey(encapsulated(values, uid.JPEG2000, lossy, **says))
        assert np.abs(found - grey(dicom(plain, **says))).max() <= 2


@pytest.mark.parametrize("syntax", [uid.JPEG2000Lossless, uid.HTJ2KLossless])
def test_of_jpeg_2000_the_codestream_says_whether_colours_were_transformed(syntax):
    small = np.random.default_rng(3).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    colours = np.asarray(Image.fromarray(small).resize((32, 32)))
    encode, back = imagecodecs.jpeg2k_encode, imagecodecs.jpeg2k_decode
    if syntax == uid.HTJ2KLossless:
        encode, back = imagecodecs.htj2k_encode, imagecodecs.htj2k_decode
    options = {"codecformat": "j2k"} if syntax == uid.JPEG2000Lossless else {}
    transformed = encode(colours, reversible=True, **({"mct": True} if options else {"rgb": True}), **options)
    assert np.array_equal(back(transformed), colours)  # by which another decoder undoes it too
    for header in ("YBR_FULL", "YBR_FULL_422", "YBR_RCT", "RGB"):
        dataset = encapsulated(colours, syntax, transformed, "RGB")
        dataset.PhotometricInterpretation = header
        assert np.array_equal(np.asarray(decode(as_bytes(dataset))), colours), header
    if options:  # as they are, they are luminance and colour differences
        as_they_are = encode(
            np.asarray(Image.fromarray(colours).convert("YCbCr")), reversible=True, mct=False, **options
        )
        dataset = encapsulated(colours, syntax, as_they_are, "RGB")
        dataset.PhotometricInterpretation = "YBR_FULL"
        assert np.abs(np.asarray(decode(as_bytes(dataset))).astype(int) - colours).max() <= 3  # rounded twice


def palette(order):
    dataset = dicom(np.arange(4, dtype=np.uint8).reshape(2, 2), "PALETTE COLOR")
    for place, name in enumerate(("Red", "Green", "Blue")):
        setattr(dataset, f"{name}PaletteColorLookupTableDescriptor", [4, 0, 16])
        table = (np.array([0, 80, 160, 240]) // (place + 1) * 257).astype(f"{order}u2")
        setattr(dataset, f"{name}PaletteColorLookupTableData", table.tobytes())
        dataset[f"{name}PaletteColorLookupTableDescriptor"].VR = "US"
    if order == "<":
        return as_bytes(dataset)
    stream = io.BytesIO()
    dataset.file_meta.TransferSyntaxUID = uid.ExplicitVRBigEndian
    pydicom.dcmwrite(stream, dataset, enforce_file_format=True, little_endian=False, implicit_vr=False)
    return stream.getvalue()


def test_big_endian_palettes_show_the_same_colours():
    pictures = [np.asarray(decode(palette(order))).tolist() for order in "<>"]
    assert pictures[0] == pictures[1]
    assert pictures[0][1][1] == [240, 120, 80]


@pytest.mark.parametrize("implicit", [True, False])
def test_a_file_without_preamble_is_read(implicit, tmp_path):
    dataset = dicom(RAMP, WindowCenter=150, WindowWidth=400)
    expected = grey(dataset)
    del dataset.file_meta
    stream = io.BytesIO()
    dataset.save_as(stream, implicit_vr=implicit, little_endian=True)
    assert np.array_equal(np.asarray(decode(stream.getvalue())).astype(int), expected)
    (tmp_path / "IM0001").write_bytes(stream.getvalue())
    assert is_meant_as_image(tmp_path / "IM0001")


def test_files_without_preamble_are_known_by_their_first_element():
    expected = grey(dicom(RAMP, WindowCenter=150, WindowWidth=400))

    def bare(dataset, **options):
        del dataset.file_meta
        stream = io.BytesIO()
        dataset.save_as(stream, **({"implicit_vr": True, "little_endian": True} | options))
        return stream.getvalue()

    def made(**fields):
        return dicom(RAMP, WindowCenter=150, WindowWidth=400, **fields)

    late = made()
    for keyword in ("SOPClassUID", "SOPInstanceUID", "Modality"):  # then the patient comes first
        delattr(late, keyword)
    big = made()
    big.PixelData = RAMP.astype(">i2").tobytes()
    # A number of 64 bits, with which many binary files begin, is no element.
    assert not any(is_dicom(struct.pack("<Q", number) + bytes(200)) for number in (2, 8, 16))
    for content in (
        bare(made(SpecificCharacterSet="")),
        bare(late),
        bare(big, implicit_vr=False, little_endian=False),
        as_bytes(made())[132:],
        bytes(128) + b"DICM" + bare(made(), implicit_vr=False),
    ):
        assert np.array_equal(np.asarray(decode(content)).astype(int), expected)


@pytest.mark.parametrize(
    ("sop", "modality", "what"),
    [
        ("1.2.840.10008.5.1.4.1.1.66.4", "SEG", "a segmentation"),
        ("1.2.840.10008.5.1.4.1.1.66.7", "SEG", "a segmentation"),
        ("1.2.840.10008.5.1.4.1.1.66.99", "", "a segmentation or other computed object"),
        ("1.2.840.10008.5.1.4.1.1.481.2", "RTDOSE", "a dose"),
        ("1.2.840.10008.5.1.4.1.1.88.22", "SR", "a structured report"),
        ("1.2.840.10008.5.1.4.1.1.104.1", "DOC", "a document"),
        ("", "SEG", "a segmentation"),
        ("1.2.840.10008.5.1.4.39.1", "", "a Color Palette object"),
        ("1.2.840.10008.5.1.4.1.1.78.1", "LEN", "a Lensometry Measurements object"),
        ("1.2.3.4", "RTRECORD", "a record of treatment"),
    ],
)
def test_what_is_no_picture_of_a_patient_is_refused_by_its_class(sop, modality, what):
    with pytest.raises(UndecodableError, match=f"DICOM that holds {what}"):
        grey(dicom(np.eye(8, dtype=np.uint8), SOPClassUID=sop, Modality=modality))


def test_a_directory_of_a_cd_is_no_picture():
    dataset = dicom(np.eye(8, dtype=np.uint8))
    dataset.file_meta.MediaStorageSOPClassUID = uid.MediaStorageDirectoryStorage
    del dataset.SOPClassUID
    stream = io.BytesIO()
    pydicom.dcmwrite(stream, dataset)
    with pytest.raises(UndecodableError, match="DICOM that holds a directory of other files"):
        decode(stream.getvalue())


def test_every_class_of_pictures_is_a_picture():
    from pydicom.uid import UID_dictionary

    from secure_fed.clients.dicom_header import no_picture

    for sop, (name, kind, *_) in UID_dictionary.items():
        if kind == "SOP Class" and "Image Storage" in name:
            dataset = Dataset()
            dataset.SOPClassUID = sop
            assert not no_picture(dataset), name


def test_scouts_and_screenshots_are_known():
    for name in ("SeriesDescription", "ProtocolName"):
        assert decode_all_of([as_bytes(dicom(RAMP, **{name: "AAHead_Scout_32ch"}))])[0].kind == "scout"
    assert decode_all_of([as_bytes(dicom(RAMP, ConversionType="WSD"))])[0].kind == "screenshot"
    for modality, name, kind in (
        *(("MR", "3-Plane Loc SSFSE", "scout"), ("CT", "\u00dcbersicht", "scout"), ("MR", "Survey", "scout")),
        *(("DX", "Bone survey", ""), ("MR", "local block", "")),
        *(("MR", name, "scout") for name in ("Survey_32ch", "T2W_LOC", "Loc_3plane", "3PLANELOC", "Lokalizer")),
        *(("MR", name, "scout") for name in ("localizador", "Rep\u00e9rage", "Repe\u0301rage")),
        *(("CT", "Scano", "scout"), ("MR", "T2_velocity_3", "")),
    ):
        about = {"SpecificCharacterSet": "ISO_IR 192", "Modality": modality, "SeriesDescription": name}
        assert decode_all_of([as_bytes(dicom(RAMP, **about))])[0].kind == kind, name
    scout = dicom(RAMP, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    capture = dicom(RAMP, SOPClassUID="1.2.840.10008.5.1.4.1.1.7.2")
    burned = dicom(RAMP, BurnedInAnnotation="YES", Manufacturer="ACME", ManufacturerModelName="Seer 3")
    plain = dicom(RAMP, ImageType=["ORIGINAL", "PRIMARY"], BurnedInAnnotation="NO")
    found = decode_all_of([as_bytes(one) for one in (scout, capture, burned, plain)])
    assert [one.kind for one in found] == ["scout", "screenshot", "screenshot", ""]
    assert found[2].scanner == "ACME Seer 3"
    assert {one.modality for one in found} == {"MR"}


@pytest.mark.parametrize("syntax", [uid.JPEGBaseline8Bit, uid.JPEGLosslessSV1, uid.JPEG2000Lossless, uid.HTJ2KLossless])
def test_compressed_colours_are_pixels_whatever_the_header_says_of_planes(syntax):
    small = np.random.default_rng(3).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    colours = np.asarray(Image.fromarray(small).resize((48, 32)))
    stream = {
        uid.JPEGBaseline8Bit: lambda: imagecodecs.jpeg8_encode(colours, level=98, subsampling="444"),
        uid.JPEGLosslessSV1: lambda: imagecodecs.jpeg8_encode(
            colours, lossless=True, colorspace="RGB", outcolorspace="RGB"
        ),
        uid.JPEG2000Lossless: lambda: imagecodecs.jpeg2k_encode(colours, codecformat="j2k", mct=False),
        uid.HTJ2KLossless: lambda: imagecodecs.htj2k_encode(colours, reversible=True),
    }[syntax]()
    for planes in (0, 1, None):
        found = decode(as_bytes(encapsulated(colours, syntax, stream, "RGB", PlanarConfiguration=planes)))
        assert np.abs(np.asarray(found).astype(int) - colours).max() <= (9 if syntax == uid.JPEGBaseline8Bit else 0)


@pytest.mark.parametrize("syntax", [uid.JPEG2000Lossless, uid.HTJ2KLossless])
def test_what_stands_above_the_stored_bits_is_not_shown(syntax):
    def encode(values):
        if syntax == uid.HTJ2KLossless:
            return imagecodecs.htj2k_encode(values, reversible=True)
        return imagecodecs.jpeg2k_encode(values, codecformat="j2k", reversible=True)

    expected = grey(dicom(SMOOTH, **TWELVE))
    for above in (0, 0x8000, 0xF000):
        found = grey(encapsulated(SMOOTH, syntax, encode(SMOOTH | np.uint16(above)), **TWELVE))
        assert np.array_equal(found, expected), above


@pytest.mark.parametrize("syntax", [uid.JPEG2000, uid.HTJ2K])
def test_what_stands_above_the_stored_bits_is_refused_where_compression_is_lossy(syntax):
    for level, above in ((0, 0), (95, 0), (95, 0x8000), (95, 0x2000)):
        high = SMOOTH | np.uint16(above)
        if syntax == uid.HTJ2K:
            stream = imagecodecs.htj2k_encode(high, reversible=True)
        else:
            stream = imagecodecs.jpeg2k_encode(high, codecformat="j2k", level=level, reversible=not level)
        dataset = encapsulated(SMOOTH, syntax, stream, **TWELVE)
        if above:
            with pytest.raises(UndecodableError, match=r"lossy compression and 12 bits \(BitsStored \(0028,0101\)\)"):
                grey(dataset)
        else:
            assert np.abs(grey(dataset) - grey(dicom(SMOOTH, **TWELVE))).max() <= 1


def test_overlays_that_the_header_names_are_taken_off_values_of_whatever_bits_and_others_refused():
    """A codestream of 13 to 15 bits may also be right, and the header's 12 wrong."""
    plane = np.indices(SMOOTH.shape).sum(axis=0) % 7 == 0
    for signed, coded, place in itertools.product((False, True), (13, 14, 15), (12, 13, 14)):
        if place >= coded:
            continue
        values = SMOOTH.astype(np.int16) - 1000 if signed else SMOOTH
        high = (values.view(np.uint16) & 0xFFF) | (plane * 2**place).astype(np.uint16)
        says = TWELVE | {"WindowCenter": 500, "WindowWidth": 4000}
        for with_sign in {False, signed}:
            whole = (high << (16 - coded)).astype(np.uint16).view(np.int16) >> (16 - coded) if with_sign else high
            dataset = encapsulated(values, uid.JPEG2000Lossless, wavelets(whole, coded, with_sign), **says)
            with pytest.raises(UndecodableError, match=r"of 1[345] bits, and whose header says 12 \(BitsStored"):
                grey(dataset)
            dataset.add_new(0x60020102, "US", place)
            assert np.array_equal(grey(dataset), grey(dicom(values, **says))), (signed, coded, place, with_sign)
            dataset[0x60020102].value = place ^ 1 if 12 <= place ^ 1 < coded else 0
            with pytest.raises(UndecodableError, match="no overlay in the others"):
                grey(dataset)
        lossy = encapsulated(values, uid.JPEG2000, wavelets(high, coded, compression_ratios=[2]), **says)
        with pytest.raises(UndecodableError, match="lossy"):
            grey(lossy)


@pytest.mark.parametrize("near", [1, 3, 20])
def test_near_lossless_jpeg_never_turns_white_into_black(near):
    ramp = np.linspace(0, 4095, 64 * 64).astype(np.uint16).reshape(64, 64)
    ramp[32:] = 4095 - np.random.default_rng(1).integers(0, 4 * near, (32, 64))
    says = {"BitsStored": 12, "HighBit": 11, "WindowCenter": 2048, "WindowWidth": 4096}
    # An encoder that was not told of twelve bits takes sixteen, and what it may change a value by leads beyond them.
    stream = bytes(imagecodecs.jpegls_encode(ramp, level=near))
    assert stream[stream.find(b"\xff\xf7") + 4] == 16
    assert imagecodecs.jpegls_decode(stream).max() > 4095
    found = grey(encapsulated(ramp, uid.JPEGLSNearLossless, stream, **says))
    assert np.abs(found - grey(dicom(ramp, **says))).max() <= 2
    with pytest.raises(
        UndecodableError, match=r"values from \d+ to \d+, of lossy compression and 12 bits \(BitsStored"
    ):
        grey(encapsulated(ramp, uid.JPEGLSNearLossless, imagecodecs.jpegls_encode(ramp | 0x2000, level=near), **says))


@pytest.mark.parametrize("near", [1, 3, 20])
@pytest.mark.parametrize("bits", [12, 16])
def test_near_lossless_jpeg_of_values_with_a_sign_is_shown_where_none_may_have_become_its_opposite(bits, near):
    most = 2 ** (bits - 1) - 1
    says = {"BitsStored": bits, "HighBit": bits - 1, "WindowCenter": 0, "WindowWidth": 2**bits}
    for end in (most, most - 2 * near):
        values = np.linspace(-end, end, 64 * 64).astype(np.int16).reshape(64, 64)
        values[32:48] = end - np.random.default_rng(1).integers(0, 4 * near, (16, 64))
        for stored in {16, bits}:
            # With the sign in all of the word it has no opposite there, unless the word is the value.
            pattern = values.view(np.uint16) & np.uint16(2**stored - 1)
            dataset = encapsulated(
                values, uid.JPEGLSNearLossless, imagecodecs.jpegls_encode(pattern, level=near), **says
            )
            if end == most and stored == bits:
                with pytest.raises(UndecodableError, match=f"may have changed each value by {near}, .* lossless"):
                    grey(dataset)
            else:
                assert np.abs(grey(dataset) - grey(dicom(values, **says))).max() <= 2


CT = Rules(windows=(Window(modality="CT", centre=40, width=80, unit="HU"),))


def test_the_studys_window_holds_for_its_modality_whatever_the_file_says():
    rescale = {"RescaleSlope": 1, "RescaleIntercept": -1024}
    stored = np.array([[1024, 1044], [1064, 1104]], dtype=np.uint16)
    for own in ({}, {"WindowCenter": 3, "WindowWidth": 9}):
        content = as_bytes(dicom(stored, Modality="CT", **rescale, **own))
        assert np.asarray(decode(content, rules=CT)).tolist() == [[0, 64], [128, 255]]
    other = as_bytes(dicom(stored, Modality="MR", **rescale))
    assert np.array_equal(np.asarray(decode(other, rules=CT)), np.asarray(decode(other)))
    with pytest.raises(UndecodableError, match=r"window for CT is in HU, but the file has no RescaleSlope"):
        decode(as_bytes(dicom(stored, Modality="CT")), rules=CT)
    for intercept in ({}, {"RescaleIntercept": None}):
        with pytest.raises(UndecodableError, match=r"in HU, but the file has no RescaleIntercept \(0028,1052\)"):
            decode(as_bytes(dicom(stored, Modality="CT", RescaleSlope=1, **intercept)), rules=CT)
    with pytest.raises(UndecodableError, match=r"RescaleType \(0028,1054\) 'OD'"):
        decode(as_bytes(dicom(stored, Modality="CT", RescaleType="OD", **rescale)), rules=CT)
    assert CT.digest != Rules().digest


def test_what_was_windowed_before_is_no_hounsfield_unit():
    as_is = {"Modality": "CT", "RescaleSlope": 1, "RescaleIntercept": 0}
    eight = np.arange(64, dtype=np.uint8).reshape(8, 8)
    with pytest.raises(UndecodableError, match=r"in HU, but the file's values are 8 bits a pixel \(BitsStored"):
        decode(as_bytes(dicom(eight, **as_is)), rules=CT)
    deep = eight.astype(np.uint16)
    captured = dicom(deep, ConversionType="WSD", **as_is)
    with pytest.raises(UndecodableError, match=r"in HU, but the file's values are a screenshot's"):
        decode(as_bytes(captured), rules=CT)
    (note,) = see(open_file(as_bytes(dicom(deep, **as_is))), Place(), CT).facts.notes
    assert "cannot be below 0" in note
    assert not see(open_file(as_bytes(dicom(deep, RescaleType="HU", **as_is))), Place(), CT).facts.notes
    assert not see(open_file(as_bytes(dicom(deep, **as_is | {"RescaleIntercept": -1024}))), Place(), CT).facts.notes


@pytest.mark.parametrize(("modality", "says"), [("OT", "OT"), ("", "missing"), ("MR", None)])
def test_a_file_that_does_not_say_of_what_modality_it_is_is_told_where_a_study_has_windows(modality, says):
    content = as_bytes(dicom(RAMP, Modality=modality))
    words = f"Modality (0008,0060) {says}, so that none of the study's windows holds for it"
    assert see(open_file(content), Place(), CT).facts.notes == (() if says is None else (words,))
    assert not see(open_file(content), Place(), Rules()).facts.notes


@pytest.mark.parametrize(
    ("part", "kind"), [("LABEL", "scout"), ("OVERVIEW", "scout"), ("THUMBNAIL", "scout"), ("VOLUME", "")]
)
def test_what_lies_beside_a_whole_slide_is_left_out_as_scouts_are(part, kind, tmp_path):
    words = ["ORIGINAL", "PRIMARY", part, "NONE"]
    slide = dicom(RAMP, SOPClassUID=uid.VLWholeSlideMicroscopyImageStorage, Modality="SM", ImageType=words)
    (tmp_path / "a.dcm").write_bytes(as_bytes(slide))
    assert kind_of(tmp_path / "a.dcm") == kind


VOLUME = np.arange(4 * 5 * 6, dtype=np.int16).reshape(4, 5, 6)


def nifti(volume=VOLUME, affine=np.eye(4), packed=True, **header):
    image = nibabel.Nifti1Image(volume, affine)
    for name, value in header.items():
        image.header[name] = value
    content = image.to_bytes()
    return gzip.compress(content) if packed else content


def claim(side):
    """A header of a volume that is not there."""
    return nifti(packed=False).replace(struct.pack("<4h", 3, 4, 5, 6), struct.pack("<4h", 3, side, side, side))


@pytest.mark.parametrize("packed", [True, False])
def test_a_nifti_slice_is_shown_as_radiologists_look_at_it(packed):
    found = np.asarray(decode(nifti(packed=packed), 2)).astype(int)
    cut = VOLUME[:, :, 2].astype(float)
    expected = np.rint(255 * (cut - cut.min()) / (cut.max() - cut.min()))
    # The patient's right (greatest first index) at the left, front (greatest second) up.
    assert found.shape == (5, 4)
    assert np.array_equal(found, expected.T[::-1, ::-1])
    assert np.array_equal(np.asarray(decode(nifti())), np.asarray(decode(nifti(), 3)))  # the middle one
    shapes = [np.asarray(decode(nifti(), 0, axis)).shape for axis in AXES]
    assert shapes == [(5, 4), (6, 4), (6, 5)]


def test_a_nifti_is_turned_whatever_way_it_was_stored():
    stored = nifti(
        VOLUME[::-1, :, ::-1].transpose(1, 0, 2),
        np.array([[0, -1, 0, 3], [1, 0, 0, 0], [0, 0, -1, 5], [0, 0, 0, 1]], dtype=float),
    )
    for frame in range(6):
        assert np.array_equal(np.asarray(decode(stored, frame)), np.asarray(decode(nifti(), frame)))


def test_a_nifti_is_turned_in_every_way_that_axes_can_lie():
    # Slices that are unlike each other, as those of an even ramp are not once they are stretched.
    unlike = np.random.default_rng(5).integers(0, 99, (4, 5, 6), dtype=np.int16)
    for order in itertools.permutations(range(3)):
        for flips in itertools.product((1, -1), repeat=3):
            volume = unlike.transpose(order)[tuple(slice(None, None, flip) for flip in flips)]
            affine = np.eye(4)
            affine[:3, :3] = 0
            for new, (old, flip) in enumerate(zip(order, flips, strict=True)):
                affine[old, new] = flip
            stored = nifti(np.ascontiguousarray(volume), affine, packed=False)
            for axis in AXES:
                assert np.array_equal(decode(stored, 1, axis), decode(nifti(unlike), 1, axis)), (order, flips, axis)


def test_a_nifti_that_does_not_say_which_side_is_right_is_shown_and_told():
    content = nifti(packed=False)
    mute = content[:252] + bytes(4) + content[256:]  # qform_code and sform_code
    notes = [see(open_file(one), Place(), Rules()).facts.notes for one in (content, mute)]
    assert notes == [(), ("neither sform nor qform says which side is the patient's right",)]


def test_a_gzipped_nifti_of_several_parts_is_one_volume():
    large = np.random.default_rng(0).integers(0, 999, (9, 9, 9_000), dtype=np.int16)
    for cut, whole in ((100, nifti(packed=False)), (400, nifti(packed=False)), (1_200_000, nifti(large, packed=False))):
        parts = gzip.compress(whole[:cut]) + gzip.compress(whole[cut:])
        last = open_file(whole).frames - 1
        assert np.array_equal(np.asarray(decode(parts, last)), np.asarray(decode(whole, last)))


def test_what_programs_write_behind_a_niftis_header_is_passed_over():
    image = nibabel.Nifti1Image(VOLUME, np.eye(4))
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension("afni", b"<AFNI_attributes/>" * 50))
    for content in (image.to_bytes(), gzip.compress(image.to_bytes())):
        assert np.array_equal(np.asarray(decode(content)), np.asarray(decode(nifti())))


@pytest.mark.parametrize("entry", [0.0, np.nan, np.inf])
def test_a_nifti_whose_axes_span_no_space_is_refused(entry):
    content = nifti(packed=False)
    content = (
        content[:254] + struct.pack("<h", 1) + content[256:280] + struct.pack("<12f", *[entry] * 12) + content[328:]
    )
    with pytest.raises(UndecodableError, match="axes do not span space; expected an invertible affine"):
        decode(content)


def test_slope_and_byte_order_of_a_nifti_are_heeded():
    image = nibabel.Nifti1Image(VOLUME, np.eye(4), nibabel.Nifti1Header(endianness=">"))
    image.header.set_slope_inter(2, -5)
    rules = Rules(windows=(Window(modality="NIFTI", centre=115, width=240, unit="rescaled"),))
    expected = np.rint(255 * (VOLUME[:, :, 1] * 2.0).clip(0, 240) / 240).T[::-1, ::-1]
    assert np.array_equal(np.asarray(decode(image.to_bytes(), 1, rules=rules)), expected)


def test_two_ways_to_say_where_a_niftis_axes_lead_must_not_contradict():
    mirrored = np.diag([-1, 1, 1, 1])
    turned = np.array([[0.99, 0.1, 0, 5], [-0.1, 0.99, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])

    def of(sform, sform_code, qform_code):
        content = nifti(packed=False)
        header = nibabel.Nifti1Header(content[:348])
        header.set_sform(sform, sform_code)
        header.set_qform(np.eye(4), qform_code)
        return header.binaryblock + content[348:]

    with pytest.raises(
        UndecodableError, match=r"lead to LAS by its sform and to RAS by its qform; .* left may be right"
    ):
        decode(of(mirrored, 1, 1))
    one, other = (np.asarray(decode(of(mirrored, *codes))) for codes in ((1, 0), (0, 1)))
    assert np.array_equal(one, other[:, ::-1])
    assert decode(of(turned, 4, 1)).size == (4, 5)  # as registration writes it


def test_a_niftis_values_are_windowed_by_the_study_or_its_own_range():
    rules = Rules(windows=(Window(modality="NIFTI", centre=60, width=120, unit="rescaled"),))
    expected = np.rint(255 * VOLUME[:, :, 1].clip(0, 120) / 120).T[::-1, ::-1]
    assert np.array_equal(np.asarray(decode(nifti(), 1, rules=rules)), expected)
    assert np.array_equal(np.asarray(decode(nifti(cal_min=0, cal_max=120), 1)), expected)
    holes = VOLUME.astype(np.float32)
    holes[0, 0, 1] = np.nan
    assert np.asarray(decode(nifti(holes), 1))[-1, -1] == 0


def test_a_niftis_values_that_cannot_be_hounsfield_units_are_refused_or_told():
    rules = Rules(windows=(Window(modality="NIFTI", centre=40, width=400, unit="HU"),))
    noise = np.random.default_rng(0)
    for kind in (np.uint8, np.int8):
        with pytest.raises(UndecodableError, match="in HU, but the file's values are of 8 bits"):
            decode(nifti(VOLUME.astype(kind)), rules=rules)
    labels, shares = noise.integers(0, 5, (6, 6, 6)).astype(np.int16), noise.normal(0, 2, (6, 6, 6)).astype(np.float32)
    shares[0, 0, 0] = np.nan
    for volume in (labels, shares, np.zeros((6, 6, 6), np.int16)):
        with pytest.raises(UndecodableError, match=r"in HU, but the file's values run from \S+ to \S+, as labels"):
            decode(nifti(volume), rules=rules)

    def notes(volume, rules=rules):
        return see(open_file(nifti(volume)), Place(), rules).facts.notes

    assert notes(VOLUME) == ("no value of the volume is below 0, taken as HU, of which air has -1000",)
    assert notes(VOLUME - np.int16(1000)) == notes(VOLUME, Rules()) == ()
    sloped = nibabel.Nifti1Image(VOLUME, np.eye(4))
    sloped.header.set_slope_inter(1, -1024)
    assert see(open_file(sloped.to_bytes()), Place(), rules).facts.notes == ()


@pytest.mark.parametrize("said", [0.0, 3.0, np.nan])
def test_a_nifti_that_leaves_out_the_sign_of_its_third_axis_means_plus(said):
    content = bytearray(nifti(packed=False))
    content[76:80] = struct.pack("<f", said)
    content[252:256] = struct.pack("<2h", 1, 0)  # by its qform alone
    assert np.array_equal(np.asarray(decode(bytes(content))), np.asarray(decode(nifti())))


@pytest.mark.parametrize("packed", [True, False])
def test_a_nifti_that_leaves_out_where_its_values_begin_has_them_behind_its_header(packed):
    content = bytearray(nifti(packed=False))
    content[108:112] = bytes(4)
    without = gzip.compress(content) if packed else bytes(content)
    assert np.array_equal(np.asarray(decode(without)), np.asarray(decode(nifti())))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (nifti(np.zeros((4, 4, 4, 3), np.int16)), "4 x 4 x 4 x 3 values; expected a volume of three dimensions"),
        (gzip.compress(struct.pack("<I", 348) + bytes(4444)), "NIfTI header with magic"),
        (
            nifti(intent_code=1002),
            r"a NIfTI file that holds a segmentation \(its intent_code\), no picture of a patient",
        ),
        (nifti(intent_code=3, packed=False), "holds a map of statistics"),
        (nifti()[:-9], "gzipped file that ends too early"),
        (nifti(np.zeros((9, 9, 9), np.int16), packed=False)[:400], "a NIfTI of 9 x 9 x 9 values in 400 bytes"),
        (
            nifti(packed=False)[:108] + bytes(4) + nifti(packed=False)[112:348] + b"\1\0\0\0" + bytes(244),
            "vox_offset is 0, inside of its own header; expected at least 352",
        ),
        (gzip.compress(nifti(packed=False)[:-2]), "gzipped file that ends too early"),
        (gzip.compress(nifti(packed=False) + bytes(2**28)), "goes on behind the 592 bytes of its values"),
        (
            gzip.compress(claim(999)),
            r"a NIfTI of 1,994,006,350 bytes; expected at most 320,000,000 .* raise most_pixels",
        ),
    ],
    ids=[
        "four dimensions",
        "no magic",
        "labels",
        "statistics",
        "no offset",
        "cut gzip",
        "cut",
        "cut before",
        "bomb",
        "claim",
    ],  # gzip has the time in it
)
def test_a_nifti_that_cannot_be_shown_says_why(content, reason):
    with pytest.raises(UndecodableError, match=reason):
        decode(content)


@pytest.mark.parametrize("packed", [False, True])
def test_a_niftis_values_are_as_many_and_as_large_as_its_header_says(packed):
    plain = nifti(packed=False)
    whole = np.asarray(decode(plain))
    for behind in (b"", bytes(5000), b"\1\2"):
        found = plain + behind
        assert np.array_equal(np.asarray(decode(gzip.compress(found) if packed else found)), whole)
    less = plain[:42] + struct.pack("<h", VOLUME.shape[0] - 1) + plain[44:]  # the pictures would be askew
    for found in (less, plain + VOLUME.tobytes()):
        with pytest.raises(UndecodableError, match=r"a NIfTI of .* values that goes on behind them; expected an end"):
            decode(gzip.compress(found) if packed else found)
    bytes_ = plain[:70] + struct.pack("<h", 2) + plain[72:]
    with pytest.raises(UndecodableError, match=r"a NIfTI of datatype uint8 and bitpix \d+; expected the same size"):
        decode(gzip.compress(bytes_) if packed else bytes_)


def test_values_of_whatever_unit_go_from_black_to_white():
    small = nifti(VOLUME.astype(np.float32) * 1e-20, packed=False)
    assert np.abs(np.asarray(decode(small)).astype(int) - np.asarray(decode(nifti()))).max() <= 1
    assert np.abs(grey(dicom(RAMP, RescaleSlope="1e-18", RescaleIntercept=0)) - grey(dicom(RAMP))).max() <= 1


def saved(image, form, **options):
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def test_photographs_are_shown_as_viewers_do():
    image = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 12) * 5)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = decode(saved(image, "PNG", exif=exif))
    assert np.array_equal(np.asarray(turned), np.rot90(np.asarray(image), -1))
    clear = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    clear.putpixel((1, 0), (255, 0, 0, 128))
    for background, colours in (("black", [[0, 0, 0], [128, 0, 0]]), ("white", [[255, 255, 255], [255, 127, 127]])):
        assert np.asarray(decode(saved(clear, "PNG"), rules=Rules(background=background))).tolist() == [colours]
    transparent = Image.new("P", (2, 2), 1)
    transparent.putpalette([9, 9, 9, 200, 0, 0])
    assert not np.asarray(decode(saved(transparent, "PNG", transparency=1))).any()


def test_a_png_whose_pixels_are_damaged_is_refused_though_they_can_be_unpacked():
    """As half of a copy with its whole size is: what is not there yet is zeros."""
    smooth = np.add.outer(np.arange(256), np.arange(256)) * 4 + np.random.default_rng(1).integers(0, 60, (256, 256))
    content = saved(Image.fromarray((smooth.clip(0, 4095) // 16).astype(np.uint8)), "PNG")
    assert decode(content).size == (256, 256)
    start = content.index(b"IDAT")
    for at in range(start + 100, len(content) - 16, (len(content) - start) // 40):
        for damaged in (content[:at] + bytes(len(content) - at), content[:at] + b"\xff" + content[at + 1 :]):
            with pytest.raises(UndecodableError, match=r"damaged at byte|broken image"):
                decode(damaged)
    unpacked = bytearray(zlib.decompress(content[start + 4 : -16]))
    unpacked[5000] ^= 8
    pixels = zlib.compress(bytes(unpacked))
    checked = b"IDAT" + content[start + 4 : -16]
    forged = content[: start - 4] + len(pixels).to_bytes(4, "big") + b"IDAT" + pixels
    forged += zlib.crc32(checked).to_bytes(4, "big") + content[-12:]
    with pytest.raises(UndecodableError, match=r"a PNG that is damaged at byte 33 \(the checksum of its part IDAT"):
        decode(forged)


@pytest.mark.parametrize(
    "options",
    [
        *({}, {"subsampling": 0}, {"quality": 30}, {"progressive": True}),
        *({"restart_marker_blocks": 2}, {"restart_marker_rows": 1}, {"progressive": True, "restart_marker_rows": 1}),
    ],
)
def test_a_jpeg_of_which_a_part_is_missing_is_refused_though_it_can_be_filled(options):
    random = np.random.default_rng(1)
    smooth = np.add.outer(np.arange(72), np.arange(90))[..., None] + random.integers(0, 60, (72, 90, 3))
    for pixels in (smooth[..., 0], smooth):
        content = saved(Image.fromarray(pixels.astype(np.uint8)), "JPEG", **options)
        start = max(place + len(segment) for _, place, segment in segments(content))
        whole = np.asarray(decode(content))
        # Padding before the end and fill behind the data, as some devices write them; a preview behind the picture.
        for more in (content[:-2] + bytes(12) + content[-2:], content[:-2] + b"\xff" + content[-2:], content * 2):
            assert np.array_equal(np.asarray(decode(more)), whole)
        progressive = "progressive" in options  # of whose later scans a damaged one may be as long
        end = content.index(b"\xff\xc4" if progressive else b"\xff\xd9", start)
        part = (end - start) // 5
        for at in range(start, end - part, part // 2):
            with pytest.raises(UndecodableError, match="broken image"):
                decode(content[:at] + content[at + part :])
        if "restart_marker_blocks" in options:  # and of eight intervals, after which markers have the same numbers
            first = content.index(b"\xff\xd1", start)
            with pytest.raises(UndecodableError, match="data are missing in it"):
                decode(content[:first] + content[content.index(b"\xff\xd1", first + 2) :])


@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"quality": 30, "restart_marker_rows": 1}])
def test_a_jpeg_whose_header_is_of_fewer_rows_than_its_data_is_refused(options):
    noise = np.random.default_rng(1).integers(0, 256, (64, 40, 3), dtype=np.uint8)
    for pixels in (noise[..., 0], noise):
        content = bytearray(saved(Image.fromarray(pixels), "JPEG", **options))
        assert decode(bytes(content)).size == (40, 64)
        rows = content.index(b"\xff\xc0") + 5
        content[rows : rows + 2] = struct.pack(">H", 32)
        with pytest.raises(UndecodableError, match="data are missing in it, or others are in their place"):
            decode(bytes(content))


def png(width, height, rows, interlaced):
    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, interlaced)),
        (b"IDAT", zlib.compress(rows)),
    ]
    parts.append((b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in parts
    )


@pytest.mark.parametrize(("interlaced", "height"), [(False, 30), (True, 30), (True, 31)])
def test_a_png_of_fewer_rows_than_its_header_says_is_refused(interlaced, height):
    width, more = 24, height - 30  # every other row, and of 31 not the last, comes in the last pass
    passes = ((3, 4), (3, 4), (6, 4), (6, 8), (12, 7 + more), (12, 15 + more), (24, 15))
    passes = passes if interlaced else ((width, height),)
    rows = [b"\0" + bytes([120]) * across for across, down in passes for _ in range(down)]
    assert np.unique(np.asarray(decode(png(width, height, b"".join(rows), interlaced)))).tolist() == [120]
    for fewer in (1, 2, 3, 12, 20):
        with pytest.raises(UndecodableError, match=r"broken image \([\d,]+ bytes of pixels of [\d,]+\)|truncated"):
            decode(png(width, height, b"".join(rows[:-fewer]), interlaced))
    black = [bytes(len(row)) for row in rows]
    assert not np.asarray(decode(png(width, height, b"".join(black), interlaced))).any()


def strips(height, rows, parts, counts=None, **more):
    """A TIFF of 8 bits, 16 pixels wide."""
    offsets = list(itertools.accumulate(map(len, parts), initial=8))[:-1]
    tags = {256: 16, 257: height, 258: 8, 259: 1, 262: 1, 277: 1, 273: offsets, **({278: rows} if rows else {}), **more}
    tags[279] = [len(part) for part in parts] if counts is None else counts
    table, lists, end = b"", b"", 8 + sum(map(len, parts))
    for tag, found in sorted(tags.items()):
        values = found if isinstance(found, list) else [found]
        packed = struct.pack(f"<{len(values)}I", *values)
        table += struct.pack("<HHI", tag, 4, len(values))
        table += packed if len(values) == 1 else struct.pack("<I", end + len(lists))
        lists += packed if len(values) > 1 else b""
    pixels = b"".join(parts)
    return (
        b"II*\0"
        + struct.pack("<I", end + len(lists))
        + pixels
        + lists
        + struct.pack("<H", len(tags))
        + table
        + bytes(4)
    )


def test_a_tiff_of_which_strips_are_missing_is_refused():
    parts = [bytes([90 + part]) * 64 for part in range(4)]
    whole = np.asarray(decode(strips(16, 4, parts)))
    assert whole[:, 0].tolist() == [90] * 4 + [91] * 4 + [92] * 4 + [93] * 4
    alone = [b"".join(parts)]
    for said in (
        strips(16, 2**32 - 1, alone),
        strips(16, 16, alone, [0]),
        strips(16, 0, alone),
    ):  # of one alone the count is left out
        assert np.array_equal(np.asarray(decode(said)), whole)
    for damaged, says in (
        (strips(16, 4, parts[:2]), "2 strips or tiles of 4"),
        (strips(16, 4, parts, [64, 0, 64, 64]), "192 bytes of pixels of 256"),
        (strips(12, 4, parts), "4 strips or tiles of 3"),
        (strips(15, 15, [bytes(range(256))]), "256 bytes of pixels of 240 that its header says"),
    ):
        with pytest.raises(UndecodableError, match=says):
            decode(damaged)


def segmented(words, entries=256, bits=16, first=0, pixels=None):
    dataset = dicom(np.arange(256, dtype=np.uint8).reshape(16, 16) if pixels is None else pixels, "PALETTE COLOR")
    for name in ("Red", "Green", "Blue"):
        setattr(dataset, f"{name}PaletteColorLookupTableDescriptor", [entries % 2**16, first, bits])
        dataset[f"{name}PaletteColorLookupTableDescriptor"].VR = "US"
        content = np.array(words, f"<u{bits // 8}").tobytes()
        setattr(dataset, f"Segmented{name}PaletteColorLookupTableData", content + b"\0" * (len(content) % 2))
    return as_bytes(dataset)


RISE = [0, 1, 0, 1, 127, 127]
"""Of segments: one value, and a line to another."""


@pytest.mark.parametrize("bits", [8, 16])
def test_palettes_in_segments_are_unfolded(bits):
    """Values, lines, and segments that are taken again, whose offset is in bytes."""
    down = 257 if bits == 16 else 1
    rise = [value * down if place in (2, 5) else value for place, value in enumerate(RISE)]
    half = list(range(128))
    for words, expected in (
        ([*rise, 1, 128, 255 * down], [*half, *(np.rint(np.linspace(127, 255, 129)).astype(int)[1:])]),
        ([*rise, 0, 128, *(one * down for one in range(127, -1, -1))], [*half, *half[::-1]]),
        ([*rise, 2, 2, 0, 0, *([0, 0] if bits == 8 else [])], half * 2),
        ([*rise, 0, 1, 9 * down, 2, 1, 3 * bits // 8, 0, *([0, 0] if bits == 8 else [])], [*half, 9, *[None] * 127]),
    ):
        found = np.asarray(decode(segmented(words, bits=bits)))
        expected = [
            round(9 + (127 - 9) * (place - 128) / 127) if one is None else one for place, one in enumerate(expected)
        ]
        assert np.abs(found.reshape(256, 3).T.astype(int) - expected).max() <= 1
    wide = np.array([[0, 5, 300, 70]], np.uint16)  # beyond the last entry: that one
    shown = np.asarray(decode(segmented([*rise, 1, 128, 255 * down], bits=bits, first=5, pixels=wide)))
    assert shown[0, :, 0].tolist() == [0, 0, 255, 65]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (RISE, "unfolds to 128 entries, and its descriptor says 256; expected as many"),
        ([*RISE, 1, 200, 255], "unfolds to more entries"),
        ([1, 256, 255], "is not in segments of kinds 0, 1 and 2"),
        ([0, 256, 1, 2], "is not in segments"),
        ([0, 1, 0, 9, 255, 1], "is not in segments"),
        ([0, 1, 0, 2, 1, 6, 0], "is not in segments"),  # itself
        ([*RISE, 2, 1, 60_000, 0], "unfolds to 128 entries"),
        ([0, 1, 0, 1, 0, 9, 1, 255, 255], "is not in segments"),  # none of a line's entries
    ],
)
def test_palettes_in_segments_that_unfold_to_others_than_they_say_are_refused(words, says):
    with pytest.raises(UndecodableError, match=f"SegmentedRedPaletteColorLookupTableData {says}.*: export it again"):
        decode(segmented(words))


def test_a_palette_of_few_segments_that_would_be_large_is_not_unfolded():
    begun = time.process_time()
    with pytest.raises(UndecodableError, match="unfolds to more entries, and its descriptor says 256"):
        decode(segmented([*RISE, *[1, 65_535, 1] * 1000]))
    assert time.process_time() - begun < 0.5


def test_a_progressive_jpeg_of_which_eight_intervals_are_missing_is_refused():
    """After them markers have the same numbers again; of luminance alone there are more intervals than of all."""
    noise = np.random.default_rng(1).integers(0, 256, (72, 90, 3), dtype=np.uint8)
    content = saved(Image.fromarray(noise), "JPEG", progressive=True, restart_marker_blocks=2)
    assert decode(content).size == (90, 72)
    for scan in [found.start() for found in re.finditer(b"\xff\xda", content)][1:]:
        first = content.index(b"\xff\xd0", scan)
        with pytest.raises(UndecodableError, match="data are missing in it"):
            decode(content[:first] + content[content.index(b"\xff\xd0", first + 2) :])


def test_a_deflated_tiff_whose_checksums_do_not_fit_is_refused():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40), dtype=np.uint8))
    content = saved(noise, "TIFF", compression="tiff_adobe_deflate")
    assert decode(content).tobytes() == noise.tobytes()
    at = 8 + 900
    with pytest.raises(UndecodableError, match="incorrect data check"):
        decode(content[:at] + bytes(40) + content[at + 40 :])


@pytest.mark.parametrize("colours", ["RGB", "L", "1"])
@pytest.mark.parametrize("form", ["BMP", "PPM"])
def test_more_pixels_than_the_header_of_a_bmp_or_ppm_says_are_refused(form, colours):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 24, 3), dtype=np.uint8)).convert(colours)
    content = saved(noise, form)
    for padding in (b"", b"\0\0", b"\n", bytes(999)):
        assert decode(content + padding).convert("RGB").tobytes() == noise.convert("RGB").tobytes()

    def says(width, height):
        if form == "BMP":
            return content[:18] + struct.pack("<II", width, height) + content[26:]
        return content.replace(b"24 40", b"%d %d" % (width, height))

    # Of one bit, whole bytes make a row, and words in a BMP.
    for fewer in (says(24, 39), says(24, 20), *([] if colours == "1" else [says(23 - (form == "BMP") * 3, 40)])):
        with pytest.raises(UndecodableError, match=r"broken image \([\d,]+ bytes of pixels of [\d,]+ that its header"):
            decode(fewer)


def test_several_pictures_in_a_ppm_are_refused_and_a_profile_behind_a_bmp_is_none():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8))
    with pytest.raises(UndecodableError, match="that its header says"):
        decode(2 * saved(noise, "PPM"))
    for plain, more in ((b"P2 2 2 255\n0 9 99 255 ", b"4"), (b"P1 2 2\n# P1\n01\n10\n", b"1")):
        assert decode(plain).size == decode(plain + b"# 7\n").size == (2, 2)
        with pytest.raises(UndecodableError, match="5 numbers of 4 that its header says"):
            decode(plain + more)
    content = saved(noise, "BMP")
    pixels = int.from_bytes(content[10:14], "little")
    header = struct.pack("<I", 124) + content[18:54] + bytes(84)
    profiled = content[:10] + struct.pack("<I", pixels + 84) + header + content[54:] + bytes(range(200))
    assert decode(profiled).tobytes() == noise.tobytes()


def test_a_tiff_of_many_slices_that_calls_them_one_picture_is_refused():
    pixels = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    for said, count in (
        ({270: "ImageJ=1.54f\nimages=5\nslices=5\n"}, 5),
        ({270: "ImageJ=1.54f\nunit=mm\nimages=1\n"}, 1),
        ({270: "as of images=5"}, 1),
        ({270: "ImageJ=1.54f\n"}, 1),
        ({32997: 16}, 16),
        ({32997: 1}, 1),
    ):
        tags = TiffImagePlugin.ImageFileDirectory_v2()
        for tag, value in said.items():
            tags[tag] = value
            tags.tagtype[tag] = 2 if isinstance(value, str) else 4
        content = saved(pixels, "TIFF", tiffinfo=tags)
        if count == 1:
            assert decode(content).tobytes() == pixels.tobytes()
        else:
            with pytest.raises(UndecodableError, match=f"{count} frames; expected one image a file"):
                decode(content)


def test_grey_that_is_multiplied_by_its_alpha_is_shown_on_the_background():
    content = bytearray(saved(Image.merge("LA", [Image.new("L", (8, 8), 60), Image.new("L", (8, 8), 128)]), "TIFF"))
    at = content.index(struct.pack("<HHI", 338, 3, 1))
    assert struct.unpack("<H", content[at + 8 : at + 10]) == (2,)
    content[at + 8] = 1  # associated alpha
    assert set(decode(bytes(content)).convert("L").tobytes()) <= {59, 60, 61}


@pytest.mark.parametrize("factor", [1, 257])
def test_a_tiffs_colours_are_of_eight_or_sixteen_bits(factor):
    index = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).convert("P")
    colours = np.random.default_rng(0).integers(0, 256, (256, 3), dtype=np.uint8)
    index.putpalette(colours.tobytes())
    content = saved(index, "TIFF")
    written = struct.pack("<768H", *(int(value) * 256 for value in colours.T.ravel()))
    assert content.count(written) == 1
    content = content.replace(written, struct.pack("<768H", *(int(value) * factor for value in colours.T.ravel())))
    assert np.array_equal(np.asarray(decode(content).convert("RGB")), colours.reshape(16, 16, 3))


@pytest.mark.parametrize("alpha", [0, 255])
def test_a_bmp_or_tiff_whose_alpha_is_zero_throughout_has_none(alpha):
    colours = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    pixels = np.dstack([colours[::-1, :, ::-1], np.full((6, 8), alpha, np.uint8)]).tobytes()
    info = struct.pack(
        "<IiiHHIIiiII4I", 124, 8, 6, 1, 32, 3, len(pixels), 0, 0, 0, 0, 0xFF0000, 0xFF00, 0xFF, 0xFF << 24
    )
    content = struct.pack("<2sIHHI", b"BM", 138 + len(pixels), 0, 0, 138) + info.ljust(124, b"\0") + pixels
    assert np.array_equal(np.asarray(decode(content).convert("RGB")), colours)
    same = saved(Image.fromarray(np.dstack([colours, np.full((6, 8), alpha, np.uint8)])), "TIFF")
    assert np.array_equal(np.asarray(decode(same).convert("RGB")), colours)


def test_values_with_a_sign_and_fractions_are_refused_and_never_shifted():
    for mode, form in (("F", 3), ("I", 2)):
        with pytest.raises(UndecodableError, match=rf"a TIFF of sample format \({form},\)"):
            decode(saved(Image.new(mode, (4, 4)), "TIFF"))


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_more_than_eight_bits_of_a_channel_are_refused_and_never_cut(channels):
    deep = np.full((8, 8, channels), 3000, dtype=np.uint16).squeeze()
    contents = [imagecodecs.png_encode(deep)]
    if channels in (1, 3):
        contents += [imagecodecs.jpeg2k_encode(deep, codecformat="jp2", bitspersample=12)]
        magic = b"P5" if channels == 1 else b"P6"
        contents += [magic + b" 8 8 4095\n" + deep.astype(">u2").tobytes(), tiff(deep)]
    for content in contents:
        with pytest.raises(UndecodableError, match="more than 8 bits"):
            decode(content)


def tiff(deep):
    """An uncompressed TIFF of 16 bits a channel."""
    channels = 1 if deep.ndim == 2 else deep.shape[2]
    pixels = deep.astype("<u2").tobytes()
    bits = struct.pack("<3H", 16, 16, 16)
    entries = [(256, 3, 1, deep.shape[1]), (257, 3, 1, deep.shape[0]), (259, 3, 1, 1), (277, 3, 1, channels)]
    entries += [(262, 3, 1, 1 if channels == 1 else 2), (278, 3, 1, deep.shape[0]), (279, 4, 1, len(pixels))]
    size = 8 + 2 + 12 * (len(entries) + 2) + 4
    entries += [(273, 4, 1, size + 6), (258, 3, channels, 16 if channels == 1 else size)]
    ifd = b"".join(struct.pack("<HHII", *entry) for entry in sorted(entries))
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + ifd + bytes(4) + bits + pixels


def test_a_small_file_that_claims_many_pixels_is_refused_with_the_setting_that_raises_it():
    png = saved(Image.new("1", (20_000, 20_000)), "PNG")
    assert len(png) < 100_000
    with pytest.raises(UndecodableError, match=r"20000 x 20000 pixels.*raise most_pixels in \[data\] of site.toml"):
        decode(png)
    assert decode(png, rules=Rules(most_pixels=400_000_000)).size == (20_000, 20_000)
    small = Rules(most_pixels=63)
    for content in (as_bytes(dicom(RAMP)), saved(Image.new("L", (8, 8)), "PNG"), nifti(np.zeros((8, 8, 1), np.int8))):
        with pytest.raises(UndecodableError, match="8 x 8 pixels; expected at most 63"):
            decode(content, rules=small)


def test_colours_whose_decoders_take_much_memory_may_have_a_third_of_the_pixels():
    colours = np.zeros((10, 10, 3), np.uint8)
    inside = encapsulated(colours, uid.JPEG2000Lossless, j2k(colours), "RGB")
    costly = [saved(Image.fromarray(colours), "WEBP"), saved(Image.fromarray(colours), "JPEG2000"), as_bytes(inside)]
    for content in costly:
        assert decode(content, rules=Rules(most_pixels=300)).size == (10, 10)
        with pytest.raises(
            UndecodableError, match=r"10 x 10 pixels; expected at most 99, a third of most_pixels, of col"
        ):
            decode(content, rules=Rules(most_pixels=299))
    grey = saved(Image.fromarray(colours[..., 0]), "JPEG2000")
    for content in (grey, saved(Image.fromarray(colours), "PNG"), as_bytes(dicom(colours, "RGB"))):
        assert decode(content, rules=Rules(most_pixels=100)).size == (10, 10)


def test_luminance_and_differences_become_colours_as_pydicom_makes_them():
    content = np.random.default_rng(0).integers(0, 256, (300, 100, 3), dtype=np.uint8)
    dataset = dicom(content, "RGB")
    dataset.PhotometricInterpretation = "YBR_FULL"
    expected = pydicom.dcmread(io.BytesIO(as_bytes(dataset))).pixel_array
    assert not np.array_equal(expected, content)
    assert np.array_equal(np.asarray(decode(as_bytes(dataset))), expected)


def test_frames_of_one_file_are_read_and_hashed_once(tmp_path, monkeypatch):
    frames = np.zeros((150, 512, 512), dtype=np.uint16)
    frames[:, 0, 0] = np.arange(150) + 1
    content = as_bytes(dicom(frames))
    (tmp_path / "many.dcm").write_bytes(content)
    sources = [Source(tmp_path / "many.dcm", Place(frame)) for frame in range(150)]
    reads = []
    real = type(tmp_path).read_bytes
    monkeypatch.setattr(type(tmp_path), "read_bytes", lambda path: reads.append(path) or real(path))
    begun = time.process_time()
    assert list(identities(sources))[7] == identity(content, 7)
    assert len(reads) == 1
    found = [
        one
        for batch in decode_all(sources[:40], lambda pictures: [one.image.size for one in pictures], 64)
        for one in batch
    ]
    assert len(reads) == 2
    assert [one.value for one in found] == [(512, 512)] * 40
    assert time.process_time() - begun < 3


def test_the_page_on_data_has_the_table_of_formats():
    assert table() in (Path(__file__).parents[3] / "docs" / "data.md").read_text(encoding="utf-8")


def test_rare_kinds_of_ordinary_formats_are_told_from_what_is_no_image():
    eight = (SMOOTH >> 4).astype(np.uint8)
    twelve = imagecodecs.jpeg8_encode(SMOOTH, bitspersample=12)
    for content in (twelve, imagecodecs.ljpeg_encode(SMOOTH, bitspersample=12), b"II*\0" + bytes(99)):
        with pytest.raises(UndecodableError, match=r"is broken or of a rare kind .* convert it to PNG, or use DICOM"):
            decode(content)
    with pytest.raises(UndecodableError, match="no image in a format that is read"):
        decode(imagecodecs.jpegxl_encode(eight))
    with pytest.raises(UndecodableError, match="gzipped file that is no NIfTI; expected it unpacked"):
        decode(gzip.compress(as_bytes(dicom(RAMP))))
    with pytest.raises(UndecodableError, match="JPEG 2000 file of values with a sign"):
        decode(imagecodecs.jpeg2k_encode((eight >> 1).astype(np.int8), codecformat="jp2"))

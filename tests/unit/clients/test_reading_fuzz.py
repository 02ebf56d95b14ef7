"""Hostile images, headers and tables: a picture, or one typed error; never a traceback, a hang or 1 GiB.

A short run by default; ``FUZZ_EXAMPLES=N`` sets the inputs for each reader (``make fuzz``). They are read in a process
of its own, whose memory the system limits.
"""

from __future__ import annotations

import gzip
import os
import resource
import struct
import subprocess
import sys
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom import uid
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from secure_fed.clients.data import Choice, find_pictures, read_data
from secure_fed.clients.files import Notes
from secure_fed.clients.nifti import AXES
from secure_fed.clients.patients import read_settled
from secure_fed.clients.reading import Place, frames_of, is_meant_as_image, open_file, see
from secure_fed.clients.rules import Rules, UndecodableError
from secure_fed.clients.series import place_in_series
from secure_fed.core.errors import SecfacmicError
from secure_fed.protocol.simulation_table import Shares
from secure_fed.protocol.study_tables import Window
from tests.fuzz.mutations import hostile
from tests.unit.clients.test_dicom import RAMP, as_bytes, dicom
from tests.unit.clients.test_reading import SMOOTH, TWELVE, encapsulated, j2k, nifti, saved

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "40"))
MOST_BYTES = 2**30
MOST_SECONDS = 10.0
RULES = Rules(windows=(Window(modality="CT", centre=40, width=80, unit="HU"),))
VALUES = (
    *(b"", b"0", b"-1", b"1.5", b"1e999", b"nan", b"1,5", b"1,234", b"\\\\", b"9" * 40, b"65535"),
    *(b"\0\0", b"\xff\xff", b"\0\x80", b"\1\0", b"\x10\0", b"\x40\0", b"\xc3\x28"),
    *(b"MONOCHROME1", b"PALETTE COLOR", b"RGB", b"YBR_FULL_422", b"SEG", b"CT", b"INVERSE", b"SIGMOID"),
    *(b"1.2.840.10008.1.2.4.90", b"1.2.840.10008.1.2.5", b"1.2.840.10008.1.2.1.99"),
)


def pictures() -> list[bytes]:
    """Small files of each format."""
    eight = (SMOOTH >> 4).astype(np.uint8)
    table = Dataset()
    table.LUTDescriptor, table.LUTData = [64, -600, 12], np.arange(0, 4096, 64, dtype=np.uint16).tobytes()
    palette = dicom(np.arange(4, dtype=np.uint8).reshape(2, 2), "PALETTE COLOR")
    for name in ("Red", "Green", "Blue"):
        setattr(palette, f"{name}PaletteColorLookupTableDescriptor", [4, 0, 16])
        palette[f"{name}PaletteColorLookupTableDescriptor"].VR = "US"
        setattr(palette, f"{name}PaletteColorLookupTableData", np.arange(4, dtype=np.uint16).tobytes())
    packed, deflated = dicom(SMOOTH, **TWELVE), dicom(RAMP, WindowCenter=150, WindowWidth=400)
    packed.compress(uid.RLELossless)
    deflated.file_meta.TransferSyntaxUID = uid.DeflatedExplicitVRLittleEndian
    found = [
        dicom(RAMP, WindowCenter=[150, 20], WindowWidth=[400, 3], RescaleSlope=2, RescaleIntercept=-4),
        dicom(RAMP, Modality="CT", RescaleSlope=1, RescaleIntercept=-1024, PixelPaddingValue=-600),
        dicom(np.stack([RAMP] * 3), "MONOCHROME1", VOILUTSequence=Sequence([table])),
        dicom(np.zeros((4, 4, 3), np.uint8), "RGB"),
        palette,
        packed,
        deflated,
        encapsulated(SMOOTH, uid.JPEGLosslessSV1, imagecodecs.ljpeg_encode(SMOOTH, bitspersample=12), **TWELVE),
        encapsulated(SMOOTH, uid.JPEGLSLossless, imagecodecs.jpegls_encode(SMOOTH), **TWELVE),
        encapsulated(SMOOTH, uid.JPEG2000Lossless, j2k(SMOOTH), **TWELVE),
        encapsulated(SMOOTH, uid.HTJ2KLossless, imagecodecs.htj2k_encode(SMOOTH), **TWELVE),
        encapsulated(eight, uid.JPEGBaseline8Bit, imagecodecs.jpeg8_encode(eight)),
    ]
    three = np.dstack([eight, eight.T, 255 - eight])
    for syntax, colour, code in (
        (uid.JPEGBaseline8Bit, "YBR_FULL_422", imagecodecs.jpeg8_encode(three, subsampling="422")),  # JFIF
        (uid.JPEGBaseline8Bit, "YBR_FULL", imagecodecs.jpeg8_encode(three, colorspace="RGB", outcolorspace="RGB")),
        (uid.JPEGLosslessSV1, "RGB", imagecodecs.jpeg8_encode(three, lossless=True, predictor=1)),
        (uid.JPEG2000Lossless, "YBR_RCT", imagecodecs.jpeg2k_encode(three, codecformat="j2k", mct=True)),
    ):
        found.append(encapsulated(three, syntax, code, colour))
    contents = [as_bytes(one) for one in found]
    contents += [contents[0][132:], (Path(__file__).parent / "extended_12bit.dcm").read_bytes()]
    contents += [nifti(), nifti(packed=False), nifti(np.zeros((3, 3, 3), np.float32), packed=False)]
    colour = Image.fromarray(np.dstack([eight] * 3))
    for form in ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "JPEG2000", "PPM"):
        contents.append(saved(colour, form))
    return [*contents, saved(colour.convert("LA"), "PNG"), saved(colour.convert("P"), "PNG", transparency=3)]


TABLES = [
    text.encode(form)
    for form in ("utf-8", "utf-8-sig", "utf-16", "cp1252")
    for text in (
        "path,label,patient,split\nimages/0.png,dark,p0,train\nimages/1.png,light,p1,test\n",
        'sep=;\n path ;label;patient;slice\r\n"images\\0.png";dark;M\u00fcller;\r\n;;;\r\nmany.dcm;light;007;1\r\n',
        "path\tlabel\tpatient\tseries\taxis\nseries\tdark\tp0\t1.2.1\t\nimages/1.png\tlight\tp1\t\t\n",
        "id,same_as\n007,7\n7,\n",
    )
]


@st.composite
def headers(draw: st.DrawFn, corpus: list[bytes]) -> bytes:
    """A DICOM file of which elements have other values, or lie elsewhere."""
    content = draw(st.sampled_from(corpus))
    elements = list(_elements(content))
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, len(elements) - 1))
        match draw(st.sampled_from(["set", "set", "set", "set", "drop", "twice", "move", "kind"])):
            case "set":
                value = draw(st.sampled_from(VALUES) | st.binary(max_size=24))
                head = elements[place][:6]
                elements[place] = head + struct.pack("<H", len(value) + len(value) % 2) + value.ljust(len(value) + 1)
                elements[place] = elements[place][: 8 + len(value) + len(value) % 2]
            case "drop" if len(elements) > 1:
                del elements[place]
            case "twice":
                elements.insert(place, elements[place])
            case "move":
                elements.insert(draw(st.integers(0, len(elements) - 1)), elements.pop(place))
            case "kind":
                kind = draw(st.sampled_from([b"US", b"SS", b"DS", b"IS", b"UI", b"UN", b"SQ", b"OW", b"FD", b"zz"]))
                elements[place] = elements[place][:4] + kind + elements[place][6:]
    return content[:_START] + b"".join(elements)


_START = 132


def _elements(content: bytes) -> Iterator[bytes]:
    """The elements of an explicit little-endian file, one after the other; the last one with all that follows."""
    at = _START
    while at + 8 <= len(content):
        long = content[at + 4 : at + 6] in (b"OB", b"OW", b"SQ", b"UN", b"UT", b"OF")
        if long:
            break
        size = 8 + struct.unpack("<H", content[at + 6 : at + 8])[0]
        yield content[at : at + size]
        at += size
    yield content[at:]


def hold(feed: Callable[[], Any], errors: type[Exception]) -> None:
    """Hold a reader to its contract."""
    begun = time.process_time()
    cause: BaseException | None = None
    try:
        feed()
    except errors as error:
        cause = error
    assert time.process_time() - begun < MOST_SECONDS
    assert len(str(cause)) < 20_000
    assert "Traceback" not in str(cause)
    while cause is not None:
        assert not isinstance(cause, MemoryError)
        cause = cause.__cause__ or cause.__context__


def show(content: bytes) -> None:
    """Every way in which a file is looked at."""
    opened = open_file(content)
    for place in (Place(), Place(1), Place(0, AXES[2])):
        try:
            mode, size = see_one(opened, place)
        except UndecodableError:
            if place == Place():
                raise
        else:
            assert mode in ("1", "L", "P", "RGB")
            assert size <= RULES.most_pixels


def see_one(opened: Any, place: Place) -> tuple[str, int]:
    """Mode and pixels of a picture, which is dropped again."""
    image = see(opened, place, RULES).image
    return image.mode, image.width * image.height


class Readers:
    """What is fed, each with its inputs."""

    def __init__(self, folder: Path, count: int) -> None:
        self._folder = folder
        options = settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck), database=None)
        corpus = pictures()
        plain = [one for one in corpus if one[128:132] == b"DICM"]
        (folder / "images").mkdir()
        (folder / "series").mkdir()
        for number in range(2):
            (folder / "images" / f"{number}.png").write_bytes(saved(Image.new("L", (8, 8), number), "PNG"))
            position = {"SeriesInstanceUID": "1.2.1", "InstanceNumber": number, "PatientID": "P"}
            (folder / "series" / f"{number}.dcm").write_bytes(as_bytes(dicom(RAMP, **position)))
        (folder / "many.dcm").write_bytes(as_bytes(dicom(np.stack([RAMP] * 3), PatientID="P")))
        self.images = options(given(hostile(corpus))(self.image))
        self.headers = options(given(headers(plain))(self.image))
        self.tables = options(given(hostile(TABLES))(self.table))

    def image(self, content: bytes) -> None:
        """An image file, as its content and as a file."""
        hold(lambda: show(content), UndecodableError)
        path = self._folder / "file"
        path.write_bytes(content)
        is_meant_as_image(path)
        frames_of(path, "axial")
        place_in_series(path)

    def table(self, content: bytes) -> None:
        """A manifest, and a table of who is who."""
        manifest = self._folder / "manifest.csv"
        manifest.write_bytes(content)
        shares = Shares(train=0.5, val=0.5, test=0, unlabelled=0)
        choice = Choice("every:2", ("scout",))
        hold(lambda: read_data(self._folder, ("dark", "light"), "patient", shares, 0, choice=choice), SecfacmicError)
        hold(lambda: find_pictures(self._folder, Choice(), Notes()), SecfacmicError)
        hold(lambda: read_settled(manifest), SecfacmicError)
        manifest.unlink()


def bombs() -> Iterator[bytes]:
    """Small files that become as large as they may, and ones that would like to become larger."""
    side = 6324
    for mode, form in (("RGBA", "PNG"), ("LA", "PNG"), ("P", "GIF"), ("RGB", "JPEG")):
        yield saved(Image.new(mode, (side, side)), form, **({"compress_level": 1} if form == "PNG" else {}))
    yield saved(Image.new("L", (side, side)), "TIFF", compression="tiff_adobe_deflate")
    large = np.zeros((side, side), np.uint16)
    packed = dicom(large, RescaleSlope=2, RescaleIntercept=1)
    packed.compress(uid.RLELossless)
    yield as_bytes(packed)
    yield as_bytes(encapsulated(large, uid.JPEGLSLossless, imagecodecs.jpegls_encode(large)))
    huge = imagecodecs.jpeg2k_encode(np.zeros((12_000, 12_000), np.uint8), codecformat="j2k")
    yield as_bytes(encapsulated(np.zeros((8, 8), np.uint8), uid.JPEG2000Lossless, huge))
    deflated = dicom(RAMP)
    deflated.file_meta.TransferSyntaxUID = uid.DeflatedExplicitVRLittleEndian
    start = 144 + struct.unpack("<I", as_bytes(deflated)[140:144])[0]
    engine = zlib.compressobj(wbits=-15)
    yield as_bytes(deflated)[:start] + engine.compress(as_bytes(dicom(RAMP))[start:] + bytes(2**30)) + engine.flush()
    yield gzip.compress(nifti(packed=False) + bytes(2**30), 1)
    yield gzip.compress(nifti(np.zeros((700, 650, 350), np.int16), packed=False), 1)
    yield saved(Image.new("CMYK", (side, side)), "JPEG")
    colours = np.zeros((3650, 3650, 3), np.uint8)
    yield saved(Image.new("RGBA", colours.shape[:2]), "WEBP", lossless=True, method=0)
    yield imagecodecs.jpeg2k_encode(colours, codecformat="jp2")
    inside = imagecodecs.jpeg2k_encode(colours, codecformat="j2k")
    yield as_bytes(encapsulated(colours, uid.JPEG2000Lossless, inside, "RGB"))
    colours = np.zeros((side, side, 3), np.uint8)
    yield as_bytes(encapsulated(colours, uid.JPEGBaseline8Bit, imagecodecs.jpeg8_encode(colours), "RGB"))
    yield imagecodecs.jpeg2k_encode(colours, codecformat="jp2")


def memory(field: str) -> int:
    """Bytes that this process has (``VmRSS``), or the most that it had (``VmHWM``)."""
    status = Path("/proc/self/status").read_text().split(f"{field}:")[1]
    return int(status.split()[0]) * 1024


def start() -> None:
    """Forget what was the most until now."""
    Path("/proc/self/clear_refs").write_text("5")


def main(count: int, targets: str) -> None:
    """Feed so many inputs to each of some readers, and say how much memory the process had at most."""
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as name:
        readers = Readers(Path(name), count)
        start()
        # A mistake must not take the machine; that nothing takes 1 GiB is seen afterwards.
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 3 * MOST_BYTES, used + 3 * MOST_BYTES))
        for target in targets.split():
            getattr(readers, target)()
        print(memory("VmHWM"))


def feed_file(name: str) -> None:
    """Feed one file, and say how much memory the process had at most."""
    content = Path(name).read_bytes()
    start()
    hold(lambda: show(content), UndecodableError)
    print(memory("VmHWM"))


def in_a_process(call: str) -> int:
    """What a function of this file prints in a process of its own."""
    program = f"import sys; sys.path.insert(0, '.'); from tests.unit.clients import test_reading_fuzz as t; t.{call}"
    result = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, "\n".join(line[:300] for line in result.stderr.splitlines()[-60:])
    return int(result.stdout)


@pytest.mark.parametrize("targets", ["images headers tables"] if EXAMPLES < 1000 else ["images", "headers", "tables"])
def test_hostile_files_become_a_picture_or_a_typed_error_in_less_than_1_gib(targets: str) -> None:
    assert in_a_process(f"main({EXAMPLES}, {targets!r})") < MOST_BYTES


@pytest.mark.skipif(EXAMPLES < 1000, reason="a minute; make fuzz")
def test_small_files_that_become_large_take_less_than_1_gib(tmp_path: Path) -> None:
    for number, content in enumerate(bombs()):
        (tmp_path / "bomb").write_bytes(content)
        taken = in_a_process(f"feed_file({str(tmp_path / 'bomb')!r})")
        assert taken < MOST_BYTES, f"bomb {number} took {taken:,} bytes"


def test_the_corpus_is_read() -> None:
    """Otherwise the fuzzer would only ever see the first check."""
    for content in pictures():
        show(content)
        if content[128:132] == b"DICM":
            assert content == content[:_START] + b"".join(_elements(content))

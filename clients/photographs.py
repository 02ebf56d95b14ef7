"""Pictures that Pillow reads: photographs, screenshots, exports of viewers."""

from __future__ import annotations

import io
import math
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image, ImageOps, ImagePalette, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from secure_fed.clients import jpeg
from secure_fed.clients.rules import Picture, Rules, UndecodableError

FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "JPEG2000", "PPM")
"""Those of Pillow's formats that are tried; others are programs' own, or run programs."""

_DRAWN = "secfacmic"
"""Key of a text in each PNG that secfacmic drew over a picture."""
_BITS_PER_SAMPLE = 258
_SAMPLE_FORMAT = 339
_COLOUR_MAP = 320
_DESCRIPTION = 270
_DEPTH = 32997
_DEFLATED = (8, 32946)
_PROFILED = 124
"""Of a BMP's header the size from which on a profile of colours may lie behind the pixels."""

_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
"""Of each pixel of a PNG, by its kind of colours."""

_PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""Of an interlaced PNG: where pixels begin, and how far apart they are, across and down."""

_BLOCK = 2**20
"""So many pixels at once, where more would take memory."""


class PhotographFile:
    """A file with one picture.

    Args:
        content: the file.

    Raises:
        UndecodableError: it has more than 8 bits a channel, or is of no format in :data:`FORMATS`.

    Attributes:
        frames: how many pictures are in it: 1.
    """

    frames = 1

    def __init__(self, content: bytes) -> None:
        self._content = content

    def picture(self, frame: int | None, rules: Rules) -> Picture:
        """The whole picture, turned as its EXIF orientation says, transparency filled with the background.

        Raises:
            UndecodableError: it is broken, too large, or would be turned into something else without a word.
        """
        with _own_limit():
            try:
                if what := no_picture(self._content[:1000]):
                    raise UndecodableError(f"{what}; expected the picture itself")
                image: Image.Image = Image.open(io.BytesIO(self._content), formats=FORMATS)
                coloured = image.format == "JPEG2000" and image.mode != "L"
                rules.refuse_size(*image.size, costly=coloured or image.format == "WEBP")
                _refuse_deep(image, self._content)
                frames = _pictures(image)
                if frames != 1 and image.format != "MPO":  # a camera's MPO is one picture and its previews
                    raise UndecodableError(f"{frames} frames; expected one image a file, DICOM or NIfTI: split it")
                if image.format == "TIFF":
                    _refuse_part(image, self._content)
                if image.format in ("BMP", "PPM"):
                    _refuse_more(image, self._content)
                if image.format == "PNG":
                    _refuse_damaged(self._content)
                _widen_palette(image)
                if image.format in ("JPEG", "MPO"):
                    _refuse_filled(image, self._content)
                image.load()
                if image.format == "PNG":
                    _refuse_few_rows(image, self._content)
                if image.format in ("BMP", "TIFF") and image.mode == "RGBA" and not image.getchannel("A").getbbox():
                    image = image.convert("RGB")  # nobody means a picture of nothing: the fourth byte is unused
                if image.mode[0] in "IF":
                    raise _too_deep(f"mode {image.mode}")
                ImageOps.exif_transpose(image, in_place=True)
                image = _filled(image, rules)
            except UnidentifiedImageError as error:
                if looks_like_one(self._content[:132]):
                    raise UndecodableError(
                        f"begins as {', '.join(FORMATS[:-1])} or {FORMATS[-1]} do, but is broken or of a rare kind (12 "
                        "bits, fractions, lossless JPEG); expected 8 bits a channel: convert it to PNG, or use DICOM"
                    ) from error
                if self._content.startswith(b"\x1f\x8b"):
                    raise UndecodableError("a gzipped file that is no NIfTI; expected it unpacked") from error
                raise UndecodableError(
                    f"no image in a format that is read ({', '.join(FORMATS)}, DICOM, NIfTI); convert it"
                ) from error
            except UndecodableError:
                raise
            except Exception as error:  # Pillow's readers raise of every kind on broken files
                reason = " ".join(str(error).split())[:160] or type(error).__name__
                raise UndecodableError(f"broken image ({reason}); export it again") from error
        if frame is not None:
            raise UndecodableError(
                f"frame {frame} of a file with one image; expected no frame, or multi-frame DICOM or NIfTI"
            )
        return Picture(image)


@contextmanager
def _own_limit() -> Iterator[None]:
    """Pillow's limit on pixels, which the site cannot set, gives way to :attr:`Rules.most_pixels`."""
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _refuse_deep(image: Image.Image, content: bytes) -> None:
    """Refuse more than 8 bits a channel: Pillow would keep the upper 8, black where 12 of 16 are used."""
    depth = 8
    if image.format == "PNG":
        depth = content[24]
    elif image.format == "TIFF":
        tags = image.tag_v2  # type: ignore[attr-defined]
        found, form = (tags.get(tag, (1,)) for tag in (_BITS_PER_SAMPLE, _SAMPLE_FORMAT))
        depth = max(found if isinstance(found, tuple) else (found,))
        if form not in (1, (1,), (1, 1), (1, 1, 1), (1, 1, 1, 1), 4, (4,)):  # 4 is undefined, which is without a sign
            raise UndecodableError(
                f"a TIFF of sample format {form}; expected whole numbers without a sign, as which values matter is for "
                "the site to say: choose a window and convert it, or use DICOM"
            )
    elif image.format == "JPEG2000":
        start = content.find(b"\xff\x4f\xff\x51", 0, 1 << 16)
        if 0 <= start < len(content) - 42:
            if content[start + 42] & 0x80:
                raise UndecodableError(
                    "a JPEG 2000 file of values with a sign; expected none, as which values matter is for the site to "
                    "say: choose a window and convert it, or use DICOM"
                )
            depth = content[start + 42] + 1
            if depth < 8:  # shown as they are, they would be nearly black
                raise UndecodableError(f"a JPEG 2000 file of {depth} bits a channel; expected 8: convert it")
    elif image.format == "PPM":
        header = re.sub(rb"#[^\n]*\n", b" ", content[:4096]).split(maxsplit=4)
        if header[0] in (b"P2", b"P3", b"P5", b"P6") and len(header) > 3 and header[3].isdigit():
            depth = int(header[3][:9]).bit_length()
    if depth > 8:
        raise _too_deep(f"{depth} bits a channel")


def _pictures(image: Image.Image) -> int:
    """How many pictures are in a file, also where a TIFF has them behind one another as if they were one."""
    if image.format == "TIFF":
        tags = image.tag_v2  # type: ignore[attr-defined]
        depth = tags.get(_DEPTH, 1)
        if isinstance(depth, int) and depth > 1:
            return depth
        stack = re.match(r"ImageJ=.*?^images=(\d+)", str(tags.get(_DESCRIPTION, "")), re.DOTALL | re.MULTILINE)
        if stack is not None and int(stack[1]) > 1:
            return int(stack[1])
    return int(getattr(image, "n_frames", 1))


def _refuse_more(image: Image.Image, content: bytes) -> None:
    """Refuse a BMP or PPM with more pixels than its header says, of which a part would be shown, and that askew.

    Raises:
        ValueError: it has them; or other pictures behind the first.
    """
    decoder, _, start, how = image.tile[0]  # type: ignore[attr-defined]
    height = image.height
    if decoder == "ppm_plain":
        digits = re.sub(rb"#[^\n\r]*", b" ", content[start:])
        found = len(digits.translate(None, b" \t\n\r\v\f")) if image.mode == "1" else len(digits.split())
        size = image.width * height * len(image.getbands())
        if found > size:
            raise ValueError(f"{found:,} numbers of {size:,} that its header says")
        return
    if decoder == "raw" and image.format == "BMP":
        row = how[1]
    elif decoder in ("raw", "ppm") and image.mode[0] not in "IF":
        row = math.ceil(image.width / 8) if image.mode == "1" else image.width * len(image.getbands())
    else:  # run lengths say themselves where they end, and fractions are refused as such
        return
    if image.format != "BMP" or int.from_bytes(content[14:18], "little") < _PROFILED:
        _refuse_behind(image, content[start:], row * height)


def _refuse_behind(image: Image.Image, pixels: bytes, size: int) -> None:
    """Refuse pixels that are more than the header of their picture says."""
    behind = pixels[size:]
    # A row or a column less leaves at least as much; padding has one value.
    if len(behind) >= size // max(image.size) and behind != behind[:1] * len(behind):
        raise ValueError(f"{len(pixels):,} bytes of pixels of {size:,} that its header says")


def _refuse_part(image: Image.Image, content: bytes) -> None:
    """Refuse a TIFF that says itself that more, or less, belongs to it than is there: Pillow leaves black what is
    missing; and one whose checksums do not fit, at which libtiff does not look.

    Raises:
        ValueError: it does.
        zlib.error: they do not.
    """
    tags = image.tag_v2  # type: ignore[attr-defined]
    width, height, planes = tags[256], tags[257], tags.get(277, 1) if tags.get(284) == 2 else 1
    if 324 in tags:
        offsets, counts = tags[324], tags.get(325, ())
        parts = math.ceil(width / tags[322]) * math.ceil(height / tags[323]) * planes
    else:
        offsets, counts = tags[273], tags.get(279, ())
        parts = math.ceil(height / (tags.get(278) or height)) * planes
    if len(offsets) != parts:
        raise ValueError(f"{len(offsets)} strips or tiles of {parts}")
    for offset, count in zip(offsets, counts, strict=False) if tags.get(259) in _DEFLATED else ():
        engine, part = zlib.decompressobj(), content[offset : offset + count]
        while part and not engine.eof:
            engine.decompress(part, _BLOCK)
            part = engine.unconsumed_tail
    depths = tags.get(_BITS_PER_SAMPLE, (1,))
    size = math.ceil(width * sum(depths if len(depths) > 1 else depths * tags.get(277, 1)) / 8) * height
    plain = tags.get(259, 1) == 1 and tags.get(262) != 6  # of YCbCr, colours may be thinned out
    if plain and len(counts) > 1 and sum(counts) < size:  # of one alone some writers leave it out
        raise ValueError(f"{sum(counts):,} bytes of pixels of {size:,}")
    if plain and len(counts) == 1:
        _refuse_behind(image, content[offsets[0] : offsets[0] + counts[0]], size)


def _refuse_damaged(content: bytes) -> None:
    """Refuse a PNG whose pixels are others than its writer's: Pillow does not look at their checksums."""
    for kind, at, end in _chunks(content):
        found = zlib.crc32(memoryview(content)[at - 4 : end])
        if kind == b"IDAT" and content[end : end + 4] != found.to_bytes(4, "big"):
            raise UndecodableError(
                f"a PNG that is damaged at byte {at - 8:,} (the checksum of its part IDAT does not fit); expected it "
                "as it was written: copy it again"
            )


def _refuse_filled(image: Image.Image, content: bytes) -> None:
    """Refuse a JPEG in which data are missing: libjpeg makes them up, and says it to nobody.

    Raises:
        ValueError: they are, or there is no end of it.
    """
    # One picture after another, before this one is there itself: two would take too much memory.
    longer, otherwise = (
        _numbers(Image.open(io.BytesIO(one), formats=("JPEG",))) if one else [] for one in jpeg.altered(content)
    )
    found = _numbers(image)
    if found != longer or found == otherwise:
        raise ValueError(jpeg.MISSING)


def _numbers(image: Image.Image) -> list[int]:
    """Of a picture's strips, of which equal pictures have equal ones."""
    return [hash(image.crop(part).tobytes()) for part in _strips(image)]


def _refuse_few_rows(image: Image.Image, content: bytes) -> None:
    """Refuse a PNG of which the last rows are not there: Pillow leaves them black.

    Raises:
        ValueError: they are not.
    """
    last = [
        image.crop((0, row - 1, image.width, row)) for row in (image.height, image.height - 1)
    ]  # in turn, of passes
    if all(row.getbbox(alpha_only=False) is not None for row in last):
        return
    bits = content[24] * _SAMPLES[content[25]]
    size = 0
    for left, top, across, down in _PASSES if content[28] else ((0, 0, 1, 1),):
        width, height = math.ceil((image.width - left) / across), math.ceil((image.height - top) / down)
        size += height * (1 + math.ceil(width * bits / 8)) if width > 0 and height > 0 else 0
    engine, found = zlib.decompressobj(), 0
    for kind, at, end in _chunks(content):
        part = content[at:end] if kind == b"IDAT" else b""
        while part:
            found += len(engine.decompress(part, _BLOCK))
            part = engine.unconsumed_tail
    if found < size:
        raise ValueError(f"{found:,} bytes of pixels of {size:,}")


def _chunks(content: bytes) -> Iterator[tuple[bytes, int, int]]:
    """The parts of a PNG: what each is, where its content begins, and where that ends."""
    at = 8
    while at + 12 <= len(content):
        end = at + 8 + int.from_bytes(content[at : at + 4], "big")
        yield content[at + 4 : at + 8], at + 8, end
        at = end + 4


def _widen_palette(image: Image.Image) -> None:
    """Take a TIFF's colours of 8 bits as that, as libtiff does; Pillow drops the lower 8 of 16."""
    if image.format == "TIFF" and image.mode == "P":
        colours = image.tag_v2.get(_COLOUR_MAP, ())  # type: ignore[attr-defined]
        if colours and max(colours) < 2**8:
            image.palette = ImagePalette.raw("RGB;L", bytes(colours))


def _too_deep(found: str) -> UndecodableError:
    return UndecodableError(
        f"pixels of {found}, more than 8 bits; expected at most 8, as which grey values matter is for the site to say: "
        "choose a window and convert it, or use DICOM"
    )


def _filled(image: Image.Image, rules: Rules) -> Image.Image:
    """The picture without transparency."""
    if image.mode not in ("RGBA", "LA", "PA", "La", "RGBa") and "transparency" not in image.info:
        return image.convert("RGB") if image.mode in ("CMYK", "YCbCr", "LAB", "HSV", "RGBX") else image
    if image.mode == "La":
        image = image.convert("LA")
    whole = Image.new("RGB", image.size)
    for part in _strips(image):  # all at once would take four times the picture's memory
        clear = image.crop(part).convert("RGBA")
        whole.paste(Image.alpha_composite(Image.new("RGBA", clear.size, rules.background), clear).convert("RGB"), part)
    return whole


def _strips(image: Image.Image) -> Iterator[tuple[int, int, int, int]]:
    """Boxes of some rows after others."""
    step = max(1, _BLOCK // image.width)
    for top in range(0, image.height, step):
        yield 0, top, image.width, min(top + step, image.height)


def as_drawn(picture: Image.Image) -> bytes:
    """What was drawn over a picture, as PNG that is never taken for a patient's picture when it is met in a folder."""
    info, content = PngInfo(), io.BytesIO()
    info.add_text(_DRAWN, "drawn over a picture; no picture of a patient itself")
    picture.save(content, "PNG", optimize=True, pnginfo=info)
    return content.getvalue()


def no_picture(head: bytes) -> str:
    """What a file is that secfacmic itself drew over a picture, by its first 1000 bytes; empty of any other."""
    text = b"tEXt" + _DRAWN.encode() + b"\0"
    return "a picture that secfacmic drew a map on" if head.startswith(b"\x89PNG") and text in head else ""


def looks_like_one(head: bytes) -> bool:
    """Whether a file begins as one of :data:`FORMATS` does."""
    return (
        head.startswith(
            (
                *(b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"BM", b"GIF8"),
                *(b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP  "),
            )
        )
        or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")
        or (head[:1] == b"P" and head[1:2] in b"123456" and head[2:3].isspace())
    )

"""How the stored values of a DICOM file become a grey or colour picture: rescale, windows, tables, palettes."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydicom.uid import ExplicitVRBigEndian

from secure_fed.clients.dicom_elements import (
    functional_group,
    number,
    numbers,
    places,
    stored_value,
    text,
    texts,
    whole,
)
from secure_fed.clients.rules import NOT_SQUARE, Facts, Picture, Rules, UndecodableError, are_square, brightness
from secure_fed.protocol.study_tables import Window

GREY = ("MONOCHROME1", "MONOCHROME2")
COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
PALETTE = "PALETTE COLOR"

_UNFOLLOWED = {
    "PresentationLUTSequence": "a presentation table (2050,0010)",
    "RedPaletteColorLookupTableDescriptor": "colours beside the grey values (0028,1101)",
}
"""Of grey pictures."""

_RESCALE = ("PixelValueTransformationSequence", "RescaleSlope", "RescaleIntercept", "ModalityLUTSequence")
_LOOK = ("FrameVOILUTSequence", "WindowCenter", "WindowWidth", "VOILUTSequence")
"""Functional groups, and the elements for which one is taken."""

_SPACINGS = ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing", "PixelAspectRatio")

_BLOCK = 2**20
"""So many pixels are computed with at once: as 64-bit numbers they take eight times what the file has for them."""

SMALL = 2**14
"""So many pixels where little is done with each: the processor's caches then hold all of it."""

Values = Callable[[NDArray[Any]], NDArray[Any]]
"""From some rows of a picture to others of the same shape."""


class Display:
    """How the frames of one file are shown.

    Args:
        dataset: the file.
        facts: what its header says of the picture.
    """

    def __init__(self, dataset: Any, facts: Facts) -> None:
        self._dataset = dataset
        self._facts = facts
        self._colour = text(dataset, "PhotometricInterpretation").upper()

    def picture(self, stored: NDArray[Any], index: int, rules: Rules) -> Picture:
        """A frame's stored values as an 8-bit picture, mode ``L`` or ``RGB``; :meth:`DicomFile.picture` says which.

        Args:
            stored: [height, width] or, of colours, [height, width, 3].
            index: of the frame, from 0.
            rules: of the study and the site.

        Raises:
            UndecodableError: the header says nothing by which they could be shown.
        """
        dataset, colour = self._dataset, self._colour
        notes = [] if self._has_square_pixels(index) else [NOT_SQUARE]
        facts = self._facts._replace(notes=tuple(notes))
        if colour == PALETTE:
            return Picture(self._palette(stored), facts)
        if colour in COLOUR:
            if stored.dtype != np.uint8:
                raise UndecodableError(
                    f"colours of {8 * stored.dtype.itemsize} bits (BitsAllocated (0028,0100)); expected 8: convert it"
                )
            bits = whole(dataset, "BitsStored")
            if 1 <= bits < 8:
                stored = np.rint(stored * (255 / (2**bits - 1))).clip(0, 255).astype(np.uint8)
            return Picture(Image.fromarray(stored), facts)
        notes += [f"{what} passed over" for keyword, what in _UNFOLLOWED.items() if keyword in dataset]
        if text(dataset, "PresentationIntentType").upper() == "FOR PROCESSING":
            notes.append(
                "values as they were measured, not yet processed for the eye (PresentationIntentType (0008,0068))"
            )
        if "MOSAIC" in texts(dataset, "ImageType"):
            notes.append("a mosaic of many slices (ImageType (0008,0008)), shown as it is stored")
        rescaled = self._rescaling(functional_group(dataset, index, *_RESCALE))
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
        group = functional_group(self._dataset, index, "PixelMeasuresSequence", *_SPACINGS)
        for name in _SPACINGS:
            with contextlib.suppress(ValueError):
                if len(sides := [float(side) for side in text(group, name).split("\\")]) == 2:
                    return are_square(*sides)
        return True

    def _rescaling(self, group: Any) -> Values:
        """The modality transform; an empty slope is 1, an empty intercept 0, an empty table none."""
        if (item := _table(group.get("ModalityLUTSequence"))) is not None:
            through = self._through(item, "Modality", self._dataset.get("PixelRepresentation") == 1)
            return lambda stored: through(stored)[0]
        slope = number(group, "RescaleSlope", "(0028,1053)", 1.0)
        intercept = number(group, "RescaleIntercept", "(0028,1052)", 0.0)
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
        voi = functional_group(self._dataset, index, *_LOOK)
        if (item := _table(voi.get("VOILUTSequence"))) is not None:
            through = self._through(item, "VOI", below)

            def table(values: NDArray[Any]) -> NDArray[np.float64]:
                found, depth = through(values)
                return np.asarray(found / (2.0**depth - 1)).clip(0, 1)

            return table
        centres = places(voi, "WindowCenter", "(0028,1050)")
        for centre, width in _pairs(centres, places(voi, "WindowWidth", "(0028,1051)")):
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
        start = _first(first, signed)

        def through(values: NDArray[Any]) -> tuple[NDArray[Any], int]:
            return table[(np.rint(values).astype(np.int64) - start).clip(0, entries - 1)], depth

        return through

    def _refuse_unit(self, window: Window, index: int, below: bool, notes: list[str]) -> None:
        """Check that a window in Hounsfield units meets values in Hounsfield units."""
        group = functional_group(self._dataset, index, *_RESCALE)
        unit = text(group, "RescaleType").upper()
        table = _table(group.get("ModalityLUTSequence")) is not None
        tags = (("RescaleSlope", "(0028,1053)"), ("RescaleIntercept", "(0028,1052)"))
        missing = [] if table else [f"{name} {tag}" for name, tag in tags if not numbers(group, name, tag)]
        if window.unit == "HU" and (unit not in ("", "HU", "US") or missing):
            found = f"no {' and no '.join(missing)}" if missing else f"RescaleType (0028,1054) {unit!r}"
            raise UndecodableError(
                f"the study's window for {window.modality} is in HU, but the file has {found}; expected values in HU: "
                "export it with its rescale, or take it out of the data"
            )
        bits = whole(self._dataset, "BitsStored")
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
        first = stored_value(self._dataset, "PixelPaddingValue", stored.dtype)
        if first is None:
            return None
        last = stored_value(self._dataset, "PixelPaddingRangeLimit", stored.dtype)
        low, high = sorted((first, first if last is None else last))
        found = (stored >= low) & (stored <= high)
        return found if found.any() else None

    def _palette(self, stored: NDArray[Any]) -> Image.Image:
        dataset = self._dataset
        for place, colour in enumerate(("Red", "Green", "Blue"), start=1):
            name = f"{colour}PaletteColorLookupTable"
            entries, _, depth = _descriptor(dataset.get(f"{name}Descriptor"), f"{name}Descriptor (0028,110{place})")
            entries = entries % 2**16 or 2**16
            size = len(dataset.get(f"{name}Data") or b"")
            segmented = not size and bool(dataset.get(f"Segmented{name}Data"))
            if depth not in (8, 16) or not (segmented or size in (entries, entries + entries % 2, 2 * entries)):
                raise UndecodableError(
                    f"{name}Data (0028,120{place}) has {size} bytes, for {entries} entries of {depth} bits; expected "
                    "one or two bytes for each, of 8 or 16 bits: export it again"
                )
        tables = [self._colours(colour) for colour in ("Red", "Green", "Blue")]
        down = 8 if max(int(table.max()) for table, _ in tables) > 255 else 0  # some devices write 8 bits as 16
        shown = np.empty((*stored.shape, 3), dtype=np.uint8)
        for rows in blocks(stored):
            values = stored[rows].astype(np.int64)
            for channel, (table, start) in enumerate(tables):
                shown[rows][..., channel] = (table >> down)[(values - start).clip(0, len(table) - 1)]
        return Image.fromarray(shown)

    def _colours(self, colour: str) -> tuple[NDArray[Any], int]:
        """A palette's entries for red, green or blue, and the value that the first of them is for."""
        name = f"{colour}PaletteColorLookupTable"
        entries, first, depth = _descriptor(self._dataset.get(f"{name}Descriptor"), name)
        entries = entries % 2**16 or 2**16
        data = self._dataset.get(f"{name}Data")
        content = bytes(data or self._dataset.get(f"Segmented{name}Data"))
        if self._dataset.file_meta.TransferSyntaxUID == ExplicitVRBigEndian and len(content) % 2 == 0:
            content = np.frombuffer(content, dtype=">u2").astype("<u2").tobytes()
        # Of one byte an odd number is padded.
        small = len(content) < 2 * entries or (entries == 1 and depth == 8) if data else depth == 8
        table = np.frombuffer(content, dtype=np.uint8 if small else "<u2")
        try:
            table = table[:entries] if data else _unfolded(table, entries)
        except ValueError as error:
            raise UndecodableError(f"Segmented{name}Data {error}: export it again") from None
        return table, _first(first, self._dataset.get("PixelRepresentation") == 1)


def _unfolded(words: NDArray[Any], entries: int) -> NDArray[Any]:
    """A table that is written as segments (PS3.3, C.7.9.2): values, lines between two, and what was there before.

    Args:
        words: as they are stored.
        entries: how many the table has.

    Raises:
        ValueError: it has others, or is none.
    """
    found: list[int] = []
    offset = 4 // words.dtype.itemsize  # of a segment that is taken again, in words; it is in bytes itself

    def take(at: int, most: float, again: bool) -> None:
        while most > 0 and at + 1 < len(words) and (words[at] or words[at + 1]):  # behind the last one is padding
            kind, count = int(words[at]), int(words[at + 1])
            at, most = at + 2, most - 1
            needed = {0: count, 1: 1, 2: offset}.get(kind, len(words))
            # What was taken again is not taken again within that: it might never end.
            if not count or at + needed > len(words) or (kind and not found) or (kind == 2 and again):
                raise ValueError("is not in segments of kinds 0, 1 and 2")
            if kind == 0:
                found.extend(words[at : at + count].tolist())
            elif kind == 1:
                found.extend(np.rint(np.linspace(found[-1], int(words[at]), count + 1)).astype(int).tolist()[1:])
            else:
                take(offset * int.from_bytes(words[at : at + offset].tobytes(), "little") // 4, count, True)
            at += needed
            if len(found) > entries:
                return

    take(0, math.inf, False)
    if len(found) != entries:
        raise ValueError(
            f"unfolds to {'more' if len(found) > entries else len(found)} entries, and its descriptor says {entries}; "
            "expected as many"
        )
    return np.array(found, dtype=words.dtype)


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


def _first(written: int, signed: bool) -> int:
    """The first value mapped, which is written in 16 bits, with a sign where the values may have one."""
    return (written + 2**15) % 2**16 - 2**15 if signed else written % 2**16


def blocks(stored: NDArray[Any], pixels: int | None = None) -> Iterator[slice]:
    """Some rows after others, of about so many pixels."""
    step = max(1, (pixels or _BLOCK) // max(1, stored.shape[1]))
    for start in range(0, len(stored), step):
        yield slice(start, start + step)


def _in_grey(stored: NDArray[Any], look: Values) -> NDArray[np.uint8]:
    """From stored values by way of brightness in [0, 1] to grey; of many pixels each value that there is only once."""
    grey = np.empty(stored.shape, dtype=np.uint8)
    low, high = int(stored.min()), int(stored.max())
    if high - low < stored.size:
        values = np.arange(low, high + 1).astype(stored.dtype)
        table = np.rint(255 * look(values)).astype(np.uint8)
        for rows in blocks(stored, SMALL):
            grey[rows] = table[stored[rows].astype(np.intp) - low]
        return grey
    for rows in blocks(stored):
        grey[rows] = np.rint(255 * look(stored[rows]))
    return grey


def _extremes(dataset: Any, dtype: np.dtype[Any]) -> NDArray[Any]:
    """The least and the greatest value that a file's pixels may have."""
    bits = whole(dataset, "BitsStored")
    ends = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if dtype.kind == "i" else (0, 2**bits - 1)
    return np.array(ends, dtype=dtype)


def _stretched(stored: NDArray[Any], padding: NDArray[np.bool_] | None, rescaled: Values) -> Values:
    """Least and greatest value, padding apart, become black and white."""
    if padding is not None and padding.all():
        padding = None
    low, high = math.inf, -math.inf
    for rows in blocks(stored):
        seen = rescaled(stored[rows] if padding is None else stored[rows][~padding[rows]])
        if seen.size:
            low, high = min(low, float(seen.min())), max(high, float(seen.max()))
    return lambda values: ((values.astype(np.float64) - low) / ((high - low) or 1)).clip(0, 1)


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

"""Elements of DICOM headers, read as their writers meant them."""

from __future__ import annotations

import re
import struct
from functools import cache
from typing import Any

import numpy as np
from pydicom.multival import MultiValue
from pydicom.tag import Tag

from secure_fed.clients.rules import UndecodableError

_tag = cache(Tag)


def _value(dataset: Any, keyword: str) -> Any:
    """An element's value; None if there is none. By keyword pydicom takes as long again, and raises where it is not."""
    return dataset[_tag(keyword)].value if _tag(keyword) in dataset else None


def text(dataset: Any, keyword: str) -> str:
    """An element as text without blanks around; empty if there is none, or none that can be read."""
    try:
        value = _value(dataset, keyword)
        if isinstance(value, MultiValue):  # an id with a backslash, which separates values
            value = "\\".join(map(str, value))
        return "" if value is None else str(value).replace("\0", "").strip()
    except Exception:
        return ""


def texts(dataset: Any, keyword: str) -> list[str]:
    """The parts of an element of several values."""
    try:
        value = _value(dataset, keyword)
        return [value] if isinstance(value, str) else [str(part) for part in value or ()]
    except Exception:
        return []


def whole(dataset: Any, keyword: str) -> int:
    """An element's whole number.

    Raises:
        UndecodableError: it has none.
    """
    try:
        return int(_value(dataset, keyword))
    except Exception:
        raise UndecodableError(f"{keyword} is missing or no number; expected a whole number above 0") from None


def numbers(dataset: Any, keyword: str, tag: str) -> list[float]:
    """:func:`places` without the empty ones."""
    return [number for number in places(dataset, keyword, tag) if number is not None]


def number(dataset: Any, keyword: str, tag: str, default: float) -> float:
    """An element's one number.

    Raises:
        UndecodableError: it has several.
    """
    found = set(numbers(dataset, keyword, tag)) or {default}
    if len(found) > 1:
        raise UndecodableError(f"{keyword} {tag} has {len(found)} values; expected one: export the file again")
    return found.pop()


def places(dataset: Any, keyword: str, tag: str) -> list[float | None]:
    """An element's decimal numbers, as their writers meant them: blanks around, a comma for the point; None if empty.

    Raises:
        UndecodableError: one is no number, or might be two.
    """
    if _tag(keyword) not in dataset:
        return []
    element = dataset.get_item(_tag(keyword))
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


def stored_value(dataset: Any, keyword: str, dtype: np.dtype[Any]) -> int | None:
    """An element that is written as pixels are, whatever sign its writer gave it."""
    try:
        value = _value(dataset, keyword)
        if isinstance(value, bytes):
            value = struct.unpack("<H", value[:2])[0]
        if value is None:
            return None
        bits = 8 * dtype.itemsize
        wrapped = int(int(value) % 2**bits)
        return wrapped - 2**bits if dtype.kind == "i" and wrapped >= 2 ** (bits - 1) else wrapped
    except Exception:  # a value of another kind pads nothing
        return None


def functional_group(dataset: Any, index: int, name: str, *elements: str) -> Any:
    """The frame's own functional group of that name, else the one shared by all frames, else the whole file: the first
    of them in which one of the elements has a value, as some devices write groups without."""
    for sequence, place in (("PerFrameFunctionalGroupsSequence", index), ("SharedFunctionalGroupsSequence", 0)):
        groups = _value(dataset, sequence)
        found = groups[place].get(name) if groups and place < len(groups) else None
        if found and any(_is_filled(found[0], element) for element in elements):
            return found[0]
    return dataset


def _is_filled(dataset: Any, keyword: str) -> bool:
    """Whether an element has a value, even one that cannot be read."""
    value = dataset.get_item(_tag(keyword)).value if _tag(keyword) in dataset else None
    if isinstance(value, bytes):
        value = value.strip(b" \0\\")
    return value is not None and (not hasattr(value, "__len__") or len(value) > 0)

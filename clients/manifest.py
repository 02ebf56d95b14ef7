"""Tables of hospitals and spreadsheets, read as text: nothing in a cell becomes a number, and no row shifts."""

from __future__ import annotations

import csv
import io
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from secure_fed.core.errors import ManifestError, fault_lines

_MOST_LETTERS = 1000
"""Of a cell; where a quote is not closed, a cell takes in all that follows."""

_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}

_GUESSED = "cp1252"
_SIGNS = "\u00a3\u00a5-\u00a9\u00ac"
_MORE_SIGNS = (
    r"\u00a4\u00ab\u00ae\u00af\u00b1\u00b6\u00b8\u00b9\u00bb-\u00bf\u00d7\u00f7\u0192\u02c6\u02dc"
    r"\u2018\u201a\u201c-\u201e\u2020-\u2022\u2026\u2030\u2039\u203a\u20ac\u2122"
)
_NO_NAME = re.compile(
    # Letters of other encodings become capitals behind small letters, or between a capital and a small one, ...
    r"(?<=[a-z\u00df-\u00ff])[\u00c0-\u00de\u0160\u0178\u017d]|(?<=[^\W\d_])[\u0178\u0160\u017d](?=[a-z])"
    # ... signs within words and before them, ...
    rf"|[^\W\d_][{_SIGNS}{_MORE_SIGNS}]+[^\W\d_]|(?<!\w)[{_SIGNS}][^\W\d_]"
    # ... words without a Latin letter, ...
    r"|(?<!\w)[\u00c0-\u00ff\u0152\u0153\u0160\u0161\u0178\u017d\u017e\u0192]{3,}(?!\w)|(?<!\w)[\u00c0-\u00de][\u00e0-\u00ff](?!\w)"
    # ... signs that are in no name, others before a letter, dashes that begin a word, ...
    r"|[\u00a4\u00a6\u00ac\u00b6\u0192\u02c6\u02dc\u2020-\u2022\u2030\u2039\u203a]"
    r"|[\u00b1-\u00b3\u00b8\u00b9\u00bb-\u00be][^\W\d_]|(?<!\w)[\u2013\u2014][^\W\d_]"
    # ... and quotes that only begin.
    r"|[\u201a\u201e](?!.*[\u2018\u201c\u201d])|^[^\u201e]*\u201c(?!.*\u201d)"
)
"""What is in nobody's name, in Windows-1252."""


class Row(NamedTuple):
    """One row: its line in the file (from 1), and its cells by column, without blanks around."""

    line: int
    cells: dict[str, str]


class Table(NamedTuple):
    """A table of texts.

    Attributes:
        columns: names, without blanks around.
        rows: those that are not empty.
        told: what was sniffed and not as expected, in words.
    """

    columns: tuple[str, ...]
    rows: list[Row]
    told: list[str]


def read_table(path: Path, known: Sequence[str], needed: Sequence[str]) -> Table:
    """Read a CSV file as its writer meant it, where that is beyond doubt.

    UTF-8, UTF-16 and, where it is neither, Windows-1252, if that makes no names that nobody has; commas, semicolons,
    tabs or bars, by the header or a spreadsheet's ``sep=`` line.

    Args:
        path: the file.
        known: names of columns that mean something; one that differs from them in form alone is refused.
        needed: those by which the header's separator is known.

    Raises:
        ManifestError: it cannot be read, or is of another encoding; two columns have one name or one that is nearly
            known; rows have more or fewer cells than the header. All rows are told together, by line.
    """
    text, encoding, told = _decoded(path)
    skipped = 0
    separator = ""
    if match := re.match(r'"?sep=(.)"?[;,\t]*\r?\n', text, re.IGNORECASE):
        separator, skipped, text = match[1], 1, text[match.end() :]
        told.append(f"{path}: separated by {separator!r}, as its first line says")
    elif (separator := _separator(text, needed)) != ",":
        told.append(f"{path}: separated by {_SEPARATORS[separator]}")
    found = _cells(path, text, separator, skipped)
    while found and not any(found[0][1]):
        found.pop(0)
    if not found:
        return Table((), [], told)
    line_of_header, header = found[0]
    while not header[-1]:
        header.pop()
    _refuse_header(path, line_of_header, header, known)
    rows, faults, empty = [], [], 0
    for line, cells in found[1:]:
        if not any(cells):
            empty += 1
        elif len(cells) < len(header) or any(cells[len(header) :]):
            faults.append(f"line {line}: {len(cells)} cells; expected {len(header)}, as in the header")
        else:
            rows.append(Row(line, {name: cell for name, cell in zip(header, cells, strict=False) if name}))
    if faults:
        hint = "put quotes around cells that hold a separator, and add what is missing"
        if not {name.casefold() for name in header}.intersection(needed):
            hint = f"its header, line {line_of_header}, has none of {', '.join(needed)}: remove what stands before the "
            hint += "header, or use one separator throughout"
        raise ManifestError(
            f"{path}: {len(faults)} row{'s' * (len(faults) > 1)} with cells too many or too few; "
            f"{hint}{fault_lines(faults)}"
        )
    if empty:
        told.append(f"{path}: {empty} empty rows passed over")
    if encoding == _GUESSED:
        told.insert(0, _guessed(path, [name for name in header if name], rows, (*known, *needed)))
    return Table(tuple(header), rows, told)


def _guessed(path: Path, header: Sequence[str], rows: Sequence[Row], meant: Sequence[str]) -> str:
    """What hangs on the guess of an encoding, in words.

    Raises:
        ManifestError: by it, columns that mean something would have what is in nobody's name.
    """
    forms = {plain_form(name) for name in meant}
    columns = [name for name in header if plain_form(name) in forms]
    cells = [(row.line, name, row.cells[name]) for row in rows for name in columns if not row.cells[name].isascii()]
    if odd := next((cell for cell in cells if _NO_NAME.search(unicodedata.normalize("NFC", cell[2]))), None):
        raise ManifestError(
            f"{path}: neither UTF-8 nor Windows-1252, by which line {odd[0]} would say {odd[2][:80]!r} in column "
            f"{odd[1]}; expected a CSV file in UTF-8 (of Excel: CSV UTF-8): save it again as that"
        )
    # No cell itself: this goes into logs, which are shown to others.
    by = f", on which line {cells[0][0]}, column {cells[0][1]}, hangs" if cells else ""
    return f"{path}: not UTF-8, read as Windows-1252{by}; save it as UTF-8 if letters are wrong"


def _decoded(path: Path) -> tuple[str, str, list[str]]:
    """A file's text, its encoding, and what is to be told of that."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ManifestError(f"{path}: cannot be read ({error.strerror}); expected a CSV file there") from error
    told = []
    encoding = "utf-8-sig"
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        encoding = "utf-16"
        told.append(f"{path}: read as UTF-16")
    elif len(content) > 3 and (order := _unmarked(content)):
        encoding = order
        told.append(f"{path}: read as UTF-16, though it has no mark")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        try:
            if encoding != "utf-8-sig":
                raise
            text = content.decode(_GUESSED)
            encoding = _GUESSED
        except UnicodeDecodeError:
            raise ManifestError(
                f"{path}: cannot be read ({encoding.removesuffix('-sig')} ends at byte {error.start}); expected a CSV "
                "file in UTF-8: save it again as that"
            ) from error
    if "\0" in text:
        raise ManifestError(
            f"{path}: cannot be read (byte 0 in line {text[: text.index(chr(0))].count(chr(10)) + 1}); expected a CSV "
            "file in UTF-8, not a spreadsheet's own file: save it again as that"
        )
    return text, encoding, told


def _unmarked(content: bytes) -> str:
    """UTF-16 without a mark, by the zero in each of the header's letters; empty if it is not that."""
    head = content[:64]
    zeros = [head[start::2].count(0) / len(head[start::2]) for start in (0, 1)]
    if max(zeros) < 0.9 or min(zeros) > 0:
        return ""
    return "utf-16-be" if zeros[0] > zeros[1] else "utf-16-le"


def _separator(text: str, needed: Sequence[str]) -> str:
    """The one separator by which the header has a column that is needed; the comma if there is no such."""
    header = next((line for line in text.splitlines() if line.strip()), "")
    fitting = []
    for separator in _SEPARATORS:
        names = {name.strip().casefold() for name in next(csv.reader([header], delimiter=separator), [])}
        if names.intersection(needed):
            fitting.append(separator)
    several = [separator for separator in fitting if separator in header]
    return several[0] if len(several) == 1 else ","


def _cells(path: Path, text: str, separator: str, skipped: int) -> list[tuple[int, list[str]]]:
    """All rows, each with the line that it begins in (why by this reader: docs/decisions/0030-tables-by-csv.md)."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    found, line = [], skipped + 1
    try:
        for cells in reader:
            if (longest := max(map(len, cells), default=0)) > _MOST_LETTERS:
                raise ManifestError(
                    f"{path}: line {line}: a cell of {longest:,} letters; expected at most {_MOST_LETTERS:,}: look for "
                    "a quote without its other, or whether this is a table at all"
                )
            found.append((line, [cell.strip() for cell in cells]))
            line = skipped + reader.line_num + 1
    except csv.Error as error:
        raise ManifestError(
            f"{path}: line {line}: cannot be read as CSV ({error}); expected quotes in pairs, around whole cells"
        ) from error
    return found


def _refuse_header(path: Path, line: int, header: Sequence[str], known: Sequence[str]) -> None:
    """Refuse names that are there twice, and names that differ from known ones in form alone."""
    faults = []
    first: dict[str, int] = {}
    forms = {plain_form(name): name for name in known} | ({} if "patient" in header else {"patientid": "patient"})
    for place, name in enumerate(header, start=1):
        if not name:
            continue
        meant = forms.get(plain_form(name), name)
        if meant in first:
            faults.append(
                f"column {place}, {name!r}, has the name of column {first[meant]}: keep one, rename the other"
            )
        elif meant != name:
            faults.append(f"column {place} is named {name!r}; expected {meant!r}: rename it, or remove it")
        first.setdefault(meant, place)
    if faults:
        raise ManifestError(f"{path}: line {line}: " + "; ".join(faults))


def plain_form(name: str) -> str:
    """A name without what people write in one way or another: case, blanks, signs, and Unicode's forms."""
    return re.sub(r"[\W_]+", "", unicodedata.normalize("NFKC", name)).casefold()

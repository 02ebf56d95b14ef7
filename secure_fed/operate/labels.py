"""Labels from a hospital's own table, joined to what its image archive has: by accession number, or by patient."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secure_fed.clients.manifest import read_table
from secure_fed.clients.patients import in_one_form
from secure_fed.core.errors import ManifestError, fault_lines
from secure_fed.operate.dicomweb import PacsImage

_NAMES = {
    "accession": {"accession", "accessionnumber", "accessionno"},
    "patient": {"patient"},
    "label": {"label", "class"},
}


@dataclass(frozen=True, slots=True)
class _Row:
    line: int
    accession: str
    patient: str
    label: str

    @property
    def key(self) -> str:
        return f"accession {self.accession}" if self.accession else f"patient {self.patient}"


@dataclass(frozen=True)
class Joined:
    """What became of the rows of a table, and of the studies that were found.

    Attributes:
        labels: by StudyInstanceUID.
        rows: how many there are.
        left: rows that fit no study, in words.
        bare: studies without a label, in words.
        bare_images: how many images these have.
    """

    labels: dict[str, str]
    rows: int
    left: tuple[str, ...]
    bare: tuple[str, ...]
    bare_images: int

    def label(self, image: PacsImage) -> str:
        """The label of an image; empty if it has none."""
        return self.labels.get(image.study, "")

    def document(self) -> dict[str, Any]:
        """As a JSON document."""
        return {
            "rows": self.rows,
            "rows_joined": self.rows - len(self.left),
            "rows_not_joined": list(self.left),
            "studies_without_label": list(self.bare),
            "images_without_label": self.bare_images,
        }


@dataclass(frozen=True)
class Labels:
    """A table of labels.

    Attributes:
        path: of its file.
        rows: those with a label.
        told: what was sniffed, in words.
    """

    path: Path
    rows: tuple[_Row, ...]
    told: tuple[str, ...] = ()

    @classmethod
    def read(cls, path: Path) -> Labels:
        """Read a table: a header with ``label``, and ``accession`` or ``patient`` or both; other columns are free.

        Raises:
            ManifestError: it cannot be read, lacks a column, has one twice, or has rows that contradict each other;
                the first ten are listed.
        """
        rows, faults = [], []
        lines, told = _lines(path)
        for line, cells in lines:
            row = _Row(line, cells.get("accession", ""), cells.get("patient", ""), cells["label"])
            if not row.accession and not row.patient:
                faults.append(f"line {line}: a label and neither accession number nor patient")
            for name in ("accession", "patient"):
                if re.search(r"[*?\\]", cells.get(name, "")):
                    faults.append(f"line {line}: {name} {cells[name]!r} has *, ? or \\ in it, which match anything")
            rows.append(row)
        first: dict[tuple[str, str], _Row] = {}
        for row in rows:
            other = first.setdefault((row.accession, "" if row.accession else row.patient), row)
            if (other.label, other.patient) != (row.label, row.patient):
                faults.append(
                    f"line {row.line}: {row.key} is {row.label!r}{_of(row)}, and on line {other.line} "
                    f"{other.label!r}{_of(other)}"
                )
        _refuse(path, faults)
        if not rows:
            raise ManifestError(f"{path}: no row with a label; expected one a study or patient")
        return cls(path, tuple(rows), told)

    def queries(self) -> Iterator[dict[str, str]]:
        """A query for each accession number, or patient, once."""
        told: set[tuple[str, str]] = set()
        for row in self.rows:
            key = ("AccessionNumber", row.accession) if row.accession else ("PatientID", row.patient)
            if key not in told:
                told.add(key)
                yield dict([key])

    def join(self, images: Sequence[PacsImage]) -> Joined:
        """Give studies their labels. A row with an accession number is of that study alone, others of all a patient's.

        Raises:
            ManifestError: two labels fit one study, a row's patient is another than the archive's, or a row's accession
                number is of several patients; the first ten are listed.
        """
        counts = Counter(image.study for image in images)
        studies = {image.study: image for image in images}
        by_accession: dict[str, list[_Row]] = defaultdict(list)
        by_patient: dict[str, list[_Row]] = defaultdict(list)
        for row in self.rows:
            (by_accession[row.accession] if row.accession else by_patient[row.patient]).append(row)
        owners: dict[str, set[str]] = defaultdict(set)
        for study in studies.values():
            owners[study.accession].add(study.patient)
        labels: dict[str, str] = {}
        used: set[int] = set()
        faults: list[str] = []
        for uid, study in sorted(studies.items()):
            rows = (by_accession[study.accession] if study.accession else []) + by_patient[study.patient]
            for row in rows:
                if row.accession and row.patient and row.patient != study.patient:
                    faults.append(
                        f"line {row.line}: {row.key} is of patient {row.patient!r}, and in the archive of "
                        f"{study.patient!r}"
                    )
                elif row.accession and not row.patient and len(owners[row.accession]) > 1:
                    faults.append(
                        f"line {row.line}: {row.key} is of several patients in the archive: "
                        f"{', '.join(sorted(owners[row.accession]))}; add a column patient"
                    )
                used.add(row.line)
            found = {row.label for row in rows}
            if len(found) > 1:
                lines = ", ".join(f"line {row.line}: {row.label!r}" for row in rows)
                faults.append(f"accession {study.accession}, patient {study.patient}: two labels fit it ({lines})")
            elif found:
                labels[uid] = found.pop()
        _refuse(self.path, faults)
        known = {study.accession for study in studies.values()}, {study.patient for study in studies.values()}
        left = [_left(row, *known) for row in self.rows if row.line not in used]
        bare = [
            f"accession {study.accession or 'none'}, patient {study.patient or 'none'}: {counts[uid]} images"
            for uid, study in sorted(studies.items())
            if uid not in labels
        ]
        missing = sum(count for uid, count in counts.items() if uid not in labels)
        return Joined(labels, len(self.rows), tuple(left), tuple(bare), missing)


def _of(row: _Row) -> str:
    return f" of patient {row.patient}" if row.accession and row.patient else ""


def _left(row: _Row, accessions: set[str], patients: set[str]) -> str:
    """Why a row fits no study, as far as its form tells."""
    written = row.accession or row.patient
    known = accessions if row.accession else patients
    near = sorted(other for other in known if other and _loose(other) == _loose(written))
    hint = ""
    if near:
        hint = f"; the archive has {', '.join(near[:3])}, which is not the same"
    elif re.fullmatch(r"\d([.,]\d+)?E\+\d+", written, re.IGNORECASE):
        hint = "; a spreadsheet has rounded it: keep that column as text"
    return f"line {row.line}: {row.key}: no such study was found{hint}"


def _loose(text: str) -> str:
    """What two writings of one number have in common."""
    return re.sub(r"\.0$|[\s_/-]", "", text.casefold()).lstrip("0")


def _lines(path: Path) -> tuple[list[tuple[int, dict[str, str]]], tuple[str, ...]]:
    """The rows that have a label, with their line, cells by our names for the columns; and what was sniffed."""
    table = read_table(path, (), tuple(name for names in _NAMES.values() for name in names))
    columns: dict[str, str] = {}
    for head in table.columns:
        plain = re.sub(r"[\s_-]", "", in_one_form(head).casefold())
        name = next((name for name, names in _NAMES.items() if plain in names), None)
        if name is not None and name in columns:
            raise ManifestError(f"{path}: columns {columns[name]!r} and {head!r} both say {name}; expected one")
        if name is not None:
            columns[name] = head
    if "label" not in columns or len(columns) < 2:
        raise ManifestError(
            f"{path}: columns {', '.join(table.columns) or 'none'}; expected label, and accession or patient"
        )
    rows = [(line, {name: in_one_form(cells[head]) for name, head in columns.items()}) for line, cells in table.rows]
    return [(line, row) for line, row in rows if row["label"]], tuple(table.told)


def _refuse(path: Path, faults: Sequence[str]) -> None:
    if faults:
        count = f"{len(faults)} contradictions" if len(faults) > 1 else "1 contradiction"
        raise ManifestError(f"{path}: {count}; expected a label that is certain: mend the table{fault_lines(faults)}")

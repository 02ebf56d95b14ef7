"""Whose images are whose: ids in one form, ids that may be one patient twice or many in one, and what settles that."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from secure_fed.clients.manifest import read_table
from secure_fed.core.errors import ManifestError

SETTLED = "patients.csv"
"""Beside the manifest: columns ``id`` and ``same_as``, by which people settle what ids leave open."""

MOST_SHARE = 0.5
FEWEST_IMAGES = 10
"""Of at least so many images no patient has more than :data:`MOST_SHARE`."""

_BLANKS = "\ufeff\u200b\u200c\u200d\u2060\0"
_PLACEHOLDERS = frozenset(
    {
        *("nan", "none", "null", "na", "nil", "undefined", "unknown", "missing", "empty", "default", "dummy", "test"),
        *("anon", "anonym", "anonymous", "anonymized", "anonymised", "anonymous1", "deidentified", "pseudonym"),
        *("removed", "redacted", "patient", "patientid", "id", "noid", "noname", "tbd", "x", "xxx", "xxxx"),
        *("unbekannt", "inconnu", "desconocido", "sconosciuto"),
    }
)
_DAMAGE = re.compile(
    r"[+-]?\d+([.,]\d+)?E[+-]?\d+|#(REF|NAME|VALUE|NULL|NUM|DIV/0|N/A|WERT|BEZUG|NV).*|#+"
    r"|\d{1,2}[-. ](jan|feb|m[aä]r|mrz|apr|ma[iy]|jun|jul|aug|sep|o[ck]t|nov|de[cz])[a-z]*\.?([- ]\d{2,4})?"
    r"|\d{4}-\d\d-\d\d 00:00:00",
    re.IGNORECASE,
)

Kind = Literal["writings", "placeholder", "spreadsheet", "share"]
_WORDS: dict[Kind, str] = {
    "writings": "may be one patient in several writings",
    "placeholder": "is a placeholder and may stand for many patients",
    "spreadsheet": "is what a spreadsheet makes of an id, and may stand for many patients",
    "share": f"has more than {MOST_SHARE:.0%} of all images",
}


class Doubt(NamedTuple):
    """Ids that may not tell patients apart.

    Attributes:
        kind: what is wrong.
        ids: of whom.
        images: that they have together.
    """

    kind: Kind
    ids: tuple[str, ...]
    images: int

    @property
    def text(self) -> str:
        """In words."""
        return f"{', '.join(map(repr, self.ids))} ({self.images} images) {_WORDS[self.kind]}"


def in_one_form(patient: str) -> str:
    """An id without what is only form: Unicode NFC, no blanks around."""
    return unicodedata.normalize("NFC", patient.strip(_BLANKS).strip().strip(_BLANKS))


def doubts(counts: Mapping[str, int], settled: Collection[str] = ()) -> list[Doubt]:
    """What ids leave open.

    Args:
        counts: images by id.
        settled: ids of which people have said that each is one patient of its own.

    Returns:
        Sorted; of ids in several writings those groups of which more than one id is not settled.
    """
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for patient in counts:
        groups[_key(patient)].append(patient)
    found = [
        Doubt("writings", tuple(sorted(group)), sum(counts[one] for one in group))
        for group in groups.values()
        if len(group) > 1 and sum(one not in settled for one in group) > 1
    ]
    total = sum(counts.values())
    for patient, images in counts.items():
        if patient in settled:
            continue
        plain = re.sub(r"[\W_]+", "", patient).casefold()
        if not plain.strip("0") or plain.lstrip("0") in _PLACEHOLDERS or patient in ("-1", "?"):
            found.append(Doubt("placeholder", (patient,), images))
        elif _DAMAGE.fullmatch(patient):
            found.append(Doubt("spreadsheet", (patient,), images))
        elif total >= FEWEST_IMAGES and images > MOST_SHARE * total:
            found.append(Doubt("share", (patient,), images))
    return sorted(found)


def similar(patient: str, known: Iterable[str]) -> list[str]:
    """At most five known ids that somebody may have meant."""
    names = sorted(set(known))
    alike = [name for name in names if _key(name) == _key(patient)]
    return list(dict.fromkeys([*alike, *difflib.get_close_matches(patient, names, n=5)]))[:5]


def read_settled(path: Path) -> tuple[dict[str, str], frozenset[str]]:
    """Who is whom, as people have settled it.

    A row whose ``same_as`` names another id gives its images to that one; where it is empty, or the id itself, the id
    is a patient of its own.

    Returns:
        From ids to the ids that hold for them; ids that are settled as their own.

    Raises:
        ManifestError: it is malformed, names an id twice, or goes in a circle.
    """
    table = read_table(path, ("id", "same_as"), ("id", "same_as"))
    missing = [name for name in ("id", "same_as") if name not in table.columns]
    if missing:
        raise ManifestError(f"{path}: no column {', '.join(missing)}; expected id and same_as")
    same: dict[str, str] = {}
    own = set()
    for row in table.rows:
        patient, other = in_one_form(row.cells["id"]), in_one_form(row.cells["same_as"])
        if not patient or patient in same or patient in own:
            raise ManifestError(
                f"{path}: line {row.line}: id {patient!r} is {'there already' if patient else 'empty'}; expected each "
                "id once"
            )
        if other in ("", patient):
            own.add(patient)
        else:
            same[patient] = other
    for patient, other in same.items():
        if other in same:
            raise ManifestError(
                f"{path}: {patient!r} is the same as {other!r}, which is itself the same as {same[other]!r}; expected "
                "the id that holds"
            )
    return same, frozenset(own)


def _key(patient: str) -> str:
    """Equal for ids that differ by case, blanks, kinds of dash, leading zeros or a spreadsheet's ``.0``."""
    plain = unicodedata.normalize("NFKC", patient).casefold()
    plain = re.sub(r"[\s_\u200b-\u200d\u2060\ufeff\u00ad]+", "", plain)
    plain = re.sub(r"[\u2010-\u2015\u2212]", "-", plain)
    plain = re.sub(r"^(\d+)[.,]0+$", r"\1", plain)
    return re.sub(r"\d+", lambda digits: digits[0].lstrip("0") or "0", plain)

"""Whose images are whose: ids in one form, ids that may be one patient twice or many in one, and what settles that."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections import Counter, defaultdict
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
        *("anonymisiert", "anonymise", "anonyme", "anonimo", "anonimizado", "anonimizzato", "anonymizer", "deid"),
        *("pseudo", "pseudonymized", "pseudonymised", "pseudonymisiert", "unidentified", "identified", "de"),
        *("removed", "redacted", "patient", "patientid", "id", "noid", "noname", "tbd", "deleted", "erased"),
        *("hidden", "masked", "withheld", "confidential", "private", "protected", "blank", "cleared", "scrubbed"),
        *("sanitized", "sanitised", "obfuscated", "value", "subject", "person", "dicom"),
        *("x", "xx", "xxx", "xxxx"),
        *("unbekannt", "inconnu", "desconocido", "sconosciuto", "unk", "name", "not", "available", "applicable", "no"),
        *("number", "mrn", "pid", "true", "false", "wahr", "falsch", "leer", "vide", "ka"),
    }
)
_NOBODY = re.compile(
    r"(unknown|unk|unidentified|missing|unbekannt|inconnu|desconocido|sconosciuto|undefined|noname|noid|dummy|default"
    r"|anon(ym(ous|ized|ised|isiert|e)?|imo)?)[\W_]*\d+",
    re.IGNORECASE,
)
"""A placeholder with a number: nobody's beside ids of another kind, the site's pseudonyms where most ids are such."""

_MONTH = r"(jan|feb|m[aä]r|mrz|apr|ma[iy]|jun|jul|aug|sep|o[ck]t|nov|de[cz])[a-z]*\.?"
_DAY = r"(0?[1-9]|[12]\d|3[01])"  # or a month
_TIME = r"\d{1,2}:\d\d(:\d\d([.,]\d+)?)?( ?[AP]M)?"
_DAMAGE = re.compile(
    r"[+-]?\d+([.,]\d+)?E[+-]?\d+|#\S+[!?]|#N/?[AV]|#+|=.*"
    rf"|(\d{{1,2}}[-. ]{{1,2}}{_MONTH}([- ]\d{{2,4}})?|{_MONTH}[-. ]\d{{1,4}}|{_MONTH} {_DAY},? \d{{4}}"
    r"|\d{4}[./-]\d\d?[./-]\d\d?"
    rf"|{_DAY}(?P<dash>[./-]){_DAY}(?P=dash)(\d\d|\d{{4}}))([T ]{_TIME})?|{_TIME}",
    re.IGNORECASE,
)

_LOST = re.compile(r"\ufffd|[^\W\d_]\?[^\W\d_]")
"""What a letter becomes that could not be read, or written."""

_LOOKALIKES = str.maketrans(
    "\u0430\u0432\u0435\u043a\u043c\u043d\u043e\u0440\u0441\u0442\u0443\u0445\u0455\u0456\u0458"  # Cyrillic
    "\u03b1\u03b2\u03b5\u03b6\u03b7\u03b9\u03ba\u03bc\u03bd\u03bf\u03c1\u03c4\u03c5\u03c7",  # Greek
    "abekmhopctyxsijabezhikmnoptyx",
)
"""Letters whose capitals cannot be told from Latin ones, after :meth:`str.casefold`."""

_CALLED = re.compile(
    r"(?:patient(?:en|in)?|pat|pt|pid|person|p|mrn|id|case|fall|caso|cas|subject|subj|sub|number|nummer|num|nr|no"
    r"|[\s_.:#/\\-])*+(?=\d)"
)
"""What an id, in small letters, may have before its number, as other exports do not."""

_PART = re.compile(
    r"(?<=\d)(?:[\s_.-]*(?:left|right|links|rechts|lt|rt|le|re|gauche|droite?|izquierd[ao]|derech[ao]|sinist(?:er|ra)"
    r"|dext(?:er|ra)|o[dsu])"
    r"|[\s_.-]+(?:[lrg]|(?:copy|kopie|copie|copia|ses(?:sion)?|visite?|visita|besuch|timepoint|time|tp|t|v|scan|exam|study"
    r"|baseline|bl|follow[\s_-]?up|fup?|pre|post|before|after|day|week|month|year|m|y)(?:[\s_.-]*\d+)?)"
    r"|\s*\(\d+\))+$"
)
"""What an id, in small letters, may have behind its number: a side, a visit, which copy it is."""

_YEAR = re.compile(r"(?<=\d)[\s_.-]+(19|20)\d\d$")
"""What may be the year of a visit, and as well a number."""

Kind = Literal["writings", "placeholder", "spreadsheet", "share", "header", "issuers", "picture", "classes"]
_WORDS: dict[Kind, str] = {
    "writings": "may be one patient in several writings",
    "placeholder": "is a placeholder and may stand for many patients",
    "spreadsheet": "is what a spreadsheet makes of an id, and may stand for many patients",
    "share": f"has more than {MOST_SHARE:.0%} of all images",
}
MANY_IN_ONE: frozenset[Kind] = frozenset({"placeholder", "spreadsheet", "header", "issuers"})
"""Doubts whether what goes by one id is of one person."""

NAMED = 10
"""Ids that a doubt names; others are counted."""


class Doubt(NamedTuple):
    """Ids that may not tell patients apart.

    Attributes:
        kind: what is wrong.
        ids: of whom.
        images: that it is about.
        found: what is wrong, in words, where the kind alone does not say it.
    """

    kind: Kind
    ids: tuple[str, ...]
    images: int
    found: str = ""

    @property
    def text(self) -> str:
        """In words."""
        ids = some(map(repr, self.ids))
        return f"{ids} ({self.images} image{'s' * (self.images != 1)}) {self.found or _WORDS[self.kind]}"

    @property
    def remedy(self) -> str:
        """What to do."""
        if self.kind == "classes":
            return "give the picture one label, or take it out"
        return f"mend it, or settle it in {SETTLED}"


def some(names: Iterable[str]) -> str:
    """The first names, and how many there are beside them."""
    listed = list(names)
    more = f" and {len(listed) - NAMED} more" if len(listed) > NAMED else ""
    return ", ".join(listed[:NAMED]) + more


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
    found = [
        Doubt("writings", tuple(group), sum(counts[one] for one in group))
        for group in by_writing(counts)
        if are_open(group, settled)
    ]
    total = sum(counts.values())
    # A spreadsheet's numbers have 15 digits: of longer ones it leaves zeros, in all of them.
    long = {patient for patient in counts if re.fullmatch(r"\d{16,}", patient)}
    cut = long if all(re.fullmatch(r"\d{15}0+", patient) for patient in long) else set()
    numbered = {patient for patient in counts if _NOBODY.fullmatch(patient)}
    nobody = numbered if 2 * len(numbered) <= len(counts) else set()
    for patient, images in counts.items():
        if patient in settled:
            continue
        if says_nothing(patient) or patient in nobody:
            found.append(Doubt("placeholder", (patient,), images))
        elif _LOST.search(patient):
            words = "has a letter that was lost with its encoding, and may stand for many patients"
            found.append(Doubt("placeholder", (patient,), images, words))
        elif _DAMAGE.fullmatch(patient) or patient in cut:
            found.append(Doubt("spreadsheet", (patient,), images))
        elif total >= FEWEST_IMAGES and images > MOST_SHARE * total:
            found.append(Doubt("share", (patient,), images))
    return sorted(found)


def by_writing(patients: Iterable[str]) -> list[list[str]]:
    """Ids, each with those that may be it in another writing; sorted."""
    ids = set(patients)
    unbroken = {patient for patient in ids if _is_unbroken(patient)}
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for patient in sorted(ids):
        groups[_separator_free(_person(patient), unbroken)].append(patient)
    return sorted(groups.values())


def by_year(patients: Iterable[str], settled: Collection[str] = ()) -> int:
    """How many ids differ from another one by a year at their end alone, and are not settled.

    No doubt, as numbers may look like years: where they are counted on, every id would be in one.
    """
    open_ = {patient for patient in patients if patient not in settled and _YEAR.search(patient)}
    stems = Counter(writing_free(_YEAR.sub("", patient)) for patient in open_)
    return sum(count for count in stems.values() if count > 1)


def writings(patient: str, sought: bool = False) -> frozenset[str]:
    """Forms by which an id is known in another writing, as :func:`by_writing` groups them, without the ids beside it.

    Two ids may be one if forms of the one and ``sought`` ones of the other are equal.
    """
    forms = {writing_free(patient), _separator_free(patient, ()), _separator_free(_person(patient), ())}
    whole = _whole(patient)
    if _is_unbroken(patient):
        forms.add(f"{'broken' if sought else 'unbroken'} {patient}")
    elif _is_unbroken(whole):
        forms.add(f"{'unbroken' if sought else 'broken'} {whole}")
    return frozenset(forms)


def are_open(ids: Collection[str], settled: Collection[str]) -> bool:
    """Whether ids may be one patient: there are several, and people have not said of all, or all but one, otherwise."""
    return len(ids) > 1 and sum(one not in settled for one in ids) > 1


def says_nothing(patient: str) -> bool:
    """Whether an id, or a label, is a placeholder: words that name nobody, zeros, one sign again and again, 1 to 9."""
    words = [word.lstrip("0") for word in re.findall(r"[^\W_]+", patient.casefold())]
    whole = "".join(words)
    return (
        not whole
        or whole in _PLACEHOLDERS
        or all(word in _PLACEHOLDERS for word in words)
        or re.fullmatch(r"(.)\1{4,}", whole) is not None
        or re.fullmatch(r"-(1|9+)|0?12345678(90?)?", patient) is not None
    )


def similar(patient: str, known: Iterable[str]) -> list[str]:
    """At most five known ids that somebody may have meant."""
    names = sorted(set(known))
    alike = [name for name in names if writings(name) & writings(patient, sought=True)]
    return list(dict.fromkeys([*alike, *difflib.get_close_matches(patient, names, n=5)]))[:5]


def read_settled(path: Path, told: list[str] | None = None) -> tuple[dict[str, str], frozenset[str]]:
    """Who is whom, as people have settled it.

    A row whose ``same_as`` names another id gives its images to that one; where it is empty, or the id itself, the id
    is a patient of its own.

    Args:
        path: of the file.
        told: what was sniffed is added here.

    Returns:
        From ids to the ids that hold for them; ids that are settled as their own.

    Raises:
        ManifestError: it is malformed, names an id twice, or goes in a circle.
    """
    table = read_table(path, ("id", "same_as"), ("id", "same_as"))
    if told is not None:
        told += table.told
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


def writing_free(patient: str) -> str:
    """Equal for ids that may be one in two writings.

    Such differ by UTF-8 that was taken for another encoding, case, Unicode's compatible forms, letters of other
    alphabets that look alike, blanks, underscores, quotes and ``=``, the kind of dash, empty parts of a DICOM name
    (``^``), zeros before any of their numbers, a plus before the first, or, of an id that is a number, ``.0`` and a
    spreadsheet's thousands.
    """
    plain = re.sub(r"[\s_]+", "", _signs(patient))
    plain = plain.rstrip("^")  # empty parts of a DICOM name
    plain = re.sub(r"^\+(?=\d)", "", plain)
    plain = re.sub(r"^(\d+)[.,]0+$", r"\1", plain)
    if re.fullmatch(r"\d{1,3}([.,]\d{3})+", plain):  # a spreadsheet's thousands
        plain = re.sub(r"[.,]", "", plain)
    return re.sub(r"\d+", lambda digits: digits[0].lstrip("0") or "0", plain)


def _signs(patient: str) -> str:
    """An id in small letters, with one kind of each sign, without quotes and ``=``."""
    plain = unicodedata.normalize("NFKC", _unmangled(patient)).casefold().translate(_LOOKALIKES)
    plain = re.sub(r"['\"=`\u2018\u2019\u201c\u201d\u200b-\u200d\u2060\ufeff\u00ad]+", "", plain)
    return re.sub(r"[\u2010-\u2015\u2212]", "-", plain)


def _separator_free(patient: str, unbroken: Collection[str]) -> str:
    """As :func:`writing_free`, and equal for ids that differ by hyphens, dots or the like, or nothing in their place.

    Between numbers something stays in their place, as 1-12 is not 11-2, unless the id is all digits, and among the
    ``unbroken`` ones without it; of fewer than four digits these are as often other numbers.
    """
    whole = _whole(patient)
    plain = writing_free(whole if whole in unbroken else patient)
    plain = re.sub(r"(?<=\d)[-./\\:]+(?=\d)", "-", plain)
    return re.sub(r"(?<=[^\W\d])[-./\\:]+(?=\w)|(?<=\w)[-./\\:]+(?=[^\W\d])", "", plain)


def _person(patient: str) -> str:
    """An id, in small letters, without what may be before and behind its number; of a name the words in any order."""
    plain = _signs(patient)
    if not any(sign.isdigit() for sign in plain):
        return plain if _LOST.search(patient) else " ".join(_words(_unmangled(patient))) or plain
    kept = plain[called.end() :] if (called := _CALLED.match(plain)) else plain
    return _PART.sub("", kept)


def _words(name: str) -> list[str]:
    """Those of a name, sorted: without case, accents, and ``ae`` for an umlaut."""
    plain = unicodedata.normalize("NFKD", name).casefold()
    plain = "".join(sign for sign in plain if not unicodedata.combining(sign))
    plain = re.sub(r"([aou])e", r"\1", plain.replace("\u00f8", "o").replace("\u00e6", "a"))
    return sorted(re.findall(r"[^\W_]+", plain))


def _whole(patient: str) -> str:
    """An id without what separates its digits."""
    return re.sub(r"(?<=\d)[-._/:](?=\d)", "", patient)


def _is_unbroken(patient: str) -> bool:
    """Whether an id is a number that some write in parts."""
    return patient.isdecimal() and len(patient) > 3


def name_free(name: str, patient: str = "") -> str:
    """Equal for names (DICOM's ``family^given^middle^prefix^suffix``) that one person may have in two writings.

    Of family and given name, the words in any order: without case, accents, ``ae`` for an umlaut, and initials.

    Args:
        name: in the first of its alphabets that has one.
        patient: the id; a name that is the id, or that is a placeholder, is none, and empty.
    """
    alphabet = next((part for part in name.split("=") if part.strip("^ ")), "")
    kept = " ".join(alphabet.split("^")[:2]).strip()
    if says_nothing(kept) or _NOBODY.fullmatch(kept) or (patient and writing_free(kept) == writing_free(patient)):
        return ""
    words = _words(_unmangled(kept))
    return " ".join([word for word in words if len(word) > 1] or words)


def _unmangled(patient: str) -> str:
    """An id whose UTF-8 was taken for Windows-1252 or Latin-1, as of a DICOM file that names no character set."""
    for encoding in ("cp1252", "latin-1"):
        try:
            return patient.encode(encoding).decode("utf-8")
        except UnicodeError:
            continue
    return patient

"""What a site's images leave open about who is who: by their ids, by their files' own headers, by equal pictures."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from secure_fed.clients.data import SiteImage, Unit
from secure_fed.clients.duplicates import Fingerprint, exact_copies
from secure_fed.clients.files import Notes
from secure_fed.clients.patients import Doubt, are_open, in_one_form, says_nothing, some, writing_free
from secure_fed.clients.patients import doubts as doubts_of_ids

_BIRTH = "PatientBirthDate (0010,0030)"
_ABOUT = ("PatientName (0010,0010)", _BIRTH, "PatientSex (0010,0040)")
_ONE_SERIES = "have DICOM files of one series, by SeriesInstanceUID (0020,000E), and a series is of one patient"

_Looks = Sequence[Fingerprint | None]


def all_doubts(
    images: Sequence[SiteImage], unit: Unit, notes: Notes, classes: Sequence[str] = (), looks: _Looks | None = None
) -> list[Doubt]:
    """What is open, sorted by kind.

    Args:
        images: of the site.
        unit: what counts as one patient; where it is the image, only classes can be in doubt.
        notes: of who is settled.
        classes: names of the labels.
        looks: fingerprints of the images, in their order, if they were made.
    """
    found = [] if looks is None else doubts_of_pictures(images, unit, notes, classes, looks)
    if unit == "patient":
        counts = Counter(image.patient for image in images if image.patient)
        found += [*doubts_of_ids(counts, notes.settled), *_headers(images, notes)]
        found += [*_people(images, notes), *_shared(images, notes)]
    return sorted(found)


def doubts_of_pictures(
    images: Sequence[SiteImage], unit: Unit, notes: Notes, classes: Sequence[str], looks: _Looks
) -> list[Doubt]:
    """The part of :func:`all_doubts` that is about pictures: those of several classes, or of several patients."""
    copies = exact_copies(looks)
    return [*_classes(images, copies, classes), *(_pictures(images, copies, notes) if unit == "patient" else [])]


def renamed(images: Sequence[SiteImage], notes: Notes) -> int:
    """How many patients have another id than in their files' headers."""
    pairs = {(image.patient, _in_header(image, notes)) for image in images}
    return len({one for one, other in pairs if one and other and writing_free(one) != writing_free(other)})


def _in_header(image: SiteImage, notes: Notes) -> str:
    """The id that a file's header has, as people have settled it; empty if that names nobody."""
    header = in_one_form(image.owner.patient)
    return "" if says_nothing(header) else notes.same.get(header, header)


def _headers(images: Sequence[SiteImage], notes: Notes) -> list[Doubt]:
    """Where a manifest and the headers of its DICOM files do not tell the same patients apart.

    A patient may have another name in the headers, as pseudonyms are, if it is one there too and nobody else's.
    """
    counts = Counter(image.patient for image in images)
    in_headers: defaultdict[str, dict[str, str]] = defaultdict(dict)
    issuers: defaultdict[str, set[str]] = defaultdict(set)
    owners: defaultdict[str, set[str]] = defaultdict(set)
    for patient in counts:
        owners[writing_free(patient)].add(patient)
    by_writing = {writing: frozenset(ids) for writing, ids in owners.items()}
    names: dict[str, str] = {}
    for image in images:
        header = _in_header(image, notes)
        if image.owner.issuer and image.patient:
            issuers[image.patient].add(image.owner.issuer)
        if image.patient and header:
            writing = writing_free(header)
            names.setdefault(writing, header)
            in_headers[image.patient].setdefault(writing, header)
            owners[writing].add(image.patient)
    found = []
    for patient, several in in_headers.items():
        if len(several) > 1 and patient not in notes.settled:
            ids = some(map(repr, sorted(several.values())))
            found.append(
                Doubt("header", (patient,), counts[patient], f"has the DICOM files of several PatientIDs: {ids}")
            )
    for writing, patients in owners.items():
        # Several writings of one id are a doubt of their own.
        if frozenset(patients) != by_writing.get(writing, frozenset()) and are_open(patients, notes.settled):
            shown = names[writing]
            total = sum(counts[patient] for patient in patients)
            words = f"are one patient by PatientID (0010,0020) of their DICOM files, {shown!r}"
            found.append(Doubt("header", tuple(sorted(patients)), total, words))
    for patient, several_issuers in issuers.items():
        if len(several_issuers) > 1 and patient not in notes.settled:
            by = some(map(repr, sorted(several_issuers)))
            words = f"was given by several IssuerOfPatientID (0010,0021), and may be as many patients: {by}"
            found.append(Doubt("issuers", (patient,), counts[patient], words))
    return found


def _people(images: Sequence[SiteImage], notes: Notes) -> list[Doubt]:
    """Ids whose DICOM files are of several persons: names, dates of birth or sexes contradict one another."""
    says: defaultdict[str, dict[str, dict[object, SiteImage]]] = defaultdict(lambda: {tag: {} for tag in _ABOUT})
    for image in images:
        if image.patient and image.patient not in notes.settled:
            for tag, value in zip(_ABOUT, (image.owner.name, image.owner.birth, image.owner.sex), strict=True):
                if value:
                    says[image.patient][tag].setdefault(value, image)
    found = []
    counts = Counter(image.patient for image in images)
    for patient, about in says.items():
        births = {str(one) for one in about[_BIRTH]}
        years = {one[:4] for one in births}
        contradicted = [tag for tag in _ABOUT if tag != _BIRTH and len(about[tag]) > 1]
        if len(years) > 1 or len(births - years) > 1:
            contradicted.append(_BIRTH)
        if contradicted:
            words = " and ".join(tag for tag in _ABOUT if tag in contradicted)
            paths = some(sorted({str(image.path) for tag in contradicted for image in about[tag].values()}))
            found.append(
                Doubt("header", (patient,), counts[patient], f"has DICOM files that differ in {words}: {paths}")
            )
    return found


def _shared(images: Sequence[SiteImage], notes: Notes) -> list[Doubt]:
    """Series, by their UID, and files with many pictures that are of several patients."""
    first: dict[int | Path, str] = {}
    several: defaultdict[int | Path, set[str]] = defaultdict(set)
    for image in images:
        for what in (image.path, image.owner.series):
            if image.patient and what and (other := first.setdefault(what, image.patient)) != image.patient:
                several[what] |= {other, image.patient}
    words: dict[tuple[str, ...], str] = {}
    for what, patients in several.items():
        if are_open(patients, notes.settled):
            found = f"have pictures in one file, {what}" if isinstance(what, Path) else _ONE_SERIES
            words.setdefault(tuple(sorted(patients)), found)
    counts = Counter(image.patient for image in images)
    return [Doubt("header", ids, sum(counts[one] for one in ids), found) for ids, found in words.items()]


def _pictures(images: Sequence[SiteImage], copies: Sequence[Sequence[int]], notes: Notes) -> list[Doubt]:
    """One picture of several patients."""
    shared: defaultdict[tuple[str, ...], list[int]] = defaultdict(list)
    for group in copies:
        patients = {images[index].patient for index in group if images[index].patient}
        if are_open(patients, notes.settled):
            shared[tuple(sorted(patients))] += group
    return [
        Doubt("picture", patients, len(places), f"have one picture: {_paths(images, places)}")
        for patients, places in shared.items()
    ]


def _classes(images: Sequence[SiteImage], copies: Sequence[Sequence[int]], classes: Sequence[str]) -> list[Doubt]:
    """One picture with several labels."""
    mixed: defaultdict[tuple[str, ...], list[int]] = defaultdict(list)
    for group in copies:
        labelled = [index for index in group if images[index].label is not None]
        labels = {label for index in labelled if (label := images[index].label) is not None}
        if len(labels) > 1:
            mixed[tuple(classes[label] for label in sorted(labels))] += labelled
    return [
        Doubt(
            "classes",
            tuple(sorted({images[index].patient for index in places})),
            len(places),
            f"have one picture in classes {', '.join(map(repr, names))}: {_paths(images, places)}",
        )
        for names, places in mixed.items()
    ]


def _paths(images: Sequence[SiteImage], places: Sequence[int]) -> str:
    return some(str(images[index].path) for index in places)

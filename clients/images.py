"""Which images a site has: what lies in its folders, with its split, less what is a forgotten patient's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from secure_fed.clients.budget import has_budget
from secure_fed.clients.data import Choice, Groups, SiteImage, read_data
from secure_fed.clients.decoding import identities
from secure_fed.clients.doubts import all_doubts, renamed
from secure_fed.clients.duplicates import Fingerprint, Fingerprints, fingerprints, inseparable, merged
from secure_fed.clients.features import FeatureCache, Progress, SiteFeatures
from secure_fed.clients.files import MANIFEST, Notes
from secure_fed.clients.forgotten import Forgotten
from secure_fed.clients.manifest import read_table
from secure_fed.clients.masks import check_masks
from secure_fed.clients.patients import SETTLED, Doubt, by_year, in_one_form
from secure_fed.clients.rules import Rules
from secure_fed.clients.sitefile import SiteFile
from secure_fed.core.errors import ManifestError, PatientError, SecfacmicError, fault_lines
from secure_fed.protocol.study import AgreedStudy
from secure_fed.protocol.study_tables import ANOMALY


def site_images(file: SiteFile, agreed: AgreedStudy, progress: Progress | None = None) -> list[SiteImage]:
    """The images that a site trains and is tested on, sorted by path.

    Where splits are drawn and not given, copies and near twins stay in one. Not so under a privacy budget: there no
    patient may decide what another one is used for. The forgotten are left out after splits are drawn, so that the
    other patients stay where they are.

    Args:
        file: the site's.
        agreed: its study.
        progress: of fingerprints, which are made, and kept in the site's feature cache, only if splits depend on them.

    Raises:
        ForgottenError: the list of the forgotten cannot be read; then nothing is read of the data.
        DataError, LabelError, ManifestError: as :func:`secure_fed.clients.data.read_data`; of a study of anomalies also
            if masks that a manifest names do not fit their images.
        StorageError: the feature cache cannot be used.
    """
    return find_images(file, agreed, progress).images


class Found(NamedTuple):
    """What a site has.

    Attributes:
        images: as :func:`site_images` gives them.
        notes: what was noticed while they were found.
        doubts: what is open about who is who, and which label a picture has.
    """

    images: list[SiteImage]
    notes: Notes
    doubts: list[Doubt]


def find_images(file: SiteFile, agreed: AgreedStudy, progress: Progress | None = None) -> Found:
    """:func:`site_images` with what was noticed on the way; of pictures, where splits depend on them."""
    images, places, looks, notes = _kept(file, agreed, progress)
    kept = [images[place] for place in places]
    return _found(file, agreed, kept, notes, None if looks is None else [looks.found[place] for place in places])


def compared_images(
    file: SiteFile, agreed: AgreedStudy, progress: Progress | None = None
) -> tuple[Found, Fingerprints]:
    """:func:`find_images` with the fingerprints of all images, in the same order."""
    images, places, looks, notes = _kept(file, agreed, progress)
    kept = [images[place] for place in places]
    if looks is None:
        seen = _look(file, agreed, kept, progress)
    else:
        reasons = {index: looks.unreadable[place] for index, place in enumerate(places) if place in looks.unreadable}
        seen = Fingerprints([looks.found[place] for place in places], reasons)
    return _found(file, agreed, kept, notes, seen.found), seen


def refuse_doubts(file: SiteFile, found: Found) -> None:
    """Under a privacy budget, check that nothing is open: one patient under two ids would have two budgets.

    Of equal pictures the ledger asks by itself, since it knows those of earlier data too, and keeps the answer
    (:meth:`secure_fed.clients.private_round.PrivateRounds.settle`).

    Raises:
        PatientError: ids do not tell patients apart, or nobody has said so yet; or a picture has two labels.
    """
    lines = [doubt.text for doubt in found.doubts if doubt.kind != "picture"]
    if not lines or not has_budget(file):
        return
    raise PatientError(
        f"{file.data.folder}: {len(lines)} doubts about who is who; under a privacy budget each patient must "
        f"have one id, and each picture one label: mend them, or settle each id in {SETTLED} (columns id, same_as; an "
        f"empty same_as says that the id is a patient of its own){fault_lines(lines)}"
    )


def _found(
    file: SiteFile,
    agreed: AgreedStudy,
    images: list[SiteImage],
    notes: Notes,
    looks: Sequence[Fingerprint | None] | None,
) -> Found:
    if others := renamed(images, notes):
        notes.told.append(
            f"{file.data.folder}: {others} patients have another id in the manifest than in their DICOM files"
        )
    if file.data.unit == "patient" and (years := by_year({image.patient for image in images}, notes.settled)):
        notes.told.append(
            f"{file.data.folder}: {years} ids differ from others by a year at their end alone, as P1_2019 and P1_2021 "
            f"do; if these are one patient's visits, say so in {SETTLED}, or they lie in several splits"
        )
    return Found(images, notes, all_doubts(images, file.data.unit, notes, agreed.study.class_names, looks))


def present_images(file: SiteFile, agreed: AgreedStudy) -> list[SiteImage]:
    """The images of :func:`site_images`, their split aside: that may be another one, as no picture is looked at."""
    forgotten = Forgotten(Path(file.state))
    notes = Notes()
    images = every_image(file, agreed, notes)
    return [image for image, gone in zip(images, forgotten.among(images, notes.settled), strict=True) if not gone]


def every_image(file: SiteFile, agreed: AgreedStudy, notes: Notes | None = None) -> list[SiteImage]:
    """All images in a site's folders, the forgotten patients' too; their split says nothing."""
    return _read(file, agreed, lambda images: (), Notes() if notes is None else notes)


def named_patients(file: SiteFile) -> set[str]:
    """The ids that a manifest names, whatever else is wrong with it or with the files; empty if it cannot be read."""
    manifest = Path(file.data.folder) / MANIFEST
    name = "patient" if file.data.unit == "patient" else "path"
    try:
        return {in_one_form(row.cells.get(name, "")) for row in read_table(manifest, (), ("path",)).rows} - {""}
    except ManifestError:
        return set()


def by_patient(
    file: SiteFile, agreed: AgreedStudy, images: Sequence[SiteImage], looks: Fingerprints
) -> tuple[list[SiteImage], dict[str, frozenset[bytes]]]:
    """The pictures of each patient, by digest of their pixels, and the images with whom each is of.

    Digests of both what the study shows of a file and what any other may: the ledger knows the patients of all.
    Where an image counts as one patient, the picture is the patient: a copy of it under another path is the same one,
    whatever a study shows of it.

    Args:
        file: the site's.
        agreed: its study.
        images: of the site.
        looks: their fingerprints as the study shows them, in the same order.
    """
    found: dict[str, set[bytes]] = {}
    named, plain = [], looks
    if rules_of(file, agreed).digest != Rules().digest:
        plain = _plain_looks(file, images)
    for image, look, bare in zip(images, looks.found, plain.found, strict=True):
        if file.data.unit == "image" and bare is not None:
            image = replace(image, patient=bare.pixels.hex())
        named.append(image)
        found.setdefault(image.patient, set()).update(one.pixels for one in (look, bare) if one is not None)
    return named, {patient: frozenset(pictures) for patient, pictures in found.items()}


def pixels_of(file: SiteFile, images: Sequence[SiteImage]) -> list[bytes]:
    """Digests of the pixels of images, whatever file, name or frame they are read from and whatever a study shows of
    them; of those that can be decoded."""
    return [look.pixels for look in _plain_looks(file, images).found if look is not None]


def _plain_looks(file: SiteFile, images: Sequence[SiteImage]) -> Fingerprints:
    """Fingerprints of images as their files have them, without any study's rules."""
    with FeatureCache(file.feature_cache) as cache:
        return fingerprints(images, cache, None, Rules(most_pixels=file.data.most_pixels))


def data_changed(file: SiteFile, agreed: AgreedStudy, features: SiteFeatures) -> bool:
    """Whether the site's folders hold other images than those that features were made of, or cannot be read."""
    before = {digest for digests in features.digests.values() for digest in digests}
    try:
        return before != set(identities(image.source for image in present_images(file, agreed)))
    except (SecfacmicError, OSError):
        return True


def _kept(
    file: SiteFile, agreed: AgreedStudy, progress: Progress | None
) -> tuple[list[SiteImage], list[int], Fingerprints | None, Notes]:
    """All images, the places of those that are not forgotten, all fingerprints if the splits needed them, notes."""
    forgotten = Forgotten(Path(file.state))
    notes = Notes()
    looks: list[Fingerprints] = []

    def together(images: Sequence[SiteImage]) -> list[frozenset[str]]:
        looks.append(_look(file, agreed, images, progress))
        # Who may be one patient in two writings, or by the files, is never split either.
        open_ = all_doubts(images, file.data.unit, notes)
        one = [frozenset(doubt.ids) for doubt in open_ if doubt.kind in ("writings", "header")]
        return merged([*inseparable(images, looks[0].found), *one])

    images = _read(file, agreed, None if has_budget(file) else together, notes)
    gone = forgotten.among(images, notes.settled)
    places = [place for place, away in enumerate(gone) if not away]
    others = {image.patient for image, away in zip(images, gone, strict=True) if away}
    if likely := sorted(name for name in others if forgotten.written_otherwise(name)):
        notes.told.append(
            f"{file.data.folder}: {len(likely)} ids are left out, as they may be other writings of a forgotten "
            f"patient's; one that is not is settled in {SETTLED} as a patient of its own"
        )
    if agreed.study.task == "anomaly":
        check_masks([images[place] for place in places], rules_of(file, agreed))
    return images, places, looks[0] if looks else None, notes


def _read(file: SiteFile, agreed: AgreedStudy, together: Groups | None, notes: Notes) -> list[SiteImage]:
    data, study = file.data, agreed.study
    extra = None if data.unlabelled is None else Path(data.unlabelled)
    same = None if data.patients is None else Path(data.patients)
    choice = Choice(data.slices, data.leave_out, same, frozenset(data.only))
    folder, names, others = Path(data.folder), study.class_names, ANOMALY if study.task == "anomaly" else None
    return read_data(
        folder, names, data.unit, data.shares, study.seed, extra, together, choice=choice, notes=notes, others=others
    )


def _look(file: SiteFile, agreed: AgreedStudy, images: Sequence[SiteImage], progress: Progress | None) -> Fingerprints:
    with FeatureCache(file.feature_cache) as cache:
        return fingerprints(images, cache, progress, rules_of(file, agreed))


def rules_of(file: SiteFile, agreed: AgreedStudy) -> Rules:
    """How the site's pictures are to be seen."""
    return Rules.of(agreed.study, file.data.most_pixels)

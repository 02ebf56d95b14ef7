"""Which images a site has: what lies in its folders, with its split, less what is a forgotten patient's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from secure_fed.clients.data import Groups, SiteImage, read_data
from secure_fed.clients.duplicates import Fingerprints, fingerprints, inseparable
from secure_fed.clients.features import FeatureCache, Progress
from secure_fed.clients.forgotten import Forgotten
from secure_fed.clients.private_round import has_budget
from secure_fed.clients.rules import Rules
from secure_fed.clients.sitefile import SiteFile
from secure_fed.protocol.study import AgreedStudy


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
        DataError, LabelError, ManifestError: as :func:`secure_fed.clients.data.read_data`.
        StorageError: the feature cache cannot be used.
    """
    images, places, _ = _kept(file, agreed, progress)
    return [images[place] for place in places]


def compared_images(
    file: SiteFile, agreed: AgreedStudy, progress: Progress | None = None
) -> tuple[list[SiteImage], Fingerprints]:
    """:func:`site_images` with the fingerprints of all of them, in the same order."""
    images, places, looks = _kept(file, agreed, progress)
    kept = [images[place] for place in places]
    if looks is None:
        return kept, _look(file, agreed, kept, progress)
    reasons = {index: looks.unreadable[place] for index, place in enumerate(places) if place in looks.unreadable}
    return kept, Fingerprints([looks.found[place] for place in places], reasons)


def present_images(file: SiteFile, agreed: AgreedStudy) -> list[SiteImage]:
    """The images of :func:`site_images`, their split aside: that may be another one, as no picture is looked at."""
    forgotten = Forgotten(Path(file.state))
    images = every_image(file, agreed)
    return [image for image, gone in zip(images, forgotten.among(images), strict=True) if not gone]


def every_image(file: SiteFile, agreed: AgreedStudy) -> list[SiteImage]:
    """All images in a site's folders, the forgotten patients' too; their split says nothing."""
    return _read(file, agreed, lambda images: ())


def _kept(
    file: SiteFile, agreed: AgreedStudy, progress: Progress | None
) -> tuple[list[SiteImage], list[int], Fingerprints | None]:
    """All images, the places of those that are not forgotten, and all fingerprints if the splits needed them."""
    forgotten = Forgotten(Path(file.state))
    looks: list[Fingerprints] = []

    def together(images: Sequence[SiteImage]) -> list[frozenset[str]]:
        looks.append(_look(file, agreed, images, progress))
        return inseparable(images, looks[0].found)

    images = _read(file, agreed, None if has_budget(file) else together)
    places = [place for place, gone in enumerate(forgotten.among(images)) if not gone]
    return images, places, looks[0] if looks else None


def _read(file: SiteFile, agreed: AgreedStudy, together: Groups | None) -> list[SiteImage]:
    data, study = file.data, agreed.study
    extra = None if data.unlabelled is None else Path(data.unlabelled)
    return read_data(Path(data.folder), study.class_names, data.unit, data.shares, study.seed, extra, together)


def _look(file: SiteFile, agreed: AgreedStudy, images: Sequence[SiteImage], progress: Progress | None) -> Fingerprints:
    with FeatureCache(file.feature_cache) as cache:
        return fingerprints(images, cache, progress, rules_of(file, agreed))


def rules_of(file: SiteFile, agreed: AgreedStudy) -> Rules:
    """How the site's pictures are to be seen."""
    return Rules.of(agreed.study, file.data.most_pixels)

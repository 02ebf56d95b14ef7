"""The ``[simulation]`` table of a template: how ``simulate`` plays the sites on one machine.

It is no part of a study's id.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import permutations
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from secure_fed.core.errors import StudyError
from secure_fed.core.tomlfile import FileModel
from secure_fed.protocol.study_tables import Name, Share, Text


class Shares(FileModel):
    """Seeded, stratified shares of a site's labelled patients; they add up to 1.

    Attributes:
        train: to train on.
        val: whose counts of correct answers are shared, if the study shares them.
        test: for the site's own figures.
        unlabelled: whose labels are not looked at: the target of the domain term.
    """

    train: Annotated[Share, Field(examples=[0.6])]
    val: Annotated[Share, Field(examples=[0.1])]
    test: Annotated[Share, Field(examples=[0.2])]
    unlabelled: Annotated[Share, Field(examples=[0.1])]

    @field_validator("unlabelled")
    @classmethod
    def _add_up(cls, unlabelled: float, info: ValidationInfo) -> float:
        others = [info.data[name] for name in ("train", "val", "test") if name in info.data]
        if len(others) == 3 and abs(sum(others) + unlabelled - 1) > 1e-9:
            raise ValueError(f"train, val, test and unlabelled add up to {sum(others) + unlabelled:g}, expected 1")
        return unlabelled


class SimulatedSite(FileModel):
    """Where ``simulate`` finds one site's images.

    Attributes:
        name: of a site of the study.
        folder: its images, below ``--data``.
        images: paths below the folder; if there are any, the site has these and no others of it, and other sites may
            have the rest.
    """

    name: Name
    folder: Text
    images: tuple[Text, ...] = ()


class PhantomGroup(FileModel):
    """One site's phantoms, images of head MRI that belong to nobody.

    Attributes:
        name: of the folder, below ``--data``; also part of the seed.
        patients: how many, each with one to four slices.
        scanner: which scanner took the pictures; each number is another one.
        class_mix: shares of the patients without a tumour, with glioma, meningioma and pituitary tumour; any scale.
        unlabelled: share of the patients whose images carry no label.
        unlabelled_scanner: which scanner took these patients' pictures, if it is another one.
    """

    name: Name
    patients: Annotated[int, Field(ge=1, le=100_000)]
    scanner: Annotated[int, Field(ge=0)]
    class_mix: tuple[Share, Share, Share, Share]
    unlabelled: Share
    unlabelled_scanner: Annotated[int, Field(ge=0)] | None = None


class Simulation(FileModel):
    """How ``simulate`` plays the sites on one machine. No part of the study id.

    Attributes:
        kind: of the data; patients' data are never simulated on.
        unit: what counts as one patient; ``image`` where images carry no patient id.
        shares: how a folder without a manifest is split.
        sites: each study site's folder below ``--data``.
        phantoms: what is generated when no ``--data`` is given, one group a folder.
        phantom_seed: seed of the phantoms.
        masks: whether masks of their lesions are written beside them, by which heat maps are judged.
        shared: whether sites may have one folder, or one inside another's. Then one site trains on what another is
            tested on, so that figures say nothing of new patients; right for measuring speed.
        advised: whether, under a budget on the command line, the sites train by the method that is advised for it and
            their size (docs/privacy.md) instead of the one above.
    """

    kind: Literal["public", "simulated"]
    unit: Literal["patient", "image"]
    shares: Shares | None = None
    sites: tuple[SimulatedSite, ...]
    phantoms: tuple[PhantomGroup, ...] = ()
    phantom_seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    masks: bool = False
    shared: bool = False
    advised: bool = False

    def refuse_shared(self, data: Path) -> None:
        """Refuse two sites on one folder, or one site's folder inside another's, unless the table says ``shared``.

        Args:
            data: the folder below which the sites' are; links are followed.

        Raises:
            StudyError: naming the two sites and their folders.
        """
        if self.shared:
            return
        folders = {site.name: (data / site.folder).resolve() for site in self.sites}
        self._refuse_listed_twice(folders)
        whole = {folders[site.name]: site.name for site in self.sites if not site.images}
        for site in self.sites:
            if site.images and folders[site.name] in whole:
                raise StudyError(
                    f"simulation.sites: {site.name} has a list of the images of {site.folder}, and "
                    f"{whole[folders[site.name]]} has the whole folder; expected a list for each site that shares a "
                    "folder"
                )
        for first, second in permutations(self.sites, 2):
            inner, outer = folders[first.name], folders[second.name]
            one = inner == outer and not first.images
            if one or outer in inner.parents:
                how = "are one" if one else "lie one inside the other"
                raise StudyError(
                    f"simulation.sites: the folders of {first.name}, {inner}, and of {second.name}, {outer}, {how}; "
                    "expected a folder of its own for each site, or one site trains on what another is tested on: "
                    "separate their images, or say shared = true in [simulation] if that is meant"
                )

    def _refuse_listed_twice(self, folders: Mapping[str, Path]) -> None:
        listed = Counter((folders[site.name], path) for site in self.sites for path in set(site.images))
        twice = [path for (_, path), count in listed.items() if count > 1]
        if twice:
            raise StudyError(
                f"simulation.sites: {len(twice)} images are in the lists of two sites, {twice[0]} first; expected each "
                "at one site, or one site trains on what another is tested on; or say shared = true in [simulation]"
            )

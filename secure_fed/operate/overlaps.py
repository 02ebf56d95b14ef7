"""What the images of several sites, or several folders, have in common: copies, near twins, patients.

Only where the images of all are in one place: on public or simulated data, or at one hospital with several folders.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from secure_fed.clients.data import SiteImage
from secure_fed.clients.duplicates import Fingerprint, exact_copies, near_twins
from secure_fed.core.errors import DataLeakError, fault_lines

LISTED = 10
"""Groups of each kind that are named; the others are counted."""


class Held(NamedTuple):
    """What one of them has.

    Attributes:
        name: of the site or folder.
        images: all of it.
        looks: their fingerprints, in the same order; None for what cannot be decoded.
        held_out: whether it is tested on all of its labelled images, as an observer is.
        ids: whether its patients' ids are such, or images count as patients.
    """

    name: str
    images: Sequence[SiteImage]
    looks: Sequence[Fingerprint | None]
    held_out: bool = False
    ids: bool = False


class Place(NamedTuple):
    """One image: whose it is, where, and what it is used for."""

    name: str
    path: str
    use: str


@dataclass(frozen=True)
class Overlaps:
    """What several have in common.

    Attributes:
        copies: groups of equal pictures across them.
        twins: groups of pictures that are nearly equal across them, copies left out.
        patients: ids that more than one has, each with who has it.
        leaks: those groups of ``copies`` in which one is tested on what another trains on.
        near_leaks: likewise of ``twins``.
    """

    copies: list[list[Place]]
    twins: list[list[Place]]
    patients: dict[str, list[str]]
    leaks: list[list[Place]]
    near_leaks: list[list[Place]]

    @property
    def words(self) -> Iterator[str]:
        """What is to be told, a line each; none if they have nothing in common."""
        for groups, leaks, what in (
            (self.copies, self.leaks, "the same picture"),
            (self.twins, self.near_leaks, "nearly the same picture"),
        ):
            if groups:
                among = f", of them {len(leaks)} in the test of one and the training of another" if leaks else ""
                yield f"{len(groups)} groups of {what} at more than one site{among}; the first: {_words(groups[0])}"
        if self.patients:
            first, names = next(iter(self.patients.items()))
            yield (
                f"{len(self.patients)} patient ids at more than one site, the first {first!r} at {', '.join(names)}: "
                "one patient at two sites, or two patients of one number"
            )

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "copies": [[place._asdict() for place in group] for group in self.copies[:LISTED]],
            "copies_count": len(self.copies),
            "near_twins": [[place._asdict() for place in group] for group in self.twins[:LISTED]],
            "near_twins_count": len(self.twins),
            "patients": dict(list(self.patients.items())[:LISTED]),
            "patients_count": len(self.patients),
            "leaks": [_words(group) for group in self.leaks],
        }

    def refuse_leaks(self) -> None:
        """Refuse that anything is tested at one site on what another one trains on.

        Raises:
            DataLeakError: it is; with the first such pictures.
        """
        if self.leaks:
            raise DataLeakError(
                f"{len(self.leaks)} pictures are in the test images of one site and in the training images of another, "
                "so that what is tested was trained on; expected each picture at one site: remove the copies, or say "
                f"shared = true in [simulation] if that is meant{fault_lines([_words(group) for group in self.leaks])}"
            )


def overlaps(held: Sequence[Held]) -> Overlaps:
    """Compare the images of several with each other."""
    owners = [one for one in held for _ in one.images]
    images = [image for one in held for image in one.images]
    looks = [look for one in held for look in one.looks]

    def across(groups: Sequence[Sequence[int]]) -> Iterator[list[Place]]:
        for group in groups:
            if len({owners[index].name for index in group}) > 1:
                yield [_place(owners[index], images[index]) for index in group]

    copies = list(across(exact_copies(looks)))
    more = [group for group in near_twins(looks) if len({look.pixels for i in group if (look := looks[i])}) > 1]
    twins = list(across(more))
    having: dict[str, dict[str, None]] = {}
    for owner, image in zip(owners, images, strict=True):
        if owner.ids:
            having.setdefault(image.patient, {})[owner.name] = None
    patients = {patient: list(names) for patient, names in sorted(having.items()) if len(names) > 1}
    return Overlaps(copies, twins, patients, list(filter(_leaks, copies)), list(filter(_leaks, twins)))


def _place(owner: Held, image: SiteImage) -> Place:
    use = "test" if owner.held_out and image.split != "unlabelled" else image.split
    return Place(owner.name, str(image.path), use)


def _leaks(group: Sequence[Place]) -> bool:
    """Whether one of them is tested on what another trains on."""
    return any(a.use == "test" and b.use == "train" and a.name != b.name for a in group for b in group)


def _words(group: Sequence[Place]) -> str:
    shown = ", ".join(f"{place.path} ({place.use} at {place.name})" for place in group[:4])
    return shown + (f" and {len(group) - 4} more" if len(group) > 4 else "")

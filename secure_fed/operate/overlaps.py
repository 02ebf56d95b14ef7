"""What the images of several sites, or several folders, have in common: copies, near twins, patients; also within one.

Only where the images of all are in one place: on public or simulated data, or at one hospital with several folders.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from secure_fed.clients.data import UNLABELLED, SiteImage
from secure_fed.clients.duplicates import Fingerprint, exact_copies, near_twins
from secure_fed.clients.patients import by_writing
from secure_fed.core.errors import DataLeakError, fault_lines

LISTED = 10
"""Groups of each kind that are named; the others are counted."""


class Held(NamedTuple):
    """What one of them has.

    Attributes:
        name: of the site or folder; no two have one name.
        images: all of it.
        looks: their fingerprints, in the same order; None for what cannot be decoded.
        held_out: whether it is tested on all of its labelled images, as an observer is.
        ids: whether its patients' ids are such, or images count as patients.
        splits: whether its splits mean something; those that were drawn while nobody asked for any do not.
    """

    name: str
    images: Sequence[SiteImage]
    looks: Sequence[Fingerprint | None]
    held_out: bool = False
    ids: bool = False
    splits: bool = True


class Place(NamedTuple):
    """One image: whose it is, where, and what it is used for, if that is known."""

    name: str
    path: str
    use: str


def _pictures(copies: list[list[Place]], twins: list[list[Place]]) -> dict[str, Any]:
    return {
        "copies": [[place._asdict() for place in group] for group in copies[:LISTED]],
        "copies_count": len(copies),
        "near_twins": [[place._asdict() for place in group] for group in twins[:LISTED]],
        "near_twins_count": len(twins),
    }


@dataclass(frozen=True)
class Inside:
    """What one has several times.

    Attributes:
        copies: groups of equal pictures.
        twins: groups of pictures that are nearly equal, copies left out.
        leaks: those groups of ``copies`` that lie in several splits.
    """

    copies: list[list[Place]]
    twins: list[list[Place]]
    leaks: list[list[Place]]

    @property
    def words(self) -> Iterator[str]:
        """What is to be told, a line each."""
        for groups, what in ((self.copies, "the same picture"), (self.twins, "nearly the same picture")):
            if groups:
                apart = sum(map(_is_apart, groups))
                among = f", of them {apart} in several splits" if apart else ""
                yield (
                    f"{_groups(groups)} of {what}, {sum(map(len, groups))} images{among}; "
                    f"the first: {_words(groups[0])}"
                )

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return {
            **_pictures(self.copies, self.twins),
            "leaks": [_words(group) for group in self.leaks],
        }


@dataclass(frozen=True)
class Overlaps:
    """What several have in common.

    Attributes:
        copies: groups of equal pictures across them.
        twins: groups of pictures that are nearly equal across them, copies left out.
        patients: ids that more than one has, each with who has it.
        writings: groups of ids that may be one patient in several writings, each id with who has it.
        leaks: those groups of ``copies`` in which one is tested on what another trains on.
        near_leaks: likewise of ``twins``.
        inside: what each has several times, by name.
    """

    copies: list[list[Place]]
    twins: list[list[Place]]
    patients: dict[str, list[str]]
    writings: list[dict[str, list[str]]]
    leaks: list[list[Place]]
    near_leaks: list[list[Place]]
    inside: dict[str, Inside]

    @property
    def words(self) -> Iterator[str]:
        """What is to be told, a line each; none if they have nothing in common."""
        for groups, leaks, what in (
            (self.copies, self.leaks, "the same picture"),
            (self.twins, self.near_leaks, "nearly the same picture"),
        ):
            if groups:
                among = f", of them {len(leaks)} in the test of one and the training of another" if leaks else ""
                yield f"{_groups(groups)} of {what} at more than one site{among}; the first: {_words(groups[0])}"
        if self.patients:
            first, names = next(iter(self.patients.items()))
            yield (
                f"{len(self.patients)} patient ids at more than one site, the first {first!r} at {', '.join(names)}: "
                "one patient at two sites, or two patients of one number"
            )
        if self.writings:
            ids = ", ".join(f"{patient!r} at {', '.join(names)}" for patient, names in self.writings[0].items())
            yield (
                f"{len(self.writings)} patients at more than one site may be one in several writings of an id; the "
                f"first: {ids}"
            )

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return {
            **_pictures(self.copies, self.twins),
            "patients": dict(list(self.patients.items())[:LISTED]),
            "patients_count": len(self.patients),
            "writings": self.writings[:LISTED],
            "writings_count": len(self.writings),
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

    def refuse_leaks_inside(self) -> None:
        """Refuse that one has a picture in several splits.

        Raises:
            DataLeakError: it does; with the first such pictures.
        """
        leaks = [group for inside in self.inside.values() for group in inside.leaks]
        if leaks:
            raise DataLeakError(
                f"{len(leaks)} pictures lie in more than one split of one folder, so that what is tested was trained "
                "on; expected each in one: put all copies into one split, or remove them"
                f"{fault_lines([_words(group) for group in leaks])}"
            )


def overlaps(held: Sequence[Held]) -> Overlaps:
    """Compare the images of several with each other."""
    owners = [one for one in held for _ in one.images]
    images = [image for one in held for image in one.images]
    looks = [look for one in held for look in one.looks]

    def pictures(group: Iterable[int]) -> int:
        return len({look.pixels for index in group if (look := looks[index])})

    def places(group: Iterable[int]) -> list[Place]:
        return [_place(owners[index], images[index]) for index in group]

    def across(groups: Iterable[Sequence[int]]) -> list[list[Place]]:
        return [places(group) for group in groups if len({owners[index].name for index in group}) > 1]

    def inside(owner: Held, groups: Iterable[Sequence[int]], least: int) -> list[list[Place]]:
        own = ([index for index in group if owners[index].name == owner.name] for group in groups)
        return [places(group) for group in own if len(group) > 1 and pictures(group) >= least]

    same, near = exact_copies(looks), [group for group in near_twins(looks) if pictures(group) > 1]
    within = {}
    for owner in held:
        own = inside(owner, same, 1)
        within[owner.name] = Inside(own, inside(owner, near, 2), list(filter(_is_apart, own)))
    having: dict[str, dict[str, None]] = {}
    for owner, image in zip(owners, images, strict=True):
        if owner.ids:
            having.setdefault(image.patient, {})[owner.name] = None
    patients = {patient: list(names) for patient, names in sorted(having.items()) if len(names) > 1}
    copies, twins = across(same), across(near)
    leaks, near_leaks = list(filter(_leaks, copies)), list(filter(_leaks, twins))
    return Overlaps(copies, twins, patients, _writings(having), leaks, near_leaks, within)


def _writings(having: Mapping[str, Iterable[str]]) -> list[dict[str, list[str]]]:
    """Ids that may be one in several writings and are at more than one, each with who has it."""
    groups = ({patient: list(having[patient]) for patient in ids} for ids in by_writing(having))
    return [
        group for group in groups if len(group) > 1 and len({name for names in group.values() for name in names}) > 1
    ]


def _place(owner: Held, image: SiteImage) -> Place:
    use = "test" if owner.held_out and image.split != UNLABELLED else image.split
    return Place(owner.name, str(image.path), use if owner.splits else "")


def _leaks(group: Sequence[Place]) -> bool:
    """Whether one of them is tested on what another trains on."""
    return any(a.use == "test" and b.use == "train" and a.name != b.name for a in group for b in group)


def _is_apart(group: Sequence[Place]) -> bool:
    """Whether pictures of one are in several of its splits."""
    return len({place.use for place in group}) > 1


def _words(group: Sequence[Place]) -> str:
    shown = ", ".join(f"{place.path} ({place.use}{' ' * bool(place.use)}at {place.name})" for place in group[:4])
    return shown + (f" and {len(group) - 4} more" if len(group) > 4 else "")


def _groups(groups: Sequence[Sequence[Place]]) -> str:
    return f"{len(groups)} group{'s' * (len(groups) > 1)}"

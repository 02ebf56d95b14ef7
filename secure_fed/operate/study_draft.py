"""A template for folders of images that are here: what a study of them could be, as text to be reviewed."""

from __future__ import annotations

import os
import re
import textwrap
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tomli_w

from secure_fed.clients.duplicates import fingerprints, inseparable
from secure_fed.clients.features import FeatureCache
from secure_fed.clients.files import MANIFEST
from secure_fed.clients.manifest import read_table
from secure_fed.core.errors import StudyError
from secure_fed.core.storage import scratch_folder
from secure_fed.core.tomlfile import parse_toml
from secure_fed.model.public_statistics import has_packaged_statistics
from secure_fed.operate.advice import advise, smallest
from secure_fed.operate.folders import Folder, compare, look_at
from secure_fed.operate.overlaps import Overlaps
from secure_fed.protocol.packing import MIN_LANES, lane_parameters, largest_bits, usual_bits
from secure_fed.protocol.simulation_table import Shares
from secure_fed.protocol.study import MIN_SITES_HE, Template

LEAST_SUMMED = 30
"""Training patients of a class, over all sites, from which on a head of class statistics is advised."""

SUM_BITS = 18
"""Width of the statistics' values, of which nothing must be lost."""

SHARES = Shares(train=0.6, val=0.1, test=0.2, unlabelled=0.1)
"""Of a folder that does not say so itself."""

BACKBONE = "mini-clip"
ROUNDS = 10
USUAL_BOUND = 0.5

_WITHOUT_FINDING = re.compile(r"(no|without|normal|healthy|control|controls)\b", re.IGNORECASE)
"""How a class without a finding is called, at the start of its name in words."""

SITES = 4
"""Sites that one folder is split into, unless told otherwise: three train, one is held out."""

Listed = Mapping[str, Sequence[str]]
"""By site, paths below the one folder."""


@dataclass(frozen=True)
class Draft:
    """A template, and what it was made of.

    Attributes:
        text: the file.
        data: the folder to give as ``--data``.
        template: what the text says.
        common: what the folders have in common; None of one folder.
        told: what was noticed or decided, in words.
    """

    text: str
    data: Path
    template: Template
    common: Overlaps | None
    told: list[str]


@dataclass(frozen=True)
class _Method:
    """What is advised: the tables of the template that say it, and why."""

    why: str
    rounds: int
    bits: int
    bound: float
    tables: str


def draft_study(
    paths: Sequence[Path],
    name: str,
    *,
    held_out: Sequence[Path] = (),
    partition: str | None = None,
    sites: int | None = None,
    epsilon: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Draft:
    """Draft a study of folders of public or simulated images.

    Each folder is a site. Of four or more without ``held_out`` the last is held out. One folder alone is split into
    sites, whose lists of images stand in the template, so that it is the same study everywhere.

    Args:
        paths: the folders, with a ``manifest.csv`` or one folder a class.
        name: of the study, made to fit.
        held_out: further folders, which are tested on and train nothing.
        partition: of one folder: ``iid``, ``dirichlet:ALPHA`` (the smaller, the more unlike) or ``column:NAME`` of its
            manifest. Patients, and those whose images are copies or near twins, stay together.
        sites: how many one folder is split into; with a column, as many as it says.
        epsilon: the budget that sites will train under, if any; the method that is advised hangs on it.
        progress: told how many images were compared, of how many.

    Raises:
        StudyError: these folders make no study, with what would.
        DataError, ManifestError: a folder cannot be read.
    """
    told: list[str] = []
    if len(paths) == 1 and not held_out:
        folder = look_at(paths[0])
        _refuse_one_class_twice([folder])
        split = _split(folder, partition or "iid", sites, progress)
        names, common, data = list(split), None, folder.path.resolve()
        places: dict[str, tuple[str, Sequence[str]]] = {site: (".", split[site]) for site in names}
        folders = learnt_from = [folder]
        smallest_site = smallest(folders, SHARES) // len(names)
        observers = names[-1:] if len(names) > MIN_SITES_HE else []
    else:
        if partition is not None or sites is not None:
            raise StudyError("--partition and --sites split one folder; expected one folder, or several without them")
        folders = [look_at(path) for path in (*paths, *held_out)]
        names = _names(folders)
        places, data = _places(names, folders)
        _refuse_another_level(names, folders)
        _refuse_one_class_twice(folders)
        common, unreadable = compare(folders, progress)
        told += [f"cannot be decoded: {line}" for line in unreadable]
        told += [*common.words, *_in_other_words(names, folders)]
        common.refuse_leaks()
        observers = names[len(paths) :] or (names[-1:] if len(names) > MIN_SITES_HE else [])
        if observers and not held_out:
            told.append(f"{observers[0]} is held out, to test on; name others with --held-out, if it is to train")
        learnt_from = [folder for name, folder in zip(names, folders, strict=True) if name not in observers] or folders
        smallest_site = smallest(learnt_from, SHARES)
    training = [site for site in names if site not in observers]
    if len(training) < MIN_SITES_HE:
        raise StudyError(
            f"{len(training)} sites to train ({', '.join(training)}); expected at least {MIN_SITES_HE}, since of a "
            "sum of two each can subtract itself: give more folders, or one to be split by --partition and --sites"
        )
    told += [line for folder in folders for line in folder.notes.told]
    classes = sorted({label for folder in folders for label in folder.classes})
    if len(classes) < 2:
        raise StudyError(f"one class, {classes[0]!r}, in all of these folders; expected two at least")
    count = 1 << (len(training) - 1).bit_length()
    method = _advice(learnt_from, classes, count, epsilon, smallest_site)
    text = _text(name, folders, classes, places, training, observers, count, method, data)
    return Draft(text, data, parse_toml(text, Template, StudyError, "the draft"), common, told)


# --- sites ---


def _in_other_words(names: Sequence[str], folders: Sequence[Folder]) -> list[str]:
    """Classes that not every site has: one may be another's name, as in another language."""
    having = {
        label: [name for name, folder in zip(names, folders, strict=True) if label in folder.classes]
        for label in sorted({label for folder in folders for label in folder.classes})
    }
    some = [f"{label!r} (at {', '.join(at)})" for label, at in having.items() if len(at) < len(names)]
    if not some:
        return []
    return [
        f"classes that not all sites have: {'; '.join(some)}: a class has one name at all sites; if one of these is "
        "another's name, rename its folder or its labels and draft again"
    ]


def _refuse_another_level(names: Sequence[str], folders: Sequence[Folder]) -> None:
    """Refuse a site whose folder is one level above the others': its classes would be what holds theirs.

    Raises:
        StudyError: a class of one site has folders that are named as classes of others.
    """
    for name, folder in zip(names, folders, strict=True):
        others = {
            _as_meant(label): site
            for site, other in zip(names, folders, strict=True)
            for label in other.classes
            if other is not folder
        }
        for label, below in folder.deeper.items():
            alike = sorted(inner for inner in below if _as_meant(inner) in others)
            if alike and _as_meant(label) not in others:
                raise StudyError(
                    f"{folder.path}: its folder {label} is no class of any other site, and holds {', '.join(alike)}, "
                    f"which is a class at {others[_as_meant(alike[0])]}; expected folders of one level, each with the "
                    f"classes in it: give {folder.path / label} for {name}, or rename what is in it"
                )


def _refuse_one_class_twice(folders: Sequence[Folder]) -> None:
    """Refuse classes that differ in writing alone.

    Raises:
        StudyError: with the folders that write each.
    """
    written: defaultdict[str, list[str]] = defaultdict(list)
    for label in sorted({label for folder in folders for label in folder.classes}):
        written[_as_meant(label)].append(label)
    twice = [
        f"{label!r} ({', '.join(str(folder.path) for folder in folders if label in folder.classes)})"
        for forms in written.values()
        for label in forms
        if len(forms) > 1
    ]
    if twice:
        raise StudyError(
            f"classes that differ in writing alone: {'; '.join(twice)}; expected one name for a class in all folders: "
            "rename folders or labels"
        )


def _as_meant(label: str) -> str:
    """A class's name without case, underscores and Unicode's forms; signs stay, as in HER2+ and HER2-."""
    return " ".join(unicodedata.normalize("NFKC", label).casefold().replace("_", " ").split())


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9_-]+", "-", text.lower()).strip("-_")[:40].strip("-_") or "site"


def _names(folders: Sequence[Folder]) -> list[str]:
    """A name a folder, each once: its own, else with those above it."""
    known: dict[Path, Path] = {}
    for folder in folders:
        place = folder.path.resolve()
        if place in known:
            raise StudyError(
                f"{known[place]} and {folder.path} are one folder; expected a folder of its own for each site"
            )
        known[place] = folder.path
    names = [_slug(folder.name) for folder in folders]
    if len(set(names)) < len(names):
        names = [_slug("-".join(folder.path.resolve().parts[-2:])) for folder in folders]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise StudyError(f"two folders would be one site, {twice[0]}; expected folders of different names, each once")
    return names


def _places(names: Sequence[str], folders: Sequence[Folder]) -> tuple[dict[str, tuple[str, Sequence[str]]], Path]:
    """By site its folder below the nearest one that holds all of them, which is the second."""
    whole = [folder.path.resolve() for folder in folders]
    root = Path(os.path.commonpath([str(path.parent) for path in whole]))
    places: dict[str, tuple[str, Sequence[str]]] = {
        name: (path.relative_to(root).as_posix(), ()) for name, path in zip(names, whole, strict=True)
    }
    return places, root


def _split(
    folder: Folder, partition: str, count: int | None, progress: Callable[[int, int], None] | None
) -> dict[str, list[str]]:
    """By site, the paths of its images."""
    kind, _, argument = partition.partition(":")
    if kind == "column" and argument:
        owner = _by_column(folder, argument)
        found = len(set(owner.values()))
        if count not in (None, found):
            raise StudyError(f"--sites {count}: column {argument} says {found} sites; expected --sites {found} or none")
    elif (kind == "iid" and not argument) or kind == "dirichlet":
        count = SITES if count is None else count
        owner = _drawn(folder, None if kind == "iid" else _alpha(argument), count, progress)
    else:
        raise StudyError(f"--partition {partition}: expected iid, dirichlet:0.5 (any number above 0) or column:NAME")
    sites: defaultdict[str, list[str]] = defaultdict(list)
    for image in folder.images:
        sites[owner[image.patient]].append(image.path.relative_to(folder.path).as_posix())
    return {site: sorted(set(sites[site])) for site in sorted(sites, key=_in_order)}


def _in_order(site: str) -> tuple[str, int]:
    stem, _, number = site.rpartition("-")
    return (stem, int(number)) if number.isdecimal() else (site, 0)


def _alpha(text: str) -> float:
    try:
        alpha = float(text)
    except ValueError:
        alpha = 0.0
    if not 0 < alpha <= 1e6:
        raise StudyError(f"--partition dirichlet:{text}: expected a number above 0, as in dirichlet:0.5")
    return alpha


def _by_column(folder: Folder, column: str) -> dict[str, str]:
    """The site of each patient, by a column of the manifest."""
    manifest = folder.path / MANIFEST
    if not manifest.exists():
        raise StudyError(f"--partition column:{column}: {folder.path} has no {MANIFEST}; expected one with that column")
    table = read_table(manifest, (), ("path",))
    if column not in table.columns:
        raise StudyError(f"{manifest}: no column {column}; its columns are {', '.join(table.columns)}")
    said = {row.line: row.cells.get(column, "") for row in table.rows}
    values: defaultdict[str, set[str]] = defaultdict(set)
    for image in folder.images:
        values[image.patient].add(said.get(image.line, ""))
    torn = sorted(patient for patient, found in values.items() if len(found) != 1 or found == {""})
    if torn:
        raise StudyError(
            f"{manifest}: {len(torn)} patients have no value, or several, in column {column}, {torn[0]!r} first; "
            "expected one a patient, since all of a patient's images are at one site"
        )
    value_of = {patient: found.pop() for patient, found in values.items()}
    called: dict[str, str] = {}
    for value in sorted(set(value_of.values())):
        if (other := called.setdefault(_slug(value), value)) != value:
            raise StudyError(
                f"{manifest}: {other!r} and {value!r} of column {column} would be one site, {_slug(value)}; expected "
                "values that differ in Latin letters or digits, of which a site's name is made: rename one of them"
            )
    return {patient: _slug(value) for patient, value in value_of.items()}


def _drawn(
    folder: Folder, alpha: float | None, count: int, progress: Callable[[int, int], None] | None
) -> dict[str, str]:
    """The site of each patient, drawn class by class with seed 0; who has one another's images stays together."""
    with scratch_folder() as scratch, FeatureCache(scratch / "looks.sqlite") as cache:
        looks = fingerprints(folder.images, cache, progress).found
    leader = {image.patient: image.patient for image in folder.images}
    for group in inseparable(folder.images, looks):
        leader |= dict.fromkeys(group, min(group))
    by_class: defaultdict[int, set[str]] = defaultdict(set)
    for image in folder.images:
        by_class[-1 if image.label is None else image.label].add(leader[image.patient])
    rng = np.random.default_rng(0)
    site_of: dict[str, int] = {}
    for label in sorted(by_class, reverse=True):  # those without a label last
        members = sorted(by_class[label] - set(site_of))
        order = rng.permutation(len(members))
        shares = np.full(count, 1 / count) if alpha is None else rng.dirichlet(np.full(count, alpha))
        ends = np.round(np.cumsum(shares) * len(members)).astype(int)
        for place, index in enumerate(order):
            site_of[members[index]] = int(np.searchsorted(ends, place, side="right").clip(0, count - 1))
    empty = sorted(set(range(count)) - set(site_of.values()))
    if empty:
        raise StudyError(
            f"{len(empty)} of {count} sites would have no patient; expected fewer sites, or a larger ALPHA"
        )
    return {patient: f"site-{site_of[first] + 1}" for patient, first in leader.items()}


# --- the text ---


def _advice(
    folders: Sequence[Folder], classes: Sequence[str], count: int, epsilon: float | None, smallest_site: int
) -> _Method:
    """The method, by sizes and budget; docs/facmic.md, docs/privacy.md and docs/results have the figures behind it."""
    patients = {name: sum(folder.patients[name] for folder in folders) for name in classes}
    rarest = min(patients, key=lambda name: patients[name])
    most = max(len({patient for _, patient in folder.labelled}) for folder in folders)
    if epsilon is None and patients[rarest] >= LEAST_SUMMED:
        return _Method(
            f"class statistics in one sum: {patients[rarest]} patients of the rarest class, {rarest}, are enough for a "
            "head that is solved and not trained; it needs no good prompts, and sends least",
            2,
            min(SUM_BITS, largest_bits(count, MIN_LANES)),
            1.0,
            f'[method]\nadapter = "gaussian_head"\nmost_patients = {max(1000, 1000 * -(-2 * most // 1000))}\n\n'
            "# Of the baseline that each site trains alone, for comparison.\n"
            "[training]\nsteps = 250\nlearning_rate = 1e-3\nbatch_size = 32\n",
        )
    training = "[training]\nsteps = 50\nlearning_rate = 1e-3\nbatch_size = 32\n"
    if epsilon is not None:
        advice = advise(epsilon, smallest_site, public=has_packaged_statistics(BACKBONE))
        return _Method(
            advice.words,
            ROUNDS,
            usual_bits(count, MIN_LANES),
            USUAL_BOUND,
            f"{tomli_w.dumps(advice.tables)}\n{training}",
        )
    return _Method(
        f"FACMIC's gate, ten rounds: with {patients[rarest]} patients of the rarest class, {rarest}, statistics would "
        "be mostly noise, while training starts from what the prompts say: review these",
        ROUNDS,
        usual_bits(count, MIN_LANES),
        USUAL_BOUND,
        f'[method]\nadapter = "facmic"\nnorm = "layer"\nloss = "class_prompt"\n\n{training}',
    )


def _text(
    name: str,
    folders: Sequence[Folder],
    classes: Sequence[str],
    places: Mapping[str, tuple[str, Sequence[str]]],
    training: Sequence[str],
    observers: Sequence[str],
    count: int,
    method: _Method,
    data: Path,
) -> str:
    lanes = lane_parameters(count, method.bits, None, 1)
    unit = "patient" if all(folder.unit == "patient" for folder in folders) else "image"
    split = all(folder.has_splits for folder in folders)
    lines = [
        f"# {len(training)} sites train{f', {len(observers)} held out' if observers else ''}: drafted from the folders "
        "that were there. Review every line; prompts first.",
        f"# To try it on one machine: secfacmic simulate THIS_FILE --data {data} --out out",
        "# For hospitals: remove [simulation], and give the rest to secfacmic study new. Everything here goes to every",
        "# site, so that nothing in it may be derived from patients.",
        "format = 1",
        *_pairs(name=_slug(name), mode="he", seed=0, rounds=method.rounds),
        f"# Room for {count} sites in a sum; {lanes.bits} bits a value fit, {lanes.lanes} values in a coefficient.",
        *_pairs(max_sites=count, min_sites=MIN_SITES_HE),
        "# The site that makes the study's keys.",
        *_pairs(key_maker=training[0]),
        "",
        "# Names as the folders or manifests have them. REVIEW the prompts: say what is seen, not what it is called.",
    ]
    words = {label: re.sub(r"_+|(?<=\w)-+(?=\w)", " ", label).strip() for label in classes}  # not the sign of HER2-
    without = [label for label in classes if _WITHOUT_FINDING.match(words[label])]
    for label in classes:
        lines += ["[[classes]]", *_pairs(name=label, prompts=[f"an image of {words[label]}"])]
        if without == [label]:
            lines += ["# By its name. Explanations of the other classes are held against this one.", "finding = false"]
        lines.append("")
    lines += [
        "# The small CLIP that comes with secfacmic. For photographs or radiographs take a larger one: secfacmic study",
        "# list names templates with such, docs/backbones.md says how to get their weights.",
        "[backbone]",
        *_pairs(model=BACKBONE, weights="file", file=f"{BACKBONE}.safetensors"),
        "",
        *_wrapped(f"Advised: {method.why}. What else there is: docs/facmic.md; secfacmic sweep compares."),
        method.tables,
        "[encoding]",
        *_pairs(bits=method.bits, value_bound=method.bound),
        "",
    ]
    for site in (*training, *observers):
        lines += ["[[sites]]", *_pairs(name=site), *(_pairs(role="observer") if site in observers else ()), ""]
    lines += [
        "# Only for trying it out, on public or simulated images; no part of the study.",
        "[simulation]",
        *_pairs(kind="public"),
        "# What counts as one patient: these images " + ("say whose they are." if unit == "patient" else "do not say."),
        *_pairs(unit=unit),
        "",
    ]
    if not split:
        lines += [
            "# How the folders without a split column are split: drawn by the study's seed, patient by patient.",
            "[simulation.shares]",
            *_pairs(**SHARES.model_dump()),
            "",
        ]
    for site in (*training, *observers):
        folder, images = places[site]
        lines += ["[[simulation.sites]]", *_pairs(name=site, folder=folder)]
        lines += [*_pairs(images=list(images)), ""] if images else [""]
    return "\n".join(lines)


def _pairs(**values: object) -> Iterator[str]:
    yield from tomli_w.dumps(values).strip().splitlines()


def _wrapped(text: str) -> Iterator[str]:
    yield from textwrap.wrap(text, 112, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False)

"""The study: what the sites agreed on, as ``study.toml`` and ``study.safetensors``.

A :class:`Template` is what a person writes: sites without keys, no digests, and perhaps a ``[simulation]`` table.
``secfacmic study new`` makes a :class:`Study` of it, in which nothing is missing. Both are a :class:`StudyFile`; who
reads one says which of the two it must be. The id is a digest of the parsed content, so that comments and the order
of keys do not matter; ``[simulation]`` is no part of it.
"""

from __future__ import annotations

import hashlib
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, Field, ValidationInfo, field_validator

from secure_fed import configs
from secure_fed.core.canonical import canonical_json
from secure_fed.core.errors import LanesError, StudyError
from secure_fed.core.tomlfile import FileModel, parse_table, reachable, read_toml, spelled
from secure_fed.protocol import memory
from secure_fed.protocol.codec import (
    UPDATE,
    Block,
    Layout,
    check_precision,
    counts_block,
    layout_of,
    value_bounds,
)
from secure_fed.protocol.initial_state import InitialState
from secure_fed.protocol.one_sum import histograms_block, sums_blocks
from secure_fed.protocol.packing import (
    LANES,
    MIN_LANES,
    LaneParameters,
    lane_parameters,
    usual_bits,
)
from secure_fed.protocol.quorum import Quorum, quorum, refuse_quorum
from secure_fed.protocol.simulation_table import Simulation
from secure_fed.protocol.study_tables import (
    ANOMALY,
    Aggregation,
    Backbone,
    Background,
    Concept,
    Encoding,
    Features,
    Hex64,
    KnownBackbone,
    Member,
    Method,
    Mode,
    Name,
    PatientRule,
    PrivateTraining,
    SiteKeys,
    StudyClass,
    StudySite,
    Training,
    Window,
)

TEMPLATE_FORMAT, STUDY_FORMAT = 1, 2
"""Formats of the two kinds of file."""

MIN_SITES_HE = 3
"""Fewest contributors of an aggregate in ``he`` mode: of two, each can subtract itself."""


class StudyFile(FileModel):
    """``study.toml``, be it a template or a study: what both have in common.

    Attributes:
        format: of this file; a template's is 1, a study's 2 since its envelopes are of another wire.
        name: of the study.
        mode: ``he`` encrypts updates; ``plain`` does not, and is for public or simulated data.
        seed: of splits, initial adapter, training and rounding.
        rounds: how many aggregates are applied.
        max_sites: most training sites that the lanes of a ciphertext have room for; in a template, the next power of
            two of those it lists if not given.
        min_sites: fewest sites of an aggregate; in ``he`` mode at least 3: of two, each can subtract itself.
        faulty: how many training sites may lie, or come back from an older disk, without stopping or fooling the others
            (:mod:`secure_fed.protocol.quorum`).
        collusion: how many of those may pool all they have with the server without learning another site's update
            (:mod:`secure_fed.protocol.pads`). 0: one is enough, since all sites hold the study's key. In a template 1
            unless given, in ``plain`` mode 0; a study says it.
        keep_rounds: of how many of the last rounds any site may fetch the envelopes and add them again, with
            ``collusion`` above 0: they are padded then, so that nobody reads one; else the server hands out none.
        round_seconds: how long a round waits for missing sites before it goes on with a quorum.
        records_url: where else records may be fetched, by digest: any web server with copies of the coordinator's
            folder of them, which need not be trusted; from the coordinator alone if not given.
        task: ``classify``, or ``anomaly``: only normal images train, and what is unlike them is found.
        classes: at least two; a class's number is its place in this list. Of a study of anomalies one, that of normal
            images: every other label is an anomaly's.
        backbone: the frozen CLIP.
        features: in which coordinates a method that takes statistics sees the backbone's features.
        method: what is trained, and by which loss.
        training: one round's local training.
        aggregation: what every site makes of a round's average.
        encoding: how an update becomes bounded integers.
        concepts: by which predictions are explained at the sites; none by default, and none for ``anomaly``.
        windows: which grey values are shown, by modality; without one, what each file says.
        background: what shows through where a picture is transparent.
        privacy: public constants of training under differential privacy.
        per_patient: how a prediction for a patient comes of those for its images: their ``mean``, or for each class the
            ``largest``, made to sum to 1.
        sites: the members.
        key_maker: name of the site that makes the study's keys; in a template, the first training one if not given.
        coordinator: Ed25519 public key of the coordinator, in hex; ``study new`` fills it in.
        initial: SHA-256 of ``study.safetensors``; ``study new`` fills it in.
        simulation: how ``simulate`` plays the sites; no part of the study id.
    """

    @classmethod
    def completed(cls, content: dict[str, Any]) -> dict[str, Any]:
        """``max_sites``, ``key_maker`` and ``encoding.bits`` follow from the sites unless they are given.

        Room is left up to the next power of two of training sites: it costs next to nothing in the lanes, and a
        hospital can join.
        """
        sites = content.get("sites")
        names = [
            site.get("name")
            for site in (sites if isinstance(sites, list) else ())
            if isinstance(site, dict) and site.get("role", "train") == "train"
        ]
        following: dict[str, Any] = {}
        if names:
            following = {"max_sites": 1 << (len(names) - 1).bit_length(), "key_maker": names[0]}
        whole = following | content
        encoding, most = whole.get("encoding"), whole.get("max_sites")
        if isinstance(encoding, dict) and "bits" not in encoding and isinstance(most, int) and 1 <= most <= 4096:
            lanes = encoding.get("lanes", MIN_LANES)
            whole["encoding"] = {"bits": usual_bits(most, lanes if lanes in LANES else MIN_LANES)} | encoding
        return whole

    format: Literal[1, 2]
    name: Name
    mode: Mode
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    rounds: Annotated[int, Field(ge=1, le=100_000)]
    max_sites: Annotated[int, Field(ge=1, le=4096)]
    min_sites: Annotated[int, Field(ge=1, le=4096)]
    faulty: Annotated[int, Field(ge=1, le=1000)] = 1
    collusion: Annotated[int, Field(ge=0, le=1000)] | None = None
    keep_rounds: Annotated[int, Field(ge=0, le=1000)] = 2
    round_seconds: Annotated[float, Field(gt=0, le=30 * 86_400)] = 3600.0
    records_url: (
        Annotated[
            str,
            spelled(r"^https?://[^\s?#]{1,250}$", "a URL, as in https://files.example.org/records"),
            AfterValidator(reachable),
        ]
        | None
    ) = None
    task: Literal["classify", "anomaly"] = "classify"
    classes: tuple[StudyClass, ...]
    backbone: Backbone
    features: Features = Features()
    method: Method
    training: Training
    aggregation: Aggregation = Aggregation()
    encoding: Encoding
    concepts: tuple[Concept, ...] = ()
    windows: tuple[Window, ...] = ()
    background: Background = "black"
    privacy: PrivateTraining = PrivateTraining()
    per_patient: PatientRule = "mean"
    sites: tuple[StudySite, ...]
    key_maker: Name
    coordinator: Hex64 | None = None
    initial: Hex64 | None = None
    simulation: Simulation | None = None

    @field_validator("min_sites")
    @classmethod
    def _enough_to_hide(cls, minimum: int, info: ValidationInfo) -> int:
        if info.data.get("mode") == "he" and minimum < MIN_SITES_HE:
            raise ValueError(f"in he mode a sum needs at least {MIN_SITES_HE} sites: of two, each can subtract itself")
        if minimum > info.data.get("max_sites", minimum):
            raise ValueError(f"more than max_sites = {info.data['max_sites']}; expected at most that")
        return minimum

    @field_validator("collusion")
    @classmethod
    def _within_the_faulty(cls, collusion: int | None, info: ValidationInfo) -> int | None:
        if collusion is None:
            return None
        faulty = info.data.get("faulty", collusion)
        if collusion and info.data.get("mode") == "plain":
            raise ValueError(f"{collusion} in plain mode, in which the server reads every update; expected 0")
        if collusion > faulty:
            raise ValueError(
                f"{collusion} sites that may collude, of faulty = {faulty} that may lie; expected at most {faulty}, or "
                f"faulty = {collusion}, for which a study needs at least {collusion + 2} training sites"
            )
        return collusion

    @field_validator("classes")
    @classmethod
    def _distinct_classes(cls, classes: tuple[StudyClass, ...], info: ValidationInfo) -> tuple[StudyClass, ...]:
        if info.data.get("task") == "anomaly":
            if len(classes) != 1:
                raise ValueError(
                    f'{len(classes)} classes, but task = "anomaly" takes one, that of normal images; expected 1: every '
                    "other label at a site counts as an anomaly, leave those classes out"
                )
            if classes[0].name.strip().casefold() == ANOMALY:
                raise ValueError(
                    f"{classes[0].name!r}, but in a study of anomalies that is what all other labels are called; "
                    "expected the class of normal images"
                )
        elif len(classes) < 2:
            raise ValueError(f"{len(classes)} classes; expected at least 2")
        _refuse_duplicates("class", [entry.name for entry in classes])
        without = [entry.name for entry in classes if not entry.finding]
        if len(without) > 1:
            raise ValueError(
                f"finding = false for {' and '.join(without)}; expected it for one class at most: what a finding is "
                "held against"
            )
        return classes

    @field_validator("privacy")
    @classmethod
    def _prior_of_each_class(cls, privacy: PrivateTraining, info: ValidationInfo) -> PrivateTraining:
        count = len(info.data.get("classes", ()))
        if privacy.prior and count and (len(privacy.prior) != count or abs(sum(privacy.prior) - 1) > 1e-9):
            raise ValueError(
                f"prior has {len(privacy.prior)} shares that add up to {sum(privacy.prior):g}; "
                f"expected one for each of {count} classes, adding up to 1, or none"
            )
        return privacy

    @field_validator("method")
    @classmethod
    def _fits_task(cls, method: Method, info: ValidationInfo) -> Method:
        rounds, task = info.data.get("rounds", 1), info.data.get("task")
        if task is not None and (task == "anomaly") != (method.adapter == "memory"):
            raise ValueError(
                f'task = "{task}" with adapter = "{method.adapter}"; expected adapter = "memory" for anomalies, and '
                "for nothing else"
            )
        if task == "anomaly" and rounds < 2:
            raise ValueError(
                "a memory takes one round at least for its centroids and one for the histogram that the threshold is "
                f"made of, but rounds = {rounds}; expected 2 or more, such as 11"
            )
        if method.one_sum and rounds > 2:
            raise ValueError(
                f"{method.adapter} takes one round for its sum and one for the histograms that choose its shrinkage, "
                f"but rounds = {rounds}; expected 2, or 1 with a declared shrinkage"
            )
        if method.one_sum and method.shrinkage == 0:
            features = info.data.get("features", Features())
            where = f"{features.dimensions} dimensions" if features.dimensions else "all of the backbone's dimensions"
            raise ValueError(
                f"shrinkage = 0 in {where}, of classes that may have as few as {method.min_patients} patients "
                f"(method.min_patients), and at most {method.most_patients} at a site: with more dimensions than "
                "patients a covariance has no inverse; expected shrinkage above 0 and at most 1, such as 0.01"
            )
        return method

    @field_validator("aggregation")
    @classmethod
    def _adds_up(cls, aggregation: Aggregation, info: ValidationInfo) -> Aggregation:
        method = info.data.get("method")
        if method is not None and method.sums and aggregation != Aggregation():
            raise ValueError(f"{method.adapter} adds sums up; expected no rule: leave [aggregation] out")
        return aggregation

    @field_validator("concepts")
    @classmethod
    def _distinct_concepts(cls, concepts: tuple[Concept, ...], info: ValidationInfo) -> tuple[Concept, ...]:
        if concepts and info.data.get("task") == "anomaly":
            raise ValueError(
                'task = "anomaly" has one class, so that there is no margin between classes for concepts to explain; '
                "expected none: leave [[concepts]] out"
            )
        _refuse_duplicates("concept", [concept.name for concept in concepts])
        return concepts

    @field_validator("windows")
    @classmethod
    def _one_window_a_modality(cls, windows: tuple[Window, ...]) -> tuple[Window, ...]:
        _refuse_duplicates("window for", [window.modality for window in windows])
        return windows

    @field_validator("encoding")
    @classmethod
    def _fits_lanes(cls, encoding: Encoding, info: ValidationInfo) -> Encoding:
        if "max_sites" in info.data:
            try:
                lane_parameters(info.data["max_sites"], encoding.bits, encoding.lanes, values=1)
                check_precision(encoding.precision, info.data["max_sites"])
            except LanesError as error:
                raise ValueError(str(error)) from None
        return encoding

    @field_validator("sites")
    @classmethod
    def _members_fit(cls, sites: tuple[StudySite, ...], info: ValidationInfo) -> tuple[StudySite, ...]:
        if info.context is not None:
            info.context["sites"] = sites
        known, faults = info.data, list(_duplicates("site", [site.name for site in sites]))
        for field in SiteKeys.model_fields:
            faults += _duplicates(f"{field} key", [getattr(site.keys, field) for site in sites if site.keys])
        method = known.get("method")
        weighted = [site.name for site in sites if site.weight != 1]
        if method is not None and method.sums and weighted:
            faults.append(
                f"in sums of patients each patient weighs 1, but {', '.join(weighted)} has a weight; expected none"
            )
        training = sum(site.role == "train" for site in sites)
        if method is not None and method.sums and training and method.min_patients > training * method.most_patients:
            faults.append(
                f"method.min_patients = {method.min_patients}, but {training} sites of at most {method.most_patients} "
                "patients (method.most_patients) have no more than "
                f"{training * method.most_patients}, so that all would be left out; expected a smaller min_patients"
            )
        if training > known.get("max_sites", training):
            faults.append(
                f"{training} training sites, but the lanes hold max_sites = {known['max_sites']}; raise max_sites, or "
                "leave it out"
            )
        if training < known.get("min_sites", 1):
            faults.append(f"{training} training sites; expected at least min_sites = {known['min_sites']}")
        elif {"min_sites", "faulty"} <= set(known) and known.get("mode") == "he":
            try:
                refuse_quorum(training, known["faulty"], known["min_sites"], ValueError)
            except ValueError as error:
                faults.append(str(error))
        if faults:
            raise ValueError("; ".join(faults))
        return sites

    @field_validator("key_maker")
    @classmethod
    def _maker_is_member(cls, maker: str, info: ValidationInfo) -> str:
        names = [site.name for site in _sites(info)]
        if names and maker not in names:
            raise ValueError(f"not a site of the study; expected one of {', '.join(names)}")
        return maker

    @field_validator("simulation")
    @classmethod
    def _plays_every_site(cls, simulation: Simulation | None, info: ValidationInfo) -> Simulation | None:
        members = sorted({site.name for site in _sites(info)})
        if simulation is None or not members:
            return simulation
        played = sorted(site.name for site in simulation.sites)
        if members != played:
            raise ValueError(f"its sites are {played}; expected exactly the study's, {members}")
        folders = {site.folder for site in simulation.sites}
        strangers = sorted({group.name for group in simulation.phantoms} ^ folders) if simulation.phantoms else []
        if strangers:
            raise ValueError(f"phantoms and folders differ in {strangers}; expected one phantom group a folder")
        return simulation

    @cached_property
    def id(self) -> str:
        """SHA-256 of the parsed content without ``[simulation]``, as 64 hex digits.

        Of what the file says, and nothing else: neither a later version's new fields nor its other defaults change
        the id of an old study. ``study new`` writes every field of its time down.
        """
        content = self.model_dump(mode="json", exclude={"simulation"}, exclude_unset=True, exclude_none=True)
        return hashlib.sha256(b"secfacmic study 1\n" + canonical_json(content)).hexdigest()

    @property
    def work(self) -> str:
        """What a site does in a round, in words."""
        method, training = self.method, self.training
        if method.adapter == "memory":
            return (
                f"none: {method.centroids} centroids of normal patches ({', '.join(method.blocks)}) in "
                f"{self.rounds - 1} sums, and a histogram of scores; at most {100 * method.false_alarms:g} % false "
                "alarms"
            )
        if not method.one_sum:
            return (
                f"{training.steps} steps a round of batches of {training.batch_size}, {training.optimizer}, learning "
                f"rate {training.learning_rate:g}; loss {method.loss}; domain term: {method.domain_term}"
            )
        basis = self.features.basis + (f", {self.features.dimensions} dimensions" if self.features.dimensions else "")
        how = f"{method.shrinkage:g}, declared" if self.rounds == 1 else "chosen by summed validation histograms"
        return f"none: class statistics in one sum (basis {basis}; {self.encoding.precision} bits); shrinkage {how}"

    def sums_patients(self, round_number: int) -> bool:
        """Whether a round adds statistics of training patients, of which two exact sums tell a difference; the last
        one only counts how patients fare."""
        if self.method.one_sum:
            return round_number == 1
        return self.method.sums and round_number < self.rounds

    def packing(self) -> LaneParameters:
        """How values lie in ciphertexts, as far as a template knows: of one value."""
        return lane_parameters(self.max_sites, self.encoding.bits, self.encoding.lanes, values=1)

    def layouts(self, initial: InitialState) -> tuple[Layout, ...]:
        """What a site's message is in lanes, by round, the last one's for all that follow.

        Args:
            initial: the study's ``study.safetensors``.
        """
        encoding = self.encoding
        if self.method.one_sum:
            assert initial.basis is not None, "study new makes one for each method that uses one"
            classes, most = len(self.classes), self.method.most_patients
            rounds: list[tuple[Block, ...]] = [sums_blocks(classes, initial.basis, most, encoding.precision)]
            if self.rounds > 1:
                rounds.append((histograms_block(classes, most),))
            return tuple(layout_of(each, self.max_sites, encoding.bits, encoding.lanes) for each in rounds)
        if self.method.adapter == "memory":
            most = self.method.most_patients
            sums = layout_of(
                memory.sums_blocks(initial.adapter, most, encoding.precision),
                self.max_sites,
                encoding.bits,
                encoding.lanes,
            )
            last = layout_of([memory.histogram_block(most)], self.max_sites, encoding.bits, encoding.lanes)
            return (*[sums] * (self.rounds - 1), last)
        bounds = value_bounds(initial.shapes, encoding.value_bound, encoding.value_bounds)
        blocks = [Block(UPDATE, bounds, encoding.precision, weighted=True)]
        if encoding.share_validation:
            blocks.append(counts_block())
        return (layout_of(blocks, self.max_sites, encoding.bits, encoding.lanes),)

    def quorum(self, members: Iterable[StudySite]) -> Quorum:
        """Whose words a round needs while the study has these members.

        In ``plain`` mode the server reads and could forge everything: a bare majority, and at least ``min_sites``, is
        asked, so that rounds go as in ``he`` mode.
        """
        training = sum(member.role == "train" for member in members)
        if self.mode == "plain":
            return Quorum(training, 0, 0, max(training // 2 + 1, self.min_sites))
        return Quorum(training, self.faulty, self.colluders, quorum(training, self.faulty, self.min_sites))

    @property
    def pads(self) -> bool:
        """Whether envelopes are padded, so that no site and server together open one."""
        return self.colluders > 0

    @property
    def colluders(self) -> int:
        """t: of how many sites and the server together a site's update is hidden."""
        if self.collusion is None:
            return int(self.format == TEMPLATE_FORMAT and self.mode == "he")
        return self.collusion

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes; a class id is an index into them."""
        names = tuple(entry.name for entry in self.classes)
        return names if self.task == "classify" else (*names, ANOMALY)

    @property
    def without_finding(self) -> str | None:
        """The class whose images show no finding, if one is named so."""
        return next((entry.name for entry in self.classes if not entry.finding), None)

    @property
    def positive(self) -> int | None:
        """The class that figures are of, if it is one alone: of a study of anomalies that of anomalies."""
        return 1 if self.task == "anomaly" else None

    def missing(self) -> list[str]:
        """What it lacks to be a study, one line each; empty for a study."""
        lines = [f"site {site.name} has no keys" for site in self.sites if site.keys is None]
        if self.backbone.digest is None:
            lines.append("backbone.digest is not set")
        if self.coordinator is None:
            lines.append("coordinator is not set (the coordinator's signing key)")
        if self.initial is None:
            lines.append("initial is not set (the digest of study.safetensors)")
        return lines


class Template(StudyFile):
    """What a person writes, to be changed, simulated, or made a study of: ``study new`` fills in what is missing."""

    @field_validator("classes")
    @classmethod
    def _told_apart(cls, classes: tuple[StudyClass, ...]) -> tuple[StudyClass, ...]:
        same: defaultdict[frozenset[str], list[str]] = defaultdict(list)
        for entry in classes:
            same[frozenset(entry.prompts)].append(entry.name)
        if alike := [", ".join(names) for names in same.values() if len(names) > 1]:
            raise ValueError(f"one and the same prompts for {'; and for '.join(alike)}; expected others for each class")
        return classes

    @classmethod
    def read(cls, path: Path | str) -> Template:
        """As :func:`read_template`, for programs."""
        return read_template(Path(path))

    @property
    def plan(self) -> Simulation:
        """Its ``[simulation]`` table.

        Raises:
            StudyError: it has none.
        """
        if self.simulation is None:
            raise StudyError(
                f"study {self.name}: no [simulation] table; expected one that says where the sites' data are"
            )
        return self.simulation


class Study(StudyFile):
    """What the sites agreed on, complete: it never changes once a run has begun."""

    format: Literal[2]
    backbone: KnownBackbone
    sites: tuple[Member, ...]
    coordinator: Hex64
    initial: Hex64

    @classmethod
    def read(cls, path: Path | str) -> Template | Study:
        """Read a study or a template, as in 0.1; deprecated, for :meth:`Template.read` and :func:`load_study`."""
        warnings.warn(
            "Study.read is deprecated and leaves with 0.3: read a template by Template.read, a study by load_study",
            DeprecationWarning,
            stacklevel=2,
        )
        return read_study_file(Path(path))

    def site(self, name: str) -> Member:
        """The member of that name.

        Raises:
            StudyError: there is none.
        """
        for site in self.sites:
            if site.name == name:
                return site
        members = ", ".join(site.name for site in self.sites)
        raise StudyError(f"site {name!r} is not in study {self.name!r}; its sites are {members}")


File = TypeVar("File", bound=StudyFile)


@dataclass(frozen=True)
class AgreedStudy:
    """A study with its initial state, as every site and the server hold it."""

    study: Study
    initial: InitialState

    def layout(self, round_number: int) -> Layout:
        """What a site's message of a round is, in lanes; before the first round and after the last as of those."""
        return self._layouts[max(0, min(round_number, len(self._layouts)) - 1)]

    @cached_property
    def lanes(self) -> LaneParameters:
        """The packing of the largest message. All have the same prime: it depends on the study's encoding alone."""
        return max((layout.lanes for layout in self._layouts), key=lambda lanes: lanes.values)

    @cached_property
    def _layouts(self) -> tuple[Layout, ...]:
        return self.study.layouts(self.initial)


def read_study_file(path: Path) -> Template | Study:
    """Read a study or a template; a path that does not exist is looked up among the packaged configs.

    Raises:
        StudyError: with every error of the file.
    """
    found = configs.find(path)
    if not found.exists():
        raise StudyError(configs.unknown(path, "study"))
    return _of_its_kind(found)


def read_template(path: Path) -> Template:
    """Read a template; a path that does not exist is looked up among the packaged configs.

    Raises:
        StudyError: with every error of the file, or it is a study already.
    """
    found = read_study_file(path)
    if isinstance(found, Study):
        raise StudyError(
            f"{path}: this is a study, with its sites' keys and its initial state; expected a template: name the one "
            "that it was made of"
        )
    return found


def _of_its_kind(path: Path) -> Template | Study:
    template = read_toml(path, Template, StudyError)
    if template.missing():
        return template
    if template.format == 1:
        raise StudyError(
            f"{path}: a study of format 1, which version 0.1 made; expected format 2: envelopes, journal and keys are "
            "of another form since; end it with version 0.1, or make a new study of its template with: "
            "secfacmic study new"
        )
    # Fields that are not set stay so: the id is of what the file says.
    return parse_table(template.model_dump(mode="json", exclude_unset=True), Study, StudyError, str(path))


def with_fields(file: File, **changes: object) -> File:
    """The template or study with some fields changed, checked as a whole again.

    Raises:
        StudyError: with every error that the changes make.
    """
    content = file.model_dump(mode="json", exclude_none=True)
    for name, value in changes.items():
        if value is None:
            content.pop(name, None)
        else:
            content[name] = value
    return parse_table(content, type(file), StudyError, f"study {file.name}")


def load_study(path: Path) -> AgreedStudy:
    """Read a study and its ``study.safetensors`` beside it.

    Raises:
        StudyError: the study is a template, or the initial state is not the one it names.
    """
    study = _of_its_kind(path)
    if isinstance(study, Template):
        # Made by study new, it lacks nothing but keys.
        mend = "study add-site" if study.initial else "study new"
        raise StudyError(
            f"{path}: this is a template, not yet a study: {'; '.join(study.missing())}; make a study of it with: "
            f"secfacmic {mend} {path}"
        )
    tensors = path.with_suffix(".safetensors")
    try:
        data = tensors.read_bytes()
    except OSError as error:
        raise StudyError(f"{tensors}: cannot be read ({error.strerror}); it belongs beside {path}") from error
    found = hashlib.sha256(data).hexdigest()
    if found != study.initial:
        raise StudyError(
            f"{tensors}: initial = {found}, but the study names {study.initial}; "
            "copy both files again from the coordinator"
        )
    agreed = AgreedStudy(study, InitialState.from_bytes(data))
    unknown = sorted(set(study.encoding.value_bounds) - set(agreed.initial.adapter))
    if unknown:
        allowed = ", ".join(sorted(agreed.initial.adapter))
        raise StudyError(f"{path}: encoding.value_bounds names {', '.join(unknown)}; parameters are {allowed}")
    return agreed


def _sites(info: ValidationInfo) -> tuple[StudySite, ...]:
    """The sites of a file that is being read, be they right together or not; none if one of them is malformed."""
    found: tuple[StudySite, ...] = info.data.get("sites") or (info.context or {}).get("sites", ())
    return found


def _refuse_duplicates(what: str, names: list[str]) -> None:
    for fault in _duplicates(what, names):
        raise ValueError(fault)


def _duplicates(what: str, names: list[str]) -> Iterator[str]:
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        yield f"{what} {', '.join(twice)} more than once; expected each once"

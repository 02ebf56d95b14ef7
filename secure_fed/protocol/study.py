"""The study: what the sites agreed on, as ``study.toml`` and ``study.safetensors``.

A :class:`Template` is what a person writes: sites without keys, no digests, and perhaps a ``[simulation]`` table.
``secfacmic study new`` makes a :class:`Study` of it, in which nothing is missing. Both are a :class:`StudyFile`; who
reads one says which of the two it must be. The id is a digest of the parsed content, so that comments and the order
of keys do not matter; ``[simulation]`` is no part of it.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import permutations
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray
from pydantic import AfterValidator, Field, StringConstraints, ValidationInfo, field_validator

from secure_fed import configs
from secure_fed.core.errors import LanesError, StudyError
from secure_fed.core.tomlfile import FileModel, parse_table, read_toml, spelled
from secure_fed.protocol import memory
from secure_fed.protocol.basis import Basis
from secure_fed.protocol.codec import (
    UPDATE,
    Block,
    Layout,
    check_precision,
    counts_block,
    layout_of,
    value_bounds,
)
from secure_fed.protocol.one_sum import histograms_block, sums_blocks
from secure_fed.protocol.packing import (
    LANES,
    MAX_BITS,
    MAX_LANES,
    MIN_BITS,
    MIN_LANES,
    LaneParameters,
    lane_parameters,
    usual_bits,
)
from secure_fed.protocol.quorum import Quorum, quorum, refuse_quorum

Mode = Literal["he", "plain"]
Hex64 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Name = Annotated[
    str, spelled(r"^[a-z0-9][a-z0-9_-]{0,39}$", "up to 40 small letters a to z, digits, - and _, as in north-2")
]


def _no_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("nothing but blanks; expected a text: write what is missing")
    return text


Text = Annotated[str, StringConstraints(min_length=1, max_length=300), AfterValidator(_no_blank)]
Share = Annotated[float, Field(ge=0, le=1)]

ADAPTERS = tuple(sorted(path.stem for path in (Path(__file__).parents[1] / "model" / "adapters").glob("[!_]*.py")))
"""Names of the adapters: those of the files in ``secure_fed/model/adapters``, which are not imported to know them."""

TEMPLATE_FORMAT, STUDY_FORMAT = 1, 2
"""Formats of the two kinds of file."""

NORMAL, ANOMALY = 0, "anomaly"
"""Of a study of anomalies: label of normal images, and name of the second class, which all other labels are of."""

MIN_SITES_HE = 3
"""Fewest contributors of an aggregate in ``he`` mode: of two, each can subtract itself."""


class StudyClass(FileModel):
    """One class.

    Attributes:
        name: as a folder or a manifest's label has it at the sites.
        prompts: texts that describe its images, reviewed by people; the class's feature is the mean of theirs.
    """

    name: Text
    prompts: tuple[Text, ...]

    @field_validator("prompts")
    @classmethod
    def _some_prompts(cls, prompts: tuple[str, ...]) -> tuple[str, ...]:
        if not prompts:
            raise ValueError("a class needs at least one prompt, a text that describes its images")
        return prompts


class Concept(FileModel):
    """Something that a person looks for in an image, by which a prediction is explained; nothing is trained on it.

    Attributes:
        name: in a word or two, as a page of cases shows it.
        prompts: texts that describe images with it, reviewed by people; the concept's feature is the mean of theirs.
    """

    name: Text
    prompts: tuple[Text, ...]

    @field_validator("prompts")
    @classmethod
    def _some_prompts(cls, prompts: tuple[str, ...]) -> tuple[str, ...]:
        if not prompts:
            raise ValueError("a concept needs at least one prompt, a text that describes images with it: write one")
        return prompts


class Backbone(FileModel):
    """The frozen CLIP.

    Attributes:
        model: name of an open_clip model, builtin or of ours in ``configs/models``.
        weights: ``random`` (made from ``seed``), ``pretrained`` (open_clip's tag) or ``file`` (each site has
            the checkpoint; a bare file name is also looked up in ``configs/models``).
        tag: open_clip's tag, for ``pretrained``; a model ``hf-hub:...`` needs none.
        file: path of the checkpoint, for ``file``.
        seed: for ``random``.
        mirrored: whether training also uses mirrored images.
        licence: of the weights, as their publisher names it; for the model card of an export.
        activation: of the towers, as ``gelu``, ``quickgelu`` or ``gelu_tanh``; needed for a file of a model that
            there is with another activation too, which no weight tells. ``study new`` fills it in.
        digest: SHA-256 of the weights; ``study new`` fills it in.
        id: SHA-256 over the digest and all else that a feature depends on: activation, heads, eps, pooler, context,
            tokenizer and preprocessing; ``study new`` fills it in.
    """

    model: Text
    weights: Literal["random", "pretrained", "file"]
    tag: Text | None = None
    file: Text | None = None
    seed: Annotated[int, Field(ge=0, lt=2**32)] | None = None
    mirrored: bool = False
    licence: Text | None = None
    activation: Text | None = None
    digest: Hex64 | None = None
    id: Hex64 | None = None

    @field_validator("seed")
    @classmethod
    def _fits_weights(cls, seed: int | None, info: ValidationInfo) -> int | None:
        # Declared after weights, tag and file, so that all four are known here.
        given = {"tag": info.data.get("tag"), "file": info.data.get("file"), "seed": seed}
        needed = {"random": "seed", "pretrained": "tag", "file": "file"}.get(info.data.get("weights", ""))
        if needed == "tag" and str(info.data.get("model")).startswith("hf-hub:"):
            given.pop("tag")  # the model's name says it all
        if needed is not None:
            wrong = [key for key, value in given.items() if (value is not None) != (key == needed)]
            if wrong:
                raise ValueError(f'weights = "{info.data["weights"]}" takes {needed} and no other of {sorted(given)}')
        return seed

    model_config = FileModel.model_config | {"validate_default": True}


class KnownBackbone(Backbone):
    """The frozen CLIP of a study: its weights are known by their digest."""

    digest: Hex64


class Features(FileModel):
    """In which coordinates a method sees the features of the backbone, if it takes statistics of them.

    Attributes:
        basis: ``raw`` (the backbone's own), ``public`` (the directions of most spread of public images) or ``random``
            (drawn from the study's seed; needs no public image).
        dimensions: how many, of ``public`` and ``random``.
        source: where the statistics of public images are from: ``packaged`` with the backbone, ``images`` that ``study
            new --public`` was given, or ``file``, statistics that it was given; ``study new`` fills it in.
        digest: SHA-256 of these statistics, which ``study new`` fills in; a template that names one takes no others.
    """

    basis: Literal["raw", "public", "random"] = "raw"
    dimensions: Annotated[int, Field(ge=2, le=4096)] | None = None
    source: Literal["packaged", "images", "file"] | None = None
    digest: Hex64 | None = None

    model_config = FileModel.model_config | {"validate_default": True}

    @field_validator("dimensions")
    @classmethod
    def _of_a_basis(cls, dimensions: int | None, info: ValidationInfo) -> int | None:
        basis = info.data.get("basis")
        if basis == "raw" and dimensions is not None:
            raise ValueError('basis = "raw" takes all dimensions of the backbone; expected none, or another basis')
        if basis in ("public", "random") and dimensions is None:
            raise ValueError(f'basis = "{basis}" takes some dimensions; expected their number, 128 say')
        return dimensions

    @property
    def origin(self) -> str:
        """Where the coordinates come from, in one sentence for whoever reads a claim; empty if nothing was taken."""
        if self.basis == "random":
            return f"Features are seen in {self.dimensions} directions drawn from the study's seed, of nobody's images."
        if self.digest is None:
            return ""
        what = "relative to a centre" if self.basis == "raw" else f"in {self.dimensions} directions"
        whose = {
            "packaged": "that come with the backbone",
            "images": "of images that the study's makers declared public",
            "file": "given as a file that the study's makers declared to be of public images",
        }[self.source or "file"]
        return f"Features are seen {what} of public statistics (sha256 {self.digest[:16]}) {whose}: of no site's data."


class Method(FileModel):
    """What is trained, and by which loss (docs/facmic.md).

    Attributes:
        adapter: ``facmic``, ``fedclip`` (attention gates), ``low_rank`` (residual of rank ``rank``), ``text_head``,
            ``prompts`` (``context`` vectors before the class's first prompt) or ``gaussian_head`` (class statistics in
            one sum), or ``memory`` (of normal images, by sums; for ``task = "anomaly"``): a file of
            ``secure_fed/model/adapters``.
        norm: of ``facmic``'s gate; ``batch`` is the paper's, its statistics stay at the site.
        rank: of ``low_rank``.
        context: number of context vectors of ``prompts``.
        private_head: whether each site also trains a linear head of its own, which it never shares; not under
            differential privacy.
        loss: ``class_prompt`` (logit-adjusted cross-entropy) or the paper's in-batch ``contrastive``.
        lmmd_weight: weight of LMMD.
        adversarial_weight: weight of ``adversarial``.
        adaptation: what aligns labelled features with those of the site's own unlabelled images: ``lmmd`` (FACMIC's,
            by ``lmmd_weight``), ``adversarial`` (FAA-CLIP's private discriminator, by ``adversarial_weight``; not under
            differential privacy) or ``none``, whatever the weights are. If it is not said: ``lmmd`` where
            ``lmmd_weight`` is above 0, else ``none``.
        shrinkage: of ``gaussian_head``'s covariance towards a multiple of the identity; with a second round, in which
            patients' histograms choose it, only where there are none.
        min_patients: of ``gaussian_head``: a class with fewer in the sum is left out.
        most_patients: of ``gaussian_head``: most training patients, and most validation patients, that a site has. The
            bounds of its sums are made of it.
            Of ``memory``: fewest patients of whom a centroid is made, and most that a site has.
        coverage: of ``gaussian_head``: chance that a case's set holds its class.
        block: of ``memory``: block of the image tower whose patch features make the score; ``image`` for the feature of
            the whole image.
        map_block: of ``memory``: likewise of the heat map; as ``block`` if not given.
        centroids: of ``memory``: how many it has.
        neighbourhood: of ``memory``: patches a side that a patch feature is the mean of.
        top: of ``memory``: share of an image's patches, the farthest ones, whose mean distance is its score.
        start: of ``memory``: whether centroids start at patches of pictures of seeded noise (``random``) or of public
            images (``public``, with ``study new --public``); never at a site's.
        false_alarms: of ``memory``: share of normal patients of whom the threshold may flag an image.
    """

    adapter: Text = "facmic"
    norm: Literal["layer", "batch"] = "layer"
    rank: Annotated[int, Field(ge=1, le=256)] = 16
    context: Annotated[int, Field(ge=1, le=64)] = 16
    private_head: bool = False
    loss: Literal["class_prompt", "contrastive"] = "class_prompt"
    lmmd_weight: Annotated[float, Field(ge=0, le=1000)] = 0.0
    adversarial_weight: Annotated[float, Field(gt=0, le=1000)] = 0.5
    adaptation: Literal["lmmd", "adversarial", "none"] | None = None
    shrinkage: Annotated[float, Field(gt=0, le=1)] = 0.01
    min_patients: Annotated[int, Field(ge=1, le=10**6)] = 5
    most_patients: Annotated[int, Field(ge=2, le=10**6)] = 1000
    coverage: Annotated[float, Field(gt=0.5, lt=1)] = 0.9
    block: Text = "image"
    map_block: Text | None = None
    centroids: Annotated[int, Field(ge=1, le=4096)] = 64
    neighbourhood: Literal[1, 3] = 1
    top: Annotated[float, Field(gt=0, le=1)] = 0.01
    start: Literal["random", "public"] = "random"
    false_alarms: Annotated[float, Field(gt=0, lt=0.5)] = 0.05

    @property
    def one_sum(self) -> bool:
        """Whether sites send statistics, once, instead of updates round by round."""
        return self.adapter == "gaussian_head"

    @property
    def sums(self) -> bool:
        """Whether sites send statistics that are added up, not updates that are averaged."""
        return self.one_sum or self.adapter == "memory"

    @property
    def blocks(self) -> tuple[str, ...]:
        """Blocks of the image tower whose patch features are seen, of ``memory`` alone."""
        if self.adapter != "memory":
            return ()
        return (self.block,) if self.map_block in (None, self.block) else (self.block, str(self.map_block))

    @property
    def aligns(self) -> Literal["lmmd", "adversarial", "none"]:
        """What aligns labelled features with unlabelled ones."""
        return self.adaptation or ("lmmd" if self.lmmd_weight > 0 else "none")

    @property
    def domain_weight(self) -> float:
        """Weight of what aligns; 0 if nothing does."""
        return {"lmmd": self.lmmd_weight, "adversarial": self.adversarial_weight, "none": 0.0}[self.aligns]

    @property
    def domain_term(self) -> str:
        """What aligns and with which weight, in words."""
        names = {"lmmd": "LMMD", "adversarial": "adversarial", "none": "none"}
        return names[self.aligns] + (f", weight {self.domain_weight:g}" if self.aligns != "none" else "")

    @field_validator("adaptation")
    @classmethod
    def _has_a_weight(cls, adaptation: str | None, info: ValidationInfo) -> str | None:
        if adaptation == "lmmd" and info.data.get("lmmd_weight") == 0:
            raise ValueError(
                'lmmd_weight = 0 turns it off; expected its weight, such as lmmd_weight = 1.0 as in FACMIC, or "none"'
            )
        return adaptation

    @field_validator("private_head")
    @classmethod
    def _trains(cls, private_head: bool, info: ValidationInfo) -> bool:
        if private_head and info.data.get("adapter") in ("gaussian_head", "memory"):
            raise ValueError(f"{info.data['adapter']} is solved, not trained; expected false, or another adapter")
        return private_head

    @field_validator("adapter")
    @classmethod
    def _known(cls, adapter: str) -> str:
        if adapter not in ADAPTERS:
            raise ValueError(f"no such adapter; expected one of {', '.join(ADAPTERS)}")
        return adapter


class Training(FileModel):
    """One round's local training; the optimiser's state starts anew.

    Attributes:
        steps: mini-batches of one round.
        learning_rate: of the optimiser.
        batch_size: images of one mini-batch.
        optimizer: ``adam`` with ``betas`` and ``epsilon``, or ``sgd`` with ``momentum``.
        weight_decay: share of the weights that is added to their gradient.
        betas: decay of ``adam``'s first and second moment.
        epsilon: what ``adam`` adds to the root of the second moment.
        momentum: of ``sgd``.
        prox: mu of FedProx's term mu/2 |w - w_global|^2 in the loss (Li et al., arXiv 1812.06127, eq. 2); 0 turns it
            off.
    """

    steps: Annotated[int, Field(ge=1, le=100_000)]
    learning_rate: Annotated[float, Field(gt=0, le=10)]
    batch_size: Annotated[int, Field(ge=1, le=65_536)] = 32
    optimizer: Literal["adam", "sgd"] = "adam"
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.0
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    epsilon: Annotated[float, Field(gt=0, le=1)] = 1e-8
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    prox: Annotated[float, Field(ge=0, le=1000)] = 0.0


PatientRule = Literal["mean", "largest"]
Background = Literal["black", "white"]


class Aggregation(FileModel):
    """What every site makes of a round's average update; the others need no server that could read it.

    Attributes:
        rule: ``average`` (add it), ``fedavgm`` (momentum, Hsu et al., arXiv 1909.06335) or ``fedadam`` (Reddi et al.,
            arXiv 2003.00295, algorithm 2); see :mod:`secure_fed.protocol.aggregation`.
        learning_rate: eta of ``fedavgm`` and ``fedadam``.
        betas: decay of the first and, for ``fedadam``, second moment; ``fedavgm`` uses the first.
        tau: of ``fedadam``: the smaller, the more adaptive.
        iterates: which adapter comes out: the ``last`` one, or the ``mean`` of those after each round, in which the
            noise of private rounds cancels in part.
    """

    rule: Literal["average", "fedavgm", "fedadam"] = "average"
    learning_rate: Annotated[float, Field(gt=0, le=10)] = 1.0
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.99)
    tau: Annotated[float, Field(gt=0, le=1)] = 1e-3
    iterates: Literal["last", "mean"] = "last"

    @property
    def moments(self) -> int:
        """How many vectors of the adapter's size the rule keeps beside it."""
        return {"average": 0, "fedavgm": 1, "fedadam": 2}[self.rule] + (self.iterates == "mean")

    @field_validator("learning_rate")
    @classmethod
    def _average_has_none(cls, rate: float, info: ValidationInfo) -> float:
        if info.data.get("rule") == "average" and rate != 1:
            raise ValueError('rule = "average" adds the average as it is; expected 1, or another rule')
        return rate


class Window(FileModel):
    """Which grey values of one modality are shown, so that all sites show them alike.

    Attributes:
        modality: as DICOM files name it, ``CT``, ``MR``; ``NIFTI`` for NIfTI files, which name none.
        centre: the value in the middle of the grey scale.
        width: ``centre`` - ``width`` / 2 becomes black, ``centre`` + ``width`` / 2 white.
        unit: of both: ``HU`` refuses files whose values are none; ``rescaled`` takes what the modality rescale gives.
    """

    modality: Annotated[str, spelled(r"^[A-Z0-9_]{1,16}$", "DICOM's word in capital letters, as CT")]
    centre: Annotated[float, Field(ge=-1e9, le=1e9)]
    width: Annotated[float, Field(gt=0, le=1e9)]
    unit: Literal["HU", "rescaled"]


class Encoding(FileModel):
    """How an update becomes bounded integers.

    Attributes:
        bits: width of one value in its lane, sign included (8 to 21); in a template, 11 if not given, or what fits so
            many sites.
        precision_bits: width of a value before it goes into lanes, sign included; as ``bits`` if not given. A wider one
            takes several lanes, as digits: any precision then fits any number of sites. Of ``gaussian_head``, if not
            given, ``study new`` writes what its basis asks for, and with it the ``bits`` that take the fewest bytes.
        lanes: values in one coefficient of a ciphertext, 2 to 6; if not given, the number that takes the fewest bytes.
        value_bound: public bound on each coordinate of an update; what exceeds it saturates.
        value_bounds: other bounds for single tensors, by parameter name.
        share_validation: whether the encrypted sum also carries the number of validation images and of
            correct ones (never a single site's; all classes together).
    """

    bits: Annotated[int, Field(ge=MIN_BITS, le=MAX_BITS)]
    precision_bits: Annotated[int, Field(ge=MIN_BITS)] | None = None
    lanes: Annotated[int, Field(ge=MIN_LANES, le=MAX_LANES)] | None = None
    value_bound: Annotated[float, Field(gt=0, le=1000)]
    value_bounds: dict[Text, Annotated[float, Field(gt=0, le=1000)]] = Field(default_factory=dict)
    share_validation: bool = True

    @field_validator("precision_bits")
    @classmethod
    def _at_least_a_lane(cls, precision: int | None, info: ValidationInfo) -> int | None:
        bits = info.data.get("bits", 0)
        if precision is not None and precision < bits:
            raise ValueError(f"less than bits = {bits}, the width of a lane; expected at least that, or lower bits")
        return precision

    @property
    def precision(self) -> int:
        """Width of a value, sign included."""
        return self.precision_bits or self.bits


class PrivateTraining(FileModel):
    """Public constants of training under differential privacy; sites without a budget use none of them.

    Attributes:
        clip: most that one patient moves a sum of gradients (L2 norm).
        steps: noisy steps of one round, each over all patients.
        learning_rate: of the optimiser, which sees noisy mean gradients only.
        optimizer: ``sgd`` with ``momentum``, or ``adam``.
        momentum: of ``sgd``.
        n_ref: declared number of training patients of a site that declares none itself.
        images_per_patient: at most so many images of a patient are trained on, the first by path.
        prior: shares of the classes that logits are adjusted by; uniform if empty.
        lmmd_centre: public point that features are taken relative to in the released means; the origin if empty.
        lmmd_radius: bound on a feature's distance from it; unit features lie within 1 of the origin.
        lmmd_use: what the domain term does with released class means (:mod:`secure_fed.clients.private_lmmd`).
        validation_rounds: in how many rounds, spread evenly up to the last, validation counts are released; their
            noise is paid for by the validation patients' own budget. 0: none, and nothing of them leaves.
    """

    clip: Annotated[float, Field(gt=0, le=1e6)] = 4.0
    steps: Annotated[int, Field(ge=1, le=10_000)] = 4
    learning_rate: Annotated[float, Field(gt=0, le=100)] = 0.5
    optimizer: Literal["adam", "sgd"] = "sgd"
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    n_ref: Annotated[int, Field(ge=1, le=10**9)] = 500
    images_per_patient: Annotated[int, Field(ge=1, le=4096)] = 8
    prior: tuple[Annotated[float, Field(gt=0, le=1)], ...] = ()
    lmmd_centre: tuple[Annotated[float, Field(ge=-1, le=1)], ...] = ()
    lmmd_radius: Annotated[float, Field(gt=0, le=2)] = 1.0
    lmmd_use: Literal["synthesis", "attraction", "witness"] = "attraction"
    validation_rounds: Annotated[int, Field(ge=0, le=100_000)] = 0


class SiteKeys(FileModel):
    """The public half of a site's identity.

    Attributes:
        signing: Ed25519 public key, 32 bytes in hex; signs envelopes.
        flower: EC P-384 public key in OpenSSH form; opens the connection.
        recipient: age X25519 recipient; study keys are sealed to it.
    """

    signing: Hex64
    flower: Annotated[str, StringConstraints(pattern=r"^ecdsa-sha2-nistp384 [A-Za-z0-9+/=]+$", max_length=400)]
    recipient: Annotated[str, StringConstraints(pattern=r"^age1[0-9a-z]{58}$")]


class StudySite(FileModel):
    """A site of the study.

    Attributes:
        name: of the site, in every file and message.
        role: a ``train`` site sends updates, an ``observer`` only applies what others sum.
        weight: public factor of its updates in the average, relative to the other sites'.
        keys: public half of its identity; ``study add-site`` and ``study new --site`` fill it in.
    """

    name: Name
    role: Literal["train", "observer"] = "train"
    weight: Annotated[float, Field(gt=0, le=1)] = 1.0
    keys: SiteKeys | None = None


class Member(StudySite):
    """A site whose keys are known: of a study, or one that joins it later."""

    keys: SiteKeys


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
        Annotated[str, spelled(r"^https?://[^\s?#]{1,250}$", "a URL, as in https://files.example.org/records")] | None
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
        elif len(classes) < 2:
            raise ValueError(f"{len(classes)} classes; expected at least 2")
        _refuse_duplicates("class", [entry.name for entry in classes])
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
class InitialState:
    """What ``study.safetensors`` holds: computed once, by ``study new``, and never again.

    Attributes:
        adapter: initial shared parameters by name, float64; the flat order is that of the sorted names.
        prompt_features: unit text features, float32 [classes, d].
        logit_scale: the frozen CLIP's exp(logit_scale).
        prompt_tokens: of a method that trains through the text tower, tokens of each class's first prompt, int64
            [classes, context length]; a site's own tokenizer is not asked.
        basis: of a method that takes statistics of features, their coordinates.
    """

    adapter: dict[str, NDArray[np.float64]]
    prompt_features: NDArray[np.float32]
    logit_scale: float
    prompt_tokens: NDArray[np.int64] | None = None
    basis: Basis | None = None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the shared parameters, by sorted name."""
        return {name: self.adapter[name].shape for name in sorted(self.adapter)}

    def to_bytes(self) -> bytes:
        """The safetensors file."""
        tensors: dict[str, NDArray[Any]] = {f"adapter.{name}": value for name, value in self.adapter.items()}
        tensors["prompt_features"] = self.prompt_features
        tensors["logit_scale"] = np.array([self.logit_scale], dtype=np.float64)
        if self.prompt_tokens is not None:
            tensors["prompt_tokens"] = self.prompt_tokens
        if self.basis is not None:
            tensors |= self.basis.tensors()
        return bytes(safetensors.numpy.save(tensors))

    @classmethod
    def from_bytes(cls, data: bytes) -> InitialState:
        """Read the safetensors file back.

        Raises:
            StudyError: it is not one of ours.
        """
        try:
            tensors = safetensors.numpy.load(data)
            adapter = {
                name.removeprefix("adapter."): value for name, value in tensors.items() if name.startswith("adapter.")
            }
            if broken := sorted(name for name, value in tensors.items() if not np.isfinite(value).all()):
                raise ValueError(f"{', '.join(broken)} not finite, of a backbone that cannot be used")
            prompts = tensors["prompt_features"]
            basis = Basis.of(tensors, prompts.shape[1])
            return cls(adapter, prompts, float(tensors["logit_scale"][0]), tensors.get("prompt_tokens"), basis)
        except (safetensors.SafetensorError, KeyError, ValueError) as error:
            raise StudyError(f"study.safetensors: malformed ({error}); copy it again from the coordinator") from error


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


def as_template(file: StudyFile) -> dict[str, Any]:
    """What a study has from its template, without all that ``study new`` fills in, to compare two of them."""
    content = file.model_dump(mode="json", exclude={"simulation", "coordinator", "initial"})
    del content["format"]
    content["collusion"] = file.colluders  # which a template need not say
    for key in ("activation", "digest", "id"):
        content["backbone"].pop(key)
    for site in content["sites"]:
        site.pop("keys")
    for key in ("source", "digest"):
        content["features"].pop(key)
    return content


def unlike(study: StudyFile, template: StudyFile) -> list[str]:
    """The tables and keys in which a study is not what ``study new`` makes of a template; empty if it is."""
    here, wanted = as_template(study), as_template(template)
    if template.method.one_sum and template.encoding.precision_bits is None:
        wanted["encoding"] |= {key: here["encoding"][key] for key in ("bits", "precision_bits")}
    return sorted(key for key in wanted if here[key] != wanted[key])


@dataclass(frozen=True)
class Difference:
    """One field in which two study files differ; None where one of them has none."""

    field: str
    before: Any
    after: Any


def differences(before: StudyFile, after: StudyFile) -> list[Difference]:
    """Every field in which two differ, ``[simulation]`` left out; sites and classes are compared by name."""
    first, second = (_leaves(file.model_dump(mode="json", exclude={"simulation"})) for file in (before, after))
    return [
        Difference(field, first.get(field), second.get(field))
        for field in sorted(set(first) | set(second))
        if first.get(field) != second.get(field)
    ]


def _leaves(value: Any, path: str = "") -> dict[str, Any]:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        value = {entry["name"]: entry for entry in value}
    if not isinstance(value, dict):
        return {path: value}
    found: dict[str, Any] = {}
    for name, entry in value.items():
        found.update(_leaves(entry, f"{path}.{name}" if path else name))
    return found


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


def canonical_json(content: Any) -> bytes:
    """The one JSON form that we hash and sign: sorted keys, no spaces, ASCII, no NaN."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


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

"""The tables of a template or study, one by one; :mod:`secure_fed.protocol.study` puts them together.

What two tables ask of each other is checked there: no table knows another.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, StringConstraints, ValidationInfo, field_validator

from secure_fed.core.tomlfile import FileModel, spelled
from secure_fed.protocol.packing import MAX_BITS, MAX_LANES, MIN_BITS, MIN_LANES

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

NORMAL, ANOMALY = 0, "anomaly"
"""Of a study of anomalies: label of normal images, and name of the second class, which all other labels are of."""


def _some_prompts(prompts: tuple[str, ...]) -> tuple[str, ...]:
    if not prompts:
        raise ValueError("expected at least one prompt, a text that describes such images: write one")
    return prompts


Prompts = Annotated[tuple[Text, ...], AfterValidator(_some_prompts)]
"""Texts of one class or concept."""


class StudyClass(FileModel):
    """One class.

    Attributes:
        name: as a folder or a manifest's label has it at the sites.
        prompts: texts that describe its images, reviewed by people; the class's feature is the mean of theirs.
        finding: whether its images show a finding. Of a class that says no, explanations ask why it is another one
            and not that: where the tumour lies, and not what all tumours' slices have in common.
    """

    name: Text
    prompts: Prompts
    finding: bool = True


class Concept(FileModel):
    """Something that a person looks for in an image, by which a prediction is explained; nothing is trained on it.

    Attributes:
        name: in a word or two, as a page of cases shows it.
        prompts: texts that describe images with it, reviewed by people; the concept's feature is the mean of theirs.
    """

    name: Text
    prompts: Prompts


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
            others = [key for key, value in given.items() if value is not None and key != needed]
            faults = [f"{needed} is missing"] if needed in given and given[needed] is None else []
            faults += [f"{' and '.join(others)} must go"] if others else []
            if faults:
                told = "; ".join(faults)
                raise ValueError(f'expected {needed} alone beside weights = "{info.data["weights"]}": {told}')
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
        adversarial_weight: weight of ``adversarial``; 0.5, FAA-CLIP's, if not given.
        adaptation: what aligns labelled features with those of the site's own unlabelled images: ``lmmd`` (FACMIC's,
            by ``lmmd_weight``), ``adversarial`` (FAA-CLIP's private discriminator, by ``adversarial_weight``; not under
            differential privacy) or ``none``, whatever the weights are. If it is not said: ``lmmd`` where
            ``lmmd_weight`` is above 0, else ``none``.
        shrinkage: of ``gaussian_head``'s covariance towards a multiple of the identity, above 0; with a second round,
            in which patients' histograms choose it, only where there are none.
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
    adversarial_weight: Annotated[float, Field(gt=0, le=1000)] | None = None
    adaptation: Literal["lmmd", "adversarial", "none"] | None = None
    shrinkage: Annotated[float, Field(ge=0, le=1)] = 0.01
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
        adversarial = _FAA_CLIP if self.adversarial_weight is None else self.adversarial_weight
        return {"lmmd": self.lmmd_weight, "adversarial": adversarial, "none": 0.0}[self.aligns]

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


_FAA_CLIP = 0.5
"""Its weight of the discriminator's loss."""


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
        iterates: which adapter comes out: the ``last`` one, or a mean of those after each round, in which the noise of
            private rounds cancels in part: of all alike (``mean``), or each by the square of its round (``late``), so
            that where training began weighs little.
    """

    rule: Literal["average", "fedavgm", "fedadam"] = "average"
    learning_rate: Annotated[float, Field(gt=0, le=10)] = 1.0
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.99)
    tau: Annotated[float, Field(gt=0, le=1)] = 1e-3
    iterates: Literal["last", "mean", "late"] = "last"

    @property
    def moments(self) -> int:
        """How many vectors of the adapter's size the rule keeps beside it."""
        return {"average": 0, "fedavgm": 1, "fedadam": 2}[self.rule] + (self.iterates != "last")

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
        unit: of both: ``HU`` refuses files whose values are none, and modalities that have none; ``rescaled`` takes
            what the modality rescale gives.
    """

    modality: Annotated[str, spelled(r"^[A-Z0-9_]{1,16}$", "DICOM's word in capital letters, as CT")]
    centre: Annotated[float, Field(ge=-1e9, le=1e9)]
    width: Annotated[float, Field(gt=0, le=1e9)]
    unit: Literal["HU", "rescaled"]

    @field_validator("unit")
    @classmethod
    def _has_hounsfield_units(cls, unit: str, info: ValidationInfo) -> str:
        if unit == "HU" and (modality := info.data.get("modality")) in ("MR", "US", "PT", "NM", "CR", "DX", "MG"):
            raise ValueError(f"no unit of {modality}, whose values are not measured in it; expected 'rescaled'")
        return unit


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
        flower: EC public key in OpenSSH form, P-256 (P-384 of identities made before); signs its requests, opens the
            connection.
        recipient: age X25519 recipient; study keys are sealed to it.
    """

    signing: Hex64
    flower: Annotated[str, StringConstraints(pattern=r"^ecdsa-sha2-nistp(256|384) [A-Za-z0-9+/=]+$", max_length=400)]
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

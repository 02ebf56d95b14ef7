"""Single cases explained, for the people who treat the patients: everything stays at the site.

Beside what :mod:`secure_fed.operate.predict` says of an image: where in it the reasons lie, what the study's concepts
contribute, what training changed against zero-shot, and, where the site allows it, which of its own training patients
are most like it. None of it is a diagnosis, and none of it goes into an export, an evidence archive or a message.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from secure_fed.clients.data import SiteImage
from secure_fed.clients.decoding import decode
from secure_fed.clients.features import FeatureCache, SiteFeatures, load_features
from secure_fed.clients.images import rules_of, site_images
from secure_fed.clients.photographs import as_drawn
from secure_fed.clients.rules import Rules
from secure_fed.clients.sitefile import read_site
from secure_fed.core.errors import AdapterFileError, OutputError, SiteFileError, StorageError
from secure_fed.core.storage import made_folder, write_durable
from secure_fed.model.adapter_file import AdapterFile
from secure_fed.model.attribution import HeatMaps, Margin, question
from secure_fed.model.backbone import load_backbone
from secure_fed.model.device import Device
from secure_fed.model.heat import overlay
from secure_fed.model.loaded_backbone import LoadedBackbone
from secure_fed.operate.predict import Anomalies, Probabilities
from secure_fed.protocol.study_tables import NORMAL

CASES = "cases.json"
PAGE = "cases.html"
_PICTURES = "case-[0-9][0-9][0-9][0-9]*.png"
NOT_A_DIAGNOSIS = (
    "This is no diagnosis, and no medical device: it shows what a classifier computed, not what the patient has. A map "
    "shows what moved the computation, which need not be the finding."
)
_RIDGE = 0.1
"""Of the fit of concepts to a feature, in units of a concept's mean square; concepts are much alike."""

_NOTHING = {"prediction": None, "probabilities": None, "set": None}
"""What is claimed of a stranger."""

_SHOWN = 320
"""Least side of a picture with its map, in pixels."""


@dataclass(frozen=True)
class ConceptShare:
    """What one concept has to do with a prediction.

    Attributes:
        name: the study's.
        similarity: cosine of the image's feature as the backbone gives it and the concept's.
        adapted: the same of the feature that the adapter made of it.
        contribution: to the margin of the predicted class, its logit over the mean of the others'.
    """

    name: str
    similarity: float
    adapted: float
    contribution: float


@dataclass(frozen=True)
class Similar:
    """One of the site's own training patients.

    Attributes:
        number: of the patient on this page, by first appearance; no id of anything.
        label: its class.
        cosine: between its nearest image and the case.
    """

    number: int
    label: str
    cosine: float


@dataclass(frozen=True)
class Explanation:
    """One image explained.

    Attributes:
        said: as :meth:`Probabilities.document` has it, of this image; of a stranger no class and no probabilities.
        zero_shot: probabilities by class without any training; empty for a memory, and for a stranger.
        margin: of the predicted class; None for a memory, and for a stranger.
        against: the class that it is over, the study's without a finding; None for the mean of all others.
        concepts: what the study's concepts contribute; empty if it has none, and for a stranger.
        rest: the part of the margin that no concept explains.
        similar: of the site's own training patients, the nearest first; none for a stranger.
        picture: what the image tower saw, with the map over it if there is one, as PNG.
        has_map: whether there is; a stranger has none, nor an image no place of which speaks for the class.
    """

    said: dict[str, Any]
    zero_shot: dict[str, float]
    margin: float | None
    against: str | None
    concepts: tuple[ConceptShare, ...]
    rest: float | None
    similar: tuple[Similar, ...]
    picture: bytes = field(repr=False)
    has_map: bool = True

    def document(self, map_file: str) -> dict[str, Any]:
        """As a JSON document; ``map_file`` names the picture beside it."""
        shares = [vars(one) for one in self.concepts]
        return self.said | {
            "zero_shot": self.zero_shot or None,
            "margin": self.margin,
            "against": self.against,
            "concepts": shares,
            "rest": self.rest,
            "similar_training_patients": [vars(one) for one in self.similar],
            "picture": map_file,
            "has_map": self.has_map,
        }


@dataclass(frozen=True)
class Explained:
    """All images of a folder explained.

    Attributes:
        found: what the adapter says of them.
        maps: how maps are made, in words.
        cases: in the images' order.
    """

    found: Probabilities
    maps: str
    cases: tuple[Explanation, ...]

    def document(self) -> dict[str, Any]:
        """As a JSON document: what is said of the images, as on the page; of patients, ``predict`` says it."""
        whole = {key: value for key, value in self.found.document().items() if key not in ("patients", "per_patient")}
        cases = [case.document(name) for case, name in zip(self.cases, self.pictures(), strict=True)]
        return whole | {"images": cases, "maps": self.maps, "notice": NOT_A_DIAGNOSIS}

    def pictures(self) -> list[str]:
        """Names of the cases' pictures: numbers, for a path may name a patient."""
        return [f"case-{place + 1:04d}.png" for place in range(len(self.cases))]


def explain(
    found: Probabilities,
    checkpoint: Path | None = None,
    site: Path | None = None,
    device: Device = "cpu",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Explained:
    """Explain what an adapter says.

    Args:
        found: as :func:`secure_fed.operate.predict.predict_folder` gives it.
        checkpoint: the backbone's weights, if they do not lie where the study says.
        site: a ``site.toml`` that allows ``similar_cases``, to show the nearest of its own training patients.
        device: where the backbone computes.
        progress: told how many images are done, of how many.

    Raises:
        SiteFileError: the site file cannot be read, does not allow to show its patients, or the site trains on none.
        AdapterFileError: the site is of another study than the adapter.
        SecfacmicError: others, of the site's data and the backbone.
    """
    file, x = found.adapter, found.features
    assert x is not None, "predict_folder keeps them"
    neighbours = None if site is None else _Neighbours(site, file, device)
    backbone = load_backbone(file.backbone, checkpoint, device)
    images = found.document()["images"]
    if found.anomalies is not None:
        explainer: _Memory | _Classifier = _Memory(found.anomalies)
    else:
        explainer = _Classifier(file, backbone)
    cases = []
    for place, image in enumerate(found.images):
        prepared = _prepared(backbone, image, found.rules)
        strange = found.cases is not None and found.cases.strange(place) is True
        heat = None if strange else explainer.map(place, prepared, x[place])
        zero_shot, margin, concepts, rest = ({}, None, (), None) if strange else explainer.reasons(x[place])
        similar = () if neighbours is None or strange else neighbours.of(x[place])
        picture = _drawn(backbone, prepared, heat)
        said = dict(images[place]) | (_NOTHING if strange else {})
        against = None if margin is None else file.held_against(said["prediction"])
        cases.append(Explanation(said, zero_shot, margin, against, concepts, rest, similar, picture, heat is not None))
        progress(place + 1, len(found.images))
    return Explained(found, explainer.kind, tuple(cases))


def write_cases(explained: Explained, page: str, folder: Path) -> list[Path]:
    """Write ``cases.html``, ``cases.json`` and a PNG a case, readable by the owner alone.

    Args:
        explained: as :func:`explain` gives it.
        page: the HTML.
        folder: made if it is not there.

    Raises:
        OutputError: it holds cases already, or is a file.
        StorageError: they cannot be written.
    """
    refuse_cases(folder)
    text = json.dumps(explained.document(), indent=2) + "\n"
    parts = [*zip(explained.pictures(), (case.picture for case in explained.cases), strict=True)]
    parts += [(CASES, text.encode()), (PAGE, page.encode())]
    with made_folder(folder, 0o700):
        try:
            for name, content in parts:
                write_durable(folder / name, content, 0o600)
        except BaseException:
            for name, _ in parts:  # none of which was there before: a page that lacks pictures is none
                (folder / name).unlink(missing_ok=True)
            raise
    return [folder / name for name, _ in parts]


def refuse_cases(folder: Path) -> None:
    """Check that a folder can get cases, before hours of computing them.

    Raises:
        OutputError: it holds cases already, or is a file.
        StorageError: nobody may write there.
    """
    above = next(place for place in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(place))
    if not above.is_dir():
        what = "a link to nowhere" if above.is_symlink() and not above.exists() else "a file"
        raise OutputError(f"{above}: {what}; expected a folder for the cases, which is made if it is not there")
    if not os.access(above, os.W_OK):
        raise StorageError(f"{folder}: cannot be written ({above} is not yours to write to); choose another place")
    held = next((path for form in (CASES, PAGE, _PICTURES) for path in sorted(folder.glob(form))), None)
    if held is not None:
        raise OutputError(
            f"{folder}: holds {held.name}, as explained cases have it; expected another folder, or an empty one"
        )


Reasons = tuple[dict[str, float], float | None, tuple[ConceptShare, ...], float | None]


class _Classifier:
    def __init__(self, file: AdapterFile, backbone: LoadedBackbone) -> None:
        tokens = file.initial.prompt_tokens
        self._file = file
        self._adapter = file.build(None if tokens is None else backbone.text_tower(tokens))
        self._concepts = _text_features(backbone, file)
        self._maps = HeatMaps(backbone)
        self._asked: dict[int, tuple[Margin, Margin | None]] = {}
        self.kind = self._maps.kind

    def map(self, place: int, prepared: NDArray[np.float32], x: NDArray[np.float32]) -> NDArray[np.float64] | None:
        """Of the margin of the predicted class; None where no place speaks for it."""
        return self._maps.of(prepared, *self._question(x))

    def reasons(self, x: NDArray[np.float32]) -> Reasons:
        """Zero-shot, and what the concepts contribute to the margin.

        The margin's gradient at the feature makes it, to first order, a sum over the feature's coordinates; the
        feature is written as a weighted sum of the concepts' directions, by ridge regression, and a rest.
        """
        file = self._file
        # At the adapter's temperature, so that what differs from its probabilities is what the study changed.
        logits = file.initial.logit_scale * (file.initial.prompt_features.astype(np.float64) @ x) / file.temperature
        p = np.exp(logits - logits.max())
        zero_shot = {name: float(value) for name, value in zip(file.classes, p / p.sum(), strict=True)}
        features = torch.from_numpy(x[None].copy()).requires_grad_(True)
        margin = self._question(x)[0](features)
        (gradient,) = torch.autograd.grad(margin.sum(), features)
        value = float(margin.item())
        if not file.concepts:
            return zero_shot, value, (), None
        with torch.inference_mode():
            adapted = self._adapter.adapt(torch.from_numpy(x[None])).double().numpy()[0]
        texts = np.concatenate([self._concepts, file.initial.prompt_features])
        directions = self._concepts - texts.mean(axis=0)
        gram = directions @ directions.T
        weights = np.linalg.solve(gram + _RIDGE * np.trace(gram) / len(gram) * np.eye(len(gram)), directions @ x)
        shares = weights * (directions @ gradient.double().numpy()[0])
        found = tuple(
            ConceptShare(concept.name, float(text @ x), float(text @ adapted), float(share))
            for concept, text, share in zip(file.concepts, self._concepts, shares, strict=True)
        )
        return zero_shot, value, found, value - float(shares.sum())

    def _question(self, x: NDArray[np.float32]) -> tuple[Margin, Margin | None]:
        """What is asked of the predicted class, made once for each: a pattern inverts the study's axes."""
        with torch.inference_mode():
            label = int(self._adapter.logits(torch.from_numpy(x[None])).argmax())
        if label not in self._asked:
            self._asked[label] = question(self._file, self._adapter, label)
        return self._asked[label]


class _Memory:
    def __init__(self, found: Anomalies) -> None:
        self._found = found
        self.kind = f"distances of patches to the nearest normal centroid ({found.scale.words})"

    def map(self, place: int, prepared: NDArray[np.float32], x: NDArray[np.float32]) -> NDArray[np.float64]:
        """The memory's own, on one scale for all images."""
        return self._found.scale.share(self._found.maps[place])

    def reasons(self, x: NDArray[np.float32]) -> Reasons:
        """None: a memory knows one class."""
        return {}, None, (), None


class _Neighbours:
    """The nearest of a site's own training patients."""

    def __init__(self, site: Path, adapter: AdapterFile, device: Device) -> None:
        file, agreed = read_site(site)
        if not file.similar_cases:
            raise SiteFileError(
                f"{site}: similar_cases is 0, so no page shows this site's own patients beside a case; expected 1 or "
                "more: set it, or leave --site out"
            )
        if agreed.study.id != adapter.study:
            raise AdapterFileError(
                f"{site}: a site of study {agreed.study.id[:16]}, but the adapter is of study {adapter.study[:16]}; "
                "expected both of one study"
            )
        if agreed.study.site(file.site).role != "train":
            raise SiteFileError(
                f"{site}: {file.site} is an observer, which trains on no patient, so that there is none to show beside "
                "a case; expected a training site: leave --site out"
            )
        checkpoint = None if file.checkpoint is None else Path(file.checkpoint)
        with FeatureCache(file.feature_cache) as cache:
            features: SiteFeatures = load_features(
                *(site_images(file, agreed), agreed, cache, checkpoint, file.skip_unreadable),
                device=device,
                rules=rules_of(file, agreed),
            )
        # Mirrored rows follow the plain ones; a patient is as near as the nearest of its images.
        taught = np.ones(len(features.train.y), dtype=bool)
        if agreed.study.task == "anomaly":
            taught = features.train.y == NORMAL
        self._x, self._y = features.train.x[taught], features.train.y[taught]
        self._patients = [owner for owner, own in zip(features.patients["train"], taught, strict=True) if own]
        self._classes, self._count = adapter.classes, file.similar_cases
        self._numbers: dict[str, int] = {}

    def of(self, x: NDArray[np.float32]) -> tuple[Similar, ...]:
        """The nearest to a feature, each patient once."""
        cosines = self._x @ x / np.linalg.norm(self._x, axis=1) / np.linalg.norm(x)
        found: dict[str, Similar] = {}
        for row in np.argsort(-cosines, kind="stable"):
            patient = self._patients[row]
            if patient in found:
                continue
            number = self._numbers.setdefault(patient, len(self._numbers) + 1)
            found[patient] = Similar(number, self._classes[self._y[row]], float(cosines[row]))
            if len(found) == self._count:
                break
        return tuple(found.values())


def _text_features(backbone: LoadedBackbone, file: AdapterFile) -> NDArray[np.float64]:
    """Unit features of the concepts, [concepts, d]."""
    rows = [backbone.encode_texts(concept.prompts).astype(np.float64).mean(axis=0) for concept in file.concepts]
    found = np.stack(rows) if rows else np.empty((0, backbone.dim))
    return np.asarray(found / np.linalg.norm(found, axis=1, keepdims=True))


def _prepared(backbone: LoadedBackbone, image: SiteImage, rules: Rules) -> NDArray[np.float32]:
    return backbone.prepare(decode(image.path.read_bytes(), image.frame, image.axis, rules))


def _drawn(backbone: LoadedBackbone, prepared: NDArray[np.float32], heat: NDArray[np.float64] | None) -> bytes:
    """What the tower saw, with a map over it, as PNG."""
    picture = backbone.seen(prepared)
    if picture.width < _SHOWN:
        picture = picture.resize((_SHOWN, _SHOWN), Image.Resampling.BICUBIC)
    return as_drawn(picture if heat is None else overlay(picture, heat))

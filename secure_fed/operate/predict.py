"""An adapter at work: calibrated probabilities for a folder of images."""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from secure_fed.clients.data import EVERYTHING, Choice, SiteImage, find_pictures
from secure_fed.clients.decoding import decode
from secure_fed.clients.doubts import all_doubts, renamed
from secure_fed.clients.duplicates import Fingerprint
from secure_fed.clients.encoding import Patches, encode_all
from secure_fed.clients.files import MANIFEST, Notes
from secure_fed.clients.patients import MANY_IN_ONE, SETTLED, Doubt
from secure_fed.clients.photographs import as_drawn, no_picture
from secure_fed.clients.rules import MOST_PIXELS, Rules
from secure_fed.core.errors import AdapterFileError, DataError, UnreadableImageError, fault_lines
from secure_fed.core.storage import make_folder, refuse_foreign, write_durable
from secure_fed.model.adapter_file import AdapterFile, load_adapter
from secure_fed.model.backbone import load_backbone
from secure_fed.model.cases import Cases, judge
from secure_fed.model.device import Device
from secure_fed.model.heat import Scale, Window, overlay
from secure_fed.protocol import memory, one_sum
from secure_fed.protocol.study import load_study
from secure_fed.protocol.study_tables import PatientRule

_COLUMNS = ("image", "frame", "axis", "patient", "images")
_FIRST_KEY = "adapter_digest"


def is_prediction(head: bytes) -> bool:
    """Whether a file that begins so is what :meth:`Probabilities.csv` or :meth:`Probabilities.document` gives."""
    return head.startswith(f"{','.join(_COLUMNS)},".encode()) or head.startswith(f'{{\n  "{_FIRST_KEY}": '.encode())


@dataclass(frozen=True)
class Anomalies:
    """How far n images are from normal.

    Attributes:
        scores: [n].
        limit: score from which on an image is flagged; None if there is none.
        maps: [n, h, w], by place; large where an image is unlike normal ones.
        scale: which distances a drawn map shows.
        window: from a picture's width and height, the part of it that the maps are of.
    """

    scores: NDArray[np.float64]
    limit: float | None
    maps: NDArray[np.float64]
    scale: Scale
    window: Callable[[tuple[int, int]], Window]

    def said(self, own: Sequence[int]) -> dict[str, Any]:
        """Of one or more images together: the largest score, and whether it is flagged."""
        score = float(self.scores[list(own)].max())
        return {"score": score, "flagged": None if self.limit is None else score >= self.limit}


@dataclass(frozen=True)
class Probabilities:
    """What an adapter says of images.

    Attributes:
        adapter: that said it.
        folder: they lie in.
        images: in order; the patient of each is empty where nobody knows.
        probabilities: [len(images), classes], rows sum to 1.
        unreadable: why not, by path, of images that were left out.
        passed_over: what it is, by path, of files that are no image.
        told: what was sniffed or guessed of a manifest, and left out by choice, in words.
        cases: of a head of one sum: the classes that may be meant, and which images are like none it knows.
        anomalies: of a memory of normal images: how far the images are from them.
        features: what the adapter saw, a row an image.
        rules: how pictures were seen.
        doubts: ids that may not tell patients apart.
    """

    adapter: AdapterFile
    folder: Path
    images: tuple[SiteImage, ...]
    probabilities: NDArray[np.float64]
    unreadable: dict[str, str]
    passed_over: dict[str, str]
    told: tuple[str, ...] = ()
    cases: Cases | None = None
    anomalies: Anomalies | None = None
    features: NDArray[np.float32] | None = None
    rules: Rules = field(default_factory=Rules)
    doubts: tuple[Doubt, ...] = ()

    def name(self, image: SiteImage) -> str:
        """An image's path below the folder."""
        return image.path.relative_to(self.folder).as_posix()

    @property
    def calibrated(self) -> bool:
        """Whether a temperature was fitted."""
        return self.adapter.calibration is not None and self.adapter.calibration.temperature is not None

    @property
    def local(self) -> str:
        """Why nothing of it may leave the site, if its calibration is of images that no budget has paid for."""
        return "" if self.adapter.calibration is None else self.adapter.calibration.local

    def patients(self) -> dict[str, tuple[list[int], NDArray[np.float64]]]:
        """By patient, the indices of its images and its probabilities [classes] by the study's rule; sorted by id."""
        indices: dict[str, list[int]] = defaultdict(list)
        for index, image in enumerate(self.images):
            if image.patient:
                indices[image.patient].append(index)
        return {
            owner: (own, of_patient(self.probabilities[own], self.adapter.per_patient))
            for owner, own in sorted(indices.items())
        }

    def document(self) -> dict[str, Any]:
        """As a JSON document."""
        classes, own = self.adapter.classes, self.adapter.calibration
        coverage = None
        if self.cases is not None:
            coverage = {"promised": self.adapter.method.coverage, "calibration_patients": round(self.cases.patients)}
        if self.anomalies is not None:
            return self._scored(self.anomalies)
        return {
            _FIRST_KEY: self.adapter.digest,
            "study_id": self.adapter.study,
            "backbone_digest": self.adapter.backbone.digest,
            "classes": list(classes),
            "calibrated": self.calibrated,
            "temperature": self.adapter.temperature,
            "validation_images": own.images if own is not None and self.calibrated else 0,
            "local": self.local,
            "coverage": coverage,
            "never_predicted": list(self.never_predicted),
            "images": [
                {
                    "image": self.name(image),
                    "frame": image.frame,
                    "axis": image.axis,
                    "patient": image.patient or None,
                }
                | _said(classes, row)
                | self._of_case(place)
                for place, (image, row) in enumerate(zip(self.images, self.probabilities, strict=True))
            ],
            "per_patient": self.adapter.per_patient,
            "patients": [
                {"patient": owner, "images": len(own)} | _said(classes, row) | {"strangers": self.strangers(own)}
                for owner, (own, row) in self.patients().items()
            ],
            "unreadable": self.unreadable,
            "passed_over": self.passed_over,
            "told": list(self.told),
            "doubts": [{"kind": one.kind, "ids": list(one.ids), "text": one.text} for one in self.doubts],
        }

    @property
    def never_predicted(self) -> tuple[str, ...]:
        """Classes that a head of one sum leaves out."""
        if not self.adapter.method.one_sum:
            return ()
        return one_sum.never_predicted(self.adapter.initial.adapter, self.adapter.classes)

    def strangers(self, own: Sequence[int]) -> int | None:
        """How many of some images are strangers; None if nobody can say."""
        if self.cases is None or self.cases.strangers is None:
            return None
        return int(self.cases.strangers[list(own)].sum())

    def _scored(self, found: Anomalies) -> dict[str, Any]:
        """As :meth:`document`, of a memory: scores instead of probabilities."""
        patients = round(float(self.adapter.initial.adapter[memory.HISTOGRAM].sum()))
        return {
            _FIRST_KEY: self.adapter.digest,
            "study_id": self.adapter.study,
            "backbone_digest": self.adapter.backbone.digest,
            "normal": self.adapter.classes[0],
            "threshold": found.limit,
            "why_no_threshold": memory.why_no_threshold(
                self.adapter.initial.adapter[memory.HISTOGRAM], self.adapter.method.false_alarms
            ),
            "false_alarms": self.adapter.method.false_alarms,
            "calibration_patients": patients,
            "images": [
                {
                    "image": self.name(image),
                    "frame": image.frame,
                    "axis": image.axis,
                    "patient": image.patient or None,
                }
                | found.said([place])
                for place, image in enumerate(self.images)
            ],
            "patients": [
                {"patient": owner, "images": len(own)} | found.said(own) for owner, (own, _) in self.patients().items()
            ],
            "unreadable": self.unreadable,
            "passed_over": self.passed_over,
            "told": list(self.told),
            "doubts": [{"kind": one.kind, "ids": list(one.ids), "text": one.text} for one in self.doubts],
        }

    def csv(self) -> str:
        """As CSV: a row for each image, then one for each patient, whose ``image`` is empty.

        Columns: ``image``, ``frame`` (empty for the middle or only one), ``axis``, ``patient``, ``images`` (how many a
        row is made of), ``prediction`` and, for each class, ``probability of CLASS``; of a head of one sum that has
        limits also ``set``, classes with a semicolon between them, of images, and ``stranger``: ``yes`` or ``no``, of a
        patient also ``some``; empty if nobody can say. Of a memory instead ``score`` and ``flagged``, a patient's the
        largest.
        """
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        if self.anomalies is not None:
            document = self._scored(self.anomalies)
            writer.writerow([*_COLUMNS, "score", "flagged"])
            for row in [*document["images"], *document["patients"]]:
                flag = {True: "yes", False: "no", None: ""}[row["flagged"]]
                cells = [*(row.get(key) for key in ("image", "frame", "axis", "patient")), row.get("images", 1)]
                writer.writerow([*cells, f"{row['score']:.6f}", flag])
            return text.getvalue()
        classes = self.adapter.classes
        head = [*_COLUMNS, "prediction"]
        head += [f"probability of {name}" for name in classes]
        writer.writerow(head + ["set", "stranger"] * (self.cases is not None))
        rows: list[tuple[Any, ...]] = [
            (self.name(image), "" if image.frame is None else image.frame, image.axis, image.patient, [place], row)
            for place, (image, row) in enumerate(zip(self.images, self.probabilities, strict=True))
        ]
        rows += [("", "", "", owner, own, row) for owner, (own, row) in self.patients().items()]
        for place, (*about, own, row) in enumerate(rows):
            more = ["; ".join(self._set(place)) if place < len(self.images) else "", self._flag(own)]
            cells = [*about, len(own), classes[int(row.argmax())], *(f"{value:.6f}" for value in row)]
            writer.writerow(cells + more * (self.cases is not None))
        return text.getvalue()

    def _set(self, place: int) -> list[str]:
        """The classes that may be meant by an image; none if nothing is claimed."""
        if self.cases is None:
            return []
        return [name for name, within in zip(self.adapter.classes, self.cases.sets[place], strict=True) if within]

    def _flag(self, own: Sequence[int]) -> str:
        strange = self.strangers(own)
        if strange is None:
            return ""
        return "no" if strange == 0 else "yes" if strange == len(own) else "some"

    def _of_case(self, place: int) -> dict[str, Any]:
        if self.cases is None:
            return {"set": None, "stranger": None}
        return {"set": self._set(place), "stranger": self.cases.strange(place)}


def of_patient(probabilities: NDArray[np.float64], rule: PatientRule) -> NDArray[np.float64]:
    """A patient's probabilities [K] of those of its images [n, K], n > 0."""
    row: NDArray[np.float64] = probabilities.mean(axis=0) if rule == "mean" else probabilities.max(axis=0)
    return np.asarray(row / row.sum())


def refuse_products(adapter: AdapterFile, *, maps: bool = False, reports: bool = False) -> None:
    """Check that an adapter gives what is asked for, before any image is encoded.

    Raises:
        AdapterFileError: heat maps of a folder are asked of a classifier, or reports of a memory.
    """
    scores = adapter.method.adapter == "memory"
    if maps and not scores:
        raise AdapterFileError(
            "heat maps of a folder are those of a memory of normal images; expected such an adapter, or no --maps: "
            "secfacmic explain-case shows a classifier's"
        )
    if reports and scores:
        raise AdapterFileError(
            "a memory of normal images gives scores, no probabilities of classes, and reports are of those; expected a "
            "prediction without --dicom-sr"
        )


def write_reports(found: Probabilities, folder: Path) -> tuple[int, int, list[str], int]:
    """Write a DICOM structured report for each patient with DICOM images, ``UID.dcm``, readable by the owner alone.

    None for an id that may stand for several persons: it would speak of one by the images of another. Nor of a patient
    all of whose images are strangers: nothing is claimed of it.

    Args:
        found: what an adapter says.
        folder: made if it is not there.

    Returns:
        How many reports were written, for how many patients there could be none, the ids that are in doubt, and how
        many patients are strangers.

    Raises:
        StorageError: they cannot be written.
    """
    from secure_fed.operate.structured_report import report_on

    refuse_products(found.adapter, reports=True)
    make_folder(folder, 0o700)
    written = unlike = 0
    patients = found.patients()
    many = {patient for doubt in found.doubts if doubt.kind in MANY_IN_ONE for patient in doubt.ids} & patients.keys()
    for patient, (own, row) in patients.items():
        if patient in many:
            continue
        strange = found.strangers(own)
        if strange == len(own):
            unlike += 1
            continue
        files = list(dict.fromkeys(found.images[index].path for index in own))
        warning = f"{strange} of {len(own)} images are like none of the study's" if strange else ""
        report = report_on(patient, files, row, found.adapter, found.calibrated, warning)
        if report is not None:
            place = folder / f"{report.SOPInstanceUID}.dcm"
            if not place.exists():  # else of an earlier call, which said the same
                content = io.BytesIO()
                report.save_as(content)
                write_durable(place, content.getvalue(), mode=0o600)
            written += 1
    return written, len(patients) - len(many) - unlike - written, sorted(many), unlike


def predict_folder(
    adapter: Path,
    folder: Path,
    study: Path | None = None,
    checkpoint: Path | None = None,
    *,
    skip_unreadable: bool = False,
    most_pixels: int = MOST_PIXELS,
    choice: Choice = EVERYTHING,
    device: Device = "cpu",
    progress: Callable[[int, int], None] = lambda done, total: None,
    among: Callable[[list[SiteImage]], list[SiteImage]] = lambda images: images,
) -> Probabilities:
    """Calibrated probabilities for all images of a folder.

    Args:
        adapter: an ``adapter.safetensors``; the ``calibration.safetensors`` beside it is used if it is of this adapter.
        folder: of images, or one image; searched whole, DICOM included (of a file with many frames the middle one);
            only read. They are seen by the study's windows and background. Files that are no images are passed over. A
            ``manifest.csv`` and a ``patients.csv`` in it say what they say in a site's data
            (:func:`secure_fed.clients.data.find_pictures`).
        study: a ``study.toml`` that the adapter must be of, if given.
        checkpoint: the backbone's weights, if they do not lie where the study says.
        skip_unreadable: leave out images that cannot be decoded instead of refusing.
        most_pixels: of one picture; a larger one cannot be decoded. Sites say it in ``site.toml``.
        choice: which pictures are used, as sites say it in ``site.toml``.
        device: where the backbone computes.
        progress: told how many images are done, of how many.
        among: told all images that are there, gives those that are predicted; what it raises ends this before any is
            decoded.

    Raises:
        AdapterFileError: the adapter cannot be read, is of another study, or lacks batch norm's statistics.
        DataError: no such folder, or no image in it.
        ManifestError: there is a ``manifest.csv`` or ``patients.csv`` that cannot be read, or does not fit the folder.
        UnreadableImageError: images that cannot be decoded.
        BackboneError, BackboneDigestError: the weights are missing, or others.
    """
    file = load_adapter(adapter)
    if study is not None and (expected := load_study(study).study.id) != file.study:
        raise AdapterFileError(
            f"{adapter}: of study {file.study[:16]}, but {study} is study {expected[:16]}; use the adapter of that "
            "study, or leave --study out"
        )
    file.require_statistics()
    single = folder if folder.is_file() else None
    folder = folder.parent if single is not None else folder
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder or file; expected an image, or a folder with images in it")
    notes = Notes()
    images = find_pictures(folder, choice, notes)
    if single is not None:
        images = [image for image in images if image.path == single]
        notes.passed_over = [line for line in notes.passed_over if line.startswith(f"{single}: ")]
    passed_over = {}
    for line in notes.passed_over:
        name, reason = line.removeprefix(f"{folder}/").rsplit(": ", 1)
        if name not in (MANIFEST, SETTLED):
            passed_over[name] = reason
    if not images:
        others = f" ({len(passed_over)} other files)" if passed_over else ""
        others = f" ({min(passed_over.values())})" if single is not None and passed_over else others
        raise DataError(f"{single or folder}: no image{others}; expected images in it, or in folders below it")
    images = among(images)
    told = [*notes.told, *(f"left out: {count} of kind {kind}" for kind, count in sorted(notes.left_out.items()))]
    if pseudonyms := renamed(images, notes):
        told.append(f"{folder}: {pseudonyms} patients have another id in the manifest than in their DICOM files")
    backbone = load_backbone(file.backbone, checkpoint, device)
    decoded, features, unreadable = [], [], {}
    looks: list[Fingerprint | None] = []
    rules = Rules(file.windows, file.background, most_pixels)
    patches = Patches.of(file.method)
    for batch in encode_all([image.source for image in images], backbone, rules=rules, patches=patches, digests=True):
        for one in batch:
            looks.append(Fingerprint(one.pixels, b"", 0, 0) if one.pixels else None)
            if one.value is None:
                unreadable[images[one.index].path.relative_to(folder).as_posix()] = one.reason
            else:
                decoded.append(images[one.index])
                features.append(one.value)
        progress(batch[-1].index + 1, len(images))
    if unreadable and not skip_unreadable:
        lines = [f"{name}: {reason}" for name, reason in unreadable.items()]
        raise UnreadableImageError(
            f"{len(unreadable)} of {len(images)} images in {folder} cannot be decoded; expected whole 8-bit images or "
            f"DICOM: replace or remove them, or leave them out with --skip-unreadable{fault_lines(lines)}"
        )
    # What is to be predicted may well be of one patient.
    doubts = [doubt for doubt in all_doubts(images, "patient", notes, looks=looks) if doubt.kind != "share"]
    tokens = file.initial.prompt_tokens
    tower = None if tokens is None else backbone.text_tower(tokens)
    width = memory.width(file.initial.adapter) if patches.blocks else backbone.dim
    x = np.stack(features) if features else np.empty((0, width), dtype=np.float32)
    cases = judge(file.initial, file.initial.adapter, x)
    anomalies = _anomalies(file, x, backbone.window) if patches.blocks else None
    values = file.predict(x, tower)
    about = tuple(decoded), values, unreadable, passed_over, tuple(told), cases, anomalies, x, rules, tuple(doubts)
    return Probabilities(file, folder, *about)


def _anomalies(file: AdapterFile, x: NDArray[np.float32], window: Callable[[tuple[int, int]], Window]) -> Anomalies:
    adapter, method = file.initial.adapter, file.method
    limit = memory.threshold(adapter[memory.HISTOGRAM], method.false_alarms)
    return Anomalies(
        memory.scores(adapter, x, method.top),
        None if limit >= memory.NO_LIMIT else limit,
        memory.maps(adapter, x),
        Scale.of(adapter, method.false_alarms),
        window,
    )


def _map_of(image: SiteImage, images: Path, folder: Path) -> Path:
    place = "" if image.frame is None else f".{image.axis}-{image.frame}"
    return folder / f"{image.path.relative_to(images).as_posix()}{place}.png"


def refuse_other_maps(found: list[SiteImage], images: Path, folder: Path) -> None:
    """Check that heat maps of images can be written, before they are computed.

    Args:
        found: the images.
        images: the folder that they lie in.
        folder: of the maps.

    Raises:
        OutputError: a file is there that is no such map.
        StorageError: it cannot be read.
    """
    for image in found:
        path = _map_of(image, images, folder)
        if path.exists():
            refuse_foreign(path, lambda head: bool(no_picture(head)))


def write_maps(found: Probabilities, folder: Path) -> int:
    """Write a heat map beside its picture for each image, ``PATH.png``, readable by the owner alone; how many.

    Args:
        found: what a memory says.
        folder: made if it is not there. Earlier maps are written over, and no other file.

    Raises:
        AdapterFileError: the adapter is no memory.
        OutputError: as :func:`refuse_other_maps`; nothing was written.
        StorageError: they cannot be written.
    """
    refuse_products(found.adapter, maps=True)
    assert found.anomalies is not None, "a memory's"
    refuse_other_maps(list(found.images), found.folder, folder)
    for image, heat in zip(found.images, found.anomalies.maps, strict=True):
        path = _map_of(image, found.folder, folder)
        make_folder(path.parent, 0o700)
        picture = decode(image.path.read_bytes(), image.frame, image.axis, found.rules)
        drawn = overlay(picture, found.anomalies.scale.share(heat), found.anomalies.window(picture.size))
        write_durable(path, as_drawn(drawn), 0o600)
    return len(found.images)


def _said(classes: tuple[str, ...], row: NDArray[np.float64]) -> dict[str, Any]:
    by_class = {name: float(value) for name, value in zip(classes, row, strict=True)}
    return {"prediction": classes[int(row.argmax())], "probabilities": by_class}

"""An adapter at work: calibrated probabilities for a folder of images."""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from secure_fed.clients.data import MANIFEST, Notes, image_files
from secure_fed.clients.dicom import no_picture, read_header
from secure_fed.clients.dicom import text as text_of
from secure_fed.clients.encoding import encode_all
from secure_fed.clients.manifest import read_table
from secure_fed.clients.patients import in_one_form
from secure_fed.clients.reading import Source
from secure_fed.clients.rules import MOST_PIXELS, Rules
from secure_fed.core.errors import AdapterFileError, DataError, ManifestError, UnreadableImageError, fault_lines
from secure_fed.core.storage import make_folder, write_durable
from secure_fed.model.adapter_file import AdapterFile, load_adapter
from secure_fed.model.backbone import load_backbone
from secure_fed.model.cases import Cases, judge
from secure_fed.model.device import Device
from secure_fed.protocol.study import PatientRule, load_study


@dataclass(frozen=True)
class Probabilities:
    """What an adapter says of images.

    Attributes:
        adapter: that said it.
        folder: they lie in.
        images: paths below the folder, in order.
        owners: patient ids, in the order of the images; empty where nobody knows.
        probabilities: [len(images), classes], rows sum to 1.
        unreadable: why not, by path, of images that were left out.
        passed_over: what it is, by path, of files that are no image.
        cases: of a head of one sum: the classes that may be meant, and which images are like none it knows.
    """

    adapter: AdapterFile
    folder: Path
    images: tuple[str, ...]
    owners: tuple[str, ...]
    probabilities: NDArray[np.float64]
    unreadable: dict[str, str]
    passed_over: dict[str, str]
    cases: Cases | None = None

    @property
    def calibrated(self) -> bool:
        """Whether a temperature was fitted."""
        return self.adapter.calibration is not None and self.adapter.calibration.temperature is not None

    def patients(self) -> dict[str, tuple[list[int], NDArray[np.float64]]]:
        """By patient, the indices of its images and its probabilities [classes] by the study's rule; sorted by id."""
        indices: dict[str, list[int]] = defaultdict(list)
        for index, owner in enumerate(self.owners):
            if owner:
                indices[owner].append(index)
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
        return {
            "adapter_digest": self.adapter.digest,
            "study_id": self.adapter.study,
            "backbone_digest": self.adapter.backbone.digest,
            "classes": list(classes),
            "calibrated": self.calibrated,
            "temperature": self.adapter.temperature,
            "validation_images": own.images if own is not None and self.calibrated else 0,
            "coverage": coverage,
            "images": [
                {"image": image, "patient": owner or None} | _said(classes, row) | self._of_case(place)
                for place, (image, owner, row) in enumerate(
                    zip(self.images, self.owners, self.probabilities, strict=True)
                )
            ],
            "per_patient": self.adapter.per_patient,
            "patients": [
                {"patient": owner, "images": len(own)} | _said(classes, row)
                for owner, (own, row) in self.patients().items()
            ],
            "unreadable": self.unreadable,
            "passed_over": self.passed_over,
        }

    def csv(self) -> str:
        """As CSV: a row for each image, then one for each patient, whose ``image`` is empty.

        Columns: ``image``, ``patient``, ``images`` (how many a row is made of), ``prediction`` and, for each class,
        ``probability of CLASS``; of a head of one sum that has limits also ``set``, classes with a semicolon between
        them, and ``stranger``, of images.
        """
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        classes = self.adapter.classes
        writer.writerow(
            ["image", "patient", "images", "prediction", *(f"probability of {name}" for name in classes)]
            + ["set", "stranger"] * (self.cases is not None)
        )
        rows = [
            (image, owner, 1, row)
            for image, owner, row in zip(self.images, self.owners, self.probabilities, strict=True)
        ]
        rows += [("", owner, len(own), row) for owner, (own, row) in self.patients().items()]
        for place, (*about, row) in enumerate(rows):
            more = [] if self.cases is None else ["", ""]
            if self.cases is not None and place < len(self.images):
                more = ["; ".join(self._set(place)), "yes" if self.cases.strangers[place] else "no"]
            writer.writerow([*about, classes[int(row.argmax())], *(f"{value:.6f}" for value in row), *more])
        return text.getvalue()

    def _set(self, place: int) -> list[str]:
        """The classes that may be meant by an image; none if nothing is claimed."""
        if self.cases is None:
            return []
        return [name for name, within in zip(self.adapter.classes, self.cases.sets[place], strict=True) if within]

    def _of_case(self, place: int) -> dict[str, Any]:
        if self.cases is None:
            return {"set": None, "stranger": None}
        return {"set": self._set(place), "stranger": bool(self.cases.strangers[place])}


def of_patient(probabilities: NDArray[np.float64], rule: PatientRule) -> NDArray[np.float64]:
    """A patient's probabilities [K] of those of its images [n, K], n > 0."""
    row: NDArray[np.float64] = probabilities.mean(axis=0) if rule == "mean" else probabilities.max(axis=0)
    return np.asarray(row / row.sum())


def write_reports(found: Probabilities, folder: Path) -> tuple[int, int]:
    """Write a DICOM structured report for each patient with DICOM images, ``UID.dcm``, readable by the owner alone.

    Args:
        found: what an adapter says.
        folder: made if it is not there.

    Returns:
        How many reports were written, and for how many patients there could be none.

    Raises:
        StorageError: they cannot be written.
    """
    from secure_fed.operate.structured_report import report_on

    make_folder(folder, 0o700)
    written = 0
    patients = found.patients()
    for patient, (own, row) in patients.items():
        files = [found.folder / found.images[index] for index in own]
        report = report_on(patient, files, row, found.adapter, found.calibrated)
        if report is not None:
            content = io.BytesIO()
            report.save_as(content)
            write_durable(folder / f"{report.SOPInstanceUID}.dcm", content.getvalue(), mode=0o600)
            written += 1
    return written, len(patients) - written


def predict_folder(
    adapter: Path,
    folder: Path,
    study: Path | None = None,
    checkpoint: Path | None = None,
    *,
    skip_unreadable: bool = False,
    most_pixels: int = MOST_PIXELS,
    device: Device = "cpu",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Probabilities:
    """Calibrated probabilities for all images of a folder.

    Args:
        adapter: an ``adapter.safetensors``; the ``calibration.safetensors`` beside it is used if it is of this adapter.
        folder: of images, searched whole, DICOM included (of a file with many frames the middle one); only read. They
            are seen by the study's windows and background. Files that are no images are passed over. An image's
            patient is who ``manifest.csv`` says, if there is one with columns ``path`` and ``patient``, else a DICOM
            file's PatientID.
        study: a ``study.toml`` that the adapter must be of, if given.
        checkpoint: the backbone's weights, if they do not lie where the study says.
        skip_unreadable: leave out images that cannot be decoded instead of refusing.
        most_pixels: of one picture; a larger one cannot be decoded. Sites say it in ``site.toml``.
        device: where the backbone computes.
        progress: told how many images are done, of how many.

    Raises:
        AdapterFileError: the adapter cannot be read, is of another study, or lacks batch norm's statistics.
        DataError: no such folder, or no image in it.
        ManifestError: there is a ``manifest.csv`` that cannot be read.
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
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; expected one with images in it")
    notes = Notes()
    paths, headers = [], {}
    found = sorted(image_files(folder, notes))
    passed_over = {
        name: reason
        for line in notes.passed_over
        for name, reason in [line.removeprefix(f"{folder}/").rsplit(": ", 1)]
        if name != MANIFEST
    }
    for path in found:
        name = path.relative_to(folder).as_posix()
        header = read_header(path)
        what = "" if header is None else no_picture(header)
        if what:
            passed_over[name] = what
        else:
            paths.append(path)
            headers[name] = "" if header is None else text_of(header, "PatientID")
    if not paths:
        others = f" ({len(passed_over)} other files)" if passed_over else ""
        raise DataError(f"{folder}: no image{others}; expected images in it, or in folders below it")
    listed = _listed_patients(folder / MANIFEST)
    backbone = load_backbone(file.backbone, checkpoint, device)
    names, features, unreadable = [], [], {}
    sources = [Source(path) for path in paths]
    for batch in encode_all(sources, backbone, rules=Rules(file.windows, file.background, most_pixels)):
        for one in batch:
            name = paths[one.index].relative_to(folder).as_posix()
            if one.value is None:
                unreadable[name] = one.reason
            else:
                names.append(name)
                features.append(one.value)
        progress(batch[-1].index + 1, len(paths))
    if unreadable and not skip_unreadable:
        lines = [f"{name}: {reason}" for name, reason in unreadable.items()]
        raise UnreadableImageError(
            f"{len(unreadable)} of {len(paths)} images in {folder} cannot be decoded; expected whole 8-bit images or "
            f"DICOM: replace or remove them, or leave them out with --skip-unreadable{fault_lines(lines)}"
        )
    tokens = file.initial.prompt_tokens
    tower = None if tokens is None else backbone.text_tower(tokens)
    x = np.stack(features) if features else np.empty((0, backbone.dim), dtype=np.float32)
    owners = tuple(in_one_form(listed.get(name) or headers[name]) for name in names)
    cases = judge(file.initial, file.initial.adapter, x)
    return Probabilities(file, folder, tuple(names), owners, file.predict(x, tower), unreadable, passed_over, cases)


def _said(classes: tuple[str, ...], row: NDArray[np.float64]) -> dict[str, Any]:
    by_class = {name: float(value) for name, value in zip(classes, row, strict=True)}
    return {"prediction": classes[int(row.argmax())], "probabilities": by_class}


def _listed_patients(manifest: Path) -> dict[str, str]:
    """Patients by path, as a manifest has them; empty if there is none, or none with patients."""
    if not manifest.exists():
        return {}
    table = read_table(manifest, ("path", "patient"), ("path",))
    if not {"path", "patient"} <= set(table.columns):
        return {}
    patients: dict[str, str] = {}
    for line, cells in table.rows:
        name, patient = Path(cells["path"]).as_posix(), in_one_form(cells["patient"])
        if patients.setdefault(name, patient) != patient:
            raise ManifestError(
                f"{manifest}: line {line}: {name} is of patient {patient!r}, and before of {patients[name]!r}; "
                "expected one"
            )
    return patients

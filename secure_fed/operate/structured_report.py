"""Predictions as DICOM structured reports: one for each patient, in the study of its newest images (TID 1500)."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pydicom
from highdicom.sr import (
    AlgorithmIdentification,
    CodedConcept,
    Comprehensive3DSR,
    DeviceObserverIdentifyingAttributes,
    Measurement,
    MeasurementReport,
    MeasurementsAndQualitativeEvaluations,
    ObservationContext,
    ObserverContext,
    QualitativeEvaluation,
    SourceImageForMeasurementGroup,
    TrackingIdentifier,
)
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.uid import UID, generate_uid
from pydicom.valuerep import DA, TM

from secure_fed.clients.dicom_elements import text
from secure_fed.clients.dicom_header import is_dicom
from secure_fed.model.adapter_file import AdapterFile

_SCHEME = "99SECFACMIC"
_NEEDED = ("StudyInstanceUID", "SeriesInstanceUID", "SOPClassUID", "SOPInstanceUID")
_INHERITED = (
    *("PatientName", "PatientID", "PatientBirthDate", "PatientSex"),
    *("AccessionNumber", "StudyID", "StudyDate", "StudyTime"),
)
_FORMS: dict[str, Callable[[str], object]] = {"PatientBirthDate": DA, "StudyDate": DA, "StudyTime": TM}
_PROCEDURE = CodedConcept("18748-4", "LN", "Diagnostic imaging study")
_PATIENT_ID = re.compile(r"[^\\\x00-\x1f\x7f]{1,64}")
"""What LO may hold: a longer id, or one of two values, would be another patient's."""

_MEANING = 64  # characters of a code's meaning, at most


def report_on(
    patient: str,
    files: Sequence[Path],
    row: NDArray[np.float64],
    adapter: AdapterFile,
    calibrated: bool,
    warning: str = "",
) -> Dataset | None:
    """The report of one patient's prediction; None if no file of it is DICOM that a report can point at, or the id is
    none that DICOM can have.

    Args:
        patient: the id under which it was predicted, which becomes the report's.
        files: of its images.
        row: [classes], the patient's probabilities.
        adapter: that said it.
        calibrated: whether a temperature was fitted.
        warning: that the report carries; none if empty.

    Returns:
        Complete, neither final nor verified: a person has to look at it. It names all images, the class of the largest
        probability, each class's probability, and the adapter's digest. Its UIDs follow from what it says: who says the
        same again says it in no second report.
    """
    evidence = [header for path in files if (header := _header(path, patient)) is not None]
    if not evidence or not _PATIENT_ID.fullmatch(patient):
        return None
    evidence.sort(key=lambda header: str(header.StudyDate), reverse=True)
    version = importlib.metadata.version("secfacmic")
    images = [[str(header.SOPInstanceUID), str(header.StudyInstanceUID)] for header in evidence]
    said = [version, adapter.digest, adapter.per_patient, calibrated, warning, patient, images, [*map(float, row)]]

    def uid(of: str) -> UID:
        return UID(generate_uid(entropy_srcs=[json.dumps([of, *said])]))

    algorithm = AlgorithmIdentification(
        "secfacmic",
        version,
        [
            f"adapter {adapter.digest}",
            f"study {adapter.study}",
            f"per patient: {adapter.per_patient}",
            "calibrated" if calibrated else "not calibrated",
            "for research, no medical device",
            *([warning] if warning else []),
        ],
    )
    group = MeasurementsAndQualitativeEvaluations(
        TrackingIdentifier(uid=uid("tracking"), identifier="classification"),
        algorithm_id=algorithm,
        measurements=[
            Measurement(_code(f"P{index}", f"Probability of {name}"), float(value), codes.UCUM.NoUnits)
            for index, (name, value) in enumerate(zip(adapter.classes, row, strict=True))
        ],
        qualitative_evaluations=[
            QualitativeEvaluation(
                _code("PREDICTION", "Most probable class"),
                _code(f"C{int(row.argmax())}", adapter.classes[int(row.argmax())]),
            )
        ],
        source_images=[
            SourceImageForMeasurementGroup(header.SOPClassUID, header.SOPInstanceUID) for header in evidence
        ],
    )
    device = DeviceObserverIdentifyingAttributes(uid("device"), name="secfacmic", model_name=adapter.digest[:16])
    context = ObservationContext(observer_device_context=ObserverContext(codes.DCM.Device, device))
    report = MeasurementReport(
        context,
        _PROCEDURE,
        [group],
        title=codes.DCM.ImagingMeasurementReport,
    )
    study = evidence[0].StudyInstanceUID
    for first in {header.SOPClassUID: header for header in evidence if header.StudyInstanceUID == study}.values():
        with contextlib.suppress(KeyError):  # highdicom does not know the modules of private and of retired classes
            return Comprehensive3DSR(
                evidence=[first, *(header for header in evidence if header is not first)],
                content=report,
                series_instance_uid=uid("series"),
                series_number=9999,
                sop_instance_uid=uid("report"),
                instance_number=1,
                manufacturer="secfacmic",
                is_complete=True,
                specific_character_set="ISO_IR 192",
            )
    return None


def _code(value: str, meaning: str) -> CodedConcept:
    return CodedConcept(value, _SCHEME, meaning[:_MEANING])


def _header(path: Path, patient: str) -> Dataset | None:
    """What a report needs of an image; None if it is no DICOM file with identifiers, or of another patient."""
    try:
        with path.open("rb") as stream:
            if not is_dicom(stream.read(132)):
                return None
        read = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=[*_NEEDED, *_INHERITED], force=True)
        if not all(UID(text(read, key)).is_valid for key in _NEEDED):
            return None
        header = Dataset()
        for key in (*_NEEDED, *_INHERITED):
            setattr(header, key, _kept(read, key))
        header.PatientID = patient
        return header
    except Exception:  # broken in a way that its picture does not mind
        return None


def _kept(read: Dataset, key: str) -> str:
    """An element as a report may have it; empty if it is not as the standard wants it, which a picture's file need not
    be."""
    value = text(read, key).replace("\\", " ")
    try:
        _FORMS.get(key, str)(value)
    except ValueError:
        return ""
    return "" if key == "PatientSex" and value not in ("M", "F", "O") else value

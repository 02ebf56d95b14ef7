"""The adapter as a file: all that its use needs besides the backbone, and beside it what one site adds of its own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import safetensors
import safetensors.numpy
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter
from torch.nn.functional import softmax

from secure_fed.core.errors import AdapterFileError
from secure_fed.core.layout import CALIBRATION
from secure_fed.core.storage import write_durable
from secure_fed.model.adapters import PRIVATE_HEAD, Adapter, build_adapter
from secure_fed.model.text_tower import TextTower
from secure_fed.protocol import memory
from secure_fed.protocol.basis import Basis
from secure_fed.protocol.codec import Parameters, adapter_digest
from secure_fed.protocol.initial_state import InitialState
from secure_fed.protocol.study import AgreedStudy
from secure_fed.protocol.study_tables import Backbone, Background, Concept, Method, PatientRule, Window

MODEL_CARD = "model_card"
"""Key of the model card in the metadata of an exported adapter."""

_CALIBRATION = "calibration."
_RULES: dict[str, PatientRule] = {rule: rule for rule in get_args(PatientRule)}
_BACKGROUNDS: dict[str, Background] = {colour: colour for colour in get_args(Background)}
_CONCEPTS = TypeAdapter(tuple[Concept, ...])
_WINDOWS = TypeAdapter(tuple[Window, ...])
_ROWS = 8192
"""Features that are classified at once."""


@dataclass(frozen=True)
class Calibration:
    """What images of one site (or of simulated ones) add to the shared adapter. No site shares it.

    Attributes:
        temperature: of the softmax, fitted on validation images; None if there were none.
        images: number of these images.
        statistics: of batch norm, by name, [d] each; empty for other methods.
        head: the private head, [K, d], if the study has one.
        local: why nothing of it, nor what is made with it, may leave the site; empty if it may.
    """

    temperature: float | None
    images: int
    statistics: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    head: NDArray[np.float64] | None = None
    local: str = ""

    def tensors(self) -> dict[str, NDArray[Any]]:
        """As tensors of a safetensors file, names beginning with ``calibration.``."""
        found: dict[str, NDArray[Any]] = {f"{_CALIBRATION}{name}": value for name, value in self.statistics.items()}
        found[f"{_CALIBRATION}images"] = np.array([self.images], dtype=np.int64)
        if self.temperature is not None:
            found[f"{_CALIBRATION}temperature"] = np.array([self.temperature])
        if self.head is not None:
            found[f"{_CALIBRATION}{PRIVATE_HEAD}"] = self.head
        if self.local:
            found[f"{_CALIBRATION}local"] = np.frombuffer(self.local.encode(), dtype=np.uint8)
        return found

    @classmethod
    def of(cls, tensors: Mapping[str, NDArray[Any]]) -> Calibration | None:
        """Inverse of :meth:`tensors`, other names passed over; None if there is no calibration among them."""
        found = {
            name.removeprefix(_CALIBRATION): value for name, value in tensors.items() if name.startswith(_CALIBRATION)
        }
        if not found:
            return None
        images, temperature = int(found.pop("images")[0]), found.pop("temperature", None)
        head, local = found.pop(PRIVATE_HEAD, None), found.pop("local", None)
        words = "" if local is None else local.tobytes().decode()
        return cls(None if temperature is None else float(temperature[0]), images, found, head, words)


@dataclass(frozen=True)
class AdapterFile:
    """An adapter with all that its use needs besides the backbone.

    Attributes:
        study: id of the study that it comes from.
        backbone: the study's, with the digest of the weights.
        classes: names, in the order of the logits.
        method: which adapter it is.
        initial: prompt features, logit scale and prompt tokens; its ``adapter`` is the trained one.
        calibration: what its site adds, from the file itself (an export) or the one beside it; None without.
        per_patient: the study's rule for a patient's prediction.
        windows: the study's, by modality: whoever predicts shows the backbone what training showed it.
        background: the study's, behind what is transparent.
        concepts: the study's, by which predictions are explained.
        without_finding: the study's class without a finding, if it names one.
    """

    study: str
    backbone: Backbone
    classes: tuple[str, ...]
    method: Method
    initial: InitialState
    calibration: Calibration | None
    per_patient: PatientRule = "mean"
    windows: tuple[Window, ...] = ()
    background: Background = "black"
    concepts: tuple[Concept, ...] = ()
    without_finding: str | None = None

    @property
    def digest(self) -> str:
        """SHA-256 of the shared parameters, as every site knows it."""
        return adapter_digest(self.initial.adapter)

    @property
    def temperature(self) -> float:
        """Of the softmax; 1 if it was not fitted."""
        return 1.0 if self.calibration is None else self.calibration.temperature or 1.0

    def held_against(self, predicted: str) -> str | None:
        """The class that a prediction's reasons are asked against: the one without a finding; None for the mean of all
        others, if there is none or it is the predicted one."""
        return None if predicted == self.without_finding else self.without_finding

    def require_statistics(self) -> None:
        """Refuse an adapter with batch norm whose statistics are not here.

        Raises:
            AdapterFileError: they are not.
        """
        needed = (self.method.adapter, self.method.norm) == ("facmic", "batch")
        if needed and (self.calibration is None or not self.calibration.statistics):
            raise AdapterFileError(
                f"adapter {self.digest[:16]}: batch norm, whose statistics stay at each site; expected {CALIBRATION} "
                "of this very adapter beside it: use the adapter at a site of the study, where it lies"
            )

    def build(self, tower: TextTower | None = None) -> Adapter:
        """The adapter, ready to predict: in evaluation mode, with statistics and head if there are any.

        Raises:
            AdapterFileError: it needs batch norm's statistics, and there are none.
        """
        self.require_statistics()
        initial, own = self.initial, self.calibration
        head = {} if own is None or own.head is None else {PRIVATE_HEAD: own.head}
        parameters = {**initial.adapter, **head}
        adapter = build_adapter(
            self.method, initial.prompt_features, initial.logit_scale, parameters, tower, initial.basis
        )
        adapter.eval()
        if own is not None and own.statistics:
            adapter.restore_statistics(own.statistics)
        return adapter

    def predict(self, x: NDArray[np.float32], tower: TextTower | None = None) -> NDArray[np.float64]:
        """Calibrated probabilities [n, K] of unit features x [n, d].

        Of a memory, which has scores, see :func:`secure_fed.protocol.memory.probabilities`.
        """
        if self.method.adapter == "memory":
            return memory.probabilities(self.initial.adapter, x, self.method.top, self.method.false_alarms)
        adapter = self.build(tower)
        rows = [np.empty((0, len(self.classes)))]
        with torch.inference_mode():
            for start in range(0, len(x), _ROWS):
                logits = adapter.logits(torch.from_numpy(x[start : start + _ROWS])).double()
                rows.append(softmax(logits / self.temperature, dim=1).numpy())
        return np.concatenate(rows)


def save_adapter(
    path: Path,
    agreed: AgreedStudy,
    parameters: Parameters,
    calibration: Calibration | None = None,
    card: str | None = None,
) -> None:
    """Write the adapter with all that its use needs besides the backbone.

    Tensors: ``adapter.NAME`` (float64), ``prompt_features`` (float32 [classes, d]), ``logit_scale``, perhaps
    ``prompt_tokens``; and ``calibration.NAME`` only if it is given: it is made of a site's images.

    Args:
        path: the file.
        agreed: the study.
        parameters: the global adapter.
        calibration: what a site adds, if it may be in the file.
        card: the model card, in markdown.

    Raises:
        StorageError: it cannot be written.
    """
    study = agreed.study
    metadata = {
        "study": study.id,
        "backbone": study.backbone.model_dump_json(exclude_none=True),
        "classes": json.dumps(study.class_names),
        "prompts": json.dumps([entry.prompts for entry in study.classes]),
        "method": study.method.model_dump_json(),
        "per_patient": study.per_patient,
        "windows": _WINDOWS.dump_json(study.windows).decode(),
        "background": study.background,
        "concepts": _CONCEPTS.dump_json(study.concepts).decode(),
        "without_finding": json.dumps(study.without_finding),
        "adapter_digest": adapter_digest(parameters),
    }
    if card is not None:
        metadata[MODEL_CARD] = card
    tensors = safetensors.numpy.load(replace(agreed.initial, adapter=parameters).to_bytes())
    if calibration is not None:
        tensors |= calibration.tensors()
    write_durable(path, bytes(safetensors.numpy.save(tensors, metadata)))


def save_calibration(path: Path, parameters: Parameters, calibration: Calibration) -> None:
    """Write what a site adds to an adapter, bound to that adapter by its digest.

    Args:
        path: :data:`secure_fed.core.layout.CALIBRATION` beside the adapter.
        parameters: the adapter that it was made with.
        calibration: what the site adds.

    Raises:
        StorageError: it cannot be written.
    """
    metadata = {"adapter_digest": adapter_digest(parameters)}
    write_durable(path, bytes(safetensors.numpy.save(calibration.tensors(), metadata)), 0o600)


def load_adapter(path: Path) -> AdapterFile:
    """Read an adapter, and the calibration in it or, if it has one of this very adapter, beside it.

    Raises:
        AdapterFileError: it is missing or none of ours.
    """
    tensors, metadata = _read(path)
    try:
        initial = InitialState(
            {name.removeprefix("adapter."): value for name, value in tensors.items() if name.startswith("adapter.")},
            tensors["prompt_features"],
            float(tensors["logit_scale"][0]),
            tensors.get("prompt_tokens"),
            Basis.of(tensors, tensors["prompt_features"].shape[1]),
        )
        classes = tuple(json.loads(metadata["classes"]))
        found = AdapterFile(
            metadata["study"],
            Backbone.model_validate_json(metadata["backbone"]),
            classes,
            Method.model_validate_json(metadata["method"]),
            initial,
            Calibration.of(tensors),
            _RULES[metadata.get("per_patient", "mean")],
            _WINDOWS.validate_json(metadata.get("windows", "[]")),
            _BACKGROUNDS[metadata.get("background", "black")],
            _CONCEPTS.validate_json(metadata.get("concepts", "[]")),
            _named(metadata.get("without_finding", "null"), classes),
        )
    except (KeyError, ValueError, IndexError, RecursionError) as error:
        raise AdapterFileError(_malformed(path, error)) from error
    if not initial.adapter or found.digest != metadata.get("adapter_digest"):
        raise AdapterFileError(
            f"{path}: its parameters have digest {found.digest[:16]}, but it names "
            f"{metadata.get('adapter_digest', 'none')[:16]}; the file is damaged: copy it again"
        )
    beside = path.with_name(CALIBRATION)
    if beside.exists():
        own, bound = _read(beside)
        if bound.get("adapter_digest") == found.digest:
            return replace(found, calibration=Calibration.of(own))
    return found


def _read(path: Path) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    try:
        with safetensors.safe_open(str(path), "np") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError) as error:
        raise AdapterFileError(_malformed(path, error)) from error


def _named(text: str, classes: tuple[str, ...]) -> str | None:
    """The class that a file names in JSON, or none."""
    name = json.loads(text)
    if name is None or name in classes:
        return None if name is None else str(name)
    raise ValueError(f"without_finding is {name!r}, which is none of its classes")


def _malformed(path: Path, error: Exception) -> str:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    if isinstance(error, KeyError):
        reason = f"it lacks {reason}"
    if path.is_dir():
        reason = "a folder"
    return (
        f"{path}: no adapter file ({reason}); expected adapter.safetensors of a site, of "
        "secfacmic simulate, or of an export"
    )

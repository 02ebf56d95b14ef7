"""The adapter and its class vectors as an ONNX model, from image features to logits and probabilities."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn
from torch.nn.functional import normalize, softmax

from secure_fed.core.errors import OnnxError
from secure_fed.core.storage import write_durable
from secure_fed.model.adapter_file import AdapterFile
from secure_fed.model.text_tower import TextTower

TOLERANCE = 1e-5
"""Most that cosines (logits over the logit scale) and probabilities may differ between ONNX and torch."""

_CHECKED = 16


def _refuse_memory(file: AdapterFile) -> None:
    if file.method.adapter == "memory":
        raise OnnxError(
            "a memory of normal patches is no classifier of image features; expected an export without --onnx: use it "
            "by secfacmic predict"
        )


class Classifier(nn.Module):
    """From image features [n, d] of any length to logits and calibrated probabilities, [n, K] each."""

    def __init__(self, file: AdapterFile, tower: TextTower | None = None) -> None:
        super().__init__()
        self._adapter = file.build(tower)
        self._temperature = file.temperature
        with torch.no_grad():  # fixed from now on: no text tower is needed any more
            self.register_buffer("class_vectors", self._adapter.class_vectors().detach().clone())

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and probabilities."""
        adapted = self._adapter.adapt(normalize(features, dim=-1))
        logits = self._adapter.score(adapted, self.get_buffer("class_vectors"))
        return logits.float(), softmax(logits / self._temperature, dim=-1).float()


def write_onnx(path: Path, file: AdapterFile, tower: TextTower | None, metadata: Mapping[str, str]) -> None:
    """Write the adapter as ONNX: input ``features`` float32 [n, d], outputs ``logits`` and ``probabilities`` [n, K].

    Features are the backbone's, as they come; the model brings them to unit length. A private head is no part of it.
    Before it is written, ONNX's reference evaluator and torch are compared on seeded random features.

    Args:
        path: the file.
        file: the adapter; its temperature, 1 if it has none, and its statistics become part of the model.
        tower: the frozen text tower, for ``prompts``: class vectors are computed here for good.
        metadata: of the model; the classes are added.

    Raises:
        OnnxError: the two differ by more than 1e-5; nothing is written.
        StorageError: it cannot be written.
    """
    _refuse_memory(file)
    assert file.calibration is None or file.calibration.head is None, "a private head never leaves its site"
    classifier = Classifier(file, tower).eval()
    generator = torch.Generator().manual_seed(0)
    examples = torch.randn(_CHECKED, file.initial.prompt_features.shape[1], generator=generator)
    exporter = logging.getLogger("torch.onnx")
    level = exporter.level
    exporter.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                classifier,
                (examples,),
                dynamo=True,
                verbose=False,
                input_names=["features"],
                output_names=["logits", "probabilities"],
                dynamic_shapes={"features": {0: torch.export.Dim("n")}},
            )
    finally:
        exporter.setLevel(level)
    assert program is not None
    model = program.model_proto
    onnx.helper.set_model_props(model, {**metadata, "classes": json.dumps(file.classes)})
    model.producer_name = "secfacmic"
    found = ReferenceEvaluator(model).run(None, {"features": examples.numpy()})
    with torch.inference_mode():
        expected = [value.numpy() for value in classifier(examples)]
    apart = [float(np.abs(ours - theirs).max()) for ours, theirs in zip(expected, found, strict=True)]
    # Of a head that is no cosine, logits can be larger than the scale; they are then held to the same relative error.
    apart[0] /= max(file.initial.logit_scale, float(np.abs(expected[0]).max()))
    if not max(apart) <= TOLERANCE:
        raise OnnxError(
            f"{path}: not written: cosines and probabilities differ from torch's by {apart[0]:.2g} and {apart[1]:.2g}, "
            f"expected at most {TOLERANCE:g}; export without --onnx, and report it with the versions of torch "
            f"{torch.__version__} and onnx {onnx.__version__}"
        )
    write_durable(path, model.SerializeToString())

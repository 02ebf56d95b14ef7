"""The adapter as a file: all that its use needs besides the backbone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import safetensors.numpy

from secure_fed.codec import Parameters, adapter_digest
from secure_fed.storage import write_durable
from secure_fed.study import AgreedStudy


def save_adapter(path: Path, agreed: AgreedStudy, parameters: Parameters) -> None:
    """Write the adapter with all that its use needs besides the backbone.

    Tensors: ``adapter.NAME`` (float64), ``prompt_features`` (float32 [classes, d]), ``logit_scale``. Batch norm's
    statistics are no part of it: they stay at each site.
    """
    study = agreed.study
    metadata = {
        "study": study.id,
        "backbone": json.dumps({"model": study.backbone.model, "digest": study.backbone.digest}),
        "classes": json.dumps(study.class_names),
        "prompts": json.dumps([entry.prompts for entry in study.classes]),
        "method": study.method.model_dump_json(),
        "adapter_digest": adapter_digest(parameters),
    }
    state = replace(agreed.initial, adapter=parameters)
    tensors = safetensors.numpy.load(state.to_bytes())
    write_durable(path, bytes(safetensors.numpy.save(tensors, metadata)))

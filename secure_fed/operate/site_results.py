"""What a site of a deployment leaves in its state folder after each round, for its own eyes."""

from __future__ import annotations

import json
from pathlib import Path

from secure_fed.clients.calibration import calibrate
from secure_fed.clients.site import Site
from secure_fed.core.storage import write_durable
from secure_fed.model.adapter_file import CALIBRATION, save_adapter, save_calibration
from secure_fed.model.device import describe_device
from secure_fed.model.evaluation import Metrics
from secure_fed.protocol.study import AgreedStudy


def write_results(state: Path, agreed: AgreedStudy, site: Site, before: Metrics) -> None:
    """Write the adapter after the last round and what it does on this site's test images.

    ``STATE/adapter.safetensors``, ``STATE/calibration.safetensors`` and ``STATE/summary.json``; nothing before the
    first round.

    Args:
        state: the site's state folder.
        agreed: the study.
        site: after the round.
        before: metrics of zero-shot classification on the same images.

    Raises:
        StorageError: a file cannot be written.
    """
    if not site.round:
        return
    save_adapter(state / "adapter.safetensors", agreed, site.parameters)
    own = calibrate(agreed, [site], site.parameters, personal=True)
    save_calibration(state / CALIBRATION, site.parameters, own)
    counts = site.validation
    share = counts.correct / counts.images if counts is not None and counts.images else None
    summary = {
        "study_id": agreed.study.id,
        "site": site.name,
        "run": site.run,
        "round": site.round,
        "rounds": agreed.study.rounds,
        "device": describe_device(site.device),
        "adapter_digest": site.adapter_digest,
        "validations": _validations(state, site) | {str(site.round): share},
        "metrics": {"zero_shot": before, "federated": site.evaluate(site.personal(site.parameters))},
    }
    write_durable(state / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())


def _validations(state: Path, site: Site) -> dict[str, float | None]:
    """By round, the shares of correct validation images that earlier rounds of this run have noted."""
    try:
        content = json.loads((state / "summary.json").read_text(encoding="utf-8"))
        return dict(content["validations"]) if content["run"] == site.run else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}  # there is none yet, or it is another version's: the curve starts here

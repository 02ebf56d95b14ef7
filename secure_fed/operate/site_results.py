"""What a site of a deployment leaves in its state folder after each round, for its own eyes."""

from __future__ import annotations

from pathlib import Path

from secure_fed.clients.budget import LOCAL
from secure_fed.clients.calibration import calibrate
from secure_fed.clients.site import Site
from secure_fed.core.errors import SummaryError
from secure_fed.core.layout import SiteState
from secure_fed.model.adapter_file import save_adapter, save_calibration
from secure_fed.model.device import describe_device
from secure_fed.model.scores import Scores
from secure_fed.operate.anomaly_figures import anomaly_figures
from secure_fed.operate.sum_figures import one_sum_figures
from secure_fed.operate.summary import FORMAT, SiteMetrics, SiteSummary, read_summary, write_summary
from secure_fed.protocol.study import AgreedStudy


def write_results(state: Path, agreed: AgreedStudy, site: Site) -> None:
    """Write the adapter after the last round and what it does on this site's test images.

    ``STATE/adapter.safetensors``, ``STATE/calibration.safetensors`` and ``STATE/summary.json``; nothing before the
    first round.

    Args:
        state: the site's state folder.
        agreed: the study.
        site: after the round.

    Raises:
        StorageError: a file cannot be written.
    """
    if not site.round:
        return
    folder = SiteState(state)
    save_adapter(folder.adapter, agreed, site.parameters)
    own = calibrate(agreed, [site], site.parameters, personal=True)
    save_calibration(folder.calibration, site.parameters, own)
    counts = site.replica.state.validation
    share = counts.correct / counts.images if counts is not None and counts.images else None
    summary = SiteSummary(
        kind="site",
        format=FORMAT,
        study_id=agreed.study.id,
        site=site.name,
        run=site.run,
        round=site.round,
        rounds=site.rounds,
        device=describe_device(site.device),
        adapter_digest=site.adapter_digest,
        validations=_validations(folder.summary, site) | {site.round: share},
        metrics=SiteMetrics(
            zero_shot=Scores(**site.evaluate(None)), federated=Scores(**site.evaluate(site.personal(site.parameters)))
        ),
        one_sum=one_sum_figures(agreed, [site], []),
        anomaly=anomaly_figures(agreed, [site], []),
        local=LOCAL if site.unpaid else "",
    )
    write_summary(folder.summary, summary)


def _validations(path: Path, site: Site) -> dict[int, float | None]:
    """By round, the shares of correct validation images that earlier rounds of this run have noted."""
    try:
        before = read_summary(path, SiteSummary)
    except SummaryError:
        return {}  # there is none yet, or it is damaged or a newer version's: the curve starts here
    return before.validations if before.run == site.run else {}

"""What a site's own images add to the global adapter: temperature, batch norm's statistics, its private head."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from secure_fed.clients.budget import LOCAL
from secure_fed.clients.site import Site
from secure_fed.model.adapter_file import Calibration
from secure_fed.model.adapters import PRIVATE_HEAD, build_adapter
from secure_fed.model.calibration import fit_temperature
from secure_fed.model.evaluation import pool
from secure_fed.protocol.codec import Parameters
from secure_fed.protocol.study import AgreedStudy


def calibrate(agreed: AgreedStudy, sites: Sequence[Site], parameters: Parameters, *, personal: bool) -> Calibration:
    """Fit to validation images what an adapter needs to be used.

    Nothing of it is paid for by a privacy budget, so that it stays at the site.

    Args:
        agreed: the study.
        sites: one site; or several simulated ones, whose images then count as one set.
        parameters: the global adapter.
        personal: whether the site's private head, if it has one, takes part; only with one site.

    Raises:
        SecfacmicError: as :meth:`Site.features`.
    """
    if agreed.study.task == "anomaly":
        return Calibration(None, sum(len(site.features().val.y) for site in sites))
    if personal:
        (site,) = sites
        parameters = site.personal(parameters)
    probabilities, labels, _ = pool([site.validation_predictions(parameters) for site in sites])
    temperature = fit_temperature(probabilities, labels) if len(labels) else None
    initial = agreed.initial
    adapter = build_adapter(
        agreed.study.method, initial.prompt_features, initial.logit_scale, parameters, sites[0].tower, initial.basis
    )
    # As for the site's own predictions: of all images that it may learn from, labelled or not.
    own = [part for site in sites for part in (site.features().train.x, site.features().unlabelled)]
    rows = np.concatenate(own)
    if len(rows):
        adapter.set_statistics(torch.from_numpy(rows))
    local = LOCAL if any(site.unpaid for site in sites) else ""
    return Calibration(temperature, len(labels), adapter.statistics(), parameters.get(PRIVATE_HEAD), local)

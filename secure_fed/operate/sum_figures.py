"""Figures of a study of one sum: what the sums themselves say, and how its sets and flags fare on test images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from secure_fed.clients.site import Site
from secure_fed.model.cases import judge
from secure_fed.operate.summary import CaseFigures, OneSum, PooledValidation
from secure_fed.protocol import aggregation, one_sum
from secure_fed.protocol.study import AgreedStudy

_SHOWN = 16


def one_sum_figures(agreed: AgreedStudy, training: Sequence[Site], observers: Sequence[Site]) -> OneSum | None:
    """Of the head that the sites hold; None for other methods, and before the first sum.

    Args:
        agreed: the study.
        training: the training sites here, one at least.
        observers: whose images count as held out.
    """
    if not agreed.study.method.one_sum:
        return None
    site = training[0] if training else observers[0]
    state = site.replica.state.tensors
    held = {name.removeprefix(aggregation.MOMENT): value for name, value in state.items()}
    sums = one_sum.Sums.of(held)
    if not sums.patients.any():
        return None
    names, method = agreed.study.class_names, agreed.study.method
    known = one_sum.known_classes(sums, method.min_patients)
    shrinkage, validation = method.shrinkage, None
    histograms = held.get(one_sum.HISTOGRAMS)
    if histograms is not None and histograms.any():
        place, histogram = one_sum.chosen(histograms, len(names))
        shrinkage, found = one_sum.GRID[place], one_sum.pooled(histogram)
        validation = None if found is None else PooledValidation(**vars(found))
    spectrum = np.sqrt(np.maximum(np.linalg.eigvalsh(one_sum.covariance(sums))[::-1], 0))
    places = np.unique(np.geomspace(1, len(spectrum), _SHOWN).astype(int)) - 1
    claims = one_sum.Limits.of(site.parameters).patients > 0
    return OneSum(
        shrinkage=shrinkage,
        patients={name: max(0.0, float(count)) for name, count in zip(names, sums.patients, strict=True)},
        left_out=tuple(name for name, there in zip(names, known, strict=True) if not there),
        spectrum={int(place) + 1: float(spectrum[place]) for place in places},
        noise_floor=sums.floor**0.5,
        validation=validation,
        promised=method.coverage if claims else None,
        per_site={one.name: _cases(agreed, [one]) for one in training} if claims else {},
        held_out=_cases(agreed, observers) if claims and observers else None,
    )


def _cases(agreed: AgreedStudy, sites: Sequence[Site]) -> CaseFigures | None:
    """How sets and flags fare on these sites' test images together; None without any."""
    tests = [site.test_images() for site in sites]
    x, labels = (np.concatenate(parts) for parts in list(zip(*tests, strict=True))[:2])
    found = judge(agreed.initial, sites[0].parameters, x) if len(labels) else None
    if found is None:
        return None
    covered = found.sets[np.arange(len(labels)), labels]
    return CaseFigures(
        coverage=float(covered.mean()),
        coverage_by_class={
            name: float(covered[labels == label].mean())
            for label, name in enumerate(agreed.study.class_names)
            if np.any(labels == label)
        },
        set_size=float(found.sets.sum(axis=1).mean()),
        strangers=None if found.strangers is None else float(found.strangers.mean()),
        images=len(labels),
    )

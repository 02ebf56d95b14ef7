"""Figures of a study of anomalies: scores by site, the threshold, and how heat maps find lesions that have masks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score, roc_curve

from secure_fed.clients.decoding import decode
from secure_fed.clients.masks import lesion_of
from secure_fed.clients.site import Site
from secure_fed.model.heat import placed, upsampled
from secure_fed.operate.summary import AnomalyFigures, Places, ScoresAt
from secure_fed.protocol import memory
from secure_fed.protocol.study import AgreedStudy
from secure_fed.protocol.study_tables import NORMAL, Method

_POINTS = 64
_MOST_FALSE = 0.3
_BINS = 64
_MAP_SIDE = 8


def anomaly_figures(agreed: AgreedStudy, training: Sequence[Site], observers: Sequence[Site]) -> AnomalyFigures | None:
    """Of the memory that the sites hold; None for other studies.

    Args:
        agreed: the study.
        training: the training sites here.
        observers: whose images count as held out.

    Raises:
        DataError: a mask that a manifest names is missing, cannot be read, or is of another size than its image.
    """
    if agreed.study.task != "anomaly":
        return None
    adapter = (training or observers)[0].parameters
    method = agreed.study.method
    limit = memory.threshold(adapter[memory.HISTOGRAM], method.false_alarms)
    places = {}
    for name, sites in (("own", training), ("held out", observers)):
        if found := _places(adapter, training, sites):
            places[name] = found
    return AnomalyFigures(
        threshold=None if limit >= memory.NO_LIMIT else limit,
        false_alarms=method.false_alarms,
        patients=max(0.0, float(adapter[memory.HISTOGRAM].sum())),
        per_site={site.name: _scores([site], adapter, method, limit) for site in training},
        held_out=_scores(observers, adapter, method, limit) if observers else None,
        places=places,
    )


def _scores(sites: Sequence[Site], adapter: dict[str, NDArray[np.float64]], method: Method, limit: float) -> ScoresAt:
    tests = [site.test_images() for site in sites]
    x, labels = (np.concatenate(parts) for parts in list(zip(*tests, strict=True))[:2])
    owners = np.array([f"{number} {owner}" for number, (*_, whose) in enumerate(tests) for owner in whose])
    found, wrong = memory.scores(adapter, x, method.top), labels != NORMAL
    heat = memory.maps(adapter, x)
    mean_maps = [
        _mean_map(heat[rows]) if len(set(owners[rows])) >= method.min_patients else () for rows in (~wrong, wrong)
    ]
    bins = np.minimum((found * (_BINS / 2)).astype(int), _BINS - 1)
    curve: tuple[tuple[float, float], ...] = ()
    if 0 < wrong.sum() < len(wrong):
        false, true, _ = roc_curve(wrong, found)
        kept = np.unique(np.linspace(0, len(false) - 1, _POINTS).astype(int))
        curve = tuple((float(false[place]), float(true[place])) for place in kept)
    return ScoresAt(
        normal=tuple(np.bincount(bins[~wrong], minlength=_BINS).tolist()),
        anomalous=tuple(np.bincount(bins[wrong], minlength=_BINS).tolist()),
        flagged_normal=_flagged(owners[~wrong], found[~wrong] >= limit),
        flagged_anomalous=_flagged(owners[wrong], found[wrong] >= limit),
        roc=curve,
        normal_map=mean_maps[0],
        anomalous_map=mean_maps[1],
    )


def _flagged(owners: NDArray[Any], above: NDArray[np.bool_]) -> float | None:
    """Share of patients one of whose images is flagged."""
    everybody = set(owners.tolist())
    return len(set(owners[above].tolist())) / len(everybody) if everybody else None


def _mean_map(heat: NDArray[np.float64]) -> tuple[tuple[float, ...], ...]:
    """The mean of maps [n, h, w] by rows, of at most :data:`_MAP_SIDE` places a side; empty of maps of one place."""
    whole = heat.mean(axis=0)
    if whole.size == 1:
        return ()
    for axis in (0, 1):
        parts = np.array_split(whole, min(_MAP_SIDE, whole.shape[axis]), axis=axis)
        whole = np.stack([part.mean(axis=axis) for part in parts], axis=axis)
    return tuple(tuple(row) for row in whole.tolist())


# --- lesions whose masks are there ---


def _places(adapter: dict[str, NDArray[np.float64]], training: Sequence[Site], sites: Sequence[Site]) -> Places | None:
    masks, pictures, found, sizes = [], [], [], []
    for site in sites:
        heat = memory.maps(adapter, site.test_images()[0])
        for row, image in enumerate(site.test_sources()):
            mask = lesion_of(image, site.rules)
            if mask is not None and mask.any():
                picture = decode(image.path.read_bytes(), image.frame, image.axis, site.rules)
                size = _judged(picture.height, picture.width)
                across, down = size[1] / picture.width, size[0] / picture.height
                left, top, right, bottom = site.window(picture.size)
                window = (left * across, top * down, right * across, bottom * down)
                sizes.append(size)
                masks.append(resized(mask, size))
                pictures.append(resized(np.asarray(picture.convert("L")), size))
                found.append(placed(heat[row : row + 1], window, size)[0])
    if not masks:
        return None
    size = Counter(sizes).most_common(1)[0][0]  # all are judged in one
    lesions, heads, heat = (np.stack([resized(one, size) for one in each]) for each in (masks, pictures, found))
    kept = lesions.any(axis=(1, 2)) & ~lesions.all(axis=(1, 2))  # of a few pixels nothing may be left in that size
    if not kept.any():
        return None
    lesions, heads, heat = lesions[kept], heads[kept], heat[kept]
    learned = [
        resized(mask, size)
        for site in training
        for image in site.train_sources()
        if (mask := lesion_of(image, site.rules)) is not None
    ]
    constant = None
    if learned:
        constant = upsampled(np.mean(learned, axis=0)[None], size)[0]
        constant = float(roc_auc_score(lesions.ravel(), np.broadcast_to(constant, lesions.shape).ravel()))
    return Places(
        pixel_auroc=float(roc_auc_score(lesions.ravel(), heat.ravel())),
        pro=per_region_overlap(lesions, heat),
        constant_pixel_auroc=constant,
        equal_place_auroc=equal_place(lesions, heat, heads > _DARK),
        images=len(lesions),
    )


def _judged(height: int, width: int) -> tuple[int, int]:
    """The size in which a picture's map is judged, height and width: its own, of a large one's a smaller one."""
    share = min(1.0, _MOST_SIDE / max(height, width))
    return max(1, round(height * share)), max(1, round(width * share))


_MOST_SIDE = 256
"""In pixels: maps are smooth over more than that, and all pixels of all test images are sorted by their values."""


def resized(pixels: NDArray[Any], size: tuple[int, ...]) -> NDArray[Any]:
    """A picture or mask [h, w] at another size, each pixel that of the nearest place: a mask stays one."""
    rows, columns = (np.arange(to) * old // to for to, old in zip(size, pixels.shape, strict=True))
    return pixels[np.ix_(rows, columns)]


_DARK = 20
"""Grey value up to which a pixel shows no head."""


def per_region_overlap(lesions: NDArray[np.bool_], heat: NDArray[np.float64]) -> float:
    """PRO: mean share of an image's lesion above a threshold, over false positive rates up to 0.3, scaled to [0, 1].

    Args:
        lesions: [n, height, width], one lesion an image.
        heat: likewise.
    """
    healthy = np.sort(heat[~lesions])[::-1]
    rates = np.linspace(0, _MOST_FALSE, 101)
    limits = healthy[np.minimum((rates * len(healthy)).astype(int), len(healthy) - 1)]
    above = []
    for one, lesion in zip(heat, lesions, strict=True):
        values = np.sort(one[lesion])
        above.append(1 - np.searchsorted(values, limits, "right") / len(values))
    found = np.mean(above, axis=0)
    return float(np.trapezoid(found, rates) / _MOST_FALSE)


def equal_place(lesions: NDArray[np.bool_], heat: NDArray[np.float64], heads: NDArray[np.bool_]) -> float | None:
    """Mean over places of the chance that a lesion there is hotter than another image's head there without one.

    A map that is the same for every image has 0.5. Places weigh by their pairs. None without any pair.

    Args:
        lesions: [n, height, width].
        heat: likewise.
        heads: likewise, pixels that show a head.
    """
    wins = pairs = 0.0
    for row, column in np.argwhere(lesions.any(axis=0)):
        sick = lesions[:, row, column]
        well = ~sick & heads[:, row, column]
        if not well.any():
            continue
        hot, cold = heat[sick, row, column], np.sort(heat[well, row, column])
        below, upto = np.searchsorted(cold, hot, "left"), np.searchsorted(cold, hot, "right")
        wins += float((below + upto).sum()) / 2
        pairs += len(hot) * len(cold)
    return wins / pairs if pairs else None

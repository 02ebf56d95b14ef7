"""Pictures of a run: how it learned, what it confuses, how far its probabilities hold, what domain adaptation did.

Colours are Okabe and Ito's, which people with any kind of colour vision tell apart; lines and points also differ by
marker. A deployment's site draws its own images only; several sites in one picture are public or simulated.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray
from scipy.linalg import orthogonal_procrustes
from sklearn.manifold import TSNE
from sklearn.metrics import confusion_matrix, silhouette_score

from secure_fed.clients.budget import LOCAL
from secure_fed.clients.calibration import calibrate
from secure_fed.clients.data import SiteImage
from secure_fed.clients.decoding import decode
from secure_fed.clients.rules import Rules
from secure_fed.clients.site import Site
from secure_fed.clients.sitefile import read_site_file
from secure_fed.core.errors import AdapterFileError, StudyError
from secure_fed.core.layout import ADAPTER
from secure_fed.core.storage import DRAWN, exclusive, is_drawn, make_folder, refuse_foreign, write_durable
from secure_fed.model.adapter_file import load_adapter
from secure_fed.model.adapters import PRIVATE_HEAD, build_adapter
from secure_fed.model.calibration import tempered
from secure_fed.model.evaluation import CALIBRATION_BINS, Predictions, balanced_accuracy, pool
from secure_fed.model.heat import Scale, overlay
from secure_fed.protocol import memory
from secure_fed.protocol.codec import Parameters
from secure_fed.protocol.study import AgreedStudy, load_study
from secure_fed.protocol.study_tables import NORMAL

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#F0E442", "#000000")
"""Okabe and Ito's; beyond eight they come again with other markers."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")

MOST_POINTS = 1500
"""Images in a feature map."""

_OF_ANOMALIES = "anomaly_maps"
_DPI = 150
_GREY = "#666666"
_LEAST_POINTS = 10
_MAPS_A_SIDE = 3
"""Anomalous images of a site that show their maps, and normal ones."""
_HELD_OUT = "held out"


@dataclass(frozen=True)
class Run:
    """What is drawn.

    Attributes:
        agreed: the study.
        sites: those whose images are here: all of a simulation, or the one of a deployment.
        parameters: the adapter that they hold.
        temperature: fitted on validation images; 1 without any.
    """

    agreed: AgreedStudy
    sites: Sequence[Site]
    parameters: Parameters
    temperature: float

    @property
    def training(self) -> list[Site]:
        """The sites that train."""
        return [site for site in self.sites if self.agreed.study.site(site.name).role == "train"]

    @property
    def observers(self) -> list[Site]:
        """The others: the held-out ones."""
        return [site for site in self.sites if self.agreed.study.site(site.name).role == "observer"]

    def tested(self) -> dict[str, Predictions]:
        """Test predictions of the adapter, by site; the observers' as one set."""
        found = {site.name: site.predictions(site.personal(self.parameters)) for site in self.training}
        if self.observers:
            held_out = pool([site.predictions(self.parameters) for site in self.observers])
            found[self.observers[0].name if len(self.sites) == 1 else _HELD_OUT] = held_out
        return {name: each for name, each in found.items() if len(each.labels)}


def plot_run(folder: Path, out: Path) -> list[Path]:
    """Draw what ``simulate`` or ``demo`` left in a folder.

    Args:
        folder: their ``--out``.
        out: gets ``learning_curves.png, confusion.png, reliability.png, feature_map.png``; of a study of anomalies
            ``anomaly_maps.png``.

    Returns:
        The pictures.

    Raises:
        StudyError: there is no study in it.
        AdapterFileError: there is no finished run, or its data are patients'.
        OutputError: a file of one of these names is no such picture; nothing was drawn.
        SecfacmicError: others, as the sites give them.
    """
    if not (folder / "study.toml").is_file():
        raise StudyError(
            f"{folder}: no study in it to draw; expected the folder of a finished simulate or demo, or of a site (what "
            "secfacmic report draws of a sweep is in its page)"
        )
    _refuse_others(out)
    with exclusive(folder):
        agreed = load_study(folder / "study.toml")
        files = [read_site_file(folder / "sites" / member.name / "site.toml") for member in agreed.study.sites]
        if any(file.data.kind == "patients" for file in files):
            raise AdapterFileError(f"{folder}: patients' data; expected a simulation: draw one site, by its own folder")
        adapter = load_adapter(folder / ADAPTER)
        sites = [Site(file, agreed) for file in files]
        return _draw(Run(agreed, sites, adapter.initial.adapter, adapter.temperature), out)


def plot_site(folder: Path, out: Path) -> list[Path]:
    """Draw what one site of a deployment sees: its own images, on its own disk.

    Args:
        folder: the site's, or its ``site.toml``.
        out: as in :func:`plot_run`. Of patients under a budget each picture says that it must not leave.

    Raises:
        AdapterFileError: no round is applied yet.
        OutputError: as :func:`plot_run`.
        SecfacmicError: others, as the site gives them.
    """
    _refuse_others(out)
    file = read_site_file(folder)
    with exclusive(file.state_folder.path):
        agreed = load_study(Path(file.study))
        site = Site(file, agreed)
        if not site.round:
            raise AdapterFileError(f"{file.site}: no round is applied here yet; expected at least one: take part first")
        temperature = None
        if agreed.study.task == "classify":
            temperature = calibrate(agreed, [site], site.parameters, personal=True).temperature
        return _draw(Run(agreed, [site], site.parameters, temperature or 1.0), out)


def _drawings() -> dict[str, Callable[[Run], Figure | None]]:
    return {
        "learning_curves": learning_curves,
        "confusion": confusion,
        "reliability": reliability,
        "feature_map": feature_map,
        _OF_ANOMALIES: anomaly_maps,
    }


def _refuse_others(out: Path) -> None:
    if out.is_dir():
        for name in _drawings():
            refuse_foreign(out / f"{name}.png", is_drawn)


def _draw(run: Run, out: Path) -> list[Path]:
    make_folder(out)
    anomalies = run.agreed.study.task == "anomaly"
    drawings = {name: draw for name, draw in _drawings().items() if (name == _OF_ANOMALIES) == anomalies}
    written = []
    for name, draw in drawings.items():
        figure = draw(run)
        if figure is None:
            continue
        picture = io.BytesIO()
        if any(site.unpaid for site in run.sites):
            figure.text(0.5, 0, LOCAL, ha="center", va="top", fontsize=6, color="red")
        figure.savefig(picture, format="png", dpi=_DPI, bbox_inches="tight", metadata=DRAWN)
        write_durable(out / f"{name}.png", picture.getvalue())
        written.append(out / f"{name}.png")
    return written


def learning_curves(run: Run) -> Figure | None:
    """Balanced accuracy on each site's validation images after each round; None without any such images."""
    curves: dict[str, list[tuple[int, float]]] = {site.name: [] for site in run.sites if len(site.features().val.y)}
    if not run.training:
        curves = {name: curve for name, curve in curves.items() if name == run.sites[0].name}
    else:
        curves = {site.name: curves[site.name] for site in run.training if site.name in curves}
    if not curves:
        return None
    applied = ((state.round, state.parameters) for state in run.sites[0].replica.history())
    states = [(0, run.agreed.initial.adapter), *applied]
    for site in run.sites:
        for number, parameters in states if site.name in curves else ():
            value = site.validate(site.personal(parameters, number) if number else parameters)
            if value is not None:
                curves[site.name].append((number, value))
    figure, (axes,) = _figure(1, 1, 6.4, 4.0)
    for (name, points), (colour, marker) in zip(curves.items(), _styles(), strict=False):
        x, y = zip(*points, strict=True)
        axes.plot(x, y, color=colour, marker=marker, markersize=4.5, linewidth=1.6, label=name)
    axes.axhline(1 / len(run.agreed.study.classes), color=_GREY, linewidth=0.8, linestyle=":", label="guessing")
    axes.set(xlabel="round (0: before training)", ylabel="balanced accuracy", ylim=(0, 1.02))
    axes.set_title(f"{run.agreed.study.name}: on each site's validation images", fontsize=10, loc="left")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def confusion(run: Run) -> Figure | None:
    """Confusion matrices on test images: rows are true classes, shades their shares, numbers images."""
    tested = run.tested()
    if not tested:
        return None
    names = run.agreed.study.class_names
    columns = min(3, len(tested))
    rows = -(-len(tested) // columns)
    side = max(2.4, 0.5 * len(names))
    figure, panels = _figure(rows, columns, columns * (side + 0.6) + 1.6, rows * (side + 0.6) + 1.0)
    for place, axes in enumerate(panels):
        if place >= len(tested):
            axes.set_axis_off()
            continue
        name, (probabilities, labels, _) = list(tested.items())[place]
        counts = confusion_matrix(labels, probabilities.argmax(axis=1), labels=range(len(names)))
        shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        for i, j in np.ndindex(counts.shape) if len(names) <= 12 else ():
            if counts[i, j]:
                shade = "white" if shares[i, j] > 0.55 else "black"
                axes.text(j, i, str(counts[i, j]), ha="center", va="center", fontsize=8, color=shade)
        value = balanced_accuracy(probabilities, labels) or 0.0
        axes.set_title(f"{name}: {100 * value:.0f} % balanced", fontsize=9)
        axes.set_xticks(range(len(names)))
        axes.set_yticks(range(len(names)))
        bottom = place + columns >= len(tested)
        axes.set_xticklabels(names if bottom else [], rotation=40, ha="right", rotation_mode="anchor", fontsize=8)
        axes.set_yticklabels(names if place % columns == 0 else [], fontsize=8)
        axes.tick_params(length=0)
        axes.set_xticks(np.arange(len(names) - 1) + 0.5, minor=True)
        axes.set_yticks(np.arange(len(names) - 1) + 0.5, minor=True)
        axes.grid(which="minor", color="white", linewidth=1.0)
        axes.tick_params(which="minor", length=0)
        axes.spines[:].set(visible=True, color="#cccccc")
    figure.supxlabel("predicted", fontsize=9)
    figure.supylabel("true class", fontsize=9)
    figure.suptitle(f"{run.agreed.study.name}: test images by true and predicted class", fontsize=10)
    return figure


def reliability(run: Run) -> Figure | None:
    """How often the prediction is right among test images of equal confidence, before and after calibration."""
    tested = run.tested()
    if not tested:
        return None
    held_out = tested.pop(_HELD_OUT, None)
    groups = (
        {", ".join(tested) if len(tested) < 4 else f"{len(tested)} sites": pool(list(tested.values()))}
        if tested
        else {}
    )
    if held_out is not None:
        groups[_HELD_OUT] = held_out
    figure, panels = _figure(1, len(groups), 4.1 * len(groups) + 0.4, 4.3)
    for axes, (name, (probabilities, labels, _)) in zip(panels, groups.items(), strict=True):
        axes.plot((0, 1), (0, 1), color=_GREY, linewidth=0.9, linestyle=":", label="perfect")
        versions = {
            "as trained": probabilities,
            f"at T = {run.temperature:.2f}": tempered(probabilities, run.temperature),
        }
        for (label, values), colour, marker in zip(versions.items(), COLOURS, MARKERS, strict=False):
            x, y, size, error = _bins(values, labels)
            text = f"{label}: error {100 * error:.1f} %"
            axes.plot(x, y, color=colour, linewidth=0.8, alpha=0.6)
            area = 12 + 180 * size / size.max()
            axes.scatter(x, y, s=area, color=colour, marker=marker, alpha=0.75, linewidth=0, label=text)
        axes.set(xlim=(0, 1.02), ylim=(-0.02, 1.05), xlabel="probability of the prediction", aspect="equal")
        axes.set_title(f"{name}, {len(labels)} test images", fontsize=9)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.grid(color="#eeeeee", linewidth=0.6)
        axes.set_axisbelow(True)
        handles, texts = axes.get_legend_handles_labels()
        legend = axes.legend(handles, texts, frameon=False, fontsize=8, loc="lower right")
        for handle in legend.legend_handles[1:]:
            handle.set_sizes([40])  # type: ignore[union-attr]
    panels[0].set_ylabel("share that is right")
    figure.suptitle(f"{run.agreed.study.name}: calibration (larger points: more images)", fontsize=10)
    return figure


def feature_map(run: Run) -> Figure | None:
    """Image features before and after the adapter by t-SNE, coloured by class and, of several sites, by site.

    Of validation and test images, which nothing was trained on; of observers all labelled ones. t-SNE shows what lies
    close to what and not how far apart; the silhouettes in the titles (-1 to 1, cosine, of the features themselves) say
    how far classes and sites fall into clusters. None with too few images.
    """
    before, after, labels, owners = _features(run)
    if len(labels) < _LEAST_POINTS:
        return None
    moves = not np.array_equal(before, after)
    pictures = {"before: frozen CLIP": before} | ({"after: adapted": after} if moves else {})
    names = [site.name for site in run.sites]
    colourings = {"class": (labels, list(run.agreed.study.class_names))}
    if len(names) > 1:
        colourings["site"] = (owners, names)
    figure, panels = _figure(len(colourings), len(pictures), 3.9 * len(pictures) + 1.9, 3.7 * len(colourings) + 0.5)
    places: dict[str, NDArray[np.float32]] = {}
    for title, features in pictures.items():  # the second picture starts from the first, so that they can be compared
        places[title] = _embed(features, next(iter(places.values()), None))
    for row, (what, (groups, called)) in enumerate(colourings.items()):
        styles = list(zip(range(len(called)), _styles(), strict=False))
        for column, (title, features) in enumerate(pictures.items()):
            axes = panels[row * len(pictures) + column]
            order = np.random.default_rng(0).permutation(len(groups))  # so that no group lies on top of all others
            for index in order:
                colour, marker = styles[groups[index]][1]
                x, y = places[title][index]
                axes.plot(x, y, color=colour, marker=marker, markersize=3.6, alpha=0.75, markeredgewidth=0)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set(visible=True, color="#cccccc")
            axes.set_title(f"{title}\n{what} silhouette {_silhouette(features, groups)}", fontsize=9)
        handles = [
            Line2D([], [], color=colour, marker=marker, linestyle="", markersize=6, label=called[index])
            for index, (colour, marker) in styles
        ]
        panels[(row + 1) * len(pictures) - 1].legend(
            handles=handles, title=what, frameon=False, fontsize=8, title_fontsize=9, loc="center left",
            bbox_to_anchor=(1.0, 0.5), alignment="left",
        )  # fmt: skip
    if moves:
        note = f"mean cosine of before and after {float((before * after).sum(axis=1).mean()):.3f}"
    else:
        note = f"{run.agreed.study.method.adapter} moves no image feature"
    figure.suptitle(f"{run.agreed.study.name}: {len(labels)} images that nothing was trained on; {note}", fontsize=10)
    return figure


def anomaly_maps(run: Run) -> Figure | None:
    """A memory's heat maps over test images: of each site the first anomalous and the first normal ones, unchosen.

    Colours mean the same in all pictures of the study. None without any test image.
    """
    study = run.agreed.study
    limit = memory.threshold(run.parameters[memory.HISTOGRAM], study.method.false_alarms)
    rules = Rules(study.windows, study.background)
    scale = Scale.of(run.parameters, study.method.false_alarms)
    shown: list[tuple[str, SiteImage, NDArray[np.float64]]] = []
    for site in run.sites:
        x, labels, _ = site.test_images()
        anomalous = labels != NORMAL
        rows = [int(row) for side in (anomalous, ~anomalous) for row in np.flatnonzero(side)[:_MAPS_A_SIDE]]
        if not rows:
            continue
        scores, sources = memory.scores(run.parameters, x[rows], study.method.top), site.test_sources()
        for row, score, heat in zip(rows, scores, memory.maps(run.parameters, x[rows]), strict=True):
            what = "anomalous" if anomalous[row] else "normal"
            flag = ", flagged" if score >= limit else ""
            shown.append((f"{site.name}: {what}\nscore {score:.3f}{flag}", sources[row], heat))
    if not shown:
        return None
    columns = 2 * _MAPS_A_SIDE
    rows_of_panels = -(-len(shown) // columns)
    figure, panels = _figure(rows_of_panels, columns, 1.9 * columns, 2.3 * rows_of_panels + 0.7)
    for axes in panels:
        axes.set_axis_off()
    for axes, (title, image, heat) in zip(panels, shown, strict=False):
        picture = decode(image.path.read_bytes(), image.frame, image.axis, rules)
        axes.imshow(np.asarray(overlay(picture, scale.share(heat), run.sites[0].window(picture.size))))
        axes.set_title(title, fontsize=8)
    title = f"{study.name}: test images, distance of patches to the nearest normal centroid"
    figure.suptitle(f"{title}\n{scale.words}", fontsize=10)
    return figure


def _features(run: Run) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]:
    """Features before and after the adapter [n, d], labels and sites [n], of at most :data:`MOST_POINTS` images."""
    before, after, labels, owners = [], [], [], []
    initial = run.agreed.initial
    for number, site in enumerate(run.sites):
        features = site.features()
        splits = ("train", "val", "test") if site in run.observers else ("val", "test")
        x = np.concatenate([getattr(features, split).x for split in splits])
        shared = {name: value for name, value in run.parameters.items() if name != PRIVATE_HEAD}
        adapter = build_adapter(
            run.agreed.study.method, initial.prompt_features, initial.logit_scale, shared, site.tower, initial.basis
        )
        adapter.eval()
        with torch.inference_mode():
            own = np.concatenate([features.train.x, features.unlabelled])
            if len(own):
                adapter.set_statistics(torch.from_numpy(own))
            after.append(adapter.adapt(torch.from_numpy(x)).numpy())
        before.append(x)
        labels.append(np.concatenate([getattr(features, split).y for split in splits]))
        owners.append(np.full(len(x), number, dtype=np.int64))
    parts = [np.concatenate(part) for part in (before, after, labels, owners)]
    count = len(parts[2])
    chosen = np.sort(np.random.default_rng(0).choice(count, min(count, MOST_POINTS), replace=False))
    return parts[0][chosen], parts[1][chosen], parts[2][chosen], parts[3][chosen]


def _embed(features: NDArray[np.float32], start: NDArray[np.float32] | None) -> NDArray[np.float32]:
    """Places in the plane, [n, 2], seeded; from other places on, or from the principal components."""
    perplexity = min(30.0, (len(features) - 1) / 3)
    # The size of scikit-learn's own initial places.
    init: Any = "pca" if start is None else (start - start.mean(axis=0)) / start[:, 0].std() * 1e-4
    places = np.asarray(TSNE(init=init, perplexity=perplexity, random_state=0).fit_transform(features))
    if start is None:
        return places
    # Rotations and reflections mean nothing in t-SNE: take those that bring it closest to the other picture.
    rotation, _ = orthogonal_procrustes(places - places.mean(axis=0), start - start.mean(axis=0))
    return np.asarray(places @ rotation, dtype=np.float32)


def _silhouette(features: NDArray[np.float32], groups: NDArray[np.int64]) -> str:
    found = len(np.unique(groups))
    if not 1 < found < len(groups):
        return "-"
    return f"{silhouette_score(features, groups, metric='cosine'):.2f}"


def _bins(probabilities: NDArray[np.float64], labels: NDArray[np.int64]) -> tuple[Any, Any, Any, float]:
    """Mean confidence, share right and number of images of each bin that has some, and the calibration error."""
    confidence = probabilities.max(axis=1)
    right = probabilities.argmax(axis=1) == labels
    places = np.minimum((confidence * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    bins = [places == place for place in np.unique(places)]
    x, y = (np.array([values[chosen].mean() for chosen in bins]) for values in (confidence, right))
    size = np.array([chosen.sum() for chosen in bins])
    return x, y, size, float((np.abs(y - x) * size).sum() / size.sum())


def _styles() -> Iterator[tuple[str, str]]:
    """Colours with markers, as many as are asked for, no two alike up to 64."""
    for turn in range(len(MARKERS)):
        for place, colour in enumerate(COLOURS):
            yield colour, MARKERS[(place + turn) % len(MARKERS)]


def _figure(rows: int, columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for one in axes.ravel():
        one.spines[["top", "right"]].set_visible(False)
    return figure, list(axes.ravel())

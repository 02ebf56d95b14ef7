"""Trials in groups that differ in their seed alone, and the measure by which groups are compared.

Shares are in percent from here on. A mean over seeds comes with its standard error: the sample standard deviation
over the root of the number of seeds; with one seed there is none.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import fmean, stdev
from typing import Any, NamedTuple

from secure_fed.model.scores import Scores
from secure_fed.operate.summary import Result
from secure_fed.report.recommendation import Recommendation, recommend
from secure_fed.report.results import Results, Setting, Summary, Trial, flat

HELD_OUT = "held out"
NONE = "none"
"""Where an epsilon would stand, of trials without differential privacy."""

Value = Callable[[Summary], float | None]


class Mean(NamedTuple):
    """Mean over seeds, its standard error if there are two or more, and how many there are."""

    value: float
    error: float | None
    seeds: int

    @property
    def ends(self) -> tuple[float | None, float | None]:
        """Ends of the error bar."""
        if self.error is None:
            return None, None
        return self.value - self.error, self.value + self.error

    def __str__(self) -> str:
        """As ``87.3 % ± 0.2``."""
        return f"{self.value:.1f} %" + ("" if self.error is None else f" ± {self.error:.1f}")


def mean_of(values: Iterable[float | None]) -> Mean | None:
    """Mean and standard error of the values that are defined; None without any."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    error = stdev(known) / math.sqrt(len(known)) if len(known) > 1 else None
    return Mean(fmean(known), error, len(known))


@dataclass
class Group:
    """Trials that differ in their seed alone.

    Attributes:
        label: of the setting; groups of one label differ in epsilon.
        style: of the label.
    """

    label: str
    epsilon: float | None
    style: int
    trials: list[Trial] = field(default_factory=list)

    @property
    def summaries(self) -> list[Summary]:
        """Of the trials that did not fail."""
        return [trial.summary for trial in self.trials if trial.summary is not None]

    @property
    def settings(self) -> dict[str, Setting]:
        """What all its trials have in common, without epsilon."""
        return self.trials[0].settings

    @property
    def rounds(self) -> list[int]:
        """Numbers of all rounds that any of the trials finished."""
        return sorted({entry.round for summary in self.summaries for entry in summary.rounds})

    def mean(self, value: Value) -> Mean | None:
        """Mean over the seeds of what each trial gives."""
        return mean_of(value(summary) for summary in self.summaries)


class Analysis:
    """The trials of a report in groups, and the measure by which they are compared.

    Attributes:
        results: what was read.
        groups: by setting in the order found, then by epsilon, without privacy last.
        varied: settings in which the trials differ.
        sites: training sites, in the order found.
        held_out: whether every trial was tested on a site that trained nothing.
        whole: whether some trials were tested at all their sites. What one site of a deployment holds is then no part
            of a mean over the sites.
        epsilon: what to call one: ``simulated epsilon`` unless patients' data stand behind it.
    """

    def __init__(self, results: Results) -> None:
        self.results = results
        trials = results.trials
        made = [trial for trial in trials if trial.origin != "site"]  # of a site no settings are known
        keys = dict.fromkeys(key for trial in made for key in trial.settings)
        self.varied = [key for key in keys if len({repr(trial.settings.get(key)) for trial in made}) > 1]
        self.sites = list(dict.fromkeys(site for trial in trials if trial.summary for site in trial.summary.sites))
        self.epsilon = "epsilon" if results.kinds <= {"patients"} else "simulated epsilon"
        # One that failed does not know its method; the same settings with another seed may.
        alike = [json.dumps(trial.settings, sort_keys=True) for trial in trials]
        methods = {same: trial.summary.method for same, trial in zip(alike, trials, strict=True) if trial.summary}
        styles: dict[str, int] = {}
        groups: dict[tuple[str, str, float | None], Group] = {}
        for same, trial in zip(alike, trials, strict=True):
            label = self._label(trial, methods.get(same, ""))
            style = styles.setdefault(label, len(styles))
            key = (label, same, trial.epsilon)
            groups.setdefault(key, Group(label, trial.epsilon, style)).trials.append(trial)
        self.groups = sorted(
            groups.values(), key=lambda group: (group.style, math.inf if group.epsilon is None else group.epsilon)
        )
        finished = [summary for group in self.groups for summary in group.summaries]
        whole = [one for one in finished if not _of_one_site(one)]
        self.whole = bool(whole)
        self.held_out = bool(whole) and all(balanced("federated", HELD_OUT)(one) is not None for one in whole)

    @property
    def measure(self) -> str:
        """What settings are compared by, in words."""
        return f"{'mean ' if self.averaged else ''}balanced accuracy {self.over}"

    @property
    def averaged(self) -> bool:
        """Whether the measure is a mean over several sites."""
        return self.whole and len(self.tested) > 1

    @property
    def over(self) -> str:
        """Where the measure is taken, in words."""
        if len(self.tested) == 1:
            return f"at {self.tested[0]}"
        return "over the sites" if self.whole else "at the site itself"

    def places_of(self, group: Group) -> list[str]:
        """Where a group's adapters were tested, of all places."""
        tested = {site for summary in group.summaries for site in _tested(summary)} | {HELD_OUT}
        return [place for place in self.places if place in tested]

    @property
    def tested(self) -> list[str]:
        """Sites where adapters were tested, without those held out."""
        return [place for place in self.places if place != HELD_OUT]

    @property
    def places(self) -> list[str]:
        """Where adapters were tested: sites, then ``held out``."""
        tested = {site for group in self.groups for one in group.summaries for site in _tested(one)}
        strangers = sorted(tested - set(self.sites))
        places = [site for site in self.sites if site in tested] + strangers
        return [*places, HELD_OUT] if self.held_out else places

    @property
    def private(self) -> bool:
        """Whether any trial has a privacy budget."""
        return any(group.epsilon is not None for group in self.groups)

    @property
    def levels(self) -> list[float | None]:
        """All epsilons, ascending; None, without privacy, last."""
        found = {group.epsilon for group in self.groups}
        return [*sorted(value for value in found if value is not None), *([None] if None in found else [])]

    def score(self, method: str = "federated") -> Value:
        """What trials are compared by, in percent: the mean over the sites, each on its own test images.

        Not the held-out site's: by what is to show how well a choice carries over, nothing is chosen.
        """

        def value(summary: Summary) -> float | None:
            if self.whole and _of_one_site(summary):
                return None
            mean = mean_of(balanced(method, site)(summary) for site in _tested(summary))
            return None if mean is None else mean.value

        return value

    def scored(self) -> list[tuple[Group, Mean]]:
        """Groups with their mean score, those without one left out."""
        return [(group, mean) for group in self.groups if (mean := group.mean(self.score())) is not None]

    @cached_property
    def recommendations(self) -> list[Recommendation]:
        """What to choose at each epsilon, of every sweep."""
        return [found for sweep in self.results.sweeps for found in recommend(sweep)]

    @cached_property
    def best(self) -> Group | None:
        """The group that the page tells most of.

        What is recommended at the least epsilon at which the best setting is within one standard error of the best
        at any; without privacy if no trial has a budget; if nothing can be recommended, the first group.
        """
        private = [one for one in self.recommendations if one.epsilon is not None] or self.recommendations
        scored = [(one, one.best.sites) for one in private if one.best.sites is not None]
        if scored:
            top = max((score for _, score in scored), key=lambda score: score.mean)
            enough = [one for one, score in scored if score.mean >= top.mean - (top.error or 0.0)]
            chosen = min(enough, key=lambda one: math.inf if one.epsilon is None else one.epsilon)
            for group in self.groups:
                if group.epsilon == chosen.epsilon and group.settings == flat(_without_epsilon(chosen.chosen.settings)):
                    return group
        found = [group for group in self.groups if group.summaries]
        return next((group for group in found if group.mean(self.score()) is not None), found[0] if found else None)

    def like(self, group: Group) -> list[Group]:
        """The groups of the same setting at every epsilon, itself included."""
        return [other for other in self.groups if other.label == group.label and other.summaries]

    def without_privacy(self, group: Group) -> Group | None:
        """The group of the same setting without privacy, if it is another."""
        return next((other for other in self.like(group) if other.epsilon is None and other is not group), None)

    def at(self, group: Group) -> str:
        """A group's epsilon, in words."""
        return "without privacy" if group.epsilon is None else f"{self.epsilon} {group.epsilon:g}"

    def where(self, group: Group) -> str:
        """A group's setting and epsilon, in words."""
        return f"{group.label}, {self.at(group)}"

    def class_names(self, groups: Sequence[Group]) -> tuple[str, ...]:
        """Names of the classes of the groups' confusion matrices; empty without any."""
        sizes = {
            len(one.confusion_matrix)
            for group in groups
            for summary in group.summaries
            for place in self.places
            if (one := scores(summary, "federated", place)) is not None and one.confusion_matrix is not None
        }
        if len(sizes) != 1:
            return ()
        size, names = sizes.pop(), self.results.class_names
        return names if len(names) == size else tuple(f"class {index}" for index in range(size))

    def _label(self, trial: Trial, method: str) -> str:
        """A setting in words: what makes it differ from the others."""
        if trial.origin == "site" and len(self.results.trials) > 1:
            return f"site {trial.name}"
        if not self.varied:
            return method or "this study"
        if len(self.varied) > 4 and "name" in self.varied:  # whole studies differ
            return " ".join(word for word in (str(trial.settings.get("name", "")), method) if word)
        return ", ".join(setting_text(key, trial.settings.get(key), alone=len(self.varied) == 1) for key in self.varied)


def setting_text(key: str, value: Setting, *, alone: bool = False) -> str:
    """A setting as a reader says it: ``text_head``, ``rounds 10``."""
    text = NONE if value is None else f"{value:g}" if isinstance(value, float) else str(value)
    name = key.rsplit(".", 1)[-1].replace("_", " ")
    if isinstance(value, str) and (alone or name in ("adapter", "method", "mode")):
        return text
    return f"{name} {text}".strip()


def epsilon_text(epsilon: float | None) -> str:
    """As ``3`` or ``none``."""
    return NONE if epsilon is None else f"{epsilon:g}"


# --- what a summary gives ---


def scores(summary: Summary, method: str, place: str) -> Scores | None:
    """Metrics of a method at a site, or on the held-out site."""
    result: Result | None = summary.metrics.get(method)
    if result is None:
        return None
    return result.held_out if place == HELD_OUT else result.per_site.get(place)


def metric(method: str, place: str, name: str) -> Value:
    """A metric in percent."""

    def value(summary: Summary) -> float | None:
        found = scores(summary, method, place)
        share: float | None = getattr(found, name) if found is not None else None
        return None if share is None else 100 * share

    return value


def balanced(method: str, place: str) -> Value:
    """Balanced accuracy in percent."""
    return metric(method, place, "balanced_accuracy")


def recall(places: Sequence[str], index: int) -> Value:
    """Share of a class's images that the federated adapter finds, in percent, over some places together."""

    def value(summary: Summary) -> float | None:
        found = [scores(summary, "federated", place) for place in places]
        rows = [one.confusion_matrix[index] for one in found if one is not None and one.confusion_matrix is not None]
        total = sum(sum(row) for row in rows)
        return 100 * sum(row[index] for row in rows) / total if total else None

    return value


def validation(number: int, site: str | None = None) -> Value:
    """A round's validation in percent: correct images of all sites, or balanced accuracy at one."""

    def value(summary: Summary) -> float | None:
        for entry in summary.rounds:
            if entry.round == number:
                share = entry.validation if site is None else entry.val_balanced_accuracy.get(site)
                return None if share is None else 100 * share
        return None

    return value


def seconds(summary: Summary) -> float | None:
    """Mean seconds of a round."""
    mean = mean_of(entry.seconds for entry in summary.rounds)
    return None if mean is None else mean.value


def sent(summary: Summary) -> float | None:
    """Bytes that one site sends a round."""
    mean = mean_of(entry.bytes_up / entry.sites_in for entry in summary.rounds if entry.sites_in)
    return None if mean is None else mean.value


def received(summary: Summary) -> float | None:
    """Bytes that one site receives a round: the record; None if the summary does not say how many receive it."""
    receivers = receivers_of(summary)
    mean = mean_of(entry.bytes_down / receivers for entry in summary.rounds) if receivers else None
    return None if mean is None else mean.value


def receivers_of(summary: Summary) -> int | None:
    """Sites that receive a record: all that train and all that observe; None if the summary does not say."""
    return None if summary.observers is None else len(summary.sites) + len(summary.observers)


def as_float32(summary: Summary) -> float | None:
    """Bytes of an update as it is: four a trained value."""
    return None if summary.values is None else 4.0 * summary.values


def confusion(group: Group, place: str) -> list[list[float]] | None:
    """A place's confusion matrix, rows true, summed over the seeds."""
    found = [
        one.confusion_matrix
        for summary in group.summaries
        if (one := scores(summary, "federated", place)) is not None and one.confusion_matrix is not None
    ]
    if len({len(matrix) for matrix in found}) != 1 or not any(any(row) for matrix in found for row in matrix):
        return None
    return [[sum(cells) for cells in zip(*rows, strict=True)] for rows in zip(*found, strict=True)]


def _tested(summary: Summary) -> list[str]:
    return list(dict.fromkeys(site for result in summary.metrics.values() for site in result.per_site))


def _of_one_site(summary: Summary) -> bool:
    """Whether a summary is what one site of several holds."""
    return len(_tested(summary)) == 1 < len(summary.sites)


def _without_epsilon(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key != "epsilon"}

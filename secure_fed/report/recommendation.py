"""What to choose of a sweep: settings compared over their seeds, and the cheapest that are as good as the best."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from secure_fed.lab.sweep import Finished, Sweep
from secure_fed.lab.sweep_file import Settings, in_words


@dataclass(frozen=True)
class Score:
    """Balanced accuracy of the federated adapter over seeds, in [0, 1].

    Attributes:
        mean: over seeds.
        error: standard error of the mean, s / sqrt(n); None with one seed.
    """

    mean: float
    error: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Score | None:
        """Of one value a seed; None without any."""
        if not values:
            return None
        error = float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else None
        return cls(float(np.mean(values)), error)

    def __str__(self) -> str:
        """In percent."""
        return f"{100 * self.mean:.1f}" + ("" if self.error is None else f" ± {100 * self.error:.1f}")


@dataclass(frozen=True)
class Compared:
    """One combination of settings, over its seeds.

    Attributes:
        settings: without ``seed``.
        seeds: those done.
        sites: mean over the training sites, each on its own test images; None if no site has any.
        held_out: on the observers' images, none of which trained; None without observers.
        bytes: sent up and down in a whole run, mean over seeds.
        seconds: of a whole run, mean over seeds.
    """

    settings: Settings
    seeds: tuple[int, ...]
    sites: Score | None
    held_out: Score | None
    bytes: float
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """All of it, under its names."""
        return asdict(self)


@dataclass(frozen=True)
class Recommendation:
    """What to choose at one epsilon.

    Attributes:
        epsilon: None without differential privacy.
        best: with the highest mean over the training sites.
        chosen: the cheapest whose mean is at most one standard error of the best's below it.
        words: for a data-protection assessment.
    """

    epsilon: float | None
    best: Compared
    chosen: Compared
    words: str


def compare(trials: Iterable[Finished]) -> list[Compared]:
    """Done trials by settings, in their order, each over its seeds."""
    groups: dict[str, list[Finished]] = {}
    for trial in trials:
        if trial.summary is not None:
            groups.setdefault(json.dumps(_without_seed(trial.settings), sort_keys=True), []).append(trial)
    return [_compared(group) for group in groups.values()]


def _compared(group: Sequence[Finished]) -> Compared:
    summaries = [trial.summary for trial in group if trial.summary is not None]
    federated = [summary.metrics.federated for summary in summaries]
    per_site = [[scores.balanced_accuracy for scores in result.per_site.values()] for result in federated]
    sites = [float(np.mean(known)) for values in per_site if (known := [v for v in values if v is not None])]
    held_out = [result.held_out.balanced_accuracy for result in federated]
    sent = [sum(entry.bytes_up + entry.bytes_down for entry in summary.rounds) for summary in summaries]
    return Compared(
        _without_seed(group[0].settings),
        tuple(trial.settings["seed"] for trial in group),
        Score.of(sites),
        Score.of([value for value in held_out if value is not None]),
        float(np.mean(sent)),
        float(np.mean([trial.seconds for trial in group])),
    )


def _without_seed(settings: Settings) -> Settings:
    return {name: value for name, value in settings.items() if name != "seed"}


def recommend(sweep: Sweep) -> list[Recommendation]:
    """For each epsilon, smallest first and none last, the cheapest setting within one standard error of the best.

    Cost is bytes, then seconds. With one seed there is no standard error, and the best itself is taken. Data are given,
    not chosen: where a sweep varies them (``simulation.``), there is one choice for each.
    """
    groups: dict[tuple[float | None, str], list[Compared]] = {}
    for entry in compare(sweep.trials):
        if entry.sites is not None:
            data = {name: value for name, value in entry.settings.items() if name.startswith("simulation.")}
            groups.setdefault((entry.settings["epsilon"], json.dumps(data, sort_keys=True)), []).append(entry)
    found = []
    for (epsilon, _), here in sorted(groups.items(), key=lambda group: (group[0][0] is None, group[0][0] or 0.0)):
        best = max(here, key=_mean)
        assert best.sites is not None  # filtered above
        near = [entry for entry in here if _mean(entry) >= best.sites.mean - (best.sites.error or 0.0)]
        chosen = min(near, key=lambda entry: (entry.bytes, entry.seconds))
        found.append(Recommendation(epsilon, best, chosen, _assessment(sweep.facts, epsilon, best, chosen, len(here))))
    return found


def _mean(entry: Compared) -> float:
    return -1.0 if entry.sites is None else entry.sites.mean


def _assessment(facts: dict[str, Any], epsilon: float | None, best: Compared, chosen: Compared, tried: int) -> str:
    """The choice in words that a data-protection assessment can take over."""
    settings = {name: value for name, value in chosen.settings.items() if name in facts["axes"] and name != "epsilon"}
    what = f"the settings {in_words(settings)} of study {facts['study']}" if settings else f"study {facts['study']}"
    if epsilon is None:
        claim = (
            "These settings train without differential privacy: encryption hides single updates from the server, but "
            "nothing bounds what the finished adapter tells about a patient."
        )
    else:
        delta = chosen.settings.get("delta", facts["facts"]["delta"])
        claim = (
            f"With a privacy budget of epsilon = {epsilon:g} and delta = {delta:g} at each site, everything that "
            f"leaves the site is (epsilon, delta)-differentially private with respect to adding or removing any one "
            f"{facts['unit']} of that site, over the lifetime of its privacy ledger, assuming correct code and the "
            "operating system's randomness, whatever the server, the other sites or outsiders do. Excluded: the "
            "declared number of patients, participation, configuration, and what is in the study's public statistics, "
            "which are of images that its makers call public and of no site's data."
        )
    seeds = len(chosen.seeds)
    over = f"mean ± standard error over {seeds} seeds" if seeds > 1 else "one seed, so without a standard error"
    least = "It is the best of them."
    if tried == 1:
        least = "No other was tried to compare it with."
    elif chosen != best:
        least = f"It is the cheapest within one standard error of the best, {best.sites} %."
    tried_on = f"tried {'without a' if epsilon is None else 'at this'} privacy budget on {facts['data_kind']} data"
    choice = f"Of {tried} settings {tried_on} we chose {what}" if tried > 1 else f"One setting was {tried_on}, {what}"
    return (
        f"{claim} {choice}: balanced accuracy {chosen.sites} % on the training sites' test images"
        + (f" and {chosen.held_out} % at sites that did not train" if chosen.held_out is not None else "")
        + f" ({over}). {least} A run sends {chosen.bytes / 1e6:.1f} MB in all. The choice was made on "
        f"{facts['data_kind']} data, so that no patient's budget was spent on it; the figures are of the same test "
        "images by which it was made, so that they are somewhat too high, and patients' data may give others."
    )

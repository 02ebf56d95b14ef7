"""Which method is advised under a privacy budget, by its size and the smallest site's: the table of docs/privacy.md."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from secure_fed.operate.folders import Folder
from secure_fed.privacy.accounting import mu_squared_of
from secure_fed.protocol.simulation_table import Shares
from secure_fed.protocol.study import Template, with_fields

DELTA = 1e-5
"""The usual one; rates for another differ by little."""

CLIP = 12.0
MOMENTUM = 0.8
FASTEST = 0.05
"""Clipping norm, momentum within a round, and the largest learning rate. A norm that cuts fewer gradients needs more
noise in a sum, and a smaller rate; together they follow the patients better, and momentum evens out the noise of four
steps."""

SIGNAL = 24_000.0
"""What patients times mu of the budget are divided by for the learning rate: so the noise of an update has about one
size at any site, and a small site walks slowly instead of at random. Chosen on phantoms of seed 11, like all here, with
their own prompts and with two of these exchanged, as prompts may say little at a hospital."""

WEAK = 100.0
"""Patients times mu of the budget below which the rate is :data:`SLOWER` times that."""
SLOWER = 0.7

SUMMED_UP: dict[str, Any] = {"rule": "fedavgm", "learning_rate": 1.0, "betas": (0.5, 0.99), "iterates": "late"}
"""What is made of averages: momentum takes the adapter further in as many rounds, where rounds agree, and a mean of the
adapters in which late ones count more loses noise without what they have learned."""

LITTLE = 20.0
"""Patients times mu of the budget below which there is next to nothing to learn."""

LARGE = 450.0
"""Patients times mu of the budget from which on twice the dimensions pay; where both are alike the fewer are taken."""

SUMMED = 32
"""Dimensions in which one sum is taken under a budget, whatever its size: docs/results/brain_mri.md."""

SUMMED_FROM = 200
"""Training patients a site from which on one sum is named beside what is advised: docs/privacy.md has both on the same
patients, and neither is the better one on all data."""

USUAL_TRAINING = 0.6
"""Share of labelled patients that train where a plan names none."""


@dataclass(frozen=True)
class Advice:
    """A row of the table.

    Attributes:
        epsilon: the budget it is for.
        patients: training patients of the smallest site that trains.
        dimensions: in which a ``text_head`` sees features, public ones; None: as the backbone gives them.
        learning_rate: of the noisy steps.
        one_sum: whether it is for a study that asks for one sum, whose method stays: then only the dimensions count.
    """

    epsilon: float
    patients: int
    dimensions: int | None
    learning_rate: float
    one_sum: bool = False

    @property
    def tables(self) -> dict[str, dict[str, Any]]:
        """The tables of a study that say it."""
        basis: dict[str, Any] = {
            "basis": "random" if self.dimensions is None else "public",
            "dimensions": self.dimensions or SUMMED,
        }
        if self.one_sum:
            return {"features": basis}
        tables: dict[str, dict[str, Any]] = {
            "method": {"adapter": "text_head", "loss": "class_prompt"},
            "aggregation": SUMMED_UP,
            "privacy": {"clip": CLIP, "momentum": MOMENTUM, "learning_rate": self.learning_rate},
        }
        if self.dimensions is not None:
            tables["features"] = basis
        return tables

    @property
    def words(self) -> str:
        """What is advised, for whom and why, in one sentence or two."""
        if self.one_sum:
            kind, size = self.tables["features"].values()
            text = (
                f"class statistics in one sum, in {size} {kind} dimensions, advised at epsilon {self.epsilon:g}: the "
                "fewer values, the less noise (docs/results/brain_mri.md)"
            )
            return text + ("" if kind == "public" else "; with study new --public it gains")
        seen = "as the backbone sees" if self.dimensions is None else f"in {self.dimensions} public dimensions"
        text = (
            f"text_head {seen}, learning rate {self.learning_rate:g}, momentum in the sum, and the mean of the "
            f"adapters, late ones counting more, advised at epsilon {self.epsilon:g} for about {self.patients} "
            "training patients at the smallest site: fewer values, small steps and averaging leave less noise "
            "(docs/privacy.md)"
        )
        if self.dimensions is None:
            text += "; there are no statistics of public images for this backbone: with study new --public it gains"
        elif self.patients >= SUMMED_FROM:
            text += (
                '; where prompts alone say little, a study of one sum (adapter = "gaussian_head") may give more under '
                "a budget; where they say much, it gives less"
            )
        if _signal(self.epsilon, self.patients) < LITTLE:
            text += "; at this size noise leaves little to learn: take a larger epsilon, or only observe"
        return text


def advise(epsilon: float, patients: int, *, public: bool, one_sum: bool = False) -> Advice:
    """The row of the table for a budget and a size.

    Args:
        epsilon: that each site has for its ledger's life, above 0.
        patients: training patients of the smallest site that trains, a public round figure.
        public: whether there are statistics of public images for the backbone.
        one_sum: whether the study asks for one sum.
    """
    signal = _signal(epsilon, patients)
    rate = min(FASTEST, signal / SIGNAL * (1 if signal >= WEAK else SLOWER))
    dimensions = SUMMED if one_sum else 64 if signal >= LARGE else 32
    return Advice(epsilon, patients, dimensions if public else None, float(f"{rate:.2g}"), one_sum)


def _signal(epsilon: float, patients: int) -> float:
    """Patients times mu of the budget: the inverse of the noise on a mean of all of them, in units of one."""
    return patients * math.sqrt(mu_squared_of(epsilon, DELTA))


def smallest(folders: Sequence[Folder], shares: Shares | None) -> int:
    """Training patients of the folder that has fewest, as near as can be told.

    Args:
        folders: one a site that trains.
        shares: how those are split whose manifests do not say so.
    """
    share = USUAL_TRAINING if shares is None else shares.train
    return min(
        len({image.patient for image in folder.images if image.label is not None and image.split == "train"})
        if folder.has_splits
        else round(share * len({patient for _, patient in folder.labelled}))
        for folder in folders
    )


def as_advised(template: Template, advice: Advice) -> Template:
    """The template with the method, basis, averaging and rate that are advised, whatever it said of these.

    Bounds of single tensors go, since these are another adapter's; the value bound stays.

    Raises:
        StudyError: the template does not hold together with them.
    """
    tables = advice.tables
    if advice.one_sum:
        return with_fields(template, features=tables["features"])
    aggregation = template.aggregation.model_dump(mode="json") | tables["aggregation"]
    encoding = template.encoding.model_dump(mode="json", exclude_none=True) | {"value_bounds": {}}
    return with_fields(
        template,
        method=tables["method"],
        features=tables.get("features", {}),
        aggregation=aggregation,
        privacy=template.privacy.model_dump(mode="json") | tables["privacy"],
        encoding=encoding,
    )

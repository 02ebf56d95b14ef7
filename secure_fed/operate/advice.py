"""Which method is advised under a privacy budget, by its size and the smallest site's: the table of docs/privacy.md."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from secure_fed.operate.folders import Folder
from secure_fed.protocol.study import Shares, Template, with_fields

SMALL = 200
"""Training patients a site below which only a large budget leaves anything to learn."""

LARGE = 600
"""Training patients a site from which on a large budget pays for twice the dimensions."""

LARGE_EPSILON = 8.0
"""Budget that the table calls large."""

USUAL_TRAINING = 0.6
"""Share of labelled patients that train where a plan names none."""


@dataclass(frozen=True)
class Advice:
    """A row of the table.

    Attributes:
        epsilon: the budget it is for.
        patients: training patients of the smallest site that trains.
        dimensions: in which a ``text_head`` sees features, public ones; None: as the backbone gives them.
    """

    epsilon: float
    patients: int
    dimensions: int | None

    @property
    def tables(self) -> dict[str, dict[str, Any]]:
        """The tables of a study that say it."""
        tables: dict[str, dict[str, Any]] = {
            "method": {"adapter": "text_head", "loss": "class_prompt"},
            "aggregation": {"iterates": "mean"},
        }
        if self.dimensions is not None:
            tables["features"] = {"basis": "public", "dimensions": self.dimensions}
        return tables

    @property
    def words(self) -> str:
        """What is advised, for whom and why, in one sentence or two."""
        seen = "as the backbone sees" if self.dimensions is None else f"in {self.dimensions} public dimensions"
        text = (
            f"text_head {seen} and the mean of the adapters, advised at epsilon {self.epsilon:g} for about "
            f"{self.patients} training patients at the smallest site: fewer values and averaging leave less noise "
            "(docs/privacy.md)"
        )
        if self.dimensions is None:
            text += "; there are no statistics of public images for this backbone: with study new --public it gains"
        if self.patients < SMALL and self.epsilon < LARGE_EPSILON:
            text += f"; at this size noise costs five points and more: take epsilon {LARGE_EPSILON:g}, or only observe"
        return text


def advise(epsilon: float, patients: int, *, public: bool) -> Advice:
    """The row of the table for a budget and a size.

    Args:
        epsilon: that each site has for its ledger's life, above 0.
        patients: training patients of the smallest site that trains, a public round figure.
        public: whether there are statistics of public images for the backbone.
    """
    if not public:
        return Advice(epsilon, patients, None)
    return Advice(epsilon, patients, 64 if patients >= LARGE and epsilon >= LARGE_EPSILON else 32)


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
    """The template with the method, basis and averaging that are advised, whatever it said of these.

    Bounds of single tensors go, since these are another adapter's; the value bound stays.

    Raises:
        StudyError: the template does not hold together with them.
    """
    tables = advice.tables
    aggregation = template.aggregation.model_dump(mode="json") | tables["aggregation"]
    encoding = template.encoding.model_dump(mode="json", exclude_none=True) | {"value_bounds": {}}
    return with_fields(
        template,
        method=tables["method"],
        features=tables.get("features", {}),
        aggregation=aggregation,
        encoding=encoding,
    )

"""Metrics by name, in files and for people: the one table of them. Loads nothing that computes."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator

from secure_fed.core.tomlfile import FileModel

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
# What is computed comes as lists.
Interval = Annotated[tuple[Share, Share], Field(strict=False)]
Matrix = Annotated[tuple[Annotated[tuple[Count, ...], Field(strict=False)], ...], Field(strict=False)]


class Scores(FileModel):
    """Metrics of one adapter, or their means over several, on one set of test images.

    Their definitions are with :func:`secure_fed.model.evaluation.metrics`. None is what is undefined on these images,
    or was not computed.

    Attributes:
        confusion_matrix: images by true class (row) and prediction (column); None of several adapters.
        intervals: [low, high] of the metrics in [0, 1]; None of several adapters.
        images: tested on.
        patients: whose they are.
    """

    balanced_accuracy: Annotated[Share | None, Field(title="balanced accuracy")] = None
    accuracy: Annotated[Share | None, Field(title="accuracy")] = None
    macro_f1: Annotated[Share | None, Field(title="macro-F1")] = None
    auroc: Annotated[Share | None, Field(title="AUROC")] = None
    sensitivity_at_95_specificity: Annotated[Share | None, Field(title="sensitivity at 95 % specificity")] = None
    expected_calibration_error: Annotated[Share | None, Field(title="calibration error")] = None
    confusion_matrix: Matrix | None = None
    intervals: dict[str, Interval | None] | None = None
    images: Count | None = None
    patients: Count | None = None

    @field_validator("confusion_matrix")
    @classmethod
    def _square(cls, rows: Matrix | None) -> Matrix | None:
        if rows is not None and any(len(row) != len(rows) for row in rows):
            raise ValueError("expected as many columns as rows, one a class")
        return rows

    def ranking_alone(self) -> Scores:
        """The figures that need no threshold: AUROC and sensitivity at 95 % specificity."""
        kept = ("auroc", "sensitivity_at_95_specificity")
        intervals = None if self.intervals is None else {name: self.intervals[name] for name in kept}
        return Scores(
            **{name: getattr(self, name) for name in kept},
            intervals=intervals,
            images=self.images,
            patients=self.patients,
        )


SCALARS = {name: field.title for name, field in Scores.model_fields.items() if field.title}
"""Metrics in [0, 1] that have an interval, with what people call them."""

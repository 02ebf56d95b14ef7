"""``summary.json``: what a study, or one site of it, has reached, as a file that says its kind and its format.

``simulate``, ``demo`` and the trials of a sweep leave a :class:`StudySummary`, a site of a deployment a
:class:`SiteSummary`. What reads or writes one does so here. Version 0.1 wrote both without kind and format, which is
told apart here and nowhere else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import Field

from secure_fed.core.errors import SummaryError
from secure_fed.core.storage import write_durable
from secure_fed.core.tomlfile import FileModel, parse_table
from secure_fed.model.scores import Count, Scores, Share

FORMAT: Final = 2

RoundNumber = Annotated[int, Field(ge=1)]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Amount = Annotated[float, Field(ge=0)]


class Result(FileModel):
    """One method's adapter on test images.

    Attributes:
        per_site: by training site, on its own images.
        held_out: on those of all observers together, who trained nothing; without observers there is nothing in it.
    """

    per_site: dict[str, Scores]
    held_out: Scores = Scores()


class LocalResult(Result):
    """The adapters that each site trained alone.

    Attributes:
        held_out: the mean over these adapters.
        held_out_per_site: each of them, by the site that trained it.
    """

    held_out_per_site: dict[str, Scores]


class Comparison(FileModel):
    """What may be compared, from what knows least of the sites' images to what knows most.

    Attributes:
        zero_shot: the backbone and the prompts, untrained.
        text_head: a text head trained at each site alone; not in a study of anomalies.
        local_only: the study's own method, trained at each site alone.
        pooled: the study's own method, trained on all sites' images in one place, which only a simulation can. Of a
            study of anomalies the distance to the nearest of all normal training patches.
        one_sum: a head of class statistics from one secure sum, over the same sites; the demo adds it.
        mahalanobis: of a study of anomalies: the distance by mean and covariance that one sum gives.
        federated: the study itself.
    """

    zero_shot: Annotated[Result, Field(title="zero-shot")]
    text_head: Annotated[LocalResult | None, Field(title="text head, local")] = None
    local_only: Annotated[LocalResult, Field(title="local only")]
    one_sum: Annotated[Result | None, Field(title="one sum")] = None
    mahalanobis: Annotated[Result | None, Field(title="one sum, Mahalanobis")] = None
    pooled: Annotated[Result, Field(title="pooled")]
    federated: Annotated[Result, Field(title="federated")]


METHODS = {name: str(field.title) for name, field in Comparison.model_fields.items()}
"""What is compared, in the order of :class:`Comparison`, with what people call it."""


class Round(FileModel):
    """One round.

    Attributes:
        round: from 1.
        sites_in: how many contributed.
        bytes_up: of all accepted envelopes together.
        bytes_down: of the record, times all sites that receive it.
        seconds: from the round's opening to its record.
        validation: share of correct validation images, over all sites, of the adapter that the round trained on; None
            if no site shares any.
        val_balanced_accuracy: by training site, on its own validation images, of the adapter after the round; None of
            sites with a privacy budget, which has not paid for it.
    """

    round: RoundNumber
    sites_in: Count
    bytes_up: Count
    bytes_down: Count
    seconds: Amount
    validation: Share | None = None
    val_balanced_accuracy: dict[str, Share | None] = Field(default_factory=dict)


class Spent(FileModel):
    """What one site's privacy ledger says.

    Attributes:
        epsilon_spent: so far.
        epsilon_budget: that may be spent.
        delta: of both.
        unit: whose addition or removal is protected.
        simulated: whether the data are public or simulated, so that nobody's privacy is at stake.
    """

    epsilon_spent: Amount
    epsilon_budget: Amount
    delta: Share
    unit: Literal["patient", "image"]
    simulated: bool

    @classmethod
    def of(cls, ledger: Mapping[str, Any]) -> Spent:
        """Of :meth:`secure_fed.privacy.ledger.Ledger.summary`."""
        return cls(**{name: ledger[name] for name in cls.model_fields})


class BackboneFacts(FileModel):
    """Which backbone a study stands on.

    Attributes:
        model: its name.
        digest: of its weights.
    """

    model: str
    digest: Digest | None


class CaseFigures(FileModel):
    """How a head's sets of classes and its flag of strangers fare on test images.

    Attributes:
        coverage: share of images whose set holds their class.
        coverage_by_class: likewise of each class's images.
        set_size: mean number of classes in a set.
        strangers: share of images that are flagged; None if no image can be.
        images: tested on.
    """

    coverage: Share
    coverage_by_class: dict[str, Share]
    set_size: Amount
    strangers: Share | None
    images: Count


class PooledValidation(FileModel):
    """All sites' patients together, under a head that does not know them; no single site's figure is known.

    From summed histograms: patients of the validation, and of the training without their own part of the sums.

    Attributes:
        patients: how many.
        accuracy, balanced_accuracy, auroc, expected_calibration_error: as far as the histograms' bins resolve them.
    """

    patients: Amount
    accuracy: Share
    balanced_accuracy: Share
    auroc: Share | None
    expected_calibration_error: Share


class OneSum(FileModel):
    """A head of one sum.

    Attributes:
        shrinkage: that the pooled validation chose, or that the study declares.
        patients: in the sum, by class; noisy under privacy budgets.
        left_out: classes with too few of them.
        spectrum: standard deviations of the covariance within classes, in the study's basis, by rank from 1.
        noise_floor: likewise the least one that the noise of budgets leaves meaningful; 0 without any.
        validation: pooled figures; None without histograms.
        promised: chance that a set holds its case's class; None if nothing is claimed.
        per_site: sets and flags on each site's own test images.
        held_out: likewise on the observers'.
    """

    shrinkage: Share
    patients: dict[str, Amount]
    left_out: tuple[str, ...]
    spectrum: dict[int, Amount]
    noise_floor: Amount
    validation: PooledValidation | None = None
    promised: Share | None = None
    per_site: dict[str, CaseFigures | None] = Field(default_factory=dict)
    held_out: CaseFigures | None = None


class ScoresAt(FileModel):
    """Scores of anomalies on one set of test images.

    Attributes:
        normal, anomalous: images by bin of their score, ``bins`` equal parts from 0 to 2.
        flagged_normal, flagged_anomalous: share of patients with such images one of whose is flagged; None without any.
        roc: false and true positive rate by threshold, from (0, 0) to (1, 1); empty if undefined.
        normal_map, anomalous_map: means over the images of the heat map, by rows of places; empty of fewer patients
            than the study makes a centroid of, of whom a mean would tell too much, and of maps of one place.
    """

    normal: tuple[Count, ...]
    anomalous: tuple[Count, ...]
    flagged_normal: Share | None
    flagged_anomalous: Share | None
    roc: tuple[tuple[Share, Share], ...] = ()
    normal_map: tuple[tuple[Amount, ...], ...] = ()
    anomalous_map: tuple[tuple[Amount, ...], ...] = ()


class Places(FileModel):
    """How heat maps find lesions whose masks are there, over all pixels of test images that show one.

    Pictures of more than 256 pixels a side are judged at that size.

    Attributes:
        pixel_auroc: lesion against all other pixels.
        pro: area under the mean share of a lesion that is found, over false positive rates up to 0.3, scaled to 1.
        constant_pixel_auroc: of the same map for every image: how often a training image has a lesion there. What
            places alone tell.
        equal_place_auroc: mean over places of lesion against other brain pixels at the same place; 0.5 for any constant
            map.
        images: with a lesion.
    """

    pixel_auroc: Share
    pro: Share
    constant_pixel_auroc: Share | None
    equal_place_auroc: Share | None
    images: Count


class AnomalyFigures(FileModel):
    """A memory of normal images.

    Attributes:
        threshold: score from which on an image is flagged; None if there is none.
        false_alarms: share of normal patients of whom an image may be flagged: the study's.
        patients: normal ones that the threshold is made of.
        per_site: scores on each site's own test images.
        held_out: likewise on the observers'.
        places: of heat maps, where masks are there: of all training sites' test images, and held out.
    """

    threshold: Amount | None
    false_alarms: Share
    patients: Amount
    per_site: dict[str, ScoresAt] = Field(default_factory=dict)
    held_out: ScoresAt | None = None
    places: dict[str, Places] = Field(default_factory=dict)


class StudySummary(FileModel):
    """A whole study, on public or simulated data.

    Attributes:
        kind: tells it from a site's.
        format: of the file.
        study_id: of the study.
        backbone: it stands on.
        method: the adapter that the study trains.
        device: where each site computed.
        mode: of the study.
        seed: of the study.
        sites: those that train, in the study's order.
        observers: those that do not; None of early builds of version 0.1, which did not say.
        values: that are trained; None likewise.
        adapter_digest: of the adapter that all sites hold.
        rounds: all of them.
        metrics: on test images.
        seconds_total: that the study took.
        privacy: by site that has a ledger.
        one_sum: of a study of one sum.
        anomaly: of a study of anomalies.
    """

    kind: Literal["study"]
    format: Literal[2]
    study_id: Digest
    backbone: BackboneFacts
    method: str
    device: dict[str, str] = Field(default_factory=dict)
    mode: Literal["he", "plain"]
    seed: int
    sites: tuple[str, ...]
    observers: tuple[str, ...] | None = None
    values: Annotated[int, Field(ge=1)] | None = None
    adapter_digest: Digest
    rounds: tuple[Round, ...]
    metrics: Comparison
    seconds_total: Amount
    privacy: dict[str, Spent] = Field(default_factory=dict)
    one_sum: OneSum | None = None
    anomaly: AnomalyFigures | None = None

    def content(self) -> dict[str, Any]:
        """What is in the file; ``privacy`` only where a site has a ledger, ``one_sum`` only of such a study."""
        absent = {name for name in ("privacy", "one_sum", "anomaly") if not getattr(self, name)}
        shown = self.model_dump(mode="json", exclude=absent)
        shown["metrics"] = {name: found for name, found in shown["metrics"].items() if found is not None}
        return shown


class SiteMetrics(FileModel):
    """On one site's own test images.

    Attributes:
        zero_shot: the backbone and the prompts, untrained.
        federated: the adapter after the last round, with the site's private head if it has one.
    """

    zero_shot: Scores
    federated: Scores


class SiteSummary(FileModel):
    """What one site of a deployment holds, for its own eyes.

    Attributes:
        kind: tells it from a study's.
        format: of the file.
        study_id: of the study.
        site: whose it is.
        run: of the study.
        round: the last one that it has applied.
        rounds: that the study has.
        device: where it computes.
        adapter_digest: of the adapter after that round.
        validations: by round of this run, as :attr:`Round.validation`; None or absent where the site knows none.
        metrics: on its test images.
        one_sum: of a study of one sum, with this site's own test images alone.
        anomaly: of a study of anomalies, likewise.
        local: why the file must not leave the site, if no privacy budget has paid for what is in it; else empty.
    """

    kind: Literal["site"]
    format: Literal[2]
    study_id: Digest
    site: str
    run: str
    round: RoundNumber
    rounds: RoundNumber
    device: str = ""
    adapter_digest: Digest
    validations: dict[RoundNumber, Share | None] = Field(default_factory=dict)
    metrics: SiteMetrics
    one_sum: OneSum | None = None
    anomaly: AnomalyFigures | None = None
    local: str = ""

    def content(self) -> dict[str, Any]:
        """What is in the file; ``one_sum`` and ``anomaly`` only of such studies, ``local`` only with a reason."""
        without = {name for name in ("one_sum", "anomaly", "local") if not getattr(self, name)}
        return self.model_dump(mode="json", exclude=without)


Summary = TypeVar("Summary", StudySummary, SiteSummary)


def write_summary(path: Path, summary: StudySummary | SiteSummary) -> None:
    """Write a summary durably.

    Raises:
        StorageError: it cannot be written.
    """
    write_durable(path, (json.dumps(summary.content(), indent=2) + "\n").encode())


def read_summary(path: Path, kind: type[Summary]) -> Summary:
    """Read a summary of this kind, also one that version 0.1 wrote.

    Raises:
        SummaryError: it cannot be read, is of another kind or of a newer format, or is malformed; with each field.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SummaryError(
            f"{path}: cannot be read ({error}); expected the results that secfacmic writes there after a study or round"
        ) from error
    return parse_summary(content, kind, str(path))


def parse_summary(content: Any, kind: type[Summary], where: str) -> Summary:
    """A summary from parsed JSON.

    Args:
        content: of the file.
        kind: expected.
        where: the file, for messages.

    Raises:
        SummaryError: as :func:`read_summary`.
    """
    if not isinstance(content, dict):
        raise SummaryError(f"{where}: no JSON object; expected results as secfacmic writes them")
    if "kind" not in content and "format" not in content:
        content = _from_version_0_1(content)
    found = content.get("format")
    if isinstance(found, int) and found > FORMAT:
        raise SummaryError(
            f"{where}: found format {found}, expected {FORMAT}: it was written by a newer version of secfacmic; read "
            "it with that version"
        )
    return parse_table(content, kind, SummaryError, where)


def _from_version_0_1(content: dict[str, Any]) -> dict[str, Any]:
    """The same in today's format: 0.1 had the same keys, and said neither kind nor format."""
    return {"kind": "site" if "site" in content else "study", "format": FORMAT} | content

"""``summary.json``: what is written is read, what version 0.1 wrote too, and anything else is refused by its field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from secure_fed.core.errors import SummaryError
from secure_fed.model.evaluation import mean, metrics
from secure_fed.model.scores import SCALARS, Scores
from secure_fed.operate.summary import (
    METHODS,
    SiteSummary,
    Spent,
    StudySummary,
    parse_summary,
    read_summary,
    write_summary,
)

Kind = type[StudySummary] | type[SiteSummary]
KINDS: dict[str, Kind] = {"study": StudySummary, "site": SiteSummary}

VERSION_0_1 = Path(__file__).parent / "version-0.1"
"""What version 0.1 wrote: ``study.json`` of a simulation whose sites have a budget, ``site.json`` of a site."""


def written(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((VERSION_0_1 / f"{name}.json").read_text())
    return content


def today(name: str) -> dict[str, Any]:
    return {"kind": name, "format": 2} | written(name)


@pytest.mark.parametrize("name", KINDS)
def test_what_version_0_1_wrote_is_read_and_written_again_with_kind_and_format(name: str, tmp_path: Path) -> None:
    summary = read_summary(VERSION_0_1 / f"{name}.json", KINDS[name])
    write_summary(tmp_path / "summary.json", summary)
    assert json.loads((tmp_path / "summary.json").read_text()) == today(name) == summary.content()
    assert read_summary(tmp_path / "summary.json", KINDS[name]) == summary


def test_what_version_0_1_wrote_of_a_study_says_the_same() -> None:
    content, summary = written("study"), read_summary(VERSION_0_1 / "study.json", StudySummary)
    assert summary.mode == content["mode"] == "plain"
    assert (summary.sites, summary.observers) == (("ash", "birch"), ("dogwood",))
    assert (
        summary.metrics.federated.per_site["ash"].accuracy
        == content["metrics"]["federated"]["per_site"]["ash"]["accuracy"]
    )
    assert summary.metrics.local_only.held_out_per_site["birch"].images == 29
    assert [entry.bytes_up for entry in summary.rounds] == [entry["bytes_up"] for entry in content["rounds"]]
    assert summary.rounds[0].sites_in == 2
    assert summary.privacy["ash"] == Spent.of(content["privacy"]["ash"] | {"head": "and all else that a ledger says"})


def test_what_version_0_1_wrote_of_a_site_says_the_same() -> None:
    content, summary = written("site"), read_summary(VERSION_0_1 / "site.json", SiteSummary)
    assert (summary.site, summary.run, summary.round, summary.rounds) == ("ash", content["run"], 2, 3)
    assert summary.validations == {int(number): share for number, share in content["validations"].items()}
    assert list(summary.validations) == [1, 2]
    assert summary.metrics.zero_shot.confusion_matrix is not None
    assert summary.metrics.federated.balanced_accuracy == content["metrics"]["federated"]["balanced_accuracy"]


def test_a_study_without_budgets_has_no_table_of_them() -> None:
    content = today("study")
    del content["privacy"]
    summary = parse_summary(content, StudySummary, "summary.json")
    assert summary.privacy == {}
    assert summary.content() == content


@pytest.mark.parametrize("name", KINDS)
def test_a_newer_format_is_refused_with_both_versions(name: str) -> None:
    newer = today(name) | {"format": 3, "what 3 may add": 1}
    with pytest.raises(SummaryError, match=r"^state/summary\.json: found format 3, expected 2: .* newer version"):
        parse_summary(newer, KINDS[name], "state/summary.json")


@pytest.mark.parametrize(("name", "other"), [("study", "site"), ("site", "study")])
@pytest.mark.parametrize("make", [written, today])
def test_a_summary_of_the_other_kind_is_refused(name: str, other: str, make: Any) -> None:
    with pytest.raises(SummaryError, match=f"kind = '{name}': expected '{other}'"):
        parse_summary(make(name), KINDS[other], "summary.json")


def changed(content: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    *way, last = path.split(".")
    place: Any = content
    for key in way:
        place = place[int(key)] if isinstance(place, list) else place[key]
    place[last] = value
    return content


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("study", "format", 1),
        ("study", "format", "2"),
        ("study", "seed", "0"),
        ("study", "mode", "clear"),
        ("study", "adapter_digest", "ab"),
        ("study", "surprise", 1),
        ("study", "rounds.0.sites_in", -1),
        ("study", "rounds.0.bytes_up", 1.5),
        ("study", "rounds.0.seconds", float("nan")),
        ("study", "metrics.federated", None),
        ("study", "metrics.local_only.held_out_per_site", 3),
        ("study", "metrics.federated.per_site.ash.accuracy", 1.01),
        ("study", "metrics.pooled.held_out.auroc", float("inf")),
        ("study", "metrics.pooled.held_out.confusion_matrix", [[1, 2], [3]]),
        ("study", "metrics.pooled.held_out.intervals.accuracy", [0.5]),
        ("study", "privacy.ash.unit", "scan"),
        ("site", "round", 0),
        ("site", "validations", {"one": 0.5}),
        ("site", "metrics.zero_shot.images", "6"),
        ("site", "metrics.federated.mystery", 1),
    ],
)
def test_a_malformed_summary_is_refused_with_file_and_field(name: str, field: str, value: Any, tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    path.write_text(json.dumps(changed(today(name), field, value)))
    with pytest.raises(SummaryError) as refused:
        read_summary(path, KINDS[name])
    assert str(refused.value).startswith(f"{path}: ")
    assert field.replace(".0.", "[0].") in str(refused.value)


@pytest.mark.parametrize("key", ["kind", "format"])
def test_kind_and_format_come_together_or_not_at_all(key: str) -> None:
    content = today("study")
    del content[key]
    with pytest.raises(SummaryError, match=f"{key}: missing"):
        parse_summary(content, StudySummary, "summary.json")


@pytest.mark.parametrize("text", ["", "half of a fi", "[]", "3", "[" * 100_000, "\xff"])
def test_what_is_no_table_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    path.write_bytes(text.encode("latin-1"))
    for kind in KINDS.values():
        with pytest.raises(SummaryError, match=r"summary\.json: "):
            read_summary(path, kind)
        with pytest.raises(SummaryError, match=r"nowhere: cannot be read"):
            read_summary(tmp_path / "nowhere", kind)


def test_every_metric_that_is_computed_has_its_place_and_no_other_has() -> None:
    labels = np.array([0, 0, 1, 1])
    for found in (metrics(np.eye(2)[labels], labels), metrics(np.zeros((0, 2)), labels[:0]), mean([])):
        scores = Scores(**found)
        assert scores.model_dump(mode="json") == found
        assert (
            set(found) == set(Scores.model_fields) == {*SCALARS, "confusion_matrix", "intervals", "images", "patients"}
        )


def test_people_call_every_metric_and_method_by_another_name() -> None:
    for table in (SCALARS, METHODS):
        assert len(set(table.values())) == len(table)
        assert not any("_" in label for label in table.values())

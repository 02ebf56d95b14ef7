"""The report's groups on trials made by hand: which belong together, in which order, and what is compared."""

from __future__ import annotations

from typing import Any

import pytest

from secure_fed.model.scores import Scores
from secure_fed.operate.summary import Result
from secure_fed.report.groups import HELD_OUT, Analysis, Group, Mean, balanced, confusion, mean_of, recall, setting_text
from secure_fed.report.recommendation import Compared, Recommendation, Score
from secure_fed.report.results import Results, Summary, Trial


def summary(shares: dict[str, float], held_out: float | None = None, sites: tuple[str, ...] = ()) -> Summary:
    per_site = {site: Scores(balanced_accuracy=share) for site, share in shares.items()}
    return Summary(
        method="facmic",
        sites=sites or tuple(shares),
        metrics={"federated": Result(per_site=per_site, held_out=Scores(balanced_accuracy=held_out))},
    )


def matrix(*rows: tuple[int, ...]) -> Scores:
    return Scores(confusion_matrix=[list(row) for row in rows])


def trial(
    adapter: str = "facmic",
    epsilon: float | None = None,
    share: float = 0.8,
    *,
    found: Summary | None = None,
    failed: bool = False,
    **more: Any,
) -> Trial:
    made = None if failed else found or summary({"north": share, "east": share})
    settings = {"method.adapter": adapter, **more}
    return Trial("t", "sweep", settings, 0, epsilon, "failed" if failed else None, made, 1.0)


def analysis(*trials: Trial, **more: Any) -> Analysis:
    return Analysis(Results(trials=list(trials), **more))


def test_a_mean_has_an_error_from_two_seeds_on_and_a_bar_from_low_to_high() -> None:
    assert mean_of([None]) is None
    assert mean_of([5.0, None]) == Mean(5.0, None, 1)
    assert Mean(5.0, None, 1).ends == (None, None)
    mean = mean_of([4.0, 6.0])
    assert mean == Mean(5.0, 1.0, 2)
    assert mean.ends == (4.0, 6.0)


def test_groups_come_by_setting_as_found_then_by_epsilon_without_privacy_last() -> None:
    found = analysis(
        trial("text_head", None),
        trial("text_head", 8.0),
        trial("facmic", 3.0),
        trial("text_head", 1.0),
        trial("facmic"),
    )
    assert [(group.label, group.epsilon) for group in found.groups] == [
        ("text_head", 1.0),
        ("text_head", 8.0),
        ("text_head", None),
        ("facmic", 3.0),
        ("facmic", None),
    ]
    assert [group.style for group in found.groups] == [0, 0, 0, 1, 1]
    assert found.levels == [1.0, 3.0, 8.0, None]
    assert found.private
    assert analysis(trial(epsilon=3.0), trial(epsilon=1.0)).levels == [1.0, 3.0]


def test_trials_that_differ_in_their_seed_alone_are_one_group() -> None:
    found = analysis(trial(epsilon=1.0, share=0.7), trial(epsilon=1.0, share=0.9), trial(epsilon=1.0, failed=True))
    (group,) = found.groups
    assert group.label == "facmic"
    assert len(group.trials) == 3
    assert len(group.summaries) == 2
    assert group.mean(found.score()) == pytest.approx((80.0, 10.0, 2))


def test_the_same_setting_at_other_budgets_and_without_one() -> None:
    found = analysis(trial("facmic", 1.0), trial("facmic", 3.0, failed=True), trial("facmic"), trial("text_head"))
    spent, failed, free, other = found.groups
    assert found.like(spent) == [spent, free]  # one that failed has nothing to show
    assert found.without_privacy(spent) is free
    assert found.without_privacy(failed) is free
    assert found.without_privacy(free) is None  # it is itself
    assert found.without_privacy(other) is None
    assert found.where(spent) == "facmic, epsilon 1"
    assert found.where(free) == "facmic, without privacy"


@pytest.mark.parametrize(
    ("kinds", "name"),
    [
        ({"patients"}, "epsilon"),
        ({"simulated"}, "simulated epsilon"),
        ({"patients", "simulated"}, "simulated epsilon"),
        ({"public"}, "simulated epsilon"),
    ],
)
def test_an_epsilon_is_called_one_only_where_all_data_are_patients(kinds: set[str], name: str) -> None:
    assert analysis(trial(epsilon=1.0), kinds=kinds).epsilon == name


@pytest.mark.parametrize(
    ("key", "value", "alone", "text"),
    [
        ("method.adapter", "facmic", False, "facmic"),
        ("method", "facmic", False, "facmic"),
        ("mode", "he", False, "he"),
        ("method.norm", "layer", False, "norm layer"),
        ("method.norm", "layer", True, "layer"),
        ("rounds", 10, True, "rounds 10"),
        ("method.lmmd_weight", 0.1, False, "lmmd weight 0.1"),
        ("training.learning_rate", 5e-05, False, "learning rate 5e-05"),
        ("method.prompts", None, False, "prompts none"),
    ],
)
def test_a_setting_in_words(key: str, value: Any, alone: bool, text: str) -> None:
    assert setting_text(key, value, alone=alone) == text


def test_labels_name_what_varies_and_nothing_else() -> None:
    one = analysis(trial(rounds=5), trial(rounds=10))
    assert [group.label for group in one.groups] == ["rounds 5", "rounds 10"]
    words = analysis(trial(norm="layer"), trial(norm="batch"))
    assert [group.label for group in words.groups] == ["layer", "batch"]
    two = analysis(trial("facmic", norm="layer"), trial("text_head", norm="batch"))
    assert [group.label for group in two.groups] == ["facmic, norm layer", "text_head, norm batch"]
    assert [group.label for group in analysis(trial(), trial(epsilon=1.0)).groups] == ["facmic", "facmic"]
    assert [group.label for group in analysis(trial(failed=True)).groups] == ["this study"]


def test_whole_studies_that_differ_go_by_their_names() -> None:
    def one(name: str, **more: Any) -> Trial:
        return trial(name=name, **{key: f"{key} of {name}" for key in "abcd"}, **more)

    found = analysis(one("brain"), one("chest"), one("chest", failed=True))
    assert [group.label for group in found.groups] == ["brain facmic", "chest facmic"]


def test_the_measure_is_a_mean_over_the_sites_and_never_the_held_out_one() -> None:
    found = analysis(trial(found=summary({"north": 0.6, "east": 0.8}, held_out=0.1)))
    (group,) = found.groups
    assert group.mean(found.score()) == pytest.approx((70.0, None, 1))
    assert found.averaged
    assert found.measure == "mean balanced accuracy over the sites"
    assert found.places == ["north", "east", HELD_OUT]
    assert found.tested == ["north", "east"]
    assert group.mean(balanced("federated", HELD_OUT)) == pytest.approx((10.0, None, 1))


def test_a_site_that_trained_nothing_comes_after_those_that_did() -> None:
    found = analysis(trial(found=summary({"clinic": 0.4, "north": 0.6, "east": 0.8}, sites=("north", "east"))))
    assert found.places == ["north", "east", "clinic"]


def test_held_out_is_a_place_only_if_every_trial_was_tested_there() -> None:
    with_it = trial(found=summary({"north": 0.6, "east": 0.8}, held_out=0.7))
    assert analysis(with_it).held_out
    assert not analysis(with_it, trial("text_head")).held_out
    assert analysis(with_it, trial("text_head")).places == ["north", "east"]


def test_what_one_site_of_several_holds_is_no_part_of_a_mean_over_them() -> None:
    whole = trial(found=summary({"north": 0.6, "east": 0.8}))
    part = trial(found=summary({"north": 0.2}, sites=("north", "east")))
    both = analysis(whole, part)
    assert both.whole
    (group,) = both.groups
    assert group.mean(both.score()) == pytest.approx((70.0, None, 1))
    alone = analysis(part)
    assert not alone.whole
    assert not alone.averaged
    assert alone.measure == "balanced accuracy at north"
    assert alone.groups[0].mean(alone.score()) == pytest.approx((20.0, None, 1))
    apart = analysis(part, trial(found=summary({"east": 0.4}, sites=("north", "east"))))
    assert not apart.averaged
    assert apart.measure == "balanced accuracy at the site itself"


def recommendation(epsilon: float | None, mean: float, error: float | None, adapter: str = "facmic") -> Recommendation:
    made = Compared({"method.adapter": adapter, "epsilon": epsilon}, (0, 1), Score(mean, error), None, 1.0, 1.0)
    return Recommendation(epsilon, made, made, "")


def test_the_page_tells_of_the_least_epsilon_within_one_standard_error_of_the_best() -> None:
    found = analysis(*[trial("facmic", epsilon) for epsilon in (1.0, 3.0, 8.0, None)], trial("text_head", 3.0))
    found.recommendations = [
        recommendation(None, 0.95, 0.001),  # better, but without a budget
        recommendation(8.0, 0.90, 0.02),
        recommendation(3.0, 0.89, 0.001),
        recommendation(1.0, 0.80, 0.5),
    ]
    assert found.best is not None
    assert (found.best.label, found.best.epsilon) == ("facmic", 3.0)


def test_the_page_tells_of_the_setting_that_was_chosen() -> None:
    found = analysis(trial("facmic", 3.0), trial("text_head", 3.0))
    found.recommendations = [recommendation(3.0, 0.9, None, "text_head")]
    assert found.best is found.groups[1]


def test_without_any_budget_or_recommendation_the_page_tells_of_what_there_is() -> None:
    free = analysis(trial("facmic"), trial("text_head"))
    free.recommendations = [recommendation(None, 0.9, None, "text_head")]
    assert free.best is free.groups[1]
    failed = analysis(trial("facmic", failed=True), trial("text_head"))
    failed.recommendations = []
    assert failed.best is failed.groups[1]


def test_a_class_is_found_over_some_places_together() -> None:
    places = {"north": matrix((3, 1), (0, 4)), "east": matrix((1, 5), (2, 2))}
    one = Summary(sites=tuple(places), metrics={"federated": Result(per_site=places)})
    assert recall(["north", "east"], 0)(one) == pytest.approx(40.0)
    assert recall(["north", "east"], 1)(one) == pytest.approx(75.0)
    assert recall(["north"], 0)(one) == pytest.approx(75.0)
    assert recall(["elsewhere"], 0)(one) is None


def test_a_study_of_one_site_is_whole() -> None:
    alone = analysis(trial(found=summary({"north": 0.6}, held_out=0.5)))
    assert alone.whole
    assert alone.held_out
    assert alone.measure == "balanced accuracy at north"


def test_confusion_is_summed_over_seeds_and_only_where_the_classes_are_the_same() -> None:
    def one(scores: Scores) -> Trial:
        return trial(found=Summary(sites=("north",), metrics={"federated": Result(per_site={"north": scores})}))

    same = analysis(one(matrix((3, 1), (0, 4))), one(matrix((1, 1), (2, 2))), class_names=("healthy", "ill"))
    assert confusion(same.groups[0], "north") == [[4, 2], [2, 6]]
    assert same.class_names(same.groups) == ("healthy", "ill")
    other = analysis(one(matrix((3, 1), (0, 4))), class_names=("a", "b", "c"))
    assert other.class_names(other.groups) == ("class 0", "class 1")
    mixed = analysis(one(matrix((3, 1), (0, 4))), one(matrix((1, 0, 0), (0, 1, 0), (0, 0, 1))))
    assert confusion(mixed.groups[0], "north") is None
    assert mixed.class_names(mixed.groups) == ()
    assert analysis(trial()).class_names([Group("none", None, 0)]) == ()

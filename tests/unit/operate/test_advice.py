"""Which method belongs to which budget and size: one table, from which studies and the demo take it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from secure_fed.cli import app
from secure_fed.core.tomlfile import write_toml
from secure_fed.lab.simulation import Budget, under_budget
from secure_fed.operate.advice import advise, as_advised
from secure_fed.protocol.study import read_study_file, read_template, with_fields


@pytest.mark.parametrize(
    ("epsilon", "patients", "public", "dimensions", "rate"),
    [(8, 30, True, 32, 0.0015), (1, 200, True, 32, 0.0016), (3, 200, True, 32, 0.006), (8, 239, True, 32, 0.017),
     (1, 600, True, 32, 0.0067), (3, 600, True, 32, 0.018), (8, 600, True, 64, 0.042), (8, 900, False, None, 0.05)],
)  # fmt: skip
def test_dimensions_and_rate_follow_from_budget_and_size(
    epsilon: float, patients: int, public: bool, dimensions: int | None, rate: float
) -> None:
    advice = advise(epsilon, patients, public=public)
    assert (advice.dimensions, advice.learning_rate) == (dimensions, rate)
    assert f"epsilon {epsilon:g}" in advice.words
    assert str(patients) in advice.words
    assert ("no statistics of public images" in advice.words) != public


def test_the_mean_of_late_adapters_comes_out_after_momentum_in_the_sum() -> None:
    advice = advise(8, 400, public=True)
    rule = as_advised(read_template(Path("demo")), advice).aggregation
    assert (rule.iterates, rule.rule, rule.learning_rate, rule.betas[0]) == ("late", "fedavgm", 1.0, 0.5)
    assert "momentum in the sum, and the mean of the adapters, late ones counting more" in advice.words


def test_where_noise_leaves_nothing_to_learn_the_words_say_so() -> None:
    assert "or only observe" in advise(1, 50, public=True).words
    assert "only observe" not in advise(8, 50, public=True).words
    assert "only observe" not in advise(1, 200, public=True).words


@pytest.mark.parametrize(("patients", "public", "named"), [(199, True, False), (200, True, True), (200, False, False)])
def test_one_sum_is_named_beside_what_is_advised_where_it_may_give_more(
    patients: int, public: bool, named: bool
) -> None:
    words = advise(3, patients, public=public).words
    assert words.startswith("text_head")
    assert ("where prompts alone say little, a study of one sum" in words) == named


def test_the_advised_template_averages_and_keeps_the_rest() -> None:
    demo = read_template(Path("demo"))
    advised = as_advised(demo, advise(8.0, 30, public=True))
    assert (advised.method.adapter, advised.features.basis, advised.features.dimensions) == ("text_head", "public", 32)
    assert advised.aggregation.iterates == "late"
    assert (advised.privacy.clip, advised.privacy.momentum, advised.privacy.learning_rate) == (12.0, 0.8, 0.0015)
    assert (advised.encoding, advised.sites) == (demo.encoding, demo.sites)
    assert advised.privacy.steps == demo.privacy.steps


def test_the_demo_leaves_its_method_to_the_advice_under_a_budget_alone() -> None:
    demo = read_template(Path("demo"))
    assert under_budget(demo, None) == (demo, None)
    played, advice = under_budget(demo, Budget(8.0, 1e-5))
    assert advice is not None
    assert advice.patients == 32  # west: 70 patients, 0.75 of them labelled, 0.6 of these to train
    assert played.method.adapter == "text_head"
    own = with_fields(demo, simulation=demo.plan.model_dump(mode="json", exclude_none=True) | {"advised": False})
    assert under_budget(own, Budget(8.0, 1e-5)) == (own, None)


def test_study_new_takes_what_is_advised_and_says_where_the_basis_is_from(tmp_path: Path) -> None:
    write_toml(tmp_path / "t.toml", with_fields(read_template(Path("demo")), simulation=None))
    command = ["study", "new", str(tmp_path / "t.toml"), "--out", str(tmp_path / "out"), "--epsilon", "8"]
    assert CliRunner().invoke(app, command).exit_code == 2
    made = CliRunner().invoke(app, [*command, "--patients", "700"], catch_exceptions=False)
    assert "text_head in 64 public dimensions" in made.output
    study = read_study_file(tmp_path / "out/study.toml")
    assert (study.method.adapter, study.features.dimensions, study.features.source) == ("text_head", 64, "packaged")
    assert study.features.digest is not None
    shown = CliRunner().invoke(app, ["study", "show", str(tmp_path / "out/study.toml")]).output
    assert study.features.digest[:16] in shown


@pytest.mark.slow
def test_the_demo_under_a_budget_ends_above_zero_shot_by_its_own_defaults(tmp_path: Path) -> None:
    command = ["simulate", "demo", "--mode", "plain", "--epsilon", "8", "--out", str(tmp_path / "out")]
    said = CliRunner().invoke(app, command, catch_exceptions=False)
    assert "method: text_head in 32 public dimensions" in said.stderr
    from secure_fed.core.layout import SUMMARY
    from secure_fed.operate.summary import StudySummary, read_summary

    found = read_summary(tmp_path / "out" / SUMMARY, StudySummary).metrics
    shares = [
        [scores.balanced_accuracy for scores in result.per_site.values()]
        for result in (found.zero_shot, found.federated)
    ]
    before, after = (sum(filter(None, row)) / len(row) for row in shares)
    assert after > before + 0.03


@pytest.mark.parametrize(("public", "basis"), [(True, "public"), (False, "random")])
def test_a_study_of_one_sum_stays_one_and_gets_its_dimensions(public: bool, basis: str) -> None:
    template = read_template(Path("brain_mri_one_sum"))
    advice = advise(1.0, 200, public=public, one_sum=True)
    advised = as_advised(template, advice)
    assert (advised.features.basis, advised.features.dimensions) == (basis, 32)
    assert (advised.method, advised.rounds, advised.aggregation) == (
        template.method,
        template.rounds,
        template.aggregation,
    )
    assert f"one sum, in 32 {basis} dimensions" in advice.words
    assert ("--public it gains" in advice.words) != public


def test_study_new_keeps_one_sum_under_a_budget(secfacmic: Any, tmp_path: Path) -> None:
    made = secfacmic(
        *("study", "new", "brain_mri_one_sum", "--out", tmp_path / "out", "--epsilon", "1", "--patients", "200")
    )
    assert made.returncode == 0, made.stderr
    assert "method: class statistics in one sum, in 32 public dimensions, advised at epsilon 1" in made.stdout
    study = read_study_file(tmp_path / "out" / "study.toml")
    assert study.method.one_sum
    assert (study.features.basis, study.features.dimensions, study.encoding.precision) == ("public", 32, 18)

"""What is due while a step is open, by the rule alone: no clock, no Flower, no coordinator."""

from __future__ import annotations

import pytest

from secure_fed.server.coordinator import Step
from secure_fed.server.standing import Move, Standing

ANY = (Step.READY, Step.ACKNOWLEDGED)
COHORT = (Step.ENVELOPE, Step.CHECKED)


@pytest.mark.parametrize("step", Step)
def test_a_step_is_due_when_nobody_is_missing(step: Step) -> None:
    assert list(Standing(step, set(), late=False).moves()) == [Move.STEP]


@pytest.mark.parametrize("step", Step)
def test_nothing_is_due_while_somebody_who_is_there_is_missing(step: Step) -> None:
    assert list(Standing(step, {"ash"}, late=False).moves()) == []


@pytest.mark.parametrize("step", ANY)
def test_before_a_cohort_is_fixed_neither_the_late_nor_the_known_away_are_waited_for(step: Step) -> None:
    assert list(Standing(step, {"ash"}, late=True).moves()) == [Move.STEP]
    away = Standing(step, {"ash"}, late=False, known_away={"ash", "elm"})
    assert list(away.moves()) == [Move.STEP]
    assert list(Standing(step, {"ash", "oak"}, late=False, known_away={"ash"}).moves()) == []


def test_where_nobody_else_comes_and_sites_refuse_the_attempt_the_next_one_is_asked_for() -> None:
    """Only if the step itself cannot be taken: who refuses for ever holds up no quorum of others."""
    assert list(Standing(Step.READY, {"ash", "elm"}, late=False, refusing={"ash"}).moves()) == []
    alone = Standing(Step.READY, {"ash", "elm"}, late=False, known_away={"elm"}, refusing={"ash"})
    assert list(alone.moves()) == [Move.ANEW]
    late = Standing(Step.READY, {"ash", "elm"}, late=True, refusing={"ash"})
    assert list(late.moves()) == [Move.STEP, Move.ANEW]


@pytest.mark.parametrize("step", COHORT)
def test_a_cohort_begins_again_without_whom_it_waits_for_if_they_are_gone(step: Step) -> None:
    assert list(Standing(step, {"ash"}, late=False, away={"ash"}).moves()) == [Move.WITHOUT, Move.ANEW]
    assert list(Standing(step, {"ash", "elm"}, late=False, away={"ash"}).moves()) == []
    late = Standing(step, {"ash", "elm"}, late=True, away={"ash"})
    assert late.gone == {"ash", "elm"}
    assert list(late.moves()) == [Move.WITHOUT]


@pytest.mark.parametrize("step", COHORT)
def test_a_cohort_whose_people_leave_it_begins_again_even_if_all_answered(step: Step) -> None:
    """Tried first without them, then anew for all; if neither can be, the step itself."""
    leaving = Standing(step, set(), late=False, leaving={"ash"})
    assert list(leaving.moves()) == [Move.WITHOUT, Move.ANEW, Move.STEP]
    assert leaving.lacking == {"ash"}


@pytest.mark.parametrize("step", COHORT)
def test_who_refuses_the_cohort_counts_at_the_deadline_alone(step: Step) -> None:
    assert list(Standing(step, {"ash"}, late=False, refusing={"ash"}).moves()) == []
    assert list(Standing(step, {"ash"}, late=True, refusing={"ash"}).moves()) == [Move.WITHOUT, Move.ANEW]
    assert list(Standing(step, {"ash", "elm"}, late=True, refusing={"ash"}).moves()) == [Move.WITHOUT]
    stale = Standing(step, set(), late=True, refusing={"ash"}, all_there=False)
    assert list(stale.moves()) == [Move.ANEW], "its envelope is in, and it does not stand by it"
    assert list(Standing(step, set(), late=False, refusing={"ash"}, all_there=False).moves()) == []


@pytest.mark.parametrize("step", COHORT)
def test_a_sum_is_not_fixed_while_one_of_its_sites_is_away(step: Step) -> None:
    assert list(Standing(step, set(), late=True, all_there=False).moves()) == []
    assert list(Standing(step, set(), late=False, away={"ash"}, all_there=False).moves()) == [Move.WITHOUT]


def test_after_the_sum_is_fixed_there_is_no_other_attempt() -> None:
    assert list(Standing(Step.REVEAL, {"ash"}, late=True, away={"ash"}).moves()) == [Move.SPEAK_FOR]
    assert list(Standing(Step.REVEAL, set(), late=False, leaving={"ash"}).moves()) == [Move.SPEAK_FOR, Move.STEP]
    assert list(Standing(Step.REVEAL, set(), late=False, all_there=False).moves()) == [Move.STEP]

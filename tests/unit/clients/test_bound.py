"""What a site remembers of its REVEALs."""

from __future__ import annotations

from secure_fed.clients.bound import Bound

A, B, C = ("a" * 64, "b" * 64, "c" * 64)
FIRST, SECOND = ("ash", "birch"), ("ash", "cedar")


def test_no_cohort_and_no_sum_is_forgotten_in_a_run() -> None:
    bound = Bound()
    for state in (A, B, C):
        bound = bound.giving(state, FIRST, state)
    bound = bound.giving(B, FIRST, B)
    assert bound.given == {A: FIRST, C: FIRST, B: FIRST}
    assert list(bound.given)[-1] == B
    assert bound.upon == (A, B, C)


def test_what_is_forgiven_is_as_before_the_reveal_of_the_round_alone() -> None:
    bound = Bound().giving(A, FIRST, A)
    assert bound.forgiven().given == {}
    assert bound.forgiven().upon == ()
    assert bound.giving(B, FIRST, B).forgiven() == bound.giving(B, FIRST, B).model_copy(
        update={"given": {A: FIRST}, "upon": (A,)}
    )
    again = bound.giving(A, SECOND, A)
    assert again.given == {A: SECOND}
    assert again.forgiven().given == {A: FIRST}
    assert again.forgiven().upon == (A,)
    assert bound.model_copy(update={"before": None}).forgiven().given == {A: FIRST}

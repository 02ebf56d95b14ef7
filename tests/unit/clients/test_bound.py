"""What a site remembers of its REVEALs."""

from __future__ import annotations

from secure_fed.clients.bound import Bound
from secure_fed.protocol.envelope import EnvelopeHeader

A, B, C = ("a" * 64, "b" * 64, "c" * 64)


def sent(**ledgers: int) -> list[EnvelopeHeader]:
    """Envelopes of these sites, with how many updates their ledgers have paid for."""
    return [EnvelopeHeader.model_construct(site=site, ledger_seq=paid) for site, paid in ledgers.items()]


FIRST, SECOND = ("ash", "birch"), ("ash", "cedar")
OF_FIRST, OF_SECOND = sent(ash=0, birch=0), sent(ash=0, cedar=0)


def test_no_cohort_and_no_sum_is_forgotten_in_a_run() -> None:
    bound = Bound()
    for state in (A, B, C):
        bound = bound.giving(state, OF_FIRST, state)
    bound = bound.giving(B, OF_FIRST, B)
    assert bound.given == {A: FIRST, C: FIRST, B: FIRST}
    assert list(bound.given)[-1] == B
    assert bound.upon == (A, B, C)


def test_what_is_forgiven_is_as_before_the_reveal_of_the_round_alone() -> None:
    bound = Bound().giving(A, OF_FIRST, A)
    assert bound.forgiven().given == {}
    assert bound.forgiven().upon == ()
    assert bound.giving(B, OF_FIRST, B).forgiven() == bound.giving(B, OF_FIRST, B).model_copy(
        update={"given": {A: FIRST}, "upon": (A,)}
    )
    again = bound.giving(A, OF_SECOND, A)
    assert again.given == {A: SECOND}
    assert again.forgiven().given == {A: FIRST}
    assert again.forgiven().upon == (A,)
    assert bound.model_copy(update={"before": None}).forgiven().given == {A: FIRST}


def test_who_sent_under_a_budget_is_known_by_state_and_once_bare_is_bare() -> None:
    bound = Bound().giving(A, sent(ash=3, birch=0), A).giving(A, sent(ash=3, cedar=1), A)
    assert bound.noised == {A: ("ash", "cedar")}
    assert bound.giving(A, sent(ash=0, birch=4), A).noised == {A: ("birch", "cedar")}
    assert bound.giving(B, [], B).noised == {A: ("ash", "cedar"), B: ()}
    assert bound.giving(B, [], B).given[B] == ()

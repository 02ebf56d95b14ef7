"""What a site remembers of its REVEALs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from secure_fed.clients.bound import Bound, read_bound, write_bound
from secure_fed.protocol.envelope import EnvelopeHeader, RoundPosition
from secure_fed.protocol.records import head_after_void

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


def test_a_site_that_is_behind_its_words_is_so_until_a_round_was_sat_out() -> None:
    bound = Bound(round=1, head=A, behind=True, retired=True, arrived=B, released=C)
    after = bound.at(RoundPosition(A, B, C, 0, 2))
    assert (after.round, after.head, after.arrived) == (2, B, "")
    assert (after.behind, after.retired, after.released) == (True, True, C)


def test_a_word_that_a_round_was_given_up_goes_with_the_round_or_its_void_and_with_nothing_else() -> None:
    given_up = Bound(round=1, head=A, void=True)
    assert given_up.at(RoundPosition(A, B, C, 0, 1)).void, "an amendment has moved the head"
    assert not given_up.at(RoundPosition(A, head_after_void(A), C, 0, 1)).void, "the round begins anew"
    assert not given_up.at(RoundPosition(A, B, C, 0, 2)).void


def test_a_release_is_used_up_by_the_reveal_to_another_cohort_alone() -> None:
    bound = Bound().giving(A, OF_FIRST, A).model_copy(update={"released": A})
    assert bound.giving(A, OF_FIRST, A).released == A
    assert bound.giving(A, OF_SECOND, A).released == ""


def test_a_site_knows_what_it_signed_before_what_stands_here_and_nothing_newer() -> None:
    bound = Bound(round=3, head=A, attempt=2, cohort=B)

    def knows(**changes: Any) -> bool:
        fields = {"round": 3, "head": A, "attempt": 2, "cohort": B} | changes
        return bound.knows(EnvelopeHeader.model_construct(**fields))

    assert knows()
    assert knows(round=2, attempt=9)
    assert knows(head=C, attempt=9), "of what was given up"
    assert knows(attempt=1, cohort=C)
    assert not knows(cohort=C), "a second one of its attempt"
    assert not knows(attempt=3)
    assert not knows(round=4, attempt=1)


def test_a_word_of_which_any_bit_is_another_is_none_and_one_of_before_is_read(tmp_path: Path) -> None:
    path = tmp_path / "bound.json"
    bound = Bound(round=1, head=A, attempt=1, arrived=B).giving(A, OF_FIRST, B)
    write_bound(path, bound)
    assert read_bound(path) == bound
    data = path.read_bytes()
    for place in range(len(data)):
        for bit in (0, 2, 7):
            path.write_bytes(data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :])
            assert read_bound(path) is None
    text, _, _ = data.partition(b"\n")
    path.write_bytes(text)
    assert read_bound(path) == bound

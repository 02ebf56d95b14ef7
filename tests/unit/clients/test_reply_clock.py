"""When replies leave for which a site with a budget worked on its data."""

from __future__ import annotations

import pytest

from secure_fed.clients.reply_clock import ReplyClock


@pytest.mark.parametrize(("work", "leaves"), [(0.0, 5.0), (4.9, 5.0), (5.0, 5.0), (5.1, 10.0), (12.0, 15.0)])
def test_a_reply_leaves_at_a_multiple_of_the_fixed_time_and_an_overrun_is_told_here(
    work: float, leaves: float, caplog: pytest.LogCaptureFixture
) -> None:
    now = 100.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    clock = ReplyClock(5.0, lambda: now, sleep)
    began = clock.begin()
    sleep(work)
    assert clock.hold(began) == round(leaves / 5.0)
    assert now - began == pytest.approx(leaves)
    told = f"goes on after {round(leaves / 5.0)} times as long" in caplog.text and "this site's own eyes" in caplog.text
    assert told == (work > 5.0)

"""A site's stored updates go once no void can bring back the adapter that they were made at, and not before."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import safetensors.numpy

from secure_fed.clients.outbox import drawn_in
from secure_fed.clients.replica import RunFiles
from secure_fed.core.layout import SiteRun


def filled(folder: Path) -> SiteRun:
    """Updates of four rounds, each in every form."""
    run = SiteRun(folder)
    run.outbox.mkdir(parents=True)
    for number in range(1, 5):
        run.integers(number).write_bytes(b"integers")
        run.envelope(number).write_bytes(b"envelope")
        run.noised(f"{number:064x}"[::-1]).write_bytes(safetensors.numpy.save({"round": np.array([number])}))
    run.noised("f" * 64).write_bytes(b"damaged")
    return run


def rounds_in(run: SiteRun) -> tuple[list[int], list[int]]:
    return run.updates(), sorted(drawn_in(path, 99) for path in run.all_noised())


def test_of_a_sum_those_before_the_one_before_it_go(tmp_path: Path) -> None:
    run = filled(tmp_path)
    RunFiles(run).erase_updates(1)
    assert rounds_in(run) == ([1, 2, 3, 4], [1, 2, 3, 4, 99])
    RunFiles(run).erase_updates(4)
    assert rounds_in(run) == ([4], [4, 99])
    assert not run.envelope(3).exists()


def test_a_refused_sum_moves_no_adapter_so_that_what_was_given_for_it_stays(tmp_path: Path) -> None:
    run = filled(tmp_path)
    files = RunFiles(run)
    for number in (2, 3):
        files.refuse(number, "0" * 64)
    files.erase_updates(4)
    assert rounds_in(run) == ([2, 3, 4], [2, 3, 4, 99])

"""A site's stored updates, which are kept for as long as a void can bring back the adapter that they were made at.

Asked again at that adapter, a site without a budget must give the same integers, and one with a budget pays for no
others. A record can be taken back until that of a later round is here, or a checkpoint; from then on what was given
before it is of no more use but to a thief.
"""

from __future__ import annotations

from pathlib import Path

import safetensors
import safetensors.numpy

from secure_fed.core.layout import SiteRun
from secure_fed.core.storage import sync_folder


def erase_updates(run: SiteRun, round_number: int) -> None:
    """Erase, durably, the updates that were made up to a round, sealed or not.

    Args:
        run: the run's folder.
        round_number: whose record has moved the adapter, and stands for ever.
    """
    old = [path for path in (*run.all_integers(), *run.envelopes()) if int(path.stem) <= round_number]
    old += [path for path in run.all_noised() if drawn_in(path, round_number + 1) <= round_number]
    for path in old:
        path.unlink()
    if old:
        sync_folder(run.outbox)


def drawn_in(path: Path, damaged: int) -> int:
    """The round in which noised integers were drawn.

    Args:
        path: of their file.
        damaged: what is said of one that does not tell.
    """
    try:
        return int(safetensors.numpy.load(path.read_bytes())["round"][0])
    except (safetensors.SafetensorError, KeyError, ValueError):
        return damaged

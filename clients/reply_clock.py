"""When a reply leaves for which a site with a budget worked on its data: at times that do not tell how long it worked.

A reply that reads data or the ledger is held until a fixed time after its request, or a multiple of it; and so is a
site's coming back in a run, for which it reads both. The time is public, in ``site.toml``, or follows from what the
machine needs for synthetic patients as many and as large as the site declared: the same for every data set. Everything
else reads neither and leaves at once.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable

import numpy as np

from secure_fed.clients.rehearsal import run_on, synthetic_features
from secure_fed.clients.sitefile import SiteFile
from secure_fed.core.errors import SiteFileError
from secure_fed.protocol.study import AgreedStudy

log = logging.getLogger(__name__)

MARGIN = 2.0
"""The fixed time over the worst case that was measured."""


class ReplyClock:
    """Holds what took work on data.

    Args:
        seconds: the fixed time, above 0.
        now: seconds of a clock that only goes forward.
        sleep: waits so many seconds.
    """

    def __init__(
        self,
        seconds: float,
        now: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.seconds = seconds
        self._now = now
        self._sleep = sleep

    def begin(self) -> float:
        """Note when a request came."""
        return self._now()

    def hold(self, began: float) -> int:
        """Wait until the next multiple of the fixed time after a request came.

        Returns:
            Which multiple; above 1 the work took longer than the time that was set, which the site is told.
        """
        multiple = max(1, math.ceil((self._now() - began) / self.seconds))
        if multiple > 1:
            log.warning(
                "for this site's own eyes: work on its data took longer than privacy.reply_seconds = %g, so that it "
                "goes on after %d times as long; raise it, or give the machine less else to do",
                *(self.seconds, multiple),
            )
        self._sleep(max(0.0, began + multiple * self.seconds - self._now()))
        return multiple


def reply_seconds(file: SiteFile, agreed: AgreedStudy, now: Callable[[], float] = time.monotonic) -> float:
    """The fixed time of a site with a budget: as it is set, or twice what the worst case takes here.

    The worst case is a round over N_ref synthetic patients with as many images each as the study takes of one.

    Raises:
        SiteFileError: what is set is less than twice the worst case.
    """
    constants = agreed.study.privacy
    budget = file.privacy
    patients = (budget.n_ref if budget is not None else None) or constants.n_ref
    features = synthetic_features(agreed, patients, constants.images_per_patient, np.random.default_rng(6))
    began = now()
    run_on(file, agreed, features, [1 if agreed.study.method.sums else agreed.study.rounds])
    least = MARGIN * (now() - began)
    given = None if budget is None else budget.reply_seconds
    if given is None:
        return float(max(1, math.ceil(least)))
    if given < least:
        raise SiteFileError(
            f"privacy.reply_seconds = {given:g}; expected at least {math.ceil(least)}, twice what a round over "
            f"{patients} patients with {constants.images_per_patient} images each takes on this machine"
        )
    return given

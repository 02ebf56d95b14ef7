"""What a site with a budget releases in a study of sums: which, how often, and made of whom."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from secure_fed.clients import memory, one_sum
from secure_fed.clients.features import SiteFeatures
from secure_fed.privacy import class_statistics, memory_sums
from secure_fed.privacy.accounting import Mechanism, Noise
from secure_fed.protocol.codec import Parameters
from secure_fed.protocol.study import AgreedStudy

Values = dict[str, NDArray[np.float64]]
Person = Callable[[str], str]
"""The ledger's person of a patient's id."""


class PrivateSums(Protocol):
    """The sums of one study at one adapter.

    Attributes:
        what: they are, in words.
        rounds: of the study that release one; in those after them nothing leaves.
        planned: rounds that the ledger plans for, which it always does for one more, in case of a crash.
        state: what they are made of beside patients; asked again at the same, a site sends the same integers.
        sensitivity: most that a patient moves a release (L2).
    """

    what: str
    rounds: int
    planned: int
    state: str
    sensitivity: float

    def check(self) -> None:
        """Try on made-up patients that none moves them by more than is paid; raises GuardError."""

    def refuse(self, release: Mechanism) -> None:
        """Refuse, before anything is spent, noise that others could not tell from patients; raises BudgetError."""

    def patients(self, features: SiteFeatures) -> set[str]:
        """Ids of those whom they are made of."""

    def noised(
        self, features: SiteFeatures, person: Person, paying: Collection[str], release: Mechanism, noise: Noise
    ) -> Values:
        """The values by block, of the persons who pay alone, with the noise of the release."""


def private_sums(agreed: AgreedStudy, state: str, parameters: Parameters) -> PrivateSums:
    """The sums that a study asks for.

    Args:
        agreed: whose method sends sums.
        state: digest of what the round builds on.
        parameters: the adapter that it builds on.
    """
    return _ClassStatistics(agreed) if agreed.study.method.one_sum else _MemorySums(agreed, state, parameters)


class _ClassStatistics:
    """Once, with the noise of all that was declared for the run: after a crash between the reservation and the stored
    integers, a fraction of a second, the site goes on as an observer. Histograms of patients would cost more than they
    tell, so that none leave: zeros do, the same whatever the patients."""

    what = "class statistics, in one sum"
    rounds = 1
    planned = 0
    state = "one-sum"  # no record changes what it is made of
    sensitivity = class_statistics.SENSITIVITY

    def __init__(self, agreed: AgreedStudy) -> None:
        self._agreed = agreed

    def check(self) -> None:
        basis = self._agreed.initial.basis
        assert basis is not None, "study new makes one for each method that uses one"
        class_statistics.check_sums(len(self._agreed.study.classes), basis.dimensions)

    def refuse(self, release: Mechanism) -> None:
        class_statistics.refuse_noise(release)

    def patients(self, features: SiteFeatures) -> set[str]:
        return set(features.patients["train"])

    def noised(
        self, features: SiteFeatures, person: Person, paying: Collection[str], release: Mechanism, noise: Noise
    ) -> Values:
        study = self._agreed.study
        x, labels, names = one_sum.views(self._agreed, features)
        owners = [person(name) for name in names]
        rows = class_statistics.capped(owners, paying, study.privacy.images_per_patient)
        whole = class_statistics.finite_rows(x[rows], [owners[row] for row in rows])
        rows = [rows[row] for row in whole]
        exact = class_statistics.exact_sums(x[rows], labels[rows], [owners[row] for row in rows], len(study.classes))
        return class_statistics.noisy_values(exact, release.noise_std / self.sensitivity, noise)


class _MemorySums:
    """One release a round but the last, in which the histogram of scores would cost more than it tells: zeros leave."""

    what = "sums around centroids"

    def __init__(self, agreed: AgreedStudy, state: str, parameters: Parameters) -> None:
        self.rounds = self.planned = agreed.study.rounds - 1
        self.state = state
        self.sensitivity = memory_sums.sensitivity(parameters)
        self._agreed, self._parameters = agreed, parameters

    def check(self) -> None:
        memory_sums.check_sums(self._parameters)

    def refuse(self, release: Mechanism) -> None:
        """Never: a centroid's floor is held against noised weights, whose noise nobody needs to know."""

    def patients(self, features: SiteFeatures) -> set[str]:
        return set(memory.normal(features, "train")[1])

    def noised(
        self, features: SiteFeatures, person: Person, paying: Collection[str], release: Mechanism, noise: Noise
    ) -> Values:
        x, names = memory.normal(features, "train")
        owners = [person(name) for name in names]
        rows = class_statistics.capped(owners, paying, self._agreed.study.privacy.images_per_patient)
        whole = class_statistics.finite_rows(x[rows].astype(np.float64), [owners[row] for row in rows])
        rows = [rows[row] for row in whole]
        exact = memory_sums.exact_sums(self._parameters, x[rows], [owners[row] for row in rows])
        return memory_sums.noisy_values(exact, release.noise_std, noise)


def nothing(agreed: AgreedStudy, round_number: int) -> Values:
    """A round's values by block of a site that says nothing of its patients in it."""
    return {block.name: np.zeros(block.bounds.size) for block in agreed.layout(round_number).blocks}

"""``memory``: centroids of normal patch features, moved by sums (after FedDyMem, arXiv 2502.21012)."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from secure_fed.core.errors import StudyError
from secure_fed.model.adapters._base import Adapter, Start
from secure_fed.protocol.study_tables import Method


class MemoryBank(Adapter):
    """Names the parameters that a study of anomalies shares; ``secure_fed.protocol.memory`` has what is made of them.

    They are no layer: no gradient is taken of them, and what they say of an image is a score, no logit.
    """

    moves_features: ClassVar[bool] = False

    @classmethod
    def initial(cls, method: Method, start: Start) -> dict[str, NDArray[np.float64]]:
        """As in :class:`Adapter`.

        Raises:
            StudyError: it was asked of a study without patch features.
        """
        if start.bank is None:
            raise StudyError('adapter = "memory" starts at patches of the backbone; expected task = "anomaly"')
        return dict(start.bank)

    def adapt(self, features: Tensor) -> Tensor:
        """The features as they are."""
        return features

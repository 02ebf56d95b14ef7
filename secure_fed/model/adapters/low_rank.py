"""``low_rank``: a residual of low rank on the features (LoRA's form, arXiv 2106.09685, on one layer)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import linear, normalize

from secure_fed.model.adapters._base import Adapter, Start
from secure_fed.protocol.study_tables import Method


class LowRank(Adapter):
    """z = norm(x + up down x); up starts at zero, so training starts at zero-shot."""

    down: Tensor
    up: Tensor

    @classmethod
    def initial(cls, method: Method, start: Start) -> dict[str, NDArray[np.float64]]:
        """As in :class:`Adapter`."""
        return {"down": start.uniform(method.rank, start.dim), "up": np.zeros((start.dim, method.rank))}

    def adapt(self, features: Tensor) -> Tensor:
        """As in :class:`Adapter`."""
        return normalize(self.moved(features), dim=-1)

    def moved(self, features: Tensor) -> Tensor:
        """x + up down x, linear in x, [..., d]: where features go before they are normalised."""
        return features + linear(linear(features, self.down), self.up)

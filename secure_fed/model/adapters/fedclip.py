"""``fedclip``: the attention gate of FedCLIP (Lu et al. 2023, arXiv 2302.13485)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, tanh
from torch.nn.functional import linear, normalize, softmax

from secure_fed.model.adapters._base import Adapter, Start
from secure_fed.protocol.study_tables import Method


class TanhGate(Adapter):
    """z = norm(a(x) * x), a = softmax(W2 tanh(W1 x + b1) + b2): FACMIC's gate with tanh and without a norm."""

    first_weight: Tensor
    first_bias: Tensor
    second_weight: Tensor
    second_bias: Tensor

    @classmethod
    def initial(cls, method: Method, start: Start) -> dict[str, NDArray[np.float64]]:
        """As in :class:`Adapter`: torch's defaults. The gate then starts near uniform."""
        dim = start.dim
        return {
            "first_weight": start.uniform(dim, dim),
            "first_bias": start.uniform(dim),
            "second_weight": start.uniform(dim, dim),
            "second_bias": start.uniform(dim),
        }

    def adapt(self, features: Tensor) -> Tensor:
        """As in :class:`Adapter`."""
        hidden = tanh(linear(features, self.first_weight, self.first_bias))
        gate = softmax(linear(hidden, self.second_weight, self.second_bias), dim=-1)
        return normalize(gate * features, dim=-1)

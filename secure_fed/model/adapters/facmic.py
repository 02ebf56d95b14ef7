"""``facmic``: the attention gate of FACMIC (Wu et al., MICCAI 2024)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import leaky_relu, linear, normalize, softmax

from secure_fed.model.adapters._base import NORM_EPSILON, Adapter, Start, batch_norm
from secure_fed.protocol.study_tables import Method


class AttentionGate(Adapter):
    """FACMIC's feature attention: z = norm(a(x) * x), a = softmax(W2 lrelu(norm(W1 x + b1)) + b2).

    The norm is a layer norm, or the paper's batch norm. Batch norm here takes the batch's own statistics in training
    mode, a batch of one included (variance 0), and in evaluation mode those that ``set_statistics`` took. They are
    plain attributes and are never shared.
    """

    first_weight: Tensor
    first_bias: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    second_weight: Tensor
    second_bias: Tensor

    _statistics: tuple[Tensor, Tensor] | None = None

    @classmethod
    def initial(cls, method: Method, start: Start) -> dict[str, NDArray[np.float64]]:
        """As in :class:`Adapter`: torch's defaults. The gate then starts near uniform."""
        dim = start.dim
        return {
            "first_weight": start.uniform(dim, dim),
            "first_bias": start.uniform(dim),
            "norm_weight": np.ones(dim),
            "norm_bias": np.zeros(dim),
            "second_weight": start.uniform(dim, dim),
            "second_bias": start.uniform(dim),
        }

    @property
    def _is_batch_norm(self) -> bool:
        return self.method.norm == "batch"

    def adapt(self, features: Tensor) -> Tensor:
        """As in :class:`Adapter`.

        Raises:
            RuntimeError: batch norm in evaluation mode before ``set_statistics``.
        """
        hidden = linear(features, self.first_weight, self.first_bias)
        if self._is_batch_norm:
            hidden = self._batch_norm(hidden)
        else:
            hidden = nn.functional.layer_norm(hidden, hidden.shape[-1:], self.norm_weight, self.norm_bias, NORM_EPSILON)
        gate = softmax(linear(leaky_relu(hidden, 0.01), self.second_weight, self.second_bias), dim=-1)
        return normalize(gate * features, dim=-1)

    @torch.no_grad()
    def set_statistics(self, features: Tensor) -> None:
        """As in :class:`Adapter`; expects at least one feature."""
        hidden = linear(features, self.first_weight, self.first_bias)
        self._statistics = hidden.mean(0), hidden.var(0, correction=0)

    def statistics(self) -> dict[str, NDArray[np.float64]]:
        """As in :class:`Adapter`: mean and variance of the hidden layer, [d] each, of batch norm."""
        if not self._is_batch_norm or self._statistics is None:
            return {}
        mean, variance = (value.double().numpy() for value in self._statistics)
        return {"mean": mean, "variance": variance}

    def restore_statistics(self, statistics: Mapping[str, NDArray[np.float64]]) -> None:
        """As in :class:`Adapter`."""
        if self._is_batch_norm:
            mean, variance = (torch.tensor(statistics[name], dtype=torch.float32) for name in ("mean", "variance"))
            self._statistics = mean, variance

    def _batch_norm(self, hidden: Tensor) -> Tensor:
        if self.training:
            return batch_norm(hidden, self.norm_weight, self.norm_bias)
        if self._statistics is not None:
            mean, variance = self._statistics
        else:
            raise RuntimeError("batch norm has no statistics yet; call set_statistics with the site's own features")
        return (hidden - mean) * torch.rsqrt(variance + NORM_EPSILON) * self.norm_weight + self.norm_bias

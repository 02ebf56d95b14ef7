"""The trained part: small adapters on frozen CLIP features, and the losses that train them.

Features are unit rows [n, d]; prompts are unit rows [K, d], one per class of the study, in its order. All
shared parameters are trained; there are no buffers, so what a site sends is what its optimiser moved.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, leaky_relu, linear, normalize, softmax

from secure_fed.study import Method

NORM_EPSILON = 1e-5
"""Added to a variance before its root, as torch does in both norms."""


class Adapter(nn.Module, ABC):
    """Moves image features, or class vectors, or both; logits are scaled cosines between the two."""

    def __init__(
        self,
        prompt_features: NDArray[np.float32],
        logit_scale: float,
        parameters: Mapping[str, NDArray[np.float64]],
    ) -> None:
        super().__init__()
        self.prompts = torch.tensor(prompt_features, dtype=torch.float32)
        self.logit_scale = logit_scale
        for name in sorted(parameters):
            value = torch.tensor(parameters[name], dtype=torch.float32)
            self.register_parameter(name, nn.Parameter(value))

    @abstractmethod
    def adapt(self, features: Tensor) -> Tensor:
        """Adapted unit features, [..., d], of unit features [..., d]."""

    def class_vectors(self) -> Tensor:
        """The unit vector of each class, [K, d]."""
        return self.prompts

    def logits(self, features: Tensor) -> Tensor:
        """Logits [n, K]: logit_scale times the cosine of adapted feature and class vector."""
        return self.compare(self.adapt(features))

    def forward(self, features: Tensor) -> Tensor:
        """The logits, under the name by which torch modules are called; Opacus' hooks need it."""
        return self.logits(features)

    def compare(self, adapted: Tensor) -> Tensor:
        """Logits [n, K] of features that are already adapted."""
        return self.logit_scale * linear(adapted, self.class_vectors())

    def set_statistics(self, features: Tensor) -> None:
        """Take the statistics for evaluation from features [n, d] of the site's own; a no-op without any."""

    def shared_parameters(self) -> dict[str, nn.Parameter]:
        """What is trained and, as an update, shared: by name, in sorted order."""
        return dict(sorted(self.named_parameters()))


class AttentionGate(Adapter):
    """FACMIC's feature attention (facmic.md 1.1): z = norm(a(x) * x), a = softmax(W2 lrelu(norm(W1 x + b1)) + b2).

    Batch norm here takes the batch's own statistics in training mode, a batch of one included (variance 0), and
    in evaluation mode those that ``set_statistics`` took. They are plain attributes and are never shared.
    """

    first_weight: Tensor
    first_bias: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    second_weight: Tensor
    second_bias: Tensor

    def __init__(
        self,
        prompt_features: NDArray[np.float32],
        logit_scale: float,
        parameters: Mapping[str, NDArray[np.float64]],
        by_batch: bool,
    ) -> None:
        super().__init__(prompt_features, logit_scale, parameters)
        self._by_batch = by_batch
        self._statistics: tuple[Tensor, Tensor] | None = None

    def adapt(self, features: Tensor) -> Tensor:
        """As in :class:`Adapter`.

        Raises:
            RuntimeError: batch norm in evaluation mode before ``set_statistics``.
        """
        hidden = linear(features, self.first_weight, self.first_bias)
        if self._by_batch:
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

    def _batch_norm(self, hidden: Tensor) -> Tensor:
        if self.training:
            mean, variance = hidden.mean(0), hidden.var(0, correction=0)
        elif self._statistics is not None:
            mean, variance = self._statistics
        else:
            raise RuntimeError("batch norm has no statistics yet; call set_statistics with the site's own features")
        return (hidden - mean) * torch.rsqrt(variance + NORM_EPSILON) * self.norm_weight + self.norm_bias


class LowRank(Adapter):
    """A residual of low rank: z = norm(x + up down x); up starts at zero, so training starts at zero-shot."""

    down: Tensor
    up: Tensor

    def adapt(self, features: Tensor) -> Tensor:
        """As in :class:`Adapter`."""
        return normalize(features + linear(linear(features, self.down), self.up), dim=-1)


class TextHead(Adapter):
    """Class vectors norm(prompt + offset); offsets start at zero, so training starts at zero-shot.

    The vectors stay unit rows: logits then keep the frozen CLIP's temperature, comparable with zero-shot, and
    weight decay pulls towards the reviewed prompts instead of towards less confidence.
    """

    offsets: Tensor

    def adapt(self, features: Tensor) -> Tensor:
        """The features as they are."""
        return features

    def class_vectors(self) -> Tensor:
        """As in :class:`Adapter`."""
        return normalize(self.prompts + self.offsets, dim=1)


def initial_parameters(
    method: Method, dim: int, prompt_features: NDArray[np.float32], seed: int
) -> dict[str, NDArray[np.float64]]:
    """Where training starts, at or (``facmic``) near zero-shot; the global random state is not used.

    Args:
        method: which adapter.
        dim: width d of the features.
        prompt_features: unit rows [K, d].
        seed: 0 or more, below 2**63.

    Returns:
        Arrays by sorted name.
    """
    generator = torch.Generator().manual_seed(seed)
    bound = 1 / math.sqrt(dim)

    def uniform(*shape: int) -> NDArray[np.float64]:
        # U(-1/sqrt(d), 1/sqrt(d)) is torch's default for a linear layer, weights and bias alike.
        values = torch.rand(shape, generator=generator, dtype=torch.float64).numpy()
        return np.asarray((2 * values - 1) * bound)

    if method.adapter == "facmic":
        parameters = {
            "first_weight": uniform(dim, dim),
            "first_bias": uniform(dim),
            "norm_weight": np.ones(dim),
            "norm_bias": np.zeros(dim),
            "second_weight": uniform(dim, dim),
            "second_bias": uniform(dim),
        }
    elif method.adapter == "low_rank":
        parameters = {"down": uniform(method.rank, dim), "up": np.zeros((dim, method.rank))}
    else:
        parameters = {"offsets": np.zeros(prompt_features.shape)}
    return dict(sorted(parameters.items()))


def build_adapter(
    method: Method,
    prompt_features: NDArray[np.float32],
    logit_scale: float,
    parameters: Mapping[str, NDArray[np.float64]],
) -> Adapter:
    """The adapter with these parameters, in float32 and training mode.

    Args:
        method: which adapter.
        prompt_features: unit rows [K, d].
        logit_scale: the frozen CLIP's exp(logit_scale).
        parameters: by name, as :func:`initial_parameters` gives them; copied.
    """
    if method.adapter == "facmic":
        return AttentionGate(prompt_features, logit_scale, parameters, by_batch=method.norm == "batch")
    kind = LowRank if method.adapter == "low_rank" else TextHead
    return kind(prompt_features, logit_scale, parameters)


def class_prompt_loss(logits: Tensor, labels: Tensor, log_prior: Tensor) -> Tensor:
    """Logit-adjusted cross-entropy over the prompts, CE(logits + log pi, y) (facmic.md T4; Menon et al. 2021).

    Args:
        logits: [n, K].
        labels: [n] int64; each of a class with a finite log prior, or the loss is infinite.
        log_prior: [K]: log of the classes' shares, -inf for a class that is absent: it then takes no part.

    Returns:
        One loss per example, [n]; each depends on that example alone.
    """
    return cross_entropy(logits + log_prior, labels, reduction="none")


def contrastive_loss(adapted: Tensor, labels: Tensor, class_vectors: Tensor, logit_scale: float) -> Tensor:
    """FACMIC's in-batch loss (facmic.md 1.2): (CE(S, i) + CE(S', i)) / 2, S_ij = scale cos(z_i, t_(y_j)).

    Same-class columns of S are equal, so even a perfect classifier keeps a loss of log(images of its class).

    Args:
        adapted: unit features z, [n, d].
        labels: [n] int64.
        class_vectors: unit rows t, [K, d].
        logit_scale: the frozen CLIP's.

    Returns:
        One value per example, [n], whose mean is the paper's loss; each depends on the whole batch.
    """
    similarity = logit_scale * linear(adapted, class_vectors[labels])
    own = torch.arange(len(labels))
    to_text = cross_entropy(similarity, own, reduction="none")
    to_image = cross_entropy(similarity.T, own, reduction="none")
    return (to_text + to_image) / 2

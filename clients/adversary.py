"""The domain term of FAA-CLIP: a private discriminator that a gate learns to deceive (arXiv 2503.05776)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, linear, relu

from secure_fed.model.adapters import batch_norm


class Discriminator(nn.Module):
    """Tells adapted labelled features from adapted unlabelled ones: d-d-d-1, batch norm and ReLU, sigmoid.

    It lives for one round of one site's training and in that process alone: nothing keeps or sends it. Each batch is
    normalised by itself, as two calls of the published code do.
    """

    def __init__(self, dim: int, seed: int) -> None:
        """Draw torch's defaults, U(-1/sqrt(d), 1/sqrt(d)), without the global random state.

        Args:
            dim: width d of the features.
            seed: 0 or more, below 2**63.
        """
        super().__init__()
        generator, bound = torch.Generator("cpu").manual_seed(seed), 1 / math.sqrt(dim)

        def drawn(*shape: int) -> nn.Parameter:
            values = torch.empty(shape, device="cpu").uniform_(-bound, bound, generator=generator)
            return nn.Parameter(values.to(torch.get_default_device()))

        self.first_weight, self.first_bias = drawn(dim, dim), drawn(dim)
        self.second_weight, self.second_bias = drawn(dim, dim), drawn(dim)
        self.last_weight, self.last_bias = drawn(1, dim), drawn(1)
        self.first_scale, self.first_shift = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))
        self.second_scale, self.second_shift = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, features: Tensor) -> Tensor:
        """Log odds [n] that features [n, d] are of labelled images."""
        hidden = batch_norm(linear(features, self.first_weight, self.first_bias), self.first_scale, self.first_shift)
        hidden = linear(relu(hidden), self.second_weight, self.second_bias)
        hidden = batch_norm(hidden, self.second_scale, self.second_shift)
        return linear(relu(hidden), self.last_weight, self.last_bias).squeeze(-1)

    def domain_term(self, source: Tensor, target: Tensor) -> Tensor:
        """(BCE(D(R(s)), 1) + BCE(D(R(t)), 0)) / 2: the discriminator descends it, whoever made the features ascends it.

        R is the identity whose gradient has its sign reversed (strength 1). The reversed gradient of both sides
        reaches the gate; the published code makes the target's features without one (docs/facmic.md, FAA-CLIP).

        Args:
            source: adapted labelled features [m, d].
            target: adapted unlabelled features [n, d].
        """
        ours, theirs = self(_Reversal.apply(source)), self(_Reversal.apply(target))
        wrong = binary_cross_entropy_with_logits(ours, torch.ones_like(ours))
        return (wrong + binary_cross_entropy_with_logits(theirs, torch.zeros_like(theirs))) / 2


class _Reversal(torch.autograd.Function):
    """The identity, whose gradient changes its sign."""

    @staticmethod
    def forward(ctx: Any, features: Tensor) -> Tensor:
        return features.view_as(features)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -gradient

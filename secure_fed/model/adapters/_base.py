"""What every adapter is: the interface, the site's private head, and the losses that train it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear

from secure_fed.model.text_tower import TextTower
from secure_fed.protocol.basis import Basis
from secure_fed.protocol.study_tables import Method

PRIVATE_HEAD = "private_head"
"""Name of the parameter that a site trains and never shares; see :meth:`Adapter.logits`."""

NORM_EPSILON = 1e-5
"""Added to a variance before its root, as torch does in both norms."""


class Start:
    """What an adapter's initial parameters are made of. Draws come one after the other from the study's seed.

    Attributes:
        dim: width d of the features.
        prompt_features: unit rows, float32 [K, d].
        tower: the frozen text tower with the classes' tokens, for adapters that ask for it; else None.
        dimensions: width k of features in the study's basis, for adapters that use it.
        bank: centroids and grids of patch features, of a study of anomalies.
    """

    def __init__(
        self,
        dim: int,
        prompt_features: NDArray[np.float32],
        seed: int,
        tower: TextTower | None,
        dimensions: int,
        bank: Mapping[str, NDArray[np.float64]] | None = None,
    ) -> None:
        self.dim = dim
        self.bank = bank
        self.dimensions = dimensions
        self.prompt_features = prompt_features
        self.tower = tower
        self._generator = torch.Generator().manual_seed(seed)

    def uniform(self, *shape: int) -> NDArray[np.float64]:
        """U(-1/sqrt(d), 1/sqrt(d)): torch's default for a linear layer of d inputs, weights and bias alike."""
        values = torch.rand(shape, generator=self._generator, dtype=torch.float64).numpy()
        return np.asarray((2 * values - 1) * (1 / math.sqrt(self.dim)))

    def normal(self, std: float, *shape: int) -> NDArray[np.float64]:
        """N(0, std^2)."""
        return np.asarray(std * torch.randn(shape, generator=self._generator, dtype=torch.float64).numpy())


class Adapter(nn.Module, ABC):
    """Moves image features, or class vectors, or both; logits are scaled cosines between the two.

    Attributes:
        method: which adapter, and with which settings.
        tower: the frozen text tower, for adapters that ask for it; else None.
        basis: the study's, if it has one.
        shows_adapted: whether ``forward`` appends the adapted features, for a loss that needs them.
        moves_features: whether image features are moved; if not, the domain term has nothing to align.
        needs_tower: whether the frozen text tower takes part in training.
        uses_basis: whether the method always sees features in the study's basis (``[features]``).
        may_use_basis: whether it does where the study's basis is not the backbone's own.
        precision: of its parameters.
    """

    moves_features: ClassVar[bool] = True
    needs_tower: ClassVar[bool] = False
    uses_basis: ClassVar[bool] = False
    may_use_basis: ClassVar[bool] = False
    precision: ClassVar[torch.dtype] = torch.float32

    def __init__(
        self,
        method: Method,
        prompt_features: NDArray[np.float32],
        logit_scale: float,
        parameters: Mapping[str, NDArray[np.float64]],
        tower: TextTower | None = None,
        basis: Basis | None = None,
    ) -> None:
        super().__init__()
        self.method = method
        self.prompts = torch.tensor(prompt_features, dtype=torch.float32)
        self.logit_scale = logit_scale
        self.tower = tower
        self.basis = basis
        self.shows_adapted = False
        for name in sorted(parameters):
            value = torch.tensor(parameters[name], dtype=self.precision)
            self.register_parameter(name, nn.Parameter(value))

    @classmethod
    def initial(cls, method: Method, start: Start) -> dict[str, NDArray[np.float64]]:
        """Where training starts, at or near zero-shot: arrays by name. Every adapter that a study can name has it."""
        raise NotImplementedError

    @abstractmethod
    def adapt(self, features: Tensor) -> Tensor:
        """Adapted unit features, [..., d], of unit features [..., d]."""

    def within_class(self, label: int) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
        """Where a class's features lie, [d], and how features of one class spread, a covariance [d, d], both in the
        backbone's coordinates; None of a method that does not know it."""
        return None

    def class_vectors(self) -> Tensor:
        """The unit vector of each class, [K, d]."""
        return self.prompts

    def logits(self, features: Tensor) -> Tensor:
        """Logits [n, K]: logit_scale times the cosine of adapted feature and class vector.

        At a site with a private head H [K, d], started at 0, they are those plus logit_scale times H z, z the adapted
        feature: a personal last layer on a shared body (FedPer, arXiv 1912.00818).
        """
        adapted = self.adapt(features)
        logits = self.compare(adapted)
        head = self._parameters.get(PRIVATE_HEAD)
        return logits if head is None else logits + self.head_logits(adapted)

    def forward(self, features: Tensor) -> Tensor:
        """The logits [..., K], followed by the adapted features [..., d] if ``shows_adapted``.

        Under the name by which torch modules are called, and as one tensor: Opacus' hooks need both.
        """
        if not self.shows_adapted:
            return self.logits(features)
        adapted = self.adapt(features)
        return torch.cat((self.compare(adapted), adapted), dim=-1)

    def compare(self, adapted: Tensor) -> Tensor:
        """Logits [n, K] of features that are already adapted, by what is shared alone."""
        return self.score(adapted, self.class_vectors())

    def score(self, adapted: Tensor, class_vectors: Tensor) -> Tensor:
        """Logits [n, K] of adapted features by the class vectors given: scaled cosines."""
        return self.logit_scale * linear(adapted, class_vectors)

    def head_logits(self, adapted: Tensor) -> Tensor:
        """What the private head adds to the logits [n, K] of adapted features; only with a private head."""
        return self.logit_scale * linear(adapted, self.get_parameter(PRIVATE_HEAD))

    def set_statistics(self, features: Tensor) -> None:
        """Take the statistics for evaluation from features [n, d] of the site's own; a no-op without any."""

    def statistics(self) -> dict[str, NDArray[np.float64]]:
        """What ``set_statistics`` took, by name, to be kept at the site; empty for an adapter that needs none."""
        return {}

    def restore_statistics(self, statistics: Mapping[str, NDArray[np.float64]]) -> None:
        """Set what :meth:`statistics` gave, instead of taking it from features; a no-op without any."""

    def shared_parameters(self) -> dict[str, nn.Parameter]:
        """What is trained and, as an update, shared: by name, in sorted order. All but the private head."""
        return {name: value for name, value in sorted(self.named_parameters()) if name != PRIVATE_HEAD}


def batch_norm(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Batch norm [..., d] by the batch's own statistics, of a batch of one included (variance 0).

    Args:
        hidden: [..., d].
        weight, bias: [d].
    """
    # The kernel under nn.functional.batch_norm, which would refuse a batch of one; twice as fast as by hand.
    rows = hidden.reshape(-1, hidden.shape[-1])
    return torch.batch_norm(rows, weight, bias, None, None, True, 0.0, NORM_EPSILON, False).reshape(hidden.shape)


def class_prompt_loss(logits: Tensor, labels: Tensor, log_prior: Tensor) -> Tensor:
    """Logit-adjusted cross-entropy over the prompts, CE(logits + log pi, y) (Menon et al. 2021, arXiv 2007.07314).

    Args:
        logits: [n, K].
        labels: [n] int64; each of a class with a finite log prior, or the loss is infinite.
        log_prior: [K]: log of the classes' shares, -inf for a class that is absent: it then takes no part.

    Returns:
        One loss per example, [n]; each depends on that example alone.
    """
    return cross_entropy(logits + log_prior, labels, reduction="none")


def contrastive_loss(adapted: Tensor, labels: Tensor, class_vectors: Tensor, logit_scale: float) -> Tensor:
    """FACMIC's in-batch loss (docs/facmic.md): (CE(S, i) + CE(S', i)) / 2, S_ij = scale cos(z_i, t_(y_j)).

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
    own = torch.arange(len(labels), device=labels.device)
    to_text = cross_entropy(similarity, own, reduction="none")
    to_image = cross_entropy(similarity.T, own, reduction="none")
    return (to_text + to_image) / 2

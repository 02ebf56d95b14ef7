"""``gaussian_head``: linear discriminants from class statistics in one sum (GDA-CLIP's head, arXiv 2402.04087)."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import linear

from secure_fed.model.adapters._base import Adapter, Start
from secure_fed.protocol.one_sum import NO_LIMITS
from secure_fed.protocol.study_tables import Method


class GaussianHead(Adapter):
    """Logits linear in the features as the backbone gives them; solved of sums, never trained.

    ``secure_fed.protocol.one_sum`` has the formulas and the other parameters, which say how far a case lies from the
    classes and which classes its set holds.
    """

    moves_features: ClassVar[bool] = False
    uses_basis: ClassVar[bool] = True
    precision: ClassVar[torch.dtype] = torch.float64

    weight: Tensor
    bias: Tensor
    factor: Tensor
    means: Tensor
    limits: Tensor

    @classmethod
    def initial(cls, method: Method, start: Start) -> dict[str, NDArray[np.float64]]:
        """As in :class:`Adapter`: zero-shot, until there is a sum."""
        classes = len(start.prompt_features)
        return {
            "weight": start.prompt_features.astype(np.float64),
            "bias": np.zeros(classes),
            "factor": np.eye(start.dimensions),
            "means": np.zeros((classes, start.dimensions)),
            "limits": NO_LIMITS.values(),
        }

    def adapt(self, features: Tensor) -> Tensor:
        """The features as they are."""
        return features

    def within_class(self, label: int) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
        """As in :class:`Adapter`, from the moments in the study's basis; in other directions features do not spread."""
        basis, factor = self.basis, self.factor.detach().numpy()
        if basis is None:
            return None
        back = np.eye(len(factor)) if basis.axes is None else np.linalg.pinv(basis.axes)
        back = basis.radius * back
        mean = basis.centre + back @ self.means[label].detach().numpy()
        spread = back @ factor
        return mean, spread @ spread.T

    def class_vectors(self) -> Tensor:
        """The weights, [K, d]; no unit rows."""
        return self.weight

    def score(self, adapted: Tensor, class_vectors: Tensor) -> Tensor:
        """As in :class:`Adapter`, in float64: weights are large where features spread little."""
        return self.logit_scale * linear(adapted.double(), class_vectors, self.bias)

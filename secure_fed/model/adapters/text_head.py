"""``text_head``: a linear classifier started at the prompts (LP++'s start, arXiv 2404.02285), the baseline to beat."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import linear, normalize

from secure_fed.model.adapters._base import Adapter, Start
from secure_fed.model.text_tower import TextTower
from secure_fed.protocol.basis import Basis
from secure_fed.protocol.study_tables import Method


class TextHead(Adapter):
    """Class vectors norm(prompt + offset); offsets start at zero, so training starts at zero-shot.

    The vectors stay unit rows: logits then keep the frozen CLIP's temperature, comparable with zero-shot, and
    weight decay pulls towards the reviewed prompts instead of towards less confidence.

    In a study with a basis the logits are instead those of zero-shot plus logit_scale times offset . x', the image's
    place x' in the basis: few coordinates, all of like size, so that noise of private training drowns less of them.
    """

    moves_features: ClassVar[bool] = False
    may_use_basis: ClassVar[bool] = True

    offsets: Tensor

    def __init__(
        self,
        method: Method,
        prompt_features: NDArray[np.float32],
        logit_scale: float,
        parameters: Mapping[str, NDArray[np.float64]],
        tower: TextTower | None = None,
        basis: Basis | None = None,
    ) -> None:
        super().__init__(method, prompt_features, logit_scale, parameters, tower, basis)
        self._place: tuple[Tensor, Tensor] | None = None
        if basis is not None and basis.axes is not None:
            self._place = torch.from_numpy(basis.centre), torch.from_numpy(basis.axes / basis.radius)

    @classmethod
    def initial(cls, method: Method, start: Start) -> dict[str, NDArray[np.float64]]:
        """As in :class:`Adapter`."""
        return {"offsets": np.zeros((len(start.prompt_features), start.dimensions))}

    def adapt(self, features: Tensor) -> Tensor:
        """The features as they are."""
        return features

    def class_vectors(self) -> Tensor:
        """As in :class:`Adapter`; with a basis the prompts, which are not trained."""
        return self.prompts if self._place is not None else normalize(self.prompts + self.offsets, dim=1)

    def compare(self, adapted: Tensor) -> Tensor:
        """As in :class:`Adapter`."""
        logits = super().compare(adapted)
        if self._place is None:
            return logits
        centre, axes = (part.to(adapted) for part in self._place)
        return logits + self.logit_scale * linear(linear(adapted - centre, axes), self.offsets)

"""``text_head``: a linear classifier started at the prompts (LP++'s start, arXiv 2404.02285), the baseline to beat."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from secure_fed.model.adapters._base import Adapter, Start
from secure_fed.protocol.study import Method


class TextHead(Adapter):
    """Class vectors norm(prompt + offset); offsets start at zero, so training starts at zero-shot.

    The vectors stay unit rows: logits then keep the frozen CLIP's temperature, comparable with zero-shot, and
    weight decay pulls towards the reviewed prompts instead of towards less confidence.
    """

    moves_features: ClassVar[bool] = False

    offsets: Tensor

    @classmethod
    def initial(cls, method: Method, start: Start) -> dict[str, NDArray[np.float64]]:
        """As in :class:`Adapter`."""
        return {"offsets": np.zeros(start.prompt_features.shape)}

    def adapt(self, features: Tensor) -> Tensor:
        """The features as they are."""
        return features

    def class_vectors(self) -> Tensor:
        """As in :class:`Adapter`."""
        return normalize(self.prompts + self.offsets, dim=1)

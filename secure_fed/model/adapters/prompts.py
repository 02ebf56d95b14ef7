"""``prompts``: context vectors before each class's text (PromptFL, arXiv 2208.11625, on CoOp, arXiv 2109.01134)."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from secure_fed.core.errors import StudyError
from secure_fed.model.adapters._base import Adapter, Start
from secure_fed.model.text_tower import TextTower
from secure_fed.protocol.study_tables import Method

CONTEXT_STD = 0.02
"""Of the initial context vectors, CoOp's."""


class PromptContext(Adapter):
    """Class vectors tower([context, tokens of the class's first prompt]); image features stay as they are.

    The frozen text tower takes part in each step: gradients flow through it to the context, [M, width].
    """

    moves_features: ClassVar[bool] = False
    needs_tower: ClassVar[bool] = True

    context: Tensor

    @classmethod
    def initial(cls, method: Method, start: Start) -> dict[str, NDArray[np.float64]]:
        """As in :class:`Adapter`: near zero-shot only as far as the text tower makes little of random vectors.

        Raises:
            StudyError: context and prompts do not fit into the tower.
        """
        tower = _given(start.tower)
        if method.context > tower.room:
            raise StudyError(
                f"method.context = {method.context}: the text tower has room for {tower.room} context vectors beside "
                "the longest first prompt; expected at most so many: lower it, or shorten that prompt"
            )
        return {"context": start.normal(CONTEXT_STD, method.context, tower.width)}

    def adapt(self, features: Tensor) -> Tensor:
        """The features as they are."""
        return features

    def class_vectors(self) -> Tensor:
        """As in :class:`Adapter`."""
        return _given(self.tower).encode(self.context)


def _given(tower: TextTower | None) -> TextTower:
    assert tower is not None, "prompts is built with a text tower"
    return tower

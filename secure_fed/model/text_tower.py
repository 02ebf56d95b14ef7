"""CLIP's frozen text tower as a function of context vectors, for methods that train through it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from secure_fed.core.errors import BackboneError

_PARTS = ("token_embedding", "positional_embedding", "transformer", "ln_final", "text_projection", "attn_mask")


class TextTower:
    """The text tower of an open_clip model, bound to the tokens of one text a class.

    Its weights are the backbone's, known by the digest in the study; the tokens come from ``study.safetensors``. It is
    no torch module, so that a method which holds one does not train or share it.

    Attributes:
        width: of a token's embedding.
        room: how many context vectors fit beside the longest text.
    """

    def __init__(self, model: Any, tokens: NDArray[np.int64]) -> None:
        """Take the tower of a model.

        Args:
            model: open_clip's, frozen and in evaluation mode.
            tokens: int64 [K, context length]: start, text, end, padding.

        Raises:
            BackboneError: the model's text tower is not open_clip's own, or pools otherwise than at the text's end.
        """
        text = getattr(model, "text", model)
        lacking = [part for part in _PARTS if not hasattr(text, part)]
        ends = reads_at(model, torch.from_numpy(tokens))
        if lacking or ends is None:
            pool = getattr(text, "text_pool_type", getattr(text, "pool_type", None))
            found = f"without {', '.join(lacking)}" if lacking else f"pooling by {pool}"
            raise BackboneError(
                f"the backbone's text tower ({type(text).__name__}, {found}) takes no context vectors; expected "
                "open_clip's own, which pools at the end of the text: choose another backbone, or another adapter"
            )
        self._text = text
        self._tokens = torch.from_numpy(tokens)
        self._ends = ends
        self.width = int(text.token_embedding.weight.shape[1])
        self.room = int(tokens.shape[1] - 1 - self._ends.max())

    def encode(self, context: Tensor) -> Tensor:
        """Unit features [K, d] of [start, context, text, end] of each class; differentiable in the context.

        Args:
            context: float32 [M, width], M at most ``room``.
        """
        text, length = self._text, self._tokens.shape[1]
        embedded = text.token_embedding(self._tokens)
        shared = context.expand(len(embedded), *context.shape)
        tokens = torch.cat((embedded[:, :1], shared, embedded[:, 1 : length - len(context)]), dim=1)
        hidden = text.ln_final(text.transformer(tokens + text.positional_embedding, attn_mask=text.attn_mask))
        pooled = hidden[torch.arange(len(hidden)), self._ends + len(context)]
        projection = text.text_projection
        if isinstance(projection, nn.Linear):
            pooled = projection(pooled)
        elif projection is not None:
            pooled = pooled @ projection
        return nn.functional.normalize(pooled, dim=-1)


def reads_at(network: Any, tokens: Tensor) -> Tensor | None:
    """Of each row of tokens, the place at which a text tower takes the text's features.

    Args:
        network: of open_clip.
        tokens: int64 [n, context].

    Returns:
        int64 [n]; None for a tower that takes them otherwise than at the end of a text.
    """
    holder = getattr(network, "text", network)
    pool = getattr(holder, "text_pool_type", getattr(holder, "pool_type", None))
    if getattr(holder, "cls_emb", None) is not None or pool not in ("argmax", "eos"):
        return None
    # The end of text has the highest number of CLIP's vocabulary; others name it.
    end = getattr(holder, "text_eos_id", getattr(holder, "eos_id", None)) if pool == "eos" else None
    return tokens.argmax(1) if end is None else (tokens == end).int().argmax(1)

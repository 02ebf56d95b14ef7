"""The state that a study begins with, as ``study.safetensors``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from secure_fed.core.errors import StudyError
from secure_fed.protocol.basis import Basis


@dataclass(frozen=True)
class InitialState:
    """What ``study.safetensors`` holds: computed once, by ``study new``, and never again.

    Attributes:
        adapter: initial shared parameters by name, float64; the flat order is that of the sorted names.
        prompt_features: unit text features, float32 [classes, d].
        logit_scale: the frozen CLIP's exp(logit_scale).
        prompt_tokens: of a method that trains through the text tower, tokens of each class's first prompt, int64
            [classes, context length]; a site's own tokenizer is not asked.
        basis: of a method that takes statistics of features, their coordinates.
    """

    adapter: dict[str, NDArray[np.float64]]
    prompt_features: NDArray[np.float32]
    logit_scale: float
    prompt_tokens: NDArray[np.int64] | None = None
    basis: Basis | None = None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the shared parameters, by sorted name."""
        return {name: self.adapter[name].shape for name in sorted(self.adapter)}

    def to_bytes(self) -> bytes:
        """The safetensors file."""
        tensors: dict[str, NDArray[Any]] = {f"adapter.{name}": value for name, value in self.adapter.items()}
        tensors["prompt_features"] = self.prompt_features
        tensors["logit_scale"] = np.array([self.logit_scale], dtype=np.float64)
        if self.prompt_tokens is not None:
            tensors["prompt_tokens"] = self.prompt_tokens
        if self.basis is not None:
            tensors |= self.basis.tensors()
        return bytes(safetensors.numpy.save(tensors))

    @classmethod
    def from_bytes(cls, data: bytes) -> InitialState:
        """Read the safetensors file back.

        Raises:
            StudyError: it is not one of ours.
        """
        try:
            tensors = safetensors.numpy.load(data)
            adapter = {
                name.removeprefix("adapter."): value for name, value in tensors.items() if name.startswith("adapter.")
            }
            if broken := sorted(name for name, value in tensors.items() if not np.isfinite(value).all()):
                raise ValueError(f"{', '.join(broken)} not finite, of a backbone that cannot be used")
            prompts = tensors["prompt_features"]
            basis = Basis.of(tensors, prompts.shape[1])
            return cls(adapter, prompts, float(tensors["logit_scale"][0]), tensors.get("prompt_tokens"), basis)
        except (safetensors.SafetensorError, KeyError, ValueError) as error:
            raise StudyError(f"study.safetensors: malformed ({error}); copy it again from the coordinator") from error

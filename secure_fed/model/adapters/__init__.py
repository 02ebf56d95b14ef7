"""The trained part: small adapters on frozen CLIP features, and the losses that train them.

Features are unit rows [n, d]; prompts are unit rows [K, d], one per class of the study, in its order. There are no
buffers, so what a site sends is what its optimiser moved. Each file of this folder without a leading underscore is
one adapter, under the name by which ``method.adapter`` of a study asks for it; docs/add-a-method.md adds one.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from secure_fed.core.errors import StudyError
from secure_fed.model.adapters._base import (
    PRIVATE_HEAD,
    Adapter,
    Start,
    batch_norm,
    class_prompt_loss,
    contrastive_loss,
)
from secure_fed.model.text_tower import TextTower
from secure_fed.protocol.basis import Basis
from secure_fed.protocol.study import StudyFile
from secure_fed.protocol.study_tables import Method

__all__ = [
    "PRIVATE_HEAD",
    "Adapter",
    "batch_norm",
    "build_adapter",
    "check_method",
    "class_prompt_loss",
    "contrastive_loss",
    "ignored",
    "initial_parameters",
    "needs_tower",
    "refuse_idle",
    "uses_basis",
]


def check_method(method: Method) -> None:
    """Refuse a method whose parts do not go together.

    Raises:
        StudyError: a domain term for an adapter that moves no image feature.
    """
    if method.aligns != "none" and not _kind(method).moves_features:
        found, expected = f"method.lmmd_weight = {method.lmmd_weight:g}", "0"
        if method.adaptation is not None:
            found, expected = f'method.adaptation = "{method.adaptation}"', '"none"'
        raise StudyError(
            f"{found}: {method.adapter} moves no image feature, so there is nothing to align; expected {expected}: set "
            "it, or take another adapter"
        )


def ignored(study: StudyFile) -> dict[str, Any]:
    """Settings of a study that its method makes nothing of, by dotted path, with the value under which it is taken."""
    kind = _kind(study.method)
    found: dict[str, Any] = {}
    if study.method.lmmd_weight > 0 and not kind.moves_features:
        found["method.lmmd_weight"] = 0.0
    if study.features.basis != "raw" and not kind.uses_basis:
        found["features"] = {"basis": "raw"}
    return found | {path: usual for path, (_, usual, _) in _idle(study).items()}


def refuse_idle(study: StudyFile) -> None:
    """Refuse settings that somebody has set and that make no difference with the study's method.

    Raises:
        StudyError: naming each.
    """
    lines = [f"{path} = {_said(value)} makes no difference {mend}" for path, (value, _, mend) in _idle(study).items()]
    if lines:
        raise StudyError("; ".join(lines))


def _idle(study: StudyFile) -> dict[str, tuple[Any, Any, str]]:
    """By dotted path what is set though it makes no difference, what it is if nobody sets it, and what to do."""
    method = study.method
    if not method.sums:
        # What study new once wrote of its own accord is no person's wish.
        if method.adversarial_weight is None or method.adaptation is not None or study.initial is not None:
            return {}
        mend = 'without adaptation = "adversarial"; expected both, or neither: set that, or leave it out'
        return {"method.adversarial_weight": (method.adversarial_weight, None, mend)}
    pairs = {
        "encoding.share_validation": (study.encoding.share_validation, True),
        "privacy.validation_rounds": (study.privacy.validation_rounds, 0),
    }
    mend = f"with {method.adapter}; expected {{}}: leave it out, since sites send no validation counts beside sums"
    return {path: (value, usual, mend.format(_said(usual))) for path, (value, usual) in pairs.items() if value != usual}


def _said(value: Any) -> str:
    return str(value).lower()  # as TOML has it


def uses_basis(study: StudyFile) -> bool:
    """Whether the study's method sees features in the study's basis.

    Raises:
        StudyError: it does not, but the study asks for another basis than the backbone's own.
    """
    kind, own = _kind(study.method), study.features.basis == "raw"
    if not own and not (kind.uses_basis or kind.may_use_basis):
        raise StudyError(
            f'features.basis = "{study.features.basis}": {study.method.adapter} sees features as the backbone gives '
            'them; expected "raw": leave [features] out, or take another adapter'
        )
    if not own and study.method.loss == "contrastive":
        raise StudyError(
            f'features.basis = "{study.features.basis}": the contrastive loss compares features with class vectors, '
            'which are not trained there; expected loss = "class_prompt", or "raw": leave [features] out'
        )
    return kind.uses_basis or not own


def needs_tower(method: Method) -> bool:
    """Whether the method trains through the frozen text tower."""
    return _kind(method).needs_tower


def initial_parameters(
    method: Method,
    dim: int,
    prompt_features: NDArray[np.float32],
    seed: int,
    tower: TextTower | None = None,
    dimensions: int | None = None,
    bank: Mapping[str, NDArray[np.float64]] | None = None,
) -> dict[str, NDArray[np.float64]]:
    """Where training starts, at or (``facmic``, ``fedclip``, ``prompts``) near zero-shot; shared parameters only.

    Args:
        method: which adapter.
        dim: width d of the features.
        prompt_features: unit rows [K, d].
        seed: 0 or more, below 2**63; the global random state is not used.
        tower: the text tower, for adapters that need it.
        dimensions: of the study's basis, for adapters that use it; d if not given.
        bank: where a memory starts, of a study of anomalies.

    Returns:
        Arrays by sorted name.

    Raises:
        StudyError: as :func:`check_method`; or the context does not fit into the tower.
    """
    check_method(method)
    parameters = _kind(method).initial(method, Start(dim, prompt_features, seed, tower, dimensions or dim, bank))
    return dict(sorted(parameters.items()))


def build_adapter(
    method: Method,
    prompt_features: NDArray[np.float32],
    logit_scale: float,
    parameters: Mapping[str, NDArray[np.float64]],
    tower: TextTower | None = None,
    basis: Basis | None = None,
) -> Adapter:
    """The adapter with these parameters, in float32 and training mode.

    Args:
        method: which adapter.
        prompt_features: unit rows [K, d].
        logit_scale: the frozen CLIP's exp(logit_scale).
        parameters: by name, as :func:`initial_parameters` gives them, and at a site perhaps its private head; copied.
        tower: the text tower, for adapters that need it.
        basis: the study's, if it has one.

    Raises:
        StudyError: as :func:`check_method`.
    """
    check_method(method)
    return _kind(method)(method, prompt_features, logit_scale, parameters, tower, basis)


def _kind(method: Method) -> type[Adapter]:
    """The one class that the adapter's file defines."""
    module = import_module(f"{__name__}.{method.adapter}")
    (kind,) = (
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Adapter) and value.__module__ == module.__name__
    )
    return kind

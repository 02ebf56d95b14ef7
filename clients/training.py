"""One round's local training on cached features, and what a trained adapter predicts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import softmax

from clients.adaptation import lmmd
from clients.features import SiteFeatures
from secure_fed.adapters import Adapter, build_adapter, class_prompt_loss, contrastive_loss
from secure_fed.errors import DataError
from secure_fed.study import AgreedStudy, Method, Training

Parameters = Mapping[str, NDArray[np.float64]]


def train_round(
    agreed: AgreedStudy,
    parameters: Parameters,
    features: SiteFeatures,
    seed: int,
) -> dict[str, NDArray[np.float64]]:
    """Train for ``training.steps`` mini-batches, from a fresh optimiser state.

    A mini-batch is the next ``batch_size`` images of a shuffled pass over the site's training images, or what is
    left of the pass. With ``lmmd_weight``, each is aligned to a mini-batch of the site's own unlabelled images,
    whose classes the adapter guesses; a site without any goes on without this term. The same arguments on one
    machine with one number of threads give the same bits; the global random state is not used.

    Args:
        agreed: method, training settings and prompts.
        parameters: where to start, by name; left as they are.
        features: the site's.
        seed: of the order of the images; another one for each round.

    Returns:
        The parameters after training, by sorted name; a value that training did not move is exactly the one
        given. They may be non-finite if training diverged.

    Raises:
        DataError: the site has no training image.
    """
    method, initial = agreed.study.method, agreed.initial
    if len(features.train.y) == 0:
        raise DataError("no labelled training image; expected at least one: add some, or join the study as an observer")
    adapter = build_adapter(method, initial.prompt_features, initial.logit_scale, parameters)
    before = {name: value.detach().clone() for name, value in adapter.shared_parameters().items()}
    _descend(adapter, method, agreed.study.training, features, seed)
    after = adapter.shared_parameters()
    # Training is in float32; only the difference comes back, so that rounding the start is no update.
    return {name: parameters[name] + (after[name].detach().double() - before[name].double()).numpy() for name in after}


def predict(
    agreed: AgreedStudy,
    parameters: Parameters,
    x: NDArray[np.float32],
    statistics_from: NDArray[np.float32] | None,
) -> NDArray[np.float64]:
    """Probabilities [n, K] that an adapter gives to features x [n, d].

    Args:
        agreed: method and prompts.
        parameters: of the adapter, by name.
        x: unit rows [n, d].
        statistics_from: the site's own training features, for batch norm; others need none.
    """
    initial = agreed.initial
    adapter = build_adapter(agreed.study.method, initial.prompt_features, initial.logit_scale, parameters)
    adapter.eval()
    with torch.inference_mode():
        if statistics_from is not None:
            adapter.set_statistics(torch.from_numpy(statistics_from))
        return np.asarray(softmax(adapter.logits(torch.from_numpy(x)).double(), dim=1).numpy())


def zero_shot(agreed: AgreedStudy, x: NDArray[np.float32]) -> NDArray[np.float64]:
    """Probabilities [n, K] that the frozen CLIP gives to unit features x [n, d], by the prompts alone."""
    initial = agreed.initial
    logits = initial.logit_scale * (x.astype(np.float64) @ initial.prompt_features.T.astype(np.float64))
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))


def _descend(adapter: Adapter, method: Method, training: Training, features: SiteFeatures, seed: int) -> None:
    x, y = torch.from_numpy(features.train.x), torch.from_numpy(features.train.y)
    unlabelled = torch.from_numpy(features.unlabelled)
    counts = torch.bincount(y, minlength=len(adapter.prompts))
    log_prior = torch.log(counts / len(y))
    sources = _batches(len(y), training.batch_size, np.random.default_rng([seed, 0]))
    # Their own order, so that unlabelled images do not change that of the labelled ones.
    targets = _batches(len(unlabelled), training.batch_size, np.random.default_rng([seed, 1]))
    aligns = method.lmmd_weight > 0 and len(unlabelled) > 0
    optimizer = _optimizer(adapter, training)
    adapter.train()
    for _ in range(training.steps):
        chosen = next(sources)
        labels = y[chosen]
        adapted = adapter.adapt(x[chosen])
        if method.loss == "contrastive":
            loss = contrastive_loss(adapted, labels, adapter.class_vectors(), adapter.logit_scale).mean()
        else:
            loss = class_prompt_loss(adapter.compare(adapted), labels, log_prior).mean()
        if aligns:
            target = unlabelled[next(targets)]
            with torch.no_grad():
                guesses = softmax(adapter.logits(target), dim=1)
            loss = loss + method.lmmd_weight * lmmd(adapted, labels, target, guesses)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def _optimizer(adapter: Adapter, training: Training) -> torch.optim.Optimizer:
    parameters = list(adapter.shared_parameters().values())
    if training.optimizer == "adam":
        # Adam with L2 in the gradient, as in FACMIC, not AdamW.
        return torch.optim.Adam(
            parameters,
            lr=training.learning_rate,
            betas=training.betas,
            eps=training.epsilon,
            weight_decay=training.weight_decay,
            fused=True,
        )
    return torch.optim.SGD(
        parameters,
        lr=training.learning_rate,
        momentum=training.momentum,
        weight_decay=training.weight_decay,
        fused=True,
    )


def _batches(count: int, size: int, generator: np.random.Generator) -> Iterator[Tensor]:
    """Index batches of endless shuffled passes; each pass ends with what is left."""
    while True:
        order = torch.from_numpy(generator.permutation(count))
        for start in range(0, count, size):
            yield order[start : start + size]

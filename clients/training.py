"""One round's local training on cached features, and what a trained adapter predicts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import nullcontext

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import softmax

from secure_fed.clients import memory, one_sum
from secure_fed.clients.adversary import Discriminator
from secure_fed.clients.features import SiteFeatures
from secure_fed.clients.lmmd import lmmd
from secure_fed.core.errors import DataError
from secure_fed.model.adapters import PRIVATE_HEAD, Adapter, build_adapter, class_prompt_loss, contrastive_loss
from secure_fed.model.device import Device
from secure_fed.model.text_tower import TextTower
from secure_fed.protocol import aggregation, codec
from secure_fed.protocol import memory as bank
from secure_fed.protocol.codec import Parameters
from secure_fed.protocol.study import AgreedStudy
from secure_fed.protocol.study_tables import Method, Training


def train_round(
    agreed: AgreedStudy,
    parameters: Parameters,
    features: SiteFeatures,
    seed: int,
    tower: TextTower | None = None,
    device: Device = "cpu",
) -> Parameters:
    """Train for ``training.steps`` mini-batches, from a fresh optimiser state.

    A mini-batch is the next ``batch_size`` images of a shuffled pass over the site's training images, or what is
    left of the pass. With a domain term, each is aligned to a mini-batch of the site's own unlabelled
    images; a site without any goes on without this term. The same arguments on one
    machine with one number of threads give the same bits; the global random state is not used.

    Args:
        agreed: method, training settings and prompts.
        parameters: where to start, by name; left as they are. With a private head, it is among them unless it is to
            start at 0.
        features: the site's.
        seed: of the order of the images; another one for each round.
        tower: the frozen text tower, for methods that need it; these train on the CPU, where it is.
        device: where to compute.

    Returns:
        The parameters after training, by sorted name, the private head included; a value that training did not move
        is exactly the one given. They may be non-finite if training diverged.

    Raises:
        DataError: the site has no training image.
    """
    method, initial = agreed.study.method, agreed.initial
    if len(features.train.y) == 0:
        raise DataError("no labelled training image; expected at least one: add some, or join the study as an observer")
    if method.private_head and PRIVATE_HEAD not in parameters:
        parameters = {**parameters, PRIVATE_HEAD: np.zeros(initial.prompt_features.shape)}
    # All that is made in here lies there. Only where it is needed: it passes every call through Python.
    elsewhere = tower is None and device != "cpu"
    with torch.device(device) if elsewhere else nullcontext():
        adapter = build_adapter(method, initial.prompt_features, initial.logit_scale, parameters, tower, initial.basis)
        after = dict(sorted(adapter.named_parameters()))
        before = {name: value.detach().clone() for name, value in after.items()}
        _descend(adapter, method, agreed.study.training, features, seed)
    # Training is in float32; only the difference comes back, so that rounding the start is no update.
    moved = {name: after[name].detach().double() - before[name].double() for name in after}
    return {name: parameters[name] + difference.cpu().numpy() for name, difference in moved.items()}


def train_alone(
    agreed: AgreedStudy, features: SiteFeatures, name: str, tower: TextTower | None = None, device: Device = "cpu"
) -> Parameters:
    """An adapter trained on one site's features alone: rounds, steps, settings and aggregation as in the federation.

    Args:
        agreed: the study, or one like it with another method.
        features: the site's, or several sites' together.
        name: whose order of images to take.
        tower: the frozen text tower, for methods that need it.
        device: where to compute.

    Raises:
        DataError: as :func:`train_round`.
    """
    if agreed.study.task == "anomaly":
        return memory.alone(agreed, features)
    if agreed.study.method.one_sum:
        return one_sum.alone(agreed, features)
    rule = agreed.study.aggregation
    state = aggregation.initial_state(rule, agreed.initial.adapter)
    private: Parameters = {}
    for round_number in range(1, agreed.study.rounds + 1):
        adapter = aggregation.adapter_of(state)
        seed = training_seed(agreed.study.seed, "", name, round_number)
        trained = train_round(agreed, {**adapter, **private}, features, seed, tower, device)
        private = {PRIVATE_HEAD: trained.pop(PRIVATE_HEAD)} if PRIVATE_HEAD in trained else {}
        state = aggregation.apply(rule, state, codec.flatten(trained) - codec.flatten(adapter))
    return aggregation.result_of(state) | private


def training_seed(seed: int, run: str, site: str, round_number: int) -> int:
    """Seed of one site's training in one round of a run, in [0, 2**63); of training outside of a run if that is empty.

    Two runs train differently: from the difference of two sums with one site more, its update could be had, bit for
    bit, if it came again.
    """
    context = f"secfacmic training 2\n{seed}\n{run}\n{site}\n{round_number}".encode()
    return int.from_bytes(hashlib.sha256(context).digest()[:8], "big") >> 1


def predict(
    agreed: AgreedStudy,
    parameters: Parameters,
    x: NDArray[np.float32],
    statistics_from: NDArray[np.float32] | None,
    tower: TextTower | None = None,
) -> NDArray[np.float64]:
    """Probabilities [n, K] that an adapter gives to features x [n, d].

    Args:
        agreed: method and prompts.
        parameters: of the adapter, by name; with the site's private head, if it is to take part.
        x: unit rows [n, d].
        statistics_from: the site's own training features, for batch norm; others need none.
        tower: the frozen text tower, for methods that need it.
    """
    if agreed.study.task == "anomaly":
        method = agreed.study.method
        return bank.probabilities(parameters, x, method.top, method.false_alarms)
    initial = agreed.initial
    adapter = build_adapter(
        agreed.study.method, initial.prompt_features, initial.logit_scale, parameters, tower, initial.basis
    )
    adapter.eval()
    with torch.inference_mode():
        if statistics_from is not None:
            adapter.set_statistics(torch.from_numpy(statistics_from))
        return np.asarray(softmax(adapter.logits(torch.from_numpy(x)).double(), dim=1).numpy())


def zero_shot(agreed: AgreedStudy, x: NDArray[np.float32]) -> NDArray[np.float64]:
    """Probabilities [n, K] that the frozen CLIP gives to unit features x [n, d], by the prompts alone.

    Of a study of anomalies those of the centroids where they start.
    """
    initial = agreed.initial
    if agreed.study.task == "anomaly":
        return predict(agreed, initial.adapter, x, None)
    logits = initial.logit_scale * (x.astype(np.float64) @ initial.prompt_features.T.astype(np.float64))
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))


def _descend(adapter: Adapter, method: Method, training: Training, features: SiteFeatures, seed: int) -> None:
    device = adapter.prompts.device
    x, y = torch.from_numpy(features.train.x).to(device), torch.from_numpy(features.train.y).to(device)
    unlabelled = torch.from_numpy(features.unlabelled).to(device)
    counts = torch.bincount(y, minlength=len(adapter.prompts))
    log_prior = torch.log(counts / len(y))
    sources = _batches(len(y), training.batch_size, np.random.default_rng([seed, 0]))
    # Their own order, so that unlabelled images do not change that of the labelled ones.
    targets = _batches(len(unlabelled), training.batch_size, np.random.default_rng([seed, 1]))
    aligns = method.aligns if len(unlabelled) > 0 else "none"
    start = {name: value.detach().clone() for name, value in adapter.shared_parameters().items()}
    learned = [value for _, value in sorted(adapter.named_parameters())]
    if aligns == "adversarial":
        discriminator = Discriminator(adapter.prompts.shape[1], seed)
        learned += discriminator.parameters()
    optimizer = _optimizer(learned, training)
    adapter.train()
    for _ in range(training.steps):
        chosen = next(sources)
        labels = y[chosen]
        adapted = adapter.adapt(x[chosen])
        if method.loss == "contrastive":
            loss = contrastive_loss(adapted, labels, adapter.class_vectors(), adapter.logit_scale).mean()
        else:
            loss = class_prompt_loss(adapter.compare(adapted), labels, log_prior).mean()
        if method.private_head:
            # What is shared must serve sites without this head too, so both logits are trained, in equal parts.
            personal = adapter.compare(adapted) + adapter.head_logits(adapted)
            loss = (loss + class_prompt_loss(personal, labels, log_prior).mean()) / 2
        if training.prox > 0:
            moved = [(value - start[name]).square().sum() for name, value in adapter.shared_parameters().items()]
            loss = loss + training.prox / 2 * torch.stack(moved).sum()
        if aligns == "lmmd":
            target = unlabelled[next(targets)]
            with torch.no_grad():
                guesses = softmax(adapter.logits(target), dim=1)
            loss = loss + method.domain_weight * lmmd(adapted, labels, target, guesses)
        elif aligns == "adversarial":
            target = adapter.adapt(unlabelled[next(targets)])
            loss = loss + method.domain_weight * discriminator.domain_term(adapted, target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def _optimizer(parameters: list[torch.nn.Parameter], training: Training) -> torch.optim.Optimizer:
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

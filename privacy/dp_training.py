"""Full-batch descent whose gradients are clipped patient by patient and noised.

Everything is float64: a patient's contribution is then bounded by the clipping norm up to about 1e-12, also after
matrix products over all patients whose rounding depends on who takes part.

One patient's gradient is that of the mean loss over its images. Its norm is found without forming it: for a linear
layer with inputs a_i and output gradients b_i of a patient's images it is sum_ij (a_i.a_j)(b_i.b_j), the ghost norm
(Goodfellow, arXiv 1510.01799; Li et al., arXiv 2110.05679). The clipped sum is one product of activations and scaled
output gradients. Opacus' ``GradSampleModule`` gives the same by forming every patient's gradient; it is the oracle.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from secure_fed.core.errors import PrivateMethodError
from secure_fed.model.adapters import Adapter, class_prompt_loss
from secure_fed.privacy.accounting import Noise, gaussian_noise
from secure_fed.protocol.study_tables import Method, PrivateTraining

CHUNK = 4096
"""Images whose activations are in memory at once; a patient with more is taken alone."""

Gradients = dict[str, Tensor]
"""One float64 tensor a shared parameter, by name."""


class PatientBatch(NamedTuple):
    """Patients of a site: ``features`` [n, I, d] float64, ``labels`` [n, I] int64, ``mask`` [n, I] bool.

    ``mask`` says which of a patient's I places hold an image. :func:`gather_patients` makes batches without empty
    places.
    """

    features: Tensor
    labels: Tensor
    mask: Tensor

    def choose(self, rows: Tensor | slice) -> PatientBatch:
        """Some of the patients."""
        return PatientBatch(self.features[rows], self.labels[rows], self.mask[rows])


PatientLoss = Callable[[Callable[[Tensor], Tensor], PatientBatch], Tensor]
"""Losses [n] of the patients, given the adapter as a function from features [n, I, d] to logits [n, I, K]."""


Patients = Sequence[PatientBatch]
"""All patients of a sum, in batches; none is nobody."""


def gather_patients(
    features: NDArray[np.float32], labels: NDArray[np.int64], patients: Sequence[str], images_per_patient: int
) -> Patients:
    """Images by patient, at most ``images_per_patient`` of each, the first ones given.

    Patients with equally many images form a batch, so that work and memory follow the images: padded to the longest,
    one patient with many images would slow down everybody's step, which an observer can time.

    Args:
        features: [m, d], one row an image.
        labels: [m], likewise.
        patients: whose each row is; length m.
        images_per_patient: a public constant.
    """
    rows: dict[str, list[int]] = {}
    for index, patient in enumerate(patients):
        chosen = rows.setdefault(patient, [])
        if len(chosen) < images_per_patient:
            chosen.append(index)
    by_size: dict[int, list[list[int]]] = {}
    for chosen in rows.values():
        by_size.setdefault(len(chosen), []).append(chosen)
    return tuple(
        PatientBatch(
            torch.from_numpy(features[group]).double(),
            torch.from_numpy(labels[group]),
            torch.ones(len(group), size, dtype=torch.bool),
        )
        for size, group in sorted(by_size.items())
    )


ImageTerm = Callable[[Tensor, Tensor], Tensor]
"""A term of each image's loss, [n, I], given adapted features [n, I, d] and labels [n, I]; else it uses constants."""


def class_prompt_patient_loss(log_prior: Tensor, term: ImageTerm | None = None) -> PatientLoss:
    """The mean of :func:`secure_fed.model.adapters.class_prompt_loss` over each patient's images.

    Args:
        log_prior: [K], of a public prior; one from the site's own class counts would be a leak
            (docs/decisions/0007-full-batch-descent.md).
        term: added to each image's loss; the adapter must then have ``shows_adapted`` set.
    """
    classes = len(log_prior)

    def loss(forward: Callable[[Tensor], Tensor], batch: PatientBatch) -> Tensor:
        outputs = forward(batch.features)
        logits = outputs[..., :classes].flatten(0, 1)
        each = class_prompt_loss(logits, batch.labels.flatten(), log_prior).view(batch.mask.shape)
        if term is not None:
            each = each + term(outputs[..., classes:], batch.labels)
        return torch.where(batch.mask, each, 0.0).sum(1) / batch.mask.sum(1).clamp_min(1)

    return loss


def public_log_prior(settings: PrivateTraining, classes: int) -> Tensor:
    """The study's prior, or the uniform one, as logarithms [K] float64."""
    prior = settings.prior or (1 / classes,) * classes
    return torch.log(torch.tensor(prior, dtype=torch.float64))


def refuse_method(method: Method) -> None:
    """Refuse what per-patient clipping cannot make private.

    Raises:
        PrivateMethodError: with the reason and what to use instead.
    """
    if method.loss == "contrastive":
        raise PrivateMethodError(
            'method.loss = "contrastive" under differential privacy: each image\'s loss depends on the whole batch, '
            "so one patient changes everybody's gradient: removing one example moved the clipped sum by up to "
            "18 times the clipping norm C (B = 128), and epsilon 3 would in truth be several hundred; expected "
            'loss = "class_prompt", whose gradient is that of the paper\'s image-to-text half'
        )
    if method.private_head:
        raise PrivateMethodError(
            "method.private_head under differential privacy: the head is trained without noise and stands between "
            "the images and the adapter's gradient, so one patient moved the clipped sum by 4.4 times the clipping "
            "norm C; expected false"
        )
    if method.aligns == "adversarial":
        raise PrivateMethodError(
            'method.adaptation = "adversarial" under differential privacy: the discriminator is trained without noise '
            "on all patients together and its gradient reaches the gate, so that one patient changes everybody's "
            'gradient, step by step; expected "lmmd", which uses released class means, or "none"'
        )
    if method.adapter == "prompts":
        raise PrivateMethodError(
            'method.adapter = "prompts" under differential privacy: gradients pass through the text tower, where they '
            "cannot be clipped patient by patient; expected text_head, which also trains class vectors"
        )
    if method.adapter == "facmic" and method.norm == "batch":
        raise PrivateMethodError(
            'method.norm = "batch" under differential privacy: batch statistics mix the patients (one moved the '
            "clipped sum by 4.4 times the clipping norm C, also without affine parameters, while the contrastive "
            'loss reaches 18 C), and running statistics leave un-noised; expected norm = "layer"'
        )


def to_double(adapter: Adapter) -> Adapter:
    """The adapter itself, its parameters and prompts turned to float64."""
    adapter.double()
    adapter.prompts = adapter.prompts.double()
    return adapter


def clipped_sum(adapter: Adapter, batch: PatientBatch, loss: PatientLoss, clip: float) -> Gradients:
    """The sum over patients of their gradients, each clipped to L2 norm ``clip`` over all shared parameters.

    A patient without images, or whose gradient is not finite, contributes zero.

    Args:
        adapter: float64; uses each parameter once, in ``linear`` or ``layer_norm``, or on the way to the weight of
            a ``linear`` (as class vectors are made of offsets).
        batch: any number of patients, none included.
        loss: each patient's must depend on that patient alone; the guard checks it.
        clip: C, above 0.

    Raises:
        PrivateMethodError: the adapter uses a parameter in another way.
    """
    total = {
        name: torch.zeros_like(parameter, requires_grad=False)
        for name, parameter in adapter.shared_parameters().items()
    }
    size = max(1, CHUNK // max(1, batch.mask.shape[1]))
    for start in range(0, len(batch.mask), size):
        for name, part in _clip_chunk(adapter, batch.choose(slice(start, start + size)), loss, clip):
            total[name] += part
    return total


def clipped_sum_by_hooks(adapter: Adapter, batch: PatientBatch, loss: PatientLoss, clip: float) -> Gradients:
    """As :func:`clipped_sum`, by Opacus' ``GradSampleModule``, which forms every patient's gradient.

    Needs n times the adapter's size in memory: for small adapters, and to check the other one.
    """
    from opacus import GradSampleModule  # seconds, which a site without a budget need not wait for

    model = GradSampleModule(copy.deepcopy(adapter), loss_reduction="sum")
    with warnings.catch_warnings():  # features carry no gradient, which is meant: nothing before the adapter trains
        warnings.filterwarnings("ignore", "Full backward hook is firing")
        loss(model, batch).sum().backward()  # type: ignore[no-untyped-call]
    gradients = {name: value.grad_sample.double() for name, value in model._module.named_parameters()}
    squares = sum(value.flatten(1).square().sum(1) for value in gradients.values())
    factors = _factors(torch.as_tensor(squares), clip)
    return {
        name: torch.einsum("n,n...->...", factors, _zero_rows(value, factors))
        for name, value in sorted(gradients.items())
    }


@dataclass(frozen=True)
class Descent:
    """One round of noisy steps.

    Attributes:
        settings: the study's public constants.
        noise_std: of the noise on a clipped sum, in the sum's units (noise multiplier times clip).
        n_ref: declared number of training patients, the divisor of the mean; never the true number.
        noise: where noise comes from; anything but the default is for rehearsals and tests.
    """

    settings: PrivateTraining
    noise_std: float
    n_ref: int
    noise: Noise = gaussian_noise

    def run(
        self,
        adapter: Adapter,
        patients: Patients,
        loss: PatientLoss,
        public_gradient: Callable[[Adapter], Gradients] | None = None,
    ) -> None:
        """Take ``settings.steps`` steps; the adapter's parameters, and nothing else, change.

        Args:
            adapter: float64.
            patients: the site's training patients.
            loss: as for :func:`clipped_sum`.
            public_gradient: of a term that depends on released figures only, added to each noisy mean.
        """
        optimizer = self._optimizer(adapter.shared_parameters().values())
        for _ in range(self.settings.steps):
            noisy = self.noisy_sum(adapter, patients, loss)
            public = public_gradient(adapter) if public_gradient else {}
            for name, parameter in adapter.shared_parameters().items():
                parameter.grad = noisy[name] / self.n_ref
                if name in public:
                    parameter.grad += public[name]
            optimizer.step()

    def noisy_sum(self, adapter: Adapter, patients: Patients, loss: PatientLoss) -> Gradients:
        """A clipped sum with fresh noise: what the optimiser, and so everybody, may see of the patients."""
        total = {
            name: torch.zeros_like(parameter, requires_grad=False)
            for name, parameter in adapter.shared_parameters().items()
        }
        for batch in patients:
            for name, part in clipped_sum(adapter, batch, loss, self.settings.clip).items():
                total[name] += part
        for value in total.values():
            value += torch.from_numpy(self.noise(value.numel(), self.noise_std)).view(value.shape)
        return total

    def _optimizer(self, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
        settings = self.settings
        if settings.optimizer == "adam":
            return torch.optim.Adam(parameters, lr=settings.learning_rate)
        return torch.optim.SGD(parameters, lr=settings.learning_rate, momentum=settings.momentum)


# --- ghost norms ---


@dataclass(frozen=True)
class _Use:
    """One call of linear or layer_norm with a trained weight.

    ``direct``: the weight is a shared parameter itself. ``elementwise``: a layer norm, ``inputs`` normalised.
    """

    weight: Tensor
    bias: Tensor | None
    inputs: Tensor
    outputs: Tensor
    direct: bool
    elementwise: bool


class _Tape(TorchFunctionMode):
    """Records how the adapter's parameters are used while it runs."""

    def __init__(self, names: dict[Tensor, str]) -> None:
        super().__init__()
        self.names = names
        self.uses: list[_Use] = []
        self._inside = False

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._inside or func not in (functional.linear, functional.layer_norm):
            return func(*args, **kwargs)
        with self._paused():
            outputs = func(*args, **kwargs)
            if func is functional.linear:
                self._take_linear(outputs, *args, **kwargs)
            else:
                self._take_norm(outputs, *args, **kwargs)
        return outputs

    @contextmanager
    def _paused(self) -> Iterator[None]:
        self._inside = True
        try:
            yield
        finally:
            self._inside = False

    def _take_linear(self, outputs: Tensor, inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
        if weight.requires_grad:
            self.uses.append(_Use(weight, bias, inputs.detach(), outputs, weight in self.names, elementwise=False))

    def _take_norm(
        self, outputs: Tensor, inputs: Tensor, shape: Any, weight: Tensor, bias: Tensor, eps: float = 1e-5
    ) -> None:
        normal = functional.layer_norm(inputs.detach(), shape, None, None, eps)
        self.uses.append(_Use(weight, bias, normal, outputs, direct=True, elementwise=True))


def _clip_chunk(adapter: Adapter, batch: PatientBatch, loss: PatientLoss, clip: float) -> Iterator[tuple[str, Tensor]]:
    """Parts of the clipped sum, by parameter."""
    parameters = adapter.shared_parameters()
    names: dict[Tensor, str] = {parameter: name for name, parameter in parameters.items()}
    with torch.enable_grad(), _Tape(names) as tape:
        losses = loss(adapter, batch)
    uses = tape.uses
    backward = torch.autograd.grad(losses.sum(), [use.outputs for use in uses], retain_graph=True)
    formed = [_formed(use, output, names) for use, output in zip(uses, backward, strict=True)]
    _check_uses(uses, formed, names)
    squares = torch.zeros(len(batch.mask), dtype=torch.float64)
    for use, output, gradients in zip(uses, backward, formed, strict=True):
        if gradients is None:
            squares += _ghost_square(use, output)
        else:
            squares += sum(value.flatten(1).square().sum(1) for value in gradients.values())
    factors = _factors(squares, clip)
    for use, output, gradients in zip(uses, backward, formed, strict=True):
        if gradients is not None:
            for name, value in gradients.items():
                yield name, torch.einsum("n,n...->...", factors, _zero_rows(value, factors))
            continue
        scaled = _zero_rows(output, factors) * factors[:, None, None]
        yield names[use.weight], scaled.flatten(0, 1).T @ _zero_rows(use.inputs, factors).flatten(0, 1)
        if use.bias is not None:
            yield names[use.bias], scaled.sum((0, 1))


def _formed(use: _Use, output: Tensor, names: dict[Tensor, str]) -> dict[str, Tensor] | None:
    """Every patient's gradient [n, ...] where it is small and must be formed; None where its ghost norm will do."""
    if use.elementwise:
        formed = {names[use.weight]: (output * use.inputs).sum(1)}
        return formed | ({} if use.bias is None else {names[use.bias]: output.sum(1)})
    if use.direct:
        return None
    by_weight = torch.einsum("nio,nij->noj", output, use.inputs)
    found = torch.autograd.grad(
        use.weight, list(names), by_weight, is_grads_batched=True, retain_graph=True, allow_unused=True
    )
    return {name: value for name, value in zip(names.values(), found, strict=True) if value is not None}


def _check_uses(uses: Sequence[_Use], formed: Sequence[dict[str, Tensor] | None], names: dict[Tensor, str]) -> None:
    used: list[str] = []
    for use, gradients in zip(uses, formed, strict=True):
        if gradients is not None:
            used += gradients
        else:
            used += [names[use.weight]] + ([] if use.bias is None else [names[use.bias]])
    if sorted(used) != sorted(names.values()):
        raise PrivateMethodError(
            f"the adapter uses the parameters {sorted(used)} in linear layers and layer norms; expected each of "
            f"{sorted(names.values())} exactly once: its per-patient gradients cannot be clipped"
        )


def _ghost_square(use: _Use, output: Tensor) -> Tensor:
    """Squared gradient norm of each patient [n] for a linear layer's weight and bias, never too small.

    Where a patient's images cancel, what is left of the products may be their rounding alone, so that its bound is
    added: (m + o + I^2) eps (sum_i |a_i||b_i|)^2 for I images, m inputs and o outputs.
    """
    norms: Tensor = torch.linalg.vector_norm(output, dim=2) * torch.linalg.vector_norm(use.inputs, dim=2)
    if output.shape[1] == 1:
        square = norms.square().sum(1)
    else:
        terms = use.inputs.shape[2] + output.shape[2] + output.shape[1] ** 2
        products = (output @ output.mT) * (use.inputs @ use.inputs.mT)
        square = products.sum((1, 2)).clamp_min(0) + terms * torch.finfo(torch.float64).eps * norms.sum(1).square()
    return square if use.bias is None else square + output.sum(1).square().sum(1)


def _factors(squares: Tensor, clip: float) -> Tensor:
    """min(1, C / norm), [n]; 0 for a gradient that is not finite."""
    norms = squares.detach().sqrt()
    return torch.where(norms.isfinite(), clip / norms.clamp_min(clip), 0.0)


def _zero_rows(values: Tensor, factors: Tensor) -> Tensor:
    """The values [n, ...] without those patients that contribute nothing: 0 times NaN would be NaN."""
    if bool((factors > 0).all()):
        return values
    return torch.where((factors > 0).view(-1, *(1,) * (values.dim() - 1)), values, 0.0)

"""The run-time guard: the training code that is about to run, checked on synthetic data before any budget is touched.

It treats the adapter, loss, clipping and noise as a black box and measures what the proof needs (docs/privacy.md,
"What the guard measures"): a
patient's clipped gradient depends on that patient alone, no patient moves the sum by more than the clipping norm,
the noise is what the ledger will be told, and nothing but noised parameters changes or could be shared.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from secure_fed.core.errors import GuardError
from secure_fed.model.adapters import Adapter
from secure_fed.privacy.accounting import Noise
from secure_fed.privacy.dp_training import (
    Descent,
    Gradients,
    PatientBatch,
    PatientLoss,
    clipped_sum,
    clipped_sum_by_hooks,
)

TOLERANCE = 1e-5
"""Relative to the clipping norm; float64 leaves four orders of magnitude of room."""

ADVERSARIAL_ROWS = 50
NOISE_DRAWS = 200_000
"""At which 1 % in the standard deviation is more than six standard errors."""

FALSE_ALARM = 1e-9
"""Chance with which a right noise generator is refused by its distribution test."""

_PATIENTS, _IMAGES = 8, 2

ClippedSum = Callable[[Adapter, PatientBatch, PatientLoss, float], Gradients]


def check_training(
    adapter: Adapter,
    loss: PatientLoss,
    descent: Descent,
    clipped: ClippedSum = clipped_sum,
) -> None:
    """Check everything that is about to train on patients; returns only if all of it holds.

    Args:
        adapter: as it will be trained, float64; a copy is used.
        loss: as it will be used.
        descent: as it will be run.
        clipped: the clipped sum; another than the real one is for the tests of this guard.

    Raises:
        GuardError: naming the first thing that does not hold, with its measure.
    """
    adapter = copy.deepcopy(adapter)
    adapter.train()
    check_structure(adapter)
    check_noise(descent.noise, descent.noise_std)
    _Sensitivity(adapter, loss, descent.settings.clip, clipped).check()
    _check_steps(adapter, loss, descent)


def check_structure(adapter: Adapter) -> None:
    """Refuse state that is neither a constant nor noised.

    Raises:
        GuardError: buffers, running statistics, batch norm, or trained parameters that are not shared.
    """
    buffers = [name for name, _ in adapter.named_buffers()]
    if buffers:
        raise GuardError(
            f"the adapter has buffers {', '.join(buffers)}, which training fills with un-noised statistics; "
            "expected none: keep them out of the module, or release them with noise"
        )
    for name, module in adapter.named_modules():
        # Opacus' validator passes over batch norm without affine parameters; it mixes patients all the same.
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm) or getattr(module, "track_running_stats", False):
            raise GuardError(
                f"module {name or type(module).__name__} is a {type(module).__name__}: batch statistics mix the "
                "patients (4.4 times the clipping norm, also without affine parameters); expected layer norm"
            )
    shared = {id(parameter) for parameter in adapter.shared_parameters().values()}
    private = [name for name, value in adapter.named_parameters() if value.requires_grad and id(value) not in shared]
    if private:
        raise GuardError(
            f"parameters {', '.join(private)} are trained but not shared: un-noised local state on the gradient path "
            "moved the clipped sum by 4.4 times the clipping norm; expected every trained parameter to be noised"
        )


def check_noise(noise: Noise, std: float) -> None:
    """Refuse noise that is too small, not Gaussian, or comes back.

    Args:
        noise: the source.
        std: what the ledger will be told.

    Raises:
        GuardError: with what was measured.
    """
    with torch.random.fork_rng(devices=[]):
        state = np.random.get_state()
        draws = []
        try:
            for _ in range(2):  # the same seeds before both: what comes from a seedable generator comes back
                torch.manual_seed(0)
                np.random.seed(0)
                draws.append(noise(NOISE_DRAWS // 2, std) / std)
        finally:
            np.random.set_state(state)
    first, second = draws
    common = np.intersect1d(first, second).size
    if common:
        raise GuardError(
            f"{common} of {first.size} noise values came back under the same seed; expected none: noise must come "
            "from the operating system's generator, or whoever knows the seed removes it"
        )
    both = np.concatenate(draws)
    correlation = abs(float(np.corrcoef(first, second)[0, 1])) * np.sqrt(first.size)
    if correlation > stats.norm.isf(FALSE_ALARM / 2):
        raise GuardError(f"two draws of noise are correlated ({correlation:.1f} standard errors); expected none to be")
    measured = float(np.sqrt(np.mean(both * both)))  # (sum of squares is chi-square under the null)
    if abs(measured - 1) > 0.01:
        raise GuardError(
            f"the noise has {measured:.4f} times its declared standard deviation {std:.6g}; expected within 1 %"
        )
    p_value = stats.kstest(both, "norm").pvalue
    if p_value < FALSE_ALARM:
        raise GuardError(f"the noise is not Gaussian (Kolmogorov-Smirnov p = {p_value:.2g}); expected N(0, s^2)")


class _Sensitivity:
    """What one patient does to the clipped sum, on synthetic batches."""

    def __init__(self, adapter: Adapter, loss: PatientLoss, clip: float, clipped: ClippedSum) -> None:
        self._adapter = adapter
        self._loss = loss
        self._clip = clip
        self._clipped = clipped
        self._classes, self._dim = adapter.prompts.shape
        # Any data will do; a seed makes a refusal repeatable.
        self._generator = torch.Generator().manual_seed(20)

    def check(self) -> None:
        self._check_rows()
        self._check_one_out()
        self._check_state()
        self._check_not_finite()
        self._check_against_hooks()

    def _batch(self, classes: int | None = None, patients: int = _PATIENTS) -> PatientBatch:
        """Random patients; with ``classes``, of that many classes only."""
        features = torch.randn(patients, _IMAGES, self._dim, generator=self._generator, dtype=torch.float64)
        features /= features.norm(dim=2, keepdim=True)
        labels = torch.randint(0, classes or self._classes, (patients, _IMAGES), generator=self._generator)
        mask = torch.ones(patients, _IMAGES, dtype=torch.bool)
        mask[::3, 1:] = False
        return PatientBatch(features, labels, mask)

    def _sum(self, batch: PatientBatch) -> Tensor:
        total = self._clipped(self._adapter, batch, self._loss, self._clip)
        return torch.cat([total[name].flatten() for name in sorted(total)])

    def _part(self, batch: PatientBatch, index: int) -> Tensor:
        """What a patient adds to the sum."""
        others = torch.arange(len(batch.mask)) != index
        return self._sum(batch) - self._sum(batch.choose(others))

    def _check_rows(self) -> None:
        """The same patient among other patients, also of other classes, adds the same."""
        for classes in (None, 1):
            first, second = self._batch(), self._batch(classes)
            for index in (0, 1):
                mixed = PatientBatch(*(value.clone() for value in second))
                for target, source in zip(mixed, first, strict=True):
                    target[index] = source[index]
                moved = float((self._part(first, index) - self._part(mixed, index)).norm()) / self._clip
                if not moved <= TOLERANCE:
                    raise GuardError(
                        f"a patient's clipped gradient changes by {moved:.3g} times the clipping norm when only the "
                        f"other patients change; expected at most {TOLERANCE:g}: something mixes the patients "
                        "(an in-batch loss, batch statistics, weights or priors from class counts)"
                    )

    def _check_one_out(self) -> None:
        """No patient, however odd, adds more than the clipping norm."""
        batch = self._batch(patients=ADVERSARIAL_ROWS)
        prompts = self._adapter.prompts
        for index in range(ADVERSARIAL_ROWS):
            wrong = index % self._classes
            worst = -prompts[wrong] if index % 2 else prompts[(wrong + 1) % self._classes]
            batch.features[index] = worst * 10.0 ** (index % 5 - 2)
            batch.labels[index] = wrong
        whole = self._sum(batch)
        for index in range(ADVERSARIAL_ROWS):
            others = torch.arange(ADVERSARIAL_ROWS) != index
            moved = float((whole - self._sum(batch.choose(others))).norm()) / self._clip
            if not moved <= 1 + TOLERANCE:
                raise GuardError(
                    f"removing one patient moves the clipped sum by {moved:.3g} times the clipping norm; expected at "
                    "most 1: gradients are not clipped patient by patient"
                )

    def _check_state(self) -> None:
        """Nothing is remembered from one sum to the next."""
        batch = self._batch()
        before = self._sum(batch)
        self._sum(self._batch(1))
        moved = float((self._sum(batch) - before).norm()) / self._clip
        if not moved <= TOLERANCE:
            raise GuardError(
                f"the same patients give another clipped sum ({moved:.3g} times the clipping norm) after others were "
                "seen: un-noised state is kept on the gradient path; expected none"
            )

    def _check_not_finite(self) -> None:
        """A patient with broken images contributes zero and harms nobody."""
        batch = self._batch()
        others = torch.arange(_PATIENTS) != 1
        expected = self._sum(batch.choose(others))
        batch.features[1, 0] = torch.nan
        moved = float((self._sum(batch) - expected).norm()) / self._clip
        if not moved <= TOLERANCE:
            raise GuardError(
                f"a patient with a non-finite image moves the clipped sum by {moved:.3g} times the clipping norm; "
                "expected no contribution at all"
            )

    def _check_against_hooks(self) -> None:
        """The sum is the one that Opacus' own per-sample gradients give."""
        batch = self._batch(patients=4)
        oracle = clipped_sum_by_hooks(self._adapter, batch, self._loss, self._clip)
        found = self._sum(batch)
        moved = float((found - torch.cat([oracle[name].flatten() for name in sorted(oracle)])).norm()) / self._clip
        if not moved <= TOLERANCE:
            raise GuardError(
                f"the clipped sum differs by {moved:.3g} times the clipping norm from that of Opacus' per-sample "
                f"gradients; expected at most {TOLERANCE:g}"
            )


def _check_steps(adapter: Adapter, loss: PatientLoss, descent: Descent) -> None:
    """The optimiser sees the noisy sum: one step moves the mean gradient by noise of the declared size."""
    sums = _Sensitivity(adapter, loss, descent.settings.clip, clipped_sum)
    batch = sums._batch(patients=2)
    exact = sums._sum(batch)
    noisy = descent.noisy_sum(adapter, (batch,), loss)
    drawn = (torch.cat([noisy[name].flatten() for name in sorted(noisy)]) - exact) / descent.noise_std
    size = drawn.numel()
    squares = float(drawn.square().sum())
    p_value = 2 * min(stats.chi2.cdf(squares, size), stats.chi2.sf(squares, size))
    if p_value < FALSE_ALARM:
        raise GuardError(
            f"the noise on a sum has {np.sqrt(squares / size):.4f} times its declared standard deviation "
            f"(chi-square p = {p_value:.2g} over {size} values)"
        )

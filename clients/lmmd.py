"""LMMD: the distance, class by class, between labelled source and unlabelled target features."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

KERNELS = 5
"""Gaussian kernels of bandwidth b, 2b, ..., 2^(KERNELS-1) b."""


def lmmd(source: Tensor, source_labels: Tensor, target: Tensor, target_probabilities: Tensor) -> Tensor:
    """Local maximum mean discrepancy (DSAN, arXiv 2106.09388; the form in FACMIC's code, docs/facmic.md, LMMD).

    The mean, over classes c that occur among the source labels and among the target's most probable classes, of
    sum_ij [w_i w_j k(s_i,s_j) + v_i v_j k(t_i,t_j) - 2 w_i v_j k(s_i,t_j)], with w_i = 1[y_i = c] / n_c and
    v_j = p_j(c) / sum_j p_j(c). The kernel k sums ``KERNELS`` Gaussians exp(-|u-v|^2 / (b 2^m)); b is a quarter
    of the mean squared distance between two different rows of both batches, taken as a constant.

    Args:
        source: adapted features, [m, d].
        source_labels: [m] int64.
        target: features [n, d]; not adapted, as in the paper's code. n may differ from m.
        target_probabilities: [n, K], rows sum to 1; no gradient should hang on them.

    Returns:
        A scalar, 0 or more but for rounding; exactly 0, with a gradient of zeros, if no class is common.
    """
    numbers = torch.arange(target_probabilities.shape[1], device=source.device)
    indicator = (source_labels[:, None] == numbers).to(source.dtype)
    counts = indicator.sum(0)
    common = (counts > 0) & (target_probabilities.argmax(1)[:, None] == numbers).any(0)
    if not bool(common.any()):
        return source.sum() * 0
    # Picking columns by a mask is slow; weights of 0 take a class out as well.
    ours = indicator / counts.clamp_min(1)
    theirs = target_probabilities / target_probabilities.sum(0).clamp_min(1e-30)
    # With signed weights the three sums are one quadratic form in the kernel matrix of both batches.
    weights = torch.cat((ours, -theirs)) * common
    return _WeightedKernel.apply(torch.cat((source, target)), weights @ weights.T) / common.sum()  # type: ignore[no-any-return]


class _WeightedKernel(torch.autograd.Function):
    """sum_ij A_ij k(p_i, p_j) of points p [n, d] and symmetric weights A [n, n], the bandwidth taken as a constant.

    Its gradient has a closed form, 4 sum_j G_ij (p_i - p_j) with G_ij = A_ij dk / d|p_i - p_j|^2: half the time that
    autograd takes to go back through the many small matrices in between.
    """

    @staticmethod
    def forward(ctx: Any, points: Tensor, weights: Tensor) -> Tensor:
        # Distances do not change with the origin; at the mean, |u|^2 + |v|^2 - 2uv loses fewest digits.
        points = points - points.mean(0)
        squares = (points * points).sum(1)
        distances = torch.addmm(squares[:, None] + squares, points, points.T, alpha=-2).clamp_min_(0)
        distances.fill_diagonal_(0)
        count = len(points)
        bandwidth = distances.sum() / (count * (count - 1)) / 4
        # Equal points only: every kernel is 1 whatever the bandwidth.
        widest = bandwidth.clamp_min(1e-12) * 2 ** (KERNELS - 1)
        power = torch.exp(-distances / widest)
        kernel, slope = power, power
        for number in range(1, KERNELS):
            power = power * power  # half the bandwidth squares the exponential
            kernel = kernel + power
            slope = torch.add(slope, power, alpha=2**number)
        ctx.save_for_backward(points, weights * slope / -widest)
        return (weights * kernel).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        points, slopes = ctx.saved_tensors
        return 4 * gradient * torch.addmm(slopes.sum(1, keepdim=True) * points, slopes, points, alpha=-1), None

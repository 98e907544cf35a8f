"""Meters of ratios: how many draws still count, and how many ratios a transform cuts."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from scorefn.core import ScorefnError, ShapeError
from scorefn.trajectories.ratios import Transform


def effective_sample_size(log_ratio: Tensor, mask: Tensor | None = None) -> Tensor:
    """``(sum_i w_i)^2 / sum_i w_i^2`` over the first axis, ``[N, ...] -> [...]``, from 1 to N; 0 where all are masked.

    Computed from logarithms, so that no weight overflows. For whole draws, ``effective_sample_size(Sequence()(draws)
    .squeeze(-1))``. Source: Kong (1992), "A note on importance sampling using standardized weights".

    Args:
        log_ratio: ``[N, ...]``, log-probability under the policy minus that under the behaviour.
        mask: bool, of the same shape, False for what does not count.

    Raises:
        ShapeError: log_ratio has no draws, or mask has another shape.
        ScorefnError: log_ratio is no tensor of floating point.

    Example:
        >>> import torch
        >>> from scorefn.trajectories import effective_sample_size
        >>> effective_sample_size(torch.zeros(4)).round(decimals=2)  # on-policy: all four count
        tensor(4.)
        >>> effective_sample_size(torch.tensor([5.0, 0.0, 0.0, 0.0])).round(decimals=2)
        tensor(1.0400)
    """
    if not isinstance(log_ratio, Tensor) or not log_ratio.is_floating_point():
        kind = f"a tensor of {log_ratio.dtype}" if isinstance(log_ratio, Tensor) else f"a {type(log_ratio).__name__}"
        raise ScorefnError(
            f"log_ratio must be a tensor of floating point, [N, ...], but it is {kind}: give the logarithms of the "
            "ratios, such as PerDecision()(draws)."
        )
    if log_ratio.ndim == 0 or len(log_ratio) == 0:
        raise ShapeError(
            f"log_ratio has shape {tuple(log_ratio.shape)}, but it must be [N, ...] with N of at least 1: no draws "
            "have no effective size."
        )
    log_ratio = log_ratio.detach()
    if mask is None:
        mask = torch.ones_like(log_ratio, dtype=torch.bool)
    _check_mask(mask, log_ratio)
    log_ratio = log_ratio.where(mask, -math.inf)
    size = (2 * log_ratio.logsumexp(0) - (2 * log_ratio).logsumexp(0)).exp()
    return size.where(mask.any(0), 0.0)


def clip_fraction(log_ratio: Tensor, transform: Transform, mask: Tensor | None = None) -> Tensor:
    """The share of ratios that lie beyond the bounds of a transform, a scalar; 0 where all are masked.

    Args:
        log_ratio: any shape, such as ``PerDecision()(draws)``.
        transform: the transform.
        mask: bool, of the same shape, False for what does not count.

    Raises:
        ShapeError: mask has another shape.

    Example:
        >>> import torch
        >>> from scorefn.trajectories import Clipped, clip_fraction
        >>> clip_fraction(torch.tensor([0.5, 0.9, 1.1, 1.5]).log(), Clipped(0.2))
        tensor(0.5000)
    """
    beyond = transform.clips(log_ratio.detach().exp()).to(log_ratio.dtype)
    if mask is None:
        return beyond.mean()
    _check_mask(mask, log_ratio)
    return beyond.where(mask, 0.0).sum() / mask.sum().clamp(min=1)


def _check_mask(mask: Tensor, log_ratio: Tensor) -> None:
    if mask.shape != log_ratio.shape:
        raise ShapeError(
            f"mask has shape {tuple(mask.shape)}, but log_ratio has {tuple(log_ratio.shape)}: one flag per ratio is "
            "needed."
        )

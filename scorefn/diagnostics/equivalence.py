"""Whether two estimates have the same mean: refuted, shown up to a margin, or neither."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor

from scorefn.diagnostics.tails import student_quantile

ERROR = 1e-4
"""Probability that ``worst`` is too small, over all coordinates together."""


def critical_z(coordinates: int, repeats: int) -> float:
    """Two-sided, 1e-6 over all coordinates, for the t-distribution of the repeats."""
    return student_quantile(0.5e-6 / coordinates, repeats - 1)


@dataclass(frozen=True)
class Equivalence:
    """Two means compared, coordinate by coordinate; shares are of the largest coordinate of the second mean.

    Attributes:
        z: the largest difference in standard errors.
        refuted: whether that is beyond chance.
        difference: the largest, as a share.
        worst: upper confidence limit of the largest difference, as a share.
        rests: how many repeats either variance rests on, ``(sum d)^2 / sum d^2``, the smaller one.
    """

    z: float
    refuted: bool
    difference: float
    worst: float
    rests: float


def equivalence(first: Tensor, second: Tensor) -> Equivalence:
    """Compare the means of gradients ``[R, P]`` and ``[R', P]``."""
    a, b = first.double(), second.double()
    difference = (a.mean(0) - b.mean(0)).abs()
    error = (a.var(0) / len(a) + b.var(0) / len(b)).sqrt()
    scale = max(float(b.mean(0).abs().max()), torch.finfo(b.dtype).tiny)
    rounding = 100 * torch.finfo(first.dtype).eps * scale
    z = float((difference / error.clamp(min=rounding)).max())
    one_sided = -NormalDist().inv_cdf(ERROR / 2 / len(difference))
    return Equivalence(
        z=z,
        refuted=z > critical_z(len(difference), min(len(a), len(b))),
        difference=float(difference.max()) / scale,
        worst=float((difference + one_sided * error).max()) / scale,
        rests=min(_rests(a), _rests(b)),
    )


def _rests(gradients: Tensor) -> float:
    d = (gradients - gradients.mean(0)).square().sum(1)
    fourth = float(d.square().sum())
    return float(d.sum()) ** 2 / fourth if fourth > 0 else math.inf

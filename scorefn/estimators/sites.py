"""p as independent problems of D sites that are drawn jointly, each site with C values."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Distribution

from scorefn.estimators.finite import indices, log_probs, points, unwrapped
from scorefn.estimators.problems import problem_shape
from scorefn.estimators.support import refuse_size

FLOOR = -1e6
"""Stands for the log-probability of what cannot happen: its exponential is 0, its differences are numbers."""


class Sites:
    """The sites of ``Bernoulli``, ``Categorical``, ``OneHotCategorical`` or ``Independent`` of these, by problem.

    Args:
        p: the distribution.
        batch_ndim: see ``problem_shape``.
        owner: whose name an error gives.

    Attributes:
        problems: ``[*B]``.
        count: D.
        values: C.

    Raises:
        ScorefnError: p is of another family, or has no sites.
        ShapeError: batch_ndim is larger than p has batch dimensions.
    """

    def __init__(self, p: Distribution, batch_ndim: int | None, owner: str) -> None:
        self.p, self.unit = p, unwrapped(p, owner)
        self.problems = problem_shape(p, batch_ndim)
        self.count = self.unit.batch_shape[len(self.problems) :].numel()
        self.values = 2 if isinstance(self.unit, Bernoulli) else self.unit.logits.shape[-1]
        if 0 in self.unit.batch_shape:
            refuse_size(p, self.values, 0)

    @cached_property
    def log_probs(self) -> Tensor:
        """``[*B, D, C]``, of each value of each site."""
        return log_probs(self.unit).reshape(*self.problems, self.count, self.values)

    def index(self, x: Tensor) -> Tensor:
        """Which value each site has, ``[M, *batch, *event] -> [M, *B, D]``."""
        return indices(self.unit, x).reshape(len(x), *self.problems, self.count)

    def points(self, index: Tensor) -> Tensor:
        """The points at which the sites have these values, ``[M, *B, D] -> [M, *batch, *event]``."""
        return points(self.unit, index.reshape(len(index), *self.unit.batch_shape))

    def log_prob(self, index: Tensor) -> Tensor:
        """Log-probabilities of joint values, ``[M, *B, D] -> [M, *B]``, with a gradient, FLOOR at least."""
        chosen = self.log_probs.gather(-1, index.movedim(0, -1))
        return (chosen.squeeze(-2) if self.count == 1 else chosen.sum(-2)).movedim(-1, 0).clamp(min=FLOOR)


class JointSupport:
    """All joint values of the sites, numbered from 0 to S - 1 with the last site fastest.

    Args:
        sites: the sites of each problem.

    Attributes:
        log_prob: ``[*B, S]``, detached; ``FLOOR`` for what cannot happen.

    Raises:
        ScorefnError: there are more than 2^20 joint values.
    """

    def __init__(self, sites: Sites) -> None:
        refuse_size(sites.p, sites.values, sites.count)
        self.sites = sites
        by_site = sites.log_probs.detach()
        joint = by_site[..., 0, :]
        for site in range(1, sites.count):
            joint = (joint.unsqueeze(-1) + by_site[..., site, :].unsqueeze(-2)).flatten(-2)
        self.log_prob = joint.clamp(min=FLOOR)

    @cached_property
    def _place(self) -> Tensor:
        """What a step of each site adds to the number, ``[D]``."""
        device = self.log_prob.device
        return self.sites.values ** torch.arange(self.sites.count - 1, -1, -1, device=device)

    def values(self, number: Tensor) -> Tensor:
        """The values of the sites, ``[M, *B] -> [M, *B, D]``."""
        number = number.unsqueeze(-1)
        return number if self.sites.count == 1 else number // self._place % self.sites.values

    def number(self, index: Tensor) -> Tensor:
        """``[M, *B, D] -> [M, *B]``."""
        return index.squeeze(-1) if self.sites.count == 1 else (index * self._place).sum(-1)

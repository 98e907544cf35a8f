"""The importance-weighted bound: the log of a mean of weights, as one draw of N particles.

All N particles together are one draw of the joint guide, the bound is its value and each particle is a decision. What
the bound would be without a particle is then a baseline of that particle, and nothing else is new.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from scorefn.core import (
    Draws,
    Measure,
    NonFiniteError,
    PyTree,
    ScorefnError,
    check_count,
    check_detached,
    check_support,
    estimate,
    evaluate,
    in_transform,
)
from scorefn.posteriors.plain import log_ratio
from scorefn.reducers import Constant


class WeightBaseline(Protocol):
    """What the bound would be without a particle."""

    def without_each(self, log_weight: Tensor) -> tuple[Tensor, Tensor]:
        """From log weights ``[N, *B]``: the bound without each particle, and its stand-in's share of the mean weight.

        Both are ``[N, *B]`` and finite, and each entry is made from the other particles alone.
        """
        ...


class _StandIn(ABC):
    """The bound with each particle's weight replaced by something made from the other weights."""

    @abstractmethod
    def stand_in(self, log_weight: Tensor) -> Tensor:
        """The log of what replaces each weight, ``[N, *B] -> [N, *B]``, from two particles on."""

    def without_each(self, log_weight: Tensor) -> tuple[Tensor, Tensor]:
        """Log weights ``[N, *B]`` to the bound without each particle and the stand-in's share, ``[N, *B]`` each.

        They are 0 and 1 where no other particle has a positive weight.
        """
        if len(log_weight) == 1:
            return torch.zeros_like(log_weight), torch.ones_like(log_weight)
        stand_in = self.stand_in(log_weight)
        total = torch.logaddexp(_log_sum_others(log_weight), stand_in)
        known = total > -torch.inf
        bound = torch.where(known, total - math.log(len(log_weight)), 0.0)
        return bound, torch.where(known, (stand_in - total).exp(), 1.0)


@dataclass(frozen=True)
class GeometricMean(_StandIn):
    """The geometric mean of the other weights stands in: ``exp(1/(N-1) sum_{m != n} log w_m)``.

    Source: Mnih & Rezende (2016), "Variational inference for Monte Carlo objectives", local learning signals (VIMCO).

    Example:
        >>> import torch
        >>> from scorefn.posteriors import GeometricMean
        >>> log_weight = torch.tensor([1.0, 4.0, 16.0]).log()
        >>> GeometricMean().stand_in(
        ...     log_weight
        ... ).exp().round()  # sqrt(4 * 16), sqrt(1 * 16), sqrt(1 * 4)
        tensor([8., 4., 2.])
        >>> bound, share = GeometricMean().without_each(log_weight)
        >>> (3 * bound.exp()).round()  # 8 + 4 + 16, 1 + 4 + 16, 1 + 4 + 2
        tensor([28., 21.,  7.])
    """

    def stand_in(self, log_weight: Tensor) -> Tensor:
        """Log weights ``[N, *B]`` to the log of their stand-ins ``[N, *B]``; -inf where another weight is 0."""
        return _over_others(log_weight, torch.cumsum, torch.add, 0.0) / (len(log_weight) - 1)


@dataclass(frozen=True)
class ArithmeticMean(_StandIn):
    """The arithmetic mean of the other weights stands in: the bound is then that of the N - 1 others.

    Source: Mnih & Rezende (2016), local learning signals.

    Example:
        >>> import torch
        >>> from scorefn.posteriors import ArithmeticMean
        >>> log_weight = torch.tensor([1.0, 4.0, 16.0]).log()
        >>> ArithmeticMean().stand_in(log_weight).exp()  # the mean of the two others
        tensor([10.0000,  8.5000,  2.5000])
    """

    def stand_in(self, log_weight: Tensor) -> Tensor:
        """Log weights ``[N, *B]`` to the log of their stand-ins ``[N, *B]``; -inf where all others are 0."""
        return _log_sum_others(log_weight) - math.log(len(log_weight) - 1)


@dataclass(frozen=True)
class BoundOnly:
    """VIMCO as it was published: a baseline for the bound, and none for the score that log w carries (``r_-n`` = 0).

    Near the posterior that score is nearly all the noise (350 times the rest in a coin with two particles); where
    weights are very uneven it can be the better one by some tenths. Source: Mnih & Rezende (2016).

    Args:
        baseline: ``GeometricMean()`` or ``ArithmeticMean()``.

    Raises:
        ScorefnError: a baseline that cannot be asked for the bound without a particle.

    Example:
        >>> import torch
        >>> from scorefn.posteriors import BoundOnly, GeometricMean, importance_weighted_elbo
        >>> def noise(baseline):  # where the guide is the posterior, so that the gradient is 0
        ...     _ = torch.manual_seed(0)
        ...     logits = torch.tensor([0.3, -1.0, 0.5], requires_grad=True)
        ...     q = torch.distributions.Categorical(logits=logits)
        ...     log_joint = lambda z: q.log_prob(z).detach()
        ...     bound = importance_weighted_elbo(log_joint, q, 4, baseline=baseline)
        ...     return torch.autograd.grad(bound, logits)[0].norm().item()
        >>> noise(GeometricMean()) < 1e-6, noise(BoundOnly()) > 0.1
        (True, True)
    """

    baseline: WeightBaseline = GeometricMean()

    def __post_init__(self) -> None:
        """Check what it wraps."""
        check_weight_baseline(self.baseline)

    def without_each(self, log_weight: Tensor) -> tuple[Tensor, Tensor]:
        """Log weights ``[N, *B]`` to the bound without each particle and a share of 0, ``[N, *B]`` each."""
        return self.baseline.without_each(log_weight)[0], torch.zeros_like(log_weight)


def importance_weighted_elbo(
    log_joint: Callable[[Any], Any],
    q: Measure,
    num_samples: int,
    *,
    baseline: WeightBaseline | None = GeometricMean(),
) -> Tensor:
    """Importance-weighted bound ``E[log 1/N sum_n w_n]``, ``[*B]``, ``w = exp(log_joint(z) - log q(z))``, to maximise.

    A lower bound of the log evidence, at least as tight as the ELBO, which it is for N = 1. With L the log of the mean
    weight, r_n = w_n / sum w, and ``L_-n``, ``r_-n`` the same with w_n replaced by its stand-in, the gradient is::

        E[ sum_n (L - L_-n + r_-n) grad log q(z_n) + sum_n r_n grad log w_n ]

    for any q that can be scored, discrete or not; draws are never differentiated. Published VIMCO (``BoundOnly``) has
    no ``r_-n``, which centres the noise ``-r_n grad log q`` that log w_n carries: the estimate is then 0 where the
    bound is tight. Draws must be independent, so there is no coupling. Sources: Burda, Grosse & Salakhutdinov (2016),
    "Importance weighted autoencoders", for the bound; Mnih & Rezende (2016), "Variational inference for Monte Carlo
    objectives", for ``L_-n``.

    Args:
        log_joint: log p(x, z) up to a constant, z ``[N, *batch, *event]`` to ``[N, *B]``, where B is a leading part of
            q's batch shape; -inf for what is impossible.
        q: a torch distribution; the log-probabilities of batch dimensions beyond B are summed.
        num_samples: N, on which ``log_joint`` is called once.
        baseline: ``GeometricMean()``, ``ArithmeticMean()`` or ``BoundOnly(...)``; None: no baseline. For N = 1
            ``L_-n`` = 0 and ``r_-n`` = 1, the ELBO's score function without baseline.

    Raises:
        ShapeError: log_joint's shape is not ``[N, *B]``.
        NonFiniteError: a weight is NaN or infinite, or all weights of a problem are 0.
        ScorefnError: q cannot be scored, or log q has no gradient.

    Example:
        >>> import torch
        >>> from scorefn.posteriors import importance_weighted_elbo
        >>> _ = torch.manual_seed(0)
        >>> logits = torch.zeros(3, requires_grad=True)
        >>> log_joint = lambda z: torch.tensor([0.1, 0.5, 0.9]).log()[z]
        >>> q = torch.distributions.Categorical(logits=logits)
        >>> bound = importance_weighted_elbo(log_joint, q, 1000)
        >>> round(bound.item(), 1)  # the log evidence is log(.1 + .5 + .9) = .41
        0.4
    """
    num_samples = check_count("num_samples", num_samples)
    if baseline is not None:
        check_weight_baseline(baseline)
    check_support(q)
    x = q.sample(torch.Size((num_samples,)))
    check_detached(x, num_samples)
    log_q = q.log_prob(x)
    log_weight, log_q = log_ratio(evaluate(log_joint, x, log_q), log_q)
    draws = one_draw(x, log_q, log_weight)
    bound, share = without_each(log_weight, baseline)
    return estimate(draws, None, Constant((bound - share).movedim(0, -1)))


def check_weight_baseline(baseline: object) -> None:
    """Refuse what cannot be asked for the bound without a particle."""
    if isinstance(baseline, type) or not callable(getattr(baseline, "without_each", None)):
        raise ScorefnError(
            f"baseline={baseline!r} cannot serve an importance-weighted bound, because its N particles are one draw "
            "and the baseline of each is made from the weights of the others. Use GeometricMean(), ArithmeticMean(), "
            "BoundOnly(GeometricMean()) for VIMCO as published, or None."
        )


def one_draw(x: PyTree, log_prob: Tensor, log_weight: Tensor, scale: Tensor | float = 1.0) -> Draws:
    """N particles as a single draw of N decisions, whose value is the bound.

    Args:
        x: pytree with leading N.
        log_prob: ``[N, *B]``.
        log_weight: ``[N, *B]``.
        scale: of each problem's bound, ``[*B]`` or a number.
    """
    bound = scale * log_mean_weight(log_weight)
    together = pytree.tree_map(lambda leaf: leaf.unsqueeze(0), x)
    return Draws(together, log_prob.movedim(0, -1).unsqueeze(0), bound.unsqueeze(0).unsqueeze(-1))


def log_mean_weight(log_weight: Tensor) -> Tensor:
    """``log 1/N sum_n w_n``, ``[N, *B] -> [*B]``; some of the weights may be 0.

    Raises:
        NonFiniteError: a weight is NaN or infinite, or all weights of a problem are 0.
    """
    bound: Tensor = log_weight.logsumexp(0) - math.log(len(log_weight))
    if in_transform() or bool(torch.isfinite(bound.detach()).all()):
        return bound
    bad = torch.isnan(log_weight.detach()) | (log_weight.detach() == torch.inf)
    if bad.any():
        particles = bad.reshape(len(bad), -1).any(1).nonzero().flatten().tolist()
        raise NonFiniteError(
            f"log p - log q is {log_weight.detach()[bad][0].item()} at {len(particles)} of {len(bad)} particles, "
            f"namely {particles[:10]}: it would make the whole gradient NaN. Every sample must lie inside the support "
            "of the distribution that scores it, and log p must be finite or -inf."
        )
    problems = (~torch.isfinite(bound.detach())).nonzero().squeeze(-1).tolist() if bound.ndim else []
    where = f" in {len(problems)} of {bound.numel()} problems, namely {problems[:10]}" if bound.numel() > 1 else ""
    raise NonFiniteError(
        f"All {len(log_weight)} particles have weight 0 (log p is -inf){where}: the bound is -inf there and has no "
        "gradient. Some are harmless. Raise the number of particles, or keep the guide inside the model's support."
    )


def without_each(log_weight: Tensor, baseline: WeightBaseline | None) -> tuple[Tensor, Tensor]:
    """Bound and share without each particle, ``[N, *B]`` each, detached; zeros without a baseline."""
    log_weight = log_weight.detach()
    if baseline is None:
        return torch.zeros_like(log_weight), torch.zeros_like(log_weight)
    return baseline.without_each(log_weight)


def _log_sum_others(log_weight: Tensor) -> Tensor:
    return _over_others(log_weight, torch.logcumsumexp, torch.logaddexp, -torch.inf)


def _over_others(
    v: Tensor, scan: Callable[[Tensor, int], Tensor], combine: Callable[[Tensor, Tensor], Tensor], empty: float
) -> Tensor:
    """A sum over all particles but one: from both ends, since taking one off the total would cancel its digits."""
    edge = v.new_full((1, *v.shape[1:]), empty)
    before = torch.cat([edge, scan(v[:-1], 0)])
    after = torch.cat([scan(v[1:].flip(0), 0).flip(0), edge])
    return combine(before, after)

"""The sufficient statistics of exponential families, with their expectations in closed form."""

from __future__ import annotations

from functools import singledispatch
from typing import Any

import torch
from torch import Tensor
from torch.distributions import (
    Bernoulli,
    Beta,
    Categorical,
    Exponential,
    Gamma,
    MultivariateNormal,
    Normal,
    OneHotCategorical,
    Poisson,
)


@singledispatch
def sufficient_statistics(p: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """T(x) ``[M, *batch, F]`` and E T ``[*batch, F]``, which is differentiable in the parameters of p.

    ``sufficient_statistics.register(MyFamily)`` adds a rule; that of the nearest class in the method resolution order
    is used. With linearly independent statistics that span the sufficient ones, the least-squares coefficients of f on
    them are its natural gradient. The origin and the units in a rule are held at the present parameters, so that they
    do not move with E T; a basis that is uncorrelated there loses nothing to the damping of a fit.

    Args:
        p: a distribution of a registered family, not wrapped.
        x: its draws, ``[M, *batch, *event]``.

    Raises:
        NotImplementedError: no rule is known for the family.
    """
    raise NotImplementedError(f"The sufficient statistics of {type(p).__name__} are not known.")


def families() -> tuple[type, ...]:
    """The classes with a rule."""
    return tuple(family for family in sufficient_statistics.registry if family is not object)


@sufficient_statistics.register(Normal)
def _normal(p: Normal, x: Tensor) -> tuple[Tensor, Tensor]:
    origin, unit = p.loc.detach(), p.scale.detach()
    z, shift = (x - origin) / unit, (p.loc - origin) / unit
    expected = torch.stack([shift, shift.square() + (p.scale / unit).square()], -1)
    return torch.stack([z, z.square()], -1), expected


@sufficient_statistics.register(MultivariateNormal)
def _multivariate_normal(p: MultivariateNormal, x: Tensor) -> tuple[Tensor, Tensor]:
    origin, unit = p.loc.detach(), p.scale_tril.detach()
    z = _whitened(unit, x - origin)
    shift, factor = _whitened(unit, p.loc - origin), torch.linalg.solve_triangular(unit, p.scale_tril, upper=False)
    row, column = torch.tril_indices(z.shape[-1], z.shape[-1], device=z.device)
    second = shift.unsqueeze(-1) * shift.unsqueeze(-2) + factor @ factor.mT
    expected = torch.cat([shift, second[..., row, column]], -1)
    return torch.cat([z, z[..., row] * z[..., column]], -1), expected


def _whitened(factor: Tensor, step: Tensor) -> Tensor:
    """``L^-1 d`` for L ``[*batch, D, D]`` and d ``[..., *batch, D]``."""
    solution: Tensor = torch.linalg.solve_triangular(factor, step.unsqueeze(-1), upper=False)
    return solution.squeeze(-1)


@sufficient_statistics.register(Bernoulli)
def _bernoulli(p: Bernoulli, x: Tensor) -> tuple[Tensor, Tensor]:
    return x.unsqueeze(-1), p.probs.unsqueeze(-1)


@sufficient_statistics.register(Categorical)
def _categorical(p: Categorical, x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.nn.functional.one_hot(x.long(), p.probs.shape[-1]).to(p.probs), p.probs


@sufficient_statistics.register(OneHotCategorical)
def _one_hot_categorical(p: OneHotCategorical, x: Tensor) -> tuple[Tensor, Tensor]:
    return x, p.probs


@sufficient_statistics.register(Poisson)
def _poisson(p: Poisson, x: Tensor) -> tuple[Tensor, Tensor]:
    return x.unsqueeze(-1), p.rate.unsqueeze(-1)


@sufficient_statistics.register(Exponential)
def _exponential(p: Exponential, x: Tensor) -> tuple[Tensor, Tensor]:
    unit = p.mean.detach()
    return (x / unit).unsqueeze(-1), (p.mean / unit).unsqueeze(-1)


@sufficient_statistics.register(Gamma)
def _gamma(p: Gamma, x: Tensor) -> tuple[Tensor, Tensor]:
    """Of u = x / E x, ``Cov(u, log u) = Var u``: less u itself, its logarithm is uncorrelated with it."""
    unit = p.mean.detach()
    u, mean = x / unit, p.mean / unit
    expected_log = p.concentration.digamma() - p.rate.log() - unit.log()
    return torch.stack([u, u.log() - u], -1), torch.stack([mean, expected_log - mean], -1)


@sufficient_statistics.register(Beta)
def _beta(p: Beta, x: Tensor) -> tuple[Tensor, Tensor]:
    """The logarithms covary by ``-psi'(a + b)``, which drops out of the covariance of these two combinations."""
    a, b = p.concentration1, p.concentration0
    first, second = a.detach().polygamma(1), b.detach().polygamma(1)
    share = second / (first + second)

    def combined(log_x: Tensor, log_rest: Tensor) -> Tensor:
        return torch.stack([log_x - log_rest, share * log_x + (1 - share) * log_rest], -1)

    both = (a + b).digamma()
    return combined(x.log(), (-x).log1p()), combined(a.digamma() - both, b.digamma() - both)

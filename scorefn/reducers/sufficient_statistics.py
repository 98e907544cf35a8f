"""The sufficient statistics of exponential families, with their expectations in closed form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

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

from scorefn.core import ScorefnError, nearest, overridden
from scorefn.reducers.checks import DENSITY

Rule: TypeAlias = Callable[[Any, Tensor], tuple[Tensor, Tensor]]
_Rule = TypeVar("_Rule", bound=Rule)
_RULES: dict[type, Rule] = {}


def register_statistics(family: type) -> Callable[[_Rule], _Rule]:
    """Decorator: the sufficient statistics of a family and their expectations, for ``NaturalControlVariate``.

    The rule of the nearest class in the method resolution order is used, but not by a subclass that overrides
    ``log_prob``, which may be another distribution; a later registration replaces an earlier one.

    With linearly independent statistics that span the sufficient ones, the least-squares coefficients of f on them are
    its natural gradient. The origin and the units in a rule are held at the present parameters (detached), so that they
    do not move with E T; a basis that is uncorrelated there loses nothing to the damping of a fit.

    Args:
        family: a distribution class, not a wrapper; the rule maps one of its instances p and draws
            ``[M, *batch, *event]`` to T(x) ``[M, *batch, F]`` and E T ``[*batch, F]``, which is differentiable in the
            parameters of p.

    Raises:
        ScorefnError: family is not a class.

    Example:
        >>> import torch
        >>> from scorefn import register_statistics
        >>> class Folded(torch.distributions.HalfNormal):
        ...     pass
        >>> @register_statistics(Folded)
        ... def _(p, x):
        ...     return x.square().unsqueeze(-1), p.scale.square().unsqueeze(-1)
    """
    if not isinstance(family, type):
        raise ScorefnError(
            f"register_statistics takes a distribution class, but it was given {family!r}: write "
            "@register_statistics(MyDistribution), with the class itself, above the rule."
        )

    def register(rule: _Rule) -> _Rule:
        _RULES[family] = rule
        return rule

    return register


def sufficient_statistics(p: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """T(x) ``[M, *batch, F]`` and E T ``[*batch, F]``, which is differentiable in the parameters of p.

    Args:
        p: a distribution of a registered family, not wrapped; see ``register_statistics``.
        x: its draws, ``[M, *batch, *event]``.

    Raises:
        ScorefnError: no rule is known for the family.
    """
    return statistics_rule(p)(p, x)


def statistics_rule(p: Any) -> Rule:
    """The rule of the nearest registered family that p follows.

    Raises:
        ScorefnError: no rule is known for the family.
    """
    family, override = nearest(type(p), _RULES, DENSITY)
    if family is not None and not override:
        return _RULES[family]
    *most, last = sorted(family.__name__ for family in _RULES)
    reason = overridden(type(p), _RULES, DENSITY, "sufficient statistics")
    raise ScorefnError(
        f"{reason or f'The sufficient statistics of {type(p).__name__} are not known.'} Known are those of "
        f"{', '.join(most)} and {last}: add a rule with scorefn.register_statistics, or give LinearControlVariate the "
        "statistics and their expectations."
    )


def families() -> tuple[type, ...]:
    """The classes with a rule."""
    return tuple(_RULES)


@register_statistics(Normal)
def _normal(p: Normal, x: Tensor) -> tuple[Tensor, Tensor]:
    origin, unit = p.loc.detach(), p.scale.detach()
    z, shift = (x - origin) / unit, (p.loc - origin) / unit
    expected = torch.stack([shift, shift.square() + (p.scale / unit).square()], -1)
    return torch.stack([z, z.square()], -1), expected


@register_statistics(MultivariateNormal)
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


@register_statistics(Bernoulli)
def _bernoulli(p: Bernoulli, x: Tensor) -> tuple[Tensor, Tensor]:
    return x.unsqueeze(-1), p.probs.unsqueeze(-1)


@register_statistics(Categorical)
def _categorical(p: Categorical, x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.nn.functional.one_hot(x.long(), p.probs.shape[-1]).to(p.probs), p.probs


@register_statistics(OneHotCategorical)
def _one_hot_categorical(p: OneHotCategorical, x: Tensor) -> tuple[Tensor, Tensor]:
    return x, p.probs


@register_statistics(Poisson)
def _poisson(p: Poisson, x: Tensor) -> tuple[Tensor, Tensor]:
    return x.unsqueeze(-1), p.rate.unsqueeze(-1)


@register_statistics(Exponential)
def _exponential(p: Exponential, x: Tensor) -> tuple[Tensor, Tensor]:
    unit = p.mean.detach()
    return (x / unit).unsqueeze(-1), (p.mean / unit).unsqueeze(-1)


@register_statistics(Gamma)
def _gamma(p: Gamma, x: Tensor) -> tuple[Tensor, Tensor]:
    """Of u = x / E x, ``Cov(u, log u) = Var u``: less u itself, its logarithm is uncorrelated with it."""
    unit = p.mean.detach()
    u, mean = x / unit, p.mean / unit
    expected_log = p.concentration.digamma() - p.rate.log() - unit.log()
    return torch.stack([u, u.log() - u], -1), torch.stack([mean, expected_log - mean], -1)


@register_statistics(Beta)
def _beta(p: Beta, x: Tensor) -> tuple[Tensor, Tensor]:
    """The logarithms covary by ``-psi'(a + b)``, which drops out of the covariance of these two combinations."""
    a, b = p.concentration1, p.concentration0
    first, second = a.detach().polygamma(1), b.detach().polygamma(1)
    share = second / (first + second)

    def combined(log_x: Tensor, log_rest: Tensor) -> Tensor:
        return torch.stack([log_x - log_rest, share * log_x + (1 - share) * log_rest], -1)

    both = (a + b).digamma()
    return combined(x.log(), (-x).log1p()), combined(a.digamma() - both, b.digamma() - both)

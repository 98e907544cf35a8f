"""Control variates: ``fx - c (h(x) - E h)``, of the same expectation and, where h is like f, of lower variance.

What h takes from the expectation is given back *with its gradient*: for a c that does not know the draw ::

    E[(f - c h) grad log p] + c grad E h  =  grad E f - c grad E h + c grad E h  =  grad E f

so ``E h`` is differentiable in the parameters of the distribution, and c is a constant.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.distributions import Distribution, MultivariateNormal, Normal

from scorefn.core import (
    Draws,
    Integrand,
    NonFiniteError,
    ScorefnError,
    ShapeError,
    evaluate,
    in_transform,
    overridden,
    refuse_two_fits,
)
from scorefn.core.representation import called
from scorefn.reducers.checks import (
    DENSITY,
    check_one_value,
    check_sampled,
    checked_ridge,
    checked_values,
    innermost,
)
from scorefn.reducers.cross_fitting import cross_fit, others

Expected: TypeAlias = Tensor | float | Sequence[float]


class _Correction(ABC):
    """``fx - c . (h - E h)`` with c given, or fitted to the other blocks; a subclass says what h and E h are."""

    unbiased = True

    def __init__(self, coefficient: Tensor | float | None, ridge: float) -> None:
        self.coefficient, self.ridge = _checked_coefficient(coefficient), checked_ridge(ridge)

    @property
    def fitted(self) -> bool:
        """Whether c is learnt from the present draws; a baseline that is fitted to them as well is then refused."""
        return self.coefficient is None

    def __call__(self, draws: Draws) -> Draws:
        """The draws with ``fx - c . (h - E h)``."""
        check_one_value(self, draws)
        h, expected = self._functions(draws)
        refuse_two_fits(draws, self)
        if self.coefficient is None:
            c = _cross_fitted(self, draws, (h - expected).detach(), self.ridge)
        elif self.coefficient.ndim and self.coefficient.shape != h.shape[-1:]:
            raise ShapeError(
                f"coefficient has shape {tuple(self.coefficient.shape)}, but h has {h.shape[-1]} function(s)."
            )
        else:
            c = self.coefficient.detach().to(h)
        corrected = draws.fx - (c * (h - expected)).sum(-1, keepdim=True)
        return replace(draws, fx=corrected, fitted=draws.fitted or self.fitted)

    @abstractmethod
    def _functions(self, draws: Draws) -> tuple[Tensor, Tensor]:
        """h of the draws ``[N, *B, H]``, and E h, which broadcasts to it and is differentiable."""


class LinearControlVariate(_Correction):
    """Functions h of known expectation: ``fx_i - c_i . (h(x_i) - E h)``, with c_i fitted on the other blocks.

    c_i is the least-squares slope of f on h over the draws of i's group outside i's block (off-policy, of ``w f`` on
    ``w h`` and w). It lowers the variance of *f*, not directly that of the gradient, which would need the scores; where
    h explains f the two agree. It stays unbiased under ``LeaveOneOut``: the c of the others know draw i, but multiply
    ``h - E h`` of draws that are independent of it. Baselines that are fitted to the batch themselves are refused.

    H functions need ``H + 2`` draws in other blocks; draws with fewer keep their f, and fits with few more are noisy.

    Sources: Paisley, Blei & Jordan (2012), "Variational Bayesian inference with stochastic search", section 3;
    Ranganath, Gerrish & Blei (2014), "Black box variational inference", section 3.2, who fit c on the same draws.

    Args:
        h: x ``[N, *batch, *event]`` to ``[N, *B]``, or to ``[N, *B, H]`` for several.
        expected_h: E h under the distribution, *differentiable in its parameters*: a tensor ``[]`` or ``[*B]``, for
            several h ``[H]`` or ``[*B, H]``, either with N in front where groups differ; or a callable of nothing that
            returns it, called each time (of a distribution made anew for each step: the properties it caches keep
            the graph of the last one). Plain numbers only where E h does not move with the parameters.
        coefficient: c where it is known, a number or ``[H]``; None: fitted.
        ridge: damping of the fit, relative to the sum of squares of each h.

    Raises:
        ShapeError: h, expected_h or coefficient does not fit the draws, or these have several values.
        NonFiniteError: h, expected_h or coefficient is NaN or infinite.
        ScorefnError: expected_h is a tensor without gradient; no draw has enough others to fit c on; absent draws.

    Example:
        >>> import torch, scorefn as sf
        >>> from torch.distributions import Bernoulli, Independent
        >>> from scorefn import LinearControlVariate
        >>> logits = torch.zeros(3, requires_grad=True)
        >>> p = Independent(Bernoulli(logits=logits), 1)
        >>> cv = LinearControlVariate(lambda x: x.sum(-1), lambda: p.mean.sum())
        >>> sf.expectation(p, lambda x: 2 * x.sum(-1), 8, control_variate=cv).backward()
        >>> logits.grad.round(decimals=4)  # f is linear in h: nothing is left to chance
        tensor([0.5000, 0.5000, 0.5000])
    """

    def __init__(
        self,
        h: Integrand,
        expected_h: Expected | Callable[[], Expected],
        *,
        coefficient: Tensor | float | None = None,
        ridge: float = 1e-6,
    ) -> None:
        if not callable(h):
            raise ScorefnError(f"h={h!r} must be a function of the draws, as f is.")
        self.h, self.expected_h = h, expected_h
        super().__init__(coefficient, ridge)

    def __repr__(self) -> str:
        return called(self, self.h, self.expected_h, coefficient=self.coefficient, ridge=self.ridge)

    def _functions(self, draws: Draws) -> tuple[Tensor, Tensor]:
        h, lead = evaluate(self.h, draws.x, draws.log_prob), draws.fx.shape[:-1]
        several = h.ndim > len(lead)
        if h.shape[: len(lead)] != lead or h.ndim > len(lead) + 1 or h.numel() == 0:
            raise ShapeError(
                f"h returned shape {tuple(h.shape)}, but f has values [N, *B] = {tuple(lead)}: return {tuple(lead)}, "
                f"or {(*lead, 'H')} for several functions at once."
            )
        h = checked_values("h", h, draws)
        shapes = [tuple(h.shape[start:]) for start in (0, 1, h.ndim - 1 if several else h.ndim)]
        expected = self._expected(draws, shapes)
        return (h, expected) if several else (h.unsqueeze(-1), expected.unsqueeze(-1))

    def _expected(self, draws: Draws, shapes: list[tuple[int, ...]]) -> Tensor:
        given: Any = self.expected_h() if callable(self.expected_h) else self.expected_h
        if isinstance(given, list | tuple) and any(isinstance(part, Tensor) for part in given):
            raise ScorefnError("expected_h is a list of tensors, which would lose their gradient: use torch.stack.")
        try:
            expected = given if isinstance(given, Tensor) else torch.as_tensor(given, dtype=draws.fx.dtype)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ScorefnError(
                f"expected_h is a {type(given).__name__}: give a tensor, numbers, or a callable of nothing."
            ) from error
        if tuple(expected.shape) not in shapes:
            raise ShapeError(
                f"expected_h has shape {tuple(expected.shape)}, but h returned {shapes[0]}: its expectation has shape "
                f"{' or '.join(str(shape) for shape in sorted(set(shapes), key=len))}."
            )
        if isinstance(given, Tensor) and torch.is_grad_enabled() and not expected.requires_grad:
            raise ScorefnError(
                "expected_h is a tensor that does not require grad, so the gradient of E h, which is part of the "
                "estimate, would be missing. Compute it from the parameters of the distribution, for instance "
                "expected_h=lambda: p.mean; give plain numbers only if E h does not move with the parameters."
            )
        return checked_values("expected_h", expected if isinstance(given, Tensor) else expected.to(draws.fx), draws)


class DeltaMethod(_Correction):
    """The second-order Taylor polynomial of f about the mean of a normal distribution, as a control variate.

    ::

        h(x) = f(m) + f'(m) (x - m) + (x - m)^T f''(m) (x - m) / 2,    E h = f(m) + tr(f''(m) Sigma) / 2

    with the derivatives taken at the present mean and held, so that the gradient of E h is that in mean and covariance;
    then ``fx_i - c_i (h(x_i) - E h)``. For a quadratic f and c = 1 nothing of f - h is left but a constant. f is called
    once more, on one point, and differentiated twice there: D backward passes and ``[*B, D, D]`` numbers for the D
    coordinates of a problem.

    Sources: Paisley, Blei & Jordan (2012), "Variational Bayesian inference with stochastic search", section 3;
    Mohamed, Rosca, Figurnov & Mnih (2020), "Monte Carlo gradient estimation in machine learning", section 7.4.

    Args:
        p: Normal, MultivariateNormal, or Independent of one: the distribution of the draws.
        f: the integrand, in torch; a problem of the batch must not depend on the x of another.
        coefficient: c; None: fitted on the other blocks, as in ``LinearControlVariate``.
        ridge: damping of that fit.

    Raises:
        ScorefnError: p is not normal, or f is not differentiable.
        ShapeError: p is not the distribution of the draws, or these have several values.
        NonFiniteError: f or a derivative is NaN or infinite at the mean.

    Example:
        >>> import torch, scorefn as sf
        >>> loc = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
        >>> p = torch.distributions.Normal(loc, 1.0)
        >>> cv = sf.DeltaMethod(p, torch.square, coefficient=1.0)
        >>> sf.expectation(p, torch.square, 4, control_variate=cv).backward()
        >>> loc.grad.round(decimals=9)  # f is quadratic: nothing is left to chance
        tensor(2., dtype=torch.float64)
    """

    def __init__(self, p: Distribution, f: Integrand, *, coefficient: float | None = None, ridge: float = 1e-6) -> None:
        family = type(innermost(p))
        if reason := overridden(family, (Normal, MultivariateNormal), DENSITY, "mean and covariance"):
            raise ScorefnError(f"{reason} Give LinearControlVariate an h whose expectation under it you know.")
        if not issubclass(family, Normal | MultivariateNormal):
            raise ScorefnError(
                f"DeltaMethod expands f about the mean of a Normal or MultivariateNormal, but p is a "
                f"{type(p).__name__}. For another family, give LinearControlVariate an h whose expectation you know."
            )
        self.p, self.f = p, f
        super().__init__(coefficient, ridge)

    def __repr__(self) -> str:
        return called(self, self.p, self.f, coefficient=self.coefficient, ridge=self.ridge)

    def _functions(self, draws: Draws) -> tuple[Tensor, Tensor]:
        check_sampled(self, self.p, draws)
        p, batch = innermost(self.p), draws.fx.shape[1:-1]
        loc = p.loc.reshape(*batch, -1)
        covariance = p.covariance_matrix if isinstance(p, MultivariateNormal) else p.scale.square()[..., None, None]
        origin, (value, slope, curvature) = loc.detach(), self._taylor(p.loc.detach(), draws)
        step = draws.x.reshape(len(draws), *batch, -1) - origin
        h = value + _quadratic(step, slope, curvature)
        size = covariance.shape[-1]
        parts = curvature.reshape(*batch, -1, size, curvature.shape[-1] // size, size)
        own = parts.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)  # the blocks of f'' that meet a block of Sigma
        spread = (own * covariance.reshape(*batch, -1, size, size)).sum((-3, -2, -1)) / 2
        expected = value + _quadratic(loc - origin, slope, curvature) + spread
        return h.unsqueeze(-1), expected.unsqueeze(-1)

    def _taylor(self, mean: Tensor, draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
        """f ``[*B]``, f' ``[*B, D]`` and f'' ``[*B, D, D]`` at the mean, detached."""
        batch = draws.fx.shape[1:-1]
        with torch.enable_grad():
            mean = mean.clone().requires_grad_()
            value = evaluate(self.f, mean.unsqueeze(0), draws.log_prob)
            if value.shape != (1, *batch):
                raise ShapeError(f"f returned {tuple(value.shape)} for one draw, the mean, instead of {(1, *batch)}.")
            slope = _derivative(value.sum(), mean)
            if slope is None:
                raise ScorefnError(
                    "f does not depend differentiably on x, so it has no Taylor polynomial for DeltaMethod. Write f in "
                    "torch operations, or give LinearControlVariate an h whose expectation you know."
                )
            slope = slope.reshape(*batch, -1)
            rows = [_derivative(slope[..., d].sum(), mean) for d in range(slope.shape[-1])]
        curvature = [torch.zeros_like(slope) if row is None else row.reshape(slope.shape) for row in rows]
        taylor = (value.squeeze(0), slope, torch.stack(curvature, -2))
        found = [checked_values(name, t.detach(), draws) for name, t in zip(("f", "f'", "f''"), taylor, strict=True)]
        return found[0], found[1], found[2]


def _cross_fitted(cv: object, draws: Draws, h: Tensor, ridge: float) -> Tensor:
    """The slope of f on h over the other blocks of the own group, ``[N, *B, H]``."""
    needed = h.shape[-1] + 2
    known = others(torch.ones(len(draws), device=h.device), draws)
    if not in_transform() and not bool((known >= needed).any()):
        raise ScorefnError(
            f"{type(cv).__name__} fits {h.shape[-1]} coefficient(s) on the other blocks of draws, which takes {needed} "
            f"draws there, but there are at most {int(known.max())}. Raise num_samples, or give coefficient=."
        )
    weight = torch.ones_like(draws.fx)
    if draws.behaviour_log_prob is not None:
        weight = (draws.log_prob.detach() - draws.behaviour_log_prob).sum(-1, keepdim=True).exp()
    fx = weight * draws.fx.detach()
    _, c = cross_fit(h.unsqueeze(-2), fx, weight, draws, ridge=ridge, across_groups=False)
    return torch.where((known >= needed).reshape(-1, *[1] * (c.ndim - 1)), c, 0.0)


def _quadratic(step: Tensor, slope: Tensor, curvature: Tensor) -> Tensor:
    """``g . d + d^T H d / 2`` along the last axis of d ``[..., D]``."""
    bent = (curvature @ step.unsqueeze(-1)).squeeze(-1)
    return (step * (slope + bent / 2)).sum(-1)


def _derivative(value: Tensor, x: Tensor) -> Tensor | None:
    """The derivative of a scalar in x, itself differentiable; None where there is none."""
    if not value.requires_grad:
        return None
    derivative: Tensor | None = torch.autograd.grad(value, x, create_graph=True, allow_unused=True)[0]
    return derivative


def _checked_coefficient(coefficient: Tensor | float | None) -> Tensor | None:
    if coefficient is None:
        return None
    c = torch.as_tensor(coefficient, dtype=None if isinstance(coefficient, Tensor) else torch.float64).detach()
    if c.ndim > 1:
        raise ShapeError(f"coefficient has shape {tuple(c.shape)}: give a number, or one for each h.")
    if not bool(c.isfinite().all()):
        raise NonFiniteError(f"coefficient={coefficient!r} must be finite.")
    return c

"""Control variates: ``fx - c (h(x) - E h)``, of the same expectation and, where h is like f, of lower variance.

What h takes from the expectation is given back *with its gradient*: for a c that does not know the draw ::

    E[(f - c h) grad log p] + c grad E h  =  grad E f - c grad E h + c grad E h  =  grad E f

so ``E h`` is differentiable in the parameters of the distribution, and c is a constant.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.distributions import (
    Bernoulli,
    Categorical,
    Distribution,
    Independent,
    MultivariateNormal,
    Normal,
    OneHotCategorical,
)

from scorefn.core import (
    Draws,
    Integrand,
    NonFiniteError,
    ScorefnError,
    ShapeError,
    Total,
    evaluate,
    in_transform,
    refuse_two_fits,
)
from scorefn.reducers.cross_fitting import cross_fit, others

Expected: TypeAlias = Tensor | float | Sequence[float]


class LinearControlVariate:
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
        >>> import scorefn as sf
        >>> logits = torch.zeros(3, requires_grad=True)
        >>> p = Independent(Bernoulli(logits=logits), 1)
        >>> cv = LinearControlVariate(lambda x: x.sum(-1), lambda: p.mean.sum())
        >>> sf.expectation(p, lambda x: 2 * x.sum(-1), 8, control_variate=cv).backward()
        >>> logits.grad.round(decimals=4)  # f is linear in h: nothing is left to chance
        tensor([0.5000, 0.5000, 0.5000])
    """

    unbiased = True

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
        self.coefficient, self.ridge = _checked_coefficient(coefficient), _checked_ridge(ridge)

    @property
    def fitted(self) -> bool:
        """Whether c is learnt from the present draws; a baseline that is fitted to them as well is then refused."""
        return self.coefficient is None

    def __call__(self, draws: Draws) -> Draws:
        """The draws with ``fx - c . (h - E h)``."""
        _refuse_structure(self, draws)
        h, lead = evaluate(self.h, draws.x, draws.log_prob), draws.fx.shape[:-1]
        several = h.ndim > len(lead)
        if h.shape[: len(lead)] != lead or h.ndim > len(lead) + 1 or h.numel() == 0:
            raise ShapeError(
                f"h returned shape {tuple(h.shape)}, but f has values [N, *B] = {tuple(lead)}: return {tuple(lead)}, "
                f"or {(*lead, 'H')} for several functions at once."
            )
        h = _checked_values("h", h, draws)
        shapes = [tuple(h.shape[start:]) for start in (0, 1, h.ndim - 1 if several else h.ndim)]
        expected = self._expected(draws, shapes)
        if not several:
            h, expected = h.unsqueeze(-1), expected.unsqueeze(-1)
        return _corrected(self, draws, h, expected, self.coefficient, self.ridge)

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
        return _checked_values("expected_h", expected if isinstance(given, Tensor) else expected.to(draws.fx), draws)


class DeltaMethod:
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
    """

    unbiased = True

    def __init__(self, p: Distribution, f: Integrand, *, coefficient: float | None = None, ridge: float = 1e-6) -> None:
        if not isinstance(_base(p), Normal | MultivariateNormal):
            raise ScorefnError(
                f"DeltaMethod expands f about the mean of a Normal or MultivariateNormal, but p is a "
                f"{type(p).__name__}. For another family, give LinearControlVariate an h whose expectation you know."
            )
        self.p, self.f = p, f
        self.coefficient, self.ridge = _checked_coefficient(coefficient), _checked_ridge(ridge)

    @property
    def fitted(self) -> bool:
        """Whether c is learnt from the present draws; a baseline that is fitted to them as well is then refused."""
        return self.coefficient is None

    def __call__(self, draws: Draws) -> Draws:
        """The draws with ``fx - c (h - E h)``."""
        _refuse_structure(self, draws)
        _refuse_other_shape(self, self.p, draws)
        p, batch = _base(self.p), draws.fx.shape[1:-1]
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
        return _corrected(self, draws, h.unsqueeze(-1), expected.unsqueeze(-1), self.coefficient, self.ridge)

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
        found = [_checked_values(name, t.detach(), draws) for name, t in zip(("f", "f'", "f''"), taylor, strict=True)]
        return found[0], found[1], found[2]


class NaturalControlVariate:
    """A linear model of f in the sufficient statistics T of the distribution, fitted on *past* draws.

    ``fx - beta . (T(x) - E T)``, with beta the ridge regression of f on T over a buffer of past draws. E T is analytic
    and differentiable. In an exponential family of natural parameters eta, ``Cov(T)^-1 Cov(T, f)``, to which beta
    tends, is the natural gradient of E f in eta: what is left to the draws is what the model has not seen.

    T is ``(z, z^2)``, z = (x - m)/s at the present mean and scale, for each coordinate of a Normal; x of a Bernoulli;
    the one-hot x of a Categorical. The model is used where its R^2, cross-validated draw by draw on the buffer (PRESS),
    is above ``gate``; elsewhere the draws pass as they are. All of it comes from the past, so it is unbiased with every
    baseline and whatever the gate does. ``update`` takes the draws as they came, before any control variate.

    Sources: Salimans & Knowles (2013), "Fixed-form variational posterior approximation through stochastic linear
    regression", for the regression; Allen (1974) for PRESS.

    Args:
        measure: the distribution of the draws, or a callable of nothing that returns it as it is now.
        capacity: how many past draws are kept.
        gate: the least cross-validated R^2 at which the model is used.
        ridge: damping of each coefficient, relative to the sum of squares of its statistic.

    Raises:
        ScorefnError: another family than those above, or a call inside a ``torch.func`` transform.
        ShapeError: the batch shape changed, or the draws are not of that distribution.
    """

    unbiased = True
    fitted = False  # to the present draws

    def __init__(
        self,
        measure: Distribution | Callable[[], Distribution],
        *,
        capacity: int = 1000,
        gate: float = 0.1,
        ridge: float = 1e-3,
    ) -> None:
        if isinstance(capacity, bool) or not isinstance(capacity, int) or capacity < 3:
            raise ScorefnError(f"capacity must be an integer of at least 3, but it is {capacity!r}.")
        if not 0.0 <= gate < 1.0:
            raise ScorefnError(f"gate must lie in [0, 1), as an R^2 that is worth something does, but it is {gate!r}.")
        self.measure, self.capacity, self.gate, self.ridge = measure, capacity, float(gate), _checked_ridge(ridge)
        self.x: Tensor | None = None  # [M, *batch, *event]
        self.fx: Tensor | None = None  # [M, *B]

    def __call__(self, draws: Draws) -> Draws:
        """The draws with ``fx - beta . (T - E T)``."""
        if in_transform():
            raise ScorefnError(
                "NaturalControlVariate keeps a state, which a torch.func transform or torch.compile cannot trace: use "
                "LinearControlVariate there."
            )
        p = self._distribution(draws)
        statistics, expected = _statistics(p, draws.x, draws.fx.ndim - 2)
        self._check_batch(draws)
        beta, r_squared = self._fit(p, draws.fx.ndim - 2)
        if beta is None or r_squared is None:
            return draws
        beta = torch.where((r_squared > self.gate).unsqueeze(-1), beta, 0.0).to(draws.fx)
        return replace(draws, fx=draws.fx - (beta * (statistics - expected)).sum(-1, keepdim=True))

    def update(self, draws: Draws) -> None:
        """Take in the draws, as they came from ``draw``; the oldest are forgotten beyond ``capacity``."""
        width = _statistics(self._distribution(draws), draws.x[:1], draws.fx.ndim - 2)[0].shape[-1]
        if width + 2 > self.capacity:
            raise ScorefnError(
                f"NaturalControlVariate keeps capacity = {self.capacity} past draws, but {width} statistics take "
                f"{width + 2} before anything can be fitted: raise capacity to a few times that."
            )
        self._check_batch(draws)
        x, fx = draws.x.detach(), draws.fx.detach().squeeze(-1)
        if self.x is not None and self.fx is not None:
            x, fx = torch.cat([self.x.to(x), x]), torch.cat([self.fx.to(fx), fx])
        self.x, self.fx = x[-self.capacity :].clone(), fx[-self.capacity :].clone()

    def fit(self) -> tuple[Tensor, Tensor]:
        """Coefficients beta ``[*B, F]`` of the statistics, and the cross-validated R^2 ``[*B]``, on the buffer.

        Raises:
            ScorefnError: fewer than F + 2 past draws.
        """
        depth = 0 if self.fx is None else self.fx.ndim - 1
        beta, r_squared = self._fit(self.measure if isinstance(self.measure, Distribution) else self.measure(), depth)
        if beta is None or r_squared is None:
            raise ScorefnError("NaturalControlVariate has fewer past draws than F + 2: update it with more.")
        return beta, r_squared

    def _fit(self, p: Distribution, depth: int) -> tuple[Tensor | None, Tensor | None]:
        if self.x is None or self.fx is None:
            return None, None
        with torch.no_grad():
            t = _statistics(p, self.x, depth)[0].movedim(0, -2)  # [*B, M, F]
            y = self.fx.to(t).movedim(0, -1)
            num, width = t.shape[-2:]
            if num < width + 2:
                return None, None
            t, y = t - t.mean(-2, keepdim=True), y - y.mean(-1, keepdim=True)
            gram = t.mT @ t
            inverse = torch.linalg.pinv(
                gram + torch.diag_embed(self.ridge * gram.diagonal(dim1=-2, dim2=-1)), hermitian=True
            )
            beta = (inverse @ (t.mT @ y.unsqueeze(-1))).squeeze(-1)
            free = 1 - 1 / num - ((t @ inverse) * t).sum(-1)  # what a draw does not decide itself
            left_out = (y - (t @ beta.unsqueeze(-1)).squeeze(-1)) / free.clamp(min=1e-12)
            total = (y * num / (num - 1)).square().sum(-1)
            r_squared = 1 - left_out.square().sum(-1) / torch.where(total > 0, total, 1.0)
        return beta, torch.where(total > 0, r_squared, 0.0)

    def _distribution(self, draws: Draws) -> Distribution:
        """The distribution as it is now, checked against the draws."""
        _refuse_structure(self, draws)
        p = self.measure if isinstance(self.measure, Distribution) else self.measure()
        if not isinstance(_base(p), Normal | Bernoulli | Categorical | OneHotCategorical):
            raise ScorefnError(
                "NaturalControlVariate knows the statistics of Normal, Bernoulli, Categorical and OneHotCategorical, "
                f"but the measure is a {type(p).__name__}. Give LinearControlVariate its statistics."
            )
        _refuse_other_shape(self, p, draws)
        return p

    def _check_batch(self, draws: Draws) -> None:
        if self.x is None or self.fx is None:
            return
        if self.x.shape[1:] != draws.x.shape[1:] or self.fx.shape[1:] != draws.fx.shape[1:-1]:
            raise ShapeError(
                f"NaturalControlVariate learned from draws of shape {tuple(self.x.shape[1:])} and values "
                f"{tuple(self.fx.shape[1:])}, but meets {tuple(draws.x.shape[1:])} and {tuple(draws.fx.shape[1:-1])}: "
                "its buffer belongs to those problems. Use a new one."
            )


def _corrected(
    cv: object, draws: Draws, h: Tensor, expected: Tensor, coefficient: Tensor | None, ridge: float
) -> Draws:
    """``fx - c . (h - E h)``; h ``[N, *B, H]``, expected broadcasts to it, c given or fitted on the other blocks."""
    refuse_two_fits(draws, cv)
    if coefficient is None:
        c = _cross_fitted(cv, draws, (h - expected).detach(), ridge)
    elif coefficient.ndim and coefficient.shape != h.shape[-1:]:
        raise ShapeError(f"coefficient has shape {tuple(coefficient.shape)}, but h has {h.shape[-1]} function(s).")
    else:
        c = coefficient.detach().to(h)
    corrected = draws.fx - (c * (h - expected)).sum(-1, keepdim=True)
    return replace(draws, fx=corrected, fitted=draws.fitted or coefficient is None)


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


def _statistics(p: Distribution, x: Tensor, depth: int) -> tuple[Tensor, Tensor]:
    """T(x) ``[M, *B, F]``, detached, and E T ``[*B, F]``, differentiable; B has ``depth`` dimensions."""
    base = _base(p)
    if isinstance(base, Normal):
        origin, unit = base.loc.detach(), base.scale.detach()
        z, shift = (x - origin) / unit, (base.loc - origin) / unit
        t = torch.stack([z, z.square()], -1)
        expected = torch.stack([shift, shift.square() + (base.scale / unit).square()], -1)
    elif isinstance(base, Categorical):
        t, expected = torch.nn.functional.one_hot(x.long(), base.probs.shape[-1]).to(base.probs), base.probs
    elif isinstance(base, OneHotCategorical):
        t, expected = x, base.probs
    else:
        t, expected = x.unsqueeze(-1), base.probs.unsqueeze(-1)
    return t.detach().flatten(1 + depth), expected.flatten(depth)


def _base(p: Distribution) -> Any:
    """The distribution inside ``Independent``."""
    while isinstance(p, Independent):
        p = p.base_dist
    return p


def _refuse_structure(cv: object, draws: Draws) -> None:
    """Refuse draws on which h would be charged to some decisions only, or counted for some draws only."""
    if draws.fx.shape[-1] != 1 or type(draws.credit) is not Total:
        raise ShapeError(
            f"{type(cv).__name__} corrects one value that all decisions are charged with, but these draws have "
            f"{draws.fx.shape[-1]} value(s) under {draws.credit!r}. Sum the values into one, with credit Total()."
        )
    if draws.mask is not None and draws.mask.shape[-1] == 1:
        raise ScorefnError(
            f"{type(cv).__name__} needs every draw, but the mask says that the one decision of some is absent: which "
            "draws count would then depend on what is corrected. Leave those draws out."
        )


def _refuse_other_shape(cv: object, p: Distribution, draws: Draws) -> None:
    wanted = (len(draws), *p.batch_shape, *p.event_shape)
    found = tuple(draws.x.shape) if isinstance(draws.x, Tensor) else type(draws.x).__name__
    if found != wanted:
        raise ShapeError(
            f"{type(cv).__name__} was given a distribution whose {len(draws)} draws have shape {wanted}, but they have "
            f"{found}: give the distribution that is sampled."
        )


def _checked_values(name: str, values: Tensor, draws: Draws) -> Tensor:
    """Values of the dtype and device of the draws, finite; integers are converted."""
    if not values.dtype.is_floating_point:
        values = values.to(draws.fx.dtype)
    if values.dtype != draws.fx.dtype or values.device != draws.fx.device:
        raise ScorefnError(
            f"{name} is {values.dtype} on {values.device} beside values of f that are {draws.fx.dtype} on "
            f"{draws.fx.device}: scorefn neither rounds nor copies silently. Convert one of them."
        )
    if not in_transform() and not bool((finite := values.detach().isfinite()).all()):
        raise NonFiniteError(
            f"{name} is {values.detach()[~finite][0].item()}: it would make the whole gradient NaN. A control variate "
            "must be finite wherever the distribution has mass."
        )
    return values


def _checked_coefficient(coefficient: Tensor | float | None) -> Tensor | None:
    if coefficient is None:
        return None
    c = torch.as_tensor(coefficient, dtype=None if isinstance(coefficient, Tensor) else torch.float64).detach()
    if c.ndim > 1:
        raise ShapeError(f"coefficient has shape {tuple(c.shape)}: give a number, or one for each h.")
    if not bool(c.isfinite().all()):
        raise NonFiniteError(f"coefficient={coefficient!r} must be finite.")
    return c


def _checked_ridge(ridge: float) -> float:
    if not 0.0 < ridge < float("inf"):
        raise ScorefnError(
            f"ridge must be a positive number, but it is {ridge!r}: functions that repeat each other have no other "
            "solution."
        )
    return float(ridge)

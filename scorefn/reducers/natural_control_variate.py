"""A control variate that learns from past draws."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.distributions import Distribution

from scorefn.core import Draws, ScorefnError, ShapeError, in_transform
from scorefn.core.representation import called
from scorefn.reducers.baselines import check_moments
from scorefn.reducers.checks import check_finite, check_one_value, check_sampled, checked_ridge, innermost
from scorefn.reducers.sufficient_statistics import statistics_rule, sufficient_statistics


class NaturalControlVariate:
    """A linear model of f in the sufficient statistics T of the distribution, fitted on *past* draws.

    ``fx - beta . (T(x) - E T)``, with beta the ridge regression of f on T over a buffer of past draws. E T is analytic
    and differentiable. In an exponential family of natural parameters eta, ``Cov(T)^-1 Cov(T, f)``, to which beta
    tends, is the natural gradient of E f in eta: what is left to the draws is what the model has not seen.

    T spans the sufficient statistics of a coordinate, in a basis that is uncorrelated at the present parameters, where
    a damped fit keeps what nearly repeats itself:

    ============================ ===============================================================================
    family                       T
    ============================ ===============================================================================
    Normal                       z, z^2, with z = (x - m) / s
    MultivariateNormal           z_i, then z_i z_j for i >= j row by row, with z = L^-1 (x - m)
    Bernoulli, Poisson           x
    Categorical, OneHot          the one-hot x
    Exponential                  u = x / E x
    Gamma                        u = x / E x, log u - u
    Beta (a, b)                  log x - log(1 - x), (psi'(b) log x + psi'(a) log(1 - x)) / (psi'(a) + psi'(b))
    ============================ ===============================================================================

    The model is used where its R^2, cross-validated draw by draw on the buffer (PRESS), is above ``gate``; elsewhere
    the draws pass as they are. All of it comes from the past, so it is unbiased with every baseline and whatever the
    gate does. ``update`` takes the draws as they came, before any control variate.

    Sources: Salimans & Knowles (2013), "Fixed-form variational posterior approximation through stochastic linear
    regression", for the regression; Allen (1974) for PRESS; Wainwright & Jordan (2008), "Graphical models, exponential
    families, and variational inference", table 3.1, for the statistics.

    Args:
        measure: the distribution of the draws, or a callable of nothing that returns it as it is now.
        capacity: how many past draws are kept.
        gate: the least cross-validated R^2 at which the model is used.
        ridge: damping of each coefficient, relative to the sum of squares of its statistic.

    Raises:
        ScorefnError: another family than those above and those added by ``register_statistics``, or a call inside a
            ``torch.func`` transform.
        ShapeError: the batch shape changed, or the draws are not of that distribution.
        NonFiniteError: a statistic of a draw is infinite, such as the logarithm of a draw that underflowed; or squares
            of the values or statistics overflow in ``update``, which then leaves the buffer as it was.

    Example:
        >>> import torch, scorefn as sf
        >>> _ = torch.manual_seed(0)
        >>> p = torch.distributions.Normal(torch.tensor(1.0, requires_grad=True), 1.0)
        >>> cv = sf.NaturalControlVariate(p)
        >>> cv.update(sf.draw(p, torch.square, 100))  # past draws; expectation does this
        >>> draws = sf.draw(p, torch.square, 100)
        >>> bool(cv(draws).fx.var() < 1e-4 * draws.fx.var())  # z and z^2 make up x^2
        True
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
        if isinstance(measure, type) or not (isinstance(measure, Distribution) or callable(measure)):
            kind = f"the class {measure.__name__}" if isinstance(measure, type) else repr(measure)
            raise ScorefnError(
                f"NaturalControlVariate reads the statistics of a distribution, but measure is {kind}: give the "
                "distribution of the draws, or a callable of nothing that returns it as it is now."
            )
        self.measure, self.capacity, self.gate, self.ridge = measure, capacity, float(gate), checked_ridge(ridge)
        self.x: Tensor | None = None  # [M, *batch, *event]
        self.fx: Tensor | None = None  # [M, *B]

    def __repr__(self) -> str:
        return called(self, self.measure, capacity=self.capacity, gate=self.gate, ridge=self.ridge)

    def __call__(self, draws: Draws) -> Draws:
        """The draws with ``fx - beta . (T - E T)``."""
        if in_transform():
            raise ScorefnError(
                "NaturalControlVariate keeps a state, which a torch.func transform or torch.compile cannot trace: use "
                "LinearControlVariate there."
            )
        p = self._distribution(draws)
        statistics, expected = self._statistics(p, draws)
        self._check_batch(draws)
        beta, r_squared = self._fit(p, draws.fx.ndim - 2)
        if beta is None or r_squared is None:
            return draws
        beta = torch.where((r_squared > self.gate).unsqueeze(-1), beta, 0.0).to(draws.fx)
        return replace(draws, fx=draws.fx - (beta * (statistics - expected)).sum(-1, keepdim=True))

    def update(self, draws: Draws) -> None:
        """Take in the draws, as they came from ``draw``; the oldest are forgotten beyond ``capacity``."""
        statistics = self._statistics(self._distribution(draws), draws)[0]
        width = statistics.shape[-1]
        if width + 2 > self.capacity:
            raise ScorefnError(
                f"NaturalControlVariate keeps capacity = {self.capacity} past draws, but {width} statistics take "
                f"{width + 2} before anything can be fitted: raise capacity to a few times that."
            )
        self._check_batch(draws)
        x, fx = draws.x.detach(), draws.fx.detach().squeeze(-1)
        if self.x is not None and self.fx is not None:
            x, fx = torch.cat([self.x.to(x), x]), torch.cat([self.fx.to(fx), fx])
        x, fx = x[-self.capacity :].clone(), fx[-self.capacity :].clone()
        check_moments("NaturalControlVariate", 4 * fx.square().sum(0), 4 * statistics.square().sum(0))
        self.x, self.fx = x, fx

    def fit(self) -> tuple[Tensor, Tensor]:
        """Coefficients beta ``[*B, F]`` of the statistics, and the cross-validated R^2 ``[*B]``, on the buffer.

        Raises:
            ScorefnError: fewer than F + 2 past draws.
        """
        depth = 0 if self.fx is None else self.fx.ndim - 1
        beta, r_squared = self._fit(self._measure(), depth)
        if beta is None or r_squared is None:
            raise ScorefnError("NaturalControlVariate has fewer past draws than F + 2: update it with more.")
        return beta, r_squared

    def _fit(self, p: Distribution, depth: int) -> tuple[Tensor | None, Tensor | None]:
        if self.x is None or self.fx is None:
            return None, None
        with torch.no_grad():
            t = _flat(p, self.x, depth)[0].movedim(0, -2)  # [*B, M, F]
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

    def _measure(self) -> Distribution:
        """The distribution as it is now."""
        return self.measure if isinstance(self.measure, Distribution) else self.measure()

    def _distribution(self, draws: Draws) -> Distribution:
        """The distribution as it is now, checked against the draws."""
        check_one_value(self, draws)
        p = self._measure()
        statistics_rule(innermost(p))  # refused before the draws are compared
        check_sampled(self, p, draws)
        return p

    def _statistics(self, p: Distribution, draws: Draws) -> tuple[Tensor, Tensor]:
        """T ``[N, *B, F]`` and E T ``[*B, F]``, finite."""
        t, expected = _flat(p, draws.x, draws.fx.ndim - 2)
        family = type(innermost(p)).__name__
        check_finite(f"A sufficient statistic of {family}", t)
        check_finite(f"The expectation of a sufficient statistic of {family}", expected)
        return t, expected

    def _check_batch(self, draws: Draws) -> None:
        if self.x is None or self.fx is None:
            return
        if self.x.shape[1:] != draws.x.shape[1:] or self.fx.shape[1:] != draws.fx.shape[1:-1]:
            raise ShapeError(
                f"NaturalControlVariate learned from draws of shape {tuple(self.x.shape[1:])} and values "
                f"{tuple(self.fx.shape[1:])}, but meets {tuple(draws.x.shape[1:])} and {tuple(draws.fx.shape[1:-1])}: "
                "its buffer belongs to those problems. Use a new one."
            )


def _flat(p: Distribution, x: Tensor, depth: int) -> tuple[Tensor, Tensor]:
    """T(x) ``[M, *B, F]``, detached, and E T ``[*B, F]``; B has ``depth`` dimensions, F counts all coordinates."""
    t, expected = sufficient_statistics(innermost(p), x)
    return t.detach().flatten(1 + depth), expected.flatten(depth)

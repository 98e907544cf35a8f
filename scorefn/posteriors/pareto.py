"""Pareto-smoothed importance sampling: how far a guide can be trusted, told from the tail of its weights."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scorefn.core import NonFiniteError, ScorefnError, ShapeError, check_count

LEAST_DRAWS = 25
"""The tail is a fifth of so few draws, and a generalised Pareto distribution is fitted to no fewer than five."""
LEAST_TAIL = 5
LOG_TINY = math.log(torch.finfo(torch.float64).tiny)


@dataclass(frozen=True, eq=False)
class PSIS:
    """Smoothed weights and the shape of their tail.

    Attributes:
        log_weights: ``[S, *B]`` float64, smoothed, on the scale of those given: not normalised.
        k: ``[*B]``, the estimated shape: the weights have about 1/k moments. Minus infinity where a whole tail of draws
            shares the largest weight, infinity where too few weights are positive or distinct to tell.
        threshold: ``khat_threshold(S)``.

    Example:
        >>> import torch
        >>> from scorefn.posteriors import psis
        >>> u = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
        >>> found = psis(
        ...     -torch.tensor([0.3, 0.9]) * u.log()[:, None]
        ... )  # tails of shape .3 and .9, two problems
        >>> found.k.round(decimals=1).tolist(), found.reliable.tolist()
        ([0.3, 0.9], [True, False])
        >>> found.log_weights.shape
        torch.Size([10000, 2])
    """

    log_weights: Tensor
    k: Tensor
    threshold: float

    @property
    def reliable(self) -> Tensor:
        """``[*B]`` bool: k is below the threshold."""
        return self.k < self.threshold

    def __repr__(self) -> str:
        """Short."""
        return f"PSIS(k={self.k.tolist()}, threshold={self.threshold:.3g}, draws={len(self.log_weights)})"


def khat_threshold(num_draws: int) -> float:
    """The k-hat up to which smoothed importance sampling with S draws has a small error: ``min(1 - 1/log10 S, 0.7)``.

    Source: Vehtari, Simpson, Gelman, Yao & Gabry (2024), "Pareto smoothed importance sampling", eq. 13.

    Raises:
        ScorefnError: fewer than 25 draws, or a number that is no integer.

    Example:
        >>> from scorefn.posteriors import khat_threshold
        >>> khat_threshold(100), khat_threshold(10_000)
        (0.5, 0.7)
    """
    if check_count("num_draws", num_draws) < LEAST_DRAWS:
        raise ScorefnError(
            f"There are {num_draws} log weights, but at least {LEAST_DRAWS} are needed: the tail, a fifth of them, "
            "says nothing otherwise. Draw more from the guide; 1000 are usual."
        )
    return min(1 - 1 / math.log10(num_draws), 0.7)


def draws_needed(k: float) -> float:
    """How many draws make smoothed importance sampling reliable: ``10^(1/(1 - max(k, 0)))``; infinite from k = 1 on.

    Beyond k = 0.7 the number is out of reach in practice, and just below 1 it is too large for a float and infinite
    too. Source: Vehtari et al. (2024), eq. 12.

    Raises:
        ScorefnError: k is NaN.

    Example:
        >>> from scorefn.posteriors import draws_needed
        >>> draws_needed(0.5)
        100.0
    """
    if math.isnan(k):
        raise ScorefnError(f"k is {k!r}, which says nothing about a tail. Take it from pareto_k, which is never NaN.")
    exponent = 1 / (1 - max(k, 0.0)) if k < 1 else math.inf
    return 10.0**exponent if exponent < sys.float_info.max_10_exp else math.inf


def pareto_k(log_weights: Any) -> Tensor:
    """k-hat, the shape of the tail of the importance weights ``p(x, z)/q(z)`` of draws z of a guide q, ``[*B]``.

    Below ``khat_threshold(S)`` the guide is close enough to the posterior for importance sampling to correct it; above,
    the error of any expectation under q may be large. Source: Yao, Vehtari, Simpson & Gelman (2018), "Yes, but did it
    work? Evaluating variational inference".

    Args:
        log_weights: see ``psis``.

    Raises:
        ScorefnError: see ``psis``.

    Example:
        >>> import torch
        >>> from scorefn.posteriors import pareto_k
        >>> u = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
        >>> round(pareto_k(-0.5 * u.log()).item(), 2)  # weights u^-1/2 have a tail of shape 1/2
        0.5
    """
    return psis(log_weights).k


def psis(log_weights: Any) -> PSIS:
    """Pareto-smoothed importance sampling.

    The M = ceil(min(S/5, 3 sqrt S)) largest weights are replaced by the quantiles at (j - 1/2)/M of a generalised
    Pareto distribution fitted to them, but none by more than the largest. The fit is that of Zhang & Stephens (2009),
    "A new and efficient estimation method for the generalized Pareto distribution": a posterior mean over a grid of
    ``b = -k/sigma`` under the profile likelihood; k is then drawn to 1/2 by a prior worth ten observations. Source:
    Vehtari, Simpson, Gelman, Yao & Gabry (2024), "Pareto smoothed importance sampling", algorithm 1.

    Weights that are tied, as those of discrete latents are, take a cutoff at which at least five weights and two
    different ones exceed it, and are not smoothed then.

    Args:
        log_weights: ``[S, *B]``, log p(x, z) - log q(z) up to a constant, of independent draws; minus infinity is a
            weight of zero. Each of the problems in B has a tail of its own.

    Raises:
        ShapeError: a scalar.
        ScorefnError: fewer than 25 draws, or complex numbers.
        NonFiniteError: a log weight that is NaN or plus infinity, or none that is finite.

    Example:
        >>> import torch
        >>> from scorefn.posteriors import psis
        >>> _ = torch.manual_seed(0)
        >>> q, p = torch.distributions.Normal(0.0, 1.0), torch.distributions.StudentT(5.0)
        >>> z = q.sample((4000,))
        >>> narrow = psis(
        ...     p.log_prob(z) - q.log_prob(z)
        ... )  # a guide with thinner tails than its target
        >>> z = p.sample((4000,))
        >>> wide = psis(
        ...     q.log_prob(z) - p.log_prob(z)
        ... )  # and the other way round: the weights are bounded
        >>> bool(wide.k < 0 < 0.5 < narrow.k)
        True
    """
    values = as_log_weights(log_weights)
    threshold = khat_threshold(len(values))
    columns = values.reshape(len(values), -1).unbind(1)
    fits = [_smoothed(column) for column in columns]
    smoothed = torch.stack([fit[0] for fit in fits], 1).reshape(values.shape)
    k = torch.tensor([fit[1] for fit in fits], dtype=torch.float64).reshape(values.shape[1:])
    return PSIS(smoothed, k.to(values.device), threshold)


def as_log_weights(log_weights: Any) -> Tensor:
    """``[S, *B]`` in float64, detached; refused where they are no weights."""
    given = torch.as_tensor(log_weights).detach()
    if given.is_complex():
        raise ScorefnError(
            f"log_weights is {given.dtype}, but a weight is a positive number, and its logarithm is real. Find what "
            "made log p or log q complex; where the imaginary part is only rounding, pass log_weights.real."
        )
    if not isinstance(log_weights, Tensor):  # a list of floats would have been rounded to the default dtype
        given = torch.as_tensor(log_weights, dtype=torch.float64).detach()
    values = given.to(torch.float64)
    if values.ndim == 0 or 0 in values.shape:
        raise ShapeError(
            f"log_weights has shape {tuple(values.shape)}, but it must be [S, *B]: one log weight per draw comes first."
        )
    flat = values.reshape(len(values), -1)
    if bool((bad := flat.isnan() | (flat == math.inf)).any()):
        rows = bad.any(1).nonzero().flatten().tolist()
        raise NonFiniteError(
            f"The log weight is {flat[bad][0].item()} at {len(rows)} of {len(flat)} draws, namely {rows[:10]}"
            f"{' ...' if len(rows) > 10 else ''}: log p or log q is not finite there. Minus infinity alone is allowed, "
            "for a draw outside the model's support."
        )
    if bool((flat == -math.inf).all(0).any()):
        raise NonFiniteError(
            f"All {len(flat)} weights are zero, so there is nothing to estimate: every draw of the guide lies outside "
            "the model's support. Give the guide the constraints of the model's latents."
        )
    return values


def _smoothed(log_weights: Tensor) -> tuple[Tensor, float]:
    """The smoothed log weights ``[S]`` and k-hat."""
    largest = log_weights.max()
    ordered, order = (log_weights - largest).sort()
    S = len(ordered)
    usual = ordered[S - 1 - math.ceil(min(S / 5, 3 * math.sqrt(S)))].clamp(min=LOG_TINY)
    if usual == 0:
        return log_weights, -math.inf
    if (cutoff := _cutoff(ordered, usual)) is None:
        return log_weights, math.inf
    tail = ordered > cutoff
    excess = (ordered[tail] - cutoff).expm1()
    k, sigma = _generalized_pareto(excess / excess[-1])  # the fit is of any scale; this one cannot underflow
    if cutoff < usual:
        return log_weights, k
    n = len(excess)
    probability = (torch.arange(n, dtype=torch.float64, device=ordered.device) + 0.5) / n
    quantile = excess[-1] * _quantile(probability, k, sigma)
    smoothed = log_weights.clone()
    smoothed[order[tail]] = largest + (cutoff + quantile.log1p()).clamp(max=0.0)
    return smoothed, k


def _cutoff(ordered: Tensor, usual: Tensor) -> Tensor | None:
    """The usual cutoff, or the next lower one that enough values exceed, two of them different; None: there is none."""
    cutoff = usual
    while (tail := ordered[ordered > cutoff]).numel() < LEAST_TAIL or bool(tail[0] == tail[-1]):
        below = ordered[(ordered < cutoff) & (ordered > LOG_TINY)]
        if below.numel() == 0:
            return None
        cutoff = below[-1]
    return cutoff


def _generalized_pareto(x: Tensor) -> tuple[float, float]:
    """Shape and scale fitted to positive x ``[n]``, in ascending order."""
    n = len(x)
    m = 30 + int(math.sqrt(n))
    quartile = x[int(n / 4 + 0.5) - 1]
    b = 1 - (m / (torch.arange(m, dtype=x.dtype, device=x.device) + 0.5)).sqrt()
    b = 1 / x[-1] + b / (3 * quartile)
    k = (-b.unsqueeze(1) * x).log1p().mean(1)
    profile = n * ((-b / k).log() - k - 1)
    mean = (profile.softmax(0) * b).sum()
    shape = (-mean * x).log1p().mean()
    return float((n * shape + 10 * 0.5) / (n + 10)), float(-shape / mean)


def _quantile(probability: Tensor, k: float, sigma: float) -> Tensor:
    survival = (-probability).log1p()
    return sigma * (-survival if k == 0 else (-k * survival).expm1() / k)

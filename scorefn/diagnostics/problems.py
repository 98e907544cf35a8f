"""Draws per problem: independent problems of unequal noise share one budget, the noisy ones with more draws."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from scorefn.core import Integrand, Measure, NonFiniteError, ScorefnError, ShapeError, check_count, draw
from scorefn.core.representation import representation
from scorefn.diagnostics.value_gradients import value_gradients

_ELEMENTS = 2**22  # gradients of single draws in memory at once
_ROUNDING = 1e-9  # by which a sum of costs may exceed the budget, relatively


def draws_per_problem(
    variance: Tensor,
    budget: float,
    *,
    cost: Tensor | None = None,
    excess: Tensor | None = None,
    least: int = 2,
) -> Tensor:
    """The draws of each problem that give a sum of B independent gradients the least variance a budget can buy.

    ::

        minimise  sum_b v_b/n_b + w_b/(n_b (n_b - 1))   over integers n_b >= least  with  sum_b c_b n_b <= budget

    Without w and rounding that is ``n_b`` proportional to ``sqrt(v_b / c_b)`` (Neyman, 1934, "On the two different
    aspects of the representative method"; with costs: Cochran, 1977, "Sampling techniques", 3rd ed., section 5.5).
    Draws are added where one more removes most variance per cost. With equal costs that is the integer optimum,
    exactly, as the variance is convex in each n_b. With unequal costs what is left of a budget can be too small for the
    best next draw; then the variance is above the optimum by less than what the first draw that did not fit would have
    removed. Budget that would remove no variance is not spent.

    v and w are those of ``problem_noise``. Measure them on draws of their own: counts that depend on the draws that
    they are used for bias an estimate.

    Args:
        variance: ``[B]``, v_b, of one draw, summed over coordinates.
        budget: in the unit of the costs; without costs, a number of draws.
        cost: ``[B]``, c_b, of one draw; None: 1 each.
        excess: ``[B]``, w_b, what leave-one-out adds; None: 0.
        least: fewer draws no problem gets; leave-one-out needs 2.

    Returns:
        ``[B]``, int64, on the device of variance.

    Raises:
        ScorefnError: a budget below that of the least draws, a variance that is negative or a cost that is not
            positive, or an excess with ``least=1``, where it is infinite.
        ShapeError: variance is not ``[B]``, or cost or excess not like it.
        NonFiniteError: a variance or a cost is NaN or infinite.

    Example:
        >>> import torch
        >>> from scorefn.diagnostics import draws_per_problem
        >>> draws_per_problem(torch.tensor([1.0, 4.0, 25.0]), budget=16).tolist()
        [2, 4, 10]
    """
    v = _numbers("variance", variance, None)
    c = torch.ones_like(v) if cost is None else _numbers("cost", cost, v)
    w = torch.zeros_like(v) if excess is None else _numbers("excess", excess, v)
    if bool((c <= 0).any()):
        raise ScorefnError(f"cost must be positive, but its least is {c.min().item():g}: what a draw costs is counted.")
    least = check_count("least", least)
    if excess is not None and least < 2:
        raise ScorefnError("excess is the noise of leave-one-out, which needs least=2 draws, but least is 1.")
    if not (isinstance(budget, int | float) and math.isfinite(budget)):
        raise ScorefnError(f"budget must be a finite number, but it is {budget!r}.")
    limit = budget if cost is None else budget + _ROUNDING * abs(budget)
    if (needed := least * float(c.sum())) > limit:
        raise ScorefnError(
            f"budget is {budget:g}, but {least} draws of each of the {len(v)} problems cost {needed:g} already. Raise "
            "the budget, lower least, or leave problems out."
        )
    count = _common_price(v, w, c, limit, least)
    left = limit - float((c * count).sum())
    n, v_, w_, c_ = count.tolist(), v.tolist(), w.tolist(), c.tolist()

    def offer(b: int) -> tuple[float, int]:
        return -_gain(v_[b], w_[b], n[b]) / c_[b], b

    heap = [offer(b) for b in range(len(n))]
    heapq.heapify(heap)
    while heap:
        price, b = heapq.heappop(heap)
        if price < 0 and c_[b] <= left:
            n[b], left = n[b] + 1, left - c_[b]
            heapq.heappush(heap, offer(b))
    return torch.tensor(n, device=variance.device)


def _gain(v: Any, w: Any, n: Any) -> Any:
    """What one draw more than n removes of ``v/n + w/(n (n - 1))``."""
    return (v + 2 * w / (n - 1 + (n == 1))) / (n * (n + 1))  # w is 0 where n is 1


def _common_price(v: Tensor, w: Tensor, c: Tensor, limit: float, least: int) -> Tensor:
    """The counts ``[B]`` after all draws that gain a common price per cost or more: nearly the whole budget."""

    def counts(price: float) -> Tensor:
        low = torch.full_like(v, float(least))
        high = torch.maximum(low, torch.floor(limit / c))
        while bool((low < high).any()):  # the last draw that is worth it, by bisection
            middle = torch.floor((low + high + 1) / 2)
            worth = _gain(v, w, middle - 1) >= price * c
            low, high = torch.where(worth, middle, low), torch.where(worth, high, middle - 1)
        return low

    cheap, dear = 0.0, float((_gain(v, w, torch.full_like(v, float(least))) / c).max())
    best = torch.full_like(v, float(least))
    low = math.log(dear) - 80 if dear > 0 else 0.0
    high = math.log(dear) if dear > 0 else cheap
    for _ in range(60 if dear > 0 else 0):
        middle = (low + high) / 2
        found = counts(math.exp(middle))
        if float((c * found).sum()) <= limit:
            best, high = found, middle
        else:
            low = middle
    return best.long()


@dataclass(frozen=True, eq=False)
class ProblemNoise:
    """The noise of each problem's gradient with n draws: ``v/n + w/(n (n - 1))``, summed over coordinates.

    Attributes:
        variance: ``[B]``, v. Estimated without bias, and so it can be negative by chance.
        excess: ``[B]``, w, likewise; 0 without leave-one-out.

    Raises:
        ScorefnError: from ``draws``, as ``draws_per_problem``.

    Example:
        >>> import torch
        >>> from scorefn.diagnostics import ProblemNoise
        >>> noise = ProblemNoise(variance=torch.tensor([1.0, 9.0]), excess=torch.zeros(2))
        >>> noise.at(torch.tensor([2, 2])).tolist(), noise.draws(budget=8).tolist()
        ([0.5, 4.5], [2, 6])
    """

    variance: Tensor
    excess: Tensor

    __repr__ = representation

    def at(self, num_samples: Tensor) -> Tensor:
        """``[B]``: the variance with so many draws of each problem."""
        n = num_samples.to(self.variance)
        return self.variance / n + torch.where(self.excess == 0, 0.0, self.excess / (n * (n - 1)))

    def draws(self, budget: float, *, cost: Tensor | None = None, least: int = 2) -> Tensor:
        """``draws_per_problem``, with 0 for what is negative."""
        v, w = self.variance.clamp(min=0), self.excess.clamp(min=0)
        return draws_per_problem(v, budget, cost=cost, excess=w if bool((w > 0).any()) else None, least=least)


def problem_noise(
    p: Measure,
    f: Integrand,
    params: Tensor | Iterable[Tensor],
    num_samples: int = 32,
    *,
    baseline: Literal["auto"] | None = "auto",
) -> ProblemNoise:
    """Measure the noise of each problem's gradient on N pilot draws.

    The gradient of n draws with leave-one-out is a U-statistic of order 2, with the kernel ::

        h(x_i, x_j) = ((f_i - f_j)(s_i - s_j) + grad f_i + grad f_j) / 2,    s = grad log p

    whose variance is ``v/n + w/(n (n - 1))``, exactly, with ``v = 4 z_1`` and ``w = 2 z_2 - 4 z_1``, z_1 the variance
    of E[h | x_i] and z_2 that of h (Hoeffding, 1948, "A class of statistics with asymptotically normal distribution",
    section 5). Where f does not depend on the parameters that is ``v = E|(f - E f) s|^2 - |g|^2`` and
    ``w = Var f E|s|^2 + |g|^2``. Both are estimated without bias, from means over distinct draws.

    Parameters may belong to one problem each, as rows of a table ``[B, ...]``, which takes N backward passes. Or all
    problems share them, as those of a network: then it takes N for each problem, in sweeps, a measurement for every
    few hundred steps. Twice as many where f requires grad. A pilot of few draws, such as 8, says too little, and the
    counts that it suggests can be worse than the same for all: average those of several steps.

    Args:
        p: a distribution of batch shape ``[B, *rest]``.
        f: x ``[N, B, *rest, *event]`` to ``[N, B]``.
        params: the tensors to differentiate.
        num_samples: N, at least 4, or 2 without baseline.
        baseline: "auto": leave-one-out; None: none, ``v = Var(f s + grad f)`` and ``w = 0``.

    Raises:
        ShapeError: f's values are not ``[N, B]``.
        ScorefnError: too few draws, no parameters, or as ``sf.draw``.
        NonFiniteError: a gradient that is NaN or infinite, or as ``sf.draw``.

    Example:
        >>> import torch
        >>> from scorefn.diagnostics import problem_noise
        >>> _ = torch.manual_seed(0)
        >>> logits = torch.zeros(2, requires_grad=True)  # one bit for each of two problems
        >>> p = torch.distributions.Bernoulli(logits=logits)
        >>> noise = problem_noise(p, lambda x: x * torch.tensor([1.0, 3.0]), logits, num_samples=16)
        >>> noise.variance.shape, noise.draws(budget=40).sum().item() <= 40
        (torch.Size([2]), True)
    """
    if baseline not in ("auto", None):
        raise ScorefnError(f'baseline must be "auto" or None, whose noise has a known form, but it is {baseline!r}.')
    least = 2 if baseline is None else 4
    if (N := check_count("num_samples", num_samples)) < least:
        raise ScorefnError(
            f"num_samples must be at least {least} to measure the noise "
            f"{'without a baseline' if baseline is None else 'of leave-one-out'}, but it is {N}."
        )
    params = (params,) if isinstance(params, Tensor) else tuple(params)
    draws = draw(p, f, N)
    if draws.fx.ndim != 3 or draws.log_prob.shape[-1] != 1:
        raise ShapeError(
            f"f's values have shape {tuple(draws.fx.shape[:-1])}, but problems need [N, B]: one value for each of "
            f"{N} draws of each of B problems of a single decision. Flatten several axes of problems into one."
        )
    log_prob, fx = draws.log_prob[..., 0], draws.fx[..., 0]
    B, size = fx.shape[1], sum(q.numel() for q in params)
    rows, chunk = _of_all, max(_ELEMENTS // max(N * size, 1), 1)
    if all(_is_separate(values, params) for values in (log_prob, fx) if values.requires_grad):
        rows, chunk = _of_own, B
    parts = []
    for some in torch.arange(B, device=fx.device).split(chunk):
        score = rows(log_prob, params, some)
        path = rows(fx, params, some) if fx.requires_grad else torch.zeros_like(score)
        if not bool((score.isfinite() & path.isfinite()).all()):
            raise NonFiniteError(
                "The gradient of some draws is NaN or infinite, so it has no variance. Make f and log_prob finite and "
                "differentiable before they are measured."
            )
        parts.append(_moments(fx[:, some].detach().double(), score, path, baseline is not None))
    return ProblemNoise(*(torch.cat(several) for several in zip(*parts, strict=True)))


def _of_all(values: Tensor, params: tuple[Tensor, ...], some: Tensor) -> Tensor:
    """The gradients ``[N, b, P]`` of the values ``[N, B]`` of some problems, by any parameters."""
    return value_gradients(values[:, some], params).double()


def _of_own(values: Tensor, params: tuple[Tensor, ...], some: Tensor) -> Tensor:
    """The same ``[N, B, P/B]`` of all problems, by those parameters only that are a problem's own: N passes."""
    found = value_gradients(values.sum(1), params).double()
    parts = found.split([q.numel() for q in params], 1)
    return torch.cat([part.reshape(len(values), len(some), -1) for part in parts], -1)


def _is_separate(values: Tensor, params: tuple[Tensor, ...]) -> bool:
    """Whether row b of every parameter takes part in problem b only, and so serves all problems in one pass.

    Two passes show it: with problem b weighted by a number of its own, row b of each gradient is multiplied by it.
    """
    N, B = values.shape
    if not params or not all(q.ndim and len(q) == B for q in params):
        return False
    generator = torch.Generator().manual_seed(0)
    weight = (1 + torch.rand(N, 1, generator=generator)).to(values).expand(N, B)
    mark = (1 + torch.rand(B, generator=generator)).to(values)
    plain, marked = (
        torch.autograd.grad(values, params, w, retain_graph=True, allow_unused=True, materialize_grads=True)
        for w in (weight, weight * mark)
    )
    tolerance = 64 * torch.finfo(values.dtype).eps
    return all(
        bool(((two - one * mark.reshape(-1, *[1] * (one.ndim - 1))).abs() <= tolerance * one.abs().amax()).all())
        for one, two in zip(plain, marked, strict=True)
    )


def _moments(f: Tensor, s: Tensor, d: Tensor, leave_one_out: bool) -> tuple[Tensor, Tensor]:
    """v and w, ``[B]``, from f ``[N, B]`` and scores and pathwise gradients ``[N, B, P]``."""
    N = len(f)
    if not leave_one_out:
        v = (f.unsqueeze(-1) * s + d).var(0).sum(-1)
        return v, torch.zeros_like(v)
    f = f - f.mean(0)  # h does not change, and rounding is smaller
    u = f.unsqueeze(-1) * s + d
    ss, uu, us = (torch.einsum("ibp,jbp->ijb", one, two) for one, two in ((s, s), (u, u), (u, s)))
    s2, u2, own = (torch.diagonal(gram).T for gram in (ss, uu, us))  # [N, B]

    def both(first: Tensor, second: Tensor) -> Tensor:  # first_i second_j + first_j second_i
        one = first.unsqueeze(1) * second
        return one + one.transpose(0, 1)

    cross = f.unsqueeze(1) * us + (f.unsqueeze(1) * us).transpose(0, 1)  # f_i u_i . s_j, and with i and j swapped
    square = both(u2, torch.ones_like(f)) + both(f.square(), s2) - 2 * cross - 2 * both(f, own)
    square = (square + 2 * uu + 2 * f.unsqueeze(1) * f * ss) / 4  # |h_ij|^2
    row = square.sum(1) - torch.diagonal(square).T
    column = (N - 2) * u + u.sum(0) - f.unsqueeze(-1) * (s.sum(0) - s) + f.unsqueeze(-1) * s
    column = column / 2  # sum_j h_ij, as the sum over all f is 0
    pairs = row.sum(0)
    chains = (column.square().sum(-1) - row).sum(0)  # sum over i and distinct j, k of h_ij . h_ik
    apart = column.sum(0).square().sum(-1) - 4 * chains - 2 * pairs  # h_ij . h_kl, all four distinct
    z2 = pairs / (N * (N - 1))
    z1 = chains / (N * (N - 1) * (N - 2))
    signal = apart / (N * (N - 1) * (N - 2) * (N - 3))
    v = 4 * (z1 - signal)
    return v, 2 * (z2 - signal) - v


def _numbers(name: str, values: Tensor, like: Tensor | None) -> Tensor:
    """``[B]`` in double precision on the CPU: finite and not negative."""
    if not isinstance(values, Tensor) or values.ndim != 1 or not len(values):
        what = f"has shape {tuple(values.shape)}" if isinstance(values, Tensor) else f"is {values!r}"
        raise ShapeError(f"{name} {what}, but it must be a tensor [B]: one number for each problem.")
    if like is not None and values.shape != like.shape:
        raise ShapeError(f"{name} has shape {tuple(values.shape)}, but variance {tuple(like.shape)}: both are [B].")
    found = values.detach().double().cpu()
    if not bool(found.isfinite().all()):
        raise NonFiniteError(f"{name} is {found[~found.isfinite()][0].item()} for some problem: leave that one out.")
    if bool((found < 0).any()):
        raise ScorefnError(
            f"{name} must not be negative, but its least is {found.min().item():g}: an estimate that is negative by "
            "chance is taken for 0 by .clamp(min=0)."
        )
    return found

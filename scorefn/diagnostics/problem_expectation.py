"""An expectation whose problems have different numbers of draws; f sees those draws only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from scorefn.core import (
    Baseline,
    Draws,
    LeaveOneOut,
    Measure,
    ScorefnError,
    ShapeError,
    check_support,
    evaluate,
    surrogate,
)


def expectation_per_problem(
    p: Measure,
    f: Callable[[Any, Tensor], Any],
    num_samples: Tensor,
    *,
    baseline: Baseline | Literal["auto"] | None = "auto",
) -> Tensor:
    """``expectation`` with a number of draws for each problem, ``[B]``; f is called once, on all sum_b n_b draws.

    ``(1/n_b) sum_i f(x_bi)``, whose gradient is the score-function estimate. max_b n_b draws of all problems are made
    and scored, which is cheap beside f; f sees only those that are wanted, ``x[i]`` being a draw of problem
    ``problem[i]``. No baseline is updated. The counts must not depend on these draws.

    Args:
        p: a distribution of batch shape ``[B, *rest]``.
        f: ``f(x [n, *rest, *event], problem [n]) -> [n]``, n the sum of the counts, problem int64 in 0..B-1.
        num_samples: ``[B]``, integers of at least 1, such as those of ``draws_per_problem``.
        baseline: "auto": leave-one-out among the draws of the same problem, where it has another one; None: none; or
            one for a signal ``[max n, B, 1]`` with a mask.

    Raises:
        ShapeError: counts that do not fit p, or values that are not ``[n]``.
        ScorefnError: counts that are no integers of at least 1, or as ``sf.draw``.
        NonFiniteError, SupportError: as ``sf.draw``.

    Example:
        >>> import torch
        >>> from scorefn.diagnostics import expectation_per_problem
        >>> logits = torch.zeros(2, 3, requires_grad=True)  # two problems of three bits
        >>> target = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
        >>> def f(x, problem):
        ...     return (x - target[problem]).square().sum(-1)
        >>> p = torch.distributions.Bernoulli(logits=logits)
        >>> expectation_per_problem(p, f, torch.tensor([2, 6])).shape
        torch.Size([2])
    """
    if not isinstance(num_samples, Tensor) or num_samples.is_floating_point() or num_samples.dtype == torch.bool:
        raise ScorefnError(f"num_samples must be a tensor of integers, [B], but it is {num_samples!r}.")
    if num_samples.ndim != 1 or not len(num_samples):
        raise ShapeError(f"num_samples has shape {tuple(num_samples.shape)}, but it must be [B]: one for each problem.")
    if int(num_samples.min()) < 1:
        raise ScorefnError(f"num_samples must be at least 1 for each problem, but the least is {num_samples.min()}.")
    B, most = len(num_samples), int(num_samples.max())
    check_support(p)
    x = p.sample(torch.Size((most,)))
    if not isinstance(x, Tensor) or x.shape[1:2] != (B,):
        found = tuple(x.shape[1:]) if isinstance(x, Tensor) else type(x).__name__
        raise ShapeError(
            f"num_samples is for {B} problems, but a draw of p is {found}: the batch shape of p must lead with B = {B}."
        )
    log_prob = p.log_prob(x)
    if log_prob.shape[:2] != (most, B):
        raise ShapeError(
            f"num_samples is for {B} problems, but the log-probabilities of {most} draws have shape "
            f"{tuple(log_prob.shape)}: the batch shape of p must lead with B = {B}."
        )
    log_prob = log_prob.reshape(most, B, -1).sum(-1)
    present = torch.arange(most, device=x.device).unsqueeze(-1) < num_samples.to(x.device)
    problem = torch.arange(B, device=x.device).expand(most, B)[present]
    values = evaluate(lambda rows: f(rows, problem), x[present], log_prob)
    if values.shape != problem.shape:
        raise ShapeError(
            f"f returned shape {tuple(values.shape)} for {len(problem)} draws, but it must return one value for each, "
            f"{(len(problem),)}: reduce over the last dimensions only, for instance .sum(-1)."
        )
    fx = torch.zeros_like(log_prob, requires_grad=False).masked_scatter(present, values.to(log_prob.dtype))
    draws = Draws(x, log_prob.unsqueeze(-1), fx.unsqueeze(-1), mask=present.unsqueeze(-1))
    chosen = (LeaveOneOut() if most > 1 else None) if isinstance(baseline, str) else baseline
    return surrogate(draws, baseline=chosen).sum(0) / num_samples.to(log_prob)

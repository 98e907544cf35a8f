"""The front door: draw, call f once, surrogate, mean, update."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from scorefn.core.checks import no_part, refuse_two_fits
from scorefn.core.defaults import LeaveOneOut
from scorefn.core.draws import Draws, drawn
from scorefn.core.errors import ScorefnError, ShapeError
from scorefn.core.protocols import (
    Baseline,
    ControlVariate,
    Coupling,
    Credit,
    Integrand,
    Measure,
    StructuredMeasure,
    is_stateful,
)
from scorefn.core.surrogate import charge


def expectation(
    p: Measure | StructuredMeasure,
    f: Integrand,
    num_samples: int,
    *,
    coupling: Coupling | None = None,
    credit: Credit | None = None,
    baseline: Baseline | Literal["auto"] | None = "auto",
    control_variate: ControlVariate | None = None,
    shape: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Monte Carlo mean of f under p, ``[*B]``, whose gradient is the score-function estimate.

    ``grad E_{x~p}[f(x)] = E[f(x) grad log p(x) + grad f(x)]``, from ``num_samples`` draws; f carries its own sign,
    so call ``backward`` on a cost and negate a reward. f is called exactly once, on all draws. Source: Williams (1992).

    Args:
        p: a distribution, or any measure.
        f: the integrand, x ``[N, *batch, *event]`` to ``[N, *B]``; see ``draw``.
        num_samples: N.
        coupling: how draws share randomness; None: independent.
        credit: which value is charged to which decision, for structured measures; None: their own.
        baseline: "auto" is leave-one-out where there are two blocks of draws or more, otherwise none.
        control_variate: ``Draws -> Draws``, applied first; one that learns is updated last, with the raw draws.
        shape: a transform of all values, ``fx -> fx`` (standardise, ranks): it changes what is estimated. One that says
            so by ``accepts_non_finite = True`` (ranks) may be given NaN and infinite values, of a plain measure and
            without a control variate: what it makes of them is checked.

    Raises:
        ScorefnError: as ``draw`` and ``surrogate``, or a control variate and a baseline other than leave-one-out that
            are both fitted to the present draws; parameters, gradients and baseline are then as before.

    Example:
        >>> import torch
        >>> from scorefn import expectation
        >>> _ = torch.manual_seed(0)
        >>> logits = torch.zeros(5, requires_grad=True)
        >>> p = torch.distributions.Bernoulli(logits=logits)
        >>> loss = expectation(p, lambda x: (x - 0.45).square().sum(-1), num_samples=100)
        >>> loss.backward()
        >>> logits.grad.shape
        torch.Size([5])
    """
    if credit is not None and not callable(getattr(p, "draws", None)):
        raise ShapeError(
            f"credit={credit!r} was given for {type(p).__name__}, which makes one decision per draw: its batch "
            "dimensions are independent problems, not decisions in sequence. Leave credit out, or sample from a "
            "structured measure (a trajectory, a guide)."
        )
    if control_variate is not None:
        if not callable(control_variate) or isinstance(control_variate, type):
            use = "use LinearControlVariate(h, expected_h) or another map from Draws to Draws, or None."
            raise no_part("control_variate", control_variate, use)
        refuse_two_fits(control_variate, baseline)
    if shape is not None and (not callable(shape) or isinstance(shape, type)):
        raise no_part("shape", shape, "use Standardize(), CenteredRank() or another function of fx, or None.")
    if shape is None:
        raw = drawn(p, f, num_samples, coupling)
        draws = raw if control_variate is None else control_variate(raw)
    elif control_variate is None and getattr(shape, "accepts_non_finite", False) and not hasattr(p, "draws"):
        raw = draws = drawn(p, f, num_samples, coupling, shape)
    else:
        raw = drawn(p, f, num_samples, coupling)
        draws = raw if control_variate is None else control_variate(raw)
        draws = replace(draws, fx=shape(draws.fx))
    value = estimate(draws, credit, baseline)
    if control_variate is not None and torch.is_grad_enabled() and hasattr(control_variate, "update"):
        control_variate.update(raw)
    return value


def estimate(draws: Draws, credit: Credit | None, baseline: Baseline | str | None) -> Tensor:
    """Mean of the surrogate over the draws, ``[*B]``; a baseline that learns is updated after it was read.

    ``1/N sum_i surrogate_i``: what ``expectation`` makes of its draws.

    Args:
        draws: from ``draw`` or an adapter.
        credit: None: the draws' own.
        baseline: as in ``expectation``.

    Raises:
        ScorefnError: a text other than "auto" as baseline; what ``surrogate`` refuses, before anything is updated.

    Example:
        >>> import torch, scorefn as sf
        >>> logit, x = torch.tensor(0.0, requires_grad=True), torch.tensor([0.0, 1.0, 1.0])
        >>> log_prob = torch.distributions.Bernoulli(logits=logit).log_prob(x)
        >>> draws = sf.Draws(x, log_prob[:, None], torch.tensor([[1.0], [4.0], [1.0]]))
        >>> value = sf.core.estimate(draws, credit=None, baseline="auto")
        >>> value.backward()
        >>> value.item(), logit.grad.item()
        (2.0, 0.5)
    """
    if isinstance(baseline, str):
        if baseline != "auto":
            raise ScorefnError(f'baseline must be a baseline object, None or "auto", but it is {baseline!r}.')
        baseline = LeaveOneOut() if draws.num_blocks > 1 else None
    per_draw, signal, draws = charge(draws, credit, baseline)
    if baseline is not None and torch.is_grad_enabled() and is_stateful(baseline):
        baseline.update(signal, draws)
    return per_draw.mean() if per_draw.ndim == 2 else per_draw.mean((0, -1))

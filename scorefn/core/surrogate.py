"""The surrogate, whose value is f and whose gradient is the estimate; and DiCE, right at every order."""

from __future__ import annotations

import torch
from torch import Tensor

from scorefn.core.checks import check_beside, importance_weight, kind_of, no_part, refuse_two_fits
from scorefn.core.defaults import LeaveOneOut
from scorefn.core.draws import Draws
from scorefn.core.errors import NonFiniteError, ScorefnError, ShapeError
from scorefn.core.protocols import Baseline, Credit, in_transform, is_stateful


def surrogate(draws: Draws, *, credit: Credit | None = None, baseline: Baseline | None = None) -> Tensor:
    """The score-function estimate of each draw, ``[N, *B]``: differentiate it, or its mean.

    With w_j the importance weight of value j (1 on-policy), W_k the ratio over the decisions up to k, b the baseline
    and stop(u) a constant of value u::

        sum_j value_weight_j w_j f_j + sum_k stop(credit(w f)_k - W_k b_k) (log_prob_k - stop(log_prob_k))

    Its value is the weighted f, to the bit; its gradient is ``f grad log p + grad f`` with every value charged to the
    decisions that influence it. Sources: Williams (1992); Schulman, Heess, Weber & Abbeel (2015), "Gradient
    estimation using stochastic computation graphs", eq. 3; Mnih & Gregor (2014) for baselines.

    Args:
        draws: from ``draw`` or an adapter.
        credit: None: the draws' own.
        baseline: None: none. It is read, never updated.

    Raises:
        ShapeError: a credit for draws of a single decision, or a baseline of the wrong shape.
        NonFiniteError: a baseline that is NaN or infinite.
        ScorefnError: a stateful baseline inside a ``torch.func`` transform.

    Example:
        >>> import torch, scorefn as sf
        >>> logit = torch.tensor(0.0, requires_grad=True)
        >>> draws = sf.draw(torch.distributions.Bernoulli(logits=logit), lambda x: 3 * x + 1, 5)
        >>> per_draw = sf.surrogate(draws)
        >>> torch.equal(per_draw, 3 * draws.x + 1)  # the value is f
        True
        >>> (gradient,) = torch.autograd.grad(per_draw.sum(), logit)
        >>> torch.equal(gradient, (per_draw * (draws.x - 0.5)).sum())  # f times the score
        True
    """
    return charge(draws, credit, baseline)[0].squeeze(-1)


def charge(draws: Draws, credit: Credit | None, baseline: Baseline | None) -> tuple[Tensor, Tensor, Draws]:
    """The surrogate ``[N, *B, 1]``, the signal ``[N, *B, K]`` it was made from, and the draws with the credit used."""
    draws = draws.bound(credit)
    weighted = draws.weighted()
    signal = draws.credit(weighted.detach() if weighted.requires_grad else weighted)
    advantage = signal
    if baseline is not None:
        advantage = signal - _carried(read(baseline, signal, draws), draws)
    score = draws.log_prob - draws.log_prob.detach()
    value_weight = draws.credit.value_weight(weighted)
    value = weighted if value_weight is None else value_weight * weighted
    if score.shape[-1] == 1 == value.shape[-1]:  # the same in one operation: the small case is all overhead
        return value.addcmul(advantage, score), signal, draws
    return value.sum(-1, keepdim=True) + (advantage * score).sum(-1, keepdim=True), signal, draws


def _carried(baseline: Tensor, draws: Draws) -> Tensor:
    """W_k b_k, with W_k the importance weight of the decisions up to k; b itself on-policy."""
    if draws.behaviour_log_prob is None:
        return baseline
    log_ratio = draws.log_prob.detach() - draws.behaviour_log_prob
    return importance_weight(draws.credit.predecessors(log_ratio) + log_ratio) * baseline


def read(baseline: Baseline, signal: Tensor, draws: Draws) -> Tensor:
    """The baseline's value, detached, ``[N, *B, K]`` or ``[N, *B, 1]``."""
    if in_transform() and is_stateful(baseline):
        raise ScorefnError(
            f"{type(baseline).__name__} keeps a state, which a torch.func transform or torch.compile cannot trace: use "
            "LeaveOneOut() or Constant(b) there."
        )
    if not callable(baseline) or isinstance(baseline, type):
        raise no_part("baseline", baseline, "use Constant(b) for a number, or None.")
    if draws.fitted:
        refuse_two_fits(draws, baseline)
    value = baseline(signal, draws)
    full = draws.log_prob.shape
    if not isinstance(value, Tensor) or (value.shape != full and value.shape != (*full[:-1], 1)):
        raise ShapeError(
            f"{type(baseline).__name__} returned {kind_of(value)}, but it is subtracted from a signal of one value per "
            f"decision: it must return a tensor [N, *B, K] = {tuple(full)}"
            f"{'' if full[-1] == 1 else f', or {(*full[:-1], 1)}'}."
        )
    if value.dtype != signal.dtype or value.device != signal.device:
        check_beside(draws.log_prob, type(baseline).__name__, value, value.shape, (signal.dtype,))
    if draws.mask is not None:
        value = torch.where(draws.mask, value, 0.0)
    if not (isinstance(baseline, LeaveOneOut) or in_transform()) and not (finite := torch.isfinite(value)).all():
        raise NonFiniteError(
            f"{type(baseline).__name__} returned {value[~finite][0].item()}, which would make the whole gradient NaN. "
            "Nothing was updated: its optimiser, where it has one, was not stepped. Look at what it was fitted to."
        )
    return value.detach() if value.requires_grad else value


def dice(draws: Draws, *, credit: Credit | None = None, baseline: Baseline | None = None) -> Tensor:
    """A surrogate that is right at every order of differentiation, ``[N, *B]``.

    With box(u) = exp(u - stop(u)), v = value_weight * fx and M the influence of decisions on values::

        sum_j box(M^T log_prob)_j v_j + sum_k b_k (box(pred_k) - box(pred_k + log_prob_k))

    where b is detached and pred_k sums the log-probabilities of k's predecessors: any set without k leaves every
    derivative unbiased, this one lets a constant in f cancel at each order. Off-policy, stop(log_prob) becomes
    behaviour_log_prob and box the importance weight. The value is the weighted f. Sources: Foerster et al. (2018),
    "DiCE: the infinitely differentiable Monte Carlo estimator"; Mao et al. (2019), "A baseline for any order gradient
    estimation in stochastic computation graphs", eq. 6.

    Raises:
        ScorefnError: the credit has a decision weight: it is not a gradient, so it has no derivatives.
        ShapeError: as ``surrogate``.

    Example:
        >>> import torch, scorefn as sf
        >>> logit = torch.tensor(3.0).log().requires_grad_()  # heads three times in four
        >>> x = torch.tensor([1.0, 1.0, 1.0, 0.0])  # and so they fell
        >>> log_prob = torch.distributions.Bernoulli(logits=logit).log_prob(x)
        >>> estimate = sf.dice(sf.Draws(x, log_prob[:, None], x[:, None])).mean()
        >>> (first,) = torch.autograd.grad(estimate, logit, create_graph=True)
        >>> (second,) = torch.autograd.grad(first, logit)
        >>> round(first.item(), 5), round(second.item(), 5)  # p (1 - p), p (1 - p) (1 - 2 p)
        (0.1875, -0.09375)
    """
    draws = draws.bound(credit)
    credit = draws.credit
    if credit.decision_weight(draws.fx) is not None:
        raise ScorefnError(
            f"{credit!r} weighs decisions, which is not the gradient of any function, so it has no second derivative. "
            "Use a credit without decision weight, such as RewardToGo(discount) with visitation_discount=True."
        )
    origin = draws.log_prob.detach() if draws.behaviour_log_prob is None else draws.behaviour_log_prob
    log_ratio = draws.log_prob - origin
    estimate = importance_weight(credit.influence_adjoint(log_ratio)) * draws.fx
    if (value_weight := credit.value_weight(draws.fx)) is not None:
        estimate = value_weight * estimate
    estimate = estimate.sum(-1)
    if baseline is None:
        return estimate
    value = read(baseline, draws.signal(), draws)
    before = credit.predecessors(log_ratio)
    correction = (value * (importance_weight(before) - importance_weight(before + log_ratio))).sum(-1)
    return estimate + (correction - correction.detach())

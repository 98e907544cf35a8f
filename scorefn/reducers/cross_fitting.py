"""Cross-fitting: what each draw may learn from the present batch without meeting itself."""

from __future__ import annotations

import torch
from torch import Tensor

from scorefn.core import Draws
from scorefn.reducers.recurrence import linear_recurrence


def others(v: Tensor, draws: Draws, *, across_groups: bool = False) -> Tensor:
    """Sum of v over the other blocks of each draw's group (or of all groups), ``[N, ...] -> [N, ...]``.

    The own block never enters, not even to be subtracted: what lies before it and after it is added. So a small sum
    beside a large own term keeps its digits, and what is made of the result is independent of the draw to the bit.
    """
    if draws.block is None and (draws.group is None or across_groups):
        return _before(v) + _before(v.flip(0)).flip(0)
    identity = torch.arange(len(draws), device=v.device)
    one = draws.group is None or across_groups
    group = torch.zeros_like(identity) if one else torch.unique(draws.group, return_inverse=True)[1]
    block = identity if draws.block is None else torch.unique(draws.block, return_inverse=True)[1]
    key, cell = torch.unique(group * len(draws) + block, return_inverse=True)  # sorted: the cells of a group adjoin
    sums = torch.zeros_like(v[: len(key)]).index_add(0, cell, v)
    of_group = key // len(draws)
    follows = torch.zeros(len(key), *[1] * (v.ndim - 1), dtype=v.dtype, device=v.device)
    follows[1:] = (of_group[1:] == of_group[:-1]).to(v).reshape(-1, *[1] * (v.ndim - 1))
    precedes = torch.cat([follows[1:], torch.zeros_like(follows[:1])])
    before = follows * _shifted(linear_recurrence(sums, follows))
    after = precedes * _shifted(linear_recurrence(sums, precedes, reverse=True).flip(0)).flip(0)
    return (before + after)[cell]


def _before(v: Tensor) -> Tensor:
    """Sum of the entries before each one along the first axis."""
    return _shifted(v.cumsum(0))


def _shifted(v: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(v[:1]), v[:-1]])


def cross_fit(
    features: Tensor, target: Tensor, weight: Tensor, draws: Draws, *, ridge: float, across_groups: bool
) -> tuple[Tensor, Tensor]:
    """Ridge regression of each draw's rows on the rows of the other blocks.

    For each draw i, with sums over the rows r of the draws outside i's block::

        min over a, c of  sum_r (y_r - W_r (a + c . phi_r))^2 + ridge sum_f var_f c_f^2

    with var_f the (W^2-weighted) sum of squares of feature f about its mean, so that the units of a feature do not
    matter and the intercept is not shrunk. Features that do not vary get 0. They are best centred by the caller: the
    sums lose digits where a mean is much larger than a spread.

    Args:
        features: phi ``[N, *B, R, F]``, R rows for each draw.
        target: y ``[N, *B, R]``.
        weight: W ``[N, *B, R]``, 0 for rows that are absent.
        draws: say which blocks and groups there are.
        ridge: relative damping.
        across_groups: learn from all groups, not from the own one alone.

    Returns:
        a ``[N, *B]`` and c ``[N, *B, F]``; 0 where there is nothing to learn from.
    """
    present = (weight != 0).unsqueeze(-1)
    phi = torch.where(present, features, 0.0) * weight.unsqueeze(-1)
    y = torch.where(present, target.unsqueeze(-1), 0.0)
    rows = torch.cat([weight.unsqueeze(-1), phi, y], -1)  # [N, *B, R, 1 + F + 1]
    moments = others(rows.mT @ rows, draws, across_groups=across_groups)
    count, total, second = moments[..., 0, 0], moments[..., 0, 1:-1], moments[..., 1:-1, 1:-1]
    safe = torch.where(count > 0, count, 1.0)
    mean, level = total / safe.unsqueeze(-1), moments[..., 0, -1] / safe
    covariance = second - total.unsqueeze(-1) * mean.unsqueeze(-2)
    variance = covariance.diagonal(dim1=-2, dim2=-1)
    eps = torch.finfo(variance.dtype).eps
    varies = variance > 64 * eps * second.diagonal(dim1=-2, dim2=-1)  # beyond what rounding makes of a constant
    damping = max(ridge, 100 * eps)  # features that repeat each other need some
    damped = covariance * (varies.unsqueeze(-1) & varies.unsqueeze(-2))
    damped = damped + torch.diag_embed(torch.where(varies, damping * variance, 1.0))
    right = torch.where(varies, moments[..., 1:-1, -1] - mean * moments[..., 0, -1:], 0.0)
    slope = torch.linalg.solve_ex(damped, right.unsqueeze(-1))[0].squeeze(-1)
    slope = torch.where(slope.isfinite().all(-1, keepdim=True), slope, 0.0)
    return level - (mean * slope).sum(-1), slope


def carried(draws: Draws) -> Tensor | None:
    """W ``[N, *B, K]``, the importance weight of the decisions up to k, that a baseline is multiplied by; or None."""
    if draws.behaviour_log_prob is None:
        return None
    log_ratio = draws.log_prob.detach() - draws.behaviour_log_prob
    return (draws.credit.predecessors(log_ratio) + log_ratio).exp()

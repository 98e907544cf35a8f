"""Where a search stands: what every strategy reports."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from scorefn.core.representation import representation


@dataclass(frozen=True, eq=False)
class StrategyResult:
    """Where a search stands.

    Args:
        mean: ``[D]``, the mean of the search distribution: the point to recommend, also under noise.
        sigma: ``[D]``, its standard deviations.
        best_x: ``[D]``, the told point of the lowest value; None before the first finite value. Under noise the
            lowest value is a lucky one, and this point is not the best.
        best_f: the lowest value told; infinite before the first finite one.
        evaluations: how many values were told.
        iterations: how many generations were told.
        failed: how many of the values were not finite.
        stop: what ended the search, with the threshold it met; empty while running.

    Example:
        >>> import torch
        >>> from scorefn.search import SNES
        >>> strategy = SNES([3.0, -2.0], sigma0=1.0, seed=0)
        >>> x = strategy.ask()
        >>> f = x.square().sum(1)
        >>> f[0] = torch.nan  # an evaluation that failed
        >>> strategy.tell(x, f)
        >>> found = strategy.result
        >>> found.evaluations, found.failed, found.iterations, found.stop
        (6, 1, 1, {})
        >>> found.mean.shape, found.best_f == float(found.best_x.square().sum())
        (torch.Size([2]), True)
    """

    mean: Tensor
    sigma: Tensor
    best_x: Tensor | None
    best_f: float
    evaluations: int
    iterations: int
    failed: int
    stop: dict[str, float]

    __repr__ = representation

"""The order of a generation's values: all that a strategy learns from."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Ranking:
    """Values ``[N]`` from the lowest, which is best, to the highest.

    NaN and infinite values are failures and come last. Equal values are tied, and so are all failures: what is handed
    out by rank is shared evenly among them.

    Args:
        values: ``[N]``.

    Attributes:
        values: ``[N]``, infinite where a value is not finite.
        order: ``[N]``, which point has rank k.
        lowest: the lowest finite value; infinite where there is none.
        highest: the highest finite value; minus infinite where there is none.
        median: the middle one of the finite values (the lower one of two); infinite where there is none.
        failed: how many values are not finite.
        flat: there is no order at all: all values are tied.
    """

    def __init__(self, values: Tensor) -> None:
        self.values = torch.where(values.isfinite(), values, torch.inf)
        ordered, self.order = self.values.sort(stable=True)
        self._ordered = ordered
        plain: list[float] = ordered.tolist()
        num = len(plain)
        self.failed = plain.count(math.inf)
        good = num - self.failed
        self.lowest = plain[0]
        self.highest = plain[good - 1] if good else -math.inf
        self.median = plain[(good - 1) // 2] if good else math.inf
        self.flat = plain[0] == plain[-1]
        self._tied = len(set(plain)) < num

    def __len__(self) -> int:
        return len(self.order)

    @property
    def best(self) -> int:
        """The index of the lowest value."""
        return int(self.order[0])

    def hand_out(self, by_rank: Tensor) -> Tensor:
        """Give by_rank ``[N, ...]``, best first, to the points ``[N, ...]``; ties share the mean of theirs."""
        if self._tied:
            _, run, count = torch.unique_consecutive(self._ordered, return_inverse=True, return_counts=True)
            total = by_rank.new_zeros((len(count), *by_rank.shape[1:])).index_add_(0, run, by_rank)
            by_rank = (total / count.view(-1, *[1] * (by_rank.ndim - 1)))[run]
        return torch.empty_like(by_rank).index_copy_(0, self.order, by_rank)

"""Running moments of rows: what a long test keeps in place of its sample."""

from __future__ import annotations

import torch
from torch import Tensor


class Moments:
    """Mean, variance and skewness of all rows so far, ``[P]`` each, in float64.

    The sums are of differences from the mean of the first rows, so that nothing is lost where the rows hardly vary.
    ``largest`` is the largest such difference in any row and coordinate.
    """

    def __init__(self) -> None:
        self.count = 0
        self._shift = torch.zeros(0)
        self._sums: tuple[Tensor, ...] = ()
        self.largest = 0.0

    def add(self, rows: Tensor) -> None:
        """More rows, ``[n, P]``."""
        if not len(rows):
            return
        if not self.count:
            self._shift = rows.mean(0)
            self._sums = tuple(torch.zeros_like(self._shift) for _ in range(3))
        centred = rows - self._shift
        square = centred * centred
        powers = (centred.sum(0), square.sum(0), (square * centred).sum(0))
        self._sums = tuple(old + new for old, new in zip(self._sums, powers, strict=True))
        self.largest = max(self.largest, float(square.max()) ** 0.5)
        self.count += len(rows)

    @property
    def mean(self) -> Tensor:
        """``[P]``."""
        return self._shift + self._sums[0] / self.count

    @property
    def variance(self) -> Tensor:
        """``[P]``, divided by count - 1; 0 for a single row."""
        offset = self._sums[0] / self.count
        return (self._sums[1] / self.count - offset.square()).clamp(min=0.0) * (self.count / max(self.count - 1, 1))

    @property
    def error(self) -> Tensor:
        """The standard error of the mean, ``[P]``."""
        return (self.variance / self.count).sqrt()

    def squared_skewness(self, floor: Tensor) -> Tensor:
        """``[P]``; what varies less than ``floor`` has none."""
        first, second, third = (total / self.count for total in self._sums)
        central = third - 3 * first * second + 2 * first**3
        return (central / self.variance.sqrt().clamp(min=floor) ** 3).square()

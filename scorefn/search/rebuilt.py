"""Generations whose points are rebuilt one by one, from noise that can be drawn again: nothing of size N D is kept."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from scorefn.search.ranking import Ranking
from scorefn.search.strategy import State

_KEPT = 1 << 26  # bytes of noise that are kept rather than drawn again; no bit depends on it


class LocalSums(Protocol):
    """Sums over the local coordinates z of N points."""

    def square_lengths(self) -> Tensor:
        """``[N]``, ``|z_k|^2``, in float64."""

    def first(self, weights: Tensor) -> Tensor:
        """``sum_k w_k z_k``, ``[D]`` in float64, of weights ``[N]``."""

    def second(self, weights: Tensor) -> Tensor:
        """``sum_k w_k z_k^2``, ``[D]`` in float64, of weights ``[N]``."""


class Rebuildable(ABC):
    """A strategy of normal distributions with independent coordinates that learns from ``LocalSums`` alone."""

    paired: ClassVar[bool] = False
    """Whether the second half of a generation mirrors the first."""

    @property
    def noise_dtype(self) -> torch.dtype:
        """Of the points."""
        return torch.float64

    @abstractmethod
    def learnt_by(self, sums: LocalSums, ranking: Ranking) -> State:
        """The state after a generation; see ``Strategy.learnt``."""


class Generation:
    """The points of a generation, ``m + sigma z_k``, each made when it is asked for; -1 is the mean.

    Args:
        mean: ``[D]``.
        sigma: ``[D]``.
        draw: ``[D]`` standard normal numbers of an individual, in the dtype of the points.
        num: N.
        paired: ``N/2 + k`` is the mirror image of k.
    """

    def __init__(self, mean: Tensor, sigma: Tensor, draw: Callable[[int], Tensor], num: int, paired: bool) -> None:
        self._mean = mean
        self._sigma = sigma
        self._draw = draw
        self._fresh = num // 2 if paired else num

    def __getitem__(self, individual: int) -> Tensor:
        if individual < 0:
            return self._mean
        z = self._draw(individual % self._fresh)
        sign = 1 if individual < self._fresh else -1
        return torch.addcmul(self._mean.to(z.dtype), z, self._sigma.to(z.dtype), value=sign)


class RebuiltSums:
    """``LocalSums`` over noise that is drawn again for each sum, in the order of the points.

    Sums are accumulated coordinate by coordinate, and so the same to the bit for any number of threads.

    Args:
        draw: ``[D]`` standard normal numbers of an individual.
        num: N.
        paired: the second half of the points mirrors the first.
    """

    def __init__(self, draw: Callable[[int], Tensor], num: int, paired: bool) -> None:
        self._draw = draw
        self._num = num
        self._paired = paired
        self._kept: dict[int, Tensor] = {}
        self._lengths: Tensor | None = None

    def square_lengths(self) -> Tensor:
        """``[N]``."""
        if self._lengths is None:
            self._accumulated(None, 1)
        assert self._lengths is not None
        return self._lengths

    def first(self, weights: Tensor) -> Tensor:
        """``[D]``, of weights ``[N]``."""
        return self._accumulated(self._folded(weights, -1), 1)

    def second(self, weights: Tensor) -> Tensor:
        """``[D]``, of weights ``[N]``."""
        return self._accumulated(self._folded(weights, 1), 2)

    def _folded(self, weights: Tensor, sign: int) -> list[float]:
        half = self._num // 2
        folded: list[float] = (weights[:half] + sign * weights[half:] if self._paired else weights).tolist()
        return folded

    def _accumulated(self, weights: list[float] | None, power: int) -> Tensor:
        lengths = []
        total = torch.zeros(0, dtype=torch.float64)
        for k in range(self._num // 2 if self._paired else self._num):
            z = self._row(k)
            if not k:
                total = torch.zeros(len(z), dtype=torch.float64)
            if self._lengths is None:
                lengths.append(float(torch.linalg.vector_norm(z, dtype=torch.float64)) ** 2)
            if weights is not None:
                total.add_(z if power == 1 else z.square(), alpha=weights[k])
        if self._lengths is None:
            found = torch.tensor(lengths, dtype=torch.float64)
            self._lengths = found.repeat(2) if self._paired else found
        return total

    def _row(self, k: int) -> Tensor:
        row = self._kept.get(k)
        if row is None:
            row = self._draw(k)
            if (len(self._kept) + 1) * row.numel() * row.element_size() <= _KEPT:
                self._kept[k] = row
        return row

"""Independent finite factors: what Bernoulli and categorical search share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Categorical, Independent

from scorefn.core import ScorefnError
from scorefn.search.points import Numbers, as_numbers, is_number
from scorefn.search.ranking import Ranking
from scorefn.search.stopping import Limits
from scorefn.search.strategy import State, Strategy, checked_popsize
from scorefn.search.trust_region import TrustRegion, default_margin, default_popsize, discrete_limits
from scorefn.shaping import utilities_by_rank


class Factors(Strategy):
    """D independent factors, factor i with K_i values ``0, ..., K_i - 1`` of probabilities q_i.

    With u the utilities of ``nes_utilities`` and e(x) the one-hot table of a point::

        g = sum_k u_k (e(x_k) - q)                the natural gradient, in q, of E u
        s = g / sqrt(q)                           the whitened one: its length is the Fisher length of g
        q <- project(q + step sqrt(q))            step: the one of ``TrustRegion`` along s

    ``project`` keeps every probability of factor i at ``margin/(K_i - 1)`` or more, and the sum at 1, by shrinking what
    lies above that floor. So a factor leaves its most likely value with a probability of at least ``margin``, and
    nothing is lost for good.

    Args:
        table: ``[D, K]``, the initial probabilities, K the largest K_i; zeros beyond K_i.
        categories: ``[D]`` int64, K_i.
        margin: None: ``min(1/D, 0.27)``.
        popsize: N; None: ``4 + floor(3 ln sum (K_i - 1))``.
        seed: as for ``Strategy``.
        limits: as for ``SNES``, but that equal values are a normal thing here.
    """

    def __init__(
        self,
        table: Tensor,
        categories: Tensor,
        *,
        margin: float | None,
        popsize: int | None,
        seed: int | torch.Generator | None,
        limits: Mapping[str, float | None],
    ) -> None:
        name = type(self).__name__
        dimension = len(table)
        least = default_margin(dimension) if margin is None else margin
        fewest = int(categories.min())
        if not is_number(least) or not 0 < least < 1 - 1 / fewest:
            raise ScorefnError(
                f"margin must lie between 0 and {1 - 1 / fewest:.4g}, where all {fewest} values are equally likely, "
                f"but it is {margin!r}: it is the least probability of leaving the most likely value. Leave it out for "
                "min(1/D, 0.27)."
            )
        self._categories = categories
        self._freedom = int((categories - 1).sum())
        self._open = torch.arange(table.shape[1], device=table.device) < categories.unsqueeze(1)
        floor = self._floor(least)
        if bool((table < floor - 1e-12).any()):
            worst = int((table - floor).amin(1).argmin())
            raise ScorefnError(
                f"The initial probabilities of factor {worst} are {table[worst, : int(categories[worst])].tolist()}, "
                f"but none may be below {float(floor[worst, 0]):.4g}, the margin against drift. Start further inside, "
                "or lower margin."
            )
        size = checked_popsize(
            default_popsize(self._freedom) if popsize is None else popsize, 2, "4 + floor(3 ln sum (K - 1))"
        )
        known = ("margin", "popsize", "seed")
        super().__init__(
            {"table": table, **TrustRegion(torch.zeros_like(table)).state()},
            settings={"margin": float(least)},
            shape=(size, dimension),
            sigma0=spread(table),
            seed=seed,
            fixed={"categories": categories.tolist()},
            limits=Limits.of_options(discrete_limits(limits), name, known),
        )

    @property
    @abstractmethod
    def mean(self) -> Tensor:
        """``[D]``, the most likely point, the one to recommend; of equally likely values the first."""

    @property
    def continuous_mean(self) -> Tensor:
        """NaN: no coordinate is continuous."""
        return torch.full_like(self._sigma0, torch.nan)

    @property
    def sigma(self) -> Tensor:
        """``[D]``, ``sqrt(sum_k q_k (1 - q_k) / 2)``: of a factor with two values its standard deviation."""
        return spread(self._state["table"])

    @property
    def distribution(self) -> Independent[Categorical]:
        """The search distribution: batch shape ``[]``, event shape ``[D]``; its probabilities do not require grad."""
        table = self._state["table"]
        return Independent(Categorical(probs=table, validate_args=False), 1, validate_args=False)

    def sampled(self) -> Tensor:
        """``[N, D]``, values of the factors in float64."""
        table = self._state["table"]
        u = torch.rand((*self._shape, 1), dtype=torch.float64, device=table.device, generator=self._generator)
        drawn = (u >= table.cumsum(1)[:, :-1]).sum(2)
        return torch.minimum(drawn, self._categories - 1).double()

    def told(self, x: Numbers) -> Tensor:
        """Values of the factors, ``[N, D]``; anything else is refused."""
        return whole_numbers(super().told(x), torch.zeros_like(self._sigma0), self._categories - 1)

    def learnt(self, points: Tensor, ranking: Ranking) -> State:
        """One natural-gradient step in the trust region."""
        table = self._state["table"]
        u = ranking.hand_out(utilities_by_rank(len(ranking), points.device))
        root = table.sqrt()
        gradient = chosen(points, u, table.shape[1]) - u.sum() * table
        whitened = torch.where(self._open, gradient / torch.where(self._open, root, 1.0), 0.0)
        followed = TrustRegion.of_state(self._state).step(whitened, self._freedom)
        if followed is None:
            return self._state
        step, region = followed
        return {"table": self._projected(table + step * root), **region.state()}

    def _floor(self, margin: float) -> Tensor:
        """``[D, K]``, the least probability of each category."""
        return torch.where(self._open, margin / (self._categories - 1).unsqueeze(1).double(), 0.0)

    def _projected(self, table: Tensor) -> Tensor:
        """The table with its floors kept and its rows summing to 1."""
        floor = self._floor(self._settings["margin"])
        above = (table - floor).clamp(min=0)
        return floor + above * ((1 - floor.sum(1, keepdim=True)) / above.sum(1, keepdim=True))


def whole_numbers(points: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """Points ``[N, D]``, refused where one is no integer between lower and upper ``[D]``."""
    bad = (points != points.round()) | (points < lower) | (points > upper)
    if bool(bad.any()):
        row, column = bad.nonzero()[0].tolist()
        raise ScorefnError(
            f"Point {row} has the value {float(points[row, column])} in coordinate {column}, but the values there are "
            f"the integers from {int(lower[column])} to {int(upper[column])}: tell the points that were evaluated, "
            "repaired to such values."
        )
    return points


def chosen(points: Tensor, weights: Tensor, width: int) -> Tensor:
    """How much weight ``[N]`` the points ``[N, D]`` give to each value: ``sum_k w_k e(x_k)``, ``[D, K]``."""
    total = torch.zeros((points.shape[1], width), dtype=weights.dtype, device=points.device)
    return total.scatter_add_(1, points.long().T, weights.expand(points.shape[1], -1))


def spread(table: Tensor) -> Tensor:
    """``sqrt(sum_k q_k (1 - q_k) / 2)`` of the rows, ``[D]``."""
    return (table * (1 - table)).sum(1).div(2).sqrt()


def as_table(rows: Any, name: str, categories: list[int]) -> Tensor:
    """Probabilities given row by row, ``[D, K]`` with zeros behind; refused where they are none."""
    width = max(categories)
    table = torch.zeros((len(categories), width), dtype=torch.float64)
    if isinstance(rows, str) or not hasattr(rows, "__len__"):
        raise ScorefnError(f"{name} must be a row of probabilities for each choice, but it is {rows!r}.")
    if len(rows) != len(categories):
        raise ScorefnError(f"{name} has {len(rows)} rows, but there are {len(categories)} factors: give one row each.")
    for index, (row, count) in enumerate(zip(rows, categories, strict=True)):
        entries = as_numbers(row, name, torch.device("cpu"))
        if entries.shape != (count,) or not bool((entries >= 0).all()) or not abs(float(entries.sum()) - 1) <= 1e-6:
            raise ScorefnError(
                f"Row {index} of {name} is {row}, but factor {index} has {count} values: give {count} probabilities "
                "that sum to 1."
            )
        table[index, :count] = entries / entries.sum()
    return table

"""The contract that every search strategy meets: ask for points, tell their values, read stop and result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from scorefn.search.points import Numbers


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
    """

    mean: Tensor
    sigma: Tensor
    best_x: Tensor | None
    best_f: float
    evaluations: int
    iterations: int
    failed: int
    stop: dict[str, float]


class Strategy(Protocol):
    """A minimiser whose loop is in the caller's hands; N points of dimension D a generation."""

    @property
    def popsize(self) -> int:
        """N, how many points a generation has."""
        ...

    def ask(self) -> Tensor:
        """Points to evaluate, ``[N, D]`` in float64."""
        ...

    def tell(self, x: Numbers, f: Numbers) -> None:
        """Learn from the values f ``[N]`` at the points x ``[N, D]``."""
        ...

    @property
    def stop(self) -> dict[str, float]:
        """What fired, with its threshold; empty, hence false, while the search should go on."""
        ...

    @property
    def result(self) -> StrategyResult:
        """Where the search stands."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed search needs."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        ...

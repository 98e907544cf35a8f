"""A box that points may leave at a price."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import median
from typing import Any

import torch
from torch import Tensor

from scorefn.core import ScorefnError, ShapeError
from scorefn.search.bounds import Bound, Bounds, Located
from scorefn.search.points import Numbers
from scorefn.search.saved_state import check_finite

_MOST = 1e150  # of ranges: a weight times the square of a distance is then a number, or capped
_TINY = torch.finfo(torch.float64).tiny
_LARGEST = torch.finfo(torch.float64).max


class PenalizedBounds(Bounds):
    """Points are repaired to the nearest one in the box, and pay for the distance; the unrepaired point is told.

    The strategy is told, for a point x whose repaired point c(x) has the value f::

        f + 1/D sum_i g_i (x_i - c(x)_i)^2 / s_i,     log s_i = 0.9 (log sigma_i^2 - mean_j log sigma_j^2)

    The weights g follow the values: with r the median over the last ``20 + 3 D/N`` generations of the interquartile
    range of f divided by the mean of the variances, g starts at 2 r with the first generation that leaves the box. Then
    g_i grows by ``exp(tanh(e/3)/2)`` a generation where the mean lies ``e > 0`` standard deviations more than
    ``3 max(1, 4 sqrt(D)/N)`` outside in coordinate i, and shrinks by ``exp(-1/3)`` where it exceeds 5 r; generations
    that do not leave the box leave g as it is. What is told is finite where the value is: ranges are taken as 1e150 at
    most, and a sum that would overflow is the largest number of float64.

    Source: Hansen, Niederberger, Guzzella & Koumoutsakos (2009), "A method for handling uncertainty in evolutionary
    optimization with an application to feedback control of combustion", section IV.B, as developed in pycma.

    Args:
        lower: one number, or one per coordinate; None or ``-inf``: open.
        upper: one number, or one per coordinate; None or ``inf``: open.

    Raises:
        ScorefnError: a bound that is no number, or a lower one that is not below the upper one.
        ShapeError: bounds that are neither one number nor ``[D]``, or differ in length.

    Example:
        >>> from scorefn.search import PenalizedBounds, minimize
        >>> box = PenalizedBounds(0.0, 1.0)  # the optimum is a corner of it
        >>> result = minimize(lambda x: x.sum(), [0.5, 0.5], 0.2, bounds=box, seed=0, maxfevals=400)
        >>> result.x
        array([0., 0.])
    """

    def __init__(self, lower: Bound = None, upper: Bound = None) -> None:
        super().__init__(lower, upper)
        self._weights: Tensor | None = None
        self._ranges: list[float] = []

    def start(self, x0: Numbers) -> Tensor:
        """x0 itself; weights begin afresh."""
        self._weights, self._ranges = None, []
        return super().start(x0)

    def inside(self, x: Tensor) -> Tensor:
        """The nearest points of the box."""
        return torch.clamp(self.checked(x), self.lower, self.upper)

    def told(self, strategy: Located, x: Tensor, f: Tensor) -> Tensor:
        """Values and penalties, by weights that take this generation into account."""
        num, dimension = x.shape
        mean, variance = strategy.mean, strategy.sigma.square().clamp(_TINY, _LARGEST)
        finite = sorted(value for value in f.tolist() if math.isfinite(value))
        spread = finite[3 * len(finite) // 4] - finite[len(finite) // 4] if finite else 0.0
        if spread > 0:
            scaled = min(spread / float((variance / dimension).sum()), _MOST)
            self._ranges = [*self._ranges, scaled][-(20 + 3 * dimension // num) :]
        excess = x - self.inside(x)
        if not self._ranges or not bool(excess.any()):
            return f
        unit = median(self._ranges)
        weights = torch.full_like(mean, 2 * unit) if self._weights is None else self._weights
        if weights.shape != mean.shape:
            raise ShapeError(
                f"The weights of these bounds are of {len(weights)} coordinates, but the search has {len(mean)}: load "
                "the state that belongs to it, or begin by start(x0)."
            )
        far = (mean - self.inside(mean)).abs() / variance.sqrt() - 3 * max(1.0, 4 * math.sqrt(dimension) / num)
        weights = weights * (far.clamp(min=0) / 3).tanh().div(2).exp()
        self._weights = torch.where(weights > 5 * unit, weights * math.exp(-1 / 3), weights)
        log_variance = variance.log()
        scale = (0.9 * (log_variance - log_variance.mean())).exp()
        penalty: Tensor = (self._weights * excess.square() / scale).mean(1)
        return torch.where(f.isfinite(), (f + penalty).clamp(max=_LARGEST), f)

    def state_dict(self) -> dict[str, Any]:
        """Weights and past ranges, for an ask-and-tell loop that is to go on later."""
        weights = None if self._weights is None else self._weights.clone()
        return {"weights": weights, "ranges": list(self._ranges)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state.

        Raises:
            ScorefnError: it is no state of such bounds, or damaged; nothing is then changed.
            ShapeError: it belongs to another number of coordinates.
        """
        if not isinstance(state, Mapping) or set(state) != {"weights", "ranges"}:
            seen = sorted(map(str, state)) if isinstance(state, Mapping) else repr(state)
            raise ScorefnError(
                f"This is no state of PenalizedBounds: it is {seen}, but weights and ranges are needed. Pass what "
                "state_dict() returned."
            )
        weights, ranges = state["weights"], state["ranges"]
        if not isinstance(ranges, list) or not all(isinstance(entry, float) and entry > 0 for entry in ranges):
            raise ScorefnError(f"The state's ranges are {ranges!r}, but they must be a list of positive numbers.")
        if weights is not None:
            if not isinstance(weights, Tensor) or weights.ndim != 1 or not bool((weights > 0).all()):
                raise ScorefnError(
                    f"The state's weights are {weights!r}, but they must be positive, one per coordinate."
                )
            if self.lower.ndim and weights.shape != self.lower.shape:
                raise ShapeError(
                    f"The state's weights have shape {tuple(weights.shape)}, but the box has {len(self.lower)} "
                    "coordinates: load the state that belongs to it."
                )
        check_finite("weights", weights)
        check_finite("ranges", ranges)
        self._weights = None if state["weights"] is None else state["weights"].clone()
        self._ranges = list(state["ranges"])

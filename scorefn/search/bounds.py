"""Boxes: where points may lie, and three ways to keep a search inside."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from scorefn.core import ScorefnError, ShapeError
from scorefn.search.points import Numbers, is_number

Bound: TypeAlias = float | Numbers | None
"""One number for all coordinates or one for each; None, or None as an entry: open."""


class Located(Protocol):
    """What a box sees of a strategy."""

    @property
    def mean(self) -> Any:
        """``[D]``, the mean."""

    @property
    def sigma(self) -> Any:
        """``[D]``, the standard deviations."""

    def ask(self) -> Any:
        """Points ``[N, D]``; with ``Everywhere`` of any kind: a tuple or mapping of tensors whose first axis is N."""


class Bounds(ABC):
    """A box in which fun may be evaluated, and the way from the points of a search to points in it.

    A search with bounds has two kinds of points: those that the strategy draws and is told, and those in the box that
    are evaluated and reported. A subclass says how they belong together.

    Args:
        lower: one number, or one per coordinate; None or ``-inf``: open.
        upper: one number, or one per coordinate; None or ``inf``: open.

    Raises:
        ScorefnError: a bound that is no number, or a lower one that is not below the upper one.
        ShapeError: bounds that are neither one number nor ``[D]``, or differ in length.
    """

    def __init__(self, lower: Bound = None, upper: Bound = None) -> None:
        self.lower = _side(lower, "lower", -math.inf)
        self.upper = _side(upper, "upper", math.inf)
        if self.lower.ndim and self.upper.ndim and self.lower.shape != self.upper.shape:
            raise ShapeError(
                f"The lower bounds have shape {tuple(self.lower.shape)} and the upper ones {tuple(self.upper.shape)}: "
                "give one number, or one per coordinate."
            )
        crossed = ~(self.lower < self.upper)
        if bool(crossed.any()):
            where = f" at coordinates {crossed.nonzero().flatten().tolist()[:10]}" if crossed.ndim else ""
            raise ScorefnError(
                f"Every lower bound must be below its upper bound, but{where} it is not: lower {self.lower.tolist()}, "
                f"upper {self.upper.tolist()}. Leave a coordinate that is fixed out of x0."
            )

        self._sides = self.lower, self.upper

    def start(self, x0: Tensor) -> Tensor:
        """The point ``[D]`` from which the strategy starts, whose image in the box is x0.

        Raises:
            ScorefnError: x0 lies outside the box.
            ShapeError: the box has another number of coordinates.
        """
        self.fit(x0)
        outside = (x0 < self.lower) | (x0 > self.upper)
        if bool(outside.any()):
            bad = outside.nonzero().flatten().tolist()
            raise ScorefnError(
                f"x0 lies outside the bounds at coordinates {bad[:10]}: x0 is {x0[bad[:10]].tolist()}, the bounds are "
                f"{self.lower[bad[:10]].tolist()} and {self.upper[bad[:10]].tolist()}. Start inside."
            )
        return x0

    def fit(self, x0: Tensor) -> None:
        """Take the number of coordinates and the device from x0 ``[D]``."""
        for side in self._sides:
            if side.ndim and side.shape != x0.shape:
                raise ShapeError(
                    f"The bounds have shape {tuple(side.shape)}, but x0 has shape {tuple(x0.shape)}: give one number, "
                    "or one per coordinate."
                )
        self.lower, self.upper = (side.to(x0.device).expand_as(x0) for side in self._sides)

    @abstractmethod
    def inside(self, x: Tensor) -> Tensor:
        """The points of the box that belong to the points x ``[..., D]`` of the search."""

    def asked(self, strategy: Located) -> tuple[Tensor, Tensor]:
        """Points ``[N, D]`` to tell, and the points ``[N, D]`` of the box to evaluate."""
        x = strategy.ask()
        return x, self.inside(x)

    def told(self, strategy: Located, x: Tensor, f: Tensor) -> Tensor:
        """Values ``[N]`` to tell for the points x ``[N, D]`` of the search, whose images have values f ``[N]``."""
        return f

    def fresh(self, center: Tensor, sigma0: Tensor, generator: torch.Generator) -> Tensor:
        """A start ``[D]`` in the box for a new run: uniform, or within two sigma0 of center where a side is open."""
        low, high = _region(center, sigma0, self.lower, self.upper)
        uniform = torch.rand(center.shape, dtype=center.dtype, generator=generator).to(center.device)
        return torch.clamp(low + (high - low) * uniform, self.lower, self.upper)


class SmoothBounds(Bounds):
    """The box as the image of the whole space under a smooth, folding map; the search never meets a wall.

    Coordinate by coordinate the map T is the identity away from the bounds. Within a of a bound l it is a parabola,
    with the slope 1 at ``l + a`` and 0 at ``l - a``, and beyond it is mirrored (hence periodic between two bounds)::

        T(x) = x                                l + a <= x <= u - a
        T(x) = l + (x - l + a)^2 / (4 a)        l - a <= x <= l + a
        T(x) = T(2 (l - a) - x)                 x <= l - a

    and likewise at u. T is continuous with its derivative, monotone from ``l - a`` to ``u + a``, and onto ``[l, u]``.
    T has the period ``2 L``, ``L = u - l + 2 a``. The strategy is told the point between ``l - a - L/2`` and
    ``u + a + L/2`` that is whole periods away from what it drew: there every bound occurs once, and standard deviations
    cannot grow over many periods while an optimum lies on a bound. The idea is pycma's linear-quadratic transform; the
    width a of the parabola here does not depend on the origin where both sides are bounded.

    Args:
        lower: one number, or one per coordinate; None or ``-inf``: open.
        upper: one number, or one per coordinate; None or ``inf``: open.
        margin: a, one number, at most half of the width; None: a twentieth of the width between two bounds, and
            ``(1 + |bound|)/20`` at a bound whose other side is open.

    Raises:
        ScorefnError: crossed bounds, or a margin that is not positive or wider than half of the box.
        ShapeError: bounds that are neither one number nor ``[D]``, or differ in length.

    Example:
        >>> box = SmoothBounds(0.0, [10.0, 1.0])
        >>> box.inside(torch.tensor([[5.0, 0.5], [-0.5, 1.05]], dtype=torch.float64))
        tensor([[5.0000, 0.5000],
                [0.0000, 1.0000]], dtype=torch.float64)
    """

    def __init__(self, lower: Bound = None, upper: Bound = None, margin: float | None = None) -> None:
        super().__init__(lower, upper)
        half = float((self.upper - self.lower).min()) / 2
        if margin is not None and (not is_number(margin) or not 0 < margin <= half):
            raise ScorefnError(
                f"margin must be positive and at most half of the smallest width, {half:g}, but it is {margin!r}: the "
                "two parabolas would overlap."
            )
        self._margin = margin
        self._lay()

    def fit(self, x0: Tensor) -> None:
        """Take the number of coordinates and the device from x0 ``[D]``."""
        super().fit(x0)
        self._lay()

    def _lay(self) -> None:
        """Where the pieces of T meet, from the bounds as they are."""
        width = self.upper - self.lower
        self._periodic = width.isfinite()
        self._low_bend = self._bend(width, self.lower)
        self._high_bend = self._bend(width, self.upper)
        self._left = self.lower - self._low_bend
        self._right = self.upper + self._high_bend
        self._period = self._right - self._left
        self._low_knee = self.lower + self._low_bend
        self._high_knee = self.upper - self._high_bend

    def start(self, x0: Tensor) -> Tensor:
        """The preimage ``[D]`` of x0 between ``l - a`` and ``u + a``."""
        x = super().start(x0)
        low = self._left + (4 * self._low_bend * (x0 - self.lower)).sqrt()
        high = self._right - (4 * self._high_bend * (self.upper - x0)).sqrt()
        return torch.where(x0 < self._low_knee, low, torch.where(x0 > self._high_knee, high, x))

    def asked(self, strategy: Located) -> tuple[Tensor, Tensor]:
        """The drawn points, moved by whole periods, and their images."""
        x = strategy.ask()
        far = self._periodic & ((x < self._left - self._period / 2) | (x > self._right + self._period / 2))
        if bool(far.any()):
            begin = self._left - self._period / 2
            x = torch.where(far, begin + (x - begin).remainder(2 * self._period), x)
        return x, self.inside(x)

    def inside(self, x: Tensor) -> Tensor:
        """T of the points x ``[..., D]``."""
        left, right, period = self._left, self._right, self._period
        if bool(((x >= self._low_knee) & (x <= self._high_knee)).all()):
            return x
        turned = (x - left).remainder(2 * period)
        both = torch.where((x < left) | (x > right), left + period - (turned - period).abs(), x)
        one = torch.where(x < left, 2 * left - x, torch.where(x > right, 2 * right - x, x))
        y = torch.where(self._periodic, both, one)
        low = self.lower + (y - left).square() / (4 * self._low_bend)
        high = self.upper - (right - y).square() / (4 * self._high_bend)
        y = torch.where(y < self._low_knee, low, torch.where(y > self._high_knee, high, y))
        return torch.clamp(y, self.lower, self.upper)

    def _bend(self, width: Tensor, bound: Tensor) -> Tensor:
        if self._margin is not None:
            return torch.full_like(width, self._margin)
        one_sided = torch.where(bound.isfinite(), (1 + bound.abs()) / 20, 1.0)
        return torch.where(width.isfinite(), width / 20, one_sided)


class PenalizedBounds(Bounds):
    """Points are repaired to the nearest one in the box, and pay for the distance; the unrepaired point is told.

    The strategy is told, for a point x whose repaired point c(x) has the value f::

        f + 1/D sum_i g_i (x_i - c(x)_i)^2 / s_i,     log s_i = 0.9 (log sigma_i^2 - mean_j log sigma_j^2)

    The weights g follow the values: with r the median over the last ``20 + 3 D/N`` generations of the interquartile
    range of f divided by the mean of the variances, g starts at 2 r with the first generation that leaves the box. Then
    g_i grows by ``exp(tanh(e/3)/2)`` a generation where the mean lies ``e > 0`` standard deviations more than
    ``3 max(1, 4 sqrt(D)/N)`` outside in coordinate i, and shrinks by ``exp(-1/3)`` where it exceeds 5 r; generations
    that do not leave the box leave g as it is.

    Source: Hansen, Niederberger, Guzzella & Koumoutsakos (2009), "A method for handling uncertainty in evolutionary
    optimization with an application to feedback control of combustion", section IV.B, as developed in pycma.

    Args:
        lower: one number, or one per coordinate; None or ``-inf``: open.
        upper: one number, or one per coordinate; None or ``inf``: open.

    Raises:
        ScorefnError: a bound that is no number, or a lower one that is not below the upper one.
        ShapeError: bounds that are neither one number nor ``[D]``, or differ in length.
    """

    def __init__(self, lower: Bound = None, upper: Bound = None) -> None:
        super().__init__(lower, upper)
        self._weights: Tensor | None = None
        self._ranges: list[float] = []

    def start(self, x0: Tensor) -> Tensor:
        """x0 itself; weights begin afresh."""
        self._weights, self._ranges = None, []
        return super().start(x0)

    def inside(self, x: Tensor) -> Tensor:
        """The nearest points of the box."""
        return torch.clamp(x, self.lower, self.upper)

    def told(self, strategy: Located, x: Tensor, f: Tensor) -> Tensor:
        """Values and penalties, by weights that take this generation into account."""
        num, dimension = x.shape
        mean, variance = strategy.mean, strategy.sigma.square()
        finite = sorted(value for value in f.tolist() if math.isfinite(value))
        spread = finite[3 * len(finite) // 4] - finite[len(finite) // 4] if finite else 0.0
        if spread > 0:
            self._ranges = [*self._ranges, spread / float(variance.mean())][-(20 + 3 * dimension // num) :]
        excess = x - self.inside(x)
        if not self._ranges or not bool(excess.any()):
            return f
        unit = median(self._ranges)
        weights = torch.full_like(mean, 2 * unit) if self._weights is None else self._weights
        far = (mean - self.inside(mean)).abs() / variance.sqrt() - 3 * max(1.0, 4 * math.sqrt(dimension) / num)
        weights = weights * (far.clamp(min=0) / 3).tanh().div(2).exp()
        self._weights = torch.where(weights > 5 * unit, weights * math.exp(-1 / 3), weights)
        log_variance = variance.log()
        scale = (0.9 * (log_variance - log_variance.mean())).exp()
        penalty: Tensor = (self._weights * excess.square() / scale).mean(1)
        return f + penalty

    def state_dict(self) -> dict[str, Any]:
        """Weights and past ranges, for an ask-and-tell loop that is to go on later."""
        weights = None if self._weights is None else self._weights.clone()
        return {"weights": weights, "ranges": list(self._ranges)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self._weights = None if state["weights"] is None else state["weights"].clone()
        self._ranges = list(state["ranges"])


class ResampledBounds(Bounds):
    """Points outside the box are drawn anew, up to so many times, and clipped if they are still outside.

    What is told is what is evaluated. The distribution is then a truncated one, and its mean is pushed away from a
    bound: good where the optimum lies inside. Where it lies on the boundary, and more so in a corner, the search does
    not settle there; take one of the other two.

    Args:
        lower: one number, or one per coordinate; None or ``-inf``: open.
        upper: one number, or one per coordinate; None or ``inf``: open.
        attempts: how many generations are drawn in search of points inside.

    Raises:
        ScorefnError: a bound that is no number, or a lower one that is not below the upper one; attempts below 1.
        ShapeError: bounds that are neither one number nor ``[D]``, or differ in length.
    """

    def __init__(self, lower: Bound = None, upper: Bound = None, attempts: int = 100) -> None:
        super().__init__(lower, upper)
        if isinstance(attempts, bool) or not isinstance(attempts, int) or attempts < 1:
            raise ScorefnError(f"attempts must be an integer of at least 1, but it is {attempts!r}.")
        self._attempts = attempts

    def inside(self, x: Tensor) -> Tensor:
        """The nearest points of the box."""
        return torch.clamp(x, self.lower, self.upper)

    def asked(self, strategy: Located) -> tuple[Tensor, Tensor]:
        """Points ``[N, D]`` of the box, twice."""
        x = strategy.ask()
        for _ in range(self._attempts):
            outside = ((x < self.lower) | (x > self.upper)).any(-1)
            if not bool(outside.any()):
                return x, x
            x = torch.where(outside.unsqueeze(-1), strategy.ask(), x)
        x = self.inside(x)
        return x, x


class Everywhere(Bounds):
    """No bounds; for points of any kind."""

    def inside(self, x: Tensor) -> Tensor:
        """x itself."""
        return x


def _region(center: Tensor, sigma0: Tensor, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """The box where both of its sides are bounded, else four sigma0 around center: sigma0 is a quarter of a region."""
    boxed = lower.isfinite() & upper.isfinite()
    return torch.where(boxed, lower, center - 2 * sigma0), torch.where(boxed, upper, center + 2 * sigma0)


def _side(value: Bound, name: str, open_side: float) -> Tensor:
    if value is None:
        value = open_side
    elif not isinstance(value, Tensor) and isinstance(value, Sequence):
        value = [open_side if entry is None else entry for entry in value]
    try:
        side = torch.as_tensor(np.asarray(value.cpu() if isinstance(value, Tensor) else value, dtype=np.float64).copy())
    except (TypeError, ValueError) as error:
        raise ScorefnError(
            f"The {name} bounds must be numbers, or None where a side is open, but they are {value!r}."
        ) from error
    if side.ndim > 1 or bool(side.isnan().any()):
        raise ScorefnError(
            f"The {name} bounds must be one number or one per coordinate, none of them NaN, but they are "
            f"{side.tolist()}: nothing lies on a side of NaN."
        )
    return side

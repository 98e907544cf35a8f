"""Boxes: where points may lie, and three ways to keep a search inside."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from scorefn.core import ScorefnError, ShapeError
from scorefn.core.representation import called
from scorefn.search.points import Numbers, as_integer, as_numbers, as_start, is_number

Bound: TypeAlias = float | Numbers | None
"""One number for all coordinates or one for each; None, or None as an entry: open."""


_SHARE = 0.25  # of L, the largest standard deviation


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

    Example:
        >>> import torch
        >>> from scorefn.search import Bounds
        >>> class Angles(Bounds):  # the ends are one and the same place
        ...     def inside(self, x):
        ...         turned = (self.checked(x) - self.lower).remainder(self.upper - self.lower)
        ...         return self.lower + turned
        >>> Angles(-180.0, 180.0).inside(torch.tensor([190.0, -360.0, 30.0]))
        tensor([-170.,    0.,   30.])
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

    def __repr__(self) -> str:
        return called(self, self.lower, self.upper)

    def start(self, x0: Numbers) -> Tensor:
        """The point ``[D]`` from which the strategy starts, whose image in the box is x0.

        Raises:
            ScorefnError: x0 lies outside the box.
            ShapeError: x0 is not one point, or the box has another number of coordinates.
            NonFiniteError: x0 is not finite.
        """
        x0 = as_start(x0)
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

    def narrowed(self, sigma0: Tensor) -> Tensor:
        """First standard deviations ``[D]`` that suit the box, of those that were given; here these themselves."""
        return sigma0

    @abstractmethod
    def inside(self, x: Tensor) -> Tensor:
        """The points of the box that belong to the points x ``[..., D]`` of the search.

        Raises:
            ShapeError: x has another number of coordinates than the box.
        """

    def checked(self, x: Tensor) -> Tensor:
        """Points ``[..., D]``, refused where their last axis is not that of the box."""
        points = as_numbers(x, "points", self.lower.device, None)
        if self.lower.ndim and points.shape[-1:] != self.lower.shape:
            raise ShapeError(
                f"The points have shape {tuple(points.shape)}, but the box has {len(self.lower)} coordinates: give "
                f"[..., {len(self.lower)}]."
            )
        return points

    def asked(self, strategy: Located) -> tuple[Tensor, Tensor]:
        """Points ``[N, D]`` to tell, and the points ``[N, D]`` of the box to evaluate."""
        x = strategy.ask()
        return x, self.inside(x)

    def told(self, strategy: Located, x: Tensor, f: Tensor) -> Tensor:
        """Values ``[N]`` to tell for the points x ``[N, D]`` of the search, whose images have values f ``[N]``."""
        return f

    def fresh(self, centre: Tensor, sigma0: Tensor, generator: torch.Generator) -> Tensor:
        """A start ``[D]`` in the box for a new run: uniform, or within two sigma0 of centre where a side is open."""
        low, high = _region(centre, sigma0, self.lower, self.upper)
        uniform = torch.rand(centre.shape, dtype=centre.dtype, generator=generator).to(centre.device)
        return torch.clamp(low + (high - low) * uniform, self.lower, self.upper)


class SmoothBounds(Bounds):
    """The box as the image of the whole space under a smooth, folding map; the search never meets a wall.

    Coordinate by coordinate the map T is the identity away from the bounds. Within a of a bound l it is a parabola,
    with the slope 1 at ``l + a`` and 0 at ``l - a``, and beyond it is mirrored (hence periodic between two bounds)::

        T(x) = x                                l + a <= x <= u - a
        T(x) = l + (x - l + a)^2 / (4 a)        l - a <= x <= l + a
        T(x) = T(2 (l - a) - x)                 x <= l - a

    and likewise at u. T is continuous with its derivative, monotone from ``l - a`` to ``u + a``, and onto ``[l, u]``.
    T has the period ``2 L``, ``L = u - l + 2 a``, and points a period apart are worth the same: over several periods
    a search learns nothing, and would widen for ever. So no point is drawn with a standard deviation above ``L/4``.
    ``narrowed`` holds the first ones to it, coordinate by coordinate; later ``asked`` draws the points of a generation
    together, towards the mean and by one factor for all coordinates, ``min(1, L_i/(4 sigma_i))``. The strategy is told
    these points, shorter than its own, and narrows; ``SNES`` does so slowly, hence ``narrowed``, which ``minimize``
    applies and a loop of one's own should. Correlations stay as they are, which moving single coordinates, by
    whole periods say, would destroy.

    The map is pycma's linear-quadratic transform, but that the width a of the parabola does not depend on the origin
    where both sides are bounded; pycma limits standard deviations to a third of the box. Source: Hansen, Akimoto &
    Baudis (2019), "CMA-ES/pycma on GitHub", Zenodo, its ``BoxConstraintsLinQuadTransformation``.

    Args:
        lower: one number, or one per coordinate; None or ``-inf``: open.
        upper: one number, or one per coordinate; None or ``inf``: open.
        margin: a, one number, at most half of the width; None: a twentieth of the width between two bounds, and
            ``(1 + |bound|)/20`` at a bound whose other side is open.

    Raises:
        ScorefnError: crossed bounds, or a margin that is not positive or wider than half of the box.
        ShapeError: bounds that are neither one number nor ``[D]``, or differ in length.

    Example:
        >>> import torch
        >>> from scorefn.search import SmoothBounds
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

    def __repr__(self) -> str:
        return called(self, self.lower, self.upper, margin=self._margin)

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
        self._widest = _SHARE * self._period
        self._low_knee = self.lower + self._low_bend
        self._high_knee = self.upper - self._high_bend

    def start(self, x0: Numbers) -> Tensor:
        """The preimage ``[D]`` of x0 between ``l - a`` and ``u + a``."""
        x = super().start(x0)
        low = self._left + (4 * self._low_bend * (x - self.lower)).sqrt()
        high = self._right - (4 * self._high_bend * (self.upper - x)).sqrt()
        return torch.where(x < self._low_knee, low, torch.where(x > self._high_knee, high, x))

    def narrowed(self, sigma0: Tensor) -> Tensor:
        """``min(sigma0, L/4)``, ``[D]``."""
        return torch.minimum(sigma0, self._widest)

    def asked(self, strategy: Located) -> tuple[Tensor, Tensor]:
        """The drawn points, drawn together where the strategy is too wide for the box, and their images."""
        x = self.checked(strategy.ask())
        share = float((self._widest / strategy.sigma).min())
        if share < 1:
            mean = strategy.mean.to(x.dtype)
            x = mean + share * (x - mean)
        return x, self.inside(x)

    def inside(self, x: Tensor) -> Tensor:
        """T of the points x ``[..., D]``."""
        x = self.checked(x)
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

    Example:
        >>> from scorefn.search import ResampledBounds, minimize
        >>> def f(x):  # is not defined outside
        ...     assert 0 <= x.min() and x.max() <= 1
        ...     return ((x - 0.5) ** 2).sum()
        >>> box = ResampledBounds(0.0, 1.0)
        >>> result = minimize(f, [0.2, 0.2], 0.2, bounds=box, seed=0, ftarget=1e-4, maxfevals=2000)
        >>> result.success
        True
    """

    def __init__(self, lower: Bound = None, upper: Bound = None, attempts: int = 100) -> None:
        super().__init__(lower, upper)
        number = as_integer(attempts)
        if number is None or number < 1:
            raise ScorefnError(f"attempts must be an integer of at least 1, but it is {attempts!r}.")
        self._attempts = number

    def __repr__(self) -> str:
        return called(self, self.lower, self.upper, attempts=self._attempts)

    def inside(self, x: Tensor) -> Tensor:
        """The nearest points of the box."""
        return torch.clamp(self.checked(x), self.lower, self.upper)

    def asked(self, strategy: Located) -> tuple[Tensor, Tensor]:
        """Points ``[N, D]`` of the box, twice."""
        x = self.checked(strategy.ask())
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


def _region(centre: Tensor, sigma0: Tensor, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """The box where both of its sides are bounded, else four sigma0 around centre: sigma0 is a quarter of a region."""
    boxed = lower.isfinite() & upper.isfinite()
    return torch.where(boxed, lower, centre - 2 * sigma0), torch.where(boxed, upper, centre + 2 * sigma0)


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

"""Problems of the programs' own, from a seed and in any dimension, whose lowest value is 0; evaluations counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Points: TypeAlias = NDArray[np.float64]
Objective: TypeAlias = Callable[[Points], Points]
"""Points ``[N, D]`` to values ``[N]``."""


def sphere(dimension: int, seed: int) -> Objective:
    """``|x - c|^2``."""
    center = optimum(dimension, seed)
    return lambda x: ((x - center) ** 2).sum(1)


def ellipsoid(dimension: int, seed: int) -> Objective:
    """``sum_i 10^(6 (i - 1)/(D - 1)) (R (x - c))_i^2`` with a random rotation R."""
    center, turn = optimum(dimension, seed), rotation(dimension, seed)
    curvature = np.logspace(0, 6, dimension)
    return lambda x: ((x - center) @ turn) ** 2 @ curvature


def separable_ellipsoid(dimension: int, seed: int) -> Objective:
    """The ellipsoid whose axes are those of the coordinates."""
    center = optimum(dimension, seed)
    curvature = np.logspace(0, 6, dimension)
    return lambda x: (x - center) ** 2 @ curvature


def cigar(dimension: int, seed: int) -> Objective:
    """``(u . y)^2 + 10^6 |y - (u . y) u|^2`` with ``y = x - c`` and a random unit vector u: one axis is long."""
    return _one_axis(optimum(dimension, seed), _direction(dimension, seed), 1.0, 1e6)


def discus(dimension: int, seed: int) -> Objective:
    """``10^6 (u . y)^2 + |y - (u . y) u|^2``: one axis is short."""
    return _one_axis(optimum(dimension, seed), _direction(dimension, seed), 1e6, 1.0)


def plane_discus(dimension: int, seed: int) -> Objective:
    """The discus with ``u = (e_1 + e_D)/sqrt 2``.

    A diagonal and one direction can be its covariance ``I - (1 - 1e-6) u u^T``; they cannot where u is any vector.
    """
    u = np.zeros(dimension)
    u[[0, -1]] = 0.5**0.5
    return _one_axis(optimum(dimension, seed), u, 1e6, 1.0)


def rosenbrock(dimension: int, seed: int) -> Objective:
    """``sum_i 100 (y_i^2 - y_(i+1))^2 + (y_i - 1)^2`` with ``y = R (x - c) + 1``."""
    center, turn = optimum(dimension, seed), rotation(dimension, seed)
    return lambda x: _valley((x - center) @ turn + 1)


def parallel_rosenbrock(dimension: int, seed: int) -> Objective:
    """The Rosenbrock function without the rotation."""
    center = optimum(dimension, seed)
    return lambda x: _valley(x - center + 1)


def optimum(dimension: int, seed: int) -> Points:
    """``[D]``, c: uniform in [-2, 2]^D."""
    return np.random.default_rng([seed, dimension]).uniform(-2, 2, dimension)


def rotation(dimension: int, seed: int) -> Points:
    """``[D, D]``, R."""
    draws = np.random.default_rng([seed, dimension])
    draws.uniform(-2, 2, dimension)  # the optimum's
    turn: Points = np.linalg.qr(draws.standard_normal((dimension, dimension)))[0]
    return turn


def start(dimension: int, seed: int) -> Points:
    """``[D]``, where a search begins: uniform in [-4, 4]^D."""
    return np.random.default_rng([seed, dimension, 1]).uniform(-4, 4, dimension)


def _direction(dimension: int, seed: int) -> Points:
    u = np.random.default_rng([seed, dimension, 2]).standard_normal(dimension)
    direction: Points = u / np.linalg.norm(u)
    return direction


def _one_axis(center: Points, u: Points, along: float, across: float) -> Objective:
    def values(x: Points) -> Points:
        y = x - center
        length = y @ u
        total: Points = along * length**2 + across * ((y - np.outer(length, u)) ** 2).sum(1)
        return total

    return values


def _valley(y: Points) -> Points:
    total: Points = (100 * (y[:, :-1] ** 2 - y[:, 1:]) ** 2 + (y[:, :-1] - 1) ** 2).sum(1)
    return total


class Counted:
    """An objective that notes when a target was reached, and the lowest values within budgets.

    Args:
        f: the objective.
        target: a value.
        budgets: evaluations.

    Attributes:
        evaluations: how many there were.
        reached: the first evaluation with a value of the target or less; None: there was none.
        best: the lowest value.
    """

    def __init__(self, f: Objective, target: float, budgets: Sequence[int] = ()) -> None:
        self._f = f
        self._target = target
        self._within: dict[int, float | None] = dict.fromkeys(budgets)
        self.evaluations = 0
        self.reached: int | None = None
        self.best = float("inf")

    def __call__(self, x: Points) -> Points:
        """The values ``[N]`` at points ``[N, D]``."""
        values = self._f(x)
        if self.reached is None and (hit := values <= self._target).any():
            self.reached = self.evaluations + 1 + int(hit.argmax())
        for budget, found in self._within.items():
            if found is None and self.evaluations + len(values) >= budget:
                part = values[: budget - self.evaluations]
                self._within[budget] = float(min([self.best, *part]))
        self.evaluations += len(values)
        self.best = min(self.best, float(values.min()))
        return values

    def within(self) -> list[float]:
        """The lowest value within each budget; of a search that ended before, the lowest of all."""
        return [self.best if found is None else found for found in self._within.values()]

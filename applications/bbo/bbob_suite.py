"""COCO's BBOB problems, their optima, and a black box that notes at which evaluation each target was reached."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

TARGETS = tuple(10.0 ** (2 - k / 5) for k in range(51))
"""Above f_opt; the last one, 1e-8, counts as solved."""

Record: TypeAlias = dict[str, Any]
"""What a solver did on a problem, as JSON has it."""


class Suite:
    """BBOB problems of one dimension.

    Args:
        dimension: D.
        functions: numbers between 1 and 24.
        instances: numbers from 1 on.
    """

    def __init__(self, dimension: int, functions: Iterable[int], instances: Iterable[int]) -> None:
        import cocoex

        cocoex.log_level("warning")
        self.dimension = dimension
        self._suite = cocoex.Suite(
            "bbob",
            f"instances:{_listed(instances)}",
            f"dimensions:{dimension} function_indices:{_listed(functions)}",
        )
        self._optima: dict[tuple[int, int], float] = {}

    def problem(self, function: int, instance: int) -> Any:
        """COCO's problem, unevaluated."""
        return self._suite.get_problem_by_function_dimension_instance(function, self.dimension, instance)

    def optimum(self, function: int, instance: int) -> float:
        """f_opt: the value at the optimum, which COCO writes into a file of the current folder."""
        key = function, instance
        if key not in self._optima:
            problem = self.problem(function, instance)
            with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
                problem._best_parameter("print")
                best = np.loadtxt("._bbob_problem_best_parameter.txt")
            self._optima[key] = float(problem(best))
            problem.free()
        return self._optima[key]


class Spent(Exception):
    """The budget is spent: raised in place of one evaluation more."""


class Watched:
    """A black box that notes at which evaluation each target was reached first, and is closed after the last one.

    Args:
        fun: the black box.
        optimum: f_opt.
        budget: how many evaluations there are.

    Attributes:
        evaluations: how many there were.
        best: the lowest value.
        reached: of each target, at which evaluation; None: not within the budget.
    """

    def __init__(self, fun: Callable[[Any], float], optimum: float, budget: float) -> None:
        self._fun = fun
        self._optimum = optimum
        self._budget = budget
        self._levels: list[float] = [optimum + target for target in TARGETS]
        self.evaluations = 0
        self.best = float("inf")
        self.reached: list[int | None] = []

    @property
    def ftarget(self) -> float:
        """The value that solves it."""
        return self._levels[-1]

    def __call__(self, x: NDArray[np.float64]) -> float:
        """The value at one point ``[D]``.

        Raises:
            Spent: there were as many evaluations as the budget has.
        """
        if self.evaluations >= self._budget:
            raise Spent
        value = float(self._fun(x))
        self.evaluations += 1
        if value < self.best:
            self.best = value
            while len(self.reached) < len(self._levels) and value <= self._levels[len(self.reached)]:
                self.reached.append(self.evaluations)
        return value

    def record(self) -> Record:
        """Evaluations, the gap to f_opt, and the evaluation at which each of the 51 targets was reached."""
        open_targets = [None] * (len(TARGETS) - len(self.reached))
        return {
            "evaluations": self.evaluations,
            "gap": self.best - self._optimum,
            "reached": [*self.reached, *open_targets],
        }


def _listed(numbers: Iterable[int]) -> str:
    return ",".join(map(str, numbers))

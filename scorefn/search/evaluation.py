"""Values of points by a function of the caller's, in the caller's manner."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scorefn.core import ScorefnError, ShapeError
from scorefn.search.points import as_values

Point: TypeAlias = Tensor | NDArray[Any] | Any
"""A tensor, an array where the caller used arrays, or a tuple or dictionary of them where a space has several parts."""


class Evaluation:
    """Values of points by a function of the caller's, in the caller's manner; points are copied first.

    Args:
        fun: the function.
        native: makes of a tensor what fun is to see.
        vectorized: whether fun takes all points at once.

    Raises:
        ScorefnError: fun is no function.
    """

    def __init__(self, fun: Callable[[Any], Any], native: Callable[[Tensor], Point], vectorized: bool) -> None:
        if not callable(fun):
            raise ScorefnError(f"fun must be a function of a point, but it is {fun!r}: it is what is evaluated.")
        check_switch("vectorized", vectorized)
        self.native = native
        self._fun = fun
        self._vectorized = vectorized

    def __call__(self, points: Any) -> Tensor:
        """Values ``[N]`` in float64."""
        parts = _leaves(points)
        num, device = len(parts[0]), parts[0].device
        copies = over(points, lambda part: self.native(part.clone()))
        if self._vectorized:
            shapes = ", ".join(str(tuple(part.shape)) for part in parts)
            return as_values(self._noted(copies, lambda: f"points of shape {shapes}"), num, device)
        values = [self._value(copies, points, index, num) for index in range(num)]
        return torch.tensor(values, dtype=torch.float64, device=device)

    def _value(self, copies: Any, points: Any, index: int, num: int) -> float:
        def shown() -> str:
            return f"point {index} of {num}: {over(points, lambda part: part[index].flatten()[:10].tolist())}"

        value = self._noted(over(copies, lambda part: part[index]), shown)
        if isinstance(value, float):
            return value
        if shape := tuple(getattr(value, "shape", ())):
            raise ShapeError(
                f"fun must return one number for one point, but it returned shape {shape}. Reduce it, for instance "
                "with .sum(), or pass vectorized=True where fun takes all points [N, D] at once."
            )
        try:
            if not isinstance(value, Tensor) and np.asarray(value).dtype.kind not in "biuf":
                raise TypeError
            if isinstance(value, Tensor) and value.is_complex():
                raise TypeError
            return float(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ScorefnError(
                f"fun must return a real number, but it returned {type(value).__name__}: only what float64 holds is "
                "compared. Convert it by float, and return float('nan') where an evaluation failed."
            ) from error

    def _noted(self, argument: Any, what: Callable[[], str]) -> Any:
        try:
            return self._fun(argument)
        except Exception as error:
            error.add_note(f"scorefn called fun with {what()}.")
            raise


def over(points: Any, change: Callable[[Any], Any]) -> Any:
    """A change made to each part of points, whose structure of tuples and dictionaries is kept."""
    if isinstance(points, Mapping):
        return {name: over(part, change) for name, part in points.items()}
    if isinstance(points, Sequence):
        return tuple(over(part, change) for part in points)
    return change(points)


def _leaves(points: Any) -> list[Tensor]:
    found: list[Tensor] = []
    over(points, found.append)
    return found


def as_it_is(x: Tensor) -> Point:
    """The tensor itself."""
    return x


def as_array(x: Tensor) -> Point:
    """The numpy array of a tensor, on the same memory."""
    array: NDArray[Any] = x.numpy()
    return array


def check_switch(name: str, value: object) -> None:
    """Refuse what is neither True nor False: any text is true."""
    if not isinstance(value, bool | np.bool_):
        raise ScorefnError(f"{name} must be True or False, but it is {value!r}: it is a switch.")

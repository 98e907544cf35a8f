"""Values of points by a function of the caller's, in the caller's manner."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scorefn.core import ScorefnError, ShapeError
from scorefn.core.representation import called
from scorefn.scale import WorkRecord
from scorefn.scale.dispatch import Dispatch
from scorefn.scale.executors import Workers
from scorefn.search.points import as_values

Point: TypeAlias = Tensor | NDArray[Any] | Any
"""A tensor, an array where the caller used arrays, or a tuple or dictionary of them where a space has several parts."""


class Evaluates(Protocol):
    """What the loop needs to know values."""

    native: Callable[[Tensor], Point]

    def __call__(self, points: Any) -> Tensor:
        """Values ``[N]`` of a generation."""

    def single(self, point: Any) -> float:
        """The value of one point that belongs to no generation."""

    @property
    def records(self) -> Sequence[WorkRecord]:
        """What each generation cost the workers; empty without any."""


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

    @property
    def records(self) -> Sequence[WorkRecord]:
        """None: there are no workers."""
        return ()

    def single(self, point: Any) -> float:
        """The value of one point."""
        return float(self(_alone(point))[0])

    def __call__(self, points: Any, first: int = 0, total: int | None = None) -> Tensor:
        """Values ``[N]`` in float64; these may be the points from ``first`` on of ``total``."""
        parts = _leaves(points)
        num, device = len(parts[0]), parts[0].device
        copies = over(points, lambda part: self.native(part.clone()))
        if self._vectorized:
            shapes = ", ".join(str(tuple(part.shape)) for part in parts)
            return as_values(self._noted(copies, lambda: f"points of shape {shapes}"), num, device)
        values = [self._value(copies, points, index, first, num if total is None else total) for index in range(num)]
        return torch.tensor(values, dtype=torch.float64, device=device)

    def _value(self, copies: Any, points: Any, index: int, first: int, total: int) -> float:
        def shown() -> str:
            return f"point {first + index} of {total}: {over(points, lambda part: part[index].flatten()[:10].tolist())}"

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


class Evaluator:
    """Values of points over workers, for a loop of one's own around ``ask`` and ``tell``.

    Values come in the order of the points, whoever was first: the loop is the serial one to the bit. ``minimize`` and
    ``run`` do this by themselves with ``executor=``.

    Args:
        fun: called with one point on a worker, returns one number; NaN or an infinite value marks a failure.
        executor: an executor, a function that makes one, or ``sf.scale.Workers``, which says what happens in trouble.
        vectorized: call fun with the points ``[n, D]`` of a batch; it returns ``[n]``.
        arrays: fun takes numpy arrays rather than tensors.

    Raises:
        ScorefnError: fun is no function, or cannot be sent to the workers; no worker answers.

    Example:
        >>> from concurrent.futures import ThreadPoolExecutor
        >>> from scorefn.search import SNES, Evaluator
        >>> strategy = SNES([1.0, 2.0], 0.5, seed=0, ftarget=1e-4)
        >>> with Evaluator(lambda x: x.square().sum(), lambda: ThreadPoolExecutor(2)) as evaluate:
        ...     while not strategy.stop:
        ...         x = strategy.ask()
        ...         strategy.tell(x, evaluate(x))
        >>> strategy.stop
        {'ftarget': 0.0001}
    """

    def __init__(
        self, fun: Callable[[Any], Any], executor: Any, *, vectorized: bool = False, arrays: bool = False
    ) -> None:
        check_switch("arrays", arrays)
        work = Evaluation(fun, as_array if arrays else as_it_is, vectorized)
        self.native, self._fun = work.native, fun
        self.dispatch = Dispatch(work, Workers.of(executor), together=vectorized, fun=fun)

    def __repr__(self) -> str:
        return called(self, self._fun)

    @property
    def records(self) -> Sequence[WorkRecord]:
        """What each generation cost, one entry per call."""
        return self.dispatch.records

    def __call__(self, points: Any) -> Tensor:
        """Values ``[N]`` in float64; NaN where an evaluation failed.

        Raises:
            ScorefnError: fun returned no number; the executor broke, or all of its workers hang, and there is no
                function that makes another one.
            ShapeError: a batch got another number of values than it has points.
        """
        return self.dispatch(points)

    def single(self, point: Any) -> float:
        """The value of one point, outside of generations: there is no record of it."""
        return float(self.dispatch(_alone(point), counted=False)[0])

    def close(self) -> None:
        """Shut down an executor that was made here."""
        self.dispatch.close()

    def __enter__(self) -> Evaluator:
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        self.dispatch.close(at_once=kind is not None)


def evaluating(
    fun: Callable[[Any], Any], native: Callable[[Tensor], Point], vectorized: bool, executor: Any
) -> AbstractContextManager[Evaluates]:
    """Values of points, here or over the workers of an executor, which are let go at the end."""
    if executor is None:
        return nullcontext(Evaluation(fun, native, vectorized))
    return Evaluator(fun, executor, vectorized=vectorized, arrays=native is as_array)


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


def _alone(point: Any) -> Any:
    return over(point, lambda part: part.unsqueeze(0))


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

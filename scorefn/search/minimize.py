"""Minimise a black box in one call."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from numpy.typing import NDArray
from torch import Tensor

from scorefn.core import ScorefnError, ShapeError
from scorefn.search.csanes import CSANES
from scorefn.search.points import Numbers, as_values
from scorefn.search.snes import SNES
from scorefn.search.stopping import CONVERGED, MESSAGES
from scorefn.search.strategy import Strategy
from scorefn.search.xnes import XNES

Point: TypeAlias = Tensor | NDArray[Any]
"""A tensor where x0 is one, otherwise an array."""

_METHODS: dict[str, Callable[..., Strategy]] = {kind.method: kind for kind in (CSANES, SNES, XNES)}
_CHOICE = "snes"


@dataclass(frozen=True, eq=False)
class SearchResult:
    """What ``minimize`` found; scipy's names where they fit.

    Args:
        x: ``[D]``, the recommended point: the mean of the search distribution, evaluated once at the end. It is
            ``best_x`` instead where the mean has no finite value, or misses an ``ftarget`` that best_x reached.
        fun: the value at x.
        best_x: ``[D]``, the evaluated point of the lowest value; under noise merely the luckiest.
        best_fun: the lowest value.
        nfev: how many points were evaluated, the last one included.
        nit: how many generations were told.
        success: ftarget was reached; without one, the search converged (tolx, tolfun or tolfunhist).
        message: why it ended, in words.
        method: the strategy that was used, also where "auto" chose it.
        stop: what ended it, with the thresholds.
        sigma: ``[D]``, the final standard deviations.
        failed: how many values were not finite.
    """

    x: Point
    fun: float
    best_x: Point
    best_fun: float
    nfev: int
    nit: int
    success: bool
    message: str
    method: str
    stop: dict[str, float]
    sigma: Point
    failed: int


def minimize(
    fun: Callable[[Any], Any],
    x0: Numbers,
    sigma0: float | Numbers,
    *,
    method: str = "auto",
    maxfevals: int | None = None,
    ftarget: float | None = None,
    popsize: int | None = None,
    seed: int | torch.Generator | None = None,
    callback: Callable[[Strategy], object] | None = None,
    vectorized: bool = False,
    **options: float | None,
) -> SearchResult:
    """Minimise fun from x0 with steps of about sigma0 at first; neither derivatives nor continuity are needed.

    Args:
        fun: called with one point ``[D]`` in float64 and returns one number: a numpy array, or a tensor on x0's device
            where x0 is a tensor. NaN or an infinite value marks a failure and ranks last.
        x0: ``[D]``, the start.
        sigma0: the initial standard deviation, one number or ``[D]``; about a quarter of the region of interest.
        method: "auto" or "snes"; the result says what "auto" chose.
        maxfevals: never evaluate more points than this.
        ftarget: stop when a value is as low as this.
        popsize: points per generation.
        seed: an integer or a ``torch.Generator``; None: torch's global generator.
        callback: called with the strategy after each generation (see ``Strategy``); a true return value stops.
        vectorized: call fun with all points ``[N, D]`` of a generation; it returns ``[N]``.
        options: further options of the strategy, such as maxiter, tolx and tolfun; an unknown one is refused.

    Raises:
        ScorefnError: an unknown method or option, or an argument that makes no sense; fun returned no number. An error
            inside fun is raised as it is, with the point as a note.

    Example:
        >>> result = minimize(lambda x: abs(x - [1.0, 2.0]).sum(), [0.0, 0.0], sigma0=0.5, seed=0)
        >>> result.x.round(6)
        array([1., 2.])
        >>> result.method, result.success
        ('snes', True)
    """
    if method not in ("auto", *_METHODS):
        raise ScorefnError(f"There is no method {method!r}: it is one of {', '.join(('auto', *_METHODS))}.")
    method = _CHOICE if method == "auto" else method
    strategy = _METHODS[method](x0, sigma0, popsize=popsize, seed=seed, ftarget=ftarget, **options)
    if maxfevals is not None and not maxfevals > strategy.popsize:
        raise ScorefnError(
            f"maxfevals={maxfevals} must pay for one generation of {strategy.popsize} points and for the point that is "
            "recommended at the end: raise it, or lower popsize."
        )
    native = _as_tensor if isinstance(x0, Tensor) else _as_array
    evaluate = _evaluate_all if vectorized else _evaluate_each

    stop: dict[str, float] = {}
    while not stop:
        x = strategy.ask()
        strategy.tell(x, evaluate(fun, x, native))
        stop = strategy.stop
        if maxfevals is not None and strategy.result.evaluations + strategy.popsize + 1 > maxfevals:
            stop["maxfevals"] = maxfevals
        if callback is not None and callback(strategy):
            stop["callback"] = 1

    final = strategy.result
    x, best_x = final.mean, final.mean if final.best_x is None else final.best_x
    value = float(as_values(evaluate(fun, x.unsqueeze(0), native), 1, x.device))
    missed = ftarget is not None and final.best_f <= ftarget < value
    if final.best_x is not None and (missed or not math.isfinite(value)):
        x, value = best_x, final.best_f
    return SearchResult(
        x=native(x),
        fun=value,
        best_x=native(best_x),
        best_fun=final.best_f,
        nfev=final.evaluations + 1,
        nit=final.iterations,
        success=value <= ftarget if ftarget is not None else bool(CONVERGED & set(stop)),
        message="; ".join(f"{name}: {MESSAGES[name]}" for name in stop),
        method=method,
        stop=stop,
        sigma=native(final.sigma),
        failed=final.failed,
    )


def _as_tensor(x: Tensor) -> Point:
    return x


def _as_array(x: Tensor) -> Point:
    array: NDArray[Any] = x.numpy()
    return array


def _evaluate_each(fun: Callable[[Any], Any], x: Tensor, native: Callable[[Tensor], Point]) -> Numbers:
    """Values ``[N]`` of the points ``[N, D]``, one call each; fun gets copies."""
    values = []
    for index, point in enumerate(x):
        note = f"scorefn called fun with point {index} of {len(x)}: {point.tolist()}."
        value = _noted(fun, native(point.clone()), note)
        if shape := tuple(getattr(value, "shape", ())):
            raise ShapeError(
                f"fun must return one number for one point, but it returned shape {shape}. Reduce it, for instance "
                "with .sum(), or pass vectorized=True where fun takes all points [N, D] at once."
            )
        try:
            values.append(float(value))
        except (TypeError, ValueError, RuntimeError) as error:
            raise ScorefnError(
                f"fun must return a real number, but it returned {type(value).__name__}: a value that has no order "
                "cannot be minimised. Return float('nan') where an evaluation failed."
            ) from error
    return values


def _evaluate_all(fun: Callable[[Any], Any], x: Tensor, native: Callable[[Tensor], Point]) -> Numbers:
    """Values ``[N]`` of the points ``[N, D]`` in one call; fun gets a copy."""
    values: Numbers = _noted(fun, native(x.clone()), f"scorefn called fun with points of shape {tuple(x.shape)}.")
    return values


def _noted(fun: Callable[[Any], Any], argument: Point, note: str) -> Any:
    try:
        return fun(argument)
    except Exception as error:
        error.add_note(note)
        raise

"""Minimise a black box in one call."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Generator
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from scorefn.core import ScorefnError, check_count
from scorefn.search.bound_forms import BoundsLike, as_bounds
from scorefn.search.coordinates import CoordinateSearch
from scorefn.search.csanes import CSANES
from scorefn.search.evaluation import as_array, as_it_is, evaluating
from scorefn.search.generators import own_generator
from scorefn.search.line import Report
from scorefn.search.openai_es import OpenAIES
from scorefn.search.pgpe import PGPE
from scorefn.search.points import Numbers, as_integer, as_sigma, as_start
from scorefn.search.rank_one import RankOneCSANES
from scorefn.search.restarts import Arm, Portfolio, Restarts
from scorefn.search.run import Loop, SearchResult
from scorefn.search.separable import SeparableCSANES
from scorefn.search.snes import SNES
from scorefn.search.stopping import Limits
from scorefn.search.strategy import Strategy
from scorefn.search.xnes import XNES

_METHODS: dict[str, Callable[..., Strategy]] = {
    kind.method: kind for kind in (CSANES, RankOneCSANES, SeparableCSANES, SNES, XNES, PGPE, OpenAIES, CoordinateSearch)
}
_LOW_RANK = 40  # coordinates
_FULL = 300
_RANK_ONE = 10_000
_LIMITS = frozenset(entry.name for entry in fields(Limits))


def minimize(
    fun: Callable[[Any], Any],
    x0: Numbers | Callable[[], Numbers],
    sigma0: float | Numbers,
    *,
    method: str | Callable[..., Strategy] = "auto",
    bounds: BoundsLike = None,
    maxfevals: int | None = None,
    maxiter: float | None = None,
    timeout: float | None = None,
    ftarget: float | None = None,
    tolx: float | None = None,
    tolfun: float | None = None,
    tolfunhist: float | None = None,
    tolstagnation: float | None = None,
    popsize: int | None = None,
    restarts: int | Restarts | None = None,
    seed: int | torch.Generator | None = None,
    vectorized: bool = False,
    callback: Callable[[Strategy], object] | None = None,
    maximize: bool = False,
    progress: Report = False,
    executor: Any = None,
    **options: Any,
) -> SearchResult:
    """Minimise fun from x0 with steps of about sigma0 at first; neither derivatives nor continuity are needed.

    Sources: with "auto" those of ``CSANES``, ``RankOneCSANES`` and ``SeparableCSANES``; ``sf.cite(result)`` names those
    of the one that was used.

    Args:
        fun: called with one point ``[D]`` in float64 and returns one number: a numpy array, or a tensor on x0's device
            where x0 is a tensor. NaN or an infinite value marks a failure and ranks last, also with maximize.
        x0: ``[D]``, the start; or a function without arguments that returns one, called anew for each run.
        sigma0: the initial standard deviation, one number or ``[D]``; about a quarter of the region of interest. What
            is wider than ``SmoothBounds`` can use is narrowed to that.
        method: "auto" (the result says what it chose and why, by the rule of ``chosen``), "csanes", "rank_one",
            "separable", "snes", "xnes", "pgpe", "openai_es", "coordinates", or a ``Strategy`` class, also a
            ``functools.partial`` of one, whose seed, popsize and maxiter count where those of this call are None.
        bounds: where points may lie: ``(lower, upper)``, each one number or ``[D]``, None or infinite where open; or
            ``(low, high)`` for each coordinate, which two rows of two numbers always are; or ``scipy.optimize.Bounds``.
            These are ``SmoothBounds``; pass ``PenalizedBounds`` or ``ResampledBounds`` for the other ways. All points
            of the result are evaluated ones.
        maxfevals: never evaluate more points than this.
        maxiter: generations, over all runs; None: ``100 + 150 (D + 3)^2 / sqrt(N)`` in each run.
        timeout: seconds on the clock after which no further generation begins.
        ftarget: stop when a value is as low as this (with maximize: as high).
        tolx: a run ends when all standard deviations are below it; None: the strategy's default, as in the following.
        tolfun: a run ends when recent values span less; see ``SNES``.
        tolfunhist: a run ends when the best ones of the recent generations span less.
        tolstagnation: a run ends when there was no progress over about so many generations; 0: never.
        popsize: points per generation, in the first run.
        restarts: how many runs may follow the first, by ``Portfolio``, or a policy, such as ``IPOP(5)``. Each starts
            with a fresh state, by a seed from the generator of the call, at a fresh point: the next one of x0 where
            that is a function, otherwise uniform in the bounds or within ``2 sigma0`` of x0. None: as many as the
            budget pays for where there are an ftarget and one of maxfevals and timeout, and none otherwise: without a
            target, one converged run is an answer.
        seed: an integer or a ``torch.Generator``; None: torch's global generator.
        vectorized: call fun with all points ``[N, D]`` of a generation; it returns ``[N]``.
        callback: called with the strategy after each generation (see ``Strategy``); a true return value stops. With
            maximize the strategy sees ``-fun``, with bounds the points before they are mapped into the box.
        maximize: maximise fun; ftarget, history and all values of the result have the sign of fun.
        progress: True: one line on stderr that is written over; a callable: gets that line now and then.
        executor: who evaluates: an executor of ``concurrent.futures``, loky, Ray (``sf.scale.RayExecutor``), Dask or
            mpi4py, or a function that makes one; ``sf.scale.Workers`` says how long to wait for an evaluation, how
            often to try again, and more. The search is the serial one to the bit; vectorized, fun gets batches
            ``[n, D]``. The result's ``workers`` says what each generation cost. None: evaluated here.
        options: further options of the strategy, such as tolfacupx; an unknown one is refused. Restarts by another
            method (as in ``Portfolio``) get the limits among them.

    Raises:
        ScorefnError: an unknown method or option, or an argument that makes no sense; x0 outside the bounds; fun
            returned no number. An error inside fun is raised as it is, with the point as a note.
        ShapeError: x0, sigma0, bounds or the values of fun have a shape that does not fit.
        NonFiniteError: x0 is not finite; ``tolfailed`` generations in a row had no finite value, and none before.

    Example:
        >>> from scorefn.search import minimize
        >>> result = minimize(lambda x: abs(x - [1.0, 2.0]).sum(), [0.0, 0.0], sigma0=0.5, seed=0)
        >>> result.x.round(6)
        array([1., 2.])
        >>> result.method, result.success
        ('csanes', True)
    """
    first = x0() if callable(x0) else x0
    start = as_start(first)
    sigma = as_sigma(sigma0, start)
    box = as_bounds(bounds, start)
    policy = _policy(restarts, ftarget is not None and (maxfevals is not None or timeout is not None))
    choice = ""
    if method == "auto":
        method, choice = chosen(len(start), maxfevals)
    given = {"tolx": tolx, "tolfun": tolfun, "tolfunhist": tolfunhist, "tolstagnation": tolstagnation}
    if isinstance(method, functools.partial):
        held = method.keywords
        seed = held.get("seed") if seed is None else seed
        popsize = held.get("popsize") if popsize is None else popsize
        maxiter = held.get("maxiter") if maxiter is None else maxiter
    options |= {name: value for name, value in given.items() if value is not None} | {"maxiter": maxiter}

    def made(kind: str | Callable[..., Strategy], center: Tensor, factor: float, **own: Any) -> Strategy:
        shared = {name: value for name, value in options.items() if kind == method or name in _LIMITS}
        strategy = _maker(kind)(box.start(center), box.narrowed(sigma) * factor, **own, **shared)
        if not isinstance(strategy, Strategy):
            raise ScorefnError(f"method must make a strategy, but it made {type(strategy).__name__}: return one.")
        return strategy

    with evaluating(fun, as_it_is if isinstance(first, Tensor) else as_array, vectorized, executor) as evaluate:
        loop = Loop(
            evaluate,
            maximize=maximize,
            ftarget=ftarget,
            maxfevals=maxfevals,
            maxiter=maxiter,
            timeout=timeout,
            callback=callback,
            progress=progress,
        )
        if (size := as_integer(popsize)) is not None:
            loop.affords(size)  # before it takes memory
        strategy = made(method, start, 1.0, popsize=popsize, seed=seed)
        name = strategy.method
        cpu = torch.device("cpu")
        generator = own_generator(own_generator(seed, cpu), cpu)  # not the stream of the first strategy
        arms = policy.runs(strategy.popsize, lambda: float(torch.rand((), dtype=torch.float64, generator=generator)))
        arm = next(arms)
        while True:
            spent = loop.follow(strategy, box, arm.budget)
            if loop.ended:
                break
            following = _sent(arms, spent)
            if following is None or not loop.affords(following.popsize):
                break
            arm = following
            fresh = as_start(x0()) if callable(x0) else box.fresh(start, sigma, generator)
            kind = method if arm.method is None else arm.method
            strategy = made(kind, fresh, arm.sigma_factor, popsize=arm.popsize, seed=generator)
        return loop.result(name, choice)


def _sent(arms: Generator[Arm, int, None], spent: int) -> Arm | None:
    try:
        return arms.send(spent)
    except StopIteration:
        return None


def chosen(dimension: int, maxfevals: float | None = None) -> tuple[str, str]:
    """The method that "auto" stands for, and why.

    A full covariance ("csanes") up to 300 coordinates: above, its ``D (D + 1)/2`` numbers take too many evaluations to
    learn and too much time. A diagonal and one direction ("rank_one") up to 10,000, independent coordinates
    ("separable") above. Where a budget is too small to learn a full covariance, below ``8 D^2`` evaluations from 40
    coordinates on: "rank_one", and "separable" below ``150 D``; with fewer coordinates "separable" below ``2 D^2``.

    Args:
        dimension: D.
        maxfevals: the budget, where there is one.

    Raises:
        ScorefnError: dimension is no integer of at least 1, or maxfevals is no number of at least 1.

    Example:
        >>> from scorefn.search import chosen
        >>> chosen(10)
        ('csanes', '10 coordinates are few enough for a full covariance')
    """
    check_count("dimension", dimension)
    Limits(maxfevals=maxfevals)
    if dimension > _RANK_ONE:
        return "separable", f"{dimension} coordinates are too many for all but themselves (more than {_RANK_ONE})"
    if dimension > _FULL:
        return "rank_one", f"{dimension} coordinates are too many for a full covariance (more than {_FULL})"
    if maxfevals is not None and maxfevals < (few := 8 if dimension >= _LOW_RANK else 2) * dimension**2:
        method = "separable" if dimension < _LOW_RANK or maxfevals < 150 * dimension else "rank_one"
        return method, f"{maxfevals} evaluations are too few to learn a full covariance (below {few} D^2)"
    return "csanes", f"{dimension} coordinates are few enough for a full covariance"


def _maker(method: str | Callable[..., Strategy]) -> Callable[..., Strategy]:
    kind = method.func if isinstance(method, functools.partial) else method
    if isinstance(kind, type):
        fits = issubclass(kind, Strategy) and list(inspect.signature(kind).parameters)[:2] == ["x0", "sigma0"]
    else:
        fits = isinstance(method, str) or callable(method)
    if not fits:
        raise ScorefnError(
            f"method must be a name or make a strategy of x0 and sigma0, but it is {method!r}. Search other spaces "
            "than that of real vectors by run(strategy, fun)."
        )
    if not isinstance(method, str):
        return method
    if method not in _METHODS:
        raise ScorefnError(f"There is no method {method!r}: it is one of {', '.join(('auto', *_METHODS))}.")
    return _METHODS[method]


def _policy(restarts: int | Restarts | None, wanted: bool) -> Restarts:
    if isinstance(restarts, Restarts):
        return restarts
    if restarts is None:
        return Portfolio() if wanted else Portfolio(0)
    return Portfolio(restarts)

"""The one loop: ask, evaluate, tell, until something ends the search; and what it reports."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from scorefn.core import NonFiniteError, ScorefnError
from scorefn.core.representation import representation
from scorefn.scale import WorkRecord
from scorefn.search.bounds import Bounds, Everywhere, Located
from scorefn.search.evaluation import Evaluates, Point, as_it_is, check_switch, evaluating, over
from scorefn.search.line import Line, Report
from scorefn.search.points import WIDEST, is_number
from scorefn.search.stopping import CONVERGED, MESSAGES, Limits
from scorefn.search.strategy import Diverged

_SPENT = ("maxfevals", "maxiter", "timeout")


class Searchable(Located, Protocol):
    """What the loop needs of a strategy; every ``Strategy`` is one."""

    @property
    def stop(self) -> dict[str, float]:
        """What ends the search; empty while it should go on."""

    @property
    def result(self) -> Any:
        """With ``mean``, the point to recommend, and ``sigma``, ``best_x`` and ``best_f``."""

    def tell(self, x: Any, f: Any) -> None:
        """Learn from the points and their values ``[N]``."""


@dataclass(frozen=True, eq=False)
class History:
    """The past of a search, one entry per generation (G of them), over all of its runs.

    Args:
        nfev: ``[G]``, evaluations so far.
        best: ``[G]``, the best value of the generation; NaN where no value was finite.
        median: ``[G]``, the median of its finite values, the better one of two.
        sigma: ``[G]``, the largest standard deviation after it; NaN where a strategy has none, or several parts.
        run: ``[G]``, which run it belongs to: 0, and one more with each restart.

    Example:
        >>> from scorefn.search import minimize
        >>> past = minimize(lambda x: (x**2).sum(), [1.0, 2.0], 0.5, seed=0, ftarget=1e-6).history
        >>> len(past) == len(past.best), past.nfev[:3]  # 12 points a generation
        (True, array([12, 24, 36]))
        >>> bool(past.best[-1] <= 1e-6 < past.best[0]), set(past.run.tolist())
        (True, {0})
    """

    nfev: NDArray[np.int64]
    best: NDArray[np.float64]
    median: NDArray[np.float64]
    sigma: NDArray[np.float64]
    run: NDArray[np.int64]

    __repr__ = representation

    def __len__(self) -> int:
        return len(self.nfev)


@dataclass(frozen=True, eq=False)
class SearchResult:
    """What ``minimize`` or ``run`` found; scipy's names where they fit. Values have the sign of fun.

    ``sf.cite`` of it names the sources of its method.

    Args:
        x: ``[D]``, the recommended point: the mean of the search distribution (with bounds: its image in the box),
            evaluated once at the end; of several runs that of the best mean. It is ``best_x`` instead where no mean has
            a finite value, or the mean misses an ``ftarget`` that best_x reached.
        fun: the value at x.
        best_x: ``[D]``, the point of the best value among those that were told (x, evaluated at the end, may be
            better); under noise merely the luckiest.
        best_fun: the best value.
        nfev: how many points were evaluated, the means included.
        nit: how many generations were told.
        success: ftarget was reached; without one, the run that x is from converged (tolx, tolfun or
            tolfunhist).
        status: 0: success; 1: maxfevals, maxiter or timeout ended it; 2: the callback did; 3: it ended for another
            reason, which message says.
        message: why it ended, in words.
        method: the strategy that was used, also where "auto" chose it.
        choice: why "auto" chose it; empty where it was named.
        stop: what ended it (the last run, where there were several), with the thresholds.
        mean: ``[D]``, the mean of the run that x is from; with bounds its image in the box.
        sigma: ``[D]``, the standard deviations at the end of that run.
        failed: how many values were not finite, those of means included.
        restarts: how many runs followed the first one.
        history: the past, generation by generation.
        workers: what each generation cost the workers of an executor; empty without one.

    Example:
        >>> from scorefn.search import minimize
        >>> result = minimize(lambda x: (x**2).sum(), [1.0, 2.0], 0.5, seed=0, ftarget=1e-6)
        >>> result.success, result.method, result.message
        (True, 'csanes', 'ftarget: a value reached ftarget')
        >>> # the mean is evaluated, too
        >>> bool(result.fun <= 1e-6), result.nfev == 12 * result.nit + 1
        (True, True)
    """

    x: Point
    fun: float
    best_x: Point
    best_fun: float
    nfev: int
    nit: int
    success: bool
    status: int
    message: str
    method: str
    choice: str
    stop: dict[str, float]
    mean: Point
    sigma: Point
    failed: int
    restarts: int
    history: History
    workers: tuple[WorkRecord, ...] = ()

    __repr__ = representation


def run(
    strategy: Searchable,
    fun: Callable[[Any], Any],
    *,
    maxfevals: int | None = None,
    timeout: float | None = None,
    callback: Callable[[Any], object] | None = None,
    vectorized: bool = False,
    maximize: bool = False,
    progress: Report = False,
    executor: Any = None,
) -> SearchResult:
    """Search with a strategy until it stops: the loop of ``minimize`` for any strategy, discrete and mixed ones too.

    An error inside fun is raised as it is; what the strategy has learnt is then that of the last whole generation, and
    only its generator has moved on: call run again to go on. Budgets (maxfevals, timeout) and counts (nfev, nit,
    failed, history) are those of this call, also after a resume; the strategy's own ``result`` and limits go on
    counting. There are no restarts, as the strategy is made already: loop over seeds, with a new strategy for each.

    Args:
        strategy: has ``ask``, ``tell``, ``stop`` and ``result``, as every ``Strategy`` does.
        fun: called with one point as ``ask`` draws them (a tensor, or a tuple or dictionary of tensors), returns one
            number; NaN or an infinite value marks a failure and ranks last.
        maxfevals: never evaluate more points than this in this call; the point that is recommended at the end is one of
            them.
        timeout: seconds on the clock after which no further generation begins.
        callback: called with the strategy after each generation; a true return value stops.
        vectorized: call fun with all points of a generation, the first axis N; it returns ``[N]``.
        maximize: fun is maximised. The strategy is told ``-fun``, and its limits and account are about that; the
            result has the sign of fun.
        progress: see ``minimize``.
        executor: see ``minimize``.

    Raises:
        ScorefnError: an argument that makes no sense; fun returned no number, or cannot be sent to workers.
        ShapeError: fun returned another number of values.
        NonFiniteError: ``tolfailed`` generations in a row had no finite value, and no generation before had one.

    Example:
        >>> from scorefn.search import XNES, run
        >>> result = run(XNES([1.0, 2.0], 0.5, seed=0), lambda x: x.square().sum())
        >>> result.success, sorted(result.stop)
        (True, ['tolfun'])
    """
    if isinstance(strategy, type) or not all(hasattr(strategy, name) for name in ("ask", "tell", "stop", "result")):
        raise ScorefnError(
            f"strategy must have ask, tell, stop and result, but {strategy!r} is no such object: make one, for "
            "instance CSANES(x0, sigma0); minimize makes one itself."
        )
    with evaluating(fun, as_it_is, vectorized, executor) as evaluate:
        loop = Loop(
            evaluate,
            maximize=maximize,
            maxfevals=maxfevals,
            timeout=timeout,
            callback=callback,
            progress=progress,
        )
        return loop.all_of(strategy)


class _End(NamedTuple):
    """How a run ended: the value of its mean (infinite where it has none), the mean, sigma, and what ended it."""

    value: float
    mean: Any
    sigma: Any
    stop: dict[str, float]


class Loop:
    """Follows one strategy, or one after the other, and keeps the account of all.

    Inside, values are minimised: with maximize they are those of ``-fun``.

    Args:
        evaluate: values of points.
        maximize: fun is maximised.
        ftarget: in the sign of fun; None: none but the strategy's own.
        maxfevals: of all runs together, like the following.
        maxiter: generations.
        timeout: seconds.
        callback: called with the strategy after each generation.
        progress: where the line goes.
    """

    def __init__(
        self,
        evaluate: Evaluates,
        *,
        maximize: bool = False,
        ftarget: float | None = None,
        maxfevals: int | None = None,
        maxiter: float | None = None,
        timeout: float | None = None,
        callback: Callable[[Any], object] | None = None,
        progress: Report = False,
    ) -> None:
        Limits(ftarget=ftarget, maxfevals=maxfevals, maxiter=maxiter)
        check_switch("maximize", maximize)
        if timeout is not None and (not is_number(timeout) or not timeout > 0):
            raise ScorefnError(f"timeout must be a positive number of seconds, but it is {timeout!r}.")
        if callback is not None and not callable(callback):
            raise ScorefnError(f"callback must be a function of the strategy, or None, but it is {callback!r}.")
        if not isinstance(progress, bool) and not callable(progress):
            raise ScorefnError(f"progress must be True, False or a function of a line of text, but it is {progress!r}.")
        self.best_x: Any = None
        self.best_f = math.inf
        self.nfev = 0
        self.nit = 0
        self.failed = 0
        self.stop: dict[str, float] = {}
        self._evaluate = evaluate
        self._sign = -1.0 if maximize else 1.0
        self._ftarget = ftarget
        self._maxfevals = maxfevals
        self._maxiter = maxiter
        self._timeout = timeout
        self._callback = callback
        self._line = Line(progress)
        self._begin = time.monotonic()
        self._rows: list[tuple[int, float, float, float, int]] = []
        self._ends: list[_End] = []

    @property
    def ended(self) -> bool:
        """Whether no further run may begin."""
        reached = self._ftarget is not None and min([self.best_f, *(end.value for end in self._ends)]) <= self._target
        spent = self._maxiter is not None and self.nit >= self._maxiter
        return reached or spent or bool({"ftarget", "maxfevals", "timeout", "callback"} & set(self.stop))

    def affords(self, popsize: int) -> bool:
        """Whether maxfevals pays for a generation of this size and for the mean at the end; if not, it is the end."""
        if self._maxfevals is None or self.nfev + popsize + 1 <= self._maxfevals:
            return True
        if not self.nit:
            raise ScorefnError(
                f"maxfevals={self._maxfevals} must pay for one generation of {popsize} points and for the point that "
                "is recommended at the end: raise it, or lower popsize."
            )
        self.stop["maxfevals"] = self._maxfevals
        return False

    def follow(self, strategy: Searchable, bounds: Bounds, allowed: float = math.inf) -> int:
        """One run, its mean evaluated at the end; how many evaluations it spent, of about ``allowed``."""
        number, before = len(self._ends), self.nfev
        self.stop = strategy.stop
        popsize = getattr(strategy, "popsize", 0)
        self.affords(popsize)
        try:
            while not self.stop:
                popsize = self._generation(strategy, bounds, number)
                if self.nfev - before + popsize > allowed:
                    self.stop["armfevals"] = allowed
                if self._callback is not None and self._callback(strategy):
                    self.stop["callback"] = 1
        finally:
            self._line.end()
        final = strategy.result
        mean = bounds.inside(final.mean)
        value = self._sign * self._evaluate.single(mean)
        self.nfev += 1
        self.failed += not math.isfinite(value)
        self._ends.append(_End(value if math.isfinite(value) else math.inf, mean, final.sigma, self.stop))
        return self.nfev - before

    def all_of(self, strategy: Searchable) -> SearchResult:
        """What a strategy finds that may have a past already."""
        before = strategy.result
        self.best_x, self.best_f = before.best_x, before.best_f
        self.follow(strategy, Everywhere())
        return self.result(getattr(strategy, "method", type(strategy).__name__))

    def result(self, method: str, choice: str = "") -> SearchResult:
        """What was found."""
        value, mean, sigma, stop = min(self._ends, key=lambda end: end.value)
        x, best_x = mean, mean if self.best_x is None else self.best_x
        target = self._target if self._ftarget is not None else self.stop.get("ftarget", -math.inf)
        if self.best_x is not None and (not math.isfinite(value) or self.best_f <= target < value):
            x, value = best_x, self.best_f
        success = value <= target if self._ftarget is not None else bool(CONVERGED & set(stop))
        status = 0 if success else 2 if "callback" in self.stop else 1 if set(_SPENT) & set(self.stop) else 3
        nfev, best, median, widest, number = zip(*self._rows, strict=True) if self._rows else ((), (), (), (), ())
        native = self._evaluate.native
        return SearchResult(
            x=over(x, native),
            fun=self._sign * value if self._ends and math.isfinite(value) else math.nan,
            best_x=over(best_x, native),
            best_fun=self._sign * self.best_f,
            nfev=self.nfev,
            nit=self.nit,
            success=success,
            status=status,
            message="; ".join(f"{name}: {MESSAGES.get(name, 'a limit of the strategy')}" for name in self.stop),
            method=method,
            choice=choice,
            stop=dict(self.stop),
            mean=over(mean, native),
            sigma=over(sigma, native),
            failed=self.failed,
            restarts=len(self._ends) - 1,
            history=History(
                np.array(nfev, dtype=np.int64),
                np.array(best, dtype=np.float64),
                np.array(median, dtype=np.float64),
                np.array(widest, dtype=np.float64),
                np.array(number, dtype=np.int64),
            ),
            workers=tuple(self._evaluate.records),
        )

    @property
    def _target(self) -> float:
        return -math.inf if self._ftarget is None else self._sign * self._ftarget

    def _generation(self, strategy: Searchable, bounds: Bounds, number: int) -> int:
        """One generation; how many points the next one has."""
        x, points = bounds.asked(strategy)
        values = self._sign * self._evaluate(points)
        plain = values.tolist()
        finite = sorted(value for value in plain if math.isfinite(value))
        told = bounds.told(strategy, x, values)
        try:
            strategy.tell(x, told)
            self.stop = strategy.stop
        except Diverged:
            self.stop = {"overflow": WIDEST}
        except NonFiniteError:
            if finite or not math.isfinite(self.best_f):
                raise
            self.stop = {"tolfailed": self._barren(number) + 1}
        self.nfev += len(plain)
        self.nit += 1
        self.failed += len(plain) - len(finite)
        lowest, median = (finite[0], finite[(len(finite) - 1) // 2]) if finite else (math.nan, math.nan)
        if lowest < self.best_f:
            first = plain.index(lowest)
            self.best_f, self.best_x = lowest, over(points, lambda part: part[first].clone())
        sigma = getattr(strategy, "sigma", None)
        widest = float(sigma.amax()) if isinstance(sigma, Tensor) and sigma.numel() else math.nan
        self._rows.append((self.nfev, self._sign * lowest, self._sign * median, widest, number))
        following = getattr(strategy, "popsize", len(plain))  # some strategies change it
        self._limit(following)
        self._line.show(
            self._rows[-1], self._sign * self.best_f, time.monotonic() - self._begin, self._evaluate.records
        )
        return following

    def _barren(self, number: int) -> int:
        """How many generations of this run, the last ones, had no finite value."""
        return next((k for k, row in enumerate(reversed(self._rows)) if not math.isnan(row[1]) or row[4] != number), 0)

    def _limit(self, popsize: int) -> None:
        """Add to ``stop`` what the account of all runs ends."""
        if self._ftarget is not None and self.best_f <= self._target:
            self.stop = {"ftarget": self._ftarget, **self.stop}
        self.affords(popsize)
        if self._maxiter is not None and self.nit >= self._maxiter:
            self.stop["maxiter"] = self._maxiter
        if self._timeout is not None and time.monotonic() - self._begin >= self._timeout:
            self.stop["timeout"] = self._timeout

"""A search without generations: points are told as they come in, and no worker waits for another one."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from scorefn.core import ScorefnError
from scorefn.scale import WorkRecord
from scorefn.scale.crew import Spent
from scorefn.scale.dispatch import Dispatch
from scorefn.scale.executors import Workers, now
from scorefn.search.evaluation import Evaluator, Point
from scorefn.search.line import Report
from scorefn.search.run import Loop, SearchResult
from scorefn.search.strategy import Strategy


def run_asynchronously(
    strategy: Strategy,
    fun: Callable[[Any], Any],
    executor: Any,
    *,
    maxfevals: int | None = None,
    timeout: float | None = None,
    callback: Callable[[Any], object] | None = None,
    maximize: bool = False,
    progress: Report = False,
) -> SearchResult:
    """Search with workers that never wait: a generation is told as soon as any N points have come in.

    Each worker evaluates one point at a time and gets the next one at once; points are drawn from the distribution as
    it is then. A generation thus mixes points of the present distribution with late ones of former ones, which the
    strategy takes as foreign points: measured by where they lie now, and those farther than any draw pulled back.
    Worth it where evaluations take very different times; a search may then need more of them. **Which points are told
    together depends on the clock: unlike run, no two runs are equal to the bit, whatever the seed.**

    Args:
        strategy: a ``Strategy`` whose generations are ``[N, D]`` with the same N always: not ``CoordinateSearch``,
            ``ProductSearch`` or ``DistributionSearch``.
        fun: called with one point ``[D]`` on a worker, a tensor; returns one number.
        executor: see ``minimize``; of ``Workers``, batch and drop_slowest must be as they are by default.
        maxfevals: never evaluate more points than this, those that are under way at the end included.
        timeout: seconds on the clock after which no further generation is told.
        callback: called with the strategy after each generation; a true return value stops.
        maximize: fun is maximised.
        progress: see ``minimize``.

    Returns:
        As ``run`` does; ``nfev`` counts the points that were told, not those that were under way at the end.

    Raises:
        ScorefnError: as ``run``; a strategy of another kind; workers with batch or drop_slowest, which mean
            nothing here.
        NonFiniteError: see ``run``.

    Example:
        >>> from concurrent.futures import ThreadPoolExecutor
        >>> from scorefn.search import SNES, run_asynchronously
        >>> strategy = SNES([1.0, 2.0], sigma0=0.5, seed=0, ftarget=1e-2)
        >>> with ThreadPoolExecutor(2) as executor:
        ...     result = run_asynchronously(strategy, lambda x: x.square().sum(), executor)
        >>> result.success
        True
    """
    if not isinstance(strategy, Strategy) or not strategy.fits_products:
        raise ScorefnError(
            f"strategy must be a Strategy that asks for [N, D], N always the same, but it is {strategy!r}: points come "
            "in any order and late. Give for instance CSANES(x0, sigma0), or use run, which tells whole generations."
        )
    workers = Workers.of(executor)
    if workers.batch is not None or workers.drop_slowest:
        raise ScorefnError(
            f"batch={workers.batch} and drop_slowest={workers.drop_slowest} mean nothing where points come one by one "
            "and none is waited for: leave them out, or use run."
        )
    with Evaluator(fun, workers) as evaluator:
        arrivals = _Arrivals(strategy, evaluator.dispatch, None if maxfevals is None else maxfevals - 1)
        loop = Loop(
            _Known(arrivals, evaluator),
            maximize=maximize,
            maxfevals=maxfevals,
            timeout=timeout,
            callback=(lambda _: callback(strategy)) if callable(callback) else callback,
            progress=progress,
        )
        return loop.all_of(arrivals)


class _Arrivals:
    """A strategy whose ``ask`` returns points that were evaluated already, any N that have come in."""

    def __init__(self, strategy: Strategy, dispatch: Dispatch, most: int | None) -> None:
        self._strategy = strategy
        self._dispatch = dispatch
        self._most = most
        self._sent = 0
        self._drawn: deque[Any] = deque()
        self._under_way: dict[int, Any] = {}
        self._come: deque[tuple[Any, float]] = deque()
        self._before = Spent()
        self._begin = now()
        self.values = torch.empty(0, dtype=torch.float64)
        self.method = strategy.method

    popsize = property(lambda self: self._strategy.popsize)
    mean = property(lambda self: self._strategy.mean)
    sigma = property(lambda self: self._strategy.sigma)
    stop = property(lambda self: self._strategy.stop)
    result = property(lambda self: self._strategy.result)

    def ask(self) -> Any:
        """The next N points whose values are known."""
        num, crew = self._strategy.popsize, self._dispatch.crew
        while len(self._come) < num:
            while crew.load < crew.staff.size and self._sent != self._most:
                self._send()
            self._come.extend((self._under_way.pop(ticket), value) for ticket, value in crew.settled())
        group = [self._come.popleft() for _ in range(num)]
        self.values = torch.tensor([value for _, value in group], dtype=torch.float64)
        spent, moment = crew.spent.since(self._before), now()
        self._dispatch.report_failures(everything=spent.failed >= num)
        self._dispatch.keep(num, moment - self._begin, spent)
        self._before, self._begin = crew.spent, moment
        return torch.cat([point for point, _ in group])

    def tell(self, x: Any, f: Tensor) -> None:
        """Tell the strategy, and draw anew: what was drawn before and not sent is out of date."""
        self._strategy.tell(x, f)
        self._drawn.clear()

    def end(self) -> None:
        """Let go of what is under way."""
        self._dispatch.crew.leave()
        self._under_way.clear()
        self._come.clear()

    def _send(self) -> None:
        if not self._drawn:
            points = self._strategy.ask()
            self._drawn.extend(points[i : i + 1] for i in range(len(points)))
        point, ticket = self._drawn.popleft(), self._sent
        self._dispatch.crew.add(point, ticket, 1, ticket, ticket + 1)
        self._under_way[ticket] = point
        self._sent += 1


class _Known:
    """The values of what has arrived."""

    def __init__(self, arrivals: _Arrivals, evaluator: Evaluator) -> None:
        self._arrivals = arrivals
        self._evaluator = evaluator
        self.native: Callable[[Tensor], Point] = evaluator.native

    @property
    def records(self) -> Sequence[WorkRecord]:
        return self._evaluator.records

    def __call__(self, points: Any) -> Tensor:
        return self._arrivals.values

    def single(self, point: Any) -> float:
        self._arrivals.end()
        return self._evaluator.single(point)

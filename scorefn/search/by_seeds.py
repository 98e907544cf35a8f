"""A search in high dimension over workers: points are rebuilt there from seeds, and never sent."""

from __future__ import annotations

import copy
import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scorefn.core import ScorefnError
from scorefn.scale import WorkRecord
from scorefn.scale.checkpoint import feed
from scorefn.scale.executors import Workers
from scorefn.scale.seeds import PAST, ByIndividual, SeedDispatch, noise, seed_workers, with_points
from scorefn.search.evaluation import Evaluation, Point, as_it_is
from scorefn.search.line import Report
from scorefn.search.ranking import Ranking
from scorefn.search.rebuilt import Generation, Rebuildable, RebuiltSums
from scorefn.search.run import Loop, SearchResult
from scorefn.search.strategy import Strategy

_UNSENT = ("_progress", "_generator", "_before_ask", "_asked", "_places", "_limits", "_stop")


def run_by_seeds(
    strategy: Strategy,
    fun: Callable[[Any], Any],
    executor: Any = None,
    *,
    maxfevals: int | None = None,
    timeout: float | None = None,
    callback: Callable[[Any], object] | None = None,
    maximize: bool = False,
    progress: Report = False,
) -> SearchResult:
    """Search with points that workers rebuild from seeds: what is sent does not grow with the dimension.

    Noise is a function of the run, the generation and the individual (Philox, a counter-based generator). A worker
    keeps the search distribution and is told the ranks of the last generation, of which it makes the very update that
    is made here; then it rebuilds its points and returns their values. A worker that is new, has missed generations or
    comes to other bits (another processor, say) gets the whole distribution once; ``states_sent`` of the result's
    ``workers`` counts that. Serially (executor None) and for any number of workers the search is the same to the bit,
    and so is one that goes on from a saved state; it is another one than that of ``run``, whose noise comes from
    elsewhere and, up to 1000 coordinates, in orthogonal directions.

    Per individual about ``12 + W (2 + 630/N)`` bytes travel there and back, with W workers and up to 256 points (4 in
    place of 2 beyond): number and value, the ranks of two generations for each worker, and a share of the batch's head;
    29 bytes with 2 workers and N = 100. Here and on each worker the memory is that of one strategy and of a few points,
    O(D), not of N; the price is that each draws the noise of all N points for the update, up to three times where that
    is more than 64 MB. It pays where an evaluation takes longer than that, and where sending D numbers is slow.

    Source: Salimans, Ho, Chen, Sidor & Sutskever (2017), "Evolution strategies as a scalable alternative to
    reinforcement learning", algorithm 2.

    Args:
        strategy: ``SNES``, ``PGPE``, ``OpenAIES`` or ``SeparableCSANES``, on the CPU: normal distributions with
            independent coordinates. Optimisers that are given must be picklable: ``functools.partial``, no lambda.
        fun: called with one point ``[D]`` on a worker, a tensor in the dtype of the strategy (the mean in float64);
            returns one number.
        executor: see ``minimize``; None: all is done here. Of ``Workers``, batch None means one for each worker.
        maxfevals: never evaluate more points than this.
        timeout: seconds on the clock after which no further generation begins.
        callback: called with the strategy after each generation; a true return value stops.
        maximize: fun is maximised.
        progress: see ``minimize``.

    Raises:
        ScorefnError: as ``run``; a strategy of another kind or one that cannot be pickled; a worker whose numpy draws
            other noise.
        NonFiniteError: see ``run``.

    Example:
        >>> from concurrent.futures import ThreadPoolExecutor
        >>> from scorefn.search import SNES, run_by_seeds
        >>> def strategy():
        ...     return SNES([1.0, 2.0], 0.5, seed=0, ftarget=1e-2)
        >>> one = run_by_seeds(strategy(), lambda x: x.square().sum())
        >>> with ThreadPoolExecutor(2) as executor:
        ...     two = run_by_seeds(strategy(), lambda x: x.square().sum(), executor)
        >>> one.success, one.x.tolist() == two.x.tolist()
        (True, True)
    """
    if not isinstance(strategy, Strategy) or not isinstance(strategy, Rebuildable):
        raise ScorefnError(
            f"strategy must be SNES, PGPE, OpenAIES or SeparableCSANES, but it is {strategy!r}: others need all points "
            "of a generation at once, or draw them otherwise than from independent normal coordinates. Use run, which "
            "sends points."
        )
    if strategy.mean.device.type != "cpu":
        raise ScorefnError(
            f"The strategy is on {strategy.mean.device}, but points by seeds are rebuilt on the CPU: make it of an x0 "
            "there, and move points inside fun."
        )
    seeded = _Seeded(strategy)
    with _Evaluated(seeded, fun, executor) as evaluate:
        loop = Loop(
            evaluate,
            maximize=maximize,
            maxfevals=maxfevals,
            timeout=timeout,
            callback=(lambda _: callback(strategy)) if callable(callback) else callback,
            progress=progress,
        )
        return loop.all_of(seeded)


class SeededReplica:
    """A strategy that goes on from ranks alone; see ``scorefn.scale.seeds.Replica``.

    Args:
        strategy: what is followed.
        key: 16 bytes, of the run.
        generation: how many generations it has learnt from.
    """

    def __init__(self, strategy: Any, key: bytes, generation: int) -> None:
        self.strategy = strategy
        self.key = key
        self.generation = generation
        self._mark: tuple[int, bytes] | None = None

    def draw(self, individual: int) -> Tensor:
        """``[D]``, the noise of an individual of this generation."""
        return self._drawing()(individual)

    def sums(self) -> RebuiltSums:
        """Sums over the noise of this generation."""
        return RebuiltSums(self._drawing(), self.strategy.popsize, self.strategy.paired)

    def follow(self, ranks: NDArray[Any]) -> None:
        """Learn from ranks ``[N]``, equal where values are."""
        strategy, ranking = self.strategy, Ranking(torch.from_numpy(ranks.astype(np.float64)))
        with torch.no_grad(), one_thread_here():
            if strategy.learns_from_ties or not ranking.flat:
                strategy.adopt(strategy.learnt_by(self.sums(), ranking))
        self.generation += 1

    def mark(self) -> bytes:
        """A hash of the distribution, and of a little noise."""
        if self._mark is None or self._mark[0] != self.generation:
            found = hashlib.blake2b(digest_size=8)
            feed(found, self.strategy._state)
            feed(found, self._drawing(width=16)(0))
            self._mark = self.generation, found.digest()
        return self._mark[1]

    def points(self) -> Generation:
        """The points of this generation."""
        strategy = self.strategy
        return Generation(strategy.mean, strategy.sigma, self._drawing(), strategy.popsize, strategy.paired)

    def bare(self) -> SeededReplica:
        """The distribution and what it takes to update it, without account, limits and generator."""
        bare = copy.copy(self.strategy)
        for name in _UNSENT:
            bare.__dict__.pop(name, None)
        return SeededReplica(bare, self.key, self.generation)

    def _drawing(self, width: int | None = None) -> Callable[[int], Tensor]:
        strategy = self.strategy
        dimension = strategy.dimension if width is None else width
        return partial(noise, self.key, self.generation, dimension=dimension, dtype=strategy.noise_dtype)


class _Seeded:
    """A strategy as the loop sees it, whose points are rebuilt when they are looked at."""

    def __init__(self, strategy: Any) -> None:
        key = hashlib.blake2b(digest_size=16)
        feed(key, [strategy.random_state(), type(strategy).__name__, strategy.popsize, strategy.dimension])
        self.replica = SeededReplica(strategy, key.digest(), strategy.result.iterations)
        self.past: deque[NDArray[Any]] = deque(maxlen=PAST)
        self.method = strategy.method
        self._strategy = strategy

    popsize = property(lambda self: self._strategy.popsize)
    mean = property(lambda self: self._strategy.mean)
    sigma = property(lambda self: self._strategy.sigma)
    stop = property(lambda self: self._strategy.stop)
    result = property(lambda self: self._strategy.result)

    def ask(self) -> Generation:
        """The points of the generation."""
        return self.replica.points()

    def tell(self, x: Generation, f: Tensor) -> None:
        """Make the update that workers will make of the ranks."""
        replica = self.replica
        with torch.no_grad(), one_thread_here():
            self._strategy.learn(x, f, lambda ranking: self._strategy.learnt_by(replica.sums(), ranking))
        ranks = torch.unique(Ranking(f).values, return_inverse=True)[1].numpy()
        self.past.append(ranks.astype(np.min_scalar_type(len(ranks) - 1)))
        replica.generation += 1


class _Evaluated:
    """Values of the individuals of a generation, here or on workers."""

    def __init__(self, seeded: _Seeded, fun: Callable[[Any], Any], executor: Any) -> None:
        self._seeded = seeded
        self.native: Callable[[Tensor], Point] = as_it_is
        self._work = ByIndividual(Evaluation(fun, as_it_is, False))
        self._dispatch: SeedDispatch | None = None
        self._records: Sequence[WorkRecord] = ()
        if executor is not None:
            workers, self._records = seed_workers(Workers.of(executor), lambda: self._crew_of().states_sent)
            self._dispatch = SeedDispatch(self._work, workers, fun=fun)

    @property
    def records(self) -> Sequence[WorkRecord]:
        return self._records

    def __call__(self, points: Any, counted: bool = True, first: int = 0, num: int | None = None) -> Tensor:
        individuals = torch.arange(first, self._seeded.popsize if num is None else first + num, dtype=torch.int32)
        if self._dispatch is None:
            found: Tensor = with_points(points, self._work, individuals, 0, len(individuals))
            return found
        self._crew_of().follow(self._seeded.replica, self._seeded.past)
        return self._dispatch(individuals, counted)

    def single(self, point: Any) -> float:
        """The value of the mean, which is the only point that the loop asks about."""
        return float(self(self._seeded.ask(), counted=False, first=-1, num=1)[0])

    def __enter__(self) -> _Evaluated:
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        if self._dispatch is not None:
            self._dispatch.close(at_once=kind is not None)

    def _crew_of(self) -> Any:
        return None if self._dispatch is None else self._dispatch.crew


@contextmanager
def one_thread_here() -> Iterator[None]:
    """Torch on one thread: sums over threads differ by their number."""
    before = torch.get_num_threads()
    if before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)

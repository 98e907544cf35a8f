"""Which runs follow one another when a search starts anew."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from dataclasses import dataclass
from itertools import count

from scorefn.core import ScorefnError
from scorefn.core.representation import representation
from scorefn.search.points import as_integer


@dataclass(frozen=True)
class Arm:
    """One run of a search with restarts.

    Args:
        popsize: N.
        sigma_factor: what sigma0 is multiplied by.
        budget: about how many evaluations it may spend.
        method: the strategy, as ``minimize`` names it; None: that of the first run.

    Example:
        >>> from scorefn.search import IPOP
        >>> policy = IPOP(2)
        >>> arms = list(policy.runs(10, uniform=lambda: 0.5))
        >>> arms[2].popsize, arms[2].sigma_factor, arms[2].method
        (40, 1.0, None)
    """

    popsize: int
    sigma_factor: float = 1.0
    budget: float = math.inf
    method: str | None = None

    __repr__ = representation


class Restarts(ABC):
    """A policy: the row of runs of a search, each with a fresh state and, but for the first, a fresh start.

    A new policy writes ``arms`` as a generator; ``minimize`` does the rest.

    Args:
        maximum: how many restarts at most, the first run not counted; None: as many as the budget pays for.

    Raises:
        ScorefnError: maximum is negative or no integer.

    Example:
        >>> from scorefn.search import Arm, Restarts, minimize
        >>> class Tripled(Restarts):
        ...     def arms(self, popsize, uniform):
        ...         while True:
        ...             yield Arm(popsize)
        ...             popsize *= 3
        >>> policy = Tripled(1)
        >>> result = minimize(lambda x: abs(x[0]), [2.0], 1.0, restarts=policy, tolx=0.1, seed=0)
        >>> result.restarts
        1
    """

    def __init__(self, maximum: int | None = None) -> None:
        number = None if maximum is None else as_integer(maximum)
        if maximum is not None and (number is None or number < 0):
            raise ScorefnError(
                f"The number of restarts must be a non-negative integer, but it is {maximum!r}. Use None for as many "
                "as the budget pays for."
            )
        self.maximum = number

    @abstractmethod
    def arms(self, popsize: int, uniform: Callable[[], float]) -> Generator[Arm, int, None]:
        """The runs, the first one included; each yield gives back how many evaluations that run spent.

        Args:
            popsize: N of the first run.
            uniform: returns a random number between 0 and 1, by the run's own generator.
        """

    def runs(self, popsize: int, uniform: Callable[[], float]) -> Generator[Arm, int, None]:
        """The runs of ``arms`` as far as maximum allows."""
        arms = self.arms(popsize, uniform)
        arm = next(arms)
        for _ in count() if self.maximum is None else range(self.maximum):
            spent = yield arm
            try:
                arm = arms.send(spent)
            except StopIteration:
                return
        yield arm

    def __repr__(self) -> str:
        return f"{type(self).__name__}({'' if self.maximum is None else self.maximum})"


class IPOP(Restarts):
    """Each run has twice the points of the one before.

    Source: Auger & Hansen (2005), "A restart CMA evolution strategy with increasing population size", CEC.

    Args:
        maximum: how many restarts at most; None: as many as the budget pays for.

    Raises:
        ScorefnError: maximum is negative or no integer.

    Example:
        >>> from scorefn.search import IPOP
        >>> [arm.popsize for arm in IPOP(3).runs(10, uniform=lambda: 0.5)]
        [10, 20, 40, 80]
    """

    def arms(self, popsize: int, uniform: Callable[[], float]) -> Generator[Arm, int, None]:
        """``popsize 2^i``, i = 0, 1, ..."""
        while True:
            yield Arm(popsize)
            popsize *= 2


class BIPOP(Restarts):
    """Runs of doubling size and runs of small random size in turn, so that both kinds spend about as much.

    With ``N_0`` points in the first run, ``N_i = 2^i N_0`` in the i-th large one, and U, V uniform, a small run has::

        N = N_0 (N_i / (2 N_0))^(U^2),    sigma = sigma0 10^(-2 V)

    rounded to an even number, and may spend half of what the last large run spent, but 50 generations at least. It is a
    small run's turn while the small ones have spent less than the large ones; the first run belongs to neither.

    Source: Hansen (2009), "Benchmarking a BI-population CMA-ES on the BBOB-2009 function testbed", GECCO workshop.

    Args:
        maximum: how many restarts at most; None: as many as the budget pays for.

    Raises:
        ScorefnError: maximum is negative or no integer.

    Example:
        >>> from scorefn.search import BIPOP
        >>> runs = BIPOP().runs(10, uniform=lambda: 0.5)
        >>> sizes = [next(runs).popsize]
        >>> sizes += [runs.send(1000).popsize for _ in range(4)]  # every run spent 1000 evaluations
        >>> sizes  # the first run, then large and small ones in turn
        [10, 20, 10, 40, 12]
    """

    def arms(self, popsize: int, uniform: Callable[[], float]) -> Generator[Arm, int, None]:
        """Large and small runs in turn; the first restart is a large one."""
        yield Arm(popsize)
        large, spent_large, spent_small = popsize, 0, 0
        while True:
            large *= 2
            last = yield Arm(large)
            spent_large += last
            while spent_small < spent_large:
                size = popsize * (large / (2 * popsize)) ** (uniform() ** 2)
                size = max(popsize, 2 * round(size / 2))
                spent_small += yield Arm(size, 10 ** (-2 * uniform()), max(last / 2, 50 * size))


class Portfolio(Restarts):
    """``BIPOP`` after one sweep over the coordinates: what a separable problem needs costs others little.

    In the field's terms this is a sequential algorithm portfolio: methods that share one budget in a fixed order,
    whatever was seen (Loshchilov, Schoenauer & Sebag, 2013, "Bi-population CMA-ES algorithms with surrogate models and
    line searches", put line searches beside BIPOP likewise). The first restart is a ``CoordinateSearch``, some 300
    evaluations a coordinate; the further ones are those of ``BIPOP``.

    Args:
        maximum: how many restarts at most; None: as many as the budget pays for.

    Raises:
        ScorefnError: maximum is negative or no integer.

    Example:
        >>> from scorefn.search import Portfolio
        >>> runs = Portfolio().runs(10, uniform=lambda: 0.5)
        >>> arms = [next(runs), runs.send(1000), runs.send(600), runs.send(2000)]
        >>> [(arm.method, arm.popsize) for arm in arms]  # None: the method of the first run
        [(None, 10), ('coordinates', 64), (None, 20), (None, 10)]
    """

    def arms(self, popsize: int, uniform: Callable[[], float]) -> Generator[Arm, int, None]:
        """The first run, the sweep, and then the restarts of ``BIPOP``."""
        rest = BIPOP().arms(popsize, uniform)
        spent = yield next(rest)
        yield Arm(64, method="coordinates")
        while True:
            spent = yield rest.send(spent)

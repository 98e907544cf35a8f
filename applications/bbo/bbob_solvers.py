"""The solvers of the BBOB program, scorefn's and pycma's, and one attempt of either on one problem."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

import scorefn as sf
from applications.bbo.bbob_suite import Record, Spent, Suite, Watched

SIGMA0 = 2.0
REGION = 4.0  # starts are uniform in [-REGION, REGION]^D


Solver: TypeAlias = Callable[[Watched, Callable[[], NDArray[np.float64]], int, int, bool], str]
"""``(problem, start, maxfevals, seed, restarts)`` -> why it ended; each call of start is a new point ``[D]``."""


def by_scorefn(
    problem: Watched, start: Callable[[], NDArray[np.float64]], maxfevals: int, seed: int, restarts: bool
) -> str:
    """``minimize`` with its default strategy."""
    result = sf.search.minimize(
        lambda x: np.array([problem(row) for row in x]),
        start,
        SIGMA0,
        ftarget=problem.ftarget,
        maxfevals=maxfevals,
        restarts=sf.search.Portfolio() if restarts else 0,
        seed=seed,
        vectorized=True,
    )
    return ", ".join(result.stop)


def by_pycma(
    problem: Watched, start: Callable[[], NDArray[np.float64]], maxfevals: int, seed: int, restarts: bool
) -> str:
    """``fmin2`` with its defaults, restarted as its documentation recommends, cut off at the budget."""
    import cma

    options = {"ftarget": problem.ftarget, "maxfevals": maxfevals, "seed": seed, "verbose": -9, "verb_log": 0}
    again = {"bipop": True, "restarts": 9} if restarts else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about its options
        try:
            _, strategy = cma.fmin2(problem, start, SIGMA0, options, **again)
        except Spent:  # within a generation: pycma looks at maxfevals after it
            return "maxfevals"
    return ", ".join(strategy.stop())


SOLVERS: dict[str, Solver] = {"scorefn": by_scorefn, "pycma": by_pycma}


def attempt(
    solver: str,
    suite: Suite,
    function: int,
    instance: int,
    *,
    budget: int,
    seed: int = 0,
    restarts: bool = True,
    observer: Any = None,
) -> Record:
    """One solver on one problem; starts and seeds are those of the problem.

    Args:
        solver: a name of ``SOLVERS``.
        suite: that has the problem.
        function: its number.
        instance: its number.
        budget: evaluations per dimension.
        seed: the starts of the problem, and what the solvers draw, follow from it.
        restarts: whether one run may follow the other.
        observer: COCO's, which writes data.
    """
    optimum, dimension = suite.optimum(function, instance), suite.dimension
    problem = suite.problem(function, instance)
    if observer is not None:
        problem.observe_with(observer)
    watched = Watched(problem, optimum, budget * dimension)
    draws = np.random.default_rng([seed, function, instance])
    own = 1 + int(draws.integers(2**31 - 1))  # pycma takes 0 as no seed
    begin = time.process_time()
    try:
        stop = SOLVERS[solver](
            watched, lambda: draws.uniform(-REGION, REGION, dimension), budget * dimension, own, restarts
        )
    finally:
        problem.free()
    seconds = time.process_time() - begin
    return {
        "solver": solver,
        "function": function,
        "instance": instance,
        **watched.record(),
        "stop": stop,
        "cpu_seconds": seconds,
    }

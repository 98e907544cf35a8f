"""Search: generations of a strategy on an ellipsoid, and evaluations until a target, scorefn's and the peers'."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch

import scorefn as sf
from applications.bbo import problems
from applications.bbo.bbob_solvers import SIGMA0
from applications.bbo.generations import by_evotorch, by_pycma, by_strategy, endless
from applications.bbo.problems import Counted, Objective, Points
from applications.benchmarks.side_by_side.work import Sample, Work, exactly

TARGET = 1e-8
WARM = 5
PGPE_RATES: dict[str, Any] = {"center_learning_rate": 0.5, "stdev_learning_rate": 0.1}
MAKERS = {"sphere": problems.sphere, "ellipsoid": problems.ellipsoid, "rosenbrock": problems.rosenbrock}


def curvature(dimension: int) -> Points:
    """Of the ellipsoid whose generations are timed."""
    return np.logspace(0, 6, dimension)


def begin_at(dimension: int) -> Points:
    """Where its searches start."""
    return np.linspace(-4.0, 4.0, dimension)


def by_hand(f: Objective, x0: Points, popsize: int) -> Iterator[None]:
    """Separable natural evolution in NumPy: Wierstra et al. (2014), algorithm 6."""
    draws, N, D = np.random.default_rng(1), popsize, len(x0)
    mean, sigma, rate = x0.copy(), np.full(D, SIGMA0), (3 + np.log(D)) / (5 * np.sqrt(D))
    utility = np.maximum(0.0, np.log(N / 2 + 1) - np.log(np.arange(1, N + 1)))
    utility = utility / utility.sum() - 1 / N
    while True:
        z = draws.standard_normal((N, D))
        z = z[np.argsort(f(mean + sigma * z))]
        mean = mean + sigma * (utility @ z)
        sigma = sigma * np.exp(rate / 2 * (utility @ (z**2 - 1)))
        yield


def generations(library: str, kind: str, dimension: int, generations: int, popsize: int | None = None) -> Work:
    """CPU time of so many generations, ask, evaluation and tell; ``library``: scorefn, loop, pycma or evotorch."""
    x0, weights = begin_at(dimension), curvature(dimension)
    f: Objective = lambda x: x**2 @ weights  # noqa: E731
    size: dict[str, Any] = {"popsize": popsize} if popsize else {}
    if library == "scorefn":
        run = endless(partial(by_strategy, getattr(sf.search, kind), f, x0, **size))
    elif library == "pycma":
        run = endless(partial(by_pycma, {"CMA_diagonal": True} if kind == "diagonal" else {}, f, x0, **size))
    elif library == "evotorch":
        logging.disable(logging.INFO)  # it tells of each problem
        options = PGPE_RATES if kind == "PGPE" else {}
        run = by_evotorch(kind, lambda x: torch.from_numpy(f(x.numpy())), x0, popsize, **options)
    else:
        assert popsize is not None
        run = by_hand(f, x0, popsize)
    warm = 1 if generations == 1 else WARM

    def turn(number: int) -> Sample:
        for _ in islice(run, generations):
            pass
        return {"work": float(generations)}

    for _ in islice(run, warm):
        pass
    probe = np.stack([x0, np.zeros(dimension), np.ones(dimension)])
    return Work(turn, lambda: exactly(f(probe)))


def to_target(library: str, problem: str, dimension: int, limit: int, kind: str = "") -> Work:
    """Evaluations until a value is 1e-8 or less, without restarts; each turn is another optimum, rotation and start."""
    solvers: dict[str, Callable[..., None]] = {"scorefn": _scorefn, "pycma": _pycma, "evotorch": _evotorch}
    solve, make = solvers[library], MAKERS[problem]

    def run(turn: int) -> Sample:
        watched, x0 = Counted(make(dimension, turn), TARGET), problems.start(dimension, turn)
        begin = time.process_time()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            solve(watched, x0, limit, turn, kind)
        cpu = time.process_time() - begin
        if watched.reached is None or watched.reached > limit:
            return {"cpu": cpu, "work": float(limit), "value": None}
        return {"cpu": cpu, "work": float(watched.reached), "value": 1.0}

    def probe() -> Points:
        return make(dimension, 0)(np.stack([problems.start(dimension, seed) for seed in range(3)]))

    return Work(run, lambda: exactly(np.log(probe())))


def _scorefn(f: Counted, x0: Points, limit: int, seed: int, kind: str) -> None:
    options: dict[str, Any] = {"restarts": 0, "seed": seed, "vectorized": True}
    sf.search.minimize(f, x0, SIGMA0, ftarget=TARGET, maxfevals=limit, **options)


def _pycma(f: Counted, x0: Points, limit: int, seed: int, kind: str) -> None:
    for _ in by_pycma({}, f, x0, seed, ftarget=TARGET, maxfevals=limit):
        pass


def _evotorch(f: Counted, x0: Points, limit: int, seed: int, kind: str) -> None:
    """A search that has no stopping rule of its own ends at the target or the limit."""
    logging.disable(logging.INFO)
    torch.manual_seed(seed)
    for _ in by_evotorch(kind, lambda x: torch.from_numpy(f(x.numpy())), x0, None, seed=seed + 1):
        if f.reached is not None or f.evaluations >= limit:
            return

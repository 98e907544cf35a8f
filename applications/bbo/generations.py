"""Searches generation by generation, scorefn's and peers', and the CPU time of a generation."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch

import scorefn as sf
from applications.bbo.bbob_solvers import SIGMA0
from applications.bbo.bbob_suite import Record
from applications.bbo.problems import Objective, Points
from scorefn.search import Strategy


def by_strategy(
    kind: Callable[..., Strategy], f: Objective, x0: Points, seed: int = 0, **options: Any
) -> Iterator[None]:
    """The generations of one search by a strategy of scorefn, until it stops."""
    strategy = kind(x0, SIGMA0, seed=seed, **options)
    while not strategy.stop:
        x = strategy.ask()
        strategy.tell(x, torch.from_numpy(f(x.numpy())))
        yield


def by_pycma(model: Mapping[str, Any], f: Objective, x0: Points, seed: int = 0, **options: Any) -> Iterator[None]:
    """The generations of one search by pycma, whose options say the model, until it stops."""
    import cma

    quiet = {"seed": seed + 1, "verbose": -9, "verb_log": 0}  # pycma takes 0 as no seed
    strategy = cma.CMAEvolutionStrategy(x0, SIGMA0, {**quiet, **model, **options})
    while not strategy.stop():
        x = strategy.ask()
        strategy.tell(x, f(np.stack(x)).tolist())
        yield


def by_evotorch(
    name: str,
    f: Callable[[torch.Tensor], torch.Tensor],
    x0: Points,
    popsize: int | None,
    seed: int = 1,
    **options: Any,
) -> Iterator[None]:
    """The generations of one search by EvoTorch, whose f takes tensors ``[N, D]``; it never stops."""
    import evotorch

    problem = evotorch.Problem(
        "min", f, vectorized=True, solution_length=len(x0), initial_bounds=(-4, 4), dtype=torch.float64, seed=seed
    )
    kind = getattr(importlib.import_module("evotorch.algorithms"), name)
    strategy = kind(problem, stdev_init=SIGMA0, center_init=torch.from_numpy(x0), popsize=popsize, **options)
    while True:
        strategy.step()
        yield


def endless(begin: Callable[[], Iterator[None]]) -> Iterator[None]:
    """A search that begins anew where it stopped."""
    while True:
        yield from begin()


def milliseconds(
    runs: Mapping[str, Iterator[None]], generations: Mapping[str, int], rounds: int
) -> dict[str, list[float]]:
    """CPU milliseconds per generation, one number a round; the searches take turns.

    Work that is done every few generations counts in full where all rounds are averaged.
    """
    for name, run in runs.items():
        next(islice(run, 1 if generations[name] == 1 else 5, None))  # warm
    spent: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            begin = time.process_time()
            for _ in range(generations[name]):
                next(run)
            spent[name].append(1e3 * (time.process_time() - begin) / generations[name])
    return spent


def times_cell(values: list[float] | None) -> str:
    """Mean (lowest - highest)."""
    return f"{statistics.mean(values):.3g} ({min(values):.3g} - {max(values):.3g})" if values else "-"


CPU_ROWS = (  # D, popsize, generations a round by library; a slow one is given fewer
    ("full", 10, None, {"scorefn": 30, "pycma": 30, "EvoTorch": 30}),
    ("full", 100, None, {"scorefn": 150, "pycma": 150, "EvoTorch": 50}),
    ("full", 1000, None, {"scorefn": 120, "pycma": 30, "EvoTorch": 1}),
    ("diagonal", 10_000, 100, {"scorefn": 10, "pycma": 10, "EvoTorch": 10}),
)
FAMILIES = {
    "full": (sf.search.CSANES, {}, "XNES"),
    "diagonal": (sf.search.SeparableCSANES, {"CMA_diagonal": True}, "SNES"),
}


def cpu(rounds: int, stopped: Callable[[], bool]) -> Record:
    """The default strategy and its diagonal sibling beside the same families of pycma and EvoTorch."""
    logging.disable(logging.INFO)  # EvoTorch tells of each problem
    lacking = {name for name, package in (("pycma", "cma"), ("EvoTorch", "evotorch")) if not installed(package)}
    print(f"\nCPU milliseconds per generation on an ellipsoid: mean of {rounds} rounds (lowest - highest)\n")
    print("| family | D | scorefn | pycma | EvoTorch |\n|---|---|---|---|---|")
    rows = list[Record]()
    for family, dimension, popsize, generations in CPU_ROWS:
        if stopped():
            break
        kind, model, name = FAMILIES[family]
        x0, curvature = np.linspace(-4, 4, dimension), np.logspace(0, 6, dimension)
        f: Objective = partial(_bowl, curvature)
        size = {"popsize": popsize} if popsize else {}
        runs = {
            "scorefn": endless(partial(by_strategy, kind, f, x0, **size)),
            "pycma": endless(partial(by_pycma, model, f, x0, **size)),
            "EvoTorch": endless(
                partial(by_evotorch, name, partial(_bowl_of_tensors, torch.from_numpy(curvature)), x0, popsize)
            ),
        }
        spent = milliseconds({name: run for name, run in runs.items() if name not in lacking}, generations, rounds)
        rows.append({"family": family, "dimension": dimension, "popsize": popsize, "milliseconds": spent})
        print(f"| {family} | {dimension} | {' | '.join(times_cell(spent.get(name)) for name in runs)} |", flush=True)
    return {"rows": rows}


def _bowl(curvature: Points, x: Points) -> Points:
    return x**2 @ curvature


def _bowl_of_tensors(curvature: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return x.square() @ curvature


def installed(package: str) -> bool:
    """Whether a package can be imported."""
    return importlib.util.find_spec(package) is not None

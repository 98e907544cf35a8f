"""The figures of docs/gallery/snes.md: evaluations to a target, and CPU time per generation, of SNES and its peers.

    OMP_NUM_THREADS=1 python -m applications.bbo.snes_figures

EvoTorch and pycma are measured beside it where they are installed (``pip install evotorch cma``) and left out
otherwise. Libraries take turns within each seed and each round, so that a busy machine is busy for all of them.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import logging
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import torch

import scorefn as sf

TARGET = 1e-8
SIGMA0 = 2.0
LIMIT = 2_000  # evaluations per dimension

Objective = Callable[[torch.Tensor], torch.Tensor]
Search = Callable[[Objective, torch.Tensor, int], Iterator[None]]


def sphere(x: torch.Tensor) -> torch.Tensor:
    return x.square().sum(-1)


def ellipsoid(x: torch.Tensor) -> torch.Tensor:
    return (torch.logspace(0, 6, x.shape[-1], dtype=x.dtype) * x.square()).sum(-1)


def scorefn_snes(f: Objective, x0: torch.Tensor, seed: int) -> Iterator[None]:
    strategy = sf.search.SNES(x0, SIGMA0, seed=seed)
    while True:
        x = strategy.ask()
        strategy.tell(x, f(x))
        yield


def evotorch_snes(f: Objective, x0: torch.Tensor, seed: int) -> Iterator[None]:
    from evotorch import Problem
    from evotorch.algorithms import SNES

    problem = Problem(
        "min", f, vectorized=True, solution_length=len(x0), initial_bounds=(-3, 3), dtype=x0.dtype, seed=seed
    )
    search = SNES(problem, stdev_init=SIGMA0, center_init=x0)
    while True:
        search.step()
        yield


def pycma(diagonal: bool) -> Search:
    def search(f: Objective, x0: torch.Tensor, seed: int) -> Iterator[None]:
        import cma

        options = {"seed": seed + 1, "verbose": -9, "CMA_diagonal": diagonal}
        strategy = cma.CMAEvolutionStrategy(x0.numpy(), SIGMA0, options)
        while True:
            x = strategy.ask()
            strategy.tell(x, f(torch.tensor(np.stack(x))).tolist())
            yield

    return search


def searches() -> dict[str, Search]:
    found: dict[str, Search] = {"scorefn SNES": scorefn_snes}
    if importlib.util.find_spec("evotorch"):
        found["EvoTorch SNES"] = evotorch_snes
    if importlib.util.find_spec("cma"):
        found["pycma, diagonal"] = pycma(diagonal=True)
        found["pycma, full"] = pycma(diagonal=False)
    return found


def evaluations(search: Search, f: Objective, dimension: int, seed: int) -> float:
    """Evaluations told before and with the generation that reached the target; infinite beyond the limit."""
    count, lowest = 0, float("inf")

    def watched(x: torch.Tensor) -> torch.Tensor:
        nonlocal count, lowest
        values = f(x)
        count += len(values)
        lowest = min(lowest, float(values.min()))
        return values

    x0 = 6 * torch.rand(dimension, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) - 3
    for _ in search(watched, x0, seed):
        if lowest <= TARGET:
            return count
        if count > LIMIT * dimension:
            return float("inf")
    raise AssertionError("a search never ends by itself")


def milliseconds(runs: dict[str, Iterator[None]], rounds: int, generations: int) -> dict[str, list[float]]:
    """CPU milliseconds per generation, one number a round; the libraries take turns."""
    for run in runs.values():
        for _ in range(5):  # warm
            next(run)
    spent: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            begin = time.process_time()
            for _ in range(generations):
                next(run)
            spent[name].append(1e3 * (time.process_time() - begin) / generations)
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=15)
    parser.add_argument("--rounds", type=int, default=21)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")  # of the peers
    found = searches()
    packages = [name for name in ("torch", "numpy", "evotorch", "cma") if importlib.util.find_spec(name)]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    print(f"scorefn {sf.__version__}, Python {platform.python_version()}, {versions}\n")

    print(f"Evaluations to {TARGET:g}: median (lowest - highest) over seeds 0 to {arguments.seeds - 1}")
    print("| problem | " + " | ".join(found) + " |\n|---" + "|---" * len(found) + "|")
    for f, dimension in ((sphere, 10), (sphere, 20), (ellipsoid, 10), (ellipsoid, 20)):
        spent: dict[str, list[float]] = {name: [] for name in found}
        for seed in range(arguments.seeds):
            for name, search in found.items():
                spent[name].append(evaluations(search, f, dimension, seed))
        cells = [
            f"{statistics.median(counts):.0f} ({min(counts):.0f} - {max(counts):.0f})" for counts in spent.values()
        ]
        print(f"| {f.__name__} {dimension}-D | " + " | ".join(cells) + " |", flush=True)

    print(f"\nCPU milliseconds per generation on the ellipsoid: median (quartiles) of {arguments.rounds} rounds")
    print("| D (points) | " + " | ".join(found) + " |\n|---" + "|---" * len(found) + "|")
    for dimension in (10, 100, 1000):
        x0 = torch.ones(dimension, dtype=torch.float64)
        runs = {name: search(ellipsoid, x0, 0) for name, search in found.items()}
        times = milliseconds(runs, arguments.rounds, 10 if dimension < 1000 else 4)
        cells = []
        for values in times.values():
            low, middle, high = statistics.quantiles(values, n=4)
            cells.append(f"{middle:.2f} ({low:.2f} - {high:.2f})")
        points = sf.search.SNES(x0, SIGMA0).popsize
        print(f"| {dimension} ({points}) | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()

"""What evaluations over workers cost beside serial ones: overhead per evaluation, efficiency, and equality to the bit.

    OMP_NUM_THREADS=1 python -m applications.benchmarks.scale_executors [--generations 30] [--popsize 200] [--ray]

The overhead is that of a function that takes no time: seconds on the clock of a generation, less the share of a worker
in the function itself, per evaluation, the median over generations. The efficiency is that of a function that sleeps
for 20 ms: the serial time over W times that of W workers, generations taking turns. Equality compares every number of
the results of whole searches. Sleeping needs no core, so that the efficiency is that of the engine, not of the machine.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

import scorefn as sf
from applications.arguments import at_least
from applications.results import write_result
from scorefn.search import IPOP, SNES, Evaluator, SearchResult, minimize

METHODS: dict[str, dict[str, Any]] = {
    "csanes": {"method": "csanes"},
    "separable": {"method": "separable"},
    "snes": {"method": "snes"},
    "pgpe": {"method": "pgpe"},
    "openai_es": {"method": "openai_es"},
    "restarts": {"restarts": IPOP(2), "maxiter": 12},
    "bounds": {"bounds": (-0.4, 0.8)},
}
SLEEP = 0.02  # seconds
STARTUP = 300.0


def nothing(x: Any) -> float:
    return 0.0


def sphere(x: Any) -> float:
    return float(((x - 1.0) ** 2).sum())


def asleep(x: Any) -> float:
    time.sleep(SLEEP)
    return 0.0


def processes(num: int) -> ProcessPoolExecutor:
    """A pool of processes, one torch thread each."""
    context = multiprocessing.get_context("forkserver")
    return ProcessPoolExecutor(num, mp_context=context, initializer=sf.scale.one_thread)


def local_ray(num: int) -> sf.scale.RayExecutor:
    """Ray on this machine, one torch thread per worker."""
    path = {"env_vars": {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}}
    return sf.scale.RayExecutor(num_workers=num, num_cpus=num, include_dashboard=False, runtime_env=path)


def identity() -> int:
    time.sleep(SLEEP)
    return os.getpid()


def wait_for(executor: Any, num: int) -> None:
    """Return when so many workers have answered: the first seconds are those of their imports."""
    end = time.monotonic() + STARTUP
    while len({future.result() for future in [executor.submit(identity) for _ in range(4 * num)]}) < num:
        if time.monotonic() > end:
            raise SystemExit(f"Fewer than {num} workers answered within {STARTUP:g} s.")


def overhead(executor: Any, generations: int, popsize: int, dimension: int = 10) -> float:
    """Seconds per evaluation of a function that takes none: the median over generations, the first two left out."""
    strategy = SNES([0.0] * dimension, 1.0, popsize=popsize, seed=0)
    with Evaluator(nothing, executor) as evaluate:
        for _ in range(generations + 2):
            evaluate(strategy.ask())
    return median((record.seconds - record.busy / record.workers) / popsize for record in evaluate.records[2:])


def efficiency(executor: Any, generations: int, popsize: int = 40) -> float:
    """Serial seconds over ``W`` times those over W workers: medians of generations that take turns."""
    strategy = SNES([0.0] * 10, 1.0, popsize=popsize, seed=0)
    serial = []
    with Evaluator(asleep, executor) as evaluate:
        for _ in range(generations + 1):
            x = strategy.ask()
            begin = time.perf_counter()
            for point in x:
                asleep(point)
            serial.append(time.perf_counter() - begin)
            evaluate(x)
        size = evaluate.records[0].workers
    return median(serial[1:]) / (size * median(record.seconds for record in evaluate.records[1:]))


def equal(one: SearchResult, other: SearchResult) -> bool:
    """Whether two results are the same to the bit."""
    pairs = [(getattr(one, name), getattr(other, name)) for name in ("x", "best_x", "mean", "sigma", "fun", "nfev")]
    pairs += [(getattr(one.history, name), getattr(other.history, name)) for name in ("best", "median", "sigma")]
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


def identical(executor: Any, name: str, maxfevals: int = 400) -> bool:
    """Whether a search over the workers is the serial one, for one of METHODS."""
    options = {"seed": 3, "maxfevals": maxfevals, **METHODS[name]}
    return equal(
        minimize(sphere, np.zeros(4), 0.5, **options), minimize(sphere, np.zeros(4), 0.5, executor=executor, **options)
    )


def measured(executor: Any, generations: int, popsize: int) -> dict[str, Any]:
    """All of it, on one executor."""
    return {
        "overhead": overhead(executor, generations, popsize),
        "efficiency": efficiency(executor, max(3, generations // 6)),
        "identical": {name: identical(executor, name) for name in METHODS},
    }


def table(record: dict[str, dict[str, Any]]) -> str:
    """A row for each executor."""
    lines = ["| executor | overhead per evaluation | efficiency at 20 ms | identical to the bit |", "|---|---|---|---|"]
    for name, found in record.items():
        same = sum(found["identical"].values())
        lines.append(
            f"| {name} | {1e3 * found['overhead']:.3f} ms | {found['efficiency']:.3f} | {same} of {len(METHODS)} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--generations", type=at_least(1), default=30)
    parser.add_argument("--popsize", type=at_least(4), default=200)
    parser.add_argument("--ray", action="store_true", help="measure a local Ray, too")
    parser.add_argument("--out", type=Path, default=Path("runs/scale_executors"))
    options = parser.parse_args(arguments)
    record: dict[str, dict[str, Any]] = {}
    pools: dict[str, Callable[[], AbstractContextManager[Any]]] = {"2 processes": lambda: processes(2)}
    if options.ray:
        pools["Ray, 2 workers"] = lambda: local_ray(2)
    for name, made in pools.items():
        with made() as executor:
            wait_for(executor, 2)
            record[name] = measured(sf.scale.Workers(executor, startup=STARTUP), options.generations, options.popsize)
    write_result(options.out, vars(options), {"executors": record})
    print(table(record))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

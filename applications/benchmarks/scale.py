"""What searching over workers costs, loses and gains: every figure of the page about scale, in one program.

    OMP_NUM_THREADS=1 python -m applications.benchmarks.scale [--ray] [--only seeds kills] [--out runs/scale]

``executors``: overhead per evaluation, efficiency at 20 ms, equality to the bit (``scale_executors``). ``seeds``: bytes
per individual for 10^2 to 10^6 coordinates, counted as pickles that pass through the executor in both directions,
beside those of sending points; equality of serial and 2-worker searches to the bit. ``kills``: 100 processes killed at
random moments, for either driver (``scale_kills``). ``simulation``: the model of W workers, checked against 1 and 2
real ones (``scale_simulation``). Goals: at most 1 ms per evaluation on a pool and 3 ms on Ray, an efficiency of .9, 64
bytes, no committed generation lost.
"""

from __future__ import annotations

import argparse
import pickle
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

import scorefn as sf
from applications.arguments import at_least
from applications.benchmarks import scale_executors, scale_kills, scale_simulation
from applications.benchmarks.scale_executors import STARTUP, equal, local_ray, processes, wait_for
from applications.progress import Interruption, show_line
from applications.results import write_result
from scorefn.search import PGPE, SNES, OpenAIES, SeparableCSANES, run, run_by_seeds

DIMENSIONS = (100, 1000, 10_000, 100_000, 1_000_000)
KINDS: tuple[Any, ...] = (SNES, PGPE, OpenAIES, SeparableCSANES)
MOST = 2e8  # bytes of points of a generation that are sent for comparison


class Counting(Executor):
    """An executor that counts what passes through it, pickled, in both directions."""

    def __init__(self, executor: Any, num_workers: int) -> None:
        self.executor = executor
        self.num_workers = num_workers
        self.bytes = 0

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.bytes += len(pickle.dumps((fn, args, kwargs), protocol=5))
        future: Future[Any] = self.executor.submit(fn, *args, **kwargs)
        future.add_done_callback(self._count)
        return future

    def _count(self, future: Future[Any]) -> None:
        if not future.cancelled() and future.exception() is None:
            self.bytes += len(pickle.dumps(future.result(), protocol=5))


def first_numbers(x: torch.Tensor) -> float:
    """A function that costs nothing in many dimensions."""
    return float((x[:10] - 1.0).square().sum())


def made(kind: Any, dimension: int, popsize: int) -> Any:
    """A strategy with points in float32 where it has a choice."""
    options = {} if kind is SNES else {"dtype": torch.float32}
    return kind(torch.zeros(dimension, dtype=torch.float64), 0.3, popsize=popsize, seed=7, **options)


def bytes_per_individual(
    executor: Any, dimension: int, popsize: int, by_seeds: bool, generations: int = 4, num_workers: int = 2
) -> dict[str, Any]:
    """Bytes per individual of the later generations, and seconds of each; the first one sends the states.

    A worker that came to no batch in the first generation gets its state later: generations with states are counted
    in ``states`` and left out of ``bytes``.
    """
    counting, marks, states = Counting(executor, num_workers), [], []
    begin = time.perf_counter()

    def mark(strategy: Any) -> None:
        marks.append((counting.bytes, time.perf_counter() - begin))

    driver: Any = run_by_seeds if by_seeds else run
    workers = sf.scale.Workers(counting, startup=STARTUP, report=lambda record: states.append(record))
    driver(made(PGPE, dimension, popsize), first_numbers, executor=workers, maxfevals=generations * popsize + 1,
           callback=mark)  # fmt: skip
    sent = [getattr(record, "states_sent", 0) for record in states]
    plain = [i for i in range(1, generations) if not sent[i]]
    if not plain:
        raise SystemExit("Every generation sent a state: take more generations.")
    spent = [(marks[i][0] - marks[i - 1][0]) / popsize for i in plain]
    seconds = min(marks[i][1] - marks[i - 1][1] for i in plain)
    return {"dimension": dimension, "bytes": max(spent), "seconds": seconds, "states": sum(sent)}


def seeds(executor: Any, popsize: int, dimensions: tuple[int, ...] = DIMENSIONS) -> dict[str, Any]:
    """Bytes for each dimension, by seeds and as points, and equality to the bit."""
    rows = []
    for dimension in dimensions:
        row = bytes_per_individual(executor, dimension, popsize, by_seeds=True)
        if 4.0 * dimension * popsize <= MOST:
            points = bytes_per_individual(executor, dimension, popsize, by_seeds=False)
            row |= {"points_bytes": points["bytes"], "points_seconds": points["seconds"]}
        rows.append(row)
        show_line(f"by seeds: {dimension} coordinates", last=True)
    same = {}
    for kind in KINDS:
        for dimension in (10, 3000):
            one = run_by_seeds(made(kind, dimension, 40), first_numbers, maxfevals=600)
            two = run_by_seeds(
                made(kind, dimension, 40), first_numbers, sf.scale.Workers(executor, startup=STARTUP), maxfevals=600
            )
            same[f"{kind.__name__}, D = {dimension}"] = equal(one, two)
    return {"popsize": popsize, "rows": rows, "identical": same}


def seeds_table(found: dict[str, Any]) -> str:
    """A row for each dimension."""
    lines = [
        "| coordinates | bytes per individual by seeds | as points | seconds of a generation by seeds | as points |",
        "|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        points = f"{row['points_bytes']:,.0f}" if "points_bytes" in row else "not tried"
        seconds = f"{row['points_seconds']:.3f}" if "points_bytes" in row else ""
        lines.append(f"| {row['dimension']:,} | {row['bytes']:.1f} | {points} | {row['seconds']:.3f} | {seconds} |")
    same = found["identical"]
    return "\n".join([*lines, "", f"Equal to the bit: {sum(same.values())} of {len(same)}."])


def kills(number: int, seed: int) -> dict[str, scale_kills.Kills]:
    """Either driver, killed so many times."""
    found = {}
    for by_seeds in (False, True):
        with TemporaryDirectory() as folder:
            name = "run_by_seeds" if by_seeds else "run"
            found[name] = scale_kills.killed(
                Path(folder) / "search.pt", kills=number, seed=seed, by_seeds=by_seeds, generations=200
            )
    return found


def main(arguments: list[str] | None = None) -> int:
    parts = ("executors", "seeds", "kills", "simulation")
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--popsize", type=at_least(4), default=100, help="of the searches by seeds")
    parser.add_argument("--generations", type=at_least(2), default=30, help="of each overhead and check")
    parser.add_argument("--kills", type=at_least(1), default=100)
    parser.add_argument("--seed", type=at_least(0), default=0, help="of the moments of kills")
    parser.add_argument("--ray", action="store_true", help="measure a local Ray, too")
    parser.add_argument("--out", type=Path, default=Path("runs/scale"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    record: dict[str, Any] = {}
    with Interruption() as interrupted:
        if "kills" in options.only:  # forks, before there are other threads
            found = kills(options.kills, options.seed)
            record["kills"] = {name: asdict(entry) for name, entry in found.items()}
            print(scale_kills.table(found))
        if "executors" in options.only and not interrupted():
            record["executors"] = {}
            for name, pool in {
                "2 processes": processes,
                **({"Ray, 2 workers": local_ray} if options.ray else {}),
            }.items():
                with pool(2) as executor:
                    wait_for(executor, 2)
                    workers = sf.scale.Workers(executor, startup=STARTUP)
                    record["executors"][name] = scale_executors.measured(workers, options.generations, 200)
            print(scale_executors.table(record["executors"]))
        if "seeds" in options.only and not interrupted():
            with processes(2) as executor:
                wait_for(executor, 2)
                record["seeds"] = seeds(executor, options.popsize)
            print(seeds_table(record["seeds"]))
        if "simulation" in options.only and not interrupted():
            costs, checks = scale_simulation.checked(processes, max(2, options.generations // 6))
            rows = [row for mean in (0.02, 1.0, 60.0) for row in scale_simulation.scaled(costs, mean)]
            record["simulation"] = {
                "costs": asdict(costs),
                "checks": [{**asdict(check), "error": check.error} for check in checks],
                "scaling": rows,
            }
            scale_simulation.plot(options.out / "scaling.svg", rows)
            print(scale_simulation.check_table(checks), scale_simulation.scale_table(rows), sep="\n\n")
    write_result(options.out, vars(options), record)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

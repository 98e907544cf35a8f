"""Evaluations that ``BernoulliSearch`` needs on bit strings, beside the simplest evolutionary algorithm.

OneMax counts the ones, LeadingOnes those before the first zero, BinVal reads a binary number, Jump is OneMax with a gap
of width 2 before the top. All are minimised with the sign turned. The (1+1)-EA flips each bit of its only point with
probability 1/n, anew while none is flipped, and keeps what is no worse; on OneMax it needs about e n ln n evaluations.

    python -m applications.bbo.discrete_figures --seeds 20 --out runs/discrete_figures
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from applications.arguments import at_least
from applications.progress import Interruption, show_line
from applications.results import write_result
from scorefn.search import BernoulliSearch

GAP = 2


def onemax(x: Tensor) -> Tensor:
    """Minus the ones of each row ``[N, n]``."""
    return -x.sum(1)


def leading_ones(x: Tensor) -> Tensor:
    """Minus the ones before the first zero."""
    return -x.cumprod(1).sum(1)


def binval(x: Tensor) -> Tensor:
    """Minus the binary number; exact in float64 up to 52 bits."""
    return -(x @ 2.0 ** torch.arange(x.shape[1] - 1, -1, -1, dtype=x.dtype))


def jump(x: Tensor) -> Tensor:
    """Minus OneMax, less what lies in the gap."""
    ones, n = x.sum(1), x.shape[1]
    return -torch.where((ones <= n - GAP) | (ones == n), ones + GAP, n - ones)


@dataclass(frozen=True)
class Task:
    """A function of n bits; all ones is its only minimum. goal: evaluations to reach on average, or None."""

    function: Callable[[Tensor], Tensor]
    bits: int
    goal: float | None = None

    @property
    def name(self) -> str:
        return f"{self.function.__name__} {self.bits}"

    @property
    def target(self) -> float:
        return float(self.function(torch.ones(1, self.bits, dtype=torch.float64)))


TASKS = (
    Task(onemax, 20),
    Task(onemax, 100, 550),
    Task(onemax, 400),
    Task(leading_ones, 20),
    Task(leading_ones, 50),
    Task(leading_ones, 100, 14_000),
    Task(binval, 50),
    Task(jump, 50),
)


def search(task: Task, seed: int, most: int) -> tuple[int, bool]:
    """Evaluations of ``BernoulliSearch`` with its defaults, whole generations, and whether it succeeded."""
    strategy = BernoulliSearch(task.bits, seed=seed, ftarget=task.target, maxfevals=most, tolstagnation=0)
    while not strategy.stop:
        x = strategy.ask()
        strategy.tell(x, task.function(x))
    return strategy.result.evaluations, "ftarget" in strategy.stop


def one_plus_one(task: Task, seed: int, most: int) -> tuple[int, bool]:
    """Evaluations of the (1+1)-EA, and whether it succeeded."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(2, (1, task.bits), generator=generator).double()
    value = float(task.function(x))
    for count in range(1, most + 1):
        if value <= task.target:
            return count, True
        flips = torch.zeros(1, task.bits, dtype=torch.bool)
        while not bool(flips.any()):
            flips = torch.rand(1, task.bits, generator=generator) < 1 / task.bits
        other = torch.where(flips, 1 - x, x)
        if (found := float(task.function(other))) <= value:
            x, value = other, found
    return most, False


def measured(runs: list[tuple[int, bool]]) -> dict[str, Any]:
    """Mean, its standard error and extremes over the runs."""
    counts = [count for count, _ in runs]
    error = statistics.stdev(counts) / math.sqrt(len(counts)) if len(counts) > 1 else 0.0
    return {
        "mean": statistics.fmean(counts),
        "error": error,
        "least": min(counts),
        "most": max(counts),
        "solved": sum(solved for _, solved in runs),
        "runs": len(runs),
    }


def plot(rows: dict[str, dict[str, Any]], path: Path) -> None:
    """Mean evaluations of both on all tasks, on a logarithmic axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.5))
    places = range(len(rows))
    for shift, (name, label) in zip((-0.2, 0.2), (("search", "BernoulliSearch"), ("ea", "(1+1)-EA")), strict=True):
        shown = [row[name] for row in rows.values()]
        axes.bar([place + shift for place in places], [entry["mean"] for entry in shown], 0.4, label=label)
    axes.set_xticks(list(places), list(rows), rotation=30, ha="right")
    axes.set_yscale("log")
    axes.set_ylabel("mean evaluations")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=at_least(1), default=20, help="runs per task, seeds 0, 1, ...")
    parser.add_argument("--maxfevals", type=at_least(100), default=60_000, help="of one run")
    parser.add_argument("--out", type=Path, default=Path("runs/discrete_figures"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows: dict[str, dict[str, Any]] = {}
    begin = time.process_time()
    with Interruption() as interrupted:
        for task in TASKS:
            runs: dict[str, list[tuple[int, bool]]] = {"search": [], "ea": []}
            for seed in range(options.seeds):
                if interrupted():
                    break
                runs["search"].append(search(task, seed, options.maxfevals))
                runs["ea"].append(one_plus_one(task, seed, options.maxfevals))
                if sys.stdout.isatty():
                    show_line(f"{task.name}: {seed + 1} of {options.seeds}", last=False)
            if not runs["ea"]:
                break
            rows[task.name] = {name: measured(found) for name, found in runs.items()} | {"goal": task.goal}
            own, other = rows[task.name]["search"], rows[task.name]["ea"]
            show_line(
                f"{task.name:18s} {own['mean']:8.0f} +- {own['error']:.0f} ({own['solved']}/{own['runs']})   (1+1)-EA "
                f"{other['mean']:8.0f} +- {other['error']:.0f} ({other['solved']}/{other['runs']})"
                + ("" if task.goal is None else f"   goal {task.goal:g}"),
                last=True,
            )
    seconds = time.process_time() - begin
    path = write_result(options.out, vars(options), {"tasks": rows, "cpu_seconds": seconds})
    if rows:
        plot(rows, options.out / "evaluations.png")
    print(f"{seconds:.0f} CPU seconds; wrote {path}")


if __name__ == "__main__":
    main()

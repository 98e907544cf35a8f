"""Combinatorial problems over bit strings, each with its exact optimum beside: a Bernoulli search distribution at work.

Maximised over n bits, on instances made from a seed::

    onemax        the number of ones                                                   optimum n
    leadingones   the number of ones before the first zero                             optimum n
    maxcut        edges between the two sides of a random cubic graph                  by dynamic programming
    knapsack      profit of the packed items; if they are too heavy, minus the excess  by dynamic programming
    nk-adjacent   mean of n tables, the i-th of bits i, ..., i + k around a circle     by dynamic programming
    nk-random     the same of bit i and k others, drawn at random                      by enumeration

Beside ``BernoulliSearch`` (with its default population, and with 4 n strings; restarted where it stops) run the (1+1)
evolutionary algorithm (every bit flips with probability 1/n; the new string stays unless it is worse), local search
(the first better neighbour at distance 1; a fresh random string at each local optimum) and random strings. All may
evaluate equally many strings, a neighbour counting as one. Every run ends at the optimum.

Run it with::

    python -m applications.bbo.combinatorial --seeds 11
    python -m applications.bbo.combinatorial --pbo --out runs/pbo   # the PBO suite; needs `pip install ioh`

Ctrl-C ends after the present run; what was done is still compared and written. The pieces (the problems, ``Account``,
the optimisers) are meant to be imported and copied.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from applications.arguments import at_least
from applications.bbo.bit_optimisers import OPTIMISERS, Account
from applications.bbo.bit_problems import Array, instances
from applications.progress import Interruption, show_line
from applications.results import write_result


@dataclass(frozen=True)
class Run:
    """One run of one optimiser on one problem.

    Attributes:
        best: the largest value it found.
        evaluations: until the optimum, or all.
        hit: whether it found the optimum.
        better: evaluations and value at each improvement.
        seconds: of CPU.
    """

    problem: str
    optimiser: str
    seed: int
    optimum: float
    best: float
    evaluations: int
    hit: bool
    better: list[tuple[int, float]]
    seconds: float

    @property
    def gap(self) -> float:
        """How much of the optimum is missing, as a share of it."""
        return (self.optimum - self.best) / max(abs(self.optimum), 1e-300) if not self.hit else 0.0


def attempt(
    name: str, problem: Callable[[Array], Array], dimension: int, optimum: float, optimiser: str, seed: int, budget: int
) -> Run:
    """One run within a budget."""
    account, begin = Account(problem, optimum, budget), time.process_time()
    OPTIMISERS[optimiser](account, dimension, seed)
    seconds = time.process_time() - begin
    return Run(name, optimiser, seed, optimum, account.best, account.spent, account.hit, account.better, seconds)


def table(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One row for each problem and optimiser: hits, mean evaluations (of all runs), mean gap, CPU seconds."""
    groups: dict[tuple[str, str], list[Run]] = {}
    for one in runs:
        groups.setdefault((one.problem, one.optimiser), []).append(one)
    return [
        {
            "problem": problem,
            "optimiser": optimiser,
            "runs": len(group),
            "hits": sum(one.hit for one in group),
            "evaluations": float(np.mean([one.evaluations for one in group])),
            "gap": float(np.mean([one.gap for one in group])),
            "best": float(np.max([one.best for one in group])),
            "optimum": group[0].optimum,
            "seconds": float(np.mean([one.seconds for one in group])),
        }
        for (problem, optimiser), group in groups.items()
    ]


def plot(runs: Sequence[Run], budget: int, path: Path) -> None:
    """Mean share of the optimum that is missing, over evaluations; one panel for each problem."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(one.problem for one in runs))
    columns = min(5, max(3, math.ceil(math.sqrt(len(names)))))
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(4 * columns, 3 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    at = np.unique(np.geomspace(1, budget, 200).astype(int))
    for panel, name in zip(panels, names, strict=False):
        for number, optimiser in enumerate(OPTIMISERS):
            own = [one for one in runs if (one.problem, one.optimiser) == (name, optimiser)]
            if own:
                panel.plot(at, np.mean([gaps(one, at) for one in own], 0), color=f"C{number}", label=optimiser)
        panel.set(title=name, xscale="log", yscale="symlog", xlabel="evaluations", ylabel="share missing", ylim=(0, 1))
        panel.set_yscale("symlog", linthresh=1e-3)
    for panel in panels[len(names) :]:
        panel.set_axis_off()
    panels[0].legend()
    figure.savefig(path, dpi=120)


def gaps(one: Run, at: Array) -> Array:
    """The gap of a run after so many evaluations, at most 1."""
    when, value = np.array(one.better).T
    best = value[np.maximum(np.searchsorted(when, at, side="right") - 1, 0)]
    return np.clip((one.optimum - best) / max(abs(one.optimum), 1e-300), 0, 1)


@dataclass(frozen=True)
class Task:
    """What is to be optimised: ``fresh`` makes the function for a run."""

    name: str
    dimension: int
    optimum: float
    fresh: Callable[[], Callable[[Array], Array]]


def seeded_tasks(size: int, seed: int) -> list[Task]:
    """Those of ``instances``, their optima computed."""
    return [Task(p.name, p.dimension, p.optimum(), lambda p=p: p) for p in instances(size, seed)]  # type: ignore[misc]


def pbo_tasks(size: int) -> list[Task]:
    """The problems of the PBO suite (Doerr et al., 2020) whose optimum ioh knows, instance 1.

    Raises:
        ModuleNotFoundError: ioh is not installed.
    """
    import ioh

    def made(number: int) -> Any:
        return ioh.get_problem(number, 1, size, ioh.ProblemClass.PBO)

    def fresh(number: int) -> Callable[[], Callable[[Array], Array]]:
        def values(problem: Any) -> Callable[[Array], Array]:
            return lambda x: np.array([problem(row) for row in x.astype(int).tolist()])

        return lambda: values(made(number))

    found = [made(number) for number in range(1, 26)]
    return [
        Task(f"F{number} {one.meta_data.name}", size, float(one.optimum.y), fresh(number))
        for number, one in enumerate(found, 1)
        if math.isfinite(one.optimum.y)
    ]


def compare(
    tasks: Iterable[Task],
    optimisers: Sequence[str],
    seeds: int,
    budget: int,
    *,
    report: Callable[[Run], None] = lambda one: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[Run]:
    """Every optimiser on every task, seed by seed, so that an interruption leaves whole comparisons."""
    runs: list[Run] = []
    for task in tasks:
        for seed in range(seeds):
            for name in optimisers:
                runs.append(attempt(task.name, task.fresh(), task.dimension, task.optimum, name, seed, budget))
                report(runs[-1])
                if should_stop():
                    return runs
    return runs


def show_table(rows: Iterable[Mapping[str, Any]]) -> None:
    """Print it."""
    print(f"{'':28s}{'':12s}{'hits':>8s}{'evaluations':>13s}{'missing':>10s}{'CPU s':>8s}")
    for row in rows:
        hits = f"{row['hits']}/{row['runs']}"
        numbers = f"{hits:>8s}{row['evaluations']:13,.0f}{row['gap']:10.3%}{row['seconds']:8.2f}"
        print(f"{row['problem']:28s}{row['optimiser']:12s}{numbers}")


def main(argv: list[str] | None = None) -> int:
    """Compare the optimisers on the seeded instances or on the PBO suite."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", type=at_least(6), default=64, help="n, how many bits")
    parser.add_argument("--instance", type=at_least(0), default=0, help="the seed of the instances")
    parser.add_argument("--seeds", type=at_least(1), default=11, help="how many runs, of seeds 0, 1, ...")
    parser.add_argument("--budget", type=at_least(100), default=20_000, help="evaluations of a run")
    parser.add_argument("--optimisers", nargs="+", choices=list(OPTIMISERS), default=list(OPTIMISERS))
    parser.add_argument("--pbo", action="store_true", help="the PBO suite instead; needs `pip install ioh`")
    parser.add_argument("--out", type=Path, default=Path("runs/combinatorial"), help="folder of result and plot")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    try:
        tasks = pbo_tasks(options.size) if options.pbo else seeded_tasks(options.size, options.instance)
    except ModuleNotFoundError as error:
        parser.error(f"{error}: --pbo takes the problems of IOHprofiler, so run `pip install ioh` first")
    except ValueError as error:
        parser.error(str(error))
    options.out.mkdir(parents=True, exist_ok=True)  # before the work: a path that cannot be is found out at once
    chosen = list(dict.fromkeys(options.optimisers))
    total = len(tasks) * options.seeds * len(chosen)
    count = 0

    def report(one: Run) -> None:
        nonlocal count
        count += 1
        found = "optimum" if one.hit else f"{one.gap:.3%} missing"
        text = f"{count:5d} of {total}  {one.problem} {one.optimiser} seed {one.seed}: {found}"
        show_line(f"{text}, {one.evaluations} evaluations".ljust(100), last=count == total)

    with Interruption() as interrupted:
        runs = compare(tasks, chosen, options.seeds, options.budget, report=report, should_stop=interrupted)
    rows = table(runs)
    print()
    show_table(rows)
    record = {"complete": len(runs) == total, "table": rows, "runs": [vars(one) for one in runs]}
    write_result(options.out, vars(options), record)
    plot(runs, options.budget, options.out / "combinatorial.png")
    return 130 if interrupted() else 0


if __name__ == "__main__":
    sys.exit(main())

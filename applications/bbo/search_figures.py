"""The figures of docs/figures/search.md: evaluations, robustness, noise and CPU time of the default search, and peers'.

    OMP_NUM_THREADS=1 python -m applications.bbo.search_figures --sections evaluations shares separable noise cpu law

Every section prints a table and leaves ``<section>/result.json`` in the folder of ``--out``; the last one draws the
cost law. Solvers start at the same points and take turns, so that a busy machine is busy for all of them; one thread,
CPU time of the process. ``evaluations`` and ``shares`` need ``pip install coco-experiment cma``, the others ``cma``,
and ``cpu`` compares with EvoTorch where it is installed.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import logging
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice, product
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

import scorefn as sf
from applications.arguments import at_least
from applications.bbo.bbob import SIGMA0, SOLVERS, TARGETS, Record, Suite, attempt, missing, summary, versions
from applications.progress import Interruption, show_line
from applications.results import write_result
from scorefn.search import Strategy

GOALS: dict[tuple[int, int], float] = {  # (function, D): evaluations / D to 1e-8
    (1, 5): 140,
    (1, 10): 130,
    (1, 20): 121,
    (10, 10): 320,
    (10, 20): 470,
    (10, 40): 790,
    (8, 10): 440,
    (8, 20): 690,
    (12, 10): 790,
    (12, 20): 810,
    (14, 10): 285,
    (14, 20): 450,
}
NAMES = {1: "sphere", 8: "Rosenbrock", 10: "rotated ellipsoid", 12: "bent cigar", 14: "different powers"}
SHARES = {5: 0.70, 10: 0.62, 20: 0.57}  # of 24 x 51 targets, at 1000 D

Points: TypeAlias = NDArray[np.float64]
Objective: TypeAlias = Callable[[Points], Points]
"""Points ``[N, D]`` to values ``[N]``."""

Stopped: TypeAlias = Callable[[], bool]


# ------------------------------------------------------------------------------------------------- on COCO's problems


def evaluations(seeds: int, stopped: Stopped) -> Record:
    """Evaluations to 1e-8 without restarts: their sum over all runs per success (ERT), divided by D."""
    print("Evaluations / D to 1e-8, no restarts\n")
    print("| problem | D | goal | scorefn | successes | pycma | successes |\n|---|---|---|---|---|---|---|")
    rows = list[Record]()
    for (function, dimension), goal in GOALS.items():
        suite, records = Suite(dimension, [function], range(1, 16)), list[Record]()
        for instance, seed, solver in product(range(1, 16), range(seeds), SOLVERS):
            if stopped():
                return {"rows": rows}
            records.append(attempt(solver, suite, function, instance, budget=2500, seed=seed, restarts=False))
        row: Record = {"function": function, "dimension": dimension, "goal": goal}
        cells = []
        for solver in SOLVERS:
            found = summary([record for record in records if record["solver"] == solver])
            row[solver] = {key: found[key] for key in ("hits", "total", "evaluations", "cpu_seconds", "ert")}
            ert = "-" if found["ert"] is None else f"{found['ert'] / dimension:.0f}"
            cells.append(f"{ert} | {found['hits']}/{found['total']}")
        rows.append(row)
        print(f"| {NAMES[function]} f{function} | {dimension} | {goal:g} | {' | '.join(cells)} |", flush=True)
    return {"rows": rows}


def shares(instances: int, stopped: Stopped) -> Record:
    """The share of 24 functions times 51 targets that 1000 D evaluations reach, without restarts."""
    print(f"\nShare of 24 x {len(TARGETS)} targets at 1000 D, no restarts, instances 1-{instances}\n")
    print("| D | goal | scorefn | pycma |\n|---|---|---|---|")
    rows = list[Record]()
    for dimension, goal in SHARES.items():
        suite, records = Suite(dimension, range(1, 25), range(1, instances + 1)), list[Record]()
        for function, instance, solver in product(range(1, 25), range(1, instances + 1), SOLVERS):
            if stopped():
                return {"rows": rows}
            records.append(attempt(solver, suite, function, instance, budget=1000, restarts=False))
            if len(records) % (2 * instances) == 0:
                show_line(f"  D = {dimension}: f{function} done", last=function == 24)
        row: Record = {"dimension": dimension, "goal": goal}
        for solver in SOLVERS:
            found = summary([record for record in records if record["solver"] == solver])
            row[solver] = {
                "share": found["target_hits"] / found["target_total"],
                "cpu_seconds": found["cpu_seconds"],
                "per_function": {
                    number: entry["target_hits"] / entry["target_total"]
                    for number, entry in found["per_function"].items()
                },
            }
        rows.append(row)
        cells = " | ".join(f"{row[solver]['share']:.3f}" for solver in SOLVERS)
        print(f"| {dimension} | {goal:.2f} | {cells} |", flush=True)
    return {"rows": rows}


# -------------------------------------------------------------------------------------------------------- own problems


def sphere(dimension: int, seed: int) -> Objective:
    """``|x - c|^2``."""
    center, _ = _frame(dimension, seed)
    return lambda x: ((x - center) ** 2).sum(1)


def ellipsoid(dimension: int, seed: int) -> Objective:
    """``sum_i 10^(6 (i - 1)/(D - 1)) (R (x - c))_i^2`` with a random rotation R."""
    center, rotation = _frame(dimension, seed)
    curvature = np.logspace(0, 6, dimension)
    return lambda x: ((x - center) @ rotation) ** 2 @ curvature


def separable_ellipsoid(dimension: int, seed: int) -> Objective:
    """The ellipsoid whose axes are those of the coordinates."""
    center, _ = _frame(dimension, seed)
    curvature = np.logspace(0, 6, dimension)
    return lambda x: (x - center) ** 2 @ curvature


def rosenbrock(dimension: int, seed: int) -> Objective:
    """``sum_i 100 (y_i^2 - y_(i+1))^2 + (y_i - 1)^2`` with ``y = R (x - c) + 1``."""
    center, rotation = _frame(dimension, seed)

    def values(x: Points) -> Points:
        y = (x - center) @ rotation + 1
        total: Points = (100 * (y[:, :-1] ** 2 - y[:, 1:]) ** 2 + (y[:, :-1] - 1) ** 2).sum(1)
        return total

    return values


def _frame(dimension: int, seed: int) -> tuple[Points, Points]:
    """An optimum in [-2, 2]^D and a rotation."""
    draws = np.random.default_rng([seed, dimension])
    return draws.uniform(-2, 2, dimension), np.linalg.qr(draws.standard_normal((dimension, dimension)))[0]


def to_target(solver: str, f: Objective, x0: Points, seed: int, diagonal: bool = False) -> tuple[float, float]:
    """Evaluations until a value is 1e-8 or less (infinite where it never is), and CPU seconds; no restarts."""
    count, first = 0, math.inf

    def watched(x: Points) -> Points:
        nonlocal count, first
        values = f(x)
        if math.isinf(first) and (hit := values <= TARGETS[-1]).any():
            first = count + 1 + int(hit.argmax())
        count += len(values)
        return values

    import cma  # here, so that it is not timed

    limit = 20_000 * len(x0)
    begin = time.process_time()
    if solver == "scorefn":
        sf.search.minimize(
            watched,
            x0,
            SIGMA0,
            method="separable" if diagonal else "csanes",
            ftarget=TARGETS[-1],
            maxfevals=limit,
            restarts=0,
            seed=seed,
            vectorized=True,
        )
    else:
        options = {"ftarget": TARGETS[-1], "maxfevals": limit, "seed": seed + 1, "verbose": -9, "verb_log": 0}
        options |= {"CMA_diagonal": True} if diagonal else {}
        search = cma.CMAEvolutionStrategy(x0, SIGMA0, options)
        while not search.stop():
            x = search.ask()
            search.tell(x, watched(np.stack(x)))
    return first, time.process_time() - begin


def separable(seeds: int, stopped: Stopped) -> Record:
    """The separable ellipsoid by the diagonal families."""
    print("\nEvaluations / D to 1e-8 on the separable ellipsoid, diagonal families: mean (successes)\n")
    print("| D | goal | scorefn | pycma, diagonal |\n|---|---|---|---|")
    rows = list[Record]()
    for dimension, goal in ((20, 300), (320, 570)):
        found = _runs(separable_ellipsoid, dimension, seeds, stopped, diagonal=True)
        rows.append({"dimension": dimension, "goal": goal, **found})
        cells = " | ".join(_mean_cell(found[solver]["evaluations"], dimension) for solver in SOLVERS)
        print(f"| {dimension} | {goal} | {cells} |", flush=True)
    return {"rows": rows}


def law(seeds: int, dimensions: Sequence[int], stopped: Stopped) -> Record:
    """Evaluations and CPU seconds to 1e-8 against D, for ``plot_law``."""
    print("\nThe cost law: mean evaluations and CPU seconds to 1e-8 (successes)\n")
    print("| problem | D | " + " | ".join(f"{solver} | seconds" for solver in SOLVERS) + " |")
    print("|---|---|" + "---|---|" * len(SOLVERS))
    rows = list[Record]()
    for f, dimension in product((sphere, ellipsoid, rosenbrock), dimensions):
        if stopped():
            break
        found = _runs(f, dimension, seeds, stopped)
        rows.append({"problem": f.__name__, "dimension": dimension, **found})
        cells = [
            f"{_mean_cell(found[solver]['evaluations'], 1)} | {statistics.mean(found[solver]['cpu_seconds']):.3g}"
            for solver in SOLVERS
        ]
        print(f"| {f.__name__} | {dimension} | {' | '.join(cells)} |", flush=True)
    return {"rows": rows}


def plot_law(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Evaluations and CPU seconds against D, log-log."""
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    counts, seconds = figure.subplots(1, 2)
    for number, name in enumerate(dict.fromkeys(row["problem"] for row in rows)):
        own = [row for row in rows if row["problem"] == name]
        for solver, style in zip(SOLVERS, ("o-", "x--"), strict=True):
            for axes, what in ((counts, "evaluations"), (seconds, "cpu_seconds")):
                places, means = _means(own, solver, what)
                label = f"{name}, {solver} ~ D^{_slope(places, means):.2f}"
                axes.loglog(places, means, style, color=f"C{number}", label=label, base=10)
    counts.set(xlabel="D", ylabel="evaluations to 1e-8")
    seconds.set(xlabel="D", ylabel="CPU seconds to 1e-8")
    shown = sorted({row["dimension"] for row in rows})
    for axes in (counts, seconds):
        axes.set_xticks(shown, [str(dimension) for dimension in shown])
        axes.set_xticks([], minor=True)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small")
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "scorefn"}):  # small, and the same each time
        figure.savefig(path, metadata={"Date": None})


def _means(rows: Sequence[Mapping[str, Any]], solver: str, what: str) -> tuple[list[float], list[float]]:
    """D, and the mean over the runs that reached the target."""
    found = []
    for row in rows:
        runs = zip(row[solver]["evaluations"], row[solver][what], strict=True)
        if kept := [value for count, value in runs if count is not None]:
            found.append((row["dimension"], statistics.mean(kept)))
    return [place for place, _ in found], [mean for _, mean in found]


def _slope(places: Sequence[float], means: Sequence[float]) -> float:
    """Of the logarithms, from D = 8 on, where the law has set in."""
    late = [(math.log(place), math.log(mean)) for place, mean in zip(places, means, strict=True) if place >= 8]
    return statistics.linear_regression(*zip(*late, strict=True)).slope if len(late) > 1 else math.nan


def _runs(
    make: Callable[[int, int], Objective], dimension: int, seeds: int, stopped: Stopped, *, diagonal: bool = False
) -> dict[str, dict[str, list[Any]]]:
    found: dict[str, dict[str, list[Any]]] = {solver: {"evaluations": [], "cpu_seconds": []} for solver in SOLVERS}
    for seed in range(seeds):
        if stopped():
            break
        x0 = np.random.default_rng([seed, dimension, 1]).uniform(-4, 4, dimension)
        for solver in SOLVERS:
            count, seconds = to_target(solver, make(dimension, seed), x0, seed, diagonal)
            found[solver]["evaluations"].append(None if math.isinf(count) else count)
            found[solver]["cpu_seconds"].append(seconds)
    return found


def _mean_cell(counts: Sequence[int | None], divisor: float) -> str:
    reached = [count for count in counts if count is not None]
    return f"{statistics.mean(reached) / divisor:,.0f} ({len(reached)}/{len(counts)})" if reached else "-"


# -------------------------------------------------------------------------------------------------------- random values


def noise(seeds: int, stopped: Stopped) -> Record:
    """What 20 D generations of values without any meaning do to step size and shape."""
    print("\nPure noise, 20 D generations: change of log sigma (standard error); decades of the axis ratio\n")
    print("| D | scorefn log sigma | pycma log sigma | scorefn axis ratio | pycma axis ratio |\n|---|---|---|---|---|")
    rows = list[Record]()
    for dimension in (10, 20, 40):
        if stopped():
            break
        found: dict[str, list[tuple[float, float]]] = {solver: [] for solver in SOLVERS}
        for seed in range(seeds):
            for solver, walk in zip(SOLVERS, (_noise_by_scorefn, _noise_by_pycma), strict=True):
                found[solver].append(_spread(walk(dimension, 20 * dimension, seed)))
        row: Record = {"dimension": dimension}
        for solver, values in found.items():
            drifts, ratios = zip(*values, strict=True)
            row[solver] = {"log_sigma": list(drifts), "log10_axis_ratio": list(ratios)}
        rows.append(row)
        drift = [
            f"{statistics.mean(row[s]['log_sigma']):+.3f} ({_standard_error(row[s]['log_sigma']):.3f})" for s in SOLVERS
        ]
        ratio = [f"{statistics.mean(row[s]['log10_axis_ratio']):.2f}" for s in SOLVERS]
        print(f"| {dimension} | {' | '.join((*drift, *ratio))} |", flush=True)
    return {"rows": rows}


def _noise_by_scorefn(dimension: int, generations: int, seed: int) -> Points:
    """The covariance at the end, from the identity."""
    draws = torch.Generator().manual_seed(seed + 1000)
    strategy = sf.search.CSANES(torch.zeros(dimension), 1.0, seed=seed)
    for _ in range(generations):
        strategy.tell(strategy.ask(), torch.randn(strategy.popsize, generator=draws))
    factor: Points = strategy.factor.numpy()
    return factor @ factor.T


def _noise_by_pycma(dimension: int, generations: int, seed: int) -> Points:
    import cma

    draws = np.random.default_rng(seed)
    search = cma.CMAEvolutionStrategy(np.zeros(dimension), 1.0, {"seed": seed + 1, "verbose": -9, "verb_log": 0})
    for _ in range(generations):
        x = search.ask()
        search.tell(x, draws.standard_normal(len(x)).tolist())
    covariance: Points = search.sigma**2 * search.C
    return covariance


def _spread(covariance: Points) -> tuple[float, float]:
    """The mean logarithm of the lengths of the axes, and the decades between the longest and the shortest."""
    axes = np.log(np.linalg.eigvalsh(covariance)) / 2
    return float(axes.mean()), float(axes[-1] - axes[0]) / math.log(10)


def _standard_error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values))


# ------------------------------------------------------------------------------------------------------------ CPU time


def _by_strategy(
    kind: Callable[..., Strategy], x0: torch.Tensor, curvature: torch.Tensor, popsize: int | None
) -> Iterator[None]:
    while True:  # a search that has converged begins anew
        strategy = kind(x0, SIGMA0, popsize=popsize, seed=0)
        while not strategy.stop:
            x = strategy.ask()
            strategy.tell(x, x.square() @ curvature)
            yield


def _by_pycma(diagonal: bool, x0: torch.Tensor, curvature: torch.Tensor, popsize: int | None) -> Iterator[None]:
    import cma

    options = {"seed": 1, "verbose": -9, "verb_log": 0, "CMA_diagonal": diagonal}
    options |= {"popsize": popsize} if popsize else {}
    weights = curvature.numpy()
    while True:
        strategy = cma.CMAEvolutionStrategy(x0.numpy(), SIGMA0, options)
        while not strategy.stop():
            x = strategy.ask()
            strategy.tell(x, (np.stack(x) ** 2 @ weights).tolist())
            yield


def _by_evotorch(name: str, x0: torch.Tensor, curvature: torch.Tensor, popsize: int | None) -> Iterator[None]:
    import evotorch

    problem = evotorch.Problem(
        "min",
        lambda x: x.square() @ curvature,
        vectorized=True,
        solution_length=len(x0),
        initial_bounds=(-4, 4),
        dtype=x0.dtype,
        seed=1,
    )
    kind = getattr(importlib.import_module("evotorch.algorithms"), name)
    strategy = kind(problem, stdev_init=SIGMA0, center_init=x0, popsize=popsize)
    while True:  # it never stops
        strategy.step()
        yield


CPU_ROWS = (  # D, popsize, generations a round by library; a slow one is given fewer
    ("full", 10, None, {"scorefn": 30, "pycma": 30, "EvoTorch": 30}),
    ("full", 100, None, {"scorefn": 150, "pycma": 150, "EvoTorch": 50}),
    ("full", 1000, None, {"scorefn": 120, "pycma": 30, "EvoTorch": 1}),
    ("diagonal", 10_000, 100, {"scorefn": 10, "pycma": 10, "EvoTorch": 10}),
)


def cpu(rounds: int, stopped: Stopped) -> Record:
    """CPU milliseconds per generation, over all rounds: work that is done every few generations counts in full."""
    logging.disable(logging.INFO)  # EvoTorch tells of each problem
    makers: dict[str, dict[str, Callable[..., Iterator[None]]]] = {
        "full": {
            "scorefn": partial(_by_strategy, sf.search.CSANES),
            "pycma": partial(_by_pycma, False),
            "EvoTorch": partial(_by_evotorch, "XNES"),
        },
        "diagonal": {
            "scorefn": partial(_by_strategy, sf.search.SeparableCSANES),
            "pycma": partial(_by_pycma, True),
            "EvoTorch": partial(_by_evotorch, "SNES"),
        },
    }
    lacking = {name for name, package in (("pycma", "cma"), ("EvoTorch", "evotorch")) if not _installed(package)}
    print(f"\nCPU milliseconds per generation on an ellipsoid: mean of {rounds} rounds (lowest - highest)\n")
    print("| family | D | scorefn | pycma | EvoTorch |\n|---|---|---|---|---|")
    rows = list[Record]()
    for family, dimension, popsize, generations in CPU_ROWS:
        if stopped():
            break
        start = torch.linspace(-4, 4, dimension, dtype=torch.float64)
        curvature = torch.logspace(0, 6, dimension, dtype=torch.float64)
        runs = {name: make(start, curvature, popsize) for name, make in makers[family].items() if name not in lacking}
        for name, run in runs.items():
            next(islice(run, 1 if generations[name] == 1 else 5, None))  # warm
        spent: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(rounds):
            for name, run in runs.items():
                begin = time.process_time()
                for _ in range(generations[name]):
                    next(run)
                spent[name].append(1e3 * (time.process_time() - begin) / generations[name])
        rows.append({"family": family, "dimension": dimension, "popsize": popsize, "milliseconds": spent})
        cells = [
            f"{statistics.mean(spent[name]):.3g} ({min(spent[name]):.3g} - {max(spent[name]):.3g})"
            if name in spent
            else "-"
            for name in ("scorefn", "pycma", "EvoTorch")
        ]
        print(f"| {family} | {dimension} | {' | '.join(cells)} |", flush=True)
    return {"rows": rows}


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


SECTIONS = ("evaluations", "shares", "separable", "noise", "cpu", "law")


def main(argv: list[str] | None = None) -> int:
    """The sections asked for, one after the other."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--seeds", type=at_least(2), default=3, help="of evaluations (times 15 instances) and law")
    parser.add_argument("--many-seeds", type=at_least(2), default=20, help="of separable and noise")
    parser.add_argument("--instances", type=at_least(1), default=10, help="of shares")
    parser.add_argument("--rounds", type=at_least(2), default=7, help="of cpu")
    parser.add_argument("--dimensions", nargs="+", type=at_least(2), default=[2, 4, 8, 16, 32, 64, 128], help="of law")
    parser.add_argument("--out", type=Path, default=Path("runs/search_figures"), help="folder of results and plot")
    options = parser.parse_args(argv)
    if set(options.sections) & {"evaluations", "shares"} and (lack := missing(peers=True)):
        parser.error(lack)
    if set(options.sections) - {"cpu"} and not _installed("cma"):
        parser.error("There is no cma, the peer: pip install cma")
    options.out.mkdir(parents=True, exist_ok=True)  # before the work: a path that cannot be is found out at once
    torch.set_num_threads(1)
    print(versions(["torch", "numpy", "coco-experiment", "cma", "evotorch"]), flush=True)
    with warnings.catch_warnings(), Interruption() as interrupted:
        warnings.simplefilter("ignore")  # of the peers
        work: dict[str, Callable[[], Record]] = {
            "evaluations": lambda: evaluations(options.seeds, interrupted),
            "shares": lambda: shares(options.instances, interrupted),
            "separable": lambda: separable(options.many_seeds, interrupted),
            "noise": lambda: noise(options.many_seeds, interrupted),
            "cpu": lambda: cpu(options.rounds, interrupted),
            "law": lambda: law(options.seeds, options.dimensions, interrupted),
        }
        for section in dict.fromkeys(options.sections):
            record = {**work[section](), "complete": not interrupted()}
            write_result(options.out / section, vars(options), record)
            if section == "law" and record["rows"]:
                plot_law(record["rows"], options.out / "search_cost.svg")
            if interrupted():
                return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The figures of docs/gallery/search.md: evaluations, robustness, noise and CPU time of the default search, and peers'.

    OMP_NUM_THREADS=1 python -m applications.bbo.search_figures --sections evaluations shares separable noise cpu law
    OMP_NUM_THREADS=1 python -m applications.bbo.search_figures --sections large

Every section prints a table and leaves ``<section>/result.json`` in the folder of ``--out``; ``law`` and ``large`` draw
plots, and ``large`` is that of docs/gallery/large_search.md. Solvers start at the same points and take turns, so that a
busy machine is busy for all of them; one thread, CPU time of the process. ``evaluations`` and ``shares`` need ``pip
install coco-experiment cma``, the others ``cma``, and ``cpu`` compares with EvoTorch where it is installed.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

import scorefn as sf
from applications.arguments import at_least
from applications.bbo.bbob import missing, summary, versions
from applications.bbo.bbob_solvers import SIGMA0, SOLVERS, attempt
from applications.bbo.bbob_suite import TARGETS, Record, Suite
from applications.bbo.generations import by_pycma, cpu, installed
from applications.bbo.large_search import large, plot_large
from applications.bbo.problems import (
    Counted,
    Objective,
    Points,
    ellipsoid,
    rosenbrock,
    separable_ellipsoid,
    sphere,
    start,
)
from applications.progress import Interruption, show_line
from applications.results import write_result

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


def to_target(solver: str, f: Objective, x0: Points, seed: int, diagonal: bool = False) -> tuple[int | None, float]:
    """Evaluations until a value is 1e-8 or less (None where it never is), and CPU seconds; no restarts."""
    watched, limit = Counted(f, TARGETS[-1]), 20_000 * len(x0)
    import cma  # noqa: F401  # here, so that it is not timed

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
        model = {"CMA_diagonal": True} if diagonal else {}
        for _ in by_pycma(model, watched, x0, seed, ftarget=TARGETS[-1], maxfevals=limit):
            pass
    return watched.reached, time.process_time() - begin


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
        for solver in SOLVERS:
            count, seconds = to_target(solver, make(dimension, seed), start(dimension, seed), seed, diagonal)
            found[solver]["evaluations"].append(count)
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


SECTIONS = ("evaluations", "shares", "separable", "noise", "cpu", "law", "large")


def main(argv: list[str] | None = None) -> int:
    """The sections asked for, one after the other."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--seeds", type=at_least(2), default=3, help="of evaluations (times 15 instances) and law")
    parser.add_argument("--many-seeds", type=at_least(2), default=20, help="of separable and noise")
    parser.add_argument("--instances", type=at_least(1), default=10, help="of shares")
    parser.add_argument("--rounds", type=at_least(2), default=7, help="of cpu and large")
    parser.add_argument("--dimensions", nargs="+", type=at_least(2), default=[2, 4, 8, 16, 32, 64, 128], help="of law")
    parser.add_argument("--out", type=Path, default=Path("runs/search_figures"), help="folder of results and plot")
    options = parser.parse_args(argv)
    if set(options.sections) & {"evaluations", "shares"} and (lack := missing(peers=True)):
        parser.error(lack)
    if set(options.sections) - {"cpu"} and not installed("cma"):
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
            "large": lambda: large(options.rounds, interrupted),
        }
        for section in dict.fromkeys(options.sections):
            record = {**work[section](), "complete": not interrupted()}
            write_result(options.out / section, vars(options), record)
            if section == "law" and record["rows"]:
                plot_law(record["rows"], options.out / "search_cost.svg")
            if section == "large" and record["rows"]:
                plot_large(record["rows"], options.out / "large_search.svg")
            if interrupted():
                return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

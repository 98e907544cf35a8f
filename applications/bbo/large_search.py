"""The section of large dimensions: strategies whose memory is linear in D, beside a full covariance and pycma's.

See ``search_figures``, which runs it. Every solver has its default settings and no restarts; all begin at the same
points. One that reached the target of a problem in no run is given only ``SHORT`` evaluations at larger D, which says
what it finds within small budgets; a peer is not run there.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import scorefn as sf
from applications.bbo import problems
from applications.bbo.bbob_suite import TARGETS, Record
from applications.bbo.generations import by_pycma, by_strategy, endless, milliseconds, times_cell
from applications.bbo.problems import Counted, start
from applications.progress import show_line

SEEDS = {40: 3, 100: 1, 300: 1, 1000: 1}  # of each D
LIMIT = 2000  # evaluations / D
LARGEST, SHORT = 600_000, 300_000  # evaluations
BUDGETS = (10, 30, 100, 300, 1000)  # evaluations / D within which the lowest value is noted
PROBLEMS = (
    problems.sphere,
    problems.separable_ellipsoid,
    problems.cigar,
    problems.plane_discus,
    problems.discus,
    problems.parallel_rosenbrock,
    problems.ellipsoid,
)
OWN = {
    kind.method: kind for kind in (sf.search.SeparableCSANES, sf.search.RankOneCSANES, sf.search.CSANES, sf.search.SNES)
}
CHOICES = ("separable", "rank_one", "csanes")  # of method="auto"
PEERS = ("pycma diagonal", "pycma VD", "pycma VkD", "pycma full")
AFFORDABLE = {"csanes": 300, "ellipsoid": 300, "pycma full": 100, "discus": 100}
"""The largest D of what takes O(D^2) time or more, and of what no model of a linear number of parameters solves."""


def searches() -> dict[str, Callable[..., Iterator[None]]]:
    """``(f, x0, seed=..., ftarget=..., maxfevals=...)`` -> the generations, of each solver."""
    from cma.restricted_gaussian_sampler import GaussVDSampler, GaussVkDSampler

    models = ({"CMA_diagonal": True}, GaussVDSampler.extend_cma_options(), GaussVkDSampler.extend_cma_options(), {})
    own = {name: partial(by_strategy, kind) for name, kind in OWN.items()}
    return own | {name: partial(by_pycma, model) for name, model in zip(PEERS, models, strict=True)}


def affordable(name: str, dimension: int) -> bool:
    """Whether a solver or problem is measured at this D."""
    return dimension <= AFFORDABLE.get(name, dimension)


def large(rounds: int, stopped: Callable[[], bool]) -> Record:
    """Evaluations to 1e-8, CPU time of a generation, and what "auto" chooses beside what was best within budgets."""
    found = searches()
    print(f"\nEvaluations / D to 1e-8, up to {LIMIT} D or {LARGEST}: median (successes)\n")
    print("| problem | D | " + " | ".join(found) + " |\n|---|---" + "|---" * len(found) + "|")
    rows, hopeless = list[Record](), set[tuple[str, str]]()
    for dimension, make in product(SEEDS, PROBLEMS):
        if not affordable(make.__name__, dimension):
            continue
        row: Record = {"problem": make.__name__, "dimension": dimension}
        lost = {name for problem, name in hopeless if problem == make.__name__}
        solvers = [name for name in found if affordable(name, dimension) and (name in OWN or name not in lost)]
        row |= {name: [] for name in solvers}
        for seed, name in product(range(SEEDS[dimension]), solvers):
            if stopped():
                return {"rows": rows}
            limit = min(LIMIT * dimension, SHORT if name in lost else LARGEST)
            row[name].append(attempt(found[name], make, dimension, seed, limit))
            if name == solvers[-1]:
                show_line(f"  {make.__name__}, D = {dimension}: seed {seed} done", last=seed + 1 == SEEDS[dimension])
        hopeless |= {(make.__name__, name) for name in solvers if not _reached(row[name])}
        rows.append(row)
        print(
            f"| {make.__name__} | {dimension} | {' | '.join(_cell(row.get(name), dimension) for name in found)} |",
            flush=True,
        )
    return {"rows": rows, "times": times(found, rounds, stopped), "auto": automatic(rows)}


def attempt(
    search: Callable[..., Iterator[None]],
    make: Callable[[int, int], problems.Objective],
    dimension: int,
    seed: int,
    limit: int,
) -> Record:
    """One search without restarts: the evaluation that reached the target, and the lowest value within each budget."""
    f = Counted(make(dimension, seed), TARGETS[-1], [budget * dimension for budget in BUDGETS])
    begin = time.process_time()
    for _ in search(f, start(dimension, seed), seed=seed, ftarget=TARGETS[-1], maxfevals=limit):
        pass
    seconds = time.process_time() - begin
    return {"reached": f.reached, "within": f.within(), "evaluations": f.evaluations, "cpu_seconds": seconds}


def times(found: Mapping[str, Callable[..., Iterator[None]]], rounds: int, stopped: Callable[[], bool]) -> list[Record]:
    """CPU milliseconds of a generation on the separable ellipsoid."""
    print(f"\nCPU milliseconds per generation: mean of {rounds} rounds (lowest - highest)\n")
    print("| D | " + " | ".join(found) + " |\n|---" + "|---" * len(found) + "|")
    rows = list[Record]()
    for dimension in SEEDS:
        if stopped():
            break
        f, x0 = problems.separable_ellipsoid(dimension, 0), start(dimension, 0)
        runs = {name: endless(partial(search, f, x0)) for name, search in found.items() if affordable(name, dimension)}
        spent = milliseconds(runs, dict.fromkeys(runs, 50), rounds)
        rows.append({"dimension": dimension, "milliseconds": spent})
        print(f"| {dimension} | {' | '.join(times_cell(spent.get(name)) for name in found)} |", flush=True)
    return rows


def automatic(rows: Sequence[Record]) -> list[Record]:
    """Decades of the lowest value above that of the best, within each budget, of what "auto" chooses from.

    Medians over the seeds; down to the target, below which nothing is better; of each problem, and their mean.
    """
    print('\nDecades above the best value, mean of all problems, and what method="auto" chooses\n')
    print("| D | budget / D | auto | " + " | ".join(CHOICES) + " |\n|---|---|---" + "|---" * len(CHOICES) + "|")
    table = list[Record]()
    for dimension, budget in product(dict.fromkeys(row["dimension"] for row in rows), BUDGETS):
        if budget * dimension > SHORT:
            continue  # some searches had less
        own = [row for row in rows if row["dimension"] == dimension]
        found = {row["problem"]: _decades(row, BUDGETS.index(budget)) for row in own}
        names = [name for name in CHOICES if affordable(name, dimension)]
        mean = {name: statistics.mean(decades[name] for decades in found.values()) for name in names}
        choice, _ = sf.search.chosen(dimension, budget * dimension)
        table.append({"dimension": dimension, "budget": budget, "chosen": choice, "mean": mean, "decades": found})
        cells = " | ".join(f"{mean[name]:.2f}" if name in mean else "-" for name in CHOICES)
        print(f"| {dimension} | {budget} | {choice} | {cells} |", flush=True)
    return table


def _decades(row: Record, place: int) -> dict[str, float]:
    lowest = {
        name: math.log10(max(TARGETS[-1], statistics.median(record["within"][place] for record in row[name])))
        for name in CHOICES
        if name in row
    }
    return {name: value - min(lowest.values()) for name, value in lowest.items()}


def _reached(records: Sequence[Record]) -> list[int]:
    return [record["reached"] for record in records if record["reached"] is not None]


def _cell(records: Sequence[Record] | None, dimension: int) -> str:
    """The median of the successes, and how many there were."""
    if records is None:
        return "-"
    reached = _reached(records)
    shown = f"{statistics.median(reached) / dimension:.0f}" if reached else "-"
    return f"{shown} ({len(reached)}/{len(records)})"


def plot_large(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Evaluations / D to the target against D, log-log, one panel a problem; medians of the successes."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6.5), layout="constrained")
    *panels, legend = figure.subplots(2, (len(PROBLEMS) + 1) // 2, sharex=True, sharey=True).flat
    for axes, make in zip(panels, PROBLEMS, strict=True):
        for number, name in enumerate((*OWN, *PEERS)):
            line = [
                (row["dimension"], statistics.median(reached) / row["dimension"])
                for row in rows
                if row["problem"] == make.__name__ and (reached := _reached(row.get(name, ())))
            ]
            style, points = "o-" if name in OWN else "x--", zip(*line, strict=True) if line else ((), ())
            axes.loglog(*points, style, color=f"C{number}", label=name)
        axes.set_title(make.__name__.replace("_", " "))
        axes.set_xticks(list(SEEDS), [str(dimension) for dimension in SEEDS])
        axes.set_xticks([], minor=True)
        axes.grid(alpha=0.3)
    legend.axis("off")
    legend.legend(*axes.get_legend_handles_labels(), loc="center")
    figure.supxlabel("D")
    figure.supylabel("evaluations / D to 1e-8")
    path.parent.mkdir(parents=True, exist_ok=True)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "scorefn"}):  # small, and the same each time
        figure.savefig(path, metadata={"Date": None})

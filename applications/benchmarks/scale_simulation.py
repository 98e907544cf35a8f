"""How many workers are worth having: a discrete-event model of a search over W of them, for W = 1 to 10,000.

    OMP_NUM_THREADS=1 python -m applications.benchmarks.scale_simulation [--out runs/scale_simulation]

What cannot be run on one machine is simulated event by event, in the order in which ``scorefn.scale`` does things. The
assumptions: the process that searches does one thing at a time; sending a batch, taking an answer in and the update of
a generation take it constant times, per batch and per point, which ``calibrated`` measures on real workers; a worker
adds a constant time to each point, the way there and back included; at most ``ahead`` batches per worker are under way,
and a worker that is free takes the oldest one; evaluation times are independent draws of one law, whatever the point
and the worker; nothing fails, and the network is never full. The exact answers beside: without costs, constant times
make a generation of ``ceil(batches / W)`` rounds, and one worker is always busy; with them no policy tells more values
a second than one over the cost of a value. ``checked`` compares with 1 and 2 real workers.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import scorefn as sf
from applications.arguments import at_least
from applications.benchmarks.scale_executors import STARTUP, nothing, processes, wait_for
from applications.progress import Interruption, show_line
from applications.results import write_result
from scorefn.search import Evaluator

Times = Callable[[np.random.Generator, int], NDArray[np.float64]]
"""Seconds of so many evaluations."""

MEAN = 0.02  # seconds
WORKERS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000)


def constant(rng: np.random.Generator, num: int) -> NDArray[np.float64]:
    return np.full(num, MEAN)


def lognormal(rng: np.random.Generator, num: int, width: float = 0.5) -> NDArray[np.float64]:
    """With mean ``MEAN``; width is the standard deviation of the logarithm."""
    return MEAN * np.exp(width * rng.standard_normal(num) - width**2 / 2)


def heavy(rng: np.random.Generator, num: int, index: float = 2.0) -> NDArray[np.float64]:
    """Pareto's law with mean ``MEAN``: its variance is infinite for an index up to 2."""
    return MEAN * (index - 1) / index * (1 + rng.pareto(index, num))


LAWS: dict[str, Times] = {"constant": constant, "lognormal": lognormal, "heavy tail": heavy}


@dataclass(frozen=True)
class Costs:
    """Seconds that are not evaluation.

    Args:
        send: of the searching process, for a batch.
        send_point: for each point of it.
        receive: for an answer.
        receive_point: for each value of it.
        worker: of a worker, for a point.
        update: of the searching process, after a generation.
    """

    send: float = 0.0
    send_point: float = 0.0
    receive: float = 0.0
    receive_point: float = 0.0
    worker: float = 0.0
    update: float = 0.0


@dataclass(frozen=True)
class Policy:
    """How a generation is cut, and what is waited for.

    Args:
        popsize: N.
        batch: points in a batch.
        ahead: batches per worker that may be under way: 2, or 1 with a timeout.
        drop_slowest: so many points are not waited for.
        asynchronous: a generation is any N points; batch and ahead are then 1. The times of the first W are used twice.
    """

    popsize: int
    batch: int = 1
    ahead: int = 2
    drop_slowest: int = 0
    asynchronous: bool = False


@dataclass(frozen=True)
class Outcome:
    """What W workers achieved.

    Args:
        throughput: values told per second.
        efficiency: the time of the evaluations that were told over W times all the time.
        idle_share: of the workers' time.
        generation: seconds, the median over generations.
    """

    throughput: float
    efficiency: float
    idle_share: float
    generation: float


def simulated(
    policy: Policy, costs: Costs, workers: int, times: Times, generations: int = 20, seed: int = 0
) -> Outcome:
    """So many generations over so many workers."""
    rng = np.random.default_rng(seed)
    return played(policy, costs, workers, (times(rng, policy.popsize) for _ in range(generations)))


def played(policy: Policy, costs: Costs, workers: int, generations: Iterator[NDArray[np.float64]]) -> Outcome:
    """Generations whose evaluation times are given, ``[N]`` each."""
    play = _Asynchronous if policy.asynchronous else _Synchronous
    game = play(policy, costs, workers)
    ends = [0.0]
    for seconds in generations:
        game.generation(seconds)
        ends.append(game.clock)
    total = game.clock
    return Outcome(
        throughput=game.told / total,
        efficiency=game.useful / (workers * total),
        idle_share=max(0.0, 1 - (game.busy - game.beyond()) / (workers * total)),
        generation=float(np.median(np.diff(ends))),
    )


class _Game:
    """The clock of the searching process, and when each worker is free."""

    def __init__(self, policy: Policy, costs: Costs, workers: int) -> None:
        self.policy, self.costs, self.workers = policy, costs, workers
        self.clock = self.busy = self.useful = 0.0
        self.told = 0
        self.free = [0.0] * workers
        self.under_way: list[tuple[float, int, float]] = []  # when it is done, points, seconds of evaluation
        self.late: list[tuple[float, int, float]] = []  # nobody waits for them, but their workers are taken

    def send(self, num: int, seconds: float) -> None:
        """Send a batch: the worker that is free first takes it."""
        self.clock += self.costs.send + num * self.costs.send_point
        begin = max(heapq.heappop(self.free), self.clock)
        end = begin + num * self.costs.worker + seconds
        self.busy += seconds
        heapq.heappush(self.free, end)
        heapq.heappush(self.under_way, (end, num, seconds))

    def receive(self) -> tuple[int, float]:
        """Take the next answer in, and wait for it."""
        end, num, seconds = heapq.heappop(self.under_way)
        self.clock = max(self.clock, end) + self.costs.receive + num * self.costs.receive_point
        return num, seconds

    def beyond(self) -> float:
        """Evaluation that lies behind the end."""
        behind = (min(end - self.clock, seconds) for end, _, seconds in (*self.under_way, *self.late))
        return sum(seconds for seconds in behind if seconds > 0)


class _Synchronous(_Game):
    def generation(self, seconds: NDArray[np.float64]) -> None:
        """Send, wait for all but the dropped ones, update."""
        policy, begin = self.policy, 0
        left = policy.popsize - policy.drop_slowest
        batches = [seconds[edge : edge + policy.batch] for edge in range(0, policy.popsize, policy.batch)]
        while left > 0:
            taken = sum(end > self.clock for end, _, _ in self.late)
            while begin < len(batches) and len(self.under_way) + taken < policy.ahead * self.workers:
                self.send(len(batches[begin]), float(batches[begin].sum()))
                begin += 1
            num, spent = self.receive()
            left -= num
            self.told += num
            self.useful += spent
        self.late = [entry for entry in (*self.late, *self.under_way) if entry[0] > self.clock]
        self.under_way = []
        self.clock += self.costs.update


class _Asynchronous(_Game):
    def generation(self, seconds: NDArray[np.float64]) -> None:
        """Send to whoever is free, and update after any N values."""
        waiting = itertools.cycle(seconds.tolist())
        for _ in range(self.policy.popsize):
            while len(self.under_way) < self.workers:
                self.send(1, next(waiting))
            num, spent = self.receive()
            self.told += num
            self.useful += spent
        self.clock += self.costs.update


# --------------------------------------------------------------------------------------------- against real workers


def sleeps(x: torch.Tensor) -> float:
    """How long that took: a busy machine wakes sleepers late."""
    begin = time.perf_counter()
    time.sleep(float(x[0]))
    return time.perf_counter() - begin


def real(executor: Any, generations: list[NDArray[np.float64]], batch: int) -> tuple[float, list[NDArray[np.float64]]]:
    """Seconds of generations whose points sleep so long, and how long each evaluation really took."""
    taken = []
    with Evaluator(sleeps, sf.scale.Workers(executor, batch=batch, startup=STARTUP)) as evaluate:
        for seconds in generations:
            x = torch.zeros(len(seconds), 10, dtype=torch.float64)
            x[:, 0] = torch.from_numpy(seconds)
            taken.append(evaluate(x).numpy())
        return sum(record.seconds for record in evaluate.records), taken


def calibrated(executor: Any, workers: int, generations: int = 15, popsize: int = 64, dimension: int = 10) -> Costs:
    """The costs of a pool of ``workers``: of batches of one point and of eight that take no time.

    What a batch and a point cost is split evenly between sending and taking in. A worker's own cost is what it spends
    on a point beside the evaluation.
    """
    with Evaluator(nothing, sf.scale.Workers(executor, batch=1, startup=STARTUP)) as evaluate:
        for _ in range(generations):
            evaluate(torch.zeros(popsize, dimension, dtype=torch.float64))
        single = median(record.seconds for record in evaluate.records[1:]) / popsize
    with Evaluator(nothing, sf.scale.Workers(executor, batch=8, startup=STARTUP)) as evaluate:
        for _ in range(generations):
            evaluate(torch.zeros(popsize, dimension, dtype=torch.float64))
        eight = median(record.seconds for record in evaluate.records[1:]) / (popsize // 8)
    point = max(0.0, (eight - single) / 7)
    batch = max(0.0, single - point)
    with Evaluator(sleeps, sf.scale.Workers(executor, batch=8, startup=STARTUP)) as evaluate:
        x = torch.full((popsize, dimension), MEAN / 4, dtype=torch.float64)
        inside = [float(evaluate(x).sum()) for _ in range(generations)]
        late = median(record.busy - took for record, took in zip(evaluate.records, inside, strict=True)) / popsize
    return Costs(batch / 2, point / 2, batch / 2, point / 2, late)


@dataclass(frozen=True)
class Check:
    """The model beside real workers: seconds of the same evaluation times."""

    law: str
    workers: int
    batch: int
    model: float
    real: float

    @property
    def error(self) -> float:
        """Relative."""
        return self.model / self.real - 1


def checked(
    made: Callable[[int], Any], generations: int = 5, popsize: int = 32, seed: int = 0
) -> tuple[Costs, list[Check]]:
    """Costs of 2 workers, and the model against 1 and 2: sums over generations of the times that were measured."""
    rows, costs = [], Costs()
    for workers in (2, 1):
        with made(workers) as executor:
            wait_for(executor, workers)
            if workers == 2:
                costs = calibrated(executor, workers)
            for law, times in LAWS.items():
                for batch in (1, 4):
                    rng = np.random.default_rng(seed)
                    seconds = [times(rng, popsize) for _ in range(generations)]
                    total, taken = real(executor, seconds, batch)
                    outcome = played(Policy(popsize, batch), costs, workers, iter(taken))
                    rows.append(Check(law, workers, batch, generations * popsize / outcome.throughput, total))
    return costs, rows


# ------------------------------------------------------------------------------------------------------ the program


def policies(workers: int, popsize: int | None) -> dict[str, Policy]:
    """What is compared; popsize None: two points for each worker, 100 at least."""
    num = max(100, 2 * workers) if popsize is None else popsize
    batch = max(1, num // workers)
    return {
        "a point a batch": Policy(num),
        "a batch a worker": Policy(num, batch),
        "drop slowest 5 %": Policy(num, drop_slowest=num // 20),
        "asynchronous": Policy(num, asynchronous=True),
    }


def scaled(costs: Costs, mean: float, workers: tuple[int, ...] = WORKERS, points: int = 60_000) -> list[dict[str, Any]]:
    """Rows of throughput, efficiency and idle share, evaluations taking ``mean`` seconds on average."""
    rows = []
    for num in workers:
        for law, times in LAWS.items():
            for name, policy in policies(num, None).items():
                generations = max(4, min(40, points // policy.popsize))
                found = simulated(
                    policy, costs, num, lambda rng, n, times=times: mean / MEAN * times(rng, n), generations
                )  # fmt: skip
                rows.append({"workers": num, "law": law, "policy": name, "mean": mean, **asdict(found)})
    return rows


def plot(path: Path, rows: list[dict[str, Any]]) -> None:
    """Efficiency against W, a panel for each law and mean time."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.fonttype"] = "none"  # text as text
    import matplotlib.pyplot as plt

    means = sorted({row["mean"] for row in rows})
    size = (11, 3.2 * len(means))
    figure, axes = plt.subplots(len(means), len(LAWS), figsize=size, sharex=True, sharey=True, squeeze=False)
    for line, mean in zip(axes, means, strict=True):
        for panel, law in zip(line, LAWS, strict=True):
            chosen = [row for row in rows if row["law"] == law and row["mean"] == mean]
            for name in dict.fromkeys(row["policy"] for row in chosen):
                found = [row for row in chosen if row["policy"] == name]
                panel.plot(
                    [row["workers"] for row in found], [row["efficiency"] for row in found], "o-", ms=3, label=name
                )
            panel.set(xscale="log", ylim=(0, 1.05))
            panel.grid(alpha=0.3)
            panel.set_title(f"{law}, {mean:g} s on average", fontsize=9)
    for panel in axes[-1]:
        panel.set_xlabel("workers")
    for line in axes:
        line[0].set_ylabel("efficiency")
    axes[0][0].legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def check_table(rows: list[Check]) -> str:
    lines = ["| law | workers | points a batch | model, s | real, s | error |", "|---|---|---|---|---|---|"]
    for row in rows:
        lines.append(
            f"| {row.law} | {row.workers} | {row.batch} | {row.model:.3f} | {row.real:.3f} | {100 * row.error:+.1f} % |"
        )
    return "\n".join(lines)


def scale_table(rows: list[dict[str, Any]], workers: tuple[int, ...] = (1, 10, 100, 1000, 10_000)) -> str:
    lines = ["| mean | law | policy | " + " | ".join(f"W = {num:,}" for num in workers) + " |"]
    lines.append("|---" * (3 + len(workers)) + "|")
    kinds = dict.fromkeys((row["mean"], row["law"], row["policy"]) for row in rows)
    for mean, law, policy in kinds:
        found = {
            row["workers"]: row["efficiency"]
            for row in rows
            if (row["mean"], row["law"], row["policy"]) == (mean, law, policy)
        }
        cells = " | ".join(f"{found[num]:.3f}" if num in found else "" for num in workers)
        lines.append(f"| {mean:g} s | {law} | {policy} | {cells} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--generations", type=at_least(2), default=5, help="of each check against real workers")
    parser.add_argument("--points", type=at_least(1000), default=60_000, help="simulated for each W, law and policy")
    parser.add_argument("--out", type=Path, default=Path("runs/scale_simulation"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with Interruption() as interrupted:
        costs, checks = checked(processes, options.generations)
        print(check_table(checks))
        rows: list[dict[str, Any]] = []
        for mean in (MEAN, 1.0, 60.0):
            if interrupted():
                break
            rows += scaled(costs, mean, points=options.points)
            show_line(f"evaluations of {mean:g} s are simulated", last=True)
    errors = [{**asdict(check), "error": check.error} for check in checks]
    write_result(options.out, vars(options), {"costs": asdict(costs), "checks": errors, "scaling": rows})
    if rows:
        plot(options.out / "scaling.svg", rows)
        print(scale_table(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

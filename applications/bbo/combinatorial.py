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
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

import scorefn as sf
from applications.arguments import at_least
from applications.progress import Interruption, show_line
from applications.results import write_result

Array: TypeAlias = NDArray[Any]
_WIDEST = 24  # bits of which all strings, or all states of dynamic programming, are looked at


class Problem(ABC):
    """A function of bit strings, to be maximised."""

    name: str
    dimension: int

    @abstractmethod
    def __call__(self, x: Array) -> Array:
        """Values ``[N]`` of the strings ``[N, n]`` of zeros and ones."""

    @abstractmethod
    def optimum(self) -> float:
        """The largest value, exact; ValueError where that is out of reach."""


class OneMax(Problem):
    """The number of ones."""

    name = "onemax"

    def __init__(self, dimension: int) -> None:
        self.dimension = dimension

    def __call__(self, x: Array) -> Array:
        return x.sum(1, dtype=np.float64)

    def optimum(self) -> float:
        return float(self.dimension)


class LeadingOnes(OneMax):
    """The number of ones before the first zero."""

    name = "leadingones"

    def __call__(self, x: Array) -> Array:
        return np.logical_and.accumulate(x, 1).sum(1, dtype=np.float64)


class MaxCut(Problem):
    """The weight of the edges between the nodes of 0 and the nodes of 1.

    Args:
        weights: ``[n, n]``, symmetric, zero where there is no edge.

    Raises:
        ValueError: weights are not square, not symmetric, or join a node with itself.
    """

    name = "maxcut"

    def __init__(self, weights: Array) -> None:
        weights = np.asarray(weights, dtype=np.float64)
        if weights.ndim != 2 or weights.shape != weights.T.shape or (weights != weights.T).any() or weights.trace():
            raise ValueError(
                f"weights of shape {weights.shape} must be a symmetric square table with a diagonal of zeros: an "
                "edge has no direction and joins two nodes."
            )
        self.weights, self.dimension = weights, len(weights)
        first, second = np.triu(weights).nonzero()
        self._ends, self._edges = (first, second), weights[first, second]

    @classmethod
    def random(cls, nodes: int, seed: int, degree: int = 3) -> MaxCut:
        """A random graph in which every node has this degree: pairings of ends, drawn until the graph is simple."""
        if nodes <= degree or nodes * degree % 2:
            raise ValueError(
                f"There is no graph of {nodes} nodes of degree {degree}: make their product even, nodes more."
            )
        generator = np.random.default_rng(seed)
        while True:
            ends = generator.permutation(np.repeat(np.arange(nodes), degree)).reshape(-1, 2)
            weights = np.zeros((nodes, nodes))
            np.add.at(weights, (ends[:, 0], ends[:, 1]), 1.0)
            weights = weights + weights.T
            if not weights.trace() and weights.max() == 1:
                return cls(weights)

    def __call__(self, x: Array) -> Array:
        first, second = self._ends
        return (x[:, first] != x[:, second]) @ self._edges

    def optimum(self) -> float:
        """Node by node, with a table of the best cut for each side of the nodes that still have neighbours to come."""
        order = min((self._order(start) for start in range(min(8, self.dimension))), key=lambda found: found[0])
        if order[0] > _WIDEST:
            raise ValueError(
                f"The exact cut needs a table over {order[0]} nodes, more than {_WIDEST}: take a sparser or "
                "smaller graph."
            )
        table, frontier, done = np.zeros(()), list[int](), set[int]()
        for node in order[1]:
            table = np.stack([table, table], -1)
            for axis, other in enumerate(frontier):
                if self.weights[node, other]:
                    side = np.arange(2).reshape([2 if a == axis else 1 for a in range(table.ndim)])
                    table = table + self.weights[node, other] * (side != np.arange(2))
            frontier, done = [*frontier, node], done | {node}
            finished = [a for a, other in enumerate(frontier) if self._neighbours(other) <= done]
            table = table.max(axis=tuple(finished))
            frontier = [other for a, other in enumerate(frontier) if a not in finished]
        return float(table)

    def _neighbours(self, node: int) -> set[int]:
        return set(self.weights[node].nonzero()[0].tolist())

    def _order(self, start: int) -> tuple[int, list[int]]:
        """The widest table and an order of the nodes that keeps it narrow, each next one by what it leaves open."""
        neighbours = [self._neighbours(node) for node in range(self.dimension)]
        order, frontier, widest = list[int](), set[int](), 0

        def left_open(node: int) -> set[int]:
            done = {*order, node}
            return {other for other in {*frontier, node} if not neighbours[other] <= done}

        while len(order) < self.dimension:
            near = set().union(*(neighbours[node] for node in frontier)) - set(order)
            rest = near or set(range(self.dimension)) - set(order)
            node = start if not order else min(sorted(rest), key=lambda other: len(left_open(other)))
            widest = max(widest, len(frontier) + 1)
            frontier = left_open(node)
            order.append(node)
        return widest, order


class Knapsack(Problem):
    """The profit of the packed items; where they weigh more than the capacity, minus the excess.

    Args:
        weights: ``[n]``, positive whole numbers.
        profits: ``[n]``, positive.
        capacity: a whole number.

    Raises:
        ValueError: weights, profits or capacity are not of that kind.
    """

    name = "knapsack"

    def __init__(self, weights: Array, profits: Array, capacity: int) -> None:
        weights, profits = np.asarray(weights), np.asarray(profits, dtype=np.float64)
        whole = np.issubdtype(weights.dtype, np.integer) and weights.ndim == 1 and weights.shape == profits.shape
        if not whole or not ((weights > 0).all() and (profits > 0).all()) or capacity < 0:
            raise ValueError(
                f"weights {weights.tolist()} and profits {profits.tolist()} must be positive and equally many, "
                f"weights and capacity {capacity} whole numbers."
            )
        self.weights, self.profits, self.capacity, self.dimension = weights, profits, capacity, len(weights)

    @classmethod
    def random(cls, items: int, seed: int) -> Knapsack:
        """Weights of 1 to 1000, profits within 100 of them, room for half of the weight."""
        generator = np.random.default_rng(seed)
        weights = generator.integers(1, 1001, items)
        profits = np.maximum(weights + generator.integers(-100, 101, items), 1)
        return cls(weights, profits, int(weights.sum()) // 2)

    def __call__(self, x: Array) -> Array:
        excess = x @ self.weights - self.capacity
        return np.where(excess > 0, -excess, x @ self.profits)

    def optimum(self) -> float:
        best = np.zeros(self.capacity + 1)  # of each capacity, with the items so far
        for weight, profit in zip(self.weights.tolist(), self.profits.tolist(), strict=True):
            if weight <= self.capacity:
                best[weight:] = np.maximum(best[weight:], best[: self.capacity + 1 - weight] + profit)
        return float(best[-1])


class NK(Problem):
    """``f(x) = 1/n sum_i table[i, (x_j for j in neighbours[i])]``, the first of the neighbours being the highest digit.

    Source: Kauffman & Weinberger (1989), "The NK model of rugged fitness landscapes".

    Args:
        neighbours: ``[n, k + 1]``, which bits each table reads.
        table: ``[n, 2^(k + 1)]``.

    Raises:
        ValueError: the shapes do not belong together, or there are no such bits.
    """

    name = "nk"

    def __init__(self, neighbours: Array, table: Array) -> None:
        self.neighbours, self.table, self.dimension = np.asarray(neighbours), np.asarray(table), len(neighbours)
        width = self.neighbours.shape[1]
        if self.table.shape != (self.dimension, 2**width) or not (self.neighbours < self.dimension).all():
            raise ValueError(
                f"neighbours of shape {self.neighbours.shape} need a table of {(self.dimension, 2**width)}, but it has "
                f"shape {self.table.shape}; they are numbers below {self.dimension}."
            )
        self._digits = 2 ** np.arange(width)[::-1]

    @classmethod
    def random(cls, bits: int, others: int, seed: int, *, adjacent: bool) -> NK:
        """Uniform entries; adjacent: bits i, ..., i + k around a circle."""
        if not 0 <= others < bits:
            raise ValueError(f"A bit has {bits - 1} others, so k must be 0 to {bits - 1}, but it is {others}.")
        generator = np.random.default_rng(seed)
        if adjacent:
            neighbours = (np.arange(bits)[:, None] + np.arange(others + 1)) % bits
        else:
            drawn = [generator.choice(bits - 1, others, replace=False) for _ in range(bits)]
            neighbours = np.array([[i, *(j + (j >= i))] for i, j in enumerate(drawn)])
        problem = cls(neighbours, generator.random((bits, 2 ** (others + 1))))
        problem.name = "nk-adjacent" if adjacent else "nk-random"
        return problem

    def __call__(self, x: Array) -> Array:
        codes = x.astype(np.int64)[:, self.neighbours] @ self._digits
        return self.table[np.arange(self.dimension), codes].mean(1)

    def optimum(self) -> float:
        width = self.neighbours.shape[1]
        circle = (np.arange(self.dimension)[:, None] + np.arange(width)) % self.dimension
        if (self.neighbours != circle).any():
            return largest(self)
        # best[s, t]: bits 0 to k - 1 are s, bits i to i + k - 1 are t; after n steps t is s again
        states = 2 ** (width - 1)
        best = np.where(np.eye(states, dtype=bool), 0.0, -np.inf)
        for row in self.table:
            steps = best[:, :, None] + row.reshape(states, 2)  # of the state t and the next bit
            best = steps.reshape(states, 2, -1).max(1)  # the highest digit of t leaves
        return float(best.diagonal().max()) / self.dimension


def largest(problem: Problem) -> float:
    """The largest value over all strings, by enumeration; ValueError for more than 24 bits."""
    if problem.dimension > _WIDEST:
        raise ValueError(f"{problem.name} has 2^{problem.dimension} strings, too many to look at: at most 2^{_WIDEST}.")
    low = min(problem.dimension, 14)
    block = np.array(list(product((0, 1), repeat=low)), dtype=np.int8)
    best = -math.inf
    for head in product((0, 1), repeat=problem.dimension - low):
        rows = np.broadcast_to(np.array(head, dtype=np.int8), (len(block), len(head)))
        best = max(best, float(problem(np.concatenate([rows, block], 1)).max()))
    return best


def instances(size: int, seed: int) -> list[Problem]:
    """The six problems; of size n but for nk-random, which has at most 20 bits."""
    return [
        OneMax(size),
        LeadingOnes(size),
        MaxCut.random(size, seed),
        Knapsack.random(size, seed),
        NK.random(size, 4, seed, adjacent=True),
        NK.random(min(size, 20), 4, seed, adjacent=False),
    ]


class Account:
    """Evaluates a problem within a budget, and remembers when it became better.

    Args:
        problem: values ``[N]`` of strings ``[N, n]``.
        target: the optimum, at which a run ends.
        budget: how many strings may be evaluated.
    """

    def __init__(self, problem: Callable[[Array], Array], target: float, budget: int) -> None:
        self.spent, self.best, self.better = 0, -math.inf, list[tuple[int, float]]()
        self._problem, self._target, self._budget = problem, target, budget

    @property
    def hit(self) -> bool:
        """Whether the optimum was found, up to rounding."""
        return self.best >= self._target - 1e-9 * max(1.0, abs(self._target))

    @property
    def left(self) -> int:
        """How many strings may still be evaluated; none once the optimum was found."""
        return 0 if self.hit else self._budget - self.spent

    def __call__(self, x: Array) -> Array:
        """Values ``[N]``; of more strings than are left only the first ones are evaluated, the others are NaN."""
        paid = min(len(x), self.left)
        values = np.full(len(x), np.nan)
        values[:paid] = self._problem(x[:paid])
        for number, value in enumerate(values[:paid].tolist(), 1):
            if value > self.best:
                self.best = value
                self.better.append((self.spent + number, value))
        self.spent += paid
        return values


Optimiser: TypeAlias = Callable[[Account, int, int], None]
"""Spends an account on strings of n bits, by a seed."""


def bernoulli_search(account: Account, dimension: int, seed: int, popsize: int | None = None) -> None:
    """``BernoulliSearch``, started afresh where it stops."""
    generator = torch.Generator().manual_seed(seed)
    while account.left:
        strategy = sf.search.BernoulliSearch(dimension, popsize=popsize, seed=generator)
        while account.left and not strategy.stop:
            x = strategy.ask()
            strategy.tell(x, -account(x.numpy()))


def large_bernoulli_search(account: Account, dimension: int, seed: int) -> None:
    """The same with 4 n strings in each generation: slower, and less easily drawn into a poor optimum."""
    bernoulli_search(account, dimension, seed, popsize=4 * dimension)


def one_plus_one(account: Account, dimension: int, seed: int) -> None:
    """The (1+1) evolutionary algorithm; a string that would be a copy is drawn again."""
    generator = np.random.default_rng(seed)
    x = generator.integers(0, 2, (1, dimension), dtype=np.int8)
    value = account(x)[0]
    while account.left:
        flips = generator.random((1, dimension)) < 1 / dimension
        if flips.any():
            y = x ^ flips
            if (new := account(y)[0]) >= value:
                x, value = y, new


def local_search(account: Account, dimension: int, seed: int) -> None:
    """The first better neighbour in a random order; a fresh string where there is none."""
    generator = np.random.default_rng(seed)
    while account.left:
        x = generator.integers(0, 2, (1, dimension), dtype=np.int8)
        value, idle = account(x)[0], 0
        while account.left and idle < dimension:
            for bit in generator.permutation(dimension).tolist():
                x[0, bit] ^= 1
                new = account(x)[0]
                if new > value:
                    value, idle = new, 0
                else:
                    x[0, bit] ^= 1
                    idle += 1
                if not account.left or idle >= dimension:
                    break


def random_strings(account: Account, dimension: int, seed: int) -> None:
    """Independent uniform strings."""
    generator = np.random.default_rng(seed)
    while account.left:
        account(generator.integers(0, 2, (min(account.left, 1000), dimension), dtype=np.int8))


OPTIMISERS: dict[str, Optimiser] = {
    "scorefn": bernoulli_search,
    "scorefn 4n": large_bernoulli_search,
    "(1+1)-EA": one_plus_one,
    "local": local_search,
    "random": random_strings,
}


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

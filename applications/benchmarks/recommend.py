"""Does ``recommend`` find the cheapest estimator? Its winner beside the best of the shortlist, by long runs.

Problems: the exact anchors (one Bernoulli; three that share a logit; 200 of them; the square of a normal), eight
categoricals with a quadratic f, sharp and flat categoricals, a Poisson, a Gamma, a normal in ten dimensions, and one
whose f jumps, where the pathwise gradient is wrong. Each with 2, 4 and 8 evaluations per gradient, and ranked by
evaluations and by CPU seconds.

``Truth`` measures the whole shortlist again, independently and much longer: 4000 repeats of each, then all that are
within 1.5 times the best again, 100,000 repeats where they can be made in sweeps and 20,000 where not; the seconds are
medians of 300 interleaved single estimates. A pathwise gradient counts only where f is continuous, which is known here.
The score is the winner's true price over the least.

Run it with::

    python -m applications.benchmarks.recommend --budget 100000 --seed 0

Ctrl-C ends after the present problem; what was measured is written.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributions import (
    Bernoulli,
    Categorical,
    Distribution,
    Gamma,
    Independent,
    Normal,
    OneHotCategorical,
    Poisson,
)

import scorefn as sf
from applications.arguments import at_least
from applications.progress import Interruption, show_line
from applications.results import write_result
from scorefn.diagnostics import Estimation, compare, recommend, sample_gradients, shortlist

COSTS = {"evaluations": sf.diagnostics.evaluations, "seconds": sf.diagnostics.seconds}
LONG, LOOPED, SCREEN = 100_000, 20_000, 4_000
NEAR = 1.5


@dataclass(frozen=True)
class Problem:
    """What is to be differentiated.

    Args:
        name: of its row.
        make: returns p, f and the parameters, all in float64.
        continuous: whether f has no jumps, so that the pathwise gradient is right where there is one.
    """

    name: str
    make: Callable[[], tuple[Distribution, Callable[[Tensor], Tensor], list[Tensor]]]
    continuous: bool = True


def _parameter(value: Any) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64).requires_grad_()


def coin(p: float) -> Problem:
    """Anchor A: one Bernoulli in its logit, f = x."""

    def make() -> Any:
        logit = _parameter([p]).detach().logit().requires_grad_()
        return Bernoulli(logits=logit), lambda x: x.sum(-1), [logit]

    return Problem(f"one coin, p = {p}", make)


def shared(eta: float) -> Problem:
    """Anchor B: three Bernoullis that share a logit, ``f = sum (b - p0)^2``."""

    def make() -> Any:
        logit, target = _parameter(eta), torch.tensor([0.6, 0.51, 0.48], dtype=torch.float64)
        return Bernoulli(logits=logit.expand(3)), lambda x: (x - target).square().sum(-1), [logit]

    return Problem(f"three coins, one logit, {eta:g}", make)


def many(p: float) -> Problem:
    """Anchor C: 200 Bernoullis, ``f = mean (b - .499)^2``."""

    def make() -> Any:
        logits = torch.full((200,), p, dtype=torch.float64).logit().requires_grad_()
        return Bernoulli(logits=logits), lambda x: (x - 0.499).square().mean(-1), [logits]

    return Problem(f"200 coins, p = {p}", make)


def square() -> Problem:
    """Anchor D: the square of a Normal(1, 1), in mean and log-scale."""

    def make() -> Any:
        mean, log_scale = _parameter(1.0), _parameter(0.0)
        return Normal(mean, log_scale.exp()), torch.square, [mean, log_scale]

    return Problem("square of a normal", make)


def jump() -> Problem:
    """As ``square``, and f jumps by 5 at 0."""

    def make() -> Any:
        mean, log_scale = _parameter(1.0), _parameter(0.0)
        return Normal(mean, log_scale.exp()), lambda x: x.square() + 5.0 * (x > 0), [mean, log_scale]

    return Problem("square of a normal, with a jump", make, continuous=False)


def ten() -> Problem:
    """A smooth f in ten dimensions."""

    def make() -> Any:
        mean, log_scale = _parameter([0.5] * 10), _parameter([-0.5] * 10)
        p = Independent(Normal(mean, log_scale.exp()), 1)
        return p, lambda x: torch.log1p((x - 1).square().sum(-1)), [mean, log_scale]

    return Problem("normal in 10 dimensions", make)


def quadratic() -> Problem:
    """Eight categoricals of five values, f quadratic in the one-hot draws."""

    def make() -> Any:
        generator = torch.Generator().manual_seed(8)
        weights = torch.randn(40, 6, generator=generator, dtype=torch.float64)
        logits = torch.randn(8, 5, generator=generator, dtype=torch.float64).requires_grad_()
        return OneHotCategorical(logits=logits), lambda x: (x.flatten(-2) @ weights).square().sum(-1), [logits]

    return Problem("8 categoricals x 5, quadratic", make)


def categorical(sharpness: float, name: str) -> Problem:
    """Twenty values, with logits that are spread by ``sharpness``."""

    def make() -> Any:
        generator = torch.Generator().manual_seed(20)
        values, raw = (torch.randn(20, generator=generator, dtype=torch.float64) for _ in range(2))
        logits = (sharpness * raw).requires_grad_()
        return Categorical(logits=logits), lambda x: values[x], [logits]

    return Problem(f"{name} categorical of 20", make)


def poisson() -> Problem:
    """A squared loss of a count."""

    def make() -> Any:
        log_rate = _parameter(1.0)
        return Poisson(log_rate.exp()), lambda x: (x - 3.0).square(), [log_rate]

    return Problem("Poisson, squared loss", make)


def gamma() -> Problem:
    """A smooth f of a Gamma draw."""

    def make() -> Any:
        shape, rate = _parameter(2.0), _parameter(1.0)
        return Gamma(shape, rate), lambda x: torch.log1p(x).square(), [shape, rate]

    return Problem("Gamma, log(1 + x)^2", make)


PROBLEMS = (
    *(coin(p) for p in (0.5, 0.3, 0.1)),
    *(shared(eta) for eta in (0.0, -4.0)),
    *(many(p) for p in (0.5, 0.3, 0.1)),
    square(),
    jump(),
    ten(),
    quadratic(),
    categorical(3.0, "sharp"),
    categorical(0.3, "flat"),
    poisson(),
    gamma(),
)


@dataclass(frozen=True)
class Cell:
    """One recommendation and its judgement.

    Attributes:
        problem: its name.
        num_samples: evaluations per gradient.
        cost: by which it was ranked.
        winner: recommended.
        best: of the truth.
        ratio: true price of the winner over the least; 1 where both have no noise.
        decided: whether ``recommend`` said so.
        probability: that it stated.
        evaluations: spent.
        seconds: of CPU that the recommendation took.
    """

    problem: str
    num_samples: int
    cost: str
    winner: str
    best: str
    ratio: float
    decided: bool
    probability: float
    evaluations: int
    seconds: float


class Truth:
    """True variances and CPU seconds of the whole shortlist on a problem, from long runs.

    Args:
        problem: see ``Problem``.
        num_samples: evaluations per gradient.
        repeats: of a long run in sweeps.
        looped: of a long run one by one.
        screen: repeats of each before.
    """

    def __init__(
        self, problem: Problem, num_samples: int, repeats: int = LONG, looped: int = LOOPED, screen: int = SCREEN
    ) -> None:
        self.p, self.f, self.parameters = problem.make()
        self.evaluations: dict[str, int] = {}
        self.variance: dict[str, float] = {}
        self._repeats, self._looped = repeats, looped
        found = shortlist(self.p, self.f, num_samples).candidates
        self.candidates = {c.name: c for c in found if problem.continuous or not c.pathwise}
        for name in list(self.candidates):
            try:
                self.variance[name] = self._variance(name, screen)
                self.evaluations[name] = self._count(name)
            except sf.ScorefnError:  # it does not serve this problem
                del self.candidates[name]
        self.variance = {name: v for name, v in self.variance.items() if name in self.evaluations}
        self._floor = 1e-24 * max(self.variance.values())
        timed = compare({n: self._work(n) for n in self.variance}, self.parameters, repeats=300)
        self.seconds = {name: s.seconds for name, s in timed.statistics.items()}
        self._long = set[str]()
        for cost in COSTS:
            least = min(self.price(name, cost) for name in self.variance)
            for name in self.variance:
                if self.price(name, cost) <= NEAR * least:
                    self.measure(name)

    def measure(self, name: str) -> None:
        """Measure a variance by a long run, once."""
        if name not in self._long and self.variance[name] > self._floor:
            self._long.add(name)
            looped = self.candidates[name].pathwise or name == "optimal constant"
            self.variance[name] = self._variance(name, self._looped if looped else self._repeats)

    def price(self, name: str, cost: str) -> float:
        """Variance x cost; 0 where there is rounding only."""
        variance = self.variance[name] if self.variance[name] > self._floor else 0.0
        return variance * (self.evaluations[name] if cost == "evaluations" else self.seconds[name])

    def best(self, cost: str) -> str:
        """Of the least price."""
        return min(self.variance, key=lambda name: self.price(name, cost))

    def ratio(self, name: str, cost: str) -> float:
        """The price of one over the least."""
        self.measure(name)
        least, own = self.price(self.best(cost), cost), self.price(name, cost)
        return 1.0 if own == least else own / least if least > 0 else float("inf")

    def _work(self, name: str) -> Estimation:
        return Estimation(self.p, self.f, self.candidates[name].estimator)

    def _variance(self, name: str, repeats: int) -> float:
        gradients = sample_gradients(self._work(name), self.parameters, repeats)
        return float(gradients.var(0).sum())

    def _count(self, name: str) -> int:
        rows = 0

        def counted(x: Tensor) -> Tensor:
            nonlocal rows
            rows += len(x)
            return self.f(x)

        self.candidates[name].estimator(self.p, counted)
        return rows + (name == "DeltaMethod")  # which calls the f that it was given


def judge(problem: Problem, num_samples: int, budget: int, seed: int, truth: Truth) -> list[Cell]:
    """A recommendation for each cost, beside the truth."""
    cells = []
    for cost, function in COSTS.items():
        torch.manual_seed(seed)
        p, f, parameters = problem.make()
        start = time.process_time()
        found = recommend(p, f, parameters, budget, num_samples=num_samples, cost=function)
        taken = time.process_time() - start
        ratio = truth.ratio(found.winner, cost) if found.winner in truth.variance else float("inf")
        outcome = (found.decided, found.probability, found.evaluations, taken)
        cells.append(Cell(problem.name, num_samples, cost, found.winner, truth.best(cost), ratio, *outcome))
    return cells


def table(cells: Sequence[Cell]) -> str:
    """In Markdown, by problem and evaluations per gradient."""
    lines = [
        "| problem | evaluations | cost | winner | best | true price ratio | decided | spent | CPU s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for c in cells:
        lines.append(
            f"| {c.problem} | {c.num_samples} | {c.cost} | {c.winner} | {c.best} | {c.ratio:.3f} | "
            f"{'yes' if c.decided else 'no'} ({c.probability:.2f}) | {c.evaluations} | {c.seconds:.1f} |"
        )
    return "\n".join(lines)


def score(cells: Sequence[Cell], cost: str) -> dict[str, float]:
    """How many winners are within 10 % of the best: of all, and of those that were decided."""
    own = [c for c in cells if c.cost == cost]
    decided = [c for c in own if c.decided]
    return {
        "cells": len(own),
        "within_10_percent": sum(c.ratio <= 1.1 for c in own),
        "decided": len(decided),
        "decided_within_10_percent": sum(c.ratio <= 1.1 for c in decided),
    }


def plot(cells: Sequence[Cell], path: Path) -> None:
    """The ratios, sorted, for each cost."""
    from matplotlib import pyplot

    figure, ax = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    for cost in COSTS:
        ratios = sorted(min(c.ratio, 3.0) for c in cells if c.cost == cost)
        ax.plot(range(1, len(ratios) + 1), ratios, marker=".", label=cost)
    ax.axhline(1.1, color="grey", linestyle=":")
    ax.set_xlabel("problems, sorted")
    ax.set_ylabel("true price of the winner / least")
    ax.legend()
    figure.savefig(path)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> int:
    """Measure, judge, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--budget", type=at_least(32), default=100_000, help="evaluations of f for a recommendation")
    parser.add_argument("--samples", type=at_least(2), nargs="+", default=[2, 4, 8], help="evaluations per gradient")
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument("--repeats", type=at_least(1000), default=LONG, help="of the truth; a fifth where it is looped")
    parser.add_argument("--first", type=at_least(1), default=len(PROBLEMS), help="problems to take, from the first")
    parser.add_argument("--out", type=Path, default=Path("runs/recommend"), help="folder of result and plot")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    cells = list[Cell]()
    grid = [(problem, n) for problem in PROBLEMS[: options.first] for n in options.samples]
    with Interruption() as interrupted:
        for number, (problem, n) in enumerate(grid, 1):
            torch.manual_seed(1_000_000 + options.seed)
            screen = min(SCREEN, options.repeats)
            truth = Truth(problem, n, options.repeats, options.repeats // 5, screen)
            cells += judge(problem, n, options.budget, options.seed, truth)
            worst = max(c.ratio for c in cells[-2:])
            show_line(f"{number}/{len(grid)} {problem.name}, {n}: worst ratio {worst:.3f}", last=number == len(grid))
            if interrupted():
                break
    print(f"\n{table(cells)}\n")
    scores = {cost: score(cells, cost) for cost in COSTS}
    for cost, found in scores.items():
        print(f"{cost}: {found}")
    record = {"complete": not interrupted(), "scores": scores, "cells": [asdict(c) for c in cells]}
    write_result(options.out, vars(options), record)
    plot(cells, options.out / "recommend.png")
    return 130 if interrupted() else 0


if __name__ == "__main__":
    sys.exit(main())

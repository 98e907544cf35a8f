"""What it costs to know how noisy a gradient is: in sweeps, from outer products, and while a policy is trained.

    python -m applications.benchmarks.gradient_statistics [--repeats 1000] [--rounds 5] [--out runs/gradient_statistics]

*Repeats*: `gradient_statistics((p, f, estimator), params, 1000)`, its check and its single estimates for the clock
included, against the loop that calls the same estimator as often. The variance stands beside the exact one, where
that is known in closed form. *Moments*: the variance of each parameter of a policy network, 2 x 64 units, over 1000
draws: `GradientMeter` against the gradients of single draws (`torch.func.vmap`, and a loop, the exact reference) and
against 16 micro-batches, which only estimate it. *Training*: the same network trained with Adam, with and without a
meter that measures every 20th or every tenth step. CPU seconds, interleaved in one process, medians; ratios within a
round.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Independent, Normal

import scorefn as sf
from applications.arguments import at_least
from applications.progress import Interruption, show_line
from applications.results import write_result

F64 = torch.float64
DRAWS, MICRO_BATCHES = 1000, 16
Rows = Sequence[Mapping[str, Any]]
GOALS = {"repeats": 10.0, "training": 0.10}


@dataclass(frozen=True)
class Problem:
    """An estimation, and its exact total variance where that has a closed form."""

    name: str
    p: Any
    f: Callable[[Tensor], Tensor]
    estimator: Callable[[Any, Any], Tensor]
    parameters: tuple[Tensor, ...]
    exact: float | None = None

    def single(self) -> Tensor:
        """One gradient ``[P]``."""
        value = self.estimator(self.p, self.f).sum()
        found = torch.autograd.grad(value, self.parameters, retain_graph=True, materialize_grads=True)
        return torch.cat([g.reshape(-1) for g in found])

    def loop(self, repeats: int) -> float:
        """Total variance, one estimate after the other."""
        return float(torch.stack([self.single() for _ in range(repeats)]).var(0).sum())

    def sweeps(self, repeats: int) -> float:
        """Total variance, by the library."""
        found = sf.diagnostics.gradient_statistics((self.p, self.f, self.estimator), self.parameters, repeats)
        if found.looped is not None:
            raise RuntimeError(f"{self.name} was looped: {found.looped}")
        return found.total_variance


def problems() -> list[Problem]:
    """Small ones: coins, a normal, a network before p, and a bound whose f has a gradient of its own."""
    torch.manual_seed(0)
    coin = torch.tensor(0.3, dtype=F64).logit().requires_grad_()
    shared, target = torch.zeros((), dtype=F64, requires_grad=True), torch.tensor([0.6, 0.51, 0.48], dtype=F64)
    mean = torch.ones((), dtype=F64, requires_grad=True)
    logits = torch.randn(20, dtype=F64).requires_grad_()
    network = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 10)).to(F64)
    location, scale = torch.randn(5, dtype=F64).requires_grad_(), torch.zeros(5, dtype=F64, requires_grad=True)
    q = Independent(Normal(location, scale.exp()), 1)
    three = Bernoulli(logits=shared.expand(3))

    def distance(x: Tensor) -> Tensor:
        return (x - target).square().sum(-1)

    def parity(x: Tensor) -> Tensor:
        return (x.sum(-1) - 5).square()

    def bound(x: Tensor) -> Tensor:
        return q.log_prob(x) + x.cosh().log().sum(-1)

    coin_p, coins, normal = Bernoulli(logits=coin), Bernoulli(logits=logits), Normal(mean, 1.0)
    conditional = Bernoulli(logits=network(torch.randn(4, dtype=F64)))
    constant, antithetic = sf.Constant(4.0), sf.Antithetic()
    rows: list[tuple[Any, ...]] = [
        ("a coin, leave-one-out of 2", coin_p, _same, draws(2), (coin,), 0.0609),
        ("a coin, DisARM", coin_p, _same, sf.DisARM(), (coin,), 0.0294),
        ("three coins of one logit, leave-one-out of 4", three, distance, draws(4), (shared,), 0.0019875),
        ("three coins of one logit, unordered set of 4", three, distance, sf.UnorderedSet(4), (shared,), 0.00113083),
        ("a normal, one draw, the best constant", normal, torch.square, draws(1, baseline=constant), (mean,), 14.0),
        ("20 coins, leave-one-out of 16", coins, parity, draws(16), (logits,)),
        ("20 coins, antithetic pairs", coins, parity, draws(16, coupling=antithetic), (logits,)),
        ("20 coins, local expectation", coins, parity, sf.LocalExpectation(), (logits,)),
        ("10 coins behind a network, leave-one-out of 8", conditional, parity, draws(8), tuple(network.parameters())),
        ("evidence bound, 5 normals, leave-one-out of 8", q, bound, draws(8), (location, scale)),
    ]
    return [Problem(*row) for row in rows]


def draws(count: int, **parts: Any) -> Callable[[Any, Any], Tensor]:
    """`scorefn.expectation` of so many draws."""
    return partial(sf.expectation, num_samples=count, **parts)


def _same(x: Tensor) -> Tensor:
    return x


def clocked(candidates: Mapping[str, Callable[[], Any]], rounds: int) -> Iterator[dict[str, float]]:
    """CPU seconds of each candidate, one dictionary per round; the order turns from round to round."""
    names = list(candidates)
    for number in range(rounds):
        seconds = {}
        for name in names[number % len(names) :] + names[: number % len(names)]:
            start = time.process_time()
            candidates[name]()
            seconds[name] = time.process_time() - start
        yield seconds


def ratio(rounds: Sequence[Mapping[str, float]], above: str, below: str) -> float:
    """Median of the ratio within a round."""
    return median(one[above] / one[below] for one in rounds)


def measure_repeats(problem: Problem, repeats: int, rounds: int) -> dict[str, Any]:
    """Seconds of loop and sweeps, and both variances."""
    found: dict[str, list[float]] = {"loop": [], "sweeps": []}
    candidates = {
        "loop": lambda: found["loop"].append(problem.loop(repeats)),
        "sweeps": lambda: found["sweeps"].append(problem.sweeps(repeats)),
    }
    problem.sweeps(repeats)  # what torch sets up at its first batched pass is no part of it
    measured = list(clocked(candidates, rounds))
    return {
        "problem": problem.name,
        "loop_seconds": median(one["loop"] for one in measured),
        "sweeps_seconds": median(one["sweeps"] for one in measured),
        "ratio": ratio(measured, "loop", "sweeps"),
        "exact": problem.exact,
        "loop_variance": sum(found["loop"]) / rounds,
        "sweeps_variance": sum(found["sweeps"]) / rounds,
    }


class Policy:
    """A policy network at given observations, actions drawn once, and a fixed advantage for each.

    Args:
        draws: how many, N.
        dtype: of everything.
    """

    def __init__(self, draws: int, dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2)).to(
            dtype
        )
        self.observations = torch.randn(draws, 4, dtype=dtype)
        self.actions = Categorical(logits=self.network(self.observations)).sample()
        self.advantage = torch.randn(draws, dtype=dtype)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """By name."""
        return dict(self.network.named_parameters())

    def losses(self, part: slice = slice(None)) -> Tensor:
        """``[n]``, of some of the draws."""
        policy = Categorical(logits=self.network(self.observations[part]))
        return self.advantage[part] * policy.log_prob(self.actions[part])

    def backward(self) -> None:
        """What every training does."""
        self.network.zero_grad()
        self.losses().mean().backward()

    def by_meter(self) -> dict[str, Tensor]:
        """Variance of the gradient of the mean, from outer products; the gradient itself is made as well."""
        meter = sf.diagnostics.GradientMeter(self.network, every=1)
        with meter:
            self.backward()
        assert meter.latest is not None
        return dict(meter.latest.variance)

    def by_vmap(self) -> dict[str, Tensor]:
        """From the gradients of all draws at once."""
        held = {name: q.detach() for name, q in self.parameters.items()}

        def loss(parameters: dict[str, Tensor], seen: Tensor, action: Tensor, advantage: Tensor) -> Tensor:
            logits = torch.func.functional_call(self.network, parameters, seen)
            return advantage * logits.log_softmax(-1).gather(-1, action.unsqueeze(-1)).squeeze(-1)

        each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0, 0))
        found = each(held, self.observations, self.actions, self.advantage)
        return {name: g.var(0) / len(g) for name, g in found.items()}

    def by_loop(self, parts: int | None = None) -> dict[str, Tensor]:
        """From the gradient of each draw, or of each of so many micro-batches."""
        N, names = len(self.actions), list(self.parameters)
        bounds = torch.linspace(0, N, (parts or N) + 1).round().long().tolist()
        rows = [
            torch.autograd.grad(self.losses(slice(low, high)).mean(), list(self.parameters.values()))
            for low, high in itertools.pairwise(bounds)
        ]
        return {name: torch.stack([row[i] for row in rows]).var(0) / len(rows) for i, name in enumerate(names)}


def difference(found: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> float:
    """Root mean square of the error, relative to that of the exact variances."""
    error = sum(float((found[name] - exact[name]).double().square().sum()) for name in exact)
    return float((error / sum(float(v.double().square().sum()) for v in exact.values())) ** 0.5)


def measure_moments(draws: int, rounds: int) -> list[dict[str, Any]]:
    """Milliseconds of each way to the variances, what it adds to a gradient, and how far it is from the loop."""
    policy = Policy(draws)
    ways: dict[str, Callable[[], Any]] = {
        "gradient alone": policy.backward,
        "`GradientMeter`": policy.by_meter,
        "`torch.func.vmap`": policy.by_vmap,
        "loop over draws": policy.by_loop,
        f"{MICRO_BATCHES} micro-batches": partial(policy.by_loop, MICRO_BATCHES),
    }
    exact = policy.by_loop()
    for way in ways.values():
        way()
    measured = list(clocked(ways, rounds))
    rows = []
    for name, way in ways.items():
        milliseconds = 1e3 * median(one[name] for one in measured)
        error = None if name == "gradient alone" else difference(way(), exact)
        gradients = median(one[name] / one["gradient alone"] for one in measured)
        rows.append({"way": name, "milliseconds": milliseconds, "gradients": gradients, "error": error})
    return rows


def exactness(draws: int = 50) -> float:
    """How far the meter is from the loop over draws in double precision."""
    policy = Policy(draws, F64)
    return difference(policy.by_meter(), policy.by_loop())


def measure_training(draws: int, steps: int, rounds: int, every: int = 20) -> dict[str, Any]:
    """Seconds of so many training steps, without a meter and with one."""
    trainings: dict[str, Callable[[], None]] = {}
    for name, measured in (("plain", False), ("metered", True)):
        policy = Policy(draws)
        optimiser = torch.optim.Adam(policy.network.parameters(), 1e-3)
        meter = sf.diagnostics.GradientMeter(policy.network, every=every) if measured else nullcontext()

        def train(policy: Policy = policy, optimiser: torch.optim.Adam = optimiser, meter: Any = meter) -> None:
            for _ in range(steps):
                with meter:
                    policy.backward()
                optimiser.step()

        trainings[name] = train
    for train in trainings.values():
        train()
    found = list(clocked(trainings, rounds))
    return {
        "draws": draws,
        "every": every,
        "plain_milliseconds": 1e3 * median(one["plain"] for one in found) / steps,
        "overhead": ratio(found, "metered", "plain") - 1,
    }


def table(repeats: Rows, moments: Rows, training: Rows) -> str:
    """Three Markdown tables."""
    lines = ["| problem | loop, ms | sweeps, ms | loop / sweeps | variance, exact | sweeps | loop |", "|---" * 7 + "|"]
    for row in repeats:
        exact = "" if row["exact"] is None else f"{row['exact']:.4g}"
        lines.append(
            f"| {row['problem']} | {1e3 * row['loop_seconds']:.0f} | {1e3 * row['sweeps_seconds']:.1f} | "
            f"{row['ratio']:.0f} | {exact} | {row['sweeps_variance']:.4g} | {row['loop_variance']:.4g} |"
        )
    lines += ["", "| variances by | ms | in gradients | relative error |", "|---" * 4 + "|"]
    for row in moments:
        error = "" if row["error"] is None else f"{row['error']:.2g}"
        lines.append(f"| {row['way']} | {row['milliseconds']:.2f} | {row['gradients']:.1f} | {error} |")
    lines += ["", "| draws in a step | a step, ms | meter every | overhead |", "|---" * 4 + "|"]
    for row in training:
        lines.append(f"| {row['draws']} | {row['plain_milliseconds']:.2f} | {row['every']} | {row['overhead']:.1%} |")
    return "\n".join(lines)


def plot(repeats: Rows, path: Path) -> None:
    """How many times faster the sweeps are."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.4 * len(repeats) + 1.2), layout="constrained")
    ax = figure.subplots()
    ax.barh([row["problem"] for row in repeats], [row["ratio"] for row in repeats])
    ax.axvline(GOALS["repeats"], color="black", linestyle="--", label="goal")
    ax.invert_yaxis()
    ax.set_xscale("log")
    ax.set_xlabel("CPU seconds of the loop / of the sweeps")
    ax.legend()
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> int:
    """Measure, print the tables, and leave result and plot."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeats", type=at_least(100), default=1000, help="of every estimate")
    parser.add_argument("--rounds", type=at_least(1), default=5, help="measurements, of which the median counts")
    parser.add_argument("--steps", type=at_least(1), default=100, help="training steps of one measurement")
    parser.add_argument("--draws", type=at_least(32), default=DRAWS, help="in a training step")
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/gradient_statistics"), help="folder of result and plot")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    repeats, moments, training = list[dict[str, Any]](), list[dict[str, Any]](), list[dict[str, Any]]()
    waiting = problems()
    torch.manual_seed(options.seed)
    with Interruption() as interrupted:
        for number, problem in enumerate(waiting, 1):
            repeats.append(measure_repeats(problem, options.repeats, options.rounds))
            line = f"{number}/{len(waiting)} {problem.name}: {repeats[-1]['ratio']:.0f} times faster"
            show_line(f"{line:<78}", last=number == len(waiting) or interrupted())
            if interrupted():
                break
        if not interrupted():
            moments = measure_moments(options.draws, 2 * options.rounds)
        few = max(options.draws // 16, 32)
        for count, every in ((options.draws, 20), (few, 20), (options.draws, 10), (few, 10)):
            if not interrupted():
                training.append(measure_training(count, options.steps, 2 * options.rounds + 1, every))
    print(f"\n{table(repeats, moments, training)}\n\nmeter against the loop over draws, float64: {exactness():.1e}")
    record = {
        "complete": not interrupted(),
        "goals": GOALS,
        "repeats": repeats,
        "moments": moments,
        "training": training,
    }
    write_result(options.out, vars(options), record)
    plot(repeats, options.out / "gradient_statistics.png")
    return 130 if interrupted() else 0


if __name__ == "__main__":
    sys.exit(main())

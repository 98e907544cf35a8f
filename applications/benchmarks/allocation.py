"""What the allocation of draws saves: per problem, per site, and over a training run.

Three experiments, each beside what is exact:

* ``problems``: 64 bandits of 10 arms share a budget of 8 draws each. Half-learnt ones are noisy, decided ones are not.
  The same draws for all, against ``draws_per_problem`` from exact moments and from measured ones (``problem_noise``).
  The variance of every allocation is exact, by sums over the arms.
* ``sites``: a chain of three sites whose draws cost 20, 4 and 1, in a ``StochasticGraph``. One nested draw each, the
  same number everywhere, and ``NestedAllocation`` from exact and from measured components. Variances are exact, by the
  sum over all 512 states, and measured beside.
* ``training``: a factorised guide of 20 coupled bits, gradient descent with momentum. Evaluations of f until the exact
  objective is within 10 % and 1 % of its starting distance from the optimum: a grid of fixed N against
  ``SampleSize``.

Run it with::

    OMP_NUM_THREADS=1 python -m applications.benchmarks.allocation

Ctrl-C ends after the present run; what was measured is still written. ``Bandits``, ``Chain``, ``Coupled`` and ``train``
are meant to be imported and copied.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Independent

import scorefn as sf
from applications.arguments import at_least
from applications.over_seeds import interquartile_mean
from applications.progress import Interruption, show_line
from applications.results import write_result
from scorefn.diagnostics import (
    NestedAllocation,
    ProblemNoise,
    SampleSize,
    draws_per_problem,
    expectation_per_problem,
    nested_variances,
    problem_noise,
    value_gradients,
)

GRID = (8, 32, 128, 512)
TARGETS = (0.25, 1.0, 4.0)
GAPS = (0.1, 0.01)


# ------------------------------------------------------------------------------------------------------------- problems


class Bandits:
    """B bandits with K arms and a softmax policy each; problem b is decided as far as its logits are far apart.

    Args:
        spread: the logits of the bandits have standard deviations from 0 to this; 0: all bandits are alike.
        B: how many bandits.
        K: arms of each.
        seed: of logits and rewards.
    """

    def __init__(self, spread: float, B: int = 64, K: int = 10, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        scale = torch.linspace(0, spread, B, dtype=torch.float64).unsqueeze(-1)
        self.logits = (torch.randn(B, K, generator=generator, dtype=torch.float64) * scale).requires_grad_()
        self.rewards = torch.randn(B, K, generator=generator, dtype=torch.float64)

    @property
    def policy(self) -> Categorical:
        """Batch shape ``[B]``."""
        return Categorical(logits=self.logits)

    def f(self, x: Tensor, problem: Tensor) -> Tensor:
        """The reward of arm x ``[...]`` of these problems."""
        return self.rewards[problem, x]

    def of_all(self, x: Tensor) -> Tensor:
        """Of draws ``[N, B]``."""
        return self.f(x, torch.arange(len(self.logits)))

    def exact_noise(self) -> ProblemNoise:
        """v and w of leave-one-out, by the sum over arms."""
        p = self.policy.probs.detach()
        value = (p * self.rewards).sum(-1, keepdim=True)
        score = 1 - 2 * p + p.square().sum(-1, keepdim=True)  # |e_k - p|^2
        signal = (p * (self.rewards - value)).square().sum(-1)
        v = (p * (self.rewards - value).square() * score).sum(-1) - signal
        w = (p * (self.rewards - value).square()).sum(-1) * (p * score).sum(-1) + signal
        return ProblemNoise(v, w)

    def measured_variance(self, counts: Tensor, repeats: int) -> float:
        """Of ``expectation_per_problem``, over repeats, about the exact gradient."""
        exact = torch.autograd.grad((self.policy.probs * self.rewards).sum(), self.logits)[0]
        total = 0.0
        for _ in range(repeats):
            value = expectation_per_problem(self.policy, self.f, counts).sum()
            total += float((torch.autograd.grad(value, self.logits)[0] - exact).square().sum())
        return total / repeats


def problems(spread: float, repeats: int, each: int = 8) -> dict[str, Any]:
    """Total variances at a budget of so many draws for each problem; the pilots' are means over repeats."""
    bandits = Bandits(spread)
    noise, B = bandits.exact_noise(), len(bandits.logits)
    uniform = torch.full((B,), each)
    best = draws_per_problem(noise.variance, B * each, excess=noise.excess)
    rows: dict[str, Any] = {
        "same for all": _row(noise, uniform, bandits.measured_variance(uniform, repeats)),
        "exact moments": _row(noise, best, bandits.measured_variance(best, repeats)),
    }
    for pilot in (8, 32, 128):
        found = [
            problem_noise(bandits.policy, bandits.of_all, bandits.logits, pilot).draws(B * each)
            for _ in range(max(repeats // 50, 2))
        ]
        variances = [float(noise.at(counts).sum()) for counts in found]
        rows[f"pilot of {pilot}"] = {"exact": mean(variances), "worst": max(variances)}
    base = rows["same for all"]["exact"]
    for row in rows.values():
        row["ratio"] = row["exact"] / base
    return rows


def _row(noise: ProblemNoise, counts: Tensor, measured: float) -> dict[str, Any]:
    least, most = int(counts.min()), int(counts.max())
    return {"exact": float(noise.at(counts).sum()), "measured": measured, "least": least, "most": most}


# ---------------------------------------------------------------------------------------------------------------- sites


class Chain:
    """z -> h -> y, three bits each; the cost is the distance of y from a target, weighted by the bits of z.

    Args:
        seed: of the parameters.
    """

    costs = (20.0, 4.0, 1.0)

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        shapes: list[tuple[int, ...]] = [(3,), (3, 3), (3, 3)]
        self.params = [torch.randn(q, generator=generator, dtype=torch.float64).requires_grad_() for q in shapes]
        states = torch.arange(8).unsqueeze(-1).bitwise_and(torch.tensor([1, 2, 4])).ne(0).double()
        self.states = [states[i] for i in torch.meshgrid(*[torch.arange(8)] * 3, indexing="ij")]
        value, log_probs = self.cost(self.states[0], self.states[2]), self.log_probs(*self.states)
        first, second, third = (part.detach().exp() for part in log_probs)
        self.weights = first[:, 0, 0], second[:, :, 0], third  # of z; of h given z; of y given h
        self.mean = self.exact_mean().item()
        self.gradients = value_gradients((value - self.mean) * sum(log_probs), self.params)  # [8, 8, 8, P]

    def log_probs(self, z: Tensor, h: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of z, of h given z, and of y given h."""
        a, b, c = (Bernoulli(logits=logits) for logits in self.logits(z, h))
        return a.log_prob(z).sum(-1), b.log_prob(h).sum(-1), c.log_prob(y).sum(-1)

    def logits(self, z: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of the three sites."""
        a, b, c = self.params
        return a, (2 * z - 1) @ b, (2 * h - 1) @ c

    def cost(self, z: Tensor, y: Tensor) -> Tensor:
        """``[...]``."""
        return ((y - 0.45).square() * (1 + z)).sum(-1)

    def exact_mean(self) -> Tensor:
        """Of the cost, differentiable."""
        z, h, y = self.states
        return (sum(self.log_probs(z, h, y), torch.zeros(())).exp() * self.cost(z, y)).sum()

    def exact_variances(self) -> tuple[float, float, float]:
        """V_1, V_2, V_3 of the gradient with the exact mean as baseline."""
        first, second, third = self.weights
        given_h = (third.unsqueeze(-1) * self.gradients).sum(2)
        given_z = (second.unsqueeze(-1) * given_h).sum(1)
        mean = (first.unsqueeze(-1) * given_z).sum(0)
        inner = (third * (self.gradients - given_h.unsqueeze(2)).square().sum(-1)).sum(2)
        middle = (second * (given_h - given_z.unsqueeze(1)).square().sum(-1)).sum(1)
        outer = (given_z - mean).square().sum(-1)
        return tuple(float((first * v).sum()) for v in (outer, middle, (second * inner).sum(1)))  # type: ignore

    def run(self, counts: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
        """The graph's estimate, and the surrogate of each innermost draw ``[n_1, n_2, n_3]``."""
        z = h = torch.zeros(3, dtype=torch.float64)
        with sf.StochasticGraph(counts[0], baseline=None) as g:
            z = g.sample("z", Bernoulli(logits=self.logits(z, h)[0]))
            h = g.sample("h", Bernoulli(logits=self.logits(z, z)[1]), num_samples=counts[1])
            y = g.sample("y", Bernoulli(logits=self.logits(h, h)[2]), num_samples=counts[2])
            value = self.cost(z[:, None, None], y) - self.mean
            g.cost("cost", value)
        score = g.log_prob("z").sum(-1)[:, None, None] + g.log_prob("h").sum(-1).unsqueeze(-1) + g.log_prob("y").sum(-1)
        return g.surrogate().mean(), value.detach() * score


def sites(repeats: int) -> dict[str, Any]:
    """Price of precision, variance x cost, relative to one nested draw each."""
    chain = Chain()
    plan = NestedAllocation(chain.exact_variances(), chain.costs)
    exact = torch.autograd.grad(chain.exact_mean(), chain.params)
    truth = torch.cat([g.reshape(-1) for g in exact])
    pilots = []
    for _ in range(max(repeats // 50, 2)):
        found = nested_variances(value_gradients(chain.run((32, 3, 2))[1], chain.params))
        pilots.append(NestedAllocation([max(V, 0.0) for V in found], chain.costs).num_samples)
    rows: dict[str, Any] = {}
    named = {"one each": (1, 1), "four and three": (4, 3), "exact components": plan.num_samples}
    for name, nested in named.items():
        counts = (4, *nested)
        deviations = []
        for _ in range(repeats):
            rows_ = value_gradients(chain.run(_distinct(counts))[0], chain.params)
            deviations.append(float((rows_ - truth).square().sum()))
        rows[name] = {
            "draws": list(nested),
            "price": plan.price(nested),
            "exact": plan.variance_at(_distinct(counts)),
            "measured": mean(deviations),
        }
    rows["pilot of 32 x 3 x 2"] = {"price": mean(plan.price(n) for n in pilots), "draws": list(_commonest(pilots))}
    for row in rows.values():
        row["ratio"] = row["price"] / rows["one each"]["price"]
    return {"components": list(plan.variance), "rows": rows}


def _distinct(counts: tuple[int, ...]) -> tuple[int, int, int]:
    """As a graph takes it: an axis may not be as long as the one before."""
    a, b, c = counts
    return (a + 1 if a == b else a), b, c


def _commonest(found: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    return max(set(found), key=list(found).count)


# ------------------------------------------------------------------------------------------------------------- training


class Coupled:
    """D coupled bits and a factorised q: ``f(x) = (x - t)^T A (x - t) + log q(x)``, whose mean is known.

    Where 2 A without its diagonal has no eigenvalue below -4, the mean is convex in the probabilities.

    Args:
        seed: of A and t.
        D: bits.
    """

    def __init__(self, seed: int, D: int = 20) -> None:
        generator = torch.Generator().manual_seed(seed)
        root = torch.randn(D, D, generator=generator, dtype=torch.float64)
        self.matrix = root @ root.T / D
        self.target = torch.rand(D, generator=generator, dtype=torch.float64)

    def energy(self, x: Tensor) -> Tensor:
        """``[N, D] -> [N]``."""
        away = x - self.target
        value: Tensor = (away @ self.matrix * away).sum(-1)
        return value

    def f(self, x: Tensor, logits: Tensor) -> Tensor:
        """``[N, D] -> [N]``; the gradient of log q has mean 0 and is left out."""
        value: Tensor = self.energy(x) + Bernoulli(logits=logits.detach()).log_prob(x).sum(-1)
        return value

    def exact(self, logits: Tensor) -> Tensor:
        """E f."""
        p = logits.sigmoid()
        entropy = Bernoulli(p).entropy().sum(-1)
        value: Tensor = self.energy(p) + (self.matrix.diagonal() * p * (1 - p)).sum(-1) - entropy
        return value


@dataclass(frozen=True)
class Training:
    """A run.

    Attributes:
        evaluations: of f, until each gap was reached; None where it was not.
        last: draws per step at the end.
        steps: how many were taken.
    """

    evaluations: tuple[int | None, ...]
    last: int
    steps: int


def train(
    problem: Coupled,
    size: SampleSize | int,
    seed: int,
    budget: int,
    best: float,
    *,
    gaps: Sequence[float] = GAPS,
    learning_rate: float = 0.05,
    momentum: float = 0.9,
) -> Training:
    """Gradient descent with momentum from q = 1/2; gaps are distances from the optimum, relative to the first.

    Args:
        problem: what to minimise.
        size: draws per step, fixed or adaptive.
        seed: of the draws.
        budget: evaluations of f.
        best: the optimum.
        gaps: to reach.
        learning_rate: of the descent.
        momentum: likewise.
    """
    torch.manual_seed(seed)
    logits = torch.zeros(len(problem.target), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([logits], learning_rate, momentum)
    first, N = float(problem.exact(logits.detach())), 0
    reached: list[int | None] = [None] * len(gaps)
    spent = steps = 0
    while spent < budget and None in reached:
        N = size if isinstance(size, int) else size.num_samples
        draws = sf.draw(Independent(Bernoulli(logits=logits), 1), partial(problem.f, logits=logits), N)
        surrogate = sf.surrogate(draws, baseline=sf.LeaveOneOut())
        if isinstance(size, SampleSize):
            size.observe(surrogate, logits)
        optimizer.zero_grad()
        surrogate.mean().backward()
        optimizer.step()
        spent, steps = spent + N, steps + 1
        gap = (float(problem.exact(logits.detach())) - best) / (first - best)
        reached = [spent if now is None and gap <= wanted else now for now, wanted in zip(reached, gaps, strict=True)]
    return Training(tuple(reached), N, steps)


def optimum(problem: Coupled, steps: int = 2000) -> float:
    """Where descent on the exact gradient ends."""
    logits = torch.zeros(len(problem.target), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([logits], 0.2, 0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        problem.exact(logits).backward()
        optimizer.step()
    return float(problem.exact(logits.detach()))


def adaptive(target: float) -> SampleSize:
    """Such as the training runs have."""
    return SampleSize(target, least=GRID[0], most=GRID[-1], every=10)


def training(
    seeds: int, budget: int, shown: Callable[[str], None], should_stop: Callable[[], bool] = lambda: False
) -> dict[str, Any]:
    """Evaluations to reach each gap, by seed; None: not within the budget."""
    ways: dict[str, Callable[[], SampleSize | int]] = {f"N = {N}": partial(int, N) for N in GRID}
    ways |= {f"SNR {target:g}": partial(adaptive, target) for target in TARGETS}
    rows: dict[str, Any] = {name: {"evaluations": [], "last": []} for name in ways}
    for seed in range(seeds):
        problem = Coupled(seed)
        best = optimum(problem)
        for name, make in ways.items():
            found = train(problem, make(), seed, budget, best)
            rows[name]["evaluations"].append(found.evaluations)
            rows[name]["last"].append(found.last)
            shown(f"training: seed {seed}, {name}: {found.evaluations}")
            if should_stop():
                return rows
    return rows


def meter_overhead(steps: int = 200, num_samples: int = 64, features: int = 64) -> float:
    """CPU time of a training step with ``observe`` over one without, a ratio of sums, in turns."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(features, 128), torch.nn.Tanh(), torch.nn.Linear(128, 10))
    inputs, rewards = torch.randn(50, features), torch.randn(50, 10)
    parameters, size = list(net.parameters()), SampleSize(1.0, most=num_samples)
    seconds = {True: 0.0, False: 0.0}
    for number in range(2 * steps):
        measured = number % 2 == 0
        begin = time.process_time()
        draws = sf.draw(Categorical(logits=net(inputs)), lambda x: rewards.gather(1, x.T).T, num_samples)
        surrogate = sf.surrogate(draws, baseline=sf.LeaveOneOut())
        if measured:
            size.observe(surrogate, parameters)
        net.zero_grad()
        surrogate.mean().backward()
        if number >= 20:
            seconds[measured] += time.process_time() - begin
    return seconds[True] / seconds[False]


# -------------------------------------------------------------------------------------------------------------- program


def render(record: dict[str, Any]) -> str:
    """Tables in Markdown."""
    lines = []
    for spread, rows in record.get("problems", {}).items():
        lines += [f"Bandits, logits spread up to {spread}:", "", "| draws | variance, exact | measured | ratio | n_b |"]
        lines += ["|---|---|---|---|---|"]
        for name, row in rows.items():
            measured = f"{row['measured']:.3f}" if "measured" in row else f"(worst {row['worst']:.3f})"
            counts = f"{row['least']} to {row['most']}" if "least" in row else ""
            lines.append(f"| {name} | {row['exact']:.3f} | {measured} | {row['ratio']:.3f} | {counts} |")
        lines.append("")
    if "sites" in record:
        lines += ["| nested draws of h, y | price | ratio | variance, exact | measured |", "|---|---|---|---|---|"]
        for name, row in record["sites"]["rows"].items():
            both = f"{row['exact']:.5f} | {row['measured']:.5f}" if "exact" in row else "|"
            lines.append(f"| {name}: {tuple(row['draws'])} | {row['price']:.3f} | {row['ratio']:.3f} | {both} |")
        lines.append("")
    if "training" in record:
        titles = " | ".join(f"gap {gap:.0%}" for gap in GAPS)
        lines += [f"| draws per step | {titles} | N at the end |", "|---|" + "---|" * (len(GAPS) + 1)]
        for name, row in record["training"].items():
            cells = []
            for found in zip(*row["evaluations"], strict=True):
                done = [count for count in found if count is not None]
                middle = f"{float(interquartile_mean(done)):,.0f}" if done else "-"
                cells.append(middle + ("" if len(done) == len(found) else f" ({len(done)} of {len(found)})"))
            last = f"{median(row['last']):.0f}" if row["last"] else "-"
            lines.append(f"| {name} | {' | '.join(cells)} | {last} |")
        lines.append("")
    if "overhead" in record:
        lines.append(f"A step with `observe` takes {record['overhead']:.3f} times as long as one without.")
    return "\n".join(lines)


def plot(rows: dict[str, Any], path: Path) -> None:
    """Evaluations of each way to each gap, by seed; what was not reached is not drawn."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot()
    for number, gap in enumerate(GAPS):
        points = [
            (x + 0.15 * number, found[number])
            for x, row in enumerate(rows.values())
            for found in row["evaluations"]
            if found[number] is not None
        ]
        axes.plot([x for x, _ in points], [y for _, y in points], "o", label=f"gap {gap:.0%}", alpha=0.7)
    axes.set(yscale="log", ylabel="evaluations of f")
    axes.set_xticks(range(len(rows)), list(rows))
    axes.legend()
    figure.savefig(path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write ``result.json``, ``tables.md`` and a plot."""
    parser = argparse.ArgumentParser(description="What the allocation of draws saves.")
    parser.add_argument("--seeds", type=at_least(1), default=5, help="of the training runs")
    parser.add_argument("--repeats", type=at_least(100), default=1000, help="estimates behind a measured variance")
    parser.add_argument("--budget", type=at_least(GRID[-1]), default=40_000, help="evaluations of f of a training run")
    parser.add_argument("--out", type=Path, default=Path("runs/allocation"), help="folder for what is written")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    record: dict[str, Any] = {"problems": {}}
    started = time.process_time()
    with Interruption() as interrupted:
        for spread in (0, 3, 6):
            if not interrupted():
                record["problems"][str(spread)] = problems(spread, options.repeats)
                show_line(f"problems: spread {spread} done", last=False)
        if not interrupted():
            record["sites"] = sites(options.repeats)
            show_line("sites: done", last=False)
        if not interrupted():
            record["overhead"] = meter_overhead()
        if not interrupted():
            show = partial(show_line, last=False)
            record["training"] = training(options.seeds, options.budget, show, interrupted)
    record["seconds"] = time.process_time() - started
    path = write_result(options.out, vars(options), record)
    tables = render(record)
    (options.out / "tables.md").write_text(tables + "\n", encoding="utf-8")
    if any(row["evaluations"] for row in record.get("training", {}).values()):
        plot(record["training"], options.out / "training.png")
    show_line(f"\n{tables}\n{record['seconds']:.0f} CPU seconds; written to {path.parent}", last=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

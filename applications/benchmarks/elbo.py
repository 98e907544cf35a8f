"""What a step of ScoreFunctionELBO costs beside Pyro's losses, and how noisy its gradient is.

    python -m applications.benchmarks.elbo [--repeats 30] [--out docs/figures/elbo.md]

Every loss runs the same model and guide on one thread, interleaved, in CPU seconds of ``loss_and_grads``; argument
validation is off for all. A ratio is the median of the ratios of neighbouring repeats. A variance is the sum over all
parameters of the guide and given the minibatch; the decaying average of ``TraceGraph_ELBO`` and the coefficients of
``ScoreFunctionELBO`` learn on other minibatches before, and go on learning on them in between.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import ELBO, SVI, Trace_ELBO, TraceGraph_ELBO
from torch import Tensor

from applications.vi.images import digits
from scorefn.posteriors import ScoreFunctionELBO, elbo

Step = Callable[[], object]
WARM_UP = 100
TRAINING = 1000


class Chain:
    """A chain of n Bernoulli sites, each with a noisy observation."""

    def __init__(self, n: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.n = n
        self.x = torch.randn(n, generator=generator)

    def next(self) -> None:
        """There is no other data."""

    @property
    def params(self) -> list[Tensor]:
        return [pyro.param("chain").unconstrained()]

    def model(self) -> None:
        z = torch.zeros(())
        for t in range(self.n):
            z = pyro.sample(f"z{t}", dist.Bernoulli(logits=z - 0.5))
            pyro.sample(f"x{t}", dist.Normal(z, 1.0), obs=self.x[t])

    def guide(self) -> None:
        logits = pyro.param("chain", torch.zeros(self.n))
        for t in range(self.n):
            pyro.sample(f"z{t}", dist.Bernoulli(logits=logits[t]))


class BeliefNet:
    """Binary digits of 64 pixels, 200 Bernoulli latents, linear encoder and decoder."""

    def __init__(self, average: bool = False, latents: int = 200, batch: int = 50) -> None:
        generator = torch.Generator().manual_seed(0)
        self.data, self.batch = digits().train, batch
        self.next()
        pixels = self.data.shape[1]
        self.initial = {
            "encoder": 0.1 * torch.randn(pixels, latents, generator=generator),
            "decoder": 0.1 * torch.randn(latents, pixels, generator=generator),
            "prior": torch.zeros(latents),
        }
        self.infer = {"baseline": {"use_decaying_avg_baseline": True}} if average else {}

    def next(self) -> None:
        """Another minibatch."""
        self.x = self.data[torch.randperm(len(self.data))[: self.batch]]

    @property
    def params(self) -> list[Tensor]:
        return [pyro.param("encoder").unconstrained()]

    def param(self, name: str) -> Tensor:
        value: Tensor = pyro.param(name, self.initial[name])
        return value

    def model(self) -> None:
        with pyro.plate("data", len(self.x)):
            z = pyro.sample("z", dist.Bernoulli(logits=self.param("prior")).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=z @ self.param("decoder")).to_event(1), obs=self.x)

    def guide(self) -> None:
        with pyro.plate("data", len(self.x)):
            pyro.sample("z", dist.Bernoulli(logits=self.x @ self.param("encoder")).to_event(1), infer=self.infer)

    def log_joint(self, z: Tensor) -> Tensor:
        log_prior = torch.distributions.Bernoulli(logits=self.param("prior")).log_prob(z).sum(-1)
        return log_prior + torch.distributions.Bernoulli(logits=z @ self.param("decoder")).log_prob(self.x).sum(-1)

    def plain(self, num_particles: int) -> Step:
        def step() -> None:
            q = torch.distributions.Bernoulli(logits=self.x @ self.param("encoder"))
            (-elbo(self.log_joint, q, num_particles).sum()).backward()

        return step

    def by_hand(self, num_particles: int) -> Step:
        def step() -> None:
            q = torch.distributions.Bernoulli(logits=self.x @ self.param("encoder"))
            z = q.sample((num_particles,))
            log_q = q.log_prob(z).sum(-1)
            log_p = self.log_joint(z)
            f = (log_p - log_q).detach()
            weight = leave_one_out(f)
            (-(weight * log_q + log_p).mean(0).sum()).backward()

        return step


def leave_one_out(f: Tensor) -> Tensor:
    """Values ``[S, ...]`` less the mean of the others; a single one as it is."""
    return f if len(f) == 1 else (f - f.mean(0)) * (len(f) / (len(f) - 1))


def cpu_seconds(steps: dict[str, Step], repeats: int, inner: int = 1) -> dict[str, list[float]]:
    """Of each step, in turn; the first two rounds are not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(repeats + 2):
        for name, step in steps.items():
            start = time.process_time()
            for _ in range(inner):
                step()
            if repeat >= 2:
                seconds[name].append((time.process_time() - start) / inner)
    return seconds


def ratio(first: list[float], second: list[float]) -> float:
    return median(a / b for a, b in zip(first, second, strict=True))


def variance(step: Step, problem: Any, repeats: int) -> float:
    """Given the data: half the mean squared distance of two gradients, with a step on other data between."""
    total = 0.0
    for _ in range(repeats):
        pair = list[Tensor]()
        mine = problem.x
        for _ in range(2):
            problem.x = mine
            for param in problem.params:
                param.grad = None
            step()
            pair.append(torch.cat([param.grad.flatten() for param in problem.params]).double())
            problem.next()
            step()
        problem.next()
        total += float((pair[0] - pair[1]).square().sum()) / (2 * repeats)
    return total


def step_of(loss: ELBO, problem: Any) -> Step:
    return lambda: loss.loss_and_grads(problem.model, problem.guide)


def chains(repeats: int, draws: int) -> list[str]:
    rows = [
        "| n | loss | CPU ms | ratio to Trace_ELBO | variance |",
        "|---|---|---|---|---|",
    ]
    for n in (5, 20, 100, 300):
        problem = Chain(n)
        pyro.clear_param_store()
        losses = {
            "`Trace_ELBO`": Trace_ELBO(max_plate_nesting=0),
            "`TraceGraph_ELBO`": TraceGraph_ELBO(max_plate_nesting=0),
            '`ScoreFunctionELBO`, `"order"`': ScoreFunctionELBO(max_plate_nesting=0),
            '`ScoreFunctionELBO`, `"tracked"`, cached': ScoreFunctionELBO(max_plate_nesting=0, dependencies="tracked"),
        }
        steps = {name: step_of(loss, problem) for name, loss in losses.items()}
        seconds = cpu_seconds(steps, max(3, repeats * 20 // (n + 20)), max(1, 40 // n))
        for name, step in steps.items():
            scarce = n > 20 and "Graph" in name  # its step takes up to seconds
            noise = "" if scarce else f"{variance(step, problem, max(25, 4 * draws // n)):.3g}"
            against = ratio(seconds[name], seconds["`Trace_ELBO`"])
            rows.append(f"| {n} | {name} | {1e3 * median(seconds[name]):.3g} | {against:.2f} | {noise} |")
    return rows


def latents(repeats: int, draws: int, particles: int = 16) -> list[str]:
    pyro.clear_param_store()
    options = {"num_particles": particles, "vectorize_particles": True, "max_plate_nesting": 2}
    plain, averaged = BeliefNet(), BeliefNet(average=True)
    problems = {
        "`Trace_ELBO`": (Trace_ELBO(**options), plain),
        "`TraceGraph_ELBO`": (TraceGraph_ELBO(**options), plain),
        "`TraceGraph_ELBO`, decaying average": (TraceGraph_ELBO(**options), averaged),
        '`ScoreFunctionELBO`, `"order"`': (ScoreFunctionELBO(**options), plain),
        '`ScoreFunctionELBO`, `"tracked"`': (ScoreFunctionELBO(**options, dependencies="tracked"), plain),
    }
    svi = SVI(plain.model, plain.guide, pyro.optim.Adam({"lr": 0.01}), ScoreFunctionELBO(**options))
    for _ in range(TRAINING):
        plain.next()
        svi.step()
    steps = {name: step_of(*pair) for name, pair in problems.items()}
    steps |= {"`elbo`, plain torch": plain.plain(particles), "loop by hand": plain.by_hand(particles)}
    seconds = cpu_seconds(steps, repeats)
    rows = [
        "| loss | CPU ms | ratio to Trace_ELBO | ratio to the loop by hand | variance | variance x CPU s |",
        "|---|---|---|---|---|---|",
    ]
    costs = {}
    for name, step in steps.items():
        problem = problems[name][1] if name in problems else plain
        for _ in range(WARM_UP):
            problem.next()
            step()
        noise, mine = variance(step, problem, draws), median(seconds[name])
        costs[name] = noise * mine
        rows.append(
            f"| {name} | {1e3 * mine:.3g} | {ratio(seconds[name], seconds['`Trace_ELBO`']):.2f} | "
            f"{ratio(seconds[name], seconds['loop by hand']):.2f} | {noise:.3g} | {costs[name]:.3g} |"
        )
    ours, by_hand = (
        costs["`TraceGraph_ELBO`, decaying average"] / costs[name]
        for name in ('`ScoreFunctionELBO`, `"order"`', "loop by hand")
    )
    against = ratio(seconds['`ScoreFunctionELBO`, `"order"`'], seconds["`TraceGraph_ELBO`"])
    return [
        *rows,
        "",
        f'`ScoreFunctionELBO`, `"order"`, takes {against:.2f} of the time of `TraceGraph_ELBO`. Its variance x CPU is '
        f"1/{ours:.2g} of that of `TraceGraph_ELBO` with its decaying average, and that of the loop by hand 1/"
        f"{by_hand:.2g}: what is left between the two is Pyro's own bookkeeping, so that only less variance would "
        "bring it further.",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--draws", type=int, default=100, help="pairs of gradients behind each variance")
    parser.add_argument("--out", type=Path, help="also write the tables to this Markdown file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pyro.set_rng_seed(0)
    pyro.enable_validation(False)
    first, second = chains(arguments.repeats, 10 * arguments.draws), latents(arguments.repeats, arguments.draws)
    text = "\n".join(
        [
            "# Steps of an ELBO",
            "",
            f"Measured {date.today()}: Python {platform.python_version()}, torch {torch.__version__}, Pyro "
            f"{version('pyro-ppl')}, one thread, seed 0, {platform.machine()} machine with {os.cpu_count()} shared "
            "cores. CPU time of `loss_and_grads`, interleaved medians, argument validation off for all.",
            "",
            "## A chain of n Bernoulli sites and n observations, one particle",
            "",
            *first,
            "",
            "A variance is summed over the guide's parameters; that of `TraceGraph_ELBO` is left out where a step of "
            "it takes too long. Where sites are many and small, `ScoreFunctionELBO` has the densities of all sites of "
            "one family and shape by one operation; more than a third of what remains is the program itself, which "
            "Pyro has to run site by site.",
            "",
            "## 200 Bernoulli latents, batch 50, 16 particles together",
            "",
            f"A belief net on the 8x8 digits, trained for {TRAINING} steps, so that images differ more than particles. "
            "Variance of the gradient of the encoder.",
            "",
            *second,
            "",
            f"Reproduce with `python -m applications.benchmarks.elbo --repeats {arguments.repeats} --draws "
            f"{arguments.draws} --out docs/figures/elbo.md`.",
            "",
        ]
    )
    print(text)
    if arguments.out is not None:
        arguments.out.write_text(text)


if __name__ == "__main__":
    main()

"""Control flow: a program whose number of latents is itself a latent, with ``while`` and ``if`` on their values.

Bursts come at random times; each is strong or weak and fades by half from one time to the next. How many there were,
when, and of which kind, is to be told from six counts::

    t = 0
    while True:
        t += gap,    gap ~ truncated Geometric(.3), its last value "no further burst"
        if no further burst: stop
        if strong ~ Bernoulli(.4):  rate_u += 8/2^(u - t) for u >= t,  else  rate_u += 3/2^(u - t)
    y_u ~ Poisson(1 + rate_u)

The guide is a program with the same ``while`` and a table of logits: for the next gap given the present time, and for
the kind of a burst given its time. There are 3^6 runs, so evidence, posterior, bound and gradient are exact sums. A
value that only steers the program leaves no trace in the tensor graph: ``TraceGraph_ELBO`` has another gradient in
expectation, not only in noise. ``ScoreFunctionELBO`` goes by program order and has the right one. Run it with::

    python -m applications.vi.control_flow --check

The pieces (``Bursts``, ``fit``, ``exact``, ``check``) are meant to be imported and copied.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import ELBO, SVI, Trace_ELBO, TraceGraph_ELBO
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

import scorefn as sf
from applications.arguments import at_least
from applications.gradients import flat, flat_grad
from applications.progress import Interruption
from applications.results import write_result
from applications.vi.fitting import Progress, ascend, decaying, draw_ways, show, watched

COUNTS = (1, 9, 6, 2, 5, 2)  # made up
BACKGROUND, STRONG, WEAK, FADES = 1.0, 8.0, 3.0, 0.5
ENDS, IS_STRONG = 0.3, 0.4
PARTICLES = 16


class Guide(nn.Module):
    """Logits of the next gap, a row per present time (t of them are not used in row t), and of strong, per time."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.gap = nn.Parameter(torch.zeros(times, times + 1, dtype=torch.float64))
        self.strong = nn.Parameter(torch.zeros(times, dtype=torch.float64))


class Bursts:
    """Model and guide as Pyro programs, and all their runs.

    Args:
        counts: y.
    """

    def __init__(self, counts: tuple[int, ...] = COUNTS) -> None:
        self.y = torch.tensor(counts, dtype=torch.float64)
        self.parameters = Guide(len(counts))

    def model(self) -> None:
        """Plain Python control flow."""
        rate = torch.full_like(self.y, BACKGROUND)
        t, burst = 0, 0
        while t < len(self.y):
            t += int(pyro.sample(f"gap {burst}", dist.Categorical(self.prior(t)))) + 1
            if t <= len(self.y):
                strong = pyro.sample(f"strong {burst}", dist.Bernoulli(torch.tensor(IS_STRONG, dtype=rate.dtype)))
                if strong:
                    rate = rate + self.shape(t, STRONG)
                else:
                    rate = rate + self.shape(t, WEAK)
            burst += 1
        pyro.sample("y", dist.Poisson(rate).to_event(1), obs=self.y)

    def guide(self) -> None:
        """The same ``while``, without its rates."""
        parameters = pyro.module("guide", self.parameters)
        t, burst = 0, 0
        while t < len(self.y):
            logits = parameters.gap[t, : len(self.y) - t + 1]
            t += int(pyro.sample(f"gap {burst}", dist.Categorical(logits=logits))) + 1
            if t <= len(self.y):
                pyro.sample(f"strong {burst}", dist.Bernoulli(logits=parameters.strong[t - 1]))
            burst += 1

    def prior(self, t: int) -> Tensor:
        """Of the gap after time t: 1, 2, ... up to the last time, then all that is beyond."""
        left = len(self.y) - t
        gaps = ENDS * (1 - ENDS) ** torch.arange(left, dtype=self.y.dtype)
        return torch.cat([gaps, torch.full((1,), (1 - ENDS) ** left, dtype=self.y.dtype)])

    def shape(self, t: int, height: float) -> Tensor:
        """What a burst at time t adds to the rates."""
        since = torch.arange(1, len(self.y) + 1, dtype=self.y.dtype) - t
        return torch.where(since >= 0, height * FADES ** since.clamp(min=0), 0.0)

    def runs(self) -> list[Run]:
        """Every way through the program."""
        return list(self._from(Run((), (), 0.0, torch.full_like(self.y, BACKGROUND))))

    def _from(self, run: Run) -> Iterator[Run]:
        present = run.times[-1] if run.times else 0
        prior = self.prior(present).log().tolist()
        likelihood = dist.Poisson(run.rate).log_prob(self.y).sum().item()
        yield Run(run.times, run.kinds, run.log_joint + prior[-1] * (present < len(self.y)) + likelihood, run.rate)
        for t in range(present + 1, len(self.y) + 1):
            for strong, height, p in ((True, STRONG, IS_STRONG), (False, WEAK, 1 - IS_STRONG)):
                log_joint = run.log_joint + prior[t - present - 1] + math.log(p)
                rate = run.rate + self.shape(t, height)
                yield from self._from(Run((*run.times, t), (*run.kinds, strong), log_joint, rate))

    def log_guide(self, runs: list[Run]) -> Tensor:
        """log q of every run, ``[runs]``, differentiable."""
        T = len(self.y)
        gaps = [self.parameters.gap[t, : T - t + 1].log_softmax(-1) for t in range(T)]
        kinds = nn.functional.logsigmoid(self.parameters.strong), nn.functional.logsigmoid(-self.parameters.strong)
        table = torch.cat([*gaps, *kinds])
        starts = [sum(T - s + 1 for s in range(t)) for t in range(T + 1)]
        use = torch.zeros(len(runs), len(table), dtype=table.dtype)
        for row, run in zip(use, runs, strict=True):
            for before, t, strong in zip((0, *run.times), run.times, run.kinds, strict=False):
                row[starts[before] + t - before - 1] = 1
                row[starts[T] + t - 1 + (0 if strong else T)] = 1
            last = run.times[-1] if run.times else 0
            if last < T:
                row[starts[last] + T - last] = 1
        return use @ table

    def exact_bound(self, runs: list[Run]) -> Tensor:
        """The ELBO by summing over all runs, differentiable."""
        log_q = self.log_guide(runs)
        return (log_q.exp() * (torch.tensor([run.log_joint for run in runs], dtype=log_q.dtype) - log_q)).sum()

    def to_optimum(self, runs: list[Run]) -> None:
        """Set the guide to the best that its exact gradient finds from where it is, by L-BFGS."""
        ascend(self.parameters.parameters(), lambda: self.exact_bound(runs))


@dataclass(frozen=True, eq=False)
class Run:
    """One way through the program: times and kinds of the bursts, log p(run, y) and the rates that it leads to."""

    times: tuple[int, ...]
    kinds: tuple[bool, ...]
    log_joint: float
    rate: Tensor

    def values(self, T: int) -> dict[str, Tensor]:
        """Of its sites."""
        found = {}
        for burst, (before, t) in enumerate(zip((0, *self.times), (*self.times, T + 1), strict=True)):
            if before < T:
                found[f"gap {burst}"] = torch.tensor(t - before - 1)
        for burst, strong in enumerate(self.kinds):
            found[f"strong {burst}"] = torch.tensor(float(strong), dtype=torch.float64)
        return found


@dataclass(frozen=True)
class Exact:
    """What the posterior is, by summing over all runs; and the best bound of the guide's family."""

    runs: int
    log_evidence: float
    optimum: float
    number: list[float]
    burst_at: list[float]


def marginals(weight: Tensor, runs: list[Run], T: int) -> tuple[list[float], list[float]]:
    """Of how many bursts there were, 0 to T, and of one at each time."""
    number, burst_at = [0.0] * (T + 1), [0.0] * T
    for w, run in zip(weight.tolist(), runs, strict=True):
        number[len(run.times)] += w
        for t in run.times:
            burst_at[t - 1] += w
    return number, burst_at


def exact(counts: tuple[int, ...] = COUNTS) -> Exact:
    """Enumerate."""
    net = Bursts(counts)
    runs = net.runs()
    log_joint = torch.tensor([run.log_joint for run in runs], dtype=torch.float64)
    net.to_optimum(runs)
    found = marginals(log_joint.softmax(0), runs, len(counts))
    return Exact(len(runs), log_joint.logsumexp(0).item(), net.exact_bound(runs).item(), *found)


class Forced(Messenger):  # type: ignore[misc]
    """Lets a program take one run."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.values:
            msg["value"], msg["done"] = self.values[msg["name"]], True


@dataclass(frozen=True)
class Verdict:
    """The expectation of a loss's one-particle gradient, against the exact gradient."""

    name: str
    relative_error: float
    cosine: float
    milliseconds: float


def check(net: Bursts) -> list[Verdict]:
    """No sampling: each loss's gradient at every run, weighted by the guide's probability of it."""
    runs = net.runs()
    parameters = list(net.parameters.parameters())
    truth = flat(torch.autograd.grad(-net.exact_bound(runs), parameters))
    weight = net.log_guide(runs).exp().detach()
    ours = sf.posteriors.ScoreFunctionELBO(1, vectorize_particles=False, max_plate_nesting=0)
    losses: dict[str, ELBO] = {
        "ScoreFunctionELBO": ours,
        "Trace_ELBO": Trace_ELBO(max_plate_nesting=0),
        "TraceGraph_ELBO": TraceGraph_ELBO(max_plate_nesting=0),
    }
    found = []
    for name, loss in losses.items():
        total, begin = torch.zeros_like(truth), time.process_time()
        with pyro.get_param_store().scope():
            for w, run in zip(weight, runs, strict=True):
                net.parameters.zero_grad()
                loss.loss_and_grads(net.model, Forced(run.values(len(net.y)))(net.guide))
                total += w * flat_grad(parameters)
        spent = 1000 * (time.process_time() - begin) / len(runs)
        error, cosine = (total - truth).norm() / truth.norm(), total @ truth / (total.norm() * truth.norm())
        found.append(Verdict(name, error.item(), cosine.item(), spent))
    net.parameters.zero_grad()
    return found


@dataclass(frozen=True)
class Fit:
    """A fitted guide, the exact answers, the way, and the guide's marginals as in ``Exact``."""

    net: Bursts
    exact: Exact
    curve: list[Progress]
    number: list[float]
    burst_at: list[float]


def fit(
    seed: int = 0,
    steps: int = 1500,
    progress: Callable[[Progress], None] | None = None,
    *,
    tracegraph: bool = False,
    particles: int = PARTICLES,
    learning_rate: float = 0.1,
    should_stop: Callable[[], bool] = lambda: False,
) -> Fit:
    """Fit the guide by Pyro's SVI and ClippedAdam, whose learning rate decays to three tenths.

    Steps that are larger, or on fewer particles, can make a kind of run rare for good before the rest is learnt.

    Args:
        seed: of the particles; the start is always the same, all logits 0.
        steps: of the optimiser.
        progress: called 30 times on the way.
        tracegraph: by Pyro's TraceGraph_ELBO, to see where that ends.
        particles: N, one after the other, as the program branches.
        learning_rate: at the start.
        should_stop: asked after every step.
    """
    pyro.set_rng_seed(seed)
    net = Bursts()
    runs, answers = net.runs(), exact()
    kind = TraceGraph_ELBO if tracegraph else sf.posteriors.ScoreFunctionELBO
    loss = kind(num_particles=particles, vectorize_particles=False, max_plate_nesting=0)
    optim = pyro.optim.ClippedAdam(decaying(steps, learning_rate, 0.3))
    with pyro.get_param_store().scope():
        svi = SVI(net.model, net.guide, optim, loss=loss)
        curve = watched(
            svi.step,
            steps,
            lambda: net.exact_bound(runs),
            answers.optimum,
            progress,
            marks=30,
            should_stop=should_stop,
        )
    with torch.no_grad():
        found = marginals(net.log_guide(runs).exp(), runs, len(net.y))
    return Fit(net, answers, curve, *found)


def plot(fits: dict[str, Fit], path: Path) -> None:
    """The way, and how many bursts there were."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    way, number, burst_at = figure.subplots(1, 3)
    answers = next(iter(fits.values())).exact
    width = 0.8 / (1 + len(fits))
    bars = {"exact": (answers.number, answers.burst_at)}
    bars |= {name: (fitted.number, fitted.burst_at) for name, fitted in fits.items()}
    for place, (name, (numbers, times)) in enumerate(bars.items()):
        number.bar([i + place * width for i in range(len(numbers))], numbers, width, label=name)
        burst_at.bar([i + 1 + place * width for i in range(len(times))], times, width)
    draw_ways(way, {name: fitted.curve for name, fitted in fits.items()}, first_colour=1)  # as its bars
    number.set(xlabel="number of bursts", ylabel="probability")
    number.legend()
    burst_at.set(xlabel="time", ylabel="probability of a burst")
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> int:
    """Fit, then compare with what is exact; Ctrl-C ends the present fit after its step."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument("--steps", type=at_least(1), default=1500)
    parser.add_argument("--particles", type=at_least(2), default=PARTICLES, help="leave-one-out takes two or more")
    parser.add_argument("--check", action="store_true", help="expected gradient of three losses, by enumeration")
    parser.add_argument("--tracegraph", action="store_true", help="fit by TraceGraph_ELBO too, which takes minutes")
    parser.add_argument("--out", type=Path, default=Path("runs/control_flow"), help="folder of result and plot")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)  # before the work: a path that cannot be is found out at once
    fits = dict[str, Fit]()
    with Interruption() as interrupted:
        for name in ("ScoreFunctionELBO", "TraceGraph_ELBO")[: 1 + options.tracegraph]:
            print(name, flush=True)
            fits[name] = fit(
                options.seed,
                options.steps,
                show,
                tracegraph=name == "TraceGraph_ELBO",
                particles=options.particles,
                should_stop=interrupted,
            )
            if interrupted():
                break
    answers = fits["ScoreFunctionELBO"].exact
    verdicts = check(Bursts()) if options.check and not interrupted() else []
    print(
        f"\n{answers.runs} runs, log evidence {answers.log_evidence:.6f}, best bound of this family "
        f"{answers.optimum:.6f}\nbursts, 0 to 6, exactly:  " + "  ".join(f"{p:.4f}" for p in answers.number)
    )
    for name, fitted in fits.items():
        print(
            f"{name}: bound {fitted.curve[-1].bound:.6f}, {fitted.curve[-1].gap:.5f} below\nbursts, 0 to 6:           "
            + "  ".join(f"{p:.4f}" for p in fitted.number)
        )
    for verdict in verdicts:
        print(
            f"{verdict.name:<18} expected gradient: relative error {verdict.relative_error:.2e}, cosine "
            f"{verdict.cosine:+.4f}, {verdict.milliseconds:.2f} ms per particle"
        )
    fitted_to = {
        name: {"number": fitted.number, "burst_at": fitted.burst_at, "curve": [asdict(p) for p in fitted.curve]}
        for name, fitted in fits.items()
    }
    record = {
        "complete": not interrupted(),
        "exact": asdict(answers),
        "fits": fitted_to,
        "check": [asdict(verdict) for verdict in verdicts],
    }
    write_result(options.out, vars(options), record)
    plot(fits, options.out / "control_flow.png")
    return 130 if interrupted() else 0


if __name__ == "__main__":
    sys.exit(main())

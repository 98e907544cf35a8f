"""Capture-recapture: how many animals were never seen? 150 bits and two Betas, by score functions.

Model M0 of posteriordb and its data, which Kery & Schaub (2011, chapter 6) simulated: 237 individuals, of whom 87 were
caught on at least one of three occasions. Each exists with probability omega and, if so, is caught on each occasion
with probability p; both are uniform a priori::

    omega, p ~ Beta(1, 1);    z_i ~ Bernoulli(omega);    y_it ~ Bernoulli(z_i p)

As in posteriordb's Stan program, the likelihood is that of how often each was caught, ``Binomial(3, z_i p)``.

The guide is Beta x Beta x 150 Bernoullis, and *everything* in it is a decision, the Betas too. The evidence, the bound,
its gradient and the best guide of this family are all known in closed form. Run it with::

    python -m applications.vi.capture_recapture --compare 1500

The pieces (``CaptureRecapture``, ``fit``, ``exact``) are meant to be imported and copied.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import ELBO, SVI, Trace_ELBO, TraceGraph_ELBO
from torch import Tensor, nn
from torch.distributions import Bernoulli, Beta

import scorefn as sf
from applications.arguments import at_least
from applications.progress import Interruption
from applications.results import write_result
from applications.vi.correction import summary
from applications.vi.fitting import Progress, arrival, decaying, draw_ways, show, watched

DATA = Path(__file__).parent / "data" / "m0.json"
PARTICLES = 8
OURS, TRACE, TRACEGRAPH = "ScoreFunctionELBO", "Trace_ELBO", "TraceGraph_ELBO, decaying average"


@dataclass(frozen=True)
class Histories:
    """Who was caught when.

    Args:
        seen: ``[S, T]``, 1 where an individual was caught.
        unseen: how many more there may be.
    """

    seen: Tensor
    unseen: int

    @property
    def occasions(self) -> int:
        """T."""
        return int(self.seen.shape[1])

    @property
    def coefficient(self) -> float:
        """Logarithm of the binomial coefficients of all catches, a constant of the likelihood."""
        return sum(math.log(math.comb(self.occasions, int(catches))) for catches in self.seen.sum(-1))


def load() -> Histories:
    """The data of model M0 in posteriordb: 87 individuals seen, 150 that may exist, 3 occasions."""
    counts: dict[str, int] = json.loads(DATA.read_text(encoding="utf-8"))["histories"]
    rows = [[float(caught) for caught in history] for history, count in counts.items() for _ in range(count)]
    y = torch.tensor(rows)
    caught = y.any(-1)
    return Histories(y[caught], int((~caught).sum()))


class Guide(nn.Module):
    """Its parameters: the logarithms of both Betas' parameters and a logit for each individual that was never seen."""

    def __init__(self, unseen: int) -> None:
        super().__init__()
        self.omega = nn.Parameter(torch.full((2,), 2.0).log())
        self.p = nn.Parameter(torch.full((2,), 2.0).log())
        self.logits = nn.Parameter(torch.zeros(unseen))


class CaptureRecapture:
    """Model and guide as Pyro programs, and what is known about them in closed form.

    Args:
        histories: the data.
        globals_last: sample omega and p after the individuals: the same guide, in another order.
        pathwise: leave the Betas reparameterised; otherwise they are decisions like all the rest.
    """

    def __init__(self, histories: Histories, *, globals_last: bool = False, pathwise: bool = False) -> None:
        self.histories = histories
        self.globals_last = globals_last
        self.pathwise = pathwise
        self.parameters = Guide(histories.unseen)

    def model(self) -> None:
        """Log joint of all 237; those who were seen exist."""
        y, trials = self.histories.seen, self.histories.occasions
        omega = pyro.sample("omega", dist.Beta(1.0, 1.0))
        p = pyro.sample("p", dist.Beta(1.0, 1.0))
        with pyro.plate("seen", len(y), dim=-1):
            pyro.sample("exists", dist.Bernoulli(omega), obs=torch.ones(len(y)))
            pyro.sample("caught", dist.Binomial(trials, p), obs=y.sum(-1))
        with pyro.plate("unseen", self.histories.unseen, dim=-1):
            z = pyro.sample("z", dist.Bernoulli(omega))
            pyro.sample("never caught", dist.Binomial(trials, z * p), obs=torch.zeros(self.histories.unseen))

    def guide(self, infer: dict[str, Any] | None = None) -> None:
        """q(omega) q(p) prod_i q(z_i), each site with these hints."""
        parameters = pyro.module("guide", self.parameters)
        if not self.globals_last:
            self._betas(parameters, infer)
        with pyro.plate("unseen", self.histories.unseen, dim=-1):
            pyro.sample("z", dist.Bernoulli(logits=parameters.logits), infer=infer)
        if self.globals_last:
            self._betas(parameters, infer)

    def _betas(self, parameters: Guide, infer: dict[str, Any] | None) -> None:
        for name, value in (("omega", parameters.omega), ("p", parameters.p)):
            a, b = value.exp()
            pyro.sample(name, dist.Beta(a, b).has_rsample_(self.pathwise), infer=infer)

    def exact_bound(self) -> Tensor:
        """The ELBO in closed form, differentiable in the guide's parameters."""
        y, r = self.histories.seen, self.parameters.logits.sigmoid()
        omega, p = (Beta(*value.exp()) for value in (self.parameters.omega, self.parameters.p))
        exists, absent = log_means(omega)
        caught, missed = log_means(p)
        joint = self.histories.coefficient + len(y) * exists + y.sum() * caught + (1 - y).sum() * missed
        joint = joint + (r * (exists + self.histories.occasions * missed) + (1 - r) * absent).sum()
        bound: Tensor = joint + omega.entropy() + p.entropy() + Bernoulli(logits=self.parameters.logits).entropy().sum()
        return bound

    @torch.no_grad()
    def to_optimum(self) -> None:
        """Set the guide to the best of its family, by coordinate ascent: each factor given the others, in turns."""
        y, unseen = self.histories.seen, self.histories.unseen
        present, caught = torch.tensor(0.5 * unseen), y.sum()
        for _ in range(500):
            a = torch.stack([1 + len(y) + present, 1 + unseen - present])
            b = torch.stack([1 + caught, 1 + (1 - y).sum() + self.histories.occasions * present])
            exists, absent = log_means(Beta(*a))
            logit = exists + self.histories.occasions * log_means(Beta(*b))[1] - absent
            present = unseen * logit.sigmoid()
        self.parameters.omega.copy_(a.log())
        self.parameters.p.copy_(b.log())
        self.parameters.logits.fill_(float(logit))

    @torch.no_grad()
    def expected_number(self) -> float:
        """How many individuals there are, under the guide."""
        return len(self.histories.seen) + self.parameters.logits.sigmoid().sum().item()

    @torch.no_grad()
    def number(self) -> Tensor:
        """How probable it is under the guide that 0, 1, ... of those who were never seen exist, ``[unseen + 1]``."""
        found = torch.zeros(self.histories.unseen + 1, dtype=torch.float64)
        found[0] = 1
        for p in self.parameters.logits.double().sigmoid():
            found = (1 - p) * found + p * found.roll(1)  # the last entry is still zero
        return found

    def draws(self, num_samples: int) -> sf.Draws:
        """The same ELBO in plain PyTorch, each factor charged to the decisions on which it truly depends.

        ``ScoreFunctionELBO`` goes by program order and plates, which is sound for every program; here it is known that
        omega reaches its own factors and who exists, p its own and who was caught, and z_i what belongs to i.
        """
        seen, unseen, trials = len(self.histories.seen), self.histories.unseen, self.histories.occasions
        caught = self.histories.seen.sum()
        q = Bernoulli(logits=self.parameters.logits)
        omega, p = (Beta(*value.exp()) for value in (self.parameters.omega, self.parameters.p))
        x = {name: d.sample((num_samples,)) for name, d in (("omega", omega), ("p", p), ("z", q))}
        log_omega, log_p, log_z = omega.log_prob(x["omega"]), p.log_prob(x["p"]), q.log_prob(x["z"])
        rate, z = x["omega"].unsqueeze(-1), x["z"]
        own = self.histories.coefficient + caught * x["p"].log() + (trials * seen - caught) * (-x["p"]).log1p()
        values = [
            (seen * x["omega"].log() - log_omega).unsqueeze(-1),
            (own - log_p).unsqueeze(-1),
            z * rate.log() + (1 - z) * (-rate).log1p(),  # who exists
            -log_z,
            z * trials * (-x["p"]).log1p().unsqueeze(-1),  # who was not caught although it exists
        ]
        each, none = torch.eye(unseen, dtype=torch.bool), torch.zeros(1, unseen, dtype=torch.bool)
        yes, no = torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, 1, dtype=torch.bool)
        mask = torch.cat(
            [
                torch.cat([yes, no, ~none, none, none], -1),
                torch.cat([no, yes, none, none, ~none], -1),
                torch.cat([no.expand(unseen, 2), each, each, each], -1),
            ]
        )
        log_prob = torch.cat([log_omega.unsqueeze(-1), log_p.unsqueeze(-1), log_z], -1)
        return sf.Draws(x, log_prob, torch.cat(values, -1).detach(), credit=sf.Influence(mask))


def log_means(beta: Beta) -> tuple[Tensor, Tensor]:
    """E log x and E log(1 - x)."""
    a, b = beta.concentration1, beta.concentration0
    return a.digamma() - (a + b).digamma(), b.digamma() - (a + b).digamma()


@dataclass(frozen=True)
class Exact:
    """What the posterior is, by summing over how many of those who were never seen exist; the family's best bound."""

    log_evidence: float
    expected_number: float
    optimum: float
    number: list[float]


def exact(histories: Histories) -> Exact:
    """In float64: given the number, omega and p integrate to Beta functions."""
    caught, seen, trials = histories.seen.double().sum(), len(histories.seen), histories.occasions
    n = torch.arange(histories.unseen + 1, dtype=torch.float64)
    ways = math.lgamma(histories.unseen + 1) - (n + 1).lgamma() - (histories.unseen - n + 1).lgamma()
    weight = ways + log_beta(1 + seen + n, 1 + histories.unseen - n)
    weight = weight + log_beta(1 + caught, 1 + trials * (seen + n) - caught)
    net = CaptureRecapture(Histories(histories.seen.double(), histories.unseen))
    net.parameters.double()
    net.to_optimum()
    return Exact(
        histories.coefficient + weight.logsumexp(0).item(),
        (weight.softmax(0) * (seen + n)).sum().item(),
        net.exact_bound().item(),
        weight.softmax(0).tolist(),
    )


def log_beta(a: Tensor, b: Tensor) -> Tensor:
    """Of the Beta function."""
    return a.lgamma() + b.lgamma() - (a + b).lgamma()


@dataclass(frozen=True)
class Fit:
    """A fitted guide, the exact answers, and the way."""

    net: CaptureRecapture
    exact: Exact
    curve: list[Progress]

    def steps_within(self, nats: float) -> int | None:
        """The first reported step from which on the bound stayed within so many nats of the optimum."""
        found = arrival(self.curve, nats)
        return found.step if found else None


def fit(
    seed: int = 0,
    steps: int = 3000,
    progress: Callable[[Progress], None] | None = None,
    *,
    way: str = OURS,
    baseline: Any = "adaptive",
    globals_last: bool = False,
    pathwise: bool = False,
    learning_rate: float = 0.2,
    decays_to: float = 0.01,
    particles: int = PARTICLES,
    should_stop: Callable[[], bool] = lambda: False,
) -> Fit:
    """Fit the guide by Pyro's SVI and ClippedAdam.

    Args:
        seed: of the particles; the start is always the same: Beta(2, 2) twice and fair coins.
        steps: of the optimiser.
        progress: called 60 times on the way.
        way: ``OURS``, ``TRACE`` or ``TRACEGRAPH``: whose loss.
        baseline: of ``OURS``; "adaptive" is a fresh ``AdaptiveRaoBlackwell``.
        globals_last: see ``CaptureRecapture``.
        pathwise: see ``CaptureRecapture``.
        learning_rate: at the start.
        decays_to: the share of it that is left at the end.
        particles: N.
        should_stop: asked after every step.

    Raises:
        ValueError: no such way.
    """
    if way not in (OURS, TRACE, TRACEGRAPH):
        raise ValueError(f"way must be {OURS!r}, {TRACE!r} or {TRACEGRAPH!r}, but it is {way!r}.")
    pyro.set_rng_seed(seed)
    net = CaptureRecapture(load(), globals_last=globals_last, pathwise=pathwise)
    answers, infer = exact(net.histories), None
    if way == OURS:
        chosen = sf.AdaptiveRaoBlackwell() if baseline == "adaptive" else baseline
        loss: ELBO = sf.posteriors.ScoreFunctionELBO(particles, max_plate_nesting=1, baseline=chosen)
    elif way == TRACE:
        loss = Trace_ELBO(particles, max_plate_nesting=1, vectorize_particles=True)
    else:
        loss = TraceGraph_ELBO(particles, max_plate_nesting=1, vectorize_particles=True)
        infer = {"baseline": {"use_decaying_avg_baseline": True}}
    optim = pyro.optim.ClippedAdam(decaying(steps, learning_rate, decays_to))
    with pyro.get_param_store().scope():
        curve = watched(
            SVI(net.model, partial(net.guide, infer), optim, loss=loss).step,
            steps,
            net.exact_bound,
            answers.optimum,
            progress,
            others=lambda: {"E[N]": net.expected_number()},
            should_stop=should_stop,
        )
    return Fit(net, answers, curve)


def plot(fits: dict[str, Fit], path: Path) -> None:
    """The way of each fit, and how many individuals there are."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    way, number = figure.subplots(1, 2)
    draw_ways(way, {name: fitted.curve for name, fitted in fits.items()})
    way.axhline(0.1, color="grey", linewidth=0.8)
    fitted, best = fits[OURS], CaptureRecapture(fits[OURS].net.histories)
    best.to_optimum()
    places = range(len(best.histories.seen), len(best.histories.seen) + best.histories.unseen + 1)
    number.plot(places, fitted.exact.number, color="black", linewidth=3, label="exact")
    number.plot(places, fitted.net.number(), color="tab:orange", label="guide")
    number.plot(places, best.number(), "--", color="grey", label="best guide of the family")
    number.set(xlabel="individuals", ylabel="probability")
    number.legend()
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> int:
    """Fit, then compare with what is exact; Ctrl-C ends the present fit after its step."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument("--steps", type=at_least(1), default=3000)
    parser.add_argument("--particles", type=at_least(2), default=PARTICLES, help="leave-one-out takes two or more")
    parser.add_argument("--plain", action="store_true", help="leave-one-out instead of AdaptiveRaoBlackwell")
    parser.add_argument("--globals-last", action="store_true", help="sample omega and p after the individuals")
    parser.add_argument("--pathwise", action="store_true", help="leave the Betas reparameterised")
    parser.add_argument("--compare", type=at_least(0), default=0, help="steps of two of Pyro's losses, beside ours")
    parser.add_argument("--out", type=Path, default=Path("runs/capture_recapture"), help="folder of result and plot")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)  # before the work: a path that cannot be is found out at once
    fits = dict[str, Fit]()
    with Interruption() as interrupted:
        for way in (OURS, TRACE, TRACEGRAPH) if options.compare else (OURS,):
            print(way, flush=True)
            fits[way] = fit(
                options.seed,
                options.steps if way == OURS else options.compare,
                show,
                way=way,
                baseline="auto" if options.plain else "adaptive",
                globals_last=options.globals_last,
                pathwise=options.pathwise,
                particles=options.particles,
                should_stop=interrupted,
            )
            if interrupted():
                break
    net, answers = fits[OURS].net, fits[OURS].exact
    loss = sf.posteriors.ScoreFunctionELBO(options.particles, max_plate_nesting=1)
    with pyro.get_param_store().scope():
        report = sf.posteriors.diagnose(loss, net.model, net.guide, num_draws=10_000)
    print(
        f"\nlog evidence {answers.log_evidence:.6f}, best bound of this family {answers.optimum:.6f}; individuals: "
        f"{answers.expected_number:.4f} exactly, {net.expected_number():.2f} under the guide"
    )
    for way, fitted in fits.items():
        last, near = fitted.curve[-1], arrival(fitted.curve, 0.1)
        within = f"within .1 nat from step {near.step} on, {near.seconds:.1f} s CPU" if near else "never within .1 nat"
        print(f"{way:<34} bound {last.bound:.4f} after {last.step} steps, {last.gap:.4f} below the best; {within}")
    print(report)
    record = {
        "complete": not interrupted(),
        "exact": asdict(answers),
        "expected_number": net.expected_number(),
        **summary(report),
        "curves": {way: [asdict(point) for point in fitted.curve] for way, fitted in fits.items()},
    }
    write_result(options.out, vars(options), record)
    plot(fits, options.out / "capture_recapture.png")
    return 130 if interrupted() else 0


if __name__ == "__main__":
    sys.exit(main())

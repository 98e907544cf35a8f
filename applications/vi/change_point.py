"""Change point: in which year did coal mines become safer? A year by score functions, beside the exact posterior.

Disasters per year in British coal mines, 1851 to 1961 (Jarrett 1979)::

    change ~ uniform over 1..110;    early, late ~ Gamma(1, 1)
    y_t ~ Poisson(early) in the first `change` years, Poisson(late) afterwards

The rates integrate out for every year, so posterior and evidence are sums of 110 terms. Two guides:

* ``year``: the rates are integrated out in the model; the guide, a Categorical, can be exact.
* ``factorised``: q(change) q(early) q(late), the rates pathwise. It cannot be exact; the best of the family follows
  from coordinate ascent, in closed form.

A Categorical loses years for good when large steps on few particles rule them out before the rates are known: hence 128
particles and a learning rate of .05.

Run it with::

    python -m applications.vi.change_point --seed 0

Ctrl-C ends the present fit after its step; what was fitted is still compared and written. The pieces (``Change``,
``Year``, ``Factorised``, ``fit``) are meant to be imported and copied.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI
from torch import Tensor, nn
from torch.distributions import Gamma

import scorefn as sf
from applications.arguments import at_least
from applications.progress import Interruption
from applications.results import write_result
from applications.vi.correction import summary
from applications.vi.fitting import Progress, decaying, draw_ways, show, watched
from scorefn.posteriors import FitReport

DATA = Path(__file__).parent / "data" / "coal.json"
PARTICLES = 128


@dataclass(frozen=True)
class Change:
    """The data and what is exact about them.

    Args:
        first_year: of the series.
        counts: ``[T]``, float64, per year.
        shape: of the Gamma prior of both rates.
        rate: likewise.

    Raises:
        ValueError: fewer than two years, a count that is no whole number from 0 on, or a prior that is not proper.
    """

    first_year: int
    counts: Tensor
    shape: float = 1.0
    rate: float = 1.0

    def __post_init__(self) -> None:
        if self.counts.ndim != 1 or len(self.counts) < 2:
            raise ValueError(
                f"counts has shape {tuple(self.counts.shape)}, which leaves no year for a change: give [T], T of 2 or "
                "more."
            )
        if not bool(((self.counts >= 0) & (self.counts == self.counts.floor())).all()):
            raise ValueError(
                f"counts are {self.counts.tolist()}, but a Poisson variable is 0, 1, 2, ...: mend the data."
            )
        if not min(self.shape, self.rate) > 0:
            raise ValueError(
                f"shape and rate are {self.shape} and {self.rate}, but a Gamma prior is proper only if both are above "
                "0."
            )

    @property
    def years(self) -> list[int]:
        """The first year of the late rate, for each possible change."""
        return [self.first_year + change for change in range(1, len(self.counts))]

    @property
    def log_factorials(self) -> float:
        """Sum of log y_t!."""
        return float((self.counts + 1).lgamma().sum())

    def log_joint(self) -> Tensor:
        """log p(y, change), ``[T - 1]``, the rates integrated out.

        A piece of m years with c disasters contributes, beside 1/y_t!::

            a log b - log Gamma(a) + log Gamma(a + c) - (a + c) log(b + m)
        """
        disasters, years = self.counts.cumsum(0)[:-1], torch.arange(1, len(self.counts), dtype=torch.float64)
        pieces = [(disasters, years), (self.counts.sum() - disasters, len(self.counts) - years)]
        value = torch.full_like(years, -math.log(len(years)) - self.log_factorials)
        for c, m in pieces:
            value = value + self.shape * math.log(self.rate) - math.lgamma(self.shape)
            value = value + (self.shape + c).lgamma() - (self.shape + c) * (self.rate + m).log()
        return value

    def log_evidence(self) -> float:
        """Of the counts."""
        return self.log_joint().logsumexp(0).item()

    def posterior(self) -> Tensor:
        """P(change | y), ``[T - 1]``."""
        return self.log_joint().softmax(0)


def load() -> Change:
    """Disasters per year, 1851 to 1961."""
    data = json.loads(DATA.read_text(encoding="utf-8"))
    return Change(data["first_year"], torch.tensor(data["counts"], dtype=torch.float64))


class Problem(nn.Module, ABC):
    """A model and a guide as Pyro programs; the guide's year starts uniform."""

    name: str

    def __init__(self, change: Change) -> None:
        super().__init__()
        self.change = change
        self.logits = nn.Parameter(torch.zeros(len(change.counts) - 1, dtype=torch.float64))

    @abstractmethod
    def model(self) -> None:
        """The log joint."""

    @abstractmethod
    def guide(self) -> None:
        """q."""

    @abstractmethod
    def exact_bound(self) -> Tensor:
        """The ELBO in closed form, differentiable."""

    @abstractmethod
    def to_optimum(self) -> None:
        """Set the guide to the best of its family."""

    def years(self) -> Tensor:
        """q(change), ``[T - 1]``."""
        return self.logits.softmax(0).detach()

    def total_variation(self) -> float:
        """Of the year's marginal from the posterior's."""
        return (self.years() - self.change.posterior()).abs().sum().item() / 2


class Year(Problem):
    """Only the year is latent."""

    name = "year"

    def model(self) -> None:
        log_joint = self.change.log_joint()
        change = pyro.sample("change", dist.Categorical(logits=torch.zeros_like(log_joint)))
        pyro.factor("counts", (log_joint + math.log(len(log_joint)))[change])

    def guide(self) -> None:
        pyro.sample("change", dist.Categorical(logits=pyro.module("problem", self).logits))

    def exact_bound(self) -> Tensor:
        log_q = self.logits.log_softmax(0)
        return (log_q.exp() * (self.change.log_joint() - log_q)).sum()

    @torch.no_grad()
    def to_optimum(self) -> None:
        self.logits.copy_(self.change.log_joint())


class Factorised(Problem):
    """Year and rates, independent in the guide, whose other parameters are the logarithms of both Gammas'."""

    name = "factorised"

    def __init__(self, change: Change) -> None:
        super().__init__(change)
        self.early = nn.Parameter(torch.full((2,), 2.0, dtype=torch.float64).log())
        self.late = nn.Parameter(torch.full((2,), 2.0, dtype=torch.float64).log())

    def model(self) -> None:
        counts = self.change.counts
        prior = dist.Gamma(counts.new_tensor(self.change.shape), counts.new_tensor(self.change.rate))
        early, late = pyro.sample("early", prior), pyro.sample("late", prior)
        index = pyro.sample("change", dist.Categorical(logits=torch.zeros(len(counts) - 1, dtype=counts.dtype)))
        with pyro.plate("years", len(counts), dim=-1):
            rate = torch.where(torch.arange(len(counts)) <= index, early, late)  # index 0: one early year
            pyro.sample("counts", dist.Poisson(rate), obs=counts)

    def guide(self) -> None:
        problem = pyro.module("problem", self)
        pyro.sample("early", dist.Gamma(*problem.early.exp()))
        pyro.sample("late", dist.Gamma(*problem.late.exp()))
        pyro.sample("change", dist.Categorical(logits=problem.logits))

    def exact_bound(self) -> Tensor:
        q = [Gamma(*self.early.exp()), Gamma(*self.late.exp())]
        log_q = self.logits.log_softmax(0)
        value = (log_q.exp() * (self._log_years(*q) - log_q)).sum() - self.change.log_factorials
        a, b = self.change.shape, self.change.rate
        for own in q:
            value = value + a * math.log(b) - math.lgamma(a) + (a - 1) * log_mean(own) - b * own.mean + own.entropy()
        return value - math.log(len(log_q))

    @torch.no_grad()
    def to_optimum(self) -> None:
        """Coordinate ascent: each factor given the others, in turns."""
        counts = self.change.counts
        weight = torch.full_like(self.logits, 1 / len(self.logits))
        for _ in range(500):
            early = torch.cat([weight.new_ones(1), 1 - weight.cumsum(0)])  # q(year t has the early rate)
            for parameter, r in ((self.early, early), (self.late, 1 - early)):
                values = torch.stack([self.change.shape + (r * counts).sum(), self.change.rate + r.sum()])
                parameter.copy_(values.log())
            self.logits.copy_(self._log_years(Gamma(*self.early.exp()), Gamma(*self.late.exp())))
            weight = self.logits.softmax(0)

    def _log_years(self, early: Gamma, late: Gamma) -> Tensor:
        """E log p(y | change, early, late), ``[T - 1]``, up to the factorials."""
        counts, size = self.change.counts, len(self.change.counts)
        disasters, years = counts.cumsum(0)[:-1], torch.arange(1, size, dtype=counts.dtype)
        first = disasters * log_mean(early) - years * early.mean
        return first + (counts.sum() - disasters) * log_mean(late) - (size - years) * late.mean


def log_mean(gamma: Gamma) -> Tensor:
    """E log x."""
    value: Tensor = gamma.concentration.digamma() - gamma.rate.log()
    return value


FAMILIES: dict[str, type[Problem]] = {family.name: family for family in (Year, Factorised)}


@dataclass(frozen=True)
class Fit:
    """A fitted guide beside what is exact.

    Attributes:
        problem: with the guide.
        best: the same problem, with the best guide of the family.
        report: k-hat, evidence by importance, noise of each site.
        curve: the way.
    """

    problem: Problem
    best: Problem
    report: FitReport
    curve: list[Progress]

    def summary(self) -> dict[str, Any]:
        """What ``result.json`` says of it."""
        q, best = self.problem.years(), self.best.years()
        return {
            "family": self.problem.name,
            "bound": self.problem.exact_bound().item(),
            "best_bound": self.best.exact_bound().item(),
            "log_evidence": self.problem.change.log_evidence(),
            "total_variation": self.problem.total_variation(),
            "best_total_variation": self.best.total_variation(),
            "total_variation_to_best": (q - best).abs().sum().item() / 2,
            **summary(self.report),
            "change": q.tolist(),
            "seconds": self.curve[-1].seconds,
        }


def fit(
    problem: Problem,
    seed: int = 0,
    steps: int = 4000,
    progress: Callable[[Progress], None] | None = None,
    *,
    particles: int = PARTICLES,
    learning_rate: float = 0.05,
    should_stop: Callable[[], bool] = lambda: False,
) -> Fit:
    """Fit by Pyro's SVI with ``ScoreFunctionELBO`` and ClippedAdam, whose learning rate decays to a hundredth.

    Args:
        problem: model and guide; the guide goes on from where it is.
        seed: of the particles.
        steps: of the optimiser.
        progress: called 60 times on the way.
        particles: N.
        learning_rate: at the start.
        should_stop: asked after every step.
    """
    pyro.set_rng_seed(seed)
    best = type(problem)(problem.change)
    best.to_optimum()
    loss = sf.posteriors.ScoreFunctionELBO(particles, max_plate_nesting=1)
    optim = pyro.optim.ClippedAdam(decaying(steps, learning_rate, 0.01))
    with pyro.get_param_store().scope():
        svi = SVI(problem.model, problem.guide, optim, loss=loss)
        curve = watched(
            svi.step,
            steps,
            problem.exact_bound,
            best.exact_bound().item(),
            progress,
            others=lambda: {"total variation": problem.total_variation()},
            should_stop=should_stop,
        )
        report = sf.posteriors.diagnose(loss, problem.model, problem.guide, num_draws=4000)
    return Fit(problem, best, report, curve)


def plot(change: Change, fits: Sequence[Fit], path: Path) -> None:
    """The counts, the year's posterior, and the way of the bound."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    data, year, way = figure.subplots(1, 3)
    data.bar(range(change.first_year, change.first_year + len(change.counts)), change.counts.tolist(), color="grey")
    data.set_ylabel("disasters")
    kept = change.posterior() > 1e-3
    places = torch.tensor(change.years)[kept].tolist()
    year.bar(places, change.posterior()[kept].tolist(), color="black", label="exact")
    for number, fitted in enumerate(fits):
        name = fitted.problem.name
        year.plot(places, fitted.problem.years()[kept].tolist(), "o-", color=f"C{number}", label=name)
    draw_ways(way, {fitted.problem.name: fitted.curve for fitted in fits})
    year.set_xlabel("first year of the late rate")
    year.set_ylabel("probability")
    year.legend()
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> int:
    """Fit both guides in turn, then compare with what is exact."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument("--steps", type=at_least(1), default=4000)
    parser.add_argument("--particles", type=at_least(2), default=PARTICLES, help="leave-one-out takes two or more")
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--out", type=Path, default=Path("runs/change_point"), help="folder of result and plot")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)  # before the work: a path that cannot be is found out at once
    change, fits = load(), list[Fit]()
    with Interruption() as interrupted:
        for name in dict.fromkeys(options.families):
            print(name, flush=True)
            fits.append(
                fit(
                    FAMILIES[name](change),
                    options.seed,
                    options.steps,
                    show,
                    particles=options.particles,
                    should_stop=interrupted,
                )
            )
            if interrupted():
                break
    likeliest = change.years[int(change.posterior().argmax())]
    print(f"\nlog evidence {change.log_evidence():.6f}; likeliest first year of the late rate {likeliest}")
    rows = [fitted.summary() for fitted in fits]
    for fitted, row in zip(fits, rows, strict=True):
        print(
            f"\n{row['family']}: {row['best_bound'] - row['bound']:.5f} nats below the best of the family, which is "
            f"{row['log_evidence'] - row['best_bound']:.5f} below the evidence; total variation of the year "
            f"{row['total_variation']:.4f}, of the best {row['best_total_variation']:.4f}\n{fitted.report}"
        )
    record: dict[str, Any] = {
        "complete": not interrupted(),
        "log_evidence": change.log_evidence(),
        "years": change.years,
        "posterior": change.posterior().tolist(),
        "families": rows,
        "curves": [[asdict(point) for point in fitted.curve] for fitted in fits],
    }
    write_result(options.out, vars(options), record)
    plot(change, fits, options.out / "change_point.png")
    return 130 if interrupted() else 0


if __name__ == "__main__":
    sys.exit(main())

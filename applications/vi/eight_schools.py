"""Eight schools: what the score function costs where the pathwise gradient exists, and that it arrives all the same.

The model, in its non-centred form, has no discrete latent at all (Rubin, 1981; Gelman et al., section 5.5)::

    mu ~ Normal(0, 5);  tau ~ HalfCauchy(5);  e_j ~ Normal(0, 1);  y_j ~ Normal(mu + tau e_j, sigma_j)

The guide is mean-field, ten Gaussians for mu, log tau and e. Its bound is a closed form but for one term, which
Gauss-Hermite quadrature gives; the evidence is an integral over tau. So the fit, its gradients and what importance
sampling makes of it are all judged against exact answers. Run it with::

    python -m applications.vi.eight_schools --repeats 300

The pieces (``EightSchools``, ``fit``, ``exact``, ``compare``) are meant to be imported and copied.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import ELBO, SVI, Trace_ELBO, TraceGraph_ELBO
from torch import Tensor, nn

import scorefn as sf
from applications.arguments import at_least
from applications.gradients import flat, flat_grad
from applications.progress import Interruption
from applications.results import write_result
from applications.vi.correction import Corrected, corrected, pyro_log_weights
from applications.vi.fitting import Progress, arrival, ascend, decaying, draw_ways, show, watched

DATA = Path(__file__).parent / "data" / "eight_schools.json"
PARTICLES = 32


@dataclass(frozen=True)
class Schools:
    """Estimated effects and their standard errors, ``[8]`` each."""

    y: Tensor
    sigma: Tensor


def load() -> Schools:
    """The data set eight_schools of posteriordb, in float64."""
    found = json.loads(DATA.read_text(encoding="utf-8"))
    return Schools(*(torch.tensor(found[name], dtype=torch.float64) for name in ("y", "sigma")))


class Guide(nn.Module):
    """Means and logarithms of standard deviations of mu, log tau and e, in this order."""

    def __init__(self, schools: int) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(2 + schools, dtype=torch.float64))
        self.log_scale = nn.Parameter(torch.zeros(2 + schools, dtype=torch.float64))


class LogNormal(dist.LogNormal):  # type: ignore[misc]
    """With ``has_rsample`` as an attribute that ``has_rsample_`` can set; in torch it is a property."""

    has_rsample = True


class EightSchools:
    """Model and guide as Pyro programs, and their bound by quadrature.

    Args:
        schools: the data.
        pathwise: leave the guide reparameterised; otherwise all ten latents are decisions.
    """

    def __init__(self, schools: Schools, *, pathwise: bool = False) -> None:
        self.schools = schools
        self.pathwise = pathwise
        self.parameters = Guide(len(schools.y))

    def model(self) -> None:
        """Non-centred."""
        y, sigma = self.schools.y, self.schools.sigma
        zero, one = torch.zeros((), dtype=y.dtype), torch.ones((), dtype=y.dtype)
        mu = pyro.sample("mu", dist.Normal(zero, 5 * one))
        tau = pyro.sample("tau", dist.HalfCauchy(5 * one))
        with pyro.plate("schools", len(y), dim=-1):
            e = pyro.sample("e", dist.Normal(zero, one))
            pyro.sample("y", dist.Normal(mu + tau * e, sigma), obs=y)

    def guide(self, infer: dict[str, Any] | None = None) -> None:
        """q(mu) q(log tau) prod_j q(e_j)."""
        parameters = pyro.module("guide", self.parameters)
        loc, scale = parameters.loc, parameters.log_scale.exp()
        pyro.sample("mu", dist.Normal(loc[0], scale[0]).has_rsample_(self.pathwise), infer=infer)
        pyro.sample("tau", LogNormal(loc[1], scale[1]).has_rsample_(self.pathwise), infer=infer)
        with pyro.plate("schools", len(self.schools.y), dim=-1):
            pyro.sample("e", dist.Normal(loc[2:], scale[2:]).has_rsample_(self.pathwise), infer=infer)

    def exact_bound(self) -> Tensor:
        """The ELBO, differentiable: all moments are known but that of log(1 + tau^2/25), by Gauss-Hermite."""
        y, sigma = self.schools.y, self.schools.sigma
        loc, variance = self.parameters.loc, (2 * self.parameters.log_scale).exp()
        (mu, m, *_), (mu_2, s_2, *_) = loc, variance
        e, e_2 = loc[2:], variance[2:]
        nodes, weights = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(64))
        log_tau = m + s_2.sqrt() * nodes
        tail = (weights * nn.functional.softplus(2 * log_tau - 2 * math.log(5))).sum() / math.sqrt(2 * math.pi)
        prior = -0.5 * math.log(2 * math.pi * 25) - (mu**2 + mu_2) / 50
        prior = prior + math.log(2 / (5 * math.pi)) - tail + m  # the density of log tau has tau as its Jacobian
        prior = prior - 0.5 * (math.log(2 * math.pi) + e**2 + e_2).sum()
        tau_1, tau_2 = (m + s_2 / 2).exp(), (2 * m + 2 * s_2).exp()
        square = (y - mu - tau_1 * e) ** 2 + mu_2 + tau_2 * (e**2 + e_2) - (tau_1 * e) ** 2
        likelihood = -(0.5 * math.log(2 * math.pi) + sigma.log() + square / (2 * sigma**2)).sum()
        entropy = (0.5 * math.log(2 * math.pi * math.e) + self.parameters.log_scale).sum()
        bound: Tensor = prior + likelihood + entropy
        return bound

    def to_optimum(self) -> None:
        """Set the guide to the best of its family, by L-BFGS on the exact bound."""
        ascend(self.parameters.parameters(), self.exact_bound)

    @torch.no_grad()
    def moments(self) -> dict[str, list[float]]:
        """Mean and standard deviation of mu, tau and theta_j = mu + tau e_j under the guide."""
        loc, variance = self.parameters.loc, (2 * self.parameters.log_scale).exp()
        tau_1, tau_2 = (loc[1] + variance[1] / 2).exp(), (2 * loc[1] + 2 * variance[1]).exp()
        e, e_2 = loc[2:], variance[2:]
        means = torch.cat([torch.stack([loc[0], tau_1]), loc[0] + tau_1 * e])
        spread = variance[0] + tau_2 * (e**2 + e_2) - (tau_1 * e) ** 2
        variances = torch.cat([torch.stack([variance[0], tau_2 - tau_1**2]), spread])
        return named(means, variances)

    def log_weights(self, num_draws: int) -> Tensor:
        """log p - log q of the guide's own draws, ``[num_draws]``."""
        twin = EightSchools(self.schools)  # the same distribution, of which all is a decision
        twin.parameters.load_state_dict(self.parameters.state_dict())
        return pyro_log_weights(twin.model, twin.guide, num_draws)


def named(means: Tensor, variances: Tensor) -> dict[str, list[float]]:
    """By name, mean and standard deviation."""
    names = ["mu", "tau", *(f"theta {j + 1}" for j in range(len(means) - 2))]
    return {name: pair for name, *pair in zip(names, means.tolist(), variances.sqrt().tolist(), strict=True)}


@dataclass(frozen=True)
class Exact:
    """What the posterior is, and the best bound of the family."""

    log_evidence: float
    optimum: float
    moments: dict[str, list[float]]


def exact(schools: Schools, num_nodes: int = 400) -> Exact:
    """Given tau all is Gaussian; tau = 5 tan(pi u/2) makes its prior uniform in u, by Gauss-Legendre."""
    x, w = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(num_nodes))
    tau_2 = (5 * (math.pi * (x + 1) / 4).tan()) ** 2
    v = schools.sigma**2 + tau_2.unsqueeze(-1)
    precision = 1 / 25 + (1 / v).sum(-1)  # of mu given tau
    mean = (schools.y / v).sum(-1) / precision
    log_joint = -0.5 * (
        len(schools.y) * math.log(2 * math.pi)
        + v.log().sum(-1)
        + (25 * precision).log()
        + (schools.y**2 / v).sum(-1)
        - precision * mean**2
    )
    log_weight = log_joint + (w / 2).log()
    weight = log_weight.softmax(0).unsqueeze(-1)
    share = tau_2.unsqueeze(-1) / v  # by which theta follows its school
    theta = share * schools.y + (1 - share) * mean.unsqueeze(-1)
    theta_2 = theta**2 + share * schools.sigma**2 + ((1 - share) ** 2) / precision.unsqueeze(-1)
    first = torch.cat([torch.stack([mean, tau_2.sqrt()], -1), theta], -1)
    second = torch.cat([torch.stack([mean**2 + 1 / precision, tau_2], -1), theta_2], -1)
    means = (weight * first).sum(0)
    net = EightSchools(schools)
    net.to_optimum()
    variances = (weight * second).sum(0) - means**2
    return Exact(log_weight.logsumexp(0).item(), net.exact_bound().item(), named(means, variances))


@dataclass(frozen=True)
class Fit:
    """A fitted guide, the exact answers, and the way."""

    net: EightSchools
    exact: Exact
    curve: list[Progress]


def fit(
    seed: int = 0,
    steps: int = 3000,
    progress: Callable[[Progress], None] | None = None,
    *,
    pathwise: bool = False,
    particles: int = PARTICLES,
    learning_rate: float = 0.05,
    should_stop: Callable[[], bool] = lambda: False,
) -> Fit:
    """Fit the guide by Pyro's SVI and ClippedAdam, whose learning rate decays to a hundredth.

    Args:
        seed: of the particles; the start is always the same, ten standard Gaussians.
        steps: of the optimiser.
        progress: called 60 times on the way.
        pathwise: see ``EightSchools``.
        particles: N.
        learning_rate: at the start.
        should_stop: asked after every step.
    """
    pyro.set_rng_seed(seed)
    schools = load()
    net = EightSchools(schools, pathwise=pathwise)
    answers = exact(schools)
    loss = sf.posteriors.ScoreFunctionELBO(particles, max_plate_nesting=1)
    optim = pyro.optim.ClippedAdam(decaying(steps, learning_rate, 0.01))
    with pyro.get_param_store().scope():
        svi = SVI(net.model, net.guide, optim, loss=loss)
        curve = watched(svi.step, steps, net.exact_bound, answers.optimum, progress, should_stop=should_stop)
    return Fit(net, answers, curve)


@dataclass(frozen=True)
class Row:
    """One way to estimate the gradient: squared distance from the exact gradient, and CPU time of one estimate.

    The squared distance has a heavy tail, since the likelihood knows tau squared: ``variance``, its mean, moves with a
    few draws, its ``median`` does not. ``error`` is the length of the mean's deviation in its own standard errors,
    about 1 where there is no bias.
    """

    where: str
    name: str
    variance: float
    median: float
    error: float
    milliseconds: float


def compare(repeats: int = 300, particles: int = PARTICLES, *, warm: int = 50) -> list[Row]:
    """Variance and CPU time of the gradient, before the fit and at its optimum; all ways in turns.

    Args:
        repeats: estimates of each.
        particles: N.
        warm: estimates before these, from which averages and coefficients are learnt.
    """
    average = {"baseline": {"use_decaying_avg_baseline": True}}
    ways: dict[str, tuple[ELBO, bool, Any]] = {}
    ours = sf.posteriors.ScoreFunctionELBO
    shape: dict[str, Any] = {"max_plate_nesting": 1}
    theirs: dict[str, Any] = {"num_particles": particles, "vectorize_particles": True, **shape}
    ways["score, adaptive Rao-Blackwell"] = ours(particles, **shape), False, None
    ways["score, leave-one-out"] = ours(particles, baseline=sf.LeaveOneOut(), **shape), False, None
    ways["score, no baseline"] = ours(particles, baseline=None, **shape), False, None
    ways["score, Trace_ELBO"] = Trace_ELBO(**theirs), False, None
    ways["score, TraceGraph_ELBO with average"] = TraceGraph_ELBO(**theirs), False, average
    ways["pathwise, ScoreFunctionELBO"] = ours(particles, **shape), True, None
    ways["pathwise, Trace_ELBO"] = Trace_ELBO(**theirs), True, None
    rows = []
    for where in ("start", "optimum"):
        net = EightSchools(load())
        if where == "optimum":
            net.to_optimum()
        parameters = list(net.parameters.parameters())
        truth = flat(torch.autograd.grad(-net.exact_bound(), parameters))
        found: dict[str, list[Tensor]] = {name: [] for name in ways}
        clock: dict[str, list[float]] = {name: [] for name in ways}
        stores = {name: pyro.get_param_store().get_state() for name in ways}
        for turn in range(warm + repeats):
            for name, (loss, pathwise, infer) in ways.items():
                net.pathwise = pathwise
                net.parameters.zero_grad()
                with pyro.get_param_store().scope(stores[name]) as stores[name]:
                    begin = time.process_time()
                    loss.loss_and_grads(net.model, partial(net.guide, infer))
                    spent = time.process_time() - begin
                if turn >= warm:
                    clock[name].append(1000 * spent)
                    found[name].append(flat_grad(parameters))
        for name in ways:
            gradients = torch.stack(found[name])
            square = (gradients - truth).square().sum(-1)
            variance = square.mean().item()
            error = (gradients.mean(0) - truth).norm().item() / math.sqrt(variance / repeats)
            rows.append(Row(where, name, variance, square.median().item(), error, median(clock[name])))
    return rows


def plot(fits: dict[str, Fit], path: Path) -> None:
    """How far below the optimum against CPU time, and the moments of guide and posterior."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    way, schools = figure.subplots(1, 2)
    draw_ways(way, {name: fitted.curve for name, fitted in fits.items()}, seconds=True)
    fitted = list(fits.values())[-1]
    moments = fitted.net.moments()
    pairs = [("exact", "black", -0.12, fitted.exact.moments), ("guide", "tab:blue", 0.12, moments)]
    for name, colour, shift, values in pairs:
        means, spreads = zip(*values.values(), strict=True)
        places = [i + shift for i in range(len(means))]
        schools.errorbar(places, means, spreads, fmt="o", color=colour, label=name)
    schools.set_xticks(range(len(moments)), list(moments), rotation=60)
    schools.set_title("mean and standard deviation")
    schools.legend()
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> int:
    """Fit by the score function and by the pathwise gradient, then judge both; Ctrl-C ends the present fit."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument("--steps", type=at_least(1), default=3000)
    parser.add_argument("--particles", type=at_least(2), default=PARTICLES, help="leave-one-out takes two or more")
    parser.add_argument("--repeats", type=at_least(0), default=0, help="gradients for variance and CPU time of each")
    parser.add_argument("--out", type=Path, default=Path("runs/eight_schools"), help="folder of result and plot")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)  # before the work: a path that cannot be is found out at once
    fits, judged = dict[str, Fit](), dict[str, Corrected]()
    with Interruption() as interrupted:
        for name, pathwise in (("score function", False), ("pathwise", True)):
            print(f"{name}, {options.particles} particles", flush=True)
            fits[name] = fit(
                options.seed,
                options.steps,
                show,
                pathwise=pathwise,
                particles=options.particles,
                should_stop=interrupted,
            )
            judged[name] = corrected(fits[name].net.log_weights(500_000))
            if interrupted():
                break
    rows = compare(options.repeats, options.particles) if options.repeats and not interrupted() else []
    answers = fits["score function"].exact
    print(f"\nlog evidence {answers.log_evidence:.6f}, best bound of this family {answers.optimum:.6f}")
    for name, fitted in fits.items():
        last, near = fitted.curve[-1], arrival(fitted.curve, 0.005)
        within = f"within .005 from step {near.step} on, {near.seconds:.1f} s CPU" if near else "never within .005"
        print(f"{name:<15} bound {last.bound:.6f}, {last.gap:.5f} below; {within}\n{'':<15} {judged[name]}")
    for row in rows:
        product = row.median * row.milliseconds
        print(
            f"{row.where:<8} {row.name:<36} squared distance: mean {row.variance:8.4g}, median {row.median:8.4g}   "
            f"error {row.error:4.2f}   {row.milliseconds:6.2f} ms   median x ms {product:8.4g}"
        )
    record = {
        "complete": not interrupted(),
        "exact": asdict(answers),
        "corrected": {name: asdict(found) for name, found in judged.items()},
        "moments": {name: fitted.net.moments() for name, fitted in fits.items()},
        "curves": {name: [asdict(point) for point in fitted.curve] for name, fitted in fits.items()},
        "compare": [asdict(row) for row in rows],
    }
    write_result(options.out, vars(options), record)
    plot(fits, options.out / "eight_schools.png")
    return 130 if interrupted() else 0


if __name__ == "__main__":
    sys.exit(main())

"""Discrete states under continuous globals: what ``mixture`` and ``hmm`` share.

A model has a few globals g and many discrete states z. The guide is ``q(x) q(z | x)``: x is g without its constraints,
``q(x)`` Gaussian with a full covariance and by default pathwise, ``q(z | x)`` sampled, never summed. Since sums over z
are cheap given x, and the posterior of x is close to a Gaussian, Gauss-Hermite quadrature gives what a fit is judged
by: the posterior's means, the marginals of its states, the evidence, and the bound of any guide with its gradient.
"""

from __future__ import annotations

import argparse
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import ELBO, SVI, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO
from torch import Tensor, nn

import scorefn as sf
from applications.arguments import at_least
from applications.gradients import flat, flat_grad
from applications.progress import Interruption
from applications.results import write_result
from applications.vi.correction import Corrected, corrected
from applications.vi.fitting import Progress, ascend, decaying, draw_ways, show, watched

TOGETHER = 1000
"""Draws of a fitted guide, and nodes of a quadrature, that run together."""


# ----------------------------------------------------------------------------------------------------------- quadrature


def hermite(dims: int, per_dim: int) -> tuple[Tensor, Tensor]:
    """Nodes ``[M, dims]`` and weights ``[M]`` for the mean under a standard Gaussian, M = per_dim ** dims.

    Exact for polynomials of degree ``2 per_dim - 1`` in each coordinate.
    """
    points, weights = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(per_dim))
    nodes = torch.cartesian_prod(*[points] * dims).reshape(-1, dims)
    weight = torch.cartesian_prod(*[weights / math.sqrt(2 * math.pi)] * dims).reshape(-1, dims).prod(-1)
    return nodes, weight


@dataclass(frozen=True)
class Posterior:
    """A posterior by quadrature.

    Attributes:
        log_evidence: of the data.
        means: of the globals, ``[G]``.
        sds: their standard deviations, ``[G]``.
        states: P(state = 1 | y), ``[S]``.
        loc: mean of x, ``[D]``.
        covariance: of x, ``[D, D]``.
    """

    log_evidence: float
    means: Tensor
    sds: Tensor
    states: Tensor
    loc: Tensor
    covariance: Tensor


@torch.no_grad()
def posterior(program: Program, per_dim: int = 9) -> Posterior:
    """Quadrature over x with the posterior's own mean and covariance, found from its mode in two rounds."""
    loc, covariance = _mode(program)
    standard, weight = hermite(len(loc), per_dim)
    for _ in range(3):
        tril = torch.linalg.cholesky(covariance)
        x = loc + standard @ tril.mT
        log_q = torch.distributions.MultivariateNormal(loc, scale_tril=tril).log_prob(x)
        log_joint = torch.cat([program.log_joint(part) for part in x.split(TOGETHER)])
        # A weight of 1e-30 times a ratio that is not Gaussian is still nothing, but its logarithm is finite.
        log_weight = weight.log() + log_joint - log_q
        share = log_weight.softmax(0)
        loc = share @ x
        covariance = torch.einsum("m,md,me->de", share, x - loc, x - loc)
    values = program.values(x)
    means = share @ values
    kept = share > 1e-13 * share.max()  # the states are the dear part
    shares = (share[kept] / share[kept].sum()).split(TOGETHER)
    states = sum(own @ program.states(part) for own, part in zip(shares, x[kept].split(TOGETHER), strict=True))
    assert isinstance(states, Tensor)
    sds = (share @ (values - means).square()).sqrt()
    return Posterior(log_weight.logsumexp(0).item(), means, sds, states, loc, covariance)


def _mode(program: Program) -> tuple[Tensor, Tensor]:
    """Mode of x and inverse Hessian there."""
    with torch.enable_grad():
        x = program.start().requires_grad_()
        ascend([x], lambda: program.log_joint(x.unsqueeze(0)).sum())
        hessian = torch.autograd.functional.hessian(lambda u: -program.log_joint(u.unsqueeze(0)).sum(), x.detach())
    return x.detach(), torch.linalg.inv(hessian)


# ------------------------------------------------------------------------------------------------------ model and guide


class Globals(nn.Module):
    """N(loc, L L^T) with ``L = diag(exp(log_scale)) (I + strictly lower)``.

    Args:
        loc: ``[D]``, where it starts.
        scale: of each coordinate at the start.
    """

    def __init__(self, loc: Tensor, scale: float = 0.1) -> None:
        super().__init__()
        self.loc = nn.Parameter(loc.clone())
        self.log_scale = nn.Parameter(torch.full_like(loc, math.log(scale)))
        self.lower = nn.Parameter(loc.new_zeros(len(loc), len(loc)))

    @property
    def scale_tril(self) -> Tensor:
        """L."""
        unit = torch.eye(len(self.loc), dtype=self.loc.dtype) + self.lower.tril(-1)
        return self.log_scale.exp().unsqueeze(-1) * unit

    def normal(self) -> Any:
        """As a distribution of Pyro."""
        return dist.MultivariateNormal(self.loc, scale_tril=self.scale_tril)

    def white(self, x: Tensor) -> Tensor:
        """``L^-1 (x - loc)``."""
        solved: Tensor = torch.linalg.solve_triangular(
            self.scale_tril, (x - self.loc).unsqueeze(-1), upper=False
        ).squeeze(-1)
        return solved

    def nodes(self, per_dim: int) -> tuple[Tensor, Tensor]:
        """x ``[M, D]``, differentiable, and weights ``[M]``."""
        standard, weight = hermite(len(self.loc), per_dim)
        return self.loc + standard @ self.scale_tril.mT, weight

    def set(self, loc: Tensor, covariance: Tensor) -> None:
        """Take this mean and covariance."""
        tril = torch.linalg.cholesky(covariance)
        with torch.no_grad():
            self.loc.copy_(loc)
            self.log_scale.copy_(tril.diagonal().log())
            self.lower.copy_((tril / tril.diagonal().unsqueeze(-1)).tril(-1))


class Part(NamedTuple):
    """A global of the model as a function of x: its value, and log |d value / d x|."""

    value: Tensor
    log_jacobian: Tensor


class Program(nn.Module, ABC):
    """A model and a guide as Pyro programs, and what sums over the states say of both.

    Batches of x are ``[M, D]`` in all methods but ``parts``.

    Args:
        pathwise: whether x is reparameterised; otherwise it is a decision like the states.
    """

    name: ClassVar[str]
    depth: ClassVar[int]
    """Plates of the model, ``max_plate_nesting``."""
    labels: ClassVar[tuple[str, ...]]
    """Of the globals that ``values`` gives."""

    def __init__(self, *, pathwise: bool = True) -> None:
        super().__init__()
        self.pathwise = pathwise
        self.globals = Globals(self.start())

    @abstractmethod
    def start(self) -> Tensor:
        """x where guides and searches start, ``[D]``."""

    @abstractmethod
    def parts(self, x: Tensor) -> dict[str, Part]:
        """The model's globals by site; x is ``[*batch, D]``, values are ``[*batch, *event]``."""

    @abstractmethod
    def values(self, x: Tensor) -> Tensor:
        """The globals whose means count, ``[M, G]``."""

    @abstractmethod
    def log_joint(self, x: Tensor) -> Tensor:
        """log p(x, y), ``[M]``: the states are summed out, the density is that of x."""

    @abstractmethod
    def states(self, x: Tensor) -> Tensor:
        """P(state = 1 | x, y), ``[M, S]``."""

    @abstractmethod
    def guide_states(self, x: Tensor) -> Tensor:
        """q(state = 1 | x), ``[M, S]``."""

    @abstractmethod
    def expected(self, x: Tensor) -> Tensor:
        """E log p(x, z, y) - log q(z | x) over q(z | x), ``[M]``."""

    @abstractmethod
    def model(self) -> None:
        """The log joint."""

    @abstractmethod
    def sample_states(self, x: Tensor, infer: dict[str, Any]) -> None:
        """q(z | x); ``infer`` goes to every site."""

    def guide(self, infer: Mapping[str, Any] | None = None) -> None:
        """q(x) q(z | x): an auxiliary Gaussian, from which the model's globals follow."""
        own = pyro.module(self.name, self)
        normal = own.globals.normal().has_rsample_(self.pathwise)
        x = pyro.sample("x", normal, infer={"is_auxiliary": True})
        for name, (value, log_jacobian) in own.parts(x).items():
            event_dim = value.ndim - log_jacobian.ndim
            pyro.sample(name, dist.Delta(value, -log_jacobian, event_dim=event_dim))
        own.sample_states(x, dict(infer or {}))

    def bound(self, per_dim: int = 5) -> Tensor:
        """The ELBO, differentiable: sums over z, quadrature over x."""
        x, weight = self.globals.nodes(per_dim)
        found: Tensor = weight @ self.expected(x) + self.globals.normal().entropy()
        return found

    @torch.no_grad()
    def moments(self, per_dim: int = 7) -> tuple[Tensor, Tensor, Tensor]:
        """Means ``[G]``, standard deviations ``[G]`` and P(state = 1) ``[S]`` under the guide."""
        x, weight = self.globals.nodes(per_dim)
        values = self.values(x)
        means = weight @ values
        pairs = zip(weight.split(TOGETHER), x.split(TOGETHER), strict=True)
        states = torch.stack([own @ self.guide_states(part) for own, part in pairs]).sum(0)
        return means, (weight @ (values - means).square()).sqrt(), states


# ------------------------------------------------------------------------------------------------------------------ fit


MEANS, STATES = "means off by sd", "states off by"
"""What a fit says on its way: the largest distance of a global's mean from the posterior's, in standard deviations of
the posterior, and of a state's marginal from the posterior's."""


@dataclass(frozen=True)
class CorrectedMeans:
    """What importance sampling makes of a guide.

    Attributes:
        weights: what its weights say.
        means: of the globals, ``[G]``.
        errors: their standard errors.
    """

    weights: Corrected
    means: list[float]
    errors: list[float]


@torch.no_grad()
def corrected_means(program: Program, num_draws: int = 4000) -> CorrectedMeans:
    """Draws of the fitted guide, by the programs of the fit, with Pareto-smoothed weights.

    Args:
        program: model and guide.
        num_draws: at least so many, in rounds of at most 1000.
    """
    loss = sf.posteriors.ScoreFunctionELBO(min(num_draws, TOGETHER), max_plate_nesting=program.depth)
    weights, found = list[Tensor](), list[Tensor]()
    with pyro.get_param_store().scope():
        for _ in range(math.ceil(num_draws / loss.num_particles)):
            draws = loss.draws(program.model, program.guide)
            weights.append(draws.fx.sum(-1))
            found.append(program.values(draws.x["x"].reshape(loss.num_particles, -1)))
    log_weights, values = torch.cat(weights), torch.cat(found)
    share = sf.posteriors.psis(log_weights).log_weights.softmax(0)
    means = share @ values
    errors = (share.square() @ (values - means).square()).sqrt()
    return CorrectedMeans(corrected(log_weights), means.tolist(), errors.tolist())


@dataclass(frozen=True)
class Fit:
    """A fitted guide beside what is exact."""

    program: Program
    exact: Posterior
    corrected: CorrectedMeans
    curve: list[Progress]

    def summary(self) -> dict[str, Any]:
        """What ``result.json`` says of it."""
        means, sds, states = self.program.moments()
        last, exact = self.curve[-1], self.exact
        off = (torch.tensor(self.corrected.means, dtype=means.dtype) - exact.means) / exact.sds
        return {
            "family": self.program.name,
            "bound": last.bound,
            "below": last.gap,
            "mean_error": last.others[MEANS],
            "state_error": last.others[STATES],
            "goal_met": last.others[MEANS] <= 0.1 and last.others[STATES] <= 0.02,
            "means": dict(zip(self.program.labels, means.tolist(), strict=True)),
            "sd_ratios": dict(zip(self.program.labels, (sds / exact.sds).tolist(), strict=True)),
            "states": states.tolist(),
            "corrected": asdict(self.corrected.weights),
            "corrected_means": dict(zip(self.program.labels, self.corrected.means, strict=True)),
            "corrected_mean_error": off.abs().max().item(),
            "seconds": last.seconds,
        }


def fit(
    program: Program,
    exact: Posterior,
    seed: int,
    steps: int,
    progress: Callable[[Progress], None] | None = None,
    *,
    particles: int,
    rates: Mapping[str, float],
    should_stop: Callable[[], bool] = lambda: False,
) -> Fit:
    """Fit by Pyro's SVI with ``ScoreFunctionELBO`` and ClippedAdam, whose learning rates decay to a hundredth.

    Pyro validates the first gradient only: with hundreds of sites that costs as much as the rest.

    Args:
        program: model and guide; the guide goes on from where it is.
        exact: what the fit is compared with on its way.
        seed: of the particles.
        steps: of the optimiser.
        progress: called about 30 times on the way.
        particles: N.
        rates: learning rates at the start, by what a parameter's name begins with. Log odds have further to go than
            the rest.
        should_stop: asked after every step.
    """
    pyro.set_rng_seed(seed)
    loss = sf.posteriors.ScoreFunctionELBO(particles, max_plate_nesting=program.depth)

    def settings(name: str) -> dict[str, Any]:
        own = name.removeprefix(f"{program.name}.")  # Pyro's names start with the module's
        return decaying(steps, next(rate for start, rate in rates.items() if own.startswith(start)), 0.01)

    def errors() -> dict[str, float]:
        means, _, states = program.moments(5)
        away, apart = ((means - exact.means) / exact.sds).abs().max(), (states - exact.states).abs().max()
        return {MEANS: away.item(), STATES: apart.item()}

    missing = [name for name, _ in program.named_parameters() if not name.startswith(tuple(rates))]
    if missing:
        raise ValueError(f"rates are given for {list(rates)}, but the guide also has {missing}: give theirs too.")
    with pyro.get_param_store().scope():
        loss.differentiable_loss(program.model, program.guide)  # validated
    with pyro.get_param_store().scope(), pyro.validation_enabled(False):
        svi = SVI(program.model, program.guide, pyro.optim.ClippedAdam(settings), loss=loss)
        best, options = exact.log_evidence, dict[str, Any](others=errors, marks=30, should_stop=should_stop)
        curve = watched(svi.step, steps, program.bound, best, progress, **options)
    return Fit(program, exact, corrected_means(program), curve)


def report(row: Mapping[str, Any]) -> str:
    """What a fit came to, for the terminal."""
    found = row["corrected"]
    return (
        f"{row['family']}: {row['below']:.4f} nats below the evidence; means within {row['mean_error']:.3f} sd, states "
        f"within {row['state_error']:.4f}: goal {'met' if row['goal_met'] else 'not met'}\n"
        f"  k-hat {found['khat']:.2f} (threshold {found['threshold']:.2f}); corrected: log evidence "
        f"{found['log_evidence']:.4f} +- {found['log_evidence_error']:.4f}, means within "
        f"{row['corrected_mean_error']:.3f} sd"
    )


# -------------------------------------------------------------------------------------------------------------- compare


@dataclass(frozen=True)
class Row:
    """One way to estimate the gradient, at one guide.

    Attributes:
        name: of the way.
        variance: mean squared distance from the exact gradient.
        error: length of the mean's deviation from it, in its own standard errors, about 1 without bias.
        milliseconds: CPU, median of one estimate.
    """

    name: str
    variance: float
    error: float
    milliseconds: float


def compare(program: Program, repeats: int, particles: int, *, warm: int = 30) -> list[Row]:
    """Variance and CPU time of the gradient where the guide now is; all ways in turns.

    ``TraceEnum_ELBO`` sums over all states, so what noise it has is that of x.

    Args:
        program: stays as it is.
        repeats: estimates of each.
        particles: N.
        warm: estimates before these, from which averages and coefficients are learnt.
    """
    ours = sf.posteriors.ScoreFunctionELBO
    shape: dict[str, Any] = {"max_plate_nesting": program.depth}
    theirs: dict[str, Any] = {"num_particles": particles, "vectorize_particles": True, **shape}
    average = {"baseline": {"use_decaying_avg_baseline": True}}
    ways: dict[str, tuple[ELBO, dict[str, Any]]] = {
        "ScoreFunctionELBO": (ours(particles, **shape), {}),
        "ScoreFunctionELBO, leave-one-out": (ours(particles, baseline=sf.LeaveOneOut(), **shape), {}),
        "ScoreFunctionELBO, no baseline": (ours(particles, baseline=None, **shape), {}),
        "TraceGraph_ELBO": (TraceGraph_ELBO(**theirs), {}),
        "TraceGraph_ELBO, decaying average": (TraceGraph_ELBO(**theirs), average),
        "Trace_ELBO": (Trace_ELBO(**theirs), {}),
        "TraceEnum_ELBO, states summed": (TraceEnum_ELBO(**theirs), {"enumerate": "parallel"}),
    }
    parameters = [p for p in program.parameters() if p.requires_grad]
    truth = flat(torch.autograd.grad(-program.bound(7), parameters, materialize_grads=True))
    found: dict[str, list[Tensor]] = {name: [] for name in ways}
    clock: dict[str, list[float]] = {name: [] for name in ways}
    stores = {name: pyro.get_param_store().get_state() for name in ways}
    for turn in range(warm + repeats):
        for name, (loss, infer) in ways.items():
            program.zero_grad()
            with pyro.get_param_store().scope(stores[name]) as stores[name]:
                begin = time.process_time()
                loss.loss_and_grads(program.model, partial(program.guide, infer))
                spent = time.process_time() - begin
            if turn >= warm:
                clock[name].append(1000 * spent)
                found[name].append(flat_grad(parameters))
    program.zero_grad()
    rows = []
    for name in ways:
        gradients = torch.stack(found[name])
        variance = (gradients - truth).square().sum(-1).mean().item()
        error = (gradients.mean(0) - truth).norm().item() / math.sqrt(variance / repeats)
        rows.append(Row(name, variance, error, median(clock[name])))
    return rows


def show_rows(rows: Sequence[Row]) -> str:
    """A table for the terminal."""
    return "\n".join(
        f"{row.name:<36} squared distance {row.variance:10.4g}   error {row.error:5.2f}   {row.milliseconds:7.2f} ms   "
        f"product {row.variance * row.milliseconds:10.4g}"
        for row in rows
    )


# ----------------------------------------------------------------------------------------------------------------- plot


def plot(fits: Sequence[Fit], path: Path) -> None:
    """Means beside the posterior's, marginals of the states against the posterior's, and the way of the bound."""
    from matplotlib.figure import Figure

    exact, labels = fits[0].exact, fits[0].program.labels
    figure = Figure(figsize=(13, 4), layout="constrained")
    means, states, way = figure.subplots(1, 3)
    means.axhspan(-0.1, 0.1, color="lightgrey")
    states.plot([0, 1], [0, 1], color="lightgrey")
    for number, fitted in enumerate(fits):
        name, colour = fitted.program.name, f"C{number}"
        found, sds, marginals = fitted.program.moments()
        places = [i + 0.2 * (number - (len(fits) - 1) / 2) for i in range(len(labels))]
        off, spread = (found - exact.means) / exact.sds, sds / exact.sds
        means.errorbar(places, off.tolist(), spread.tolist(), fmt="o", color=colour, label=name)
        states.plot(exact.states.tolist(), marginals.tolist(), ".", color=colour, label=name)
    means.set_xticks(range(len(labels)), labels)
    means.set_ylabel("guide minus posterior, posterior sd; bars: sd")
    states.set_xlabel("exact P(state = 1 | y)")
    states.set_ylabel("guide")
    draw_ways(way, {fitted.program.name: fitted.curve for fitted in fits}, seconds=True)
    way.set_ylabel("below the log evidence, nats")
    figure.savefig(path, dpi=120)


def run(
    argv: list[str] | None,
    description: str | None,
    families: Mapping[str, type[Program]],
    data: tuple[Tensor, dict[str, Any]],
    *,
    name: str,
    nodes: int,
    steps: int,
    particles: int,
    rates: Mapping[str, float],
) -> int:
    """The command line of both programs: fit the families in turn, then compare with what is exact.

    Args:
        argv: None: of the process.
        description: whose first line says what the program is.
        families: by name; "exact" is among them.
        data: y, and what posteriordb says.
        name: of the folder and the plot.
        nodes: of the quadrature, in each dimension.
        steps: by default.
        particles: by default.
        rates: see ``fit``.
    """
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument("--steps", type=at_least(1), default=steps)
    parser.add_argument("--particles", type=at_least(2), default=particles, help="leave-one-out takes two or more")
    parser.add_argument("--families", nargs="+", choices=list(families), default=list(families))
    parser.add_argument("--score", action="store_true", help="the globals by the score function too")
    parser.add_argument("--repeats", type=at_least(0), default=0, help="gradients for the variance of each estimator")
    parser.add_argument("--out", type=Path, default=Path("runs") / name, help="folder of result and plot")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)  # before the work: a path that cannot be is found out at once
    (y, reference), fits = data, list[Fit]()
    exact = posterior(families["exact"](y), nodes)
    with Interruption() as interrupted:
        for family in dict.fromkeys(options.families):
            print(family)
            program = families[family](y, pathwise=not options.score)
            settings: dict[str, Any] = {"particles": options.particles, "should_stop": interrupted}
            fits.append(fit(program, exact, options.seed, options.steps, show, rates=rates, **settings))
            if interrupted():
                break
    print(f"\nlog evidence {exact.log_evidence:.6f}, of ordered means")
    rows = [fitted.summary() for fitted in fits]
    print(*map(report, rows), sep="\n")
    found = []
    if options.repeats and not interrupted():
        found = compare(fits[-1].program, options.repeats, options.particles)
        print(f"\ngradients at the fitted guide, {fits[-1].program.name}\n{show_rows(found)}")
    record: dict[str, Any] = {
        "complete": not interrupted(),
        "log_evidence": exact.log_evidence,
        "means": dict(zip(fits[0].program.labels, exact.means.tolist(), strict=True)),
        "sds": dict(zip(fits[0].program.labels, exact.sds.tolist(), strict=True)),
        "states": exact.states.tolist(),
        "reference": reference,
        "families": rows,
        "compare": [asdict(row) for row in found],
        "curves": [[asdict(point) for point in fitted.curve] for fitted in fits],
    }
    write_result(options.out, vars(options), record)
    plot(fits, options.out / f"{name}.png")
    return 130 if interrupted() else 0

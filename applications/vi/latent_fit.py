"""A fitted guide of discrete states under continuous globals, beside the exact posterior and corrected by weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import pyro
import torch
from pyro.infer import SVI
from torch import Tensor

import scorefn as sf
from applications.vi.correction import Corrected, corrected
from applications.vi.fitting import Progress, decaying, watched
from applications.vi.latent_posterior import Posterior
from applications.vi.latent_states import TOGETHER, Program

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

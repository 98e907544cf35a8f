"""Estimated gradients held against exact ones, without and with variance reducers: one check for each door."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.distributions import Bernoulli, Normal

import scorefn as sf
from applications.rl import tabular_mdp
from applications.vi import belief_net_training

Loss = Callable[[], Tensor]


@dataclass(frozen=True)
class GradientCheck:
    """One gradient, exact and estimated without and with variance reducers; moments are over ``repeats`` estimates.

    Attributes:
        problem: what is differentiated.
        reducers: what "with" uses beyond "without".
        exact_norm: length of the exact gradient.
        estimated_error: distance of the mean estimate (with reducers) from it, as a share of its length.
        expected_error: what the standard error lets one expect of that share.
        largest_z: over the coordinates, deviation from the exact gradient in standard errors (with reducers).
        variance_without: total variance of one estimate without reducers.
        variance_with: with them.
        milliseconds: CPU time of one estimate and its gradient (with reducers).
    """

    problem: str
    reducers: str
    coordinates: int
    exact_norm: float
    estimated_error: float
    expected_error: float
    largest_z: float
    variance_without: float
    variance_with: float
    milliseconds: float
    repeats: int

    @property
    def agrees(self) -> bool:
        """Whether no coordinate deviates by more than chance allows: about one false alarm in a million tours."""
        false_alarm = 1e-6 / self.coordinates
        return self.largest_z < (2 * torch.tensor(1.0 / false_alarm).log()).sqrt().item() + 1.0


def gradient_check(
    problem: str, reducers: str, without: Loss, reduced: Loss, params: list[Tensor], exact: list[Tensor], repeats: int
) -> GradientCheck:
    """Measure both estimators, in turn."""
    table = sf.diagnostics.compare({"without": without, "with": reduced}, params, exact, repeats=repeats)
    with_reducers = table.statistics["with"]
    truth = torch.cat([g.flatten() for g in exact])
    estimate = torch.cat([g.flatten() for g in with_reducers.mean])
    return GradientCheck(
        problem=problem,
        reducers=reducers,
        coordinates=len(truth),
        exact_norm=truth.norm().item(),
        estimated_error=((estimate - truth).norm() / truth.norm()).item(),
        expected_error=(with_reducers.total_variance / repeats) ** 0.5 / truth.norm().item(),
        largest_z=table.bias_z["with"],
        variance_without=table.statistics["without"].total_variance,
        variance_with=with_reducers.total_variance,
        milliseconds=1e3 * with_reducers.seconds,
        repeats=repeats,
    )


def bernoulli_check(repeats: int) -> GradientCheck:
    """Five coins and a quadratic; exact by enumeration of 32 outcomes."""
    logits = torch.zeros(5, requires_grad=True)
    p = Bernoulli(logits=logits)

    def f(x: Tensor) -> Tensor:
        return (x - 0.45).square().sum(-1)

    def loss(baseline: Any) -> Loss:
        return lambda: sf.expectation(p, f, 16, baseline=baseline)

    exact = sf.diagnostics.exact_gradient(p, f, [logits])
    return gradient_check(
        "five Bernoullis, 16 draws", "leave-one-out", loss(None), loss("auto"), [logits], list(exact), repeats
    )


def search_check(repeats: int) -> GradientCheck:
    """A normal search distribution on a curved valley; exact by quadrature."""
    location = torch.tensor([-0.5, 1.0], requires_grad=True)
    log_scale = torch.tensor([-1.0, -1.0], requires_grad=True)
    params = [location, log_scale]

    def p() -> Normal:
        return Normal(location, log_scale.exp())

    def f(x: Tensor) -> Tensor:
        return (x[..., 0] - 1).square() + 10 * (x[..., 1] - x[..., 0].square()).square()

    def loss(baseline: Any) -> Loss:
        return lambda: sf.expectation(p(), f, 16, baseline=baseline)

    exact = sf.diagnostics.exact_gradient(p(), f, params)
    return gradient_check(
        "Normal on a valley, 16 draws", "leave-one-out", loss(None), loss("auto"), params, list(exact), repeats
    )


def trajectory_check(seed: int, repeats: int) -> GradientCheck:
    """Episodes of the tabular problem; exact by summing over all of them."""
    mdp = tabular_mdp.TabularMDP.random(seed)
    logits = torch.zeros(mdp.reward.shape[:2], dtype=torch.float64, requires_grad=True)
    p = tabular_mdp.EpisodeDistribution(mdp, logits)

    def loss(credit: Any, baseline: Any) -> Loss:
        return lambda: sf.expectation(p, tabular_mdp.rewards, 16, credit=credit, baseline=baseline)

    (exact,) = torch.autograd.grad(tabular_mdp.backward_induction(mdp, logits), logits)
    without, reduced = loss(sf.Total(), None), loss(None, "auto")
    return gradient_check(
        "tabular MDP, 16 episodes", "reward-to-go, leave-one-out", without, reduced, [logits], [exact], repeats
    )


def posterior_check(fit: belief_net_training.Training, repeats: int) -> GradientCheck:
    """The guide of the digits on one batch; exact by summing over the 1024 states of each image."""
    images, params = fit.train[:50], [list(fit.net.encoder.parameters())[-1]]  # ten biases, one for each latent

    def loss(baseline: Any) -> Loss:
        elbo = sf.posteriors.ScoreFunctionELBO(num_particles=8, max_plate_nesting=1, baseline=baseline)

        def estimate() -> Tensor:
            with pyro.get_param_store().scope():
                return -elbo.differentiable_loss(fit.net.model, fit.net.guide, images) / fit.net.num_images

        return estimate

    exact = torch.autograd.grad(fit.net.exact_bound(images).mean(), params)
    return gradient_check(
        "digits in Pyro, 8 particles",
        "leave-one-out",
        loss(None),
        loss("auto"),
        params,
        list(exact),
        repeats,
    )

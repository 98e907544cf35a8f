"""The estimators of the ELBO's gradient that a study compares on a sigmoid belief net, some of them tuned to the net.

Each is a function of the guide and the black box of a minibatch, ``(p, f) -> [images]``. ``gradient_variance.py``
measures them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Independent

import scorefn as sf
from applications.vi.belief_net import BeliefNet, frozen
from applications.vi.images import Batches

BlackBox = Callable[[Tensor], Tensor]
Estimate = Callable[["Independent[Any]", BlackBox], Tensor]
"""Of E f for each image, ``(p, f) -> [images]``, with the estimator's gradient in the logits of p."""


def problem(net: BeliefNet, images: Tensor) -> tuple[Independent[Any], BlackBox]:
    """Guide, one joint draw of K latents for each image, and black box."""
    q, f = frozen(net, images)
    return Independent(q, 1), f


def gradient(estimate: Estimate, p: Independent[Any], f: BlackBox) -> Tensor:
    """One estimate in the logits of each image, ``[images, K]``."""
    return in_the_logits(estimate(p, f), p)


def in_the_logits(value: Tensor, p: Independent[Any]) -> Tensor:
    """The gradient ``[images, K]`` of values ``[images]``; their graph is kept."""
    found: Tensor = torch.autograd.grad(value.sum(), p.base_dist.logits, retain_graph=True)[0]
    return found


def plain(num_samples: int, baseline: sf.LeaveOneOut | None) -> Estimate:
    """Independent draws."""
    return lambda p, f: sf.expectation(p, f, num_samples, baseline=baseline)


def leave_one_out(num_samples: int) -> tuple[str, Estimate]:
    """By its name in the tables."""
    return f"leave-one-out ({num_samples})", plain(num_samples, sf.LeaveOneOut())


def estimators() -> dict[str, Estimate]:
    """Those that need no tuning; in brackets the draws for an image, where there is a choice."""
    return {
        "no baseline (2)": plain(2, None),
        **dict(leave_one_out(n) for n in (2, 3, 4, 8)),
        "DisARM (1 pair)": sf.DisARM(),
        "DisARM (2 pairs)": sf.DisARM(2),
        **{f"ARMS ({n})": sf.ARMS(n) for n in (2, 3, 4)},
        **{f"DoubleControlVariate ({n})": sf.DoubleControlVariate(n) for n in (2, 3)},
        **{f"UnorderedSet ({n})": sf.UnorderedSet(n) for n in (2, 3)},
        "SumAndSample (2 + 1)": sf.SumAndSample(2, 1),
        "LocalExpectation": sf.LocalExpectation(),
    }


class Control(nn.Module):
    """RELAX's control: ``scale f(sigmoid(z / temperature)) + network(z)``, the paper's second form.

    Args:
        latents: K.
        hidden: units of the network.

    Attributes:
        f: the black box of the present minibatch.
    """

    def __init__(self, latents: int, hidden: int = 137) -> None:
        super().__init__()
        self.f: BlackBox = lambda z: z.sum(-1)
        self.log_temperature, self.scale = nn.Parameter(torch.tensor(0.5).log()), nn.Parameter(torch.tensor(1.0))
        last = nn.Linear(hidden, 1)
        nn.init.zeros_(last.weight)
        self.network = nn.Sequential(nn.Linear(latents, hidden), nn.Tanh(), last, nn.Flatten(-2))

    def forward(self, z: Tensor) -> Tensor:
        """``[2, images, K] -> [2, images]``."""
        relaxed: Tensor = self.f(torch.sigmoid(z / self.log_temperature.exp()))
        values: Tensor = self.scale * relaxed + self.network(z.tanh())
        return values


class ModelRelax:
    """RELAX with this control, which is told the black box of each minibatch."""

    def __init__(self, latents: int, like: Tensor) -> None:
        self.control = Control(latents).to(like)
        self.estimator = sf.RELAX(self.control)

    def __call__(self, p: Independent[Any], f: BlackBox) -> Tensor:
        """The estimate."""
        self.control.f = f
        value: Tensor = self.estimator(p, f)
        return value

    def __repr__(self) -> str:
        """As REBAR has it."""
        temperature, scale = self.control.log_temperature.exp().item(), self.control.scale.item()
        return f"RELAX(temperature={temperature:.4g}, scale={scale:.4g}, and a network)"


def tune(
    relaxed: sf.REBAR | ModelRelax, net: BeliefNet, batches: Iterable[Tensor], learning_rate: float = 1e-2
) -> None:
    """Lower the variance by Adam, a step for each minibatch."""
    estimator = relaxed.estimator if isinstance(relaxed, ModelRelax) else relaxed
    adam = torch.optim.Adam(estimator.parameters(), learning_rate)
    for batch in batches:
        p, f = problem(net, batch)
        if isinstance(relaxed, ModelRelax):
            relaxed.control.f = f
        x = estimator.sample(p)
        adam.zero_grad()
        estimator.variance_loss(p, x, f(x)).backward()
        adam.step()


def fitted(num_samples: int, net: BeliefNet, batches: Iterable[Tensor]) -> sf.DoubleControlVariate:
    """The double control variate whose alpha has the least variance on these minibatches.

    Its gradient is ``g_0 + alpha g_1``. With differences d_0 and d_1 of two estimates each, whose means are 0,
    ``alpha = -E<d_0, d_1> / E |d_1|^2``.
    """
    without, whole = sf.DoubleControlVariate(num_samples, 0.0), sf.DoubleControlVariate(num_samples, 1.0)
    inner = square = 0.0
    for batch in batches:
        p, f = problem(net, batch)
        pair = []
        for _ in range(2):
            x = whole.sample(p)
            fx = f(x)
            zero, one = (in_the_logits(each.surrogate(p, x, fx), p) for each in (without, whole))
            pair.append((zero, one - zero))
        by_zero, by_slope = (first - second for first, second in zip(*pair, strict=True))
        inner += (by_zero * by_slope).sum().item()
        square += by_slope.square().sum().item()
    return sf.DoubleControlVariate(num_samples, -inner / square)


def tuned(net: BeliefNet, images: Tensor, steps: int, seed: int) -> dict[str, Estimate]:
    """Those that are fitted to the net before they are measured, on minibatches of another seed than the study's."""

    def batches() -> Iterable[Tensor]:
        return islice(Batches(images, seed), steps)

    rebar, relax = sf.REBAR(), ModelRelax(net.latents, images)
    for relaxed in (rebar, relax):
        tune(relaxed, net, batches())
    doubles = {f"DoubleControlVariate ({n}), fitted": fitted(n, net, batches()) for n in (2, 3)}
    return {**doubles, "REBAR": rebar, "RELAX": relax}

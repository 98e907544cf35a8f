"""Pyro's programs: digits and capture-recapture."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyro
import torch
from pyro.infer import ELBO
from torch import Tensor, nn

import scorefn as sf
from applications.benchmarks.reducers.closed_forms import flat_gradient
from applications.benchmarks.reducers.variances import Estimate, Problem
from applications.vi import capture_recapture
from applications.vi.belief_net import BeliefNet
from applications.vi.images import BATCH, Batches


def with_pyro(
    loss: ELBO, model: Callable[..., None], guide: Callable[..., None], parameters: Sequence[Tensor], *arguments: Any
) -> Tensor:
    """The gradient of the ELBO as Pyro's SVI would take it."""
    loss.loss_and_grads(model, guide, *arguments)
    gradient = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    for value in pyro.get_param_store().values():
        value.unconstrained().grad = None
    return -gradient


def belief_net(net: BeliefNet, images: Tensor, title: str, particles: int = 8) -> Problem:
    """The encoder's gradient of a sigmoid belief net on batches of 100 digits."""
    encoder, batches, now = list(net.encoder.parameters()), Batches(images, 0), [images[:1]]

    def prepare() -> tuple[Tensor, float]:
        now[0] = next(batches)
        return flat_gradient(net.exact_bound(now[0]).mean(), encoder), 0.0

    def elbo(**options: Any) -> Estimate:
        loss = sf.posteriors.ScoreFunctionELBO(particles, max_plate_nesting=1, **options)

        def estimate() -> Tensor:
            gradient = with_pyro(loss, net.model, net.guide, encoder, now[0]) / net.num_images
            for parameter in net.parameters():
                parameter.grad = None
            return gradient

        return estimate

    scale = net.num_images / BATCH
    value = nn.Sequential(nn.Linear(images.shape[1], 64), nn.Tanh(), nn.Linear(64, 1), Scaled(-20 * scale))
    network = sf.ValueFunction(value, lambda draws: now[0], optimizer=torch.optim.Adam(value.parameters(), lr=1e-2))
    regression = sf.RegressionBaseline(lambda draws: now[0].expand(len(draws), *now[0].shape))
    return Problem(
        f"Digits, {title}",
        f"Sigmoid belief net of `applications/vi/discrete_vae.py`, gradient of the encoder, nats per image, "
        f"{particles} particles; variance about the exact gradient of the same batch of 100 images.",
        {
            "leave-one-out": elbo(),
            "no baseline": elbo(baseline=None),
            "MovingAverage": elbo(baseline=sf.MovingAverage(0.9)),
            "ValueFunction(image)": elbo(baseline=network),
            "RegressionBaseline(image)": elbo(baseline=regression),
            "OptimalConstant": elbo(baseline=sf.OptimalConstant()),
            "AdaptiveRaoBlackwell": elbo(baseline=sf.AdaptiveRaoBlackwell()),
            "Total credit, leave-one-out": elbo(credit=sf.Total()),
        },
        {"the encoder": slice(None)},
        prepare,
        warm_up=200,
    )


class Scaled(nn.Module):
    """Times a number, plus it: outputs of order one become values of the right size."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """``[..., 1] -> [...]``."""
        return self.scale * (1 + x.squeeze(-1))


def recapture(
    net: capture_recapture.CaptureRecapture, title: str, remark: str = "", *, by_hand: bool = False
) -> Problem:
    """The gradient of capture-recapture in all parameters of its guide."""
    particles = capture_recapture.PARTICLES
    parameters = list(net.parameters.parameters())
    exact = flat_gradient(net.exact_bound(), parameters)

    def elbo(**options: Any) -> Estimate:
        loss = sf.posteriors.ScoreFunctionELBO(particles, max_plate_nesting=1, **options)
        return lambda: with_pyro(loss, net.model, net.guide, parameters)

    class Stated:
        """The draws of plain PyTorch as a measure."""

        def draws(self, f: Any, num_samples: int, *, coupling: Any = None) -> sf.Draws:
            return net.draws(num_samples)

    def drawn(baseline: Any, credit: Any = None) -> Estimate:
        def value() -> Tensor:
            return sf.expectation(Stated(), net.draws, particles, credit=credit, baseline=baseline)

        return lambda: flat_gradient(value(), parameters)

    make: Any = (lambda baseline=None, credit=None: drawn(baseline, credit)) if by_hand else elbo
    return Problem(
        f"Capture-recapture, {title}",
        f"`applications/vi/capture_recapture.py`, {particles} particles, Betas by the score function; exact gradient "
        f"in closed form. Globals: four parameters of two Betas; locals: 150 logits. {remark}",
        {
            "leave-one-out": make(baseline=sf.LeaveOneOut()),
            "AdaptiveRaoBlackwell": make(baseline=sf.AdaptiveRaoBlackwell()),
            "Total credit, leave-one-out": make(baseline=sf.LeaveOneOut(), credit=sf.Total()),
            "no baseline": make(baseline=None),
            "MovingAverage": make(baseline=sf.MovingAverage(0.9)),
            "OptimalConstant": make(baseline=sf.OptimalConstant()),
        },
        {"globals": slice(0, 4), "locals": slice(4, None)},
        lambda: (exact, 0.0),
        repeats=2,
    )


FIRST = (
    "Program order charges the globals with everything that follows, which is the whole log-ratio: near the optimum it "
    "is almost constant, and nothing is left to win."
)
LAST = (
    "Program order charges the globals with log p but not with -log q of the individuals, which had balanced it, and "
    "the individuals with everybody's log p, since the globals between them may have read all. AdaptiveRaoBlackwell "
    "learns to add what was left out; one coefficient cannot take away what others brought in."
)
BY_HAND = (
    "The credit is an `Influence` of what truly depends on what, as a dependency tracker would find it: best for the "
    "individuals, and for the globals worse than no tracking at all until AdaptiveRaoBlackwell adds the rest."
)


def recaptures() -> Iterator[Problem]:
    """Both orders of the guide and the dependencies stated by hand, at the start and at the optimum."""
    histories = capture_recapture.load()
    for stage in ("at the start", "at the optimum"):
        for title, remark, last, by_hand in (
            ("ScoreFunctionELBO, globals sampled first", FIRST, False, False),
            ("ScoreFunctionELBO, globals sampled last", LAST, True, False),
            ("plain PyTorch, dependencies stated by hand", BY_HAND, False, True),
        ):
            net = capture_recapture.CaptureRecapture(histories, globals_last=last)
            if stage == "at the optimum":
                net.to_optimum()
            yield recapture(net, f"{stage}: {title}", remark, by_hand=by_hand)

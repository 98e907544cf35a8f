"""Variance and cost of the losses for Pyro, on the encoder's gradient of a sigmoid belief net that can be summed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro.infer import ELBO, Trace_ELBO, TraceGraph_ELBO
from torch import Tensor

import scorefn as sf
from applications.gradients import flat, flat_grad
from applications.vi.belief_net import BeliefNet
from applications.vi.images import Batches
from scorefn.posteriors import ScoreFunctionELBO


@dataclass(frozen=True)
class GradientRow:
    """An estimator of the encoder's gradient on batches of 100, in nats per image.

    Args:
        name: of the loss.
        particles: N.
        variance: total over the encoder's parameters, about the exact gradient of the same batch.
        error: length of the mean deviation from the exact gradient, in its own standard errors; about 1 if unbiased.
        milliseconds: CPU time of one ``loss_and_grads``, median.
    """

    name: str
    particles: int
    variance: float
    error: float
    milliseconds: float


AVERAGE = "Pyro TraceGraph_ELBO, decaying average"
COMPARED: dict[str, Callable[[int], ELBO]] = {
    "ScoreFunctionELBO, leave-one-out": lambda n: ScoreFunctionELBO(n, max_plate_nesting=1, baseline=sf.LeaveOneOut()),
    "ScoreFunctionELBO, adaptive": lambda n: ScoreFunctionELBO(n, max_plate_nesting=1),
    "ScoreFunctionELBO, MovingAverage": lambda n: ScoreFunctionELBO(
        n, max_plate_nesting=1, baseline=sf.MovingAverage(0.9)
    ),
    "ScoreFunctionELBO, no baseline": lambda n: ScoreFunctionELBO(n, max_plate_nesting=1, baseline=None),
    "Pyro Trace_ELBO": lambda n: Trace_ELBO(n, max_plate_nesting=1, vectorize_particles=True),
    "Pyro TraceGraph_ELBO": lambda n: TraceGraph_ELBO(n, max_plate_nesting=1, vectorize_particles=True),
    AVERAGE: lambda n: TraceGraph_ELBO(n, max_plate_nesting=1, vectorize_particles=True),
}


def gradient_table(
    net: BeliefNet,
    images: Tensor,
    *,
    particles: tuple[int, ...] = (8,),
    repeats: int = 200,
    warm_up: int = 30,
    seed: int = 0,
) -> list[GradientRow]:
    """Variance and cost of each loss, in turns on the same random batches: averages see what they see in training.

    Args:
        net: its encoder's gradient is estimated; of few latents.
        images: to take batches of 100 from.
        particles: each N to try.
        repeats: estimates that count for each loss and N.
        warm_up: estimates before, which fill the averages.
        seed: of batches and particles.

    Raises:
        sf.ScorefnError: the exact gradient is out of reach.
    """

    def average_guide(images: Tensor) -> None:
        net.guide(images, {"baseline": {"use_decaying_avg_baseline": True, "baseline_beta": 0.9}})

    encoder = list(net.encoder.parameters())
    batches = Batches(images, seed)
    losses = {(name, n): make(n) for n in particles for name, make in COMPARED.items()}
    deviations = {key: list[Tensor]() for key in losses}
    seconds = {key: list[float]() for key in losses}
    stores = {key: dict[Any, Any](params={}, constraints={}) for key in losses}
    pyro.set_rng_seed(seed)
    for repeat in range(-warm_up, repeats):
        batch = next(batches)
        exact = flat(torch.autograd.grad(net.exact_bound(batch).mean(), encoder))
        for key, loss in losses.items():
            guide = average_guide if key[0] == AVERAGE else net.guide
            with pyro.get_param_store().scope(stores[key]) as stores[key]:
                begin = time.process_time()
                loss.loss_and_grads(net.model, guide, batch)
                spent = time.process_time() - begin
            gradient = flat_grad(encoder)
            net.zero_grad()
            if repeat >= 0:
                seconds[key].append(spent)
                deviations[key].append(-gradient / net.num_images - exact)
    rows = []
    for (name, n), found in deviations.items():
        stacked = torch.stack(found)
        variance = stacked.square().sum(-1).mean()
        error = stacked.mean(0).norm() / (variance / repeats).sqrt()
        rows.append(
            GradientRow(name, n, variance.item(), error.item(), 1e3 * float(torch.tensor(seconds[name, n]).median()))
        )
    return rows


def table(rows: list[GradientRow]) -> str:
    """As Markdown."""
    lines = ["| loss | particles | variance | error | CPU ms | variance x ms |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {row.name} | {row.particles} | {row.variance:.3g} | {row.error:.2f} | {row.milliseconds:.2f} "
        f"| {row.variance * row.milliseconds:.3g} |"
        for row in rows
    ]
    return "\n".join(lines)

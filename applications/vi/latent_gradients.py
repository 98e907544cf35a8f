"""Variance and CPU time of the gradient of a guide of discrete states, beside Pyro's own estimators."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import pyro
import torch
from pyro.infer import ELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO
from torch import Tensor

import scorefn as sf
from applications.gradients import flat, flat_grad
from applications.vi.latent_states import Program


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

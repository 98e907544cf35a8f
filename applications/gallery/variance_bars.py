"""Exact variances of gradient estimators on three coins, as bars that move with the coins' probability.

Three independent Bernoullis of probability p and ``f(x) = (x_1 + x_2 + x_3 - 1.35)^2``. ``check_unbiased`` runs each
estimator on every tuple of draws that it can make, so mean and variance are exact: nothing is sampled.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.distributions import Bernoulli

import scorefn as sf
from applications.gallery.film import film

COINS, TARGET = 3, 1.35
ESTIMATORS: dict[str, tuple[int, Any]] = {
    "no baseline": (2, partial(sf.expectation, num_samples=2, baseline=None)),
    "leave-one-out": (2, partial(sf.expectation, num_samples=2)),
    "UnorderedSet": (2, sf.UnorderedSet(2)),
    "DisARM": (2, sf.DisARM()),
    "leave-one-out, 4": (4, partial(sf.expectation, num_samples=4)),
    "ARMS, 4": (4, sf.ARMS(4)),
    "LocalExpectation": (4, sf.LocalExpectation()),
}
"""By name: evaluations of f, and the estimator."""


def f(x: Tensor) -> Tensor:
    """``[N]`` of ``[N, 3]``."""
    return (x.sum(-1) - TARGET).square()


def variances(probability: float) -> dict[str, float]:
    """Of one estimate of the gradient in the three logits, summed over these.

    Raises:
        RuntimeError: an estimator is not unbiased, or its variance is not exact.
    """
    logit = math.log(probability) - math.log1p(-probability)
    logits = torch.full((COINS,), logit, dtype=torch.float64, requires_grad=True)
    found = {}
    for name, (_, estimator) in ESTIMATORS.items():
        report = sf.diagnostics.check_unbiased((Bernoulli(logits=logits), f, estimator), params=logits)
        if not report or report.method != "exact":
            raise RuntimeError(f"{name} at p = {probability}: {report}")
        found[name] = float(report.variance.sum())
    return found


def draw(out: Path, frames: int = 33) -> Path:
    """``variance_bars.gif``: p goes from .02 to .98."""
    places = torch.linspace(0.02, 0.98, frames, dtype=torch.float64).tolist()
    rows = [variances(p) for p in places]
    figure = Figure(figsize=(6.4, 3.4), dpi=90, layout="constrained")
    axis = figure.subplots()
    colours = ["C0" if evaluations == 2 else "C1" for evaluations, _ in ESTIMATORS.values()]
    bars = axis.barh(list(ESTIMATORS), list(rows[0].values()), color=colours)
    labels = [axis.text(1e-4, i, "", va="center", fontsize=8) for i in range(len(ESTIMATORS))]
    axis.set(
        xscale="log", xlim=(1e-4, 3), xlabel="exact variance of one estimate (blue: 2 evaluations of f; orange: 4)"
    )
    axis.invert_yaxis()

    def show(i: int) -> None:
        for bar, label, value in zip(bars, labels, rows[i].values(), strict=True):
            bar.set_width(value)
            label.set(x=1.1 * max(value, 1e-4), text=f"{value:.3g}")
        axis.set_title(f"three coins, p = {places[i]:.2f}")

    return film(out / "variance_bars.gif", figure, show, frames, seconds=0.25)

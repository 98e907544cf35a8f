"""Weights, learning rates and paths: what strategies whose step size follows a path share."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from scorefn.search.strategy import State


class PathRates:
    """Weights and rates of N points in D dimensions, and the walk of paths and step size; see ``CSANES``.

    Attributes:
        weights: ``[N, 2]`` by rank, the best first: w, and the negative part of a.
        mu: ``1/sum_k w_k^2``.
        period: how many generations share one change of a full shape.
    """

    def __init__(self, num: int, dimension: int, device: torch.device) -> None:
        k = torch.arange(1, num + 1, dtype=torch.float64)
        r = math.log((num + 1) / 2) - k.log()
        positive, negative = r.clamp(min=0), (-r).clamp(min=0)
        w = positive / positive.sum()
        self.weights = torch.stack([w, -negative / negative.sum()], 1).to(device)
        self.mu = mu = 1 / float(w.square().sum())
        self.kappa = (num / (num - 1) * float((w - 1 / num).square().sum())) ** -0.5
        self.c_s = (mu + 2) / (dimension + mu + 5)
        self.d_s = 1 + self.c_s + 2 * max(0.0, math.sqrt((mu - 1) / (dimension + 1)) - 1)
        self.c_c = (4 + mu / dimension) / (dimension + 4 + 2 * mu / dimension)
        self.c_1 = 4 / ((dimension + 1.3) ** 2 + mu)
        self.c_mu = mu / (mu + 1.5 * dimension**1.5)
        self.period = max(1, int(0.1 / (self.c_1 + self.c_mu)))
        self.response = min(0.44, 1.92 / math.sqrt(dimension))
        self.chi, self.bend = _lengths(dimension)

    def walked(self, state: State, s: Tensor, step: Tensor | None = None) -> tuple[Tensor, Tensor, float]:
        """The paths p and q ``[D]``, and the growth of log sigma, after the weighted direction s ``[D]``.

        q takes ``step`` where its coordinates are not those of s.
        """
        dimension, updates = len(s), state["updates"] + 1
        p = torch.add((1 - self.c_s) * state["sigma_path"], s, alpha=self.kappa * math.sqrt(self.c_s * (2 - self.c_s)))
        square = float(p @ p) / (1 - (1 - self.c_s) ** (2 * updates))  # as long as a path from long ago
        u = math.sqrt(square) / self.chi - 1
        q = (1 - self.c_c) * state["shape_path"]
        if square < dimension * (2 + 4 / (dimension + 1)):
            q.add_(s if step is None else step, alpha=self.kappa * math.sqrt(self.c_c * (2 - self.c_c)))
        return p, q, min(1.0, self.c_s / self.d_s * (u * abs(u) - self.bend) / self.response)


def default_popsize(dimension: int) -> int:
    """``2 floor(5 + 1.6 ln D)``."""
    return 2 * int(5 + 1.6 * math.log(dimension))


def _lengths(dimension: int) -> tuple[float, float]:
    """``chi = E r`` of the length r of a standard normal vector, and ``E u |u|`` of ``u = r/chi - 1``."""
    half = torch.tensor(dimension / 2, dtype=torch.float64)

    def moment(k: int) -> float:
        return 2 ** (k / 2) * math.exp(math.lgamma((dimension + k) / 2) - math.lgamma(dimension / 2))

    chi = moment(1)
    below = [
        float(torch.special.gammainc(half + k / 2, torch.tensor(chi**2 / 2, dtype=torch.float64))) for k in range(3)
    ]
    shorter = below[2] * moment(2) / chi**2 - 2 * below[1] + below[0]  # E u^2 where r < chi
    return chi, moment(2) / chi**2 - 1 - 2 * shorter

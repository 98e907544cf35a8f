"""Distributions whose draws are chosen, so that every outcome of a program with all its draws can be listed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Bernoulli, Normal

NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(3)
WEIGHTS = WEIGHTS / WEIGHTS.sum()


class Chooser:
    """Goes through all sequences of choices that a program makes, however long they are."""

    def __init__(self) -> None:
        self.plan = list[list[int]]()
        self.at = 0
        self.log_weight: Any = 0.0

    def choose(self, options: int) -> int:
        if self.at == len(self.plan):
            self.plan.append([0, options])
        self.at += 1
        return self.plan[self.at - 1][0]

    def runs(self, program: Callable[[], Any]) -> Iterator[tuple[Tensor, Any]]:
        """The probability of each run, differentiable, and what it returned."""
        self.plan = []
        while True:
            self.at, self.log_weight = 0, torch.zeros((), dtype=torch.float64)
            result = program()
            yield self.log_weight.exp(), result
            while self.plan and self.plan[-1][0] == self.plan[-1][1] - 1:
                self.plan.pop()
            if not self.plan:
                return
            self.plan[-1][0] += 1


CHOOSER = Chooser()


class Coin(Bernoulli):
    def sample(self, sample_shape=()):
        shape = self._extended_shape(sample_shape)
        x = torch.tensor([float(CHOOSER.choose(2)) for _ in range(shape.numel())], dtype=torch.float64).reshape(shape)
        CHOOSER.log_weight = CHOOSER.log_weight + self.log_prob(x).sum()
        return x


class Node(Normal):
    """Noise at the nodes of a quadrature rule, which takes the place of the normal distribution on both sides."""

    def rsample(self, sample_shape=()):
        shape = self._extended_shape(sample_shape)
        chosen = [CHOOSER.choose(len(NODES)) for _ in range(shape.numel())]
        CHOOSER.log_weight = CHOOSER.log_weight + math.log(np.prod(WEIGHTS[chosen]))
        return self.loc + self.scale * torch.tensor(NODES[chosen]).reshape(shape)


class Pair:
    """Two independent draws, compared with each other: the smallest estimator, for one site of each problem."""

    def sample(self, p):
        return p.sample(torch.Size((2,)))

    def surrogate(self, p, x, fx):
        log_prob = p.log_prob(x)
        log_prob = log_prob.reshape(*fx.shape, -1).sum(-1)
        return fx.mean(0) + ((fx - fx.flip(0)).detach() * (log_prob - log_prob.detach())).sum(0) / 2

    def weights(self, p, x):
        return torch.full((2,), 0.5, dtype=torch.float64)

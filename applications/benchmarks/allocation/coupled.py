"""Coupled bits, fitted with fixed and adaptive numbers of draws."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Independent

import scorefn as sf
from scorefn.diagnostics import (
    SampleSize,
)

GRID = (8, 32, 128, 512)
TARGETS = (0.25, 1.0, 4.0)
GAPS = (0.1, 0.01)


class Coupled:
    """D coupled bits and a factorised q: ``f(x) = (x - t)^T A (x - t) + log q(x)``, whose mean is known.

    Where 2 A without its diagonal has no eigenvalue below -4, the mean is convex in the probabilities.

    Args:
        seed: of A and t.
        D: bits.
    """

    def __init__(self, seed: int, D: int = 20) -> None:
        generator = torch.Generator().manual_seed(seed)
        root = torch.randn(D, D, generator=generator, dtype=torch.float64)
        self.matrix = root @ root.T / D
        self.target = torch.rand(D, generator=generator, dtype=torch.float64)

    def energy(self, x: Tensor) -> Tensor:
        """``[N, D] -> [N]``."""
        away = x - self.target
        value: Tensor = (away @ self.matrix * away).sum(-1)
        return value

    def f(self, x: Tensor, logits: Tensor) -> Tensor:
        """``[N, D] -> [N]``; the gradient of log q has mean 0 and is left out."""
        value: Tensor = self.energy(x) + Bernoulli(logits=logits.detach()).log_prob(x).sum(-1)
        return value

    def exact(self, logits: Tensor) -> Tensor:
        """E f."""
        p = logits.sigmoid()
        entropy = Bernoulli(p).entropy().sum(-1)
        value: Tensor = self.energy(p) + (self.matrix.diagonal() * p * (1 - p)).sum(-1) - entropy
        return value


@dataclass(frozen=True)
class Training:
    """A run.

    Attributes:
        evaluations: of f, until each gap was reached; None where it was not.
        last: draws per step at the end.
        steps: how many were taken.
    """

    evaluations: tuple[int | None, ...]
    last: int
    steps: int


def train(
    problem: Coupled,
    size: SampleSize | int,
    seed: int,
    budget: int,
    best: float,
    *,
    gaps: Sequence[float] = GAPS,
    learning_rate: float = 0.05,
    momentum: float = 0.9,
) -> Training:
    """Gradient descent with momentum from q = 1/2; gaps are distances from the optimum, relative to the first.

    Args:
        problem: what to minimise.
        size: draws per step, fixed or adaptive.
        seed: of the draws.
        budget: evaluations of f.
        best: the optimum.
        gaps: to reach.
        learning_rate: of the descent.
        momentum: likewise.
    """
    torch.manual_seed(seed)
    logits = torch.zeros(len(problem.target), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([logits], learning_rate, momentum)
    first, N = float(problem.exact(logits.detach())), 0
    reached: list[int | None] = [None] * len(gaps)
    spent = steps = 0
    while spent < budget and None in reached:
        N = size if isinstance(size, int) else size.num_samples
        draws = sf.draw(Independent(Bernoulli(logits=logits), 1), partial(problem.f, logits=logits), N)
        surrogate = sf.surrogate(draws, baseline=sf.LeaveOneOut())
        if isinstance(size, SampleSize):
            size.observe(surrogate, logits)
        optimizer.zero_grad()
        surrogate.mean().backward()
        optimizer.step()
        spent, steps = spent + N, steps + 1
        gap = (float(problem.exact(logits.detach())) - best) / (first - best)
        reached = [spent if now is None and gap <= wanted else now for now, wanted in zip(reached, gaps, strict=True)]
    return Training(tuple(reached), N, steps)


def optimum(problem: Coupled, steps: int = 2000) -> float:
    """Where descent on the exact gradient ends."""
    logits = torch.zeros(len(problem.target), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([logits], 0.2, 0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        problem.exact(logits).backward()
        optimizer.step()
    return float(problem.exact(logits.detach()))


def adaptive(target: float) -> SampleSize:
    """Such as the training runs have."""
    return SampleSize(target, least=GRID[0], most=GRID[-1], every=10)


def training(
    seeds: int, budget: int, shown: Callable[[str], None], should_stop: Callable[[], bool] = lambda: False
) -> dict[str, Any]:
    """Evaluations to reach each gap, by seed; None: not within the budget."""
    ways: dict[str, Callable[[], SampleSize | int]] = {f"N = {N}": partial(int, N) for N in GRID}
    ways |= {f"SNR {target:g}": partial(adaptive, target) for target in TARGETS}
    rows: dict[str, Any] = {name: {"evaluations": [], "last": []} for name in ways}
    for seed in range(seeds):
        problem = Coupled(seed)
        best = optimum(problem)
        for name, make in ways.items():
            found = train(problem, make(), seed, budget, best)
            rows[name]["evaluations"].append(found.evaluations)
            rows[name]["last"].append(found.last)
            shown(f"training: seed {seed}, {name}: {found.evaluations}")
            if should_stop():
                return rows
    return rows


def meter_overhead(steps: int = 200, num_samples: int = 64, features: int = 64) -> float:
    """CPU time of a training step with ``observe`` over one without, a ratio of sums, in turns."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(features, 128), torch.nn.Tanh(), torch.nn.Linear(128, 10))
    inputs, rewards = torch.randn(50, features), torch.randn(50, 10)
    parameters, size = list(net.parameters()), SampleSize(1.0, most=num_samples)
    seconds = {True: 0.0, False: 0.0}
    for number in range(2 * steps):
        measured = number % 2 == 0
        begin = time.process_time()
        draws = sf.draw(Categorical(logits=net(inputs)), lambda x: rewards.gather(1, x.T).T, num_samples)
        surrogate = sf.surrogate(draws, baseline=sf.LeaveOneOut())
        if measured:
            size.observe(surrogate, parameters)
        net.zero_grad()
        surrogate.mean().backward()
        if number >= 20:
            seconds[measured] += time.process_time() - begin
    return seconds[True] / seconds[False]

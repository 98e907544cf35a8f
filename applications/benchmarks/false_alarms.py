"""False alarms of the tests of unbiasedness, over many simulated runs; part of ``unbiased``."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Bernoulli

import scorefn as sf
from scorefn.diagnostics import Estimation, FixedSample, Hotelling, Sequential, exact_gradient

Test = FixedSample | Hotelling | Sequential


@dataclass(frozen=True)
class Law:
    """Of simulated gradients without bias.

    Args:
        name: in the table.
        rows: so many of them, ``count -> [count, P]``.
        mean: exact, ``[P]``.
    """

    name: str
    rows: Callable[[int], Tensor]
    mean: Tensor


def normal_law() -> Law:
    return Law("normal, P = 3", lambda count: 1.0 + torch.randn(count, 3, dtype=torch.float64), _ones(3))


def rare_law() -> Law:
    """Events of probability 1/20, whose squared skewness is 17."""
    return Law("events, p = .05", lambda count: (torch.rand(count, 1) < 0.05).double() + 0.95, _ones(1))


def leave_one_out_law() -> Law:
    """Leave-one-out from 2 draws of two Bernoullis, two coordinates: any of the 16 outcomes, by its probability."""
    logits = torch.tensor([0.5, -0.7], dtype=torch.float64, requires_grad=True)
    p = Bernoulli(logits=logits)
    work = Estimation(p, lambda x: (x.sum(-1) - 0.6).square(), partial(sf.expectation, num_samples=2))
    outcomes = torch.tensor(list(itertools.product((0.0, 1.0), repeat=4)), dtype=torch.float64).reshape(-1, 2, 2)
    gradients = torch.stack(
        [torch.autograd.grad(work.at(lambda _, x=x: x)(), logits, retain_graph=True)[0] for x in outcomes]  # type: ignore[misc]
    )
    edges = p.log_prob(outcomes).sum((1, 2)).exp().detach().cumsum(0)

    def rows(count: int) -> Tensor:
        return gradients[torch.searchsorted(edges / edges[-1], torch.rand(count, dtype=torch.float64), right=True)]

    return Law("leave-one-out, P = 2", rows, exact_gradient(p, work.f, logits)[0])


def _ones(size: int) -> Tensor:
    return torch.ones(size, dtype=torch.float64)


@dataclass(frozen=True)
class Case:
    """A test on a law, and how many rows a run has."""

    law: Law
    test: Test
    count: int


def calibration_cases() -> list[Case]:
    """Every test on every law, with as many rows as its guard asks for."""
    normal, rare, leave_one_out = normal_law(), rare_law(), leave_one_out_law()
    return [
        Case(normal, FixedSample(), 1000),
        Case(normal, Hotelling(1000, 100), 1000),
        Case(normal, Sequential(10_000), 10_000),
        Case(rare, FixedSample(), 24_000),
        Case(rare, Hotelling(24_000, 1000), 24_000),
        Case(rare, Sequential(48_000, 4000, 24_000), 48_000),
        Case(leave_one_out, FixedSample(), 5000),
        Case(leave_one_out, Hotelling(5000, 500), 5000),
        Case(leave_one_out, Sequential(15_000, 1000, 5000), 15_000),
    ]


def binomial_interval(runs: int, rate: float, outside: float = 0.01) -> tuple[int, int]:
    """The counts that a binomial number leaves with probability ``outside`` at most, half on each side."""
    k = torch.arange(runs + 1, dtype=torch.float64)
    log_choose = torch.lgamma(torch.tensor(runs + 1.0).double()) - torch.lgamma(k + 1) - torch.lgamma(runs - k + 1)
    mass = (
        log_choose + k * torch.tensor(rate).double().log() + (runs - k) * torch.tensor(1 - rate).double().log()
    ).exp()
    below = mass.cumsum(0)
    return int((below < outside / 2).sum()), int((below < 1 - outside / 2).sum())


def false_alarms(case: Case, runs: int, alpha: float) -> dict[str, Any]:
    """How many runs the test calls biased, and how many its guard leaves open; nothing is ever called unbiased."""
    begin = time.process_time()
    law, name = case.law, type(case.test).__name__
    reports = [case.test.judge(law.rows(case.count), law.mean, bias=1e-9, false_alarm=alpha) for _ in range(runs)]
    biased = sum(report.verdict == "biased" for report in reports)
    low, high = binomial_interval(runs, alpha)
    return {
        "law": law.name,
        "test": name,
        "rows": case.count,
        "runs": runs,
        "alarms": biased,
        "guarded": sum("too skewed" in report.reason for report in reports),
        "interval": [low, high],
        "within": biased <= high and (name == "Sequential" or biased >= low),
        "seconds": time.process_time() - begin,
    }
